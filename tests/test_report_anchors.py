"""The report's part about anchors: its numbers against a table that the tests know, odd texts, what is missing."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_report import SET, Tags, browser, collect, copy_of, opened  # noqa: F401

from mopro_fast.config import recipe
from mopro_fast.data.index import load_index
from mopro_fast.downstream.clean import TABLE, Clean, clean
from mopro_fast.errors import UserError
from mopro_fast.labels import UNSEEN, by_class
from mopro_fast.report import anchors, images, page
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

CLASSES, PER_CLASS = ["a<", "b", "c", "d"], 12
ODD = b"12 \xff.png"  # the last image of d, an anchor; not UTF-8
TEXTS = ["</script><script>boom()</script>", "w" * 10_000, "שלום \u202eabc", " ", None]
NEAR = np.arange(48) % PER_CLASS < 5  # of each class the first five are anchors, of d its last as well; of c none


def distances() -> np.ndarray:
    return np.random.default_rng(5).permutation(48).astype(np.float32) / 100


def mask() -> np.ndarray:
    label = np.arange(48) // PER_CLASS
    return (NEAR & (label != 2)) | (np.arange(48) == 47)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            path = os.fsencode(folder / name) + b"/" + (ODD if (name, i) == ("d", 11) else b"%02d.png" % i)
            with open(path, "wb") as file:
                Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(file, "PNG")
    return folder


def write_tables(folder: Path, data: Path, **columns) -> Path:
    """As `mopro-fast text` writes them, with its rows the wrong way round; a column of None is left out."""
    folder.mkdir(exist_ok=True)
    index = load_index(str(data), "train", num_classes=None)
    assert len(index) == 48 and index.labels.tolist() == [i // PER_CLASS for i in range(48)]
    neighbours = pa.array([[i, (i + 1) % 48] for i in range(48)])
    table = {"id": index.ids, "path": index.paths.for_table(), "label": index.labels, "dist": distances()}
    table |= {"sim": 1 - distances(), "anchor": mask().astype(np.int8), "neighbours": neighbours} | columns
    backwards = np.arange(48)[::-1]
    write = {name: column for name, column in table.items() if column is not None}
    pq.write_table(pa.table(write).take(backwards), folder / "anchors.parquet")
    texts = {"path": table["path"], "text": pa.array([TEXTS[i % PER_CLASS % 5] for i in range(48)])}
    pq.write_table(pa.table(texts).take(backwards), folder / "texts.parquet")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Three epochs of CAPro; in the last one labels are corrected."""
    out = tmp_path_factory.mktemp("anchored") / "run"
    c = recipe("demo")
    c.data.path, c.data.num_classes, c.run.out, c.run.device = str(data), len(CLASSES), str(out), "cpu"
    c.data.image_size = c.data.eval_resize = 8
    c.model.width, c.optim.epochs, c.optim.batch_size, c.mopro.threshold = 0.125, 3, 16, 0.3
    c.run.tensorboard, c.run.log_every = False, 1
    c.method, c.mopro.start_clean, c.capro.init_proto, c.capro.unfreeze_epoch = "capro", 2, 1, 1
    c.capro.anchors = str(write_tables(tmp_path_factory.mktemp("text"), data))
    assert Trainer(task_of(c)).run() == 0
    return out


def table_of(run: Path) -> Path:
    return Path(json.loads((run / "config.json").read_text())["capro"]["anchors"])


