"""What a token is compared with, as a function of the class: its target t_v, class weight included.

    labels                                      here       the pivot           its sums are made of
    integers [*batch]                           `Ids`      the label           nothing: t_y is 1, or its class weight
    the same, for their place among the others  `Placed`   the largest logit   the label's logit
    floats of the logits' shape                 `Dense`    the largest logit   all logits
    SparseLabels [*batch, k]                    `Sparse`   the largest logit   k logits a token, each read by itself

Of the targets a loss needs three sums around the pivot a, in which a factor of exactly 0 wins over z = -inf:

    own_mass = t_a      rest_mass = Σ_{v≠a} t_v      label_sum = Σ_{v≠a} t_v (z_v - m)
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._adjustment import Adjustment, rounded
from softmax_jax._dtypes import class_ids, nan_unless
from softmax_jax._indexing import if_here, is_at, pick, pick_of_all
from softmax_jax._masses import target_of
from softmax_jax._sharding import Names, PyTree, count, fit, offset, psum, vary


class Labels:
    """What all kinds have, and what most of them answer."""

    pivot: Any = None  # the class that is left out; None: the largest
    others: Any = None  # probability that is spread evenly over all other classes

    def specs(self, batch: tuple[Names, ...], classes: Names, axis: int) -> PyTree:
        """How they lie over devices, for logits of that layout."""

    def vary(self, over: Names, class_axes: Names) -> Any:
        """Marked as varying over those mesh axes, as far as they may."""
        return vary(self, over)

    def in_one_form(self, unused: Array | None, classes: int, dtype: Any, axis: int) -> Any:
        """As the sums take them."""
        return self

    def share_of_mean(self, class_weights: Array, class_axes: Names) -> Array | None:
        """What the mean's divisor counts of a token; None: 1."""

    def read(self, logits: Array, adjustment: Adjustment, axis: int, class_axes: Names) -> Any:
        """With what they need of the logits before the sums."""
        return self

    def target(self, logits: Array, class_weights, where, axis: int, class_axes: Names, dtype) -> Any:
        """t_v of every class here; None: `masses` makes the sums."""

    def masses(
        self, logits, class_weights, adjustment: Adjustment, m, pivot, unused, axis: int, class_axes: Names
    ) -> Any:
        """(own_mass, rest_mass, label_sum) of the classes here, of whose ids `pivot` is one; None: 1, 0 and 0. Without
        a pass over the classes: of all but `Dense`."""

    def probabilities(self, where: Array | None, size: int, axis: int, class_axes: Names) -> Any:
        """Of all `size` classes here: an array of the logits' size. Not of ids."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ids(Labels):
    """One class a token."""

    ids: Any  # [*batch]

    @property
    def pivot(self) -> Any:
        return self.ids

    def specs(self, batch, classes, axis):
        return Ids(fit(self.ids, batch))

    def in_one_form(self, unused, classes, dtype, axis):
        return Ids(class_ids(self.ids, classes))

    def vary(self, over, class_axes):
        return vary(self, tuple(name for name in over if name not in class_axes))

    def share_of_mean(self, class_weights, class_axes):
        c = class_weights.ravel()
        return psum(if_here(lambda ids: jnp.take(c, ids), self.ids - offset(c.size, class_axes), c.size), class_axes)

    def masses(self, logits, class_weights, adjustment, m, pivot, unused, axis, class_axes):
        if class_weights is None:
            return None, None, None
        return if_here(lambda ids: pick(class_weights, ids, axis), pivot, logits.shape[axis]), None, None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placed(Ids):
    """Ids in their one form, whose place among all classes is asked."""

    z: Any = None  # once it is `read`

    @property
    def pivot(self) -> Any:
        return None

    def read(self, logits, adjustment, axis, class_axes):
        return replace(self, z=pick_of_all(logits, self.ids, adjustment, axis, class_axes))

    def target(self, logits, class_weights, where, axis, class_axes, dtype):
        return is_at(self.ids - offset(logits.shape[axis], class_axes), logits, axis).astype(dtype)

    def masses(self, logits, class_weights, adjustment, m, pivot, unused, axis, class_axes):
        size = logits.shape[axis]
        ids = self.ids - offset(size, class_axes)
        exists, top = (ids >= 0) & (ids < size), ids == pivot
        mass, beside = (exists & top).astype(m.dtype), exists & ~top
        mass = of_existing(mass, self.ids, unused, count(size, class_axes))
        return mass, beside.astype(m.dtype), jnp.where(beside, rounded(self.z, m) - m, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Labels):
    """A number for each class: its probability. (Or a teacher's logit.)"""

    values: Any  # of the logits' shape

    def specs(self, batch, classes, axis):
        return Dense(fit(self.values, (*batch[:axis], classes, *batch[axis:])))

    def target(self, logits, class_weights, where, axis, class_axes, dtype):
        return target_of(self.values, class_weights, where, dtype)

    def probabilities(self, where, size, axis, class_axes):
        return self.values


def unused_by(weights: Array | None) -> Array | None:
    """The tokens of weight 0, whatever they hold; None for none."""
    return None if weights is None else weights == 0


def of_existing(own: Array, pivot: Array, unused: Array | None, classes: int) -> Array:
    """Of the pivot; one that no class is makes its row NaN, if it is used."""
    return nan_unless((pivot >= 0) & (pivot < classes), own, unused)
