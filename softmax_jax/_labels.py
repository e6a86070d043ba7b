"""What a token is compared with: one class, a probability for each class, or the probabilities of a few.

Of the targets t_v (class weight included) a loss needs three sums around a pivot a:

    own_mass = t_a      rest_mass = Σ_{v≠a} t_v      label_sum = Σ_{v≠a} t_v (z_v - m)

    labels                         the pivot                 its sums are made of
    integers [*batch]              the label                 nothing: t_a is 1, or its class weight
    floats of the logits' shape    the largest logit         a pass over the classes each
    SparseLabels [*batch, k]       the largest logit         k logits a token, each read by itself

In each sum a factor of exactly 0 wins over z = -inf.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._adjustment import Adjustment, rounded, shifted, weighed
from softmax_jax._dtypes import nan_unless
from softmax_jax._indexing import at_ids, pick, with_at_ids
from softmax_jax._sharding import Names, count, fit, offset, psum


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


Labels = Array | SparseLabels


def are_ids(labels: Labels) -> bool:
    return not isinstance(labels, SparseLabels) and jnp.issubdtype(labels.dtype, jnp.integer)


def are_dense(labels: Labels) -> bool:
    return not isinstance(labels, SparseLabels) and not are_ids(labels)


def unused_by(weights: Array | None) -> Array | None:
    """The tokens of weight 0, whatever they hold; None for none."""
    return None if weights is None else weights == 0


def label_specs(labels: Labels, batch: tuple[Names, ...], classes: Names, axis: int) -> Any:
    """How `labels` lie over devices, for logits of that layout."""
    if isinstance(labels, SparseLabels):
        return SparseLabels(fit(labels.ids, (*batch, ())), fit(labels.probs, (*batch, ())), fit(labels.others, batch))
    return fit(labels, batch if are_ids(labels) else (*batch[:axis], classes, *batch[axis:]))


def in_one_form(labels: Labels, unused: Array | None, classes: int, dtype: DTypeLike, axis: int) -> Labels:
    if isinstance(labels, SparseLabels):
        ids, probs, others = labels
        others = None if others is None else others.astype(dtype)
        labels = merged(SparseLabels(_class_ids(ids, classes), probs.astype(dtype), others), unused, classes)
        return labels._replace(ids=jnp.moveaxis(labels.ids, -1, axis), probs=jnp.moveaxis(labels.probs, -1, axis))
    return _class_ids(labels, classes) if are_ids(labels) else labels


def _class_ids(labels: Array, classes: int) -> Array:
    """Integer labels as int32. Wide ones are clipped to just outside the classes first, never wrapped."""
    info = jnp.iinfo(labels.dtype)
    if info.max > jnp.iinfo(jnp.int32).max:
        labels = jnp.clip(labels, max(info.min, -1), classes)
    return labels.astype(jnp.int32)


# In their one form, SparseLabels have int32 ids along the classes' axis, each id once a token and -1 for what does not
# count, and `others` is the probability of each of the other classes. So that a class has one gradient, which is
# written once.


def merged(labels: SparseLabels, unused: Array | None, classes: int) -> SparseLabels:
    """Ids once each, -1 and probability 0 in the freed entries; by sorting, since k may be hundreds. NaN in a row that
    is used and has an id which no class has."""
    ids, probs, others = labels
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
    return SparseLabels(ids, nan_unless(valid, probs, None if unused is None else unused[..., None]), others)


def _run(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """(starts a run, sum) of two neighbours."""
    (starts, a), (starts_anew, b) = left, right
    return starts | starts_anew, jnp.where(starts_anew, b, a + b)


def existing(array: Any, where: Array | None) -> Any:
    """0 for a class that `where` hides, which may hold NaN."""
    return array if array is None or where is None else jnp.where(where, array, 0)


def target(labels, class_weights, where, dtype):
    """t_v of dense labels. What `where` hides may be NaN."""
    labels, class_weights = existing(labels.astype(dtype), where), existing(class_weights, where)
    return labels if class_weights is None else class_weights * labels


def uniform(class_weights, where, z):
    """c_v of every class that exists."""
    each = jnp.ones_like(z) if class_weights is None else jnp.broadcast_to(class_weights, z.shape)
    return existing(each, where)


def own_mass(labels, class_weights, where, pivot, size, axis, dtype):
    """t_pivot of ids and of dense labels, and 0 where the pivot is none of the classes here; None for 1."""
    in_range = jnp.clip(pivot, 0, size - 1)
    there = lambda a: None if a is None else pick(a, in_range, axis)  # noqa: E731
    mass = there(class_weights) if are_ids(labels) else target(there(labels), there(class_weights), there(where), dtype)
    return None if mass is None else jnp.where(in_range == pivot, mass, 0)


class Few(NamedTuple):
    """What stands at the ids of SparseLabels: [*batch] with k on the classes' axis. Of sharded classes, of those
    here."""

    ids: Array  # of the classes here, beyond them where none is meant
    logits: Array
    where: Array  # whether there is such a class
    class_weights: Array | None


def few(logits, labels, class_weights, where, first, axis) -> Few:
    size = logits.shape[axis]
    ids, exists = _ids_here(labels, where, size, first, axis)
    return Few(ids, at_ids(logits, ids, axis), exists, few_weights(class_weights, ids, axis))


def few_weights(class_weights, ids, axis):
    return None if class_weights is None else at_ids(class_weights, ids, axis)


def _ids_here(labels, where, size, first, axis):
    """(the ids as those of the classes here, `size` for others; whether there is such a class)."""
    ids = labels.ids - first
    ids = jnp.where((ids >= 0) & (ids < size), ids, size)
    return ids, ids < size if where is None else (ids < size) & at_ids(where, ids, axis)


def existing_classes(where: Array | None, classes: int, axis: int, class_axes: Names, dtype: DTypeLike) -> Array:
    """K, how many classes of a token exist, on all devices."""
    if where is None:
        return jnp.asarray(count(classes, class_axes), dtype)
    width = classes if where.shape[axis] == 1 else 1
    return psum(jnp.sum(where, axis, dtype=dtype) * width, class_axes)


def _each_of_others(labels, where, existing, size, axis, class_axes):
    """The part of `others` of each class that exists and has no entry."""
    _, exists = _ids_here(labels, where, size, offset(size, class_axes), axis)
    left = existing - psum(jnp.sum(exists, axis, dtype=existing.dtype), class_axes)
    return jnp.where(left > 0, labels.others, 0) / jnp.maximum(left, 1)


def spread_evenly(
    labels: SparseLabels, where: Array | None, existing: Array, size: int, axis: int, class_axes: Names
) -> tuple[SparseLabels, Array]:
    """(labels without `others`, u): u of every class that exists, and the difference to it of the few."""
    u = _each_of_others(labels, where, existing, size, axis, class_axes)
    return SparseLabels(labels.ids, labels.probs - jnp.expand_dims(u, axis)), u


def probabilities_of(labels: SparseLabels, where: Array | None, size: int, axis: int, class_axes: Names) -> Array:
    """Those of all `size` classes here: an array of the logits' size, for a chunk of tokens."""
    ids, _ = _ids_here(labels, where, size, offset(size, class_axes), axis)
    valid, dtype = ~jnp.any(jnp.isnan(labels.probs), axis), labels.probs.dtype
    each = jnp.zeros(valid.shape, dtype)
    if labels.others is not None:
        left = existing_classes(where, size, axis, class_axes, dtype)
        each = _each_of_others(labels, where, left, size, axis, class_axes)
    every = jnp.expand_dims(nan_unless(valid, each), axis)
    every = jnp.broadcast_to(every, [size if a == axis else n for a, n in enumerate(ids.shape)])
    return existing(with_at_ids(every, ids, labels.probs, axis), where)


