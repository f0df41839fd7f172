"""`mopro-fast text read`: the same texts from every source; what is counted, and what is refused in one line."""

import csv
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from mopro_fast import cli
from mopro_fast.errors import UserError
from mopro_fast.text import read as command
from mopro_fast.text.folder import read_texts

IMAGES = {  # path, label; as the lists have them
    "google/q0002/b.jpg": 1,
    "google/q0001/a.jpg": 0,
    "google/q0001/c.d.png": 0,
    "google/q0001/none.jpg": 0,
    "flickr/q0001/a.jpg": 1,
    "flickr/q0001/e.JPEG": 0,
}
TEXTS = {  # the images' keys: title, description, tags
    "google/q0001/a": ("A Tench &amp; a fish", None, None),
    "google/q0001/c.d": ("tench", "<b>fish</b>", []),
    "google/q0002/b": ("Shark", "seen at http://a.b", ["blue", "sea"]),
    "flickr/q0001/a": ("the", "", "red"),
    "flickr/q0001/e": ("Tench, fish!", None, None),
    "flickr/q0001/away": ("nobody", "sees", None),
}
CLEANED = ["shark seen", "tench fish", "tench fish", "", "", "tench fish"]
COUNTS = {
    "images": 6,
    "empty": 2,
    "no_record": 1,
    "repeated": 3,
    "duplicates": 3,
    "records": 6,
    "no_image": 1,
    "again": 0,
    "no_id": 0,
    "not_text": 0,
    "not_utf8": 0,
    "other_files": 0,
}


def record(key, **more):
    found = dict(zip(("title", "description", "tags"), TEXTS[key], strict=True))
    return {name: value for name, value in found.items() if value is not None} | more


def joined(key):
    return " ".join(filter(None, TEXTS[key][:2]))


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def web(tmp_path):
    """A WebVision folder with records; no image is there."""
    data = tmp_path / "web"
    (data / "info").mkdir(parents=True)
    for source in ("google", "flickr"):
        lines = [f"{path} {label}\n" for path, label in IMAGES.items() if path.startswith(source)]
        (data / "info" / f"train_filelist_{source}.txt").write_text("".join(lines))
        for folder in sorted({os.path.dirname(key) for key in TEXTS if key.startswith(source)}):
            (data / "META" / source).mkdir(parents=True, exist_ok=True)
            found = [record(key, id=os.path.basename(key), rank=1) for key in TEXTS if os.path.dirname(key) == folder]
            (data / "META" / f"{folder}.json").write_text(json.dumps(found))
    return data


@pytest.fixture
def read(web, tmp_path, capsys):
    """-> function: options -> the table's texts and the counts."""

    def read(*options, data=web, out="out"):
        out = tmp_path / out
        assert command.main([str(data), "--out", str(out), *map(str, options)]) == 0
        counts = json.loads((out / "read.json").read_text())["counts"]
        told = capsys.readouterr().out
        assert f"{counts['images']} images: {counts['empty']} with an empty text" in told
        found = read_texts(out)
        table = pq.read_table(out / "texts.parquet")
        assert table["id"].to_pylist() == list(range(len(found)))
        assert table["empty"].to_pylist() == [text == "" for text in found.text.to_pylist()]
        assert sorted(os.listdir(out)) == [".mopro_fast", "read.json", "texts.parquet"]
        return found.text.to_pylist(), counts

    return read


@pytest.fixture
def refusal(web, tmp_path):
    """-> function: options -> the message."""

    def refusal(*options, data=web):
        with pytest.raises(UserError) as caught:
            command.main([str(data), "--out", str(tmp_path / "refused"), *map(str, options)])
        assert not (tmp_path / "refused").exists()
        text = str(caught.value)
        assert text.isprintable() and ": " in text
        return text.replace(str(tmp_path), "TMP")

    return refusal


def bytes_of(tmp_path, out):
    return (tmp_path / out / "texts.parquet").read_bytes()


