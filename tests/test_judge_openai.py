"""The client of OpenAI-compatible servers, against a real server on loopback that fails in every way."""

import asyncio
import gzip
import json
import random
import socket
from dataclasses import replace

import pytest
from loopback import Answer, JudgeServer, spelt, verdict

from grape.errors import ConfigError
from grape.judge import openai, probe
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


def ask(config, times=1, **options):
    async def main():
        client = OpenAIClient(config, random.Random(0), **options)
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


def test_pauses_are_jittered_and_grow(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_PAUSE", 0.5)
    slept = []

    async def note(seconds):
        slept.append(seconds)

    with JudgeServer(lambda *_: Answer(status=429)) as server:
        ask(judge(server.url, retries=8), sleep=note)
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


def reach(*urls, known=(), **fields):
    async def main():
        client = OpenAIClient(judge(*urls, **fields))
        try:
            await client.reach(known)
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


def test_a_server_that_stumbles_once_is_reached_all_the_same():
    async def main():
        async def behave(reader, writer):
            connections.append(await reader.readuntil(b"\r\n\r\n"))
            if len(connections) > 1:
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": []}')
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


# What `reach` says of a server that is there


HTML = {"Content-Type": "text/html"}
PAGE = Answer(status=404, body=b"<html><h1>404</h1> our models, our shop</html>", headers=HTML)
NOT_FOUND = Answer(status=404, body=b'{"detail": "Not Found"}')


def refusal(status, message, **more):
    """What a server says to a request that it does not take."""
    return Answer(status=status, body=json.dumps({"error": {"message": message, **more}}).encode())


def reached(behaviour=None, models=(), **options):
    """The line that `reach` ends with (the address as URL), or None; and the requests that it took."""
    with JudgeServer(behaviour and (lambda body, number: behaviour), models) as server:
        known = [server.url] if options.pop("known", False) else []
        try:
            reach(server.url, known=known, **options)
        except ConfigError as error:
            return str(error).replace(server.url, "URL"), server.bodies
        return None, server.bodies


@pytest.mark.parametrize("models", [(), ("other", "m")])
def test_a_list_that_has_the_model_or_nothing_is_enough(models):
    assert reached(PAGE, models) == (None, [])


MODEL_LISTS = {
    "without the model": ("x", "y"),
    "403": Answer(status=403),
    "404": NOT_FOUND,
    "404 in HTML": PAGE,
    "405": Answer(status=405),
    "501": Answer(status=501),
    "HTML": Answer(body=b"<html>m</html>", headers=HTML),
    "another object": Answer(body=b'{"models": ["m"]}'),
    "odd entries": Answer(body=b'{"data": ["m", 5, null]}'),
    "null": Answer(body=b"null"),
}


@pytest.mark.parametrize("models", MODEL_LISTS.values(), ids=MODEL_LISTS)
def test_where_the_list_leaves_it_open_one_tiny_call_decides(models):
    line, bodies = reached(Answer(text="1"), models)
    assert line is None
    (body,) = bodies
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 1, 0.0)
    assert "response_format" not in body
    line, bodies = reached(refusal(404, "The model `m` does not exist"), models, known=True)
    assert (line, bodies) == (None, [])


def test_the_tiny_call_limits_its_tokens_by_the_judges_own_word():
    _, (body,) = reached(None, ("x",), sampling={"max_completion_tokens": 500, "temperature": None})
    assert (body["max_completion_tokens"], "max_tokens" in body, "temperature" in body) == (1, False, False)


def test_a_model_list_that_is_bare_is_read():
    assert reached(PAGE, Answer(body=b'[{"id": "m"}]')) == (None, [])


