"""Losses as Liger and six code bases in JAX define them, and the call that replaces each, for docs/guides/migration.md.

Written from what their functions compute: Flax's examples (lm1b and gemma), MaxText, T5X, EasyLM, Levanter (with
Haliax), big_vision. A head is trained on given hidden states by either; every step's loss and gradients are compared.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import epsilon, few_of
from jax import Array

from softmax_jax import cross_entropy, linear_cross_entropy

BATCH, LENGTH, EMBED, K, STEPS = 3, 6, 8, 12, 20
RATE = 0.75  # of gradient descent on a mean; see the budget below


# Theirs. `labels`, `tokens`: ids, [batch, length]; `weights`, `valid`, `counts`: 0 where a token does not count.


def smoothed(labels: Array, smoothing: float) -> Array:
    """1 - ε for the label, ε / (K-1) for each other class; of an id that is none, all are others."""
    return jnp.where(jax.nn.one_hot(labels, K, dtype=bool), 1 - smoothing, smoothing / (K - 1))


def entropy_of_smoothed(smoothing: float) -> float:
    """The least that the cross-entropy of smoothed labels can be."""
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / (K - 1))


def flax(logits, labels, weights, smoothing):
    """examples/lm1b/train.py, examples/gemma/train.py: the loss, less its least value, divided by the weights."""
    loss = -jnp.sum(smoothed(labels, smoothing) * jax.nn.log_softmax(logits), -1) - entropy_of_smoothed(smoothing)
    return jnp.sum(loss * weights) / jnp.sum(weights)


def flax_accuracy(logits, labels, weights):
    return jnp.sum(jnp.where(jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == labels, weights, 0)) / jnp.sum(
        weights
    )


def gemma(logits, labels, weights, smoothing, softcap):
    """The model's last line caps the logits."""
    return flax(jnp.tanh(logits / softcap) * softcap, labels, weights, smoothing)


def with_z_loss(logits, target, z_loss):
    """T5X's losses.py, copied by MaxText: (loss with the z-loss in it, z-loss), per token."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    beside = z_loss * log_normalizer[..., 0] ** 2
    return beside - jnp.sum(target * (logits - log_normalizer), -1), beside


def maxtext(logits, labels, segments, z_loss):
    """train.py: (loss, z-loss to log)."""
    counted = (segments != 0).astype(jnp.float32)
    mean = lambda loss: jnp.sum(loss * counted) / (jnp.sum(counted) + 1e-8)  # noqa: E731
    loss, beside = with_z_loss(logits, jax.nn.one_hot(labels, K, dtype=jnp.float32), z_loss)
    return mean(loss), mean(beside)


def t5x(logits, labels, weights, smoothing, z_loss, factor=None):
    """losses.py: (loss, z-loss to log), a sum unless there is a loss_normalizing_factor."""
    loss, beside = with_z_loss(logits, smoothed(labels, smoothing), z_loss)
    total = lambda loss: jnp.sum(loss * weights) / (1.0 if factor is None else factor)  # noqa: E731
    return total(loss - entropy_of_smoothed(smoothing)), total(beside)


def t5x_per_sequence(logits, labels, weights, smoothing, z_loss):
    """AVERAGE_PER_SEQUENCE: the mean of each sequence, then of those that have tokens."""
    count = jnp.sum(weights, -1, keepdims=True)
    weights = jnp.where(count > 0, weights / jnp.where(count > 0, count, 1), 0)
    return t5x(logits, labels, weights, smoothing, z_loss, jnp.sum(weights))


def easylm(logits, labels, valid):
    """jax_utils.py: (loss, accuracy), the mean of each sequence, then of all, those without a token too."""
    count = jnp.maximum(jnp.sum(valid, -1), 1e-10)
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    correct = (jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == labels).astype(jnp.float32)
    of_valid = lambda a: jnp.mean(jnp.sum(jnp.where(valid > 0, a, 0), -1) / count)  # noqa: E731
    return -of_valid(log_prob), of_valid(correct)


def levanter(logits, tokens, counts, logsumexp_weight):
    """models/loss.py: (the next token's loss by its one-hot label, log-normalizers); the last position has none."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target = jax.nn.one_hot(jnp.roll(tokens, -1, 1), K, dtype=jnp.float32)
    loss = jnp.sum(target * (log_normalizer - logits), -1) + logsumexp_weight * log_normalizer[..., 0] ** 2
    return jnp.mean(loss, where=counts > 0), log_normalizer[..., 0]


def softmax_xent(logits, labels, axis=-1):
    """big_vision's utils.py, of labels that are a probability for every class."""
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits, axis=axis), axis=axis))


