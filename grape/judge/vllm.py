"""A judge's model in vLLM, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grape.judge.call import Call
from grape.judge.config import Judge
from grape.judge.local import LIKELIEST, seed_of

if TYPE_CHECKING:
    from grape.rollout import Rollout


class Vllm:
    """A `Decoder` by vLLM: constrained to the call's JSON schema, all waiting calls decoded together."""

    def __init__(self, judge: Judge, model: str, where: str) -> None:
        from grape.engine import Engine
        from grape.policy import folder_of

        own = judge.sampling.params()
        extra = own.pop("extra_body", {})
        self._own = {**own, **extra}
        folder = folder_of(model, where=where)
        self._engine = Engine(folder, dtype=judge.dtype, where=where, likeliest=LIKELIEST, options=judge.engine)
        self._engine.check(self._own, f"{where}: sampling")
        self.tokenizer: Any = self._engine.tokenizer
        self.room: float = self._engine.room

    def decode(self, prompts: list[list[int]], calls: Sequence[Call]) -> list[Rollout]:
        """The replies, each drawn from a seed that its call decides."""
        from vllm.sampling_params import StructuredOutputsParams

        settings = [
            {
                **self._own,
                "seed": seed_of(call),
                "structured_outputs": StructuredOutputsParams(json=dict(call.schema)) if call.schema else None,
            }
            for call in calls
        ]
        replies: dict[int, Rollout] = {}
        self._engine.sample(prompts, settings, (), replies.__setitem__)
        return [replies[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Let go of the model."""
        self._engine.close()
