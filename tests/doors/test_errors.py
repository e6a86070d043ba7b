"""Bad input: an error while tracing that names the values and the way out, or NaN where only the values can show it."""

import inspect
import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, few_of, loss_and_grad, random_case

import softmax_jax
from softmax_jax import (
    SparseLabels,
    cross_entropy,
    kl_divergence,
    label_statistics,
    linear_cross_entropy,
    linear_kl_divergence,
    linear_label_statistics,
    log_softmax,
    poly_loss_cross_entropy,
    safe_softmax_cross_entropy,
    softmax,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
)
from softmax_jax._inputs.hints import ELSEWHERE

LOGITS, IDS = np.zeros((4, 7), np.float32), np.zeros(4, np.int32)
DENSE = np.full((4, 7), 1 / 7, np.float32)
SQUARE = np.zeros((4, 4), np.float32)
PIXELS = np.zeros((2, 5, 3, 3), np.float32)  # classes on axis 1


@pytest.mark.parametrize(
    ("error", "fragments", "arguments"),
    [
        (ValueError, ["(4,)", "(5,)", "integers of shape (4,)"], (LOGITS, np.zeros(5, np.int32), {})),
        (ValueError, ["(4,)", "(4, 1)", "labels.squeeze(-1)"], (LOGITS, np.zeros((4, 1), np.int32), {})),
        (ValueError, ["(4, 7)", "(4, 6)"], (LOGITS, np.zeros((4, 6), np.float32), {})),
        (ValueError, ["(4, 7)", "(7, 4)"], (LOGITS, DENSE.T, {})),
        (ValueError, ["(4, 4)", "(4,)", "floats"], (SQUARE, np.zeros(4, np.float32), {})),
        (ValueError, ["class ids in floats", "astype(jnp.int32)"], (LOGITS, np.zeros(4, np.float32), {})),
        (ValueError, ["one-hot", "`argmax`", "astype(jnp.float32)"], (LOGITS, np.eye(4, 7, dtype=np.int32), {})),
        (ValueError, ["(2, 4, 3)", "SparseLabels(*labels)"], (LOGITS, (DENSE[:, :3], DENSE[:, :3]), {})),
        (TypeError, ["int32", "`logits` first, then `labels`"], (IDS, LOGITS, {})),
        (ValueError, ["(4, 4)", "(4,)", "one-hot"], (SQUARE, np.zeros((4, 4), np.int32), {})),
        (ValueError, ["(4, 7)", "(4,)", "axis 0", "fit classes on axis 1"], (LOGITS, IDS, {"axis": 0})),
        (ValueError, ["(2, 5, 3)", "(2, 3, 3)", "fit classes on axis 1"], (PIXELS, np.zeros((2, 3, 3), np.int32), {})),
        (TypeError, ["bool", "astype(jnp.int32)"], (LOGITS, np.zeros(4, bool), {})),
        (TypeError, ["complex64", "astype"], (LOGITS, np.zeros(4, np.complex64), {})),
        (TypeError, ["`logits`", "int32", "astype(jnp.float32)"], (LOGITS.astype(np.int32), IDS, {})),
        (TypeError, ["`logits`", "bool"], (LOGITS != 0, IDS, {})),
        (TypeError, ["`logits`", "complex64"], (LOGITS.astype(np.complex64), IDS, {})),
        (ValueError, ["(4, 0)", "no classes"], (LOGITS[:, :0], IDS, {})),
        (ValueError, ["axis of classes", "()"], (np.float32(1), np.int32(0), {"axis": 0})),
        (TypeError, ["`label_smoothing`", "a bool, True"], (LOGITS, IDS, {"label_smoothing": True})),
        (TypeError, ["`normalizer`", "a bool"], (LOGITS, IDS, {"normalizer": np.bool_(True)})),
        (ValueError, ["`softcap`", "(0.0, inf); got inf"], (LOGITS, IDS, {"softcap": np.inf})),
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


@pytest.mark.parametrize("f", [cross_entropy, label_statistics], ids=lambda f: f.__name__)
def test_an_id_that_no_class_has_is_an_error_in_an_array_of_the_host(untyped, f):
    """Of a token that counts; of a device, or under `jit`, it is NaN."""
    ids = np.array([0, 7, -1, 2])
    for held in (ids, ids.tolist(), ids.astype(np.int16)):
        with pytest.raises(ValueError, match=r"from 0 to 6; got 7 at \(1,\).*`ignore_index`"):
            f(LOGITS, held)
        with pytest.raises(ValueError, match=r"got -1 at \(2,\)"):
            f(LOGITS, held, ignore_index=7)
        assert np.isnan(jax.tree.leaves(f(LOGITS, jnp.asarray(held)))[0]).any()
        assert np.isnan(jax.tree.leaves(jax.jit(f)(LOGITS, np.asarray(held)))[0]).any()
    f(LOGITS, ids, where=np.array([[True], [False], [False], [True]]))
    if f is cross_entropy:
        assert np.isfinite(f(LOGITS, ids, weights=[1, 0, 0, 1]))
        with pytest.raises(ValueError, match="got 7 at"):
            f(LOGITS, ids, weights=[1, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: kl_divergence(LOGITS, LOGITS), "`logits` by position; got 2.*`teacher_probs=` or `teacher_logits=`"),
        (lambda: cross_entropy(LOGITS, IDS, IDS), "`logits`, `labels` by position; got 3.*`weights=`"),
        (lambda: linear_cross_entropy(LOGITS, types.SimpleNamespace(kernel=1, dtype=None), IDS), "`weight.kernel`"),
        (lambda: cross_entropy(types.SimpleNamespace(requires_grad=True), IDS), r"`logits.detach\(\)`"),
        (lambda: softmax(np.float32(1)), "A scalar has none: pass `axis=None`"),
    ],
    ids=["teacher", "third", "module", "torch", "scalar"],
)
def test_calls_that_are_told_what_is_meant(untyped, call, told):
    with pytest.raises((TypeError, ValueError), match=told):
        call()


ARRAY = np.zeros((4, 7), np.float32)
NO_ARRAYS = {
    "None": (None, ["None"]),
    "dict": ({"logits": ARRAY, "aux": 1}, ["dict", "['logits', 'aux']", "['logits']`"]),
    "empty dict": ({}, ["dict"]),
    "tuple": ((ARRAY, {"aux": 1}), ["tuple of ndarray, dict", "one array"]),
    "ragged": ([[1.0, 2.0], [3.0]], ["list of list", "equal lengths"]),
    "strings": (["cat", "dog"], ["list of str", "equal lengths"]),
    "string": ("logits", ["str"]),
    "dtype": (np.array(["a", "b"]), ["dtype <U1"]),
    "objects": (np.array([None, 1]), ["dtype object"]),
    "function": (softmax, ["function"]),
    "SparseLabels": (SparseLabels(IDS[:, None], ARRAY[:, :1]), ["SparseLabels"]),
}
TAKES_ARRAYS = {
    "x": [softmax, log_softmax, lambda x: linear_cross_entropy(x, ARRAY.T, IDS)],
    "logits": [
        lambda logits: cross_entropy(logits, IDS),
        lambda logits: label_statistics(logits, IDS),
        lambda logits: kl_divergence(logits, teacher_logits=ARRAY),
        lambda logits: softmax_cross_entropy(logits, ARRAY),
        lambda logits: softmax_cross_entropy_with_integer_labels(logits, IDS),
        lambda logits: safe_softmax_cross_entropy(logits, ARRAY),
        lambda logits: poly_loss_cross_entropy(logits, ARRAY),
    ],
    "weight": [
        lambda weight: linear_cross_entropy(ARRAY, weight, IDS),
        lambda weight: linear_label_statistics(ARRAY, weight, IDS),
        lambda weight: linear_kl_divergence(ARRAY, weight, teacher_logits=ARRAY),
    ],
    "labels": [
        lambda labels: cross_entropy(LOGITS, labels),
        lambda labels: linear_cross_entropy(LOGITS, ARRAY.T, labels),
        lambda labels: label_statistics(LOGITS, labels),
        lambda labels: softmax_cross_entropy(LOGITS, labels),
        lambda labels: softmax_cross_entropy_with_integer_labels(LOGITS, labels),
        lambda labels: safe_softmax_cross_entropy(LOGITS, labels),
        lambda labels: poly_loss_cross_entropy(LOGITS, labels),
    ],
    "where": [lambda where: cross_entropy(LOGITS, IDS, where=where), lambda where: softmax(LOGITS, where=where)],
    "weights": [lambda weights: cross_entropy(LOGITS, IDS, weights=weights)],
    "class_weights": [lambda class_weights: cross_entropy(LOGITS, IDS, class_weights=class_weights)],
    "label_smoothing": [lambda value: cross_entropy(LOGITS, IDS, label_smoothing=value)],
    "bias": [lambda bias: linear_cross_entropy(LOGITS, ARRAY.T, IDS, bias=bias)],
    "teacher_logits": [lambda value: kl_divergence(LOGITS, teacher_logits=value)],
    "teacher_probs": [lambda value: kl_divergence(LOGITS, teacher_probs=value)],
    "ids": [lambda ids: cross_entropy(LOGITS, SparseLabels(ids, ARRAY[:, :1]))],
}
OPTIONAL = ("where", "weights", "class_weights", "label_smoothing", "bias", "teacher_logits", "teacher_probs")
TAKES_SPARSE = ("labels", "teacher_logits", "teacher_probs")


@pytest.mark.whole
@pytest.mark.parametrize("kind", NO_ARRAYS)
@pytest.mark.parametrize("name", TAKES_ARRAYS)
def test_what_is_no_array_is_named_with_the_way_out(untyped, name, kind):
    value, fragments = NO_ARRAYS[kind]
    if (kind == "None" and name in OPTIONAL) or (kind == "SparseLabels" and name in TAKES_SPARSE):
        return  # is one of its values, or has an error of its own
    for f in TAKES_ARRAYS[name]:
        with pytest.raises(TypeError) as caught:
            f(value)
        message = str(caught.value)
        assert all(fragment in message for fragment in [f"`{name}`", *fragments]), message
        assert message.endswith("."), "a sentence"


NUMBERS, INTEGERS, SHARES = [[1.0, 2.0], [3.0, 4.0]], [0, 1], [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("f", "arguments", "options"),
    [
        (cross_entropy, (NUMBERS, INTEGERS), {"weights": [1.0, 2.0], "where": [[True, True], [False, True]]}),
        (cross_entropy, ([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], SHARES), {"class_weights": [1, 2]}),
        (linear_cross_entropy, (NUMBERS, NUMBERS, INTEGERS), {"bias": [1.0, 0.0]}),
        (label_statistics, (NUMBERS, INTEGERS), {}),
        (kl_divergence, (NUMBERS,), {"teacher_probs": SHARES}),
        (softmax_jax.linear_kl_divergence, (NUMBERS, NUMBERS), {"teacher_x": SHARES, "teacher_weight": NUMBERS}),
        (softmax_jax.softmax, (NUMBERS,), {"where": [True, False]}),
        (softmax_jax.log_softmax, (NUMBERS,), {}),
        (softmax_jax.poly_loss_cross_entropy, (NUMBERS, SHARES), {}),
        (softmax_jax.safe_softmax_cross_entropy, (NUMBERS, SHARES), {}),
    ],
)
def test_lists_of_numbers_are_arrays(f, arguments, options):
    """For the annotations too, which are executed here."""
    arrays = jax.tree.map(jnp.asarray, (arguments, options), is_leaf=lambda a: isinstance(a, list))
    jax.tree.map(np.testing.assert_array_equal, f(*arguments, **options), f(*arrays[0], **arrays[1]))


HINTED = [
    f
    for name, f in vars(softmax_jax).items()
    if inspect.isfunction(f) and not name.startswith("_") and name != "sum_over_chunks"
]


@pytest.mark.parametrize(
    ("f", "name", "hint"),
    [
        (cross_entropy, "weight", "`class_weights` (one number a class; `weights` are one a token)"),
        (kl_divergence, "weight", "`weights` (one number a token)"),
        (cross_entropy, "dim", "`axis`"),
        (softmax, "dim", "`axis`"),
        (cross_entropy, "temperature", "`logit_scale` (1 / temperature)"),
        (linear_label_statistics, "temperature", "`logit_scale` (1 / temperature)"),
        (softmax, "temperature", "`x` (x / temperature)"),
        (softmax_cross_entropy, "temperature", "`logits` (logits / temperature)"),
        (cross_entropy, "input", "`logits`"),
        (linear_cross_entropy, "input", "`x`"),
        (cross_entropy, "target", "`labels` (class ids or probabilities)"),
        (kl_divergence, "target", "`teacher_probs`"),
        (kl_divergence, "log_targets", "`teacher_logits` (log-probabilities are logits too)"),
        (cross_entropy, "size_average", "`reduction` ('mean', 'sum' or 'none')"),
        (cross_entropy, "reduce", "`reduction` ('mean', 'sum' or 'none')"),
        (cross_entropy, "mask", "`weights` (which tokens count; `where` says which classes exist)"),
        (log_softmax, "mask", "`where` (which classes exist)"),
        (kl_divergence, "ignore_index", "`weights` (0 for tokens that do not count)"),
        (kl_divergence, "logit_scale", "`temperature` (1 / logit_scale)"),
        (linear_cross_entropy, "linear_weight", "`weight` (with transpose_weight=True for [classes, embed])"),
        (linear_cross_entropy, "lse_square_scale", "`z_loss`"),
        (linear_cross_entropy, "logit_soft_cap", "`softcap`"),
        (cross_entropy, "label_smooting", "`label_smoothing`"),
        (cross_entropy, "class_weight", "`class_weights`"),
        (cross_entropy, "label", "`labels`"),
        (softmax, "axes", "`axis`"),
    ],
    ids=lambda v: v.__name__ if callable(v) else None,
)
def test_a_name_from_elsewhere_or_misspelt_is_told_what_is_meant(f, name, hint):
    for call in (f, partial(f), jax.jit(f)):
        with pytest.raises(TypeError) as caught:
            call(**{name: ARRAY})
        assert str(caught.value) == f"{f.__name__}() got an unexpected keyword argument '{name}'. Did you mean {hint}?"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: label_statistics(LOGITS, np.eye(4, 7, dtype=np.int32)), r"by `argmax` over the classes\.$"),
        (lambda: label_statistics(LOGITS, np.zeros(5, np.int32)), r"integers of shape \(4,\)\.$"),
        (lambda: cross_entropy(LOGITS[:, :1], IDS[:, None]), r"labels.squeeze\(-1\)"),
        (lambda: softmax_cross_entropy(LOGITS, IDS), "`softmax_cross_entropy_with_integer_labels`"),
        (lambda: softmax_cross_entropy(PIXELS, LOGITS, axis=(1, 2)), r"the logits' shape, \(2, 5, 3, 3\)"),
    ],
    ids=["one-hot", "shape", "axis of size 1", "ids", "two axes"],
)
def test_the_way_out_is_one_that_the_function_has(untyped, call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize("dtype", [bool, np.complex64])
def test_probabilities_of_another_kind_are_a_type_error(untyped, dtype):
    with pytest.raises(TypeError, match="`labels` must be floating; got dtype"):
        softmax_cross_entropy(LOGITS, DENSE.astype(dtype))


def test_an_argument_that_is_given_twice_is_told_what_is_meant():
    """PyTorch's `weight` beside the head's."""
    meant = r"multiple values for argument 'weight'\. Did you mean `class_weights` \(one number a class"
    with pytest.raises(TypeError, match=meant):
        linear_cross_entropy(LOGITS, DENSE.T, IDS, weight=np.ones(4, np.float32))
    with pytest.raises(TypeError, match=r"multiple values for argument 'labels'\. Pass one of them\."):
        cross_entropy(LOGITS, IDS, labels=IDS)


def test_a_function_without_weights_is_not_told_of_the_heads():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'weights'\. Its arguments are `x`, `weight`, "):
        linear_label_statistics(LOGITS, DENSE.T, IDS, weights=IDS)


def test_each_of_several_unknown_names_has_its_line():
    with pytest.raises(TypeError) as caught:
        cross_entropy(input=LOGITS, target=IDS)
    first, second = str(caught.value).split("\n")
    assert "'input'. Did you mean `logits`?" in first and "'target'. Did you mean `labels`" in second


@pytest.mark.parametrize("f", HINTED, ids=lambda f: f.__name__)
def test_the_names_that_exist_are_told_of_every_function(f):
    """And each name that is told is one of its own."""
    names = list(inspect.signature(f).parameters)
    with pytest.raises(TypeError) as caught:
        f(LOGITS, unheard_of=1)
    assert f"{f.__name__}() got an unexpected keyword argument 'unheard_of'" in str(caught.value)
    assert re.findall("`(.*?)`", str(caught.value)) == names
    for name in ELSEWHERE.keys() - set(names):
        with pytest.raises(TypeError) as caught:
            f(LOGITS, **{name: 1})
        assert set(re.findall("`(.*?)`", str(caught.value))) <= set(names), str(caught.value)


def test_every_name_from_elsewhere_has_a_function_that_is_told_of_it():
    every = set().union(*(inspect.signature(f).parameters for f in HINTED))
    assert len(HINTED) == 12
    for name, meant in ELSEWHERE.items():
        assert meant.keys() <= every, name
        assert all(re.fullmatch("[^.?]*", note) for note in meant.values()), "a part of a sentence"
        assert not any(here == name for here in meant)


def test_an_argument_that_is_missing_is_pythons_error(untyped):
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'labels'"):
        cross_entropy(LOGITS)


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
