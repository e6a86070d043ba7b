"""docs/guides/own_losses.md: its code as it stands there, each loss and gradient against NumPy in float64."""

import re
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import at_margins, epsilon, relative_error

PAGE = (Path(__file__).parents[2] / "docs/guides/own_losses.md").read_text()
OWN: dict[str, Any] = {}
for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
    exec(block, OWN)

MARGINS, CLASSES, HIDDEN = np.linspace(-30, 60, 91), 11, 5
EPS, SMALLEST = epsilon(jnp.float32), 1e-30


class Token(NamedTuple):
    """What softmax says of a label, in float64, with no difference of close numbers: S = Σ_{v≠y} exp(z_v - z_y),
    p_y = 1/(1+S), 1 - p_y = S/(1+S), -log p_y = log1p(S)."""

    probs: np.ndarray
    label: np.ndarray
    p: np.ndarray
    miss: np.ndarray
    nll: np.ndarray
    log_probs: np.ndarray

    def slope(self, dlog_prob):
        """dlog_prob · ∂(log p_y)/∂z: 1 - p_y at the label, -p_v elsewhere."""
        return dlog_prob[..., None] * np.where(self.label, self.miss[..., None], -self.probs)


def token(logits, labels) -> Token:
    logits = np.asarray(logits, np.float64)
    label = np.arange(logits.shape[-1]) == labels[..., None]
    above = logits - np.sum(logits, -1, where=label)[..., None]
    others = np.exp(above).sum(-1, where=~label)
    nll = np.log1p(others)
    log_probs = above - nll[..., None]
    return Token(np.exp(log_probs), label, 1 / (1 + others), others / (1 + others), nll, log_probs)


# Each returns (loss, ∂loss/∂logits for a cotangent of 1, and the sizes of the terms that these are sums of).


def focal(logits, labels, gamma=2):
    t = token(logits, labels)
    loss = t.miss**gamma * t.nll
    grad = t.slope(-(t.miss**gamma) - gamma * t.miss ** (gamma - 1) * t.p * t.nll)
    return loss, grad, loss, abs(grad)


def confidence_penalty(logits, labels, beta=0.1):
    t = token(logits, labels)
    entropy = -np.sum(t.probs * t.log_probs, -1)
    dentropy = -t.probs * (t.log_probs + entropy[..., None])
    nll_grad = t.slope(-np.ones_like(t.p))
    sizes = abs(nll_grad) + beta * t.probs * (abs(t.log_probs) + entropy[..., None])
    return t.nll - beta * entropy, nll_grad - beta * dentropy, t.nll + beta * entropy, sizes


def unlikelihood(logits, labels):
    t = token(logits, labels)
    loss, grad = np.log1p(t.p / t.miss), t.slope(t.p / t.miss)
    return loss, grad, loss, abs(grad)


def clipped_ratio(logits, actions, behaviour_log_prob, advantage, mask, clip=0.2):
    t = token(logits, actions)
    ratio = np.exp(np.where(mask, -t.nll - behaviour_log_prob, 0))
    clipped = np.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    bound = np.where(advantage > 0, 1 + clip, 1 - clip)
    loss = np.where(mask, -advantage * np.where(clipped, bound, ratio), 0)
    grad = t.slope(np.where(mask & ~clipped, -advantage * ratio, 0))
    return loss, grad, abs(loss), abs(grad)


def dpo(logits, tokens, mask, reference_log_prob, beta=0.1):
    t = token(logits, tokens)
    gains = np.where(mask, -t.nll - reference_log_prob, 0).sum(-1)
    h = beta * (gains[0] - gains[1])
    dgain = -beta / (1 + np.exp(h)) * np.array([[1.0], [-1.0]])
    grad = t.slope(mask * dgain[..., None])
    loss = np.logaddexp(0, -h)
    return loss, grad, loss, abs(grad)


TRUTH = {f.__name__: f for f in (focal, confidence_penalty, unlikelihood, clipped_ratio, dpo)}
HALF = {"gamma": 0.5}
PER_TOKEN = [("focal", {"gamma": 2}), ("focal", HALF), ("confidence_penalty", {}), ("unlikelihood", {})]


