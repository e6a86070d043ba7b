"""The benchmarks on tiny sizes: records, tables, pictures, kept results. No time is judged."""

import json
import re
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import cases, pictures, report, results  # noqa: E402
from benchmarks.costs import GRANULE, overcounted  # noqa: E402
from benchmarks.measure import OURS, Pace, Subject, quartiles_of_ratio, time_in_turns  # noqa: E402
from benchmarks.peers import (  # noqa: E402
    DENSE,
    INTEGER,
    JAX_NN,
    KL,
    LINEAR,
    LOG_SOFTMAX,
    OPTAX,
    SOFTMAX,
    STATISTICS,
    TORCH,
    YARDSTICKS,
)
from benchmarks.subjects import FORWARD, GRADIENT, STEP  # noqa: E402

pytestmark = pytest.mark.compiled


@contextmanager
def as_users_run():
    """Under JAX's own settings, but compiled fast: nothing here runs for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.disable_jit(False):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a quick run of everything left its results: one case of each kind of code path."""
    out = tmp_path_factory.mktemp("benchmarks")
    kinds = {"logits": [(DENSE, FORWARD), (SOFTMAX, GRADIENT)], "step": [("cross_entropy", STEP)]}
    with pytest.MonkeyPatch.context() as patch, jax.debug_nans(False), as_users_run():
        patch.setattr(cases, "KINDS", {**cases.KINDS, **kinds})
        command.main(["--quick", "--only", "bfloat16", "--out", str(out)])
    return out


@pytest.fixture
def quick(folder):
    (path,) = folder.glob("*.jsonl")
    return results.load(path)


@pytest.mark.thorough
def test_every_part_leaves_records(quick):
    assert {record["part"] for record in quick.records} == command.PARTS.keys()
    assert len({results.cell(record) for record in quick.records}) == len(quick.records)
    for record in quick.records:
        assert record["date"] and record["versions"]["jax"] == jax.__version__
        assert all(0 < low <= median <= high for low, median, high in record.get("ratios", {}).values())
    assert all(set(record["ratios"]) & YARDSTICKS for record in quick.of("logits") + quick.of("linear"))
    assert all(record["memory"][OURS] > 0 for record in quick.of("step"))


@pytest.mark.thorough
def test_tables_and_pictures_are_made(folder, quick):
    made = report.tables([quick])
    assert made.keys() == {"cpus", "accuracy"}
    for record in quick.records:
        assert record["what"] in made["cpus"] or str(record["margin"]) in made["accuracy"]
    drawn = list((folder / "pictures").iterdir())
    assert {path.name for path in drawn} == {"times_cpu.png", "errors.png"}
    assert all(np.ptp(matplotlib.image.imread(path)) > 0 for path in drawn)


@pytest.mark.parametrize("page", command.PAGES)
def test_pages_show_the_kept_results(page, tmp_path, monkeypatch):
    """After a new run: `python -m benchmarks tables`."""
    for name in ("draw_ratios", "draw_errors"):
        monkeypatch.setattr(pictures, name, lambda *_: pictures.Figure())
    made, text = command.publish(results.KEPT, tmp_path), (ROOT / page).read_text()
    places = re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- /\1 -->", text, flags=re.DOTALL)
    assert places and all(shown == made[name] for name, shown in places)
    for path in tmp_path.iterdir():
        assert (ROOT / "docs/pictures" / path.name).exists()
    assert all((ROOT / "docs" / shown).exists() for shown in re.findall(r"pictures/\w+\.png", text))


def test_a_cell_that_is_measured_again_replaces_its_own_record(tmp_path):
    def record(cell, ratio):
        return {"what": INTEGER, "passes": FORWARD, "cell": cell, "ratios": {OPTAX: [ratio] * 3}}

    path = tmp_path / results.file_name(results.machine())
    results.save("logits", record("1 x 2", 1), tmp_path)
    results.save("logits", record("3 x 4", 1), tmp_path)
    first, *others = map(json.loads, path.read_text().splitlines())
    old = [{**other, "date": "2001-01-01"} for other in others]
    path.write_text("\n".join(map(json.dumps, [first, *old])))
    results.save("logits", record("3 x 4", 2), tmp_path)
    kept = results.load(path).of("logits")
    assert [(of["cell"], of["ratios"][OPTAX][1]) for of in kept] == [("1 x 2", 1), ("3 x 4", 2)]
    assert kept[0]["date"] == "2001-01-01" != kept[1]["date"]
    assert f"2001-01-01 to {kept[1]['date']}" in report.source(results.load(path), kept)


