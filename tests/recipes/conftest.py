"""A tiny backbone and jsonl files that a tiny tenant can learn: the words that decide are in the text."""

import gzip
import json

import pytest

from tests.tiny import tiny_backbone
from training.train_peft import TrainConfig

PLACES, MONEY = ("station", "town", "mat", "cafe"), ("euros", "savings", "account", "transfer")


def rows_of(task, count=24):
    for i in range(count):
        place = i % 2 == 0
        word = (PLACES if place else MONEY)[i // 2 % 4]
        words = ["the", word, "was", "nice" if i % 3 else "long"]
        if task == "token_classify":
            yield {"tokens": words, "tags": ["O", "B-place" if place else "B-money", "O", "O"]}
        elif task == "pairs":
            yield {"text": " ".join(words), "text_b": f"about the {word}", "label": int(place)}
        else:
            yield {"text": " ".join(words), "label": {"classify": "place" if place else "money"}.get(task, 3.0 + place)}


def write_rows(path, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory):
    return tiny_backbone("bert", tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def make_config(backbone_folder, tmp_path):
    """`make_config(task="pairs", method="lora", ...)`: files written, sizes tiny; pairs are classification rows."""

    def make(task="classify", **settings):
        train = write_rows(tmp_path / f"{task}.jsonl", rows_of(task))
        test = write_rows(tmp_path / f"{task}-test.jsonl.gz", rows_of(task, 8))
        small = {"rank": 2, "bottleneck_size": 4, "epochs": 2, "batch_size": 6, "lr": 0.01, "head_lr": 0.05}
        files = {"backbone": str(backbone_folder), "train": train, "dev": train, "test": test}
        task = "classify" if task == "pairs" else task
        return TrainConfig(
            **(files | {"task": task, "out": str(tmp_path / "out" / "t.safetensors")} | small | settings)
        )

    return make
