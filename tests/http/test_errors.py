"""Every error class has a status, and every error one JSON shape."""

import logging
import re

import pytest

import runtime.engine  # noqa: F401 - every module that could declare an error is imported
from runtime.errors import ComputeFailed, DeadlineExceeded, Draining, QueueFull, ServerFull, StoreFull, VersionConflict
from runtime.http.errors import ERROR_TYPES, STATUS, status_of
from tests.http.fakes import FakeEngine, served
from vbert.errors import InputTooLong, VbertError

TEXT = {"model": "acme.a", "input": "hello"}


def test_the_table_covers_every_error_class():
    def tree(cls):
        return {cls}.union(*(tree(child) for child in cls.__subclasses__()))

    declared = {cls for cls in tree(VbertError) if cls.__module__.split(".")[0] in ("vbert", "runtime")}
    public = {cls for cls in declared if not cls.__name__.startswith("_")}
    assert public == set(STATUS)
    assert set(STATUS.values()) == set(ERROR_TYPES)
    by_code = {}
    for cls, status in STATUS.items():
        assert by_code.setdefault(cls.code, status) == status, cls


def test_a_class_made_elsewhere_has_the_status_of_its_parent():
    class Special(QueueFull):
        pass

    assert status_of(Special("")) == 429


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputTooLong("700 tokens, the limit is 512; shorten it", param="input"), 422, "UnprocessableEntityError"),
        (VersionConflict("not 3"), 409, "ConflictError"),
        (StoreFull("full"), 507, "InsufficientStorageError"),
        (DeadlineExceeded("late"), 504, "DeadlineExceededError"),
    ],
)
async def test_an_engine_error_keeps_its_code_message_and_param(error, status, kind):
    engine = FakeEngine()
    engine.error = error
    async with served(engine) as client:
        answer = await client.ask("POST", "/v1/embeddings", json=TEXT)
    assert answer.status == status
    assert "Retry-After" not in answer.headers
    assert answer.json == {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


@pytest.mark.parametrize(("cls", "status"), [(QueueFull, 429), (ServerFull, 503), (Draining, 503)])
async def test_overload_says_when_to_come_back(cls, status):
    engine = FakeEngine()
    engine.error = cls("full", retry_after_s=1.2301)
    async with served(engine) as client:
        answer = await client.ask("POST", "/v1/embeddings", json=TEXT)
    assert (answer.status, answer.code) == (status, cls.code)
    assert answer.headers["Retry-After"] == "2"
    assert answer.json["error"]["retry_after_ms"] == 1231


@pytest.mark.parametrize("error", [ZeroDivisionError("secret"), ComputeFailed("secret"), TimeoutError("secret")])
async def test_what_fails_inside_is_logged_under_the_request_id_and_not_told(error, caplog):
    engine = FakeEngine()
    engine.error = error
    async with served(engine) as client:
        with caplog.at_level(logging.ERROR, "vbert.http"):
            answer = await client.ask("POST", "/v1/embeddings", json=TEXT, headers={"X-Request-Id": "my-id.7"})
    assert answer.status == 500
    assert answer.json["error"]["type"] == "InternalServerError"
    assert b"secret" not in answer.body
    assert b"my-id.7" in answer.body
    assert "my-id.7" in caplog.text
    assert "secret" in caplog.text


async def test_a_request_id_is_echoed_or_made():
    async with served(FakeEngine()) as client:
        for given, kept in (("abc-1", True), ("no spaces\tor tabs", False), ("x" * 200, False), (None, False)):
            headers = {} if given is None else {"X-Request-Id": given}
            answer = await client.ask("GET", "/health/live", headers=headers)
            found = answer.headers["X-Request-Id"]
            assert (found == given) == kept
            assert kept or re.fullmatch("[0-9a-f]{32}", found)
            assert answer.headers["Server"] == "vbert"


async def test_unknown_paths_and_methods():
    async with served(FakeEngine()) as client:
        answer = await client.ask("GET", "/nothing/here")
        assert (answer.status, answer.code) == (404, "unknown_route")
        for method, path, allowed in (
            ("PUT", "/v1/embeddings", "POST"),
            ("POST", "/v1/tenants/x", "DELETE, GET, HEAD, PUT"),
            ("TRACE", "/health/live", "GET, HEAD"),
        ):
            answer = await client.ask(method, path)
            assert (answer.status, answer.code) == (405, "method_not_allowed")
            assert answer.headers["Allow"] == allowed
