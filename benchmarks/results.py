"""Results are kept in one file for each device and JAX version: a JSON line for the machine, then one for each cell.

A cell's record says its part, and when and with which versions it was measured.
"""

import json
import os
import platform
import re
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"
PACKAGES = ("softmax_jax", "jax", "jaxlib", "optax", "torch", "tokamax", "numpy")

Record = dict[str, Any]


class Results(NamedTuple):
    machine: dict[str, Any]
    records: list[Record]

    def of(self, part: str) -> list[Record]:
        return [record for record in self.records if record["part"] == part]


def load(path: Path) -> Results:
    machine, *records = map(json.loads, path.read_text().splitlines())
    return Results(machine, records)


def save(part: str, measured: Record, folder: Path) -> None:
    """Writes a record into the file of this process's device, in the place of an older one of the same cell."""
    here = machine()
    path = folder / file_name(here)
    records = {cell(record): record for record in (load(path).records if path.exists() else [])}
    fresh = {"part": part, **measured, **provenance()}
    records[cell(fresh)] = fresh
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in (here, *records.values())))


def cell(record: Record) -> tuple[str, ...]:
    return tuple(record[name] for name in ("part", "what", "passes", "cell"))


def provenance() -> Record:
    """When and with what a record is measured. The load is that of the machine, beside or before this run."""
    versions = {package: version(package) for package in PACKAGES if find_spec(package)}
    return {"date": date.today().isoformat(), "load": round(os.getloadavg()[0], 1), "versions": versions}


def machine() -> dict[str, Any]:
    device, cpus = jax.devices()[0], Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpus.read_text()) if cpus.exists() else None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "processor": name[1] if name else platform.processor(),
        "cores": os.cpu_count(),
        "jax": version("jax"),
    }


def file_name(machine: dict[str, Any]) -> str:
    device = machine["processor" if machine["platform"] == "cpu" else "device"] or "cpu"
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{machine['jax']}.jsonl"
