"""Sums of a token over a set of its classes, and one associative function that joins two sets: single classes, blocks,
shards.

A set has its largest logit m and the sums around its pivot, relative to m. With `high` the set of the larger m and
shift = low.m - high.m ≤ 0, the set of both has

    rest       = high.rest + (low.rest + one) · exp(shift)         one: the loser's own term, which joins the rest
    moment     = high.moment + exp(shift) · (low.moment - (low.rest + one) · shift)
    other_mass = high.other_mass + low.other_mass + low.own_mass        own_mass = high.own_mass
    label_sum  = high.label_sum + low.label_sum + (low.own_mass + low.other_mass) · shift
    even_sum   = high.even_sum + low.even_sum + low.even_mass · shift    even_mass = high.even_mass + low.even_mass

Integer labels are the pivot themselves: a set's `rest` is without the label wherever that stands, so that one = 0; the
set holds the label's logit, and no pivot. Otherwise the pivot is the top, the class of the largest logit, of equals the
first, and one = 1. Nothing here cancels: every term is of one sign.
"""

from collections.abc import Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._devices import AxisNames, pmax, pmin, psum
from softmax_jax._inputs.options import clip_for_exp
from softmax_jax._sums.waist import ClassSums, Tokens

NO_CLASS = jnp.iinfo(jnp.int32).max


def combine(a: ClassSums, b: ClassSums) -> ClassSums:
    """Of both sets of classes: associative and commutative."""
    first = a.row_max > b.row_max
    if a.pivot is not None:
        first |= (a.row_max == b.row_max) & (a.pivot < b.pivot)
    high, low = (jax.tree.map(partial(lax.select, first), *pair) for pair in ((a, b), (b, a)))
    m = jnp.maximum(a.row_max, b.row_max)
    lowered = _rebased(low, jnp.minimum(a.row_max, b.row_max) - finite_max(m))
    added = jax.tree.map(jnp.add, _summed(high), _summed(lowered))
    return added._replace(row_max=m, pivot=high.pivot, own_mass=high.own_mass)


def finite_max(m: Array) -> Array:
    """m, so bounded that -inf - m is -inf and not NaN."""
    return jnp.maximum(m, float(jnp.finfo(m.dtype).min))


def _rebased(low: ClassSums, shift: Array) -> ClassSums:
    """What a set adds to one whose m is higher by -shift and which has another pivot."""
    scale, one = jnp.exp(shift), 0 if low.pivot is None else 1
    moment = other_mass = label_sum = even_sum = None
    if low.moment is not None:
        moment = scale * (low.moment - (low.rest + one) * clip_for_exp(shift))
    if low.own_mass is not None:
        other_mass = low.other_mass + low.own_mass
        label_sum = low.label_sum + mass_times(other_mass, shift)
    if low.even_mass is not None:
        even_sum = low.even_sum + mass_times(low.even_mass, shift)
    more = {"moment": moment, "other_mass": other_mass, "label_sum": label_sum, "even_sum": even_sum}
    return low._replace(rest=(low.rest + one) * scale, **more)


def mass_times(mass: Array, shift: Array) -> Array:
    """A mass of 0 has none of a term that is infinite."""
    return jnp.where(mass == 0, 0, mass * shift)


def _summed(part: ClassSums) -> ClassSums:
    """What is added up, and nothing else."""
    return part._replace(row_max=jnp.zeros_like(part.row_max), pivot=None, own_mass=None)


class ClassTerm(NamedTuple):
    """One class of every token: its z, its logit as it came, t and c. None where nobody asks."""

    z: Array
    raw: Array
    t: Any = None
    c: Any = None


