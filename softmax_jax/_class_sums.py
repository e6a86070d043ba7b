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
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softmax_jax._adjustment import Adjustment, adjust, rounded, row_shift, shifted
from softmax_jax._class_passes import (
    beyond_exp,
    finite,
    first_of_largest,
    is_at,
    moment_of_others,
    pick,
    pick_logit,
    pick_of_all,
    place_of,
    sum_of_others,
    times,
    top_class,
    with_at_ids,
    z_of,
)
from softmax_jax._combine import Folded, over_devices
from softmax_jax._dtypes import accumulator, nan_unless, upcast
from softmax_jax._fold import by_platform, fold
from softmax_jax._passes import apart, sum_over_classes
from softmax_jax._sharding import Names, check_gradient, count, offset, pmax, psum, vary, vary_alike, varying
from softmax_jax._targets import (
    Labels,
    SparseLabels,
    are_dense,
    are_ids,
    dense_sums,
    few,
    few_weights,
    own_mass,
    sparse_sums,
    target,
    uniform,
)


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum."""

    shift: Array  # m, or 0 where m = -inf; a constant: no gradient flows through it
    rest: Array
    own: Array
    own_mass: Array | None = None  # t_pivot; None is 1
    rest_mass: Array | None = None  # Σ_{v≠pivot} t_v; None is 0, as are those below
    label_sum: Array | None = None  # Σ_{v≠pivot} t_v (z_v - m)
    prior: Array | None = None  # Σ_v c_v (z_v - m), for probability that is spread evenly
    moment: Array | None = None  # Σ_{v≠pivot} exp(z_v - m) (m - z_v), for the entropy
    above: Array | None = None  # how many z are larger than that of the label; no gradient, as of ties
    ties: Array | None = None  # 0 where no class before the label has its z
    first: Array | None = None  # the first class of the largest z


class Asked(NamedTuple):
    """Which sums are made besides those that the labels need. Static."""

    prior: bool = False
    moment: bool = False
    place: bool = False  # above, ties and first, of SparseLabels of one class
    beside: bool = False  # statistics of the same logits, whose pass is this one if both take each class by itself


def _prior(logits, class_weights, m, adjustment, axis):
    def of_logits(arrays, m, _, axis):
        logits, class_weights, where = arrays
        z = z_of((logits, where), adjustment, m, axis)
        return z if class_weights is None and where is None else times(uniform(class_weights, where, z), z)

    # Without a pivot, and so not behind the same fence as the sum of the others, with which it would share z.
    return sum_over_classes(of_logits, (logits, class_weights, adjustment.where), m, jnp.zeros_like(m, jnp.int32), axis)


def _written(logits, labels, class_weights, adjustment, unused, m, pivot, axis, asked, class_axes) -> ClassSums:
    """The sums as they are written, around a given m and pivot: what their derivatives are of."""
    size, where = logits.shape[axis], adjustment.where
    here = pivot - offset(size, class_axes)
    rest = sum_of_others(logits, m, here, adjustment, axis)
    in_range = jnp.clip(here, 0, size - 1)
    own = jnp.where(in_range == here, rounded(pick_logit(logits, in_range, adjustment, axis), m) - m, 0)
    mass, rest_mass, label_sum = _of_labels(logits, labels, class_weights, adjustment, m, here, axis, class_axes)
    if are_dense(labels):
        mass = own_mass(labels, class_weights, where, here, size, axis, m.dtype)
        rest_mass, label_sum = dense_sums(logits, labels, class_weights, m, here, adjustment, axis)
    prior = _prior(logits, class_weights, m, adjustment, axis) if asked.prior else None
    moment = moment_of_others(logits, m, here, adjustment, axis) if asked.moment else None
    (own,) = apart(_of_existing(own, pivot, unused, size, class_axes))
    rest, own, mass, rest_mass, label_sum, prior, moment = psum(
        (rest, own, mass, rest_mass, label_sum, prior, moment), class_axes
    )
    return ClassSums(m, rest, own, mass, rest_mass, label_sum, prior, moment)


def _of_existing(own, pivot, unused, size, class_axes):
    """A pivot that no class is makes its row NaN, if it is used."""
    return nan_unless((pivot >= 0) & (pivot < count(size, class_axes)), own, unused)


def _of_labels(logits, labels, class_weights, adjustment, m, here, axis, class_axes):
    """(own_mass, rest_mass, label_sum) of what needs no pass over the classes."""
    if isinstance(labels, SparseLabels):
        first = offset(logits.shape[axis], class_axes)
        at = few(logits, labels, class_weights, adjustment.where, first, axis)
        z = shifted(at.logits, adjustment._replace(where=at.where), m, axis)
        mass, *others = sparse_sums(z, labels.probs, at.class_weights, at, here, axis)
        return nan_unless(~jnp.any(jnp.isnan(labels.probs), axis), mass), *others
    mass = None
    if are_ids(labels):
        mass = own_mass(labels, class_weights, adjustment.where, here, logits.shape[axis], axis, m.dtype)
    return mass, None, None


def _by_passes(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    """(ClassSums, pivot), each sum by a pass of its own."""
    (m,) = apart(row_shift(adjust(logits, adjustment), axis, class_axes))
    pivot = labels if are_ids(labels) else top_class(logits, m, adjustment, axis, class_axes)
    sums = _written(logits, labels, class_weights, adjustment, unused, m, pivot, axis, asked, class_axes)
    if asked.place:
        above, ties = place_of(logits, jnp.squeeze(labels.ids, axis), adjustment, axis, class_axes)
        sums = sums._replace(above=above, ties=ties, first=first_of_largest(logits, adjustment, axis, class_axes))
    return sums, pivot


def _by_fold(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    """The same in one pass."""
    size, dtype, where = logits.shape[axis], accumulator(logits.dtype), adjustment.where
    t = target(labels, class_weights, where, dtype) if are_dense(labels) else None
    c = uniform(class_weights, where, jnp.ones_like(logits, dtype)) if asked.prior else None
    label, than, above, ties, first = labels if are_ids(labels) else None, None, None, None, None
    if asked.place:
        ids = jnp.squeeze(labels.ids, axis)
        than = ids, pick_of_all(logits, ids, adjustment, axis, class_axes)
    operands, asks = (logits, label, t, c, than, adjustment), {"moment": asked.moment, "one_by_one": asked.beside}
    found = fold(*operands, axis, class_axes, **asks)
    if label is not None:
        found = found._replace(own=_adjusted(found.own, label, adjustment, size, axis, class_axes))
    found = over_devices(found, class_axes)
    if asked.place:
        above, ties = found.above, pmax((found.top != ids).astype(dtype), class_axes)
        first = found.top.astype(dtype)
    m, top, rest = _settled(found, count(size, class_axes))
    pivot, nothing = top if label is None else label, m - m
    here = pivot - offset(size, class_axes)
    if t is None:
        of_labels = _of_labels(logits, labels, class_weights, adjustment, m, here, axis, class_axes)
        mass, rest_mass, label_sum = psum(of_labels, class_axes)
    else:
        mass, rest_mass, label_sum = found.mass, found.rest_mass, found.label_sum
    own = nothing if label is None else found.own - m + nothing
    own = own + psum(_of_existing(jnp.zeros_like(m), pivot, unused, size, class_axes), class_axes)
    return ClassSums(m, rest, own, mass, rest_mass, label_sum, found.prior, found.moment, above, ties, first), pivot


def _adjusted(own, label, adjustment, size, axis, class_axes):
    """z of a token's label, of its logit as it came; 0 where it is none of the classes here."""
    here = label - offset(size, class_axes)
    in_range = jnp.clip(here, 0, size - 1)
    where = None if adjustment.where is None else pick(adjustment.where, in_range, axis)
    return jnp.where(in_range == here, upcast(adjust(own, adjustment._replace(where=where))), 0)


