"""Under `jit`: values, gradients, output layouts, and what the compiled program moves, automatic and explicit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import few_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
    OPTIONS,
    assert_equal,
    assert_summed_in_float32,
    cancelling,
    collectives,
    mesh_of,
    placed,
    problem,
    truth,
    under_jit,
)

from softmax_jax import cross_entropy, linear_cross_entropy, log_softmax, softmax, softmax_cross_entropy
from softmax_jax._sums import blocks

pytestmark = pytest.mark.compiled

kinds = pytest.mark.parametrize("kind", ["automatic", "explicit"])
both = pytest.mark.parametrize("dense", [False, True], ids=["integer", "dense"])
layouts = pytest.mark.parametrize(
    "batch, classes",
    [(P("data"), None), (P(), "model"), (P("data"), "model"), (P(("data", "model")), None), (P(None, "data"), "model")],
    ids=["batch", "classes", "both", "batch over all", "sequence"],
)


def assert_moves_little(program, per_token, gradients=(), gathered=()):
    """Only reductions, of at most `per_token` numbers a device or of a gradient's own size; and a gather of the head,
    where its embed axis is sharded. The sums in one pass are gathered, which is a set of numbers a token and device."""
    for found in collectives(program):
        if found.op == "all-gather" and "cpu" in blocks.PLATFORMS:
            assert found.largest in gathered and not found.in_loop, found
        elif found.op == "all-gather":
            assert found.largest in gathered or found.largest <= per_token * 8, found
        else:
            assert found.op in ("all-reduce", "reduce-scatter"), found
            assert found.largest <= per_token or found.largest in gradients, found


def assert_lies(gradients, specs, mesh):
    for name, gradient in gradients.items():
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), gradient.ndim), name


@pytest.mark.diagonal
@kinds
@both
@layouts
def test_cross_entropy(rng, kind, dense, batch, classes):
    asked = problem(rng, (8, 12, 64), dense)
    mesh, specs = mesh_of(kind), asked.specs(batch, classes)
    got, program = under_jit(asked, mesh, specs, 1.7)
    assert_equal(got, truth(asked, 1.7))
    assert_lies({"logits": got[1]["logits"]}, specs, mesh)
    assert_moves_little(program, per_token=8 * 12)


@pytest.mark.diagonal
@pytest.mark.thorough
@kinds
@both
def test_rows_longer_than_a_block_over_sharded_classes(rng, kind, dense):
    asked = problem(rng, (8, 65536), dense)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    got, program = under_jit(asked, mesh, specs, 1.7)
    assert_equal(got, truth(asked, 1.7))
    assert_moves_little(program, per_token=8 * 2)


@pytest.mark.diagonal
@pytest.mark.thorough
@kinds
@both
def test_cross_entropy_with_all_options(rng, kind, dense):
    reduction = "none" if dense == (kind == "explicit") else "mean"
    names = OPTIONS if dense else (*OPTIONS, "ignore_index")
    asked = problem(rng, (8, 6, 64), dense, names, reduction=reduction)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    cotangent = rng.normal(size=(8, 6) if reduction == "none" else ())
    got, program = under_jit(asked, mesh, specs, cotangent)
    assert_equal(got, truth(asked, cotangent))
    assert_lies(got[1], specs, mesh)
    assert_moves_little(program, per_token=4 * 6)


@pytest.mark.thorough
@pytest.mark.diagonal
@kinds
@pytest.mark.parametrize("axis", [0, 1])
def test_classes_on_another_axis(rng, kind, axis):
    asked = problem(rng, (8, 6, 64))
    asked.arrays["logits"], mesh = np.moveaxis(asked.arrays["logits"], -1, axis), mesh_of(kind)
    asked.fixed["axis"] = axis
    spec = list(P("data", None))
    spec.insert(axis, "model")
    got, program = under_jit(asked, mesh, {"logits": P(*spec), "labels": P("data")}, 1.7)
    assert_equal(got, truth(asked, 1.7))
    assert_moves_little(program, per_token=4 * 6)


# 4 chunks of 32 tokens.
TOKENS, EMBED, CLASSES = (8, 16), 40, 256


@pytest.mark.diagonal
@kinds
@pytest.mark.parametrize(
    "batch, classes, embed",
    [
        (P("data"), "model", None),
        (P("data"), "model", "data"),
        pytest.param(P("data"), None, None, marks=pytest.mark.thorough),
        pytest.param(P(), "model", None, marks=pytest.mark.thorough),
        pytest.param(P(("data", "model")), None, ("data", "model"), marks=pytest.mark.thorough),
    ],
    ids=["both", "FSDP", "batch", "classes", "FSDP over all"],
)
def test_linear_cross_entropy(rng, kind, batch, classes, embed):
    transpose = embed is not None  # a tied table, say
    asked = problem(rng, (*TOKENS, CLASSES), embed=EMBED, chunk_size=32, transpose_weight=transpose)
    mesh, specs = mesh_of(kind), asked.specs(batch, classes, embed)
    got, program = under_jit(asked, mesh, specs, 1.7)
    assert_equal(got, truth(asked, 1.7))
    assert_lies({name: got[1][name] for name in ("x", "weight")}, specs, mesh)
    head = EMBED * CLASSES // (4 if classes else 1)
    tokens = 128 // np.prod([mesh.shape[name] for entry in batch if entry for name in np.atleast_1d(entry)], dtype=int)
    gradients = {head, head // 2, head // 8, tokens * EMBED, tokens * EMBED // 4, CLASSES, CLASSES // 4}
    assert_moves_little(program, per_token=128, gradients=gradients, gathered={head} if embed else ())


@pytest.mark.diagonal
@pytest.mark.thorough
@kinds
@both
def test_linear_cross_entropy_with_all_options(rng, kind, dense):
    reduction = "none" if dense == (kind == "explicit") else "mean"
    names = OPTIONS if dense else (*OPTIONS, "ignore_index")
    asked = problem(rng, (*TOKENS, CLASSES), dense, names, embed=EMBED, chunk_size=32, reduction=reduction)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    cotangent = rng.normal(size=TOKENS if reduction == "none" else ())
    got, program = under_jit(asked, mesh, specs, cotangent)
    assert_equal(got, truth(asked, cotangent))
    assert_lies(got[1], specs, mesh)
    chunk = 32 * EMBED if kind == "explicit" else 16 * EMBED  # tokens of a device
    gradients = {EMBED * CLASSES // 4, chunk, 64 * EMBED, CLASSES // 4}
    assert_moves_little(program, per_token=128, gradients=gradients)


@pytest.mark.thorough
@kinds
def test_chunks_that_do_not_divide_the_tokens(rng, kind):
    """7 x 14 tokens in chunks of at most 20: padded, on each device where the layout is known."""
    asked = problem(rng, (14, 7, CLASSES), embed=EMBED, chunk_size=20)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    got, program = under_jit(asked, mesh, specs, 1.7)
    assert_equal(got, truth(asked, 1.7))
    if kind == "explicit":
        assert_moves_little(program, 98, {EMBED * CLASSES // 4, 51 * EMBED, CLASSES // 4})  # 49 tokens in 3 chunks


def loops(program) -> list[str]:
    """But for those over a chunk's blocks, and those that XLA makes of a scatter (0.10)."""
    inner = ("/scatter", "/cond/branch")
    lines = [line for line in program.as_text().splitlines() if " while(" in line]
    return [line for line in lines if not any(name in line for name in inner)]


