"""The sums of a token in one pass over its classes, and the one place that chooses it.

On a GPU or TPU one `lax.reduce` reads the logits once, whatever the axis. XLA for the CPU runs it one number at a time
(34x slower): there the sums are those of `_class_passes`, one row reduction each.

A GPU reads a bfloat16 logit in the time of about twenty of its instructions; to join it to a set takes as many again,
and joining the sets of a warp's threads more. So neighbours, as many as one load has, are summed around their largest
first, which takes one exponential each and little else (`of_neighbours`). On a TPU neighbours cannot be told apart
without a copy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust
from softmax_jax._combine import Class, Folded, combine, of_neighbours, of_none
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, entries_of, offset, vary_alike

PLATFORMS = ("cpu",)
"""Those on which sums are passes of their own."""

LOAD, SHORT, ROW = 8, 128, 2**14
"""Of a GPU: bytes of neighbours that a thread reads at once; the shortest row that is worth it; the longest that XLA
does not cut into pieces of a few hundred, for each of which a warp joins the sets of its threads."""


def by_platform(by_passes: Callable, by_fold: Callable, *operands: Any) -> Any:
    """The one place at which the ways part."""
    return lax.platform_dependent(*operands, default=by_fold, **dict.fromkeys(PLATFORMS, by_passes))


class Folding(NamedTuple):
    """Static."""

    axis: int
    class_axes: Names
    moment: bool
    neighbours: int = 1  # how many of a token's classes are summed before the reduction
    parts: int = 1  # of how many equal parts a row then is


def fold(
    logits: Array,
    label: Array | None,
    t: Array | None,
    c: Array | None,
    than: tuple[Array, Array] | None,
    adjustment: Adjustment,
    axis: int,
    class_axes: Names,
    moment: bool = False,
    one_by_one: bool = False,
) -> Folded:
    """The sums of every token over `axis`, of this device's classes, whose ids are those among the classes of all
    devices along `class_axes`. t and c broadcast to the logits. A row of -inf alone has m = -inf."""
    # Where neighbours cost much more than their read, XLA makes their maxima, or what else is used twice, in another
    # kernel, and reads them again: always of a tanh, of dense labels and of a moment, of more sums from 8 bytes on.
    size, plain = logits.shape[axis], adjustment.logit_scale is None and c is None and than is None
    one_by_one = one_by_one or moment or t is not None or adjustment.softcap is not None
    load = 1 if one_by_one else LOAD if plain else LOAD // 2
    operands, alone = (logits, label, t, c, than, adjustment), Folding(axis % logits.ndim, class_axes, moment)
    if not isinstance(size, int) or size < SHORT or entries_of(logits)[axis]:
        return _fold(alone, *operands)
    neighbours = _neighbours(size, load // logits.dtype.itemsize)
    how = alone._replace(neighbours=neighbours, parts=_parts(size // neighbours))
    if how == alone:
        return _fold(alone, *operands)
    return lax.platform_dependent(*operands, tpu=partial(_fold, alone), default=partial(_fold, how))


def _fold(how: Folding, logits, label, t, c, than, adjustment):
    axis, size, step = how.axis, logits.shape[how.axis], how.neighbours
    label, than = jax.tree.map(lambda row: jnp.expand_dims(row, axis), (label, than))

    def every(place: int) -> Class:
        take = lambda a: _every(a, place, step, axis) if a.ndim and a.shape[axis] == size else a  # noqa: E731
        raw, adjusted, *masses = jax.tree.map(take, (logits, adjustment, t, c))
        z = upcast(adjust(raw, adjusted))
        return Class(z, upcast(raw), *jax.tree.map(lambda a: jnp.broadcast_to(a, z.shape).astype(z.dtype), masses))

    some = [every(place) for place in range(step)]
    first = lax.broadcasted_iota(jnp.int32, some[0].z.shape, axis) * step + offset(size, how.class_axes)
    each = of_neighbours(some, first, label, than, how.moment)
    return reduced(combine, each, of_none(each), axis, how.parts)


def _every(a: Array, first: int, step: int, axis: int) -> Array:
    """Every `step`-th entry."""
    if step == 1:
        return a
    split = a.reshape(*a.shape[:axis], a.shape[axis] // step, step, *a.shape[axis + 1 :])
    return lax.index_in_dim(split, first, axis + 1, keepdims=False)


# Classes that are sharded automatically, over how many devices nobody tells, stay where they lie if each device has a
# whole number of neighbourhoods, and of parts, or of each part an equal share.

SHARDED, DEVICES = 2**13, 32
"""So many classes may be, over so many devices."""


def _neighbours(size: int, most: int) -> int:
    fit = [n for n in (4, 2) if n <= most and size % n == 0 and (size < SHARDED or size // n % DEVICES == 0)]
    return fit[0] if fit else 1


def _parts(size: int) -> int:
    """The fewest equal parts of a row that are at most `ROW` long, a power of two; 1 where there are none."""
    parts = 1 << max(0, (-(-size // ROW) - 1).bit_length())
    return parts if size % (parts * DEVICES) == 0 else 1


def reduced(join: Callable, sums: Any, nothing: Any, axis: int, parts: int = 1) -> Any:
    """The sums of all entries on `axis`, in one pass."""
    leaves, tree = jax.tree.flatten(sums)
    leaves, init = vary_alike(leaves, jax.tree.leaves(nothing))
    of_leaves = lambda a, b: tuple(jax.tree.leaves(join(tree.unflatten(a), tree.unflatten(b))))  # noqa: E731
    if parts > 1:
        in_parts = lambda a: a.reshape(*a.shape[:axis], parts, a.shape[axis] // parts, *a.shape[axis + 1 :])  # noqa: E731
        leaves = lax.reduce(tuple(map(in_parts, leaves)), tuple(init), of_leaves, (axis + 1,))
    return tree.unflatten(lax.reduce(tuple(leaves), tuple(init), of_leaves, (axis,)))
