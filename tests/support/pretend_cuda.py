"""A pretend CUDA device on a CPU, without a driver: what a GPU would refuse, wait for and keep in memory.

    with pretend_cuda.device() as gpu:
        model.to("cuda")(**batch)
    gpu.waits        how often each line waited for the device
    gpu.peak         bytes; `gpu.breakdown()` says of what, by line

A tensor of it (`Pretend`) is a CUDA tensor for all of torch: it reports cuda:0, C++ takes CUDA's way through autocast,
dropout and autograd, and `torch.cuda` answers. Its operations arrive here, and run on the tensor that it holds, on the
CPU. Two kinds:

    data = True     it holds numbers, so small models compute what they compute on a CPU
    data = False    what is computed from floating-point numbers is a shape (on the meta device); what is made of
                    integers alone has numbers. So a step of a 7B model runs on a CPU with the true number of rows

Refused: an operation on tensors of both devices, but for numbers (tensors without dimensions). A real GPU takes indices
on the CPU for `x[index]`, and copies them first; that is refused too.

A wait: `.item()`, a condition, `.tolist()`, `nonzero`, a mask as index, `unique`, `bincount`, `repeat_interleave`
without its size, a copy to the CPU, and a copy to the GPU unless it is `non_blocking` and from pinned memory. That is
what `torch.cuda.set_sync_debug_mode` reports, and besides it copies from memory that is not pinned.

Attention is that of the GPU: fused kernels that keep queries, keys, values, the output and a number for each row. With
numbers, the CPU's own fused kernel computes them. bitsandbytes' 4-bit operations and AdamW are the CPU's.

How: torch needs a guard for each kind of device, and asks CUDA's hooks whether it is built. Without a driver there is
none, so a guard written in Python and a table of virtual functions with two other entries take their places while the
device is there. Nothing of this has a public interface, so `unavailable()` says if it does not work with a torch.
"""

import ctypes
import itertools
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import torch.nn.attention.varlen  # registers operations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / folder}/" for folder in ("tinyspeed", "scale"))
NOT_THE_CAUSE = (f"{Path(torch.__file__).parent}/", __file__, "<", str(Path(mock.__file__)))
BLOCK = 512  # bytes; the allocator's granularity

WAITS = {  # operations whose result has a size, or a value, that the CPU must know
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default, aten.equal.default,
}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip


class Mixed(RuntimeError):
    """Tensors on two devices in one operation."""


