"""A clipped policy-gradient step with an entropy bonus, on sequences sampled from a small language model.

    python examples/policy_gradient.py --updates 60 --out out/policy_gradient.png

The model is rewarded for every token that is larger than the one before it: a guess is right half of the time, and a
good policy climbs slowly. Its loss needs the log-probability of each sampled token and the entropy of each prediction:
`linear_label_statistics` has both, and their gradients, without the logits.
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
from tqdm import tqdm

from softmax_jax import LabelStatistics, label_statistics, linear_label_statistics

plt.switch_backend("Agg")
TOKENS, EMBED, LENGTH, SEQUENCES = 4096, 64, 16, 128
CLIP, BONUS, EPOCHS = 0.2, 3e-3, 4
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


def loss(policy: Policy, tokens: Array, old_log_prob: Array, advantage: Array, statistics=linear):
    """-min(ratio · advantage, clipped ratio · advantage) - bonus · entropy (Schulman et al., 2017), and the entropy."""
    found = statistics(policy, tokens)
    ratio = jnp.exp(found.log_prob - old_log_prob)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage)
    return -jnp.mean(gain + BONUS * found.entropy), jnp.mean(found.entropy)


@partial(jax.jit, static_argnames="statistics")
def step(policy: Policy, state: optax.OptState, tokens, old_log_prob, advantage, statistics=linear):
    gradient, entropy = jax.grad(loss, has_aux=True)(policy, tokens, old_log_prob, advantage, statistics)
    updates, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(policy, updates), state, entropy


@jax.jit
def judged(policy: Policy, tokens: Array) -> tuple[Array, Array, Array]:
    """(log-probabilities as sampled, advantages, the mean reward)."""
    rewards = (tokens[:, 1:] > tokens[:, :-1]).astype(jnp.float32)
    to_come = jnp.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    advantage = to_come - to_come.mean(0)
    return linear(policy, tokens).log_prob, advantage / (advantage.std() + 1e-6), rewards.mean()


def megabytes(policy: Policy, statistics) -> float:
    """What one compiled step needs beside its operands and results."""
    tokens = jnp.zeros((SEQUENCES, LENGTH + 1), jnp.int32)
    numbers = jnp.zeros((SEQUENCES, LENGTH))
    arguments = policy, OPTIMIZER.init(policy), tokens, numbers, numbers
    memory = step.lower(*arguments, statistics=statistics).compile().memory_analysis()
    return memory.temp_size_in_bytes / 2**20 if memory else float("nan")


def draw(history: np.ndarray, memory: dict[str, float], tokens: np.ndarray, path: Path) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(14, 5.6), layout="constrained", width_ratios=[3, 3, 3, 2])
    rewards, entropies = history.T
    axes[0].plot(100 * rewards, color="#1f6fb4", lw=2)
    axes[0].set(title="Tokens larger than the one before (%)", xlabel="update", ylim=(0, 102))
    axes[1].plot(entropies, color="#d98c21", lw=2)
    axes[1].set(title="Entropy of a prediction (nats)", xlabel="update", ylim=(0, None))
    axes[2].plot(tokens[:12].T, color="#1f6fb4", alpha=0.6)
    axes[2].set(title="Twelve sequences at the end", xlabel="place", ylabel="token")
    axes[3].bar(list(memory), list(memory.values()), color=["#999999", "#1f6fb4"], width=0.6)
    axes[3].set(title="A step's memory (MiB)")
    for a in axes:
        a.grid(alpha=0.3)
        a.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/policy_gradient.png"))
    options = parser.parse_args()

    policy, key, history = initial(np.random.default_rng(0)), jax.random.key(0), []
    state = OPTIMIZER.init(policy)
    progress = tqdm(range(options.updates), unit="update")
    for update in progress:
        tokens = sampled(policy, jax.random.fold_in(key, update))
        old_log_prob, advantage, reward = judged(policy, tokens)
        for _ in range(EPOCHS):
            policy, state, entropy = step(policy, state, tokens, old_log_prob, advantage)
        history.append([float(reward), float(entropy)])
        progress.set_postfix(reward=f"{reward:.1%}", entropy=f"{entropy:.2f}")
    memory = {"logits": megabytes(policy, plain), "linear": megabytes(policy, linear)}
    draw(np.array(history), memory, np.asarray(tokens), options.out)
    print(f"reward: {history[0][0]:.1%} -> {history[-1][0]:.1%}; entropy: {history[-1][1]:.2f} nats")
    print(f"temporary memory of a step: {memory['logits']:.1f} MiB with logits, {memory['linear']:.1f} MiB without")
    print(f"picture: {options.out}")


if __name__ == "__main__":
    main()
