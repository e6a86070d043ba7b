"""CLIP's loss without its matrix of similarities: two encoders learn which pieces belong to one handwritten digit.

    python examples/contrastive.py --out out/contrastive.png

A chessboard is laid over each digit: one encoder sees the pixels of the black squares, the other those of the white
ones, and no pixel is seen by both. With x and y the two encodings of a batch, of length 1, the logits are all their
products, times a learned temperature, and the label of each row is its own number: `linear_cross_entropy(x, y, arange,
transpose_weight=True, logit_scale=...)`, and the same with x and y exchanged. The matrix, batch x batch, and its
gradient are made a part at a time. At the end the loss over eight simulated devices, each with an eighth of the batch,
is compared with one's. (CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021.)
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from softmax_jax import linear_cross_entropy

plt.switch_backend("Agg")
jax.config.update("jax_num_cpu_devices", 8)
EMBED, BATCH, CHUNK = 32, 512, 128  # rows of similarities at a time
WHITE = np.add.outer(range(8), range(8)).ravel() % 2 == 1  # a pixel of 64 is on a white square


class Encoders(eqx.Module):
    """One for black squares and one for white ones, and the temperature, as the logarithm of its inverse."""

    black: eqx.nn.MLP
    white: eqx.nn.MLP
    log_scale: Array

    def __init__(self, key: Array):
        keys = jax.random.split(key)
        self.black, self.white = (eqx.nn.MLP(32, EMBED, 256, 2, key=k) for k in keys)
        self.log_scale = jnp.log(jnp.float32(10))

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Of images, [n, 64], the encodings of both kinds of squares, [n, embed], of length 1."""
        both = jax.vmap(self.black)(images[:, ~WHITE]), jax.vmap(self.white)(images[:, WHITE])
        x, y = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in both)
        return x, y


def loss(x: Array, y: Array, scale: Array) -> Array:
    """The mean of both directions."""
    ids, options = jnp.arange(len(x)), {"transpose_weight": True, "logit_scale": scale, "chunk_size": CHUNK}
    return (linear_cross_entropy(x, y, ids, **options) + linear_cross_entropy(y, x, ids, **options)) / 2


def plain(x: Array, y: Array, scale: Array) -> Array:
    """The same by the matrix."""
    logits, ids, ce = scale * (x @ y.T), jnp.arange(len(x)), optax.softmax_cross_entropy_with_integer_labels
    return (ce(logits, ids).mean() + ce(logits.T, ids).mean()) / 2


def retrieved(encoders: Encoders, images: np.ndarray) -> np.ndarray:
    """Whose white squares are closest to each image's black ones."""
    x, y = map(np.asarray, encoders(jnp.asarray(images)))
    return np.argmax(x @ y.T, -1)


def train(images: np.ndarray, held_out: np.ndarray, steps: int) -> tuple[Encoders, list[float], list[float]]:
    """The encoders, and the loss and the share of held-out digits that find their own, along the way."""
    encoders = Encoders(jax.random.key(0))
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)
    state, rng, losses, shares = optimizer.init(eqx.filter(encoders, eqx.is_array)), np.random.default_rng(0), [], []

    @eqx.filter_jit
    def step(encoders, state, batch):
        def of_batch(encoders: Encoders) -> Array:
            x, y = encoders(batch)
            return loss(x, y, jnp.exp(encoders.log_scale))

        value, gradient = eqx.filter_value_and_grad(of_batch)(encoders)
        updates, state = optimizer.update(gradient, state, eqx.filter(encoders, eqx.is_array))
        return eqx.apply_updates(encoders, updates), state, value

    for i in range(steps):
        moved = images[rng.choice(len(images), BATCH, replace=False)] + rng.normal(0, 0.1, (BATCH, 64))
        encoders, state, value = step(encoders, state, jnp.asarray(moved, jnp.float32))
        losses.append(float(value))
        if i % 20 == 19 or i == 0:
            shares.append(float(np.mean(retrieved(encoders, held_out) == np.arange(len(held_out)))))
        if i % 50 == 49:
            print(f"step {i + 1} of {steps}, loss {value:.2f}, found {shares[-1]:.1%}", flush=True)
    return encoders, losses, shares


