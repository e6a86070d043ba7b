"""Gradients are the same whatever was asked for before: of random operands, in random orders, in one process.

Failure 27: JAX keeps traces, programs and structures by what was called, and a rule whose structure depends on what is
asked for was given another call's (jax#16614). So nothing here starts afresh: every gradient follows all others.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import few_of
from hypothesis import settings
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import softmax_jax as sj

pytestmark = pytest.mark.unoptimized  # it is about traces

TOKENS, EMBED, CLASSES = 6, 4, 5
COTANGENT, OTHER, ANOTHER = np.random.default_rng(1).normal(size=(3, TOKENS)).astype(np.float32)


class Subject(NamedTuple):
    """A scalar function of named operands, and its gradients in float64."""

    f: Callable
    operands: dict
    truth: dict


def of_heads(dz, x, weight, prefix=""):
    """The gradients of x, weight and bias by those of the logits x @ weight + bias."""
    dx, dweight = dz @ np.float64(weight).T, np.float64(x).T @ dz
    return {f"{prefix}x": dx, f"{prefix}weight": dweight, f"{prefix}bias": dz.sum(0)}


def dot(cotangent, value):
    return jnp.sum(jnp.asarray(cotangent) * value)


def of_losses(cotangent, losses, reduction):
    """Tokens by themselves or their sum, each with a cotangent that is not 1."""
    return dot(cotangent, losses) if reduction == "none" else -1.7 * losses


def cross_entropies(rng):
    logits, weights = rng.normal(size=(TOKENS, CLASSES)), rng.uniform(0.5, 2, TOKENS)
    x, weight, bias = rng.normal(size=(TOKENS, EMBED)), rng.normal(size=(EMBED, CLASSES)), rng.normal(size=CLASSES)
    ids, dense = rng.integers(0, CLASSES, TOKENS).astype(np.int32), rng.dirichlet(np.ones(CLASSES), TOKENS)
    logits, weights, x, weight, bias, dense = map(np.float32, (logits, weights, x, weight, bias, dense))
    head = {"x": x, "weight": weight, "bias": bias}
    for reduction in ("none", "mean"):
        for kind, labels in (("ids", ids), ("dense", dense)):

            def truth(z, reduction=reduction, labels=labels):
                mean = reduction == "mean"
                cotangent = np.full(TOKENS, -1.7 / weights.sum(dtype=np.float64)) if mean else np.float64(COTANGENT)
                options = {"cotangent": weights * cotangent, "reduction": "none"}
                each = reference.cross_entropy(z, labels, **options)
                minus_log_p = -reference.log_softmax(z)
                dweights = cotangent * (each.loss - (weights @ each.loss / weights.sum() if mean else 0))
                return each.grad, {"weights": dweights, "labels": (weights * cotangent)[:, None] * minus_log_p}

            def plain(o, reduction=reduction, labels=labels):
                losses = sj.cross_entropy(
                    o["logits"], o.get("labels", labels), weights=o["weights"], reduction=reduction
                )
                return of_losses(COTANGENT, losses, reduction)

            def linear(o, reduction=reduction, labels=labels):
                operands, more = (
                    (o["x"], o["weight"], o.get("labels", labels)),
                    {"reduction": reduction, "chunk_size": 2},
                )
                losses = sj.linear_cross_entropy(*operands, bias=o["bias"], weights=o["weights"], **more)
                return of_losses(COTANGENT, losses, reduction)

            of_labels = {"labels": dense} if kind == "dense" else {}
            dz, more = truth(logits)
            yield (
                f"cross_entropy {reduction} {kind}",
                Subject(plain, {"logits": logits, "weights": weights, **of_labels}, {"logits": dz, **more}),
            )
            dz, more = truth(np.float64(x) @ weight + bias)
            yield (
                f"linear_cross_entropy {reduction} {kind}",
                Subject(linear, {**head, "weights": weights, **of_labels}, {**of_heads(dz, x, weight), **more}),
            )


def statistics(rng):
    ids = rng.integers(0, CLASSES, TOKENS).astype(np.int32)
    logits, x, weight, bias = (
        np.float32(rng.normal(size=s)) for s in ((TOKENS, CLASSES), (TOKENS, EMBED), (EMBED, CLASSES), CLASSES)
    )
    outputs = ("log_prob", "log_normalizer", "entropy")
    for used in (outputs, ("log_prob",), ("entropy", "log_normalizer")):
        cotangents = [c * (name in used) for name, c in zip(outputs, (COTANGENT, OTHER, ANOTHER), strict=True)]

        def total(statistics, used=used, cotangents=cotangents):
            of = dict(zip(outputs, cotangents, strict=True))
            return sum(dot(of[name], getattr(statistics, name)) for name in used)

        def plain(o, total=total):
            return total(sj.label_statistics(o["logits"], ids))

        def linear(o, total=total):
            return total(sj.linear_label_statistics(o["x"], o["weight"], ids, bias=o["bias"], chunk_size=2))

        truth = {"logits": reference.label_statistics(logits, ids, cotangents).grad}
        yield f"label_statistics {used}", Subject(plain, {"logits": logits}, truth)
        dz = reference.label_statistics(np.float64(x) @ weight + bias, ids, cotangents).grad
        head = {"x": x, "weight": weight, "bias": bias}
        yield f"linear_label_statistics {used}", Subject(linear, head, of_heads(dz, x, weight))


def divergences(rng):
    a, b = (np.float32(rng.normal(size=(TOKENS, CLASSES))) for _ in range(2))
    x, weight, bias = (np.float32(rng.normal(size=s)) for s in ((TOKENS, EMBED), (EMBED, CLASSES), CLASSES))
    tx, tw, tb = (np.float32(rng.normal(size=s)) for s in ((TOKENS, 3), (3, CLASSES), CLASSES))
    probs = np.float32(rng.dirichlet(np.ones(CLASSES), TOKENS))
    for reduction, beta in (("none", 0.0), ("mean", 0.3)):
        how = {"beta": beta, "reduction": reduction}
        cotangent = np.full(TOKENS, -1.7 / TOKENS) if reduction == "mean" else np.float64(COTANGENT)

        def of_logits(o, how=how):
            losses = sj.kl_divergence(
                o["logits"], teacher_logits=o["teacher_logits"], temperature=o["temperature"], **how
            )
            return of_losses(COTANGENT, losses, how["reduction"])

        def of_probs(o, how=how):
            losses = sj.kl_divergence(o["logits"], teacher_probs=o["teacher_probs"], chunk_size=2, **how)
            return of_losses(COTANGENT, losses, how["reduction"])

        def of_states(o, how=how):
            losses = sj.linear_kl_divergence(**o, chunk_size=2, **how)
            return of_losses(COTANGENT, losses, how["reduction"])

        def truth(teacher, student, temperature=1.0, beta=beta, cotangent=cotangent):
            """The gradients by the logits of teacher and student, and by their temperature."""
            b, a = teacher / temperature, student / temperature
            db, da = (cotangent[:, None] * g / temperature for g in reference.divergence(b, a, beta).grads)
            return db, da, -np.sum(db * b + da * a)

        temperature, at = {"temperature": np.float32(1.3)}, np.float64(np.float32(1.3))
        db, da, dt = truth(np.float64(b), np.float64(a), at)
        operands, wanted = {"logits": a, "teacher_logits": b}, {"logits": da, "teacher_logits": db, "temperature": dt}
        yield f"kl_divergence logits {reduction}", Subject(of_logits, {**operands, **temperature}, wanted)
        db, da, _ = truth(np.log(np.float64(probs)), np.float64(a))
        operands = {"logits": a, "teacher_probs": probs}
        yield (
            f"kl_divergence probs {reduction}",
            Subject(of_probs, operands, {"logits": da, "teacher_probs": db / np.float64(probs)}),
        )
        db, da, dt = truth(np.float64(tx) @ tw + tb, np.float64(x) @ weight + bias, at)
        student = {"x": x, "weight": weight, "bias": bias}
        teacher = {"teacher_x": tx, "teacher_weight": tw, "teacher_bias": tb}
        wanted = {**of_heads(da, x, weight), **of_heads(db, tx, tw, "teacher_"), "temperature": dt}
        yield f"linear_kl_divergence {reduction}", Subject(of_states, {**student, **teacher, **temperature}, wanted)


def others(rng):
    logits, labels = np.float32(rng.normal(size=(TOKENS, CLASSES))), np.float32(rng.dirichlet(np.ones(CLASSES), TOKENS))
    g = np.float32(rng.normal(size=(TOKENS, CLASSES)))
    p, log_p = reference.softmax(logits), reference.log_softmax(logits)
    of_softmax, of_log_softmax = p * (g - np.sum(g * p, 1, keepdims=True)), g - p * g.sum(1, keepdims=True)
    yield "softmax", Subject(lambda o: dot(g, sj.softmax(o["x"])), {"x": logits}, {"x": of_softmax})
    yield "log_softmax", Subject(lambda o: dot(g, sj.log_softmax(o["x"])), {"x": logits}, {"x": of_log_softmax})
    cotangent = np.float64(COTANGENT)
    plain, poly = (
        f(logits, labels, **more, cotangent=cotangent)
        for f, more in ((reference.cross_entropy, {"reduction": "none"}), (reference.poly_loss, {"where": None}))
    )
    both, dlabels = {"logits": logits, "labels": labels}, -cotangent[:, None] * log_p
    more = 2 * cotangent[:, None] * (1 - p)
    for door, dz, dt in (
        (sj.softmax_cross_entropy, plain.grad, dlabels),
        (sj.safe_softmax_cross_entropy, plain.grad, dlabels),
        (sj.poly_loss_cross_entropy, poly.grad, dlabels + more),
    ):
        f = lambda o, door=door: dot(COTANGENT, door(o["logits"], o["labels"]))  # noqa: E731
        yield door.__name__, Subject(f, both, {"logits": dz, "labels": dt})


@cache
def subjects() -> dict[str, Subject]:
    rng = np.random.default_rng(0)
    return dict(pair for group in (cross_entropies, statistics, divergences, others) for pair in group(rng))


# Ways to take a gradient: way(f)(asked, given) is that of f(asked, given) by every leaf of `asked`.


def plainly(f):
    return jax.grad(f)


def jitted(f):
    return jax.jit(jax.grad(f))


def checkpointed(f):
    return jax.grad(jax.checkpoint(f))


def of_a_jitted_function(f):
    return jax.grad(jax.jit(f))


def vmapped(f):
    """The second of two, of which the first has other operands."""

    def second(asked, given):
        two = jax.tree.map(lambda a: jnp.stack([0.5 * a, a]), asked)
        return jax.tree.map(lambda g: g[1], jax.vmap(jax.grad(f), (0, None))(two, given))

    return second


def of_a_vmapped_function(f):
    """The second of two again, of the sum of both."""

    def second(asked, given):
        two = jax.tree.map(lambda a: jnp.stack([0.5 * a, a]), asked)
        total = lambda two: jnp.sum(jax.vmap(f, (0, None))(two, given))  # noqa: E731
        return jax.tree.map(lambda g: g[1], jax.grad(total)(two))

    return second


def on_a_mesh(f):
    """Of one device, on which every operand is whole."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(jax.grad(f), mesh=mesh, in_specs=(P(), P()), out_specs=P())