def within(got, want, size, budget, what):
    """Relative to the sum of its terms' sizes, where that is a number that float32 can hold with all its digits."""
    error = np.where(abs(size) >= SMALLEST, abs(np.float64(got) - want) / np.maximum(abs(size), SMALLEST), 0)
    excess = error / budget
    assert np.all(excess <= 1), f"{what}: {error.max():.2g}, {excess.max():.2g} x the budget"


# The argument of the exponential that matters is about the margin m, up to 6 more for a class that is not the largest;
# rounded to float32 it is off by eps/2 · (|m| + 6), and so, relatively, are p_v, 1 - p and log p. (m = 60: 4e-6.)
# exp, expm1, log1p and the arithmetic add a few eps. A product of n such factors, γ + 1 of 1 - p and log p in the focal
# loss, has n times that: 1e-5 at most where a number is large enough to be compared. Measured: 0.5 of it.
def budget_of(margins, factors=1.0):
    return factors * EPS * (abs(margins) / 2 + 6)


def factors_of(options):
    """γ + 1 in focal and its gradient; the gradient of unlikelihood is a quotient of two."""
    return options.get("gamma", 1) + 1


def with_gradient(loss):
    """f(operands, weights, others): (the gradients of Σ weights · loss by the operands, the losses)."""

    def weighted(operands, weights, others):
        losses = loss(*operands, *others)
        return jnp.sum(weights * losses), losses

    return jax.grad(weighted, has_aux=True)


def all_of(prefix, every):
    """The same of several losses of the page, in one program."""
    programs = [with_gradient(partial(OWN[prefix + name], **options)) for name, options in every]
    return jax.jit(lambda *arguments: [program(*arguments) for program in programs])


@cache
def in_logits():
    """(logits, labels, weights, what the page's losses of logits give for them): one program for two tests."""
    rng = np.random.default_rng(0)
    logits, labels = at_margins(rng, MARGINS, classes=CLASSES)
    weights = rng.normal(size=len(labels)).astype(np.float32)
    return logits, labels, weights, all_of("", PER_TOKEN)((logits,), weights, (labels,))


@pytest.mark.optimized
def test_logits():
    logits, labels, weights, found = in_logits()
    for ((grad,), losses), (name, options) in zip(found, PER_TOKEN, strict=True):
        want, dlogits, size, dsize = TRUTH[name](logits, labels, **options)
        budget = budget_of(MARGINS, factors_of(options))
        within(losses, want, size, budget, name)
        within(grad, weights[:, None] * dlogits, abs(weights[:, None]) * dsize, budget[:, None], f"gradient of {name}")


def head_of(rng, logits):
    """(x, head, x @ head): logits rounded to eighths, which this product gives exactly in float32 and in any order."""
    others = rng.integers(-3, 4, (HIDDEN, CLASSES))
    hidden = rng.integers(-8, 9, (*logits.shape[:-1], HIDDEN)) / 8
    x = np.concatenate([np.round(8 * (logits - hidden @ others)) / 8, hidden], -1)
    head = np.concatenate([np.eye(CLASSES), others])
    return x.astype(np.float32), head.astype(np.float32), x @ head


def check_head(gradients, x, head, dlogits, dsize, budget):
    """dx = dlogits headᵀ, dhead = xᵀ dlogits: as exact as the sizes of their terms."""
    x, head = (np.float64(a).reshape(-1, a.shape[-1]) for a in (x, head))
    dlogits, dsize = (a.reshape(-1, CLASSES) for a in (dlogits, dsize))
    dx, dhead = gradients
    budget = np.ravel(budget)
    within(dx.reshape(x.shape), dlogits @ head.T, dsize @ abs(head).T, budget[:, None], "dx")
    within(dhead, x.T @ dlogits, abs(x).T @ dsize, budget.max(), "dhead")


def tail_of(margins):
    """Of every margin, and of margins of 20 alone: the sum over tokens that dhead is shows nothing of the tail else."""
    return [margins, np.full_like(margins, 20)]


@pytest.mark.thorough
def test_linear(rng):
    every = [PER_TOKEN[0], *PER_TOKEN[2:]]
    program = all_of("linear_", every)
    for margins in tail_of(MARGINS):
        logits, labels = at_margins(rng, margins, np.float64, classes=CLASSES)
        x, head, logits = head_of(rng, logits)
        weights = rng.normal(size=len(labels)).astype(np.float32)
        found = program((x, head), weights, (labels,))
        for (gradients, losses), (name, options) in zip(found, every, strict=True):
            want, dlogits, size, dsize = TRUTH[name](logits, labels, **options)
            budget = budget_of(margins, factors_of(options))
            within(losses, want, size, budget, name)
            dlogits, dsize = weights[:, None] * dlogits, abs(weights[:, None]) * dsize
            check_head(gradients, x, head, dlogits, dsize, budget)


