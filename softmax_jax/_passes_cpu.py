"""One pass over the classes at a time, for XLA on the CPU: how it is run.

    rows                     are summed
    of any length            as a whole                                    behind a fence of their own
    of more than `BLOCK`     in blocks, which are made before the fence
    of few classes, many     class by class, over all tokens at once

What is summed is in `_fold_cpu` and `_divergence_cpu`.
"""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._barrier import fenced
from softmax_jax._classes import in_parts
from softmax_jax._sharding import entries_of

PyTree = Any


def alone(f: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """f(*operands), fenced off from what made them and from what is made of it: for a pass over the classes.

    XLA on the CPU fuses a row sum with the arithmetic that feeds it alone. What feeds two of them, be it a constant, it
    writes out at the size of the logits (0.12: two sums of 4096 x 8192 took 170 ms together and 15 ms each by itself).
    Fences around the same operands are one fence, and equal constants one array: passes differ in both. It also
    fuses a row sum with the mean over rows that follows (4096 x 32000: 970 ms instead of 90 ms).
    """
    return fenced(f(*fenced(operands)))


def made_once(gradient: Array) -> Array:
    """The same, fenced off from what is made of it.

    XLA on the CPU transposes the gradient of logits for that of the head which made them, where there is more than one
    batch axis: it would make it twice, and a third array of what both share (8 x 256 tokens with 8192 classes, 0.12:
    1.41 of Optax's time and 3 times the logits, with this 0.99 and 2).
    """
    return fenced(gradient)


BLOCK = 2**15
"""Classes in a pass at a time, at most: with 1024 x 128256 XLA on the CPU is 4x slower, once a row's intermediate
results leave the cache (0.12)."""

FEW, MANY = 16, 1024
"""Rows of so few classes, if there are so many of them, are taken class by class: a vector of tokens at a time, in one
loop over the tokens. A row sum takes 2-5 ns for each of ten classes, this 0.5 (262144 x 10, 0.12)."""


@cache
def _blocks(classes: int) -> int:
    """The fewest equal blocks; 1 where the number of classes has no such divisor, or is a symbol."""
    sizes = range(BLOCK, BLOCK // 32 - 1, -1) if isinstance(classes, int) and classes > BLOCK else ()
    return next((classes // size for size in sizes if classes % size == 0), 1)


def over_classes(combine: Any, f: Callable, arrays: PyTree, rows: PyTree, pivot: Array, axis: int) -> Array:
    """f reduced over the classes by `combine`, a ufunc like `jnp.add`: [*batch]. A pass of its own.

    f(arrays, rows, pivot, axis) gets the `arrays`, which have the classes (or 1) on `axis` or are scalars, one block of
    classes at a time: as [.., blocks, classes, ..], or one class alone. rows and pivot, the numbers of a token, are
    broadcastable to what is left without `axis`, the pivot counted from the block's first class; the classes are on the
    new axis. (What is passed with more axes than it needs takes a step more, and XLA on the CPU fuses a row sum of a
    hundred steps at most.)
    """
    sized = [array for array in jax.tree.leaves(arrays) if array.ndim]
    classes, tokens = max(array.shape[axis] for array in sized), pivot.size
    few = isinstance(classes, int) and isinstance(tokens, int) and classes <= FEW and tokens >= MANY
    sharded, blocks = any(entries_of(array)[axis] for array in sized), _blocks(classes)
    if few and not sharded:
        return alone(partial(_class_by_class, combine, f, classes, axis=axis), arrays, rows, pivot)
    if blocks == 1 or sharded:
        return _alone(combine, f, arrays, rows, pivot, axis)
    # The blocks are made before the fence: behind it, XLA on the CPU turns 16-bit logits into float32 first, and the
    # pass takes 4x as long (1024 x 128256 bfloat16, 0.12).
    arrays = jax.tree.map(partial(_in_blocks, blocks, classes, axis), arrays)
    rows, pivot = jax.tree.map(lambda row: jnp.expand_dims(row, axis), (rows, pivot))
    pivot = pivot - _first_of_blocks(blocks, classes // blocks, pivot.ndim, axis)
    return combine.reduce(_alone(combine, f, arrays, rows, pivot, axis + 1), axis=axis)


def sum_over_classes(f: Callable, arrays: PyTree, rows: PyTree, pivot: Array, axis: int) -> Array:
    """Σ_v f, by `over_classes`."""
    return over_classes(jnp.add, f, arrays, rows, pivot, axis)


def _class_by_class(
    combine: Any, f: Callable, classes: int, arrays: PyTree, rows: PyTree, pivot: Array, axis: int
) -> Array:
    def of_class(v):
        return f(jax.tree.map(partial(_one, v, classes, axis), arrays), rows, pivot - v, axis)

    return jnp.squeeze(reduce(combine, map(of_class, range(classes))), axis)


def _one(v: int, classes: int, axis: int, array: Array) -> Array:
    return lax.slice_in_dim(array, v, v + 1, axis=axis) if array.ndim and array.shape[axis] == classes else array


def _in_blocks(blocks: int, classes: int, axis: int, array: Array) -> Array:
    if not array.ndim:
        return array
    return in_parts(array, blocks if array.shape[axis] == classes else 1, axis)


def _first_of_blocks(blocks: int, size: int, ndim: int, axis: int) -> Array:
    """The first class of each block."""
    shape = [blocks if a == axis else 1 for a in range(ndim)]
    return lax.broadcasted_iota(jnp.int32, shape, axis) * size


def _alone(combine: Any, f: Callable, arrays: PyTree, rows: PyTree, pivot: Array, axis: int) -> Array:
    """f reduced over `axis`, by `alone`."""
    unfenced = arrays

    def reduced(arrays, rows, pivot):
        # Where the compiler makes a mask as large as the logits, one serves all passes: not fenced, and of one shape.
        arrays = jax.tree.map(lambda a, fenced: a if a.dtype == bool else fenced, unfenced, arrays)
        return combine.reduce(f(arrays, rows, pivot, axis), axis=axis, keepdims=True)

    return jnp.squeeze(alone(reduced, arrays, rows, pivot), axis)


def as_operands(dtype: Any, numbers: PyTree) -> PyTree:
    """Numbers for one pass by itself: as constants, XLA on the CPU would share them between the passes of two losses in
    one program, and write each out at the size of the logits."""
    return jax.tree.map(lambda number: jnp.full((), number, dtype), numbers)
