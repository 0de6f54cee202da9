"""How an instruction is judged: the strict form, the loose form, and the registration of a kind as a checker."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_type_hints

from grape.checkers import Finding, checker
from grape.types import Question, Response

Form = Literal["strict", "loose"]
Follows = Callable[..., tuple[bool, str]]  # (text, *, arguments) -> (followed, what was found and what was wanted)
CRITERIA: dict[str, str] = {}  # kind -> the sentence that states the instruction, with its arguments in braces


def instruction(kind: str, criterion: str) -> Callable[[Follows], Follows]:
    """Register a kind of instruction as a checker of that name, with the function's arguments and ``form``."""

    def register(follows: Follows) -> Follows:
        def check(question: Question, response: Response, *, form: Form = "strict", **arguments: Any) -> Finding:
            return judge(follows, response.text, form, arguments)

        parameters = list(inspect.signature(check).parameters.values())
        own = list(inspect.signature(follows).parameters.values())[1:]
        check.__signature__ = inspect.Signature([*parameters[:2], *own, parameters[2]])  # type: ignore[attr-defined]
        check.__annotations__ = {**get_type_hints(follows, include_extras=True), "form": Form}
        check.__module__, check.__doc__ = follows.__module__, follows.__doc__
        CRITERIA[kind] = criterion
        checker(kind)(check)
        return follows

    return register


def judge(follows: Follows, text: str, form: Form, arguments: dict[str, Any]) -> Finding:
    """1 if the text follows the instruction, in the loose form if any of its variants does.

    A blank text follows none, not even one that forbids something: IFEval, evaluation_lib.
    """
    if not text.strip():
        return Finding(0.0, "the response is empty")
    first = ""
    for change, variant in variants(text) if form == "loose" else [("", text)]:
        followed, reasoning = follows(variant, **arguments)
        if followed:
            return Finding(1.0, f"{reasoning} ({change})" if change else reasoning)
        first = first or reasoning
    return Finding(0.0, first)


def variants(text: str) -> Iterator[tuple[str, str]]:
    """The loose form's readings of a response, each once and none blank, with what was left out.

    As it is, without its first line, its last, or both, and each of these without asterisks: a preamble, a closing
    remark or markdown shall not decide. Cut texts are stripped before their asterisks go, as in the original.
    """
    lines = text.split("\n")
    cuts = {
        "": text,
        "the first line": "\n".join(lines[1:]).strip(),
        "the last line": "\n".join(lines[:-1]).strip(),
        "the first and last line": "\n".join(lines[1:-1]).strip(),
    }
    seen: set[str] = set()
    for cut, left in cuts.items():
        for gone, variant in ([cut], left), ([cut, "the asterisks"], left.replace("*", "")):
            if variant.strip() and variant not in seen:
                seen.add(variant)
                what = " and ".join(filter(None, gone))
                yield f"without {what}" if what else "", variant


def compared(count: int, noun: str, relation: str, wanted: int) -> tuple[bool, str]:
    """Whether a count is ``less than``, ``at least`` or ``exactly`` what is wanted, in words."""
    followed = {"less than": count < wanted, "at least": count >= wanted, "exactly": count == wanted}[relation]
    return followed, f"{count} {noun}{'' if count == 1 else 's'}, {relation} {wanted} wanted"
