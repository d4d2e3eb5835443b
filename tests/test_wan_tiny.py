"""TinyVAE in place of Wan2.1's autoencoder: trained for its latents, kept beside it, and used from file to file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from duovsr import UpscaleOptions
from duovsr.engine import files
from duovsr.engine.phases import restore_clip
from duovsr.engine.upscaler import Upscaler
from duovsr.errors import InputError, UsageError
from duovsr.hub import find_model
from duovsr.model.tiny_vae import TinyVAE
from duovsr.options import PRESETS
from duovsr.repository import FILES, TINY_VAE
from duovsr.train.runs import load_weights
from duovsr.train.stages import Job, resolve, run_job
from duovsr.video.reader import VideoReader
from tests.clips import Clip, frame_hashes, write_clip
from tests.command_line import Run, running
from tests.conftest import run_stage
from tests.test_wan_chunks import Crash, crash_after
from tests.wan import PLAIN, lq_frames, moving, saved, upscaled


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with saved(tmp_path_factory.mktemp("models") / "wan", light=True) as path:
        yield path


@pytest.fixture(scope="module")
def upscaler(folder: Path) -> Upscaler:
    return Upscaler.from_preset(str(folder), device="cpu", dtype="float32", vae="tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    yield from running(monkeypatch, capsys)


# Using it


def test_a_video_goes_through(run: Run, folder: Path, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 25, 512), size=(32, 24), audio=("aac",)))
    frames = {}
    for vae in ("wan", "tiny"):
        target = tmp_path / f"{vae}.mp4"
        options = ("--model", folder, "--scale", 2, "--dtype", "float32", "--vae", vae, "--json")
        assert run("upscale", source, target, *options) == 0, run.err
        plan = json.loads(run.out)["plan"]
        assert (plan["chunk"], plan["overlap"], plan["fade"]) == (16, 4, 5)
        assert (plan["vae_frames"], plan["vae_latents"]) == ((8, 0) if vae == "wan" else (0, 2))
        with VideoReader(source) as before, VideoReader(target) as after:
            assert (after.info.width, after.info.height) == (64, 48)
            shown = list(after)
            assert [f.pts * f.time_base for f in shown] == [f.pts * f.time_base for f in before]
        frames[vae] = np.stack([frame.pixels for frame in shown]).astype(int)
    assert np.abs(frames["wan"] - frames["tiny"]).mean() > 1, "another autoencoder, other frames"


def test_clips_are_restored_by_the_three_parts(upscaler: Upscaler) -> None:
    """z_lq = encode(lq); z_0 = eps - v; hq = decode(z_0, lq): full attention between TinyVAE's two halves."""
    model, lq = upscaler.model, lq_frames(moving(13))
    assert isinstance(model.vae, TinyVAE) and not model.preset.transformer.streams
    z_0, _ = model.generate(model.encode(lq)[0], 3, (0, 0, 0))
    plan = upscaler.plan(32, 24, PLAIN)
    full, faithful = (model.decode(z, lq, scale=plan.scale)[0] for z in (z_0, None))
    for strength, expected in ((1.0, full), (0.0, faithful), (0.5, (full + faithful) / 2)):
        for latents in (1, 2, 4):
            pieces = replace(plan, vae_latents=latents)
            result = restore_clip(model, lq, pieces, seed=3, strength=strength, origin=(0, 0, 0))
            assert_close(result, expected, rtol=0, atol=1e-5)
    assert (full - faithful).abs().mean() > 1e-3


def test_a_job_goes_on(upscaler: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_FRAMES", 8)
    source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 45, 512), size=(32, 24)))
    options = UpscaleOptions(scale=2, codec="ffv1", chunk=8)
    upscaler.upscale_file(source, tmp_path / "whole.mkv", options)
    with pytest.raises(Crash):
        upscaler.upscale_file(source, tmp_path / "out.mkv", options, crash_after(30))
    assert upscaler.upscale_file(source, tmp_path / "out.mkv", options).reused >= 16
    assert frame_hashes(tmp_path / "out.mkv") == frame_hashes(tmp_path / "whole.mkv")


def test_a_job_of_the_other_autoencoder_is_refused(upscaler: Upscaler, folder: Path, tmp_path: Path) -> None:
    wan = Upscaler.from_preset(str(folder), device="cpu", dtype="float32", vae="wan")
    assert upscaler.model.fingerprint() != wan.model.fingerprint()
    own = Upscaler.from_preset(str(folder), device="cpu", dtype="float32")
    assert own.model.fingerprint() == wan.model.fingerprint()


def test_the_light_autoencoder_is_planned_for() -> None:
    preset = PRESETS["1.3b"]
    light = preset.with_vae("tiny")
    assert light.vae == preset.tiny_vae and light.transformer == preset.transformer
    assert preset.with_vae("wan") == preset.with_vae(None) == preset


