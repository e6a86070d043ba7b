"""Makes subjects: functions compiled for operands on the device, forward alone, with gradients, or in a step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.measure import OURS, Subject, gpu
from benchmarks.peers import IN_JAX, LINEAR, OPTAX, import_torch
from softmax_jax import cross_entropy

FORWARD, GRADIENT, STEP = "forward", "forward + gradient", "step"
SPINNING = 0.02  # seconds for which OpenMP's threads wait for work on a core that the next subject needs


class Operands(NamedTuple):
    """A function's operands, those with a gradient first, and the cotangent of its result, None for that of a mean."""

    differentiated: list[Array]
    constant: list[Array]
    cotangent: Array | None = None


def with_gradients(f: Callable, differentiated: int, has_aux: bool) -> Callable:
    """`f` and its gradients in its first operands, as a function of its operands and a cotangent."""

    def run(operands, cotangent):
        first, constant = operands[:differentiated], operands[differentiated:]
        y, pullback, *aux = jax.vjp(lambda *z: f(*z, *constant), *first, has_aux=has_aux)
        return y, pullback(jnp.ones_like(y) if cotangent is None else cotangent), aux

    return run


def of_jax(f: Callable, operands: Operands, passes: str, has_aux: bool = False) -> Subject:
    """Compiles `f`. Its `memory` is what the compiler reports beyond operands and results."""
    arguments = [*operands.differentiated, *operands.constant], operands.cotangent
    if passes == FORWARD:
        g = lambda operands, _: f(*operands)  # noqa: E731
    else:
        g = with_gradients(f, len(operands.differentiated), has_aux)
    program: Any = jax.jit(g).lower(*arguments).compile()
    return Subject(lambda: program(*arguments), memory=program.memory_analysis().temp_size_in_bytes)


def of_torch(f: Callable, operands: Operands, passes: str) -> Subject:
    """Takes JAX's arrays without a copy."""
    torch = import_torch()
    leaves = [torch.from_dlpack(z).requires_grad_(passes == GRADIENT) for z in operands.differentiated]
    constant = [torch.from_dlpack(array) for array in operands.constant]
    constant = [array if array.is_floating_point() else array.long() for array in constant]
    cotangent = None if operands.cotangent is None else torch.from_dlpack(operands.cotangent)

    def forward():
        with torch.no_grad():
            return f(*leaves, *constant)

    def forward_and_gradient():
        y = f(*leaves, *constant)
        return y, torch.autograd.grad(y, leaves, cotangent)

    run = forward if passes == FORWARD else forward_and_gradient
    return Subject(run, lambda _: torch.cuda.synchronize()) if gpu() else Subject(run, lambda _: None, SPINNING)


# A training step of a small model: embedding, two layers, head, AdamW. A loss that wins alone can lose inside a step.

OPTIMIZER = optax.adamw(1e-3)
STEP_LOSSES = {
    "cross_entropy": {OURS: lambda x, head, y: cross_entropy(x @ head, y), OPTAX: IN_JAX[LINEAR][OPTAX]},
    "linear_cross_entropy": {name: IN_JAX[LINEAR][name] for name in (OURS, OPTAX)},
}


def of_step(loss: Callable, shape: tuple[int, ...], dtype: str) -> Subject:
    """A step with that loss on [*batch, embed, classes]. Its `memory` is all that the step needs, operands too."""

    def loss_of_batch(params: dict[str, Array], ids: Array, labels: Array) -> Array:
        x = params["embed"][ids]
        for layer in ("first", "second"):
            x = x + jax.nn.gelu(x @ params[layer])
        return loss(x, params["head"], labels)

    def step(params, state, ids, labels):
        value, gradients = jax.value_and_grad(loss_of_batch)(params, ids, labels)
        updates, state = OPTIMIZER.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    operands = step_operands(shape, dtype)
    program: Any = jax.jit(step).lower(*operands).compile()
    memory = program.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Subject(lambda: program(*operands), memory=total)


def step_operands(shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
    """Returns parameters, the optimizer's state, ids and labels."""
    *batch, embed, classes = shape
    shapes = {"embed": (classes, embed), "first": (embed, embed), "second": (embed, embed), "head": (embed, classes)}
    keys = jax.random.split(jax.random.key(0), 2 + len(shapes))

    def normal(key: Array, shape: tuple[int, int]) -> Array:
        return jax.random.normal(key, shape, dtype) * embed**-0.5

    params = {name: normal(key, shape) for key, (name, shape) in zip(keys[2:], shapes.items(), strict=True)}
    ids, labels = (jax.random.randint(key, batch, 0, classes, jnp.int32) for key in keys[:2])
    return params, OPTIMIZER.init(params), ids, labels
