"""The promise in its plainest form: value and gradient are those of the naive formula by `jax.grad`, and (p - t)/N.

Read this one first. It runs on every device that JAX finds.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmax_jax import cross_entropy, log_softmax, softmax

N, K = 6, 11  # tokens, classes


def naive(logits, labels, weights=None, where=None, label_smoothing=0.0):
    """-Σ weights · Σ_v t_v log p_v / Σ weights, as in a textbook, in float32."""
    logits = logits.astype(jnp.float32)
    exists = jnp.ones_like(logits, bool) if where is None else where
    t = jax.nn.one_hot(labels, K) if labels.ndim == 1 else labels.astype(jnp.float32)
    exist = exists.astype(jnp.float32)
    t = (1 - label_smoothing) * t + label_smoothing * exist / jnp.sum(exist, -1, keepdims=True)
    log_p = logits - jax.nn.logsumexp(logits, -1, keepdims=True, where=exists)
    losses = -jnp.sum(jnp.where(exists, t * log_p, 0), -1)
    weights = jnp.ones(len(losses)) if weights is None else weights
    return jnp.sum(weights * losses) / jnp.sum(weights)


CASES = {
    "ids": ("labels", ()),
    "dense labels": ("targets", ()),
    "smoothing": ("labels", ("label_smoothing",)),
    "weights": ("labels", ("weights",)),
    "a mask": ("labels", ("where",)),
    "dense labels, smoothed, weighted, masked": ("targets", ("label_smoothing", "weights", "where")),
}


def case(rng, dtype, *batch):
    logits = jnp.asarray(3 * rng.normal(size=(*batch, N, K)), dtype)
    labels = jnp.asarray(rng.integers(0, K, (*batch, N)), jnp.int32)
    options = {
        "label_smoothing": 0.1,
        "weights": jnp.asarray(rng.uniform(0.5, 2, N), jnp.float32),
        "where": (jnp.asarray(rng.random((N, K))) < 0.8) | (jax.nn.one_hot(labels, K) > 0).reshape(-1, N, K).any(0),
    }
    kinds = {"labels": labels, "targets": jnp.asarray(rng.dirichlet(np.ones(K), (*batch, N)), jnp.float32)}
    return logits, kinds, options


# The naive formula subtracts two logarithms of up to 10, and p from t: a few roundings of each, in float32; a gradient
# of bfloat16 logits is rounded once more.
ROUNDINGS = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8}


class TestOnTheCpu(chex.TestCase):
    """Each in two of `chex.variants`: with `jit` and without."""

    backend = "cpu"
    variant: Any

    def setUp(self):
        super().setUp()
        try:
            device = jax.devices(self.backend)[0]
        except RuntimeError:
            self.skipTest(f"JAX finds no {self.backend} on this machine")
        self.enterContext(jax.default_device(device))
        self.rng = np.random.default_rng(0)

    @chex.variants(with_jit=True, without_jit=True)
    def test_value_and_gradient_are_those_of_the_naive_formula(self):
        for dtype, roundings in ROUNDINGS.items():
            for name, (kind, names) in CASES.items():
                logits, kinds, options = case(self.rng, dtype)
                options = {name: options[name] for name in names}
                both = lambda f, labels=kinds[kind], options=options: self.variant(  # noqa: E731
                    jax.value_and_grad(lambda z: f(z, labels, **options))
                )
                (value, gradient), (want, naive_gradient) = both(cross_entropy)(logits), both(naive)(logits)
                chex.assert_trees_all_close(value, want, rtol=1e-5, custom_message=name)
                chex.assert_type(gradient, dtype)
                wide = gradient.astype(jnp.float32), naive_gradient.astype(jnp.float32)
                chex.assert_trees_all_close(*wide, rtol=2 * roundings, atol=1e-6, custom_message=name)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_gradient_is_p_minus_t_over_n(self):
        logits, kinds, _ = case(self.rng, jnp.float32)
        for labels in kinds.values():
            gradient = self.variant(jax.grad(lambda z, labels=labels: cross_entropy(z, labels)))(logits)
            t = jax.nn.one_hot(labels, K) if labels.ndim == 1 else labels
            chex.assert_trees_all_close(gradient, (jax.nn.softmax(logits) - t) / N, rtol=1e-5, atol=1e-7)

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmap_over_batches(self):
        logits, kinds, _ = case(self.rng, jnp.float32, 3)
        for labels in kinds.values():
            each = lambda f: self.variant(jax.vmap(jax.value_and_grad(f)))  # noqa: E731
            chex.assert_trees_all_close(
                each(cross_entropy)(logits, labels), each(naive)(logits, labels), rtol=2e-5, atol=1e-6
            )

    @chex.variants(with_jit=True, without_jit=True)
    def test_softmax_and_log_softmax_are_jaxs_in_both_modes(self):
        x, dx = (jnp.asarray(self.rng.normal(size=(N, K)), jnp.float32) for _ in range(2))
        for ours, theirs in ((softmax, jax.nn.softmax), (log_softmax, jax.nn.log_softmax)):
            both = lambda f: self.variant(  # noqa: E731
                lambda x, dx: (f(x), jax.jvp(f, (x,), (dx,))[1], jax.vjp(f, x)[1](dx)[0])
            )
            chex.assert_trees_all_close(both(ours)(x, dx), both(theirs)(x, dx), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
class TestOnAGpu(TestOnTheCpu):
    backend = "gpu"


def test_where_the_naive_formula_rounds_to_zero():
    """At a margin of 30 the loss is e^-30, and so is minus the label's gradient; the naive one has 0 and 0."""
    logits, labels = jnp.array([[30.0, 0.0]]), jnp.array([0])
    value, gradient = jax.value_and_grad(cross_entropy)(logits, labels)
    chex.assert_trees_all_close((value, gradient[0]), (np.exp(-30), np.exp(-30) * np.array([-1, 1])), rtol=1e-5)
    assert jax.nn.logsumexp(logits) - logits[0, 0] == 0
