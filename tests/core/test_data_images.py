"""The one reader of images and the one of label maps: every mode that Pillow opens is read right or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from core.data import DataFileError, MissingDataError, load_animation, load_image, load_labels, to_pil
from core.data.sources.files import IMAGE_EXTENSIONS

RAMP = np.stack(np.broadcast_arrays(*np.mgrid[0:240:40, 0:240:30], 90), axis=-1).astype(np.uint8)  # (6, 8, 3)
DEEP = np.array([[0, 20000], [300, 65535]], dtype=np.uint16)
HIGH = [[0, 78], [1, 255]]


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png(width, height, bits, colour, rows, *chunks):
    """A PNG of a depth that Pillow does not write."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *(chunk(*one) for one in chunks))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + body + chunk(b"IEND", b"")


def deep_colours(values):
    """An RGB PNG of 16 bits, (H, W, 3)."""
    rows = [row.astype(">u2").tobytes() for row in values]
    return png(values.shape[1], values.shape[0], 16, 2, rows)


def palette(values, colours, **options):
    image = Image.fromarray(np.asarray(values, np.uint8)).convert("P")
    image.putpalette(np.asarray(colours, np.uint8).flatten().tolist())
    return encoded(image, **options)


def grey(data):
    return np.asarray(load_image(data, "L")).tolist()


# ---------------------------------------------------------------------- images
def colour_files():
    image = Image.fromarray(RAMP)
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    alpha = image.copy()
    alpha.putalpha(128)
    return {
        "RGB": (encoded(image), 0),
        "RGBA": (encoded(alpha), 0),
        "RGBa": (encoded(alpha.convert("RGBa"), "WEBP", lossless=True, exact=True), 2),
        "RGBX": (encoded(image.convert("RGBX"), "TIFF"), 0),
        "CMYK": (encoded(image.convert("CMYK"), "TIFF"), 0),
        "CMYK of Adobe": (encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0), 3),
        "YCbCr": (encoded(image.convert("YCbCr"), "TIFF"), 3),
        "LAB": (encoded(ImageCms.applyTransform(image, lab), "TIFF"), 20),
        "RGB of 16 bits": (deep_colours(RAMP.astype(np.uint16) << 8), 0),
        "P": (palette(np.arange(48).reshape(6, 8), RAMP), 0),
    }


@pytest.mark.parametrize("kind", colour_files())
def test_colours_of_every_mode_are_the_ones_that_were_saved(kind):
    data, tolerance = colour_files()[kind]
    found = np.asarray(load_image(data)).astype(int)
    assert found.shape == RAMP.shape and np.abs(found - RAMP).max() <= tolerance
    weights = [0.299, 0.587, 0.114]  # of ITU-R 601, whatever the file's mode
    assert np.abs(np.asarray(load_image(data, "L")) - found @ weights).max() <= 1


def test_of_sixteen_bits_the_upper_eight_are_kept_in_every_file():
    big = Image.frombytes("I;16B", (2, 2), DEEP.astype(">u2").tobytes())
    pgm = b"P5 2 2 65535\n" + DEEP.astype(">u2").tobytes()
    files = [encoded(Image.fromarray(DEEP)), encoded(Image.fromarray(DEEP), "TIFF"), encoded(big, "TIFF"), pgm]
    files.append(encoded(Image.fromarray(DEEP), "JPEG2000"))
    files.append(png(2, 2, 16, 4, [np.stack([row, row], -1).astype(">u2").tobytes() for row in DEEP]))
    for data in files:
        assert grey(data) == HIGH
        assert np.asarray(load_image(data)).tolist() == np.stack([HIGH] * 3, -1).tolist()
    assert np.asarray(load_image(deep_colours(np.stack([DEEP] * 3, -1))))[..., 1].tolist() == HIGH
    for mode in ("I;16", "I;16B", "I;16L"):
        held = Image.frombytes(mode, (2, 2), DEEP.astype(">u2" if mode.endswith("B") else "<u2").tobytes())
        assert np.asarray(to_pil(held, "L")).tolist() == HIGH


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_white_are_refused_by_name(mode, tmp_path):
    image = Image.fromarray(DEEP.astype(np.int32 if mode == "I" else np.float32))
    image.save(tmp_path / "deep.tif")
    with pytest.raises(DataFileError, match=rf"deep\.tif: its mode is {mode}: .* Save it with 8 or 16 bits"):
        load_image(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=f"its mode is {mode}"):
        to_pil(image)