def forward_over_reverse(f):
    """What is differentiated in a product with the Hessian, of the gradient and of a random direction."""

    def first(asked, given):
        direction = jax.tree.map(jnp.cos, asked)
        return jax.jvp(lambda asked: jax.grad(f)(asked, given), (asked,), (direction,))[0]

    return first


def reverse_over_reverse(f):
    """The gradient that stands beside its own product with a direction, whose gradient is taken."""

    def first(asked, given):
        def product(asked):
            gradient = jax.grad(f)(asked, given)
            return sum(jax.tree.leaves(jax.tree.map(lambda g, a: jnp.vdot(g, jnp.cos(a)), gradient, asked))), gradient

        return jax.grad(product, has_aux=True)(asked)[1]

    return first


def scanned(f):
    """Through a loop, whose first step is of other operands."""

    def second(asked, given):
        two = jax.tree.map(lambda a: jnp.stack([0.5 * a, a]), asked)
        total = lambda two: jax.lax.scan(lambda sum_, one: (sum_ + f(one, given), None), jnp.zeros(()), two)[0]  # noqa: E731
        return jax.tree.map(lambda g: g[1], jax.grad(total)(two))

    return second


def nested(f):
    """Around a value_and_grad whose gradient is not used."""
    return lambda asked, given: jax.value_and_grad(lambda a: jax.value_and_grad(f)(a, given)[0])(asked)[1]


