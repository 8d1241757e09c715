"""What a thread executes: a cubin's instructions along the path that nearly every value takes, by class.

nvdisasm, which comes with triton, prints a kernel's instructions in order. From the first one on they are followed as a
warp would take them: an unconditional branch is taken; a conditional one forward is taken if what it skips calls a
function (a slow path: ptxas calls one for a division or a root that its short form cannot do), and else not; one that
leads backward ends a loop, whose body is counted once. So the count is of one trip of each loop, of all work between
conditions that skip nothing, and of no slow path.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+|[\w$]+):")
SHORT = 60  # instructions: a slow path is no longer

CLASSES: dict[str, str] = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "DADD", "DMUL", "DFMA"), "fma"),
    **dict.fromkeys(("IMAD", "IMUL", "IDP"), "imad"),
    "MUFU": "mufu",
    **dict.fromkeys(("F2F", "F2I", "I2F", "F2FP", "I2FP", "I2I", "FRND", "F2IP", "I2IP"), "cvt"),
    **dict.fromkeys(("LDG", "STG", "LD", "ST", "LDS", "STS", "LDL", "STL", "ATOMG", "RED", "SHFL"), "memory"),
    **dict.fromkeys(
        ("BRA", "BSSY", "BSYNC", "BAR", "EXIT", "RET", "CALL", "WARPSYNC", "MOV", "CS2R", "S2R"), "control"
    ),
    **dict.fromkeys(("S2UR", "R2UR", "LDC", "ULDC", "LDCU", "DEPBAR", "YIELD", "BREAK", "BMOV"), "control"),
}  # what is not here is "alu": integers, comparisons, selections; "control" if its registers are a warp's


class Instruction(NamedTuple):
    """One line: what it depends on ("" for nothing), the operation with its suffixes, its operands."""

    predicate: str
    name: str
    operands: str

    @property
    def kind(self) -> str:
        base = self.name.partition(".")[0]
        return CLASSES.get(base) or ("control" if base.startswith("U") else "alu")

    def starts(self, *names: str) -> bool:
        return self.name.startswith(names)


Code = list[Instruction]


def disassemble(cubin: bytes) -> tuple[Code, dict[str, int]]:
    """A kernel's instructions, and which of them each label stands before."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> tuple[Code, dict[str, int]]:
    """`disassemble` of what nvdisasm prints."""
    code: Code = []
    labels: dict[str, int] = {}
    within = False
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+(\S+)", line):
            within = section[1].startswith(".text")
        elif within and (label := LABEL.match(line)):
            labels[label[1]] = len(code)
        elif within and (found := LINE.match(line)):
            code.append(Instruction(found[1] or "", found[2], found[3]))
    return code, labels


def hot_path(code: Code, labels: dict[str, int]) -> tuple[list[int], list[tuple[int, int]]]:
    """The places of the instructions that are executed, and of the first and last one of each loop among them."""
    path: list[int] = []
    seen: set[int] = set()
    loops: list[tuple[int, int]] = []
    at = 0
    while at < len(code) and at not in seen:
        here = code[at]
        seen.add(at)
        path.append(at)
        if here.starts("RET") or (here.starts("EXIT") and not here.predicate):
            break
        to = _target(here, labels)
        if to is None:
            at += 1
        elif to in seen:
            loops.append((to, at))
            at += 1
        elif not _conditional(here) or _skips(code, at, to, labels):
            at = to
        else:
            at += 1
    return path, loops


def _target(here: Instruction, labels: dict[str, int]) -> int | None:
    label = re.search(r"`\(([^)]+)\)", here.operands) if here.starts("BRA", "JMP") else None
    return labels.get(label[1]) if label else None


def _conditional(here: Instruction) -> bool:
    return bool(here.predicate) or re.match(r"!?U?P\d", here.operands) is not None


def _skips(code: Code, at: int, to: int, labels: dict[str, int]) -> bool:
    """Whether the branch at `at` goes past what is seldom executed, or to the loop that it stands before."""
    if to > at and to - at < SHORT and any(code[i].starts("CALL") for i in range(at, to)):
        return True
    for i in range(at + 1, min(to, at + SHORT)):
        if code[i].starts("EXIT") and not code[i].predicate:
            return True
        if code[i].starts("BRA") and not _conditional(code[i]):
            return (_target(code[i], labels) or 0) > to
    return False


def executed(cubin: bytes, *, loop: bool) -> Counter[str]:
    """Operations that a thread executes, with their suffixes: of a whole run, or of one trip of its longest loop.

    Raises:
        ValueError: if there is no loop where one was to be.
    """
    code, labels = disassemble(cubin)
    path, loops = hot_path(code, labels)
    if loop:
        if not loops:
            raise ValueError("there is no loop in this kernel")
        first, last = max(loops, key=lambda ends: sum(ends[0] <= i <= ends[1] for i in path))
        path = [i for i in path if first <= i <= last]
    return Counter(code[i].name for i in path if not code[i].starts("NOP"))


def by_class(operations: Counter[str]) -> dict[str, int]:
    """The same by class: alu, fma, imad, mufu, cvt, control, memory."""
    found: dict[str, int] = dict.fromkeys(("alu", "fma", "imad", "mufu", "cvt", "control", "memory"), 0)
    for name, count in operations.items():
        found[Instruction("", name, "").kind] += count
    return found
