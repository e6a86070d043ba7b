"""Truth: softmax and cross-entropy in NumPy float64, as in a textbook. Imports nothing of the library.

Nothing here subtracts a logit from a log-sum-exp: the largest class `a` is left out of the sum,

    rest = Σ_{v≠a} exp(z_v - z_a)       -log p_v = (z_a - z_v) + log1p(rest)       1 - p_a = rest / (1 + rest)

so the float64 result itself is right to a few 1e-16 however confident the prediction.
"""

import math
from typing import NamedTuple

import numpy as np

quiet = np.errstate(all="ignore")  # infinities and NaN are results here


@quiet
def softmax(x, axis=-1, where=None):
    """exp(x_v) / Σ exp(x_u); 0 where masked, and in a row that is masked as a whole."""
    x, where = np.asarray(x, np.float64), True if where is None else np.asarray(where)
    e = np.where(where, np.exp(x - np.max(x, axis, initial=-np.inf, where=where, keepdims=True)), 0)
    return np.where(np.broadcast_to(where, e.shape), e / np.sum(e, axis, keepdims=True), 0)


def log_softmax(x, axis=-1, where=None):
    """log softmax(x); -inf where masked. `axis` may be a tuple or None."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim)) if axis is None else tuple(np.atleast_1d(axis) % x.ndim)
    kept = [a for a in range(x.ndim) if a not in axes]
    order = (*kept, *axes)
    z = x if where is None else np.where(where, x, -np.inf)
    z = z.transpose(order).reshape(*(x.shape[a] for a in kept), -1)
    out = -_negative_log_softmax(z)[0] if z.size else z
    out = out.reshape([x.shape[a] for a in order]).transpose(np.argsort(order))
    return out if where is None else np.where(where, out, -np.inf)


@quiet
def _negative_log_softmax(z):
    """(-log p, p, 1 - p, log_normalizer) over the last axis, each exact."""
    a = np.argmax(z, -1)[..., None]
    largest = np.take_along_axis(z, a, -1)
    largest = np.where(largest == -np.inf, np.nan, largest)
    e = np.exp(z - largest)
    rest = np.sum(np.where(np.arange(z.shape[-1]) == a, 0, e), -1, keepdims=True)
    p = e / (1 + rest)
    missing = np.where(np.arange(z.shape[-1]) == a, rest / (1 + rest), 1 - p)
    return largest - z + np.log1p(rest), p, missing, (largest + np.log1p(rest))[..., 0]


def hessian(logits):
    """∂²(-log p_y)/∂z∂z = diag(p) - p pᵀ of one row, 1 - p_v as the sum of the others."""
    _, p, missing, _ = _negative_log_softmax(np.asarray(logits, np.float64))
    return np.where(np.eye(len(p), dtype=bool), p * missing, -np.outer(p, p))


def _size(z):
    """What is rounded on the way to an exponential: 1 + the sizes of the logit and of its row's maximum."""
    return 1 + np.abs(np.where(np.isfinite(z), z, 0)) + np.abs(np.max(z, -1, keepdims=True))


class CrossEntropy(NamedTuple):
    """Loss and gradient, and the condition of each: the sum of the absolute values of the terms that it is made of,
    each times the size of what is rounded on the way to it (1 + the sizes of the logit and of its row's maximum).
    A float result computed without further cancellation is off by a small multiple of eps · condition."""

    loss: np.ndarray
    grad: np.ndarray
    loss_condition: np.ndarray
    grad_condition: np.ndarray


