"""What went wrong in other implementations, one named test each; docs/failures.md lists all, with the reports."""

import ast
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, check_against_reference, epsilon, few_of, loss_and_grad, random_case

from softmax_jax import cross_entropy, log_softmax

TESTS = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (\d+) \|(.*)\|(.*)\|(.*)\|$", (TESTS.parent / "docs/failures.md").read_text(), re.MULTILINE)

INF = np.inf
both = pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])


def test_every_failure_known_elsewhere_has_a_test():
    """Every row of the table names tests, and they are here."""
    assert [int(row[0]) for row in ROWS] == list(range(1, 47))
    trees = [ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py")]
    here = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    for number, _, _, tests in ROWS:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"failure {number} has no test"
        assert set(named) <= here, f"failure {number}: {set(named) - here} is gone"


@pytest.mark.diagonal
@pytest.mark.optimized
@both
@pytest.mark.parametrize("names", [[], ["z_loss"], ["weights"]], ids=str)
@pytest.mark.nan
def test_row_of_all_minus_inf_is_nan_and_nan_is_not_swallowed(rng, names, dense):
    logits, labels, options = random_case(rng, (6, 7), dense=dense, names=names)
    logits[0], logits[1, 3], logits[2, 4] = -INF, np.nan, INF
    if names == ["weights"]:
        options["weights"] = np.float32([1, 0.5, 2, 1, 1, 3])
    options["reduction"] = "none"
    loss, grad = loss_and_grad(jax.jit, logits, labels, rng.normal(size=6).astype(np.float32), options)
    for x in (loss, grad):
        assert np.all(np.isnan(x[:3])) and np.all(np.isfinite(x[3:]))


@pytest.mark.nan
@both
@pytest.mark.parametrize("name", ["where", "weights"])
def test_row_of_all_minus_inf_is_0_where_it_is_taken_out(rng, name, dense):
    logits, labels, options = random_case(rng, (6, 7), dense=dense)
    logits[0], logits[1] = -INF, np.nan
    options[name] = np.arange(6) > 1 if name == "weights" else np.broadcast_to((np.arange(6) > 1)[:, None], (6, 7))
    check_against_reference(jax.jit, rng, logits, labels, options)
    _, grad = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), options)
    assert np.all(grad[:2] == 0) and np.all(grad[2:] != 0)


@both
@pytest.mark.parametrize("scale", few_of([30.0, 1e-3]))
def test_padded_classes_are_not_counted(rng, scale, dense):
    """Peaked and tiny logits, where padding counts most: as if the padding were not there."""
    logits, labels, _ = random_case(rng, (5, 13), dense=dense)
    logits *= np.float32(scale)
    padded = np.concatenate([logits, rng.normal(size=(5, 6)).astype(np.float32)], -1)
    padded_labels = np.concatenate([labels, np.ones((5, 6), np.float32)], -1) if dense else labels
    smoothing = np.float32(0.1)
    want = reference.cross_entropy(logits, labels, label_smoothing=smoothing, cotangent=0.7)
    options = {"where": np.arange(19) < 13, "label_smoothing": smoothing}
    loss, grad = loss_and_grad(jax.jit, padded, padded_labels, np.float32(0.7), options)
    assert_within(loss, want.loss, want.loss_condition, 8)
    assert_within(grad[:, :13], want.grad, want.grad_condition, 8)
    assert np.all(grad[:, 13:] == 0)


@both
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_gets_its_own_cotangent(rng, reduction, dense):
    """The gradient is linear in the cotangent, row by row."""
    logits, labels, _ = random_case(rng, (5, 7), dense=dense)
    cotangent = (rng.normal(size=5) if reduction == "none" else rng.normal(size=())).astype(np.float32)
    _, unit = loss_and_grad(jax.jit, logits, labels, np.ones_like(cotangent), {"reduction": reduction})
    _, grad = loss_and_grad(jax.jit, logits, labels, cotangent * 65528, {"reduction": reduction})
    want = np.float64(unit) * np.float64(cotangent * np.float32(65528)).reshape(-1, 1)
    np.testing.assert_allclose(grad, want, rtol=8 * epsilon(jnp.float32))