@pytest.mark.parametrize("batch", few_of([P("data"), P(("data", "model"))]), ids=str)
def test_one_chunk_a_device_is_no_loop(rng, batch):
    """The size of a chunk is judged on a device's own tokens, so that sharding a batch does not switch on the loop."""
    asked = problem(rng, (*TOKENS, CLASSES), embed=EMBED, chunk_size=64)
    _, program = under_jit(asked, mesh_of("explicit"), asked.specs(batch, None), 1.0)
    assert not loops(program)
    _, one_device = under_jit(asked, mesh_of("explicit"), asked.specs(P(), None), 1.0)
    assert loops(one_device)


@pytest.mark.diagonal
@pytest.mark.parametrize("kind", few_of(["automatic", "explicit"]))
@pytest.mark.parametrize("name", few_of(["x", "weight"]))
def test_bfloat16_gradients_are_summed_over_devices_in_float32(rng, kind, name):
    asked = cancelling(rng, name)
    mesh = mesh_of(kind)
    (_, got), _ = under_jit(asked, mesh, asked.specs(P("data"), "model"), 1.0)
    assert_summed_in_float32(got[name], asked, name)


@pytest.mark.diagonal
@pytest.mark.parametrize("kind", few_of(["explicit", "automatic"]))
@pytest.mark.parametrize("f", few_of([log_softmax, softmax]), ids=["log_softmax", "softmax"])
def test_softmax(rng, kind, f):
    x, g = (rng.normal(size=(8, 6, 64)).astype(np.float32) for _ in range(2))
    mesh = mesh_of(kind)
    both = lambda x, g: (jax.vjp(f, x)[1](g)[0], jax.jvp(f, (x,), (g,))[1])  # noqa: E731
    want = jax.jit(both)(x, g)
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, P("data", None, "model")))  # noqa: E731
        program = jax.jit(both).lower(place(x), place(g)).compile()
        got = program(place(x), place(g))
    for derivative, right in zip(got, want, strict=True):
        np.testing.assert_allclose(derivative, right, rtol=0, atol=2e-6)
        assert_lies({"x": derivative}, {"x": P("data", None, "model")}, mesh)
    # Laid out explicitly, the logits are summed in one pass, whose sets of four devices are gathered.
    assert_moves_little(program, per_token=4 * 9, gathered={4 * 6 * 4})


