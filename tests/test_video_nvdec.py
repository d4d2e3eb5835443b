"""NVDEC: the software's pictures, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from duovsr.errors import UsageError
from duovsr.video import nvdec
from duovsr.video.nvdec import NvdecSource
from duovsr.video.reader import VideoReader
from duovsr.video.source import ClipSource
from tests.clips import Clip, woven, write_clip

CLIPS = {
    "8 bits": ("in.mp4", Clip(pix_fmt="yuv420p", color=(1, 1, 1, 1), rotation=90, options={"bf": "2"})),
    "10 bits": ("in.mkv", Clip(codec="libx265", pix_fmt="yuv420p10le", size=(64, 64), color=(9, 16, 9, 1))),
    "odd rows of the codec": ("in.mp4", Clip(pix_fmt="yuv420p", size=(66, 50))),
    "fields": (
        "in.mkv",
        Clip(pix_fmt="yuv420p", fields="tff", pictures=[woven(i, (64, 64)) for i in range(12)], size=(64, 64)),
    ),
}
SEMI_PLANAR = {"yuv420p": "nv12", "yuv420p10le": "p010le"}


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Software that hands its pictures over as NVDEC does."""

    def decode(self: NvdecSource, packet: Any) -> Iterator[av.VideoFrame]:
        for picture in ClipSource._decode(self, packet):
            yield picture.reformat(format=SEMI_PLANAR.get(picture.format.name))

    monkeypatch.setattr(nvdec, "HWAccel", lambda *_, **__: None)
    monkeypatch.setattr(NvdecSource, "_decode", decode, raising=False)


def assert_same(source: Path) -> None:
    with VideoReader(source) as software, VideoReader(source, decoder="nvdec") as ours:
        assert ours.info == software.info
        for a, b in zip_longest(software, ours):
            assert (a.pts, a.time_base) == (b.pts, b.time_base)
            assert a.pixels.dtype == b.pixels.dtype
            assert np.array_equal(a.pixels, b.pixels)
        assert ours.notices == software.notices


@pytest.mark.parametrize("name", CLIPS)
def test_pictures_in_other_planes_come_out_the_same(hardware: None, tmp_path: Path, name: str) -> None:
    file, clip = CLIPS[name]
    assert_same(write_clip(tmp_path / file, clip))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CLIPS)
def test_a_gpu_decodes_the_same(tmp_path: Path, name: str) -> None:
    file, clip = CLIPS[name]
    size = (256, 192) if clip.pictures is None else clip.size  # NVDEC has a least size
    assert_same(write_clip(tmp_path / file, Clip(**{**vars(clip), "size": size})))


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: picture.reformat(width=62),
        lambda picture: picture.reformat(format="gray"),
        lambda picture: av.VideoFrame.from_ndarray(picture.to_ndarray() ^ 1, format="yuv420p"),
    ],
)
def test_other_pictures_are_refused(
    hardware: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    decode = NvdecSource._decode
    monkeypatch.setattr(NvdecSource, "_decode", lambda self, packet: map(change, decode(self, packet)))
    with pytest.raises(UsageError, match=r"NVDEC does not decode `.*in.mp4` as the software does \(h264, yuv420p\)"):
        VideoReader(write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p")), decoder="nvdec")


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("in.mkv", Clip(codec="ffv1")),
        ("in.webm", Clip(codec="libvpx-vp9", pix_fmt="yuv420p")),
        ("in.mp4", Clip(size=(63, 48))),
    ],
)
def test_what_is_not_exact_is_refused(hardware: None, tmp_path: Path, name: str, clip: Clip) -> None:
    with pytest.raises(UsageError, match="as the software does") as caught:
        VideoReader(write_clip(tmp_path / name, clip), decoder="nvdec")
    assert caught.value.hint == "leave out `--decoder`"


def test_pipes_images_and_rates_are_refused(tmp_path: Path) -> None:
    for path in (Path("-"), tmp_path / "%03d.png"):
        with pytest.raises(UsageError, match="NVDEC decodes video files"):
            VideoReader(path, decoder="nvdec")
    with pytest.raises(UsageError, match="a frame rate is for sequences of images"):
        VideoReader(write_clip(tmp_path / "in.mp4"), decoder="nvdec", frame_rate=Fraction(24))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NVDEC does not open on this machine") as caught:
        VideoReader(write_clip(tmp_path / "in.mp4", Clip(pix_fmt="yuv420p")), decoder="nvdec")
    assert "NVIDIA GPU" in str(caught.value.hint)