@pytest.mark.parametrize(
    ("behaviour", "models", "line"),
    [
        (None, refusal(401, "no such key sk-judge"), "URL refuses the api_key: status 401: no such key ***"),
        (refusal(401, "bad"), NOT_FOUND, "URL refuses the api_key: status 401: bad"),
        (refusal(403, "not yours"), ("x",), "URL refuses the api_key: status 403: not yours"),
        (
            refusal(404, "The model `m` does not exist"), ("mm", "other"),
            "URL has no model 'm'; did you mean 'mm'? known: mm, other",
        ),
        (
            refusal(404, "model 'm' not found", code="model_not_found"), NOT_FOUND,
            "URL has no model 'm'; status 404: model 'm' not found",
        ),
        (refusal(400, "Model Not Exist"), ("zeta",), "URL has no model 'm'; known: zeta"),
        (refusal(402, "Insufficient Balance"), ("x",), "URL: status 402: Insufficient Balance"),
        (refusal(400, "temperature: must be 1"), ("x",), "URL: status 400: temperature: must be 1"),
    ],
)  # fmt: skip
def test_what_the_user_can_set_right_is_one_line(behaviour, models, line):
    assert reached(behaviour, models, api_key="sk-judge")[0] == f"judge 'j': {line}"


def test_a_server_that_wants_a_key_says_so():
    line, bodies = reached(None, Answer(status=401))
    assert line == "judge 'j': URL asks for an api_key: status 401: told to fail"
    assert bodies == []


WRONG_ADDRESS = {
    "404 in HTML": (PAGE, "status 404: <html><h1>404</h1> our models, our shop</html>"),
    "404": (NOT_FOUND, "status 404: {'detail': 'Not Found'}"),
    "405": (Answer(status=405, body=b""), "status 405: no more said"),
    "HTML": (Answer(body=b"<html>shop</html>", headers=HTML), "the answer is not JSON: <html>shop</html>"),
    "other JSON": (Answer(body=b'{"ok": true}'), "the answer has no choices"),
}


@pytest.mark.parametrize(("answer", "why"), WRONG_ADDRESS.values(), ids=WRONG_ADDRESS)
def test_a_server_that_is_something_else_is_a_wrong_address(answer, why):
    line, _ = reached(answer, PAGE)
    no_server = "does not answer as an OpenAI-compatible server (such addresses usually end in /v1)"
    assert line == f"judge 'j': URL {no_server}: {why}"


BUSY = [Answer(status=429), Answer(status=500), Answer(status=503), Answer(status=408), Answer(hang=True)]


@pytest.mark.parametrize("busy", BUSY)
def test_a_server_that_is_slow_or_overloaded_is_nobodys_error(busy, monkeypatch):
    monkeypatch.setattr(probe, "PROBE", 0.2)
    assert reached(PAGE, busy) == (None, [])
    assert reached(busy, ("x",))[0] is None


@pytest.mark.parametrize(
    "message",
    [
        "Could not finish the message because max_tokens or model output limit was reached.",
        "max_completion_tokens: below the minimum value, 16",
    ],
)
def test_what_a_server_has_against_one_token_is_not_the_judges_fault(message):
    line, bodies = reached(refusal(400, message), ("x",))
    assert (line, len(bodies)) == (None, 1)


NO_PROBABILITIES = "URL gives no probabilities of tokens, which confidence: logprob needs"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(text="1"), "its answer holds none"),
        (Answer(text="1", logprobs={"content": [{"token": "1", "logprob": 0.0}]}), "its answer holds none"),
        (refusal(400, "logprobs is not supported"), "status 400: logprobs is not supported"),
    ],
)
def test_a_server_without_probabilities_is_an_error_where_the_confidence_is_made_of_them(answer, why):
    for models in ((), ("m",), PAGE):
        line, bodies = reached(answer, models, confidence="logprob")
        assert line == f"judge 'j': {NO_PROBABILITIES} ({why}); verbal and votes need none"
        assert {body["top_logprobs"] for body in bodies} == {20}
    assert reached(answer, (), confidence="logprob", known=True) == (None, [])


def test_where_one_token_shows_no_probabilities_the_judges_own_limit_is_tried():
    def behave(body, number):
        return Answer(text="", logprobs={"content": []}) if body["max_tokens"] == 1 else Answer(logprobs=spelt("1"))

    with JudgeServer(behave) as server:
        reach(server.url, confidence="logprob", sampling={"max_tokens": 77})
    assert [body["max_tokens"] for body in server.bodies] == [1, 77]


# A JSON schema for the reply


