"""What a body may be: strict types, one sentence about what is wrong, and what reaches the engine."""

import json
import sys
from collections import Counter

import pytest

from runtime.http.answers import ErrorAnswer
from runtime.http.bodies import ClassifyBody, EmbeddingsBody, ScoreBody, TokenClassifyBody, parse_json
from tests.http.fakes import FakeEngine, served

M = {"model": "acme.a"}
EMBED, CLASSIFY, WORDS = "/v1/embeddings", "/v1/classify", "/v1/token_classify"


@pytest.mark.parametrize(
    ("path", "value", "inputs"),
    [
        (EMBED, "text", ["text"]),
        (EMBED, ["one", "two"], ["one", "two"]),
        (EMBED, [1, 2, 3], [[1, 2, 3]]),
        (EMBED, [[1, 2], [3]], [[1, 2], [3]]),
        (CLASSIFY, "text", ["text"]),
        (CLASSIFY, ["a", "b"], ["a", "b"]),
        (CLASSIFY, [["a", "b"]], [("a", "b")]),
        (CLASSIFY, ["a", ["b", "c"]], ["a", ("b", "c")]),
        (WORDS, "some text", ["some text"]),
        (WORDS, ["a", "b"], ["a", "b"]),
        (WORDS, [["some", "words"], "text"], [["some", "words"], "text"]),
        ("/v1/score", [["a", "b"], ["c", "d"]], [("a", "b"), ("c", "d")]),
    ],
)
async def test_inputs_reach_the_engine_as_they_are_meant(path, value, inputs):
    engine = FakeEngine()
    async with served(engine) as client:
        answer = await client.ask("POST", path, json=M | {"input": value})
    assert answer.status == 200
    assert engine.calls[0][2]["inputs"] == inputs
    assert [type(item) for item in engine.calls[0][2]["inputs"]] == [type(item) for item in inputs]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (EMBED, {"input": "x"}, "model"),
        (EMBED, M, "input"),
        (EMBED, M | {"input": ""}, "input"),
        (EMBED, M | {"input": " \n\t"}, "input"),
        (EMBED, M | {"input": []}, "input"),
        (EMBED, M | {"input": [[]]}, "input"),
        (EMBED, M | {"input": ["a", ""]}, "input"),
        (EMBED, M | {"input": ["a", 1]}, "input"),
        (EMBED, M | {"input": [1, "a"]}, "input"),
        (EMBED, M | {"input": [-1]}, "input"),
        (EMBED, M | {"input": [1.0]}, "input"),
        (EMBED, M | {"input": [True]}, "input"),
        (EMBED, M | {"input": [10**30]}, "input"),
        (EMBED, M | {"input": None}, "input"),
        (EMBED, M | {"input": {"text": "a"}}, "input"),
        (EMBED, M | {"input": [["a", "b"]]}, "input"),
        (EMBED, {"model": 3, "input": "x"}, "model"),
        (EMBED, {"model": "", "input": "x"}, "model"),
        (EMBED, M | {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        (EMBED, M | {"input": "x", "dimensions": "4"}, "dimensions"),
        (EMBED, M | {"input": "x", "dimensions": 5}, "dimensions"),
        (EMBED, M | {"input": "x", "truncate": 1}, "truncate"),
        (EMBED, M | {"input": "x", "timeout_ms": 0}, "timeout_ms"),
        (EMBED, M | {"input": "x", "timeout_ms": 1.5}, "timeout_ms"),
        (EMBED, M | {"input": "x", "temperature": 1}, "temperature"),
        (EMBED, [1], None),
        (EMBED, "text", None),
        (EMBED, None, None),
        (CLASSIFY, M | {"input": [["a", "b", "c"]]}, "input"),
        (CLASSIFY, M | {"input": [["a"]]}, "input"),
        (CLASSIFY, M | {"input": [["a", 1]]}, "input"),
        (CLASSIFY, M | {"input": [["a", ""]]}, "input"),
        (WORDS, M | {"input": [[]]}, "input"),
        (WORDS, M | {"input": [["a", ""]]}, "input"),
        ("/v1/rerank", M | {"query": "q"}, "documents"),
        ("/v1/rerank", M | {"query": "q", "documents": "d"}, "documents"),
        ("/v1/rerank", M | {"query": "q", "documents": []}, "documents"),
        ("/v1/rerank", M | {"query": ["q"], "documents": ["d"]}, "query"),
        ("/v1/rerank", M | {"query": "q", "documents": ["d"], "top_n": 0}, "top_n"),
        ("/v1/score", M | {"input": ["a", "b"]}, "input"),
        ("/v1/score", M | {"input": [["a", "b", "c"]]}, "input"),
        ("/v1/tenants/acme.a/activate", {"version": "2"}, "version"),
        ("/v1/tenants/acme.a/activate", {"version": 0}, "version"),
        ("/v1/tenants/acme.a/activate", {}, "version"),
    ],
)
async def test_wrong_values_are_named(client, path, body, param):
    headers = {"Content-Type": "application/json"}
    answer = await client.ask("POST", path, data=json.dumps(body), headers=headers)
    error = ErrorAnswer.model_validate_json(answer.body).error
    assert (answer.status, error.code, error.param) == (422, "invalid_value", param)
    assert len(error.message) < 300
    assert "validation" not in error.message


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}}",
        b'{"model": "\xff"}',
        b'{"input": "\\ud800"}',
        b"\x00",
        b"[" * 10_000,
        b"{'a': 1}",
        b"\xfe\xff",
    ],
)
async def test_what_is_not_json_is_malformed(client, data):
    for path in (EMBED, "/v1/tenants/acme.a/activate"):
        answer = await client.ask("POST", path, data=data, headers={"Content-Type": "application/json"})
        assert (answer.status, answer.code) == (400, "malformed_body")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "value", "start"),
    [
        ("/v1/score", [["a"]], "input[0] is a list of 1; input must be a list of pairs"),
        ("/v1/score", [["a", "b"], ["a", " "]], "input[1][1] is ' '; "),
        ("/v1/embeddings", "", "input is ''; it must be a text, "),
        ("/v1/embeddings", ["a", ""], "input[1] is ''; "),
        ("/v1/embeddings", [1, "a"], "input[1] is 'a'; "),
        ("/v1/embeddings", [[1], [2, -1]], "input[1][1] is -1; "),
        ("/v1/classify", ["a", ["b", ""]], "input[1][1] is ''; "),
        ("/v1/classify", ["a", ["b", "c", "d"]], "input[1] is a list of 3; "),
        ("/v1/token_classify", [""], "input[0] is ''; input must be a text, "),
        ("/v1/token_classify", [["a", ""]], "input[0][1] is ''; "),
        ("/v1/token_classify", [], "input is a list of 0; it must be a text, "),
    ],
)
async def test_the_wrong_item_is_named(client, path, value, start):
    answer = await client.ask("POST", path, json=M | {"input": value})
    assert answer.json["error"]["message"].startswith(start)


