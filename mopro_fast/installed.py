"""How the compiled extension was built, and whose apex is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from mopro_fast.errors import UserError

BUILD_INFO = Path(__file__).with_name("_build_info.json")  # written by setup.py
APEX_OF_NVIDIA = ("optimizers", "normalization", "multi_tensor_apply")


def apex_is_of_nvidia() -> bool:
    """NVIDIA's apex is not on PyPI; the apex there is another project."""
    folders = [Path(folder) for folder in importlib.util.find_spec("apex").submodule_search_locations or []]
    return any(all((folder / name).is_dir() for name in APEX_OF_NVIDIA) for folder in folders)


def require_apex(wanted: str) -> None:
    """Raise a UserError that begins with ``wanted`` where NVIDIA's apex and its CUDA kernels are not installed."""
    source = "install NVIDIA's from https://github.com/NVIDIA/apex with its CUDA extensions"
    if importlib.util.find_spec("apex") is None:
        raise UserError(f"{wanted}: apex is not installed: {source}")
    if not apex_is_of_nvidia():
        raise UserError(f"{wanted}: the apex installed here is another package of that name: uninstall it and {source}")
    if importlib.util.find_spec("amp_C") is None:
        raise UserError(f"{wanted}: NVIDIA's apex is installed without its CUDA kernels (amp_C): {source}")


def covers(archs: Sequence[str], capability: str) -> bool:
    """Whether code built for CMake's `archs` runs on a GPU of `capability` ("9.0").

    A binary ("90-real") runs on its own major version from its minor up, PTX ("90-virtual") on anything
    newer, both ("90") on either; "90a" runs on 9.0 alone.
    """
    gpu = int(capability.replace(".", ""))
    for arch in archs:
        number, _, kind = arch.partition("-")
        if number[-1] in "af":
            if int(number[:-1]) == gpu:
                return True
        elif int(number) <= gpu and (kind != "real" or int(number) // 10 == gpu // 10):
            return True
    return False
