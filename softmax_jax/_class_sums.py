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

from softmax_jax._adjustment import Adjustment, adjust, shifted
from softmax_jax._barrier import apart
from softmax_jax._blocks import by_platform, made_once, sums_of_block
from softmax_jax._classes import Classes
from softmax_jax._combine import Folded, over_devices
from softmax_jax._dtypes import accumulator, is_floating, upcast
from softmax_jax._fold import sums_in_one_pass
from softmax_jax._labels import Dense, Placed, of_existing
from softmax_jax._sharding import PyTree, check_gradient, pmax, psum, vary, varying
from softmax_jax._sparse_labels import Sparse, with_few
from softmax_jax._sums import LABELS, Asked, ClassSums, Read, Tokens, Top, batched_alike, in_rule, lost
from softmax_jax._waist import NO_COTANGENTS, Around, of_classes, pulled, tangent_of


@partial(jax.jit, static_argnums=(1, 2), inline=True)  # a rule and its function make the same: one trace serves both
def sums_here(read: Read, classes: Classes, asked: Asked) -> Folded:
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
    found = sums_here(Read(logits, adjustment, here, values, class_weights, than), classes, asked)
    if label is not None:
        own = classes.if_here(partial(_adjusted, found.own, adjustment, classes), label - first, logits)
        found = found._replace(own=of_existing(own, label, tokens, classes))
    found = over_devices(found, classes.over)
    m, rest, _ = settled(found)
    pivot = found.top if label is None else label
    if label is None:  # 0, NaN in a row that has no top, if it is used
        highest = found.m if tokens.unused is None else jnp.where(tokens.unused, 0, found.m)
        found = found._replace(own=m + (highest - highest))
    of_labels: Any = found.mass, found.rest_mass, found.label_sum
    if not isinstance(labels, Dense):
        of_labels = psum(labels.masses(tokens._replace(labels=labels), m, pivot - first, classes), classes.over)
    sums = ClassSums(m, rest, found.own - m, *of_labels, prior=found.prior, moment=found.moment)
    if found.moment is not None:
        sums = sums._replace(moment_and_rest=found.moment + rest)
    if isinstance(labels, Placed):
        ties = pmax((found.top != labels.ids).astype(dtype), classes.over)
        sums = sums._replace(above=found.above, ties=ties, first=found.top.astype(dtype))
    return sums, pivot


def _adjusted(own: Array, adjustment: Adjustment, classes: Classes, ids: Array) -> Array:
    """z of a token's label, of its logit as it came."""
    where = None if adjustment.where is None else classes.pick(ids, adjustment.where)
    return upcast(adjust(own, adjustment._replace(where=where)))


def settled(found: Folded) -> tuple[Array, Array, Array]:
    """(m, 0 in a row of -inf alone; rest, NaN in one that holds NaN or +inf, as m - m is; whether any logit exists)."""
    exists = found.m != -jnp.inf
    m = jnp.where(exists, found.m, 0)
    return m, found.rest + (m - m), exists


# The rule: around a given m and pivot, both derivatives are those of the sums as they are written. In the mean loss of
# N tokens nll = log(rest + exp(own)) - own has the cotangents drest = 1/(N total) and down = -rest/(N total); written
# are rest = Σ_{v≠y} exp(z_v - m) and own = z_y - m, so that
#
#     dz_v = drest · exp(z_v - m) = p_v / N        dz_y = down = -(1 - p_y) / N        dz = (p - t) / N
#
# elementwise, pulled back through `adjust`, where it is cast once. Kept: the operands as they came, m and the pivot,
# one number each per token. Made again: z and its exponential.

CONSTANT = ("shift", "moment", "above", "ties", "first")


class Given(NamedTuple):
    """What a derivative is made of."""

    tokens: Tokens
    m: Array
    pivot: Array


