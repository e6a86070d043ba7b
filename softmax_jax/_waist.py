"""The waist: every loss here is a function of a few sums over the classes of one token.

Write z for a token's logits, y for its label, p = softmax(z), and m = max_v z_v, a constant. With

    rest = Σ_{v≠y} exp(z_v - m)        the label's own term left out
    own  = z_y - m                     ≤ 0
    total = rest + exp(own)            = Σ_v exp(z_v - m), between 1 and the number of classes

the loss is nll = -log p_y = log total - own, and 1 - p_y = rest/total. Others keep log total and subtract: once p_y → 1
the difference rounds to 0, and the gradient p_y - 1 with it. Here nothing cancels, because `rest` is kept by itself.

Dense labels are the same sums around another class. For any class a, with t_v the target of class v (class weight
included) and spread = log total = log_normalizer - m,

    Σ_v t_v (log_normalizer - z_v) = t_a · nll(rest_a, own_a)  +  Σ_{v≠a} t_v · spread  -  Σ_{v≠a} t_v (z_v - m)
                                   = own_mass · nll            +  rest_mass · spread    -  label_sum

With `a` the largest logit (or one close to it) a one-hot target is as exact as the integer label: at `a` itself the
gradient comes out as rest_mass · p_a - own_mass · (1 - p_a), not as p_a - t_a. The class that is left out, y or a, is
the `pivot`.

Around a given m and pivot these are plain sums, `written`, and every derivative is one of theirs: with the cotangents
drest and down, dz_v = exp(z_v - m) · drest for v ≠ pivot and dz_pivot = down, to which the linear sums add their own.

The waist is also where devices meet: of classes that are sharded over mesh axes, each device sums its own, with a pivot
that may be none of them, and one psum adds the sums up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from softmax_jax._adjustment import Adjustment, beyond_exp, shifted, weighed
from softmax_jax._classes import Classes
from softmax_jax._masses import uniform
from softmax_jax._sharding import PyTree
from softmax_jax._sums import Asked, ClassSums, Tokens

NO_COTANGENTS = ClassSums(None, None, None)  # pyright: ignore[reportArgumentType]


class Around(NamedTuple):
    """What sums are written around, and for what. Where the cotangent of a sum of products is known to be 0, a logit in
    it may be infinite."""

    m: Array
    pivot: Array  # among the classes here
    classes: Classes
    asked: Asked
    cotangents: ClassSums = NO_COTANGENTS


@jax.custom_jvp
def _with_gap(z: Array) -> Array:
    """(1 - z) exp(z), 0 at -inf, whose slope is -z exp(z): of several classes that share the top it does not cancel."""
    return jnp.exp(z) * (1 - beyond_exp(z))


@_with_gap.defjvp
def _with_gap_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return _with_gap(z), jnp.exp(z) * -beyond_exp(z) * dz


def written(
    x: Array, adjustment: Adjustment, t: Array | None, c: Array | None, at_pivot: Array, around: Around
) -> ClassSums:
    """The sums of some classes, by their targets t and shares c of what is spread evenly."""
    m, _, classes, asked, cotangents = around
    z = shifted(x, adjustment, m, classes.axis)
    exp_z = jnp.exp(z)
    at, others = (partial(f, at_pivot, classes.axis) for f in (_sum_at, _sum_of_others))
    sums = ClassSums(m, others(exp_z), at(z))
    if asked.moment:
        sums = sums._replace(moment_and_rest=others(_with_gap(z)))
    if c is not None:
        sums = sums._replace(prior=jnp.sum(weighed(c, z, _idle(cotangents.prior, classes)), classes.axis))
    if t is not None:
        label_sum = others(weighed(t, z, _idle(cotangents.label_sum, classes)))
        sums = sums._replace(own_mass=at(t), rest_mass=others(t), label_sum=label_sum)
    return sums


def _sum_at(at_pivot: Array, axis: int, terms: Array) -> Array:
    return jnp.sum(jnp.where(at_pivot, terms, 0), axis)


def _sum_of_others(at_pivot: Array, axis: int, terms: Array) -> Array:
    return jnp.sum(jnp.where(at_pivot, 0, terms), axis)


def _idle(cotangent: Array | None, classes: Classes) -> Any:
    return cotangent is not None and classes.along(cotangent == 0)


def of_classes(tokens: Tokens, around: Around) -> ClassSums:
    """Of all classes here, but for the labels' where they need no pass over them."""
    logits, labels, class_weights, adjustment, _ = tokens
    c = uniform(class_weights, adjustment.where, jnp.ones_like(logits, around.m.dtype)) if around.asked.prior else None
    t = labels.target(tokens, around.classes, around.m.dtype)
    return written(logits, adjustment, t, c, around.classes.is_at(around.pivot, logits), around)


def pulled(sums: Callable[[PyTree], ClassSums], operands: PyTree, cotangents: ClassSums) -> PyTree:
    """The gradients of the operands, by the sums that have a cotangent."""
    given = {name: cotangent for name, cotangent in cotangents._asdict().items() if cotangent is not None}

    def of_given(operands):
        found = sums(operands)._asdict()
        return {name: found[name] for name in given if found[name] is not None}

    found, pull = jax.vjp(of_given, operands)
    return pull({name: given[name] for name in found})[0]


def tangent_of(f: Callable, operands: PyTree, tangents: PyTree) -> PyTree:
    """The tangent of f(operands) in a rule with `symbolic_zeros`, by the operands that have one."""
    leaves, tree = jax.tree.flatten(operands)
    moving = {i: t for i, t in enumerate(tree.flatten_up_to(tangents)) if not isinstance(t, SymbolicZero)}

    def of_moving(some):
        return f(tree.unflatten([some.get(i, leaf) for i, leaf in enumerate(leaves)]))

    return jax.jvp(of_moving, ({i: leaves[i] for i in moving},), (moving,))[1]
