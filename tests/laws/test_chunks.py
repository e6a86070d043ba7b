"""Sums and maps over chunks, on functions that have nothing to do with losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softmax_jax import cross_entropy, sum_over_chunks
from softmax_jax._head.chunks import map_over

SIZE, COUNT, WIDTH = 4, 3, 5


def map_over_chunks(f, shared, chunks):
    return map_over(f, ((), shared, chunks))


def waves(shared, chunk):
    """One number a token, of a pytree with integers in it."""
    x, scale = chunk["x"], chunk["n"].astype(jnp.float32)
    return jnp.sum(jnp.sin(x @ shared["w"]) * shared["a"], -1) * scale * shared["n"].astype(jnp.float32)


def total(shared, chunk):
    return jnp.sum(waves(shared, chunk))


@pytest.fixture
def operands(rng):
    shared = {"w": rng.normal(size=(WIDTH, 7)), "a": rng.normal(), "n": np.int32(2)}
    chunks = {"x": rng.normal(size=(SIZE, COUNT, WIDTH)), "n": rng.integers(-2, 5, (SIZE, COUNT)).astype(np.int32)}
    as_float32 = lambda a: jnp.asarray(a, None if np.asarray(a).dtype == np.int32 else jnp.float32)  # noqa: E731
    return jax.tree.map(as_float32, (shared, chunks))


def plainly(f, shared, chunks):
    """[size, count], or [count] for a scalar f."""
    return jnp.stack([f(shared, jax.tree.map(lambda a, c=c: a[:, c], chunks)) for c in range(COUNT)], -1)


def gradients(f, shared, chunks):
    floats = {"w": shared["w"], "a": shared["a"], "x": chunks["x"]}
    put = lambda p: ({**shared, "w": p["w"], "a": p["a"]}, {**chunks, "x": p["x"]})  # noqa: E731
    return lambda of: of(lambda p: f(*put(p)))(floats), floats


def assert_close(got, want):
    """Sums of at most 100 terms, each of a few roundings: 64 eps of the largest entry."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=64 * 1.2e-7 * np.max(np.abs(w)))


def test_sum_and_gradients_are_the_plain_ones_under_a_random_cotangent(variant, rng, operands):
    factor = np.float32(rng.normal())
    run, _ = gradients(lambda s, c: factor * sum_over_chunks(total, s, c), *operands)
    plain, _ = gradients(lambda s, c: factor * jnp.sum(plainly(total, s, c)), *operands)
    assert_close(run(lambda f: variant(jax.value_and_grad(f))), plain(lambda f: jax.jit(jax.value_and_grad(f))))


def test_map_and_gradients_are_the_plain_ones_under_random_cotangents_a_token(variant, rng, operands):
    cotangent = jnp.asarray(rng.normal(size=(SIZE, COUNT)), jnp.float32)
    run, _ = gradients(lambda s, c: map_over_chunks(waves, s, c), *operands)
    plain, _ = gradients(lambda s, c: plainly(waves, s, c), *operands)
    pullback = lambda f: lambda p: (lambda out, pull: (out, pull(cotangent)))(*jax.vjp(f, p))  # noqa: E731
    assert_close(run(lambda f: variant(pullback(f))), plain(pullback))


@pytest.mark.parametrize("over", ["sum", "map"])
@pytest.mark.parametrize("second", ["jvp of grad", "grad of grad"])
def test_second_order(rng, operands, second, over):
    if over == "sum":
        ours, point = gradients(lambda s, c: sum_over_chunks(total, s, c) ** 2, *operands)
        plain, _ = gradients(lambda s, c: jnp.sum(plainly(total, s, c)) ** 2, *operands)
    else:
        ours, point = gradients(lambda s, c: jnp.sum(map_over_chunks(waves, s, c) ** 2), *operands)
        plain, _ = gradients(lambda s, c: jnp.sum(plainly(waves, s, c) ** 2), *operands)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), jnp.float32), point)
    if second == "jvp of grad":
        product = lambda f: jax.jit(lambda p: jax.jvp(jax.grad(f), (p,), (direction,))[1])  # noqa: E731
    else:
        dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))  # noqa: E731
        product = lambda f: jax.jit(jax.grad(lambda p: dot(jax.grad(f)(p), direction)))  # noqa: E731
    assert_close(ours(product), plain(product))


@pytest.mark.parametrize("over", ["sum", "map"])
@pytest.mark.compiled
def test_shared_gradient_is_summed_in_float32_and_does_not_drift_with_the_chunks(over):
    """1024 chunks add 1 each: a bfloat16 sum stops at 256."""
    shared, chunks = jnp.ones((), jnp.bfloat16), jnp.ones((1, 1024), jnp.float32)
    if over == "sum":
        f = lambda s: sum_over_chunks(lambda s, c: jnp.sum(s * c), s, chunks)  # noqa: E731
    else:
        f = lambda s: jnp.sum(map_over_chunks(lambda s, c: s * c, s, chunks))  # noqa: E731
    gradient = jax.grad(f)(shared)
    assert gradient == 1024 and gradient.dtype == jnp.bfloat16


def test_the_cotangent_multiplies_before_the_one_cast():
    """Σ of 70000 overflows float16 (65504); divided by 70000 it is 1."""
    shared, chunks = jnp.ones((), jnp.float16), jnp.ones((70000, 1), jnp.float32)
    mean = jax.grad(lambda s: sum_over_chunks(lambda s, c: jnp.sum(s * c), s, chunks) / 70000)
    assert mean(shared) == 1


