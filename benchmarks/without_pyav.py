"""Import this before `duovsr.engine` on a machine that has no PyAV.

The engine reads and writes files with PyAV, and imports it with the rest; benchmarks on frames in memory call nothing
of it. Where it is missing, empty types take the place of all that is imported of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class Anything(type):
    """A type that has every attribute: types like itself."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Nothing(ModuleType):
    """A module of any name and contents."""

    __path__: list[str] = []  # noqa: RUF012  # makes it a package

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class StandIn:
    """Finds and loads `av` and all below it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "av" else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


if find_spec("av") is None:
    sys.modules.pop("av", None)
    sys.meta_path.insert(0, StandIn())
