"""The divergence of two softmaxes over the classes of one token, from the logits of both.

Write t = softmax(b) and p = softmax(a), m = β t + γ p with γ = 1 - β, r_v = log(p_v / t_v). Asked for are

    KL(t ‖ p)      and the mixture      β KL(t ‖ m) + γ KL(p ‖ m)

Each is a difference of entropies, which are large where the divergence is not. But since Σ_v t_v = Σ_v p_v = 1,

    KL(t ‖ p) = Σ_v t_v ψ(r_v)        ψ(r) = exp(r) - 1 - r ≥ 0

has no negative term, and an error of r that all classes share comes in squared. ψ is a series near 0; beyond it
t ψ(r) = p - t - t r. A mixture has, without a cancellation,

    log(m/p) = log1p(β expm1(-r))    log(m/t) = log(m/p) + r        if β ≤ γ
    log(m/t) = log1p(γ expm1(r))     log(m/p) = log(m/t) - r        else

r itself is (a_v - b_v) - (max a - max b) - (nll_a - nll_b), where nll = -log of the top's probability does not cancel:
where the two nearly agree the first difference is exact, once the larger is rid of the offset between them by a number
of its own grid. At the top class c of b, the pivot, all this is done by itself from numbers of the token: if c is also
the top of a, then r_c = nll_b - nll_a, however close both are to 0.

What both are multiplied by, the inverse temperature `scale`, comes after the differences: t = softmax(scale · b), and
scale · (a_v - b_v) stands where (a_v - b_v) does above. Scaled first, each would be rounded by itself.
"""

import math
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, rounded
from softmax_jax._class_passes import distance, is_at, pick_of_all, scaled
from softmax_jax._class_sums import rest_of_top, top_sums
from softmax_jax._dtypes import nan_unless, upcast
from softmax_jax._fold import by_platform
from softmax_jax._passes import apart, as_operands, sum_over_classes
from softmax_jax._sharding import count, offset, psum, vary, varying
from softmax_jax._token_loss import negative_log_likelihood


class Logits(NamedTuple):
    """One of the two."""

    raw: Array
    adjustment: Adjustment  # without `where`, which both share


class Shared(NamedTuple):
    """What the classes of a token share: the maxima of b and a, their probabilities, and the offset between the two."""

    b_m: Array
    a_m: Array
    b_top: Array
    a_top: Array
    b_shift: Array
    a_shift: Array
    gap: Array

    def exchanged(self) -> "Shared":
        return Shared(self.a_m, self.b_m, self.a_top, self.b_top, self.a_shift, self.b_shift, -self.gap)


class Shares(NamedTuple):
    """β and γ of a mixture; the smaller; the sign of r that belongs to it, and whether r is added."""

    beta: Array
    gamma: Array
    smaller: Array
    sign: Array
    added: Array

    def exchanged(self) -> "Shares":
        return Shares(self.gamma, self.beta, self.smaller, -self.sign, 1 - self.added)


class At(NamedTuple):
    """Of a class: t, p and r = log(p/t)."""

    t: Array
    p: Array
    r: Array


def z_of(logits: Logits, where, scale=None) -> Array:
    softcap, adjustment = logits.adjustment.softcap, logits.adjustment._replace(where=where)
    if scale is not None:
        adjustment = Adjustment(where, scale, None if softcap is None else scale * softcap)
    return upcast(adjust(logits.raw, adjustment))


class Top(NamedTuple):
    """The largest z of a token, -log of its probability, its class, of all devices'."""

    m: Array
    nll: Array
    place: Array


def _top(logits: Logits, where, scale, unused, axis, class_axes) -> Top:
    raw, adjustment = logits.raw, logits.adjustment._replace(where=where)
    m, top, rest = top_sums(raw, adjustment, axis, class_axes)
    if scale is not None:
        rest = rest_of_top(raw, m, top, adjustment, axis, class_axes, scale)
    highest = rounded(pick_of_all(raw, top, adjustment, axis, class_axes), m)
    exists = top < count(raw.shape[axis], class_axes)
    own = jnp.where(exists, highest - lax.stop_gradient(highest), 0)  # 0, with the slope that second derivatives need
    nll = negative_log_likelihood(rest, nan_unless(exists, scaled(own, scale), unused))
    return Top(m + own, nll, top)


def shared_by(b: Top, a: Top, scale) -> Shared:
    size = jnp.maximum(jnp.abs(a.m), jnp.abs(b.m))
    (on_grid,) = apart((a.m - b.m) + size)
    shift, of_a = on_grid - size, jnp.abs(a.m) >= jnp.abs(b.m)  # on the grid of the larger, which loses nothing by it
    b_shift, a_shift = jnp.where(of_a, 0, -shift), jnp.where(of_a, shift, 0)
    gap = scaled((a.m - a_shift) - (b.m - b_shift), scale) + (a.nll - b.nll)
    return Shared(b.m, a.m, jnp.exp(-b.nll), jnp.exp(-a.nll), b_shift, a_shift, gap)


