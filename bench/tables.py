"""Writes the tables of README.md and docs/, and docs/ops.svg, from the committed files in bench/results/.

python bench/tables.py                            rewrite what stands between <!-- table NAME --> and <!-- end -->
python bench/tables.py --check                    only compare; exit status 1 if a document is out of date
python bench/tables.py --print NAME ... [--results FOLDER]    print tables and write nothing
"""

import argparse
import hashlib
import json
import re
import statistics
from pathlib import Path

HERE = Path(__file__).parent
DOCUMENTS = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
FIGURE = HERE.parent / "docs" / "ops.svg"
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


def ops(result: dict) -> str:
    """The settings of the paper, the larger ones of the design, and the gathered rows of eight GPUs."""
    names = ["op", "shape", "type", "µs, eager", "µs, replay", "launches", "MB moved", "% of the floor", "peak MB"]
    names += ["peers: how many times ours, eager / replay"]
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    rows = [_ops_row(r) for r in result["cases"] if any(r["settings"].items() <= one.items() for one in SHOWN)]
    c, ceilings = result["conditions"], result["ceilings"]
    rates = ", ".join(f"{name} {ceilings[f'{name}_flop_per_s'] / 1e12:.0f} TFLOP/s" for name in ("bf16", "tf32"))
    copies = f"{ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    note = [
        f"p50; {c['gpu']}, driver {c['driver']}; in the same run copies at {copies}, products at {rates}; "
        f"PyTorch {c['torch']}, Triton {c['triton']}; commit {c['commit']}."
    ]
    if "empty_replay_us" in ceilings:
        note.append(f"A graph of one empty launch takes {ceilings['empty_replay_us']:.1f} µs, measured the same way.")
    if missing := result["not_reached"]:
        note.append(f"Not measured: {', '.join(missing)}.")
    return "\n".join([*head, *rows, "", *note])


def _ops_row(r: dict) -> str:
    shape = ", ".join(f"{k}={v}" for k, v in r["settings"].items())
    if "ours" not in r:
        return f"| `{r['op']}` | {shape} | {r['dtype']} | wrong: not timed | – | – | – | – | – | – |"
    ours = r["ours"]
    replay = ours.get("replay_us", {}).get("p50")
    peers = "; ".join(
        f"{name} {_times(p.get('eager_ratio'))} / {_times(p.get('replay_ratio'))}"
        for name, p in r["peers"].items()
        if "skipped" not in p
    )
    cells = [
        f"`{r['op']}`",
        shape,
        r["dtype"],
        f"{ours['eager_us']['p50']:.1f}",
        "–" if replay is None else f"{replay:.1f}",
        "–" if ours["launches"] is None else str(ours["launches"]),
        f"{r['bytes'] / 1e6:.2f}",
        "–" if replay is None else f"{100 * r['floor_us'] / replay:.0f}",
        f"{ours['extra_bytes'] / 1e6:.1f}",
        peers or "–",
    ]
    return f"| {' | '.join(cells)} |"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def launches(result: dict) -> str:
    """Before and after; bench/launches.py."""
    names = {
        "head": "losses, label correction, queue, prototypes, with gradients: {N} rows, {M} gathered, C={C}, Q={Q}",
        "ema_update_": "momentum encoder, ResNet-50",
        "sgd_ema_update_": "SGD, momentum encoder, 16-bit copies of both, ResNet-50",
    }
    rows = [
        f"| {names[r['op']].format(**r['settings'])} | {r['official']['launches']} | {r['official']['waits']} "
        f"| {r['ours']['launches']} | {r['ours']['waits']} |"
        for r in result["rows"]
    ]
    head = ["| | official: launches | synchronisations | ours: launches | synchronisations |", "|---|---|---|---|---|"]
    note = "Counted without a GPU (`python bench/launches.py`); official: PyTorch's operators, each at least one launch"
    return "\n".join([*head, *rows, "", f"{note}; commit {result['conditions']['commit']}."])


