"""One core for every function: from checked operands to the numbers of the tokens, or their sum or mean.

operands       each device's part, where they are laid out explicitly
in one form    options and labels
numbers        of the tokens at once, or in chunks whose logits a head makes: losses, divergences, statistics
reduction      none, sum, mean, over the tokens of all devices: the only one over tokens
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._checks import Options, Reduction
from softmax_jax._classes import Classes
from softmax_jax._dtypes import accumulator
from softmax_jax._head import dealt, over_chunks
from softmax_jax._labels import unused_by
from softmax_jax._sharding import (
    Names,
    PyTree,
    count,
    entries_of,
    exactly,
    explicit_mesh,
    fit,
    over_devices,
    pmax,
    psum,
    vary,
    varying,
)
from softmax_jax._source import Source


class Operands(NamedTuple):
    student: Source
    target: Source  # labels, or a teacher
    options: Options
    normalizer: Any = None
    more: PyTree = None  # scalars that only `numbers` knows


class How(NamedTuple):
    """Static arguments."""

    numbers: Callable  # (logits, target, weights, options, more, classes, forward_mode) -> ([*batch], what is beside)
    dtype: DTypeLike  # of the logits
    classes: Classes
    reduction: Reduction = "none"
    in_chunks: bool = False  # where no head asks for them too
    chunk_size: int | None = None
    forward_mode: bool = False
    token_axes: Names = ()  # the mesh axes of the tokens, where the loss is one of all devices


@partial(jax.jit, static_argnames="how")
def compute(operands: Operands, how: How) -> tuple[PyTree, PyTree]:
    """(`numbers` of the tokens, reduced; what they have beside, of every token)."""
    mesh = explicit_mesh(operands)
    if mesh is None:
        return _of_device(*operands, how=how)
    batch, classes, specs = _specs(operands, how.classes)
    f = partial(_of_device, how=how._replace(classes=classes, token_axes=sum(batch, ())))
    reduced = batch if how.reduction == "none" else ()
    return over_devices(f, mesh, tuple(operands), specs, (exactly(reduced), exactly(batch)))


def _of_device(
    student: Source, target: Source, options: Options, normalizer: Any, more: PyTree, how: How
) -> tuple[PyTree, PyTree]:
    """Of one device's part."""
    shape, axis, summed = student.shape, how.classes.axis, how.reduction != "none"
    batch = shape[:axis] + shape[axis + 1 :]
    labels, weights, options, more = _in_one_form(target, options, more, shape, how)
    if how.in_chunks or student.weight is not None:
        operands = dealt(student, replace(target, x=labels), weights, options, more, how.dtype, how.chunk_size)
        numbers = partial(how.numbers, classes=replace(how.classes, axis=1), forward_mode=how.forward_mode)
        found, beside = over_chunks(numbers, operands, batch, summed, how.forward_mode)
    else:
        found, beside = how.numbers(student.x, labels, weights, options, more, how.classes, how.forward_mode)
        found = jnp.sum(found) if summed else found
    if not summed:
        return found, beside
    found = psum(found, how.token_axes)
    if how.reduction == "mean":
        found = _divide(found, _mean_divisor(labels, weights, options, math.prod(batch), normalizer, how))
    return found, beside


def _in_one_form(target: Source, options: Options, more: PyTree, shape: tuple[int, ...], how: How):
    """(labels, weights, options, more) in their one form for logits of `shape`: ids int32, arrays of the logits' rank.

    `weights` are those of the tokens, 0 where one is ignored or no class of it exists; None is 1 for all. An option
    that is the same for the tokens of all devices is marked as varying here, while it is small: once it is broadcast
    to the logits, its gradient would be summed over devices at that size.
    """
    labels, classes, axis, dtype = target.x, how.classes, how.classes.axis, accumulator(how.dtype)
    options, more = jax.tree.map(jnp.asarray, (options, more))  # under jax_disable_jit numbers are still NumPy's
    options = vary(options, tuple(name for name in varying(labels, options) if name not in classes.over))
    where, weights, class_weights = options.where, options.weights, options.class_weights
    batch = shape[:axis] + shape[axis + 1 :]
    if class_weights is not None:
        class_weights = class_weights.astype(dtype).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    if weights is not None:
        weights = jnp.broadcast_to(weights.astype(dtype), batch)
    kept = []
    if where is not None:
        kept.append(pmax(jnp.any(where, axis).astype(jnp.int32), classes.over) > 0)
    if options.ignore_index is not None:
        kept.append(labels.ids != options.ignore_index)
    for keep in kept:
        weights = jnp.broadcast_to(jnp.where(keep, 1 if weights is None else weights, 0).astype(dtype), batch)
    if target.weight is None:
        labels = labels.in_one_form(unused_by(weights), count(shape[axis], classes.over), dtype, classes)
    return labels, weights, options._replace(class_weights=class_weights, weights=None, ignore_index=None), more


def _specs(operands: Operands, classes: Classes) -> tuple[tuple[Names, ...], Classes, tuple]:
    """How the tokens, the classes and the operands lie over devices in explicit sharding."""
    student, target, options, normalizer, more = operands
    every, axis = entries_of(student.x), classes.axis
    if student.weight is None:
        batch, over = every[:axis] + every[axis + 1 :], every[axis]
        of_student = replace(student, x=exactly(every))
    else:
        batch = every[:-1]
        over = entries_of(student.weight)[0 if student.transposed else 1]
        over = tuple(name for name in over if name not in sum(batch, ()))
        of_student = _head_specs(student, batch, over)
    classes = replace(classes, over=over)
    if target.weight is None:
        of_target = replace(target, x=target.x.specs(batch, classes))
    else:
        of_target = _head_specs(target, batch, over)
    scalars = jax.tree.map(lambda a: fit(a, ()), (normalizer, more))
    return batch, classes, (of_student, of_target, _option_specs(options, batch, classes), *scalars)


def _head_specs(source: Source, batch: tuple[Names, ...], over: Names) -> Source:
    weight = exactly((over, ()) if source.transposed else ((), over))
    return replace(source, x=exactly((*batch, ())), weight=weight, bias=fit(source.bias, (over,)))


def _option_specs(options: Options, batch: tuple[Names, ...], classes: Classes) -> Options:
    over, axis = classes.over, classes.axis
    scalars = jax.tree.map(lambda a: fit(a, ()), options._replace(where=None, weights=None, class_weights=None))
    return scalars._replace(
        where=fit(options.where, (*batch[:axis], over, *batch[axis:])),
        weights=fit(options.weights, batch),
        class_weights=fit(options.class_weights, (over,)),
    )


def _mean_divisor(
    labels: Any, weights: Array | None, options: Options, tokens: int, normalizer: Any, how: How
) -> Array | int:
    """The `normalizer`, else Σ weights · c_y for integer labels or Σ weights for dense ones, of the tokens on all
    devices."""
    if normalizer is not None:
        return jnp.asarray(normalizer)
    # (Of a teacher with a head `labels` are hidden states: there are no class weights.)
    share = None if options.class_weights is None else labels.share_of_mean(options.class_weights, how.classes)
    if share is not None:
        weights = share if weights is None else weights * share
    return count(tokens, how.token_axes) if weights is None else psum(jnp.sum(weights), how.token_axes)


def _divide(total: Array, by: Array | int) -> Array:
    """total / by, and 0 where by is 0."""
    by = jnp.asarray(by, total.dtype)
    return jnp.where(by == 0, 0, total / jnp.where(by == 0, 1, by))
