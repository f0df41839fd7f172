"""Encoded images, odd and broken ones too: what each is worth to DALI, its pixels, and bytes that DALI decodes.

Pixels are Pillow's ``convert("RGB")`` of the upright image, as the official code sees them but for orientation:
alpha is dropped, not composited; a palette's transparent entries show their colour; CMYK is converted by Pillow's
formula, inverted first where Adobe wrote it so; ICC profiles are ignored; of several frames or images the first
counts. Differences: 16-bit grey is scaled to 8 bits (from 12 or 8 bits where it uses no more), where some Pillow
versions clip it to white; floats and 32-bit integers are scaled to 0 ... 255; an image of more than MOST_PIXELS is made
smaller by a whole number.
"""

import io
import math
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from mopro_fast.data.workers import Crashed, limited
from mopro_fast.files import read_regular

VERDICTS = ("ok", "converted", "tolerant", "unreadable")
OK, CONVERTED, TOLERANT, UNREADABLE = range(4)
CANNOT_READ = "cannot be read"  # kind of reason: the file, whatever is in it
MAX_PIXELS = 178_956_970  # where Pillow itself refuses an image as a decompression bomb
MOST_PIXELS = 1 << 22  # of a decoded image: a batch of 256 takes 3.2 GB at most
_MOST_MEMORY = 1 << 29  # bytes, while an image is decoded
_AT_ONCE = 1 << 25  # pixels of an image beside which no other such is decoded
_PLAIN_SCANS = 64  # of a JPEG that is OK; encoders write about 10
_MOST_WORK = 1 << 31  # pixels x scans of a JPEG: 10 seconds
_LONGEST_JPEG = 65_500  # pixels of a side that libjpeg writes
_STRIPE = 1 << 20  # pixels of a large image converted at once
MAX_BYTES = 1 << 29  # of a file; as many pixels, uncompressed

Image.init()
_FORMATS = [name for name in Image.ID if name not in ("EPS", "WMF")]  # these start other programs, or need Windows
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # bytes per value, by type
# DALI reads these other tags of the same block whatever their type and count, and gives up if they are not as here
# (0: any count): 2 is text, 3 16 bits, 5 a fraction.
_EXIF_TYPES = {0x10E: (2, 0), 0x10F: (2, 0), 0x110: (2, 0), 0x131: (2, 0), 0x132: (2, 0), 0x8298: (2, 0)}
_EXIF_TYPES |= {0x11A: (5, 1), 0x11B: (5, 1), 0x13E: (5, 2), 0x13F: (5, 6), 0x211: (5, 3), 0x214: (5, 6)}
_EXIF_TYPES |= {_ORIENTATION: (3, 1), 0x128: (3, 1), 0x213: (3, 1)}
_SUBSAMPLING = {(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2)}  # luma's factors that all of DALI's decoders know
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"gAMA", b"cHRM"}
_PNG_CHUNKS |= {b"sRGB", b"iCCP"}  # all others may change pixels: CONVERTED
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type

# Markers of a JPEG's segments.
_SOF0, _SOF2, _DHT, _SOS, _DQT, _DRI, _COM = 0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xDD, 0xFE
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_EOI = b"\xff\xd9"  # the end of an image
_KNOWN = {_SOF0, _SOF2, _DHT, _SOS, _DQT, _DRI, _COM, *range(_APP0, _APP0 + 16)}


