"""What a class weighs: 0 where it does not exist, its class weight, its target."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

ROUNDING = 1.01e-5  # 1e-5 in any format
"""So far below 0 a subtraction may leave a probability that is 0."""


def existing(array: Any, where: Array | None) -> Any:
    """0 for a class that `where` hides, which may hold NaN."""
    return array if array is None or where is None else jnp.where(where, array, 0)


def target_of(probs: Array, class_weights: Array | None, where: Array | None, dtype: DTypeLike) -> Array:
    """t_v of probabilities. What `where` hides may be NaN."""
    probs, class_weights = existing(probs.astype(dtype), where), existing(class_weights, where)
    return probs if class_weights is None else class_weights * probs


def uniform(class_weights: Array | None, where: Array | None, z: Array) -> Array:
    """c_v of every class that exists."""
    each = jnp.ones_like(z) if class_weights is None else jnp.broadcast_to(class_weights, z.shape)
    return existing(each, where)