@quiet
def cross_entropy(
    logits,
    labels,
    *,
    axis=-1,
    where=None,
    weights=None,
    ignore_index=None,
    class_weights=None,
    label_smoothing=0.0,
    z_loss=0.0,
    logit_scale=1.0,
    softcap=None,
    reduction="mean",
    normalizer=None,
    cotangent=1.0,
) -> CrossEntropy:
    """The loss, and its gradient with respect to the logits times `cotangent`."""
    raw = np.moveaxis(np.asarray(logits, np.float64), axis, -1)
    exists = np.moveaxis(np.broadcast_to(True if where is None else np.asarray(where), np.shape(logits)), axis, -1)
    batch, classes = raw.shape[:-1], raw.shape[-1]
    labels, options = np.asarray(labels), (label_smoothing, z_loss, logit_scale, softcap)
    label_smoothing, z_loss, logit_scale, softcap = (None if o is None else np.float64(o) for o in options)
    c = np.ones(classes) if class_weights is None else np.asarray(class_weights, np.float64)
    w = np.broadcast_to(1.0 if weights is None else np.asarray(weights, np.float64), batch)
    w = np.where(exists.any(-1), w, 0)

    # What each class weighs in the loss.
    if labels.dtype.kind in "iu":
        if ignore_index is not None:
            w = np.where(labels == ignore_index, 0, w)
        inside = (labels >= 0) & (labels < classes)
        target = (np.arange(classes) == labels[..., None]).astype(np.float64)
        share = np.where(w == 0, 0, w * np.where(inside, c[np.where(inside, labels, 0).astype(np.int64)], np.nan))
    else:
        inside = np.ones(batch, bool)
        target = np.where(exists, np.moveaxis(labels.astype(np.float64), axis, -1), 0)
        share = w
    count = np.maximum(exists.sum(-1, keepdims=True), 1)
    target = c * ((1 - label_smoothing) * target + label_smoothing * exists / count)

    z, slope = _adjust(raw, exists, logit_scale, softcap)
    nll, p, missing, log_normalizer = _negative_log_softmax(z)
    each = np.where((target == 0) & np.isinf(nll), 0, target * nll)
    loss = np.where(inside, each.sum(-1) + z_loss * log_normalizer**2, np.nan)

    # ∂/∂z_v: Σ_u target_u (p_v - [u = v]), with p_v - 1 = -(1 - p_v).
    others = target.sum(-1, keepdims=True) - target
    others = np.where(target == target.sum(-1, keepdims=True), 0, others)
    dz = others * p - target * missing + 2 * (z_loss * log_normalizer)[..., None] * p
    constant = ~exists if softcap is None else ~exists | (raw == -np.inf)
    dz = np.where(constant, 0, np.where(inside[..., None], dz * slope, np.nan))

    size = _size(z)
    tail = np.sum(p * missing * size, -1)
    loss_condition = np.sum(np.abs(target) * size, -1) + np.abs(target).sum(-1) * tail
    loss_condition += np.abs(z_loss) * (np.abs(log_normalizer) + 1) * (size.max(-1) + tail)
    mass = np.abs(target).sum(-1, keepdims=True) + 2 * np.abs(z_loss * log_normalizer)[..., None]
    grad_condition = (mass * p + np.abs(target)) * (size + tail[..., None]) * np.abs(logit_scale)

    # A row of weight 0 is exactly 0, whatever it holds.
    losses, loss_condition = (np.where(w == 0, 0, w * x) for x in (loss, np.abs(loss_condition)))
    divisor = 1.0 if reduction != "mean" else share.sum() if normalizer is None else np.float64(normalizer)
    scale = 0.0 if divisor == 0 else 1 / divisor
    factor = (w * cotangent * scale)[..., None]
    dz, grad_condition = (np.where(factor == 0, 0, factor * x) for x in (dz, grad_condition))
    total = losses if reduction == "none" else losses.sum()
    size = np.abs(loss_condition) if reduction == "none" else np.abs(loss_condition).sum()
    # The divisor is a sum too: share it out, as its own relative error.
    size = size + np.abs(total) * (
        np.abs(share).sum() * abs(scale) if reduction == "mean" and normalizer is None else 0
    )
    return CrossEntropy(
        0.0 * total if divisor == 0 else total * scale,
        np.moveaxis(dz, -1, axis),
        np.abs(size * scale),
        np.moveaxis(np.abs(grad_condition), -1, axis),
    )


