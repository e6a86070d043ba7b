"""`statistics=True`: what `label_statistics` says of every token, beside the loss and from the same program."""

import re
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from softmax_jax import LabelStatistics, SparseLabels, cross_entropy, label_statistics, linear_cross_entropy

TOKENS, EMBED, CLASSES = 12, 6, 17


def case(rng):
    x, weight = (rng.normal(size=s).astype(np.float32) for s in ((TOKENS, EMBED), (EMBED, CLASSES)))
    labels = rng.integers(0, CLASSES, TOKENS).astype(np.int32)
    labels[3] = -100
    return x, weight, labels


OPTIONS = {
    "none": {},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "logit_scale": 0.7, "softcap": 5.0, "normalizer": 7.0},
}


@pytest.mark.diagonal
@pytest.mark.parametrize("options", few_of(["all", "none"]))
@pytest.mark.parametrize("form", few_of(["linear", "logits", "axis 0"]))
def test_loss_gradient_and_statistics_are_those_of_the_two_functions(rng, form, options):
    x, weight, labels = case(rng)
    options = {"ignore_index": -100} | OPTIONS[options]

    def loss(x, **more):
        if form == "linear":
            return linear_cross_entropy(x, weight, labels, chunk_size=5, **options, **more)
        logits = x @ weight
        return cross_entropy(logits.T if form == "axis 0" else logits, labels, axis=form != "axis 0", **options, **more)

    both = jax.jit(jax.value_and_grad(lambda x: loss(x, statistics=True), has_aux=True))
    (value, statistics), gradient = both(x)
    want, its_gradient = jax.jit(jax.value_and_grad(loss))(x)
    np.testing.assert_allclose(value, want, rtol=3e-7)
    np.testing.assert_allclose(gradient, its_gradient, rtol=0, atol=1e-6)
    named = {name: options[name] for name in ("ignore_index", "logit_scale", "softcap") if name in options}
    for got, of_two in zip(
        statistics, jax.jit(lambda z: label_statistics(z, labels, **named))(x @ weight), strict=True
    ):
        assert got.dtype == of_two.dtype
        np.testing.assert_allclose(got, of_two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", few_of([False, True]), ids=["logits", "linear"])
def test_reduction_none_and_weights(rng, linear):
    x, weight, labels = case(rng)
    weights = np.where(np.arange(TOKENS) % 3 == 0, 0, 1.5).astype(np.float32)
    how = {"weights": weights, "ignore_index": -100, "reduction": "none", "statistics": True}
    losses, statistics = (
        linear_cross_entropy(x, weight, labels, chunk_size=5, **how)
        if linear
        else cross_entropy(x @ weight, labels, **how)
    )
    used = (weights != 0) & (labels != -100)
    np.testing.assert_allclose(losses, np.where(used, -weights * statistics.log_prob, 0), rtol=1e-6)
    for number in statistics:
        assert np.all(np.asarray(number)[~used] == 0)


def test_they_have_no_gradient(rng):
    """Neither by the logits nor by an option, in either form."""
    x, weight, labels = case(rng)
    labels = np.maximum(labels, 0)

    def of_logits(z, scale):
        return cross_entropy(z, labels, logit_scale=scale, statistics=True)[1].entropy.sum()

    def of_head(x, w):
        return linear_cross_entropy(x, w, labels, statistics=True, chunk_size=5)[1].log_prob.sum()

    for gradients in (jax.grad(of_logits, (0, 1))(x @ weight, 0.7), jax.grad(of_head, (0, 1))(x, weight)):
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.nan
def test_the_prediction_is_the_first_of_the_largest_that_exist():
    logits = np.zeros((6, 40), np.float32)
    logits[0, [7, 31]] = 2
    logits[1, 39] = 1e-30
    logits[2, 5] = 9
    logits[3, 5] = np.nan
    logits[4] = -np.inf
    logits[5, 1:] = -np.inf
    where = np.ones((6, 40), bool)
    where[2, 5] = False
    got = label_statistics(logits, np.zeros(6, int), where=where)
    np.testing.assert_array_equal(got.prediction, [7, 39, 0, -1, -1, 0])
    outside = label_statistics(logits[:1], jnp.array([40]))
    assert np.isnan(outside.log_prob[0]) and outside.prediction[0] == 7


@pytest.mark.devices
@pytest.mark.thorough
@pytest.mark.parametrize("kind", few_of(["explicit", "automatic"]))
def test_over_8_devices(rng, kind):
    x, weight, labels = rng.normal(size=(16, EMBED)), rng.normal(size=(EMBED, 32)), rng.integers(0, 32, 16)
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    want = cross_entropy(x @ weight, labels, statistics=True)

    def both(x, weight, labels):
        linear = linear_cross_entropy(x, weight, labels, chunk_size=4, statistics=True)
        return linear, cross_entropy(jnp.matmul(x, weight), labels, statistics=True)

    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        specs = P("data"), P(None, "model"), P("data")
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip((x, weight, labels), specs, strict=True)
        ]
        of_both = jax.jit(both)(*placed)
    for got in of_both:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.compiled
