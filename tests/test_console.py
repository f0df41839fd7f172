"""What a command shows never ends it, and moves no terminal's cursor but by its own bars and colours."""

import ast
import contextlib
import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import every_command
import pytest

from mopro_fast import cli, console
from mopro_fast.console import Progress, escaped, guarded, say, tell

ROOT = Path(__file__).parent.parent
BAD_NAME = "a\x1b]0;title\x07\x1b[2J\r\nb\u202e\udcff"
HARMLESS = r"a\x1b]0;title\x07\x1b[2J\r\nb\u202e\xff"


def gone() -> int:
    """A descriptor whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def closed_terminal() -> int:
    master, terminal = pty.openpty()
    os.close(master)
    return terminal


BROKEN = {"gone": gone, "closed-terminal": closed_terminal, "full": lambda: os.open("/dev/full", os.O_WRONLY)}


# As processes: Python's own start and end are a part of it.

NO_SPACE = "mopro-fast: error: the output is not whole: stdout cannot be written (No space left on device)\n"
CASES = {  # the words, what becomes of stdout and stderr, and the status
    "a report whose reader has gone": ("--help", "gone", None, 0),
    "a report on a closed terminal": ("--help", "closed-terminal", None, 0),
    "a report and a full disk": ("--help", "full", None, 1),
    "both full": ("--help", "full", "full", 1),
    "an error whose reader has gone": ("trian", None, "gone", 2),
    "an error and a full disk": ("trian", None, "full", 2),
    "an error on a closed terminal": ("trian", "closed-terminal", "closed-terminal", 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_process_ends_as_without_the_fault(case, unbuffered):
    word, *kinds, status = CASES[case]
    streams = [subprocess.PIPE if kind is None else BROKEN[kind]() for kind in kinds]
    command, environment = [sys.executable, "-m", "mopro_fast", word], {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=streams[0], stderr=streams[1], text=True, env=environment)
    for kind, stream in zip(kinds, streams, strict=True):
        if kind is not None:
            os.close(stream)
    assert ended.returncode == status and not ended.stdout
    assert ended.stderr in (None, NO_SPACE if kinds[0] == "full" else "")


@pytest.mark.parametrize("closed", ["0", "1", "2", "012"])
def test_streams_that_were_closed_from_the_start(closed):
    code = (
        "import os, sys; from mopro_fast.console import *\n"
        "with guarded() as whole:\n"
        "    say('said'); tell('told'); assert whole()\n"
        "    assert os.open('/dev/null', os.O_RDONLY) > 2\n"
        "    assert all(os.get_inheritable(n) for n in range(3))"
    )

    def close():
        for n in map(int, closed):
            os.close(n)

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=close, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ("" if "1" in closed else "told\n") and ended.stderr == ("" if "2" in closed else "said\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:replace", "utf-8"])
def test_encodings_that_lack_characters(encoding):
    command, environment = [sys.executable, "-m", "mopro_fast", "--help"], {**os.environ, "PYTHONIOENCODING": encoding}
    ended = subprocess.run(command, capture_output=True, env=environment)
    assert ended.returncode == 0 and not ended.stderr
    dots = {"ascii:replace": "?", "utf-8": "…"}.get(encoding, "...")
    assert f"usage: mopro-fast COMMAND {dots}\n" in ended.stdout.decode()


# In this process.


@pytest.fixture
def pythons(monkeypatch):
    """Put streams on these descriptors in the place of Python's own."""
    opened = []

    def put(stdout: int, stderr: int, encoding: str = "utf-8"):
        for name, descriptor in (("stdout", stdout), ("stderr", stderr)):
            opened.append(open(descriptor, "w", encoding=encoding))  # noqa: SIM115
            monkeypatch.setattr(sys, name, opened[-1])
            monkeypatch.setattr(sys, f"__{name}__", opened[-1])

    yield put
    for file in opened:
        file.close()


def test_training_goes_on_and_saves(tmp_path, pythons):
    inputs = every_command.write_inputs(tmp_path)
    pythons(closed_terminal(), gone(), "ascii")
    streams = sys.stdout, sys.stderr
    with pytest.raises(SystemExit) as ended:
        cli.main(every_command.arguments("train", inputs, tmp_path / "out"))
    assert ended.value.code == 0 and list((tmp_path / "out/checkpoints").iterdir())
    assert (sys.stdout, sys.stderr) == streams