def test_webvision(read, web, tmp_path):
    assert read() == (CLEANED, COUNTS)
    assert read("--meta", web / "META", "--workers", 1, out="other") == (CLEANED, COUNTS)
    assert bytes_of(tmp_path, "other") == bytes_of(tmp_path, "out")
    os.rename(web / "META", tmp_path / "META")  # beside the folder
    assert read(out="other") == (CLEANED, COUNTS)
    found = read_texts(tmp_path / "other")
    assert found.paths.tolist() == list(IMAGES) and found.labels.tolist() == list(IMAGES.values())
    for path in IMAGES:
        (web / path).parent.mkdir(parents=True, exist_ok=True)
        (web / path).write_bytes(b"")
    assert found.index().paths.equals(found.paths)


def test_every_source_gives_the_same(read, web, tmp_path):
    read()
    expected = bytes_of(tmp_path, "out")
    paths = {path.rsplit(".", 1)[0]: path for path in IMAGES}
    names = [("./" if i % 2 else f"{web}/") + paths.get(key, f"{key}.jpg") for i, key in enumerate(TEXTS)]
    columns = pa.table({"text": [joined(key) for key in TEXTS], "more": range(len(TEXTS)), "path": names})
    pq.write_table(columns, tmp_path / "texts.parquet")
    pc.write_csv(columns, tmp_path / "texts.csv")
    windows = (tmp_path / "texts.csv").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "windows.csv").write_bytes(b"\xef\xbb\xbf" + windows)
    plain = {f"{key}.txt": joined(key).encode() for key in TEXTS}
    objects = {f"./{key}.json": json.dumps(record(key)).encode() for key in TEXTS}
    captions = {f"{key}.json": json.dumps({"caption": joined(key), "url": "x"}).encode() for key in TEXTS}
    images = {f"{key}.jpg": b"image" for key in TEXTS}
    write_tar(tmp_path / "plain.tar", images | plain)
    write_tar(tmp_path / "objects.tar.gz", objects | images)
    write_tar(tmp_path / "captions.tar", captions)
    bad = {name: b'{"caption": "overruled"}' for name in captions}
    write_tar(tmp_path / "both.tar", plain | bad)
    (tmp_path / "tars").mkdir()
    for i, (name, data) in enumerate(plain.items()):
        write_tar(tmp_path / "tars" / f"{i:05d}.tar", {name: data})
    sources = ["texts.parquet", "texts.csv", "windows.csv", "plain.tar", "objects.tar.gz", "captions.tar", "both.tar"]
    for source in [*sources, "tars", "tars/0*.tar"]:
        assert read("--texts", tmp_path / source, out="other") == (CLEANED, COUNTS), source
        assert bytes_of(tmp_path, "other") == expected, source


def test_tars_whose_names_are_folders(read, tmp_path):
    (tmp_path / "list.txt").write_text("00000/0001.jpg 0\n00001/0001.jpg 1\n")
    (tmp_path / "tars").mkdir()
    for i, text in enumerate((b"a tench", b"a shark")):
        write_tar(tmp_path / "tars" / f"0000{i}.tar", {"0001.txt": text, "0001.jpg": b""})
    assert read("--texts", tmp_path / "tars", data=tmp_path / "list.txt")[0] == ["tench", "shark"]


def test_options(read, tmp_path):
    assert read("--tags", "True")[0] == ["shark seen blue sea", *CLEANED[1:4], "red", CLEANED[5]]
    (tmp_path / "words").write_text("Tench\nshark\n")
    assert read("--dictionary", tmp_path / "words")[0] == ["shark", "tench", "tench", "", "", "tench"]
    raw = ["Shark seen at http://a.b", "A Tench &amp; a fish", "tench <b>fish</b>", "", "the", "Tench, fish!"]
    assert read("--raw", "True")[0] == raw
    texts, counts = read("--keep-classes", 1)
    assert texts == ["tench fish", "tench fish", "", "tench fish"] and counts["other_files"] == 1
    index = read_texts(tmp_path / "out").about
    assert index["keep_classes"] == 1 and index["layout"] == "auto"


