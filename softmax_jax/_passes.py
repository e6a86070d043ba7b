"""One pass over the classes at a time: what a token's sums are made of.

Each pass reads the logits as they came and makes z - m again. That is the same number only up to rounding: where the
logits are a product made in the same program, a compiler may take a · b - m in one step, and z - m at the maximum is
then not 0. So nothing here or above asks whether it is.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from softmax_jax._adjustment import Adjustment, adjust, shifted
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, count, offset, pmax, psum

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

FEW, MANY = 16, 1024
"""Rows of so few classes, if there are so many of them, are taken class by class: a vector of tokens at a time, in one
loop over the tokens. A row sum takes 2-5 ns for each of ten classes, this 0.5 (262144 x 10, 0.12)."""


@cache
def _blocks(classes: int) -> int:
    """The fewest equal blocks; 1 where the number of classes has no such divisor."""
    sizes = range(BLOCK, BLOCK // 32 - 1, -1) if classes > BLOCK else ()
    return next((classes // size for size in sizes if classes % size == 0), 1)


def over_classes(combine: jnp.ufunc, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> PyTree:
    """f, an array or a pair of arrays, reduced over the classes by `combine`: [*batch]. A pass of its own.

    f(arrays, m, pivot, axis) gets the `arrays`, which have the classes (or 1) on `axis`, one block of classes at a
    time: as [.., blocks, classes, ..], or one class alone. m and pivot, the numbers of a token, are broadcastable to
    what is left without `axis`, the pivot counted from the block's first class; the classes are on the new axis.
    """
    classes = max(array.shape[axis] for array in jax.tree.leaves(arrays))
    if classes <= FEW and m.size >= MANY:
        return alone(partial(_class_by_class, combine, f, axis=axis), arrays, m, pivot)
    blocks = _blocks(classes)
    if blocks == 1:
        return _alone(combine, f, arrays, m, pivot, axis)
    # The blocks are made before the fence: behind it, XLA on the CPU turns 16-bit logits into float32 first, and the
    # pass takes 4x as long (1024 x 128256 bfloat16, 0.12).
    arrays = jax.tree.map(partial(_in_blocks, blocks, classes, axis), arrays)
    pivot = jnp.expand_dims(pivot, axis) - _first_of_blocks(blocks, classes // blocks, m, axis)
    of_blocks = _alone(combine, f, arrays, jnp.expand_dims(m, axis), pivot, axis + 1)
    return jax.tree.map(lambda a: combine.reduce(a, axis=axis), of_blocks)


def sum_over_classes(f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> PyTree:
    """Σ_v f, by `over_classes`."""
    return over_classes(jnp.add, f, arrays, m, pivot, axis)


def _class_by_class(combine: jnp.ufunc, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> PyTree:
    classes = max(array.shape[axis] for array in jax.tree.leaves(arrays))

    def of_class(v):
        one = lambda a: a if a.shape[axis] < classes else lax.slice_in_dim(a, v, v + 1, axis=axis)  # noqa: E731
        return f(jax.tree.map(one, arrays), m, pivot - v, axis)

    of_all = reduce(partial(jax.tree.map, combine), map(of_class, range(classes)))
    return jax.tree.map(lambda a: jnp.squeeze(a, axis), of_all)


def _in_blocks(blocks: int, classes: int, axis: int, array: Array) -> Array:
    sizes = (blocks, classes // blocks) if array.shape[axis] == classes else (1, 1)
    return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])


def _first_of_blocks(blocks: int, size: int, like: Array, axis: int) -> Array:
    """The first class of each block, on an axis more than `like` has."""
    shape = [blocks if a == axis else 1 for a in range(like.ndim + 1)]
    return lax.broadcasted_iota(jnp.int32, shape, axis) * size


def _alone(combine: jnp.ufunc, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> PyTree:
    """f reduced over `axis`, by `alone`. Of a pair XLA on the CPU shares what both are made of, if they end in one
    array of two."""
    unfenced = arrays

    def reduced(arrays, m, pivot):
        # Where the compiler makes a mask as large as the logits, one serves all passes: not fenced, and of one shape.
        arrays = jax.tree.map(lambda a, fenced: a if a.dtype == bool else fenced, unfenced, arrays)
        sums = jax.tree.map(lambda term: combine.reduce(term, axis=axis, keepdims=True), f(arrays, m, pivot, axis))
        if not isinstance(sums, tuple):
            return sums
        first = jnp.array([jnp.inf, -jnp.inf], m.dtype).reshape([2 if a == axis else 1 for a in range(m.ndim + 1)])
        return jnp.maximum(jnp.minimum(sums[0], first), jnp.minimum(sums[1], -first))

    result = alone(reduced, arrays, m, pivot)
    sums = tuple(lax.index_in_dim(result, at, axis, keepdims=False) for at in range(result.shape[axis]))
    return sums if len(sums) > 1 else sums[0]


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
    return _until(pivot, like, axis).astype(like.dtype)


def _until(pivot: Array, like: Array, axis: int, levels: int = 1) -> Array:
    """pivot - v, in the dtype of `like` where `levels` times as many integers are exact: up to 2**24 in float32."""
    exact = levels * like.shape[axis] <= 2**24
    ids = lax.broadcasted_iota(like.dtype if exact else jnp.int32, like.shape, axis)
    return jnp.expand_dims(pivot, axis).astype(ids.dtype) - ids


def times(factor: Array, z: Array, highest: ArrayLike | None = None, lowest: ArrayLike | None = None) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf: z is bounded from below, by 0 where the factor is 0 and by
    -inf where it is a normal number. (By two factors with a minimum in between, which no compiler makes one.)

    `highest` and `lowest` are the largest number of z's dtype and minus that, where they are operands of a pass.
    """
    number = float(jnp.finfo(z.dtype).max)
    return _times(factor, z, number if highest is None else highest, -number if lowest is None else lowest)


