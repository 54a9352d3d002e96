"""What the world sends: pictures, folders and arguments as people have them, each read right or
answered in one clear line.

What public bug reports tell of, as small files and folders. test_folders.py has the layouts of
well-known data sets.
"""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import types
import unicodedata
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import PREDICT, TRANSFER, call, check_error
from PIL import Image, PngImagePlugin
from test_folders import OUT, draw, make, sentence

import transfer_vgg16 as photos

RAMP = np.tile(np.arange(0, 256, dtype="uint8"), (256, 1))  # black at the left, white at the right


def find(directory, capsys, **settings):
    """Return {part: {class name: file names}}, and what was printed."""
    files, class_names = photos.find_photos(directory, OUT, **settings)
    parts = {part: {name: set() for name in class_names} for part in photos.PARTS}
    for part, found in files.items():
        for path, label in found:
            parts[part][class_names[label]].add(path.name)
    return parts, capsys.readouterr().out


def left_aside(printed, reason):
    """Return what one printed line says is left aside for a reason that begins so."""
    (line,) = [line for line in printed.split("\n") if f"({reason}" in line]
    return line.removeprefix("left aside: ").rpartition(" (")[0]


# ----- pictures: numbers of other kinds


def write_tiff(path, numbers, white_is_zero=False):
    """Write the grey picture `numbers` as an uncompressed TIFF; return `path`."""
    numbers = np.ascontiguousarray(numbers)
    height, width = numbers.shape
    tags = {256: width, 257: height, 258: numbers.dtype.itemsize * 8, 259: 1}
    tags |= {262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: height, 279: numbers.nbytes}
    tags[339] = {"u": 1, "i": 2, "f": 3}[numbers.dtype.kind]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + numbers.nbytes)
    directory = struct.pack("<H", len(tags)) + directory + bytes(4)
    path.write_bytes(start + numbers.tobytes() + directory)
    return path


def write_png(path, rows, colour, bits, *chunks):
    """Write a PNG of `rows` (height, width, channels), with more `chunks` (name, content)."""
    rows = rows.astype(">u2" if bits == 16 else "u1")
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]:
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


NUMBERS = {
    "float 0 to 1": RAMP / np.float32(255),
    "float 0 to 255": RAMP.astype("float32"),
    "float 0 to 65535": RAMP * np.float32(257),
    "int16": RAMP.astype("int16"),
    "int32 0 to 255": RAMP.astype("int32"),
    "uint32": RAMP * np.uint32(0x1010101),
    "8 bits in 16": RAMP.astype("uint16"),
    "10 bits in 16": RAMP * np.uint16(4),
    "12 bits in 16": RAMP * np.uint16(16),
    "14 bits in 16": RAMP * np.uint16(64),
    "16 bits": RAMP * np.uint16(257),
    "int32, a mask": (RAMP > 127).astype("int32"),
}


