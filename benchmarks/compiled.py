"""Compares what programs cost GPUs and TPUs, on a machine that has neither: `python -m benchmarks compiled`.

It needs the compilers, `pip install -e '.[accelerators]'`, and a process of its own, since JAX reads JAX_PLATFORMS when
it is imported.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import softmax_jax  # noqa: E402
from benchmarks import peers, report, results  # noqa: E402
from benchmarks.costs import DEVICES, Cost, cost  # noqa: E402
from benchmarks.peers import DENSE, INTEGER, KL, LINEAR, LOG_SOFTMAX, SOFTMAX, STATISTICS  # noqa: E402

IN_JAX = peers.functions_in_jax(axis=1)  # which is also the last of [tokens, classes]


def statistics(z, y):
    found = softmax_jax.label_statistics(z, y, axis=1)
    return found.log_prob, found.entropy, found.correct, found.rank


def statistics_in_jax(z, y):
    log_p = jax.nn.log_softmax(z.astype(jnp.float32), 1)
    of_label = jnp.take_along_axis(log_p, jnp.expand_dims(y, 1), 1)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, 1)
    return jnp.squeeze(of_label, 1), entropy, jnp.argmax(z, 1) == y, jnp.sum(log_p > of_label, 1)


def all_options(z, y):
    return softmax_jax.cross_entropy(z, y, axis=1, label_smoothing=0.1, z_loss=1e-4, logit_scale=0.7, softcap=30.0)


def pullback(f: Callable) -> Callable:
    return lambda z, dy: jax.vjp(f, z)[1](dy)


def both(what: str) -> list[Callable]:
    """Our function and its first peer."""
    return list(IN_JAX[what].values())[:2]


IDS, ROWS = "ids", "rows"  # the second operand: integer labels; dense ones, a teacher's logits or a cotangent
ACCURACY = "integer labels, with gradient, accuracy, log-normalizer"
OF_LOGITS: dict[str, tuple[str | None, list[Callable]]] = {
    "integer labels, forward": (IDS, both(INTEGER)),
    "integer labels, with gradient": (IDS, [jax.value_and_grad(f) for f in both(INTEGER)]),
    "dense labels, forward": (ROWS, both(DENSE)),
    "dense labels, with gradient": (ROWS, [jax.value_and_grad(f) for f in both(DENSE)]),
    "all options, with gradient": (IDS, [jax.value_and_grad(all_options)]),
    ACCURACY: (IDS, [jax.value_and_grad(f, has_aux=True) for f in both(STATISTICS)]),
    "log_prob, entropy, correct, rank": (IDS, [statistics, statistics_in_jax]),
    "KL from logits, forward": (ROWS, both(KL)),
    "KL from logits, with gradient": (ROWS, [jax.value_and_grad(f) for f in both(KL)]),
    "log_softmax, forward": (None, both(LOG_SOFTMAX)),
    "log_softmax, gradient": (ROWS, [pullback(f) for f in both(LOG_SOFTMAX)]),
    "softmax, forward": (None, both(SOFTMAX)),
    "softmax, gradient": (ROWS, [pullback(f) for f in both(SOFTMAX)]),
}


def attention(softmax: Callable) -> Callable:
    """softmax as it is used: what is made of it decides its gradient."""

    def loss(q, k, v):
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
        return jnp.sum(jnp.tanh(jnp.einsum("bqk,bkd->bqd", softmax(scores), v)).astype(jnp.float32))

    return jax.value_and_grad(loss, (0, 1, 2))


class Case(NamedTuple):
    table: str
    device: str
    shape: tuple[int, ...]
    dtype: str
    what: str

    @property
    def size(self) -> str:
        return f"{' x '.join(map(str, self.shape))} {self.dtype}{', axis 1' if len(self.shape) == 4 else ''}"

    def __str__(self) -> str:
        return f"{self.table}, {self.device}, {self.size}, {self.what}"


SIZES = {
    "moved": [((8192, 128256), "bfloat16")],
    "sizes": [
        ((4096, 32000), "float32"),
        ((65536, 1000), "float32"),
        ((8, 150, 256, 256), "bfloat16"),
        ((262144, 16), "float32"),
    ],
    "attention": [((128, 1024, 64), "bfloat16"), ((128, 1024, 64), "float32")],  # heads of all examples, tokens, embed
    "heads": [
        ((tokens, embed, classes), "bfloat16")
        for classes in (32000, 128256)
        for embed in (1024, 4096)
        for tokens in (1024, 4096, 8192, 65536)
    ],
}
HEADS = "tokens x width x classes"
SHOWN = {"moved": DEVICES, "sizes": ["H200", "TPU v6e"], "attention": DEVICES, "heads": ["H200", "H100"]}


def cases(devices: dict[str, list[str]]) -> list[Case]:
    return [
        Case(table, device, shape, dtype, what)
        for table, sizes in SIZES.items()
        for device in devices[table]
        for shape, dtype in sizes
        for what in (OF_LOGITS if table in ("moved", "sizes") else [table])
    ]


def costs(case: Case) -> list[Cost]:
    """Our cost, then the peers'. The unit is the logits or the scores of attention, for a head 1 MiB."""
    tokens, itemsize, array = case.shape[0], jnp.dtype(case.dtype).itemsize, jax.ShapeDtypeStruct
    if case.table == "heads":
        _, embed, classes = case.shape
        x, weight = array((tokens, embed), case.dtype), array((embed, classes), case.dtype)
        operands, losses = [x, weight, array((tokens,), jnp.int32)], [*both(LINEAR), peers.optax_of_float32]
        return [cost(case.device, jax.value_and_grad(f, (0, 1)), operands, 2**20) for f in losses]
    logits, ids = array(case.shape, case.dtype), array((tokens, *case.shape[2:]), jnp.int32)
    if case.table == "attention":
        unit = tokens * case.shape[1] ** 2 * itemsize
        return [cost(case.device, attention(f), [logits] * 3, unit) for f in (softmax_jax.softmax, jax.nn.softmax)]
    second, functions = OF_LOGITS[case.what]
    operands = [logits, *{IDS: [ids], ROWS: [logits], None: []}[second]]
    return [cost(case.device, f, operands, math.prod(case.shape) * itemsize) for f in functions]


