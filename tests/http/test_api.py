"""The routes on a real engine: shapes, numbers, the openai client, tenants as a resource, and bad input."""

import base64
import concurrent.futures

import numpy as np
import openai
import pytest
import torch

from runtime.http import answers
from tests.random_tenants import Factory
from tests.tiny import TEXTS
from vbert.checkpoint import write_tenant
from vbert.reference import dense_forward
from vbert.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(server):
    return Tokenizer.load(server.backbone.folder, server.backbone.config)


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def dense(server, tokenizer):
    """What the dense reference says: a tenant's raw head output for one input."""

    def forward(model, item):
        encoded = tokenizer.encode([item])[0]
        module = server.modules.get(model)
        return dense_forward(
            server.backbone, module, torch.tensor(encoded.token_ids), torch.tensor(encoded.type_ids)
        ).numpy()

    return forward


def answer_of(response, shape, model):
    """The checked shape; the parts every answer has are as promised."""
    assert response.status_code == 200, response.text
    answer = shape.model_validate_json(response.content)
    assert answer.model == model
    assert answer.version == (0 if model == "base" else 1)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    timings = answer.timings
    parts = timings.tokenize + timings.queue + timings.load + timings.compute
    assert 0 < parts <= timings.total + 0.1
    assert float(response.headers["x-inference-time"]) == pytest.approx(timings.compute, abs=0.51)
    return answer


# ---- inference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["base", "vectors"])
def test_embeddings(server, dense, model):
    response = server.infer("embeddings", model, input=list(TEXTS))
    answer = answer_of(response, answers.EmbeddingsAnswer, model)
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    for row, text in zip(answer.data, TEXTS, strict=True):
        np.testing.assert_allclose(row.embedding, dense(model, text), atol=1e-4)
        assert np.linalg.norm(row.embedding) == pytest.approx(1, abs=1e-4)


def test_embeddings_have_exactly_the_shape_of_openai(server):
    content = server.infer("embeddings", "base", input="hello").json()
    assert content["object"] == "list"
    assert {"object", "data", "model", "usage"} <= set(content)
    assert set(content["data"][0]) == {"object", "index", "embedding"}
    assert set(content["usage"]) == {"prompt_tokens", "total_tokens"}


def test_the_openai_client(server, client, tokenizer, dense):
    expected = np.stack([dense("vectors", text) for text in TEXTS])
    ids = [encoded.token_ids for encoded in tokenizer.encode(list(TEXTS))]
    for value in (list(TEXTS), ids):
        for encoding_format in (openai.NOT_GIVEN, "float", "base64"):
            answer = client.embeddings.create(model="vectors", input=value, encoding_format=encoding_format)
            rows = [row.embedding for row in answer.data]
            if encoding_format == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            np.testing.assert_allclose(rows, expected, atol=1e-4)
            assert answer.model == "vectors"
            assert answer.usage.prompt_tokens == sum(map(len, ids))
    for single in (TEXTS[0], ids[0]):
        answer = client.embeddings.create(model="vectors", input=single, user="someone", dimensions=7)
        np.testing.assert_allclose([row.embedding for row in answer.data], expected[:1], atol=1e-4)


def test_the_openai_client_knows_our_errors(server, client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="nobody", input="x")
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == ("unknown_tenant", "model", "NotFoundError")
    with pytest.raises(openai.UnprocessableEntityError) as width:
        client.embeddings.create(model="vectors", input="x", dimensions=8)
    assert width.value.param == "dimensions"
    assert "7" in width.value.message
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model="base", input="x")
    with pytest.raises(openai.UnprocessableEntityError, match="serves"):
        client.embeddings.create(model="intent", input="x")


