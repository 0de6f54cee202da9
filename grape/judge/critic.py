"""A judge at work: one response and one item in, one verdict out, whatever the judge does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grape.errors import JudgeError
from grape.item import Item
from grape.judge.calibration import calibrated
from grape.judge.call import PROSE, Call, CallRecord, Purpose, call_key
from grape.judge.client import Client, open_client
from grape.judge.config import Judge
from grape.judge.limits import Meter
from grape.judge.memory import Memory, StoredOnly
from grape.judge.once import Once, Read, T
from grape.judge.reply import Reply, parse_prose, parse_reply, parse_revision, parse_whole, reply_schema, whole_schema
from grape.judge.spread import combined
from grape.judge.tokens import score_shares
from grape.judge.trail import Trail, joined, took, voted
from grape.judge.wording import Wording
from grape.types import Message, Outcome, Question, Response, Verdict

if TYPE_CHECKING:
    from grape.judge.jury import Jury

Messages = tuple[Message, ...]
Mark = Callable[[str, str], str]  # what a text is called, and the text: the text between its marks
# Failures that another model may not share; a dead server or an exhausted budget is not among them.
MODEL_DEPENDENT = {Outcome.UNPARSABLE, Outcome.REFUSED, Outcome.OUT_OF_RANGE, Outcome.TIMEOUT}


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
        self._memory = memory
        self.meter = Meter(judge, memory.spent(judge.judge) if memory and judge.budget else (0, 0.0))
        stored = stored_only and judge.client != "replay"
        self._client: Client = StoredOnly() if stored else open_client(judge, self.meter)
        self._once = Once(self._client, record, memory)
        self._model = judge.model_name
        self._sampling = judge.sampling.params()
        self._wording = Wording(judge, secret)

    async def __aenter__(self) -> Critic:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    @property
    def width(self) -> int:
        """How many calls it keeps busy."""
        endpoints = [endpoint.concurrency for endpoint in self.judge.endpoint or []] or [None]
        return sum(own or self.judge.concurrency for own in endpoints)

    async def reach(self) -> None:
        """`ConfigError` of one line where the judge, or its fallback, is not there or cannot give what is asked."""
        tokens = self.judge.confidence == "logprob"
        await self._client.reach(self._memory.endpoints(self._model, tokens=tokens) if self._memory else ())
        if self.fallback:
            await self.fallback.reach()

    async def close(self) -> None:
        """Close the connections, the fallback's too. Closing twice is allowed."""
        await self._client.close()
        if self.fallback:
            await self.fallback.close()

    def check(self, item: Item) -> None:
        """`ConfigError` where the prompts cannot serve this item: one is missing, or leaves out what is judged."""
        self._wording.check(item)

    async def verdicts(self, question: Question, response: Response, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item: of one call for all, where the judge is asked about items `together`.

        Items with a critique are asked about alone; so are those that see the reference and those that do not.
        """
        if not self.judge.together:
            return list(await asyncio.gather(*(self.verdict(question, response, item) for item in items)))
        alone = [self.verdict(question, response, item) for item in items if item.critique]
        rest = [[one for one in items if not one.critique and one.reference is seen] for seen in (False, True)]
        calls = [self._asked_together(question, response, few) for few in rest if few]
        told, *together = await asyncio.gather(asyncio.gather(*alone), *calls)
        found = {verdict.item: verdict for some in (told, *together) for verdict in some}
        return [found[item.id] for item in items]

    async def _alone_after(self, first: Verdict, question: Question, response: Response, item: Item) -> Verdict:
        """The verdict on an item about which a reply on all of them could not be read, with what that call took."""
        verdict = await self.verdict(question, response, item)
        return replace(verdict, **took([first, verdict]))

    async def _asked_together(self, question: Question, response: Response, items: Sequence[Item]) -> list[Verdict]:
        """One call; an item about which the reply cannot be read is asked about alone."""
        for item in items:
            self.check(item)
        trail = Trail(question, response, items[0])
        try:
            replies: Mapping[str, Reply | JudgeError] = await self._whole(trail, items)
        except JudgeError as error:
            replies = {item.id: error for item in items}
        verdicts = []
        for place, item in enumerate(items):
            verdict = self._given(trail.about(item, first=place == 0), replies[item.id])
            unread = verdict.outcome is Outcome.UNPARSABLE
            verdicts.append(
                self._alone_after(verdict, question, response, item)
                if unread
                else self._settled(question, verdict, response, item)
            )
        return list(await asyncio.gather(*verdicts))

    async def verdict(
        self, question: Question, response: Response, item: Item, other: Response | None = None
    ) -> Verdict:
        """The verdict of this judge, or of its fallback, on one item: a failure is an outcome and never raises.

        With an ``other`` response it is on whether the first is the better one by that item (`grape.judge.pair`).
        Raises `ConfigError` for an item that the prompts cannot serve, and whatever ``record`` raises.
        """
        if self._client.shown:
            self.check(item)
        if self.judge.confidence == "votes":
            votes = [self.sample(question, response, item, sample, other) for sample in range(self.judge.votes)]
            verdict = voted(await asyncio.gather(*votes), self.judge.aggregate, judge=self.judge.judge)
        else:
            verdict = await self.sample(question, response, item, 0, other)
        return await self._settled(question, verdict, response, item, other)

    async def _settled(
        self, question: Question, verdict: Verdict, response: Response, item: Item, other: Response | None = None
    ) -> Verdict:
        """The verdict, calibrated; the fallback's where this judge failed in a way that depends on the model."""
        if self.fallback is not None and verdict.outcome in MODEL_DEPENDENT:
            return joined(verdict, await self.fallback.verdict(question, response, item, other))
        return calibrated(verdict, self.judge.calibration, question.category)

    async def sample(
        self, question: Question, response: Response, item: Item, sample: int, other: Response | None = None
    ) -> Verdict:
        """One reply of this judge as a verdict, not calibrated; its samples differ by their number."""
        trail = Trail(question, response, item, sample, other)
        try:
            return self._given(trail, await self._judge(trail))
        except JudgeError as error:
            return self._given(trail, error)

    async def prose(
        self, purpose: Purpose, question: Question, response: Response, item: Item, messages: Callable[[Mark], Messages]
    ) -> str:
        """A critique or a revision of a response, in words alone; `JudgeError` where there is none. ``messages`` are
        made with this judge's marks."""
        trail, parse = Trail(question, response, item), parse_prose if purpose == "critique" else parse_revision
        call = self._call(purpose, trail, messages(self._wording.mark) if self._client.shown else ())
        try:
            return await self._ask(call, trail, _words(parse))
        except JudgeError as error:
            if isinstance(self.fallback, Critic) and error.outcome in MODEL_DEPENDENT:
                return await self.fallback.prose(purpose, question, response, item, messages)
            raise

    def _given(self, trail: Trail, reply: Reply | JudgeError) -> Verdict:
        """What the judge gave, as a verdict that is not calibrated."""
        if isinstance(reply, JudgeError):
            return trail.verdict(self.judge.judge, reply.outcome, detail=str(reply), reasoning=reply.reasoning)
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
        about, shown = (trail.question, trail.response, trail.item), self._client.shown
        if trail.item.critique:
            call = self._call("critique", trail, self._wording.critique(*about) if shown else ())
            trail.critique = await self._ask(call, trail, _words(parse_prose))
        call = self._call("score", trail, self._asked(trail) if shown else ())
        read = self._reader(trail.item, call.messages)
        try:
            return await self._ask(call, trail, read)
        except JudgeError as error:
            first = error
        asked = (trail.calls[call.key].reply or "", str(first), trail.item.scale.describe())
        more = self._wording.repair(*asked) if shown else ()
        repair = self._call("repair", trail, (*call.messages, *more))
        if first.outcome is not Outcome.UNPARSABLE or not self._client.repairs(repair):
            raise first
        try:
            return await self._ask(repair, trail, read)
        except JudgeError as error:
            detail = f"{first}; after one repair question: {error}"
            raise JudgeError(error.outcome, detail, error.reasoning) from error

    def _asked(self, trail: Trail) -> tuple[Message, ...]:
        """The question about one response, or about which of two is better."""
        if trail.other is not None:
            return self._wording.pair(trail.question, trail.response, trail.other, trail.item)
        return self._wording.score(trail.question, trail.response, trail.item, trail.critique)

    async def _whole(self, trail: Trail, items: Sequence[Item]) -> Mapping[str, Reply | JudgeError]:
        """One question about several items."""
        messages = self._wording.whole(trail.question, trail.response, items)
        scales, shown = {item.id: item.scale for item in items}, [message["content"] for message in messages]
        verbal = self.judge.verbal

        def read(record: CallRecord) -> Mapping[str, Reply | JudgeError]:
            end = record.finish_reason
            return parse_whole(_said(record), scales, verbal=verbal, finish_reason=end, prompt=shown)

        call = self._call("score", trail, messages, schema=whole_schema(scales, verbal=verbal))
        return await self._ask(replace(call, item=", ".join(scales)), trail, read)

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

    def _call(
        self, purpose: Purpose, trail: Trail, messages: tuple[Message, ...], schema: Mapping[str, Any] | None = None
    ) -> Call:
        named = " ".join(one.response_id for one in (trail.response, trail.other) if one)
        subject = () if self._client.shown else (purpose, named, trail.item.id)
        scored = purpose not in PROSE
        schema = schema or reply_schema(trail.item.scale, verbal=self.judge.verbal)
        schema = schema if scored and self.judge.schemed else None
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
            response_id=named,
            item=trail.item.id,
            sample=sample,
            schema=schema,
            logprobs=scored and self.judge.confidence == "logprob",
        )

    async def _ask(self, call: Call, trail: Trail, read: Read[T]) -> T:
        trail.calls[call.key], found = await self._once.answer(call, read)
        if isinstance(found, JudgeError):
            raise found
        return read(trail.calls[call.key]) if found is None else found


def _said(record: CallRecord) -> str:
    if record.reply is None:
        raise JudgeError(record.outcome, record.detail or str(record.outcome))
    return record.reply


def _words(parse: Callable[..., str]) -> Read[str]:
    """Prose, and no verdict."""
    return lambda record: parse(_said(record), finish_reason=record.finish_reason)
