"""Every function, all its options together, under transforms of transforms, against the truth of `truth.py`.

    python tests/fuzz --cases 2000 --seed 1 [--fold] [--seconds 600] [--only PROGRAM]

The truth is a textbook formula in float64 of the same rounded inputs, and samples of what it is off by where every
operation is rounded to float32. A result may be off by `ROUNDINGS` of their root mean square, and one rounding of its
dtype. Second derivatives are differences of the truth's gradient, of fourth order.

Every array is [lanes, rows, columns]; lanes are what `vmap`, `scan` and `shard_map` run over, and an array that is the
same for all has one. The program lays them out as the function wants them. It compiles for seconds, and so is run on
several draws of numbers.
"""

import argparse
import itertools
import time
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from truth import EPS, FORMULAS, differences, truth

import softmax_jax as sj
from softmax_jax._sums import blocks

ROUNDINGS, FLOOR, DRAWS = 10, 1e-35, 12

# Cases.

NAMES = ["cross_entropy"] * 5 + ["linear_cross_entropy"] * 6 + ["kl_divergence"] * 4 + ["linear_kl_divergence"] * 3
NAMES += ["label_statistics"] * 2 + ["linear_label_statistics"] * 2 + ["softmax", "log_softmax"] * 2
NAMES += ["softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels", "poly_loss_cross_entropy"]
NAMES += ["safe_softmax_cross_entropy"]
NESTS = ",,checkpoint,vmap,vmap,scan,shard_map,shard_map,classes,classes,scan/vmap,vmap/scan,scan/checkpoint,"
NESTS += "vmap/checkpoint,checkpoint/vmap,shard_map/scan,shard_map/vmap,checkpoint/classes,jit/vmap,vmap/jit"
LANES = {"vmap": 2, "scan": 2, "shard_map": 4}
LOSSES = ("cross_entropy", "kl_divergence")
ARGUMENTS = {  # what it is of, how often one array is that of all lanes, one lane's values
    "logits": ("classes", 0, lambda c: c.logits()),
    "where": ("classes", 0, lambda c: c.rng.random((c.where, c.classes)) < c.keep),
    "dense": ("classes", 0, lambda c: c.dense()),
    "x": ("x", 0, lambda c: c.rng.normal(size=(c.tokens, c.embed))),
    "few": ("x", 0, lambda c: c.rng.integers(0, c.classes, (c.tokens, c.few))),
    "probs": ("x", 0, lambda c: c.some(0, 1, (c.tokens, c.few), 0.8) + 0.05 * (c.teacher is not None)),
    "weight": ("weight", 0.6, lambda c: (c.scale * c.rng.normal(size=(c.embed, c.classes))).astype(c.dtype)),
    "bias": ("class", 0.6, lambda c: c.rng.normal(size=(1, c.classes))),
    "class_weights": ("class", 0.5, lambda c: c.some(0.5, 2, (1, c.classes), 0.85)),
    "labels": ("token", 0, lambda c: c.ids()),
    "others": ("token", 0, lambda c: c.rng.uniform(0.01, 1, (c.tokens, 1))),
    "weights": ("token", 0, lambda c: c.some(0.5, 2, (c.tokens, 1), 0.7)),
}
SCALARS = {  # from, to, how often, of which functions
    "beta": (0.05, 0.95, 0.6, "kl_divergence"),
    "temperature": (0.5, 3, 0.3, "kl_divergence"),
    "softcap": (2, 20, 0.3, "kl_divergence", "cross_entropy", "label_statistics"),
    "teacher_softcap": (2, 20, 0.3, "kl_divergence"),
    "label_smoothing": (0.01, 0.5, 0.3, "cross_entropy"),
    "z_loss": (1e-4, 0.1, 0.3, "cross_entropy"),
    "logit_scale": (-0.5, 2, 0.3, "cross_entropy", "label_statistics"),
    "epsilon": (-1, 3, 0.7, "poly_loss_cross_entropy"),
    "normalizer": (1, 5, 0.2, *LOSSES),
}
EXACT = {"beta": (0.0, 1.0), "label_smoothing": (0.0, 1.0), "normalizer": (0.0,), "logit_scale": (0.0,)}


