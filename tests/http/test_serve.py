"""`python serve.py` as an operator meets it: flags, refusals before anything is loaded, a stop that loses nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from runtime.config import EngineConfig
from runtime.http.config import HttpConfig
from serve import main, run

ROOT = Path(__file__).resolve().parents[2]
BODY = json.dumps({"model": "base", "input": "hello"}).encode()
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@contextmanager
def process(backbone_folder, store, *flags):
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "serve.py", "--backbone", str(backbone_folder), "--store", str(store)]
    command += ["--name", "base", "--port", "0", "--dtype", "float32", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"is served on (http://\S+)", line):
                    yield server, found[1]
                    break
        finally:
            server.kill()


@pytest.mark.slow
def test_sigterm_drains(backbone_folder, tmp_path):
    with process(backbone_folder, tmp_path / "store") as (server, url):
        assert requests.get(f"{url}/health/ready", timeout=10).status_code == 200
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as connection:
            # Admitted, since its head was read; in flight until the rest of its body is sent.
            connection.sendall(HEAD % len(BODY) + BODY[:5])
            while "vbert_http_in_flight 1.0" not in requests.get(f"{url}/metrics", timeout=10).text:
                pass
            server.send_signal(signal.SIGTERM)
            while (ready := requests.get(f"{url}/health/ready", timeout=10)).status_code == 200:
                pass
            assert (ready.status_code, ready.json()["reasons"]) == (503, ["draining"])
            refused = requests.post(f"{url}/v1/embeddings", json={"model": "base", "input": "x"}, timeout=10)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["Retry-After"]) >= 1
            assert server.poll() is None
            connection.sendall(BODY[5:])
            with connection.makefile("rb") as answer:
                assert answer.readline().startswith(b"HTTP/1.1 200 ")
                assert b'"model":"base"' in answer.read()
        assert server.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_trace_is_whole_whatever_ends_the_server(backbone_folder, tmp_path, signum):
    path = tmp_path / "trace.json"
    with process(backbone_folder, tmp_path / "store", "--trace", str(path)) as (server, url):
        body = {"model": "base", "input": "hello"}
        assert requests.post(f"{url}/v1/embeddings", json=body, timeout=10).status_code == 200
        server.send_signal(signum)
        server.wait(20)
    assert {"batch 0", "batch 1"} <= {event["name"] for event in json.loads(path.read_text())}


def test_sigint_stops_too(backbone_folder, tmp_path):
    config = EngineConfig(backbone=str(backbone_folder), store=str(tmp_path / "store"), dtype="float32")
    urls = []

    def interrupt(url):
        urls.append(url)
        os.kill(os.getpid(), signal.SIGINT)

    run(config, HttpConfig(port=0), on_ready=interrupt)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{urls[0]}/health/live", timeout=5)


def test_refusals_are_one_line_and_come_before_loading(tmp_path, capsys, backbone_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        paths = ["--backbone", str(tmp_path / "absent"), "--store", str(tmp_path / "store")]
        for flags, said in (
            (["--host", "0.0.0.0"], "keys"),
            (["--port", "70000"], "65535"),
            (["--port", port], "cannot listen"),
            (["--host", "no.such.host.invalid", "--keys", "x"], "keys file x"),
            (["--read-timeout-s", "0"], "read_timeout_s is 0"),
            (["--port", "0"], "absent"),
        ):
            assert main([*paths, *flags]) == 2
            told = capsys.readouterr().err.strip().splitlines()
            assert len(told) == 1
            assert said in told[0]
            assert told[0].startswith("error: ")
    assert not (tmp_path / "store").exists()
