"""Trains far past 100 % accuracy: where Optax's float32 loss rounds to 0, this one goes on falling as in float64.

    python examples/tail.py --out out/tail.png

The task is addition modulo 31, learnt from half of all pairs by a network of one hidden layer, in three runs that
differ in nothing but the loss and the number format. Once every prediction is sure, its loss is smaller than a float32
beside 1 can show. Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025, call what follows softmax
collapse: labels' gradients of exactly 0, of which nothing more is learnt, while the other classes still push. (Below
1e-17 it is Adam whose squares leave float32.)
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from softmax_jax import cross_entropy

plt.switch_backend("Agg")
MODULUS, EMBED, HIDDEN, EVERY = 31, 64, 128, 50
OPTIMIZER = optax.adam(1e-3, b2=0.95, eps=1e-20)  # steps of one size, however small the gradient


class Parameters(NamedTuple):
    embedding: Float[Array, "modulus embed"]
    hidden: Float[Array, "both hidden"]
    head: Float[Array, "hidden modulus"]


class Run(NamedTuple):
    """A loss of logits and labels, and the format that everything is computed in."""

    loss: Callable[[Array, Array], Array]
    dtype: Any
    colour: str


RUNS = {
    "float64, the truth": Run(cross_entropy, np.float64, "#111111"),
    "float32, softmax_jax": Run(cross_entropy, np.float32, "#1f6fb4"),
    "float32, Optax": Run(
        lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        np.float32,
        "#d98c21",
    ),
}


def initial(dtype: Any) -> Parameters:
    """The same numbers in either format."""
    rng = np.random.default_rng(0)
    shapes = (MODULUS, EMBED), (2 * EMBED, HIDDEN), (HIDDEN, MODULUS)
    return Parameters(*(jnp.asarray(rng.normal(size=s) / s[0] ** 0.5, np.float32).astype(dtype) for s in shapes))


def logits_of(parameters: Parameters, pairs: Int[Array, "pairs 2"]) -> Float[Array, "pairs modulus"]:
    embedded = parameters.embedding[pairs].reshape(len(pairs), -1)
    return jax.nn.relu(embedded @ parameters.hidden) @ parameters.head


@partial(jax.jit, static_argnums=0)
def some_steps(loss: Callable, parameters: Parameters, state: optax.OptState, pairs: Array, labels: Array):
    """So many steps on all pairs; what they lead to, the loss before them, and how many labels have a gradient of 0."""

    def step(carry, _):
        parameters, state = carry
        gradient = jax.grad(lambda p: loss(logits_of(p, pairs), labels))(parameters)
        updates, state = OPTIMIZER.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), None

    logits = logits_of(parameters, pairs)
    slope = jnp.take_along_axis(jax.grad(loss)(logits, labels), labels[:, None], 1)
    (trained, state), _ = jax.lax.scan(step, (parameters, state), None, EVERY)
    return trained, state, (loss(logits, labels), jnp.mean(slope == 0))


def trained(run: Run, pairs: np.ndarray, labels: np.ndarray, steps: int, bar: tqdm) -> np.ndarray:
    """The loss, and the share of labels without a gradient, every so many steps."""
    with jax.enable_x64(run.dtype == np.float64):
        parameters, history = initial(run.dtype), []
        state = OPTIMIZER.init(parameters)
        for _ in range(0, steps, EVERY):
            parameters, state, shown = some_steps(run.loss, parameters, state, jnp.asarray(pairs), jnp.asarray(labels))
            history.append([float(number) for number in shown])
            bar.update(EVERY)
    return np.array(history)


def draw(histories: dict[str, np.ndarray], path: Path) -> None:
    """Loss by step, on a scale that shows 0 as well, and the share of labels that nothing is learnt from."""
    figure, (loss_axes, share_axes) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for name, history in histories.items():
        steps, (loss, share) = EVERY * np.arange(len(history)), history.T
        style = {
            "color": RUNS[name].colour,
            "lw": 5 if "truth" in name else 1.6,
            "alpha": 0.3 if "truth" in name else 1,
        }
        loss_axes.plot(steps, loss, label=f"{name}: {loss[-1]:.1e} at the end", **style)
        share_axes.plot(steps, 100 * share, label=name, **style)
    loss_axes.set_yscale("symlog", linthresh=1e-17, linscale=0.4)
    loss_axes.set(title="Training loss (nats per pair)", xlabel="step", ylim=(0, 10))
    loss_axes.set_yticks([0, *(10.0**power for power in range(-16, 1, 4))])
    share_axes.set(title="Labels whose gradient is exactly 0 (%)", xlabel="step", ylim=(-2, 102))
    for axes in (loss_axes, share_axes):
        axes.legend(frameon=False, loc="best")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path("out/tail.png"))
    options = parser.parse_args()

    every = np.stack(np.meshgrid(*[np.arange(MODULUS)] * 2), -1).reshape(-1, 2).astype(np.int32)
    pairs = np.random.default_rng(1).permutation(every)[: len(every) // 2]
    labels = pairs.sum(1, dtype=np.int32) % MODULUS
    with tqdm(total=len(RUNS) * options.steps, unit="step") as bar:
        histories = {name: trained(run, pairs, labels, options.steps, bar) for name, run in RUNS.items()}
    draw(histories, options.out)
    for name, history in histories.items():
        print(f"{name}: loss {history[-1, 0]:.2e}, {history[-1, 1]:.1%} of the labels have a gradient of 0")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
