"""From the sums of a token to its loss, in plain JAX on per-token numbers."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from softmax_jax._inputs.arrays import accumulator
from softmax_jax._inputs.labels import Labels, Sparse
from softmax_jax._inputs.options import Options, zero_infinite
from softmax_jax._sums.blocks import even_mass_of, num_existing
from softmax_jax._sums.rule import class_sums, nonfinite_unused, zero_rows
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


def weighted_losses(batch: Batch) -> tuple[Array, None]:
    """weights · ℓ of every token."""
    return _weighted_losses(batch, with_statistics=False), None


def losses_beside_statistics(batch: Batch) -> Array:
    """The same, where statistics of the same logits are made too."""
    return _weighted_losses(batch, with_statistics=True)


def _weighted_losses(batch: Batch, with_statistics: bool) -> Array:
    logits, labels, options, classes, forward_mode = batch
    weights, unused = options.weights, unused_tokens(options.weights)
    labels, share = _even_share(batch)
    extra = ExtraSums(even=share is not None, with_statistics=with_statistics, forward_mode=forward_mode)
    operands = logits, labels, options.adjustment, options.class_weights, unused
    sums = class_sums(Tokens(*operands, classes=classes, extra=extra))
    if weights is None or unused is None:
        return loss_of(sums, share, options)
    not_finite = nonfinite_unused(unused, sums)
    loss = loss_of(zero_rows(not_finite, sums), share, options)
    idle = unused & ~jnp.isfinite(loss)
    return jnp.where(idle if not_finite is None else idle | not_finite, 0, weights * loss)


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
