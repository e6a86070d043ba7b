"""The sums of a token for a divergence of two rows of logits, and the other numbers of the token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._adjustment import rounded, scaled, z_at_of_all
from softmax_jax._blocks import sum_over_classes
from softmax_jax._class_sums import rest_of_top, top_sums
from softmax_jax._classes import Classes
from softmax_jax._divergence_terms import (
    At,
    Pair,
    Shared,
    Shares,
    bounds_of,
    exchanged,
    first_moment,
    log_ratio,
    lowest_ratio,
    probabilities,
    shares_of,
    term,
    z_of,
)
from softmax_jax._dtypes import nan_unless
from softmax_jax._sharding import psum, vary, varying
from softmax_jax._token_loss import negative_log_likelihood


class Top(NamedTuple):
    """The largest z of a token, -log of its probability, its class, of all devices'."""

    m: Array
    nll: Array
    place: Array


def _top(pair: Pair, classes: Classes) -> Top:
    """Of b."""
    raw, adjustment = pair.b.raw, pair.b.adjustment._replace(where=pair.where)
    m, top, rest = top_sums(raw, adjustment, classes)
    if pair.scale is not None:
        rest = rest_of_top(raw, adjustment, pair.scale, m, top, classes)
    highest = rounded(z_at_of_all(top, raw, adjustment, classes), m)
    exists = top < classes.of_all(raw)
    own = jnp.where(exists, highest - lax.stop_gradient(highest), 0)  # 0, with the slope that second derivatives need
    nll = negative_log_likelihood(rest, nan_unless(exists, scaled(own, pair.scale), pair.unused))
    return Top(m + own, nll, top)


def shared_by(b: Top, a: Top, scale: Array | None) -> Shared:
    size = jnp.maximum(jnp.abs(a.m), jnp.abs(b.m))
    of_a = jnp.abs(a.m) >= jnp.abs(b.m)
    shift = ((a.m - b.m) + size) - size  # on the grid of the larger, which loses nothing by it
    b_shift, a_shift = jnp.where(of_a, 0, -shift), jnp.where(of_a, shift, 0)
    gap = scaled((a.m - a_shift) - (b.m - b_shift), scale) + (a.nll - b.nll)
    return Shared(b.m, a.m, jnp.exp(-b.nll), jnp.exp(-a.nll), b_shift, a_shift, gap)


def _at_pivot(b: Top, a: Top, pair: Pair, classes: Classes) -> At:
    there = z_at_of_all(b.place, pair.a.raw, pair.a.adjustment._replace(where=pair.where), classes)
    nll = a.nll + jnp.where(b.place == a.place, 0, scaled(a.m - rounded(there, a.m), pair.scale))
    return At(jnp.exp(-b.nll), jnp.exp(-nll), b.nll - nll)


def _sums(
    pair: Pair, shared: Shared, shares: Shares | None, pivot: Array, top: Array, classes: Classes
) -> tuple[Array, Array]:
    """(Σ_{v≠pivot} t_v ψ(log(m_v/t_v)), Σ_{v≠top} t_v log(m_v/t_v))."""
    raw, first = pair.b.raw, classes.first(pair.b.raw)
    pair = pair._replace(scale=vary(pair.scale, varying(raw)), beta=None, unused=None)
    rows = jax.tree.map(classes.along, (shared, pivot - first, top - first))
    return psum(sum_over_classes(_terms, classes, pair, shares, *rows), classes.over)


def _terms(
    ids: Array, pair: Pair, shares: Shares | None, shared: Shared, pivot: Array, top: Array
) -> tuple[Array, Array]:
    """r is 0 where t is: 0 · inf is NaN, in a derivative too."""
    bounds = bounds_of(shared.b_m.dtype)
    z_b, z_a = (rounded(z_of(x, pair.where), shared.b_m) for x in (pair.b, pair.a))
    t, p = probabilities(z_b, z_a, pair.scale, shared, shared.b_top, shared.a_top)
    lowest = -jnp.inf if shares is None else lowest_ratio(bounds, True)
    r = log_ratio(z_b, z_a, pair.scale, shared, lowest, bounds.log_highest, bounds.lowest)

    def without(place):
        here = ids == place
        return At(jnp.where(here, 0, t), jnp.where(here, 0, p), jnp.where(here | (t == 0), 0, r))

    return term(without(pivot), shares), first_moment(without(top), shares)


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


def rows_of(pair: Pair, classes: Classes) -> Rows:
    top_b, top_a = _top(pair, classes), _top(pair.exchanged(), classes)
    shared, pivot = shared_by(top_b, top_a, pair.scale), _at_pivot(top_b, top_a, pair, classes)
    bounds, shares = bounds_of(shared.b_m.dtype), shares_of(pair.beta)
    finite = pivot._replace(r=jnp.maximum(pivot.r, lowest_ratio(bounds, shares is not None)))

    def half(pair, shared, shares, top, at_pivot):
        others, moment = _sums(pair, shared, shares, top_b.place, top.place, classes)
        return Half(top.place, -jnp.expm1(-top.nll), others + term(at_pivot, shares), moment)

    if shares is None:  # of the pivot's own r: the divergence is inf where that is -inf
        return Rows(shared, finite, half(pair, shared, None, top_b, pivot), None)
    of_t = half(pair, shared, shares, top_b, finite)
    of_p = half(pair.exchanged(), shared.exchanged(), shares.exchanged(), top_a, exchanged(finite))
    return Rows(shared, finite, of_t, of_p)
