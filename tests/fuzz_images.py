"""Encoded images with every kind of damage that storage, downloads and strangers do to them."""

import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from odd_images import encoded, oriented, picture
from PIL import Image

_MARKERS = (0xC0, 0xC2, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE)
_BYTES = (0, 1, 2, 3, 8, 0x11, 0x22, 0x7F, 0x80, 255)
_SIDES = (0, 1, 7, 60, 255, 4000, 13_000, 65_535)
_BLOCK = 512  # of a disk


def sources(rng: random.Random, side: int = 96) -> list[bytes]:
    """Whole images of every format and kind that people have."""
    rgb = Image.fromarray(picture(side - 16, side, rng.randrange(1000)))
    grey = rgb.convert("L")
    jpegs = [{"quality": q, "subsampling": s, "progressive": p} for q in (30, 90) for s in (0, 1, 2) for p in (0, 1)]
    jpegs += [{"restart_marker_rows": 1}, {"optimize": True}, {"qtables": "web_high"}]
    made = [encoded(rgb, **options) for options in jpegs]
    made += [encoded(grey), encoded(grey, progressive=True), encoded(rgb.convert("CMYK")), oriented(6), oriented(3)]
    made += [encoded(i, "PNG") for i in (rgb, grey, rgb.convert("P"), rgb.convert("RGBA"), grey.convert("1"))]
    made += [encoded(np.asarray(grey).astype(np.uint16) * 257, "PNG"), encoded(rgb, "PNG", compress_level=0)]
    made += [encoded(rgb, "WEBP"), encoded(rgb, "WEBP", lossless=True), encoded(rgb.convert("RGBA"), "WEBP")]
    made += [encoded(rgb, "BMP"), encoded(rgb.convert("P"), "BMP"), encoded(rgb, "GIF"), encoded(rgb, "TIFF")]
    made += [encoded(rgb, "TIFF", compression=c) for c in ("jpeg", "tiff_lzw", "tiff_deflate", "group4")[:3]]
    made += [encoded(np.asarray(grey).astype(np.float32) / 255, "TIFF"), encoded(rgb, "PPM"), encoded(rgb, "TGA")]
    return made


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Damaged in one to three ways. other: another file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(data) > 64:
            data = bytes(rng.choice(MUTATIONS)(rng, bytearray(data), other))
    return data


def replaced(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Something else of the same size: zeros, text, half of the file, or one with damage."""
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(len(data))
    if kind == 1:
        return (b"<!DOCTYPE html><title>404 Not Found</title>\n" * (len(data) // 40 + 1))[: len(data)]
    new = data[: len(data) // 2] if kind == 2 else mutated(rng, data, other)
    return new[: len(data)].ljust(len(data), b"\0")


def _bits(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    for _ in range(rng.choice((1, 1, 4, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def _header(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(2, min(len(data), 700))] = rng.choice((*_BYTES, rng.randrange(256)))
    return data


def _cut(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    return data[: rng.randrange(1, len(data))] + rng.choice((b"", b"", b"\xff\xd9"))


def _insert(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    at = rng.randrange(2, len(data))
    data[at:at] = rng.randbytes(rng.randint(1, 9))
    return data


def _remove(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, 40)]
    return data


def _disk(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    """Blocks of zeros, or of another file."""
    at = rng.randrange(0, len(data), _BLOCK)
    data[at : at + _BLOCK] = rng.choice((bytes(_BLOCK), other[at : at + _BLOCK]))
    return data


def _repeat(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    at, end = sorted(rng.sample(range(len(data)), 2))
    data[at:at] = data[at:end] * rng.randint(1, 3)
    return data


def _joined(rng: random.Random, data: bytearray, other: bytes) -> bytearray:
    return data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]


def _marker(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    """A JPEG's marker where none belongs, or another one in the place of one."""
    found = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] not in (0, 0xFF)]
    at = rng.choice(found) if found and rng.random() < 0.6 else rng.randrange(len(data) - 1)
    data[at : at + 2] = bytes((0xFF, rng.choice(_MARKERS)))
    return data


def _sides(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    """Other sides, with right checksums: what is claimed is not there."""
    height, width = rng.choice(_SIDES), rng.choice(_SIDES)
    if data[:4] == b"\x89PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for frame in (b"\xff\xc0", b"\xff\xc2"):
        if data[:2] == b"\xff\xd8" and (at := data.find(frame)) > 0:
            data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return data


def _checksums(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    """A byte of a PNG's chunk, its checksum made right."""
    if data[:4] != b"\x89PNG":
        return _bits(rng, data, b"")
    at, chunks = 8, []
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        chunks.append((at + 4, at + 8 + length))
        at += 12 + length
    begin, end = rng.choice(chunks) if chunks else (8, 8)
    if end + 4 <= len(data) and end > begin:
        data[rng.randrange(begin, end)] = rng.randrange(256)
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[begin:end]))
    return data


def _scans(rng: random.Random, data: bytearray, _: bytes) -> bytearray:
    """A JPEG's last scan again and again."""
    at = data.rfind(b"\xff\xda")
    return data[:at] + data[at:-2] * rng.choice((2, 40, 300)) + data[-2:] if at > 0 else data


MUTATIONS: tuple[Callable[[random.Random, bytearray, bytes], bytearray], ...]
MUTATIONS = (_bits, _header, _cut, _insert, _remove, _disk, _repeat, _joined, _marker, _sides, _checksums, _scans)
