"""`python -m benchmarks.device_report FOLDER OUT`: what benchmarks/device_suite.sh left in a folder, as OUT/suite.json.

Exit code 1 when a step failed or a test did.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import commit, describe

__all__ = ["main", "report"]

_MAX_FAILURES = 20  # of one step; the log has them all


def report(folder: Path) -> dict[str, Any]:
    """Outcome, tests and results of every step, with what they ran on."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for step in steps:
        log, junit = folder / f"{step['step']}.log", folder / f"{step['step']}.xml"
        if junit.exists():
            step["tests"] = _tests(junit)
        if log.exists():
            step["results"] = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"bench')]
            step["end_of_log"] = log.read_text()[-1500:] if step["exit_code"] else ""
    return {"benchmark": "device_suite", "machine": describe() | _gpu(), "commit": commit(), "steps": steps}


def main() -> int:
    folder, out = map(Path, sys.argv[1:])
    result = report(folder)
    (out / "suite.json").write_text(json.dumps(result, indent=1) + "\n")
    failed = [step["step"] for step in result["steps"] if step.get("exit_code")]
    print(f"{out / 'suite.json'}: {'all steps passed' if not failed else 'failed: ' + ', '.join(failed)}")
    return 1 if failed else 0


def _tests(junit: Path) -> dict[str, Any]:
    """Counts, and the names of tests that failed."""
    cases = list(ET.parse(junit).getroot().iter("testcase"))
    named = {
        kind: [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    counts = {kind: len(names) for kind, names in named.items()}
    return {"total": len(cases), **counts, "failed": (named["failure"] + named["error"])[:_MAX_FAILURES]}


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"device": None}
    found = torch.cuda.get_device_properties(0)
    cupy = next((f"{d.name} {d.version}" for d in metadata.distributions() if d.name.startswith("cupy-")), None)
    about = {"device": found.name, "capability": f"{found.major}.{found.minor}", "memory_gib": found.total_memory >> 30}
    return about | {"cuda": torch.version.cuda, "cupy": cupy}


if __name__ == "__main__":
    raise SystemExit(main())
