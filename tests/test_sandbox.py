"""Attacks on the sandbox: each is contained, leaves no process and no file, and harms no later program."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from grape.errors import SandboxError
from grape.sandbox import Job, Sandbox, broker
from grape.sandbox import worker as sandbox_worker
from grape.sandbox.plain import decode, encode
from grape.sandbox.seccomp import program as system_call_filter

PYTHON = "/usr/bin/python3"
ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux")


CONFINED = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def descendants(pid: int) -> list[int]:
    """Every process below one, on the whole machine."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rsplit(")", 1)[1].split()[1]), []).append(int(path.name))
    below = parents.get(pid, [])
    return below + [grandchild for child in below for grandchild in descendants(child)]


def confined(sandbox: Sandbox) -> dict[str, sandbox_worker.Confined]:
    """The workers of a sandbox that has one set of them."""
    slot = sandbox._slots.get()
    sandbox._slots.put(slot)
    return {role: worker for role, worker in slot.items() if isinstance(worker, sandbox_worker.Confined)}


LOOK = """
import os
print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == sorted({1, os.getpid()}))
print(os.listdir("/tmp"), os.listdir("/dev/shm"))
print(len(os.listdir("/proc/self/fd")))
try:
    data = bytearray(200_000_000)
    children = [os.fork() for _ in range(3)]
except OSError as error:
    print(error)
print("unharmed")
"""


def assert_unharmed(sandbox: Sandbox) -> None:
    """The next program sees no process, no file and no descriptor of the last, and has all its limits."""
    done = sandbox.run("import os\nif os.fork(): os.wait()\nelse: os._exit(0)\n" + LOOK.replace("children", "_"))
    assert done.how == "", done
    lines = done.stdout.splitlines()
    assert lines[0] == "True"
    assert lines[1:3] == ["[] []", "4"]  # the fourth descriptor is the listing's own
    assert lines[-1] == "unharmed"
    for worker in confined(sandbox).values():
        assert worker.closed or len(descendants(worker.process.pid)) == 1, "only the interpreter itself is left"


def test_a_script_reads_its_input_and_its_output_comes_back(sandbox: Sandbox):
    done = sandbox.run("print(input()[::-1])\nimport sys\nprint('note', file=sys.stderr)", "abc\nrest")
    assert (done.stdout, done.stderr, done.how) == ("cba\n", "note\n", "")


def test_a_script_that_reads_nothing_of_a_large_input_ends_well(sandbox: Sandbox):
    assert sandbox.run("print(1)", "x" * 3_000_000).stdout == "1\n"


def test_a_script_gets_a_large_input_whole(sandbox: Sandbox):
    text = "line\n" * 300_000
    assert sandbox.run("import sys\nprint(len(sys.stdin.read()))", text).stdout == f"{len(text)}\n"


@pytest.mark.parametrize(
    ("source", "how"),
    [
        ("1/0", "exit: it ended with status 1: ZeroDivisionError: division by zero"),
        ("print('out'); import sys; sys.exit(3)", "exit: it ended with status 3"),
        ("import sys; sys.exit('bad input')", "exit: it ended with status 1: bad input"),
        ("import os; os.kill(os.getpid(), 9)", "exit: it was killed by SIGKILL"),
        ("def f(:", "exit: it ended with status 1: SyntaxError: invalid syntax"),
        ("import ctypes; ctypes.string_at(0)", "exit: it was killed by SIGSEGV"),
    ],
)
def test_a_crash_is_told_with_its_last_words(sandbox: Sandbox, source: str, how: str):
    assert sandbox.run(source).how == how


def test_what_a_script_leaves_to_its_exit_is_done(sandbox: Sandbox):
    source = """
import atexit, threading, time, sys
class Last:
    def __del__(self): print("deleted")
last = Last()
atexit.register(print, "atexit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
print("main", end=" ")
"""
    assert sandbox.run(source).stdout == "main thread\natexit\ndeleted\n"
    assert sandbox.run(re.sub("threading.Thread.*", "", source)).stdout == "main atexit\ndeleted\n"
    assert sandbox.run("import atexit\natexit.register(print, 1)\nprint(0, end=' ')").stdout == "0 1\n"


