"""The sums of a token in one pass over its classes, for GPUs and TPUs: one `lax.reduce` reads the logits once, whatever
the axis.

A GPU reads a bfloat16 logit in the time of about twenty of its instructions; to join it to a set takes as many again,
and joining the sets of a warp's threads more. So neighbours, as many as one load has, are summed around their largest
first, which takes one exponential each and little else (`of_neighbours`). On a TPU neighbours cannot be told apart
without a copy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._devices import mesh_axes_of, vary_alike
from softmax_jax._inputs.arrays import upcast
from softmax_jax._inputs.options import adjust, even_targets, weighted_targets
from softmax_jax._sums.combine import ClassTerm, combine, sums_of_neighbours, sums_of_no_class
from softmax_jax._sums.waist import ClassSums, Tokens

LOAD, SHORT, ROW = 8, 128, 2**14
"""Of a GPU: bytes of neighbours that a thread reads at once; the shortest row that is worth it; the longest that XLA
does not cut into pieces of a few hundred, for each of which a warp joins the sets of its threads."""


def sums_in_one_pass(tokens: Tokens, *, axis: int) -> ClassSums:
    """The sums of every token, for operands of the logits' rank with the classes on `axis`."""
    # Where neighbours cost much more than their read, XLA makes their maxima, or what else is used twice, in another
    # kernel, and reads them again: always of a tanh, of dense labels and of a moment, of more sums from 8 bytes on.
    extra, adjustment = tokens.extra, tokens.adjustment
    one_by_one = extra.shares_pass or extra.statistics or tokens.values is not None or adjustment.softcap is not None
    load = 1 if one_by_one else LOAD if adjustment.logit_scale is None and not extra.even else LOAD // 2
    found = by_neighbours(partial(_fold, axis=axis), axis, load, tokens.logits, tokens)
    return jax.tree.map(lambda a: jnp.expand_dims(a, axis), found)


def by_neighbours(f: Callable, axis: int, load: int, like: Array, *operands: Any) -> Any:
    """f(*operands, step, parts): a reduction of `load` bytes of arrays like that at a time."""
    size, step, parts = like.shape[axis], 1, 1
    if isinstance(size, int) and not mesh_axes_of(like)[axis]:
        if axis < like.ndim - 1 and size > FEW:
            step = _of_columns(size)
        elif size >= SHORT:
            step = _neighbours(size, load // like.dtype.itemsize)
            parts = _parts(size // step)
    one_by_one, together = partial(f, step=1, parts=1), partial(f, step=step, parts=parts)
    if step == parts == 1:
        return one_by_one(*operands)
    return lax.platform_dependent(*operands, tpu=one_by_one, default=together)


def _fold(tokens: Tokens, *, axis: int, step: int, parts: int) -> ClassSums:
    """`step` of a token's classes are summed before the reduction; a row then is `parts` equal parts."""
    size = tokens.logits.shape[axis]
    shape = [-(-size // step) if a == axis else n for a, n in enumerate(tokens.logits.shape)]
    first = lax.broadcasted_iota(jnp.int32, shape, axis) * step

    def every(place: int) -> ClassTerm:
        take = partial(every_nth, first=place, step=step, axis=axis)
        of_classes = tokens.logits, tokens.adjustment, tokens.values, tokens.class_weights
        raw, adjusted, values, class_weights = jax.tree.map(take, of_classes)
        z = upcast(adjust(raw, adjusted))
        t = None
        if values is not None:
            t = weighted_targets(jnp.broadcast_to(values, z.shape), class_weights, adjusted.where, z.dtype)
        c = even_targets(class_weights, adjusted.where, z) if tokens.extra.even else None
        if size % step:
            exists = first < size - place
            z, c = jnp.where(exists, z, -jnp.inf), None if c is None else jnp.where(exists, c, 0)
        return ClassTerm(z, upcast(raw), t, c)

    each = sums_of_neighbours([*map(every, range(step))], first, tokens)
    found = reduced(combine, each, sums_of_no_class(each), axis, parts)
    if tokens.label is None:
        return found
    return found._replace(rest=jnp.where(found.row_max == -jnp.inf, 0, found.rest))  # a class alone: exp(-inf - -inf)


def every_nth(a: Array, first: int, step: int, axis: int) -> Array:
    """Every `step`-th entry, 0 beyond the last; what is the same for all, as it is."""
    if step == 1 or not a.ndim or a.shape[axis] == 1:
        return a
    if missing := -a.shape[axis] % step:
        a = jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
    return lax.index_in_dim(_in_parts(a, a.shape[axis] // step, axis), first, axis + 1, keepdims=False)


# Classes that are sharded automatically, over how many devices nobody tells, stay where they lie if each device has a
# whole number of neighbourhoods, and of parts, or of each part an equal share.

SHARDED, DEVICES = 2**13, 32
"""So many classes may be, over so many devices."""


def _neighbours(size: int, most: int) -> int:
    return next(iter(_that_stay(size, [n for n in (4, 2) if n <= most])), 1)


def _that_stay(size: int, steps: Sequence[int]) -> list[int]:
    return [n for n in steps if size % n == 0 and (size < SHARDED or size // n % DEVICES == 0)]


FEW, COLUMNS = 32, (8, 16)
"""Classes on another axis than the last: up to so many are reduced as they are, of more so many neighbours are summed
first. There XLA on a GPU reads what it reduces as it is made for one or two sums; for more it writes that out (bfloat16
8 x 150 x 256 x 256 for an H200: of integer labels 7 times the logits are moved, with 15 neighbours 1.1)."""


def _of_columns(size: int) -> int:
    fewest, most = COLUMNS
    steps = _that_stay(size, range(most, 1, -1))
    if size < SHARDED:
        steps = [n for n in steps if n >= fewest] or [fewest]
    return steps[0] if steps else 1


def _parts(size: int) -> int:
    """The fewest equal parts of a row that are at most `ROW` long, a power of two; 1 where there are none."""
    parts = 1 << max(0, (-(-size // ROW) - 1).bit_length())
    return parts if size % (parts * DEVICES) == 0 else 1


def _in_parts(a: Array, parts: int, axis: int) -> Array:
    """With the axis as so many equal parts: [.., parts, size, ..]."""
    return a.reshape(*a.shape[:axis], parts, a.shape[axis] // parts, *a.shape[axis + 1 :])


def reduced(join: Callable, sums: Any, nothing: Any, axis: int, parts: int = 1) -> Any:
    """The sums of all entries on `axis`, in one pass."""
    leaves, tree = jax.tree.flatten(sums)
    leaves, init = vary_alike(leaves, jax.tree.leaves(nothing))

    def of_leaves(a: tuple, b: tuple) -> tuple:
        return tuple(jax.tree.leaves(join(tree.unflatten(a), tree.unflatten(b))))

    if parts > 1:
        leaves = lax.reduce(tuple(_in_parts(a, parts, axis) for a in leaves), tuple(init), of_leaves, (axis + 1,))
    return tree.unflatten(lax.reduce(tuple(leaves), tuple(init), of_leaves, (axis,)))
