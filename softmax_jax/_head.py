"""A head's tokens, chunk by chunk: how they are dealt out, and how the logits of one chunk are made."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._checks import Options, Reduction, fixed_sizes
from softmax_jax._chunks import PyTree, map_over_chunks, sum_over_chunks
from softmax_jax._dtypes import accumulator, product_dtype
from softmax_jax._projection import project
from softmax_jax._sharding import Names, entries_of, exactly, fit, psum
from softmax_jax._targets import Labels
from softmax_jax._token_loss import prepare

CHUNK_BYTES, FEW_TOKENS = 2**25, 512
"""What the default `chunk_size` aims at for the logits of one chunk in the accumulator's dtype, and what a large head
gets all the same."""


class Shared(NamedTuple):
    """What every chunk sees."""

    weight: Array | None  # None: `x` are the logits
    bias: Array | None
    rows: Array | None  # `where` of groups of tokens, [groups, classes]
    options: Options  # with the part of `where` that all tokens share


class Each(NamedTuple):
    """One entry a token."""

    x: Array
    labels: Any  # `Labels`, or what else a token is compared with
    weights: Array | None
    where: Array | None  # [tokens, classes], or the token's group in `rows`


def classes_of(weight: Array, transpose_weight: bool) -> int:
    return weight.shape[0 if transpose_weight else 1]


def prepared(x: Array, weight: Array, labels: Labels, options: Options, transpose_weight: bool, class_axes: Names):
    """(labels, weights, options) in their one form, and the dtype of the product."""
    dtype, classes = product_dtype(x.dtype, weight.dtype), classes_of(weight, transpose_weight)
    return *prepare(labels, options, (*x.shape[:-1], classes), dtype, x.ndim - 1, class_axes), dtype


def specs_of(x: Array, weight: Array, bias: Array | None, transpose_weight: bool):
    """How the tokens and the classes lie over devices in explicit sharding, and (x, weight, bias) with them."""
    batch = entries_of(x)[:-1]
    classes = tuple(n for n in entries_of(weight)[0 if transpose_weight else 1] if n not in sum(batch, ()))
    of_weight = exactly((classes, ()) if transpose_weight else ((), classes))
    return batch, classes, (exactly((*batch, ())), of_weight, fit(bias, (classes,)))


def dealt(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    labels: Any,
    weights: Array | None,
    options: Options,
    dtype: DTypeLike,
    classes: int,
    chunk_size: int | None,
) -> tuple[Shared, Each]:
    """The operands of all chunks."""
    batch, tokens = x.shape[:-1], math.prod(x.shape[:-1])
    embed = 1 if weight is None else x.shape[-1]
    fixed_sizes(batch, embed, classes, chunk_size)
    chunks = chunk_count(batch, chunk_size or default_chunk(embed, classes, dtype))
    if weights is None and tokens % chunks:
        weights = jnp.ones(batch, accumulator(dtype))
    where, rows, row_of = _mask_rows(options.where, batch)
    each = Each(x, labels, weights, row_of)
    each = jax.tree.map(lambda a: _deal(a.reshape(tokens, *a.shape[len(batch) :]), chunks), each)
    return Shared(weight, bias, rows, options._replace(where=where, class_weights=_row(options.class_weights))), each


def undealt(of_chunks: Array, batch: tuple[int, ...]) -> Array:
    """One number a token, [size, count], in the batch shape."""
    return of_chunks.reshape(-1)[: math.prod(batch)].reshape(batch)


def logits_of(shared: Shared, chunk: Each, dtype: Any, transpose_weight: bool) -> tuple[Array, Options]:
    """The logits of a chunk, [size, classes], and its options. A row of weight 0 is that of x = 0."""
    x = emptied(chunk.x, chunk.weights)
    logits = x if shared.weight is None else affine(x, shared.weight, shared.bias, dtype, transpose_weight)
    if chunk.where is None:
        return logits, shared.options
    where = chunk.where if shared.rows is None else shared.rows[chunk.where]
    return logits, shared.options._replace(where=where)


def emptied(array: Array, weights: Array | None) -> Array:
    """Rows of weight 0 hold 0."""
    return array if weights is None else jnp.where(weights.reshape(-1, *(1,) * (array.ndim - 1)) == 0, 0, array)


def affine(x: Array, weight: Array, bias: Array | None, dtype: DTypeLike, transpose_weight: bool) -> Array:
    """x @ weight + bias."""
    logits = project(x, weight, dtype, transpose_weight)
    return logits if bias is None else logits + bias[None, :].astype(logits.dtype)


def reduced(
    of_chunk: Callable, shared: PyTree, each: PyTree, batch: tuple[int, ...], reduction: Reduction, token_axes: Names
) -> Array:
    """The losses that `of_chunk` gives, [*batch] for the reduction "none", else their sum over all devices' tokens."""
    if reduction == "none":
        return undealt(map_over_chunks(of_chunk, shared, each), batch)
    return psum(sum_over_chunks(lambda shared, chunk: jnp.sum(of_chunk(shared, chunk)), shared, each), token_axes)


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
