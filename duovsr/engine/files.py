"""One file, from path to path: read, restored, encoded piece by piece, put together, verified, put in place."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duovsr.engine.identity import identity_of
from duovsr.engine.jobs import Job
from duovsr.engine.memory import memory_errors
from duovsr.engine.pipeline import BackgroundSink, one_ahead, prefetch
from duovsr.engine.plan import Plan
from duovsr.engine.run import Launched, Run, States
from duovsr.engine.stages import StageTimes
from duovsr.errors import InputError, Interrupted, Remark
from duovsr.model.resize import resize_plane
from duovsr.options import PIPE, Progress, UpscaleOptions
from duovsr.video.codecs import Encoding, encoding_for
from duovsr.video.container import ffmpeg_errors
from duovsr.video.encoder import VideoEncoder
from duovsr.video.images import kind_of
from duovsr.video.info import VideoInfo
from duovsr.video.mux import join_pieces, rehearse
from duovsr.video.output import Target, check_space, check_target, may_replace, publish
from duovsr.video.pictures import numbers_for, only_one, write_picture, write_pictures
from duovsr.video.reader import Frame, VideoReader
from duovsr.video.verify import verify_output
from duovsr.video.window import Window

if TYPE_CHECKING:
    from duovsr.engine.upscaler import Upscaler

PIECE_FRAMES = 48  # at least; each begins with a keyframe, and a crash costs at most one
_NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True)
class UpscaleReport:
    """What was done to one file. `reused` of its frames were there from an earlier, interrupted run."""

    frames: int
    reused: int
    seconds: float
    plan: Plan
    notices: tuple[str, ...]
    stages: StageTimes

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notices of what is not as it was in the source, or not as it was asked for."""
        return tuple(notice for notice in self.notices if not isinstance(notice, Remark))


@dataclass(frozen=True)
class _Step:
    """A chunk's: `launched` unless its piece is there, from an earlier run. `loaded` are the states that such a piece
    left, where the chunk takes them over."""

    piece: int
    is_last: bool  # of its piece
    shown: list[Frame]  # their times, without their pixels
    launched: Launched | None
    loaded: States | None


@dataclass(frozen=True)
class _PieceEnd:
    number: int
    states: States
    notices: list[str]


@dataclass
class _Work:
    """What the parts of one run share."""

    upscaler: Upscaler
    options: UpscaleOptions
    plan: Plan
    info: VideoInfo
    encoding: Encoding
    on_progress: Callable[[Progress], None] | None
    should_stop: Callable[[], bool]
    stages: StageTimes = field(default_factory=StageTimes)
    notices: list[str] = field(default_factory=list)
    frames: int = 0  # handed on
    reused: int = 0

    def run(self) -> Run:
        return self.upscaler.begin(self.plan, self.options, self.stages, self.notices)

    def count(self, frames: int) -> None:
        self.frames += frames
        if self.on_progress is not None:
            total = self.info.frames_between(self.options.start, self.options.end)
            self.on_progress(Progress(self.frames, total))


@memory_errors("free some memory, or use a smaller `--chunk` or `--size`")
def upscale_file(
    upscaler: Upscaler,
    source: Path,
    destination: Path,
    options: UpscaleOptions,
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool],
) -> UpscaleReport:
    """See `Upscaler.upscale_file`."""
    replaces = may_replace(destination, options)
    target = check_target(source, destination, replaces, options.codec, restart=options.restart)
    began = time.monotonic()
    with VideoReader(
        source,
        deinterlace=options.deinterlace,
        start=options.start,
        end=options.end,
        frame_rate=options.frame_rate,
        decoder=options.decoder,
    ) as reader:
        info = reader.info
        plan = upscaler.plan(info.width, info.height, options)
        encoding = encoding_for(target, info, plan.target_size, options)
        work = _Work(upscaler, options, plan, info, encoding, on_progress, should_stop)
        with ffmpeg_errors(destination):
            if target.kind == "pipe":
                _to_pipe(work, reader, target)
            else:
                _to_file(work, reader, target)
        notices = _all_notices(work, reader, target)
    seconds = time.monotonic() - began
    return UpscaleReport(work.frames, work.reused, seconds, work.plan, tuple(notices), work.stages)


