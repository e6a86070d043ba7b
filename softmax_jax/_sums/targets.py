"""The targets: from labels to t_v of every class, or to the sums of t where those need no pass over the classes.

Of the targets a loss needs three sums around the pivot a, in which a factor of exactly 0 wins over z = -inf:

    own_mass = t_a      other_mass = Σ_{v≠a} t_v      label_sum = Σ_{v≠a} t_v (z_v - m)

Of `SparseLabels` k logits a token are read by themselves, and there the gradient is written.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._devices import Classes, offset, psum
from softmax_jax._inputs.arrays import nan_unless
from softmax_jax._inputs.labels import ROUNDING, Dense, Sparse
from softmax_jax._inputs.options import even_targets, safe_product, shifted, weighted_targets, without_fma, zero_hidden
from softmax_jax._sums.waist import NO_COTANGENTS, OF_LABELS, ClassSums, Tokens, pulled, sums_around

TargetSums = dict[str, Array | None]  # own_mass, other_mass, label_sum; None is 1, 0 and 0


def targets_of_classes(tokens: Tokens, dtype: DTypeLike) -> Array | None:
    """t_v of every class here; None where `target_sums` needs no pass over them."""
    if isinstance(tokens.labels, Dense):
        return weighted_targets(tokens.labels.values, tokens.class_weights, tokens.adjustment.where, dtype)
    if tokens.extra.statistics:
        ids = tokens.labels.ids - tokens.classes.first_id(tokens.logits)
        return tokens.classes.one_hot(ids, tokens.logits).astype(dtype)
    return None


def target_sums(tokens: Tokens, row_max: Array, pivot: Array) -> TargetSums:
    """Of the classes here, and not of dense labels. `pivot` counts from the first of them; it may be none of them."""
    labels, classes = tokens.labels, tokens.classes
    if isinstance(labels, Sparse):
        return _of_entries(tokens, row_max, pivot)
    if tokens.extra.statistics:
        ids = labels.ids - classes.first_id(tokens.logits)
        is_here, is_top = (ids >= 0) & (ids < tokens.logits.shape[classes.axis]), ids == pivot
        own_mass = valid_or_nan((is_here & is_top).astype(row_max.dtype), labels.ids, tokens)
        label_sum = jnp.where(is_here & ~is_top, without_fma(labels.z, row_max) - row_max, 0)
        return _named(own_mass, (is_here & ~is_top).astype(row_max.dtype), label_sum)
    c = tokens.class_weights
    if c is None:
        return _named(None, None, None)
    return _named(classes.read_local(lambda ids: classes.take_one(ids, c), pivot, tokens.logits), None, None)


def _named(*sums: Array | None) -> TargetSums:
    return dict(zip(OF_LABELS, sums, strict=True))


def valid_or_nan(own: Array, ids: Array, tokens: Tokens) -> Array:
    """A number of a label. An id that no class has makes its row NaN, or of weight 0 infinite."""
    exists = (ids >= 0) & (ids < tokens.classes.num_classes(tokens.logits))
    own = own if tokens.unused is None else jnp.where(exists, own, -jnp.inf)
    return nan_unless(exists, own, tokens.unused)


class Entries(NamedTuple):
    """What stands at the ids of `Sparse` labels: [*batch] with k on the classes' axis. Of sharded classes, of those
    here."""

    ids: Array  # of the classes here, beyond them where none is meant
    logits: Array
    where: Array  # whether there is such a class
    class_weights: Array | None


def entries_of(tokens: Tokens) -> Entries:
    classes, c = tokens.classes, tokens.class_weights
    ids, exists = _local_ids(tokens.labels, tokens.adjustment.where, tokens.logits.shape[classes.axis], classes)
    return Entries(ids, classes.take(ids, tokens.logits), exists, None if c is None else classes.take(ids, c))


def _local_ids(labels: Sparse, where: Array | None, size: int, classes: Classes) -> tuple[Array, Array]:
    """(the ids as those of the classes here, `size` for others; whether there is such a class)."""
    ids = labels.ids - offset(size, classes.over)
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    return ids, ids < size if where is None else (ids < size) & classes.take(ids, where)


def _of_entries(tokens: Tokens, row_max: Array, pivot: Array) -> TargetSums:
    axis, probs, entries = tokens.classes.axis, tokens.labels.probs, entries_of(tokens)
    z = shifted(entries.logits, tokens.adjustment._replace(where=entries.where), row_max, axis)
    t = weighted_targets(probs, entries.class_weights, entries.where, z.dtype)
    is_pivot = entries.ids == tokens.classes.expand(pivot)
    others = jnp.where(is_pivot, 0, t)
    own_mass = nan_unless(~jnp.any(jnp.isnan(probs), axis), jnp.sum(jnp.where(is_pivot, t, 0), axis))
    return _named(own_mass, jnp.sum(others, axis), jnp.sum(safe_product(others, z), axis))


def with_entry_gradients(
    gradients: Tokens, tokens: Tokens, row_max: Array, pivot: Array, cotangents: ClassSums
) -> Tokens:
    """The gradients of all classes with what `Sparse` labels add: that of their few logits as a whole is computed for
    them alone, and written over what all classes have."""
    entries, classes = entries_of(tokens), tokens.classes

    def sums(logits: Array, tokens: Tokens) -> ClassSums:
        c = None if tokens.class_weights is None else classes.take(entries.ids, tokens.class_weights)
        t = weighted_targets(tokens.labels.probs, c, entries.where, row_max.dtype)
        c = even_targets(c, entries.where, t) if tokens.extra.even else None
        read = replace(tokens, logits=logits, adjustment=tokens.adjustment._replace(where=entries.where))
        return sums_around(read, t, c, entries.ids == classes.expand(pivot), row_max, cotangents)

    of_labels = NO_COTANGENTS._replace(**{name: getattr(cotangents, name) for name in OF_LABELS})
    added = pulled(partial(sums, entries.logits), tokens, of_labels)
    found = jax.tree.map(lambda a, b: a + b if a.dtype != jax.dtypes.float0 else a, gradients, added)
    of_logits = pulled(lambda logits: sums(logits, tokens), entries.logits, cotangents)
    return replace(found, logits=classes.scatter(entries.ids, of_logits, gradients.logits))


# Probability that is spread evenly over all other classes.


def share_of_others(labels: Sparse, where: Array | None, existing: Array, size: int, classes: Classes) -> Array:
    """The part of `others` of each class that exists and has no entry."""
    _, exists = _local_ids(labels, where, size, classes)
    left = existing - psum(jnp.sum(exists, classes.axis, dtype=existing.dtype), classes.over)
    return jnp.where(left > 0, labels.others, 0) / jnp.maximum(left, 1)


def dense_probabilities(labels: Sparse, where: Array | None, existing: Array, size: int, classes: Classes) -> Array:
    """Those of all `size` classes here, an array of the logits' size."""
    ids, _ = _local_ids(labels, where, size, classes)
    valid, dtype = ~jnp.any(jnp.isnan(labels.probs), classes.axis), labels.probs.dtype
    each = jnp.zeros(valid.shape, dtype)
    if labels.others is not None:
        valid &= labels.others >= -ROUNDING
        each = share_of_others(labels, where, existing, size, classes)
    every = classes.expand(nan_unless(valid, each))
    every = jnp.broadcast_to(every, [size if a == classes.axis else n for a, n in enumerate(ids.shape)])
    return zero_hidden(classes.scatter(ids, labels.probs, every), where)
