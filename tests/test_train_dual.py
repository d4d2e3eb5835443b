"""Stage II: which network each loss reaches, which weights each update changes, what the ablation switches change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from duovsr.train.draws import Draws
from duovsr.train.loop import Metrics, Run
from duovsr.train.options import DualConfig
from duovsr.train.rfs_gan import ScorePair, tapped_blocks
from duovsr.train.roles import guided_velocity
from duovsr.train.runs import load_weights
from duovsr.train.stage2 import DualStream
from tests import toy

ROLES = ("student", "fake_score", "real_score", "heads")


def normal(seed: int) -> Tensor:
    return torch.randn(4, 3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_random_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("depth", "taps"), [(30, (8, 17, 26)), (6, (1, 3, 4)), (3, (0, 1, 2))])
def test_features_are_tapped_at_the_papers_fractions(depth: int, taps: tuple[int, ...]) -> None:
    assert tapped_blocks(depth) == taps


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@torch.no_grad()
def test_features_come_from_the_passes_that_give_the_scores(guidance: float) -> None:
    models = {"real": toy.random_model(0), "fake": toy.random_model(1)}
    noisy, z_lq, sigma = normal(0), normal(1), torch.tensor([0.1, 0.4, 0.7, 0.98])
    seen: dict[str, list[Tensor]] = {"real": [], "fake": []}
    for name, model in models.items():
        for block in model.transformer.blocks:
            block.register_forward_hook(lambda _, __, output, kept=seen[name]: kept.append(output[0].movedim(-1, 1)))
    for used in ("both", "real", "fake"):
        v_real, v_fake, features = ScorePair(models["real"], models["fake"], used)(noisy, sigma, z_lq, guidance)
        names = ["real", "fake"] if used == "both" else [used]
        for i, feature in enumerate(features):
            assert_close(feature, torch.cat([seen[name][i] for name in names], 1))
            assert feature.shape[1] == ScorePair(models["real"], models["fake"], used).channels(64)
        for kept in seen.values():
            kept.clear()
    assert_close(v_fake, models["fake"](noisy, z_lq, sigma))
    assert_close(v_real, guided_velocity(models["real"], noisy, z_lq, sigma, guidance))


def dual_stream(run: Path, **settings: object) -> DualStream:
    config = toy.configure("dual", 0, batch=8, **settings)
    assert isinstance(config, DualConfig)
    dual = DualStream(Run(run, config, toy.ALONE), config, toy.ToyInputs(toy.PRESET, init=load_weights(run)))
    # Away from fake = real, where DMD has no gradient.
    nn.init.normal_(dual.fake_score.transformer.head.head.weight, std=0.1)
    return dual


def batch(dual: DualStream, part: int = 0) -> Draws:
    return next(iter(dual.run.micro_batches(0, part)))


def reached(loss: Tensor, module: nn.Module) -> bool:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))


def changed(dual: DualStream, update: Callable[[], object]) -> set[str]:
    """The roles whose weights an update changes."""
    before = {name: {k: v.clone() for k, v in getattr(dual, name).state_dict().items()} for name in ROLES}
    update()
    after = {name: getattr(dual, name).state_dict() for name in ROLES}
    return {name for name in ROLES if any(not torch.equal(before[name][k], after[name][k]) for k in before[name])}


def test_roles_freeze_visibly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dual = dual_stream(run)

    def trainable() -> set[str]:
        flags = {name: {p.requires_grad for p in getattr(dual, name).parameters()} for name in ROLES}
        assert all(len(values) == 1 for values in flags.values())
        return {name for name, values in flags.items() if values == {True}}

    during: list[set[str]] = []
    loss_of = dual._student_loss

    def noting(draws: Draws, step: int) -> tuple[Tensor, Metrics]:
        during.append(trainable())
        return loss_of(draws, step)

    monkeypatch.setattr(dual, "_student_loss", noting)
    assert trainable() == {"student", "fake_score", "heads"}
    dual.student_update(0)
    assert during == [{"student"}]
    assert trainable() == {"student", "fake_score", "heads"}


def test_the_hinge_loss_reaches_the_heads_alone_and_the_diffusion_loss_the_fake_score(run: Path) -> None:
    dual = dual_stream(run)
    _, noted = dual._auxiliary_loss(batch(dual, 1), gan=True)
    for loss, owner in (("heads", dual.heads), ("fake_score", dual.fake_score)):
        for module in (dual.student, dual.fake_score, dual.real_score, dual.heads):
            assert reached(noted[loss], module) == (module is owner)


@pytest.mark.parametrize(
    ("streams", "auxiliary"),
    [("joint", {"fake_score", "heads"}), ("gan", {"fake_score", "heads"}), ("dmd", {"fake_score"})],
)
def test_each_update_changes_its_own_roles(streams: str, auxiliary: set[str], run: Path) -> None:
    dual = dual_stream(run, streams=streams)
    assert changed(dual, lambda: dual.auxiliary_update(0, part=1)) == auxiliary
    assert changed(dual, lambda: dual.student_update(0)) == {"student"}


def gradient_of(dual: DualStream) -> Tensor:
    for module in (dual.fake_score, dual.heads):
        module.requires_grad_(False)
    loss, _ = dual._student_loss(batch(dual), 0)
    gradients = torch.autograd.grad(loss, list(dual.student.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def test_the_students_loss_is_the_papers_sum(run: Path) -> None:
    both = gradient_of(dual_stream(run))
    parts = [gradient_of(dual_stream(run, streams=streams)) for streams in ("dmd", "gan")]
    assert_close(both, parts[0] + parts[1], rtol=1e-3, atol=1e-6)
    dual = dual_stream(run)
    loss, noted = dual._student_loss(batch(dual), 0)
    gan_alone = 0.1 * noted["adversarial"] + 0.05 * noted["matching"]
    dmd_alone = dual_stream(run, gan_weight=0.0, matching_weight=0.0)._student_loss(batch(dual), 0)[0]
    assert_close(loss, dmd_alone + gan_alone)


@pytest.mark.parametrize("discriminator_input", ["noised", "clean"])
def test_the_gans_gradient_is_that_of_its_loss(discriminator_input: str, run: Path) -> None:
    """Nothing on the way from the heads to the student is cut: the slope along the gradient, by finite difference."""
    dual = dual_stream(run, streams="gan", discriminator_input=discriminator_input, gan_weight=1.0, matching_weight=1.0)
    parameters = list(dual.student.parameters())
    loss, _ = dual._student_loss(batch(dual), 0)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    norm = torch.sqrt(sum((g.square().sum() for _, g in used), torch.zeros(())))

    @torch.no_grad()
    def at(step: float) -> float:
        for p, g in used:
            p.add_(g / norm, alpha=step)
        value = dual._student_loss(batch(dual), 0)[0].item()
        for p, g in used:
            p.sub_(g / norm, alpha=step)
        return value

    slope = (at(0.01) - at(-0.01)) / 0.02
    assert slope == pytest.approx(norm.item(), rel=0.03)


def test_streams_are_on_as_named(run: Path) -> None:
    assert dual_stream(run, streams="joint").streams(0) == (True, True)
    assert dual_stream(run, streams="dmd").streams(0) == (True, False)
    assert dual_stream(run, streams="gan").streams(0) == (False, True)
    sequential = dual_stream(run, streams="sequential", steps=10)
    assert [sequential.streams(step) for step in (0, 4, 5, 9)] == [(True, False)] * 2 + [(False, True)] * 2
    every = dual_stream(run, streams="sequential", steps=40, count="all")  # 10 of the student
    assert [every.streams(step) for step in (4, 5)] == [(True, False), (False, True)]


def noted_by(dual: DualStream) -> set[str]:
    return set(dual.auxiliary_update(0, part=1) | dual.student_update(0))


def test_a_stream_that_is_off_costs_and_notes_nothing(run: Path) -> None:
    always, gan = {"fake_score", "error", "grad_norm"}, {"heads", "d_real", "d_fake", "adversarial", "matching"}
    assert noted_by(dual_stream(run)) == always | gan | {"dmd_gradient"}
    assert noted_by(dual_stream(run, streams="dmd")) == always | {"dmd_gradient"}
    assert noted_by(dual_stream(run, streams="gan")) == always | gan


@pytest.mark.parametrize(("features", "channels"), [("both", 128), ("real", 64), ("fake", 64)])
def test_the_heads_see_the_named_models_features(features: str, channels: int, run: Path) -> None:
    dual = dual_stream(run, features=features)
    widths = {head[1].in_channels for head in dual.heads.heads}  # type: ignore[index]
    assert widths == {channels}
    assert changed(dual, lambda: dual.student_update(0)) == {"student"}


@pytest.mark.parametrize(("discriminator_input", "depends"), [("noised", True), ("clean", False)])
def test_the_discriminator_sees_noised_or_clean_samples(discriminator_input: str, depends: bool, run: Path) -> None:
    dual = dual_stream(run, discriminator_input=discriminator_input)
    z0, z_lq, eps = (normal(i) for i in range(3))
    seen = [dual._truth_features(z0, z_lq, torch.full((4,), sigma), eps) for sigma in (0.2, 0.8)]
    assert (not torch.equal(seen[0][0], seen[1][0])) == depends
