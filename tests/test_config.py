"""A config from a file, from a checkpoint or from the command line: the same checks, one line for each mistake."""

import copy
import dataclasses
import json
import math
import shutil
import types
import typing

import pytest
import torch

from mopro_fast import cli
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.config import LIMITS, AugmentConfig, Settings, TrainConfig, flag, from_dict, load, recipe
from mopro_fast.downstream.finetune import Finetune
from mopro_fast.downstream.retrain import Retrain
from mopro_fast.errors import UserError
from mopro_fast.training.command import parse

OTHERS = [None, True, 3, 16.0, 1.5, "x", "2", [], [1], {}, {"a": 1}, [[1]]]
FITTING = {types.NoneType: [None], bool: [True], int: [3], float: [3, 16.0, 1.5], str: ["x", "2"]}
FITTING |= {dict[str, str]: [{}], tuple[int, ...]: [[], [1]]}
NUMBERS = {int, float, tuple[int, ...], tuple[float, float]}


def config() -> TrainConfig:
    c = recipe("demo")
    c.data.path, c.run.out = "images", "run"
    return c


def settings(values: dict, prefix: str = "") -> dict:
    """The settings of a config as a dict, by their dotted names."""
    found = {}
    for name, value in values.items():
        inner = isinstance(value, dict) and name != "extra_val"
        found |= settings(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def put(values: dict, name: str, value) -> dict:
    *parts, last = name.split(".")
    inner = values
    for part in parts:
        inner = inner[part]
    inner[last] = value
    return values


def refusal(values, cls=TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(cls, values, "e.json")
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("data.layout", "lst", "e.json: data.layout must be auto, webvision, list, folder or shards, got 'lst'"),
        ("method", "MoPro", "e.json: method must be mopro, capro or ce, got 'MoPro'"),
        ("optim.batch_size", 16.0, "e.json: optim.batch_size must be a whole number, got 16.0"),
        ("run.keep", True, "e.json: run.keep must be a whole number, got true"),
        ("run.seed", None, "e.json: run.seed must be a whole number, got null"),
        ("optim.lr", math.nan, "e.json: optim.lr must be a finite number, got NaN"),
        ("optim.lr", 10**400, "e.json: optim.lr must be a finite number, got 1000"),
        ("optim.lr", "0.1", "e.json: optim.lr must be a finite number, got '0.1'"),
        ("run.tensorboard", "false", "e.json: run.tensorboard must be true or false, got 'false'"),
        ("optim.milestones", [1, 2.5], "e.json: optim.milestones must be a list, each a whole number, got [1, 2.5]"),
        (
            "data.augment.scale",
            [0.5],
            "e.json: data.augment.scale must be a list of 2, each a finite number, got [0.5]",
        ),
        ("data.augment.scale", [0.5, 0.2], "e.json: --scale 0.5 0.2: the smallest area comes first"),
        ("data.augment.hue", 0.6, "e.json: data.augment.hue must lie in [0, 0.5], got 0.6"),
        ("data.extra_val", {"a": 1}, "e.json: data.extra_val must be an object of strings, got an object"),
        ("data.val", 3, "e.json: data.val must be a string or null, got 3"),
        ("data.augment", [], "e.json: data.augment must be an object of settings, got []"),
        ("optim", None, "e.json: optim must be an object of settings, got null"),
        ("data.augment.scale_k", [0.5, 0.2], "e.json: --scale-k 0.5 0.2: the smallest area comes first"),
        ("capro.init_proto", "soon", "e.json: capro.init_proto must be a whole number or never, got 'soon'"),
        ("capro.unfreeze_epoch", 1.5, "e.json: capro.unfreeze_epoch must be a whole number or never, got 1.5"),
        ("capro.init_proto", None, "e.json: capro.init_proto must be a whole number or never, got null"),
        ("capro.unfreeze_epoch", -1, "e.json: capro.unfreeze_epoch must lie in [0, 1000000000], got -1"),
        ("capro.soft_label", 11, "e.json: capro.soft_label must be 0, 1, 2, 3, 4, 6, 7, 8, 9 or 10, got 11"),
        ("optim.epoch", 3, "e.json: unknown setting 'optim.epoch': did you mean 'epochs'?"),
        ("optim.a\nb", 3, r"e.json: unknown setting 'optim.a\nb'"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(name, value, message):
    assert refusal(put(config().as_dict(), name, value)).startswith(message)


@pytest.mark.parametrize("cls", [TrainConfig, Retrain, Finetune])
def test_every_setting_refuses_values_of_other_types(cls):
    plain = json.loads(json.dumps(cls().as_dict()))
    assert from_dict(cls, plain, "e.json") == cls()
    for name, hint in types_of(cls):
        fitting = [v for kind in kinds_of(hint) for v in FITTING.get(kind, typing.get_args(kind))]
        for value in OTHERS:
            try:
                from_dict(cls, put(copy.deepcopy(plain), name, value), "e.json")
            except UserError as error:
                assert str(error).startswith(f"e.json: {name} must "), error
            else:
                assert any(value == v and type(value) is type(v) for v in fitting), (name, value)


def kinds_of(hint) -> tuple:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def types_of(cls: type, prefix: str = ""):
    for name, hint in typing.get_type_hints(cls).items():
        inner = dataclasses.is_dataclass(hint)
        yield from types_of(hint, f"{prefix}{name}.") if inner else [(prefix + name, hint)]


@pytest.mark.parametrize("cls", [TrainConfig, Retrain, Finetune])
def test_every_number_has_limits(cls):
    hints = dict(types_of(cls))
    numbers = {name for name, hint in hints.items() if NUMBERS & set(kinds_of(hint))}
    assert numbers == LIMITS.keys() & hints.keys() and {"data.keep_classes", "data.augment.scale"} < numbers


def test_limits_name_settings():
    assert LIMITS.keys() <= {n for cls in (TrainConfig, Retrain, Finetune) for n in settings(cls().as_dict())}


@pytest.mark.parametrize("name", LIMITS)
def test_numbers_outside_of_their_limits_are_refused_from_files_and_options(name):
    cls = next(c for c in (TrainConfig, Finetune) if name in settings(c().as_dict()))
    low, high = (float(end) for end in LIMITS[name][1:-1].split(", "))
    several = any(typing.get_origin(kind) is tuple for kind in kinds_of(dict(types_of(cls))[name]))
    for value in (low - 1, high + high / 100 + 1, -math.inf, math.nan):
        if value == math.inf:  # the end of the interval
            continue
        value = int(value) if float(value).is_integer() else value
        assert f"e.json: {name} must " in refusal(put(cls().as_dict(), name, [value] * 2 if several else value), cls)
        wrong = given(cls, name, (value, value) if several else value)
        if wrong is not None:
            with pytest.raises(UserError, match=f"^{flag(name)} must lie in "):
                wrong.validate()


@pytest.mark.parametrize("name", ["init_proto", "unfreeze_epoch"])
def test_an_epoch_may_be_never(name, capsys):
    assert getattr(from_dict(TrainConfig, {"capro": {name: "never"}}, "e.json").capro, name) == "never"
    words = ["capro-webvision", "--data", "images", "--out", "run", f"--{name.replace('_', '-')}"]
    assert [getattr(parse([*words, word]).capro, name) for word in ("never", "3")] == ["never", 3]
    parse([*words, "never", *(["--anchors", "a"] if name == "unfreeze_epoch" else [])]).validate()
    for word in ("soon", "1.5", "None"):
        with pytest.raises(SystemExit):
            parse([*words, word])
        assert "INT|{never}" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"^{words[-1]} must lie in "):
        parse([*words, "-1"]).validate()


@pytest.mark.parametrize(
    "options, message",
    [
        ("--init-proto 3", "--init-proto 3 needs --anchors: the prototypes are computed from them"),
        (
            "--init-proto 3 --anchors a --start-clean 3",
            "--start-clean 3 must be above --init-proto 3: correction needs",
        ),
        ("--row-weights True", "--row-weights True needs --anchors with a column weight"),
        ("--calibrate True", "--calibrate True is MoPro's"),
        (
            "--soft-label 10 --bootstrap-weights softmax",
            "--bootstrap-weights softmax has no effect with --soft-label 10",
        ),
        ("--queue-size 64", "--queue-size 64 is smaller than --batch-size 256"),
        ("--epochs 10", "--warmup-epochs 10 must be a whole number below --epochs 10 with --schedule warmup-cosine"),
        ("--warmup-epochs 2.5", "--warmup-epochs 2.5 must be a whole number below --epochs 120"),
    ],
)
def test_settings_of_capro_that_contradict(options, message):
    with pytest.raises(UserError) as caught:
        parse(["capro-webvision-vanilla", "--data", "images", "--out", "run", *options.split()]).validate()
    assert str(caught.value).startswith(message)


def test_settings_of_capro_do_not_hinder_mopro():
    parse(["demo", "--data", "images", "--out", "run", "--init-proto", "3", "--warmup-epochs", "0.5"]).validate()


def given(cls: type, name: str, value) -> Settings | None:
    """A config with this value, as the command line makes it; None where making it is refused."""
    c = cls()
    c.data.path, c.run.out = "images", "run"
    *parts, last = name.split(".")
    inner = c
    for part in parts:
        inner = getattr(inner, part)
    if isinstance(inner, AugmentConfig):
        with pytest.raises(UserError, match=f"^{flag(name)} must lie in "):
            dataclasses.replace(inner, **{last: value})
        return None
    setattr(inner, last, value)
    return c


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("data.path", "a\0b", r"--data 'a\x00b': no file can have such a name"),
        ("data.path", "\ud800", r"--data '\ud800': no file can have such a name"),
        ("run.out", "x" * 300, "--out 'xxx"),
        ("run.out", "x/" * 3000, "--out 'x/x/"),
        ("data.val", "", "--val is empty: name a path, or leave it out"),
        ("run.resume", "", "--resume is empty"),
        ("data.extra_val", {"a": ""}, "--extra-val is empty"),
        ("data.extra_val", {"": "x"}, "--extra-val '': the log cannot show this name"),
        ("capro.anchors", "a\0b", r"--anchors 'a\x00b': no file can have such a name"),
        ("data.holdout", "nan", "--holdout nan: a share must lie between 0 and 1"),
    ],
)
def test_paths_that_no_file_has(name, value, message):
    with pytest.raises(UserError) as caught:
        from_dict(TrainConfig, put(config().as_dict(), name, value), "e.json").validate()
    assert str(caught.value).startswith(message)


