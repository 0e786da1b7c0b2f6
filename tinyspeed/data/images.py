"""Pictures from strangers: a name becomes a file inside one folder, and a file becomes upright RGB, or it is an error.

    name --inside--> path --size----> (width, height)   from the header, so that hundreds of thousands can be measured
                     path --decode--> the pixels        of exactly that size

A picture is what transformers' `load_image` makes of it: its first frame, turned as its EXIF says, converted to RGB by
Pillow. Two things differ: 16-bit grey, which that conversion clips to white, is scaled to 8 bits; and a JPEG of more
than `MOST_PIXELS`, which a phone may take, is decoded at half its sides, so that memory never holds all of it.

Damage in the middle of a file is found in every PNG by checksums and, if it is large, in most JPEGs (`_load_jpeg`). A
progressive JPEG, a GIF, WEBP, TIFF, BMP or PPM may decode to wrong pixels without an error, since nothing in it says
what is right.
"""

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from ..util import UserError, files, require
from ..util.paths import CONTROL

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # none of them is a program, as EPS is
MOST_PIXELS = 100_000_000
MOST_LONG = 200  # long to short side: LLaVA-1.5's processor makes the short side 336, and 1 x 10,000 would be 11 GB
TAIL = 1 << 16  # bytes at the end of a file that are searched for its end marker; cameras' EXIF fits in too
SLACK = 8  # so many bytes behind its last block are too many in a JPEG; some cameras write one or two
AHEAD = b"\xff\0" * 8  # as many as libjpeg looks ahead; ones, which are no code
TURNS = {  # by EXIF's orientation; 1 is upright
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
ENDS = {  # whether the end of a file has its format's end marker; others have none, and WEBP is read as a whole
    "JPEG": lambda tail: b"\xff\xd9" in tail,
    "MPO": lambda tail: b"\xff\xd9" in tail,
    "PNG": lambda tail: b"IEND" in tail,
    "GIF": lambda tail: tail.rstrip(b"\0\r\n").endswith(b"\0;"),
}
_MARKER = re.compile(rb"\xff([^\0\1\xff\xd0-\xd8])")  # of a JPEG, less those that may stand amid its data
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_OUTWARDS = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")  # by the rules of POSIX and of Windows


def inside(folder: Path, name: str, where: str) -> Path:
    """The file `name` in `folder`. Links may point anywhere within the folder, but not out of it."""
    if not isinstance(name, str) or not name.strip() or CONTROL.search(name):
        raise UserError(f"{where}: {name!r:.300} is not a file name")
    if _OUTWARDS.search(name):
        raise UserError(f"{where}: {name!r:.300} leads out of the picture folder; give its path relative to {folder}")
    path = os.path.join(folder, name)
    try:
        found, here = os.lstat(path), os.getcwd()
        home, real = _real(os.path.join(here, folder)), _real(os.path.join(here, os.path.dirname(path)))
        if stat.S_ISLNK(found.st_mode):
            found, real = os.stat(path), os.path.realpath(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: cannot find the picture {name!r:.300} in {folder}: {reason}") from error
    if real != home and not real.startswith(os.path.join(home, "")):
        raise UserError(f"{where}: {name!r} is a link out of {folder}, to {real}; copy the pictures into the folder")
    require(stat.S_ISREG(found.st_mode), f"{where}: {name!r} in {folder} is not a file")
    return Path(path)


@lru_cache(1 << 16)
def _real(folder: str) -> str:
    """The folder without links. Cached, since resolving the folders of every picture would cost more than the rest."""
    return os.path.realpath(folder)


def size(path: Path, where: str) -> tuple[int, int]:
    """The width and height of the decoded picture, from the header. A file that is visibly cut short is an error."""
    with _opened(path, where) as (_, _, upright):
        return upright


def decode(path: Path, where: str) -> Image.Image:
    """The picture: decoded, upright, RGB."""
    with _opened(path, where) as (image, orientation, upright):
        if image.format in ("JPEG", "MPO"):
            _load_jpeg(image)
        if image.format == "PNG":
            with Image.open(path, formats=["PNG"]) as again:
                again.verify()  # the checksums of its data, which decoding leaves out
        picture = _eight_bits(image).convert("RGB")
        if orientation in TURNS:
            picture = picture.transpose(TURNS[orientation])
        if picture.size != upright:
            raise ValueError(f"its header says that it has {upright} pixels, but it has {picture.size}")
        picture.info.clear()  # otherwise whoever reads its EXIF next would turn it again
        return picture


@contextmanager
def _opened(path: Path, where: str) -> Iterator[tuple[Image.Image, int | None, tuple[int, int]]]:
    """A picture of which only the header was read, its orientation by its EXIF, and its size when it is upright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that matter are errors here
        try:
            with open(path, "rb", opener=files.regular) as file:
                image = Image.open(file, formats=FORMATS)
                width, height = image.size
                if width * height > MOST_PIXELS:
                    image.draft(None, (width // 2, height // 2))  # of a JPEG; others stay as they are
                    width, height = image.size
                if width * height > MOST_PIXELS:
                    raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}; make it smaller")
                if max(width, height) > MOST_LONG * min(width, height):
                    raise ValueError(f"it has {width} x {height} pixels, too thin to be made square; cut it in pieces")
                tail = _tail(image.format, file)
                if image.format == "PNG" and b"eXIf" in tail:  # after the pixels, where ImageMagick writes it
                    image.load()
                # Not image.getexif(): that decodes the pixels of every PNG to look after them.
                orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
                if image.format == "TIFF":  # Pillow turns these by itself
                    orientation = None
                yield image, orientation, (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        except UnidentifiedImageError as error:
            raise UserError(f"{where}: {path} is not a picture, or not one of {', '.join(FORMATS)}") from error
        except Exception as error:  # on a broken file Pillow raises nearly anything
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{where}: cannot read the picture {path}: {reason}") from error


def _tail(kind: str, file: BinaryIO) -> bytes:
    """The end of a file of which the header was read. A missing end marker is an error."""
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    for at in (max(start, end - TAIL), start):  # some phones append a film, so all of the file is searched
        file.seek(at)
        tail = file.read()
        if kind not in ENDS or ENDS[kind](tail):
            return tail
    raise ValueError("it is cut short, its end is missing; copy it again")


def _load_jpeg(image: Image.Image) -> None:
    """Decodes a JPEG, and refuses one whose data do not end where its last block does.

    Damaged data are read as other blocks, and seldom as equally many. Then the decoder wants more data than there are,
    or leaves some, but libjpeg's warnings are lost in Pillow. So the decoder gets the data without the end marker:
    first all but the last `SLACK` bytes, then these and what it may look ahead. It must want both, and nothing more.
    After a restart marker blocks are counted anew, but these are numbered, so that one which is lost is missed.
    A progressive JPEG has several scans, and markers between them that the decoder needs, so it is only decoded.

    Tried on four photos of 336 to 1,280 pixels, about 190 damages of each kind: with one wrong byte this finds 29 %
    (the others still have as many blocks), with 20 wrong bytes 60 %, with 200 wrong bytes 95 %, and with 4,096 that are
    lost or zero 98 to 100 %. Pillow alone finds 0, 5, 45 and 0 %.
    """
    image.fp.seek(0)
    jpeg, at, kinds = image.fp.read(), 2, b""
    while not kinds.endswith(b"\xda") and (found := _MARKER.search(jpeg, at)):  # up to the data of the first scan
        kinds, at = kinds + found[1], found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    if found and {0xC0, 0xC1} & {*kinds} and jpeg[found.end() + 2] == image.layers:  # sequential, in a single scan
        data = jpeg[: _MARKER.search(jpeg, at).start()].rstrip(b"\xff")
        image.fp = file = BytesIO(data + AHEAD)
        image.decodermaxblock = first = max(at, len(data) - SLACK)  # so much Pillow reads at once
        image.load()
        restarts = b"".join(_RESTART.findall(data, at))
        numbered = restarts == (bytes(range(0xD0, 0xD8)) * len(restarts))[: len(restarts)]
        if file.tell() == first or not numbered:
            raise ValueError("it is damaged in the middle; copy it again")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to its high bytes, which is also what Pillow keeps of 16-bit colours."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels have more than 16 bits; save it with 8 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))
