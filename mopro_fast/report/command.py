"""``mopro-fast report RUN``: the run's page, on which everything that is missing is named."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mopro_fast.errors import UserError


@dataclass
class Report:
    """Write one self-contained HTML page about a run, finished or not: curves, label correction, images, prototypes."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder (--out of `mopro-fast train`)."""
    out: str | None = None
    """The page (default: RUN/report.html)."""
    table: str | None = None
    """What `mopro-fast clean` wrote, the folder or its table: shown instead of the labels and scores of training."""
    images: int = 400
    """Images shown: a sample over verdicts and classes. Each adds about 4 kB at the default --thumb."""
    thumb: int = 96
    """Longer side of an image on the page, px."""
    only: tuple[str, ...] = ()
    """Show only images that have or get one of these classes: numbers or names."""
    seed: int = 0
    """Decides the sample."""
    data: str | None = None
    """Where the training data is now (default: where the run found it)."""
    root: str | None = None
    """Folder that the paths of a list file start from (default: as the run had it)."""
    names: str | None = None
    """File with the classes' names, one per line (default: those of the data, if it has any)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Computes the images' scores. A run in progress may need its GPU for itself."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Report, args=argv, prog="mopro-fast report")
    if not 0 <= options.images <= 5000:
        raise UserError(f"--images must lie in [0, 5000], got {options.images}")
    if not 16 <= options.thumb <= 512:
        raise UserError(f"--thumb must lie in [16, 512] px, got {options.thumb}")
    out = Path(options.out or Path(options.run) / "report.html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    from mopro_fast.report import page

    contents = page.collect(options)
    size = page.write(contents, out)
    for name, why in contents["missing"].items():
        print(f"not in the report: {name}: {why}", file=sys.stderr)
    unread = f", {len(contents['unread'])} could not be read" if contents["unread"] else ""
    print(f"{size / 1e6:.1f} MB, {len(contents['images'])} images{unread}", file=sys.stderr)
    print(out)
    return 0
