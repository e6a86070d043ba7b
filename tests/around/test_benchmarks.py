"""Every part of the benchmarks on tiny sizes: records, tables, pictures, kept results, the guard. No time is judged."""

import copy
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import check, grid, results, show  # noqa: E402
from benchmarks.aims import aims  # noqa: E402
from benchmarks.kernels import GRANULE, overcounted  # noqa: E402
from benchmarks.measure import OURS, Pace, Subject, in_turns, ratios  # noqa: E402
from benchmarks.peers import DENSE, INTEGER, LINEAR, LOG_SOFTMAX, OPTAX, SOFTMAX, jax_peers, torch_peers  # noqa: E402
from benchmarks.subjects import FORWARD, GRADIENT, of_jax, of_torch  # noqa: E402

pytestmark = pytest.mark.compiled


def some_of(part, chosen):
    return SimpleNamespace(cells=lambda quick: [c for c in part.cells(quick) if chosen(c)], record=part.record)


def kept_short(patch):
    """One cell of each kind of code path, so that few programs are compiled."""
    kinds = (DENSE, FORWARD), (SOFTMAX, GRADIENT)
    narrow = {
        "accuracy": lambda c: c.dtype == "float32",
        "memory": lambda c: c.dtype == "bfloat16" and getattr(c, "what", SOFTMAX) == SOFTMAX,
        "logits": lambda c: c.dtype == "bfloat16" and (c.what, c.passes) in kinds,
        "linear": lambda c: c.dtype == "bfloat16",
        "step": lambda c: c.dtype == "bfloat16" and c.what == "cross_entropy",
        "growth": lambda c: True,
    }
    assert narrow.keys() == command.PARTS.keys()
    patch.setattr(command, "PARTS", {name: some_of(command.PARTS[name], f) for name, f in narrow.items()})
    patch.setattr(grid, "QUICK_GROWTH", {"cross_entropy, tokens": ((8, 0, 10), (80, 0, 10))})


@contextmanager
def compiled_fast():
    """Nothing here runs for long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a quick run of everything left its results."""
    out = tmp_path_factory.mktemp("benchmarks")
    with pytest.MonkeyPatch.context() as patch, jax.disable_jit(False), jax.debug_nans(False), compiled_fast():
        kept_short(patch)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            command.main(["--quick", "--out", str(out)])
    return out


@pytest.fixture
def quick(folder):
    (path,) = folder.glob("*.json")
    return results.load(path)


def with_ratio(found, ratio):
    """The same results with another time over Optax's in the first cell."""
    changed = copy.deepcopy(found)
    changed["parts"]["linear"]["records"][0]["ratios"][OPTAX] = [ratio, ratio, ratio]
    return changed


@pytest.mark.thorough
def test_every_part_leaves_records(quick):
    assert quick["quick"]
    assert quick["parts"].keys() == command.PARTS.keys()
    assert {"device", "processor", "cores"} <= quick["machine"].keys()
    for part, run in quick["parts"].items():
        assert run["date"] and run["versions"]["jax"]
        assert run["records"]
        keys = [results.key(part, record) for record in run["records"]]
        assert len(set(keys)) == len(keys)


@pytest.mark.thorough
def test_ratios_are_ordered_and_positive(quick):
    for run in quick["parts"].values():
        for record in run["records"]:
            for spread in [*record.get("ratios", {}).values(), *([record["limit"]] if "limit" in record else [])]:
                assert 0 < spread[0] <= spread[1] <= spread[2]


@pytest.mark.thorough
def test_tables_and_pictures_are_made(folder, quick):
    page = (folder / "benchmarks.md").read_text()
    for part in command.PARTS:
        assert f"### {part}" in page
    assert "QUICK" in page
    for name in ("logits", "linear", "growth", "accuracy"):
        path = folder / "pictures" / f"{name}-cpu.png"
        assert f"](pictures/{path.name})" in page
        assert np.ptp(matplotlib.image.imread(path)) > 0
    assert OPTAX in show.means(quick)


@pytest.mark.thorough
def test_a_part_replaces_its_own_records_only(folder, quick, tmp_path):
    path = tmp_path / "kept.json"
    results.merge(quick, path)
    fresh = {**quick, "parts": {"linear": {**quick["parts"]["linear"], "records": []}}}
    merged = results.merge(fresh, path)
    assert merged == json.loads(path.read_text())
    assert merged["parts"]["linear"]["records"] == []
    assert merged["parts"]["logits"] == quick["parts"]["logits"]


def test_kept_results_have_a_record_a_line():
    for path in results.KEPT.glob("*.json"):
        kept, written = results.load(path), path.read_text()
        assert written == results.lines(kept, 4) + "\n"
        for run in kept["parts"].values():
            assert {json.dumps(record) for record in run["records"]} <= set(re.split(",?\n", written))


