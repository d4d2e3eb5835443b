"""`--set key=value` into a configuration: a frozen dataclass, or {stage: dataclass} of a recipe."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

from duovsr.errors import UsageError


class _Setting(NamedTuple):
    path: tuple[str, ...]
    value: str
    text: str  # as it was given


def with_settings(config: Any, settings: list[str]) -> Any:
    """`config` with settings such as `steps=100`, of a recipe `dual.steps=100`, or `dual=off` to leave a stage out.

    They take effect together, so that their order does not matter to the checks. Raises UsageError.
    """
    read = []
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"not a setting: `{text}`", hint="write `--set key=value`")
        read.append(_Setting(tuple(key.split(".")), value, text))
    return _changed(config, read)


def _changed(config: Any, settings: list[_Setting]) -> Any:
    recipe = isinstance(config, dict)
    parts = config if recipe else {field.name: getattr(config, field.name) for field in fields(config)}
    off = {setting.path[0] for setting in settings if recipe and setting.path[1:] == () and setting.value == "off"}
    own: dict[str, list[_Setting]] = {}
    for setting in settings:
        name, *rest = setting.path
        if name not in parts or (rest and not is_dataclass(parts[name])):
            raise UsageError(f"unknown setting: `{setting.text}`", hint="see the configuration with `--dry-run`")
        if is_dataclass(parts[name]) and not rest and name not in off:
            raise UsageError(f"not a single value: `{setting.text}`", hint=f"set a part of it, `{name}.PART=VALUE`")
        own.setdefault(name, []).append(setting._replace(path=tuple(rest)))
    changes = {name: _value(parts[name], own[name]) for name in own.keys() - off}
    if recipe:
        return {stage: each for stage, each in (config | changes).items() if stage not in off}
    return replace(config, **changes)


def _value(current: Any, settings: list[_Setting]) -> Any:
    """The last of the values given, in the type of the current one."""
    return _changed(current, settings) if is_dataclass(current) else _parse(settings[-1], current)


def _parse(setting: _Setting, current: Any) -> Any:
    value = setting.value
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(current, tuple):
            parts = value.split(",")
            if all(isinstance(old, str) for old in current):
                return tuple(parts)
            if len(parts) != len(current):
                raise ValueError
            return tuple(type(old)(new) for old, new in zip(current, parts, strict=True))
        return type(current)(value)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(f"unsupported value: `{setting.text}`", hint=f"its default is `{current}`") from error