@jax.custom_jvp
def _times(factor, z, highest, lowest):
    return factor * jnp.maximum(z, lowest * jnp.minimum(jnp.abs(factor) * highest, highest))


@_times.defjvp
def _times_jvp(primals, tangents):
    (factor, z, highest, lowest), (dfactor, dz, *_) = primals, tangents
    return _times(factor, z, highest, lowest), dfactor * finite(z, factor == 0) + factor * dz


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
    """The last of all classes whose z is the maximum; where rounding (above) leaves none, one within a few roundings
    of it. The number of classes for a row that has neither: it is NaN or all -inf.

    In steps of `half`, between half a rounding of m and a whole one, the maximum stands 8 above `low`, every smaller
    number at most 7, and what is not near the maximum below 0.
    """
    info = jnp.finfo(m.dtype)
    half = jnp.maximum(jnp.abs(m), 1e-20) * (float(info.eps) / 2)
    low = jnp.maximum(m - 8 * half, float(info.min))
    size, classes = logits.shape[axis], count(logits.shape[axis], class_axes)

    def ranks(arrays, low, first, axis):
        *arrays, (away, per_half, scale) = arrays
        level = jnp.maximum(jnp.round(z_of(arrays, adjustment, low, axis) * per_half), away)
        before = _until(first, level, axis, levels=10)
        return level.astype(before.dtype) * scale.astype(before.dtype) - before

    numbers = *as_operands(logits, m.dtype, -1), jnp.expand_dims(1 / half, axis), *as_operands(logits, m.dtype, size)
    arrays = logits, adjustment.where, numbers
    rank = over_classes(jnp.maximum, ranks, arrays, low, jnp.zeros_like(m, jnp.int32), axis)
    level, top = jnp.divmod(jnp.where(rank >= 0, rank, -1).astype(jnp.int32), size)  # of NaN too
    rank = pmax(level * classes + top + offset(size, class_axes), class_axes)
    return jnp.where(rank >= 0, rank % classes, classes)


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
