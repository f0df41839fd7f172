"""What the other tests stand on: typed ids, compilers' outputs kept, and a Makefile that deletes nothing of value."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compiled import kept
from conftest import pytest_make_parametrize_id

ROOT = Path(__file__).parent.parent
KEPT = {"Makefile", "runs/v1/checkpoints/step_1.pt", "mine/pyvenv.cfg", "mopro_fast/cli.py"}  # by make clean


@pytest.mark.parametrize(
    "value, typed",
    [
        ("q must have shape [N, D], got <3>", "q-must-have-shape-N-D-got-3"), (" ü ", "no-x"), ("", "no-x"),
        ("a" * 99, "a" * 60), ({"momentum": 0.1, "of": (1, None)}, "momentum=0.1_of=1_None"), ((), "no-x"),
        ((torch.float32, -1), "float32_-1"), (Path("csrc/ops.h"), "ops.h"), (len, "len"), (lambda: 0, "lambda"),
        (torch.zeros(1), None), ([object()], None),
    ],
    ids=range(12),
)  # fmt: skip
def test_ids_are_made_of_what_can_be_typed(value, typed):
    assert pytest_make_parametrize_id(value, "x") == typed


@pytest.mark.slow
def test_the_interpreter_as_triton_has_it_agrees():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "tests/test_ops.py",
        "-k",
        "test_mopro_loss and triton and 9-10-70",
    ]
    environment = {**os.environ, "PLAIN_INTERPRETER": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "8 passed" in result.stdout, result.stdout


def test_what_is_compiled_is_kept_until_what_decides_it_changes(tmp_path):
    source, made = tmp_path / "kernel.cu", []

    def output(*decides) -> str:
        def make(path: Path) -> None:
            made.append(decides)
            path.write_text(source.read_text().upper())

        return kept(tmp_path / "cache", "kernel.txt", [source, *decides], make).read_text()

    (tmp_path / "cache").mkdir()
    source.write_text("one")
    assert output("-O3", "13.0") == output("-O3", "13.0") == "ONE" and len(made) == 1
    assert output("-O", "313.0") == output("-O3", "13.1") == "ONE" and len(made) == 3
    source.write_text("two")
    assert output("-O3", "13.0") == "TWO" and len(made) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4  # no lock, nothing half written


def test_of_several_one_compiles_and_a_failure_keeps_nothing(tmp_path):
    made = []

    def make(path: Path) -> None:
        made.append(path)
        if len(made) == 1:
            path.write_text("half")
            raise RuntimeError("the compiler says no")
        path.write_text("whole")

    with pytest.raises(RuntimeError, match="says no"):
        kept(tmp_path, "x.txt", ["same"], make)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kept(tmp_path, "x.txt", ["same"], make).read_text(), range(4)))
    assert found == ["whole"] * 4 and len(made) == 2


@pytest.fixture
def checkout(tmp_path):
    """The Makefile, what builds and tests leave behind, and what people would miss."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    builds = ["build/x.o", "mopro_fast/_C.cpython-311.so", "mopro_fast/_build_info.json", ".pytest_cache/x"]
    for name in [*builds, *KEPT, ".venv/made-by-make", "mine/pyvenv.cfg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def make(folder: Path, *words: str) -> str:
    ours = ("MAKE", "MFLAGS", "PYTHON", "TORCH", "TRITON", "NUMPY", "VENV", "JOBS")  # of the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    result = subprocess.run(["make", "-C", folder, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_make_clean_keeps_trainings_and_the_environment(checkout):
    make(checkout, "clean")
    assert left(checkout) == {*KEPT, ".venv/made-by-make"}


@pytest.mark.parametrize("options, gone", [([], True), (["VENV="], False), (["VENV=mine"], False)])
def test_make_distclean_removes_an_environment_and_nothing_else(options, gone, checkout):
    make(checkout, "distclean", *options)
    assert left(checkout) == (KEPT if gone else {*KEPT, ".venv/made-by-make"})


def test_make_distclean_never_removes_the_checkout(checkout):
    (checkout / "made-by-make").touch()
    result = subprocess.run(["make", "-C", checkout, "distclean", f"VENV={checkout}"], capture_output=True, text=True)
    assert result.returncode != 0 and "holds this checkout: it stays" in result.stderr
    assert left(checkout) >= KEPT


def test_another_pytorch_or_python_is_another_environment():
    def stamp(*words: str) -> str:
        return re.search(r"^touch (\S+)$", make(ROOT, "--dry-run", "--always-make", "test", *words), re.M)[1]

    same = stamp("VENV=other", "TORCH=torch==2.11.0")
    assert same == stamp("VENV=other", "TORCH=torch==2.11.0") and same.startswith("other/ready-")
    asked = ["TORCH=torch==2.11.0 TRITON=triton==3.6.0", "TORCH=torch==2.11.0 PYTHON=python3.12", "TORCH=torch==2.12.0"]
    asked.append("TORCH=torch==2.11.0 NUMPY=numpy<2.4")
    assert len({same, *(stamp("VENV=other", *words.split()) for words in asked)}) == 5
