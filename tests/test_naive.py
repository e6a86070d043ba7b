"""Against autodiff of what everybody writes: log_softmax, then the label's entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import epsilon, loss_and_grad, random_case, random_cotangent

from softmax_jax import cross_entropy


def naive(logits, labels, options):
    axis = options["axis"]
    z = logits.astype(jnp.float32)
    if "logit_scale" in options:
        z = z * options["logit_scale"]
    if "softcap" in options:
        z = options["softcap"] * jnp.tanh(z / options["softcap"])
    log_p = jax.nn.log_softmax(z, axis)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, z.shape[axis], axis=axis, dtype=z.dtype)
    c, smoothing = options.get("class_weights", np.ones(z.shape[axis], np.float32)), options.get("label_smoothing", 0)
    c = c.reshape([-1 if a == axis else 1 for a in range(z.ndim)])
    target = jnp.broadcast_to(c, z.shape) * ((1 - smoothing) * labels + smoothing / z.shape[axis])
    log_normalizer = jax.nn.logsumexp(z, axis)
    losses = -jnp.sum(target * log_p, axis) + options.get("z_loss", 0) * log_normalizer**2
    weights = options.get("weights", jnp.ones_like(losses))
    shares = weights * jnp.sum(jnp.broadcast_to(c, z.shape) * labels, axis) if options["shared"] else weights
    reduced = {"none": weights * losses, "sum": jnp.sum(weights * losses)}
    return reduced.get(options["reduction"], jnp.sum(weights * losses) / jnp.sum(shares))


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize(
    ("shape", "axis", "reduction"), [((6, 41), -1, "mean"), ((13, 5), 0, "sum"), ((3, 7, 2), 1, "none")], ids=str
)
def test_loss_and_gradient_are_those_of_the_naive_loss(device, rng, shape, axis, reduction, dense):
    dtype = jnp.bfloat16 if axis == 0 else jnp.float32
    names = ["weights", "class_weights", "label_smoothing", "z_loss", "logit_scale", "softcap"]
    logits, labels, options = random_case(rng, shape, axis, dtype, dense, names)
    options["reduction"] = reduction
    cotangent = random_cotangent(rng, shape, axis, reduction)
    loss, grad = loss_and_grad(jax.jit, logits, labels, cotangent, options)
    # Both are computed in float32, then the gradient is rounded once by each.
    plain, pull = jax.vjp(lambda x: naive(x, jnp.asarray(labels), options | {"shared": not dense}), jnp.asarray(logits))
    for got, want in ((loss, plain), (grad, pull(jnp.asarray(cotangent))[0])):
        want = np.asarray(want, np.float32)
        # The naive one rounds log_normalizer (≤ 10), so p to 10 eps; times the number of roundings.
        tolerance = 2 * epsilon(got.dtype) + 100 * epsilon(jnp.float32)
        atol = 100 * epsilon(jnp.float32) * abs(want).max()
        np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
def test_gradients_of_all_operands_are_those_of_the_naive_loss(rng, dense):
    names = ["weights", "class_weights", "label_smoothing", "z_loss", "logit_scale", "softcap"]
    logits, labels, options = random_case(rng, (6, 9), -1, jnp.float32, dense, names)
    options["weights"] = rng.uniform(0.5, 2, 6).astype(np.float32)  # of a weight of 0 only the divisor's part counts
    static, rest = {"axis": 1, "reduction": "mean"}, {k: options[k] for k in names}

    def ours(logits, rest):
        return cross_entropy(logits, labels, **static, **rest)

    def plain(logits, rest):
        return naive(logits, jnp.asarray(labels), static | rest | {"shared": not dense})

    scale = np.float32(rng.normal())
    got, want = (jax.jit(jax.grad(lambda x, r, f=f: scale * f(x, r), (0, 1)))(logits, rest) for f in (ours, plain))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=100 * epsilon(jnp.float32) * abs(w).max())
