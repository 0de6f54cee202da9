"""Instructions on layout: markup, sections, beginnings and ends. Each function judges one text, never blank.

Where IFEval's pattern takes time quadratic in a hostile response, an equivalent stands here that is linear.
"""

from __future__ import annotations

import json
import re

from grape.checkers.instructions.arguments import SECTION, Count, Keyword, Place, Splitter, Text
from grape.checkers.instructions.form import compared, instruction
from grape.errors import one_line

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
STAR = re.compile(r"^[^\S\n]*+\*[^*].*$", re.MULTILINE)
DASH = re.compile(r"^[^\S\n]*+-", re.MULTILINE)


@instruction("detectable_content:number_placeholders", "The response has at least {num_placeholders} [placeholders].")
def number_placeholders(text: str, *, num_placeholders: Count) -> tuple[bool, str]:
    r"""``\[.*?\]``: from a bracket to the next closing one on its line, whatever stands between, even nothing."""
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1) > 0:
            count += 1
    return compared(count, "placeholder", "at least", num_placeholders)


@instruction("detectable_content:postscript", "The response has a postscript that begins with {postscript_marker!r}.")
def postscript(text: str, *, postscript_marker: Keyword) -> tuple[bool, str]:
    """The marker stands anywhere, in any case: it need not begin a line, nor the postscript end the text."""
    marker = postscript_marker.strip()
    found = re.search(POSTSCRIPTS.get(marker, marker.lower()), text.lower(), re.MULTILINE)
    return found is not None, f"{marker!r} {'found' if found else 'not found'}"


@instruction("detectable_format:number_bullet_lists", "The response has exactly {num_bullets} bullet points.")
def number_bullet_lists(text: str, *, num_bullets: Count) -> tuple[bool, str]:
    """Lines that begin with "-" or with one "*". A rule of dashes counts; a bare "*" takes the next line with it."""
    count = sum(1 for pattern in (STAR, DASH) for _ in pattern.finditer(text))
    return compared(count, "bullet point", "exactly", num_bullets)


@instruction(
    "detectable_format:number_highlighted_sections", "The response has at least {num_highlights} *highlighted* parts."
)
def number_highlighted_sections(text: str, *, num_highlights: Count) -> tuple[bool, str]:
    """``*so*`` and ``**so**``, each within a line. The text between two starred bullets on one line counts too."""
    single = re.findall(r"\*[^\n*]*\*", text)
    double = re.findall(r"\*\*[^\n*]*\*\*", text)
    count = sum(bool(part.strip("*").strip()) for part in single) + sum(bool(part[2:-2].strip()) for part in double)
    return compared(count, "highlighted part", "at least", num_highlights)


@instruction(
    "detectable_format:multiple_sections",
    "The response has at least {num_sections} sections, each begun with {section_spliter!r} and a number.",
)
def multiple_sections(text: str, *, section_spliter: Splitter, num_sections: Count) -> tuple[bool, str]:
    """The word with a number behind it, in its own case, anywhere in the text, also where it only refers to one."""
    count = len(re.split(SECTION.format(section_spliter.strip()), text)) - 1
    return compared(count, "section", "at least", num_sections)


@instruction("detectable_format:title", "The response has a title in <<double angular brackets>>.")
def title(text: str) -> tuple[bool, str]:
    """Within one line, and not empty: from a line's first ``<<`` to its last ``>>``."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end and line[start:end].lstrip("<").rstrip(">").strip():
            return True, f"title {one_line(line[start : end + 2], 80)}"
    return False, "no <<title>>"


@instruction("detectable_format:json_format", "The whole response is JSON.")
def json_format(text: str) -> tuple[bool, str]:
    """JSON as Python reads it (NaN too), any value, bare or in one fence of backticks."""
    value = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        value = value.removeprefix(fence)
    try:
        json.loads(value.removesuffix("```").strip())
    except (ValueError, RecursionError) as error:
        return False, f"not JSON: {one_line(error, 80)}"
    return True, "it is JSON"


@instruction("detectable_format:constrained_response", f"The response contains one of {', '.join(ANSWERS)}")
def constrained_response(text: str) -> tuple[bool, str]:
    """Contains, letter for letter: more text may stand around it."""
    found = [answer for answer in ANSWERS if answer in text]
    return bool(found), f"found: {found[0]}" if found else "no allowed answer is found"


@instruction("combination:two_responses", "The response has two different parts, divided by ******.")
def two_responses(text: str) -> tuple[bool, str]:
    """Exactly two that differ. A divider may begin and end the text, but no part within it is empty."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False, "a part between two dividers is empty"
    parts = list(filter(None, parts))
    if len(parts) == 2 and parts[0] == parts[1]:
        return False, "the two parts are the same"
    return compared(len(parts), "part", "exactly", 2)


@instruction("combination:repeat_prompt", "The response repeats the request word for word before it answers.")
def repeat_prompt(text: str, *, prompt_to_repeat: Text) -> tuple[bool, str]:
    """Begins with it, in any case; nothing need follow."""
    value = text.strip()
    followed = value.lower().startswith(prompt_to_repeat.strip().lower())
    return followed, "the request is repeated" if followed else f"it begins {one_line(value[:40])!r}"


@instruction("startend:end_checker", "The response ends with {end_phrase!r}.")
def end_checker(text: str, *, end_phrase: Text) -> tuple[bool, str]:
    """Ends with it, in any case; quotation marks may follow."""
    ending = text.strip().strip('"')
    return ending.lower().endswith(end_phrase.strip().lower()), f"it ends {one_line(ending[-40:])!r}"


@instruction("startend:quotation", "The whole response stands in double quotation marks.")
def quotation(text: str) -> tuple[bool, str]:
    """The straight mark is its first and its last character; curly ones do not count."""
    value = text.strip()
    return len(value) > 1 and value[0] == value[-1] == '"', f"it begins with {value[0]!r} and ends with {value[-1]!r}"


@instruction("length_constraints:number_paragraphs", "The response has exactly {num_paragraphs} parts, divided by ***.")
def number_paragraphs(text: str, *, num_paragraphs: Count) -> tuple[bool, str]:
    """Divided by "***" and not by blank lines. An empty part fails, but for the first and the last."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if not all(part.strip() for part in parts[1:-1]):
        return False, "a part between two dividers is empty"
    return compared(sum(bool(part.strip()) for part in parts), "part", "exactly", num_paragraphs)


@instruction(
    "length_constraints:nth_paragraph_first_word",
    "The response has exactly {num_paragraphs} paragraphs, and number {nth_paragraph} begins with {first_word!r}.",
)
def nth_paragraph_first_word(
    text: str, *, num_paragraphs: Count, nth_paragraph: Place, first_word: Text
) -> tuple[bool, str]:
    """Divided by two line breaks. Empty ones do not count, but the place is that among all, as in the original."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n")]
    count = sum(map(bool, paragraphs))
    followed, reasoning = compared(count, "paragraph", "exactly", num_paragraphs)
    if not followed or not paragraphs[nth_paragraph - 1]:
        return False, reasoning if not followed else f"paragraph {nth_paragraph} is empty"
    word = paragraphs[nth_paragraph - 1].split(None, 1)[0].lstrip("'").lstrip('"')
    begins = "".join(map(str.lower, re.split("[.,?!'\"]", word, maxsplit=1)[0]))
    return begins == first_word.lower(), f"{reasoning}; number {nth_paragraph} begins {one_line(begins, 40)!r}"
