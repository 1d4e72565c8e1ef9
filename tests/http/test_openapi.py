"""/openapi.json is true: it lists what is there, and a property-based test drives the server from it."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from runtime.config import EngineConfig
from runtime.http.answers import OpenApiAnswer
from runtime.http.auth import make_key
from runtime.http.config import HttpConfig
from runtime.http.errors import ERROR_TYPES
from runtime.http.openapi import openapi_document
from runtime.http.routes import PUBLIC, ROUTES
from tests.http.fakes import FakeEngine, served
from tests.http.live import OPTIONS

# A generated name is almost never a tenant's, so every second request gets one that does what the route asks for.
TENANTS = {
    "/v1/embeddings": "vectors",
    "/v1/classify": "intent",
    "/v1/token_classify": "entities",
    "/v1/rerank": "relevance",
    "/v1/score": "relevance",
}
CONFIG = {
    "phases": {"examples": {"enabled": False}, "stateful": {"enabled": False}},
    "checks": {
        "not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503", "504"]},
        # 404: a tenant that is not there. 409: one that is not in the state that If-Match names. 422: what a schema
        # cannot say: 3.0 is an integer to it, a text has characters and no tokens, an upload has bytes.
        "positive_data_acceptance": {"expected-statuses": ["2xx", "404", "409", "422", "503", "504"]},
    },
}


# Made here, since tests are collected before there is a server; another test compares it with the served one.
DOCUMENT = json.loads(openapi_document(EngineConfig(**OPTIONS), HttpConfig(), keys=True, version="0"))
schema = schemathesis.openapi.from_dict(DOCUMENT, config=schemathesis.Config.from_dict(CONFIG))


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_whatever_is_sent_is_answered_as_the_document_says(server, case):
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(model, str) and 0 < len(model) <= 256 and len(json.dumps(case.body, default=str)) % 2:
        case.body["model"] = TENANTS[case.operation.path]
    case.call_and_validate(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"})


def test_the_document_is_the_one_that_is_served(server):
    served_document = server.ask("GET", "/openapi.json").json()
    served_document["info"]["version"] = "0"
    assert served_document == DOCUMENT


async def test_the_document_lists_every_route_and_every_model():
    async with served(FakeEngine()) as client:
        answer = await client.ask("GET", "/openapi.json")
    document = OpenApiAnswer.model_validate_json(answer.body)
    listed = {(method.upper(), path) for path, methods in document.paths.items() for method in methods}
    assert listed == {(route.method, route.path) for route in ROUTES}
    references = set(json.dumps(answer.json).split('"#/components/schemas/')[1:])
    named = {reference.split('"')[0] for reference in references}
    assert named == set(answer.json["components"]["schemas"])
    assert answer.json["x-limits"]["max_body_bytes"] == 8 * 2**20


def test_every_change_of_a_tenant_can_be_conditional():
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            changes = path.startswith("/v1/tenants") and method != "get" and not path.endswith("/prefetch")
            headers = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "header"}
            assert headers == ({"If-Match", "If-None-Match"} if changes else set()), path
            assert ("409" in operation["responses"]) == changes, path


async def test_the_document_says_who_may_call_only_where_keys_are_set(tmp_path):
    secret, key = make_key("a", ["metrics"])
    (tmp_path / "keys").write_text(key.line())
    async with served(FakeEngine(), keys=str(tmp_path / "keys")) as client:
        guarded = (await client.ask("GET", "/openapi.json", key=secret)).json
    async with served(FakeEngine()) as client:
        open_ = (await client.ask("GET", "/openapi.json")).json
    assert "securitySchemes" in guarded["components"]
    assert "securitySchemes" not in open_["components"]
    for route in ROUTES:
        operation = guarded["paths"][route.path][route.method.lower()]
        assert ("security" in operation) == (route.scopes != PUBLIC)
        assert ("401" in operation["responses"]) == (route.scopes != PUBLIC)
        assert set(operation["responses"]) <= {"200", "201", *map(str, ERROR_TYPES)}
        assert "security" not in open_["paths"][route.path][route.method.lower()]
