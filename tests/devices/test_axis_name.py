"""`axis_name`: classes sharded over mesh axes inside `shard_map`, against the whole on one device in float64."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few_of
from jax import lax
from jax.sharding import PartitionSpec as P
from meshes import (
    OPTIONS,
    assert_equal,
    assert_summed_in_float32,
    cancelling,
    collectives,
    mesh_of,
    problem,
    truth,
    under_shard_map,
)

from softmax_jax import cross_entropy, linear_cross_entropy

pytestmark = pytest.mark.compiled

MESH = mesh_of("automatic")
both = pytest.mark.parametrize("dense", few_of([False, True]), ids=["integer", "dense"])
doors = pytest.mark.parametrize("embed", few_of([40, None]), ids=["linear", "logits"])


def check(rng, asked, batch=("data",), classes="model", tokens="data", **how):
    """Value and every gradient are those of the whole; what moves is a number a token, or a gradient."""
    reduction = asked.fixed.get("reduction")
    cotangent = rng.normal(size=asked.batch() if reduction == "none" else ())
    specs = asked.specs(P(*batch), classes)
    got, program = under_shard_map(asked, MESH, specs, cotangent, tokens, axis_name=classes, **how)
    assert_equal(got, truth(asked, cotangent))
    assert {found.op for found in collectives(program)} <= {"all-reduce"}
    return got


@pytest.mark.diagonal
@both
@doors
def test_all_options_together(rng, embed, dense):
    """Gradients of logits or x, weight and bias, and of every option: none off by the number of devices."""
    reduction = "none" if dense == (embed is None) else "sum"
    names = OPTIONS if dense else (*OPTIONS, "ignore_index")
    more = {} if embed is None else {"chunk_size": 7}
    check(rng, problem(rng, (8, 6, 64), dense, names, embed, reduction=reduction, **more))


@pytest.mark.diagonal
@pytest.mark.thorough
@both
@doors
def test_gradient_taken_inside_of_shard_map(rng, embed, dense):
    names = ("weights", "class_weights", "label_smoothing", "logit_scale")
    check(rng, problem(rng, (8, 6, 64), dense, names, embed, reduction="sum"), outside=False)


@pytest.mark.diagonal
@pytest.mark.thorough
@both
@doors
def test_several_mesh_axes(rng, embed, dense):
    """64 classes over all 8 devices, in the order in which `PartitionSpec` lays them."""
    asked = problem(rng, (4, 6, 64), dense, ("label_smoothing", "where"), embed, reduction="none")
    check(rng, asked, batch=(), classes=("data", "model"), tokens=())


@pytest.mark.thorough
@pytest.mark.parametrize("transpose", few_of([False, True], thorough=0))
def test_head_over_data_and_model(rng, transpose):
    """x is the same along `model`, the weight along `data`; chunks do not divide the tokens."""
    asked = problem(rng, (8, 11, 64), embed=24, reduction="sum", chunk_size=10, transpose_weight=transpose)
    check(rng, asked)


@pytest.mark.parametrize("embed", few_of([None, 40]), ids=["logits", "linear"])
def test_smoothing_over_a_sharded_vocabulary_is_over_all_of_it(rng, embed):
    """Not the mean over each shard (Megatron 737, 7452)."""
    check(rng, problem(rng, (8, 6, 64), names=("label_smoothing",), embed=embed, reduction="sum"))


@pytest.mark.diagonal
@both
@doors
@pytest.mark.parametrize("outside", [True, False])
def test_gradients_are_not_off_by_the_number_of_devices(rng, outside, embed, dense):
    """Whatever the gradient is taken of: a fact of the type under check_vma=True (ejkernel: 1/tp of it)."""
    check(rng, problem(rng, (8, 6, 64), dense, embed=embed, reduction="none"), outside=outside)


@doors
def test_without_check_vma_the_value_is_right_and_the_gradient_refused(rng, embed):
    asked = problem(rng, (8, 6, 64), embed=embed, reduction="none")
    specs = asked.specs(P("data"), "model")
    of_device = lambda arrays: asked.loss(arrays, axis_name="model")  # noqa: E731
    how = {"mesh": MESH, "in_specs": (specs,), "out_specs": P("data", None), "check_vma": False}
    value = jax.jit(jax.shard_map(of_device, **how))(asked.arrays)
    np.testing.assert_allclose(value, truth(asked, np.ones((8, 6)))[0], rtol=2e-6)
    for outside in (True, False):
        with pytest.raises(ValueError, match="check_vma=True"):
            under_shard_map(asked, MESH, specs, np.ones((8, 6)), check_vma=False, outside=outside, axis_name="model")


@pytest.mark.parametrize("check_vma", few_of([False, True]))
def test_data_parallel_without_axis_name_under_either_setting(rng, check_vma):
    """Each device a batch of its own: nothing of ours crosses devices; the weight's gradient is the sum of theirs."""
    asked = problem(rng, (8, 6, 64), embed=24, reduction="sum", chunk_size=5)
    specs = asked.specs(P(("data", "model")), None)
    cotangent = 1.7
    got, _ = under_shard_map(asked, MESH, specs, cotangent, ("data", "model"), check_vma=check_vma)
    assert_equal(got, truth(asked, cotangent))


