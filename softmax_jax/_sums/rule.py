"""The sums of a token over its classes, each derivative of which is one of the sums as `waist` writes them.

A device's own are made in blocks of tokens (CPU) or in one pass (all other platforms); what follows is one for all:
the sums of all devices, the labels', and NaN.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import zero_from_primal

from softmax_jax._devices import Classes, PyTree, check_gradient, pmax, psum, vary, varying
from softmax_jax._inputs.arrays import is_floating, nonfinite_unused
from softmax_jax._inputs.labels import Dense, Ids, Sparse
from softmax_jax._inputs.options import Adjustment, adjusted_at, adjusted_at_global, even_targets, shifted
from softmax_jax._sums.blocks import block_sums, fence_gradient, in_blocks_or_one_pass
from softmax_jax._sums.combine import combine_devices
from softmax_jax._sums.fold import sums_in_one_pass
from softmax_jax._sums.targets import target_sums, targets_of_classes, valid_or_nan, with_entry_gradients
from softmax_jax._sums.waist import CONSTANT, NO_COTANGENTS, ClassSums, Tokens, pulled, sums_around
from softmax_jax._transforms import barrier, batch_all_or_none, keeping_its_rule, tangent_of


@partial(jax.jit, inline=True)  # the function and its rule both call this: one trace serves both
def device_sums(tokens: Tokens) -> ClassSums:
    """The sums of every token over this device's classes. A row of -inf alone has row_max = -inf."""
    classes, labels, axis = tokens.classes, tokens.labels, tokens.classes.axis
    first = classes.first_id(tokens.logits)
    if isinstance(labels, Ids):
        labels = Ids(*jax.tree.map(classes.expand, (labels.ids - first, labels.z)))
    read = replace(tokens, labels=None if isinstance(labels, Sparse) else labels, unused=None)
    from_the_end = axis - tokens.logits.ndim
    in_one_pass = partial(sums_in_one_pass, axis=axis)
    found = in_blocks_or_one_pass(partial(block_sums, axis=from_the_end), in_one_pass, from_the_end, read)
    found = jax.tree.map(lambda a: jnp.squeeze(a, axis), found)
    return found if found.pivot is None else found._replace(pivot=found.pivot + first)


def _forward_sums(tokens: Tokens) -> ClassSums:
    """The sums of every token over all classes, on all devices."""
    classes, labels, logits = tokens.classes, tokens.labels, tokens.logits
    if tokens.extra.statistics:
        labels = Ids(labels.ids, adjusted_at_global(labels.ids, logits, tokens.adjustment, classes))
        tokens = replace(tokens, labels=labels)
    sums = combine_devices(_with_label_z(device_sums(tokens), tokens), classes.over)
    sums = _around_pivot(sums, tokens)
    if not isinstance(labels, Dense):
        of_labels = target_sums(tokens, sums.row_max, sums.pivot - classes.first_id(logits))
        sums = sums._replace(**psum(of_labels, classes.over))
    if isinstance(labels, Ids) and tokens.extra.statistics:
        ties = pmax((sums.pivot != labels.ids).astype(sums.rest.dtype), classes.over)
        sums = sums._replace(moment_and_rest=sums.moment + sums.rest, ties=ties)
    return sums


def _with_label_z(found: ClassSums, tokens: Tokens) -> ClassSums:
    """With the label's z as `own`, where the label is the pivot. A label that no class is makes its row NaN, if it is
    used."""
    label, classes = tokens.label, tokens.classes
    if label is None:
        return found
    read = partial(adjusted_at, logit=found.label_logit, adjustment=tokens.adjustment, classes=classes)
    own = classes.read_local(read, label - classes.first_id(tokens.logits), tokens.logits)
    return found._replace(own=valid_or_nan(own, label, tokens), label_logit=None)


def _around_pivot(found: ClassSums, tokens: Tokens) -> ClassSums:
    """With m, the pivot, and its z - m as `own`: 0 at the largest, but NaN in a used row that has no finite maximum."""
    m, rest, _ = finish_rows(found)
    own, pivot = found.own, found.pivot if tokens.label is None else tokens.label
    if tokens.label is None:
        highest = found.row_max if tokens.unused is None else jnp.where(tokens.unused, 0, found.row_max)
        own = m + (highest - highest)
    return found._replace(row_max=m, rest=rest, pivot=pivot, own=own - m, even_mass=None)