@pytest.mark.cpu_compiler
def test_only_what_is_used_is_computed_and_no_product_is_made_again():
    shapes = [jax.ShapeDtypeStruct(*of) for of in (((64, 32), "float32"), ((32, 4000), "float32"), ((64,), "int32"))]

    def compiled(f):
        return jax.jit(f).lower(*shapes).compile()

    def of_logits(read):
        return compiled(lambda x, w, y: read(cross_entropy(x @ w, y, statistics=True)))

    flops = lambda program: program.cost_analysis()["flops"]  # noqa: E731
    alone = flops(compiled(lambda x, w, y: cross_entropy(x @ w, y)))
    assert flops(of_logits(lambda both: both[0])) == alone
    assert alone < flops(of_logits(lambda both: (both[0], both[1].rank))) < flops(of_logits(lambda both: both))

    loss = lambda x, w, y: linear_cross_entropy(x, w, y, statistics=True, chunk_size=16)  # noqa: E731
    text = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True)).as_text()
    assert len(re.findall(r" (?:dot|custom-call)\(", text)) == 3


def test_types_follow_from_the_flag(rng):
    """For a type checker, which reads this file, and at run time."""
    x, weight, labels = case(rng)
    loss, of_head = cross_entropy(x, labels % EMBED), linear_cross_entropy(x, weight, labels % CLASSES)
    pair = cross_entropy(x.tolist(), labels % EMBED, statistics=True)
    of_pair = linear_cross_entropy(x, weight, labels % CLASSES, bias=[0.0] * CLASSES, statistics=True)
    for of_one in (assert_type(loss, jax.Array), assert_type(of_head, jax.Array)):
        assert isinstance(of_one, jax.Array)
    for of_both in (
        assert_type(pair, tuple[jax.Array, LabelStatistics]),
        assert_type(of_pair, tuple[jax.Array, LabelStatistics]),
    ):
        assert isinstance(of_both[0], jax.Array) and isinstance(of_both[1], LabelStatistics)
    flag = bool(len(x))
    assert_type(cross_entropy(x, labels % EMBED, statistics=flag), jax.Array | tuple[jax.Array, LabelStatistics])


@pytest.mark.usefixtures("untyped")
def test_other_labels_than_ids_are_refused():
    dense = np.full((3, 4), 0.25, np.float32)
    for labels in (dense, SparseLabels(np.zeros((3, 1), int), np.ones((3, 1), np.float32))):
        with pytest.raises(TypeError, match="`labels` with statistics=True must be integers.*Pass class ids"):
            cross_entropy(dense, labels, statistics=True)
    with pytest.raises(TypeError, match="`labels` must be integers.*got None. Pass ids of shape .3,."):
        cross_entropy(dense, None, statistics=True)
