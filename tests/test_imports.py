"""Imports run one way, in the order of LAYERS, and nobody imports another module's private names."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = """errors labels files console transfer installed signals | peers sharing | ops kernels | config |
distributed | models | data | checkpoints | training | downstream | text | environment report | benchmark |
demo demo_capro | cli | __main__"""
RANK = {name: rank for rank, layer in enumerate(LAYERS.split("|")) for name in layer.split()} | {"": -1}
COMPILED = {"_C", "_files", "_views"}


def files() -> dict[str, Path]:
    """The file of every module by its name."""
    found = {}
    for package, folder in (("mopro_fast", ROOT / "mopro_fast"), ("mopro_fast.kernels", ROOT / "kernels")):
        for file in folder.rglob("*.py"):
            parts = (package, *file.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports() -> list[tuple[str, str, str]]:
    """(module, module it imports from, name), of the whole package, functions' own imports included."""
    found = []
    for module, file in files().items():
        for node in ast.walk(ast.parse(file.read_text())):
            assert not getattr(node, "level", 0), f"{file}: relative imports hide from this test"
            if isinstance(node, ast.ImportFrom):
                found += [(module, node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [(module, alias.name, "") for alias in node.names]
    return [line for line in found if line[1].partition(".")[0] == "mopro_fast"]


def test_imports_run_one_way():
    modules = files()
    edges = {(m, f"{source}.{name}" if f"{source}.{name}" in modules else source) for m, source, name in imports()}
    layer = {m: RANK[(m + ".").split(".")[1]] for edge in edges for m in edge}
    assert not [edge for edge in sorted(edges) if layer[edge[1]] > layer[edge[0]]], "imports run upwards"
    while edges:  # take away what imports nothing that is left; circles stay
        importers = {module for module, _ in edges}
        leaves = {edge for edge in edges if edge[1] not in importers}
        assert leaves, f"these import each other: {sorted(importers)}"
        edges -= leaves


def test_private_names_stay_private():
    private = [line for line in imports() if line[2].startswith("_") and line[2] not in COMPILED | {"__version__"}]
    assert not private
