"""Chosen variants of a training step, each kept as soon as it is measured: for a GPU that is there for minutes.

    python bench/step.py [--batch-sizes 256 32] [--variants NAME ... | --speedups] [--small] ...

The code is that of `mopro-fast bench`, without tyro and DALI. The exit status is 1 if a variant failed.
"""

import argparse

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
from mopro_fast.benchmark import command, report, throughput
from mopro_fast.errors import UserError

SMALL = {"arch": "resnet18", "width": 0.25, "image_size": 32, "queue_size": 256}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 32])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--variants", nargs="+", default=[], metavar="NAME", help="as the table has them; default: all")
    which.add_argument("--speedups", action="store_true", help="ours, and with each speed-up and all on")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each variant")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--results", default=record.RESULTS)
    parser.add_argument("--name", default="step_gpu", help="of the file there")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a ResNet-18 at 32 px, for a CPU")
    a = parser.parse_args(argv)
    if a.speedups:
        a.variants = [throughput.OURS, *throughput.with_speedups()]
    options = command.Bench(
        device=a.device, batch_sizes=tuple(a.batch_sizes), classes=(a.classes,), seconds=a.seconds,
        variants=tuple(a.variants), **(SMALL if a.small else {}),
    )  # fmt: skip
    try:
        result = command.run(options, lambda result: record.write(a.name, result, a.results))
    except UserError as error:
        parser.error(str(error))
    print(report.table(result))
    return int(report.failed(result))


if __name__ == "__main__":
    raise SystemExit(main())