def test_the_workload_runs_with_it(run: Run, folder: Path) -> None:
    workload = ("--random-weights", "--size", "64x48", "--frames", 5, "--repeat", 1, "--json")
    tflop = {}
    for vae in ("wan", "tiny"):
        assert run("bench", "--model", "wan", "--dtype", "float32", "--vae", vae, *workload) == 0, run.err
        tflop[vae] = json.loads(run.out)["tflop"]
    assert tflop["tiny"]["transformer"] == tflop["wan"]["transformer"]
    assert tflop["tiny"]["decode"] != tflop["wan"]["decode"]


# Where there is none


def test_a_model_without_one_says_how_to_train_it(run: Run, tmp_path: Path) -> None:
    with saved(tmp_path / "plain") as plain:
        Upscaler.from_preset(str(plain), device="cpu", vae="wan")
        with pytest.raises(InputError, match="no TinyVAE was trained for model") as caught:
            Upscaler.from_preset(str(plain), device="cpu", vae="tiny")
        source = write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 512 * 5, 512), size=(32, 24)))
        run.fails(3, "no TinyVAE was trained", "upscale", source, tmp_path / "o.mp4", "--model", plain, "--vae", "tiny")
        assert not (tmp_path / "o.mp4").exists()
        train, export = str(caught.value.hint).removeprefix("train it: ").split(", then ")
        for command, stage in ((train, "vae"), (export, "export")):
            words = shlex.split(command)
            assert words[:5] == ["duovsr", "train", stage, "--preset", "wan"]
            settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            resolve(Job(stage, tmp_path / "OUT", "wan", init=plain), settings)


@pytest.mark.parametrize(("model", "vae", "words"), [
    ("tiny", "wan", "preset `tiny` has no autoencoder `wan`"),
    ("tiny", "other", "unknown autoencoder: `other`"),
])  # fmt: skip
def test_an_autoencoder_that_cannot_be_is_refused(model: str, vae: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Upscaler.from_preset(model, device="cpu", vae=vae)
    Upscaler.from_preset("tiny", device="cpu", vae="tiny")


def test_an_altered_one_is_found(folder: Path, run: Run, tmp_path: Path) -> None:
    path = folder / TINY_VAE
    right = path.read_bytes()
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    try:
        run.fails(3, f"does not match its sha256: `{path}`", "models", "export", folder, tmp_path / "copy")
        assert run("models", "verify", folder) == 3 and f"{TINY_VAE}: altered" in run.out.splitlines()
        with pytest.raises(InputError, match=f"does not match its sha256: .*{TINY_VAE}"):
            Upscaler.from_preset(str(folder), device="cpu")
    finally:
        path.write_bytes(right)
    assert run("models", "export", folder, tmp_path / "copy") == 0
    assert find_model(str(tmp_path / "copy")).files == find_model(str(folder)).files
    assert (tmp_path / "copy" / TINY_VAE).read_bytes() == right


# Training it


def export(out: Path, init: Path, *settings: str) -> None:
    job = Job("export", out, "wan", init=init)
    run_job(job, resolve(job, list(settings)))


def test_it_is_trained_for_the_latents_of_the_model(training_pool: Path, tmp_path: Path) -> None:
    """As the hint says: stage `vae` on the model, then an export with it; the rest of the model stays what it was."""
    with saved(tmp_path / "plain") as plain:
        settings = ("steps=24", "free_every=3", "learning_rate=0.003", "log_every=1")
        out = run_stage("vae", tmp_path / "run", *settings, preset="wan", init=plain, data=(training_pool,))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        latent = [row["latent"] for row in rows if "latent" in row]
        assert len(latent) == 16 and np.mean(latent[-3:]) < 0.9 * np.mean(latent[:3])
        assert load_weights(out).keys() == {"tiny_vae"}
        export(tmp_path / "new", plain, f"tiny_vae={out}")
        for name in FILES:
            mine, theirs = load_file(tmp_path / "new" / name), load_file(plain / name)
            assert all(torch.equal(mine[key], value) for key, value in theirs.items()) and len(mine) == len(theirs)
        model = Upscaler.from_preset(str(tmp_path / "new"), device="cpu", vae="tiny")
        assert upscaled(model, moving(5)).shape == (5, 48, 64, 3)
        assert load_weights(tmp_path / "new").keys() == {"vae", "model", "tiny_vae"}
        export(tmp_path / "again", tmp_path / "new")
        assert (tmp_path / "again" / TINY_VAE).read_bytes() == (tmp_path / "new" / TINY_VAE).read_bytes()
        with pytest.raises(UsageError, match="not a TinyVAE for preset `wan`"):
            export(tmp_path / "other", plain, f"tiny_vae={plain}")


def test_it_needs_the_model(training_pool: Path, tmp_path: Path) -> None:
    with saved(tmp_path / "plain"), pytest.raises(UsageError, match="needs a run to start from"):
        run_stage("vae", tmp_path / "run", preset="wan", data=(training_pool,))
