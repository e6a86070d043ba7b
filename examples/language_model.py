"""Trains a small language model on this repository's own pages and source: Equinox, Optax, linear_cross_entropy.

    python examples/language_model.py --steps 120 --out out/language_model.png

Tokens are byte pairs; the head is the embedding table (tied embeddings). The same model is trained on the same batches
with `linear_cross_entropy`, which holds few of the logits at a time, and with Optax's loss of all of them. The losses
agree up to rounding; the memory of a training step does not: beside 2048 tokens' logits of 8192 classes the model is
small, as it is in a real one. `--losses linear logits optax` adds `cross_entropy`, `--text DIR ...` reads other files.
"""

import argparse
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from softmax_jax import cross_entropy, linear_cross_entropy

plt.switch_backend("Agg")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3})
WIDTH, HEADS, LAYERS, CHUNK = 64, 2, 2, 128  # CHUNK: tokens whose logits are held at a time
SHIPPED = [Path(__file__).parents[1] / name for name in ("docs", "softmax_jax", "tests", "benchmarks", "examples")]
LOSSES = {
    "linear": ("linear_cross_entropy", "#1f6fb4", 1.4),
    "logits": ("cross_entropy of all logits", "#2d8a4e", 3),
    "optax": ("Optax's loss of all logits", "#f0b968", 5),
}