def kind_of(key):
    return ARGUMENTS.get(key.removeprefix("teacher_"), ("scalar",))[0]


class Case:
    """A program, and `args`: {name: array}. `draw` makes new numbers for the same program."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.args, self.shared, self.plain, self.static, self.dtypes = {}, set(), set(), {}, {}
        self.program()
        self.shapes()
        self.numbers()
        if self.linear:
            self.states("")
            self.static |= {"chunk_size": self.one_of(1, 2, 5)} if self.maybe(0.8) else {}
        else:
            self.add("logits", self.dtype)
        if not self.stem.startswith("safe") and self.maybe(0.2):
            self.add("where", bool)
        self.targets()
        self.options()
        self.draw()
        self.floats = [k for k, a in self.args.items() if jnp.issubdtype(a.dtype, jnp.floating) and k not in self.plain]

    def maybe(self, p=0.3):
        return self.rng.random() < p

    def one_of(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def program(self):
        self.name = self.one_of(*NAMES)
        self.linear, self.stem = self.name.startswith("linear"), self.name.removeprefix("linear_")
        self.optax, self.softmax = self.stem not in FORMULAS, self.stem.endswith("softmax")
        self.nest = [kind for kind in self.one_of(*NESTS.split(",")).split("/") if kind]
        self.nest = ["vmap"] if self.optax and "classes" in self.nest else self.nest
        self.mode = self.one_of(*["vjp"] * 9, "jvp", "jvp", "hvp", "grad of grad")
        self.jit = self.maybe(0.75) or "shard_map" in self.nest
        self.lanes = int(np.prod([LANES.get(kind, 1) for kind in self.nest]))

    def shapes(self):
        batch = self.one_of((), (1,), (3,), (7,), (2, 3), (2, 1, 3), (17,))
        classes = self.one_of(*((8, 28) if "classes" in self.nest else (1, 2, 3, 7, 7, 17, 17, 33, 130)))
        last, safe = self.linear or self.stem.startswith("safe") or self.maybe(0.6), self.stem.startswith("safe")
        axis = len(batch) if last else int(self.rng.integers(len(batch) + 1))
        shape: tuple[int, ...] = (*batch[:axis], classes, *batch[axis:])
        axes: tuple[int, ...] = (axis,)
        if self.optax and not safe and self.maybe():
            axes = tuple(map(int, self.rng.permutation(len(shape))[: self.rng.integers(1, len(shape) + 1)]))
        if not safe and (self.optax or axes[0] != len(batch)):
            self.static["axis"] = axes if len(axes) > 1 else axes[0] - len(shape) * (self.optax and self.maybe())  # pyright: ignore[reportGeneralTypeIssues]
        self.order = (*(i for i in range(len(shape)) if i not in axes), *axes)
        sizes = [shape[i] for i in self.order]
        self.batch, self.class_shape = sizes[: -len(axes)], sizes[-len(axes) :]
        self.row = self.tokens, self.classes = int(np.prod(self.batch)), int(np.prod(self.class_shape))
        self.few, self.where = int(self.rng.integers(1, min(classes, 4) + 1)), self.one_of(self.tokens, self.tokens, 1)

    def numbers(self):
        """Of which dtype and size they are."""
        tame = self.mode != "vjp"
        short = (jnp.bfloat16,) * 2 if self.linear else (jnp.bfloat16, np.float16)
        self.dtype = jnp.dtype(self.one_of(*[np.float32] * 3, *(short if not (tame and self.linear) else ())))
        self.scale, self.spikes = self.one_of(0.1, 1.0, 1.0, 5.0, 3.0 if tame else 30.0), 0.0 if tame else 0.1
        self.wild, self.masked = not tame and self.maybe(0.25), self.maybe(0.2) and self.stem != "kl_divergence"
        self.keep, self.embed, self.near = self.one_of(0.5, 0.8), self.one_of(1, 3, 8), self.one_of(0, 0, 1e-2)
        self.scale /= self.embed**0.5 if self.linear else 1.0

    def add(self, key, dtype=np.float32, shared=None):
        self.dtypes[key] = dtype
        shared = ARGUMENTS[key.removeprefix("teacher_")][1] if shared is None else shared
        self.shared |= {key} if self.maybe(shared) or self.lanes == 1 else set()

    def states(self, prefix):
        self.transposed = self.transposed if prefix else self.maybe(0.4)
        mixed = self.dtype != np.float32 and self.maybe(0.4)  # numbers of 16 bits, held in 32
        self.add(prefix + "x", self.dtype)
        self.add(prefix + "weight", np.float32 if mixed else self.dtype)
        if self.maybe():
            self.add(prefix + "bias")
        self.static |= {"dtype": self.dtype} if mixed else {}
        self.static |= {prefix + "transpose_weight": True} if self.transposed else {}

    def targets(self):
        kl, loss = self.stem == "kl_divergence", self.stem == "cross_entropy"
        self.teacher = self.one_of("logits", "logits", "probs", *["states"] * 2 * self.linear) if kl else None
        if self.teacher == "states":
            self.states("teacher_")
        elif self.teacher == "logits":
            self.add("teacher_logits", self.dtype)
        elif self.stem in ("label_statistics", "softmax_cross_entropy_with_integer_labels") or loss and self.maybe(0.5):
            self.add("labels", np.int32)
            if self.maybe() and not self.optax:
                self.static["ignore_index"] = self.one_of(-100, 0, -1)
        elif (loss or kl) and self.maybe(0.5):
            self.add("few", np.int32)
            self.add("probs")
            if kl or self.maybe(0.5):
                self.add("others")
                self.masked = False  # beside -inf a probability below its share of the others is NaN, as documented
        elif not self.softmax:
            self.add("dense", np.float32 if self.optax else self.one_of(np.float32, self.dtype))

    def options(self):
        self.reduction = self.one_of("mean", "mean", "sum", "none") if self.stem in LOSSES else "none"
        self.static |= {"reduction": self.reduction} if self.stem in LOSSES else {}
        if self.stem in LOSSES and self.maybe(0.5):
            self.add("weights")
        if self.stem == "cross_entropy" and self.maybe():
            self.add("class_weights")
        if self.stem == "cross_entropy" and "labels" in self.dtypes and self.maybe(0.2):
            self.static["statistics"] = True
        for key, (_, _, often, *stems) in SCALARS.items():
            never = {"normalizer": self.reduction != "mean", "teacher_softcap": self.teacher == "probs"}.get(key)
            if self.stem in stems and not never and self.maybe(often):
                self.plain |= {key} if self.maybe(0.4) else set()
                self.add(key, shared=1.0 if key in self.plain else 0.5)
        if not self.optax and (self.mode == "jvp" or self.maybe(0.1)):
            self.static["forward_mode"] = True
        self.static |= {"axis_name": "d"} if "classes" in self.nest else {}

    def draw(self):
        for key, dtype in self.dtypes.items():
            if key not in self.plain or key not in self.args:
                lanes = 1 if key in self.shared else self.lanes
                self.args[key] = np.stack([self.values(key) for _ in range(lanes)]).astype(dtype)
        if "teacher_logits" in self.args and self.near and not self.linear:
            beside = self.args["logits"].astype(float) + self.near * self.rng.normal(size=(self.lanes, *self.row))
            self.args["teacher_logits"] = beside.astype(self.dtype)
        if self.wild and not self.softmax:
            self.spoil()

    def values(self, key):
        """One lane's."""
        if key not in SCALARS:
            return ARGUMENTS[key.removeprefix("teacher_")][2](self)
        exact = EXACT.get(key, ()) if key in self.plain and (key != "logit_scale" or self.mode == "vjp") else ()
        return np.full(
            (1, 1), self.one_of(*exact) if exact and self.maybe(0.2) else self.rng.uniform(*SCALARS[key][:2])
        )

    def some(self, low, high, size, share):
        return self.rng.uniform(low, high, size) * (self.rng.random(size) < share)

    def ids(self):
        outside = self.rng.random((self.tokens, 1)) < 0.1 * self.wild
        inside = self.rng.integers(0, self.classes, outside.shape)
        return np.where(outside, self.one_of(-1, self.classes, -100), inside)

    def dense(self):
        t = self.rng.gamma(0.5, size=self.row) * (self.rng.random(self.row) < 0.8)
        if self.stem != "kl_divergence":
            return t
        return np.maximum(t, 1e-3) if self.maybe() else t + (t.sum(-1, keepdims=True) == 0)

    def logits(self):
        z = self.scale * self.rng.normal(size=self.row)
        z = np.round(z) if self.maybe(0.1) else z
        if self.masked:
            z = np.where(self.rng.random(self.row) < 0.2, -np.inf, z)
        if self.maybe(self.spikes):
            z.flat[self.rng.integers(z.size)] = self.scale * 40
        return z

    def spoil(self):
        """NaN and infinities in rows of weight 0, and seldom in any."""
        hit, weights = self.args["x" if self.linear else "logits"], self.args.get("weights", np.ones((1, 1, 1)))
        for lane, row, _ in np.argwhere(weights == 0):
            hit[lane, row, self.rng.integers(hit.shape[-1])] = self.one_of(np.nan, np.inf, -np.inf)
        if self.maybe() and not self.linear and len(self.class_shape) == 1:
            hit[tuple(int(self.rng.integers(n)) for n in hit.shape)] = self.one_of(np.nan, np.inf)


