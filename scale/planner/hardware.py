"""GPUs and how a model may be sharded over them: their data sheets' numbers, and how long a collective takes.

    ring of n    every GPU passes on what it receives: (n - 1) / n of all bytes go through each link, in n - 1 hops

Inside a node the link is NVLink or PCIe. A ring that spans nodes brings each byte into a node once, so the network
cards of a node share the traffic. The sustained share of a link (LINKS) and the time of a hop (HOP) are assumptions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tinyspeed.util import UserError, require, require_known

NODE = 8  # GPUs
LINKS = 0.8  # the share of a link's rate that collectives sustain
HOP = 3e-6  # seconds from one GPU of a ring to the next


@dataclass(frozen=True)
class Gpu:
    gib: float
    tflops: float  # dense, bf16
    link: float  # GB/s to the other GPUs of its node, in one direction
    nic: float  # GB/s of network for each GPU


GPUS = {
    "a100-40": Gpu(40, 312, 300, 25),  # NVLink 3, a 200 Gb/s card for each GPU
    "a100-80": Gpu(80, 312, 300, 25),
    "h100": Gpu(80, 989, 450, 50),  # NVLink 4, 400 Gb/s
    "h200": Gpu(141, 989, 450, 50),
    "l40s": Gpu(48, 362, 32, 1.56),  # PCIe 4, a 100 Gb/s card for the node
    "4090": Gpu(24, 165, 32, 1.56),
}


@dataclass(frozen=True)
class Sharding:
    """`gpus` GPUs, of which `shards` share one copy of the model."""

    gpu: Gpu
    gpus: int
    shards: int

    def __str__(self) -> str:
        return "FSDP" if self.shards == self.gpus else f"HSDP, {self.replicas} x {self.shards}"

    @property
    def replicas(self) -> int:
        return self.gpus // self.shards

    def seconds(self, size: float, collectives: int) -> float:
        """To gather or reduce this many bytes over the shards, in this many collectives."""
        rate = self.gpu.link if self.shards <= NODE else min(self.gpu.link, NODE * self.gpu.nic)
        return self._ring(self.shards, size, collectives, rate)

    def all_reduce(self, size: float, collectives: int) -> float:
        """Seconds to sum shards of this many bytes over all replicas: they are reduced and gathered again."""
        return 2 * self._ring(self.replicas, size, collectives, self.gpu.nic)

    def _ring(self, n: int, size: float, collectives: int, rate: float) -> float:
        return (n - 1) / n * size / (rate * 1e9 * LINKS) + collectives * (n - 1) * HOP


def shardings(name: str, gpus: Iterable[int]) -> list[Sharding]:
    """One model over all GPUs, and if there are several nodes, also one model in each."""
    require_known("GPU", name, GPUS)
    found = []
    for n in gpus:
        require(n <= NODE or n % NODE == 0, f"--gpus {n}: a node has {NODE} GPUs, so give a multiple of that")
        found += [Sharding(GPUS[name], n, shards) for shards in ([n, NODE] if n > NODE else [n])]
    return found


def counts(text: str) -> list[int]:
    """The numbers in "8,64,512", each once, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"--gpus {text}: write whole numbers with commas between them, as in 8,64,512") from None
    require(min(found) >= 1, f"--gpus {text}: must be at least 1")
    return found
