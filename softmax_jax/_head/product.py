"""A head's product and its two gradients, of tokens in chunks.

    logits = x · weight        dx = dlogits · weightᵀ        dweight = xᵀ · dlogits

Operands are multiplied in the layer's dtype, results are float32: a gradient is rounded to 16 bits once, at the end,
after the divisor is applied.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from softmax_jax._devices import unwritten, vary, vary_alike, varying
from softmax_jax._inputs.arrays import accumulator, has_range


@partial(jax.tree_util.register_dataclass, data_fields=["x", "weight", "weights"], meta_fields=["dtype", "transposed"])
@dataclass(frozen=True)
class Product:
    """x @ weight, of tokens in chunks. Of a sharded head these are the logits of this device's classes, and the
    gradient of `x`, which is the same on all devices, is the sum of theirs."""

    x: Any  # [size, count, embed]
    weight: Any  # [embed, classes], or [classes, embed] where it is `transposed`
    weights: Any = None  # [size, count]: a row of weight 0 is 0, if it is not finite
    dtype: Any = None  # in which the two are multiplied
    transposed: bool = False

    def operands(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """(x, weight) in that dtype, varying over the same devices."""
        return vary_alike(self.x.astype(dtype), self.weight.astype(dtype))

    def logits(self, index: ArrayLike) -> Array:
        """[size, classes] of one chunk."""
        x, weight = vary_alike(self._some(self.x, index, 1)[:, 0], self.weight)
        return _dot(x, weight, ((1,), (1 if self.transposed else 0,)), self.dtype)

    def buffer(self, chunks: int) -> Array:
        """For the dlogits of that many chunks."""
        classes = self.weight.shape[0 if self.transposed else 1]
        buffer = unwritten((len(self.x), chunks, classes), kept_in(self.dtype))
        return vary(buffer, varying(self.x, self.weight))

    def gradients(self, dlogits: Array, first: ArrayLike) -> tuple[Array, Array]:
        """(dx, dweight) of the chunks from the `first` on, by their dlogits, [size, chunks, classes]."""
        dlogits, scale = _in_range(dlogits, self.dtype)
        x, weight, dlogits = vary_alike(self._rows(first, dlogits.shape[1]), self.weight, dlogits)
        shape = x.shape
        if shape[1] == 1:  # matrices, of which XLA on the CPU copies none to sum over two axes
            x, dlogits = x[:, 0], dlogits[:, 0]
        tokens = tuple(range(x.ndim - 1))
        dx = _dot(dlogits, weight, ((x.ndim - 1,), (0 if self.transposed else 1,)), self.dtype)
        pair = (dlogits, x) if self.transposed else (x, dlogits)
        return dx.reshape(shape) / scale, _dot(*pair, (tokens, tokens), self.dtype) / scale

    def add(self, gradients: tuple[Array, Array], dlogits: Array, first: ArrayLike) -> tuple[Array, Array]:
        """(dx, dweight) with those of the chunks from the `first` on."""
        (dx, dweight), (of_chunks, more) = gradients, self.gradients(dlogits, first)
        return lax.dynamic_update_slice_in_dim(dx, of_chunks, first, 1), dweight + more

    def _rows(self, first: ArrayLike, chunks: int) -> Array:
        """What takes part in the head's gradient."""
        some = self._some(self.x, first, chunks)
        return some if self.weights is None else zero_nonfinite_unused(some, self._some(self.weights, first, chunks))

    def _some(self, array: Array, first: ArrayLike, chunks: int) -> Array:
        return lax.dynamic_slice_in_dim(array, first, chunks, 1)


def zero_nonfinite_unused(array: Array, weights: Array | None) -> Array:
    """Rows of weight 0 hold 0 where they hold a number that is not finite."""
    if weights is None:
        return array
    rest = tuple(range(weights.ndim, array.ndim))
    rows = (weights == 0) & ~jnp.all(jnp.isfinite(array), rest)
    return jnp.where(jnp.expand_dims(rows, rest), 0, array)


def _dot(a: Array, b: Array, axes: tuple, dtype: DTypeLike) -> Array:
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), (axes, ((), ())), preferred_element_type=accumulator(dtype)
    )


def kept_in(dtype: DTypeLike) -> jnp.dtype:
    """In what dlogits are kept until they are multiplied: token weights and p may leave the range of float16."""
    return jnp.dtype(dtype) if has_range(dtype) else accumulator(dtype)


def _in_range(dlogits: Array, dtype: DTypeLike) -> tuple[Array, Array | float]:
    """(dlogits · scale, scale), the largest at a quarter of the range, where that is narrow."""
    if has_range(dtype):
        return dlogits, 1.0
    largest = lax.stop_gradient(jnp.max(jnp.abs(dlogits), initial=0))
    highest = float(jnp.finfo(dtype).max) / 4
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), highest / jnp.maximum(largest, 1e-30), 1)
    return dlogits * scale, scale
