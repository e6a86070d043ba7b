"""From the sums of a token to its loss and its statistics, in plain JAX on per-token numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from softmax_jax._inputs.arrays import accumulator, nonfinite_unused, zero_rows
from softmax_jax._inputs.labels import Labels, Sparse
from softmax_jax._inputs.options import Options, zero_infinite
from softmax_jax._sums.blocks import even_mass_of, num_existing
from softmax_jax._sums.rule import class_sums
from softmax_jax._sums.targets import share_of_others
from softmax_jax._sums.waist import (
    Batch,
    ClassSums,
    ExtraSums,
    Tokens,
    log_total,
    loss_around_top,
    negative_log_likelihood,
    unused_tokens,
)


class EvenShare(NamedTuple):
    """What probability that is spread evenly over the classes needs, per token."""

    existing: Array  # K, how many classes exist
    mass: Array  # Σ_v c_v over them
    others: Array | None = None  # what each has besides the labels' own and the smoothing, from SparseLabels.others


def weighted_losses(batch: Batch, shares_pass: bool = False) -> tuple[Array, None]:
    """weights · ℓ of every token."""
    logits, labels, options, classes, forward_mode = batch
    weights, unused = options.weights, unused_tokens(options.weights)
    labels, share = _even_share(batch)
    extra = ExtraSums(even=share is not None, shares_pass=shares_pass)
    operands = logits, labels, options.adjustment, options.class_weights, unused
    sums = class_sums(Tokens(*operands, classes=classes, extra=extra, forward_mode=forward_mode))
    if weights is None or unused is None:
        return loss_of(sums, share, options), None
    not_finite = nonfinite_unused(unused, sums)
    loss = loss_of(zero_rows(not_finite, sums), share, options)
    idle = unused & ~jnp.isfinite(loss)
    return jnp.where(idle if not_finite is None else idle | not_finite, 0, weights * loss), None


def _even_share(batch: Batch) -> tuple[Labels, EvenShare | None]:
    """(labels without `others`, what is spread); None for nothing."""
    logits, labels, options, classes, _ = batch
    where, class_weights, size = options.where, options.class_weights, logits.shape[classes.axis]
    if options.label_smoothing is None and labels.others is None:
        return labels, None
    existing = mass = num_existing(where, size, classes, accumulator(logits.dtype))
    if class_weights is not None:
        mass = even_mass_of(class_weights, where, classes)
    if not isinstance(labels, Sparse) or labels.others is None:
        return labels, EvenShare(existing, mass)
    others = share_of_others(labels, where, existing, size, classes)  # of every class, and the few differ from it
    return Sparse(labels.ids, labels.probs - classes.expand(others)), EvenShare(existing, mass, others)


def loss_of(sums: ClassSums, share: EvenShare | None, options: Options) -> Array:
    """ℓ of every token, before its weight."""
    loss = _of_labels(sums, options.label_smoothing)
    if share is None and options.z_loss is None:
        return loss
    spread = log_total(sums.rest, sums.own)
    if share is not None and sums.even_sum is not None:
        even, smoothing = share.mass * spread - sums.even_sum, options.label_smoothing  # Σ_v c_v (log_normalizer - z_v)
        loss = loss if share.others is None else loss + _zero_wins(share.others, even)
        if smoothing is not None:
            even = even / jnp.maximum(share.existing, 1)
            loss = _zero_wins(1 - smoothing, loss) + _zero_wins(smoothing, even)
    if options.z_loss is not None:
        loss = loss + _zero_wins(options.z_loss, (sums.row_max + spread) ** 2)
    return loss


def _of_labels(sums: ClassSums, smoothing: Array | None) -> Array:
    """Σ_v t_v (log_normalizer - z_v). A smoothing of 1 leaves nothing of it: it is finite then."""
    if sums.own_mass is not None and sums.other_mass is not None and sums.label_sum is not None:
        return loss_around_top(sums.rest, sums.own, sums.own_mass, sums.other_mass) - sums.label_sum
    nll = negative_log_likelihood(sums.rest, sums.own)
    nll = nll if smoothing is None else zero_infinite(nll, smoothing == 1)
    return nll if sums.own_mass is None else _zero_wins(sums.own_mass, nll)


def _zero_wins(factor: Array, value: Array) -> Array:
    """factor · value, where a factor of 0 wins over an infinite value."""
    return factor * zero_infinite(value, factor == 0)


# Statistics.


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
    return log_total(rest, own) + _mean_gap(rest, own, moment, moment_and_rest)


@_entropy.defjvp
def _entropy_jvp(primals: tuple, tangents: tuple) -> tuple:
    (rest, own, *_), (drest, d_own, _, dboth) = primals, tangents
    mean, hit = _mean_gap(*primals), jnp.exp(own)
    return _entropy(*primals), (dboth - mean * drest - (mean + own) * hit * d_own) / (rest + hit)


def statistics(batch: Batch) -> tuple[LabelStatistics, None]:
    """All 0 for a token of weight 0."""
    logits, labels, options, classes, forward_mode = batch
    unused, operands = unused_tokens(options.weights), (logits, labels, options.adjustment)
    how = {"classes": classes, "extra": ExtraSums(statistics=True), "forward_mode": forward_mode}
    sums: Any = zero_rows(unused, class_sums(Tokens(*operands, unused=unused, **how)))
    log_prob = -loss_of(sums, None, Options())
    valid, log_normalizer = ~jnp.isnan(log_prob), sums.row_max + log_total(sums.rest, sums.own)
    found = LabelStatistics(
        log_prob,
        log_normalizer,
        _entropy(sums.rest, sums.own, sums.moment, sums.moment_and_rest),
        valid & (sums.above == 0) & (sums.ties == 0),
        jnp.where(valid, sums.above.astype(jnp.int32), -1),
        jnp.where(jnp.isnan(log_normalizer), -1, sums.pivot),
    )
    return zero_rows(unused, found), None


def losses_and_statistics(batch: Batch) -> tuple[Array, LabelStatistics]:
    """weights · ℓ of every token, and its statistics, which have no gradient."""
    constant = lax.stop_gradient((batch.logits, batch.labels, batch.options))
    of_constant, _ = statistics(Batch(*constant, batch.classes, batch.forward_mode))
    return weighted_losses(batch, shares_pass=True)[0], of_constant
