"""Lowering for machines that are not here: every door and its gradient, from the CPU, for each of JAX's platforms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ALONE, few_of, random_case
from jax import export

import softmax_jax

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
TOKENS, EMBED, CLASSES = 12, 8, 40


def doors(rng, dtype, dense):
    """(name, function, floating operands) with every option on."""
    names = [name for name in ALONE if not (dense and name == "ignore_index")]
    logits, labels, options = random_case(rng, (TOKENS, CLASSES), dtype=dtype, dense=dense, names=names)
    del options["axis"]
    x, weight = (rng.normal(size=shape).astype(dtype) for shape in ((TOKENS, EMBED), (EMBED, CLASSES)))
    yield "cross_entropy", lambda z: softmax_jax.cross_entropy(z, labels, **options), (logits,)
    head = lambda x, w: softmax_jax.linear_cross_entropy(x, w, labels, chunk_size=4, **options)  # noqa: E731
    yield "linear_cross_entropy", head, (x, weight)
    losses = lambda x, w: softmax_jax.linear_cross_entropy(  # noqa: E731
        x, w, labels, chunk_size=4, reduction="none", **options
    )
    yield "linear_cross_entropy, none", lambda x, w: jnp.sum(losses(x, w) ** 2), (x, weight)
    for name in ("softmax", "log_softmax"):
        door = getattr(softmax_jax, name)
        yield name, lambda z, door=door: jnp.sum(door(z, where=options["where"])[:, 0]).astype(jnp.float32), (logits,)
    if not dense:
        adjusted = {name: options[name] for name in ("where", "logit_scale", "softcap")}

        def told(found):
            return jnp.sum(found.log_prob + found.log_normalizer + found.entropy * found.rank.astype(jnp.float32))

        statistics = lambda z: told(softmax_jax.label_statistics(z, labels, **adjusted))  # noqa: E731
        yield "label_statistics", statistics, (logits,)
        linear = lambda x, w: told(softmax_jax.linear_label_statistics(x, w, labels, chunk_size=4, **adjusted))  # noqa: E731
        yield "linear_label_statistics", linear, (x, weight)
        ids = labels[:, None] + jnp.arange(3, dtype=jnp.int32)[None]
        probs, others = (jnp.full(shape, share, jnp.float32) for shape, share in (((TOKENS, 3), 0.3), (TOKENS, 0.1)))
        few = softmax_jax.SparseLabels(ids, probs, others)
        del options["ignore_index"]
        teacher = {"weights": options["weights"], "where": options["where"], "temperature": 2.0, "beta": 0.5}
        divergence = lambda a, b: softmax_jax.kl_divergence(a, teacher_logits=b, **teacher)  # noqa: E731
        yield "kl_divergence", divergence, (logits, logits)
        of_states = lambda x, w: softmax_jax.linear_kl_divergence(  # noqa: E731
            x, w, teacher_x=x[:, ::-1], teacher_weight=w, chunk_size=4, **teacher
        )
        yield "linear_kl_divergence", of_states, (x, weight)
        few_too = lambda x, w: softmax_jax.linear_kl_divergence(x, w, teacher_probs=few, chunk_size=4, beta=1.0)  # noqa: E731
        yield "linear_kl_divergence, SparseLabels", few_too, (x, weight)
        yield "SparseLabels", lambda z: softmax_jax.cross_entropy(z, few, **options), (logits,)
    names = ("softmax_cross_entropy", "safe_softmax_cross_entropy", "poly_loss_cross_entropy")
    for name in names if dense else ("softmax_cross_entropy_with_integer_labels",):
        door = getattr(softmax_jax, name)
        yield name, lambda z, door=door: jnp.sum(door(z, labels)), (logits,)


DOORS = [(dense, name) for dense in (False, True) for name, *_ in doors(np.random.default_rng(0), jnp.float32, dense)]
FIRST = ("linear_cross_entropy, none", "log_softmax", "linear_label_statistics", "SparseLabels")
DOORS.sort(key=lambda door: door[0] or door[1] not in (*FIRST, "kl_divergence"))


@pytest.mark.parametrize("door", few_of(DOORS, 3), ids=lambda door: f"{door[1]}, {'dense' if door[0] else 'integer'}")
def test_every_door_and_its_gradient_lower_for_every_platform(rng, door):
    dense, name = door
    dtype = jnp.float32 if dense else jnp.bfloat16
    f, operands = next((f, operands) for of, f, operands in doors(rng, dtype, dense) if of == name)
    both = jax.jit(jax.value_and_grad(f, tuple(range(len(operands)))))
    exported = export.export(both, platforms=PLATFORMS)(*operands)
    assert exported.platforms == PLATFORMS
    loss, *gradients = exported.out_avals
    assert loss.shape == () and loss.dtype == jnp.float32
    assert [(g.shape, g.dtype) for g in gradients] == [(a.shape, dtype) for a in operands]
    # Nothing but StableHLO: no kernel, callback or library call that another platform might lack.
    calls = set(re.findall(r"stablehlo.custom_call @(\w+)", exported.mlir_module()))
    assert calls <= {"Sharding", "AllocateBuffer"}, calls  # the latter is `lax.empty`


def symbolic(batch, classes):
    """(name, function, operands) of every function that takes symbolic sizes."""
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    z, t, y = shape(jnp.float32, batch, classes), shape(jnp.float32, batch, classes), shape(jnp.int32, batch)
    weights, where, of_class = shape(jnp.float32, batch), shape(bool, batch, classes), shape(jnp.float32, classes)
    sj = softmax_jax
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "ignore_index": -1, "logit_scale": 0.7}

    def every(z, y, w, where, c):
        return sj.cross_entropy(z, y, weights=w, where=where, class_weights=c, **options)

    def few(z, y):
        ids = jnp.stack([y, jnp.maximum(y - 1, 0)], -1)
        probs = jnp.full_like(ids, 0.4, jnp.float32)
        return sj.cross_entropy(z, sj.SparseLabels(ids, probs, jnp.full_like(probs[:, 0], 0.2)))

    def statistics(z, y):
        return sum(jnp.sum(a.astype(jnp.float32)) for a in sj.label_statistics(z, y))

    yield "cross_entropy", sj.cross_entropy, (z, y)
    yield "every option", every, (z, y, weights, where, of_class)
    yield "dense labels", sj.cross_entropy, (z, t)
    yield "SparseLabels", few, (z, y)
    yield "softmax", lambda z: sj.softmax(z)[:, 0], (z,)
    yield "log_softmax", lambda z: sj.log_softmax(z)[:, 0], (z,)
    yield "label_statistics", statistics, (z, y)
    yield "kl_divergence", lambda a, b: sj.kl_divergence(a, teacher_logits=b, temperature=2.0), (z, t)
    yield "mixture", lambda a, b: sj.kl_divergence(a, teacher_logits=b, beta=0.5), (z, t)
    for name in ("softmax_cross_entropy", "safe_softmax_cross_entropy", "poly_loss_cross_entropy"):
        yield name, getattr(sj, name), (z, t)
    name = "softmax_cross_entropy_with_integer_labels"
    yield name, getattr(sj, name), (z, y)


SYMBOLIC = [name for name, *_ in symbolic(*export.symbolic_shape("b, k"))]
SYMBOLIC.sort(key=["every option", "SparseLabels", "label_statistics", "mixture", *SYMBOLIC].index)


def exported(f, operands):
    both = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(f(*a))))
    return both, export.export(both)(*operands)


@pytest.mark.diagonal
@pytest.mark.compiled
@pytest.mark.usefixtures("untyped")  # a symbol is no int
@pytest.mark.parametrize("sizes", few_of(["b, k", "b, 37", "6, k"]))
@pytest.mark.parametrize("name", few_of(SYMBOLIC, 2))
def test_symbolic_sizes(sizes, name):
    """Failure 31: every function on logits is exported for any batch, any number of classes."""
    f, operands = next((f, operands) for of, f, operands in symbolic(*export.symbolic_shape(sizes)) if of == name)
    _, program = exported(f, operands)
    assert [a.shape for a in program.out_avals] == [(), operands[0].shape]


@pytest.mark.thorough
@pytest.mark.compiled
@pytest.mark.usefixtures("untyped")
def test_a_program_for_symbolic_sizes_gives_what_one_for_these_sizes_gives(rng):
    fixed = {"b": 6, "k": 37}
    draw = {"float32": lambda s: np.float32(rng.uniform(0.1, 2, s)), "bool": lambda s: rng.random(s) < 0.9}
    draw["int32"] = lambda s: rng.integers(0, 37, s).astype(np.int32)
    for name, f, operands in symbolic(*export.symbolic_shape("b, k")):
        if name in SYMBOLIC[6:]:
            continue  # the sums of these are among those of the others
        both, program = exported(f, operands)
        values = [draw[str(a.dtype)]([fixed[str(n)] for n in a.shape]) for a in operands]
        for got, want in zip(program.call(*values), both(*values), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.compiled
@pytest.mark.usefixtures("untyped")
def test_chunks_of_a_symbolic_size_are_refused_with_the_way_out():
    batch, classes = export.symbolic_shape("b, k")
    x, y = (jax.ShapeDtypeStruct(s, d) for s, d in (((batch, 8), jnp.float32), ((batch,), jnp.int32)))
    weight, z = jax.ShapeDtypeStruct((8, 37), jnp.float32), jax.ShapeDtypeStruct((batch, 37), jnp.float32)
    sj = softmax_jax
    for f, operands in (
        (sj.linear_cross_entropy, (x, weight, y)),
        (sj.linear_label_statistics, (x, weight, y)),
        (lambda x, w: sj.linear_kl_divergence(x, w, teacher_x=x, teacher_weight=w), (x, weight)),
        (lambda z, t: sj.kl_divergence(z, teacher_probs=t), (z, z)),
    ):
        with pytest.raises(
            ValueError, match=r"must be fixed; got a batch of shape \(b,\).*Export it with a fixed batch"
        ):
            jax.eval_shape(f, *operands)
    x, weight, y = (jax.ShapeDtypeStruct(s, a.dtype) for s, a in (((6, 8), x), ((8, classes), weight), ((6,), y)))
    with pytest.raises(ValueError, match="got k and 8. Pass `chunk_size`"):
        jax.eval_shape(sj.linear_cross_entropy, x, weight, y)
    assert jax.eval_shape(lambda *a: sj.linear_cross_entropy(*a, chunk_size=4), x, weight, y).shape == ()