def _given(tokens: Tokens, sums: ClassSums, pivot: Array) -> Given:
    """Of its tokens those are unused that are lost."""
    return Given(tokens._replace(unused=lost(tokens.unused, sums)), *lax.stop_gradient((sums.shift, pivot)))


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _sums_in_both_modes(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    return batched_alike(_found(tokens, classes, asked))


def _jvp(classes: Classes, asked: Asked, primals: tuple[Tokens], tangents: tuple[PyTree]) -> PyTree:
    check_gradient(classes.over)
    sums, pivot = _sums_in_both_modes(*primals, classes, asked)
    given = _given(primals[0], sums, pivot)

    @partial(jax.checkpoint, prevent_cse=False)
    def of_all(tokens):
        tokens, around = _as_read(tokens, given, classes, asked)
        found = _with_labels(of_classes(tokens, around), tokens, around)
        return psum(found._replace(**dict.fromkeys(CONSTANT)), classes.over)

    dsums = tangent_of(of_all, *primals, *tangents)
    constant = {name: jax.tree.map(jnp.zeros_like, getattr(sums, name)) for name in CONSTANT}
    return (sums, pivot), (dsums._replace(**constant), zero_from_primal(pivot, symbolic_zeros=True))


_sums_in_both_modes.defjvp(_jvp, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    return _sums_in_both_modes(tokens, classes, asked)


def _class_sums_fwd(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[tuple[ClassSums, Array], Given]:
    sums, pivot = in_rule(partial(_sums_in_both_modes, classes=classes, asked=asked))(tokens)
    return (sums, pivot), _given(tokens, sums, pivot)


def _class_sums_bwd(classes: Classes, asked: Asked, given: Given, cotangents: tuple[ClassSums, Any]) -> tuple[Tokens]:
    check_gradient(classes.over)
    dsums = vary(cotangents[0]._replace(**dict.fromkeys(CONSTANT)), varying(given.tokens.logits))
    tokens, around = _as_read(given.tokens, given, classes, asked, dsums)
    if isinstance(tokens.labels, Sparse):
        dtokens = with_few(pulled(lambda tokens: of_classes(tokens, around), tokens, around.cotangents), tokens, around)
    else:
        dtokens = pulled(
            lambda tokens: _with_labels(of_classes(tokens, around), tokens, around), tokens, around.cotangents
        )
    return (dtokens._replace(logits=made_once(dtokens.logits)),)


_class_sums.defvjp(_class_sums_fwd, _class_sums_bwd)


def _emptied(tokens: Tokens, m: Array, classes: Classes) -> tuple[Tokens, Array]:
    """A row whose sums are not finite, and not used since its token has weight 0, holds 0 before a derivative is made:
    whatever it holds, its gradient is exactly 0."""
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
    tokens: Tokens, given: Given, classes: Classes, asked: Asked, cotangents: ClassSums = NO_COTANGENTS
) -> tuple[Tokens, Around]:
    """The operands as a derivative reads them, behind a fence: of the forward pass nothing of their size is kept."""
    logits, labels, m, drest = apart(tokens.logits, tokens.labels, given.m, cotangents.rest)
    tokens = tokens._replace(logits=logits, labels=labels, unused=given.tokens.unused)
    tokens, m = _emptied(tokens, m, classes)
    here = given.pivot - classes.first(logits)
    return tokens, Around(m, here, classes, asked, cotangents._replace(rest=drest))


def class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> ClassSums:
    """The sums of every token over its classes, on all devices. Those of unused rows must have cotangent 0."""
    logits, labels, class_weights, adjustment, unused = tokens
    over = varying(tokens)
    logits, class_weights, adjustment = vary((logits, class_weights, adjustment), over)
    unused = vary(unused, tuple(name for name in over if name not in classes.over))
    tokens = Tokens(logits, labels.vary(over, classes), class_weights, adjustment, unused)
    return (_sums_in_both_modes if asked.forward_mode else _class_sums)(tokens, classes, asked)[0]


# The same around the largest z alone, whose slope is that of m.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> Top:
    found = over_devices(sums_here(Read(logits, adjustment), classes, Asked()), classes.over)
    m, rest, exists = settled(found)
    return Top(m, jnp.where(exists, found.top, classes.of_all(logits)), rest)


def _top_sums_jvp(classes: Classes, primals: tuple[Array, Adjustment], tangents: PyTree) -> PyTree:
    m, top, rest = top_sums(*primals, classes)
    constant, at_top = lax.stop_gradient(m), classes.is_at(top - classes.first(primals[0]), primals[0])

    @partial(jax.checkpoint, prevent_cse=False)
    def written(operands):
        z = shifted(operands[0], operands[1], constant, classes.axis)
        own = psum(jnp.sum(jnp.where(at_top, z, 0), classes.axis), classes.over)
        others = jnp.where(at_top, 0, jnp.exp(z - classes.along(own)))
        return own, psum(jnp.sum(others, classes.axis), classes.over)

    dm, drest = tangent_of(written, primals, tangents)
    return Top(m, top, rest), Top(dm, zero_from_primal(top, symbolic_zeros=True), drest)


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)
