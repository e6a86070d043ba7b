"""Strict settings, simulated devices, and the fixtures that every file shares."""

import gc
from contextlib import ExitStack, nullcontext
from importlib.metadata import entry_points

import jax
import jaxtyping

jaxtyping.install_import_hook("softmax_jax", "beartype.beartype")

import numpy as np  # noqa: E402
import products  # noqa: E402
import pytest  # noqa: E402
from helpers import few_of, unoptimized  # noqa: E402
from hypothesis import is_hypothesis_test, settings  # noqa: E402

from softmax_jax._sums import blocks  # noqa: E402

for name, examples in {"quick": 2, "thorough": 4, "fuzz": 2400}.items():
    settings.register_profile(name, max_examples=examples, derandomize=True, deadline=None, database=None)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Asked of the packages, not of JAX, which would take the GPU's memory for every process of the tests.
GPU = bool(entry_points(group="jax_plugins"))


def pytest_addoption(parser):
    parser.addoption("--full-products", action="store_true", help="every cell of every product of parameters")
    parser.addoption("--fold", action="store_true", help="the sums in one pass also on the CPU, where that is slow")
    parser.addoption("--block", type=int, help="logits of a block on the CPU: of so few that every loop turns")
    parser.addoption("--devices", type=int, default=1, help="simulated; of several only the tests that need them run")


def pytest_configure(config):
    jax.config.update("jax_num_cpu_devices", config.getoption("--devices"))
    if config.getoption("--fold"):
        blocks.PLATFORMS = ()
    blocks.BLOCK = config.getoption("--block") or blocks.BLOCK
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("quick" if "not thorough" in config.option.markexpr else "thorough")


def pytest_report_header():
    return "" if GPU else "JAX has no plugin for a GPU here: what would run on one too runs on the CPU alone"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    products.select(config, items)
    if config.getoption("--fold"):
        items[:] = [item for item in items if not item.get_closest_marker("cpu_compiler")]
    several = config.getoption("--devices") > 1
    config.hook.pytest_deselected(items=[item for item in items if _needs_devices(item) != several])
    items[:] = [item for item in items if _needs_devices(item) == several]
    for item in items:  # properties are in either run, with examples of its own number
        if is_hypothesis_test(getattr(item, "obj", None)) and "not thorough" not in config.option.markexpr:
            item.add_marker("thorough")
    items.sort(key=_optimized)  # each kind of program by itself, see `_optimized_or_not`


def pytest_ignore_collect(collection_path, config):
    return True if "devices" in collection_path.parts and config.getoption("--devices") == 1 else None


def _needs_devices(item) -> bool:
    return "devices" in item.path.parts or item.get_closest_marker("devices") is not None


def pytest_collection_finish():
    """What is there by now stays: not looked through again for garbage, of which JAX's traces make much; 8 % of the
    time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(autouse=True)
def _settings_that_a_test_cannot_have(request):
    """By its marks, also in a run of the whole suite under `jax_debug_nans` or `jax_disable_jit`."""
    with ExitStack() as stack:
        if request.node.get_closest_marker("nan"):
            stack.enter_context(jax.debug_nans(False))
        if request.node.get_closest_marker("compiled"):
            stack.enter_context(jax.disable_jit(False))
        yield


def _optimized(item) -> bool:
    """A GPU's programs always are: without, its own compiler is another."""
    marks = {mark.name for mark in item.iter_markers()}
    return "gpu" in marks or ("optimized" in marks and "unoptimized" not in marks)


LAST = {"optimized": True}  # how the test before was compiled


@pytest.fixture(autouse=True)
def _optimized_or_not(request):
    """What has the mark `optimized` is compiled as users compile, the rest in half of the time. JAX would take one for
    the other: it forgets its programs in between."""
    optimized = _optimized(request.node)
    if optimized != LAST["optimized"]:
        jax.clear_caches()
        LAST["optimized"] = optimized
    with nullcontext() if optimized else unoptimized():
        yield


def _devices(backend):
    try:
        return jax.devices(backend)
    except RuntimeError:
        return []


@pytest.fixture(params=["cpu", *([pytest.param("gpu", marks=pytest.mark.gpu)] if GPU else [])])
def device(request):
    """Every backend that JAX finds; computations run on it."""
    devices = _devices(request.param)
    if not devices:
        pytest.skip(f"JAX finds no {request.param} on this machine")
    with jax.default_device(devices[0]):
        yield devices[0]


@pytest.fixture(params=few_of(["jit", "eager"]))
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
