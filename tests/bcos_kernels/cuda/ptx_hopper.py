"""Runs the PTX of a kernel for sm_90a on a CPU: what Hopper adds to ptx.py.

The threads of all blocks of a cluster lie side by side. Some of them run until they wait for others (at a barrier, for
the phase of an mbarrier, for the rest of their warp), then others do; nobody left to run is a deadlock, and an error
that names what is waited for. Copies of the tensor memory accelerator to shared memory (its im2col mode, multicast and
swizzles included) land either at once or as late as they may: when somebody waits for them, and nobody can run. So do
products of a warp group (WGMMA) and copies to global memory read shared memory. A kernel whose waits are right computes
the same in every order: loads that land late under reads at once show a wait for data that is missing, loads at once
under late reads a wait for those who still read.

Encodings follow the PTX ISA (mbarriers, tensors and their im2col mode, swizzles, matrix descriptors and fragments of
wgmma) and cuda.h (limits of tensor maps). A tensor map is 128 bytes that nobody but the driver knows: recorder.cpp, the
driver here, writes its parameters into them as `_MAP` says.

Not seen: a missing fence between the generic and the asynchronous proxy, speed, what ptxas makes of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from tests.bcos_kernels.cuda.ptx import WARP, Block, Instruction, Memory, Program, widen

_WARP_GROUP = 128
_WINDOW_BITS = 24  # of an address in a cluster's shared memory: the offset in a block's; above it, 1 + the block's rank
_SHARED_BASE = 1024  # where a block's dynamic shared memory begins: what lies below is the system's
_PARAMETERS = 1 << 40  # generic addresses of the kernel's parameter begin here
_IDLE_ROUNDS = 4  # in which every mbarrier.try_wait fails and nobody gets any further: a deadlock
_MARK = np.frombuffer(b"mbarrier", np.uint8)  # lies where an mbarrier does

_RUNS, _GATHERS, _AT_BARRIER, _AT_MBARRIER, _AT_CLUSTER = range(5)  # what a thread does

# Instructions that all threads of a warp, or of a warp group, execute together.
_OF_WARPS = {"bar", "barrier", "elect", "ldmatrix", "setmaxnreg", "shfl", "stmatrix", "wgmma"}

# --- tensor maps ------------------------------------------------------------------------------------------------------

_MAP = np.dtype(
    [
        ("mark", "S4"), ("im2col", "u1"), ("rank", "u1"), ("element_bytes", "u1"), ("span", "u1"), ("address", "u8"),
        ("strides", "u8", 4), ("last", "u4", 5), ("box", "u2", 5), ("steps", "u1", 5), ("unused", "u1"),
        ("lower", "i2", 3), ("upper", "i2", 3), ("channels", "u2"), ("pixels", "u2"), ("padding", "u1", 28),
    ]
)  # fmt: skip
assert _MAP.itemsize == 128


def _swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where a byte lies whose address is ``address`` without swizzling: 16-byte chunks change places within ``span``
    bytes (0: stay) by the number of the 128 bytes that they are in."""
    return address ^ (((address >> 7) & (max(span, 16) // 16 - 1)) << 4)


class _TensorMap:
    def __init__(self, raw: np.ndarray):
        (self.of,) = np.frombuffer(raw.tobytes(), _MAP)
        if self.of["mark"] != b"TMap":
            raise RuntimeError("ptx: expected a tensor map that the driver has encoded")
        self.rank, self.element, self.span = (int(self.of[name]) for name in ("rank", "element_bytes", "span"))
        self.im2col = bool(self.of["im2col"])
        self.sizes = self.of["last"][: self.rank].astype(np.int64) + 1
        self.strides = np.array([self.element, *self.of["strides"][: self.rank - 1]], np.int64)
        self.inner = int(self.of["channels"] if self.im2col else self.of["box"][0])
        if self.span not in (0, self.inner * self.element):
            raise NotImplementedError(f"ptx: rows of {self.inner * self.element} bytes swizzled within {self.span}")

    def elements(self, at: list[int], offsets: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of the box at coordinates ``at``, in the order of shared memory: addresses, and which lie in the tensor."""
        if len(at) != self.rank or len(offsets) not in (0, self.rank - 2):
            raise RuntimeError(f"ptx: coordinates {at} and offsets {offsets} of a tensor of rank {self.rank}")
        inner = at[0] + np.arange(self.inner)
        if self.im2col:
            outer = self._pixels(at[1:], offsets)
        else:
            steps = [int(step) for step in self.of["steps"][1 : self.rank]]
            counts = [-(-int(n) // step) for n, step in zip(self.of["box"][1 : self.rank], steps, strict=True)]
            axes = [x + np.arange(n) * step for x, n, step in zip(at[1:], counts, steps, strict=True)]
            outer = [axis.reshape(-1) for axis in np.meshgrid(*axes[::-1], indexing="ij")][::-1]
        coordinates = [inner[None, :], *(axis[:, None] for axis in outer)]
        inside = np.ones((len(outer[0]) if outer else 1, len(inner)), bool)
        address = np.full(inside.shape, int(self.of["address"]), np.int64)
        for coordinate, size, stride in zip(coordinates, self.sizes, self.strides, strict=True):
            inside &= (coordinate >= 0) & (coordinate < size)
            address = address + coordinate * stride
        return address.reshape(-1), inside.reshape(-1)

    def _pixels(self, at: list[int], offsets: list[int]) -> list[np.ndarray]:
        """(W, H, N) of the pixels from ``at`` on, which stay within the bounding box of every image, moved by the
        offsets of a window's element."""
        steps, sizes = self.of["steps"][1:-1].astype(np.int64), self.sizes[1:-1]
        pixel = np.arange(int(self.of["pixels"]))
        moved, offsets = [], offsets or [0] * (self.rank - 2)
        for k, size in enumerate(sizes):
            first, step = int(self.of["lower"][k]), int(steps[k])
            last = int(size) - 1 + int(self.of["upper"][k])
            count = (last - first) // step + 1
            if not first <= at[k] <= last or (at[k] - first) % step:
                raise NotImplementedError(f"ptx: pixels from {at} on, outside of the bounding box or between its steps")
            pixel = pixel + (at[k] - first) // step
            moved.append(first + pixel % count * step + offsets[k])
            pixel = pixel // count
        return [*moved, at[-1] + pixel]


# --- matrices of wgmma in shared memory -------------------------------------------------------------------------------


@cache
def _matrix_offsets(span: int, leading: int, stride: int, rows: int, transposed: bool) -> np.ndarray:
    """Bytes from a matrix's start to its elements, (rows, 16), 16 bits each, before swizzling.

    Rows are of M or N and columns of K. As it is, K runs along the span, and ``stride`` bytes lie between groups of 8
    rows. Transposed, M or N runs along the span: ``leading`` bytes lie between spans, ``stride`` bytes between groups
    of 8 columns.
    """
    row, column = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        width = span // 2
        return row % width * 2 + row // width * leading + column % 8 * span + column // 8 * stride
    return row % 8 * span + row // 8 * stride + column * 2


@cache
def _fragment(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, (128, registers), of an accumulator of 64 rows."""
    thread, register = np.arange(_WARP_GROUP)[:, None], np.arange(registers)[None, :]
    row = thread // WARP * 16 + thread % WARP // 4 + 8 * (register >> 1 & 1)
    return row, np.broadcast_to((register >> 2) * 8 + thread % 4 * 2 + (register & 1), row.shape)


@cache
def _registers_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"%f\w+", text))


class _Mbarrier:
    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = 0  # expected and not yet there
        self.phase = 0  # how many are complete


# --- a cluster --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Launch:
    """The arguments of `run`."""

    program: Program
    parameters: bytes
    memory: Memory
    grid: tuple[int, int, int]
    threads: int
    shared: int
    cluster: tuple[int, int, int]
    early_loads: bool
    early_reads: bool
    together: int


class _Cluster(Block):
    """Threads are counted through the cluster: those of block 0 come first."""

    def __init__(self, launch: _Launch, first: tuple[int, int, int], order: np.random.Generator):
        blocks, threads, size = math.prod(launch.cluster), launch.threads, launch.cluster
        self.block_bytes = _SHARED_BASE + launch.shared
        given = launch.program, launch.parameters, launch.memory, threads * blocks, self.block_bytes * blocks
        super().__init__(*given, first, launch.grid)
        self.shared_base, self.blocks, self.block_threads = _SHARED_BASE, blocks, threads
        self.together, self.order = min(launch.together, self.threads), order
        self.early_loads, self.early_reads = launch.early_loads, launch.early_reads
        self.block = np.arange(self.threads) // threads
        places = [np.unravel_index(rank, size[::-1])[::-1] for rank in range(blocks)]
        for k, axis in enumerate("xyz"):
            within = np.array([place[k] for place in places], np.uint32)[self.block]
            self.registers[f"%cluster_ctaid.{axis}"] = within
            self.registers[f"%ctaid.{axis}"] = np.uint32(first[k]) + within
        self.registers["%cluster_ctarank"] = self.block.astype(np.uint32)
        self.registers["%tid.x"] = (np.arange(self.threads) % threads).astype(np.uint32)
        self.registers["%ntid.x"] = np.full(self.threads, threads, np.uint32)

        self.does = np.full(self.threads, _RUNS)
        self.unit = None
        self.idle_rounds = 0
        self.barriers: dict[int, list] = {}  # block and number → threads expected, those that wait, how many came
        self.mbarriers: dict[int, _Mbarrier] = {}
        self.waits_for = np.full(self.threads, -1, np.int64)  # an mbarrier's place
        self.fails = np.ones(self.threads, bool)  # the try_wait that comes fails at once where it would wait
        self.cluster_phase = 0
        self.arrived = np.zeros(self.threads, bool)
        self.arrived_in = np.full(self.threads, -1)
        self.maps: dict[int, _TensorMap] = {}
        self.copies: list[tuple[int, np.ndarray, np.ndarray]] = []  # to shared memory: mbarrier, places, values
        # Groups of a thread and of a warp group, the open one last; what is made early is in them until it is waited
        # for.
        self.stores: dict[int, list[list]] = {}
        self.products: dict[int, list[list]] = {}
        self.accumulators: dict[str, np.ndarray] = {}  # registers of products on their way → of which threads

    # who runs --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            while self.on.any():
                ready = self.on & (self.does == _RUNS)
                if not ready.any():
                    self.idle()
                    continue
                ready = self.of_a_unit(ready)
                at = int(self.at[ready].min())
                self.issue(at, self.on & (self.at == at) & (ready | (self.does == _GATHERS)))
        if self.copies:
            raise RuntimeError(f"ptx: the kernel has ended, and {len(self.copies)} copies are on their way")

    def of_a_unit(self, ready: np.ndarray) -> np.ndarray:
        """Those of the latest unit, or of another that has some."""
        units = ready.reshape(-1, self.together)
        if self.unit is None or not units[self.unit].any():
            self.unit = self.order.choice(np.nonzero(units.any(1))[0])
        chosen = np.zeros_like(units)
        chosen[self.unit] = units[self.unit]
        return chosen.reshape(-1)

    def issue(self, at: int, active: np.ndarray) -> None:
        i = self.program.instructions[at]
        if i.name in _OF_WARPS:
            width = _WARP_GROUP if i.name in ("setmaxnreg", "wgmma") else WARP
            here, there = active.reshape(-1, width), self.on.reshape(-1, width)
            if (here.any(1) & ~there.all(1)).any():
                raise RuntimeError(f"ptx: {i.text}: threads of the warp have returned")
            whole = np.repeat(here.all(1), width)
            self.does[active] = np.where(whole, _RUNS, _GATHERS)[active]
            active = active & whole
            if not active.any():
                return
        if self.accumulators and i.name != "wgmma":
            for name in _registers_of(i.text) & self.accumulators.keys():
                if (self.accumulators[name] & active).any():
                    raise RuntimeError(f"ptx: {i.text}: {name} belongs to a product that nobody has waited for")
        super().issue(at, active)

    def idle(self) -> None:
        """Nobody runs: a copy lands that somebody waits for, or every try_wait fails once."""
        waiting = self.on & (self.does == _AT_MBARRIER)
        waited_for = set(self.waits_for[waiting].tolist())
        for k in reversed(range(len(self.copies))):
            if self.copies[k][0] in waited_for:
                self.land(*self.copies.pop(k))
                return
        self.idle_rounds += 1
        if not waiting.any() or self.idle_rounds > _IDLE_ROUNDS:
            raise RuntimeError(f"ptx: a deadlock, waiting at {self.waiting_at()}")
        self.fails[waiting] = True
        self.does[waiting] = _RUNS

    def waiting_at(self) -> str:
        behind = np.isin(self.does, (_AT_BARRIER, _AT_CLUSTER))
        told = []
        for block in range(self.blocks):
            here = self.on & (self.block == block)
            for at in np.unique((self.at - behind)[here]):
                threads = here & (self.at - behind == at)
                text = self.program.instructions[at].text
                told.append(f"{text} ({threads.sum()} threads of block {block}, from {np.nonzero(threads)[0][0]} on)")
        return "; ".join(told)

    def goes_on(self, threads: np.ndarray) -> None:
        self.does[threads] = _RUNS
        self.idle_rounds = 0

    def _ret(self, i, mask):
        for thread in np.nonzero(mask)[0]:
            if any(self.stores.get(thread, ())):
                raise RuntimeError("ptx: a thread returns, and nobody has waited for its stores")
        for name, threads in self.accumulators.items():
            if (threads & mask).any():
                raise RuntimeError(f"ptx: a thread returns, and {name} belongs to a product")
        super()._ret(i, mask)
        self.cluster_arrives()

    # barriers --------------------------------------------------------------------------------------------------------

    def _bar(self, i, mask):
        if i.modifiers[0] == "warp":
            return
        if i.modifiers not in (("sync",), ("arrive",)):
            raise NotImplementedError(f"ptx: {i.text}")
        number = self.read(i.operands[0], "u32").astype(np.int64)
        counts = self.read(i.operands[1], "u32") if len(i.operands) > 1 else np.full(self.threads, self.block_threads)
        key = self.block * 16 + number
        for barrier in np.unique(key[mask]):
            here = mask & (key == barrier)
            expected = int(counts[here][0])
            state = self.barriers.setdefault(int(barrier), [expected, np.zeros(self.threads, bool), 0])
            state[2] += int(here.sum())
            if state[0] != expected or (counts[here] != expected).any() or state[2] > expected:
                came = f"{state[2]} threads came where {state[0]} and {expected} are expected"
                raise RuntimeError(f"ptx: {i.text}: {came}")
            if i.modifiers[0] == "sync":
                state[1] |= here
                self.does[here] = _AT_BARRIER
            if state[2] == expected:
                self.goes_on(self.barriers.pop(int(barrier))[1])

    def _barrier(self, i, mask):
        if i.modifiers[:2] == ("cluster", "arrive"):
            if (self.arrived & mask).any():
                raise RuntimeError(f"ptx: {i.text}: twice in a phase")
            self.arrived |= mask
            self.arrived_in[mask] = self.cluster_phase
            self.cluster_arrives()
        elif i.modifiers[:2] == ("cluster", "wait"):
            if (self.arrived_in[mask] < 0).any():
                raise RuntimeError(f"ptx: {i.text} before an arrival")
            self.does[mask & (self.arrived_in == self.cluster_phase)] = _AT_CLUSTER
        else:
            raise NotImplementedError(f"ptx: {i.text}")

    def cluster_arrives(self) -> None:
        """Those that have returned count as arrived."""
        if self.arrived.any() and (self.arrived | ~self.on).all():
            self.arrived[:] = False
            self.cluster_phase += 1
            self.goes_on(self.does == _AT_CLUSTER)

    # mbarriers -------------------------------------------------------------------------------------------------------

    def _mbarrier(self, i, mask):
        what, expects = i.modifiers[0], "expect_tx" in i.modifiers
        operands = i.operands[1:] if what in ("arrive", "try_wait") else i.operands
        counts = what == "arrive" and (i.operands[0] != "_" or len(operands) != 1 + expects)  # or tells the state
        if what not in ("init", "arrive", "expect_tx", "try_wait") or counts:
            raise NotImplementedError(f"ptx: {i.text}")
        places = self.places(self.address(operands[0]), 8, mask, i)[:, 0]
        if what == "try_wait":
            self.try_wait(i, mask, places)
            return
        numbers = self.read(operands[1], "u32")[mask] if len(operands) > 1 else np.ones(len(places), np.uint32)
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            if what == "init":
                self.mbarriers[place] = _Mbarrier(number)
                self.shared[place : place + 8] = _MARK
                continue
            barrier = self.mbarrier(place, i.text)
            if expects:
                barrier.bytes += number
            if what == "arrive":
                barrier.pending -= 1
                if barrier.pending < 0:
                    raise RuntimeError(f"ptx: {i.text}: more than the {barrier.count} arrivals of a phase")
            self.phase_of(place)

    def mbarrier(self, place: int, text: str) -> _Mbarrier:
        block, at = divmod(place, self.block_bytes)
        if place not in self.mbarriers or (self.shared[place : place + 8] != _MARK).any():
            raise RuntimeError(f"ptx: {text}: no mbarrier at {at}, or something written over it")
        if not self.on[self.block == block].any():
            raise RuntimeError(f"ptx: {text}: block {block} has ended, and with it its mbarriers")
        return self.mbarriers[place]

    def phase_of(self, place: int) -> None:
        """Completes the phase if everybody has come and everything is there."""
        barrier = self.mbarriers[place]
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            self.goes_on((self.does == _AT_MBARRIER) & (self.waits_for == place))

    def try_wait(self, i, mask, places):
        """Whether the phase of this parity is complete. Where it is not, a thread is told so, as it may be at any time,
        and waits at its next attempt."""
        if i.modifiers[1] != "parity":
            raise NotImplementedError(f"ptx: {i.text}")
        parity = self.read(i.operands[2], "u32")[mask]
        complete = [(self.mbarrier(place, i.text).phase - 1) & 1 for place in places.tolist()] == parity
        result = np.zeros(self.threads, bool)
        result[mask] = complete
        waits = mask & ~result & ~self.fails
        self.waits_for[mask] = places
        self.does[waits] = _AT_MBARRIER
        self.at[waits] -= 1
        self.fails[mask] = result[mask]
        self.write(i.operands[0], result, mask & ~waits)

    # addresses -------------------------------------------------------------------------------------------------------

    def places(self, start, size, mask, i):
        return self.places_of(start[mask].astype(np.int64), self.block[mask], size, size, i)[:, None] + np.arange(size)

    def places_of(self, at, block, size, alignment, i):
        """Indices into ``shared`` of addresses in the window of ``block``, or of the block that they tell."""
        rank = at >> _WINDOW_BITS
        block = np.where(rank > 0, rank - 1, block)
        at = at & ((1 << _WINDOW_BITS) - 1)
        outside = (at < _SHARED_BASE) | (at + size > self.block_bytes) | (block >= self.blocks)
        if outside.any() or (at % alignment).any():
            raise RuntimeError(f"ptx: {i.text}: an address outside of shared memory, or not a multiple of {alignment}")
        return block * self.block_bytes + at

    def _mapa(self, i, mask):
        address, rank = (self.read(operand, "u32") for operand in i.operands[1:3])
        if i.modifiers != ("shared::cluster", "u32"):
            raise NotImplementedError(f"ptx: {i.text}")
        self.write(i.operands[0], address | (rank + np.uint32(1)) << np.uint32(_WINDOW_BITS), mask)

    def _cvta(self, i, mask):
        if i.modifiers[0] != "param":
            super()._cvta(i, mask)
            return
        self.write(i.operands[0], self.read(i.operands[1], "u64") + np.uint64(_PARAMETERS), mask)

    # what needs no more than its place -------------------------------------------------------------------------------

    def _elect(self, i, mask):
        """The lowest thread of every warp, all of which are here."""
        if (self.read(i.operands[1], "u32")[mask] != 2**32 - 1).any():
            raise NotImplementedError(f"ptx: {i.text}: of a part of the warp")
        lane, elected = i.operands[0].split("|")
        self.write(lane, np.zeros(self.threads, np.uint32), mask)
        self.write(elected, self.registers["%laneid"] == 0, mask)

    def _fence(self, i, mask):
        known = ("mbarrier_init", "release", "cluster"), ("proxy", "async", "shared::cta")
        if i.modifiers not in known:
            raise NotImplementedError(f"ptx: {i.text}")

    def _setmaxnreg(self, i, mask):
        pass

    def _prefetch(self, i, mask):
        if i.modifiers != ("tensormap",):
            raise NotImplementedError(f"ptx: {i.text}")
        for thread in np.nonzero(mask)[0]:
            self.map_at(i.operands[0], thread, i)

    def _stmatrix(self, i, mask):
        """The inverse of ldmatrix."""
        self.whole_warps(i, mask)
        if "trans" in i.modifiers:
            raise NotImplementedError(f"ptx: {i.text}")
        names = self.values(i.operands[1])
        # (warps, matrices, lanes)
        of_lanes = np.stack([self.read(name, "b32")[mask].reshape(-1, WARP) for name in names], 1)
        rows = np.ascontiguousarray(of_lanes).view(np.uint8).reshape(-1, 16)
        self.shared[self.places(self.address(i.operands[0]), 16, mask, i)] = rows

    # the tensor memory accelerator -----------------------------------------------------------------------------------

    def map_at(self, operand: str, thread: int, i: Instruction) -> _TensorMap:
        at = int(self.address(operand)[thread]) - _PARAMETERS
        if at % 64 or not 0 <= at <= len(self.parameters) - 128:
            raise NotImplementedError(f"ptx: {i.text}: a tensor map outside of the parameter, or not a multiple of 64")
        if at not in self.maps:
            self.maps[at] = _TensorMap(self.parameters[at : at + 128])
        return self.maps[at]

    def box(self, operand: str, offsets: list[int], thread: int, i: Instruction):
        """Of ``[map, {coordinates}]``: the map, addresses, which are inside."""
        name, _, at = operand.strip("[] ").partition(",")
        at = [int(self.read(part, "s32")[thread]) for part in self.values(at.strip())]
        of = self.map_at(name, thread, i)
        if of.im2col != any(modifier.startswith("im2col") for modifier in i.modifiers):
            raise RuntimeError(f"ptx: {i.text}: a tensor map of the other mode")
        return of, *of.elements(at, offsets)

    def rows_of(self, of: _TensorMap, start: int, elements: int, block: int, i: Instruction) -> np.ndarray:
        """Indices into ``shared`` of a box's bytes, (elements, bytes)."""
        if start % 128:
            raise RuntimeError(f"ptx: {i.text}: expected an address in multiples of 128 bytes, got {start}")
        at = _swizzled(start + np.arange(elements) * of.element, of.span)
        return self.places_of(at, block, of.element, of.element, i)[:, None] + np.arange(of.element)

    def _cp(self, i, mask):
        if i.modifiers[:2] != ("async", "bulk"):
            super()._cp(i, mask)
            return
        threads, kind = np.nonzero(mask)[0].tolist(), i.modifiers[2]
        if kind == "commit_group":
            for thread in threads:
                self.stores.setdefault(thread, [[]]).append([])
        elif kind == "wait_group":
            for thread in threads:
                groups = self.stores.setdefault(thread, [[]])
                while len(groups) - 1 > int(i.operands[0]):
                    for store in filter(None, groups.pop(0)):
                        self.store(*store)
        elif i.modifiers[4:6] == ("shared::cluster", "global"):
            for thread in threads:
                self.load_tensor(i, thread)
        elif i.modifiers[4:6] == ("global", "shared::cta"):
            self.store_tensor(i, threads)
        else:
            raise NotImplementedError(f"ptx: {i.text}")

    def load_tensor(self, i: Instruction, thread: int) -> None:
        target, source, mbarrier, *more = i.operands
        offsets = []
        if "im2col" in i.modifiers:
            offsets = [int(self.read(name, "u16")[thread]) for name in self.values(more.pop(0))]
        of, start, inside = self.box(source, offsets, thread, i)
        if of.im2col and not all(0 <= offset <= 255 for offset in offsets):
            raise RuntimeError(f"ptx: {i.text}: offsets {offsets}, of which each has 8 bits")
        values = np.zeros((len(start), of.element), np.uint8)  # zeros outside of the tensor
        values[inside] = self.memory.read(start[inside].astype(np.uint64), of.element, i.text)
        to, barrier = (int(self.address(operand)[thread]) for operand in (target, mbarrier))
        blocks = [int(self.block[thread])]
        if "multicast::cluster" in i.modifiers:
            chosen = int(self.read(more.pop(0), "u16")[thread])
            blocks = [rank for rank in range(16) if chosen >> rank & 1]
        for block in blocks:
            if block >= self.blocks or (to | barrier) >> _WINDOW_BITS:
                raise NotImplementedError(f"ptx: {i.text}: to block {block} of {self.blocks}, or to mapped addresses")
            place = int(self.places_of(np.array(barrier), block, 8, 8, i))
            self.mbarrier(place, i.text)
            copy = place, self.rows_of(of, to, len(start), block, i), values
            if self.early_loads:
                self.land(*copy)
            else:
                self.copies.append(copy)

    def land(self, place: int, places: np.ndarray, values: np.ndarray) -> None:
        self.shared[places] = values
        self.mbarrier(place, "a copy that lands").bytes -= values.size
        self.phase_of(place)

    def store_tensor(self, i: Instruction, threads: list[int]) -> None:
        made = set()
        for thread in threads:
            of, start, inside = self.box(i.operands[0], [], thread, i)
            at = int(self.address(i.operands[1])[thread])
            same = thread // WARP, id(of), at, start[0]
            groups = self.stores.setdefault(thread, [[]])
            if same in made:  # by a whole warp: the same bytes to the same place
                continue
            made.add(same)
            store = start, inside, self.rows_of(of, at, len(start), int(self.block[thread]), i), i.text
            if self.early_reads:
                self.store(*store)
                store = None
            groups[-1].append(store)

    def store(self, start: np.ndarray, inside: np.ndarray, places: np.ndarray, text: str) -> None:
        self.memory.write(start[inside].astype(np.uint64), self.shared[places[inside]], text)

    # products of warp groups -----------------------------------------------------------------------------------------

    def _wgmma(self, i, mask):
        what = i.modifiers[0]
        for group in np.unique(np.nonzero(mask)[0] // _WARP_GROUP).tolist():
            groups = self.products.setdefault(group, [[]])
            if what == "mma_async":
                self.product(i, group)
            elif what == "commit_group":
                groups.append([])
            elif what == "wait_group":
                while len(groups) - 1 > int(i.operands[0]):
                    self.multiply(groups.pop(0), group)
                self.release(group)
            elif what != "fence":
                raise NotImplementedError(f"ptx: {i.text}")

    def release(self, group: int) -> None:
        """The accumulators to which nothing is added any more."""
        used = set().union(*(_registers_of(product[1]) for products in self.products[group] for product in products))
        for name in self.accumulators.keys() - used:
            self.accumulators[name][self.of_group(group)] = False
            if not self.accumulators[name].any():
                del self.accumulators[name]

    def of_group(self, group: int) -> slice:
        return slice(group * _WARP_GROUP, (group + 1) * _WARP_GROUP)

    def product(self, i: Instruction, group: int) -> None:
        target, a, b, accumulate, *scales, a_transposed, b_transposed = i.operands
        shape = re.fullmatch(r"m64n(\d+)k16", i.modifiers[3])
        if shape is None or i.modifiers[4] != "f32" or a.startswith("{") or scales != ["1", "1"]:
            raise NotImplementedError(f"ptx: {i.text}")
        lanes = self.of_group(group)
        descriptors = [self.read(operand, "u64")[lanes] for operand in (a, b)]
        adds = self.read(accumulate, "pred")[lanes]
        if any((values != values[0]).any() for values in (*descriptors, adds)):
            raise RuntimeError(f"ptx: {i.text}: threads of a warp group that say different things")
        for name in self.values(target):
            self.accumulators.setdefault(name, np.zeros(self.threads, bool))[lanes] = True
            if name not in self.registers:
                self.registers[name] = np.full(self.threads, np.nan, np.float32)
        operands = (
            self.matrix(descriptors[0][0], 64, a_transposed == "1", group, i),
            self.matrix(descriptors[1][0], int(shape[1]), b_transposed == "1", group, i),
        )
        if self.early_reads:
            self.multiply([(i, target, operands, bool(adds[0]))], group)
            operands = None
        self.products[group][-1].append((i, target, operands, bool(adds[0])))

    def matrix(self, descriptor: int, rows: int, transposed: bool, group: int, i: Instruction) -> np.ndarray:
        """Indices into ``shared``, (rows, 16), of what a matrix descriptor tells of."""
        descriptor = int(descriptor)
        start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        span = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
        if span is None or descriptor >> 49 & 7:
            raise NotImplementedError(f"ptx: {i.text}: a matrix that is not swizzled, or with a base offset")
        at = _swizzled(start + _matrix_offsets(span, leading, stride, rows, transposed), span)
        return self.places_of(at, self.block[group * _WARP_GROUP], 2, 2, i)

    def multiply(self, products: list, group: int) -> None:
        """In turn; an accumulator is read before the first and written after the last that adds to it."""
        lanes = self.of_group(group)
        totals: dict[str, np.ndarray] = {}
        halves = self.shared.view(np.uint16)
        for i, target, operands, adds in products:
            if operands is None:
                continue
            a, b = (widen(halves[places >> 1], kind) for places, kind in zip(operands, i.modifiers[5:7], strict=True))
            total = a @ b.T
            if adds:
                total += totals[target] if target in totals else self.accumulator(target, lanes, total.shape)
            totals[target] = total
        for target, total in totals.items():
            names = self.values(target)
            fragment = total[_fragment(len(names))]
            for k, name in enumerate(names):
                self.registers[name] = self.registers[name].view(np.float32)
                self.registers[name][lanes] = fragment[:, k]

    def accumulator(self, target: str, lanes: slice, shape: tuple[int, int]) -> np.ndarray:
        names = self.values(target)
        total = np.empty(shape, np.float32)
        total[_fragment(len(names))] = np.stack([self.read(name, "f32")[lanes] for name in names], 1)
        return total


def run(
    program: Program,
    parameters: bytes,
    memory: Memory,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    cluster: tuple[int, int, int] = (1, 1, 1),
    early_loads: bool = False,
    early_reads: bool = False,
    together: int = 1 << 30,
    seed: int = 0,
) -> None:
    """A kernel's launch.

    Args:
        program: parsed.
        parameters: the bytes of its parameter.
        memory: global memory.
        grid: blocks along x, y, z, multiples of ``cluster``.
        threads: of a block, multiples of a warp group.
        shared: bytes of dynamic shared memory a block.
        cluster: blocks of a cluster along x, y, z.
        early_loads: copies to shared memory land at once, instead of as late as they may.
        early_reads: products and copies to global memory are made at once, instead of when they are waited for.
        together: threads that move together, a divisor of all of a cluster's, or all (the default): of those that can
            run, one unit runs until it waits, then another.
        seed: of the choice of the other.

    Raises:
        NotImplementedError: an instruction, or a form of one, that is not known.
        RuntimeError: what no device would take (addresses, counts of threads and of bytes, deadlocks).
    """
    given = program, parameters, memory, grid, threads, shared, cluster, early_loads, early_reads, together
    order = np.random.default_rng(seed)
    for z in range(0, grid[2], cluster[2]):
        for y in range(0, grid[1], cluster[1]):
            for x in range(0, grid[0], cluster[0]):
                _Cluster(_Launch(*given), (x, y, z), order).run()
