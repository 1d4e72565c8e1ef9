"""`vbert simulate`, and the request logs that it reads."""

from __future__ import annotations

import json

import pytest

from cli import main
from runtime.policies.instances import INSTANCE_POLICIES
from runtime.profile_file import write_profile
from runtime.request_log import Offered, read_log, write_log
from tests.scheduling.test_cost import curve, model
from vbert.errors import ConfigError, CorruptFile


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    write_profile(path, model(swap=curve((1_000_000, 0.0005))))
    return path


LINE = ["--tokens-per-s", "10000", "--batch-ms", "1"]


def simulated(capsys, *arguments):
    assert main(["simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_policies_side_by_side(capsys, tmp_path):
    flags = ["--requests", "500", "--load", "1.3", "--deadline-ms", "400", "--popularity", "heavy"]
    found = simulated(capsys, *LINE, *flags, "--policy", "all")
    rows = {row["policy"]: row for row in found["policies"]}
    assert rows["fair"]["jain"] >= max(row["jain"] for row in rows.values()) - 0.02
    assert found == simulated(capsys, *LINE, *flags, "--policy", "all")
    assert main(["simulate", *LINE, *flags, "--policy", "fair,sjf", "--plot", str(tmp_path / "p.svg")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["policy", "fair", "sjf"]
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_modules_weights_and_lists_of_gaps(capsys, tmp_path):
    (tmp_path / "gaps.json").write_text(json.dumps([["A", 0.1], ["B", 0.1]] * 20))
    flags = ["--trace", str(tmp_path / "gaps.json"), "--inputs", "4", "--tenant-weights", "A=3"]
    row = simulated(capsys, *LINE, *flags, "--module-bytes", "1000", "--module-budget-bytes", "1500")["policies"][0]
    assert row["loads"] == 40  # only one of the two fits
    assert row["answered"] == 1


def test_instances_that_hold_whole_weights(capsys, tmp_path):
    """Under overload OMLS loads with nearly every job; all jobs of a kind at once load ten times less."""
    (tmp_path / "gaps.json").write_text(json.dumps([["ABCDEFGHIJKL"[i * 5 % 12], 0.05] for i in range(240)]))
    flags = ["--trace", str(tmp_path / "gaps.json"), "--inputs", "16", "--deadline-ms", "3000"]
    found = simulated(capsys, *flags, "--instances", "1", "--policy", "all")
    rows = {row["policy"]: row for row in found["policies"]}
    assert set(rows) == set(INSTANCE_POLICIES)
    assert rows["round-robin"]["loads"] == 240
    assert rows["kind-batches"]["loads"] < 0.2 * rows["omls"]["loads"]
    assert max(rows[name]["late"] for name in ("kind-batches", "omls-guard")) < rows["round-robin"]["late"]
    assert all(row["answered"] == 1 for row in rows.values())


def test_instances_of_a_profile(capsys, tmp_path, profile):
    flags = ["--profile", str(profile), "--instances", "2", "--policy", "round-robin", "--requests", "50"]
    slow = simulated(capsys, *flags, "--rate", "1", "--switch-ms", "9000")["policies"][0]
    told = simulated(capsys, *flags, "--rate", "1")["policies"][0]
    assert (told["loads"], told["p50_ms"] < 100) == (slow["loads"], True)
    assert slow["p50_ms"] > 9000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing says what a batch takes"),
        (["--tokens-per-s", "-1"], "--tokens-per-s is -1.0"),
        ([*LINE, "--policy", "lifo"], "the policy is 'lifo'"),
        ([*LINE, "--policy", "fair,omls"], "the policy 'omls' is for instances"),
        ([*LINE, "--module-bytes", "2000000000"], "more than --module-budget-bytes"),
        ([*LINE, "--trace", "nowhere.log"], "nowhere.log"),
        (["--profile", "nowhere.json"], "the profile nowhere.json cannot be read"),
        (["--instances", "1", "--policy", "fair"], "the policy for instances is 'fair'"),
        (["--instances", "1", "--item-ms", "0"], "must be above 0"),
        ([*LINE, "--rate", "5", "--load", "1"], "not allowed with"),
        ([*LINE, "--tenant-weights", "a=no"], "the weight 'no'"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    assert main(["simulate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---- request logs


def test_a_log_comes_back_as_it_was_written(tmp_path):
    requests = [Offered(0.5, "a", (3, 4), None, "batch"), Offered(1.5, "b", (5,), 2.0)]
    write_log(tmp_path / "log", requests, {"name": "x"})
    log = read_log(tmp_path / "log")
    assert (log.requests, log.unread, log.about["name"]) == (requests, 0, "x")
    with (tmp_path / "log").open("a") as file:
        file.write('{"at_s": 0.25, "tenant": "late", "lengths": [9], "outcome": "ok", "total_s": 0.125}\n{"at_s": 7')
    log = read_log(tmp_path / "log")  # its last line was being written
    assert [request.tenant for request in log.requests] == ["late", "a", "b"]
    assert log.total_s[0] == 0.125
    assert log.total_s[1] != log.total_s[1]


def test_batches_in_a_log_tell_how_fast_its_machine_was(capsys, tmp_path):
    """Told 1 ms and 0.1 ms a token, which makes 11 and 21 ms. In the first second they took 44 ms and, from when that
    one ended, 84 ms; in the third one 33 ms; in the others nothing is known but the mean."""
    write_log(tmp_path / "log", [Offered(0.25 + i, "a", (100,)) for i in range(4)], {})
    batches = [(100, 4, 2, 0.1, 0.144), (200, 4, 2, 0.11, 0.228), (100, 1, 1, 2.4, 2.533)]
    with (tmp_path / "log").open("a") as file:
        file.writelines(json.dumps({"batch": batch}) + "\n" for batch in batches)
        file.write('{"other": 2.5}\n')  # until then the third one waited
    assert read_log(tmp_path / "log").batches == batches
    found = simulated(capsys, *LINE, "--trace", str(tmp_path / "log"))
    # The best line would be below 0 at 0, so it is that through 0.
    slope = (11 * 44 + 21 * 84 + 11 * 33) / (11**2 + 21**2 + 11**2)
    assert found["pace"] == {"slope": pytest.approx(slope, abs=1e-4), "fixed_ms": 0}
    first, third = (44 + 84) / (11 + 21), 33 / 11
    assert found["policies"][0]["mean_ms"] == pytest.approx(11 * (first + third + 2 * slope) / 4, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 of .* is not JSON"),
        ("{}\n", "no request log of format 2"),
        ('{"request_log": 2}\n[1]\n', "line 2 of .* is no JSON object"),
        ('{"request_log": 2}\n{"batch": [1, 2, 3]}\n', "line 2 of .* is no batch"),
        ('{"request_log": 2}\n{"batch": [0, 1, 1, 0.5, 0.6]}\n', "line 2 of .* is no batch"),
        ('{"request_log": 2}\n{"at_s": 1}\n', "line 2 of .* is no request"),
        ('{"request_log": 2}\n{"at_s": 1, "tenant": "a", "lengths": [0]}\n', "line 2 of .* is no request"),
        ('{"request_log": 2}\n{"at_s": 1, "tenant": "a", "lengths": [1], "priority": "x"}\n', "line 2"),
    ],
)
def test_what_is_no_log_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(CorruptFile, match=message):
        read_log(tmp_path / "log")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log(tmp_path / "missing")
