"""What else one pass over the classes tells of a token and its label."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from softmax_jax._adjustment import Adjustment
from softmax_jax._checks import Options
from softmax_jax._class_sums import class_sums
from softmax_jax._classes import Classes
from softmax_jax._labels import Ids, Placed, unused_by
from softmax_jax._sums import Asked, Tokens
from softmax_jax._token_loss import log_spread, loss_of, weighted_losses, without


class LabelStatistics(NamedTuple):
    """Per token, each of the batch shape. The first three are differentiable."""

    log_prob: Float[Array, "*batch"]
    log_normalizer: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    correct: Bool[Array, "*batch"]
    rank: Int[Array, "*batch"]
    prediction: Int[Array, "*batch"]


# With a = the largest class as the pivot, all are sums of terms ≥ 0, so nothing cancels:
#
#     -log p_y = nll if y = a, else spread + (m - z_y)
#     entropy  = spread + μ       μ = Σ_v p_v (m - z_v) = moment / total       ∂/∂z_v = -p_v (μ - (m - z_v))
#
# Of moment = Σ_{v≠a} exp(z_v - m) (m - z_v) itself the slope would cancel against that of rest where several classes
# share the top. So it is a constant, whose slope is that of moment_and_rest less that of rest.


def _mean_gap(rest: Array, own: Array, moment: Array, moment_and_rest: Array) -> Array:
    """μ, of own = 0."""
    slope = moment_and_rest - rest
    return (moment + (slope - lax.stop_gradient(slope)) - own * jnp.exp(own)) / (rest + jnp.exp(own))


@jax.custom_jvp
def _entropy(rest: Array, own: Array, moment: Array, moment_and_rest: Array) -> Array:
    return log_spread(rest, own) + _mean_gap(rest, own, moment, moment_and_rest)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    (rest, own, *_), (drest, down, _, dboth) = primals, tangents
    mean, hit = _mean_gap(*primals), jnp.exp(own)
    return _entropy(*primals), (dboth - mean * drest - (mean + own) * hit * down) / (rest + hit)


def statistics(
    logits: Array, labels: Ids, weights: Array | None, options: Options, _: None, classes: Classes, forward_mode: bool
) -> tuple[LabelStatistics, None]:
    """All 0 for a token of weight 0."""
    unused, adjustment = unused_by(weights), Adjustment(options.where, options.logit_scale, options.softcap)
    tokens = Tokens(logits, Placed(labels.ids), None, adjustment, unused)
    sums: Any = class_sums(tokens, classes, Asked(moment=True, forward_mode=forward_mode))
    sums = without(unused, sums)
    log_prob, entropy = -loss_of(sums, None, options), _entropy(sums.rest, sums.own, sums.moment, sums.moment_and_rest)
    valid, log_normalizer = ~jnp.isnan(log_prob), sums.shift + log_spread(sums.rest, sums.own)
    found = LabelStatistics(
        log_prob,
        log_normalizer,
        entropy,
        valid & (sums.above == 0) & (sums.ties == 0),
        jnp.where(valid, sums.above.astype(jnp.int32), -1),
        jnp.where(jnp.isnan(log_normalizer), -1, sums.first.astype(jnp.int32)),
    )
    return without(unused, found), None


def losses_and_statistics(
    logits: Array,
    labels: Ids,
    weights: Array | None,
    options: Options,
    more: None,
    classes: Classes,
    forward_mode: bool,
) -> tuple[Array, LabelStatistics]:
    """weights · ℓ of every token, and what there is beside it, which has no gradient."""
    losses, _ = weighted_losses(logits, labels, weights, options, more, classes, forward_mode, beside=True)
    constant = lax.stop_gradient((logits, labels, weights, options._replace(label_smoothing=None, z_loss=None)))
    return losses, statistics(*constant, more, classes, forward_mode)[0]