@pytest.mark.nan
def test_clipped_ratio(rng):
    """Ratios on both sides of both bounds; what the mask hides is NaN and adds 0."""
    program = jax.jit(with_gradient(OWN["clipped_ratio"]))
    for margins in tail_of(MARGINS[:90]):
        logits, actions = at_margins(rng, margins, np.float64, classes=CLASSES)
        x, head, logits = head_of(rng, logits)
        behaviour = (-token(logits, actions).nll + rng.normal(size=90) / 4).astype(np.float32)
        advantage, weights = rng.normal(size=(2, 90)).astype(np.float32)
        mask = rng.random(90) < 0.8
        want, dlogits, size, dsize = clipped_ratio(logits, actions, behaviour, advantage, mask)
        hidden = tuple(np.where(mask, a, np.float32(np.nan)) for a in (behaviour, advantage))
        masked_x = np.where(mask[:, None], x, np.float32(np.nan))
        shaped = [a.reshape(9, 10, *a.shape[1:]) for a in (masked_x, weights, actions, *hidden, mask)]
        (dx, dhead), losses = program((shaped[0], head), shaped[1], tuple(shaped[2:]))
        assert not np.any(np.asarray(losses)[~shaped[-1]]) and not np.any(np.asarray(dx)[~shaped[-1]])
        # r = exp(log p - log p_behaviour): as far off, relatively, as the larger of these, |margin|, absolutely.
        budget = budget_of(margins, factors=2)
        within(np.ravel(losses), want, size, budget, "loss")
        dlogits, dsize = weights[:, None] * dlogits, abs(weights[:, None]) * dsize
        check_head((dx, dhead), x, head, dlogits, dsize, budget)
    clipped = mask & (dsize.sum(-1) == 0)
    assert 5 < clipped.sum() < mask.sum() - 5


@pytest.mark.nan
@pytest.mark.parametrize("behaviour", [-90.0, -200.0, -np.inf, 0.0])
def test_clipped_ratio_of_actions_that_were_or_are_rare(behaviour):
    """Finite, with the gradient of the bound; an action of probability 0 has none."""
    x, head = jnp.eye(2, 3), jnp.float32([[60, 0, 0], [0, 0, -jnp.inf], [0, 0, 0]])
    actions, advantage = jnp.array([0, 1]), jnp.array([1.0, -1.0])
    told = jnp.full(2, behaviour), advantage, jnp.ones(2, bool)
    for ids in (actions, actions[::-1]):
        losses, pull = jax.vjp(lambda x, ids=ids: OWN["clipped_ratio"](x, head[:, :2], ids, *told), x)
        assert jnp.isfinite(losses).all() and jnp.isfinite(pull(jnp.ones(2))[0]).all()


@pytest.mark.thorough
def test_dpo(rng):
    """Margins of all sizes, and pairs with h from -30 to 60."""
    pairs, length = 31, 6
    wanted = np.linspace(-30, 60, pairs)
    margins = rng.permutation(np.resize(MARGINS, 2 * pairs * length))
    logits, tokens = at_margins(rng, margins, np.float64, classes=CLASSES)
    x, head, logits = head_of(rng, logits)
    x, logits, tokens = (a.reshape(2, pairs, length, *a.shape[1:]) for a in (x, logits, tokens))
    mask = rng.random(tokens.shape) < 0.8
    mask[..., 0] = True
    log_prob = -token(logits, tokens).nll
    reference = log_prob + rng.normal(size=tokens.shape) / 4
    gains = np.where(mask, log_prob - reference, 0).sum(-1)
    reference[0, :, 0] -= 10 * wanted - (gains[0] - gains[1])
    reference = reference.astype(np.float32)
    weights = rng.normal(size=pairs).astype(np.float32)
    gradients, losses = jax.jit(with_gradient(OWN["dpo"]))((x, head), weights, (tokens, mask, reference))
    want, dlogits, size, dsize = dpo(logits, tokens, mask, reference)
    # h = β · (a sum of differences) is off by eps/2 · β of each of their terms, the partial sums and |h|/β, twice over.
    terms = np.where(mask, abs(log_prob) + abs(reference), 0).sum((0, 2))
    budget = EPS * (0.1 * terms + abs(wanted) + 8)
    within(losses, want, size, budget, "loss")
    assert relative_error(losses, want).max() < 2e-5
    scale = weights[:, None, None]
    per_token = np.broadcast_to((budget + budget_of(60))[:, None], tokens.shape)
    check_head(gradients, x, head, scale * dlogits, abs(scale) * dsize, per_token)


