"""Every flag of `upscale` sets its option, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from duovsr.engine.upscaler import Upscaler
from duovsr.errors import InputError
from duovsr.options import Position, UpscaleOptions
from tests.bicubic import bicubic
from tests.command_line import Run, running


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from running(monkeypatch, capsys, bicubic())


FLAGS: dict[str, tuple[list[str], Any]] = {  # the option that each flag sets
    "start": (["--start", "0:01:30.5"], Position(seconds=Fraction(181, 2))),
    "end": (["--end", "2250f"], Position(frame=2250)),
    "frame_rate": (["--fps", "24000/1001"], Fraction(24000, 1001)),
    "decoder": (["--decoder", "nvdec"], "nvdec"),
    "audio": (["--no-audio"], False),
    "subtitles": (["--no-subs"], False),
    "deinterlace": (["--no-deinterlace"], False),
    "scene_cuts": (["--no-scene-cuts"], False),
    "encoder_options": (
        ["--encoder-opt", "preset=slow", "--encoder-opt", "x264-params=a=b"],
        (("preset", "slow"), ("x264-params", "a=b")),
    ),
    "restart": (["--restart"], True),
    "overwrite": (["--overwrite"], True),
    "size": (["--size", "128x96"], (128, 96)),
    "tile": (["--tile", "off"], 0),
    "crf": (["--crf", "20"], 20),
    "scale": (["--scale", "2.5"], 2.5),
    "seed": (["--seed", "7"], 7),
    "strength": (["--strength", "0.25"], 0.25),
    "chunk": (["--chunk", "16"], 16),
    "overlap": (["--overlap", "4"], 4),
    "color": (["--color", "wavelet"], "wavelet"),
    "codec": (["--codec", "hevc"], "hevc"),
    "pix_fmt": (["--pix-fmt", "yuv444p"], "yuv444p"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_set_their_options_and_no_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    seen: list[UpscaleOptions] = []

    def refuse(_: Upscaler, source: Path, destination: Path, options: UpscaleOptions, *__: object) -> None:
        seen.append(options)
        raise InputError("seen")

    monkeypatch.setattr(Upscaler, "upscale_file", refuse)
    monkeypatch.setattr("duovsr.cli.file._look", lambda *_: None)
    flags, value = FLAGS[name]
    run.fails(3, "seen", "upscale", tmp_path / "in.mp4", tmp_path / "out.mp4", *flags)
    assert seen == [replace(UpscaleOptions(), **{name: value})]
    assert value != getattr(UpscaleOptions(), name)
    assert set(FLAGS) == {field.name for field in fields(UpscaleOptions)}
