"""Runs the PTX of a kernel on a CPU: the threads of a block side by side in NumPy, the blocks of a grid in turn.

What a kernel for sm_80 computes is seen so without a GPU: indices, predicates, fragments of matrix products, what is
copied when. Asynchronous copies arrive as late as they may (at the wait for their group), and threads that part meet
again at the lowest of their instructions. Not seen: races between threads, speed, what ptxas makes of it. What Hopper
adds to that is in ptx_hopper.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

WARP = 32
LANES = np.arange(WARP)
TYPES = {
    "pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64,
}  # fmt: skip
_WIDER = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal,
}  # fmt: skip
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate's name, "" for none
    wanted: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass
class Program:
    """One kernel: its instructions and where its labels are."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameter: str = ""
    parameter_bytes: int = 0
    shared: str = ""  # the name of its dynamic shared memory


def parse(text: str) -> Program:
    """The one kernel of a PTX module."""
    program = Program()
    body = text[text.index(".entry") :]
    program.parameter, size = re.search(r"\.param \.align \d+ \.b8 (\w+)\[(\d+)\]", body).groups()
    program.parameter_bytes = int(size)
    if shared := re.search(r"\.extern \.shared [^;]*?(\w+)\[\];", text):
        program.shared = shared[1]
    scopes, opened = [0], 0  # of braces: each that inline assembly opens has labels of its own
    for line in body[body.index("\n{") :].splitlines():
        line = line.strip()
        while line.startswith("{"):
            opened += 1
            scopes.append(opened)
            line = line[1:].strip()
        statement = line.rstrip("} \t")
        if statement == "" or statement.startswith((".reg", ".pragma", "//")):
            pass
        elif label := re.fullmatch(r"(\$?\w+):", statement):
            program.labels[_in_scope(label[1], scopes[-1])] = len(program.instructions)
        else:
            program.instructions.append(_instruction(statement, scopes[-1]))
        for _ in range(line[len(statement) :].count("}")):
            scopes.pop()
    return program


def _in_scope(label: str, scope: int) -> str:
    """The compiler's labels ($…) are the kernel's, those of inline assembly their braces'."""
    return label if label.startswith("$") else f"{label}@{scope}"


def _instruction(line: str, scope: int) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*([^;]*);", line)
    if found is None:
        raise NotImplementedError(f"ptx: {line}")
    negated, guard, name, modifiers, operands = found.groups()
    split = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", operands) if part.strip()]
    if name == "bra":
        split = [_in_scope(split[0], scope)]
    return Instruction(guard or "", not negated, name, tuple(modifiers.split(".")[1:]), tuple(split), line)


