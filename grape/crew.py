"""Pieces of work done several at a time, in order, until somebody says stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Work = TypeVar("Work")
Done = TypeVar("Done")
Progress = Callable[[int, int], None]  # pieces done, pieces in all


async def all_done(
    work: Sequence[Work],
    do: Callable[[Work], Awaitable[Done]],
    width: int,
    *,
    stop: Callable[[], object] = lambda: False,
    progress: Progress | None = None,
) -> list[Done | None]:
    """What became of each piece, in the order given, with ``width`` of them in hand at a time.

    Once ``stop`` says so no piece is begun: it stays None. The first error ends all of it.
    """
    results: dict[int, Done] = {}
    places = iter(range(len(work)))

    async def worker() -> None:
        for place in places:
            if stop():
                break
            results[place] = await do(work[place])
            if progress:
                progress(len(results), len(work))

    tasks = [asyncio.create_task(worker()) for _ in range(min(width, len(work)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results.get(place) for place in range(len(work))]
