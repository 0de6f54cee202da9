"""A reward model at work: a sequence classifier with one logit, whose value is the score of a response."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

from grape.chat import chat_ids, turns_of
from grape.errors import ConfigError, GrapeError, JudgeError, one_line
from grape.item import Item
from grape.judge.local import LOADING, need_torch
from grape.judge.prompt import well_formed
from grape.types import Message, Outcome, Question, Response, Verdict


class RewardModel:
    """The model of a folder or hub name, loaded once by `reach` or the first response; `close` lets it go.

    It reads the question and the response as one chat, by its own template, one response at a time: a value does not
    depend on what else is asked. Safetensors only, and no code of the model's author is run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grape-reward-model")
        self._loaded: tuple[Any, Any] | None = None

    async def reach(self) -> None:
        """Load the model; `ConfigError` of one line where that cannot be."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    async def close(self) -> None:
        """Let go of the model. Closing twice is allowed."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._loaded = None

    async def verdict(self, question: Question, response: Response, item: Item) -> Verdict:
        """The verdict on one response: a value that cannot be had, or is no number, is an outcome without a score."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._judge, question, response, item)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            where = f"reward_model: {self.name}"
            need_torch(where)
            with LOADING:
                self._loaded = read_classifier(self.name, where)
        return self._loaded

    def _judge(self, question: Question, response: Response, item: Item) -> Verdict:
        model, tokenizer = self._load()
        start = perf_counter()
        try:
            value = self._value(model, tokenizer, question, response)
        except JudgeError as error:
            seconds = perf_counter() - start
            return Verdict(item=item.id, outcome=error.outcome, detail=str(error), latency=seconds)
        said = f"The reward model {self.name} gave {value:.4g}"
        score = value
        if not item.raw:
            mean, std = (item.calibrate.mean, item.calibrate.std) if item.calibrate else (0.0, 1.0)
            score = (1 + math.tanh((value - mean) / std / 2)) / 2  # the sigmoid, which never overflows
            said += f", calibrated {score:.4g}"
        return Verdict(
            item=item.id,
            outcome=Outcome.OK,
            score=score,
            raw=repr(value),
            confidence=item.confidence,
            reasoning=f"{said}.",
            latency=perf_counter() - start,
        )

    def _value(self, model: Any, tokenizer: Any, question: Question, response: Response) -> float:
        import torch

        answer: Message = {"role": "assistant", "content": well_formed(response.text)}
        try:
            ids = chat_ids(tokenizer, [*turns_of(question), answer], f"reward model {self.name}", complete=True)
        except GrapeError as error:  # a template that refuses this chat
            raise JudgeError(Outcome.TRANSPORT, str(error)) from error
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if len(ids) > room:
            raise JudgeError(Outcome.TRANSPORT, f"a chat of {len(ids)} tokens exceeds {room} positions")
        ids_1T = torch.tensor([ids], device=model.device)
        try:
            with torch.no_grad():
                value = float(model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0, 0])
        except torch.OutOfMemoryError as error:
            raise JudgeError(Outcome.TRANSPORT, one_line(error)) from error
        if not math.isfinite(value):
            raise JudgeError(Outcome.OUT_OF_RANGE, f"the reward model's value is {value}")
        return value


def read_classifier(name: str, where: str) -> tuple[Any, Any]:
    """The classifier of a folder or hub name, in the precision that it was saved in, and its tokenizer."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from grape.policy import folder_of

    folder = folder_of(name, where="reward_model")
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{where}: has adapters; merge them into its weights")
    read: Any = AutoModelForSequenceClassification.from_pretrained
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        model, info = read(str(folder), dtype="auto", use_safetensors=True, output_loading_info=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **safe)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(f"{where}: no sequence classifier with a tokenizer: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{where}: weights are missing: {one_line(', '.join(missing), 120)}")
    if model.config.num_labels != 1:
        raise ConfigError(f"{where}: has {model.config.num_labels} labels; a reward model has one")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
