"""IFEval's kinds of instruction: what passes and what fails, strictly and loosely, and how rows become items."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape.checkers import run_checker
from grape.checkers.instructions import CRITERIA, instruction_items, layout
from grape.checkers.instructions.form import variants
from grape.checkers.instructions.language import capital_words, count_sentences, detect
from grape.errors import ConfigError
from grape.item import Item
from grape.rows import read_rows
from grape.types import Question, Response

PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "instructions" / "ifeval_prompts.jsonl"
QUESTION = Question(question_id="q", category="instructions", text="Write.")
MEGABYTE = 1_000_000
LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}


def finding(kind, arguments, text, form="strict"):
    response = Response(response_id="r", question_id="q", text=text)
    return run_checker(kind, {**arguments, "form": form}, QUESTION, response)


def score(kind, arguments, text, form="strict"):
    return finding(kind, arguments, text, form).score


# kind, arguments, texts that follow, texts that do not
CASES = [
    ("keywords:existence", {"keywords": ["correlated", "Mona Lisa"]},
     ["The mona lisa is uncorrelated with this.", "**Correlated**: the MONA LISA", "相关 correlated Mona Lisa"],
     ["The Mona\nLisa is correlated.", "Only correlated.", "La Joconde est corrélée."]),
    ("keywords:existence", {"keywords": ["colou?r"]}, ["A color.", "Colours"], ["A colouur."]),
    ("keywords:frequency", {**LEAST, "keyword": " war ", "frequency": 3},
     ["War, warfare and towards.", "* war\n* war\n* war"], ["War and war.", "guerre guerre guerre"]),
    ("keywords:frequency", {**LESS, "keyword": "war", "frequency": 1}, ["Peace."], ["Reward."]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "élan"]},
     ["Rocket, bedrock, rock_", "des élans", "摇滚"], ["We will ROCK you", "**rock**", "Élan vital", "rock-solid"]),
    ("keywords:letter_frequency", {"let_relation": "at least", "letter": "Q", "let_frequency": 2},
     ["Qq", "quiet quay", "*q* **Q**"], ["quit", "куку"]),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "#", "let_frequency": 2},
     ["# One"], ["# One\n# Two"]),
    ("length_constraints:number_words", {**LEAST, "num_words": 5},
     ["Don't be so sad", "well-kept old-time house", "eins zwei drei vier fünf", "| a | b | c | d | e |"],
     ["one two three four", "这是一个很长的句子没有空格", "- - - - - -"]),
    ("length_constraints:number_words", {**LESS, "num_words": 3}, ["Two words", "... --- ..."], ["It's two"]),
    ("length_constraints:number_sentences", {**LEAST, "num_sentences": 3},
     ["One. Two! Three?", "Wow! Yes??", "Er ging. Sie kam. Wir blieben.", "# Title.\n\n**One.**\n\nTwo."],
     ["Dr. Smith paid $3.14 in the U.S. market. He left.", "One\nTwo\nThree\nFour", "你好。世界。再见。"]),
    ("length_constraints:number_sentences", {**LESS, "num_sentences": 2}, ["Mr. and Mrs. Jones"], ["A man. A plan."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2},
     ["A\n***\nB", "***\nA\n***\nB\n***", "A *** B", "日本\n\n***\n\n語"],
     ["A\n\nB", "A\n***\n***\nB", "A\n***\nB\n***\nC", "A\n* * *\nB"]),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "Weekend"},
     ["1\n\nweekend!s are\n\n3", "A\n\n'\"Weekend\" it is\n\nC", "A\n\nWEEKEND. B\n\nC", "A\n\n weekend\n\nC\n\n"],
     ["One\n\nThe weekend\n\nThree", "One\n\nWeekend", "A\n\n\n\nWeekend\n\nC", "A\n\n**Weekend**\n\nC",
      "A\nWeekend\nC"]),
    ("language:response_language", {"language": "it"},
     ["Nel mezzo del cammin di nostra vita mi ritrovai per una selva oscura.", "12345 !!!"],
     ["In the middle of the journey of our life I found myself in a dark wood.", "В середине пути нашей жизни"]),
    ("change_case:english_capital", {},
     ["THIS IS AN ENGLISH SENTENCE. EVERY LETTER IS CAPITALIZED!", "**THE WHOLE THING IS LOUD AND CLEAR TODAY**"],
     ["THIS is English.", "12345", "ЭТО РУССКОЕ ПРЕДЛОЖЕНИЕ", "DAS IST EIN DEUTSCHER SATZ UND MEHR NICHT"]),
    ("change_case:english_lowercase", {},
     ["every letter of this is small, all the way to the end.", "* the first point\n* and the second one"],
     ["Almost every letter is small.", "123", "das ist ein deutscher satz und nichts anderes"]),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 3},
     ["NASA and ESA and I", "COVID-19: A **TEST**", "DON'T PANIC", "(U.S.) \"EU\" UN."],
     ["Nasa And ESA", "DON’t stop", "FUlly CAPITAL", "IPhone 3 4 5"]),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 1},
     ["small words, 42, 中文"], ["so am I"]),
    ("punctuation:no_comma", {}, ["No comma here; none at all.", "这里，没有"], ["Well, yes", "1,000"]),
    ("detectable_content:number_placeholders", {"num_placeholders": 2},
     ["[name] and [address]", "[a][]", "- [ ] to do\n- [x] done", "[naïve] [日本]"],
     ["[name]", "[na\nme] [x]", "(a) (b)", "[[nested]]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."},
     ["Bye.\nP.S. Call me", "bye p. s. call", "**P.S.** x", "P.P.S. x"], ["PS: call me", "P.S", "Bye."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"},
     ["P.P.S. Call me", "p. p. s"], ["P.S. Call me", "P.P. then S"]),
    ("detectable_content:postscript", {"postscript_marker": "Note"}, ["a footnote"], ["Nothing"]),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2},
     ["* one\n* two", "  - one\n\t* two", "-one\n*two", "Intro\n\n* eins\n\n- zwei\n**bold** end",
      "*\nx\n- y", "*\n* x\n- y"],
     ["* one", "* 1\n* 2\n* 3", "1. one\n2. two", "** one\n** two", "+ one\n+ two", "* one\n* two\n---"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2},
     ["*one* and **two**", "*a* *b*", "***both ways***", "* x * y\n*z*"],
     ["*one*", "**one** ** ** * *", "* one\n* two", "_a_ __b__"]),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     ["SECTION 1\nA\nSECTION 2\nB", "SECTION1SECTION2", "# SECTION 1\n\n**SECTION 2**"],
     ["Section 1\nSection 2", "SECTION one\nSECTION two", "SECTION 1"]),
    ("detectable_format:title", {},
     ["<<Ode to Joy>>\nLa la", "The end\n<<x>>", "<<日本>>", "## <<Title>> ##"],
     ["<< >>", "<<two\nlines>>", "<Title>", "<<>>", "# Title", "<<<>>>"]),
    ("detectable_format:json_format", {},
     ['{"a": 1}', "```json\n[1, 2]\n```", "```\n3\n```", '"text"', "```JSON {} ```", '{"ключ": "値"}', "[NaN]"],
     ["{a: 1}", "Here it is:\n{}", "```yaml\na: 1\n```", "{'a': 1}", "[" * 100_000, "1" * 5000]),
    ("detectable_format:constrained_response", {},
     ["My answer is yes.", " Well. My answer is maybe. Truly.", "My answer is no.\n"],
     ["My answer is yes", "my answer is no.", "My answer is **yes**.", "Yes."]),
    ("combination:two_responses", {},
     ["A\n******\nB", "******\nA\n******\nB\n******", "**A**\n******\n**B**", "一******二"],
     ["A", "A\n******\nA", "A******B******C", "A\n******\n******\nB", "A\n*****\nB"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": " Write a haiku. "},
     ["Write a haiku. An old pond", "  write A HAIKU.\n\nFrog", "Write a haiku."],
     ["Sure! Write a haiku.", '"Write a haiku." Pond', "**Write a haiku.** Pond", "Write a  haiku."]),
    ("startend:end_checker", {"end_phrase": "Any other questions?"},
     ["Yes. Any other questions?", 'So. ANY OTHER QUESTIONS?"\n ', "Many other questions? any other questions?"],
     ["Any other questions? No.", "Any other questions", "**Any other questions?**", "Noch Fragen?"]),
    ("startend:quotation", {},
     ['"All of it."', ' \n"A" and "B"\n', '""'], ['"Half of it." Not', '"', "“Curly.”", "«Guillemets»", '**"bold"**']),
]  # fmt: skip

# what only the loose form accepts: no line or asterisk that goes can make a placeholder or a highlighted part
LOOSE = [
    ("keywords:existence", {"keywords": ["correlated"]}, "cor**related**"),
    ("keywords:frequency", {**LESS, "keyword": "war", "frequency": 1}, "You asked about war:\nPeace."),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Peace.\nNo rock in it!"),
    ("keywords:letter_frequency", {"let_relation": "less than", "letter": "t", "let_frequency": 1}, "Sure thing!\nHi"),
    ("length_constraints:number_words", {**LESS, "num_words": 3}, "Sure, here it is:\nTwo words\nHope this helps."),
    ("length_constraints:number_sentences", {**LESS, "num_sentences": 2}, "Sure!\nOne is enough."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "Sure!\n***\nA\n***\nB"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "weekend"}, "**Weekend** plans"),
    ("language:response_language", {"language": "de"},
     "Certainly! I would be glad to help you with this, and here is the text that you wanted from me:\nGuten Tag."),
    ("change_case:english_capital", {}, "Sure!\nTHIS IS AN ENGLISH SENTENCE AND IT IS LOUD."),
    ("change_case:english_lowercase", {}, "Sure!\nthis is an english sentence and it is quiet.\nBye"),
    ("change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 1}, "AS ASKED\nso"),
    ("punctuation:no_comma", {}, "Sure, here it is:\nNone."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. P.*S.* Call me"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "- As asked:\n* one\n* two"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day **1** A\nDay **2** B"),
    ("detectable_format:title", {}, "<*<Title>*>"),
    ("detectable_format:json_format", {}, "Here is the JSON:\n```json\n{}\n```"),
    ("detectable_format:constrained_response", {}, "My answer is **yes**."),
    ("combination:two_responses", {}, "Sure!\n******\nA\n******\nB"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Write a haiku."}, "Sure!\nWrite a haiku. Pond"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. The end.\n\n*(42 words)*".replace("\n\n", "\n")),
    ("startend:quotation", {}, 'Sure!\n"All of it."\nBye'),
]  # fmt: skip
ARGUMENTS = {kind: arguments for kind, arguments, *_ in reversed(CASES)}  # each kind's first
NEVER_LOOSER = {"detectable_content:number_placeholders", "detectable_format:number_highlighted_sections"}


@pytest.mark.parametrize(("kind", "arguments", "follows", "fails"), CASES)
def test_each_kind_tells_what_follows_from_what_does_not(kind, arguments, follows, fails):
    assert {text: score(kind, arguments, text) for text in follows} == dict.fromkeys(follows, 1)
    assert {text: score(kind, arguments, text) for text in fails} == dict.fromkeys(fails, 0)
    assert {text: score(kind, arguments, text, "loose") for text in follows} == dict.fromkeys(follows, 1)
    if kind in NEVER_LOOSER:
        assert {text: score(kind, arguments, text, "loose") for text in fails} == dict.fromkeys(fails, 0)


@pytest.mark.parametrize(("kind", "arguments", "text"), LOOSE)
def test_the_loose_form_forgives_a_preamble_a_closing_line_or_asterisks(kind, arguments, text):
    assert score(kind, arguments, text) == 0
    found = finding(kind, arguments, text, "loose")
    assert found.score == 1
    assert "(without the " in found.reasoning


def test_every_kind_of_the_dataset_is_tested_in_both_forms():
    kinds = {kind for row in prompts() for kind in row["instruction_id_list"]}
    assert len(kinds) == 25
    assert kinds == set(CRITERIA) == {case[0] for case in CASES} == {case[0] for case in LOOSE} | NEVER_LOOSER


@pytest.mark.parametrize("text", ["", " \n\t\u3000", "\u2028"])
def test_an_empty_response_follows_no_instruction_in_either_form(text):
    for kind, arguments, *_ in CASES:
        for form in ("strict", "loose"):
            assert finding(kind, arguments, text, form)[:2] == (0, "the response is empty")


def test_a_text_that_is_blank_without_its_asterisks_follows_nothing_by_that():
    assert score("punctuation:no_comma", {}, ",\n", "loose") == 0
    assert score("detectable_format:number_bullet_lists", {"num_bullets": 0}, "- a\n* *", "loose") == 0
    assert score("length_constraints:number_words", {**LESS, "num_words": 1}, "word\n***", "loose") == 1


HOSTILE = {
    "prose": "The quick brown fox jumps over the lazy dog. " * (MEGABYTE // 45),
    "lines": "\n" * MEGABYTE + "x",
    "brackets": "[" * MEGABYTE,
    "angles": "<" * MEGABYTE,
    "stars": "*" * MEGABYTE,
    "bullets": "- *\n" * (MEGABYTE // 4),
    "initials": "a. " * (MEGABYTE // 3),
    "hindi": "नमस्ते दुनिया। " * (MEGABYTE // 15),
    "one word": "a" * MEGABYTE,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_gets_a_score_from_every_kind(name):
    scores = {kind: score(kind, arguments, HOSTILE[name]) for kind, arguments in ARGUMENTS.items()}
    assert set(scores.values()) <= {0, 1}
    assert scores["combination:repeat_prompt"] == scores["startend:end_checker"] == 0
    assert scores["punctuation:no_comma"] == scores["keywords:forbidden_words"] == 1
    assert scores["length_constraints:number_words"] == (name in ("prose", "initials", "hindi"))
    assert scores["length_constraints:number_sentences"] == (name == "prose")


@pytest.mark.parametrize("name", [pytest.param("prose", marks=pytest.mark.slow), "brackets"])
def test_a_megabyte_gets_a_score_from_the_loose_form_too(name):
    for kind in ("detectable_format:title", "detectable_content:number_placeholders", "punctuation:no_comma"):
        assert score(kind, ARGUMENTS[kind], HOSTILE[name], "loose") == (kind == "punctuation:no_comma")


@settings(deadline=None)
@given(st.text(st.characters(codec=None) | st.sampled_from("*-[]<>\"'.!?#`{}\n\t ,"), max_size=60))
@pytest.mark.slow
def test_no_text_makes_a_kind_raise_and_the_loose_form_accepts_all_that_the_strict_does(text):
    for kind, arguments in ARGUMENTS.items():
        assert score(kind, arguments, text) <= score(kind, arguments, text, "loose")


# IFEval's own patterns, where a linear equivalent stands in for one that a response could make quadratic
MARKUP = st.text(st.sampled_from("*-[]<>aps. \t\n"), max_size=40)


@settings(deadline=None)
@given(MARKUP)
def test_bullets_are_counted_as_the_published_patterns_count_them(text):
    published = re.findall(r"^\s*\*[^\*].*$", text, re.M) + re.findall(r"^\s*-.*$", text, re.M)
    assert layout.number_bullet_lists(text, num_bullets=len(published))[0]


@settings(deadline=None)
@given(MARKUP)
def test_placeholders_are_counted_as_the_published_pattern_counts_them(text):
    count = len(re.findall(r"\[.*?\]", text))
    assert layout.number_placeholders(text, num_placeholders=count)[0]
    assert not layout.number_placeholders(text, num_placeholders=count + 1)[0]


@settings(deadline=None)
@given(MARKUP)
def test_a_title_is_found_where_the_published_pattern_finds_one(text):
    published = [found for found in re.findall(r"<<[^\n]+>>", text) if found.lstrip("<").rstrip(">").strip()]
    assert layout.title(text)[0] == bool(published)


@settings(deadline=None)
@given(MARKUP, st.sampled_from([("P.S.", r"\s*p\.\s?s\..*$"), ("P.P.S", r"\s*p\.\s?p\.\s?s.*$"), ("As", r"\s*as.*$")]))
def test_a_postscript_is_found_where_the_published_pattern_finds_one(text, marker):
    published = re.findall(marker[1], text.lower(), re.M)
    assert layout.postscript(text, postscript_marker=marker[0])[0] == bool(published)


def test_the_loose_form_reads_the_eight_variants_of_the_original():
    text = "One *a*\n\nTwo *b*\n Three *c* "
    assert dict(variants(text)) == {
        "": text,
        "without the asterisks": "One a\n\nTwo b\n Three c ",
        "without the first line": "Two *b*\n Three *c*",
        "without the first line and the asterisks": "Two b\n Three c",
        "without the last line": "One *a*\n\nTwo *b*",
        "without the last line and the asterisks": "One a\n\nTwo b",
        "without the first and last line": "Two *b*",
        "without the first and last line and the asterisks": "Two b",
    }
    assert list(variants("one line")) == [("", "one line")]


# counts by NLTK 3.10 with its English Punkt model and its word tokenizer
@pytest.mark.parametrize(("text", "sentences", "capitals"), [
    ("Dr. Smith met Mr. J. R. Jones of Acme Corp. in the U.S. yesterday. They talked.", 2, 3),
    ("It cost $3.14. He paid at 5 p.m. on Jan. 5th.", 2, 0),
    ("Wait... what? No!", 2, 0),
    ("1. Buy milk\n2. Call Bob\n", 3, 0),
    ("Wow!!!", 2, 0),
    ("Is that the P.S.?", 2, 1),
    ('"Stop!" she said. (Really.) I did.', 4, 1),
    ("A heading\n\nA line without a stop\nAnd another", 1, 2),
    ("THIS ISN'T IT'S 'QUOTED' X=Y A/B e.g. NO.", 2, 9),
    ("WE CAN'T. A1:2B, X:Y", 2, 6),
    ("GONNA CANNOT LET'S “SO” ‘IT’ — IS", 1, 9),
])  # fmt: skip
def test_sentences_and_capital_words_are_counted_as_nltk_counts_them(text, sentences, capitals):
    assert (count_sentences(text), capital_words(text)) == (sentences, capitals)


# the first article of the Universal Declaration of Human Rights, or its beginning
LANGUAGES = {
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест",
    "bn": "সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt",
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan",
    "gu": "પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione",
    "kn": "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಹುಟ್ಟಿದ್ದಾರೆ. ಹಾಗೂ ಘನತೆ ಮತ್ತು ಹಕ್ಕುಗಳಲ್ಲಿ ಸಮಾನರಾಗಿದ್ದಾರೆ",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다",
    "mr": "सर्व मानवी व्यक्ती जन्मतःच स्वतंत्र आहेत व त्यांना समान प्रतिष्ठा व समान अधिकार आहेत",
    "ne": "सबै व्यक्तिहरू जन्मजात स्वतन्त्र हुन् ती सबैको समान अधिकार र महत्व छ",
    "pa": "ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ, ਸ਼ਾਨ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de consciência",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa. Wote wamejaliwa akili na dhamiri",
    "ta": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்",
    "te": "ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔ انہیں ضمیر اور عقل ودیعت ہوئی ہے",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi",
}


def test_every_language_of_the_dataset_is_told_from_every_other():
    asked = {given["language"] for row in prompts() for given in row["kwargs"] if "language" in given}
    assert asked <= set(LANGUAGES)
    assert {code: detect(text) for code, text in LANGUAGES.items()} == {code: code for code in LANGUAGES}
    assert score("language:response_language", {"language": "sw"}, LANGUAGES["fi"]) == 0


def test_a_language_is_found_alike_whatever_seed_others_set(monkeypatch):
    import langdetect

    text = "Salut hello ciao"  # Italian, Catalan or Finnish, by the seed
    first = {detect(text) for _ in range(20)}
    monkeypatch.setattr(langdetect.DetectorFactory, "seed", 7)
    assert {detect(text) for _ in range(20)} == first
    assert len(first) == 1
    assert langdetect.DetectorFactory.seed == 7


def test_reading_the_registry_loads_no_language_data_and_counting_opens_no_connection():
    code = (
        "import sys, socket\n"
        "from grape.checkers import check_arguments, registry\n"
        "registry(); check_arguments('length_constraints:number_words', {'relation': 'at least', 'num_words': 3})\n"
        "assert not {'punkt', 'langdetect', 'nltk', 'torch', 'duckdb'} & set(sys.modules), sys.modules\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "from grape.checkers.instructions.language import count_sentences, detect\n"
        "print(count_sentences('One. Two.'), detect('All human beings are born free and equal'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2 en\n", "")


@pytest.mark.parametrize(("kind", "arguments", "text", "reasoning"), [
    ("length_constraints:number_words", {**LEAST, "num_words": 300}, "Two words", "2 words, at least 300 wanted"),
    ("length_constraints:number_sentences", {**LESS, "num_sentences": 1}, "One.", "1 sentence, less than 1 wanted"),
    ("keywords:existence", {"keywords": ["a", "b", "c"]}, "b", "missing: a, c"),
    ("punctuation:no_comma", {}, "a,b,c", "2 commas, exactly 0 wanted"),
    ("language:response_language", {"language": "hi"}, LANGUAGES["fi"], "language fi, hi wanted"),
    ("language:response_language", {"language": "hi"}, "42", "language undetectable, hi wanted"),
    ("detectable_format:json_format", {}, "{", "not JSON: Expecting property name enclosed in double quotes: "
     "line 1 column 2 (char 1)"),
    ("startend:quotation", {}, "So 'it is'", "it begins with 'S' and ends with \"'\""),
])  # fmt: skip
def test_the_reasoning_says_what_was_counted(kind, arguments, text, reasoning):
    assert finding(kind, arguments, text).reasoning == reasoning


def prompts():
    return [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]


def row(**changes):
    fields = {"question_id": "q", "category": "instructions", "question": "Write.", "response": "One, two."}
    return {**fields, **changes}


def test_all_541_prompts_load_and_all_834_argument_sets_validate():
    rows = read_rows(
        row(
            question_id=str(data["key"]),
            question=data["prompt"],
            instruction_id_list=data["instruction_id_list"],
            kwargs=data["kwargs"],
        )
        for data in prompts()
    )
    assert len(rows.questions) == 541
    assert sum(len(items) for items in rows.items.values()) == 834
    assert Counter(item.check for items in rows.items.values() for item in items) == Counter(
        kind for data in prompts() for kind in data["instruction_id_list"]
    )


def test_arguments_that_are_null_are_absent_as_in_a_table_with_a_column_for_each():
    names = sorted({name for data in prompts() for given in data["kwargs"] for name in given})
    for data in prompts():
        table = [{name: given.get(name) for name in names} for given in data["kwargs"]]
        ids = data["instruction_id_list"]
        assert instruction_items(ids, table) == instruction_items(ids, data["kwargs"])
    assert instruction_items(["punctuation:no_comma"], [None])[0]["with"] == {}


def test_instructions_become_items_in_the_shape_of_a_rubrics():
    ids = ["punctuation:no_comma", "length_constraints:number_words", "punctuation:no_comma"]
    made = instruction_items(ids, [{}, {**LEAST, "num_words": 300}, {}], "loose")
    assert made[1] == {
        "id": "1-length_constraints-number_words",
        "criterion": "The response has at least 300 words.",
        "weight": 4,
        "check": "length_constraints:number_words",
        "with": {"relation": "at least", "num_words": 300, "form": "loose"},
    }
    assert [item["id"] for item in made] == ["0-punctuation-no_comma", made[1]["id"], "2-punctuation-no_comma"]
    assert [Item.model_validate(item).weight for item in made] == [4, 4, 4]


def test_every_criterion_names_what_is_wanted():
    for kind, arguments, *_ in CASES:
        (item,) = instruction_items([kind], [arguments])
        wanted = [str(value) for name, value in arguments.items() if name != "prompt_to_repeat"]
        assert [value for value in wanted if value not in item["criterion"]] == []


def test_a_row_is_judged_loosely_where_it_says_so():
    for form, expected in (("strict", 0), ("loose", 1)):
        rows = read_rows([row(instruction_id_list=["punctuation:no_comma"], kwargs=[{}], instruction_form=form,
                              response="Sure, yes:\nNone")])  # fmt: skip
        (item,), (response,) = rows.items["q"], rows.responses
        assert run_checker(item.check, item.arguments, rows.questions["q"], response).score == expected


WORDS = "length_constraints:number_words"
FIRST = "length_constraints:nth_paragraph_first_word"


@pytest.mark.parametrize(("ids", "kwargs", "message"), [
    (["length:number_words"], [{}], "instruction_id_list.0: no instruction named 'length:number_words'; did you mean "
     "'length_constraints:number_words'? known: "),
    ([WORDS], [], "kwargs: 0 sets of arguments for 1 instructions in instruction_id_list"),
    ([WORDS], [{"num_words": 3}], "kwargs.0.relation: the argument is needed; known: form, num_words, relation"),
    ([WORDS], [{**LEAST, "words": 3}], "kwargs.0.words: no such argument (got 3; did you mean 'num_words'? known: "),
    ([WORDS], [{"relation": "at most", "num_words": 3}],
     "kwargs.0.relation: Input should be 'less than' or 'at least' (got 'at most')"),
    ([WORDS], [{**LEAST, "num_words": True}], "kwargs.0.num_words: Input should be a valid integer (got True)"),
    ([WORDS], [{**LEAST, "num_words": -1}],
     "kwargs.0.num_words: Input should be greater than or equal to 0 (got -1)"),
    (["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": []}],
     "kwargs.1.keywords: List should have at least 1 item after validation, not 0 (got [])"),
    (["keywords:existence"], [{"keywords": ["a", " "]}], "kwargs.0.keywords.1: needs text (got ' ')"),
    (["keywords:frequency"], [{**LEAST, "keyword": "(war", "frequency": 1}],
     "kwargs.0.keyword: not a regular expression: missing ), unterminated subpattern at position 0 (got '(war')"),
    (["keywords:forbidden_words"], [{"forbidden_words": ["(?i)war"]}],
     "kwargs.0.forbidden_words.0: not a regular expression: global flags not at the start of the expression"),
    (["keywords:letter_frequency"], [{"let_relation": "at least", "letter": "ab", "let_frequency": 1}],
     "kwargs.0.letter: needs a single character that is not a space (got 'ab')"),
    (["language:response_language"], [{"language": "english"}],
     "kwargs.0.language: no language that can be detected; known: af, ar, bg, "),
    ([FIRST], [{"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "so"}],
     "kwargs.0.nth_paragraph: there are only 2 paragraphs (got 3)"),
    ([FIRST], [{"num_paragraphs": 2, "nth_paragraph": 0, "first_word": "so"}],
     "kwargs.0.nth_paragraph: Input should be greater than or equal to 1 (got 0)"),
])  # fmt: skip
def test_a_row_with_a_wrong_instruction_is_one_line_with_its_place(ids, kwargs, message):
    with pytest.raises(ConfigError) as error:
        read_rows([row(instruction_id_list=ids, kwargs=kwargs)])
    assert str(error.value).startswith(f"row 1: {message}")
    assert "\n" not in str(error.value)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"^\.instruction_form: 'lose' is no form; did you mean 'loose'\? known: "):
        instruction_items([], [], "lose")


@pytest.mark.slow
def test_the_example_scores_its_3246_answers_without_a_failure_and_loosely_never_lower():
    example = runpy.run_path(str(PROMPTS.parent / "make.py"))
    shares = {}
    for form in ("strict", "loose"):
        rows = read_rows(example["rows"](form))
        passed, asked = Counter(), Counter()
        for response in rows.responses:
            for item in rows.items[response.question_id]:
                found = run_checker(item.check, item.arguments, rows.questions[response.question_id], response)
                passed[response.metadata["manner"]] += found.score
                asked[response.metadata["manner"]] += 1
        assert len(rows.responses) == 3246
        assert set(asked.values()) == {834}
        shares[form] = passed
    assert all(0 < shares["strict"][manner] <= shares["loose"][manner] < 834 for manner in shares["strict"])
    assert shares["strict"]["json"] < shares["loose"]["json"]
