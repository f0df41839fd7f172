"""The report: its numbers against loops, what it says of what is missing, and the page in a real browser."""

import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mopro_fast import cli
from mopro_fast.config import recipe
from mopro_fast.data.order import place_in_class
from mopro_fast.downstream.retrain import Retrain
from mopro_fast.errors import UserError
from mopro_fast.labels import REMOVED, UNSEEN, by_class, relabellings, verdicts
from mopro_fast.models.build import build
from mopro_fast.report import figures, images, page
from mopro_fast.report.page import Report
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

# Names that would run as HTML. A path holds "</script" where a class folder ends in "<" and a file begins so.
CLASSES = ["a<", "<img src=x onerror=boom()>", "\"'&amp; {{js}}", "plain"]
FILE = "script><script>boom()<!--{:02d}.png"
PER_CLASS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two epochs on 48 noise images and a broken one, then labels that the tests know."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (data / name).mkdir()
        for i in range(PER_CLASS):
            Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(data / name / FILE.format(i))
    (data / "plain" / "the last is broken.jpg").write_bytes(b"no image")
    c = recipe("demo")
    c.data.path, c.data.num_classes, c.run.out, c.run.device = str(data), len(CLASSES), str(out), "cpu"
    c.data.image_size = c.data.eval_resize = 8
    c.model.width, c.optim.epochs, c.optim.batch_size, c.mopro.start_clean = 0.125, 2, 16, 1
    c.run.tensorboard, c.run.log_every = False, 1
    assert Trainer(task_of(c)).run() == 0
    torch.save(torch.from_numpy(known_labels().astype(np.int32)), out / "labels.pt")
    return out


def given_labels() -> np.ndarray:
    return np.repeat(np.arange(4), PER_CLASS + (np.arange(4) == 3))  # in the index's order: classes by name


def known_labels() -> np.ndarray:
    """Of each class two are relabelled to the next one, three removed, one not shown."""
    new = given_labels()
    for c in range(4):
        rows = np.flatnonzero(given_labels() == c)
        new[rows[:2]], new[rows[2:5]], new[rows[5]] = (c + 1) % 4, REMOVED, UNSEEN
    return new


def collect(folder: Path, **options) -> dict:
    return page.collect(Report(str(folder), **options))


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


# Numbers.


@pytest.fixture
def labels(monkeypatch):
    monkeypatch.setattr("mopro_fast.labels.PIECE", 1500)
    rng = np.random.default_rng(1)
    given, new = rng.integers(-1, 7, 4000), rng.integers(-2, 7, 4000)
    return given, np.where(rng.random(4000) < 0.5, given, new)


def test_noise_per_class_equals_counting(labels):
    given, new = labels
    found = by_class(given, new, 9)  # of two classes there is no image
    for c in range(9):
        own = [(g, n) for g, n in zip(given, new, strict=True) if g == c and n != UNSEEN]
        assert found["images"][c] == len(own)
        assert found["removed"][c] == sum(n == REMOVED for _, n in own)
        assert found["relabelled"][c] == sum(n not in (c, REMOVED) for _, n in own)
        assert found["joined"][c] == sum(n == c and g != c for g, n in zip(given, new, strict=True))


def test_relabellings_equal_counting_and_come_by_frequency(labels):
    given, new = labels
    pairs = relabellings(given, new, most=5)
    counts = {}
    for g, n in zip(given.tolist(), new.tolist(), strict=True):
        if n >= 0 and n != g:
            counts[g, n] = counts.get((g, n), 0) + 1
    assert [n for *_, n in pairs] == sorted(counts.values(), reverse=True)[:5]
    assert all(counts[g, n] == count for g, n, count in pairs)
    assert relabellings(given, given) == []


