"""The waist: every loss here is a function of a few sums over the classes of one token.

Write z for a token's logits, y for its label, p = softmax(z), and m = max_v z_v, a constant. With

    rest = Σ_{v≠y} exp(z_v - m)        the label's own term left out
    own  = z_y - m                     ≤ 0
    total = rest + exp(own)            = Σ_v exp(z_v - m), between 1 and the number of classes

the loss is nll = -log p_y = log total - own, and 1 - p_y = rest/total. Others keep log total and subtract: once p_y → 1
the difference rounds to 0, and the gradient p_y - 1 with it. Here nothing cancels, because `rest` is kept by itself.

Dense labels are the same sums around another class. For any class a, with t_v the target of class v (class weight
included) and spread = log total = log_normalizer - m,

    Σ_v t_v (log_normalizer - z_v) = t_a · nll(rest_a, own_a)  +  Σ_{v≠a} t_v · spread  -  Σ_{v≠a} t_v (z_v - m)
                                   = own_mass · nll            +  rest_mass · spread    -  label_sum

With `a` the largest logit (or one close to it) a one-hot target is as exact as the integer label: at `a` itself the
gradient comes out as rest_mass · p_a - own_mass · (1 - p_a), not as p_a - t_a. The class that is left out, y or a, is
the `pivot`.

Around a given m and pivot these are plain sums, `_written`, and every derivative is one of theirs: with the cotangents
drest and down, dz_v = exp(z_v - m) · drest for v ≠ pivot and dz_pivot = down, to which the linear sums add their own.

The waist is also where devices meet: of classes that are sharded over the mesh axes `class_axes`, each device sums its
own, with a pivot that may be none of them, and one psum adds the sums up.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softmax_jax import _fold
from softmax_jax._adjustment import Adjustment, beyond_exp, shifted, weighed
from softmax_jax._barrier import apart
from softmax_jax._fold import rest_of_top
from softmax_jax._indexing import is_at, with_at_ids
from softmax_jax._labels import Labels
from softmax_jax._linear_map import Leaves, at, linear_map, moving, tangent_of
from softmax_jax._masses import target_of, uniform
from softmax_jax._sharding import Names, check_gradient, offset, psum, vary, varying
from softmax_jax._sparse_labels import Sparse, few, few_weights
from softmax_jax._sums import Asked, ClassSums, Top

LABELS = ("own_mass", "rest_mass", "label_sum")
CONSTANT = ("shift", "above", "ties", "first")
NO_COTANGENTS = ClassSums(None, None, None)  # pyright: ignore[reportArgumentType]


@jax.custom_jvp
def _gap(z):
    """-z exp(z), 0 at -inf."""
    return jnp.exp(z) * -beyond_exp(z)


@_gap.defjvp
def _gap_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _gap(z), (jnp.exp(z) * -(1 + beyond_exp(z))) * dz


def _written(x, adjustment: Adjustment, t, c, m, at_pivot, axis, asked: Asked, cotangents=NO_COTANGENTS):
    """The sums of some classes around a given m and pivot, by their targets t and shares c of what is spread evenly.

    Where the cotangent of a sum of products is known to be 0, a logit in it may be infinite."""
    z = shifted(x, adjustment, m, axis)
    exp_z = jnp.exp(z)
    at = lambda terms: jnp.sum(jnp.where(at_pivot, terms, 0), axis)  # noqa: E731
    others = lambda terms: jnp.sum(jnp.where(at_pivot, 0, terms), axis)  # noqa: E731
    idle = lambda cotangent: cotangent is not None and jnp.expand_dims(cotangent == 0, axis)  # noqa: E731
    sums = ClassSums(m, others(exp_z), at(z))
    if asked.moment:
        sums = sums._replace(moment=others(_gap(z)))
    if c is not None:
        sums = sums._replace(prior=jnp.sum(weighed(c, z, idle(cotangents.prior)), axis))
    if t is not None:
        label_sum = others(weighed(t, z, idle(cotangents.label_sum)))
        sums = sums._replace(own_mass=at(t), rest_mass=others(t), label_sum=label_sum)
    return sums


def _emptied(unused, logits, labels, m, axis):
    """A row whose sums are not used, since its token has weight 0, holds 0 before a derivative is made: whatever it
    holds, NaN or inf, its gradient is exactly 0."""
    if unused is None:
        return logits, labels, m
    rows = jnp.expand_dims(unused, axis)
    empty = lambda a: jnp.where(rows, 0, a) if jnp.issubdtype(a.dtype, jnp.floating) else a  # noqa: E731
    return empty(logits), jax.tree.map(empty, labels), jnp.where(unused, 0, m)


def _of_classes(logits, labels, class_weights, adjustment, m, pivot, axis, asked, class_axes, **more) -> ClassSums:
    """Of all classes here."""
    where, at_pivot = adjustment.where, is_at(pivot, logits, axis)
    t = None if labels is None else labels.target(logits, class_weights, where, axis, class_axes, m.dtype)
    c = uniform(class_weights, where, jnp.ones_like(logits, m.dtype)) if asked.prior else None
    sums = _written(logits, adjustment, t, c, m, at_pivot, axis, asked, **more)
    if labels is None or t is not None:
        return sums
    of_labels = labels.masses(logits, class_weights, adjustment, m, pivot, None, axis, class_axes)
    return sums._replace(**dict(zip(LABELS, of_labels, strict=True)))


# The rule: around a given m and pivot, the tangent and the gradient of the sums as they are written. The gradient is
# pulled back through `adjust`, where it is cast once. Kept: the operands as they came, m and the pivot, one number each
# per token. Made again: z and its exponential.


class Given(NamedTuple):
    """What a derivative is made of."""

    operands: tuple[Any, ...]  # (logits, labels, class_weights, adjustment, unused)
    m: Array
    pivot: Array


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def _class_sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    """ClassSums, and the pivot. One that no class is makes its row NaN, if it is used."""
    operands = logits, labels.read(logits, adjustment, axis, class_axes), class_weights, adjustment, unused
    return _fold.class_sums(*operands, axis=axis, asked=asked, class_axes=class_axes)


def _class_sums_jvp(axis, asked, class_axes, primals, tangents):
    check_gradient(class_axes)
    sums, pivot = _class_sums(*primals, axis, asked, class_axes)
    inputs, dinputs = moving(primals, tangents)
    given = Given(primals, *lax.stop_gradient((sums.shift, pivot)))
    along, back = (partial(f, axis, asked, class_axes) for f in (_tangent, _gradients))
    back = partial(back, tuple(inputs))
    dsums = linear_map(along, back, given, inputs, sums._replace(**dict.fromkeys(CONSTANT)), dinputs)
    constant = {name: jax.tree.map(jnp.zeros_like, getattr(sums, name)) for name in CONSTANT}
    return (sums, pivot), (dsums._replace(**constant), zero_from_primal(pivot, symbolic_zeros=True))


_class_sums.defjvp(_class_sums_jvp, symbolic_zeros=True)


def _tangent(axis, asked, class_axes, given: Given, dinputs: Leaves) -> ClassSums:
    """Of the sums that have a derivative."""

    def sums(logits, labels, class_weights, adjustment, unused):
        logits, labels, m = _emptied(unused, *apart(logits, labels, given.m), axis)
        here = given.pivot - offset(logits.shape[axis], class_axes)
        found = _of_classes(logits, labels, class_weights, adjustment, m, here, axis, asked, class_axes)
        return psum(found._replace(**dict.fromkeys(CONSTANT)), class_axes)

    return tangent_of(sums, given.operands, dinputs)


# The few classes of SparseLabels come after: what their gradient is as a whole is computed for them alone, and written
# over what all classes have.


def _gradients(axis, asked, class_axes, places, given: Given, cotangents: ClassSums) -> Leaves:
    (logits, labels, class_weights, adjustment, unused), m, pivot = given
    cotangents = vary(cotangents, varying(logits))
    first = offset(logits.shape[axis], class_axes)
    logits, labels, m, drest = apart(logits, labels, m, cotangents.rest)
    logits, labels, m = _emptied(unused, logits, labels, m, axis)
    cotangents = cotangents._replace(rest=drest)
    operands = logits, labels, class_weights, adjustment, m, pivot - first, axis, asked, cotangents
    if isinstance(labels, Sparse):
        dlogits, _, *shared = _pull_classes(logits, None, *operands[2:])
        at_few, dprobs, *of_labels = _pull_few(*operands, first)
        dlabels, others = replace(labels, probs=dprobs), jax.tree.map(jnp.add, shared, of_labels)
        dlogits = with_at_ids(dlogits, *at_few, axis)
    else:
        dlogits, dlabels, *others = _pull_classes(*operands)
        dlogits = _fold.made_once(dlogits)
    dclass_weights, dscales = others
    return at(places, given.operands, (dlogits, dlabels, dclass_weights, Adjustment(adjustment.where, *dscales), None))


def _pull_classes(logits, labels, class_weights, adjustment, m, pivot, axis, asked, cotangents):
    """The gradients of (logits, labels, class_weights, (scale, softcap))."""

    def sums(logits, labels, class_weights, scales):
        of = logits, labels, class_weights, Adjustment(adjustment.where, *scales), m, pivot, axis, asked
        return _of_classes(*of, class_axes=(), cotangents=cotangents)

    return _pulled(sums, cotangents, logits, labels, class_weights, [*adjustment[1:]])


def _pull_few(logits, labels, class_weights, adjustment, m, pivot, axis, asked, cotangents, first):
    """Of SparseLabels: (ids, the whole gradient of their logits), and what the labels' part adds to the gradients of
    (probs, class_weights, (scale, softcap))."""
    here = few(logits, labels, class_weights, adjustment.where, first, axis)
    at_pivot = here.ids == jnp.expand_dims(pivot, axis)

    def sums(x, probs, class_weights, scales):
        c = few_weights(class_weights, here.ids, axis)
        t = target_of(probs, c, here.where, m.dtype)
        c = uniform(c, here.where, t) if asked.prior else None
        return _written(x, Adjustment(here.where, *scales), t, c, m, at_pivot, axis, asked, cotangents)

    operands = here.logits, labels.probs, class_weights, [*adjustment[1:]]
    of_labels = NO_COTANGENTS._replace(**{name: getattr(cotangents, name) for name in LABELS})
    return (here.ids, _pulled(sums, cotangents, *operands)[0]), *_pulled(sums, of_labels, *operands)[1:]


def _pulled(sums, cotangents, *operands):
    """The gradients of the operands by the sums that have a cotangent."""

    given = {name: cotangent for name, cotangent in cotangents._asdict().items() if cotangent is not None}
    of_given = lambda sums: {name: getattr(sums, name) for name in given if getattr(sums, name) is not None}  # noqa: E731
    found, pull = jax.vjp(lambda *operands: of_given(sums(*operands)), *operands)
    return pull({name: given[name] for name in found})


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
) -> ClassSums:
    """The sums of every token over the classes on `axis` and on the mesh axes `class_axes`.

    `labels` are in their one form; `class_weights` and `adjustment.where` broadcast to the logits; the sums of
    `unused` rows (None: there are none) must have cotangent 0.
    """
    over = varying(logits, labels, class_weights, adjustment, unused)
    logits, class_weights, adjustment = vary((logits, class_weights, adjustment), over)
    unused = vary(unused, tuple(name for name in over if name not in class_axes))
    operands = logits, labels.vary(over, class_axes), class_weights, adjustment, unused
    return _class_sums(*operands, axis, asked, class_axes)[0]


# The same around the largest z alone, of which m and the top are constants.


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def top_sums(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Top:
    return _fold.top_sums(logits, adjustment, axis=axis, class_axes=class_axes)


def _top_sums_jvp(axis, class_axes, primals, tangents):
    sums = top_sums(*primals, axis, class_axes)
    m, top, _ = lax.stop_gradient(sums)
    of = partial(rest_of_top, scale=None, m=m, top=top, axis=axis, class_axes=class_axes)
    of = jax.checkpoint(of, prevent_cse=False)
    drest = tangent_of(of, primals, moving(primals, tangents)[1])
    return sums, Top(jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), drest)


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)
