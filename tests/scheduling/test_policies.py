"""Laws that every policy keeps, over random queues, and the orders and shares by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.cost import CostModel, Curve, Point
from runtime.policies.named import DEFAULT, POLICIES, POOLED, batch_policy
from runtime.policies.orders import EarliestDeadline, FairShares, ResponseRatio, ShortestFirst
from runtime.policies.pooled import Pooled, ProfileCosts
from runtime.policies.pools import AlphaOnly, Fixed
from runtime.policies.token_budget import TokenBudget
from runtime.request import TenantKey
from runtime.shares import Shares
from tests.fakes import Line, slices
from vbert.errors import ConfigError

MINE = ("interactive", 1.0)
FAIR = POLICIES[DEFAULT]()
COST = CostModel.on_a_line(1000.0, 0.01)
EVERY = POLICIES | {name: partial(batch_policy, name, COST, max_batch_tokens=150) for name in POOLED}


requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, 150), min_size=1, max_size=6),
        st.sampled_from("abcd"),
        st.one_of(st.none(), st.floats(0.01, 20.0)),
        st.booleans(),
        st.sampled_from(["interactive", "batch"]),
        st.sampled_from([0.5, 1.0, 3.0]),
    ),
    max_size=40,
)


def filled(entries, **kwargs) -> Line:
    line = Line(**kwargs)
    for lengths, tenant, deadline_s, cold, priority, weight in entries:
        name = tenant + "-cold" * cold
        line.put(*lengths, tenant=name, deadline_s=deadline_s, cold=cold, priority=priority, weight=weight)
    return line


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30)
@given(requests, st.floats(0.0, 10.0), st.sampled_from([None, 50.0, 5000.0]))
@example(
    [([1], "a", 1.0, False, *MINE), ([47], "a", None, False, *MINE), ([54], "a", 2.0, False, *MINE)], 1.0, 50.0
)  # the oldest is late
@example(
    [([1], "a", None, True, *MINE), ([60], "a", 8.0, False, *MINE), ([41], "a", None, False, *MINE)], 7.0, 50.0
)  # the oldest cannot be in time
def test_one_plan_keeps_every_law(name, entries, now_s, tokens_per_s):
    policy, line = EVERY[name](), filled(entries, tokens_per_s=tokens_per_s)
    line.now_s = now_s
    plan = policy.plan(line.view())
    assert plan == policy.plan(line.view())  # the same view, the same plan: nothing was changed by planning
    pieces = slices(plan)
    waiting = line.queue.waiting
    taken: dict[int, int] = {}
    for batch in plan.batches:
        assert len({piece.request_id for piece in batch.slices}) == len(batch.slices)
        lengths = []
        for piece in batch.slices:
            assert piece.first == taken.get(piece.request_id, 0)  # where the batch before it stopped
            taken[piece.request_id] = piece.last
            lengths += waiting[piece.request_id].lengths[piece.first : piece.last]
        assert sum(lengths) <= line.max_batch_tokens or len(lengths) == 1
        tenants = [waiting[piece.request_id].key.digest for piece in batch.slices]
        assert len({*tenants}) == sum(a != b for a, b in zip(tenants, ["", *tenants], strict=False))
        assert all(tenant in line.resident for tenant in tenants)
    assert all(key.digest not in line.resident for key in plan.prefetch)
    assert set(plan.expire) == {i for d, i in line.queue.deadlines if d <= now_s}
    assert not {piece.request_id for piece in pieces} & set(plan.expire)
    assert plan.wake_s is None or plan.wake_s > now_s
    ready = [waiting[i] for i in line.queue.ready if i not in plan.expire]
    assert bool(ready) == bool(pieces) or getattr(policy, "window_s", 0)  # which waits for others first
    needs_s = sum(request.tokens for request in ready) / tokens_per_s if tokens_per_s else 0.0
    patient = [request for request in ready if request.deadline_s is None or request.deadline_s > now_s + needs_s]
    if ready and name in ("fair", "urgent") and ready[0] in patient:
        assert ready[0].request_id in {piece.request_id for piece in pieces}  # so nobody can starve


@pytest.mark.parametrize("name", EVERY)
@given(requests)
@settings(max_examples=20)
def test_everything_that_can_run_runs_exactly_once(name, entries):
    line = filled([(lengths, tenant, None, *rest) for lengths, tenant, _, *rest in entries])
    policy = EVERY[name]()
    wanted = sorted(i for i, request in line.queue.waiting.items() for _ in request.lengths)
    ran: list[int] = []
    for _ in range(len(wanted) + 10):
        plan = policy.plan(line.view())
        ran += line.apply(plan)
        line.now_s += 1.0
        line.arrive(line.loading)
    assert sorted(ran) == wanted
    assert (line.queue.num_inputs, line.queue.num_tokens, line.queue.ready_tokens) == (0, 0, 0)


# ---- orders by hand ------------------------------------------------------------------------------------------------


def order(rule, line):
    return [request_id for request_id, _ in rule(line.view())]


def test_textbook_orders():
    """Arrived at 0, 0, 0 and 4 s with 40, 10, 20 and 5 tokens, due at -, 9, 5 and 7 s. At 10 tokens a second and 8 s
    the response ratios are 8 / 4, 8 / 1, 8 / 2 and 4 / 0.5 (and of equals the first goes first)."""
    line = Line(tokens_per_s=10.0)
    a, b, c = line.put(40), line.put(10, deadline_s=9.0), line.put(20, deadline_s=5.0)
    line.now_s = 4.0
    d = line.put(5, deadline_s=7.0)
    assert order(ShortestFirst(), line) == [d, b, c, a]
    assert order(EarliestDeadline(), line) == [c, d, b, a]
    line.now_s = 8.0
    assert order(ResponseRatio(), line) == [b, d, c, a]


def test_without_packing_a_batch_is_of_one_request():
    line = Line()
    first, second = line.put(10, 10), line.put(10, 10)
    policy = batch_policy("fcfs")
    for request_id in (first, second):
        assert {piece.request_id for piece in slices(policy.plan(line.view()))} == {request_id}
        assert line.apply(policy.plan(line.view())) == [request_id] * 2


def test_a_window_waits_for_others_until_the_batch_is_full_or_the_oldest_waited():
    line, policy = Line(), batch_policy("hrrn-packing")
    line.put(10)
    plan = policy.plan(line.view())
    assert (slices(plan), plan.wake_s) == ([], pytest.approx(0.1))
    line.now_s = plan.wake_s
    assert len(slices(policy.plan(line.view()))) == 1
    line.now_s = 0.05
    line.put(90)
    assert len(slices(policy.plan(line.view()))) == 2


def test_a_pool_is_cut_when_its_window_ends_is_full_or_somebody_is_in_a_hurry():
    """10 tokens take 20 ms at 1,000 a second and 10 ms a batch."""
    line, policy = Line(tokens_per_s=1000.0), Pooled(policy=Fixed(4), costs=ProfileCosts(COST, 100), window_s=1.0)
    ids = [line.put(10) for _ in range(6)]
    plan = policy.plan(line.view())
    assert (plan.batches, plan.wake_s) == ((), 1.0)
    line.put(10, deadline_s=0.5)
    assert policy.plan(line.view()).wake_s == pytest.approx(0.5 - 2 * 0.07)
    line.now_s = 1.0
    plan = policy.plan(line.view())
    assert [[piece.request_id for piece in batch.slices] for batch in plan.batches] == [ids[:4], ids[4:]]
    line.now_s = 0.0
    assert Pooled(policy=Fixed(4), costs=ProfileCosts(COST, 100), max_pool=6).plan(line.view()).batches


def test_inputs_of_one_request_keep_their_order_over_the_batches_of_a_pool():
    """The shortest go together, so the request's inputs are in two batches; each takes its next ones."""
    line = Line(max_batch_tokens=100)
    long, short = line.put(30, 5, 30), line.put(5)
    policy = Pooled(policy=AlphaOnly(), costs=ProfileCosts(CostModel.on_a_line(1e3, 0.0), 100), window_s=0.0)
    plan = policy.plan(line.view())
    assert [[(p.request_id, p.first, p.last) for p in batch.slices] for batch in plan.batches] == [
        [(long, 0, 2)],
        [(long, 2, 3), (short, 0, 1)],
    ]


