"""Lowering for machines that are not here: every door and its gradient, from the CPU, for each of JAX's platforms."""

import re

import jax
import jax.numpy as jnp
import pytest
from helpers import ALONE, random_case
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
    yield "forward_mode", lambda z: softmax_jax.cross_entropy(z, labels, forward_mode=True, **options), (logits,)
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


@pytest.mark.parametrize("dense, dtype", [(False, jnp.bfloat16), (True, jnp.float32)], ids=["integer", "dense"])
def test_every_door_and_its_gradient_lower_for_every_platform(rng, dense, dtype):
    for name, f, operands in doors(rng, dtype, dense):
        both = jax.jit(jax.value_and_grad(f, tuple(range(len(operands)))))
        exported = export.export(both, platforms=PLATFORMS)(*operands)
        assert exported.platforms == PLATFORMS, name
        loss, *gradients = exported.out_avals
        assert loss.shape == () and loss.dtype == jnp.float32, name
        assert [(g.shape, g.dtype) for g in gradients] == [(a.shape, dtype) for a in operands], name
        # Nothing but StableHLO: no kernel, callback or library call that another platform might lack.
        calls = set(re.findall(r"stablehlo.custom_call @(\w+)", exported.mlir_module()))
        assert calls <= {"Sharding"}, (name, calls)
