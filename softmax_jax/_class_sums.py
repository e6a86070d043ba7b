"""The sums of a token over its classes, each derivative of which is one of the sums as `_waist` writes them.

A device's own are made in blocks of tokens (CPU) or in one pass (all other platforms); what follows is one for all:
the sums of all devices, the labels', and NaN.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softmax_jax._adjustment import Adjustment, adjust, rounded, scaled
from softmax_jax._barrier import apart
from softmax_jax._blocks import by_platform, made_once, sum_over_classes, sums_of_block
from softmax_jax._classes import Classes
from softmax_jax._combine import Folded, over_devices
from softmax_jax._dtypes import accumulator, is_floating, upcast
from softmax_jax._fold import sums_in_one_pass
from softmax_jax._labels import Dense, Placed, of_existing
from softmax_jax._linear_map import Leaves, Places, linear_map, moving, tangent_of
from softmax_jax._sharding import PyTree, check_gradient, pmax, psum, vary, varying
from softmax_jax._sparse_labels import Sparse, with_few
from softmax_jax._sums import LABELS, Asked, ClassSums, Read, Tokens, Top
from softmax_jax._waist import Around, of_classes, pulled


def _sums_here(read: Read, classes: Classes, asked: Asked) -> Folded:
    """The sums of every token over this device's classes. A row of -inf alone has m = -inf."""
    axis, rank, first = classes.axis, read.logits.ndim, classes.first(read.logits)
    label, than = jax.tree.map(classes.along, (read.label, read.than))
    in_blocks = partial(sums_of_block, axis=axis - rank, asked=asked)
    in_one_pass = partial(sums_in_one_pass, axis=axis, asked=asked)
    found = by_platform(in_blocks, in_one_pass, axis - rank, read._replace(label=label, than=than))
    found = jax.tree.map(lambda a: jnp.squeeze(a, axis), found)
    return found if found.top is None else found._replace(top=found.top + first)


def _found(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    """(the sums of every token over all classes, its pivot). One that no class is makes its row NaN, if it is used."""
    logits, labels, class_weights, adjustment, _ = tokens
    labels = labels.read(logits, adjustment, classes)
    dtype, label, first = accumulator(logits.dtype), labels.pivot, classes.first(logits)
    # (Of `Placed` the masses are the same without an array of the logits' size.)
    values = labels.values if isinstance(labels, Dense) else None
    than = (labels.ids - first, labels.z) if isinstance(labels, Placed) else None
    here = None if label is None else label - first
    found = _sums_here(Read(logits, adjustment, here, values, class_weights, than), classes, asked)
    if label is not None:
        own = classes.if_here(partial(_adjusted, found.own, adjustment, classes), label - first, logits)
        found = found._replace(own=of_existing(own, label, tokens, classes))
    found = over_devices(found, classes.over)
    m, top, rest = _settled(found, classes.of_all(logits))
    pivot = top if label is None else label
    own = of_existing(m - m, top, tokens, classes) if label is None else found.own - m
    of_labels: Any = found.mass, found.rest_mass, found.label_sum
    if not isinstance(labels, Dense):
        of_labels = psum(labels.masses(tokens._replace(labels=labels), m, pivot - first, classes), classes.over)
    sums = ClassSums(m, rest, own, *of_labels, prior=found.prior, moment=found.moment)
    if isinstance(labels, Placed):
        ties = pmax((found.top != labels.ids).astype(dtype), classes.over)
        sums = sums._replace(above=found.above, ties=ties, first=found.top.astype(dtype))
    return sums, pivot


def _adjusted(own: Array, adjustment: Adjustment, classes: Classes, ids: Array) -> Array:
    """z of a token's label, of its logit as it came."""
    where = None if adjustment.where is None else classes.pick(ids, adjustment.where)
    return upcast(adjust(own, adjustment._replace(where=where)))


def _settled(found: Folded, classes: int) -> Top:
    """Of all classes: m is 0 in a row of -inf alone, and rest NaN in one that holds NaN or +inf, as m - m is."""
    lacking = found.m == -jnp.inf
    m = jnp.where(lacking, 0, found.m)
    top = None if found.top is None else jnp.where(lacking | jnp.isnan(m), classes, found.top)
    return Top(m, top, jnp.where(lacking, 0, found.rest) + (m - m))


CONSTANT = ("shift", "above", "ties", "first")
LOGITS = 0  # their place among the leaves of `Tokens`

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
    return _found(tokens, classes, asked)


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


def _with_labels(sums: ClassSums, tokens: Tokens, around: Around) -> ClassSums:
    if sums.own_mass is not None:
        return sums
    masses = tokens.labels.masses(tokens, around.m, around.pivot, around.classes)
    return sums._replace(**dict(zip(LABELS, masses, strict=True)))


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
        around = Around(m, here, classes, asked)
        found = _with_labels(of_classes(tokens, around), tokens, around)
        return psum(found._replace(**dict.fromkeys(CONSTANT)), classes.over)

    return tangent_of(sums, given.tokens, dinputs)


def _gradients(classes: Classes, asked: Asked, places: Places, given: Given, cotangents: ClassSums) -> Leaves:
    cotangents = vary(cotangents, varying(given.tokens.logits))
    tokens, m, here, drest = _as_read(given.tokens, given, classes, cotangents.rest)
    around, sparse = Around(m, here, classes, asked, cotangents._replace(rest=drest)), isinstance(tokens.labels, Sparse)

    def sums(tokens):
        found = of_classes(tokens, around)
        return found if sparse else _with_labels(found, tokens, around)

    found = pulled(sums, tokens, places, around.cotangents)
    if sparse:
        return with_few(found, tokens, around, LOGITS)
    return {i: made_once(gradient) if i == LOGITS else gradient for i, gradient in found.items()}


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
    found = _sums_here(Read(logits, adjustment), classes, Asked())
    return _settled(over_devices(found, classes.over), classes.of_all(logits))


def _top_sums_jvp(classes: Classes, primals: tuple[Array, Adjustment], tangents: PyTree):
    sums = top_sums(*primals, classes)
    m, top, _ = lax.stop_gradient(sums)

    def written(operands):
        return rest_of_top(operands[0], operands[1], None, m, top, classes)

    drest = tangent_of(jax.checkpoint(written, prevent_cse=False), primals, moving(primals, tangents)[1])
    return sums, Top(jnp.zeros_like(m), zero_from_primal(top, symbolic_zeros=True), drest)


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)


def rest_of_top(
    logits: Array, adjustment: Adjustment, scale: Array | None, m: Array, top: Array, classes: Classes
) -> Array:
    """Σ_{v≠top} exp(scale · (z_v - m)), of all devices' classes."""
    scale, (m, top) = vary(scale, varying(logits)), map(classes.along, (m, top - classes.first(logits)))
    return psum(sum_over_classes(_exp_of_others, classes, logits, adjustment, scale, m, top), classes.over)


def _exp_of_others(
    ids: Array, logits: Array, adjustment: Adjustment, scale: Array | None, m: Array, top: Array
) -> Array:
    return jnp.where(ids == top, 0, jnp.exp(scaled(rounded(upcast(adjust(logits, adjustment)), m) - m, scale)))
