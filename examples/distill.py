"""Students learn handwritten digits from the few most probable classes of a teacher: `SparseLabels`.

    python examples/distill.py --students 5 --out out/distill.png

The teacher, a convolutional network, has seen 1347 digits; the students, small networks, see 100 of them, each seed
another hundred, with their labels, or with what the teacher says of them: its three largest probabilities, these and
what is left spread over the other seven, or all ten. Of a vocabulary of 128256 the three are what one can store.
"""

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from softmax_jax import SparseLabels, cross_entropy

plt.switch_backend("Agg")
BATCH, STEPS, SEEN, TEMPERATURE = 128, 600, 100, 4.0
COLOURS = {
    "the labels": "#777777",
    "the teacher's 3 largest probabilities": "#d98c21",
    "these and the rest, spread over the other digits": "#1f6fb4",
    "all 10 of the teacher's probabilities": "#2d8a4e",
}
OPTIMIZER = optax.adamw(optax.cosine_decay_schedule(5e-3, STEPS), weight_decay=1e-2)


class Teacher(eqx.Module):
    """A convolution and two linear layers: one 8 x 8 image to ten logits."""

    features: eqx.nn.Conv2d
    head: eqx.nn.MLP

    def __init__(self, key: Array):
        keys = jax.random.split(key)
        self.features = eqx.nn.Conv2d(1, 32, kernel_size=3, padding=1, stride=2, key=keys[0])
        self.head = eqx.nn.MLP(32 * 4 * 4, 10, 64, 1, key=keys[1])

    def __call__(self, image: Float[Array, "8 8"]) -> Float[Array, " classes"]:
        return self.head(jax.nn.relu(self.features(image[None])).ravel())


class Student(eqx.Module):
    """One hidden layer."""

    layers: eqx.nn.MLP

    def __init__(self, key: Array):
        self.layers = eqx.nn.MLP(64, 10, 24, 1, key=key)

    def __call__(self, image: Float[Array, "8 8"]) -> Float[Array, " classes"]:
        return self.layers(image.ravel())


def loss(net: Any, images: Array, targets: Any, scale: float) -> Float[Array, ""]:
    """Class ids or SparseLabels: one function of both."""
    return cross_entropy(jax.vmap(net)(images), targets, logit_scale=scale)


@eqx.filter_jit
def step(net, state, images, targets, scale):
    gradient = eqx.filter_grad(loss)(net, images, targets, scale)
    updates, state = OPTIMIZER.update(gradient, state, eqx.filter(net, eqx.is_array))
    return eqx.apply_updates(net, updates), state


@eqx.filter_jit
def logits_of(net, images):
    return jax.vmap(net)(images)


def of(targets: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[rows], targets)


def trained(net, images, targets, test, seed, scale=1.0):
    """The network after all steps, and its accuracy on held-out digits every 20 of them."""
    state, rng, accuracy = OPTIMIZER.init(eqx.filter(net, eqx.is_array)), np.random.default_rng(seed), []
    for done in range(STEPS + 1):
        if done % 20 == 0:
            accuracy.append(np.mean(np.asarray(logits_of(net, test[0])).argmax(-1) == test[1]))
        rows = rng.choice(len(images), BATCH)
        net, state = step(net, state, images[rows], of(targets, rows), np.float32(scale))
    return net, np.array(accuracy)


def top_of(teacher, images, k: int) -> SparseLabels:
    """The k largest probabilities of every image, at the temperature, and what is left."""
    probs, ids = jax.lax.top_k(jax.nn.softmax(logits_of(teacher, images) / TEMPERATURE), k)
    return SparseLabels(np.asarray(ids), np.asarray(probs), np.maximum(1 - probs.sum(-1), 0))


def draw(curves: dict[str, np.ndarray], best: float, top: SparseLabels, images: np.ndarray, path: Path) -> None:
    """Accuracy by step, mean and range of the students; what the teacher says of the digits it is least sure of."""
    figure = plt.figure(figsize=(9, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.2, 1])[:, 0]
    (axes, ends), steps = above.subplots(1, 2, width_ratios=[2.2, 1], sharey=True), 20 * np.arange(STEPS // 20 + 1)
    for ax in (axes, ends):
        ax.axhline(100 * best, color="#111111", ls="--", label=f"the teacher: {100 * best:.1f} %")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for place, (name, accuracy) in enumerate(curves.items()):
        mean, colour = 100 * accuracy.mean(0), COLOURS[name]
        axes.plot(steps, mean, color=colour, lw=2, label=f"from {name}: {mean[-1]:.1f} %")
        axes.fill_between(steps, *(100 * f(accuracy, 0) for f in (np.min, np.max)), color=colour, alpha=0.12)
        ends.plot(place + np.linspace(-0.2, 0.2, len(accuracy)), 100 * accuracy[:, -1], "o", color=colour, alpha=0.7)
        ends.plot([place - 0.32, place + 0.32], [mean[-1]] * 2, color=colour, lw=2)
    axes.set(title=f"Mean and range of {len(accuracy)} students, of {SEEN} digits each", xlabel="step")
    axes.set(ylabel="accuracy on held-out digits (%)", ylim=(70, 100))
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    ends.set(title="At the end; line: mean", xticks=range(4))
    ends.set_xticklabels(["labels", "3 largest", "3 and\nthe rest", "all 10"])
    below.suptitle(f"Three probabilities of the teacher, at temperature {TEMPERATURE:g}, where it is least sure")
    for place, row in enumerate(np.argsort(top.probs[:, 0])[:8], start=1):
        axes = below.add_subplot(1, 8, place, xticks=[], yticks=[])
        axes.imshow(images[row], cmap="gray_r")
        said = zip(top.ids[row], top.probs[row], strict=True)
        axes.set_xlabel("\n".join(f"{digit}: {prob:.0%}" for digit, prob in said), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/distill.png"))
    options = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    images, digits = np.reshape(pixels, (-1, 8, 8)).astype(np.float32) / 16, np.asarray(digits, np.int32)
    training, held_out = train_test_split(np.arange(len(digits)), test_size=0.25, stratify=digits, random_state=0)
    test, seeds = (images[held_out], digits[held_out]), range(options.students)
    seen = [np.random.default_rng(seed).choice(training, SEEN, replace=False) for seed in seeds]
    students = [(seed, Student(jax.random.key(seed)), rows) for seed, rows in zip(seeds, seen, strict=True)]

    print(f"{STEPS} steps of a teacher, then of {options.students} students for each line", flush=True)
    teacher, curve = trained(Teacher(jax.random.key(0)), images[training], digits[training], test, 0)
    print(f"teacher: {curve[-1]:.2%} of {len(test[1])} held-out digits", flush=True)
    three, everything = (top_of(teacher, images, k) for k in (3, 10))
    targets, curves = (digits, three._replace(others=None), three, everything._replace(others=None)), {}
    for name, what in zip(COLOURS, targets, strict=True):
        scale = 1.0 if what is digits else 1 / TEMPERATURE
        runs = [trained(net, images[rows], of(what, rows), test, seed, scale) for seed, net, rows in students]
        curves[name] = np.array([accuracy for _, accuracy in runs])
        ends = curves[name][:, -1]
        print(f"learnt from {name}: {ends.mean():.2%}, from {ends.min():.2%} to {ends.max():.2%}", flush=True)
    draw(curves, curve[-1], of(three, np.asarray(training)), images[training], options.out)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
