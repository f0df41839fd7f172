"""Verdicts are conservative: whatever is OK, DALI decodes to Pillow's pixels, and so it does all that clean() gives."""

import random
import threading

import numpy as np
import pytest
from odd_images import decode_cases, encoded, odd_images, oriented, picture, with_segment
from PIL import Image, ImageFile

from mopro_fast.data import decode as module
from mopro_fast.data.decode import (
    CONVERTED,
    OK,
    TOLERANT,
    UNREADABLE,
    VERDICTS,
    DecodeError,
    clean,
    decode,
    examine,
    suffix,
)

ODD = odd_images()


def dali(files):
    """[H, W, 3] and (H, W, C) as peeked at, of each encoded image, by one CPU pipeline."""
    dali = pytest.importorskip("nvidia.dali")
    pipeline = dali.Pipeline(batch_size=len(files), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        data = dali.fn.external_source(name="data")
        images = dali.fn.decoders.image(data, device="cpu", output_type=dali.types.RGB)
        pipeline.set_outputs(images, dali.fn.peek_image_shape(data))
    pipeline.build()
    pipeline.feed_input("data", [np.frombuffer(file, np.uint8) for file in files])
    images, shapes = pipeline.run()
    return [(np.array(images[i]), tuple(np.array(shapes[i]))) for i in range(len(files))]


def check_against_dali(named):
    """OK files as they are, the others cleaned; -> how many of each verdict."""
    counts = dict.fromkeys(VERDICTS, 0)
    names, files, expected, large = [], [], [], set()
    for name, data in named:
        found = examine(data)
        counts[VERDICTS[found.verdict]] += 1
        assert (found.reason == "") == (found.verdict == OK), name
        if found.verdict == UNREADABLE:
            assert found[2:] == ("", 0, 0), name
            for function in (decode, clean):
                with pytest.raises(DecodeError):
                    function(data)
            continue
        pixels = decode(data)
        assert pixels.dtype == np.uint8 and pixels.shape == (found.height, found.width, 3), name
        if module._factor(module._open(data)) > 1:
            large.add(name)
        cleaned = clean(data)
        assert examine(cleaned).verdict == OK and (found.verdict != OK or cleaned is data), name
        names, files, expected = [*names, name], [*files, cleaned], [*expected, pixels]
    for name, (got, peeked), pixels in zip(names, dali(files), expected, strict=True):
        assert got.shape == pixels.shape == peeked, name
        assert near(got, pixels, 1) if name in large else abs(got.astype(int) - pixels).max() <= 1, name
    return counts


def near(a, b, mean=2.0):
    return a.shape == b.shape and abs(a.astype(int) - b).mean() < mean


@pytest.mark.parametrize("name", ODD)
def test_verdicts(name):
    data, verdict = ODD[name]
    found = examine(data)
    assert VERDICTS[found.verdict] == VERDICTS[verdict], found
    assert "\n" not in found.reason and len(found.reason) < 200


def test_dali_sees_what_pillow_sees():
    check_against_dali([(name, data) for name, (data, _) in ODD.items()])


@pytest.mark.medium
def test_all_decode_cases(tmp_path):
    files = decode_cases(tmp_path)
    counts = check_against_dali([(file.name, file.read_bytes()) for file in files])
    assert len(files) == 133 and sum(counts.values()) == 133
    assert counts == {"ok": 98, "converted": 21, "tolerant": 7, "unreadable": 7}
    with (tmp_path / "odd/exif_orientation_1.jpg").open("rb") as file:
        upright = decode(file.read())
    for i in range(2, 9):
        assert near(decode((tmp_path / f"odd/exif_orientation_{i}.jpg").read_bytes()), upright, mean=4), i
    gray = decode((tmp_path / "odd/gray.jpg").read_bytes()).astype(float)
    for name in ("png_16bit_gray.png", "png_la.png"):  # the same photograph
        pixels = decode((tmp_path / "odd" / name).read_bytes()).astype(float)
        assert abs(pixels.mean() - gray.mean()) < 2 and abs(pixels.std() - gray.std()) < 3, name


def test_pixels_of_odd_formats():
    rgb = picture()
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    for name, (data, verdict) in ODD.items():
        if verdict in (OK, CONVERTED) and name not in (
            "onepixel.jpg",
            "tall.jpg",
            "xmp.jpg",
            "exif_type.jpg",
            "1bit.png",
        ):
            is_gray = "gray" in name or "16bit" in name or name in ("la.png", "frames.gif")
            expected = np.repeat(gray[:, :, None], 3, axis=2) if is_gray else rgb
            assert near(decode(data), expected, mean=8 if "palette" in name or "transp" in name else 3), name
    for name in ("xmp.jpg", "exif_type.jpg"):
        assert near(decode(ODD[name][0]), np.rot90(rgb, 3), mean=3)


def test_16_bits_are_scaled_not_clipped():
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    expected = (values / 257).round().astype(int)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(values), kind))
        assert abs(pixels.astype(int) - expected[:, :, None]).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation):
    assert near(decode(oriented(orientation)), picture(), mean=2.5)
    found = examine(oriented(orientation))
    assert (found.verdict, found.width, found.height) == (OK, 80, 60)


