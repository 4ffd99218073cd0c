"""Numbers and model output as text that is safe to show on a terminal."""

from math import isfinite


def printable(text: str, max_lines: int = 8, max_chars: int = 600) -> str:
    """`text` with control, direction and other invisible characters spelled out (`\\x1b`), cut to a size.

    Model output is untrusted: a sampled escape sequence could clear the screen or retitle the window.
    """
    cut = text[:max_chars]
    lines = cut.split("\n")
    shown = "\n".join(lines[:max_lines])
    shown = "".join(c if c.isprintable() or c == "\n" else _escape(c) for c in shown)
    left_off = len(text) - len("\n".join(lines[:max_lines]))
    return f"{shown} ... (+{left_off} characters)" if left_off > 0 else shown


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def number(value: float | None) -> str:
    """Four significant digits: 0.4129, 1.2e-05, 12,345; a missing or non-finite value by its name."""
    if value is None or not isfinite(value):
        return "none" if value is None else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in decimal units, as GPU memory is quoted: 3.94 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 1000 else f"{count:,.0f} GB"


def duration(seconds: float) -> str:
    """0:42, 3:07, 2:05:00, 3d 04:10."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
