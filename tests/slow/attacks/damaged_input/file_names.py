"""A folder of pictures with everything in it that a file name may lead to, and names that try to lead out of it."""

import os
import random
import socket
from pathlib import Path

from PIL import Image
from slow.attacks.damaged_input.image_files import encoded


def fill(folder: Path, home: Path) -> dict[str, bool]:
    """Put all kinds of things into the folder. Returns names, and whether each may be used."""
    picture = encoded(Image.new("RGB", (5, 4), "red"), "PNG")
    (home / "secret.png").write_bytes(picture)
    (folder / "deep" / "er").mkdir(parents=True)
    good = (
        "a.png", "deep/a.png", "deep/er/a b.png", "é.png", "e\u0301.png", "😀.png", "a.PNG", "CON.png", "-rf",
        "a;b.png", "%2e%2e.png", "a\u202eb.png", "...", "a..b.png", "~", "$HOME", "*.png", "a" * 250,
    )  # fmt: skip
    for name in good:
        (folder / name).write_bytes(picture)
    (folder / "within.png").symlink_to("deep/a.png")
    (folder / "out.png").symlink_to(home / "secret.png")
    (folder / "up.png").symlink_to("../secret.png")
    (folder / "out").symlink_to(home)
    (folder / "etc").symlink_to("/etc")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "ping").symlink_to("pong")
    (folder / "pong").symlink_to("ping")
    (folder / "null.png").symlink_to("/dev/null")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "stdin.png").symlink_to("/dev/stdin")
    (folder / "self.png").symlink_to("/proc/self/mem")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "to-pipe.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(folder)  # the name of a socket must be short
        made.bind("socket.png")
        os.chdir(here)
    bad = (
        "out.png", "up.png", "out/secret.png", "etc/passwd", "loop.png", "ping", "ping/a.png", "null.png",
        "zero.png", "stdin.png", "self.png", "gone.png", "pipe.png", "to-pipe.png", "socket.png", "deep", "deep/", ".",
        "..", "../secret.png", "deep/../../secret.png", str(home / "secret.png"), "/etc/passwd", "//etc/passwd",
        "C:\\a.png", "c:/a.png", "\\\\server\\a.png", "..\\secret.png", "deep\\..\\..\\secret.png", "a.png\0",
        "a.png\n", "a\0.png", "", " ", "http://a.b/a.png", "file:///etc/passwd", "a.png/", "a.png/..", "a.png/a.png",
        "x" * 300, "x/" * 3000, "deep/" * 2000 + "a.png", "no.png", "\udc80.png", "~/secret.png", "é\u0301.png",
        "DEEP/a.png/.", "/", "./", "A.png",
    )  # fmt: skip
    good += ("within.png", "./a.png", "deep//a.png")
    return dict.fromkeys(good, True) | dict.fromkeys(bad, False)


PIECES = (
    "a.png", "deep", "er", "..", ".", "", "out", "up.png", "etc", "passwd", "secret.png", "within.png", "ping", "C:",
    "~", "%2e%2e", "\u2024\u2024", "\uff0e\uff0e", "..\0", ".. ", " ..", "\uff0f",
)  # fmt: skip


def drawn_name(draw: random.Random) -> str:

    return draw.choice(("/", "/", "\\", "//", "\u2215")).join(draw.choice(PIECES) for _ in range(draw.randrange(1, 7)))
