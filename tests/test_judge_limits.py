"""Quotas, pauses, broken endpoints and budgets of judges: on a clock of the test's own, against servers on loopback."""

import asyncio
import json
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from apprentice import apprentice, ask, fair
from loopback import Answer, JudgeServer, spelt, user_text, verdict
from test_judge_openai import CALL, free_port, judge
from test_scoring import honest, project, rows

import grape
from grape.errors import ConfigError, GrapeError
from grape.item import Item
from grape.judge import limits, line, openai
from grape.judge.config import parse_judge
from grape.judge.critic import Critic
from grape.judge.jury import Jury
from grape.judge.limits import Breaker, Meter, Window
from grape.judge.openai import OpenAIClient
from grape.log import Log
from grape.types import Outcome, Question, Response


class Clock:
    """Time that passes only where all that goes on is that somebody sleeps."""

    def __init__(self):
        self.now = 0.0
        self.busy = lambda: False
        self.sleepers = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        until = self.now + seconds
        self.sleepers.append(until)
        try:
            await asyncio.sleep(0)
            while self.busy() or until > min(self.sleepers):
                await asyncio.sleep(0.0005)
            self.now = max(self.now, until)
        finally:
            self.sleepers.remove(until)

    def client(self, config, **options):
        """A client that lives by this clock."""
        client = OpenAIClient(config, random.Random(0), clock=self, sleep=self.sleep, **options)
        self.busy = lambda: any(server.busy for server in client._servers)
        return client


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_PAUSE", 0.001)


def calls(count):
    return [replace(CALL, key=f"k{number}") for number in range(count)]


def ask_all(config, asked, clock, *, at_once=True, meter=None):
    """The records of calls, asked all at once or one behind the other."""

    async def main():
        client = clock.client(config, meter=meter)
        try:
            if at_once:
                return await asyncio.gather(*(client.ask(call) for call in asked))
            return [await client.ask(call) for call in asked]
        finally:
            await client.close()

    return asyncio.run(asyncio.wait_for(main(), 30))


def arrivals(clock, answer=None):
    """A server's behaviour that notes when it is asked, and the notes."""
    times = []

    def behave(body, number):
        times.append(round(clock(), 1))
        return answer(number) if answer else verdict()

    return behave, times


def test_a_window_never_lets_more_begin_within_a_minute():
    rng, window, now, begun = random.Random(1), Window(5), 0.0, []
    for _ in range(300):
        now = max(now + rng.choice([0.0, 0.125, 3.0, 40.0]), window.opens(now, 1))
        assert window.opens(now, 1) == now
        window.add(now, 1)
        begun.append(now)
    assert all(later - earlier >= 60 for earlier, later in zip(begun, begun[5:], strict=False))
    assert any(later - earlier == 60 for earlier, later in zip(begun, begun[5:], strict=False))


def test_a_window_of_amounts_takes_corrections_and_lets_what_is_too_much_alone_through():
    window = Window(100)
    first = window.add(0, 60)
    assert window.opens(1, 40) == 1
    assert window.opens(1, 41) == 60
    window.correct(first, 10)
    assert window.opens(1, 90) == 1
    window.add(2, 90)
    assert window.opens(3, 10) == 60
    assert window.opens(3, 11) == 62
    assert window.opens(3, 500) == 62
    assert Window(None).opens(7, 1e9) == 7


def test_no_more_requests_a_minute_than_the_endpoint_allows():
    clock = Clock()
    behave, times = arrivals(clock)
    with JudgeServer(behave) as server:
        records = ask_all(judge(server.url, requests_per_minute=3, concurrency=1), calls(8), clock)
    assert times == [0, 0, 0, 60, 60, 60, 120, 120]
    assert {record.outcome for record in records} == {Outcome.OK}


def test_no_more_tokens_a_minute_than_the_endpoint_allows_by_what_the_answers_count():
    clock = Clock()
    behave, times = arrivals(clock)
    with JudgeServer(behave) as server:
        # 12 are expected of a call and 120 come back: a third one may begin at 240, a fourth not at 360
        ask_all(judge(server.url, tokens_per_minute=300, concurrency=1), calls(7), clock)
    assert times == [0, 0, 0, 60, 60, 60, 120]


