"""The divergence of a student from a teacher: for distillation, on logits and on hidden states."""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Float

from softmax_jax._core import Settings, compute
from softmax_jax._devices import Classes, check_sharded, mesh_axes
from softmax_jax._divergence.formula import Logits, Pair
from softmax_jax._divergence.rule import divergence
from softmax_jax._head.product import Source, given_logits, head, zero_nonfinite_unused
from softmax_jax._inputs.arrays import (
    AnyArray,
    Floats,
    Mask,
    Nested,
    Scalar,
    Shape,
    accumulator,
    class_axis,
    floating,
    is_floating,
    nan_unless,
    product_dtype,
    scalar,
)
from softmax_jax._inputs.hints import hinted
from softmax_jax._inputs.labels import (
    ROUNDING,
    Dense,
    Sparse,
    SparseLabels,
    check_probabilities,
    check_sparse_labels,
    narrowed,
)
from softmax_jax._inputs.options import Adjustment, Options, Reduction, check_options, zero_hidden
from softmax_jax._sums.blocks import num_existing
from softmax_jax._sums.targets import dense_probabilities
from softmax_jax._sums.waist import Batch, unused_tokens


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
      beta: in [0, 1]: say 0 for a teacher's top-k, 1 on the student's own samples. A traced one chooses no formula: at
        0 and at 1 it gives NaN.
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

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531; Agarwal et al., "On-Policy
    Distillation of Language Models", ICLR 2024, arXiv:2306.13649 (generalized Jensen-Shannon).
    """
    student = given_logits("logits", logits)
    axis = class_axis("logits", student.shape, axis)
    given = {"teacher_probs": teacher_probs, "teacher_logits": teacher_logits}
    scalars = {"softcap": softcap, "teacher_softcap": teacher_softcap, "temperature": temperature, "beta": beta}
    options = Options(where, weights, **scalars)
    settings = Settings(reduction, normalizer, axis_name, chunk_size, forward_mode)
    return _against_teacher(student, given, options, settings, axis)


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

    Hsu et al., "Liger Kernel", 2024, arXiv:2410.10989 (the fused linear form).
    """
    student = head(x, weight, bias, transpose_weight, dtype)
    given = {
        "teacher_probs": teacher_probs,
        "teacher_logits": teacher_logits,
        "teacher_x": teacher_x,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "teacher_transpose_weight": teacher_transpose_weight or None,
    }
    scalars = {"softcap": softcap, "teacher_softcap": teacher_softcap, "temperature": temperature, "beta": beta}
    options = Options(where, weights, **scalars)
    settings = Settings(reduction, normalizer, axis_name, chunk_size, forward_mode)
    return _against_teacher(student, given, options, settings, len(student.shape) - 1, dtype)


def _against_teacher(
    student: Source,
    given: dict[str, Any],
    options: Options,
    settings: Settings,
    axis: int,
    head_dtype: DTypeLike | None = None,
) -> Array:
    """Of the one teacher that is `given`, by the names of its operands."""
    given = {name: value for name, value in given.items() if value is not None}
    name, target = _one_teacher(student.shape, axis, given, head_dtype)
    if not isinstance(target, Sparse):
        array = target.values if isinstance(target, Dense) else target.weight
        check_sharded(name, array, mesh_axes(settings.axis_name))
    of_probs, floats = name == "teacher_probs", [a.dtype for a in jax.tree.leaves(target) if is_floating(a)]
    dtype = reduce(product_dtype, [target.dtype] if isinstance(target, Source) else floats, student.dtype)
    if of_probs and options.teacher_softcap is not None:
        raise ValueError(
            f"`teacher_softcap` is of logits; got {options.teacher_softcap!r} and probabilities. Leave it out."
        )
    checked, (reverse, beta) = check_options(options, student.shape, axis, dtype), _mixture(options.beta, dtype)
    if of_probs:
        check_probabilities(given[name], axis, (options.where, options.weights))
    operands = student, target, checked._replace(beta=beta), settings, axis, dtype
    return compute(_per_token(of_probs, reverse), *operands, in_chunks=of_probs)[0]


