"""`python -m bench aot`: compile every Triton kernel for NVIDIA GPUs on a machine that has none.

Each op runs once with its launches recorded instead of executed, so what is compiled is what the op would
launch: same constants, tiles, warps and pointer alignments. One line a kernel variant: registers, loads and
stores of spilled ones, shared memory, programs that fit on a multiprocessor, which tensor-core and copy instructions
the PTX holds, and, of the kernels that go through rows of logits, instructions a logit.
Exit status 1 if anything spills, if a bf16/fp16 matmul for sm_90 goes without wgmma or its TMA variant without
TMA, if fewer programs fit on a multiprocessor than the kernel's file says, if a row kernel needs more instructions a
logit than it did, or if a kernel of the folder was never launched (for sm_90: never with TMA where it could be).
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from vtfast_kernels import cases as registry
from vtfast_kernels import checks, gluon_ring
from vtfast_kernels.add_rms_norm import add_rms_norm
from vtfast_kernels.cases import OPS, Shape, specs
from vtfast_kernels.loss_chunks import TritonChunks
from vtfast_kernels.page_table import Pages
from vtfast_kernels.paged_attention import paged_attention
from vtfast_kernels.rope_append import rope_append
from vtfast_kernels.silu_mul import silu_mul

ARCHES = (90, 80, 100)
SHAPE = Shape(N=64, V=8192, D=1536)  # the row kernels' block is as wide as for the real vocabulary
WITH_TMA = ("logprob_kernel", "linear_sample_kernel")  # what sm_90 launches so
PROGRAMS = {"logprob_kernel": 2, "linear_sample_kernel": 2, "paged_attention_kernel": 4}
"""As many fit on a Hopper multiprocessor in half precision."""
SMALL_MATMULS = ("paged_attention_kernel",)  # of fewer rows than wgmma's 64
INSTRUCTIONS = {"no pass": 0.1, "one pass": 11.0, "two passes": 23.5, "known": 10.0, "entropy": 28.0}
"""At most so many a logit in a row kernel for sm_90, bf16."""
HOPPER = {"registers": 65536, "threads": 2048, "shared": 233_472}  # of a multiprocessor
HOPPER_ONLY = ("setmaxnreg", "wgmma.mma_async.sync.aligned.m64n256k16", ".multicast::cluster")
"""What the PTX of a Gluon kernel has to hold."""
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    label: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned} {self.options}"


def kernel_names() -> list[str]:
    """Every `@triton.jit` function of the folder that is launched: its name ends so."""
    files = sorted(Path(registry.__file__).parent.glob("*.py"))
    pattern = r"@(?:triton|gluon)\.jit(?:\([^)]*\))?\ndef (\w+_kernel)\("
    return [name for file in files for name in re.findall(pattern, file.read_text("utf-8"))]


def describe(kernel: JITFunction, args: tuple, kwargs: dict[str, Any], label: str) -> Launch:
    """The specialisation that Triton's launcher would make of these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    values |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    constants, aligned = {}, []
    for index, param in enumerate(kernel.params):
        value = values[param.name]
        one = type(value) is int and value == 1 and not param.do_not_specialize
        if param.is_constexpr or one:
            signature[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = list(value.block_shape)
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}{block}>"
        elif isinstance(value, GluonDescriptor):
            signature[param.name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            if value.data_ptr() % 16 == 0 and not param.do_not_specialize_on_alignment:
                aligned.append(index)
        elif isinstance(value, tuple):
            assert all(type(x) is float for x in value), "a number of another type would be specialised"
            signature[param.name] = value._replace(**dict.fromkeys(value._fields, "fp32"))
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            specialised = not (param.do_not_specialize or param.do_not_specialize_on_alignment)
            if value % 16 == 0 and specialised:
                aligned.append(index)
    return Launch(kernel, label, signature, constants, tuple(aligned), options)


@contextlib.contextmanager
def recorded(arch: int, label: list[str] | None = None) -> Iterator[dict[str, Launch]]:
    """Ops record their launches for a GPU of this architecture instead of executing them, duplicates removed."""
    launches: dict[str, Launch] = {}
    label = label or [""]

    def run(self, *args, grid, warmup, **kwargs):
        launch = describe(self, args, kwargs, label[0])
        launches.setdefault(launch.key, launch)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(checks, "runs_triton", lambda x: True),
        mock.patch.object(checks, "capability", lambda x: arch),
        mock.patch.object(TritonChunks, "drifted", lambda self: False),  # no kernel has filled its results
        mock.patch.object(gluon_ring, "empty_offset", lambda compiled: 0),  # nothing is compiled yet
    ):
        yield launches


def record(arch: int) -> list[Launch]:
    """Every launch of every op for a GPU of this architecture."""
    label = [""]
    with recorded(arch, label) as launches:
        for label[0], call in cases(arch):
            call()
    return list(launches.values())