def _at_pivot(b: Top, a: Top, logits: Logits, where, scale, axis, class_axes) -> At:
    there = pick_of_all(logits.raw, b.place, logits.adjustment._replace(where=where), axis, class_axes)
    nll = a.nll + jnp.where(b.place == a.place, 0, scaled(a.m - rounded(there, a.m), scale))
    return At(jnp.exp(-b.nll), jnp.exp(-nll), b.nll - nll)


def shares_of(beta) -> Shares | None:
    if beta is None:
        return None
    of_beta = lax.stop_gradient(beta) <= 0.5
    added = of_beta.astype(beta.dtype)
    return Shares(beta, 1 - beta, jnp.where(of_beta, beta, 1 - beta), 1 - 2 * added, added)


class Numbers(NamedTuple):
    """The constants of a term: floats, or operands of one pass (see `as_operands`). A clamp by constants XLA on the CPU
    does not fuse with a row sum either."""

    zero: Any
    near: Any
    minus_near: Any
    highest: Any
    lowest: Any
    log_highest: Any
    e_log_highest: Any
    series: tuple  # of ψ(r)/r² within `near`


@cache
def numbers_of(dtype) -> Numbers:
    """1/2!, 1/3!, ... as far as the format tells; of the first power that is left out, r³/5!, what r has of it on
    average is added, which leaves 2e-6 of ψ."""
    highest, near, terms = float(jnp.finfo(dtype).max), 0.08, 8 if dtype == jnp.float64 else 3
    series = [1 / math.factorial(k) for k in range(2, 2 + terms)]
    if terms == 3:
        series[1] += 0.75 * near**2 / math.factorial(5)
    log = math.floor(math.log(highest))
    return Numbers(0, near, -near, highest, -highest, log, math.exp(log), tuple(series))


def of_ratio(n: Numbers) -> Numbers:
    """What `log_ratio` and its bounds need of them."""
    return n._replace(near=None, minus_near=None, e_log_highest=None, series=())


def probabilities(b, a, scale, shared: Shared, b_top, a_top):
    """(t, p), with what stands for the probabilities of the tops."""
    t = jnp.exp(scaled(b - shared.b_m, scale)) * b_top
    return t, jnp.exp(scaled(a - shared.a_m, scale)) * a_top


def log_ratio(b, a, scale, shared: Shared, lowest, highest, n: Numbers):
    """r of the z of every class but the pivot, from `lowest`, where p = 0, to `highest`, where t = 0."""
    away = (a - shared.a_shift) - jnp.maximum(b - shared.b_shift, n.lowest)  # -inf - -inf is NaN
    return jnp.maximum(jnp.minimum(scaled(away, scale) - shared.gap, highest), lowest)


def lowest_ratio(n: Numbers, mixture: bool):
    """A finite r for p = 0. In a mixture exp(-r) is finite too."""
    return -n.log_highest if mixture else n.lowest


def log_mixture(r, shares: Shares | None):
    """log(m/t) of a finite r; without shares m is p, and r may be -inf."""
    if shares is None:
        return r
    return jnp.log1p(shares.smaller * jnp.expm1(shares.sign * r)) + shares.added * r


def exchanged(at: At) -> At:
    """p, t and log(t/p), 0 where p is."""
    return At(at.p, at.t, jnp.where(at.p == 0, 0, -at.r))


def _term(at: At, shares: Shares | None, n: Numbers):
    """t ψ(log(m/t)), and m where t = 0. Within a row sum: floating-point arithmetic alone, and few enough steps for XLA
    on the CPU to fuse them."""
    r = log_mixture(at.r, shares)
    near = jnp.minimum(jnp.maximum(r, n.minus_near), n.near)
    series = reduce(lambda series, factor: factor + near * series, n.series[-2::-1], n.series[-1])
    far = (jnp.expm1(r) - jnp.expm1(near)) + (near - r)
    beyond = jnp.maximum(at.p - lax.stop_gradient(at.t) * n.e_log_highest, n.zero)  # what p is more than t exp(highest)
    return at.t * (near * near * series + far) + (beyond if shares is None else shares.gamma * beyond)


def _first_moment(at: At, shares: Shares | None, _: Any = None):
    return at.t * log_mixture(at.r, shares)


def _sums(n: Numbers, b: Logits, a: Logits, where, scale, shared: Shared, shares, pivot, top, axis, class_axes):
    """(Σ_{v≠pivot} t_v ψ(log(m_v/t_v)), Σ_{v≠top} t_v log(m_v/t_v)). r is 0 where t is: 0 · inf is NaN, in a derivative
    too."""
    first = offset(b.raw.shape[axis], class_axes)
    operands = b, a, where, vary(scale, varying(b.raw)), shared, shares, pivot - first, top - first
    sums = by_platform(partial(_by_passes, n, axis), partial(_by_selects, n, axis), *operands)
    return psum(sums, class_axes)


