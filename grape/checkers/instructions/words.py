"""Instructions on words: keywords, counts, letter case, the language. Each function judges one text, never blank."""

from __future__ import annotations

import re
from collections import Counter

from grape.checkers.instructions.arguments import (
    WORD,
    Count,
    Keyword,
    Keywords,
    Language,
    Letter,
    Relation,
    Words,
)
from grape.checkers.instructions.form import compared, instruction
from grape.checkers.instructions.language import capital_words, count_sentences, detect
from grape.errors import one_line


@instruction("keywords:existence", "The response contains each of {keywords}.")
def existence(text: str, *, keywords: Keywords) -> tuple[bool, str]:
    """Each keyword is found, in any case, inside a longer word too, and as a regular expression."""
    missing = [word for word in keywords if not re.search(word, text, re.IGNORECASE)]
    return not missing, f"missing: {one_line(', '.join(missing))}" if missing else "no keyword is missing"


@instruction("keywords:frequency", "The keyword {keyword!r} stands in the response {relation} {frequency} times.")
def frequency(text: str, *, relation: Relation, keyword: Keyword, frequency: Count) -> tuple[bool, str]:
    """How often the keyword is found: in any case, inside longer words too, and as a regular expression."""
    return compared(len(re.findall(keyword.strip(), text, re.IGNORECASE)), "occurrence", relation, frequency)


@instruction("keywords:forbidden_words", "The response contains none of the words {forbidden_words}.")
def forbidden_words(text: str, *, forbidden_words: Words) -> tuple[bool, str]:
    """No word is found between word boundaries, in any case and as a regular expression."""
    found = [word for word in forbidden_words if re.search(WORD.format(word), text, re.IGNORECASE)]
    return not found, f"found: {one_line(', '.join(found))}" if found else "no forbidden word is found"


@instruction(
    "keywords:letter_frequency", "The letter {letter!r} stands in the response {let_relation} {let_frequency} times."
)
def letter_frequency(text: str, *, let_relation: Relation, letter: Letter, let_frequency: Count) -> tuple[bool, str]:
    """Small and capital letters count alike. The dataset asks for "#" and "!" too, which its first code replaced."""
    return compared(Counter(text.lower())[letter.lower()], f"{letter!r}", let_relation, let_frequency)


@instruction("length_constraints:number_words", "The response has {relation} {num_words} words.")
def number_words(text: str, *, relation: Relation, num_words: Count) -> tuple[bool, str]:
    r"""Words are runs of ``\w``: "well-kept" is two, "don't" is two, a Chinese clause is one."""
    return compared(sum(1 for _ in re.finditer(r"\w+", text)), "word", relation, num_words)


@instruction("length_constraints:number_sentences", "The response has {relation} {num_sentences} sentences.")
def number_sentences(text: str, *, relation: Relation, num_sentences: Count) -> tuple[bool, str]:
    """Sentences as NLTK's English Punkt model splits them, whatever the language."""
    return compared(count_sentences(text), "sentence", relation, num_sentences)


@instruction("punctuation:no_comma", "The response has no comma.")
def no_comma(text: str) -> tuple[bool, str]:
    """The ASCII comma alone: other scripts' commas pass."""
    return compared(text.count(","), "comma", "exactly", 0)


@instruction(
    "change_case:capital_word_frequency",
    "Words in capitals stand in the response {capital_relation} {capital_frequency} times.",
)
def capital_word_frequency(text: str, *, capital_relation: Relation, capital_frequency: Count) -> tuple[bool, str]:
    """Words as NLTK splits them: "I" and "A" count, a hyphenated word is one, "IT'S" is two."""
    return compared(capital_words(text), "capital word", capital_relation, capital_frequency)


@instruction("change_case:english_capital", "The response is in English and in capital letters only.")
def english_capital(text: str) -> tuple[bool, str]:
    """The language is asked of letters that are all capitals, as they stand; see `response_language`."""
    return (
        (False, "there are small letters, or no letters")
        if not text.isupper()
        else response_language(text, language="en")
    )


@instruction("change_case:english_lowercase", "The response is in English and in small letters only.")
def english_lowercase(text: str) -> tuple[bool, str]:
    """As `english_capital`, for small letters."""
    return (
        (False, "there are capital letters, or no letters")
        if not text.islower()
        else response_language(text, language="en")
    )


@instruction("language:response_language", "The response is in the language {language!r}.")
def response_language(text: str, *, language: Language) -> tuple[bool, str]:
    """As langdetect finds it in the first 10,000 characters. A text it finds no language in follows, as in IFEval."""
    found = detect(text)
    return found in (language, None), f"language {found or 'undetectable'}, {language} wanted"
