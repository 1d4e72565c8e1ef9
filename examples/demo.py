"""The three demo tenants of `make serve`: train those that the store lacks, then print lines to try them with.

    python examples/demo.py --backbone FOLDER --store DIR [--server http://127.0.0.1:8080]

Each is a recipe beside this file, run through `vbert train`: an intent classifier (LoRA), a slot tagger (bottleneck)
and an entity tagger (BitFit), all on one backbone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

import cli
from runtime.store import TenantStore
from vbert.errors import UnknownTenant

FOLDER = Path(__file__).resolve().parent
DEMOS = {  # tenant: recipe, route, inputs to try
    "banking.intent": ("banking77_intent.toml", "classify", ["My card was swallowed by the machine, what now?"]),
    "snips.slots": ("snips_slots.toml", "token_classify", ["play the new album by nina simone on spotify"]),
    "wnut.entities": ("wnut17_entities.toml", "token_classify", ["watching the lakers in los angeles with kevin hart"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", required=True, help="transformers folder of the backbone")
    parser.add_argument("--store", required=True, help="folder of the tenant store; made if it is not there")
    parser.add_argument("--server", default="http://127.0.0.1:8080", help="address in the printed lines")
    args = parser.parse_args()
    for tenant in absent(args.store):
        print(f"training the demo tenant {tenant}, about a minute on two free cores", flush=True)
        if code := train(tenant, args.backbone, args.store):
            return code
    print("\nOnce the server is up, try:\n")
    for tenant, (_, route, inputs) in DEMOS.items():
        body = json.dumps({"model": tenant, "input": inputs})
        print(f"curl -s {args.server}/v1/{route} -H 'Content-Type: application/json' -d '{body}'\n")
    return 0


def train(tenant: str, backbone: str, store: str) -> int:
    """`vbert train` with the tenant's recipe, its report in one line."""
    recipe = str(FOLDER / DEMOS[tenant][0])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main(["train", tenant, "--recipe", recipe, "--backbone", backbone, "--store", store, "--json"])
    if not code:
        report = json.loads(output.getvalue())
        metric = report["metric"]
        print(f"{tenant}: {metric} {report['dev'][metric]:.3f} on dev after {report['seconds']:.0f} s", flush=True)
    return code


def absent(folder: str) -> list[str]:
    """The demo tenants that the store does not have yet."""
    with TenantStore(folder, create=True) as store:
        return [tenant for tenant in DEMOS if not _has(store, tenant)]


def _has(store: TenantStore, tenant: str) -> bool:
    try:
        store.resolve(tenant)
    except UnknownTenant:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
