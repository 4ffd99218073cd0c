"""The inside of `jgrpo.rewards.sandbox`: takes away what a program may not have, then runs it. Standard library only.

Started as a script by the parent, never imported: `python -I -S sandbox_child.py PAYLOAD_FD STATUS_FD`. The payload is JSON; to
the status pipe go "ready" when every restriction stands and the payload's nonce when the last source has run to its end.
What goes wrong before "ready" is an error of the machine, and the program does not run.

In order: Landlock (file system, TCP), no new privileges, no capabilities, resource limits, seccomp (everything else). Both
Landlock and seccomp need no privileges, and they bind root as well.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

# linux/landlock.h. The three calls have the same numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
FS_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every right to files that an ABI version knows; what is handled and not given is denied."""
TCP_RIGHTS, SCOPES = 3, 3

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38

# Numbers of asm/unistd_64.h and asm-generic/unistd.h; None: the architecture lacks the call.
SYSCALLS = {
    # No other process or thread, and no other program: nothing can outlive the one that the parent kills.
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "unshare": (272, 97), "setsid": (112, 157), "setpgid": (109, 154),
    # Nothing happens to processes of the same user.
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # No network and no other way to talk to somebody.
    "socket": (41, 198), "socketpair": (53, 199), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Landlock does not watch over these.
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # Memory that RLIMIT_AS does not count, and doors that no such program needs.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip
CLONE3, FCNTL = 435, (72, 25)
SIGNALLING_FCNTLS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of SYSCALLS, and the AUDIT_ARCH that the kernel reports."""
EPERM, ENOSYS = 1, 38


def check(result, what):
    """The result of a call, or OSError with what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what, number, *arguments):
    """A raw system call."""
    widened = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(LIBC.syscall(ctypes.c_long(number), *widened), what)


def prctl(what, option, *arguments):
    """prctl(2); its variable arguments are longs."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    check(LIBC.prctl(option, *(ctypes.c_ulong(a) if isinstance(a, int) else a for a in padded)), what)


def confine_files(directory, readable):
    """Landlock: read and write flat files in `directory`, read what is under `readable`, and nothing else; no TCP."""
    abi = syscall("Landlock", CREATE_RULESET, 0, 0, 1)
    rights = FS_RIGHTS[min(abi, 5)]
    attributes = struct.pack("=QQQ", rights, TCP_RIGHTS if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall("Landlock ruleset", CREATE_RULESET, attributes, size, 0)
    own = READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | REMOVE_FILE | TRUNCATE
    rules = {directory: own, **dict.fromkeys(readable, READ_FILE | READ_DIR)}
    rules |= {"/dev/null": READ_FILE | WRITE_FILE, "/dev/urandom": READ_FILE}
    for path, allowed in rules.items():
        if os.path.exists(path):
            if not os.path.isdir(path):
                allowed &= READ_FILE | WRITE_FILE
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            syscall(f"Landlock rule for {path}", ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed & rights, fd), 0)
            os.close(fd)
    prctl("no new privileges", PR_SET_NO_NEW_PRIVS, 1)
    syscall("Landlock", RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def drop_capabilities(column):
    """Root without its powers; for everybody else nothing changes."""
    header = struct.pack("=Ii", 0x20080522, 0)
    syscall("dropping capabilities", (126, 91)[column], header, bytes(24))


def limit_resources(limits):
    """Hard limits, so that they cannot be raised again."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def filter_program(column, audit_arch):
    """BPF of the seccomp filter: other architectures die, denied calls fail with EPERM, clone3 does not exist."""

    def statement(code, k, jt=0, jf=0):
        return struct.pack("=HBBI", code, jt, jf, k)

    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, kill, deny = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM
    parts = [statement(load, 4), statement(equal, audit_arch, 1, 0), statement(give, kill), statement(load, 0)]
    if column == 0:  # the x32 calls are the same calls under other numbers
        parts += [statement(at_least, 0x40000000, 0, 1), statement(give, kill)]
    for number in sorted(numbers[column] for numbers in SYSCALLS.values() if numbers[column] is not None):
        parts += [statement(equal, number, 0, 1), statement(give, deny)]
    # libc falls back from clone3, whose flags a filter cannot see, to clone.
    parts += [statement(equal, CLONE3, 0, 1), statement(give, 0x00050000 | ENOSYS)]
    parts += [statement(equal, FCNTL[column], 0, 1 + 2 * len(SIGNALLING_FCNTLS)), statement(load, 24)]
    for command in SIGNALLING_FCNTLS:
        parts += [statement(equal, command, 0, 1), statement(give, deny)]
    return b"".join([*parts, statement(give, allow)])


def filter_syscalls(column, audit_arch):
    """Install the seccomp filter."""
    program = filter_program(column, audit_arch)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    prctl("seccomp", PR_SET_SECCOMP, 2, header)


def confine(payload):
    """Every restriction; raises OSError or KeyError where the machine cannot give one."""
    prctl("dying with the parent", PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if platform.machine() not in ARCHITECTURES:
        raise OSError(ENOSYS, f"no table of system calls for {platform.machine()}")
    column, audit_arch = ARCHITECTURES[platform.machine()]
    confine_files(os.getcwd(), payload["readable"])
    drop_capabilities(column)
    limit_resources(payload["rlimits"])
    filter_syscalls(column, audit_arch)


def main():
    """Read the payload, confine, run."""
    payload_fd, status = int(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(payload_fd) as stream:
        payload = json.load(stream)
    try:
        confine(payload)
    except OSError as error:
        os.write(status, str(error.strerror or error).encode())
        os._exit(1)
    os.write(status, b"ready\n")
    sys.argv = ["main.py"]
    sys.path[:] = [path for path in sys.path if path] + payload["paths"] + [os.getcwd()]
    module = types.ModuleType(payload["name"])
    sys.modules[payload["name"]] = module
    for number, source in enumerate(payload["sources"]):
        exec(compile(source, f"<source {number}>", "exec"), module.__dict__)
    sys.stdout.flush()
    os.write(status, payload["nonce"].encode())


if __name__ == "__main__":
    main()