@pytest.mark.parametrize("over", [sum_over_chunks, map_over_chunks])
@pytest.mark.parametrize("transform", [jax.grad, jax.jit], ids=["grad", "jit"])
@pytest.mark.compiled
def test_closing_over_a_traced_value_is_a_clear_error(over, transform):
    """The gradient by `a` would be dropped without a word."""
    chunks = jnp.ones((3, 2), jnp.float32)
    reduce = jnp.sum if over is sum_over_chunks else lambda a: a
    with pytest.raises(ValueError, match="closes over a traced value.*Pass that value in `shared`"):
        transform(lambda a: jnp.sum(over(lambda s, c: reduce(s * c * a), jnp.float32(1), chunks)))(jnp.float32(2))


def test_closing_over_a_constant_is_fine():
    constant = jnp.arange(3, dtype=jnp.float32)
    assert sum_over_chunks(lambda s, c: jnp.sum(s * c * constant), jnp.float32(2), jnp.ones((3, 4), jnp.float32)) == 24


def test_vmap_over_shared_and_over_chunks(operands):
    shared, chunks = operands
    two = lambda a: jnp.stack([a, 2 * a])  # noqa: E731
    f = lambda w, x: sum_over_chunks(total, {**shared, "w": w}, {**chunks, "x": x})  # noqa: E731
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [two(a) if axis == 0 else a for a, axis in zip((shared["w"], chunks["x"]), axes, strict=True)]
        got = jax.vmap(jax.value_and_grad(f, (0, 1)), axes)(*args)
        one = lambda i, args=args, axes=axes: [a if x is None else a[i] for a, x in zip(args, axes, strict=True)]  # noqa: E731
        want = jax.tree.map(lambda *a: jnp.stack(a), *(jax.value_and_grad(f, (0, 1))(*one(i)) for i in range(2)))
        assert_close(got, want)


def test_a_head_that_is_a_function(rng):
    """As in the docstring of `sum_over_chunks`: a norm, a kernel that is multiplied in bfloat16, a bias."""
    sizes = {"norm": (1, 8), "kernel": (8, 33), "bias": (1, 33)}
    params = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
    h, labels = jnp.asarray(rng.normal(size=(24, 8)), jnp.bfloat16), jnp.asarray(rng.integers(0, 33, 24))

    def total(params, chunk):
        h, labels = chunk
        h = h.astype(jnp.float32) * params["norm"]
        logits = h.astype(jnp.bfloat16) @ params["kernel"].astype(jnp.bfloat16)
        return cross_entropy(logits.astype(jnp.float32) + params["bias"], labels, reduction="sum")

    def by_chunks(params, h):
        return sum_over_chunks(total, params, (h.reshape(-1, 3, 8), labels.reshape(-1, 3)))

    got = jax.jit(jax.value_and_grad(by_chunks, (0, 1)))(params, h)
    want = jax.jit(jax.value_and_grad(lambda params, h: total(params, (h, labels)), (0, 1)))(params, h)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        # The kernel's gradient is rounded to bfloat16 in every chunk by `total` itself.
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=float(np.max(np.abs(np.float32(b)))) / 64)


@pytest.mark.parametrize(
    ("chunks", "f", "error", "message"),
    [
        ((np.ones((4, 3)), np.ones((4, 2))), lambda s, c: 0.0, ValueError, r"one size.*\(4, 3\), \(4, 2\).*Reshape"),
        (np.ones(4), lambda s, c: 0.0, ValueError, r"\[size, count, ...\].*\(4,\)"),
        ((), lambda s, c: 0.0, ValueError, r"got shapes \[\]"),
        (np.ones((4, 0)), lambda s, c: 0.0, ValueError, "there are no chunks"),
        (np.ones((4, 3), np.float32), lambda s, c: c, TypeError, r"floating scalar.*Return the chunk's sum"),
        (np.ones((4, 3), np.int32), lambda s, c: jnp.sum(c), TypeError, "floating scalar"),
        (np.ones((4, 3), np.complex64), lambda s, c: jnp.sum(jnp.abs(c)), TypeError, "must be real.*complex64"),
    ],
)
def test_bad_arguments_are_refused_with_the_way_out(chunks, f, error, message):
    with pytest.raises(error, match=message):
        sum_over_chunks(f, np.float32(1), chunks)


def test_16_bit_chunks_are_float32_whether_a_gradient_is_asked_or_not(rng):
    """A sum in bfloat16 would be off by its rounding, and by another number than the one beside a gradient."""
    chunks, seen = jnp.asarray(rng.normal(size=(512, 4)), jnp.bfloat16), []

    def total(shared, chunk):
        seen.append(chunk.dtype)
        return shared * jnp.sum(chunk * chunk)

    loss = lambda shared, chunks: sum_over_chunks(total, shared, chunks)  # noqa: E731
    alone, (beside, (_, gradient)) = loss(1.0, chunks), jax.value_and_grad(loss, (0, 1))(1.0, chunks)
    assert set(seen) == {jnp.dtype(jnp.float32)} and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose([alone, beside], np.sum(np.float64(chunks) ** 2), rtol=1e-5)
