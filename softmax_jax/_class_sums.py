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

The waist is also where devices meet: of classes that are sharded over the mesh axes `class_axes`, each device sums its
own, with a pivot that may be none of them, and one psum adds the sums up.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, apart, row_shift, shifted
from softmax_jax._dtypes import nan_unless, upcast
from softmax_jax._sharding import Names, checks_varying, count, offset, pmin, psum, vary, vary_alike, varying


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum."""

    shift: Array  # m, or 0 where m = -inf; a constant: no gradient flows through it
    rest: Array
    own: Array
    own_mass: Array | None = None  # t_pivot; None is 1
    rest_mass: Array | None = None  # Σ_{v≠pivot} t_v; None is 0, as are the two below
    label_sum: Array | None = None  # Σ_{v≠pivot} t_v (z_v - m)
    prior: Array | None = None  # Σ_v c_v (z_v - m), for label smoothing


def _ids(z: Array, axis: int) -> Array:
    """The class of every entry, in z's dtype: XLA's row reductions on the CPU keep a float inside where an integer, a
    comparison or a select would write the whole array out (3-6x slower). Exact up to 2**24 classes in float32."""
    exact = z.shape[axis] <= 2**24
    return lax.broadcasted_iota(z.dtype if exact else jnp.int32, z.shape, axis)


def not_at(pivot: Array, z: Array, axis: int) -> Array:
    """0 at each token's pivot class and 1 elsewhere, in z's shape and dtype."""
    ids = _ids(z, axis)
    pivot = jnp.expand_dims(pivot, axis).astype(ids.dtype)
    return jnp.minimum(jnp.abs(ids - pivot), 1).astype(z.dtype)


def _first_maximum(z: Array, axis: int, class_axes: Names) -> Array:
    """The first class at which z = 0; the number of classes for a row that has none."""
    size, ids = z.shape[axis], _ids(z, axis)
    below = jnp.minimum(jnp.minimum(-z * 1e38, 1) * 1e38, 1)  # 0 where z = 0, else 1, without a comparison
    first = jnp.min(ids + size * below.astype(ids.dtype), axis)
    found = first < size
    first = jnp.where(found, first, 0).astype(jnp.int32) + offset(size, class_axes)
    return pmin(jnp.where(found, first, count(size, class_axes)), class_axes)


def pick(array: Array, ids: Array, axis: int) -> Array:
    """Each token's entry at class `ids`, which must lie in range; `array` may have size 1 in any other axis."""
    if array.shape[axis] == 1:
        return jnp.squeeze(array, axis)
    return jnp.squeeze(jnp.take_along_axis(array, jnp.expand_dims(ids, axis), axis, mode="promise_in_bounds"), axis)


# The sums that are linear in z - m. In each, a factor of exactly 0 wins over z = -inf.


def _label_sums(z, pivot, labels, class_weights, where, axis):
    """(own_mass, rest_mass, label_sum) of the classes here, None where they are 1, 0 and 0."""
    in_range = jnp.clip(pivot, 0, z.shape[axis] - 1)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if class_weights is None:
            return None, None, None
        return jnp.where(in_range == pivot, pick(class_weights, in_range, axis), 0), None, None
    target = labels.astype(z.dtype)
    target = target if class_weights is None else class_weights * target
    target = target if where is None else jnp.where(where, target, 0)
    own_mass = jnp.where(in_range == pivot, pick(target, in_range, axis), 0)
    target = target * not_at(pivot, z, axis)
    label_sum = jnp.sum(target * jnp.where((target == 0) & jnp.isinf(z), 0, z), axis)
    return own_mass, jnp.sum(target, axis), label_sum


def _prior(z, class_weights, where, axis):
    if class_weights is None and where is None:
        return jnp.sum(z, axis)
    each = jnp.ones_like(z) if class_weights is None else class_weights
    each = each if where is None else jnp.where(where, each, 0)
    return jnp.sum(each * jnp.where((each == 0) & jnp.isinf(z), 0, z), axis)


