"""The divergence of two softmaxes over the classes of one token, as sums that keep their digits.

Write t = softmax(b) for the teacher, p = softmax(a) for the student, and c for the teacher's top class, the pivot. The
divergence is a function of the ratios r_v = log(p_v / t_v), and these of differences of logits,

    δ_v = (a_v - b_v) - (a_c - b_c)        exactly 0 at c
    s   = -log p_c + log t_c               of sums without their largest term, in which nothing cancels
    r̂_v = δ_v - s                          r, up to an error of s that all classes share

Since Σ t = Σ p = 1, with ψ(r) = exp(r) - 1 - r ≥ 0

    x = Σ_v t_v expm1(r̂_v)                 would be 0 but for that error, and says how large it is
    r = r̂ - log1p(x)
    KL(t ‖ p) = Σ_v t_v ψ(r_v) = Σ_v t_v ψ(r̂_v) - (x - log1p(x))
    ∂/∂a = p - t = t expm1(r)              ∂/∂b = -t (δ - ε)        ε = Σ_v t_v δ_v

Where r is not small, t expm1(r) is p - t and t ψ(r) is p - t - t r. Where c is far from the student's top, s and δ are
large and their difference is not: there δ in r̂ is not taken relative to c, nor s.

A mixture m = β t + γ p, with γ = 1 - β, is a function of r too: β KL(t ‖ m) + γ KL(p ‖ m), where

    h = log(m/t) = log1p(γ expm1(r))       KL(t ‖ m) = Σ_v t_v ψ(h_v)        ∂/∂b = -β t (η - Σ t η)
    η_v = h_v - h_c = log1p(γ exp(r_c) expm1(δ_v) / (β + γ exp(r_c)))        exactly 0 at c

and the same of p, the two exchanged, around the top class of p.

The two may be offset by any number: the difference of their maxima, on the grid of the larger, comes off that one
exactly before it is compared with the other. What both are multiplied by, the inverse temperature `scale`, comes after
the differences; scaled first, each logit would be rounded by itself.
"""

import math
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._inputs.arrays import upcast
from softmax_jax._inputs.options import Adjustment, adjust, without_fma


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
    unused: Array | None  # tokens of weight 0, whatever they hold


class RowNumbers(NamedTuple):
    """What the classes of a token share."""

    pivot: Array  # c, the class of the largest b
    top: Array  # that of the largest a, for a mixture; else c
    b_max: Array
    a_max: Array
    b_share: Array  # 1 / Σ_v exp(scale · (b_v - b_max)); 0 of a token that is lost
    a_share: Array
    b_offset: Array  # what comes off b before it is compared, and off a
    a_offset: Array
    at_pivot: Array  # a - b at the pivot, and at the top
    at_top: Array
    is_near: Array  # whether r̂ is relative to that of the pivot
    s: Array


class OneDirection(NamedTuple):
    """A divergence of one class: KL(t ‖ m) is the sum of t ψ(log(m/t)), where m may be p."""

    t: Array
    m: Array
    log: Array  # log(m/t)
    centred: Array  # the same less that of the top class of t


@jax.custom_jvp
def scaled(z: Array, scale: Array | None) -> Array:
    """scale · z of a scale > 0. Its own gradient is 0 where z is infinite, or stands for that."""
    return z if scale is None else scale * z


@scaled.defjvp
def _scaled_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z, scale), (dz, dscale) = primals, tangents
    if scale is None:
        return z, dz
    finite_z = jnp.where(jnp.abs(z) < float(jnp.finfo(z.dtype).max) / 8, z, 0)
    return scaled(z, scale), scale * dz + dscale * finite_z


def z_of(logits: Logits, where: Array | None, scale: Array | None = None) -> Array:
    softcap, adjustment = logits.adjustment.softcap, logits.adjustment._replace(where=where)
    if scale is not None:
        adjustment = Adjustment(where, scale, None if softcap is None else scale * softcap)
    return upcast(adjust(logits.raw, adjustment))


def offsets_of(b_max: Array, a_max: Array) -> tuple[Array, Array]:
    """(what comes off b, what comes off a), so that their maxima are about the same."""
    b_max, a_max = lax.stop_gradient((b_max, a_max))
    size, of_a = jnp.maximum(jnp.abs(a_max), jnp.abs(b_max)), jnp.abs(a_max) >= jnp.abs(b_max)
    offset = ((a_max - b_max) + size) - size  # on the grid of the larger, which loses nothing by it
    return jnp.where(of_a, 0, -offset), jnp.where(of_a, offset, 0)


