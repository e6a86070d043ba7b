"""Where the logits of a token come from: they are given, or the product of its hidden state with a head.

Of a head, and of tokens in chunks, the product and its two gradients:

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
from softmax_jax._inputs.arrays import Shape, accumulator, floating, has_range, is_floating, nan_unless, product_dtype


@partial(jax.tree_util.register_dataclass, data_fields=["x", "weight", "bias"], meta_fields=["dtype", "transposed"])
@dataclass(frozen=True)
class Source:
    """The logits are `x`, or x @ weight + bias."""

    x: Any
    weight: Any = None  # [embed, classes], or [classes, embed] where it is `transposed`
    bias: Any = None
    dtype: Any = None  # of the logits; in which the two are multiplied
    transposed: bool = False

    @property
    def shape(self) -> Shape:
        """That of the logits."""
        if self.weight is None:
            return self.x.shape
        return *self.x.shape[:-1], self.weight.shape[0 if self.transposed else 1]

    def of_classes(self) -> tuple[str, Array]:
        """The operand that holds the classes, by the name that a user knows."""
        return ("logits", self.x) if self.weight is None else ("weight", self.weight)


def given_logits(name: str, logits: Any, labels: Any = None) -> Source:
    """The `labels` behind them tell whether the two were swapped."""
    swapped = hasattr(labels, "dtype") and is_floating(labels)
    logits = floating(name, logits, f"Pass `{name}` first, then `labels`." if swapped else None)
    return Source(logits, dtype=logits.dtype)


def head(x: Any, weight: Any, bias: Any, transpose_weight: bool, dtype: Any = None, prefix: str = "") -> Source:
    """The logits of a head, once its operands agree; their names begin with `prefix`."""
    x_name, weight_name, bias_name = (f"{prefix}{name}" for name in ("x", "weight", "bias"))
    x, weight = floating(x_name, x), floating(weight_name, weight)
    layout, other = "(embed, classes)", "(classes, embed)"
    layout, other = (other, layout) if transpose_weight else (layout, other)
    shapes = f"{x_name}.shape={x.shape}, {weight_name}.shape={weight.shape}"
    if weight.ndim != 2 or x.ndim == 0:
        raise ValueError(
            f"`{x_name}` must be (*batch, embed) and `{weight_name}` {layout}; got {shapes}. Reshape them to that."
        )
    classes, embed = weight.shape if transpose_weight else weight.shape[::-1]
    if x.shape[-1] != embed:
        way_out = f"Pass the hidden states that this head takes, [..., {embed}]."
        if x.shape[-1] == classes:
            way_out = f"Pass `{prefix}transpose_weight={not transpose_weight}` if yours is {other}."
        raise ValueError(
            f"`{x_name}` and `{weight_name}` must share the embed axis; got {shapes}, and `{weight_name}` is {layout}. "
            f"{way_out}"
        )
    if classes == 0:
        raise ValueError(
            f"there are no classes: {weight_name}.shape={weight.shape}, {layout}. Pass at least one class."
        )
    if bias is not None:
        bias = floating(bias_name, bias)
        if bias.shape != (classes,):
            raise ValueError(
                f"`{bias_name}` must hold one number a class, {(classes,)}; got {bias_name}.shape={bias.shape}, "
                f"{weight_name}.shape={weight.shape}, {layout}. Reshape it."
            )
    dtype = product_dtype(x.dtype, weight.dtype) if dtype is None else _multiplied_in(dtype)
    return Source(x, weight, bias, dtype, bool(transpose_weight))


def _multiplied_in(dtype: Any) -> DTypeLike:
    """The `dtype` of a head's product."""
    try:
        found = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"`dtype` must be a dtype; got {dtype!r}. Pass jnp.bfloat16, say, or None.") from None
    if found not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise TypeError(
            f"`dtype` must be floating, of 16 bits or more; got {dtype!r}. Pass jnp.bfloat16, say, or None."
        )
    return found


# The product, of tokens in chunks.


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
        return self._logits_of(self._some(self.x, index, 1))

    def differentiable_logits(self, index: ArrayLike) -> Array:
        """The same, for JAX to differentiate: a row of weight 0 that is not finite has logits NaN, and no gradient."""
        x = self._some(self.x, index, 1)
        if self.weights is None:
            return self._logits_of(x)
        counts = jnp.all(jnp.isfinite(x), -1) | (self._some(self.weights, index, 1) != 0)
        return nan_unless(counts, self._logits_of(self._rows(index, 1)))

    def _logits_of(self, rows: Array) -> Array:
        x, weight = vary_alike(rows[:, 0], self.weight)
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
