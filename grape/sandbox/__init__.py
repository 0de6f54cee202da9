"""Run untrusted programs, and judge them by tests that they can neither see nor touch.

`pool` lends confined interpreters, `worker` and `confine` start and confine them (bubblewrap, `seccomp`), `broker`
carries plain data between a program and its tests. `zygote`, `program`, `tester`, `rewrite` and `plain` run inside.
"""

from grape.sandbox.job import Failure, Job, Report, Run
from grape.sandbox.pool import Sandbox, local

__all__ = ["Failure", "Job", "Report", "Run", "Sandbox", "local"]
