"""Sums and maps over chunks of tokens whose gradients are taken chunk by chunk. Knows nothing of losses.

    sum_over(f, (products, shared, chunks)) = Σ_c f(shared, chunk_c, *logits_c)            a scalar, and numbers a token
    map_over(f, (products, shared, chunks))[:, c] = f(shared, chunk_c, *logits_c)          numbers a token

`chunks` is a pytree of arrays [size, count, ...]; chunk c is [:, c]. Tokens are dealt out in turn, token t to chunk
t % count, so that a batch that is sharded over its first axis stays where it is. `shared` is a pytree that every
chunk sees. Floating arrays come to `f` as float32 where they are 16-bit, so that their gradient is float32 until the
one cast at the end; `f` casts back where it wants to. `f` closes over nothing traced.

The gradient of the sum is taken in the forward loop, since one scalar cotangent multiplies all of it afterwards:
three matrix products for a linear layer, where recomputing the chunk in the backward pass would cost four. The map has
a cotangent of its own for every token, so its chunks are made again in the backward loop.

The logits of the `products` are made and dropped, and the gradients of their operands are taken at two levels:

    a chunk                    float32 logits and their gradient, which is kept, as `kept_in` says
    a super-chunk, of chunks   two products of what is kept: dx of all its tokens, and dweight, summed in float32

Where one super-chunk is all, its products stand in the backward pass, with cotangent and cast in their epilogue. A
gradient that nobody asks for is no special case: compiled with the rest, it is dead code.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from softmax_jax._devices import PyTree, buffer_for, sum_over_sharing_devices, vary, varying, zeros_as
from softmax_jax._head.product import Product, kept_in
from softmax_jax._inputs.arrays import accumulator, is_floating, upcast
from softmax_jax._transforms import keeping_its_rule

Products = tuple[Product, ...]
ChunkOperands = tuple[Products, PyTree, PyTree]  # products, shared, chunks


def sum_over(
    f: Callable[..., tuple[Array, PyTree]], operands: ChunkOperands, super_chunks: int = 1, forward_mode: bool = False
) -> tuple[Array, PyTree]:
    """Σ_c f(shared, chunk_c, *logits_c) in float32, with its gradient computed and summed chunk by chunk; beside it f
    gives numbers [size], which have no gradient, each as [size, count].

    `super_chunks`, in how many parts the gradients of products are taken, divides the count. In `forward_mode` the loop
    has no rule of its own, and its backward pass makes each chunk again.

    Inside `shard_map`, an operand that is the same on devices over which the sum varies has the sum of their gradients,
    taken once, after the loops.
    """
    refuse_closure(f, *operands)
    return _plain_sum(_rematerialized(f), f, _up(operands)) if forward_mode else _sum(f, super_chunks, *operands)


def map_over(
    f: Callable[..., PyTree], operands: ChunkOperands, super_chunks: int = 1, forward_mode: bool = False
) -> PyTree:
    """f(shared, chunk_c, *logits_c) of every chunk: numbers [size] in any pytree, each as [size, count]."""
    refuse_closure(f, *operands)
    return _plain_map(_rematerialized(f), f, _up(operands)) if forward_mode else _map(f, super_chunks, *operands)


def _rematerialized(f: Callable) -> Callable:
    return jax.checkpoint(partial(_of_index, f, logits_of=Product.differentiable_logits), prevent_cse=False)


def refuse_closure(f: Callable, *operands: PyTree) -> PyTree:
    """What f returns, as shapes."""
    jaxpr, shapes = _traced(f, *operands)
    if any(isinstance(const, Tracer) for const in jaxpr.consts):
        raise ValueError(
            "the function given to a sum or map over chunks closes over a traced value: its gradient would be lost. "
            "Pass that value in `shared`, or in `chunks` if there is one a token."
        )
    return shapes


def _traced(f: Callable, *operands: PyTree) -> tuple[Any, PyTree]:
    """f of one chunk, as (a jaxpr, the pytree of its results)."""
    return jax.make_jaxpr(partial(_of_index, f, 0), return_shape=True)(*operands)


def _of_index(
    f: Callable,
    index: ArrayLike,
    products: Products,
    shared: PyTree,
    chunks: PyTree,
    logits_of: Callable[[Product, ArrayLike], Array] = Product.logits,
) -> PyTree:
    return f(_up(shared), _up(_take(chunks, index)), *(logits_of(product, index) for product in products))


def _up(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: upcast(a) if is_floating(a) else a, tree)


def _take(chunks: PyTree, index: ArrayLike) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 1, keepdims=False), chunks)


def _put(chunks: PyTree, part: PyTree, index: ArrayLike) -> PyTree:
    def put(a: Array, p: Array) -> Array:
        return lax.dynamic_update_index_in_dim(a, p.astype(a.dtype), index, 1)

    return jax.tree.map(put, chunks, part)


def _count(products: Products, chunks: PyTree) -> int:
    return jax.tree.leaves((tuple(product.x for product in products), chunks))[0].shape[1]


def _loop(body: Callable, init: PyTree, count: int) -> PyTree:
    """`body(index, carry)`, `count` times. Once is not a loop at all."""
    if count == 1:
        return body(0, init)
    return lax.scan(lambda carry, index: (body(index, carry), None), init, jnp.arange(count))[0]


def _zeros(f: Callable, *operands: PyTree) -> PyTree:
    """What f returns for a chunk, all 0."""
    jaxpr, shapes = _traced(f, *operands)
    return jax.tree.unflatten(jax.tree.structure(shapes), [zeros_as(kind) for kind in jaxpr.out_avals])


# What has a gradient: the floating leaves of an operand, as a list.


def _floats(tree: PyTree) -> list[Array]:
    return [a for a in jax.tree.leaves(tree) if is_floating(a)]


def _with_floats(tree: PyTree, floats: list[Array], others: Callable = lambda a: a) -> PyTree:
    rest = iter(floats)
    return jax.tree.map(lambda a: next(rest) if is_floating(a) else others(a), tree)


def _vjp(f: Callable, shared: PyTree, chunk: PyTree, logits: list[Array]) -> tuple[PyTree, Callable]:
    """f of one chunk, and its pullback to the floats of `shared` and `chunk` and to the logits."""

    def of(s: list[Array], c: list[Array], logits: list[Array]) -> PyTree:
        return f(_with_floats(shared, s), _with_floats(chunk, c), *logits)

    return jax.vjp(of, _floats(_up(shared)), _floats(_up(chunk)), logits)


def _pull(f: Callable, super_chunks: int, operands: ChunkOperands, cotangents: PyTree | None) -> tuple:
    """One loop for value and gradients, all in float32: (the sum and what is beside it, or None, d(shared), d(chunks),
    those of the products); the last are dlogits where there is one super-chunk, else (dx, dweight).

    `cotangents` are those of f's results, [size, count]; None is 1 for the scalar of a sum, which is then returned.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def step(shared: PyTree, chunk: PyTree, logits: list[Array], cotangent: PyTree) -> tuple:
        value, pull = _vjp(f, shared, chunk, logits)
        dshared, dchunk, dlogits = pull(_of_sum(value) if cotangent is None else cotangent)
        return value, dshared, dchunk, [d.astype(kept_in(p.dtype)) for d, p in zip(dlogits, products, strict=True)]

    zeros = _zeros(f, *operands)
    products, shared, chunks = vary(operands, varying(zeros))
    count = _count(products, chunks)
    inner = count // super_chunks

    def of_chunks(first: ArrayLike, carry: tuple) -> tuple:
        """(sums, dlogits), with those of the chunks from the `first` on."""

        def body(i: ArrayLike, carry: tuple) -> tuple:
            (total, dshared, dchunks), kept = carry
            index = first + i
            logits = [product.logits(index) for product in products]
            value, dshared_here, dchunk, dlogits = step(shared, _take(chunks, index), logits, _take(cotangents, index))
            total = None if total is None else _added(total, value, index)
            sums = total, jax.tree.map(jnp.add, dshared, dshared_here), _put(dchunks, dchunk, index)
            return sums, _put(kept, dlogits, i)

        return _loop(body, carry, inner)

    def of_super_chunk(i: ArrayLike, carry: tuple) -> tuple:
        *sums, gradients = carry
        sums, dlogits = of_chunks(i * inner, tuple(sums))
        added = [product.add(*of, i * inner) for product, *of in zip(products, gradients, dlogits, strict=True)]
        return sums, dlogits, added

    of_operands = jax.tree.map(buffer_for, (_floats(_up(shared)), _floats(_up(chunks))))
    total = _nothing(zeros, count) if cotangents is None else None
    carry = (total, *of_operands), [product.buffer(inner) for product in products]
    if super_chunks == 1:
        sums, of_products = of_chunks(0, carry)
    else:
        init = [jax.tree.map(buffer_for, p.operands(accumulator(p.dtype))) for p in products]
        sums, _, of_products = _loop(of_super_chunk, (*carry, init), super_chunks)
    return *sums, of_products


