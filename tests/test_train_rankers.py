"""Rankers of candidates: directions and order, sums of ranks, and the adapter of learned metrics on a fake `pyiqa`."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import huggingface_hub
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from duovsr.errors import InputError, TrainError, UsageError
from duovsr.metrics import niqe, vmaf
from duovsr.metrics.fidelity import luma, psnr_y, ssim_y
from duovsr.metrics.meter import Unmeasurable
from duovsr.train import rankers
from duovsr.train.rankers import Ranker, make_rankers, rank_sum

CPU = torch.device("cpu")
T, H, W = 5, 104, 200  # two NIQE blocks and a margin


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def textured(seed: int) -> Tensor:
    """A texture with coarse and fine parts that moves a pixel to the left each frame: (1, 3, T, H, W)."""
    fine = F.avg_pool2d(noise(1, 3, H + 2, W + T + 2, seed=seed), 3, 1)
    coarse = F.interpolate(noise(1, 3, 14, 27, seed=seed + 1), size=fine.shape[2:], mode="bicubic")
    picture = (0.5 * fine + 0.3 * coarse).clamp(-1, 1)
    return torch.stack([picture[..., t : t + W] for t in range(T)], dim=2)


def pictures_of(clip: Tensor) -> list[np.ndarray]:
    levels = ((clip.clamp(-1, 1) + 1) * 127.5).round().byte()
    return [frame.permute(1, 2, 0).numpy() for frame in levels[0].unbind(1)]


def blurred(clip: Tensor) -> Tensor:
    return F.avg_pool3d(clip, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False)


def noisy(clip: Tensor, still: bool = False) -> Tensor:
    grain = noise(*clip.shape, seed=9)
    return clip + 0.2 * (grain[:, :, :1] if still else grain)


@pytest.fixture(scope="module")
def clean() -> Tensor:
    return textured(seed=0)


@pytest.fixture(scope="module")
def niqe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parameters whose pristine pictures are other textures of the same kind."""
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(taps, taps) / np.outer(taps, taps).sum()
    features = []
    for seed in range(10, 16, 2):
        image = luma(pictures_of(textured(seed))[0][:96, :192]).round()
        sizes = ((image, 96), (F.avg_pool2d(image[None, None], 2)[0, 0], 48))
        blocks = [niqe._block_features(niqe._normalised(x, torch.from_numpy(window)), side) for x, side in sizes]
        features.append(torch.cat(blocks, dim=1))
    pristine = torch.cat(features).numpy()
    path = tmp_path_factory.mktemp("niqe") / "parameters.npz"
    covariance = np.cov(pristine.T) + 0.1 * np.eye(36)
    np.savez(path, mu_pris_param=pristine.mean(0), cov_pris_param=covariance, gaussian_window=window)
    return path


def only(name: str) -> Ranker:
    (ranker,) = make_rankers((name,), CPU)
    return ranker


def goodness(ranker: Ranker, output: Tensor, hq: Tensor) -> float:
    return ranker(output, hq) if ranker.higher_is_better else -ranker(output, hq)


@pytest.mark.parametrize("name", ["psnr", "ssim", "vmaf", "niqe", "detail", "steady"])
def test_the_clean_clip_is_ranked_before_the_blurred_and_the_noisy(name: str, clean: Tensor, niqe_file: Path) -> None:
    if name == "vmaf":
        pytest.importorskip("vmaf_torch", reason="VMAF needs the extra [eval]")
    ranker = only(f"niqe:{niqe_file}" if name == "niqe" else name)
    assert ranker.name == name and ranker.higher_is_better == (name != "niqe")
    best = goodness(ranker, clean, clean)
    assert best > goodness(ranker, blurred(clean), clean)
    assert best > goodness(ranker, noisy(clean), clean)
    if name in ("detail", "steady"):
        assert best == 0


def test_psnr_and_ssim_are_means_of_the_frames(clean: Tensor) -> None:
    output = noisy(clean)
    frames = list(zip(pictures_of(output), pictures_of(clean), strict=True))
    for name, metric in (("psnr", psnr_y), ("ssim", ssim_y)):
        assert only(name)(output, clean) == pytest.approx(sum(metric(*pair) for pair in frames) / T, rel=1e-9)


def test_detail_is_symmetric_in_too_little_and_too_much() -> None:
    hq = 0.4 * torch.sign(noise(1, 3, 1, 32, 32, seed=0))
    more, less = (only("detail")(factor * hq, hq) for factor in (2.0, 0.5))
    assert more == pytest.approx(less, abs=1e-3) == pytest.approx(-np.log(4), abs=1e-3)
    flat = torch.zeros_like(hq)
    assert only("detail")(flat, flat) == 0 and -20 < only("detail")(flat, hq) < -5


def test_steady_minds_flicker_and_not_a_still_grain(clean: Tensor) -> None:
    still = clean[:, :, :1].expand_as(clean)
    steady = only("steady")
    assert steady(noisy(still, still=True), still) == 0 > steady(noisy(still), still)
    with pytest.raises(Unmeasurable, match="two frames"):
        steady(clean[:, :, :1], clean[:, :, :1])


