"""How much do tenants cost on a GPU? `python -m benchmarks.device [--quick]`, on a machine with a GPU and cupy.

- `lora`: 64 tenants with LoRA r=8, 4,096 tokens, 12 x 384, against the bare backbone and against its linears alone.
- `adapters`: 12 x 768, bottleneck 64 in the upper six layers, 10,000 tenants in device slots, 64 of them in a batch.

All in bfloat16, with and without CUDA graphs. Every answer is compared with the reference operators before it is timed.
Prints one JSON object. Times are of the GPU, between events around many calls one after the other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.machine import commit, describe
from benchmarks.workload import SHAPES, write_backbone
from vbert.arena import ArenaClass, Reservation, ResidentTenant
from vbert.config import EncoderConfig
from vbert.formats.transformers_folder import read_backbone
from vbert.graphs import Graph, capture_on_cuda
from vbert.header import TenantHeader
from vbert.kernels.backend import OF_DEVICE, Backend
from vbert.layout import SlotLayout
from vbert.memory import Slabs
from vbert.model import Model, PackedBatch, SequenceInput

__all__ = ["main"]

DTYPE = torch.bfloat16
TENANTS, TOKENS_EACH, RANK, BOTTLENECK = 64, 64, 8, 64
ADAPTER_SLOTS = 10_000
LORA_SITES = {"qv": ("q", "v"), "qkv": ("q", "k", "v"), "every": ("q", "k", "v", "attn_out", "ffn_up", "ffn_down")}
LEAST_COSINE = 0.999


class DeviceClass(ArenaClass):
    """An arena class with so many slots taken on the GPU, full of small random numbers."""

    def __init__(self, layout: SlotLayout, count: int) -> None:
        num_bytes = (count + count // 4 + 16) * (layout.numel * DTYPE.itemsize + 256)
        memory = Slabs(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))
        super().__init__(layout, layout.numel, DTYPE, memory)
        self.taken = [slot for i in range(count) if (slot := self.take(str(i))) is not None]
        self.values.normal_(0.0, 0.02)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds and of the device slots")
    args = parser.parse_args(argv)
    rounds, slots = (20, ADAPTER_SLOTS // 10) if args.quick else (200, ADAPTER_SLOTS)
    rows = [*_lora(rounds), *_adapters(rounds, slots)]
    about = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "quick": args.quick}
    print(json.dumps({"benchmark": "device", "machine": describe() | about, "commit": commit(), "rows": rows}))
    return 0


def _lora(rounds: int) -> list[dict[str, Any]]:
    model = _model("12x384")
    rows = _rows(model, "bare", _batch(model, []), rounds)
    for name, sites in LORA_SITES.items():
        slots = DeviceClass(SlotLayout.build("low_rank", _lora_parts(model.config, sites)), TENANTS)
        rows += _rows(model, f"lora-{name}", _batch(model, [slots]), rounds)
    alone = _milliseconds(_captured(_linears_alone(model.config)), rounds)
    rows.append({"system": "linears-alone", "shape": "12x384", "graph": True, "ms": alone})
    return _with_shares(rows, "12x384")


def _adapters(rounds: int, slots: int) -> list[dict[str, Any]]:
    model = _model("12x768")
    layers = range(model.config.num_layers // 2, model.config.num_layers)
    parts = [part for layer in layers for part in _adapter_parts(model.config, layer)]
    adapters = DeviceClass(SlotLayout.build("bottleneck", parts), slots)
    rows = _rows(model, "bare", _batch(model, []), rounds)
    found = _rows(model, "adapters-upper-half", _batch(model, [adapters]), rounds)
    held = {
        "slots": len(adapters.taken),
        "slot_gib": round(len(adapters.taken) * adapters.slot_bytes / 2**30, 2),
    }
    return _with_shares([*rows, *(row | held for row in found)], "12x768")


def _model(shape: str) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return Model.load(read_backbone(write_backbone(shape, Path(folder), seed=0)), "bfloat16", "cuda")


def _lora_parts(config: EncoderConfig, sites: Sequence[str]) -> list[tuple[int, str, str, str, list[int]]]:
    shapes = {site: (("a", [config.site_in(site), RANK]), ("b", [RANK, config.site_out(site)])) for site in sites}
    return [(i, site, "", *part) for i in range(config.num_layers) for site in sites for part in shapes[site]]


def _adapter_parts(config: EncoderConfig, layer: int) -> list[tuple[int, str, str, str, list[int]]]:
    width = config.hidden_size
    shapes = {"down": [width, BOTTLENECK], "down_bias": [BOTTLENECK], "up": [BOTTLENECK, width], "up_bias": [width]}
    return [(layer, "ffn.normed>output", "relu", part, shape) for part, shape in shapes.items()]


def _batch(model: Model, classes: Sequence[DeviceClass]) -> PackedBatch:
    """64 tenants, a sequence each, their slots spread over the whole class; the bare backbone without classes."""
    words = torch.randint(1000, model.config.vocab_size, (TENANTS, TOKENS_EACH)).tolist()
    tenants = [_tenant(model, classes, i) if classes else None for i in range(TENANTS)]
    return model.pack([SequenceInput(ids, [0] * TOKENS_EACH, t) for ids, t in zip(words, tenants, strict=True)])


def _tenant(model: Model, classes: Sequence[DeviceClass], i: int) -> ResidentTenant:
    """In slots that no file filled, so without a real header."""
    reservation = Reservation(
        digest=f"{i:04}",
        header=cast(TenantHeader, SimpleNamespace(is_whole=False)),
        slots=tuple((c, c.taken[i * (len(c.taken) // TENANTS)]) for c in classes),
        num_bytes=0,
        bytes_by_kind={},
    )
    return ResidentTenant(reservation=reservation, head=model.embed_head, self_tests=())


def _rows(model: Model, system: str, batch: PackedBatch, rounds: int) -> list[dict[str, Any]]:
    """The forward launched op by op, and replayed from a graph: alone, and with its inputs filled in."""
    with torch.inference_mode():
        plain = model.hidden(batch)
        graph = Graph(model._layers, model._new_space(), batch, capture_on_cuda)
        cosine = min(_cosine(plain, _with_reference(model, batch)), _cosine(graph.run(batch), plain))
        assert cosine >= LEAST_COSINE, f"{system}: cosine {cosine:.5f}, at least {LEAST_COSINE} is right"
        runs: dict[str, Callable[[], object]] = {
            "op by op": lambda: model.hidden(batch),
            "graph": graph.replay,
            "graph and inputs": lambda: graph.run(batch),
        }
        milliseconds = {how: _milliseconds(run, rounds) for how, run in runs.items()}
    tokens = batch.rows.num_tokens
    return [
        {"system": system, "how": how, "ms": ms, "tokens_per_s": round(tokens / ms * 1e3), "least_cosine": cosine}
        for how, ms in milliseconds.items()
    ]


def _with_reference(model: Model, batch: PackedBatch) -> Tensor:
    """The same forward with every operator's reference in place of its kernel."""
    OF_DEVICE["cuda"] = Backend.REFERENCE
    try:
        return model.hidden(batch)
    finally:
        OF_DEVICE["cuda"] = Backend.CUDA