def masses_of_few(logits, labels, class_weights, adjustment: Adjustment, m, pivot, axis, class_axes):
    """(own_mass, rest_mass, label_sum) of ids and of SparseLabels, which need no pass over the classes."""
    if not isinstance(labels, SparseLabels):
        mass = own_mass(labels, class_weights, adjustment.where, pivot, logits.shape[axis], axis, m.dtype)
        return mass, None, None
    at = few(logits, labels, class_weights, adjustment.where, offset(logits.shape[axis], class_axes), axis)
    z = shifted(at.logits, adjustment._replace(where=at.where), m, axis)
    mass, *others = sparse_sums(z, labels.probs, at.class_weights, at, pivot, axis)
    return nan_unless(~jnp.any(jnp.isnan(labels.probs), axis), mass), *others


def of_existing(own, pivot, unused, classes):
    """z - m of the pivot; one that no class is makes its row NaN, if it is used."""
    return nan_unless((pivot >= 0) & (pivot < classes), own, unused)


def masses_of_one(ids, z, m, top, unused, classes):
    """(own_mass, rest_mass, label_sum) of ids around the largest class, of z at the ids."""
    is_top = ids == top
    mass = nan_unless((ids >= 0) & (ids < classes), is_top.astype(m.dtype), unused)
    return mass, 1 - is_top.astype(m.dtype), jnp.where(is_top, 0, rounded(z, m) - m)


def sparse_sums(z, probs, class_weights, at: Few, pivot, axis):
    """(own_mass, rest_mass, label_sum), of z at the ids."""
    t = target(probs, class_weights, at.where, z.dtype)
    is_pivot = at.ids == jnp.expand_dims(pivot, axis)
    rest = jnp.where(is_pivot, 0, t)
    return tuple(jnp.sum(terms, axis) for terms in (jnp.where(is_pivot, t, 0), rest, weighed(rest, z)))
