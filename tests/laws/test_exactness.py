"""Confident tokens: loss and gradient against float64 at every margin, with Optax's error beside ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from helpers import (
    ALONE,
    DTYPES,
    MARGINS,
    PROMISE,
    assert_within,
    at_margins,
    epsilon,
    few_of,
    loss_and_grad,
    random_case,
    relative_error,
)
from mpmath import mp, mpf, sech, tanh

from softmax_jax import cross_entropy, kl_divergence, label_statistics, linear_cross_entropy, log_softmax, softmax
from softmax_jax._inputs.options import softcapped

pytestmark = pytest.mark.optimized

OFFSETS = [0, 1e4, -1e4, 1e7, -(2.0**24)]


@pytest.mark.diagonal
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["integer", "one-hot"])
@pytest.mark.parametrize("classes", [11, 37], ids=["class by class", "whole rows"])
def test_every_margin_from_minus_100_to_100(device, rng, dtype, kind, classes):
    """Also with a constant added to every logit, up to where float32 holds every other integer alone."""
    offsets = [offset for offset in OFFSETS if abs(offset) < float(jnp.finfo(dtype).max)]
    logits, labels = (
        np.concatenate(rows)
        for rows in zip(*(at_margins(rng, MARGINS, dtype, offset, classes) for offset in offsets), strict=True)
    )
    targets = labels if kind == "integer" else np.eye(classes, dtype=np.float32)[labels]
    cotangent = rng.normal(size=len(logits)).astype(np.float32)
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangent))
    loss, grad = loss_and_grad(jax.jit, logits, targets, cotangent, {"reduction": "none"})
    assert relative_error(loss, want.loss).max() < PROMISE
    if dtype == jnp.float32:
        assert relative_error(grad, want.grad).max() < PROMISE
    else:  # one rounding to its own dtype, whose smallest numbers are coarser
        allowed = epsilon(dtype) / 2 * (1 + PROMISE) * abs(want.grad) + PROMISE * abs(want.grad)
        smallest = float(jnp.finfo(dtype).smallest_subnormal) if dtype == jnp.float16 else 1e-30
        assert np.all(abs(np.asarray(grad, np.float64) - want.grad) <= allowed + smallest)


@pytest.mark.diagonal
@pytest.mark.parametrize("classes", [70000, 65537])
@pytest.mark.parametrize("kind", ["one-hot", "log_softmax"])
def test_margins_of_rows_longer_than_a_block(rng, classes, kind):
    """Of 4 x 17500 and of a prime number of classes: the largest class is found in any block, of products too."""
    z, labels = at_margins(rng, np.linspace(20, 80, 7), classes=classes)
    labels_too = jax.nn.one_hot(labels, classes)
    cotangent = rng.normal(size=len(z)).astype(np.float32)

    def loss(z, scale):
        logits = z * scale
        if kind == "log_softmax":
            return -jnp.take_along_axis(log_softmax(logits), labels[:, None], 1)[:, 0]
        return cross_entropy(logits, labels_too, reduction="none")

    @jax.jit
    def both(z, scale):
        value, pull = jax.vjp(lambda z: loss(z, scale), z)
        return value, pull(cotangent)[0]

    for scale in np.array([1, 0.7], np.float32):
        logits = z * scale
        want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangent))
        got, grad = both(z, scale)
        assert relative_error(got, want.loss).max() < 2 * PROMISE  # z rounded twice, here and in the truth
        assert relative_error(grad, want.grad * np.float64(scale)).max() < 2 * PROMISE


MADE = {
    "constant": lambda z: z * 0.7,
    "traced": lambda z, scale: z * scale,
    "capped": lambda z: 80 * jnp.tanh(z / 80),
    "upcast": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32) * 0.7,
}


@pytest.mark.diagonal
@pytest.mark.parametrize("made", few_of(["traced", "capped", "upcast", "constant"], 2))
@pytest.mark.parametrize("kind", few_of(["integer", "one-hot", "log_softmax"], 2))
@pytest.mark.parametrize("rows", [101, 1025], ids=["whole rows", "class by class"])
def test_logits_that_are_a_product_made_in_the_same_program(rng, kind, made, rows):
    """A compiler may then take a · b - m in one step, so that z - m is not 0 at the maximum."""
    z, labels = at_margins(rng, np.linspace(-100, 100, rows))
    operands = (z / np.float32(0.7), np.float32(0.7)) if made == "traced" else (z / np.float32(0.7),)
    targets = np.eye(11, dtype=np.float32)[labels] if kind != "integer" else labels
    cotangent = rng.normal(size=len(z)).astype(np.float32)

    def loss(*operands):
        logits = MADE[made](*operands)
        if kind == "log_softmax":
            return -jnp.take_along_axis(log_softmax(logits), labels[:, None], 1)[:, 0]
        return cross_entropy(logits, targets, reduction="none")

    logits = np.asarray(jax.jit(MADE[made])(*operands))
    want = reference.cross_entropy(logits, labels, reduction="none", cotangent=np.float64(cotangent))

    @jax.jit
    def both(*operands):
        value, pull = jax.vjp(loss, *operands)
        return value, pull(cotangent)[0]

    got, grad = both(*operands)
    assert relative_error(got, want.loss).max() < 2 * PROMISE  # z rounded twice, here and in the truth
    if made in ("constant", "traced"):
        assert relative_error(grad, want.grad * np.float64(np.float32(0.7))).max() < 2 * PROMISE


HUGE = [1e4, 1e8, 1e9, 1e10, 3e20]


def huge_rows(rng, made):
    """(x, what is made of it): rows from 1e4 to 3e20, equal or random, of which some have two largest, equal or a
    rounding apart; what `made` makes by itself."""
    x = np.repeat(HUGE, 12)[:, None] * np.where(np.arange(60)[:, None] % 3 == 0, -1, rng.normal(size=(60, 37)))
    x, rows = x.astype(np.float32), np.arange(60)
    x[rows % 3 == 1, 5] = x.max(1)[rows % 3 == 1]
    x[rows % 3 == 2, 6] = np.nextafter(x.max(1), np.float32(0))[rows % 3 == 2]
    return x, np.asarray(jax.jit(made)(x, np.float32(0.7)))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "some",
    [
        ("ids", "dense", "KL"),
        ("entropy", "log_normalizer", "log_softmax", "softmax", "mixture"),
        ("reverse",),
    ],
    ids=lambda some: some[0],
)
@pytest.mark.parametrize("made", ["scaled", "capped"])
def test_huge_logits_that_are_a_product_made_in_the_same_program(rng, made, some):
    """Failure 28: from 2^27 on the rounding of a product is more than a nat. Every pass, forward and backward, reads
    the number that the product is by itself."""
    made = {"scaled": lambda x, c: c * x, "capped": lambda x, c: 1e12 * c * jnp.tanh(x / 1e12)}[made]
    x, z = huge_rows(rng, made)
    c, y, other = np.float32(0.7), rng.integers(0, 37, 60).astype(np.int32), np.float32(z[:, ::-1])
    t, g = (np.float32(rng.dirichlet(np.ones(37), 60)) for _ in range(2))
    cotangent = rng.normal(size=60).astype(np.float32)
    none = {"reduction": "none"}
    functions = {
        "ids": lambda z: cross_entropy(z, y, **none),
        "dense": lambda z: cross_entropy(z, t, **none),
        "entropy": lambda z: label_statistics(z, y).entropy,
        "log_normalizer": lambda z: label_statistics(z, y).log_normalizer,
        "log_softmax": lambda z: jnp.sum(g * log_softmax(z), 1),
        "softmax": lambda z: jnp.sum(g * softmax(z), 1),
        "KL": lambda z: kl_divergence(z, teacher_logits=other, **none),
        "reverse": lambda z: kl_divergence(z, teacher_logits=other, beta=1.0, **none),
        "mixture": lambda z: kl_divergence(z, teacher_logits=other, beta=0.3, **none),
    }
    p, log_p, cot = reference.softmax(z), reference.log_softmax(z), np.float64(cotangent)[:, None]
    zero = np.zeros(60)
    entropies, normalizers = (
        reference.label_statistics(z, y, of) for of in ((zero, zero, cotangent), (zero, cotangent, zero))
    )
    ids, dense = (reference.cross_entropy(z, label, cotangent=cot[:, 0], **none) for label in (y, t))
    kl, reverse, mixture = (reference.divergence(other, z, beta) for beta in (0, 1, 0.3))
    wanted = {
        "ids": (ids.loss, ids.grad),
        "dense": (dense.loss, dense.grad),
        "entropy": (entropies.values[2], entropies.grad),
        "log_normalizer": (normalizers.values[1], normalizers.grad),
        "log_softmax": (np.sum(g * log_p, 1), cot * (g - p * g.sum(1, keepdims=True))),
        "softmax": (np.sum(g * p, 1), cot * p * (g - np.sum(g * p, 1, keepdims=True))),
        **{name: (d.loss, cot * d.grads[1]) for name, d in (("KL", kl), ("reverse", reverse), ("mixture", mixture))},
    }
    slope = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(made(x, c))))(x), np.float64)
    for name in some:
        f = functions[name]
        of_product = lambda x, c, f=f: f(made(x, c))  # noqa: E731
        both = lambda x, c, f=of_product: (lambda y, pull: (y, pull(cotangent)[0]))(*jax.vjp(lambda x: f(x, c), x))  # noqa: E731
        (value, grad), (want, dz) = jax.jit(both)(x, c), wanted[name]
        assert np.all(np.abs(np.asarray(value, np.float64) - want) <= PROMISE * np.abs(want) + 1e-30), name
        size = np.max(np.abs(dz), 1, keepdims=True)
        assert np.all(np.abs(np.asarray(grad, np.float64) - dz * slope) <= PROMISE * (1 + size)), name


def test_one_feature_times_one_row_of_weights(rng):
    """A matrix product that a compiler makes an ordinary one."""
    x, weight = rng.normal(size=(17, 1)).astype(np.float32), rng.normal(size=(1, 7)).astype(np.float32)
    targets = rng.dirichlet(np.ones(7), 17).astype(np.float32)
    want = reference.cross_entropy(x @ weight, targets)
    assert relative_error(jax.jit(linear_cross_entropy)(x, weight, targets), want.loss) < PROMISE
    made = jax.jit(lambda x: cross_entropy(x @ weight, targets))
    assert relative_error(made(x), want.loss) < PROMISE


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_mean_is_as_exact(rng, offset):
    """Its gradient is (p - t)/N; the loss of a mean over confident tokens alone does not round to 0."""
    logits, labels = at_margins(rng, np.linspace(20, 60, 81), offset=offset)
    want = reference.cross_entropy(logits, labels, cotangent=-0.7)
    loss, grad = loss_and_grad(jax.jit, logits, labels, np.float32(-0.7), {})
    assert relative_error(loss, want.loss).max() < PROMISE and relative_error(grad, want.grad).max() < PROMISE
    assert want.loss > 1e-11


def test_optax_and_ours_side_by_side(rng):
    """Float32 is not the reason: Optax keeps log_normalizer - z_y, which is 0 from a margin of 17 on."""

    @jax.jit
    def of_optax(x, labels):
        loss, pull = jax.vjp(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels), x)
        return loss, pull(jnp.ones(64, jnp.float32))[0]

    rows = []
    for margin in (0, 5, 10, 15, 17.5, 20, 30, 60):
        logits, labels = at_margins(rng, np.full(64, margin))
        want = reference.cross_entropy(logits, labels, reduction="none", cotangent=1.0)
        ours = loss_and_grad(jax.jit, logits, labels, np.ones(64, np.float32), {"reduction": "none"})
        theirs = of_optax(logits, labels)
        own = np.arange(64), labels
        errors = [
            relative_error(a, b).max()
            for loss, grad in (ours, theirs)
            for a, b in ((loss, want.loss), (np.asarray(grad)[own], want.grad[own]))
        ]
        rows.append((margin, *errors))
        print("margin {:5.1f}   ours {:.0e} {:.0e}   Optax {:.0e} {:.0e}".format(*rows[-1]))
    table = np.array(rows)
    assert table[:, 1:3].max() < PROMISE
    assert np.all(table[table[:, 0] >= 10, 3] > 1e-3) and np.all(table[table[:, 0] >= 15, 3] > 0.1)
    np.testing.assert_array_equal(table[table[:, 0] >= 17.5, 3:], 1)  # exactly 0: all of it is lost


@pytest.mark.parametrize("margin", [0.0, 20.0, 60.0])
def test_smoothed_and_weighted_losses_lose_nothing_either(rng, margin):
    """A class weight and a z-loss beside the tail: the z-loss of logits near their log-sum 0 is small itself."""
    logits, labels = at_margins(rng, np.full(16, margin))
    logits = (logits - np.max(logits, -1, keepdims=True)).astype(np.float32)
    options = {"class_weights": rng.uniform(0.5, 2, 11).astype(np.float32), "reduction": "none"}
    cotangent = rng.normal(size=16).astype(np.float32)
    want = reference.cross_entropy(logits, labels, cotangent=np.float64(cotangent), **options)
    got = loss_and_grad(jax.jit, logits, labels, cotangent, options)
    for ours, truth in zip(got, want, strict=False):
        assert relative_error(ours, truth).max() < PROMISE


SECOND_ORDER = {
    "hessian": jax.hessian,
    "jvp of grad": lambda f: jax.jacfwd(jax.grad(f)),
    "grad of grad": lambda f: jax.jacrev(jax.grad(f)),
}


@pytest.mark.diagonal
@pytest.mark.parametrize("how", SECOND_ORDER)
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "one-hot"])
def test_hessian_is_the_analytic_one(rng, how, dense):
    """diag(p) - p pᵀ, every entry of at least 1e-30; twice as many roundings of the exponent as the gradient has."""
    logits, labels = at_margins(rng, np.array([-100.0, -30, -10, 0, 5, 17, 30, 60, 100]))
    labels = np.eye(11, dtype=np.float32)[labels] if dense else labels
    second = SECOND_ORDER[how](lambda z, label: -0.7 * cross_entropy(z, label))
    got = jax.jit(jax.vmap(second))(logits, labels)
    want = np.stack([-0.7 * reference.hessian(row) for row in logits])
    assert np.all(np.isfinite(got))
    assert relative_error(got, want).max() < 2 * PROMISE
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.diagonal
@pytest.mark.parametrize("how", SECOND_ORDER)
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "one-hot"])
def test_one_class_has_no_loss_no_gradient_no_curvature(how, dense):
    label = np.ones((1, 1), np.float32) if dense else np.zeros(1, np.int32)
    f = lambda z: 3 * cross_entropy(z[None], label)  # noqa: E731
    every = jax.jit(lambda z: (f(z), jax.grad(f)(z), SECOND_ORDER[how](f)(z)))
    for z in (-100.0, 0.0, 1e4):
        assert not any(np.any(number) for number in every(jnp.full(1, z)))


@pytest.mark.parametrize("variant", few_of([jax.jit, lambda f: f], thorough=0), ids=["jit", "eager"])
@pytest.mark.parametrize("tokens", few_of([1, 4]))
def test_one_class_of_weight_0(variant, tokens):
    """Nothing is left to sum, and a compiler may fold all of it into constants."""
    z, nothing = jnp.full((tokens, 1), 3.0), jnp.zeros((tokens, 1))
    weighted = {"class_weights": jnp.zeros(1), "label_smoothing": 0.1, "reduction": "sum"}
    for labels, options in ((nothing, {}), (jnp.zeros(tokens, jnp.int32), weighted), (nothing + 1, weighted)):
        loss, grad = variant(jax.value_and_grad(lambda z, y=labels, how=options: cross_entropy(z, y, **how)))(z)
        assert loss == 0 and np.all(grad == 0)


@pytest.mark.thorough
@pytest.mark.parametrize("dense", few_of([True, False], thorough=0), ids=["dense", "integer"])
def test_second_order_with_all_options(rng, dense):
    """A Hessian-vector product against central differences of the analytic float64 gradient."""
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (5, 7), dense=dense, names=names)
    v = rng.normal(size=logits.shape)

    def gradient(x):
        return reference.cross_entropy(x, labels, **options).grad

    want = (gradient(logits + 1e-5 * v) - gradient(logits - 1e-5 * v)) / 2e-5
    grad = jax.grad(lambda x: cross_entropy(x, labels, **options))
    forward = jax.jit(lambda x, v: jax.jvp(grad, (x,), (v,))[1])(logits, np.float32(v))
    reverse = jax.jit(lambda x, v: jax.grad(lambda x: jnp.vdot(grad(x), v))(x))(logits, np.float32(v))
    scale = np.abs(want).max() * np.abs(v).max() * (1 + np.abs(logits).max())  # the direction mixes terms of this size
    assert_within(forward, want, np.full_like(want, scale), 16)
    assert_within(reverse, want, np.full_like(want, scale), 16)


@pytest.mark.parametrize("z", [[16, 16, 0, 0, 0], [20, 20, 20, 0.5], [9, 9, 7, 9], [0, 0, 0]])
def test_the_gradient_of_an_entropy_where_classes_share_the_top(z):
    """-p_v (μ - (m - z_v)), of μ = E_p[m - z]: each entry, those of the top too."""
    gradient = jax.grad(lambda z: label_statistics(z, jnp.int32(0)).entropy)(jnp.float32(z))
    gap = np.max(np.float64(np.float32(z))) - np.float64(np.float32(z))
    p = np.exp(-gap) / np.sum(np.exp(-gap))
    np.testing.assert_allclose(gradient, -p * (np.sum(p * gap) - gap), rtol=1e-6)


@pytest.mark.parametrize("m", [5.0, 15.0, 25.0, 60.0])
@pytest.mark.parametrize("t", [[0.0, 1, 0], [0.9, 0.05, 0.05], [1.0, 0, 0]])
def test_the_hessian_of_dense_labels_at_the_top(m, t):
    """p_a (1 - p_a), where both are known by themselves."""
    z = jnp.float32([m, 0.3, -0.2])
    hessian = jax.hessian(lambda z: cross_entropy(z, jnp.float32(t)))(z)
    p = np.exp(np.float64(z) - np.max(np.float64(z)))
    p, miss = p / p.sum(), p[1:].sum() / p.sum()
    np.testing.assert_allclose(hessian[0, 0], p[0] * miss, rtol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 30.0, 1e3, 1e37])
def test_a_soft_cap_at_any_ratio(cap):
    """cap · tanh(u), of u = z/cap; by z sech²(u), by the cap tanh(u) - u sech²(u), each as exact as its exponential."""
    wanted = cap * 10.0 ** np.arange(-20, 1.6, 0.1)
    z, cap = jnp.float32(wanted[wanted < 1e38]), jnp.float32(cap)
    with mp.workdps(40):
        ratios = [mpf(float(v)) / mpf(float(cap)) for v in z]
        want = [(mpf(float(cap)) * tanh(r), sech(r) ** 2, tanh(r) - r * sech(r) ** 2) for r in ratios]
        found = [softcapped(z, cap), *jax.vmap(jax.grad(softcapped, (0, 1)), (0, None))(z, cap)]
        for got, true in zip(found, zip(*want, strict=True), strict=True):
            error = np.float64([abs(mpf(float(x)) / y - 1) if y > 1e-30 else 0 for x, y in zip(got, true, strict=True)])
            assert np.max(error / (4 + 4 * np.float64(ratios))) < epsilon(jnp.float32)
    labels, logits = np.zeros(1, int), np.float32([[1, 5, 6]])
    free = jax.jit(lambda cap: cross_entropy(logits, labels, softcap=cap))(jnp.float32(3e38))
    np.testing.assert_allclose(free, cross_entropy(logits, labels), rtol=1e-6)