def weighted_softmax_xent(logits, labels, weights, smoothing):
    """Its utils.py, and PaliGemma's train.py: the mean of each sequence, then of all."""
    loss = -jnp.sum(smoothed(labels, smoothing) * jax.nn.log_softmax(logits), -1) * weights
    return jnp.mean(jnp.sum(loss, -1) / jnp.maximum(jnp.sum(weights, -1), 2e-38))


def liger(logits, labels, smoothing, lse_square_scale=0.0, softcap=None, ce_weight=None, ignore_index=-100):
    """Liger's LigerFusedLinearCrossEntropyLoss, as its kernel has it; of its z-loss the class weights know nothing."""
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    counted, log_p = labels != ignore_index, jax.nn.log_softmax(logits)
    c = jnp.ones(K) if ce_weight is None else ce_weight
    of_label = jnp.where(counted, jnp.take(c, jnp.where(counted, labels, 0)), 0)
    loss = -of_label * jnp.take_along_axis(log_p, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    loss = (1 - smoothing) * loss - smoothing / K * jnp.where(counted, log_p @ c, 0)
    z_loss = lse_square_scale * jnp.mean(log_normalizer**2, where=counted)
    return jnp.sum(loss) / jnp.sum(of_label) + z_loss


# Ours, beside them.


class Convention(NamedTuple):
    """Two losses of (logits, x, table): logits = x @ table.T, then in a layout of their own."""

    theirs: Callable
    ours: Callable
    layout: Callable = lambda logits: logits
    rate: float = RATE


def mixed_up(labels: np.ndarray) -> np.ndarray:
    """Probabilities as mixup makes them: of two sequences' labels, 0.7 and 0.3."""
    one_hot = np.eye(K, dtype=np.float32)[labels]
    return np.float32(0.7) * one_hot + np.float32(0.3) * np.roll(one_hot, 1, 0)


def conventions(rng) -> tuple[dict[str, Convention], tuple[Callable, ...]]:
    """(losses, their and our numbers to log): the calls of ours are those of docs/guides/migration.md."""
    labels = tokens = rng.integers(0, K, (BATCH, LENGTH)).astype(np.int32)
    mask = valid = np.float32([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]])  # one sequence is empty
    weights = mask * rng.uniform(0.5, 2, mask.shape).astype(np.float32)
    segments = mask.astype(np.int32)
    counts = np.where(np.arange(LENGTH) < LENGTH - 1, mask, 0)  # mask.at[:, -1].set(0)
    share, share_of_valid = (w / np.maximum(w.sum(-1, keepdims=True), 1e-10) for w in (weights, valid))
    ignoring, ce_weight = np.where(mask > 0, labels, -100), np.linspace(0.5, 1, K, dtype=np.float32)
    pixels = labels.reshape(BATCH, 3, 2)
    nchw = lambda logits: jnp.moveaxis(logits.reshape(BATCH, 3, 2, K), -1, 1)  # noqa: E731
    one_hot = lambda: jax.nn.one_hot(pixels, K, axis=1, dtype=jnp.float32)  # noqa: E731
    mixed = mixed_up(labels)
    smoothing, z_loss, softcap, factor = 0.1, 1e-2, 5.0, labels.size
    constant = entropy_of_smoothed(smoothing)
    losses = {
        "flax lm1b": Convention(
            lambda logits, x, table: flax(logits, labels, weights, smoothing),
            lambda logits, x, table: (
                cross_entropy(logits, labels, weights=weights, label_smoothing=smoothing * K / (K - 1)) - constant
            ),
        ),
        "flax gemma": Convention(
            lambda logits, x, table: gemma(logits, labels, weights, smoothing, softcap),
            lambda logits, x, table: (
                cross_entropy(
                    logits,
                    labels,
                    softcap=softcap,
                    weights=weights,
                    label_smoothing=smoothing * K / (K - 1),
                )
                - constant
            ),
        ),
        "maxtext": Convention(
            lambda logits, x, table: maxtext(logits, labels, segments, z_loss)[0],
            lambda logits, x, table: cross_entropy(logits, labels, weights=segments != 0, z_loss=z_loss),
        ),
        "t5x sum": Convention(
            lambda logits, x, table: t5x(logits, labels, weights, smoothing, z_loss)[0],
            lambda logits, x, table: (
                cross_entropy(
                    logits,
                    labels,
                    weights=weights,
                    label_smoothing=smoothing * K / (K - 1),
                    z_loss=z_loss,
                    reduction="sum",
                )
                - constant * weights.sum()
            ),
            rate=RATE / float(weights.sum()),
        ),
        "t5x normalizing factor": Convention(
            lambda logits, x, table: t5x(logits, labels, weights, smoothing, z_loss, factor)[0],
            lambda logits, x, table: (
                cross_entropy(
                    logits,
                    labels,
                    weights=weights,
                    label_smoothing=smoothing * K / (K - 1),
                    z_loss=z_loss,
                    normalizer=factor,
                )
                - constant * weights.sum() / factor
            ),
            rate=RATE * labels.size / float(weights.sum()),
        ),
        "t5x per sequence": Convention(
            lambda logits, x, table: t5x_per_sequence(logits, labels, weights, smoothing, z_loss)[0],
            lambda logits, x, table: (
                cross_entropy(logits, labels, weights=share, label_smoothing=smoothing * K / (K - 1), z_loss=z_loss)
                - constant
            ),
        ),
        "easylm": Convention(
            lambda logits, x, table: easylm(logits, labels, valid)[0],
            lambda logits, x, table: cross_entropy(logits, labels, weights=share_of_valid, normalizer=labels.shape[0]),
        ),
        "levanter": Convention(
            lambda logits, x, table: levanter(logits, tokens, counts, z_loss)[0],
            lambda logits, x, table: linear_cross_entropy(
                x,
                table,
                jnp.roll(tokens, -1, 1),
                transpose_weight=True,
                weights=counts,
                z_loss=z_loss,
            ),
        ),
        "big_vision mixup": Convention(
            lambda logits, x, table: softmax_xent(logits, mixed),
            lambda logits, x, table: cross_entropy(logits, mixed),
        ),
        "big_vision weighted": Convention(
            lambda logits, x, table: weighted_softmax_xent(logits, labels, weights, smoothing),
            lambda logits, x, table: cross_entropy(
                logits,
                labels,
                weights=share,
                label_smoothing=smoothing * K / (K - 1),
                normalizer=labels.shape[0],
            ),
        ),
        "liger": Convention(
            lambda logits, x, table: liger(logits, ignoring, smoothing, z_loss, softcap),
            lambda logits, x, table: linear_cross_entropy(
                x,
                table,
                ignoring,
                transpose_weight=True,
                ignore_index=-100,
                label_smoothing=smoothing,
                z_loss=z_loss,
                softcap=softcap,
            ),
        ),
        "liger class weights": Convention(
            lambda logits, x, table: liger(logits, ignoring, smoothing, ce_weight=ce_weight),
            lambda logits, x, table: linear_cross_entropy(
                x,
                table,
                ignoring,
                transpose_weight=True,
                ignore_index=-100,
                label_smoothing=smoothing,
                class_weights=ce_weight,
            ),
        ),
        "big_vision NCHW": Convention(
            lambda logits, x, table: softmax_xent(logits, one_hot(), axis=1),
            lambda logits, x, table: cross_entropy(logits, pixels, axis=1),
            layout=nchw,
        ),
    }

    def theirs(logits):
        return {
            "flax accuracy": flax_accuracy(logits, labels, weights),
            "maxtext z-loss": maxtext(logits, labels, segments, z_loss)[1],
            "t5x z-loss": t5x(logits, labels, weights, smoothing, z_loss, factor)[1],
            "easylm accuracy": easylm(logits, labels, valid)[1],
            "levanter log-normalizers": levanter(logits, tokens, counts, z_loss)[1] * mask,
        }

    def ours(logits):
        loss, statistics = cross_entropy(logits, labels, weights=weights, statistics=True)
        return {
            "flax accuracy": jnp.sum(weights, where=statistics.correct) / weights.sum(),
            "maxtext z-loss": z_loss * jnp.sum(mask * statistics.log_normalizer**2) / mask.sum(),
            "t5x z-loss": z_loss * jnp.sum(weights * statistics.log_normalizer**2) / factor,
            "easylm accuracy": jnp.sum(share_of_valid, where=statistics.correct) / labels.shape[0],
            "levanter log-normalizers": statistics.log_normalizer,
        }

    logits = 2 * rng.normal(size=(BATCH, LENGTH, K)) + 3 * np.eye(K)[labels]  # some are right
    logged = tuple(partial(jax.jit(f), np.float32(logits)) for f in (theirs, ours))
    return losses, logged


