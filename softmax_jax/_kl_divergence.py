"""The divergence of a student from a teacher: for distillation, on logits and on hidden states."""

import math
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Float

from softmax_jax import _checks
from softmax_jax._adjustment import Adjustment
from softmax_jax._checks import Options, Reduction
from softmax_jax._cross_entropy import Scalar
from softmax_jax._divergence import divergence
from softmax_jax._divergence_sums import Logits
from softmax_jax._dtypes import accumulator, product_dtype, upcast
from softmax_jax._head import Each, Shared, affine, classes_of, dealt, emptied, logits_of, reduced, specs_of
from softmax_jax._sharding import Names, entries_of, exactly, explicit_mesh, fit, over_devices, psum
from softmax_jax._targets import SparseLabels, existing, probabilities_of
from softmax_jax._token_loss import divide, label_specs, mean_divisor, option_specs, prepare, unused_by


def kl_divergence(
    logits: Float[ArrayLike, "..."],
    *,
    teacher_probs: Float[ArrayLike, "..."] | SparseLabels | None = None,
    teacher_logits: Float[ArrayLike, "..."] | None = None,
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    weights: ArrayLike | None = None,
    beta: Scalar = 0.0,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    teacher_softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "..."]:
    """Divergence of the student p = softmax(logits) from a teacher t.

        beta = 0        KL(t ‖ p) = Σ_v t_v log(t_v / p_v)                      forward: the student covers the teacher
        beta = 1        KL(p ‖ t)                                               reverse: the student seeks its modes
        else            β KL(t ‖ m) + (1 - β) KL(p ‖ m),  m = β t + (1 - β) p   generalized Jensen-Shannon

    Exact in value and gradient, however confident both are: the sum has no negative terms, and no gradient is a
    difference of what rounds to 1. Of logits that differ by d, over the temperature, the value is right to about
    (4e-7/d)² and the gradients to 4e-7/d, where that is more than a rounding; that by the temperature itself cancels
    further. In nats, float32 (float64 for float64 logits).

    Args:
      logits: floating, `[*batch, classes]` for `axis=-1`; infinities and NaN as in `cross_entropy`.
      teacher_probs: probabilities of the logits' shape, or `SparseLabels`, of any positive sum: they are divided by it.
        An entry of 0 has no gradient. Tokens go through in chunks, so that nothing else of the logits' size is made
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

    Gradients flow to the teacher too: `jax.lax.stop_gradient` it, unless you mean that. inf where one has probability
    0 and the other, which weights it, has not; the gradient of the logits that weight is NaN there. Under `jit`, a
    gradient that nobody asks for is not computed. Forward mode (`jax.jvp`), which JAX refuses here: use
    `optax.losses.kl_divergence(jax.nn.log_softmax(logits), teacher_probs)`.

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
    logits = jnp.asarray(logits)
    _checks.floating("logits", logits)
    axis = _checks.class_axis("logits", logits.shape, axis)
    kind, (target, *_) = _checks.one_teacher(
        logits.shape, axis, teacher_probs=teacher_probs, teacher_logits=teacher_logits
    )
    where = None if where is None else _checks.class_mask("where", where, logits.shape, axis)
    class_axes = _checks.mesh_axes(axis_name)
    _checks.sharded("logits", logits, class_axes)
    if kind == "logits":
        _checks.sharded("teacher_logits", target, class_axes)
    if kind == "probabilities":  # a chunk of tokens has its classes last
        last = lambda a: jnp.moveaxis(a, axis, -1)  # noqa: E731
        target = target if isinstance(target, SparseLabels) else last(target)
        logits, where, axis = last(logits), None if where is None else last(where), logits.ndim - 1
    how = _How(kind, axis, reduction, _checks.chunk_size_of(chunk_size), class_axes)
    numbers = beta, temperature, softcap, teacher_softcap
    return _checked(_Side(logits), _Side(target), logits.shape, where, weights, numbers, normalizer, how)


def linear_kl_divergence(
    x: Float[ArrayLike, "*batch embed"],
    weight: Float[ArrayLike, "_ _"],
    *,
    teacher_probs: Float[ArrayLike, "..."] | SparseLabels | None = None,
    teacher_logits: Float[ArrayLike, "..."] | None = None,
    teacher_x: Float[ArrayLike, "*batch teacher_embed"] | None = None,
    teacher_weight: Float[ArrayLike, "_ _"] | None = None,
    bias: Float[ArrayLike, " classes"] | None = None,
    teacher_bias: Float[ArrayLike, " classes"] | None = None,
    transpose_weight: bool = False,
    teacher_transpose_weight: bool = False,
    where: Bool[ArrayLike, "..."] | None = None,
    weights: ArrayLike | None = None,
    beta: Scalar = 0.0,
    temperature: Scalar = 1.0,
    softcap: Scalar | None = None,
    teacher_softcap: Scalar | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "..."]:
    """`kl_divergence(x @ weight + bias, ...)` without ever holding the logits, as `linear_cross_entropy`; with
    `teacher_x` and `teacher_weight`, whose logits are teacher_x @ teacher_weight + teacher_bias, the teacher's neither.

    The two may have hidden states of different sizes and heads of different layouts: `transpose_weight` and
    `teacher_transpose_weight` say `[classes, embed]`. The other arguments are those of the two doors; there is one
    teacher, of `teacher_probs`, `teacher_logits` and `teacher_x` with `teacher_weight`. A teacher of whom no gradient
    is asked costs one matrix product. Forward mode: as there, with the logits `x @ weight`.

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
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    shape = *x.shape[:-1], _checks.head_size(x, weight, bias, transpose_weight)
    axis, head = x.ndim - 1, (teacher_x, teacher_weight, teacher_bias, teacher_transpose_weight)
    kind, given = _checks.one_teacher(
        shape, axis, teacher_probs=teacher_probs, teacher_logits=teacher_logits, head=head
    )
    class_axes = _checks.mesh_axes(axis_name)
    _checks.sharded("weight", weight, class_axes)
    if not isinstance(given[0], SparseLabels):
        name, array = ("teacher_weight", given[1]) if kind == "states" else ("the teacher", given[0])
        _checks.sharded(name, array, class_axes)
    transposed = bool(transpose_weight), bool(teacher_transpose_weight)
    how = _How(kind, axis, reduction, _checks.chunk_size_of(chunk_size), class_axes, transposed=transposed)
    student = _Side(x, weight, None if bias is None else jnp.asarray(bias))
    numbers = beta, temperature, softcap, teacher_softcap
    return _checked(student, _Side(*given), shape, where, weights, numbers, normalizer, how)


