"""Odd and broken image files, made on the spot, and shared's decode-cases where they are."""

import dataclasses
import io
import os
import struct
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mopro_fast.data import decode
from mopro_fast.data.decode import CONVERTED, OK, TOLERANT, UNREADABLE

SHARED = Path(os.environ.get("MOPRO_FAST_SHARED") or Path(__file__).parents[1].parent / "shared")
HEIGHT, WIDTH = 60, 80


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """uint8 [H, W, 3]: smooth colours without symmetry, and some noise."""
    y, x = np.mgrid[0 : 1 : 1j * height, 0 : 1 : 1j * width]
    noise = np.random.default_rng(seed).integers(0, 8, (height, width, 3))
    return (np.stack([230 * x, 200 * y, 120 * x * y + 60 * (x > 0.7)], axis=2) + noise).astype(np.uint8)


def encoded(image, kind="JPEG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation, pixels=None):
    """A JPEG that is ``pixels`` once its EXIF orientation is applied."""
    pixels = picture() if pixels is None else pixels
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p),
        7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda p: np.rot90(p, 3),
    }[orientation](pixels)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.ascontiguousarray(stored), quality=95, exif=exif)


def with_segment(jpeg, marker, payload):
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def png_header(width, height, colour=0):
    """All that is needed to claim a size."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    idat = b"IDAT" + bytes(9)
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (ihdr, idat, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def odd_images():
    """name: (bytes, verdict)."""
    rgb = Image.fromarray(picture())
    jpeg = encoded(rgb, quality=90)
    gray = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(gray)
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    png = encoded(rgb, "PNG")
    at = png.index(b"IDAT")
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    # Orientation 6 and then, where readers expect a fraction, a resolution of 16 bits.
    entries = struct.pack(">HHIHHHHIHH", 0x112, 3, 1, 6, 0, 0x11A, 3, 1, 72, 0xFFFF)
    short_resolution = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + entries + bytes(4)
    frames = [gray.convert("P"), gray.rotate(180).convert("P")]
    return {
        "plain.jpg": (jpeg, OK),
        "progressive.jpg": (encoded(rgb, progressive=True), OK),
        "gray.jpg": (encoded(gray), OK),
        "444.jpg": (encoded(rgb, subsampling=0), OK),
        "restart.jpg": (encoded(rgb, restart_marker_rows=1), OK),
        "trailing.jpg": (jpeg + b"more" * 9, OK),
        "icc.jpg": (encoded(rgb, icc_profile=b"x" * 300), OK),
        "onepixel.jpg": (encoded(picture(1, 1)), OK),
        "tall.jpg": (encoded(picture(300, 2)), OK),
        **{f"orientation{i}.jpg": (oriented(i), OK) for i in range(1, 9)},
        "rgb.png": (png, OK),
        "png.jpg": (png, OK),
        "gray.png": (encoded(gray, "PNG"), OK),
        "rgba.png": (encoded(rgba, "PNG"), OK),
        "la.png": (encoded(rgba.convert("LA"), "PNG"), OK),
        "palette.png": (encoded(rgb.quantize(200), "PNG"), OK),
        "lossy.webp": (encoded(rgb, "WEBP"), OK),
        "lossless.webp": (encoded(rgb, "WEBP", lossless=True), OK),
        "plain.bmp": (encoded(rgb, "BMP"), OK),
        "cmyk.jpg": (encoded(rgb.convert("CMYK")), CONVERTED),
        "rgb.jpg": (encoded(rgb, keep_rgb=True), CONVERTED),
        "junk.jpg": (jpeg[:20] + b"\0\0\0" + jpeg[20:], CONVERTED),
        "bad_exif.jpg": (with_segment(jpeg, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12"), CONVERTED),
        "exif_type.jpg": (with_segment(jpeg, 0xE1, short_resolution), CONVERTED),
        "adobe.jpg": (with_segment(jpeg, 0xEE, b"Adobe\0\x64\0\0\0\0\0"), CONVERTED),
        "colour8.png": (png_header(9, 9, colour=8), UNREADABLE),
        "xmp.jpg": (with_segment(jpeg, 0xE1, xmp), CONVERTED),
        "16bit.png": (encoded(sixteen, "PNG"), CONVERTED),
        "1bit.png": (encoded(gray.convert("1"), "PNG"), CONVERTED),
        "transparent.png": (encoded(rgb.quantize(200), "PNG", transparency=3), CONVERTED),
        "16bit.tif": (encoded(sixteen, "TIFF"), CONVERTED),
        "rgb.tif": (encoded(rgb, "TIFF"), CONVERTED),
        "frames.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), CONVERTED),
        "frames.webp": (encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]), CONVERTED),
        "two_mpo.jpg": (encoded(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]), CONVERTED),
        "checksum.png": (png[: at + 30] + bytes([png[at + 30] ^ 1]) + png[at + 31 :], TOLERANT),
        "cut.png": (png[: len(png) // 2], TOLERANT),
        "cut.jpg": (jpeg[: len(jpeg) * 6 // 10], TOLERANT),
        "no_end.jpg": (jpeg[:-40], TOLERANT),
        "empty.jpg": (b"", UNREADABLE),
        "header.jpg": (jpeg[:100], UNREADABLE),
        "page.jpg": (b"<!DOCTYPE html><html></html>" * 9, UNREADABLE),
        "text.jpg": (b"\xff\xd8\xff\xe0 not an image", UNREADABLE),
        "leading.jpg": (b"\r\n\r\n" + jpeg, UNREADABLE),
        "bomb.png": (png_header(30_000, 30_000), UNREADABLE),
    }


def decode_cases(folder):
    """Unpack shared's decode-cases there; -> the 133 files. Skips the test where they are not."""
    archive = SHARED / "data/decode-cases/decode_cases.tar"
    if not archive.is_file():
        pytest.skip(f"no {archive}: set MOPRO_FAST_SHARED to the folder that holds data/decode-cases")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return sorted(p for p in folder.rglob("*") if p.is_file())


def examined(index):
    """The index with what a check finds."""
    pytest.importorskip("simplejpeg")
    data = [index.read(i) for i in range(len(index))]
    found = [decode.examine(d) for d in data]
    columns = {name: np.array([getattr(f, name) for f in found]) for name in ("verdict", "width", "height")}
    columns |= {"size": np.array(list(map(len, data))), "crc32": np.array(list(map(zlib.crc32, data)))}
    return dataclasses.replace(index, checked=SimpleNamespace(why=lambda row: found[row].reason, **columns))
