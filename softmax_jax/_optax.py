"""Optax's names, signatures and values, for those who change only the import; exact."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from softmax_jax._core import Settings, compute_of_labels
from softmax_jax._head.product import given_logits
from softmax_jax._inputs.arrays import (
    AnyArray,
    Axes,
    Floats,
    Integers,
    Mask,
    Numbers,
    array,
    axes_of,
    check_broadcastable,
    class_axis,
    classes_last,
    floating,
    mask,
    scalar,
    upcast,
)
from softmax_jax._inputs.hints import hinted
from softmax_jax._inputs.options import Options
from softmax_jax._softmax import log_softmax
from softmax_jax._sums.loss import weighted_losses


@hinted
def softmax_cross_entropy(
    logits: Floats,
    labels: Numbers,
    axis: int | Axes | None = -1,
    where: Mask | None = None,
) -> Float[Array, "..."]:
    """-Σ_v labels_v · log softmax(logits)_v per example: `optax.softmax_cross_entropy`, exact.

    Args:
      logits: floating, any shape.
      labels: probabilities (or an integer one-hot) of the logits' shape.
      axis: the class axis or axes; None for all.
      where: bool; of the logits' rank: which classes exist, others are left out of the sum; of the batch shape:
        which rows count, others give 0.

    On purpose different from Optax: 0 · -inf is 0 and the result is float32 (float64 for float64 logits).

    Raises:
      TypeError, ValueError: for shapes, dtypes and axes that do not fit.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy
    >>> softmax_cross_entropy(jnp.array([[30.0, 0.0]]), jnp.array([[1.0, 0.0]])).tolist()
    [9.357622912219837e-14]
    """
    logits, labels = floating("logits", logits), array("labels", labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = labels.astype(jnp.float32)
    labels, axes = floating("labels", labels), axes_of("logits", logits.shape, axis)
    if labels.shape != logits.shape:
        raise ValueError(
            f"`labels` must be of the logits' shape, {logits.shape}; got labels.shape={labels.shape}. Pass "
            "probabilities, or class ids to `softmax_cross_entropy_with_integer_labels`."
        )
    merged, where = classes_last(logits, axes), _mask(where, logits, axes)
    return _losses(merged, classes_last(labels, axes), where, axes)


@hinted
def softmax_cross_entropy_with_integer_labels(
    logits: Floats,
    labels: Integers,
    axis: int | Axes = -1,
    where: Mask | None = None,
) -> Float[Array, "..."]:
    """-log softmax(logits)_labels per example: `optax.softmax_cross_entropy_with_integer_labels`, exact.

    Args:
      logits: floating, any shape.
      labels: class ids of the batch shape; with several axes, flat indices into them in the order given.
      axis: the class axis or axes.
      where: bool; of the logits' rank: which classes exist; of the batch shape: which rows count, others give 0.

    On purpose different from Optax: a label out of range is NaN (Optax: -1 is the last class), one hidden by `where`
    is inf (Optax: a negative loss), and the result is float32 (float64 for float64 logits).

    Raises:
      TypeError, ValueError: for shapes, dtypes and axes that do not fit.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import softmax_cross_entropy_with_integer_labels
    >>> softmax_cross_entropy_with_integer_labels(jnp.array([[30.0, 0.0]]), jnp.array([0])).tolist()
    [9.357622912219837e-14]
    """
    logits, labels = floating("logits", logits), array("labels", labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"`labels` must be integers; got dtype {labels.dtype}. Pass class ids, or use `softmax_cross_entropy` for "
            "probabilities."
        )
    if axis is None:
        raise TypeError("`axis` must be an int or a tuple of ints; got None. Name the axes, in the labels' order.")
    axes = axes_of("logits", logits.shape, axis)
    merged, where = classes_last(logits, axes), _mask(where, logits, axes)
    return _losses(merged, labels, where, axes)


@hinted
def safe_softmax_cross_entropy(logits: Floats, labels: Numbers) -> Float[Array, "..."]:
    """`softmax_cross_entropy` whose labels broadcast to the logits' shape: `optax.safe_softmax_cross_entropy`.

    Safe is what every function here is: 0 · -inf is 0.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import safe_softmax_cross_entropy
    >>> safe_softmax_cross_entropy(jnp.array([[0.0, -jnp.inf], [0.0, 0.0]]), jnp.array([1.0, 0.0]))
    Array([0.       , 0.6931472], dtype=float32)
    """
    logits = array("logits", logits)
    return softmax_cross_entropy(logits, _broadcast(labels, logits))


@hinted
def poly_loss_cross_entropy(
    logits: Floats,
    labels: Numbers,
    *,
    epsilon: ArrayLike = 2.0,
    axis: int | Axes | None = -1,
    where: Mask | None = None,
) -> Float[Array, "..."]:
    """Σ_v labels_v · (-log p_v + ε (1 - p_v)), p = softmax(logits): `optax.losses.poly_loss_cross_entropy`.

    Exact in both terms where p_v → 1, as 1 - p_v = -expm1(log p_v). Labels broadcast to the logits' shape; the other
    arguments are those of `softmax_cross_entropy`. `epsilon` may be traced, and has a gradient.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import poly_loss_cross_entropy
    >>> f"{poly_loss_cross_entropy(jnp.array([30.0, 0.0]), jnp.array([1.0, 0.0])):.6e}"
    '2.807287e-13'

    Leng et al., "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022,
    arXiv:2204.12511.
    """
    logits = floating("logits", logits)
    axes = axes_of("logits", logits.shape, axis)
    where = _mask(where, logits, axes)
    epsilon = scalar("epsilon", epsilon, logits.dtype, -float("inf"), float("inf"))
    labels = classes_last(_broadcast(labels, logits), axes)
    return _poly_loss(classes_last(logits, axes), labels, epsilon, where, _axis(axes))


@partial(jax.jit, static_argnums=4)
@partial(jax.checkpoint, static_argnums=4)
def _poly_loss(logits: Array, labels: Array, epsilon: Array, where: Array | None, axis: int) -> Array:
    labels = labels.astype(epsilon.dtype)
    labels = labels if where is None else jnp.where(where, labels, 0)
    log_p = log_softmax(logits.astype(epsilon.dtype), axis, where)
    log_p = jnp.where((labels == 0) & jnp.isinf(log_p), 0, log_p)
    terms = labels * (-log_p - epsilon * jnp.expm1(log_p))
    return jnp.sum(terms, axis)


def _losses(logits: Array, labels: Array, where: Array | None, axes: Axes) -> Array:
    source, axis = given_logits("logits", logits), class_axis("logits", logits.shape, _axis(axes))
    return compute_of_labels(weighted_losses, source, labels, Options(where), Settings(forward_mode=True), axis)[0]


def _broadcast(labels: AnyArray, logits: Array) -> Array:
    labels = array("labels", labels)
    check_broadcastable("labels", labels.shape, logits.shape, "the logits' shape")
    labels = upcast(labels) if jnp.issubdtype(labels.dtype, jnp.floating) else labels  # its gradient is cast once
    return jnp.broadcast_to(labels, logits.shape)


def _mask(where: AnyArray | None, logits: Array, axes: Axes) -> Array | None:
    """`where` for `classes_last(logits, axes)`: of lower rank than the logits it masks rows."""
    if where is None:
        return None
    where = array("where", where)
    if where.ndim != logits.ndim:
        batch = tuple(n for a, n in enumerate(logits.shape) if a not in axes)
        where = jnp.expand_dims(mask("where", where, batch), axes)
    where = mask("where", where, logits.shape)
    return where if len(axes) == 1 else classes_last(jnp.broadcast_to(where, logits.shape), axes)


def _axis(axes: Axes) -> int:
    return axes[0] if len(axes) == 1 else -1
