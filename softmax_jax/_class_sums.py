"""The waist: every loss here is a function of a few sums over the classes of one token.

Write z for a token's logits, y for its label, p = softmax(z), and m = max_v z_v, a constant. With

    rest = Σ_{v≠y} exp(z_v - m)        the label's own term left out
    own  = z_y - m                     ≤ 0
    t    = rest + exp(own)             = Σ_v exp(z_v - m), between 1 and the number of classes

the loss is nll = -log p_y = log t - own, and 1 - p_y = rest/t. Others keep log t and subtract: once p_y → 1 the
difference rounds to 0, and the gradient p_y - 1 with it. Here nothing cancels, because `rest` is kept by itself.

Dense labels are the same sums around another class. For any class a, with t_v the target of class v (class weight
included) and spread = log t = log_normalizer - m,

    Σ_v t_v (log_normalizer - z_v) = t_a · nll(rest_a, own_a)  +  Σ_{v≠a} t_v · spread  -  Σ_{v≠a} t_v (z_v - m)
                                   = own_mass · nll            +  rest_mass · spread    -  label_sum

With `a` the largest logit a one-hot target is as exact as the integer label: at `a` itself the gradient comes out as
rest_mass · p_a - own_mass · (1 - p_a), not as p_a - t_a. The class that is left out, y or a, is the `pivot`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._dtypes import upcast


class Adjustment(NamedTuple):
    """What is done to a logit before its softmax. None leaves a step out."""

    where: Array | None = None
    logit_scale: Array | None = None
    softcap: Array | None = None


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum."""

    shift: Array  # m, or 0 where m = -inf; a constant: no gradient flows through it
    rest: Array
    own: Array
    own_mass: Array | None = None  # t_pivot; None is 1
    rest_mass: Array | None = None  # Σ_{v≠pivot} t_v; None is 0, as are the two below
    label_sum: Array | None = None  # Σ_{v≠pivot} t_v (z_v - m)
    prior: Array | None = None  # Σ_v c_v (z_v - m), for label smoothing


def adjust(logits: Array, adjustment: Adjustment) -> Array:
    """z = softcap · tanh(logit_scale · logits / softcap), and -inf where `where` is False.

    In float32 where it computes anything, else as it came, so that the maximum of 16-bit logits is read as such.

    Infinities are judged on the raw logit, because logit_scale may be 0 or negative and tanh(inf) is 1: -inf stays
    a class of probability zero (or -softcap), +inf becomes NaN. The scale's own gradient there is 0, not 0 · inf.
    """
    where, scale, softcap = adjustment
    z = upcast(logits) if logits.dtype.itemsize == 1 else logits  # some 8-bit formats have no infinity
    if scale is not None or softcap is not None:
        raw, z = upcast(z), jnp.where(jnp.isinf(z), 0, upcast(z))
        z = z if scale is None else scale * z
        z = z if softcap is None else softcap * jnp.tanh(z / softcap)
        floor = raw if softcap is None else -softcap
        z = jnp.where(raw == -jnp.inf, floor, jnp.where(raw == jnp.inf, jnp.nan, z))
    return z if where is None else jnp.where(where, z, -jnp.inf)


def shifted(logits: Array, adjustment: Adjustment, shift: Array, axis: int | tuple[int, ...]) -> Array:
    """z - m in float32."""
    return upcast(adjust(logits, adjustment)) - jnp.expand_dims(shift, axis)


def apart(*arrays: Array) -> tuple[Array, ...]:
    """The same arrays, fenced off from what made them.

    XLA on the CPU would otherwise share one float32 copy of 16-bit logits between the maximum, the sum and the
    gradient (2x the logits' bytes; without it the gradient is 1.5x faster), and fuse a row sum with the mean over
    rows that follows it (0.12.0, 4096 x 32000: 970 ms instead of 90 ms).
    """
    return lax.optimization_barrier(arrays)


def row_shift(z: Array, axis: int | tuple[int, ...]) -> Array:
    """m = max_v z_v as a constant; 0 for a row whose every logit is -inf, since -inf - -inf is NaN."""
    largest = lax.stop_gradient(upcast(jnp.max(z, axis=axis, initial=-jnp.inf)))
    return jnp.where(largest == -jnp.inf, 0, largest)