def test_a_pool_costs_what_the_profile_says():
    costs = ProfileCosts(COST, 100)
    assert costs.alpha(20).tolist() == pytest.approx([0, 0.03, 0.05, 0.07, 0.09, 0.11])
    assert costs.beta("low_rank", 20).tolist() == [0] * 6
    with pytest.raises(ConfigError, match="the policy 'pool-joint' needs a profile"):
        batch_policy("pool-joint")


def test_a_pool_knows_modules_of_one_kind_apart_by_their_size():
    """1 ms a token bare; differences of 1 % take 2 ms a token, masks of 5 % take 6."""

    def curve(ms: float) -> Curve:
        return Curve([Point(size=1000, seconds=ms, spread=0, repeats=1, threads=1)])

    curves = {"forward/32": curve(1), "with/sparse/10/1": curve(2), "with/sparse/50/1": curve(6)}
    costs = ProfileCosts(CostModel(COST.conditions, curves), 2000)
    assert costs.beta("sparse/10", 1000)[1:].tolist() == [1, 2]
    assert costs.beta("sparse/50", 1000)[1:].tolist() == [5, 10]


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'lifo'; use one of fair, urgent, fcfs"):
        batch_policy("lifo")


# ---- shares --------------------------------------------------------------------------------------------------------


def test_counters_by_hand():
    """Two requests of 10 tokens of a, then one of b with weight 2; a third of a comes when b was served."""
    shares = Shares()
    assert [shares.join("a", 10, 1.0), shares.join("a", 10, 1.0), shares.join("b", 10, 2.0)] == [0, 10, 0]
    assert shares.join("b", 10, 2.0) == 5
    shares.served(10)
    assert shares.join("c", 10, 1.0) == 10  # nothing is saved up
    assert shares.join("a", 10, 1.0) == 20


