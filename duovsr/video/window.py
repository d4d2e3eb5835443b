"""The part of a source's timeline that goes into the output, and its place there."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import av

if TYPE_CHECKING:
    from av.container.core import Chapter


_ABSURD = 2**62  # ticks, which only damaged files have: a move could leave the 64 bits of a timestamp


@dataclass(frozen=True)
class Window:
    """The part of the source's timeline that is kept, in seconds; `end` is excluded, None is open. All of it moves by
    `shift`."""

    start: Fraction | None = None
    end: Fraction | None = None
    shift: Fraction = Fraction(0)

    def place(self, packet: av.Packet[Any], *, clip: bool) -> bool:
        """Moves a packet to its time in the output; False: it is outside.

        A packet belongs where it starts; with `clip`, for what is shown for a while, where any of it is, and it is cut.
        """
        tick = packet.time_base
        pts = packet.dts if packet.pts is None else packet.pts
        if pts is None:
            return self.start is None and self.end is None
        if abs(pts) >= _ABSURD:
            return False
        last = pts + (packet.duration or 0)
        if clip and self.start is not None and pts * tick < self.start < last * tick:
            late = ceil(self.start / tick) - pts
            pts += late
            packet.pts, packet.dts, packet.duration = pts, pts, last - pts
        if self.start is not None and pts * tick < self.start:
            return False
        if self.end is not None and pts * tick >= self.end:
            return False
        if clip and self.end is not None and last * tick > self.end:
            packet.duration = max(1, floor(self.end / tick) - pts)
        moved = round(self.shift / tick)
        packet.pts = None if packet.pts is None else packet.pts + moved
        packet.dts = None if packet.dts is None else packet.dts + moved
        return True

    def chapters(self, chapters: list[Chapter]) -> list[Chapter]:
        """Those that the window holds any of, cut and moved."""
        kept: list[Chapter] = []
        for chapter in chapters:
            tick = chapter["time_base"]
            assert tick is not None, "FFmpeg gives every chapter a time base"
            first, last = chapter["start"] * tick, chapter["end"] * tick
            if self.start is not None and first < self.start >= last:
                continue
            if self.end is not None and first >= self.end:
                continue
            first = first if self.start is None else max(first, self.start)
            last = last if self.end is None else min(last, self.end)
            start, end = (round((time + self.shift) / tick) for time in (first, last))
            kept.append({**chapter, "start": start, "end": end})
        return kept


WHOLE = Window()
