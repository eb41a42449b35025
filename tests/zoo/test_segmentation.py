"""The U-Net: its dict, its sizes, and its trace against eager."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from zoo.segmentation import UNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Saved


@pytest.fixture(scope="module")
def unet(built: Callable[..., Any]) -> torch.nn.Module:
    return built(UNet, classes=5)


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 16, 64), (3, 128, 40)])
def test_every_pixel_gets_a_label_twice(batch: int, height: int, width: int, unet: torch.nn.Module) -> None:
    answers = unet(images(batch, height, width))
    assert list(answers) == ["out", "aux"]
    assert all(answer.shape == (batch, 5, height, width) for answer in answers.values())
    assert all(answer.std() > 0.01 for answer in answers.values())


def test_sizes_go_in_steps_of_8(unet: torch.nn.Module) -> None:
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        unet(images(1, 64, 60))


@pytest.mark.parametrize("example", [(2, 64, 64), (1, 8, 8)])
def test_a_trace_is_right_for_every_size_and_rows_do_not_mix(
    example: tuple[int, int, int], unet: torch.nn.Module, saved: Saved
) -> None:
    traced = saved(unet, (images(*example),))
    for batch, height, width in ((1, 8, 8), (2, 8, 64), (3, 72, 16), (4, 128, 128), (1, 24, 200)):
        drawn = images(batch, height, width)
        eager, answers = unet(drawn), traced(drawn)
        for name in ("out", "aux"):
            assert torch.equal(answers[name], eager[name]), (name, batch, height, width)
            alone = unet(drawn[-1:])[name][0]
            torch.testing.assert_close(alone, eager[name][-1], rtol=1e-4, atol=1e-4)
