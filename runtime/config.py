"""`EngineConfig`: every option of the engine, declared once. Flags and docs/configuration.md are derived from it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from runtime.exit_rules import ExitRules
from runtime.paths import PathRules, table_files
from runtime.policies.named import check_policy
from runtime.residency import residency_policy
from runtime.sequence_sharing import SequenceSharing
from runtime.weight_rules import WeightRules
from vbert.errors import ConfigError
from vbert.stream_counts import MAX_STREAMS

__all__ = ["EngineConfig", "option"]

_MIB = 2**20
_MAY_BE_ZERO = {
    "compute_threads",
    "operator_streams",
    "max_store_bytes",
    "host_budget_bytes",
    "sequence_store_bytes",
    "sequence_disk_bytes",
    "sequence_layer",
    "ngram_cache_bytes",
    "max_backoff",
}


def option(default: Any, help_text: str, *, files: bool = False) -> Any:
    """A config field with the sentence that `--help` and docs/configuration.md show for it. files: its items may be
    words of their own, as a shell writes *.ngrams."""
    return field(default=default, metadata={"help": help_text, "files": files})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All limits are per process. A limit of an input or a request is refused with an error that names it."""

    backbone: str = option("", "transformers folder of the frozen backbone (safetensors)")
    store: str = option("", "folder of the tenant store; created if absent")
    name: str | None = option(None, "name the backbone is served under; default: from its config")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option(
        "auto", "auto, float32, bfloat16, on a GPU float16; auto is bfloat16 on a GPU and with AMX or AVX512-BF16"
    )
    compute_threads: int = option(0, "threads of the compute lane; 0: as many of the cores as prove fastest")
    store_dtype: str = option(
        "float32", "float32 or bfloat16: of modules converted from checkpoints; bfloat16 halves files and load times"
    )
    pinned_tenants: tuple[str, ...] = option(
        (), "tenants kept in memory whatever the others need, by name; at most half of module_budget_bytes"
    )
    residency: str = option("lfu", "lfu or lru: which modules leave memory when others need the room")
    lanes: tuple[str, ...] = option(
        ("rows", "modules", "compute"), "lanes that run beside the others, of rows, modules and compute, or none"
    )
    word_rows: str = option(
        "memory", "memory, or mapped: word embeddings stay in a file of the store and take no device memory"
    )
    sequence_store_bytes: int = option(
        0, "bytes for the lower layers of whole texts, kept for whoever sends the same text again; 0: none are kept"
    )
    sequence_disk_bytes: int = option(0, "bytes of a file behind them, in the store's folder; it ends with the process")
    sequence_layer: int = option(
        0,
        "the layer they enter: tenants that change none below it use them; 0: half of all, or what a backbone skips to",
    )
    sequence_sharing: tuple[str, ...] = option(
        (), "PATTERN=shared, own or off, by tenant, the first that fits: who shares kept texts and n-grams; else all do"
    )
    ngrams: tuple[str, ...] = option(
        (),
        "files of `vbert ngrams`, for a skip backbone: FILE for all tenants, DOMAIN=FILE for those of a domain",
        files=True,
    )
    ngram_domains: tuple[str, ...] = option(
        (), "PATTERN=DOMAIN, by tenant, the first that fits; else only files for all"
    )
    ngram_cache_bytes: int = option(
        0, "bytes for n-grams that no file has and that came twice, with a skip backbone; 0: none are kept"
    )
    max_backoff: float = option(
        0.5, "part of a text's n-grams that path auto may replace by shorter ones, for tenants trained for backoff"
    )
    paths: tuple[str, ...] = option(
        (), "PATTERN=auto, plain, exact, compute or backoff, by tenant: how texts pass a skip backbone; else auto"
    )
    exit_thresholds: tuple[str, ...] = option(
        (), "PATTERN=CONFIDENCE, by tenant: above it an answer leaves early; 1: never; others: as their files say"
    )
    policy: str = option("fair", "which requests form a batch: fair, or another one of docs/scheduling.md")
    instances: int = option(
        2, "tenants with weights of their own in memory at a time, with the policies that are for instances"
    )
    tenant_weights: tuple[str, ...] = option(
        (), "PATTERN=NUMBER, by tenant, the first that fits: its share beside the others, with the policy fair; else 1"
    )
    cuda_graphs: str = option("off", "on or off: on a GPU, replay CUDA graphs of batches that come often")
    operator_streams: int = option(
        0,
        "on a GPU, streams for operators of tenants of different kinds, up to 32; 0: as many as prove fastest",
    )
    trace: str = option("", "write a Chrome trace of the lanes to this file")
    record: str = option("", "write a log of all requests, without their texts, to this file, for `vbert simulate`")
    profile: str = option(
        "", "file of `vbert profile`, or a folder that has it or gets it at start; vbert serve: the user's cache folder"
    )
    max_batch_tokens: int = option(4096, "tokens in one forward pass")
    max_queue_inputs: int = option(4096, "inputs waiting in the whole engine; beyond it: server_full")
    max_caller_share: float = option(0.5, "part of the queue one caller may fill; beyond it: queue_full")
    max_request_inputs: int = option(1024, "inputs in one request")
    max_input_chars: int = option(200_000, "Unicode code points in one input, before it is tokenised")
    default_deadline_s: float = option(30.0, "a request without a deadline of its own is given up after this long")
    module_budget_bytes: int = option(1024 * _MIB, "bytes of tenant modules kept in memory; the rest waits on disk")
    host_budget_bytes: int = option(
        0, "bytes of tenant modules in host memory behind those of a GPU; 0: four times module_budget_bytes with a GPU"
    )
    max_module_bytes: int = option(256 * _MIB, "bytes of one tenant's native file")
    max_store_bytes: int = option(0, "bytes of all tenant files of the store; beyond it: store_full; 0: no limit")
    canary_interval_s: float = option(5.0, "seconds between two canary requests that prove the engine answers")
    drain_timeout_s: float = option(30.0, "seconds a stop waits for requests that were admitted")

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; use auto, cpu or cuda")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; use auto, float32, float16 or bfloat16")
        if self.store_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"store_dtype is {self.store_dtype!r}; use float32 or bfloat16")
        residency_policy(self.residency)
        if self.lanes != ("none",) and (not self.lanes or set(self.lanes) - {"rows", "modules", "compute"}):
            raise ConfigError(f"lanes is {','.join(self.lanes)!r}; give some of rows, modules and compute, or none")
        SequenceSharing(self.sequence_sharing)
        PathRules(self.paths, self.ngram_domains, table_files(self.ngrams))
        ExitRules(self.exit_thresholds)
        check_policy(self.policy)
        WeightRules(self.tenant_weights)
        if not 0 <= self.max_backoff <= 1:
            raise ConfigError(f"max_backoff is {self.max_backoff}; give a share from 0 to 1")
        if self.cuda_graphs not in ("on", "off"):
            raise ConfigError(f"cuda_graphs is {self.cuda_graphs!r}; use on or off")
        if self.operator_streams > MAX_STREAMS:
            raise ConfigError(f"operator_streams is {self.operator_streams}; use at most {MAX_STREAMS}")
        if self.word_rows not in ("memory", "mapped"):
            raise ConfigError(f"word_rows is {self.word_rows!r}; use memory or mapped")
        if not 0 < self.max_caller_share <= 1:
            raise ConfigError(f"max_caller_share is {self.max_caller_share}; give a share above 0 and up to 1")
        for option_field in fields(self):
            value = getattr(self, option_field.name)
            floor = 0 if option_field.name in _MAY_BE_ZERO else 1e-9
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value < floor:
                raise ConfigError(
                    f"{option_field.name} is {value}; it must be {'at least 0' if not floor else 'above 0'}"
                )
