"""What a long command has finished, so that the same command, interrupted, goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mopro_fast.distributed import by_rank0, world
from mopro_fast.files import writing


class Done:
    """The results of finished pieces of work by their keys, a line each in a hidden file per rank.

    settings: all that the results depend on; others are not seen. Every rank reads the results of all ranks.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._folder, self._name = folder, f".{name}-{digest}"
        self.results: dict[str, Any] = by_rank0(self._read)
        with writing(folder, "name another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            self._append("")

    def add(self, key: str, result: Any) -> None:
        self.results[key] = result
        self._append(f"\n{json.dumps([key, result])}\n")

    def remove(self) -> None:
        """When all is finished and written elsewhere; on one rank."""
        for path in self._files():
            path.unlink()

    def _append(self, text: str) -> None:
        with (self._folder / f"{self._name}.{world()[0]}.jsonl").open("a") as file:
            file.write(text)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.*.jsonl"))

    def _read(self) -> dict[str, Any]:
        found = {}
        for path in self._files():
            for line in path.read_text().splitlines():
                try:
                    key, result = json.loads(line)
                except ValueError:  # a line that a kill cut off, or none
                    continue
                found[key] = result
        return found