def _cosine(a: Tensor, b: Tensor) -> float:
    return round(float(torch.cosine_similarity(a.double(), b.double()).min()), 6)


def _linears_alone(config: EncoderConfig) -> Callable[[], Tensor]:
    """The products of all linears of the encoder, biases in, and nothing between them."""
    hidden, ffn = config.hidden_size, config.ffn_size
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, ffn), (ffn, hidden)] * config.num_layers

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPE, device="cuda")

    inputs = {width: new(TENANTS * TOKENS_EACH, width) for width in (hidden, ffn)}
    linears = [(inputs[k], new(n, k), new(n)) for k, n in shapes]
    outs = {n: new(TENANTS * TOKENS_EACH, n) for _, n in shapes}

    def run() -> Tensor:
        for x, weight, bias in linears:
            torch.addmm(bias, x, weight.t(), out=outs[len(bias)])
        return outs[hidden]

    return run


@torch.inference_mode()
def _captured(function: Callable[[], Tensor]) -> Callable[[], None]:
    return capture_on_cuda(function)[0]


def _milliseconds(run: Callable[[], object], rounds: int) -> float:
    """Of one call, the median of five times `rounds` calls behind each other."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(rounds):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / rounds)
    return round(sorted(times)[2], 4)


def _with_shares(rows: list[dict[str, Any]], shape: str) -> list[dict[str, Any]]:
    """Beside each system its speed as a share of the bare backbone's and of the linears', run the same way."""
    bare = {row["how"]: row["ms"] for row in rows if row["system"] == "bare"}
    linears = next((row["ms"] for row in rows if row["system"] == "linears-alone"), None)
    for row in rows:
        row["shape"], row["layers"] = shape, SHAPES[shape][0]
        if "how" in row:
            row["share_of_bare"] = round(bare[row["how"]] / row["ms"], 3)
            if linears is not None:
                row["share_of_linears"] = round(linears / row["ms"], 3)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
