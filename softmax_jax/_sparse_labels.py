"""Probabilities of a few classes a token: of the logits those are read alone, and there the gradient is written."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import shifted, weighed
from softmax_jax._blocks import existing_classes
from softmax_jax._classes import Classes
from softmax_jax._dtypes import class_ids, nan_unless
from softmax_jax._labels import Labels
from softmax_jax._masses import ROUNDING, existing, target_of, uniform
from softmax_jax._sharding import fit, offset, psum
from softmax_jax._sums import LABELS, Tokens
from softmax_jax._waist import NO_COTANGENTS, Around, pulled, written


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

    def specs(self, batch, classes):
        return Sparse(fit(self.ids, (*batch, ())), fit(self.probs, (*batch, ())), fit(self.others, batch))

    def in_one_form(self, unused, number, dtype, classes):
        ids, probs = merged(class_ids(self.ids, number), self.probs.astype(dtype), unused, number)
        others = None if self.others is None else self.others.astype(dtype)
        if others is not None and unused is not None:
            others = jnp.where(unused & ~jnp.isfinite(others), 0, others)
        return Sparse(jnp.moveaxis(ids, -1, classes.axis), jnp.moveaxis(probs, -1, classes.axis), others)

    def masses(self, tokens, m, pivot, classes):
        at = few(tokens, classes)
        z = shifted(at.logits, tokens.adjustment._replace(where=at.where), m, classes.axis)
        mass, *others = sums_of_few(z, self.probs, at, pivot, classes)
        return nan_unless(~jnp.any(jnp.isnan(self.probs), classes.axis), mass), *others

    def probabilities(self, where, size, classes):
        ids, _ = _ids_here(self, where, size, classes)
        valid, dtype = ~jnp.any(jnp.isnan(self.probs), classes.axis), self.probs.dtype
        each = jnp.zeros(valid.shape, dtype)
        if self.others is not None:
            valid &= self.others >= -ROUNDING
            each = _each_of_others(self, where, existing_classes(where, size, classes, dtype), size, classes)
        every = classes.along(nan_unless(valid, each))
        every = jnp.broadcast_to(every, [size if a == classes.axis else n for a, n in enumerate(ids.shape)])
        return existing(classes.put(ids, self.probs, every), where)


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


def few(tokens: Tokens, classes: Classes) -> Few:
    """Of tokens whose labels are `Sparse`."""
    ids, exists = _ids_here(tokens.labels, tokens.adjustment.where, tokens.logits.shape[classes.axis], classes)
    return Few(ids, classes.at(ids, tokens.logits), exists, weights_of_few(ids, tokens.class_weights, classes))


def with_few(gradients: Tokens, tokens: Tokens, around: Around) -> Tokens:
    """The gradients of all classes with what `Sparse` labels add: that of their few logits as a whole is computed for
    them alone, and written over what all classes have."""
    m, pivot, classes, asked, cotangents = around
    at = few(tokens, classes)

    def sums(x, tokens):
        c = weights_of_few(at.ids, tokens.class_weights, classes)
        t = target_of(tokens.labels.probs, c, at.where, m.dtype)
        c = uniform(c, at.where, t) if asked.prior else None
        adjustment = tokens.adjustment._replace(where=at.where)
        return written(x, adjustment, t, c, at.ids == classes.along(pivot), around)

    of_labels = NO_COTANGENTS._replace(**{name: getattr(cotangents, name) for name in LABELS})
    added = pulled(partial(sums, at.logits), tokens, of_labels)
    found = jax.tree.map(lambda a, b: a + b if a.dtype != jax.dtypes.float0 else a, gradients, added)
    of_logits = pulled(lambda x: sums(x, tokens), at.logits, cotangents)
    return found._replace(logits=classes.put(at.ids, of_logits, gradients.logits))


def weights_of_few(ids: Array, class_weights: Array | None, classes: Classes) -> Array | None:
    return None if class_weights is None else classes.at(ids, class_weights)


def _ids_here(labels: Sparse, where: Array | None, size: int, classes: Classes) -> tuple[Array, Array]:
    """(the ids as those of the classes here, `size` for others; whether there is such a class)."""
    ids = labels.ids - offset(size, classes.over)
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    return ids, ids < size if where is None else (ids < size) & classes.at(ids, where)


def sums_of_few(z: Array, probs: Array, at: Few, pivot: Array, classes: Classes) -> tuple[Array, ...]:
    """(own_mass, rest_mass, label_sum), of z at the ids."""
    t, is_pivot = target_of(probs, at.class_weights, at.where, z.dtype), at.ids == classes.along(pivot)
    rest = jnp.where(is_pivot, 0, t)
    return tuple(jnp.sum(terms, classes.axis) for terms in (jnp.where(is_pivot, t, 0), rest, weighed(rest, z)))


def _each_of_others(labels: Sparse, where: Array | None, existing: Array, size: int, classes: Classes) -> Array:
    """The part of `others` of each class that exists and has no entry."""
    _, exists = _ids_here(labels, where, size, classes)
    left = existing - psum(jnp.sum(exists, classes.axis, dtype=existing.dtype), classes.over)
    return jnp.where(left > 0, labels.others, 0) / jnp.maximum(left, 1)


def spread_evenly(
    labels: Sparse, where: Array | None, existing: Array, size: int, classes: Classes
) -> tuple[Sparse, Array]:
    """(labels without `others`, u): u of every class that exists, and the difference to it of the few."""
    u = _each_of_others(labels, where, existing, size, classes)
    return Sparse(labels.ids, labels.probs - classes.along(u)), u