def finish_rows(found: ClassSums) -> tuple[Array, Array, Array]:
    """(m, 0 in a row of -inf alone; rest, NaN in one that holds NaN or +inf, as m - m is; whether any logit exists)."""
    exists = found.row_max != -jnp.inf
    m = jnp.where(exists, found.row_max, 0)
    return m, found.rest + (m - m), exists


# The rule: around a given m and pivot, both derivatives are those of the sums as they are written. In the mean loss of
# N tokens nll = log(rest + exp(own)) - own has the cotangents drest = 1/(N total) and d_own = -rest/(N total); written
# are rest = Σ_{v≠y} exp(z_v - m) and own = z_y - m, so that
#
#     dz_v = drest · exp(z_v - m) = p_v / N        dz_y = d_own = -(1 - p_y) / N        dz = (p - t) / N
#
# elementwise, pulled back through `adjust`, where it is cast once. (Of targets of another sum, and of a token of weight
# w, it is w (p Σt - t) / N.) The rule keeps the operands as they came, m and the pivot, one number each per token; the
# loss keeps a few more. z and its exponential are made again.

Residuals = tuple[Tokens, Array, Array]  # the operands, m, the pivot


def _residuals(tokens: Tokens, sums: ClassSums) -> Residuals:
    """Of the tokens of weight 0, a derivative hides those alone whose sums are not finite."""
    unused = nonfinite_unused(tokens.unused, sums)
    return replace(tokens, unused=unused), *lax.stop_gradient((sums.row_max, sums.pivot))


@jax.custom_jvp
def _sums_in_both_modes(tokens: Tokens) -> ClassSums:
    return batch_all_or_none(_forward_sums(tokens))


def _sums_jvp(primals: tuple[Tokens], tangents: tuple[PyTree]) -> tuple[ClassSums, ClassSums]:
    check_gradient(primals[0].classes.over)
    sums = _sums_in_both_modes(*primals)
    kept = _residuals(primals[0], sums)

    @partial(jax.checkpoint, prevent_cse=False)
    def of_all(tokens: Tokens) -> ClassSums:
        read, m, pivot, _ = _fence_operands((replace(tokens, unused=kept[0].unused), *kept[1:]), NO_COTANGENTS)
        found = _all_sums_around(read, m, pivot, NO_COTANGENTS)
        return psum(found._replace(**dict.fromkeys(CONSTANT)), tokens.classes.over)

    dsums = tangent_of(of_all, *primals, *tangents)
    constant = {name: getattr(sums, name) for name in CONSTANT}
    return sums, dsums._replace(**jax.tree.map(partial(zero_from_primal, symbolic_zeros=True), constant))


_sums_in_both_modes.defjvp(_sums_jvp, symbolic_zeros=True)


@jax.custom_vjp
def _class_sums(tokens: Tokens) -> ClassSums:
    return _sums_in_both_modes(tokens)


def _class_sums_fwd(tokens: Tokens) -> tuple[ClassSums, Residuals]:
    sums = keeping_its_rule(_sums_in_both_modes)(tokens)
    return sums, _residuals(tokens, sums)


def _class_sums_bwd(kept: Residuals, dsums: ClassSums) -> tuple[Tokens]:
    check_gradient(kept[0].classes.over)
    dsums = vary(dsums._replace(**dict.fromkeys(CONSTANT)), varying(kept[0].logits))
    tokens, m, pivot, dsums = _fence_operands(kept, dsums)
    if isinstance(tokens.labels, Sparse):
        dtokens = pulled(lambda tokens: _sums_without_labels(tokens, m, pivot, dsums), tokens, dsums)
        dtokens = with_entry_gradients(dtokens, tokens, m, pivot, dsums)
    else:
        dtokens = pulled(lambda tokens: _all_sums_around(tokens, m, pivot, dsums), tokens, dsums)
    return (replace(dtokens, logits=fence_gradient(dtokens.logits)),)


_class_sums.defvjp(_class_sums_fwd, _class_sums_bwd)