def test_counters_of_who_is_behind_are_forgotten():
    shares = Shares()
    for i in range(5000):
        shares.join(f"t{i}", 10, 1.0)
        shares.served(20.0 * i)
    assert len(shares._until) < 2100


def served_tokens(line, policy, rounds):
    """Tokens by tenant of so many batches."""
    counts: dict[str, int] = {}
    for _ in range(rounds):
        waiting = dict(line.queue.waiting)
        for request_id in line.apply(policy.plan(line.view())):
            counts[waiting[request_id].key.tenant] = counts.get(waiting[request_id].key.tenant, 0) + 10
    return counts


def test_who_sends_most_gets_no_more_and_weights_are_kept():
    line = Line(max_batch_tokens=100)
    for _ in range(1000):
        line.put(10, tenant="many")
    for _ in range(200):
        line.put(10, tenant="few")
        line.put(10, tenant="double", weight=2.0)
    counts = served_tokens(line, FAIR, 40)
    assert counts == {"few": 1000, "double": 2000, "many": 1000}


def test_who_comes_back_has_saved_nothing_up():
    line = Line(max_batch_tokens=100)
    for _ in range(100):
        line.put(10, tenant="always")
    line.put(10, tenant="sometimes")
    served_tokens(line, FAIR, 8)
    for _ in range(100):
        line.put(10, tenant="always")
        line.put(10, tenant="sometimes")
    counts = served_tokens(line, FAIR, 8)
    assert counts["sometimes"] <= 400


def test_interactive_goes_first_and_batch_gets_its_part():
    line = Line(max_batch_tokens=100)
    line.put(10, tenant="a")
    for _ in range(200):
        line.put(10, tenant="b", priority="batch")
        line.put(10, tenant="a")
    counts = served_tokens(line, FAIR, 20)
    assert 20 * 10 <= counts["b"] <= 20 * 20  # a tenth of each batch, and one input of the oldest where that is its own
    for _ in range(40):
        served_tokens(line, FAIR, 1)
    assert not line.queue.waiting


def test_a_short_deadline_takes_nobodys_share():
    """Both are short of time, but the many are far ahead of the others: the one request of the other goes first."""
    line = Line(max_batch_tokens=20, tokens_per_s=100.0)
    line.put(10, tenant="other", deadline_s=60.0)
    many = [line.put(10, tenant="many", deadline_s=0.5) for _ in range(20)]
    calm = line.put(10, tenant="calm", deadline_s=60.0)
    policy = TokenBudget(order=FairShares())
    line.apply(policy.plan(line.view()))
    assert [i for i, _ in policy.order(line.view())][:4] == [many[1], many[1], many[2], calm]


