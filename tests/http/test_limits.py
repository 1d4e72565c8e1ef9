"""Clients that send too much, too slowly, the wrong thing, or leave: refused or forgotten, others unaffected."""

import asyncio
import io
import json
import re
import threading

import pytest

from runtime.http import answering
from runtime.http.bodies import parse_json
from runtime.http.call import STATE
from tests.http.fakes import FakeEngine, served

TEXT = {"model": "acme.a", "input": "hello"}
BODY = json.dumps(TEXT).encode()
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def raw(client, data, *, close=False):
    """What the server sends for bytes on a fresh connection, until it closes or answers in full."""
    port = int(client.url.rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if close:
            return b""
        answer = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer.lower())
        return answer + await reader.readexactly(int(length[1]) if length else 0)
    finally:
        writer.close()
        await writer.wait_closed()


def code(answer):
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"]


async def test_a_10_mb_text_is_too_large_whether_declared_or_chunked():
    body = json.dumps({"model": "acme.a", "input": "x" * 10_000_000}).encode()

    async def pieces():
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    engine = FakeEngine()
    json_type = {"Content-Type": "application/json"}
    async with served(engine) as client:
        for data in (io.BytesIO(body), pieces()):
            answer = await client.ask("POST", "/v1/embeddings", data=data, headers=json_type)
            assert (answer.status, answer.code) == (413, "request_too_large")
            assert "8388608" in answer.json["error"]["message"]
        assert (await client.ask("POST", "/v1/embeddings", json=TEXT)).status == 200
    assert len(engine.calls) == 1


async def test_large_bodies_are_read_one_at_a_time_beside_the_event_loop(monkeypatch):
    reading, go_on = [], threading.Event()

    def slowly(*arguments):
        reading.append(threading.current_thread())
        assert go_on.wait(20)
        return parse_json(*arguments)

    engine, large = FakeEngine(), TEXT | {"input": ["word " * 40_000]}
    async with served(engine) as client:
        monkeypatch.setattr(answering, "parse_json", slowly)
        asked = [asyncio.create_task(client.ask("POST", "/v1/embeddings", json=large)) for _ in range(2)]
        await _until(lambda: reading and len(client.app[STATE].large_bodies._waiters or ()) == 1)
        assert (await client.ask("GET", "/health/live")).status == 200
        assert len(reading) == 1
        go_on.set()
        assert [(await task).status for task in asked] == [200, 200]
    assert threading.current_thread() not in reading
    assert [keywords["inputs"] for _, _, keywords in engine.calls] == [large["input"]] * 2


async def test_an_upload_has_the_limit_of_modules_and_not_of_bodies():
    engine = FakeEngine(max_module_bytes=2000)
    async with served(engine, max_body_bytes=100) as client:
        assert (await client.ask("PUT", "/v1/tenants/acme.a", data=b"x" * 2000)).status == 201
        answer = await client.ask("PUT", "/v1/tenants/acme.a", data=b"x" * 2001)
        assert (answer.status, answer.code) == (413, "request_too_large")
    assert [len(keywords["data"]) for _, _, keywords in engine.calls] == [2000]


async def test_a_slow_body_is_given_up():
    async with served(FakeEngine(), read_timeout_s=0.05, upload_timeout_s=0.05) as client:
        for head in (HEAD, b"PUT /v1/tenants/acme.a HTTP/1.1\r\nHost: localhost\r\n"):
            answer = await raw(client, head + b"Content-Length: 100\r\n\r\n" + BODY)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert code(answer) == "body_timeout"


async def test_a_slow_head_is_dropped():
    async with served(FakeEngine(), keepalive_s=0.05) as client:
        with pytest.raises(asyncio.IncompleteReadError):
            await raw(client, HEAD)


