"""The terms of a plan: what it says of the settings it was made with, and the settings that it gives back."""

from __future__ import annotations

from typing import Any

from onnxdp.errors import PlanError, UsageError
from onnxdp.plain import to_plain
from onnxdp.records import Plan
from onnxdp.settings import CALIBRATION, REAL_INPUTS, Settings

_CARRIED = (
    "method",
    "macs",
    "solver",
    "iterations",
    "unweighted",
    "refit",
    "freeze_initializers",
    "short_names",
    "include",
    "exclude",
    "samples",
    "seed",
    *CALIBRATION,
)
"""Settings that decide what the arrays of a choice become: a plan carries them."""

_REAL = "real_inputs"
"""What a plan carries beside these: the setting that gave real inputs, whose data it cannot hold."""


def said_of(settings: Settings) -> dict[str, Any]:
    """Return what a plan has to say of settings, as plain values."""
    said = {k: v for k, v in to_plain(settings).items() if k in _CARRIED}
    return said | {_REAL: settings.real_inputs}


def settings_of(plan: Plan, **extra: Any) -> Settings:
    """Return the settings that a plan was made with, and those that it does not carry as they are given.

    Raises
    ------
    PlanError
        One is unknown, missing or unusable, or real inputs are not given again.
    """
    known = (*_CARRIED, _REAL)
    unknown = sorted(set(plan.settings) - set(known))
    if unknown:
        raise PlanError(f"The plan's settings have an unknown entry {unknown[0]!r}; remove it.")
    missing = [n for n in known if n not in plan.settings]
    if missing:
        raise PlanError(f"The plan's settings lack {missing[0]!r}; write it again with 'onnxdp plan'.")
    said = dict(plan.settings)
    real = said.pop(_REAL)
    if real is not None and (real not in REAL_INPUTS or extra[real] is None):
        option = f"--{real}" if real in REAL_INPUTS else " or ".join(f"--{n}" for n in REAL_INPUTS)
        raise PlanError(
            f"The plan was made on real inputs, which it does not hold; give them again with {option}."
        )
    try:
        return Settings(**said, **extra)
    except UsageError as e:
        raise PlanError(f"The plan's settings are unusable: {e.message}") from e
