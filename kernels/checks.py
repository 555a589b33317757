"""Argument checks and the choice of implementation, shared by every op.

Shapes and dtypes are known on the host and always checked. Checks of *values* (ids in range, sorted, finite) read
the tensor: on the CPU they always run; on CUDA they would stall the stream, so they run only with `VTFAST_CHECK=1`
(or `checks.CHECK_VALUES = True`).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

SCALES = ("group", "batch", "none")
IMPLS = ("auto", "triton", "torch", "reference")
HEAD_IMPLS = (*IMPLS, "gluon")  # of linear_logprob and linear_grpo_loss
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REFERENCE_FLOATS = (*FLOATS, torch.float64)  # float64 is the oracle's dtype
CHECK_VALUES = os.environ.get("VTFAST_CHECK", "0") == "1"
IGNORE_INDEX = -100
"""Target of a token that is not scored."""
P = ParamSpec("P")
R = TypeVar("R")
_checks_skipped = False


@contextlib.contextmanager
def skip_checks() -> Iterator[None]:
    """Skip the argument checks of all ops. For inner loops of many small ops whose first round was checked: on a CPU,
    checks are a tenth of a small model's decode step."""
    global _checks_skipped
    before, _checks_skipped = _checks_skipped, True
    try:
        yield
    finally:
        _checks_skipped = before


def checks_skipped() -> bool:
    return _checks_skipped


def require(condition: bool, name: str, message: str) -> None:
    """Raise ValueError, naming the argument, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: {message}")


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def capability(tensor: torch.Tensor) -> int:
    """Compute capability as an integer (90 = Hopper); 0 on the CPU."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def align_rows(*matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pad half-precision rows with zeros to a multiple of 16: copy engines and vector loads need aligned rows. The
    hidden sizes of real models are multiples already."""
    short = -matrices[0].shape[1] % 16 if matrices[0].dtype != torch.float32 else 0
    return tuple(torch.nn.functional.pad(x, (0, short)) if short else x for x in matrices)


def tma_ready(*matrices: torch.Tensor) -> bool:
    """Return whether to read these aligned matrices by TMA: on Hopper and later, in half precision."""
    half = matrices[0].dtype != torch.float32  # in fp32 it only costs registers
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in matrices)
    return half and capability(matrices[0]) >= 90 and aligned


def op_scope(function: Callable[P, R]) -> Callable[P, R]:
    """Run an op, or its backward, on the device of its first tensor and without autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else None
        if not isinstance(first, torch.Tensor):
            values = (*args, *kwargs.values())
            first = next((x for x in values if isinstance(x, torch.Tensor)), None)
        if first is None or not (first.is_cuda or torch.is_autocast_enabled(first.device.type)):
            return function(*args, **kwargs)  # a decode step is hundreds of calls
        device = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with device, torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def require_hopper(*matrices: torch.Tensor) -> None:
    """Raise ValueError unless Gluon's kernels for sm_90 can read these matrices."""
    ready = capability(matrices[0]) == 90 and tma_ready(*matrices)
    require(ready, "impl", "'gluon' needs an sm_90 GPU, and bf16 or fp16 rows of a multiple of 16 bytes")


