"""Trains far past 100 % accuracy: the loss that each run reports, and the true loss of its network.

    python examples/tail.py --out out/tail.png

Addition modulo 31 is learnt from half of all pairs by a network of one hidden layer, in three runs that differ in
nothing but the loss and the number format. Every network is judged again in float64. Once every prediction is sure,
its loss is smaller than a float32 beside 1 can show: Optax's rounds to 0, and so do labels' gradients, while the other
classes still push ("softmax collapse": Prieto et al., "Grokking at the Edge of Numerical Stability", ICLR 2025).

How soon that matters is up to the optimizer. Adam with b2=0.95 and eps=1e-20 makes steps of one size however small the
gradient, and the loss falls below 1e-6 within 700 steps. With Optax's defaults (`--b2 0.999 --eps 1e-8`) all three
networks have the same true loss, 7.9e-4 after 1600 steps and 1.7e-5 after 6400: above 1e-6 nothing is gained.
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

from softmax_jax import cross_entropy

plt.switch_backend("Agg")
MODULUS, EMBED, HIDDEN, EVERY = 31, 64, 128, 50


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
    "float64": Run(cross_entropy, np.float64, "#111111"),
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


@jax.enable_x64(True)
def true_loss(parameters: Parameters, pairs: np.ndarray, labels: np.ndarray) -> float:
    """The network's loss, all of it computed in float64."""
    exact = Parameters(*(jnp.asarray(a, np.float64) for a in parameters))
    return float(cross_entropy(logits_of(exact, jnp.asarray(pairs)), labels))


@partial(jax.jit, static_argnums=(0, 1))
def some_steps(optimizer, loss: Callable, parameters: Parameters, state: optax.OptState, pairs: Array, labels: Array):
    """So many steps on all pairs; what they lead to, the loss before them, and how many labels have a gradient of 0."""

    def step(carry, _):
        parameters, state = carry
        gradient = jax.grad(lambda p: loss(logits_of(p, pairs), labels))(parameters)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), None

    logits = logits_of(parameters, pairs)
    slope = jnp.take_along_axis(jax.grad(loss)(logits, labels), labels[:, None], 1)
    (trained, state), _ = jax.lax.scan(step, (parameters, state), None, EVERY)
    return trained, state, (loss(logits, labels), jnp.mean(slope == 0))


def trained(name: str, optimizer, pairs: np.ndarray, labels: np.ndarray, steps: int) -> np.ndarray:
    """Every so many steps: the loss as reported, the true one, and the share of labels without a gradient."""
    history, run = [], RUNS[name]
    with jax.enable_x64(run.dtype == np.float64):
        parameters = initial(run.dtype)
        state, data = optimizer.init(parameters), (jnp.asarray(pairs), jnp.asarray(labels))
        for done in range(0, steps + 1, EVERY):
            true = true_loss(parameters, pairs, labels)
            parameters, state, (reported, share) = some_steps(optimizer, run.loss, parameters, state, *data)
            history.append([float(reported), true, float(share)])
            if done % 400 == 0:
                print(f"{name}: step {done} of {steps}, reported {float(reported):.1e}, true {true:.1e}", flush=True)
    return np.array(history)


def draw(histories: dict[str, np.ndarray], optimizer: str, path: Path) -> None:
    """Both losses by step, on a scale that shows 0 as well, and the share of labels that nothing is learnt from."""
    figure, panels = plt.subplot_mosaic("rt;ss", figsize=(8, 7.6), height_ratios=[1.25, 1], layout="constrained")
    figure.suptitle(f"Addition modulo {MODULUS}, trained by\n{optimizer}", fontsize=11)
    axes = list(panels.values())
    for name, history in histories.items():
        style: dict[str, Any] = {"color": RUNS[name].colour, "lw": 1.6}
        style |= {"lw": 5, "alpha": 0.3} if name == "float64" else {}
        for ax, values in zip(axes, history.T * [[1], [1], [100]], strict=True):
            ends = f"{values[-1]:.0f} % at the end" if ax is axes[2] else f"{values[-1]:.1e}"
            ax.plot(EVERY * np.arange(len(values)), values, label=f"{name}: {ends}", **style)
    for ax in axes[:2]:
        ax.set_yscale("symlog", linthresh=1e-17, linscale=0.4)
        ax.set(ylim=(0, 1e6), yticks=[0, *(10.0**power for power in range(-16, 1, 4))], ylabel="loss (nats per pair)")
    axes[0].set_title("Loss that the run reports")
    axes[1].set(title="True loss of its network (float64)", ylabel="")
    axes[2].set(title="Labels whose gradient is exactly 0", ylabel="labels (%)", ylim=(-2, 102))
    for ax in axes:
        ax.set_xlabel("step")
        place, title = ("upper left", None) if ax is axes[2] else ("upper right", "at the end")
        ax.legend(frameon=False, loc=place, title=title, alignment="left")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--b2", type=float, default=0.95, help="0.999 is Optax's default")
    parser.add_argument("--eps", type=float, default=1e-20, help="1e-8 is Optax's default")
    parser.add_argument("--out", type=Path, default=Path("out/tail.png"))
    options = parser.parse_args()

    every = np.stack(np.meshgrid(*[np.arange(MODULUS)] * 2), -1).reshape(-1, 2).astype(np.int32)
    pairs = np.random.default_rng(1).permutation(every)[: len(every) // 2]
    labels = pairs.sum(1, dtype=np.int32) % MODULUS
    optimizer = optax.adam(1e-3, b1=0.9, b2=options.b2, eps=options.eps)
    written = f"optax.adam(1e-3, b1=0.9, b2={options.b2:g}, eps={options.eps:g})"
    histories = {name: trained(name, optimizer, pairs, labels, options.steps) for name in RUNS}
    draw(histories, written, options.out)
    print(f"optimizer: {written}, {options.steps} steps")
    for name, history in histories.items():
        reported, true, share = history[-1]
        print(
            f"{name}: reported loss {reported:.2e}, true loss {true:.2e}, {share:.1%} of the labels without a gradient"
        )
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
