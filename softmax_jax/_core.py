"""One core for every function: from checked operands to the numbers of the tokens, or their sum or mean.

Five steps:

    checks         options and devices, while tracing
    operands       each device's part, where they are laid out explicitly
    one form       options and labels
    per token      at once, or in chunks whose logits a head makes: losses, divergences, statistics
    reduction      none, sum, mean, over the tokens of all devices: the only one over tokens
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softmax_jax._devices import (
    AxisNames,
    Classes,
    PyTree,
    broadcast_spec,
    check_sharded,
    count,
    explicit_mesh,
    mesh_axes,
    mesh_axes_of,
    on_each_device,
    partition_spec,
    pmax,
    psum,
    vary,
    varying,
)
from softmax_jax._head.deal import over_chunks, to_chunks
from softmax_jax._head.product import Source
from softmax_jax._inputs.arrays import Shape, accumulator, integer
from softmax_jax._inputs.labels import Dense, Ids, Labels, check_ids_in_range, check_labels, ignored_id, narrowed
from softmax_jax._inputs.options import Options, Reduction, check_options, check_reduction
from softmax_jax._sums.waist import Batch, PerTokenFunction, unused_tokens


class Settings(NamedTuple):
    """How a function is computed, as it was told."""

    reduction: Reduction = "none"
    normalizer: ArrayLike | None = None
    axis_name: str | tuple[str, ...] | None = None
    chunk_size: int | None = None
    forward_mode: bool = False


class Operands(NamedTuple):
    student: Source
    target: Labels | Source  # a teacher with a head is a source
    options: Options
    normalizer: Any = None


class Config(NamedTuple):
    """Static arguments."""

    per_token: PerTokenFunction
    dtype: DTypeLike  # of the logits
    classes: Classes
    reduction: Reduction
    in_chunks: bool  # also where no head asks for it
    chunk_size: int | None
    forward_mode: bool
    token_axes: AxisNames = ()  # the mesh axes of the tokens, where the loss is one of all devices


def compute_of_labels(
    per_token: PerTokenFunction,
    student: Source,
    labels: Any,
    options: Options,
    settings: Settings,
    axis: int,
    only_ids: str | None = None,
) -> tuple[PyTree, PyTree]:
    """`per_token` of labels; of integers alone where `only_ids`, which says of what, is given."""
    narrow, ignore_index = narrowed(labels, options.ignore_index)
    target = check_labels(narrow, student.shape, axis, only_ids)
    given = options._replace(ignore_index=ignored_id(ignore_index, target))
    checked = check_options(given, student.shape, axis, student.dtype)
    if settings.axis_name is None:
        masks = options.where, options.weights
        check_ids_in_range(labels, student.shape, axis, masks, options.ignore_index)
    return compute(per_token, student, target, checked, settings, axis, student.dtype)


def compute(
    per_token: PerTokenFunction,
    student: Source,
    target: Labels | Source,
    options: Options,
    settings: Settings,
    axis: int,
    dtype: DTypeLike,
    in_chunks: bool = False,
) -> tuple[PyTree, PyTree]:
    """`per_token` of all tokens, reduced, and what is auxiliary; of options that are checked."""
    classes, chunk_size = Classes(axis, mesh_axes(settings.axis_name)), settings.chunk_size
    check_sharded(*student.of_classes(), classes.over)
    normalizer = check_reduction(settings.reduction, settings.normalizer, dtype)
    if chunk_size is not None:
        chunk_size = integer("chunk_size", chunk_size, "Pass a number of tokens, or None.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1 token; got {chunk_size}. Pass None for the default.")
    forward_mode = bool(settings.forward_mode)
    config = Config(per_token, dtype, classes, settings.reduction, in_chunks, chunk_size, forward_mode)
    return _compute(Operands(student, target, options, normalizer), config)


@partial(jax.jit, static_argnames="config")
def _compute(operands: Operands, config: Config) -> tuple[PyTree, PyTree]:
    mesh = explicit_mesh(operands)
    if mesh is None:
        return _on_device(*operands, config=config)
    batch, classes, specs = _specs(operands, config.classes)
    f = partial(_on_device, config=config._replace(classes=classes, token_axes=sum(batch, ())))
    reduced = batch if config.reduction == "none" else ()
    return on_each_device(f, mesh, tuple(operands), specs, (partition_spec(reduced), partition_spec(batch)))


def _on_device(
    student: Source, target: Labels | Source, options: Options, normalizer: Array | None, config: Config
) -> tuple[PyTree, PyTree]:
    """Of one device's part of the operands."""
    if config.in_chunks:
        (student, target, options, _), config = _classes_last(Operands(student, target, options), config)
    shape, axis, summed = student.shape, config.classes.axis, config.reduction != "none"
    tokens = shape[:axis] + shape[axis + 1 :]
    target, options = _in_one_form(target, options, shape, config)
    if config.in_chunks or student.weight is not None:
        chunks = to_chunks(student, target, options, config.dtype, config.chunk_size)
        found, auxiliary = over_chunks(config.per_token, chunks, config.classes, summed, config.forward_mode)
    else:
        target = target if isinstance(target, Labels) else Dense(target.x)
        batch = Batch(student.x, target, options, config.classes, config.forward_mode)
        found, auxiliary = config.per_token(batch)
        found = jnp.sum(found) if summed else found
    if not summed:
        return found, auxiliary
    found = psum(found, config.token_axes)
    if config.reduction == "mean":
        found = _divide(found, _mean_divisor(target, options, math.prod(tokens), normalizer, config))
    return found, auxiliary


