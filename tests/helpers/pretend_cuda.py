"""A CUDA device for machines without one: CPU tensors that say they are on `cuda:0`, and keep CUDA's rules.

    with pretend_cuda():
        policy = load_model(path, device="cuda")

Every operation runs on the CPU, so that results equal the CPU's; but a tensor of the device that meets one of the host
raises, as it does on CUDA, branches on `is_cuda` are taken, and what makes the host wait for the device is counted.
Inside, tensors are PyTorch's wrapper subclass on the meta device: "cuda" itself needs a build that has it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # looks at torch.cuda's functions when it is imported, so before they are replaced
from pretend_kernels import ON_CPU
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
PROPERTIES = {"multi_processor_count": 132, "L2_cache_size": 50 << 20, "uuid": "pretended"}
MOVES = {aten._to_copy.default, aten.copy_.default}
"""Take tensors of both sides."""
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Take indices of the host for a tensor of the device, by waiting for their copy."""
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
    aten._local_scalar_dense.default,
}
"""The host must know values before it knows the result, or its size."""
UNORDERED = {aten.cumsum.default, aten.cumsum_.default, aten.cumsum.out}
"""Of floats: refused on CUDA where deterministic algorithms are asked for."""


class Log:
    """What the host and the device did together."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        """Operations that make the host wait for the device."""
        self.recorded: list[Callable[[], None]] | None = None
        """While a graph is captured: what its replay does."""
        self.asked = False
        """Whether the call under way names the device, or has tensors there."""

    def wait(self, func: Any) -> None:
        self.waits.append(str(func))
        if self.recorded is not None:
            raise RuntimeError(f"{func}: the host waits for the device while a graph is captured")


LOG = Log()


class OnDevice(Tensor):
    """A tensor of the device, or a parameter that was moved from it to the host (`.data = ...`)."""

    on_cpu: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: Tensor, requires_grad: bool = False) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device="meta",
            requires_grad=requires_grad,
        )
        self.on_cpu, self.at = real, DEVICE
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    device = property(lambda self: self.at)
    is_cuda = property(lambda self: self.at == DEVICE)
    is_meta = False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        self.on_cpu, self.at = getattr(new, "on_cpu", new), new.device

    def data_ptr(self) -> int:
        return self.on_cpu.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            made = OnDevice(self.on_cpu.detach().clone(), self.requires_grad)
            made._is_param = getattr(self, "_is_param", False)
            memo[id(self)] = made
        return memo[id(self)]

    def __repr__(self, **_) -> str:
        return f"OnDevice({self.on_cpu!r})"


def _is_on_device(x: Any) -> bool:
    return isinstance(x, OnDevice) and x.is_cuda


def _is_on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and not _is_on_device(x)


def dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the real tensors. Raises RuntimeError where CUDA would not take these."""
    flat, spec = tree_flatten((args, kwargs))
    device = kwargs.get("device")
    to_device = device is None or torch.device(device).type != "cpu"
    if any(map(_is_on_device, flat)):
        _check(func, args, flat, to_device)
    real = [getattr(x, "on_cpu", x) for x in flat]
    homes = {id(r): x for r, x in zip(real, flat, strict=True) if isinstance(r, Tensor)}
    real_args, real_kwargs = tree_unflatten(real, spec)
    if to_device and device is not None:
        real_kwargs["device"] = "cpu"
    if real_kwargs.get("pin_memory"):
        real_kwargs["pin_memory"] = False
    out = ON_CPU.get(func, func)(*real_args, **real_kwargs)
    if LOG.recorded is not None:
        LOG.recorded.append(functools.partial(_again, func, real_args, real_kwargs, out))

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        home = homes.get(id(x))
        if home is not None:
            if home.shape != x.shape:
                raise RuntimeError(f"{func}: changes the shape of a tensor in place")
            return home
        return OnDevice(x) if to_device else x

    return tree_map(wrap, out)


def _check(func: Any, args: tuple, flat: list, to_device: bool) -> None:
    if func in SIZED_BY_VALUES:
        LOG.wait(func)
    if torch.are_deterministic_algorithms_enabled() and func in UNORDERED and flat[0].is_floating_point():
        raise RuntimeError(f"{func}: has no deterministic implementation on CUDA")
    if func is aten._to_copy.default and _is_on_host(args[0]) == to_device:
        LOG.wait(func)
    if func is aten.copy_.default and _is_on_host(args[0]) != _is_on_host(args[1]):
        LOG.wait(func)
    if func in MOVES:
        return
    host = [x for x in flat if _is_on_host(x) and x.dim() > 0]
    if func in INDEXED:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype == torch.bool for x in indices):
            LOG.wait(func)
        if _is_on_device(args[0]):
            if any(map(_is_on_host, indices)):
                LOG.wait(f"{func} by an index on the host")
            host = [x for x in host if not any(x is index for index in indices)]
        elif any(map(_is_on_device, indices)):
            host = [args[0]]
    if host:
        shapes = ", ".join(str(tuple(x.shape)) for x in host)
        raise RuntimeError(f"{func}: tensors on {DEVICE}, and on the CPU: {shapes}")


