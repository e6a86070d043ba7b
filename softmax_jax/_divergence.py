"""The divergence of two softmaxes over the classes of one token, from the logits of both.

Write t = softmax(b) and p = softmax(a), m = β t + γ p with γ = 1 - β, r_v = log(p_v / t_v). Asked for are

    KL(t ‖ p)      and the mixture      β KL(t ‖ m) + γ KL(p ‖ m)

Each is a difference of entropies, which are large where the divergence is not. But since Σ_v t_v = Σ_v p_v = 1,

    KL(t ‖ p) = Σ_v t_v ψ(r_v)        ψ(r) = exp(r) - 1 - r ≥ 0

has no negative term, and an error of r that all classes share comes in squared. ψ is a series near 0; beyond it
t ψ(r) = p - t - t r. A mixture has log(m/t) = log1p(γ expm1(r)), and log(m/p) by exchanging the roles.

r itself is (a_v - b_v) - (max a - max b) - (nll_a - nll_b), where nll = -log of the top's probability does not cancel:
where the two nearly agree the first difference is exact. At the top class c of b, the pivot, all this is done by itself
from numbers of the token: if c is also the top of a, then r_c = nll_b - nll_a, however close both are to 0.
"""

import math
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import Adjustment, adjust, row_shift
from softmax_jax._dtypes import upcast
from softmax_jax._passes import (
    apart,
    as_operands,
    distance,
    is_at,
    pick_of_all,
    sum_of_others,
    sum_over_classes,
    top_class,
)
from softmax_jax._sharding import Names, check_gradient, count, offset, psum, vary, varying
from softmax_jax._token_loss import negative_log_likelihood


class Logits(NamedTuple):
    """One of the two."""

    raw: Array
    adjustment: Adjustment  # without `where`, which both share


class _Shared(NamedTuple):
    """What the classes of a token share: the maxima of b and a, the probabilities of their tops, and differences."""

    b_m: Array
    a_m: Array
    b_top: Array
    a_top: Array
    m_gap: Array  # a_m - b_m
    nll_gap: Array  # that of -log of the tops' probabilities

    def exchanged(self) -> "_Shared":
        return _Shared(self.a_m, self.b_m, self.a_top, self.b_top, -self.m_gap, -self.nll_gap)


class _At(NamedTuple):
    """Of a class: t, p and r = log(p/t)."""

    t: Array
    p: Array
    r: Array


def _z(logits: Logits, where) -> Array:
    return upcast(adjust(logits.raw, logits.adjustment._replace(where=where)))


def _top(logits: Logits, where, axis, class_axes) -> tuple[Array, Array, Array]:
    """(the largest z, -log of its probability, its class, of all devices')."""
    raw, adjustment = logits.raw, logits.adjustment._replace(where=where)
    (m,) = apart(row_shift(adjust(raw, adjustment), axis, class_axes))
    top = top_class(raw, m, adjustment, axis, class_axes)
    rest = sum_of_others(raw, m, top - offset(raw.shape[axis], class_axes), adjustment, axis)
    highest = pick_of_all(raw, top, adjustment, axis, class_axes)
    exists = top < count(raw.shape[axis], class_axes)
    own = jnp.where(exists, highest - lax.stop_gradient(highest), 0)  # 0, with the slope that second derivatives need
    nll = negative_log_likelihood(psum(rest, class_axes), jnp.where(exists, own, -jnp.inf))
    return m + own, nll, top


def _tops(b: Logits, a: Logits, where, axis, class_axes) -> tuple[_Shared, Array, _At]:
    """(what the classes share, the pivot, what stands there)."""
    (b_m, b_nll, pivot), (a_m, a_nll, a_top) = (_top(logits, where, axis, class_axes) for logits in (b, a))
    there = pick_of_all(a.raw, pivot, a.adjustment._replace(where=where), axis, class_axes)
    nll = a_nll + jnp.where(pivot == a_top, 0, a_m - there)
    t = jnp.exp(-b_nll)
    shared = _Shared(b_m, a_m, t, jnp.exp(-a_nll), a_m - b_m, a_nll - b_nll)
    return shared, pivot, _At(t, jnp.exp(-nll), b_nll - nll)


