"""`vbert simulate`: requests, recorded or made up, through policies in virtual time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.output import Wrong, add_json_flag, show

if TYPE_CHECKING:
    from runtime.cost import CostModel
    from runtime.pace import Pace
    from runtime.policies.named import Instances
    from runtime.request_log import Offered
    from runtime.simulator import Simulated, World

__all__ = ["add_flags", "run"]


_COLUMNS = (
    "policy",
    "p50_ms",
    "p95_ms",
    "p99_ms",
    "mean_ms",
    "weighted_turnaround",
    "late",
    "goodput",
    "jain",
    "loads",
)
_MIB = 2**20


def add_flags(parser: argparse.ArgumentParser) -> None:
    from runtime.arrivals import ARRIVALS, POPULARITY
    from runtime.policies.named import DEFAULT, POLICIES, POOLED

    parser.add_argument(
        "--trace", default="poisson", metavar="FILE|NAME",
        help=f"a request log of `vbert serve --record`, a list of [kind, gap], or made up: {', '.join(ARRIVALS)}",
    )  # fmt: skip
    parser.add_argument(
        "--policy",
        default=DEFAULT,
        metavar="A,B,...",
        help=f"which to compare: all, or some of {', '.join((*POLICIES, *POOLED))}",
    )
    costs = parser.add_argument_group("what a batch takes: a profile, or a line")
    costs.add_argument("--profile", type=Path, metavar="FILE", help="of `vbert profile`, of any machine")
    costs.add_argument("--tokens-per-s", type=float, metavar="N", help="of full batches, without --batch-ms")
    costs.add_argument("--batch-ms", type=float, default=2.0, help="of a batch, however small, with --tokens-per-s")
    costs.add_argument("--module", metavar="KIND/SIZE", help="that every tenant has, of those a profile knows")
    costs.add_argument("--around-ms", type=float, default=0.0, help="of a request, besides its batch")
    made = parser.add_argument_group("made-up requests")
    made.add_argument("--requests", type=int, default=10_000, metavar="N")
    rate = made.add_mutually_exclusive_group()
    rate.add_argument("--rate", type=float, metavar="N", help="requests a second")
    rate.add_argument("--load", type=float, default=0.7, help="as a part of what full batches are enough for")
    made.add_argument("--tenants", type=int, default=100, metavar="N")
    made.add_argument("--popularity", choices=POPULARITY, default="zipf")
    made.add_argument("--mean-tokens", type=float, default=32.0, metavar="N", help="of log-normal lengths")
    made.add_argument("--inputs", type=int, default=1, metavar="N", help="of each request of a list of [kind, gap]")
    made.add_argument("--deadline-ms", type=float, help="that each request allows")
    made.add_argument("--batch-part", type=float, default=0.0, help="of the requests that have priority batch")
    made.add_argument("--seed", type=int, default=0)
    server = parser.add_argument_group("the server")
    server.add_argument("--max-batch-tokens", type=int, default=4096, metavar="N")
    server.add_argument("--max-queue-inputs", type=int, default=4096, metavar="N")
    server.add_argument("--tenant-weights", nargs="*", default=[], metavar="PATTERN=NUMBER")
    server.add_argument("--module-bytes", type=int, default=0, metavar="N", help="of each tenant; 0: all are in memory")
    server.add_argument("--module-budget-bytes", type=int, default=1024 * _MIB, metavar="N")
    server.add_argument("--queue-all", action="store_true", help="refuse nobody, however much waits")
    instances = parser.add_argument_group("instances that hold the whole weights of one tenant at a time")
    instances.add_argument("--instances", type=int, default=0, metavar="N", help="with policies of their own: see docs")
    instances.add_argument(
        "--switch-ms", type=float, help="to load another tenant's weights; without it as a profile says, or 150"
    )
    instances.add_argument("--item-ms", type=float, help="that an input takes; without it as a profile says, or 8")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies, .png, .svg or .pdf (matplotlib)")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> None:
    from runtime.simulation_report import report
    from training.progress import progress_bar

    cost = _cost(args)
    world = _world(args, cost)
    requests, measured, pace = _requests(args, world)
    world = replace(world, pace=pace)
    ways = _ways(args, cost, world)
    rows, latencies, mean = [], {}, pace.mean
    with progress_bar() as progress:
        for name, way in ways.items():
            done = way(requests, advance=partial(_advance, progress, name, len(requests)))
            row = report(requests, done, lambda tokens: mean.seconds(world.batch_s(tokens, 1, 1), 0.0), world.weight)
            rows.append({"policy": name} | row | _beside(row, measured))
            latencies[name] = _latencies_ms(requests, done)
    if args.plot:
        _plot(args.plot, latencies)
    if args.json:
        facts = {
            "requests": len(requests),
            "tokens_per_s": round(world.tokens_per_s, 1),
            "pace": {"slope": round(pace.slope, 4), "fixed_ms": round(1e3 * pace.fixed_s, 4)},
        }
        print(json.dumps(facts | {"policies": rows}))
    else:
        show(rows, columns=[*_COLUMNS, *(["measured_mean_ms", "to_measured"] if measured else [])])


def _ways(args: argparse.Namespace, cost: CostModel, world: World) -> dict[str, Callable[..., Simulated]]:
    """How requests are simulated, by the name of a policy; with --instances of those for instances."""
    from runtime.policies.instance_simulator import simulate_on_instances
    from runtime.policies.instances import INSTANCE_POLICIES, instance_policy
    from runtime.policies.named import POLICIES, POOLED, batch_policy
    from runtime.simulator import simulate

    every = list(INSTANCE_POLICIES) if args.instances else [*POLICIES, *POOLED]
    names = every if args.policy == "all" else args.policy.split(",")
    if not args.instances:
        if not args.module_bytes and (wrong := [name for name in names if name in INSTANCE_POLICIES]):
            raise Wrong(f"the policy {wrong[0]!r} is for instances; give --instances N, or --module-bytes")
        told = _instances(args, cost)
        policies = {
            name: batch_policy(name, cost, max_batch_tokens=args.max_batch_tokens, instances=told) for name in names
        }
        return {name: partial(simulate, policy=policy, world=world) for name, policy in policies.items()}
    item_s, load_s = _instance_costs(args, cost)
    deadline_s = (args.deadline_ms or 3000) / 1e3
    others = {name: instance_policy(name, deadline_s=deadline_s, item_s=item_s, load_s=load_s) for name in names}
    return {
        name: partial(simulate_on_instances, policy=policy, instances=args.instances, item_s=item_s, load_s=load_s)
        for name, policy in others.items()
    }


def _instances(args: argparse.Namespace, cost: CostModel) -> Instances:
    """As many as the budget has room for, with the loads that are simulated."""
    from runtime.policies.named import Instances

    count = args.module_budget_bytes // args.module_bytes if args.module_bytes else 1
    return Instances(count=count, deadline_s=(args.deadline_ms or 3000) / 1e3, load_s=cost.load_s(args.module_bytes))


def _instance_costs(args: argparse.Namespace, cost: CostModel) -> tuple[float, float]:
    """Seconds of an item and of a load."""
    item_ms, switch_ms = args.item_ms, args.switch_ms
    if item_ms is None:
        item_ms = 8 if args.profile is None else 1e3 * cost.forward_s(round(args.mean_tokens), args.mean_tokens)
    if switch_ms is None:
        switch_ms = 150 if args.profile is None else 1e3 * cost.swap_s("warm")
    return item_ms / 1e3, switch_ms / 1e3


def _cost(args: argparse.Namespace) -> CostModel:
    from runtime.cost import CostModel
    from runtime.profile_file import read_profile

    given = [args.switch_ms, args.item_ms, args.mean_tokens]
    if args.instances < 0 or min((each for each in given if each is not None), default=1) <= 0:
        raise Wrong("--instances, --switch-ms, --item-ms and --mean-tokens must be above 0")
    if args.profile is not None:
        return read_profile(args.profile)
    if args.tokens_per_s is not None:
        if args.tokens_per_s <= 0 or args.batch_ms < 0:
            raise Wrong(f"--tokens-per-s is {args.tokens_per_s}, --batch-ms {args.batch_ms}; give numbers above 0")
        return CostModel.on_a_line(args.tokens_per_s, args.batch_ms / 1e3)
    if args.instances:
        return CostModel.on_a_line(1e3 * args.mean_tokens / (args.item_ms or 8), 0.0)
    raise Wrong("nothing says what a batch takes; give --profile FILE of `vbert profile`, or --tokens-per-s")


def _world(args: argparse.Namespace, cost: CostModel) -> World:
    from runtime.simulator import Modules, World
    from runtime.weight_rules import WeightRules

    module = _module(args.module)
    modules = None
    if args.module_bytes:
        if args.module_bytes > args.module_budget_bytes:
            raise Wrong(f"--module-bytes {args.module_bytes} is more than --module-budget-bytes; raise that")
        modules = Modules(
            num_bytes=lambda _: args.module_bytes, load_s=cost.load_s, budget_bytes=args.module_budget_bytes
        )
    return World(
        batch_s=partial(cost.batch_s, module=module),
        kind=module[0] if module else "",
        around_s=args.around_ms / 1e3,
        max_batch_tokens=args.max_batch_tokens,
        max_queue_inputs=args.max_queue_inputs,
        modules=modules,
        weight=WeightRules(args.tenant_weights).weight,
        refuse=not args.queue_all,
    )


def _module(text: str | None) -> tuple[str, int] | None:
    """KIND/SIZE."""
    if text is None:
        return None
    kind, _, size = text.partition("/")
    if not size.isdigit():
        raise Wrong(f"--module is {text!r}; write KIND/SIZE, such as low_rank/8")
    return kind, int(size)


def _advance(progress: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    progress(name, done, total)


def _requests(args: argparse.Namespace, world: World) -> tuple[list[Offered], list[float], Pace]:
    """What each took when it was recorded, in seconds, and how long batches took to what the profile says; for requests
    that were made up nothing, and as long."""
    from runtime.arrivals import ARRIVALS, Traffic, gaps_log, make_requests
    from runtime.pace import STEADY
    from runtime.request_log import read_log

    deadline_s = None if args.deadline_ms is None else args.deadline_ms / 1e3
    if args.trace in ARRIVALS:
        traffic = Traffic(
            requests=args.requests,
            rate=args.rate or args.load * world.tokens_per_s / args.mean_tokens,
            arrivals=args.trace,
            tenants=args.tenants,
            popularity=args.popularity,
            mean_tokens=args.mean_tokens,
            max_tokens=min(512, world.max_batch_tokens),
            deadline_s=deadline_s,
            batch_part=args.batch_part,
            seed=args.seed,
        )
        return make_requests(traffic), [], STEADY
    path = Path(args.trace)
    with path.open(encoding="utf-8") as file:
        is_list = file.read(1) == "["
    if is_list:
        return gaps_log(path, tokens=round(args.mean_tokens), inputs=args.inputs, deadline_s=deadline_s), [], STEADY
    log = read_log(path)
    if not log.requests:
        raise Wrong(f"{path} has no request that was tokenised; give a longer log")
    return log.requests, log.total_s, log.pace(world.batch_s)


def _beside(row: dict[str, Any], measured: Sequence[float]) -> dict[str, Any]:
    """What was measured when the log was recorded."""
    answered = [seconds for seconds in measured if seconds == seconds]  # not NaN
    if not answered or row["mean_ms"] is None:
        return {}
    mean_ms = 1e3 * sum(answered) / len(answered)
    return {"measured_mean_ms": round(mean_ms, 3), "to_measured": round(row["mean_ms"] / mean_ms, 3)}


def _latencies_ms(requests: Sequence[Offered], done: Simulated) -> list[float]:
    pairs = zip(requests, done.end_s.tolist(), done.is_ok().tolist(), strict=True)
    return sorted(1e3 * (end_s - request.at_s) for request, end_s, ok in pairs if ok)


def _plot(path: Path, latencies: dict[str, list[float]]) -> None:
    """How many requests had their answer by when."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Wrong("--plot needs matplotlib; install vbert[plots], or leave --plot out") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in latencies.items():
        axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=f"{name} ({len(values)})")
    axes.set(xscale="log", xlabel="latency, ms", ylabel="part of the answered requests", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