BY_HAND = {
    "linear_logprob",
    "linear_sample",
    "linear_grpo_loss",
    "grpo_loss",
    "group_advantage",
    "paged_attention",
    "rope_append",
    "add_rms_norm",
    "silu_mul",
}
"""Ops whose options change a kernel; any other is compiled for the registry's inputs in each dtype."""


def cases(arch: int):
    """(label, thunk) for every op, dtype and option that changes a kernel; for Hopper also for every loss, and for
    fp16."""

    def thunk(name: str, dtype: torch.dtype, shape: Shape = SHAPE, **options):
        op = OPS[name]
        more = {"spec": options["spec"]} if "spec" in options else {}
        inputs = op.inputs(shape, dtype, **more)
        inputs |= {key: value for key, value in options.items() if key not in ("spec", "impl")}

        def call():
            for leaf in op.differentiable:
                inputs[leaf].requires_grad_()
            out = op.run(inputs, impl=options.get("impl", "triton"))
            loss = getattr(out, "loss", None)
            if loss is None and op.differentiable:
                loss = sum(x.sum() for x in (out if isinstance(out, tuple) else (out,)))
            if loss is not None:
                loss.backward()

        return call

    for dtype in (torch.bfloat16, torch.float32, *([torch.float16] if arch == 90 else [])):
        kind = TYPES[dtype]
        for name in OPS:
            if name not in BY_HAND:
                yield kind, thunk(name, dtype)
        for entropy in (True, False):
            label = f"{kind}{' entropy' if entropy else ''}"
            yield label, thunk("linear_logprob", dtype, entropy=entropy)
            if arch == 90 and dtype != torch.float32:
                yield label, thunk("linear_logprob", dtype, entropy=entropy, impl="gluon")
        for rows in (1, 16, 64, 128):
            for greedy in (False, True):
                label = f"{kind} {rows} rows{' greedy' if greedy else ''}"
                shape = Shape(rows, SHAPE.V, SHAPE.D)
                inputs = thunk("linear_sample", dtype, shape, greedy=greedy)
                yield label, inputs
        for rows in (1, 8, 64, 256) if arch == 90 else (64,):
            for call in decode_thunks(rows, dtype):
                yield f"{kind} {rows} rows", call
    for name in ("linear_logprob", "linear_sample"):
        yield "bf16 D=100", thunk(name, torch.bfloat16, Shape(129, 1000, 100))
        yield "bf16 1 token", thunk(name, torch.bfloat16, Shape(1, SHAPE.V, SHAPE.D))
    losses = specs() if arch == 90 else {name: specs()[name] for name in ("grpo-token", "vespo-token")}
    for name, spec in losses.items():
        sampler = {} if "mask" in name or "truncate" in name else {"sampler_logp": None}
        yield f"bf16 {name}", thunk("linear_grpo_loss", torch.bfloat16, spec=spec, **sampler)
        if name in ("grpo-token", "grpo-sequence"):
            alone = {"old_logp": None, "sampler_logp": None}
            yield f"bf16 {name} two passes", thunk("linear_grpo_loss", torch.bfloat16, spec=spec, **alone)
        yield name, thunk("grpo_loss", torch.float32, spec=spec, **sampler)
        if name == "grpo-token" and arch == 90:
            yield f"bf16 {name} gluon", thunk("linear_grpo_loss", torch.bfloat16, spec=spec, impl="gluon", **sampler)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for label, given in (("one pass", {}), ("two passes", {"old_logp": None, "sampler_logp": None})):
            yield f"{TYPES[dtype]} sparse {label}", thunk("linear_grpo_loss", dtype, sparse_tau=0.001, **given)
    for scale in ("group", "batch", "none"):
        yield scale, thunk("group_advantage", torch.float32, scale=scale)
        yield f"{scale} G=1", thunk("group_advantage", torch.float32, scale=scale, group_size=1)


def decode_thunks(rows: int, dtype: torch.dtype):
    """The ops of Qwen2-VL-2B's decode step: 12 query heads over 2 key heads of 128, pages of 256, groups of 8."""
    row = torch.arange(rows)
    at, x = row.int(), torch.zeros(rows, 1536, dtype=dtype)
    pages = Pages(torch.zeros(rows, 8, dtype=torch.int32), at + 900, at // 8, 0 * at + 2, 256)
    pool = torch.zeros(4, 256, 2, 128, dtype=dtype)
    turn = torch.zeros(rows, 128, dtype=dtype)
    query, qkv, gate_up = (torch.zeros(rows, n, dtype=dtype) for n in (1536, 2048, 17920))
    yield lambda: paged_attention(query.view(rows, 12, 128), pool, pool, pages, impl="triton")
    yield lambda: rope_append(qkv, turn, turn, row, pool, pool, impl="triton")
    yield lambda: add_rms_norm(x, x, x[0], impl="triton")
    yield lambda: add_rms_norm(x, None, x[0], impl="triton")
    yield lambda: silu_mul(gate_up, impl="triton")


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    is_gluon = launch.kernel.is_gluon()
    source = (GluonASTSource if is_gluon else ASTSource)(
        launch.kernel,
        {name: launch.signature[name] for name in launch.kernel.arg_names},
        launch.constants,
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])  # with those of Gluon's partitions
    if is_gluon:
        gluon_ring.empty_offset(compiled)  # asserts that the barriers lie where the kernel can reach them
    return {
        "registers": registers,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": shared,
        "programs": min(
            HOPPER["registers"] // (-(-registers // 8) * 8 * threads),
            HOPPER["threads"] // threads,
            HOPPER["shared"] // (shared + 1024),
        ),
        "instructions": instructions_per_logit(sass, launch),
        "matmul": is_gluon or "tt.dot" in compiled.asm["ttir"],
        "gluon": all(x in ptx for x in HOPPER_ONLY),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "mma": ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
    }


