"""What the linear door promises beside the numbers: memory, work, errors, and freedom from failures known elsewhere."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import epsilon, few_of

from softmax_jax import cross_entropy, linear_cross_entropy
from softmax_jax._head.deal import KEPT_TOKENS

TOKENS, EMBED, CLASSES, CHUNK = 2048, 512, 32000, 512


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, d) for s, d in shapes)).compile()


def temporary(tokens, dtype):
    f = jax.value_and_grad(lambda x, w, y: linear_cross_entropy(x, w, y, chunk_size=CHUNK), (0, 1))
    program = compiled(f, ((tokens, EMBED), dtype), ((EMBED, CLASSES), dtype), ((tokens,), jnp.int32))
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_memory_is_a_chunk_what_is_kept_and_the_heads_gradient_whatever_the_tokens(dtype):
    chunk, head, kept = 4 * CHUNK * CLASSES, 4 * EMBED * CLASSES, 2 * KEPT_TOKENS * CLASSES
    tokens = 2 * (TOKENS if dtype == jnp.float32 else KEPT_TOKENS)
    once, twice = temporary(tokens, dtype), temporary(2 * tokens, dtype)
    assert once <= 1.1 * (2 * chunk if dtype == jnp.float32 else chunk + kept + head)
    # Doubling the tokens adds dx as the loop has it, in float32, and at most a copy of x in the loop's layout.
    assert twice - once <= 2 * tokens * EMBED * 4 + 2**16


@pytest.mark.parametrize(("asked", "products"), [((0, 1), 3), ((0,), 2), ((1,), 2), ((), 1)], ids=str)
@pytest.mark.compiled
def test_a_frozen_head_or_backbone_is_not_paid_for(asked, products):
    """The product whose result nobody asked for is not in the program."""
    shapes = (((64, 128), jnp.float32), ((128, 1000), jnp.float32), ((64,), jnp.int32))
    loss = lambda x, w, y: linear_cross_entropy(x, w, y, chunk_size=16)  # noqa: E731
    text = compiled(jax.grad(loss, asked) if asked else loss, *shapes).as_text()
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) == products


@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_no_gradient_of_dense_labels_unless_asked_for():
    """It is as large as the logits."""
    shapes = (((64, 16), jnp.float32), ((16, 1000), jnp.float32), ((64, 1000), jnp.float32))
    loss = lambda x, w, t: linear_cross_entropy(x, w, t, chunk_size=8)  # noqa: E731
    without = compiled(jax.grad(loss, (0, 1)), *shapes).memory_analysis()
    assert without.temp_size_in_bytes + without.output_size_in_bytes < 4 * 64 * 1000


@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_tied_embeddings_are_not_copied():
    """[classes, embed] goes into the product as it is."""
    shapes = (((256, 64), jnp.float32), ((20000, 64), jnp.float32), ((256,), jnp.int32))
    loss = lambda x, w, y: linear_cross_entropy(x, w, y, transpose_weight=True, chunk_size=16)  # noqa: E731
    chunk, head = 4 * 16 * 20000, 4 * 64 * 20000
    assert compiled(loss, *shapes).memory_analysis().temp_size_in_bytes <= 2 * chunk + head / 4


@pytest.mark.parametrize("transposed", [True, False], ids=["classes x embed", "embed x classes"])
@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_one_chunk_with_its_gradient_is_one_array_of_its_logits(transposed):
    """The gradient is written in their place, and neither product copies it; beside it there is a block of tokens."""
    tokens, embed, classes = 512, 512, 65536
    head = (classes, embed) if transposed else (embed, classes)
    shapes = (((tokens, embed), jnp.float32), (head, jnp.float32), ((tokens,), jnp.int32))
    loss = lambda x, w, y: linear_cross_entropy(x, w, y, transpose_weight=transposed)  # noqa: E731
    memory = compiled(jax.value_and_grad(loss, (0, 1)), *shapes).memory_analysis()
    assert memory.temp_size_in_bytes <= 1.05 * 4 * tokens * classes


@pytest.mark.cpu_compiler  # which adds up the sums in one pass one class after the other
def test_padded_tokens_are_not_counted(rng):
    """Failure 2: peaked and tiny logits, a size that no chunk divides; a padded row would add exp(0) a class."""
    for scale in (1e-3, 50.0):
        x, weight = (np.float32(scale) * rng.normal(size=s).astype(np.float32) for s in ((520, 8), (8, 521)))
        labels = rng.integers(0, 521, 520).astype(np.int32)
        logits = x.astype(np.float64) @ weight
        m = logits.max(1, keepdims=True)
        want = np.mean(np.log(np.exp(logits - m).sum(1)) + m[:, 0] - logits[np.arange(520), labels])
        got = linear_cross_entropy(x, weight, labels, chunk_size=257)
        size = 1 + np.max(np.abs(x) @ np.abs(weight))
        np.testing.assert_allclose(got, want, rtol=0, atol=8 * epsilon(jnp.float32) * size)


def test_bias_is_added_once(rng):
    """Failure 3: every dimension spans several chunks or tiles and a ragged one."""
    x, weight = (rng.normal(size=s).astype(np.float32) for s in ((300, 515), (515, 777)))
    bias = np.float32(100) * (np.arange(777) == 3)
    labels = np.full(300, 3, np.int32)
    got = linear_cross_entropy(np.zeros_like(x), weight, labels, bias=bias, chunk_size=77)
    np.testing.assert_allclose(got, np.log1p(776 * np.exp(-np.float64(100))), rtol=1e-5, atol=1e-38)


def test_the_upstream_cotangent_of_every_token_arrives(rng):
    """Failure 4: not dropped, not row 0's, not folded in too late."""
    x, weight = (rng.normal(size=s).astype(np.float32) for s in ((13, 4), (4, 9)))
    labels, cotangent = rng.integers(0, 9, 13).astype(np.int32), rng.normal(size=13).astype(np.float32)
    pull = jax.vjp(lambda x: linear_cross_entropy(x, weight, labels, reduction="none", chunk_size=4), x)[1]
    one = jax.vjp(lambda x: linear_cross_entropy(x, weight, labels, reduction="none", chunk_size=4), x)[1]
    rows = np.stack([one(jnp.asarray((np.arange(13) == i) * cotangent[i], jnp.float32))[0][i] for i in range(13)])
    np.testing.assert_allclose(pull(cotangent)[0], rows, rtol=1e-5, atol=1e-7)
    scaled = jax.grad(lambda x: -2.5 * linear_cross_entropy(x, weight, labels, chunk_size=4))(x)
    unit = jax.grad(lambda x: linear_cross_entropy(x, weight, labels, chunk_size=4))(x)
    np.testing.assert_allclose(scaled, -2.5 * unit, rtol=1e-6)


