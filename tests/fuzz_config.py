"""Texts of a config.json as an editor, a script or a broken disk may leave them: :func:`mutated`."""

import copy
import json
import random

from mopro_fast.config import recipe

VALUES = [
    *(None, True, False, 0, -1, 1, 2, 16.0, 1.5, -0.0, 5e-324, 1e308, 10**18, 2**63, -(2**63), 10**400),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "auto", "never", "MoPro", "1", "0.5", "nan", "true", "é\n"),
    *("~", "~/x", "~no-such-user/x", "a\0b", "\ud800", "\udc80", "x" * 300, "/".join(["y" * 200] * 30)),
    *([], {}, [[]], [0.5], [0.2, 1.0], [1, 2.5], [-1], [True], ["1", "2"]),
    *({"a": 1}, {"": "x"}, {"train": "x"}, {"a": "b"}, {"a": {"b": {"c": []}}}),
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"]


def mutated(seed: int) -> bytes:
    """A config with up to five mistakes; some are none."""
    rng = random.Random(seed)
    config = recipe("demo")
    config.data.path, config.run.out, config.data.extra_val = "images", "run", {"other": "others"}
    values = json.loads(config.to_json())
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        rng.choice([_value, _value, _value, _rename, _drop, _nest])(rng, values)
    text = json.dumps(values, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.25:
        text = rng.choice([_twice, _cut, _deep, _number, _wrapped])(rng, text)
    data = text.encode(rng.choice(ENCODINGS) if rng.random() < 0.1 else "utf-8", "replace")
    return _flip(rng, data) if rng.random() < 0.1 else data


def _place(rng: random.Random, values: dict) -> tuple[dict, str]:
    """Somewhere in the config: an object and one of its names."""
    name = rng.choice(list(values) or ["data"])
    inner = values.get(name)
    return _place(rng, inner) if isinstance(inner, dict) and inner and rng.random() < 0.9 else (values, name)


def _value(rng, values):
    where, name = _place(rng, values)
    where[name] = copy.deepcopy(rng.choice(VALUES))


def _rename(rng, values):
    where, name = _place(rng, values)
    new = rng.choice([name.upper(), name + "s", name[:-1], "", "learning_rate", "freeze", "cleaned", "é\n", "z" * 9999])
    where[new] = where.pop(name, None)


def _drop(rng, values):
    where, name = _place(rng, values)
    where.pop(name, None)


def _nest(rng, values):
    where, name = _place(rng, values)
    inner = rng.choice([[where.get(name)], {name: where.get(name)}, values, list(values)])
    where[name] = copy.deepcopy(inner)


def _twice(rng, text):
    return rng.choice(['{"method": "ce", ', '{"data": {}, ', '{"method": "mopro", ']) + text.lstrip()[1:]


def _cut(rng, text):
    return text[: rng.randrange(len(text))]


def _deep(rng, text):
    depth = rng.choice([50, 5000, 200_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    deep = opening * depth + "1" + closing * depth
    return rng.choice([deep, text.replace('"images"', deep, 1)])


def _number(rng, text):
    odd = rng.choice(["1e999", "-1e999", "9" * 5000, "1.", "01", "0x10", "1_0", "NaN", "-Infinity", "\u0663"])
    return text.replace(rng.choice(["0.1", "16", "true", "null", "0"]), odd, 1)


def _wrapped(rng, text):
    return rng.choice(["[%s]", "%s %s", "// by hand\n%s", "%s,", "\ufeff%s", "\0%s"]).replace("%s", text)


def _flip(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)
