"""Trains a small convolutional network on real handwritten digits: Equinox, Optax and softmax_jax.cross_entropy.

    python examples/digits.py --epochs 50 --out out/digits.png

The digits are the 1797 scans of 8 x 8 pixels that scikit-learn ships; a quarter of them is held out. The same network
is trained a second time, on the same batches, with Optax's loss: the two differ by rounding, which training amplifies,
and end at the same accuracy.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from softmax_jax import cross_entropy

plt.switch_backend("Agg")
BATCH = 128
Digits = tuple[np.ndarray, np.ndarray]  # images, labels


class Net(eqx.Module):
    """Two convolutions and a linear layer: one 8 x 8 image to ten logits."""

    shallow: eqx.nn.Conv2d
    deep: eqx.nn.Conv2d
    readout: eqx.nn.Linear

    def __init__(self, key: Array):
        keys = jax.random.split(key, 3)
        self.shallow = eqx.nn.Conv2d(1, 16, kernel_size=3, padding=1, key=keys[0])
        self.deep = eqx.nn.Conv2d(16, 32, kernel_size=3, padding=1, stride=2, key=keys[1])
        self.readout = eqx.nn.Linear(32 * 4 * 4, 10, key=keys[2])

    def __call__(self, image: Float[Array, "8 8"]) -> Float[Array, " classes"]:
        hidden = jax.nn.relu(self.shallow(image[None]))
        hidden = jax.nn.relu(self.deep(hidden))
        return self.readout(hidden.ravel())


def batches(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """One epoch: images, labels, weights. The last batch is filled up, so that the step compiles once, at weight 0."""
    order = rng.permutation(len(labels))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        full = np.resize(rows, BATCH)
        yield images[full], labels[full], np.arange(BATCH) < len(rows)


def ours(logits: Array, labels: Array, weights: Array, smoothing: Array) -> Float[Array, ""]:
    return cross_entropy(logits, labels, weights=weights, label_smoothing=smoothing)


def of_optax(logits: Array, labels: Array, weights: Array, smoothing: Array) -> Float[Array, ""]:
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
    return jnp.sum(weights * optax.softmax_cross_entropy(logits, targets)) / jnp.sum(weights)


@eqx.filter_jit
def step(net: Net, state: optax.OptState, optimizer: optax.GradientTransformation, loss: Callable, images, *labels):
    gradient = eqx.filter_grad(lambda net: loss(jax.vmap(net)(images), *labels))(net)
    updates, state = optimizer.update(gradient, state, eqx.filter(net, eqx.is_array))
    return eqx.apply_updates(net, updates), state


@eqx.filter_jit
def evaluate(net: Net, images: ArrayLike, labels: ArrayLike) -> tuple[Array, Array, Array]:
    """Logits, mean loss in nats (without smoothing), and accuracy."""
    logits = jax.vmap(net)(jnp.asarray(images))
    return logits, cross_entropy(logits, labels), jnp.mean(logits.argmax(-1) == labels)


def train(name: str, loss: Callable, training: Digits, held_out: Digits, options) -> tuple[Net, np.ndarray]:
    """The network, and loss and accuracy, [epochs + 1, 2 parts, 2], before the first epoch and after each."""
    net, rng = Net(jax.random.key(options.seed)), np.random.default_rng(options.seed)
    steps = options.epochs * math.ceil(len(training[1]) / BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, steps), weight_decay=1e-2)
    state = optimizer.init(eqx.filter(net, eqx.is_array))
    history = [[evaluate(net, *part)[1:] for part in (training, held_out)]]
    for epoch in range(1, options.epochs + 1):
        for batch in batches(*training, rng):
            net, state = step(net, state, optimizer, loss, *batch, options.smoothing)
        history.append([evaluate(net, *part)[1:] for part in (training, held_out)])
        (loss_now, _), (_, accuracy) = history[-1]
        if epoch % 10 == 0:
            print(
                f"{name}: epoch {epoch} of {options.epochs}, loss {loss_now:.4f}, held out {accuracy:.2%}", flush=True
            )
    return net, np.array(history)


def draw(history: np.ndarray, optax_history: np.ndarray, logits, images, labels, path: Path) -> None:
    """Loss and accuracy by epoch; below them the digits it gets wrong, the surest mistakes first."""
    figure = plt.figure(figsize=(9, 6.8), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.4, 1], hspace=0.05)[:, 0]
    loss_axes, accuracy_axes = above.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    epochs = np.arange(1, len(history))
    for column, (part, colour) in enumerate([("training", "#666666"), ("held out", "#1f6fb4")]):
        for table, wide in [(optax_history, {"lw": 6, "alpha": 0.3}), (history, {"lw": 1.5})]:
            loss, accuracy = table[:, column, 0], 100 * table[:, column, 1]
            name = f"{part}, Optax" if "alpha" in wide else f"{part}, softmax_jax"
            loss_axes.semilogy(loss, color=colour, label=f"{name}: {loss[-1]:.4f} at the end", **wide)
            accuracy_axes.plot(
                epochs, accuracy[1:], color=colour, label=f"{name}: {accuracy[-1]:.1f} % at the end", **wide
            )
    loss_axes.set(title="Cross-entropy, measured without smoothing", xlabel="epoch", ylabel="loss (nats per digit)")
    loss_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    loss_axes.minorticks_off()
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="digits read right (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    predicted, sureness = logits.argmax(-1), np.asarray(jax.nn.softmax(logits)).max(-1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-sureness[wrong])][:10]
    below.suptitle(f"{len(wrong)} of {len(labels)} held-out digits are read wrong; the surest mistakes first")
    for place, row in enumerate(worst, start=6 - (len(worst) + 1) // 2):
        axes = below.add_subplot(1, 10, place, xticks=[], yticks=[])
        axes.imshow(images[row], cmap="gray_r")
        axes.set_title(f"{labels[row]} read as {predicted[row]}", fontsize=10)
        axes.set_xlabel(f"{sureness[row]:.0%} sure", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits.png"))
    options = parser.parse_args()

    pixels, labels = load_digits(return_X_y=True)
    images, labels = np.reshape(pixels, (-1, 8, 8)).astype(np.float32) / 16, np.asarray(labels, np.int32)
    rows = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    training, held_out = [(images[part], labels[part]) for part in rows]

    net, table = train("softmax_jax", ours, training, held_out, options)
    _, optax_table = train("Optax", of_optax, training, held_out, options)
    off = np.abs(optax_table[..., 0] / table[..., 0] - 1).max()
    images, labels = held_out
    draw(table, optax_table, np.asarray(evaluate(net, images, labels)[0]), images, labels, options.out)
    print(f"training loss: {table[0, 0, 0]:.4f} -> {table[-1, 0, 0]:.4f} nats")
    print(f"held-out accuracy: {table[-1, 1, 1]:.2%} of {len(labels)} digits")
    print(f"with Optax's loss the losses along the way differ by {off:.0e} of themselves at most")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
