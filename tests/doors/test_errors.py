"""Bad input: an error while tracing that names the values and the way out, or NaN where only the values can show it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, few_of, loss_and_grad, random_case

from softmax_jax import cross_entropy

LOGITS, IDS = np.zeros((4, 7), np.float32), np.zeros(4, np.int32)
DENSE = np.full((4, 7), 1 / 7, np.float32)
SQUARE = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "fragments", "arguments"),
    [
        (ValueError, ["(4,)", "(5,)", "reshape"], (LOGITS, np.zeros(5, np.int32), {})),
        (ValueError, ["(4,)", "(4, 1)", "reshape"], (LOGITS, np.zeros((4, 1), np.int32), {})),
        (ValueError, ["(4, 7)", "(4, 6)"], (LOGITS, np.zeros((4, 6), np.float32), {})),
        (ValueError, ["(4, 7)", "(7, 4)"], (LOGITS, DENSE.T, {})),
        (ValueError, ["(4, 4)", "(4,)", "floats"], (SQUARE, np.zeros(4, np.float32), {})),
        (ValueError, ["(4, 4)", "(4,)", "integers"], (SQUARE, np.zeros((4, 4), np.int32), {})),
        (ValueError, ["(4, 7)", "(4,)", "axis 0"], (LOGITS, IDS, {"axis": 0})),
        (TypeError, ["bool", "astype(jnp.int32)"], (LOGITS, np.zeros(4, bool), {})),
        (TypeError, ["complex64", "astype"], (LOGITS, np.zeros(4, np.complex64), {})),
        (TypeError, ["`logits`", "int32", "astype(jnp.float32)"], (LOGITS.astype(np.int32), IDS, {})),
        (TypeError, ["`logits`", "bool"], (LOGITS != 0, IDS, {})),
        (TypeError, ["`logits`", "complex64"], (LOGITS.astype(np.complex64), IDS, {})),
        (ValueError, ["(4, 0)", "no classes"], (LOGITS[:, :0], IDS, {})),
        (ValueError, ["axis=0", "()"], (np.float32(1), np.int32(0), {"axis": 0})),
        (ValueError, ["axis=2", "(4, 7)", "from -2 to 1"], (LOGITS, IDS, {"axis": 2})),
        (ValueError, ["axis=-3", "(4, 7)"], (LOGITS, IDS, {"axis": -3})),
        (TypeError, ["`axis`", "int", "1.0"], (LOGITS, IDS, {"axis": 1.0})),
        (TypeError, ["`axis`", "int", "(0, 1)"], (LOGITS, IDS, {"axis": (0, 1)})),
        (TypeError, ["`axis`", "int", "None"], (LOGITS, IDS, {"axis": None})),
        (
            ValueError,
            ["`reduction`", "'batchmean'", "'mean', 'sum' or 'none'"],
            (LOGITS, IDS, {"reduction": "batchmean"}),
        ),
        (ValueError, ["`reduction`", "None"], (LOGITS, IDS, {"reduction": None})),
        (ValueError, ["`label_smoothing`", "1.5", "[0"], (LOGITS, IDS, {"label_smoothing": 1.5})),
        (ValueError, ["`label_smoothing`", "-0.1"], (LOGITS, DENSE, {"label_smoothing": -0.1})),
        (ValueError, ["`label_smoothing`", "nan"], (LOGITS, IDS, {"label_smoothing": float("nan")})),
        (
            ValueError,
            ["`label_smoothing`", "scalar", "(4,)"],
            (LOGITS, IDS, {"label_smoothing": np.zeros(4, np.float32)}),
        ),
        (ValueError, ["`softcap`", "0"], (LOGITS, IDS, {"softcap": 0})),
        (ValueError, ["`softcap`", "-30.0"], (LOGITS, IDS, {"softcap": -30.0})),
        (ValueError, ["`softcap`", "inf"], (LOGITS, IDS, {"softcap": float("inf")})),
        (ValueError, ["`z_loss`", "nan"], (LOGITS, IDS, {"z_loss": float("nan")})),
        (ValueError, ["`logit_scale`", "(1,)"], (LOGITS, IDS, {"logit_scale": np.ones(1, np.float32)})),
        (ValueError, ["`ignore_index`", "-100", "float32", "weights"], (LOGITS, DENSE, {"ignore_index": -100})),
        (TypeError, ["`ignore_index`", "1.5"], (LOGITS, IDS, {"ignore_index": 1.5})),
        (ValueError, ["`class_weights`", "(7,)", "(6,)"], (LOGITS, IDS, {"class_weights": np.ones(6, np.float32)})),
        (ValueError, ["`class_weights`", "(7,)", "()"], (LOGITS, IDS, {"class_weights": np.float32(1)})),
        (ValueError, ["`class_weights`", "(4, 7)", "weights"], (LOGITS, IDS, {"class_weights": DENSE})),
        (ValueError, ["`where`", "(4, 7)", "(4,)", "by `weights`"], (LOGITS, IDS, {"where": np.ones(4, bool)})),
        (ValueError, ["`where`", "(4, 7)", "(1, 4, 7)"], (LOGITS, IDS, {"where": np.ones((1, 4, 7), bool)})),
        (TypeError, ["`where`", "bool", "float32"], (LOGITS, IDS, {"where": DENSE})),
        (
            ValueError,
            ["`weights`", "(4,)", "(7,)", "`class_weights`"],
            (LOGITS, IDS, {"weights": np.ones(7, np.float32)}),
        ),
        (ValueError, ["`weights`", "(4,)", "(4, 1)"], (LOGITS, IDS, {"weights": np.ones((4, 1), np.float32)})),
        (TypeError, ["`weights`", "complex64"], (LOGITS, IDS, {"weights": np.ones(4, np.complex64)})),
        (ValueError, ["`normalizer`", "3", "'sum'"], (LOGITS, IDS, {"normalizer": 3, "reduction": "sum"})),
        (ValueError, ["`normalizer`", "'none'"], (LOGITS, IDS, {"normalizer": 3.0, "reduction": "none"})),
        (ValueError, ["`normalizer`", "(4,)"], (LOGITS, IDS, {"normalizer": np.ones(4, np.float32)})),
    ],
    ids=lambda v: re.sub(r"\W+", "-", str(v[0])) if isinstance(v, list) else None,
)
def test_refused_while_tracing_with_the_values_and_the_way_out(untyped, error, fragments, arguments):
    logits, labels, options = arguments
    for door in (cross_entropy, jax.jit(cross_entropy, static_argnames=tuple(options))):
        if door is not cross_entropy and any(isinstance(v, np.ndarray) for v in options.values()):
            continue  # not hashable: the same checks, shown by the first
        with pytest.raises(error) as caught:
            door(logits, labels, **options)
        message = str(caught.value)
        assert all(fragment in message for fragment in fragments), message
        assert message.rstrip().endswith("."), "a sentence"


@pytest.mark.parametrize(
    "option", [{"label_smoothing": 1.5}, {"label_smoothing": -0.1}, {"softcap": -1.0}, {"softcap": 0.0}]
)
@pytest.mark.nan
@pytest.mark.compiled
def test_a_traced_number_out_of_range_is_nan(option):
    loss, grad = loss_and_grad(jax.jit, LOGITS, IDS, np.float32(0.7), option)
    assert np.isnan(loss) and np.all(np.isnan(grad))


@pytest.mark.parametrize("names", [[], ["label_smoothing"], ["class_weights", "z_loss"], ["softcap"]], ids=str)
@pytest.mark.nan
def test_a_label_out_of_range_is_nan_in_its_row_only(rng, names):
    logits, labels, options = random_case(rng, (4, 7), names=names)
    cotangent = rng.normal(size=4).astype(np.float32)
    options["reduction"] = "none"
    for label in (-1, -7, -100, 7, 8, 2**31 - 1, -(2**31)):
        labels[2] = label
        want = reference.cross_entropy(logits, labels, cotangent=np.float64(cotangent), **options)
        assert np.isnan(want.loss[2]) and np.all(np.isnan(want.grad[2])) and np.isnan(want.grad).sum() == 7
        loss, grad = loss_and_grad(jax.jit, logits, labels, cotangent, options)
        assert_within(loss, want.loss, want.loss_condition, 8, err_msg=str(label))
        assert_within(grad, want.grad, want.grad_condition, 8, err_msg=str(label))


@pytest.mark.parametrize(
    "case",
    few_of(
        [
            (np.int8, 300, [-128, -1]),  # more classes than the ids' dtype can name
            (np.uint8, 7, [255, 7, 128]),
            (np.uint32, 7, [2**32 - 1, 2**31, 2**31 + 3, 2**32 - 7]),
            (np.int64, 7, [2**32, 2**32 + 3, -(2**32) + 3, 2**63 - 1, -(2**63)]),
            (np.int8, 7, [-128, 127, -1, 7]),
            (np.uint8, 300, []),
            (np.int16, 7, [-(2**15), 2**15 - 1]),
            (np.uint64, 7, [2**32 + 3, 2**64 - 1, 2**63]),
        ],
        4,
    ),
    ids=lambda case: f"{case[0].__name__}, {case[1]}",
)
@pytest.mark.nan
def test_labels_of_every_integer_dtype_never_wrap(rng, case):
    dtype, classes, bad = case
    good = [0, 3, 6] + ([100, 127] if classes == 300 else [])
    labels = np.array([*good, *bad], dtype)
    with jax.enable_x64(np.dtype(dtype).itemsize == 8):
        logits = rng.normal(size=(len(labels), classes)).astype(np.float32)
        cotangent = rng.normal(size=len(labels)).astype(np.float32)
        want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangent))
        assert np.all(np.isnan(want.loss[len(good) :]))
        loss, grad = loss_and_grad(jax.jit, logits, labels, cotangent, {"reduction": "none"})
        assert_within(loss, want.loss, want.loss_condition, 8)
        assert_within(grad, want.grad, want.grad_condition, 8)


@pytest.mark.parametrize("ignore_index", [-100, 255, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32])
def test_ignore_index_that_the_labels_dtype_cannot_hold_matches_nothing(rng, dtype, ignore_index):
    logits, labels, _ = random_case(rng, (4, 7))
    labels = labels.astype(dtype)
    limits = np.iinfo(dtype)
    if limits.min <= ignore_index <= limits.max:
        labels[1] = ignore_index
    want = reference.cross_entropy(logits, labels, ignore_index=ignore_index)
    got = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), ignore_index=ignore_index)
    assert_within(got, want.loss, want.loss_condition, 8)