class _Numbers(NamedTuple):
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
def _numbers(dtype) -> _Numbers:
    """1/2!, 1/3!, ... as far as the format tells; of the first power that is left out, r³/5!, what r has of it on
    average is added, which leaves 2e-6 of ψ."""
    highest, near, terms = float(jnp.finfo(dtype).max), 0.08, 8 if dtype == jnp.float64 else 3
    series = [1 / math.factorial(k) for k in range(2, 2 + terms)]
    if terms == 3:
        series[1] += 0.75 * near**2 / math.factorial(5)
    log = math.floor(math.log(highest))
    return _Numbers(0, near, -near, highest, -highest, log, math.exp(log), tuple(series))


def _log_ratio(b, a, shared: _Shared, n: _Numbers):
    """r of the z of every class but the pivot: -inf where p = 0, bounded where t = 0."""
    return jnp.minimum(a - jnp.maximum(b, n.lowest) - shared.m_gap - shared.nll_gap, n.log_highest)


def _mixed(at: _At, beta, gamma) -> _At:
    """t, m and log(m/t)."""
    return _At(at.t, beta * at.t + gamma * at.p, jnp.log1p(gamma * jnp.expm1(at.r)))


def _exchanged(at: _At, n: _Numbers) -> _At:
    return _At(at.p, at.t, jnp.minimum(-at.r, n.log_highest))


def _term(at: _At, n: _Numbers, bounded: bool):
    """t ψ(r), where p = t exp(r), and p where t = 0; unless r is bounded, inf where p = 0 < t. Within a row sum:
    floating-point arithmetic alone, and few enough steps for XLA on the CPU to fuse them."""
    t, p, r = at
    near = jnp.minimum(jnp.maximum(r, n.minus_near), n.near)
    series = reduce(lambda series, factor: factor + near * series, n.series[-2::-1], n.series[-1])
    linear = near - r
    if not bounded:
        normal = lax.stop_gradient(t) * n.highest
        linear = jnp.minimum(linear, n.highest * jnp.minimum(normal, n.highest))  # by 0 where t is, else by inf
    far = (jnp.expm1(r) - jnp.expm1(near)) + linear
    return t * (near * near * series + far) + jnp.maximum(p - t * n.e_log_highest, n.zero)


def _sums(b: Logits, a: Logits, where, beta, shared: _Shared, pivot, at_pivot: _At, axis, class_axes) -> tuple:
    """(KL(t ‖ p),), or of a mixture (KL(t ‖ m), KL(p ‖ m)), in a pass each: the second is the first with the roles
    exchanged."""

    def one(b, a, shared, shares, at_pivot):
        def others(arrays, _, pivot, axis):
            b_raw, a_raw, where, shared, shares, n = arrays
            z_b, z_a = _z(b._replace(raw=b_raw), where), _z(a._replace(raw=a_raw), where)
            away = distance(pivot, z_b, axis)  # 0 at the pivot, else at least 1
            t = jnp.exp(z_b - shared.b_m) * jnp.minimum(away, shared.b_top)
            p = jnp.exp(z_a - shared.a_m) * jnp.minimum(away, shared.a_top)
            return term(_At(t, p, _log_ratio(z_b, z_a, shared, n)), shares, n)

        across = jax.tree.map(lambda row: jnp.expand_dims(row, axis), shared)
        wide = jax.tree.map(lambda share: jnp.broadcast_to(share, (1,) * b.raw.ndim), shares)
        n = jax.tree.map(lambda number: as_operands(b.raw, shared.b_m.dtype, number)[0], numbers)
        here = pivot - offset(b.raw.shape[axis], class_axes)
        arrays = b.raw, a.raw, where, across, wide, n
        total = psum(sum_over_classes(others, arrays, shared.b_m, here, axis), class_axes)
        return total + term(at_pivot, shares, numbers)

    def term(at, shares, n):
        return _term(at if shares is None else _mixed(at, *shares), n, bounded=shares is not None)

    numbers = _numbers(at_pivot.t.dtype)
    if beta is None:
        return (one(b, a, shared, None, at_pivot),)
    gamma, exchanged = 1 - beta, _exchanged(at_pivot, numbers)
    return one(b, a, shared, (beta, gamma), at_pivot), one(a, b, shared.exchanged(), (gamma, beta), exchanged)


