"""What SFT is taught after the rounds of critique and revision: rows, and the run that learns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grape.chat import turns_of
from grape.lessons import read_lessons
from grape.output import MESSAGES, TEXT
from grape.phases import ConstitutionRun, SupervisedConfig
from grape.plan import Plan
from grape.principles import principles
from grape.recipes import ChatDataConfig, SftRun
from grape.records import Record
from grape.revision import Chain
from grape.types import Message

COLUMNS = {"question_id": TEXT, "category": TEXT, "messages": MESSAGES, "response_id": TEXT}


def taught(chains: Sequence[Chain], system: Callable[[Plan], str | None], *, whole: bool) -> list[Record]:
    """The last revisions, and what the policy said where no principle holds (but not what is cut, where responses have
    to be ``whole``); each under the system prompt that it was drawn under."""
    return [
        {
            "question_id": chain.plan.question.question_id,
            "category": chain.plan.question.category,
            "messages": [*_under(system(chain.plan), chain.plan), {"role": "assistant", "content": chain.text}],
            "response_id": chain.response_id,
        }
        for chain in chains
        if chain.text.strip() and (chain.round or not (principles(chain.plan) or (whole and chain.cut)))
    ]


def _under(system: str | None, plan: Plan) -> list[Message]:
    """A question as a response to it is drawn: the category's system prompt precedes a chat's own."""
    turns = turns_of(plan.question)
    if not system:
        return turns
    if turns and turns[0]["role"] == "system":
        system, turns = f"{system}\n\n{turns[0]['content']}", turns[1:]
    return [{"role": "system", "content": system}, *turns]


def mixed(supervised: SupervisedConfig) -> list[Record]:
    """The rows of `supervised.mix`."""
    return [
        {
            "question_id": f"mix-{one.group}",
            "category": None,
            "messages": [*one.prompt, {"role": "assistant", "content": one.responses[0]}],
            "response_id": None,
        }
        for one in (read_lessons(supervised.mix, "chats").lessons if supervised.mix else ())
    ]


def sft_run(config: ConstitutionRun, file: Path, **shared: Any) -> SftRun:
    """The run of `grape sft`. A revision that a judge made too long for the policy is left out, and said."""
    supervised = config.supervised
    assert supervised is not None, "the phase is asked for"
    mix = supervised.mix
    return SftRun(
        policy=config.policy.model_copy(update={"shard": False}),
        data=ChatDataConfig(path=str(file), bad_rows="skip", max_tokens=mix.max_tokens if mix else None),
        loss=supervised.loss,
        optimizer=supervised.optimizer,
        heldout=supervised.heldout,
        **shared,
    )
