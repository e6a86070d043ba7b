"""One pass over the classes at a time: what a token's sums are made of.

Each pass reads the logits as they came and makes z - m again. That is the same number only up to rounding: where the
logits are a product made in the same program, a compiler may take a · b - m in one step, and z - m at the maximum is
then not 0. So nothing here or above asks whether it is.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, shifted
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, count, offset, pmin, psum

PyTree = Any


def apart(*arrays: PyTree) -> tuple:
    """The same arrays, fenced off from what made them.

    XLA on the CPU would otherwise share one float32 copy of 16-bit logits between the maximum, the sum and the
    gradient: 2x the logits' bytes; without it the gradient is 1.5x faster.
    """
    return lax.optimization_barrier(arrays)


def alone(f: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """f(*operands), fenced off from what made them and from what is made of it: for a pass over the classes.

    XLA on the CPU fuses a row sum with the arithmetic that feeds it alone. What feeds two of them, be it a constant, it
    writes out at the size of the logits (0.12: two sums of 4096 x 8192 took 170 ms together and 15 ms each by itself).
    Fences around the same operands are one fence, and equal constants one array: passes differ in both. It also
    fuses a row sum with the mean over rows that follows (4096 x 32000: 970 ms instead of 90 ms).
    """
    return lax.optimization_barrier(f(*lax.optimization_barrier(operands)))


BLOCK = 2**15
"""Classes in a pass at a time, at most: with 1024 x 128256 XLA on the CPU is 4x slower, once a row's intermediate
results leave the cache (0.12)."""


@cache
def _blocks(classes: int) -> int:
    """The fewest equal blocks; 1 where the number of classes has no such divisor."""
    sizes = range(BLOCK, BLOCK // 32 - 1, -1) if classes > BLOCK else ()
    return next((classes // size for size in sizes if classes % size == 0), 1)


def in_blocks(reduce: Callable, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> Array:
    """f reduced over the classes of each block: [*batch] with the blocks on `axis`. A pass of its own.

    f(arrays, m, pivot, axis) gets the `arrays`, which have the classes (or 1) on `axis`, as [.., blocks, classes, ..],
    the numbers of a token, m and pivot, broadcastable to [.., blocks, ..] with the pivot counted from each block's
    first class, and the new axis of the classes.
    """
    classes = max(array.shape[axis] for array in jax.tree.leaves(arrays))
    blocks = _blocks(classes)

    def split(array):
        sizes = (blocks, classes // blocks) if array.shape[axis] == classes else (1, 1)
        return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])

    unfenced = arrays

    def of_fenced(arrays, m, pivot):
        # Where the compiler makes a mask as large as the logits, one serves all passes: not fenced, and of one shape.
        arrays = jax.tree.map(lambda a, fenced: a if a.dtype == bool else fenced, unfenced, arrays)
        if blocks == 1:
            return jnp.expand_dims(reduce(f(arrays, m, pivot, axis), axis), axis)
        first = first_of_blocks(classes, blocks, m, axis)
        operands = jax.tree.map(split, arrays), jnp.expand_dims(m, axis), jnp.expand_dims(pivot, axis) - first
        return reduce(f(*operands, axis + 1), axis + 1)

    return alone(of_fenced, arrays, m, pivot)


def first_of_blocks(classes: int, blocks: int, like: Array, axis: int) -> Array:
    """The first class of each block, on an axis more than `like` has."""
    shape = [blocks if a == axis else 1 for a in range(like.ndim + 1)]
    return lax.broadcasted_iota(jnp.int32, shape, axis) * (classes // blocks)


def sum_over_classes(f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> Array:
    """Σ_v f, by `in_blocks`."""
    return jnp.sum(in_blocks(jnp.sum, f, arrays, m, pivot, axis), axis)


def as_operands(like: Array, dtype: Any, *numbers: float | int) -> tuple[Array, ...]:
    """Numbers for one pass by itself, of the rank of `like`: as constants, XLA on the CPU would share them between the
    passes of two losses in one program, and write each out at the size of the logits."""
    return tuple(jnp.full((1,) * like.ndim, number, dtype) for number in numbers)


# Between the logits and their sum stands floating-point arithmetic alone: at an integer, a comparison or a select
# within a row sum, XLA on the CPU writes the whole array out (3-6x slower).


def distance(pivot: Array, like: Array, axis: int) -> Array:
    """|v - pivot|: 0 at each token's pivot class and at least 1 elsewhere, in the shape and dtype of `like`."""
    return jnp.abs(until(pivot, like, axis))