def test_too_small_and_broken_candidates_are_refused(clean: Tensor, niqe_file: Path) -> None:
    with pytest.raises(Unmeasurable, match="NIQE needs"):
        only(f"niqe:{niqe_file}")(clean[..., :96], clean[..., :96])
    broken = clean.clone()
    broken[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(TrainError, match="`psnr` was to judge is not finite"):
        only("psnr")(broken, clean)


def test_rank_sum_by_hand() -> None:
    directions = {"up": True, "down": False, "equal": True}
    judges = [Ranker(name, higher, "", lambda output, hq: 0.0) for name, higher in directions.items()]
    #        up: 30 20 20 10     down: 1 4 2 3       equal: all
    # ranks:      0 1.5 1.5 3          0 3 1 2              1.5 each
    table = [(30.0, 1.0, 7.0), (20.0, 4.0, 7.0), (20.0, 2.0, 7.0), (10.0, 3.0, 7.0)]
    scores = [dict(zip(("up", "down", "equal"), row, strict=True)) for row in table]
    assert rank_sum(scores, judges) == [1.5, 6.0, 4.0, 6.5]
    assert rank_sum([scores[1]] * 3, judges) == [3.0, 3.0, 3.0]
    with pytest.raises(TrainError, match="`down` is not finite"):
        rank_sum([{"up": 1.0, "down": float("nan"), "equal": 0.0}], judges)


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        ((), "no rankers", "psnr, ssim, vmaf, niqe:PATH, detail, steady, lpips:PATH"),
        (("psnr", "fid"), "unknown ranker: `fid`", "psnr, ssim, vmaf, niqe:PATH, detail, steady, lpips:PATH"),
        (("psnr:x.pth",), "unknown ranker: `psnr:x.pth`", "psnr, ssim"),
        (("niqe:a", "niqe:b"), "given twice", "once"),
        (("lpips:x.pth",), "ranker `lpips` needs pyiqa", "or rank by psnr, ssim, vmaf, niqe:PATH"),
        (("dover",), "ranker `dover` needs the package `dover`", "or rank by psnr, ssim, vmaf, niqe:PATH"),
        (("niqe",), "`niqe` would download", "niqe:PATH"),
    ],
)
def test_names_that_cannot_be_used(
    names: tuple[str, ...], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(UsageError, match=message) as caught:
        make_rankers(names, CPU)
    assert hint in str(caught.value.hint)


def test_bare_niqe_is_the_cached_file(niqe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: str(niqe_file))
    assert str(niqe_file) in str(only("niqe").describe()["weights"])
    with pytest.raises(InputError, match="cannot read NIQE parameters"):
        only("niqe:/nowhere.npz")


def test_vmaf_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    with pytest.raises(Unmeasurable, match="vmaf-torch cannot be used"):
        only("vmaf")


@dataclass
class FakePyiqa:
    """Records what `create_metric` and the metric get; a picture's score is the mean of what the metric is given."""

    created: list[tuple[str, torch.device, str]]
    seen: list[tuple[Tensor, ...]]

    def list_models(self) -> list[str]:
        return ["lpips", "musiq", "niqe"]

    def create_metric(self, name: str, *, device: torch.device, pretrained_model_path: str) -> Callable[..., Tensor]:
        self.created.append((name, device, pretrained_model_path))
        if "other" in pretrained_model_path:
            raise RuntimeError("Error(s) in loading state_dict:\n\tMissing key(s)")
        outer = self

        class Metric:
            metric_mode = "FR" if name == "lpips" else "NR"
            lower_better = name == "lpips"

            def __call__(self, *pictures: Tensor) -> Tensor:
                outer.seen.append(pictures)
                return torch.stack([picture.mean((1, 2, 3)) for picture in pictures]).mean(0)[:, None]

        return Metric()


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePyiqa:
    """The fake, and a torch hub folder that holds AlexNet."""
    fake, module = FakePyiqa([], []), ModuleType("pyiqa")
    vars(module).update(list_models=fake.list_models, create_metric=fake.create_metric)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    return fake


def weights(path: Path) -> Path:
    torch.save({"lin0.model.1.weight": torch.ones(1)}, path)
    return path


@pytest.mark.parametrize(("name", "pictures", "higher"), [("lpips", 2, False), ("musiq", 1, True)])
def test_learned_metrics_get_pictures_in_0_to_1(
    name: str, pictures: int, higher: bool, pyiqa: FakePyiqa, clean: Tensor, tmp_path: Path
) -> None:
    path = weights(tmp_path / "w.pth")
    ranker = only(f"{name}:{path}")
    assert ranker.name == name and ranker.higher_is_better == higher
    assert pyiqa.created == [(name, CPU, str(path))]
    output = 1.5 * noisy(clean)  # leaves [-1, 1]
    score = ranker(output, clean)
    (seen,) = pyiqa.seen
    expected = [(clip.clamp(-1, 1)[0].transpose(0, 1) + 1) / 2 for clip in (output, clean)][:pictures]
    assert len(seen) == pictures
    for got, wanted in zip(seen, expected, strict=True):
        assert got.shape == (T, 3, H, W) and got.min() >= 0 and got.max() <= 1
        torch.testing.assert_close(got, wanted)
    assert score == pytest.approx(sum(clip.mean().item() for clip in expected) / pictures, rel=1e-5)
    described = ranker.describe()
    assert described["needs_truth"] == (pictures == 2) and described["package"] == "pyiqa"
    assert f"{path}, sha256 " in str(described["weights"])


def test_learned_metrics_want_local_weights_of_their_own(pyiqa: FakePyiqa, tmp_path: Path) -> None:
    good, other, text, empty = (tmp_path / f"{name}.pth" for name in ("good", "other", "text", "empty"))
    weights(good), weights(other), text.write_text("not weights")
    torch.save({}, empty)
    refused = {
        "lpips": "`lpips` would download its weights",
        "musiq": "`musiq` would download its weights",
        "musiq:/nowhere.pth": "cannot read weights: `/nowhere.pth`",
        f"musiq:{text}": "cannot read weights",
        f"lpips:{empty}": "not weights of `lpips`",
        f"musiq:{other}": r"pyiqa cannot load .* in loading state_dict:$",
    }
    for name, message in refused.items():
        with pytest.raises(UsageError, match=message) as caught:
            only(name)
        assert "or rank by psnr" in str(caught.value.hint)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").unlink()
    with pytest.raises(UsageError, match=r"would download `.*alexnet"):
        only(f"lpips:{good}")
    assert [path for _, _, path in pyiqa.created] == [str(other)]


class FakeDover(torch.nn.Module):
    """As the authors' model is called: two views in, two scores out."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        assert settings["divide_head"]
        trunk = Path(torch.hub.get_dir()) / "checkpoints" / "convnext_tiny_1k_224_ema.pth"
        assert trunk.is_file(), "would be downloaded"
        self.gain = torch.nn.Parameter(torch.zeros(()))

    def forward(self, views: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        assert list(views) == ["technical", "aesthetic"]
        assert all(view.shape == (1, 3, 32, 224, 224) for view in views.values())
        return [self.gain * view.diff(dim=-1).abs().mean().view(1, 1) for view in views.values()]


def fake_view(clip: torch.Tensor, name: str, **options: int) -> torch.Tensor:
    assert clip.shape[:2] == (3, 32) and 0 <= clip.min() <= clip.max() <= 255
    assert ("fsize_h" in options) == (name == "technical")
    return torch.nn.functional.interpolate(clip, (224, 224))


def test_dover_is_fed_as_its_authors_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models, datasets = ModuleType("dover.models"), ModuleType("dover.datasets")
    models.DOVER, datasets.get_single_view = FakeDover, fake_view  # type: ignore[attr-defined]
    for module in (ModuleType("dover"), models, datasets):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trunk = tmp_path / "hub" / "checkpoints" / "convnext_tiny_1k_224_ema.pth"
    trunk.parent.mkdir(parents=True)
    path, other = tmp_path / "dover.pth", tmp_path / "other.pth"
    torch.save({"gain": torch.tensor(0.1)}, path)
    torch.save({"loss": torch.tensor(0.1)}, other)
    with pytest.raises(UsageError, match=r"`dover` would download `.*convnext"):
        make_rankers((f"dover:{path}",), CPU)
    trunk.touch()
    ranker = make_rankers((f"dover:{path}",), CPU)[0]
    sharp = torch.rand(1, 3, 5, 40, 48) * 2 - 1
    soft = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), 1, (0, 1, 1))
    assert 0 <= ranker(soft, sharp) < ranker(sharp, sharp) <= 1
    flat = ranker(torch.zeros_like(sharp), sharp)  # both networks give 0 here
    technical, aesthetic = -0.1107 / 0.07355, 0.08285 / 0.03774  # the authors' fusion
    assert flat == pytest.approx(1 / (1 + math.exp(-0.6104 * technical - 0.3896 * aesthetic)))
    assert ranker.higher_is_better and "sha256" in str(ranker.describe()["weights"])
    with pytest.raises(UsageError, match="not weights of `dover`"):
        make_rankers((f"dover:{other}",), CPU)
    with pytest.raises(UsageError, match="`dover` would download its weights"):
        make_rankers(("dover",), CPU)


def test_descriptions_can_be_written_down() -> None:
    described = [ranker.describe() for ranker in make_rankers(("psnr", "ssim", "detail", "steady"), CPU)]
    assert json.loads(json.dumps(described)) == described
    assert all(d["direction"] == "higher is better" and d["needs_truth"] and d["version"] for d in described)


def test_importing_it_imports_no_optional_package() -> None:
    imported = set()
    for module in (rankers, niqe, vmaf):
        for node in ast.parse(Path(str(module.__file__)).read_text()).body:  # what runs on import
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {(getattr(node, "module", None) or alias.name).partition(".")[0] for alias in node.names}
    assert "torch" in imported and not imported & {"pyiqa", "vmaf_torch", "scipy", "huggingface_hub"}