def test_the_openai_client_lists_models(server, client):
    models = {model.id: model for model in client.models.list()}
    assert {"base", *server.modules} <= set(models)
    assert models["base"].parent is None
    assert models["intent"].parent == "base"
    assert client.models.retrieve("intent") == models["intent"]
    assert client.models.retrieve("base") == models["base"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_classify(server, dense):
    inputs = [TEXTS[0], [TEXTS[1], TEXTS[2]], TEXTS[3]]
    answer = answer_of(server.infer("classify", "intent", input=inputs), answers.ClassifyAnswer, "intent")
    assert (answer.labels, answer.problem) == (["label0", "label1", "label2"], "single_label")
    for row, item in zip(answer.data, inputs, strict=True):
        logits = dense("intent", tuple(item) if isinstance(item, list) else item)
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(row.probabilities, expected, atol=1e-4)
        assert row.label == f"label{expected.argmax()}"
        assert row.num_classes == 3


def test_classify_leaves_early_as_the_request_says(server):
    factory = Factory(server.backbone, seed=31)
    module = factory.with_exits(factory.tenant("lora", num_labels=2), 1, threshold=1.0)
    assert server.ask("PUT", "/v1/tenants/acme.exits", data=write_tenant(module)).status_code == 201
    answers_of = [
        server.infer("classify", "acme.exits", input=TEXTS[0], **terms)
        for terms in ({}, {"exit_threshold": 0.0}, {"exit_threshold": 1.0}, {"exit_threshold": 1.5})
    ]
    assert [answer.json().get("exits") for answer in answers_of] == [[None], [1], [None], None]
    refused = answers_of[-1]
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "exit_threshold")
    rows = [answer.json()["data"][0]["probabilities"] for answer in answers_of[:3]]
    assert rows[0] == pytest.approx(rows[2], abs=1e-5)
    assert rows[0] != pytest.approx(rows[1], abs=1e-3)


def test_multi_label_and_regression(server, dense):
    answer = answer_of(server.infer("classify", "topics", input=TEXTS[0]), answers.ClassifyAnswer, "topics")
    expected = 1 / (1 + np.exp(-dense("topics", TEXTS[0])))
    np.testing.assert_allclose(answer.data[0].probabilities, expected, atol=1e-4)
    assert answer.data[0].label == [f"label{i}" for i in range(3) if expected[i] >= 0.5]
    answer = answer_of(server.infer("classify", "stars", input=TEXTS[0]), answers.ClassifyAnswer, "stars")
    np.testing.assert_allclose(answer.data[0].probabilities, dense("stars", TEXTS[0]), atol=1e-4)
    assert answer.data[0].label is None


def test_token_classify_counts_code_points_and_takes_words(server):
    text = "élan \N{GRINNING FACE} naïve café"
    response = server.infer("token_classify", "entities", input=[text, text.split()])
    answer = answer_of(response, answers.TokenClassifyAnswer, "entities")
    for entity in answer.data[0].entities:
        assert text[entity.start : entity.end] == entity.text
    for entity in answer.data[1].entities:
        assert " ".join(text.split()[entity.start : entity.end]) == entity.text
    assert answer.data[0].entities


def test_rerank_and_score_agree_with_each_other_and_the_reference(server, dense):
    query, documents = TEXTS[0], list(TEXTS[1:])
    pairs = [[query, document] for document in documents]
    scored = answer_of(server.infer("score", "relevance", input=pairs), answers.ScoreAnswer, "relevance")
    scores = [row.score for row in scored.data]
    expected = [1 / (1 + np.exp(-dense("relevance", tuple(pair))[0])) for pair in pairs]
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    response = server.infer("rerank", "relevance", query=query, documents=documents)
    ranked = answer_of(response, answers.RerankAnswer, "relevance")
    assert sorted(row.index for row in ranked.results) == list(range(len(documents)))
    found = [row.relevance_score for row in ranked.results]
    assert found == sorted(found, reverse=True)
    np.testing.assert_allclose(found, [scores[row.index] for row in ranked.results], atol=1e-4)
    best = server.infer("rerank", "relevance", query=query, documents=documents, top_n=2).json()["results"]
    assert [row["index"] for row in best] == [row.index for row in ranked.results[:2]]


