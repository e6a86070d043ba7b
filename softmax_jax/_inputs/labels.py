"""Labels as data: what a token is compared with.

    labels                         here       the pivot           their sums are made of
    integers [*batch]              `Ids`      the label           nothing: t_y is 1, or its class weight
    floats of the logits' shape    `Dense`    the largest logit   all logits
    SparseLabels [*batch, k]       `Sparse`   the largest logit   k logits a token, each read by itself

(Statistics rank integer labels among all classes; their pivot is the largest logit.) `_sums.targets` makes the sums.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._devices import AxisNames, Classes, PyTree, broadcast_spec
from softmax_jax._inputs.arrays import Shape, array, integer, is_floating, nan_unless, on_host


class Labels:
    """What all kinds have."""

    others: Any = None  # probability that is spread evenly over all other classes

    def specs(self, batch: tuple[AxisNames, ...], classes: Classes) -> PyTree:
        """How they lie over devices, for logits of that layout."""

    def in_one_form(self, unused: Array | None, number: int, dtype: DTypeLike, classes: Classes) -> Any:
        """As the sums take them, of that number of classes on all devices."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ids(Labels):
    """One class a token: int32 in one form."""

    ids: Any  # [*batch]
    z: Any = None  # that of the label, where its rank among all classes is asked

    def specs(self, batch: tuple[AxisNames, ...], classes: Classes) -> PyTree:
        return Ids(broadcast_spec(self.ids, batch))

    def in_one_form(self, unused: Array | None, number: int, dtype: DTypeLike, classes: Classes) -> Any:
        return Ids(_class_ids(self.ids, number))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Labels):
    """A number for each class: its probability. (Or a teacher's logit.)"""

    values: Any  # of the logits' shape

    def specs(self, batch: tuple[AxisNames, ...], classes: Classes) -> PyTree:
        axis = classes.axis
        return Dense(broadcast_spec(self.values, (*batch[:axis], classes.over, *batch[axis:])))


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

    def specs(self, batch: tuple[AxisNames, ...], classes: Classes) -> PyTree:
        entries = (broadcast_spec(a, (*batch, ())) for a in (self.ids, self.probs))
        return Sparse(*entries, others=broadcast_spec(self.others, batch))

    def in_one_form(self, unused: Array | None, number: int, dtype: DTypeLike, classes: Classes) -> Any:
        ids, probs = merge_entries(_class_ids(self.ids, number), self.probs.astype(dtype), unused, number)
        others = None if self.others is None else self.others.astype(dtype)
        if others is not None and unused is not None:
            others = jnp.where(unused & ~jnp.isfinite(others), 0, others)
        return Sparse(jnp.moveaxis(ids, -1, classes.axis), jnp.moveaxis(probs, -1, classes.axis), others)


def _class_ids(ids: Array, classes: int) -> Array:
    """Integer labels as int32. Wide ones are clipped to just outside the classes first, never wrapped."""
    info = jnp.iinfo(ids.dtype)
    if info.max > jnp.iinfo(jnp.int32).max:
        ids = jnp.clip(ids, max(info.min, -1), classes)
    return ids.astype(jnp.int32)


def merge_entries(ids: Array, probs: Array, unused: Array | None, classes: int) -> tuple[Array, Array]:
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
        _, probs = lax.associative_scan(_add_within_run, (starts, probs), axis=-1)
        ids, probs = jnp.where(ends, ids, -1), jnp.where(ends, probs, 0)
    return ids, nan_unless(valid, probs, None if unused is None else unused[..., None])


