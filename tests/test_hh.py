"""The real preferences of examples/hh and of benchmarks/hh.py: what is read, what is held out, and what a model learns."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from grape.agreement import folds
from grape.classifier import load_classifier
from grape.decontaminate import asked, overlaps
from grape.lessons import Lesson, Preferred
from grape.recipes import RewardModelRun, load_recipe
from grape.tuning import tune

ROOT = Path(__file__).resolve().parent.parent


def _script(path):
    spec = importlib.util.spec_from_file_location("hh", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hh = _script(ROOT / "benchmarks/hh.py")


@pytest.fixture(scope="module")
def real():
    """The pairs, the questions that their dialogues open with, and the benchmark's folds."""
    lessons, skipped = hh.read_pairs()
    opening = np.array([hh.opening(one) for one in lessons])
    return lessons, skipped, opening, folds(opening, hh.FOLDS, 0)


def lesson(prompt, chosen, rejected):
    turns = tuple({"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(prompt))
    return Lesson(
        place=chosen, group=prompt[0], prompt=turns, responses=(chosen, rejected), pairs=(Preferred(better=0, worse=1),)
    )


def test_the_example_has_the_real_file_unchanged():
    digest = "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"
    assert hashlib.sha256(hh.DATA.read_bytes()).hexdigest() == digest


def test_thirteen_of_the_rows_are_broken_and_named(real):
    lessons, skipped, opening, _ = real
    assert (len(lessons), len(skipped), len(lessons) + len(skipped)) == (2299, 13, 2312)
    assert len({re.search(r"line (\d+): ", line)[1] for line in skipped}) == 13
    assert len(set(opening)) == 2165


def test_always_the_shorter_response_is_right_in_55_percent(real):
    lessons, _, _, _ = real
    gap = hh.by_length([], lessons, 0)
    assert ((gap > 0).sum(), (gap == 0).sum(), (gap < 0).sum()) == (1268, 11, 1020)
    assert hh.right(gap).mean() == pytest.approx((1268 + 11 / 2) / 2299, abs=1e-12)


def test_a_question_is_in_one_fold_and_the_folds_are_even(real):
    _, _, opening, fold = real
    assert {len(set(fold[opening == one])) for one in set(opening[:300])} == {1}
    firsts = np.unique(opening, return_index=True)[1]
    assert np.bincount(fold[firsts]).tolist() == [433] * 5


def test_what_is_learned_shares_no_question_with_what_is_held_out(real):
    lessons, _, _, fold = real
    taught, heldout = hh.parted(lessons, fold == 0)
    assert (len(taught), len(heldout)) == (1806, 460)  # and 33 that are like one of those
    assert not {hh.opening(one) for one in taught} & {hh.opening(one) for one in heldout}
    assert not overlaps([asked(one.prompt) for one in taught], [asked(one.prompt) for one in heldout])


def test_openings_that_only_typing_makes_different_are_one():
    one, other = lesson(["Who  are\nYou"], "a", "b"), lesson(["who are you", "I", "what?"], "c", "d")
    assert hh.opening(one) == hh.opening(other) == "who are you"


def test_a_dialogue_like_a_held_out_one_is_neither_taught_nor_held_out():
    long = "how do I get this very old red stain out of my shirt"
    pairs = [
        lesson([long], "a", "b"), lesson(["well", "yes?", f"so {long} today"], "c", "d"), lesson(["bye"], "e", "f"),
    ]  # fmt: skip
    taught, heldout = hh.parted(pairs, np.array([True, False, False]))
    assert [one.place for one in taught] == ["e"]
    assert [one.place for one in heldout] == ["a"]


def test_words_are_weighed_by_what_they_are_worth():
    taught = [lesson([f"{n}?"], f"kind words {n}", f"rude words {n}") for n in range(20)]
    held = [lesson(["x"], "kind", "rude"), lesson(["y"], "rude words", "kind words"), lesson(["z"], "so", "too")]
    gap = hh.by_words(taught, held, 0)
    assert gap[0] > gap[1] * -1 > 0 == gap[2]
    np.testing.assert_array_equal(hh.right(gap), [1, 0, 0.5])


def test_the_model_knows_the_words_of_what_it_is_taught_alone_and_values_nothing(tmp_path):
    said = ["Kind words, kind words", "rude words", "KIND, rude"]
    hh.make_model(tmp_path, said, 0)
    words = set(AutoTokenizer.from_pretrained(tmp_path).get_vocab())
    assert words == {"kind", "words", "rude", ",", "<|pad|>", "<|end|>", "<|unknown|>", "<|assistant|>"}
    gap = hh.asyncio.run(hh._gaps(str(tmp_path), [lesson(["x"], "kind", "rude words")]))
    assert gap.tolist() == [0]


def test_only_the_last_response_is_read(tmp_path):
    hh.make_model(tmp_path, ["kind rude"] * 2, 0)
    policy = load_classifier(str(tmp_path), device="cpu", seed=0)
    chat = [{"role": "user", "content": "rude"}, {"role": "assistant", "content": "rude"}]
    text = policy.tokenizer.apply_chat_template(
        [*chat, *chat[:1], {"role": "assistant", "content": "kind"}], tokenize=False
    )
    assert text == "<|assistant|>kind<|end|>"
    assert policy.tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == "<|assistant|>"


def test_values_are_told_apart_as_a_rubric_has_them(tmp_path):
    torch = hh.torch
    hh.make_model(tmp_path, ["kind rude"] * 2, 0)
    policy = load_classifier(str(tmp_path), device="cpu", seed=0)
    with torch.no_grad():
        embedded = policy.model.get_input_embeddings().weight
        for word, worth in (("kind", 1), ("rude", -1)):
            embedded[policy.tokenizer.get_vocab()[word], 0] = worth
    policy.model.save_pretrained(tmp_path)
    pairs = [lesson(["rude"], "kind", "rude"), lesson(["x"], "rude", "kind kind"), lesson(["y"], "kind", "kind")]
    gap = hh.asyncio.run(hh._gaps(str(tmp_path), pairs))
    np.testing.assert_array_equal(hh.right(gap), [1, 0, 0.5])


@pytest.mark.slow
def test_words_tell_three_in_five_of_the_real_pairs_apart(real):
    lessons, _, _, fold = real
    right = hh.validated(hh.by_words, lessons, fold, 0)
    assert not np.isnan(right).any()
    assert right.mean() == pytest.approx(0.62, abs=0.012)


@pytest.mark.slow
def test_a_preference_model_of_the_example_beats_chance_on_what_it_has_not_seen(real, tmp_path):
    lessons, _, _, fold = real
    taught, heldout = hh.parted(lessons, fold == 0)
    hh.write(tmp_path / "pairs.jsonl", taught)
    hh.write(tmp_path / "heldout.jsonl", heldout)
    hh.make_model(tmp_path / "model", hh.texts(taught), 0)
    run = load_recipe(
        RewardModelRun, hh.EXAMPLE / "reward-model.yaml",
        [f"policy.model={tmp_path}/model", f"data.path={tmp_path}/pairs.jsonl", f"heldout.data={tmp_path}/heldout.jsonl",
         f"checkpoint.dir={tmp_path}/made", f"log={tmp_path}/log.duckdb", "optimizer.epochs=1"],
    )  # fmt: skip
    made = tune(run)
    before, *_, after = (made.heldout[step] for step in sorted(made.heldout))
    assert before["accuracy"] == 0.5
    assert after["accuracy"] > after["accuracy_low"] > 0.5
    assert after["examples"] == pytest.approx(len(heldout), abs=2)  # two questions have two pairs
    gap = hh.asyncio.run(hh._gaps(str(made.folder), heldout))
    assert hh.right(gap).mean() == pytest.approx(after["accuracy"], abs=0.005)
    assert json.loads((made.folder / "config.json").read_text())["num_hidden_layers"] == 1
