"""After a warm-up no batch of any kind compiles anything."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

PROBE = """
import sys
from pathlib import Path

import torch

from tests.encoder.test_laws import Bench, all_kinds
from tests.random_tenants import Factory
from tests.tiny import tiny_backbone
from vbert.formats.transformers_folder import read_backbone
from vbert.kernels import few_rows, mean_rows, segmented_affine, segmented_layer_norm, segmented_sparse, two_products
from vbert.kernels.warm_up import warm_up

folder, dtype, warm = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "warm"
backbone = read_backbone(tiny_backbone("bert", folder / "backbone"))
bench = Bench(backbone, dtype, folder)
if warm:
    warm_up(bench.model.dtype)
kernels = [module._cpu for module in (few_rows, segmented_affine, segmented_layer_norm, segmented_sparse, two_products)]
kernels += [mean_rows._mean, mean_rows._unit]
before = sum(len(kernel.signatures) for kernel in kernels)
tenants = [bench.load(module) for module in all_kinds(Factory(backbone, seed=3))]
bench.forward([sequence for tenant in tenants for sequence in bench.sequences(tenant)])
print(sum(len(kernel.signatures) for kernel in kernels) - before)
"""


def compiled_in_a_batch(folder, dtype, mode):
    command = [sys.executable, "-c", PROBE, str(folder), dtype, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(dtype, mode) -> how many kernels a batch compiled; the processes run side by side."""
    cases = [("float32", "warm"), ("bfloat16", "warm"), ("float32", "cold")]
    with ThreadPoolExecutor(2) as pool:
        counts = pool.map(lambda case: compiled_in_a_batch(tmp_path_factory.mktemp("-".join(case)), *case), cases)
        return dict(zip(cases, counts, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_to_compile(compiled, dtype):
    assert compiled[dtype, "warm"] == 0


def test_without_it_a_batch_compiles(compiled):
    assert compiled["float32", "cold"] > 0
