"""Dormant features put back to use: what is dormant, what it costs, and that it then lives."""

from __future__ import annotations

import torch
from torch import Tensor

from duovsr.model.tiny_vae import MemoryBlock, ResBlock, TinyVAE, unshuffle
from duovsr.options import TinyVAEConfig
from duovsr.train.recycle import features_of, recycle
from duovsr.train.vae import _begin

CONFIG = TinyVAEConfig(encoder_width=8, width_8=8, width_4=8, latent_blocks=1, blocks_8=1, blocks_4=1)
DORMANT = torch.tensor([1, 4, 6])
SCALE = torch.tensor([4.0, 2.0])


def with_dormant() -> TinyVAE:
    torch.manual_seed(0)
    vae = TinyVAE(CONFIG).requires_grad_(False).eval()
    for features in features_of(vae):
        first = features.made_by[0]
        assert first.bias is not None
        first.bias[:] = 0.01
        first.bias[DORMANT] = -100.0
    assert vae.decoder.lq_in.bias is not None
    vae.decoder.lq_in.bias[DORMANT] = -100.0
    return vae


def pictures() -> Tensor:
    return torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def decoded(vae: TinyVAE, lq: Tensor) -> Tensor:
    return vae.decode(vae.encode(lq)[0], lq, scale=SCALE)[0]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def begun_anew(vae: TinyVAE) -> list[Tensor]:
    """Of each layer, which features have no bias any more."""
    return [features.made_by[0].bias == 0 for features in features_of(vae)]


def test_dead_features_begin_anew_and_nothing_changes_at_first() -> None:
    vae, lq = with_dormant(), pictures().mean(dim=1, keepdim=True).expand(-1, 3, -1, -1, -1)  # grey
    before = decoded(vae, lq)
    blocks = [type(block) for block in vae.decoder.modules() if isinstance(block, MemoryBlock | ResBlock)]
    layers = 2 * blocks.count(MemoryBlock) + blocks.count(ResBlock)
    dormant, of = recycle(vae, lq, SCALE, 0.0, generator())
    begun_in_blocks = sum(int(chosen.sum()) for chosen in begun_anew(vae))
    assert of == 8 * layers + 8 and begun_in_blocks + len(DORMANT) <= dormant <= begun_in_blocks + 8
    assert all(chosen[DORMANT].all() and not chosen.all() for chosen in begun_anew(vae))
    torch.testing.assert_close(decoded(vae, lq), before)
    lq = pictures()
    assert recycle(vae, lq, SCALE, 0.0, generator())[0] < dormant / 4, "what began anew is alive"


def test_the_others_are_left_alone() -> None:
    vae, untouched = with_dormant(), with_dormant()
    recycle(vae, pictures(), SCALE, 0.0, generator())
    later = [conv for features in features_of(vae) for conv in features.made_by]  # whose rows begin anew themselves
    for now, then, chosen in zip(features_of(vae), features_of(untouched), begun_anew(vae), strict=True):
        for conv, other in zip(now.made_by, then.made_by, strict=True):
            mine, before = conv.weight[~chosen], other.weight[~chosen]
            assert torch.equal(mine, before * (mine != 0)), "but for what they took from dormant ones"
            sizes = conv.weight.flatten(1).norm(dim=1)
            torch.testing.assert_close(sizes[chosen], sizes[~chosen].mean().expand(int(chosen.sum())))
        before = then.taken_by.weight
        assert torch.equal(now.taken_by.weight, before.where(~chosen[:, None, None], 0.0)) or now.taken_by in later


def test_a_higher_threshold_takes_the_nearly_dormant_too() -> None:
    dormant, _ = recycle(with_dormant(), pictures(), SCALE, 0.0, generator())
    small, of = recycle(with_dormant(), pictures(), SCALE, 1.0, generator())
    assert dormant < small < of, "up to the mean of a layer, but never all of it"


def test_they_learn_again() -> None:
    vae, lq = with_dormant(), pictures()
    recycle(vae, lq, SCALE, 0.0, generator())
    vae.decoder.requires_grad_(True)
    decoded(vae, lq).square().mean().backward()
    moved = []
    for features in features_of(vae):
        assert features.taken_by.weight.grad is not None
        moved.append(features.taken_by.weight.grad[:, DORMANT].flatten(2).norm(dim=2).amax(dim=0) > 0)
    assert torch.cat(moved).float().mean() > 0.7


def test_dormant_features_of_the_lq_see_color_and_no_light() -> None:
    vae = with_dormant()
    recycle(vae, pictures(), SCALE, 0.0, generator())
    red = torch.tensor([1.0, -0.5, -0.5]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    seen = [vae.decoder.lq_in(unshuffle(picture, 4))[0, DORMANT, 2, 2] for picture in (red, -red, torch.ones_like(red))]
    assert (seen[0].abs() > 0.01).all()
    torch.testing.assert_close(seen[1], -seen[0])
    torch.testing.assert_close(seen[2], torch.zeros(3))


def test_training_from_nothing_begins_with_the_lq_and_no_dormant_features() -> None:
    torch.manual_seed(0)
    vae, lq = TinyVAE(CONFIG).requires_grad_(False).eval(), pictures()
    assert not torch.equal(decoded(vae, lq), lq), "torch's own weights add noise"
    vae.apply(_begin)
    assert torch.equal(decoded(vae, lq), lq)
    flat = vae.encoder.conv_in(torch.full((1, 192, 4, 4), 0.7))
    torch.testing.assert_close(flat[..., 1:-1, 1:-1], torch.zeros(1, 8, 2, 2), rtol=0, atol=1e-5)  # differences alone
    dormant, of = recycle(vae, lq, SCALE, 0.0, generator())
    assert dormant <= of / 5