def test_lists_and_class_folders(read, web, tmp_path):
    twice = tmp_path / "list.txt"
    lines = [f"{web}/google/q0001/a.jpg 0", f"{web}/google/q0001/a.jpg 1", "./web/google/q0002/b.jpg 0"]
    twice.write_text("\n".join(lines))
    texts, counts = read("--root", web, "--meta", web / "META", data=twice)
    assert texts[:2] == ["tench fish"] * 2 and counts["repeated"] == 2 and counts["duplicates"] == 0
    for name in ("x/1.jpg", "y/2.png"):
        path = tmp_path / "classes" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    (tmp_path / "a.csv").write_text('path,text\ny/2.png,"a tench,\nin ""water"""\nx/1.jpg,\n')
    assert read("--texts", tmp_path / "a.csv", data=tmp_path / "classes", out="c")[0] == ["", "tench water"]


def test_odd_records_are_counted(read, web):
    odd = [
        {"id": "a", "title": "first"},
        {"id": "a", "title": "second"},
        {"title": "no id"},
        "no record",
        {"id": None},
        {"id": "c.d", "title": 7, "description": ["x"]},
        {"id": "none", "title": "odd \ud83d \0 \u202e", "more": "\ud800"},
        {"id": "\ud800", "title": "away"},
    ]
    text = json.dumps(odd).replace("first", "first \u00e9t\u00e9").encode("latin-1")
    (web / "META/google/q0001.json").write_bytes(text)
    (web / "META/google/q0007.json").write_text("not read")
    texts, counts = read()
    assert texts[1:4] == ["first", "", "odd"]
    expected = {"again": 1, "no_id": 3, "not_text": 1, "not_utf8": 1, "no_image": 2, "records": 12, "other_files": 1}
    assert counts == COUNTS | expected | {"repeated": 0, "duplicates": 0, "no_record": 0, "empty": 2}
    assert read("--raw", "True")[0][3] == "odd ? \0 \u202e"
    (web / "META/google/q0001.json").write_bytes(json.dumps(odd).encode("utf-16"))
    assert read()[0][1] == "first"


def test_odd_tables_are_counted(read, tmp_path):
    names = [*list(IMAGES)[:3], next(iter(IMAGES)), "./google/q0001/none.jpg"]
    columns = {"path": names, "text": pa.array([b"tench", None, b"\xe9 koi", b"again", b"a\0bcd"], pa.binary())}
    pq.write_table(pa.table(columns), tmp_path / "texts.parquet")
    texts, counts = read("--texts", tmp_path / "texts.parquet")
    assert texts == ["tench", "", "koi", "bcd", "", ""]
    expected = {"again": 1, "not_text": 1, "not_utf8": 1, "no_image": 0, "no_record": 2, "records": 5, "empty": 3}
    assert counts == COUNTS | expected | {"repeated": 0, "duplicates": 0}


BAD = "google/q0001.json"


