"""The tables of `mopro-fast bench`: from its numbers to Markdown."""

from typing import Any

from mopro_fast.benchmark.throughput import ENCODERS, OFFICIAL, OURS, PARTS


def table(result: dict[str, Any]) -> str:
    """Every case: the variants, their kernels, the parts of our step, training on images if that was asked for."""
    late = result.get("not_reached")
    missing = f"Not reached in time (--minutes): {', '.join(late)}." if late else ""
    blocks = [_variants(result), missing, *_kinds(result), _parts(result), _on_images(result)]
    return "\n\n".join(block for block in blocks if block)


def shares(result: dict[str, Any], limits: dict[str, float]) -> str:
    """Our speed as a share of limits in images a second, by name."""
    rows = [["N", "C", *(f"of {limit:.0f} img/s: {name}" for name, limit in limits.items())]]
    rows.append(["---"] * len(rows[0]))
    for case in result["cases"]:
        if speed := case["variants"].get(OURS, {}).get("images_per_second"):
            rows.append([case["batch"], case["classes"], *(f"{100 * speed / x:.0f} %" for x in limits.values())])
    return "Share of what memory traffic allows, by how activations move:\n\n" + _lines(rows)


def brief(name: str, v: dict[str, Any]) -> str:
    return f"{name} {_why_not(v) or format(v['images_per_second'], '.0f')}"


def failed(result: dict[str, Any]) -> bool:
    """Whether anything that was tried broke."""
    return any(
        "failed" in v or "not_counted" in v
        for case in result["cases"]
        for v in (*case["variants"].values(), case.get("parts_ms", {}), case.get("on_images", {}))
    )


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
            if why := _why_not(v):
                rows.append([*start, why, *["–"] * (len(head) - 4)])
                continue
            ratio, ms = over_official(case, name), v["step_ms"]
            rows.append([*start, f"{v['images_per_second']:.0f}", f"{ratio:.2f}" if ratio else "–"])
            rows[-1].append(f"{ms['p50']:.1f} ({ms['p20']:.1f}–{ms['p80']:.1f})")
            if gpu:
                launched = ", ".join(f"{n} {kind}" for kind, n in v["host_launches"].items() if n)
                rows[-1] += [v["launches"], launched, v["synchronisations"], f"{v['memory_gb']:.1f}"]
    return _lines(rows)


def _kinds(result: dict[str, Any]) -> list[str]:
    """A table for each case: what takes longest first, by variant."""
    blocks = []
    for case in result["cases"]:
        profiled = {name: v["kernels"] for name, v in case["variants"].items() if v.get("kernels")}
        columns = profiled.values()
        longest = {kind: max(c[kind]["ms"] for c in columns if kind in c) for column in columns for kind in column}
        rows = [["kind", *profiled], ["---"] * (1 + len(profiled))]
        for kind in sorted(longest, key=longest.get, reverse=True):
            rows.append([kind, *(_kind(c.get(kind)) for c in columns)])
        sums = [{key: sum(k[key] for k in c.values()) for key in ("ms", "launches")} for c in columns]
        rows.append(["all", *map(_kind, sums)])
        if profiled:
            of = f"N={case['batch']} C={case['classes']}"
            blocks.append(f"Device time by kind of kernel, ms (launches), {of}:\n\n" + _lines(rows))
    return blocks


def _kind(found: dict[str, float] | None) -> str:
    return f"{found['ms']:.2f} ({found['launches']})" if found else "–"


def _parts(result: dict[str, Any]) -> str:
    cases = [case for case in result["cases"] if "parts_ms" in case]
    if not cases:
        return ""
    names = [*PARTS, "rest"]
    rows = [["N", "C", *names, "head's share"], ["---"] * (len(names) + 3)]
    for case in cases:
        parts = case["parts_ms"]
        if why := _why_not(parts):
            rows.append([case["batch"], case["classes"], why, *["–"] * len(names)])
            continue
        total = sum(parts.values())
        values = [f"{parts[name]:.2f}" for name in names]
        rows.append([case["batch"], case["classes"], *values, f"{100 * parts['head'] / total:.1f} %"])
    return "Our step by part, eager, ms:\n\n" + _lines(rows)


def _on_images(result: dict[str, Any]) -> str:
    cases = [case for case in result["cases"] if "on_images" in case]
    rows = [["N", "C", "img/s on images", "waiting for them"], ["---"] * 4]
    for case in cases:
        found, start = case["on_images"], [case["batch"], case["classes"]]
        if why := _why_not(found):
            rows.append([*start, why, "–"])
        else:
            rows.append([*start, f"{found['images_per_second']:.0f}", f"{100 * found['data_wait']:.1f} %"])
    return _lines(rows) if cases else ""


def _why_not(found: dict[str, Any]) -> str | None:
    """Why nothing was measured."""
    return f"FAILED: {found['failed']}".replace("|", "/") if "failed" in found else found.get("skipped")


def _lines(rows: list[list[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
