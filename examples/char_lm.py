"""Trains a small language model on the source of Python's standard library: Equinox, Optax, linear_cross_entropy.

    python examples/char_lm.py --loss linear --steps 300 --out out/char_lm.png

The head is the embedding table (tied embeddings). `--loss logits` makes all the logits and hands them to cross_entropy:
the same numbers, several times the memory; what a training step takes with either is printed and drawn.
"""

import argparse
import math
import random
import sysconfig
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from softmax_jax import cross_entropy, linear_cross_entropy

plt.switch_backend("Agg")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3})
WIDTH, HEADS, LAYERS = 128, 4, 2
DOORS = ("linear", "logits")


class LanguageModel(eqx.Module):
    """Token ids to hidden states x; `x @ table.T` would be the logits of the token that comes next."""

    table: Float[Array, "vocabulary width"]
    blocks: list[list[Array]]

    def __init__(self, vocabulary: int, key: Array):
        keys, draw = iter(jax.random.split(key, 1 + 4 * LAYERS)), jax.nn.initializers.lecun_normal()
        self.table = 0.02 * jax.random.normal(next(keys), (vocabulary, WIDTH))
        shapes = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
        self.blocks = [[draw(next(keys), shape) for shape in shapes] for _ in range(LAYERS)]

    def __call__(self, tokens: Int[Array, " length"]) -> Float[Array, "length width"]:
        rotate = jax.vmap(eqx.nn.RotaryPositionalEmbedding(WIDTH // HEADS), in_axes=1, out_axes=1)
        x = jax.nn.standardize(self.table[tokens])
        for look, mix, widen, narrow in self.blocks:  # each token looks at those before it, then is worked on by itself
            heads = (jax.nn.standardize(x) @ look).reshape(len(x), 3, HEADS, WIDTH // HEADS)
            query, key, value = rotate(heads[:, 0]), rotate(heads[:, 1]), heads[:, 2]
            x = x + jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape) @ mix
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ widen) @ narrow
        return jax.nn.standardize(x)


@partial(jax.jit, static_argnames="door")
def loss_of(model: LanguageModel, tokens: Int[Array, "batch length_and_1"], door: str) -> Float[Array, ""]:
    x, labels = jax.vmap(model)(tokens[:, :-1]), tokens[:, 1:]
    if door == "linear":
        return linear_cross_entropy(x, model.table, labels, transpose_weight=True)
    return cross_entropy(x @ model.table.T, labels)


@partial(jax.jit, static_argnames=("optimizer", "door"))
def step(model: LanguageModel, state: optax.OptState, tokens, optimizer: optax.GradientTransformation, door: str):
    loss, gradient = jax.value_and_grad(loss_of)(model, tokens, door)
    updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


@jax.jit
def next_token(model: LanguageModel, page: Int[Array, " length"], at: int, key: Array) -> Int[Array, ""]:
    """A token for page[at], drawn at temperature 0.7."""
    return jax.random.categorical(jax.random.fold_in(key, at), model.table @ model(page)[at - 1] / 0.7)


def read_library(files: int, vocabulary: int) -> tuple[Tokenizer, list[np.ndarray]]:
    """A byte-pair tokenizer made from the standard library; the tokens of its training and of its held-out files."""
    root, skipped = Path(sysconfig.get_path("stdlib")), {"site-packages", "test", "tests", "encodings", "pydoc_data"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    random.Random(0).shuffle(paths)
    texts = [path.read_text("utf-8", "replace") for path in paths[:files]]
    parts = [text for at, text in enumerate(texts) if at % 20], texts[::20]

    tokenizer, bytewise = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise, decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=bytewise.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(parts[0], trainer)
    return tokenizer, [np.array([id for text in tokenizer.encode_batch(part) for id in text.ids]) for part in parts]


def draw(losses: list[float], held_out: dict[int, float], vocabulary: int, memory: dict[str, float], path: Path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), width_ratios=[2.4, 1], layout="constrained")
    (steps, nats), last = zip(*held_out.items(), strict=True), held_out[max(held_out)]
    left.axhline(math.log(vocabulary), color="#666666", ls=":", label=f"a guess among {vocabulary} tokens")
    left.plot(losses, color="#aaaaaa", lw=1.2, label="training, one batch a step")
    left.plot(steps, nats, "o-", color="#1f6fb4", label=f"held out: {last:.2f} nats, perplexity {math.exp(last):.0f}")
    left.set(title="Cross-entropy of the next token", xlabel="step", ylabel="loss (nats per token)")
    left.legend(frameon=False)
    left.grid(axis="y")
    bars = right.bar([f"--loss {door}" for door in memory], list(memory.values()), 0.6, color=["#1f6fb4", "#aaaaaa"])
    right.bar_label(bars, fmt="%.0f MiB", padding=3)
    right.set(title="Temporary memory of one step", yticks=[], frame_on=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=DOORS, default="linear")
    for name, default in {"steps": 300, "batch": 16, "length": 128, "vocabulary": 8192, "files": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/char_lm.png"))
    options = parser.parse_args()

    tokenizer, (training, held_out) = read_library(options.files, options.vocabulary)
    vocabulary, window = tokenizer.get_vocab_size(), np.arange(options.length + 1)
    rows = len(held_out) // (options.batch * len(window)) * options.batch
    tests = held_out[: rows * len(window)].reshape(-1, options.batch, len(window))
    starts = np.random.default_rng(0).integers(len(training) - options.length, size=(options.steps, options.batch, 1))
    model = LanguageModel(vocabulary, jax.random.key(0))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, options.steps // 10, options.steps), b2=0.95)
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    compiled = {door: step.lower(model, state, tests[0], optimizer, door).compile() for door in DOORS}
    memory = {door: compiled[door].memory_analysis().temp_size_in_bytes / 2**20 for door in DOORS}  # pyright: ignore
    losses, tested = [], {}
    for at, start in enumerate(progress := tqdm(starts, unit="token", unit_scale=options.batch * options.length)):
        if at % max(1, options.steps // 6) == 0:
            tested[at] = np.mean([loss_of(model, part, options.loss) for part in tests])
        model, state, loss = compiled[options.loss](model, state, training[start + window])
        losses.append(float(loss))
        progress.set_postfix(loss=f"{loss:.3f}", held_out=f"{tested[max(tested)]:.3f}")
    tested[options.steps] = np.mean([loss_of(model, part, options.loss) for part in tests])

    draw(losses, tested, vocabulary, memory, options.out)
    prompt = tokenizer.encode("\n\nclass ").ids
    page = np.resize(prompt, options.length)  # what is not yet written is not looked at
    for at in range(len(prompt), options.length):
        page[at] = next_token(model, page, at, jax.random.key(1))
    print(tokenizer.decode(page.tolist()))
    print("temporary memory of one step:", *[f"--loss {door} {memory[door]:.1f} MiB" for door in DOORS], sep="  ")
    print(f"training loss: {losses[0]:.4f} -> {np.mean(losses[-10:]):.4f} nats")
    print(f"held-out perplexity: {math.exp(tested[options.steps]):.2f}")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
