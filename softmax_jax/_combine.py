"""Sums of a token over a set of its classes, and one associative function that joins two sets: single classes, blocks,
shards.

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
"""

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import beyond_exp
from softmax_jax._sharding import Names, pmax, pmin, psum

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
    high, low = (jax.tree.map(partial(lax.select, first), *pair) for pair in ((a, b), (b, a)))
    m = jnp.maximum(a.m, b.m)
    added = jax.tree.map(jnp.add, _summed(high), _summed(_lowered(low, jnp.minimum(a.m, b.m) - finite_max(m))))
    return added._replace(m=m, top=high.top, mass=high.mass)


def finite_max(m: Array) -> Array:
    """m, so bounded that -inf - m is -inf and not NaN."""
    return jnp.maximum(m, float(jnp.finfo(m.dtype).min))


def _lowered(low: Folded, down: Array) -> Folded:
    """What a set adds to one whose m is higher by -down and which has another pivot."""
    scale, one = jnp.exp(down), 0 if low.top is None else 1
    moment = rest_mass = label_sum = prior = None
    if low.moment is not None:
        moment = scale * (low.moment - (low.rest + one) * beyond_exp(down))
    if low.mass is not None:
        rest_mass = low.rest_mass + low.mass
        label_sum = low.label_sum + mass_times(rest_mass, down)
    if low.each_mass is not None:
        prior = low.prior + mass_times(low.each_mass, down)
    more = {"moment": moment, "rest_mass": rest_mass, "label_sum": label_sum, "prior": prior}
    return low._replace(rest=(low.rest + one) * scale, **more)


def mass_times(mass: Array, down: Array) -> Array:
    """A mass of 0 has none of a term that is infinite."""
    return jnp.where(mass == 0, 0, mass * down)


def _summed(part: Folded) -> Folded:
    """What is added up, and nothing else."""
    return part._replace(m=jnp.zeros_like(part.m), top=None, mass=None)


class Class(NamedTuple):
    """Of every token: a class, as its z, its logit as it came, t and c. None where nobody asks."""

    z: Array
    raw: Array
    t: Any = None
    c: Any = None


def of_neighbours(some: Sequence[Class], first: Array, label: Array | None, than: Any, moment: bool) -> Folded:
    """The sums of the classes from `first` on, as they are written. `than` is a class and its z. (By the class too,
    since what is read elsewhere may be rounded otherwise.)

    No comparison of logits is used twice: XLA would keep it, and read the logits again. So `rest` of the top is the sum
    of all but the largest, which is exactly 1."""
    m, top = _largest([v.z for v in some])
    down = [v.z - finite_max(m) for v in some] if len(some) > 1 else [jnp.zeros_like(m)]
    scale = [jnp.exp(z) for z in down]
    sums = Folded(m, m)
    if than is not None:
        larger = [(v.z > than[1]) & (first != than[0] - i) for i, v in enumerate(some)]
        sums = sums._replace(above=_sum(more.astype(m.dtype) for more in larger))
    if some[0].c is not None:
        masses = [v.c for v in some]
        sums = sums._replace(each_mass=_sum(masses), prior=_sum(map(mass_times, masses, down)))
    if label is not None:
        here = [label - first == i for i in range(len(some))]
        return sums._replace(rest=_without(here, scale), own=_at(here, [v.raw for v in some]))
    if moment:
        sums = sums._replace(moment=_sum(e * -beyond_exp(z) for e, z in zip(scale, down, strict=True)))
    if some[0].t is not None:
        masses, here = [v.t for v in some], [top == i for i in range(len(some))]
        sums = sums._replace(mass=_at(here, masses), rest_mass=_without(here, masses))
        sums = sums._replace(label_sum=_sum(map(mass_times, masses, down)))
    return sums._replace(rest=_without_largest(scale), top=first + top)


def _largest(some: Sequence[Array]) -> tuple[Array, Array]:
    """The largest and its place, of equals the first. Each is compared with those before it: for a comparison with the
    largest of all, XLA makes that in a kernel of its own on an A100, and reads the logits twice more."""
    m, top = some[0], jnp.zeros_like(some[0], jnp.int32)
    for i, z in enumerate(some[1:], 1):
        m, top = jnp.maximum(m, z), jnp.where(z > m, i, top)
    return m, top


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


def of_none(like: Folded) -> Folded:
    """Of no class."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    m = jnp.asarray(-jnp.inf, like.m.dtype)
    if like.top is None:
        return zeros._replace(m=m)
    return zeros._replace(m=m, rest=zeros.rest - 1, top=jnp.asarray(NO_CLASS, jnp.int32))


def over_devices(here: Folded, axes: Names) -> Folded:
    """`combine` of each device's sums: what is lower is brought to the highest m, and all are added."""
    if not axes:
        return here
    m = pmax(here.m, axes)
    down = here.m - finite_max(m)
    added = lowered = _summed(_lowered(here, down))
    if here.top is None:
        return psum(added, axes)._replace(m=m)
    top = pmin(jnp.where(here.m == m, here.top, NO_CLASS), axes)
    won = here.top == top
    added = jax.tree.map(lambda a, b: jnp.where(won, a, b), _summed(here), lowered)
    mass = None if here.mass is None else psum(jnp.where(won, here.mass, 0), axes)
    return psum(added, axes)._replace(m=m, top=top, mass=mass)