def test_the_sample_is_bounded_repeatable_and_has_every_class_and_verdict(labels):
    given, new = labels
    rows = figures.sample(given, new, 100, seed=0)
    assert len(rows) == 100 == len(set(rows.tolist())) and (np.diff(rows) > 0).all()
    assert (rows == figures.sample(given, new, 100, seed=0)).all()
    assert (rows != figures.sample(given, new, 100, seed=1)).any()
    verdict = verdicts(given, new)[rows]
    assert np.bincount(verdict).tolist() == [15, 45, 40]
    for v in range(3):
        per_class = np.bincount(given[rows][verdict == v] + 1, minlength=8)
        assert per_class.max() - per_class[per_class > 0].min() <= 1  # in turn
    assert (figures.sample(given, new, 10**6, seed=0) == np.flatnonzero(new != UNSEEN)).all()
    assert len(figures.sample(given, new, 0, seed=0)) == 0


def test_the_sample_fills_up_where_a_verdict_is_rare_and_keeps_to_the_classes_asked_for(labels):
    given, new = labels
    few = np.where(new == REMOVED, 6, new)
    few[:3] = REMOVED
    rows = figures.sample(given, few, 100, seed=0)
    assert len(rows) == 100 and (few[rows] == REMOVED).sum() == 3
    rows = figures.sample(given, new, 100, seed=0, only=np.array([3]))
    assert len(rows) == 100 and ((given[rows] == 3) | (new[rows] == 3)).all()


@pytest.mark.parametrize("count", [0, 1, 30, 400, 5000])
@pytest.mark.parametrize("only", [None, [3, 6]], ids=["all", "only"])
def test_the_sample_is_that_of_sorting_all_images(labels, monkeypatch, count, only):
    given, new = labels
    given = np.where(given == 5, 31_000, given) * (given != 4)  # class 0 is large, and a class far from the others
    verdict = verdicts(given, new)
    if only is not None:
        verdict[~(np.isin(given, only) | np.isin(new, only))] = -1
    rng = np.random.default_rng(7)
    wanted = [rng.permutation(np.flatnonzero(verdict == v)) for v in range(3)]
    wanted = [rows[np.argsort(place_in_class(given[rows]), kind="stable")] for rows in wanted]
    slots = [int(count * 0.15), count - int(count * 0.15) - int(count * 0.4), int(count * 0.4)]
    taken = [rows[:n] for rows, n in zip(wanted, slots, strict=True)]
    for v in (1, 2, 0):
        taken[v] = wanted[v][: len(taken[v]) + count - sum(map(len, taken))]
    monkeypatch.setattr(figures, "_ROWS", 97)
    for kind in (np.int64, np.int16):
        found = figures.sample(given.astype(kind), new.astype(np.int32), count, 7, only)
        assert found.dtype == np.int64 and np.array_equal(found, np.sort(np.concatenate(taken)))


def test_curves_are_bounded_and_keep_their_extremes():
    x = np.arange(10_000) / 100
    y = np.sin(x)
    y[5000] = 50
    curve = figures.thin(x, y)
    assert len(curve["x"]) == len(curve["y"]) == figures.POINTS
    assert max(curve["high"]) == 50 and min(curve["low"]) == pytest.approx(-1, abs=1e-3)
    assert all(low <= v <= high for low, v, high in zip(curve["low"], curve["y"], curve["high"], strict=True))
    assert figures.thin(x[:2], np.array([np.nan, 1.0])) == {"x": [0.0, 0.01], "y": [None, 1.0]}


def test_similar_prototypes_come_together():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16))
    prototypes = centres[[0, 1, 2, 0, 1, 2, 0]] + 0.1 * rng.normal(size=(7, 16))
    prototypes[4] = 0  # no image yet
    found = figures.similarity(prototypes)
    assert sorted(found["order"]) == [0, 1, 2, 3, 5, 6] and found["unused"] == 1
    group = [{0: 0, 3: 0, 6: 0, 1: 1, 2: 2, 5: 2}[c] for c in found["order"]]
    assert sum(a != b for a, b in itertools.pairwise(group)) == 2
    unit = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True).clip(1e-9)
    cosines = np.frombuffer(base64.b64decode(found["cosines"]), np.int8).reshape(6, 6) / 127
    assert np.abs(cosines - (unit @ unit.T)[np.ix_(found["order"], found["order"])]).max() < 0.005
    a, b, cosine = found["pairs"][0]
    assert cosine == pytest.approx(max((unit @ unit.T)[i, j] for i in range(7) for j in range(i)), abs=1e-3)
    assert len(found["pairs"]) == 15 and unit[a] @ unit[b] == pytest.approx(cosine, abs=1e-3)


