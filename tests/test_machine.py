"""What the system says of itself."""

import pytest

from runtime import machine


@pytest.mark.parametrize("names", machine._LIMITS)
@pytest.mark.parametrize("limit", ["5000\n", "max\n", None])
def test_no_more_memory_is_available_than_a_container_has_left(monkeypatch, tmp_path, names, limit):
    most, used = (tmp_path / name for name in names)
    if limit is not None:
        most.parent.mkdir(exist_ok=True)
        most.write_text(limit)
        used.write_text("1200\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    if limit == "5000\n":
        assert machine.available_bytes() == 3800
        used.write_text("no number")
        assert machine.available_bytes() == 0
    else:
        assert machine.available_bytes() > 2**20