def test_too_long_is_refused_with_both_lengths_or_cut_and_said(server):
    response = server.infer("embeddings", "base", input=["cat", "cat " * 100])
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (422, "input_too_long", "input")
    assert "102" in error["message"]
    limit = str(server.backbone.config.max_length)
    assert limit in error["message"]
    response = server.infer("embeddings", "base", input=["cat", "cat " * 100], truncate=True)
    answer = answer_of(response, answers.EmbeddingsAnswer, "base")
    assert answer.truncated == [False, True]
    assert answer.usage.prompt_tokens == 3 + int(limit)


# ---- tenants --------------------------------------------------------------------------------------------------------


def probabilities(server, model):
    """Of one text, and the version. The last bits depend on the batch-mates and on the number of threads."""
    answer = answers.ClassifyAnswer.model_validate_json(server.infer("classify", model, input="hello").content)
    return np.array(answer.data[0].probabilities), answer.version


def test_the_life_of_a_tenant(server):
    factory = Factory(server.backbone, seed=7)
    one, two = (write_tenant(factory.tenant("lora", head="classify")) for _ in range(2))
    path = "/v1/tenants/acme.life"

    created = server.ask("PUT", path, data=one)
    assert (created.status_code, created.headers["ETag"]) == (201, '"1"')
    fields = answers.TenantAnswer.model_validate_json(created.content)
    assert (fields.id, fields.version, fields.active, fields.task, fields.num_bytes) == (
        "acme.life", 1, True, "classify", len(one),
    )  # fmt: skip
    again = server.ask("PUT", path, data=one)
    assert (again.status_code, again.headers["ETag"], again.json()) == (200, '"1"', created.json())
    first, version = probabilities(server, "acme.life")
    assert version == 1

    assert server.ask("PUT", path, data=two, headers={"If-Match": '"7"'}).status_code == 409
    newer = server.ask("PUT", path, data=two, headers={"If-Match": '"1"'})
    assert (newer.status_code, newer.headers["ETag"]) == (201, '"2"')
    second, version = probabilities(server, "acme.life")
    assert version == 2
    assert not np.allclose(first, second, atol=1e-3)

    versions = answers.VersionsAnswer.model_validate_json(server.ask("GET", f"{path}/versions").content)
    assert [(row.version, row.active) for row in versions.data] == [(1, False), (2, True)]
    conflict = server.ask("POST", f"{path}/activate", json={"version": 1}, headers={"If-Match": '"1"'})
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "version_conflict")
    assert server.ask("POST", f"{path}/activate", json={"version": 1}).headers["ETag"] == '"1"'
    again, version = probabilities(server, "acme.life")
    assert version == 1
    np.testing.assert_allclose(again, first, atol=1e-4)
    conflict = server.ask("POST", f"{path}/rollback", headers={"If-Match": '"2"'})
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "version_conflict")
    assert server.ask("POST", f"{path}/rollback", headers={"If-None-Match": "*"}).status_code == 409
    assert server.ask("POST", f"{path}/rollback", headers={"If-Match": '"1"'}).headers["ETag"] == '"2"'
    assert server.ask("GET", path).json()["version"] == 2
    assert server.ask("POST", f"{path}/activate", json={"version": 9}).status_code == 404

    assert server.ask("PUT", path, data=one, headers={"If-None-Match": "*"}).status_code == 409
    assert server.ask("DELETE", path, headers={"If-Match": '"1"'}).status_code == 409
    deleted = server.ask("DELETE", path)
    assert answers.DeletedAnswer.model_validate_json(deleted.content).id == "acme.life"
    for response in (
        server.ask("GET", path),
        server.ask("DELETE", path),
        server.infer("classify", "acme.life", input="x"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_tenant")


def test_bad_uploads_say_why_and_harm_nobody(server):
    good = write_tenant(Factory(server.backbone, seed=8).tenant("lora", head="classify"))
    weights = bytearray(good)
    weights[-4:] = np.float32("nan").tobytes()
    before, _ = probabilities(server, "intent")
    cases = [
        ("bad.cut", good[: len(good) // 2], 422, "corrupt_file"),
        ("bad.empty", b"", 422, "corrupt_file"),
        ("bad.text", b"not a tensor file", 422, "corrupt_file"),
        ("bad.nan", bytes(weights), 422, "corrupt_file"),
        ("bad.large", b"x" * 1_000_001, 413, "request_too_large"),
        ("base", good, 422, "invalid_tenant_id"),
        ("-x", good, 422, "invalid_tenant_id"),
        ("x" * 129, good, 422, "invalid_tenant_id"),
    ]
    for tenant, data, status, code in cases:
        response = server.ask("PUT", f"/v1/tenants/{tenant}", data=data)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), tenant
        assert server.infer("classify", tenant, input="x").status_code in (404, 422)
    np.testing.assert_allclose(probabilities(server, "intent")[0], before, atol=1e-4)


@pytest.mark.parametrize(
    "tenant", ["..%2F..%2Fetc%2Fpasswd", "..", "%2e%2e", ".hidden", "a%00b", "a%2Fb", "%F0%9F%98%80", "a\\b", "%FF"]
)
def test_ids_never_become_paths(server, tenant):
    prepared = [("GET", {}), ("PUT", {"data": b"x"}), ("DELETE", {})]
    for method, content in prepared:
        response = server.ask(method, f"/v1/tenants/{tenant}", **content)
        assert response.status_code in (404, 405, 422), (method, response.text)
        assert "code" in response.json()["error"]
    response = server.infer("embeddings", "../../etc/passwd", input="x")
    assert response.status_code in (404, 422)


def test_bad_input_does_not_disturb_the_next_request(server):
    for body, status in (
        ({"input": ["x"] * 5000}, 413),
        ({"input": [299, 300]}, 422),
        ({"input": "x" * 300_000}, 413),
        ({"input": ["fine", "\n"]}, 422),
        ({"input": "x", "timeout_ms": 1}, (200, 504)),
    ):
        response = server.infer("embeddings", "base", **body)
        assert response.status_code in (status if isinstance(status, tuple) else (status,)), response.text
        assert server.infer("embeddings", "base", input="hello").status_code == 200
    response = server.ask("POST", "/v1/embeddings", data=b'{"model": "base", "input": "\xff"}',
                          headers={"Content-Type": "application/json"})  # fmt: skip
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_body")


def test_a_tenant_may_be_replaced_and_removed_while_it_is_served(server):
    factory = Factory(server.backbone, seed=9)
    files = [write_tenant(factory.tenant("lora", head="classify")) for _ in range(2)]
    server.ask("PUT", "/v1/tenants/busy", data=files[0])
    statuses = set()

    def ask(_):
        response = server.infer("classify", "busy", input=["hello"] * 5)
        statuses.add((response.status_code, response.json().get("error", {}).get("code")))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(ask, i) for i in range(40)]
        for data in (files[1], files[0], files[1]):
            assert server.ask("PUT", "/v1/tenants/busy", data=data).status_code in (200, 201)
        assert server.ask("DELETE", "/v1/tenants/busy").status_code == 200
        for future in running:
            future.result()
    assert statuses <= {(200, None), (404, "unknown_tenant")}
    assert server.infer("classify", "intent", input="hello").status_code == 200


# ---- operation ------------------------------------------------------------------------------------------------------


def test_health_and_metrics_of_a_real_engine(server):
    server.infer("classify", "intent", input="hello")
    ready = answers.ReadyAnswer.model_validate_json(server.ask("GET", "/health/ready").content)
    assert ready.status == "ready"
    assert ready.canary["ok"] is True
    assert ready.watchdog["stalled_s"] >= 0
    text = server.ask("GET", "/metrics").text
    for name in ("queue", "load", "compute", "tokenize", "total"):
        assert f'vbert_request_{name}_seconds_count{{kind="low_rank"}}' in text
    assert 'vbert_computed_inputs_total{kind="low_rank"}' in text
    assert not [name for name in server.modules if f'"{name}"' in text]
