"""The divergence of two softmaxes as one function of their logits, with its gradient by a rule."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._class_passes import is_at
from softmax_jax._divergence_sums import (
    At,
    Half,
    Logits,
    Rows,
    exchanged,
    log_ratio,
    lowest_ratio,
    mixed,
    numbers_of,
    rows_of,
    shares_of,
    z_of,
)
from softmax_jax._dtypes import nan_unless
from softmax_jax._passes import apart, as_operands
from softmax_jax._sharding import Names, check_gradient, offset, vary, varying


def _value(rows: Rows, beta):
    if rows.of_p is None:
        return rows.of_t.divergence
    return beta * rows.of_t.divergence + (1 - beta) * rows.of_p.divergence


# The rule: the gradients of the logits, with K the divergence, of the mixture K_t and K_p its two, are
#
#     KL(t ‖ p)    db = -t (r + K)                   da = p - t = -p expm1(-r)
#     mixture      db = -β t (log(m/t) + K_t)        da = -γ p (log(m/p) + K_p)          dβ = K_t - K_p
#
# elementwise, and pulled back through `adjust`, where they are cast once. At the top class of t the sum in -t (r + K)
# cancels, so that there stands minus the sum of all others, Σ_{v≠c} t_v r_v + (1 - t_c) K. Kept: the operands as they
# came, and a few numbers a token.


def _weighing(at: At, here, half: Half):
    """-t (r + K), in which the logarithm is that of `at`, exact at the top."""
    return jnp.where(here, half.moment + half.miss * half.divergence, -at.t * (at.r + half.divergence))


def _slopes(at: At, rows: Rows, beta, place):
    """(db, da)."""
    if rows.of_p is None:
        da = jnp.where(at.r > -1, -at.p * jnp.expm1(-jnp.maximum(at.r, -1)), at.p - at.t)
        r = jnp.where(at.t == 0, 0, at.r)  # 0 · inf is NaN in a derivative
        return _weighing(at._replace(r=r), place(rows.of_t), rows.of_t), da
    shares = shares_of(beta)
    db = beta * _weighing(mixed(at, shares), place(rows.of_t), rows.of_t)
    of_p = mixed(exchanged(at), shares.exchanged())
    return db, (1 - beta) * _weighing(of_p, place(rows.of_p), rows.of_p)


def _forward(b, a, where, beta, unused, axis, class_axes):
    rows = rows_of(b, a, where, beta, unused, axis, class_axes)
    if unused is not None:
        rows = jax.tree.map(lambda row: jnp.where(unused, jnp.zeros_like(row), row), rows)
    return _value(rows, beta), rows


def _divergence_fwd(b, a, where, beta, unused, axis, class_axes):
    check_gradient(class_axes)
    value, rows = _forward(b, a, where, beta, unused, axis, class_axes)
    return value, (b, a, where, beta, unused, rows)


def _divergence_bwd(axis, class_axes, residuals, cotangent):
    b, a, where, beta, unused, rows = residuals
    dbeta = None if beta is None else jnp.sum(cotangent * (rows.of_t.divergence - rows.of_p.divergence))
    n = as_operands(cotangent.dtype, numbers_of(cotangent.dtype))
    cotangent = vary(cotangent, varying((b, a)))
    rows = rows._replace(of_t=_finite(rows.of_t, cotangent), of_p=_finite(rows.of_p, cotangent))
    b_raw, a_raw, rows, cotangent, n = apart(b.raw, a.raw, rows, cotangent, n)
    rows, cotangent = jax.tree.map(lambda row: jnp.expand_dims(row, axis), (rows, cotangent))
    if unused is not None:
        b_raw, a_raw = (jnp.where(jnp.expand_dims(unused, axis), 0, raw) for raw in (b_raw, a_raw))

    zs = lambda b, a: (z_of(b, where), z_of(a, where))  # noqa: E731
    (z_b, z_a), pull = jax.vjp(zs, b._replace(raw=b_raw), a._replace(raw=a_raw))
    shared, first = rows.shared, offset(z_b.shape[axis], class_axes)
    place = lambda half: is_at(jnp.squeeze(half.top, axis) - first, z_b, axis)  # noqa: E731
    t, p = jnp.exp(z_b - shared.b_m) * shared.b_top, jnp.exp(z_a - shared.a_m) * shared.a_top
    r = log_ratio(z_b, z_a, shared, lowest_ratio(n, beta is not None), n.log_highest, n)
    at = jax.tree.map(partial(jnp.where, place(rows.of_t)), rows.at_pivot, At(t, p, r))
    db, da = pull(tuple(cotangent * slope for slope in _slopes(at, rows, beta, place)))
    return db, da, None, dbeta, None


def _finite(half: Half | None, cotangent):
    """What is infinite is 0 beside a cotangent of 0, else NaN: -t (r + K) has no value there."""
    if half is None:
        return None

    def of_sum(s):
        finite = jnp.isfinite(s)
        return nan_unless(finite | (cotangent == 0), jnp.where(finite, s, 0))

    return Half(half.top, half.miss, of_sum(half.divergence), of_sum(half.moment))


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