@quiet
def dense_labels(ids, probs, others, exists):
    """What SparseLabels mean, `[*batch, classes]`, for the classes that exist; NaN where an id is of no class."""
    dense = np.zeros(exists.shape)
    for row in np.ndindex(dense.shape[:-1]):
        used = probs[row] != 0
        if np.any((ids[row][used] < 0) | (ids[row][used] >= dense.shape[-1])):
            dense[row] = np.nan
            continue
        np.add.at(dense[row], ids[row][used], np.float64(probs[row][used]))
        free = exists[row] & ~np.isin(np.arange(dense.shape[-1]), ids[row][used])
        dense[row][free] = 0 if others is None else np.float64(others[row]) / max(free.sum(), 1)
    return np.where(exists, dense, 0)


class Statistics(NamedTuple):
    """Each value and the gradient of Σ cotangent · value of the three floats, with conditions as above."""

    values: tuple
    grad: np.ndarray
    conditions: tuple
    grad_condition: np.ndarray


@quiet
def label_statistics(logits, labels, cotangents, where=None, logit_scale=1.0, softcap=None) -> Statistics:
    """log_prob, log_normalizer, entropy, correct, rank over the last axis."""
    raw = np.asarray(logits, np.float64)
    exists = np.broadcast_to(True if where is None else where, raw.shape)
    z, slope = _adjust(raw, exists, np.float64(logit_scale), None if softcap is None else np.float64(softcap))
    nll, p, missing, log_normalizer = _negative_log_softmax(z)
    at_label = np.arange(z.shape[-1]) == labels[..., None]
    own = np.sum(np.where(at_label, z, 0), -1, keepdims=True)
    terms = np.where(p == 0, 0, p * nll)
    entropy = terms.sum(-1)
    values = -np.sum(np.where(at_label, nll, 0), -1), log_normalizer, entropy, z.argmax(-1) == labels, (z > own).sum(-1)

    of_log_prob, of_normalizer, of_entropy = (np.float64(c)[..., None] for c in cotangents)
    of_label = of_log_prob * np.where(at_label, missing, -p)
    dz = of_label + of_normalizer * p + of_entropy * (terms - p * entropy[..., None])

    size = _size(z)
    tail = np.sum(p * missing * size, -1)
    flushed = np.where((p > 0) & (p < 1.2e-38), 1e-31, 0)  # as a float32 it may be 0: the smallest number / eps
    lost = np.where(flushed > 0, flushed * nll, 0)
    of_terms = np.sum(terms * size + p * missing * size + lost, -1) + tail * entropy
    conditions = np.sum(at_label * size, -1) + tail, np.abs(log_normalizer) + size.max(-1) + tail, of_terms
    each = abs(of_log_prob) * (at_label * missing + p) + abs(of_normalizer) * p
    of_entropies = terms + lost + p * (entropy[..., None] + lost.sum(-1, keepdims=True) + missing)
    each = each + abs(of_entropy) * of_entropies
    each = each + (abs(of_log_prob) + abs(of_normalizer)) * flushed
    condition = each * (size + tail[..., None]) * abs(logit_scale)
    return Statistics(values, np.where(exists, dz * slope, 0), conditions, np.where(exists, condition, 0))


class Divergence(NamedTuple):
    """Per token, the divergence, its gradients by the logits of teacher and student, and conditions as above: here to
    the first order, the error that one eps of every logit's size makes."""

    loss: np.ndarray
    grads: tuple
    loss_condition: np.ndarray
    grad_conditions: tuple


