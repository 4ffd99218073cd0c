"""Reading XLA's optimized programs as text."""

import re
from collections.abc import Iterator

import numpy as np

_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]")


def instructions(text: str, *, named: str = "") -> Iterator[tuple[str, str, int]]:
    """(instruction, element type, elements) of every array that an instruction of the program makes."""
    for line in text.splitlines():
        made = re.match(r"\s+(?:ROOT )?%\S+ = (\(?.*?\)?) ([a-z-]+)\(", line)
        if made and (not named or made[2] == named):
            for kind, shape in _ARRAY.findall(made[1]):
                yield line, kind, int(np.prod([int(n) for n in shape.split(",") if n]))


def computations(text: str) -> dict[str, str]:
    """Body of every computation of the program by name."""
    found = re.findall(r"^(?:ENTRY )?%(\S+) \(.*?\{\n(.*?)^\}", text, flags=re.M | re.S)
    return dict(found)


def loop_bodies(text: str) -> str:
    """Every computation that runs inside a while loop, its own calls included."""
    parts = computations(text)
    pending = re.findall(r" while\(.*?body=%([^\s,]+)", text)
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += re.findall(r"(?:body|calls|to_apply)=%([^\s,]+)", parts[name])
    return "\n".join(parts[name] for name in sorted(seen))
