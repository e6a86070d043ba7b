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
                                   = own_mass · nll            +  other_mass · spread    -  label_sum

With `a` the largest logit (or one close to it) a one-hot target is as exact as the integer label: at `a` itself the
gradient comes out as other_mass · p_a - own_mass · (1 - p_a), not as p_a - t_a. The class that is left out, y or a, is
the `pivot`.

Once m and the pivot are fixed, each of these is a plain sum over the classes: `sums_around` has them as they are
written. JAX differentiates that: with the cotangents drest and d_own, dz_v = exp(z_v - m) · drest for v ≠ pivot and
dz_pivot = d_own, to which the linear sums add their own.

The waist is also where devices meet: of classes that are sharded over mesh axes, each device sums its own, with a pivot
that may be none of them, and one psum adds the sums up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from softmax_jax._devices import Classes, PyTree
from softmax_jax._inputs.labels import Dense, Ids, Labels
from softmax_jax._inputs.options import Adjustment, Options, clip_for_exp, safe_product, shifted


class Batch(NamedTuple):
    """What a function of the tokens is given: logits, and all that goes with them, in one form."""

    logits: Array
    labels: Labels  # a teacher's logits are `Dense`
    options: Options
    classes: Classes
    forward_mode: bool


PerTokenFunction = Callable[[Batch], tuple[PyTree, PyTree]]
"""(numbers of every token, which are reduced; auxiliary numbers). One function for all calls that mean the same, since
JAX keeps programs by it."""


class ExtraSums(NamedTuple):
    """Which sums are made besides those that the labels need."""

    even: bool = False  # for probability that is spread evenly
    statistics: bool = False  # the entropy's moment, and the label's rank: the largest logit is the pivot
    shares_pass: bool = False  # with the statistics of the same logits, if both take each class by itself


OPERANDS = ["logits", "labels", "adjustment", "class_weights", "unused"]


@partial(jax.tree_util.register_dataclass, data_fields=OPERANDS, meta_fields=["classes", "extra", "forward_mode"])
@dataclass(frozen=True)
class Tokens:
    """What sums are made of, in one form: `class_weights` and `where` broadcast to the logits. (Any: JAX puts other
    things than arrays into a pytree.)"""

    logits: Any
    labels: Any  # Labels, or None
    adjustment: Adjustment
    class_weights: Any = None
    unused: Any = None  # those of weight 0; in a derivative, those of them whose sums are not finite; None: none
    classes: Classes = field(kw_only=True)
    extra: ExtraSums = field(default=ExtraSums(), kw_only=True)
    forward_mode: bool = field(default=False, kw_only=True)

    @property
    def label(self) -> Array | None:
        """The ids, where they are the pivot; None: the largest logit is."""
        return self.labels.ids if isinstance(self.labels, Ids) and not self.extra.statistics else None

    @property
    def values(self) -> Array | None:
        """Dense labels."""
        return self.labels.values if isinstance(self.labels, Dense) else None


class ClassSums(NamedTuple):
    """Per token, in float32. None where nothing asks for the sum. Through those of `CONSTANT` no gradient flows."""

    row_max: Array  # m; once all are combined, 0 in a row of -inf alone
    rest: Array
    pivot: Any = None  # its class; None: the label is the pivot
    label_logit: Any = None  # as it came, where the label is the pivot, until the sums of all devices are combined
    above: Any = None  # how many z are larger than that of the label
    moment: Any = None  # Σ_{v≠pivot} exp(z_v - m) (m - z_v), for the entropy
    own_mass: Any = None  # t_pivot; None is 1
    other_mass: Any = None  # Σ_{v≠pivot} t_v; None is 0, as are those below
    label_sum: Any = None  # Σ_{v≠pivot} t_v (z_v - m)
    even_mass: Any = None  # Σ_v c_v, until the sums of all devices are combined
    even_sum: Any = None  # Σ_v c_v (z_v - m), for probability that is spread evenly
    own: Any = None  # z - m of the pivot; before m is known, z
    moment_and_rest: Any = None  # moment + rest, which has the slope of both
    ties: Any = None  # 0 where no class before the label has its z


CONSTANT = ("row_max", "pivot", "even_mass", "moment", "above", "ties", "label_logit")
OF_LABELS = ("own_mass", "other_mass", "label_sum")
NO_COTANGENTS = ClassSums(None, None)  # pyright: ignore[reportArgumentType]


def unused_tokens(weights: Array | None) -> Array | None:
    """The tokens of weight 0, whatever they hold; None for none."""
    return None if weights is None else weights == 0


# With total = rest + exp(own):
#
#     nll    = log total - own     ∂/∂rest = 1/total            ∂/∂own = -rest/total
#     spread = log total           ∂/∂rest = 1/total            ∂/∂own = exp(own)/total
#     miss   = rest/total          ∂/∂rest = exp(own)/total²    ∂/∂own = -rest·exp(own)/total²
#
# log total is log1p(rest + expm1(own)), which is exact where own = 0 and rest is small. `miss` = 1 - p_y has a rule of
# its own so that second derivatives do not cancel either, where p_y is small.


