"""Odd clips, made with PyAV while the tests run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

AUDIO_RATE = 48000


@dataclass(frozen=True)
class Clip:
    """What to write. `pts` are in `time_base`; pictures are `pictures`, or moving gradients."""

    pts: Sequence[int] = tuple(range(0, 12 * 512, 512))
    time_base: Fraction = Fraction(1, 12800)
    size: tuple[int, int] = (64, 48)
    codec: str = "libx264"
    pix_fmt: str = "yuv444p"
    options: dict[str, str] = field(default_factory=dict)
    color: tuple[int, int, int, int] = (2, 2, 2, 0)  # primaries, transfer, matrix, range
    aspect: Fraction | None = None
    rotation: int = 0
    audio: Sequence[str] = ()
    languages: Sequence[str] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    chapters: Sequence[tuple[int, int, str]] = ()  # start and end in ms, title
    pictures: Sequence[np.ndarray] | None = None  # (H, W, 3) RGB or coded frames' sources
    muxer: dict[str, str] = field(default_factory=dict)


def picture(index: int, size: tuple[int, int], dtype: type = np.uint8) -> np.ndarray:
    """(H, W, 3): gradients that move with `index`, so that no two frames are alike."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), np.full(x.shape, index * 16 % 256)]
    values = np.stack(channels, axis=-1) / 255
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def write_clip(path: Path, clip: Clip = Clip(), format_name: str | None = None) -> Path:
    with av.open(str(path), "w", format=format_name, container_options=clip.muxer) as container:
        container.metadata.update(clip.metadata)
        if clip.chapters:
            container.set_chapters(
                [
                    {"id": i, "start": a, "end": b, "time_base": Fraction(1, 1000), "metadata": {"title": title}}
                    for i, (a, b, title) in enumerate(clip.chapters)
                ]
            )
        video = _add_video(container, clip)
        sounds: list[Any] = [container.add_stream(codec, rate=AUDIO_RATE) for codec in clip.audio]
        for sound, language in zip(sounds, clip.languages, strict=False):
            sound.metadata["language"] = language
        container.start_encoding()
        for index, sound in enumerate(sounds):
            length = max(1.0, float((max(clip.pts) - min(clip.pts)) * clip.time_base))
            container.mux(list(_encode_noise(sound, index, length)))
        for index, pts in enumerate(clip.pts):
            container.mux(video.encode(_coded(clip, index, pts)))
        container.mux(video.encode(None))
    return path


def _add_video(container: Any, clip: Clip) -> Any:
    steps = np.diff(clip.pts) if len(clip.pts) > 1 else np.array([float(1 / (25 * clip.time_base))])
    rate = Fraction(1 / (float(np.mean(steps)) * float(clip.time_base))).limit_denominator(1001)
    video = container.add_stream(clip.codec, rate=rate, options=clip.options)
    video.width, video.height = clip.size
    video.pix_fmt = clip.pix_fmt
    video.time_base = video.codec_context.time_base = clip.time_base
    context = video.codec_context
    context.color_primaries, context.color_trc, context.colorspace, context.color_range = clip.color
    if clip.aspect:
        context.sample_aspect_ratio = clip.aspect
    if clip.rotation:
        video.set_display_rotation(clip.rotation)
    return video


def _coded(clip: Clip, index: int, pts: int) -> av.VideoFrame:
    pixels = clip.pictures[index] if clip.pictures is not None else picture(index, clip.size)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.dtype == np.uint8 else "rgb48le")
    matrix, full = clip.color[2], clip.color[3]
    coded = frame.reformat(format=clip.pix_fmt, dst_colorspace=5 if matrix in (2, 6) else matrix, dst_color_range=full)
    coded.pts, coded.time_base = pts, clip.time_base
    return coded


def _encode_noise(sound: Any, seed: int, seconds: float) -> Iterable[av.Packet[Any]]:
    rng = np.random.default_rng(seed)
    for index in range(round(seconds * AUDIO_RATE / 1024)):
        samples = (rng.standard_normal((1, 2 * 1024)) * 3000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, index * 1024, Fraction(1, AUDIO_RATE)
        yield from sound.encode(frame)
    yield from sound.encode(None)


def video_times(path: Path) -> list[Fraction]:
    """Presentation times in seconds of all frames that decode."""
    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(container.streams.video[0])]


def packet_hashes(path: Path, kind: str, index: int = 0) -> list[str]:
    """sha256 of each packet's payload of the `index`th stream of a kind."""
    with av.open(str(path)) as container:
        stream = container.streams.get({kind: index})[0]
        return [hashlib.sha256(bytes(packet)).hexdigest() for packet in container.demux(stream) if packet.size]


def start_time(path: Path, kind: str) -> Fraction:
    """The first presentation time in seconds of the first stream of a kind."""
    with av.open(str(path)) as container:
        stream = container.streams.get({kind: 0})[0]
        return min(packet.pts * packet.time_base for packet in container.demux(stream) if packet.size)
