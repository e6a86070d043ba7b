"""The divergence of two softmaxes as one function of their logits, with its gradient by a rule."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._adjustment import rounded
from softmax_jax._barrier import apart
from softmax_jax._blocks import made_once
from softmax_jax._classes import Classes
from softmax_jax._divergence_sums import Half, Rows, rows_of
from softmax_jax._divergence_terms import (
    At,
    Pair,
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
from softmax_jax._sharding import PyTree, check_gradient, psum, vary, varying
from softmax_jax._sums import in_rule
from softmax_jax._token_loss import without
from softmax_jax._waist import tangent_of


def _value(rows: Rows, beta: Any) -> Array:
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


def _weighing(t: Array, log: Array, here: Array, half: Half) -> Array:
    """-t (log + K), in which the logarithm is exact at the top."""
    return jnp.where(here, half.moment + half.miss * half.divergence, -t * (log + half.divergence))


def _slopes(at: At, rows: Rows, beta: Array | None, place: Callable[[Half], Array]) -> tuple[Array, Array]:
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

    pair: Pair
    rows: Rows


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_both_modes(pair: Pair, classes: Classes) -> tuple[Array, Rows]:
    rows = without(pair.unused, rows_of(pair, classes))
    return _value(rows, pair.beta), rows


def _jvp(classes: Classes, primals: tuple[Pair], tangents: tuple[PyTree]) -> PyTree:
    check_gradient(classes.over)
    (pair,), (dpair,) = primals, tangents
    value, rows = _in_both_modes(pair, classes)
    drows = tangent_of(lambda pair: without(pair.unused, rows_of(pair, classes)), pair, dpair)

    def along(given, *dz):
        slopes = _linearized(given, jnp.ones_like(value), classes)[1]
        terms = (jnp.where(s == 0, 0, s * d) for s, d in zip(slopes, dz, strict=True))
        return psum(sum(jnp.sum(of_one, classes.axis) for of_one in terms), classes.over)

    dz = tangent_of(_z_of_both, pair, dpair)
    dvalue = jax.checkpoint(along, prevent_cse=False)(Given(pair, rows), dz["b"], dz["a"])
    return (value, rows), (dvalue if pair.beta is None else dvalue + dz["beta"] * _by_beta(rows), drows)


_in_both_modes.defjvp(_jvp, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _divergence(pair: Pair, classes: Classes) -> Array:
    return _in_both_modes(pair, classes)[0]


def _divergence_fwd(pair: Pair, classes: Classes) -> tuple[Array, Given]:
    value, rows = in_rule(partial(_in_both_modes, classes=classes))(pair)
    return value, Given(pair, rows)


def _divergence_bwd(classes: Classes, given: Given, cotangent: Array) -> tuple[Pair]:
    check_gradient(classes.over)
    dbeta = None if given.pair.beta is None else jnp.sum(cotangent * _by_beta(given.rows))
    cotangent = vary(cotangent, varying((given.pair.b, given.pair.a)))
    pair, slopes = _linearized(given, cotangent, classes)
    db, da = (classes.along(cotangent) * slope for slope in slopes)
    _, pull = jax.vjp(_z_of_both, pair)
    (dpair,) = pull({"b": db, "a": da, "beta": dbeta})
    raw = (side._replace(raw=made_once(side.raw)) for side in (dpair.b, dpair.a))
    return (dpair._replace(**dict(zip("ba", raw, strict=True))),)


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _z_of_both(pair: Pair) -> dict[str, Any]:
    """What the divergence is a function of."""
    scale = vary(pair.scale, varying((pair.b, pair.a)))
    return {"b": z_of(pair.b, pair.where, scale), "a": z_of(pair.a, pair.where, scale), "beta": pair.beta}


def _by_beta(rows: Rows) -> Array:
    assert rows.of_p is not None, "a mixture"
    return rows.of_t.divergence - rows.of_p.divergence


def _linearized(given: Given, cotangent: Array, classes: Classes) -> tuple[Pair, tuple[Array, Array]]:
    """(the operands as a derivative reads them, the slopes of the divergence by both z)."""
    pair, rows = given
    bounds = bounds_of(cotangent.dtype)
    rows = rows._replace(of_t=_finite(rows.of_t, cotangent), of_p=_finite(rows.of_p, cotangent))
    b_raw, a_raw, rows = apart(pair.b.raw, pair.a.raw, rows)
    rows = jax.tree.map(classes.along, rows)
    if pair.unused is not None:
        b_raw, a_raw = (jnp.where(classes.along(pair.unused), 0, raw) for raw in (b_raw, a_raw))

    pair = pair._replace(b=pair.b._replace(raw=b_raw), a=pair.a._replace(raw=a_raw))
    scale = vary(pair.scale, varying((pair.b, pair.a)))
    z_b, z_a = (rounded(z_of(x, pair.where), rows.shared.b_m) for x in (pair.b, pair.a))
    shared, first = rows.shared, classes.first(z_b)

    def place(half):
        return classes.is_at(jnp.squeeze(half.top, classes.axis) - first, z_b)

    t, p = probabilities(z_b, z_a, scale, shared, shared.b_top, shared.a_top)
    lowest = lowest_ratio(bounds, pair.beta is not None)
    r = log_ratio(z_b, z_a, scale, shared, lowest, bounds.log_highest, bounds.lowest)
    at = jax.tree.map(partial(jnp.where, place(rows.of_t)), rows.at_pivot, At(t, p, r))
    return pair, _slopes(at, rows, pair.beta, place)


def _finite(half: Half | None, cotangent: Array) -> Half | None:
    if half is None:
        return None
    return Half(half.top, half.miss, _if_finite(half.divergence, cotangent), _if_finite(half.moment, cotangent))


def _if_finite(sum_: Array, cotangent: Array) -> Array:
    """What is infinite is 0 beside a cotangent of 0, else NaN: -t (r + K) has no value there."""
    finite = jnp.isfinite(sum_)
    return nan_unless(finite | (cotangent == 0), jnp.where(finite, sum_, 0))


def divergence(pair: Pair, classes: Classes, forward_mode: bool) -> Array:
    """KL(t ‖ p) of t = softmax(scale · b) and p = softmax(scale · a), or of a number `beta` the mixture, of every
    token; 0 in `unused` rows, whatever they hold. A token without any class must be one of them."""
    over = varying(pair)
    (b, a, where), others = vary((pair.b, pair.a, pair.where), over), tuple(n for n in over if n not in classes.over)
    scale, beta = vary((pair.scale, pair.beta), others)  # numbers of a token's sums are the same on its devices
    pair = Pair(b, a, where, scale, beta, pair.unused)
    return _in_both_modes(pair, classes)[0] if forward_mode else _divergence(pair, classes)
