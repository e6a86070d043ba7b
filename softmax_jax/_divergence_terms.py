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
from functools import reduce
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._adjustment import Adjustment, adjust, scaled
from softmax_jax._dtypes import upcast


class Logits(NamedTuple):
    """One of the two."""

    raw: Array
    adjustment: Adjustment  # without `where`, which both share


class Pair(NamedTuple):
    """The teacher b and the student a of every token, or the reverse."""

    b: Logits
    a: Logits
    where: Array | None  # which classes both have
    scale: Array | None
    beta: Array | None  # of a mixture
    unused: Array | None  # tokens whose divergence is 0, whatever they hold

    def exchanged(self) -> "Pair":
        return self._replace(b=self.a, a=self.b)


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


def z_of(logits: Logits, where: Array | None, scale: Array | None = None) -> Array:
    softcap, adjustment = logits.adjustment.softcap, logits.adjustment._replace(where=where)
    if scale is not None:
        adjustment = Adjustment(where, scale, None if softcap is None else scale * softcap)
    return upcast(adjust(logits.raw, adjustment))


def shares_of(beta: Array | None) -> Shares | None:
    if beta is None:
        return None
    of_beta = lax.stop_gradient(beta) <= 0.5
    added = of_beta.astype(beta.dtype)
    return Shares(beta, 1 - beta, jnp.where(of_beta, beta, 1 - beta), 1 - 2 * added, added)


Bound = Array | float


class Bounds(NamedTuple):
    """What stands for the logarithm of a ratio that is infinite."""

    lowest: float
    log_highest: float


def bounds_of(dtype: DTypeLike) -> Bounds:
    highest = float(jnp.finfo(dtype).max)
    return Bounds(-highest, float(math.floor(math.log(highest))))


def lowest_ratio(bounds: Bounds, mixture: bool) -> float:
    """A finite r for p = 0. In a mixture exp(-r) is finite too."""
    return -bounds.log_highest if mixture else bounds.lowest


def probabilities(
    b: Array, a: Array, scale: Array | None, shared: Shared, b_top: Array, a_top: Array
) -> tuple[Array, Array]:
    """(t, p), with what stands for the probabilities of the tops."""
    t = jnp.exp(scaled(b - shared.b_m, scale)) * b_top
    return t, jnp.exp(scaled(a - shared.a_m, scale)) * a_top


def log_ratio(
    b: Array, a: Array, scale: Array | None, shared: Shared, lowest: Bound, highest: Bound, finite: Bound
) -> Array:
    """r of the z of every class but the pivot, from `lowest`, where p = 0, to `highest`, where t = 0. A b of -inf
    counts as `finite`: -inf - -inf is NaN."""
    away = (a - shared.a_shift) - jnp.maximum(b - shared.b_shift, finite)
    return jnp.maximum(jnp.minimum(scaled(away, scale) - shared.gap, highest), lowest)


def log_mixture(r: Array, shares: Shares | None) -> Array:
    """log(m/t) of a finite r; without shares m is p, and r may be -inf."""
    if shares is None:
        return r
    return jnp.log1p(shares.smaller * jnp.expm1(shares.sign * r)) + shares.added * r


def exchanged(at: At) -> At:
    """p, t and log(t/p), 0 where p is."""
    return At(at.p, at.t, jnp.where(at.p == 0, 0, -at.r))


def term(at: At, shares: Shares | None) -> Array:
    """t ψ(log(m/t)), and m where t = 0: a series, and m - t - t log(m/t) from a logarithm of 1 on."""
    m = at.p if shares is None else shares.beta * at.t + shares.gamma * at.p
    log = log_mixture(at.r, shares)
    near = (jnp.abs(log) < 1) & (at.t != 0)
    r = jnp.where(near, log, 0)
    factors = [1 / math.factorial(k) for k in range(2, 19 if r.dtype == jnp.float64 else 11)]
    series = reduce(lambda series, factor: factor + r * series, factors[-2::-1], factors[-1])
    return jnp.where(near, at.t * (r * r * series), m - at.t - at.t * log)


def first_moment(at: At, shares: Shares | None) -> Array:
    """t log(m/t)"""
    return at.t * log_mixture(at.r, shares)
