"""Products in bfloat16 on a CPU: filled up to a few numbers of rows, with weights in the machine's order or not."""

import pytest
import torch

from vbert.kernels.half_linear import half_linear, packed, takes_half, whole_rows
from vbert.workspace import Workspace

IN, OUT = 24, 40
NATIVE = packed(torch.zeros(OUT, IN, dtype=torch.bfloat16)) is not None
IN_ORDER = pytest.param(True, marks=pytest.mark.skipif(not NATIVE, reason="oneDNN has no bfloat16 here"))
CLOSE = {"rtol": 1.6e-2, "atol": 1.6e-2}


@pytest.fixture
def space():
    """Whose memory holds no numbers, as memory that nobody wrote may."""
    space = Workspace(torch.bfloat16, torch.device("cpu"))
    for name in ("half_linear", "out"):
        space.rows(name, 600, OUT).fill_(torch.nan)
    return space


def weights():
    torch.manual_seed(0)
    return torch.randn(OUT, IN).bfloat16(), torch.randn(OUT).bfloat16()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 31, 63, 64, 67, 130, 511])
@pytest.mark.parametrize("in_order", [False, IN_ORDER])
def test_it_is_the_product(rows, in_order, space):
    weight, bias = weights()
    x = torch.randn(rows, IN).bfloat16()
    got = half_linear(x, packed(weight) if in_order else weight, bias, "out", space)
    want = x.float() @ weight.float().t() + bias.float()
    assert got.shape == (rows, OUT)
    torch.testing.assert_close(got.float(), want, **CLOSE)


def test_rows_are_read_where_they_lie_if_their_memory_goes_on(space, monkeypatch):
    weight, bias = weights()
    every, taken = torch.randn(80, IN).bfloat16(), []

    def rows(self, name, *shape):
        taken.append(name)
        return torch.empty(shape, dtype=torch.bfloat16)

    monkeypatch.setattr(Workspace, "rows", rows)
    for x in (every[:66], every[10:75], every[:64], every[15:]):
        got = half_linear(x, weight, bias, "out", space)
        torch.testing.assert_close(got, torch.addmm(bias, x, weight.t()), **CLOSE)
    assert taken == ["out", "out", "out", "half_linear", "out"]


def test_columns_of_something_wider(space):
    weight, bias = weights()
    x = torch.randn(66, 3 * IN).bfloat16()[:, IN : 2 * IN]
    got = half_linear(x, weight, bias, "out", space)
    torch.testing.assert_close(got, torch.addmm(bias, x, weight.t()), **CLOSE)


def test_few_numbers_of_rows():
    counts = [whole_rows(n) for n in range(1, 4097)]
    assert all(n <= whole < n + max(4, n / 16) for n, whole in enumerate(counts, 1))
    assert len({*counts}) <= 16 + 6 * 16


def test_only_bfloat16_on_a_cpu():
    assert takes_half(torch.zeros(1, dtype=torch.bfloat16))
    assert not takes_half(torch.zeros(1))
    assert not takes_half(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    assert packed(torch.zeros(OUT, IN)) is None