class Block:
    """The threads of a block, a register a row of values."""

    def __init__(self, program: Program, parameters: bytes, memory: Memory, threads: int, shared: int, block, grid):
        self.program, self.memory, self.threads = program, memory, threads
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared_base = 0
        self.shared = np.full(shared, 0xFF, np.uint8)  # NaN in every type, where nothing was written
        self.registers: dict[str, np.ndarray] = {}
        special = {"tid": (np.arange(threads), 0, 0), "ctaid": block, "nctaid": grid, "ntid": (threads, 1, 1)}
        for name, values in special.items():
            for axis, value in zip("xyz", values, strict=True):
                self.registers[f"%{name}.{axis}"] = np.broadcast_to(np.asarray(value, np.uint32), threads)
        self.registers["%laneid"] = (np.arange(threads) % WARP).astype(np.uint32)
        self.at = np.zeros(threads, np.int64)
        self.on = np.ones(threads, bool)  # not yet returned
        self.open: list = []  # copies of the group that is being gathered
        self.groups: list[list] = []

    def run(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # NaN is what nothing has been written to
            while self.on.any():
                at = int(self.at[self.on].min())
                self.issue(at, self.on & (self.at == at))

    def issue(self, at: int, active: np.ndarray) -> None:
        """The instruction at ``at``, by the threads ``active``."""
        instruction = self.program.instructions[at]
        self.at[active] = at + 1
        mask = active
        if instruction.guard:
            mask = active & (self.registers[instruction.guard] == instruction.wanted)
        if mask.any():
            handler = getattr(self, f"_{instruction.name}", None)
            if handler is None:
                raise NotImplementedError(f"ptx: {instruction.text}")
            handler(instruction, mask)

    # registers -------------------------------------------------------------------------------------------------------

    def read(self, operand: str, kind: str) -> np.ndarray:
        type_ = TYPES[kind]
        if operand in self.registers:
            value = self.registers[operand]
        elif operand.startswith("0f"):
            value = np.broadcast_to(np.asarray(int(operand[2:], 16), np.uint32), self.threads)
        elif re.fullmatch(r"-?\d+", operand):
            if type_ is np.bool_:
                return np.full(self.threads, operand != "0")
            bits = np.dtype(type_).itemsize * 8
            value = np.asarray(int(operand) % 2**bits, f"u{bits // 8}")
            return np.broadcast_to(value.view(type_), self.threads)
        elif operand == self.program.parameter:
            value = np.zeros(self.threads, type_)
        elif operand == self.program.shared:
            value = np.full(self.threads, self.shared_base, type_)
        else:
            raise NotImplementedError(f"ptx: operand {operand}")
        if value.dtype == type_:
            return value
        if value.dtype.itemsize == np.dtype(type_).itemsize:
            return value.view(type_)
        return value.astype(f"u{np.dtype(type_).itemsize}").view(type_)  # the lower bits

    def write(self, operand: str, value: np.ndarray, mask: np.ndarray) -> None:
        if operand == "_":
            return
        old = self.registers.get(operand)
        if mask.all() or old is None:
            self.registers[operand] = np.array(np.broadcast_to(value, self.threads))
        else:
            old = old if old.dtype == value.dtype else old.view(value.dtype)
            self.registers[operand] = np.where(mask, value, old)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base, "u64" if base.startswith("%rd") else "u32").astype(np.uint64) + np.uint64(
            int(offset or 0) % 2**64
        )

    def values(self, operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{}").split(",")]

    # arithmetic ------------------------------------------------------------------------------------------------------

    def _binary(self, i, mask, function):
        kind = i.modifiers[-1]
        a, b = (self.read(operand, kind) for operand in i.operands[1:3])
        self.write(i.operands[0], function(a, b).astype(a.dtype), mask)

    def _add(self, i, mask):
        self._binary(i, mask, np.add)

    def _sub(self, i, mask):
        self._binary(i, mask, np.subtract)

    def _div(self, i, mask):
        """Towards zero; by zero only where the thread is not asked."""
        self._binary(i, mask, lambda a, b: self.quotient(a, b, mask))

    def _rem(self, i, mask):
        self._binary(i, mask, lambda a, b: a - b * self.quotient(a, b, mask))

    def quotient(self, a, b, mask):
        if (b[mask] == 0).any():
            raise RuntimeError("ptx: a division by zero")
        b = np.where(b == 0, 1, b).astype(b.dtype)
        quotient = np.abs(a.astype(object)) // np.abs(b.astype(object))
        return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)

    def _min(self, i, mask):
        self._binary(i, mask, np.minimum)

    def _max(self, i, mask):
        self._binary(i, mask, np.maximum)

    def _and(self, i, mask):
        self._binary(i, mask, np.bitwise_and)

    def _or(self, i, mask):
        self._binary(i, mask, np.bitwise_or)

    def _xor(self, i, mask):
        self._binary(i, mask, np.bitwise_xor)

    def _not(self, i, mask):
        self.write(i.operands[0], ~self.read(i.operands[1], i.modifiers[-1]), mask)

    def _neg(self, i, mask):
        self.write(i.operands[0], -self.read(i.operands[1], i.modifiers[-1]), mask)

    def _product(self, i, a, b):
        kind = i.modifiers[-1]
        if "wide" in i.modifiers:
            return a.astype(_WIDER[kind]) * b.astype(_WIDER[kind])
        if "hi" in i.modifiers:
            if kind == "u64":
                return ((a.astype(object) * b.astype(object)) >> 64).astype(np.uint64)
            return ((a.astype(_WIDER[kind]) * b.astype(_WIDER[kind])) >> 32).astype(a.dtype)
        return a * b

    def _mul(self, i, mask):
        a, b = (self.read(operand, i.modifiers[-1]) for operand in i.operands[1:3])
        self.write(i.operands[0], self._product(i, a, b), mask)

    def _mad(self, i, mask):
        a, b = (self.read(operand, i.modifiers[-1]) for operand in i.operands[1:3])
        product = self._product(i, a, b)
        kind = {4: "u32", 8: "u64", 2: "u16"}[product.dtype.itemsize]
        total = product + self.read(i.operands[3], kind).view(product.dtype)
        self.write(i.operands[0], total, mask)

    def _rcp(self, i, mask):
        with np.errstate(divide="ignore"):
            self.write(i.operands[0], np.float32(1) / self.read(i.operands[1], "f32"), mask)

    def _sqrt(self, i, mask):
        self.write(i.operands[0], np.sqrt(self.read(i.operands[1], "f32")), mask)

    def _fma(self, i, mask):
        a, b, c = (self.read(operand, "f32").astype(np.float64) for operand in i.operands[1:4])
        self.write(i.operands[0], (a * b + c).astype(np.float32), mask)

    def _shift(self, i, mask, function):
        value, by = self.read(i.operands[1], i.modifiers[-1]), self.read(i.operands[2], "u32")
        bits = value.dtype.itemsize * 8
        shifted = function(value, np.minimum(by, bits - 1).astype(value.dtype))
        beyond = value >> (bits - 1) if value.dtype.kind == "i" else np.zeros_like(value)
        self.write(i.operands[0], np.where(by >= bits, beyond, shifted), mask)

    def _shl(self, i, mask):
        self._shift(i, mask, np.left_shift)

    def _shr(self, i, mask):
        self._shift(i, mask, np.right_shift)

    def _bfi(self, i, mask):
        a, b, start, length = (self.read(operand, "u32") for operand in i.operands[1:5])
        field_ = ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1)).astype(np.uint32) << start
        self.write(i.operands[0], (b & ~field_) | ((a << start) & field_), mask)

    def _setp(self, i, mask):
        compare, *logic, kind = i.modifiers
        if compare not in _COMPARISONS or (compare == "ne" and kind == "f32"):  # of a NaN, which NumPy holds unequal
            raise NotImplementedError(f"ptx: {i.text}")
        a, b = (self.read(operand, kind) for operand in i.operands[1:3])
        result = _COMPARISONS[compare](a, b)
        if logic and logic[0] in _LOGIC:
            result = _LOGIC[logic[0]](result, self.read(i.operands[3], "pred"))
        self.write(i.operands[0], result, mask)

    def _selp(self, i, mask):
        kind = i.modifiers[-1]
        a, b = (self.read(operand, kind) for operand in i.operands[1:3])
        self.write(i.operands[0], np.where(self.read(i.operands[3], "pred"), a, b), mask)

    def _mov(self, i, mask):
        target, source = i.operands
        kind = i.modifiers[-1]
        if target.startswith("{"):
            whole = self.read(source, kind)
            names = self.values(target)
            parts = np.ascontiguousarray(whole).view(f"u{whole.dtype.itemsize // len(names)}")
            for k, name in enumerate(names):
                self.write(name, parts.reshape(self.threads, -1)[:, k].copy(), mask)
        elif source.startswith("{"):
            names = self.values(source)
            part = {2: "b16", 4: "b32"}[np.dtype(TYPES[kind]).itemsize // len(names)]
            parts = np.stack([self.read(name, part) for name in names], 1)
            self.write(target, np.ascontiguousarray(parts).view(TYPES[kind])[:, 0], mask)
        else:
            self.write(target, self.read(source, kind), mask)

    def _cvt(self, i, mask):
        target, source = i.modifiers[-2:]
        if target in ("bf16x2", "f16x2"):
            upper, lower = (narrow(self.read(operand, "f32"), target) for operand in i.operands[1:3])
            self.write(i.operands[0], upper.astype(np.uint32) << np.uint32(16) | lower, mask)
        else:
            self.write(i.operands[0], self.read(i.operands[1], source).astype(TYPES[target]), mask)

    def _cvta(self, i, mask):
        if i.modifiers[:2] != ("to", "global"):
            raise NotImplementedError(f"ptx: {i.text}")
        self.write(i.operands[0], self.read(i.operands[1], "u64"), mask)

    # control ---------------------------------------------------------------------------------------------------------

    def _bra(self, i, mask):
        self.at[mask] = self.program.labels[i.operands[0]]

    def _ret(self, i, mask):
        self.on[mask] = False

    def _bar(self, i, mask):
        if not (mask == self.on).all():
            raise RuntimeError(f"ptx: {i.text} reached by {mask.sum()} of {self.on.sum()} threads")

    def _shfl(self, i, mask):
        mode = i.modifiers[1]
        if i.modifiers[0] != "sync" or mode not in ("idx", "bfly") or (self.read(i.operands[3], "u32") != 31).any():
            raise NotImplementedError(f"ptx: {i.text}")
        lane, by = np.arange(self.threads), self.read(i.operands[2], "u32") & (WARP - 1)
        lane = lane ^ by if mode == "bfly" else (lane & ~(WARP - 1)) + by
        self.write(i.operands[0].split("|")[0], self.read(i.operands[1], "b32")[lane], mask)

    # memory ----------------------------------------------------------------------------------------------------------

    def _ld(self, i, mask):
        space, kind = i.modifiers[0], i.modifiers[-1]
        target = i.operands[0]
        names = self.values(target) if target.startswith("{") else [target]
        type_ = np.dtype(TYPES[kind])
        start = self.address(i.operands[1])
        loaded = self.bytes_at(space, start, type_.itemsize * len(names), mask, i)
        for name, column in zip(names, loaded.view(type_).reshape(-1, len(names)).T, strict=True):
            value = np.zeros(self.threads, type_)
            value[mask] = column
            self.write(name, value, mask)

    def _st(self, i, mask):
        space, kind = i.modifiers[0], i.modifiers[-1]
        source = i.operands[1]
        names = self.values(source) if source.startswith("{") else [source]
        stored = np.stack([self.read(name, kind)[mask] for name in names], 1)
        raw = np.ascontiguousarray(stored).view(np.uint8).reshape(int(mask.sum()), -1)
        start = self.address(i.operands[0])[mask]
        if space == "shared":
            self.shared[self.places(self.address(i.operands[0]), raw.shape[1], mask, i)] = raw
        else:
            self.memory.write(start, raw, i.text)

    def places(self, start, size, mask, i):
        """Indices into ``shared`` of ``size`` bytes from every address, which has to be a multiple of that."""
        at = start[mask].astype(np.int64)
        if (at % size).any() or (at < 0).any() or (at + size > len(self.shared)).any():
            raise RuntimeError(
                f"ptx: {i.text}: an address outside of {len(self.shared)} bytes, or not a multiple of {size}"
            )
        return at[:, None] + np.arange(size)

    def bytes_at(self, space, start, size, mask, i):
        if space == "global":
            return self.memory.read(start[mask], size, i.text)
        if space == "param":
            at = start[mask].astype(np.int64)
            return np.ascontiguousarray(self.parameters[at[:, None] + np.arange(size)])
        if space != "shared":
            raise NotImplementedError(f"ptx: {i.text}")
        return np.ascontiguousarray(self.shared[self.places(start, size, mask, i)])

    def _cp(self, i, mask):
        kind = i.modifiers[1]
        if kind == "commit_group":
            self.groups.append(self.open)
            self.open = []
        elif kind in ("wait_group", "wait_all"):
            left = int(i.operands[0]) if kind == "wait_group" else 0
            if kind == "wait_all":
                self.groups.append(self.open)
                self.open = []
            while len(self.groups) > left:
                for places, values in self.groups.pop(0):
                    self.shared[places] = values
        else:
            size = int(i.operands[2])
            given = self.read(i.operands[3], "u32") if len(i.operands) > 3 else np.full(self.threads, size, np.uint32)
            values = np.zeros((self.threads, size), np.uint8)
            present = mask & (given == size)
            if (mask & (given != size) & (given != 0)).any():
                raise NotImplementedError(f"ptx: {i.text}: a copy that is cut")
            if present.any():
                values[present] = self.memory.read(self.address(i.operands[1])[present], size, i.text)
            places = self.places(self.address(i.operands[0]), size, mask, i)
            self.open.append((places, values[mask]))

    # matrix products -------------------------------------------------------------------------------------------------

    def _ldmatrix(self, i, mask):
        """Four 8 x 8 matrices of 16 bits a warp: lanes 8 m to 8 m + 7 give the rows of matrix m."""
        self.whole_warps(i, mask)
        rows = self.shared[self.places(self.address(i.operands[1]), 16, mask, i)].view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)  # warps, matrix, row, column
        if "trans" in i.modifiers:
            matrices = matrices.swapaxes(2, 3)
        of_lanes = np.ascontiguousarray(matrices.reshape(-1, 4, WARP, 2)).view(np.uint32)[..., 0]
        for m, name in enumerate(self.values(i.operands[0])):
            value = np.zeros(self.threads, np.uint32)
            value[mask] = of_lanes[:, m].reshape(-1)
            self.write(name, value, mask)

    def whole_warps(self, i, mask):
        """Of the instructions that move four matrices a warp."""
        by_warp = mask.reshape(-1, WARP)
        if (by_warp.any(1) != by_warp.all(1)).any() or "x4" not in i.modifiers:
            raise NotImplementedError(f"ptx: {i.text}, by {mask.sum()} threads")

    def _mma(self, i, mask):
        """m16n8k16: D = A B + C, A (16, 16) and B (16, 8) of 16 bits, C and D of 32."""
        if not mask.all() or "m16n8k16" not in i.modifiers:
            raise NotImplementedError(f"ptx: {i.text}, by {mask.sum()} threads")
        kind = i.modifiers[-2]
        warps = self.threads // WARP
        group, pair = LANES >> 2, (LANES & 3) * 2

        def halves(operand):  # (registers, warps, lanes, 2)
            values = np.stack([self.read(name, "b32") for name in self.values(operand)])
            return widen(np.ascontiguousarray(values).view(np.uint16), kind).reshape(len(values), warps, WARP, 2)

        a, b = np.empty((warps, 16, 16), np.float32), np.empty((warps, 16, 8), np.float32)
        c = np.empty((warps, 16, 8), np.float32)
        for part in range(2):
            for k, values in enumerate(halves(i.operands[1])[..., part]):
                a[:, group + 8 * (k & 1), pair + part + 8 * (k >> 1)] = values
            for k, values in enumerate(halves(i.operands[2])[..., part]):
                b[:, pair + part + 8 * k, group] = values
        names = self.values(i.operands[3])
        for k, name in enumerate(names):
            c[:, group + 8 * (k >> 1), pair + (k & 1)] = self.read(name, "f32").reshape(warps, WARP)
        d = a @ b + c
        for k, name in enumerate(self.values(i.operands[0])):
            self.write(name, d[:, group + 8 * (k >> 1), pair + (k & 1)].reshape(-1), mask)


