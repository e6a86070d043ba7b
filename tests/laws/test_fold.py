"""Both sides of the seam: the sums in one pass, as GPUs and TPUs make them, against float64 and against the blocks of
the CPU. (`pytest --fold` runs any other test on that side.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import (
    ALONE,
    PROMISE,
    at_margins,
    check_against_reference,
    epsilon,
    few_of,
    random_case,
    relative_error,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import assert_equal, collectives, mesh_of, problem, truth, under_jit

from softmax_jax import (
    _softmax,
    cross_entropy,
    kl_divergence,
    label_statistics,
    log_softmax,
    softmax,
)
from softmax_jax._devices import Classes
from softmax_jax._inputs.labels import Ids
from softmax_jax._inputs.options import Adjustment
from softmax_jax._sums import blocks, combine, fold
from softmax_jax._sums.waist import ExtraSums, Tokens

pytestmark = pytest.mark.compiled


@pytest.fixture
def folded(monkeypatch):
    """JAX keeps programs by the function alone, which does not tell the side: it forgets them before and after."""
    jax.clear_caches()
    monkeypatch.setattr(blocks, "PLATFORMS", ())
    monkeypatch.setattr(fold, "SHORT", 0)
    monkeypatch.setattr(fold, "FEW", 0)
    monkeypatch.setattr(fold, "COLUMNS", (2, 4))
    yield
    jax.clear_caches()


def classes(rng, label=None):
    z, t, c = (np.float32(f(size=(5, 6))) for f in (rng.normal, rng.random, rng.random))
    z[0, 1:3] = z[0].max() + 1  # two tops
    z[1, [0, 4]] = -np.inf
    t[2, 3] = 0
    t = None if label is not None else t
    return [jax.tree.map(lambda a, v=v: jnp.asarray(a[:, v]), combine.ClassTerm(z, z, t, c)) for v in range(6)]


def summed(some, first, label, than):
    first = jnp.full(some[0].z.shape, first, jnp.int32)
    labels, extra = Ids(jnp.int32(2 if label is None else label), than), ExtraSums(statistics=label is None)
    tokens = Tokens(some[0].z, labels, Adjustment(), classes=Classes(1), extra=extra)
    return combine.sums_of_neighbours(some, first, tokens)


@pytest.mark.parametrize("label", [None, 4], ids=["top", "label"])
def test_combine_joins_in_any_order_and_grouping(rng, label):
    """Sums of six classes, one after the other, in another order, as two halves and as neighbours of two, three and
    six; nothing joined is nothing."""
    six = classes(rng, label)
    some = [summed(six[v : v + 1], v, label, six[2].z) for v in range(6)]

    def joined(parts):
        total = parts[0]
        for part in parts[1:]:
            total = combine.combine(total, part)
        return total

    want = joined(some)
    orders = [[some[v] for v in rng.permutation(6)] for _ in range(4)]
    halves = combine.combine(joined(some[3:]), joined(some[:3]))
    neighbours = [joined([summed(six[v : v + n], v, label, six[2].z) for v in range(0, 6, n)]) for n in (2, 3, 6)]
    none = jax.tree.map(lambda a: jnp.broadcast_to(a, (5,)), combine.sums_of_no_class(some[0]))
    for got in (*map(joined, orders), *neighbours, halves, combine.combine(none, want), combine.combine(want, none)):
        for name, a, b in zip(want._fields, got, want, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.nan
@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("size", [3, 8])
def test_a_row_of_minus_infinity_alone_is_nan_whatever_its_label(size):
    z, labels = jnp.full((size, size), -jnp.inf), jnp.arange(size)
    assert np.all(np.isnan(cross_entropy(z, labels, reduction="none")))
    assert np.all(np.isnan(jax.grad(cross_entropy)(z, labels)))


@pytest.mark.optimized
@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("kind", ["integer", "dense", "log_softmax"])
@pytest.mark.parametrize("row", [64, 3], ids=["row", "parts"])
def test_every_margin(rng, monkeypatch, kind, row):
    """From -100 to 100: loss and gradient as exact as on the other side, also in parts of a row."""
    monkeypatch.setattr(fold, "ROW", row)
    z, labels = at_margins(rng, np.linspace(-100, 100, 101), classes=12)
    targets = np.eye(12, dtype=np.float32)[labels] if kind == "dense" else labels
    cotangent = rng.normal(size=len(z)).astype(np.float32)

    @jax.jit
    def both(z):
        if kind == "log_softmax":
            f = lambda z: -jnp.take_along_axis(log_softmax(z), labels[:, None], 1)[:, 0]  # noqa: E731
        else:
            f = lambda z: cross_entropy(z, targets, reduction="none")  # noqa: E731
        losses, pull = jax.vjp(f, z)
        return losses, pull(cotangent)[0]

    losses, gradient = both(z)
    want = reference.cross_entropy(z, labels, reduction="none", cotangent=np.float64(cotangent))
    assert relative_error(losses, want.loss).max() < PROMISE
    assert relative_error(gradient, want.grad).max() < PROMISE


@pytest.mark.diagonal
@pytest.mark.optimized
@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
@pytest.mark.parametrize("dtype", few_of([jnp.float32, jnp.bfloat16, jnp.float16]), ids=lambda d: d.__name__)
@pytest.mark.parametrize("axis", few_of([-1, 0], 2))
def test_all_options(rng, dtype, dense, axis):
    """Of 11 classes on another axis than the last the last two neighbours are one."""
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    shape = (11 if dense else 12, 5, 3) if axis == 0 else (5, 3, 16)
    case = random_case(rng, shape, axis=axis, dtype=dtype, dense=dense, names=names)
    check_against_reference(jax.jit, rng, *case[:2], {**case[2], "reduction": "none"}, k=16)


SIDES = {
    "softcap": lambda z, y, t: cross_entropy(z, y, reduction="none", softcap=3.0, where=t > 0.02),
    "statistics": lambda z, y, t: jnp.stack([*map(jnp.float32, label_statistics(z, y))]),
    "log_softmax": lambda z, y, t: log_softmax(z)[:, ::5].T,
    "dense": lambda z, y, t: cross_entropy(z, t, reduction="none", label_smoothing=0.1),
    "mixture": lambda z, y, t: kl_divergence(z, teacher_logits=t, temperature=2.0, beta=0.3, reduction="none"),
    "integer": lambda z, y, t: cross_entropy(z, y, reduction="none"),
    "divergence": lambda z, y, t: kl_divergence(z, teacher_logits=2 * t, reduction="none"),
}


@pytest.mark.nan
@pytest.mark.parametrize("name", few_of(list(SIDES), thorough=3))
def test_both_sides_agree(rng, name, monkeypatch):
    """Values, gradients and Hessian-vector products; NaN in the same places: of rows with NaN, +inf, -inf alone, and
    of labels of no class."""
    z, t = np.float32(3 * rng.normal(size=(9, 14))), np.float32(rng.dirichlet(np.ones(14), 9))
    y = rng.integers(0, 14, 9).astype(np.int32)
    z[0, 3], z[1, 4], z[2, 5], z[3] = -np.inf, np.inf, np.nan, -np.inf
    z[5, 6:8] = z[5].max() + 1
    y[:2], y[5], t[0, 3] = 3, 7, 0
    y = jnp.asarray(y).at[4].set(14)  # no class
    f, good = SIDES[name], jnp.array([5, 6, 7, 8])

    def all_of(z):
        of_good = lambda z: jnp.sum(f(z, y[5:], t[5:]))  # noqa: E731
        gradient = jax.grad(lambda z: jnp.sum(f(z, y, t)))(z)
        return f(z, y, t), gradient, jax.grad(lambda z: jnp.sum(jax.grad(of_good)(z) ** 2))(z[good])

    in_blocks = jax.jit(all_of)(z)
    jax.clear_caches()
    monkeypatch.setattr(blocks, "PLATFORMS", ())
    monkeypatch.setattr(fold, "SHORT", 0)
    one_pass = jax.jit(all_of)(z)
    jax.clear_caches()
    for got, want in zip(one_pass, in_blocks, strict=True):
        np.testing.assert_allclose(
            got, want, rtol=1e-5, atol=2e-6 * (1 + np.nanmax(np.where(np.isinf(want), 0, np.abs(want))))
        )


@pytest.mark.devices
@pytest.mark.diagonal
@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("kind", few_of(["automatic", "explicit"]))
@pytest.mark.parametrize("dense", few_of([True, False]), ids=["dense", "integer"])
def test_over_8_devices(rng, kind, dense):
    """Each device's sums are joined, or XLA partitions the fold."""
    asked = problem(rng, (8, 12, 64), dense, ["where", "label_smoothing", "class_weights"])
    specs = asked.specs(P("data"), "model")
    got, _ = under_jit(asked, mesh_of(kind), specs, 1.7)
    assert_equal(got, truth(asked, 1.7))


