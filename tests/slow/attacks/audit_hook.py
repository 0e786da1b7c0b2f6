"""Writes down what a Python process asks of the system. Every process in a sandbox starts with this file as its
`sitecustomize`, so that workers and everything else that they start are watched, too.

    ["network", "socket.getaddrinfo", ...]    ["write", "os.mkdir", "/path"]    ["code", "exec", "/path/evil.py"]
    ["start", ["git", ...]]                   ["pickle", "posix", "system"]     ["open", "/path/pytorch_model.bin"]

A process cannot remove the hook again (PEP 578). Nothing is refused, because code that catches the error would hide it.
The file uses only Python's built-in modules, since it runs before anything else is there. What other languages do is
not seen from here: for that the sandbox has the kernel's counters and the files themselves.
"""

import json
import os
import sys

LOG = os.open(os.environ["SANDBOX_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
SANDBOX = os.environ["SANDBOX"]  # the folder with everything that a stranger could have written
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
LOCAL = 1  # AF_UNIX: sockets that are files, between processes of one machine
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
# Event -> which of its arguments are paths, each with the argument that is the folder it is relative to.
PATHS = {
    "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.link": ((1, 3),), "os.mkdir": ((0, 2),), "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)), "os.rmdir": ((0, 1),), "os.symlink": ((1, 2),), "os.truncate": ((0, None),),
    "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
}  # fmt: skip
STARTS = {"subprocess.Popen": 1, "os.posix_spawn": 1, "os.exec": 1, "os.spawn": 2, "os.system": 0}


def _write(*what) -> None:
    os.write(LOG, (json.dumps(what, default=repr) + "\n").encode())


def _path(path, folder=None) -> str:
    """The absolute path of one that was given as text, bytes or an open file, perhaps relative to a folder."""
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    path = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return os.path.normpath(os.path.join(os.getcwd(), path))


def _foreign(path) -> bool:
    """Whether a stranger could have written this file; <string> and its like are no files."""
    return isinstance(path, str | bytes) and not os.fsdecode(path).startswith("<") and _path(path).startswith(SANDBOX)


def _callers() -> list[str]:
    frame, found = sys._getframe(3), []  # above `_watch` and `_hook`
    while frame:
        found.append(frame.f_code.co_filename)
        frame = frame.f_back
    return found


def _watch(event: str, given: tuple) -> None:
    if event == "open":
        path, _, flags = given
        if isinstance(path, int):
            return
        if (flags or 0) & CHANGES:
            _write("write", event, _path(path))
        elif os.fsdecode(path).endswith(PICKLES):
            _write("open", _path(path))
    elif event in PATHS:
        for number, folder in PATHS[event]:
            _write("write", event, _path(given[number], None if folder is None else given[folder]))
    elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        if getattr(given[0], "family", None) != LOCAL:
            _write("network", event, *map(repr, given))
    elif event in STARTS:
        _write("start", given[STARTS[event]])
    elif event == "pickle.find_class":  # workers hand over their batches with it
        if "/multiprocessing/" not in _callers()[0]:
            _write("pickle", *given)
    elif event in ("marshal.load", "marshal.loads"):
        if not _callers()[0].startswith("<frozen importlib"):
            _write("code", event, _callers()[:4])
    elif event == "compile":
        if _foreign(given[1]):
            _write("code", event, _path(given[1]))
    elif event == "exec":
        if _foreign(given[0].co_filename):
            _write("code", event, _path(given[0].co_filename))
    elif event in ("ctypes.dlopen", "import"):
        path = given[0] if event == "ctypes.dlopen" else given[1]
        if path and os.fsdecode(path).startswith("/") and _foreign(path):
            _write("code", event, _path(path))


def _hook(event: str, given: tuple) -> None:
    try:
        _watch(event, given)
    except Exception as error:  # an invalid argument, which the call itself refuses, too
        _write("fault", event, repr(given)[:300], repr(error))


sys.addaudithook(_hook)
