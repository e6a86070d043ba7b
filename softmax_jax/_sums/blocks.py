"""Sums over the classes as they are written: on the CPU over blocks of tokens whose logits stay in the cache.

XLA on the CPU makes a pass over memory of each row sum, and of what feeds two of them or holds a comparison. Inside a
block such a pass reads the cache, so nothing here is arranged for the compiler: z once, its maximum, the first class
that has it, and a sum each.

A block's operands have one rank, with the classes on one axis of it, and broadcast against each other; scalars are
scalars. That axis counts from the end, so that a mapped axis is one more batch axis in front.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike

from softmax_jax._devices import Classes, PyTree, count, explicit_mesh, laid_out_by_compiler, psum, vary, varying
from softmax_jax._inputs.arrays import upcast
from softmax_jax._inputs.options import adjust, clip_for_exp, even_targets, weighted_targets, zero_hidden
from softmax_jax._sums.combine import finite_max, mass_times
from softmax_jax._sums.waist import ClassSums, Tokens
from softmax_jax._transforms import barrier

BLOCK = 2**20
"""Logits of a block: 4 MiB in float32."""

PLATFORMS = ("cpu",)
"""Those on which sums are made in blocks, and on which other things are written for XLA on the CPU."""


def on_cpu_or_elsewhere(on_cpu: Callable, elsewhere: Callable, *operands: PyTree) -> PyTree:
    """The one place at which the ways of the CPU and of all other platforms part: both are traced, one is compiled."""
    return lax.platform_dependent(*operands, default=elsewhere, **dict.fromkeys(PLATFORMS, on_cpu))


def in_blocks_or_one_pass(in_blocks: Callable, in_one_pass: Callable, axis: int, operands: PyTree) -> PyTree:
    """The sums of every token, numbers with the axis of the classes of size 1. What is laid out explicitly has no
    blocks."""
    if explicit_mesh(operands) is not None:
        return in_one_pass(operands)
    return on_cpu_or_elsewhere(partial(over_blocks, in_blocks, axis), in_one_pass, operands)


def block_sums(tokens: Tokens, *, axis: int) -> ClassSums:
    """The sums of every token of a block, each with the axis of the classes of size 1. The pivot is taken out of the
    logits before they are summed."""
    logits, adjustment, class_weights = tokens.logits, tokens.adjustment, tokens.class_weights
    shape = jnp.broadcast_shapes(*(a.shape for a in jax.tree.leaves(tokens)))
    total, largest = (partial(f, axis=axis, keepdims=True) for f in (jnp.sum, partial(jnp.max, initial=-jnp.inf)))
    z, classes = jnp.broadcast_to(upcast(adjust(logits, adjustment)), shape), Classes(len(shape) + axis)
    if any(option is not None for option in adjustment):
        (z,) = barrier(z)  # made once: what is compared and what is subtracted is the same number
    ids = lax.broadcasted_iota(jnp.int32, shape, classes.axis)
    if tokens.label is None:
        m = largest(z)
        last = z.shape[axis] - 1  # of a row of NaN, in which none is the largest
        pivot = jnp.min(jnp.where(z == m, ids, last), axis, keepdims=True, initial=last)
        others, more = classes.scatter(pivot, jnp.full_like(m, -jnp.inf), z), {"pivot": pivot}
    else:
        pivot = jnp.broadcast_to(tokens.label, [1 if a == classes.axis else size for a, size in enumerate(shape)])
        label_z, raw = classes.gather(pivot, z, -jnp.inf), classes.gather(pivot, jnp.broadcast_to(logits, shape), 0)
        others, more = classes.scatter(pivot, jnp.full_like(label_z, -jnp.inf), z), {"label_logit": upcast(raw)}
        m = jnp.maximum(largest(others), label_z)
    centred, others = z - finite_max(m), others - finite_max(m)
    if tokens.label is None:
        (others,) = barrier(others)  # made once, for several sums
    rest = total(jnp.exp(others))
    if tokens.extra.statistics:
        above = (z > tokens.labels.z) & (ids != tokens.labels.ids)
        more |= {"above": total(above, dtype=z.dtype), "moment": total(jnp.exp(others) * -clip_for_exp(others))}
    if tokens.extra.even:
        c = even_targets(class_weights, adjustment.where, z)
        more |= {"even_mass": total(c), "even_sum": total(mass_times(c, centred))}
    if tokens.values is not None:
        t = weighted_targets(jnp.broadcast_to(tokens.values, shape), class_weights, adjustment.where, z.dtype)
        own_mass, t = classes.gather(pivot, t), classes.scatter(pivot, jnp.zeros_like(m), t)
        more |= {"own_mass": own_mass, "other_mass": total(t), "label_sum": total(mass_times(t, others))}
    return ClassSums(m, rest, **more)


def sum_over_classes(f: Callable, classes: Classes, *operands: PyTree) -> PyTree:
    """Σ_v f(v, *operands) of every token over this device's classes. v is the number of each, counted from the first
    here; the sums are plain, and so are their derivatives."""
    rank = max(jax.tree.leaves(jax.tree.map(jnp.ndim, operands)))
    sums = _plain_sums(f, classes.axis - rank, operands)
    return jax.tree.map(lambda a: jnp.squeeze(a, classes.axis), sums)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _plain_sums(f: Callable, axis: int, operands: tuple) -> PyTree:
    plain, in_pairs = (partial(sums, f, axis) for sums in (_plain, _in_pairs))

    def elsewhere(operands: tuple) -> PyTree:
        return lax.platform_dependent(_own_numbers(axis, operands), tpu=plain, default=in_pairs)

    return in_blocks_or_one_pass(plain, elsewhere, axis, operands)


@_plain_sums.defjvp
def _plain_sums_jvp(f: Callable, axis: int, primals: tuple, tangents: tuple) -> tuple:
    plain = jax.checkpoint(partial(_plain, f, axis), prevent_cse=False)
    return _plain_sums(f, axis, *primals), jax.jvp(plain, primals, tangents)[1]


def _terms(f: Callable, axis: int, operands: tuple) -> PyTree:
    shape = jnp.broadcast_shapes(*map(jnp.shape, jax.tree.leaves(operands)))
    return f(lax.broadcasted_iota(jnp.int32, shape, len(shape) + axis), *operands)


def _plain(f: Callable, axis: int, operands: tuple) -> PyTree:
    return jax.tree.map(partial(jnp.sum, axis=axis, keepdims=True), _terms(f, axis, operands))


def _in_pairs(f: Callable, axis: int, operands: tuple) -> PyTree:
    """The same for a GPU. There XLA writes out an exponential that several sums share, unless it is one sum: so two are
    the parts of a complex one, and each such pair has exponentials of its own."""
    leaves, tree = jax.tree.flatten(_terms(f, axis, operands))
    sums: list[Array] = []
    while len(sums) + 1 < len(leaves):
        both = jnp.sum(lax.complex(*leaves[len(sums) :][:2]), axis, keepdims=True)
        sums += [jnp.real(both), jnp.imag(both)]
        if len(sums) < len(leaves):
            operands = _own_numbers(axis, operands)
            leaves = jax.tree.leaves(_terms(f, axis, operands))
    return tree.unflatten([*sums, *(jnp.sum(term, axis, keepdims=True) for term in leaves[len(sums) :])])


def _own_numbers(axis: int, operands: PyTree) -> PyTree:
    """With numbers of a token that no other sums have: XLA would write out the exponentials that both have."""
    return jax.tree.map(lambda a: barrier(a)[0] if not a.ndim or a.shape[axis] == 1 else a, operands)


def num_existing(where: Array | None, size: int, classes: Classes, dtype: DTypeLike) -> Array:
    """K, how many classes of a token exist, on all devices; `size` are here."""
    if where is None:
        return jnp.asarray(count(size, classes.over), dtype)
    width = size if where.shape[classes.axis] == 1 else 1
    return psum(sum_over_classes(lambda _, where: where.astype(dtype), classes, where) * width, classes.over)


def even_mass_of(class_weights: Array, where: Array | None, classes: Classes) -> Array:
    """Σ_v c_v over the classes that exist, on all devices."""
    return psum(sum_over_classes(lambda _, *arrays: zero_hidden(*arrays), classes, class_weights, where), classes.over)


def fence_gradient(gradient: Array) -> Array:
    """The same gradient of logits. XLA on the CPU transposes one of several batch axes for the product that made the
    logits, and makes it twice: 8 x 256 tokens with 8192 classes took 1.43 of Optax's time, with this fence 0.99."""
    if gradient.ndim <= 2:
        return gradient
    return on_cpu_or_elsewhere(lambda gradient: barrier(gradient)[0], lambda gradient: gradient, gradient)