@pytest.mark.thorough
def test_a_part_of_a_part_replaces_its_own_cells_only(quick, tmp_path):
    path = tmp_path / "kept.json"
    old = copy.deepcopy(quick)
    old["parts"]["linear"]["date"] = "2001-01-01"
    results.merge(old, path)
    first, *others = quick["parts"]["linear"]["records"]
    again = {**first, "ratios": {OPTAX: [1, 1, 1]}}
    fresh = {**quick, "parts": {"linear": {**quick["parts"]["linear"], "records": [again]}}}
    for _ in range(2):
        found = results.merge(fresh, path, whole=False)["parts"]["linear"]
        assert found["records"] == [again, *({"date": "2001-01-01", **record} for record in others)]
        assert found["date"] == quick["parts"]["linear"]["date"]
    if others:
        assert f"{len(others)} cells are from 2001-01-01" in show.source(results.load(path), "linear")


@pytest.mark.thorough
def test_quick_results_are_never_written_over_kept_ones(quick, tmp_path):
    path = tmp_path / "kept.json"
    results.merge({**quick, "quick": False}, path)
    before = path.read_text()
    with pytest.raises(ValueError, match="Use another --out"):
        results.merge(quick, path)
    assert path.read_text() == before


@pytest.mark.parametrize("what", [INTEGER, DENSE, LOG_SOFTMAX, LINEAR])
def test_peers_compute_the_same(what, rng):
    """Of as many classes as tokamax's chunks have: it counts those that it pads others with."""
    classes = 2048
    x, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 8), (8, classes)))
    ids, dense = jnp.asarray(rng.integers(0, classes, 6), jnp.int32), jax.nn.softmax(x @ weight)
    leaves = [x, weight] if what == LINEAR else [x @ weight]
    rest = {DENSE: [dense], LOG_SOFTMAX: []}.get(what, [ids])
    found = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), compiled_fast():
        for name, peer in jax_peers(what).items():
            found[name] = of_jax(peer, leaves, rest, FORWARD, None).run()
        rows = [x, weight.T + 0] if what == LINEAR else leaves
        for name, peer in torch_peers(what).items():
            found[name] = of_torch(peer, rows, rest, FORWARD, None).run()
    for name, y in found.items():
        np.testing.assert_allclose(np.asarray(y), np.asarray(found[OURS]), rtol=1e-5, err_msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize(("ratio", "fell"), [(1.14, False), (0.5, False), (1.16, True)])
def test_guard(quick, tmp_path, capsys, ratio, fell):
    for name, number in (("kept", 1.0), ("fresh", ratio)):
        (tmp_path / f"{name}.json").write_text(json.dumps(with_ratio(quick, number)))
    assert check.main([str(tmp_path / "fresh.json"), str(tmp_path / "kept.json")]) == fell
    assert ("1.00 -> 1.16" in capsys.readouterr().out) == fell


@pytest.mark.thorough
def test_aims_are_met_or_missed(quick):
    def verdict(ratio):
        (aim,) = [aim for aim in aims(with_ratio(quick, ratio)) if aim.text.startswith("linear, of optax")]
        return aim.met

    assert verdict(0.95)
    assert not verdict(0.96)


def test_readme_has_a_place_for_the_table(tmp_path):
    copied = tmp_path / "README.md"
    copied.write_text((ROOT / "README.md").read_text())
    show.include(copied, "gpu", "| a table |")
    assert "<!-- gpu -->\n| a table |\n<!-- /gpu -->" in copied.read_text()


def test_turns_alternate():
    order = []
    subjects = {name: Subject(lambda name=name: order.append(name)) for name in (OURS, OPTAX)}
    seconds = in_turns(subjects, Pace(turns=4, shortest=0))
    assert order == [OURS, OPTAX] * 6
    assert [len(numbers) for numbers in seconds.values()] == [4, 4]


def test_ratios_are_taken_turn_by_turn():
    assert ratios([1.0, 2.0, 30.0], [2.0, 4.0, 60.0]) == [0.5, 0.5, 0.5]


def test_a_gather_of_sparse_cores_reads_what_it_takes():
    """Of a TPU's program, a line as it is written there: 8192 numbers of an array that XLA counts twice as a whole."""
    whole, numbers = "bf16[8192,128256]{1,0:T(8,128)(2,1)}", "bf16[8192]{0:T(1024)(128)(2,1)}"
    start = f"  %gather_offload_async_start.1.update = (({whole}, s32[8192]{{0:T(1024)}}), {numbers}, (s32[25]{{0}}))"
    text = f"{start} custom-call-update(%gather_offload_async_start.1, %a.1, %bitcast.10)\n"
    assert overcounted(text) == 2 * 8192 * 128256 * 2 - 8192 * GRANULE
    assert overcounted(f"  %fusion = {numbers} fusion({whole} %a.1)\n") == 0
