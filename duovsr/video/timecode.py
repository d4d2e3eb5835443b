"""Timecodes: frames counted as hours:minutes:seconds:frames of a day, by which editors find them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor

_FASTEST = 255  # frames a second: mp4 and mov have a byte for it


@dataclass(frozen=True)
class Timecode:
    """`number` counts all frames since midnight. With `drops`, the first labels of each minute, but for every tenth,
    are left out, so that at 29.97 frames a second they stay with the clock."""

    number: int
    rate: Fraction
    drops: bool
    form: str  # of the last two labels: `:` or `;`, and how many digits the frames have

    @classmethod
    def parse(cls, text: str, rate: Fraction | None) -> Timecode | None:
        """None for what FFmpeg's muxers do not take at this rate."""
        parts = re.fullmatch(r"(\d\d):(\d\d):(\d\d)([:;.])(\d+)", text)
        if parts is None or not rate:
            return None
        hours, minutes, seconds, frames = (int(parts[group]) for group in (1, 2, 3, 5))
        a_second, drops = _a_second(rate), parts[4] != ":"
        if not frames < a_second <= _FASTEST or (drops and a_second % 30):
            return None
        whole = 60 * hours + minutes
        label = (60 * whole + seconds) * a_second + frames
        left_out = a_second // 15 * (whole - whole // 10) if drops else 0
        return cls(label - left_out, rate, drops, f"{parts[4]}{{:0{len(parts[5])}}}")

    def after(self, seconds: Fraction) -> Timecode:
        return Timecode(self.number + round(seconds * self.rate), self.rate, self.drops, self.form)

    def __str__(self) -> str:
        a_second = _a_second(self.rate)
        label = self.number
        if self.drops:
            left_out = a_second // 15
            a_minute = 60 * a_second - left_out
            tens, rest = divmod(label, 10 * a_minute + left_out)
            label += left_out * (9 * tens + max(0, (rest - left_out) // a_minute))
        seconds, frames = divmod(label, a_second)
        minutes, hours = seconds // 60, seconds // 3600 % 24
        return f"{hours:02}:{minutes % 60:02}:{seconds % 60:02}" + self.form.format(frames)


def _a_second(rate: Fraction) -> int:
    return floor(rate + Fraction(1, 2))