class Pretend(torch.Tensor):
    """A tensor on cuda:0 that holds `inner`, on the CPU or a shape on the meta device."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=CUDA, **how)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return the_device().run(func, args, kwargs or {})

    def __repr__(self, **how):
        return f"Pretend({tuple(self.shape)}, {self.dtype}, {'shape' if self.inner.is_meta else 'data'})"

    def __deepcopy__(self, memo):
        copy = Pretend(self.inner.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copy
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def detach(self):
        made = torch.Tensor.detach(self)  # and what bitsandbytes has noted about its weights
        vars(made).update({name: value for name, value in vars(self).items() if name not in ("inner", "_is_param")})
        return made

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor):
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner


_current: list["Device"] = []


def the_device() -> "Device":
    if not _current:
        raise RuntimeError("a pretend CUDA tensor is used after its device is gone")
    return _current[-1]


class Device:
    """What happens on the pretend GPU."""

    def __init__(self, data: bool):
        self.data = data
        self.waits: Counter[str] = Counter()
        self.alive = self.peak = 0
        self._held: dict[int, tuple[int, tuple]] = {}  # of each storage: bytes and what it is
        self._pinned: weakref.WeakSet = weakref.WeakSet()
        self._lock = threading.RLock()

    # What is there

    def breakdown(self) -> list[tuple[int, int, tuple]]:
        """What is alive: bytes, number of tensors, and (line, operation, shape, type), the largest first."""
        size, count = Counter(), Counter()
        for n, what in self._held.values():
            size[what] += n
            count[what] += 1
        return [(n, count[what], what) for what, n in size.most_common()]

    def _hold(self, inner: Tensor, func) -> None:
        storage = inner.untyped_storage()
        key = storage._cdata
        with self._lock:
            if key in self._held:
                return
            n = -(-storage.nbytes() // BLOCK) * BLOCK
            line = "" if self.data else _line(())
            self._held[key] = n, (line, str(func), tuple(inner.shape), inner.dtype)
            self.alive += n
            self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        with self._lock:
            self.alive -= self._held.pop(key, (0, ()))[0]

    # Operations

    def put(self, tensor: Tensor, func="put") -> Tensor:
        """A tensor of the CPU, copied to the GPU."""
        shape_only = not self.data and (tensor.is_meta or tensor.is_floating_point() or tensor.is_complex())
        inner = torch.empty_like(tensor, device="meta") if shape_only else tensor.detach().clone()
        return self._wrap(inner, func)

    def _wrap(self, inner: Tensor, func) -> Pretend:
        if not self.data and not inner.is_meta and (inner.is_floating_point() or inner.is_complex()):
            inner = torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype, device="meta")
        self._hold(inner, func)
        return Pretend(inner)

    def wait(self, what: object) -> None:
        self.waits[f"{_line(OURS)}: {what}"] += 1

    def run(self, func, args, kwargs):
        """Does an operation of which a tensor, or the result, is on the GPU."""
        flat = tree_leaves((args, kwargs))
        here = [x for x in flat if isinstance(x, Pretend)]
        if func in COPIES:
            return self._copy(func, *args, **kwargs)
        device = kwargs.get("device")
        if func is aten.is_pinned.default:
            return False
        for x in flat:
            if isinstance(x, Tensor) and not isinstance(x, Pretend) and here:
                written = any(x is y for y in _written(func, args, kwargs))
                if x.dim() > 0 or written or func is aten.cat.default:
                    raise Mixed(f"{_line(OURS)}: {func} has tensors on cuda:0 and on the CPU")
        if device is not None:
            kwargs = {**kwargs, "device": CPU}
        if func in WAITS or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
            self.wait(func)
            args, kwargs = tree_map_only(Pretend, self._materialised, (args, kwargs))
        elif func in INDEXING:
            indices = [i for i in args[1] if i is not None]
            if masks := [i for i in indices if i.dtype in (torch.bool, torch.uint8)]:
                self.wait(f"{func} with a mask")
                places = {id(m): self._materialised(m).inner.nonzero().unbind(1) for m in masks}
                args = (args[0], [p for i in args[1] for p in places.get(id(i), [i])], *args[2:])
        if own := KERNELS.get(func):
            out = own(self, *args, **kwargs)
        else:
            inner_args, inner_kwargs = tree_map_only(Pretend, lambda x: x.inner, (args, kwargs))
            out = self._compute(func, inner_args, inner_kwargs)
        written = _written(func, args, kwargs)
        if written and func._schema.returns and func._schema.returns[0].alias_info is not None:
            if len(func._schema.returns) == 1:
                return written[0] if not isinstance(out, list | tuple) else list(written)
            return tuple(written)
        return tree_map_only(Tensor, lambda t: t if isinstance(t, Pretend) else self._wrap(t, func), out)

    def _compute(self, func, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(t.is_meta for t in tensors):  # a shape comes of it, whatever the rest is
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        elif not self.data and "device" in kwargs:  # made of nothing
            made = func(*args, **{**kwargs, "device": "meta"})
            if made.is_floating_point():
                return made
        return func(*args, **kwargs)

    def _materialised(self, x: Tensor) -> Tensor:
        """With numbers, for an operation that needs some: what a shape is asked for is true, or zero."""
        if not isinstance(x, Pretend) or not x.inner.is_meta:
            return x
        return Pretend(torch.ones_like(x.inner, device=CPU))

    def _copy(self, func, *args, **kwargs):
        in_place = func is aten.copy_.default
        to = args[0] if in_place else None
        source = args[1] if in_place else args[0]
        asynchronous = kwargs.pop("non_blocking", None) or (len(args) > 2 and in_place and args[2])
        device = torch.device(kwargs.pop("device", None) or source.device) if not in_place else to.device
        if device.type != "cpu" and not isinstance(source, Pretend):
            pinned = any(s._cdata == source.untyped_storage()._cdata for s in self._pinned)
            if source.dim() == 0 and in_place:  # a kernel's argument
                pass
            elif not asynchronous:
                self.wait("a copy to the GPU, not non_blocking")
            elif not pinned:
                self.wait("a copy to the GPU of memory that is not pinned")
        if device.type == "cpu" and isinstance(source, Pretend):
            if not asynchronous:
                self.wait("a copy to the CPU")
            inner = self._materialised(source).inner
            return to.copy_(inner) if in_place else func(inner.detach().clone(), **kwargs)
        inner = source.inner if isinstance(source, Pretend) else source
        if in_place:
            if not to.inner.is_meta:
                to.inner.copy_(inner if not inner.is_meta else torch.ones_like(inner, device=CPU))
            return to
        if isinstance(source, Pretend):
            return self._wrap(self._compute(func, (inner,), kwargs), func)
        kwargs.pop("pin_memory", None)
        return self.put(func(inner, **kwargs), func)

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._pinned.add(copy.untyped_storage())
        return copy


class _Factories(TorchDispatchMode):
    """Sends what is made on the GPU, and what pins memory, to the device."""

    def __init__(self, gpu: Device):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return self.gpu.pin(args[0])
        device = kwargs.get("device")
        if any(t is Pretend for t in types) or (device is not None and torch.device(device).type == "cuda"):
            return self.gpu.run(func, args, kwargs)
        flat = tree_leaves((args, kwargs))
        if any(isinstance(x, Pretend) for x in flat):
            return self.gpu.run(func, args, kwargs)
        return func(*args, **kwargs)


@cache
def _written_places(func) -> tuple[tuple[int, str], ...]:
    every = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in every if a.alias_info is not None and a.alias_info.is_write)


def _written(func, args, kwargs) -> list[Tensor]:
    """The tensors that an operation writes to."""
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written_places(func)]
    return [t for of in found for t in (of if isinstance(of, list | tuple) else [of]) if t is not None]


def _line(folders: tuple[str, ...]) -> str:
    """Where the program is: the innermost line in these folders, or else the innermost that is not torch's."""
    frame, outside = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(folders) if folders else False:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        if not outside and not name.startswith(NOT_THE_CAUSE):
            outside = f"{'/'.join(Path(name).parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return outside or "backward"


