"""`cross_entropy` is `torch.nn.functional.cross_entropy` in float64, but for what docs/guides/migration.md lists as
different."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmax_jax import cross_entropy, kl_divergence, linear_cross_entropy, log_softmax, softmax

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch")
functional = torch.nn.functional

BATCH, CLASSES, IGNORED = (4, 3), 6, -100
HEAD, BIAS = np.random.default_rng(0).normal(size=(9, CLASSES)), np.random.default_rng(1).uniform(0.5, 2, 9)
TEACHER = np.random.default_rng(2).dirichlet(np.ones(BATCH[1]), (BATCH[0], CLASSES))  # of the last axis


def of_torch(logits, labels, cotangent, weight, **options):
    """Classes second, as PyTorch has them: loss, and the gradients of logits, class weights and dense labels."""
    z = torch.tensor(np.moveaxis(logits, -1, 1), requires_grad=True)
    dense = labels.ndim == logits.ndim
    t = torch.tensor(np.moveaxis(labels, -1, 1) if dense else labels, requires_grad=dense)
    loss = functional.cross_entropy(z, t, weight=None if weight is None else torch.tensor(weight), **options)
    loss.backward(torch.tensor(cotangent))
    return (
        loss.detach().numpy(),
        np.moveaxis(z.grad.numpy(), 1, -1),
        np.moveaxis(t.grad.numpy(), 1, -1) if dense else None,
    )


def of_ours(logits, labels, cotangent, weight, **options):
    dense = labels.ndim == logits.ndim

    @jax.jit
    def both(logits, labels, cotangent):
        f = lambda z, t: cross_entropy(z, t, class_weights=weight, **options)  # noqa: E731
        loss, pull = jax.vjp(f if dense else lambda z: f(z, labels), *((logits, labels) if dense else (logits,)))
        return loss, *pull(cotangent)

    with jax.enable_x64(True):
        loss, *gradients = map(np.asarray, both(logits, labels, np.float64(cotangent)))
    return loss, gradients[0], gradients[1] if dense else None


@pytest.mark.parametrize("labelled", ["integer", "some ignored", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients_are_pytorchs(rng, reduction, labelled):
    logits = 3 * rng.normal(size=(*BATCH, CLASSES))
    ids = rng.integers(0, CLASSES, BATCH)
    dense, ignoring = labelled == "dense", {}
    if labelled == "some ignored":
        ids[0, 0] = ids[2, 1] = IGNORED
        ignoring = {"ignore_index": IGNORED}
    cotangent = rng.normal(size=BATCH if reduction == "none" else ())
    labels = rng.dirichlet(np.ones(CLASSES), BATCH) if dense else ids
    for weight, smoothing in product([None, rng.uniform(0.5, 2, CLASSES)], [0.0, 0.1]):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        got = of_ours(logits, labels, cotangent, weight, **options, **ignoring)
        want = of_torch(logits, labels, cotangent, weight, **options, **ignoring)
        for name, a, b in zip(("loss", "dlogits", "dlabels"), got, want, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13, err_msg=f"{name}, {weight}, {smoothing}")


def test_forward_and_reverse_divergences_are_pytorchs(rng):
    """`kl_div` of log-probabilities, both gradients."""
    student, teacher = (3 * rng.normal(size=(4, CLASSES)) for _ in range(2))
    a, b = (torch.tensor(z, requires_grad=True) for z in (student, teacher))
    for beta, (of, to) in [(0.0, (b, a)), (1.0, (a, b))]:
        log_of, log_to = (functional.log_softmax(z / 1.5, -1) for z in (of, to))
        want = functional.kl_div(log_to, log_of, log_target=True, reduction="batchmean")
        grads = torch.autograd.grad(want, (a, b))
        with jax.enable_x64(True):
            loss = lambda a, b, beta=beta: kl_divergence(a, teacher_logits=b, beta=beta, temperature=1.5)  # noqa: E731
            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, teacher)
        np.testing.assert_allclose(value, want.item(), rtol=1e-12)
        for got, right in zip(gradients, grads, strict=True):
            np.testing.assert_allclose(got, right.numpy(), rtol=1e-11, atol=1e-14)


SAME = {
    "classes second": (
        lambda z, y: functional.cross_entropy(z, y),
        lambda z, y: cross_entropy(z, y, axis=1, ignore_index=-100),
    ),
    "temperature": (
        lambda z, y: functional.cross_entropy(z / 1.5, y),
        lambda z, y: cross_entropy(z, y, axis=1, ignore_index=-100, logit_scale=1 / 1.5),
    ),
    "log-probabilities": (
        lambda z, y: functional.nll_loss(functional.log_softmax(z, 1), y),
        lambda z, y: cross_entropy(log_softmax(z, 1), y, axis=1, ignore_index=-100),
    ),
    "weights of tokens": (
        lambda z, y: (functional.cross_entropy(z, y, reduction="none") * (y > 1)).sum() / (y > 1).sum(),
        lambda z, y: cross_entropy(z, y, axis=1, weights=y > 1),
    ),
    "softmax": (
        lambda z, y: functional.softmax(z, dim=1)[:, 0].sum(),
        lambda z, y: softmax(z, axis=1)[:, 0].sum(),
    ),
    "a divergence of sequences": (
        lambda z, y: functional.kl_div(functional.log_softmax(z, -1), torch.tensor(TEACHER), reduction="batchmean"),
        lambda z, y: kl_divergence(log_softmax(z, -1), teacher_probs=TEACHER, normalizer=BATCH[0]),
    ),
}
if hasattr(functional, "linear_cross_entropy"):  # from 2.13 on
    SAME["a head"] = (
        lambda z, y: functional.linear_cross_entropy(
            z[..., 0], torch.tensor(HEAD), y[:, 0], linear_bias=torch.tensor(BIAS), weight=torch.tensor(BIAS)
        ),
        lambda z, y: linear_cross_entropy(
            z[..., 0], HEAD, y[:, 0], transpose_weight=True, bias=BIAS, class_weights=BIAS, ignore_index=-100
        ),
    )


@pytest.mark.whole
@pytest.mark.parametrize("name", SAME)
def test_what_the_page_says_is_the_same(rng, name):
    """Loss and gradient of logits [4, 6, 3], classes second, a label ignored: the rows of docs/guides/migration.md."""
    theirs, ours = SAME[name]
    logits = 3 * rng.normal(size=(BATCH[0], CLASSES, BATCH[1]))
    labels = rng.integers(0, CLASSES, BATCH)
    labels[1, 2] = IGNORED
    z = torch.tensor(logits, requires_grad=True)
    want = theirs(z, torch.tensor(labels))
    want.backward()
    with jax.enable_x64(True):
        got, gradient = jax.jit(jax.value_and_grad(ours))(logits, labels)
    np.testing.assert_allclose(got, want.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nothing", ["all ignored", "no tokens", "class weights of 0"])
def test_what_differs_a_mean_over_nothing(rng, nothing):
    """0 instead of NaN."""
    logits, labels, weight = rng.normal(size=(3, CLASSES)).astype(np.float32), np.zeros(3, int), None
    if nothing == "all ignored":
        labels = np.full(3, IGNORED)
    elif nothing == "no tokens":
        logits, labels = logits[:0], labels[:0]
    else:
        weight = np.float32([0, 1, 1, 1, 1, 1])
    of_torch = functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), None if weight is None else torch.tensor(weight)
    )
    assert np.isnan(of_torch.item())
    loss, grad = jax.value_and_grad(cross_entropy)(logits, labels, class_weights=weight, ignore_index=IGNORED)
    assert loss == 0 and not np.any(grad)


def test_what_differs_an_impossible_class_of_probability_0():
    logits, labels = np.float32([[0, 1, -np.inf]]), np.float32([[1, 0, 0]])
    assert np.isnan(functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item())
    np.testing.assert_allclose(cross_entropy(logits, labels), np.log1p(np.e), rtol=1e-6)


@pytest.mark.nan
def test_what_differs_no_class_is_ignored_by_default(rng):
    """-100 is PyTorch's default `ignore_index`; here it is an id out of range, NaN, until it is named."""
    logits, labels = rng.normal(size=(3, CLASSES)).astype(np.float32), np.array([0, 1, IGNORED])
    assert np.isfinite(functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item())
    assert np.isnan(cross_entropy(logits, jnp.asarray(labels)))


