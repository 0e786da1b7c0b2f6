"""Pictures that are cut, damaged, of a false size or not pictures at all, and file names that lead elsewhere.

A sound picture is compared with the pixels that were put in, turned as EXIF's definition says; a damaged one with what
Pillow itself reads, if it is no JPEG; one that was cut with the whole one.
"""

import io
import os
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from slow.attacks.damaged_input import mutations
from slow.attacks.damaged_input.cases import Case
from slow.attacks.damaged_input.file_names import drawn_name, fill
from slow.attacks.damaged_input.image_files import (
    NOT_PICTURES,
    ORIENTATION,
    chunk,
    coloured,
    encoded,
    every_kind,
    with_size,
    zeros,
)

from tinyspeed import UserError
from tinyspeed.data import images

WHERE = "a.json: record 3 (id b)"
UPRIGHT: dict[int, Callable] = {  # EXIF 2.32: where row 0 and column 0 of the stored pixels are shown
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1], 8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip
LOSSLESS = ("PNG", "TIFF", "BMP", "PPM", "WEBP lossless", "TIFF lzw", "TIFF deflate", "TIFF packbits", "APNG")
MARKED = ("JPEG", "PNG", "GIF", "WEBP", "APNG")  # formats that have an end mark, so that a cut file is found out