def test_batches_are_short_enough_for_the_shortest_deadline_and_leave_out_who_is_too_late():
    """100 tokens a second: of 2 s a batch may take 0.5 s, 50 tokens. Who is due in 0.3 s cannot be in it, and is not
    while there are others; of those left alone it is computed all the same."""
    line = Line(max_batch_tokens=100, tokens_per_s=100.0)
    late = line.put(10, deadline_s=2.0)
    line.now_s = 1.7
    others = [line.put(10, deadline_s=60.0) for _ in range(9)]
    assert line.apply(FAIR.plan(line.view())) == others[:5]
    assert line.apply(FAIR.plan(line.view())) == others[5:]
    assert line.apply(FAIR.plan(line.view())) == [late]


def test_one_request_of_many_inputs_is_as_many_requests():
    """After each batch what is left of it stands where a tenant stands that had so much: the others get their turn."""
    line = Line(max_batch_tokens=40)
    line.put(*[10] * 100, tenant="long")
    line.apply(FAIR.plan(line.view()))
    others = [line.put(10, tenant=f"t{i}") for i in range(6)]
    served = [i for _ in range(3) for i in line.apply(FAIR.plan(line.view()))]
    assert set(others) <= set(served)
    ahead = FAIR.before(
        line.view(),
        replace(line.queue.waiting[1], request_id=200, key=TenantKey(tenant="new", version=1, digest="new")),
    )
    assert ahead <= line.queue.num_tokens


def test_who_came_before_with_the_same_tag_goes_before():
    """Fifty tenants with one request each all stand at the same place: a fifty-first waits for all of them."""
    line = Line()
    for i in range(50):
        line.put(10, tenant=f"t{i}")
    asked = replace(line.queue.waiting[1], request_id=51, key=TenantKey(tenant="new", version=1, digest="new"))
    assert FAIR.before(line.view(), asked) == 500
    assert FAIR.before(line.view(), replace(asked, priority="batch")) == 90  # a tenth of each batch is its own


def test_an_urgent_request_is_found_behind_any_number_of_others():
    line = Line(max_batch_tokens=20, tokens_per_s=1000.0)
    for i in range(500):
        line.put(10, tenant=f"t{i}", deadline_s=600.0)
    urgent = line.put(10, tenant="urgent", deadline_s=0.1)
    assert urgent in line.apply(FAIR.plan(line.view()))


def test_what_was_never_computed_is_not_charged():
    line = Line(max_batch_tokens=20)
    gone = [line.put(100, tenant="a") for _ in range(10)]
    other = line.put(10, tenant="b")
    for request_id in gone:
        line.queue.forget(request_id, None)
    mine = line.put(10, tenant="a")
    assert [line.queue.tag_of(i) for i in (other, mine)] == [0, 0]


def test_deadlines_of_who_is_too_late_or_ahead_make_nobodys_batch_short():
    line = Line(max_batch_tokens=100, tokens_per_s=100.0)
    line.put(10, deadline_s=0.005)  # 10 ms is the least that a batch takes
    for _ in range(9):
        line.put(10, tenant="calm", deadline_s=60.0)
    assert len(line.apply(FAIR.plan(line.view()))) == 9
    for _ in range(30):
        line.put(10, tenant="ahead", deadline_s=line.now_s + 60)
    line.put(10, tenant="ahead", deadline_s=line.now_s + 2.0)
    assert len(line.apply(FAIR.plan(line.view()))) == 10


STARVING = {"sjf", "sjf-packing"}


@pytest.mark.parametrize("name", POLICIES)
def test_a_long_request_starves_only_with_the_shortest_first(name):
    """Each round brings as many short requests as fit, all of another tenant and due before it."""
    line, policy = Line(max_batch_tokens=20, tokens_per_s=20.0), POLICIES[name]()
    long = line.put(20, tenant="long", deadline_s=30.0)
    for _ in range(60):
        line.now_s += 1.0
        for _ in range(2):
            line.put(10, tenant="short", deadline_s=line.now_s + 25.0)
        if long in line.apply(policy.plan(line.view())):
            break
    assert (long in line.queue.waiting or line.now_s >= 30) == (name in STARVING)
    assert isinstance(policy, TokenBudget)
