"""The tables of `mopro-fast bench`: from its numbers to Markdown."""

from typing import Any

from mopro_fast.benchmark.throughput import ENCODERS, OFFICIAL, OURS, PARTS


def table(result: dict[str, Any]) -> str:
    """Every case: the variants, then the parts of our step, then training on images if that was asked for."""
    late = result.get("not_reached")
    missing = f"Not reached in time (--minutes): {', '.join(late)}." if late else ""
    blocks = [_variants(result), missing, _parts(result), _on_images(result)]
    return "\n\n".join(block for block in blocks if block)


def shares(result: dict[str, Any], limits: dict[str, float]) -> str:
    """Our speed as a share of limits in images a second, by name."""
    rows = [["N", "C", *(f"of {limit:.0f} img/s: {name}" for name, limit in limits.items())]]
    rows.append(["---"] * len(rows[0]))
    for case in result["cases"]:
        if speed := case["variants"][OURS].get("images_per_second"):
            rows.append([case["batch"], case["classes"], *(f"{100 * speed / x:.0f} %" for x in limits.values())])
    return "Share of what memory traffic allows, by how activations move:\n\n" + _lines(rows)


def brief(name: str, v: dict[str, Any]) -> str:
    return f"{name} {v['skipped'] if 'skipped' in v else format(v['images_per_second'], '.0f')}"


def overhead(case: dict[str, Any]) -> float | None:
    """Share of the step that is MoPro's own, beyond the two encoders."""
    both = [case["variants"].get(name, {}).get("step_ms") for name in (OURS, ENCODERS)]
    return both[0]["p50"] / both[1]["p50"] - 1 if all(both) else None


def over_official(case: dict[str, Any], name: str = OURS) -> float | None:
    ours, theirs = (case["variants"].get(n, {}).get("images_per_second") for n in (name, OFFICIAL))
    return ours / theirs if ours and theirs else None


def _variants(result: dict[str, Any]) -> str:
    gpu = result["settings"]["device"] == "cuda"
    head = ["N", "C", "variant", "img/s", "× official", "ms per step (p20–p80)"]
    head += ["kernels", "launches by the host", "synchronisations", "GB"] if gpu else []
    rows = [head, ["---"] * len(head)]
    for case in result["cases"]:
        for name, v in case["variants"].items():
            start = [case["batch"], case["classes"], f"**{name}**" if name == OURS else name]
            if "skipped" in v:
                rows.append([*start, v["skipped"], *["–"] * (len(head) - 4)])
                continue
            ratio, ms = over_official(case, name), v["step_ms"]
            rows.append([*start, f"{v['images_per_second']:.0f}", f"{ratio:.2f}" if ratio else "–"])
            rows[-1].append(f"{ms['p50']:.1f} ({ms['p20']:.1f}–{ms['p80']:.1f})")
            if gpu:
                launched = ", ".join(f"{n} {kind}" for kind, n in v["host_launches"].items() if n)
                rows[-1] += [v["launches"], launched, v["synchronisations"], f"{v['memory_gb']:.1f}"]
    return _lines(rows)


def _parts(result: dict[str, Any]) -> str:
    cases = [case for case in result["cases"] if "parts_ms" in case]
    if not cases:
        return ""
    names = [*PARTS, "rest"]
    rows = [["N", "C", *names, "head's share"], ["---"] * (len(names) + 3)]
    for case in cases:
        parts, total = case["parts_ms"], sum(case["parts_ms"].values())
        values = [f"{parts[name]:.2f}" for name in names]
        rows.append([case["batch"], case["classes"], *values, f"{100 * parts['head'] / total:.1f} %"])
    return "Our step by part, eager, ms:\n\n" + _lines(rows)


def _on_images(result: dict[str, Any]) -> str:
    cases = [case for case in result["cases"] if "on_images" in case]
    rows = [["N", "C", "img/s on images", "waiting for them"], ["---"] * 4]
    for case in cases:
        found = case["on_images"]
        rows.append(
            [case["batch"], case["classes"], f"{found['images_per_second']:.0f}", f"{100 * found['data_wait']:.1f} %"]
        )
    return _lines(rows) if cases else ""


def _lines(rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
