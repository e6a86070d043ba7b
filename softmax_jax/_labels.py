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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._adjustment import Adjustment, rounded, z_at_of_all
from softmax_jax._classes import Classes
from softmax_jax._dtypes import class_ids, nan_unless
from softmax_jax._masses import target_of
from softmax_jax._sharding import Names, PyTree, fit, psum, vary
from softmax_jax._sums import Tokens

Masses = Any  # (own_mass, rest_mass, label_sum), each [*batch] or None


class Labels:
    """What all kinds have, and what most of them answer."""

    pivot: Any = None  # the class that is left out; None: the largest
    others: Any = None  # probability that is spread evenly over all other classes

    def specs(self, batch: tuple[Names, ...], classes: Classes) -> PyTree:
        """How they lie over devices, for logits of that layout."""

    def vary(self, over: Names, classes: Classes) -> Any:
        """Marked as varying over those mesh axes, as far as they may."""
        return vary(self, over)

    def in_one_form(self, unused: Array | None, number: int, dtype: DTypeLike, classes: Classes) -> Any:
        """As the sums take them, of that number of classes on all devices."""
        return self

    def share_of_mean(self, class_weights: Array, classes: Classes) -> Array | None:
        """What the mean's divisor counts of a token; None: 1."""

    def read(self, logits: Array, adjustment: Adjustment, classes: Classes) -> Any:
        """With what they need of the logits before the sums."""
        return self

    def target(self, tokens: Tokens, classes: Classes, dtype: DTypeLike) -> Any:
        """t_v of every class here; None: `masses` makes the sums."""

    def masses(self, tokens: Tokens, m: Array, pivot: Array, classes: Classes) -> Masses:
        """The three sums of the classes here, of whose ids `pivot` is one; None: 1, 0 and 0. Without a pass over the
        classes: of all but `Dense`."""

    def probabilities(self, where: Array | None, size: int, classes: Classes) -> Any:
        """Of all `size` classes here: an array of the logits' size. Not of ids."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ids(Labels):
    """One class a token."""

    ids: Any  # [*batch]

    @property
    def pivot(self) -> Any:
        return self.ids

    def specs(self, batch, classes):
        return Ids(fit(self.ids, batch))

    def in_one_form(self, unused, number, dtype, classes):
        return Ids(class_ids(self.ids, number))

    def vary(self, over, classes):
        return vary(self, tuple(name for name in over if name not in classes.over))

    def share_of_mean(self, class_weights, classes):
        here = self.ids - classes.first(class_weights)
        return psum(classes.if_here(partial(jnp.take, class_weights.ravel()), here, class_weights), classes.over)

    def masses(self, tokens, m, pivot, classes):
        c = tokens.class_weights
        if c is None:
            return None, None, None
        return classes.if_here(lambda ids: classes.pick(ids, c), pivot, tokens.logits), None, None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placed(Ids):
    """Ids in their one form, whose place among all classes is asked."""

    z: Any = None  # once it is `read`

    @property
    def pivot(self) -> Any:
        return None

    def read(self, logits, adjustment, classes):
        return replace(self, z=z_at_of_all(self.ids, logits, adjustment, classes))

    def target(self, tokens, classes, dtype):
        return classes.is_at(self.ids - classes.first(tokens.logits), tokens.logits).astype(dtype)

    def masses(self, tokens, m, pivot, classes):
        ids = self.ids - classes.first(tokens.logits)
        exists, top = (ids >= 0) & (ids < tokens.logits.shape[classes.axis]), ids == pivot
        mass, beside = (exists & top).astype(m.dtype), exists & ~top
        mass = of_existing(mass, self.ids, tokens, classes)
        return mass, beside.astype(m.dtype), jnp.where(beside, rounded(self.z, m) - m, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Labels):
    """A number for each class: its probability. (Or a teacher's logit.)"""

    values: Any  # of the logits' shape

    def specs(self, batch, classes):
        axis = classes.axis
        return Dense(fit(self.values, (*batch[:axis], classes.over, *batch[axis:])))

    def target(self, tokens, classes, dtype):
        return target_of(self.values, tokens.class_weights, tokens.adjustment.where, dtype)

    def probabilities(self, where, size, classes):
        return self.values


def unused_by(weights: Array | None) -> Array | None:
    """The tokens of weight 0, whatever they hold; None for none."""
    return None if weights is None else weights == 0


def of_existing(own: Array, pivot: Array, tokens: Tokens, classes: Classes) -> Array:
    """Of the pivot; one that no class is makes its row NaN, or of weight 0 infinite."""
    exists = (pivot >= 0) & (pivot < classes.of_all(tokens.logits))
    own = own if tokens.unused is None else jnp.where(exists, own, -jnp.inf)
    return nan_unless(exists, own, tokens.unused)
