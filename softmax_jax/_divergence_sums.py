"""The sums of a token for a divergence of two rows of logits, and the other numbers of the token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax import _divergence_cpu
from softmax_jax._adjustment import rounded, scaled
from softmax_jax._divergence_terms import (
    At,
    Bounds,
    Logits,
    Shared,
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
from softmax_jax._fold import by_platform, rest_of_scaled
from softmax_jax._indexing import is_at, pick_of_all
from softmax_jax._sharding import count, offset, psum, vary, varying
from softmax_jax._sums import once_traced
from softmax_jax._token_loss import negative_log_likelihood
from softmax_jax._waist import top_sums


class Top(NamedTuple):
    """The largest z of a token, -log of its probability, its class, of all devices'."""

    m: Array
    nll: Array
    place: Array


def _top(logits: Logits, where, scale, unused, axis, class_axes) -> Top:
    raw, adjustment = logits.raw, logits.adjustment._replace(where=where)
    m, top, rest = top_sums(raw, adjustment, axis, class_axes)
    if scale is not None:
        rest = rest_of_scaled(raw, adjustment, scale, m, top, axis=axis, class_axes=class_axes)
    highest = rounded(pick_of_all(raw, top, adjustment, axis, class_axes), m)
    exists = top < count(raw.shape[axis], class_axes)
    own = jnp.where(exists, highest - lax.stop_gradient(highest), 0)  # 0, with the slope that second derivatives need
    nll = negative_log_likelihood(rest, nan_unless(exists, scaled(own, scale), unused))
    return Top(m + own, nll, top)


def shared_by(b: Top, a: Top, scale) -> Shared:
    size = jnp.maximum(jnp.abs(a.m), jnp.abs(b.m))
    of_a = jnp.abs(a.m) >= jnp.abs(b.m)
    shift = ((a.m - b.m) + size) - size  # on the grid of the larger, which loses nothing by it
    b_shift, a_shift = jnp.where(of_a, 0, -shift), jnp.where(of_a, shift, 0)
    gap = scaled((a.m - a_shift) - (b.m - b_shift), scale) + (a.nll - b.nll)
    return Shared(b.m, a.m, jnp.exp(-b.nll), jnp.exp(-a.nll), b_shift, a_shift, gap)


def _at_pivot(b: Top, a: Top, logits: Logits, where, scale, axis, class_axes) -> At:
    there = pick_of_all(logits.raw, b.place, logits.adjustment._replace(where=where), axis, class_axes)
    nll = a.nll + jnp.where(b.place == a.place, 0, scaled(a.m - rounded(there, a.m), scale))
    return At(jnp.exp(-b.nll), jnp.exp(-nll), b.nll - nll)


def _sums(bounds: Bounds, b: Logits, a: Logits, where, scale, shared: Shared, shares, pivot, top, axis, class_axes):
    """(Σ_{v≠pivot} t_v ψ(log(m_v/t_v)), Σ_{v≠top} t_v log(m_v/t_v))."""
    first = offset(b.raw.shape[axis], class_axes)
    operands = b, a, where, vary(scale, varying(b.raw)), shared, shares, pivot - first, top - first
    by_passes, written = partial(_divergence_cpu.divergence_sums, axis), partial(_written, bounds, axis)
    return psum(by_platform(by_passes, written, *operands), class_axes)


@once_traced
def _written(bounds, axis, b, a, where, scale, shared, shares, pivot, top):
    """r is 0 where t is: 0 · inf is NaN, in a derivative too."""
    shared = jax.tree.map(lambda row: jnp.expand_dims(row, axis), shared)
    z_b, z_a = (rounded(z_of(x, where), shared.b_m) for x in (b, a))
    t, p = probabilities(z_b, z_a, scale, shared, shared.b_top, shared.a_top)
    lowest = -jnp.inf if shares is None else lowest_ratio(bounds, True)
    r = log_ratio(z_b, z_a, scale, shared, lowest, bounds.log_highest, bounds.lowest)

    def without(place):
        here = is_at(place, z_b, axis)
        return At(jnp.where(here, 0, t), jnp.where(here, 0, p), jnp.where(here | (t == 0), 0, r))

    return jnp.sum(term(without(pivot), shares), axis), jnp.sum(first_moment(without(top), shares), axis)


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
    bounds, shares = bounds_of(shared.b_m.dtype), shares_of(beta)
    finite = pivot._replace(r=jnp.maximum(pivot.r, lowest_ratio(bounds, shares is not None)))

    def half(b, a, shared, shares, top, at_pivot):
        places = top_b.place, top.place
        others, moment = _sums(bounds, b, a, where, scale, shared, shares, *places, axis, class_axes)
        return Half(top.place, -jnp.expm1(-top.nll), others + term(at_pivot, shares), moment)

    if shares is None:  # of the pivot's own r: the divergence is inf where that is -inf
        return Rows(shared, finite, half(b, a, shared, None, top_b, pivot), None)
    of_t = half(b, a, shared, shares, top_b, finite)
    of_p = half(a, b, shared.exchanged(), shares.exchanged(), top_a, exchanged(finite))
    return Rows(shared, finite, of_t, of_p)
