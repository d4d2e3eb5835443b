"""When each picture is shown, whatever the file says."""

from __future__ import annotations

from collections import deque

_RECENT = 16  # pictures; no decoder holds back more


class Timeline:
    """Gives each picture a pts after the one before it. Usable pts are kept, and no others move those after them.

    A picture without a pts comes a `step` later than the one before; one that is late, as around damage, a tick later.
    Where time starts again, as in joined files, what follows is moved on as a whole. `misplaced` counts all of them.
    """

    def __init__(self, start: int, step: int) -> None:
        self.misplaced = 0
        self._start, self._step = start, step
        self._shift = 0  # of what follows a new start of time
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def place(self, pts: int | None) -> int:
        """The picture's pts, in the same units as `pts`, its own."""
        place = self._place(pts)
        self.misplaced += place != pts
        self._recent.append(place)
        return place

    def _place(self, pts: int | None) -> int:
        if not self._recent:
            return self._start if pts is None else pts
        earliest, last = self._recent[0], self._recent[-1]
        expected = last + self._step
        if pts is None:
            return expected
        place = min((pts, pts + self._shift), key=lambda place: abs(place - expected))
        if earliest < place <= last:  # late
            return last + 1
        place = expected if place <= earliest else place
        self._shift = place - pts
        return place
