"""Make what the runs of this folder share: policy/, questions.jsonl. Both are shipped; this is how they came to be.

    python examples/algorithms/make.py

The policy is a causal LM of 19,000 weights whose tokens are letters. It is taught to answer with strings of letters,
of which about half begin with the one that is asked for: a start that leaves something to learn.
"""

from __future__ import annotations

import json
import os
import random
import string
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
PAD, END, START = CONTROL = ["<|pad|>", "<|end|>", "<|start|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each small letter, the space and the end of a line, and three control tokens."""
    vocab = {token: number for number, token in enumerate([*CONTROL, "\n", " ", *string.ascii_lowercase])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, additional_special_tokens=[START, END]
    )
    made.chat_template = TEMPLATE
    return made


def question(letter: str) -> str:
    """What is asked."""
    return f"a word with {letter}"


def answer(letter: str, rng: random.Random) -> str:
    """A string of 2 to 10 letters, the first of which is in half of them the one that is asked for."""
    first = letter if rng.random() < 0.5 else rng.choice(string.ascii_lowercase)
    return first + "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9)))


def policy(made: PreTrainedTokenizerFast, steps: int = 400, batch: int = 64) -> Qwen3ForCausalLM:
    """The policy, taught by next-token prediction."""
    torch.manual_seed(0)
    rng = random.Random(0)
    config = Qwen3Config(
        vocab_size=len(made), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, pad_token_id=made.pad_token_id, eos_token_id=made.eos_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    adamw = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        asked = rng.choices(string.ascii_lowercase, k=batch)
        chats = [[{"role": "user", "content": question(letter)}] for letter in asked]
        prompts = [made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        texts = [f"{prompt}{answer(letter, rng)}{END}" for prompt, letter in zip(prompts, asked, strict=True)]
        rows = made(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        length = len(made(prompts[0], add_special_tokens=False)["input_ids"])  # of every prompt
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        labels[:, :length] = -100
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        if step % 100 == 0:
            print(f"step {step}: {loss.item():.3f}")
    return model.eval()


def main() -> None:
    """Write both."""
    logging.disable_progress_bar()
    with (HERE / "questions.jsonl").open("w") as file:
        for letter in string.ascii_lowercase:
            row = {"question_id": f"with-{letter}", "question": question(letter), "reference": letter}
            file.write(json.dumps(row) + "\n")
    made = tokenizer()
    policy(made).to(torch.bfloat16).save_pretrained(HERE / "policy")
    made.save_pretrained(HERE / "policy")


if __name__ == "__main__":
    main()
