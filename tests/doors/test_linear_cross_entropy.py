"""The loss from hidden states: against float64, against the plain door, at every chunk size."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import ALONE, FLOATS, assert_within, epsilon, few_of, random_case

from softmax_jax import cross_entropy, linear_cross_entropy
from softmax_jax._head.deal import KEPT_TOKENS, chunk_counts
from softmax_jax._head.product import head as head_of

AWKWARD = (252, 507, 123)  # tokens, embed, classes


def head_case(rng, batch, embed, classes, dtype, dense=False, names=()):
    """(operands, labels, options), the operands rounded to dtype."""
    _, labels, options = random_case(rng, (*batch, classes), -1, jnp.float32, dense, names)
    x = rng.normal(size=(*batch, embed)).astype(dtype)
    weight = (2 * rng.normal(size=(embed, classes)) / np.sqrt(embed)).astype(dtype)
    bias = rng.normal(size=classes).astype(np.float32)
    del options["axis"]
    return (x, weight, bias), labels, options


@partial(jax.jit, static_argnums=0)  # one for all tests: equal cases compile once
def loss_and_gradients(static, operands, labels, traced, cotangent):
    def loss(x, weight, bias):
        return linear_cross_entropy(x, weight, labels, bias=bias, **dict(static), **traced)

    value, pull = jax.vjp(loss, *operands)
    return value, pull(cotangent.astype(value.dtype))


def check(rng, operands, labels, options, chunk_size=None, k=8):
    """Loss, dx, dweight, dbias within k eps of their conditions, under a random cotangent.

    A logit is off by eps · (|x| |weight| + |bias|), which enters like the rounding of the logit itself; a gradient is
    one product more, of `dlogits` rounded to the operands' dtype (for float16 also by half its smallest number).
    """
    x, weight, bias = (np.asarray(a, np.float64) for a in operands)
    dtype, batch = operands[0].dtype, x.shape[:-1]
    cotangent = 3 * rng.normal(size=batch if options.get("reduction") == "none" else ())
    logits = x @ weight + bias
    size = 1 + np.max(np.abs(x) @ np.abs(weight) + np.abs(bias), initial=0)
    want = reference.cross_entropy(logits, labels, cotangent=cotangent, **options)

    static = tuple((name, options[name]) for name in ("reduction", "ignore_index") if name in options)
    traced = {name: option for name, option in options.items() if name not in dict(static)}
    got, (dx, dweight, dbias) = loss_and_gradients(
        (("chunk_size", chunk_size), *static), operands, labels, traced, np.float32(cotangent)
    )
    assert_within(got, want.loss, want.loss_condition * size, k, got.dtype, "loss")

    rounding = 0 if dtype == jnp.float32 else epsilon(dtype) / epsilon(jnp.float32) / k
    condition = want.grad_condition * size + rounding * np.abs(want.grad)
    if dtype == jnp.float16:  # before the divisor is applied, as the rule has it
        scale = np.max(np.abs(cotangent), initial=0) / (
            1 if options.get("reduction") in ("sum", "none") else labels.size
        )
        condition = condition + 2**-24 * scale / epsilon(jnp.float32)
    d, c = (a.reshape(-1, a.shape[-1]) for a in (want.grad, condition))
    rows = x.reshape(-1, x.shape[-1])
    products = {
        "dx": (dx, (d @ weight.T).reshape(x.shape), (c @ np.abs(weight).T).reshape(x.shape), dtype),
        "dweight": (dweight, rows.T @ d, np.abs(rows).T @ c, dtype),
        "dbias": (dbias, d.sum(0), c.sum(0), jnp.float32),
    }
    for name, (gradient, truth, bound, stored) in products.items():
        assert gradient.dtype == stored
        assert_within(gradient, truth, bound, 2 * k, stored, name)


@pytest.mark.diagonal
@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
@pytest.mark.parametrize("dtype", few_of([jnp.float32, jnp.bfloat16, jnp.float16]), ids=lambda d: d.__name__)
def test_all_options_together_at_awkward_sizes(rng, dtype, dense):
    tokens, embed, classes = AWKWARD
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    operands, labels, options = head_case(rng, (tokens,), embed, classes, dtype, dense, names)
    check(rng, operands, labels, options, chunk_size=100)


@pytest.mark.diagonal
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_size", few_of([4, 1, 15, 5, 99], 3))
def test_every_chunk_size(rng, chunk_size, reduction):
    """One token, a non-divisor, a divisor, all, more than there are."""
    operands, labels, options = head_case(rng, (3, 5), 6, 11, jnp.float32, names=("weights", "ignore_index"))
    check(rng, operands, labels, {**options, "reduction": reduction}, chunk_size)


@pytest.mark.diagonal
@pytest.mark.parametrize("batch", [(), (1,), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_leading_shape_and_no_tokens(rng, batch, reduction):
    operands, labels, options = head_case(rng, batch, 6, 11, jnp.float32)
    check(rng, operands, labels, {**options, "reduction": reduction})


@pytest.mark.parametrize("classes", few_of([50257, 128256]))
def test_many_classes(rng, classes):
    operands, labels, options = head_case(rng, (12,), 8, classes, jnp.bfloat16, names=("class_weights",))
    check(rng, operands, labels, options, chunk_size=5)


@pytest.mark.diagonal
@pytest.mark.parametrize("shape", few_of([(3, 1, 11), (3, 5, 1), (11,), (5, 11), (3, 5, 11)], 2), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_where_of_every_rank(rng, shape, reduction):
    """Per class, per group of tokens, per token and class, per token: chunk by chunk the same as whole."""
    operands, labels, _ = head_case(rng, (3, 5), 6, 11, jnp.float32)
    where = rng.random(shape) < 0.7
    check(rng, operands, labels, {"where": where, "reduction": reduction}, chunk_size=4)


@pytest.mark.diagonal
@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
@pytest.mark.parametrize("reduction", few_of(["none", "mean"]))
def test_gradients_of_every_other_operand_are_those_of_the_plain_door(rng, reduction, dense):
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    (x, weight, bias), labels, options = head_case(rng, (4, 5), 6, 11, jnp.float32, dense, names)
    floats = {name: jnp.asarray(options.pop(name)) for name in ("weights", "class_weights", *FLOATS)}
    floats |= {"labels": jnp.asarray(labels)} if dense else {}
    cotangent = jnp.asarray(3 * rng.normal(size=(4, 5) if reduction == "none" else ()), jnp.float32)
    logits = jnp.asarray((x.astype(np.float64) @ weight + bias).astype(np.float32))

    def gradients(door):
        def loss(floats):
            rest = {k: v for k, v in floats.items() if k != "labels"}
            return jnp.sum(cotangent * door(floats.get("labels", labels), reduction=reduction, **options, **rest))

        return jax.jit(jax.grad(loss))(floats)

    got = gradients(lambda y, **o: linear_cross_entropy(x, weight, y, bias=bias, chunk_size=6, **o))
    want = gradients(lambda y, **o: cross_entropy(logits, y, **o))
    for name in floats:
        # Sums over 20 tokens of terms of either sign, each as large as the loss times the cotangent.
        size = np.max(np.abs(want[name])) + 10 * float(np.max(np.abs(cotangent)))
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=64 * epsilon(jnp.float32) * size, err_msg=name)


def test_tied_embeddings_are_the_transposed_head(rng):
    (x, weight, bias), labels, _ = head_case(rng, (7,), 6, 11, jnp.float32)
    plain = lambda x, w: linear_cross_entropy(x, w, labels, chunk_size=3)  # noqa: E731
    tied = lambda x, w: linear_cross_entropy(x, w, labels, transpose_weight=True, chunk_size=3)  # noqa: E731
    both = jax.jit(lambda x, w: (jax.grad(plain, (0, 1))(x, w), jax.grad(tied, (0, 1))(x, w.T)))
    plain, (dx, dweight) = both(x, weight)
    np.testing.assert_allclose(dx, plain[0], rtol=0, atol=16 * epsilon(jnp.float32) * np.max(np.abs(weight)))
    np.testing.assert_allclose(dweight, plain[1].T, rtol=0, atol=16 * epsilon(jnp.float32) * np.max(np.abs(x)))


@pytest.mark.thorough
@pytest.mark.parametrize("reduction", few_of(["mean", "none"], thorough=0))
def test_hessian_vector_products_and_transforms(rng, reduction):
    """jvp of grad, vmap over batches and over heads, scan, checkpoint: each against the plain door under the same."""
    (x, weight, _), labels, _ = head_case(rng, (2, 6), 5, 11, jnp.float32)
    labels = jnp.asarray(labels)
    linear = lambda x, w, y: jnp.sum(linear_cross_entropy(x, w, y, chunk_size=4, reduction=reduction) ** 2)  # noqa: E731
    plain = lambda x, w, y: jnp.sum(cross_entropy(x @ w, y, reduction=reduction) ** 2)  # noqa: E731
    x, weight, heads = jnp.asarray(x), jnp.asarray(weight), jnp.stack([weight, -weight])

    def product(f, x, weight, heads):
        g = jax.grad(f, (0, 1))
        return jax.jvp(lambda x, w: g(x, w, labels), (x, weight), (0.5 * x, x[0, 0, :, None] * weight))

    def scanned(f, x, weight, heads):
        step = lambda w, xy: (w - 0.1 * jax.grad(jax.checkpoint(f), 1)(xy[0], w, xy[1]), f(xy[0], w, xy[1]))  # noqa: E731
        return jax.lax.scan(step, weight, (x, labels))

    transforms = [
        product,
        scanned,
        lambda f, x, weight, heads: jax.vmap(jax.grad(f, (0, 1)), (0, None, 0))(x, weight, labels),
        lambda f, x, weight, heads: jax.vmap(jax.grad(f, (0, 1)), (None, 0, None))(x, heads, labels),
        lambda f, x, weight, heads: jax.vmap(jax.value_and_grad(f), (0, 0, 0))(x, heads, labels),
    ]

    @partial(jax.jit, static_argnums=0)
    def every(f, *operands):
        return [transform(f, *operands) for transform in transforms]

    for got, want in zip(*(jax.tree.leaves(every(f, x, weight, heads)) for f in (linear, plain)), strict=True):
        # Two orders of a sum of 12 tokens: 128 eps of the largest entry.
        np.testing.assert_allclose(got, want, rtol=0, atol=128 * epsilon(jnp.float32) * np.max(np.abs(want)))


def test_bitwise_repeatable(rng):
    operands, labels, _ = head_case(rng, (64,), 16, 123, jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels, chunk_size=10), (0, 1)))
    first, second = f(*operands[:2]), f(*operands[:2])
    chex.assert_trees_all_equal(first, second)


def test_donated_operands(rng):
    (x, weight, _), labels, _ = head_case(rng, (64,), 16, 123, jnp.float32)
    f = jax.value_and_grad(lambda x, w: linear_cross_entropy(x, w, labels, chunk_size=10), (0, 1))
    want = jax.jit(f)(x, weight)
    got = jax.jit(f, donate_argnums=(0, 1))(jnp.array(x), jnp.array(weight))
    chex.assert_trees_all_close(got, want, rtol=16 * epsilon(jnp.float32), atol=1e-7)


@pytest.mark.nan
def test_a_row_of_weight_zero_may_hold_anything(rng):
    """NaN and inf in x, a label out of range: exactly 0 in loss and in every gradient, the head's too."""
    (x, weight, bias), labels, _ = head_case(rng, (9,), 6, 11, jnp.float32)
    weights = np.ones(9, np.float32)
    weights[[2, 5]] = 0
    bad, bad_labels = x.copy(), labels.copy()
    bad[2], bad[5, 0], bad_labels[5] = np.nan, np.inf, 99
    for reduction in ("sum", "none"):

        def loss(x, w, b, labels, reduction=reduction):
            out = linear_cross_entropy(x, w, labels, bias=b, weights=weights, chunk_size=4, reduction=reduction)
            return jnp.sum(out)

        run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        got, want = run(bad, weight, bias, bad_labels), run(np.where(weights[:, None] == 0, 0, x), weight, bias, labels)
        chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("reduction", few_of(["mean", "none"]))
