"""The loss of x @ weight with the gradients of both."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import grid, limits
from benchmarks.measure import Pace, compare, gpu
from benchmarks.peers import LINEAR, jax_peers, torch_peers
from benchmarks.subjects import GRADIENT, of_jax, of_torch


class Cell(NamedTuple):
    tokens: int
    embed: int
    classes: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.embed} x {self.classes} {self.dtype}"

    def key(self) -> dict[str, str]:
        return {"what": LINEAR, "passes": GRADIENT, "cell": self.name}


def cells(quick: bool) -> list[Cell]:
    if gpu() and not quick:
        return [Cell(*shape, "bfloat16") for shape in grid.LINEAR_GPU]
    shapes = grid.QUICK_LINEAR if quick else grid.LINEAR
    return [Cell(*shape, dtype) for shape in shapes for dtype in ("float32", "bfloat16")]


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    x, weight, labels = operands_of(cell)
    of_jaxs = {name: of_jax(peer, [x, weight], [labels], GRADIENT, None) for name, peer in jax_peers(LINEAR).items()}
    rows = weight.T + 0  # as PyTorch keeps it
    of_torchs = {
        name: of_torch(peer, [x, rows], [labels], GRADIENT, None) for name, peer in torch_peers(LINEAR).items()
    }
    return {**cell.key(), **compare({**of_jaxs, **of_torchs}, pace, limits.of_linear(x, weight))}


@lru_cache(maxsize=1)
def operands_of(cell: Cell) -> tuple[Array, ...]:
    return arrays_of(cell.tokens, cell.embed, cell.classes, cell.dtype)


def arrays_of(tokens: int, embed: int, classes: int, dtype: str) -> tuple[Array, ...]:
    """x, weight and labels; without an embed axis, logits and labels."""
    shapes = ((tokens, embed), (embed, classes)) if embed else ((tokens, classes),)

    @jax.jit
    def make(keys: Array) -> tuple[Array, ...]:
        x, *weight = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys[1:], shapes, strict=False))
        labels = jax.random.randint(keys[0], (tokens,), 0, classes, jnp.int32)
        return x, *(w * embed**-0.5 for w in weight), labels

    return make(jax.random.split(jax.random.key(0), 3))