class Top(NamedTuple):
    """Of a token's classes: the sums around the largest z alone."""

    m: Array
    top: Any  # how many classes there are, where none is the largest
    rest: Array


def _settled(found: Folded, classes: int) -> Top:
    """Of all classes: m is 0 in a row of -inf alone, and rest NaN in one that holds NaN or +inf, as m - m is."""
    lacking = found.m == -jnp.inf
    m = jnp.where(lacking, 0, found.m)
    top = None if found.top is None else jnp.where(lacking | jnp.isnan(m), classes, found.top)
    return Top(m, top, jnp.where(lacking, 0, found.rest) + (m - m))


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def top_sums(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Top:
    """m and the top are constants: no gradient flows through them."""

    def by_passes(logits, adjustment):
        (m,) = apart(row_shift(adjust(logits, adjustment), axis, class_axes))
        top = top_class(logits, m, adjustment, axis, class_axes)
        return Top(m, top, rest_of_top(logits, m, top, adjustment, axis, class_axes))

    def by_fold(logits, adjustment):
        found = fold(logits, None, None, None, None, adjustment, axis, class_axes)
        found = over_devices(found, class_axes)
        return _settled(found, count(logits.shape[axis], class_axes))

    return by_platform(by_passes, by_fold, logits, adjustment)


def rest_of_top(logits, m, top, adjustment, axis, class_axes, scale=None) -> Array:
    """Σ_{v≠top} exp(scale · (z_v - m)), of all devices' classes."""
    here = top - offset(logits.shape[axis], class_axes)
    return psum(sum_of_others(logits, m, here, adjustment, axis, vary(scale, varying(logits))), class_axes)


def _top_sums_jvp(axis, class_axes, primals, tangents):
    sums = top_sums(*primals, axis, class_axes)
    m, top, _ = lax.stop_gradient(sums)
    of = lambda logits, adjustment: rest_of_top(logits, m, top, adjustment, axis, class_axes)  # noqa: E731
    return sums, Top(jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), tangent_of(of, primals, tangents))


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)


