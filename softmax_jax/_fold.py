"""The sums of a token in one pass over its classes.

On a GPU or TPU one `lax.reduce` reads the logits once, whatever the axis; on the CPU `_fold_cpu` makes the same sums.

A GPU reads a bfloat16 logit in the time of about twenty of its instructions; to join it to a set takes as many again,
and joining the sets of a warp's threads more. So neighbours, as many as one load has, are summed around their largest
first, which takes one exponential each and little else (`of_neighbours`). On a TPU neighbours cannot be told apart
without a copy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax import _fold_cpu
from softmax_jax._adjustment import Adjustment, adjust, scaled, shifted
from softmax_jax._classes import Classes, in_parts
from softmax_jax._combine import Class, Folded, combine, of_neighbours, of_none, over_devices
from softmax_jax._dtypes import accumulator, upcast
from softmax_jax._labels import Dense, Placed, of_existing
from softmax_jax._masses import uniform
from softmax_jax._platform import by_platform
from softmax_jax._sharding import entries_of, pmax, psum, vary, vary_alike, varying
from softmax_jax._sums import Asked, ClassSums, Tokens, Top, once_traced

LOAD, SHORT, ROW = 8, 128, 2**14
"""Of a GPU: bytes of neighbours that a thread reads at once; the shortest row that is worth it (a softmax's on a TPU
too); the longest that XLA does not cut into pieces of a few hundred, for each of which a warp joins the sets of its
threads."""


def class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    """(the sums of every token, its pivot)."""
    how = {"classes": classes, "asked": asked}
    return by_platform(partial(_fold_cpu.class_sums, **how), partial(_class_sums, **how), tokens)


def top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> Top:
    by_passes, by_fold = (partial(f, classes=classes) for f in (_fold_cpu.top_sums, _top_sums))
    return by_platform(by_passes, by_fold, logits, adjustment)


def rest_of_scaled(*operands: Any, classes: Classes) -> Array:
    """`rest_of_top` at a scale, of (logits, adjustment, scale, m, top)."""
    by_passes, written = (partial(f, classes=classes) for f in (_fold_cpu.rest_of_top, rest_of_top))
    return by_platform(by_passes, written, *operands)


def rest_of_top(
    logits: Array, adjustment: Adjustment, scale: Array | None, m: Array, top: Array, classes: Classes
) -> Array:
    """Σ_{v≠top} exp(scale · (z_v - m)), of all devices' classes."""
    z = scaled(shifted(logits, adjustment, m, classes.axis), vary(scale, varying(logits)))
    others = jnp.where(classes.is_at(top - classes.first(logits), z), 0, jnp.exp(z))
    return psum(jnp.sum(others, classes.axis), classes.over)


@once_traced
def _class_sums(tokens: Tokens, classes: Classes, asked: Asked) -> tuple[ClassSums, Array]:
    logits, labels, class_weights, adjustment, _ = tokens
    dtype, label, first = accumulator(logits.dtype), labels.pivot, classes.first(logits)
    # (Of `Placed` the masses are the same without an array of the logits' size.)
    t = labels.target(tokens, classes, dtype) if isinstance(labels, Dense) else None
    c = uniform(class_weights, adjustment.where, jnp.ones_like(logits, dtype)) if asked.prior else None
    than = (labels.ids, labels.z) if isinstance(labels, Placed) else None
    read = Read(logits, adjustment, label, t, c, than)
    found = fold(read, classes, moment=asked.moment, one_by_one=asked.beside)
    if label is not None:
        own = classes.if_here(partial(_adjusted, found.own, adjustment, classes), label - first, logits)
        found = found._replace(own=of_existing(own, label, tokens, classes))
    found = over_devices(found, classes.over)
    m, top, rest = _settled(found, classes.of_all(logits))
    pivot = top if label is None else label
    own = of_existing(m - m, top, tokens, classes) if label is None else found.own - m
    of_labels: Any = found.mass, found.rest_mass, found.label_sum
    if not isinstance(labels, Dense):
        of_labels = psum(labels.masses(tokens, m, pivot - first, classes), classes.over)
    sums = ClassSums(m, rest, own, *of_labels, prior=found.prior, moment=found.moment)
    if isinstance(labels, Placed):
        ties = pmax((found.top != labels.ids).astype(dtype), classes.over)
        sums = sums._replace(above=found.above, ties=ties, first=found.top.astype(dtype))
    return sums, pivot


def _adjusted(own: Array, adjustment: Adjustment, classes: Classes, ids: Array) -> Array:
    """z of a token's label, of its logit as it came."""
    where = None if adjustment.where is None else classes.pick(ids, adjustment.where)
    return upcast(adjust(own, adjustment._replace(where=where)))


@once_traced
def _top_sums(logits: Array, adjustment: Adjustment, classes: Classes) -> Top:
    found = fold(Read(logits, adjustment), classes)
    return _settled(over_devices(found, classes.over), classes.of_all(logits))