def test_a_header_is_cleaned_without_loss():
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\4\0\0\0\1\0\0\0\6\0\0\0\0"  # orientation 6 as a long: DALI ignores it
    odd = with_segment(encoded(picture()), 0xE1, exif)
    assert examine(odd).verdict == CONVERTED and suffix(clean(odd)) == ".jpg"
    assert near(decode(odd), np.rot90(picture(), 3), mean=3)
    for name in ("junk.jpg", "bad_exif.jpg", "xmp.jpg", "two_mpo.jpg"):
        assert suffix(clean(ODD[name][0])) == ".jpg", name
    assert suffix(clean(ODD["cut.jpg"][0])) == suffix(clean(ODD["cmyk.jpg"][0])) == ".png"


def test_large_jpegs_are_decoded_small():
    large = encoded(picture(900, 1300), quality=95)
    assert decode(large, 100).shape == (450, 650, 3)  # at least 3 times 100 px
    assert decode(large, 400).shape == (900, 1300, 3)
    expected = Image.fromarray(picture(900, 1300)).resize((650, 450), Image.Resampling.BOX)
    assert near(decode(large, 100), np.asarray(expected))


def test_sizes_beyond_the_limit_are_named(monkeypatch):
    assert "too large" in examine(ODD["bomb.png"][0]).reason
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    found = examine(ODD["plain.jpg"][0])
    assert found.verdict == UNREADABLE and found.reason.startswith("too large: 80x60 pixels, at most 1000 ")