class _Side(NamedTuple):
    """Student or teacher: logits, or hidden states and their head; of a teacher also probabilities."""

    x: Any
    weight: Any = None
    bias: Any = None


class _Operands(NamedTuple):
    student: _Side
    teacher: _Side
    options: Options  # with the student's softcap and what else is its own
    of_teacher: Adjustment  # its own
    scale: Any  # of both sides' logits, 1 / temperature
    beta: Any
    normalizer: Any


class _How(NamedTuple):
    """Static arguments."""

    kind: Literal["logits", "probabilities", "states"]  # what the teacher's x is
    axis: int
    reduction: Reduction
    chunk_size: int | None
    class_axes: Names  # the mesh axes of the classes
    token_axes: Names = ()  # those of the tokens, where the loss is one of all devices
    transposed: tuple[bool, bool] = (False, False)  # of the two heads
    reverse: bool = False


def _checked(student: _Side, teacher: _Side, shape, where, weights, numbers, normalizer, how: _How) -> Array:
    """The core, once the options are checked."""
    beta, temperature, *softcaps = numbers
    dtype = _dtype(student, teacher)
    scale = _checks.unless(1, "temperature", temperature, dtype, 0.0, math.inf, open_low=True)
    scale = None if scale is None else jnp.asarray(1 / scale)
    caps = zip(("softcap", "teacher_softcap"), softcaps, strict=True)
    caps = [_checks.unless(None, name, cap, dtype, 0.0, math.inf, open_low=True) for name, cap in caps]
    caps = [None if cap is None else jnp.asarray(cap) for cap in caps]
    options = _checks.options_for(shape, dtype, how.axis, teacher.x, where=where, weights=weights)
    options, of_teacher = options._replace(softcap=caps[0]), Adjustment(softcap=caps[1])
    if how.kind == "probabilities":  # which have no temperature
        if caps[1] is not None:
            raise ValueError(f"`teacher_softcap` is of logits; got {softcaps[1]!r} and probabilities. Leave it out.")
        cap = caps[0] if caps[0] is None or scale is None else caps[0] * scale
        options, scale = options._replace(logit_scale=scale, softcap=cap), None
    reverse, beta = _checks.mixture("beta", beta, dtype)
    divisor = _checks.reduction_of(how.reduction, normalizer, dtype)
    return _kl_divergence(
        _Operands(student, teacher, options, of_teacher, scale, beta, divisor), how._replace(reverse=reverse)
    )


def _dtype(student: _Side, teacher: _Side) -> DTypeLike:
    """What all of it is computed in, before its sums."""
    floats = (a.dtype for a in jax.tree.leaves((student, teacher)) if jnp.issubdtype(a.dtype, jnp.floating))
    return reduce(product_dtype, floats)


@partial(jax.jit, static_argnames="how")
def _kl_divergence(operands: _Operands, how: _How) -> Array:
    mesh = explicit_mesh(operands)
    if mesh is None:
        return _of_device(*operands, how=how)
    batch, classes, specs = _specs(operands, how)
    f = partial(_of_device, how=how._replace(class_axes=how.class_axes + classes, token_axes=sum(batch, ())))
    return over_devices(f, mesh, tuple(operands), specs, exactly(batch if how.reduction == "none" else ()))