def head_inputs(
    impl: str, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three as this implementation of an op on the head reads them."""
    if impl == "torch":
        return hidden, weight, target
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if impl == "gluon":
        require_hopper(hidden, weight)
    return hidden, weight, target.contiguous()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """Matmuls of fp32 matrices without TF32 or bf16, whatever `torch.set_float32_matmul_precision` says."""
    backends: tuple[Any, ...] = (torch.backends.cuda, torch.backends.mkldnn)  # torch's types lack mkldnn's
    matmuls = [backend.matmul for backend in backends]
    before = [matmul.fp32_precision for matmul in matmuls]
    for matmul in matmuls:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, precision in zip(matmuls, before, strict=True):
            matmul.fp32_precision = precision


def runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or interpreted()


def choose_impl(impl: str, tensor: torch.Tensor, name: str = "hidden", impls: tuple[str, ...] = IMPLS) -> str:
    """Return "triton" on CUDA and "torch" elsewhere for "auto"; any other `impl` must run on the tensor's device.
    `impls`: those that the op has."""
    is_tensor = isinstance(tensor, torch.Tensor)
    require(is_tensor, name, f"expected a tensor, got {type(tensor).__name__}")
    require(impl in impls, "impl", f"must be one of {', '.join(impls)}, got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda else "torch"
    runnable = impl != "triton" or runs_triton(tensor)
    require(runnable, "impl", "'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before the first import")
    return impl


def check_values(tensor: torch.Tensor) -> bool:
    """Return whether to check the values of `tensor`: always on the CPU, on CUDA only with VTFAST_CHECK=1."""
    return CHECK_VALUES or not tensor.is_cuda


def check_tensor(
    name: str, x: torch.Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: torch.Tensor
) -> None:
    """`shape` may hold None for a free size; `like` has the expected device."""
    require(isinstance(x, torch.Tensor), name, f"expected a tensor, got {type(x).__name__}")
    got = x.shape
    fits = len(got) == len(shape)
    if fits:
        for expected, size in zip(shape, got, strict=True):
            fits = fits and (expected is None or expected == size)
    if fits and x.dtype in dtypes and x.device == like.device:
        return  # a decode step checks hundreds of tensors: messages are built on failure only
    require(fits, name, f"expected shape {_show(shape)}, got {tuple(got)}")
    require(x.dtype in dtypes, name, f"expected {' | '.join(map(str, dtypes))}, got {x.dtype}")
    require(False, name, f"on {x.device}, expected {like.device}")


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def check_head(hidden: torch.Tensor, weight: torch.Tensor, impl: str) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("hidden", hidden, (None, None), dtypes, hidden)
    check_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden)
    require(weight.shape[0] > 0 and weight.shape[1] > 0, "weight", "must have at least one row and one column")


def check_target(target: torch.Tensor, hidden: torch.Tensor, vocab: int) -> None:
    check_tensor("target", target, (hidden.shape[0],), (torch.int64,), hidden)
    if target.numel() and check_values(target):
        low, high = (int(v) for v in target.aminmax())
        in_range = high < vocab and (low >= 0 or bool(((target >= 0) | (target == IGNORE_INDEX)).all()))
        require(in_range, "target", f"ids must be {IGNORE_INDEX} or in [0, {vocab}), got {low} .. {high}")


def check_temperature(temperature: float, name: str = "temperature") -> None:
    ok = isinstance(temperature, (int, float)) and 0 < temperature < float("inf")
    require(ok, name, f"must be a positive number, got {temperature!r}")


def check_share(name: str, value: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(is_number and 0 <= value < 1, name, f"must be a number in [0, 1), got {value!r}")


def check_sequences(sequence_id: torch.Tensor, advantage: torch.Tensor, like: torch.Tensor) -> None:
    """Check the sequence of each of `like.shape[0]` tokens, non-decreasing in [0, S), and the S finite advantages."""
    check_tensor("sequence_id", sequence_id, (like.shape[0],), (torch.int64, torch.int32), like)
    check_tensor("advantage", advantage, (None,), REFERENCE_FLOATS, like)
    if check_values(advantage):
        require(bool(advantage.isfinite().all()), "advantage", "has a value that is not finite")
    if sequence_id.numel() and check_values(sequence_id):
        ordered = bool((sequence_id[1:] >= sequence_id[:-1]).all())
        require(ordered, "sequence_id", "must be non-decreasing")
        low, high, S = int(sequence_id[0]), int(sequence_id[-1]), advantage.shape[0]
        require(low >= 0 and high < S, "sequence_id", f"ids must be in [0, {S}), got {low} .. {high}")


def check_denominator(name: str, value: int | float | torch.Tensor | None) -> None:
    if isinstance(value, torch.Tensor):
        require(value.dim() == 0, name, f"expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    elif value is not None:
        require(isinstance(value, (int, float)) and value > 0, name, f"must be a positive number, got {value!r}")


def check_reward(reward: torch.Tensor, group_size: int, scale: str, eps: float) -> None:
    dtypes = (*REFERENCE_FLOATS, torch.int32, torch.int64)
    check_tensor("reward", reward, (None,), dtypes, reward)
    is_count = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    require(is_count, "group_size", f"must be a positive integer, got {group_size!r}")
    S = reward.shape[0]
    require(S % group_size == 0, "reward", f"{S} rewards cannot be split into groups of {group_size}")
    require(scale in SCALES, "scale", f"must be one of {', '.join(SCALES)}, got {scale!r}")
    require(isinstance(eps, (int, float)) and eps >= 0, "eps", f"must not be negative, got {eps!r}")
    if check_values(reward):
        require(bool(torch.isfinite(reward).all()), "reward", "has a value that is not finite")


def check_rows(hidden: torch.Tensor, row_key: torch.Tensor, position: torch.Tensor) -> None:
    check_tensor("row_key", row_key, (hidden.shape[0],), (torch.int64,), hidden)
    check_tensor("position", position, (hidden.shape[0],), (torch.int64,), hidden)


def check_norm(x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, impl: str) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("x", x, (None, None), dtypes, x)
    check_tensor("weight", weight, (x.shape[1],), (x.dtype,), x)
    if delta is not None:
        check_tensor("delta", delta, tuple(x.shape), (x.dtype,), x)
    require(isinstance(eps, float) and eps >= 0, "eps", f"must be a float of at least 0, got {eps!r}")


def check_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    impl: str,
) -> None:
    dtypes = REFERENCE_FLOATS if impl == "reference" else FLOATS
    check_tensor("qkv", qkv, (None, None), dtypes, qkv)
    check_tensor("keys", keys, (None, None, None, None), (qkv.dtype,), qkv)
    check_tensor("values", values, tuple(keys.shape), (qkv.dtype,), qkv)
    contiguous = keys.is_contiguous() and values.is_contiguous()
    require(contiguous, "keys", "pages must be contiguous, since they are written in place")
    B, page_size, K, d = keys.shape
    require(d % 2 == 0, "keys", f"the head size must be even, got {d}")
    R, columns = qkv.shape
    has_heads = columns % d == 0 and columns > 2 * K * d
    require(has_heads, "qkv", f"{columns} columns are not query heads, {K} key heads and {K} value heads of size {d}")
    check_tensor("cos", cos, (R, d), (qkv.dtype,), qkv)
    check_tensor("sin", sin, (R, d), (qkv.dtype,), qkv)
    check_tensor("slot", slot, (R,), (torch.int64,), qkv)
    if R and check_values(slot):
        low, high, limit = int(slot.min()), int(slot.max()), B * page_size
        require(low >= 0 and high < limit, "slot", f"must be in [0, {limit}), got {low} .. {high}")
