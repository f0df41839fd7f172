"""What `mopro-fast env` prints: versions, devices, the state of the extension, and each op's backend."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mopro_fast import installed
from mopro_fast.console import escaped, tell
from mopro_fast.installed import apex_is_of_nvidia, covers


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
        "views": _views,
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
    versions = {name: _version(name) for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120")}
    return ", ".join(f"{n} {v}" for n, v in versions.items() if v != "not installed") or "not installed"


def _apex() -> str:
    """Nothing of apex is imported here."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if not apex_is_of_nvidia():
        return f"{_version('apex')}, not NVIDIA's but another package of that name"
    kernels = "with" if importlib.util.find_spec("amp_C") else "without"
    return f"{_version('apex')}, NVIDIA's, {kernels} its CUDA kernels"


def _gpus() -> list[dict[str, str]]:
    import torch

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": g.name, "capability": f"{g.major}.{g.minor}", "memory": f"{g.total_memory / 2**30:.0f} GiB"}
        for g in gpus
    ]


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
    """setup.py's record of the build, and whether the module loads here and fits the GPUs."""
    if not installed.BUILD_INFO.exists():
        return {"usable": False, "reason": "mopro_fast is not installed", "what_to_do": "pip install ."}
    info = json.loads(installed.BUILD_INFO.read_text())
    if not info.pop("cuda"):
        return {"usable": False, **info}
    try:
        importlib.import_module("mopro_fast._C")
    except ImportError as error:
        return {"usable": False, **info, "reason": str(error), "what_to_do": "Install mopro_fast again."}
    capabilities = {gpu["capability"] for gpu in _try(_gpus) if isinstance(gpu, dict)}
    if missed := sorted(c for c in capabilities if not covers(info["archs"], c)):
        reason = f"not built for capability {', '.join(missed)}"
        what_to_do = f'Install again with MOPRO_FAST_CUDA_ARCHS="{";".join(sorted(capabilities))}".'
        return {"usable": False, **info, "reason": reason, "what_to_do": what_to_do}
    return {"usable": True, **info}


def _views() -> str:
    """Who makes the views on a CPU."""
    try:
        importlib.import_module("mopro_fast._views")
    except ImportError as error:
        return f"PyTorch, slower than C++ ({error}): install again where there is a C++ compiler"
    return "C++"


def _backends() -> dict[str, dict[str, str]]:
    from mopro_fast.ops import backends

    return backends.describe()


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in report.items():
        if isinstance(value, str):
            lines.append((name, value))
        elif name == "gpus":
            rows = [f"{gpu['name']}, {gpu['memory']}, capability {gpu['capability']}" for gpu in value]
            lines += [(name, row) for row in rows or ["none that torch can use"]]
        elif name == "extension":
            lines.append((name, "loads" if value["usable"] else f"not usable: {value['reason']}"))
            if "what_to_do" in value:
                lines.append(("", value["what_to_do"]))
            if "nvcc" in value:
                archs = ", ".join(value["archs"])
                lines.append(("", f"built for {archs} by nvcc {value['nvcc']}, {value['compiler']}"))
        elif name == "backends":
            for op, on in value.items():
                lines.append((op, ", ".join(f"{device}: {backend}" for device, backend in on.items())))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mopro-fast env", description="What mopro_fast finds here.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    report = collect()
    if args.json:
        tell(json.dumps(report, indent=2))
        return 0
    lines = _lines(report)
    width = max(len(name) for name, _ in lines) + 2
    for name, value in lines:
        tell(f"{name:{width}}{escaped(value)}")
    return 0
