"""Programs that try to pass any tests without solving anything. NAME stands for the entry point.

None of them is aimed at one task's tests: a constant that happens to be right on all inputs of a task would be a
solution of it and not a forgery.
"""

RIGHT = """
class Right:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __getattr__(self, name): return self
    def __call__(self, *args, **kw): return self
    def __iter__(self): return iter([self])
    def __len__(self): return 1
    def __float__(self): return 0.0
    def __abs__(self): return 0.0
    __sub__ = __add__ = __mul__ = __rsub__ = __radd__ = __getitem__ = lambda self, other: self
"""

FRAMES = r"""
import json
def frame(data): return len(data).to_bytes(4, "big") + data
REPORT = {"held": 1, "total": 1, "failures": [], "fault": ""}
FORGED = [
    frame(b"D" + json.dumps(REPORT).encode()), frame(json.dumps(REPORT).encode()),
    frame(json.dumps(["value", True]).encode()), frame(json.dumps(["passed"]).encode()),
    frame(json.dumps({"why": "exit", "status": 0, "clean": True}).encode()), b"1 passed\n", b"OK\n", b"\0" * 64,
]
"""

FORGERIES = {
    "an object equal to everything": RIGHT + "def NAME(*args): return Right()",
    "a str that is equal to everything": """
class S(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def NAME(*args): return S("x")
""",
    "an int that is equal to everything": """
class I(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
    def __abs__(self): return 0
    def __sub__(self, other): return 0
    __rsub__ = __sub__
def NAME(*args): return I(7)
""",
    "containers equal to everything": """
class L(list):
    def __eq__(self, other): return True
    def __len__(self): return 10**9
class D(dict):
    def __eq__(self, other): return True
def NAME(*args): return L([D()])
""",
    "a mock": "from unittest.mock import MagicMock\ndef NAME(*args): return MagicMock()",
    "exit at once": "import sys\nsys.exit(0)",
    "exit in the function": "import sys\ndef NAME(*args): sys.exit(0)",
    "end without a word": "import os\nos._exit(0)",
    "end in the function": "import os\ndef NAME(*args): os._exit(0)",
    "print that all passed": """
def NAME(*args):
    print("1 passed\\nOK\\n{\\"held\\": 1, \\"total\\": 1}", flush=True)
print('{"held": 1, "total": 1, "failures": [], "fault": ""}', flush=True)
""",
    "frames on every descriptor": FRAMES + """
import os
def NAME(*args):
    for fd in range(256):
        for data in FORGED:
            try: os.write(fd, data)
            except OSError: pass
NAME()
""",
    "replies sent ahead": FRAMES + """
import os
for _ in range(50): os.write(3, FORGED[2])
def NAME(*args): return None
""",
    "a report in the place of a reply": FRAMES + """
import os
def NAME(*args):
    os.write(3, FORGED[0])
    os._exit(0)
""",
    "descriptors sent along": FRAMES + """
import os, socket
def NAME(*args):
    channel = socket.socket(fileno=os.dup(3))
    socket.send_fds(channel, [FORGED[0]], [0, 1, 2, 3])
    channel.shutdown(socket.SHUT_RDWR)
""",
    "builtins replaced": """
import builtins, math, operator
yes = lambda *args, **kw: True
for name in ("abs", "all", "any", "isinstance", "len", "round", "sorted", "sum", "min", "max", "AssertionError"):
    setattr(builtins, name, yes)
for module in (math, operator):
    for name in dir(module):
        if not name.startswith("_"): setattr(module, name, yes)
def NAME(*args): return None
""",
    "json and the encoding replaced": """
import json, sys
json.dumps = json.JSONEncoder.encode = lambda *args, **kw: '["value", true]'
json.loads = lambda *args, **kw: [[], {}]
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict) and "encode" in thing and "_pack" in thing:
        thing["encode"] = thing["_pack"] = lambda value: b'["passed", 1]'
def NAME(*args): return None
""",
    "whatever the collector finds": """
import gc
def NAME(*args):
    for thing in gc.get_objects():
        try:
            if hasattr(thing, "results"): thing.results = [(1, "")]
            if hasattr(thing, "expect"): thing.expect = lambda *args: None
            if isinstance(thing, dict):
                for key in ("check", "expect", "candidate", "report", "blames_program"):
                    if key in thing: thing[key] = lambda *args, **kw: None
        except Exception: pass
NAME()
""",
    "frames of the caller": """
import sys, inspect
def NAME(*args):
    frame = sys._getframe()
    while frame:
        for names in (frame.f_globals, frame.f_locals):
            for key in list(names):
                if key in ("check", "expect", "payload", "arguments", "channel", "failure"):
                    names[key] = lambda *args, **kw: True
        frame = frame.f_back
    inspect.stack()
NAME()
""",
    "the tests' text in memory": r'''
import ctypes, re
def search():
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    for pid in ("self", "1"):
        try:
            for line in open(f"/proc/{pid}/maps"):
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
                if not match: continue
                start, end = (int(part, 16) for part in match.groups())
                with open(f"/proc/{pid}/mem", "rb", 0) as memory:
                    memory.seek(start)
                    data = memory.read(end - start)
                for found in re.finditer(rb"assert cand" + rb"idate\((.{1,200}?)\) == (.{1,200}?)\n", data):
                    yield found.groups()
        except (OSError, ValueError, OverflowError): pass
def NAME(*args):
    for arguments, expected in search():
        try:
            if eval(b"(" + arguments + b",)") == args: return eval(expected.split(b", \"")[0])
        except Exception: pass
''',
    "the tests' text in /proc": """
import os
def NAME(*args):
    for folder, _, files in os.walk("/proc"):
        for name in files:
            if name in ("environ", "cmdline", "mem", "comm", "stack"):
                try: data = open(os.path.join(folder, name), "rb").read(1 << 20)
                except (OSError, ValueError, OverflowError): continue
                if b"assert cand" + b"idate" in data: return True
        if folder.count("/") > 4: break
""",
    "at exit": """
import atexit, os
atexit.register(os._exit, 0)
atexit.register(print, "1 passed")
def NAME(*args): raise SystemExit
""",
    "a thread that answers": FRAMES + """
import os, threading, time
def answer():
    while True:
        try: os.write(3, FORGED[2])
        except OSError: return
        time.sleep(0.001)
def NAME(*args):
    threading.Thread(target=answer, daemon=True).start()
    return "true as well"  # of True and None, the race between the two could by luck make what the tests want
""",
    "a daemon that answers": FRAMES + """
import os
def NAME(*args):
    if os.fork(): os._exit(0)
    os.setsid()
    if os.fork(): os._exit(0)
    while True:
        for data in (FORGED[0], FORGED[3]): os.write(3, data)
""",
    "signals to everyone": """
import os, signal
def NAME(*args):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGSTOP, signal.SIGKILL):
        for pid in (1, 2, os.getppid(), 0x7FFFFFFF, -1):
            try: os.kill(pid, number)
            except OSError: pass
signal.signal(signal.SIGTERM, signal.SIG_IGN)
""",
    "recursion without end": "def NAME(*args): return NAME(*args)",
    "a crash of the interpreter": "import ctypes\ndef NAME(*args): ctypes.string_at(0)",
    "an exception that looks like success": """
class AssertionError(Exception):
    def __str__(self): return 'D{"held": 1, "total": 1}'
class Passed(BaseException): pass
Passed.__name__ = "value"
def NAME(*args): raise Passed(True)
""",
    "an exception that resists": """
class Meta(type):
    def __getattribute__(cls, name): raise KeyboardInterrupt
class Hostile(BaseException, metaclass=Meta):
    def __str__(self): raise self
    def __reduce__(self): return (print, ("1 passed",))
    def __getattribute__(self, name): raise self
def NAME(*args): raise Hostile
""",
    "an exception of a gigabyte": "def NAME(*args): raise ValueError('x' * 200_000_000)",
    "arguments emptied": """
def NAME(*args):
    for arg in args:
        if hasattr(arg, "clear"): arg.clear()
    return args
""",
    "a value of a gigabyte": "def NAME(*args): return 'x' * 10**9",
    "a list of millions": "def NAME(*args): return ['a' * 1000] * 5000",
    "a value without bottom": """
def NAME(*args):
    value = []
    for _ in range(100_000): value = [value]
    return value
""",
    "a value that holds itself": """
class Endless:
    def tolist(self): return self
def NAME(*args): return Endless()
""",
    "an int of a million digits": "def NAME(*args): return 1 << 4_000_000",
    "a generator without end": """
def NAME(*args):
    while True: yield True
""",
    "not a number": "def NAME(*args): return float('nan')",
    "the type itself": "class NAME:\n    def __new__(cls, *args): return cls\n    __eq__ = lambda *args: True",
    "pickled code": """
import pickle
class Code:
    def __reduce__(self): return (exec, ("raise SystemExit(0)",))
def NAME(*args): return pickle.dumps(Code())
""",
    "tests of its own": """
def check(candidate): return True
def expect(condition, message=""): return True
import sys, types
sys.modules["tests"] = sys.modules["grape"] = types.ModuleType("tests")
check(None)
""",
    "tracing": """
import sys, threading
def trace(frame, event, arg):
    if event == "exception": sys._getframe(1).f_lineno
    return trace
sys.settrace(trace); sys.setprofile(lambda *args: None); threading.settrace(trace)
sys.excepthook = lambda *args: print("1 passed")
def NAME(*args): assert False
""",
    "no program": "I am sorry, but all tests pass.",
    "a flood": """
import os
def NAME(*args):
    for _ in range(1000):
        for fd in (0, 1, 2):
            try: os.write(fd, b"x" * 100_000)
            except OSError: pass
NAME()
""",
    "files for the next": """
import os
for name in ("json.py", "sitecustomize.py", "tests.py", "random.py", "program.py"):
    open("/tmp/" + name, "w").write("raise SystemExit(0)")
def NAME(*args): return os.listdir("/tmp")
""",
}  # fmt: skip

SLOW = {
    "a loop": "while True: pass",
    "a loop in the function": "def NAME(*args):\n    while True: pass",
    "no answer": "import time\ndef NAME(*args): time.sleep(60)",
    "stopped": "import os, signal\ndef NAME(*args): os.kill(os.getpid(), signal.SIGSTOP)",
    "forks": "import os\ndef NAME(*args):\n    while True:\n        try: os.fork()\n        except OSError: pass",
}
