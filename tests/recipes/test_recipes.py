"""Every recipe in the repository is read, fits `TrainConfig` and, where it names data, trains."""

from pathlib import Path

import pytest

from tests.tiny import tiny_backbone
from training.train_peft import TrainConfig, read_recipe, run
from vbert.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "training/recipes").glob("*.toml"))
DEMOS = sorted((ROOT / "examples").glob("*.toml"))


@pytest.mark.parametrize("path", [*RECIPES, *DEMOS], ids=lambda path: path.stem)
def test_a_recipe_is_a_config(path):
    config = TrainConfig(**read_recipe(path))
    assert path.stem in (config.method, f"{Path(config.train).parent.name}_{path.stem.split('_')[-1]}")


def test_there_is_a_recipe_for_every_method_and_three_demos():
    assert {path.stem for path in RECIPES} == {"lora", "bottleneck", "bitfit", "head"}
    assert len(DEMOS) == 3


def test_the_defaults_are_those_of_the_lora_recipe():
    assert TrainConfig(**read_recipe(ROOT / "training/recipes/lora.toml")) == TrainConfig()


@pytest.mark.slow
@pytest.mark.parametrize("path", DEMOS, ids=lambda path: path.stem)
def test_a_demo_trains_on_its_data(path, tmp_path):
    folder = tiny_backbone("bert", tmp_path / "backbone", num_layers=3)
    settings = read_recipe(path) | {"max_train_rows": 60, "epochs": 1}
    report = run(TrainConfig(**settings, backbone=str(folder), out=str(tmp_path / "demo.safetensors")))
    assert report.num_train_rows == 60
    assert report.num_labels == {"banking77": 77, "snips": 72, "wnut17": 13}[path.stem.split("_")[0]]


def test_the_examples_stay_small():
    sizes = [path.stat().st_size for path in (ROOT / "examples").rglob("*") if path.is_file()]
    assert sum(sizes) < 2_000_000


def test_paths_in_a_recipe_are_relative_to_it(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('train = "rows.jsonl"\ntargets = ["q"]')
    assert read_recipe(recipe) == {"train": str(tmp_path / "rows.jsonl"), "targets": ("q",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "sets 'learning_rate', which is no setting"),
        ("epochs = [", "cannot be read"),
        ("epochs = '3'", "epochs is '3'; give a value like 3"),
        ("epochs = 0", "epochs is 0; it must be at least 1"),
        ("method = 'ia3'", "method is 'ia3'; use lora, bottleneck, bitfit, head"),
        ("targets = ['query']", "targets is 'query'; use q, k, v"),
        ("lr = nan", "lr is nan; give a finite number"),
        ("exit_cost = 3.0", "exit_cost is 3.0; give a share of the metric up to 1"),
        ("paths = ['exact', 'exact']", "paths is exact,exact; give each of them once"),
        ("head_dropout = 1.0", "head_dropout is 1.0; give a share below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, text, message):
    recipe = tmp_path / "r.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        TrainConfig(**read_recipe(recipe))
    assert "\n" not in str(caught.value)
