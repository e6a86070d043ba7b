"""Tokens in chunks: how they are dealt out, and the logits of one chunk."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._checks import Options, fixed_sizes
from softmax_jax._chunks import PyTree, map_over_chunks, sum_over_chunks
from softmax_jax._dtypes import accumulator
from softmax_jax._source import Source


class Shared(NamedTuple):
    """What every chunk sees."""

    student: Source  # without its x
    target: Source
    rows: Array | None  # `where` of groups of tokens, [groups, classes]
    options: Options  # with the part of `where` that all tokens share
    more: PyTree


class Each(NamedTuple):
    """One entry a token."""

    student: Any
    target: Any
    weights: Array | None
    where: Array | None  # [tokens, classes], or the token's group in `rows`


def dealt(
    student: Source,
    target: Source,
    weights: Array | None,
    options: Options,
    more: PyTree,
    dtype: DTypeLike,
    chunk_size: int | None,
) -> tuple[Shared, Each]:
    """The operands of all chunks."""
    (*batch, classes), tokens = student.shape, math.prod(student.shape[:-1])
    embed = 1 if student.weight is None else student.x.shape[-1]
    fixed_sizes(tuple(batch), embed, classes, chunk_size)
    chunks = chunk_count(tuple(batch), chunk_size or default_chunk(embed, classes, dtype))
    if weights is None and tokens % chunks:
        weights = jnp.ones(batch, accumulator(dtype))
    where, rows, row_of = _mask_rows(options.where, tuple(batch))
    each = Each(student.x, target.x, weights, row_of)
    each = jax.tree.map(lambda a: _deal(a.reshape(tokens, *a.shape[len(batch) :]), chunks), each)
    options = options._replace(where=where, class_weights=_row(options.class_weights))
    return Shared(replace(student, x=None), replace(target, x=None), rows, options, more), each


def over_chunks(numbers: Callable, shared: Shared, each: Each, batch: tuple[int, ...], summed: bool) -> PyTree:
    """`numbers` of a chunk's logits, target, weights, options and `more`: [*batch], or their sum."""
    of_chunk = partial(_of_chunk, numbers)
    if summed:
        return sum_over_chunks(partial(_total, of_chunk), shared, each)
    return jax.tree.map(partial(_undealt, batch), map_over_chunks(of_chunk, shared, each))


def _total(of_chunk: Callable, shared: Shared, chunk: Each) -> Array:
    return jnp.sum(of_chunk(shared, chunk))


def _of_chunk(numbers: Callable, shared: Shared, chunk: Each) -> PyTree:
    student = replace(shared.student, x=emptied(chunk.student, chunk.weights))
    target, options = chunk.target, shared.options
    if shared.target.weight is not None:
        target = replace(shared.target, x=emptied(target, chunk.weights)).logits()
    if chunk.where is not None:
        options = options._replace(where=chunk.where if shared.rows is None else shared.rows[chunk.where])
    return numbers(student.logits(), target, chunk.weights, options, shared.more)


def emptied(array: Array, weights: Array | None) -> Array:
    """Rows of weight 0 hold 0."""
    return array if weights is None else jnp.where(weights.reshape(-1, *(1,) * (array.ndim - 1)) == 0, 0, array)


def _undealt(batch: tuple[int, ...], of_chunks: Array) -> Array:
    """One number a token, [size, count], in the batch shape."""
    return of_chunks.reshape(-1)[: math.prod(batch)].reshape(batch)


CHUNK_BYTES, FEW_TOKENS = 2**25, 512
"""What the default `chunk_size` aims at for the logits of one chunk in the accumulator's dtype, and what a large head
gets all the same."""


def default_chunk(embed: int, classes: int, dtype: DTypeLike) -> int:
    """How many tokens a chunk has: their logits take `CHUNK_BYTES`, or as much as the head's gradient (of a wide head
    half as much), whose sum is read and written once a chunk: 64 tokens at a time, it takes as long as the products
    (1024 x 1024 x 128256 on the CPU: 1.25 of Optax's time, 0.97 with 512)."""
    of_bytes = CHUNK_BYTES // (classes * accumulator(dtype).itemsize)
    return max(1, of_bytes, min(embed, FEW_TOKENS), embed // 2)


def chunk_count(batch: tuple[int, ...], chunk_size: int) -> int:
    """How many chunks of equal size: the fewest that fit, or up to twice as many if that many divide the tokens.

    Of those, one whose size a batch may be sharded over: a multiple of the power of two in the first axis's size.
    """
    tokens = math.prod(batch)
    fewest = max(1, -(-tokens // chunk_size))
    parts = math.gcd(batch[0] if batch else 1, 1024)
    while parts:
        for chunks in range(fewest, 2 * fewest):
            if tokens % (chunks * parts) == 0:
                return chunks
        parts //= 2
    return fewest


def _row(array: Array | None) -> Array | None:
    return None if array is None else array.reshape(1, -1)


def _mask_rows(where: Array | None, batch: tuple[int, ...]) -> tuple[Array | None, Array | None, Array | None]:
    """`where`, [*batch or 1s, classes or 1], as (shared by all tokens, rows of groups, one a token).

    A mask with some batch axes of size 1 is looked up by group, so that it never grows to the logits' size.
    """
    if where is None or math.prod(where.shape[:-1]) == 1:
        return _row(where), None, None
    if where.shape[:-1] == batch:
        return None, None, where
    groups = jnp.arange(math.prod(where.shape[:-1]), dtype=jnp.int32).reshape(where.shape[:-1])
    return None, where.reshape(-1, where.shape[-1]), jnp.broadcast_to(groups, batch)


def _deal(a: Array, count: int) -> Array:
    """[tokens, ...] to [size, count, ...], token t to chunk t % count; padded with zeros where that does not divide."""
    a = jnp.pad(a, [(0, -len(a) % count)] + [(0, 0)] * (a.ndim - 1)) if len(a) % count else a
    return a.reshape(len(a) // count, count, *a.shape[1:])
