"""Who looks at a log of a long run sees how far it is."""

from training import progress


def test_where_there_is_no_terminal_a_line_a_minute_tells(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress_bar() as show:
        for step in range(1, 151):
            now += 1.0
            show(f"distilling: loss {step}", step, 150)
    told = capsys.readouterr()
    assert told.err.splitlines() == ["distilling: loss 60 (60 of 150)", "distilling: loss 120 (120 of 150)"]
    assert told.out == ""