ENDLESS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "ignores-signals": """
import signal, time
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
""",
    "closes-its-streams": "import os, time\nfor fd in range(3): os.close(fd)\ntime.sleep(60)",
    "stops-itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.slow
def test_a_program_that_does_not_end_is_ended(sandbox: Sandbox, name: str):
    assert sandbox.run(ENDLESS[name], timeout=0.3).how.startswith("timeout: it took more than 0.3 s")
    assert_unharmed(sandbox)


FORK_BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""


COUNT_FORKS = """
import os, time
n = 0
try:
    while True:
        if not os.fork(): time.sleep(60)
        n += 1
except OSError:
    print(n)
"""


def test_a_fork_bomb_is_limited_and_swept_away(sandbox: Sandbox):
    assert sandbox.run(FORK_BOMB, timeout=0.5).how.startswith("timeout")
    assert_unharmed(sandbox)
    assert int(sandbox.run(COUNT_FORKS).stdout) < 64
    assert_unharmed(sandbox)


MEMORY = {
    "one-block": ("bytearray(4 << 30)", "MemoryError"),
    "mmap": ("import mmap; mmap.mmap(-1, 4 << 30)", "Cannot allocate memory"),
    "growth": ("kept = []\nwhile True: kept.append(bytearray(10_000_000))", "MemoryError"),
    "many-processes": (
        """
import os
for _ in range(20):
    if not os.fork(): break
kept = bytearray(b"x") * 100_000_000
while True: pass
""",
        "memory: it and its processes took more than 512 MB",
    ),
    "many-files": (
        """
import os
try:
    while True: open(f"/tmp/{os.urandom(8).hex()}", "w").close()
except OSError:
    print("full")
""",
        "too many files",
    ),
    "memfd": ("import os\nos.memfd_create('x')", "Operation not permitted"),
    "shared-memory": (
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.shmget(0, 1 << 20, 0o1600) < 0: raise OSError(os.strerror(ctypes.get_errno()))
""",
        "Operation not permitted",
    ),
}


@pytest.mark.parametrize("name", MEMORY)
@pytest.mark.slow
def test_a_memory_bomb_is_contained(sandbox: Sandbox, name: str):
    source, how = MEMORY[name]
    assert how in sandbox.run(source, timeout=20).how
    assert_unharmed(sandbox)


def test_memory_that_processes_share_counts_once(sandbox: Sandbox):
    source = """
import os, time
kept = bytearray(b"x") * 200_000_000
for _ in range(8):
    if not os.fork(): time.sleep(60)
time.sleep(0.3)
print("done")
"""
    assert sandbox.run(source, timeout=20).stdout == "done\n"


DAEMON = """
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        while True:
            try: open("/tmp/alive", "a").write("x")
            except OSError: pass
            time.sleep(0.001)
    os._exit(0)
os.wait()
time.sleep(0.05)
print(os.path.exists("/tmp/alive"))
"""


def test_a_daemon_ends_with_its_program(sandbox: Sandbox):
    assert sandbox.run(DAEMON).stdout == "True\n"
    assert_unharmed(sandbox)


def test_no_network_is_reached(sandbox: Sandbox):
    reached = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        source = f"""
import socket
for family, address in [
    (socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_INET, ("1.1.1.1", 53)), (socket.AF_INET6, ("::1", {port})),
    (socket.AF_INET, ("169.254.169.254", 80)), (socket.AF_VSOCK, (2, 5001)), (socket.AF_NETLINK, (0, 0)),
    (socket.AF_PACKET, ("lo", 0)), (socket.AF_UNIX, "/run/systemd/private"), (socket.AF_UNIX, "\\0grape-test"),
]:
    try:
        socket.socket(family).connect(address)
        print("reached", family, address)
    except OSError:
        pass
try:
    print("reached", socket.getaddrinfo("example.org", 443))
except OSError:
    print("alone")
"""
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind("\0grape-test")
            abstract.listen()
            done = sandbox.run(source, timeout=10)
        with pytest.raises(TimeoutError):
            reached.append(server.accept())
    assert (done.stdout, done.how, reached) == ("alone\n", "", [])


def test_no_file_of_the_machine_is_read(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRAPE_TEST_SECRET", "from the environment")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for name, mode in (("open", 0o644), ("closed", 0o600)):
            Path(folder, name).write_text("secret")
            Path(folder, name).chmod(mode)
        source = f"""
import os
tried = ["{folder}/open", "{folder}/closed", {str(Path(__file__))!r}, "/etc/passwd", "/etc/shadow", "/root", "/home",
         "/var", "/proc/1/environ", "/proc/1/mem", "/proc/1/maps", "/proc/1/root", "/proc/1/fd", "/proc/kcore"]
for path in tried:
    for read in (os.listdir, lambda path: open(path, "rb").read(100)):
        try: print(path, read(path))
        except OSError: pass
print([value for value in os.environ.values() if "from the env" in value], os.listdir("/usr/local"))
"""
        done = sandbox.run(source)
    assert (done.stdout, done.how) == ("[] []\n", "")


def test_nothing_is_writable_but_a_small_tmp(sandbox: Sandbox):
    source = """
import os
for folder in ("/", "/usr", "/usr/local", "/usr/lib", "/dev", "/proc", "/etc", "/var/tmp", "/run", "/bin"):
    try: open(folder + "/new", "w"); print("wrote", folder)
    except OSError: pass
try: os.chmod("/usr/bin/env", 0o777); print("changed")
except OSError: pass
open("/dev/shm/note", "w").write("in /tmp too")
print(open("/tmp/note").read())
"""
    assert sandbox.run(source).stdout == "in /tmp too\n"
    assert_unharmed(sandbox)


def test_a_full_tmp_is_emptied(sandbox: Sandbox):
    source = """
import os
n = 0
try:
    while True:
        with open(f"/tmp/{n}", "wb", buffering=0) as file:
            n += 1
            file.write(bytes(1 << 20)); file.write(bytes(1 << 20))
except OSError as error:
    print(error.strerror, n < 10)
"""
    assert sandbox.run(source).stdout == "No space left on device True\n"
    assert_unharmed(sandbox)


def test_folders_that_resist_removal_are_gone_with_their_sandbox(sandbox: Sandbox):
    source = """
import os
for _ in range(3000):
    os.mkdir("d"); os.chdir("d")
open("file", "w").close()
os.chmod("/tmp/d", 0)
print("made")
"""
    assert sandbox.run(source).stdout == "made\n"
    assert_unharmed(sandbox)


ON_PROCESS_1 = """
import ctypes, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
for number in range(1, 65):
    for pid in (1, os.getppid(), -os.getpgid(os.getppid())):
        try: os.kill(pid, number)
        except OSError: pass
for act in (
    lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0)),
    lambda: resource.prlimit(1, resource.RLIMIT_NPROC, (0, 0)),
    lambda: os.setpriority(os.PRIO_PROCESS, 1, 19),
    lambda: os.sched_setaffinity(1, [0]),
    lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)),
    lambda: open("/proc/1/mem", "r+b"),
    lambda: open("/proc/1/oom_score_adj", "w").write("1000"),
    lambda: os.open("/proc/1/fd/3", os.O_RDWR),
):
    try: print("did", act())
    except OSError: pass