@pytest.mark.parametrize("classes", [0, 1, 2, 50])
def test_many_prototypes_are_averaged(classes):
    prototypes = np.random.default_rng(0).normal(size=(classes, 8))
    found = figures.similarity(prototypes, cells=7)
    n = min(classes, 7)
    cells = np.frombuffer(base64.b64decode(found["cosines"]), np.int8).reshape(n, n) / 127
    unit = (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True))[found["order"]]
    cosines = unit @ unit.T
    for i in range(n):
        for j in range(n):
            rows, columns = (range(*found["edges"][k : k + 2]) for k in (i, j))
            values = [cosines[a, b] for a in rows for b in columns if a != b or len(rows) == 1]
            assert cells[i, j] == pytest.approx(np.mean(values), abs=0.005)


@pytest.mark.parametrize("calibrate", [False, True])
def test_scores_are_step_6_of_the_method(calibrate):
    torch.manual_seed(0)
    c = recipe("demo")
    c.data.num_classes, c.model.width, c.mopro.alpha, c.mopro.threshold = 5, 0.125, 0.3, 0.3
    c.mopro.calibrate = calibrate
    model = build(c).eval()
    encoder = model.encoder_q
    torch.manual_seed(0)
    prototypes = torch.nn.functional.normalize(torch.randn(5, c.model.embed_dim), dim=1)
    model.prototypes.copy_(prototypes)
    factors, biases = [1, 1], np.zeros((2, 5))
    if calibrate:
        model.calibration.log_scale.copy_(torch.tensor(factors := [0.5, 1.7]).log())
        model.calibration.bias.copy_(torch.from_numpy(biases := np.linspace(-1, 1, 10).reshape(2, 5)))
    pixels = torch.randint(0, 256, (32, 16, 16, 3), dtype=torch.uint8)
    given = torch.randint(-1, 5, (32,))
    t, now = images.scores(model, pixels, given, c)
    with torch.no_grad():
        logits, q = encoder(images.ops.normalize(pixels))

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    z, s = logits.double().numpy(), (q.double() @ prototypes.double().T).numpy() / c.mopro.temperature
    expected = 0.3 * softmax(factors[0] * z + biases[0]) + 0.7 * softmax(factors[1] * s + biases[1])
    assert np.abs(t.numpy() - expected).max() < 1e-5
    for row, label, decided in zip(expected, given.tolist(), now.tolist(), strict=True):
        sure = row.max() > 0.3
        kept = sure or (label >= 0 and row[label] > 1 / 5)
        assert decided == (row.argmax() if sure else label if kept else REMOVED)
    assert len(set(now.tolist())) > 1


# The page.


