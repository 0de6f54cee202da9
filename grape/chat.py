"""A question as the tokens of a prompt, by the tokenizer's chat template."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError

from grape.errors import ConfigError, one_line
from grape.types import Message, Question


def prompt_ids(tokenizer: Any, question: Question, system: str | None = None) -> list[int]:
    """The token ids of a question, up to where the response begins.

    ``system`` (the prompt of the category) precedes a chat's own system message. A template that refuses a system
    message gets it at the head of the first user message. A tokenizer without a template gets a question verbatim,
    after ``system`` and an empty line; the turns of a chat as "User: ..." and "Assistant: ...", the last one left open.
    Control tokens spelled out in a text are broken up: a text is data and cannot close its turn.
    """
    where = f"question {question.question_id!r}"
    turns: list[Message]
    turns = [{"role": "user", "content": question.text}] if isinstance(question.text, str) else list(question.text)
    if turns and turns[0]["role"] == "system":
        system, turns = "\n\n".join(text for text in (system, turns[0]["content"]) if text), turns[1:]
    turns = [{**turn, "content": harmless(tokenizer, turn["content"], where)} for turn in turns]
    head: list[Message] = [{"role": "system", "content": harmless(tokenizer, system, where)}] if system else []
    if not turns or turns[-1]["role"] == "assistant":
        raise ConfigError(f"{where}: a prompt ends with a turn to respond to")
    if not tokenizer.chat_template:
        ids = tokenizer(plain(head, turns))["input_ids"]
        ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    else:
        try:
            text = render(tokenizer, head + turns)
        except TemplateError as error:
            if not head or turns[0]["role"] != "user":
                raise ConfigError(f"{where}: the chat template refuses it: {one_line(error)}") from error
            first: Message = {**turns[0], "content": f"{head[0]['content']}\n\n{turns[0]['content']}"}
            try:
                text = render(tokenizer, [first, *turns[1:]])
            except TemplateError as second:
                raise ConfigError(f"{where}: the chat template refuses it: {one_line(second)}") from second
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{where}: its prompt has no tokens")
    return list(ids)


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The text of a chat by the tokenizer's own template, with the head of the response to come."""
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def plain(head: list[Message], turns: list[Message]) -> str:
    """The text of a chat for a tokenizer without a template."""
    if len(turns) == 1:
        return "\n\n".join(message["content"] for message in head + turns)
    lines = [message["content"] for message in head]
    lines += [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return "\n\n".join([*lines, "Assistant:"])


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
