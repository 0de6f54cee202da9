"""Judges that fail, hang and talk nonsense while a run trains: it ends in time, and nothing sound is touched."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from apprentice import JUDGED, apprentice, ask, fair
from loopback import Answer, JudgeServer, user_text, verdict
from safetensors.torch import load_file

import grape

FAULTS = [
    Answer(status=500), Answer(status=429, headers={"Retry-After": "0"}), Answer(cut=True), Answer(text="It is good."),
    Answer(text=verdict(97)), Answer(text='{"reasoning": "r", "score": NaN, "confidence": 1}'), Answer(text=""),
    Answer(text="I'm sorry, but I can't help with that."), Answer(text=verdict(0.5, 0.9) * 2), Answer(raw=b"nonsense\r\n"),
]  # fmt: skip
TIMEOUT, ATTEMPTS = 1.0, 2


def shown(body):
    """The response that a judge is shown."""
    found = re.search(r"<<<response \w+>>>\n(.*)\n<<<end response", user_text(body), re.DOTALL)
    assert found is not None
    return found[1]


def flaky(body, number):
    """One answer in five fails, in one of ten ways, and one in a hundred never comes: which ones the response decides."""
    digits = hashlib.sha256(b"fault" + shown(body).encode()).digest()
    lot = int.from_bytes(digits[:4], "big") % 100
    if lot < 1:
        return Answer(hang=True)
    return FAULTS[digits[4] % len(FAULTS)] if lot < 21 else fair(body, number)


def run(folder: Path, behaviour, *, rubric: str = JUDGED, **sections):
    """The log of a run under a judge of this behaviour."""
    with JudgeServer(behaviour) as server:
        path = apprentice(folder, judge=server.url, truncation={"how": "keep"}, **sections)
        (folder / "rubrics/letters.yaml").write_text(rubric)
        settings = {"judge": "default", "client": "openai", "endpoint": server.url, "model": "m", "timeout": TIMEOUT}
        (folder / "judge.yaml").write_text(json.dumps(settings | {"retries": ATTEMPTS - 1}))
        asyncio.run(grape.train(path))
    return folder / "log.duckdb"


def both(tmp_path, behaviour, **options):
    """Two runs from the same policy and seed, so with the same first rollouts: under `fair`, and under ``behaviour``."""
    (tmp_path / "sound").mkdir()
    sound = run(tmp_path / "sound", fair, **options)
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "sound/policy", tmp_path / "broken/policy")
    return sound, run(tmp_path / "broken", behaviour, **options)


ALONE = "rubric: letters\nitems: [{id: pleasant, criterion: Is pleasant to read., judge: default}]"
ROLLOUTS = "select response_id, response from responses where step = 1 order by 1"
WHOLE = "select question_id from verdicts where step = 1 group by 1 having bool_and(outcome = 'ok')"


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["weighted", "grape"])
def test_with_a_fifth_of_the_judge_calls_failing_the_run_ends_and_whole_groups_keep_their_bits(tmp_path, formula):
    rubric = JUDGED.replace("rubric: letters", f"rubric: letters\nformula: {formula}")
    sampling = {"questions": 16, "responses": 4, "max_tokens": 6}
    options = {"rubric": rubric, "questions": 32, "steps": 4, "sampling": sampling}
    sound, broken = both(tmp_path, flaky, **options)
    assert ask(broken, "select step from steps order by step") == [(1,), (2,), (3,), (4,)]
    outcomes = dict(ask(broken, "select outcome, count(*) from verdicts where item = 'pleasant' group by 1"))
    assert {"ok", "timeout", "transport", "unparsable", "out_of_range", "refused"} <= outcomes.keys()
    assert 0.7 < outcomes["ok"] / sum(outcomes.values()) < 0.9
    # a hanging judge costs its timeout as often as it is asked, whatever else goes on
    slowest = ask(broken, "select max(epoch(finished) - epoch(started)) from steps")[0][0]
    assert slowest < 4 * TIMEOUT * ATTEMPTS + 10
    assert ask(broken, "select count(*) from verdicts where outcome <> 'ok' and score is not null") == [(0,)]
    assert ask(broken, ROLLOUTS) == ask(sound, ROLLOUTS)
    whole = {name for (name,) in ask(broken, WHOLE)}
    assert 3 <= len(whole) < 16
    for columns, table in (
        ("response_id, item, outcome, score, confidence, imputed, reasoning", "verdicts"),
        ("response_id, weighted" + (", reward, advantage" if formula == "weighted" else ""), "rewards"),
    ):
        sql = f"select question_id, {columns} from {table} where step = 1 order by all"
        kept, wanted = ([row for row in ask(log, sql) if row[0] in whole] for log in (broken, sound))
        assert kept == wanted
        assert len(kept) >= 4 * len(whole)
    shifts = ask(
        broken,
        "select step, (metrics->>'confidence/letters/pleasant')::double, (metrics->>'confidence_shift/letters/pleasant')"
        "::double, (metrics->>'confidence_n/letters/pleasant')::double, (metrics->>'failed')::double from steps order by 1",
    )
    for (_, before, *_), (_, mean, shift, votes, failed) in pairwise(shifts):
        assert shift == mean - before != 0
        assert votes < 64
        assert failed > 0


@pytest.mark.parametrize(("rubric", "learned"), [(JUDGED, True), (ALONE, False)])
def test_a_judge_that_always_fails_neither_stops_the_run_nor_teaches_it_anything(tmp_path, caplog, rubric, learned):
    """The item is left out; a response of which too little was measured is unscorable."""
    log = run(
        tmp_path, lambda body, number: "no verdict", rubric=rubric, steps=2, sampling={"questions": 2, "responses": 2}
    )
    found = ask(
        log, "select outcome, count(*), count(score), bool_or(imputed) from verdicts where item = 'pleasant' group by 1"
    )
    assert found == [("unparsable", 8, 0, False)]
    assert ask(log, "select count(*), count(reward), count(*) filter (trained) from rewards") == [
        (8, 8 * learned, 8 * learned)
    ]
    assert ("step 2: no response could be trained on; the weights stay as they are" in caplog.text) is not learned
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "policy", tmp_path / "checkpoints/step-000002")
    )
    assert all(before[name].equal(after[name]) for name in before) is not learned
