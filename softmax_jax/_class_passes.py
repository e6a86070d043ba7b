"""What a token's sums are made of, by one pass over the classes at a time.

Each pass reads the logits as they came and makes z - m again, of z as it is `rounded`. Even so nothing here or above
asks whether it is 0: a compiler may round what makes the logits otherwise in one pass than in another.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, shifted
from softmax_jax._dtypes import upcast
from softmax_jax._passes import as_operands, over_classes, sum_over_classes
from softmax_jax._sharding import Names, count, offset, pmax, pmin, psum

# Between the logits and their sum stands floating-point arithmetic alone: at an integer, a comparison or a select
# within a row sum, XLA on the CPU writes the whole array out (3-6x slower).


def distance(pivot: Array, like: Array, axis: int) -> Array:
    """|v - pivot|: 0 at each token's pivot class and at least 1 elsewhere, in the shape and dtype of `like`."""
    return jnp.abs(until(pivot, like, axis))


def until(pivot: Array, like: Array, axis: int) -> Array:
    """pivot - v: how far each class stands before its token's pivot."""
    return _until(pivot, like, axis, like.shape[axis]).astype(like.dtype)


def _until(pivot: Array, like: Array, axis: int, largest: int) -> Array:
    """pivot - v, in the dtype of `like` where integers up to `largest` are exact: up to 2**24 in float32."""
    exact = isinstance(largest, int) and largest <= 2**24
    ids = lax.broadcasted_iota(like.dtype if exact else jnp.int32, like.shape, axis)
    return jnp.expand_dims(pivot, axis).astype(ids.dtype) - ids


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


@jax.custom_jvp
def scaled(z: Array, scale: Array | None) -> Array:
    """scale · z of a scale > 0. Its own gradient is 0 where z is infinite, or stands for that."""
    return z if scale is None else scale * z


@scaled.defjvp
def _scaled_jvp(primals, tangents):
    (z, scale), (dz, dscale) = primals, tangents
    if scale is None:
        return z, dz
    finite_z = jnp.where(jnp.abs(z) < float(jnp.finfo(z.dtype).max) / 8, z, 0)
    return scaled(z, scale), scale * dz + dscale * finite_z


def sum_of_others(
    logits: Array, m: Array, pivot: Array, adjustment: Adjustment, axis: int, scale: Array | None = None
) -> Array:
    """Σ_{v≠pivot} exp(scale · (z_v - m)). (By a factor that is 0 at the pivot and 1 elsewhere: a NaN comes through,
    which XLA's maximum and minimum of a row on the CPU drop.)"""

    def others(arrays, m, pivot, axis):
        *arrays, scale, (one,) = arrays
        e = jnp.exp(scaled(z_of(arrays, adjustment, m, axis), scale))
        return e * jnp.minimum(distance(pivot, e, axis), one)

    arrays = logits, adjustment.where, scale, as_operands(m.dtype, (1,))
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

    In steps of `half`, between half a rounding of m and a whole one, the maximum stands 8 above `low`, each smaller
    number lower than it, and what is not near the maximum below 0.
    """
    logits, m, adjustment = lax.stop_gradient((logits, m, adjustment))
    info = jnp.finfo(m.dtype)
    half = jnp.maximum(jnp.abs(m), 1e-20) * (float(info.eps) / 2)
    low = jnp.maximum(m - 8 * half, float(info.min))
    size, classes = logits.shape[axis], count(logits.shape[axis], class_axes)

    def ranks(arrays, rows, first, axis):
        (*arrays, (away, scale)), (low, per_half) = arrays, rows
        steps = z_of(arrays, adjustment, low, axis) * jnp.expand_dims(per_half, axis)
        level = jnp.maximum(jnp.round(steps), away)
        before = _until(first, level, axis, largest=11 * size)
        return level.astype(before.dtype) * scale.astype(before.dtype) - before

    arrays, rows = (logits, adjustment.where, as_operands(m.dtype, (-1, size))), (low, 1 / half)
    rank = over_classes(jnp.maximum, ranks, arrays, rows, jnp.zeros_like(m, jnp.int32), axis)
    level, top = jnp.divmod(jnp.where(rank >= 0, rank, -1).astype(jnp.int32), size)  # of NaN too
    rank = pmax(level * classes + top + offset(size, class_axes), class_axes)
    return jnp.where(rank >= 0, rank % classes, classes)


def first_of_largest(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Array:
    """The first of all classes whose z is the largest, as a number; any, where a z is NaN."""
    z = upcast(adjust(*lax.stop_gradient((logits, adjustment))))
    here, largest = jnp.argmax(z, axis) + offset(z.shape[axis], class_axes), jnp.max(z, axis)
    here = here.astype(z.dtype)
    beyond = jnp.asarray(count(z.shape[axis], class_axes), z.dtype)
    return pmin(jnp.where(largest == pmax(largest, class_axes), here, beyond), class_axes) if class_axes else here


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


def place_of(logits: Array, labels: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> tuple[Array, Array]:
    """(how many z are larger than the label's, how many before it are equal): a difference times a large
    number, at most 1, is whether there is one. (The numbers are operands, and -own one, for the sake of `alone`.)"""
    logits, adjustment = lax.stop_gradient((logits, adjustment))
    here = labels - offset(logits.shape[axis], class_axes)
    own = pick_of_all(logits, labels, adjustment, axis, class_axes)
    own = jnp.maximum(own, jnp.finfo(own.dtype).min)  # -inf - -inf is NaN

    def larger(arrays, own, here, axis):
        logits, where, (zero, one, huge) = arrays
        gap = z_of((logits, where), adjustment, own, axis)
        return jnp.minimum(jnp.minimum(jnp.maximum(gap, zero) * huge, one), distance(here, gap, axis))

    def equal_and_before(arrays, minus_own, here, axis):
        logits, where, (zero, one, huge) = arrays
        gap = z_of((logits, where), adjustment, -minus_own, axis)
        return jnp.clip(until(here, gap, axis), zero, one) * (one - jnp.minimum(jnp.abs(gap) * huge, one))

    arrays = logits, adjustment.where, as_operands(own.dtype, (0, 1, float(jnp.finfo(own.dtype).max) / 4))
    rank = psum(sum_over_classes(larger, arrays, own, here, axis), class_axes)
    ties = psum(sum_over_classes(equal_and_before, arrays, -own, here, axis), class_axes)
    return rank, ties
