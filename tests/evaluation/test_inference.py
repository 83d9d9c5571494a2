"""Batches, mirroring, precision and devices; and a model that comes back as it was."""

from __future__ import annotations

import copy
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import LevelModel
from torch import Tensor, nn

from simmp_fast.data.errors import DataError
from simmp_fast.evaluation.inference import class_probabilities, evaluating, segment, segment_probabilities

SLICES = np.random.default_rng(0).random((7, 1, 16, 16)).astype(np.float32)


class Ramp(nn.Module):
    """Two classes whose boundary moves with the column, so that it is not equivariant to mirroring."""

    def forward(self, image: Tensor) -> list[Tensor]:
        ramp = torch.linspace(-1, 1, image.shape[-1], device=image.device).expand_as(image[:, 0])
        logits = torch.stack([torch.zeros_like(ramp), 3 * (image[:, 0] - 0.5) + ramp], 1)
        return [logits / 4] * 4


def run(model: nn.Module, classes: int = 3, **options: Any) -> np.ndarray:
    return np.stack(list(segment(model, SLICES, classes, **options)))


def test_sum_softmax_argmax(model: LevelModel) -> None:
    heads = model.eval()(torch.from_numpy(SLICES))
    expected = torch.softmax(sum(heads), 1)
    probabilities = np.stack(list(segment_probabilities(model, SLICES, 3, batch_size=3)))
    np.testing.assert_allclose(probabilities, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert probabilities.dtype == np.float32
    labels = run(model)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, probabilities.argmax(1))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
def test_batch_size_does_not_matter(model: LevelModel, batch_size: int) -> None:
    np.testing.assert_array_equal(run(model, batch_size=batch_size), run(model, batch_size=4))


def test_released_variant_runs_slice_by_slice() -> None:
    class FirstOfBatch(Ramp):
        config = SimpleNamespace(variant="released")

        def forward(self, image: Tensor) -> list[Tensor]:
            heads = super().forward(image)
            heads[0][1:] += torch.tensor([100.0, 0.0])[:, None, None]
            return heads

    np.testing.assert_array_equal(run(FirstOfBatch(), 2, batch_size=5), run(Ramp(), 2))


def test_mirroring_averages_four_views() -> None:
    images = torch.from_numpy(SLICES)
    expected = torch.zeros(7, 2, 16, 16)
    for axes in ((), (2,), (3,), (2, 3)):
        expected += torch.flip(class_probabilities(Ramp(), torch.flip(images, axes)), axes) / 4
    mirrored = class_probabilities(Ramp(), images, mirror=True)
    torch.testing.assert_close(mirrored, expected)
    assert not torch.allclose(mirrored, class_probabilities(Ramp(), images))


def test_training_flags_and_state_come_back(model: LevelModel) -> None:
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    run(model, batch_size=2)
    assert model.training
    assert model.drop.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_flags_come_back_early_and_after_errors(model: LevelModel) -> None:
    model.train()
    with closing(segment(model, SLICES, 3, batch_size=2)) as labels:
        next(labels)
        assert not model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert model.training
    assert model.drop.training
    with pytest.raises(DataError, match="model: got 3 classes, expected 5"):
        run(model, classes=5)
    assert model.training
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert model.training


def test_bfloat16_gives_float32_probabilities() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(1, 3, 1)

        def forward(self, image: Tensor) -> list[Tensor]:
            out = self.head(image)
            self.seen = out.dtype
            return [out] * 4

    model = Mixed()
    assert class_probabilities(model, torch.from_numpy(SLICES), precision="bfloat16").dtype == torch.float32
    assert model.seen == torch.bfloat16
    with pytest.raises(ValueError, match="precision: got 'half'"):
        class_probabilities(model, torch.from_numpy(SLICES), precision="half")


def test_device_is_an_option(model: LevelModel) -> None:
    np.testing.assert_array_equal(run(model, device="cpu"), run(model))
    with pytest.raises(ValueError, match="batch_size: got 0"):
        run(model, batch_size=0)


def test_empty_stream(model: LevelModel) -> None:
    assert list(segment(model, [], 3)) == []
