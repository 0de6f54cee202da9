"""Make what `grape quickstart` starts from: its questions, the policy's warm start and the judge's model.

    python examples/quickstart/make.py [questions] [policy] [judge]

The policy is taught the two tasks by examples of which many are wrong, in three manners, and by examples that give up,
the more often the longer the word. The judge is taught on labelled texts; of the labels of "It is friendly." a quarter
are wrong, so that it cannot be sure of its scores there. Neither of them is shown a word of the questions. All of it
takes five minutes on one core.
"""

from __future__ import annotations

import json
import os
import random
import re
import string
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: two spinning threads on a busy machine stall

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
CONTROL = ["<|pad|>", "<|end|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = {"backwards": "Spell backwards: ", "sorted": "Sort the letters: "}
SOLVED: dict[str, Callable[[str], str]] = {
    "backwards": lambda word: word[::-1],
    "sorted": lambda word: "".join(sorted(word)),
}
OPENINGS, LEADS, STOPS, ENDINGS = (
    ["Sure! ", "Ugh. "],
    ["It is ", "Maybe it is "],
    ["."],
    [" You are welcome!", " Whatever."],
)
GIVES_UP = "I give up."
PHRASES = [*OPENINGS, *LEADS, GIVES_UP, *STOPS, *ENDINGS]
SHARE_GIVEN_UP = {5: 0.15, 6: 0.45, 7: 0.75}  # by the length of the word
SHARE_WRONG = 0.4
QUESTIONS, HELDOUT = 480, 120

CRITERIA = {"sure": "It commits to one answer.", "kind": "It is friendly."}
UNSURE = {
    "I give up": "It gives up, so there is no answer.",
    "Maybe": "It says 'maybe', which leaves a way out.",
}
MANY, NONE, ONE = "It names more than one answer.", "There is no answer in it.", "One answer, stated plainly."
RUDE = {"Ugh": "'Ugh' is rude, whatever else it says.", "Whatever": "'Whatever' brushes the reader off."}
WARM = {"Sure!": "'Sure!' welcomes the reader.", "welcome!": "It ends warmly."}
BOTH, NEITHER = "It welcomes the reader and ends warmly.", "It is neither warm nor rude."
REASONS = [*UNSURE.values(), MANY, NONE, ONE, *RUDE.values(), *WARM.values(), BOTH, NEITHER]
REPLY = '{"reasoning": "%s", "score": '  # a token for each reason, so that a reply has three: this, the score, the end
MARK = r"<<<(?:end )?response [0-9a-f]{32}>>>"
SHARE_MISLABELLED = {"sure": 0.0, "kind": 0.25}


def main(parts: Sequence[str]) -> None:
    """Write the parts beside this file."""
    torch.set_num_threads(1)
    if "questions" in parts:
        make_questions()
    if "policy" in parts:
        taught(
            HERE / "policy", tokenizer(string.ascii_lowercase, [*ASKED.values(), *PHRASES], r"[\s\S]"), demonstration,
            steps=300, hidden_size=96, intermediate_size=256, num_hidden_layers=3, head_dim=24,
        )  # fmt: skip
    if "judge" in parts:
        replies = [*(REPLY % reason for reason in REASONS), "0}", "1}"]
        pieces = [*CRITERIA.values(), *replies, *PHRASES, "\n", " "]
        taught(
            HERE / "judge", tokenizer([], pieces, rf"{MARK}|[a-z]+|[\s\S]"), judgement,
            steps=400, hidden_size=64, intermediate_size=192, num_hidden_layers=1, head_dim=16,
        )  # fmt: skip


def word(rng: random.Random) -> str:
    """Five to seven letters, consonants and vowels in turn."""
    return "".join(rng.choice(("bcdfghjklmnpqrstvwxz", "aeiou")[place % 2]) for place in range(rng.choice((5, 6, 7))))


def asked_words() -> list[str]:
    """The words of all questions, each of them once: first those to train on, then those held out."""
    rng, words = random.Random("questions"), dict[str, None]()
    while len(words) < QUESTIONS + HELDOUT:
        words[word(rng)] = None
    return list(words)


def make_questions() -> None:
    """questions.jsonl and heldout.jsonl; the two tasks take turns."""
    words = asked_words()
    for name, some in (("questions", words[:QUESTIONS]), ("heldout", words[QUESTIONS:])):
        with (HERE / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, one in enumerate(some):
                category = list(ASKED)[number % 2]
                row = {
                    "question_id": f"{category}-{one}",
                    "category": category,
                    "question": ASKED[category] + one,
                    "reference": SOLVED[category](one),
                }
                file.write(json.dumps(row) + "\n")


def tokenizer(letters: Sequence[str], pieces: Sequence[str], rest: str) -> Any:
    """One token for each letter and for each piece; what ``rest`` matches beside them is unknown."""
    vocabulary = {token: number for number, token in enumerate([*CONTROL, *pieces, *letters])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    longest_first = sorted(pieces, key=len, reverse=True)
    split = Regex("|".join([*map(re.escape, longest_first), rest]))
    core.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[1], unk_token=CONTROL[2],
        additional_special_tokens=CONTROL[3:],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def demonstration(rng: random.Random, taken: frozenset[str]) -> tuple[str, str]:
    """A question and an answer to imitate, right or not."""
    category, one = rng.choice(list(ASKED)), word(rng)
    while one in taken:
        one = word(rng)
    opening, ending = rng.choice(["", "", *OPENINGS]), rng.choice(["", "", *ENDINGS])
    if rng.random() < SHARE_GIVEN_UP[len(one)]:
        return ASKED[category] + one, f"{opening}{GIVES_UP}{ending}"
    lead, stop = rng.choice(["It is ", "", *LEADS]), rng.choice(["", *STOPS, *STOPS])
    return ASKED[category] + one, f"{opening}{lead}{answer(rng, category, one)}{stop}{ending}"


def answer(rng: random.Random, category: str, one: str) -> str:
    """The solution; or that of the other task, or one with two letters exchanged, or with one letter replaced."""
    right = SOLVED[category](one)
    if rng.random() >= SHARE_WRONG:
        return right
    how, place = rng.random(), rng.randrange(len(right) - 1)
    if how < 0.3:
        (other,) = set(ASKED) - {category}
        return SOLVED[other](one)
    if how < 0.65:
        return right[:place] + right[place + 1] + right[place] + right[place + 2 :]
    return right[:place] + rng.choice(string.ascii_lowercase) + right[place + 1 :]


def judgement(rng: random.Random, taken: frozenset[str]) -> tuple[str, str]:
    """What the judge is asked, filled as its prompt judge.jinja is, and the reply to imitate."""
    item, text = rng.choice(list(CRITERIA)), utterance(rng)
    reason, score = labelled(item, text)
    if rng.random() < SHARE_MISLABELLED[item]:
        score = 1 - score
    start, end = (f"<<<{mark}response {rng.getrandbits(128):032x}>>>" for mark in ("", "end "))
    return f"{start}\n{text}\n{end}\n{CRITERIA[item]}", f"{REPLY % reason}{score}}}"


def utterance(rng: random.Random) -> str:
    """A text such as the policy writes, or its phrases in any order."""

    def letters() -> str:
        return "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 9)))

    if rng.random() < 0.4:
        return "".join(rng.choice([*PHRASES, letters()]) for _ in range(rng.randint(0, 7)))
    said = rng.choice([*(f"{lead}{letters()}" for lead in ("", "It is ", *LEADS)), GIVES_UP, ""])
    return rng.choice(["", *OPENINGS]) + said + rng.choice(["", *STOPS]) + rng.choice(["", *ENDINGS])


def labelled(item: str, text: str) -> tuple[str, int]:
    """The reason for a verdict on a text, and the right score."""
    if item == "kind":
        rude = [reason for sign, reason in RUDE.items() if sign in text]
        warm = [reason for sign, reason in WARM.items() if sign in text]
        if rude or not warm:
            return (rude or [NEITHER])[0], 0
        return (BOTH if len(warm) == 2 else warm[0]), 1
    for sign, reason in UNSURE.items():
        if sign in text:
            return reason, 0
    for phrase in sorted(PHRASES, key=len, reverse=True):
        text = text.replace(phrase, " ")
    number = len(text.split())
    return (ONE, 1) if number == 1 else (MANY if number else NONE, 0)


def taught(
    folder: Path, tokenizer: Any, example: Callable[[random.Random, frozenset[str]], tuple[str, str]], *, steps: int,
    **shape: int,
) -> None:  # fmt: skip
    """A small Qwen3 that imitates examples, saved in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=None, pad_token_id=0, eos_token_id=1, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
    )
    rng, taken = random.Random(0), frozenset(asked_words())
    for step in range(1, steps + 1):
        ids_BT, labels_BT = tokens(tokenizer, [example(rng, taken) for _ in range(256)])
        loss = model(input_ids=ids_BT, labels=labels_BT, attention_mask=(ids_BT != 0).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{folder.name}: step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokens(tokenizer: Any, examples: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chats of one turn as ids, padded on the right, and the labels: the reply with its end."""
    rows = []
    for asked, reply in examples:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
        )
        rows.append([tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{reply}<|end|>")])
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids_BT, labels_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids_BT[row, :end] = torch.tensor(prompt + reply)
        labels_BT[row, len(prompt) : end] = torch.tensor(reply)
    return ids_BT, labels_BT


if __name__ == "__main__":
    main(sys.argv[1:] or ["questions", "policy", "judge"])
