"""Damaged and hand-made lists, manifests, records and tables: (seed) -> one of them, from a good one."""

import copy
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ODD = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1 << 70,
    -(1 << 70),
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\udce9",
    "../x",
    "/",
)
ODD += ([], {}, [None], [[]], {"x": {}}, ["a", 1], [1, 2, 3], "0" * 5000)
TYPES = (
    pa.string(),
    pa.binary(),
    pa.float32(),
    pa.float64(),
    pa.int8(),
    pa.int32(),
    pa.int64(),
    pa.uint8(),
    pa.bool_(),
)
TYPES += (pa.list_(pa.int64()), pa.null(), pa.dictionary(pa.int32(), pa.string()), pa.timestamp("ns"))


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, doubled or put in; the end cut off."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(out) + 1))
        some = bytes(
            rng.choice(
                [0, 9, 10, 13, 32, 35, 44, 47, 92, 127, 128, 0xC3, 0xE9, 0xFF, 48, 57, 45], rng.integers(1, 6)
            ).tolist()
        )
        kind = rng.integers(6)
        if kind == 0:
            out[at : at + len(some)] = some
        elif kind == 1:
            out[at:at] = some
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 40))]
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = out[at : at + int(rng.integers(1, 200))]
        else:
            out[:0] = [b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"#", b"\0"][rng.integers(5)]
    return bytes(out)


def places(value, at=()):
    """Every place in nested objects and lists."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*at, key))


def odd_json(value, rng: np.random.Generator) -> bytes:
    """One to three places of a JSON value dropped, replaced, renamed or doubled; or the text damaged."""
    if rng.integers(8) == 0:
        return flipped(json.dumps(value).encode(), rng)
    if rng.integers(12) == 0:
        return [b"", b"null", b"[]", b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe{\0}\0", b"{}", b"1" * 5000][
            rng.integers(8)
        ]
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        every = list(places(value))
        at = every[rng.integers(len(every))]
        new = copy.deepcopy(ODD[rng.integers(len(ODD))])
        if not at:
            value = new
            continue
        holder = value
        for key in at[:-1]:
            holder = holder[key]
        kind = rng.integers(4)
        if kind == 0:
            del holder[at[-1]]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{at[-1]}s"] = holder.pop(at[-1])
        elif kind == 2 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[at[-1]]))
        else:
            holder[at[-1]] = new
    return json.dumps(value).encode("utf-8", "surrogatepass")


def odd_table(table: pa.Table, rng: np.random.Generator) -> bytes:
    """A Parquet file with a column dropped, renamed, retyped, with odd values or nulls; rows doubled or lost."""
    if rng.integers(8) == 0:
        return flipped(parquet(table), rng)
    for _ in range(rng.integers(1, 3)):
        if not table.num_columns:
            break
        at = int(rng.integers(table.num_columns))
        name, column = table.column_names[at], table.column(at)
        kind = rng.integers(7)
        if kind == 0:
            table = table.remove_column(at)
        elif kind == 1:
            table = table.rename_columns([n + "s" * (n == name) for n in table.column_names])
        elif kind == 2:
            table = table.set_column(at, name, recast(column, TYPES[rng.integers(len(TYPES))]))
        elif kind == 3:
            there = pa.array(rng.random(len(column)) < 0.7)
            table = table.set_column(at, name, pa.compute.if_else(there, column, pa.scalar(None, column.type)))
        elif kind == 4:
            table = table.set_column(at, name, odd_values(column, rng))
        elif kind == 5:
            table = table.slice(0, int(rng.integers(0, len(table) + 1)))
        else:
            table = pa.concat_tables([table, table.slice(0, 3)])
    if rng.integers(6) == 0:
        table = table.replace_schema_metadata(None)
    return parquet(table)


def recast(column: pa.ChunkedArray, to: pa.DataType) -> pa.ChunkedArray:
    try:
        return column.cast(to)
    except (pa.ArrowException, NotImplementedError):
        return pa.chunked_array([pa.nulls(len(column), to)])


def odd_values(column: pa.ChunkedArray, rng: np.random.Generator) -> pa.Array:
    values = column.to_pylist()
    for i in rng.integers(0, max(1, len(values)), 3).tolist():
        if i < len(values):
            odd = [-1, 0, 99, 2**31 - 1, -(2**31)] if pa.types.is_integer(column.type) else ["", "x" * 999, "../x", "/"]
            values[i] = odd[rng.integers(len(odd))]
    try:
        return pa.array(values, column.type)
    except (pa.ArrowException, TypeError):
        return column.combine_chunks()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()