@pytest.mark.parametrize("f", few_of([softmax, log_softmax]), ids=["softmax", "log_softmax"])
def test_softmax_of_a_batch_that_lies_over_devices(rng, f):
    """`vmap` over it: what is not batched has to lie beside what is; derivatives in every nesting, their types too."""
    x, one = rng.normal(size=(8, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)

    def every(x, one):
        slope = lambda x: jax.grad(lambda x: jnp.vdot(jnp.sin(f(x)), one))(x)  # noqa: E731
        of_tangents = jax.vmap(lambda v: (jax.jvp(f, (one,), (v,))[1], jax.jvp(slope, (one,), (v,))[1]))(x)
        of_cotangents = jax.vmap(lambda v: jax.grad(lambda x: jnp.vdot(slope(x), v))(one))(x)
        return jax.vmap(slope)(x), jax.vmap(jax.jacfwd(f))(x), jax.vmap(jax.jacrev(f))(x), of_tangents, of_cotangents

    want, mesh = jax.jit(every)(x, one), mesh_of("explicit")
    with jax.set_mesh(mesh):
        got = jax.jit(every)(*(jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, P("data")), (one, P()))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jax.typeof(a).sharding.spec[0] == "data"
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", few_of(["explicit", "automatic"]))
def test_confident_tokens_stay_exact_over_sharded_classes(kind):
    """At a margin of 40 the loss is 4e-18; the relative error grows with the logit's own rounding alone."""
    logits = np.zeros((8, 64), np.float32)
    logits[np.arange(8), 7 * np.arange(8)] = 40
    mesh = mesh_of(kind)
    truth = np.log1p(63 * np.exp(-40.0))
    with jax.set_mesh(mesh):
        z = jax.device_put(logits, NamedSharding(mesh, P("data", "model")))
        for labels in (7 * np.arange(8), np.eye(64, dtype=np.float32)[7 * np.arange(8)]):
            spec = P("data") if labels.ndim == 1 else P("data", "model")
            labels = jax.device_put(labels, NamedSharding(mesh, spec))
            loss, grad = jax.jit(jax.value_and_grad(cross_entropy))(z, labels)
            np.testing.assert_allclose(loss, truth, rtol=1e-6)
            np.testing.assert_allclose(np.asarray(grad)[np.arange(8), 7 * np.arange(8)], -truth / 8, rtol=1e-6)


def test_explicit_arrays_need_no_context_and_no_jit(rng):
    asked = problem(rng, (8, 12, 64))
    mesh = mesh_of("explicit")
    specs = asked.specs(P("data"), "model")
    arrays = placed(asked, mesh, specs)
    loss = cross_entropy(arrays["logits"], arrays["labels"])
    np.testing.assert_allclose(loss, truth(asked, 1.0)[0], rtol=1e-6)
    assert jax.typeof(loss).sharding.spec == P()


def test_explicit_batch_around_manual_classes_is_refused(rng):
    """A `shard_map` over `model` alone, inside of which the batch is still laid out explicitly."""
    asked = problem(rng, (8, 12, 64))
    mesh, specs = mesh_of("explicit"), asked.specs(P("data"), "model")
    f = lambda logits, labels: cross_entropy(logits, labels, axis_name="model")  # noqa: E731
    with jax.set_mesh(mesh):
        arrays = placed(asked, mesh, specs)
        mapped = jax.shard_map(f, in_specs=(P(None, None, "model"), P()), out_specs=P(), axis_names={"model"})
        with pytest.raises(ValueError, match=r"over \['data'\] inside a `jax.shard_map` over \['model'\]"):
            mapped(arrays["logits"], arrays["labels"])


@pytest.mark.diagonal
@pytest.mark.thorough
@kinds
@pytest.mark.parametrize("transform", ["vmap", "hessian-vector product", "scan"])
def test_transforms(rng, kind, transform):
    """Around a loss over a sharded head."""
    asked = problem(rng, (4, 8, 64), embed=16, chunk_size=8, bias=False)
    mesh = mesh_of(kind)
    axes = {"x": P(None, "data"), "weight": P(None, "model"), "labels": P(None, "data")}
    loss = lambda x, w, y: linear_cross_entropy(x, w, y, chunk_size=8)  # noqa: E731

    def transformed(x, w, y):
        if transform == "vmap":
            return jax.vmap(jax.grad(loss), (0, None, 0))(x, w, y)
        if transform == "scan":
            step = lambda w, batch: (w - jax.grad(loss, 1)(batch[0], w, batch[1]), None)  # noqa: E731
            return jax.lax.scan(step, w, (x, y))[0]
        return jax.grad(lambda w: jnp.sum(jax.grad(loss, 1)(x, w, y) ** 2))(w)

    a = asked.arrays
    want = jax.jit(transformed)(a["x"], a["weight"], a["labels"])
    with jax.set_mesh(mesh):
        operands = [jax.device_put(a[name], NamedSharding(mesh, axes[name])) for name in ("x", "weight", "labels")]
        got = jax.jit(transformed)(*operands)
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * 1.2e-7 * np.max(np.abs(want)))


