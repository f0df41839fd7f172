"""What every result file says about where it was measured."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as mopro_fast/cli.py does, before torch is imported

import torch

from mopro_fast import __version__, environment
from mopro_fast.files import write_json

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict:
    """Hardware, versions, commit and date, for the head of a result file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = environment.collect()
    extension = found["extension"]
    return {
        "gpu": gpu,
        "driver": found["driver"] if gpu else None,
        "clocks": _clocks() if gpu else None,
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": found["triton"],
        "extension": {name: extension[name] for name in ("usable", "nvcc", "archs") if name in extension},
        "mopro_fast": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, result: dict, folder: Path = RESULTS) -> Path:
    """The whole file or, if this is killed meanwhile, what was there."""
    path = Path(folder) / f"{name}.json"
    write_json(path, {"conditions": conditions(), **result})
    return path


def commit(folder: Path = Path(__file__).parent) -> str:
    """Of a repository, this one; where there is none, as in a copy of its files, what MOPRO_FAST_COMMIT says."""
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    return _first_line(git) or os.environ.get("MOPRO_FAST_COMMIT") or "unknown"


def _clocks() -> str:
    """SM and memory clock now, and the SM clock's maximum; empty where nvidia-smi says nothing."""
    return _first_line(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"])


def _first_line(command: list[str]) -> str:
    """Empty where the command is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