@pytest.mark.optimized
@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_16_bit_logits_have_a_float32_loss_summed_in_float32(rng, dtype, dense):
    """A bfloat16 sum of 4096 losses of 2 stops growing at 512; a float16 sum overflows at 65504."""
    logits = np.asarray(rng.normal(size=(40000, 7)), dtype)
    labels = rng.integers(0, 7, 40000).astype(np.int32)
    if dense:
        labels = np.asarray(np.eye(7)[labels], dtype)
    want = reference.cross_entropy(logits, labels, reduction="sum")
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), reduction="sum")
    assert got.dtype == jnp.float32 and want.loss > 65504
    assert_within(got, want.loss, want.loss, 8)


@pytest.mark.optimized
def test_gradient_rows_of_16_bit_logits_sum_to_zero(rng):
    """Forward and backward read the same rounded logits, of size 640: p sums to 1 to the rounding of its entries."""
    logits, labels, _ = random_case(rng, (64, 41), dtype=jnp.bfloat16)
    logits = (np.float32(logits) * 200).astype(jnp.bfloat16)
    _, grad = loss_and_grad(jax.jit, logits, labels, np.float32(64), {})
    grad = np.float64(grad)
    assert np.all(abs(grad.sum(-1)) <= epsilon(jnp.bfloat16) / 2 * abs(grad).sum(-1) * 1.01)


@pytest.mark.parametrize("label", [-1, 7, 12, -100, 2**31 - 1])
@pytest.mark.nan
def test_label_out_of_range_is_never_clamped_wrapped_or_half_nan(rng, label):
    logits, labels, _ = random_case(rng, (4, 7))
    labels[1] = label
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), {})
    assert np.isnan(loss) and np.all(np.isnan(grad[1]))
    assert not np.any(np.isnan(grad[jnp.array([0, 2, 3])]))


@pytest.mark.nan
@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
def test_nothing_to_learn_from_is_zero_and_not_nan(rng, dense):
    """All ignored, all weights 0, weights of sum 0, class weights of 0, no class at all, an empty batch."""
    names = ["class_weights", "label_smoothing", "z_loss"]
    logits, labels, options = random_case(rng, (4, 7), dense=dense, names=names)
    logits[0], logits[1, 2] = np.nan, INF
    cases = [{"weights": np.zeros(4, bool)}, {"where": np.zeros(7, bool)}, {"weights": np.zeros(())}]
    if not dense:
        cases.append({"ignore_index": -100})
    for case in cases:
        ids = np.full_like(labels, -100) if "ignore_index" in case else labels
        loss, grad = loss_and_grad(jax.jit, logits, ids, np.float32(0.7), options | case)
        assert loss == 0 and np.all(grad == 0), case
    logits[:2] = 0
    opposed = options | {"weights": np.float32([1, -1, 2, -2]), "class_weights": np.ones(7, np.float32)}
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(0.7), opposed)
    assert loss == 0 and np.all(grad == 0)
    if not dense:
        loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(1), options | {"class_weights": np.zeros(7)})
        assert loss == 0 and np.all(grad == 0)
    for reduction in ("mean", "sum"):
        loss, grad = loss_and_grad(jax.jit, logits[:0], labels[:0], np.float32(1), options | {"reduction": reduction})
        assert loss == 0 and grad.shape == (0, 7)


@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
def test_a_row_of_weight_zero_contributes_exactly_zero_whatever_it_holds(rng, dense):
    """To the loss, to the gradient of the logits, and to that of every other operand."""
    names = ["class_weights", "label_smoothing", "z_loss", "logit_scale", "softcap"]
    logits, labels, options = random_case(rng, (6, 7), dense=dense, names=names)
    weights = np.float32([0, 0, 0, 1, 2, 0.5])
    clean = logits.copy()
    logits[0], logits[1], logits[2, 3] = np.nan, -INF, INF
    bad_labels = labels.copy()
    bad_labels[:2] = np.nan if dense else 99
    operands = {k: options[k] for k in names}

    def f(logits, labels, operands):
        floats = {"labels": labels} if dense else {}
        g = lambda x, o, f: 0.7 * cross_entropy(x, f.get("labels", labels), weights=weights, **o)  # noqa: E731
        return jax.jit(jax.value_and_grad(g, (0, 1, 2)))(logits, operands, floats)

    want, got = f(clean, labels, operands), f(logits, bad_labels, operands)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.all(got[1][0][:3] == 0)


