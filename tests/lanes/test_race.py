"""Every read comes after the event that made it ready, whatever is late: proven on a fake device with a race detector.

That the detector sees: without any one of the waits in the product, a test here would fail.
"""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import ComputeFailed
from tests.lanes.fake_device import FakeDevice
from tests.lanes.world import LANES, Server
from vbert.errors import VbertError

SETTINGS = list(chain.from_iterable(combinations(LANES, n) for n in range(4)))
BATCHES = [(0, 1), (2,), (None, 3), (0, 4), (1, 2), (4,), (3, 0), (1,)]
BATCHES += [(None,), (1,), (None, 1), (1,)]  # nothing to load: three batches in flight
BATCHES += [(None, 1), (None,)]  # of texts that were there before
LENGTHS = (5, 9, 5)


SCENES = (
    {"lanes": LANES},
    {"lanes": ("rows", "compute")},
    {"lanes": ("modules", "compute")},
    # a forward that raises half way twice, and then its slot goes to another tenant
    {"lanes": LANES, "batches": [(0,), (1,), (2,), (0,), (3,)], "depth": 1, "fail_launches": {3, 4}},
    {"lanes": LANES, "fail_copies": {1, 2, 40, 41}},
    {"lanes": LANES, "stored": True},
    {"lanes": ("modules", "compute"), "stored": True},
)


def same(modules, outcomes, *, batches=BATCHES, errors=False):
    """The answers of the plain forward, or errors where something failed."""
    for k, (tenants, got) in enumerate(zip(batches, outcomes, strict=True)):
        for outcome, want in zip(got, modules.answers(tenants, LENGTHS[k % 3]), strict=True):
            if not (errors and isinstance(outcome, VbertError)):
                torch.testing.assert_close(outcome, want, atol=1e-5, rtol=0)


def serve(
    modules, words, lanes, *, batches=BATCHES, depth=3, seed=0, drop=None, fail_copies=(), stored=False, **faults
):
    device = FakeDevice(seed, drop=drop, fail=fail_copies)
    with Server(modules, device, lanes=lanes, words=words, stored=stored, **faults) as server:
        outcomes = server.run(batches, lengths=LENGTHS, depth=depth)
    assert server.forwards.ring.num_free == server.forwards.ring.size
    assert server.num_hits > 2 or not stored or fail_copies or faults
    same(modules, outcomes, batches=batches, errors=bool(fail_copies or any(faults.values())))
    return device, outcomes


@pytest.mark.parametrize("lanes", SETTINGS, ids=lambda lanes: "+".join(lanes) or "none")
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_any_setting_is_ordered_and_gives_the_answers_of_the_plain_forward(modules, words, lanes, mapped, stored):
    device, _ = serve(modules, words if mapped else None, lanes, stored=stored)
    assert not device.races


NUMBERS = st.sets(st.integers(0, 20), max_size=6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), copies=st.sets(st.integers(0, 80)), gathers=NUMBERS, launches=NUMBERS)
def test_delays_and_failures_never_break_the_order(modules, words, seed, copies, gathers, launches):
    """A batch that fails is run again tenant by tenant; a launch that fails again is that tenant's trouble."""
    faults = {"fail_copies": copies, "fail_gathers": gathers, "fail_launches": launches}
    device, _ = serve(modules, words, LANES, seed=seed, stored=bool(seed % 2), **faults)
    assert not device.races


def test_a_failure_costs_answers_only_where_it_comes_twice(modules, words):
    """One launch, one gather and one copy: each makes its batch run again, and every answer is right."""
    for fault in ({"fail_launches": {2}}, {"fail_gathers": {1}}, {"fail_copies": {0}}):
        _, outcomes = serve(modules, words, LANES, **fault)
        same(modules, outcomes)
    _, outcomes = serve(modules, words, LANES, depth=1, fail_launches={0, 1, 2})
    assert all(isinstance(outcome, ComputeFailed) for outcome in outcomes[0])


def is_noticed(modules, words, drop):
    """Whether something here fails when the waits of one place do nothing."""
    for scene in SCENES:
        try:
            device, _ = serve(modules, words, drop=drop, **scene)
        except Exception:
            return True
        if device.races:
            return True
    return False


@pytest.mark.slow
def test_no_wait_of_the_product_can_be_left_out(modules, words):
    sites = set()
    for scene in SCENES:
        device, _ = serve(modules, words, **scene)
        assert not device.races
        sites |= device.sites
    assert {site.split(":")[0] for site in sites} == {"runtime/staging.py", "runtime/uploads.py", "runtime/forwards.py"}
    assert len(sites) >= 8
    assert [site for site in sorted(sites) if not is_noticed(modules, words, site)] == []
