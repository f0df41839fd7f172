"""``mopro-fast train RECIPE …``: a recipe, overridden option by option."""

import os
import sys

import tyro

from mopro_fast import console, distributed
from mopro_fast.config import CAPRO, MOPRO, RECIPES, VIEW_K, TrainConfig, differences, flag, recipe
from mopro_fast.errors import UserError


def main(argv: list[str]) -> int:
    """-> 0 when the run is finished, 128 + the signal's number when a signal stopped it."""
    config = parse(argv)
    from mopro_fast.training.tasks import task_of

    return run(task_of(config))


def run(task) -> int:
    """Train a task (task.py) to its end, in one process or under torchrun; -> what :func:`main` returns."""
    from mopro_fast.training.loop import Trainer

    received = Trainer(task).run()
    distributed.leave()
    return 128 + received if received else 0


def parse(argv: list[str]) -> TrainConfig:
    if not argv or argv[0] in ("-h", "--help"):
        console.tell(_usage())
        sys.exit(0)
    if argv[0].startswith("-"):
        raise UserError(f"the recipe comes first: mopro-fast train RECIPE {argv[0]} … (one of {', '.join(RECIPES)})")
    config = tyro.cli(
        TrainConfig,
        args=argv[1:],
        default=recipe(argv[0]),
        prog=f"mopro-fast train {argv[0]}",
        description=f"Recipe {argv[0]}: the values shown are its own; every option overrides one.",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    unread = {"ce": MOPRO | VIEW_K | CAPRO, "mopro": CAPRO}.get(config.method, frozenset())
    if unread and os.environ.get("RANK", "0") == "0":
        changed = differences(recipe(argv[0]).as_dict(), config.as_dict())
        for name in (name for name in changed if name in unread):
            console.say(f"note: {flag(name)} has no effect with --method {config.method}")
    return config


def _usage() -> str:
    width = max(map(len, RECIPES))
    recipes = "\n".join(f"  {name:{width}} {make.__doc__.splitlines()[0]}" for name, make in RECIPES.items())
    return f"""usage: mopro-fast train RECIPE --data PATH --out FOLDER [options]

RECIPE is one of
{recipes}
or a saved config.json; one that lies in a run's folder goes on with that run, there.

`mopro-fast train RECIPE --help` lists every option with the recipe's values.
The same command run again goes on where it was interrupted."""
