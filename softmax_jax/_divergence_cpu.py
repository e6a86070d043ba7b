"""The sums of a divergence by a pass each, for XLA on the CPU. May be deleted, with the line that names it.

Within a row sum stands floating-point arithmetic alone, few enough steps of it (a hundred) for XLA on the CPU to fuse.
"""

import math
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._classes import Classes
from softmax_jax._divergence_terms import (
    At,
    Pair,
    Shared,
    Shares,
    first_moment,
    log_mixture,
    log_ratio,
    probabilities,
    z_of,
)
from softmax_jax._fold_cpu import distance
from softmax_jax._passes_cpu import as_operands, sum_over_classes
from softmax_jax._sums import once_traced


class Numbers(NamedTuple):
    """The constants of a term, as operands of one pass. A clamp by constants XLA on the CPU does not fuse with a row
    sum either."""

    zero: Any
    near: Any
    minus_near: Any
    highest: Any
    lowest: Any
    log_highest: Any
    e_log_highest: Any
    series: tuple  # of ψ(r)/r² within `near`


@cache
def _numbers_of(dtype) -> Numbers:
    """1/2!, 1/3!, ... as far as the format tells; of the first power that is left out, r³/5!, what r has of it on
    average is added, which leaves 2e-6 of ψ."""
    highest, near, terms = float(jnp.finfo(dtype).max), 0.08, 8 if dtype == jnp.float64 else 3
    series = [1 / math.factorial(k) for k in range(2, 2 + terms)]
    if terms == 3:
        series[1] += 0.75 * near**2 / math.factorial(5)
    log = math.floor(math.log(highest))
    return Numbers(0, near, -near, highest, -highest, log, math.exp(log), tuple(series))


def _term(at: At, shares: Shares | None, n: Numbers) -> Array:
    """t ψ(log(m/t)), and m where t = 0."""
    r = log_mixture(at.r, shares)
    near = jnp.minimum(jnp.maximum(r, n.minus_near), n.near)
    series = reduce(lambda series, factor: factor + near * series, n.series[-2::-1], n.series[-1])
    far = (jnp.expm1(r) - jnp.expm1(near)) + (near - r)
    beyond = jnp.maximum(at.p - lax.stop_gradient(at.t) * n.e_log_highest, n.zero)  # what p is more than t exp(highest)
    return at.t * (near * near * series + far) + (beyond if shares is None else shares.gamma * beyond)


def _moment(at: At, shares: Shares | None, _: Numbers) -> Array:
    return first_moment(at, shares)


@once_traced
def divergence_sums(
    classes: Classes, pair: Pair, shared: Shared, shares: Shares | None, pivot: Array, top: Array
) -> tuple[Array, Array]:
    """(Σ_{v≠pivot} t_v ψ(log(m_v/t_v)), Σ_{v≠top} t_v log(m_v/t_v)). r is 0 where t is: 0 · inf is NaN, in a derivative
    too."""

    def others(f, arrays, shared, pivot, axis):
        b_raw, a_raw, where, scale, shares, n = arrays
        shared = jax.tree.map(lambda row: jnp.expand_dims(row, axis), shared)
        z_b, z_a = z_of(pair.b._replace(raw=b_raw), where), z_of(pair.a._replace(raw=a_raw), where)
        if shares is None:  # `rounded`, in one step less; a mixture has none left
            z_b, z_a = z_b + n.zero, z_a + n.zero
        away = distance(pivot, z_b, axis)  # 0 at the pivot, else at least 1
        tops = jnp.minimum(away, shared.b_top), jnp.minimum(away, shared.a_top)
        t, p = probabilities(z_b, z_a, scale, shared, *tops)
        bound = n.highest * jnp.minimum(lax.stop_gradient(t) * n.highest, n.highest)  # large, and 0 where t is
        highest = jnp.minimum(bound, n.log_highest)
        lowest = n.lowest * jnp.minimum(bound, n.highest) if shares is None else -highest  # -inf, or exp(-r) is finite
        return f(At(t, p, log_ratio(z_b, z_a, scale, shared, lowest, highest, n.lowest)), shares, n)

    def sum_of(f, n, place):
        arrays = pair.b.raw, pair.a.raw, pair.where, pair.scale, shares, as_operands(shared.b_m.dtype, n)
        return sum_over_classes(partial(others, f), arrays, shared, place, classes.axis)

    n = _numbers_of(shared.b_m.dtype)
    of_ratio = n._replace(near=None, minus_near=None, e_log_highest=None, series=())
    return sum_of(_term, n, pivot), sum_of(_moment, of_ratio, top)
