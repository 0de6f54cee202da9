"""A chat as tokens, by the tokenizer's template: the prompt of a question, or a judge's messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from grape.errors import ConfigError, one_line
from grape.types import Message, Question


def prompt_ids(tokenizer: Any, question: Question, system: str | None = None) -> list[int]:
    """The token ids of a question, up to where the response begins.

    ``system`` (the prompt of the category) precedes a chat's own system message.
    """
    where, turns = f"question {question.question_id!r}", turns_of(question)
    if turns and turns[0]["role"] == "system":
        system, turns = "\n\n".join(text for text in (system, turns[0]["content"]) if text), turns[1:]
    if not turns or turns[-1]["role"] == "assistant":
        raise ConfigError(f"{where}: a prompt ends with a turn to respond to")
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    return chat_ids(tokenizer, head + turns, where)


def turns_of(question: Question) -> list[Message]:
    """The messages of a question."""
    return [{"role": "user", "content": question.text}] if isinstance(question.text, str) else list(question.text)


def answer_ids(tokenizer: Any, text: str, where: str) -> tuple[int, ...]:
    """The token ids of a response that has ended."""
    ids = tokenizer(harmless(tokenizer, text, where), add_special_tokens=False)["input_ids"]
    return (*ids, tokenizer.eos_token_id)


def chat_ids(tokenizer: Any, messages: Sequence[Message], where: str, *, complete: bool = False) -> list[int]:
    """The token ids of a chat, up to where the next response begins; with ``complete``, up to its end.

    A template that refuses a system message gets it at the head of the first user message. A tokenizer without a
    template gets a question verbatim, after the system message and an empty line (and before its response, where there
    is one); the turns of a longer chat as "User: ..." and "Assistant: ...", the last one left open. Control tokens
    spelled out in a text are broken up: a text is data and cannot close its turn.
    """
    messages = [{**message, "content": harmless(tokenizer, message["content"], where)} for message in messages]
    if tokenizer.chat_template:
        ids = tokenizer(templated(tokenizer, messages, where, complete), add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(plain(messages, complete))["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not complete else ids
    if not ids:
        raise ConfigError(f"{where}: its prompt has no tokens")
    return list(ids)


def templated(tokenizer: Any, messages: list[Message], where: str, complete: bool) -> str:
    """The text of a chat by the tokenizer's own template."""
    try:
        return render(tokenizer, messages, complete)
    except TemplateError as error:
        if messages[0]["role"] != "system" or len(messages) < 2 or messages[1]["role"] != "user":
            raise ConfigError(f"{where}: the chat template refuses it: {one_line(error)}") from error
    head, first, *rest = messages
    joined: Message = {**first, "content": f"{head['content']}\n\n{first['content']}"}
    try:
        return render(tokenizer, [joined, *rest], complete)
    except TemplateError as error:
        raise ConfigError(f"{where}: the chat template refuses it: {one_line(error)}") from error


def render(tokenizer: Any, messages: list[Message], complete: bool) -> str:
    """One attempt at a template; where the chat is not ``complete``, with the head of the response to come."""
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=not complete, tokenize=False))


def plain(messages: list[Message], complete: bool) -> str:
    """The text of a chat for a tokenizer without a template."""
    number = int(messages[0]["role"] == "system")
    head, turns = [message["content"] for message in messages[:number]], messages[number:]
    if len(turns) == 1 + complete:
        return "\n\n".join([*head, *(turn["content"] for turn in turns)])
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n\n".join([*head, *lines, *(() if complete else ("Assistant:",))])


def harmless(tokenizer: Any, text: str, where: str) -> str:
    """``text`` with a zero-width space inside whatever would be read as a control token."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: not Unicode text (position {error.start})") from error
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    marks = sorted((mark for mark in special if mark), key=len, reverse=True)
    if not marks:
        return text
    pattern = re.compile("|".join(map(re.escape, marks)))
    return pattern.sub(lambda mark: f"{mark[0][0]}\u200b{mark[0][1:]}" if len(mark[0]) > 1 else "", text)
