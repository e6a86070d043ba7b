"""The divergence of two softmaxes as one function of their logits, with its gradient by a rule.

Two passes make its sums: the loss's own, of the teacher around its top class and of the student with that class as its
label, and the plain sums of `_divergence_formula`; a mixture has two more.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._devices import Classes, PyTree, check_gradient, psum, vary, varying
from softmax_jax._divergence.formula import (
    Pair,
    RowNumbers,
    beyond_log1p,
    finite_bound,
    halves_of,
    logits_of,
    offsets_of,
    ratio_terms,
    scaled,
    z_of,
)
from softmax_jax._inputs.arrays import nan_unless, nonfinite_unused, zero_rows
from softmax_jax._inputs.labels import Ids
from softmax_jax._inputs.options import without_fma
from softmax_jax._sums.blocks import fence_gradient, sum_over_classes
from softmax_jax._sums.rule import class_sums, top_sums
from softmax_jax._sums.waist import Tokens, log_total, negative_log_likelihood
from softmax_jax._transforms import barrier, batch_all_or_none, keeping_its_rule, tangent_of


class DivergenceSums(NamedTuple):
    """Of a token. A mixture has two halves, else there is one."""

    row: RowNumbers
    divergences: list[Array]  # Σ t ψ
    means: list[Array]  # Σ t δ, or Σ t η and Σ p η'


def _first_sums(pair: Pair, classes: Classes) -> RowNumbers:
    """The loss's own sums, of b around its top class and of a with that class as its label."""
    b, a = (side.adjustment._replace(where=pair.where) for side in (pair.b, pair.a))
    of_b = top_sums(pair.b.raw, b, classes)
    of_a = class_sums(Tokens(pair.a.raw, Ids(of_b.pivot), a, unused=pair.unused, classes=classes, forward_mode=True))
    if pair.unused is not None:  # a token without any class
        of_a = of_a._replace(own=jnp.where(pair.unused & (of_b.pivot == classes.num_classes(pair.b.raw)), 0, of_a.own))
    b_rest, a_rest, b_max, a_max, own = of_b.rest, of_a.rest, of_b.row_max, of_a.row_max, of_a.own
    if pair.scale is not None:
        rows = map(classes.expand, (of_b.pivot - classes.first_id(pair.b.raw), b_max, a_max))
        local = pair._replace(unused=None)
        b_rest, a_rest = psum(sum_over_classes(_exponentials, classes, local, *rows), classes.over)
        own = scaled(own, pair.scale)
    b_offset, a_offset = offsets_of(b_max, a_max)
    at_pivot = jnp.maximum(((a_max + of_a.own) - a_offset) - (b_max - b_offset), jnp.finfo(own.dtype).min)
    is_near = jnp.abs(scaled(at_pivot, pair.scale)) < 1
    between = scaled((a_max - a_offset) - (b_max - b_offset), pair.scale)  # the maxima
    log_a = jnp.where(is_near, negative_log_likelihood(a_rest, own), between + log_total(a_rest, own))
    b_share, a_share, s = 1 / (1 + b_rest), 1 / (a_rest + jnp.exp(own)), log_a - jnp.log1p(b_rest)
    top = of_b.pivot if pair.beta is None else top_sums(pair.a.raw, a, classes).pivot
    of_pivot = {"pivot": of_b.pivot, "top": top, "at_pivot": at_pivot, "at_top": at_pivot}  # (of the top not yet)
    of_both = {"b_max": b_max, "a_max": a_max, "b_share": b_share, "a_share": a_share}
    return RowNumbers(**of_pivot, **of_both, b_offset=b_offset, a_offset=a_offset, is_near=is_near, s=s)


def _exponentials(ids: Array, pair: Pair, pivot: Array, b_max: Array, a_max: Array) -> list[Array]:
    """Of all classes but the pivot."""
    z = [without_fma(z_of(side, pair.where), m) - m for side, m in ((pair.b, b_max), (pair.a, a_max))]
    return [jnp.where(ids == pivot, 0, jnp.exp(scaled(down, pair.scale))) for down in z]


