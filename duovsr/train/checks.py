"""Checks of settings: a value that cannot work is refused by its name, with what would."""

from __future__ import annotations

import math
from typing import Any

from duovsr.errors import UsageError


def check(passes: bool, name: str, value: object, wanted: str) -> None:
    """Raises UsageError unless a setting `passes`."""
    if not passes:
        raise UsageError(f"unsupported {name}: `{value}`", hint=f"use {wanted}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, name, value, f"one of: {', '.join(choices)}")


def check_seed(seed: int) -> None:
    check(0 <= seed < 2**32, "seed", seed, "a whole number from 0 to 4294967295")


def check_parts(config: Any, *names: str) -> None:
    """Settings that are probabilities, or parts of a whole."""
    for name in names:
        value = getattr(config, name)
        check(0 <= value <= 1, name, value, "a number from 0 to 1")


def check_weights(config: Any, *names: str) -> None:
    """Settings that are weights of alternatives."""
    for name in names:
        values = getattr(config, name)
        usable = all(0 <= value < math.inf for value in values) and any(values)
        check(usable, name, values, "numbers of which none is negative and one is more than 0")


def check_ranges(config: Any, low: float, high: float, *names: str) -> None:
    """Settings that are (from, to), within `low` and `high`."""
    for name in names:
        start, end = getattr(config, name)
        bounds = f"from {low:g} on" if high == math.inf else f"from {low:g} to {high:g}"
        check(low <= start <= end <= high and end < math.inf, name, (start, end), f"two rising numbers {bounds}")