for name, arguments in {"ptrace": (16, 1, 0, 0), "process_vm_readv": (1, 0, 0, 0, 0, 0), "unshare": (0x10000000,),
                        "mount": (0, 0, 0, 0, 0), "setns": (0, 0), "personality": (-1,)}.items():
    if getattr(libc, name)(*arguments) >= 0 or ctypes.get_errno() != 1: print("did", name)
libc.prctl(4, 1, 0, 0, 0)
open("/proc/self/oom_score_adj", "w").write("1000")
try: os.kill(-1, signal.SIGTERM)
except OSError: pass
print("still here")
"""


def test_the_first_process_cannot_be_harmed_from_inside(sandbox: Sandbox):
    before = {role: worker.process.pid for role, worker in confined(sandbox).items()}
    done = sandbox.run(ON_PROCESS_1)
    assert (done.stdout, done.how) == ("still here\n", "")
    assert_unharmed(sandbox)
    assert {role: worker.process.pid for role, worker in confined(sandbox).items()} == before


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_flood_of_output_is_cut(sandbox: Sandbox, stream: str):
    done = sandbox.run(f"import sys\nwhile True: sys.{stream}.write('x' * 100_000)", timeout=0.5)
    assert done.how == "it printed more than 4 MB" if stream == "stdout" else done.how.startswith("timeout")
    assert len(done.stdout) < 5 << 20 and len(done.stderr) < 5000
    assert_unharmed(sandbox)


def test_many_processes_and_threads_of_a_program_work_together(sandbox: Sandbox):
    source = """
