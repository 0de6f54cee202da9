"""A sandbox service: the same evaluation on another machine, asked over HTTP.

``POST url`` with a `Job` as JSON; the answer is 200 with a `Report` as JSON, or any other status with a line of text.
A service is `Sandbox().evaluate` behind any web server: `examples/coding/service.py` is one.
"""

from __future__ import annotations

import urllib.error
import urllib.request

from pydantic import ValidationError

from grape.errors import SandboxError, one_line
from grape.sandbox.broker import TESTS_SECONDS
from grape.sandbox.channel import PATIENCE
from grape.sandbox.job import Job, Report

OVERHEAD = 60.0  # seconds that the service may take beside those of the program and its tests
LARGEST = 2**20  # bytes of a report


def ask(url: str, job: Job) -> Report:
    """The service's report; SandboxError where there is none."""
    data = job.model_dump_json().encode("utf-8")
    seconds = PATIENCE * (job.timeout + TESTS_SECONDS) + OVERHEAD
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=seconds) as reply:
            return Report.model_validate_json(reply.read(LARGEST))
    except urllib.error.HTTPError as error:
        text = error.read(500).decode("utf-8", "replace")
        raise SandboxError(f"sandbox service {url}: status {error.code}: {one_line(text, 100)}") from error
    except (OSError, ValueError) as error:
        what = "not a report" if isinstance(error, ValidationError) else one_line(error, 100)
        raise SandboxError(f"sandbox service {url}: {what}") from error
