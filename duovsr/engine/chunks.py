"""Cutting a stream of frames into the model's chunks, scene by scene."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from duovsr.engine.plan import TEMPORAL_FACTOR
from duovsr.engine.scenes import CutDetector


@dataclass(frozen=True)
class Chunk:
    """Frames of one model call, the first of them `start` frames after the scene's. `fresh`: no state is taken over.
    The first `warm_up` results are not shown."""

    frames: list[np.ndarray]
    start: int
    fresh: bool
    warm_up: int = 0

    @property
    def padded_length(self) -> int:
        """4k + 1 frames where the autoencoder starts, 4k after that."""
        extra = 1 if self.fresh else 0
        return -(-(len(self.frames) - extra) // TEMPORAL_FACTOR) * TEMPORAL_FACTOR + extra

    def padded_frames(self) -> np.ndarray:
        """(padded_length, H, W, 3); the last frame is repeated where the scene ends early, and dropped after."""
        missing = self.padded_length - len(self.frames)
        return np.stack(self.frames + [self.frames[-1]] * missing)

    def split(self, head: int) -> tuple[Chunk, Chunk]:
        """The same work in two calls: `head` frames, then the rest with the state of the first."""
        first = Chunk(self.frames[:head], self.start, self.fresh, min(self.warm_up, head))
        return first, Chunk(self.frames[head:], self.start + head, False, self.warm_up - first.warm_up)


def cut_into_chunks(
    frames: Iterable[np.ndarray], length: int, overlap: int | None, *, scene_cuts: bool = True
) -> Iterator[Chunk]:
    """Chunks of `length` frames (a multiple of 4; the first of a scene has one more).

    With `overlap` None each chunk takes over the state of the one before. With a number, chunks are independent: each
    starts fresh, `overlap` frames early (a multiple of 4), at a multiple of 4 frames since the scene's start; the first
    shows as many frames more, so that all calls but the last are equally long. Without `scene_cuts` all frames are one
    scene.
    """
    detector = CutDetector()
    pending: list[np.ndarray] = []
    history: deque[np.ndarray] = deque(maxlen=(overlap or 0) + 1)
    in_scene = 0  # frames of this scene that were handed out
    for frame in frames:
        if scene_cuts and detector.is_cut(frame):
            if pending:
                yield _chunk(pending, history, in_scene, overlap)
            pending, in_scene = [], 0
            history.clear()
        pending.append(frame)
        if len(pending) == length + (1 + (overlap or 0) if in_scene == 0 else 0):
            yield _chunk(pending, history, in_scene, overlap)
            history.extend(pending)
            in_scene += len(pending)
            pending = []
    if pending:
        yield _chunk(pending, history, in_scene, overlap)


def _chunk(pending: list[np.ndarray], history: deque[np.ndarray], in_scene: int, overlap: int | None) -> Chunk:
    if in_scene == 0:
        return Chunk(pending, in_scene, fresh=True)
    if overlap is None:
        return Chunk(pending, in_scene, fresh=False)
    # A fresh start decodes its first frame alone, so one frame more than the overlap is taken: starts stay aligned.
    warm = list(history)
    return Chunk(warm + pending, in_scene - len(warm), fresh=True, warm_up=len(warm))
