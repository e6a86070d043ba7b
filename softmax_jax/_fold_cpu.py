"""The sums of a token where each is a pass of its own: XLA on the CPU. May be deleted, with the line that names it.

The same sums as those of `_fold`, one row reduction each: XLA for the CPU runs a reduction with a body of its own one
number at a time (34x slower). Each pass reads the logits as they came and makes z - m again, of z as it is `rounded`.
Even so nothing here asks whether it is 0: a compiler may round what makes the logits otherwise in one pass than in
another. Derivatives are of the sums as `_waist` writes them, but for that of `rest_of_top` at a temperature.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._adjustment import Adjustment, adjust, beyond_exp, rounded, row_shift, scaled, shifted, z_at
from softmax_jax._barrier import apart
from softmax_jax._classes import Classes
from softmax_jax._dtypes import upcast
from softmax_jax._labels import Dense, Masses, Placed, of_existing
from softmax_jax._masses import target_of, uniform
from softmax_jax._passes_cpu import as_operands, over_classes, sum_over_classes
from softmax_jax._sharding import pmax, pmin, psum, vary, varying
from softmax_jax._sums import Asked, ClassSums, Tokens, Top, once_traced


@once_traced
def class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    """(the sums of every token, its pivot)."""
    logits, labels, class_weights, adjustment, _ = tokens
    (m,) = apart(row_shift(adjust(logits, adjustment), classes.axis, classes.over))
    pivot = top_class(logits, m, adjustment, classes) if labels.pivot is None else labels.pivot
    here = pivot - classes.first(logits)
    own = classes.if_here(lambda ids: rounded(z_at(ids, logits, adjustment, classes), m) - m, here, logits)
    of_labels = dense_sums if isinstance(labels, Dense) else labels.masses
    of_labels = of_labels(tokens, m, here, classes)
    rest = sum_of_others(logits, m, here, adjustment, classes.axis)
    prior = _prior(logits, class_weights, m, adjustment, classes.axis) if asked.prior else None
    moment = moment_of_others(logits, m, here, adjustment, classes.axis) if asked.moment else None
    (own,) = apart(of_existing(own, pivot, tokens, classes))
    sums = ClassSums(m, *psum((rest, own, *of_labels, prior, moment), classes.over))
    if isinstance(labels, Placed):
        above, ties = _place_of(logits, labels, adjustment, classes)
        sums = sums._replace(above=above, ties=ties, first=_first_of_largest(logits, adjustment, classes))
    return sums, pivot


@once_traced
def top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> Top:
    (m,) = apart(row_shift(adjust(logits, adjustment), classes.axis, classes.over))
    top = top_class(logits, m, adjustment, classes)
    return Top(m, top, rest_of_top(logits, adjustment, None, m, top, classes))


def rest_of_top(
    logits: Array, adjustment: Adjustment, scale: Array | None, m: Array, top: Array, classes: Classes
) -> Array:
    here, scale = top - classes.first(logits), vary(scale, varying(logits))
    return psum(sum_of_others(logits, m, here, adjustment, classes.axis, scale), classes.over)


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


def _prior(logits: Array, class_weights: Array | None, m: Array, adjustment: Adjustment, axis: int) -> Array:
    def of_logits(arrays, m, _, axis):
        logits, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return z if class_weights is None and where is None else times(uniform(class_weights, where, z), z)

    # Without a pivot, and so not behind the same fence as the sum of the others, with which it would share z.
    return sum_over_classes(of_logits, (logits, class_weights, adjustment.where), m, jnp.zeros_like(m, jnp.int32), axis)


def dense_sums(tokens: Tokens, m: Array, pivot: Array, classes: Classes) -> Masses:
    """(own_mass, rest_mass, label_sum). A factor that is 0 at the pivot leaves it out: 1 elsewhere in the one sum, a
    half in the other, since the two would share the same constant (see `alone`)."""
    logits, labels, class_weights, adjustment, _ = tokens

    def others(arrays, m, pivot, axis):
        probs, class_weights, where = arrays
        t = target_of(probs, class_weights, where, m.dtype)
        return t * jnp.minimum(distance(pivot, t, axis), 1)

    def of_logits(arrays, m, pivot, axis):
        logits, probs, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return times(target_of(probs, class_weights, where, m.dtype), z * jnp.minimum(distance(pivot, z, axis), 0.5))

    arrays = labels.values, class_weights, adjustment.where
    rest_mass = sum_over_classes(others, arrays, m, pivot, classes.axis)
    label_sum = 2 * sum_over_classes(of_logits, (logits, *arrays), m, pivot, classes.axis)
    return classes.if_here(partial(mass_at, arrays, classes, m.dtype), pivot, logits), rest_mass, label_sum


def mass_at(arrays: tuple[Array, Array | None, Array | None], classes: Classes, dtype: DTypeLike, ids: Array) -> Array:
    """t of each token's class, of (probabilities, class weights, `where`)."""
    probs, class_weights, where = jax.tree.map(partial(classes.pick, ids), arrays)
    return target_of(probs, class_weights, where, dtype)