def until(pivot: Array, like: Array, axis: int) -> Array:
    """pivot - v: how far each class stands before its token's pivot."""
    ids = _ids(like, axis)
    return (jnp.expand_dims(pivot, axis).astype(ids.dtype) - ids).astype(like.dtype)


def _ids(z: Array, axis: int, ranks: int = 1) -> Array:
    """The class of every entry, in z's dtype where `ranks` times as many are exact: up to 2**24 in float32."""
    exact = ranks * z.shape[axis] <= 2**24
    return lax.broadcasted_iota(z.dtype if exact else jnp.int32, z.shape, axis)


@jax.custom_jvp
def times(factor: Array, z: Array) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf: z is bounded from below, by 0 where the factor is 0 and by
    -inf where it is a normal number. (By two factors with a minimum in between, which no compiler makes one.)"""
    highest = float(jnp.finfo(z.dtype).max)
    return factor * jnp.maximum(z, -highest * jnp.minimum(jnp.abs(factor) * highest, highest))


@times.defjvp
def _times_jvp(primals, tangents):
    (factor, z), (dfactor, dz) = primals, tangents
    return times(factor, z), dfactor * finite(z, factor == 0) + factor * dz


def finite(z: Array, unused: Array) -> Array:
    """z, but 0 where it is infinite and `unused`."""
    return jnp.where(jnp.isinf(z) & unused, 0, z)


def sum_of_others(logits: Array, m: Array, pivot: Array, adjustment: Adjustment, axis: int) -> Array:
    """Σ_{v≠pivot} exp(z_v - m). A term is at most 1, up to rounding; its bound is 0 at the pivot, else at least 4."""

    def others(arrays, m, pivot, axis):
        *arrays, (four,) = arrays
        e = jnp.exp(z_of(arrays, adjustment, m, axis))
        return jnp.minimum(e, four * distance(pivot, e, axis))

    arrays = logits, adjustment.where, as_operands(logits, m.dtype, 4)
    return sum_over_classes(others, arrays, m, pivot, axis)


def moment_of_others(logits: Array, m: Array, pivot: Array, adjustment: Adjustment, axis: int) -> Array:
    """Σ_{v≠pivot} exp(z_v - m) (m - z_v), 0 where z_v = -inf. (With -m and 2 for the sake of `alone`.)"""

    def others(arrays, minus_m, pivot, axis):
        z = z_of(arrays, adjustment, -minus_m, axis)
        return jnp.minimum(jnp.exp(z), 2 * distance(pivot, z, axis)) * beyond_exp(z)

    return -sum_over_classes(others, (logits, adjustment.where), -m, pivot, axis)


def beyond_exp(z: Array) -> Array:
    """z, bounded where its exponential is 0."""
    return jnp.maximum(z, -1e4)


def z_of(arrays: Sequence[Any], adjustment: Adjustment, m: Array, axis: int) -> Array:
    """z - m of the logits and the `where` that a pass is given."""
    logits, where = arrays
    return shifted(logits, adjustment._replace(where=where), m, axis)


def top_class(logits: Array, m: Array, adjustment: Adjustment, axis: int, class_axes: Names = ()) -> Array:
    """The first of all classes whose z is the maximum; where rounding (above) leaves none, the first within a few
    roundings of it. The number of classes for a row that has neither: it is NaN or all -inf."""
    size, classes = logits.shape[axis], count(logits.shape[axis], class_axes)
    few = 4 * float(jnp.finfo(m.dtype).eps)
    roundings = jnp.expand_dims(few * jnp.maximum(jnp.abs(m), 1), axis)

    def ranks(arrays, m, _, axis):
        """v for a maximum, v + width for what is near one, v + 2 width for the rest."""
        *arrays, roundings, (few, zero, huge, width) = arrays
        gap = -z_of(arrays, adjustment, m, axis)
        ids = _ids(gap, axis, ranks=3)
        beyond = lambda margin: jnp.minimum(jnp.maximum(gap - margin, zero) * huge, width)  # 0 or width  # noqa: E731
        return ids + (beyond(few) + beyond(roundings)).astype(ids.dtype)

    blocks = _blocks(size)
    width = size // blocks
    arrays = logits, adjustment.where, roundings, as_operands(logits, m.dtype, few, 0, 1e38, width)
    first = in_blocks(jnp.min, ranks, arrays, m, jnp.zeros_like(m, jnp.int32), axis)
    rank, first = jnp.divmod(jnp.where(first < 2 * width, first, 2 * width).astype(jnp.int32), width)  # of NaN too
    first = first + first_of_blocks(size, blocks, m, axis) + offset(size, class_axes)
    first = pmin(jnp.min(rank * classes + first, axis), class_axes)
    return jnp.where(first < 2 * classes, first % classes, classes)


def is_at(pivot: Array, like: Array, axis: int) -> Array:
    """Whether an entry is at its token's pivot class, in the shape of `like`."""
    return lax.broadcasted_iota(jnp.int32, like.shape, axis) == jnp.expand_dims(pivot, axis)


