"""`evaluate` on files and folders: pairing, lock step, means, what is skipped and why, and the JSON it makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import huggingface_hub
import numpy as np
import pytest
from clips import Clip, write_clip
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from duovsr.engine.batch import output_name
from duovsr.errors import InputError, UsageError
from duovsr.metrics.evaluate import LQ_METRICS, REF_METRICS, evaluate
from duovsr.metrics.fidelity import psnr_rgb, psnr_y, ssim_y
from duovsr.metrics.meter import FrameMeter, Unmeasurable, resized
from duovsr.metrics.pairs import pair_clips
from duovsr.metrics.report import ClipScores

FAST = ("psnr_y", "psnr_rgb", "ssim_y")


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """A smooth pattern that moves, so that flow finds it."""
    noise = np.random.default_rng(seed).random((height, width + count, 3))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(4)) / 4
    scene = np.rint(255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)
    return [np.ascontiguousarray(scene[:, step : step + width]) for step in range(count)]


def darker(frames: Sequence[np.ndarray], levels: int) -> list[np.ndarray]:
    return [np.where(frame > levels, frame - levels, 0).astype(np.uint8) for frame in frames]


def save(path: Path, frames: Sequence[np.ndarray], pix_fmt: str = "bgr0") -> Path:
    path.parent.mkdir(exist_ok=True)
    height, width, _ = frames[0].shape
    times = range(0, 512 * len(frames), 512)
    return write_clip(path, Clip(times, size=(width, height), codec="ffv1", pix_fmt=pix_fmt, pictures=frames))


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Clips `a` (2 frames) and `b` (3 frames): outputs as mkv, truths as avi, beside files that are no videos."""
    for name, count, offset in (("a", 2, 3), ("b", 3, 9)):
        truth = pictures(count, seed=count)
        save(tmp_path / "gt" / f"{name}.avi", truth)
        save(tmp_path / "out" / f"{name}.mkv", darker(truth, offset))
    (tmp_path / "gt" / "manifest.csv").write_text("file\n")
    (tmp_path / "out" / ".b.mkv.partial.mkv").write_text("left over")
    return tmp_path / "out", tmp_path / "gt"