def pulled_back_twice(f):
    """The second of two pullbacks of one forward pass."""

    def second(asked, given):
        value, pull = jax.vjp(lambda asked: f(asked, given), asked)
        pull(-jnp.ones_like(value))
        return pull(jnp.ones_like(value))[0]

    return second


WAYS = [plainly, jitted, checkpointed, of_a_jitted_function, vmapped, scanned, nested, pulled_back_twice]
WAYS += [of_a_vmapped_function, on_a_mesh, forward_over_reverse, reverse_over_reverse]


class Walk:
    """Gradients one after the other. Half are of functions that were asked before: JAX keeps traces by these."""

    def __init__(self):
        self.kept, self.history = {}, []

    def of(self, name, way, anew):
        subject = subjects()[name]
        new = lambda: way(lambda asked, given: subject.f({**given, **asked}))  # noqa: E731
        if (name, way) not in self.kept:
            self.kept[name, way] = new()
        return new() if anew else self.kept[name, way]

    def step(self, name, names, way=plainly, anew=False):
        """1e-4 of the largest entry: sums of at most 30 float32 terms, none of which is ten times as large."""
        self.history.append((name, names, way.__name__, "anew" if anew else "again"))
        _, operands, truth = subjects()[name]
        asked = {n: jnp.asarray(operands[n]) for n in names}
        given = {n: jnp.asarray(a) for n, a in operands.items() if n not in asked}
        got = self.of(name, way, anew)(asked, given)
        for n in names:
            size, order = np.max(np.abs(truth[n])), f"{n} after {self.history}"
            np.testing.assert_allclose(got[n], truth[n], rtol=0, atol=1e-4 * size, err_msg=order)


