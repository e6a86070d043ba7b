"""Where the logits of a token come from: they are given, or the product of its hidden state with a head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._inputs.arrays import Shape, floating, product_dtype


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


def given_logits(name: str, logits: Any) -> Source:
    logits = floating(name, logits)
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
        raise ValueError(
            f"`{x_name}` and `{weight_name}` must share the embed axis; got {shapes}. `{weight_name}` is {layout}: "
            f"pass `{prefix}transpose_weight={not transpose_weight}` if yours is {other}."
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
