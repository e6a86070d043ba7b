"""The cases that are timed: which functions, of which sizes and formats, on which operands."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import peers, subjects
from benchmarks.measure import Pace, Subject, compare, gpu
from benchmarks.peers import DENSE, INTEGER, KL, LINEAR, LOG_SOFTMAX, OPTAX, SOFTMAX, STATISTICS, YARDSTICKS
from benchmarks.subjects import FORWARD, GRADIENT, STEP, STEP_LOSSES, Operands

KINDS = {
    "logits": [
        (INTEGER, FORWARD),
        (INTEGER, GRADIENT),
        (STATISTICS, GRADIENT),
        (DENSE, FORWARD),
        (DENSE, GRADIENT),
        (KL, GRADIENT),
        (SOFTMAX, GRADIENT),
        (LOG_SOFTMAX, GRADIENT),
    ],
    "linear": [(LINEAR, GRADIENT)],
    "step": [(what, STEP) for what in STEP_LOSSES],
}


# The shapes and formats of each part. A shape is [tokens, classes] in `logits`, [tokens, embed, classes] in `linear`,
# [*batch, embed, classes] in `step`.
TWO, THREE = ["float32", "bfloat16"], ["float32", "bfloat16", "float16"]
CPU = {
    "logits": ([(262144, 10), (65536, 1000), (16384, 8192), (4096, 32000), (1024, 128256), (256, 262144)], THREE),
    "linear": ([(2048, 512, 32000), (1024, 1024, 128256), (8192, 256, 8192)], TWO),
    "step": ([(2048, 256, 32000), (8, 256, 256, 8192), (16384, 256, 1000)], TWO),
}
GPU = {
    "logits": ([(262144, 16), (65536, 1000), (8192, 32000), (8192, 128256)], TWO),
    "linear": (
        [(8192, 1024, 50304), (8192, 2048, 50304), *((tokens, 4096, 128256) for tokens in (4096, 8192, 16384))],
        ["bfloat16"],
    ),
    "step": ([(8192, 1024, 128256)], TWO),
}
QUICK = {"logits": ([(16, 100)], TWO), "linear": ([(64, 8, 100)], TWO), "step": ([(64, 8, 100), (8, 8, 8, 100)], TWO)}


class Case(NamedTuple):
    what: str
    passes: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def cell(self) -> str:
        return f"{' x '.join(map(str, self.shape))} {self.dtype}"


def cases(part: str, quick: bool) -> list[Case]:
    shapes, dtypes = (QUICK if quick else GPU if gpu() else CPU)[part]
    return [Case(*kind, shape, dtype) for shape in shapes for kind in KINDS[part] for dtype in dtypes]


def record(case: Case, pace: Pace) -> dict[str, Any]:
    """The memory is in units of the logits, of a training step in units of the step with Optax's loss."""
    if case.passes == STEP:
        losses = STEP_LOSSES[case.what]
        compared = {name: subjects.of_step(loss, case.shape, case.dtype) for name, loss in losses.items()}
    else:
        compared = subjects_of(case)
    of_peers = {name: subject.memory for name, subject in compared.items() if name not in YARDSTICKS}
    memory = {name: number for name, number in of_peers.items() if number is not None}
    unit = memory[OPTAX] if case.passes == STEP else case.shape[0] * case.shape[-1] * jnp.dtype(case.dtype).itemsize
    names = {"what": case.what, "passes": case.passes, "cell": case.cell}
    return {**names, **compare(compared, pace), "memory": {name: number / unit for name, number in memory.items()}}


def subjects_of(case: Case) -> dict[str, Subject]:
    """The functions of every library that is installed, and the yardstick."""
    operands = operands_of(case)
    ours_and_peers = peers.jax_functions(case.what).items()
    found = {name: subjects.of_jax(f, operands, case.passes, case.what == STATISTICS) for name, f in ours_and_peers}
    found |= {name: subjects.of_jax(f, operands, FORWARD) for name, f in peers.yardsticks(case.what).items()}
    if case.what == LINEAR:  # PyTorch's weight is [classes, embed]
        x, weight = operands.differentiated
        operands = operands._replace(differentiated=[x, weight.T + 0])
    in_torch = peers.torch_functions(case.what).items()
    return found | {name: subjects.of_torch(f, operands, case.passes) for name, f in in_torch}


def operands_of(case: Case) -> Operands:
    """Normal logits, or hidden states and a head that make such logits; a softmax's cotangent is -logits."""
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, *embed, classes = case.shape
    ids = jax.random.randint(keys[0], (tokens,), 0, classes, jnp.int32)
    if case.what == LINEAR:
        x = jax.random.normal(keys[1], (tokens, *embed), case.dtype)
        weight = jax.random.normal(keys[2], (*embed, classes), case.dtype) * embed[0] ** -0.5
        return Operands([x, weight], [ids])
    normal = partial(jax.random.normal, shape=case.shape)
    z = normal(keys[1], dtype=case.dtype)
    if case.what in (SOFTMAX, LOG_SOFTMAX):
        return Operands([z], [], -z)
    if case.what == DENSE:
        return Operands([z], [jax.nn.softmax(normal(keys[2], dtype="float32"))])
    return Operands([z], [normal(keys[2], dtype=case.dtype) if case.what == KL else ids])
