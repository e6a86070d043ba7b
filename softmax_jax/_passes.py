"""One pass over the classes at a time: how it is run.

    rows                     are summed
    of any length            as a whole                                    behind a fence of their own
    of more than `BLOCK`     in blocks, which are made before the fence
    of few classes, many     class by class, over all tokens at once

What is summed is in `_class_passes`.
"""

from collections.abc import Callable
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from softmax_jax._sharding import entries_of

PyTree = Any


def apart(*arrays: PyTree) -> tuple:
    """The same arrays, fenced off from what made them.

    XLA on the CPU would otherwise share one float32 copy of 16-bit logits between the maximum, the sum and the
    gradient: 2x the logits' bytes; without it the gradient is 1.5x faster.
    """
    return lax.optimization_barrier(arrays)


def alone(f: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """f(*operands), fenced off from what made them and from what is made of it: for a pass over the classes.

    XLA on the CPU fuses a row sum with the arithmetic that feeds it alone. What feeds two of them, be it a constant, it
    writes out at the size of the logits (0.12: two sums of 4096 x 8192 took 170 ms together and 15 ms each by itself).
    Fences around the same operands are one fence, and equal constants one array: passes differ in both. It also
    fuses a row sum with the mean over rows that follows (4096 x 32000: 970 ms instead of 90 ms).
    """
    return lax.optimization_barrier(f(*lax.optimization_barrier(operands)))


BLOCK = 2**15
"""Classes in a pass at a time, at most: with 1024 x 128256 XLA on the CPU is 4x slower, once a row's intermediate
results leave the cache (0.12)."""

FEW, MANY = 16, 1024
"""Rows of so few classes, if there are so many of them, are taken class by class: a vector of tokens at a time, in one
loop over the tokens. A row sum takes 2-5 ns for each of ten classes, this 0.5 (262144 x 10, 0.12)."""


@cache
def _blocks(classes: int) -> int:
    """The fewest equal blocks; 1 where the number of classes has no such divisor."""
    sizes = range(BLOCK, BLOCK // 32 - 1, -1) if classes > BLOCK else ()
    return next((classes // size for size in sizes if classes % size == 0), 1)


def over_classes(combine: Any, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> Array:
    """f reduced over the classes by `combine`, a ufunc like `jnp.add`: [*batch]. A pass of its own.

    f(arrays, m, pivot, axis) gets the `arrays`, which have the classes (or 1) on `axis`, one block of classes at a
    time: as [.., blocks, classes, ..], or one class alone. m and pivot, the numbers of a token, are broadcastable to
    what is left without `axis`, the pivot counted from the block's first class; the classes are on the new axis.
    """
    leaves = jax.tree.leaves(arrays)
    classes = max(array.shape[axis] for array in leaves)
    if classes <= FEW and m.size >= MANY and not any(entries_of(array)[axis] for array in leaves):
        return alone(partial(_class_by_class, combine, f, classes, axis=axis), arrays, m, pivot)
    blocks = _blocks(classes)
    if blocks == 1:
        return _alone(combine, f, arrays, m, pivot, axis)
    # The blocks are made before the fence: behind it, XLA on the CPU turns 16-bit logits into float32 first, and the
    # pass takes 4x as long (1024 x 128256 bfloat16, 0.12).
    arrays = jax.tree.map(partial(_in_blocks, blocks, classes, axis), arrays)
    pivot = jnp.expand_dims(pivot, axis) - _first_of_blocks(blocks, classes // blocks, m, axis)
    return combine.reduce(_alone(combine, f, arrays, jnp.expand_dims(m, axis), pivot, axis + 1), axis=axis)


def sum_over_classes(f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> Array:
    """Σ_v f, by `over_classes`."""
    return over_classes(jnp.add, f, arrays, m, pivot, axis)


def _class_by_class(
    combine: Any, f: Callable, classes: int, arrays: PyTree, m: Array, pivot: Array, axis: int
) -> Array:
    def of_class(v):
        one = lambda a: a if a.shape[axis] < classes else lax.slice_in_dim(a, v, v + 1, axis=axis)  # noqa: E731
        return f(jax.tree.map(one, arrays), m, pivot - v, axis)

    return jnp.squeeze(reduce(combine, map(of_class, range(classes))), axis)


def _in_blocks(blocks: int, classes: int, axis: int, array: Array) -> Array:
    sizes = (blocks, classes // blocks) if array.shape[axis] == classes else (1, 1)
    return array.reshape(*array.shape[:axis], *sizes, *array.shape[axis + 1 :])


def _first_of_blocks(blocks: int, size: int, like: Array, axis: int) -> Array:
    """The first class of each block, on an axis more than `like` has."""
    shape = [blocks if a == axis else 1 for a in range(like.ndim + 1)]
    return lax.broadcasted_iota(jnp.int32, shape, axis) * size


def _alone(combine: Any, f: Callable, arrays: PyTree, m: Array, pivot: Array, axis: int) -> Array:
    """f reduced over `axis`, by `alone`."""
    unfenced = arrays

    def reduced(arrays, m, pivot):
        # Where the compiler makes a mask as large as the logits, one serves all passes: not fenced, and of one shape.
        arrays = jax.tree.map(lambda a, fenced: a if a.dtype == bool else fenced, unfenced, arrays)
        return combine.reduce(f(arrays, m, pivot, axis), axis=axis, keepdims=True)

    return jnp.squeeze(alone(reduced, arrays, m, pivot), axis)


def as_operands(like: Array, dtype: Any, *numbers: float | int) -> tuple[Array, ...]:
    """Numbers for one pass by itself, of the rank of `like`: as constants, XLA on the CPU would share them between the
    passes of two losses in one program, and write each out at the size of the logits."""
    return tuple(jnp.full((1,) * like.ndim, number, dtype) for number in numbers)
