from __future__ import annotations

import pytest
import torch

from core.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32)])
def test_the_same_steps_as_torchs_own(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    begin = ours.detach().clone()
    optimizers = (
        Muon([ours], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    way, difference = (ours - begin).norm(), (ours - theirs).norm()
    assert way > 0.1 and difference < 0.02 * way, "torch computes in bfloat16"


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((16, 64), (64, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3
