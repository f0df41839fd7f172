"""``mopro-fast bench``: images a second of a training step, ours and its peers', on this machine."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mopro_fast import environment
from mopro_fast.benchmark import report, throughput
from mopro_fast.benchmark.throughput import Case
from mopro_fast.console import say, tell
from mopro_fast.errors import UserError
from mopro_fast.files import json_object, output, write_json, writing
from mopro_fast.models.speedups import SPEEDUPS


@dataclass
class Bench:
    """Time a training step on synthetic images: ours, the official code's, plain supervised training.

    What is not given depends on the device: on a GPU the paper's ResNet-50 at 224 px, on a CPU a small ResNet-18.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    batch_sizes: tuple[int, ...] = ()
    """N, rows per step. GPU: 256 32 1024 64 128 512; CPU: 32."""
    classes: tuple[int, ...] = ()
    """C. GPU: 1000 5000; CPU: 100."""
    arch: Literal["", "resnet18", "resnet34", "resnet50", "resnet101"] = ""
    """Architecture."""
    width: float | None = None
    """Multiplies the channels."""
    image_size: int | None = None
    """Side of the views, px."""
    queue_size: int | None = None
    """Q."""
    bn_group: int = 0
    """Rows per BatchNorm group, in ours."""
    seconds: float = 2
    """Of each variant of each case."""
    variants: tuple[str, ...] = ()
    """Those to time, by name; a speed-up's name (docs/performance.md), or "all", stands for ours with it on. Default:
    all at N=32 and 256; elsewhere ours, the official ones and the bare encoders."""
    minutes: float = 9
    """No case begins after so many."""
    official: Path | None = None
    """A clone of salesforce/MoPro: its model is timed too (ResNet-50 only)."""
    data: str | None = None
    """Real images (as `mopro-fast train --data`): train on them too, and tell the share of waiting for them."""
    out: Path | None = None
    """JSON file to write."""


_GPU = {"batch_sizes": (256, 32, 1024, 64, 128, 512), "classes": (1000, 5000)}
_GPU |= {"image_size": 224, "queue_size": 8192, "arch": "resnet50", "width": 1.0}
_CPU = {"batch_sizes": (32,), "classes": (100,)}
_CPU |= {"image_size": 64, "queue_size": 1024, "arch": "resnet18", "width": 0.25}
_EVERYTHING = (32, 256)  # batch sizes at which every variant is timed


def main(argv: list[str]) -> int:
    import tyro  # here: bench/step.py does without

    options = tyro.cli(Bench, args=argv, prog="mopro-fast bench")
    with contextlib.ExitStack() as stack:
        out = options.out
        if out:
            with writing(out.parent, "name another file"):
                out.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(output(out, _is_unfinished))
        conditions = environment.collect()

        def keep(result: dict[str, Any]) -> None:
            if out:
                write_json(out, {"conditions": conditions, **result})

        result = run(options, keep)
    tell(report.table(result))
    if options.out:
        tell(f"\nnumbers: {options.out}")
    return int(report.failed(result))


def _is_unfinished(path: Path) -> bool:
    """Whether a benchmark that was cut short wrote the file."""
    found = json_object(path)
    return {"conditions", "settings", "cases", "not_reached"} <= found.keys() and not found.get("finished", True)


def run(options: Bench, keep: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """-> {"settings", "cases", "not_reached", "seconds", "finished"}; progress goes to stderr.

    ``keep`` gets what there is after every variant, so that a benchmark that is cut short has not been for nothing.
    """
    cuda = torch.cuda.is_available()
    device = options.device if options.device != "auto" else ("cuda" if cuda else "cpu")
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch sees no GPU; `mopro-fast env` says more, or use --device cpu")
    default = _GPU if device == "cuda" else _CPU
    given = {name: getattr(options, name) for name in default}
    chosen = {name: value if given[name] in (None, (), "") else given[name] for name, value in default.items()}
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_stream(torch.cuda.Stream())  # the default stream cannot be captured
    batch_sizes, classes = chosen.pop("batch_sizes"), chosen.pop("classes")
    cases = [Case(n, c, **chosen, bn_group=options.bn_group, device=device) for c in classes for n in batch_sizes]
    for case in cases:
        case.config().validate()
    short = {name: throughput.of_speedup(name) for name in SPEEDUPS}
    short["all"] = throughput.of_speedup(throughput.ALL_SPEEDUPS)
    wanted = [short.get(name, name) for name in options.variants]
    known = throughput.variants(cases[0], options.official, everything=True, named=True)
    if unknown := [name for name in wanted if name not in known]:
        there = ", ".join(f'"{name}"' for name in known)
        raise UserError(
            f'--variants "{unknown[0]}": no variant on this device has that name; there are {there}; short for '
            f"those that are on: {', '.join(short)}"
        )
    settings = {"device": device, **chosen, "bn_group": options.bn_group}
    settings |= {"seconds": options.seconds, "variants": wanted}
    began, results = time.perf_counter(), []

    def so_far(finished: bool = False) -> dict[str, Any]:
        left = [f"N={c.batch} C={c.classes}" for c in cases[len(results) :]]
        seconds = round(time.perf_counter() - began, 1)
        return {"settings": settings, "cases": results, "not_reached": left, "seconds": seconds, "finished": finished}

    for i, case in enumerate(cases, 1):
        if time.perf_counter() - began > 60 * options.minutes:
            break
        everything = device == "cpu" or (case.batch in _EVERYTHING and case.classes == classes[0])
        made = throughput.variants(case, options.official, everything or bool(wanted), named=bool(wanted))
        chosen_here = {name: made[name] for name in wanted or made}
        found: dict[str, Any] = {"batch": case.batch, "classes": case.classes, "variants": {}}
        results.append(found)
        for name, variant in throughput.measure(case, chosen_here, options.seconds):
            found["variants"][name] = variant
            at = f"[{i}/{len(cases)} {time.perf_counter() - began:.0f} s] N={case.batch} C={case.classes}"
            say(f"{at}: {report.brief(name, variant)}")
            keep(so_far())
        if everything and not wanted:
            found["parts_ms"] = throughput.attempt(throughput.parts, case, 10)
        if options.data:
            found["on_images"] = throughput.attempt(throughput.on_images, case, options.data, 5 * options.seconds)
        keep(so_far())
    result = so_far(finished=True)
    keep(result)
    return result
