"""How a process is confined: the bubblewrap command line, what the interpreter needs to see, and its limits."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grape.errors import SandboxError, one_line
from grape.sandbox import seccomp

SYSTEM = "/usr/bin/python3"  # not the one that runs this, which a home that others cannot enter may hold
DEFAULT_INTERPRETER = SYSTEM if Path(SYSTEM).exists() else sys.executable
INSIDE = ("plain", "program", "rewrite", "tester", "zygote")  # in the order of their imports
TMP = 16 * 2**20  # bytes that a program may write to /tmp
NOBODY = 65534
INSTALL = "install bubblewrap (apt-get install bubblewrap), name a sandbox service, or accept the risk: --unsafe-code"
ALLOW = "let users have user namespaces (sysctl), name a sandbox service, or accept the risk: --unsafe-code"
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",  # a program's sets have one order, so its score is one
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


def limits(*, seconds: float, memory: int) -> dict[str, int]:
    """A program's resource limits, soft and hard: CPU seconds and bytes of memory as given, the rest fixed."""
    return {
        "RLIMIT_CPU": int(seconds) + 2,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": TMP,
        "RLIMIT_NOFILE": 128,
        "RLIMIT_NPROC": 64,
        "RLIMIT_CORE": 1,  # not 0, with which the kernel still feeds a core handler
    }


def bootstrap(entry: str) -> str:
    """Python source that loads the modules of the inside, which no path inside leads to, and then runs ``entry``."""
    folder = Path(__file__).parent
    sources = {f"grape.sandbox.{name}": (folder / f"{name}.py").read_text(encoding="utf-8") for name in INSIDE}
    return (
        "import sys, types\n"
        f"sources = {sources!r}\n"
        "sys.path[:] = [path for path in sys.path if path]\n"
        "for name in ('grape', 'grape.sandbox', *sources):\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    if '.' in name:\n"
        "        setattr(sys.modules[name.rpartition('.')[0]], name.rpartition('.')[2], module)\n"
        "    exec(compile(sources.get(name, ''), name, 'exec'), module.__dict__)\n"
        "for name in ('grape', 'grape.sandbox', *sources):\n"
        "    del sys.modules[name]\n"
        "del sources\n"
        f"{entry}\n"
    )


def needs(interpreter: str) -> list[str]:
    """The folders outside /usr that an interpreter lives in; SandboxError if it does not run."""
    ask = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix, sys.version_info[:2]]))"
    try:
        done = subprocess.run(
            [interpreter, "-I", "-c", ask], capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL
        )
        *prefixes, version = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SandboxError(f"the interpreter {interpreter!r} does not run: {one_line(error)}") from error
    if tuple(version) < (3, 9):
        raise SandboxError(f"the interpreter {interpreter!r} is older than Python 3.9")
    folders = {os.path.realpath(prefix) for prefix in prefixes} | set(prefixes)
    if folders & {"/", str(Path.home()), "/home", "/root", "/tmp"}:
        raise SandboxError(f"the interpreter {interpreter!r} lives in a folder that programs must not see")
    return sorted(folder for folder in folders if folder != "/usr")


def command(interpreter: str, folders: Sequence[str], *, control: int, filter_fd: int) -> list[str]:
    """The confined interpreter: its own namespaces, no capability, read-only system folders, a small /tmp."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(f"programs cannot be confined: {INSTALL}")
    line = [bwrap, "--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    line += ["--die-with-parent", "--as-pid-1", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"]
    line += ["--seccomp", str(filter_fd), "--clearenv"]
    for name, value in ENVIRONMENT.items():
        line += ["--setenv", name, value]
    line += ["--ro-bind", "/usr", "/usr"]
    if not any(Path(folder).is_relative_to("/usr/local") for folder in folders):
        line += ["--tmpfs", "/usr/local", "--remount-ro", "/usr/local"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            line += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            line += ["--ro-bind", str(path), str(path)]
    for file in ("/etc/alternatives", "/etc/ld.so.cache"):
        line += ["--ro-bind-try", file, file]
    line += ["--proc", "/proc", "--tmpfs", "/dev"]
    for device in ("null", "zero", "full", "random", "urandom"):
        line += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    line += ["--symlink", "/tmp", "/dev/shm", "--symlink", "/proc/self/fd", "/dev/fd", "--remount-ro", "/dev"]
    line += ["--size", str(TMP), "--tmpfs", "/tmp"]
    for folder in folders:
        line += ["--ro-bind", folder, folder]
    line += ["--chdir", "/tmp", "--remount-ro", "/"]
    entry = f"import socket\nzygote.serve(socket.socket(fileno={control}), {list(folders)!r})"
    return [*line, "--", interpreter, "-s", "-c", bootstrap(f"zygote = module\n{entry}")]


def launch(interpreter: str, folders: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a confined interpreter; it and our end of its control line. As root it starts as nobody.

    It dies with the thread that calls this.
    """
    calls = seccomp.program()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    os.write(writer, calls)
    os.close(writer)
    user: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    try:
        process = subprocess.Popen(
            command(interpreter, folders, control=theirs.fileno(), filter_fd=reader),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(), reader),
            cwd="/",
            env={},
            start_new_session=True,
            **user,
        )
    except (OSError, subprocess.SubprocessError) as error:
        ours.close()
        raise SandboxError(f"programs cannot be confined: {one_line(error, 100)}; {ALLOW}") from error
    except SandboxError:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(reader)
    return process, ours