def _sums(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes):
    """ClassSums by plain JAX, and the pivot."""
    m = row_shift(adjust(logits, adjustment), axis, class_axes)
    fenced, shift = apart(logits, m)
    z = shifted(fenced, adjustment, shift, axis)
    dense, size = jnp.issubdtype(labels.dtype, jnp.floating), z.shape[axis]
    pivot = _first_maximum(z, axis, class_axes) if dense else labels
    here = pivot - offset(size, class_axes)
    rest = jnp.sum(jnp.exp(z) * not_at(here, z, axis), axis)

    # The label's logit is read raw and adjusted by itself. An id that no class has makes its row NaN, if it is used.
    in_range, exists = jnp.clip(here, 0, size - 1), (pivot >= 0) & (pivot < count(size, class_axes))
    exists = exists if unused is None else exists | unused
    there = None if adjustment.where is None else pick(adjustment.where, in_range, axis)
    own = upcast(adjust(pick(logits, in_range, axis), adjustment._replace(where=there))) - shift
    own = nan_unless(exists, jnp.where(in_range == here, own, 0))
    shift, rest, own = apart(shift, rest, own)

    fenced, rest = apart(logits, rest)
    z = shifted(fenced, adjustment, shift, axis)
    masses = _label_sums(z, here, labels, class_weights, adjustment.where, axis)
    prior = _prior(z, class_weights, adjustment.where, axis) if smooth else None
    # Behind a fence JAX 0.10 takes `shift` to vary over devices as the logits do; m does not.
    return ClassSums(m if class_axes else shift, *psum((rest, own, *masses, prior), class_axes)), pivot


# The rule. With the cotangents drest and down, and m a constant,
#
#     dz_v = drest · exp(z_v - m)   for v ≠ pivot             dz_pivot = down
#
# to which the linear sums add their own, and which is pulled back through `adjust`, where it is cast once. Kept: the
# operands as they came, m and the pivot, one number each per token. Made again: z and its exponential.
#
# A row whose sums are not used, since its token has weight 0, is emptied before its gradient is made: whatever it
# holds, NaN or inf, its gradient is exactly 0.


def _emptied(unused, logits, labels, axis):
    if unused is None:
        return logits, labels
    rows = jnp.expand_dims(unused, axis)
    dense = jnp.issubdtype(labels.dtype, jnp.floating)
    return jnp.where(rows, 0, logits), jnp.where(rows, 0, labels) if dense else labels


def _class_sums_fwd(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes):
    if not checks_varying(class_axes):
        raise ValueError(
            f"the gradient over axis_name={class_axes} needs `jax.shard_map(..., check_vma=True)`, its default: "
            "without it, as under `jax.vmap` and `jax.pmap`, JAX does not tell a cotangent that every device has from "
            "one that is spread over them: the gradient would be wrong by the number of devices. Take it under that."
        )
    sums, pivot = _sums(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes)
    return sums, (logits, labels, class_weights, adjustment, unused, sums.shift, pivot)


def _class_sums_bwd(axis, smooth, class_axes, residuals, cotangents):
    logits, labels, class_weights, adjustment, unused, shift, pivot = residuals
    cotangents = vary(cotangents, varying(logits))
    pivot = pivot - offset(logits.shape[axis], class_axes)
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


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _class_sums(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes):
    return _sums(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes)[0]


_class_sums.defvjp(_class_sums_fwd, _class_sums_bwd)


def class_sums(
    logits: Array,
    labels: Array,
    class_weights: Array | None,
    adjustment: Adjustment,
    unused: Array | None,
    *,
    axis: int,
    smooth: bool,
    class_axes: Names,
    forward_mode: bool,
) -> ClassSums:
    """The sums of every token over the classes on `axis` and on the mesh axes `class_axes`.

    Integer `labels` have the batch shape, floating ones the shape of `logits`; `class_weights` and
    `adjustment.where` broadcast to the logits; the sums of `unused` rows (None: there are none) must have cotangent 0;
    `smooth` asks for `prior`. `forward_mode` leaves the derivatives to JAX, by which, with m a constant, they are the
    rule above: slower in reverse, and kept as small by recomputing.
    """
    operands = vary_alike(logits, labels, class_weights, adjustment, unused)
    if not forward_mode:
        return _class_sums(*operands, axis, smooth, class_axes)

    @partial(jax.checkpoint, prevent_cse=False)
    def plain(logits, labels, class_weights, adjustment, unused):
        used = _emptied(unused, logits, labels, axis)
        return _sums(*used, class_weights, adjustment, unused, axis, smooth, class_axes)[0]

    return plain(*operands)
