"""Requests in virtual time: by hand, laws for every policy, what is made up and what it is judged by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.arrivals import ARRIVALS, POPULARITY, Traffic, gaps_log, make_requests
from runtime.cost import CostModel
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.policies.named import DEFAULT, POLICIES, POOLED, batch_policy
from runtime.request_log import Offered
from runtime.simulation_report import fair_shares, jain, report
from runtime.simulator import Modules, World, simulate
from vbert.errors import ConfigError

SECOND = World(batch_s=lambda tokens, inputs, tenants: 1.0, max_batch_tokens=100, refuse=False)  # every batch takes one


def outcomes(done):
    return [done.outcomes[i] for i in done.outcome]


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_one_after_the_other():
    """Requests of 60 tokens at 0, 0.5 and 0.6 s: the first runs from 0 to 1 s, the second from 1 to 2 s, the third does
    not fit beside it. A batch that is held back leaves 2 ms before the lane is free."""
    requests = [Offered(at_s, "a", (60,)) for at_s in (0.0, 0.5, 0.6)]
    done = simulate(requests, POLICIES[DEFAULT](), SECOND)
    assert done.end_s.tolist() == [1.0, 2.0, 3.0]
    assert done.begin_s == pytest.approx([0.0, 0.6, 1.998])  # the two that wait fill a batch: it is launched at once
    assert (done.batches, done.batch_tokens, done.busy_s) == (3, 180, 3.0)


def test_a_request_is_answered_when_its_last_input_is():
    done = simulate([Offered(0.0, "a", (60, 60, 60))], POLICIES[DEFAULT](), SECOND)
    assert (done.begin_s.tolist(), done.end_s.tolist()) == ([0.0], [3.0])


def test_who_is_late_is_told_at_the_deadline():
    requests = [Offered(0.0, "a", (60,), 10.0), Offered(0.1, "a", (60,), 0.5), Offered(0.2, "a", (60,), 10.0)]
    done = simulate(requests, POLICIES["urgent"](), SECOND)
    assert outcomes(done) == ["ok", "deadline_exceeded", "ok"]
    assert done.end_s[1] == pytest.approx(0.6)


def test_who_cannot_be_in_time_is_refused_when_it_comes():
    """100 tokens a second, 60 run until 1 s and 60 wait: the third would end after 3 s, its batch not being full."""
    world = replace(SECOND, refuse=True)
    requests = [Offered(0.0, "a", (60,), 9.0), Offered(0.1, "a", (60,), 9.0), Offered(0.2, "a", (60,), 2.0)]
    done = simulate(requests, POLICIES["fcfs-packing"](), world)
    assert outcomes(done) == ["ok", "ok", "deadline_unreachable"]
    assert done.end_s[2] == pytest.approx(0.2)
    alone = simulate([Offered(0.0, "a", (150, 150), 2.0)], POLICIES["fcfs-packing"](), world)
    assert outcomes(alone) == ["deadline_exceeded"]


def test_a_full_queue_refuses():
    requests = [Offered(0.0, "a", (60,)) for _ in range(5)]
    done = simulate(requests, POLICIES[DEFAULT](), replace(SECOND, refuse=True, max_queue_inputs=3))
    assert outcomes(done) == ["ok", "ok", "ok", "server_full", "server_full"]


def test_what_never_fits_in_the_queue_is_refused_and_the_others_go_on():
    requests = [Offered(0.0, "a", (1,) * 9), Offered(0.0, "a", (1,))]
    done = simulate(requests, POLICIES[DEFAULT](), replace(SECOND, refuse=True, max_queue_inputs=4))
    assert outcomes(done) == ["request_too_large", "ok"]


def test_modules_are_loaded_one_at_a_time_and_leave_for_others():
    """Room for two of three. The loads take 0.5 s each; the third has to wait until the first is not needed."""
    modules = Modules(num_bytes=lambda _: 10, load_s=lambda _: 0.5, budget_bytes=20)
    requests = [Offered(0.0, name, (100,)) for name in "abc"]
    done = simulate(requests, POLICIES[DEFAULT](), replace(SECOND, modules=modules))
    assert done.begin_s == pytest.approx([0.5, 1.0, 2.0])
    assert done.end_s == pytest.approx([1.5, 2.5, 3.5])
    assert done.loads == 3


def test_modules_that_never_fit_are_found_out():
    modules = Modules(num_bytes=lambda _: 30, load_s=lambda _: 0.5, budget_bytes=20)
    with pytest.raises(ConfigError, match="1 requests wait for ever"):
        simulate([Offered(0.0, "a", (10,))], POLICIES[DEFAULT](), replace(SECOND, modules=modules))


# ---- laws ----------------------------------------------------------------------------------------------------------

WORLD = World(batch_s=lambda tokens, inputs, tenants: 0.01 + tokens / 1000, max_batch_tokens=100)
requests_of = st.lists(
    st.tuples(
        st.floats(0, 3),
        st.sampled_from("abc"),
        st.lists(st.integers(1, 120), min_size=1, max_size=4),
        st.one_of(st.none(), st.floats(0.05, 3)),
        st.sampled_from(["interactive", "batch"]),
    ),
    max_size=30,
)


@pytest.mark.parametrize("refuse", [True, False])
@pytest.mark.parametrize("name", [*POLICIES, *POOLED, *INSTANCE_POLICIES])
@given(rows=requests_of)
@example(rows=[(0.0, "a", [1, 120, 120], 0.05078125, "interactive")])  # late while all of it is computed
@settings(max_examples=15, deadline=None)
def test_everybody_ends_once_and_the_same_way_again(name, refuse, rows):
    requests = [
        Offered(at_s, who, tuple(lengths), *rest) for at_s, who, lengths, *rest in sorted(rows, key=lambda r: r[0])
    ]
    world = replace(WORLD, refuse=refuse, modules=Modules(num_bytes=lambda _: 1, load_s=lambda _: 0.02, budget_bytes=2))
    cost = CostModel.on_a_line(1000.0, 0.01)
    done = simulate(requests, batch_policy(name, cost, max_batch_tokens=100), world)
    ok, at_s = done.is_ok(), np.array([request.at_s for request in requests])
    assert not np.isnan(done.end_s).any()
    assert (done.end_s >= at_s).all()
    assert (done.begin_s[ok] >= at_s[ok]).all()
    tokens = sum(request.tokens for request, fine in zip(requests, ok, strict=True) if fine)
    assert tokens <= done.batch_tokens <= sum(request.tokens for request in requests)
    assert all(request.deadline_s is not None for request, fine in zip(requests, ok, strict=True) if not fine)
    in_flight = done.batches if name in POOLED else 2  # a pool is launched at once, and goes on when nobody waits
    span_s = done.end_s.max(initial=0.0) - at_s.min(initial=0.0)
    assert done.busy_s <= span_s + 1e-9 + WORLD.batch_s(120, 1, 1) * in_flight
    again = simulate(requests, batch_policy(name, cost, max_batch_tokens=100), world)
    assert done.end_s.tolist() == again.end_s.tolist()


def test_of_the_default_the_others_do_not_notice_who_floods():
    """One tenant sends as much as there is capacity for, nine send a tenth of that together. They wait for a batch or
    two, as if they were alone; first come, first served they wait for the backlog."""
    flood = [Offered(i * 0.01, "flood", (20,)) for i in range(600)]
    others = [Offered(i * 0.1, f"t{i % 9}", (10,)) for i in range(60)]
    requests = sorted([*flood, *others])
    waits = {}
    for name in (DEFAULT, "fcfs-packing"):
        done = simulate(requests, POLICIES[name](), replace(WORLD, refuse=False))
        mine = [end - r.at_s for r, end in zip(requests, done.end_s, strict=True) if r.tenant != "flood"]
        waits[name] = max(mine)
    assert waits[DEFAULT] < 0.4
    assert waits["fcfs-packing"] > 3.0


# ---- made-up requests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrivals", ARRIVALS)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_made_up_requests_are_as_many_as_often_and_as_long_as_asked(arrivals, popularity):
    traffic = Traffic(requests=20_000, rate=50.0, arrivals=arrivals, popularity=popularity, tenants=20, batch_part=0.25)
    requests = make_requests(traffic)
    assert requests == make_requests(traffic)
    assert len(requests) == 20_000
    gaps = np.diff([request.at_s for request in requests])
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.02, rel=0.1)
    if arrivals == "normal":
        assert gaps.std() / gaps.mean() == pytest.approx(1 / 3, rel=0.05)
    lengths = [request.tokens for request in requests]
    assert np.mean(lengths) == pytest.approx(32, rel=0.05)
    assert sum(request.priority == "batch" for request in requests) == pytest.approx(5000, rel=0.1)
    counts = sorted((sum(r.tenant == f"t{i}" for r in requests) for i in range(20)), reverse=True)
    first = {"zipf": 0.32, "uniform": 0.05, "one": 1.0, "heavy": 0.5}[popularity]
    assert counts[0] / 20_000 == pytest.approx(first, rel=0.15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arrivals": "tide"}, "'tide'; use one of poisson"),
        ({"popularity": "none"}, "'none'; use one of zipf"),
        ({"rate": 0}, "rate is 0; it must be above 0"),
        ({"batch_part": 2}, "batch_part is 2"),
        ({"deadline_s": -1.0}, "deadline_s is -1.0"),
    ],
)
def test_wrong_traffic_is_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Traffic(**({"requests": 10, "rate": 1.0} | wrong))


def test_a_list_of_kinds_and_gaps(tmp_path):
    (tmp_path / "trace").write_text('[["A", 0.5], ["B", 0.25]]')
    found = gaps_log(tmp_path / "trace", tokens=8, inputs=2, deadline_s=3.0)
    assert found == [Offered(0.5, "A", (8, 8), 3.0), Offered(0.75, "B", (8, 8), 3.0)]
    (tmp_path / "trace").write_text('["A"]')
    with pytest.raises(ConfigError, match=r"no list of \[kind, seconds\]"):
        gaps_log(tmp_path / "trace", tokens=8, inputs=2, deadline_s=None)


# ---- what they are judged by ---------------------------------------------------------------------------------------


def test_fair_shares_by_hand():
    """Of 60, a asks for 10, b and c for 40; with weight 3, c gets three times as much as b of what a leaves."""
    one = lambda _: 1.0  # noqa: E731
    assert fair_shares({"a": 10, "b": 40, "c": 40}, 60, one) == {"a": 10, "b": 25, "c": 25}
    weights = {"a": 1.0, "b": 1.0, "c": 3.0}
    assert fair_shares({"a": 10, "b": 40, "c": 40}, 60, weights.__getitem__) == {"a": 10, "b": 12.5, "c": 37.5}
    assert fair_shares({"a": 10, "b": 5}, 60, one) == {"a": 10, "b": 5}
    assert sum(fair_shares({"a": 1, "b": 1}, 1, {"a": 0.001, "b": 1000.0}.__getitem__).values()) == pytest.approx(1)


def test_jains_index_by_hand():
    asked = {"a": 10.0, "b": 40.0, "c": 40.0}
    assert jain(asked, {"a": 10, "b": 25, "c": 25}) == pytest.approx(1)
    assert jain(asked, {"a": 0, "b": 30, "c": 30}) == pytest.approx(2 / 3)
    assert jain(asked, {"a": 0, "b": 0, "c": 0}) == 0


def test_a_report_by_hand():
    """Latencies of 1 and 2.4 s; the second is given up after its 1.5 s, though it was begun before."""
    requests = [Offered(0.0, "a", (60,)), Offered(0.1, "b", (60,), 1.5), Offered(0.6, "b", (60,))]
    done = simulate(requests, POLICIES["fcfs-packing"](), SECOND)
    row = report(requests, done, lambda tokens: 0.5)
    assert (row["p50_ms"], row["mean_ms"], row["weighted_turnaround"]) == (1700, 1700, 3.4)
    assert (row["late"], row["late_by_queueing"], row["answered"]) == (0.3333, 0.0, 0.6667)
    assert (row["goodput"], row["busy"], row["total_s"]) == (40.0, 1.0, 3.0)