def test_each_endpoint_has_limits_of_its_own():
    clock = Clock()
    with JudgeServer() as one, JudgeServer() as two:
        ends = [{"url": one.url, "requests_per_minute": 2}, {"url": two.url, "requests_per_minute": 4}]
        config = parse_judge({"judge": "j", "model": "m", "endpoint": ends, "concurrency": 1, "timeout": 20}, "j.yaml")
        ask_all(config, calls(6), clock, at_once=False)
        assert (len(one.bodies), len(two.bodies), clock.now) == (2, 4, 0)


def test_each_endpoint_has_its_own_key_and_none_is_shown():
    fault = Answer(status=500, body=b'{"error": "not sk-one nor sk-two"}')
    with JudgeServer(lambda *_: fault) as one, JudgeServer(lambda *_: fault) as two:
        ends = [{"url": one.url, "api_key": "sk-one"}, {"url": two.url}]
        config = judge(api_key="sk-two", retries=1, endpoint=ends)
        (record,) = ask_all(config, [CALL], Clock())
        sent = {server.headers[0]["authorization"] for server in (one, two)}
    assert sent == {"Bearer sk-one", "Bearer sk-two"}
    assert record.detail == "status 500: not *** nor ***"


@pytest.mark.parametrize(
    ("after", "held"),
    [("7", 7), ("3600", 20), (None, 10), ("soon", 0), ("-5", 0), ("nan", 0), ("inf", 0), ("", 0), ("Wed, 99 Nov", 0)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_holds_the_whole_endpoint_back_up_to_its_timeout(after, held, status):
    clock = Clock()
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True) if after is None else after
    refusal = Answer(status=status, headers={"Retry-After": after})
    behave, times = arrivals(clock, lambda number: refusal if number == 0 else verdict())
    with JudgeServer(behave) as server:
        records = ask_all(judge(server.url, concurrency=1), calls(3), clock)
    assert times[0] == 0
    assert all(held - 5 * (held == 10) <= time <= held for time in times[1:])
    assert len(times) == 4
    assert [record.attempts for record in records] == [2, 1, 1]


def test_what_is_held_back_at_one_endpoint_goes_to_another():
    clock = Clock()
    refusal = Answer(status=429, headers={"Retry-After": "15"})
    with JudgeServer(lambda *_: refusal) as one, JudgeServer() as two:
        records = ask_all(judge(one.url, two.url, concurrency=1), calls(9), clock, at_once=False)
        assert (len(one.bodies), len(two.bodies)) == (1, 9)
    assert clock.now < 1
    assert sum(record.attempts for record in records) == 10


def test_a_breaker_opens_after_faults_of_different_calls_and_one_call_tries():
    breaker = Breaker()
    for _ in range(20):
        breaker.fault("the same", 0, False)
    assert breaker.closed
    for number in range(limits.FAULTS - 1):
        breaker.fault(f"k{number}", 10, False)
    assert not breaker.closed
    assert breaker.opens(10.5) == 11  # the first pause is a second
    breaker.fault("an old one", 10.9, False)
    assert breaker.opens(11) == 11
    assert breaker.begin()
    assert breaker.opens(11) == float("inf")  # one at a time
    breaker.fault("k", 12, True)
    assert breaker.opens(12) == 14
    assert breaker.begin()
    breaker.dropped(True)
    assert breaker.opens(14) == 14
    for _ in range(10):
        assert breaker.begin()
        breaker.fault("k", 100, True)
    assert breaker.opens(100) == 160
    assert breaker.begin()
    breaker.worked()
    assert breaker.closed
    assert not breaker.begin()
    for number in range(limits.FAULTS - 1):
        breaker.fault(f"k{number}", 200, False)
    assert breaker.closed


def test_a_sick_one_of_two_endpoints_is_left_out_costs_no_verdict_and_is_found_again():
    clock, sick = Clock(), True

    def behave(body, number):
        return Answer(status=500) if sick else verdict()

    async def main(config):
        nonlocal sick
        client = clock.client(config)
        counts = []
        for round_ in range(4):
            records = [await client.ask(call) for call in calls(40)]
            assert {record.outcome for record in records} == {Outcome.OK}
            counts.append(len(bad.bodies))
            clock.now += (1.5, 1.5, 1.5, 0)[round_]
            sick = round_ < 2
        await client.close()
        return counts

    with JudgeServer() as good, JudgeServer(behave) as bad:
        counts = asyncio.run(main(judge(good.url, bad.url, concurrency=1)))
        assert len(good.bodies) + len(bad.bodies) == 160 + limits.FAULTS + 1
    # five faults; after a second one trial fails; the next is due after two; then it has half of the calls
    assert counts[:3] == [limits.FAULTS, limits.FAULTS + 1, limits.FAULTS + 1]
    assert counts[3] == limits.FAULTS + 1 + 20


@pytest.mark.parametrize("at_once", [True, False])
def test_a_dead_one_of_two_endpoints_costs_no_verdict(at_once):
    with JudgeServer() as good:
        dead = f"http://127.0.0.1:{free_port()}/v1"
        records = ask_all(judge(dead, good.url, concurrency=4, retries=1), calls(60), Clock(), at_once=at_once)
        assert len(good.bodies) == 60
    assert {(record.outcome, record.endpoint) for record in records} == {(Outcome.OK, good.url)}
    assert sum(record.attempts for record in records) <= 60 + limits.FAULTS + 4


def test_a_call_without_retries_does_not_try_an_endpoint_that_is_left_out():
    clock = Clock()

    async def main(config):
        client = clock.client(config)
        records = [await client.ask(call) for call in calls(20)]
        clock.now += 100
        records += [await client.ask(call) for call in calls(20)]
        await client.close()
        return records

    with JudgeServer() as good, JudgeServer(lambda *_: Answer(status=500)) as bad:
        records = asyncio.run(main(judge(bad.url, good.url, concurrency=1, retries=0)))
    lost = [record for record in records if record.outcome is not Outcome.OK]
    assert len(lost) == len(bad.bodies) == limits.FAULTS
    assert len(good.bodies) == 40 - limits.FAULTS


def test_a_retry_waits_for_an_endpoint_that_has_not_failed_the_call():
    with (
        JudgeServer(lambda *_: Answer(text=verdict(), delay=0.3)) as busy,
        JudgeServer(lambda *_: Answer(status=500)) as bad,
    ):

        async def main():
            client = OpenAIClient(judge(bad.url, busy.url, concurrency=1, retries=1))
            records = await asyncio.gather(*(client.ask(call) for call in calls(2)))
            await client.close()
            return records

        records = asyncio.run(main())
        assert (len(bad.bodies), len(busy.bodies)) == (1, 2)
    assert [(record.outcome, record.attempts) for record in records] == [(Outcome.OK, 2), (Outcome.OK, 1)]


def test_where_every_endpoint_is_left_out_a_call_waits_for_its_timeout_and_says_so(monkeypatch):
    monkeypatch.setattr(limits, "FIRST_REST", 50.0)
    clock = Clock()
    with JudgeServer(lambda *_: Answer(status=500)) as server:
        records = ask_all(judge(server.url, retries=0, concurrency=1), calls(limits.FAULTS + 3), clock)
        assert len(server.bodies) == limits.FAULTS
    assert {record.outcome for record in records} == {Outcome.TRANSPORT}
    assert {(record.detail, record.attempts) for record in records[limits.FAULTS :]} == {
        ("no endpoint answers: after faults all are left out, for 20 s and more", 0)
    }
    assert clock.now == 20


def test_a_server_that_comes_back_within_the_timeout_costs_no_verdict():
    clock = Clock()
    with JudgeServer(lambda *_: verdict() if clock.now > 5 else Answer(status=503)) as server:
        records = ask_all(judge(server.url, retries=3, concurrency=8), calls(30), clock)
    assert {record.outcome for record in records} == {Outcome.OK}
    assert clock.now > 5


def test_faults_of_the_request_and_of_a_busy_server_leave_no_endpoint_out():
    statuses = [429, 400, 401, 404]
    with JudgeServer(lambda body, number: Answer(status=statuses[number % 4])) as server:
        ask_all(judge(server.url, retries=0, concurrency=1), calls(40), Clock())
        assert len(server.bodies) == 40


def test_an_answer_that_trickles_ends_at_the_timeout():
    async def main():
        async def behave(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            try:
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.02)
            except ConnectionError:
                writer.close()

        server = await asyncio.start_server(behave, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        client = OpenAIClient(judge(url, retries=0, timeout=0.3))
        record = await client.ask(CALL)
        await client.close()
        server.close()
        return record

    record = asyncio.run(asyncio.wait_for(main(), 20))
    assert (record.outcome, record.detail) == (Outcome.TIMEOUT, "no answer within 0.3 s")


def test_a_cancelled_call_gives_its_place_back():
    async def main(url):
        client = OpenAIClient(judge(url, concurrency=1))
        hanging = asyncio.create_task(client.ask(calls(3)[0]))
        waiting = asyncio.create_task(client.ask(calls(3)[1]))
        while not server.bodies:
            await asyncio.sleep(0.01)
        waiting.cancel()
        hanging.cancel()
        ended = await asyncio.gather(hanging, waiting, return_exceptions=True)
        record = await client.ask(calls(3)[2])
        await client.close()
        return ended, record

    with JudgeServer(lambda body, number: Answer(hang=True) if number == 0 else verdict()) as server:
        ended, record = asyncio.run(asyncio.wait_for(main(server.url), 20))
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 2
    assert record.outcome is Outcome.OK


def test_a_long_call_is_not_overtaken_by_short_ones():
    clock = Clock()
    behave, times = arrivals(clock)
    asked = [replace(call, sampling={"max_tokens": most}) for call, most in zip(calls(3), (57, 87, 7), strict=True)]
    with JudgeServer(behave) as server:
        ask_all(judge(server.url, tokens_per_minute=100, concurrency=3), asked, clock)
    assert times == [0, 60, 60]


def test_a_trial_that_is_cancelled_is_made_by_the_next_call():
    answers = [Answer(status=500)] * limits.FAULTS + [Answer(hang=True), verdict()]

    async def main(clock):
        client = clock.client(judge(server.url, retries=0))
        for call in calls(limits.FAULTS):
            await client.ask(call)
        clock.now += 2
        trial = asyncio.create_task(client.ask(CALL))
        while len(server.bodies) <= limits.FAULTS:
            await asyncio.sleep(0.01)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        record = await client.ask(CALL)
        await client.close()
        return record

    with JudgeServer(lambda body, number: answers[number]) as server:
        assert asyncio.run(asyncio.wait_for(main(Clock()), 20)).outcome is Outcome.OK


def test_a_place_that_a_call_gets_as_it_is_cancelled_is_free_for_the_next():
    async def main():
        client = OpenAIClient(judge("http://127.0.0.1:9/v1", concurrency=1))
        first = await client._line.enter(CALL, (), spare=True)
        second = asyncio.create_task(client._line.enter(CALL, (), spare=True))
        await asyncio.sleep(0)
        client._line.leave(first, None)
        second.cancel()
        assert await asyncio.gather(second, return_exceptions=True) != [None]
        ticket = await client._line.enter(CALL, (), spare=True)
        await client.close()
        return ticket.server.busy

    assert asyncio.run(asyncio.wait_for(main(), 20)) == 1


FAULTY = [
    Answer(status=500), Answer(status=429, headers={"Retry-After": "0.02"}), Answer(status=503), Answer(cut=True),
    Answer(raw=b""), Answer(raw=b"nonsense"), Answer(body=b"<html>"), Answer(status=400), Answer(hang=True),
]  # fmt: skip


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.slow
def test_whatever_two_servers_do_every_call_ends_typed_and_the_line_is_empty(share, monkeypatch):
    monkeypatch.setattr(limits, "FIRST_REST", 0.02)
    monkeypatch.setattr(line, "LEAST_PATIENCE", 0.3)
    rng = random.Random(5)
    plan = [rng.choice(FAULTY) if rng.random() < share else verdict() for _ in range(400)]

    async def main(*urls):
        config = judge(*urls, concurrency=8, retries=2, timeout=0.3, budget={"tokens": 15_000})
        client = OpenAIClient(config, random.Random(0))
        records = await asyncio.gather(*(client.ask(call) for call in calls(150)))
        left = [server.busy for server in client._servers], len(client._line._waiting)
        await client.close()
        return records, left

    with JudgeServer(lambda _, n: plan[n]) as one, JudgeServer(lambda _, n: plan[-n]) as two:
        records, left = asyncio.run(asyncio.wait_for(main(one.url, two.url), 60))
        assert max(one.most_at_once, two.most_at_once) <= 8 + plan.count(FAULTY[-1])  # who hangs stays on the server
    assert left == ([0, 0], 0)
    found = {record.outcome for record in records}
    assert {Outcome.OK, Outcome.TRANSPORT, Outcome.BUDGET} <= found if share < 1 else Outcome.OK not in found
    assert all((record.reply is not None) == (record.outcome is Outcome.OK) for record in records)
    assert all(record.outcome is Outcome.OK or record.detail for record in records)


# The budget of a run


def test_a_budget_is_kept_to_within_one_call():
    with JudgeServer() as server:
        config = judge(server.url, budget={"tokens": 500})
        meter = Meter(config, (10, 0.0))
        asked = [replace(call, sampling={"max_tokens": 117}) for call in calls(20)]
        records = ask_all(config, asked, Clock(), meter=meter)
        assert len(server.bodies) == 5  # 10 + 4 x 120 = 490 are below 500
    refused = [record for record in records if record.outcome is Outcome.BUDGET]
    assert len(refused) == 15
    assert {(record.detail, record.attempts) for record in refused} == {("its budget of 500 tokens is spent (610)", 0)}
    assert meter.refused
    assert meter.advice == (
        "judge 'j': its budget of 500 tokens is spent (610): raise budget.tokens and go on with --resume"
    )


def test_far_from_its_end_a_budget_slows_nothing_down():
    with JudgeServer(lambda *_: Answer(text=verdict(), delay=0.1)) as server:
        config = judge(server.url, budget={"tokens": 100_000})
        ask_all(config, calls(12), Clock(), meter=Meter(config))
        assert server.most_at_once > 4


def test_a_budget_of_money_counts_by_the_price_what_the_server_counts_or_else_an_estimate():
    answer = Answer(text="x" * 400, usage=None)
    with JudgeServer(lambda *_: answer) as server:
        config = judge(server.url, budget={"cost": 1.0}, price={"input": 1000, "output": 4000})
        meter = Meter(config)
        asked = [replace(call, sampling={"max_completion_tokens": 100}) for call in calls(9)]
        records = ask_all(config, asked, Clock(), meter=meter)
        assert len(server.bodies) == 3  # each 3 tokens read and 100 written: 0.403
    assert [record.outcome for record in records].count(Outcome.BUDGET) == 6
    assert meter.advice == "judge 'j': its budget of 1 is spent (1.209): raise budget.cost and go on with --resume"
    with pytest.raises(ConfigError, match=r"^j\.yaml: budget\.cost: needs a price"):
        judge("http://x/v1", budget={"cost": 1.0})


def counts(log):
    with Log(log) as store:
        return {
            table: store.query(f"select count(*) from {table}")[0][0]
            for table in ("runs", "judge_calls", "verdicts", "rewards", "steps")
        }


def score(options, **more):
    return asyncio.run(grape.score(rows(2, 2), **options, **more))


@pytest.mark.slow
def test_a_spent_budget_stops_a_run_before_it_is_settled_and_a_larger_one_asks_only_for_what_is_missing(tmp_path):
    with JudgeServer(honest) as server:
        options = project(tmp_path, server.url, budget={"tokens": 500}, concurrency=2)
        with pytest.raises(GrapeError) as caught:
            score(options)
        asked = len(server.bodies)
        assert str(caught.value) == (
            "judge 'default': its budget of 500 tokens is spent (600): raise budget.tokens and go on with --resume"
        )
        assert not isinstance(caught.value, ConfigError)
        assert asked == 5
        assert counts(options["log"]) == {"runs": 1, "judge_calls": 5, "verdicts": 0, "rewards": 0, "steps": 0}
        with pytest.raises(GrapeError, match=r"its budget of 500 tokens is spent \(600\)"):
            score(options, resume=True)  # the run counts on
        assert len(server.bodies) == asked
        project(tmp_path, server.url, budget={"tokens": 1_000_000})
        records = score(options, resume=True)
        assert len(server.bodies) == 12
        assert counts(options["log"]) == {"runs": 1, "judge_calls": 12, "verdicts": 16, "rewards": 4, "steps": 1}
    with JudgeServer(honest) as server:
        (tmp_path / "sound").mkdir()
        assert score(project(tmp_path / "sound", server.url)) == records


@pytest.mark.slow
def test_a_new_run_has_a_budget_of_its_own(tmp_path):
    with JudgeServer(honest) as server:
        options = project(tmp_path, server.url, budget={"tokens": 500})
        for _ in range(2):  # the second finds 5 answers in the log, and asks for 5 more
            with pytest.raises(GrapeError, match="budget of 500 tokens"):
                score(options)
        assert len(server.bodies) == 10
        assert counts(options["log"])["runs"] == 2


def test_a_vote_that_the_budget_has_no_room_for_stops_the_run_too(tmp_path):
    rubric = "rubric: support\nitems: [{id: kind, criterion: Is kind., judge: default}]\n"
    votes = {"confidence": "votes", "votes": 5, "sampling": {"temperature": 1, "max_tokens": 50}}
    with JudgeServer() as server:
        options = project(tmp_path, server.url, rubric=rubric, budget={"tokens": 360}, **votes)
        with pytest.raises(GrapeError, match=r"its budget of 360 tokens is spent \(360\)"):
            asyncio.run(grape.score(rows(1, 1), **options))
        assert len(server.bodies) == 3
        assert counts(options["log"])["verdicts"] == 0


@pytest.mark.slow
def test_a_training_run_whose_budget_is_spent_stops_before_its_step_and_goes_on_with_a_larger_one(tmp_path):
    with JudgeServer(fair) as server:
        path = apprentice(tmp_path, judge=server.url, steps=2)
        settings = json.loads((tmp_path / "judge.yaml").read_text())
        (tmp_path / "judge.yaml").write_text(json.dumps({**settings, "budget": {"tokens": 2500}}))
        with pytest.raises(GrapeError, match=r"^judge 'default': its budget of 2500 tokens is spent \(2520\): raise"):
            asyncio.run(grape.train(path))
        assert len(server.bodies) == 21
        assert counts(tmp_path / "log.duckdb") | {"verdicts": 48, "runs": 1} == {
            "runs": 1, "judge_calls": 21, "verdicts": 48, "rewards": 16, "steps": 1,
        }  # fmt: skip
        (tmp_path / "judge.yaml").write_text(json.dumps({**settings, "budget": {"tokens": 1_000_000}}))
        asyncio.run(grape.train(path, resume=True))
        assert len(server.bodies) == 32
    found = ask(tmp_path / "log.duckdb", "select count(*), count(distinct call), count(distinct run) from judge_calls")
    assert found == [(32, 32, 1)]
    assert ask(tmp_path / "log.duckdb", "select step from steps order by 1") == [(1,), (2,)]


# Jury, votes and log-probabilities through critics

QUESTION = Question(question_id="q", category="c", text="What is 6 x 7?")
SECRET = b"\1" * 32


def critic(url, rows=None, **fields):
    config = parse_judge({"judge": "j", "model": "m", "endpoint": url, "timeout": 20, "retries": 1, **fields}, "j.yaml")
    return Critic(config, secret=SECRET, record=[].append if rows is None else rows.append)


def judged(judge_, scale="unit"):
    """The verdict of a critic or a jury that is reached, asked and closed."""

    async def main():
        item = Item.model_validate({"id": "i", "criterion": "Is right.", "judge": "j", "scale": scale})
        try:
            await judge_.reach()
            return await judge_.verdict(QUESTION, Response(response_id="r", question_id="q", text="42"), item)
        finally:
            await judge_.close()

    return asyncio.run(main())


HEAD = ('{"reas', 'oning": "Schön 🎉", ', '"sco', 're": ')


def graded(*score, end=("}",)):
    """A reply whose score is made of tokens with alternatives."""
    tokens = [*HEAD, *score, *end]
    text = "".join(one if isinstance(one, str) else one[0] for one in tokens)
    return Answer(text=text, logprobs=spelt(*tokens))


def test_a_confidence_comes_from_the_tokens_of_the_score():
    rows = []
    with JudgeServer(lambda *_: graded(("1", {"1": 0.6, "0": 0.3, "{": 0.1}))) as server:
        got = judged(critic(server.url, rows, confidence="logprob"), "binary")
    assert (got.outcome, got.raw) == (Outcome.OK, "met")
    assert got.score == pytest.approx(2 / 3)  # 0.6 of 0.6 + 0.3
    assert got.confidence == got.stated == pytest.approx(2 / 3)
    probe, body = server.bodies
    assert (probe["logprobs"], probe["top_logprobs"], probe["max_tokens"]) == (True, 20, 1)
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1024)
    ((_, tokens),) = rows[0]["tokens"]
    assert [text for text, _ in tokens] == ["1", "0", "{"]
    json.dumps(rows[0]["tokens"], allow_nan=False)


def test_the_tokens_may_hold_the_thinking_halves_of_characters_and_an_end_mark():
    score = ("0.2", {"0.2": 0.5, "0.4": 0.5})
    answer = graded(score, end=("}", "<|im_end|>"))
    content = answer.logprobs["content"]
    cake = "🎉".encode()
    for token in content:
        if cake.decode() in token["token"]:
            head, tail = token["token"].encode().split(cake)
            whole = [head + cake[:2], cake[2:] + tail]
            halves = [{"token": "\ufffd", "bytes": list(half), "logprob": 0.0, "top_logprobs": []} for half in whole]
    at = next(number for number, token in enumerate(content) if cake.decode() in token["token"])
    content[at : at + 1] = halves
    content[:0] = spelt("<think>", 'It is "score": 1 ', "</think>", "\n\n")["content"]
    text = answer.text.removesuffix("<|im_end|>")
    with JudgeServer(lambda *_: replace(answer, text=text)) as server:
        got = judged(critic(server.url, confidence="logprob"))
    assert (got.outcome, got.score, got.confidence) == (Outcome.OK, pytest.approx(0.3), pytest.approx(0.9))


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        {"content": None},
        spelt('{"reasoning": "", "score": ', "0", "}"),
        spelt(*HEAD, "1"),
        spelt(*HEAD, "1", "} and more"),
        {"content": [{"token": 5}]},
        {"content": [{"token": "".join([*HEAD, "1", "}"]), "logprob": float("nan")}]},
        {"content": [{"token": "".join([*HEAD, "1", "}"]), "logprob": None}]},
        {"content": [{"token": "x", "logprob": 0, "bytes": [999]}]},
        "odd",
    ],
)
def test_tokens_that_are_missing_or_do_not_make_up_the_reply_are_no_confidence(logprobs):
    good = graded("1")
    with JudgeServer(lambda body, number: good if number == 0 else replace(good, logprobs=logprobs)) as server:
        got = judged(critic(server.url, confidence="logprob"))
    assert (got.outcome, got.score, got.confidence) == (Outcome.TRANSPORT, None, None)
    assert got.detail == "the reply came without the probabilities of its tokens"


