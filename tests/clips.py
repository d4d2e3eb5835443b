"""Odd clips, made with PyAV while the tests run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from duovsr.video.info import VideoInfo, describe, first_picture
from duovsr.video.source import open_source

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
    fields: str | None = None  # the order of interlaced ones, tff or bff
    audio: Sequence[str] = ()
    languages: Sequence[str] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    stream_metadata: dict[str, str] = field(default_factory=dict)  # of the video
    chapters: Sequence[tuple[int, int, str]] = ()  # start and end in ms, title
    pictures: Sequence[np.ndarray] | None = None  # (H, W, 3) RGB or (H, W, 4) RGBA
    muxer: dict[str, str] = field(default_factory=dict)


def picture(index: int, size: tuple[int, int], dtype: type = np.uint8) -> np.ndarray:
    """(H, W, 3): gradients that move with `index`, so that no two frames are alike."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), np.full(x.shape, index * 16 % 256)]
    values = np.stack(channels, axis=-1) / 255
    return np.rint(values * np.iinfo(dtype).max).astype(dtype)


def translucent(index: int, size: tuple[int, int], dtype: type = np.uint8) -> np.ndarray:
    """(H, W, 4): `picture`, clear at the left and opaque at the right."""
    alpha = np.rint(np.linspace(0, np.iinfo(dtype).max, size[0])).astype(dtype)
    return np.dstack([picture(index, size, dtype), np.tile(alpha, (size[1], 1))])


def woven(index: int, size: tuple[int, int], top_first: bool = True) -> np.ndarray:
    """(H, W, 3): two fields of a bright bar on its way to the right, by 4 pixels from field to field."""
    frame = np.zeros((size[1], size[0], 3), np.uint8)
    for moment in (0, 1):
        left = 4 * (2 * index + moment) % size[0]
        frame[moment if top_first else 1 - moment :: 2, left : left + 8] = 255
    return frame


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
    if clip.fields is not None:
        video.codec_context.flags |= av.codec.context.Flags.interlaced_dct
    video.width, video.height = clip.size
    video.pix_fmt = clip.pix_fmt
    video.metadata.update(clip.stream_metadata)
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
    layout = "rgb" if pixels.shape[2] == 3 else "rgba"
    depth = {("rgb", 1): "24", ("rgb", 2): "48le", ("rgba", 1): "", ("rgba", 2): "64le"}[layout, pixels.itemsize]
    frame = av.VideoFrame.from_ndarray(pixels, format=layout + depth)
    matrix, full = clip.color[2], clip.color[3]
    coded = frame.reformat(format=clip.pix_fmt, dst_colorspace=5 if matrix in (2, 6) else matrix, dst_color_range=full)
    coded.pts, coded.time_base = pts, clip.time_base
    return coded if clip.fields is None else _with_fields(coded, clip.fields)


def _with_fields(frame: av.VideoFrame, order: str) -> av.VideoFrame:
    """The frame, marked as interlaced: encoders take the order from there."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    graph.link_nodes(source, graph.add("setfield", order), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def _encode_noise(sound: Any, seed: int, seconds: float) -> Iterable[av.Packet[Any]]:
    rng = np.random.default_rng(seed)
    for index in range(round(seconds * AUDIO_RATE / 1024)):
        samples = (rng.standard_normal((1, 2 * 1024)) * 3000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, index * 1024, Fraction(1, AUDIO_RATE)
        yield from sound.encode(frame)
    yield from sound.encode(None)


def edited(source: Path, path: Path, edit: Callable[[Any, dict[int, Any]], object]) -> Path:
    """A copy of `source`; `edit` gets the container and its streams, by index, before anything is written."""
    with av.open(str(source)) as container, av.open(str(path), "w") as out:
        copies = {stream.index: out.add_stream_from_template(stream, opaque=True) for stream in container.streams}
        for stream in container.streams:
            copies[stream.index].metadata.update(stream.metadata)
        edit(out, copies)
        for packet in container.demux():
            if packet.size:
                packet.stream = copies[packet.stream_index]
                out.mux(packet)
    return path


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


def frame_hashes(path: Path) -> list[str]:
    """A digest of every decoded frame."""
    with av.open(str(path)) as container:
        return [
            hashlib.sha256(frame.to_ndarray(format="rgb24").tobytes()).hexdigest()
            for frame in container.decode(video=0)
        ]


def coded_pictures(frames: int, size: tuple[int, int], pix_fmt: str) -> Iterable[av.VideoFrame]:
    """Textured and moving, 25 a second; the right half is transparent where `pix_fmt` can say so."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    for index in range(frames):
        pixels = np.empty((height, width, 4), np.uint8)
        waves = 24 * (np.sin((x + 2 * index) / 3) + np.sin((y - index) / 2))
        pixels[..., :3] = np.clip(picture(index // 12, size).astype(float) + waves[..., None], 0, 255)
        pixels[..., 3] = np.where(x < width // 2, 255, 0)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
        flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
        coded = frame.reformat(format=pix_fmt, interpolation=flags)
        coded.pts, coded.time_base = index, Fraction(1, 25)
        yield coded


def write_clicks(
    path: Path,
    codec: str,
    *,
    rate: int = 44100,
    layout: str = "stereo",
    start: Fraction = Fraction(0),
    video: str = "libx264",
    format_name: str | None = None,
) -> Path:
    """Four seconds of a clip whose sound clicks every second from 0.5 s after its `start`."""
    pts = range(0, 100 * 512, 512)
    with av.open(str(path), "w", format=format_name, container_options={"movie_timescale": "12800"}) as container:
        picture_stream = _add_video(container, Clip(pts=pts, codec=video, pix_fmt="yuv420p"))
        sound: Any = container.add_stream(codec, rate=rate)
        sound.codec_context.layout, sound.codec_context.bit_rate = layout, 192000
        container.start_encoding()
        samples = np.zeros(4 * rate, np.float32)
        for second in range(4):
            begin = rate // 2 + second * rate
            samples[begin : begin + rate // 200] = 0.8 * np.sin(np.arange(rate // 200) * 2 * np.pi * 2000 / rate)
        for begin in range(0, len(samples), 1024):
            block = samples[None, begin : begin + 1024].repeat(av.AudioLayout(layout).nb_channels, axis=1)
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, begin + round(start * rate), Fraction(1, rate)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
        for index, time in enumerate(pts):
            container.mux(picture_stream.encode(_coded(Clip(pts=pts, pix_fmt="yuv420p"), index, time)))
        container.mux(picture_stream.encode(None))
    return path


def click_times(path: Path) -> list[float]:
    """Where the energy of each click of `write_clicks` has its centre, in seconds of the file's timeline."""
    heard: list[tuple[float, float]] = []  # time and energy of loud samples
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="mono")
        for decoded in container.decode(audio=0):
            for frame in resampler.resample(decoded):
                energy = frame.to_ndarray()[0].astype(float) ** 2
                begin = float(frame.pts * frame.time_base)
                heard += [(begin + i / frame.sample_rate, energy[i]) for i in np.flatnonzero(energy > 0.01)]
    times, weights = np.array(heard).T
    clicks = np.split(np.arange(len(times)), np.flatnonzero(np.diff(times) > 0.1) + 1)
    return [float(np.average(times[click], weights=weights[click])) for click in clicks]


def probe(path: Path) -> VideoInfo:
    """What a clip, or a sequence of images, says of itself."""
    with closing(open_source(path)) as source:
        return describe(source, first_picture(source, source.pictures()))


def touch(folder: Path, *names: str) -> None:
    """Empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