# Attention


def _causal(is_causal: bool, bias: Tensor | None, scale: float | None) -> dict:
    return {"is_causal": is_causal, "attn_mask": bias, "scale": scale}


def _fused(gpu: Device, q: Tensor, k: Tensor, v: Tensor, how: dict) -> tuple[Tensor, Tensor]:
    """The output and a number for each row, of tensors (B, heads, rows, width)."""
    if q.is_meta or k.is_meta:
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype, device="meta")
        return out.transpose(1, 2), torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, how.pop("is_causal"), **how)


def _fused_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: dict):
    if q.is_meta or k.is_meta:
        return tuple(torch.empty_like(x) for x in (q, k, v))
    is_causal = how.pop("is_causal")
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, q, k, v, out, lse, 0.0, is_causal, **how)


def _bare(*tensors):
    return tuple(x.inner if isinstance(x, Pretend) else x for x in tensors)


def _seeds() -> list[Tensor]:
    return [torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]


def _flash(gpu, q, k, v, dropout=0.0, is_causal=False, debug=False, *, scale=None):
    q, k, v = _bare(q, k, v)
    out, lse = _fused(gpu, q, k, v, _causal(is_causal, None, scale))
    return out, lse, None, None, q.shape[2], k.shape[2], *_seeds(), torch.zeros(0, dtype=q.dtype)


def _flash_backward(gpu, grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, *seeds, scale=None):
    return _fused_backward(*_bare(grad, q, k, v, out, lse), _causal(is_causal, None, scale))


