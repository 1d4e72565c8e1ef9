"""After a warm-up no batch of any kind compiles anything."""

import subprocess
import sys

import pytest

PROBE = """
import sys
from pathlib import Path

import torch

from tests.encoder.test_laws import Bench, all_kinds
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.formats.transformers_folder import read_backbone
from vbert.kernels import segmented_affine, segmented_layer_norm, segmented_sparse, two_products
from vbert.kernels.warm_up import warm_up

folder, dtype, warm = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "warm"
backbone = read_backbone(tiny_backbone("bert", folder / "backbone"))
bench = Bench(backbone, dtype, folder)
if warm:
    warm_up(bench.model.dtype)
modules = segmented_affine, segmented_layer_norm, segmented_sparse, two_products
before = [len(module._cpu.signatures) for module in modules]
tenants = [bench.load(module) for module in all_kinds(Factory(backbone, seed=3))]
bench.forward([sequence for tenant in tenants for sequence in bench.sequences(tenant)])
print(sum(len(module._cpu.signatures) for module in modules) - sum(before))
"""


def compiled_in_a_batch(folder, dtype, mode):
    command = [sys.executable, "-c", PROBE, str(folder), dtype, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_to_compile(tmp_path, dtype):
    assert compiled_in_a_batch(tmp_path, dtype, "warm") == 0


def test_without_it_a_batch_compiles(tmp_path):
    assert compiled_in_a_batch(tmp_path, "float32", "cold") > 0