def _by_passes(n: Numbers, axis, b, a, where, scale, shared, shares, pivot, top):
    def others(f, arrays, shared, pivot, axis):
        b_raw, a_raw, where, scale, shares, n = arrays
        shared = jax.tree.map(lambda row: jnp.expand_dims(row, axis), shared)
        z_b, z_a = z_of(b._replace(raw=b_raw), where), z_of(a._replace(raw=a_raw), where)
        if shares is None:  # `rounded`, in one step less; a mixture has none left
            z_b, z_a = z_b + n.zero, z_a + n.zero
        away = distance(pivot, z_b, axis)  # 0 at the pivot, else at least 1
        tops = jnp.minimum(away, shared.b_top), jnp.minimum(away, shared.a_top)
        t, p = probabilities(z_b, z_a, scale, shared, *tops)
        bound = n.highest * jnp.minimum(lax.stop_gradient(t) * n.highest, n.highest)  # large, and 0 where t is
        highest = jnp.minimum(bound, n.log_highest)
        lowest = n.lowest * jnp.minimum(bound, n.highest) if shares is None else -highest  # -inf, or exp(-r) is finite
        return f(At(t, p, log_ratio(z_b, z_a, scale, shared, lowest, highest, n)), shares, n)

    def sum_of(f, n, place):
        arrays = b.raw, a.raw, where, scale, shares, as_operands(shared.b_m.dtype, n)
        return sum_over_classes(partial(others, f), arrays, shared, place, axis)

    return sum_of(_term, n, pivot), sum_of(_first_moment, of_ratio(n), top)


def _by_selects(n: Numbers, axis, b, a, where, scale, shared, shares, pivot, top):
    """Of KL(t ‖ p) with a third of the arithmetic, one exponential a side: t ψ(r) is p - t - t r from |r| = 1 on."""
    shared = jax.tree.map(lambda row: jnp.expand_dims(row, axis), shared)
    z_b, z_a = (rounded(z_of(x, where), shared.b_m) for x in (b, a))
    t, p = probabilities(z_b, z_a, scale, shared, shared.b_top, shared.a_top)
    lowest = -jnp.inf if shares is None else lowest_ratio(n, True)
    r = log_ratio(z_b, z_a, scale, shared, lowest, n.log_highest, n)

    def without(place):
        here = is_at(place, z_b, axis)
        return At(jnp.where(here, 0, t), jnp.where(here, 0, p), jnp.where(here | (t == 0), 0, r))

    at = without(pivot)
    terms = _term_by_selects(at) if shares is None else _term(at, shares, n)
    return jnp.sum(terms, axis), jnp.sum(_first_moment(without(top), shares), axis)


def _term_by_selects(at: At):
    """t ψ(r), and p where t = 0."""
    near = (jnp.abs(at.r) < 1) & (at.t != 0)
    r = jnp.where(near, at.r, 0)
    factors = [1 / math.factorial(k) for k in range(2, 19 if r.dtype == jnp.float64 else 11)]
    series = reduce(lambda series, factor: factor + r * series, factors[-2::-1], factors[-1])
    return jnp.where(near, at.t * (r * r * series), at.p - at.t - at.t * at.r)


class Half(NamedTuple):
    """Of t: its top, 1 - its probability, the divergence from p or m, and Σ t_v log(p_v/t_v) over the other classes, or
    Σ t_v log(m_v/t_v)."""

    top: Array
    miss: Array
    divergence: Array
    moment: Array


class Rows(NamedTuple):
    """The numbers of a token."""

    shared: Shared
    at_pivot: At
    of_t: Half
    of_p: Half | None  # of a mixture


def rows_of(b: Logits, a: Logits, where, scale, beta, unused, axis, class_axes) -> Rows:
    top_b, top_a = (_top(logits, where, scale, unused, axis, class_axes) for logits in (b, a))
    shared, pivot = shared_by(top_b, top_a, scale), _at_pivot(top_b, top_a, a, where, scale, axis, class_axes)
    n, shares = numbers_of(shared.b_m.dtype), shares_of(beta)
    finite = pivot._replace(r=jnp.maximum(pivot.r, lowest_ratio(n, shares is not None)))

    def half(b, a, shared, shares, top, at_pivot):
        places = top_b.place, top.place
        others, moment = _sums(n, b, a, where, scale, shared, shares, *places, axis, class_axes)
        return Half(top.place, -jnp.expm1(-top.nll), others + _term(at_pivot, shares, n), moment)

    if shares is None:  # of the pivot's own r: the divergence is inf where that is -inf
        return Rows(shared, finite, half(b, a, shared, None, top_b, pivot), None)
    of_t = half(b, a, shared, shares, top_b, finite)
    of_p = half(a, b, shared.exchanged(), shares.exchanged(), top_a, exchanged(finite))
    return Rows(shared, finite, of_t, of_p)
