"""Strict settings, simulated devices, and the fixtures that every file shares."""

import os
from contextlib import ExitStack

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("normal", max_examples=30, derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=2400, derandomize=True, deadline=None, database=None)
settings.load_profile("normal")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("softmax_jax", "beartype.beartype")


@pytest.fixture(autouse=True)
def _settings_that_a_test_cannot_have(request):
    """By its marks, also in a run of the whole suite under `jax_debug_nans` or `jax_disable_jit`."""
    with ExitStack() as stack:
        if request.node.get_closest_marker("nan"):
            stack.enter_context(jax.debug_nans(False))
        if request.node.get_closest_marker("compiled"):
            stack.enter_context(jax.disable_jit(False))
        yield


def _devices(backend):
    try:
        return jax.devices(backend)
    except RuntimeError:
        return []


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Every backend that JAX finds; computations run on it."""
    devices = _devices(request.param)
    if not devices:
        pytest.skip(f"JAX finds no {request.param} on this machine")
    with jax.default_device(devices[0]):
        yield devices[0]


@pytest.fixture(params=["eager", "jit"])
def variant(request):
    """A function that takes a function and gives its eager or its jitted form."""
    return jax.jit if request.param == "jit" else lambda f: f


@pytest.fixture
def rng(request):
    """Random numbers of each test's own, the same in every run."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def untyped():
    """Bad input: without jaxtyping, which would speak before the library does."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
