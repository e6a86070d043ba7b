"""The benchmarks on tiny sizes: records, tables, pictures, kept results. No time is judged."""

import json
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
    page = (folder / "benchmarks.md").read_text()
    for part in command.PARTS:
        assert f"### {part}" in page
    for record in quick.records:
        assert record["cell"] in page or record["part"] == "accuracy"
    for name in ("logits", "linear"):
        (path,) = folder.glob(f"pictures/{name}-*.png")
        assert f"](pictures/{path.name})" in page
        assert np.ptp(matplotlib.image.imread(path)) > 0


def test_pages_show_the_kept_results(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw_ratios", lambda chosen: pictures.Figure())
    summaries = command.publish(results.KEPT, tmp_path)
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs/benchmarks.md").read_text()
    for path in (tmp_path / "pictures").iterdir():
        assert (ROOT / "docs" / "pictures" / path.name).exists()
    assert f"<!-- accuracy -->\n{summaries['accuracy']}\n<!-- /accuracy -->" in (ROOT / "README.md").read_text()


def test_readme_shows_the_times_of_both_cards():
    """Those that this version still has: softmax and log_softmax were rewritten since. A failure shows the table."""
    header = ["our time over that of", "Optax or `jax.nn`, H100", "the same, H200", "PyTorch", "`torch.compile`"]
    kinds = [*((what, passes) for what in (INTEGER, DENSE) for passes in (FORWARD, GRADIENT))]
    kinds += [(STATISTICS, GRADIENT), (LINEAR, GRADIENT)]
    rows = [[", ".join(kind), *times_of_cards(*kind, [OPTAX, JAX_NN], [TORCH], ["torch.compile"])] for kind in kinds]
    float32 = times_of_cards(LINEAR, GRADIENT, ["Optax, float32 logits"], [], [])
    rows.append(["linear, forward + gradient, Optax on float32 logits", *float32])
    assert report.table(header, rows) in (ROOT / "README.md").read_text()


def times_of_cards(what, passes, best, *others):
    """Of the best of these peers on each card: the mean and the worst cell. Of each other peer: the larger of the two
    cards' figures."""
    found = [
        [report.best_ratios([record for record in card if record["passes"] == passes], names) for card in cards(what)]
        for names in (best, *others)
    ]
    told = [[(statistics.geometric_mean(ratios), max(ratios)) for ratios in of if ratios] for of in found]
    chosen = [*told[0], *(tuple(map(max, zip(*of, strict=True))) for of in told[1:])]
    return [f"{of[0]:.2f} ({of[1]:.2f})" if of else report.NONE for of in chosen]


def cards(what):
    for name in ("h100-80gb-hbm3", "h200"):
        kept = results.load(results.KEPT / f"nvidia-{name}-0.11.2.jsonl").records
        yield [record for record in kept if record["what"] == what]


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
    assert "1 cells are from 2001-01-01" in report.source(kept)


def test_means_are_over_the_best_peer_of_each_cell():
    def record(optax, jax_nn, peer):
        ratios = {OPTAX: [0, optax, 9], "jax.nn": [0, jax_nn, 9], "PyTorch": [0, peer, 9]}
        return {"part": "logits", "what": INTEGER, "passes": FORWARD, "cell": "", "ratios": ratios}

    found = report.means(results.Results({}, [record(0.5, 0.25, 2.0), record(1.0, 2.0, 0.5)]))
    assert found.splitlines()[-1] == "| integer labels, forward | 1.00 (2.00) | 1.00 (2.00) |"


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