async def test_a_million_wrong_items_make_one_short_error():
    async with served(FakeEngine()) as client:
        answer = await client.ask("POST", EMBED, json=M | {"input": [None] * 150_000})
    assert answer.status == 422
    assert answer.json["error"]["message"].startswith("input[0] is None; input must be a text, ")


@pytest.mark.parametrize(
    ("body", "items"),
    [
        (EmbeddingsBody, [[1, 2]] * 1000),
        (EmbeddingsBody, ["a"] * 1000),
        (ClassifyBody, [["a", "b"]] * 1000),
        (TokenClassifyBody, [["a", "b"]] * 1000),
        (ScoreBody, [["a", "b"]] * 1000),
    ],
)
def test_another_thread_may_run_between_any_two_items_of_a_body(body, items):
    """CPython hands the interpreter over where Python code begins, and never inside pydantic's compiled code."""
    calls = Counter()
    data = json.dumps(M | {"input": items}).encode()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        parse_json(body, data)
    finally:
        sys.setprofile(None)
    assert calls["call"] >= len(items)


async def test_terms_reach_the_engine():
    engine = FakeEngine()
    async with served(engine) as client:
        body = M | {
            "input": "x",
            "truncate": True,
            "timeout_ms": 250,
            "path": "exact",
            "priority": "batch",
            "user": "someone",
            "dimensions": 4,
        }
        assert (await client.ask("POST", EMBED, json=body)).status == 200
        assert (await client.ask("POST", EMBED, json=M | {"input": "x", "timeout_ms": None})).status == 200
        rerank = M | {"query": "q", "documents": ["a", "b"], "top_n": 1}
        assert len((await client.ask("POST", "/v1/rerank", json=rerank)).json["results"]) == 1
    terms = [keywords for _, _, keywords in engine.calls]
    given = {"deadline_s": 0.25, "path": "exact", "priority": "batch", "caller": "local"}
    left_out = {"truncate": False, "deadline_s": None, "path": None, "priority": "interactive", "caller": "local"}
    assert terms[0] == {"inputs": ["x"], "truncate": True} | given
    assert terms[1] == {"inputs": ["x"]} | left_out
    assert terms[2] == {"top_n": 1} | left_out