def _to_file(work: _Work, reader: VideoReader, target: Target) -> None:
    source, destination = work.info.path, target.path
    rehearse(target, work.info, *work.plan.target_size, work.encoding)
    identity = identity_of(source, work.upscaler, work.options, work.encoding, PIECE_FRAMES)
    options, resumable = work.options, source != PIPE
    beside, restart = (options.audio, options.subtitles), options.restart
    with Job(destination, identity, work.plan, beside=beside, restart=restart, resumable=resumable) as job:
        if job.ended is not None:
            work.frames = work.reused = job.ended.frames
            work.notices += job.ended.notices
            return
        # The job before it may have been another process's, or other work, and have ended meanwhile.
        work.options = replace(options, overwrite=may_replace(destination, options))
        check_target(source, destination, work.options.overwrite, options.codec, restart=restart)
        least = _least_bytes(work)
        check_space(destination, least + max(0, least - job.bytes))  # the file, and what is missing of the pieces
        work.plan = job.plan
        _make_pieces(work, only_one(reader, target.path) if target.kind == "image" else reader, job)
        _put_together(work, reader, job, target)
        job.end(work.frames, _all_notices(work, reader, target))


def _make_pieces(work: _Work, frames: Iterable[Frame], job: Job) -> None:
    """Decode everything from the start, and restore and encode the chunks of pieces that the job needs.

    What is there already is decoded again, which is quick beside the model, and makes chunks, scenes and places equal
    to those of an uninterrupted run.
    """
    depth = 2 * work.plan.chunk
    writer, run = _PieceWriter(work, job), work.run()
    states: States | None = None  # unknown
    step: _Step | None = None
    stopped = False
    with (
        prefetch(frames, depth) as decoded,
        ExitStack() as on_failure,
        BackgroundSink(writer, depth) as sink,
    ):
        on_failure.callback(writer.abandon)
        for step in one_ahead(_steps(work, run, decoded, job), run.transfer.ahead):
            states = _hand_over(work, run, step, states, sink)
            if step.is_last:
                if states is not None:
                    sink.put(_PieceEnd(step.piece, states, list(work.notices)))
                if stopped := work.should_stop():
                    break
        if step is not None and not step.is_last and states is not None:
            sink.put(_PieceEnd(step.piece, states, list(work.notices)))
    if stopped:
        if work.info.path == PIPE:  # cannot be read again
            raise Interrupted("interrupted; no output was written")
        raise Interrupted(f"interrupted: {work.frames} frames of `{work.info.path}` are done")
    work.notices[:] = job.notices


def _steps(work: _Work, run: Run, decoded: Iterator[Frame], job: Job | None) -> Iterator[_Step]:
    """Launch the chunks, of pieces that the job needs, or without a job all."""
    times: deque[Frame] = deque()  # of frames inside the model
    states: States | None = None  # unknown
    piece = in_piece = 0
    for chunk in work.upscaler.chunks(_pixels(decoded, times), run):
        shown = [times.popleft() for _ in range(chunk.shown)]
        launched = loaded = None
        if job is None or job.needs(piece):
            if job is not None and states is None and chunk.continues:
                states = loaded = job.load_states(piece, work.upscaler.model.device)
            launched = work.upscaler.launch(chunk, states, run)
        states = None if launched is None else launched.states
        in_piece += len(shown)
        is_last = in_piece >= PIECE_FRAMES
        yield _Step(piece, is_last, shown, launched, loaded)
        if is_last:
            piece, in_piece = piece + 1, 0


class _PieceWriter:
    """Consumes frames and ends of pieces, in the encoding thread."""

    def __init__(self, work: _Work, job: Job) -> None:
        self._work, self._job = work, job
        self._encoder: VideoEncoder | None = None

    def __call__(self, item: Frame | _PieceEnd) -> None:
        work = self._work
        if isinstance(item, Frame):
            if self._encoder is None:
                self._encoder = VideoEncoder(self._job.partial, work.info, *work.plan.target_size, work.encoding)
            self._encoder.write(item)
            return
        assert self._encoder is not None
        encoder, self._encoder = self._encoder, None
        encoder.close()
        self._job.commit(item.number, encoder, item.states, item.notices)

    def abandon(self) -> None:
        if self._encoder is not None:
            self._encoder.abandon()