LOSSES, LOGGED = conventions(np.random.default_rng(0))
BUDGET = 16 * epsilon(np.float32)


def trained(loss, convention, x, table):
    """(trained table, (losses, gradients of x and of the table) of every step)."""

    def step(table, _):
        of_both = lambda x, table: loss(convention.layout(x @ table.T), x, table)  # noqa: E731
        value, (dx, dtable) = jax.value_and_grad(of_both, argnums=(0, 1))(x, table)
        return table - convention.rate * dtable, (value, dx, dtable)

    return jax.device_get(jax.jit(lambda table: jax.lax.scan(step, table, length=STEPS))(table))


# A loss is a sum of differences log_normalizer - z_v, theirs rounded at the size of their terms, which is that of the
# first loss: hence errors are measured by the largest number of the run, also where a constant is subtracted and the
# loss becomes small. Each evaluation rounds about eight times on either side. Two tables that differ by roundings
# are not driven apart: the loss is convex in the table (but for the softcap), its second derivative at most
# |x|² / 2 + what a z-loss of 0.01 adds, |x|² = 4, and so a step of 0.75 < 2 / 2.3 brings them no further apart. What
# twenty steps add is a walk of twenty roundings of either sign, of about five: 8 + 5 < 16. Found are 4 at most.


@pytest.mark.parametrize("name", few_of(list(LOSSES), 2))
def test_twenty_steps_of_gradient_descent_are_the_same(name):
    rng, convention = np.random.default_rng(1), LOSSES[name]
    x, table = (rng.normal(size=s).astype(np.float32) for s in ((BATCH, LENGTH, EMBED), (K, EMBED)))
    x *= 2 / np.linalg.norm(x, axis=-1, keepdims=True)
    want_table, (want, *want_gradients) = trained(convention.theirs, convention, x, table)
    got_table, (got, *got_gradients) = trained(convention.ours, convention, x, table)
    assert want[-1] < 0.6 * want[0]
    for theirs, ours in zip((want_table, want, *want_gradients), (got_table, got, *got_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=BUDGET * np.max(abs(theirs)))


def test_numbers_to_log_are_the_same():
    """Accuracy, z-loss and log-normalizers, from the pass that makes the loss."""
    want, got = jax.device_get([numbers() for numbers in LOGGED])
    assert 0 < want["flax accuracy"] < 1 and 0 < want["easylm accuracy"] < 1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=BUDGET), got, want)


