"""The divergence of two softmaxes as one function of their logits, with its gradient by a rule.

Two passes make its sums: the loss's own, of the teacher around its top class and of the student with that class as its
label, and the plain sums of `_divergence_formula`; a mixture has two more.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import rounded, scaled
from softmax_jax._barrier import apart
from softmax_jax._blocks import made_once, sum_over_classes
from softmax_jax._class_sums import class_sums, top_sums
from softmax_jax._classes import Classes
from softmax_jax._divergence_formula import (
    Class,
    Pair,
    Row,
    beyond_log1p,
    classes_of,
    difference,
    largest,
    log_mixture,
    log_mixture_from,
    offsets_of,
    ratio_terms,
    z_of,
)
from softmax_jax._dtypes import nan_unless
from softmax_jax._labels import Ids
from softmax_jax._sharding import PyTree, check_gradient, psum, vary, varying
from softmax_jax._sums import Asked, Tokens, batched_alike, in_rule
from softmax_jax._token_loss import log_spread, negative_log_likelihood, without
from softmax_jax._waist import tangent_of


class Found(NamedTuple):
    """Of a token: the divergence of t, and of p in a mixture; Σ t δ, or Σ t η and Σ p η' of a mixture."""

    row: Row
    of_t: Array
    of_p: Array
    mean_of_t: Array
    mean_of_p: Array


def _first_sums(pair: Pair, classes: Classes) -> Row:
    """The loss's own sums, of b around its top class and of a with that class as its label."""
    b, a = (side.adjustment._replace(where=pair.where) for side in (pair.b, pair.a))
    of_b = top_sums(pair.b.raw, b, classes)
    tokens = Tokens(pair.a.raw, Ids(of_b.top), None, a, pair.unused)
    of_a = class_sums(tokens, classes, Asked(forward_mode=True))
    b_rest, a_rest, b_max, a_max, own = of_b.rest, of_a.rest, of_b.m, of_a.shift, of_a.own
    if pair.scale is not None:
        rows = map(classes.along, (of_b.top - classes.first(pair.b.raw), b_max, a_max))
        local = pair._replace(unused=None)
        b_rest, a_rest = psum(sum_over_classes(_exponentials, classes, local, *rows), classes.over)
        own = scaled(own, pair.scale)
    b_offset, a_offset = offsets_of(b_max, a_max)
    at_pivot = ((a_max + of_a.own) - a_offset) - (b_max - b_offset)
    at_pivot = jnp.maximum(at_pivot, -largest(at_pivot.dtype))
    is_near = jnp.abs(scaled(at_pivot, pair.scale)) < 1
    between = scaled((a_max - a_offset) - (b_max - b_offset), pair.scale)  # the maxima
    log_a = jnp.where(is_near, negative_log_likelihood(a_rest, own), between + log_spread(a_rest, own))
    b_share, a_share, s = 1 / (1 + b_rest), 1 / (a_rest + jnp.exp(own)), log_a - jnp.log1p(b_rest)
    top = of_b.top if pair.beta is None else top_sums(pair.a.raw, a, classes).top
    return Row(of_b.top, top, b_max, a_max, b_share, a_share, b_offset, a_offset, at_pivot, at_pivot, is_near, s)


def _exponentials(ids: Array, pair: Pair, pivot: Array, b_max: Array, a_max: Array) -> tuple[Array, Array]:
    """Of all classes but the pivot."""
    sides = ((pair.b, b_max), (pair.a, a_max))
    b, a = (jnp.exp(scaled(rounded(z_of(side, pair.where), m) - m, pair.scale)) for side, m in sides)
    return jnp.where(ids == pivot, 0, b), jnp.where(ids == pivot, 0, a)


def _plain_sums(ids: Array, pair: Pair, row: Row) -> tuple[Array, ...]:
    """x, Σ t ψ(r̂), Σ t δ, and a - b at the student's top."""
    t, p, r, delta, _ = classes_of(ids, pair._replace(beta=None), row, True)
    growth, psi = ratio_terms(t, p, r)
    sums = growth, psi, t * delta
    if pair.beta is None:
        return sums
    b, a = (rounded(z_of(side, pair.where), row.b_max) for side in (pair.b, pair.a))
    return *sums, jnp.where(ids == row.top, difference(b, a, row), 0)


def _sums_of_mixture(ids: Array, pair: Pair, row: Row) -> tuple[Array, ...]:
    """KL(t ‖ m), KL(p ‖ m), Σ t η, Σ p η'."""
    assert pair.beta is not None, "a mixture"
    at, beta, gamma = classes_of(ids, pair, row, True), pair.beta, 1 - pair.beta
    m = beta * at.t + gamma * at.p
    of_t = ratio_terms(at.t, m, log_mixture(gamma, beta, at.r))[1]
    of_p = ratio_terms(at.p, m, log_mixture(beta, gamma, -at.r))[1]
    of_b, of_a = _centred(at, pair, row)
    return of_t, of_p, at.t * of_b, at.p * of_a


def _centred(at: Class, pair: Pair, row: Row) -> tuple[Array, Array]:
    """(η, η') of a mixture."""
    assert pair.beta is not None, "a mixture"
    beta, gamma = pair.beta, 1 - pair.beta
    bound = -jnp.log(jnp.finfo(at.t.dtype).tiny)

    def r_at(difference):
        relative = jnp.where(row.is_near, difference - row.at_pivot, difference)
        return jnp.clip(scaled(relative, pair.scale) - row.s, -bound, bound)

    of_b = log_mixture_from(gamma, beta, at.r, at.delta, r_at(row.at_pivot))
    return of_b, log_mixture_from(beta, gamma, -at.r, at.from_top, -r_at(row.at_top))