@pytest.mark.usefixtures("capsys")
def test_streams_of_others_stay():
    before = sys.stdout, sys.stderr
    with guarded() as whole:
        assert (sys.stdout, sys.stderr) == before and whole()


def test_child_processes_write_into_a_closed_pipe_no_more(pythons):
    pythons(writer := gone(), os.open(os.devnull, os.O_WRONLY))
    with guarded() as whole:
        tell("text")
        assert whole()
        assert subprocess.run(["echo", "text"], stdout=writer).returncode == 0


def test_a_pipe_that_does_not_block_gets_everything(pythons):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pythons(writer, os.open(os.devnull, os.O_WRONLY))
    with subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE) as count, guarded() as whole:
        os.close(reader)
        tell("x" * 300_000)
        assert whole()
        sys.__stdout__.close()
        assert int(count.stdout.read()) == 300_001


def test_lines_come_at_once_where_they_did(pythons):
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pythons(writer, os.open(os.devnull, os.O_WRONLY))
    sys.stdout.reconfigure(line_buffering=True)
    with guarded():
        tell("text")
        assert os.read(reader, 9) == b"text\n"
    os.close(reader)


def on_terminal(pythons, work) -> str:
    """What ``work`` shows on a terminal."""
    master, terminal = pty.openpty()
    termios.tcsetwinsize(master, (24, 80))
    pythons(terminal, os.dup(terminal))
    with guarded():
        work()
    sys.__stdout__.close()
    sys.__stderr__.close()
    shown = b""
    with contextlib.suppress(OSError):  # the end
        while piece := os.read(master, 1 << 16):
            shown += piece
    os.close(master)
    return shown.decode()


def test_what_is_shown_moves_no_cursor(pythons, capsys):
    assert escaped("tench, Tinca tinca") == "tench, Tinca tinca" and escaped(BAD_NAME) == HARMLESS
    say(BAD_NAME)
    tell(f"{escaped(BAD_NAME)}\nnext")
    out, err = capsys.readouterr()
    assert err == f"{HARMLESS}\n" and out == f"{HARMLESS}\nnext\n"
    with pytest.raises(SystemExit):
        cli.main(["--data\x1b[2J\n"])
    assert capsys.readouterr().err.count("\n") == 1
    # What others print.
    assert on_terminal(pythons, lambda: print("\x1b[31mred\x1b[0m \x1b[2J\x08\x9b")) == (
        "\x1b[31mred\x1b[0m \\x1b[2J\\x08\\x9b\r\n"
    )


def test_colours_are_for_terminals(pythons, tmp_path):
    pythons(os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_WRONLY))
    with guarded():
        print("\x1b[1;31mred\x1b[0m")
    assert (tmp_path / "out").read_text() == "red\n"


# Progress.


def test_a_bar_on_a_terminal_with_lines_above_it(pythons):
    def work():
        with Progress("check\r", 3, "images") as bar:
            bar.update()
            bar.note("1 MB")
            say("a line")
            bar.update(2)

    shown = on_terminal(pythons, work)
    assert r"check\r:" in shown and "1/3" in shown and "a line\r\n" in shown


def test_elsewhere_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def lines(seconds: float, total: int, done: int = 0, **options) -> list[str]:
        with Progress("check", total, "images", done=done, **options) as bar:
            for _ in range(done, total):
                now[0] += seconds
                bar.note("1 MB")
                bar.update()
        return capsys.readouterr().err.splitlines()

    assert lines(0.9, 11) == []  # short work
    assert len(lines(1, 1000)) == pytest.approx(1000 / 61, abs=1)  # a minute
    tenths = lines(0.2, 1000)
    assert len(tenths) == 10 and tenths[0] == "check: 100 of 1000 images, 5 per second, 3m00s left, 1 MB"
    assert lines(1, 1000, active=False) == lines(1, 1000, lines=False) == []
    assert lines(61, 9, done=7)[0] == "check: 8 of 9 images, 0.0164 per second, 1m01s left, 1 MB"


def test_everything_is_shown_by_the_console():
    for file in (ROOT / "mopro_fast").rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
        assert file.name == "console.py" or not names & {"print", "tqdm"}, f"{file}: say, tell or Progress instead"


def test_decoding_errors_stay_errors():
    with pytest.raises(UnicodeDecodeError):
        io.TextIOWrapper(io.BytesIO(b"\xff"), "ascii", "mopro_fast.readable").read()