def test_the_page_has_what_the_run_has(run):
    contents = collect(run)
    assert contents["missing"] == {}
    assert contents["names"] == sorted(CLASSES)
    found = contents["labels"]
    assert found["counts"] == {"kept": 25, "relabelled": 8, "removed": 12} and found["unseen"] == 4
    assert found["classes"]["images"] == [11, 11, 11, 12] and found["classes"]["removed"] == [3] * 4
    assert sorted(found["pairs"]) == [[c, (c + 1) % 4, 2] for c in range(4)]
    assert {c["title"] for c in contents["charts"]} >= {"Losses", "Learning rate", "Images per second"}
    (losses,) = [c["lines"] for c in contents["charts"] if c["title"] == "Losses"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    train = [e for e in log if e["split"] == "train"]
    lines = [line["name"] for chart in contents["charts"] for line in chart["lines"]]
    assert lines.count("relabelled") == 1  # among the shares, not among other values too
    assert losses[0]["y"] == [pytest.approx(e["loss"], rel=1e-3) for e in train]
    assert losses[0]["x"] == [pytest.approx(e["epoch"] + e["step"] / 3, abs=1e-4) for e in train]
    (entry,) = [e for e in log if e["split"] == "classes"]
    left = [
        n - r - x + j
        for n, r, x, j in zip(*(entry[k] for k in ("images", "relabelled", "removed", "joined")), strict=True)
    ]
    shares = sorted(a / n for a, n in zip(left, entry["images"], strict=True))
    (lines,) = [c["lines"] for c in contents["charts"] if c["title"] == "What is left of the classes"]
    assert [line["y"] for line in lines] == [
        [pytest.approx(100 * s, rel=1e-3)] for s in (shares[0], sum(shares[1:3]) / 2, shares[3])
    ]
    assert contents["alarms"] == [[e["epoch"] + 1, e["text"]] for e in log if e["split"] == "alarm"]
    assert contents["files"]["left_out"]["count"] == 1
    assert contents["config"]["optim.batch_size"] == "16" and contents["defaults"]["optim.batch_size"] == "256"
    assert len(contents["images"]) == 44 and len(contents["unread"]) == 1  # 45 shown in training, one broken by hand
    new = known_labels()
    for card in contents["images"]:
        name = contents["names"][card["given"]]
        assert card["path"].startswith(f"{name}/") and set(card["scores"]) >= {"given", "best"}
        assert ("new" in card["scores"]) == (card["new"] >= 0)
    assert [card["new"] for card in contents["images"]] == new[new != UNSEEN][:-1].tolist()


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_no_string_of_the_run_hides_text(run, tmp_path):
    moved = tmp_path / "run \x1b[2J\u202e\udcff"
    shutil.copytree(run, moved)
    contents = collect(moved)
    contents["images"].append({"name": "\u202e"})
    size = page.write(contents, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert len(text.encode()) == size and text.replace("\n", "").isprintable()
    assert r"run \x1b[2J\u202e\xff" in text and r"\\u202e" in text.partition("<body")[2]


def test_no_string_of_the_run_is_html_and_nothing_is_loaded(run):
    contents = collect(run)
    text = page.render(contents)
    assert text == page.render(collect(run))  # the same run, the same bytes
    assert "boom()" in text
    tags = Tags(text).found
    assert [names for tag, names in tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}]
    assert not [t for t, _ in tags if t in ("img", "iframe", "object", "embed", "base")]
    for _, attributes in tags:
        assert not [a for a in attributes if a.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert "<" not in data and json.loads(data) == json.loads(json.dumps(contents))
    assert set(re.findall(r"\w+://[\w./]+", text.replace(data, ""))) == {"http://www.w3.org/2000/svg"}
    script = (Path(page.__file__).parent / "page.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", script)


@pytest.mark.parametrize("count, thumb", [(0, 96), (5, 16), (30, 32)])
def test_the_options_bound_the_size(run, count, thumb, tmp_path):
    out = tmp_path / "page.html"
    contents = collect(run, images=count, thumb=thumb)
    assert len(contents["images"]) + len(contents["unread"]) == count
    for card in contents["images"]:
        image = Image.open(io.BytesIO(base64.b64decode(card["jpeg"])))
        assert image.format == "JPEG" and max(image.size) == thumb and image.size == (thumb, round(thumb * 24 / 40))
    size = page.write(contents, out)
    assert size == out.stat().st_size
    assert size - page.write(contents | {"images": []}, out) <= count * (700 + 4 * thumb * thumb)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_classes_asked_for_by_name_or_number(run):
    cards = collect(run, only=("plain", "0"))["images"]
    assert cards and all({card["given"], card["new"]} & {0, 3} for card in cards)
    for name, hint in (("plane", "did you mean 'plain'"), ("4", "below 4"), ("-1", "below 4")):
        with pytest.raises(UserError, match=hint):
            collect(run, only=(name,))


MISSING = {
    "config.json": {"the settings"},
    "log.jsonl": {"the curves"},
    "timing.jsonl": {"the speed"},
    "labels.pt": {"the corrected labels"},
    "checkpoints": {"scores and prototypes"},
    "left_out.csv": set(),
    "images.parquet": set(),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named(run, name, tmp_path):
    copy = copy_of(run, tmp_path)
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    contents = collect(copy)
    assert contents["missing"].keys() == MISSING[name]
    page.render(contents)
    if name != "left_out.csv" and path.suffix:  # and what is damaged
        path.write_bytes(b"{nonsense\n[1]\n")
        contents = collect(copy)
        assert bool(contents["missing"]) == bool(MISSING[name]), contents["missing"]
        page.render(contents)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, tmp_path):
    copy = copy_of(run, tmp_path)
    *_, newest = sorted((copy / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    missing = collect(copy)["missing"]
    assert missing.keys() == {"the newest checkpoint"} and newest.name in missing["the newest checkpoint"]
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / newest.name).write_bytes(b"")
    contents = collect(copy)
    assert newest.name in contents["missing"]["scores and prototypes"]
    assert contents["images"] and all(card["scores"] == {} for card in contents["images"])


def test_a_retraining_has_curves_and_no_labels(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Retrain())))
    entries = [{"split": "train", "epoch": e, "step": 1, "loss": 1.0, "acc_cls": 0.5} for e in (0, 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    contents = collect(tmp_path)
    assert {"Losses", "Accuracy on training batches"} <= {chart["title"] for chart in contents["charts"]}
    assert contents["config"]["resample"] == "true" and "correct no labels" in contents["missing"]["the images"]


def test_a_run_in_progress(run, tmp_path):
    copy = copy_of(run, tmp_path)
    (copy / "labels.pt").unlink()
    lines = (copy / "log.jsonl").read_text().splitlines()
    lines[1] = lines[1].replace('"loss": ', '"loss": NaN, "was": ')
    (copy / "log.jsonl").write_text("\n".join(lines[:3])[:-20])
    path = sorted((copy / "checkpoints").iterdir())[-1]
    state = torch.load(path, weights_only=True)
    state["assigned"][:] = torch.from_numpy(known_labels())
    torch.save(state, path)
    contents = collect(copy)
    assert contents["missing"] == {} and contents["summary"]["ended"] == 0
    assert contents["labels"]["source"].startswith("the epoch in progress")
    assert contents["labels"]["counts"]["removed"] == 12
    (losses,) = [c["lines"] for c in contents["charts"] if c["title"] == "Losses"]
    assert losses[0]["x"] == [pytest.approx(step / 3, abs=1e-4) for step in (1, 2)] and losses[0]["y"][1] is None
    page.render(contents)


def test_data_that_moved_is_gone_or_is_not_the_run_s(run, tmp_path):
    copy = copy_of(run, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    data = Path(config["data"]["path"])
    config["data"]["path"] = "/nowhere"
    (copy / "config.json").write_text(json.dumps(config))
    assert len(collect(copy, data=str(data))["images"]) == 44
    contents = collect(copy)  # the run's own list says which labels were given
    assert "--data" in contents["missing"]["the images"] and contents["names"] == sorted(CLASSES)
    assert contents["labels"]["counts"]["removed"] == 12
    assert contents["images"] == [] and len(contents["unread"]) == 45
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for path in (other / "plain").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    contents = collect(copy, data=str(other))
    assert "not those of the run" in contents["missing"]["the images"] and contents["labels"] is None


def clean_table(run: Path, path: Path, **columns) -> Path:
    """As `mopro-fast clean` writes it; a column of None is left out."""
    names = pq.read_table(run / "images.parquet")["path"].to_pylist()
    n, rows = len(names), np.arange(len(names))
    table = {
        "id": rows,
        "path": names,
        "given": given_labels(),
        "label": np.select([rows < 6, rows < 12], [2, -1], given_labels()),
        "verdict": ["relabelled"] * 6 + ["removed"] * 5 + ["unreadable"] + ["kept"] * (n - 12),
        "best": np.where(rows == 11, -1, 2),
        "score_given": [None if i == 11 else i / n for i in range(n)],
        "score_best": [None if i == 11 else 1 - i / n for i in range(n)],
        "classifier_best": [0.25] * n,
    }
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in (table | columns).items() if v is not None}), path)
    return path


def test_the_table_of_clean_replaces_the_labels_of_training(run, tmp_path):
    clean_table(run, tmp_path / "cleaned" / images.TABLE)
    contents = collect(run, table=str(tmp_path / "cleaned"))
    assert contents["labels"]["counts"] == {"kept": 37, "relabelled": 6, "removed": 5}
    assert contents["labels"]["unseen"] == 1
    cards = {card["path"]: card for card in contents["images"]}
    first, seventh = (cards[f"{sorted(CLASSES)[0]}/{FILE.format(i)}"] for i in (0, 6))
    assert (first["given"], first["new"], first["best"]) == (0, 2, 2)
    assert first["scores"] == {"given": 0, "best": 1, "new": 1, "classifier_best": 0.25}
    assert (seventh["new"], seventh["scores"]["given"]) == (-1, pytest.approx(6 / 49, abs=1e-4))
    order = np.random.default_rng(0).permutation(49)  # of other rows than the data's, the paths tell
    pq.write_table(pq.read_table(tmp_path / "cleaned" / images.TABLE).take(order), tmp_path / "shuffled.parquet")
    shuffled = collect(run, table=str(tmp_path / "shuffled.parquet"))
    assert shuffled["labels"] == contents["labels"] | {"source": shuffled["labels"]["source"]}
    assert all(cards[card["path"]] == card for card in shuffled["images"]) and len(shuffled["images"]) == 47
    data = json.loads((run / "config.json").read_text())["data"]["path"]
    paths = pq.read_table(tmp_path / "cleaned" / images.TABLE)["path"].to_pylist()
    (tmp_path / "packed.txt").write_text("".join(f"{path} 0\n" for path in reversed(paths)))  # another order, as packs
    moved = collect(run, table=str(tmp_path / "cleaned"), data=str(tmp_path / "packed.txt"), root=data)
    assert {card["path"]: card for card in moved["images"]} == cards and moved["labels"] == contents["labels"]
    bare = clean_table(run, tmp_path / "bare", best=None, score_given=None, score_best=None, classifier_best=None)
    assert all("now" in card for card in collect(run, table=str(bare))["images"])  # the newest checkpoint scores them


@pytest.mark.parametrize("label, kind", [(5, np.int16), (-40_000, np.int32), (40_000, np.int32)])
def test_a_table_is_read_in_pieces_and_of_its_names_only_those_asked_for(tmp_path, monkeypatch, label, kind):
    n = 1000
    verdict = np.resize(["kept", "relabelled", "removed", "unreadable", None], n)
    columns = {"given": np.arange(n) % 9 - 1, "verdict": verdict, "label": np.arange(n) % 7, "best": np.arange(n)}
    columns["label"][600] = label  # kept
    columns["path"] = [None if i == 8 else b"%d\xff" % i for i in range(n)]
    columns["given"] = pa.array(columns["given"], mask=columns["given"] < 0)
    columns["score_best"] = np.linspace(0, 1, n)
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=64)
    monkeypatch.setattr(images, "_ROWS", 100)
    found = images.read_table(tmp_path / "t.parquet")
    assert found.given.dtype == np.int16 and (found.given == np.arange(n) % 9 - 1).all()
    new = [{"removed": REMOVED, "unreadable": UNSEEN, None: UNSEEN}.get(v, i % 7) for i, v in enumerate(verdict)]
    new[600] = label
    assert found.new.dtype == kind and found.new.tolist() == new
    rows = np.array([0, 8, 63, 64, 600, 999])
    paths, scores = found.table.rows(rows)
    assert paths.tolist() == ["" if i == 8 else f"{i}\udcff" for i in rows]
    assert scores == [{"score_best": columns["score_best"][i], "best": i} for i in rows]
    assert found.table.rows(rows[:0])[1] == []