@pytest.mark.parametrize(
    ("refusal", "top"),
    [
        ("Cannot request more than 5 logprobs.", 5),
        ("Requested sample logprobs of 20, which is greater than max allowed: 8", 8),
        ("20 is greater than the maximum of 1 - 'top_logprobs'", 1),
        ("top_logprobs: Input should be less than or equal to 11", 11),
        ("top_logprobs must be less than 6", 5),
        ("top_logprobs must be in [0, 10]", 10),
    ],
)
def test_a_server_with_fewer_alternatives_is_asked_for_as_many_as_it_gives(refusal, top):
    def behave(body, number):
        too_many = Answer(status=400, body=json.dumps({"error": {"message": refusal, "code": 400}}).encode())
        return too_many if body["top_logprobs"] > top else graded(("1", {"1": 0.75, "0": 0.25}))

    with JudgeServer(behave) as server:
        got = judged(critic(server.url, confidence="logprob"), "binary")
    assert got.confidence == pytest.approx(0.75)
    assert [body["top_logprobs"] for body in server.bodies] == [20, top, top]


def test_a_limit_that_shows_during_the_work_is_remembered_and_costs_no_retry():
    def behave(body, number):
        limit = b'{"error": {"message": "top_logprobs: at most 5"}}'
        return Answer(status=422, body=limit) if body["top_logprobs"] > 5 else graded("1")

    asked = [replace(call, logprobs=True) for call in calls(3)]
    with JudgeServer(behave) as server:
        records = ask_all(judge(server.url, retries=0), asked, Clock(), at_once=False)
    assert [record.outcome for record in records] == [Outcome.OK] * 3
    assert [body["top_logprobs"] for body in server.bodies] == [20, 5, 5, 5]