def test_means_are_over_frames_then_clips(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    heard: list[ClipScores] = []
    report = evaluate(output, ref=ref, metrics=FAST, on_clip=heard.append)
    assert [clip.name for clip in report.clips] == ["a", "b"]
    assert [clip.frames for clip in report.clips] == [2, 3]
    assert (report.clips[0].width, report.clips[0].height) == (64, 48)
    assert tuple(heard) == report.clips
    for clip, offset in zip(report.clips, (3, 9), strict=True):
        truth = pictures(clip.frames, seed=clip.frames)
        for name, score in zip(FAST, (psnr_y, psnr_rgb, ssim_y), strict=True):
            assert clip.scores[name] == pytest.approx(fmean(map(score, darker(truth, offset), truth)))
    for name in FAST:
        assert report.means[name] == pytest.approx(fmean(clip.scores[name] for clip in report.clips))
    assert report.skipped == {}


def test_the_report_is_json_with_its_conventions(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    report = evaluate(output / "a.mkv", ref=ref / "a.avi", metrics=("psnr_y", "ewarp_dis"))
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["kind"] == "ref"
    assert data["means"] == report.means
    assert data["clips"][0]["output"] == str(output / "a.mkv")
    assert list(data["conventions"]) == ["psnr_y", "ewarp_dis"]
    assert {"torch", "numpy", "av"} <= data["versions"].keys()
    assert data["flow_source"] == "the truth"
    assert data["niqe_parameters_sha256"] is None


def test_every_metric_of_both_kinds_on_one_clip(tmp_path: Path) -> None:
    for package in ("cv2", "vmaf_torch"):
        pytest.importorskip(package, reason="needs the extra [eval]")
    parameters = tmp_path / "niqe.npz"
    taps = np.full((7, 7), 1 / 49)
    np.savez(parameters, mu_pris_param=np.zeros((1, 36)), cov_pris_param=np.eye(36), gaussian_window=taps)
    truth = pictures(2, 96, 192)
    gt, lq = save(tmp_path / "gt.mkv", truth), save(tmp_path / "lq.mkv", [resized(f, (24, 48)) for f in truth])

    against_truth = evaluate(gt, ref=gt, niqe_parameters=parameters)
    assert list(against_truth.means) == list(REF_METRICS)
    assert against_truth.means["psnr_y"] == against_truth.means["psnr_rgb"] == 100
    assert against_truth.means["vmaf"] >= 97
    assert len(against_truth.niqe_parameters_sha256 or "") == 64

    against_lq = evaluate(gt, lq=lq, niqe_parameters=parameters)
    assert list(against_lq.means) == list(LQ_METRICS)
    assert against_lq.means["consistency_psnr_y"] == 100  # the LQ was made by the very downscale that checks it
    assert against_lq.means["niqe"] == against_truth.means["niqe"]
    assert against_lq.flow_source == "the LQ, bicubic at the output's size"


def test_deep_clips_are_measured_at_8_bit(tmp_path: Path) -> None:
    truth = pictures(2)
    deep = save(tmp_path / "deep.mkv", [frame.astype(np.uint16) * 257 for frame in truth], "gbrp10le")
    assert evaluate(deep, ref=save(tmp_path / "gt.mkv", truth), metrics=("psnr_rgb",)).means == {"psnr_rgb": 100}


@pytest.mark.parametrize(
    ("frames", "kind", "message"),
    [
        (lambda: pictures(3, 48, 66), "ref", "the sizes differ: `.*out.mkv` is 66x48, `.*gt.mkv` is 64x48"),
        (lambda: pictures(2), "ref", "`.*out.mkv` ends after 2 frames, but `.*gt.mkv` goes on"),
        (lambda: pictures(4), "ref", "`.*gt.mkv` ends after 3 frames, but `.*out.mkv` goes on"),
        (lambda: pictures(3, 48, 62), "lq", "`.*out.mkv`, 62x48, is smaller than its LQ `.*gt.mkv`, 64x48"),
    ],
)
def test_clips_that_do_not_match_are_named(
    tmp_path: Path, frames: Callable[[], list[np.ndarray]], kind: str, message: str
) -> None:
    output, reference = save(tmp_path / "out.mkv", frames()), save(tmp_path / "gt.mkv", pictures(3))
    with pytest.raises(InputError, match=message):
        evaluate(output, **{kind: reference}, metrics=())


def test_a_clip_that_cannot_be_measured_does_not_cost_the_others(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    for name, count in (("c", 1), ("d", 2), ("e", 2)):
        save(ref / f"{name}.avi", pictures(2))
        save(output / f"{name}.mkv", pictures(count))
    (output / "b.mkv").write_text("not a video")
    save(output / "d.mkv", pictures(2, 48, 66))
    report = evaluate(output, ref=ref, metrics=FAST)
    assert [clip.name for clip in report.clips] == ["a", "e"]
    assert report.means["psnr_y"] == pytest.approx(fmean(clip.scores["psnr_y"] for clip in report.clips))
    for name, words in (("b", "not a video"), ("c", "ends after 1 frame"), ("d", "66x48")):
        assert words in report.failed.pop(str(output / f"{name}.mkv"))
    assert report.failed == {}


def test_clips_without_partner_are_named(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    save(ref / "c.mkv", pictures(1))
    with pytest.raises(InputError, match=r"no clip in `.*out` has the name of `.*gt/c.mkv`"):
        evaluate(output, ref=ref, metrics=FAST)
    (ref / "c.mkv").unlink()
    (ref / "b.avi").unlink()
    with pytest.raises(InputError, match=r"no clip in `.*gt` has the name of `.*out/b.mkv`"):
        evaluate(output, ref=ref, metrics=FAST)


def test_outputs_have_the_names_that_upscale_gives_them(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    for name in ("a.avi", "a.mp4", "c.3gp", "d.VOB"):
        save(ref / "new.mkv", pictures(1)).rename(ref / name)
        save(output / output_name(name, ""), pictures(1))
    (output / "a.mkv").unlink()
    assert [(pair.output.name, pair.reference.name) for pair in pair_clips(output, ref)] == [
        ("a.avi.mkv", "a.avi"),
        ("a.mp4", "a.mp4"),
        ("b.mkv", "b.avi"),
        ("c.3gp.mkv", "c.3gp"),
        ("d.VOB.mkv", "d.VOB"),
    ]
    save(output / "a.mkv", pictures(1))
    with pytest.raises(InputError, match=r"gt/a.avi` and `.*gt/a.mp4` have the same stem"):
        pair_clips(output, ref)


def test_paths_that_cannot_be_paired_are_named(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    output, ref = two_folders
    with pytest.raises(InputError, match=r"`.*out` is a folder, but `.*a.avi` is a file"):
        evaluate(output, ref=ref / "a.avi")
    with pytest.raises(InputError, match=r"no such file or folder: `.*nowhere`"):
        evaluate(output, ref=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no videos in `.*empty`"):
        evaluate(tmp_path / "empty", ref=ref)
    save(output / "a.mp4.mkv", pictures(1)).rename(output / "a.avi")
    with pytest.raises(InputError, match=r"a.avi` and `.*a.mkv` have the same stem"):
        evaluate(output, ref=ref)


def test_arguments_that_do_not_fit_are_usage_errors(two_folders: tuple[Path, Path]) -> None:
    output, ref = two_folders
    with pytest.raises(UsageError, match="unknown metric: `lpips`") as caught:
        evaluate(output, ref=ref, metrics=("psnr_y", "lpips"))
    assert "ewarp_dis" in (caught.value.hint or "")
    for references in ({}, {"ref": ref, "lq": ref}):
        with pytest.raises(UsageError, match="one reference"):
            evaluate(output, **references)


def test_a_missing_package_skips_its_metric(two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: str, **__: bool) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    output, ref = two_folders
    report = evaluate(output, ref=ref)
    assert report.means.keys() == set(FAST)
    assert report.skipped.keys() == {"vmaf", "niqe", "ewarp_dis"}
    assert "pip install 'duovsr[eval]'" in report.skipped["ewarp_dis"]
    assert "vmaf-torch cannot be used" in report.skipped["vmaf"]
    assert "cannot be downloaded" in report.skipped["niqe"]
    assert report.flow_source is None


def test_clips_are_looked_at_before_the_network_and_it_is_asked_once(
    two_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, ref = two_folders
    asked: list[dict[str, bool]] = []

    def offline(*_: str, **flags: bool) -> str:
        asked.append(flags)
        raise LocalEntryNotFoundError("offline") if flags else HfHubHTTPError.__bases__[0]("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(InputError, match="the sizes differ"):
        evaluate(save(ref / "wide.mkv", pictures(2, 48, 66)), ref=ref / "a.avi", metrics=["niqe"])
    assert asked == []
    (ref / "wide.mkv").unlink()
    report = evaluate(output, ref=ref, metrics=["psnr_y", "niqe"])
    assert asked == [{"local_files_only": True}, {}]
    assert "cannot be downloaded" in report.skipped["niqe"]


def test_a_mean_needs_every_clip(tmp_path: Path) -> None:
    """E_warp of one frame does not exist: the other clip keeps its score, but no mean passes for the whole set's."""
    pytest.importorskip("cv2", reason="DIS flow needs the extra [eval]")
    for name, count in (("one", 1), ("two", 2)):
        save(tmp_path / "gt" / f"{name}.mkv", pictures(count))
    report = evaluate(tmp_path / "gt", ref=tmp_path / "gt", metrics=("psnr_y", "ewarp_dis"))
    assert report.means == {"psnr_y": 100}
    assert report.clips[1].scores.keys() == {"psnr_y", "ewarp_dis"}
    assert "two neighbouring frames" in report.clips[0].skipped["ewarp_dis"]
    assert "one.mkv" in report.skipped["ewarp_dis"]


def test_frame_meter_takes_every_nth_frame_and_leaves_out_none() -> None:
    frames = [np.full((1, 1, 3), value, np.uint8) for value in (1, 9, 0, 9, 4, 9)]
    meter = FrameMeter(lambda output, _: float(output[0, 0, 0]) or None, every=2)
    for frame in frames:
        meter.update(frame, frame)
    assert meter.mean() == pytest.approx((1 + 4) / 2)
    with pytest.raises(Unmeasurable, match="no frame"):
        FrameMeter(psnr_y).mean()