def test_names_may_hold_any_byte(tmp_path):
    c = config()
    c.data.path = "caf\udce9"
    (tmp_path / "c.json").write_text(c.to_json())
    assert load(tmp_path / "c.json") == c


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"method": "ce", "method": "mopro"}', "'method' is there twice: keep one"),
        ('{"optim": {"lr": NaN}}', "NaN is no number that a setting can have"),
        ('{"optim": {"lr": -Infinity}}', "-Infinity is no number"),
        ('{"optim": {"lr": 1e999}}', "optim.lr must be a finite number, got Infinity"),
        ('{"run": {"seed": ' + "9" * 5000 + "}}", "a number in it has too many digits"),
        ("\xff\xfe{}", "it is not UTF-8 text"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[]", "is no config: it must be an object of settings, got []"),
        ('{"method": "ce",}', "Expecting property name"),
        ('{"run": {"out": "~nobody-of-this-name/x"}}', "'out': '~nobody-of-this-name/x': no home folder is known"),
        ('{"optim": {"momentum": 1}}', "optim.momentum must lie in [0, 1), got 1"),
        ("{}", "no training data given: set --data"),
    ],
)
def test_texts_that_are_no_config(text, message, tmp_path):
    (tmp_path / "e.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "e.json")
    assert str(caught.value).isprintable() and message in str(caught.value) and "e.json" in str(caught.value)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + config().to_json().encode())
    assert load(tmp_path / "c.json") == config()


