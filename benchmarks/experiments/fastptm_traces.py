"""FastPTM, Fig. 5 to 7: policies for instances on the published traces. `vbert bench fastptm_traces --traces DIR`

Every trace with 1, 2 and 3 instances through all policies, in virtual time, with the costs of the paper's constants: 16
items of 6.25 ms a request, 150 ms to load the weights of another kind, late after 3 s. Beside them what the authors
logged, and their baseline of full loading: a queue for each instance in turn, 1.7 s a load, which is their logged mean.
For every metric the best of our policies is named; published policies are `round-robin` (their FCFS) and `omls`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.machine import Neighbours, commit, describe
from benchmarks.plots import Panel, draw, plot_flag
from benchmarks.report import output_flags, publish
from runtime.arrivals import gaps_log
from runtime.policies.instance_simulator import Done, simulate_instances
from runtime.policies.instances import INSTANCE_POLICIES, Job, instance_policy
from vbert.errors import ConfigError

__all__ = ["main", "panels"]

DEADLINE_S, ITEMS, ITEM_S, LOAD_S, FULL_LOAD_S = 3.0, 16, 0.1 / 16, 0.15, 1.7
_NAME = re.compile(r"(?P<set>g\d)_.*_T(?P<requests>\d+)_L(?P<kinds>\d+)_M(?P<gap>[\d.]+)\.json$")

# What the authors' logs say of a 3090: (trace, instances) -> OMLS and FCFS, each total seconds, overtimes, switches.
LOGGED: Mapping[tuple[str, int], tuple[tuple[float, int, int], tuple[float, int, int]]] = {
    ("M0.05 T240 L12", 1): ((47.8, 238, 237), (46.9, 240, 223)),
    ("M0.05 T240 L12", 2): ((26.2, 209, 232), (27.7, 240, 221)),
    ("M0.05 T240 L12", 3): ((12.3, 4, 126), (20.5, 240, 211)),
    ("M0.05 T480 L12", 1): ((93.4, 479, 478), (91.2, 480, 435)),
    ("M0.05 T480 L12", 2): ((50.1, 425, 467), (50.0, 480, 429)),
    ("M0.05 T480 L12", 3): ((24.5, 2, 274), (37.9, 480, 432)),
    ("M0.05 T240 L6", 1): ((46.3, 239, 237), (42.4, 240, 199)),
    ("M0.05 T240 L6", 2): ((12.6, 1, 80), (24.7, 240, 197)),
    ("M0.05 T240 L6", 3): ((12.4, 3, 106), (19.7, 240, 201)),
    ("M0.08 T240 L12", 1): ((47.3, 237, 237), (45.9, 240, 218)),
    ("M0.08 T240 L12", 2): ((26.0, 147, 229), (27.5, 240, 224)),
    ("M0.08 T240 L12", 3): ((19.3, 1, 184), (20.6, 98, 215)),
    ("M0.10 T240 L12", 1): ((47.4, 230, 239), (45.9, 240, 212)),
    ("M0.10 T240 L12", 2): ((23.7, 1, 176), (27.2, 240, 218)),
    ("M0.10 T240 L12", 3): ((23.6, 1, 173), (23.6, 54, 212)),
    ("M0.10 T480 L12", 1): ((92.2, 476, 479), (89.5, 480, 435)),
    ("M0.10 T480 L12", 2): ((48.3, 0, 363), (50.6, 216, 434)),
    ("M0.10 T480 L12", 3): ((48.3, 0, 341), (48.3, 31, 433)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="vbert bench fastptm_traces", description=__doc__)
    output_flags(parser)
    plot_flag(parser)
    parser.add_argument("--traces", type=Path, required=True, help="folder of the published JSON files", metavar="DIR")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args(argv)
    found = [(path, match) for path in sorted(args.traces.glob("*.json")) if (match := _NAME.search(path.name))]
    if not found:
        raise ConfigError(f"{args.traces} has no trace named ..._T240_L12_M0.10.json; give the published folder")
    neighbours = Neighbours()
    rows = [row for path, match in found for row in _trace(path, match, args.instances)]
    result = {
        "benchmark": "fastptm_traces",
        "machine": describe() | neighbours.report(),
        "commit": commit(),
        "config": {"traces": len(found), "item_s": ITEM_S, "load_s": LOAD_S, "full_load_s": FULL_LOAD_S},
        "rows": rows,
    }
    publish(result, args)
    if args.plot is not None:
        draw(args.plot, panels(rows))


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Fig. 5 to 7: the means over all traces, of systems that ran them all."""
    systems = [name for name in dict.fromkeys(row["system"] for row in rows) if not name.endswith("logged")]
    counts = sorted({row["instances"] for row in rows})
    found = []
    for metric, scale in (("total_s", "log"), ("overtimes", "linear"), ("switches", "linear")):
        series = {
            name: {
                count: fmean(row[metric] for row in rows if (row["system"], row["instances"]) == (name, count))
                for count in counts
            }
            for name in systems
        }
        title = f"{metric.removesuffix('_s')}, mean of all traces"
        found.append(Panel(title=title, x="instances", y=metric.replace("_", ", "), series=series, scale=scale))
    return found


def _trace(path: Path, match: re.Match[str], instances: Sequence[int]) -> Iterator[dict[str, Any]]:
    requests = gaps_log(path, tokens=1, inputs=ITEMS, deadline_s=DEADLINE_S)
    jobs = [Job(i, request.tenant, request.at_s, ITEMS) for i, request in enumerate(requests)]
    name = f"M{match['gap']} T{match['requests']} L{match['kinds']}"
    for count in instances:
        case = {"set": match["set"], "trace": name, "instances": count}
        logged = LOGGED.get((name, count)) if match["set"] in ("g2", "g3", "g4") else None
        for policy, numbers in zip(("omls", "round-robin"), logged or (), strict=False):
            told = dict(zip(("total_s", "overtimes", "switches"), numbers, strict=True))
            yield case | {"system": f"{policy}, logged"} | told
        for policy in INSTANCE_POLICIES:
            yield case | {"system": policy} | _judged(_run(jobs, policy, count, LOAD_S))
        yield case | {"system": "round-robin, full loading"} | _judged(_run(jobs, "round-robin", count, FULL_LOAD_S))


def _run(jobs: Sequence[Job], name: str, instances: int, load_s: float) -> list[Done]:
    policy = instance_policy(name, deadline_s=DEADLINE_S, item_s=ITEM_S, load_s=load_s)
    return simulate_instances(
        jobs, policy, instances, load_s=lambda _: load_s, service_s=lambda together: ITEM_S * ITEMS * len(together)
    )


def _judged(done: Sequence[Done]) -> dict[str, Any]:
    """overtimes: queued for longer than the deadline, as the authors count; late: answered after it."""
    latency_s = sorted(each.end_s - each.job.arrived_s for each in done)
    return {
        "total_s": round(max(each.end_s for each in done), 2),
        "overtimes": sum(each.queued_s > DEADLINE_S for each in done),
        "late": sum(seconds > DEADLINE_S for seconds in latency_s),
        "switches": sum(each.switched for each in done),
        "mean_s": round(sum(latency_s) / len(latency_s), 3),
        "p99_s": round(latency_s[int(0.99 * (len(latency_s) - 1))], 3),
    }


if __name__ == "__main__":
    main()
