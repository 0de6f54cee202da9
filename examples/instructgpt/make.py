"""Make what the example starts from: an untaught model, demonstrations, preferences and questions.

    python examples/instructgpt/make.py

The task is to spell five letters backwards. Of a demonstrator's letters 12 % are wrong. A labeller is shown two
attempts with more mistakes and prefers the one with more letters in their places; one in ten of his choices is the
other way round. No word of the questions, or of those held out, is in the demonstrations or the preferences.
"""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
CONTROL = ["<|pad|>", "<|end|>", "<|unknown|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASKED = "Spell backwards: "
LETTERS = 5
SLIPS, WORSE, MISTAKEN = 0.12, 0.3, 0.1
DEMONSTRATIONS, PAIRS, QUESTIONS, HELDOUT = 8000, 8000, 480, 120


def main() -> None:
    """Write everything beside this file."""
    logging.disable_progress_bar()
    rng = random.Random("words")
    words = sorted({word(rng) for _ in range(4 * (DEMONSTRATIONS + PAIRS))})
    rng.shuffle(words)
    heldout, questions = (words[: (n := HELDOUT)], words[n : n + QUESTIONS])
    rest = words[HELDOUT + QUESTIONS :]
    write("questions", ({"question_id": one, "question": ASKED + one} for one in questions))
    write("heldout", ({"question_id": one, "question": ASKED + one, "reference": one[::-1]} for one in heldout))
    write("demonstrations", (demonstration(one, rng) for one in rest[:DEMONSTRATIONS]))
    write("preferences", (preference(one, rng) for one in rest[DEMONSTRATIONS : DEMONSTRATIONS + PAIRS]))
    make_model(HERE / "model")


def word(rng: random.Random) -> str:
    """Consonants and vowels in turn."""
    return "".join(rng.choice(("bcdfghjklmnpqrstvwxz", "aeiou")[place % 2]) for place in range(LETTERS))


def blurred(text: str, rng: random.Random, noise: float) -> str:
    """A text of which so many letters are replaced by any."""
    return "".join(rng.choice(string.ascii_lowercase) if rng.random() < noise else letter for letter in text)


def demonstration(one: str, rng: random.Random) -> dict[str, Any]:
    """A row of `grape sft`."""
    return {"question": ASKED + one, "response": blurred(one[::-1], rng, SLIPS)}


def preference(one: str, rng: random.Random) -> dict[str, Any]:
    """A row of `grape reward-model`."""
    right = one[::-1]
    while True:
        attempts = [blurred(right, rng, WORSE) for _ in range(2)]
        marks = [sum(a == b for a, b in zip(text, right, strict=True)) for text in attempts]
        if marks[0] != marks[1]:
            break
    better = (marks[1] > marks[0]) != (rng.random() < MISTAKEN)
    return {"question": ASKED + one, "chosen": attempts[better], "rejected": attempts[not better]}


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def make_model(folder: Path) -> None:
    """A random Qwen3 of 0.34 million parameters, and a tokenizer with a token for each letter."""
    vocabulary = {token: n for n, token in enumerate([*CONTROL, ASKED, *string.ascii_lowercase])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=CONTROL[2]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{ASKED}|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[1], unk_token=CONTROL[2],
        additional_special_tokens=CONTROL[3:],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(made), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=24, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)


if __name__ == "__main__":
    main()
