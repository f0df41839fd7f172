"""``mopro-fast report RUN``: the run's page, on which everything that is missing is named."""

import sys
from pathlib import Path

import tyro

from mopro_fast.errors import UserError
from mopro_fast.report import page
from mopro_fast.report.page import Report


def main(argv: list[str]) -> int:
    options = tyro.cli(Report, args=argv, prog="mopro-fast report")
    if not 0 <= options.images <= 5000:
        raise UserError(f"--images must lie in [0, 5000], got {options.images}")
    if not 16 <= options.thumb <= 512:
        raise UserError(f"--thumb must lie in [16, 512] px, got {options.thumb}")
    out = Path(options.out or Path(options.run) / "report.html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name a file")
    contents = page.collect(options)
    size = page.write(contents, out)
    for name, why in contents["missing"].items():
        print(f"not in the report: {name}: {why}", file=sys.stderr)
    unread = f", {len(contents['unread'])} could not be read" if contents["unread"] else ""
    print(f"{size / 1e6:.1f} MB, {len(contents['images'])} images{unread}", file=sys.stderr)
    print(out)
    return 0