def _settled(found: Folded, classes: int) -> Top:
    """Of all classes: m is 0 in a row of -inf alone, and rest NaN in one that holds NaN or +inf, as m - m is."""
    lacking = found.m == -jnp.inf
    m = jnp.where(lacking, 0, found.m)
    top = None if found.top is None else jnp.where(lacking | jnp.isnan(m), classes, found.top)
    return Top(m, top, jnp.where(lacking, 0, found.rest) + (m - m))


class Read(NamedTuple):
    """What one pass over the classes reads; t and c broadcast to the logits. None where nothing asks."""

    logits: Array
    adjustment: Adjustment
    label: Array | None = None  # the pivot; None: the largest logit
    t: Array | None = None
    c: Array | None = None
    than: tuple[Array, Array] | None = None  # a class and its z, for how many are above


def fold(read: Read, classes: Classes, moment: bool = False, one_by_one: bool = False) -> Folded:
    """The sums of every token over this device's classes, whose ids are those among the classes of all devices. A row
    of -inf alone has m = -inf."""
    # Where neighbours cost much more than their read, XLA makes their maxima, or what else is used twice, in another
    # kernel, and reads them again: always of a tanh, of dense labels and of a moment, of more sums from 8 bytes on.
    plain = read.adjustment.logit_scale is None and read.c is None and read.than is None
    one_by_one = one_by_one or moment or read.t is not None or read.adjustment.softcap is not None
    load = 1 if one_by_one else LOAD if plain else LOAD // 2
    return by_neighbours(partial(_fold, classes=classes, moment=moment), classes.axis, load, read.logits, read)


def by_neighbours(f: Callable, axis: int, load: int, like: Array, *operands: Any) -> Any:
    """f(*operands, step, parts): a reduction of `load` bytes of arrays like that at a time."""
    size, step, parts = like.shape[axis], 1, 1
    if isinstance(size, int) and not entries_of(like)[axis]:
        if axis < like.ndim - 1 and size > FEW:
            step = _of_columns(size)
        elif size >= SHORT:
            step = _neighbours(size, load // like.dtype.itemsize)
            parts = _parts(size // step)
    one_by_one, together = partial(f, step=1, parts=1), partial(f, step=step, parts=parts)
    if step == parts == 1:
        return one_by_one(*operands)
    return lax.platform_dependent(*operands, tpu=one_by_one, default=together)


def _fold(read: Read, *, classes: Classes, moment: bool, step: int, parts: int) -> Folded:
    """`step` of a token's classes are summed before the reduction; a row then is `parts` equal parts."""
    logits, adjustment, _, t, c, _ = read
    axis, size = classes.axis, logits.shape[classes.axis]
    label, than = jax.tree.map(classes.along, (read.label, read.than))
    shape = [-(-size // step) if a == axis else n for a, n in enumerate(logits.shape)]
    first = lax.broadcasted_iota(jnp.int32, shape, axis) * step

    def every(place: int) -> Class:
        take = partial(every_of, first=place, step=step, axis=axis)
        raw, adjusted, *masses = jax.tree.map(take, (logits, adjustment, t, c))
        z = upcast(adjust(raw, adjusted))
        z = z if size % step == 0 else jnp.where(first < size - place, z, -jnp.inf)
        return Class(z, upcast(raw), *jax.tree.map(lambda a: jnp.broadcast_to(a, z.shape).astype(z.dtype), masses))

    each = of_neighbours([*map(every, range(step))], first + classes.first(logits), label, than, moment)
    return reduced(combine, each, of_none(each), axis, parts)


def every_of(a: Array, first: int, step: int, axis: int) -> Array:
    """Every `step`-th entry, 0 beyond the last; what is the same for all, as it is."""
    if step == 1 or not a.ndim or a.shape[axis] == 1:
        return a
    if missing := -a.shape[axis] % step:
        a = jnp.pad(a, [(0, missing if i == axis else 0) for i in range(a.ndim)])
    return lax.index_in_dim(in_parts(a, a.shape[axis] // step, axis), first, axis + 1, keepdims=False)


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


def reduced(join: Callable, sums: Any, nothing: Any, axis: int, parts: int = 1) -> Any:
    """The sums of all entries on `axis`, in one pass."""
    leaves, tree = jax.tree.flatten(sums)
    leaves, init = vary_alike(leaves, jax.tree.leaves(nothing))

    def of_leaves(a, b):
        return tuple(jax.tree.leaves(join(tree.unflatten(a), tree.unflatten(b))))

    if parts > 1:
        leaves = lax.reduce(tuple(in_parts(a, parts, axis) for a in leaves), tuple(init), of_leaves, (axis + 1,))
    return tree.unflatten(lax.reduce(tuple(leaves), tuple(init), of_leaves, (axis,)))