def _ratio_sums(ids: Array, pair: Pair, row: RowNumbers) -> list[Array]:
    """x, and Σ t ψ(r̂), Σ t δ; or of a mixture a - b at the student's top."""
    (half,) = halves_of(ids, pair._replace(beta=None), row)
    growth, psi = ratio_terms(half)
    if pair.beta is None:
        return [growth, psi, half.t * half.centred]
    away = logits_of(pair, row)[2]
    return [growth, jnp.where(ids == row.top, jnp.maximum(away, -finite_bound(away)), 0)]


def _sums_of_halves(ids: Array, pair: Pair, row: RowNumbers) -> list[Array]:
    halves = halves_of(ids, pair, row)
    return [ratio_terms(half)[1] for half in halves] + [half.t * half.centred for half in halves]


@partial(jax.jit, static_argnums=1, inline=True)  # a rule and its function make the same: one trace serves both
def _sums_of(pair: Pair, classes: Classes) -> DivergenceSums:
    row, local, first = _first_sums(pair, classes), pair._replace(unused=None), classes.first_id(pair.b.raw)

    def summed(f: Callable[..., list[Array]], row: RowNumbers) -> list[Array]:
        (row,) = barrier(row)  # else XLA on a GPU writes out what two passes make
        rows = jax.tree.map(classes.expand, row._replace(pivot=row.pivot - first, top=row.top - first))
        return psum(sum_over_classes(f, classes, local, rows), classes.over)

    x, *more = summed(_ratio_sums, row)
    error = jnp.log1p(lax.stop_gradient(x))
    row = row._replace(s=row.s + error)
    if pair.beta is None:
        return DivergenceSums(row, [jnp.maximum(more[0] - beyond_log1p(x), 0)], more[1:])
    row = row._replace(at_top=more[0])
    sums = summed(_sums_of_halves, row)
    return DivergenceSums(row, sums[:2], sums[2:])


def _value(found: DivergenceSums, beta: Array | None) -> Array:
    of_t, *of_p = found.divergences
    return of_t if beta is None else beta * of_t + (1 - beta) * of_p[0]


# The rule: the gradients of scale · b and scale · a are products of one class and the sums of its token,
#
#     KL(t ‖ p)    db = -t (δ - Σ t δ)          da = t expm1(r) = p - t
#     mixture      db = -β t (η - Σ t η)        da = -γ p (η' - Σ p η')        dβ = KL(t ‖ m) - KL(p ‖ m)
#
# pulled back through `adjust`, where they are cast once. Kept: the operands as they came, and a few numbers a token.


def _used(pair: Pair, classes: Classes) -> DivergenceSums:
    """All 0 of a token that is not used and not finite."""
    found = _sums_of(pair, classes)
    return zero_rows(nonfinite_unused(pair.unused, found), found)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_both_modes(pair: Pair, classes: Classes) -> tuple[Array, DivergenceSums]:
    found = batch_all_or_none(_used(pair, classes))
    return _value(found, pair.beta), found


def _jvp(classes: Classes, primals: tuple[Pair], tangents: tuple[PyTree]) -> PyTree:
    check_gradient(classes.over)
    (pair,), (dpair,) = primals, tangents
    value, found = _in_both_modes(pair, classes)
    dfound = tangent_of(partial(_used, classes=classes), pair, dpair)

    def along(pair: Pair, found: DivergenceSums, *dz: Array) -> Array:
        slopes = _slopes(pair, found, jnp.ones_like(value), classes)[1]
        terms = (jnp.where(s == 0, 0, s * d) for s, d in zip(slopes, dz, strict=True))
        return psum(sum(jnp.sum(of_one, classes.axis) for of_one in terms), classes.over)

    dz = tangent_of(lambda pair: _z_of_both(_emptied(pair, found, classes)), pair, dpair)
    dvalue = jax.checkpoint(along, prevent_cse=False)(pair, found, dz["b"], dz["a"])
    return (value, found), (dvalue if pair.beta is None else dvalue + dz["beta"] * _by_beta(found), dfound)


