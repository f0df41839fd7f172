"""Two processes with the same command line at once: python tests/two_writers.py [ROUNDS [COMMAND ...]] prints a table.

One must work, with the result that it has alone; the other must end with one line.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import every_command
import torch
from processes import FORKS

# Times and paths of other places.
NOT_COMPARED = {"timing.jsonl"}


def run_at_once(argv: list[str], processes: int, folder: Path) -> list[tuple[int, str]]:
    """-> of each process the exit status and what it wrote on stderr."""
    together = FORKS.Barrier(processes)
    started = [FORKS.Process(target=_member, args=(argv, together, folder / f"{i}.err")) for i in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return [(process.exitcode, (folder / f"{i}.err").read_text()) for i, process in enumerate(started)]


def _member(argv: list[str], together, err: Path) -> None:
    from mopro_fast import cli

    torch.set_num_threads(1)
    with err.open("w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        together.wait()
        cli.main(argv, own=True)


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of a file or of all files in a folder."""
    files = [out] if out.is_file() else [p for p in out.rglob("*") if p.is_file() and p.name not in NOT_COMPARED]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def remove(out: Path) -> None:
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def outcome(command: str, inputs: Path, work: Path) -> str:
    """What happened: "refused", "in turn" (the other began when one had ended), or what was wrong."""
    out = work / "out"
    argv = every_command.arguments(command, inputs, out)
    remove(out)
    (alone,) = run_at_once(argv, 1, work)
    if alone[0]:
        return f"alone: {alone}"
    expected = contents(out)
    remove(out)
    ended = sorted(run_at_once(argv, 2, work))
    (first, _), (second, text) = ended
    lines = text.splitlines()
    told = any(words in text for words in ("another process writes", "exists already", "another check writes"))
    if (first, second) == (0, 2) and (len(lines) != 1 or not told):
        return f"several lines: {text}"
    if first or second not in (0, 2):
        return f"statuses {first} and {second}: {ended}"
    found = contents(out)
    if found.keys() != expected.keys():
        return f"other files: {found.keys() ^ expected.keys()}"
    if command != "bench" and (changed := [name for name in found if found[name] != expected[name]]):
        return f"other bytes: {changed}"
    if left := [p.name for p in work.iterdir() if p.name.startswith(".")]:
        return f"left over: {left}"
    return "refused" if second else "in turn"


def main(rounds: int, commands: list[str]) -> None:
    print(f"{'command':10s} {'refused':>8s} {'in turn':>8s} {'wrong':>6s}")
    for command in commands:
        with tempfile.TemporaryDirectory() as folder:
            inputs, work = Path(folder, "inputs"), Path(folder, "work")
            inputs.mkdir()
            work.mkdir()
            every_command.write_inputs(inputs)
            found = [outcome(command, inputs, work) for _ in range(rounds)]
        wrong = [text for text in found if text not in ("refused", "in turn")]
        print(f"{command:10s} {found.count('refused'):8d} {found.count('in turn'):8d} {len(wrong):6d}", flush=True)
        for text in wrong[:2]:
            print(f"    {text}")


if __name__ == "__main__":
    every = [name for name in every_command.FOLDERS | every_command.FILES if name != "demo"]
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10, sys.argv[2:] or every)
