"""Which cost model an engine starts with: one that was measured, one that it measures now, or none."""

from __future__ import annotations

import logging
from pathlib import Path

from runtime.clock import MonotonicClock
from runtime.config import EngineConfig
from runtime.cost import CostModel
from runtime.machine import usable_cores
from runtime.profile_file import profile_path, read_profile, write_profile
from runtime.profiler import QUICK, Profiler, conditions_here
from runtime.threads import ThreadChoice
from vbert.errors import ConfigError
from vbert.formats.transformers_folder import Backbone
from vbert.model import Model

__all__ = ["lane_counts", "own_profile"]

_NOISY = 0.25  # median spread
_log = logging.getLogger(__name__)


def own_profile(config: EngineConfig, backbone: Backbone, model: Model) -> CostModel | None:
    """What `EngineConfig.profile` asks for: nothing, a file, or the one for this machine in a folder, which is measured
    and kept there if it is not there yet. Blocking, on the thread that computes.

    Raises ConfigError, CorruptFile (a file that cannot be used). A folder that cannot be written is only logged.
    """
    if not config.profile:
        return None
    counts = lane_counts(config)
    here = conditions_here(backbone, model.dtype, model.device, max(counts))
    path = Path(config.profile).expanduser()
    if path.suffix == ".json":
        return read_profile(path, here)
    path = profile_path(path, here)
    if path.exists():
        return read_profile(path, here)
    cost = _measure(backbone, model, Path(config.store), counts)
    try:
        write_profile(path, cost)
    except ConfigError as error:
        _log.warning("the profile is measured again at the next start: %s", error.message)
    else:
        _log.info("the profile is kept in %s; `vbert profile` makes a better one", path)
    return cost


def lane_counts(config: EngineConfig) -> tuple[int, ...]:
    """Thread counts that the compute lane chooses from."""
    return ThreadChoice.of_lane(config.compute_threads, usable_cores()).counts


def _measure(backbone: Backbone, model: Model, folder: Path, counts: tuple[int, ...]) -> CostModel:
    clock = MonotonicClock()
    begin_s = clock.now_s()
    _log.info("no profile of this machine and backbone yet: measuring a short one")
    profiler = Profiler(backbone=backbone, model=model, folder=folder, thread_counts=counts, effort=QUICK, clock=clock)
    cost = profiler.run()
    noisy = ", which is noisy: measure again when the machine is quiet" if cost.noise > _NOISY else ""
    _log.info("measured in %.1f s; repeats spread by %.0f %%%s", clock.now_s() - begin_s, 100 * cost.noise, noisy)
    return cost
