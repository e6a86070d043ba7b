"""The options of a function and their checks; what is done to a logit before its softmax; what a class weighs."""

import math
from functools import reduce
from numbers import Real
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from softmax_jax._devices import Classes, psum
from softmax_jax._inputs.arrays import RESHAPE, Shape, array, check_broadcastable, class_mask, scalar, upcast

Reduction = Literal["mean", "sum", "none"]


class Options(NamedTuple):
    """First as they were given, then as arrays; None where one is neutral and its path absent."""

    where: Any = None  # broadcastable to the logits, of their rank
    weights: Any = None  # the batch shape
    ignore_index: Any = None
    class_weights: Any = None  # broadcastable to the logits, of their rank
    label_smoothing: Any = None  # scalars, as are those that follow
    z_loss: Any = None
    logit_scale: Any = None
    softcap: Any = None
    teacher_softcap: Any = None
    temperature: Any = None
    beta: Any = None

    @property
    def adjustment(self) -> "Adjustment":
        return Adjustment(self.where, self.logit_scale, self.softcap)


SCALARS: dict[str, tuple] = {
    "label_smoothing": (0, 0.0, 1.0, False),
    "z_loss": (0, -math.inf, math.inf, False),
    "logit_scale": (1, -math.inf, math.inf, False),
    "softcap": (None, 0.0, math.inf, True),
    "teacher_softcap": (None, 0.0, math.inf, True),
    "temperature": (1, 0.0, math.inf, True),
}
"""The neutral number of each, and its range: from, to, and whether it must be above the first."""


def check_options(options: Options, shape: Shape, axis: int, dtype: DTypeLike) -> Options:
    """This checks every option but `ignore_index` and `beta`, for logits of `shape` and `dtype`. One that changes
    nothing becomes None."""
    weights, class_weights, classes = options.weights, options.class_weights, (shape[axis],)
    if weights is not None:
        weights = array("weights", weights)
        if jnp.issubdtype(weights.dtype, jnp.complexfloating):
            raise TypeError(f"`weights` must be bool, integer or floating; got {weights.dtype}. Pass its `.real`.")
        of_classes = "One number a class is `class_weights`, of the cross-entropies."
        way_out = of_classes if weights.shape == classes else RESHAPE
        check_broadcastable("weights", weights.shape, shape[:axis] + shape[axis + 1 :], "the batch shape", way_out)
    if class_weights is not None:
        class_weights = array("class_weights", class_weights)
        if class_weights.shape != classes or jnp.issubdtype(class_weights.dtype, jnp.complexfloating):
            raise ValueError(
                f"`class_weights` must hold one real number a class, shape {classes}; got class_weights.shape="
                f"{class_weights.shape}, dtype {class_weights.dtype}, for logits of shape {shape} with the classes on "
                f"axis {axis}. Use `weights` for one number a token."
            )
    scalars = {}
    for name, (neutral, *limits) in SCALARS.items():
        value = getattr(options, name)
        is_neutral = value is None or (isinstance(value, Real) and not isinstance(value, bool) and value == neutral)
        scalars[name] = None if is_neutral else scalar(name, value, dtype, *limits)
    where = class_mask(options.where, shape, axis)
    return options._replace(where=where, weights=weights, class_weights=class_weights, **scalars)


