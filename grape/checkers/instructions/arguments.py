"""The arguments of instructions: under IFEval's names, and refused at load where IFEval would draw a random one."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from grape.checkers.instructions.language import languages
from grape.errors import known

WORD = r"\b{}\b"
SECTION = r"\s?{}\s?\d+\s?"


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("needs text")
    return value


def _one_character(value: str) -> str:
    if len(value.strip()) != 1 or len(value) != 1:
        raise ValueError("needs a single character that is not a space")
    return value


def _detectable(value: str) -> str:
    if value not in languages():
        raise ValueError(f"no language that can be detected; {known(languages())}")
    return value


def _among(value: int, info: ValidationInfo) -> int:
    if value > info.data.get("num_paragraphs", value):
        raise ValueError(f"there are only {info.data['num_paragraphs']} paragraphs")
    return value


def _compiles(frame: str) -> AfterValidator:
    """A regular expression that stands in ``frame``. IFEval reads its keywords as such, unescaped."""

    def check(value: str) -> str:
        try:
            re.compile(frame.format(value))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    return AfterValidator(check)


Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Place = Annotated[int, Field(ge=1), AfterValidator(_among)]
Text = Annotated[str, AfterValidator(_not_blank)]
Letter = Annotated[str, AfterValidator(_one_character)]
Language = Annotated[str, AfterValidator(_detectable)]
Keyword = Annotated[Text, _compiles("{}")]
Word = Annotated[Text, _compiles(WORD)]
Splitter = Annotated[Text, _compiles(SECTION)]
Keywords = Annotated[list[Keyword], Field(min_length=1)]
Words = Annotated[list[Word], Field(min_length=1)]
