"""Where the logits of a token come from: they are given, or the product of its hidden state with a head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._dtypes import accumulator, product_dtype
from softmax_jax._sharding import vary_alike


@partial(jax.tree_util.register_dataclass, data_fields=["x", "weight", "bias"], meta_fields=["dtype", "transposed"])
@dataclass(frozen=True)
class Source:
    """Where a token's logits come from: they are `x`, or x @ weight + bias."""

    x: Any  # of a target also labels
    weight: Any = None  # [embed, classes], or [classes, embed] where it is `transposed`
    bias: Any = None
    dtype: Any = None  # in which the two are multiplied
    transposed: bool = False

    @classmethod
    def of_head(cls, x: Array, weight: Array, bias: Any = None, transposed: bool = False) -> "Source":
        bias = None if bias is None else jnp.asarray(bias)
        return cls(x, weight, bias, product_dtype(x.dtype, weight.dtype), bool(transposed))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits."""
        if self.weight is None:
            return self.x.shape
        return *self.x.shape[:-1], self.weight.shape[0 if self.transposed else 1]

    def of_classes(self) -> tuple[str, Array]:
        """The operand that holds the classes, by the name that a user knows."""
        return ("logits", self.x) if self.weight is None else ("weight", self.weight)

    def logits(self) -> Array:
        """[tokens, classes], of tokens on one axis. Of a sharded head these are the logits of this device's classes,
        and the gradient of `x`, which is the same on all devices, is the sum of theirs."""
        if self.weight is None:
            return self.x
        logits = _project(*vary_alike(self.x, self.weight), self.dtype, self.transposed)
        return logits if self.bias is None else logits + self.bias[None, :].astype(logits.dtype)


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