NAMES = ["cross_entropy none ids", "cross_entropy mean ids", f"label_statistics {('log_prob',)}", "kl_divergence mean"]


@pytest.mark.parametrize("name", few_of(NAMES[::3] + NAMES[1:3], thorough=1))
def test_both_operands_then_one_then_both_in_another_way(name):
    """As it was found: zeros, or an error from inside JAX."""
    name, walk = f"linear_{name}", Walk()
    walk.step(name, ["x", "weight"])
    walk.step(name, ["x"])
    walk.step(name, ["x", "weight"], checkpointed, anew=True)
    walk.step(name, ["weight"], of_a_jitted_function, anew=True)


@pytest.mark.parametrize("way", WAYS[-4:], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", few_of(["cross_entropy mean ids", "linear_cross_entropy none dense", NAMES[2]], 2))
def test_every_way_after_another(name, way):
    walk, operands = Walk(), list(subjects()[name].operands)
    walk.step(name, operands[:1])
    walk.step(name, operands, way)
    walk.step(name, operands[:2], way, anew=True)
    walk.step(name, operands)


@pytest.mark.thorough
@pytest.mark.parametrize("door", ["linear", "cross_entropy", "label_statistics", "kl_divergence", ""])
def test_gradients_do_not_depend_on_what_was_asked_before(door, rng):
    """Half as many gradients as a property test has examples, three at least."""
    kinds = ("linear", "cross_entropy", "label_statistics", "kl_divergence")
    mine = [n for n in subjects() if (n.startswith(door) if door else not n.startswith(kinds))]
    walk = Walk()
    for _ in range(max(3, settings().max_examples // 2)):
        name = mine[rng.integers(len(mine))]
        operands = list(subjects()[name].operands)
        names = [n for n in operands if rng.random() < 0.5] or operands[:1]
        if rng.random() < 0.02:
            jax.clear_caches()
        walk.step(name, names, WAYS[rng.integers(len(WAYS))], anew=rng.random() < 0.5)
