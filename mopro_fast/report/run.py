"""What is in a run's folder. Whatever cannot be read is named in ``Run.missing``; nothing here ends the report."""

import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopro_fast.checkpoints.state import RunState, all_of
from mopro_fast.checkpoints.state import load as load_state
from mopro_fast.config import TrainConfig, load, read
from mopro_fast.data.begun import as_begun, begun
from mopro_fast.data.index import Index, load_index
from mopro_fast.data.lists import text_lines
from mopro_fast.data.paths import shown
from mopro_fast.errors import UserError
from mopro_fast.files import MOST_TEXT, open_regular, read_regular
from mopro_fast.labels import UNSEEN

ROWS = 200  # of left_out.csv and of replaced.csv that are shown


@dataclass
class Run:
    """One run. Properties are read when first asked for; None or empty if they are not there."""

    folder: Path
    data: str | None = None
    """Where the training data is now; None: as the config says."""
    root: str | None = None
    other_data: bool = False
    """Take data that is not the run's: a table names its images."""
    missing: dict[str, str] = field(default_factory=dict)
    """What could not be read, and why."""

    def __post_init__(self) -> None:
        if not os.path.isdir(self.folder):
            raise UserError(f"no run at {self.folder}: name the --out folder of a training")
        if not any(os.path.exists(self.folder / name) for name in ("config.json", "log.jsonl", "checkpoints")):
            inner = sorted(p.parent.name for p in self.folder.glob("*/config.json"))
            hint = f"it holds runs: {', '.join(inner)}; name one of them" if inner else "name the --out of a training"
            raise UserError(f"{self.folder} is not a run (no config.json, log.jsonl or checkpoints): {hint}")

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is, also where this version does not know its settings."""
        try:
            return read(self.folder / "config.json")
        except UserError as error:
            self.missing["the settings"] = str(error)
            return {}

    @cached_property
    def config(self) -> TrainConfig | None:
        if not self.raw_config:
            return None
        if "freeze" in self.raw_config:
            self.missing["the images"] = "`mopro-fast retrain` and `finetune` correct no labels"
            return None
        try:
            return load(self.folder / "config.json")
        except UserError as error:
            self.missing["the settings"] = str(error)
            return None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        return self._entries("log.jsonl", "the curves")

    @cached_property
    def timing(self) -> list[dict[str, Any]]:
        """The latest entry of every step: an interrupted run takes some steps twice."""
        latest = {(e["epoch"], e["step"]): e for e in self._entries("timing.jsonl", "the speed")}
        return [latest[key] for key in sorted(latest)]

    @cached_property
    def state(self) -> RunState | None:
        """The newest checkpoint that can be read."""
        paths = all_of(self.folder / "checkpoints")
        why = "there is no checkpoint yet"
        for path in reversed(paths):
            try:
                state = load_state(path)
            except UserError as error:
                why = str(error)
                continue
            if path != paths[-1]:
                self.missing["the newest checkpoint"] = f"{why}; shown is {path.name}"
            return state
        self.missing["scores and prototypes"] = why
        return None

    @cached_property
    def index(self) -> Index | None:
        """The training data's, if it is the data of the run (or ``other_data``)."""
        if self.config is None:
            return None
        d = self.config.data
        digest = self.state and self.state.data_digest
        noted = begun(self.folder, digest, d.num_classes)  # class folders have no list of their own
        options = {"num_classes": d.num_classes, "keep_classes": d.keep_classes, "missing": True}
        options["classes"] = noted and noted.classes
        try:
            index = load_index(self.data or d.path, "train", layout=d.layout, root=self.root or d.root, **options)
        except UserError as error:
            self.missing["the images"] = f"{error}; if the data has moved: --data"
            return noted
        if digest is None or self.other_data:
            return index
        index = as_begun(index, noted)
        if index.digest() == digest:
            return index
        self.missing["the images"] = f"the paths or labels of {index.source} are not those of the run"
        return None

    @cached_property
    def labels(self) -> tuple[np.ndarray, str] | None:
        """int32 [images], −1 removed, −2 not shown; and whose labels they are."""
        if self.raw_config.get("method") == "ce":
            self.missing["the corrected labels"] = "plain cross-entropy corrects none"
            return None
        path = self.folder / "labels.pt"
        try:
            with open_regular(path) as file:
                labels = torch.load(file, weights_only=True).numpy().reshape(-1)
            if not UNSEEN <= labels.min(initial=0) <= labels.max(initial=0) < self.config.data.num_classes:
                raise ValueError
            return labels.astype(np.int32, copy=False), "the last finished epoch of training"
        except Exception as error:  # whatever a broken file makes the unpickler raise
            why = "no epoch is finished yet" if not os.path.exists(path) else f"cannot read labels.pt ({_why(error)})"
        if self.state is not None and bool((self.state.assigned != UNSEEN).any()):
            labels = self.state.assigned.numpy().astype(np.int32, copy=False)
            return labels, "the epoch in progress, as far as it was saved"
        self.missing["the corrected labels"] = why
        return None

    def class_names(self, path: str | None, count: int) -> list[str] | None:
        """From a file, one per line; else what the data brings."""
        if path is not None:
            names = list(map(shown, text_lines(path)))
            if len(names) != count:
                raise UserError(f"--names {path} has {len(names)} lines, the run {count} classes: one line per class")
            return names
        if self.index is None:
            return None
        if self.index.classes is not None:
            return list(map(shown, self.index.classes))
        synsets = Path(self.index.root) / "info" / "synsets.txt"  # WebVision: "n01440764 tench, Tinca tinca"
        if not os.path.isfile(synsets):
            return None
        names = [shown(line.partition(" ")[2] or line) for line in text_lines(str(synsets))]
        return names if len(names) == count else None

    def listed(self, name: str) -> dict[str, Any] | None:
        """A csv file's first rows, how many it has, and how many of each kind of reason; None if there is none."""
        try:
            text = read_regular(self.folder / name, MOST_TEXT)[0].decode(errors="replace").replace("\0", "")
            rows = csv.DictReader(io.StringIO(text, newline=""))
            first, kinds = [], Counter()
            for row in rows:
                kinds[(row.get("reason") or "").partition(":")[0]] += 1
                if len(first) < ROWS:
                    first.append([row.get(column) or "" for column in rows.fieldnames or []])
            return {
                "columns": list(rows.fieldnames or []),
                "rows": first,
                "count": kinds.total(),
                "kinds": kinds.most_common(10),
            }
        except FileNotFoundError:
            return None
        except (OSError, csv.Error) as error:
            self.missing[name] = _why(error)
            return None

    def _entries(self, name: str, what: str) -> list[dict[str, Any]]:
        try:
            text = read_regular(self.folder / name, 1 << 30)[0].decode(errors="replace")
        except OSError as error:
            self.missing[what] = f"cannot read {name} ({_why(error)})"
            return []
        entries, broken = [], 0
        for line in text[: text.rfind("\n") + 1].splitlines():  # a run in progress may be writing the last one
            try:
                entry = json.loads(line)
                entries.append(entry | {name: int(entry[name]) for name in ("epoch", "step")})
            except (ValueError, TypeError, KeyError):
                broken += 1
        if broken:
            self.missing[f"a part of {what}"] = f"{broken} lines of {name} cannot be read"
        return entries


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__