def _add_within_run(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """(whether a run starts, its sum) of two neighbours."""
    (starts, a), (starts_anew, b) = left, right
    return starts | starts_anew, jnp.where(starts_anew, b, a + b)


# Checks.

ROUNDING = 1.01e-5  # 1e-5 in any format
"""So far below 0 a subtraction may leave a probability that is 0."""


def check_labels(labels: Any, shape: Shape, axis: int, only_ids: str | None = None) -> Labels:
    """The labels of logits of `shape`: integers in the batch shape, floats in the logits' shape or SparseLabels; or
    integers alone where `only_ids`, which says of what, is given. Nothing is broadcast, nothing guessed."""
    batch = shape[:axis] + shape[axis + 1 :]
    if isinstance(labels, SparseLabels) and only_ids is None:
        return check_sparse_labels(labels, batch)
    if labels is None:
        raise TypeError(
            f"`labels` must be integers (class ids) or floats (probabilities); got None. Pass ids of shape {batch}, or "
            f"probabilities of shape {shape}."
        )
    if isinstance(labels, SparseLabels):
        raise TypeError(f"`labels`{only_ids} must be integers; got SparseLabels. Pass class ids.")
    is_tuple, labels = isinstance(labels, tuple), array("labels", labels)
    is_ids = jnp.issubdtype(labels.dtype, jnp.integer)
    if only_ids is not None and not is_ids:
        raise TypeError(f"`labels`{only_ids} must be integers; got dtype {labels.dtype}. Pass class ids.")
    if not is_ids and not is_floating(labels):
        raise TypeError(
            f"`labels` must be integers (class ids) or floats (probabilities); got dtype {labels.dtype}. "
            "Pass `labels.astype(jnp.int32)` for ids or `labels.astype(jnp.float32)` for a one-hot mask."
        )
    kind, expected = ("integer", batch) if is_ids else ("floating", shape)
    if labels.shape != expected:
        way_out = _way_out(labels.shape, is_ids, shape, batch, only_ids is not None)
        if is_tuple and only_ids is None:
            way_out = "Pass ids and probabilities as `SparseLabels(*labels)`."
        raise ValueError(
            f"{kind} `labels` must have shape {expected}; got labels.shape={labels.shape} for logits of shape {shape} "
            f"with the classes on axis {axis}. {way_out}"
        )
    return Ids(labels) if is_ids else Dense(labels)


def _way_out(given: Shape, is_ids: bool, shape: Shape, batch: Shape, only_ids: bool) -> str:
    """What labels of the wrong shape are likely to be."""
    if given == (*batch, 1):
        return "Pass `labels.squeeze(-1)`, without the axis of size 1."
    if given == batch:
        return "These are class ids in floats: pass `labels.astype(jnp.int32)`."
    if given == shape:
        probabilities = "" if only_ids else ", or `labels.astype(jnp.float32)` as probabilities"
        return f"Pass one-hot labels as ids, by `argmax` over the classes{probabilities}."
    fits = [a for a in range(len(shape)) if is_ids and given == shape[:a] + shape[a + 1 :]]
    told = f" These fit classes on axis {fits[0]}." if fits else ""
    probabilities = "" if only_ids else f", or probabilities, floats of shape {shape}"
    return f"Pass class ids, integers of shape {batch}{probabilities}.{told}"


def check_sparse_labels(labels: SparseLabels, batch: Shape) -> Sparse:
    given = labels._asdict() if labels.others is not None else {"ids": labels.ids, "probs": labels.probs}
    given = {name: array(name, value) for name, value in given.items()}
    ids, *floats = given.values()
    if not jnp.issubdtype(ids.dtype, jnp.integer) or not all(map(is_floating, floats)):
        raise TypeError(
            f"`SparseLabels` must have integer ids and floating probabilities; got "
            f"{[a.dtype for a in given.values()]} for ids, probs, others. Cast them."
        )
    shapes = [a.shape for a in given.values()]
    if len(ids.shape) != len(batch) + 1 or shapes != [(*batch, ids.shape[-1])] * 2 + [batch] * (len(shapes) - 2):
        raise ValueError(
            f"`SparseLabels` must have ids and probs of shape (*batch, k) and others of the batch shape, {batch} here; "
            f"got {shapes} for ids, probs, others. Reshape them."
        )
    return Sparse(**given)


def narrowed(labels: Any, ignore_index: Any = None) -> tuple[Any, Any]:
    """(labels, `ignore_index`); those of 64 bits on the host as int32, since without x64 JAX would wrap them. An id
    that int32 cannot hold is no class: it becomes the largest int32, or the smallest where it is to be ignored."""
    if isinstance(labels, SparseLabels):
        return labels._replace(ids=narrowed(labels.ids)[0]), ignore_index
    held, limits = on_host(labels), np.iinfo(np.int32)
    if held is None or held.dtype.kind not in "iu" or held.dtype.itemsize < 8 or jax.config.jax_enable_x64:
        return labels, ignore_index
    ids = np.where((held < limits.min) | (held > limits.max), limits.max, held).astype(np.int32)
    if not isinstance(ignore_index, int | np.integer) or limits.min < ignore_index <= limits.max:
        return ids, ignore_index
    return np.where(held == ignore_index, limits.min, np.where(ids == limits.min, limits.max, ids)), limits.min


def ignored_id(ignore_index: Any, labels: Labels | None) -> np.ndarray | None:
    """`ignore_index` in the labels' dtype; None where no label can equal it."""
    if ignore_index is None:
        return None
    if not isinstance(labels, Ids):
        kind = f"labels of dtype {labels.values.dtype}" if isinstance(labels, Dense) else "SparseLabels"
        raise ValueError(
            f"`ignore_index` goes with integer labels; got ignore_index={ignore_index!r} and {kind}. "
            "Give those tokens weight 0 with `weights` instead."
        )
    index, limits = integer("ignore_index", ignore_index, "Use `weights` for a mask."), jnp.iinfo(labels.ids.dtype)
    return np.asarray(index, labels.ids.dtype) if limits.min <= index <= limits.max else None


# What the host holds is looked through, since no device is waited for. What a mask on a device says is not known.


def _counted(shape: Shape, axis: int, masks: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """(which classes exist, which tokens count), broadcastable to `shape`; None where a mask is on a device."""
    where, weights = map(on_host, masks)
    if [where is None, weights is None] != [mask is None for mask in masks]:
        return None
    exists, used = np.asarray(True if where is None else where), np.asarray(True if weights is None else weights != 0)
    used = np.expand_dims(np.broadcast_to(used, shape[:axis] + shape[axis + 1 :]), axis)
    return exists.reshape((1,) * (len(shape) - exists.ndim) + exists.shape), used


def check_ids_in_range(labels: Any, shape: Shape, axis: int, masks: tuple[Any, Any], ignore_index: Any) -> None:
    """An error for an id that no class has, of a token that counts by the `masks`, `where` and `weights`."""
    ids = on_host(labels)
    if ids is None or ids.dtype.kind not in "iu" or not isinstance(shape[axis], int):
        return
    wrong = (ids < 0) | (ids >= shape[axis])
    if ignore_index is not None:
        wrong &= ids != ignore_index
    if not wrong.any() or (counted := _counted(shape, axis, masks)) is None:
        return
    for first in np.argwhere(wrong & counted[0].any(axis) & counted[1].squeeze(axis)):
        first = tuple(map(int, first))
        raise ValueError(
            f"`labels` must be class ids from 0 to {shape[axis] - 1}; got {ids[first]} at {first}. Name an id that is "
            "not to count by `ignore_index`, or give its token the weight 0."
        )


def check_probabilities(probs: Any, axis: int, masks: tuple[Any, Any]) -> None:
    """An error for a negative one of what counts. Ids that a row has twice add up: those are left to the sums."""
    parts, ids = {"teacher_probs": (probs, axis)}, None
    if isinstance(probs, SparseLabels):
        if masks[0] is not None:
            return
        ids, others = on_host(probs.ids), on_host(probs.others)
        parts = {"teacher_probs.probs": (probs.probs, np.ndim(probs.probs) - 1)}
        if others is not None:
            parts["teacher_probs.others"] = (others[..., None], others.ndim)
    for name, (given, axis) in parts.items():
        held = on_host(given)
        if held is None or not np.any(negative := held < -ROUNDING):
            continue
        counted = _counted(held.shape, axis, masks)
        if counted is None:
            return
        for place in np.argwhere(negative & counted[0] & counted[1]):
            (*row, entry) = map(int, place)
            if name == "teacher_probs.probs" and ids is not None and np.sum(ids[*row] == ids[*row, entry]) > 1:
                continue
            at = tuple(row) if name == "teacher_probs.others" else (*row, entry)
            raise ValueError(
                f"`{name}` must not be negative; got {float(held[*row, entry])} at {at}. Of what a subtraction left "
                "pass `np.maximum(..., 0)`."
            )
