"""Running programs that a model wrote: Python in a process that can compute, print, and write a few files of its own.

What contains it, in a fresh process for each program (`sandbox_child.py`):

- seccomp: no other process or thread (so no fork bomb, and nothing is left behind), no other program, no sockets, no signals
  or limits for other processes, no change of modes, owners and times of files;
- Landlock: writes in its own temporary directory only, reads there and in Python's own directories only;
- resource limits: address space, CPU time, size and number of open files; and from outside: wall time and size of the directory.

Both mechanisms work without privileges, also inside containers, and bind root too, which RLIMIT_NPROC would not. They exist
on Linux (Landlock since 5.13), here for x86_64 and aarch64. Elsewhere programs are refused with `UserError`: there is no
weaker way to run them.

What it is not: a virtual machine. A bug of the kernel, or timing, is not kept from a program. And `Outcome.finished` comes from
inside the process: code that searches its own interpreter for it could forge it. Compare output where that matters.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import IO, Any

from jgrpo.errors import UserError

POLL = 0.01
CHILD = Path(__file__).with_name("sandbox_child.py")
DEFERRED = (signal.SIGALRM, signal.SIGINT, signal.SIGTERM) if hasattr(signal, "SIGALRM") else ()


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Wall time."""
    memory_mb: int = 512
    """Address space, the interpreter's own included."""
    disk_mb: int = 16
    """Files in its directory, and each of standard output and error."""
    open_files: int = 32
    """File descriptors."""


@dataclass(frozen=True)
class Program:
    """Python sources, run one after the other in one module, and what they read from standard input."""

    sources: tuple[str, ...]
    stdin: str = ""
    name: str = "__main__"
    """The module's `__name__`."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    finished: bool
    """Whether every source ran to its end: False after an exception, `sys.exit`, or a limit."""
    returncode: int
    """0, 1 after an exception, the argument of `sys.exit`, or minus the signal that ended it."""
    timed_out: bool
    stdout: str
    stderr: str


def run_programs(programs: Sequence[Program], limits: Limits = Limits(), workers: int | None = None) -> list[Outcome]:
    """Run every program in a sandbox of its own, `workers` at a time (None: one for each processor).

    No process is left when it returns or raises, whatever it raises.

    Raises:
        UserError: this machine cannot contain programs; nothing was run.
    """
    if sys.platform != "linux":
        raise UserError(f"running programs needs Linux (Landlock and seccomp), this is {sys.platform}")
    workers = workers or os.cpu_count() or 1
    outcomes: dict[int, Outcome] = {}
    waiting, running = deque(enumerate(programs)), dict[int, _Process]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, program = waiting.popleft()
                with _deferred_signals():
                    running[number] = _Process(program, limits)
            for number, process in list(running.items()):
                if (outcome := process.poll()) is not None:
                    outcomes[number] = outcome
                    running.pop(number).close()
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.close()
    return [outcomes[number] for number in range(len(programs))]


class _Process:
    """One running program."""

    def __init__(self, program: Program, limits: Limits) -> None:
        self.limits, self.nonce, self.timed_out = limits, secrets.token_hex(16), False
        self.directory = tempfile.mkdtemp(prefix="jgrpo-program-")
        self.stdout, self.stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - see close
        status_read, status_write = os.pipe()
        self.status: IO[bytes] = os.fdopen(status_read, "rb")
        os.set_blocking(status_read, False)
        with tempfile.TemporaryFile("w+") as payload, tempfile.TemporaryFile() as stdin:
            json.dump(_payload(program, limits, self.nonce), payload)
            stdin.write(program.stdin.encode())
            for stream in (payload, stdin):
                stream.flush()
                stream.seek(0)
            fds = (payload.fileno(), status_write)
            # -I and -S: neither the environment nor site-packages' start-up files run outside the sandbox.
            command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(CHILD), *map(str, fds)]
            self.process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                stdin=stdin,
                stdout=self.stdout,
                stderr=self.stderr,
                pass_fds=fds,
                start_new_session=True,
            )
        os.close(status_write)
        self.began = time.monotonic()

    def poll(self) -> Outcome | None:
        """The outcome once the program has ended; a program above a limit is ended here."""
        if self.process.poll() is None:
            self.timed_out = time.monotonic() - self.began > self.limits.seconds
            if not self.timed_out and _size(self.directory) <= self.limits.disk_mb * 2**20:
                return None
            self.process.kill()
        returncode = self.process.wait()
        ready, _, nonce = (self.status.read() or b"").partition(b"\n")
        if ready != b"ready" and not self.timed_out:
            raise UserError(f"this machine cannot contain programs ({_reason(ready, self.stderr)}); use other rewards")
        finished = nonce == self.nonce.encode() and returncode == 0
        return Outcome(finished, returncode, self.timed_out, _text(self.stdout), _text(self.stderr))

    def close(self) -> None:
        """End the program if it still runs, and remove what it wrote."""
        self.process.kill()
        self.process.wait()
        for stream in (self.stdout, self.stderr, self.status):
            stream.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _payload(program: Program, limits: Limits, nonce: str) -> dict[str, Any]:
    disk = limits.disk_mb * 2**20
    packages = sysconfig.get_paths()["purelib"]
    interpreter = (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values())
    return {
        "sources": program.sources,
        "name": program.name,
        "nonce": nonce,
        "paths": [packages],
        "readable": sorted({*interpreter, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"} - {"/"}),
        "rlimits": {
            "RLIMIT_AS": limits.memory_mb * 2**20,
            "RLIMIT_CPU": ceil(limits.seconds) + 1,
            "RLIMIT_FSIZE": disk,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_CORE": 0,
        },
    }


@contextmanager
def _deferred_signals() -> Iterator[None]:
    """A signal whose handler raises waits, so that no process is started and then forgotten."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _size(directory: str) -> int:
    """Bytes of the files in a directory, which Landlock keeps flat."""
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                total += entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:  # the program has just removed it
                continue
    return total


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")


def _reason(status: bytes, stderr: IO[bytes]) -> str:
    lines = _text(stderr).strip().splitlines()
    return status.decode(errors="replace") or (lines[-1] if lines else "the process ended without a word")