@pytest.mark.filterwarnings("error")
def test_transparent_pixels_have_the_colour_that_is_stored():
    pixels = np.dstack([RAMP, np.arange(48, dtype=np.uint8).reshape(6, 8)])
    assert np.array_equal(load_image(encoded(Image.fromarray(pixels))), RAMP)
    assert grey(encoded(Image.fromarray(pixels[..., 2:], "LA"))) == RAMP[..., 2].tolist()
    for transparency in (1, bytes([0, 128, 255])):
        data = palette([[0, 1, 2]], [[9, 8, 7], [1, 2, 3], [255, 0, 4]], transparency=transparency)
        assert np.asarray(load_image(data)).tolist() == [[[9, 8, 7], [1, 2, 3], [255, 0, 4]]]
    pair = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("PA")
    pair.putpalette([9, 8, 7, 1, 2, 3])
    assert np.asarray(load_image(encoded(pair, "TIFF"))).tolist() == [[[9, 8, 7], [1, 2, 3]]]
    held = Image.merge("RGBA", [Image.new("L", (1, 1), value) for value in (200, 100, 50, 128)])
    assert np.abs(np.asarray(to_pil(held.convert("RGBa"))).astype(int) - [200, 100, 50]).max() <= 1
    held = Image.merge("LA", [Image.new("L", (1, 1), 200), Image.new("L", (1, 1), 255)])
    assert to_pil(held.convert("La"), "L").getpixel((0, 0)) == 200
    assert to_pil(Image.fromarray(RAMP).convert("HSV"), "L").getpixel((0, 0)) == 10


def test_black_and_white_is_0_and_255_and_few_bits_are_spread():
    assert grey(encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))) == [[0, 255]]
    assert grey(png(4, 1, 2, 0, [bytes([0b00011011])])) == [[0, 85, 170, 255]]


def test_animations_and_pages_give_the_first_one():
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "TIFF", "PNG"):
        data = encoded(pages[0], kind, save_all=True, append_images=pages[1:])
        assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_every_frame_of_an_animation_is_read_with_its_time(tmp_path):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    data = encoded(pages[0], "GIF", save_all=True, append_images=pages[1:], duration=[100, 200, 300])
    frames, seconds = load_animation(data)
    assert frames[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 255, 0]] and frames.shape == (3, 4, 4, 3)
    assert seconds == pytest.approx(0.6) and load_animation(encoded(pages[0]))[1] == 0
    (tmp_path / "cut.gif").write_bytes(data[:60])
    with pytest.raises(DataFileError, match=r"cut\.gif"):
        load_animation(tmp_path / "cut.gif")


