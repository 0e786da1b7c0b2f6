"""Pictures from strangers: no name leads out of the folder, and a file is the picture it should be or a UserError."""

import os
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tinyspeed.data import images
from tinyspeed.util.errors import UserError

WHERE = "train.json: record 17 (id abc)"
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8)  # higher than wide and the other way round do not mix up


def saved(path, picture, kind, **how):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, kind, **how)
    return path


def encoded(picture, kind, **how):
    buffer = BytesIO()
    saved(buffer, picture, kind, **how)
    return buffer.getvalue()


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments, WHERE)
    assert str(caught.value).startswith(WHERE + ": ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def outcomes(path):
    """What `size` and what `load` make of a file, or the words of its refusal. No warning may escape."""
    got = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (images.size, images.decode):
            try:
                got.append(read(path, WHERE))
            except UserError as error:
                got.append(str(error))
    return got


def lawful(size, picture):
    """A refusal is one line that begins with the place. A picture is RGB, and of the size that was read."""
    for words in (size, picture):
        if isinstance(words, str) and (not words.startswith(WHERE + ": ") or "\n" in words):
            return False
    return isinstance(picture, str) or (picture.mode, picture.size) == ("RGB", size)


def both(path):
    """(size, picture) of a file; None for the one that refuses."""
    got = outcomes(path)
    assert lawful(*got)
    return tuple(None if isinstance(made, str) else made for made in got)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "x"


# Names


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with pictures, and links that stay inside it and that do not."""
    root = tmp_path_factory.mktemp("tree")
    folder, secret, beside = root / "pics", root / "secret", root / "pics-secret"
    for made in (folder / "sub" / "deep", secret, beside):
        made.mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/deep/c.png", "ü 猫..png", " ", "a\x85.png", "C:a.png"):
        (folder / name).write_bytes(b"x")
    (secret / "s.png").write_bytes(b"x")
    (beside / "s.png").write_bytes(b"x")
    (folder / "in.png").symlink_to("sub/b.png")
    (folder / "in").symlink_to("sub")
    (folder / "out.png").symlink_to(secret / "s.png")
    (folder / "out").symlink_to(secret)
    (folder / "beside").symlink_to(beside)  # its path begins like the folder's
    (folder / "chain.png").symlink_to("out.png")
    (folder / "round").symlink_to("out/../pics/sub")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "up").symlink_to("..")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "a.png", "sub/b.png", "./a.png", "sub//deep/./c.png", "ü 猫..png", "in.png", "in/b.png", "in/deep/c.png",
        "round/b.png", "up/pics/a.png",
    ],
)  # fmt: skip
def test_a_file_in_the_folder_is_found(tree, name):
    assert images.inside(tree, name, WHERE) == tree / name


@pytest.mark.parametrize(
    "name",
    [
        None, 7, b"a.png", ["a.png"], "", " ", "a.png\0", "sub/\nb.png", "a\x85.png", "/etc/hostname", "//a.png",
        "\\a.png", "\\\\server\\a.png", "C:\\a.png", "c:a.png", "C:/a.png", "..", "../pics/a.png", "sub/../a.png",
        "sub\\..\\a.png", "sub/..", "out.png", "out/s.png", "beside/s.png", "chain.png", "up/secret/s.png",
        "nowhere.png",
        "gone.png", "gone/a.png", "a.png/", "a.png/b.png", "sub", ".", "in", "x" * 5000, "\ud800.png",
    ],
)  # fmt: skip
def test_any_other_name_is_refused(tree, name):
    assert len(refused(images.inside, tree, name)) < 1000


def test_an_absolute_path_into_the_folder_is_refused(tree):
    assert "leads out" in refused(images.inside, tree, str(tree / "a.png"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tree):
    os.mkfifo(tree / "pipe.png")
    assert "not a file" in refused(images.inside, tree, "pipe.png")


def test_the_folder_itself_may_be_a_link(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    assert images.inside(tmp_path / "link", "in/b.png", WHERE) == tmp_path / "link" / "in" / "b.png"
    assert "a link out of" in refused(images.inside, tmp_path / "link", "out/s.png")


def test_a_relative_folder_is_that_of_the_working_directory(tmp_path, monkeypatch):
    for home in ("one", "two"):
        (tmp_path / home / "pics" / home).mkdir(parents=True)
        (tmp_path / home / "pics" / home / "a.png").write_bytes(b"x")
        monkeypatch.chdir(tmp_path / home)
        assert images.inside(Path("pics"), f"{home}/a.png", WHERE).is_file()


PIECES = ["a.png", "b.png", "s.png", "sub", "deep", "..", ".", "", "in", "out", "up", "pics", "round", "C:", "gone"]


@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=5), slash=st.sampled_from(["/", "/", "\\"]))
def test_exactly_the_plain_paths_to_files_inside_are_taken(tree, pieces, slash):
    name = slash.join(pieces)
    plain = "\\" not in name and name.strip() and name[0] != "/" and ".." not in pieces and pieces[0] != "C:"
    target = (tree / name).resolve()
    allowed = plain and os.path.isfile(f"{tree}/{name}") and target.is_relative_to(tree.resolve())
    try:
        assert images.inside(tree, name, WHERE).resolve() == target
        taken = True
    except UserError:
        taken = False
    assert taken == bool(allowed)


def test_folders_are_resolved_once(tree, monkeypatch):
    calls, real = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **more: calls.append(path) or real(path, **more))
    images._real.cache_clear()
    for _ in range(100):
        images.inside(tree, "sub/b.png", WHERE)
    assert len(calls) == 2


# Turning

UPRIGHT = {  # by the definition in EXIF 2.32: where row 0 and column 0 of what is stored are seen
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda a: a.swapaxes(0, 1)[::-1],  # left, bottom
}


def chunks(png):
    at = 8
    while at < len(png):
        end = at + 12 + struct.unpack(">I", png[at : at + 4])[0]
        yield png[at:end]
        at = end


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_exif(kind, picture, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "PNG, EXIF last":  # as ImageMagick writes it
        png = encoded(picture, "PNG", exif=exif)
        parts = list(chunks(png))
        parts.sort(key=lambda part: (part[4:8] == b"IEND", part[4:8] == b"eXIf"))
        assert parts[-2][4:8] == b"eXIf"
        return png[:8] + b"".join(parts)
    how = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(picture, kind, exif=exif, **how)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PNG, EXIF last", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_as_their_exif_says(tmp_path, kind, orientation):
    (tmp_path / "x").write_bytes(with_exif(kind, COLOURS, orientation))
    size, picture = both(tmp_path / "x")
    want = UPRIGHT[orientation](COLOURS)
    assert size == want.shape[1::-1]
    difference = np.abs(np.asarray(picture).astype(int) - want)
    assert difference.mean() < (8 if kind == "JPEG" else 1e-9)
    assert ImageOps.exif_transpose(picture) == picture, "it would be turned twice"


def test_size_decodes_nothing(tmp_path, monkeypatch):
    paths = [saved(tmp_path / kind, COLOURS, kind) for kind in images.FORMATS if kind != "WEBP"]  # libwebp does at once
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert {images.size(path, WHERE) for path in paths} == {(10, 6)}


# Colours


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_other_modes_become_rgb_as_pillow_has_it(tmp_path, mode):
    picture = Image.fromarray(COLOURS).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(COLOURS[..., 0]))
    saved(tmp_path / "x", picture, "TIFF" if mode == "CMYK" else "PNG")
    assert both(tmp_path / "x")[1] == picture.convert("RGB")


def test_transparency_shows_what_is_behind_it(tmp_path):
    palette = Image.fromarray(COLOURS).quantize(8)
    saved(tmp_path / "x", palette, "PNG", transparency=bytes(range(0, 256, 32)))
    assert both(tmp_path / "x")[1] == palette.convert("RGB")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_shown(tmp_path, kind):
    frames = [Image.new("RGB", (9, 5), colour) for colour in ("red", "lime", "blue")]
    saved(tmp_path / "x", frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "x") as animation:
        assert animation.n_frames == 3
    assert np.abs(np.asarray(both(tmp_path / "x")[1]).astype(int) - np.asarray(frames[0])).max() < 5


SIXTEEN = np.array([[0, 1, 255, 256, 0x1234, 0x80FF, 0xFFFF], [257 * v for v in (0, 1, 2, 100, 200, 254, 255)]])


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "PGM"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, mode):
    if mode == "PGM":
        (tmp_path / "x").write_bytes(b"P5 7 2 65535\n" + SIXTEEN.astype(">u2").tobytes())
    else:
        kind = {"I;16": np.uint16, "I;16B": ">u2", "I": np.int32}[mode]
        picture = Image.frombytes(mode, (7, 2), SIXTEEN.astype(kind).tobytes())
        saved(tmp_path / "x", picture, "PNG" if mode == "I;16" else "TIFF")
    pixels = np.asarray(both(tmp_path / "x")[1])
    assert (pixels == (SIXTEEN // 256)[..., None]).all()
    assert pixels[1, :, 0].tolist() == [0, 1, 2, 100, 200, 254, 255], "8 bits written as 16 come back"


@pytest.mark.parametrize(("pixels", "kind"), [([-1, 5], np.int32), ([0, 65536], np.int32), ([0, 1], np.float32)])
def test_pixels_of_unknown_range_are_refused(tmp_path, pixels, kind):
    saved(tmp_path / "x", np.array([pixels], kind), "TIFF")
    assert "8 bits" in refused(images.decode, tmp_path / "x")


def test_a_tiff_that_pillow_turns_against_its_header_is_refused(tmp_path):
    saved(tmp_path / "x", COLOURS, "TIFF", tiffinfo={700: b'<x tiff:Orientation="6"/>'})
    assert images.size(tmp_path / "x", WHERE) == (10, 6)
    assert "header" in refused(images.decode, tmp_path / "x")


@pytest.mark.parametrize("error", [MemoryError(), EOFError(), KeyError("tag"), struct.error("x"), SyntaxError("x")])
def test_whatever_pillow_raises_is_reported(tmp_path, monkeypatch, error):
    def raises(self):
        raise error

    saved(tmp_path / "x", COLOURS, "PNG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", raises)
    assert (str(error) or type(error).__name__) in refused(images.decode, tmp_path / "x")


# Damaged data


@pytest.mark.parametrize("how", [{"compress_level": 0}, {"compress_level": 9}], ids=str)
def test_any_damaged_byte_in_the_data_of_a_png_is_found(tmp_path, how):
    """Pillow's decoder skips the checksums, and with the last line it stops before zlib has compared its own."""
    png = encoded(photo(12, 9), "PNG", **how)
    for at in range(png.index(b"IDAT") - 4, png.index(b"IEND") - 4):
        (tmp_path / "x").write_bytes(png[:at] + bytes([png[at] ^ 1 << at % 8]) + png[at + 1 :])
        assert isinstance(outcomes(tmp_path / "x")[1], str), at


def photo(width, height, seed=0):
    """Soft shapes and some noise, so that its blocks have data of many lengths."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.integers(-9, 10, pixels.shape)).clip(0, 255).astype(np.uint8))


def data_of(jpeg):
    """Where the data of the first scan begin and end, by the definition: a marker is no 0, no restart, no filling."""
    at = 2
    while jpeg[at + 1] != 0xDA:
        at += 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
    begin = at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
    end = begin
    while jpeg[end] != 0xFF or jpeg[end + 1] in (0, 0xFF, *range(0xD0, 0xD8)):
        end += 1
    return begin, end


def refusal(path, jpeg):
    """Why a JPEG is not decoded; "" if it is."""
    path.write_bytes(jpeg)
    size, picture = outcomes(path)
    assert lawful(size, picture)
    assert not isinstance(size, str), "the header and the end are sound"
    return picture if isinstance(picture, str) else ""


@given(
    sides=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    kind=st.sampled_from(["JPEG", "MPO"]),
    how=st.fixed_dictionaries(
        {"quality": st.integers(1, 100), "subsampling": st.integers(0, 2)},
        optional={
            "optimize": st.just(True), "progressive": st.just(True), "restart_marker_blocks": st.integers(1, 9),
        },
    ),
)  # fmt: skip
def test_a_sound_jpeg_has_pillows_own_pixels(scratch, sides, mode, kind, how):
    jpeg = encoded(photo(*sides).convert(mode), kind, **how)
    scratch.write_bytes(jpeg)
    assert both(scratch)[1].tobytes() == Image.open(BytesIO(jpeg)).convert("RGB").tobytes()


@pytest.mark.parametrize("between", [b"\xff" * 50, b"\0", b"\xab" * 7], ids=["ff", "0", "ab"])
def test_a_few_bytes_between_the_data_of_a_jpeg_and_its_end_are_allowed(tmp_path, between):
    """As some cameras write them. A marker may have any number of 0xFF before it."""
    for side in range(4, 60):  # the last block ends anywhere in the last byte
        jpeg = encoded(photo(side, side), "JPEG")
        end = data_of(jpeg)[1]
        assert not refusal(tmp_path / "x", jpeg[:end] + between + jpeg[end:])


def test_a_jpeg_that_has_a_scan_for_each_colour_is_read(tmp_path):
    """As a scan of one colour's own JPEG, with a header that names three."""
    planes = [encoded(plane, "JPEG") for plane in photo(30, 20).convert("YCbCr").split()]
    jpeg = planes[0][: planes[0].index(b"\xff\xda")]
    one, three = b"\0\x0b\x08\0\x14\0\x1e\1\1\x11\0", b"\0\x11\x08\0\x14\0\x1e\3\1\x11\0\2\x11\0\3\x11\0"
    assert one in jpeg
    jpeg = jpeg.replace(one, three)
    for number, plane in enumerate(planes, 1):
        begin, end = data_of(plane)
        jpeg += b"\xff\xda\0\x08\1" + bytes([number]) + b"\0\0\x3f\0" + plane[begin:end]
    assert not refusal(tmp_path / "x", jpeg + b"\xff\xd9")
    found = np.asarray(both(tmp_path / "x")[1]).astype(int)
    assert np.abs(found - np.asarray(photo(30, 20))).mean() < 12


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_with_more_or_less_data_than_its_blocks_have_is_refused(tmp_path, kind, subsampling):
    """Without error Pillow shows grey, or a shifted picture. Data in which a part is doubled or missing are such."""
    jpeg = encoded(photo(200, 150), kind, subsampling=subsampling)
    begin, end = data_of(jpeg)
    for share in (0.2, 0.5, 0.8):
        at = begin + int(share * (end - begin))
        for damaged in (jpeg[:at] + jpeg[at + 200 :], jpeg[:at] + jpeg[at - 200 :]):
            Image.open(BytesIO(damaged)).load()
            assert refusal(tmp_path / "x", damaged)


def test_nearly_every_jpeg_with_200_damaged_bytes_is_refused(tmp_path):
    jpeg = encoded(photo(200, 150), "JPEG")
    begin, end = data_of(jpeg)
    rng, found, silent = np.random.default_rng(0), 0, 0
    for _ in range(60):
        at = rng.integers(begin, end - 200)
        damaged = jpeg[:at] + rng.bytes(200) + jpeg[at + 200 :]
        found += bool(refusal(tmp_path / "x", damaged))
        try:
            Image.open(BytesIO(damaged)).load()
            silent += 1
        except OSError:
            pass
    assert silent > 20, "of which Pillow says nothing"
    assert found >= 54


def test_a_marker_amid_the_data_is_refused(tmp_path):
    jpeg = encoded(photo(60, 40), "JPEG")
    at = sum(data_of(jpeg)) // 2
    for marker in (b"\xff\xd9", b"\xff\xe3\0\4\0\0"):
        assert refusal(tmp_path / "x", jpeg[:at] + marker + jpeg[at:])


@pytest.mark.parametrize("row", [1, 4, 7])
def test_a_jpeg_that_lacks_a_part_with_a_restart_marker_is_refused(tmp_path, row):
    """The decoder finds its way again after the next one, and the data end where they should."""
    jpeg = encoded(photo(200, 150), "JPEG", restart_marker_rows=1)
    begin, end = data_of(jpeg)
    marks = [begin + at for at in range(end - begin) if jpeg[begin + at] == 0xFF and jpeg[begin + at + 1] != 0]
    assert len(marks) == 9, "ten rows of blocks"
    damaged = jpeg[: marks[row] - 50] + jpeg[marks[row] + 50 :]
    Image.open(BytesIO(damaged)).load()
    assert "damaged" in refusal(tmp_path / "x", damaged)


# Large JPEGs


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_beyond_the_limit_has_half_its_sides(tmp_path, monkeypatch, orientation, progressive):
    """Its pixels are the means of four, which is what half of each side's frequencies are, nearly."""
    picture, exif = photo(121, 90), Image.Exif()
    exif[0x0112] = orientation
    saved(tmp_path / "x", picture, "JPEG", quality=95, exif=exif, progressive=progressive)
    whole = np.asarray(both(tmp_path / "x")[1]).astype(int)
    monkeypatch.setattr(images, "MOST_PIXELS", 121 * 90 - 1)
    size, half = both(tmp_path / "x")
    assert size == ((61, 45) if orientation == 1 else (45, 61))
    even = np.pad(whole, [(0, n % 2) for n in whole.shape[:2]] + [(0, 0)], mode="edge")
    means = even.reshape(size[1], 2, size[0], 2, 3).mean((1, 3))
    assert np.abs(np.asarray(half) - means).mean() < 4  # of 255
    monkeypatch.setattr(images, "MOST_PIXELS", 121 * 90)
    assert (np.asarray(both(tmp_path / "x")[1]) == whole).all()
    monkeypatch.setattr(images, "MOST_PIXELS", 61 * 45 - 1)
    assert "make it smaller" in refused(images.size, tmp_path / "x")


def test_a_phones_108_megapixels_are_taken(tmp_path):
    jpeg = encoded(photo(40, 30), "JPEG")
    header = b"\xff\xc0\0\x11\x08" + struct.pack(">HH", 30, 40)
    assert header in jpeg
    (tmp_path / "x").write_bytes(jpeg.replace(header, header[:5] + struct.pack(">HH", 9000, 12_000)))
    assert images.size(tmp_path / "x", WHERE) == (6000, 4500)


# Files that are not what they should be


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_001, 10_000), (14_000, 14_000), (2**31 - 1, 2**31 - 1), (0, 9), (9, 0)])
def test_bombs_and_empty_pictures_are_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(png_header(*size))
    assert both(tmp_path / "x") == (None, None)
    assert ("pixels" if min(size) else "not a picture") in refused(images.size, tmp_path / "x")


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (1, 10_000), (100_000, 3)])
def test_a_picture_too_thin_to_be_made_square_is_refused(tmp_path, size):
    """LLaVA-1.5's processor makes the short side 336 first: of 1 x 10,000 pixels that would be more than a billion."""
    saved(tmp_path / "x", Image.new("L", size), "PNG")
    assert "too thin" in refused(images.size, tmp_path / "x")
    assert "too thin" in refused(images.decode, tmp_path / "x")
    saved(tmp_path / "x", Image.new("L", (1, 200)), "PNG")
    assert both(tmp_path / "x")[0] == (1, 200)


