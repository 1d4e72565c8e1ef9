"""What the GPU suite writes, from the files that its steps leave."""

import json
import shutil
import subprocess

import pytest
import torch

from benchmarks import device_report
from benchmarks.experiments import pets_streams
from benchmarks.report import ROOT
from vbert.errors import ConfigError

JUNIT = """<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>
</testcase><testcase classname="a" name="not"><skipped/></testcase></testsuite></testsuites>"""
SUITE = ROOT / "benchmarks/device_suite.sh"


@pytest.fixture
def folder(tmp_path):
    steps = [{"step": "operators", "exit_code": 1, "seconds": 3}, {"step": "device", "exit_code": 0, "seconds": 2}]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "operators.xml").write_text(JUNIT)
    (tmp_path / "operators.log").write_text("what went wrong\n")
    (tmp_path / "device.log").write_text('a warning\n{"benchmark": "device", "rows": [1]}\n')
    return tmp_path


def test_the_report_holds_tests_results_and_the_end_of_a_failed_log(folder):
    operators, device = device_report.report(folder)["steps"]
    assert operators["tests"] == {"total": 3, "failure": 1, "error": 0, "skipped": 1, "failed": ["a::bad"]}
    assert operators["end_of_log"] == "what went wrong\n"
    assert device["results"] == [{"benchmark": "device", "rows": [1]}]


def test_a_failed_step_fails_the_suite(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(folder), str(folder)])
    assert device_report.main() == 1
    assert "failed: operators" in capsys.readouterr().out
    assert json.loads((folder / "suite.json").read_text())["machine"]["python"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on PATH")
def test_the_suite_is_a_script_that_bash_reads():
    assert subprocess.run(["bash", "-n", str(SUITE)], check=False).returncode == 0
    text = SUITE.read_text()
    limits = [int(line.split()[2]) for line in text.splitlines() if line.strip().startswith("step ")]
    assert len(limits) >= 3
    assert sum(limits) < 480, "all steps at their limits take more than 8 minutes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_experiment_with_streams_says_that_it_needs_a_gpu():
    with pytest.raises(ConfigError, match="streams are of a GPU"):
        pets_streams.main([])
