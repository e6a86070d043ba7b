"""The one policy on number formats: read in any, compute in float32 (float64 for float64), answer in the operand's."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Integer, Num

# What the functions take: arrays of JAX or NumPy, numbers, and nested lists of them.
Nested = list[Any]
Floats = Float[ArrayLike, "..."] | Nested
Integers = Integer[ArrayLike, "..."] | Nested
Numbers = Num[ArrayLike, "..."] | Nested
Mask = Bool[ArrayLike, "..."] | Nested
AnyArray = ArrayLike | Nested
Scalar = Float[ArrayLike, ""] | float | int


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of losses, sums and accumulators for operands of `dtype`."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def upcast(x: Array) -> Array:
    """`x` in the dtype that its sums are taken in."""
    return x.astype(accumulator(x.dtype))


def product_dtype(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """The dtype that two operands of a matrix product are multiplied in: their promotion, also where the user has
    switched implicit promotion off."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def is_floating(a: Any) -> bool:
    """Of an array or what tells its dtype."""
    return jnp.issubdtype(a.dtype, jnp.floating)


def has_range(dtype: DTypeLike) -> bool:
    """Whether the format has float32's range: float16 and the 8-bit ones have not."""
    return float(jnp.finfo(dtype).max) > 1e38


def nan_unless(valid: Array, value: Array, unused: Array | None = None) -> Array:
    """`value`, and NaN where it is neither `valid` nor `unused`. As inf - inf: under `jax_disable_jit` a
    constant NaN would be an array of its own, at which `jax_debug_nans` stops though no entry of it is used."""
    valid = valid if unused is None else valid | unused
    absent = jnp.where(valid, 0, jnp.inf).astype(value.dtype)
    return jnp.where(valid, value, absent - absent)


def floating(x: Array) -> Array:
    """`x`, or its float32 copy (float64 of 64 bits) where it holds integers, as `jax.nn` has it."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.float64 if x.dtype.itemsize == 8 else jnp.float32)


def class_ids(ids: Array, classes: int) -> Array:
    """Integer labels as int32. Wide ones are clipped to just outside the classes first, never wrapped."""
    info = jnp.iinfo(ids.dtype)
    if info.max > jnp.iinfo(jnp.int32).max:
        ids = jnp.clip(ids, max(info.min, -1), classes)
    return ids.astype(jnp.int32)
