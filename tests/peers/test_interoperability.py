"""The losses inside other people's training loops, with the real packages."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from softmax_jax import cross_entropy, linear_cross_entropy


@pytest.fixture(autouse=True)
def _jax_as_these_packages_know_it():
    """Optax and the others promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits  # a second that the quick run does not need

    images, labels = load_digits(return_X_y=True)
    return np.float32(images / 16), np.int32(labels)


def falls(losses):
    """By half within the steps that were made, and no NaN on the way."""
    return np.all(np.isfinite(losses)) and losses[-1] < losses[0] / 2


@pytest.mark.thorough
def test_flax_nnx_training_step(digits):
    """The head goes to `linear_cross_entropy` as the layer holds it."""
    images, labels = digits

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.head = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)

    def loss(model):
        x = nnx.relu(model.hidden(images))
        return linear_cross_entropy(x, model.head.kernel[...], labels, bias=model.head.bias[...], chunk_size=500)

    def plain(model):
        logits = model.head(nnx.relu(model.hidden(images)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    model = Model(nnx.Rngs(0))
    (value, grads), (want, wanted) = (nnx.jit(nnx.value_and_grad(f))(model) for f in (loss, plain))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), nnx.to_pure_dict(wanted), atol=1e-6)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    assert falls([float(step(model, optimizer)) for _ in range(40)])


@pytest.mark.thorough
def test_equinox_training_step(digits):
    images, labels = digits
    model = eqx.nn.MLP(64, 10, 32, 1, key=jax.random.key(0))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        value, grads = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(images), labels))(model)
        updates, state = optimizer.update(grads, state, model)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for _ in range(40):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert falls(losses)


@pytest.mark.thorough
def test_accumulated_gradients_are_those_of_the_whole_batch(digits):
    """optax.MultiSteps averages the micro-batches' gradients: with the whole batch's count over their number as the
    `normalizer` that is the gradient of the mean over all tokens that count, however they are spread."""
    images, labels = digits
    images, labels, parts = images[:96], labels[:96].copy(), 4
    labels[:20] = -100  # most of the first part
    params = {"w": jnp.full((64, 10), 0.01), "b": jnp.zeros(10)}
    of_batch = lambda p, x, y, n: cross_entropy(x @ p["w"] + p["b"][None], y, ignore_index=-100, normalizer=n)  # noqa: E731
    gradient = jax.jit(jax.grad(of_batch))
    counted = np.float32((labels != -100).sum())

    whole = optax.sgd(0.5, momentum=0.9)
    updates, _ = whole.update(gradient(params, images, labels, counted), whole.init(params))
    want = optax.apply_updates(params, updates)

    accumulated = optax.MultiSteps(whole, every_k_schedule=parts)
    state, got = accumulated.init(params), params
    for x, y in zip(np.split(images, parts), np.split(labels, parts), strict=True):
        updates, state = accumulated.update(gradient(params, x, y, counted / parts), state, got)
        got = optax.apply_updates(got, updates)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.thorough
def test_a_solver_finds_the_optimum_of_multinomial_regression(digits):
    """optimistix takes derivatives forward; scikit-learn's float64 solution is the truth."""
    from sklearn.linear_model import LogisticRegression

    images, labels = digits
    images, labels, penalty = images[:300], labels[:300], 0.1

    def objective(w, _):
        loss = cross_entropy(images @ w, labels, reduction="sum")
        return loss + penalty / 2 * jnp.sum(w**2)

    solver = optimistix.BFGS(rtol=1e-6, atol=1e-6)
    found = optimistix.minimise(objective, solver, jnp.zeros((64, 10)), max_steps=2000, throw=False)
    want = LogisticRegression(C=1 / penalty, fit_intercept=False, tol=1e-10, max_iter=10000).fit(
        np.float64(images), labels
    )
    best = objective(jnp.float32(want.coef_.T), None)
    np.testing.assert_allclose(objective(found.value, None), best, rtol=1e-5)
    np.testing.assert_allclose(found.value, want.coef_.T, atol=2e-2)


@pytest.mark.thorough
def test_training_resumed_from_an_orbax_checkpoint_is_bitwise_the_same(digits, tmp_path):
    images, labels = digits
    optimizer = optax.adamw(1e-2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda w: linear_cross_entropy(images, w, labels, chunk_size=600))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def trained(params, state, steps):
        for _ in range(steps):
            params, state, _ = step(params, state)
        return params, state

    start = jnp.zeros((64, 10))
    middle = trained(start, optimizer.init(start), 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "middle", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "middle", jax.tree.map(jnp.zeros_like, middle))
    chex.assert_trees_all_equal(trained(*restored, 5), trained(*middle, 5))
