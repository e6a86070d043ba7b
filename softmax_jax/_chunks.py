"""Sums and maps over chunks of tokens whose gradients are taken chunk by chunk. Knows nothing of losses.

    sum_over_chunks(f, shared, chunks) = Σ_c f(shared, chunk_c)            f is scalar
    map_over_chunks(f, shared, chunks)[:, c] = f(shared, chunk_c)          f gives numbers a token, [size] each

`chunks` is a pytree of arrays [size, count, ...]; chunk c is [:, c]. Tokens are dealt out in turn, token t to chunk
t % count, so that a batch that is sharded over its first axis stays where it is. `shared` is a pytree that every
chunk sees. What a gradient is asked of, and all of `shared`, comes to `f` as float32 where it is 16-bit, so that its
gradient is float32 until the one cast at the end; `f` casts back where it wants to. `f` closes over nothing traced.

The gradient of the sum is taken in the forward loop, since one scalar cotangent multiplies all of it afterwards:
three matrix products for a linear layer, where recomputing the chunk in the backward pass would cost four. The map has
a cotangent of its own for every token, so its chunks are made again in the backward loop. Only operands whose gradient
is asked for get one, and of the outputs of a map only those whose cotangent is not 0 are made again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from softmax_jax._dtypes import upcast
from softmax_jax._sharding import buffer_for, same_on_devices, vary, varying, zeros_as

PyTree = Any


def sum_over_chunks(f: Callable[[PyTree, PyTree], Array], shared: PyTree, chunks: PyTree) -> Array:
    """Σ_c f(shared, chunk_c) in float32, with its gradient computed and summed chunk by chunk.

    Args:
      f: (shared, chunk) -> scalar. It must take every traced value as an argument.
      shared: a pytree of arrays.
      chunks: a pytree of arrays [size, count, ...], the same count for all; `f` gets [size, ...].

    Inside `shard_map`, an operand that is the same on devices over which the sum varies has the sum of their gradients:
    taken once, after the loop, in float32.

    Raises:
      ValueError: when `f` closes over a traced value.
    """
    _refuse_closure(f, shared, chunks)
    return _sum(f, shared, chunks)


def map_over_chunks(f: Callable[[PyTree, PyTree], PyTree], shared: PyTree, chunks: PyTree) -> PyTree:
    """f(shared, chunk_c) for every chunk: as `sum_over_chunks`, of an `f` whose results are [size], one a token, in any
    pytree; each comes back as [size, count]."""
    _refuse_closure(f, shared, chunks)
    return _map(f, shared, chunks)


def _refuse_closure(f, shared, chunks):
    if any(isinstance(const, Tracer) for const in _traced(f, shared, chunks)[0].consts):
        raise ValueError(
            "the function given to a sum or map over chunks closes over a traced value, whose gradient would be lost. "
            "Pass that value in `shared`, or in `chunks` if there is one a token."
        )


def _traced(f, shared, chunks):
    """f of one chunk, as (a jaxpr, the pytree of its results)."""
    of_first = lambda shared, chunks: f(_up(shared), _take(chunks, 0))  # noqa: E731
    return jax.make_jaxpr(of_first, return_shape=True)(shared, chunks)


def _up(shared: PyTree) -> PyTree:
    return jax.tree.map(lambda a: upcast(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, shared)


def _take(chunks: PyTree, index: ArrayLike) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 1, keepdims=False), chunks)


def _put(chunks: PyTree, part: PyTree, index: ArrayLike) -> PyTree:
    return jax.tree.map(lambda a, p: lax.dynamic_update_index_in_dim(a, p, index, 1), chunks, part)


def _loop(body: Callable, init: PyTree, chunks: PyTree) -> PyTree:
    """`body(index, carry)` for every chunk. One chunk is not a loop at all."""
    count = jax.tree.leaves(chunks)[0].shape[1]
    if count == 1:
        return body(0, init)
    return lax.scan(lambda carry, index: (body(index, carry), None), init, jnp.arange(count))[0]


# Which gradients are asked for differs from call to call, but the structure of what a rule keeps may not: JAX reads it
# off one trace and uses it with the program of another (jax#16614). So an operand is carried as two pytrees of its own
# structure, (asked, given): each leaf stands in `asked` where its gradient is asked for and in `given` otherwise, and
# has no elements in the other. What has no elements in `asked` gets no gradient.


def _split(operand: PyTree) -> tuple[PyTree, PyTree]:
    """(asked, given) of an operand as custom_vjp hands it over with `symbolic_zeros`."""
    is_leaf = lambda a: hasattr(a, "perturbed")  # noqa: E731
    asks = lambda a: a.perturbed and a.value.size and jnp.issubdtype(a.value.dtype, jnp.floating)  # noqa: E731
    asked = jax.tree.map(lambda a: a.value if asks(a) else _emptied(a.value), operand, is_leaf=is_leaf)
    return asked, jax.tree.map(lambda a: _emptied(a.value) if asks(a) else a.value, operand, is_leaf=is_leaf)


def _emptied(array: Array) -> Array:
    """None of an array's elements, on the same devices, in a dtype that may have a gradient."""
    array = array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
    return array[:0] if array.ndim else array[None][:0]


