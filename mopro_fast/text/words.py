"""Texts as CAPro cleans them, and a text per class: from a table, or from WordNet.

After the authors' meta.py and meta_nuswide.py (denoise_text, extract_embeddings). Here a line break, a tab and a tag
part words where the authors' code joins them, accents that are characters of their own (as in names from macOS) do not,
and words are looked up in a dictionary only if there is one.
"""

import functools
import html
import os
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from mopro_fast.console import escaped
from mopro_fast.distributed import say
from mopro_fast.errors import UserError, first_line
from mopro_fast.files import MOST_TEXT, open_regular, read_regular

# Those of the authors' package, stop-words 2018.7.23, that can be left when words of one and two letters are out.
# scikit-learn's longer list has "fire", "bill", "system" and "mine", which are what an image may show.
_STOP_WORDS = """
about above after again against all and any are because been before being below between both but cannot could did does
doing down during each few for from further had has have having her here hers herself him himself his how into its
itself more most myself nor not off once only other ought our ours ourselves out over own same she should some such
than that the their theirs them themselves then there these they this those through too under until very was were what
when where which while who whom why with would you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
_PARQUET = b"PAR1"  # how its files begin
_SUFFIXES = re.compile(r"\.(?:jpe?g|png|gif)")
_TAG = re.compile(r"<[^>\n]{0,4095}>")  # a limit, or many "<" would take the square of their number
_TOP = "net|com|org|info|edu|gov|uk|de|ca|jp|fr|au|us|ru|ch|it|nel|se|no|es|mil|cn"
_URL = re.compile(rf"(?<!\S)\S+\.(?:{_TOP})\S*|http\S+")
_WORD = re.compile(r"\w+")
_SHORTEST = 3  # letters
_GZIP = b"\x1f\x8b"
_UTF16 = b"\xff\xfe", b"\xfe\xff"
_BLOCK = 1 << 25  # bytes of CSV parsed at a time; no row may be longer
_SYNSET = re.compile(r"([nvar])(\d{8})")
_TEXT = [
    getattr(pa.types, f"is_{name}") for name in ("string", "large_string", "string_view", "binary", "large_binary")
]
_DATA = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "s": "data.adj", "r": "data.adv"}
_RELATED = ("@", "@i", "~", "~i", ";c", ";r", ";u")  # hypernyms, hyponyms, each with instances; the three domains
_OF_SYNSET = "0000"  # a pointer's source and target: not of a single word


def clean(text: str, dictionary: frozenset[str] | None = None) -> str:
    """The words of a text that say something, lower case, with a space between them.

    Out go, in this order: suffixes of image files; HTML's entities and tags; URLs; digits; words of less than three
    letters or with "_"; stop words; and what is not in the dictionary. Letters are in Unicode's form NFC.
    """
    text = html.unescape(_SUFFIXES.sub("", text.lower()))
    words = _WORD.findall(unicodedata.normalize("NFC", _URL.sub(" ", _TAG.sub(" ", text))))
    letters = (word if word.isalpha() else "".join(c for c in word if not c.isdigit()) for word in words)
    kept = (w for w in letters if len(w) >= _SHORTEST and w not in STOP_WORDS and w.isalpha())
    return " ".join(kept if dictionary is None else (w for w in kept if w in dictionary))


def image_text(parts: Iterable[str], dictionary: frozenset[str] | None = None) -> str:
    """An image's title, description and the like: each cleaned, then joined."""
    return " ".join(filter(None, (clean(part, dictionary) for part in parts)))


@functools.cache
def read_dictionary(path: str) -> frozenset[str]:
    """A word per line, in any case. Raises a UserError."""
    try:
        data, _ = read_regular(path, MOST_TEXT)
        words = frozenset(unicodedata.normalize("NFC", data.decode("utf-8-sig").lower()).split())
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read --dictionary {path} ({first_line(error)}): give UTF-8, a word per line") from None
    if not words:
        raise UserError(f"no word in --dictionary {path}: give a word per line")
    return words


def read_table(path: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, pa.ChunkedArray]:
    """Columns of a CSV or Parquet file as large_binary, so any bytes; of Parquet with its nulls. Raises a UserError."""
    wanted = [*required, *optional]
    try:
        with open_regular(path) as file:
            if (head := file.peek(2)[:2]) in _UTF16:
                raise ValueError("it is UTF-16 text: save it as UTF-8")
            kind = "gzip" if head == _GZIP else "detect"  # by the file's name
            table, there = _parquet(file, wanted) if is_parquet(file) else _csv(path, wanted, kind)
        if lacks := [name for name in required if name not in table.column_names]:
            raise ValueError(f"it has no column {lacks[0]}: its columns are {', '.join(map(repr, there))}")
        return {name: table[name].cast(pa.large_binary()) for name in wanted if name in table.column_names}
    except (OSError, ValueError, KeyError, pa.ArrowException, NotImplementedError) as error:  # KeyError: a name twice
        first, last = ", ".join(required), "".join(f"; it may have {name}" for name in optional)
        raise UserError(
            f"cannot read {path} ({escaped(first_line(error))}): give CSV or Parquet with the columns {first}{last}"
        ) from None


