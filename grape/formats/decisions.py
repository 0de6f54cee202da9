"""What a source leaves open and only its user can say: whether a pitfall is good or bad when met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grape.errors import ConfigError, known, one_line
from grape.formats.keep import Place
from grape.resources import read_yaml

POLARITIES = ("desirable", "undesirable")
LISTED = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """The user's answers by title or prefix, and a list of the questions that they leave open.

    ``trusted`` answers every question: the polarity that an object says it has.
    """

    known: Mapping[str, Any] = field(default_factory=dict)
    trusted: str | None = None
    undecided: list[str] = field(default_factory=list)

    def trust(self, polarity: Any) -> Decisions:
        """These decisions, for an object that says itself which polarity it has."""
        return replace(self, trusted=str(polarity)) if polarity in POLARITIES else self

    def polarity(self, place: Place, *labels: str) -> str | None:
        """The polarity for the longest key that is one of the labels or begins it; None is noted as undecided."""
        if self.trusted is not None:
            return self.trusted
        answers = [
            (len(key), answer)
            for key, answer in self.known.items()
            if answer in POLARITIES and any(label.casefold().startswith(key.casefold()) for label in labels)
        ]
        if answers:
            return str(max(answers)[1])
        self.note(place, one_line(" | ".join(label for label in labels if label), 120))
        return None

    def scores(self, name: str) -> Mapping[str, Any] | None:
        """What each choice of a grader is worth."""
        answer = self.known.get(name)
        return answer if isinstance(answer, Mapping) else None

    def note(self, place: Place, what: str) -> None:
        """Leave a question open."""
        self.undecided.append(str(place.fail(what)))

    def check(self, file: str) -> None:
        """Refuse to go on while a question is open: one line, and the list."""
        if not self.undecided:
            return
        listed = [line.removeprefix(f"{file}: ") for line in self.undecided[:LISTED]]
        if more := len(self.undecided) - len(listed):
            listed.append(f"and {more} more")
        raise ConfigError(
            f"{file}: {len(self.undecided)} undecided; the source does not say whether they are good or bad when met "
            "(or what their choices are worth), so give a file of answers, "
            "`title or prefix: desirable | undesirable`:\n  " + "\n  ".join(listed)
        )


def read_decisions(answers: str | Path | Mapping[str, Any] | None) -> Decisions:
    """Decisions from a YAML or JSON file or a mapping, strictly."""
    where = "polarity" if answers is None or isinstance(answers, Mapping) else str(answers)
    data = read_yaml(where) if isinstance(answers, str | Path) else dict(answers or {})
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: a mapping of title or prefix to {' or '.join(POLARITIES)} is meant")
    for key, answer in data.items():
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {key!r}: a title or prefix is meant")
        if not isinstance(answer, Mapping) and answer not in POLARITIES:
            raise ConfigError(f"{where}: {key}: {one_line(repr(answer), 60)} is no polarity; {known(POLARITIES)}")
    return Decisions(known=data)