def _specs(operands: _Operands, how: _How) -> tuple[tuple[Names, ...], Names, tuple]:
    """How the tokens, the classes and the operands lie over devices in explicit sharding."""
    (student, teacher), axis = operands[:2], how.axis
    if student.weight is None:
        every = entries_of(student.x)
        batch, classes, of_student = every[:axis] + every[axis + 1 :], every[axis], (exactly(every), None, None)
    else:
        batch, classes, of_student = specs_of(*student, how.transposed[0])
    if teacher.weight is None:
        of_teacher = label_specs(teacher.x, batch, classes, axis), None, None
    else:
        of_weight = exactly((classes, ()) if how.transposed[1] else ((), classes))
        of_teacher = exactly((*batch, ())), of_weight, fit(teacher.bias, (classes,))
    scalars = jax.tree.map(lambda a: fit(a, ()), operands[3:])
    options = option_specs(operands.options, batch, classes, axis)
    return batch, classes, (_Side(*of_student), _Side(*of_teacher), options, *scalars)


class _OfTeacher(NamedTuple):
    """What every chunk sees of the teacher."""

    weight: Array | None
    bias: Array | None
    adjustment: Adjustment
    scale: Array | None
    beta: Array | None


def _of_device(
    student: _Side,
    teacher: _Side,
    options: Options,
    of_teacher: Adjustment,
    scale: Any,
    beta: Any,
    normalizer: Any,
    how: _How,
) -> Array:
    """The loss of one device's part."""
    axis, (of_teacher, scale, beta) = how.axis, jax.tree.map(jnp.asarray, (of_teacher, scale, beta))
    every = student.x.shape
    classes = every[axis] if student.weight is None else classes_of(student.weight, how.transposed[0])
    batch = every[:axis] + every[axis + 1 :]
    shape, dtype = (*batch[:axis], classes, *batch[axis:]), _dtype(student, teacher)
    labels, weights, options = prepare(teacher.x, options, shape, dtype, axis, how.class_axes)
    if student.weight is None and how.kind == "logits":
        target = Logits(teacher.x, of_teacher)
        loss = _losses(student.x, target, weights, options, scale, beta, axis, how)
        loss = loss if how.reduction == "none" else psum(jnp.sum(loss), how.token_axes)
    else:
        heads = [None if s.weight is None else product_dtype(s.x.dtype, s.weight.dtype) for s in (student, teacher)]
        shared, each = dealt(*student, labels, weights, options, dtype, classes, how.chunk_size)
        shared = shared, _OfTeacher(teacher.weight, teacher.bias, of_teacher, scale, beta)
        loss = reduced(partial(_chunk_losses, how, tuple(heads)), shared, each, batch, how.reduction, how.token_axes)
    if how.reduction != "mean":
        return loss
    tokens = math.prod(batch)
    return divide(loss, mean_divisor(labels, weights, options, tokens, normalizer, how.class_axes, how.token_axes))


def _chunk_losses(how: _How, dtypes: tuple, shared: tuple[Shared, _OfTeacher], chunk: Each) -> Array:
    """weights · divergence of one chunk of tokens, [size]."""
    of_student, teacher = shared
    logits, options = logits_of(of_student, chunk, dtypes[0], how.transposed[0])
    target = jax.tree.map(lambda a: emptied(a, chunk.weights), chunk.labels)
    if teacher.weight is not None:
        target = affine(target, teacher.weight, teacher.bias, dtypes[1], how.transposed[1])
    elif how.kind == "probabilities":
        if isinstance(target, SparseLabels):
            target = probabilities_of(target, options.where, logits.shape[1], 1, how.class_axes)
        target = _log(existing(upcast(target), options.where))
    target = Logits(target, teacher.adjustment)
    return _losses(logits, target, chunk.weights, options, teacher.scale, teacher.beta, 1, how)


def _losses(logits, teacher: Logits, weights, options: Options, scale, beta, axis: int, how: _How) -> Array:
    """weights · divergence of every token."""
    dtype = accumulator(product_dtype(logits.dtype, teacher.raw.dtype))
    wide = lambda a: a if accumulator(a.dtype) == dtype else a.astype(dtype)  # noqa: E731
    student = Logits(wide(logits), Adjustment(None, options.logit_scale, options.softcap))
    teacher = teacher._replace(raw=wide(teacher.raw))
    both = (student, teacher) if how.reverse else (teacher, student)
    unused = unused_by(weights)
    losses = divergence(*both, options.where, scale, beta, unused, axis, how.class_axes)
    return losses if weights is None else weights * losses


@jax.custom_jvp
def _log(t: Array) -> Array:
    return jnp.log(t)


@_log.defjvp
def _log_jvp(primals, tangents):
    """An entry of 0 has no gradient."""
    (t,), (dt,) = primals, tangents
    return _log(t), jnp.where(t == 0, 0, dt / jnp.where(t == 0, 1, t))