class LanguageModel(eqx.Module):
    """Token ids to hidden states x; `x @ table.T` would be the logits of the token that comes next."""

    table: Float[Array, "vocabulary width"]
    blocks: list[list[Array]]

    def __init__(self, vocabulary: int, rng: np.random.Generator):
        def normal(scale: float, *shape: int) -> Array:
            return jnp.asarray(rng.normal(scale=scale, size=shape), jnp.float32)

        self.table = normal(0.02, vocabulary, WIDTH)
        shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
        self.blocks = [[normal(shape[0] ** -0.5, *shape) for shape in shapes] for _ in range(LAYERS)]

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, "length width"]:
        x = jax.nn.standardize(self.table[tokens])
        for block in self.blocks:
            x = self.through(block, x)
        return jax.nn.standardize(x)

    @staticmethod
    @jax.checkpoint  # a block's inner arrays are computed again for its gradient, not kept
    def through(block: list[Array], x: Float[Array, "length width"]) -> Float[Array, "length width"]:
        """Each token looks at those before it, then is worked on by itself."""
        look, mix, widen, narrow = block
        rotate = jax.vmap(eqx.nn.RotaryPositionalEmbedding(WIDTH // HEADS), in_axes=1, out_axes=1)
        heads = (jax.nn.standardize(x) @ look).reshape(len(x), 3, HEADS, WIDTH // HEADS)
        query, key, value = rotate(heads[:, 0]), rotate(heads[:, 1]), heads[:, 2]
        x = x + jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape) @ mix
        return x + jax.nn.gelu(jax.nn.standardize(x) @ widen) @ narrow


@partial(jax.jit, static_argnames="loss")
def loss_of(model: LanguageModel, tokens: Int[Array, "batch length_and_1"], loss: str) -> Float[Array, ""]:
    x, labels = jax.vmap(model)(tokens[:, :-1]), tokens[:, 1:]
    if loss == "linear":
        return linear_cross_entropy(x, model.table, labels, transpose_weight=True, chunk_size=CHUNK)
    logits = x @ model.table.T
    if loss == "logits":
        return cross_entropy(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@partial(jax.jit, static_argnames=("optimizer", "loss"))
def step(model: LanguageModel, state: optax.OptState, tokens, optimizer: optax.GradientTransformation, loss: str):
    value, gradient = jax.value_and_grad(loss_of)(model, tokens, loss)
    updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, value


def read_text(folders: Sequence[Path], vocabulary: int) -> tuple[Tokenizer, list[np.ndarray]]:
    """A byte-pair tokenizer of all `.md` and `.py` files; the tokens of those to train on and of each twentieth."""
    paths = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".md", ".py"})
    random.Random(0).shuffle(paths)
    texts = [path.read_text("utf-8", "replace") for path in paths]
    parts = [text for at, text in enumerate(texts) if at % 20], texts[::20]

    tokenizer, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = bytewise  # pyright: ignore
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=bytewise.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(parts[0], trainer)
    ids = [np.array([id for text in tokenizer.encode_batch(part) for id in text.ids], np.int32) for part in parts]
    print(f"{len(paths)} files, {sum(map(len, ids))} tokens of {tokenizer.get_vocab_size()} byte pairs", flush=True)
    return tokenizer, ids


def train(loss: str, vocabulary: int, batches: np.ndarray, held_out: np.ndarray):
    """Each step's loss, the loss of held-out text along the way, and MiB of a step's temporary memory."""
    model, steps = LanguageModel(vocabulary, np.random.default_rng(0)), len(batches)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 5e-3, steps // 10, steps), b2=0.95)
    state, losses, tested = optimizer.init(eqx.filter(model, eqx.is_array)), [], {}
    compiled = step.lower(model, state, batches[0], optimizer, loss).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20  # pyright: ignore
    for at, tokens in enumerate(batches):
        if loss == "linear" and at % max(1, steps // 4) == 0:
            tested[at] = np.mean([loss_of(model, part, loss) for part in held_out])
        model, state, value = compiled(model, state, tokens)
        losses.append(float(value))
        if at % 20 == 19:
            print(f"{LOSSES[loss][0]}: step {at + 1} of {steps}, training loss {value:.3f}", flush=True)
    tested[steps] = np.mean([loss_of(model, part, loss) for part in held_out])
    return np.array(losses), tested, memory


def draw(runs: dict, off: float, vocabulary: int, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 5.2), width_ratios=[2, 1], layout="constrained")
    left.axhline(math.log(vocabulary), color="#666666", ls=":", label=f"a guess among {vocabulary} tokens")
    for loss in reversed(runs):  # the first one on top of the others
        name, colour, width = LOSSES[loss]
        left.plot(runs[loss][0], color=colour, lw=width, label=f"training, {name}")
    (steps, nats), last = zip(*runs["linear"][1].items(), strict=True), runs["linear"][1][len(runs["linear"][0])]
    left.plot(steps, nats, "ko", ms=5, label=f"held out: {last:.2f} nats, perplexity {math.exp(last):.0f}")
    left.set(title=f"Loss of the next token: equal up to {off:.0e} of itself")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend(frameon=False)
    left.grid(axis="y")
    names = [LOSSES[loss][0].replace("_c", "_\nc").replace(" of", "\nof") for loss in runs]
    bars = right.bar(names, [run[2] for run in runs.values()], 0.6, color=[LOSSES[loss][1] for loss in runs])
    right.bar_label(bars, fmt="%.0f MiB", padding=3)
    right.set(title="Memory of a step", yticks=[], frame_on=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["linear", "optax"], help="linear is added")
    for name, default in {"steps": 120, "batch": 32, "length": 64, "vocabulary": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--text", nargs="+", type=Path, default=SHIPPED, help="folders of .md and .py files")
    parser.add_argument("--out", type=Path, default=Path("out/language_model.png"))
    options = parser.parse_args()

    tokenizer, (training, held_out) = read_text(options.text, options.vocabulary)
    vocabulary, window = tokenizer.get_vocab_size(), np.arange(options.length + 1)
    parts = min(8, len(held_out) // (options.batch * len(window)))
    tests = held_out[: parts * options.batch * len(window)].reshape(parts, options.batch, len(window))
    starts = np.random.default_rng(0).integers(len(training) - options.length, size=(options.steps, options.batch, 1))
    losses = sorted({"linear", *options.losses})
    runs = {loss: train(loss, vocabulary, training[starts + window], tests) for loss in losses}
    history = runs["linear"][0]
    off = max(np.abs(run[0] / history - 1).max() for run in runs.values())

    draw(runs, off, vocabulary, options.out)
    for loss, (values, ends, memory) in runs.items():
        print(f"{LOSSES[loss][0]}: training loss: {values[0]:.4f} -> {values[-10:].mean():.4f} nats, ", end="")
        print(f"held-out perplexity {math.exp(ends[options.steps]):.2f}, temporary memory of a step {memory:.1f} MiB")
    print(f"the losses differ by {off:.0e} of themselves at most")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