@pytest.mark.devices
@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("kind", ["integer", "softmax"])
def test_automatically_sharded_classes_stay_where_they_lie(monkeypatch, kind):
    """What moves are sets of a token's classes, a few numbers a device, also where rows are taken in parts."""
    for name, value in {"SHARDED": 0, "ROW": 64}.items():
        monkeypatch.setattr(fold, name, value)
    monkeypatch.setattr(_softmax, "KERNEL", 64)
    mesh = mesh_of("automatic")
    z = jax.ShapeDtypeStruct((16, 1024), jnp.float32, sharding=NamedSharding(mesh, P(None, ("data", "model"))))
    y = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=NamedSharding(mesh, P()))
    f = cross_entropy if kind == "integer" else lambda z, y: jax.vjp(softmax, z)[1](z)[0]
    moved = collectives(jax.jit(f).lower(z, y).compile())
    assert moved and max(c.largest for c in moved) <= 16 * 8


@pytest.mark.devices
@pytest.mark.parametrize("side", ["blocks", "folded"])
@pytest.mark.parametrize("classes", [24, 1024])
def test_softmax_of_explicitly_sharded_classes(rng, monkeypatch, side, classes):
    jax.clear_caches()
    monkeypatch.setattr(blocks, "PLATFORMS", () if side == "folded" else ("cpu",))
    monkeypatch.setattr(fold, "SHORT", 1)
    for module, name in ((fold, "ROW"), (_softmax, "KERNEL")):
        monkeypatch.setattr(module, name, 64)
    x, g = (np.float32(3 * rng.normal(size=(16, classes))) for _ in range(2))
    sharding = NamedSharding(mesh_of("explicit"), P("data", "model"))

    def all_of(x, g):
        return [(y, pull(g)[0]) for y, pull in (jax.vjp(f, x) for f in (softmax, log_softmax))]

    want, got = jax.jit(all_of)(x, g), jax.jit(all_of)(*jax.device_put((x, g), sharding))
    jax.clear_caches()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * epsilon(jnp.float32) * np.max(np.abs(b)))  # 8 sums of 128