def test_means_are_over_the_best_peer_of_each_cell():
    def record(optax, jax_nn):
        return {"ratios": {OPTAX: [0, optax, 9], JAX_NN: [0, jax_nn, 9], TORCH: [0, 7, 9]}}

    assert report.mean_and_worst([record(0.5, 0.25), record(1.0, 2.0)], [OPTAX, JAX_NN]) == (1.0, 2.0)
    assert report.mean_and_worst([record(0.5, 0.25)], ["tokamax"]) is None


def test_of_two_cards_the_larger_figures_are_those_of_pytorch():
    def card(device, ratio, worst):
        records = [
            {
                "part": "logits",
                "what": INTEGER,
                "passes": FORWARD,
                "cell": "9 x 99 bfloat16",
                "ratios": {TORCH: [of] * 3},
            }
            for of in (ratio**2 / worst, worst)
        ]
        return results.Results({"device": device, "jax": "0"}, records)

    text = report.by_function([card("NVIDIA H100 80GB HBM3", 0.5, 0.625), card("NVIDIA H200", 0.25, 1.0)])
    assert text.splitlines()[0].split(" | ")[1:3] == ["Optax or `jax.nn`, H100", "Optax or `jax.nn`, H200"]
    assert text.splitlines()[-1] == "| integer labels, forward | - | - | 0.50 (1.00) | - |"


@pytest.mark.parametrize("what", [INTEGER, DENSE, STATISTICS, KL, LOG_SOFTMAX, LINEAR])
def test_peers_compute_the_same(what):
    """Of as many classes as tokamax's chunks have: it counts those that it pads others with."""
    shape = (6, 8, 2048) if what == LINEAR else (6, 2048)
    with as_users_run():
        subjects = cases.subjects_of(cases.Case(what, FORWARD, shape, "float32"))
        found = {name: subject.run() for name, subject in subjects.items() if name not in YARDSTICKS}
    for name, y in found.items():
        for got, wanted in zip(jax.tree.leaves(y), jax.tree.leaves(found[OURS]), strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-5, err_msg=name)


def test_turns_alternate():
    order = []
    subjects = {name: Subject(lambda name=name: order.append(name)) for name in (OURS, OPTAX)}
    seconds = time_in_turns(subjects, Pace(turns=4, shortest=0))
    assert order == [OURS, OPTAX] * 6
    assert [len(numbers) for numbers in seconds.values()] == [4, 4]


def test_ratios_are_taken_turn_by_turn():
    assert quartiles_of_ratio([1.0, 2.0, 30.0], [2.0, 4.0, 60.0]) == [0.5, 0.5, 0.5]
    ratios = quartiles_of_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert ratios == statistics.quantiles([1, 2, 3, 4, 5], n=4, method="inclusive") == [2, 3, 4]


def test_a_gather_of_sparse_cores_reads_what_it_takes():
    """Of a TPU's program, a line as it is written there: 8192 numbers of an array that XLA counts twice as a whole."""
    whole, numbers = "bf16[8192,128256]{1,0:T(8,128)(2,1)}", "bf16[8192]{0:T(1024)(128)(2,1)}"
    start = f"  %gather_offload_async_start.1.update = (({whole}, s32[8192]{{0:T(1024)}}), {numbers}, (s32[25]{{0}}))"
    text = f"{start} custom-call-update(%gather_offload_async_start.1, %a.1, %bitcast.10)\n"
    assert overcounted(text) == 2 * 8192 * 128256 * 2 - 8192 * GRANULE
    assert overcounted(f"  %fusion = {numbers} fusion({whole} %a.1)\n") == 0