class Part:
    def __init__(self, home: Path):
        self.home, self.folder = home, home / "pictures"
        self.folder.mkdir()
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (9, 14, 3), dtype=np.uint8)
        self.files = every_kind(self.pixels)
        self.wholes = {}
        self.names = fill(self.folder, home)

    def case(self, draw: random.Random) -> Case:
        damages = (
            self.turned, self.cut, self.damaged, self.damaged, self.false_size, self.decompression_bomb,
            self.not_a_picture, self.file_name, self.file_name, self.extreme_shape,
        )  # fmt: skip
        return draw.choice(damages)(draw)

    def made(self, kind: str, content: bytes, act: Callable, note: str, **more) -> Case:
        path = self.folder / "x"
        path.write_bytes(content)
        return Case(kind, lambda: act(path), names=(WHERE,), opens=(path,), note=note, **more)

    def turned(self, draw: random.Random) -> Case:
        kind = draw.choice((*LOSSLESS, "JPEG"))
        colours = draw.choice(("RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "16"))
        turn = draw.choice((*UPRIGHT, *UPRIGHT, 0, 9, 65535, "6", b"\6", -1, 2.5))
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        picture, want = coloured(self.pixels, colours)
        try:
            content = encoded(picture, kind, exif=exif)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error):
            return self.turned(draw)  # the format does not have this colour mode, or no EXIF
        want = UPRIGHT[turn](want) if turn in UPRIGHT and kind not in ("BMP", "PPM") else want
        # Pillow clips 16 bits that it writes to WEBP, and rounds palettes there: then the file has other pixels.
        exact = kind != "JPEG" and not (kind == "WEBP lossless" and colours in ("P", "1", "16"))

        def act(path: Path) -> None:
            got = both(path)
            if type(turn) is int:  # nobody knows what other values mean
                assert got.shape == want.shape, f"{got.shape} instead of {want.shape}"
                assert not exact or (got == want).all(), "other pixels"

        must = "work" if type(turn) is int else ""
        return self.made("turned by EXIF", content, act, f"{kind} {colours} {turn!r}", must=must)

    def cut(self, draw: random.Random) -> Case:
        kind = draw.choice(sorted(self.files))
        content = self.files[kind]
        size = len(content)
        end = max(0, draw.choice((draw.randrange(size), draw.randrange(min(64, size)), size - draw.randrange(1, 9))))
        filled = draw.random() < 0.3
        damaged = content[:end] + bytes(size - end) * filled
        known = kind.split()[0] in MARKED and not (filled and "WEBP" in kind)

        def act(path: Path) -> None:
            if known:  # found before training, by its header and end alone: when it is decoded it is too late
                images.size(path, WHERE)
                try:
                    images.decode(path, WHERE)
                except UserError as error:
                    raise AssertionError(f"a cut file is found only when it is decoded: {error}") from error
            got = both(path)
            whole = self.whole(kind)
            assert not known or (got.shape == whole.shape and (got == whole).all()), "half a picture was accepted"

        return self.made("cut", damaged, act, f"{kind} at {end} of {size}, zeros {filled}")

    def damaged(self, draw: random.Random) -> Case:
        kind = draw.choice(sorted(self.files))
        content, note = self.files[kind], kind
        for _ in range(draw.choice((1, 1, 2, 4))):
            content, what = mutations.mutate_bytes(draw, content)
            note += "; " + what
        return self.made("damaged", content, lambda path: both(path, oracle=_exact(kind)), note)

    def false_size(self, draw: random.Random) -> Case:
        """A header with another size, and the right checksum for it."""
        formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")
        kind = draw.choice([kind for kind in self.files if kind.split()[0] in formats])
        sides = (
            0, 1, 13, 15, 255, 256, 4095, 9999, 10_000, 16_383, 30_000, 65_500, 65_535, 2**24 - 1, 2**31 - 1,
            2**32 - 1,
        )  # fmt: skip
        width, height = draw.choice(sides), draw.choice(sides)
        content = with_size(kind, self.files[kind], width, height)
        return self.made(
            "false size", content, lambda path: both(path, oracle=_exact(kind)), f"{kind} says {width} x {height}"
        )

    def decompression_bomb(self, draw: random.Random) -> Case:
        size = draw.choice((1 << 20, 1 << 25, 1 << 27))
        packed = zeros(size)
        png = self.files["PNG RGB"]
        extra = {
            "zTXt": chunk(b"zTXt", b"Comment\0\0" + packed),
            "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed),
            "iCCP": chunk(b"iCCP", b"icc\0\0" + packed),
            "tEXt": chunk(b"tEXt", b"a\0" + bytes(1 << 20)) * 80,
            "eXIf": chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\xff" * 5000),
            "length": struct.pack(">I", 2**31 - 1) + b"tEXt" + bytes(20),
            "IDAT": b"",
            "fdAT": chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        }
        what, behind = draw.choice(sorted(extra)), draw.random() < 0.3
        if what == "IDAT":  # few bytes, many pixels, and a true header
            side = draw.choice((3000, 9999, 20_000))
            pixels = zeros((side // 8 + 2) * side)
            content = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
            content += chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        else:
            at = png.index(b"IEND") - 4 if behind else 33
            content = png[:at] + extra[what] + png[at:]

        def act(path: Path) -> None:
            both(path, oracle=what != "IDAT")

        return self.made("decompression bomb", content, act, f"{what} of {size}, behind {behind}", seconds=60)

    def not_a_picture(self, draw: random.Random) -> Case:
        kind = draw.choice(sorted(NOT_PICTURES))
        magic = draw.choice((
            b"", b"", b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"P6\n",
            b"RIFF\0\0\0\0WEBP",
        ))  # fmt: skip
        content = magic + NOT_PICTURES[kind]
        return self.made("not a picture", content, both, f"{kind} behind {magic!r}", must="refuse")

    def file_name(self, draw: random.Random) -> Case:
        name = draw.choice(sorted(self.names)) if draw.random() < 0.5 else drawn_name(draw)
        real = os.path.realpath(self.folder / name) if "\0" not in name else ""

        def act() -> None:
            path = images.inside(self.folder, name, WHERE)
            assert str(path.resolve()).startswith(f"{self.folder.resolve()}/"), "it leads out of the folder"
            assert not os.path.isabs(name)
            assert ".." not in name.replace("\\", "/").split("/"), "it looks as if it led out of the folder"
            both(path)

        must = {True: "work", False: "refuse", None: ""}[self.names.get(name)]
        note = f"{name!r:.80} to {real:.80}"
        return Case("file name", act, names=(WHERE,), opens=(self.folder,), note=note, must=must)

    def extreme_shape(self, draw: random.Random) -> Case:
        """What the processor with the largest pictures makes of it must fit into any machine."""
        short, long = draw.choice((1, 2, 7)), draw.choice((100, 199, 200, 1000, 1401, 10_000, 1_000_000))
        size = (short, long) if draw.random() < 0.5 else (long, short)
        content = encoded(Image.new("L", size), draw.choice(("PNG", "GIF", "PPM")) if long < 65_000 else "PNG")

        def act(path: Path) -> None:
            width, height = images.size(path, WHERE)
            made = 336 * 336 * max(width, height) / min(width, height)
            assert made < images.MOST_PIXELS, f"scaled to 336 it has {made:,.0f} pixels"
            both(path)

        return self.made("extreme shape", content, act, f"{size}")

    def whole(self, kind: str) -> np.ndarray:
        if kind not in self.wholes:
            self.wholes[kind] = reading(io.BytesIO(self.files[kind]))
        return self.wholes[kind]


def _exact(kind: str) -> bool:
    """Whether a damaged file has the pixels that Pillow reads. A JPEG may lack a block, which is then filled."""
    return kind.split()[0] not in ("JPEG", "MPO")


def both(path: Path, oracle: bool = True) -> np.ndarray:
    """Returns the pixels, which are compared with what Pillow alone reads, and their size with what `size` said."""
    size, picture = images.size(path, WHERE), images.decode(path, WHERE)
    assert (picture.mode, picture.size) == ("RGB", size), f"{picture.mode} {picture.size}, but `size` said {size}"
    got = np.asarray(picture)
    if oracle:
        want = reading(path)
        assert got.shape == want.shape, f"{got.shape}, but Pillow has {want.shape}"
        assert (got == want).all(), "other pixels than Pillow's"
    return got


def reading(file) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # From memory: Pillow does not turn a file that it maps.
        picture = Image.open(io.BytesIO(file.read_bytes()) if isinstance(file, Path) else file)
        picture.load()

        if picture.format != "TIFF":
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            picture = Image.fromarray((np.asarray(picture).astype(np.int64) // 256).astype(np.uint8))
        return np.asarray(picture.convert("RGB"))
