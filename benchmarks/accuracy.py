"""Relative errors of loss and of the label's gradient by margin, the worst of 512 rows of 1000 logits.

The margin is the label's logit minus the log-sum of the others. Truth is float64, of the logits as they are rounded.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import grid
from benchmarks.measure import OURS, Pace
from benchmarks.peers import NAIVE, OPTAX, TORCH, found_torch
from softmax_jax import cross_entropy

ROWS, CLASSES = 512, 1000
Both = tuple[np.ndarray, np.ndarray]  # losses, gradients of the label's logits


class Cell(NamedTuple):
    margin: int
    dtype: str


def cells(quick: bool) -> list[Cell]:
    margins = grid.QUICK_MARGINS if quick else grid.MARGINS
    return [Cell(margin, dtype) for dtype in ("float32", "bfloat16") for margin in margins]


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    del pace
    z = logits_of(cell)
    truth = truth_of(np.asarray(z, np.float64))
    errors = {name: [_worst(a, b) for a, b in zip(f(z), truth, strict=True)] for name, f in subjects().items()}
    return {
        "what": "accuracy",
        "passes": "loss, gradient",
        "cell": f"{cell.margin} {cell.dtype}",
        **cell._asdict(),
        "loss": float(truth[0].mean()),
        "errors": errors,
    }


def logits_of(cell: Cell) -> jax.Array:
    others = np.random.default_rng(0).normal(size=(ROWS, CLASSES - 1))
    label = np.log(np.exp(others).sum(1, keepdims=True)) + cell.margin
    return jnp.asarray(np.concatenate([label, others], 1), cell.dtype)


def truth_of(z: np.ndarray) -> Both:
    odds = np.exp(z[:, 1:] - z[:, :1]).sum(1)
    return np.log1p(odds), -odds / (1 + odds)


def _worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


@cache
def subjects() -> dict[str, Callable[[jax.Array], Both]]:
    labels = np.zeros(ROWS, np.int32)
    losses = {
        OURS: lambda z: cross_entropy(z, labels, reduction="none"),
        OPTAX: lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels),
        NAIVE: lambda z: -jax.nn.log_softmax(z)[:, 0],
    }
    peers = {name: _of_jax(loss) for name, loss in losses.items()}
    return peers if found_torch() is None else {**peers, TORCH: _of_torch}


def _of_jax(losses: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], Both]:
    forward, gradient = jax.jit(losses), jax.jit(jax.grad(lambda z: losses(z).sum()))
    return lambda z: (np.asarray(forward(z), np.float64), np.asarray(gradient(z)[:, 0], np.float64))


def _of_torch(z: jax.Array) -> Both:
    torch = found_torch()
    logits = torch.from_dlpack(z).requires_grad_(True)
    labels = torch.zeros(len(z), dtype=torch.long, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach().double().cpu().numpy(), gradient[:, 0].double().cpu().numpy()
