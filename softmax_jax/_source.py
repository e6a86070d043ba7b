"""Where the logits of a token come from: they are given, or the product of its hidden state with a head."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._dtypes import is_floating, product_dtype
from softmax_jax._sharding import PyTree


@partial(jax.tree_util.register_dataclass, data_fields=["x", "weight", "bias"], meta_fields=["dtype", "transposed"])
@dataclass(frozen=True)
class Source:
    """Where a token's logits come from: they are `x`, or x @ weight + bias."""

    x: Any  # of a target without a head `Labels`
    weight: Any = None  # [embed, classes], or [classes, embed] where it is `transposed`
    bias: Any = None
    dtype: Any = None  # in which the two are multiplied
    transposed: bool = False

    @classmethod
    def of_head(
        cls, x: Array, weight: Array, bias: Any = None, transposed: bool = False, dtype: DTypeLike | None = None
    ) -> "Source":
        bias = None if bias is None else jnp.asarray(bias)
        dtype = product_dtype(x.dtype, weight.dtype) if dtype is None else dtype
        return cls(x, weight, bias, dtype, bool(transposed))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits."""
        if self.weight is None:
            return self.x.shape
        return *self.x.shape[:-1], self.weight.shape[0 if self.transposed else 1]

    def dtypes(self) -> list[DTypeLike]:
        """Of the floats that its logits come in."""
        floats = [a.dtype for a in jax.tree.leaves(self.x) if is_floating(a)]
        return floats if self.weight is None else [self.dtype]

    def of_classes(self) -> tuple[str, PyTree]:
        """The operand that holds the classes, by the name that a user knows."""
        return ("logits", self.x) if self.weight is None else ("weight", self.weight)