def _fence_operands(kept: Residuals, cotangents: ClassSums) -> tuple[Tokens, Array, Array, ClassSums]:
    """(the operands, m, the pivot among the classes here, the cotangents) as a derivative reads them. The barrier makes
    XLA compute z again, instead of keeping it from the forward pass. A row whose sums are not finite, and whose token
    has weight 0, holds 0: whatever it held, its gradient is exactly 0."""
    tokens, m, pivot = kept
    logits, labels, m, drest = barrier(tokens.logits, tokens.labels, m, cotangents.rest)
    if tokens.unused is not None:
        rows = tokens.classes.expand(tokens.unused)
        empty = lambda a: jnp.where(rows, 0, a) if is_floating(a) else a  # noqa: E731
        logits, labels = jax.tree.map(empty, (logits, labels))
        m = jnp.where(tokens.unused, 0, m)
    here = pivot - tokens.classes.first_id(logits)
    return replace(tokens, logits=logits, labels=labels, unused=None), m, here, cotangents._replace(rest=drest)


def _sums_without_labels(tokens: Tokens, row_max: Array, pivot: Array, cotangents: ClassSums) -> ClassSums:
    """This sums over all classes here, and leaves out what of the labels needs no pass over them."""
    where, c, dtype = tokens.adjustment.where, None, row_max.dtype
    if tokens.extra.even:
        c = even_targets(tokens.class_weights, where, jnp.ones_like(tokens.logits, dtype))
    at_pivot = tokens.classes.one_hot(pivot, tokens.logits)
    return sums_around(tokens, targets_of_classes(tokens, dtype), c, at_pivot, row_max, cotangents)


def _all_sums_around(tokens: Tokens, row_max: Array, pivot: Array, cotangents: ClassSums) -> ClassSums:
    sums = _sums_without_labels(tokens, row_max, pivot, cotangents)
    if sums.own_mass is not None:
        return sums
    return sums._replace(**target_sums(tokens, row_max, pivot))


def class_sums(tokens: Tokens) -> ClassSums:
    """The sums of every token over its classes, on all devices. Those of unused rows must have cotangent 0."""
    over, classes = varying(tokens), tokens.classes
    of_tokens = tuple(name for name in over if name not in classes.over)
    logits, class_weights, adjustment = vary((tokens.logits, tokens.class_weights, tokens.adjustment), over)
    labels = vary(tokens.labels, of_tokens if isinstance(tokens.labels, Ids) else over)
    unused, of_classes = vary(tokens.unused, of_tokens), {"class_weights": class_weights, "adjustment": adjustment}
    tokens = replace(tokens, logits=logits, labels=labels, unused=unused, **of_classes)
    return (_sums_in_both_modes if tokens.forward_mode else _class_sums)(tokens)


# The same around the largest z alone, whose slope is that of m.


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> ClassSums:
    """row_max, rest, and the pivot: the largest, or how many classes there are where none is."""
    found = combine_devices(device_sums(Tokens(logits, None, adjustment, classes=classes)), classes.over)
    m, rest, exists = finish_rows(found)
    return ClassSums(m, rest, jnp.where(exists, found.pivot, classes.num_classes(logits)))


def _top_sums_jvp(classes: Classes, primals: tuple[Array, Adjustment], tangents: PyTree) -> PyTree:
    sums = top_sums(*primals, classes)
    m, at_top = lax.stop_gradient(sums.row_max), classes.one_hot(sums.pivot - classes.first_id(primals[0]), primals[0])

    @partial(jax.checkpoint, prevent_cse=False)
    def written_sums(operands: tuple[Array, Adjustment]) -> tuple[Array, Array]:
        z = shifted(operands[0], operands[1], m, classes.axis)
        own = psum(jnp.sum(jnp.where(at_top, z, 0), classes.axis), classes.over)
        others = jnp.where(at_top, 0, jnp.exp(z - classes.expand(own)))
        return own, psum(jnp.sum(others, classes.axis), classes.over)

    dm, drest = tangent_of(written_sums, primals, tangents)
    return sums, ClassSums(dm, drest, zero_from_primal(sums.pivot, symbolic_zeros=True))


top_sums.defjvp(_top_sums_jvp, symbolic_zeros=True)
