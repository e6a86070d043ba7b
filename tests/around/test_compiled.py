"""What GPUs and TPUs move, of programs compiled for them here: runs where their compilers are installed
(`pip install -e '.[accelerators]'`)."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In units of the logits: within 0.15 of what one pass over them and one for the gradient take.
ON_A_GPU = {
    "integer labels, forward": 1.0,
    "integer labels, with gradient": 3.0,
    "dense labels, forward": 2.0,
    "dense labels, with gradient": 5.0,
    "all options, with gradient": 3.0,
    "integer labels, with gradient, accuracy, log-normalizer": 3.0,
    "log_prob, entropy, correct, rank": 1.0,
    "KL from logits, forward": 4.0,
    "KL from logits, with gradient": 7.0,
    "log_softmax, forward": 3.0,
    "log_softmax, gradient": 5.0,
    "softmax, forward": 3.0,
    "softmax, gradient": 8.0,
}
MOVED = {
    "H200": ON_A_GPU,
    "A100": ON_A_GPU,
    "TPU v6e": {
        "integer labels, forward": 1.0,
        "integer labels, with gradient": 3.0,
        "dense labels, forward": 2.0,
        "dense labels, with gradient": 5.0,
        "all options, with gradient": 3.0,
        "integer labels, with gradient, accuracy, log-normalizer": 4.0,
        "log_prob, entropy, correct, rank": 1.0,
        "KL from logits, forward": 4.0,
        "KL from logits, with gradient": 7.0,
        "log_softmax, forward": 3.0,
        "log_softmax, gradient": 5.0,
        "softmax, forward": 3.0,
        "softmax, gradient": 7.0,
    },
}
COMPILERS = {"H200": "jax_cuda13_plugin", "A100": "jax_cuda13_plugin", "TPU v6e": "libtpu"}


def costs_of(device, only):
    """{case: [(kernels, bytes moved, temporary memory, milliseconds), of ours and of its peers]}."""
    if find_spec(COMPILERS[device]) is None:
        pytest.skip(f"{COMPILERS[device]} is not installed, the compiler for an {device}")
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("JAX_")}
    command = [sys.executable, "-m", "benchmarks", "compiled", "--only", only]
    run = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.thorough
@pytest.mark.parametrize("device", MOVED)
def test_bytes_kernels_and_temporary_memory(device):
    found = costs_of(device, f"moved, {device}, ")
    for case, expected in MOVED[device].items():
        (kernels, moved, temporary, _), *peer = found[f"moved, {device}, 8192 x 128256 bfloat16, {case}"]
        assert moved <= expected + 0.15, (case, moved)
        assert temporary <= 0.05, (case, temporary)
        assert kernels is None or not peer or kernels <= peer[0][0] + 5, (case, kernels, peer)


@pytest.mark.thorough
def test_classes_on_another_axis_than_the_last():
    """As images are segmented: 150 classes, beside which numbers a token count."""
    size = "sizes, H200, 8 x 150 x 256 x 256 bfloat16, axis 1, "
    found = costs_of("H200", size)
    aims = {"integer labels, forward": 1.2, "integer labels, with gradient": 3.3, "log_softmax, gradient": 6.4}
    for case, most in (aims | {"dense labels, with gradient": 7.0, "log_prob, entropy, correct, rank": 1.4}).items():
        (_, moved, temporary, _), _ = found[size + case]
        assert moved <= most and temporary <= 0.25, (case, moved, temporary)


@pytest.mark.thorough
@pytest.mark.parametrize(("device", "most"), [("H200", 14.0), ("TPU v6e", 13.0)])
def test_softmax_in_attention(device, most):
    """A gradient of two passes over scores and cotangent, the second of which writes; `jax.nn` moves 9 to 13."""
    found = costs_of(device, f"attention, {device}, ")
    assert len(found) == 2
    for (_, moved, temporary, _), (_, _, memory_of_peer, _) in found.values():
        assert moved <= most
        assert temporary <= memory_of_peer


@pytest.mark.thorough
@pytest.mark.parametrize("head", ["1024 x 4096 x 32000", "4096 x 4096 x 32000", "8192 x 1024 x 32000"])
def test_a_head_needs_no_more_than_the_product_that_makes_its_logits(head):
    """Few tokens, one super-chunk of two chunks, several super-chunks."""
    ((_, _, memory, time), (_, _, of_optax, time_of_optax), _) = costs_of("H200", f"heads, H200, {head}").popitem()[1]
    assert memory <= 1.02 * of_optax
    assert time <= 1.03 * time_of_optax