import multiprocessing, concurrent.futures, subprocess
def square(n): return n * n
if __name__ == "__main__":
    with multiprocessing.Pool(3) as pool: print(pool.map(square, range(5)))
    with concurrent.futures.ThreadPoolExecutor(8) as threads: print(sum(threads.map(square, range(5))))
    print(subprocess.run(["echo", "a child"], capture_output=True, text=True).stdout, end="")
"""
    done = sandbox.run(source, timeout=10)
    assert (done.stdout, done.how) == ("[0, 1, 4, 9, 16]\n30\na child\n", "")
    assert_unharmed(sandbox)


def test_descriptors_and_threads_do_not_pile_up(sandbox: Sandbox):
    job = Job(blocks=("def f(): return 1",), tests="expect(call('f') == 1)\nexpect(run('') == '')")
    sandbox.evaluate(job)
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    for _ in range(20):
        assert sandbox.evaluate(job).held == 2
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before


def test_deep_recursion_fails_the_program_alone(sandbox: Sandbox):
    assert "RecursionError" in sandbox.run("def f(): f()\nf()").how
    source = "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n    def __repr__(self): return repr(self)\nrepr(A())"
    assert "SIGSEGV" in sandbox.run(source, timeout=20).how
    assert_unharmed(sandbox)


def test_programs_have_the_same_random_hashes_but_not_the_same_random_numbers(sandbox: Sandbox):
    hashes = {sandbox.run("print(hash('a'), {'a', 'b', 'c', 'd'})").stdout for _ in range(3)}
    numbers = {sandbox.run("import random; print(random.random())").stdout for _ in range(3)}
    assert len(hashes) == 1 and len(numbers) == 3


def test_a_sandbox_killed_from_outside_is_replaced(sandbox: Sandbox):
    assert sandbox.run("print(1)").stdout == "1\n"
    for pid in descendants(confined(sandbox)["main"].process.pid):
        os.kill(pid, signal.SIGKILL)
    assert sandbox.run("print(2)").stdout == "2\n"
    confined(sandbox)["main"].process.kill()
    confined(sandbox)["main"].process.wait()
    assert sandbox.run("print(3)").stdout == "3\n"


def test_a_process_that_cannot_be_prepared_is_no_fault_of_its_program(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
):
    job = Job(blocks=("def f(): return 1",), tests="expect(call('f') == 1)")
    assert sandbox.evaluate(job).held == 1
    with monkeypatch.context() as patch:
        patch.setattr(broker, "limits", lambda **_: {"RLIMIT_UNHEARD_OF": 1})
        with pytest.raises(SandboxError, match="the sandbox broke twice: it died"):
            sandbox.evaluate(job)
        with pytest.raises(SandboxError, match="the sandbox broke twice: it died"):
            sandbox.run("print(1)")
    assert sandbox.evaluate(job).held == 1


def test_a_sandbox_that_hangs_is_replaced(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox_worker, "SWEEP", 0.5)
    assert sandbox.run("print(1)").stdout == "1\n"
    for pid in descendants(confined(sandbox)["main"].process.pid):
        os.kill(pid, signal.SIGSTOP)
    assert sandbox.run("print(2)", timeout=0.3).stdout == "2\n"


@CONFINED
def test_several_threads_share_a_sandbox():
    with Sandbox(workers=2) as sandbox, ThreadPoolExecutor(6) as threads:
        done = list(threads.map(lambda n: sandbox.run(f"print({n} * int(input()))", "3").stdout, range(40)))
    assert done == [f"{3 * n}\n" for n in range(40)]


@CONFINED
def test_nothing_starts_before_the_first_program_and_nothing_is_left_after_the_last():
    before = set(descendants(os.getpid()))
    with Sandbox(workers=2) as sandbox:
        assert set(descendants(os.getpid())) <= before
        sandbox.run("print(1)")
        assert len(set(descendants(os.getpid())) - before) == 2  # bubblewrap and the interpreter
    assert set(descendants(os.getpid())) <= before


def test_a_sandbox_outlives_the_thread_that_used_it_first(sandbox: Sandbox):
    with Sandbox(workers=1) as own:
        thread = threading.Thread(target=own.run, args=("print(1)",))
        thread.start()
        thread.join()
        first = confined(own)["main"].process.pid
        assert own.run("print(2)").stdout == "2\n"
        assert confined(own)["main"].process.pid == first


PARENT = """
import sys
from grape.sandbox import Sandbox
with Sandbox(workers=1) as sandbox:
    sandbox.run(sys.argv[1], timeout=60)