TURNED = {  # what is stored for an upright image, by Exif's number
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("number", TURNED)
def test_images_and_label_maps_stand_upright(number, kind):
    exif = Image.Exif()
    exif[274] = number
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    stored = Image.fromarray(np.ascontiguousarray(TURNED[number](RAMP)))
    assert np.array_equal(load_image(encoded(stored, kind, **options)), RAMP)
    flat = np.stack([RAMP[..., 0]] * 3, axis=-1)
    stored = Image.fromarray(np.ascontiguousarray(TURNED[number](flat)))
    assert np.array_equal(load_labels(encoded(stored, kind, **options)), RAMP[..., 0])


def test_labels_of_the_image_as_stored_keep_it_as_stored():
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(Image.fromarray(RAMP), exif=exif)
    assert load_image(data).size == load_image(data, size=(6, 8)).size == load_image(data, size=(5, 5)).size == (6, 8)
    assert np.array_equal(load_image(data, size=(8, 6)), RAMP)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_data_do_not_hide_an_image():
    data = encoded(Image.fromarray(RAMP), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert load_image(data).size == (8, 6)
    notes = PngInfo()
    notes.add_text("Raw profile type exif", "\nexif\n  2\nno hexadecimal digits")
    assert load_image(encoded(Image.fromarray(RAMP), pnginfo=notes)).size == (8, 6)


# ---------------------------------------------------------------------- label maps
LABELS = np.array([[0, 1], [2, 150]])
COLOURS = np.random.default_rng(0).integers(0, 256, (256, 3))


def label_files():
    narrow, deep = LABELS.astype(np.uint8), np.array([[0, 300], [1, 65535]], np.uint16)
    triple = np.stack([narrow] * 3, axis=-1)
    opaque = np.dstack([triple, np.full((2, 2), 255, np.uint8)])
    pgm = b"P5 2 2 65535\n" + deep.astype(">u2").tobytes()
    return {
        "P": (palette(LABELS, COLOURS), LABELS),
        "P with transparency": (palette(LABELS, COLOURS, transparency=0), LABELS),
        "P in a GIF": (palette(LABELS, COLOURS, kind="GIF", optimize=False), LABELS),
        "L": (encoded(Image.fromarray(narrow)), LABELS),
        "I;16": (encoded(Image.fromarray(deep)), deep),
        "I;16B": (encoded(Image.frombytes("I;16B", (2, 2), deep.astype(">u2").tobytes()), "TIFF"), deep),
        "I": (encoded(Image.fromarray(LABELS.astype(np.int32) * 1000 - 1), "TIFF"), LABELS * 1000 - 1),
        "PGM": (pgm, deep),
        "1": (encoded(Image.fromarray(narrow > 1)), LABELS > 1),
        "L of 2 bits": (png(4, 1, 2, 0, [bytes([0b00011011])]), [[0, 1, 2, 3]]),
        "L of 4 bits": (png(4, 1, 4, 0, [bytes([0x01, 0x2F])]), [[0, 1, 2, 15]]),
        "P of 4 bits": (png(4, 1, 4, 3, [bytes([0x01, 0x2F])], (b"PLTE", bytes(range(48)))), [[0, 1, 2, 15]]),
        "RGB": (encoded(Image.fromarray(triple)), LABELS),
        "RGBA": (encoded(Image.fromarray(opaque)), LABELS),
        "LA": (encoded(Image.fromarray(opaque[..., 2:], "LA")), LABELS),
    }


@pytest.mark.parametrize("kind", label_files())
def test_labels_are_the_numbers_in_the_file(kind):
    data, expected = label_files()[kind]
    found = load_labels(data)
    assert found.dtype == np.int64 and found.tolist() == np.asarray(expected).astype(int).tolist()


def refused_labels():
    pages = [Image.new("L", (2, 2), value) for value in (0, 1)]
    deep = np.stack([DEEP] * 3, axis=-1)
    see_through = np.dstack([np.zeros((2, 2), np.uint8)] * 2)
    return {
        "RGB, and its channels differ": encoded(Image.fromarray(RAMP)),
        "RGB in a form": deep_colours(deep),
        "RGBA in a form": png(1, 1, 16, 4, [struct.pack(">HH", 300, 65535)]),
        "LA, which": encoded(Image.fromarray(see_through, "LA")),
        "CMYK, which": encoded(Image.fromarray(RAMP).convert("CMYK"), "TIFF"),
        "F, which": encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
        "L, and JPEG changes": encoded(pages[0], "JPEG"),
        "L with 2 pages": encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "L in a form": b"P5 2 1 150\n" + bytes([1, 150]),
    }


@pytest.mark.parametrize("what", refused_labels())
def test_what_is_no_label_map_is_refused_with_file_mode_and_remedy(what, tmp_path):
    (tmp_path / "map.png").write_bytes(refused_labels()[what])
    with pytest.raises(DataFileError, match=rf"map\.png: it is [A-Z0-9]+ of mode {what}.*") as caught:
        load_labels(tmp_path / "map.png")
    assert "Save the labels as a PNG" in str(caught.value) or "pages" in what


def test_panoptic_maps_hold_numbers_in_their_colours():
    data = encoded(Image.fromarray(np.array([[[3, 0, 0], [1, 2, 1]]], np.uint8)))
    assert load_labels(data, encoding="panoptic").tolist() == [[3, 1 + 512 + 65536]]
    with pytest.raises(DataFileError, match="mode L: a panoptic map has colours"):
        load_labels(encoded(Image.new("L", (1, 1))), encoding="panoptic")


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("read", [load_image, load_labels])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_files_that_are_cut_off_are_named(read, kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for name, content in (("cut", data[: len(data) * 2 // 3]), ("empty", b""), ("text", b"not an image")):
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(DataFileError, match=rf"cannot decode .*{name}\.png"):
            read(tmp_path / f"{name}.png")


def test_a_link_to_nothing_says_where_it_leads(tmp_path):
    (tmp_path / "a.png").symlink_to("gone.png")
    with pytest.raises(MissingDataError, match=r"a\.png'.* link to 'gone\.png'"):
        load_image(tmp_path / "a.png")
    with pytest.raises(MissingDataError, match=r"no image .*b\.png'$"):
        load_labels(tmp_path / "b.png")


def test_the_content_decides_and_not_the_name(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encoded(Image.fromarray(RAMP)))
    assert np.array_equal(load_image(tmp_path / "photo.jpg"), RAMP)
    assert {".webp", ".tif", ".jpg"} <= set(IMAGE_EXTENSIONS)
