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

The waist is also where devices meet: of classes that are sharded over mesh axes, each device sums its own, with a pivot
that may be none of them, and one psum adds the sums up.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softmax_jax import _fold
from softmax_jax._adjustment import Adjustment, beyond_exp, shifted, weighed
from softmax_jax._barrier import apart
from softmax_jax._classes import Classes
from softmax_jax._dtypes import is_floating
from softmax_jax._fold import rest_of_top
from softmax_jax._linear_map import Leaves, Places, gradients_of, linear_map, moving, tangent_of
from softmax_jax._masses import target_of, uniform
from softmax_jax._sharding import PyTree, check_gradient, psum, vary, varying
from softmax_jax._sparse_labels import Sparse, few, weights_of_few
from softmax_jax._sums import Asked, ClassSums, Tokens, Top

LABELS = ("own_mass", "rest_mass", "label_sum")
CONSTANT = ("shift", "above", "ties", "first")
LOGITS = 0  # their place among the leaves of `Tokens`
NO_COTANGENTS = ClassSums(None, None, None)  # pyright: ignore[reportArgumentType]


@jax.custom_jvp
def _gap(z: Array) -> Array:
    """-z exp(z), 0 at -inf."""
    return jnp.exp(z) * -beyond_exp(z)


@_gap.defjvp
def _gap_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _gap(z), (jnp.exp(z) * -(1 + beyond_exp(z))) * dz


def _written(
    x: Array,
    adjustment: Adjustment,
    t: Array | None,
    c: Array | None,
    m: Array,
    at_pivot: Array,
    classes: Classes,
    asked: Asked,
    cotangents: ClassSums,
) -> ClassSums:
    """The sums of some classes around a given m and pivot, by their targets t and shares c of what is spread evenly.

    Where the cotangent of a sum of products is known to be 0, a logit in it may be infinite."""
    z = shifted(x, adjustment, m, classes.axis)
    exp_z = jnp.exp(z)
    at, others = (partial(f, at_pivot, classes.axis) for f in (_sum_at, _sum_of_others))
    sums = ClassSums(m, others(exp_z), at(z))
    if asked.moment:
        sums = sums._replace(moment=others(_gap(z)))
    if c is not None:
        sums = sums._replace(prior=jnp.sum(weighed(c, z, _idle(cotangents.prior, classes)), classes.axis))
    if t is not None:
        label_sum = others(weighed(t, z, _idle(cotangents.label_sum, classes)))
        sums = sums._replace(own_mass=at(t), rest_mass=others(t), label_sum=label_sum)
    return sums


def _sum_at(at_pivot: Array, axis: int, terms: Array) -> Array:
    return jnp.sum(jnp.where(at_pivot, terms, 0), axis)


def _sum_of_others(at_pivot: Array, axis: int, terms: Array) -> Array:
    return jnp.sum(jnp.where(at_pivot, 0, terms), axis)


def _idle(cotangent: Array | None, classes: Classes) -> Any:
    return cotangent is not None and classes.along(cotangent == 0)


# The rule: around a given m and pivot, the tangent and the gradient of the sums as they are written. The gradient is
# pulled back through `adjust`, where it is cast once. Kept: the operands as they came, m and the pivot, one number each
# per token. Made again: z and its exponential.


class Given(NamedTuple):
    """What a derivative is made of."""

    tokens: Tokens
    m: Array
    pivot: Array


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    """ClassSums, and the pivot. One that no class is makes its row NaN, if it is used."""
    labels = tokens.labels.read(tokens.logits, tokens.adjustment, classes)
    return _fold.class_sums(tokens._replace(labels=labels), classes, asked)


def _class_sums_jvp(classes: Classes, asked: Asked, primals: tuple[Tokens], tangents: PyTree):
    check_gradient(classes.over)
    sums, pivot = _class_sums(*primals, classes, asked)
    (tokens,), (inputs, dinputs) = primals, moving(*primals, *tangents)
    given = Given(tokens, *lax.stop_gradient((sums.shift, pivot)))
    along, back = partial(_tangent, classes, asked), partial(_gradients, classes, asked, tuple(inputs))
    dsums = linear_map(along, back, given, inputs, sums._replace(**dict.fromkeys(CONSTANT)), dinputs)
    constant = {name: jax.tree.map(jnp.zeros_like, getattr(sums, name)) for name in CONSTANT}
    return (sums, pivot), (dsums._replace(**constant), zero_from_primal(pivot, symbolic_zeros=True))


_class_sums.defjvp(_class_sums_jvp, symbolic_zeros=True)


def _emptied(tokens: Tokens, m: Array, classes: Classes) -> tuple[Tokens, Array]:
    """A row whose sums are not used, since its token has weight 0, holds 0 before a derivative is made: whatever it
    holds, NaN or inf, its gradient is exactly 0."""
    unused = tokens.unused
    if unused is None:
        return tokens, m
    rows = classes.along(unused)

    def empty(a):
        return jnp.where(rows, 0, a) if is_floating(a) else a

    logits, labels = jax.tree.map(empty, (tokens.logits, tokens.labels))
    return tokens._replace(logits=logits, labels=labels, unused=None), jnp.where(unused, 0, m)


