"""Vectors of texts without a model: the words they share, rare words counting most. Nothing is downloaded."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_matrix

WIDTH = 384
_EACH = 4  # numbers of the vector that a word adds to
_BETWEEN = r"[^\pL\pM\pN]+"  # what parts words


class Hashing:
    """Term frequency times inverse document frequency, ln((1 + N)/(1 + N_word)) + 1, as float32 [WIDTH], unit length.

    A word adds ±1 to four numbers that its blake2b digest chooses. A text without words is 0.
    """

    identity = f"words hashed to {WIDTH} numbers, version 2"

    def __init__(self, texts: pa.ChunkedArray) -> None:
        """texts: strings [N], all that will be encoded; words are runs of letters and digits, in lower case and NFC."""
        texts = pc.utf8_normalize(pc.utf8_lower(texts.combine_chunks().cast(pa.large_string())), "NFC")
        words = pc.split_pattern_regex(texts, _BETWEEN)
        flat = pc.list_flatten(words).dictionary_encode()
        self._rows, known = len(texts), flat.dictionary
        code = flat.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        row = pc.list_parent_indices(words).to_numpy(zero_copy_only=False)
        full = np.array([word != "" for word in known.to_pylist()], bool)
        code, row = code[full[code]], row[full[code]]
        pairs, count = np.unique(row * len(known) + code, return_counts=True)
        row, code = np.divmod(pairs, max(len(known), 1))
        idf = np.log((1 + self._rows) / (1 + np.bincount(code, minlength=len(known)))) + 1
        self._texts = csr_matrix((count * idf[code], (row, code)), (self._rows, len(known)))
        digests = [hashlib.blake2b(word.encode(), digest_size=4 * _EACH).digest() for word in known.to_pylist()]
        drawn = np.frombuffer(b"".join(digests), "<u4").reshape(-1, _EACH)
        at = (np.arange(len(known)).repeat(_EACH), (drawn >> 1).ravel() % WIDTH)
        self._words = csr_matrix(((drawn & 1).ravel() * 2.0 - 1, at), (len(known), WIDTH))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), WIDTH] of these texts."""
        found = np.asarray((self._texts[rows] @ self._words).todense())
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        return np.divide(found, norms, where=norms > 0, out=np.zeros_like(found)).astype(np.float32)
