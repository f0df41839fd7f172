"""The command line: ``mopro-fast COMMAND …``. One line per mistake, no traceback, exit status 2."""

import os
import re
import signal
import sys
import traceback
import warnings

from mopro_fast import peers, signals
from mopro_fast.console import guarded, say, tell
from mopro_fast.errors import UserError, of_the_machine
from mopro_fast.files import ask_for_open_files, home

COMMANDS = {  # name: module of this package, help
    "demo": ("demo", "train cross-entropy and MoPro (demo capro: CAPro, too) on noisy real images, minutes on 2 cores"),
    "train": ("training.command", "train a model: mopro-fast train RECIPE --data PATH --out FOLDER"),
    "check": ("data.check", "read every image once: which are odd or broken, and why"),
    "pack": ("data.pack", "write the images into shards that train fast: mopro-fast pack DATA OUT"),
    "bench": ("benchmark.command", "time a training step here: ours, the official code's, plain training"),
    "report": ("report.page", "one HTML page about a run: curves, corrected labels, images, prototypes"),
    "text": ("text.command", "the anchors of CAPro from the texts beside the images: text read, embed, match"),
    "clean": (
        "downstream.clean",
        "correct or remove every training label: mopro-fast clean CKPT --data PATH --out FOLDER",
    ),
    "retrain": (
        "downstream.retrain",
        "re-train the classifier on cleaned labels: mopro-fast retrain CKPT --cleaned TABLE …",
    ),
    "finetune": ("downstream.finetune", "train on a share of labelled data: mopro-fast finetune CKPT --data PATH …"),
    "import": ("downstream.importing", "a checkpoint of the official code, torchvision or safetensors into ours"),
    "export": ("downstream.export", "a checkpoint for the official code, torchvision, timm, detectron2, ONNX"),
    "eval": ("downstream.evaluate", "accuracy, calibration and confusions of a checkpoint's classifier"),
    "lowshot": ("downstream.lowshot", "linear SVMs on frozen features, k images per class: VOC07, Places205"),
    "probe": ("downstream.probe", "a linear classifier on frozen features: OmniBenchmark's protocol"),
    "env": ("environment", "what this installation has: versions, GPU, extension, backends"),
}
ONE_RANK = ("demo", "check", "pack", "report", "text read", "import", "export")  # of several ranks the first does it


def main(argv: list[str] | None = None, *, own: bool | None = None) -> None:
    """own: the process is the command's, and a signal may end it; None: if there is no ``argv``."""
    own = argv is None if own is None else own
    argv = sys.argv[1:] if argv is None else argv
    # Before torch is imported: its CPU threads spin for milliseconds at every barrier. Where DALI's threads or another
    # process share the cores, steps then take up to 40 times as long; 20,000 turns cost nothing on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd files: a check names them
    warnings.filterwarnings("ignore", ".*(broadcast_buffers|all_gather_into_tensor)", FutureWarning)  # of PyTorch 2.13
    with guarded() as whole:
        ask_for_open_files()  # each shard and each connection of a worker is one
        status = _status(argv, own)
        if status := status if whole() else status or 1:
            peers.leave(status)
    sys.exit(status)


def _status(argv: list[str], own: bool) -> int:
    try:
        with signals.heeded(argv[0] if argv else "", own):
            return _run(argv)
    except SystemExit as stop:  # of those that read the options, after a help or a mistake
        return stop.code or 0
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        say(peers.explained(stop) or signals.interrupted(argv[0], number))
        return 128 + number
    except Exception as error:
        if line := peers.explained(error):
            say(line)
            return peers.STATUS
        error = error if isinstance(error, UserError) else of_the_machine(error)
        if error is None:  # a mistake of ours, or a GPU without memory
            if not peers.watched():
                raise
            traceback.print_exc()  # Python's own end would wait for threads, and the other ranks for this one
            return 1
        say(f"mopro-fast: error: {signals.of_rank()}{error}")
        return 2


def _run(argv: list[str]) -> int:
    from importlib import import_module

    from mopro_fast import __version__

    if not argv or argv[0] in ("-h", "--help", "help"):
        tell(_usage())
        return 0
    name, rest = argv[0], argv[1:]
    if name == "--version":
        tell(f"mopro_fast {__version__}")
        return 0
    if name not in COMMANDS:
        from mopro_fast.config import nearest

        raise UserError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    told = " ".join(argv[: 2 if name == "text" else 1])
    if told in ONE_RANK and not {"-h", "--help"} & {*rest}:
        rank, ranks = (os.environ.get(n, "").strip() for n in ("RANK", "WORLD_SIZE"))
        if rank.isdecimal() and ranks.isdecimal() and 0 < int(rank) < int(ranks):
            say(f"rank {rank} of {ranks}: nothing to do, rank 0 does `mopro-fast {told}` alone")
            return 0
    return import_module(f"mopro_fast.{COMMANDS[name][0]}").main([_at_home(word) for word in rest]) or 0


def _at_home(word: str) -> str:
    """With the home folder in place of ~ where a shell leaves it: in --out=~/runs, name=~/images, "~/runs"."""
    found = re.match(r"(?:[^=~]*=){0,2}(?=~)", word)
    return found[0] + home(word[found.end() :]) if found else word


def _usage() -> str:
    commands = "\n".join(f"  {name:8s} {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: mopro-fast COMMAND …

Fast, trustworthy training of MoPro and CAPro on noisy web images.

{commands}

`mopro-fast COMMAND --help` says more. Several GPUs: torchrun --nproc-per-node N -m mopro_fast train …"""
