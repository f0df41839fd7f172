"""The documents say what the result files say, and the README's code runs."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_table_is_generated_from_the_committed_results(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    assert importlib.import_module("tables").main(["--check"]) == 0, capsys.readouterr().out


def test_the_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "document, least",
    [
        ("README.md", 6),
        ("CONTRIBUTING.md", 6),
        ("docs/performance.md", 2),
        ("docs/kernels.md", 4),
        ("docs/scaling.md", 2),
        ("docs/data.md", 1),
        ("docs/transfer.md", 1),
        ("docs/method.md", 12),
    ],
)
def test_the_files_that_a_document_names_exist(document, least):
    named = re.findall(r"`((?:mopro_fast|csrc|kernels|bench|docs|tests)/[\w/.]*)`", (ROOT / document).read_text())
    assert len(named) >= least
    assert [n for n in named if not (ROOT / n).exists()] == []
