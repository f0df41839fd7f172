"""Writes the tables of README.md and docs/ from the committed files in bench/results/.

python bench/tables.py          rewrite what stands between <!-- table NAME --> and <!-- end -->
python bench/tables.py --check  only compare; exit status 1 if a document is out of date
"""

import argparse
import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENTS = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def accuracy(result: dict, title: str) -> str:
    def mean(name: str, scale: float = 1.0) -> str:
        values = [scale * r[name] for r in result["runs"]]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    c = result["conditions"]
    rows = [
        f"| {title} | cross-entropy | MoPro |",
        "|---|---|---|",
        f"| clean test accuracy, % | {mean('ce_top1')} | **{mean('mopro_top1')}** |",
        f"| label correction: precision, % | – | {mean('precision', 100)} |",
        f"| label correction: recall, % | – | {mean('recall', 100)} |",
        f"| out-of-distribution images removed, % | 0 | {mean('ood_removed', 100)} |",
    ]
    where = c["gpu"] or c["cpu"]
    seeds = len(result["runs"])
    note = f"Mean ± standard deviation of {seeds} seeds; {where}; PyTorch {c['torch']}; commit {c['commit']}."
    return "\n".join([*rows, "", note])


def demo_accuracy(result: dict) -> str:
    seconds = statistics.mean(r["seconds"] for r in result["runs"])
    return accuracy(result, "`mopro-fast demo`") + f" Both trainings of a seed together took {seconds:.0f} s."


def cifar10n(result: dict) -> str:
    s = result["settings"]
    return accuracy(result, f"CIFAR-10N `worse`, {s['images']} images, {s['epochs']} epochs")


def ema(result: dict) -> str:
    rows = [
        f"| {name} | {1000 * r['p50']:.0f} | {100 * r['share_of_copy_bandwidth']:.0f} |"
        for name, r in result["milliseconds"].items()
    ]
    c = result["conditions"]
    head = ["| momentum update, ResNet-50 | µs | % of copy bandwidth |", "|---|---|---|"]
    return "\n".join([*head, *rows, "", f"{c['gpu']}; PyTorch {c['torch']}; commit {c['commit']}."])


TABLES = {"demo_accuracy": demo_accuracy, "cifar10n": cifar10n, "ema": ema}


def table(name: str) -> str:
    path = HERE / "results" / f"{name}.json"
    return TABLES[name](json.loads(path.read_text())) if path.is_file() else "Not measured yet."


def rendered(text: str) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [d for d in DOCUMENTS if rendered(d.read_text()) != d.read_text()]
    for document in stale:
        if not check:
            document.write_text(rendered(document.read_text()))
        print(f"{document.name} {'is out of date: run python bench/tables.py' if check else 'rewritten'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
