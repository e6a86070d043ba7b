"""The divergence of two softmaxes as one function of their logits, with its gradient by a rule."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._adjustment import rounded
from softmax_jax._barrier import apart
from softmax_jax._divergence_sums import Half, Rows, rows_of
from softmax_jax._divergence_terms import (
    At,
    Logits,
    bounds_of,
    exchanged,
    log_mixture,
    log_ratio,
    lowest_ratio,
    probabilities,
    shares_of,
    z_of,
)
from softmax_jax._dtypes import nan_unless
from softmax_jax._fold import made_once
from softmax_jax._indexing import is_at
from softmax_jax._linear_map import linear_map
from softmax_jax._sharding import Names, check_gradient, offset, psum, same_on_devices, vary, varying


def _value(rows: Rows, beta):
    if rows.of_p is None:
        return rows.of_t.divergence
    return beta * rows.of_t.divergence + (1 - beta) * rows.of_p.divergence


# The rule: the gradients of the logits, with K the divergence, of the mixture K_t and K_p its two, are
#
#     KL(t ‖ p)    db = -t (r + K)                   da = p - t = -p expm1(-r)
#     mixture      db = -β t (log(m/t) + K_t)        da = -γ p (log(m/p) + K_p)          dβ = K_t - K_p
#
# (of scale · b and scale · a),
# elementwise, and pulled back through `adjust`, where they are cast once. At the top class of t the sum in -t (r + K)
# cancels, so that there stands minus the sum of all others, Σ_{v≠c} t_v r_v + (1 - t_c) K. Kept: the operands as they
# came, and a few numbers a token.


def _weighing(t, log, here, half: Half):
    """-t (log + K), in which the logarithm is exact at the top."""
    return jnp.where(here, half.moment + half.miss * half.divergence, -t * (log + half.divergence))


def _slopes(at: At, rows: Rows, beta, place):
    """(db, da)."""
    shares = shares_of(beta)
    r = jnp.where(at.t == 0, 0, at.r)  # 0 · inf is NaN in a derivative
    db = _weighing(at.t, log_mixture(r, shares), place(rows.of_t), rows.of_t)
    if shares is None or rows.of_p is None:
        return db, jnp.where(at.r > -1, -at.p * jnp.expm1(-jnp.maximum(at.r, -1)), at.p - at.t)
    back = exchanged(at)
    da = _weighing(back.t, log_mixture(back.r, shares.exchanged()), place(rows.of_p), rows.of_p)
    return shares.beta * db, shares.gamma * da


class Given(NamedTuple):
    """What a derivative is made of."""

    b: Logits
    a: Logits
    where: Array | None
    scale: Array | None
    beta: Array | None
    unused: Array | None
    rows: Rows


Inputs = tuple[Logits, Logits, Array | None, Array | None]  # b, a, scale, beta


def _forward(b, a, scale, beta, where, unused, axis, class_axes) -> tuple[Array, Rows]:
    rows = rows_of(b, a, where, scale, beta, unused, axis, class_axes)
    if unused is not None:
        rows = jax.tree.map(lambda row: jnp.where(unused, jnp.zeros_like(row), row), rows)
    return _value(rows, beta), rows


@partial(jax.custom_jvp, nondiff_argnums=(6, 7))
def _divergence(b, a, scale, beta, where, unused, axis, class_axes):
    return _forward(b, a, scale, beta, where, unused, axis, class_axes)[0]


@_divergence.defjvp
def _divergence_jvp(axis, class_axes, primals, tangents):
    check_gradient(class_axes)
    b, a, scale, beta, where, unused = primals
    value, rows = _forward(b, a, scale, beta, where, unused, axis, class_axes)
    inputs, given = (b, a, scale, beta), Given(b, a, where, scale, beta, unused, rows)
    f, transposed = partial(_tangent, axis, class_axes), partial(_cotangent, axis, class_axes)
    return value, linear_map(f, transposed, given, inputs, value, tangents[:4])


def _tangent(axis: int, class_axes: Names, given: Given, dinputs: Inputs) -> Array:
    """Σ_v db_v · dz_b,v + da_v · dz_a,v, of all devices' classes."""
    z_of_both, inputs, slopes = _linearized(given, jnp.ones_like(given.rows.of_t.divergence), axis, class_axes)
    db, da, dscale, dbeta = dinputs
    dscale = vary(dscale, varying((given.b, given.a)))
    dz = jax.jvp(z_of_both, inputs, (db, da, dscale))[1]
    change = sum(jnp.sum(jnp.where(slope == 0, 0, slope * d), axis) for slope, d in zip(slopes, dz, strict=True))
    change = psum(change, class_axes)
    return change if dbeta is None else change + dbeta * _by_beta(given.rows)