def test_a_hundred_megapixels_are_not_a_bomb(tmp_path):
    (tmp_path / "x").write_bytes(png_header(10_000, 10_000))
    assert both(tmp_path / "x") == ((10_000, 10_000), None)  # there are no pixels in this one


def test_a_tiff_bomb_is_refused(tmp_path):
    tiff = encoded(COLOURS, "TIFF")
    for tag, side in ((256, 10), (257, 6)):  # width and height
        old, new = (struct.pack("<HHII", tag, 4, 1, value) for value in (side, 60_000))
        assert old in tiff
        tiff = tiff.replace(old, new)
    (tmp_path / "x").write_bytes(tiff)
    assert both(tmp_path / "x") == (None, None)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "JPEG2000", "PCX", "SGI"])
def test_formats_beyond_the_list_are_refused(tmp_path, kind):
    saved(tmp_path / "x.png", Image.fromarray(COLOURS), kind)
    assert "JPEG" in refused(images.size, tmp_path / "x.png")
    assert "JPEG" in refused(images.decode, tmp_path / "x.png")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_the_content_counts_and_not_the_name(tmp_path, kind):
    saved(tmp_path / "x.eps", COLOURS, kind)
    assert both(tmp_path / "x.eps")[0] == (10, 6)


def test_what_cannot_be_opened_is_refused(tmp_path):
    assert "x.png" in refused(images.size, tmp_path / "x.png")
    assert "cannot read" in refused(images.decode, tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    assert "not a picture" in refused(images.size, tmp_path / "x.png")


def camera_jpeg(side=4):
    """With a thumbnail in its header, which has an end marker of its own."""
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9"  # a description
    jpeg = encoded(COLOURS, "JPEG")
    block = b"Exif\0\0" + exif.tobytes()[6:] + encoded(np.zeros((side, side, 3), np.uint8), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def all_kinds():
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - COLOURS)]}
    return {
        "JPEG": encoded(COLOURS, "JPEG"),
        "progressive JPEG": encoded(COLOURS, "JPEG", progressive=True),
        "camera JPEG": camera_jpeg(),
        "PNG": encoded(COLOURS, "PNG"),
        "PNG, EXIF last": with_exif("PNG, EXIF last", COLOURS, 6),
        "WEBP": encoded(COLOURS, "WEBP"),
        "lossless WEBP": encoded(COLOURS, "WEBP", lossless=True),
        "moving WEBP": encoded(COLOURS, "WEBP", **frames),
        "GIF": encoded(COLOURS, "GIF"),
        "moving GIF": encoded(COLOURS, "GIF", **frames),
        "MPO": encoded(Image.fromarray(COLOURS), "MPO", **frames),
        "BMP": encoded(COLOURS, "BMP"),
        "TIFF": with_exif("TIFF", COLOURS, 6),
        "packed TIFF": encoded(COLOURS, "TIFF", compression="tiff_lzw"),
        "PPM": encoded(COLOURS, "PPM"),
    }


