"""Each example runs in a process of its own, as its readers run it, only shorter; a warning there is an error."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import matplotlib.image
import numpy as np
import optax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _digits(printed: str) -> None:
    before, after = (float(number) for number in re.findall(r"training loss: (\S+) -> (\S+) nats", printed)[0])
    assert 2.2 < before < 2.6  # log 10 = 2.30 for a network that knows nothing yet
    assert after < 0.35
    assert _percentages(printed)[-1] > 92  # 6 epochs reach 94.7, the whole 50 reach 99
    assert _differ(printed) < 1e-5  # rounding, which training amplifies: 6e-3 after 50 epochs


def _vmap_batches(printed: str) -> None:
    """10 epochs find nine tenths of the wrong labels; a random choice would find one in eight."""
    rows = re.findall(r"^(\S+) +([\d.]+)% +(\d+) of (\d+) +([\d.]+)%$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["0.00", "0.12", "0.23", "0.35", "ensemble"]
    for _, before, found, flipped, after in rows:
        assert int(found) > 0.75 * int(flipped)
        assert float(before) > 90 and float(after) > 90


def _language_model(printed: str) -> None:
    """Before the first step it guesses: log 4096 = 8.32. In 20 steps it learns which tokens are frequent."""
    pattern = r"training loss: (\S+) -> (\S+) nats, held-out perplexity (\S+), temporary memory of a step (\S+) MiB"
    linear, of_optax = (tuple(map(float, numbers)) for numbers in re.findall(pattern, printed))
    assert 2 * linear[3] < of_optax[3]  # MiB, of 2048 tokens
    for before, after, perplexity, _ in (linear, of_optax):
        assert 8.2 < before < 8.5 and after < 7.2
        assert perplexity < 4096 / 2
    assert _differ(printed) < 1e-5


def _vocab_parallel(printed: str, processes: int = 1, parts: int = 4) -> None:
    """log 4093 = 8.32. Sums in another order differ by 2e-7 after 15 steps; without `where`, it would be 4e-5."""
    assert f"processes: {processes}; 4093 classes, padded to {4093 + -4093 % parts}\n" in printed
    assert f"8 devices, batch in {8 // parts}, classes in {parts} parts: training loss" in printed
    pattern = r"training loss: (\S+) -> (\S+) nats; each device: head (\S+) MiB, temporary memory of one step (\S+) MiB"
    one, spread = (tuple(map(float, numbers)) for numbers in re.findall(pattern, printed))
    for before, after, *_ in (one, spread):
        assert 8.2 < before < 8.5
        assert after < 7
    assert _differ(printed) < 1e-5
    assert abs(spread[2] - one[2] / parts) < 0.02
    assert spread[3] < 0.4 * one[3]


def _distill(printed: str) -> None:
    """Two students each; of five, all of the teacher's probabilities were 5 points above the labels."""
    teacher, labels, *_, everything = re.findall(r": ([\d.]+)%", printed)
    assert float(teacher) > 96
    assert float(everything) > float(labels) + 1.5


def _divergence(printed: str) -> None:
    """A distance of 1e-4 leaves 17 times the divergence in the naive sum, of which a sixth is below 0."""
    rows = re.findall("^" + r" *([\d.]+e\S+)" * 5 + "$", printed, re.MULTILINE)
    assert len(rows) == 23
    for distance, ours, naive, of_optax, _ in (map(float, row) for row in rows):
        assert ours < (1e-4 if distance < 1e-4 else 2e-6)
        assert distance > 2e-4 or min(naive, of_optax) > 1
    below = dict(re.findall(r"^(\S.*): (\d+) of 736 below 0$", printed, re.MULTILINE))
    assert below["softmax_jax"] == "0" and int(below["Optax"]) > 50


def _contrastive(printed: str) -> None:
    """log 512 = 6.24 for encoders that know nothing; 400 steps find 88 % of 450, a guess one of them."""
    before, after = (float(number) for number in re.findall(r"^loss: (\S+) -> (\S+) nats", printed, re.M)[0])
    assert 6 < before < 7 and after < 4
    first, found, guess = re.findall(r"among 450: (\S+)% -> (\S+)%, a guess (\S+)%", printed)[0]
    assert float(first) < 3 and float(found) > 50 and guess == "0.2"
    needs = re.findall(r"^batch \d+: (\S+) MiB with the matrix, (\S+) MiB without$", printed, re.MULTILINE)
    assert all(float(linear) < float(matrix) for matrix, linear in needs)
    assert 20 * float(needs[-1][1]) < float(needs[-1][0])
    assert float(re.findall(r"differ by (\S+) of the", printed)[0]) < 1e-5


