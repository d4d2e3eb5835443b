"""The degradation of clips: recipes against the configuration they are drawn from, whole passes, batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from duovsr.errors import UsageError
from duovsr.train.degradation import CODECS, FAMILIES, DegradationConfig, degrade, draw_recipe
from duovsr.train.degradation_batched import degrade_batch
from duovsr.train.degradation_ops import Blur, Codec, Jpeg, Noise, Operator, Quantise, Recipe, Resize, Unsharp, apply
from tests.test_train_degradation_ops import seeded, textured

FULL = DegradationConfig(clean=0.0, mild=0.0, unsharp=True)
CLEAN, MILD = DegradationConfig(clean=1.0, mild=0.0), DegradationConfig(clean=0.0, mild=1.0)


def recipes(config: DegradationConfig, count: int, frames: int = 3) -> list[Recipe]:
    generator = seeded(7)
    return [draw_recipe(config, frames, 192, 160, 48, 40, generator) for _ in range(count)]


def drawn(kind: type[Operator], all_recipes: list[Recipe], place: int | None = None) -> Iterator[Operator]:
    """Operators of a kind: all, or those in one place of their recipe."""
    for recipe in all_recipes:
        found = [operator for operator in recipe if type(operator) is kind]
        yield from found if place is None else found[place : place + 1]


def assert_shares(seen: Counter[str], weights: dict[str, float]) -> None:
    """Each share within four deviations of its weight."""
    total = seen.total()
    assert set(seen) <= set(weights)
    for name, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(seen[name] / total - p) <= 4 * math.sqrt(p * (1 - p) / total), (name, seen[name] / total, p)


def test_kernel_families_codecs_and_noises_have_their_shares() -> None:
    many = recipes(FULL, 600, frames=1)
    families = Counter(op.kernels[0].family for op in drawn(Blur, many, 0))
    assert_shares(families, dict(zip(FAMILIES, FULL.kernel_families, strict=True)))
    assert_shares(Counter(op.name for op in drawn(Codec, many)), dict.fromkeys(CODECS, 1.0))
    assert_shares(Counter(op.kind for op in drawn(Noise, many)), {"gaussian": 0.5, "poisson": 0.5})
    assert_shares(Counter(str(op.gray) for op in drawn(Noise, many)), {"True": 0.4, "False": 0.6})
    assert_shares(Counter(op.mode for op in drawn(Resize, many)), dict.fromkeys(("bilinear", "area", "bicubic"), 1.0))
    # Blurs: the first always, the second and the final one each in 0.8 of the clips.
    blurs = Counter(str(sum(type(op) is Blur for op in recipe)) for recipe in many)
    assert_shares(blurs, {"1": 0.2 * 0.2, "2": 2 * 0.2 * 0.8, "3": 0.8 * 0.8})


def test_resizes_go_up_down_or_keep_in_their_shares_and_ranges() -> None:
    many = recipes(FULL, 600, frames=1)
    first, second, final = (list(drawn(Resize, many, place)) for place in range(3))
    ways: Counter[str] = Counter()
    for resize in first:
        assert resize.height % 2 == resize.width % 2 == 0
        assert 0.15 * 192 - 2 < resize.height <= 1.5 * 192
        assert 0.15 * 160 - 2 < resize.width <= 1.5 * 160
        # The floor to even sides shows a scale just above 1 as kept: no more than 2 / 96 of the ups.
        ways["up" if resize.height > 192 else "keep" if resize.height == 192 else "down"] += 1
    assert_shares(ways, {"up": 0.2, "down": 0.7, "keep": 0.1})
    ratios = [after.height / before.height for before, after in zip(first, second, strict=True)]
    assert min(ratios) > 0.2
    assert max(ratios) <= 1.2
    assert {(op.height, op.width) for op in final} == {(48, 40)}
    assert not any(op.antialias for op in first + second + final)


def test_clean_mild_and_full_clips_have_their_shares() -> None:
    def kind(recipe: Recipe) -> str:
        types = {type(operator) for operator in recipe}
        return "clean" if types <= {Blur, Resize, Quantise} else "full" if Unsharp in types else "mild"

    assert_shares(
        Counter(kind(recipe) for recipe in recipes(DegradationConfig(unsharp=True), 600, frames=1)),
        {"clean": 0.3, "mild": 0.3, "full": 0.4},
    )
    assert all(op.qualities[0] >= 74 for op in drawn(Jpeg, recipes(MILD, 50)))


def test_the_chain_has_realbasicvsrs_order() -> None:
    first, second = [Unsharp, Blur, Resize, Noise, Jpeg, Codec], [Resize, Noise, Jpeg]
    endings: Counter[str] = Counter()
    for recipe in recipes(FULL, 200, frames=1):
        types = [type(op) for op in recipe]
        assert types[:6] == first
        rest = types[7:] if types[6] is Blur else types[6:]
        assert rest[:3] == second
        assert rest[-1] is Quantise
        assert [t for t in rest[3:-1] if t is not Blur] in ([Codec, Resize], [Resize, Codec])
        endings["codec first" if rest[3] is Codec else "codec last"] += 1
    assert_shares(endings, {"codec first": 0.5, "codec last": 0.5})
    for recipe in recipes(replace(FULL, second_order=0.0, unsharp=False), 20):
        types = [type(op) for op in recipe if type(op) is not Blur]
        assert types == [Resize, Noise, Jpeg, Codec, Resize, Quantise]


def test_parameters_stay_in_their_ranges() -> None:
    many = recipes(replace(FULL, steps=True), 150)
    for blur in drawn(Blur, many, 0):
        for kernel in blur.kernels:
            assert kernel.size in range(7, 22, 2)
            assert 0.2 <= kernel.sigma_x <= 3
            if kernel.family == "sinc":
                assert math.pi / (3 if kernel.size < 13 else 5) <= kernel.omega <= math.pi
            elif not kernel.family.endswith("aniso"):
                assert (kernel.sigma_y, kernel.angle) == (kernel.sigma_x, 0.0)
            if kernel.family.startswith("generalised"):
                assert 0.5 <= kernel.beta <= 4
            elif kernel.family.startswith("plateau"):
                assert 1 <= kernel.beta <= 2
            else:
                assert kernel.beta == 1
    for place, sigma, scale in ((0, 30, 3.0), (1, 25, 2.5)):
        for noise in drawn(Noise, many, place):
            low, high = (1, sigma) if noise.kind == "gaussian" else (0.05, scale)
            assert all(low <= strength <= high for strength in noise.strengths)
    assert all(30 <= quality <= 95 for jpeg in drawn(Jpeg, many) for quality in jpeg.qualities)


def test_parameters_walk_only_with_steps_but_jpegs_always() -> None:
    still, walking = recipes(FULL, 60), recipes(replace(FULL, steps=True), 60)
    fixed = ("iso", "aniso", "sinc")  # the other families draw their beta anew in every frame
    for blur in drawn(Blur, still):
        assert len(set(blur.kernels)) == 1 or blur.kernels[0].family not in fixed
    assert all(len(set(noise.strengths)) == 1 for noise in drawn(Noise, still))
    assert all(len(set(blur.kernels)) > 1 for blur in drawn(Blur, walking))
    for noise in drawn(Noise, walking):
        step = max(abs(a - b) for a, b in pairwise(noise.strengths))
        assert 0 < step <= (0.1 if noise.kind == "gaussian" else 0.005) + 1e-9
    walks = [max(map(abs, np.diff(jpeg.qualities))) for jpeg in drawn(Jpeg, still)]
    assert max(walks) == 3
    pairs = [pair for blur in drawn(Blur, walking) for pair in pairwise(blur.kernels)]
    assert 0 < max(abs(a.sigma_x - b.sigma_x) for a, b in pairs) <= 0.02 + 1e-9
    assert 0 < max(abs(a.angle - b.angle) for a, b in pairs) <= 0.31416 + 1e-9
    assert 0 < max(abs(a.omega - b.omega) for a, b in pairs) <= 0.0628 + 1e-9


def test_codec_passes_follow_their_control() -> None:
    for codec in drawn(Codec, recipes(FULL, 40)):
        assert codec.control == ("qscale" if codec.name == "mpeg4" else "crf")
        assert (2 <= codec.value <= 16) if codec.name == "mpeg4" else (18 <= codec.value <= 34)
    values = [op.value for op in drawn(Codec, recipes(replace(FULL, codec_control="bitrate"), 100))]
    scale = 48 * 40 / 64**2
    assert 1e4 * scale - 1 <= min(values) < 1.5e4 * scale
    assert 9.5e4 * scale < max(values) <= 1e5 * scale + 1
    assert {op.name for op in drawn(Codec, recipes(replace(FULL, codecs=(1.0, 0.0, 0.0)), 20))} == {"libx264"}


def test_recipes_depend_on_the_generator_alone() -> None:
    first = [draw_recipe(DegradationConfig(), 3, 96, 80, 24, 20, seeded(seed)) for seed in range(20)]
    torch.manual_seed(1)
    assert first == [draw_recipe(DegradationConfig(), 3, 96, 80, 24, 20, seeded(seed)) for seed in range(20)]
    assert len(set(first)) == 20


def test_unusable_configurations_are_refused() -> None:
    with pytest.raises(UsageError, match="unsupported codec_control: `abr`"):
        DegradationConfig(codec_control="abr")
    with pytest.raises(UsageError, match="cannot hold a bit rate"):
        DegradationConfig(codec_control="bitrate", codec_surrogate=True)
    with pytest.raises(UsageError, match="unsupported clean and mild"):
        DegradationConfig(clean=0.7, mild=0.4)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        *((None, {name: value}) for name in ("clean", "mild_jpeg", "second_blur", "poisson") for value in (-0.1, 1.1)),
        (None, {"final_sinc": math.nan}),
        *((None, {"kernel_size": sizes}) for sizes in ((7, 20), (21, 7), (-1, 3))),
        *((None, {"kernel_families": (share,) * 7}) for share in (0.0, -1.0, math.inf)),
        (None, {"sinc_omega": (1.0, 4.0)}),
        (None, {"beta_plateau": (0.0, 1.0)}),
        (None, {"jpeg_step": -1.0}),
        ("first", {"blur_sigma": (2.0, 1.0)}),
        ("first", {"blur_sigma": (0.0, 1.0)}),
        ("second", {"noise_sigma": (-1.0, 1.0)}),
        ("second", {"poisson_scale": (0.0, math.inf)}),
        ("mild_ranges", {"jpeg_quality": (0, 50)}),
        ("mild_ranges", {"crf": (20, 52)}),
        ("first", {"mpeg4_quantiser": (1, 5)}),
        ("first", {"bitrate": (0, 5)}),
        ("first_resize", {"scale": (0.0, 1.0)}),
        ("first_resize", {"scale": (1.1, 1.5)}),
        ("second_resize", {"directions": (0.0, 0.0, 0.0)}),
        ("step", {"sigma": -0.1}),
    ],
)
def test_settings_out_of_range_are_refused(part: str | None, changes: dict[str, Any]) -> None:
    config = DegradationConfig()
    with pytest.raises(UsageError, match=f"unsupported {next(iter(changes))}") as caught:
        replace(config if part is None else getattr(config, part), **changes)
    assert caught.value.hint


@pytest.mark.parametrize(
    "config",
    [
        DegradationConfig(),
        CLEAN,
        MILD,
        replace(FULL, steps=True),
        replace(FULL, codec_control="bitrate"),
        replace(FULL, second_order=0.0, unsharp=False),
    ],
    ids=["default", "clean", "mild", "steps", "bitrate", "first order"],
)
@pytest.mark.parametrize(("T", "H", "W", "height", "width"), [(3, 64, 48, 16, 12), (1, 45, 62, 15, 31)])
def test_degrading_depends_on_the_generator_alone(
    config: DegradationConfig, T: int, H: int, W: int, height: int, width: int
) -> None:
    frames = textured(T, H, W)
    for seed in range(2):
        first, again = (degrade(frames, height, width, config, seeded(seed)) for _ in range(2))
        assert first.shape == (T, 3, height, width)
        assert torch.equal(first, again)
        assert_close(first * 255, (first * 255).round(), rtol=0, atol=1e-4)
        assert first.min() >= 0
        assert first.max() <= 1
        assert first.std() > 0.01


def test_clean_clips_stay_close_and_full_ones_do_not() -> None:
    frames = textured(3, 96, 96)
    small = torch.nn.functional.interpolate(frames, (24, 24), mode="area")
    errors = []
    for config in (CLEAN, MILD, FULL):
        results = [degrade(frames, 24, 24, config, seeded(seed)) for seed in range(8)]
        errors.append(torch.stack([(result - small).abs().mean() for result in results]).mean().item())
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.02


def test_a_batch_gets_the_recipes_of_its_generators() -> None:
    """But for codecs, whole passes of both ways agree up to JPEG's rounding (which draws other counts for Poisson)."""
    config = DegradationConfig(clean=0.2, mild=0.2, poisson=0.0)
    clips = torch.stack([textured(2, 60, 52, seed) for seed in range(10)])
    together = degrade_batch(clips, 30, 26, config, [seeded(i) for i in range(10)])
    assert together.shape == (10, 2, 3, 30, 26)
    distances = []
    for i, clip in enumerate(clips):
        alone = degrade_batch(clip[None], 30, 26, config, [seeded(i)])[0]
        assert_close(together[i], alone, rtol=0, atol=1.01 / 255)
        reference = clip
        for operator in draw_recipe(config, 2, 60, 52, 30, 26, seeded(i)):
            reference = reference if isinstance(operator, Codec) else apply(operator, reference)
        distances.append((together[i] - reference).abs().mean() * 255)
    assert sum(distances) / 10 < 2


def test_a_batch_has_codec_surrogates_only_if_asked() -> None:
    config = replace(MILD, mild_codec=1.0)
    clips = torch.stack([textured(2, 48, 48, seed) for seed in range(3)])
    without, asked = (
        degrade_batch(clips, 24, 24, replace(config, codec_surrogate=surrogate), [seeded(i) for i in range(3)])
        for surrogate in (False, True)
    )
    assert all(not torch.equal(a, b) for a, b in zip(without, asked, strict=True))
    assert (without - asked).abs().mean() < 0.05