"""


def soon(condition: Callable[[], bool]) -> bool:
    """Whether something comes true, for which a busy machine may take its time."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@CONFINED
@pytest.mark.slow
def test_when_the_parent_is_killed_nothing_stays_behind():
    source = "import os\nfor _ in range(3):\n    if not os.fork(): os.setsid()\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", PARENT, source], cwd=ROOT) as parent:
        assert soon(lambda: len(descendants(parent.pid)) >= 10)  # bubblewrap, the interpreter and eight forks
        below = descendants(parent.pid)
        parent.kill()
    assert soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


@CONFINED
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_is_confined_as_well():
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setgroups([])
            os.setgid(12345)
            os.setuid(12345)
            with Sandbox(workers=1) as sandbox:
                seen, bombed, counted = (sandbox.run(source, timeout=0.5) for source in (LOOK, FORK_BOMB, COUNT_FORKS))
            ok = "unharmed" in seen.stdout and "timeout" in bombed.how and int(counted.stdout) < 64
            status = 0 if ok else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_without_bubblewrap_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Sandbox() as sandbox, pytest.raises(SandboxError) as caught:
        sandbox.run("print(1)")
    assert str(caught.value) == (
        "programs cannot be confined: install bubblewrap (apt-get install bubblewrap), name a sandbox service, "
        "or accept the risk: --unsafe-code"
    )


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions to create new namespace"),
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', "programs are not confined"),
        ("exit 0", "programs cannot be confined"),
    ],
    ids=["refused", "confines-nothing", "does-nothing"],
)
def test_a_broken_bubblewrap_is_never_trusted(monkeypatch: pytest.MonkeyPatch, script: str, complaint: str):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        fake = Path(folder, "bwrap")
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with Sandbox(workers=1) as sandbox, pytest.raises(SandboxError, match=complaint):
            sandbox.run("print(1)")


def test_an_interpreter_that_is_missing_is_a_sandbox_error():
    with Sandbox(interpreter="/nowhere/python") as sandbox, pytest.raises(SandboxError, match="does not run"):
        sandbox.run("print(1)")


@CONFINED
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's programs run as that user")
def test_an_interpreter_that_the_confined_user_cannot_reach_is_a_sandbox_error(tmp_path: Path):
    tmp_path.chmod(0o700)
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = str(tmp_path / "venv/bin/python")
    with Sandbox(interpreter=interpreter) as sandbox, pytest.raises(SandboxError, match="Permission denied"):
        sandbox.run("print(1)")


@CONFINED
def test_a_virtual_environment_can_be_the_interpreter():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", f"{folder}/venv"], check=True)
        (site,) = Path(folder, "venv/lib").glob("python*/site-packages")
        (site / "fortytwo.py").write_text("VALUE = 42\n")
        Path(folder, "secret").write_text("beside the environment")
        with Sandbox(interpreter=f"{folder}/venv/bin/python", workers=1) as sandbox:
            done = sandbox.run(f"import fortytwo, os\nprint(fortytwo.VALUE, os.listdir({folder!r}))")
            assert (done.stdout, done.how) == ("42 ['venv']\n", "")
            assert sandbox.run("open('/tmp/x', 'w').close()").how == ""
            assert sandbox.run(f"import os; print(os.listdir('/tmp') == [{folder.split('/')[2]!r}])").stdout == "True\n"