async def test_numbers_that_json_does_not_have_are_a_failure():
    engine = FakeEngine()
    async with served(engine) as client:
        engine.value = float("nan")
        answer = await client.ask("POST", EMBED, json=M | {"input": "x"})
    assert (answer.status, answer.code) == (500, "compute_failed")


@pytest.mark.parametrize(
    ("headers", "if_match"),
    [
        ({}, None),
        ({"If-Match": '"3"'}, 3),
        ({"If-Match": "*"}, 3),
        ({"If-None-Match": "*"}, 0),
    ],
)
async def test_conditions_reach_the_engine(headers, if_match):
    engine = FakeEngine()
    async with served(engine) as client:
        path = "/v1/tenants/acme.a"
        answers = [
            await client.ask("PUT", path, data=b"x", headers=headers),
            await client.ask("DELETE", path, headers=headers),
            await client.ask("POST", f"{path}/activate", json={"version": 3}, headers=headers),
            await client.ask("POST", f"{path}/rollback", headers=headers),
        ]
    assert [answer.status for answer in answers] == [201, 200, 200, 200]
    assert [answer.headers.get("ETag") for answer in answers] == ['"3"', None, '"3"', '"2"']
    changes = [keywords["if_match"] for method, _, keywords in engine.calls if method != "get_tenant"]
    assert changes == [if_match] * 4


@pytest.mark.parametrize(
    "headers",
    [
        {"If-Match": "3"},
        {"If-Match": 'W/"3"'},
        {"If-Match": '"3", "4"'},
        {"If-Match": '"0"'},
        {"If-Match": '"x"'},
        {"If-None-Match": '"3"'},
        {"If-None-Match": "*", "If-Match": '"3"'},
    ],
)
async def test_conditions_that_are_not_known_are_refused(headers):
    engine = FakeEngine()
    async with served(engine) as client:
        answer = await client.ask("DELETE", "/v1/tenants/acme.a", headers=headers)
    assert (answer.status, answer.code) == (422, "invalid_value")
    assert engine.calls == []


async def test_listings_have_pages():
    engine = FakeEngine()
    engine.tenants = [f"t{i:05d}" for i in range(2500)]
    async with served(engine) as client:
        everything = (await client.ask("GET", "/v1/models")).json
        assert [row["id"] for row in everything["data"]] == ["base", *engine.tenants]
        assert [row["parent"] for row in everything["data"][:2]] == [None, "base"]
        assert not everything["has_more"]
        seen, after, has_more = [], "", True
        while has_more:
            page = (await client.ask("GET", "/v1/tenants", params={"limit": 999, "after": after})).json
            seen += [row["id"] for row in page["data"]]
            after, has_more = seen[-1], page["has_more"]
        assert seen == engine.tenants
        for query in ("limit=0", "limit=x", "limit=1e3", "page=2", "after=" + "x" * 300):
            answer = await client.ask("GET", f"/v1/tenants?{query}")
            assert (answer.status, answer.code) == (422, "invalid_value"), query


async def test_metrics_are_prometheus_text_without_names_of_tenants():
    async with served(FakeEngine()) as client:
        await client.ask("POST", EMBED, json=M | {"input": "x"})
        await client.ask("GET", "/v1/tenants/acme.a")
        await client.ask("GET", "/v1/nothing/acme.a")
        await client.ask("DELETE", "/v1/models/acme.a")
        answer = await client.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    text = answer.body.decode()
    assert "acme" not in text
    for line in (
        'vbert_http_requests_total{method="POST",route="/v1/embeddings",status="200"} 1.0',
        'vbert_http_requests_total{method="GET",route="/v1/tenants/{id}",status="200"} 1.0',
        'vbert_http_requests_total{method="other",route="unknown",status="404"} 1.0',
        'vbert_http_requests_total{method="other",route="unknown",status="405"} 1.0',
        'vbert_resident_bytes{kind="low_rank"} 7.0',
        'vbert_memory_bytes{part="backbone"} 9.0',
        'vbert_sequences_total{event="hits"} 3.0',
        "vbert_event_loop_lag_p99_seconds 0.004",
        "vbert_compute_threads 2.0",
        'vbert_request_queue_seconds_bucket{kind="low_rank+sparse",le="0.001"} 0.0',
        'vbert_request_queue_seconds_bucket{kind="low_rank+sparse",le="0.0025"} 1.0',
        'vbert_request_queue_seconds_bucket{kind="low_rank+sparse",le="+Inf"} 1.0',
        'vbert_request_queue_seconds_sum{kind="low_rank+sparse"} 0.002',
        "vbert_event_loop_lag_seconds_count 1.0",
    ):
        assert line in text.splitlines(), line