def tangent_of(f, primals, tangents):
    """The tangent of f(*primals), by what has a tangent alone: behind a barrier a compiler computes with zeros too."""
    leaves, tree = jax.tree.flatten(primals)
    tangents = tree.flatten_up_to(tangents)
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def of_moving(some):
        return f(*tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))

    some, theirs = ({i: of[i] for i in moving} for of in (leaves, tangents))
    return jax.jvp(of_moving, (some,), (theirs,))[1]


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def _sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    """ClassSums, and the pivot."""
    how = {"axis": axis, "asked": asked, "class_axes": class_axes}
    operands = logits, labels, class_weights, adjustment, unused
    return by_platform(partial(_by_passes, **how), partial(_by_fold, **how), *operands)


def _sums_jvp(axis, asked, class_axes, primals, tangents):
    sums, pivot = _sums(*primals, axis, asked, class_axes)
    m, at = lax.stop_gradient((sums.shift, pivot))
    written = partial(_written, m=m, pivot=at, axis=axis, asked=asked, class_axes=class_axes)
    dsums = tangent_of(written, primals, tangents)
    dplace = jax.tree.map(jnp.zeros_like, {name: getattr(sums, name) for name in ("above", "ties", "first")})
    dsums = dsums._replace(**dplace)
    return (sums, pivot), (dsums, zero_from_primal(pivot, symbolic_zeros=True))


_sums.defjvp(_sums_jvp, symbolic_zeros=True)


# The rule. With the cotangents drest, dmoment and down, and m a constant,
#
#     dz_v = exp(z_v - m) · (drest + dmoment · (m - z_v - 1))   for v ≠ pivot             dz_pivot = down
#
# to which the linear sums add their own, and which is pulled back through `adjust`, where it is cast once. Kept: the
# operands as they came, m and the pivot, one number each per token. Made again: z and its exponential.
#
# The few classes of SparseLabels come after: what their gradient is as a whole is computed for them alone, and written
# over what all classes have.
#
# A row whose sums are not used, since its token has weight 0, is emptied before its gradient is made: whatever it
# holds, NaN or inf, its gradient is exactly 0.


def _emptied(unused, logits, labels, axis):
    if unused is None:
        return logits, labels
    rows = jnp.expand_dims(unused, axis)
    empty = lambda a: jnp.where(rows, 0, a) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return empty(logits), jax.tree.map(empty, labels)


def _class_sums_fwd(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    check_gradient(class_axes)
    sums, pivot = _sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes)
    return sums, (logits, labels, class_weights, adjustment, unused, sums.shift, pivot)


def _dz(z, at_pivot, class_weights, where, of_labels, cotangents):
    """The gradient of z at any classes, by the cotangents of their tokens."""
    slope = cotangents.rest
    if cotangents.moment is not None:
        slope = slope - cotangents.moment * (1 + beyond_exp(z))
    dz = slope * jnp.exp(z)
    dz = dz if of_labels is None else dz + of_labels
    dz = jnp.where(at_pivot, cotangents.own, dz)
    return dz if cotangents.prior is None else dz + cotangents.prior * uniform(class_weights, where, z)


def _pull_dense(z, labels, class_weights, where, at_pivot, cotangents):
    """(dz, dlabels, dclass_weights) of the masses and the label_sum of dense labels."""
    t, pull = jax.vjp(lambda labels, c: target(labels, c, where, z.dtype), labels, class_weights)
    of_sum = cotangents.label_sum
    dt = cotangents.rest_mass + of_sum * finite(z, (of_sum == 0) | (t == 0))
    return of_sum * t, *pull(jnp.where(at_pivot, cotangents.own_mass, dt))


def _pull_prior(z, class_weights, where, of_prior):
    """dclass_weights."""
    each, pull = jax.vjp(lambda c: uniform(c, where, z), class_weights)
    return pull(of_prior * finite(z, (of_prior == 0) | (each == 0)))[0]


