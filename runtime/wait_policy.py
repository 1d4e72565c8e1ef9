"""How OpenMP's threads wait for each other: chosen before torch is loaded, or what to do where it is too late.

Where the compute lane may use every core, a neighbour (event loop, tokenizer, another process) always takes a part of
one. Threads that spin while they wait then stop each other: an operator of 0.1 ms waits for a time slice of the
scheduler. Threads that sleep (OMP_WAIT_POLICY=PASSIVE) cost more on a machine that has nothing else to do, and become
slower in proportion beside a neighbour (`vbert bench neighbour`). So:

- one compute thread waits for nobody: nothing is set;
- several threads on all of a few cores: PASSIVE;
- more cores: nothing is set, since half the cores, which `ThreadChoice` tries, leave room for neighbours;
- what the user set stays.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence

from runtime.config import EngineConfig
from runtime.flags import add_flags
from runtime.logs import log_to_stderr
from runtime.machine import usable_cores, wait_policy

__all__ = ["better_environment", "log_collapse", "restart_with", "suit_machine"]

_FEW_CORES = 4
_USERS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # with any of them somebody has decided
_log = logging.getLogger(__name__)


def better_environment(environment: Mapping[str, str], compute_threads: int, cores: int) -> dict[str, str] | None:
    """The environment that a server should run in; None: this one. compute_threads: as in EngineConfig.

    Never asks twice: in what it returns, the policy is set.
    """
    decided = any(environment.get(name) for name in _USERS)
    threads = compute_threads or cores
    if decided or threads == 1 or threads < cores or cores > _FEW_CORES:
        return None
    return {**environment, "OMP_WAIT_POLICY": "PASSIVE"}


def restart_with(environment: Mapping[str, str]) -> None:
    """This process begins anew with the same command line, process id and open files. Does not return.

    What the OpenMP library reads is the environment of the process when it is loaded, by whichever package comes first.
    """
    log_to_stderr()
    _log.info("starting again with OMP_WAIT_POLICY=%s: compute threads must not spin", environment["OMP_WAIT_POLICY"])
    logging.shutdown()
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, environment)


def suit_machine(arguments: Sequence[str]) -> None:
    """Start this process again in a better environment, if there is one. For `main` functions, before torch is loaded.

    arguments: those of the command line; what is wrong with them is said later, by whoever reads all of them.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add_flags(parser, EngineConfig)
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError:
        return
    environment = better_environment(os.environ, getattr(known, "compute_threads", 0), usable_cores())
    if environment is not None:
        restart_with(environment)


def log_collapse(threads: int, times: float) -> None:
    """For `ThreadChoice`: an engine that runs in somebody's process can only say what would help."""
    if wait_policy() == "PASSIVE":
        return
    _log.warning(
        "a batch on %d threads took %.0f times as long as on fewer, because something else keeps a core busy; "
        "fewer are used now, and OMP_WAIT_POLICY=PASSIVE, set before torch is imported, avoids it",
        threads,
        times,
    )
