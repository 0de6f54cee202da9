"""Judge files: what is read, what is refused, and in which words."""

from pathlib import Path

import pytest

from grape.errors import ConfigError
from grape.judge.config import load_judge
from grape.resources import digest


def addresses(judge):
    return [endpoint.url for endpoint in judge.endpoints]


JURY = "judge: j\nclient: jury\njudges: [a, b]\n"
MINIMAL = "judge: j\nendpoint: http://localhost:1/v1\nmodel: m\n"
LOCAL = "judge: j\nclient: transformers\nmodel: m\n"


def judge(tmp_path, text):
    path = tmp_path / "j.yaml"
    path.write_text(text)
    return load_judge(path)


def test_three_lines_are_a_judge(tmp_path):
    got = judge(tmp_path, MINIMAL)
    assert (got.client, addresses(got), got.endpoints[0].api_key, got.model_name) == (
        "openai",
        ["http://localhost:1/v1"],
        None,
        "m",
    )
    assert got.sampling.params() == {"temperature": 0.0, "max_tokens": 1024}
    assert (got.confidence, got.timeout, got.retries, got.concurrency, got.prompt) == ("verbal", 60.0, 3, 64, "score")
    assert (got.source, got.hash) == (str(tmp_path / "j.yaml"), digest(MINIMAL))


def test_a_prompt_may_stand_beside_the_judge(tmp_path):
    (tmp_path / "own.jinja").write_text("{% block user %}{{ response }}{{ criterion }}{% endblock %}")
    assert judge(tmp_path, f"{MINIMAL}prompt: own.jinja\n").prompt == str(tmp_path / "own.jinja")
    assert judge(tmp_path, f"{MINIMAL}prompt: other.jinja\n").prompt == "other.jinja"


def test_everything_of_the_format_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "k-1")
    monkeypatch.setenv("MODEL", "m-2")
    got = judge(
        tmp_path,
        """
judge: j
client: openai
endpoint: [http://a:1/v1, "https://b/v1"]
api_key: $KEY
model: ${MODEL}
prompt: score
sampling: {temperature: 0.5, top_p: 0.9, max_tokens: 5, seed: 1, stop: END, extra_body: {top_k: 3}}
confidence: none
timeout: 5
retries: 0
fallback: second
price: {input: 0.15, output: 0.60}
concurrency: 2
x-owner: us
""",
    )
    assert (addresses(got), got.endpoints[1].api_key, got.model_name) == (
        ["http://a:1/v1", "https://b/v1"],
        "k-1",
        "m-2",
    )
    assert got.sampling.params() == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "seed": 1, "stop": ["END"], "extra_body": {"top_k": 3},
    }  # fmt: skip
    assert got.price is not None
    assert (got.price.input, got.price.output, got.fallback, got.extensions) == (0.15, 0.6, "second", {"x-owner": "us"})
    assert "k-1" not in repr(got)


def test_an_address_may_have_limits_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER", "k-2")
    got = judge(
        tmp_path,
        """\
judge: j
model: m
api_key: k-1
timeout: 9
requests_per_minute: 60
endpoint: [http://a/v1, {url: http://b/v1, api_key: $OTHER, concurrency: 3, timeout: 5, tokens_per_minute: 1000}]
""",
    )
    first, second = got.endpoints
    assert (first.api_key, first.timeout, first.concurrency, first.requests_per_minute) == ("k-1", 9, 64, 60)
    assert first.tokens_per_minute is None
    assert (second.api_key, second.timeout, second.concurrency, second.requests_per_minute) == ("k-2", 5, 3, 60)
    assert second.tokens_per_minute == 1000


