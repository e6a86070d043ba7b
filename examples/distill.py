"""A student learns handwritten digits from the few most probable classes of a teacher: `SparseLabels`.

    python examples/distill.py --epochs 60 --out out/distill.png

The teacher, a convolutional network, has seen a label for every training digit. The students, small networks, have 40
labels, or what the teacher says of all training digits: its first class alone, or its three first probabilities with
what is left spread over the other seven. Nobody holds the teacher's other probabilities; of a vocabulary of 128256
that would be the memory.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from softmax_jax import SparseLabels, cross_entropy

plt.switch_backend("Agg")
BATCH, LABELLED, TEMPERATURE = 128, 40, 2.0
COLOURS = {"teacher": "#111111", "40 labels": "#999999", "teacher's first": "#d98c21", "teacher's first 3": "#1f6fb4"}


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


def loss(net: eqx.Module, images: Array, targets: Any, scale: float) -> Float[Array, ""]:
    """Class ids or SparseLabels: one function of both."""
    return cross_entropy(jax.vmap(net)(images), targets, logit_scale=scale)


@eqx.filter_jit
def step(net, state, optimizer, images, targets, scale):
    gradient = eqx.filter_grad(loss)(net, images, targets, scale)
    updates, state = optimizer.update(gradient, state, eqx.filter(net, eqx.is_array))
    return eqx.apply_updates(net, updates), state


@eqx.filter_jit
def logits_of(net, images):
    return jax.vmap(net)(images)


def trained(net, images, targets, held_out, steps, seed, bar, scale=1.0):
    """The network after so many steps, and its accuracy on held-out digits on the way."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(5e-3, steps), weight_decay=1e-2)
    state, rng, accuracy = optimizer.init(eqx.filter(net, eqx.is_array)), np.random.default_rng(seed), []
    for done in range(steps):
        if done % 10 == 0:
            accuracy.append(float(jnp.mean(logits_of(net, held_out[0]).argmax(-1) == held_out[1])))
        rows = rng.choice(len(images), BATCH)
        net, state = step(net, state, optimizer, images[rows], jax.tree.map(lambda a: a[rows], targets), scale)  # noqa: B023
        bar.update()
    return net, [*accuracy, float(jnp.mean(logits_of(net, held_out[0]).argmax(-1) == held_out[1]))]


def top_of(teacher, images, k: int) -> SparseLabels:
    """The k most probable classes of every image, at a higher temperature, and what is left."""
    probs, ids = jax.lax.top_k(jax.nn.softmax(logits_of(teacher, images) / TEMPERATURE), k)
    return SparseLabels(np.asarray(ids), np.asarray(probs), np.asarray(1 - probs.sum(-1)))


def draw(curves: dict[str, list[float]], top: SparseLabels, images: np.ndarray, path: Path) -> None:
    """Accuracy by step; the digits of which the teacher is least sure, and what it says of them."""
    figure = plt.figure(figsize=(11, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.2, 1])[:, 0]
    axes = above.subplots()
    for name, accuracy in curves.items():
        style = {"ls": "--"} if name == "teacher" else {}
        label = f"{name}: {100 * accuracy[-1]:.1f} %"
        axes.plot(
            10 * np.arange(len(accuracy)), 100 * np.array(accuracy), color=COLOURS[name], lw=2, label=label, **style
        )
    axes.set(title="Held-out digits read right", xlabel="step", ylabel="%", ylim=(60, 100))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    below.suptitle("The training digits of which the teacher is least sure: its three probabilities are the labels")
    for place, row in enumerate(np.argsort(top.probs[:, 0])[:8], start=1):
        axes = below.add_subplot(1, 8, place, xticks=[], yticks=[])
        axes.imshow(images[row], cmap="gray_r")
        said = zip(top.ids[row], top.probs[row], strict=True)
        axes.set_xlabel("\n".join(f"{digit}: {prob:.0%}" for digit, prob in said), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/distill.png"))
    options = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    images, digits = np.reshape(pixels, (-1, 8, 8)).astype(np.float32) / 16, np.asarray(digits, np.int32)
    training, held_out = train_test_split(np.arange(len(digits)), test_size=0.25, stratify=digits, random_state=0)
    seen, test = images[training], (images[held_out], digits[held_out])
    steps, seed = options.epochs * math.ceil(len(seen) / BATCH), options.seed
    keys = jax.random.split(jax.random.key(seed))

    with tqdm(total=4 * steps, unit="step") as bar:
        teacher, curve = trained(Teacher(keys[0]), seen, digits[training], test, steps, seed, bar)
        curves, three = {"teacher": curve}, top_of(teacher, seen, 3)
        for name, inputs, targets, scale in [
            ("40 labels", seen[:LABELLED], digits[training][:LABELLED], 1.0),
            ("teacher's first", seen, three.ids[:, 0], 1.0),
            ("teacher's first 3", seen, three, 1 / TEMPERATURE),
        ]:
            _, curves[name] = trained(Student(keys[1]), inputs, targets, test, steps, seed, bar, scale)
    draw(curves, three, seen, options.out)
    for name, accuracy in curves.items():
        print(f"{name}: {accuracy[-1]:.2%} of {len(test[1])} held-out digits")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