def _gradients(
    super_chunks: int,
    operands: ChunkOperands,
    dshared: list[Array],
    dchunks: list[Array],
    of_products: list[Any],
    factor: Array | float = 1.0,
) -> ChunkOperands:
    """What `_pull` found, as the gradients of all operands: multiplied by `factor`, summed over the devices that share
    an operand, and cast once."""
    products, shared, chunks = operands

    def cast(gradient: Array, operand: Array) -> Array:
        return sum_over_sharing_devices(gradient * jnp.asarray(factor, gradient.dtype), operand).astype(operand.dtype)

    def of_tree(tree: PyTree, gradients: list[Array]) -> PyTree:
        return _with_floats(tree, list(map(cast, gradients, _floats(tree))), lambda a: None)

    if super_chunks == 1:
        of_products = [product.gradients(dlogits, 0) for product, dlogits in zip(products, of_products, strict=True)]
    dproducts = (
        replace(product, x=cast(dx, product.x), weight=cast(dweight, product.weight), weights=None)
        for product, (dx, dweight) in zip(products, of_products, strict=True)
    )
    return tuple(dproducts), of_tree(shared, dshared), of_tree(chunks, dchunks)


def _nothing(zeros: tuple[Array, PyTree], count: int) -> tuple[Array, PyTree]:
    """A sum before its first chunk, by what f returns for one."""
    return zeros[0], _for_all(zeros[1], count)