def memory(loss: Callable, x, y, scale) -> float:
    """MiB that the loss with its gradients needs on a device, beside its operands and results."""
    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, y, scale).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20  # pyright: ignore


def on_eight_devices(x: Array, y: Array, scale: Array) -> tuple[float, float, float]:
    """The loss, the largest difference of a gradient from one device's, and the MiB that each device needs."""
    rows = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    _, want = both(x, y, scale)
    x, y = jax.device_put(x, rows), jax.device_put(y, rows)
    value, got = both(x, y, scale)
    off = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(got, want, strict=True))
    return float(value), off, memory(loss, x, y, scale)


def draw(held_out, found, shares, sizes, needs, path: Path) -> None:
    figure = plt.figure(figsize=(8, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.2, 1], hspace=0.05)[:, 0]
    left, right = above.subplots(1, 2)
    left.plot(np.maximum(0, 20 * np.arange(len(shares)) - 1), 100 * np.array(shares), color="#1f6fb4")
    left.axhline(100 / len(held_out), color="#666666", ls=":", label=f"a guess: {100 / len(held_out):.1f} %")
    left.set(title=f"{shares[-1]:.0%} of {len(held_out)} digits find their own", xlabel="step", ylim=(0, 100))
    left.set_ylabel("found among the held-out digits (%)")
    left.legend(frameon=False, loc="lower right")
    for (name, need), colour in zip(needs.items(), ("#d98c21", "#1f6fb4"), strict=True):
        right.loglog(sizes, need, "o-", color=colour, label=f"{name}: {need[-1]:.0f} MiB")
    right.set(title="Memory of loss and gradient (MiB)", xlabel="pairs in a batch", xticks=sizes[1::2], ylim=(0.5, 1e5))
    right.xaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    right.legend(frameon=False, loc="upper left", title=f"at {sizes[-1]} pairs", alignment="left")
    right.grid(linewidth=0.3)
    below.suptitle("Held-out digits: the black squares alone; with the white squares that they find")
    for column, other in enumerate(found[:9]):
        joined = np.where(WHITE, held_out[other], held_out[column])
        for row, image in enumerate([np.where(WHITE, np.nan, held_out[column]), joined]):
            ax = below.add_subplot(2, 9, 9 * row + column + 1, xticks=[], yticks=[], facecolor="#cfe0f1")
            ax.imshow(image.reshape(8, 8), cmap="gray_r")
        ax.set_xlabel("its own" if other == column else "another's")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/contrastive.png"))
    args = parser.parse_args()
    images, _ = load_digits(return_X_y=True)
    parts = train_test_split(np.asarray(images / 16, np.float32), test_size=450, random_state=0)
    images, held_out = (np.asarray(part) for part in parts)
    encoders, losses, shares = train(images, held_out, args.steps)
    scale = jnp.exp(encoders.log_scale)
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f} nats; inverse temperature 10 -> {float(scale):.1f}")
    print(f"held-out digits that find their own among {len(held_out)}: {shares[0]:.1%} -> {shares[-1]:.1%}", end="")
    print(f", a guess {1 / len(held_out):.1%}", flush=True)
    sizes = [512, 1024, 2048, 4096, 8192, 16384]
    losses_of = {"Optax, the matrix": plain, "linear_cross_entropy": loss}
    shapes = [jax.ShapeDtypeStruct((size, EMBED), jnp.float32) for size in sizes]
    needs = {name: [memory(f, pairs, pairs, scale) for pairs in shapes] for name, f in losses_of.items()}
    for size, matrix, linear in zip(sizes, *needs.values(), strict=True):
        print(f"batch {size}: {matrix:.1f} MiB with the matrix, {linear:.1f} MiB without")
    x, y = encoders(jnp.asarray(images[:1024]))
    value, off, need = on_eight_devices(x, y, scale)
    print(f"eight devices: loss {value:.5f}, on one {float(loss(x, y, scale)):.5f}; each needs {need:.2f} MiB;")
    print(f"gradients differ by {off:.0e} of the largest")
    draw(held_out, retrieved(encoders, held_out), shares, sizes, needs, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
