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

On a GPU or TPU one `lax.reduce` is one kernel and one read of the logits, whatever the axis. XLA for the CPU runs it
one number at a time (34x slower): there the sums are those of `_class_passes`, one row reduction each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust
from softmax_jax._class_passes import beyond_exp
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, offset, pmax, pmin, psum, vary_alike

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
    joined = _lowered(low, jnp.where(low.m == high.m, 0, low.m - high.m))  # -inf - -inf is NaN
    added = jax.tree.map(jnp.add, _summed(high), _summed(joined))
    return added._replace(m=jnp.maximum(a.m, b.m), top=high.top, mass=high.mass)


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


def _of_class(z: Array, ids: Array, raw: Any, label: Any, t: Any, c: Any, than: Any, moment: bool) -> Folded:
    """Of every class by itself: its z, its t and c; `raw` is its logit as it came, `than` a class and its z. (By the
    class too, since what is read elsewhere may be rounded otherwise.)"""
    zero = jnp.zeros_like(z)
    of = lambda asked: None if asked is None else zero  # noqa: E731
    above = None if than is None else ((z > than[1]) & (ids != than[0])).astype(z.dtype)
    if label is None:
        moment_of_one = zero if moment else None
        return Folded(z, zero, ids, None, above, moment_of_one, t, of(t), of(t), c, of(c))
    here = ids == label
    return Folded(z, 1 - here.astype(z.dtype), None, jnp.where(here, raw, 0), above, each_mass=c, prior=of(c))


def _of_none(like: Folded) -> Folded:
    """Of no class."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    m = jnp.asarray(-jnp.inf, like.m.dtype)
    if like.top is None:
        return zeros._replace(m=m)
    return zeros._replace(m=m, rest=zeros.rest - 1, top=jnp.asarray(NO_CLASS, jnp.int32))


PLATFORMS = ("cpu",)
"""Those on which sums are passes of their own."""


def by_platform(by_passes: Callable, by_fold: Callable, *operands: Any) -> Any:
    """The one place at which the two ways part."""
    return lax.platform_dependent(*operands, default=by_fold, **dict.fromkeys(PLATFORMS, by_passes))


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
    z = upcast(adjust(logits, adjustment))
    ids = lax.broadcasted_iota(jnp.int32, z.shape, axis) + offset(z.shape[axis], class_axes)
    label, than = jax.tree.map(lambda row: jnp.expand_dims(row, axis), (label, than))
    t, c = (None if a is None else jnp.broadcast_to(a, z.shape).astype(z.dtype) for a in (t, c))
    each = _of_class(z, ids, upcast(logits), label, t, c, than, moment)
    leaves, tree = jax.tree.flatten(each)
    leaves, init = vary_alike(leaves, jax.tree.leaves(_of_none(each)))
    join = lambda a, b: tuple(jax.tree.leaves(combine(tree.unflatten(a), tree.unflatten(b))))  # noqa: E731
    return tree.unflatten(lax.reduce(tuple(leaves), tuple(init), join, (axis,)))


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