def test_its_numbers_are_those_of_the_tables(run):
    contents = collect(run)
    found, dist, anchor = contents["anchors"], distances(), mask()
    assert contents["missing"] == {} and found["unread"] == {}
    for c in range(4):
        own = np.arange(48) // PER_CLASS == c
        near = dist[own & anchor]
        numbers = {name: column[c] for name, column in found["classes"].items()}
        assert numbers["anchors"] == [5, 5, 0, 6][c]
        assert numbers["median"] == pytest.approx(np.median(dist[own]))
        assert numbers["nearest"] == (pytest.approx(near.min()) if len(near) else None)
        assert numbers["farthest"] == (pytest.approx(near.max()) if len(near) else None)
    cards, rows = found["cards"], np.flatnonzero(anchor)
    order = rows[np.lexsort((dist[rows], rows // PER_CLASS))]
    assert [(card["given"], card["dist"]) for card in cards] == [
        (i // PER_CLASS, pytest.approx(dist[i])) for i in order
    ]
    for card, i in zip(cards, order, strict=True):
        text = TEXTS[i % PER_CLASS % 5]
        assert card["sim"] == pytest.approx(1 - dist[i], abs=1e-4)
        assert card.get("text") == (text and (text.strip() if len(text) < 120 else text[:120] + "…"))
        assert card["path"].endswith(f"{i % PER_CLASS:02d}.png" if i != 47 else r"12 \xff.png")
        assert card["new"] in (card["given"], UNSEEN)  # training kept it, or has not shown it


def test_the_model_says_what_it_would_have_done(run):
    found, r = collect(run)["anchors"], page.Run(run)
    config, state, index = r.config, r.state, r.index
    model = images.load_model(config, state, "cpu")
    rows = np.flatnonzero(mask())
    pixels = [np.array(Image.open(os.fsencode(index.full_path(i)))) for i in rows]
    crops = torch.from_numpy(np.stack([images.central_crop(one, 8, 8) for one in pixels]))
    _, now = images.scores(model, crops, torch.from_numpy(index.labels[rows]), config)
    expected = by_class(index.labels[rows], now.numpy(), 4)
    assert {name: found["classes"][name] for name in ("images", "relabelled", "removed")} == {
        name: expected[name].tolist() for name in ("images", "relabelled", "removed")
    }
    assert sum(expected["relabelled"] + expected["removed"]) > 0 and "newest checkpoint" in found["judge"]
    state.model["prototypes"].zero_()  # as in the first stage: it judges nothing yet
    table = anchors.find(r, None)
    bare = anchors.collect(r, table, rows, 4, None, images.load_model(config, state, "cpu"), config, 16, "cpu")
    assert bare["judge"] is None and bare["classes"]["images"] == [0] * 4
    assert len(bare["cards"]) == 16 and not any("now" in card for card in bare["cards"])


def test_the_table_of_clean_judges_every_anchor(run, data, tmp_path):
    options = Clean(str(run), data=str(data), out=str(tmp_path / "cleaned"))
    options.encoder.device = "cpu"
    clean(options)
    table = pq.read_table(tmp_path / "cleaned" / TABLE).to_pydict()
    contents = collect(run, table=str(tmp_path / "cleaned"), images=3)
    found, own = contents["anchors"], np.array(table["anchor"]) == 1
    assert own.tolist() == mask().tolist() and len(found["cards"]) == 3
    expected = by_class(*(np.array(table[name])[own] for name in ("given", "label")), 4)
    for name in ("images", "relabelled", "removed"):
        assert found["classes"][name] == expected[name].tolist()
    assert found["classes"]["images"] == [5, 5, 0, 6] and "cleaned" in found["judge"]
    of_path = dict(zip(map(anchors.shown, page.Run(run).index.paths), table["label"], strict=True))
    assert all(card["now"] == of_path[card["path"]] for card in found["cards"])


def copy_without(run: Path, folder: Path) -> Path:
    copy = copy_of(run, folder)
    config = json.loads((copy / "config.json").read_text())
    config["capro"] |= {"anchors": "", "init_proto": "never"}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_run_without_anchors_has_no_such_part(run, tmp_path):
    copy = copy_without(run, tmp_path)
    contents = collect(copy)
    assert "anchors" not in contents and contents["missing"] == {}
    page.render(contents)
    with pytest.raises(UserError, match="no effect"):
        collect(copy, anchors=str(tmp_path))


@pytest.mark.parametrize("count, cards", [(0, 0), (1, 1), (16, 2 * 5), (24, 3 * 5 + 1), (400, 16)])
def test_the_sample_is_bounded_and_goes_from_the_nearest_to_the_farthest(run, count, cards):
    table = anchors.find(page.Run(run), None)
    found = anchors.sample(table, count, 0, None)
    assert abs(len(found) - cards) <= (count == 16)  # two classes of three are drawn
    assert found.tolist() == anchors.sample(table, count, 0, None).tolist()
    only, dist = anchors.sample(table, count, 0, np.array([3])), distances()
    assert len(only) == min(count, 6) and (only >= 36).all() and (np.diff(dist[only]) > 0).all()
    if len(only) > 1:
        own = dist[36:][mask()[36:]]
        assert dist[only[[0, -1]]].tolist() == [own.min(), own.max()]


def test_odd_texts_stay_text(run):
    text = page.render(collect(run))
    assert [tag for tag, _ in Tags(text).found].count("script") == 2 and "boom()" in text
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    shown = [card.get("text") for card in json.loads(found)["anchors"]["cards"]]
    assert "שלום \\u202eabc" in shown and "" in shown and None in shown
    assert max(len(one) for one in shown if one) == 121 and text.replace("\n", "").isprintable()


@pytest.mark.medium
def test_tables_with_less(run, data, tmp_path):
    folder = write_tables(tmp_path / "less", data, id=None, sim=pa.array(["x"] * 48), dist=None, neighbours=None)
    (folder / "texts.parquet").unlink()
    contents = collect(run, anchors=str(folder))
    assert contents["missing"] == {} and contents["anchors"]["classes"].keys() == {
        "anchors",
        "images",
        "relabelled",
        "removed",
    }
    assert len(contents["anchors"]["cards"]) == 16
    assert not any({"dist", "sim", "text"} & card.keys() for card in contents["anchors"]["cards"])
    page.render(contents)
    some = pa.array([None if i % 2 else i / 9 for i in range(48)])
    classes = collect(run, anchors=str(write_tables(tmp_path / "some", data, dist=some)))["anchors"]["classes"]
    assert classes["nearest"] == [0, pytest.approx(12 / 9, abs=1e-3), None, 4]
    table = pq.read_table(folder / "anchors.parquet")
    own = np.array(table["anchor"]) == 1
    alone = table.append_column("dist", pa.array(np.full(48, 0.5))).filter(pa.array(own))
    pq.write_table(alone, tmp_path / "alone.parquet")  # anchors alone: the median image is not known
    classes = collect(run, anchors=str(tmp_path / "alone.parquet"))["anchors"]["classes"]
    assert classes["median"] == [None] * 4 and classes["nearest"] == [0.5, 0.5, None, 0.5]


TEXT_TABLES = {
    "no Parquet": b"x",
    "without text": {"path": ["a"], "word": ["b"]},
    "of numbers": {"path": ["a"], "text": [1]},
    "with another path": {"path": [1.5], "text": ["a"]},
}


@pytest.mark.parametrize("kind", TEXT_TABLES)
def test_texts_that_cannot_be_read_are_one_line(run, data, kind, tmp_path):
    folder, written = write_tables(tmp_path / "text", data), TEXT_TABLES[kind]
    if isinstance(written, bytes):
        (folder / "texts.parquet").write_bytes(written)
    else:
        pq.write_table(pa.table(written), folder / "texts.parquet")
    contents = collect(run, anchors=str(folder))
    assert (
        contents["missing"].keys() == {"the anchors' texts"} and "\n" not in contents["missing"]["the anchors' texts"]
    )
    assert len(contents["anchors"]["cards"]) == 16 and not any("text" in card for card in contents["anchors"]["cards"])


@pytest.mark.medium
def test_a_table_that_moved_is_gone_or_another(run, data, tmp_path, capsys):
    moved = Path(shutil.copytree(table_of(run), tmp_path / "moved"))
    copy = copy_of(run, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config["capro"]["anchors"] = "/nowhere"
    (copy / "config.json").write_text(json.dumps(config))
    assert page.main([str(copy)]) == 0
    said = capsys.readouterr().err
    assert "the anchors: no anchors at /nowhere" in said and "--anchors" in said
    assert "anchors" not in collect(copy) and collect(copy)["images"]
    assert page.main([str(copy), "--anchors", str(moved)]) == 0
    assert "16 anchors" in capsys.readouterr().err
    for name, columns, why in (
        ("other", {"anchor": 1 - mask().astype(np.int8)}, "not those that the run began with"),
        ("elsewhere", {"path": [f"x/{i}.png" for i in range(48)]}, "of other data"),
        ("signs", {"anchor": -mask().astype(np.int8)}, "several labels"),
    ):
        contents = collect(run, anchors=str(write_tables(tmp_path / name, data, **columns)))
        assert why in contents["missing"]["the anchors"] and "anchors" not in contents and contents["images"]
        page.render(contents)
    (moved / "anchors.parquet").write_bytes(b"PAR1")
    assert "cannot read the anchors" in collect(run, anchors=str(moved))["missing"]["the anchors"]
    config["data"]["path"] = "/nowhere"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "images.parquet").unlink()
    assert {"the images", "the anchors"} <= collect(copy)["missing"].keys()


CARDS = "[...document.querySelectorAll('#anchor-gallery figure')].map(f => f.innerText)"


@pytest.mark.medium
def test_in_chromium_anchors_are_chosen_by_class_and_verdict(opened, browser, run):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    ask = opened(run)
    assert len(ask(CARDS)) == 16 and ask("window.boom === undefined")
    assert any("</script>" in text for text in ask(CARDS)) and any("no text" in text for text in ask(CARDS))
    ask(SET.format("anchor-given"), "3")
    assert len(ask(CARDS)) == 6 and ask("$('anchor-count').textContent") == "6 of 16 anchors"
    ask(SET.format("anchor-class-search"), "b")
    browser.find_element("css selector", "#anchor-class-table td button").send_keys(Keys.ENTER)
    assert len(ask(CARDS)) == 5 and ask("document.activeElement.id") == "anchor-given"


@pytest.mark.medium
def test_in_chromium_a_page_without_anchors_hides_the_part(opened, run, tmp_path):  # noqa: F811
    ask = opened(copy_without(run, tmp_path))
    assert ask("$('anchors').hidden && document.querySelector(\"a[href='#anchors']\").hidden")