@pytest.mark.parametrize("dtype", few_of([jnp.bfloat16, jnp.float32]), ids=lambda d: d.__name__)
def test_error_of_the_heads_gradient_does_not_grow_over_1024_chunks(rng, dtype):
    """Failure 6: float32 sums; the error at 1024 chunks is at most twice that of one chunk, plus one rounding."""
    x = rng.normal(size=(1024, 8)).astype(dtype)
    weight, labels = rng.normal(size=(8, 17)).astype(dtype), rng.integers(0, 17, 1024).astype(np.int32)
    logits = x.astype(np.float64) @ weight.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    d = p / p.sum(1, keepdims=True) - np.eye(17)[labels]
    truth = x.astype(np.float64).T @ d
    error = []
    for size in (1024, 1):
        f = jax.grad(lambda w, size=size: linear_cross_entropy(x, w, labels, reduction="sum", chunk_size=size))
        error.append(np.max(np.abs(np.asarray(f(jnp.asarray(weight)), np.float64) - truth)))
    assert error[1] <= 2 * error[0] + epsilon(jnp.float32) * 8 * np.sqrt(1024) * np.max(np.abs(x.astype(np.float64)))


def test_probabilities_of_the_gradient_are_those_of_the_loss_in_bfloat16(rng):
    """Failure 8: the logits of forward and backward are one float32 product, so dlogits sums to 0 also at 640."""
    x, weight = (rng.normal(size=s).astype(jnp.bfloat16) for s in ((16, 64), (64, 100)))
    weight = (weight.astype(np.float32) * 80).astype(jnp.bfloat16)
    labels = rng.integers(0, 100, 16).astype(np.int32)
    assert np.max(np.abs(x.astype(np.float32) @ weight.astype(np.float32))) > 640
    dbias = jax.grad(lambda b: linear_cross_entropy(x, weight, labels, bias=b, reduction="sum"))(jnp.zeros(100))
    assert abs(float(jnp.sum(dbias))) <= 32 * epsilon(jnp.float32) * float(jnp.sum(jnp.abs(dbias)))


