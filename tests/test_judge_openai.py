"""The client of OpenAI-compatible servers, against a real server on loopback that fails in every way."""

import asyncio
import gzip
import random
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from loopback import Answer, JudgeServer, verdict

from grape.errors import ConfigError
from grape.judge import openai
from grape.judge.call import Call, CallRecord
from grape.judge.config import parse_judge
from grape.judge.openai import OpenAIClient
from grape.types import Outcome

CALL = Call(
    key="k",
    judge="j",
    model="m",
    purpose="score",
    messages=({"role": "user", "content": "How good?"},),
    sampling={"temperature": 0.0, "max_tokens": 9, "extra_body": {"top_k": 3}},
    response_id="r",
    item="i",
)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_PAUSE", 0.001)


def judge(*urls, **fields):
    return parse_judge({"judge": "j", "model": "m", "endpoint": list(urls), "timeout": 20, **fields}, "j.yaml")


def ask(config, times=1):
    async def main():
        client = OpenAIClient(config, random.Random(0))
        try:
            return await asyncio.gather(*(client.ask(CALL) for _ in range(times)))
        finally:
            await client.close()
            await client.close()

    return asyncio.run(main())


def one(behaviour, **fields):
    """The record of one call, and the server that got it."""
    with JudgeServer(behaviour) as server:
        (record,) = ask(judge(server.url, **fields))
    return record, server


def first(fault, then=None):
    """A server that fails once."""
    return lambda body, number: fault if number == 0 else then or verdict()


def test_a_good_answer_is_a_record_with_its_tokens_and_cost():
    record, server = one(None, price={"input": 10, "output": 100})
    assert (record.outcome, record.reply, record.finish_reason) == (Outcome.OK, verdict(), "stop")
    assert (record.input_tokens, record.output_tokens, record.attempts, record.endpoint) == (100, 20, 1, server.url)
    assert record.cost == pytest.approx((100 * 10 + 20 * 100) / 1e6)
    assert 0 < record.latency < 20


def test_the_request_holds_model_messages_and_sampling_and_nothing_of_the_users_own_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    _, server = one(None)
    assert server.bodies == [
        {"model": "m", "messages": list(CALL.messages), "temperature": 0.0, "max_tokens": 9, "top_k": 3}
    ]
    assert "sk-mine" not in str(server.headers)


