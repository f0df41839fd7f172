"""`mopro-fast demo` as the README has it: by its exit status, its words, and what it leaves behind."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_corrects_labels_and_is_done_when_called_again(tmp_path):
    command = [sys.executable, "-m", "mopro_fast", "demo", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "demo/results.json").read_text())
    # docs/performance.md has the figures; these hold on a seed that loses two digits, too.
    assert results["ce_top1"] > 70 and results["mopro_top1"] > 70
    assert results["precision"] > 0.5 and results["recall"] > 0.5 and results["corrections"] > 300
    assert f"MoPro                                      {results['mopro_top1']:5.1f} %" in first.stdout
    assert (tmp_path / "demo/demo.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("is finished") == 2
    assert json.loads((tmp_path / "demo/results.json").read_text()) == results
    report = [sys.executable, "-m", "mopro_fast", "report", str(tmp_path / "demo/mopro")]
    assert subprocess.run(report, capture_output=True, text=True).returncode == 0