@pytest.fixture
def words(monkeypatch):
    """What a command gets of its words."""

    def run(*args: str) -> list[str]:
        got = []
        monkeypatch.setattr("mopro_fast.environment.main", lambda rest: got.extend(rest))
        with pytest.raises(SystemExit) as stop:
            cli.main(["env", *args])
        assert stop.value.code == (0 if len(got) == len(args) else 2)
        return got

    return run


def test_home_in_every_word_that_a_shell_leaves(words, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a", "--out=~/b", "val=~/c", "--val=val=~/d", "~", "e~", "./~", "a/~/b", "--lr=1", "--x=a~=b"]
    home = ["/home/me/a", "--out=/home/me/b", "val=/home/me/c", "--val=val=/home/me/d", "/home/me"]
    assert words(*given) == home + given[5:]
    assert words("--out=~nobody-of-this-name/b") == []
    assert "'~nobody-of-this-name/b': no home folder is known for '~nobody-of-this-name'" in capsys.readouterr().err
    monkeypatch.setenv("HOME", "")
    assert words("~/a") == [] and "'~/a': no home folder is known" in capsys.readouterr().err


def test_home_in_every_path_of_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    c = config()
    c.data.path = c.data.root = c.data.val = c.data.holdout = c.run.out = c.run.init = c.run.resume = "~/x"
    c.data.extra_val, c.capro.anchors = {"a": "~"}, "~/x"
    (tmp_path / "c.json").write_text(c.to_json())
    found = load(tmp_path / "c.json")
    d, r = found.data, found.run
    assert {d.path, d.root, d.val, d.holdout, r.out, r.init, r.resume, found.capro.anchors} == {"/home/me/x"}
    assert d.extra_val == {"a": "/home/me"}


@pytest.mark.parametrize("trace", ["checkpoints/", "log.jsonl", ".mopro_fast"])
def test_a_moved_run_goes_on_where_it_lies(trace, tmp_path, monkeypatch):
    run = tmp_path / "new"
    run.mkdir()
    c = config()
    c.run.out, c.run.resume = "old", "begun/with.pt"
    (run / "config.json").write_text(c.to_json())
    assert recipe(str(run / "config.json")) == c  # a copy that is in no run's folder
    (run / trace).mkdir() if trace.endswith("/") else (run / trace).touch()
    found = recipe(str(run / "config.json"))
    assert (found.run.out, found.run.resume) == (str(run), "begun/with.pt")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints/step_000000001.pt").touch()
    assert recipe(str(run / "config.json")).run.resume == "auto"
    monkeypatch.chdir(run)
    assert recipe("config.json").run.out == "."
    shutil.copy("config.json", "../copy.json")
    (tmp_path / "checkpoints").mkdir()  # of something else
    assert recipe("../copy.json") == c


@pytest.mark.parametrize(
    "made, command",
    [
        (Retrain(cleaned="new labels"), "mopro-fast retrain CKPT --cleaned 'new labels' --data DATA --out {} …"),
        (Finetune(), "mopro-fast finetune CKPT --data DATA --out {} …"),
    ],
)
def test_a_config_of_another_command_names_it(made, command, tmp_path):
    made.run.out = "old"
    (tmp_path / "config.json").write_text(made.to_json())
    for out in ("old", tmp_path):
        with pytest.raises(UserError) as caught:
            recipe(str(tmp_path / "config.json"))
        assert str(caught.value).endswith(command.format(out))
        (tmp_path / "log.jsonl").touch()


@pytest.mark.parametrize(
    "part, message",
    [
        ({"data": {"image_size": 16.5}}, "data.image_size must be a whole number, got 16.5"),
        ({"data": {"image_size": True}}, "data.image_size must be a whole number, got true"),
        ({"data": {"keep_classes": "2"}}, "data.keep_classes must be a whole number or null, got '2'"),
        ({"data": []}, r"data must be an object of settings, got \[\]"),
        ({"mopro": {"temperature": "hot"}}, "mopro.temperature must be a finite number, got 'hot'"),
        ([1], "its config is a list of 1"),
    ],
)
def test_the_config_in_a_checkpoint_is_checked(part, message, tmp_path, state_dict):
    torch.save({"model": state_dict, "config": json.dumps({"data": {"new": 1}})}, tmp_path / "newer.pt")
    assert load_weights(tmp_path / "newer.pt").config == {"data": {"new": 1}}
    torch.save({"model": state_dict, "config": json.dumps(part)}, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "wrong.pt")


@pytest.fixture(scope="module")
def state_dict():
    from mopro_fast.models.build import build

    c = config()
    c.model.width, c.model.embed_dim, c.mopro.queue_size = 1 / 64, 2, 64
    return build(c).state_dict()


def test_a_method_of_ones_own_may_have_settings_of_any_type():
    @dataclasses.dataclass
    class Own(Settings):
        sizes: list[int] | int = 1
        folds: typing.Literal[2, 3] = 2
        word: str = "x" * 999

    assert from_dict(Own, {"sizes": [1]}, "e.json").sizes == [1]
    assert refusal({"folds": 2.0}, Own) == "e.json: folds must be 2 or 3, got 2.0"
    assert refusal({"folds": True}, Own) == "e.json: folds must be 2 or 3, got true"