# The rule: the gradients of the logits, with K the divergence, of the mixture K_t and K_p its two, are
#
#     KL(t ‖ p)    db = -t (r + K)                   da = p - t = -p expm1(-r)
#     mixture      db = -β t (log(m/t) + K_t)        da = -γ p (log(m/p) + K_p)          dβ = K_t - K_p
#
# elementwise, and pulled back through `adjust`, where they are cast once. Kept: the operands as they came, and a few
# numbers a token.


def _slopes(at: _At, beta, sums, n: _Numbers):
    """(db, da)."""
    t, p, r = at._replace(r=jnp.maximum(at.r, n.lowest))  # 0 · inf is NaN
    if beta is None:
        return -t * (r + sums[0]), -p * jnp.expm1(jnp.minimum(-r, 1)) - jnp.maximum(t - math.e * p, 0)
    gamma = 1 - beta
    of_t, of_p = _mixed(at, beta, gamma).r, _mixed(_exchanged(at, n), gamma, beta).r
    return -beta * t * (of_t + sums[0]), -gamma * p * (of_p + sums[1])


def _forward(b, a, where, beta, unused, axis, class_axes):
    """(the divergence, numbers of the token)."""
    shared, pivot, at_pivot = _tops(b, a, where, axis, class_axes)
    sums = _sums(b, a, where, beta, shared, pivot, at_pivot, axis, class_axes)
    rows = shared, pivot, at_pivot, sums
    if unused is not None:
        rows = jax.tree.map(lambda row: jnp.where(unused, jnp.zeros_like(row), row), rows)
    return _value(rows[3], beta), rows


def _value(sums, beta):
    return sums[0] if beta is None else beta * sums[0] + (1 - beta) * sums[1]


def _divergence_fwd(b, a, where, beta, unused, axis, class_axes):
    check_gradient(class_axes)
    value, rows = _forward(b, a, where, beta, unused, axis, class_axes)
    return value, (b, a, where, beta, unused, rows)


def _divergence_bwd(axis, class_axes, residuals, cotangent):
    b, a, where, beta, unused, rows = residuals
    dbeta = None if beta is None else jnp.sum(cotangent * (rows[3][0] - rows[3][1]))
    numbers = jax.tree.map(lambda number: as_operands(b.raw, cotangent.dtype, number)[0], _numbers(cotangent.dtype))
    cotangent = vary(cotangent, varying((b, a)))
    b_raw, a_raw, rows, cotangent, numbers = apart(b.raw, a.raw, rows, cotangent, numbers)
    across = lambda tree: jax.tree.map(lambda row: jnp.expand_dims(row, axis), tree)  # noqa: E731
    shared, pivot, at_pivot, sums = rows[0], rows[1], across(rows[2]), across(rows[3])
    shared = across(shared)
    if unused is not None:
        b_raw, a_raw = (jnp.where(across(unused), 0, raw) for raw in (b_raw, a_raw))

    zs = lambda b, a: (_z(b, where), _z(a, where))  # noqa: E731
    (z_b, z_a), pull = jax.vjp(zs, b._replace(raw=b_raw), a._replace(raw=a_raw))
    here = is_at(pivot - offset(z_b.shape[axis], class_axes), z_b, axis)
    t, p = jnp.exp(z_b - shared.b_m) * shared.b_top, jnp.exp(z_a - shared.a_m) * shared.a_top
    at = jax.tree.map(partial(jnp.where, here), at_pivot, _At(t, p, _log_ratio(z_b, z_a, shared, numbers)))
    db, da = pull(tuple(across(cotangent) * slope for slope in _slopes(at, beta, sums, numbers)))
    return db, da, None, dbeta, None


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _divergence(b, a, where, beta, unused, axis, class_axes):
    return _forward(b, a, where, beta, unused, axis, class_axes)[0]


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def divergence(
    b: Logits,
    a: Logits,
    where: Array | None,
    beta: Array | None,
    unused: Array | None,
    axis: int,
    class_axes: Names,
) -> Array:
    """KL(t ‖ p), or of a number `beta` the mixture, of every token; 0 in `unused` rows, whatever they hold. A token
    without any class must be one of them."""
    over = varying(b, a, where)
    (b, a, where), beta = vary((b, a, where), over), vary(beta, tuple(name for name in over if name not in class_axes))
    return _divergence(b, a, where, beta, unused, axis, class_axes)
