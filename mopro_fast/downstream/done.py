"""What a long command has finished, so that the same command, interrupted, goes on."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from mopro_fast.distributed import by_rank0, world
from mopro_fast.files import MOST_TEXT, append, read_regular, writing


class Done:
    """The results of finished pieces of work by their keys, a line each in a hidden file per rank.

    settings: all that the results depend on; others are not seen. Every rank reads the results of all ranks.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self._folder, self._pattern = folder, f".{name}-{digest}.*.jsonl"
        self._own = folder / f".{name}-{digest}.{world()[0]}.jsonl"
        self.results: dict[str, Any] = by_rank0(self._read)
        with writing(folder, "name another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            self._own.touch()

    def add(self, key: str, result: Any) -> None:
        self.results[key] = result
        with writing(self._folder, "make it writable"), self._own.open("ab", buffering=0) as file:
            append(file, f"\n{json.dumps([key, result])}\n".encode())

    def remove(self) -> None:
        """When all is finished and written elsewhere; on one rank."""
        with writing(self._folder, "make it writable"):
            for path in self._folder.glob(self._pattern):
                path.unlink()

    def _read(self) -> dict[str, Any]:
        found = {}
        for path in sorted(self._folder.glob(self._pattern)):
            with contextlib.suppress(OSError):
                for line in read_regular(path, MOST_TEXT)[0].splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # a kill cut it off, or it is empty
                        key, result = json.loads(line)
                        found[key] = result
        return found