def _efficient(gpu, q, k, v, bias, keeps_lse, dropout=0.0, is_causal=False, *, scale=None):
    q, k, v, bias = _bare(q, k, v, bias)
    out, lse = _fused(gpu, q, k, v, _causal(is_causal, bias, scale))
    room = torch.zeros(*lse.shape[:2], -(-lse.shape[2] // 32) * 32, dtype=lse.dtype, device=lse.device)
    room[:, :, : lse.shape[2]] = lse  # the kernel pads it
    return out, room, *_seeds()


def _efficient_backward(
    gpu, grad, q, k, v, bias, out, lse, seed, offset, dropout, mask, is_causal=False, *, scale=None
):
    grad, q, k, v, bias, out, lse = _bare(grad, q, k, v, bias, out, lse)
    lse = lse[:, :, : q.shape[2]]
    return *_fused_backward(grad, q, k, v, out, lse, _causal(is_causal, bias, scale)), None


def _samples(cu: Tensor) -> list[tuple[int, int]]:
    return [(a, b) for a, b in itertools.pairwise(cu.inner.tolist()) if b > a]


def _near(n: int, window: list[int] | None, dtype: torch.dtype) -> Tensor | None:
    """What a window of so many rows before and behind adds to scores; None if it has no end before."""
    if not window or window[0] < 0:
        return None
    far = torch.ones(n, n, dtype=torch.bool).tril(-window[0] - 1) | torch.ones(n, n, dtype=torch.bool).triu(
        window[1] + 1
    )
    return torch.zeros(n, n, dtype=dtype).masked_fill(far, -torch.inf)[None, None]


def _packed(gpu, q, k, v, cu, cu_k, most_q, most_k, is_causal=False, scale=None, window=None, gqa=False, *more):
    seed = torch.zeros(2, dtype=torch.uint64)
    q, k, v = _bare(q, k, v)
    if q.is_meta:
        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device="meta"), seed
    out, lse = torch.empty_like(q), torch.zeros(q.shape[1], q.shape[0])
    for a, b in _samples(cu):
        part = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
        o, number = _fused(gpu, *part, _causal(is_causal, _near(b - a, window, q.dtype), scale))
        out[a:b], lse[:, a:b] = o[0].transpose(0, 1), number[0]
    return out, lse, seed


def _packed_backward(gpu, grad, q, k, v, out, lse, cu, cu_k, most_q, most_k, is_causal, seed, scale=None, window=None):
    grad, q, k, v, out, lse = _bare(grad, q, k, v, out, lse)
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for a, b in _samples(cu) if not q.is_meta else ():
        part = [x[a:b].transpose(0, 1)[None] for x in (grad, q, k, v, out)]
        how = _causal(is_causal, _near(b - a, window, q.dtype), scale)
        for to, of in zip(grads, _fused_backward(*part, lse[None, :, a:b], how), strict=True):
            to[a:b] = of[0].transpose(0, 1)
    return grads


def _dropout(gpu, x, p, train):
    """Draws what a CPU would draw, and keeps a byte of it for each number."""
    x = x.inner
    if x.is_meta or not train or not 0 < p < 1:
        return aten.native_dropout(x, p, train)
    noise = torch.empty_like(x).bernoulli_(1 - p)
    return x * (noise / (1 - p)), noise.bool()


def _addmm_in(gpu, x, a, b, dtype, *, beta=1, alpha=1, out):
    """A product of halves into a whole number, which cuBLAS has and a CPU has not."""
    x, a, b = (t if t.is_meta else t.to(dtype) for t in _bare(x, a, b))
    if not x.is_meta:
        out.inner.copy_(torch.addmm(x, a, b, beta=beta, alpha=alpha))
    return out


def _norm(gpu, x, shape, weight, eps):
    """One kernel, which also returns what x was multiplied by."""
    x, weight = _bare(x, weight)
    whole = x.float()
    scale = torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + eps)
    out = torch.empty_like(x) if weight.is_meta else (whole * scale * weight).to(x.dtype)
    return out, scale


def _norm_backward(gpu, grad, x, shape, scale, weight, needs):
    grad, x, scale, weight = _bare(grad, x, scale, weight)
    if x.is_meta or grad.is_meta:
        return torch.empty_like(x), torch.empty_like(weight) if needs[1] else None
    unit, grad = x.float() * scale, grad.float()
    of_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if needs[1] else None
    grad = grad * weight
    return (scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))).to(x.dtype), of_weight


KERNELS = {
    aten._fused_rms_norm.default: _norm,
    aten._fused_rms_norm_backward.default: _norm_backward,
    aten.addmm.dtype_out: _addmm_in,
    aten.native_dropout.default: _dropout,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    torch.ops.torch_attn._varlen_attn.default: _packed,
    torch.ops.torch_attn._varlen_attn_backward.default: _packed_backward,
}
# CUDA has a kernel for each. Without one, torch makes it of several operations, whose results are alive together. These
# say that there are kernels, and are never called: `Pretend` comes first.
_kernels = torch.library.Library("aten", "IMPL")
for _name in ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"):
    _kernels.impl(_name, lambda *given: None, "CUDA")

_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What torch chooses on a GPU: the flash kernel in half precision without a mask, or else the efficient one."""
    plain = not any(isinstance(x, Pretend) for x in (q, k, v))
    gpu = None if plain else the_device()
    if plain or (dropout_p and gpu.data):  # which draws other numbers on a GPU: the CPU's, so that runs compare
        how = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return _plain_attention(q, k, v, **how, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        to = torch.get_autocast_dtype("cuda")
        q, k, v = (x.to(to) for x in (q, k, v))
    if enable_gqa and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    keeps_lse = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, keeps_lse, dropout_p, is_causal, scale=scale)[0]


# Where torch looks for CUDA


class _Generator(torch.Generator):
    """Draws what a CPU would draw, also for the GPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, CPU)


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.CUDA


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))