def is_parquet(file: BinaryIO) -> bool:
    """Whether the file, at its beginning, is one; there it stays."""
    head = file.read(len(_PARQUET))
    file.seek(0)
    return head == _PARQUET


def _parquet(file: BinaryIO, wanted: list[str]) -> tuple[pa.Table, list[str]]:
    """-> the wanted columns, and the names of all."""
    there = pq.read_schema(file).names
    file.seek(0)
    table = pq.read_table(file, columns=[name for name in wanted if name in there], use_threads=False)
    for i, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_integer(kind) or pa.types.is_null(kind):
            kind = pa.large_string()
        elif not any(is_text(kind) for is_text in _TEXT):
            raise ValueError(f"{field.name} holds {field.type}, not text")
        table = table.set_column(i, field.name, table[field.name].cast(kind))
    return table, there


def _csv(path: str, wanted: list[str], compression: str) -> tuple[pa.Table, list[str]]:
    """-> the wanted columns, and the names of all."""
    reading = csv.ReadOptions(use_threads=False, block_size=_BLOCK)  # threads would not say in which row an error is
    parsing = csv.ParseOptions(newlines_in_values=True)

    def opened() -> pa.NativeFile:
        return pa.input_stream(path, compression)

    with opened() as file, csv.open_csv(file, reading, parsing) as head:
        there = head.schema.names
    found = [name for name in wanted if name in there]
    if twice := [name for name in found if there.count(name) > 1]:
        raise ValueError(f"it has the column {twice[0]} twice")
    if not found:
        raise ValueError(f"its columns are {', '.join(map(repr, there))}")
    types = dict.fromkeys([*found, there[-1]], pa.binary())
    converting = csv.ConvertOptions(check_utf8=False, column_types=types, include_columns=list(types))
    with opened() as file:
        table = csv.read_csv(file, reading, parsing, converting)
    if len(table) and there.count(there[-1]) == 1:
        with opened() as file:
            _require_closed_end(file, table[there[-1]][-1].as_py())
    return table, there


def _require_closed_end(file: pa.NativeFile, last: bytes) -> None:
    """Raise a ValueError where the last cell of a CSV file has a quote that opens and does not close."""
    cell = b'"' + last.replace(b'"', b'""').rstrip(b"\r\n")
    tail = b""
    while piece := file.read(_BLOCK):
        tail = (tail + piece)[-len(cell) - 64 :]
    if tail.rstrip(b"\r\n").endswith((b"," + cell, b"\n" + cell)):
        raise ValueError("a quote that is not closed takes all after it into the last row")


def class_texts(
    classes: str | None, wordnet: str | None, index_classes: list[str] | None, num_classes: int
) -> tuple[list[str], list[str]]:
    """-> the name and the text of each class, by label.

    classes: a table, as of :func:`read_class_texts`. wordnet: the folder of its data files; the names of the classes
    are then the ids of synsets. index_classes: the names of the classes by label, where the data has them. Raises a
    UserError. Without either the names of the classes are their texts, unless they are synsets.
    """
    if classes is not None and wordnet is not None:
        raise UserError("the classes' texts: give one of --classes FILE and --wordnet DIR")
    named = index_classes is not None and len(index_classes) >= num_classes
    if classes is None and wordnet is None:
        if not named or all(_SYNSET.fullmatch(name) for name in index_classes):
            what = "the data names its classes by synsets" if named else "the data does not name its classes"
            raise UserError(f"{what}: give their texts, --classes FILE (label,name,description) or --wordnet DIR")
        texts = [_plain(name) for name in index_classes[:num_classes]]
        return index_classes[:num_classes], texts
    if classes is not None:
        return read_class_texts(classes, index_classes, num_classes)
    if not named:
        raise UserError(
            f"--wordnet {wordnet} takes classes that are named by synsets, such as n01440764, and the data does not "
            "name them all: give --classes FILE"
        )
    return wordnet_texts(wordnet, index_classes[:num_classes])


