"""`cross_entropy` against the float64 reference: every option alone and all together, under random cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import ALONE, FLOATS, assert_within, check_against_reference, few_of, loss_and_grad, random_case

from softmax_jax import cross_entropy

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
SHAPES = [((6, 252), -1), ((3, 41, 2), 1), ((507,), 0), ((4, 1), 1), ((123, 5), 0), ((1, 13), -1), ((2, 3, 2, 7), -1)]
labels_kind = pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])


def all_names(dense):
    return [name for name in ALONE if not (dense and name == "ignore_index")]


@labels_kind
@pytest.mark.parametrize("name", [None, *ALONE])
def test_every_option_alone(device, variant, rng, name, dense):
    if dense and name == "ignore_index":
        pytest.skip("ignore_index goes with integer labels")
    logits, labels, options = random_case(rng, (7, 13), -1, dense=dense, names=[name] if name else [])
    check_against_reference(variant, rng, logits, labels, options)


@pytest.mark.diagonal
@labels_kind
@pytest.mark.parametrize(
    ("dtype", "reduction"),
    [
        (jnp.float32, "sum"),
        (jnp.bfloat16, "mean"),
        pytest.param(jnp.float32, "mean", marks=pytest.mark.thorough),
        pytest.param(jnp.float32, "none", marks=pytest.mark.thorough),
        pytest.param(jnp.float16, "none", marks=pytest.mark.thorough),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_all_options_together(device, rng, dtype, reduction, dense):
    logits, labels, options = random_case(rng, (7, 13), -1, dtype, dense, all_names(dense))
    check_against_reference(jax.jit, rng, logits, labels, options | {"reduction": reduction})


@pytest.mark.diagonal
@labels_kind
@pytest.mark.parametrize("shape_and_axis", few_of(SHAPES, 2), ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_shape_and_axis(rng, shape_and_axis, dense, reduction):
    shape, axis = shape_and_axis
    names = all_names(dense) if reduction == "mean" else []
    logits, labels, options = random_case(rng, shape, axis, dense=dense, names=names)
    check_against_reference(jax.jit, rng, logits, labels, options | {"reduction": reduction})


@pytest.mark.diagonal
@pytest.mark.cpu_compiler  # which adds up the sums in one pass one class after the other
@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
@pytest.mark.parametrize("shape_and_axis", few_of([((3, 40000), -1), ((65536, 2), 0), ((2, 32771), -1)]), ids=str)
def test_rows_longer_than_a_block(rng, shape_and_axis, dense):
    """Of 2 x 20000, of 2 x 32768, and of a prime number of classes, which has no blocks."""
    shape, axis = shape_and_axis
    logits, labels, options = random_case(rng, shape, axis, dense=dense, names=all_names(dense))
    check_against_reference(jax.jit, rng, logits, labels, options)


@pytest.mark.diagonal
@labels_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
def test_every_dtype_on_its_own(device, rng, dtype, dense):
    logits, labels, options = random_case(rng, (5, 252), -1, dtype, dense)
    check_against_reference(jax.jit, rng, logits, labels, options | {"reduction": "none"})


@pytest.mark.parametrize(
    "dtypes", few_of([(jnp.float64, jnp.float32), (jnp.float32, jnp.bfloat16), (jnp.float32, jnp.float64)])
)
def test_operands_of_another_float_dtype(rng, dtypes):
    """The logits decide the loss's dtype; each gradient has its operand's."""
    dtype, other = dtypes
    with jax.enable_x64(True):
        names = ["weights", "class_weights", *FLOATS]
        logits, labels, options = random_case(rng, (5, 7), dtype=dtype, dense=True, names=names)
        labels = labels.astype(other)
        options = {k: jnp.asarray(v, other) if k in names else v for k, v in options.items()}
        check_against_reference(jax.jit, rng, logits, labels, options)
        d_labels = jax.jit(jax.grad(lambda t: cross_entropy(logits, t, **options)))(labels)
        assert d_labels.dtype == other and np.all(np.isfinite(d_labels))


@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
def test_float64_in_float64_out(rng, dense):
    with jax.enable_x64(True):
        logits, labels, options = random_case(rng, (5, 41), -1, jnp.float64, dense, all_names(dense))
        check_against_reference(jax.jit, rng, logits, labels.astype(np.float64 if dense else np.int64), options)


@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
def test_the_gradient_of_every_other_operand(rng, dense):
    """Against central differences of the float64 reference: (h²/6) f''' + eps·f/h ≈ 1e-9 at h = 1e-5."""
    names = [name for name in all_names(dense) if name not in ("where", "ignore_index")]
    logits, labels, options = random_case(rng, (5, 7), -1, jnp.float32, dense, all_names(dense))
    options["weights"] = rng.uniform(0.5, 2, 5).astype(np.float32)  # at a weight of 0 there is no derivative
    options["class_weights"] = rng.uniform(0.5, 2, 7).astype(np.float32)
    operands = {name: options.pop(name) for name in names} | ({"labels": labels} if dense else {})

    def difference(name, h):
        def at(value):
            return reference.cross_entropy(logits, **({"labels": labels} | operands | {name: value} | options)).loss

        value = np.float64(operands[name])
        return (at(value + h) - at(value - h)) / 2e-5

    def ours(logits, operands):
        return 3 * cross_entropy(logits, **({"labels": labels} | operands | options))

    for dtype, tolerance in ((jnp.float64, 1e-7), (jnp.float32, 1e-5)):  # float32: 8 eps of terms 10x the gradient
        with jax.enable_x64(dtype == jnp.float64):
            cast = {name: jnp.asarray(value, dtype) for name, value in operands.items()}
            grads = jax.jit(jax.grad(ours, 1))(logits.astype(dtype), cast)
        for name, got in grads.items():
            steps = 1e-5 * np.eye(got.size).reshape(-1, *got.shape)
            want = np.reshape([3 * difference(name, h) for h in steps], got.shape)
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((), bool), ((1, 4), np.int32), ((3, 1), np.float16), ((4,), np.uint8), ((3, 4), bool)],
    ids=str,
)
def test_weights_broadcast_to_the_batch_before_they_are_summed(rng, shape, dtype):
    logits, labels, _ = random_case(rng, (3, 4, 7))
    weights = rng.integers(0, 3, shape).astype(dtype) if shape else np.ones((), dtype)
    check_against_reference(jax.jit, rng, logits, labels, {"weights": weights})


@pytest.mark.parametrize("shape", few_of([(7,), (4, 1), (3, 1, 7), (3, 4, 1), (1, 7), (1, 1), ()], 3))
def test_where_broadcasts_to_the_logits(rng, shape):
    names = ["label_smoothing"] if len(shape) < 3 else ["label_smoothing", "class_weights", "z_loss"]
    logits, labels, options = random_case(rng, (3, 4, 7), names=names)
    where = rng.random(shape) < 0.7
    labels = np.where(
        np.take_along_axis(np.broadcast_to(where, logits.shape), labels[..., None], -1)[..., 0], labels, 0
    )
    options["where"] = where | (np.arange(7) == 0) if shape[-1:] == (7,) else where
    check_against_reference(jax.jit, rng, logits, labels.astype(np.int32), options)


@pytest.mark.parametrize("normalizer", [7, 0.25, np.float32(3), 0])
def test_normalizer_replaces_the_divisor(variant, rng, normalizer):
    logits, labels, options = random_case(rng, (5, 7), names=["weights", "class_weights"])
    check_against_reference(variant, rng, logits, labels, options | {"normalizer": normalizer})


@pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
def test_traced_neutral_options_equal_absent_ones(rng, dense):
    """Also with logits of -inf: 0 · inf is 0."""
    logits, labels, options = random_case(rng, (5, 7), dense=dense)
    logits[:, 3] = -np.inf
    labels = np.where(np.arange(7) == 3, 0, labels) if dense else np.where(labels == 3, 4, labels)
    cotangent = np.float32(rng.normal())
    absent = loss_and_grad(jax.jit, logits, labels, cotangent, options)
    neutral = {"label_smoothing": 0.0, "z_loss": 0.0, "logit_scale": 1.0, "where": np.ones((5, 7), bool)}
    neutral |= {"weights": np.ones(5), "class_weights": np.ones(7)}
    traced = loss_and_grad(jax.jit, logits, labels, cotangent, options | neutral)
    want = reference.cross_entropy(logits, labels, cotangent=float(cotangent))
    for got, other, condition in zip(absent, traced, want[2:], strict=True):
        assert_within(got, np.asarray(other, np.float64), condition, 4)


def test_keyword_defaults_are_neutral(rng):
    logits, labels, _ = random_case(rng, (5, 7))
    got = cross_entropy(logits, labels, label_smoothing=0, z_loss=0, logit_scale=1, softcap=None, normalizer=None)
    assert got == cross_entropy(logits, labels)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_formats_without_infinity(dtype):
    logits = jnp.asarray([[1.0, 2.0, -3.0]], jnp.dtype(dtype))
    want = cross_entropy(logits.astype(jnp.float32), jnp.array([1]))
    np.testing.assert_array_equal(cross_entropy(logits, jnp.array([1])), want)


def test_smoothing_that_is_spread_over_the_other_classes(rng):
    """As Flax's examples, T5X and big_vision spell it: 1 - ε for the label, ε/(K-1) for each other class."""
    logits, ids, _ = random_case(rng, (6, 9))
    epsilon, classes = 0.1, 9
    target = np.where(np.arange(classes) == ids[:, None], 1 - epsilon, epsilon / (classes - 1))
    want = reference.cross_entropy(logits, target.astype(np.float64))
    got = cross_entropy(logits, ids, label_smoothing=epsilon * classes / (classes - 1))
    assert_within(got, want.loss, want.loss_condition, 8)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_wide_ids_of_the_host_do_not_wrap(dtype):
    """Without x64 JAX makes int32 of them: 2**32 + 1 would be class 1."""
    logits, far = np.float32([[1, 2, 4], [0, 1, 0], [3, 0, 0]]), np.iinfo(dtype).max
    wide = np.array([far, 0, 2], dtype)
    want = cross_entropy(logits[1:], np.array([0, 2]), reduction="none")
    losses = cross_entropy(logits, wide, ignore_index=int(far), reduction="none")
    np.testing.assert_array_equal(losses, [0, *want])
    ids = np.array([2**32 + 1, 0, 2], dtype)
    with pytest.raises(ValueError, match="got 4294967297 at"):
        cross_entropy(logits, ids)
    losses = cross_entropy(logits, ids, reduction="none", weights=jnp.ones(3))  # which the host does not know
    np.testing.assert_array_equal(losses, [np.nan, *want])
    smallest = np.array([np.iinfo(np.int64).min, 0, 2])
    losses = cross_entropy(logits, smallest, ignore_index=np.iinfo(np.int64).min, reduction="none")
    np.testing.assert_array_equal(losses, [0, *want])
