"""Drives CMake, which alone describes the native build. Metadata is in pyproject.toml."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

if int(setuptools.__version__.split(".")[0]) < 77:  # it would name a line of pyproject.toml, and not the reason
    raise SystemExit(
        f"mopro_fast: setuptools 77 or newer is needed to build, this Python ({sys.executable}) has "
        f"{setuptools.__version__}: pip install --upgrade setuptools, or build without --no-build-isolation"
    )

ROOT = Path(__file__).parent.resolve()
INFO = "mopro_fast/_build_info.json"
WHAT_TO_DO = (
    "Install the CUDA toolkit (12.1 or newer), name its nvcc in CUDACXX or its folder in CUDA_HOME, "
    "and install mopro_fast again. Without it everything runs on the reference backend, plain PyTorch."
)


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc, or None and where it was looked for. CUDACXX, if set, decides alone, as in CMake."""
    if wanted := os.environ.get("CUDACXX"):
        return shutil.which(wanted), f"nvcc not found: CUDACXX={wanted} is not an executable."
    folders = [os.path.join(os.environ[v], "bin") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    folders += [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return (
        shutil.which("nvcc", path=os.pathsep.join(folders)),
        "nvcc not found: looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda.",
    )


def find_cxx() -> str | None:
    """The C++ compiler that CMake will find."""
    wanted = shlex.split(os.environ.get("CXX", ""))  # with arguments, perhaps
    names = wanted[:1] or ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


class CMakeBuild(build_ext):
    def run(self):
        self.nvcc, reason = find_nvcc()
        what_to_do = WHAT_TO_DO
        has_cxx = find_cxx() is not None
        if not has_cxx:
            self.nvcc, reason = None, "no C++ compiler found: looked at CXX, and for c++, g++ and clang++."
            what_to_do = f"Install one. {WHAT_TO_DO}"
            print(
                "mopro_fast: without _views and _files the views on a CPU and checks take longer.",
                file=sys.stderr,
            )
        info = Path(self.build_lib, INFO)
        info.parent.mkdir(parents=True, exist_ok=True)
        if self.nvcc is None:
            if os.environ.get("MOPRO_FAST_REQUIRE_CUDA") == "1":
                raise PlatformError(f"MOPRO_FAST_REQUIRE_CUDA=1, but {reason} {what_to_do}")
            print(f"mopro_fast: building without the CUDA extension. {reason} {what_to_do}", file=sys.stderr)
            info.write_text(json.dumps({"cuda": False, "reason": reason, "what_to_do": what_to_do}, indent=2))
        builds = {"mopro_fast._files": has_cxx, "mopro_fast._views": has_cxx, "mopro_fast._C": self.nvcc is not None}
        self._remove_earlier_builds(ext for ext in self.extensions if not builds[ext.name])
        self.extensions = [ext for ext in self.extensions if builds[ext.name]]
        super().run()
        if self.inplace:
            shutil.copyfile(info, ROOT / INFO)

    def build_extensions(self):
        """All of them in one run of CMake."""
        import cmake
        import ninja
        import pybind11

        command = Path(cmake.CMAKE_BIN_DIR, "cmake")
        output = Path(self.build_lib, "mopro_fast").resolve()
        configure = [
            # --fresh: an isolated build finds ninja and pybind11 in another temporary folder every time.
            *(command, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", self.build_temp),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}",
            *([f"-DCMAKE_CUDA_COMPILER={self.nvcc}"] if self.nvcc else ["-DMOPRO_FAST_CUDA=OFF"]),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOPRO_FAST_OUTPUT={output}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([command, "--build", self.build_temp], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                f"the extensions did not build (nvcc: {self.nvcc}); the reason is in CMake's output above"
            ) from error

    def _remove_earlier_builds(self, extensions):
        """A binary of other sources must not be packaged or imported beside these."""
        for ext in extensions:
            name = self.get_ext_filename(ext.name)
            Path(self.build_lib, name).unlink(missing_ok=True)
            if self.inplace:
                (ROOT / name).unlink(missing_ok=True)


setup(
    packages=[*find_packages(include=["mopro_fast", "mopro_fast.*"]), "mopro_fast.kernels"],
    package_dir={"mopro_fast.kernels": "kernels"},
    ext_modules=[Extension(f"mopro_fast.{name}", sources=[]) for name in ("_C", "_files", "_views")],
    cmdclass={"build_ext": CMakeBuild},
)
