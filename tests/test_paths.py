"""File names of any bytes, and the one reader of lists."""

import os

import numpy as np
import pyarrow as pa
import pytest
from odd_images import encoded, picture

from mopro_fast.data.begun import begun, write_images
from mopro_fast.data.check import check, load_splits
from mopro_fast.data.class_folders import EXTENSIONS
from mopro_fast.data.index import load_index
from mopro_fast.data.lists import read_list, read_names
from mopro_fast.data.pack import Pack, pack
from mopro_fast.data.paths import Paths, plain, shown
from mopro_fast.data.shards import open_shards
from mopro_fast.errors import UserError

NAMES = [
    b"caf\xe9",
    b"new\nline",
    b"# hash",
    b"-dash",
    b"sp ace 7",
    b"\x1b[31mred",
    b'quo"te,',
    b"tab\t",
    "日本".encode(),
]
NAMES = [os.fsdecode(name) for name in NAMES]


def test_paths():
    paths = Paths(NAMES)
    assert paths.tolist() == NAMES == list(paths) and len(paths) == len(NAMES)
    assert paths[1] == "new\nline" and paths[np.int64(0)] == "caf\udce9"
    assert paths[2:4].tolist() == NAMES[2:4] and paths[np.array([3, 0])].tolist() == [NAMES[3], NAMES[0]]
    assert paths[np.array([name == NAMES[2] for name in NAMES])].tolist() == [NAMES[2]]
    assert paths.rows_of(Paths([NAMES[4], "none", NAMES[0]])).tolist() == [4, -1, 0]
    assert b"".join(paths.joined()) == os.fsencode("\n".join(NAMES))
    assert paths.for_table().type == pa.binary() and paths[1:].for_table().type == pa.string()
    assert Paths(["a", "é"]).for_table().type == pa.string()
    assert Paths(paths.for_table()).equals(paths)
    assert shown("caf\udce9\x1b[31m\n") == r"caf\xe9\x1b[31m\n" and shown("日本 é") == "日本 é"


def test_spellings():
    here = os.path.abspath("data")
    for name in ("./a/b.jpg", "a//b.jpg", f"{here}/a/b.jpg", "c/../a/b.jpg", f"{here}/x/../a/b.jpg"):
        assert plain([name], "data").tolist() == ["a/b.jpg"]
    assert plain(["/elsewhere/b.jpg"], "data").tolist() == ["/elsewhere/b.jpg"]


def write(path, content):
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        b"a.jpg 0\nb c.jpg -1\n",
        b"\xef\xbb\xbfa.jpg 0\r\nb c.jpg -1",
        b"  a.jpg\t0  \n\n \t\nb c.jpg  -1\n\n",
        b"a.jpg 0\rb c.jpg -1\r",
        b"# a comment\na.jpg 0\n#b.jpg 2\nb c.jpg -1\n",
        b"a.jpg +0\nb c.jpg -1\n",
    ],
    ids=["plain", "mark", "spaces", "old-mac", "comments", "plus"],
)
def test_a_list_however_it_was_saved(tmp_path, content, capsys):
    rows = read_list(write(tmp_path / "l.txt", content), lambda _: False)
    assert rows.paths.tolist() == ["a.jpg", "b c.jpg"] and rows.labels.tolist() == [0, -1]
    assert rows.lines.tolist() == [
        i + 1
        for i, line in enumerate(content.split(b"\r" if b"\n" not in content else b"\n"))
        if b".jpg" in line and not line.startswith(b"#")
    ]
    said = capsys.readouterr().err
    assert ("comments: 2, such as line 1: '# a comment'" in said) == (b"#" in content)


