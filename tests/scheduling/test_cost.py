"""The cost model: interpolation, what lies outside, and where a profile is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cost import Conditions, CostModel, Curve, Point
from runtime.profile_file import cache_folder, profile_path, read_profile, write_profile
from vbert.errors import ConfigError, CorruptFile

HERE = Conditions(
    device="a CPU", threads=2, wait_policy="default", dtype="float32", torch="2.13.0", vbert="0", layers=2, hidden=32,
    ffn=64,
)  # fmt: skip


def curve(*pairs):
    return Curve([Point(size=size, seconds=s, spread=0.1, repeats=3, threads=1) for size, s in pairs])


def model(**curves):
    base = {
        "forward/32": curve((32, 0.01), (1024, 0.1)),
        "forward/128": curve((128, 0.02), (1024, 0.16)),
        "load/warm": curve((1000, 0.001), (1_000_000, 0.002)),
        "load/cold": curve((1000, 0.004)),
        "gather_rows/32": curve((16, 1e-5)),
        "self_test": curve((1, 0.01), (16, 0.05)),
    }
    return CostModel(HERE, base | curves)


def test_between_two_points_it_is_linear():
    assert curve((10, 1.0), (20, 3.0)).seconds(15) == pytest.approx(2.0)
    assert curve((10, 1.0), (20, 3.0)).seconds(10) == 1.0


def test_below_the_points_it_is_flat_and_above_in_proportion():
    measured = curve((10, 1.0), (20, 3.0))
    assert measured.seconds(1) == 1.0
    assert measured.seconds(40) == pytest.approx(6.0)


def test_a_disturbed_point_is_corrected_by_a_larger_one():
    assert curve((10, 1.0), (20, 9.0), (40, 2.0)).seconds(20) == 2.0


@given(
    st.dictionaries(st.integers(1, 10_000), st.floats(1e-6, 10), min_size=1, max_size=8),
    st.lists(st.floats(0, 30_000), min_size=2, max_size=8),
)
def test_more_never_costs_less(pairs, sizes):
    measured = curve(*sorted(pairs.items()))
    seconds = [measured.seconds(size) for size in sorted(sizes)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(seconds))
    assert all(measured.seconds(size) <= s * (1 + 1e-9) for size, s in pairs.items())


def test_longer_sequences_cost_more():
    cost = model()
    assert cost.forward_s(1024) == pytest.approx(0.1)
    assert cost.forward_s(1024, 80) == pytest.approx(0.13)
    assert cost.forward_s(1024, 224) == pytest.approx(0.22)
    assert cost.forward_s(1024, 8) == pytest.approx(0.1)


def test_a_length_beyond_disturbed_ones_never_costs_less():
    cost = model(**{"forward/128": curve((1024, 0.05))})
    assert cost.forward_s(1024, 512) == pytest.approx(0.05)


def test_a_change_of_whole_weights_costs_what_brings_them():
    cost = model(swap=curve((1_000_000, 0.0005)))
    assert cost.weights_bytes == 1_000_000
    assert (cost.swap_s(), cost.swap_s("host"), cost.swap_s("warm")) == pytest.approx((0.0005, 0.0005, 0.0025))
    on_a_gpu = model(swap=curve((1_000_000, 0.0005)), upload=curve((1_000_000, 0.004)))
    assert (on_a_gpu.swap_s(), on_a_gpu.swap_s("host"), on_a_gpu.swap_s("warm")) == pytest.approx((5e-4, 45e-4, 65e-4))
    assert model().weights_bytes is None
    with pytest.raises(ConfigError, match="does not know whole weights"):
        model().swap_s()


def test_every_operation_has_its_seconds():
    cost = model()
    assert (cost.load_s(1_000_000), cost.load_s(1000, "cold")) == (0.002, 0.004)
    assert cost.gather_s(32) == pytest.approx(2e-5)
    assert cost.self_test_s() == 0.01
    assert cost.upload_s(10**9) == 0.0
    assert model(upload=curve((1000, 0.5))).upload_s(10) == 0.5
    assert cost.noise == pytest.approx(0.1)


def test_what_modules_add_is_between_what_was_measured():
    """64 tokens take 11 ms bare, 15 and 17 ms with modules of size 8 of one and of 5 tenants, 19 ms with size 16."""
    bare = curve((32, 0.01), (96, 0.012))
    cost = model(**{
        "forward/32": bare,
        "with/low_rank/8/1": curve((64, 0.015)),
        "with/low_rank/8/5": curve((64, 0.017)),
        "with/low_rank/16/1": curve((64, 0.019)),
        "with/affine/0/1": curve((64, 0.010)),
    })  # fmt: skip
    assert cost.module_kinds == ("low_rank", "affine")
    added = {(tenants, size): cost.module_s("low_rank", 64, tenants, size) for tenants in (1, 3, 9) for size in (8, 12)}
    assert added[1, 8] == pytest.approx(0.004)
    assert added[3, 8] == pytest.approx(0.005)
    assert added[9, 8] == pytest.approx(0.008)
    assert added[1, 12] == pytest.approx(0.006)
    assert cost.module_s("low_rank", 64, 1, 4) == pytest.approx(0.004)
    assert cost.module_s("low_rank", 8) == pytest.approx(0.004)  # as in the 64 that were measured
    assert cost.module_s("affine", 64) == 0  # noise is no gain
    with pytest.raises(ConfigError, match="kind low_rank, affine, not 'sparse'; run `vbert profile`"):
        cost.module_s("sparse", 64)
    with pytest.raises(ConfigError, match="kind none"):
        model().module_s("sparse", 64)


def test_a_profile_comes_back_as_it_was_written(tmp_path):
    path = profile_path(tmp_path / "new" / "folder", HERE)
    write_profile(path, model())
    again = read_profile(path, HERE)
    assert again.conditions == HERE
    assert {name: each.points for name, each in again.curves.items()} == {
        name: each.points for name, each in model().curves.items()
    }
    assert [each.name for each in path.parent.iterdir()] == [path.name]


CHANGES = {"device": "another CPU", "threads": 4, "wait_policy": "PASSIVE", "dtype": "bfloat16", "torch": "2.14.0",
           "vbert": "9", "layers": 12, "hidden": 768, "ffn": 3072}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_refused_elsewhere_with_what_differs(tmp_path, name):
    write_profile(tmp_path / "p.json", model())
    there = replace(HERE, **{name: CHANGES[name]})
    assert profile_path(tmp_path, there) != profile_path(tmp_path, HERE)
    with pytest.raises(ConfigError, match=rf"{name} .*\(here '?{CHANGES[name]}'?\); run `vbert profile`") as raised:
        read_profile(tmp_path / "p.json", there)
    assert str(tmp_path / "p.json") in raised.value.message


def damaged():
    whole = model().to_json()
    one = whole["curves"]["self_test"][0]
    return {
        "another format": whole | {"format": 99},
        "not an object": [1],
        "no conditions": {name: value for name, value in whole.items() if name != "conditions"},
        "a condition too many": whole | {"conditions": whole["conditions"] | {"moon": "full"}},
        "no forward": whole | {"curves": {n: c for n, c in whole["curves"].items() if "forward" not in n}},
        "no loads": whole | {"curves": {n: c for n, c in whole["curves"].items() if "load" not in n}},
        "an empty curve": whole | {"curves": whole["curves"] | {"self_test": []}},
        "sizes that fall": whole | {"curves": whole["curves"] | {"self_test": [one, one]}},
        "no time at all": whole | {"curves": whole["curves"] | {"self_test": [one | {"seconds": 0}]}},
        "text for a number": whole | {"curves": whole["curves"] | {"self_test": [one | {"seconds": "fast"}]}},
    }


@pytest.mark.parametrize("what", damaged())
def test_a_damaged_profile_is_refused(tmp_path, what):
    (tmp_path / "p.json").write_text(json.dumps(damaged()[what]))
    with pytest.raises((ConfigError, CorruptFile), match="run `vbert profile`"):
        read_profile(tmp_path / "p.json", HERE)


def test_a_file_that_is_cut_or_missing_is_refused(tmp_path):
    (tmp_path / "cut.json").write_text(json.dumps(model().to_json())[:-9])
    with pytest.raises(CorruptFile, match="not JSON"):
        read_profile(tmp_path / "cut.json", HERE)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "missing.json", HERE)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot be made"):
        write_profile(tmp_path / "file" / "p.json", model())


def test_a_failed_write_leaves_nothing_and_keeps_the_old_one(tmp_path, monkeypatch):
    write_profile(tmp_path / "p.json", model())
    before = (tmp_path / "p.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="No space left"):
        write_profile(tmp_path / "p.json", model(upload=curve((1, 1.0))))
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert (tmp_path / "p.json").read_bytes() == before


def test_the_cache_folder_is_the_users():
    assert str(cache_folder({"XDG_CACHE_HOME": "/x", "HOME": "/h"})) == "/x/vbert"
    assert str(cache_folder({"HOME": "/h"})) == "/h/.cache/vbert"
