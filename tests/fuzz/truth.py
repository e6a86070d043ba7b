"""The truth of `fuzz_short.py`: textbook formulas in NumPy, differentiated by a tape of one's own in float64.

A formula is run nine times at once, once exactly, and eight times with every operation, forward and backward, off by a
random relative error of up to one eps of float32 (of what it adds, for a sum). What the eight are off by is the
condition of a result, in eps. Every array is [samples, lanes, rows, columns], of tokens and classes where it has them.
"""

import jax.numpy as jnp
import numpy as np

EPS, SAMPLES = 2.0**-23, 9
NOISE = {"rng": np.random.default_rng(0)}
PER_TOKEN = ("logits", "x", "dense", "few", "probs", "others", "labels")


# The tape. Its values have the samples first.


def rough(value, size=None, eps=EPS):
    """`value`, in all samples but the first off by a random part of eps · size."""
    error = NOISE["rng"].uniform(-eps, eps, value.shape) * np.abs(value if size is None else size)
    error[0] = 0
    return np.where(np.isfinite(value) & np.isfinite(error), value + error, value)


def total(value, axes):
    return rough(value.sum(axes, keepdims=True), np.abs(value).sum(axes, keepdims=True))


def product(m, n):
    return rough(m @ n, np.abs(m) @ np.abs(n))


class V:
    """A value, and how its cotangent goes to what it was made of."""

    def __init__(self, value, *parents):
        self.value, self.parents, self.cotangent = value, [p for p in parents if isinstance(p[0], V)], 0

    def map(self, f, slope):
        x, y = self.value, f(self.value)
        return V(rough(y), (self, lambda g: g * slope(x, y)))

    def sum(self, axis):
        return V(total(self.value, axis), (self, lambda g: np.broadcast_to(g, self.value.shape)))

    def to(self, other, mask):
        """`other` where the mask is True."""
        value = np.where(mask, getattr(other, "value", other), self.value)
        return V(value, (self, lambda g: np.where(mask, 0, g)), (other, lambda g: np.where(mask, g, 0)))


def operator(f, to_left, to_right):
    def made(left, right):
        a, b = left.value, getattr(right, "value", right)
        return V(f(a, b), (left, lambda g: to_left(g, a, b)), (right, lambda g: to_right(g, a, b)))

    return made


def turned(a):
    return np.swapaxes(a, -1, -2)


V.__neg__ = lambda a: V(-a.value, (a, np.negative))
V.__add__ = operator(lambda a, b: rough(a + b), lambda g, a, b: g, lambda g, a, b: g)
V.__sub__ = operator(lambda a, b: rough(a - b), lambda g, a, b: g, lambda g, a, b: -g)
V.__mul__ = operator(lambda a, b: rough(a * b), lambda g, a, b: g * b, lambda g, a, b: g * a)
V.__truediv__ = operator(lambda a, b: rough(a / b), lambda g, a, b: g / b, lambda g, a, b: -g * a / b**2)
V.__matmul__ = operator(product, lambda g, a, b: product(g, turned(b)), lambda g, a, b: product(turned(a), g))
V.exp = lambda a: a.map(np.exp, lambda x, y: y)
V.log = lambda a: a.map(np.log, lambda x, y: 1 / x)


def pull(outputs, cotangents):
    """Sets the cotangent of everything that the outputs are made of."""
    order, seen = [], set()

    def visit(v):
        if id(v) not in seen:
            seen.add(id(v))
            for parent, _ in v.parents:
                visit(parent)
            order.append(v)

    for out, cotangent in zip(outputs, cotangents, strict=True):
        visit(out)
        out.cotangent = out.cotangent + cotangent
    for v in reversed(order):
        for parent, rule in v.parents if np.ndim(v.cotangent) else ():
            g = rule(v.cotangent)
            axes = tuple(i for i, n in enumerate(parent.value.shape) if n == 1 and g.shape[i] > 1)
            parent.cotangent = parent.cotangent + (total(g, axes) if axes else rough(g))


# The formulas, of a case c and v: {name: V, and what is fixed: an array}.


def adjusted(c, v, prefix=""):
    """The logits, from the head on, where they exist."""
    raw, scale, cap = (v.get(prefix + name) for name in ("logits", "logit_scale", "softcap"))
    if raw is None:
        z = v[prefix + "x"] @ v[prefix + "weight"]
        z = z + v[prefix + "bias"] if prefix + "bias" in v else z
        short = c.dtype != np.float32  # then the gradient of the logits is multiplied in 16 bits
        raw = V(z.value, (z, lambda g: rough(g, eps=2.0**-8))) if short else z
    low, bad = raw.value[0] == -np.inf, ~(raw.value[0] < np.inf)
    x = raw.to(0.0, low | bad)
    x = x if scale is None else x * scale
    x = x if cap is None else (x / cap).map(np.tanh, lambda x, y: 1 / np.cosh(x) ** 2) * cap
    x = x.to(raw if cap is None else -cap, low).to(raw * np.nan, bad)
    return (x / v["temperature"] if "temperature" in v else x).to(-np.inf, ~v["exists"])