@both
@pytest.mark.nan
def test_a_shard_of_minus_inf_alone(rng, dense):
    """The classes of one device all have probability zero; a row that has none at all is NaN."""
    asked = problem(rng, (8, 6, 64), dense, reduction="none")
    logits = asked.arrays["logits"]
    logits[..., 16:32] = -np.inf
    if dense:
        asked.arrays["labels"][..., 16:32] = 0
    else:
        asked.arrays["labels"] %= 16
    logits[0, 0] = -np.inf
    check(rng, asked)


@both
def test_one_class_and_one_token_a_device(rng, dense):
    asked = problem(rng, (2, 4), dense, names=("class_weights", "label_smoothing"), reduction="none")
    asked.arrays["class_weights"][1] = 0
    if dense:
        asked.arrays["labels"] = np.eye(4, dtype=np.float32)[[3, 1]]
    check(rng, asked)


@pytest.mark.parametrize("embed", few_of([None, 40]), ids=["logits", "linear"])
def test_class_counts_that_devices_do_not_divide(rng, embed):
    """61 classes padded to 64 by `where`: the loss of 61, and inf for the id of a padded class."""
    asked = problem(rng, (8, 6, 61), names=("class_weights", "label_smoothing"), embed=embed, reduction="none")
    cotangent = rng.normal(size=(8, 6))
    value, gradients = truth(asked, cotangent)
    padding = {"logits": [(0, 0), (0, 0), (0, 3)], "weight": [(0, 0), (0, 3)], "bias": (0, 3), "class_weights": (0, 3)}
    padded = {name: np.pad(a, padding[name]) if name in padding else a for name, a in asked.arrays.items()}
    padded["class_weights"][61:] = 1
    padded["where"] = np.arange(64)[None, None] < 61
    asked = asked._replace(arrays=padded)
    gradients = {name: np.pad(g, padding[name]) if name in padding else g for name, g in gradients.items()}
    specs = asked.specs(P("data"), "model")
    got, program = under_shard_map(asked, MESH, specs, cotangent, axis_name="model")
    assert_equal(got, (value, gradients))

    padded["labels"] = np.where(np.arange(48).reshape(8, 6) == 7, 62, padded["labels"]).astype(np.int32)
    loss, _ = program(asked.arrays, np.float32(cotangent))
    assert np.isposinf(loss[1, 1]) and np.isfinite(loss).sum() == 47


@doors
@pytest.mark.nan
def test_labels_out_of_range_are_nan_everywhere(rng, embed):
    """In range is judged among all classes: 16 is a class of another device, 64 and -1 of none."""
    asked = problem(rng, (8, 6, 64), embed=embed, reduction="none")
    asked.arrays["labels"][0, :4] = [16, 64, -1, -(2**31)]
    specs = asked.specs(P("data"), "model")
    (loss, gradients), _ = under_shard_map(asked, MESH, specs, np.ones((8, 6)), axis_name="model")
    expected = np.zeros((8, 6), bool)
    expected[0, 1:4] = True
    np.testing.assert_array_equal(np.isnan(loss), expected)
    per_token = gradients["logits" if embed is None else "x"]
    np.testing.assert_array_equal(np.isnan(per_token).all(-1), expected)
    np.testing.assert_array_equal(np.isnan(per_token).any(-1), expected)


def test_confident_tokens_stay_exact():
    """At a margin of 40 the loss is 4e-18, with the label on any of the devices; the pivot of dense labels too."""
    logits, ids = np.zeros((8, 64), np.float32), 9 * np.arange(8)
    logits[np.arange(8), ids] = 40
    logits[:, 5] = 40 * (np.arange(8) == 0)  # a tie on the first row: class 0 and class 5
    odds = ((logits == 40).sum(1) - 1) + np.exp(-40.0) * (logits == 0).sum(1)
    f = jax.shard_map(
        lambda z, y: cross_entropy(z, y, axis_name="model", reduction="none"),
        mesh=MESH,
        in_specs=(P("data", "model"), P("data", "model")),
        out_specs=P("data"),
    )
    one_hot = np.eye(64, dtype=np.float32)[ids]

    @jax.jit
    def both(logits):
        loss, pull = jax.vjp(lambda z: f(z, one_hot), logits)
        return loss, pull(jnp.ones(8, jnp.float32))[0]

    loss, gradient = map(np.asarray, both(logits))
    np.testing.assert_allclose(loss, np.log1p(odds), rtol=1e-6)
    np.testing.assert_allclose(gradient[np.arange(8), ids], -odds / (1 + odds), rtol=1e-6)


