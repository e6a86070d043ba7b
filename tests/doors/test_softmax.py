"""`softmax` and `log_softmax` against the float64 reference and against jax.nn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import assert_within, at_margins, compilations, epsilon, few_of, relative_error
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from softmax_jax import _softmax, log_softmax, softmax
from softmax_jax._sums import blocks

DOORS = {
    "softmax": (softmax, reference.softmax, jax.nn.softmax),
    "log_softmax": (log_softmax, reference.log_softmax, jax.nn.log_softmax),
}
doors = pytest.mark.parametrize(("ours", "truth", "peer"), DOORS.values(), ids=DOORS)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
AXES = [((5, 252), -1), ((3, 7, 4), 1), ((3, 7, 4), (0, -1)), ((5, 1), 1), ((123, 3), 0), ((3, 7, 4), None), ((9,), 0)]


def condition_of(x, value, axis, log):
    """exp of a rounded x - max ≤ 2 max|x| is off by as many eps, the logarithm by that and by its own rounding."""
    size = 2 + 2 * np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0)
    return np.where(np.isfinite(value), size * (1 if log else np.abs(value)), 0)


def pullback(f, x, cotangent):
    y, pull = jax.vjp(f, x)
    return y, pull(jnp.asarray(cotangent))[0]


def true_gradient(p, g, axis, log):
    """softmax: p (g - Σ g p), as p_v Σ_u p_u (g_v - g_u) would give it; log_softmax: g - p Σ g."""
    inner = np.sum(g if log else g * p, axis, keepdims=True)
    return (g - p * inner, abs(g) + p * abs(inner)) if log else (p * (g - inner), p * (abs(g) + abs(inner)))


@pytest.mark.diagonal
@doors
@pytest.mark.parametrize("shape_and_axis", few_of(AXES, 4), ids=str)
def test_value_and_gradient(device, rng, shape_and_axis, ours, truth, peer):
    shape, axis = shape_and_axis
    x, g = (3 * rng.normal(size=shape)).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    y, dx = jax.jit(lambda x, g: pullback(lambda x: ours(x, axis), x, g))(x, g)
    log = ours is log_softmax
    want = truth(x, axis)
    assert_within(y, want, condition_of(x, want, axis, log), 4)
    gradient, size = true_gradient(reference.softmax(x, axis), np.float64(g), axis, log)
    assert_within(dx, gradient, size * (2 + 2 * abs(x).max()), 4)
    y_too, dx_too = jax.jit(lambda x, g: pullback(lambda x: peer(x, axis), x, g))(x, g)
    np.testing.assert_allclose(y, y_too, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dx_too, rtol=1e-4, atol=1e-5)


@doors
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_16_bit_inputs_are_float32_inside(variant, rng, dtype, ours, truth, peer):
    """The result is the float64 one, rounded once. softmax keeps that alone, p + δ, and so its gradient, p_v (g_v - c)
    less p_v Σ p·(g - c), may be off by δ_v of the one bracket and Σ δ·(g - c) of the other, c being the mean Σ g·p."""
    x, g = (np.array(3 * rng.normal(size=(6, 41)), dtype) for _ in range(2))
    y, dx = variant(lambda x, g: pullback(ours, x, g))(jnp.asarray(x), jnp.asarray(g))
    assert y.dtype == dx.dtype == dtype
    log, x = ours is log_softmax, np.float64(x)
    assert_within(y, truth(x), condition_of(x, truth(x), -1, log), 4, dtype)
    p, g = reference.softmax(x), np.float64(g)
    gradient, size = true_gradient(p, g, -1, log)
    delta = 0 if log else (p * epsilon(dtype) + float(jnp.finfo(dtype).smallest_subnormal)) / 2
    row = lambda g: np.sum(g, -1, keepdims=True)  # noqa: E731
    away = abs(g - row(p * g)) + row(delta * abs(g))  # from the mean, which is one of p + δ
    kept = delta * (away + row((p + delta) * away)) + p * row(delta * away)
    assert_within(dx, gradient, size * (2 + 2 * abs(x).max()) + kept / (4 * epsilon(jnp.float32)), 4, dtype)


@doors
@pytest.mark.parametrize("where_shape", [(4, 7), (7,), (4, 1), (1, 7)], ids=str)
@pytest.mark.nan
def test_where_leaves_classes_out(variant, rng, where_shape, ours, truth, peer):
    x, g = rng.normal(size=(4, 7)).astype(np.float32), rng.normal(size=(4, 7)).astype(np.float32)
    where = rng.random(where_shape) < 0.6
    where[..., -1] |= where_shape != (4, 1)
    x[:, 2] = np.where(np.broadcast_to(where, x.shape)[:, 2], x[:, 2], np.nan)  # what is left out may hold anything
    y, dx = variant(lambda x, g: pullback(lambda x: ours(x, where=where), x, g))(jnp.asarray(x), jnp.asarray(g))
    want = truth(x, where=where)
    assert_within(y, want, condition_of(np.nan_to_num(x), want, -1, ours is log_softmax), 4)
    g = np.where(where, g, 0)
    gradient, size = true_gradient(reference.softmax(x, where=where), np.float64(g), -1, ours is log_softmax)
    assert_within(dx, np.where(where, gradient, 0), size * 10, 4)


def test_a_row_without_any_class_is_0_and_minus_inf(variant, rng):
    x, where = rng.normal(size=(3, 5)).astype(np.float32), np.ones((3, 5), bool)
    where[1] = False
    for f, value in ((softmax, 0), (log_softmax, -np.inf)):
        y, dx = variant(lambda x, f=f: pullback(lambda x: f(x, where=where), x, jnp.asarray(x)))(jnp.asarray(x))
        np.testing.assert_array_equal(y[1], value)
        np.testing.assert_array_equal(dx[1], 0)
        assert np.all(np.isfinite(y[jnp.array([0, 2])])) and np.all(np.isfinite(dx))


@pytest.mark.optimized
def test_log_softmax_is_exact_at_the_top(variant, rng):
    """-log1p(rest), where x - (max + log Σ) is 0 from a margin of 17 on. Budget: a rounded margin ≤ 100 is 6e-6."""
    x = rng.normal(size=(41, 11)).astype(np.float32)
    x[:, 3] += np.linspace(0, 68, 41, dtype=np.float32)
    for offset in (0, 1e4, -1e4, 1e7, -(2.0**24)):
        moved = (x + np.float32(offset)).astype(np.float32)
        want = reference.log_softmax(moved)
        assert relative_error(variant(log_softmax)(jnp.asarray(moved)), want).max() < 1e-5
    assert np.all(np.asarray(jax.nn.log_softmax(x))[-20:, 3] == 0)
    g = rng.normal(size=11).astype(np.float32) * (np.arange(11) == 3)  # its gradient is g (1 - p), p → 1
    dx = variant(lambda x: pullback(log_softmax, x, jnp.broadcast_to(g, x.shape)))(jnp.asarray(x))[1]
    want = reference.hessian(x[30])[3] / reference.softmax(x[30])[3] * g[3]
    assert relative_error(dx[30], want).max() < 1e-5


@pytest.mark.optimized
@pytest.mark.parametrize("scale", [170.49, 15936, 1519400, 11484000, 1e8])
def test_log_softmax_of_a_large_product_made_in_the_same_program(scale):
    """A compiler may take a · b - max in one step, which at the maximum is then not 0."""
    x = jnp.float32([0.1234567, 0.7654321, -1])
    dx = jax.jit(lambda x, scale: jax.grad(lambda z: log_softmax(z)[0])(x * scale))(x, jnp.float32(scale))
    np.testing.assert_array_equal(dx, [1, -1, 0])


@doors
@pytest.mark.nan
def test_infinities(variant, ours, truth, peer):
    """-inf is a class of probability zero; +inf, NaN and a row of -inf alone are NaN."""
    inf = np.inf
    x = np.array([[0, -inf, 1], [-inf, -inf, 2], [inf, 0, 1], [np.nan, 0, 1], [-inf] * 3], np.float32)
    y = np.asarray(variant(ours)(jnp.asarray(x)))
    want = truth(x[:2])
    assert_within(y[:2], want, condition_of(x[:2], want, -1, ours is log_softmax), 4)
    assert np.all(np.isnan(y[2:]))


@doors
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integers_count_as_float32(rng, dtype, ours, truth, peer):
    x = rng.integers(0, 100, (4, 7)).astype(dtype)
    y = ours(x)
    assert y.dtype == jnp.float32
    assert_within(y, truth(x), condition_of(np.float64(x), truth(x), -1, ours is log_softmax), 4)


@doors
@pytest.mark.parametrize(("shape", "axis"), [((4, 0), -1), ((0, 4), -1), ((0,), 0), ((2, 0, 3), (1, 2))], ids=str)
def test_nothing_in_nothing_out(ours, truth, peer, shape, axis):
    x = jnp.zeros(shape)
    for got in pullback(lambda x: ours(x, axis), x, x):
        assert got.shape == shape and got.dtype == x.dtype


@doors
@pytest.mark.parametrize(
    ("error", "fragments", "x", "options"),
    [
        (ValueError, ["axis", "()"], np.float32(1), {}),
        (ValueError, ["axis", "2", "(4, 7)"], np.zeros((4, 7), np.float32), {"axis": 2}),
        (ValueError, ["axis", "-3", "(4, 7)"], np.zeros((4, 7), np.float32), {"axis": (0, -3)}),
        (ValueError, ["axis", "(1, -1)"], np.zeros((4, 7), np.float32), {"axis": (1, -1)}),
        (TypeError, ["axis", "1.5"], np.zeros((4, 7), np.float32), {"axis": 1.5}),
        (TypeError, ["complex64"], np.zeros((4, 7), np.complex64), {}),
        (TypeError, ["where", "float32"], np.zeros((4, 7), np.float32), {"where": np.ones(7, np.float32)}),
        (ValueError, ["where", "(4,)", "(4, 7)"], np.zeros((4, 7), np.float32), {"where": np.ones(4, bool)}),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else None,
)
def test_bad_input_is_refused(untyped, ours, truth, peer, error, fragments, x, options):
    with pytest.raises(error) as caught:
        ours(x, **options)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value


def test_residuals(variant, rng):
    """softmax keeps its result alone, in the input's dtype; log_softmax its input and three numbers a row."""
    x = jnp.asarray(rng.normal(size=(32, 512)), jnp.bfloat16)
    y, pull = jax.vjp(variant(softmax), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert len(kept) == 1 and kept[0].dtype == x.dtype and np.array_equal(kept[0], y)
    _, pull = jax.vjp(variant(log_softmax), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert sum(leaf.nbytes for leaf in kept) <= x.nbytes + 3 * 4 * 32
    assert any(leaf.shape == x.shape and np.array_equal(leaf, x) for leaf in kept)


@pytest.mark.optimized
@doors
def test_forward_mode_is_as_exact(rng, ours, truth, peer):
    """At every margin and whatever all entries have in common, each entry is right to roundings of its own terms,
    p_u (v_v - v_u), times p_v for softmax. The differences of tangents are from that to the largest entry's."""
    x, _ = at_margins(rng, np.linspace(-5, 70, 76))
    v = np.float32(rng.normal(size=x.shape) + rng.choice([0, 100], (76, 1)))
    _, tangent = jax.jit(lambda x, v: jax.jvp(ours, (x,), (v,)))(x, v)
    p, away = reference.softmax(x), np.float64(v)[:, :, None] - np.float64(v)[:, None, :]
    terms = p[:, None, :] * away * (p[:, :, None] if ours is softmax else 1)
    top = np.argmax(x, -1)
    from_top = np.abs(np.take_along_axis(away, top[:, None, None], -1)[..., 0]) * (p if ours is softmax else 1)
    condition = np.abs(terms).sum(-1) + from_top * (top[:, None] != np.arange(x.shape[1]))
    # As if each v had been rounded. Of a top that p_a v_a is taken from, 1 - p_a is left.
    a = p > 0.5 if ours is softmax else np.arange(x.shape[1]) == top[:, None]
    of_top = np.where(a, np.abs(v), 0).sum(-1, keepdims=True)
    of_others = np.sum(np.where(a, 0, p) * (np.abs(v) + (of_top if ours is softmax else 0)), -1, keepdims=True)
    each = np.where(a, (1 - p) * np.abs(v), np.abs(v) + of_top)
    condition += (of_others + each) * (p if ours is softmax else 1)
    assert_within(tangent, terms.sum(-1), condition * (2 + np.abs(x).max(-1, keepdims=True)), 4)


@pytest.mark.diagonal
@doors
@pytest.mark.parametrize("side", few_of(["blocks", "one pass"]))
@pytest.mark.parametrize("masked", few_of([True, False]), ids=["where", "all"])
def test_both_modes_to_second_order(rng, monkeypatch, side, masked, ours, truth, peer):
    """JAX's own check, against differences in float64; of rows that a GPU takes as wide."""
    if side == "one pass":
        jax.clear_caches()
        monkeypatch.setattr(blocks, "PLATFORMS", ())
    monkeypatch.setattr(_softmax, "KERNEL", 4)
    where = np.arange(7)[:, None] % 3 != 1 if masked else None
    with jax.enable_x64(True):
        x, weights = rng.normal(size=(2, 7, 3))
        check_grads(jax.jit(lambda x: jnp.sum(weights * jnp.sin(finite(ours(x, 0, where))))), (x,), order=2)
    jax.clear_caches()


def finite(y):
    return jnp.where(jnp.isfinite(y), y, 0)


@doors
@pytest.mark.nan
def test_what_moves_at_a_hidden_entry_is_of_no_matter(rng, ours, truth, peer):
    """sqrt has an infinite slope at 0; a cotangent may hold NaN there."""
    x, v, where = np.arange(4, dtype=np.float32), np.float32(rng.normal(size=4)), np.arange(4) > 0
    of_root = lambda f, **how: jax.jvp(lambda x: finite(f(jnp.sqrt(x), **how)), (x[-3:],), (v[-3:],))[1]  # noqa: E731
    tangent = jax.jvp(lambda x: ours(jnp.sqrt(x), where=where), (x,), (v,))[1]
    np.testing.assert_allclose(tangent, [0, *of_root(peer)], rtol=1e-5, atol=1e-6)
    v[0] = np.nan
    _, dx = pullback(lambda x: ours(x, where=where), x, v)
    np.testing.assert_allclose(dx, [0, *pullback(peer, x[1:], v[1:])[1]], rtol=1e-5, atol=1e-6)


@doors
def test_transforms_of_both_modes(rng, ours, truth, peer):
    """Batches of arrays, of tangents, of both, nested: each is the one at a time."""
    x, v = (np.float32(rng.normal(size=(3, 4, 6))) for _ in range(2))
    of_one = lambda x, v: (jax.jvp(ours, (x,), (v,))[1], jax.vjp(ours, x)[1](v)[0])  # noqa: E731

    @jax.jit
    def every(x, v):
        both = [of_one(x[0], v[i]) for i in range(3)], [of_one(x[i], v[0]) for i in range(3)]
        batched = jax.vmap(of_one, (None, 0))(x[0], v), jax.vmap(of_one, (0, None))(x, v[0])
        nested = jax.vmap(jax.vmap(of_one, (None, 0), 1), (0, None), 1)(x, v)  # [tokens, x, v, classes]
        along = lambda v: jax.jvp(ours, (x,), (v,))[1]  # noqa: E731
        linear = jax.linearize(ours, x)[1](v), jax.jvp(along, (x,), (v,))[1]
        return both, batched, nested, linear, jax.jacfwd(ours)(x[0, 0]), jax.jacrev(ours)(x[0, 0])

    (tangents, arrays), (of_tangents, of_arrays), nested, linear, forward, reverse = every(x, v)
    for each, batch in ((tangents, of_tangents), (arrays, of_arrays)):
        for got, want in zip(batch, map(np.stack, zip(*each, strict=True)), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for got, one in zip(nested, of_tangents, strict=True):
        np.testing.assert_allclose(got[:, 0], np.moveaxis(one, 0, 1), rtol=1e-5, atol=1e-6)
    for tangent in linear:
        np.testing.assert_allclose(tangent, of_one(x, v)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward, reverse, rtol=1e-5, atol=1e-6)


@doors
@pytest.mark.parametrize("how", ["jacfwd of grad", "jacrev of grad"])
def test_second_order(rng, how, ours, truth, peer):
    """Against central differences of the float64 gradient (h² f''' ≈ 1e-9)."""
    x, g = rng.normal(size=9).astype(np.float32), rng.normal(size=9)
    outer = jax.jacfwd if how == "jacfwd of grad" else jax.jacrev
    got = jax.jit(outer(jax.grad(lambda x: jnp.vdot(ours(x), jnp.asarray(g, jnp.float32)))))(x)

    def gradient(x):
        return true_gradient(reference.softmax(x), g, -1, ours is log_softmax)[0]

    steps = 1e-5 * np.eye(9)
    want = np.stack([(gradient(x + h) - gradient(x - h)) / 2e-5 for h in steps])
    np.testing.assert_allclose(got, want, rtol=0, atol=32 * epsilon(jnp.float32) * abs(g).sum())


@doors
def test_laws(rng, ours, truth, peer):
    """Rows sum to one, gradient rows to zero; a shift changes nothing (bitwise, where the sum is exact); classes in
    another order give the results in that order."""
    x = rng.integers(-64, 64, (8, 123)).astype(np.float32) / 8  # exact under a shift by an integer
    g = rng.normal(size=x.shape).astype(np.float32)
    y, dx = jax.jit(lambda x, g: pullback(ours, x, g))(x, g)
    p = np.float64(y) if ours is softmax else np.exp(np.float64(y))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=123 * epsilon(jnp.float32))
    np.testing.assert_allclose(np.float64(dx).sum(-1), 0, atol=32 * epsilon(jnp.float32) * abs(g).sum(-1).max())
    np.testing.assert_array_equal(ours(x + np.float32(1024)), y)
    order = rng.permutation(123)
    np.testing.assert_allclose(ours(x[:, order]), y[:, order], rtol=8 * epsilon(jnp.float32))


@doors
def test_vmap_and_no_retrace(rng, ours, truth, peer):
    x = jnp.asarray(rng.normal(size=(4, 3, 7)), jnp.float32)
    for axis in range(3):
        got = jax.vmap(lambda x: ours(x, 0), in_axes=axis, out_axes=axis)(x)
        want = truth(x, 1 if axis == 0 else 0)
        assert_within(got, want, condition_of(x, want, -1, ours is log_softmax), 4)
    ours(x)
    with compilations() as names:
        ours(x + 0)
        ours(x, axis=-1)
    assert not [name for name in names if "softmax" in name]


def test_the_gradient_of_softmax_does_not_cancel_at_the_top(variant, rng):
    """Failure 30: at every margin each entry is right to roundings of its own terms, p_v p_u (g_v - g_u)."""
    x, labels = at_margins(rng, np.linspace(-5, 70, 76))
    g = rng.normal(size=x.shape).astype(np.float32)
    _, dx = variant(lambda x, g: pullback(softmax, x, g))(jnp.asarray(x), jnp.asarray(g))
    p, g = reference.softmax(x), np.float64(g)
    terms = p[:, :, None] * p[:, None, :] * (g[:, :, None] - g[:, None, :])
    condition = np.abs(terms).sum(-1) * (2 + np.abs(x).max(-1, keepdims=True))  # z - m is rounded, by eps of its size
    assert np.all(condition[np.arange(len(x)), labels] > 0)
    assert_within(dx, terms.sum(-1), condition, 4)
    known = jax.grad(lambda z: softmax(z)[0])(jnp.float32([20, 0]))
    np.testing.assert_allclose(known, [2.0611537e-9, -2.0611537e-9], rtol=1e-6)


def test_the_gradient_of_wide_16_bit_rows(rng):
    """Of more entries than XLA takes in one kernel on a GPU, where y is fenced; the CPU takes it as it is."""
    x, g = (jnp.asarray(3 * rng.normal(size=(2, 20000)), jnp.bfloat16) for _ in range(2))
    _, dx = jax.jit(lambda x, g: pullback(softmax, x, g))(x, g)
    p, g = reference.softmax(np.float64(x)), np.float64(g)
    row = lambda g: np.sum(g, -1, keepdims=True)  # noqa: E731
    kept = p * epsilon(jnp.bfloat16) * (abs(g - row(p * g)) + row(p * abs(g)))  # y is rounded, and so is the result
    assert np.all(abs(np.float64(dx) - p * (g - row(p * g))) <= kept)


@pytest.mark.devices
@doors
def test_a_mask_that_varies_over_devices_over_which_x_does_not(rng, ours, truth, peer):
    """The gradients of all devices are added up."""
    x, v = np.float32(rng.normal(size=(3, 5))), np.float32(rng.normal(size=(2, 3, 5)))
    where = rng.random((2, 3, 5)) < 0.7
    where[..., 0] = True

    def loss(f, x, where, v):
        return jnp.sum(v * finite(f(x, where=where)))

    def on_device(x, where, v):
        return jax.lax.psum(loss(ours, x, where[0], v[0]), "data")

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    of_all = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    want = jax.grad(lambda x: sum(loss(peer, x, where[i], v[i]) for i in range(2)))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(of_all))(x, where, v), want, rtol=0, atol=16 * epsilon(jnp.float32))


def test_probabilities_that_all_round_to_zero():
    """Of 2000 equal entries in 8 bits the result is 0, and so are its derivatives."""
    x = jnp.zeros(2000, jnp.float8_e4m3fn)
    y, dy = jax.jvp(softmax, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(np.float32([y, dy, jax.vjp(softmax, x)[1](jnp.ones_like(x))[0]]), 0)


def test_a_hidden_row_makes_no_nan_at_any_step():
    x, where = jnp.ones((2, 3)), jnp.array([[True, True, False], [False] * 3])
    with jax.debug_nans(True), jax.disable_jit():
        y, dx = pullback(lambda x: softmax(x, where=where), x, jnp.ones_like(x))
        jax.jvp(lambda x: softmax(x, where=where), (x,), (x,))
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(dx))