def not_at(pivot: Array, z: Array, axis: int) -> Array:
    """0 at each token's pivot class and 1 elsewhere, in z's shape and dtype.

    A factor min(|v - pivot|, 1) stays inside XLA's row reduction on the CPU where a comparison would write the
    whole array out (3-6x slower). Class ids are exact in float32 up to 2**24.
    """
    if z.shape[axis] > 2**24:
        return (lax.broadcasted_iota(jnp.int32, z.shape, axis) != jnp.expand_dims(pivot, axis)).astype(z.dtype)
    ids = lax.broadcasted_iota(z.dtype, z.shape, axis)
    return jnp.minimum(jnp.abs(ids - jnp.expand_dims(pivot, axis).astype(z.dtype)), 1)


def pick(array: Array, ids: Array, axis: int) -> Array:
    """Each token's entry at class `ids`, which must lie in range; `array` may have size 1 in any other axis."""
    if array.shape[axis] == 1:
        return jnp.squeeze(array, axis)
    return jnp.squeeze(jnp.take_along_axis(array, jnp.expand_dims(ids, axis), axis, mode="promise_in_bounds"), axis)


# The sums that are linear in z - m. In each, a factor of exactly 0 wins over z = -inf.


def _label_sums(z, pivot, labels, class_weights, where, axis):
    """(own_mass, rest_mass, label_sum), None where they are 1, 0 and 0."""
    in_range = jnp.clip(pivot, 0, z.shape[axis] - 1)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if class_weights is None:
            return None, None, None
        return jnp.where(in_range == pivot, pick(class_weights, in_range, axis), jnp.nan), None, None
    target = labels.astype(z.dtype)
    target = target if class_weights is None else class_weights * target
    target = target if where is None else jnp.where(where, target, 0)
    own_mass = pick(target, in_range, axis)
    target = target * not_at(pivot, z, axis)
    label_sum = jnp.sum(target * jnp.where((target == 0) & jnp.isinf(z), 0, z), axis)
    return own_mass, jnp.sum(target, axis), label_sum


def _prior(z, class_weights, where, axis):
    if class_weights is None and where is None:
        return jnp.sum(z, axis)
    each = jnp.ones_like(z) if class_weights is None else class_weights
    each = each if where is None else jnp.where(where, each, 0)
    return jnp.sum(each * jnp.where((each == 0) & jnp.isinf(z), 0, z), axis)


def _sums(logits, labels, class_weights, adjustment, axis, smooth):
    """ClassSums by plain JAX, and the pivot."""
    shift = row_shift(adjust(logits, adjustment), axis)
    fenced, shift = apart(logits, shift)
    z = shifted(fenced, adjustment, shift, axis)
    pivot = labels if jnp.issubdtype(labels.dtype, jnp.integer) else jnp.argmax(z, axis).astype(jnp.int32)
    rest = jnp.sum(jnp.exp(z) * not_at(pivot, z, axis), axis)

    # The label's logit is read raw and adjusted by itself. An id that names no class makes its whole row NaN.
    in_range = jnp.clip(pivot, 0, z.shape[axis] - 1)
    there = None if adjustment.where is None else pick(adjustment.where, in_range, axis)
    own = upcast(adjust(pick(logits, in_range, axis), adjustment._replace(where=there))) - shift
    own = jnp.where(in_range == pivot, own, jnp.nan)
    shift, rest, own = apart(shift, rest, own)

    fenced, rest = apart(logits, rest)
    z = shifted(fenced, adjustment, shift, axis)
    masses = _label_sums(z, pivot, labels, class_weights, adjustment.where, axis)
    prior = _prior(z, class_weights, adjustment.where, axis) if smooth else None
    return ClassSums(shift, rest, own, *masses, prior), pivot


# The rule. With the cotangents drest and down, and m a constant,
#
#     dz_v = drest · exp(z_v - m)   for v ≠ pivot             dz_pivot = down
#
# to which the linear sums add their own, and which is pulled back through `adjust`, where it is cast once. Kept: the
# operands as they came, m and the pivot, one number each per token. Made again: z and its exponential.
#
# A row whose sums are not used, since its token has weight 0, is emptied before its gradient is made: whatever it
# holds, NaN or inf, its gradient is exactly 0.