@pytest.mark.parametrize(
    ("records", "says"),
    [
        (b'[{"id": "a",}]', "double quotes: line 1 column 13"),
        (b"", "Expecting value"),
        (b'{"id": "a"}', "is no list of records"),
        (b"[" * 100_000, "recursion"),
        (b'[{"id": "a", "rank": ' + b"9" * 5000 + b"}]", "digits"),
    ],
    ids=range(5),
)
def test_records_that_are_refused(refusal, web, records, says):
    (web / "META" / BAD).write_bytes(records)
    text = refusal()
    assert BAD in text and says in text


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("image,text\na.jpg,b\n", "no column path"),
        ("path, text\na.jpg,b\n", "no column text: its columns are 'path', ' text'"),
        (
            'path,text\nz.jpg,"b\ngoogle/q0001/a.jpg,c\n"\n',
            "row 1, of z.jpg: its text holds the row of another image",
        ),
        ('text,path\n"b,z.jpg\nc,google/q0001/a.jpg\n"d",y.jpg\n', "row 1, of y.jpg: its text holds the row"),
        ('path,text\nz.jpg,x\n./google/q0001/a.jpg,"b\nflickr/q0001/e.JPEG,"c"\n', "another image, flickr/q0001/e"),
        ('path,text\nz.jpg,"b\n/nowhere/x.jpg,c\n', "a quote that is not closed takes all after it into the last row"),
        ('path,text\ngoogle/q0001/a.jpg,"b', "a quote that is not closed"),
        ('path,text\n"a.jpg,b\n",c\n', "row 1: the path a.jpg,b\\n has a line break"),
        ("path,text,text\na.jpg,b,c\n", "it has the column text twice"),
        ("a;b\n", "its columns are 'a;b'"),
        ("path,text\na.jpg,b,c\n", "Expected 2 columns, got 3"),
        ("path,text\nz.jpg,b\n", "no record, of 1, names an image of the data: records have names such as z.jpg"),
        ("path,text\n", "TMP/texts.csv has no rows"),
        ("", "Empty"),
        ("path,text\n".encode("utf-16"), "UTF-16"),
        (b"PAR1", "TMP/texts.csv"),
        (gzip.compress(b"path,text\n"), "TMP/texts.csv has no rows"),
        ('path,text,more\nz.jpg,x,"open\ngoogle/q0001/a.jpg,c,\n', "a quote that is not closed takes all after it"),
    ],
    ids=range(18),
)
def test_tables_that_are_refused(refusal, tmp_path, table, says):
    (tmp_path / "texts.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    assert says in refusal("--texts", tmp_path / "texts.csv")


def test_texts_of_several_lines_may_name_images(read, tmp_path):
    texts = [
        "album:\ngoogle/q0001/c.d.png\nflickr/q0001/e.JPEG, the last",
        "see\ngoogle/q0002/b.jpg,tench",
        "tench, shark",
    ]
    rows = zip(["google/q0001/a.jpg", "google/q0001/none.jpg", "google/q0002/b.jpg"], texts, strict=True)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "text"), *rows, ("flickr/q0001/e.JPEG", 'x "quoted"\nend')])
    assert read("--texts", tmp_path / "a.csv")[0][0] == "tench shark"


def test_parts_of_a_table(read, refusal, tmp_path):
    """Some are empty, in some is no image of the data, a column without a text has no type, a name says not all."""
    parts = [["google/q0001/a.jpg"], [], ["away.jpg"], ["google/q0002/b.jpg"]]
    for i, names in enumerate(parts):
        text = pa.array([None] * len(names)) if i == 2 else pa.array(["tench"] * len(names), pa.string())
        pq.write_table(pa.table({"path": pa.array(names, pa.string()), "text": text}), tmp_path / f"part{i}.parquet")
    assert read("--texts", tmp_path / "part*.parquet")[0][:2] == ["tench", "tench"]
    for i in (0, 3):
        (tmp_path / f"part{i}.parquet").unlink()
    assert "no record, of 1, names an image of the data" in refusal("--texts", tmp_path / "part*.parquet")
    (tmp_path / "B.CSV.GZ").write_bytes(gzip.compress(b"path,text\ngoogle/q0001/a.jpg,koi\n"))
    assert read("--texts", tmp_path / "B.CSV.GZ")[0][1] == "koi"


