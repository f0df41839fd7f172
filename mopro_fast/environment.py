"""What `mopro-fast env` prints: the versions and devices a bug report needs, and why an op runs on which backend."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BUILD_INFO = Path(__file__).with_name("_build_info.json")  # written by setup.py
APEX_OF_NVIDIA = ("optimizers", "normalization", "multi_tensor_apply")


def collect() -> dict[str, Any]:
    """Everything as plain JSON values. What is missing or broken is said in the value; nothing raises."""
    parts: dict[str, Callable[[], Any]] = {
        "mopro_fast": lambda: _version("mopro_fast"),
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "os": platform.platform,
        "torch": _torch,
        "nccl": _nccl,
        "triton": lambda: _version("triton"),
        "dali": _dali,
        "apex": _apex,
        "gpus": _gpus,
        "driver": _driver,
        "extension": _extension,
        "backends": _backends,
    }
    return {name: _try(part) for name, part in parts.items()}


def _try(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except Exception as error:  # whatever a broken installation raises belongs in the report
        return f"unavailable: {type(error).__name__}: {error}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _torch() -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return f"{torch.__version__} ({cuda})"


def _nccl() -> str:
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return "not in this build of torch"
    return ".".join(map(str, torch.cuda.nccl.version()))


def _dali() -> str:
    names = {name for name in importlib.metadata.packages_distributions().get("nvidia", []) if "dali" in name}
    return ", ".join(f"{name} {_version(name)}" for name in sorted(names)) or "not installed"


def _apex() -> str:
    """NVIDIA's apex is not on PyPI; the apex there is another project. Told apart without importing either."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any(all((folder / name).is_dir() for name in APEX_OF_NVIDIA) for folder in folders):
        return f"{_version('apex')}, not NVIDIA's but another package of that name"
    kernels = "with" if importlib.util.find_spec("amp_C") else "without"
    return f"{_version('apex')}, NVIDIA's, {kernels} its CUDA kernels"


def _gpus() -> list[dict[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        gpus.append({"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": memory})
    return gpus


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return "none (no nvidia-smi)"
    if result.returncode:
        return f"unavailable: nvidia-smi: {(result.stdout + result.stderr).strip()}"
    return result.stdout.split("\n")[0]


def _extension() -> dict[str, Any]:
    """setup.py's record of the build, and whether the module loads now."""
    if not BUILD_INFO.exists():
        return {"loads": False, "reason": "mopro_fast is not installed", "what_to_do": "pip install ."}
    info = json.loads(BUILD_INFO.read_text())
    if not info.pop("cuda"):
        return {"loads": False, **info}
    try:
        importlib.import_module("mopro_fast._C")
    except ImportError as error:
        return {"loads": False, "reason": str(error), "what_to_do": "Install mopro_fast again.", **info}
    return {"loads": True, **info}


def _backends() -> dict[str, dict[str, str]]:
    from mopro_fast.ops import backends

    return backends.describe()


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [(name, value) for name, value in report.items() if isinstance(value, str)]
    for name, value in report.items():
        if name == "gpus" and isinstance(value, list):
            rows = [f"{gpu['name']}, {gpu['memory']}, capability {gpu['capability']}" for gpu in value]
            lines += [(f"gpu {i}", row) for i, row in enumerate(rows)] or [("gpus", "none that torch can use")]
        elif name == "extension" and isinstance(value, dict):
            built = f"for {', '.join(value['archs'])} by nvcc {value['nvcc']} and {value['compiler']}" if "nvcc" in value else ""
            state = "built" if value["loads"] else f"not usable: {value['reason']}"
            lines.append((name, f"{state} {built}".strip()))
            if "what_to_do" in value:
                lines.append(("", value["what_to_do"]))
        elif name == "backends" and isinstance(value, dict):
            for op, devices in value.items():
                lines.append((op, ", ".join(f"{backend} on {device}" for device, backend in devices.items())))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mopro-fast env", description="What mopro_fast finds on this machine.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    lines = _lines(report)
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        print(f"{name:{width}}{value}")
    return 0