def damaged(rng, data):
    data = bytearray(data)
    kind = rng.choice(("bytes", "header", "cut", "insert", "end"))
    if kind in ("bytes", "header"):
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(2, min(len(data), 700 if kind == "header" else len(data)))
            data[at] = rng.choice((0, 1, 2, 3, 8, 0x11, 0x22, 255, rng.randrange(256)))
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "insert":
        at = rng.randrange(2, len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 5))
    else:
        data[rng.randrange(len(data) // 2, len(data)) :] = b"\xff\xd9"
    return bytes(data)


def test_damaged_at_random():
    """Nothing raises, verdicts tell what decode() does, and DALI takes all that are OK."""
    rng = random.Random(0)
    sources = [data for data, verdict in ODD.values() if len(data) > 200 and verdict in (OK, CONVERTED)]
    good = []
    for _ in range(1000):
        data = damaged(rng, rng.choice(sources))
        found = examine(data)
        try:
            pixels = decode(data)
            assert pixels.shape == (found.height, found.width, 3)
        except DecodeError:
            assert found.verdict == UNREADABLE
        else:
            assert found.verdict != UNREADABLE
            if found.verdict == OK and pixels.size < 1_000_000:
                good.append((data, pixels))
    assert len(good) > 100
    for (got, _), (_, pixels) in zip(dali([data for data, _ in good]), good, strict=True):
        assert got.shape == pixels.shape and abs(got.astype(int) - pixels).max() <= 1


def test_other_threads_keep_their_setting(monkeypatch):
    cut = ODD["cut.jpg"][0]
    stop, wrong = threading.Event(), []

    def strict():
        while not stop.is_set():
            if ImageFile.LOAD_TRUNCATED_IMAGES:
                wrong.append("tolerant")

    threads = [threading.Thread(target=strict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        decode(cut)
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # a user's choice changes no verdict, and stays
    assert examine(cut).verdict == TOLERANT
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("low, high", [(0, 1), (0.2, 0.9), (0, 255), (0, 65535), (-3, 5), (7, 100_000)])
def test_floats_are_scaled(low, high):
    numbers = np.linspace(low, high, 4096, dtype=np.float32).reshape(64, 64)
    pixels = decode(encoded(numbers, "TIFF"))[..., 0].astype(float)
    black, white = (low, high) if low < 0 or high > 255 else (0, 1 if high <= 1 else 255)
    assert abs(pixels - (numbers - black) / (white - black) * 255).max() <= 0.51


def test_grey_of_16_bits_of_which_only_some_are_used():
    for most in (255, 4095, 65535):
        values = np.linspace(0, most, 4096).astype(np.uint16).reshape(64, 64)
        pixels = decode(encoded(values, "PNG"))[..., 0].astype(float)
        assert abs(pixels - values * (255 / most)).max() <= 0.51, most
    faint = np.linspace(0, 1e-9, 64, dtype=np.float32).reshape(8, 8)
    assert decode(encoded(faint, "TIFF")).max() == 255


def test_numbers_of_32_bits_and_those_that_are_none():
    many = np.linspace(-(2**31), 2**31 - 1, 4096).astype(np.int32).reshape(64, 64)
    pixels = decode(encoded(many, "TIFF"))
    assert pixels[0, 0, 0] == 0 and pixels[-1, -1, 0] == 255 and abs(pixels.mean() - 127.5) < 1
    assert decode(encoded(np.arange(256, dtype=np.int32).reshape(16, 16), "TIFF"))[..., 0].ravel().tolist() == [
        *range(256)
    ]
    assert decode(encoded(np.full((8, 8), -5.0, np.float32), "TIFF")).max() == 0
    found = examine(encoded(np.array([[1, np.nan]], np.float32), "TIFF"))
    assert found.verdict == UNREADABLE and "not finite" in found.reason


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("colours", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_data_end_early_is_not_ok(progressive, colours):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (96, 96, 3), np.uint8)).convert(colours)
    data = encoded(image, quality=90, progressive=progressive)
    assert examine(data).verdict == (CONVERTED if colours == "CMYK" else OK)
    for part in (3, 10, 20):
        found = examine(data[: part * len(data) // 21] + b"\xff\xd9")
        assert found.verdict == TOLERANT and "damaged" in found.reason, (part, found)


@pytest.mark.parametrize("progressive", [False, True])
def test_other_ends_of_a_whole_jpeg(progressive):
    """Without the end marker, with zeros before it or anything after it: nothing of the image is missing."""
    data = encoded(picture(), progressive=progressive)
    ends = [data[:-2] + end for end in (bytes(9) + b"\xff\xd9", b"\xff\xff\xd9", b"\xff\xd9 more")]
    assert [examine(whole).verdict for whole in ends] == [OK] * 3
    assert examine(data[:-2]).verdict == TOLERANT  # DALI refuses it
    for (got, _), _ in zip(dali(ends), ends, strict=True):
        assert abs(got.astype(int) - decode(data)).max() <= 1


def with_scans(data, count):
    """A progressive JPEG whose last scan comes ``count`` times more."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + b"\xff\xd9"


def test_many_scans(monkeypatch):
    data = encoded(Image.new("L", (64, 64), 128), progressive=True)
    own = module._scans(data)
    assert own > 3 and module._scans(with_scans(data, 9)) == own + 9
    assert np.array_equal(decode(clean(with_scans(data, 100))), decode(data))
    monkeypatch.setattr(module, "_MOST_WORK", 64 * 64 * 50)
    found = examine(with_scans(data, 100))
    assert found.verdict == UNREADABLE and found.reason.startswith(f"too large: {own + 100} scans of 64x64 pixels")
    assert examine(data).verdict == OK
    monkeypatch.setattr(module, "_PLAIN_SCANS", own - 1)
    found = examine(data)
    assert found.verdict == CONVERTED and found.reason == f"unusual JPEG: {own} scans"


LARGE = {
    "jpeg": lambda p: encoded(p, quality=95, subsampling=0),
    "png": lambda p: encoded(p, "PNG"),
    "alpha": lambda p: encoded(Image.fromarray(p).convert("RGBA"), "PNG"),
    "palette": lambda p: encoded(Image.fromarray(p).quantize(256), "PNG"),
    "16 bits": lambda p: encoded(p[..., 0].astype(np.uint16) * 257, "PNG"),
    "float": lambda p: encoded(p[..., 0].astype(np.float32) / 255, "TIFF"),
}


@pytest.mark.parametrize("kind", LARGE, ids=lambda kind: kind.replace(" ", "-"))
@pytest.mark.parametrize("stripe", [1, 2000, 1 << 20])
def test_large_images_become_smaller(monkeypatch, kind, stripe):
    monkeypatch.setattr(module, "MOST_PIXELS", 5000)
    monkeypatch.setattr(module, "_STRIPE", stripe)
    pixels = picture(150, 203)  # a third: 68 x 50
    data = LARGE[kind](pixels)
    found = examine(data)
    assert found.verdict == CONVERTED and found.reason == "large: 203x150 pixels"
    small = decode(data)
    assert small.shape == (found.height, found.width, 3) and found.width * found.height <= 5000
    source = np.repeat(pixels[..., :1], 3, 2) if kind in ("16 bits", "float") else pixels
    expected = np.asarray(Image.fromarray(source).resize((found.width, found.height), Image.Resampling.BOX))
    assert near(small, expected, 4 if kind == "palette" else 2)
    plain = clean(data)
    assert examine(plain).verdict == OK and near(decode(plain), small)


def test_a_large_image_lying_on_its_side(monkeypatch):
    monkeypatch.setattr(module, "MOST_PIXELS", 1000)
    pixels = picture(60, 80)
    for orientation in (1, 6, 8, 3):
        found, small = examine(oriented(orientation, pixels)), decode(oriented(orientation, pixels))
        assert (found.width, found.height) == (27, 20) and small.shape == (20, 27, 3)
        assert near(small, np.asarray(Image.fromarray(pixels).resize((27, 20), Image.Resampling.BOX)), 6)


def test_a_side_too_long_for_a_jpeg(monkeypatch):
    monkeypatch.setattr(module, "MOST_PIXELS", 100_000)
    data = encoded(Image.fromarray(picture(4, 66_000)), "PNG")
    monkeypatch.setattr(module, "_LONGEST_JPEG", 20_000)
    assert suffix(clean(data)) == ".png" and examine(clean(data)).verdict == OK


def test_images_of_thousands_of_pixels_come_one_at_a_time(monkeypatch):
    """Of two threads one waits for the other, whose image is large."""
    monkeypatch.setattr(module, "_AT_ONCE", 1000)
    inside, most = [], []

    def load(_):
        inside.append(1)
        most.append(len(inside))
        stop.wait(0.05)
        inside.pop()

    stop = threading.Event()
    monkeypatch.setattr(Image.Image, "load", load)
    images = [Image.new("RGB", (40, 40)) for _ in range(4)]
    threads = [threading.Thread(target=module._rgb, args=(image,)) for image in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 4 and max(most) == 1
