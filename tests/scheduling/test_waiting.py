"""The index of waiting requests against a plain list that is searched."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.request import TenantKey, Waiting
from runtime.waiting import WaitingQueue


class Queue(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = WaitingQueue()
        self.model: dict[int, Waiting] = {}
        self.deadlines: dict[int, float] = {}
        self.resident = {"a"}
        self.next = 1

    @rule(
        digest=st.sampled_from("abc"),
        lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
        deadline_s=st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0])),
        caller=st.sampled_from("xy"),
    )
    def add(self, digest, lengths, deadline_s, caller):
        request = Waiting(
            request_id=self.next,
            key=TenantKey(tenant=digest, version=1, digest=digest),
            caller=caller,
            arrival_s=0.0,
            deadline_s=deadline_s,
            lengths=tuple(lengths),
        )
        self.queue.add(request, ready=digest in self.resident)
        self.model[self.next] = request
        if deadline_s is not None:
            self.deadlines[self.next] = deadline_s
        self.next += 1

    @rule(data=st.data())
    def take(self, data):
        ready = [i for i, request in self.model.items() if request.key.digest in self.resident]
        if ready:
            request = self.model[data.draw(st.sampled_from(ready))]
            count = data.draw(st.integers(1, len(request.lengths)))
            self.queue.take(request.request_id, count)
            if count == len(request.lengths):
                del self.model[request.request_id]
            else:
                rest = self.queue.waiting[request.request_id]
                assert (rest.first, rest.lengths) == (request.first + count, request.lengths[count:])
                self.model[request.request_id] = rest

    @rule(data=st.data())
    def forget(self, data):
        known = sorted({*self.model, *self.deadlines})
        if known:
            request_id = data.draw(st.sampled_from(known))
            self.queue.forget(request_id, self.deadlines.pop(request_id, None))
            self.model.pop(request_id, None)

    @rule(digest=st.sampled_from("abc"))
    def arrive_or_leave(self, digest):
        if digest in self.resident:
            self.queue.leave(digest)
        else:
            self.queue.arrive(digest)
        self.resident ^= {digest}

    @invariant()
    def agrees(self):
        queue, requests = self.queue, list(self.model.values())
        ready = [request for request in requests if request.key.digest in self.resident]
        assert dict(queue.waiting) == self.model
        assert list(queue.ready) == sorted(request.request_id for request in ready)
        assert queue.ready_tokens == sum(request.tokens for request in ready)
        assert queue.num_inputs == sum(len(request.lengths) for request in requests)
        assert queue.num_tokens == sum(request.tokens for request in requests)
        assert list(queue.deadlines) == sorted((d, i) for i, d in self.deadlines.items())
        timed = [request for request in ready if request.deadline_s is not None]
        assert list(queue.ready_deadlines) == sorted((r.deadline_s, r.request_id) for r in timed)
        assert {digest: sorted(ids) for digest, ids in queue.cold.items()} == {
            digest: ids
            for digest in "abc"
            if digest not in self.resident
            and (ids := [request.request_id for request in requests if request.key.digest == digest])
        }
        for caller in "xy":
            mine = sum(len(request.lengths) for request in requests if request.caller == caller)
            assert queue.inputs_of(caller) == mine
        assert sorted(i for _, i, _ in queue.shares["interactive"]) == list(queue.ready)
        assert list(queue.shares["interactive"]) == sorted(queue.shares["interactive"])
        assert all(tokens == self.model[i].tokens for _, i, tokens in queue.shares["interactive"])
        for digest in "abc":
            assert queue.waits_for(digest) == any(request.key.digest == digest for request in ready)


TestQueue = Queue.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
