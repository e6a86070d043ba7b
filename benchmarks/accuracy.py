"""Relative errors of the loss and of the label's gradient by margin, the worst of 512 rows of 1000 logits.

The margin is the label's logit minus the log-sum of the others. Truth is float64, of the logits as they are rounded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import OURS, Pace
from benchmarks.peers import JAX_NN, OPTAX, TORCH, import_torch
from softmax_jax import cross_entropy

ROWS, CLASSES = 512, 1000
LABELS = np.zeros(ROWS, np.int32)
LossAndGradient = tuple[np.ndarray, np.ndarray]  # of each row: the loss, the gradient of the label's logit


class Margin(NamedTuple):
    margin: int
    dtype: str

    @property
    def cell(self) -> str:
        return f"{self.margin} {self.dtype}"


def cases(quick: bool) -> list[Margin]:
    margins = (0, 20) if quick else range(0, 101, 5)
    return [Margin(margin, dtype) for dtype in ("float32", "bfloat16") for margin in margins]


def record(case: Margin, pace: Pace) -> dict[str, Any]:
    del pace
    others = np.random.default_rng(0).normal(size=(ROWS, CLASSES - 1))
    label = np.log(np.exp(others).sum(1, keepdims=True)) + case.margin
    z = jnp.asarray(np.concatenate([label, others], 1), case.dtype)
    truth = exact(np.asarray(z, np.float64))
    functions = IN_JAX if import_torch() is None else {**IN_JAX, TORCH: in_torch}
    errors = {name: [worst_error(a, b) for a, b in zip(f(z), truth, strict=True)] for name, f in functions.items()}
    names = {"what": "accuracy", "passes": "loss, gradient", "cell": case.cell}
    return {**names, **case._asdict(), "loss": float(truth[0].mean()), "errors": errors}


def exact(z: np.ndarray) -> LossAndGradient:
    odds = np.exp(z[:, 1:] - z[:, :1]).sum(1)
    return np.log1p(odds), -odds / (1 + odds)


def worst_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


def in_jax(losses: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], LossAndGradient]:
    forward, gradient = jax.jit(losses), jax.jit(jax.grad(lambda z: losses(z).sum()))
    return lambda z: (np.asarray(forward(z), np.float64), np.asarray(gradient(z)[:, 0], np.float64))


IN_JAX = {
    OURS: in_jax(lambda z: cross_entropy(z, LABELS, reduction="none")),
    OPTAX: in_jax(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, LABELS)),
    JAX_NN: in_jax(lambda z: -jax.nn.log_softmax(z)[:, 0]),
}


def in_torch(z: jax.Array) -> LossAndGradient:
    torch = import_torch()
    logits = torch.from_dlpack(z).requires_grad_(True)
    labels = torch.zeros(ROWS, dtype=torch.long, device=logits.device)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach().double().cpu().numpy(), gradient[:, 0].double().cpu().numpy()