def at_ids(array: Array, ids: Array, axis: int) -> Array:
    """The entries at several classes of each token: `ids`, from 0, has them on `axis`. Beyond the last class stands
    that one's, so an array of size 1 there is the same for all classes; in any other axis it may have size 1."""
    return jnp.take_along_axis(array, jnp.minimum(ids, array.shape[axis] - 1), axis, mode="promise_in_bounds")


def with_at_ids(array: Array, ids: Array, values: Array, axis: int) -> Array:
    """`array` with `values` at the ids, each id once a token; those out of range are left out."""
    others = tuple(a for a in range(array.ndim) if a != axis)
    where = lax.ScatterDimensionNumbers(
        update_window_dims=(),
        inserted_window_dims=(axis,),
        scatter_dims_to_operand_dims=(axis,),
        operand_batching_dims=others,
        scatter_indices_batching_dims=others,
    )
    return lax.scatter(array, ids[..., None], values, where, mode=lax.GatherScatterMode.FILL_OR_DROP)


def pick(array: Array, ids: Array, axis: int) -> Array:
    """Each token's entry at class `ids`."""
    return jnp.squeeze(at_ids(array, jnp.expand_dims(ids, axis), axis), axis)


def pick_logit(logits: Array, ids: Array, adjustment: Adjustment, axis: int) -> Array:
    """Each token's z at class `ids`: the logit is read raw and adjusted by itself."""
    where = None if adjustment.where is None else pick(adjustment.where, ids, axis)
    return upcast(adjust(pick(logits, ids, axis), adjustment._replace(where=where)))


def pick_of_all(logits: Array, ids: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Array:
    """`pick_logit` at ids of all devices' classes; 0 for what is none of them."""
    here = ids - offset(logits.shape[axis], class_axes)
    in_range = jnp.clip(here, 0, logits.shape[axis] - 1)
    return psum(jnp.where(in_range == here, pick_logit(logits, in_range, adjustment, axis), 0), class_axes)


def classes_last(x: Array, axes: tuple[int, ...]) -> Array:
    """Several class axes as one, the last, flat in the order given (a copy, unless they are the last already)."""
    if len(axes) == 1:
        return x
    batch = tuple(a for a in range(x.ndim) if a not in axes)
    flat = math.prod(x.shape[a] for a in axes)
    return x.transpose(batch + axes).reshape(*(x.shape[a] for a in batch), flat)


def from_classes_last(y: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """The same several axes again."""
    there = tuple(a for a in range(len(shape)) if a not in axes) + axes
    return y.reshape([shape[a] for a in there]).transpose([there.index(a) for a in range(len(shape))])