def parity(result: dict) -> str:
    head = ["| official code and ours | compared | difference | limit | |", "|---|---|---|---|---|"]
    rows = [
        f"| {r['what']} | {r['of']} | {r['difference']:.2g} {r['unit']} | {r['limit']:.2g} "
        f"| {'ok' if r['passed'] else '**fails**'} |"
        for r in result["rows"]
    ]
    c = result["conditions"]
    note = f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."
    if result["stand_ins"]:
        note += f" Replaced for the official scripts: {'; '.join(result['stand_ins'])}."
    return "\n".join([*head, *rows, "", note])


def requirements(result: dict) -> str:
    words = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        f"| {q['name']} | {_number(q['value'])} "
        f"| {'≥' if q['at_least'] else '≤'} {q['limit']:g} | {words[q['passed']]} |"
        for q in result["requirements"]
    ]
    c = result["conditions"]
    head = ["| requirement | measured | limit | met |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"{c['gpu']}; commit {c['commit']}."])


def loader(result: dict) -> str:
    head = ["images", "loader", "views", "img/s", "× official", "CPU ms per image", "of which", "MB"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for c in result["cases"]:
        parts = sorted(c["cpu_ms_per_image"].items(), key=lambda part: -part[1])
        cells = [
            c["set"],
            c["loader"] + (", decoded on the GPU" if c["device"] == "cuda" else ""),
            f"2 × {c['px']} px",
            f"{c['images_per_second']['p50']:.0f}",
            f"{c['over_official']:.1f}",
            f"{sum(value for _, value in parts):.2f}",
            ", ".join(f"{name} {value:.2f}" for name, value in parts if value >= 0.005),
            f"{c['memory_mb']:.0f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    c, s = result["conditions"], result["settings"]
    note = [
        f"p50 of {s['rounds']} turns of {s['seconds']:g} s; {s['threads']} threads or workers, "
        f"batches of {s['batch']}; "
        f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."
    ]
    if missing := result["not_measured"]:
        note.append(f"Not measured: {', '.join(missing)}.")
    return "\n".join([*rows, "", *note])


def parity_lowshot(result: dict) -> str:
    """The same features through the official lowshot_svm.py and through ours; bench/parity_lowshot.py."""
    head = ["labels as in", "k", "official", "ours"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in result["rows"]:
        name = {"voc": "VOC07, mAP", "places": "Places205, accuracy"}[r["set"]]
        rows += [f"| {name} | {k} | {r['official'][k]:.4f} | {r['ours'][k]:.4f} |" for k in r["official"]]
    voc, places = result["rows"]
    note = (
        f"Percent. Largest differences: {voc['largest_ap_difference']:.0e} of {voc['svms']} average precisions, "
        f"{places['largest_mean_difference'] or 0:.1g} of the accuracies."
    )
    return "\n".join([*rows, "", f"{note} {_where(result)}"])


def parity_probe(result: dict) -> str:
    """OmniBenchmark's script and ours; the calibration error and its source; bench/parity_probe.py."""
    rows = ["| λ | OmniBenchmark's script | ours | largest difference |", "|---|---|---|---|"]
    rows += [
        f"| {r['lambda']:g} | {r['official']:.2f} | {r['ours']:.2f} | {r['largest_difference']:.0e} |"
        for r in result["lambdas"]
    ]
    c = result["calibration"]
    note = (
        f"Test accuracy at the last of {result['lambdas'][0]['evaluations']} evaluations, percent; the difference is "
        "the largest of all accuracies in all of them. RMS calibration error against its source: at most "
        f"{c['largest_difference']:.0e} points in {c['sets']} sets."
    )
    return "\n".join([*rows, "", f"{note} {_where(result)}"])


def _where(result: dict) -> str:
    c = result["conditions"]
    return f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def figure(result: dict) -> str:
    return f"![Time of every op against its floor, {result['conditions']['gpu']}](ops.svg)"


def draw(result: dict, path: Path) -> None:
    """Time in graph replay against the floor, per op; a hollow mark is the official formulation, eager."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ops"  # the same file for the same result
    from matplotlib import pyplot

    axes = pyplot.figure(figsize=(8, 6)).gca()
    timed = [r for r in result["cases"] if "replay_us" in r.get("ours", {})]
    for i, op in enumerate(dict.fromkeys(r["op"] for r in timed)):
        rows = [r for r in timed if r["op"] == op]
        floor = [r["floor_us"] for r in rows]
        axes.plot(floor, [r["ours"]["replay_us"]["p50"] for r in rows], "o", color=f"C{i}", label=op)
        peers = [(r["floor_us"], r["peers"]["official"]["eager_us"]["p50"]) for r in rows if _timed_official(r)]
        if peers:
            axes.plot(*zip(*peers, strict=True), "o", color=f"C{i}", fillstyle="none")
    axes.set(xscale="log", yscale="log", xlabel="floor, µs", ylabel="time, µs (p50)")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], "-", color="grey", linewidth=1, label="the floor")
    axes.set_title(
        f"{result['conditions']['gpu']}: ours in graph replay (filled), official, eager (hollow)", fontsize=10
    )
    axes.legend(fontsize=8)
    metadata = {"Date": None, "Description": _digest(result)}
    pyplot.savefig(path, format="svg", metadata=metadata, bbox_inches="tight")
    pyplot.close()


def _timed_official(r: dict) -> bool:
    return "eager_us" in r["peers"]["official"]


def _digest(result: dict) -> str:
    return "bench/results/ops_gpu.json " + hashlib.sha256(json.dumps(result).encode()).hexdigest()


def figure_is_stale() -> bool:
    """The figure names the result that it was drawn from; without a result there must be none."""
    result = read("ops_gpu", HERE / "results")
    if result is None:
        return FIGURE.exists()
    return not FIGURE.exists() or _digest(result) not in FIGURE.read_text()


# The settings of bench/cases.py that the documentation shows.
PAPER = [
    {"model": "resnet50", "shadows": False},
    {"N": 256, "C": 1000, "Q": 8192, "M": 256},
    {"N": 256, "C": 1000, "Q": 8192, "M": 2048},
]
SHOWN = [*PAPER, {"model": "resnet50", "shadows": True}, {"N": 1024, "C": 5000, "Q": 65536, "M": 1024}]
# table: (result file, function)
TABLES = {
    "demo_accuracy": ("demo_accuracy", demo_accuracy),
    "cifar10n": ("cifar10n", cifar10n),
    "ops": ("ops_gpu", ops),
    "launches": ("launches", launches),
    "loader": ("loader", loader),
    "parity": ("parity", parity),
    "parity_lowshot": ("parity_lowshot", parity_lowshot),
    "parity_probe": ("parity_probe", parity_probe),
    "ops_requirements": ("ops_gpu", requirements),
    "ops_figure": ("ops_gpu", figure),
}


def read(file: str, folder: Path) -> dict | None:
    path = folder / f"{file}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(name: str, folder: Path | None = None) -> str:
    file, function = TABLES[name]
    result = read(file, folder or HERE / "results")
    return "Not measured yet." if result is None else function(result)


def rendered(text: str) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--print", nargs="+", choices=list(TABLES), dest="names", metavar="NAME")
    parser.add_argument("--results", type=Path)
    a = parser.parse_args(argv)
    if a.names:
        for name in a.names:
            print(f"{name}:\n\n{table(name, a.results)}\n")
        return 0
    stale = [d for d in DOCUMENTS if rendered(d.read_text()) != d.read_text()]
    for document in stale:
        if not a.check:
            document.write_text(rendered(document.read_text()))
    names = [d.name for d in stale]
    if figure_is_stale():
        names.append(FIGURE.name)
        result = read("ops_gpu", HERE / "results")
        if not a.check:
            FIGURE.unlink(missing_ok=True) if result is None else draw(result, FIGURE)
    for name in names:
        print(f"{name} {'is out of date: run python bench/tables.py' if a.check else 'rewritten'}")
    return int(a.check and bool(names))


if __name__ == "__main__":
    raise SystemExit(main())
