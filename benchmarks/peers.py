"""Who is compared: one registry of losses by what they compute, and why a peer is absent.

Losses take logits (or x and weight) first and labels after, and give the mean. PyTorch's weight is (classes, embed).
"""

import importlib
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import softmax_jax
from benchmarks.measure import OURS, gpu
from softmax_jax import cross_entropy, linear_cross_entropy

OPTAX, NAIVE, TORCH, TOKAMAX = "Optax", "jax.nn", "PyTorch", "tokamax"
WIDE = "Optax, float32 logits"
STATISTICS = "integer labels, accuracy, log-normalizer"
INTEGER, DENSE, SOFTMAX, LOG_SOFTMAX, LINEAR = "integer labels", "dense labels", "softmax", "log_softmax", "linear"

absent: dict[str, str] = {}
"""The peers that were looked for and not found, with the reason."""


class Peer(NamedTuple):
    f: Callable[..., Any]
    of_torch: bool = False
    overwrites: bool = False  # its operands, which are then its own
    beside: bool = False  # it gives (the mean loss, something more)


def _optax_integer(z, y):
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()


def _naive_integer(z, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1).mean()


def with_accuracy(z, y):
    loss, of_tokens = cross_entropy(z, y, statistics=True)
    return loss, (of_tokens.correct, of_tokens.log_normalizer)


def optax_with_accuracy(z, y):
    return _optax_integer(z, y), (jnp.argmax(z, -1) == y, jax.nn.logsumexp(z, -1))


JAX: dict[str, dict[str, Callable[..., Any]]] = {
    INTEGER: {OURS: cross_entropy, OPTAX: _optax_integer, NAIVE: _naive_integer},
    DENSE: {
        OURS: cross_entropy,
        OPTAX: lambda z, t: optax.softmax_cross_entropy(z, t).mean(),
        NAIVE: lambda z, t: -(t * jax.nn.log_softmax(z)).sum(-1).mean(),
    },
    STATISTICS: {OURS: with_accuracy, OPTAX: optax_with_accuracy},
    SOFTMAX: {OURS: softmax_jax.softmax, NAIVE: jax.nn.softmax},
    LOG_SOFTMAX: {OURS: softmax_jax.log_softmax, NAIVE: jax.nn.log_softmax},
    LINEAR: {OURS: linear_cross_entropy, OPTAX: lambda x, weight, y: _optax_integer(x @ weight, y)},
}

KERNELS = {
    INTEGER: {
        "Liger": ("liger_kernel.transformers.functional", "liger_cross_entropy"),
        "QuACK": ("quack.cross_entropy", "cross_entropy"),
    },
    SOFTMAX: {
        "Liger": ("liger_kernel.transformers.functional", "liger_softmax"),
        "QuACK": ("quack.softmax", "softmax"),
    },
    LINEAR: {
        "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        "QuACK": ("quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    },
}
OVERWRITING = {(INTEGER, "Liger")}  # it leaves the gradient in the logits


def jax_peers(what: str) -> dict[str, Peer]:
    peers = {name: Peer(f, beside=what == STATISTICS) for name, f in JAX[what].items()}
    if what == LINEAR and gpu():  # of bfloat16 operands, as many code bases have them and as ours are
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        peers[WIDE] = Peer(lambda x, weight, y: _optax_integer(product(x, weight), y))
    if what == LINEAR and (tokamax := found("tokamax", TOKAMAX)):
        logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every shape that nobody has tuned
        loss = tokamax.linear_softmax_cross_entropy_loss
        for name, how in {TOKAMAX: None, f"{TOKAMAX} chunked": "chunked_xla"}.items():
            peers[name] = Peer(lambda x, w, y, how=how: loss(x, y, w, reduction="mean", implementation=how))
    return peers


def torch_peers(what: str) -> dict[str, Peer]:
    """PyTorch on the CPU; on a GPU its compiler and hand-written kernels too."""
    torch = found_torch()
    if torch is None or what == STATISTICS:
        return {}
    f = _torch_functions(torch)[what]
    peers = {TORCH: Peer(f, True)}
    if gpu():
        torch.compiler.reset()  # or it goes back to eager mode after a few shapes
        peers["torch.compile"] = Peer(torch.compile(f, dynamic=False), True)
        for name, (module, function) in KERNELS.get(what, {}).items():
            if library := found(module, name):
                peers[name] = Peer(getattr(library, function), True, (what, name) in OVERWRITING)
    return peers


def _torch_functions(torch: Any) -> dict[str, Callable[..., Any]]:
    F = torch.nn.functional
    return {
        INTEGER: F.cross_entropy,
        DENSE: F.cross_entropy,
        SOFTMAX: lambda z: F.softmax(z, -1),
        LOG_SOFTMAX: lambda z: F.log_softmax(z, -1),
        LINEAR: getattr(F, "linear_cross_entropy", lambda x, w, y: F.cross_entropy(x @ w.T, y)),
    }


def found_torch() -> Any:
    """PyTorch, on as many threads as there are cores, or None."""
    torch = found("torch", TORCH)
    if torch is None:
        return None
    if gpu() and not torch.cuda.is_available():
        absent[TORCH] = "this build is without CUDA"
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def found(module: str, name: str) -> Any:
    """The module, or None where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        absent[name] = str(error)
        return None
