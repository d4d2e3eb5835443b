"""What the chunks of one clip have in common, and a chunk that is on its way."""

from __future__ import annotations

from dataclasses import dataclass

from duovsr.engine.blend import Tail
from duovsr.engine.chunks import Chunk
from duovsr.engine.plan import Plan
from duovsr.engine.stages import Clock, Marks
from duovsr.engine.transfer import Arriving, Transfer
from duovsr.model.one_step import RestoreState
from duovsr.options import UpscaleOptions

TileStates = tuple[RestoreState | None, ...]  # one a tile
States = TileStates | Tail  # what a chunk leaves to the next; of a model that does not stream, what is to be faded


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
