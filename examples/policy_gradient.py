"""Policy gradients with and without an entropy bonus, on sequences sampled from a small language model.

    python examples/policy_gradient.py --updates 70 --out out/policy_gradient.png

The model is rewarded for every token that is larger than the one before it: a guess is right half of the time, and a
good policy climbs slowly. Its loss needs the log-probability of each sampled token and the entropy of each prediction:
`linear_label_statistics` has both, and their gradients, and holds few of the logits at a time. At the end, without the
bonus, about 20 of 128 sampled sequences are distinct; with it all are, at nearly the same reward.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from softmax_jax import LabelStatistics, label_statistics, linear_label_statistics

plt.switch_backend("Agg")
TOKENS, EMBED, LENGTH, SEQUENCES = 1024, 64, 16, 128
CLIP, EPOCHS = 0.2, 2
COLOURS = "#d98c21", "#1f6fb4"  # without the bonus, with it
OPTIMIZER = optax.adam(1e-2)


class Policy(NamedTuple):
    """The next token, from the one before it and the place in the sequence."""

    embedding: Float[Array, "tokens embed"]
    place: Float[Array, "length embed"]
    hidden: Float[Array, "embed embed"]
    head: Float[Array, "embed tokens"]


def initial(rng: np.random.Generator) -> Policy:
    shapes = (TOKENS, EMBED), (LENGTH, EMBED), (EMBED, EMBED), (EMBED, TOKENS)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    # Neighbouring tokens begin with like embeddings: waves along the vocabulary.
    waves = np.sin(np.outer(np.linspace(0, 1, TOKENS), np.pi * np.arange(1, EMBED + 1)))
    scales = 1, 0.1, EMBED**-0.5, 0.1 * EMBED**-0.5
    return Policy(*(scale * a for scale, a in zip(scales, [jnp.float32(waves), *arrays[1:]], strict=True)))


def states(policy: Policy, before: Int[Array, "*batch length"]) -> Float[Array, "*batch length embed"]:
    return jax.nn.tanh((policy.embedding[before] + policy.place) @ policy.hidden)


@jax.jit
def sampled(policy: Policy, key: Array) -> Int[Array, "sequences length_and_1"]:
    """Sequences that begin at token 0."""

    def draw(before, inputs):
        place, key = inputs
        state = jax.nn.tanh((policy.embedding[before] + place) @ policy.hidden)
        after = jax.random.categorical(key, state @ policy.head)
        return after, after

    start = jnp.zeros(SEQUENCES, jnp.int32)
    _, tokens = jax.lax.scan(draw, start, (policy.place, jax.random.split(key, LENGTH)))
    return jnp.concatenate([start[:, None], tokens.T], 1)


def linear(policy: Policy, tokens: Array) -> LabelStatistics:
    return linear_label_statistics(states(policy, tokens[:, :-1]), policy.head, tokens[:, 1:], chunk_size=256)


def plain(policy: Policy, tokens: Array) -> LabelStatistics:
    return label_statistics(states(policy, tokens[:, :-1]) @ policy.head, tokens[:, 1:])


def loss(policy: Policy, tokens: Array, old_log_prob: Array, advantage: Array, bonus: float, statistics=linear):
    """-min(ratio · advantage, clipped ratio · advantage) - bonus · entropy (Schulman et al., 2017), and the entropy."""
    found = statistics(policy, tokens)
    ratio = jnp.exp(found.log_prob - old_log_prob)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    return -jnp.mean(gain + bonus * found.entropy), jnp.mean(found.entropy)


@partial(jax.jit, static_argnames="statistics")
def step(policy: Policy, state: optax.OptState, tokens, old_log_prob, advantage, bonus, statistics=linear):
    gradient, entropy = jax.grad(loss, has_aux=True)(policy, tokens, old_log_prob, advantage, bonus, statistics)
    updates, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(policy, updates), state, entropy


@jax.jit
def judged(policy: Policy, tokens: Array) -> tuple[Array, Array, Array]:
    """(log-probabilities as sampled, advantages: the rewards to come less their mean, the mean reward)."""
    rewards = (tokens[:, 1:] > tokens[:, :-1]).astype(jnp.float32)
    to_come = jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    return linear(policy, tokens).log_prob, to_come - to_come.mean(0), rewards.mean()


def trained(bonus: float, updates: int) -> tuple[np.ndarray, np.ndarray]:
    """Reward, entropy and number of distinct sequences of each update; the sequences of the last one."""
    policy, key, history = initial(np.random.default_rng(0)), jax.random.key(0), []
    state, tokens = OPTIMIZER.init(policy), jnp.zeros(())
    for update in range(updates):
        tokens = sampled(policy, jax.random.fold_in(key, update))
        old_log_prob, advantage, reward = judged(policy, tokens)
        for _ in range(EPOCHS):
            policy, state, entropy = step(policy, state, tokens, old_log_prob, advantage, bonus)
        history.append([float(reward), float(entropy), len(np.unique(tokens, axis=0))])
        if update % 10 == 9:
            print(
                f"bonus {bonus:g}: update {update + 1} of {updates}, reward {reward:.1%}, entropy {entropy:.2f}",
                flush=True,
            )
    return np.array(history), np.asarray(tokens)


def megabytes(statistics) -> float:
    """What one compiled step needs beside its operands and results."""
    policy, tokens = initial(np.random.default_rng(0)), jnp.zeros((SEQUENCES, LENGTH + 1), jnp.int32)
    numbers = jnp.zeros((SEQUENCES, LENGTH))
    arguments = policy, OPTIMIZER.init(policy), tokens, numbers, numbers, 0.0
    memory = step.lower(*arguments, statistics=statistics).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**20 if memory else float("nan")


def draw(runs: dict[float, tuple[np.ndarray, np.ndarray]], memory: dict[str, float], path: Path) -> None:
    figure, axes = plt.subplots(3, 2, figsize=(8.5, 9), layout="constrained")
    *over_time, of_memory = axes[:2].flat
    titles = "Tokens larger than the one before", "Entropy of a prediction", f"Distinct sequences among {SEQUENCES}"
    units, scales = ("rewarded tokens (%)", "entropy (nats)", "sequences"), (100, 1, 1)
    for (bonus, (history, tokens)), colour, below in zip(runs.items(), COLOURS, axes[2], strict=False):
        name = f"bonus {bonus:g}" if bonus else "no bonus"
        for ax, values, scale in zip(over_time, history.T, scales, strict=True):
            ax.plot(scale * values, color=colour, lw=2, label=f"{name}: {scale * values[-1]:.3g}")
        below.plot(tokens[:12].T, color=colour, alpha=0.6)
        below.set(title=f"Twelve sequences at the end, {name}", xticks=range(0, LENGTH + 1, 4))
        below.set(xlabel="place in the sequence", ylabel="token")
    for ax, title, unit in zip(over_time, titles, units, strict=True):
        ax.set(title=title, xlabel="update", ylabel=unit, ylim=(0, None))
        ax.legend(frameon=False, loc="lower left", title="at the end", alignment="left")
    bars = of_memory.bar(list(memory), list(memory.values()), color=["#999999", COLOURS[1]], width=0.5)
    of_memory.bar_label(bars, fmt="%.1f MiB", padding=3)
    of_memory.margins(x=0.15, y=0.1)
    of_memory.set(title="Temporary memory of one step", yticks=[], frame_on=False)
    for ax in (*over_time, *axes[2]):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=70)
    parser.add_argument("--bonus", type=float, default=0.03, help="of the second run; the first has none")
    parser.add_argument("--out", type=Path, default=Path("out/policy_gradient.png"))
    options = parser.parse_args()

    runs = {bonus: trained(bonus, options.updates) for bonus in (0.0, options.bonus)}
    memory = {"label_statistics\nof all logits": megabytes(plain), "linear_label_statistics": megabytes(linear)}
    draw(runs, memory, options.out)
    for bonus, (history, _) in runs.items():
        (before, *_), (reward, entropy, distinct) = history[0], history[-1]
        print(f"bonus {bonus:g}: reward {before:.1%} -> {reward:.1%}, entropy {entropy:.2f} nats,", end=" ")
        print(f"{distinct:.0f} distinct sequences of {SEQUENCES}")
    logits, few = memory.values()
    print(f"temporary memory of a step: {logits:.1f} MiB with logits, {few:.1f} MiB without")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