def _cotangent(axis: int, class_axes: Names, given: Given, cotangent: Array) -> Inputs:
    scale, beta = given.scale, given.beta
    dbeta = None if beta is None else jnp.sum(cotangent * _by_beta(given.rows))
    cotangent = vary(cotangent, varying((given.b, given.a)))
    z_of_both, inputs, slopes = _linearized(given, cotangent, axis, class_axes)
    _, pull = jax.vjp(z_of_both, *inputs)
    db, da, dscale = pull(tuple(jnp.expand_dims(cotangent, axis) * slope for slope in slopes))
    db, da = (d._replace(raw=made_once(d.raw)) for d in (db, da))
    return db, da, jax.tree.map(same_on_devices, dscale, scale), dbeta


def _by_beta(rows: Rows) -> Array:
    assert rows.of_p is not None, "a mixture"
    return rows.of_t.divergence - rows.of_p.divergence


def _linearized(given: Given, cotangent: Array, axis: int, class_axes: Names):
    """(a function that makes z of both of (b, a, scale), those, the slopes of the divergence by both z)."""
    b, a, where, scale, beta, unused, rows = given
    bounds = bounds_of(cotangent.dtype)
    rows = rows._replace(of_t=_finite(rows.of_t, cotangent), of_p=_finite(rows.of_p, cotangent))
    b_raw, a_raw, rows = apart(b.raw, a.raw, rows)
    rows = jax.tree.map(lambda row: jnp.expand_dims(row, axis), rows)
    if unused is not None:
        b_raw, a_raw = (jnp.where(jnp.expand_dims(unused, axis), 0, raw) for raw in (b_raw, a_raw))

    b, a, here = b._replace(raw=b_raw), a._replace(raw=a_raw), vary(scale, varying((b, a)))
    z_b, z_a = (rounded(z_of(x, where), rows.shared.b_m) for x in (b, a))
    shared, first = rows.shared, offset(z_b.shape[axis], class_axes)
    place = lambda half: is_at(jnp.squeeze(half.top, axis) - first, z_b, axis)  # noqa: E731
    t, p = probabilities(z_b, z_a, scale, shared, shared.b_top, shared.a_top)
    lowest = lowest_ratio(bounds, beta is not None)
    r = log_ratio(z_b, z_a, scale, shared, lowest, bounds.log_highest, bounds.lowest)
    at = jax.tree.map(partial(jnp.where, place(rows.of_t)), rows.at_pivot, At(t, p, r))
    z_of_both = lambda b, a, scale: (z_of(b, where, scale), z_of(a, where, scale))  # noqa: E731
    return z_of_both, (b, a, here), _slopes(at, rows, beta, place)


def _finite(half: Half | None, cotangent):
    if half is None:
        return None
    return Half(half.top, half.miss, _if_finite(half.divergence, cotangent), _if_finite(half.moment, cotangent))


def _if_finite(sum_, cotangent):
    """What is infinite is 0 beside a cotangent of 0, else NaN: -t (r + K) has no value there."""
    finite = jnp.isfinite(sum_)
    return nan_unless(finite | (cotangent == 0), jnp.where(finite, sum_, 0))


def divergence(
    b: Logits,
    a: Logits,
    where: Array | None,
    scale: Array | None,
    beta: Array | None,
    unused: Array | None,
    axis: int,
    class_axes: Names,
) -> Array:
    """KL(t ‖ p) of t = softmax(scale · b) and p = softmax(scale · a), or of a number `beta` the mixture, of every
    token; 0 in `unused` rows, whatever they hold. A token without any class must be one of them."""
    over = varying(b, a, where, scale, beta, unused)
    (b, a, where), others = vary((b, a, where), over), tuple(n for n in over if n not in class_axes)
    scale, beta = vary((scale, beta), others)  # numbers of a token's sums are the same on its devices
    return _divergence(b, a, scale, beta, where, unused, axis, class_axes)