@quiet
def divergence(teacher, student, beta, where=None) -> Divergence:
    """KL(t ‖ p) for beta = 0, KL(p ‖ t) for 1, else β KL(t ‖ m) + (1 - β) KL(p ‖ m) with m = β t + (1 - β) p."""
    if beta == 1:
        loss, (of_student, of_teacher), condition, conditions = divergence(student, teacher, 0, where)
        return Divergence(loss, (of_teacher, of_student), condition, conditions[::-1])
    exists = np.broadcast_to(True if where is None else where, np.shape(student))
    zs = [np.where(exists, np.asarray(z, np.float64), -np.inf) for z in (teacher, student)]
    (nll_t, t, miss_t, _), (nll_p, p, miss_p, _) = (_negative_log_softmax(z) for z in zs)
    log_ratio = np.where((t == 0) & (p == 0), 0, nll_p - nll_t)
    offs = [_off(z, q, miss) for z, q, miss in zip(zs, (t, p), (miss_t, miss_p), strict=True)]
    off = offs[0] + offs[1]
    tops = np.isclose(t, np.max(t, -1, keepdims=True)) & np.isclose(p, np.max(p, -1, keepdims=True))
    if beta == 0:
        kl = _kl(t, p, log_ratio)
        gap = np.where(tops, miss_p - miss_t, t - p)
        db = np.where(t == 0, 0, t * (log_ratio - kl))
        condition = np.sum(np.abs(gap) * off, -1, keepdims=True) + np.abs(kl)
        of_db = t * (
            offs[0] * np.abs(np.where(t == 0, 0, log_ratio - kl)) + off + np.where(t == 0, 0, np.abs(log_ratio))
        )
        of_da = p * offs[1] + t * offs[0] + np.abs(gap)
        return Divergence(kl[..., 0], (db, -gap), condition[..., 0], (of_db + t * condition, of_da))
    m = beta * t + (1 - beta) * p
    fall, student_more = np.expm1(-np.abs(log_ratio)), log_ratio < 0
    of_larger = -np.log1p(np.where(student_more, beta, 1 - beta) * fall)  # log of the larger of t, p over m
    log_t = of_larger + np.minimum(log_ratio, 0)
    log_p = of_larger - np.maximum(log_ratio, 0)
    parts = [_kl(q, m, d) for q, d in ((t, log_t), (p, log_p))]
    grads = [share * np.where(q == 0, 0, q * (d - k)) for share, q, d, k in
             ((beta, t, log_t, parts[0]), (1 - beta, p, log_p, parts[1]))]  # fmt: skip
    loss = beta * parts[0] + (1 - beta) * parts[1]
    condition = np.abs(loss) + np.sum(np.abs(grads[0]) * offs[0] + np.abs(grads[1]) * offs[1], -1, keepdims=True)
    conditions = [
        share
        * np.where(q == 0, 0, q * (o * np.abs(d - k) + off + np.abs(d) + np.abs(k) + condition / min(beta, 1 - beta)))
        for share, q, o, d, k in zip((beta, 1 - beta), (t, p), offs, (log_t, log_p), parts, strict=True)
    ]
    return Divergence(loss[..., 0], tuple(grads), condition[..., 0], tuple(conditions))


@quiet
def divergence_in_long_double(teacher, student, beta):
    """The two gradients by the formulas of `divergence`, with minus the sum of the others at each row's top; and the
    sizes of that sum's terms, Σ q_v (|log(q_v/m_v)| + K), or Σ |p_v - t_v|."""

    def log(z):
        z = np.longdouble(z) - np.max(z, -1, keepdims=True)
        return z - np.log(np.sum(np.exp(z), -1, keepdims=True))

    log_t, log_p = log(teacher), log(student)
    t, p, beta = np.exp(log_t), np.exp(log_p), np.longdouble(beta)
    log_m = np.logaddexp(log_t + np.log(beta), log_p + np.log(1 - beta)) if 0 < beta < 1 else None
    mean = lambda q, log: np.sum(q * log, -1, keepdims=True)  # noqa: E731
    of = lambda q, log_q, log_other: q * (log_q - log_other - mean(q, log_q - log_other))  # noqa: E731
    size = lambda q, log_q, log_other: q * (abs(log_q - log_other) + mean(q, log_q - log_other))  # noqa: E731
    if log_m is None:
        sides = t, log_t, log_p
        if beta == 1:
            sides = p, log_p, log_t
        both, sizes = [of(*sides), p - t if beta == 0 else t - p], [size(*sides), abs(p - t)]
        (db, da), (size_b, size_a) = (both, sizes) if beta == 0 else (both[::-1], sizes[::-1])
    else:
        db, da = beta * of(t, log_t, log_m), (1 - beta) * of(p, log_p, log_m)
        size_b, size_a = beta * size(t, log_t, log_m), (1 - beta) * size(p, log_p, log_m)
    for g, terms, q in ((db, size_b, t), (da, size_a, p)):
        top = np.argmax(q, -1)[..., None]
        for entries, sign in ((g, -1), (terms, 1)):
            np.put_along_axis(entries, top, 0, -1)
            np.put_along_axis(entries, top, sign * np.sum(entries, -1, keepdims=True), -1)
    return (db, da), (size_b, size_a)


