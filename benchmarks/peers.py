"""Which functions are compared, of this library and of its peers. A peer that is not installed is left out.

A loss takes logits (or x and weight) and then labels, and returns the mean. PyTorch's weight is [classes, embed].
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax

import softmax_jax
from benchmarks.measure import OURS, gpu
from softmax_jax import linear_cross_entropy

OPTAX, JAX_NN, TORCH, COMPILED = "Optax", "jax.nn", "PyTorch", "torch.compile"
TOKAMAX, CHUNKED = "tokamax", "tokamax chunked"
OPTAX_FLOAT32 = "Optax, float32 logits"
WRITE, COPY, PRODUCT = "a fresh array", "a copy", "x @ weight"
YARDSTICKS = {WRITE, COPY, PRODUCT}  # what a loss cannot do without; no peers

INTEGER, DENSE, SOFTMAX, LOG_SOFTMAX, LINEAR = "integer labels", "dense labels", "softmax", "log_softmax", "linear"
KL = "KL from logits"
STATISTICS = "integer labels, accuracy, log-normalizer"  # such a loss returns (the mean, the statistics)

Functions = dict[str, Callable[..., Any]]


def functions_in_jax(axis: int = -1) -> dict[str, Functions]:
    """By what they compute and whose they are. The classes of logits are on that axis."""
    cross_entropy = partial(softmax_jax.cross_entropy, axis=axis)
    log_softmax = partial(jax.nn.log_softmax, axis=axis)

    def with_statistics(z, y):
        loss, statistics = cross_entropy(z, y, statistics=True)
        return loss, (statistics.correct, statistics.log_normalizer)

    def optax_integer(z, y):
        return optax.softmax_cross_entropy_with_integer_labels(z, y, axis=axis).mean()

    def optax_with_statistics(z, y):
        return optax_integer(z, y), (jnp.argmax(z, axis) == y, jax.nn.logsumexp(z, axis))

    def jax_nn_integer(z, y):
        return -jnp.take_along_axis(log_softmax(z), jnp.expand_dims(y, axis), axis).mean()

    def kl(z, teacher):
        return softmax_jax.kl_divergence(z, teacher_logits=teacher, axis=axis).mean()

    def optax_kl(z, teacher):
        log_p, log_t = (log_softmax(logits.astype(jnp.float32)) for logits in (z, teacher))
        return optax.losses.kl_divergence_with_log_targets(log_p, log_t, axis=axis).mean()

    return {
        INTEGER: {OURS: cross_entropy, OPTAX: optax_integer, JAX_NN: jax_nn_integer},
        DENSE: {
            OURS: cross_entropy,
            OPTAX: lambda z, t: optax.softmax_cross_entropy(z, t, axis=axis).mean(),
            JAX_NN: lambda z, t: -(t * log_softmax(z)).sum(axis).mean(),
        },
        STATISTICS: {OURS: with_statistics, OPTAX: optax_with_statistics},
        KL: {OURS: kl, OPTAX: optax_kl},
        SOFTMAX: {OURS: partial(softmax_jax.softmax, axis=axis), JAX_NN: partial(jax.nn.softmax, axis=axis)},
        LOG_SOFTMAX: {OURS: partial(softmax_jax.log_softmax, axis=axis), JAX_NN: log_softmax},
        LINEAR: {OURS: linear_cross_entropy, OPTAX: lambda x, weight, y: optax_integer(x @ weight, y)},
    }


IN_JAX = functions_in_jax()


def optax_of_float32(x, weight, y):
    """The logits are float32, as ours are, of bfloat16 operands too."""
    return IN_JAX[INTEGER][OPTAX](jnp.matmul(x, weight, preferred_element_type=jnp.float32), y)


def jax_functions(what: str) -> Functions:
    functions = dict(IN_JAX[what])
    if what == LINEAR and gpu():
        functions[OPTAX_FLOAT32] = optax_of_float32
    if what == LINEAR and (tokamax := import_peer("tokamax")):
        import_peer("absl.flags").FLAGS(sys.argv[:1])  # or it looks for its own flags among ours
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every shape that nobody has tuned
        loss = partial(tokamax.linear_softmax_cross_entropy_loss, reduction="mean")
        functions[TOKAMAX] = lambda x, weight, y: loss(x, y, weight)
        functions[CHUNKED] = lambda x, weight, y: loss(x, y, weight, implementation="chunked_xla")
    return functions


def yardsticks(what: str) -> Functions:
    """What takes the time that no implementation can save."""
    if what == LINEAR:
        return {PRODUCT: lambda x, weight, _: x @ weight}
    return {COPY: lambda z, *_: -z} if gpu() else {WRITE: lambda z, *_: jnp.full_like(z, z[0, 0])}


def torch_functions(what: str) -> Functions:
    """PyTorch, and on a GPU what its compiler makes of the same function."""
    torch = import_torch()
    if torch is None or what in (STATISTICS, KL):
        return {}
    F = torch.nn.functional
    function = {
        INTEGER: F.cross_entropy,
        DENSE: F.cross_entropy,
        SOFTMAX: lambda z: F.softmax(z, -1),
        LOG_SOFTMAX: lambda z: F.log_softmax(z, -1),
        LINEAR: getattr(F, "linear_cross_entropy", lambda x, weight, y: F.cross_entropy(x @ weight.T, y)),
    }[what]
    if not gpu():
        return {TORCH: function}
    torch.compiler.reset()  # or it goes back to eager mode after a few shapes
    return {TORCH: function, COMPILED: torch.compile(function, dynamic=False)}


def import_torch() -> Any:
    """PyTorch, on as many threads as there are cores; None where it is absent, or cannot use this GPU."""
    torch = import_peer("torch")
    if torch is None or gpu() and not torch.cuda.is_available():
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def import_peer(module: str) -> Any:
    """The module, or None where it is not installed."""
    return importlib.import_module(module) if find_spec(module) else None