def test_a_list_names_any_file(tmp_path):
    names = [name for name in NAMES if "\n" not in name and name == name.strip()]
    content = b"".join(os.fsencode(name) + b" 3\n" for name in names)
    rows = read_list(write(tmp_path / "l.txt", content), names.__contains__)
    assert rows.paths.tolist() == names and set(rows.labels) == {3}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"a.jpg 0\nb.jpg\n", r"l\.txt:2: expected lines of the form: path label; found: 'b\.jpg'"),
        (b"a.jpg 0\n\n7\n", r"l\.txt:3: expected lines of the form: path label; found: '7'"),
        (b"a.jpg 1.0\n", r"l\.txt:1: expected lines"),
        (b"a.jpg 99999999999999999999\n", r"l\.txt:1: expected lines"),
        (b"a.jpg 0\nb\0.jpg 1\n", r"l\.txt:2: a zero byte"),
        ("a.jpg 0\n".encode("utf-16"), r"UTF-16 text: save it as UTF-8"),
        (b"a.jpg 0\rb.jpg 1\nc.jpg 2\n", r"l\.txt:1: expected .*'a\.jpg 0\\rb\.jpg 1'"),
        (b"a\x1b[2J.jpg\n", r"found: 'a\\x1b\[2J\.jpg'"),
    ],
    ids=["no-label", "no-path", "float", "huge", "zero", "utf-16", "two-in-one", "escape"],
)
def test_a_line_that_is_none_is_named(tmp_path, content, match):
    with pytest.raises(UserError, match=match) as error:
        read_list(write(tmp_path / "l.txt", content), lambda _: False)
    assert str(error.value).isprintable()


def test_no_list(tmp_path):
    for path, match in (
        (tmp_path, "not a regular file but a folder: name a file"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(UserError, match=match):
            read_list(str(path), lambda _: False)
    assert len(read_list(write(tmp_path / "empty", b""), lambda _: False).paths) == 0


def test_names_with_and_without_labels(tmp_path, capsys):
    rows = {"a.jpg": 0, "b 7": 1, "#c.jpg": 2}
    path = write(tmp_path / "l.txt", b"# these\na.jpg 3\nb 7\n#c.jpg\n a.jpg\n")
    assert read_names(path, rows.get, "here") == [(2, "a.jpg", 0), (3, "b 7", 1), (4, "#c.jpg", 2), (5, "a.jpg", 0)]
    assert "comments: 1, such as line 1: '# these'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"l\.txt:1: no such image in here: 'none\.jpg 3'"):
        read_names(write(tmp_path / "l.txt", b"none.jpg 3\n"), rows.get, "here")


@pytest.fixture
def odd(tmp_path):
    """Class folders of which every name is odd."""
    for label in range(2):
        folder = tmp_path / "data" / f"class {NAMES[label]}"
        folder.mkdir(parents=True)
        for i, name in enumerate(NAMES):
            (folder / f"{name}.jpg").write_bytes(encoded(picture(20, 20, seed=i)))
    return tmp_path / "data"


def test_odd_names_in_all_that_is_written(odd, tmp_path):
    index = load_splits(str(odd), "auto", None)["train"]
    files = sorted(str(p.relative_to(odd)) for p in odd.rglob("*.jpg"))
    assert sorted(index.paths) == files and all(index.read(i) for i in index.ids)
    assert check(index, workers=1, progress=False).read == len(files)
    again = check(index, workers=1, progress=False)
    assert again.read == 0 and not again.verdict.any()

    write_images(index, tmp_path)
    noted = begun(tmp_path, index.digest(), 2)
    assert noted.paths.equals(index.paths) and noted.classes == index.classes
    assert begun(tmp_path, "of another", 2) is None

    pack({"train": index}, Pack(str(odd), str(tmp_path / "pack"), size=0), 1)
    shards = open_shards(tmp_path / "pack")
    assert sorted(shards.paths) == files and shards.classes == index.classes
    assert all((odd / shards.paths[i]).read_bytes() == shards.read(i) for i in range(len(files)))


def test_rows_of_an_index_however_a_path_is_spelled(odd):
    index = load_index(odd, "train", num_classes=2)
    first, last = index.paths[0], index.paths[len(index) - 1]
    assert index.rows_of(Paths([f"./{last}", f"{odd}/{first}", first, "none.jpg"])).tolist() == [
        len(index) - 1,
        0,
        0,
        -1,
    ]


def test_suffixes():
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in EXTENSIONS)
