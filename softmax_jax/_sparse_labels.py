"""Probabilities of a few classes a token: of the logits those are read alone, and there the gradient is written."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import shifted, weighed
from softmax_jax._dtypes import class_ids, nan_unless
from softmax_jax._indexing import at_ids, with_at_ids
from softmax_jax._labels import Labels
from softmax_jax._masses import existing, existing_classes, target_of
from softmax_jax._sharding import Names, fit, offset, psum


class SparseLabels(NamedTuple):
    """Probabilities of k classes a token: `labels` without an array of the logits' size.

    `probs` are those of the classes `ids`, of any sum; duplicates add up, and an entry of probability 0 is padding,
    whatever its id, and has no gradient. `others` is what all other existing classes have together, spread evenly over
    them (None: 0), say `jnp.maximum(1 - probs.sum(-1), 0)`; classes of a padded vocabulary are taken out by `where`,
    since a share of a -inf logit is an infinite loss (NaN, where a class at -inf has less than that share). What a
    class that has less than its share of `others` adds to loss and gradient is right to a rounding of that share. An id
    out of range with a probability makes its row NaN.
    """

    ids: Any  # integers [*batch, k]
    probs: Any  # floats [*batch, k]
    others: Any = None  # floats [*batch]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse(Labels):
    """`SparseLabels`. In one form they have int32 ids along the classes' axis, -1 for what does not count, and each id
    once a token: a class has one gradient, which is written once."""

    ids: Any
    probs: Any
    others: Any = None

    def specs(self, batch, classes, axis):
        return Sparse(fit(self.ids, (*batch, ())), fit(self.probs, (*batch, ())), fit(self.others, batch))

    def in_one_form(self, unused, classes, dtype, axis):
        ids, probs = merged(class_ids(self.ids, classes), self.probs.astype(dtype), unused, classes)
        others = None if self.others is None else self.others.astype(dtype)
        if others is not None and unused is not None:
            others = jnp.where(unused, 0, others)
        return Sparse(jnp.moveaxis(ids, -1, axis), jnp.moveaxis(probs, -1, axis), others)

    def masses(self, logits, class_weights, adjustment, m, pivot, unused, axis, class_axes):
        at = few(logits, self, class_weights, adjustment.where, offset(logits.shape[axis], class_axes), axis)
        z = shifted(at.logits, adjustment._replace(where=at.where), m, axis)
        mass, *others = sums_of_few(z, self.probs, at.class_weights, at, pivot, axis)
        return nan_unless(~jnp.any(jnp.isnan(self.probs), axis), mass), *others

    def probabilities(self, where, size, axis, class_axes):
        ids, _ = _ids_here(self, where, size, offset(size, class_axes), axis)
        valid, dtype = ~jnp.any(jnp.isnan(self.probs), axis), self.probs.dtype
        each = jnp.zeros(valid.shape, dtype)
        if self.others is not None:
            left = existing_classes(where, size, axis, class_axes, dtype)
            each = _each_of_others(self, where, left, size, axis, class_axes)
        every = jnp.expand_dims(nan_unless(valid, each), axis)
        every = jnp.broadcast_to(every, [size if a == axis else n for a, n in enumerate(ids.shape)])
        return existing(with_at_ids(every, ids, self.probs, axis), where)


def merged(ids: Array, probs: Array, unused: Array | None, classes: int) -> tuple[Array, Array]:
    """Ids once each, -1 and probability 0 in the freed entries; by sorting, since k may be hundreds. NaN in a row that
    is used and has an id which no class has."""
    used = probs != 0  # of NaN too
    valid = jnp.all(~used | (ids >= 0) & (ids < classes), -1, keepdims=True)
    ids = jnp.where(used, ids, -1)
    if ids.shape[-1] > 1:
        ids, probs = lax.sort((ids, probs), num_keys=1, is_stable=False)
        new = jnp.diff(ids, axis=-1) != 0
        edge = jnp.ones_like(ids[..., :1], bool)
        starts, ends = jnp.concatenate([edge, new], -1), jnp.concatenate([new, edge], -1)
        _, probs = lax.associative_scan(_run, (starts, probs), axis=-1)
        ids, probs = jnp.where(ends, ids, -1), jnp.where(ends, probs, 0)
    return ids, nan_unless(valid, probs, None if unused is None else unused[..., None])


def _run(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """(starts a run, sum) of two neighbours."""
    (starts, a), (starts_anew, b) = left, right
    return starts | starts_anew, jnp.where(starts_anew, b, a + b)


class Few(NamedTuple):
    """What stands at the ids: [*batch] with k on the classes' axis. Of sharded classes, of those here."""

    ids: Array  # of the classes here, beyond them where none is meant
    logits: Array
    where: Array  # whether there is such a class
    class_weights: Array | None


def few(
    logits: Array, labels: Sparse, class_weights: Array | None, where: Array | None, first: Array | int, axis: int
) -> Few:
    ids, exists = _ids_here(labels, where, logits.shape[axis], first, axis)
    return Few(ids, at_ids(logits, ids, axis), exists, few_weights(class_weights, ids, axis))


def few_weights(class_weights: Array | None, ids: Array, axis: int) -> Array | None:
    return None if class_weights is None else at_ids(class_weights, ids, axis)


def _ids_here(labels, where, size, first, axis):
    """(the ids as those of the classes here, `size` for others; whether there is such a class)."""
    ids = labels.ids - first
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    return ids, ids < size if where is None else (ids < size) & at_ids(where, ids, axis)


def sums_of_few(z, probs, class_weights, at: Few, pivot, axis):
    """(own_mass, rest_mass, label_sum), of z at the ids."""
    t = target_of(probs, class_weights, at.where, z.dtype)
    is_pivot = at.ids == jnp.expand_dims(pivot, axis)
    rest = jnp.where(is_pivot, 0, t)
    return tuple(jnp.sum(terms, axis) for terms in (jnp.where(is_pivot, t, 0), rest, weighed(rest, z)))


def _each_of_others(labels, where, existing, size, axis, class_axes):
    """The part of `others` of each class that exists and has no entry."""
    _, exists = _ids_here(labels, where, size, offset(size, class_axes), axis)
    left = existing - psum(jnp.sum(exists, axis, dtype=existing.dtype), class_axes)
    return jnp.where(left > 0, labels.others, 0) / jnp.maximum(left, 1)


def spread_evenly(
    labels: Sparse, where: Array | None, existing: Array, size: int, axis: int, class_axes: Names
) -> tuple[Sparse, Array]:
    """(labels without `others`, u): u of every class that exists, and the difference to it of the few."""
    u = _each_of_others(labels, where, existing, size, axis, class_axes)
    return Sparse(labels.ids, labels.probs - jnp.expand_dims(u, axis)), u
