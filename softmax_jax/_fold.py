"""The sums of a token in one pass over its classes: one associative function joins two sets of classes.

A set has its largest logit m and the sums around its pivot, relative to m. With `high` the set of the larger m and
down = low.m - high.m ≤ 0, the set of both has

    rest       = high.rest + (low.rest + one) · exp(down)         one: the loser's own term, which joins the rest
    moment     = high.moment + exp(down) · (low.moment - (low.rest + one) · down)
    rest_mass  = high.rest_mass + low.rest_mass + low.mass        mass = high.mass
    label_sum  = high.label_sum + low.label_sum + (low.mass + low.rest_mass) · down
    prior      = high.prior + low.prior + low.each_mass · down    each_mass = high.each_mass + low.each_mass

Integer labels are the pivot themselves: a set's `rest` is without the label wherever that stands, so that one = 0, and
`own` is the label's logit. Otherwise the pivot is the top, the class of the largest logit, of equals the first, and
one = 1. Nothing here cancels: every term is of one sign.

On a GPU or TPU one `lax.reduce` reads the logits once, whatever the axis. XLA for the CPU runs it one number at a time
(34x slower): there the sums are those of `_class_passes`, one row reduction each.

A GPU reads a bfloat16 logit in the time of about twenty of its instructions; to join it to a set takes as many again,
and joining the sets of a warp's threads more. So neighbours, as many as one load has, are summed around their largest
first, which takes one exponential each and little else (`_of_neighbours`). On a TPU neighbours cannot be told apart
without a copy.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust
from softmax_jax._class_passes import beyond_exp
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, entries_of, offset, pmax, pmin, psum, vary_alike

NO_CLASS = jnp.iinfo(jnp.int32).max


class Folded(NamedTuple):
    """Of some classes of a token. None where nobody asks."""

    m: Array
    rest: Array
    top: Any = None  # None: the pivot is the label
    own: Any = None  # the label's logit as it came, 0 where it is none of these classes
    above: Any = None  # how many other z are larger than that of a label
    moment: Any = None
    mass: Any = None
    rest_mass: Any = None
    label_sum: Any = None
    each_mass: Any = None
    prior: Any = None


def combine(a: Folded, b: Folded) -> Folded:
    """Of both sets of classes: associative and commutative."""
    first = a.m > b.m if a.top is None else (a.m > b.m) | ((a.m == b.m) & (a.top < b.top))
    high, low = (jax.tree.map(lambda x, y: jnp.where(first, x, y), *pair) for pair in ((a, b), (b, a)))
    m = jnp.maximum(a.m, b.m)
    added = jax.tree.map(jnp.add, _summed(high), _summed(_lowered(low, jnp.minimum(a.m, b.m) - _finite(m))))
    return added._replace(m=m, top=high.top, mass=high.mass)


def _finite(m: Array) -> Array:
    """m, so bounded that -inf - m is -inf and not NaN."""
    return jnp.maximum(m, float(jnp.finfo(m.dtype).min))


def _lowered(low: Folded, down: Array) -> Folded:
    """What a set adds to one whose m is higher by -down and which has another pivot."""
    scale, one = jnp.exp(down), 0 if low.top is None else 1
    weighs = lambda mass: jnp.where(mass == 0, 0, mass * down)  # noqa: E731
    moment = rest_mass = label_sum = prior = None
    if low.moment is not None:
        moment = scale * (low.moment - (low.rest + one) * beyond_exp(down))
    if low.mass is not None:
        rest_mass = low.rest_mass + low.mass
        label_sum = low.label_sum + weighs(rest_mass)
    if low.each_mass is not None:
        prior = low.prior + weighs(low.each_mass)
    more = {"moment": moment, "rest_mass": rest_mass, "label_sum": label_sum, "prior": prior}
    return low._replace(rest=(low.rest + one) * scale, **more)


def _summed(part: Folded) -> Folded:
    """What is added up, and nothing else."""
    return part._replace(m=jnp.zeros_like(part.m), top=None, mass=None)


class Class(NamedTuple):
    """Of every token: a class, as its z, its logit as it came, t and c."""

    z: Array
    raw: Array
    t: Array | None = None
    c: Array | None = None


def _of_neighbours(some: Sequence[Class], first: Array, label: Array | None, than: Any, moment: bool) -> Folded:
    """The sums of the classes from `first` on, as they are written. `than` is a class and its z. (By the class too,
    since what is read elsewhere may be rounded otherwise.)

    No comparison of logits is used twice: XLA would keep it, and read the logits again. So `rest` of the top is the sum
    of all but the largest, which is exactly 1."""
    m = reduce(jnp.maximum, (v.z for v in some))
    down = [v.z - _finite(m) for v in some] if len(some) > 1 else [jnp.zeros_like(m)]
    scale = [jnp.exp(z) for z in down]
    weighed = lambda masses: _sum(jnp.where(n == 0, 0, n * z) for n, z in zip(masses, down, strict=True))  # noqa: E731
    sums = Folded(m, m)
    if than is not None:
        larger = [(v.z > than[1]) & (first != than[0] - i) for i, v in enumerate(some)]
        sums = sums._replace(above=_sum(more.astype(m.dtype) for more in larger))
    if some[0].c is not None:
        masses = [v.c for v in some]
        sums = sums._replace(each_mass=_sum(masses), prior=weighed(masses))
    if label is not None:
        here = [label - first == i for i in range(len(some))]
        return sums._replace(rest=_without(here, scale), own=_at(here, [v.raw for v in some]))
    top = jnp.full_like(m, len(some) - 1, jnp.int32)
    for i, v in list(enumerate(some))[-2::-1]:
        top = jnp.where(v.z == m, i, top)
    if moment:
        sums = sums._replace(moment=_sum(e * -beyond_exp(z) for e, z in zip(scale, down, strict=True)))
    if some[0].t is not None:
        masses, here = [v.t for v in some], [top == i for i in range(len(some))]
        more = {"mass": _at(here, masses), "rest_mass": _without(here, masses), "label_sum": weighed(masses)}
        sums = sums._replace(**more)
    return sums._replace(rest=_without_largest(scale), top=first + top)


def _sum(terms: Iterable[Array]) -> Array:
    return reduce(jnp.add, terms)


def _at(here: Sequence[Array], terms: Sequence[Array]) -> Array:
    return reduce(
        lambda at, one: jnp.where(one[0], one[1], at), zip(here, terms, strict=True), jnp.zeros_like(terms[0])
    )


def _without(here: Sequence[Array], terms: Sequence[Array]) -> Array:
    return _sum(jnp.where(at, 0, term) for at, term in zip(here, terms, strict=True))


def _without_largest(terms: Sequence[Array]) -> Array:
    largest, others = terms[0], jnp.zeros_like(terms[0])
    for term in terms[1:]:
        others, largest = others + jnp.minimum(largest, term), jnp.maximum(largest, term)
    return others


def _of_none(like: Folded) -> Folded:
    """Of no class."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    m = jnp.asarray(-jnp.inf, like.m.dtype)
    if like.top is None:
        return zeros._replace(m=m)
    return zeros._replace(m=m, rest=zeros.rest - 1, top=jnp.asarray(NO_CLASS, jnp.int32))