def logits_of(pair: Pair, row: RowNumbers) -> tuple[Array, Array, Array]:
    """z of both, and a - b without the offset between the two: -inf where p = 0, large where t = 0."""
    b, a = (without_fma(z_of(side, pair.where), row.b_max) for side in (pair.b, pair.a))
    return b, a, (a - row.a_offset) - jnp.maximum(b - row.b_offset, -finite_bound(b))


def finite_bound(z: Array) -> float:
    """For infinity, where a difference or a product with 0 would be NaN."""
    return float(jnp.finfo(z.dtype).max) / 8


def halves_of(ids: Array, pair: Pair, row: RowNumbers) -> list[OneDirection]:
    """Of every class: KL(t ‖ p), or of a mixture KL(t ‖ m) and KL(p ‖ m)."""
    b, a, away = logits_of(pair, row)
    t = jnp.exp(scaled(b - row.b_max, pair.scale)) * row.b_share
    p = jnp.exp(scaled(a - row.a_max, pair.scale)) * row.a_share

    def r_at(away: Array, delta: Array | int) -> Array:
        return jnp.where(row.is_near, delta, scaled(away, pair.scale)) - row.s

    delta = jnp.where(ids == row.pivot, 0, scaled(away - row.at_pivot, pair.scale))
    r = r_at(away, delta)
    if pair.beta is None:
        return [
            OneDirection(
                t, p, jnp.where(t == 0, finite_bound(r), r), jnp.where(t == 0, 0, jnp.maximum(delta, -finite_bound(r)))
            )
        ]
    bound = math.floor(math.log(finite_bound(r)))  # the exponential of r is finite, and so is its inverse
    r_pivot, r_top = r_at(row.at_pivot, 0), r_at(row.at_top, scaled(row.at_top - row.at_pivot, pair.scale))
    r, r_pivot, r_top = (jnp.clip(r, -bound, bound) for r in (r, r_pivot, r_top))
    back = jnp.where(ids == row.top, 0, scaled(row.at_top - away, pair.scale))
    beta, gamma = pair.beta, 1 - pair.beta
    m, of_t, of_p = beta * t + gamma * p, partial(log_mixture, gamma, beta), partial(log_mixture, beta, gamma)
    return [
        OneDirection(t, m, of_t(r, r, 0), of_t(r, delta, r_pivot)),
        OneDirection(p, m, of_p(-r, -r, 0), of_p(-r, back, -r_top)),
    ]


FAR = 1e30
"""A ratio that logarithms are taken of one by one, since it may overflow."""


def log_mixture(share: Array, other: Array, r: Array, delta: Array, pivot: Array | int) -> Array:
    """log(other + share · exp(r)) less that of r = `pivot`, from which r differs by delta; the shares' sum is 1."""
    ratio, at_pivot = jnp.exp(r), jnp.exp(pivot)
    rise = jnp.where(delta < 1, at_pivot * jnp.expm1(jnp.minimum(delta, 1)), ratio - at_pivot)
    of_all, of_pivot = other + share * ratio, other + share * at_pivot
    change = share * jnp.minimum(rise, FAR * of_pivot) / of_pivot
    by_change = jnp.log1p(jnp.maximum(change, -0.5))
    by_ratio = jnp.where(change > 0, jnp.log(of_all) - jnp.log(of_pivot), jnp.log(of_all / of_pivot))
    return jnp.where((change > -0.5) & (rise < FAR * of_pivot), by_change, by_ratio)


def ratio_terms(half: OneDirection) -> tuple[Array, Array]:
    """(t expm1(r), t ψ(r)) of m = t exp(r): by a series, or from a ratio of e on as they are, where t may be 0."""
    t, m, r, _ = half
    is_near = jnp.abs(r) < 1
    small = jnp.where(is_near, r, 0)
    factors = [1 / math.factorial(k) for k in range(2, 19 if r.dtype == jnp.float64 else 11)]
    psi = small * small * reduce(lambda series, factor: factor + small * series, factors[-2::-1], factors[-1])
    return jnp.where(is_near, t * (small + psi), m - t), jnp.where(is_near, t * psi, m - t - t * r)


def beyond_log1p(x: Array) -> Array:
    """x - log1p(x) ≥ 0."""
    series = x * x * (1 / 2 - x * (1 / 3 - x * (1 / 4 - x * (1 / 5 - x / 6))))
    return jnp.where(jnp.abs(x) < 1e-3, series, x - jnp.log1p(x))
