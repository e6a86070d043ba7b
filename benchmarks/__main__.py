"""Side by side with the peers: `python -m benchmarks accuracy | logits | linear`, each as a Markdown table.

`python -m benchmarks scaling` prints the table of docs/scaling.md, by formulas.

Every time is a ratio, taken in one process in turns (A B A B ...), after a warm-up, as the median over the turns with
the quartiles; memory is what the compiler reports. Truth is float64. Peers that are not installed are left out.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks import scaling
from softmax_jax import cross_entropy, linear_cross_entropy

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch = None

CELLS = [(4096, 32000), (65536, 1000)]
LINEAR_CELLS = [(2048, 512, 32000)]


def table(header: list[str], rows: list[list[str]]) -> None:
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")


def in_turns(subjects: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of every subject, one measurement a turn."""
    for run in subjects.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in tqdm(range(turns), leave=False):
        for name, run in subjects.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> str:
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def compiled(f: Callable, *args: Any) -> tuple[Callable[[], Any], int]:
    """A run of f on `args`, and the temporary bytes of the program."""
    program = jax.jit(f).lower(*args).compile()
    memory = program.memory_analysis()
    return lambda: program(*args), memory.temp_size_in_bytes if memory else -1


def accuracy() -> None:
    """Relative error of loss and of the label's gradient, the worst of 512 rows of 1000 float32 logits, by margin."""
    others = np.random.default_rng(0).normal(size=(512, 999)).astype(np.float32)
    labels = np.zeros(512, np.int32)
    peers = {
        "softmax_jax": _of_jax(lambda z: cross_entropy(z, labels, reduction="none")),
        "Optax": _of_jax(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels)),
        **({"PyTorch": _of_torch} if torch else {}),
    }
    rows = []
    for margin in (0, 5, 10, 15, 20, 30, 60):
        rest = np.log(np.exp(others.astype(np.float64)).sum(1))
        z = np.concatenate([(rest + margin).astype(np.float32)[:, None], others], 1)
        odds = np.exp(z[:, 1:].astype(np.float64) - z[:, :1].astype(np.float64)).sum(1)
        truth = np.log1p(odds), -odds / (1 + odds)
        errors = {}
        for name, loss_and_gradient in peers.items():
            pairs = zip(loss_and_gradient(z), truth, strict=True)
            errors[name] = " / ".join(f"{np.max(np.abs(a - b) / np.abs(b)):.0e}" for a, b in pairs)
        rows.append([str(margin), f"{truth[0].mean():.1e}", *errors.values()])
    table(["margin", "loss", *peers], rows)


def _of_jax(losses: Callable) -> Callable:
    gradient = jax.grad(lambda z: losses(z).sum())
    return lambda z: (np.asarray(losses(z), np.float64), np.asarray(gradient(z), np.float64)[:, 0])


def _of_torch(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert torch is not None
    logits = torch.tensor(z, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long), reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach().double().numpy(), gradient.double().numpy()[:, 0]


def logits(turns: int) -> None:
    rows = []
    for tokens, classes in CELLS:
        for dtype in (jnp.float32, jnp.bfloat16):
            z = jax.random.normal(jax.random.key(0), (tokens, classes), dtype)
            y = jax.random.randint(jax.random.key(1), (tokens,), 0, classes)
            losses = {
                "ours": cross_entropy,
                "optax": lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean(),
            }
            forward = {name: compiled(f, z, y) for name, f in losses.items()}
            both = {name: compiled(jax.value_and_grad(f), z, y) for name, f in losses.items()}
            row = [f"{tokens} x {classes} {jnp.dtype(dtype).name}"]
            for programs in (forward, both):
                seconds = in_turns({name: run for name, (run, _) in programs.items()}, turns)
                row.append(ratio(seconds["ours"], seconds["optax"]))
            row += [f"{both[name][1] / z.nbytes:.2f}x" for name in losses]
            rows.append(row)
    table(["logits", "forward / Optax's", "with gradient / Optax's", "temporary / logits", "Optax's"], rows)


def linear(turns: int) -> None:
    rows = []
    for tokens, embed, classes in LINEAR_CELLS:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.random.normal(jax.random.key(0), (tokens, embed), dtype)
            weight = jax.random.normal(jax.random.key(1), (embed, classes), dtype) / embed**0.5
            y = jax.random.randint(jax.random.key(2), (tokens,), 0, classes)
            losses = {
                "ours": linear_cross_entropy,
                "optax": lambda x, w, y: optax.softmax_cross_entropy_with_integer_labels(x @ w, y).mean(),
            }
            programs = {n: compiled(jax.value_and_grad(f, (0, 1)), x, weight, y) for n, f in losses.items()}
            seconds = in_turns({name: run for name, (run, _) in programs.items()}, turns)
            row = [f"{tokens} x {embed} x {classes} {jnp.dtype(dtype).name}", ratio(seconds["ours"], seconds["optax"])]
            rows.append(row + [f"{programs[name][1] / 1e6:.0f} MB" for name in losses])
    table(["tokens x embed x classes", "time / Optax's", "temporary", "Optax's"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "logits", "linear", "scaling"])
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    if args.what == "scaling":
        return table(scaling.HEADER, scaling.table())
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "optax", *(["torch"] if torch else [])))
    print(f"{date.today()}, {jax.devices()[0].device_kind}, {platform.machine()}, {versions}\n")
    accuracy() if args.what == "accuracy" else {"logits": logits, "linear": linear}[args.what](args.turns)


if __name__ == "__main__":
    main()
