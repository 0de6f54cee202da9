"""What the tokens of a score say: the values that a judge might have written in its place, and their probabilities."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

from grape.judge.reply import score_span
from grape.scale import Scale

Token = Sequence[tuple[str, float]]  # text and log-probability: the one that was written, then its alternatives


def tokens_of_score(reply: str, tokens: Sequence[Token]) -> list[tuple[int, Token]] | None:
    """The tokens of a whole reply that share a character with its score, each with where it begins.

    None where the reply states no score. The texts of the written tokens must make up the reply.
    """
    if (span := score_span(reply)) is None:
        return None
    found, start = [], 0
    for token in tokens:
        end = start + len(token[0][0])
        if start < span[1] and end > span[0]:
            found.append((start, token))
        start = end
    return found


def score_shares(reply: str, tokens: Sequence[tuple[int, Token]], scale: Scale) -> dict[float, float]:
    """The probability of each score in [0, 1] that the tokens tell of; they sum to 1.

    The score that was written has the product of its tokens' probabilities. Another one is known where it differs in
    one token: it has the probability of the tokens before, times that of the alternative. What is no answer on the
    scale (null, a bracket, half of a label that two labels begin with) is left out, and so is whatever the server did
    not list. A number is taken as if it ended with the alternative, but for a bare 0 on a scale from 0 to 1: that
    counts as the 0.5 in the middle of what it may become.
    """
    span = score_span(reply)
    assert span is not None, "the tokens of a score are those of a reply that states one"
    shares: dict[float, float] = defaultdict(float)
    written = scale.read(json.loads(reply[slice(*span)]))[0]
    before = 0.0
    for start, token in tokens:
        for text, logprob in token[1:]:
            other = (reply[:start] + text)[span[0] :]
            if not (reply[:start] + text).startswith(reply[: span[0]]):
                continue
            if (score := read_beginning(other, scale)) is not None:
                shares[score] += math.exp(before + logprob)
        before += token[0][1]
    shares[written] += math.exp(before)
    total = math.fsum(shares.values())
    return {score: share / total for score, share in shares.items()}


def read_beginning(text: str, scale: Scale) -> float | None:
    """The score that a reply goes on to state after the key, or has begun to; None where that cannot be told."""
    text = text.strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
        rest = text[end:].strip()
        if rest and rest[0] not in ",}":
            return None
        if not rest and scale.kind == "unit" and text == "0":
            return 0.5
        return scale.read(value)[0]
    except json.JSONDecodeError:
        if not text.startswith('"') or len(text) < 2 or '"' in text[1:]:
            return None
        begun = [label for label in scale.labels if label.casefold().startswith(text[1:].casefold())]
        return scale.read(begun[0])[0] if len(begun) == 1 and scale.kind != "likert" else None
    except (ValueError, TypeError, RecursionError):  # no answer on this scale
        return None