def _put_together(work: _Work, reader: VideoReader, job: Job, target: Target) -> None:
    pieces, options, info = job.pieces(), work.options, work.info
    if not pieces:
        raise InputError(f"no video frame can be decoded: `{info.path}`")
    start, end = reader.window
    shift = Fraction(0) if start is None else -start
    first = pieces[0].pts[0] * info.time_base + shift
    if first < 0:  # containers cannot show it: all streams move together
        shift -= first
    partial, aspect = job.folder / "output.part", info.aspect_at(*work.plan.target_size)
    if target.kind == "images":
        numbers, clear = numbers_for(info.path, pieces), options.overwrite and not (options.start or options.end)
        work.notices += write_pictures(
            pieces, partial, target.path, numbers, aspect, options.overwrite, clear, job.begin_publishing
        )
        return
    if target.kind == "image":
        write_picture(pieces, partial, target.path, aspect)
    else:
        work.notices += join_pieces(
            pieces,
            partial,
            target.format_name,
            info,
            work.encoding,
            Window(start, end, shift, reader.moves),
            reader.end,
            copy_streams=info.path != PIPE and kind_of(info.path) == "video",
            audio=options.audio,
            subtitles=options.subtitles,
        )
        ticks = (shift / info.time_base).numerator
        shown = [pts + ticks for piece in pieces for pts in piece.pts]
        verify_output(partial, shown, reader.end + ticks, info.time_base)
    if info.path != PIPE:  # which cannot be read again: there is nothing to go on with
        job.begin_publishing(partial)
    publish(partial, target.path, options.overwrite)


def _to_pipe(work: _Work, reader: VideoReader, target: Target) -> None:
    """Straight through: what went down a pipe cannot be gone on with."""
    depth = 2 * work.plan.chunk
    encoder = VideoEncoder(
        sys.stdout.buffer, work.info, *work.plan.target_size, work.encoding, target.format_name, numbered=False
    )
    run, states, stopped = work.run(), None, False
    with encoder, prefetch(reader, depth) as decoded, BackgroundSink(encoder.write, depth) as sink:
        for step in one_ahead(_steps(work, run, decoded, None), run.transfer.ahead):
            states = _hand_over(work, run, step, states, sink)
            if stopped := work.should_stop():
                break
    if stopped:
        raise Interrupted(f"interrupted: {work.frames} frames of `{work.info.path}` went out")
    aspect = work.info.aspect_at(*work.plan.target_size)
    if target.format_name == "nut" and aspect not in (None, 1) and work.encoding.name not in ("h264", "hevc"):
        work.notices.append(f"the pixel aspect ratio {aspect} is not kept: NUT needs h264 or hevc for it")
    if encoder.longest_move > encoder.time_base / 2:
        work.notices.append("the times of the frames are not kept: y4m has none, `--codec ffv1` writes NUT, which has")


def _all_notices(work: _Work, reader: VideoReader, target: Target) -> list[str]:
    """Each once, when all is done."""
    notices = [*reader.notices, *work.encoding.notices, *work.notices, *_sound_left_out(work, target)]
    return list(dict.fromkeys(notices))


def _sound_left_out(work: _Work, target: Target) -> list[str]:
    if work.info.audio_codec is None or not work.options.audio:
        return []
    if target.kind != "video":
        way = "goes down the pipe" if target.kind == "pipe" else "becomes images"
        return [Remark(f"the sound is left out: what {way} is the picture alone")]
    if work.info.path == PIPE:
        return ["the sound is not kept: it would have to be read a second time, which a pipe cannot"]
    return []


def _hand_over(work: _Work, run: Run, step: _Step, states: States | None, sink: BackgroundSink[Any]) -> States | None:
    """Finish a step with the states of the one before, and hand its frames to the encoder. Returns its own states."""
    after: States | None = None
    if step.launched is None:
        work.reused += len(step.shown)
    else:
        before = states if step.loaded is None else step.loaded
        outputs, after = work.upscaler.finish(step.launched, before, run)
        with run.clock.spent("writing"):
            for frame, output in zip(step.shown, outputs, strict=True):
                alpha = None if frame.alpha is None else resize_plane(frame.alpha, *work.plan.target_size)
                sink.put(replace(frame, pixels=output, alpha=alpha))
    work.count(len(step.shown))
    return after


def _pixels(frames: Iterator[Frame], times: deque[Frame]) -> Iterator[np.ndarray]:
    for frame in frames:
        times.append(replace(frame, pixels=_NO_PIXELS))
        yield frame.pixels


def _least_bytes(work: _Work) -> int:
    """What even a dull clip takes: only a job that cannot fit is refused early."""
    width, height = work.plan.target_size
    rate = 0.1 if work.encoding.name == "ffv1" else 0.001  # bytes a pixel and frame
    return int((work.info.frames_between(work.options.start, work.options.end) or 0) * width * height * rate)
