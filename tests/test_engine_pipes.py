"""Down a pipe and up from one: depth, transparency and speed are kept, and what is not is said."""

from __future__ import annotations

import io
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from duovsr import UpscaleOptions
from duovsr.engine import files
from duovsr.engine.files import UpscaleReport
from duovsr.errors import InputError, Interrupted, Remark, UsageError
from duovsr.video.codecs import encoding_for
from duovsr.video.encoder import VideoEncoder
from duovsr.video.output import Target
from duovsr.video.reader import VideoReader
from tests.bicubic import bicubic
from tests.clips import Clip, translucent, video_times, write_clip

TICK = Fraction(1, 25)


@pytest.fixture
def through_pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(source, codec)` gives the report, and what came out of the pipe."""

    def run(source: Path, **options: Any) -> tuple[UpscaleReport, io.BytesIO]:
        pipe = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=pipe))
        report = bicubic().upscale_file(source, Path("-"), UpscaleOptions(scale=1, **options))
        pipe.seek(0)
        return report, pipe

    return run


def times(pipe: io.BytesIO) -> list[Fraction]:
    with av.open(pipe) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", ["in.mp4", "in.mkv", "in.ts", "in.mov"])
def test_y4m_has_the_frame_rate(tmp_path: Path, through_pipe: Any, name: str) -> None:
    """FFmpeg's muxer writes the time base, of 1/12800 s or 1/90000 s, as the frame rate."""
    report, pipe = through_pipe(write_clip(tmp_path / name, Clip(pix_fmt="yuv420p")))
    assert report.warnings == ()
    assert b" F25:1 " in pipe.getvalue().partition(b"\n")[0]
    assert times(pipe) == [index * TICK for index in range(12)]


@pytest.mark.parametrize("codec", [None, "h264", "ffv1"])
def test_pixels_that_are_not_square(tmp_path: Path, through_pipe: Any, codec: str | None) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p", aspect=Fraction(16, 11)))
    report, pipe = through_pipe(source, codec=codec)
    with av.open(pipe) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
    pipe.seek(0)
    lost = "the pixel aspect ratio 16/11 is not kept: NUT needs h264 or hevc for it"
    assert (aspect, report.warnings) == ((None, (lost,)) if codec == "ffv1" else (Fraction(16, 11), ()))
    assert len(times(pipe)) == 12


@pytest.mark.parametrize("format_name", ["yuv4mpegpipe", "nut"])
def test_no_frame_is_remembered(tmp_path: Path, format_name: str) -> None:
    """What goes down a pipe may be endless, and nobody asks for the numbers of its frames."""
    source, target = write_clip(tmp_path / "in.mp4"), Target(Path("-"), "pipe", format_name)
    with VideoReader(source) as reader:
        encoding = encoding_for(target, reader.info, (64, 48), UpscaleOptions())
        with VideoEncoder(io.BytesIO(), reader.info, 64, 48, encoding, format_name, numbered=False) as encoder:
            for frame in reader:
                encoder.write(frame)
    assert len(encoder.written_pts) == 12
    assert not encoder._numbers


def test_uneven_times_need_nut(tmp_path: Path, through_pipe: Any) -> None:
    pts = (0, 512, 1024, 5120, 6400)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=pts, pix_fmt="yuv420p"))
    report, pipe = through_pipe(source)
    assert len(times(pipe)) == 5
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("the times of the frames are not kept")
    report, pipe = through_pipe(source, codec="ffv1")
    assert report.warnings == ()
    assert times(pipe) == [Fraction(each, 12800) for each in pts]


@pytest.mark.parametrize("codec", [None, "ffv1"])
def test_ten_bits_stay(tmp_path: Path, through_pipe: Any, codec: str | None) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(codec="ffv1", pix_fmt="yuv420p10le"))
    _, pipe = through_pipe(source, codec=codec)
    with av.open(pipe) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == ("yuv420p10le" if codec is None else "gbrp16le")


@pytest.mark.parametrize("codec", [None, "rawvideo"])
def test_raw_pixel_formats_come_out_as_asked_for(tmp_path: Path, through_pipe: Any, codec: str | None) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(codec="ffv1", pix_fmt="yuv444p10le"))
    with pytest.raises(UsageError, match="codec `rawvideo` cannot write pixel format `bgr0`") as caught:
        through_pipe(source, codec=codec, pix_fmt="bgr0")
    assert caught.value.hint is not None
    allowed = caught.value.hint.removeprefix("use one of ").split(", ")
    assert {"gray", "yuv420p10le", "yuv444p16le"} <= set(allowed)
    for pix_fmt in allowed:
        _, pipe = through_pipe(source, codec=codec, pix_fmt=pix_fmt)
        with av.open(pipe) as container:
            assert [frame.format.name for frame in container.decode(video=0)] == [pix_fmt] * 12


def test_transparency_in_nut(tmp_path: Path, through_pipe: Any) -> None:
    pictures = [translucent(index, (64, 48)) for index in range(12)]
    source = write_clip(tmp_path / "in.mkv", Clip(codec="ffv1", pix_fmt="bgra", pictures=pictures))
    report, pipe = through_pipe(source, codec="ffv1", color="none")
    assert report.notices == ()
    with av.open(pipe) as container:
        frames = [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
    assert all((a[..., 3] == b[..., 3]).all() for a, b in zip(frames, pictures, strict=True))


def test_a_codec_that_nut_does_not_hold(tmp_path: Path, through_pipe: Any) -> None:
    with pytest.raises(UsageError, match="nut does not hold codec `prores`"):
        through_pipe(write_clip(tmp_path / "in.mp4"), codec="prores")


def test_sound_is_not_lost_without_a_word(tmp_path: Path, through_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(codec="ffv1", pix_fmt="yuv420p", audio=["flac"]))
    report, _ = through_pipe(source)
    assert [notice for notice in report.notices if "sound" in notice and isinstance(notice, Remark)]
    assert not [notice for notice in through_pipe(source, audio=False)[0].notices if "sound" in notice]
    for audio in (True, False):
        options = UpscaleOptions(scale=1, audio=audio, overwrite=True)
        report = bicubic().upscale_file(source, tmp_path / "%d.png", options)
        assert any("the sound is left out" in notice for notice in report.notices) == audio
        assert not report.warnings
    for audio in (True, False):
        target = tmp_path / f"{audio}.mkv"
        with source.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file, isatty=lambda: False))
            report = bicubic().upscale_file(Path("-"), target, UpscaleOptions(scale=1, audio=audio))
        assert any("the sound is not kept" in warning for warning in report.warnings) == audio


@pytest.fixture
def from_pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run(source, target, should_stop)` upscales what comes through standard input, in pieces of 12 frames."""
    monkeypatch.setattr(files, "PIECE_FRAMES", 12)

    def run(source: Path, target: Path, should_stop: Any = lambda: False, **options: Any) -> UpscaleReport:
        with source.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file, isatty=lambda: False))
            wanted = UpscaleOptions(scale=1, **options)
            return bicubic().upscale_file(Path("-"), target, wanted, should_stop=should_stop)

    return run


def test_an_index_at_the_end_does_not_come_through_a_pipe(
    tmp_path: Path, from_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(24)]
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 24 * 512, 512), pictures=noise, options={"crf": "1"}))
    with source.open("rb") as file:
        pipe = SimpleNamespace(read=file.read)  # no way back
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe, isatty=lambda: False))
        with pytest.raises(InputError, match=r"^no picture of `-` can be decoded$") as caught:
            bicubic().upscale_file(Path("-"), tmp_path / "out.mkv", UpscaleOptions(scale=1))
    assert "the index must come first: give the file itself" in (caught.value.hint or "")
    from_pipe(source, tmp_path / "out.mkv")  # as `< in.mp4`
    assert len(video_times(tmp_path / "out.mkv")) == 24


def test_what_a_pipe_began_is_not_kept(tmp_path: Path, from_pipe: Any) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 40 * 40, 40), time_base=Fraction(1, 1000)))
    target, folder = tmp_path / "out.mkv", tmp_path / "out.mkv.duovsr"
    names: set[str] = set()

    def stop() -> bool:
        names.update(os.listdir(folder))
        return "journal.jsonl" in names

    with pytest.raises(Interrupted, match="no output was written"):
        from_pipe(source, target, stop)
    assert "piece_000000.mkv" in names
    assert "job.json" not in names, "after a crash, nobody would go on with it"
    assert os.listdir(tmp_path) == ["in.mkv"]


def test_a_pipe_does_not_discard_the_work_of_another_source(tmp_path: Path, from_pipe: Any) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(pts=range(0, 40 * 40, 40), time_base=Fraction(1, 1000)))
    target = tmp_path / "out.mkv"
    with pytest.raises(Interrupted):
        bicubic().upscale_file(source, target, UpscaleOptions(scale=1), should_stop=lambda: True)
    with pytest.raises(UsageError, match="had another source"):
        from_pipe(source, target)
    assert bicubic().upscale_file(source, target, UpscaleOptions(scale=1)).reused > 0
    target.unlink()
    with pytest.raises(Interrupted):
        bicubic().upscale_file(source, target, UpscaleOptions(scale=1), should_stop=lambda: True)
    assert from_pipe(source, target, restart=True).reused == 0
    assert sorted(os.listdir(tmp_path)) == ["in.mkv", "out.mkv"]
