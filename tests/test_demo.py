"""`mopro-fast demo` as the README has it: by its exit status, its words, and what it leaves behind; its benchmark."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_demo_corrects_labels_and_is_done_when_called_again(tmp_path):
    command = [sys.executable, "-m", "mopro_fast", "demo", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "demo/results.json").read_text())
    # docs/performance.md has the figures; a run that mixes up two digits falls below 90 %.
    assert results["ce_top1"] > 70 and results["mopro_top1"] > max(90, results["ce_top1"])
    assert results["precision"] > 0.7 and results["recall"] > 0.7 and results["corrections"] > 300
    assert f"MoPro                                      {results['mopro_top1']:5.1f} %" in first.stdout
    assert (tmp_path / "demo/demo.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stderr.count("is finished") == 2
    assert json.loads((tmp_path / "demo/results.json").read_text()) == results
    report = [sys.executable, "-m", "mopro_fast", "report", str(tmp_path / "demo/mopro")]
    assert subprocess.run(report, capture_output=True, text=True).returncode == 0


def test_settings_of_the_demo_are_compared_on_held_out_images(tmp_path):
    tiny = "--epochs 2 --start-clean 1 --width 0.0625"
    command = [sys.executable, "bench/demo_accuracy.py", "--seeds", "2", "--first-seed", "7"]
    command += ["--choose", f"ce=--method ce {tiny}", "--choose", f"mopro={tiny} --alpha {{0,1}}"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ended.returncode == 0, ended.stderr
    runs = json.loads((tmp_path / "demo_choice.json").read_text())["runs"]
    assert [(r["name"], r["seed"]) for r in runs] == [
        (name, seed) for name in ("ce", "mopro alpha=0", "mopro alpha=1") for seed in (7, 8)
    ]
    assert all(0 < r["held_out_top1"] < 100 and (r["least_left"] is None) == (r["name"] == "ce") for r in runs)
    assert "| mopro alpha=1 (`--epochs 2" in ended.stdout


def test_settings_of_the_demo_of_capro_are_compared_and_share_a_first_stage(tmp_path):
    tiny = "--epochs 1 --width 0.0625"
    command = [sys.executable, "bench/demo_accuracy.py", "--capro", "--seeds", "1", "--first-seed", "7"]
    command += ["--choose", f"anchors=vanilla {tiny} match --anchors {{2,5}} capro {tiny} --start-clean 1"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ended.returncode == 0, ended.stderr
    runs = json.loads((tmp_path / "demo_capro_choice.json").read_text())["runs"]
    assert [r["name"] for r in runs] == ["anchors anchors=2", "anchors anchors=5"]
    assert len({r["vanilla_top1"] for r in runs}) == 1 and ended.stderr.count("is finished") == 1