PLATFORMS = ("cpu",)
"""Those on which sums are passes of their own."""

LOAD, ROW = 8, 2**14
"""Of a GPU: bytes of neighbours that a thread reads at once, and the longest row that XLA does not cut into pieces of a
few hundred, for each of which a warp joins the sets of its threads."""


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
    moment: bool,
    class_axes: Names,
) -> Folded:
    """The sums of every token over `axis`, of this device's classes, whose ids are those among the classes of all
    devices along `class_axes`. t and c broadcast to the logits. A row of -inf alone has m = -inf."""
    # Where neighbours cost much more than their read, XLA makes their maxima, or what else is used twice, in a kernel by
    # itself, and reads them again: always of a tanh, of dense labels and of a moment, of more sums from 8 bytes on.
    size, plain = logits.shape[axis], adjustment.logit_scale is None and c is None and than is None
    load = 1 if t is not None or adjustment.softcap is not None or moment else LOAD if plain else LOAD // 2
    operands, alone = (logits, label, t, c, than, adjustment), Folding(axis % logits.ndim, class_axes, moment)
    if not isinstance(size, int) or entries_of(logits)[axis]:
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
    each = _of_neighbours(some, first, label, than, how.moment)
    return reduced(combine, each, _of_none(each), axis, how.parts)


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
    fit = [n for n in (8, 4, 2) if n <= most and size % n == 0 and (size < SHARDED or size // n % DEVICES == 0)]
    return fit[0] if fit else 1


def _parts(size: int) -> int:
    """The fewest equal parts of a row that are at most `ROW` long, a power of two; 1 where there are none."""
    parts = 1 << max(0, (-(-size // ROW) - 1).bit_length())
    return parts if size % (parts * DEVICES) == 0 else 1


def reduced(join: Callable, sums: Any, nothing: Any, axis: int, parts: int) -> Any:
    """The sums of all entries on `axis`, in one pass."""
    leaves, tree = jax.tree.flatten(sums)
    leaves, init = vary_alike(leaves, jax.tree.leaves(nothing))
    of_leaves = lambda a, b: tuple(jax.tree.leaves(join(tree.unflatten(a), tree.unflatten(b))))  # noqa: E731
    if parts > 1:
        in_parts = lambda a: a.reshape(*a.shape[:axis], parts, a.shape[axis] // parts, *a.shape[axis + 1 :])  # noqa: E731
        leaves = lax.reduce(tuple(map(in_parts, leaves)), tuple(init), of_leaves, (axis + 1,))
    return tree.unflatten(lax.reduce(tuple(leaves), tuple(init), of_leaves, (axis,)))


def over_devices(here: Folded, axes: Names) -> Folded:
    """`combine` of each device's sums: what is lower is brought to the highest m, and all are added."""
    if not axes:
        return here
    m = pmax(here.m, axes)
    down = jnp.where(here.m == m, 0, here.m - m)
    added = lowered = _summed(_lowered(here, down))
    if here.top is None:
        return psum(added, axes)._replace(m=m)
    top = pmin(jnp.where(here.m == m, here.top, NO_CLASS), axes)
    won = here.top == top
    added = jax.tree.map(lambda a, b: jnp.where(won, a, b), _summed(here), lowered)
    mass = None if here.mass is None else psum(jnp.where(won, here.mass, 0), axes)
    return psum(added, axes)._replace(m=m, top=top, mass=mass)
