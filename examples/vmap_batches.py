"""Finds mislabeled digits by per-example gradients and an ensemble: vmap over examples, vmap over networks.

    python examples/vmap_batches.py --members 8 --epochs 40 --out out/vmap_batches.png

Of scikit-learn's handwritten digits, one training label in eight is replaced by a wrong one. Networks of other seeds
and other label smoothings learn from them, all in one compiled call. Then the gradient of each example's own loss is
taken: a wrong label pulls hardest. As many labels as were replaced get weight 0, and the ensemble is trained again.
"""

import argparse
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from softmax_jax import cross_entropy

plt.switch_backend("Agg")
BATCH = 64
GREY, BLUE, RED = "#999999", "#1f6fb4", "#d1492e"


def train(key: Array, smoothing: Array, weights: Array, images: Array, labels: Array, epochs: int) -> eqx.nn.MLP:
    """One network of one hidden layer, all its steps in one `lax.scan`."""
    net_key, order_key = jax.random.split(key)
    arrays, rest = eqx.partition(eqx.nn.MLP(64, 10, width_size=128, depth=1, key=net_key), eqx.is_array)
    optimizer = optax.adam(2e-3)

    def loss(arrays: eqx.nn.MLP, rows: Int[Array, " batch"]) -> Float[Array, ""]:
        logits = jax.vmap(eqx.combine(arrays, rest))(images[rows])
        return cross_entropy(logits, labels[rows], weights=weights[rows], label_smoothing=smoothing)

    def step(carry: tuple[eqx.nn.MLP, optax.OptState], rows: Int[Array, " batch"]):
        arrays, state = carry
        updates, state = optimizer.update(jax.grad(loss)(arrays, rows), state)
        return (eqx.apply_updates(arrays, updates), state), None

    order_keys = jax.random.split(order_key, epochs)
    orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(order_keys, len(labels))
    batches = orders[:, : len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    (arrays, _), _ = jax.lax.scan(step, (arrays, optimizer.init(arrays)), batches)
    return eqx.combine(arrays, rest)


def gradient_norm(net: eqx.nn.MLP, image: Float[Array, " pixels"], label: Int[Array, ""]) -> Float[Array, ""]:
    """How hard one example pulls at the parameters."""
    return optax.tree.norm(eqx.filter_grad(lambda net: cross_entropy(net(image), label))(net))


# The members differ in key and smoothing, and share the data. The norms are [members, examples].
train_ensemble = eqx.filter_jit(eqx.filter_vmap(train, in_axes=(0, 0, None, None, None, None)))
norms_of_examples = eqx.filter_vmap(gradient_norm, in_axes=(None, 0, 0))
norms_of_ensemble = eqx.filter_jit(eqx.filter_vmap(norms_of_examples, in_axes=(eqx.if_array(0), None, None)))


@eqx.filter_jit
def accuracies(ensemble: eqx.nn.MLP, images: np.ndarray, labels: np.ndarray) -> Float[Array, " members+1"]:
    """Of each member; and, last, of the mean of their probabilities."""
    logits = eqx.filter_vmap(lambda net: jax.vmap(net)(images))(ensemble)
    probabilities = jax.nn.softmax(logits)
    probabilities = jnp.concatenate([probabilities, probabilities.mean(0, keepdims=True)])
    return jnp.mean(probabilities.argmax(-1) == labels, axis=-1)


def draw(path, smoothings, first, second, norms, suspects, flipped, images, labels, true_labels) -> None:
    """The gradient norms; accuracy before and after; the digits that pull hardest, and those suspected unjustly."""
    figure = plt.figure(figsize=(9, 8.2), layout="constrained")
    above, *rows = figure.subfigures(3, 1, squeeze=False, height_ratios=[2.6, 1, 1], hspace=0.04)[:, 0]
    norm_axes, accuracy_axes = above.subplots(1, 2, gridspec_kw={"wspace": 0.08})
    bins = np.geomspace(norms.min(), norms.max(), 50).tolist()
    kinds, names = [norms[~flipped], norms[flipped]], ["label as it was", "label replaced"]
    norm_axes.hist(kinds, bins, stacked=True, color=[BLUE, RED], label=names)
    norm_axes.axvspan(norms[suspects].min(), norms.max(), color=RED, alpha=0.12, lw=0, label="suspected")
    norm_axes.set(xscale="log", xlabel="norm of the example's gradient, mean over members", ylabel="training digits")
    norm_axes.set(title="A wrong label pulls hardest", xticks=[1, 2, 5, 10])
    norm_axes.xaxis.set_major_formatter("{x:g}")
    for accuracy, colour, name in [(first, GREY, "all labels"), (second, BLUE, "without suspects")]:
        accuracy_axes.plot(smoothings, 100 * accuracy[:-1], "o-", color=colour, label=f"member, {name}")
        accuracy_axes.axhline(100 * accuracy[-1], color=colour, ls="--", label=f"ensemble, {name}")
    accuracy_axes.set(xlabel="label smoothing of the member", ylabel="held-out digits read right (%)")
    accuracy_axes.set_title("Accuracy of the members and of their mean")
    for axes in (norm_axes, accuracy_axes):
        axes.margins(y=0.25)
        axes.legend(frameon=False, loc="upper center", ncols=2, fontsize=9, handlelength=1.2, columnspacing=1)
        axes.spines[["top", "right"]].set_visible(False)

    unjust = suspects[~flipped[suspects]]
    titles = ["The largest gradients", f"Suspected, but labeled right: {len(unjust)} of {len(suspects)}"]
    for panel, title, examples in zip(rows, titles, [suspects[:10], unjust[:10]], strict=True):
        panel.suptitle(title)
        for place, row in enumerate(examples, start=6 - (len(examples) + 1) // 2):
            axes = panel.add_subplot(1, 10, place, xticks=[], yticks=[])
            axes.imshow(images[row].reshape(8, 8), cmap="gray_r")
            axes.set_title(f"labeled {labels[row]}", fontsize=10, color=RED if flipped[row] else "black")
            axes.set_xlabel(f"is a {true_labels[row]}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/vmap_batches.png"))
    options = parser.parse_args()

    pixels, digits = load_digits(return_X_y=True)
    pixels, digits = np.asarray(pixels, np.float32) / 16, np.asarray(digits, np.int32)
    rows, held_out = train_test_split(np.arange(len(digits)), test_size=0.25, stratify=digits, random_state=0)
    images, true_labels = pixels[rows], digits[rows]

    rng = np.random.default_rng(options.seed)
    flipped = rng.permutation(len(rows)) < len(rows) // 8
    shifts = rng.integers(1, 10, len(rows), dtype=np.int32)
    labels = np.where(flipped, (true_labels + shifts) % 10, true_labels)

    keys = jax.random.split(jax.random.key(options.seed), options.members)
    smoothings = jnp.linspace(0, 0.35, options.members)

    def fit(weights: np.ndarray) -> tuple[eqx.nn.MLP, np.ndarray]:
        print(f"training {options.members} networks together, {np.sum(weights)} digits each", flush=True)
        ensemble = train_ensemble(keys, smoothings, weights, images, labels, options.epochs)
        return ensemble, np.asarray(accuracies(ensemble, pixels[held_out], digits[held_out]))

    ensemble, first = fit(np.ones(len(rows), bool))
    norms = np.asarray(norms_of_ensemble(ensemble, images, labels))
    norms = np.concatenate([norms, norms.mean(0, keepdims=True)])
    suspects = np.argsort(-norms, axis=-1)[:, : flipped.sum()]
    found = flipped[suspects].sum(-1)
    _, second = fit(~np.isin(np.arange(len(rows)), suspects[-1]))

    print("smoothing  accuracy  wrong labels found  accuracy without suspects")
    names = [f"{value:.2f}" for value in smoothings] + ["ensemble"]
    for name, before, count, after in zip(names, first, found, second, strict=True):
        print(f"{name:9}  {before:8.2%}  {count:11} of {flipped.sum()}  {after:25.2%}")
    draw(options.out, smoothings, first, second, norms[-1], suspects[-1], flipped, images, labels, true_labels)
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
