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

With `a` the largest logit (or one close to it) a one-hot target is as exact as the integer label: at `a` itself the
gradient comes out as rest_mass · p_a - own_mass · (1 - p_a), not as p_a - t_a. The class that is left out, y or a, is
the `pivot`.

The waist is also where devices meet: of classes that are sharded over the mesh axes `class_axes`, each device sums its
own, with a pivot that may be none of them, and one psum adds the sums up.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._adjustment import Adjustment, adjust, row_shift, shifted
from softmax_jax._dtypes import nan_unless
from softmax_jax._passes import (
    apart,
    distance,
    finite,
    is_at,
    pick,
    pick_logit,
    sum_of_others,
    sum_over_classes,
    times,
    top_class,
    z_of,
)
from softmax_jax._sharding import Names, checks_varying, count, offset, psum, vary, vary_alike, varying


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum."""

    shift: Array  # m, or 0 where m = -inf; a constant: no gradient flows through it
    rest: Array
    own: Array
    own_mass: Array | None = None  # t_pivot; None is 1
    rest_mass: Array | None = None  # Σ_{v≠pivot} t_v; None is 0, as are the two below
    label_sum: Array | None = None  # Σ_{v≠pivot} t_v (z_v - m)
    prior: Array | None = None  # Σ_v c_v (z_v - m), for label smoothing


# What is linear in z - m. In each sum, a factor of exactly 0 wins over z = -inf.


def _target(labels, class_weights, where, dtype):
    """t_v of dense labels. What `where` hides may be NaN."""
    labels, class_weights = _existing(labels.astype(dtype), where), _existing(class_weights, where)
    return labels if class_weights is None else class_weights * labels


def _existing(array: Any, where: Array | None) -> Any:
    return array if array is None or where is None else jnp.where(where, array, 0)


def _uniform(class_weights, where, z):
    """c_v of every class that exists."""
    each = jnp.ones_like(z) if class_weights is None else jnp.broadcast_to(class_weights, z.shape)
    return _existing(each, where)


def _own_mass(labels, class_weights, where, pivot, size, axis, dtype):
    """t_pivot, and 0 where the pivot is none of the classes here; None for 1."""
    in_range = jnp.clip(pivot, 0, size - 1)
    there = lambda a: None if a is None else pick(a, in_range, axis)  # noqa: E731
    dense = jnp.issubdtype(labels.dtype, jnp.floating)
    mass = _target(there(labels), there(class_weights), there(where), dtype) if dense else there(class_weights)
    return None if mass is None else jnp.where(in_range == pivot, mass, 0)


def _label_sums(logits, labels, class_weights, m, pivot, adjustment, axis):
    """(rest_mass, label_sum) of dense labels. A factor that is 0 at the pivot leaves it out: 1 elsewhere in the one
    sum, a half in the other, since the two would share the same constant (see `alone`)."""

    def others(arrays, m, pivot, axis):
        labels, class_weights, where = arrays
        target = _target(labels, class_weights, where, m.dtype)
        return target * jnp.minimum(distance(pivot, target, axis), 1)

    def of_logits(arrays, m, pivot, axis):
        logits, labels, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return times(_target(labels, class_weights, where, m.dtype), z * jnp.minimum(distance(pivot, z, axis), 0.5))

    arrays = labels, class_weights, adjustment.where
    rest_mass = sum_over_classes(others, arrays, m, pivot, axis)
    return rest_mass, 2 * sum_over_classes(of_logits, (logits, *arrays), m, pivot, axis)


def _prior(logits, class_weights, m, adjustment, axis):
    def of_logits(arrays, m, _, axis):
        logits, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return z if class_weights is None and where is None else times(_uniform(class_weights, where, z), z)

    # Without a pivot, and so not behind the same fence as the sum of the others, with which it would share z.
    return sum_over_classes(of_logits, (logits, class_weights, adjustment.where), m, jnp.zeros_like(m, jnp.int32), axis)


def _sums(logits, labels, class_weights, adjustment, unused, axis, smooth, class_axes):
    """ClassSums by plain JAX, and the pivot."""
    dense, size, where = jnp.issubdtype(labels.dtype, jnp.floating), logits.shape[axis], adjustment.where
    (m,) = apart(row_shift(adjust(logits, adjustment), axis, class_axes))
    pivot = top_class(logits, m, adjustment, axis, class_axes) if dense else labels
    here = pivot - offset(size, class_axes)
    rest = sum_of_others(logits, m, here, adjustment, axis)

    # An id that no class has makes its row NaN, if it is used.
    in_range, exists = jnp.clip(here, 0, size - 1), (pivot >= 0) & (pivot < count(size, class_axes))
    exists = exists if unused is None else exists | unused
    own = jnp.where(in_range == here, pick_logit(logits, in_range, adjustment, axis) - m, 0)
    own_mass = _own_mass(labels, class_weights, where, here, size, axis, m.dtype)

    rest_mass = label_sum = prior = None
    if dense:
        rest_mass, label_sum = _label_sums(logits, labels, class_weights, m, here, adjustment, axis)
    if smooth:
        prior = _prior(logits, class_weights, m, adjustment, axis)
    (own,) = apart(nan_unless(exists, own))
    return ClassSums(m, *psum((rest, own, own_mass, rest_mass, label_sum, prior), class_axes)), pivot


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


def _pull_label_sums(z, labels, class_weights, where, at_pivot, cotangents):
    """(dz, dlabels, dclass_weights) of the masses and the label_sum of dense labels."""
    target, pull = jax.vjp(lambda t, c: _target(t, c, where, z.dtype), labels, class_weights)
    of_sum = cotangents.label_sum
    dtarget = cotangents.rest_mass + of_sum * finite(z, (of_sum == 0) | (target == 0))
    return of_sum * target, *pull(jnp.where(at_pivot, cotangents.own_mass, dtarget))


def _pull_prior(z, class_weights, where, of_prior):
    """(dz, dclass_weights)."""
    each, pull = jax.vjp(lambda c: _uniform(c, where, z), class_weights)
    return of_prior * each, *pull(of_prior * finite(z, (of_prior == 0) | (each == 0)))


def _class_sums_bwd(axis, smooth, class_axes, residuals, cotangents):
    logits, labels, class_weights, adjustment, unused, shift, pivot = residuals
    cotangents = vary(cotangents, varying(logits))
    pivot = pivot - offset(logits.shape[axis], class_axes)
    where, scale, softcap = adjustment

    logits, shift, drest = apart(logits, shift, cotangents.rest)
    logits, labels = _emptied(unused, logits, labels, axis)
    shift = shift if unused is None else jnp.where(unused, 0, shift)
    across: ClassSums = jax.tree.map(lambda c: jnp.expand_dims(c, axis), cotangents._replace(rest=drest))

    of_operands = lambda x, scale, softcap: shifted(x, Adjustment(where, scale, softcap), shift, axis)  # noqa: E731
    z, pull_adjusted = jax.vjp(of_operands, logits, scale, softcap)
    at_pivot = is_at(pivot, z, axis)
    dz, dlabels, dclass_weights = across.rest * jnp.exp(z), None, jax.tree.map(jnp.zeros_like, class_weights)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        of_labels, dlabels, dclass_weights = _pull_label_sums(z, labels, class_weights, where, at_pivot, across)
        dz = dz + of_labels
    elif class_weights is not None:
        _, pull = jax.vjp(lambda c: _own_mass(labels, c, where, pivot, z.shape[axis], axis, z.dtype), class_weights)
        (dclass_weights,) = pull(cotangents.own_mass)
    dz = jnp.where(at_pivot, across.own, dz)
    if smooth:
        uniform, more = _pull_prior(z, class_weights, where, across.prior)
        dz, dclass_weights = dz + uniform, jax.tree.map(jnp.add, dclass_weights, more)
    dlogits, dscale, dsoftcap = pull_adjusted(dz)
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