# What is run.


def laid_out(c, kind, a):
    """One lane's array as the function wants it."""
    if kind == "weight":
        return a.T if c.transposed else a
    if kind != "classes":
        return a.reshape({"token": c.batch, "class": [-1], "scalar": []}.get(kind, [*c.batch, -1]))
    rows = c.batch if len(a) == c.tokens else [1] * len(c.batch)
    return a.reshape(*rows, *(c.class_shape if len(c.class_shape) > 1 else [-1])).transpose(np.argsort(c.order))


def call(c, lane):
    """((floats), (integers)) of one lane."""
    a = {k: laid_out(c, kind_of(k), x) for k, x in lane.items()} | {k: c.args[k].item() for k in c.plain}
    if "few" in a:
        a["labels"] = sj.SparseLabels(a.pop("few"), a.pop("probs"), a.pop("others", None))
    names = {"dense": "labels"} | ({"logits": "x"} if c.softmax else {})
    a = {names.get(k, k): x for k, x in a.items()}
    a = {"teacher_probs" if k == "labels" and c.teacher else k: x for k, x in a.items()}
    found = getattr(sj, c.name)(**a, **c.static)
    if c.softmax:
        return (found.transpose(c.order).reshape(c.row),), ()
    floats, integers = ((found[0],), found[1][3:]) if "statistics" in c.static else ((found,), ())
    floats, integers = (found[:3], found[3:]) if isinstance(found, sj.LabelStatistics) else (floats, integers)
    return tuple(o.reshape(-1, 1) for o in floats), tuple(o.reshape(-1, 1) for o in integers)


