"""Hard cuts, found on the fly: the model's memory must not carry one scene into the next."""

from __future__ import annotations

import numpy as np

_GRID = 24  # the frame is compared as about 24 x 24 block samples
_ABSOLUTE = 0.12  # mean change of full range that can be a cut
_FIRST = 0.2  # as much at once is a cut even without a past
_RELATIVE = 4.0  # and how far it must stand out from the changes before it


class CutDetector:
    """`is_cut(frame)` for frames in order. A cut is a change that is large, and large against the recent motion."""

    def __init__(self) -> None:
        self._previous: np.ndarray | None = None
        self._usual: float | None = None

    def is_cut(self, frame: np.ndarray) -> bool:
        """`frame` is (H, W, 3): uint8, uint16, or float in [0, 1]. The first frame is no cut."""
        sample = _sample(frame)
        previous, self._previous = self._previous, sample
        if previous is None:
            return False
        change = float(np.abs(sample - previous).mean())
        if self._usual is None:  # the scene's second frame: nothing to compare its motion with
            cut = change > _FIRST
        else:
            cut = change > _ABSOLUTE and change > _RELATIVE * self._usual
        if cut:
            self._usual = None
        else:
            self._usual = change if self._usual is None else 0.7 * self._usual + 0.3 * change
        return cut


def _sample(frame: np.ndarray) -> np.ndarray:
    """Means of thin samples of a coarse grid of blocks, in [0, 1]: cheap, and steady under motion inside a block."""
    top = float(np.iinfo(frame.dtype).max) if np.issubdtype(frame.dtype, np.integer) else 1.0
    height, width = frame.shape[:2]
    rows = np.linspace(0, height, min(_GRID, height) + 1).astype(int)[:-1]
    columns = np.linspace(0, width, min(_GRID, width) + 1).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(frame.astype(np.float32), rows, axis=0), columns, axis=1)
    counts = np.diff([*rows, height])[:, None, None] * np.diff([*columns, width])[None, :, None]
    return np.asarray(sums / counts / top)
