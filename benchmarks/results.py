"""Results as JSON, one file a device and JAX version: each part with its own date, versions and records."""

import json
import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from benchmarks.peers import absent

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"
PACKAGES = ("softmax_jax", "jax", "jaxlib", "optax", "torch", "tokamax", "liger-kernel", "quack-kernels", "numpy")

Results = dict[str, Any]
Key = tuple[str, str, str, str]


def empty(quick: bool) -> Results:
    return {"quick": quick, "machine": machine(), "jax": version("jax"), "parts": {}}


def part_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Records with what one must know to read them; the load is that of the machine, beside or before this run."""
    return {
        "date": date.today().isoformat(),
        "versions": versions(),
        "absent": dict(absent),
        "load": round(os.getloadavg()[0], 1),
        "records": records,
    }


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def file_name(results: Results) -> str:
    machine = results["machine"]
    device = machine["processor" if machine["platform"] == "cpu" else "device"] or "cpu"
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{results['jax']}.json"


def load(path: Path) -> Results:
    return json.loads(path.read_text())


def merge(fresh: Results, path: Path, whole: bool = True) -> Results:
    """`fresh`, with the parts of the file at `path` that it lacks; written there. Unless a part is `whole`, with its
    other records too, each of which says from when it is."""
    kept = load(path) if path.exists() else fresh
    if kept["quick"] != fresh["quick"]:
        raise ValueError(f"{path} has quick={kept['quick']}, and this run quick={fresh['quick']}. Use another --out.")
    parts = {name: part if whole else _beside(part, kept["parts"].get(name)) for name, part in fresh["parts"].items()}
    merged = {**fresh, "parts": {**kept["parts"], **parts}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(merged, 4) + "\n")
    return merged


def lines(value: Any, depth: int) -> str:
    """JSON whose outermost `depth` levels have an entry a line: of results, 4 for one record a line."""
    if not depth or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, list):
        inner, ends = [lines(entry, depth - 1) for entry in value], "[]"
    else:
        inner, ends = [f"{json.dumps(name)}: {lines(entry, depth - 1)}" for name, entry in value.items()], "{}"
    return "\n".join([ends[0], ",\n".join(inner), ends[1]])


def _beside(fresh: dict[str, Any], kept: dict[str, Any] | None) -> dict[str, Any]:
    """A part with the kept records in their order, those that `fresh` has replaced by its own."""
    of_cell = lambda record: (record["what"], record["passes"], record["cell"])  # noqa: E731
    anew = {of_cell(record): record for record in fresh["records"]}
    old = [{"date": kept["date"], **record} for record in kept["records"]] if kept else []
    return {**fresh, "records": [anew.pop(of_cell(record), record) for record in old] + list(anew.values())}


def records(results: Results, part: str) -> list[dict[str, Any]]:
    return results["parts"].get(part, {}).get("records", [])


def key(part: str, record: dict[str, Any]) -> Key:
    return part, record["what"], record["passes"], record["cell"]