def softmaxes(z):
    """(-log p, p, log_normalizer), with the largest class left out of its sum."""
    top = np.arange(z.value.shape[-1]) == np.argmax(z.value[0], -1)[..., None]
    largest = z.to(0.0, ~top)
    largest = V(largest.value.sum(-1, keepdims=True), (largest, lambda g: np.broadcast_to(g, z.value.shape)))
    largest = largest.to(np.nan, largest.value[0] == -np.inf)
    down = (z - largest).to(np.where(np.isnan(largest.value), np.nan, 0.0), top)
    spread = down.exp().to(0.0, top).sum(-1).map(np.log1p, lambda x, y: 1 / (1 + x))
    nll = spread - down
    return nll, (-nll).exp(), largest + spread


def targets(v):
    """Of ids, of dense or of sparse labels."""
    exists, classes = v["exists"], np.arange(v["exists"].shape[-1])
    if "labels" in v:
        hot = classes == v["labels"]
        t = np.where(hot.any(-1, keepdims=True), hot, np.nan)
        return V(np.broadcast_to(t, (SAMPLES, *t.shape)))
    if "dense" in v:
        return v["dense"].to(0.0, ~exists)
    ids, probs = v["few"], v["probs"]
    hot = (classes == ids[..., None]) & (probs.value[0] != 0)[..., None]  # [lanes, tokens, k, classes]
    spread = np.einsum("...tk,...tkv->...tv", probs.value, hot)
    t = V(rough(spread), (probs, lambda g: np.einsum("...tv,...tkv->...tk", g, hot)))
    if "others" in v:
        free = exists & ~hot.any(-2)
        share = v["others"] * (1 / np.maximum(free.sum(-1, keepdims=True), 1))
        t = t + (share * exists - share * (exists & ~free))  # right to a rounding of the share, as documented
    return t.to(0.0, ~exists)


def expected(t, nll):
    """Σ t · nll, without what is infinitely unlikely and has no share."""
    return (t * nll.to(0.0, (t.value[0] == 0) & np.isinf(nll.value[0]))).sum(-1)


def cross_entropy(c, v):
    nll, _, log_normalizer = softmaxes(adjusted(c, v))
    t, exists = targets(v), v["exists"]
    if "label_smoothing" in v:
        even = v["label_smoothing"] * (exists / np.maximum(exists.sum(-1, keepdims=True), 1))
        t = t * (-v["label_smoothing"] + 1.0) + even
    loss = expected(t * v["class_weights"] if "class_weights" in v else t, nll)
    return [loss + v["z_loss"] * log_normalizer * log_normalizer if "z_loss" in v else loss]


def divergence(t, nll_t, p, nll_p, share=None, rest=None):
    """Σ t (d + exp(-d) - 1), of d = log(t / p), or of the mixture share · t + rest · p in p's place."""
    none = t.value[0] == 0
    d = (nll_p - nll_t).to(0.0, none)
    if share is not None:
        both = none | (p.value[0] == 0)
        d = -(((nll_t - nll_p).to(0.0, both)).exp().to(0.0, both) * rest + share).log()
        p = t * share + p * rest
    far = d.map(lambda d: d + np.expm1(-d), lambda d, _: -np.expm1(-d)) * t
    return far.to(p, none).sum(-1)


def kl_divergence(c, v):
    nll_p, p, _ = softmaxes(adjusted(c, v))
    if c.teacher == "probs":
        t = targets(v)
        t = t.to(0.0, t.value[0] == 0)
        t = t / t.sum(-1)
        nll_t = -t.to(1.0, t.value[0] == 0).log().to(-np.inf, t.value[0] == 0)
    else:
        nll_t, t, _ = softmaxes(adjusted(c, v, "teacher_"))
    beta, rest = v["beta"], -v["beta"] + 1.0
    if np.isin(beta.value, (0, 1)).all():
        return [divergence(p, nll_p, t, nll_t) if beta.value.all() else divergence(t, nll_t, p, nll_p)]
    return [divergence(t, nll_t, p, nll_p, beta, rest) * beta + divergence(p, nll_p, t, nll_t, rest, beta) * rest]


def label_statistics(c, v):
    nll, p, log_normalizer = softmaxes(adjusted(c, v))
    return [-expected(targets(v), nll), log_normalizer, expected(p, nll)]