def naive_focal(logits, labels):
    p, log_p = (jnp.take_along_axis(f(logits), labels[:, None], 1)[:, 0] for f in (jax.nn.softmax, jax.nn.log_softmax))
    return (1 - p) ** 2 * -log_p


def naive_confidence_penalty(logits, labels):
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, labels[:, None], 1)[:, 0]
    return nll - 0.1 * -jnp.sum(jnp.exp(log_p) * log_p, -1)


def naive_unlikelihood(logits, labels):
    p = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], 1)[:, 0]
    return -jnp.log(jnp.maximum(1 - p, 1e-5))


def naive_clipped_ratio(logits, labels, behaviour):
    ratio = jnp.exp(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0] - behaviour)
    return -jnp.minimum(ratio * -1, jnp.clip(ratio, 0.8, 1.2) * -1)


@pytest.mark.nan
@pytest.mark.optimized
def test_the_usual_way_fails_in_the_tail_where_ours_does_not():
    """At a margin of 20 float32 has no gradient of the label's logit left, or none that is right. `test_clipped_ratio`
    and `test_dpo` have ours of these two, which are of heads only."""
    logits, labels, weights, found = in_logits()
    row = int(np.argmin(abs(MARGINS - 20)))
    at = row, labels[row]
    behaviour, ones = np.zeros(len(labels), np.float32), np.ones(len(labels), np.float32)
    usual = {"focal": naive_focal, "confidence_penalty": naive_confidence_penalty, "unlikelihood": naive_unlikelihood}
    usual["clipped_ratio"] = lambda z, y: naive_clipped_ratio(z, y, behaviour)
    of_sigmoid = lambda h: -jnp.log(jax.nn.sigmoid(h))  # noqa: E731

    @jax.jit
    def program(logits, h):
        gradients = {name: jax.grad(lambda z, f=f: jnp.sum(f(z, labels)))(logits) for name, f in usual.items()}
        return gradients, jax.vmap(jax.grad(of_sigmoid))(h)

    of_usual, dh = program(logits, np.float32([20, -90]))
    ours = {name: grad for ((grad,), _), (name, options) in zip(found, PER_TOKEN, strict=True) if options != HALF}
    for name, naive in of_usual.items():
        more = (behaviour, -ones, np.ones(len(labels), bool)) if name == "clipped_ratio" else ()
        want = TRUTH[name](logits, labels, *more)[1][at]
        assert relative_error(naive[at], want) > 0.3, name
        assert name not in ours or relative_error(ours[name][at], weights[row] * want) < 1e-5, name
    assert dh[0] == 0 and np.isnan(dh[1])


@pytest.mark.nan
def test_unlikelihood_at_p_1_and_at_p_0():
    """The page's edges: bounded at 85, without a gradient; log(1 - p) and log(-expm1(log_prob)) alone fail."""
    logits, label = np.float32([[200, 0, 0], [-30, 0, 0], [20, 0, 0]]), np.zeros(3, np.int32)

    @jax.jit
    def program(logits):
        of_p_1 = -jnp.log(-jnp.expm1(OWN["label_statistics"](logits, label).log_prob))
        naive = jax.grad(lambda z: jnp.sum(-jnp.log(1 - jax.nn.softmax(z)[:, 0])))(logits)
        return *with_gradient(OWN["unlikelihood"])((logits,), jnp.ones(3), (label,)), of_p_1, naive

    (grad,), losses, of_p_1, naive = program(logits)
    assert 85 < losses[0] < 86 and not np.any(grad[0])
    assert np.isinf(of_p_1[0]) and of_p_1[1] == 0 and np.isnan(naive[2, 0])
    p = np.exp(-30.0) / (2 + np.exp(-30.0))
    assert relative_error([losses[1], grad[1, 0]], p).max() < 1e-5