@pytest.mark.nan
def test_what_differs_labels_out_of_range(rng):
    """NaN in the row's loss and gradient instead of an exception, which compiled code cannot raise."""
    logits, labels = rng.normal(size=(3, CLASSES)).astype(np.float32), np.array([0, CLASSES, 1])
    with pytest.raises(IndexError, match="out of bounds"):
        functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    losses = cross_entropy(logits, jnp.asarray(labels), reduction="none")
    np.testing.assert_array_equal(np.isnan(losses), [False, True, False])
    with pytest.raises(ValueError, match="got 6 at"):  # which the host can see
        cross_entropy(logits, labels)


def test_what_differs_bfloat16_losses_are_float32(rng):
    logits, labels = rng.normal(size=(3, CLASSES)), np.array([0, 2, 1])
    narrow = torch.tensor(logits, dtype=torch.bfloat16)
    assert functional.cross_entropy(narrow, torch.tensor(labels)).dtype == torch.bfloat16
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels).dtype == jnp.float32


def test_what_differs_confident_tokens():
    """float32, a margin of 20: exactly 0 there."""
    logits, labels = np.float32([[20, 0]]), np.array([0])
    assert functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item() == 0
    np.testing.assert_allclose(cross_entropy(logits, labels), np.log1p(np.exp(-20.0)), rtol=1e-6)