def as_in_optax(c, v):
    nll, p, _ = softmaxes(adjusted(c, v))
    if c.softmax:
        return [p.to(0.0, ~v["exists"]) if c.name == "softmax" else (-nll).to(-np.inf, ~v["exists"])]
    t = targets(v)
    slope = nll.map(lambda x: -np.expm1(-x), lambda x, y: np.exp(-x))
    poly = [(t * v.get("epsilon", 2.0) * slope).sum(-1)] if c.name.startswith("poly") else []
    return [sum(poly, expected(t, nll))]


def reduced(c, v, loss, weight):
    if c.softmax:
        return loss
    if c.reduction != "mean":
        return (loss * weight).sum(-2) if c.reduction == "sum" else loss * weight
    by = weight
    if "labels" in v:
        hot = np.arange(c.classes) == v["labels"]
        inside = np.where(hot.any(-1, keepdims=True) | (weight.value[0] == 0), 1.0, np.nan)
        by = weight * ((v["class_weights"] * hot).sum(-1) if "class_weights" in v else 1.0) * inside
    by = v["normalizer"] if "normalizer" in v else by.sum(-2)
    empty = by.value[0] == 0
    return ((loss * weight).sum(-2) / by.to(1.0, empty)).to(0.0, empty)


FORMULAS = {"cross_entropy": cross_entropy, "kl_divergence": kl_divergence, "label_statistics": label_statistics}


def inputs(c, eps, step, tangents):
    v = {"weights": V(np.ones((SAMPLES, 1, c.tokens, 1))), "beta": V(np.zeros((SAMPLES, 1, 1, 1)))}
    for key, a in c.args.items():
        v[key] = a
        if key not in ("labels", "few", "where"):
            a = np.broadcast_to(a.astype(float), (SAMPLES, *a.shape))
            moves = step and key in c.floats
            v[key] = V(a + step * rough(np.broadcast_to(tangents[key], a.shape), eps=eps) if moves else a)
    v["exists"] = np.broadcast_to(v.get("where", True), (c.lanes, c.tokens, c.classes))
    return v


def without(v, lost):
    """With other numbers in rows that are of weight 0 and have no number."""
    rows = {}
    for key, a in v.items():
        if key.removeprefix("teacher_") in PER_TOKEN:
            rows[key] = a.to(1.0, lost) if isinstance(a, V) else np.where(lost, 0, a)
    return {**v, **rows, "exists": v["exists"] | lost}


def truth(c, seed, cotangents=None, step=0.0, tangents=None):
    """(values, {name: gradient}, which rows count and are NaN or infinite), the first two with the samples first."""
    NOISE["rng"] = np.random.default_rng(seed)
    eps = float(jnp.finfo(c.dtype).eps) if c.name == "softmax" else EPS  # whose derivatives read its result
    v, formula = inputs(c, eps, step, tangents), FORMULAS.get(c.stem, as_in_optax)
    ignored = v["labels"] == c.static["ignore_index"] if "ignore_index" in c.static else False
    weight = v["weights"].to(0.0, ~v["exists"].any(-1, keepdims=True) | ignored)
    odd = np.any([~np.isfinite(o.value[0]).all(-1, keepdims=True) for o in formula(c, v)], 0) & (not c.softmax)
    idle = weight.value[0] == 0
    lost = idle & odd
    outs = [reduced(c, v, o.to(0.0, lost), weight) for o in formula(c, without(v, lost))]
    grads = {}
    if cotangents is not None:
        pull(outs, [rough(np.broadcast_to(g, o.value.shape), eps=eps) for g, o in zip(cotangents, outs, strict=True)])
        grads = {k: np.broadcast_to(v[k].cotangent, v[k].value.shape) + 0.0 for k in c.floats}
    low = v["logits"].value[0] == -np.inf if "logits" in v else np.zeros((1, 1, 1), bool)
    for key in {"dense", "class_weights"} & grads.keys():  # the gradient by a 0 beside -inf is no one's
        hit = (v[key].value[0] == 0) & (low if key == "dense" else low.any((0, -2), keepdims=True))
        grads[key] = np.where(hit, np.nan, grads[key])
    return [o.value for o in outs], grads, odd & ~idle


def differences(c, seed, cotangents, tangents):
    """Of the gradient along the tangents, or of the values where there are no cotangents."""
    h = 1e-3
    a, b, d, e = (truth(c, seed, cotangents, s * h, tangents)[cotangents is not None] for s in (1, -1, 2, -2))
    return {k: (8 * (a[k] - b[k]) - (d[k] - e[k])) / (12 * h) for k in (a if cotangents else range(len(a)))}