def test_the_key_of_the_judge_is_sent(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", " sk-judge\n")
    _, server = one(None, api_key="$JUDGE_KEY")
    assert server.headers[0]["authorization"] == "Bearer sk-judge"


TRANSIENT = {
    "429": Answer(status=429),
    "408": Answer(status=408),
    "500": Answer(status=500),
    "503 in HTML": Answer(status=503, body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    "529": Answer(status=529),
    "cut off": Answer(text=verdict(), cut=True),
    "empty body": Answer(body=b""),
    "not JSON": Answer(body=b"upstream error"),
    "HTML": Answer(body=b"<html></html>", headers={"Content-Type": "text/html"}),
    "not UTF-8": Answer(body=b'{"choices": "\xff\xfe"}'),
    "JSON but a list": Answer(body=b"[]"),
    "JSON but null": Answer(body=b"null"),
    "deep": Answer(body=b"[" * 100_000),
    "no choices": Answer(body=b"{}"),
    "null choices": Answer(body=b'{"choices": null}'),
    "no message": Answer(body=b'{"choices": [{"finish_reason": "stop"}]}'),
    "a number for content": Answer(body=b'{"choices": [{"message": {"content": 5}}]}'),
    "error with status 200": Answer(body=b'{"error": {"message": "overloaded", "code": 502}}'),
    "not HTTP": Answer(raw=b"SSH-2.0-OpenSSH_9.9\r\n"),
    "hung up": Answer(raw=b""),
    "half a header": Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Le"),
    "a header that is none": Answer(raw=b"HTTP/1.1 200 OK\r\n\x00bad\r\n\r\n"),
    "broken chunks": Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "broken compression": Answer(body=gzip.compress(b"{}")[:12] + b"xx", headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_a_passing_fault_is_tried_again(fault):
    record, server = one(first(fault))
    assert (record.outcome, record.reply, record.attempts) == (Outcome.OK, verdict(), 2)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_a_fault_that_stays_is_transport_after_the_retries_and_has_no_reply(fault):
    record, server = one(lambda body, number: fault, retries=2)
    assert (record.outcome, record.reply, record.attempts) == (Outcome.TRANSPORT, None, 3)
    assert len(server.bodies) == 3
    assert record.detail
    assert "\n" not in record.detail
    assert not record.answered


def test_a_server_that_says_nothing_is_a_timeout_in_bounded_time():
    record, _ = one(lambda body, number: Answer(hang=True), retries=1, timeout=0.2)
    assert (record.outcome, record.reply, record.attempts) == (Outcome.TIMEOUT, None, 2)
    assert record.detail == "no answer within 0.2 s"
    assert record.latency < 10


def test_a_server_that_hangs_once_is_asked_again():
    record, _ = one(first(Answer(hang=True)), timeout=0.5)
    assert (record.outcome, record.attempts) == (Outcome.OK, 2)


@pytest.mark.parametrize("status", [400, 404, 405, 413, 422])
def test_a_request_that_the_server_will_never_take_is_not_repeated(status):
    record, server = one(lambda body, number: Answer(status=status))
    assert (record.outcome, record.attempts, len(server.bodies)) == (Outcome.TRANSPORT, 1, 1)
    assert record.detail.startswith(f"status {status}: ")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_says_so_and_is_not_repeated_or_shown(status):
    body = b'{"error": {"message": "Incorrect API key provided: sk-judge"}}'
    record, server = one(lambda *_: Answer(status=status, body=body), api_key="sk-judge")
    assert (record.outcome, len(server.bodies)) == (Outcome.TRANSPORT, 1)
    assert record.detail.startswith(f"the server refuses the api_key: status {status}: ")
    assert "sk-judge" not in record.detail


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "filtered", "code": "content_filter"}}',
        b'{"error": {"message": "This request violates our Content Policy.", "code": null}}',
        b'{"error": {"message": "x", "code": "content_policy_violation", "type": "invalid_request_error"}}',
    ],
)
def test_a_content_filter_is_a_refusal_which_is_an_answer(body):
    record, server = one(lambda *_: Answer(status=400, body=body))
    assert (record.outcome, record.reply, len(server.bodies)) == (Outcome.REFUSED, None, 1)
    assert record.answered


def test_the_servers_refusal_field_is_kept_as_the_reply():
    record, _ = one(lambda *_: Answer(text=None, refusal="I won't."))
    assert (record.outcome, record.reply, record.finish_reason) == (Outcome.OK, "I won't.", "refusal")


def test_content_in_parts_is_joined_and_null_is_empty():
    body = b'{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]}'
    record, _ = one(lambda *_: Answer(body=body))
    assert (record.reply, record.finish_reason, record.input_tokens, record.cost) == ("ab", None, None, None)
    record, _ = one(lambda *_: Answer(text=None, finish_reason="length"))
    assert (record.outcome, record.reply, record.finish_reason) == (Outcome.OK, "", "length")


@pytest.mark.parametrize("usage", ['{"prompt_tokens": 1e30}', '{"prompt_tokens": -1}', '"many"', "[]", "null"])
def test_an_odd_count_of_tokens_is_as_if_absent(usage):
    body = f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {usage}}}'.encode()
    record, _ = one(lambda *_: Answer(body=body))
    assert (record.outcome, record.reply, record.input_tokens) == (Outcome.OK, "x", None)


def test_a_reply_with_half_a_surrogate_pair_can_be_stored():
    record, _ = one(lambda *_: Answer(text="\ud800!"))
    assert record.reply == "\ufffd!"


def pauses(monkeypatch, headers, **fields):
    """How long the client would have slept before its retries."""
    slept = []

    async def note(seconds):
        slept.append(seconds)

    monkeypatch.setattr(openai.asyncio, "sleep", note)
    one(lambda *_: Answer(status=429, headers=headers), **fields)
    return slept