# The tables of docs/performance_notes.md.


def joined(found: list[Cost], quantity: str, form: str) -> str:
    """Shows our cost / that of each peer."""
    texts = [format(getattr(of, quantity), form) for of in found]
    return " / ".join(texts if len(texts) > 1 else [*texts, report.NONE])


def tables(found: dict[Case, list[Cost]]) -> dict[str, str]:
    entries: dict[str, dict[tuple[str, str], str]] = {table: {} for table in SIZES}
    for case, of in found.items():
        table, moved = entries[case.table], joined(of, "moved", ".1f")
        if case.table == "moved":
            table[case.what, case.device] = moved
        elif case.table == "sizes":
            table[case.what, f"{case.device}, {case.size}"] = moved
        elif case.table == "attention":
            table[f"{case.dtype}, bytes moved", case.device] = moved
            table[f"{case.dtype}, temporary memory", case.device] = joined(of, "temporary", ".1f")
        else:
            head = " x ".join(map(str, case.shape))
            table[head, f"{case.device}, MiB"] = joined(of, "temporary", ".0f")
            table[head, f"{case.device}, ms"] = joined(of, "milliseconds", ".3g")
    return {name: report.pivot(of, HEADS if name == "heads" else "") for name, of in entries.items()}


def main(only: str) -> None:
    """Writes all tables, or prints as JSON the costs of the cases whose names contain a text, on any device."""
    if only:
        chosen = [case for case in cases(dict.fromkeys(SIZES, DEVICES)) if only in str(case)]
        return json.dump({str(case): costs(case) for case in chosen}, sys.stdout)
    for name, text in tables({case: costs(case) for case in cases(SHOWN)}).items():
        print(text, end="\n\n")
        report.include(results.ROOT / "docs/performance_notes.md", name, text)


if __name__ == "__main__":
    main(*sys.argv[1:])