def _policy_gradient(printed: str) -> None:
    """50 updates: without the bonus half of the sequences are copies of others, with it none is."""
    rows = re.findall(r"reward (\S+)% -> (\S+)%, entropy (\S+) nats, (\d+) distinct", printed)
    none, bonus = (tuple(map(float, row)) for row in rows)
    for before, after, *_ in (none, bonus):
        assert 40 < before < 60 and after > 85
    assert bonus[2] > 4 * none[2]
    assert none[3] < 90 and bonus[3] > 120
    logits, linear = (float(number) for number in re.findall(r"([\d.]+) MiB", printed))
    assert linear < 0.5 * logits


def _tail(printed: str) -> None:
    """1000 steps: a loss near 3e-10 in float64 and float32 alike; Optax's network has a true one of 1e-7, reports 0,
    and a third or more of its labels are without a gradient."""
    assert "optax.adam(1e-3, b1=0.9, b2=0.95, eps=1e-20)" in printed
    rows = re.findall(r"reported loss (\S+), true loss (\S+), ([\d.]+)%", printed)
    exact, ours, of_optax = (tuple(map(float, row)) for row in rows)
    assert exact[0] < 1e-8 and abs(ours[1] / exact[1] - 1) < 0.02
    assert abs(exact[0] / exact[1] - 1) < 1e-2 and abs(ours[0] / ours[1] - 1) < 1e-2
    assert of_optax[0] < 1e-8 and of_optax[1] > 10 * ours[1]
    assert ours[2] == 0 and of_optax[2] > 30


def _differ(printed: str) -> float:
    return float(re.findall(r"differ by (\S+) of themselves", printed)[0])


def _percentages(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", printed)]


longer = partial(pytest.param, marks=pytest.mark.thorough)


@pytest.mark.parametrize(
    ("name", "arguments", "check"),
    [
        pytest.param("digits", "--epochs 6", _digits, id="digits"),
        longer("vmap_batches", "--epochs 10 --members 4", _vmap_batches, id="vmap_batches"),
        longer("language_model", "--steps 20 --vocabulary 4096", _language_model, id="language_model"),
        pytest.param(
            "vocab_parallel",
            "--steps 15 --vocabulary 4093",
            _vocab_parallel,
            id="vocab_parallel",
            marks=[pytest.mark.thorough, pytest.mark.full],  # below it runs in two processes
        ),
        longer("distill", "--students 2", _distill, id="distill"),
        longer("contrastive", "--steps 60", _contrastive, id="contrastive"),
        longer("divergence", "--rows 32 --classes 4096", _divergence, id="divergence"),
        longer("tail", "--steps 1000", _tail, id="tail"),
        longer("policy_gradient", "--updates 50", _policy_gradient, id="policy_gradient"),
        longer(
            "vocab_parallel",
            "--steps 15 --vocabulary 4093 --processes 2 --model 8 --seconds 800",
            partial(_vocab_parallel, processes=2, parts=8),  # each process has one half of the head
            id="vocab_parallel_in_two_processes",
        ),
    ],
)
def test_an_example_learns_and_draws(name: str, arguments: str, check: Callable[[str], None], tmp_path: Path):
    picture = tmp_path / "made" / f"{name}.png"
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments.split(), "--out", str(picture)]
    # JAX's defaults on one CPU device, whatever this process was told and whatever else the machine has.
    kept = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS" and not key.startswith("JAX_")}
    environment = kept | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr.lower()
    check(run.stdout)

    assert f"picture: {picture}" in run.stdout
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    shown = pixels[..., :3].mean(-1)
    assert 0.02 < (shown < 0.9).mean() < 0.6  # there is ink, on mostly white


@pytest.mark.thorough
def test_each_loss_trains_the_same_language_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("language_model")
    monkeypatch.setattr(example, "LAYERS", 1)
    tokens = np.random.default_rng(0).integers(1000, size=(3, 33), dtype=np.int32)
    optimizer = optax.adamw(1e-3)
    losses = {}
    cpu = jax.default_device(jax.devices("cpu")[0])
    with cpu, jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as in a process of its own
        for name in example.LOSSES:
            model = example.LanguageModel(1000, np.random.default_rng(0))
            state = optimizer.init(eqx.filter(model, eqx.is_array))
            losses[name] = []
            for _ in range(4):
                model, state, loss = example.step(model, state, tokens, optimizer, name)
                losses[name].append(float(loss))
    assert losses["linear"][-1] < losses["linear"][0] - 0.1
    # The first losses are sums of the same 96 losses. The rounding of the gradients grows in later steps, as Adam
    # divides by their size: measured: at most about 1 eps; 16 leave room for another order of the sums.
    for name in ("logits", "optax"):
        np.testing.assert_allclose(losses["linear"], losses[name], rtol=16 * float(np.finfo(np.float32).eps))
