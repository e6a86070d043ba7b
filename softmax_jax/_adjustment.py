"""From raw logits to what their exponential is taken of: z - m, and products with what may be infinite."""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from softmax_jax._classes import Classes
from softmax_jax._dtypes import upcast
from softmax_jax._sharding import Names, pmax, psum


class Adjustment(NamedTuple):
    """What is done to a logit before its softmax. None leaves a step out."""

    where: Array | None = None
    logit_scale: Array | None = None
    softcap: Array | None = None


def adjust(logits: Array, adjustment: Adjustment) -> Array:
    """z = softcap · tanh(logit_scale · logits / softcap), and -inf where `where` is False.

    In float32 where it computes anything, else as it came, so that the maximum of 16-bit logits is read as such.

    Infinities are judged on the raw logit, because logit_scale may be 0 or negative and tanh(inf) is 1: -inf stays
    a class of probability zero (or -softcap), +inf becomes NaN. The scale's own gradient there is 0, not 0 · inf; so it
    is where `where` hides a NaN.
    """
    where, scale, softcap = adjustment
    z = upcast(logits) if logits.dtype.itemsize == 1 else logits  # some 8-bit formats have no infinity
    if scale is not None or softcap is not None:
        unscaled = jnp.isinf(z) if where is None else jnp.isinf(z) | ~where
        raw, z = upcast(z), jnp.where(unscaled, 0, upcast(z))
        z = z if scale is None else scale * z
        z = z if softcap is None else capped(z, softcap)
        floor = raw if softcap is None else -softcap
        top = jnp.where(raw == jnp.inf, raw, 0)
        z = jnp.where(raw == -jnp.inf, floor, z + (top - top))  # NaN at +inf, in the gradient too
    return z if where is None else jnp.where(where, z, -jnp.inf)


# With u = z / cap
#
#     capped = cap · tanh(u)        ∂/∂z = sech²(u)        ∂/∂cap = tanh(u) - u sech²(u) = (sinh(2u) - 2u) sech²(u) / 2
#
# of which 1 - tanh²(u) would cancel where u is large, and the two terms of the last where it is small. There tanh(u) is
# u to a rounding, and z stands for cap · u, since u of a very large cap has no digits.


@jax.custom_jvp
def capped(z: Array, cap: Array) -> Array:
    u = z / cap
    return jnp.where(u * u < jnp.finfo(z.dtype).eps, z, cap * jnp.tanh(u))


@capped.defjvp
def _capped_jvp(primals, tangents):
    (z, cap), (dz, dcap) = primals, tangents
    u = z / cap
    q = jnp.exp(-2 * jnp.abs(u))
    slope = 4 * q / (1 + q) ** 2
    small = jnp.clip(4 * u * u, 0, 4)
    tail = jnp.ones_like(u)
    for k in range(17 if u.dtype == jnp.float64 else 11, 3, -2):
        tail = 1 + small * tail / (k * (k - 1))
    by_cap = jnp.where(jnp.abs(u) < 1, u * small / 6 * tail * slope, jnp.tanh(u) - u * slope)
    return capped(z, cap), slope * dz + by_cap * dcap


def shifted(logits: Array, adjustment: Adjustment, shift: Array, axis: int | tuple[int, ...]) -> Array:
    """z - m in float32."""
    shift = jnp.expand_dims(shift, axis)
    return rounded(upcast(adjust(logits, adjustment)), shift) - shift


def rounded(z: Array, of_row: Array) -> Array:
    """z as it is by itself, for a subtraction. Of logits that are a product made in the same program, a · b - m would
    become one fused multiply-add, which leaves the rounding of a · b at the maximum: half an ulp, 8 from |z| = 2^27 on.
    Between the two stands an addition of 0 that no compiler knows to be one: `of_row` less itself, as it may be NaN."""
    of_row = lax.stop_gradient(of_row)
    return z + (of_row - of_row)


def z_at(ids: Array, logits: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """Each token's z at a class: the logit is read raw and adjusted by itself."""
    where = None if adjustment.where is None else classes.pick(ids, adjustment.where)
    return upcast(adjust(classes.pick(ids, logits), adjustment._replace(where=where)))


def z_at_of_all(ids: Array, logits: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """The same of ids among all devices' classes; 0 for what is none of them."""
    read = partial(z_at, logits=logits, adjustment=adjustment, classes=classes)
    return psum(classes.if_here(read, ids - classes.first(logits), logits), classes.over)


def row_shift(z: Array, axis: int | tuple[int, ...], over: Names = ()) -> Array:
    """m = max_v z_v as a constant; 0 for a row whose every logit is -inf, since -inf - -inf is NaN."""
    highest = pmax(upcast(jnp.max(z, axis=axis, initial=-jnp.inf)), over)
    return jnp.where(highest == -jnp.inf, 0, highest)


@jax.custom_jvp
def weighed(factor: Array, z: Array, idle: Array | bool = False) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf; so is its derivative by the factor there, and where the
    product is `idle`: of no effect."""
    return factor * jnp.where(factor == 0, 0, z)


def _weighed_jvp(primals, tangents):
    (factor, z, idle), (dfactor, dz, _) = primals, tangents
    product, terms = weighed(factor, z, idle), []
    if not isinstance(dfactor, SymbolicZero):  # 0 · -inf is NaN
        terms.append(dfactor * finite(z, (factor == 0) | idle))
    if not isinstance(dz, SymbolicZero):
        terms.append(factor * dz)
    return product, reduce(jnp.add, terms) if terms else jnp.zeros_like(product)


weighed.defjvp(_weighed_jvp, symbolic_zeros=True)


def finite(z: Array, unused: Array) -> Array:
    """z, but 0 where it is infinite and `unused`."""
    return jnp.where(jnp.isinf(z) & unused, 0, z)


def beyond_exp(z: Array) -> Array:
    """z, bounded where its exponential is 0."""
    return jnp.maximum(z, -1e4)


@jax.custom_jvp
def scaled(z: Array, scale: Array | None) -> Array:
    """scale · z of a scale > 0. Its own gradient is 0 where z is infinite, or stands for that."""
    return z if scale is None else scale * z


@scaled.defjvp
def _scaled_jvp(primals, tangents):
    (z, scale), (dz, dscale) = primals, tangents
    if scale is None:
        return z, dz
    finite_z = jnp.where(jnp.abs(z) < float(jnp.finfo(z.dtype).max) / 8, z, 0)
    return scaled(z, scale), scale * dz + dscale * finite_z
