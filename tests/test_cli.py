"""Every mistake of a first-time user ends in one line that names the thing, status 2, no traceback."""

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch
from PIL import Image

from mopro_fast import cli
from mopro_fast.config import RECIPES, TrainConfig, from_dict, recipe
from mopro_fast.errors import UserError
from mopro_fast.ops import backends


@pytest.fixture
def mopro_fast(capsys):
    """Run the command line in this process; -> (exit status, stdout, stderr)."""

    def run(*args):
        capsys.readouterr()
        try:
            cli.main([str(a) for a in args])
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.jpg")
    lists = {
        "good.txt": "".join(f"{i}.jpg {i % 2}\n" for i in range(6)),
        "missing.txt": "0.jpg 0\nnot_there.jpg 1\n",
        "range.txt": "0.jpg 0\n1.jpg 10\n",
        "empty.txt": "",
        "malformed.txt": "0.jpg zero\n",
    }
    for name, text in lists.items():
        (folder / name).write_text(text)
    return folder


MISTAKES = {
    "no such folder": (["--data", "{}/nowhere"], ["nowhere"]),
    "missing image": (["--data", "{}/missing.txt"], ["missing.txt", "not_there.jpg"]),
    "label out of range": (["--data", "{}/range.txt"], ["range.txt", "10", "num-classes"]),
    "empty list": (["--data", "{}/empty.txt"], ["empty.txt"]),
    "malformed line": (["--data", "{}/malformed.txt"], ["malformed.txt", "1"]),
    "batch larger than the data": (["--data", "{}/good.txt", "--batch-size", "64"], ["64", "6"]),
    "queue smaller than the batch": (["--data", "{}/good.txt", "--queue-size", "2"], ["--queue-size 2"]),
    "group does not divide": (["--data", "{}/good.txt", "--bn-group", "5"], ["--bn-group 5"]),
    "momentum": (["--data", "{}/good.txt", "--key-momentum", "1.5"], ["--key-momentum", "1.5"]),
    "no data": ([], ["--data"]),
    "width": (["--data", "{}/good.txt", "--width", "0.01"], ["--width", "0.01"]),
    "one row": (["--data", "{}/good.txt", "--batch-size", "1"], ["--batch-size 1"]),
    "no such validation data": (["--data", "{}/good.txt", "--batch-size", "4", "--val", "{}/no"], ["no such", "/no"]),
    "no GPU": (["--data", "{}/good.txt", "--device", "cuda"], ["cuda"]),
    "compiled and computed twice": (
        ["--data", "{}/good.txt", "--batch-size", "4", "--compile", "True", "--recompute", "True"],
        ["--compile", "--recompute"],
    ),
    "no such checkpoint": (
        ["--data", "{}/good.txt", "--batch-size", "4", "--resume", "{}/none.pt"],
        ["no checkpoint at"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line(mistake, images, tmp_path, mopro_fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args, named = MISTAKES[mistake]
    status, _, stderr = mopro_fast("train", "demo", "--out", tmp_path / "run", *(a.format(images) for a in args))
    assert status == 2, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mopro-fast: error: "), stderr
    assert all(text in lines[0] for text in named), lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_output_folder_that_cannot_be_written(images, mopro_fast):
    args = ("train", "demo", "--data", f"{images}/good.txt", "--batch-size", "4", "--device", "cpu")
    status, _, stderr = mopro_fast(*args, "--out", "/proc/no/run")
    assert status == 2 and "cannot write into --out /proc/no/run: No such file or directory" in stderr
    assert "Traceback" not in stderr


def test_names_that_do_not_exist_come_with_the_nearest(mopro_fast):
    for args, named in (
        (["train", "webvision-v3"], "did you mean 'webvision-v"),
        (["trian", "demo"], "did you mean 'train'"),
        (["train", "demo", "--batchsize", "3"], "--batch-size"),
        (["train", "demo", "--arch", "resnet19"], "resnet18"),
    ):
        status, _, stderr = mopro_fast(*args)
        assert status == 2 and named in stderr


@pytest.mark.medium
def test_as_a_process_there_is_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "mopro_fast", "train", "demo", "--data", "nowhere", "--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "mopro-fast: error: no such file or folder: nowhere\n"


def test_help_is_there_for_everything(mopro_fast):
    assert "mopro-fast COMMAND" in mopro_fast("--help")[1]
    recipes = mopro_fast("train", "--help")[1].splitlines()
    for name, make in RECIPES.items():
        (line,) = (line for line in recipes if line.startswith(f"  {name} "))
        assert line[26:] == make.__doc__.splitlines()[0] and len(line) < 120
    status, text, _ = mopro_fast("train", "webvision-v2", "--help")
    assert status == 0
    for field in ("--threshold", "--num-classes", "--bn-group", "--resume"):
        assert field in text
    assert "0.6" in text and "5000" in text


def test_importing_the_package_stays_light():
    code = "import sys, mopro_fast; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name, tmp_path):
    config = recipe(name)
    config.data.path, config.run.out = "somewhere", "out"
    if config.capro.init_proto != "never":
        with pytest.raises(UserError, match=r"^--init-proto .* needs --anchors"):
            config.validate()
        config.capro.anchors = "anchors"
    config.validate()
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert recipe(str(path)) == config


def test_official_values():
    v1, v2, mini = (recipe(n) for n in ("webvision-v1", "webvision-v2", "webvision-mini"))
    assert (v1.data.num_classes, v1.optim.epochs, v1.optim.batch_size, v1.optim.lr) == (1000, 90, 256, 0.1)
    assert (v1.optim.milestones, v1.optim.momentum, v1.optim.weight_decay) == ((40, 80), 0.9, 1e-4)
    assert (v1.mopro.queue_size, v1.mopro.key_momentum, v1.mopro.proto_momentum) == (8192, 0.999, 0.999)
    assert (v1.mopro.temperature, v1.mopro.alpha, v1.mopro.threshold, v1.mopro.start_clean) == (0.1, 0.5, 0.8, 11)
    assert (v2.data.num_classes, v2.mopro.threshold) == (5000, 0.6)
    assert (mini.data.num_classes, mini.data.keep_classes) == (50, 50)
    assert recipe("google500").data.num_classes == 500


@pytest.mark.parametrize(
    "name, classes, epochs, warmup, init_proto, start_clean",
    [
        ("capro-webvision-vanilla", 1000, 120, 10, "never", None),
        ("capro-webvision", 1000, 60, 5, 5, 10),
        ("capro-google500-vanilla", 500, 120, 10, "never", None),
        ("capro-google500", 500, 120, 10, 10, 20),
    ],
)
def test_official_values_of_capro(name, classes, epochs, warmup, init_proto, start_clean):
    """start_clean: theirs is the last epoch that keeps all labels."""
    c = recipe(name)
    assert (c.method, c.data.num_classes) == ("capro", classes)
    assert (c.data.augment.scale, c.data.augment.scale_k) == ((0.8, 1.0), (0.2, 1.0))
    assert (c.optim.epochs, c.optim.batch_size, c.optim.lr, c.optim.schedule) == (epochs, 256, 0.1, "warmup-cosine")
    assert (c.optim.warmup_epochs, c.optim.momentum, c.optim.weight_decay) == (warmup, 0.9, 1e-4)
    assert (c.mopro.queue_size, c.mopro.key_momentum, c.mopro.proto_momentum) == (8192, 0.999, 0.999)
    assert (c.mopro.temperature, c.mopro.alpha, c.mopro.threshold) == (0.1, 0.5, 0.6)
    assert (c.mopro.w_inst, c.mopro.w_proto, c.capro.w_recn, c.capro.beta) == (1, 1, 1, 0.1)
    assert c.capro.init_proto == init_proto and c.capro.unfreeze_epoch == (0 if start_clean is None else init_proto)
    assert start_clean is None or c.mopro.start_clean == start_clean + 1


def test_out_must_be_a_folder_and_the_backend_known(images, tmp_path, mopro_fast, monkeypatch):
    (tmp_path / "file").touch()
    data = ["train", "demo", "--data", images / "good.txt", "--batch-size", "4", "--device", "cpu", "--out"]
    status, _, stderr = mopro_fast(*data, tmp_path / "file")
    assert status == 2 and "is a file: name a folder" in stderr
    monkeypatch.setattr(backends, "_choice", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, _, stderr = mopro_fast(*data, tmp_path / "run")
    assert status == 2 and "MOPRO_FAST_BACKEND=triton" in stderr


@pytest.mark.parametrize("text", ["[]", "{", '{"optim": {"epochs": "ninety"}}', '{"optim": 3}'])
def test_a_broken_config_is_one_line(text, tmp_path, mopro_fast):
    (tmp_path / "config.json").write_text(text)
    status, _, stderr = mopro_fast("train", tmp_path / "config.json")
    assert status == 2 and len(stderr.splitlines()) == 1


def test_unknown_keys_of_a_config_are_refused():
    values = dataclasses.asdict(recipe("demo"))
    values["optim"]["learning_rate"] = values["optim"].pop("lr")
    with pytest.raises(UserError, match=r"unknown setting 'optim\.learning_rate'"):
        from_dict(TrainConfig, values, "config.json")


@pytest.mark.filterwarnings("default")
def test_pillow_s_warnings_do_not_reach_the_terminal(mopro_fast):
    mopro_fast("--version")
    with warnings.catch_warnings(record=True) as shown:
        for module in ("PIL.TiffImagePlugin", "numpy"):
            warnings.warn_explicit(module, UserWarning, "file.py", 1, module)
    assert [str(w.message) for w in shown] == ["numpy"]


def test_settings_that_cross_entropy_does_not_read_are_named(capsys):
    from mopro_fast.training.command import parse

    words = ["demo", "--data", "images", "--out", "run", "--queue-size", "64", "--threshold", "0.5", "--hue", "0.1"]
    assert parse(words).mopro.queue_size == 64 and not capsys.readouterr().err
    parse([*words, "--method", "ce"])
    lines = [f"note: --{name} has no effect with --method ce" for name in ("hue", "queue-size", "threshold")]
    assert capsys.readouterr().err.splitlines() == lines


def test_settings_that_another_method_does_not_read_are_named(capsys):
    from mopro_fast.training.command import parse

    words = ["--data", "images", "--out", "run", "--beta", "0.2", "--scale-k", "0.5", "1", "--alpha", "0.3"]
    parse(["capro-webvision-vanilla", *words])
    assert not capsys.readouterr().err
    for method, names in (("mopro", ["beta"]), ("ce", ["scale-k", "alpha", "beta"])):
        parse(["demo", *words, "--method", method])
        lines = [f"note: --{name} has no effect with --method {method}" for name in names]
        assert capsys.readouterr().err.splitlines() == lines
