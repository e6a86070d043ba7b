"""Losses and softmaxes of logits that exist, over the whole grid."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import grid, limits
from benchmarks.measure import Pace, compare, gpu
from benchmarks.peers import DENSE, INTEGER, LOG_SOFTMAX, SOFTMAX, STATISTICS, jax_peers, torch_peers
from benchmarks.subjects import FORWARD, GRADIENT, of_jax, of_torch

KINDS = (
    (INTEGER, FORWARD),
    (INTEGER, GRADIENT),
    (STATISTICS, GRADIENT),
    (DENSE, FORWARD),
    (DENSE, GRADIENT),
    (SOFTMAX, GRADIENT),
    (LOG_SOFTMAX, GRADIENT),
)


class Cell(NamedTuple):
    what: str
    passes: str
    tokens: int
    classes: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.classes} {self.dtype}"

    def key(self) -> dict[str, str]:
        return {"what": self.what, "passes": self.passes, "cell": self.name}


def cells(quick: bool) -> list[Cell]:
    """Cells that share their data are neighbours."""
    of_here = (grid.LOGITS_GPU, grid.DTYPES_GPU) if gpu() else (grid.LOGITS, grid.DTYPES)
    shapes, dtypes = (grid.QUICK_LOGITS, grid.QUICK_DTYPES) if quick else of_here
    return [Cell(*kind, *shape, dtype) for shape in shapes for kind in KINDS for dtype in dtypes]


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    z = logits_of(cell.tokens, cell.classes, cell.dtype)
    loss = cell.what in (INTEGER, STATISTICS, DENSE)
    labels = labels_of(cell.what, cell.tokens, cell.classes) if loss else None
    rest, cotangent = ([], -z) if labels is None else ([labels], None)
    subjects = {
        name: (of_torch if peer.of_torch else of_jax)(peer, [z], rest, cell.passes, cotangent)
        for name, peer in {**jax_peers(cell.what), **torch_peers(cell.what)}.items()
    }
    limit = limits.of_logits(cell.what, cell.passes, z, labels)
    return {**cell.key(), **compare(subjects, pace, limit)}


@lru_cache(maxsize=len(grid.DTYPES))
def logits_of(tokens: int, classes: int, dtype: str) -> Array:
    return _normal(0, tokens, classes, dtype)


@lru_cache(maxsize=1)
def labels_of(what: str, tokens: int, classes: int) -> Array:
    if what != DENSE:
        return jax.random.randint(jax.random.key(1), (tokens,), 0, classes, jnp.int32)
    return _jitted_softmax()(_normal(2, tokens, classes, "float32"))


def _normal(seed: int, tokens: int, classes: int, dtype: str) -> Array:
    return jax.random.normal(jax.random.key(seed), (tokens, classes), dtype)


@cache
def _jitted_softmax():
    return jax.jit(jax.nn.softmax)