def _joined(asked: PyTree, given: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a if a.size else b, asked, given)


def _pull(f, shared, chunks, cotangents: PyTree | None) -> tuple[Array | None, PyTree, PyTree]:
    """One loop for value and gradients: (Σ f or None, d(shared), d(chunks)), both in float32.

    `cotangents` are those of f's results, [size, count]; None is 1 for a scalar f, whose sum is then returned.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def step(shared, chunk, cotangent):
        value, pull = _vjp(f, shared, chunk)
        return value, *pull(jnp.ones_like(value) if cotangent is None else cotangent)

    zeros = _zeros(f, _joined(*shared), _joined(*chunks))
    shared, chunks = vary((shared, chunks), varying(zeros))

    def body(index, carry):
        total, dshared, dchunks = carry
        value, dshared_here, dchunk = step(shared, _take(chunks, index), _take(cotangents, index))
        total = None if total is None else total + value
        return total, jax.tree.map(jnp.add, dshared, dshared_here), _put(dchunks, dchunk, index)

    total = zeros if cotangents is None else None
    return _loop(body, (total, *jax.tree.map(buffer_for, (_up(shared[0]), _up(chunks[0])))), chunks)


def _vjp(f, shared, chunk):
    """f of one chunk, and its pullback to what is asked for; `shared` and `chunk` are (asked, given)."""
    (asked_shared, given_shared), (asked_chunk, given_chunk) = shared, chunk
    of_asked = lambda s, c: f(_joined(s, _up(given_shared)), _joined(c, given_chunk))  # noqa: E731
    return jax.vjp(of_asked, _up(asked_shared), _up(asked_chunk))


def _zeros(f, shared, chunks) -> PyTree:
    """What f returns for a chunk, all 0."""
    jaxpr, shapes = _traced(f, shared, chunks)
    return jax.tree.unflatten(jax.tree.structure(shapes), [zeros_as(kind) for kind in jaxpr.out_avals])


def _cast(gradients: PyTree, operands: PyTree, factor: Array | float = 1.0) -> PyTree:
    """Gradients in the dtype of their operands, which may be emptied; multiplied by `factor`, and summed over the
    devices that share an operand, before that one cast. None for what was not asked for."""
    scaled = lambda g: g * jnp.asarray(factor, g.dtype)  # noqa: E731
    cast = lambda g, a: same_on_devices(scaled(g), a).astype(a.dtype) if g.size else None  # noqa: E731
    return jax.tree.map(cast, gradients, operands)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(f, shared, chunks):
    return _loop(lambda index, total: total + f(_up(shared), _take(chunks, index)), _zeros(f, shared, chunks), chunks)


def _sum_fwd(f, shared, chunks):
    shared, chunks = _split(shared), _split(chunks)
    total, dshared, dchunks = _pull(f, shared, chunks, None)
    return total, (dshared, dchunks, *jax.tree.map(_emptied, (shared[0], chunks[0])))


def _sum_bwd(f, residuals, cotangent):
    dshared, dchunks, shared, chunks = residuals
    return _cast(dshared, shared, cotangent), _cast(dchunks, chunks, cotangent)


_sum.defvjp(_sum_fwd, _sum_bwd, symbolic_zeros=True)


def _map_loop(of_index, f, shared, chunks):
    size, count = jax.tree.leaves(chunks)[0].shape[:2]
    init = jax.tree.map(lambda one: jnp.broadcast_to(one[:, None], (size, count)), _zeros(f, shared, chunks))
    return _loop(lambda index, out: _put(out, of_index(index), index), init, chunks)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map(f, shared, chunks):
    return _map_loop(lambda index: f(_up(shared), _take(chunks, index)), f, shared, chunks)


def _map_fwd(f, shared, chunks):
    shared, chunks = _split(shared), _split(chunks)
    # By way of jax.vjp, since rules inside f that are called plainly have no second derivative.
    of_index = lambda index: _vjp(f, shared, [_take(c, index) for c in chunks])[0]  # noqa: E731
    return _map_loop(of_index, f, _joined(*shared), _joined(*chunks)), (shared, chunks)


def _map_bwd(f, residuals, cotangents):
    shared, chunks = residuals
    # Integers and what nobody uses have none.
    given = lambda c: not isinstance(c, SymbolicZero) and c.dtype != jax.dtypes.float0  # noqa: E731
    used = {i: c for i, c in enumerate(jax.tree.leaves(cotangents)) if given(c)}

    def of_used(shared, chunk):
        results = jax.tree.leaves(f(shared, chunk))
        return {i: results[i] for i in used}

    _, dshared, dchunks = _pull(of_used, shared, chunks, used)
    return _cast(dshared, shared[0]), _cast(dchunks, chunks[0])


_map.defvjp(_map_fwd, _map_bwd, symbolic_zeros=True)
