"""What the sums of a token are made of, which are asked for, and what they are."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import custom_vmap

from softmax_jax._adjustment import Adjustment
from softmax_jax._dtypes import is_floating
from softmax_jax._sharding import PyTree


def in_rule(f: Callable) -> Callable:
    """f, which has a `custom_jvp`, where the forward pass of a `custom_vjp` calls it. JAX 0.10 forgets a rule that is
    called there, under `scan`, when it is differentiated again; under a checkpoint it keeps it."""
    return jax.checkpoint(f, prevent_cse=False) if jax.__version_info__ < (0, 11) else f


@custom_vmap
def batched_alike(numbers: PyTree) -> PyTree:
    """The same numbers, of which `vmap` maps all or none: of a function with a rule JAX takes the cotangent of a result
    that is not mapped for one that all examples share, once for each of them (0.10), or refuses it."""
    return numbers


@batched_alike.def_vmap
def _(size: int, mapped: list, numbers: PyTree) -> tuple[PyTree, PyTree]:
    def of_all(a, is_mapped):
        return a if is_mapped else jnp.broadcast_to(a[None], (size, *a.shape))

    return jax.tree.map(of_all, numbers, *mapped), jax.tree.map(lambda _: True, numbers)


def lost(unused: Array | None, numbers: PyTree) -> Array | None:
    """Which tokens that are not used have numbers that are not finite: nothing may come of them. (Of the others a
    derivative by the weight, which is 0, is asked.) None for none."""
    if unused is None:
        return None
    floats = [n for n in jax.tree.leaves(numbers) if is_floating(n)]
    return reduce(jnp.logical_or, [unused & ~jnp.isfinite(n) for n in floats])


class Tokens(NamedTuple):
    """What sums are made of, in one form: `class_weights` and `where` broadcast to the logits."""

    logits: Array
    labels: Any  # Labels
    class_weights: Array | None
    adjustment: Adjustment
    unused: Array | None = None  # those of weight 0, whatever they hold; None: there are none


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum."""

    shift: Array  # m, or 0 where m = -inf; a constant: no gradient flows through it
    rest: Array
    own: Array
    own_mass: Array | None = None  # t_pivot; None is 1
    rest_mass: Array | None = None  # Σ_{v≠pivot} t_v; None is 0, as are those below
    label_sum: Array | None = None  # Σ_{v≠pivot} t_v (z_v - m)
    prior: Array | None = None  # Σ_v c_v (z_v - m), for probability that is spread evenly
    moment: Array | None = None  # Σ_{v≠pivot} exp(z_v - m) (m - z_v), for the entropy; a constant
    moment_and_rest: Array | None = None  # the same with `rest`, which has the slope of both
    above: Array | None = None  # how many z are larger than that of the label; no gradient, as of ties
    ties: Array | None = None  # 0 where no class before the label has its z (above, ties and first: of `Placed`)
    first: Array | None = None  # the first class of the largest z


LABELS = ("own_mass", "rest_mass", "label_sum")
"""Of them, those that the labels' masses make."""


class Asked(NamedTuple):
    """Which sums are made besides those that the labels need. Static."""

    prior: bool = False
    moment: bool = False
    beside: bool = False  # statistics of the same logits, whose pass is this one if both take each class by itself
    forward_mode: bool = False


class Read(NamedTuple):
    """What the sums of this device's classes are made of, as it came. None where nothing asks."""

    logits: Array
    adjustment: Adjustment
    label: Array | None = None  # the pivot, counted from the first class here; None: the largest logit
    values: Array | None = None  # dense labels
    class_weights: Array | None = None
    than: tuple[Array, Array] | None = None  # a class, counted likewise, and its z, for how many are above


class Top(NamedTuple):
    """The sums around the largest z of a token alone."""

    m: Array
    top: Any  # its class; how many classes there are, where none is the largest
    rest: Array
