"""The real server on the real engine with a tiny backbone, in a thread of its own, as an outside client sees it."""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import requests

from runtime.config import EngineConfig
from runtime.engine import Engine
from runtime.http.auth import make_key
from runtime.http.config import HttpConfig
from serve import accepting, bind, create_app
from tests.random_tenants import Factory
from vbert.checkpoint import write_tenant
from vbert.formats.transformers_folder import Backbone, read_backbone
from vbert.tenant import TenantModule

# Limits that tests can reach.
OPTIONS = {"max_module_bytes": 1_000_000, "max_request_inputs": 100}


@dataclass
class Live:
    """`key`: of all scopes and tenants. `modules`: the tenants that are there from the start."""

    url: str
    key: str
    backbone: Backbone
    modules: dict[str, TenantModule]

    def ask(self, method, path, *, headers=None, **content):
        headers = {"Authorization": f"Bearer {self.key}"} | (headers or {})
        return requests.request(method, self.url + path, headers=headers, timeout=60, **content)

    def infer(self, what, model, **body):
        return self.ask("POST", f"/v1/{what}", json={"model": model} | body)


def modules(backbone):
    """One tenant of every head."""
    factory = Factory(backbone, seed=0)
    return {
        "intent": factory.tenant("lora", head="classify"),
        "topics": factory.tenant("bitfit", head="multi_label"),
        "stars": factory.tenant("houlsby", head="regression", num_labels=1),
        "entities": factory.tenant("ia3", head="token_classify"),
        "vectors": factory.tenant("diff", head="embed"),
        "relevance": factory.tenant("mask", head="rerank"),
    }


@contextmanager
def live(folder, backbone_folder):
    """Start, fill and serve an engine; at the end drain it."""
    secret, key = make_key("tester", ["infer", "admin", "metrics"])
    (folder / "keys").write_text(key.line())
    backbone = read_backbone(backbone_folder)
    tenants = modules(backbone)
    config = EngineConfig(
        backbone=str(backbone_folder), store=str(folder / "store"), name="base", dtype="float32", **OPTIONS
    )
    started = threading.Event()
    box = {}

    async def main():
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        http_config = HttpConfig(port=0, keys=str(folder / "keys"))
        async with Engine(config) as engine:
            for name, module in tenants.items():
                await engine.put_tenant(name, write_tenant(module))
            with bind(http_config) as listening:
                async with accepting(create_app(engine, http_config), listening) as box["url"]:
                    started.set()
                    await box["stop"].wait()

    def run():
        try:
            asyncio.run(main())
        except BaseException as error:
            box["error"] = error
            raise
        finally:
            started.set()

    thread = threading.Thread(target=run, name="live server")
    thread.start()
    started.wait(60)
    try:
        assert "error" not in box, box["error"]
        yield Live(box["url"], secret, backbone, tenants)
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(60)