async def test_uploads_wait_for_their_turn_to_use_memory():
    engine = FakeEngine()
    engine.gate.clear()
    async with served(engine, max_uploads=1) as client:
        first = asyncio.create_task(client.ask("PUT", "/v1/tenants/acme.a", data=b"1"))
        await _until(lambda: engine.waiting)
        second = asyncio.create_task(client.ask("PUT", "/v1/tenants/acme.b", data=b"2"))
        assert (await client.ask("GET", "/health/live")).status == 200
        await asyncio.sleep(0)
        assert len(engine.calls) == 1
        engine.gate.set()
        assert [(await task).status for task in (first, second)] == [201, 201]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/v1/embeddings", {"Content-Type": "text/plain"}, 415),
        ("POST", "/v1/embeddings", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json; charset=latin-1"}, 415),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
        ("POST", "/v1/embeddings", {"Content-Type": "application/json; charset=UTF-8"}, 200),
        ("PUT", "/v1/tenants/acme.a", {"Content-Type": "application/json"}, 415),
        ("PUT", "/v1/tenants/acme.a", {"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ("PUT", "/v1/tenants/acme.a", {"Content-Encoding": "zstd"}, 415),
        ("PUT", "/v1/tenants/acme.a", {"Content-Type": "application/octet-stream"}, 201),
    ],
)
async def test_content_types_are_an_allow_list(client, method, path, headers, status):
    answer = await client.ask(method, path, data=BODY, headers=headers)
    assert answer.status == status
    assert status != 415 or answer.code == "unsupported_media_type"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "data",
    [
        b"not http at all\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 9000 + b"\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d:\r\n" % i for i in range(99)) + b"\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_the_same_json(client, data):
    answer = await raw(client, data)
    assert answer.split()[1] == b"400"
    assert code(answer) == "malformed_body"
    assert b"aiohttp" not in answer
    assert (await client.ask("GET", "/health/live")).status == 200


async def test_broken_chunks_are_a_malformed_body():
    async with served(FakeEngine()) as client:
        answer = await raw(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nnothing\r\n")
        assert answer.split()[1] == b"400"
        assert code(answer) == "malformed_body"


async def test_a_body_is_invited_only_after_the_checks():
    async with served(FakeEngine()) as client:
        expecting = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        assert (await raw(client, HEAD + expecting % len(BODY))).startswith(b"HTTP/1.1 100 ")
        assert (await raw(client, HEAD + expecting % 10**9)).startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_left_is_not_computed():
    engine = FakeEngine()
    engine.gate.clear()
    async with served(engine) as client:
        port = int(client.url.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        await _until(lambda: engine.waiting)
        writer.close()
        await asyncio.wait_for(engine.cancelled.wait(), 5)
        assert engine.waiting == 0
        await raw(client, HEAD + b"Content-Length: 100\r\n\r\n{", close=True)  # left in the middle of its body
        engine.gate.set()
        assert (await client.ask("POST", "/v1/embeddings", json=TEXT)).status == 200


@pytest.mark.slow
async def test_a_client_that_does_not_read_its_answer_is_dropped():
    engine = FakeEngine()
    engine.width = 1_000_000
    async with served(engine, write_timeout_s=0.2) as client:
        port = int(client.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        body = json.dumps({"model": "acme.a", "input": ["x"] * 8}).encode()
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await reader.readexactly(100)
        await _until(lambda: not any("RequestHandler.start" in repr(task) for task in asyncio.all_tasks()))
        writer.close()


async def test_draining_answers_what_was_admitted_and_refuses_the_rest():
    engine = FakeEngine()
    engine.gate.clear()
    async with served(engine) as client:
        before = asyncio.create_task(client.ask("POST", "/v1/embeddings", json=TEXT))
        await _until(lambda: engine.waiting)
        assert (await client.ask("GET", "/health/ready")).status == 200
        state = next(iter(client.app.values()))
        draining = asyncio.create_task(state.drain(5))
        await _until(lambda: state.draining)
        ready = await client.ask("GET", "/health/ready")
        assert (ready.status, ready.json["reasons"], ready.json["error"]["code"]) == (503, ["draining"], "not_ready")
        refused = await client.ask("POST", "/v1/embeddings", json=TEXT)
        assert (refused.status, refused.code, refused.headers["Retry-After"]) == (503, "draining", "1")
        assert (await client.ask("GET", "/v1/models")).status == 503
        for path in ("/health/live", "/metrics", "/openapi.json"):
            assert (await client.ask("GET", path)).status == 200
        assert not draining.done()
        engine.gate.set()
        assert (await before).status == 200
        assert await draining


async def test_a_drain_that_takes_too_long_cancels():
    engine = FakeEngine(drain_timeout_s=0.05)
    engine.gate.clear()
    async with served(engine) as client:
        left = asyncio.create_task(client.ask("POST", "/v1/embeddings", json=TEXT))
        await _until(lambda: engine.waiting)
    assert engine.cancelled.is_set()
    with pytest.raises(Exception, match="disconnected"):
        await left


async def _until(condition):
    """Lets the loop run until something that a connection brings has come."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fakes and the server's own state have no events
            await asyncio.sleep(0.001)