@quiet
def _off(z, q, miss):
    """What an error of eps · size of every logit makes of log q_v at most, in eps."""
    size = np.where(q > 0, _size(z), 0)
    others = (q * size)[..., None, :] * ~np.eye(z.shape[-1], dtype=bool)
    return miss * size + others.sum(-1)


@quiet
def _kl(t, p, log_ratio):
    """Σ t (d + exp(-d) - 1), whose terms are ≥ 0, of t and p that sum to 1; the bracket is d²/2 - d³/6 + ... near 0."""
    d = np.clip(log_ratio, -0.1, 0.1)
    near = sum((-1) ** k * d**k / math.factorial(k) for k in range(2, 12))
    terms = np.where(np.abs(log_ratio) < 0.1, t * near, t * log_ratio + p - t)
    return np.sum(np.where(t == 0, p, terms), -1, keepdims=True)


@quiet
def poly_loss(logits, labels, where, cotangent, epsilon=2.0) -> CrossEntropy:
    """Σ_v t_v (-log p_v + ε (1 - p_v)) over the last axis, and its gradient times `cotangent`."""
    plain = cross_entropy(logits, labels, where=where, reduction="none", cotangent=cotangent)
    exists = np.broadcast_to(True if where is None else where, np.shape(logits))
    z = np.where(exists, np.asarray(logits, np.float64), -np.inf)
    t = np.where(exists, np.asarray(labels, np.float64), 0)
    _, p, missing, _ = _negative_log_softmax(z)
    p, missing = (np.where(exists, a, 0) for a in (p, missing))
    # ∂/∂z_u Σ_v t_v (1 - p_v) = Σ_v t_v p_v (p_u - [u = v]) = p_u Σ_{v≠u} t_v p_v - t_u p_u (1 - p_u).
    product = t * p
    others = np.sum(np.where(np.eye(t.shape[-1], dtype=bool), 0, product[..., None, :]), -1)
    slope = epsilon * (p * others - product * missing)
    size = _size(z)
    tail = np.sum(p * missing * size, -1, keepdims=True)
    loss = epsilon * np.sum(t * missing, -1)
    used = exists.any(-1)
    each = np.abs(cotangent)[..., None] * epsilon * (p * product.sum(-1, keepdims=True) + product) * (size + tail)
    return CrossEntropy(
        np.where(used, plain.loss + loss, 0),
        np.where(used[..., None], plain.grad + cotangent[..., None] * slope, 0),
        np.where(used, plain.loss_condition + epsilon * np.sum(t * (p * size + tail), -1) + loss, 0),
        np.where(used[..., None], plain.grad_condition + each, 0),
    )


def _adjust(raw, exists, logit_scale, softcap):
    """The logits of the softmax, and their derivative by the raw ones. Infinities are judged on the raw logits."""
    x = np.where(np.isinf(raw), 0, raw) * logit_scale
    z = x if softcap is None else softcap * np.tanh(x / softcap)
    slope = logit_scale * (np.ones_like(x) if softcap is None else 1 / np.cosh(x / softcap) ** 2)
    floor = -np.inf if softcap is None else -softcap
    z = np.where(raw == np.inf, np.nan, np.where(raw == -np.inf, floor, z))
    slope = np.where(raw == -np.inf, 0 if softcap is not None else 1, slope)  # -inf stays -inf, whatever the scale
    slope = np.where(raw == np.inf, np.nan, slope)
    return np.where(exists, z, -np.inf), np.where(exists, slope, 0)