def sums_of_neighbours(some: Sequence[ClassTerm], first: Array, tokens: Tokens) -> ClassSums:
    """The sums of `some` classes, from `first` on, as they are written.

    No comparison of logits is used twice: XLA would keep it, and read the logits again. So `rest` of the top is the sum
    of all but the largest, which is exactly 1."""
    m, top = _largest([v.z for v in some])
    centred = [v.z - finite_max(m) for v in some] if len(some) > 1 else [jnp.zeros_like(m)]
    scale, more = [jnp.exp(z) for z in centred], {}
    if some[0].c is not None:
        masses = [v.c for v in some]
        more |= {"even_mass": _add(masses), "even_sum": _add(map(mass_times, masses, centred))}
    if tokens.label is not None:
        here = [tokens.label - first == i for i in range(len(some))]
        return ClassSums(m, _sum_except(here, scale), label_logit=_select_at(here, [v.raw for v in some]), **more)
    if tokens.extra.statistics:  # (by the class too: the label's z is read elsewhere, and may be rounded otherwise)
        ids, label_z = tokens.labels.ids, tokens.labels.z
        larger = [(v.z > label_z) & (first != ids - i) for i, v in enumerate(some)]
        moment = _add(e * -clip_for_exp(z) for e, z in zip(scale, centred, strict=True))
        more |= {"above": _add(each.astype(m.dtype) for each in larger), "moment": moment}
    if some[0].t is not None:
        masses, here = [v.t for v in some], [top == i for i in range(len(some))]
        more |= {"own_mass": _select_at(here, masses), "other_mass": _sum_except(here, masses)}
        more["label_sum"] = _add(map(mass_times, masses, centred))
    return ClassSums(m, _sum_except_largest(scale), first + top, **more)


def _largest(some: Sequence[Array]) -> tuple[Array, Array]:
    """The largest and its place, of equals the first. Each is compared with those before it: for a comparison with the
    largest of all, XLA makes that in a kernel of its own on an A100, and reads the logits twice more."""
    m, top = some[0], jnp.zeros_like(some[0], jnp.int32)
    for i, z in enumerate(some[1:], 1):
        m, top = jnp.maximum(m, z), jnp.where(z > m, i, top)
    return m, top


def _add(terms: Iterable[Array]) -> Array:
    return reduce(jnp.add, terms)


def _select_at(here: Sequence[Array], terms: Sequence[Array]) -> Array:
    return reduce(
        lambda at, one: jnp.where(one[0], one[1], at), zip(here, terms, strict=True), jnp.zeros_like(terms[0])
    )


def _sum_except(here: Sequence[Array], terms: Sequence[Array]) -> Array:
    return _add(jnp.where(at, 0, term) for at, term in zip(here, terms, strict=True))


def _sum_except_largest(terms: Sequence[Array]) -> Array:
    largest, others = terms[0], jnp.zeros_like(terms[0])
    for term in terms[1:]:
        others, largest = others + jnp.minimum(largest, term), jnp.maximum(largest, term)
    return others


def sums_of_no_class(like: ClassSums) -> ClassSums:
    """Of no class."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    m = jnp.asarray(-jnp.inf, like.row_max.dtype)
    if like.pivot is None:
        return zeros._replace(row_max=m)
    return zeros._replace(row_max=m, rest=zeros.rest - 1, pivot=jnp.asarray(NO_CLASS, jnp.int32))


def combine_devices(here: ClassSums, axes: AxisNames) -> ClassSums:
    """`combine` of each device's sums: what is lower is brought to the highest m, and all are added."""
    if not axes:
        return here
    m = pmax(here.row_max, axes)
    shift = here.row_max - finite_max(m)
    added = lowered = _summed(_rebased(here, shift))
    if here.pivot is None:
        return psum(added, axes)._replace(row_max=m)
    top = pmin(jnp.where(here.row_max == m, here.pivot, NO_CLASS), axes)
    won = here.pivot == top
    added = jax.tree.map(lambda a, b: jnp.where(won, a, b), _summed(here), lowered)
    mass = None if here.own_mass is None else psum(jnp.where(won, here.own_mass, 0), axes)
    return psum(added, axes)._replace(row_max=m, pivot=top, own_mass=mass)