def test_a_rows_loss_is_the_same_whatever_the_other_rows_hold(rng):
    """Failure 17: bitwise, at one shape and chunk size."""
    x, weight = (rng.normal(size=s).astype(np.float32) for s in ((12, 8), (8, 50)))
    labels = rng.integers(0, 50, 12).astype(np.int32)
    other = np.where(np.arange(12)[:, None] == 7, x, rng.normal(size=x.shape).astype(np.float32))
    f = jax.jit(lambda x: linear_cross_entropy(x, weight, labels, reduction="none", chunk_size=5))
    assert f(x)[7] == f(other)[7]


def test_the_softcap_is_on_the_labels_own_logit_too(rng):
    """Failure 22."""
    x, weight = np.eye(3, dtype=np.float32), np.float32(100) * np.eye(3, dtype=np.float32)
    got = linear_cross_entropy(x, weight, np.arange(3), softcap=2.0, reduction="none")
    np.testing.assert_allclose(got, np.log1p(2 * np.exp(-2 * np.tanh(50.0))), rtol=1e-6)


def test_float16_with_65536_tokens(rng):
    """The divisor multiplies after the products: folded in before, dlogits would round away in float16."""
    tokens, embed, classes = 65536, 8, 16
    x, weight = (rng.normal(size=s).astype(np.float16) for s in ((tokens, embed), (embed, classes)))
    labels = rng.integers(0, classes, tokens).astype(np.int32)
    logits = x.astype(np.float64) @ weight.astype(np.float64)
    p = np.exp(logits - logits.max(1, keepdims=True))
    d = (p / p.sum(1, keepdims=True) - np.eye(classes)[labels]) / tokens
    dweight = jax.grad(lambda w: linear_cross_entropy(x, w, labels))(jnp.asarray(weight))
    truth = x.astype(np.float64).T @ d
    # dlogits is rounded to float16 (eps/2 each, at random), and the result once.
    error = np.linalg.norm(np.asarray(dweight, np.float64) - truth) / np.linalg.norm(truth)
    assert error <= epsilon(np.float16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_weights_beyond_float16_cancel_in_its_gradients(rng, reduction):
    """Equal weights w, over w: dlogits is scaled into float16's range before it is rounded to it."""
    x, weight = (rng.normal(size=s).astype(np.float16) for s in ((64, 8), (8, 16)))
    labels = rng.integers(0, 16, 64).astype(np.int32)

    @jax.jit
    def gradients(x, w, weight_of_all):
        def loss(x, w):
            weights = jnp.full(64, weight_of_all)
            out = linear_cross_entropy(x, w, labels, weights=weights, chunk_size=20, reduction=reduction)
            return out if reduction == "mean" else jnp.sum(out / (64 * weight_of_all))

        return jax.grad(loss, (0, 1))(x, w)

    p = np.exp(x.astype(np.float64) @ weight.astype(np.float64))
    d = (p / p.sum(1, keepdims=True) - np.eye(16)[labels]) / 64
    truths = d @ weight.astype(np.float64).T, x.astype(np.float64).T @ d
    for weight_of_all in np.array([1e-9, 1e-6, 1, 1e5, 1e8], np.float32):
        for got, truth in zip(gradients(x, weight, weight_of_all), truths, strict=True):
            # dlogits is rounded to float16 and so is the result: eps/2 each, at random; its subnormals beside.
            error = np.linalg.norm(np.asarray(got, np.float64) - truth) / np.linalg.norm(truth)
            assert error <= epsilon(np.float16), weight_of_all


@pytest.mark.parametrize(
    ("of_x", "of_weight"), [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")]
)
def test_operands_of_two_dtypes_multiply_in_their_promotion(rng, of_x, of_weight):
    """Also under strict promotion, which these tests have on; each gradient in its operand's dtype."""
    x, weight = rng.normal(size=(6, 8)).astype(jnp.dtype(of_x)), rng.normal(size=(8, 16)).astype(jnp.dtype(of_weight))
    labels = rng.integers(0, 16, 6).astype(np.int32)
    loss, (dx, dweight) = jax.value_and_grad(linear_cross_entropy, (0, 1))(x, weight, labels)
    want = cross_entropy(jnp.asarray(x, jnp.float32) @ jnp.asarray(weight, jnp.float32), labels)
    np.testing.assert_allclose(loss, want, rtol=16 * epsilon(jnp.float32))
    assert (dx.dtype, dweight.dtype) == (x.dtype, weight.dtype)


def test_one_chunk_is_the_plain_path(rng):
    """No loop in the program of a small input."""
    x, weight = (rng.normal(size=s).astype(np.float32) for s in ((4, 8), (8, 30)))
    labels = rng.integers(0, 30, 4).astype(np.int32)
    assert "while" not in jax.jit(jax.grad(linear_cross_entropy)).lower(x, weight, labels).as_text()
    np.testing.assert_allclose(
        linear_cross_entropy(x, weight, labels), cross_entropy(x @ weight, labels), rtol=8 * epsilon(jnp.float32)
    )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": np.ones((5, 4), np.float32)},
            ValueError,
            r"x.shape=\(3, 4\).*weight.shape=\(5, 4\).*transpose_weight",
        ),
        ({"x": np.ones((3, 7), np.float32)}, ValueError, r"the hidden states that this head takes, \[\.\.\., 4\]"),
        ({"weight": np.ones(4, np.float32)}, ValueError, r"weight.shape=\(4,\)"),
        ({"weight": np.ones((4, 0), np.float32)}, ValueError, "no classes"),
        ({"weight": np.ones((4, 5), np.int32)}, TypeError, "`weight` must be floating; got dtype int32"),
        ({"x": np.ones((3, 4), np.int32)}, TypeError, "`x` must be floating"),
        ({"x": np.float32(1)}, ValueError, r"x.shape=\(\)"),
        ({"labels": np.zeros((2,), np.int32)}, ValueError, r"labels.shape=\(2,\).*\(3, 5\)"),
        ({"bias": np.ones(4, np.float32)}, ValueError, r"\(5,\); got bias.shape=\(4,\)"),
        ({"chunk_size": 0}, ValueError, "at least 1 token; got 0"),
        ({"chunk_size": 1.5}, TypeError, "must be an int; got 1.5"),
        ({"class_weights": np.ones(4, np.float32)}, ValueError, r"\(5,\); got class_weights.shape=\(4,\)"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(change, error, message):
    arguments = {
        "x": np.ones((3, 4), np.float32),
        "weight": np.ones((4, 5), np.float32),
        "labels": np.zeros(3, np.int32),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))


@pytest.mark.compiled
def test_the_next_token_by_weights_and_rolled_labels_is_that_of_slices_without_a_copy_of_x(rng):
    """As the README has it: the last position of each row has weight 0."""
    x, head = rng.normal(size=(4, 9, 16)).astype(np.float32), rng.normal(size=(16, 50)).astype(np.float32)
    tokens = rng.integers(0, 50, (4, 9))

    def rolled(x, head, tokens, size=None):
        counts = jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1
        return linear_cross_entropy(x, head, jnp.roll(tokens, -1, 1), weights=counts, chunk_size=size)

    def sliced(x, head, tokens, size=None):
        return linear_cross_entropy(x[:, :-1], head, tokens[:, 1:], chunk_size=size)

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1)))(x, head, tokens) for f in (rolled, sliced))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

    shapes = (((256, 128, 512), jnp.float32), ((512, 100), jnp.float32), ((256, 128), jnp.int32))
    of_chunks = lambda f: compiled(partial(f, size=2048), *shapes).memory_analysis()  # noqa: E731
    saved = of_chunks(sliced).temp_size_in_bytes - of_chunks(rolled).temp_size_in_bytes
    assert saved > 0.9 * 4 * 256 * 127 * 512