def instructions_per_logit(sass: str, launch: Launch) -> float:
    """Return the instructions in the loops of a row kernel over the logits that a thread handles in one turn of each
    loop; 0 of another kernel."""
    if launch.kernel.__name__ not in ROW_KERNELS:
        return 0.0
    address = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = 0
    for at, text in address:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            loops += sum(int(target[1], 16) <= place <= at for place, _ in address)
    return loops * 32 * launch.options["num_warps"] / launch.constants["BLOCK"]


ROW_KERNELS = ("grpo_rows_kernel", "dlogits_kernel")


def way(launch: Launch) -> str:
    """How a row kernel goes through its row."""
    c = launch.constants
    if launch.kernel.__name__ == "grpo_rows_kernel":
        return ("no pass", "one pass", "two passes")[c["PASSES"]]
    return "known" if c["KNOWN"] else "entropy" if c["ENTROPY"] else "two passes"


def faults_of(launch: Launch, arch: int, r: dict[str, Any]) -> list[str]:
    """What must not be, of a compiled launch."""
    name, found = launch.kernel.__name__, []
    half = "bf16" in str(launch.signature) or "fp16" in str(launch.signature)
    if r["spills"]:
        found.append("spills")
    if arch != 90:
        return found
    if r["matmul"] and half and not r["wgmma"] and name not in SMALL_MATMULS:
        found.append("no wgmma")
    if launch.constants.get("TMA") and not r["tma"]:
        found.append("no TMA")
    if launch.kernel.is_gluon() and not r["gluon"]:
        found.append(f"without one of {', '.join(HOPPER_ONLY)}")
    if half and r["programs"] < PROGRAMS.get(name, 1):
        found.append(f"less than {PROGRAMS[name]} programs a multiprocessor")
    if name in ROW_KERNELS and "bf16" in str(launch.signature) and launch.constants["BLOCK"] == 8192:
        limit = INSTRUCTIONS[way(launch)]
        if r["instructions"] > limit:
            found.append(f"more than {limit} instructions a logit")
    return found


COLUMNS = (
    "kernel",
    "variant",
    "arch",
    "registers",
    "spills",
    "shared",
    "programs",
    "instructions",
    "wgmma",
    "tma",
    "mma",
    "verdict",
)
ROW = "{:<24} {:<36} {:<6} {:>9} {:>6} {:>7} {:>8} {:>12} {:>6} {:>4} {:>4}  {}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES, help="default: 90 80 100")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    options = parser.parse_args(argv)
    if not any(options.kernel in name for name in kernel_names()):
        parser.error(f"--kernel {options.kernel}: there are {', '.join(kernel_names())}")
    torch.manual_seed(0)
    pool = ThreadPoolExecutor(os.cpu_count())
    failed = compiled = 0
    print(ROW.format(*COLUMNS))
    for arch in options.arch:
        launches = record(arch)
        for name in kernel_names():
            tma = name in WITH_TMA
            found = [launch for launch in launches if launch.kernel.__name__ == name]
            if name.startswith("gluon") and arch != 90:
                continue
            if not any(launch.constants.get("TMA") or not (tma and arch == 90) for launch in found):
                print(f"{name} was not launched for sm_{arch}{' with TMA' if tma else ''}")
                failed += 1
        chosen = [launch for launch in launches if options.kernel in launch.kernel.__name__]
        for launch, r in zip(chosen, pool.map(compile_launch, chosen, repeat(arch)), strict=True):
            faults = faults_of(launch, arch, r)
            counts = [round(r[column], 1) for column in COLUMNS[3:-1]]
            print(ROW.format(launch.kernel.__name__, launch.label, f"sm_{arch}", *counts, ", ".join(faults) or "ok"))
            sys.stdout.flush()
            compiled, failed = compiled + 1, failed + bool(faults)
    print(f"\n{compiled} kernel variants compiled, {failed} failed")
    return 1 if failed or not compiled else 0