def test_several_super_chunks_of_16_bits(rng, reduction):
    """5000 tokens of a head that is narrower than their number: what is kept of the logits' gradient is that of at
    most 4096 tokens, in chunks of 500, and the last is padded."""
    operands, labels, options = head_case(rng, (5000,), 8, 33, jnp.bfloat16, names=["weights", "where"])
    check(rng, operands, labels, options | {"reduction": reduction}, chunk_size=500, k=16)


def test_what_they_are_multiplied_in(rng):
    """A bfloat16 x and a float32 head, as Flax has them: equal to the product of both in bfloat16, each gradient in its
    operand's dtype, the head's with more digits than bfloat16 has."""
    x, weight = rng.normal(size=(64, 16)).astype(jnp.bfloat16), rng.normal(size=(16, 50)).astype(np.float32)
    labels = rng.integers(0, 50, 64).astype(np.int32)
    both = jax.jit(jax.value_and_grad(partial(linear_cross_entropy, dtype=jnp.bfloat16), (0, 1)))
    text = both.lower(x, weight, labels).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all(line.count("xbf16>") == 2 for line in products)

    loss, (dx, dweight) = both(x, weight, labels)
    assert (loss.dtype, dx.dtype, dweight.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = weight.astype(jnp.bfloat16)
    want, (of_x, of_rounded) = jax.value_and_grad(linear_cross_entropy, (0, 1))(x, rounded, labels)
    assert loss == want
    np.testing.assert_array_equal(dx, of_x)
    np.testing.assert_array_equal(dweight.astype(jnp.bfloat16), of_rounded)
    assert np.any(np.asarray(dweight) != np.asarray(of_rounded, np.float32))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("dtype", [jnp.int32, "no such format", jnp.float8_e4m3fn])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(TypeError, match="`dtype` must be .*Pass jnp.bfloat16, say, or None"):
        linear_cross_entropy(np.ones((3, 4), np.float32), np.ones((4, 5), np.float32), np.zeros(3, int), dtype=dtype)


FORMATS = [("float32", "float64", None), ("float64", "float64", "bfloat16"), ("float32", "float32", "float64")]


@pytest.mark.parametrize("formats", few_of([*FORMATS, ("bfloat16", "float32", None)]), ids=str)
def test_sums_over_chunks_are_in_the_accumulator_of_the_product(rng, formats):
    """Whatever the operands' own dtypes are; several chunks, several super-chunks."""
    of_x, of_weight, dtype = formats
    with jax.enable_x64(True):
        x, weight = jnp.asarray(rng.normal(size=(40, 4)), of_x), jnp.asarray(rng.normal(size=(4, 9)), of_weight)
        labels = rng.integers(0, 9, 40)

        def by_chunks(x, weight):
            return linear_cross_entropy(x, weight, labels, chunk_size=8, dtype=dtype)

        def plain(x, weight):
            return cross_entropy(x.astype(jnp.float64) @ weight.astype(jnp.float64), labels)

        got, want = (jax.jit(jax.grad(f, (0, 1)))(x, weight) for f in (by_chunks, plain))
        rounded = max(epsilon(a) for a in (of_x, of_weight, dtype or of_x))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=0, atol=4 * rounded * np.max(np.abs(b)))


def test_small_chunks_are_not_padded_to_the_size_of_a_super_chunk():
    for tokens, size in [(4200, 1), (4200, 16), (8400, 8), (18001, 100), (9000, 500)]:
        head = head_of(jnp.zeros((tokens, 8), jnp.bfloat16), jnp.zeros((8, 9), jnp.bfloat16), None, False)
        chunks, super_chunks = chunk_counts((tokens,), size, head)
        assert chunks % super_chunks == 0 and super_chunks == -(-tokens // KEPT_TOKENS)
        assert -(-tokens // chunks) <= size and -(-tokens // chunks) * chunks <= 1.01 * tokens
