"""Hosts made of Linux namespaces, and a switch between them.

    with Network(folder, ["alpha", "beta"]) as net:
        run = net["alpha"].start(["hostname"], log=folder / "log")       a process on that host
        net["beta"].cut()                                                the link goes down
        net["beta"].cable.delay, net["beta"].cable.loss = 0.05, 0.1      each frame takes long, or is lost
        net["beta"].power_off()                                          every process dies, and nobody says goodbye

Each host has a network, a name, a process table and an /etc/hosts of its own, and shares the disk with the others. Its
`eth0` is a TAP device. The switch is a thread in this process, which reads frames from one of them and writes them to
another. So it can delay and drop anything, also where the kernel cannot (netem), and no port need be known. A host ends
with this process, however that ends: its first process waits for the end of a pipe.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
INIT = """
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
# Or each torchrun would have the number of the one before, and be taken for that one.
for i in $(seq "$3"); do true & done
wait
echo ready
exec cat
"""
TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")


def why_not() -> str:
    """Why there can be no such hosts here; "" if there can."""
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"no {', '.join(missing)} here"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Network(Path(folder), ["alpha"]):
                return ""
        except (OSError, subprocess.CalledProcessError, AssertionError) as error:
            return f"only root can make hosts of namespaces: {getattr(error, 'stderr', None) or error}".strip()


def _ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True)


@dataclass
class Cable:
    """What happens to the frames that a host sends or is sent."""

    delay: float = 0.0  # seconds, from nothing to twice as much
    loss: float = 0.0  # the share of frames
    cut: bool = False


class Switch(threading.Thread):
    """Passes frames on between TAP devices."""

    def __init__(self, seed: int = 0):
        super().__init__(daemon=True)
        self.ports: dict[int, tuple[bytes, Cable]] = {}  # file -> (address, cable)
        self.draw, self.dropped, self.late = random.Random(seed), 0, 0
        self.wake, self.woken = os.pipe()[::-1]
        self.start()

    def run(self) -> None:
        waiting, order = [], itertools.count()  # (when, order, file, frame)
        while True:
            until = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            try:
                ready, _, _ = select.select([self.woken, *self.ports], [], [], until)
            except OSError:  # a host has lost its power since its port was put on the list
                continue
            if self.woken in ready and not os.read(self.woken, 1):
                return
            for file in ready:
                for when, port, frame in self._read(file) if file in self.ports else ():
                    heapq.heappush(waiting, (when, next(order), port, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                *_, port, frame = heapq.heappop(waiting)
                if port in self.ports and not self.ports[port][1].cut:
                    self._write(port, frame)

    def _read(self, file: int) -> list[tuple[float, int, bytes]]:
        try:
            frame = os.read(file, 1 << 16)
        except OSError:  # the host is gone
            return []
        mine, found = self.ports[file][1], []
        for port, (address, cable) in list(self.ports.items()):
            if port == file or (frame[:6] != address and not frame[0] & 1):
                continue
            if mine.cut or cable.cut or self.draw.random() < mine.loss + cable.loss:
                self.dropped += 1
                continue
            delay = (mine.delay + cable.delay) * 2 * self.draw.random()
            self.late += delay > 0
            found.append((time.monotonic() + delay, port, frame))
        return found

    def _write(self, port: int, frame: bytes) -> None:
        try:
            os.write(port, frame)
        except OSError:  # its device is down, or the host is gone
            self.dropped += 1

    def changed(self) -> None:
        os.write(self.wake, b".")


class Host:
    """One host. `home` is its own folder; everything else on the disk is everybody's."""

    def __init__(self, switch: Switch, home: Path, name: str, number: int, hosts: Path):
        self.switch, self.home, self.name, self.number, self.hosts = switch, home, name, number, hosts
        self.address, self.cable, self.started = f"10.77.0.{number}", Cable(), []
        self.boots = 0
        home.mkdir(parents=True, exist_ok=True)
        self.power_on()

    def power_on(self) -> None:
        self.boots += 1
        words = ["--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.unshare = subprocess.Popen(
            ["unshare", *words, "sh", "-c", INIT, "sh", self.name, self.hosts, str(self.boots)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.unshare.stdout.readline() == "ready\n", self.unshare.stderr.read()
        self.init = int(Path(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").read_text())
        mac, device = f"02:00:00:00:77:{self.number:02x}", f"tap{os.getpid()}n{self.number}"[-15:]
        self.port = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self.port, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TAP | IFF_NO_PI))
        _ip("link", "set", device, "netns", self.init, "name", "eth0", "address", mac, "mtu", 9000)
        self._inside("ip", "addr", "add", f"{self.address}/24", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")
        self.cable.cut = False
        self.switch.ports[self.port] = bytes.fromhex(mac.replace(":", "")), self.cable
        self.switch.changed()

    def _inside(self, *words: str) -> None:
        subprocess.run(["nsenter", "-t", str(self.init), "--net", *words], check=True, capture_output=True, text=True)

    def start(self, words: list, log: Path, folder: Path, **environment: object) -> subprocess.Popen:
        """A process on this host, which writes to `log`."""
        namespaces = ["nsenter", "-t", str(self.init), "--net", "--uts", "--mount", "--pid"]
        with open(log, "a") as said:
            made = subprocess.Popen(
                [*namespaces, "env", f"--chdir={folder}", *map(str, words)], stdout=said, stderr=subprocess.STDOUT,
                env={**os.environ, "HOME": str(self.home), **{name: str(value) for name, value in environment.items()}},
            )  # fmt: skip
        self.started.append(made)
        return made

    def processes(self, having: str) -> list[Path]:
        """The processes on this host that have such a variable in their environment."""
        found = []
        for entry in Path(f"/proc/{self.init}/root/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if f"\0{having}=".encode() in b"\0" + (entry / "environ").read_bytes():
                    found.append(entry)
        return found

    def kill_all(self) -> None:
        """Kills every process but the first. The kernel lives on, and closes their connections."""
        kill = ["nsenter", "-t", str(self.init), "--pid", "sh", "-c", "kill -9 -1"]
        subprocess.run(kill, check=False, capture_output=True)  # which fails if there is none
        self._reap()

    def _reap(self) -> None:
        while self.started:
            self.started.pop().wait()

    def cut(self, *, inside: bool = False) -> None:
        """Unplugs the cable, which the host does not see; or, `inside`, its own device goes down."""
        if inside:
            self._inside("ip", "link", "set", "eth0", "down")
        self.cable.cut = True

    def mend(self) -> None:
        self._inside("ip", "link", "set", "eth0", "up")
        self.cable.cut = False

    def power_off(self) -> None:
        """Every process dies at once, behind a cable that carries nothing any more."""
        self.cable.cut = True
        self.unshare.kill()  # and with it, by the kernel, the first process of the host, and with that one all
        self.unshare.communicate()
        self._reap()
        del self.switch.ports[self.port]
        self.switch.changed()
        os.close(self.port)


class Network:
    def __init__(self, home: Path, names: list[str]):
        self.home, self.names, self.hosts = home, names, {}

    def __enter__(self) -> "Network":
        self.switch = Switch()
        file = self.home / "hosts"
        lines = ["127.0.0.1 localhost", *(f"10.77.0.{n} {name}" for n, name in enumerate(self.names, 1))]
        file.write_text("\n".join(lines) + "\n")
        try:
            for number, name in enumerate(self.names, 1):
                self.hosts[name] = Host(self.switch, self.home / name, name, number, file)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts.values():
            host.power_off()
        os.close(self.switch.wake)
        self.switch.join()
        os.close(self.switch.woken)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]