def _for_all(zeros: PyTree, count: int) -> PyTree:
    """[size] to [size, count]"""
    return jax.tree.map(lambda one: jnp.broadcast_to(one[:, None], (len(one), count)), zeros)


def _added(sums: tuple[Array, PyTree], of_chunk: tuple[Array, PyTree], index: ArrayLike) -> tuple[Array, PyTree]:
    return sums[0] + of_chunk[0], _put(sums[1], of_chunk[1], index)


def _of_sum(value: tuple[Array, PyTree]) -> PyTree:
    """The cotangent by which f is pulled back: 1 for its scalar, none for what is beside."""

    def none(a: Array) -> Array | np.ndarray:
        return jnp.zeros_like(a) if is_floating(a) else np.zeros(a.shape, jax.dtypes.float0)

    return jnp.ones_like(value[0]), jax.tree.map(none, value[1])


# The rules. Neither asks what is perturbed: its residuals have one structure.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(f: Callable, super_chunks: int, *operands: PyTree) -> tuple[Array, PyTree]:
    return _plain_sum(partial(_of_index, f), f, operands)


def _plain_sum(of_index: Callable, f: Callable, operands: ChunkOperands) -> tuple[Array, PyTree]:
    count = _count(operands[0], operands[2])

    def of_chunk(index: ArrayLike, sums: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        return _added(sums, of_index(index, *operands), index)

    return _loop(of_chunk, _nothing(_zeros(f, *operands), count), count)


def _sum_fwd(f: Callable, super_chunks: int, *operands: PyTree) -> tuple[PyTree, PyTree]:
    sums, *gradients = keeping_its_rule(partial(_pull, f, super_chunks))(operands, None)
    return sums, (operands, gradients)


def _sum_bwd(f: Callable, super_chunks: int, residuals: PyTree, cotangents: PyTree) -> ChunkOperands:
    operands, (dshared, dchunks, of_products) = residuals
    return _gradients(super_chunks, operands, dshared, dchunks, of_products, cotangents[0])


_sum.defvjp(_sum_fwd, _sum_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map(f: Callable, super_chunks: int, *operands: PyTree) -> PyTree:
    return _plain_map(partial(_of_index, f), f, operands)


def _plain_map(of_index: Callable, f: Callable, operands: ChunkOperands) -> PyTree:
    count, init = _count(operands[0], operands[2]), _zeros(f, *operands)
    return _loop(lambda index, out: _put(out, of_index(index, *operands), index), _for_all(init, count), count)


def _map_fwd(f: Callable, super_chunks: int, *operands: PyTree) -> tuple[PyTree, ChunkOperands]:
    """By way of `jax.vjp`: a rule inside f that is called by itself has no second derivative."""

    def of_index(index: ArrayLike, products: Products, shared: PyTree, chunks: PyTree) -> PyTree:
        return _vjp(f, shared, _take(chunks, index), [product.logits(index) for product in products])[0]

    return keeping_its_rule(partial(_plain_map, of_index, f))(operands), operands


def _map_bwd(f: Callable, super_chunks: int, operands: ChunkOperands, cotangents: PyTree) -> ChunkOperands:
    """By those results that are floats."""
    _, *gradients = _pull(lambda *of_chunk: _floats(f(*of_chunk)), super_chunks, operands, _floats(cotangents))
    return _gradients(super_chunks, operands, *gradients)


_map.defvjp(_map_fwd, _map_bwd)