def _class_sums(
    logits: Array,
    labels: Array,
    class_weights: Array | None,
    adjustment: Adjustment,
    unused: Array | None,
    axis: int,
    smooth: bool,
) -> ClassSums:
    """The sums of every token over the classes on `axis`.

    Integer `labels` have the batch shape, floating ones the shape of `logits`; `class_weights` and
    `adjustment.where` broadcast to the logits; the sums of `unused` rows (None: there are none) must have cotangent 0;
    `smooth` asks for `prior`.
    """
    return _sums(logits, labels, class_weights, adjustment, axis, smooth)[0]


def _emptied(unused, logits, labels, axis):
    if unused is None:
        return logits, labels
    rows = jnp.expand_dims(unused, axis)
    dense = jnp.issubdtype(labels.dtype, jnp.floating)
    return jnp.where(rows, 0, logits), jnp.where(rows, 0, labels) if dense else labels


def _class_sums_fwd(logits, labels, class_weights, adjustment, unused, axis, smooth):
    sums, pivot = _sums(logits, labels, class_weights, adjustment, axis, smooth)
    return sums, (logits, labels, class_weights, adjustment, unused, sums.shift, pivot)


def _class_sums_bwd(axis, smooth, residuals, cotangents):
    logits, labels, class_weights, adjustment, unused, shift, pivot = residuals
    where, scale, softcap = adjustment
    drest, down = cotangents.rest, cotangents.own
    dense = jnp.issubdtype(labels.dtype, jnp.floating)

    logits, shift, drest = apart(logits, shift, drest)
    logits, labels = _emptied(unused, logits, labels, axis)
    shift = shift if unused is None else jnp.where(unused, 0, shift)

    of_operands = lambda x, scale, softcap: shifted(x, Adjustment(where, scale, softcap), shift, axis)  # noqa: E731
    z, pull_adjusted = jax.vjp(of_operands, logits, scale, softcap)
    at_pivot = lax.broadcasted_iota(jnp.int32, z.shape, axis) == jnp.expand_dims(pivot, axis)
    dz = jnp.where(at_pivot, jnp.expand_dims(down, axis), jnp.expand_dims(drest, axis) * jnp.exp(z))

    # An infinite z counts for nothing in a linear sum whose cotangent is 0.
    finite = lambda cotangent: jnp.where(jnp.isinf(z) & (jnp.expand_dims(cotangent, axis) == 0), 0, z)  # noqa: E731
    dlabels, dclass_weights = None, [] if class_weights is None else [jnp.zeros_like(class_weights)]
    if dense:
        masses = lambda z, t, c: _label_sums(z, pivot, t, c, where, axis)  # noqa: E731
        _, pull = jax.vjp(masses, finite(cotangents.label_sum), labels, class_weights)
        dz_labels, dlabels, dc = pull(tuple(cotangents[3:6]))
        dz, dclass_weights = dz + dz_labels, [*dclass_weights, dc]
    elif class_weights is not None:
        _, pull = jax.vjp(lambda c: _label_sums(z, pivot, labels, c, where, axis), class_weights)
        dclass_weights = [*dclass_weights, *pull(tuple(cotangents[3:6]))]
    if smooth:
        _, pull = jax.vjp(lambda z, c: _prior(z, c, where, axis), finite(cotangents.prior), class_weights)
        dz_prior, dc = pull(cotangents.prior)
        dz, dclass_weights = dz + dz_prior, [*dclass_weights, dc]
    dlogits, dscale, dsoftcap = pull_adjusted(dz)
    dclass_weights = None if class_weights is None else sum(dclass_weights)
    return dlogits, dlabels, dclass_weights, Adjustment(None, dscale, dsoftcap), None


class_sums = jax.custom_vjp(_class_sums, nondiff_argnums=(5, 6))
class_sums.defvjp(_class_sums_fwd, _class_sums_bwd)


@partial(jax.checkpoint, static_argnums=(5, 6), prevent_cse=False)
def class_sums_forward_mode(
    logits: Array,
    labels: Array,
    class_weights: Array | None,
    adjustment: Adjustment,
    unused: Array | None,
    axis: int,
    smooth: bool,
) -> ClassSums:
    """`class_sums` by JAX's own derivatives, for forward mode: slower in reverse, and kept as small by recomputing.

    With m a constant they are the rule above.
    """
    return _sums(*_emptied(unused, logits, labels, axis), class_weights, adjustment, axis, smooth)[0]
