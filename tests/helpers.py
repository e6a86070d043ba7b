"""What several test files use: random cases, one way to differentiate, error budgets."""

import logging
from collections.abc import Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax._src import compiler

from softmax_jax import cross_entropy

STATIC = ("axis", "ignore_index", "reduction")
FLOATS = {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 0.7, "softcap": 5.0}
ALONE = ("where", "weights", "ignore_index", "class_weights", *FLOATS)
MARGINS = np.linspace(-100, 100, 401)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]

# The argument of the largest exponential that matters is about -margin, rounded to float32: ≤ 100 · 2^-24 = 6e-6
# relative, and a few roundings more. That is the budget of the promise.
PROMISE = 1e-5


def few_of(values, quick=1, thorough=None):
    """Parameters of which the first are quick and the others thorough, be it not more than so many; what is left is
    for `--full-products`."""
    end = len(values) if thorough is None else quick + thorough
    marks = [[], [pytest.mark.thorough], [pytest.mark.thorough, pytest.mark.full]]
    return [pytest.param(value, marks=marks[(i >= quick) + (i >= end)]) for i, value in enumerate(values)]


def epsilon(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def random_case(
    rng, shape, axis=-1, dtype: Any = jnp.float32, dense=False, names: Iterable[str] = ()
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(logits, labels, options): random, all weights and classes of use, the named options on."""
    axis = axis % len(shape)
    batch, classes = shape[:axis] + shape[axis + 1 :], shape[axis]
    logits = np.array((3 * rng.normal(size=shape)).astype(dtype))
    ids = rng.integers(0, classes, batch)
    if dense:
        labels = rng.gamma(0.5, size=shape).astype(np.float32)  # of any sum, some of them tiny
    else:
        labels = ids.astype(np.int32)
    options: dict[str, Any] = {"axis": axis}
    for name in names:
        if name == "where":
            label = np.arange(classes) == ids[..., None]
            options[name] = (rng.random(shape) < 0.7) | np.moveaxis(label, -1, axis)
        elif name == "weights":
            options[name] = (rng.uniform(0.5, 2, batch) * (rng.random(batch) < 0.8)).astype(np.float32)
        elif name == "class_weights":
            options[name] = (rng.uniform(0.5, 2, classes) * (rng.random(classes) < 0.9)).astype(np.float32)
        elif name == "ignore_index":
            options[name] = int(ids.flat[0])
        else:
            options[name] = np.float32(FLOATS[name])
    return logits, labels, options


def at_margins(rng, margins, dtype=jnp.float32, offset=0.0, classes=11):
    """Logits, one row a margin: the label's logit is the log-sum of the others plus the margin. Rounded to `dtype`;
    what the rounded ones give in float64 is the truth."""
    logits = rng.normal(size=(len(margins), classes))
    labels = rng.integers(0, classes, len(margins)).astype(np.int32)
    rows = np.arange(len(margins))
    others = np.exp(logits).sum(-1) - np.exp(logits[rows, labels])
    logits[rows, labels] = np.log(others) + margins
    return (logits + offset).astype(dtype), labels


def loss_and_grad(variant, logits, labels, cotangent, options):
    """The loss and its pullback of `cotangent` to the logits. Jitted, every array and float option is traced; eager,
    the floats are Python numbers."""
    static = tuple((k, v) for k, v in options.items() if k in STATIC)
    traced = {k: v for k, v in options.items() if k not in STATIC}
    if variant is not jax.jit:
        traced = {k: float(v) if np.ndim(v) == 0 else v for k, v in traced.items()}
    both = _jitted if variant is jax.jit else _loss_and_grad
    return both(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(cotangent), traced, static)


def _loss_and_grad(logits, labels, cotangent, traced, static):
    loss, pull = jax.vjp(lambda logits: cross_entropy(logits, labels, **dict(static), **traced), logits)
    return loss, pull(cotangent)[0]


_jitted = jax.jit(_loss_and_grad, static_argnames="static")  # one for all tests: equal cases compile once


def random_cotangent(rng, shape, axis, reduction, dtype=jnp.float32):
    """Never 1: of either sign, of any size."""
    axis = axis % len(shape)
    batch = shape[:axis] + shape[axis + 1 :] if reduction == "none" else ()
    return np.asarray(3 * rng.normal(size=batch), np.float64 if dtype == jnp.float64 else np.float32)


def assert_within(got, want, condition, k, dtype=jnp.float32, err_msg=""):
    """|got - want| ≤ k · eps · condition in the dtype that it was computed in, plus one rounding to the dtype that it
    is stored in. NaN and infinities must be where they are wanted."""
    dtype = jnp.dtype(dtype)
    computed = jnp.float64 if dtype == jnp.float64 else jnp.float32
    got, want, condition = np.asarray(got, np.float64), np.asarray(want), np.asarray(condition)
    assert got.shape == want.shape
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg)
    budget = k * epsilon(computed) * condition + float(jnp.finfo(computed).tiny)
    if dtype != computed:
        budget = (
            budget * (1 + epsilon(dtype)) + epsilon(dtype) / 2 * abs(want) + float(jnp.finfo(dtype).smallest_subnormal)
        )
    error = abs(np.where(finite, got, 0) - np.where(finite, want, 0))
    excess = error / np.where(finite, budget, 1)
    worst = np.unravel_index(np.argmax(excess), excess.shape) if excess.size else ()
    assert np.all(excess <= 1), (
        f"{err_msg} at {worst}: {got[worst]} for {want[worst]}, {excess[worst]:.3g} x the budget"
    )


def check_against_reference(variant, rng, logits, labels, options, k=8):
    """Loss and gradient under a random cotangent within k eps of the condition: about the number of roundings on
    the way (scale, cap, shift, exp, sum, log1p, product, reduction), each of them eps/2 of its size."""
    dtype, shape, axis = logits.dtype, logits.shape, options.get("axis", -1)
    cotangent = random_cotangent(rng, shape, axis, options.get("reduction", "mean"), dtype)
    want = reference.cross_entropy(logits, labels, cotangent=np.float64(cotangent), **options)
    loss, grad = loss_and_grad(variant, logits, labels, cotangent, options)
    assert loss.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32) and grad.dtype == dtype
    assert_within(loss, want.loss, want.loss_condition, k, loss.dtype, "loss")
    assert_within(grad, want.grad, want.grad_condition, k, dtype, "gradient")


def relative_error(got, want, at_least=1e-30):
    """Of the entries that are at least that large; an array, 0 elsewhere."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    large = abs(want) >= at_least
    return np.where(large, abs(got - want) / np.where(large, abs(want), 1), 0)


@contextmanager
def compilations():
    """The names of the functions that XLA compiles meanwhile, in a list."""
    names: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: names.append(record.getMessage()) if "Compiling" in record.msg else None
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)


@contextmanager
def unoptimized():
    """Programs are compiled without LLVM's optimizations, in half of the time, and before JAX 0.11 without the emitter
    of kernels that takes half of that: XLA's own passes, which decide what is fused, kept and moved between devices,
    are as ever."""
    before, options = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with mock.patch.object(compiler, "get_compile_options", partial(_with_less, options)):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def _with_less(options, *args, **kwargs):
    if jax.__version_info__ < (0, 11):
        more = {"xla_cpu_use_fusion_emitters": False}
        kwargs["env_options_overrides"] = (kwargs["env_options_overrides"] or {}) | more
    return options(*args, **kwargs)