@pytest.mark.parametrize("options", [(), ("-H", "ustar"), ("-H", "pax"), ("-H", "v7"), ("-z",)], ids=range(5))
def test_tars_of_other_writers(read, tmp_path, options):
    for name in ("a.txt", "a.jpg"):
        (tmp_path / "google/q0001").mkdir(parents=True, exist_ok=True)
        (tmp_path / "google/q0001" / name).write_bytes(b"tench" * 3000)
    subprocess.run(["tar", *options, "-cf", "texts.tar", "google"], cwd=tmp_path, check=True)
    assert read("--texts", tmp_path / "texts.tar")[0][1] == "tench" * 3000
    if not options:
        with (tmp_path / "texts.tar").open("ab") as file:
            file.write(b"anything" * 100)
        assert read("--texts", tmp_path / "texts.tar")[0][1] == "tench" * 3000


def test_cut_gzip_and_broken_links(refusal, web, tmp_path):
    table = "path,text\n" + "".join(f"google/q0001/a.jpg,text {i}\n" for i in range(5000))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(table.encode())[:-300])
    assert "cannot read TMP/a.csv.gz" in refusal("--texts", tmp_path / "a.csv.gz")
    (web / "META" / BAD).unlink()
    (web / "META" / BAD).symlink_to("away")
    assert f"cannot read TMP/web/META/{BAD}" in refusal()


@pytest.mark.parametrize("last", ["", '""', '"""a"""', '"a"', 'a "b', '"a""b"', '""""'])
def test_a_last_cell_that_is_whole(read, tmp_path, last):
    (tmp_path / "a.csv").write_text(f"path,text\ngoogle/q0001/a.jpg,{last}\n")
    read("--texts", tmp_path / "a.csv")


def test_a_text_in_parquet_may_name_other_images(read, tmp_path):
    columns = {"path": ["google/q0001/a.jpg"], "text": ["a tench\ngoogle/q0002/b.jpg, a shark"]}
    pq.write_table(pa.table(columns), tmp_path / "texts.parquet")
    assert read("--texts", tmp_path / "texts.parquet")[0][1].startswith("tench")