# How files begin that are images whatever they are called; and, from byte 4, of ISO's base media files.
_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_STARTS += (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_BRANDS = (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypheix", b"ftypmif1")


class DecodeError(Exception):
    """Not even a tolerant reader gets an image out of these bytes; the message is the reason."""


class Examined(NamedTuple):
    """What :func:`examine` finds."""

    verdict: int
    """OK: DALI decodes the bytes as they are. CONVERTED: it needs clean(data). TOLERANT: so it does, and the file is
    truncated or damaged. UNREADABLE: DecodeError."""
    reason: str
    """"kind" or "kind: detail"; empty if OK."""
    format: str
    """Pillow's name of it; empty if unknown."""
    width: int
    """Of the upright image; 0 if unreadable."""
    height: int


def looks_like_image(start: bytes) -> bool:
    """Whether a file is an image by its first 32 bytes, whatever its name."""
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    bmp = start[:2] == b"BM" and start[6:10] == bytes(4)
    return webp or bmp or start.startswith(_STARTS) or start[4:].startswith(_BRANDS)


def examine(data: bytes) -> Examined:
    """Judge an encoded image. Never raises, whatever the bytes.

    OK is conservative: a plain JPEG, PNG, WebP or BMP of at most MOST_PIXELS whose structure was checked byte by byte
    and which is read completely without a warning.
    """
    return _looked_at(data)[0]


def _looked_at(data: bytes) -> tuple[Examined, Image.Image | None, bool]:
    """-> what examine() says; where that is CONVERTED or TOLERANT, the image in colour; whether it was made smaller."""
    odd, orientation = _odd(data)
    large = False
    try:
        with _truncation_allowed(False):
            image = _open(data)
            name, size, large = image.format or "", image.size, _factor(image) > 1
            if odd == "other format" or name not in _CHECKS:  # MPO begins as a JPEG
                odd = f"{name} file"
            if large:
                odd = f"large: {image.width}x{image.height} pixels"
            if name in ("JPEG", "MPO"):
                with _few_large(image):
                    _read_strictly(data, image)
            elif not odd:
                image.load()
            if not odd:
                seen = _orientation_of(image)  # in a PNG it may follow the pixels
                if seen == orientation:
                    return Examined(OK, "", name, *(size[::-1] if seen > 4 else size)), None, False
                odd = f"unusual {name}: orientation"  # from XMP, or in a PNG
            image = _rgb(image)
            return Examined(CONVERTED, odd, name, *image.size), image, large
    except Exception as error:
        strict = _say(error)
    try:
        with _truncation_allowed(True):
            image = _open(data)
            name, large = image.format or "", _factor(image) > 1
            image = _rgb(image)
            return Examined(TOLERANT, f"truncated or damaged: {strict}", name, *image.size), image, large
    except Exception as error:
        return Examined(UNREADABLE, _why_unreadable(data, error), "", 0, 0), None, False


def examine_files(root: str, paths: list[str]) -> Iterator[tuple]:
    """File by file: path, width, height, format, verdict's name, reason; bytes, time of change in ns and crc32 (-1:
    none)."""
    for path in paths:
        size = mtime = crc = -1
        found = Examined(UNREADABLE, "", "", 0, 0)
        try:
            with limited():
                data, status = read_regular(os.path.join(root, path), MAX_BYTES)
                size, mtime, crc = status.st_size, status.st_mtime_ns, zlib.crc32(data)
                found = examine(data)
        except OSError as error:
            found = found._replace(reason=f"{CANNOT_READ}: {error.strerror}")
        yield path, found.width, found.height, found.format, VERDICTS[found.verdict], found.reason, size, mtime, crc


def crash_reason(crash: Crashed) -> str:
    """Why an image is left out whose reader has ended; one that only computed too long is not tried again."""
    if crash.has_computed:
        return f"broken: {crash.why}"
    return f"{CANNOT_READ}: {crash.why if crash.has_waited else f'it ends the process that tries ({crash.why})'}"


def decode(data: bytes, shorter_side: int | None = None) -> np.ndarray:
    """-> uint8 [H, W, 3], RGB, upright; truncated and damaged files as far as they go. Raises DecodeError.

    shorter_side: enough for the caller. A JPEG of more than three times as much is decoded at 1/2, 1/4 or 1/8.
    """
    for tolerant in (False, True):  # not only the latter: there are PNGs that Pillow reads strictly alone
        try:
            with _truncation_allowed(tolerant):
                return np.asarray(_rgb(_open(data), shorter_side))
        except Exception as error:
            last = error
    raise DecodeError(_why_unreadable(data, last)) from None


def clean(data: bytes) -> bytes:
    """Bytes that DALI decodes to ``decode(data)``, which may be ``data``. Raises DecodeError.

    A JPEG with nothing but an unusual header gets a plain one; everything else becomes a PNG, but for large images:
    these become a JPEG of quality 95.
    """
    found, cleaned = judged(data)
    if found.verdict == UNREADABLE:
        raise DecodeError(found.reason)
    return cleaned or data


def encode(image: Image.Image, **jpeg: int) -> bytes:
    """As a JPEG with these options; as a PNG without any, or where a side is too long for a JPEG."""
    file = io.BytesIO()
    if jpeg and max(image.size) <= _LONGEST_JPEG:
        image.save(file, "JPEG", **jpeg)
    else:
        image.save(file, "PNG", compress_level=1)  # 3 times as fast as the default, 1/10 larger
    return file.getvalue()


def judged(data: bytes, trusted: bool = True) -> tuple[Examined, bytes | None]:
    """What examine() says, and what clean() gives where that is something else than ``data``.

    trusted: False where DALI has refused ``data``: then it is encoded anew, even if it is OK.
    """
    found, image, large = _looked_at(data)
    if found.verdict == UNREADABLE or (found.verdict == OK and trusted):
        return found, None
    try:
        pixels = decode(data) if image is None else np.asarray(image)
    except DecodeError as error:  # for lack of memory
        return Examined(UNREADABLE, str(error), "", 0, 0), None
    if large:
        return found, encode(Image.fromarray(pixels), quality=95, subsampling=0)
    plain = _with_plain_header(data) if trusted else None
    if plain is not None and examine(plain).verdict == OK and np.array_equal(decode(plain), pixels):
        return found, plain
    return found, encode(Image.fromarray(pixels))


def is_stored_upright(data: bytes) -> bool:
    """Of bytes that are OK: no EXIF orientation."""
    return _odd(data)[1] == 1


def suffix(data: bytes) -> str:
    """File name's suffix for bytes that are OK or come from clean()."""
    for start, name in ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp")):
        if data.startswith(start):
            return name
    return ".bmp"


# Pillow's strict and tolerant modes are one global of its own. Any thread may run here, with any others using
# Pillow: so the global becomes an object that is true or false for each thread by itself.

_thread = threading.local()


class _PerThread:
    def __init__(self, otherwise: bool) -> None:
        self._otherwise = otherwise

    def __bool__(self) -> bool:
        return getattr(_thread, "allowed", self._otherwise)


@contextmanager
def _truncation_allowed(allowed: bool) -> Iterator[None]:
    """Set ImageFile.LOAD_TRUNCATED_IMAGES for this thread; for all others it keeps its value."""
    current = ImageFile.LOAD_TRUNCATED_IMAGES
    if not isinstance(current, _PerThread):
        ImageFile.LOAD_TRUNCATED_IMAGES = _PerThread(bool(current))
    _thread.allowed = allowed
    try:
        yield
    finally:
        del _thread.allowed


def _open(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    size = f"{image.width}x{image.height} pixels"
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(f"too large: {size}, at most {MAX_PIXELS} in all are decoded")
    if (needed := _memory(image)) > _MOST_MEMORY:
        raise DecodeError(f"too large: {size} take {needed >> 20} MB, at most {_MOST_MEMORY >> 20} are used to decode")
    if image.format in ("JPEG", "MPO") and (scans := _scans(data)) * image.width * image.height > _MOST_WORK:
        raise DecodeError(f"too large: {scans} scans of {size}, at most {_MOST_WORK} pixels in all scans are decoded")
    return image


def _memory(image: Image.Image) -> int:
    """Bytes that decoding takes. A JPEG's large images are made smaller row by row, but all scans are kept."""
    pixels, channels = image.width * image.height, len(image.getbands())
    if image.format in ("JPEG", "MPO"):
        return 2 * pixels * channels if "progressive" in image.info else 0
    return pixels * (4 if channels > 1 or image.mode in ("I", "F") else 2 if image.mode.startswith("I;16") else 1)


def _scans(data: bytes) -> int:
    """Of a JPEG's first image."""
    try:
        *_, (_, _, _, first) = _segments(data)
    except Exception:  # Pillow forgives more
        return data.count(b"\xff\xda")
    end = data.find(_EOI, first)
    return 1 + data.count(b"\xff\xda", first, end if end >= 0 else len(data))


def _read_strictly(data: bytes, image: Image.Image) -> None:
    """Raise a ValueError where libjpeg warns of a JPEG, which Pillow does not tell: data that end early, for one.

    All bits are read, but a 64th of the pixels made. Of the header only what decides the pixels counts.
    """
    import simplejpeg  # here, so that a GPU that is there for minutes can time steps without it

    colours = {"L": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB")
    small = {"colorspace": colours, "min_height": 1, "min_width": 1}
    plain = _pixels_alone(data, []) or data
    try:
        simplejpeg.decode_jpeg(plain, **small)
    except ValueError as error:
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
        simplejpeg.decode_jpeg(plain[:-2].rstrip(b"\0") + _EOI, **small)  # zeros fill up what follows the pixels


_large = threading.Lock()


def _few_large(image: Image.Image) -> AbstractContextManager[object]:
    """While an image is decoded: one at a time if it is large, which bounds the memory of all threads."""
    return _large if image.width * image.height > _AT_ONCE else nullcontext()


def _factor(image: Image.Image) -> int:
    """By which width and height are divided so that MOST_PIXELS are left, or more of an image of a few rows."""
    return math.ceil(math.sqrt(image.width * image.height / MOST_PIXELS))


def _rgb(image: Image.Image, shorter_side: int | None = None) -> Image.Image:
    """Load, make smaller, convert, turn upright. shorter_side: see decode()."""
    with _few_large(image):
        whole, factor = image.size, _factor(image)
        by_libjpeg = math.gcd(factor, 8)
        wanted = tuple(min(max(1, n // by_libjpeg), 3 * (shorter_side or n)) for n in whole)
        if wanted != whole:
            image.draft(None, wanted)
        image.load()
        orientation = _orientation_of(image)
        factor = math.ceil(factor / round(max(whole) / max(image.size)))
        image = _in_colour(image, _range(image)) if factor == 1 else _reduced(image, factor)
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """A 1 / factor of the size, in stripes: a copy of all of it would double the memory."""
    low_high = _range(image)
    width, height = image.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    step = factor * max(1, _STRIPE // (width * factor))
    for top in range(0, height, step):
        stripe = image.crop((0, top, width, min(top + step, height)))
        small.paste(_in_colour(stripe, low_high).reduce(factor), (0, top // factor))
    return small


def _range(image: Image.Image) -> tuple[float, float] | None:
    """What becomes black and white of an image of numbers that are not 8 bits; None of others."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PNG")
    if not is_16_bit and image.mode not in ("I", "F"):
        return None
    low, high = image.getextrema()
    if is_16_bit:
        return 0, next(most for most in (255, 4095, 65535) if high <= most)  # cameras write 12 bits into 16
    usual = next((most for most in (1, 255) if most / 255 <= high <= most), None)
    return (0, usual) if low >= 0 and usual else (low, high)


def _in_colour(image: Image.Image, low_high: tuple[float, float] | None) -> Image.Image:
    if low_high is not None:
        low, high = low_high
        if not np.isfinite(numbers := np.asarray(image)).all():
            raise DecodeError("no picture: some of its numbers are not finite")
        numbers = (numbers - np.float64(low)) * (255 / (high - low or 1))
        image = Image.fromarray(np.clip(numbers + 0.5, 0, 255).astype(np.uint8))
    return image.convert("RGB")


def _orientation_of(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)  # also from XMP
    except Exception:  # Pillow raises many kinds for a broken block
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _say(error: Exception) -> str:
    return (str(error) or type(error).__name__).partition("\n")[0]


def _why_unreadable(data: bytes, error: Exception) -> str:
    if not data:
        return "empty file"
    if isinstance(error, MemoryError):
        return f"{CANNOT_READ}: not enough memory"
    if isinstance(error, Image.UnidentifiedImageError) and looks_like_image(data[:32]):
        return "broken: it only begins as an image"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image: it begins with {data[:12]!r}"
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {_say(error)}"
    return _say(error) if isinstance(error, DecodeError) else f"broken: {_say(error)}"


# The checks behind OK. Each returns why DALI might not see what Pillow sees ("" if it does) and the EXIF
# orientation that DALI applies; they raise IndexError and others where the structure is broken.


def _odd(data: bytes) -> tuple[str, int]:
    for name, (start, check) in _CHECKS.items():
        if data.startswith(start):
            try:
                odd, orientation = check(data)
                return (f"unusual {name}: {odd}" if odd else ""), orientation
            except Exception:
                return f"unusual {name}: broken structure", 1
    return "other format", 1


def _jpeg(data: bytes) -> tuple[str, int]:
    frames, exif, jfif, adobe = [], [], False, None
    for marker, payload, junk, _ in _segments(data):
        if junk:
            return "bytes between the segments", 1
        if marker not in _KNOWN:
            return f"segment {marker:#x}", 1
        if marker in (_SOF0, _SOF2):
            frames.append(payload)
        elif marker == _APP0:
            jfif |= payload.startswith(b"JFIF\0")
        elif marker == _APP1 and payload.startswith(b"Exif\0\0"):
            exif.append(payload[6:])
        elif marker == _APP14 and payload.startswith(b"Adobe"):
            adobe = payload[11]
        elif marker == _DQT and payload[0] >> 4:
            return "16-bit quantisation", 1
    if len(frames) != 1 or len(exif) > 1:
        return "not one frame and at most one EXIF block", 1
    if (scans := _scans(data)) > _PLAIN_SCANS:
        return f"{scans} scans", 1
    precision, _, _, components = struct.unpack_from(">BHHB", frames[0])
    table = struct.unpack(f">{3 * components}B", frames[0][6:])
    ids, factors = table[::3], [(f >> 4, f & 15) for f in table[1::3]]
    if precision != 8 or components not in (1, 3):
        return "CMYK" if components == 4 else f"{components} channels of {precision} bits", 1
    if components == 3 and (ids != (1, 2, 3) or adobe not in (None, 1)):
        return "colours other than YCbCr", 1
    if factors[0] not in _SUBSAMPLING or any(f != (1, 1) for f in factors[1:]):
        return "subsampling", 1
    orientation = _exif_orientation(exif[0]) if exif else 1
    return ("EXIF", 1) if orientation is None else ("", orientation)


def _segments(data: bytes) -> Iterator[tuple[int, bytes, bool, int]]:
    """A JPEG's segments up to its first SOS, as libjpeg finds them: (marker, payload, whether other bytes precede it,
    offset of what follows it)."""
    at = 2
    while True:
        begin = at
        while True:
            at = data.index(b"\xff", at)
            while data[at] == 0xFF:
                at += 1
            if data[at]:
                break
        marker, junk = data[at], at != begin + 1
        (length,) = struct.unpack_from(">H", data, at + 1)
        if length < 2 or at + 1 + length > len(data) or 0xD0 <= marker <= 0xD9:
            raise ValueError("broken segment")
        payload = data[at + 3 : at + 1 + length]
        at += 1 + length
        yield marker, payload, junk, at
        if marker == _SOS:
            return


def _exif_orientation(tiff: bytes) -> int | None:
    """1 ... 8 of a well-formed EXIF block, 1 if it has none; None where readers might differ."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (entries,) = struct.unpack_from(order + "H", tiff, at)
    found = []
    for i in range(entries):
        tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * i)
        known_kind, known_count = _EXIF_TYPES.get(tag, (kind, count))
        length = count * _TIFF_SIZES[kind]  # IndexError: not a type
        if kind != known_kind or count != (known_count or count):
            return None
        if length > 4 and struct.unpack_from(order + "I", tiff, at + 10 + 12 * i)[0] + length > len(tiff):
            return None
        if tag == _ORIENTATION:
            found.append(value if 1 <= value <= 8 else None)
    return found[0] if len(found) == 1 else None if found else 1


def _png(data: bytes) -> tuple[str, int]:
    at, kinds, pixels = 8, [], []
    while at < len(data) and kinds[-1:] != [b"IEND"]:
        length, kind = struct.unpack_from(">I4s", data, at)
        payload = data[at + 8 : at + 8 + length]
        if zlib.crc32(kind + payload) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            return "wrong checksum", 1
        if kind not in _PNG_CHUNKS:
            return f"chunk {kind.decode('latin-1')!r}", 1
        kinds.append(kind)
        if kind == b"IDAT":
            pixels.append(payload)
        at += 12 + length
    width, height, depth, colour, *methods, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if kinds[0] != b"IHDR" or kinds[-1] != b"IEND" or kinds.count(b"PLTE") != (colour == 3) or any(methods):
        return "chunks", 1
    if depth != 8 or interlaced:
        return "interlaced" if interlaced else f"{depth} bits per channel", 1
    length = height * (1 + width * _PNG_CHANNELS[colour])
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(b"".join(pixels), length + 1) if length < 4 * MAX_PIXELS else b""
    complete = len(unpacked) == length and unpacker.eof and not unpacker.unused_data
    return "" if complete else "pixel data", 1


def _webp(data: bytes) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", data, 4)
    plain = data[8:16] in (b"WEBPVP8 ", b"WEBPVP8L") and length == len(data) - 8
    return "" if plain else "container", 1


def _bmp(data: bytes) -> tuple[str, int]:
    header, width, height, planes, bits, compression = struct.unpack_from("<IiiHHI", data, 14)
    plain = (header, planes, bits, compression) == (40, 1, 24, 0) and width > 0 and height > 0
    return "" if plain else "kind of BMP", 1


_CHECKS = {
    "JPEG": (b"\xff\xd8", _jpeg),
    "PNG": (b"\x89PNG\r\n\x1a\n", _png),
    "WEBP": (b"RIFF", _webp),
    "BMP": (b"BM", _bmp),
}


def _with_plain_header(data: bytes) -> bytes | None:
    """A JPEG's first image with only those segments that decide its pixels; None where that fails."""
    try:
        with _truncation_allowed(True):
            orientation = _orientation_of(_open(data))
    except Exception:
        return None
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, _ORIENTATION, 3, 1, orientation, 0, 0)
    return _pixels_alone(data, [_segment(_APP1, b"Exif\0\0" + tiff)] if orientation != 1 else [])


def _pixels_alone(data: bytes, before: list[bytes]) -> bytes | None:
    """The same, with the segments ``before`` in front of the others."""
    try:
        parts, segments = [b"\xff\xd8", *before], list(_segments(data))
        for marker, payload, _, _ in segments:
            if marker not in range(_APP0, _APP0 + 16) or payload.startswith((b"JFIF\0", b"Adobe")):
                parts.append(_segment(marker, payload))
        start = segments[-1][3]
        parts.append(data[start : data.index(_EOI, start) + 2])
    except Exception:
        return None
    return b"".join(parts)


def _segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(payload)) + payload
