"""Pictures of every format and colour mode, headers with a false size, and files that are not pictures."""

import io
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from support.hostile import Code

ORIENTATION = 0x0112  # in EXIF


def coloured(pixels: np.ndarray, colours: str) -> tuple[Image.Image, np.ndarray]:
    """The picture in another colour mode, and its pixels in RGB."""
    picture = Image.fromarray(pixels)
    if colours == "16":
        grey = pixels[..., 0].astype(np.uint16) * 257
        return Image.fromarray(grey), np.repeat(pixels[..., :1], 3, axis=2)
    picture = picture.convert(colours)
    if colours in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(pixels[..., 1]))
    return picture, np.asarray(picture.convert("RGB"))


def encoded(picture: Image.Image, kind: str, **how) -> bytes:
    kind, _, more = kind.partition(" ")
    how |= {
        "lossless": {"lossless": True, "exact": True}, "lzw": {"compression": "tiff_lzw"},
        "packbits": {"compression": "packbits"}, "deflate": {"compression": "tiff_adobe_deflate"},
        "jpeg": {"compression": "jpeg"}, "group4": {"compression": "group4"}, "progressive": {"progressive": True},
        "moving": {"save_all": True, "append_images": [picture.transpose(1), picture]},
        "interlaced": {"interlace": 1}, "optimised": {"optimize": True},
    }.get(more, {})  # fmt: skip
    if kind == "APNG":
        kind, how = "PNG", {**how, "save_all": True, "append_images": [picture.transpose(1)]}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def every_kind(pixels: np.ndarray) -> dict[str, bytes]:
    """The same picture in every format and colour mode, with and without an EXIF orientation."""
    found = {}
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    kinds = (
        "JPEG", "JPEG progressive", "JPEG optimised", "PNG", "APNG", "GIF", "GIF interlaced", "GIF moving", "WEBP",
        "WEBP lossless", "WEBP moving", "BMP", "TIFF", "TIFF lzw", "TIFF packbits", "TIFF deflate", "TIFF jpeg",
        "TIFF group4", "TIFF moving", "PPM", "MPO moving",
    )  # fmt: skip
    for kind in kinds:
        for colours in ("RGB", "L", "1", "RGBA", "LA", "P", "CMYK", "16"):
            for how in ({}, {"exif": exif}):
                try:
                    found[f"{kind} {colours}{' turned' * bool(how)}"] = encoded(
                        coloured(pixels, colours)[0], kind, **how
                    )
                except (OSError, ValueError, KeyError, TypeError, RuntimeError, SystemError):
                    continue  # the format does not have this colour mode
    return found


@cache
def zeros(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_size(kind: str, content: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header."""
    made, short = bytearray(content), lambda side: min(side, 65_535)
    if kind.startswith("PNG"):
        return content[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + content[24:29]) + content[33:]
    if kind.startswith("JPEG"):
        at = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        made[at + 5 : at + 9] = struct.pack(">HH", short(height), short(width))
    elif kind.startswith("GIF"):
        made[6:10] = struct.pack("<HH", short(width), short(height))
    elif kind.startswith("BMP"):
        made[18:26] = struct.pack("<II", width, height)
    elif kind.startswith("PPM"):
        return content.replace(b"14 9", f"{width} {height}".encode(), 1)
    elif kind.startswith("WEBP") and content[12:16] == b"VP8X":
        made[24:30] = struct.pack("<I", width % 2**24)[:3] + struct.pack("<I", height % 2**24)[:3]
    elif kind.startswith("WEBP"):
        made[26:30] = struct.pack("<HH", short(width), short(height))
    else:
        for tag, side in ((256, width), (257, height)):
            at = content.find(struct.pack("<HHI", tag, 4, 1))
            at = at if at >= 0 else content.find(struct.pack("<HHI", tag, 3, 1))
            made[at + 2 : at + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(made)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("a.png", b"x")
    return buffer.getvalue()


NOT_PICTURES = {
    "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%id) (r) file\n%%EOF\n",
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "pickle": Code(Path("/nowhere/evil")).pickle,
    "zip": zipped(),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(40),
    "ELF": b"\x7fELF\2\1\1" + bytes(60),
    "script": b"#!/bin/sh\ntouch /nowhere/evil\n",
    "ICO": b"\0\0\1\0\1\0\x09\x09\0\0\1\0\x20\0\x16\0\0\0\x16\0\0\0" + bytes(40),
    "PSD": b"8BPS\0\1" + bytes(40),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"END",
    "XPM": b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "a c #fff", "a"};',
    "MP4": b"\0\0\0\x18ftypmp42" + bytes(40),
    "AVIF": b"\0\0\0\x1cftypavif" + bytes(40),
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "JSON": b'{"error": "rate limited"}',
    "text": b"P6 is not what this is",
    "empty": b"",
    "zeros": bytes(5000),
}
