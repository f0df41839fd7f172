"""How many bytes of global loads a kernel has in flight on an SM, read from its machine code.

By Little's law an SM must have bandwidth · latency bytes under way: 4.3 TB/s over 132 SMs at 0.6 µs are 20 KB.

    python tests/in_flight.py FILE.cubin ...      what each kernel in them has

The code is read once, in its order. A load whose result an instruction needs is waited for; loads that were issued
before the same wait share its latency: they are one round. What a thread has in flight is the bytes that it loads over
the rounds that this takes. Loads that go to shared memory (cp.async: LDGSTS) are committed in groups (LDGDEPBAR); a
wait (DEPBAR) that leaves n groups under way had n + 1 of them in flight. Where loops load, the one that loads most
counts, and nothing else.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
SM_REGISTERS, SM_THREADS, SM_BLOCKS, SM_SHARED = 65536, 2048, 32, 228 * 1024  # compute capabilities 8.0 and 9.0


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def bytes(self) -> int:
        """That one thread moves."""
        found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.name)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4

    @property
    def registers(self) -> list[int]:
        return [int(r) for r in re.findall(r"\bR(\d+)\b", self.operands)]


class Loads(NamedTuple):
    """Of one thread."""

    bytes: int
    """Loaded: by the loop that loads most, else by the kernel."""
    rounds: float
    """Times that it waits for a latency."""
    width: int
    """Bytes of its narrowest load there."""
    asynchronous: bool
    """They are cp.async's."""

    @property
    def in_flight(self) -> float:
        return self.bytes / self.rounds if self.rounds else 0.0


def machine_code(cubin: Path) -> dict[str, list[Instruction]]:
    """By kernel."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    return parsed(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parsed(text: str) -> dict[str, list[Instruction]]:
    """What cuobjdump -sass prints, by kernel."""
    found: dict[str, list[Instruction]] = {}
    for part in text.split("Function : ")[1:]:
        lines = INSTRUCTION.findall(part)
        found[part.split()[0]] = [Instruction(int(at, 16), name, rest) for at, _, name, rest in lines]
    return found


def loads(code: list[Instruction]) -> Loads:
    found = [_loads(body) for body in _loops(code)]
    return max((f for f in found if f.bytes), key=lambda f: f.bytes, default=_loads(code))


def _loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops: from the target of a branch backwards to the branch."""
    spans = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands)
        if i.name.startswith("BRA") and target and (begin := int(target[1], 16)) < i.address:
            spans.append((begin, i.address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[i for i in code if begin <= i.address <= end] for begin, end in inner]


def _loads(code: list[Instruction]) -> Loads:
    """Of a straight piece of code; of a loop's body, one iteration."""
    waiting: dict[int, int] = {}  # register: round of the load that fills it
    loaded = copied = groups = rounds = deepest = 0
    widths = []
    for i in code:
        if i.name.startswith("LDG.") or i.name == "LDG":
            target, _, address = i.operands.partition(",")
            rounds += _waits(waiting, Instruction(0, "", address).registers, rounds)
            first = Instruction(0, "", target).registers
            waiting.update({r: rounds for r in range(first[0], first[0] + max(1, i.bytes // 4))} if first else {})
            loaded += i.bytes
            widths.append(i.bytes)
        elif i.name.startswith("LDGSTS"):
            rounds += _waits(waiting, i.registers, rounds)
            copied += i.bytes
            widths.append(i.bytes)
        elif i.name.startswith("LDGDEPBAR"):
            groups += 1
        elif i.name.startswith("DEPBAR.LE"):
            deepest = max(deepest, 1 + int(i.operands.split(",")[1].strip(), 16))
        else:
            rounds += _waits(waiting, i.registers, rounds)
    if copied:  # `deepest` groups at a time
        return Loads(copied, max(1, groups) / max(1, deepest), min(widths), True)
    return Loads(loaded, rounds or float(bool(loaded)), min(widths, default=0), False)


def _waits(waiting: dict[int, int], used: list[int], now: int) -> bool:
    """Whether these registers wait for a load of this round; what came before has then arrived, too."""
    of = [waiting[r] for r in used if r in waiting]
    if not of:
        return False
    last = max(of)
    for r in [r for r, when in waiting.items() if when < now or (when == now == last)]:
        del waiting[r]
    return last == now


def blocks_per_sm(registers: int, shared: int, warps: int) -> int:
    """That an SM holds at a time (registers come in units of 256 a warp, shared memory with 1 KB for the system)."""
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(SM_BLOCKS, SM_THREADS // (32 * warps), SM_REGISTERS // of_a_warp // warps, SM_SHARED // (shared + 1024))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for name, code in machine_code(Path(path)).items():
            found = loads(code)
            print(f"{name}: {found.in_flight:.0f} bytes of a thread in flight, {found}")