SCHEMA = {"type": "object", "properties": {"score": {"type": "number"}}}
SCHEMED = replace(CALL, schema=SCHEMA)
FORMAT = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
REFUSALS = {
    "400": refusal(400, "This response_format type is unavailable now"),
    "param": refusal(400, "not supported", param="response_format"),
    "422": Answer(status=422, body=b'{"detail": [{"loc": ["body", "response_format"], "msg": "extra"}]}'),
    "text": Answer(status=400, body=b'{"error": "structured output needs another engine"}'),
    "501": refusal(501, "guided decoding is not there"),
    "grammar": refusal(400, "failed to parse grammar"),
}


def ask_schemed(behaviour, calls, **fields):
    with JudgeServer(behaviour) as server:

        async def main():
            client = OpenAIClient(judge(server.url, **fields), random.Random(0))
            records = [await client.ask(call) for call in calls]
            await client.close()
            return records

        return asyncio.run(main()), server.bodies


def test_the_schema_of_a_call_is_sent():
    _, (body,) = ask_schemed(None, [SCHEMED])
    assert body == {
        "model": "m", "messages": list(CALL.messages), "temperature": 0.0, "max_tokens": 9, "top_k": 3,
        "response_format": FORMAT,
    }  # fmt: skip


@pytest.mark.parametrize("no", REFUSALS.values(), ids=REFUSALS)
def test_a_server_without_schemas_is_asked_again_at_once_and_from_then_on_without(no):
    def behave(body, number):
        return no if "response_format" in body else verdict()

    records, bodies = ask_schemed(behave, [SCHEMED, SCHEMED, SCHEMED], retries=0)
    assert [(record.outcome, record.attempts) for record in records] == [(Outcome.OK, 1)] * 3
    assert ["response_format" in body for body in bodies] == [True, False, False, False]


@pytest.mark.parametrize("no", REFUSALS.values(), ids=REFUSALS)
def test_a_schema_that_must_be_kept_is_never_left_out(no):
    (record,), bodies = ask_schemed(lambda *_: no, [SCHEMED], json_schema="always")
    assert (record.outcome, record.attempts, len(bodies)) == (Outcome.TRANSPORT, 1, 1)
    assert record.detail.startswith("the server has no JSON schema, which json_schema: always needs: status ")
    line, (body,) = reached(no, (), json_schema="always")
    assert line.startswith("judge 'j': URL has no JSON schema for replies, which json_schema: always needs: status ")
    assert body["response_format"]["json_schema"]["strict"] is True
    assert reached(no, (), json_schema="auto") == (None, [])


def test_a_refusal_for_another_reason_is_not_taken_for_one_of_the_schema():
    for fault in (refusal(400, "too long"), refusal(429, "response_format tokens used up"), refusal(401, "grammar")):
        records, bodies = ask_schemed(lambda *_, fault=fault: fault, [SCHEMED], retries=0)
        assert (records[0].outcome, len(bodies)) == (Outcome.TRANSPORT, 1)
    echo = refusal(400, "too long: {'response_format': ...}")  # not the schema's fault, as the second answer shows
    _, bodies = ask_schemed(lambda body, number: verdict() if number > 1 else echo, [SCHEMED, SCHEMED], retries=0)
    assert ["response_format" in body for body in bodies] == [True, False, True]


def test_each_endpoint_has_schemas_or_not():
    with (
        JudgeServer() as one,
        JudgeServer(lambda b, _: REFUSALS["400"] if "response_format" in b else verdict()) as two,
    ):

        async def main():
            client = OpenAIClient(judge(one.url, two.url), random.Random(0))
            for _ in range(6):
                await client.ask(SCHEMED)
            await client.close()

        asyncio.run(main())
    assert ["response_format" in body for body in one.bodies] == [True] * 3
    assert ["response_format" in body for body in two.bodies] == [True, False, False, False]


def test_a_form_of_reply_that_the_judges_file_asks_for_stands():
    own = replace(SCHEMED, sampling={"extra_body": {"response_format": {"type": "json_object"}}})
    (record,), (body,) = ask_schemed(lambda *_: REFUSALS["400"], [own])
    assert body["response_format"] == {"type": "json_object"}
    assert record.detail == "status 400: This response_format type is unavailable now"