def _of_classes(
    tokens: Tokens, m: Array, pivot: Array, classes: Classes, asked: Asked, cotangents: ClassSums = NO_COTANGENTS
) -> ClassSums:
    """Of all classes here, but for the labels' where they need no pass over them."""
    logits, labels, class_weights, adjustment, _ = tokens
    c = uniform(class_weights, adjustment.where, jnp.ones_like(logits, m.dtype)) if asked.prior else None
    t = labels.target(tokens, classes, m.dtype)
    return _written(logits, adjustment, t, c, m, classes.is_at(pivot, logits), classes, asked, cotangents)


def _with_labels(sums: ClassSums, tokens: Tokens, m: Array, pivot: Array, classes: Classes) -> ClassSums:
    if sums.own_mass is not None:
        return sums
    return sums._replace(**dict(zip(LABELS, tokens.labels.masses(tokens, m, pivot, classes), strict=True)))


def _as_read(
    tokens: Tokens, given: Given, classes: Classes, drest: Array | None = None
) -> tuple[Tokens, Array, Array, Array | None]:
    """(tokens, m, the pivot among the classes here, drest), as a derivative reads them."""
    logits, labels, m, drest = apart(tokens.logits, tokens.labels, given.m, drest)
    tokens, m = _emptied(tokens._replace(logits=logits, labels=labels), m, classes)
    return tokens, m, given.pivot - classes.first(logits), drest


def _tangent(classes: Classes, asked: Asked, given: Given, dinputs: Leaves) -> ClassSums:
    """Of the sums that have a derivative."""

    def sums(tokens):
        tokens, m, here, _ = _as_read(tokens, given, classes)
        found = _with_labels(_of_classes(tokens, m, here, classes, asked), tokens, m, here, classes)
        return psum(found._replace(**dict.fromkeys(CONSTANT)), classes.over)

    return tangent_of(sums, given.tokens, dinputs)


def _gradients(classes: Classes, asked: Asked, places: Places, given: Given, cotangents: ClassSums) -> Leaves:
    cotangents = vary(cotangents, varying(given.tokens.logits))
    tokens, m, here, drest = _as_read(given.tokens, given, classes, cotangents.rest)
    cotangents, sparse = cotangents._replace(rest=drest), isinstance(tokens.labels, Sparse)

    def sums(tokens):
        found = _of_classes(tokens, m, here, classes, asked, cotangents)
        return found if sparse else _with_labels(found, tokens, m, here, classes)

    found = _pulled(sums, tokens, places, cotangents)
    if sparse:
        return _with_few(found, tokens, m, here, classes, asked, cotangents)
    return {i: _fold.made_once(gradient) if i == LOGITS else gradient for i, gradient in found.items()}


def _with_few(
    gradients: Leaves,
    tokens: Tokens,
    m: Array,
    pivot: Array,
    classes: Classes,
    asked: Asked,
    cotangents: ClassSums,
) -> Leaves:
    """With what SparseLabels add: the gradient of their few logits as a whole is computed for them alone, and written
    over what all classes have."""
    at = few(tokens, classes)

    def sums(x, tokens):
        c = weights_of_few(at.ids, tokens.class_weights, classes)
        t = target_of(tokens.labels.probs, c, at.where, m.dtype)
        c, is_pivot = uniform(c, at.where, t) if asked.prior else None, at.ids == classes.along(pivot)
        adjustment = tokens.adjustment._replace(where=at.where)
        return _written(x, adjustment, t, c, m, is_pivot, classes, asked, cotangents)

    others = [i for i in gradients if i != LOGITS]
    of_labels = NO_COTANGENTS._replace(**{name: getattr(cotangents, name) for name in LABELS})
    added = _pulled(partial(sums, at.logits), tokens, others, of_labels)
    found = {**gradients, **{i: gradients[i] + added[i] for i in others}}
    if LOGITS in gradients:
        of_few = _pulled(lambda x: sums(x, tokens), at.logits, [0], cotangents)[0]
        found[LOGITS] = classes.put(at.ids, of_few, gradients[LOGITS])
    return found


def _pulled(sums: Callable, operands: PyTree, places: Sequence[int], cotangents: ClassSums) -> Leaves:
    """The gradients of the leaves at those places, by the sums that have a cotangent."""
    given = {name: cotangent for name, cotangent in cotangents._asdict().items() if cotangent is not None}

    def of_given(operands):
        found = sums(operands)._asdict()
        return {name: found[name] for name in given if found[name] is not None}

    return gradients_of(of_given, operands, places, given)


def class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> ClassSums:
    """The sums of every token over its classes, on all devices. Those of unused rows must have cotangent 0."""
    logits, labels, class_weights, adjustment, unused = tokens
    over = varying(tokens)
    logits, class_weights, adjustment = vary((logits, class_weights, adjustment), over)
    unused = vary(unused, tuple(name for name in over if name not in classes.over))
    tokens = Tokens(logits, labels.vary(over, classes), class_weights, adjustment, unused)
    return _class_sums(tokens, classes, asked)[0]


# The same around the largest z alone, of which m and the top are constants.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> Top:
    return _fold.top_sums(logits, adjustment, classes)


def _top_sums_jvp(classes: Classes, primals: tuple[Array, Adjustment], tangents: PyTree):
    sums = top_sums(*primals, classes)
    m, top, _ = lax.stop_gradient(sums)

    def written(operands):
        return rest_of_top(operands[0], operands[1], None, m, top, classes)

    drest = tangent_of(jax.checkpoint(written, prevent_cse=False), primals, moving(primals, tangents)[1])
    return sums, Top(jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), drest)


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)