@pytest.mark.thorough
def test_vmap_over_an_axis_that_is_sharded_itself(rng):
    """Explicit: inside of `vmap` the other mesh axis is left."""
    asked = problem(rng, (8, 6, 64))
    mesh, specs = mesh_of("explicit"), asked.specs(P("data"), "model")
    with jax.set_mesh(mesh):
        arrays = placed(asked, mesh, specs)
        got = jax.jit(jax.vmap(jax.value_and_grad(cross_entropy)))(arrays["logits"], arrays["labels"])
    want = jax.jit(jax.vmap(jax.value_and_grad(cross_entropy)))(asked.arrays["logits"], asked.arrays["labels"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("embed", [None, 4], ids=["logits", "linear"])
def test_one_class_over_a_mesh_axis_of_one_device(rng, embed):
    asked = problem(rng, (8, 1), embed=embed)
    got, _ = under_jit(asked, mesh_of("explicit", (8, 1)), asked.specs(P("data"), "model"), 1.0)
    assert_equal(got, truth(asked, 1.0))


@pytest.mark.thorough
@kinds
def test_doors_with_optaxs_names(rng, kind):
    asked = problem(rng, (8, 6, 64), dense=True)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    want = jax.jit(softmax_cross_entropy)(asked.arrays["logits"], asked.arrays["labels"])
    with jax.set_mesh(mesh):
        arrays = placed(asked, mesh, specs)
        got = jax.jit(softmax_cross_entropy)(arrays["logits"], arrays["labels"])
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.cpu_compiler
@pytest.mark.thorough
@kinds
def test_temporary_bytes_of_a_device_are_an_eighth(rng, kind):
    """Of what is sharded: a chunk's logits and their gradient, the batch over `data`, the classes over `model`."""
    asked = problem(rng, (512, 4096), embed=4, bias=False, chunk_size=256)
    mesh, specs = mesh_of(kind), asked.specs(P("data"), "model")
    if kind == "explicit":
        asked.fixed["chunk_size"] = 128  # a device's own
    _, program = under_jit(asked, mesh, specs, 1.0)
    alone = jax.jit(jax.value_and_grad(lambda a: asked.loss({**asked.arrays, **a}, chunk_size=256)))
    alone = alone.lower({name: asked.arrays[name] for name in ("x", "weight")}).compile()
    one, eight = (p.memory_analysis().temp_size_in_bytes for p in (alone, program))
    assert one > 256 * 4096 * 4  # a chunk's logits
    assert eight <= 1.1 * one / 8
