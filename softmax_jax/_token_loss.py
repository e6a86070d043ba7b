"""From the waist to a loss: what happens to one token's sums.

Everything here is plain JAX on per-token numbers, but for the two logarithms, whose derivatives autodiff would
compute by a subtraction that cancels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from softmax_jax._adjustment import Adjustment, finite
from softmax_jax._blocks import existing_classes, mass_of_classes
from softmax_jax._checks import Options
from softmax_jax._class_sums import class_sums
from softmax_jax._classes import Classes
from softmax_jax._dtypes import accumulator
from softmax_jax._labels import Labels, unused_by
from softmax_jax._sharding import PyTree
from softmax_jax._sparse_labels import spread_evenly
from softmax_jax._sums import Asked, ClassSums, Tokens, lost

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
def _miss_jvp(primals, tangents):
    (rest, own), (drest, down) = primals, tangents
    total = rest + jnp.exp(own)
    hit = jnp.exp(own) / total
    return _miss(rest, own), hit / total * drest - hit * _miss(rest, own) * down


@jax.custom_jvp
def _hit(rest: Array, own: Array) -> Array:
    """p_y, whose derivative is that of 1 - p_y."""
    return jnp.exp(own) / (rest + jnp.exp(own))


@_hit.defjvp
def _hit_jvp(primals, tangents):
    (rest, own), (drest, down) = primals, tangents
    hit = _hit(rest, own)
    return hit, hit * _miss(rest, own) * down - hit / (rest + jnp.exp(own)) * drest


@jax.custom_jvp
def negative_log_likelihood(rest: Array, own: Array) -> Array:
    """-log p_y ≥ 0, exact to a few roundings however confident the token."""
    near_top = jnp.log1p(rest * jnp.exp(-jnp.maximum(own, -1)))  # in which an own of 1e-8 is no matter
    return jnp.where(own > -1, near_top, log_spread(rest, own) - own)


@negative_log_likelihood.defjvp
def _negative_log_likelihood_jvp(primals, tangents):
    (rest, own), (drest, down) = primals, tangents
    return negative_log_likelihood(rest, own), drest / (rest + jnp.exp(own)) - _miss(rest, own) * down


@jax.custom_jvp
def log_spread(rest: Array, own: Array) -> Array:
    """log_normalizer - m ≥ 0."""
    return jnp.log1p(rest + jnp.expm1(own))


@log_spread.defjvp
def _log_spread_jvp(primals, tangents):
    (rest, own), (drest, down) = primals, tangents
    total = rest + jnp.exp(own)
    return log_spread(rest, own), drest / total + _hit(rest, own) * down


@jax.custom_jvp
def _around_top(rest: Array, own: Array, own_mass: Array, rest_mass: Array) -> Array:
    """own_mass · nll + rest_mass · spread around the top class, where own = 0 (or NaN) and the two are one number."""
    return (own_mass + rest_mass) * log_spread(rest, own) - own_mass * own


@_around_top.defjvp
def _around_top_jvp(primals, tangents):
    (rest, own, own_mass, rest_mass), (drest, down, down_mass, drest_mass) = primals, tangents
    total, spread = rest + jnp.exp(own), log_spread(rest, own)
    by_own = rest_mass * _hit(rest, own) - own_mass * _miss(rest, own)
    by_masses = negative_log_likelihood(rest, own) * down_mass + spread * drest_mass
    return _around_top(*primals), (own_mass + rest_mass) / total * drest + by_own * down + by_masses


def _scaled(factor: Array, value: Array) -> Array:
    """factor · value, where a factor of 0 wins over an infinite value."""
    return factor * finite(value, factor == 0)


class _Evenly(NamedTuple):
    """What probability that is spread evenly over the classes needs, per token."""

    existing: Array  # K, how many classes exist
    mass: Array  # Σ_v c_v over them
    each: Array | None = None  # what each has besides the labels' own and the smoothing, from SparseLabels.others


def _evenly(
    labels: Any, options: Options, size: int, classes: Classes, dtype: DTypeLike
) -> tuple[Labels, _Evenly | None]:
    """(labels without `others`, what is spread); None for nothing."""
    where, class_weights = options.where, options.class_weights
    if options.label_smoothing is None and labels.others is None:
        return labels, None
    number = mass = existing_classes(where, size, classes, dtype)
    if class_weights is not None:
        mass = mass_of_classes(class_weights, where, classes)
    if labels.others is None:
        return labels, _Evenly(number, mass)
    labels, each = spread_evenly(labels, where, number, size, classes)
    return labels, _Evenly(number, mass, each)


def loss_of(sums: ClassSums, evenly: _Evenly | None, options: Options) -> Array:
    """ℓ of every token, before its weight."""
    loss = _of_labels(sums, options.label_smoothing)
    if evenly is None and options.z_loss is None:
        return loss
    spread = log_spread(sums.rest, sums.own)
    if evenly is not None and sums.prior is not None:
        of_all, smoothing = evenly.mass * spread - sums.prior, options.label_smoothing  # Σ_v c_v (log_normalizer - z_v)
        loss = loss if evenly.each is None else loss + _scaled(evenly.each, of_all)
        if smoothing is not None:
            uniform = of_all / jnp.maximum(evenly.existing, 1)
            loss = _scaled(1 - smoothing, loss) + _scaled(smoothing, uniform)
    if options.z_loss is not None:
        loss = loss + _scaled(options.z_loss, (sums.shift + spread) ** 2)
    return loss


def _of_labels(sums: ClassSums, smoothing: Array | None) -> Array:
    """Σ_v t_v (log_normalizer - z_v). A smoothing of 1 leaves nothing of it: it is finite then."""
    if sums.own_mass is not None and sums.rest_mass is not None and sums.label_sum is not None:
        return _around_top(sums.rest, sums.own, sums.own_mass, sums.rest_mass) - sums.label_sum
    nll = negative_log_likelihood(sums.rest, sums.own)
    nll = nll if smoothing is None else finite(nll, smoothing == 1)
    return nll if sums.own_mass is None else _scaled(sums.own_mass, nll)


def weighted_losses(
    logits: Array,
    labels: Labels,
    weights: Array | None,
    options: Options,
    _: None,
    classes: Classes,
    forward_mode: bool,
    beside: bool = False,
) -> tuple[Array, None]:
    """weights · ℓ of every token; with statistics of the same logits `beside`."""
    unused, size, dtype = unused_by(weights), logits.shape[classes.axis], accumulator(logits.dtype)
    labels, evenly = _evenly(labels, options, size, classes, dtype)
    adjustment = Adjustment(options.where, options.logit_scale, options.softcap)
    tokens = Tokens(logits, labels, options.class_weights, adjustment, unused)
    sums = class_sums(tokens, classes, Asked(prior=evenly is not None, beside=beside, forward_mode=forward_mode))
    if weights is None or unused is None:
        return loss_of(sums, evenly, options), None
    none = lost(unused, sums)
    loss = loss_of(without(none, sums), evenly, options)
    idle = unused & ~jnp.isfinite(loss)
    return jnp.where(idle if none is None else idle | none, 0, weights * loss), None


def without(unused: Array | None, numbers: PyTree) -> Any:
    """A token's numbers, 0 for those that are not used. Sums are taken out before anything is computed of them, so that
    no NaN of their own comes back."""
    return numbers if unused is None else jax.tree.map(lambda n: jnp.where(unused, jnp.zeros_like(n), n), numbers)