def test_votes_are_calls_with_keys_and_seeds_of_their_own():
    rows = []
    sampling = {"temperature": 0.7, "max_tokens": 50, "seed": 11}
    with JudgeServer(
        lambda body, number: verdict(float(body["seed"] % 2), None).replace(', "confidence": null', "")
    ) as s:
        got = judged(critic(s.url, rows, confidence="votes", votes=5, sampling=sampling))
        assert sorted(body["seed"] for body in s.bodies) == [11, 12, 13, 14, 15]
    assert len({row["call"] for row in rows}) == len(set(got.calls)) == 5
    assert sorted(row["sample"] for row in rows) == [0, 1, 2, 3, 4]
    assert (got.outcome, got.score, got.confidence) == (Outcome.OK, pytest.approx(0.6), pytest.approx(0.6))
    assert (got.attempts, got.input_tokens, got.output_tokens) == (5, 500, 100)


@pytest.mark.parametrize(
    ("aggregate", "score"), [("mean", pytest.approx(0.7)), ("median", pytest.approx(0.9)), ("majority", 0.9)]
)
def test_a_jury_of_three_servers_agrees_as_far_as_it_does(aggregate, score):
    scores = (0.9, 0.3, 0.9)
    servers = [JudgeServer(lambda body, number, score=score: verdict(score)) for score in scores]
    with servers[0] as a, servers[1] as b, servers[2] as c:
        members = [critic(server.url, judge=f"j{n}", model=f"m{n}") for n, server in enumerate((a, b, c))]
        config = {"judge": "panel", "client": "jury", "judges": ["j0", "j1", "j2"], "aggregate": aggregate}
        got = judged(Jury(parse_judge(config, "p.yaml"), members))
    assert (got.outcome, got.score, got.judge) == (Outcome.OK, score, "panel")
    assert got.confidence == pytest.approx(0.8)  # 1 - 0.6/3
    assert len(got.calls) == 3


@pytest.mark.parametrize(("aggregate", "score"), [("mean", 0.5), ("median", 0.5), ("majority", 0.25)])
def test_a_jury_of_two_servers(aggregate, score):
    with JudgeServer(lambda *_: verdict(0.25)) as a, JudgeServer(lambda *_: verdict(0.75)) as b:
        members = [critic(a.url, judge="j0"), critic(b.url, judge="j1", model="other")]
        config = {"judge": "panel", "client": "jury", "judges": ["j0", "j1"], "aggregate": aggregate}
        got = judged(Jury(parse_judge(config, "p.yaml"), members))
        assert "42" in user_text(a.bodies[0])
    assert (got.outcome, got.score, got.confidence) == (Outcome.OK, score, 0.75)