def check_reduction(reduction: Reduction, normalizer: ArrayLike | None, dtype: DTypeLike) -> Array | np.ndarray | None:
    """This checks `reduction`, and returns the checked `normalizer`."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"`reduction` must be 'mean', 'sum' or 'none'; got {reduction!r}.")
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(
            f"`normalizer` replaces the divisor of the mean; got reduction={reduction!r}, normalizer={normalizer}. "
            "Pass reduction='mean', or divide the result yourself."
        )
    return scalar("normalizer", normalizer, dtype, -math.inf, math.inf)


# What is done to a logit before its softmax.


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
        z = z if softcap is None else softcapped(z, softcap)
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
def softcapped(z: Array, cap: Array) -> Array:
    u = z / cap
    return jnp.where(u * u < jnp.finfo(z.dtype).eps, z, cap * jnp.tanh(u))


@softcapped.defjvp
def _softcapped_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z, cap), (dz, dcap) = primals, tangents
    u = z / cap
    q = jnp.exp(-2 * jnp.abs(u))
    slope = 4 * q / (1 + q) ** 2
    small = jnp.clip(4 * u * u, 0, 4)
    tail = jnp.ones_like(u)
    for k in range(17 if u.dtype == jnp.float64 else 11, 3, -2):
        tail = 1 + small * tail / (k * (k - 1))
    by_cap = jnp.where(jnp.abs(u) < 1, u * small / 6 * tail * slope, jnp.tanh(u) - u * slope)
    return softcapped(z, cap), slope * dz + by_cap * dcap


def shifted(logits: Array, adjustment: Adjustment, shift: Array, axis: int | tuple[int, ...]) -> Array:
    """z - m in float32."""
    shift = jnp.expand_dims(shift, axis)
    return without_fma(upcast(adjust(logits, adjustment)), shift) - shift


def without_fma(z: Array, of_row: Array) -> Array:
    """z as it is by itself, for a subtraction. Of logits that are a product made in the same program, a · b - m would
    become one fused multiply-add, which leaves the rounding of a · b at the maximum: half an ulp, 8 from |z| = 2^27 on.
    Between the two stands an addition of 0 that no compiler knows to be one: `of_row` less itself, as it may be NaN."""
    of_row = lax.stop_gradient(of_row)
    return z + (of_row - of_row)


def adjusted_at(ids: Array, logit: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """z of each token's logit at a class."""
    where = None if adjustment.where is None else classes.take_one(ids, adjustment.where)
    return upcast(adjust(logit, adjustment._replace(where=where)))


def adjusted_at_global(ids: Array, logits: Array, adjustment: Adjustment, classes: Classes) -> Array:
    """z of each token at an id among all devices' classes; 0 for what is none of them."""

    def read(ids: Array) -> Array:
        return adjusted_at(ids, classes.take_one(ids, logits), adjustment, classes)

    return psum(classes.read_local(read, ids - classes.first_id(logits), logits), classes.over)


@jax.custom_jvp
def safe_product(factor: Array, z: Array, idle: Array | bool = False) -> Array:
    """factor · z, but 0 where the factor is 0 and z = -inf; so is its derivative by the factor there, and where the
    product is `idle`: of no effect."""
    return factor * jnp.where(factor == 0, 0, z)


def _safe_product_jvp(primals: tuple, tangents: tuple) -> tuple:
    (factor, z, idle), (dfactor, dz, _) = primals, tangents
    product, terms = safe_product(factor, z, idle), []
    if not isinstance(dfactor, SymbolicZero):  # 0 · -inf is NaN
        terms.append(dfactor * zero_infinite(z, (factor == 0) | idle))
    if not isinstance(dz, SymbolicZero):
        terms.append(factor * dz)
    return product, reduce(jnp.add, terms) if terms else jnp.zeros_like(product)


safe_product.defjvp(_safe_product_jvp, symbolic_zeros=True)


def zero_infinite(z: Array, unused: Array) -> Array:
    """z, but 0 where it is infinite and `unused`."""
    return jnp.where(jnp.isinf(z) & unused, 0, z)


def clip_for_exp(z: Array) -> Array:
    """z, bounded where its exponential is 0."""
    return jnp.maximum(z, -1e4)


def zero_hidden(array: Any, where: Array | None) -> Any:
    """0 for a class that `where` hides, which may hold NaN."""
    return array if array is None or where is None else jnp.where(where, array, 0)


def weighted_targets(probs: Array, class_weights: Array | None, where: Array | None, dtype: DTypeLike) -> Array:
    """t_v of probabilities. What `where` hides may be NaN."""
    probs, class_weights = zero_hidden(probs.astype(dtype), where), zero_hidden(class_weights, where)
    return probs if class_weights is None else class_weights * probs


def even_targets(class_weights: Array | None, where: Array | None, z: Array) -> Array:
    """c_v of every class that exists."""
    each = jnp.ones_like(z) if class_weights is None else jnp.broadcast_to(class_weights, z.shape)
    return zero_hidden(each, where)
