"""``mopro-fast text read | embed | match``: the three steps from texts to anchors."""

from importlib import import_module

from mopro_fast.console import tell
from mopro_fast.errors import UserError

STEPS = {"read": "the texts beside the images, cleaned", "embed": "a vector per text and class", "match": "the anchors"}
USAGE = """usage: mopro-fast text read DATA … --out FOLDER
       mopro-fast text embed FOLDER --classes classes.csv
       mopro-fast text match FOLDER --features CKPT

From the texts beside web images to the anchors of CAPro: FOLDER/anchors.parquet, for `mopro-fast train capro-webvision
--anchors FOLDER`. `mopro-fast text read --help` says more, and so with embed and match."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        tell(USAGE)
        return 0
    step, rest = argv[0], argv[1:]
    if step not in STEPS:
        raise UserError(f"no step {step!r} of mopro-fast text: read, embed or match")
    return import_module(f"mopro_fast.text.{step}").main(rest)
