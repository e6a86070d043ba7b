"""The one place at which the ways of the CPU and of all other platforms part.

What makes the sums is in `_fold` and `_fold_cpu`, `_divergence_sums` and `_divergence_cpu`; here is what else is left
to the platform. (Where GPUs and TPUs part, a `lax.platform_dependent` says so.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jax import Array, lax

from softmax_jax import _passes_cpu
from softmax_jax._barrier import apart

PLATFORMS = ("cpu",)
"""Those on which sums are passes of their own."""


def by_platform(by_passes: Callable, by_fold: Callable, *operands: Any, gpu: bool = True) -> Any:
    """Both are traced, one is compiled: the fold on a GPU only where that is said to gain by it."""
    platforms = PLATFORMS if gpu else (*PLATFORMS, "cuda", "rocm")
    return lax.platform_dependent(*operands, default=by_fold, **dict.fromkeys(platforms, by_passes))


def apart_on_cpu(*arrays: Any) -> tuple:
    """The same arrays, which the CPU's compiler does not make together with what comes before."""
    return by_platform(apart, lambda *arrays: arrays, *arrays)


def apart_but_on_tpu(*arrays: Any) -> tuple:
    """The same arrays as they are kept, not as they were before they were cast to what is kept."""
    return lax.platform_dependent(*arrays, tpu=lambda *arrays: arrays, default=apart)


def made_once(gradient: Array) -> Array:
    """The same gradient of logits."""
    if gradient.ndim <= 2:
        return gradient
    return by_platform(_passes_cpu.made_once, lambda gradient: gradient, gradient)


def alone(f: Callable, *operands: Any) -> Any:
    """f(*operands), a reduction, which the CPU's compiler makes together with nothing else."""
    return by_platform(partial(_passes_cpu.alone, f), f, *operands)
