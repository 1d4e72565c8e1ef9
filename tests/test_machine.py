"""What the system says of itself."""

import pytest

from runtime import machine


@pytest.mark.parametrize("limit", ["5000\n", "max\n", None])
def test_no_more_memory_is_available_than_a_container_may_have(monkeypatch, tmp_path, limit):
    path = tmp_path / "memory.max"
    if limit is not None:
        path.write_text(limit)
    monkeypatch.setattr(machine, "_CONTAINER_LIMIT", path)
    if limit == "5000\n":
        assert machine.available_bytes() == 5000
    else:
        assert machine.available_bytes() > 2**20
