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

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

from softmax_jax import _fold
from softmax_jax._adjustment import Adjustment, beyond_exp, shifted, weighed
from softmax_jax._barrier import apart
from softmax_jax._fold import rest_of_top
from softmax_jax._indexing import is_at, with_at_ids
from softmax_jax._labels import Labels
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


def _of_all(logits, labels, class_weights, adjustment, m, pivot, axis, asked, class_axes) -> ClassSums:
    """Of all classes of all devices."""
    here = pivot - offset(logits.shape[axis], class_axes)
    sums = _of_classes(logits, labels, class_weights, adjustment, m, here, axis, asked, class_axes)
    return psum(sums._replace(shift=None), class_axes)._replace(shift=m)


@partial(jax.custom_jvp, nondiff_argnums=(5, 6, 7))
def _sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    """ClassSums, and the pivot. One that no class is makes its row NaN, if it is used."""
    operands = logits, labels.read(logits, adjustment, axis, class_axes), class_weights, adjustment, unused
    return _fold.class_sums(*operands, axis=axis, asked=asked, class_axes=class_axes)


def _sums_jvp(axis, asked, class_axes, primals, tangents):
    """Nothing is kept for it but the operands, m and the pivot."""
    check_gradient(class_axes)
    sums, pivot = _sums(*primals, axis, asked, class_axes)
    m, at = lax.stop_gradient((sums.shift, pivot))

    @partial(jax.checkpoint, prevent_cse=False)
    def of_all(logits, labels, class_weights, adjustment, unused):
        logits, labels, around = apart(logits, labels, m)
        logits, labels, around = _emptied(unused, logits, labels, around, axis)
        operands = logits, labels, class_weights, adjustment, around, at
        return _of_all(*operands, axis, asked, class_axes)._replace(shift=m)

    place = {name: jax.tree.map(jnp.zeros_like, getattr(sums, name)) for name in CONSTANT[1:]}
    dsums = tangent_of(of_all, primals, tangents)._replace(**place)
    return (sums, pivot), (dsums, zero_from_primal(pivot, symbolic_zeros=True))


_sums.defjvp(_sums_jvp, symbolic_zeros=True)


def tangent_of(f, primals, tangents):
    """The tangent of f(*primals), by what has a tangent alone."""
    leaves, tree = jax.tree.flatten(primals)
    tangents = tree.flatten_up_to(tangents)
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

    def of_moving(some):
        return f(*tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))

    some, theirs = ({i: of[i] for i in moving} for of in (leaves, tangents))
    return jax.jvp(of_moving, (some,), (theirs,))[1]


# The rule: the gradient of the sums as they are written, pulled back through `adjust`, where it is cast once. Kept: the
# operands as they came, m and the pivot, one number each per token. Made again: z and its exponential.
#
# The few classes of SparseLabels come after: what their gradient is as a whole is computed for them alone, and written
# over what all classes have.


def _class_sums_fwd(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes):
    check_gradient(class_axes)
    sums, pivot = _sums(logits, labels, class_weights, adjustment, unused, axis, asked, class_axes)
    return sums, (logits, labels, class_weights, adjustment, unused, sums.shift, pivot)


def _class_sums_bwd(axis, asked, class_axes, residuals, cotangents):
    logits, labels, class_weights, adjustment, unused, m, pivot = residuals
    cotangents = vary(cotangents, varying(logits))
    first = offset(logits.shape[axis], class_axes)
    logits, labels, m, drest = apart(logits, labels, m, cotangents.rest)
    logits, labels, m = _emptied(unused, logits, labels, m, axis)
    cotangents = cotangents._replace(rest=drest)
    operands = logits, labels, class_weights, adjustment, m, pivot - first, axis, asked, cotangents
    if not isinstance(labels, Sparse):
        dlogits, dlabels, dclass_weights, dscales = _pull_classes(*operands)
        return _fold.made_once(dlogits), dlabels, dclass_weights, Adjustment(None, *dscales), None
    dlogits, _, *shared = _pull_classes(logits, None, *operands[2:])
    at_few, dprobs, *of_labels = _pull_few(*operands, first)
    dclass_weights, dscales = jax.tree.map(jnp.add, shared, of_labels)
    dlogits = with_at_ids(dlogits, *at_few, axis)
    return dlogits, Sparse(None, dprobs), dclass_weights, Adjustment(None, *dscales), None


def _pull_classes(logits, labels, class_weights, adjustment, m, pivot, axis, asked, cotangents):
    """The gradients of (logits, labels, class_weights, (scale, softcap))."""

    def sums(logits, labels, class_weights, scales):
        of = logits, labels, class_weights, Adjustment(adjustment.where, *scales), m, pivot, axis, asked
        return _of_classes(*of, class_axes=(), cotangents=cotangents)

    return _pulled(sums, cotangents, logits, labels, class_weights, [*adjustment[1:]])


def _pull_few(logits, labels, class_weights, adjustment, m, pivot, axis, asked, cotangents, first):
    """Of SparseLabels: (ids, the whole gradient of their logits), and what the labels' part adds to the gradients of
    (probs, class_weights, (scale, softcap))."""
    at = few(logits, labels, class_weights, adjustment.where, first, axis)
    at_pivot = at.ids == jnp.expand_dims(pivot, axis)

    def sums(x, probs, class_weights, scales):
        c = few_weights(class_weights, at.ids, axis)
        t = target_of(probs, c, at.where, m.dtype)
        c = uniform(c, at.where, t) if asked.prior else None
        return _written(x, Adjustment(at.where, *scales), t, c, m, at_pivot, axis, asked, cotangents)

    operands = at.logits, labels.probs, class_weights, [*adjustment[1:]]
    of_labels = jax.tree.map(jnp.zeros_like, cotangents)
    of_labels = of_labels._replace(**{name: getattr(cotangents, name) for name in LABELS})
    return (at.ids, _pulled(sums, cotangents, *operands)[0]), *_pulled(sums, of_labels, *operands)[1:]


def _pulled(sums, cotangents, *operands):
    """The gradients of the operands by the cotangents of those sums that there are."""
    moving = lambda sums: sums._replace(**dict.fromkeys(CONSTANT))  # noqa: E731
    found, pull = jax.vjp(lambda *operands: moving(sums(*operands)), *operands)
    those: Any = (None if sum_ is None else c for sum_, c in zip(found, cotangents, strict=True))
    return pull(ClassSums(*those))


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
    `unused` rows (None: there are none) must have cotangent 0. With `forward_mode` the same derivatives are those of a
    `custom_jvp`.
    """
    over = varying(logits, labels, class_weights, adjustment, unused)
    logits, class_weights, adjustment = vary((logits, class_weights, adjustment), over)
    unused = vary(unused, tuple(name for name in over if name not in class_axes))
    operands = logits, labels.vary(over, class_axes), class_weights, adjustment, unused
    if forward_mode:
        return _sums(*operands, axis, asked, class_axes)[0]
    return _class_sums(*operands, axis, asked, class_axes)


# The same around the largest z alone, of which m and the top are constants.


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def top_sums(logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Top:
    return _fold.top_sums(logits, adjustment, axis=axis, class_axes=class_axes)


def _top_sums_jvp(axis, class_axes, primals, tangents):
    sums = top_sums(*primals, axis, class_axes)
    m, top, _ = lax.stop_gradient(sums)
    of = partial(rest_of_top, scale=None, m=m, top=top, axis=axis, class_axes=class_axes)
    of = jax.checkpoint(of, prevent_cse=False)
    return sums, Top(jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), tangent_of(of, primals, tangents))


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)
