"""Write a directory as a whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jgrpo.errors import UserError


@contextmanager
def atomic_directory(out: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A new directory next to `out` that takes its name when the block ends, and is removed if the block raises.

    Raises UserError if `out` exists and is not empty (unless `replace`), cannot be made, or the disk refuses a write; what
    was there before is untouched.
    """
    out = Path(out).expanduser().absolute()
    check_free(out, replace=replace)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        _swap(temporary, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; nothing was left there") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: str | Path, *, replace: bool = False) -> None:
    """UserError if `out` is a file, or (unless `replace`) a directory with something in it."""
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file; choose a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()) and not replace:
        raise UserError(f"output {out} exists and is not empty; choose another directory or remove it")


def _swap(temporary: Path, out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        # A directory with content cannot be renamed over: the old one steps aside, and is the one removed.
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        os.replace(out, old)
        os.replace(temporary, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, out)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
