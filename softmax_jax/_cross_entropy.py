"""The door on logits."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Num

from softmax_jax import _checks
from softmax_jax._checks import Options, Reduction
from softmax_jax._sharding import Names, entries_of, exactly, explicit_mesh, fit, over_devices, psum
from softmax_jax._targets import Labels, SparseLabels
from softmax_jax._token_loss import divide, label_specs, mean_divisor, option_specs, prepare, weighted_losses

Scalar = Float[ArrayLike, ""] | float | int


def cross_entropy(
    logits: Float[ArrayLike, "..."],
    labels: Num[ArrayLike, "..."] | SparseLabels,
    *,
    axis: int = -1,
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
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    r"""Cross-entropy of softmax(logits) against integer or dense labels, exact in loss and gradient.

        ℓ = Σ_v c_v · target_v · (log_normalizer - z_v)  +  z_loss · log_normalizer²

        z = softcap · tanh(logit_scale · logits / softcap), or logit_scale · logits without a softcap
        log_normalizer = log Σ_v exp(z_v)
        target = (1-ε) · (one-hot or dense label) + ε/K,   ε = label_smoothing, K = number of existing classes

        "none": weights · ℓ      "sum": Σ weights · ℓ
        "mean": Σ weights · ℓ / Σ weights · c_y for integer labels, / Σ weights for dense ones; 0 where that is 0

    The gradient of the mean is the analytic (p - t)/N. Loss and every entry of the gradient are right to a few
    roundings also where p_y → 1 and others round to 0. Kept for the backward pass: the logits as they came, and a few
    numbers a token. Losses are in nats, float32 (float64 for float64 logits); a gradient has its operand's dtype.

    Args:
      logits: floating, `[*batch, classes]` for `axis=-1`. -inf is a class of probability zero; a row that holds +inf
        or NaN, or whose every logit is -inf, gives NaN.
      labels: integers of the batch shape: class ids. Or floats of the logits' shape: probabilities, of any sum.
        Or `SparseLabels`: those of a few classes a token.
        An id outside `[0, classes)` that is not `ignore_index` gives NaN in its row's loss and gradient.
      axis: the axis of the classes.
      where: bool, broadcastable to the logits; False: the class does not exist. An integer label on such a class has
        loss inf; a row without any class counts as weight 0.
      weights: bool, integer or float, broadcast to the batch shape. A row of weight 0 contributes exactly 0 to loss
        and gradients, whatever it holds.
      ignore_index: rows with this integer label get weight 0; in range or not.
      class_weights: c, `[classes]`. A class weight of 0 wins over an infinite loss.
      label_smoothing: ε in [0, 1].
      z_loss: factor of log_normalizer², not class-weighted.
      logit_scale: inverse temperature.
      softcap: bound of the logits, > 0. It makes -inf the finite -softcap; use `where` to remove a class.
      reduction: "mean", "sum" or "none".
      normalizer: replaces the mean's divisor, say by the token count of all accumulation steps or devices; 0 gives 0.
      axis_name: inside `jax.shard_map`, the mesh axis or axes that the classes are sharded over. `logits`, dense
        labels, `where` and `class_weights` are then this device's part of the classes (`where` may pad them to even
        parts), integer labels ids among all of them; the loss is that of the whole, the same on all these devices.
        Gradients need check_vma=True, the default. Under plain `jit` sharded arrays need no `axis_name`. Leave it out
        where the tokens are sharded: each device's would count as further classes of the same tokens, a wrong number
        that no type tells. To see it, look at the loss of `0 * logits`: it must be the log of the number of classes.
      forward_mode: True makes `jax.jvp`, `jax.jacfwd` and `jax.linearize` work, which JAX refuses for a function with a
        reverse rule ("can't apply forward-mode autodiff (jvp) to a custom_vjp function"). The same values;
        `jax.grad` works too, but makes more passes over the logits.

    Every float option may be a traced scalar, and has a gradient; `weights`, `class_weights` and dense labels too.
    Of traced options, a value out of range gives NaN.

    Returns:
      A scalar, or the batch shape for `reduction="none"`.

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and numbers that do not fit; the message says which.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import cross_entropy
    >>> logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 30.0, 0.0]])
    >>> labels = jnp.array([0, 1])
    >>> [f"{loss:.5e}" for loss in cross_entropy(logits, labels, reduction="none")]
    ['4.07606e-01', '1.87152e-13']
    >>> jax.grad(cross_entropy)(logits, labels).shape
    (2, 3)

    Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, on why the tail matters; Szegedy et al.,
    CVPR 2016 (label smoothing); Chowdhery et al., "PaLM", 2022 (z-loss); Gemma Team, "Gemma 2", 2024 (softcap).
    """
    logits = jnp.asarray(logits)
    _checks.floating("logits", logits)
    axis = _checks.class_axis("logits", logits.shape, axis)
    labels = _checks.labels_of(labels, logits.shape, axis)
    options = _checks.options_for(
        logits.shape,
        logits.dtype,
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
    class_axes = _checks.mesh_axes(axis_name, bool(forward_mode))
    _checks.sharded("logits", logits, class_axes)
    divisor = _checks.reduction_of(reduction, normalizer, logits.dtype)
    how = _How(axis, reduction, bool(forward_mode), class_axes)
    return _cross_entropy(logits, labels, options, divisor, how)


class _How(NamedTuple):
    """Static arguments."""

    axis: int
    reduction: Reduction
    forward_mode: bool
    class_axes: Names  # the mesh axes of the classes
    token_axes: Names = ()  # those of the tokens, where the loss is one of all devices


@partial(jax.jit, static_argnames="how")
def _cross_entropy(logits: Array, labels: Labels, options: Options, normalizer: Any, how: _How) -> Array:
    operands, axis = (logits, labels, options, normalizer), how.axis
    mesh = explicit_mesh(operands)
    if mesh is None:
        return _of_device(*operands, how=how)
    every = entries_of(logits)
    batch, classes = every[:axis] + every[axis + 1 :], every[axis]
    of_labels = label_specs(labels, batch, classes, axis)
    specs = exactly(every), of_labels, option_specs(options, batch, classes, axis), fit(normalizer, ())
    f = partial(_of_device, how=how._replace(class_axes=how.class_axes + classes, token_axes=sum(batch, ())))
    return over_devices(f, mesh, operands, specs, exactly(batch if how.reduction == "none" else ()))


def _of_device(logits: Array, labels: Labels, options: Options, normalizer: Any, how: _How) -> Array:
    """The loss of one device's part."""
    axis, class_axes, token_axes = how.axis, how.class_axes, how.token_axes
    labels, weights, options = prepare(labels, options, logits.shape, logits.dtype, axis, class_axes)
    losses = weighted_losses(logits, labels, weights, options, axis, class_axes, how.forward_mode)
    if how.reduction == "none":
        return losses
    loss = psum(jnp.sum(losses), token_axes)
    if how.reduction == "sum":
        return loss
    return divide(loss, mean_divisor(labels, weights, options, losses.size, normalizer, class_axes, token_axes))
