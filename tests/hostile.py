"""Judges that do what a response makes them do: they repeat it in every way, or fail on words in it."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable

from loopback import Answer, verdict

SHOWN = re.compile(r"<<<response (\w+)>>>\n(.*?)\n<<<end response \1>>>", re.DOTALL)
OWN_SCORE, OWN_CONFIDENCE, OWN_REASONING = 0.25, 0.75, "I read the text and found little in it."
OWN = verdict(OWN_SCORE, OWN_CONFIDENCE, OWN_REASONING)
KEYS = ("reasoning", "score", "confidence")


def response_in(prompt: str) -> str:
    """The response that a prompt shows."""
    found = SHOWN.search(prompt)
    assert found is not None
    return found[2]


def objects(text: str) -> list[str]:
    """Every JSON object that stands in a text, by where it begins."""
    found, place = [], text.find("{")
    while place >= 0 and len(found) < 20:
        try:
            _, end = json.JSONDecoder(strict=False).raw_decode(text, place)
            found.append(text[place:end])
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", max(end, place + 1)) if len(text) < 20_000 else -1
    return found


def dumped(text: str) -> str:
    """The last object that can be read somehow, written anew with the keys of a verdict."""
    for form in (text, unseen(text), unicodedata.normalize("NFKC", text), unescaped(text), text.lower()):
        for part in reversed(objects(form) + re.findall(r"\{.*\}", form[:20_000], re.DOTALL)):
            for read in (lambda part: json.loads(part, strict=False), ast.literal_eval):
                try:
                    data = read(part)
                    low = {str(key).lower(): value for key, value in data.items()}
                    return json.dumps({key: low[key] for key in KEYS}, ensure_ascii=False)
                except (ValueError, SyntaxError, AttributeError, KeyError, RecursionError, MemoryError, TypeError):
                    continue
    return from_lines(text)


def from_lines(text: str) -> str:
    """`key: value` lines made an object."""
    found = {key: re.search(rf"(?im)^[^\w\n]{{0,9}}{key}[^\w\n]{{1,9}}?(\S.*?),?$", text[:20_000]) for key in KEYS}
    try:
        return (
            json.dumps({key: json.loads(match[1]) for key, match in found.items() if match})
            if all(found.values())
            else OWN
        )
    except ValueError:
        return OWN


def unseen(text: str) -> str:
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf")


def unescaped(text: str) -> str:
    """Without one layer of escapes."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    return text.replace('\\"', '"').replace("\\\\", "\\").replace("\\n", "\n")


def completed(text: str) -> str:
    """A judge that quotes the response in its reasoning without escapes, and ends with the first object."""
    for lead in ('{"reasoning": "', '{"reasoning": "The response says: ', '{"reasoning": "It claims '):
        try:
            data, end = json.JSONDecoder(strict=False).raw_decode(lead + text)
            return (lead + text)[:end] if isinstance(data, dict) and set(data) == set(KEYS) else OWN
        except (ValueError, RecursionError):
            continue
    return OWN


def mixed(text: str) -> str:
    """The response's reasoning, cut short or led in, with its score, under a confidence of the judge's own."""
    try:
        data = json.loads(dumped(text))
        said = data["reasoning"]
        part = said[: len(said) // 2] if len(said) > 60 else said
        lead = "I agree: " if len(part) > 30 and len(text) % 2 else ""
        return json.dumps({**data, "reasoning": lead + part, "confidence": 0.6})
    except (ValueError, TypeError):
        return OWN


ECHOES: dict[str, Callable[[str], str]] = {
    "the whole": lambda text: text,
    "the whole in a fence": lambda text: f"```json\n{text}\n```",
    "the whole behind a thought": lambda text: f"<think>Hm.</think>\n{text}",
    "the whole in a thought": lambda text: f"<think>{text}</think>{OWN}",
    "its verdict before the whole": lambda text: f"{OWN}\n{text}",
    "its verdict behind the whole": lambda text: f"{text}\n{OWN}",
    "the first object": lambda text: (objects(text) or [OWN])[0],
    "the last object": lambda text: (objects(text) or [OWN])[-1],
    "the last object in a fence": lambda text: f"```\n{(objects(text) or [OWN])[-1]}\n```",
    "the last object in a thought": lambda text: f"<think>{(objects(text) or [OWN])[-1]}</think>{OWN}",
    "an object written anew": dumped,
    "an object written anew, unescaped": lambda text: dumped(unescaped(unescaped(text))),
    "the last line": lambda text: text.rstrip().rpartition("\n")[2],
    "quoted, escaped": lambda text: verdict(OWN_SCORE, OWN_CONFIDENCE, text),
    "quoted, not escaped": lambda text: (
        f'{{"reasoning": "{text}", "score": {OWN_SCORE}, "confidence": {OWN_CONFIDENCE}}}'
    ),
    "quoted, and stopped at the first object": completed,
    "as its score": lambda text: verdict(text, OWN_CONFIDENCE, OWN_REASONING),
    "as its confidence": lambda text: verdict(OWN_SCORE, text, OWN_REASONING),
    "parts of a verdict": mixed,
}
FAILURES: dict[str, Answer] = {
    "REFUSE-ME": Answer(text="I'm sorry, but I can't help with that."),
    "FILTER-ME": Answer(text="", finish_reason="content_filter"),
    "TIME-ME-OUT": Answer(hang=True),
    "BREAK-YOUR-JSON": Answer(text='{"reasoning": "the text says "'),
    "SAY-NOTHING": Answer(text=""),
    "FAIL-ME": Answer(status=500),
    "HANG-UP": Answer(cut=True),
    "OFF-SCALE": Answer(text=verdict(97)),
}


def failing(text: str) -> Answer | str:
    """A judge that fails on a trigger in the response, and else gives its own verdict."""
    return next((answer for word, answer in FAILURES.items() if word in text), OWN)
