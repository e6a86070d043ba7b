"""A sum over chunks of tokens whose gradient is taken chunk by chunk."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._devices import PyTree
from softmax_jax._head.chunks import refuse_closure, sum_over
from softmax_jax._inputs.arrays import is_floating


def sum_over_chunks(
    f: Callable[[PyTree, PyTree], Array], shared: PyTree, chunks: PyTree, *, forward_mode: bool = False
) -> Array:
    r"""Σ_c f(shared, chunk_c), with its gradient taken chunk by chunk: for a head that is a function.

    What `f` makes of a chunk, such as its logits, exists for one chunk at a time, in the backward pass too: the
    gradient of the sum is computed in the forward loop and multiplied by its cotangent afterwards. Where the head is a
    matrix, `linear_cross_entropy` moves fewer bytes.

    Args:
      f: (shared, chunk) -> scalar, a sum over the chunk's tokens. It must take every traced value as an argument.
      shared: a pytree of arrays that every chunk sees, such as the head's parameters.
      chunks: a pytree of arrays `[size, count, ...]`, the same size and count for all; `f` gets `[size, ...]`. So
        `h.reshape(-1, count, embed)` deals the tokens out in turn, token t to chunk t % count, and a batch that is
        sharded over its first axis stays where it is.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, where `f` has them; a backward pass then makes
        each chunk again, of float32 copies of the operands.

    Floating arrays come to `f` as float32 where they are 16-bit, so that their gradient is summed in float32 and cast
    once, at the end; `f` casts back where it wants to multiply in 16 bits. Inside `shard_map`, an operand that is the
    same on devices over which the sum varies has the sum of their gradients. Under `jit` a gradient that is not used
    is dead code.

    Returns:
      A scalar, float32 where `f` gives that.

    Raises:
      TypeError, ValueError: while tracing, where `f` closes over a traced value, whose gradient would be lost; where
        it does not return a floating scalar; where `chunks` disagree on size and count.

    >>> import jax, jax.numpy as jnp
    >>> from softmax_jax import cross_entropy, sum_over_chunks
    >>> params = {"norm": jnp.ones(4), "kernel": jnp.arange(20.0).reshape(4, 5)}
    >>> h, labels = jnp.eye(6, 4), jnp.array([0, 4, 2, 1, 3, 0])
    >>> def of_chunk(params, chunk):
    ...     h, labels = chunk
    ...     logits = (h * params["norm"]) @ params["kernel"]
    ...     return cross_entropy(logits, labels, reduction="sum")
    >>> def loss(params, h, count=3):
    ...     return sum_over_chunks(of_chunk, params, (h.reshape(-1, count, 4), labels.reshape(-1, count))) / len(labels)
    >>> value, gradients = jax.jit(jax.value_and_grad(loss))(params, h)
    >>> print(f"{value:.5f}", jax.tree.map(jnp.shape, gradients))
    2.33776 {'kernel': (4, 5), 'norm': (4,)}
    """
    shared, chunks = jax.tree.map(jnp.asarray, (shared, chunks))
    _check_operands(shared, chunks)
    _check_scalar(refuse_closure(f, (), shared, chunks))
    operands = (), shared, chunks
    return sum_over(lambda *of_chunk: (f(*of_chunk), None), operands, forward_mode=bool(forward_mode))[0]


def _check_operands(shared: PyTree, chunks: PyTree) -> None:
    if kinds := [a.dtype for a in jax.tree.leaves((shared, chunks)) if jnp.issubdtype(a.dtype, jnp.complexfloating)]:
        raise TypeError(f"operands must be real; got {kinds}. Pass the real and the imaginary parts.")
    shapes = [jnp.shape(a) for a in jax.tree.leaves(chunks)]
    if not shapes or any(len(shape) < 2 for shape in shapes) or len({shape[:2] for shape in shapes}) > 1:
        raise ValueError(
            f"`chunks` must be arrays [size, count, ...] of one size and one count; got shapes {shapes}. Reshape each "
            "from [tokens, ...] by `a.reshape(-1, count, *a.shape[1:])`."
        )
    if shapes[0][1] == 0:
        raise ValueError(f"there are no chunks: got shapes {shapes}, [size, count, ...]. Pass at least one.")


def _check_scalar(result: PyTree) -> None:
    leaves = jax.tree.leaves(result)
    if len(leaves) != 1 or leaves[0].shape != () or not is_floating(leaves[0]):
        raise TypeError(f"the function given must return a floating scalar; got {result}. Return the chunk's sum.")