@cache
def _driver() -> tuple:
    """The registry of guards, our guard, the place of CUDA's hooks' table of functions, and our table."""
    registry = (ctypes.c_void_p * 22).in_dll(_library("libc10.so"), "_ZN3c104impl26device_guard_impl_registryE")
    private, guard = 20, _Guard()
    before = registry[private]
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    made, registry[private] = registry[private], before
    hooks = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    place = ctypes.c_void_p.from_address(hooks())
    # In front of a table are two more words; in it, two destructors, then isBuilt, isAvailable, hasPrimaryContext.
    table = (ctypes.c_void_p * 72)(*(ctypes.c_void_p.from_address(place.value + 8 * i).value for i in range(-2, 70)))
    answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    yes, no = answer(lambda hooks: True), answer(lambda hooks: False)
    table[4], table[6] = (ctypes.cast(f, ctypes.c_void_p).value for f in (yes, no))
    return registry, made, place, table, (guard, yes, no)


@contextmanager
def _in_place_of_a_driver() -> Iterator[None]:
    registry, guard, place, table, _ = _driver()
    was = registry[1], place.value
    registry[1], place.value = guard, ctypes.addressof(table) + 16
    try:
        yield
    finally:
        registry[1], place.value = was


@cache
def unavailable() -> str:
    """Why there can be no pretend device with this torch; "" if there can. Autograd looks for devices at the first
    backward of a process, so this must be asked before it."""
    if torch.cuda.is_available():
        return "a real GPU is here"
    try:
        with _device(gpu := Device(data=True)):
            x = gpu.put(torch.ones(2)).requires_grad_()  # without a factory: torch remembers to have seen a driver
            (x * 2).sum().backward()
            return "" if x.grad.tolist() == [2.0, 2.0] else "backward went wrong"
    except (OSError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        return f"this torch has another inside: {error}"


def _params4bit_to(self, *args, **kwargs):
    """`Params4bit.to`, which would make a subclass of a tensor that is one already. Its state is enough for layers."""
    device = torch._C._nn._parse_to(*args, **kwargs)[0]
    plain = self.data.as_subclass(Tensor)
    if not self.bnb_quantized and device is not None and device.type != "meta":
        self._quantize(CPU)
        plain = self.data.as_subclass(Tensor)
    gpu = the_device()
    moved = torch.nn.Parameter(gpu.put(plain), requires_grad=False)
    vars(moved).update({name: value for name, value in vars(self).items() if name != "data"})
    state = moved.quant_state
    for of in filter(None, (state, state.state2)):
        for name, value in list(vars(of).items()):
            if isinstance(value, Tensor) and not isinstance(value, Pretend):
                setattr(of, name, gpu.put(value))
    return moved


@contextmanager
def device(data: bool = True) -> Iterator[Device]:
    """A GPU for as long as this lasts. Tensors on it cannot be used after it."""
    import bitsandbytes  # imported later, it would look for the driver

    gpu = Device(data)
    of, new = bitsandbytes.nn.Params4bit, bitsandbytes.nn.Params4bit.__new__
    made = lambda cls, data=None, *args, **how: new(
        cls, data.inner if isinstance(data, Pretend) else data, *args, **how
    )
    with _device(gpu), mock.patch.object(of, "to", _params4bit_to), mock.patch.object(of, "__new__", made):
        yield gpu


@contextmanager
def _device(gpu: Device) -> Iterator[None]:
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "_lazy_init": lambda: None, "is_available": lambda: True, "is_initialized": lambda: True,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (8, 9), "get_device_name": lambda device=None: "Pretend GPU",
        "is_bf16_supported": lambda *given: True, "_is_in_bad_fork": lambda: False,
        "get_rng_state": lambda device=None: state.clone(), "set_rng_state": lambda state, device=None: None,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None, "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "mem_get_info": lambda device=None: (80 * 2**30 - gpu.alive, 80 * 2**30),
        "memory_reserved": lambda device=None: gpu.alive, "memory_allocated": lambda device=None: gpu.alive,
        "max_memory_allocated": lambda device=None: gpu.peak, "max_memory_reserved": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak", gpu.alive),
        "get_per_process_memory_fraction": lambda device=None: 1.0,
    }  # fmt: skip
    only_lift, before = torch._C._only_lift_cpu_tensors(), len(_current)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))  # modes are a thread's own
        stack.enter_context(_in_place_of_a_driver())
        stack.enter_context(mock.patch.multiple(torch.cuda, **answers))
        stack.enter_context(mock.patch("torch.accelerator.synchronize", answers["synchronize"]))
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch("torch.Generator", _Generator))
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")` is a copy to the GPU
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # the object stays, and becomes a `Pretend`
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        _current.append(gpu)
        stack.callback(lambda: _current.__delitem__(slice(before, None)))
        stack.enter_context(_Factories(gpu))
        yield