@doors
def test_mean_over_a_sharded_batch(rng, embed):
    """The divisor of all devices, by `normalizer`; the sum of what the devices return is the mean."""
    asked = problem(rng, (8, 6, 64), names=("weights",), embed=embed)
    specs = asked.specs(P("data"), "model")

    def loss(arrays):
        tokens = lax.psum(jnp.sum(arrays["weights"]), "data")
        return lax.psum(asked.loss(arrays, axis_name="model", normalizer=tokens), "data")

    mapped = jax.shard_map(loss, mesh=MESH, in_specs=(specs,), out_specs=P())
    value, gradients = jax.jit(jax.value_and_grad(mapped, allow_int=True))(asked.arrays)
    floats = {name: g for name, g in gradients.items() if name != "labels"}
    assert_equal((value, floats), truth(asked, 1.0))


@pytest.mark.thorough
@doors
def test_mean_with_class_weights_over_sharded_classes(rng, embed):
    """The divisor Σ weights · c_y, where each label's c is on one device alone."""
    check(rng, problem(rng, (8, 7, 64), names=("weights", "class_weights"), embed=embed), batch=(), tokens=())


def test_the_guides_example():
    """The blocks as they are printed: what both of its losses and their gradients are, against the whole."""
    page = (Path(__file__).parents[2] / "docs/guides/sharding.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    last = next(i for i, block in enumerate(blocks) if "def sharded_loss" in block)
    code, names = "".join(blocks[: last + 1]).partition("import jax\n"), {}
    exec(code[1] + code[2], names)  # without the settings, which stand before JAX is imported
    operands = [names[name] for name in ("x", "head", "labels")]
    assert operands[1].sharding.spec == P(None, "model") and len(operands[1].addressable_shards) == jax.device_count()
    value_and_gradient = lambda loss, operands: jax.jit(jax.value_and_grad(loss, (0, 1)))(*operands)  # noqa: E731
    by_name = lambda found: (found[0], dict(zip(("hidden", "head"), found[1], strict=True)))  # noqa: E731
    want = by_name(value_and_gradient(names["loss"], [*map(np.asarray, operands)]))
    want = jax.tree.map(np.asarray, want)
    for name in ("loss", "sharded_loss"):
        assert_equal(by_name(value_and_gradient(names[name], operands)), want)


@pytest.mark.diagonal
@pytest.mark.thorough
@pytest.mark.parametrize(
    "same",
    few_of([("x", "labels", "weights"), ("bias", "logit_scale"), ("weights", "weight"), ("x",)], thorough=1),
    ids=str,
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_operands_that_are_the_same_along_data_have_the_sum_of_the_gradients(rng, reduction, same):
    """Whichever they are: two batches, or two heads, or two temperatures over `data`, and what they share."""
    names = ("weights", "class_weights", "logit_scale")
    asked = problem(rng, (6, 32), False, names, 16, reduction=reduction, chunk_size=4)
    stacked = {
        name: np.stack([a] * 2) if name in same else np.stack([a, np.roll(a, 1, -1) if a.ndim else a + 1])
        for name, a in asked.arrays.items()
    }
    specs = asked.specs(P(), "model")
    in_specs = {name: specs[name] if name in same else P("data", *specs[name]) for name in stacked}
    given = {name: a[0] if name in same else a for name, a in stacked.items()}
    cotangents = rng.normal(size=(2, 6) if reduction == "none" else 2)

    def on_device(arrays, cotangents):
        own = {name: a if name in same else a[0] for name, a in arrays.items()}
        return lax.psum(jnp.sum(asked.loss(own, axis_name="model") * cotangents[0]), "data")

    floats = {name: a for name, a in given.items() if name != "labels"}
    mapped = jax.shard_map(on_device, mesh=MESH, in_specs=(in_specs, P("data")), out_specs=P())
    got = jax.jit(jax.grad(lambda floats: mapped({**given, **floats}, np.float32(cotangents))))(floats)

    each = [truth(asked._replace(arrays={n: a[i] for n, a in stacked.items()}), cotangents[i])[1] for i in range(2)]
    want = {name: sum(e[name] for e in each) if name in same else np.stack([e[name] for e in each]) for name in floats}
    assert_equal((0.0, got), (np.float64(0), want))


def test_forward_mode(rng):
    asked = problem(rng, (8, 6, 64), names=("z_loss", "label_smoothing"), reduction="none")
    specs, tangent = asked.specs(P("data"), "model"), rng.normal(size=(8, 6, 64)).astype(np.float32)

    def loss(logits, **more):
        return asked.loss({**arrays, "logits": logits}, **more)

    arrays = {name: a for name, a in asked.arrays.items() if name != "logits"}
    along = lambda f: jax.jit(lambda z, t: jax.jvp(f, (z,), (t,))[1])(asked.arrays["logits"], tangent)  # noqa: E731
    want = along(lambda z: loss(z, forward_mode=True))
    arrays_at = {name: specs[name] for name in arrays}
    mapped = jax.shard_map(
        lambda z, arrays: asked.loss({**arrays, "logits": z}, axis_name="model", forward_mode=True),
        mesh=MESH,
        in_specs=(specs["logits"], arrays_at),
        out_specs=P("data", None),
    )
    got = along(lambda z: mapped(z, arrays))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_hessian_vector_product(rng):
    asked = problem(rng, (4, 6, 64), embed=16, bias=False, chunk_size=4, reduction="sum")
    specs = asked.specs(P("data"), "model")
    a = asked.arrays

    def product(loss):
        return jax.jit(jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2)))(a["weight"])

    mapped = jax.shard_map(
        lambda w, x, y: lax.psum(linear_cross_entropy(x, w, y, axis_name="model", **asked.fixed), "data"),
        mesh=MESH,
        in_specs=(specs["weight"], specs["x"], specs["labels"]),
        out_specs=P(),
    )
    want = product(lambda w: linear_cross_entropy(a["x"], w, a["labels"], **asked.fixed))
    got = product(lambda w: mapped(w, a["x"], a["labels"]))
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * 1.2e-7 * np.max(np.abs(want)))


