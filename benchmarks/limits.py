"""What no implementation can beat. CPU: a fresh array is written. GPU: bytes and operations at measured rates."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.measure import Limit, Pace, Subject, gpu, in_turns, spread
from benchmarks.peers import INTEGER
from benchmarks.subjects import FORWARD

LARGE = 2**30  # bytes of the array that is copied
SIDE = 8192  # of the matrices that are multiplied


def of_logits(what: str, passes: str, logits: Array, labels: Array | None) -> Limit | None:
    """Arrays of the logits' size: a loss reads one (twice for a gradient) and dense labels too, and writes one.

    softmax and log_softmax with their pullback read two and write two. A forward pass writes nothing: no limit on the
    CPU.
    """
    loss = labels is not None
    if not gpu():
        return None if passes == FORWARD else Limit(written(logits), 1 if loss else 2)
    reads = 1 if passes == FORWARD else 2
    moved = reads * (logits.nbytes + (labels.nbytes if loss and what != INTEGER else 0))
    moved += 0 if passes == FORWARD else (1 if loss else 2) * logits.nbytes
    return Limit(moved / copy_bandwidth())


def of_linear(x: Array, weight: Array) -> Limit:
    """Three matrix products: of the logits, of dx and of dweight."""
    if gpu():
        return Limit(6 * x.shape[0] * weight.size / matrix_rate(x.dtype.name))
    program = jax.jit(jnp.matmul).lower(x, weight).compile()
    return Limit(Subject(lambda: program(x, weight)), 3)


def written(like: Array) -> Subject:
    """One fresh array."""
    value = jnp.ones((), like.dtype)
    program = jax.jit(partial(jnp.broadcast_to, shape=like.shape)).lower(value).compile()
    return Subject(lambda: program(value))


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    x = jnp.ones(LARGE // 2, jnp.bfloat16)
    program = jax.jit(jnp.negative).lower(x).compile()
    return 2 * LARGE / _median(Subject(lambda: program(x)))


@cache
def matrix_rate(dtype: str) -> float:
    """Operations a second of a large product of random numbers, a multiplication and an addition counted as two."""
    a, b = (jax.random.normal(jax.random.key(n), (SIDE, SIDE), dtype) for n in range(2))
    program = jax.jit(jnp.matmul).lower(a, b).compile()
    return 2 * SIDE**3 / _median(Subject(lambda: program(a, b)))


def _median(subject: Subject) -> float:
    return spread(in_turns({"one": subject}, Pace())["one"])[1]
