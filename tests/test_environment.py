import importlib
import json
import sys

import pytest

from mopro_fast import environment, installed


@pytest.fixture
def build_info(tmp_path, monkeypatch):
    path = tmp_path / "_build_info.json"
    monkeypatch.setattr(installed, "BUILD_INFO", path)
    return path


def test_json(capsys):
    assert environment.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert report["torch"][0].isdigit()
    assert set(report["backends"]["ema_update_"]) == {"cpu", "cuda"}


def test_text_is_aligned(capsys):
    assert environment.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index(environment._version("mopro_fast"))
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


@pytest.mark.usefixtures("build_info")
def test_without_anything(monkeypatch, capsys):
    """No torch, no nvidia-smi, no build record, no distribution: still a report."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "mopro_fast.ops", None)
    monkeypatch.setattr(environment.importlib.metadata, "distribution", _missing)
    monkeypatch.setenv("PATH", "")
    report = environment.collect()
    assert report["torch"].startswith("unavailable: ModuleNotFoundError")
    assert report["backends"].startswith("unavailable: ")
    assert report["driver"] == "none (no nvidia-smi)"
    assert report["dali"] == report["triton"] == "not installed"
    assert not report["extension"]["usable"]
    assert environment.main([]) == 0
    assert "mopro_fast is not installed" in capsys.readouterr().out


def _missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_extension_not_built(build_info, capsys):
    build_info.write_text(json.dumps({"cuda": False, "reason": "nvcc not found.", "what_to_do": "Get it."}))
    environment.main([])
    out = capsys.readouterr().out
    assert "not usable: nvcc not found." in out and "Get it." in out


def test_views(monkeypatch):
    monkeypatch.setitem(sys.modules, "mopro_fast._views", object())
    assert environment.collect()["views"] == "C++"
    monkeypatch.setitem(sys.modules, "mopro_fast._views", None)
    assert "install again where there is a C++ compiler" in environment.collect()["views"]


def test_extension_does_not_load(build_info, monkeypatch):
    build_info.write_text(json.dumps({"cuda": True, "archs": ["90"], "nvcc": "13.0", "compiler": "GNU 12"}))
    monkeypatch.setitem(sys.modules, "mopro_fast._C", None)
    report = environment.collect()["extension"]
    assert not report["usable"] and "_C" in report["reason"] and report["archs"] == ["90"]


def test_extension_for_another_gpu(build_info, monkeypatch):
    info = {"cuda": True, "archs": ["80-real", "90"], "nvcc": "13.0", "compiler": "GNU 12"}
    build_info.write_text(json.dumps(info))
    monkeypatch.setitem(sys.modules, "mopro_fast._C", object())
    gpu = {"name": "Tesla T4", "memory": "15 GiB", "capability": "7.5"}
    monkeypatch.setattr(environment, "_gpus", lambda: [gpu])
    assert 'MOPRO_FAST_CUDA_ARCHS="7.5"' in environment.collect()["extension"]["what_to_do"]
    gpu["capability"] = "8.6"
    assert environment.collect()["extension"]["usable"]


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        (["80-real", "90"], "8.9", True),
        (["80-real", "90"], "12.0", True),
        (["90-real"], "12.0", False),
        (["90-real"], "10.0", False),
        (["89-real"], "8.6", False),
        (["80-virtual"], "9.0", True),
        (["90a"], "9.0", True),
        (["90a"], "10.0", False),
    ],
)
def test_covers(archs, capability, expected):
    assert installed.covers(archs, capability) == expected


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([], "not NVIDIA's"),
        (["optimizers", "normalization", "multi_tensor_apply"], "NVIDIA's, without its CUDA kernels"),
    ],
)
def test_apex(tmp_path, monkeypatch, folders, expected):
    package = tmp_path / "apex"
    for folder in ["", *folders]:
        (package / folder).mkdir(exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "amp_C", None)  # not installed
    assert environment._apex().split(", ", 1)[1].startswith(expected)
    assert "apex" not in sys.modules
