"""When each picture is shown, whatever the file says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

LOOK_AHEAD = 2  # pictures; of one alone, nobody knows whether it or the one before it is wrong
_RECENT = 16  # pictures; no decoder holds back more


class Timeline:
    """Gives each picture a pts after the one before it. Usable pts are kept, and no others move those after them.

    A picture without a pts comes a `step` later than the one before, and so does one whose pts leads away from those
    before it and after it; one that is late, as around damage, comes a tick later. Where time starts again, as in
    joined files, what follows is moved on as a whole, by the next of `moves`. `misplaced` counts all of them.
    """

    def __init__(self, start: int, step: int) -> None:
        self.misplaced = 0
        self.moves: list[int] = []
        self._start, self._step = start, step
        self._shift = 0  # of what follows a new start of time
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def place(self, pts: int | None, following: Sequence[int | None] = ()) -> int:
        """The picture's pts, in the same units as `pts`, its own, and those of the `LOOK_AHEAD` pictures after it."""
        place = self._place(pts, [pts for pts in following if pts is not None])
        self.misplaced += place != pts
        self._recent.append(place)
        return place

    def _place(self, pts: int | None, following: list[int]) -> int:
        if not self._recent:
            if pts is not None and len(following) == LOOK_AHEAD and pts > max(following):
                return following[0] - self._step
            return self._start if pts is None else pts
        earliest, last = self._recent[0], self._recent[-1]
        expected = last + self._step
        if pts is None:
            return expected
        place, *after = (min((pts, pts + self._shift), key=lambda at: abs(at - expected)) for pts in (pts, *following))
        if after and last < min(after) and (place <= earliest or place > max(expected, *after)):  # alone in being wrong
            return max(last + 1, min(expected, min(after) - 1))
        if earliest < place <= last:  # late
            return last + 1
        if place <= earliest:
            place = expected
            self.moves.append(place - pts)
        self._shift = place - pts
        return place