@pytest.mark.nan
def test_what_differs_on_purpose():
    """An id that is no class, no token that counts, a class of logit -inf."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(BATCH, LENGTH, K)).astype(np.float32)
    hidden = np.where(np.arange(K) == K - 1, -np.inf, logits).astype(np.float32)
    labels = rng.integers(0, K - 1, (BATCH, LENGTH)).astype(np.int32)
    stray, last, counts = labels.copy(), labels.copy(), np.ones((BATCH, LENGTH), np.float32)
    stray[0, 0], last[0, 0] = -1, K - 1
    but_one, none = counts.copy(), 0 * counts
    but_one[0, 0] = 0
    vocabulary = K - 1

    def theirs():
        return {
            "stray": [
                flax(logits, stray, counts, 0.1),
                maxtext(logits, stray, counts, 0.0)[0] * counts.size - maxtext(logits, labels, but_one, 0.0)[0] * 17,
                easylm(logits, stray, counts)[0] - easylm(logits, last, counts)[0],
            ],
            "without": maxtext(logits, labels, but_one, 0.0)[0],
            "none is NaN": [flax(logits, labels, none, 0.1), t5x(logits, labels, none, 0.1, 0.0, 0.0)[0]],
            "none is 0": [maxtext(logits, labels, none, 0.0)[0], easylm(logits, labels, none)[0]],
            "hidden is not finite": [flax(hidden, labels, counts, 0.1), softmax_xent(hidden, mixed_up(labels))],
            "hidden": easylm(logits[..., :-1], labels, counts)[0],
        }

    def ours():
        return {
            "stray is NaN": cross_entropy(logits, jnp.asarray(stray)),
            "without": cross_entropy(logits, stray, ignore_index=-1),
            "none is 0": cross_entropy(logits, labels, weights=none),
            "hidden": [cross_entropy(hidden, labels), cross_entropy(logits, labels, where=jnp.arange(K) < vocabulary)],
        }

    theirs, ours = jax.device_get((jax.jit(theirs)(), jax.jit(ours)()))
    assert np.all(np.isfinite(theirs["stray"])) and np.isnan(ours["stray is NaN"])
    # MaxText counts it with a loss of 0; to EasyLM it is the last class.
    np.testing.assert_allclose(theirs["stray"][1:], 0, atol=1e-4)
    assert np.all(np.isnan(theirs["none is NaN"])) and not np.any(theirs["none is 0"]) and ours["none is 0"] == 0
    assert not np.any(np.isfinite(theirs["hidden is not finite"]))
    np.testing.assert_allclose(ours["without"], theirs["without"], rtol=BUDGET)
    np.testing.assert_allclose(ours["hidden"], theirs["hidden"], rtol=BUDGET)
