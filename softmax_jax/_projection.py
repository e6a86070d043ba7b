"""The logits of hidden states, with a rule for how their gradients are multiplied and summed."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._dtypes import accumulator
from softmax_jax._sharding import vary_alike

# logits = x · weight, dx = dlogits · weightᵀ, dweight = xᵀ · dlogits: operands in the layer's dtype, results in
# float32, those of `dx` and `dweight` too: `x` and `weight` come in as float32 and are cast here, or autodiff would
# round their gradients to 16 bits in every chunk, before the divisor is applied.


def _dot(a: Array, a_axis: int, b: Array, b_axis: int, dtype: DTypeLike) -> Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=accumulator(dtype))


def _logits(x: Array, weight: Array, dtype: DTypeLike, transpose_weight: bool) -> Array:
    return _dot(x, 1, weight, 1 if transpose_weight else 0, dtype)


def _logits_fwd(x, weight, dtype, transpose_weight):
    return _logits(x, weight, dtype, transpose_weight), (x, weight)


def _logits_bwd(dtype, transpose_weight, residuals, dlogits):
    x, weight = residuals
    dlogits, scale = _in_range(dlogits, dtype)
    dx = _dot(dlogits, 1, weight, 0 if transpose_weight else 1, dtype) / scale
    dweight = _dot(dlogits, 0, x, 0, dtype) if transpose_weight else _dot(x, 0, dlogits, 0, dtype)
    return dx.astype(x.dtype), (dweight / scale).astype(weight.dtype)


def _in_range(dlogits: Array, dtype: DTypeLike) -> tuple[Array, Array | float]:
    """(dlogits · scale, scale): for float16, the largest at 2**14, as token weights and p may leave its range."""
    if jnp.dtype(dtype) != jnp.float16:
        return dlogits, 1.0
    largest = lax.stop_gradient(jnp.max(jnp.abs(dlogits), initial=0))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), 2.0**14 / jnp.maximum(largest, 1e-30), 1)
    return dlogits * scale, scale


_project = jax.custom_vjp(_logits, nondiff_argnums=(2, 3))
_project.defvjp(_logits_fwd, _logits_bwd)


def project(x: Array, weight: Array, dtype: DTypeLike, transpose_weight: bool) -> Array:
    """x · weight, [tokens, classes], multiplied in `dtype`. Of a sharded head these are the logits of this device's
    classes, and the gradient of `x`, which is the same on all devices, is the sum of theirs."""
    return _project(*vary_alike(x, weight), dtype, transpose_weight)
