"""What the chunks of one clip have in common, and a chunk that is on its way."""

from __future__ import annotations

from dataclasses import dataclass

from duovsr.engine.chunks import Chunk
from duovsr.engine.jobs import TileStates
from duovsr.engine.plan import Plan
from duovsr.engine.stages import Clock, Marks
from duovsr.engine.transfer import Arriving, Transfer
from duovsr.options import UpscaleOptions


@dataclass(frozen=True)
class Run:
    """One clip's. `notices` are added to: every step down, where memory runs out."""

    plan: Plan
    options: UpscaleOptions
    notices: list[str]
    clock: Clock
    transfer: Transfer


@dataclass(frozen=True)
class Launched:
    """A chunk that the device was given. Its results arrive some time, in parts; `states` are what the next is launched
    with."""

    chunk: Chunk
    arriving: list[Arriving]
    states: TileStates
    marks: Marks
