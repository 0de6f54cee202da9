"""Make what the example starts from: four fifths of the pairs, one fifth held out, and a model that knows neither.

    python examples/hh/make.py

Dialogues that open with the same question are on one side, and such as are otherwise alike are left out of the first
four fifths, which the tokenizer's words come from. The model, of 0.14 million parameters, is a transformer of one layer
that begins as a bag of words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from grape.agreement import folds
from grape.decontaminate import asked, overlaps
from grape.lessons import Lesson, read_lessons
from grape.recipes import DataConfig

HERE = Path(__file__).resolve().parent
DATA = HERE / "hh_harmless_base_test.jsonl.gz"
CONTROL = ["<|pad|>", "<|end|>", "<|unknown|>", "<|assistant|>"]
TEMPLATE = (  # the last response and nothing before it, which both responses of a pair share
    "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FOLDS = 5
WORDS, WIDTH = 4000, 32


def main() -> None:
    """Write everything beside this file."""
    lessons, skipped = read_pairs()
    taught, heldout = parted(lessons, folds([opening(one) for one in lessons], FOLDS, seed=0) == 0)
    write(HERE / "pairs.jsonl", taught)
    write(HERE / "heldout.jsonl", heldout)
    make_model(HERE / "model", texts(taught), seed=0)
    print(f"{len(taught)} pairs to learn from, {len(heldout)} held out; {len(skipped)} broken rows left out")


def read_pairs(path: Path = DATA) -> tuple[list[Lesson], tuple[str, ...]]:
    """The pairs, as `grape reward-model` reads them, and a line on each broken row."""
    got = read_lessons(DataConfig(path=str(path), bad_rows="skip"), "pairs")
    return list(got.lessons), got.skipped


def opening(one: Lesson) -> str:
    """The question that a dialogue opens with, without what only typing makes different."""
    return " ".join(str(one.prompt[0]["content"]).lower().split())


def parted(lessons: Sequence[Lesson], held: np.ndarray[Any, Any]) -> tuple[list[Lesson], list[Lesson]]:
    """What is taught and what is held out; a dialogue that a held-out one shares its 8-grams with is in neither."""
    taught, heldout = ([lessons[at] for at in np.flatnonzero(side)] for side in (~held, held))
    found = overlaps([asked(one.prompt) for one in taught], [asked(one.prompt) for one in heldout])
    return [one for place, one in enumerate(taught) if place not in found], heldout


def texts(lessons: Iterable[Lesson]) -> list[str]:
    """All responses."""
    return [text for one in lessons for text in one.responses]


def write(path: Path, lessons: Iterable[Lesson]) -> None:
    """Pairs as rows of `grape reward-model`."""
    rows = ({"question": one.prompt, "chosen": one.responses[0], "rejected": one.responses[1]} for one in lessons)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def make_tokenizer(said: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token for each of the commonest words, in lower case, that these texts have more than once."""
    core = Tokenizer(models.WordLevel(unk_token=CONTROL[2]))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        said, trainers.WordLevelTrainer(vocab_size=WORDS, min_frequency=2, special_tokens=CONTROL, show_progress=False)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=CONTROL[0], eos_token=CONTROL[1], unk_token=CONTROL[2],
        additional_special_tokens=CONTROL[3:],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


@torch.no_grad()
def make_model(folder: Path, said: Sequence[str], seed: int) -> None:
    """A Llama of one layer whose value is at first 0 for every text, and which first learns what a word is worth.

    The end token attends alike to all words (its query is 0) and takes up their mean. The head looks along one axis,
    on which no embedding has anything yet. All embeddings are short, so that a word soon has something there: what
    else the head could learn from so few pairs is which words lie by chance on the other axes.
    """
    logging.disable_progress_bar()
    tokenizer = make_tokenizer(said)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=4096, num_labels=1,
        bos_token_id=None, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    (layer,) = model.model.layers
    words, axis = torch.randn(len(tokenizer), WIDTH) / 20, torch.eye(WIDTH)[0]
    model.model.embed_tokens.weight.copy_(words * (1 - axis))
    layer.self_attn.q_proj.weight.zero_()
    layer.self_attn.v_proj.weight.copy_(torch.eye(WIDTH))
    layer.self_attn.o_proj.weight.copy_(torch.eye(WIDTH))
    layer.mlp.down_proj.weight.zero_()
    model.score.weight.copy_(axis[None])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
