"""Programs that a model wrote: what they may do, what they may not, and what they are worth."""

import os
import signal
import time
from pathlib import Path

import pytest

from jgrpo.errors import UserError
from jgrpo.rewards import sandbox
from jgrpo.rewards.code import code_io, code_tests, extract_code
from jgrpo.rewards.limits import TimeLimit, call
from jgrpo.rewards.sandbox import Limits, Outcome, Program, run_programs

QUICK = Limits(seconds=1.0, disk_mb=4)


def containable() -> bool:
    try:
        run_programs([Program(("",))])
    except UserError:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not containable(), reason="no Landlock or seccomp here")


def run(source: str, limits: Limits = QUICK, **more: str) -> Outcome:
    (outcome,) = run_programs([Program((source,), **more)], limits)
    return outcome


def sandboxed_processes() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"sandbox_child.py" in command and f"PPid:\t{os.getpid()}\n" in (entry.parent / "status").read_text():
            found.append(command.decode())
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left():
    before = set(Path(sandbox.tempfile.gettempdir()).glob("jgrpo-program-*"))
    yield
    assert sandboxed_processes() == []
    assert set(Path(sandbox.tempfile.gettempdir()).glob("jgrpo-program-*")) <= before


@needs_sandbox
def test_a_program_computes_reads_and_writes_its_own_files():
    source = """
import json, math
with open("notes.json", "w") as file:
    json.dump([math.comb(5, 2), input()], file)
print(open("notes.json").read())
"""
    outcome = run(source, stdin="hello\n")
    assert outcome == Outcome(True, 0, False, '[10, "hello"]\n', "")


@needs_sandbox
@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['sleep', '60'])",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "import ctypes\nwhile ctypes.CDLL(None).fork() >= 0: pass\nraise SystemExit(3)",
    ],
)
def test_fork_bomb(bomb):
    outcome = run(bomb)
    assert not outcome.finished
    assert not outcome.timed_out  # the first attempt fails


@needs_sandbox
@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\nwhile True: pass",
    ],
)
def test_infinite_loop(loop):
    began = time.monotonic()
    outcome = run(loop)
    assert outcome.timed_out
    assert outcome.returncode == -signal.SIGKILL
    assert time.monotonic() - began < 10


@needs_sandbox
@pytest.mark.parametrize("allocation", ["x = bytearray(2**33)", "x = []\nwhile True: x.append(bytearray(2**24))"])
def test_huge_allocation(allocation):
    assert "MemoryError" in run(allocation, Limits(seconds=10)).stderr


@needs_sandbox
@pytest.mark.parametrize(
    "write",
    [
        "open({path!r}, 'w').write('mine')",
        "open({path!r}, 'a').write('mine')",
        "import os; os.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, 'taken')",
        "import os; os.link({path!r}, 'linked')",
        "import os; os.symlink({path!r}, 'linked'); open('linked', 'w')",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.utime({path!r})",
        "import os; os.setxattr({path!r}, 'user.mine', b'1')",
        "import os; os.mkdir({path!r} + '.d')",
        "import os; os.chdir(os.path.dirname({path!r})); open('new', 'w')",
        "open('/dev/shm/jgrpo', 'w')",
        "open('/proc/self/mem', 'r+b')",
        "open({path!r}).read()",
    ],
)
def test_files_outside_its_directory(write, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("yours")
    before = victim.stat()
    outcome = run(write.format(path=str(victim)))
    assert outcome.returncode == 1
    assert any(error in outcome.stderr for error in ("PermissionError", "cross-device link"))
    assert (victim.read_text(), victim.stat().st_mode, victim.stat().st_mtime) == (
        "yours", before.st_mode, before.st_mtime,
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


@needs_sandbox
@pytest.mark.parametrize(
    "attempt",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/x')",
        "import os, signal; os.kill({parent}, signal.SIGTERM)",
        "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, {parent})",
        "import resource; resource.prlimit({parent}, resource.RLIMIT_NOFILE, (1, 1))",
        "import os; os.setpriority(os.PRIO_PROCESS, {parent}, 19)",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.memfd_create('x')",
    ],
)
def test_network_and_other_processes(attempt):
    outcome = run(attempt.format(port=9, parent=os.getpid()))
    assert "PermissionError" in outcome.stderr


@needs_sandbox
def test_output_and_files_are_bounded():
    flood = run("while True: print('x' * 2**20)")
    assert not flood.finished
    assert len(flood.stdout) <= 4 * 2**20
    many = run("for n in range(10**6): open(str(n), 'wb').write(bytes(2**20))", Limits(seconds=20, disk_mb=4))
    assert many.returncode == -signal.SIGKILL
    assert not many.timed_out


@needs_sandbox
def test_an_interrupted_batch_leaves_nothing():
    """The reward's own time limit strikes while programs run."""
    programs = [Program(("while True: pass",))] * 6
    with pytest.raises(TimeLimit):
        call(lambda: run_programs(programs, Limits(seconds=60), workers=3), 0.5)


def test_no_sandbox_no_program(monkeypatch, tmp_path):
    """A kernel without Landlock: refused in one line, and the program has not run."""
    source = sandbox.CHILD.read_text()
    child = tmp_path / "sandbox_child.py"
    child.write_text(
        source.replace(
            "CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444", "CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 9999"
        )
    )
    monkeypatch.setattr(sandbox, "CHILD", child)
    witness = tmp_path / "witness"
    with pytest.raises(UserError, match=r"cannot contain programs \(Landlock: Function not implemented\)"):
        run(f"open({str(witness)!r}, 'w')")
    assert not witness.exists()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="needs Linux"):
        run("")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("First\n```python\na\n```\nthen\n```python\nb\n```\n```\noutput\n```", "b\n"),
        ("```\nplain\n```", "plain\n"),
        ("```python\nunclosed", "```python\nunclosed"),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


@needs_sandbox
def test_code_tests():
    tests = ["assert double(2) == 4", "assert double('a') == 'aa'"]
    completions = [
        "```python\ndef double(x): return 2 * x\n```",
        [{"role": "assistant", "content": "def double(x): return x + 2"}],
        "import sys\nsys.exit(0)",
        "if __name__ == '__main__': input()\ndef double(x):\n    return x + x",
        "not python",
        "no tests",
    ]
    columns = [tests, tests, tests, "\n".join(tests), tests, None]
    assert code_tests(completions, columns) == [1.0, 0.0, 0.0, 1.0, 0.0, None]


@needs_sandbox
def test_code_io():
    inputs, outputs = ["1 2\n", "3 4\n"], ["3\n", "7"]
    completions = ["print(sum(map(int, input().split())))", "print(3)", "print('3 ')\nraise SystemExit(1)", "x"]
    rows = [inputs, inputs, inputs[:1], None]
    assert code_io(completions, rows, [outputs, outputs, outputs[:1], None]) == [1.0, 0.0, 0.0, None]
