"""Cutting a stream of frames into the model's chunks, scene by scene."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from duovsr.engine.plan import TEMPORAL_FACTOR
from duovsr.engine.scenes import CutDetector


@dataclass(frozen=True)
class Chunk:
    """Frames of one model call, the first of them `start` frames after the scene's. `fresh`: the model takes over no
    state. The first `warm_up` results are not shown; or the first `fade` are cross-faded with the end of the chunk
    before, which kept them back as this one keeps its last `kept` for the next."""

    frames: list[np.ndarray]
    start: int
    fresh: bool
    warm_up: int = 0
    fade: int = 0
    kept: int = 0

    @property
    def continues(self) -> bool:
        """Whether it takes anything over from the chunk before."""
        return not self.fresh or self.fade > 0

    @property
    def shown(self) -> int:
        """How many frames it shows, of those that come next."""
        return len(self.frames) - self.warm_up - self.kept

    @property
    def padded_length(self) -> int:
        """4k + 1 frames where the autoencoder starts, 4k after that."""
        extra = 1 if self.fresh else 0
        return -(-(len(self.frames) - extra) // TEMPORAL_FACTOR) * TEMPORAL_FACTOR + extra

    def padded_frames(self) -> list[np.ndarray]:
        """`padded_length` frames: the last is repeated where the scene ends early, and dropped after."""
        missing = self.padded_length - len(self.frames)
        return self.frames + [self.frames[-1]] * missing

    def calls(self, length: int) -> Iterator[Chunk]:
        """The same work in calls of at most `length` frames (a multiple of 4; one more where it starts fresh), each
        with the state of the one before; of all their results together the first `warm_up` are not shown."""
        ends = range(length + self.fresh, len(self.frames), length)
        for begin, end in pairwise([0, *ends, len(self.frames)]):
            yield Chunk(self.frames[begin:end], self.start + begin, self.fresh and begin == 0)


def cut_into_chunks(
    frames: Iterable[np.ndarray], length: int, overlap: int | None, *, fade: int = 0, scene_cuts: bool = True
) -> Iterator[Chunk]:
    """Chunks of `length` frames (a multiple of 4; the first of a scene has one more).

    With `overlap` None each chunk takes over the state of the one before. With a number, each starts fresh, `overlap`
    frames early (a multiple of 4), at a multiple of 4 frames since the scene's start; the first has as many frames
    more, so that all calls but the last are equally long. What two chunks have in common is cross-faded where `fade`
    says so (`overlap` + 1 frames, or 0), and else shown by the first. Without `scene_cuts` all frames are one scene.
    """
    detector = CutDetector()
    pending: list[np.ndarray] = []
    history: deque[np.ndarray] = deque(maxlen=(overlap or 0) + 1)
    in_scene = 0  # frames of this scene that were handed out
    for frame in frames:
        cut = scene_cuts and detector.is_cut(frame)
        if cut or len(pending) == length + (1 + (overlap or 0) if in_scene == 0 else 0):
            if pending:
                yield _chunk(pending, history, in_scene, overlap, fade, 0 if cut else fade)
            history.extend(pending)
            in_scene += len(pending)
            pending = []
        if cut:
            in_scene = 0
            history.clear()
        pending.append(frame)
    if pending:
        yield _chunk(pending, history, in_scene, overlap, fade, 0)


def _chunk(
    pending: list[np.ndarray], history: deque[np.ndarray], in_scene: int, overlap: int | None, fade: int, kept: int
) -> Chunk:
    if in_scene == 0:
        return Chunk(pending, in_scene, fresh=True, kept=kept)
    if overlap is None:
        return Chunk(pending, in_scene, fresh=False)
    # A fresh start decodes its first frame alone, so one frame more than the overlap is taken: starts stay aligned.
    warm = list(history)
    warm_up = 0 if fade else len(warm)
    return Chunk(warm + pending, in_scene - len(warm), fresh=True, warm_up=warm_up, fade=fade, kept=kept)
