"""A skip backbone, random tenants of all its paths, and tables of some of its n-grams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tests.random_tenants import Factory
from tests.serving.helpers import softmax
from vbert.model import Model
from vbert.ngram.index import ngram_keys
from vbert.ngram.table import TableWriter
from vbert.reference import dense_forward
from vbert.tokenizer import Tokenizer


class World:
    def __init__(self, backbone, folder):
        self.backbone, self.folder = backbone, folder
        self.model = Model.load(backbone, "float32", "cpu")
        self.tokenizer = Tokenizer.load(backbone.folder, backbone.config)
        self.paths = ("plain", "exact", "backoff") if backbone.skip.config.first_layer else ("exact", "backoff")

    def tenant(self, seed, *paths):
        paths = paths or self.paths
        module = Factory(self.backbone, seed=seed).tenant("lora_all", head="classify")
        first, last = self.backbone.skip.config.first_layer, self.backbone.config.num_layers
        deltas = tuple(replace(d, layer=max(first, d.layer)) for d in module.deltas if d.layer >= first)
        assert deltas
        assert all(d.layer < last for d in deltas)
        fingerprint = self.backbone.fingerprint if "plain" in paths else self.backbone.skip.fingerprint
        return replace(
            module,
            deltas=deltas,
            paths=paths,
            skip_fingerprint=self.backbone.skip.fingerprint,
            backbone_fingerprint=fingerprint,
        )

    def keys(self, texts):
        ids = [np.array(e.token_ids) for e in self.tokenizer.encode(texts, offsets=False)]
        return ngram_keys(np.concatenate(ids), np.concatenate([[0], np.cumsum([len(i) for i in ids])]))

    def table(self, keys, name="t.ngrams", noise=0.0, dtype=torch.float16, **about):
        keys = np.unique(keys)
        with TableWriter(
            self.folder / name,
            fingerprint=self.backbone.skip.base,
            keys=keys,
            counts=np.ones(len(keys), np.int64),
            width=self.backbone.config.hidden_size,
            dtype=dtype,
            about=about,
        ) as writer:
            rows = self.model.local.encode(keys)
            writer.add(rows + noise * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
        return str(self.folder / name)

    def expected(self, module, text, path):
        (encoded,) = self.tokenizer.encode([text], offsets=False)
        return softmax(dense_forward(self.backbone, module, encoded.token_ids, encoded.type_ids, path).numpy())