def _one_teacher(
    shape: Shape, axis: int, given: dict[str, Any], head_dtype: DTypeLike | None
) -> tuple[str, Dense | Sparse | Source]:
    """(the operand that holds the classes, the teacher) for a student's logits of `shape`."""
    teachers = [name for name in given if name in ("teacher_probs", "teacher_logits", "teacher_x")]
    of_head = [name for name in given if name not in teachers]
    is_head = teachers == ["teacher_x"]
    if len(teachers) != 1 or is_head != ("teacher_weight" in of_head) or (of_head and not is_head):
        raise ValueError(
            f"there must be one whole teacher; got {list(given) or 'none'}. Pass `teacher_probs`, or `teacher_logits`, "
            "or to the linear form `teacher_x` with `teacher_weight`."
        )
    if is_head:
        x, weight, bias = (given.get(f"teacher_{part}") for part in ("x", "weight", "bias"))
        teacher = head(x, weight, bias, "teacher_transpose_weight" in given, head_dtype, "teacher_")
        if teacher.shape != shape:
            raise ValueError(
                f"the teacher's logits must have the student's shape {shape}; got {teacher.shape} from teacher_x.shape="
                f"{teacher.x.shape}, teacher_weight.shape={teacher.weight.shape}. Give both the same tokens, classes."
            )
        return "teacher_weight", teacher
    (name,) = teachers
    value = given[name]
    if isinstance(value, SparseLabels):
        if name == "teacher_logits":
            raise TypeError("`teacher_logits` must be an array; got SparseLabels. Pass those as `teacher_probs`.")
        return name, check_sparse_labels(narrowed(value)[0], shape[:axis] + shape[axis + 1 :])
    value = floating(name, value)
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have the shape of the student's logits, {shape}; got {name}.shape={value.shape}. "
            "Reshape it, or pass `SparseLabels` for a few classes a token."
        )
    return name, Dense(value)


def _mixture(beta: Any, dtype: DTypeLike) -> tuple[bool, Array | np.ndarray | None]:
    """(whether beta is 1, the number between 0 and 1). Of traced numbers the ends are NaN."""
    if isinstance(beta, np.ndarray | Array) and not isinstance(beta, Tracer) and beta.shape == ():
        beta = beta.item()
    number = scalar("beta", beta, dtype, 0.0, 1.0)
    if isinstance(number, np.ndarray):
        return bool(number == 1), None if number in (0, 1) else number
    return False, nan_unless((number > 0) & (number < 1), number)


@cache
def _per_token(of_probs: bool, reverse: bool) -> Callable[[Batch], tuple[Array, None]]:
    """One function for each pair, since JAX keeps programs by it."""
    return partial(_weighted_divergences, of_probs, reverse)


def _weighted_divergences(of_probs: bool, reverse: bool, batch: Batch) -> tuple[Array, None]:
    """weights · divergence of every token. Probabilities have no temperature: the student's logits alone do."""
    logits, labels, options, classes, forward_mode = batch
    target: Any = labels
    where, weights, softcap = options.where, options.weights, options.softcap
    scale = None if options.temperature is None else 1 / options.temperature
    of_student = None
    if of_probs:
        target = jax.tree.map(lambda a: zero_nonfinite_unused(a, weights), target)
        softcap = softcap if softcap is None or scale is None else softcap * scale
        of_student, scale = scale, None
    t = target.values if isinstance(target, Dense) else _dense(target, where, logits.shape[classes.axis], classes)
    dtype = accumulator(product_dtype(logits.dtype, t.dtype))

    def wide(a: Array) -> Array:
        return a if accumulator(a.dtype) == dtype else a.astype(dtype)

    student = Logits(wide(logits), Adjustment(None, of_student, softcap))
    of_teacher = _log(zero_hidden(t.astype(dtype), where)) if of_probs else wide(t)
    teacher = Logits(of_teacher, Adjustment(softcap=options.teacher_softcap))
    both, unused = (student, teacher) if reverse else (teacher, student), unused_tokens(weights)
    losses = divergence(Pair(*both, where, scale, options.beta, unused), classes, forward_mode)
    return losses if weights is None else weights * losses, None


def _dense(target: Sparse, where: Array | None, size: int, classes: Classes) -> Array:
    existing = num_existing(where, size, classes, target.probs.dtype)
    return dense_probabilities(target, where, existing, size, classes)


@jax.custom_jvp
def _log(t: Array) -> Array:
    """-inf of 0, and of what a subtraction left a rounding below it; NaN of less."""
    return jnp.log(jnp.where((t < 0) & (t >= -ROUNDING), 0, t))


@_log.defjvp
def _log_jvp(primals: tuple, tangents: tuple) -> tuple:
    """An entry of 0 has no gradient."""
    (t,), (dt,) = primals, tangents
    zero = (t <= 0) & (t >= -ROUNDING)
    return _log(t), jnp.where(zero, 0, dt / jnp.where(zero, 1, t))