def _again(func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    for old, new in zip(tree_flatten(out)[0], tree_flatten(ON_CPU.get(func, func)(*args, **kwargs))[0], strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        # Autograd's own formulas make tensors on the device that they know of.
        asked = LOG.asked or torch._C._current_graph_task_id() != -1
        here = asked and device is not None and torch.device(device).type == "meta"
        if here or any(isinstance(x, OnDevice) for x in tree_flatten((args, kwargs))[0]):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


class _Names(TorchFunctionMode):
    """Calls that name the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            func, args, kwargs = Tensor.to, (args[0], DEVICE), {}
        if func is Tensor.pin_memory:
            return args[0]
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        values = (*args, kwargs.get("device"))
        if not any(_names_device(x) or isinstance(x, OnDevice) for x in values):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _names_device(values[-1]):
            made = func(*args, **{**kwargs, "device": None})
            LOG.wait(func)
            func, args, kwargs, values = Tensor.to, (made, DEVICE), {}, (None,)
        args = tuple("meta" if _names_device(x) else x for x in args)
        kwargs = {**kwargs, "device": "meta"} if _names_device(values[-1]) else kwargs
        before, LOG.asked = LOG.asked, True
        try:
            return func(*args, **kwargs)
        finally:
            LOG.asked = before


def _named(run: Callable) -> Callable:
    """PyTorch calls `backward` without the mode; what that calls may name the device, too."""

    def with_names(*args: Any, **kwargs: Any) -> Any:
        with _Names():
            return run(*args, **kwargs)

    return with_names


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply`, which changes parameters in place; between host and device they are made anew
    here, one for one, so that tied weights stay tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for key, value in (*part._parameters.items(), *part._buffers.items()):
            if value is None:
                continue
            if id(value) not in made:
                with torch.no_grad():
                    new = fn(value)
                is_parameter = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(new, value.requires_grad) if is_parameter else new
            (part._parameters if key in part._parameters else part._buffers)[key] = made[id(value)]
    return module


def _names_device(x: Any) -> bool:
    return isinstance(x, str | torch.device) and str(x).split(":")[0] == "cuda"


def _launch(kernel: InterpretedFunction, run: Callable, *args: Any, **kwargs: Any) -> None:
    """A kernel of Triton's, interpreted. Raises RuntimeError for a tensor of the host, which a GPU cannot read."""
    action = functools.partial(run, kernel, *map(_pointer, args), **{k: _pointer(x) for k, x in kwargs.items()})
    if LOG.recorded is not None:
        LOG.recorded.append(action)
    action()


def _pointer(x: Any) -> Any:
    if isinstance(x, TensorDescriptor):
        return dataclasses.replace(x, base=_pointer(x.base))
    if _is_on_host(x):
        raise RuntimeError(f"a kernel is given a tensor on the CPU: {tuple(x.shape)}")
    return x.on_cpu if _is_on_device(x) else x


class _Graph:
    """Replays what was recorded, kernels of Triton's interpreter among it, on the tensors that it was recorded with."""

    def replay(self) -> None:
        for action in self.recorded:
            action()


@contextlib.contextmanager
def _capture(graph: _Graph, **_) -> Iterator[None]:
    LOG.recorded = graph.recorded = []
    try:
        yield
    finally:
        LOG.recorded = None


class _Stream:
    """The one and only: everything is done when it is called."""

    def wait_stream(self, other: _Stream) -> None:
        pass


def _nothing(*_, **__) -> Any:
    return contextlib.nullcontext()


CUDA: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "NVIDIA H200",
    "get_device_properties": lambda *_: SimpleNamespace(**PROPERTIES),
    "mem_get_info": lambda *_: (8 << 30, 16 << 30),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "Stream": _Stream,
    "current_stream": _Stream,
    "stream": _nothing,
    "device": _nothing,
    "graph": _capture,
    "CUDAGraph": _Graph,
    "graph_pool_handle": lambda: (0, 0),
} | dict.fromkeys(
    ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "set_rng_state", "manual_seed_all"),
    _nothing,
)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Log]:
    """`device="cuda"` in here is the pretended one. One at a time."""
    LOG.__init__()
    with pytest.MonkeyPatch.context() as patch, _Names(), _Operations():
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch.autograd, "_engine_run_backward", _named(torch.autograd._engine_run_backward))
        patch.setattr(InterpretedFunction, "run", functools.partialmethod(_launch, InterpretedFunction.run))
        for name, stand_in in CUDA.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield LOG