_in_both_modes.defjvp(_jvp, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _divergence(pair: Pair, classes: Classes) -> Array:
    return _in_both_modes(pair, classes)[0]


def _divergence_fwd(pair: Pair, classes: Classes) -> tuple[Array, tuple[Pair, DivergenceSums]]:
    value, found = keeping_its_rule(partial(_in_both_modes, classes=classes))(pair)
    return value, (pair, found)


def _divergence_bwd(classes: Classes, kept: tuple[Pair, DivergenceSums], cotangent: Array) -> tuple[Pair]:
    check_gradient(classes.over)
    pair, found = kept
    dbeta = None
    if pair.beta is not None:
        by_beta = _by_beta(found)
        dbeta = jnp.sum(cotangent * jnp.where((cotangent == 0) & ~jnp.isfinite(by_beta), 0, by_beta))
    cotangent = vary(cotangent, varying((pair.b, pair.a)))
    pair, slopes = _slopes(pair, found, cotangent, classes)
    db, da = (classes.expand(cotangent) * slope for slope in slopes)
    _, pull = jax.vjp(_z_of_both, pair)
    (dpair,) = pull({"b": db, "a": da, "beta": dbeta})
    raw = (side._replace(raw=fence_gradient(side.raw)) for side in (dpair.b, dpair.a))
    return (dpair._replace(**dict(zip("ba", raw, strict=True))),)


_divergence.defvjp(_divergence_fwd, _divergence_bwd)


def _z_of_both(pair: Pair) -> dict[str, Array | None]:
    """What the divergence is a function of."""
    scale = vary(pair.scale, varying((pair.b, pair.a)))
    return {"b": z_of(pair.b, pair.where, scale), "a": z_of(pair.a, pair.where, scale), "beta": pair.beta}


def _slopes(pair: Pair, found: DivergenceSums, cotangent: Array, classes: Classes) -> tuple[Pair, tuple[Array, Array]]:
    """(the operands as a derivative reads them, the slopes of the divergence by both z)."""
    b, a, found = barrier(pair.b.raw, pair.a.raw, found)
    pair = _emptied(pair._replace(b=pair.b._replace(raw=b), a=pair.a._replace(raw=a)), found, classes)
    first = classes.first_id(b)
    row = found.row._replace(pivot=found.row.pivot - first, top=found.row.top - first)
    row, means = jax.tree.map(
        classes.expand,
        (row, [_if_finite(*sums, cotangent) for sums in zip(found.divergences, found.means, strict=True)]),
    )
    local = pair._replace(unused=None, scale=vary(pair.scale, varying((pair.b, pair.a))))
    halves = halves_of(classes.ids(b), local, row)
    slopes = [-half.t * (half.centred - mean) for half, mean in zip(halves, means, strict=True)]
    if pair.beta is None:
        return pair, (slopes[0], ratio_terms(halves[0])[0])
    return pair, (pair.beta * slopes[0], (1 - pair.beta) * slopes[1])


def _emptied(pair: Pair, found: DivergenceSums, classes: Classes) -> Pair:
    """Rows that are lost hold 0: whatever they hold, their gradient is exactly 0."""
    if pair.unused is None:
        return pair
    rows = classes.expand(found.row.b_share == 0)
    b, a = (side._replace(raw=jnp.where(rows, 0, side.raw)) for side in (pair.b, pair.a))
    return pair._replace(b=b, a=a)


def _by_beta(found: DivergenceSums) -> Array:
    of_t, of_p = found.divergences
    return of_t - of_p


def _if_finite(divergence: Array, mean: Array, cotangent: Array) -> Array:
    """Where the divergence is infinite, 0 beside a cotangent of 0, else NaN: -t (δ - Σ t δ) has no value there."""
    finite = jnp.isfinite(divergence)
    return nan_unless(finite | (cotangent == 0), jnp.where(finite, mean, 0))


def divergence(pair: Pair, classes: Classes, forward_mode: bool) -> Array:
    """KL(t ‖ p) of t = softmax(scale · b) and p = softmax(scale · a), or of a number `beta` the mixture, of every
    token; 0 in `unused` rows that are not finite. A token without any class must be one of them."""
    over = varying(pair)
    (b, a, where), others = vary((pair.b, pair.a, pair.where), over), tuple(n for n in over if n not in classes.over)
    scale, beta = vary((pair.scale, pair.beta), others)  # numbers of a token's sums are the same on its devices
    pair = Pair(b, a, where, scale, beta, pair.unused)
    return _in_both_modes(pair, classes)[0] if forward_mode else _divergence(pair, classes)