def test_unsafe_mode_runs_programs_without_bubblewrap_and_with_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Sandbox(unsafe=True, workers=1) as sandbox:
        assert sandbox.run("print(input())", "hello").stdout == "hello\n"
        assert "MemoryError" in sandbox.run("bytearray(4 << 30)").how
        assert sandbox.run("while True: pass", timeout=1).how.startswith("timeout")
        report = sandbox.evaluate(Job(blocks=("def f(x): return x + 1",), tests='expect(call("f", 1) == 2)'))
        assert (report.held, report.total) == (1, 1)


def serve(reply: tuple[int, bytes] | None, sandbox: Sandbox) -> ThreadingHTTPServer:
    """A sandbox service on loopback: the given sandbox's own reports, or one reply to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            job = Job.model_validate_json(data)
            status, body = reply or (200, sandbox.evaluate(job).model_dump_json().encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def test_a_sandbox_service_gives_the_same_report(sandbox: Sandbox):
    job = Job(
        blocks=("def f(x): return {x: (x, None)}",),
        tests='expect(call("f", 1.5) == {1.5: (1.5, None)})\nexpect(call("f", "ü\\ud800") == 3)',
        timeout=2,
    )
    with serve(None, sandbox) as server:
        remote = Sandbox(url=f"http://127.0.0.1:{server.server_port}/run")
        assert remote.evaluate(job) == sandbox.evaluate(job)
        assert remote.evaluate(job).held == 1
        server.shutdown()


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ((503, b"no worker is free"), "status 503: no worker is free"),
        ((200, b"<html>"), "not a report"),
        ((200, b'{"held": 1, "total": 1, "score": 1}'), "not a report"),
        ((200, b'{"held": true, "total": 1}'), "not a report"),
        ((200, b'{"held": 3, "total": 2}'), "not a report"),
    ],
)
def test_a_service_that_fails_is_a_sandbox_error(sandbox: Sandbox, reply: tuple[int, bytes], complaint: str):
    with serve(reply, sandbox) as server:
        remote = Sandbox(url=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(SandboxError, match=complaint):
            remote.evaluate(Job(blocks=("",), tests="expect(True)"))
        server.shutdown()


def test_a_service_that_is_not_there_is_a_sandbox_error():
    with pytest.raises(SandboxError, match="Connection refused"):
        Sandbox(url="http://127.0.0.1:9").evaluate(Job(blocks=("",), tests="expect(True)"))


def test_plain_data_crosses_exactly():
    value = [None, True, 0, -(2**63), 2**63, 10**5000, 0.1, -0.0, 1e308, float("inf"), "ü\ud800\0", b"\0\xff", 1 + 2j]
    value += [
        (1, [2]),
        {1, 2},
        frozenset({(1,)}),
        {(1, 2): {None: set()}, 1.5: "x"},
        [[]],
        {},
        (),
        "{}",
        {"int": "0x1"},
    ]
    got = decode(encode(value))
    assert got == value
    assert [type(a) for a in got] == [type(b) for b in value]
    assert str(got[7]) == "-0.0" and decode(encode(float("nan"))) != decode(encode(float("nan")))


def test_what_is_not_plain_does_not_cross():
    loop: list[object] = []
    loop.append(loop)
    for value in (object(), len, (n for n in ()), loop, range(3), "x" * 5_000_000):
        with pytest.raises((TypeError, ValueError, RecursionError)):
            encode(value)
    for data in (b'{"object": 1}', b'{"tuple": 1}', b"{}", b'{"dict": [[[], 1]]}', b'{"int": 3}', b"x", b"[" * 100_000):
        with pytest.raises((TypeError, ValueError, RecursionError)):
            decode(data)


def test_the_filter_of_system_calls_is_sound_for_both_machines():
    for machine in ("x86_64", "aarch64"):
        steps = system_call_filter(machine)
        assert len(steps) % 8 == 0
        assert all(
            place + 1 + max(steps[8 * place + 2 : 8 * place + 4]) < len(steps) // 8
            for place in range(len(steps) // 8 - 1)
        )
    with pytest.raises(SandboxError, match="riscv64"):
        system_call_filter("riscv64")
