"""Runs the source of a warp-specialised Gluon kernel on the CPU: both CTAs of a cluster, each with its partitions, in
a random order, with copies that arrive late and matmuls that read their operands as late as they may.

Gluon has no interpreter. What runs here are the kernel's own functions, with `gl`, `tma`, `mbarrier` and the others
replaced. A slot that is filled before it was read, a wrong count, phase, index or mask gives wrong numbers, NaN or a
deadlock, which is reported."""

import random
import threading
import types
from collections.abc import Callable

import torch
import triton
import triton.language as tl


class Barrier:
    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def add(self, arrivals: int = 0, expected: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += expected
        assert self.pending >= 0, "more arrivals than the barrier counts"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Shared:
    """Tensors or barriers of one CTA: `index` gives one."""

    def __init__(self, parts: list, shape: list[int], dtype: torch.dtype | None = None) -> None:
        self.parts, self.type, self.dtype = parts, types.SimpleNamespace(shape=shape), dtype

    def index(self, i: int):
        return self.parts[i]


class Tile:
    """[rows, depth] in shared memory."""

    def __init__(self, rows: int, depth: int) -> None:
        self.values, self.transposed = torch.full((rows, depth), torch.nan), False

    def permute(self, order: tuple[int, int]) -> "Tile":
        assert order == (1, 0)
        view = Tile(0, 0)
        view.values, view.transposed = self.values, not self.transposed
        return view

    def store(self, values: torch.Tensor) -> None:
        self.values.copy_(values)

    def read(self) -> torch.Tensor:
        return self.values.t() if self.transposed else self.values


class Accumulator:
    """A product whose operands are read when it is waited for."""

    def __init__(self, values: torch.Tensor, steps: list[tuple[Tile, Tile, bool]]) -> None:
        self.values, self.steps = values, steps

    def settle(self, outstanding: int) -> None:
        while len(self.steps) > outstanding:
            x, w, use_acc = self.steps.pop(0)
            self.values = x.read() @ w.read() + (self.values if use_acc else 0.0)


class Pointer:
    def __init__(self, tensor: torch.Tensor, index: torch.Tensor | int = 0) -> None:
        self.tensor, self.at = tensor, index

    def __add__(self, index: torch.Tensor) -> "Pointer":
        return Pointer(self.tensor, self.at + index)

    def unsqueeze(self, axis: int) -> "Pointer":
        return Pointer(self.tensor, self.at.unsqueeze(axis))


class Descriptor:
    """A matrix that is read in blocks; `divided`: each CTA gets half of a block's rows, or all of them."""

    def __init__(self, tensor: torch.Tensor, block: list[int], divided: bool) -> None:
        self.tensor, self.divided, self.dtype, self.layout = tensor, divided, tensor.dtype, divided
        self.block_type = types.SimpleNamespace(shape=block)
        self.rows = block[0] // 2 if divided else block[0]
        self.nbytes_per_cta = self.rows * block[1] * 2

    def write(self, row: int, column: int, cta: int, values: torch.Tensor) -> None:
        row += cta * self.rows if self.divided else 0
        part = self.tensor[row : row + self.rows, column : column + values.shape[1]]
        part.copy_(values[: part.shape[0], : part.shape[1]])

    def block(self, row: int, column: int, cta: int) -> torch.Tensor:
        row += cta * self.rows if self.divided else 0
        out = torch.zeros(self.rows, self.block_type.shape[1])
        part = self.tensor[row : row + self.rows, column : column + out.shape[1]]
        out[: part.shape[0], : part.shape[1]] = part
        return out


class Actor(threading.Thread):
    """A partition of a CTA, or a CTA before it is divided. Only one actor runs at a time."""

    def __init__(self, emulator: "Cluster", cta: int, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.emulator, self.cta, self.work = emulator, cta, work
        self.turn, self.ready = threading.Semaphore(0), lambda: True
        self.done, self.error = False, None

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.emulator.stopped:
                self.work()
        except BaseException as error:
            self.error = error
        self.done = True
        self.emulator.turn.release()


class Cluster:
    """Two CTAs of one Triton program."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.turn, self.actors, self.copies, self.stopped = threading.Semaphore(0), [], [], False
        self.barriers: list[dict[int, Barrier]] = [{}, {}]  # of each CTA, by address
        self.tiles: list[list[Shared]] = [[], []]
        self.arrived = self.partitions = 0  # at the cluster's barrier
        self.stores: dict[threading.Thread, list[Callable[[], None]]] = {}

    @property
    def cta(self) -> int:
        return threading.current_thread().cta

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        actor = threading.current_thread()
        actor.ready = ready
        self.turn.release()
        actor.turn.acquire()
        if self.stopped:
            raise SystemExit

    def start(self, cta: int, work: Callable[[], None]) -> Actor:
        self.actors.append(Actor(self, cta, work))
        self.actors[-1].start()
        return self.actors[-1]

    def run(self) -> None:
        try:
            while running := [actor for actor in self.actors if not actor.done]:
                able = [actor for actor in running if actor.ready()]
                assert able or self.copies, "deadlock: every partition waits"
                chosen = self.random.choice([*able, *self.copies])
                if isinstance(chosen, Actor):
                    chosen.turn.release()
                    self.turn.acquire()
                    if chosen.error:
                        raise chosen.error
                else:
                    self.copies.remove(chosen)
                    chosen()
            assert not self.copies, "a copy arrives after its CTA has ended"
        finally:
            self.stopped = True
            for actor in self.actors:
                actor.turn.release()

    # What the kernel calls.

    def allocate(self, dtype, shape: list[int], divided: bool) -> Shared:
        rows = shape[1] // 2 if divided else shape[1]
        self.tiles[self.cta].append(Shared([Tile(rows, shape[2]) for _ in range(shape[0])], shape, dtype))
        return self.tiles[self.cta][-1]

    def allocate_mbarrier(self, batch: int) -> Shared:
        own = self.barriers[self.cta]
        first, parts = 8 * len(own), [Barrier() for _ in range(batch)]
        own.update({first + 8 * i: barrier for i, barrier in enumerate(parts)})
        return Shared(parts, [batch])

    def release(self, address: int) -> None:
        self.pause()
        for cta, own in enumerate(self.barriers):
            assert not self.actors[cta].done, "an arrival at a CTA that has ended"
            own[address].add(arrivals=4)  # four warps

    def expect(self, barrier: Barrier, count: int) -> None:
        barrier.add(arrivals=1, expected=count)
        self.pause()

    def copy(self, source: Descriptor, at: list[int], barrier: Barrier, out: Tile, multicast: bool = False) -> None:
        cta = self.cta
        if multicast and cta != 0:
            return
        address = next(address for address, b in self.barriers[cta].items() if b is barrier)
        i, j = next((i, s.parts.index(out)) for i, s in enumerate(self.tiles[cta]) if out in s.parts)
        for to in (0, 1) if multicast else (cta,):
            self.copies.append(self._arrival(source, at, self.barriers[to][address], self.tiles[to][i].parts[j], to))
        self.pause()

    def _arrival(self, source: Descriptor, at: list[int], barrier: Barrier, out: Tile, cta: int) -> Callable[[], None]:
        def arrive() -> None:
            out.values.copy_(source.block(*at, cta))
            barrier.add(expected=-source.nbytes_per_cta)

        return arrive

    def write(self, to: Descriptor, at: list[int], buffer: Tile) -> None:
        """The buffer is read when the copy is made, not when it is asked for."""
        cta, stores = self.cta, self.stores.setdefault(threading.current_thread(), [])

        def make() -> None:
            to.write(*at, cta, buffer.read())
            stores.remove(make)

        stores.append(make)
        self.copies.append(make)
        self.pause()

    def store_wait(self, pendings: int) -> None:
        stores = self.stores.setdefault(threading.current_thread(), [])
        self.pause(lambda: len(stores) <= pendings)

    def multiply(self, x: Tile, w: Tile, acc, use_acc: bool, is_async: bool) -> Accumulator:
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc, [])
        acc.steps.append((x, w, use_acc))
        self.pause()
        return acc

    def wait_multiply(self, outstanding: int, deps: list[Accumulator]):
        deps[0].settle(outstanding)
        self.pause()
        return deps[0] if outstanding else deps[0].values

    def cluster_arrive(self) -> None:
        self.arrived += 1

    def cluster_wait(self) -> None:
        turn = -(-self.arrived // self.partitions)
        self.pause(lambda: self.arrived >= turn * self.partitions)

    def warp_specialize(self, parts: list[tuple], warps: list[int], registers: list[int]) -> None:
        assert 4 + sum(warps) == 12, "every warp takes part in the cluster's barrier"
        self.partitions = 2 * len(parts)
        started = [self.start(self.cta, lambda f=f, arguments=arguments: f(*arguments)) for f, arguments in parts]
        self.pause(lambda: all(actor.done for actor in started))

    def arange(self, start: int, end: int, layout: tuple) -> torch.Tensor:
        values = torch.arange(start, end)
        return values.chunk(2)[self.cta] if layout == ("slice", 1) else values

    def full(self, shape: list[int], value: float, dtype: torch.dtype, layout) -> torch.Tensor:
        divided = layout != ("slice", 0)
        return torch.full([shape[0] // 2 if divided else shape[0], *shape[1:]], value, dtype=dtype)


def load(at: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
    return torch.where(mask, at.tensor[at.at.clamp(max=at.tensor.numel() - 1)], other)


def store(at: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
    at.tensor.view(-1)[at.at.expand_as(mask)[mask]] = values[mask]


def replacements(c: Cluster) -> dict[str, object]:
    """What the kernel's module and the functions that it shares with Triton kernels see instead of their libraries."""
    gl = types.SimpleNamespace(
        program_id=lambda axis: c.program,
        num_programs=lambda axis: c.programs,
        cdiv=lambda a, b: -(-a // b),
        static_range=range,
        constexpr=lambda value: value,
        SliceLayout=lambda axis, parent: ("slice", axis),
        allocate_shared_memory=c.allocate,
        warp_specialize=c.warp_specialize,
        arange=c.arange,
        full=c.full,
        load=load,
        store=store,
        where=torch.where,
        sum=torch.sum,
        exp2=torch.exp2,
        expand_dims=lambda x, axis: (
            Pointer(x.tensor, x.at.unsqueeze(axis)) if isinstance(x, Pointer) else x.unsqueeze(axis)
        ),
        int32=torch.int32,
        float32=torch.float32,
    )
    triton_language = types.SimpleNamespace(
        maximum=lambda a, b: torch.maximum(a, torch.as_tensor(b)), max=torch.amax, sum=torch.sum, exp2=torch.exp2
    )
    mbarrier = types.SimpleNamespace(
        allocate_mbarrier=c.allocate_mbarrier,
        init=lambda barrier, count: barrier.init(count),
        invalidate=lambda barrier: None,
        fence_init_release_cluster=lambda: None,
        expect=c.expect,
        wait=lambda barrier, parity: c.pause(lambda: barrier.passed(parity)),
    )
    return {
        "gl": gl,
        "tl": triton_language,
        "mbarrier": mbarrier,
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=c.copy, async_copy_shared_to_global=c.write, store_wait=c.store_wait
        ),
        "fence_async_shared": lambda: None,
        "as_in_memory": lambda z, dtype, pairs: z.to(dtype).float(),
        "cluster": types.SimpleNamespace(arrive=c.cluster_arrive, wait=c.cluster_wait),
        "warpgroup_mma": c.multiply,
        "warpgroup_mma_wait": c.wait_multiply,
        "release": c.release,
    }


def plain(function, replaced: dict[str, object], seen: dict | None = None) -> Callable:
    """Return a jit function, and those that it calls, as Python functions with `replaced` libraries."""
    seen = {} if seen is None else seen
    if function not in seen:
        source = function.fn
        known = dict(source.__globals__)
        seen[function] = types.FunctionType(source.__code__, known, source.__name__, source.__defaults__)
        for name in source.__code__.co_names:
            value = known.get(name)
            if name in replaced:
                known[name] = replaced[name]
            elif isinstance(value, triton.runtime.JITFunction):
                known[name] = plain(value, replaced, seen)
            elif isinstance(value, tl.constexpr):
                known[name] = value.value
    return seen[function]


def run_cluster(kernel, program: int, programs: int, seed: int, **arguments) -> None:
    """Run one program of a Gluon kernel."""
    cluster = Cluster(program, programs, seed)
    function = plain(kernel, replacements(cluster))
    for cta in (0, 1):
        cluster.start(cta, lambda: function(**arguments))
    cluster.run()