def read_class_texts(path: str, index_classes: list[str] | None, num_classes: int) -> tuple[list[str], list[str]]:
    """-> the name and the text of each class, by label, from a table with the columns label, name, description.

    CSV (UTF-8) or Parquet. label: a number, or the class's name in the data. Raises a UserError.
    """
    columns = read_table(path, ("label", "name"), ("description",))
    numbers = {name: label for label, name in enumerate(index_classes or ())}
    names: list[str | None] = [None] * num_classes
    texts = [""] * num_classes
    unused, row_of = [], {}
    rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    for row, values in enumerate(rows, start=1):
        try:
            given, *said = ((value or b"").decode().strip() for value in values)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: row {row}: {first_line(error)}: save it as UTF-8") from None
        label = int(given) if re.fullmatch("[0-9]{1,9}", given) else -1
        label = numbers.get(given, label)
        if label >= num_classes:
            unused.append(given)
            continue
        if label < 0:
            raise UserError(
                f"{path}: row {row}: '{escaped(given)}' is no class of the data: give its number, or remove the row"
            )
        if names[label] is not None:
            raise UserError(f"{path}: row {row}: the class '{escaped(given)}' is there twice: remove one of the rows")
        names[label], texts[label] = said[0], " ".join(filter(None, map(_plain, said)))
        if not texts[label]:
            raise UserError(f"{path}: row {row}: the class '{escaped(given)}' has no text: give it a name")
        row_of[label] = row
    absent = [label for label, name in enumerate(names) if name is None]
    if absent:
        called = f" ({escaped(index_classes[absent[0]])})" if index_classes and absent[0] < len(index_classes) else ""
        raise UserError(f"{path}: {len(absent)} of {num_classes} classes have no row, such as {absent[0]}{called}")
    _require_own(path, names, index_classes or [], row_of)
    if unused:
        say(f"{path}: {len(unused)} rows of classes that no image has, such as '{escaped(unused[0])}': not used")
    return names, texts


def _require_own(path: str, names: list[str], classes: list[str], row_of: dict[int, int]) -> None:
    """Refuse classes that have changed names with one another; say where one has another's name."""
    labels = {_plain(name): label for label, name in enumerate(classes) if not _SYNSET.fullmatch(name)}
    bears = [  # whose name each class has: its own, if it may be
        label if label < len(classes) and _plain(name) == _plain(classes[label]) else labels.get(_plain(name), label)
        for label, name in enumerate(names)
    ]
    for label, other in enumerate(bears):
        if other == label or label >= len(classes):
            continue
        text = (
            f"{path}: row {row_of[label]}: the class {label} ({escaped(classes[label])} in the data) is named "
            f"'{escaped(names[label])}', which is the data's name of class {other}"
        )
        if other < len(bears) and bears[other] != other:
            raise UserError(f"{text}: put each text beside its own class")
        say(text)


def wordnet_texts(folder: str, synsets: list[str]) -> tuple[list[str], list[str]]:
    """-> the first word and the text of each synset, such as n01440764.

    The text has the words, the definition and the examples of the synset, then those of its neighbours: hypernyms,
    hyponyms and domains, each kind in the order of WordNet's file. (nltk keeps them as a set, without an order.)
    folder: Princeton's dict/ or nltk's corpora/wordnet, of WordNet 3.0. Raises a UserError.
    """
    files: dict[str, BinaryIO] = {}

    def read(pos: str, offset: int) -> tuple[list[str], list[str], dict[str, list[tuple[str, int]]]]:
        """-> words; definition and examples; where each kind of neighbour is."""
        if pos not in files:
            files[pos] = open_regular(os.path.join(folder, _DATA[pos]))
        files[pos].seek(offset)
        line, _, gloss = files[pos].readline().decode().partition("|")
        columns = line.split()
        if not columns or columns[0] != f"{offset:08d}":
            raise ValueError("it is not there")
        end = 4 + 2 * int(columns[3], 16)
        words = [re.sub(r"\(.*\)$", "", word) for word in columns[4:end:2]]
        related: dict[str, list[tuple[str, int]]] = {}
        for first in range(end + 1, end + 1 + 4 * int(columns[end]), 4):
            symbol, target, of, ends = columns[first : first + 4]
            if ends == _OF_SYNSET:
                related.setdefault(symbol, []).append((of, int(target)))
        definition = re.sub(r'".*?"', "", gloss.strip()).strip().strip("; ")
        return words, [definition, *re.findall(r'"([^"]*)"', gloss)], related

    names, texts = [], []
    try:
        for synset in synsets:
            known = _SYNSET.fullmatch(synset)
            if not known:
                raise UserError(f"the class '{escaped(synset)}' is no synset, such as n01440764: give --classes FILE")
            try:
                words, said, related = read(known[1], int(known[2]))
                near = [read(*where) for symbol in _RELATED for where in related.get(symbol, ())]
            except (ValueError, IndexError, KeyError) as error:
                raise UserError(
                    f"cannot read synset {synset} in {folder} ({first_line(error)}): give the data of WordNet 3.0"
                ) from None
            names.append(_plain(words[0]))
            texts.append(" ".join(_plain(part) for w, s, _ in [(words, said, None), *near] for part in (*w, *s)))
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder} ({first_line(error)}): give a folder with WordNet's data.noun"
        ) from None
    finally:
        for file in files.values():
            file.close()
    return names, texts


def _plain(text: Any) -> str:
    return text.lower().replace("_", " ").replace("-", " ").strip()
