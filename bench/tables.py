"""Writes the tables of README.md and docs/, and docs/*.svg (figures.py), from the committed files in bench/results/.

python bench/tables.py                            rewrite what stands between <!-- table NAME --> and <!-- end -->
python bench/tables.py --check                    only compare; exit status 1 if a document is out of date
python bench/tables.py --print NAME ... [--results FOLDER]    print tables and write nothing
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import figures

from mopro_fast.benchmark import report

HERE = Path(__file__).parent
DOCUMENTS = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
DOCS = HERE.parent / "docs"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)


def demo_accuracy(result: dict) -> str:
    def mean(name: str, scale: float = 1.0) -> str:
        return _mean(runs, name, scale)

    def worst(method: str) -> str:
        return f"{min(min(r[f'{method}_class_recall']) for r in runs):.0f}"

    c, runs = result["conditions"], result["runs"]
    alarmed = sum(r["alarms"] > 0 for r in runs)
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]
    gains = [r["mopro_top1"] - r["ce_top1"] for r in runs]
    rows = [
        "| `mopro-fast demo` | cross-entropy | MoPro |",
        "|---|---|---|",
        f"| clean test accuracy, % | {mean('ce_top1')} | **{mean('mopro_top1')}** |",
        f"| the worst digit of all seeds, % | {worst('ce')} | {worst('mopro')} |",
        f"| label correction: precision, % | – | {mean('precision', 100)} |",
        f"| label correction: recall, % | – | {mean('recall', 100)} |",
        f"| out-of-distribution images removed, % | 0 | {mean('ood_removed', 100)} |",
    ]
    note = (
        f"Mean ± standard deviation of {len(runs)} seeds; MoPro is ahead on {sum(g > 0 for g in gains)} of them "
        f"({min(gains):+.1f} to {max(gains):+.1f} points); {alarmed or 'none'} of its runs raised an alarm. "
        "Every digit has the same share of wrong labels; how data and settings were chosen: docs/performance.md. "
        f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."
    )
    if seconds:
        note += f" Both trainings of a seed together took {statistics.mean(seconds):.0f} s."
    return "\n".join([*rows, "", note])


def demo_choice(result: dict) -> str:
    """A row per setting: how it does on held-out training images."""
    of_run: dict[str, list[dict]] = {}
    for r in result["runs"]:
        of_run.setdefault(r["name"], []).append(r)
    capro = "vanilla_top1" in result["runs"][0]
    columns = [f"`mopro-fast {'demo capro' if capro else 'train demo …'}`"]
    columns += ["right on held-out images, %: each seed", "mean"]
    columns += ["images left: the class with least, %", "alarms"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, own in of_run.items():
        left = [r["least_left"] for r in own]
        cells = [f"{name} (`{own[0]['options']}`)" if own[0]["options"] else name]
        cells += [", ".join(f"{r['held_out_top1']:.1f}" for r in own), _mean(own, "held_out_top1")]
        cells += ["–" if None in left else f"{100 * min(left):.0f}", _counts([r["alarms"] for r in own])]
        lines.append(f"| {' | '.join(cells)} |")
    c, seeds = result["conditions"], sorted({r["seed"] for r in result["runs"]})
    where = f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}"
    images = result["held_out"]
    return "\n".join([*lines, "", f"{images} held-out images a seed; seeds {_counts(seeds)}; {where}."])


def demo_capro_accuracy(result: dict) -> str:
    runs = result["runs"]
    lines = ["| `mopro-fast demo capro` | cross-entropy | MoPro | CAPro |", "|---" * 4 + "|"]
    for label, name, scale in (
        ("clean test accuracy, %", "top1", 1),
        ("label correction: precision, %", "precision", 100),
        ("label correction: recall, %", "recall", 100),
        ("out-of-distribution images removed, %", "ood_removed", 100),
    ):
        names = [f"{m}_{name}" for m in ("ce", "mopro", "capro")]
        lines.append(f"| {label} | {' | '.join(_mean(runs, n, scale) if n in runs[0] else '–' for n in names)} |")
    alarms = [_counts([r[f"{m}_alarms"] for r in runs]) for m in ("mopro", "capro")]
    lines.append(f"| alarms: each seed | – | {' | '.join(alarms)} |")
    gains = [r["capro_top1"] - r["mopro_top1"] for r in runs]
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]
    note = (
        f"Mean ± standard deviation of {len(runs)} seeds; CAPro against MoPro on each: "
        f"{', '.join(f'{g:+.1f}' for g in gains)} points. CAPro's first stage alone: {_mean(runs, 'vanilla_top1')} %. "
        f"{_mean(runs, 'anchors_right', 100)} % of the anchors have the right label, and of all images "
        f"{_mean(runs, 'labels_right', 100)} %. {_where(result)}"
    )
    if seconds:
        note += f" A seed took {statistics.mean(seconds):.0f} s."
    return "\n".join([*lines, "", note])


def cifar10n(result: dict) -> str:
    """A row per setting, mean over its seeds; the last columns against the first row."""
    s, c, runs, of_run = result["settings"], result["conditions"], result["runs"], {}
    for r in runs:
        of_run.setdefault(r["name"], []).append(r)
    columns = ["", "test accuracy, %", "against the first", "precision, %", "recall, %", "outsiders removed, %"]
    columns += [
        "right labels among the kept, %",
        "classes without an image at the end",
        "classes with half the recall",
        "alarms",
    ]
    if held := all(r["agreement"] is not None for r in runs):
        columns.append("held-out labels met, %")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, own in of_run.items():
        corrects = any(r["corrections"] or r["ood_removed"] for r in own)
        pair = result["paired"].get(name)
        error = "" if pair is None or pair["standard_error"] is None else f" ± {pair['standard_error']:.1f}"
        options = own[0]["options"]
        cells = [f"{name} (`{options}`)" if options else name, _mean(own, "top1")]
        cells.append("–" if pair is None else f"{pair['mean']:+.1f}{error}")
        names = ("precision", "recall", "ood_removed", "kept_right")
        cells += [_mean(own, n, 100) if corrects or n == "kept_right" else "–" for n in names]
        cells += [
            _counts([r["classes_lost"] for r in own]),
            "–" if pair is None else _counts(pair["classes_below_half"]),
        ]
        cells.append(_counts([len(r["alarms"]) for r in own]))
        if held:
            cells.append(_mean(own, "agreement"))
        lines.append(f"| {' | '.join(cells)} |")
    seeds, fewest = (f(len(own) for own in of_run.values()) for f in (max, min))
    fewer = " (one where there is no deviation)" if fewest == 1 < seeds else ""
    commits = ", ".join(sorted({r["commit"] for r in runs}))
    note = (
        f"{s['images']} images, {s['out_of_distribution']} of them outsiders, of the others {100 * s['wrong']:.0f} % "
        f"with a wrong label; {s['test_images']} test images; `small {s['common']}`; {seeds} seeds{fewer}, mean ± "
        f"standard deviation, differences ± standard error; counts: a number per seed. Settings: {s['chosen']}. "
        f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {commits}."
    )
    return "\n".join([*lines, "", note])


def capro_step(result: dict) -> str:
    """A table for each counted shape, one of times; bench/capro_step.py."""
    s, gpus = result["settings"], result["settings"]["gpus"]
    blocks = [_added_by_capro(case, gpus) for case in result["counted"]]
    shapes = [f"Q={case['Q']}, C={case['C']}" for case in result["timed"]]
    rows = [f"| CAPro's step over MoPro's, on a CPU | {' | '.join(shapes)} |", "|---" * (1 + len(shapes)) + "|"]
    for stage in result["timed"][0]["stages"]:
        found = [case["stages"][stage] for case in result["timed"]]
        cells = [f"× {f['ratio']:.2f} ({f['capro_ms']:.0f} / {f['mopro_ms']:.0f} ms)" for f in found]
        rows.append(f"| {stage} | {' | '.join(cells)} |")
    rates = ", ".join(
        f"{name} {g['bytes_per_s'] / 1e12:g} TB/s and {g['flop_per_s'] / 1e12:g} TFLOP/s" for name, g in gpus.items()
    )
    note = (
        f"Launches, bytes and flops are counted without a GPU (`python bench/capro_step.py`): ResNet-50, bf16, labels "
        f"corrected. Microseconds are predicted, not measured: {rates}, {s['launch_us']:g} µs a launch in a CUDA "
        f"graph (assumed). On the CPU: medians of {s['rounds']} rounds; {s['arch']}, width {s['width']:g}, {s['px']} "
        f"px, N={result['timed'][0]['N']}, float32; the encoder frozen: over MoPro's with corrected labels. "
    )
    return "\n\n".join([*blocks, "\n".join(rows), note + _where(result)])


def _added_by_capro(case: dict, gpus: dict) -> str:
    names = [f"added to MoPro's step: N={case['N']}, Q={case['Q']}, C={case['C']}", "launches: forward", "backward"]
    names += ["MB", "the least", "GFLOP", *(f"µs, {name}" for name in gpus)]
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    parts = case["parts"]
    total = {name: sum(p[name] for p in parts) for name in ("forward", "backward", "bytes", "flops")}
    total |= {"part": "**all**", "least_bytes": None, "us": {name: sum(p["us"][name] for p in parts) for name in gpus}}
    for p in (*parts, total):
        cells = [p["part"], str(p["forward"]), str(p["backward"]), f"{p['bytes'] / 1e6:.1f}"]
        cells.append("–" if p["least_bytes"] is None else f"{p['least_bytes'] / 1e6:.1f}")
        cells += [f"{p['flops'] / 1e9:.1f}", *(f"{p['us'][name]:.0f}" for name in gpus)]
        rows.append(f"| {' | '.join(cells)} |")
    for speeds in zip(*(g["images_per_s"] for g in gpus.values()), strict=True):
        at = " and ".join(f"{speed:,}" for speed in dict.fromkeys(speeds))
        of_step = [total["us"][name] * speed / case["N"] / 1e4 for name, speed in zip(gpus, speeds, strict=True)]
        cells = " | ".join(f"{share:.1f}" for share in of_step)
        rows.append(f"| % of MoPro's step at {at} img/s | – | – | – | – | – | {cells} |")
    stages = ", ".join(f"{name} {count}" for name, count in case["launches"].items())
    waits = case["waits"]["capro"] or "none"
    return "\n".join([*rows, "", f"Launches added, by stage: {stages}. The host waits for the device: {waits}."])


def capro_accuracy(result: dict) -> str:
    """A row per method; differences against cross-entropy, seed by seed; bench/capro_accuracy.py."""
    s, c, runs, of_run = result["settings"], result["conditions"], result["runs"], {}
    for r in runs:
        of_run.setdefault(r["name"], []).append(r)
    columns = ["", "test accuracy, %", "against cross-entropy", "precision, %", "recall, %"]
    columns += ["right labels among the kept, %", "re-trained, %", "with mix-up, %"]
    columns += ["classes without an image at the end", "alarms", "minutes"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, own in of_run.items():
        corrects, pair = any(r["corrections"] for r in own), result["paired"].get(name)
        cells = [name, _mean(own, "top1"), "–"]
        if pair is not None:
            error = "" if pair["standard_error"] is None else f" ± {pair['standard_error']:.1f}"
            cells[-1] = f"{pair['mean']:+.1f}{error}"
        cells += [_mean(own, n, 100) if corrects else "–" for n in ("precision", "recall")]
        cells.append(_mean(own, "kept_right", 100))
        retrained = [r.get("retrained", {}) for r in own]
        cells += [_mean([{"top1": r.get(how)} for r in retrained], "top1") for how in ("plain", "mixup")]
        cells += [_counts([r["classes_lost"] for r in own]), _counts([len(r["alarms"]) for r in own])]
        rows.append(f"| {' | '.join([*cells, _mean(own, 'minutes')])} |")
    note = (
        f"{s['images']} images, {100 * s['wrong']:.0f} % with a wrong label; {s['anchors_per_class']} anchors a class; "
        f"{s['test_images']} test images; `{s['common']}`; {max(map(len, of_run.values()))} seeds, mean ± standard "
        f"deviation, differences ± standard error; counts: a number per seed. Settings: {s['chosen']}. "
        f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {', '.join(sorted({r['commit'] for r in runs}))}."
    )
    return "\n".join([*rows, "", note])


def capro_anchors(result: dict) -> str:
    """A row per encoder and way, a column per K; bench/capro_anchors.py."""
    s, of = result["settings"], {}
    for r in result["rows"]:
        share = 100 * r["anchors_right"] / r["anchor_images"]
        of.setdefault((r["encoder"], r["way"]), {}).setdefault(r["K"], []).append({"right": share})
    columns = sorted({r["K"] for r in result["rows"]})
    rows = [f"| anchors right, % | | {' | '.join(f'K = {k}' for k in columns)} |"]
    rows.append("|---" * (2 + len(columns)) + "|")
    rows += [
        f"| {'–' if way == 'random' else encoder} | {way} | {' | '.join(_mean(found[k], 'right') for k in columns)} |"
        for (encoder, way), found in of.items()
    ]
    similar = statistics.mean(r["similar_right"] for r in result["rows"] if r["similar_right"] is not None)
    absent = f" Not installed, so not measured: {', '.join(s['absent'])}." if s["absent"] else ""
    note = (
        f"{s['images']} images, {100 * s['wrong']:.0f} % with a wrong label; mean ± standard deviation of {s['seeds']} "
        f"seeds of the captions.{absent} The features' model: `{s['common']}`, one seed, right on {s['top1']:.1f} % of "
        f"the test images; of the images that it finds similar, {100 * similar:.0f} % are of the same true class. "
    )
    return "\n".join([*rows, "", note + _where(result)])


def cifar10n_curves(result: dict) -> str:
    """What label correction does epoch by epoch, in each setting's run with the first seed."""
    columns = ["", "epoch", "test accuracy, %", "removed, %", "relabelled, %", "mean score of the class preferred, %"]
    columns += ["images left: the class with least, %", "with most, %"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for run in (r for r in result["runs"] if r["seed"] == 0 and r["classes"]):
        at = [c["epoch"] for c in run["classes"]]
        shown = [at[0], at[0] + 1, *(e for e in at[2:] if e % 6 == 0 or e == at[-1])]
        for epoch in (e for e in shown if e in at):
            c, curves = run["classes"][at.index(epoch)], run["curves"]
            kept, relabelled = curves["kept"][epoch - 1], curves["relabelled"][epoch - 1]
            shares = [1 - kept, relabelled, c["score"], c["least"], c["most"]]
            cells = [run["name"], str(epoch), f"{curves['val'][epoch - 1]:.1f}", *(f"{100 * s:.1f}" for s in shares)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: list[dict], name: str, scale: float = 1.0) -> str:
    values = [scale * r[name] for r in runs if r[name] is not None]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else "–"


def _counts(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


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


def throughput(result: dict) -> str:
    c, s = result["conditions"], result["settings"]
    blocks = [report.table(result)]
    moved = read("traffic", HERE / "results")
    if s["device"] == "cuda" and (s["arch"], s["image_size"]) == ("resnet50", moved["settings"]["image_size"]):
        blocks.append(report.shares(result, {row["scheme"]: row["limit"] for row in moved["rows"]}))
    net = f"{s['arch']}, width {s['width']:g}, {s['image_size']} px, Q={s['queue_size']}"
    note = f"{net}; synthetic images; {c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."
    return "\n\n".join([*blocks, note])


def traffic(result: dict) -> str:
    s = result["settings"]
    head = ["how activations move", "MB per image, both forwards and backward", "of it the key encoder"]
    head += ["limit of memory, img/s", "limit of convolutions, img/s"]
    rows = [
        f"| {r['scheme']} | {r['mb_query'] + r['mb_key']:.0f} | {r['mb_key']:.0f} | {r['limit']:.0f} "
        f"| {r['limit_convolutions']:.0f} |"
        for r in result["rows"]
    ]
    rates = ", ".join(f"{100 * rate:g} % {name}" for name, rate in s["rates"].items())
    note = (
        f"Counted, not measured (`python bench/traffic.py`). Memory at {s['bandwidth'] / 1e12:g} TB/s; convolutions, "
        f"{s['gflop']['query']:.1f} GFLOP of the query encoder and {s['gflop']['key']:.1f} of the key encoder, at "
        f"{s['products'] / 1e12:g} TFLOP/s, of which they are assumed to reach {rates}; "
    )
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    return "\n".join([*rows, "", note + f"commit {result['conditions']['commit']}."])


def anchors(result: dict) -> str:
    head = ["published", "GPUs", "supervised img/s of a GPU", "TFLOP/s", "% of what memory allows"]
    rows = [f"| {' | '.join([*head, 'with one more forward pass, img/s'])} |", "|---" * 6 + "|"]
    rows += [
        f"| {x['what']} | {x['gpus'] or '?'} {x['gpu']} | {x['supervised']:,} | {x['tflop_per_s']:.0f} "
        f"| {100 * x['of_memory']:.0f} | {round(x['mopro'], -1):,.0f} |"
        for x in result["anchors"]
    ]
    note = (
        "Published results of others, none of them run here. Memory: the query encoder in the last row above, at 4.3 "
        "TB/s (H200) and 3 TB/s (H100). The last column is implied: one more forward pass adds a third of the work. "
        "Source: mlcommons/training_results_v4.0 and _v3.1 on GitHub; ?: how many GPUs is not noted here."
    )
    return "\n".join([*rows, "", note])


def step_parts(result: dict) -> str:
    """The step as it is, predicted."""
    parts, gpus = result["parts"], ("H100", "H200")
    rows = [f"| part, N=256 | GB | {' | '.join(f'ms, {gpu}' for gpu in gpus)} |", "|---" * 4 + "|"]
    rows += [
        f"| {p['part']} | {'–' if p['gb'] is None else p['gb']} | {' | '.join(f'{p[gpu]:g}' for gpu in gpus)} |"
        for p in parts
    ]
    total = {gpu: sum(p[gpu] for p in parts) for gpu in gpus}
    rows.append(f"| **all** | – | {' | '.join(f'{total[gpu]:.1f}' for gpu in gpus)} |")
    rows.append(f"| img/s | – | {' | '.join(f'{round(256e3 / total[gpu], -1):,.0f}' for gpu in gpus)} |")
    note = (
        "Predicted by hand from the sources and the compiled kernels (bench/traffic.py), not measured: kernels bound "
        "by memory reach 88 to 90 % of a copy's 3 and 4.3 TB/s, max-pooling with its int64 indices less; convolutions "
        "take 7 to 9 % more than the rates above or 88 % of a copy allow, layer by layer."
    )
    return "\n".join([*rows, "", note])


def speedups(result: dict, measured: dict | None = None) -> str:
    """A row for each of models/speedups.py (bench/speedups.py), and what `tests/gpu.sh speedups` has found."""

    def moved(row: dict) -> float:
        return row["mb_query"] + row["mb_key"]

    s, base = result["settings"], result["base"]
    gpus = list(s["bandwidth"])
    sizes = list(result["rows"][0]["ms"][gpus[0]])
    head = ["speed-up", "what it does", "MB per image", "launches"]
    head += [f"saves, ms: N={n}, {gpu}" for n in sizes for gpu in gpus]
    rows = [f"| {' | '.join([*head, 'outcome'])} |", "|---" * (len(head) + 1) + "|"]
    for r in result["rows"]:
        name, what = (f"`{r['name']}`", r["what"]) if r["what"] else (f"**{r['name']}**", "–")
        cells = [name, what, f"{moved(base):.0f} → {moved(r):.0f}", f"{base['launches']} → {r['launches']}"]
        cells += [_range(*r["ms"][gpu][n]) for n in sizes for gpu in gpus]
        rows.append(f"| {' | '.join([*cells, _outcome(r['name'], measured)])} |")
    steps = [_with_all(result, gpu, n) for n in sizes for gpu in gpus]
    for label, cells in zip(("the step, ms", "img/s"), zip(*steps, strict=True), strict=True):
        rows.append(f"| **{label}** | – | – | – | {' | '.join(cells)} | |")
    at_32 = " and ".join(f"{32e3 / result['step_ms'][gpu]['32']:,.0f}" for gpu in gpus)
    rates = " and ".join(f"{name} {rate / 1e12:g} TB/s" for name, rate in s["bandwidth"].items())
    note = (
        f"Megabytes and launches are counted without a GPU (`python bench/speedups.py`): ResNet-50, 224 px, bf16, "
        f"C=1000, Q={s['queue_size']}, labels corrected. Megabytes include the max-pooling and the gradients added "
        f"where two meet, which the first table leaves out. Milliseconds are predicted: bytes at "
        f"{100 * s['efficiency']:g} % of a copy's bandwidth ({rates}) and {s['launch_us'][0]:g} µs for a launch in a "
        f"CUDA graph (assumed). A second launch of BatchNorm and its kernel save {_range(*s['last_program_us'])} µs "
        f"(assumed); so are all ranges, and what `key-stream` saves. Last two rows: without and with all of them; N=32 "
        f"from {at_32} img/s, predicted as the parts above. Commit {result['conditions']['commit']}."
    )
    return "\n".join([*rows, "", note])


def _outcome(name: str, measured: dict | None) -> str:
    """Milliseconds that the variant saves against ours, by N: of the medians; p20 and p80 at their worst and best."""
    found = []
    if measured and measured["conditions"]["gpu"] and measured["settings"]["arch"] == "resnet50":
        for case in measured["cases"]:
            variant = "all speed-ups" if name == "all" else name
            ours, other = (case["variants"].get(v, {}).get("step_ms") for v in ("ours", f"ours, {variant} on"))
            if ours and other:
                least, most = ours["p20"] - other["p80"], ours["p80"] - other["p20"]
                saved = ours["p50"] - other["p50"]
                found.append(f"N={case['batch']}: {_range(saved, saved)} ({_range(least, most)})")
    return f"{', '.join(found)}; {measured['conditions']['gpu']}" if found else "not measured"


def _with_all(result: dict, gpu: str, n: str) -> tuple[str, str]:
    """Milliseconds and images a second, without and with all speed-ups."""
    now, (low, high) = result["step_ms"][gpu][n], result["rows"][-1]["ms"][gpu][n]
    least, most = now - high, now - low
    speeds = [f"{round(1e3 * int(n) / ms, -1):,.0f}" for ms in (now, most, least)]
    return f"{now:.1f} → {least:.1f} to {most:.1f}", f"{speeds[0]} → {speeds[1]} to {speeds[2]}"


def _range(low: float, high: float) -> str:
    low, high = (f"{x + 0.0:.2f}".replace("-", "−").replace("−0.00", "0.00") for x in (low, high))
    return low if low == high else f"{low} to {high}"


def numerics(result: dict) -> str:
    kinds = ("fp32", "bf16", "half-keys")
    rows = [
        "| | float32, eager reference ops | bfloat16, this package's step | the same, keys in float16 |",
        "|---" * 4 + "|",
    ]

    def row(label: str, values: dict[str, list[float]], digits: int) -> None:
        cells = [spread(values[kind], digits) if kind in values else "" for kind in kinds]
        rows.append(f"| {label} | {' | '.join(cells)} |")

    def spread(values: list[float], digits: int) -> str:
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    runs = {kind: [run for run in result["runs"] if run["precision"] == kind] for kind in kinds}
    row("loss, mean of the last epoch", {kind: [r["loss"] for r in own] for kind, own in runs.items()}, 3)
    row("accuracy on the test images, %", {kind: [r["top1"] for r in own] for kind, own in runs.items()}, 1)
    for other, label in (("fp32", "float32"), ("bf16", "bfloat16")):
        same = {kind: [r["same_labels"].get(other) for r in own] for kind, own in runs.items()}
        same = {kind: v for kind, v in same.items() if None not in v and kind != other}
        row(f"labels after correction as in {label}, same seed, %", same, 1)
    row("labels after correction as of another seed, %", {"bf16": result["same_labels_of_seeds"]}, 1)
    cosines = {kind: [r["cosines"] for r in runs[kind]] for kind in kinds[1:]}
    for name, label in (("mean", "mean"), ("min", "largest")):
        shown = [f"{1 - statistics.mean(c[name] for c in cosines[kind]):.1e}" for kind in kinds[1:]]
        rows.append(f"| 1 − cosine of a key and float32's, same weights and images, {label} | | {' | '.join(shown)} |")
    c, s = result["conditions"], result["settings"]
    note = f"Mean ± standard deviation of {s['seeds']} seeds; {s['images']} images, {s['epochs']} epochs, {s['arch']}, "
    note += f"width {s['width']:g}, {s['batch_size']} rows in BatchNorm groups of {s['bn_group']}; "
    note += f"{c['gpu'] or c['cpu']}; "
    return "\n".join([*rows, "", note + f"PyTorch {c['torch']}; commit {c['commit']}."])


def memory(result: dict) -> str:
    cases, a = result["cases"], result["assumptions"]
    rows = [
        "| GB, per GPU | " + " | ".join(f"N={c['N']}, C={c['C']}" for c in cases) + " |",
        "|---" * (1 + len(cases)) + "|",
    ]
    for name in cases[0]["parts"]:
        rows.append(f"| {name} | " + " | ".join(f"{c['parts'][name] / 1e9:.2f}" for c in cases) + " |")
    rows.append("| **peak, predicted** | " + " | ".join(f"**{c['total'] / 1e9:.1f}**" for c in cases) + " |")
    shares = " | ".join(f"{100 * c['total'] / 1e9 / a['budget_gb']:.0f}" for c in cases)
    rows.append(f"| % of {a['budget_gb']:g} GB | {shares} |")
    note = (
        f"Counted without a GPU (`python bench/memory.py`), not measured; 10⁹ bytes; ResNet-50, {a['px']} px, bf16; "
        f"{a['batches']} batches of two views, gaps {100 * a['slack']:g} %; commit {result['conditions']['commit']}."
    )
    return "\n".join([*rows, "", note])


def scaling_bytes(result: dict) -> str:
    few, many = result["cases"][0]["collectives"][0]["sent"]
    rows = [
        f"| | collective | type | calls | MB a rank hands over | MB leaving a GPU by NVLink: W={few} | W={many} "
        f"| by InfiniBand: W={many} |",
        "|---" * 8 + "|",
    ]
    for case in result["cases"]:
        for c in case["collectives"]:
            name = c["name"] + (f", C={case['C']}" if c["name"][:7] in ("gradien", "buffers") else "")
            if case is not result["cases"][0] and name == c["name"]:
                continue  # does not depend on C
            links = [c["sent"][few]["nvlink"], c["sent"][many]["nvlink"], c["sent"][many]["infiniband"]]
            cells = [_megabytes(c["bytes"]), *("–" if c["on_cpu"] else _megabytes(x) for x in links)]
            rows.append(f"| {name} | {c['kind']} | {c['dtypes']} | {len(c['sizes'])} | {' | '.join(cells)} |")
    a = result["assumptions"]
    note = (
        f"Counted from the model's parameters (`python bench/scaling.py`): ResNet-50, N={a['rows']} rows per GPU, "
        f"{a['px']} px, bf16; 10⁶ bytes; commit {result['conditions']['commit']}."
    )
    return "\n".join([*rows, "", note])


def scaling_speed(result: dict) -> str:
    head = ["GPUs"]
    for case in result["cases"]:
        head += [f"C={case['C']}: communication, ms", "not hidden, ms", "img/s", "efficiency, %"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for same in zip(*(case["speeds"] for case in result["cases"]), strict=True):
        cells = [str(same[0]["gpus"])]
        for s in same:
            cells += [f"{s['communication_ms']:.2f}", f"{s['exposed_ms']:.2f}"]
            cells += [f"{s['images_per_second']:,.0f}", f"{100 * s['efficiency']:.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    a = result["assumptions"]
    step = 1e3 * a["rows"] / a["images_per_second"]
    note = f"Predicted, not measured. One GPU's step of {step:.1f} ms is a prediction, too: docs/performance.md."
    return "\n".join([*rows, "", f"{note} Commit {result['conditions']['commit']}."])


def scaling_assumptions(result: dict) -> str:
    rows = ["| argument | value | what, and its source |", "|---|---|---|"]
    for name, value in result["assumptions"].items():
        shown = " ".join(f"{x:g}" for x in value) if isinstance(value, list) else f"{value:,}"
        rows.append(f"| `--{name.replace('_', '-')}` | {shown} | {result['sources'][name]} |")
    return "\n".join(rows)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f}" if size >= 1e4 else f"{size / 1e6:.6f}".rstrip("0").rstrip(".")


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


def parity_minilm(result: dict) -> str:
    """sentence-transformers and mopro_fast/text/minilm.py; bench/parity_minilm.py."""
    r, of = result, result["characters"]
    rows = ["| sentence-transformers and ours | of | found | limit |", "|---|---|---|---|"]
    rows += [
        f"| odd texts with the same token ids | {r['texts']} | {r['ids_equal']} | {r['texts']} |",
        f"| their vectors: largest difference | {r['texts']} | {r['difference']:.1g} | {r['limit']:.0e} |",
        f"| a text alone and among the others: largest difference | {r['texts']} | {r['alone_and_together']:.1g} | |",
        f"| characters that are split differently | {of['of']:,} | {of['differ']} | |",
    ]
    peers = ", ".join(f"{name} {version}" for name, version in r["peer"].items())
    note = f"Characters: each between two letters; ours is Python's Unicode {of['unicode']}. Theirs: {peers}. Ours:"
    return "\n".join([*rows, "", f"{note} {_where(result)}"])


def _where(result: dict) -> str:
    c = result["conditions"]
    return f"{c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."


def scale_text(result: dict) -> str:
    """Seconds and memory from texts to anchors; bench/scale_text.py."""
    r, of = result, result["webvision"]
    graph = f"`match`, {r['graph']:,} images of {r['width']} features"
    rows = {
        "read": f"`read`, {r['texts']:,} texts",
        "embed": f"`embed`, {r['texts']:,} texts, hash",
        "match": f"`match --keep 0`, {r['texts']:,} texts in {r['classes']:,} classes",
        "graph_one": graph,
        "graph_two": f"{graph}, two processes",
        "graph_again": f"{graph}, killed after {r['graph_killed']['seconds']:.0f} s and started again",
    }
    lines = ["| step | seconds | peak memory, MB, of the largest process |", "|---|---|---|"]
    lines += [f"| {text} | {r[name]['seconds']:.0f} | {r[name]['peak_mb']:,.0f} |" for name, text in rows.items()]
    same = "the same bytes" if r["same_bytes"] else "**other bytes**"
    return "\n".join(
        [
            *lines,
            "",
            f"The last three write {same}. Memory-mapped features count as memory here. {_where(result)}",
            "",
            f"Counted, not measured: the graph of {of['rows']:,} images of {of['width']:,} features takes "
            f"{of['float32_flop'] / 1e15:.1f} · 10¹⁵ operations in float32 and "
            f"{of['float64_flop'] / 1e12:.1f} · 10¹² in float64. At 50 · 10¹² a second the products alone "
            f"take {of['float32_flop'] / 50e12 / 60:.0f} minutes; choosing the greatest comes on top. A GPU holds the "
            f"features ({of['feature_bytes'] / 1e9:.0f} GB) if they take less than half of its free memory, and reads "
            f"{of['reread_bytes'] / 1e12:.1f} · 10¹² bytes of them; {of['kept_bytes'] / 1e6:.0f} MB stay.",
        ]
    )


# stage of bench/scale.py: its row of the table
SCALE = {
    **{f"first-check-{n}": f"`check`, nothing known, {n} worker{'s' * (n > 1)}" for n in (1, 2, 4)},
    "check": "`check`, nothing changed",
    "raw-first": "raw files: from nothing to the first step",
    "raw-fresh": "raw files, checked: first step of a new run",
    "raw-resumed": "raw files: first step of a resumed run",
    "pack-first": "pack: first step of the first run on it",
    "pack-fresh": "pack: first step of a further run",
    "pack-resumed": "pack: first step of a resumed run",
    "pack-cold": "the same, no page of pack and run in the cache",
    "ranks": "pack: first step of a new run of {ranks} ranks",
    "clean": "`clean`: both tables, all images scored",
    "labels": "`retrain`: the cleaned labels",
    "order": "`retrain`: an epoch's order",
    "report": "`report` of cleaned labels",
}
OF_MACHINE = dict.fromkeys(("first-check-1", "first-check-2", "first-check-4", "raw-first"), "pss_mb")
OF_MACHINE |= {"ranks": "over_imports_mb"}
SCALE_MOST = 7.5  # times as long, from the middle number of images to the largest


def scale(result: dict) -> str:
    """A table of seconds and one of memory, a column for each number of images; bench/scale.py."""
    s, c, rows = result["settings"], result["conditions"], result["rows"]
    of = {(r["stage"], r["size"], r["tree"]): r for r in rows}
    sizes = sorted({r["size"] for r in rows})
    names = {stage: SCALE[stage].format(**s) for stage in SCALE if any(r["stage"] == stage for r in rows)}
    counts = [f"{size / 1e6:g} million" for size in sizes]
    times, memory = [["seconds", *counts, "× at the end"]], [["GB", *counts]]
    for stage, name in names.items():
        last = [of.get((stage, size, "after"), {}).get("seconds") for size in sizes[-2:]]
        growth = last[1] / last[0] if len(last) == 2 and None not in last else None
        cells = ["–" if growth is None else f"{growth:.1f}" if growth <= SCALE_MOST else f"**{growth:.1f}**"]
        times.append([name, *(_before_after(of, stage, size, _seconds) for size in sizes), *cells])
        memory.append([name, *(_before_after(of, stage, size, _own_memory) for size in sizes)])
        if kind := OF_MACHINE.get(stage):
            cells = [_before_after(of, stage, size, lambda r, kind=kind: _short(r[kind] / 1e3)) for size in sizes]
            memory.append([f"{name}: the machine", *cells])
    blocks = []
    for lines in (times, memory):
        lines.insert(1, ["---"] * len(lines[0]))
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    both = [(r, of.get((r["stage"], r["size"], "before"), {})) for r in rows if r["tree"] == "after"]
    pairs = [(names[r["stage"]], r["sha256"] == other["sha256"]) for r, other in both if "sha256" in r.keys() & other]
    differ = {name for name, same in pairs if not same}
    commits = [", ".join(dict.fromkeys(r["commit"] for r in rows if r["tree"] == t)) for t in ("before", "after")]
    note = (
        f"Before → after, commits {' → '.join(filter(None, commits))}, in turn, by `python bench/scale.py`. Raw: "
        f"{s['files']:,} small files under so many links that each row has a path of its own, as quick to look at as "
        f"files can be; pack: shards of {s['shard']:,} images, links of one; tables about either take less disk than "
        "others of so many rows. Without an arrow: the earlier code was not run. Seconds: of the whole process, "
        "imports included; of `clean` and `retrain` those of that part, of `retrain` the median of three calls. The "
        "page cache is warm. The last column: × from the middle number of images to the largest, at most "
        f"{SCALE_MOST:g}. Memory: the peak of the main process, or of the largest rank (in brackets what it had for "
        "itself at its first step); the machine: the sum of the PSS of all processes, of "
        f"{s['ranks']} ranks less that of {s['ranks']} processes which only import mopro_fast. "
    )
    if differ:
        note += f"**Other bytes than before: {', '.join(sorted(differ))}.** "
    elif pairs:
        note += "What both wrote has the same bytes. "
    return "\n\n".join([*blocks, f"{note}{c['cpu']}, {s['memory_gb']:g} GB, {s['file_system']}; PyTorch {c['torch']}."])


def _before_after(of: dict, stage: str, size: int, value: Callable[[dict], str]) -> str:
    found = [of[stage, size, tree] for tree in ("before", "after") if (stage, size, tree) in of]
    return " → ".join(r.get("failed") or r.get("skipped") or value(r) for r in found) or "–"


def _seconds(r: dict) -> str:
    rate = f" ({r['size'] / r['seconds']:,.0f} images/s)" if r["stage"].startswith("first-check") else ""
    return _short(r["seconds"]) + rate


def _own_memory(r: dict) -> str:
    return _short(r["peak_mb"] / 1e3) + (f" ({_short(r['rss_anon_mb'] / 1e3)})" if "rss_anon_mb" in r else "")


def _short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def chain(result: dict) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    cleaned, s, c = result["cleaning"], result["settings"], result["conditions"]
    names = {
        "noise_before": "wrong labels before cleaning (of in-distribution images)",
        "noise_after": "wrong labels after it (of those that stay)",
        "precision": "precision: of the labels changed, right afterwards",
        "recall": "recall: of the wrong labels, right afterwards",
        "out_of_distribution_removed": "out-of-distribution images removed",
        "in_distribution_removed": "other images removed",
    }
    rows = ["| % | |", "|---|---|"] + [f"| {text} | {percent(cleaned[name])} |" for name, text in names.items()]
    rows += [f"| test accuracy {name} re-training | {result['top1'][name]:.2f} |" for name in ("before", "after")]
    changed = ", ".join(s["changed"])
    note = f"CIFAR-10N `worse`, {s['images']} images, {s['outside']} of them outsiders; {s['epochs']} epochs, "
    note += f"recipe {s['recipe']}" + (f" with {changed}" if changed else "")
    return "\n".join([*rows, "", f"{note}; {c['gpu'] or c['cpu']}; PyTorch {c['torch']}; commit {c['commit']}."])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


# The settings of bench/cases.py that the documentation shows.
PAPER = [
    {"model": "resnet50", "shadows": False},
    {"N": 256, "C": 1000, "Q": 8192, "M": 256},
    {"N": 256, "C": 1000, "Q": 8192, "M": 2048},
]
SHOWN = [*PAPER, {"model": "resnet50", "shadows": True}, {"N": 1024, "C": 5000, "Q": 65536, "M": 1024}]
SHOWN += [{"N": 256, "C": c, "side": side} | k for c, side in ((256, 56), (2048, 7)) for k in ({}, {"K": c // 4})]
SHOWN += [{"N": 256, "S": 224}]
# table: (result file, function)
TABLES = {
    "demo_accuracy": ("demo_accuracy", demo_accuracy),
    "demo_choice": ("demo_choice", demo_choice),
    "demo_capro_accuracy": ("demo_capro_accuracy", demo_capro_accuracy),
    "demo_capro_choice": ("demo_capro_choice", demo_choice),
    "cifar10n": ("cifar10n", cifar10n),
    "cifar10n_curves": ("cifar10n", cifar10n_curves),
    "capro_step": ("capro_step", capro_step),
    "capro_accuracy": ("capro_accuracy", capro_accuracy),
    "capro_anchors": ("capro_anchors", capro_anchors),
    "ops": ("ops_gpu", ops),
    "launches": ("launches", launches),
    "loader": ("loader", loader),
    "memory": ("memory", memory),
    "scale": ("scale", scale),
    "scaling_bytes": ("scaling", scaling_bytes),
    "scaling_speed": ("scaling", scaling_speed),
    "scaling_assumptions": ("scaling", scaling_assumptions),
    "parity": ("parity", parity),
    "parity_lowshot": ("parity_lowshot", parity_lowshot),
    "parity_probe": ("parity_probe", parity_probe),
    "parity_capro": ("parity_capro", parity),
    "scale_text": ("scale_text", scale_text),
    "parity_minilm": ("parity_minilm", parity_minilm),
    "ops_requirements": ("ops_gpu", requirements),
    "ops_figure": ("ops_gpu", lambda r: f"![Time of every op against its floor, {r['conditions']['gpu']}](ops.svg)"),
    "throughput_gpu": ("throughput_gpu", throughput),
    "throughput_cpu": ("throughput_cpu", throughput),
    "throughput_requirements": ("throughput_gpu", requirements),
    "throughput_figure": ("throughput_gpu", lambda _: "![Images a second by batch size](throughput.svg)"),
    "traffic": ("traffic", traffic),
    "anchors": ("traffic", anchors),
    "step_parts": ("traffic", step_parts),
    "speedups": ("speedups", speedups),
    "chain": ("chain", chain),
    "numerics": ("numerics", numerics),
    "numerics_figure": (
        "numerics",
        lambda _: "![Loss by step: float32, bfloat16, and with keys in float16](numerics.svg)",
    ),
}


BESIDE = {"speedups": ("step_speedups",)}
"""Result files that a table takes besides its own, where they are there."""


def read(file: str, folder: Path) -> dict | None:
    path = folder / f"{file}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(name: str, folder: Path | None = None) -> str:
    file, function = TABLES[name]
    result = read(file, folder or HERE / "results")
    if result is None:
        return "Not measured yet."
    return function(result, *(read(other, folder or HERE / "results") for other in BESIDE.get(name, ())))


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
    for name, (file, draw) in figures.FIGURES.items():
        path, result = DOCS / name, read(file, HERE / "results")
        if figures.is_stale(path, result):
            names.append(name)
            if not a.check:
                path.unlink(missing_ok=True) if result is None else figures.save(path, result, draw)
    for name in names:
        print(f"{name} {'is out of date: run python bench/tables.py' if a.check else 'rewritten'}")
    return int(a.check and bool(names))


if __name__ == "__main__":
    raise SystemExit(main())
