"""The sums of a token where each is a pass of its own: XLA on the CPU. May be deleted, with the line that names it.

The same sums as those of `_fold`, one row reduction each: XLA for the CPU runs a reduction with a body of its own one
number at a time (34x slower). Each pass reads the logits as they came and makes z - m again, of z as it is `rounded`.
Even so nothing here asks whether it is 0: a compiler may round what makes the logits otherwise in one pass than in
another. Derivatives are of the sums as `_waist` writes them, but for that of `rest_of_top` at a temperature.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, beyond_exp, rounded, row_shift, scaled, shifted
from softmax_jax._barrier import apart
from softmax_jax._dtypes import upcast
from softmax_jax._indexing import if_here, pick, pick_logit
from softmax_jax._labels import Dense, Labels, Placed, of_existing
from softmax_jax._masses import target_of, uniform
from softmax_jax._passes_cpu import as_operands, over_classes, sum_over_classes
from softmax_jax._sharding import Names, count, offset, pmax, pmin, psum, vary, varying
from softmax_jax._sums import Asked, ClassSums, Top, once_traced


@once_traced
def class_sums(
    logits: Array,
    labels: Labels,
    class_weights: Array | None,
    adjustment: Adjustment,
    unused: Array | None,
    axis: int,
    asked: Asked,
    class_axes: Names,
) -> tuple[ClassSums, Array]:
    """(the sums of every token, its pivot)."""
    size, pivot = logits.shape[axis], labels.pivot
    (m,) = apart(row_shift(adjust(logits, adjustment), axis, class_axes))
    pivot = top_class(logits, m, adjustment, axis, class_axes) if pivot is None else pivot
    here = pivot - offset(size, class_axes)
    own = if_here(lambda ids: rounded(pick_logit(logits, ids, adjustment, axis), m) - m, here, size)
    operands = class_weights, adjustment, m, here
    if isinstance(labels, Dense):
        of_labels = dense_sums(logits, labels.values, *operands, axis)
    else:
        of_labels = labels.masses(logits, *operands, unused, axis, class_axes)
    rest = sum_of_others(logits, m, here, adjustment, axis)
    prior = _prior(logits, class_weights, m, adjustment, axis) if asked.prior else None
    moment = moment_of_others(logits, m, here, adjustment, axis) if asked.moment else None
    (own,) = apart(of_existing(own, pivot, unused, count(size, class_axes)))
    sums = ClassSums(m, *psum((rest, own, *of_labels, prior, moment), class_axes))
    if isinstance(labels, Placed):
        above, ties = _place_of(logits, labels.ids, labels.z, adjustment, axis, class_axes)
        sums = sums._replace(above=above, ties=ties, first=_first_of_largest(logits, adjustment, axis, class_axes))
    return sums, pivot


@once_traced
def top_sums(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Top:
    (m,) = apart(row_shift(adjust(logits, adjustment), axis, class_axes))
    top = top_class(logits, m, adjustment, axis, class_axes)
    return Top(m, top, rest_of_top(logits, adjustment, None, m, top, axis, class_axes))


def rest_of_top(logits, adjustment, scale, m, top, axis, class_axes) -> Array:
    here, scale = top - offset(logits.shape[axis], class_axes), vary(scale, varying(logits))
    return psum(sum_of_others(logits, m, here, adjustment, axis, scale), class_axes)


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


def times(factor: Array, z: Array) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf: z is bounded from below, by 0 where the factor is 0 and by
    -inf where it is a normal number. (By two factors with a minimum in between, which no compiler makes one.)"""
    highest = float(jnp.finfo(z.dtype).max)
    return factor * jnp.maximum(z, -highest * jnp.minimum(jnp.abs(factor) * highest, highest))


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


def _prior(logits, class_weights, m, adjustment, axis):
    def of_logits(arrays, m, _, axis):
        logits, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return z if class_weights is None and where is None else times(uniform(class_weights, where, z), z)

    # Without a pivot, and so not behind the same fence as the sum of the others, with which it would share z.
    return sum_over_classes(of_logits, (logits, class_weights, adjustment.where), m, jnp.zeros_like(m, jnp.int32), axis)


def dense_sums(logits, labels, class_weights, adjustment, m, pivot, axis):
    """(own_mass, rest_mass, label_sum). A factor that is 0 at the pivot leaves it out: 1 elsewhere in the one sum, a
    half in the other, since the two would share the same constant (see `alone`)."""

    def others(arrays, m, pivot, axis):
        labels, class_weights, where = arrays
        t = target_of(labels, class_weights, where, m.dtype)
        return t * jnp.minimum(distance(pivot, t, axis), 1)

    def of_logits(arrays, m, pivot, axis):
        logits, labels, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return times(target_of(labels, class_weights, where, m.dtype), z * jnp.minimum(distance(pivot, z, axis), 0.5))

    arrays = labels, class_weights, adjustment.where
    rest_mass = sum_over_classes(others, arrays, m, pivot, axis)
    label_sum = 2 * sum_over_classes(of_logits, (logits, *arrays), m, pivot, axis)
    return mass_at(pivot, *arrays, axis, m.dtype), rest_mass, label_sum


def mass_at(pivot, labels, class_weights, where, axis, dtype):
    """t_pivot, 0 where the pivot is none of the classes here."""

    def read(ids):
        there = lambda a: None if a is None else pick(a, ids, axis)  # noqa: E731
        return target_of(pick(labels, ids, axis), there(class_weights), there(where), dtype)

    return if_here(read, pivot, labels.shape[axis])


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


def _first_of_largest(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Array:
    """The first of all classes whose z is the largest, as a number; any, where a z is NaN."""
    z = upcast(adjust(*lax.stop_gradient((logits, adjustment))))
    here, largest = jnp.argmax(z, axis) + offset(z.shape[axis], class_axes), jnp.max(z, axis)
    here = here.astype(z.dtype)
    beyond = jnp.asarray(count(z.shape[axis], class_axes), z.dtype)
    return pmin(jnp.where(largest == pmax(largest, class_axes), here, beyond), class_axes) if class_axes else here


def _place_of(
    logits: Array, labels: Array, own: Array, adjustment: Adjustment, axis: int, class_axes: Names
) -> tuple[Array, Array]:
    """(how many z are larger than the label's, how many before it are equal): a difference times a large
    number, at most 1, is whether there is one. (The numbers are operands, and -own one, for the sake of `alone`.)"""
    logits, own, adjustment = lax.stop_gradient((logits, own, adjustment))
    here = labels - offset(logits.shape[axis], class_axes)
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
