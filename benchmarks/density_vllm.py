"""What vLLM holds: LoRA tenants on its CPU build, which lives in an environment of its own (`--vllm BIN/vllm`).

Its server is asked over HTTP, as it is meant to be; vbert over HTTP costs what `vbert bench serving` says.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import aiohttp
import torch

from benchmarks.density_cells import Cell, asked_for, milliseconds
from benchmarks.peers import random_peft
from benchmarks.serving import texts

__all__ = ["vllm"]

_PORT = 8011
_START_LIMIT_S, _ADD_LIMIT_S = 180.0, 60.0
_SLOTS = 16  # adapters in one of its batches
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}


def vllm(cell: Cell, executable: str) -> dict[str, Any]:
    """Register up to `cell.tenants` LoRA tenants with a running server, then ask it by Zipf's law."""
    with tempfile.TemporaryDirectory() as folder, _server(cell, executable) as process:
        adapter = Path(folder) / "adapter"
        _random_adapter(Path(cell.backbone), adapter)
        before_mib = _private_mib(process.pid)
        begin = time.perf_counter()
        held = _add(cell.tenants, adapter)
        add_s = time.perf_counter() - begin
        asyncio.run(_closed_loop(cell, held, cell.seconds / 4))
        seen = asyncio.run(_closed_loop(cell, held, cell.seconds))
        after_mib = _private_mib(process.pid)
    return {
        "shape": cell.shape,
        "kind": cell.kind,
        "tenants": held,
        "asked_to_hold": cell.tenants,
        "system": "vLLM (HTTP)",
        "popularity": "zipf",
        **seen,
        "tenants_per_s": round(held / add_s, 1),
        "kib_per_tenant": round((after_mib - before_mib) * 1024 / held, 1),
        "rss_anon_mib": after_mib,
    }


@contextmanager
def _server(cell: Cell, executable: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers, with all adapters allowed in its memory and 16 of them in one batch."""
    command = [executable, "serve", cell.backbone, "--runner", "pooling", "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(_PORT), "--max-model-len", "256", "--served-model-name", "base"]
    command += ["--enable-lora", "--max-loras", str(_SLOTS), "--max-lora-rank", "8"]
    command += ["--max-cpu-loras", str(max(_SLOTS, cell.tenants))]
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{cell.threads - 1}" if cell.threads > 1 else "0"}
    environment = os.environ | _ENVIRONMENT | bind
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        begin = time.perf_counter()
        while not _is_up():
            if process.poll() is not None or time.perf_counter() - begin > _START_LIMIT_S:
                raise RuntimeError(f"vLLM did not start within {_START_LIMIT_S:.0f} s: {' '.join(command)}")
            time.sleep(1)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def _is_up() -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{_PORT}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _random_adapter(backbone: Path, folder: Path) -> None:
    """One LoRA as PEFT saves it; every tenant has a copy of its own."""
    random_peft(backbone, 1, torch.float32, seed=0).save_pretrained(folder.with_name("saved"))
    shutil.copytree(folder.with_name("saved") / "t0", folder)


def _add(tenants: int, adapter: Path) -> int:
    """Load adapters one after the other until all are there or the time is up; how many there are."""
    begin = time.perf_counter()
    for t in range(tenants):
        if time.perf_counter() - begin > _ADD_LIMIT_S:
            return t
        own = adapter.with_name(f"t{t:05}")
        shutil.copytree(adapter, own)
        body = json.dumps({"lora_name": own.name, "lora_path": str(own)}).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"http://127.0.0.1:{_PORT}/v1/load_lora_adapter", body, headers), timeout=60):
            pass
    return tenants


async def _closed_loop(cell: Cell, held: int, seconds: float) -> dict[str, Any]:
    tenants, words = asked_for("zipf", held), itertools.cycle(list(itertools.islice(texts(), 512)))
    latencies: list[float] = []
    begin = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while (sent := time.perf_counter()) < begin + seconds:
                body = {"model": next(tenants), "input": [next(words)], "truncate_prompt_tokens": 256}
                async with session.post(f"http://127.0.0.1:{_PORT}/v1/embeddings", json=body) as answer:
                    answer.raise_for_status()
                    await answer.read()
                latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(client() for _ in range(cell.concurrency)))
    elapsed = time.perf_counter() - begin
    return {
        "requests_per_s": round(len(latencies) / elapsed, 1),
        "p50_ms": milliseconds(latencies, 50),
        "p99_ms": milliseconds(latencies, 99),
    }


def _private_mib(pid: int) -> int:
    """Private memory of a process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    own = int(status.get("RssAnon", "0").split()[0]) // 1024
    return own + sum(_private_mib(int(child)) for child in children)
