"""Which modules a PEFT config means: target, exclude, layer and rank patterns, by PEFT's own rules.

Source: `peft/tuners/tuners_utils.py::check_target_module_exists`, `peft/utils/other.py::get_pattern_key` (0.21).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vbert.errors import RefusedCheckpoint

__all__ = ["is_feedforward", "is_saved", "pattern_value", "targets"]

Config = Mapping[str, Any]


def targets(config: Config, name: str, *, is_linear: bool) -> bool:
    """Whether the config asks for a change of the module called `name` in the trained model."""
    if _listed(config.get("exclude_modules"), name, "exclude_modules") or _is_excluded(config, name):
        return False
    wanted = config.get("target_modules") or ()
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return is_linear
    if not _listed(wanted, name, "target_modules"):
        return False
    return isinstance(wanted, str) or name in wanted or _layer_is_chosen(config, name)


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of `name` from a dot on; the default where none does."""
    for pattern, value in (patterns or {}).items():
        if _compiled("rank_pattern or alpha_pattern", rf"(.*\.)?({pattern})$").match(name):
            return value
    return default


def is_feedforward(config: Config, name: str) -> bool:
    """IA3's rule: a regular expression, or any ending, dot or not."""
    wanted = config.get("feedforward_modules") or []
    if isinstance(wanted, str):
        return _compiled("feedforward_modules", wanted).fullmatch(name) is not None
    return any(name.endswith(ending) for ending in wanted)


def _listed(wanted: str | Iterable[str] | None, name: str, key: str) -> bool:
    if isinstance(wanted, str):
        return _compiled(key, wanted).fullmatch(name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted or ())


def is_saved(config: Config, name: str) -> bool:
    """Whether modules_to_save trains the module, or one that holds it, whole: any ending counts, dot or not."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(module) for module in config.get("modules_to_save") or () for path in paths)


def _is_excluded(config: Config, name: str) -> bool:
    """A module that is trained whole is never a target as well. Here PEFT does want whole names."""
    saved = config.get("modules_to_save") or ()
    return any(_compiled("modules_to_save", rf"(^|.*\.){module}($|\..*)").match(name) for module in saved)


def _layer_is_chosen(config: Config, name: str) -> bool:
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # Without a pattern PEFT wants something before the name of the list, with one it does not.
    before = r"(?:^|.*?\.)" if config.get("layers_pattern") else r".*?\."
    found = (_compiled("layers_pattern", rf"{before}{pattern}\.(?P<idx>\d+)\.").match(name) for pattern in patterns)
    match = next((match for match in found if match), None)
    return match is not None and int(match["idx"]) in ([chosen] if isinstance(chosen, int) else chosen)


def _compiled(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RefusedCheckpoint(
            f"{key} holds {pattern!r}, which is no regular expression ({error}); correct it", param=key
        ) from None