def over_blocks(f: Callable, axis: int, operands: PyTree) -> PyTree:
    """f(operands), one block at a time. Under `vmap` f would see one example alone, and never a block."""

    @custom_vmap
    def of_all(operands: PyTree) -> PyTree:
        return _over_blocks(f, axis, operands)

    @of_all.def_vmap
    def _(size: int, mapped: list, operands: PyTree) -> tuple[PyTree, PyTree]:
        rank = max(jax.tree.leaves(jax.tree.map(lambda a, is_mapped: a.ndim - is_mapped, operands, *mapped)))
        out = over_blocks(f, axis, jax.tree.map(partial(_with_batch_axis, rank), operands, *mapped))
        return out, jax.tree.map(lambda _: True, out)

    return of_all(operands)


def _with_batch_axis(rank: int, a: Array, is_mapped: bool) -> Array:
    """With the mapped axis, or one of size 1, in front; a scalar that is the same for all stays one."""
    if not is_mapped:
        return a[None] if a.ndim else a
    return a.reshape(len(a), *[1] * rank) if a.ndim == 1 else a


def _over_blocks(f: Callable, axis: int, operands: PyTree) -> PyTree:
    (operands,) = barrier(operands)  # of what makes them nothing is made again in a block, or rounded otherwise
    shape: Any = jnp.broadcast_shapes(*(a.shape for a in jax.tree.leaves(operands)))
    block = block_shape(shape, axis)
    places = [a for a, (size, whole) in enumerate(zip(block, shape, strict=True)) if size != whole]
    counts = [-(-shape[a] // block[a]) for a in places]

    def of_block(firsts: Sequence[Array | int], operands: PyTree) -> PyTree:
        for a, first in zip(places, firsts, strict=True):
            operands = jax.tree.map(partial(_cut, a, first, block[a], len(shape)), operands)
        numbers = [1 if a == len(shape) + axis else size for a, size in enumerate(block)]
        return jax.tree.map(lambda number: jnp.broadcast_to(number, numbers), f(operands))

    if not places:
        return of_block((), operands)
    shapes = jax.eval_shape(of_block, [0] * len(places), operands)
    numbers = [1 if a == len(shape) + axis else size for a, size in enumerate(shape)]
    empty = jax.tree.map(lambda kind: vary(jnp.zeros(numbers, kind.dtype), varying(operands)), shapes)

    def body(index: Array, out: PyTree) -> PyTree:
        steps = [index // math.prod(counts[i + 1 :]) % blocks for i, blocks in enumerate(counts)]
        firsts = [jnp.minimum(i * block[a], shape[a] - block[a]) for i, a in zip(steps, places, strict=True)]
        at = [firsts[places.index(a)] if a in places else 0 for a in range(len(shape))]
        return jax.tree.map(lambda o, part: lax.dynamic_update_slice(o, part, at), out, of_block(firsts, operands))

    return lax.fori_loop(0, math.prod(counts), body, empty)


def _cut(a: int, first: Array | int, size: int, rank: int, array: Array) -> Array:
    if array.ndim < rank or array.shape[a] == 1:
        return array
    return lax.dynamic_slice_in_dim(array, first, size, a)


def block_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """All classes of as many tokens as `BLOCK` holds, in parts of an axis that are as equal as may be; of all tokens
    where sizes are symbols, or the compiler chooses how they lie over devices: it would gather them."""
    if not all(isinstance(n, int) for n in shape) or laid_out_by_compiler():
        return shape
    block = [1] * len(shape)
    block[axis] = shape[axis]
    for a in reversed(range(len(shape))):
        if a == len(shape) + axis:
            continue
        most = max(1, BLOCK // max(1, math.prod(block)))
        block[a] = -(-shape[a] // -(-shape[a] // most)) if shape[a] else 0
        if block[a] != shape[a]:
            break
    return tuple(block)
