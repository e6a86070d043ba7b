"""The divergence of a student from a teacher: for distillation, on logits and on hidden states."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from softmax_jax import _checks
from softmax_jax._adjustment import Adjustment
from softmax_jax._arguments import hinted
from softmax_jax._checks import Kind, Options, Reduction
from softmax_jax._classes import Classes
from softmax_jax._core import How, Operands, compute
from softmax_jax._divergence import divergence
from softmax_jax._divergence_formula import Logits, Pair
from softmax_jax._dtypes import AnyArray, Floats, Mask, Nested, Scalar, accumulator, product_dtype
from softmax_jax._labels import Dense, unused_by
from softmax_jax._masses import ROUNDING, existing
from softmax_jax._product import emptied
from softmax_jax._source import Source
from softmax_jax._sparse_labels import Sparse, SparseLabels


@hinted
def kl_divergence(
    logits: Floats,
    *,
    teacher_probs: Floats | SparseLabels | None = None,
    teacher_logits: Floats | None = None,
    axis: int = -1,
    where: Mask | None = None,
    weights: AnyArray | None = None,
    beta: Scalar = 0.0,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    teacher_softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_size: int | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    """Divergence of the student p = softmax(logits) from a teacher t.

        beta = 0        KL(t ‖ p) = Σ_v t_v log(t_v / p_v)                      forward: the student covers the teacher
        beta = 1        KL(p ‖ t)                                               reverse: the student seeks its modes
        else            β KL(t ‖ m) + (1 - β) KL(p ‖ m),  m = β t + (1 - β) p   generalized Jensen-Shannon

    Exact in value and gradient to a few roundings, however confident both are and, of logits, however close to each
    other: the sum has no negative terms, and no gradient is a difference of what rounds to 1. Of `teacher_probs` the
    logarithm is rounded before it is compared, as are soft-capped logits: at a distance of 1e-3 gradients are off by up
    to 4e-4. The gradient by the temperature cancels too. In nats, float32 (float64 where logits or teacher are).

    Args:
      logits: floating, `[*batch, classes]` for `axis=-1`; infinities and NaN as in `cross_entropy`.
      teacher_probs: probabilities of the logits' shape, or `SparseLabels`, of any positive sum: they are divided by it.
        An entry of 0 has no gradient, and a subtraction may have left it up to 1e-5 below; one of less is NaN, of
        NumPy an error. Tokens go through in chunks, so that nothing else of the logits' size is made
        (but for another axis than the last, both are first copied).
      teacher_logits: instead, of the logits' shape: t = softmax of them.
      where: bool, broadcastable to the logits; False: the class exists for neither.
      weights: as in `cross_entropy`, with the reductions of dense labels; a token without any class counts as 0.
      beta: in [0, 1]. A traced one chooses no formula: at 0 and at 1 it gives NaN.
      temperature: > 0, of all logits, z / temperature; probabilities stay as they are. With `teacher_logits` gradients
        fall as its square: multiply the loss by temperature² to keep their size (Hinton et al.).
      softcap, teacher_softcap: softcap · tanh(z / softcap), before the temperature; each of its own logits.
      reduction, normalizer, axis_name: as in `cross_entropy`.
      chunk_size: of probabilities, as in `linear_cross_entropy`.
      forward_mode: as in `cross_entropy`.

    Gradients flow to the teacher too: `jax.lax.stop_gradient` it, unless you mean that. inf where one has probability
    0 and the other, which weights it, has not; the gradient of the logits that weight is NaN there. Under `jit`, a
    gradient that is not used is not computed.

    Returns:
      A scalar, or the batch shape for `reduction="none"`.

    Raises:
      TypeError, ValueError: while tracing, for shapes, dtypes and numbers that do not fit; the message says which.

    >>> import jax.numpy as jnp
    >>> from softmax_jax import kl_divergence
    >>> student, teacher = jnp.array([[30.0, 0.0, 0.0]]), jnp.array([[31.0, 0.0, 0.0]])
    >>> print(f"{kl_divergence(student, teacher_logits=teacher):.5e}")
    4.94534e-14
    >>> print(f"{kl_divergence(student, teacher_probs=jnp.array([[0.5, 0.5, 0.0]]), beta=0.5):.5f}")
    0.21576

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Agarwal et al., "On-Policy Distillation of
    Language Models" (generalized Jensen-Shannon), ICLR 2024.
    """
    logits = _checks.floating("logits", logits)
    axis = _checks.class_axis("logits", logits.shape, axis)
    kind, teacher = _checks.one_teacher(logits.shape, axis, teacher_probs=teacher_probs, teacher_logits=teacher_logits)
    _checks.probabilities(teacher_probs, axis, where, weights)
    where = None if where is None else _checks.class_mask("where", where, logits.shape, axis)
    if kind == "probabilities":  # a chunk of tokens has its classes last
        last = partial(jnp.moveaxis, source=axis, destination=-1)
        teacher = replace(teacher, x=Dense(last(teacher.x.values))) if isinstance(teacher.x, Dense) else teacher
        logits, where, axis = last(logits), None if where is None else last(where), logits.ndim - 1
    numbers = beta, temperature, softcap, teacher_softcap
    student = Source(logits, dtype=logits.dtype)
    how = reduction, normalizer, axis_name, chunk_size, bool(forward_mode)
    return _divergence(kind, student, teacher, axis, where, weights, numbers, *how)


@hinted
def linear_kl_divergence(
    x: Float[ArrayLike, "*batch embed"] | Nested,
    weight: Float[ArrayLike, "_ _"] | Nested,
    *,
    teacher_probs: Floats | SparseLabels | None = None,
    teacher_logits: Floats | None = None,
    teacher_x: Float[ArrayLike, "*batch teacher_embed"] | Nested | None = None,
    teacher_weight: Float[ArrayLike, "_ _"] | Nested | None = None,
    bias: Float[ArrayLike, " classes"] | Nested | None = None,
    teacher_bias: Float[ArrayLike, " classes"] | Nested | None = None,
    transpose_weight: bool = False,
    teacher_transpose_weight: bool = False,
    where: Mask | None = None,
    weights: AnyArray | None = None,
    beta: Scalar = 0.0,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    teacher_softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    dtype: DTypeLike | None = None,
    chunk_size: int | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    """`kl_divergence(x @ weight + bias, ...)` without ever holding the logits, as `linear_cross_entropy`; with
    `teacher_x` and `teacher_weight`, whose logits are teacher_x @ teacher_weight + teacher_bias, the teacher's neither.

    The two may have hidden states of different sizes and heads of different layouts: `transpose_weight` and
    `teacher_transpose_weight` say `[classes, embed]`. The other arguments are those of the two functions; there is one
    teacher, of `teacher_probs`, `teacher_logits` and `teacher_x` with `teacher_weight`. A teacher of whom no gradient
    is asked costs one matrix product.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import linear_kl_divergence
    >>> x, weight = jnp.eye(3, 4), jnp.arange(20.0).reshape(4, 5)
    >>> teacher_x, teacher_weight = jnp.eye(3), 1.5 * jnp.arange(15.0).reshape(3, 5)
    >>> loss = lambda x, w: linear_kl_divergence(x, w, teacher_x=teacher_x, teacher_weight=teacher_weight)
    >>> print(f"{loss(x, weight):.5f}")
    0.05776
    >>> dx, dweight = jax.grad(loss, (0, 1))(x, weight)

    Hsu et al., "Liger Kernel", 2024 (the fused linear form).
    """
    student = _checks.head(x, weight, bias, transpose_weight, dtype)
    axis, of_states = len(student.shape) - 1, (teacher_x, teacher_weight, teacher_bias, teacher_transpose_weight)
    kind, teacher = _checks.one_teacher(student.shape, axis, teacher_probs, teacher_logits, of_states, dtype)
    _checks.probabilities(teacher_probs, axis, where, weights)
    numbers = beta, temperature, softcap, teacher_softcap
    how = reduction, normalizer, axis_name, chunk_size, bool(forward_mode)
    return _divergence(kind, student, teacher, axis, where, weights, numbers, *how)


class _Numbers(NamedTuple):
    """What tokens share besides the options of the student."""

    teacher_softcap: Any
    scale: Any  # of both sides' logits, 1 / temperature
    beta: Any


def _divergence(
    kind: Kind,
    student: Source,
    teacher: Source,
    axis: int,
    where: Any,
    weights: Any,
    numbers: tuple,
    reduction: Reduction,
    normalizer: Any,
    axis_name: Any,
    chunk_size: Any,
    forward_mode: bool,
) -> Array:
    """What both have in common, once the two sides are known."""
    beta, temperature, *softcaps = numbers
    class_axes = _checks.mesh_axes(axis_name)
    _checks.sharded(*student.of_classes(), class_axes)
    if not isinstance(teacher.x, Sparse):
        name, array = teacher.of_classes()
        _checks.sharded("teacher_probs" if kind == "probabilities" else f"teacher_{name}", array, class_axes)
    dtype = reduce(product_dtype, (dtype for source in (student, teacher) for dtype in source.dtypes()))
    scale = _checks.unless(1, "temperature", temperature, dtype, 0.0, math.inf, open_low=True)
    scale = None if scale is None else jnp.asarray(1 / scale)
    caps = zip(("softcap", "teacher_softcap"), softcaps, strict=True)
    caps = [_checks.unless(None, name, cap, dtype, 0.0, math.inf, open_low=True) for name, cap in caps]
    options = _checks.options_for(student.shape, dtype, axis, None, Options(where, weights))
    options = options._replace(softcap=None if caps[0] is None else jnp.asarray(caps[0]))
    if kind == "probabilities":  # which have no temperature
        if caps[1] is not None:
            raise ValueError(f"`teacher_softcap` is of logits; got {softcaps[1]!r} and probabilities. Leave it out.")
        cap = options.softcap if caps[0] is None or scale is None else options.softcap * scale
        options, scale = options._replace(logit_scale=scale, softcap=cap), None
    reverse, beta = _checks.mixture("beta", beta, dtype)
    divisor = _checks.reduction_of(reduction, normalizer, dtype)
    in_chunks, chunk_size = kind == "probabilities", _checks.chunk_size_of(chunk_size)
    losses, classes = _numbers(kind, reverse), Classes(axis, class_axes)
    how = How(losses, dtype, classes, reduction, in_chunks, chunk_size, forward_mode)
    return compute(Operands(student, teacher, options, divisor, _Numbers(caps[1], scale, beta)), how)[0]


@cache
def _numbers(kind: Kind, reverse: bool) -> Callable:
    """One function for each pair, since JAX keeps programs by it."""
    return partial(_losses, kind, reverse)


def _losses(
    kind: Kind,
    reverse: bool,
    logits: Array,
    target: Any,
    weights: Array | None,
    options: Options,
    more: _Numbers,
    classes: Classes,
    forward_mode: bool,
) -> tuple[Array, None]:
    """weights · divergence of every token."""
    if kind == "probabilities":
        target = jax.tree.map(lambda a: emptied(a, weights), target)
        t = target.probabilities(options.where, logits.shape[classes.axis], classes)
    else:
        t = target.values
    dtype = accumulator(product_dtype(logits.dtype, t.dtype))

    def wide(a):
        return a if accumulator(a.dtype) == dtype else a.astype(dtype)

    student = Logits(wide(logits), Adjustment(None, options.logit_scale, options.softcap))
    of_teacher = wide(t) if kind != "probabilities" else _log(existing(t.astype(dtype), options.where))
    teacher = Logits(of_teacher, Adjustment(softcap=more.teacher_softcap))
    both, unused = (student, teacher) if reverse else (teacher, student), unused_by(weights)
    losses = divergence(Pair(*both, options.where, more.scale, more.beta, unused), classes, forward_mode)
    return losses if weights is None else weights * losses, None


@jax.custom_jvp
def _log(t: Array) -> Array:
    """-inf of 0, and of what a subtraction left a rounding below it; NaN of less."""
    return jnp.log(jnp.where((t < 0) & (t >= -ROUNDING), 0, t))


@_log.defjvp
def _log_jvp(primals, tangents):
    """An entry of 0 has no gradient."""
    (t,), (dt,) = primals, tangents
    zero = (t <= 0) & (t >= -ROUNDING)
    return _log(t), jnp.where(zero, 0, dt / jnp.where(zero, 1, t))
