"""Tokens in chunks: how they are dealt out, and the logits of one chunk."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from softmax_jax._devices import Classes, PyTree
from softmax_jax._head.chunks import map_over, sum_over
from softmax_jax._head.product import Product, Source, kept_in
from softmax_jax._inputs.arrays import Shape, accumulator
from softmax_jax._inputs.labels import Dense, Labels
from softmax_jax._inputs.options import Options
from softmax_jax._sums.waist import Batch, PerTokenFunction


class Shared(NamedTuple):
    """What every chunk sees."""

    bias: Array | None
    teacher_bias: Array | None
    mask_rows: Array | None  # `where` of groups of tokens, [groups, classes]
    options: Options  # with the part of `where` that all tokens share


class PerToken(NamedTuple):
    """One entry a token."""

    logits: Array | None  # None where a head makes them
    target: Labels | None
    weights: Array | None
    where: Array | None  # [tokens, classes], or the token's group in `mask_rows`


class Chunks(NamedTuple):
    """The operands of all chunks, of tokens in the shape `batch`."""

    operands: tuple[tuple[Product, ...], Shared, PerToken]
    super_chunks: int
    batch: Shape


def to_chunks(
    student: Source, target: Labels | Source, options: Options, dtype: DTypeLike, chunk_size: int | None
) -> Chunks:
    (*batch, classes), tokens = student.shape, math.prod(student.shape[:-1])
    batch, embed = tuple(batch), 1 if student.weight is None else student.x.shape[-1]
    check_fixed_sizes(batch, embed, classes, chunk_size)
    chunk_size = chunk_size or default_chunk(tokens, embed, classes, dtype)
    chunks, super_chunks = chunk_counts(batch, chunk_size, student)
    weights = options.weights
    if weights is None and tokens % chunks:
        weights = jnp.ones(batch, accumulator(dtype))
    where, mask_rows, row_of = _mask_rows(options.where, batch)
    deal = partial(jax.tree.map, partial(_deal, len(batch), chunks))
    heads = [s for s in (student, target) if isinstance(s, Source) and s.weight is not None]
    labels = target if isinstance(target, Labels) else None
    per_token = deal(PerToken(student.x if student.weight is None else None, labels, weights, row_of))
    weights = lax.stop_gradient(per_token.weights)  # a product asks which are 0
    products = (Product(deal(s.x), s.weight, weights, s.dtype, s.transposed) for s in heads)
    options = options._replace(where=where, weights=None, class_weights=_as_row(options.class_weights))
    shared = Shared(student.bias, target.bias if isinstance(target, Source) else None, mask_rows, options)
    return Chunks((tuple(products), shared, per_token), super_chunks, batch)


def over_chunks(
    per_token: PerTokenFunction,
    chunks: Chunks,
    classes: Classes,
    summed: bool,
    forward_mode: bool,
) -> tuple[PyTree, PyTree]:
    """`per_token` of every chunk: each [*batch], or the sum of the first."""
    of_chunk = partial(_of_chunk, per_token, replace(classes, axis=1), forward_mode)
    from_chunks = partial(jax.tree.map, partial(_from_chunks, chunks.batch))
    if summed:
        f = partial(_total, of_chunk)
        total, auxiliary = sum_over(f, chunks.operands, chunks.super_chunks, forward_mode)
        return total, from_chunks(auxiliary)
    return from_chunks(map_over(of_chunk, chunks.operands, chunks.super_chunks, forward_mode))


def _total(of_chunk: Callable, *operands: Any) -> tuple[Array, PyTree]:
    losses, auxiliary = of_chunk(*operands)
    return jnp.sum(losses), auxiliary


def _of_chunk(
    per_token: PerTokenFunction, classes: Classes, forward_mode: bool, shared: Shared, chunk: PerToken, *of_heads: Array
) -> tuple[PyTree, PyTree]:
    """Of the logits that heads made, the student's are the first and the teacher's the last."""
    logits = _plus(of_heads[0], shared.bias) if chunk.logits is None else chunk.logits
    target = Dense(_plus(of_heads[-1], shared.teacher_bias)) if chunk.target is None else chunk.target
    options = shared.options._replace(weights=chunk.weights)
    if chunk.where is not None:
        where = chunk.where if shared.mask_rows is None else shared.mask_rows[chunk.where]
        options = options._replace(where=where)
    return per_token(Batch(logits, target, options, classes, forward_mode))


def _plus(logits: Array, bias: Array | None) -> Array:
    return logits if bias is None else logits + bias[None, :].astype(logits.dtype)


def _from_chunks(batch: tuple[int, ...], of_chunks: Array) -> Array:
    """One number a token, [size, count], in the batch shape."""
    return of_chunks.reshape(-1)[: math.prod(batch)].reshape(batch)


# Temporary bytes a class, of n tokens in super-chunks of S and chunks of C, with b bytes a number of the operands:
#
#     b·S + 4·C + (4·embed if n > S and the head's gradient is not float32 itself)
#
# The head's product with what is kept takes 2·S·embed operations a class; between super-chunks 8·embed bytes of its
# float32 sum are read and written: 327/S of the three products' time on an H100 with bfloat16 operands (712 TFLOP/s,
# 2.9 TB/s; 8192 x 2048 x 50304: 9.98 ms with S = 2048, 9.02 with all tokens). Where b = 4, of float32 and float16, what
# is kept is as large as a chunk's logits, and S = C. One super-chunk while all that is kept, b·n, is no more than that
# sum and what is kept beside it.

CHUNK_BYTES, FEW_TOKENS, KEPT_TOKENS = 2**25, 512, 4096
"""What the default `chunk_size` aims at for the logits of one chunk in the accumulator's dtype; what a large head gets
all the same, twice as many of `KEPT_TOKENS`; and the most tokens of a super-chunk of bfloat16 operands."""


def default_chunk(tokens: int, embed: int, classes: int, dtype: DTypeLike) -> int:
    """C: as many tokens as have logits of `CHUNK_BYTES`, or logits as large as the head's gradient (of a wide head half
    as large), in whose place they lie: 64 tokens at a time, summing it takes as long as the products (1024 x 1024 x
    128256 on the CPU: 1.25 of Optax's time, 0.97 with 512)."""
    of_bytes = CHUNK_BYTES // (classes * accumulator(dtype).itemsize)
    logits_of_labels = FEW_TOKENS if tokens < KEPT_TOKENS else 2 * FEW_TOKENS
    return max(1, of_bytes, min(embed, logits_of_labels), embed // 2)


def chunk_counts(batch: tuple[int, ...], chunk_size: int, student: Source) -> tuple[int, int]:
    """(how many chunks there are, in how many super-chunks), n / C and n / S."""
    if student.weight is None:
        return chunk_count(batch, chunk_size), 1
    tokens, kept, embed = math.prod(batch), kept_in(student.dtype).itemsize, student.x.shape[-1]
    most = max(chunk_size, KEPT_TOKENS) if kept == 2 else chunk_size
    of_sum = 0 if student.weight.dtype == accumulator(student.dtype) else 4 * embed
    if kept * tokens <= of_sum + kept * most:
        return chunk_count(batch, chunk_size), 1
    if most < 2 * chunk_size:
        return (chunks := chunk_count(batch, chunk_size)), chunks
    super_chunks = -(-tokens // most)
    return chunk_count(batch, chunk_size, super_chunks), super_chunks


def chunk_count(batch: tuple[int, ...], chunk_size: int, multiple: int = 1) -> int:
    """How many chunks of equal size, a multiple: the fewest that fit, or up to twice as many if that many divide the
    tokens.

    Of those, one whose size a batch may be sharded over: a multiple of the power of two in the first axis's size.
    """
    tokens = math.prod(batch)
    fewest = max(1, -(-tokens // (chunk_size * multiple))) * multiple
    parts = math.gcd(batch[0] if batch else 1, 1024)
    while parts:
        for chunks in range(fewest, 2 * fewest, multiple):
            if tokens % (chunks * parts) == 0:
                return chunks
        parts //= 2
    return fewest


def _as_row(array: Array | None) -> Array | None:
    return None if array is None else array.reshape(1, -1)


def _mask_rows(where: Array | None, batch: tuple[int, ...]) -> tuple[Array | None, Array | None, Array | None]:
    """`where`, [*batch or 1s, classes or 1], as (shared by all tokens, rows of groups, one a token).

    A mask with some batch axes of size 1 is looked up by group, so that it never grows to the logits' size.
    """
    if where is None or math.prod(where.shape[:-1]) == 1:
        return _as_row(where), None, None
    if where.shape[:-1] == batch:
        return None, None, where
    groups = jnp.arange(math.prod(where.shape[:-1]), dtype=jnp.int32).reshape(where.shape[:-1])
    return None, where.reshape(-1, where.shape[-1]), jnp.broadcast_to(groups, batch)


def _deal(batch_axes: int, count: int, a: Array) -> Array:
    """[*batch, ...] to [size, count, ...], token t to chunk t % count; padded with zeros where that does not divide."""
    a = a.reshape(math.prod(a.shape[:batch_axes]), *a.shape[batch_axes:])
    a = jnp.pad(a, [(0, -len(a) % count)] + [(0, 0)] * (a.ndim - 1)) if len(a) % count else a
    return a.reshape(len(a) // count, count, *a.shape[1:])


def check_fixed_sizes(batch: tuple[Any, ...], embed: Any, classes: Any, chunk_size: int | None) -> None:
    """That the number of chunks can be known: sizes may be symbols, as `jax.export` has them."""
    if not all(isinstance(n, int) for n in batch):
        raise ValueError(
            f"tokens go through in chunks of equal size, and their number must be fixed; got a batch of shape {batch}. "
            "Export it with a fixed batch, or use what takes symbolic sizes: `cross_entropy(x @ weight, labels)`, "
            "`label_statistics`, `kl_divergence` with `teacher_logits`."
        )
    if chunk_size is None and not (isinstance(embed, int) and isinstance(classes, int)):
        raise ValueError(
            f"the default `chunk_size` follows from the number of classes and the embed size of a head; got {classes} "
            f"and {embed}. Pass `chunk_size`, the most tokens a chunk may have."
        )