@pytest.mark.thorough
def test_vmap_inside_of_shard_map(rng):
    asked = problem(rng, (8, 6, 64), reduction="none")
    specs = asked.specs(P("data"), "model")
    one = lambda z, y: cross_entropy(z, y, axis_name="model")  # noqa: E731
    mapped = jax.shard_map(
        jax.vmap(jax.vmap(one)), mesh=MESH, in_specs=(specs["logits"], specs["labels"]), out_specs=P("data", None)
    )
    loss, pull = jax.vjp(lambda z: mapped(z, asked.arrays["labels"]), asked.arrays["logits"])
    assert_equal((loss, {"logits": pull(jnp.ones((8, 6), jnp.float32))[0]}), truth(asked, np.ones((8, 6))))


@pytest.mark.parametrize("name", few_of(["weight", "x"]))
def test_bfloat16_gradients_are_summed_over_devices_in_float32(rng, name):
    asked = cancelling(rng, name)
    (_, got), _ = under_shard_map(asked, MESH, asked.specs(P("data"), "model"), 1.0, axis_name="model")
    assert_summed_in_float32(got[name], asked, name)


@pytest.mark.parametrize(
    "f, spec, message",
    [
        (lambda z: cross_entropy(z, jnp.zeros(8, int), axis_name="vocabulary"), P(None, "model"), "got 'vocabulary'"),
        (lambda z: cross_entropy(z, jnp.zeros(8, int), axis_name=0), P(None, "model"), "got 0"),
        (lambda z: cross_entropy(z, jnp.zeros(8, int), axis_name=("model",) * 2), P(None, "model"), "mesh axis twice"),
        (lambda z: cross_entropy(z, jnp.zeros(4, int), axis_name="model"), P("data"), r"same .* along \['m"),
        (
            lambda z: linear_cross_entropy(jnp.zeros((3, 8)), z, jnp.zeros(3, int), axis_name=("data", "model")),
            P(None, "model"),
            r"`weight` is the same on every device along \['data'\]",
        ),
    ],
)
def test_errors(untyped, f, spec, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(jax.shard_map(f, mesh=MESH, in_specs=spec, out_specs=P()), jnp.zeros((8, 64)))


@pytest.mark.nan
def test_a_row_that_is_nan_on_every_device_is_nan():
    """Failure 46: of NaN on every one of them, XLA's maximum over CPUs is -inf."""
    z = jnp.full((2, 64), jnp.nan).at[1].set(0)

    def losses(z):
        return cross_entropy(z, jnp.zeros(2, int), axis_name="model", reduction="none")

    loss = jax.jit(jax.shard_map(losses, mesh=MESH, in_specs=P(None, "model"), out_specs=P()))(z)
    np.testing.assert_array_equal(np.isnan(loss), [True, False])


def test_axis_name_outside_of_shard_map():
    with pytest.raises(ValueError, match="under `jit` sharded classes need none"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2, int), axis_name="model")


def test_forward_mode_needs_check_vma():
    f = lambda z: cross_entropy(z, jnp.zeros(8, int), axis_name="model", forward_mode=True)  # noqa: E731
    mapped = jax.shard_map(f, mesh=MESH, in_specs=P(None, "model"), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match="the derivative over axis_name=.* needs `jax.shard_map"):
        jax.jvp(mapped, (jnp.zeros((8, 64)),), (jnp.ones((8, 64)),))
