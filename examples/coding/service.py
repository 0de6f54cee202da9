"""A sandbox service: programs sent over HTTP are run and judged here, so that they run on no machine that trains.

    python examples/coding/service.py --port 8400

It answers a POST of a `Job` as JSON with a `Report` as JSON (`grape.sandbox.remote`), 400 where the request is not a
job, and 503 where programs cannot be confined. It has no login: keep it on a private network.
"""

from __future__ import annotations

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import ValidationError

from grape.errors import SandboxError, one_line
from grape.sandbox import Job, Sandbox

LARGEST = 64 * 2**20  # bytes of a job


def serve(sandbox: Sandbox, host: str, port: int) -> ThreadingHTTPServer:
    """A server that gives the sandbox's reports; the caller runs it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", 0))
                job = Job.model_validate_json(self.rfile.read(min(size, LARGEST)))
                status, body = 200, sandbox.evaluate(job).model_dump_json()
            except (ValidationError, ValueError) as error:
                status, body = 400, one_line(error)
            except SandboxError as error:
                status, body = 503, one_line(error)
            data = body.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if status == 200 else "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8400)
    arguments = parser.parse_args()
    with Sandbox() as sandbox, serve(sandbox, arguments.host, arguments.port) as server:
        print(f"http://{arguments.host}:{server.server_port}")
        server.serve_forever()


if __name__ == "__main__":
    main()