def _found(pair: Pair, classes: Classes) -> Found:
    row = _first_sums(pair, classes)
    local = pair._replace(unused=None)

    def summed(f, row):
        (row,), first = apart(row), classes.first(pair.b.raw)  # else XLA on a GPU writes out what two passes make
        rows = jax.tree.map(classes.along, row._replace(pivot=row.pivot - first, top=row.top - first))
        return psum(sum_over_classes(f, classes, local, rows), classes.over)

    x, psi, mean, *at_top = summed(_plain_sums, row)
    row, divergence = row._replace(s=row.s + jnp.log1p(lax.stop_gradient(x))), jnp.maximum(psi - beyond_log1p(x), 0)
    if pair.beta is None:
        return Found(row, divergence, divergence, mean, mean)
    row = row._replace(at_top=at_top[0])
    return Found(row, *summed(_sums_of_mixture, row))


def _value(found: Found, beta: Array | None) -> Array:
    return found.of_t if beta is None else beta * found.of_t + (1 - beta) * found.of_p


# The rule: the gradients of scale · b and scale · a are products of one class and the sums of its token,
#
#     KL(t ‖ p)    db = -t (δ - Σ t δ)          da = t expm1(r) = p - t
#     mixture      db = -β t (η - Σ t η)        da = -γ p (η' - Σ p η')        dβ = KL(t ‖ m) - KL(p ‖ m)
#
# pulled back through `adjust`, where they are cast once. Kept: the operands as they came, and a few numbers a token.


class Given(NamedTuple):
    """What a derivative is made of."""

    pair: Pair
    found: Found


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_both_modes(pair: Pair, classes: Classes) -> tuple[Array, Found]:
    found = batched_alike(without(pair.unused, _found(pair, classes)))
    return _value(found, pair.beta), found


def _jvp(classes: Classes, primals: tuple[Pair], tangents: tuple[PyTree]) -> PyTree:
    check_gradient(classes.over)
    (pair,), (dpair,) = primals, tangents
    value, found = _in_both_modes(pair, classes)
    dfound = tangent_of(lambda pair: without(pair.unused, _found(pair, classes)), pair, dpair)

    def along(given, *dz):
        slopes = _slopes(given, jnp.ones_like(value), classes)[1]
        terms = (jnp.where(s == 0, 0, s * d) for s, d in zip(slopes, dz, strict=True))
        return psum(sum(jnp.sum(of_one, classes.axis) for of_one in terms), classes.over)

    dz = tangent_of(_z_of_both, pair, dpair)
    dvalue = jax.checkpoint(along, prevent_cse=False)(Given(pair, found), dz["b"], dz["a"])
    return (value, found), (dvalue if pair.beta is None else dvalue + dz["beta"] * (found.of_t - found.of_p), dfound)


_in_both_modes.defjvp(_jvp, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _divergence(pair: Pair, classes: Classes) -> Array:
    return _in_both_modes(pair, classes)[0]


def _divergence_fwd(pair: Pair, classes: Classes) -> tuple[Array, Given]:
    value, found = in_rule(partial(_in_both_modes, classes=classes))(pair)
    return value, Given(pair, found)


def _divergence_bwd(classes: Classes, given: Given, cotangent: Array) -> tuple[Pair]:
    check_gradient(classes.over)
    dbeta = None if given.pair.beta is None else jnp.sum(cotangent * (given.found.of_t - given.found.of_p))
    cotangent = vary(cotangent, varying((given.pair.b, given.pair.a)))
    pair, slopes = _slopes(given, cotangent, classes)
    db, da = (classes.along(cotangent) * slope for slope in slopes)
    _, pull = jax.vjp(_z_of_both, pair)
    (dpair,) = pull({"b": db, "a": da, "beta": dbeta})
    raw = (side._replace(raw=made_once(side.raw)) for side in (dpair.b, dpair.a))
    return (dpair._replace(**dict(zip("ba", raw, strict=True))),)


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _z_of_both(pair: Pair) -> dict[str, Array | None]:
    """What the divergence is a function of."""
    scale = vary(pair.scale, varying((pair.b, pair.a)))
    return {"b": z_of(pair.b, pair.where, scale), "a": z_of(pair.a, pair.where, scale), "beta": pair.beta}


def _slopes(given: Given, cotangent: Array, classes: Classes) -> tuple[Pair, tuple[Array, Array]]:
    """(the operands as a derivative reads them, the slopes of the divergence by both z)."""
    b, a, found = apart(given.pair.b.raw, given.pair.a.raw, given.found)
    if given.pair.unused is not None:
        b, a = (jnp.where(classes.along(given.pair.unused), 0, raw) for raw in (b, a))
    pair = given.pair._replace(b=given.pair.b._replace(raw=b), a=given.pair.a._replace(raw=a))
    first = classes.first(b)
    row = found.row._replace(pivot=found.row.pivot - first, top=found.row.top - first)
    row, of_t, of_p = jax.tree.map(
        classes.along, (row, *(_if_finite(mean, cotangent) for mean in (found.mean_of_t, found.mean_of_p)))
    )
    local = pair._replace(unused=None, scale=vary(pair.scale, varying((pair.b, pair.a))))
    at = classes_of(classes.ids(b), local, row, False)
    if pair.beta is None:
        return pair, (-at.t * (at.delta - of_t), ratio_terms(at.t, at.p, at.r)[0])
    of_b, of_a = _centred(at, local, row)
    return pair, (-pair.beta * at.t * (of_b - of_t), -(1 - pair.beta) * at.p * (of_a - of_p))


def _if_finite(sum_: Array, cotangent: Array) -> Array:
    """What is infinite is 0 beside a cotangent of 0, else NaN: -t (δ - Σ t δ) has no value there."""
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
