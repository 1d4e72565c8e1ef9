"""Who leaves memory: hand-worked cases, and laws over random modules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtime.residency import Lru, Resident

LRU = Lru()


def modules(*entries: tuple[str, int, bool]) -> list[Resident]:
    return [
        Resident(digest=digest, num_bytes=num_bytes, last_used_s=float(i), pinned=pinned)
        for i, (digest, num_bytes, pinned) in enumerate(entries)
    ]


def test_nothing_leaves_when_there_is_room():
    assert LRU.evict(modules(("a", 5, False)), free_bytes=10, need_bytes=10) == ()


def test_the_longest_unused_leave_as_few_as_are_enough():
    line = modules(("a", 5, False), ("b", 5, False), ("c", 5, False))
    assert LRU.evict(line, free_bytes=0, need_bytes=6) == ("a", "b")


def test_a_pinned_module_is_passed_over():
    line = modules(("a", 5, True), ("b", 5, False))
    assert LRU.evict(line, free_bytes=0, need_bytes=5) == ("b",)
    assert LRU.evict(line, free_bytes=0, need_bytes=6) is None


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=20), st.integers(0, 30), st.integers(0, 100))
def test_laws(sizes, free_bytes, need_bytes):
    line = modules(*[(f"m{i}", size, pinned) for i, (size, pinned) in enumerate(sizes)])
    by_digest = {module.digest: module for module in line}
    victims = LRU.evict(line, free_bytes=free_bytes, need_bytes=need_bytes)
    movable = sum(module.num_bytes for module in line if not module.pinned)
    assert (victims is None) == (free_bytes + movable < need_bytes)
    if victims is None:
        return
    freed = [by_digest[digest].num_bytes for digest in victims]
    assert free_bytes + sum(freed) >= need_bytes
    assert not freed or free_bytes + sum(freed[:-1]) < need_bytes
    assert not any(by_digest[digest].pinned for digest in victims)
    assert victims == tuple(m.digest for m in line if not m.pinned)[: len(victims)]
