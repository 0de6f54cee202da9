"""The processes of one run, forked from a server that has loaded torch and the rest: gloo, on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

from mortal import FORKS


def begin(processes: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start ``work``, a function of a module, in so many processes, the ranks of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        FORKS.Process(target=_live, args=(rank, processes, port, work, arguments), daemon=True)
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def live(processes: int, work: Callable[..., None], *arguments: Any, timeout: float = 200) -> None:
    """The same to its end, which must be a good one."""
    ranks = begin(processes, work, *arguments)
    for rank in ranks:
        rank.join(timeout)
    assert [rank.exitcode for rank in ranks] == [0] * processes


def _live(rank: int, processes: int, port: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import torch

    torch.set_num_threads(1)
    work(*arguments)