@pytest.mark.parametrize("white_is_zero", [False, True], ids=["black is 0", "white is 0"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_other_than_8_bits_are_scaled(kind, white_is_zero, tmp_path):
    numbers = NUMBERS[kind]
    expected = numbers * 255 if kind == "int32, a mask" else RAMP
    if white_is_zero:
        expected = 255 - expected
    try:
        pixels = photos.read_photo(write_tiff(tmp_path / "x.tif", numbers, white_is_zero), 256)
    except OSError as error:  # white is 0: Pillow knows it for some kinds only
        assert white_is_zero and "cannot identify image file" in str(error)
        return
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 4


@pytest.mark.parametrize(
    "numbers",
    [
        RAMP * np.float32(3 / 255),
        RAMP.astype("int16") - np.int16(1000),
        RAMP * np.uint32(4000),
        np.where(RAMP < 9, np.float32("nan"), 0.5).astype("float32"),
        np.where(RAMP < 9, np.float32("inf"), 0.5).astype("float32"),
        np.zeros((9, 9), "uint16"),
    ],
    ids=["float 0 to 3", "negative", "20 bits in 32", "no numbers", "infinite", "all 0"],
)
def test_numbers_whose_white_is_unknown_are_left_out(numbers, tmp_path, capsys):
    path = write_tiff(tmp_path / "x.tif", numbers)
    images, readable, errors = photos.read_photos([path], 16)
    assert len(images) == len(readable) == 0
    assert list(errors) == [path]
    line = capsys.readouterr().err
    assert line.startswith(f"{path} is left out: ")
    assert "white is unclear in its values, " in line and line.endswith(": save it with 8 bits\n")


def test_transparent_value_of_16_bits(tmp_path):
    grey = np.full((64, 64, 1), 20000)
    grey[:32] = 1000
    write_png(tmp_path / "grey.png", grey, 0, 16, (b"tRNS", struct.pack(">H", 1000)))
    colour = np.full((64, 64, 3), (20000, 40000, 60000))
    colour[:32] = (1000, 2000, 3000)
    chunk = (b"tRNS", struct.pack(">HHH", 1000, 2000, 3000))
    write_png(tmp_path / "colour.png", colour, 2, 16, chunk)
    for name, expected in (("grey.png", [78] * 3), ("colour.png", [78, 156, 233])):
        pixels = photos.read_photo(tmp_path / name, 64).astype(int)
        assert (pixels[:28] == 255).all(), name
        assert np.abs(pixels[36:] - expected).max() <= 2, name


# ----- pictures: transparency, one colour


def test_16_bits_in_colour(tmp_path):
    """Pillow keeps the upper eight: nothing is left of a picture that has numbers up to 4,095."""
    rows = np.dstack([RAMP, RAMP[:, ::-1], RAMP]).astype("uint16")
    write_png(tmp_path / "16.png", rows * 257, 2, 16)
    assert np.abs(photos.read_photo(tmp_path / "16.png", 256).astype(int) - rows).max() <= 1
    write_png(tmp_path / "12.png", rows * 16, 2, 16)
    with pytest.raises(OSError, match="white is unclear in its 16-bit values: save it"):
        photos.read_photo(tmp_path / "12.png", 256)


def test_dark_bmp_of_16_bits_a_pixel(tmp_path):
    """5 bits for red and blue, 6 for green: not 16 for each, of which Pillow would keep eight."""
    red, green, blue = np.uint16(3), np.uint16(6), np.uint16(1)
    pixels = np.full((16, 16), red << 11 | green << 5 | blue, "<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, 16, 16, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    header += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    start = struct.pack("<2sIHHI", b"BM", 14 + len(header) + len(pixels), 0, 0, 14 + len(header))
    (tmp_path / "x.bmp").write_bytes(start + header + pixels)
    pixels = photos.read_photo(tmp_path / "x.bmp", 16)
    expected = [3 * 255 / 31, 6 * 255 / 63, 255 / 31]
    assert np.abs(pixels - expected).max() <= 1


def test_colour_table_of_8_bits_in_a_tiff(tmp_path):
    """Where TIFF wants 16; Pillow makes black of it."""
    image = draw(1, (64, 64)).quantize(64)
    image.save(tmp_path / "16.tif")
    expected = photos.read_photo(tmp_path / "16.tif", 64).astype(int)
    content = bytearray((tmp_path / "16.tif").read_bytes())
    (directory,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, _, length, start = struct.unpack_from("<HHII", content, entry)
        if tag == 320:
            table = np.frombuffer(bytes(content[start : start + 2 * length]), "<u2") // 256
            content[start : start + 2 * length] = table.astype("<u2").tobytes()
    (tmp_path / "8.tif").write_bytes(content)
    found = photos.read_photo(tmp_path / "8.tif", 64).astype(int)
    assert expected.std() > 20
    assert np.abs(found - expected).max() <= 1


# A BMP of 32 bits that says which of them are alpha; Pillow writes none
BMP_HEADER = struct.pack("<IiiHHIIiiII", 108, 64, 64, 1, 32, 3, 64 * 64 * 4, 0, 0, 0, 0)
BMP_HEADER += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)


@pytest.mark.parametrize("name", ["a.tga", "a.bmp", "a.png", "a.webp", "a.tif"])
def test_transparent_in_every_pixel_is_opaque(name, tmp_path):
    image = draw(1, (64, 64)).convert("RGBA")
    image.putalpha(0)
    if name == "a.bmp":
        rows = np.asarray(image)[::-1, :, [2, 1, 0, 3]]
        start = struct.pack("<2sIHHI", b"BM", 122 + rows.nbytes, 0, 0, 122)
        (tmp_path / name).write_bytes(start + BMP_HEADER + rows.tobytes())
        assert (photos.read_photo(tmp_path / name, 64) == np.asarray(draw(1, (64, 64)))).all()
        return
    settings = {"lossless": True, "exact": True} if name == "a.webp" else {}
    image.save(tmp_path / name, **settings)
    pixels = photos.read_photo(tmp_path / name, 64)
    assert (pixels == np.asarray(draw(1, (64, 64)))).all()


def test_one_colour_is_reported(tmp_path, capsys):
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "teal.png")
    draw(1).save(tmp_path / "noise.png")
    images, *_ = photos.read_photos([tmp_path / "noise.png", tmp_path / "teal.png"], 16)
    assert len(images) == 2
    line = f"in one single colour, which may be wrong: {tmp_path / 'teal.png'}\n"
    assert capsys.readouterr().out == line


# ----- pictures: large


def test_long_text_and_profile_in_a_png(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{}" * 1_000_000, zip=True)
    draw(1, (64, 64)).save(tmp_path / "x.png", pnginfo=text, icc_profile=bytes(3_000_000))
    assert (photos.read_photo(tmp_path / "x.png", 64) == np.asarray(draw(1, (64, 64)))).all()


def test_jpeg_of_200_megapixels(tmp_path):
    Image.new("L", (16320, 12240), 99).save(tmp_path / "x.jpg")
    assert (photos.read_photo(tmp_path / "x.jpg", 32) == 99).all()


@pytest.mark.parametrize("name, settings", [("x.png", {}), ("x.jpg", {"progressive": True})])
def test_too_many_pixels(name, settings, tmp_path, capsys):
    """A progressive JPEG is in memory in full before it is scaled down."""
    Image.new("L", (300, 200)).save(tmp_path / name, **settings)
    assert photos.read_photo(tmp_path / name, 16, max_pixels=60_000).shape == (16, 16, 3)
    with pytest.raises(OSError, match=r"^too large \(300 x 200 pixels\): scale it down$"):
        photos.read_photo(tmp_path / name, 16, max_pixels=59_999)
    line = b"\0" + bytes(2_000)
    header = struct.pack(">IIBBBBB", 16_000, 16_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for chunk, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(line * 16_000)),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + chunk + data
        content += struct.pack(">I", zlib.crc32(chunk + data))
    (tmp_path / "huge.png").write_bytes(content)
    photos.read_photos([tmp_path / "huge.png"], 16)
    assert "left out: too large (16,000 x 16,000 pixels)" in capsys.readouterr().err


def test_transparent_pixels_are_scaled_before_they_are_laid_on_white(tmp_path):
    """The colour of what is transparent does not shine through, and the memory is that of few."""
    image = Image.new("RGBA", (2000, 2000), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 1000, 2000))
    image.save(tmp_path / "x.png")
    pixels = photos.read_photo(tmp_path / "x.png", 16).astype(int)
    assert np.abs(pixels[:, :7] - (0, 0, 255)).max() <= 12
    assert np.abs(pixels[:, 9:] - 255).max() <= 12
    assert (pixels[..., 0] <= pixels[..., 1] + 1).all()  # nowhere red


# ----- folders: names


def forms(name):
    """Return a name as Windows and Linux write it, and as older macOS does."""
    return unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)


@pytest.mark.skipif(sys.platform == "darwin", reason="both are one name there")
def test_names_that_look_the_same(tmp_path, capsys):
    composed, decomposed = forms("ガラス")
    assert composed != decomposed
    make(tmp_path / "a", f"{decomposed}/*.jpg 9\n木/*.jpg 9")
    parts, _ = find(tmp_path / "a", capsys)
    assert list(parts["train"]) == [composed, "木"]
    make(tmp_path / "b", f"train/{composed}/*.jpg 9\ntrain/木/*.jpg 9")
    make(tmp_path / "b", f"test/{decomposed}/*.jpg 3\ntest/木/*.jpg 3")
    parts, _ = find(tmp_path / "b", capsys)
    assert [len(parts["test"][name]) for name in (composed, "木")] == [3, 3]
    make(tmp_path / "c", f"{composed}/*.jpg 9\n{decomposed}/*.jpg 9\n木/*.jpg 9")
    told = sentence(photos.find_photos, tmp_path / "c")
    assert (
        f"{tmp_path / 'c' / composed} and " in told
        or f"{tmp_path / 'c' / decomposed} and " in told
    )
    assert "look the same" in told


@pytest.mark.parametrize(
    "names",
    [
        "学習 検証 評価",
        "学習用 検証用 評価用",
        "教師 検証 本番",
        "学習 評価 テスト",
        "ｔｒａｉｎ ｖａｌ ﾃｽﾄ",
    ],
)
def test_japanese_words_for_parts(names, tmp_path, capsys):
    counts = dict(zip(names.split(), (9, 4, 3), strict=True))
    make(
        tmp_path, "\n".join(f"{name}/{c}/*.jpg {counts[name]}" for name in counts for c in "犬猫")
    )
    parts, _ = find(tmp_path, capsys)
    assert [len(parts[part]["猫"]) for part in photos.PARTS] == [9, 4, 3]


@pytest.mark.skipif(sys.platform == "win32", reason="no such names there")
def test_names_with_control_characters(tmp_path, capsys):
    make(tmp_path, "cat\x1b[31m/*.jpg 9\ndog/*.jpg 9")
    (tmp_path / "dog").rename(tmp_path / "do\ng")
    (tmp_path / "do\ng" / "broken\r.jpg").write_text("<no picture>")
    photos.load_photos(tmp_path, 16, OUT)
    printed = capsys.readouterr()
    assert r"  cat\x1b[31m" in printed.out
    assert r"  do\ng" in printed.out
    assert r"do\ng/broken\r.jpg is left out: " in printed.err
    assert not {"\r", "\x1b"} & set(printed.out + printed.err)


# ----- folders: what is a photograph


def test_raw_files_are_left_aside(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9")
    for i in range(15):
        draw(i).save(tmp_path / "cat" / f"{i:03}.NEF", "TIFF")
    parts, printed = find(tmp_path, capsys)
    assert sum(len(parts[part]["cat"]) for part in photos.PARTS) == 9
    assert left_aside(printed, "a camera's raw files").endswith("009.NEF and 5 more")


KINDS = ["IMG_{}.JPG", "IMG_{}.heic", "IMG_{} (1).JPG", "IMG_E{}.JPG", "IMG_{}-edited.jpg"]
KINDS += [
    "IMG_{} - コピー.png",
    "IMG_{}.rf.0f1e2d3c.jpg",
]  # Windows's copy, and one that Roboflow made


def test_files_of_one_photograph_are_in_one_part(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(40):
            for j, kind in enumerate(KINDS):
                path = tmp_path / name / kind.format(i)
                draw(10_000 * len(kind) + 1000 * j + i + 100 * (name == "dog")).save(path)
    parts, _ = find(tmp_path, capsys)
    for part in photos.PARTS:
        for name in ("cat", "dog"):
            assert parts[part][name]
            for i in range(40):
                files = {kind.format(i) for kind in KINDS}
                assert parts[part][name] >= files or parts[part][name].isdisjoint(files)


def test_copy_of_one_of_the_files_is_in_their_part(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 60\ndog/*.jpg 60")
    for path in sorted(tmp_path.glob("cat/*.jpg")):
        draw(int(path.stem) + 900).save(path.with_suffix(".png"))
        path.with_name(f"also{path.name}").write_bytes(path.read_bytes())
    parts, printed = find(tmp_path, capsys)
    assert "several parts" not in printed
    for i in range(60):
        files = {f"{i:03}.jpg", f"{i:03}.png", f"also{i:03}.jpg"}
        assert any(parts[part]["cat"] >= files for part in photos.PARTS)


def test_copy_ties_the_files_of_two_directories(tmp_path, capsys):
    """IMG_1.HEIC and IMG_1.JPG; elsewhere, a copy of the latter, and an edited one of this."""
    make(tmp_path, "cat/*.jpg 60\ndog/*.jpg 60")
    (tmp_path / "cat" / "best").mkdir()
    for path in sorted(tmp_path.glob("cat/*.jpg")):
        draw(int(path.stem) + 900).save(path.with_suffix(".png"))
        copy = path.parent / "best" / path.name
        copy.write_bytes(path.read_bytes())
        draw(int(path.stem) + 2000).save(copy.with_name(f"{path.stem}-edited.jpg"))
    parts, _ = find(tmp_path, capsys)
    for i in range(60):
        files = {f"{i:03}.jpg", f"{i:03}.png", f"{i:03}-edited.jpg"}
        assert any(parts[part]["cat"] >= files for part in photos.PARTS)


def test_numbered_files_are_photographs_of_their_own(tmp_path, capsys):
    """Windows numbers what is renamed together, and some names have a number for an extension."""
    make(tmp_path, "cat/*.jpg 60\ndog/dog.* 60")
    for path in sorted((tmp_path / "cat").iterdir()):
        path.rename(path.with_name(f"cat ({int(path.stem) + 1}).jpg"))
    parts, _ = find(tmp_path, capsys)
    for name in ("cat", "dog"):
        assert all(len(parts[part][name]) >= 3 for part in photos.PARTS)


def test_a_part_never_changes_to_held_out_when_another_file_of_it_comes(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 60\ndog/*.jpg 60")
    before, _ = find(tmp_path, capsys)
    for path in sorted(tmp_path.glob("*/*.jpg"))[::2]:
        draw(len(path.name) + int(path.stem) + 500).save(path.with_suffix(".png"))
    after, _ = find(tmp_path, capsys)
    for name in ("cat", "dog"):
        assert before["train"][name] <= after["train"][name]


def test_masks_beside_pictures_are_reported(tmp_path, capsys):
    for name in ("COVID", "Normal"):
        make(tmp_path, f"{name}/images/*.png 9\n{name}/masks/*.png 9\n{name}/metadata.xlsx", "PNG")
    parts, printed = find(tmp_path, capsys)
    assert list(parts["train"]) == ["COVID", "Normal"]
    assert (
        f"the classes in {tmp_path} have the same directories in them (images, masks), " in printed
    )
    make(tmp_path / "other", "cat/white/*.jpg 9\ncat/black/*.jpg 9\ndog/white/*.jpg 9")
    _, printed = find(tmp_path / "other", capsys)
    assert "same directories" not in printed


def test_masks_among_pictures_are_reported(tmp_path, capsys):
    for name in ("benign", "malignant"):
        make(tmp_path, f"{name}/*.png 9\n{name}/*_mask.png 9\n{name}/with_mask_*.png 9", "PNG")
    _, printed = find(tmp_path, capsys)
    example = tmp_path / "benign" / "000_mask.png"
    (line,) = [line for line in printed.split("\n") if "named like masks of others" in line]
    assert line.startswith("18 pictures ")
    assert line.endswith(f"(for example {example})")


DOWNLOADS = {
    "Google Drive": (
        """
        photos-20261101T010101Z-001/photos/cat/*.jpg 9
        photos-20261101T010101Z-002/photos/dog/*.jpg 9""",
        ["cat", "dog"],
    ),
    "archive(1)": ("archive/cat/*.jpg 9\narchive(1)/dog/*.jpg 9", ["cat", "dog"]),
    "breeds": ("cat/white/*.jpg 9\ndog/black/*.jpg 9", ["cat", "dog"]),
    "years": ("room1/2019/*.jpg 9\nroom2/2020/*.jpg 9", ["room1", "room2"]),
    "one name": ("n01/images/*.jpg 9\nn02/images/*.jpg 9", ["n01", "n02"]),
    "loose pictures": ("s(1)/a/*.jpg 9\ns(2)/b/*.jpg 9\ns(1)/*.jpg 1", ["s(1)", "s(2)"]),
    "one is loose": ("cat(1)/*.jpg 9\ncat(2)/new/*.jpg 9", ["cat(1)", "cat(2)"]),
}


@pytest.mark.parametrize("layout, expected", DOWNLOADS.values(), ids=DOWNLOADS)
def test_downloads_in_several_archives(layout, expected, tmp_path, capsys):
    parts, _ = find(make(tmp_path, layout), capsys)
    assert list(parts["train"]) == expected


# ----- folders: small classes


def test_ten_are_enough_whatever_the_hashes_say():
    for highest in (0.19, 0.35, 0.9):
        for count in (5, 10):
            numbers = np.linspace(0.01, highest, count).tolist()
            for parts in (["test", "validation"], ["validation"], ["test"]):
                held_out = photos.hold_out(numbers, parts)
                assert set(held_out.values()) == set(parts)
                assert count - len(held_out) >= 2
                assert all(x < 0.36 for x in held_out)


def test_classes_of_five_and_ten(tmp_path, capsys):
    names = [f"c{i:03}" for i in range(150)]
    make(tmp_path, "\n".join(f"{name}/*.jpg {5 + 5 * (i % 2)}" for i, name in enumerate(names)))
    parts, _ = find(tmp_path, capsys)
    for name in names:
        assert len(parts["train"][name]) >= 2
        assert parts["validation"][name] and parts["test"][name]


def test_small_classes_are_left_aside(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9\nbuttons/*.jpg 1\nowls/*.jpg 4\ncopies/a*.jpg 1")
    for i in range(9):
        (tmp_path / "copies" / f"{i}.jpg").write_bytes(b"the same")
    parts, printed = find(tmp_path, capsys)
    assert list(parts["train"]) == ["cat", "dog"]
    assert (
        left_aside(printed, "classes of fewer than 5 different pictures")
        == "buttons, copies, owls"
    )
    data, class_names = photos.load_photos(tmp_path, 16, OUT)
    assert class_names == ["cat", "dog"]
    assert sum(len(labels) for _, labels in data.values()) == 18


def test_many_people_with_one_photo_each(tmp_path, capsys):
    make(tmp_path, "\n".join(f"person{i:03}/*.jpg 1" for i in range(300)))
    told = sentence(photos.find_photos, tmp_path)
    assert "with 5 or more different pictures, and has 0 (none): sort the photos into " in told
    assert len(told) < 400
    printed = capsys.readouterr().out
    assert left_aside(printed, "classes of").endswith("person008, person009 and 290 more")
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9")
    parts, _ = find(tmp_path, capsys)
    assert list(parts["train"]) == ["cat", "dog"]


def test_many_classes_with_too_few_for_a_part(tmp_path):
    names = [f"c{i:02}" for i in range(40)]
    make(tmp_path, "\n".join(f"train/{name}/*.jpg 6\ntest/{name}/*.jpg 1" for name in names))
    for name in names[5:]:
        (tmp_path / "test" / name / "000.jpg").unlink()
    told = sentence(photos.load_photos, tmp_path, 16)
    assert "c05 has 0 for test" in told
    assert "c14 has 0 for test and 25 more: " in told
    assert len(told) < 400


def test_table_of_many_classes(tmp_path, capsys):
    make(tmp_path, "\n".join(f"c{i:02}/*.jpg 5" for i in range(25)))
    _, printed = find(tmp_path, capsys)
    rows = printed.partition("  class\n")[2].splitlines()
    assert len(rows) == 11
    assert rows[9].endswith("  c09")
    assert rows[10] == "and 15 more classes"


def test_loose_photos_are_told_the_layout(tmp_path):
    make(tmp_path, "*.jpg 9")
    told = sentence(photos.find_photos, tmp_path)
    assert f"sort the photos into {tmp_path}/cat, {tmp_path}/dog and so on" in told


# ----- folders: what is not used is said


def test_hidden_pictures_and_those_in_a_cloud_are_counted(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9\ncat/.DS_Store\ncat/._000.jpg\ncat/.nomedia")
    make(tmp_path, "dog/.IMG_*.HEIC.icloud 12\ncat/.hidden*.jpg 2")
    parts, printed = find(tmp_path, capsys)
    assert len([name for part in parts.values() for name in part["cat"]]) == 9
    assert left_aside(printed, "only in the cloud").endswith("IMG_009.HEIC.icloud and 2 more")
    hidden = [str(tmp_path / "cat" / f".hidden00{i}.jpg") for i in range(2)]
    assert left_aside(printed, "hidden pictures") == ", ".join(hidden)


def test_placeholders_of_onedrive():
    """Windows gives such a file an attribute, and fetches it when it is read."""
    status = types.SimpleNamespace(st_file_attributes=0x00400020, st_size=5_000_000)
    placeholder = types.SimpleNamespace(name="a.jpg", suffix=".jpg", stat=lambda: status)
    assert photos.find_obstacle(placeholder).startswith("only in the cloud")
    status.st_file_attributes = 0x20
    assert photos.find_obstacle(placeholder) is None


def test_pointers_of_git_lfs(tmp_path, capsys):
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9\ncat/a.jpg")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 12345\n"
    (tmp_path / "cat" / "a.jpg").write_text(pointer)
    _, printed = find(tmp_path, capsys)
    assert left_aside(printed, "only pointers: git lfs pull") == str(tmp_path / "cat" / "a.jpg")


def test_directories_of_systems_and_tools(tmp_path, capsys):
    names = ["$RECYCLE.BIN", "#recycle", "@Recycle", "lost+found", ".ipynb_checkpoints"]
    make(tmp_path, "cat/*.jpg 9\ndog/*.jpg 9\nvenv/lib/matplotlib/images/*.png 9\nvenv/pyvenv.cfg")
    make(tmp_path, "\n".join(f"{name}/*.jpg 9" for name in names))
    parts, printed = find(tmp_path, capsys)
    assert list(parts["train"]) == ["cat", "dog"]
    assert left_aside(printed, "hidden, or").split(", ") == sorted([*names, "venv"])


# ----- the companion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small untrained model of the classes ガラス, cat and dog, saved as training saves it."""
    path = tmp_path_factory.mktemp("model") / "vgg16_cifar10.keras"
    inputs = keras.Input((32, 32, 3), name="image")
    x = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv1")(inputs)
    x = keras.layers.MaxPooling2D(16, name="block5_pool")(x)
    x = keras.layers.Flatten()(x)
    outputs = keras.layers.Dense(3, activation="softmax")(x)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.save(path)
    with zipfile.ZipFile(path, "a") as archive:
        names = [forms("ガラス")[1], "cat", "dog"]  # as an older model has them
        archive.writestr("class_names.json", json.dumps(names))
    return path


def test_model_that_knows_a_name_written_in_another_way(model, tmp_path):
    make(tmp_path, f"{forms('ガラス')[0]}/*.jpg 9\ncat/*.jpg 9\ndog/*.jpg 9")
    stdout, _ = call(PREDICT, "--model", model, "--data", tmp_path, cwd=tmp_path)
    assert "27 pictures in 3 classes" in stdout
    stdout, _ = call(PREDICT, "--model", model, tmp_path / "cat" / "000.jpg", cwd=tmp_path)
    assert f"{forms('ガラス')[0]} " in stdout


@pytest.mark.parametrize("directory", ["photos", "photos/cat"])
def test_all_photos_of_one_class(directory, model, tmp_path):
    make(tmp_path, "photos/cat/*.jpg 3")
    arguments = ["--model", model, "--data", tmp_path / directory, "--all"]
    stdout, _ = call(PREDICT, *arguments, cwd=tmp_path)
    assert "3 pictures in 1 classes" in stdout
    assert "正解: cat" in stdout


def test_unknown_classes_have_a_way_out(model, tmp_path):
    make(tmp_path, "\n".join(f"c{i:02}/*.jpg 5" for i in range(30)))
    _, stderr = call(PREDICT, "--model", model, "--data", tmp_path, cwd=tmp_path, status=2)
    end = "c08, c09 and 20 more: give --data directories named like the model's classes"
    check_error(stderr, f"the model knows .+, cat, dog, but .+ has c00, .+{end}")


def test_name_that_begins_with_a_dash(model, tmp_path):
    draw(1).save(tmp_path / "-dash.jpg")
    draw(2).save(tmp_path / "plain.jpg")
    arguments = ["--model", model, "--", "-dash.jpg", tmp_path / "plain.jpg"]
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path)
    assert stderr == ""
    assert [line.split(": ")[0] for line in stdout.splitlines()] == [
        "-dash.jpg",
        str(tmp_path / "plain.jpg"),
    ]


def test_only_broken_pictures(model, tmp_path):
    (tmp_path / "a.jpg").write_text("<no picture>")
    _, stderr = call(PREDICT, "--model", model, "a.jpg", cwd=tmp_path, status=2)
    left_out, error = stderr.splitlines()
    assert left_out.startswith("a.jpg is left out: ")
    assert error == "error: none of the pictures can be read, as said above: give others"


@pytest.mark.pictures
def test_figure_never_replaces_a_picture(model, tmp_path):
    """As a shell makes of --figure *.png, or of a directory that has the figure in it."""
    for i, name in enumerate(("a.png", "b.png")):
        draw(i).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    for arguments, told in (
        (["a.png", "b.png"], "a.png exists, and is not a figure of this program"),
        (["a.png", "a.png"], "a.png is one of the pictures"),
        (["a.png", "."], "a.png is one of the pictures"),
    ):
        arguments = ["--model", model, "--figure", *arguments]
        stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
        check_error(stderr.splitlines()[-1], f"{told}.*: give --figure another name")
        assert (tmp_path / "a.png").read_bytes() == before
    arguments = ["--model", model, "--figure", "c.png", "b.png"]
    for _ in range(2):  # its own, it replaces
        call(PREDICT, *arguments, cwd=tmp_path)
    assert Image.open(tmp_path / "c.png").size > (100, 100)


def test_figure_that_cannot_be_written_is_an_error(model, tmp_path):
    draw(1).save(tmp_path / "b.png")
    arguments = ["--model", model, "--figure", "nodir/a.png", "b.png"]
    stdout, stderr = call(PREDICT, *arguments, cwd=tmp_path, status=2)
    assert stdout == ""
    check_error(stderr, "argument --figure: the directory nodir does not exist.*")


def test_model_under_another_name(model, tmp_path):
    renamed, unpacked = tmp_path / "vgg16_cifar10.keras.zip", tmp_path / "vgg16_cifar10.keras"
    renamed.write_bytes(model.read_bytes())
    with zipfile.ZipFile(model) as archive:
        archive.extractall(unpacked)
    with zipfile.ZipFile(tmp_path / "sent.zip", "w") as archive:
        archive.write(model, "results/vgg16_cifar10.keras")
    for path, told in (
        (renamed, ".+ is a .keras file under another name: let its name end in .keras"),
        (unpacked, ".+ is a .keras file that was unpacked, .+: zip what is in it, .+"),
        (tmp_path / "sent.zip", ".+ is an archive: unpack it, and give --model the .keras file.+"),
    ):
        _, stderr = call(PREDICT, "--model", path, cwd=tmp_path, status=2)
        check_error(stderr, told)
    again = tmp_path / "again.zip"  # what the sentence says leads to a model
    with zipfile.ZipFile(again, "w") as archive:
        for path in unpacked.rglob("*"):
            archive.write(path, path.relative_to(unpacked))
    draw(1).save(tmp_path / "a.jpg")
    again = again.rename(tmp_path / "again.keras")
    call(PREDICT, "--model", again, "a.jpg", cwd=tmp_path)


# ----- arguments


def test_data_without_its_argument(tmp_path):
    make(tmp_path, "photos/cat/*.jpg 1")
    for name in ("photos", "x.npz", "cifar-10-python.tar.gz"):
        _, stderr = call(TRANSFER, name, cwd=tmp_path, status=2)
        check_error(stderr, f"{name} is not an argument: to train on it, write --data {name}.*")
    _, stderr = call(TRANSFER, "--no-such", cwd=tmp_path, status=2)
    check_error(stderr, "unrecognized arguments: --no-such.*")


# ----- CIFAR-10 as its authors pack it


def write_batches(directory):
    """Write CIFAR-10's six files with three images in each; return {name: (images, labels)}."""
    directory.mkdir(parents=True)
    random, arrays = np.random.default_rng(0), {}
    for name in photos.BATCHES:
        images, labels = random.integers(0, 256, (3, 32, 32, 3), "uint8"), [1, 9, 0]
        data = images.transpose(0, 3, 1, 2).reshape(3, 3072)
        batch = {b"data": np.ascontiguousarray(data), b"labels": labels, b"batch_label": b"x"}
        (directory / name).write_bytes(pickle.dumps(batch, 2))
        arrays[name] = images, labels
    return arrays


@pytest.mark.parametrize("form", ["cifar-10-batches-py", "around", "cifar-10-python.tar.gz"])
def test_cifar10_as_its_authors_pack_it(form, tmp_path):
    arrays = write_batches(tmp_path / "around" / "cifar-10-batches-py")
    if form.endswith(".gz"):
        with tarfile.open(tmp_path / form, "w:gz") as archive:
            archive.add(tmp_path / "around" / "cifar-10-batches-py", "cifar-10-batches-py")
    data = tmp_path / "around" / form if form.endswith("py") else tmp_path / form
    (x_train, y_train), (x_test, y_test), _ = photos.load_arrays(data)
    assert (x_train == np.concatenate([arrays[name][0] for name in photos.BATCHES[:5]])).all()
    assert (x_test == arrays["test_batch"][0]).all()
    assert y_train[:, 0].tolist() == [1, 9, 0] * 5
    assert y_test.tolist() == [[1], [9], [0]]
    args = photos.parse_arguments(["--data", str(data)])
    assert not photos.has_photos(args)
    assert args.image_size == 32


def test_batches_that_would_run_code(tmp_path):
    write_batches(tmp_path / "a")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a" / "test_batch").write_bytes(pickle.dumps({b"data": Trap()}))
    told = sentence(photos.load_arrays, tmp_path / "a")
    assert "CIFAR-10 as its authors packed it for Python, or is damaged (it would run " in told
    assert not (tmp_path / "ran").exists()


def test_another_archive_is_told(tmp_path):
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-100-python/train"), io.BytesIO())
    told = sentence(photos.load_arrays, tmp_path / "cifar-100-python.tar.gz")
    assert "cifar-100-python.tar.gz is not CIFAR-10 as its authors packed it" in told
    assert sentence(photos.load_arrays, Path("no.tar.gz")).startswith("no.tar.gz does not exist")
    told = sentence(photos.load_arrays, tmp_path)  # a directory of photos, say
    assert told.startswith(f"{tmp_path} is not CIFAR-10 as its authors packed it")