KINDS = all_kinds()
UNMARKED = ("BMP", "TIFF", "packed TIFF", "PPM")  # nothing in these says where they end


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_read(tmp_path, kind):
    (tmp_path / "x").write_bytes(KINDS[kind])
    assert both(tmp_path / "x")[1] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(tmp_path, kind):
    path, whole = tmp_path / "x", KINDS[kind]
    path.write_bytes(whole)
    wanted = both(path)[1]
    places = range(len(whole))
    for end in {*places[:40], *places[::11], *places[-40:]}:
        path.write_bytes(whole[:end])
        size, picture = both(path)
        # Of an MPO the first picture may be whole; of a PNG only the end marker's checksum may be missing.
        if (kind == "MPO" and size) or ("PNG" in kind and end >= len(whole) - 4):
            assert picture == wanted
        elif kind in UNMARKED:
            assert picture is None or picture == wanted  # some end with padding
        else:
            assert size is picture is None, f"{end} of {len(whole)} bytes are taken for a picture"


@pytest.mark.parametrize("kind", ["JPEG", "camera JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("extra", [b"\0", b"\r\n", b"\0" * 100_000])
def test_padding_behind_a_picture_is_allowed(tmp_path, kind, extra):
    (tmp_path / "x").write_bytes(KINDS[kind] + extra)
    assert both(tmp_path / "x")[1] is not None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_film_behind_a_photo_is_allowed(tmp_path, kind):
    film = RNG.integers(0, 100, 3000 if kind == "PNG" else 200_000, dtype=np.uint8).tobytes()
    (tmp_path / "x").write_bytes(KINDS[kind] + film)
    assert both(tmp_path / "x")[1] is not None


def test_a_large_photo_cut_short_is_refused_by_its_header(tmp_path):
    noise = encoded(RNG.integers(0, 256, (300, 300, 3), dtype=np.uint8), "JPEG", quality=95)
    assert len(noise) > 2 * images.TAIL // 3
    for end in (len(noise) // 4, len(noise) - 2):
        (tmp_path / "x").write_bytes(noise[:end])
        assert "cut short" in refused(images.size, tmp_path / "x")


@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_damaged_files_are_pictures_or_errors(scratch, data, kind):
    content = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    scratch.write_bytes(content)
    assert lawful(*outcomes(scratch))


@given(start=st.sampled_from([content[:n] for content in KINDS.values() for n in (0, 8, 30, 60)]), rest=st.binary())
def test_arbitrary_bytes_are_pictures_or_errors(scratch, start, rest):
    scratch.write_bytes(start + rest)
    assert lawful(*outcomes(scratch))
