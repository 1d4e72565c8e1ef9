"""Expected outputs of an imported checkpoint, computed by the library that wrote it.

`peft`, `adapters` and `transformers` are imported here and only here, lazily: where one is missing, or does not fit the
installed `transformers`, there are simply no expected outputs, and the store computes them by the dense reference at
first load. Nothing of our own maths is used, so that a reader's mistake shows as a difference.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vbert.errors import SelfTestFailed
from vbert.formats import locate_checkpoint
from vbert.formats.adapterhub_folder import INTERFACE_FILE
from vbert.formats.adapterhub_head import HEAD_FILE
from vbert.formats.names import NAMES
from vbert.formats.tensors import read_json, tensor_keys, weight_files
from vbert.formats.transformers_folder import Backbone
from vbert.reference import dense_forward
from vbert.tenant import Head, SelfTest, TenantModule
from vbert.tokenizer import Encoded, Tokenizer

__all__ = ["TEXTS", "original_outputs", "self_tests"]

TEXTS = (
    "The parcel arrived two days late, and the box was open.",
    ("Where can I see my exchange rate?", "Rates are shown in the app, under Currencies."),
    "Prince Charles met 3 engineers of Deutsche Bahn in Köln on 4 May; nobody said why.",
)
TOLERANCE = 1e-3  # of the largest expected number: far above rounding, far below a wrong reading


def self_tests(path: Path, backbone: Backbone, module: TenantModule) -> tuple[SelfTest, ...]:
    """A few inputs with the outputs of the original library; () where it cannot be imported or the file is native.

    Raises: SelfTestFailed when the tenant as read does not give these outputs.
    """
    limit = min(backbone.config.max_length, module.max_length or backbone.config.max_length)
    inputs = Tokenizer.load(backbone.folder, backbone.config).encode(TEXTS, max_length=limit, offsets=False)
    outputs = original_outputs(path, backbone, module, inputs)
    for encoded, expected in zip(inputs, outputs, strict=False):
        got = dense_forward(backbone, module, encoded.token_ids, encoded.type_ids)
        error = float((got - expected).abs().max())
        if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise SelfTestFailed(
                f"{path.name} as read differs from {module.source['format']}'s own output by {error:.2g}; "
                "please report the checkpoint, it cannot be served"
            )
    return tuple(
        SelfTest(token_ids=torch.tensor(e.token_ids), type_ids=torch.tensor(e.type_ids), expected=output)
        for e, output in zip(inputs, outputs, strict=False)
    )


@torch.no_grad()
def original_outputs(path: Path, backbone: Backbone, module: TenantModule, inputs: Sequence[Encoded]) -> list[Tensor]:
    """fp32 head outputs, one an input; [] where the library of this format is not installed."""
    path, format_name = locate_checkpoint(path)
    loaders = {"peft": _load_peft, "adapters": _load_adapters, "transformers": _load_transformers}
    load = loaders.get(format_name)
    if load is None:
        return []
    try:
        with _quiet():
            model = load(path, backbone, module.head)
            return [_output(model, module.head, backbone, encoded) for encoded in inputs]
    except ImportError:
        return []


def _output(model: Any, head: Head, backbone: Backbone, encoded: Encoded) -> Tensor:
    arguments = {"input_ids": torch.tensor([encoded.token_ids])}
    if backbone.config.type_vocab_size:
        arguments["token_type_ids"] = torch.tensor([encoded.type_ids])
    with torch.no_grad():
        outputs = model(**arguments, output_hidden_states=True, return_dict=True)
    if head.kind != "embed":
        logits: Tensor = outputs.logits[0].float()
        return logits
    hidden: Tensor = outputs.hidden_states[-1][0].float()
    rows = hidden[0] if head.pooling == "cls" else hidden.mean(0)
    for layer in head.layers:
        rows = F.linear(rows, layer.weight, layer.bias)
        rows = rows if layer.activation == "identity" else getattr(torch, layer.activation)(rows)
    return F.normalize(rows, dim=-1) if head.normalise else rows


def _load_peft(path: Path, backbone: Backbone, head: Head) -> Any:
    from peft import PeftModel

    # An adapter without a head was trained on a bare encoder, or inside a model whose head was left alone.
    prefix = f".{NAMES[backbone.config.model_type].prefix}."
    bare = not any(prefix in key for key in tensor_keys(weight_files(path, "adapter_model")))
    base = _from_pretrained(_auto_class(head, bare=bare), backbone.folder, head)
    return PeftModel.from_pretrained(base, path).eval()


def _load_transformers(path: Path, backbone: Backbone, head: Head) -> Any:
    return _from_pretrained(_auto_class(head, bare=True), path, head)


def _load_adapters(path: Path, backbone: Backbone, head: Head) -> Any:
    import adapters

    head_file = path / HEAD_FILE
    if head_file.is_file() and read_json(head_file).get("config"):
        model = _from_pretrained(adapters.AutoAdapterModel, backbone.folder, backbone.embed_head)
    else:
        model = _from_pretrained(_auto_class(head, bare=True), backbone.folder, head)
        interface = None
        if (path / INTERFACE_FILE).is_file():
            interface = adapters.AdapterModelInterface(**read_json(path / INTERFACE_FILE)["interface"])
        adapters.init(model, interface=interface)
    model.load_adapter(str(path), set_active=True, use_safetensors=True)
    return model.eval()


def _auto_class(head: Head, *, bare: bool) -> Any:
    import transformers

    if head.kind == "embed" and bare:
        return transformers.AutoModel
    if head.kind in ("embed", "token_classify"):
        return transformers.AutoModelForTokenClassification
    return transformers.AutoModelForSequenceClassification


def _from_pretrained(auto: Any, folder: Path, head: Head) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    if head.layers and head.kind != "embed":
        options |= {"num_labels": head.layers[-1].weight.shape[0], "ignore_mismatched_sizes": True}
    return auto.from_pretrained(folder, **options).float().eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Their notes on newly initialised weights are about layers that the adapter overwrites, and transformers 5 draws a
    progress bar for each small model."""
    import transformers  # sets its own level when it is first imported

    bars = transformers.utils.logging
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in (transformers.__name__, "adapters")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if had_bars:
            bars.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
