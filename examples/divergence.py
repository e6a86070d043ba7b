"""How exact KL(teacher ‖ student) is when the two nearly agree: at the end of a distillation, in a trust region.

    python examples/divergence.py --out out/divergence.png

Rows of logits and the same rows moved by a distance, in float32; the truth is float64 on the same numbers. A
divergence is of the order distance² / 2, its terms t (log t - log p) are of the order distance and of both signs: added
as they come, they leave their roundings, and a number that may be negative. The k3 estimator (Schulman, "Approximating
KL Divergence", 2020), exp(r) - 1 - r of r = log(p/t), which trainers take of one sampled class a token, loses r itself;
its own spread comes on top, so here stands its expectation over all classes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax import Array

from softmax_jax import kl_divergence

plt.switch_backend("Agg")
DISTANCES = 10.0 ** np.arange(-5, 0.75, 0.25)


def naive(student: Array, teacher: Array) -> Array:
    log_t = jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(log_t) * (log_t - jax.nn.log_softmax(student)), -1)


def of_optax(student: Array, teacher: Array) -> Array:
    return optax.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher))


def k3(student: Array, teacher: Array) -> Array:
    """The mean over classes of exp(r) - 1 - r, r = log(p/t)."""
    log_t = jax.nn.log_softmax(teacher)
    r = jax.nn.log_softmax(student) - log_t
    return jnp.sum(jnp.exp(log_t) * (jnp.exp(r) - 1 - r), -1)


def ours(student: Array, teacher: Array) -> Array:
    return kl_divergence(student, teacher_logits=teacher, reduction="none")


FORMS: dict[str, Callable[[Array, Array], Array]] = {
    "softmax_jax": ours,
    "Σ t (log t - log p)": naive,
    "Optax": of_optax,
    "k3 estimator, expectation": k3,
}
COLOURS = dict(zip(FORMS, ("#1f6fb4", "#999999", "#d98c21", "#2d8a4e"), strict=True))


def truth(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """In float64, by the sum whose terms are all positive."""
    both = np.asarray([student, teacher], np.float64)
    log_p, log_t = both - np.logaddexp.reduce(both, -1, keepdims=True)
    r = log_p - log_t
    near = np.where(np.abs(r) < 1e-2, r, 0)
    of_near = near**2 * (1 / 2 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near / 720))))
    return np.sum(np.exp(log_t) * np.where(near == r, of_near, np.expm1(r) - r), -1)


def errors(rows: int, classes: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By form: the median relative error at each distance, printed as it comes, and how many results are below 0."""
    rng, found, below = np.random.default_rng(0), {name: [] for name in FORMS}, dict.fromkeys(FORMS, 0)
    teacher, noise = (s * rng.normal(size=(rows, classes)).astype(np.float32) for s in (np.float32(3), np.float32(1)))
    jitted = {name: jax.jit(form) for name, form in FORMS.items()}
    for distance in DISTANCES:
        student = teacher + np.float32(distance) * noise
        want = truth(student, teacher)
        for name, form in jitted.items():
            got = np.float64(form(student, teacher))
            found[name].append(np.median(np.abs(got - want) / want))
            below[name] += int(np.sum(got < 0))
        print(f"{distance:8.1e}  " + "  ".join(f"{of_form[-1]:24.1e}" for of_form in found.values()), flush=True)
    return {name: np.array(errors) for name, errors in found.items()}, below


def draw(found: dict[str, np.ndarray], below: dict[str, int], total: int, path: Path) -> None:
    figure, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    for name, of_form in found.items():
        label = f"{name}: {below[name]} of {total} results are negative"
        ax.loglog(DISTANCES, np.maximum(of_form, 1e-8), "o-", markersize=3, color=COLOURS[name], label=label)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.text(DISTANCES[-1], 1.3, "error as large as the divergence", ha="right", fontsize=9)
    ax.set_title("KL(teacher ‖ student) from logits in float32, against float64")
    ax.set_xlabel("distance of the student's logits from the teacher's (standard deviation)")
    ax.set_ylabel("relative error (median of the rows)")
    ax.legend(fontsize=9)
    ax.grid(linewidth=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--classes", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("out/divergence.png"))
    args = parser.parse_args()
    total = args.rows * len(DISTANCES)
    print("relative error of KL, median over rows\ndistance  " + "  ".join(f"{name:>24}" for name in FORMS), flush=True)
    found, below = errors(args.rows, args.classes)
    for name, count in below.items():
        print(f"{name}: {count} of {total} below 0")
    draw(found, below, total, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