def _in_one_form(
    target: Labels | Source, options: Options, shape: Shape, config: Config
) -> tuple[Labels | Source, Options]:
    """(target, options) for logits of `shape`: ids int32, arrays of the logits' rank, scalars arrays.

    The weights are those of the tokens, 0 where one is ignored or no class of it exists; None is 1 for all. An option
    that is the same for the tokens of all devices is marked as varying here, while it is small: once it is broadcast
    to the logits, its gradient would be summed over devices at that size.
    """
    classes, dtype = config.classes, accumulator(config.dtype)
    options = jax.tree.map(jnp.asarray, options)  # under jax_disable_jit numbers are still NumPy's
    options = vary(options, tuple(name for name in varying(target, options) if name not in classes.over))
    where, weights, class_weights = options.where, options.weights, options.class_weights
    batch = shape[: classes.axis] + shape[classes.axis + 1 :]
    if class_weights is not None:
        sizes = [-1 if a == classes.axis else 1 for a in range(len(shape))]
        class_weights = class_weights.astype(dtype).reshape(sizes)
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(dtype), batch)
    kept = []
    if where is not None:
        kept.append(pmax(jnp.any(where, classes.axis).astype(jnp.int32), classes.over) > 0)
    if isinstance(target, Ids) and options.ignore_index is not None:
        kept.append(target.ids != options.ignore_index)
    for keep in kept:
        weights = jnp.broadcast_to(jnp.where(keep, 1 if weights is None else weights, 0).astype(dtype), batch)
    if isinstance(target, Labels):
        number = count(shape[classes.axis], classes.over)
        target = target.in_one_form(unused_tokens(weights), number, dtype, classes)
    return target, options._replace(class_weights=class_weights, weights=weights, ignore_index=None)


def _classes_last(operands: Operands, config: Config) -> tuple[Operands, Config]:
    """A chunk of tokens has its classes on the last axis."""
    student, target, options, normalizer = operands
    last = partial(jnp.moveaxis, source=config.classes.axis, destination=-1)
    if isinstance(target, Dense):
        target = Dense(last(target.values))
    options = options._replace(where=None if options.where is None else last(options.where))
    classes = replace(config.classes, axis=student.x.ndim - 1)
    return Operands(replace(student, x=last(student.x)), target, options, normalizer), config._replace(classes=classes)


# Explicit sharding: how the tokens, the classes and the operands lie over devices.


def _specs(operands: Operands, classes: Classes) -> tuple[tuple[AxisNames, ...], Classes, tuple]:
    """(the mesh axes of the tokens, the classes, the specs of the operands)."""
    student, target, options, normalizer = operands
    axis, logits = classes.axis, student.weight is None
    over_mesh = mesh_axes_of(student.x)
    if logits:
        batch, over = over_mesh[:axis] + over_mesh[axis + 1 :], over_mesh[axis]
    else:
        batch, over = over_mesh[:-1], mesh_axes_of(student.weight)[0 if student.transposed else 1]
        over = tuple(name for name in over if name not in sum(batch, ()))
    classes = replace(classes, over=over)
    of_target = target.specs(batch, classes) if isinstance(target, Labels) else _head_specs(target, batch, over)
    scalars = jax.tree.map(
        lambda a: broadcast_spec(a, ()), options._replace(where=None, weights=None, class_weights=None)
    )
    of_options = scalars._replace(
        where=broadcast_spec(options.where, (*batch[:axis], over, *batch[axis:])),
        weights=broadcast_spec(options.weights, batch),
        class_weights=broadcast_spec(options.class_weights, (over,)),
    )
    of_student = replace(student, x=partition_spec(over_mesh)) if logits else _head_specs(student, batch, over)
    return batch, classes, (of_student, of_target, of_options, broadcast_spec(normalizer, ()))


def _head_specs(source: Source, batch: tuple[AxisNames, ...], over: AxisNames) -> Source:
    weight = partition_spec((over, ()) if source.transposed else ((), over))
    x, bias = partition_spec((*batch, ())), broadcast_spec(source.bias, (over,))
    return replace(source, x=x, weight=weight, bias=bias)


# The mean.


def _mean_divisor(
    target: Labels | Source, options: Options, tokens: int, normalizer: Array | None, config: Config
) -> Array | int:
    """The `normalizer`, else Σ weights · c_y for integer labels or Σ weights for dense ones, of the tokens on all
    devices."""
    if normalizer is not None:
        return normalizer
    weights, class_weights, classes = options.weights, options.class_weights, config.classes
    if class_weights is not None and isinstance(target, Ids):
        here = target.ids - classes.first_id(class_weights)
        share = classes.read_local(partial(jnp.take, class_weights.ravel()), here, class_weights)
        share = psum(share, classes.over)
        weights = share if weights is None else weights * share
    return count(tokens, config.token_axes) if weights is None else psum(jnp.sum(weights), config.token_axes)


def _divide(total: Array, by: Array | int) -> Array:
    """total / by, and 0 where by is 0."""
    by = jnp.asarray(by, total.dtype)
    return jnp.where(by == 0, 0, total / jnp.where(by == 0, 1, by))