@jax.custom_jvp
def _miss(rest: Array, own: Array) -> Array:
    """1 - p_y."""
    return rest / (rest + jnp.exp(own))


@_miss.defjvp
def _miss_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own), (drest, d_own) = primals, tangents
    total = rest + jnp.exp(own)
    hit = jnp.exp(own) / total
    return _miss(rest, own), hit / total * drest - hit * _miss(rest, own) * d_own


@jax.custom_jvp
def _hit(rest: Array, own: Array) -> Array:
    """p_y, whose derivative is that of 1 - p_y."""
    return jnp.exp(own) / (rest + jnp.exp(own))


@_hit.defjvp
def _hit_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own), (drest, d_own) = primals, tangents
    hit = _hit(rest, own)
    return hit, hit * _miss(rest, own) * d_own - hit / (rest + jnp.exp(own)) * drest


@jax.custom_jvp
def negative_log_likelihood(rest: Array, own: Array) -> Array:
    """-log p_y ≥ 0, exact to a few roundings however confident the token."""
    near_top = jnp.log1p(rest * jnp.exp(-jnp.maximum(own, -1)))  # in which an own of 1e-8 is no matter
    return jnp.where(own > -1, near_top, log_total(rest, own) - own)


@negative_log_likelihood.defjvp
def _negative_log_likelihood_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own), (drest, d_own) = primals, tangents
    return negative_log_likelihood(rest, own), drest / (rest + jnp.exp(own)) - _miss(rest, own) * d_own


@jax.custom_jvp
def log_total(rest: Array, own: Array) -> Array:
    """log_normalizer - m ≥ 0."""
    return jnp.log1p(rest + jnp.expm1(own))


@log_total.defjvp
def _log_total_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own), (drest, d_own) = primals, tangents
    total = rest + jnp.exp(own)
    return log_total(rest, own), drest / total + _hit(rest, own) * d_own


@jax.custom_jvp
def loss_around_top(rest: Array, own: Array, own_mass: Array, other_mass: Array) -> Array:
    """own_mass · nll + other_mass · spread around the top class, where own = 0 (or NaN) and the two are one number."""
    return (own_mass + other_mass) * log_total(rest, own) - own_mass * own


@loss_around_top.defjvp
def _loss_around_top_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own, own_mass, other_mass), (drest, d_own, d_own_mass, dother_mass) = primals, tangents
    total, spread = rest + jnp.exp(own), log_total(rest, own)
    by_own = other_mass * _hit(rest, own) - own_mass * _miss(rest, own)
    by_masses = negative_log_likelihood(rest, own) * d_own_mass + spread * dother_mass
    return loss_around_top(*primals), (own_mass + other_mass) / total * drest + by_own * d_own + by_masses


# The sums around a given m and pivot, as they are written.


@jax.custom_jvp
def _with_gap(z: Array) -> Array:
    """(1 - z) exp(z), 0 at -inf, whose slope is -z exp(z): of several classes that share the top it does not cancel."""
    return jnp.exp(z) * (1 - clip_for_exp(z))


@_with_gap.defjvp
def _with_gap_jvp(primals: tuple, tangents: tuple) -> tuple:
    (z,), (dz,) = primals, tangents
    return _with_gap(z), jnp.exp(z) * -clip_for_exp(z) * dz


def sums_around(
    tokens: Tokens, t: Array | None, c: Array | None, at_pivot: Array, row_max: Array, cotangents: ClassSums
) -> ClassSums:
    """Those of some classes, by their targets t and shares c of what is spread evenly. Where the cotangent of a sum of
    products is known to be 0, a logit in it may be infinite."""
    axis = tokens.classes.axis
    z = shifted(tokens.logits, tokens.adjustment, row_max, axis)
    exp_z = jnp.exp(z)

    def own(terms: Array) -> Array:
        return jnp.sum(jnp.where(at_pivot, terms, 0), axis)

    def others(terms: Array) -> Array:
        return jnp.sum(jnp.where(at_pivot, 0, terms), axis)

    def idle(cotangent: Array | None) -> Array | bool:
        return cotangent is not None and tokens.classes.expand(cotangent == 0)

    sums = ClassSums(row_max, others(exp_z), own=own(z))
    if tokens.extra.statistics:
        sums = sums._replace(moment_and_rest=others(_with_gap(z)))
    if c is not None:
        sums = sums._replace(even_sum=jnp.sum(safe_product(c, z, idle(cotangents.even_sum)), axis))
    if t is not None:
        label_sum = others(safe_product(t, z, idle(cotangents.label_sum)))
        sums = sums._replace(own_mass=own(t), other_mass=others(t), label_sum=label_sum)
    return sums


def pulled(sums: Callable[[PyTree], ClassSums], operands: PyTree, cotangents: ClassSums) -> PyTree:
    """The gradients of the operands, by the sums that have a cotangent."""
    given = {name: cotangent for name, cotangent in cotangents._asdict().items() if cotangent is not None}

    def of_given(operands: PyTree) -> dict[str, Array]:
        found = sums(operands)._asdict()
        return {name: found[name] for name in given if found[name] is not None}

    found, pull = jax.vjp(of_given, operands)
    return pull({name: given[name] for name in found})[0]
