"""tests/gpu.sh without a GPU: a dry run, stages that fail or do not end, and what it leaves behind."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from mopro_fast.models.speedups import SPEEDUPS

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("gpu.sh").read_text()
# STAGE: (limit, expected seconds), of the groups that are planned.
PLANNED = {
    group: {
        name: (int(limit), int(expected))
        for name, limit, expected in re.findall(r"^  ([\w-]+):(\d+) +# (\d+)", entries, re.M)
    }
    for group, entries in re.findall(r"^(first|second)=\(\n(.*?)^\)", SCRIPT, re.M | re.S)
}
STAGES = list(PLANNED["first"] | PLANNED["second"])


class Run:
    """tests/gpu.sh in the background; every process that it starts inherits a variable."""

    def __init__(self, out: Path, *words: str, python: str | Path = sys.executable) -> None:
        self.out, self.variable = out, f"GPU_SCRIPT_TEST={uuid.uuid4()}"
        name, value = self.variable.split("=")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        environment |= {"PYTHON": str(python), "OUT": str(out), name: value}
        self.process = subprocess.Popen(
            ["bash", "tests/gpu.sh", *words],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def end(self) -> int:
        self.printed, _ = self.process.communicate()
        return self.process.returncode

    def table(self) -> dict[str, str]:
        """STAGE: verdict, of what it printed last."""
        lines = self.printed.rpartition("\n\n")[2].splitlines()
        return {name: verdict for name, verdict in (line.split(": ", 1) for line in lines)}

    def processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.variable.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:  # another user's, or gone
                continue
        return found


@pytest.mark.medium
def test_a_dry_run_passes_every_stage(tmp_path):
    run = Run(tmp_path / "out", "--dry", "--limit", "all=900", "first", "second")
    status = run.end()
    table = run.table()
    assert list(table) == STAGES, run.printed
    verdict = r"passed, [\d.]+ s|skipped \([\w.]+ is missing: carry its wheel in \.whl\)"
    assert [name for name in table if not re.match(verdict, table[name])] == [], run.printed
    assert status == 0
    files = [path.relative_to(run.out) for path in run.out.rglob("*") if path.is_file()]
    assert {"first.log", "second.log"} <= {str(path) for path in files}
    assert len(files) <= 8 and all(len(path.parts) <= 3 for path in files)
    for path in files:
        if path.suffix == ".json":
            json.loads((run.out / path).read_text())
    assert "\nright: ema_update_ sgd_ema_update_\n" in (run.out / "first.log").read_text()
    assert run.processes() == []


@pytest.mark.medium
def test_a_dry_run_of_the_speedups_runs_each(tmp_path):
    run = Run(tmp_path / "out", "--dry", "speedups")
    assert run.end() == 0 and list(run.table()) == ["speedups"], run.printed
    cases = json.loads((run.out / "step_speedups.json").read_text())["cases"]
    names = ["ours", *(f"ours, {name} on" for name in (*SPEEDUPS, "all speed-ups"))]
    assert [(case["batch"], list(case["variants"])) for case in cases] == [(8, names), (4, names)]


@pytest.mark.medium
def test_stages_that_reach_their_limit_are_stopped_with_all_their_processes(tmp_path):
    run = Run(tmp_path, "--dry", "--limit", "all=0.3", "first", "second")
    assert run.end() == 1
    table = run.table()
    assert list(table) == STAGES
    assert {verdict.partition(",")[0] for verdict in table.values()} == {"stopped at its limit of 0.3 s"}, run.printed
    assert run.processes() == []


@pytest.fixture
def python(tmp_path):
    """A python that does nothing but fail in bench/ops.py, at length, and never end in tests/gpu_trainer.py nccl."""
    path = tmp_path / "python"
    path.write_text(
        """#!/bin/bash
        case "$*" in
          *bench/ops.py*) echo beginning; yes | head -c 5000000
            printf 'it says why%400s' x; exit 3 ;;
          *gpu_trainer.py\\ nccl*) trap '' TERM; setsid sleep 999 & echo $!; sleep 999; wait ;;
          *-c*find_spec*\\ pytest*) echo 'pytest is missing' ;;
          *gpu_trainer*) echo early; echo; echo 'accuracy 12 %' ;;
        esac
        """
    )
    path.chmod(0o755)
    return path


def test_a_stage_that_fails_shows_its_end_and_stops_no_other(tmp_path, python):
    run = Run(tmp_path / "out", "--dry", "ops-timed", "resume", "step-32", "op-tests", python=python)
    assert run.end() == 1
    assert [(name, re.split(", at|,", verdict)[0]) for name, verdict in run.table().items()] == [
        ("step-32", "passed"),
        ("op-tests", "skipped (pytest is missing)"),
        ("resume", "passed"),
        ("ops-timed", "FAILED (status 3)"),
    ]
    at_once = run.printed.rpartition("\n\n")[0]
    assert re.search(r"^ops-timed: FAILED .*\n(    y\n){19}    it says why {289}$", at_once, re.M), at_once[-999:]
    assert re.search(r"^resume: passed, .*\n +early\n +accuracy 12 %$", at_once, re.M)
    log = (tmp_path / "out/second.log").read_text()
    assert 2e6 < len(log) < 2.01e6 and "\nbeginning\n" in log and "\n... cut ...\n" in log and log.endswith(" x")


@pytest.mark.medium
def test_what_leaves_its_session_and_is_deaf_to_sigterm_is_killed(tmp_path, python):
    run = Run(tmp_path / "out", "--dry", "nccl", "resume", "--limit", "nccl=0.2", python=python)
    assert run.end() == 1
    assert [verdict.partition(",")[0] for verdict in run.table().values()] == [
        "stopped at its limit of 0.2 s",
        "passed",
    ]
    assert run.processes() == []


def test_interrupted_it_says_what_has_passed_and_leaves_nothing(tmp_path, python):
    run = Run(tmp_path / "out", "--dry", "step-32", "nccl", "resume", python=python)
    log = tmp_path / "out/second.log"
    while not (log.exists() and re.search(r"^\d+$", log.read_text(), re.M)):
        assert run.process.poll() is None
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert [verdict.partition(",")[0] for verdict in run.table().values()] == ["passed", "interrupted"]
    assert run.processes() == []


@pytest.mark.parametrize(
    "words", [["--dry", "sanitize"], ["--limit", "smoke"], ["--limit", "smok=9"], ["--limit", "smoke=soon"], ["--wet"]]
)
def test_what_it_does_not_know_is_refused(words, tmp_path):
    run = Run(tmp_path / "out", *words)
    assert run.end() == 2 and not run.out.exists()
    assert all(name in run.printed for name in (*PLANNED, *STAGES, "long", "throughput"))


def test_smoke_finds_every_op(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    program = re.search(r"sed -n '(.*)' bench/cases.py", SCRIPT)[1]
    found = subprocess.run(["sed", "-n", program, ROOT / "bench/cases.py"], capture_output=True, text=True).stdout
    assert found.split() == list(importlib.import_module("cases").FIELDS)


def test_a_group_is_planned_for_five_minutes():
    assert set(PLANNED) == {"first", "second"}
    for stages in PLANNED.values():
        assert sum(expected for _, expected in stages.values()) <= 300
        assert all(expected < limit for limit, expected in stages.values())


def test_every_file_with_a_test_for_a_gpu_belongs_to_a_stage():
    marked = {
        path.name
        for path in Path(__file__).parent.glob("test_*.py")
        if re.search(r"mark\.gpu\b|^def test_.*\bkernels\b", path.read_text(), re.M)
    }
    named = {path.name for words in re.findall(r"tests/[\w*]+\.py", SCRIPT) for path in ROOT.glob(words)}
    assert len(marked) >= 12 and marked - {Path(__file__).name} <= named
