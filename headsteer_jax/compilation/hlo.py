"""Reads a compiled program's text: its collectives with their bytes, and the TPU compiler's estimate of its time.

Both are summed over the turns of loops that count from 0 to a constant, as `jax.lax.scan` makes them; any other loop
counts as one turn.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BYTES = {"pred": 1, "c64": 8, "c128": 16}  # the other types say how many bits they have
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s)}])([a-z][\w\-]*)\(")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    result: str  # its type
    opcode: str
    text: str  # the operands and what follows them

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        names = CALLED.findall(self.text)
        for branches in BRANCHES.findall(self.text):
            names += [name.strip().lstrip("%") for name in branches.split(",")]
        return names


class Totals(NamedTuple):
    """Holds what one run of a program does on one device."""

    collectives: dict[str, tuple[float, float]]  # by kind, how many, and the bytes of their whole results
    cycles: float  # as the TPU's compiler estimates them, without collectives


def parse_computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse the text of a compiled program -> its computations by name, and the name of the one that is run."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            name = match[1]
            computations[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name and (match := INSTRUCTION.match(line)) and (opcode := OPCODE.search(match[2])):
            definition = match[2]
            computations[name].append(
                Instruction(match[1], definition[: opcode.start(1)].strip(), opcode[1], definition[opcode.end() :])
            )
    return computations, entry


def _count_bytes(result: str) -> float:
    """Count the bytes of all arrays in a type."""
    total = 0.0
    for kind, shape in ARRAY.findall(result):
        digits = re.search(r"\d+", kind)
        size = BYTES.get(kind) or (int(digits[0]) / 8 if digits else 0)
        total += size * math.prod(int(axis) for axis in shape.split(",") if axis)
    return total


def _count_turns(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """Count the turns of a loop whose condition compares a counter with a constant; of another one 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    body = computations.get(condition[1], []) if condition else []
    constants = [re.match(r"(\d+)\)", instruction.text) for instruction in body if instruction.opcode == "constant"]
    compares = [
        instruction for instruction in body if instruction.opcode == "compare" and "direction=LT" in instruction.text
    ]
    values = [int(match[1]) for match in constants if match]
    return values[0] if len(values) == 1 and len(compares) == 1 else 1


def _walk(computations: dict[str, list[Instruction]], name: str, turns: int) -> Iterator[tuple[str, Instruction, int]]:
    """Yield every instruction that a computation runs: the computation that has it, the instruction, and how often."""
    for instruction in computations.get(name, []):
        yield name, instruction, turns
        inner = turns
        if instruction.opcode == "while":
            inner *= _count_turns(instruction, computations)
        for called in instruction.called:
            yield from _walk(computations, called, inner)


def summarise_program(text: str) -> Totals:
    """Sum up a compiled program's text."""
    computations, entry = parse_computations(text)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    cycles, channels = 0.0, set()
    for computation, instruction, turns in _walk(computations, entry, 1):
        if match := CYCLES.search(instruction.text):
            cycles += turns * int(match[1])
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        if channel and channel[1] in channels:
            continue  # TPUs run a collective beside several fusions, and the text has it in each of them
        if channel:
            channels.add(channel[1])
        operands = re.match(r"\(\([^()]*\), ", instruction.result)  # GPUs' types of collectives that only start
        size = _count_bytes(instruction.result[operands.end() :] if operands else instruction.result)
        if instruction.opcode != kind and not operands and kind in ("all-gather", "collective-permute"):
            size = _count_gathered(instruction, size)  # the type has the operand as well
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"  # the TPU's compiler fuses a sum of which every device keeps a part
        elif kind == "reduce-scatter":
            size *= _group_size(instruction.text)
        counts[kind] += turns
        sizes[kind] += round(turns * size)
    return Totals({kind: (float(counts[kind]), float(sizes[kind])) for kind in counts}, cycles)


def _group_size(text: str) -> int:
    """Read how many devices take part in a collective."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1


def _count_gathered(instruction: Instruction, size: float) -> float:
    """Count the bytes of the result of a collective whose type is (operand, result)."""
    parts = 1 if instruction.opcode.startswith("collective") else _group_size(instruction.text)
    return size * parts / (parts + 1)
