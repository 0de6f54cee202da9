"""Dialogues written as one text, "Human: ..." and "Assistant: ..." in turn: the form of the HH data."""

from __future__ import annotations

import re
from itertools import pairwise

from grape.errors import ConfigError
from grape.types import Message

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TRANSCRIPT = re.compile(r"\r?\n\r?\n(Human|Assistant):")
OPEN = re.compile(r"\r?\n\r?\nAssistant:\s*\Z")  # a transcript's last turn, where the response begins


def transcript(place: str, name: str, text: str) -> list[Message]:
    """The turns of a text such as "\\n\\nHuman: ...\\n\\nAssistant: ..."; none where it is no such text.

    ``name`` is the row's field, for messages.
    """
    head, *parts = TRANSCRIPT.split(text if text.startswith("\n\n") else f"\n\n{text}")
    turns = [
        {"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if head.strip():
        return []
    for before, turn in pairwise(turns):
        if before["role"] == turn["role"]:
            raise ConfigError(f"{place}: {name}: two turns of the {turn['role']} follow one another")
    if empty := next((turn["role"] for turn in turns if not turn["content"]), None):
        raise ConfigError(f"{place}: {name}: a turn of the {empty} has no text")
    return turns