def test_a_row_without_any_class_is_told():
    tokens = Tokens(jnp.full((2, 3), -jnp.inf), None, Adjustment(), classes=Classes(1))
    found = fold.sums_in_one_pass(tokens, axis=1)
    np.testing.assert_array_equal(found.row_max, [[-np.inf], [-np.inf]])


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("made", ["softcap", "product"])
def test_a_label_is_not_above_itself(rng, made):
    """Its z is read by itself too, and a compiler may round it otherwise there."""
    z, w, c = (np.float32(rng.normal(size=shape)) for shape in ((64, 200), (1, 200), (64, 1)))
    capped = jax.jit(lambda z, labels: label_statistics(z, labels, softcap=5.0))
    of_product = jax.jit(lambda z, labels: label_statistics(z * w + c, labels))
    for of_row in (np.argmax, np.argmin):
        labels = of_row(z if made == "softcap" else z * w + c, 1)
        found = (capped if made == "softcap" else of_product)(z, labels)
        assert np.all(found.rank == (0 if of_row is np.argmax else 199))
        assert np.all(found.correct == (of_row is np.argmax))


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_softmax_by_the_fold(rng, monkeypatch, dtype):
    """Value, pullback and its derivative against those by passes; exact where y → 1."""
    x, g = (np.asarray(5 * rng.normal(size=(7, 37)), dtype) for _ in range(2))
    x[0, 3] = -np.inf

    def all_of(x, g):
        y, pull = jax.vjp(softmax, x)
        again = jax.grad(lambda x: jnp.sum(jnp.float32(jax.vjp(softmax, x)[1](g)[0]) ** 2))(x)
        return y, pull(g)[0], again

    monkeypatch.setattr(blocks, "PLATFORMS", ("cpu",))
    jax.clear_caches()
    want = jax.jit(all_of)(x, g)
    monkeypatch.setattr(blocks, "PLATFORMS", ())
    monkeypatch.setattr(fold, "SHORT", 1)
    jax.clear_caches()
    for got, of_short in zip(jax.jit(all_of)(x, g), want, strict=True):
        size = 1 + np.max(np.abs(np.float64(of_short)))
        np.testing.assert_allclose(np.float64(got), np.float64(of_short), rtol=0, atol=4 * epsilon(dtype) * size)
    confident = np.asarray([20, 0, 0] + 34 * [-np.inf], dtype)
    dx = jax.jit(lambda x, g: jax.vjp(softmax, x)[1](g)[0])(confident, np.asarray(np.arange(37) == 0, dtype))
    p = np.exp(-20) / (1 + 2 * np.exp(-20))
    np.testing.assert_allclose(np.float64(dx[:3]), [2 * p, -p, -p], rtol=8 * epsilon(dtype))
    jax.clear_caches()


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_an_even_row_and_the_cotangent_of_its_label(dtype):
    """Of -log y_0 where all y are 1/1000, rounded: the gradient of the others is that y. As one sum is made of the
    others, of which one term is 1000 times the rest, it may lose as many roundings in float32."""
    x = jnp.zeros(1000, dtype)
    dx = jax.jit(jax.grad(lambda x: -jnp.log(softmax(x).astype(jnp.float32)[0])))(x)
    error = max(1000 * epsilon(jnp.float32), 4 * epsilon(dtype))
    np.testing.assert_allclose(np.float64(dx[1:]), 1e-3, rtol=error)


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_softmaxs_gradient_is_as_exact_as_its_cotangent(rng, monkeypatch, dtype):
    """Against float64, at every margin, of cotangents that have something in common, and one that stands out. Right to
    roundings of y as it is kept, of each difference's term, and of each cotangent, in which the class of y > 1/2 has no
    term of its own."""
    x = rng.normal(size=(31, 37)) * np.linspace(0, 30, 31)[:, None]
    g = rng.normal(size=x.shape) + rng.choice([0, 100], (31, 1)) + 1000 * (rng.random(x.shape) < 0.02)
    x, g = np.asarray(x, dtype), np.asarray(g, dtype)
    got = np.float64(jax.jit(lambda x, g: jax.vjp(softmax, x)[1](g)[0])(x, g))
    x, g = np.float64(x), np.float64(g)
    p, away = reference.softmax(x), g[:, :, None] - g[:, None, :]
    others, top = np.where(p > 0.5, 0, p), np.where(p > 0.5, g, 0).sum(-1, keepdims=True)
    of_y = p * np.sum(p[:, None, :] * np.abs(away), -1)
    of_g = p * np.sum(others * (np.abs(g) + np.abs(top)), -1, keepdims=True)
    roundings = 4 * epsilon(dtype) * of_y + 4 * epsilon(jnp.float32) * (2 + np.abs(x).max(-1, keepdims=True)) * (
        of_y + of_g
    )
    underflow = float(jnp.finfo(dtype).tiny) * (1 + np.abs(away).max())
    assert np.all(np.abs(got - p * np.sum(p[:, None, :] * away, -1)) <= roundings + underflow)


def test_neighbours_on_another_axis_than_the_last():
    """As many as divide the classes, or 8; of many classes, which may lie over devices, as leave each of 32 its own."""
    assert [fold._of_columns(n) for n in (150, 64, 151, 32000, 8193)] == [15, 16, 8, 10, 1]