def _pull_few(logits, labels, class_weights, adjustment, shift, pivot, first, axis, cotangents, across):
    """Of SparseLabels: (ids, the whole gradient of their logits), dprobs, dclass_weights, and what the labels' part
    adds to the gradients of scale and softcap."""
    at = few(logits, labels, class_weights, adjustment.where, first, axis)
    of_operands = lambda x, scale, softcap: shifted(x, Adjustment(at.where, scale, softcap), shift, axis)  # noqa: E731
    z, pull_adjusted = jax.vjp(of_operands, at.logits, *adjustment[1:])

    sums = lambda z, probs, c: sparse_sums(z, probs, c, at, pivot, axis)  # noqa: E731
    _, pull = jax.vjp(sums, finite(z, across.label_sum == 0), labels.probs, at.class_weights)
    of_labels, dprobs, dweights = pull((cotangents.own_mass, cotangents.rest_mass, cotangents.label_sum))
    _, pull_weights = jax.vjp(lambda c: few_weights(c, at.ids, axis), class_weights)

    at_pivot = at.ids == jnp.expand_dims(pivot, axis)
    dlogits, *_ = pull_adjusted(_dz(z, at_pivot, at.class_weights, at.where, of_labels, across))
    return (at.ids, dlogits), dprobs, *pull_weights(dweights), pull_adjusted(of_labels)[1:]


def _class_sums_bwd(axis, asked, class_axes, residuals, cotangents):
    logits, labels, class_weights, adjustment, unused, shift, pivot = residuals
    cotangents = vary(cotangents, varying(logits))
    first = offset(logits.shape[axis], class_axes)
    pivot = pivot - first
    where, scale, softcap = adjustment

    logits, shift, drest = apart(logits, shift, cotangents.rest)
    logits, labels = _emptied(unused, logits, labels, axis)
    shift = shift if unused is None else jnp.where(unused, 0, shift)
    across: ClassSums = jax.tree.map(lambda c: jnp.expand_dims(c, axis), cotangents._replace(rest=drest))

    of_operands = lambda x, scale, softcap: shifted(x, Adjustment(where, scale, softcap), shift, axis)  # noqa: E731
    z, pull_adjusted = jax.vjp(of_operands, logits, scale, softcap)
    at_pivot = is_at(pivot, z, axis)
    of_labels, dlabels, dclass_weights = None, None, jax.tree.map(jnp.zeros_like, class_weights)
    if are_dense(labels):
        of_labels, dlabels, dclass_weights = _pull_dense(z, labels, class_weights, where, at_pivot, across)
    elif are_ids(labels) and class_weights is not None:
        _, pull = jax.vjp(lambda c: own_mass(labels, c, where, pivot, z.shape[axis], axis, z.dtype), class_weights)
        (dclass_weights,) = pull(cotangents.own_mass)
    dz = _dz(z, at_pivot, class_weights, where, of_labels, across)
    if across.prior is not None:
        more = _pull_prior(z, class_weights, where, across.prior)
        dclass_weights = jax.tree.map(jnp.add, dclass_weights, more)
    dlogits, *dscales = pull_adjusted(dz)
    if isinstance(labels, SparseLabels):
        operands = logits, labels, class_weights, adjustment, shift, pivot, first, axis
        at_few, dprobs, more, dscales_too = _pull_few(*operands, cotangents, across)
        dlogits, dlabels = with_at_ids(dlogits, *at_few, axis), SparseLabels(None, dprobs)
        dclass_weights, dscales = jax.tree.map(jnp.add, (dclass_weights, dscales), (more, [*dscales_too]))
    return dlogits, dlabels, dclass_weights, Adjustment(None, *dscales), None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _class_sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    return _sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes)[0]


_class_sums.defvjp(_class_sums_fwd, _class_sums_bwd)


def class_sums(
    logits: Array,
    labels: Labels,
    class_weights: Array | None,
    adjustment: Adjustment,
    unused: Array | None,
    *,
    axis: int,
    asked: Asked,
    class_axes: Names,
    forward_mode: bool,
) -> ClassSums:
    """The sums of every token over the classes on `axis` and on the mesh axes `class_axes`.

    `labels` are in their one form; `class_weights` and `adjustment.where` broadcast to the logits; the sums of
    `unused` rows (None: there are none) must have cotangent 0. `forward_mode` leaves the derivatives to JAX, by which,
    with m a constant, they are the rule above: slower in reverse, and kept as small by recomputing.
    """
    operands = vary_alike(logits, labels, class_weights, adjustment, unused)
    if not forward_mode:
        return _class_sums(*operands, axis, asked, class_axes)

    @partial(jax.checkpoint, prevent_cse=False)
    def plain(logits, labels, class_weights, adjustment, unused):
        used = _emptied(unused, logits, labels, axis)
        return _sums(*used, class_weights, adjustment, unused, axis, asked, class_axes)[0]

    return plain(*operands)
