"""How many bytes of global loads a kernel has in flight on an SM, read from its machine code.

By Little's law an SM must have bandwidth · latency bytes under way: 4.3 TB/s over 132 SMs at 0.6 µs are 20 KB.

    python tests/in_flight.py FILE.cubin ...      what each kernel in them has

The code is read in its order, a loop's body twice, for a turn waits for what the one before has loaded. A load whose
result an instruction needs is waited for; loads that were issued before the same wait share its latency: they are one
round. What a thread has in flight is the bytes that it loads over the rounds that this takes. Loads that go to shared
memory (cp.async: LDGSTS) are committed in groups (LDGDEPBAR); a wait (DEPBAR) that leaves n groups under way had n + 1
of them in flight. Where loops load, the one that loads most counts, and nothing else.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
REGISTER = re.compile(r"\bR(\d+)(?:\.reuse)?(\.64)?(?!\w)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
SM_REGISTERS, SM_THREADS, SM_BLOCKS = 65536, 2048, 32  # compute capabilities 8.0 and 9.0
SM_SHARED = {80: 164 * 1024, 90: 228 * 1024}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def bytes(self) -> int:
        """That one thread moves."""
        found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.name)
        return WIDTHS[found[1]] if found else 4

    def registers(self, operands: str) -> list[int]:
        """Those that these of its operands stand for: a pair for an address, as many as it moves for what it moves."""
        memory = self.name.startswith(("LDG", "STG", "LDS", "STS", "LDL", "STL"))
        found = []
        for operand in re.split(r",(?![^\[]*\])", operands):
            for number, pair in REGISTER.findall(operand):
                moved = memory and "[" not in operand
                count = max(1, self.bytes // 4) if moved else 2 if pair else 1
                found += range(int(number), int(number) + count)
        return found


class Loads(NamedTuple):
    """Of one thread."""

    bytes: int
    """Loaded: by an iteration of the loop that loads most, else by the kernel."""
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
        found[part.split()[0]] = [Instruction(int(at, 16), name, rest) for at, name, rest in lines]
    return found


def loads(code: list[Instruction]) -> Loads:
    loops = [found for body in _loops(code) if (found := _loads(body, loop=True)).bytes]
    return max(loops, key=lambda found: found.bytes, default=_loads(code, loop=False))


def _loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of the innermost loops that load: from the target of a branch backwards to the branch."""
    spans = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands)
        if i.name.startswith("BRA") and target and (begin := int(target[1], 16)) < i.address:
            body = [other for other in code if begin <= other.address <= i.address]
            if any(other.name.startswith("LDG") for other in body):
                spans.append((begin, i.address, body))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [body for _, _, body in inner]


def _loads(code: list[Instruction], loop: bool) -> Loads:
    """Of a straight piece of code; of a loop's body, one iteration after another."""
    waiting: dict[int, int] = {}  # register: round of the load that fills it
    rounds = 0
    for again in (False, True)[: 1 + loop]:
        loaded = copied = groups = 0
        deepest, widths, before = [], [], rounds if again else 0
        for i in code:
            if i.name.startswith("LDGSTS"):
                rounds += _waits(waiting, i.registers(i.operands), rounds)
                copied += i.bytes
                widths.append(i.bytes)
            elif re.match(r"LDG\b", i.name):
                target, _, address = i.operands.partition(",")
                rounds += _waits(waiting, i.registers(address), rounds)
                waiting.update(dict.fromkeys(i.registers(target), rounds))
                loaded += i.bytes
                widths.append(i.bytes)
            elif i.name.startswith("LDGDEPBAR"):
                groups += 1
            elif i.name.startswith("DEPBAR.LE"):
                deepest.append(1 + int(i.operands.split(",")[1].strip(), 16))
            else:
                rounds += _waits(waiting, i.registers(i.operands), rounds)
    if copied:
        return Loads(copied, max(1, groups) / min(deepest, default=1), min(widths), True)
    return Loads(loaded, (rounds - before) or float(bool(loaded)), min(widths, default=0), False)


def _waits(waiting: dict[int, int], used: list[int], now: int) -> bool:
    """Whether these registers wait for a load of this round; what came before has then arrived, too."""
    of = [waiting[r] for r in used if r in waiting]
    if not of:
        return False
    last = max(of)
    for r in [r for r, when in waiting.items() if when < now or (when == now == last)]:
        del waiting[r]
    return last == now


def blocks_per_sm(registers: int, shared: int, warps: int, arch: int = 90) -> int:
    """That an SM holds at a time (registers come in units of 256 a warp, shared memory with 1 KB for the system)."""
    of_a_warp = -(-registers * 32 // 256) * 256
    limits = SM_BLOCKS, SM_THREADS // (32 * warps), SM_REGISTERS // of_a_warp // warps
    return min(*limits, SM_SHARED[arch] // (shared + 1024))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        for name, code in machine_code(Path(path)).items():
            found = loads(code)
            print(f"{name}: {found.in_flight:.0f} bytes of a thread in flight, {found}")
