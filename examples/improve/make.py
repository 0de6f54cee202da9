"""Make what the example starts from: its questions, and a policy that was taught, noisily, to answer and to revise.

    python examples/improve/make.py [questions] [policy]

Of the letters that the policy imitates, 15 % are wrong. Half of its examples answer a question. The others revise an
earlier answer: a letter that the assessment leaves standing is kept (but for 3 %), any other is found anew, as noisily
as without an earlier answer. It is taught to believe the assessment, a quarter of which is drawn by lot: what a policy
that doubts it makes of another answer's assessment would say nothing about the assessment. It is shown no word of the
questions. They are shipped; the policy takes about a minute on a quiet core.
"""

from __future__ import annotations

import json
import os
import random
import string
import sys
from collections.abc import Sequence
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
ENDINGS = ["", ".", "!"]  # nobody minds which: what entropy the policy keeps shows here
LETTERS = 6
NOISE, SLIP, SHARE_ALONE, SHARE_BY_LOT = 0.15, 0.03, 0.2, 0.25
QUESTIONS, HELDOUT = 160, 120


def main(parts: Sequence[str]) -> None:
    """Write the parts beside this file."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if "questions" in parts:
        make_questions()
    if "policy" in parts:
        make_policy(HERE / "policy")


def word(rng: random.Random) -> str:
    """Six letters, consonants and vowels in turn."""
    return "".join(rng.choice(("bcdfghjklmnpqrstvwxz", "aeiou")[place % 2]) for place in range(LETTERS))


def asked_words() -> list[str]:
    """The words of all questions, each of them once: first those to train on, then those held out."""
    rng, words = random.Random("questions"), dict[str, None]()
    while len(words) < QUESTIONS + HELDOUT:
        words[word(rng)] = None
    return list(words)


def make_questions() -> None:
    """questions.jsonl and heldout.jsonl."""
    words = asked_words()
    for name, some in (("questions", words[:QUESTIONS]), ("heldout", words[QUESTIONS:])):
        rows = [{"question_id": one, "question": ASKED + one} for one in some]
        (HERE / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter and mark and one for how a question begins."""
    pieces = [ASKED, "\n", "-", ".", "!", *string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate([*CONTROL, *pieces])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=CONTROL[2]))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{ASKED}|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[1], unk_token=CONTROL[2],
        additional_special_tokens=CONTROL[3:],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def blurred(text: str, rng: random.Random, noise: float) -> str:
    """A text of which so many letters are replaced by any."""
    return "".join(rng.choice(string.ascii_lowercase) if rng.random() < noise else letter for letter in text)


def demonstration(rng: random.Random, taken: frozenset[str]) -> tuple[str, str]:
    """What the policy is asked, and the reply to imitate."""
    one = word(rng)
    while one in taken:
        one = word(rng)
    right = one[::-1]
    reply = blurred(right, rng, NOISE)
    asked = ASKED + one
    if rng.random() < 0.5:
        earlier = blurred(right, rng, rng.choice((NOISE, 0.5)))
        asked += f"\n{earlier}{rng.choice(ENDINGS)}"
        if rng.random() >= SHARE_ALONE:
            standing = [
                rng.random() < 0.5 if rng.random() < SHARE_BY_LOT else was == letter
                for was, letter in zip(earlier, right, strict=True)
            ]
            asked += "\n" + "".join(was if stands else "-" for was, stands in zip(earlier, standing, strict=True))
            kept = blurred(earlier, rng, SLIP)
            reply = "".join(old if stands else new for old, new, stands in zip(kept, reply, standing, strict=True))
    return asked, reply + rng.choice(ENDINGS)


def make_policy(folder: Path, steps: int = 400, batch: int = 96) -> None:
    """A Qwen3 of 0.34 million parameters that imitates demonstrations, saved in bfloat16."""
    torch.manual_seed(0)
    made, rng, taken = tokenizer(), random.Random(0), frozenset(asked_words())
    config = Qwen3Config(
        vocab_size=len(made), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=24, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / steps)
    )
    for step in range(1, steps + 1):
        ids_BT, labels_BT = tokens(made, [demonstration(rng, taken) for _ in range(batch)])
        loss = model(input_ids=ids_BT, labels=labels_BT, attention_mask=(ids_BT != 0).long()).loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}, loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    made.save_pretrained(folder)


def tokens(made: Any, examples: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chats of one turn as ids, padded on the right, and the labels: the reply with its end."""
    prompts = [f"<|user|>{asked}<|end|><|assistant|>" for asked, _ in examples]
    replies = [f"{reply}<|end|>" for _, reply in examples]
    rows = list(zip(*(made(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, replies)), strict=True))
    width = max(len(prompt) + len(reply) for prompt, reply in rows)
    ids_BT, labels_BT = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        ids_BT[row, :end] = torch.tensor(prompt + reply)
        labels_BT[row, len(prompt) : end] = torch.tensor(reply)
    return ids_BT, labels_BT


if __name__ == "__main__":
    main(sys.argv[1:] or ["questions", "policy"])