def test_null_leaves_a_field_of_the_sampling_out(tmp_path):
    assert judge(tmp_path, MINIMAL + "sampling: {temperature: null, max_completion_tokens: 9}").sampling.params() == {
        "max_completion_tokens": 9
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "modle: x", "modle: Extra inputs are not permitted (got 'x'; did you mean 'model'? known: "),
        ("judge: j\nclient: vllm", "model: client 'vllm' needs it"),
        (LOCAL + "engine: {max_model_len: 64}", "engine: goes only with client: vllm"),
        (
            MINIMAL + "client: opanai",
            "client: no client 'opanai'; did you mean 'openai'? known: jury, openai, replay, tran",
        ),
        (LOCAL.replace("j\n", "j\nconfidence: votes\n", 1), "sampling.temperature: votes need one above 0"),
        (MINIMAL + "confidence: votes", "sampling.temperature: votes need one above 0: without, one reply is repeated"),
        (MINIMAL + "confidence: agreement", "confidence: 'agreement' does not go with client 'openai'"),
        (MINIMAL + "confidence: high", "confidence: no confidence 'high'; known: agreement, logprob, none, verbal, vo"),
        (MINIMAL + "votes: 3", "votes: goes only with confidence: votes"),
        (MINIMAL + "aggregate: median", "aggregate: goes only with confidence: votes, logprob or agreement"),
        (MINIMAL + "budget: {}", "budget: needs tokens or cost"),
        (MINIMAL + "budget: {tokens: 0}", "budget.tokens: Input should be greater than or equal to 1 (got 0)"),
        (MINIMAL + "requests_per_minute: 0", "requests_per_minute: Input should be greater than or equal to 1 (got 0)"),
        (MINIMAL + "json_schema: maybe", "json_schema: Input should be 'auto', 'always' or 'never' (got 'maybe')"),
        (LOCAL + "json_schema: auto", "json_schema: goes only with client: openai or vllm or replay"),
        ("judge: j\nclient: jury", "judges: client 'jury' needs it"),
        (JURY + "model: m", "model: does not go with client: jury; each of its judges has its own"),
        (JURY + "confidence: verbal", "confidence: 'verbal' does not go with client 'jury'"),
        ("judge: j\nclient: jury\njudges: [a]", "judges: List should have at least 2 items after validation, not 1"),
        ("judge: j\nmodel: m\nendpoint: [http://a/v1, http://a/v1]", "endpoint: an address stands twice"),
        (
            "judge: j\nmodel: m\nendpoint: [{url: http://a/v1, rpm: 3}]",
            "endpoint.0.rpm: Extra inputs are not permitted",
        ),
        (
            "judge: j\nclient: replay\nreplies: r\nconfidence: logprob",
            "confidence: 'logprob' does not go with client 'replay', which stores no probabilities",
        ),
        (MINIMAL + "batch: 2", "batch: goes only with client: transformers or vllm"),
        (MINIMAL + "dtype: float32", "dtype: goes only with client: transformers or vllm"),
        ("judge: j\nclient: transformers", "model: client 'transformers' needs it"),
        (LOCAL + "batch: 0", "batch: Input should be greater than or equal to 1 (got 0)"),
        (LOCAL + "dtype: int8", "dtype: Input should be 'float32', 'bfloat16' or 'float16' (got 'int8')"),
        (
            LOCAL + "sampling: {stop: END}",
            "sampling.stop: client 'transformers' has max_tokens, seed, temperature, top_p",
        ),
        (LOCAL + "sampling: {max_tokens: null}", "sampling.max_tokens: client 'transformers' needs it"),
        ("judge: j\nmodel: m", "endpoint: client 'openai' needs it"),
        ("judge: j\nendpoint: http://a/v1", "model: client 'openai' needs it"),
        ("judge: j\nclient: replay", "replies: client 'replay' needs it"),
        ("judge: j\nendpoint: localhost:8000\nmodel: m", "endpoint: 'localhost:8000' is not an address such as "),
        ("judge: j\nendpoint: http://a:x/v1\nmodel: m", "endpoint: 'http://a:x/v1' is not an address such as "),
        ("judge: j\nendpoint: []\nmodel: m", "endpoint: List should have at least 1 item after validation, not 0"),
        (MINIMAL + "replies: r.jsonl", "replies: goes only with client: replay"),
        (MINIMAL + "timeout: 0", "timeout: Input should be greater than 0 (got 0)"),
        (MINIMAL + "timeout: .nan", "timeout: Input should be a finite number (got nan)"),
        (MINIMAL + "timeout: '60'", "timeout: Input should be a valid number (got '60')"),
        (MINIMAL + "retries: true", "retries: Input should be a valid integer (got True)"),
        (MINIMAL + "retries: -1", "retries: Input should be greater than or equal to 0 (got -1)"),
        (MINIMAL + "sampling: {temprature: 0}", "sampling.temprature: Extra inputs are not permitted (got 0; did you "),
        (MINIMAL + "sampling: {temperature: hot}", "sampling.temperature: Input should be a valid number (got 'hot')"),
        (MINIMAL + "sampling: {extra_body: {model: x}}", "sampling.extra_body: 'model' is set by the judge itself"),
        (MINIMAL + "sampling: {extra_body: {a: .inf}}", "sampling.extra_body: not plain data: Out of range float"),
        (MINIMAL + "price: {input: -1}", "price.input: Input should be greater than or equal to 0 (got -1)"),
        (MINIMAL + "api_key: $1", "api_key: '$1' is not the name"),
        (MINIMAL + "api_key: $a-b", "api_key: '$a-b' is not the name of an environment variable"),
        (
            "judge: j\nclient: replay\nreplies: r\nparser: ratings",
            "parser: Input should be 'json', 'rating' or 'label'",
        ),
        (
            "judge: j\nclient: replay\nreplies: r\nparser: rating\nconfidence: verbal",
            "confidence: 'verbal' is not available with parser 'rating'; use none or votes",
        ),
        ("- a", "Input should be a valid dictionary or instance of Judge"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_field_value_and_what_is_known(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        judge(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path}/j.yaml: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["api_key", "model", "endpoint"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_that_is_not_set_is_named_with_its_file_and_field(tmp_path, monkeypatch, field, value):
    monkeypatch.delenv("ABSENT", raising=False)
    if value is not None:
        monkeypatch.setenv("ABSENT", value)
    lines = {"judge": "j", "endpoint": "http://a/v1", "model": "m", field: "$ABSENT"}
    got = judge(tmp_path, "\n".join(f"{key}: {value}" for key, value in lines.items()))
    with pytest.raises(ConfigError) as caught:
        print(got.model_name, got.endpoints)
    assert str(caught.value) == f"{tmp_path}/j.yaml: {field}: environment variable ABSENT is not set"


def test_a_key_that_no_header_can_carry_is_the_users_error(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "a\nb")
    with pytest.raises(ConfigError, match="api_key: holds characters that no HTTP header can carry"):
        assert judge(tmp_path, MINIMAL + "api_key: $KEY").endpoints is None


def test_stored_ratings_state_no_confidence(tmp_path):
    assert judge(tmp_path, "judge: j\nclient: replay\nreplies: r\nparser: rating").confidence == "none"


def test_the_shipped_judges_load():
    shipped = {path.stem: load_judge(path) for path in Path("judges").glob("*.yaml")}
    assert {"default", "local", "openai"} <= set(shipped)
    assert all(judge.judge == name for name, judge in shipped.items())
    assert addresses(shipped["default"]) == ["http://localhost:8000/v1"]
    assert shipped["openai"].api_key == "$OPENAI_API_KEY"
