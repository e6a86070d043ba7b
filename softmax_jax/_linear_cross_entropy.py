"""The door on hidden states and a head: the loss of x @ weight + bias without its logits."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float, Num

from softmax_jax import _checks
from softmax_jax._checks import Options, Reduction
from softmax_jax._cross_entropy import Scalar
from softmax_jax._dtypes import product_dtype
from softmax_jax._head import Each, Shared, classes_of, dealt, logits_of, prepared, reduced, specs_of
from softmax_jax._sharding import Names, exactly, explicit_mesh, fit, over_devices
from softmax_jax._targets import Labels, SparseLabels
from softmax_jax._token_loss import divide, label_specs, mean_divisor, option_specs, weighted_losses


def linear_cross_entropy(
    x: Float[ArrayLike, "*batch embed"],
    weight: Float[ArrayLike, "_ _"],
    labels: Num[ArrayLike, "..."] | SparseLabels,
    *,
    bias: Float[ArrayLike, " classes"] | None = None,
    transpose_weight: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: Num[ArrayLike, " classes"] | None = None,
    label_smoothing: Scalar = 0.0,
    z_loss: Scalar = 0.0,
    logit_scale: Scalar = 1.0,
    softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "..."]:
    """`cross_entropy(x @ weight + bias, labels, ...)` without ever holding the logits.

    Tokens go through in chunks: one matrix product makes a chunk's logits, the very functions of `cross_entropy` make
    its loss and, in the same pass, its gradients, and the logits are dropped. Memory beyond operands and gradients is
    one chunk's logits, their gradient, and the float32 gradients of 16-bit operands until they are cast, whatever the
    number of tokens. Products multiply in the operands' dtype and accumulate in float32, as the sum over chunks does.

    Args:
      x: hidden states, `[*batch, embed]`.
      weight: `[embed, classes]`, or `[classes, embed]` with `transpose_weight=True` (tied embeddings; not copied).
      labels: integer class ids of the batch shape, or probabilities `[*batch, classes]`, or `SparseLabels`.
      bias: `[classes]`, added to the logits.
      where: bool, broadcastable to `[*batch, classes]`. A column of `weight` that it hides is multiplied all the same:
        it may hold any number, but a NaN there makes the gradient of `x` NaN.
      axis_name: inside `jax.shard_map`, the mesh axis or axes that the classes are sharded over: `weight`, `bias`,
        dense labels, `where` and `class_weights` are this device's part of the classes; `x` and integer labels are the
        same along them (if each device has other tokens there, `jax.lax.all_gather` them first).
      chunk_size: the most tokens a chunk may have: of one device's under `shard_map` and in explicit sharding, of all
        in automatic sharding. By default their logits take 32 MiB in float32, or as much as the head's gradient that
        is summed beside them if embed is up to 512, from 1024 on half as much. Chunks are of equal size; where no such
        size divides the number of tokens, the per-token operands are copied once, padded with tokens of weight 0.
        Strided: chunk c holds tokens c, c + count, c + 2 count, ...

    The other arguments, their edge behaviour, the reductions and what is raised are those of `cross_entropy`. A row
    of weight 0 contributes exactly 0 also to the gradient of `weight`, whatever its `x` holds. Gradients flow to `x`,
    `weight`, `bias`, `weights`, `class_weights`, the float options and dense labels; those that nobody asks for are
    not computed (a frozen head costs two matrix products, not three).

    Returns:
      A scalar, or the batch shape for `reduction="none"`, whose backward pass makes each chunk's logits again.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import linear_cross_entropy
    >>> x, weight = jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5)
    >>> labels = jnp.array([0, 4, 2])
    >>> print(f"{linear_cross_entropy(x, weight, labels):.5f}")
    2.45191
    >>> dx, dweight = jax.grad(linear_cross_entropy, argnums=(0, 1))(x, weight, labels)

    Forward mode (`jax.jvp`, `jax.jacfwd`): use `cross_entropy(x @ weight, labels, forward_mode=True)`.

    Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025; Hsu et al., "Liger Kernel", 2024.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    classes = _checks.head_size(x, weight, bias, transpose_weight)
    shape, axis = (*x.shape[:-1], classes), x.ndim - 1
    dtype = product_dtype(x.dtype, weight.dtype)
    labels = _checks.labels_of(labels, shape, axis)
    options = _checks.options_for(
        shape,
        dtype,
        axis,
        labels,
        where=where,
        weights=weights,
        ignore_index=ignore_index,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    class_axes = _checks.mesh_axes(axis_name)
    _checks.sharded("weight", weight, class_axes)
    divisor = _checks.reduction_of(reduction, normalizer, dtype)
    bias = None if bias is None else jnp.asarray(bias)
    how = _How(bool(transpose_weight), reduction, _checks.chunk_size_of(chunk_size), class_axes)
    return _linear_cross_entropy(x, weight, bias, labels, options, divisor, how)


class _How(NamedTuple):
    """Static arguments."""

    transpose_weight: bool
    reduction: Reduction
    chunk_size: int | None
    class_axes: Names  # the mesh axes of the classes
    token_axes: Names = ()  # those of the tokens, where the loss is one of all devices


@partial(jax.jit, static_argnames="how")
def _linear_cross_entropy(
    x: Array, weight: Array, bias: Array | None, labels: Labels, options: Options, normalizer: Any, how: _How
) -> Array:
    operands = x, weight, bias, labels, options, normalizer
    mesh = explicit_mesh(operands)
    if mesh is None:
        return _of_device(*operands, how=how)
    batch, classes, head_specs = specs_of(x, weight, bias, how.transpose_weight)
    specs = (
        *head_specs,
        label_specs(labels, batch, classes, x.ndim - 1),
        option_specs(options, batch, classes, x.ndim - 1),
        fit(normalizer, ()),
    )
    f = partial(_of_device, how=how._replace(class_axes=how.class_axes + classes, token_axes=sum(batch, ())))
    return over_devices(f, mesh, operands, specs, exactly(batch if how.reduction == "none" else ()))


def _of_device(
    x: Array, weight: Array, bias: Array | None, labels: Labels, options: Options, normalizer: Any, how: _How
) -> Array:
    """The loss of one device's part."""
    batch, tokens, class_axes, token_axes = x.shape[:-1], math.prod(x.shape[:-1]), how.class_axes, how.token_axes
    labels, weights, options, dtype = prepared(x, weight, labels, options, how.transpose_weight, class_axes)
    classes = classes_of(weight, how.transpose_weight)
    shared, each = dealt(x, weight, bias, labels, weights, options, dtype, classes, how.chunk_size)
    loss = reduced(partial(_chunk_losses, how, dtype), shared, each, batch, how.reduction, token_axes)
    if how.reduction != "mean":
        return loss
    return divide(loss, mean_divisor(labels, weights, options, tokens, normalizer, class_axes, token_axes))


def _chunk_losses(how: _How, dtype: DTypeLike, shared: Shared, chunk: Each) -> Array:
    """weights · ℓ of one chunk of tokens, [size]."""
    logits, options = logits_of(shared, chunk, dtype, how.transpose_weight)
    return weighted_losses(logits, chunk.labels, chunk.weights, options, 1, how.class_axes)
