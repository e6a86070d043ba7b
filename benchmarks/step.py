"""A training step of a small model, with our loss and with Optax's: a loss that wins alone can lose inside a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks import grid
from benchmarks.measure import OURS, Pace, Subject, all_bytes, compare, gpu
from benchmarks.peers import JAX, LINEAR, OPTAX
from softmax_jax import cross_entropy

LOSSES: dict[str, dict[str, Callable]] = {
    "cross_entropy": {OURS: lambda x, head, y: cross_entropy(x @ head, y), OPTAX: JAX[LINEAR][OPTAX]},
    "linear_cross_entropy": {name: JAX[LINEAR][name] for name in (OURS, OPTAX)},
}
OPTIMIZER = optax.adamw(1e-3)


class Cell(NamedTuple):
    what: str
    batch: tuple
    embed: int
    classes: int
    dtype: str


def cells(quick: bool) -> list[Cell]:
    shapes = grid.QUICK_STEP if quick else grid.STEP_GPU if gpu() else grid.STEP
    return [Cell(what, *shape, dtype) for shape in shapes for dtype in ("float32", "bfloat16") for what in LOSSES]


def record(cell: Cell, pace: Pace) -> dict[str, Any]:
    operands = operands_of(cell)
    programs = {name: jax.jit(step_with(loss)).lower(*operands).compile() for name, loss in LOSSES[cell.what].items()}
    subjects = {name: Subject(lambda program=program: program(*operands)) for name, program in programs.items()}
    return {
        "what": cell.what,
        "passes": "step",
        "cell": f"{cell.batch[0] if len(cell.batch) == 1 else cell.batch} x {cell.embed} x {cell.classes} {cell.dtype}",
        **compare(subjects, pace),
        "memory": {OPTAX: all_bytes(programs[OURS]) / all_bytes(programs[OPTAX])},
    }


def step_with(loss: Callable) -> Callable:
    def of_batch(params: dict[str, Array], ids: Array, labels: Array) -> Array:
        x = params["embed"][ids]
        for layer in ("first", "second"):
            x = x + jax.nn.gelu(x @ params[layer])
        return loss(x, params["head"], labels)

    def step(params, state, ids, labels):
        value, gradients = jax.value_and_grad(of_batch)(params, ids, labels)
        updates, state = OPTIMIZER.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def operands_of(cell: Cell) -> tuple[Any, ...]:
    """Parameters, the optimiser's state, ids and labels."""
    e, v = cell.embed, cell.classes
    shapes = {"embed": (v, e), "first": (e, e), "second": (e, e), "head": (e, v)}

    @jax.jit
    def make(keys: Array) -> tuple[Any, ...]:
        named = zip(keys[2:], shapes.items(), strict=True)
        params = {name: jax.random.normal(key, shape, cell.dtype) * e**-0.5 for key, (name, shape) in named}
        ids, labels = (jax.random.randint(key, cell.batch, 0, v, jnp.int32) for key in keys[:2])
        return params, OPTIMIZER.init(params), ids, labels

    return make(jax.random.split(jax.random.key(0), 2 + len(shapes)))