def test_retry_after_is_honoured_up_to_the_timeout(monkeypatch):
    assert all(7 <= seconds < 8 for seconds in pauses(monkeypatch, {"Retry-After": "7"}))
    assert all(20 <= seconds < 21 for seconds in pauses(monkeypatch, {"Retry-After": "3600"}))
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
    assert all(5 < seconds < 11 for seconds in pauses(monkeypatch, {"Retry-After": date}))


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "inf", "", "Wed, 99 Nov 2026"])
def test_an_odd_retry_after_is_as_if_absent(monkeypatch, value):
    assert all(0 <= seconds < 1 for seconds in pauses(monkeypatch, {"Retry-After": value}))


def test_pauses_without_retry_after_are_jittered_and_grow(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_PAUSE", 0.5)
    slept = pauses(monkeypatch, {}, retries=8)
    assert len(set(slept)) == 8
    assert all(seconds <= min(0.5 * 2**number, 20) for number, seconds in enumerate(slept))
    assert max(slept) > 2


def test_no_more_requests_are_under_way_than_the_judge_allows():
    with JudgeServer(lambda *_: Answer(text=verdict(), delay=0.05)) as server:
        records = ask(judge(server.url, concurrency=3), times=12)
    assert server.most_at_once == 3
    assert [record.outcome for record in records] == [Outcome.OK] * 12


def test_several_endpoints_take_turns_and_a_retry_goes_to_the_next():
    with JudgeServer() as good, JudgeServer(lambda *_: Answer(status=500)) as bad:
        records = ask(judge(good.url, bad.url), times=4)
    assert [record.outcome for record in records] == [Outcome.OK] * 4
    assert {record.endpoint for record in records} == {good.url}
    assert len(bad.bodies) >= 2


def test_a_call_that_is_cancelled_ends_at_once():
    async def main(url):
        client = OpenAIClient(judge(url, timeout=30))
        task = asyncio.create_task(client.ask(CALL))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.close()

    with JudgeServer(lambda *_: Answer(hang=True)) as server:
        asyncio.run(asyncio.wait_for(main(server.url), 10))


def reach(*urls):
    async def main():
        client = OpenAIClient(judge(*urls))
        try:
            await client.reach()
        finally:
            await client.close()

    asyncio.run(main())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_there_is_reached():
    with JudgeServer() as server:
        reach(server.url)


def test_a_server_that_knows_no_models_is_there_all_the_same():
    with JudgeServer() as server:
        reach(server.url.replace("/v1", "/nothing/here"))


def test_a_server_that_stumbles_once_is_reached_all_the_same():
    async def main():
        async def behave(reader, writer):
            connections.append(await reader.readuntil(b"\r\n\r\n"))
            if len(connections) > 1:
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            writer.close()

        connections = []
        server = await asyncio.start_server(behave, "127.0.0.1", 0)
        client = OpenAIClient(judge(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"))
        await client.reach()
        await client.close()
        server.close()
        return len(connections)

    assert asyncio.run(main()) == 2


def test_a_server_that_is_not_there_is_one_line():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ConfigError) as caught:
        reach(url)
    assert str(caught.value).startswith(f"judge 'j': cannot reach {url}: ")
    assert "failed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_of_several_servers_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{free_port()}/v1"
    with JudgeServer() as server, pytest.raises(ConfigError, match=f"cannot reach {url}"):
        reach(server.url, url)


def test_a_host_that_does_not_exist_is_one_line():
    with pytest.raises(ConfigError, match=r"judge 'j': cannot reach http://no-such-host\.invalid/v1: "):
        reach("http://no-such-host.invalid/v1")


def test_a_call_to_a_dead_server_is_transport():
    (record,) = ask(judge(f"http://127.0.0.1:{free_port()}/v1", retries=1))
    assert isinstance(record, CallRecord)
    assert (record.outcome, record.attempts) == (Outcome.TRANSPORT, 2)
    assert "failed" in record.detail