def test_parquet_that_is_refused(refusal, tmp_path):
    for columns, says in (
        ({"path": ["a", None], "text": ["a", "b"]}, "1 rows have no path"),
        ({"path": ["a", "b"], "text": [1.5, 2.5]}, "text holds double, not text"),
        ({"path": ["a", "b"]}, "no column text"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "texts.parquet")
        assert says in refusal("--texts", tmp_path / "texts.parquet")


def test_tars_that_are_refused(refusal, tmp_path):
    path = tmp_path / "texts.tar"
    write_tar(path, {"google/q0001/a.txt": b"x" * 5000})
    whole = path.read_bytes()
    write_tar(path, {"google/q0001/a.txt": b"x", "google/q0001/b.txt": b"y"})
    more = path.read_bytes()
    for data, says in (
        (b"no tar", "cannot read TMP/texts.tar"),
        (whole[:2000], "cannot read google/q0001/a.txt in TMP/texts.tar (unexpected end of data)"),
        (more[:1024], "TMP/texts.tar (its end is missing: no end-of-archive block at byte 1024, as if it was cut)"),
        (more[:1300], "at byte 1024"),
        (more[:1024] + b"x" * 512 + more[1536:], "at byte 1024"),
        (whole + more, "another one follows its end at byte"),
    ):
        path.write_bytes(data)
        assert says in refusal("--texts", path)
    for members, says in (
        ({"google/q0001/a.json": b"["}, "google/q0001/a.json in TMP"),
        ({"google/q0001/a.json": b"[]"}, "(it is no object)"),
        ({"google/q0001/a.jpg": b""}, "no tar has a .txt or .json member"),
        ({"z/a.txt": b"a"}, "records have names such as z/a, the data such as google/q0002/b"),
    ):
        write_tar(path, members)
        assert says in refusal("--texts", path)
    (tmp_path / "mixed").mkdir()
    write_tar(tmp_path / "mixed/a.tar", {})
    (tmp_path / "mixed/b.csv").write_text("path,text\n")
    assert "is a tar" in refusal("--texts", tmp_path / "mixed/*")


def test_options_that_are_refused(refusal, web, tmp_path):
    assert "give one of them" in refusal("--meta", "a", "--texts", "b")
    assert "--meta a is no folder" in refusal("--meta", "a")
    assert "no such file: --texts a*" in refusal("--texts", "a*")
    assert "is a folder without tars" in refusal("--texts", web)
    assert "has no effect" in refusal("--dictionary", "a", "--raw", "True")
    (tmp_path / "a.csv").write_text("path,text\n")
    assert "--tags has no effect" in refusal("--texts", tmp_path / "a.csv", "--tags", "True")
    (tmp_path / "unlabelled.txt").write_text("google/q0001/a.jpg -1\n")
    assert "unlabelled.txt has a label: " in refusal("--meta", web / "META", data=tmp_path / "unlabelled.txt")
    assert "--dictionary a" in refusal("--dictionary", "a")
    with pytest.raises(UserError, match="--keep-classes must be at least 1, got 0"):
        command.main([str(web), "--out", str(tmp_path / "refused"), "--keep-classes", "0"])
    with pytest.raises(UserError, match="--workers must be"):
        command.main([str(web), "--out", str(tmp_path / "refused"), "--workers", "-1"])
    assert "looked for files such as TMP/flickr/q0001.json" in refusal("--meta", tmp_path)
    os.rename(web / "META", web / "other")
    assert "give --meta DIR (WebVision's records) or --texts FILE" in refusal()
    with pytest.raises(UserError, match="needs --out"):
        command.main([str(web)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        command.main([str(web), "--out", str(tmp_path / "mine"), "--meta", str(web / "other")])


def test_texts_of_other_data_are_not_replaced(read, web, tmp_path):
    read()
    before = bytes_of(tmp_path, "out")
    other = tmp_path / "other.txt"
    other.write_text("google/q0001/a.jpg 0\n")
    with pytest.raises(UserError, match=r"out has the texts of other data, .*web: name another folder"):
        read("--meta", web / "META", data=other)
    assert bytes_of(tmp_path, "out") == before
    with (web / "info/train_filelist_google.txt").open("a") as file:  # the same data, grown
        file.write("google/q0001/new.jpg 0\n")
    assert len(read()[0]) == 7
    shutil.copytree(web, tmp_path / "moved")
    read(data=tmp_path / "moved")  # the same data, elsewhere


def test_of_several_ranks_the_first_reads(web, tmp_path, monkeypatch, capfd):
    words = ["text", "read", str(web), "--out", str(tmp_path / "out")]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli._run(words) == 0 and not (tmp_path / "out").exists()
    assert "rank 1 of 2: nothing to do, rank 0 does `mopro-fast text read` alone" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        cli._run(["text", "read", "--help"])
    monkeypatch.setenv("WORLD_SIZE", "1")  # as in a shell of a cluster's pod
    assert cli._run(words) == 0 and (tmp_path / "out/texts.parquet").exists()


@pytest.mark.parametrize("stop", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("point", [1, 4])
def test_stopped_and_run_again(read, web, tmp_path, stop, point):
    read()
    expected = bytes_of(tmp_path, "out")
    program = [sys.executable, Path(__file__).with_name("stopped_command.py"), stop, str(point)]
    words = [*program, "text", "read", web, "--out", tmp_path / "new"]
    stopped = subprocess.run(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert stopped.returncode == (-signal.SIGKILL if stop == "SIGKILL" else 130) and "Traceback" not in stopped.stderr
    assert not (tmp_path / "new" / "texts.parquet").exists()
    read(out="new")
    assert bytes_of(tmp_path, "new") == expected
    (web / "META" / BAD).write_text("[")
    with pytest.raises(UserError):
        command.main([str(web), "--out", str(tmp_path / "new")])
    assert bytes_of(tmp_path, "new") == expected  # what was there stays whole
