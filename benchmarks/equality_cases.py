"""Tenants of every reader on one real backbone, made by the libraries themselves, with those libraries' own outputs.

Adapters are untrained but not at their start: every trained tensor gets small random numbers, so that each one shows.
BitFit, MaskBert and Diff have no checkpoint format: there the original is `transformers` with the changed weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbert.formats import read_tenant
from vbert.formats.names import NAMES, module_path
from vbert.formats.native import bias_to_affine, diff_to_sparse, mask_to_sparse
from vbert.formats.original import original_outputs
from vbert.formats.task_head import POOLER, build_head
from vbert.formats.transformers_folder import Backbone
from vbert.tenant import Delta, Dense, Norm, TenantModule
from vbert.tokenizer import Encoded

__all__ = ["Case", "make_cases", "peft_makers"]


@dataclass(frozen=True, slots=True)
class Case:
    """One tenant: how it was made, what was read, and the original outputs, one an input."""

    reader: str
    name: str
    module: TenantModule
    expected: list[Tensor]


def make_cases(backbone: Backbone, inputs: Sequence[Encoded], folder: Path) -> Iterator[Case]:
    """Make, save, read and run every case. Needs peft and adapters."""
    makers = peft_makers(backbone) | _adapter_makers(backbone) | _native_makers(backbone)
    for (reader, name), make in makers.items():
        torch.manual_seed(len(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, on adapters that nobody trained
            made = make(folder / f"{reader}-{name}")
        if isinstance(made, Path):
            module = read_tenant(made, backbone)
            yield Case(reader, name, module, original_outputs(made, backbone, module, inputs))
        else:
            model, deltas, head = made
            module = TenantModule(backbone_fingerprint=backbone.fingerprint, deltas=tuple(deltas), head=head)
            yield Case(reader, name, module, [_logits(model, backbone, encoded) for encoded in inputs])


_Maker = Callable[[Path], Any]


def peft_makers(backbone: Backbone) -> dict[tuple[str, str], _Maker]:
    import peft
    import transformers

    sites = NAMES[backbone.config.model_type].sites
    qv, every = [sites["q"], sites["v"]], [sites[s] for s in ("q", "k", "v", "attn_out", "ffn_up", "ffn_down")]
    # A classifier's pooler that the backbone's folder does not have is trained with the head.
    saved = ["classifier"] if backbone.config.has_pooler else ["classifier", "pooler"]

    def lora(**options: Any) -> Any:
        return peft.LoraConfig(
            **({"r": 8, "target_modules": qv, "task_type": "SEQ_CLS", "modules_to_save": saved} | options)
        )

    ia3 = {"target_modules": [sites["k"], sites["v"], sites["ffn_down"]], "feedforward_modules": [sites["ffn_down"]]}
    norms = [*saved, sites["attn_norm"], sites["ffn_norm"]]
    token = {"task_type": "TOKEN_CLS", "modules_to_save": None}
    configs = {
        "lora": lora(),
        "lora-every-linear": lora(target_modules=every, rank_pattern={sites["k"]: 4}, alpha_pattern={sites["v"]: 24}),
        "lora-embed": lora(task_type="FEATURE_EXTRACTION", modules_to_save=None),
        "lora-token": lora(**token),
        "rslora": lora(use_rslora=True, layers_to_transform=[1, 2]),
        "dora": lora(use_dora=True, target_modules=every),
        "bias-all": lora(bias="all"),
        "modules-to-save": lora(modules_to_save=norms),
        "ia3": peft.IA3Config(task_type="SEQ_CLS", modules_to_save=saved, **ia3),
        "adalora": peft.AdaLoraConfig(init_r=8, total_step=10, target_modules=qv, **token),
        "vera": peft.VeraConfig(r=64, target_modules=qv, **token),
    }
    autos = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "FEATURE_EXTRACTION": transformers.AutoModel,
    }

    def maker(config: Any) -> _Maker:
        def make(folder: Path) -> Path:
            model = peft.get_peft_model(_load(autos[config.task_type], backbone), config)
            _perturb_(model, lambda name, parameter: parameter.requires_grad)
            model.save_pretrained(folder)
            return folder

        return make

    return {("peft", name): maker(config) for name, config in configs.items()}


def _adapter_makers(backbone: Backbone) -> dict[tuple[str, str], _Maker]:
    import adapters
    import transformers

    configs = {
        "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=16),
        "parallel": adapters.ParBnConfig(reduction_factor=8),
        "lora": adapters.LoRAConfig(r=8, alpha=16),
        "ia3": adapters.IA3Config(),
    }
    hooked = backbone.config.model_type == "mpnet"
    if not hooked:  # through an interface the library itself is wrong here (vbert/formats/adapterhub_folder.py)
        configs["pfeiffer"] = adapters.SeqBnConfig(reduction_factor=16)

    def maker(config: Any) -> _Maker:
        def make(folder: Path) -> Path:
            if hooked:
                model = _load(transformers.AutoModelForSequenceClassification, backbone)
                adapters.init(model, interface=_mpnet_interface())
                model.add_adapter("t", config=config)
            else:
                model = _load(adapters.AutoAdapterModel, backbone)
                model.add_adapter("t", config=config)
                model.add_classification_head("t", num_labels=3)
            model.set_active_adapters("t")
            _perturb_(model, lambda name, parameter: ".t." in name)
            model.save_adapter(str(folder), "t", use_safetensors=True)
            return folder

        return make

    return {("adapters", name): maker(config) for name, config in configs.items()}


def _mpnet_interface() -> Any:
    import adapters

    return adapters.AdapterModelInterface(
        adapter_methods=["bottleneck", "lora"],
        model_embeddings="embeddings",
        model_layers="encoder.layer",
        layer_self_attn="attention",
        layer_cross_attn=None,
        attn_o_proj="attn.o",
        attn_k_proj="attn.k",
        attn_q_proj="attn.q",
        attn_v_proj="attn.v",
        layer_intermediate_proj="intermediate.dense",
        layer_output_proj="output.dense",
        layer_pre_self_attn="attention",
        layer_pre_ffn="intermediate",
    )


def _native_makers(backbone: Backbone) -> dict[tuple[str, str], _Maker]:
    linears = [site for site in NAMES[backbone.config.model_type].sites if not site.endswith("norm")]

    def bitfit(layer: int, site: str, module: Any) -> Delta:
        key = f"layers.{layer}.{site}"
        module.bias += 0.05 * torch.randn_like(module.bias)
        if site.endswith("norm"):
            return Norm(layer=layer, site=site, weight=backbone.weights[f"{key}.weight"], bias=module.bias.clone())
        return bias_to_affine(backbone.weights[f"{key}.bias"], module.bias, layer=layer, site=site)

    def mask(layer: int, site: str, module: Any) -> Delta | None:
        kept = (torch.rand_like(module.weight) > 0.05).float()
        module.weight *= kept
        return mask_to_sparse(backbone.weights[f"layers.{layer}.{site}.weight"], kept, layer=layer, site=site)

    def diff(layer: int, site: str, module: Any) -> Delta | None:
        change = 0.05 * torch.randn_like(module.weight) * (torch.rand_like(module.weight) < 0.005)
        module.weight += change
        return diff_to_sparse(change, layer=layer, site=site)

    def maker(change: Callable[[int, str, Any], Delta | None], sites: Sequence[str]) -> _Maker:
        @torch.no_grad()
        def make(folder: Path) -> Any:
            import transformers

            model = _load(transformers.AutoModelForSequenceClassification, backbone).eval()
            modules, deltas = dict(model.base_model.named_modules()), []
            for layer in range(backbone.config.num_layers):
                for site in sites:
                    deltas.append(change(layer, site, modules[module_path(backbone.config.model_type, layer, site)]))

            def dense(path: str) -> Dense:
                linear = modules[path] if path == POOLER else model.get_submodule(path)
                return Dense(weight=linear.weight.detach().clone(), bias=linear.bias.detach().clone())

            head = build_head(backbone, "SEQ_CLS", None, {}, dense)
            return model, [delta for delta in deltas if delta is not None], head

        return make

    every = [*linears, "attn_norm", "ffn_norm"]
    return {
        ("native", "bitfit"): maker(bitfit, every),
        ("native", "mask"): maker(mask, linears),
        ("native", "diff"): maker(diff, linears),
    }


def _load(auto: Any, backbone: Backbone) -> Any:
    """A model of the library on the backbone; a new head is drawn wider than usual, so that logits are near one."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "initializer_range": 0.05}
    if auto is not transformers.AutoModel:
        options |= {"num_labels": 3, "ignore_mismatched_sizes": True}
    return auto.from_pretrained(backbone.folder, **options).float()


@torch.no_grad()
def _perturb_(model: nn.Module, trained: Callable[[str, nn.Parameter], bool]) -> None:
    """Small numbers on everything trained; AdaLoRA's singular values start at zero between small factors."""
    for name, parameter in model.named_parameters():
        if trained(name, parameter):
            parameter.add_((2.0 if "lora_E" in name else 0.02) * torch.randn_like(parameter))


@torch.no_grad()
def _logits(model: Any, backbone: Backbone, encoded: Encoded) -> Tensor:
    arguments = {"input_ids": torch.tensor([encoded.token_ids])}
    if backbone.config.type_vocab_size:
        arguments["token_type_ids"] = torch.tensor([encoded.type_ids])
    logits: Tensor = model(**arguments).logits[0]
    return logits