def test_a_wrong_table_is_one_line(run, tmp_path):
    (tmp_path / "text").write_text("no table")
    numbered = clean_table(run, tmp_path / "c")
    pq.write_table(pq.read_table(numbered).set_column(1, "path", [range(49)]), numbered)
    for path, message in (
        (tmp_path / "none", "cannot read --table"),
        (tmp_path / "text", "cannot read --table"),
        (tmp_path, "cannot read --table .*cleaned.parquet"),
        (clean_table(run, tmp_path / "a", verdict=None), "no column verdict"),
        (clean_table(run, tmp_path / "b", label=["cat"] * 49), "another type"),
        (numbered, "another type"),
        (clean_table(run, tmp_path / "d", given=[1 << 31] * 49), "another type"),
    ):
        with pytest.raises(UserError, match=message) as error:
            collect(run, table=str(path))
        assert "\n" not in str(error.value)


def test_the_command_prints_the_path_and_mistakes_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", str(run), "--out", str(out), "--images", "3"])
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and "3 images" in printed.err and out.stat().st_size > 10_000
    names = tmp_path / "names.txt"
    names.write_text("name\n" * 49)
    for arguments, message in (
        ([tmp_path / "nowhere"], "no run at"),
        ([tmp_path], "is not a run"),
        ([run.parent], f"holds runs: {run.name}"),
        ([run, "--images", "-1"], "--images"),
        ([run, "--thumb", "1000"], "--thumb"),
        ([run, "--out", tmp_path], "is a folder"),
        ([run, "--out", tmp_path / "no" / "page.html"], "cannot write"),
        ([run, "--names", names], "49 lines"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", *map(str, arguments)])
        error = capsys.readouterr().err.splitlines()
        assert message in error[-1] and error[-1].startswith("mopro-fast: error: ")


# In a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, run, tmp_path):
    """-> a function that opens the page of a folder and gives a way to ask it."""

    def open_page(folder: Path = run, **options):
        path = tmp_path / "page.html"
        page.write(collect(folder, **options), path)
        browser.get(path.as_uri())
        return lambda script, *arguments: browser.execute_script(f"return {script}", *arguments)

    yield open_page
    assert browser.get_log("browser") == []  # neither errors nor refusals of the page's own policy


SET = "(() => {{ $('{0}').value = arguments[0]; $('{0}').dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
CARDS = "[...document.querySelectorAll('#gallery figure')].map(f => [f.dataset.verdict, f.innerText])"


@pytest.mark.medium
def test_in_chromium_search_and_filters_change_the_visible_cards(opened):
    ask = opened()
    assert ask("document.title").endswith("MoPro report") and ask("window.boom === undefined")
    assert len(ask(CARDS)) == 44 and ask("$('image-count').textContent") == "44 images"
    size = "(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight]))($('gallery').querySelector('img'))"
    assert ask(size) == [40, 24]
    for verdict, n in (("relabelled", 8), ("removed", 12), ("kept", 24)):
        ask(SET.format("verdict"), verdict)
        assert [v for v, _ in ask(CARDS)] == [verdict] * n
        assert ask("$('image-count').textContent") == f"{n} of 44 images"
    ask(SET.format("verdict"), "")
    ask(SET.format("search"), "PLAIN/")
    assert len(ask(CARDS)) == 11 and all("plain/" in text for _, text in ask(CARDS))
    ask(SET.format("given"), "0")
    assert ask(CARDS) == []
    ask("$('reset').click()")
    assert len(ask(CARDS)) == 44
    ask(SET.format("given"), "3")
    ask(SET.format("new"), "0")
    cards = ask(CARDS)
    assert [v for v, _ in cards] == ["relabelled"] * 2 and all("3 plain" in text and "→ 0" in text for _, text in cards)
    ask("$('reset').click()")
    ask(SET.format("order"), "-given")
    scores = [re.search(r"given label scores (\S+)", text)[1] for _, text in ask(CARDS)]
    assert len(scores) == 44 and scores == sorted(scores, key=float, reverse=True) and scores[0] != scores[-1]


def test_in_chromium_the_table_of_clean(opened, run, tmp_path):
    ask = opened(table=str(clean_table(run, tmp_path / "table")))
    ask(SET.format("search"), FILE.format(0))
    assert any("new label scores 1.000" in text and "classifier best 0.250" in text for _, text in ask(CARDS))
    ask("$('reset').click()")
    ask(SET.format("order"), "+given")
    scores = [float(re.search(r"given label scores (\S+)", text)[1]) for _, text in ask(CARDS)]
    assert len(scores) == 47 and scores == sorted(scores)


def test_in_chromium_tables_charts_and_map_answer(opened, browser):
    from selenium.webdriver.common.keys import Keys

    ask = opened()
    rows = "[...$('class-table').tBodies[0].rows].map(r => r.cells[0].textContent)"
    assert len(ask(rows)) == 4
    ask(SET.format("class-search"), "pla")
    assert ask(rows) == ["3 plain"]
    ask(SET.format("class-search"), "")
    browser.find_element("css selector", "#class-table th button").send_keys(Keys.ENTER)
    assert [text.split()[0] for text in ask(rows)] == ["0", "1", "2", "3"]
    assert ask("document.querySelector('#class-table th').getAttribute('aria-sort')") == "ascending"
    browser.find_element("css selector", "#class-table th button").send_keys(Keys.ENTER)
    assert [text.split()[0] for text in ask(rows)] == ["3", "2", "1", "0"]
    browser.find_element("css selector", "#pair-table td button").send_keys(Keys.ENTER)
    assert [v for v, _ in ask(CARDS)] == ["relabelled"] * 2
    assert ask("document.activeElement.id") == "given"
    losses = ask("[...document.querySelectorAll('figure')].find(f => f.innerText.startsWith('Losses'))")
    losses.find_element("css selector", "svg").send_keys(Keys.END)
    readout = losses.find_element("css selector", ".readout").text
    assert readout.startswith("epoch 2: sum ") and "instances" in readout
    before = len(losses.find_elements("css selector", "path.line"))
    losses.find_element("css selector", ".legend button").click()
    assert len(losses.find_elements("css selector", "path.line")) == before - 1
    canvas = browser.find_element("css selector", ".map canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert re.search(r" · .*: -?\d\.\d\d$", browser.find_element("css selector", ".map .readout").text)
    assert ask("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0


def test_in_chromium_on_a_phone_and_in_the_dark(opened, browser):
    command = browser.execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    try:
        ask = opened()
        assert ask("document.documentElement.scrollWidth") <= 400
        light = ask("getComputedStyle(document.body).backgroundColor")
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        command("Emulation.setEmulatedMedia", dark)
        assert ask("getComputedStyle(document.body).backgroundColor") != light
    finally:
        command("Emulation.clearDeviceMetricsOverride", {})
        command("Emulation.setEmulatedMedia", {"features": []})


def test_in_chromium_a_page_of_almost_nothing(opened, run, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(run / "config.json", tmp_path / "empty")
    ask = opened(tmp_path / "empty")
    assert ask("[...document.querySelectorAll('section')].every(s => s.innerText.length > 20)")
    assert "cannot read log.jsonl" in ask("$('missing').innerText")
