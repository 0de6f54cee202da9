"""A judge at work: one response and one item in, one verdict out, whatever the judge does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from grape.errors import ConfigError, JudgeError
from grape.item import Item
from grape.judge.calibration import calibrated
from grape.judge.call import Call, CallRecord, Client, Purpose, call_key
from grape.judge.config import Judge
from grape.judge.memory import Memory, StoredOnly
from grape.judge.prompt import Prompt, fence, load_prompt, neutral
from grape.judge.reply import Reply, parse_prose, parse_reply, reply_schema
from grape.judge.spread import combined
from grape.judge.tokens import score_shares
from grape.judge.trail import Trail, joined, voted
from grape.types import Message, Outcome, Question, Response, Verdict

if TYPE_CHECKING:
    from grape.judge.jury import Jury

FIELDS = ("question", "response", "reference", "critique", "criterion", "scale", "confidence")
REPAIR_FIELDS = ("problem", "scale", "confidence")
# Failures that another model may not share; a dead server or an exhausted budget is not among them.
MODEL_DEPENDENT = {Outcome.UNPARSABLE, Outcome.REFUSED, Outcome.OUT_OF_RANGE, Outcome.TIMEOUT}


T = TypeVar("T")
Read = Callable[[CallRecord], T]  # raises JudgeError where the record holds no usable reply


class Critic:
    """One judge, with its client. For use on one event loop; `close` it, or enter it as a context.

    ``secret`` makes the marks around outside texts. ``record`` gets a row of `judge_calls` (but for its run) for every
    call that was made, before its reply is used. What ``memory`` has is not asked again; nor is, as long as this critic
    lives, what it was told itself. ``stored_only``: nobody is asked at all. ``fallback`` is asked where this judge
    fails in a way that depends on the model.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        secret: bytes,
        record: Callable[[dict[str, Any]], None],
        memory: Memory | None = None,
        stored_only: bool = False,
        fallback: Critic | Jury | None = None,
    ) -> None:
        self.judge = judge
        self.fallback = fallback
        self._secret = secret
        self._record = record
        self._memory = memory
        self._client: Client = StoredOnly() if stored_only and judge.client != "replay" else open_client(judge)
        self._model = judge.model_name
        self._sampling = judge.sampling.params()
        self._prompt = load_prompt(judge.prompt, FIELDS)
        self._repair_prompt = load_prompt("repair", REPAIR_FIELDS)
        self._critique_prompt = load_prompt("critique", FIELDS)
        self._critics: dict[str, Prompt] = {}
        self._known: dict[str, CallRecord] = {}
        self._under_way: dict[str, asyncio.Future[CallRecord | None]] = {}

    async def __aenter__(self) -> Critic:
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    @property
    def width(self) -> int:
        """How many calls it keeps busy."""
        return self.judge.concurrency * len(self.judge.endpoint or [None])

    async def reach(self) -> None:
        """`ConfigError` of one line where the judge, or its fallback, is not there or cannot give what is asked."""
        await self._client.reach(self._memory.endpoints(self._model) if self._memory else ())
        if self.fallback:
            await self.fallback.reach()

    async def close(self) -> None:
        """Close the connections, the fallback's too. Closing twice is allowed."""
        await self._client.close()
        if self.fallback:
            await self.fallback.close()

    def check(self, item: Item) -> None:
        """`ConfigError` where the prompts cannot serve this item: one is missing, or leaves out what is judged."""
        needs = ["response", "criterion"] + ["reference"] * item.reference + ["critique"] * bool(item.critique)
        _needs(self._prompt, needs, item)
        if item.critique:
            prompt = self._critic(item.critique)
            _needs(prompt if "user" in prompt.blocks else self._critique_prompt, ["response"], item)

    async def verdict(self, question: Question, response: Response, item: Item) -> Verdict:
        """The verdict of this judge, or of its fallback, on one item: a failure is an outcome and never raises.

        Raises `ConfigError` for an item that the prompts cannot serve, and whatever ``record`` raises.
        """
        if self._client.shown:
            self.check(item)
        if self.judge.confidence == "votes":
            votes = [self.sample(question, response, item, sample) for sample in range(self.judge.votes)]
            verdict = voted(await asyncio.gather(*votes), self.judge.aggregate, judge=self.judge.judge)
        else:
            verdict = await self.sample(question, response, item, 0)
        if self.fallback is not None and verdict.outcome in MODEL_DEPENDENT:
            return joined(verdict, await self.fallback.verdict(question, response, item))
        return calibrated(verdict, self.judge.calibration, question.category)

    async def sample(self, question: Question, response: Response, item: Item, sample: int) -> Verdict:
        """One reply of this judge as a verdict, not calibrated; its samples differ by their number."""
        trail = Trail(question, response, item, sample)
        try:
            reply = await self._judge(trail)
        except JudgeError as error:
            return trail.verdict(self.judge.judge, error.outcome, detail=str(error), reasoning=error.reasoning)
        return trail.verdict(
            self.judge.judge,
            Outcome.OK,
            score=reply.score,
            raw=reply.raw,
            confidence=reply.confidence,
            stated=reply.confidence,
            reasoning=reply.reasoning,
        )

    async def _judge(self, trail: Trail) -> Reply:
        """Critique if the item wants one, score, and one repair question for a reply that cannot be read."""
        values = self._values(trail) if self._client.shown else {}
        if trail.item.critique:
            critic = self._critic_messages(trail.item.critique, values) if values else ()
            call = self._call("critique", trail, critic)
            trail.critique = await self._ask(call, trail, _prose)
            if values:
                values["critique"] = fence("critique", trail.critique, self._secret)
        call = self._call("score", trail, self._prompt.messages(**values) if values else ())
        read = self._reader(trail.item, call.messages)
        try:
            return await self._ask(call, trail, read)
        except JudgeError as error:
            first = error
        repair = self._call("repair", trail, (*call.messages, *self._repair(trail, call, first)))
        if first.outcome is not Outcome.UNPARSABLE or not self._client.repairs(repair):
            raise first
        try:
            return await self._ask(repair, trail, read)
        except JudgeError as error:
            detail = f"{first}; after one repair question: {error}"
            raise JudgeError(error.outcome, detail, error.reasoning) from error

    def _values(self, trail: Trail) -> dict[str, Any]:
        """What the prompts are filled with: outside texts fenced, the reference only where the item wants it."""
        question, item = trail.question, trail.item
        if item.reference and question.reference is None:
            raise ConfigError(f"question {question.question_id!r} has no field 'reference'; item {item.id!r} needs it")
        return {
            "question": fence("question", question.prompt, self._secret),
            "response": fence("response", trail.response.text, self._secret),
            "reference": fence("reference", question.reference or "", self._secret) if item.reference else "",
            "critique": "",
            "criterion": neutral(item.criterion),
            "scale": item.scale.describe(),
            "confidence": self.judge.verbal,
        }

    def _critic(self, name: str) -> Prompt:
        if name not in self._critics:
            self._critics[name] = load_prompt(f"critique/{name}", FIELDS)
        return self._critics[name]

    def _critic_messages(self, name: str, values: Mapping[str, Any]) -> tuple[Message, ...]:
        """The critic's own system text, with the standard user text where its file has none."""
        prompt = self._critic(name)
        if "user" in prompt.blocks:
            return prompt.messages(**values)
        texts = {**self._critique_prompt.render(**values), **prompt.render(**values)}
        return tuple({"role": role, "content": texts[role]} for role in ("system", "user"))

    def _repair(self, trail: Trail, call: Call, error: JudgeError) -> tuple[Message, ...]:
        """The judge's own reply, and what is wrong with it in words of ours alone."""
        if not self._client.shown:
            return ()
        said = neutral(trail.calls[call.key].reply or "") or "(nothing)"
        values = {"problem": str(error), "scale": trail.item.scale.describe(), "confidence": self.judge.verbal}
        return ({"role": "assistant", "content": said}, *self._repair_prompt.messages(**values))

    def _reader(self, item: Item, messages: tuple[Message, ...]) -> Read[Reply]:
        shown = [message["content"] for message in messages]

        def read(record: CallRecord) -> Reply:
            reply = parse_reply(
                _said(record),
                item.scale,
                parser=self.judge.parser,
                verbal=self.judge.verbal,
                finish_reason=record.finish_reason,
                prompt=shown,
            )
            if self.judge.confidence != "logprob":
                return reply
            if record.tokens is None:
                raise JudgeError(Outcome.TRANSPORT, "the reply came without the probabilities of its tokens")
            shares = score_shares(_said(record), record.tokens, item.scale)
            score, confidence = combined(list(shares), list(shares.values()), self.judge.aggregate)
            return replace(reply, score=score, confidence=confidence)

        return read

    def _call(self, purpose: Purpose, trail: Trail, messages: tuple[Message, ...]) -> Call:
        subject = () if self._client.shown else (purpose, trail.response.response_id, trail.item.id)
        scored = purpose != "critique"
        schema = reply_schema(trail.item.scale, verbal=self.judge.verbal) if scored and self.judge.schemed else None
        form, sample, sampling = self.judge.form, trail.sample, self._sampling
        if sample and "seed" in sampling:
            sampling = {**sampling, "seed": sampling["seed"] + sample}  # or else all votes would be one
        return Call(
            key=call_key(self._model, sampling, messages, form=form, subject=subject, schema=schema, sample=sample),
            judge=self.judge.judge,
            model=self._model,
            purpose=purpose,
            messages=messages,
            sampling=sampling,
            response_id=trail.response.response_id,
            item=trail.item.id,
            sample=sample,
            schema=schema,
            logprobs=scored and self.judge.confidence == "logprob",
        )

    async def _ask(self, call: Call, trail: Trail, read: Read[T]) -> T:
        record = trail.calls[call.key] = await self._answer(call, read)
        return read(record)

    async def _answer(self, call: Call, read: Read[Any]) -> CallRecord:
        """The record of a call, made once: equal calls wait for the one that is under way, and share what it got."""
        while call.key not in self._known:
            if (pending := self._under_way.get(call.key)) is None:
                return await self._make(call, read)
            if (record := await asyncio.shield(pending)) is not None:
                return record
            # Whoever made it was cancelled: this one makes it.
        return self._known[call.key]

    async def _make(self, call: Call, read: Read[Any]) -> CallRecord:
        mine = self._under_way[call.key] = asyncio.get_running_loop().create_future()
        shared = None
        try:
            stored = await self._memory.recall(call.key) if self._memory else None
            if stored is not None:
                shared = self._known[call.key] = stored
                return stored
            record = await self._client.ask(call)
            try:
                read(record)
            except JudgeError as error:
                record = replace(record, outcome=error.outcome, detail=str(error))
            self._record(call.row(record))
            if record.answered:
                self._known[call.key] = record
            shared = record
            return record
        finally:
            del self._under_way[call.key]
            mine.set_result(shared)


def open_client(judge: Judge) -> Client:
    """The client that a judge's file names."""
    if judge.client == "replay":
        from grape.judge.replay import ReplayClient

        return ReplayClient(judge)
    if judge.client == "transformers":
        from grape.judge.local import LocalClient

        return LocalClient(judge)
    from grape.judge.openai import OpenAIClient  # loads the openai package, which takes a while

    return OpenAIClient(judge)


def _said(record: CallRecord) -> str:
    if record.reply is None:
        raise JudgeError(record.outcome, record.detail or str(record.outcome))
    return record.reply


def _prose(record: CallRecord) -> str:
    """A critique: prose, so anything but nothing or a refusal will do."""
    return parse_prose(_said(record), finish_reason=record.finish_reason)


def _needs(prompt: Prompt, names: list[str], item: Item) -> None:
    if missing := [name for name in names if name not in prompt.fields]:
        raise ConfigError(f"{prompt.source}: never shows {missing[0]!r}, which item {item.id!r} needs")