def narrow(value: np.ndarray, kind: str) -> np.ndarray:
    """float32 to the 16 bits of bfloat16 or float16, rounded to the nearest, to even."""
    if kind == "f16x2":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Memory:
    """Global memory: arrays of bytes at addresses, of which nothing else can be read or written.

    Args:
        arrays: address → bytes.
    """

    def __init__(self, arrays: dict[int, np.ndarray]):
        self.arrays = arrays

    def _pieces(self, start: np.ndarray, size: int, text: str):
        found = np.zeros(len(start), bool)
        for base, array in self.arrays.items():
            here = (start >= np.uint64(base)) & (start + np.uint64(size) <= np.uint64(base + len(array)))
            if here.any():
                found |= here
                yield here, array, (start[here] - np.uint64(base)).astype(np.int64)[:, None] + np.arange(size)
        if not found.all() or (start % np.uint64(size)).any():
            raise RuntimeError(f"ptx: {text}: an address outside of all arrays, or not a multiple of {size}")

    def read(self, start: np.ndarray, size: int, text: str) -> np.ndarray:
        values = np.empty((len(start), size), np.uint8)
        for here, array, places in self._pieces(start, size, text):
            values[here] = array[places]
        return values

    def write(self, start: np.ndarray, values: np.ndarray, text: str) -> None:
        for here, array, places in self._pieces(start, values.shape[1], text):
            array[places] = values[here]


def run(program: Program, parameters: bytes, memory: Memory, grid: tuple, threads: int, shared: int) -> None:
    """A kernel's launch: grid (x, y, z), ``threads`` a block, ``shared`` bytes."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                Block(program, parameters, memory, threads, shared, (x, y, z), grid).run()