@pytest.mark.nan
@both
def test_of_a_weight_of_zero_only_the_divisors_part_counts(rng, dense):
    """∂(Σ wℓ / Σ w)/∂w_i = (ℓ_i - mean)/Σ w; with w_i = 0 the row's ℓ_i is not looked at."""
    logits, labels, _ = random_case(rng, (4, 7), dense=dense)
    logits[0] = np.nan
    weights = np.float32([0, 1, 2, 0.5])
    mean, grad = jax.value_and_grad(lambda w: cross_entropy(logits, labels, weights=w))(weights)
    losses = reference.cross_entropy(logits, labels, reduction="none").loss
    want = (np.where(weights == 0, 0, losses) - np.float64(mean)) / weights.sum()
    np.testing.assert_allclose(grad, want, rtol=0, atol=16 * epsilon(jnp.float32) * np.nanmax(losses))


@pytest.mark.diagonal
@pytest.mark.parametrize("ignore_index", [-100, 0, 5, 255])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_class_weights_and_smoothing_combined(rng, reduction, ignore_index):
    """As PyTorch has them: by the formula of its documentation, row by row."""
    logits, labels, _ = random_case(rng, (6, 7))
    labels[[1, 4]] = ignore_index
    c, e = rng.uniform(0.5, 2, 7).astype(np.float32), np.float32(0.2)
    log_p = reference.log_softmax(logits)
    losses, kept = np.zeros(6), labels != ignore_index
    for n in np.flatnonzero(kept):
        losses[n] = -(1 - e) * c[labels[n]] * log_p[n, labels[n]] - e / 7 * np.sum(c * log_p[n])
    want = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / c[labels[kept]].sum()}[reduction]
    options = {"ignore_index": ignore_index, "class_weights": c, "label_smoothing": e, "reduction": reduction}
    got, _ = loss_and_grad(jax.jit, logits, labels, np.ones(want.shape, np.float32), options)
    assert_within(got, want, 20 + np.abs(want), 8)
    check_against_reference(jax.jit, rng, logits, labels, options)


@both
def test_accumulated_microbatches_equal_the_batch(rng, dense):
    """Microbatches of unequal weight, each with the global count: a mean of means is another number."""
    logits, labels, options = random_case(rng, (8, 7), dense=dense, names=["class_weights"])
    weights = np.float32([1, 0, 0, 0, 2, 1, 1, 3])
    c, options = options["class_weights"], {"class_weights": options["class_weights"]}
    total = np.sum(weights if dense else weights * c[labels])
    parts = [
        loss_and_grad(
            jax.jit, logits[i], labels[i], np.float32(0.7), options | {"weights": weights[i], "normalizer": total}
        )
        for i in (slice(0, 3), slice(3, 8))
    ]
    want = reference.cross_entropy(logits, labels, weights=weights, cotangent=0.7, **options)
    assert_within(parts[0][0] + parts[1][0], want.loss, want.loss_condition, 8)
    assert_within(np.concatenate([p[1] for p in parts]), want.grad, want.grad_condition, 8)


@pytest.mark.diagonal
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e7, -1e7, 6e4])
def test_log_softmax_of_very_large_logits(rng, offset, dtype):
    """(x - max) - log, not x - (max + log), in which the logarithm rounds away. Distances of logits of one size are
    exact: what is left of the condition is the logarithm and the distance, which the value is the sum of."""
    if abs(offset) > float(jnp.finfo(dtype).max):
        pytest.skip("more than the dtype holds")
    step = max(1.0, abs(offset) * epsilon(dtype))  # the coarseness of logits there
    x = np.asarray(offset + step * rng.integers(-3, 3, (5, 7)), dtype)
    want = reference.log_softmax(x)
    assert_within(jax.jit(log_softmax)(x), want, 1 + abs(want), 4, dtype)