def wrapped(c, f, kind, mesh):
    if kind in ("jit", "checkpoint"):
        return {"jit": jax.jit, "checkpoint": jax.checkpoint}[kind](f)

    def of_lanes(a):
        same = {k: x for k, x in a.items() if k in c.shared}
        own = {k: x for k, x in a.items() if k not in c.shared}
        if kind == "vmap":
            return jax.vmap(lambda own: f({**same, **own}))(own)
        if kind == "scan":
            return lax.scan(lambda _, own: (0, f({**same, **own})), 0, own)[1]
        if kind == "classes":
            split = {k: P(None, "d") if kind_of(k) in ("classes", "class", "weight") else P() for k in a}
            return jax.shard_map(f, mesh=mesh, in_specs=(split,), out_specs=P())(a)

        def here(same, own):
            return jax.tree.map(lambda o: o[None], f({**same, **{k: x[0] for k, x in own.items()}}))

        return jax.shard_map(here, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(same, own)

    return of_lanes


def program(c, mesh):
    """Of (arrays, tangents, cotangents): (the values, the integers, the derivative that the mode asks for)."""
    f = partial(call, c)
    for kind in reversed(c.nest):
        f = wrapped(c, f, kind, mesh)
    sizes = [LANES[kind] for kind in c.nest if kind in LANES]

    def of_all(a):
        a = {k: x[0] if k in c.shared or not sizes else x.reshape(*sizes, *x.shape[1:]) for k, x in a.items()}
        return jax.tree.map(lambda o: o.reshape(c.lanes, *o.shape[len(sizes) :]), f(a))

    def everything(arrays, tangents, cotangents):
        def gradient(diff):
            values, pull_back, integers = jax.vjp(of_floats, diff, has_aux=True)
            seeds = tuple(g.astype(o.dtype) for g, o in zip(cotangents, values, strict=True))
            return pull_back(seeds)[0], (values, integers)

        of_floats = lambda diff: of_all({**arrays, **diff})  # noqa: E731
        diff = {k: arrays[k] for k in c.floats}
        if c.mode == "jvp":
            values, out, integers = jax.jvp(of_floats, (diff,), (tangents,), has_aux=True)
        elif c.mode == "vjp":
            out, (values, integers) = gradient(diff)
        elif c.mode == "hvp":
            _, out, (values, integers) = jax.jvp(gradient, (diff,), (tangents,), has_aux=True)
        else:
            _, pull_again, (values, integers) = jax.vjp(gradient, diff, has_aux=True)
            out = pull_again(tangents)[0]
        return values, integers, dict(enumerate(out)) if c.mode == "jvp" else out

    return jax.jit(everything) if c.jit else everything


# What is compared.


def compare(label, got, want, every=True, skip=False):
    """What is wrong, if anything. What is not finite must be the same if `every`."""
    exact, info = want[0], jnp.finfo(got.dtype)
    off = np.sqrt(np.mean((want[1:] - exact) ** 2, 0))
    own, least = (0, 0) if info.bits >= 32 else (float(info.eps), float(info.smallest_subnormal))
    got = np.asarray(got, np.float64)
    if got.shape != exact.shape:
        return f"{label}: shape {got.shape} for {exact.shape}"
    budget = ROUNDINGS * (off + EPS * np.abs(exact)) + own * np.abs(exact) + FLOOR + 4 * least
    finite, same = np.isfinite(exact), (got == exact) | (np.isnan(got) & np.isnan(exact))
    wrong = np.where(finite, ~(np.abs(got - exact) <= budget) & ~np.isnan(off), every & ~same) & np.logical_not(skip)
    if wrong.any():
        excess = np.where(wrong, np.nan_to_num(np.abs(got - exact) / budget, nan=np.inf), 0)
        i = np.unravel_index(np.argmax(excess), excess.shape)
        told = f"got {got[i]:.9g} for {exact[i]:.9g}, {excess[i]:.3g} x the budget"
        return f"{label}{list(map(int, i))}: {told}; {wrong.sum()} of {wrong.size} wrong"


def tangent(c, key):
    """Of a size that leaves it a probability; none of what is 0 or infinite."""
    a = np.asarray(c.args[key], np.float32)
    size = 0.3 if kind_of(key) == "scalar" else a if key in ("dense", "probs", "others") else 1
    return np.where((a == 0) | ~np.isfinite(a), 0, size * c.rng.normal(size=a.shape)).astype(c.args[key].dtype)


def compare_integers(c, found):
    """correct, rank and prediction; of raw logits, whose comparison is exact, in rows that have a number."""
    arrays = c.args
    z, ids, weights = arrays["logits"].astype(float), arrays["labels"], arrays.get("weights", np.ones((1, 1, 1)))
    z = np.where(arrays.get("where", True), z, -np.inf)
    own = np.take_along_axis(z, np.clip(ids, 0, c.classes - 1), -1)
    largest, best = z.max(-1, keepdims=True), z.argmax(-1)[..., None]
    out = (largest == -np.inf) & ~np.broadcast_to(arrays.get("where", True), z.shape).any(-1, keepdims=True)
    out |= (ids == c.static.get("ignore_index")) | (weights == 0)
    wild = (~(largest < np.inf) | ~np.isfinite(own) | (ids < 0) | (ids >= c.classes)) & ~out
    exact = {"correct": best == ids, "rank": (z > own).sum(-1, keepdims=True), "prediction": best}
    wrong = {k: (np.where(out, 0, a) != got) & ~wild for (k, a), got in zip(exact.items(), found, strict=True)}
    return [f"{label}: {off.sum()} of {off.size} wrong" for label, off in wrong.items() if off.any()]


def check(c, run):
    """What is wrong, a line each."""
    seed = int(c.rng.integers(2**31))
    exact, _, odd = truth(c, seed)
    cotangents = [np.float32(c.rng.normal(size=v.shape[1:])) for v in exact]
    tangents = {k: tangent(c, k) for k in c.floats}
    arrays = {k: a for k, a in c.args.items() if k not in c.plain}
    values, integers, out = jax.device_get(run(*jax.tree.map(jnp.asarray, (arrays, tangents, cotangents))))
    wrong = [compare(f"value {i}", got, want) for i, (got, want) in enumerate(zip(values, exact, strict=True))]
    if integers and not c.linear and not {"logit_scale", "softcap"} & c.args.keys():
        wrong += compare_integers(c, integers)
    if c.mode == "vjp":
        want = truth(c, seed, cotangents)[1]
    else:
        want = differences(c, seed, None if c.mode == "jvp" else cotangents, tangents)
    for key, exact in want.items():
        if c.mode == "jvp":
            skip = odd.any(-2, keepdims=True) & (c.reduction != "none")
        elif kind_of(key) in ("classes", "x", "token"):
            skip = odd
        else:  # NaN of a row that is NaN or infinite
            skip = odd.any() & np.isnan(np.asarray(out[key], float)).any()
        wrong.append(compare(f"d {key}", out[key], exact, False, skip))
    return [w for w in wrong if w]


def described(c):
    args = (f"{k}:{a.dtype}{list(a.shape)}{a.ravel() if k in c.plain else ''}" for k, a in c.args.items())
    how = f"{'/'.join(c.nest) or 'plain'}{' jit' * c.jit} {c.mode}"
    return f"{c.name} {how} | batch {c.batch}, {', '.join(args)} | {c.static}"


def run_program(c, mesh):
    """(how many cases were checked, what is wrong in the last)."""
    run = program(c, mesh)
    for draw in range(1, 1 + (DRAWS if c.jit else 1)):
        try:
            if wrong := check(c, run):
                return draw, wrong
        except Exception as error:
            return draw, [f"{type(error).__name__}: {str(error)[:300]}"]
        c.draw()
    return draw, []


def main():
    parser = argparse.ArgumentParser()
    for name, default in {"cases": 200, "seed": 1, "only": None, "seconds": 10**6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fold", action="store_true", help="the sums as GPUs and TPUs make them")
    asked = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", True)
    np.seterr(all="ignore")
    blocks.PLATFORMS = () if asked.fold else blocks.PLATFORMS
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    counts, start = Counter(cases=0, failed=0), time.time()
    for index in itertools.count() if asked.only is None else [asked.only]:
        if counts["cases"] >= asked.cases or time.time() - start > asked.seconds:
            break
        c = Case([asked.seed, index])
        cases, wrong = run_program(c, mesh)
        counts.update([c.name, "/".join(c.nest) or "plain", c.mode], programs=1, cases=cases, failed=len(wrong) > 0)
        if wrong:
            print(
                f"--seed {asked.seed} --only {index} draw {cases}: {described(c)}", *wrong[:3], sep="\n    ", flush=True
            )
        if index % 400 == 399:
            jax.clear_caches()
    print(dict(counts), f"{time.time() - start:.0f} s, jax {jax.__version__}{' fold' * asked.fold}")


if __name__ == "__main__":
    main()