def z_of(arrays: Sequence[Any], adjustment: Adjustment, m: Array, axis: int) -> Array:
    """z - m of the logits and the `where` that a pass is given."""
    logits, where = arrays
    return shifted(logits, adjustment._replace(where=where), m, axis)


def top_class(logits: Array, m: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """The last of all classes whose z is the maximum; where rounding (above) leaves none, one within a few roundings
    of it. The number of classes for a row that has neither: it is NaN or all -inf.

    In steps of `half`, between half a rounding of m and a whole one, the maximum stands 8 above `low`, each smaller
    number lower than it, and what is not near the maximum below 0.
    """
    logits, m, adjustment = lax.stop_gradient((logits, m, adjustment))
    info = jnp.finfo(m.dtype)
    half = jnp.maximum(jnp.abs(m), 1e-20) * (float(info.eps) / 2)
    low = jnp.maximum(m - 8 * half, float(info.min))
    size, of_all = logits.shape[classes.axis], classes.of_all(logits)

    def ranks(arrays, rows, first, axis):
        (*arrays, (away, scale)), (low, per_half) = arrays, rows
        steps = z_of(arrays, adjustment, low, axis) * jnp.expand_dims(per_half, axis)
        level = jnp.maximum(jnp.round(steps), away)
        before = _until(first, level, axis, largest=11 * size)
        return level.astype(before.dtype) * scale.astype(before.dtype) - before

    arrays, rows = (logits, adjustment.where, as_operands(m.dtype, (-1, size))), (low, 1 / half)
    rank = over_classes(jnp.maximum, ranks, arrays, rows, jnp.zeros_like(m, jnp.int32), classes.axis)
    level, top = jnp.divmod(jnp.where(rank >= 0, rank, -1).astype(jnp.int32), size)  # of NaN too
    rank = pmax(level * of_all + top + classes.first(logits), classes.over)
    return jnp.where(rank >= 0, rank % of_all, of_all)


def _first_of_largest(logits: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """The first of all classes whose z is the largest, as a number; any, where a z is NaN."""
    z = upcast(adjust(*lax.stop_gradient((logits, adjustment))))
    here, largest = jnp.argmax(z, classes.axis) + classes.first(z), jnp.max(z, classes.axis)
    here, beyond = here.astype(z.dtype), jnp.asarray(classes.of_all(z), z.dtype)
    return pmin(jnp.where(largest == pmax(largest, classes.over), here, beyond), classes.over) if classes.over else here


def _place_of(logits: Array, labels: Placed, adjustment: Adjustment, classes: Classes) -> tuple[Array, Array]:
    """(how many z are larger than the label's, how many before it are equal): a difference times a large
    number, at most 1, is whether there is one. (The numbers are operands, and -own one, for the sake of `alone`.)"""
    logits, own, adjustment = lax.stop_gradient((logits, labels.z, adjustment))
    here = labels.ids - classes.first(logits)
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
    rank = psum(sum_over_classes(larger, arrays, own, here, classes.axis), classes.over)
    ties = psum(sum_over_classes(equal_and_before, arrays, -own, here, classes.axis), classes.over)
    return rank, ties
