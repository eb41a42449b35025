"""P-Net, R-Net, O-Net and the whole detector: facts of the paper, and traces against eager, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.mtcnn import Decide, Detector, ONet, PNet, Propose, Pyramid, Refine, RNet

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Saved

SCRIPTED = ["pyramid", "propose", "refine", "decide"]
THRESHOLDS = [0.55, 0.3, 0.4]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image(height: int, width: int, look: str = "noise", seed: int = 0, patches: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    match look:
        case "flat":
            return torch.full_like(noise, 200)
        case "stripes":
            return torch.where(torch.arange(width) % 2 == 0, 255, 0).to(torch.uint8).expand(3, height, width)
        case "smooth":
            few = noise[None, :, :patches, :patches].to(torch.float32)
            return F.interpolate(few, size=(height, width), mode="bilinear")[0].to(torch.uint8)
    return noise


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("net", "parameters"), [(PNet, 6_632), (RNet, 100_178), (ONet, 389_040)])
def test_nets_have_the_published_number_of_parameters(net: type[Any], parameters: int) -> None:
    assert sum(parameter.numel() for parameter in net().parameters()) == parameters


def test_pnet_sees_12_pixels_and_steps_by_2(built: Callable[..., Any]) -> None:
    net = built(PNet)
    pixels = uniform(1, 3, 40, 30)
    probabilities, offsets = net(pixels)
    assert probabilities.shape == (1, 2, 15, 10)
    assert offsets.shape == (1, 4, 15, 10)
    window = net(pixels[:, :, 8:20, 4:16])
    torch.testing.assert_close(window[0][0, :, 0, 0], probabilities[0, :, 4, 2])
    torch.testing.assert_close(window[1][0, :, 0, 0], offsets[0, :, 4, 2])


def test_a_pnet_trace_is_right_for_every_size(built: Callable[..., Any], saved: Saved) -> None:
    net = built(PNet)
    traced = saved(net, (uniform(2, 3, 64, 48),))
    sizes = [(12, 12), (12, 512), (512, 13), *((12 + i, 51 - i) for i in range(40)), (255, 256), (511, 300)]
    for i, (height, width) in enumerate(sizes):
        pixels = uniform(1 + i % 3, 3, height, width, seed=i)
        eager = net(pixels)
        assert eager[0].shape == (1 + i % 3, 2, -(-height // 2) - 5, -(-width // 2) - 5)
        assert same(traced(pixels), eager), (height, width)


@pytest.mark.parametrize(("net", "side", "shapes"), [(RNet, 24, [(2,), (4,)]), (ONet, 48, [(2,), (4,), (5, 2)])])
def test_traces_of_rnet_and_onet_are_right_for_every_batch(
    net: type[Any], side: int, shapes: list[tuple[int, ...]], built: Callable[..., Any], saved: Saved
) -> None:
    module = built(net)
    traced = saved(module, (uniform(2, 3, side, side),))
    for batch in (0, 1, 3, 16):
        crops = uniform(batch, 3, side, side, seed=batch)
        eager = module(crops)
        assert [tensor.shape for tensor in eager] == [(batch, *shape) for shape in shapes]
        assert same(traced(crops), eager)
        for row in range(batch):
            for alone, together in zip(module(crops[row : row + 1]), eager, strict=True):
                torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (33, 70), (96, 80), (41, 47)])
def test_a_cell_of_the_mosaic_is_that_of_its_level_alone(height: int, width: int, built: Callable[..., Any]) -> None:
    net = built(PNet)
    pixels = uniform(3, height, width)
    mosaic, cells, windows = Pyramid(smallest_face=15.0, shrink=0.709)(pixels)
    flattened = net(mosaic)[0][0, 1].flatten()[cells]
    scale, seen = 12 / 15.0, 0
    while min(height, width) * scale >= 12:
        size = (int(-(-height * scale // 1)), int(-(-width * scale // 1)))
        level = F.interpolate(pixels[None], size=size, mode="area")
        # Even sizes: without the cells that see less than a whole window.
        alone = net(level[:, :, : size[0] // 2 * 2, : size[1] // 2 * 2])[0][0, 1]
        torch.testing.assert_close(flattened[seen : seen + alone.numel()], alone.flatten())
        assert windows[seen].tolist() == pytest.approx([0, 0, 12 * width / size[1], 12 * height / size[0]])
        seen += alone.numel()
        scale *= 0.709
    assert seen == len(cells) > 0


def test_a_detector_finds_some_faces_in_noise_and_none_elsewhere(built: Callable[..., Any]) -> None:
    detector = built(Detector, thresholds=THRESHOLDS)
    for pixels in (image(19, 300), image(16, 16), image(1, 1), image(96, 80, "flat"), image(96, 80) * 0):
        boxes, scores, landmarks = detector(pixels)
        assert (boxes.shape, scores.shape, landmarks.shape) == ((0, 4), (0,), (0, 5, 2))
    boxes, scores, landmarks = detector(image(96, 80))
    assert 2 <= len(boxes) <= 40
    assert boxes.shape == (len(boxes), 4)
    assert scores.shape == (len(boxes),)
    assert landmarks.shape == (len(boxes), 5, 2)
    assert (scores > 0.4).all()
    assert (scores[:-1] - scores[1:] > -1 / 1024).all()
    assert all(tensor.isfinite().all() for tensor in (boxes, landmarks))


def answers(*scores: float) -> Tensor:
    """Return [n, 2] probabilities with these of a face."""
    face = torch.tensor(scores)
    return torch.stack([1 - face, face], dim=1)


def test_propose_suppresses_in_each_level_then_across_levels(built: Callable[..., Any]) -> None:
    # Cells 0, 2, 3 are one level, windows 4 and 2 pixels apart; cell 20, far off in the mosaic, sees what cell 3 sees.
    cells = torch.tensor([0, 2, 3, 20])
    windows = torch.tensor([[0, 0, 12, 12], [4, 0, 16, 12], [6, 0, 18, 12], [6, 0, 18, 13]], dtype=torch.float32)
    faces = torch.zeros(1, 2, 1, 30)
    faces[0, 1, 0, cells] = torch.tensor([0.9, 0.8, 0.95, 0.7])
    offsets = torch.zeros(1, 4, 1, 30)
    offsets[0, :, 0, 0] = torch.tensor([0.5, 0.0, 0.5, 0.5])
    propose = Propose(threshold=0.5, most=10)
    # Cell 2 overlaps cell 3 by 5 / 7 of the union, cell 20 by 12 / 13; cell 0 overlaps it by 1 / 3.
    assert propose(faces, offsets, cells, windows).tolist() == [[6, 0, 18, 12], [3, 0, 21, 18]]
    assert propose(faces, offsets, cells[[0, 1, 3]], windows[[0, 1, 3]]).tolist() == [
        [3, 0, 21, 18],
        [4, 0, 16, 12],
        [5.5, 0, 18.5, 13],
    ]
    assert Propose(0.5, most=1)(faces, offsets, cells, windows).tolist() == [[6, 0, 18, 12]]
    assert Propose(0.92, most=9)(faces, offsets, cells, windows).tolist() == [[6, 0, 18, 12]]
    assert Propose(0.95, most=9)(faces, offsets, cells, windows).shape == (0, 4)


def test_propose_drops_what_overlaps_by_more_than_half_in_its_level() -> None:
    faces = torch.full((1, 2, 2, 15), 0.9)
    offsets = torch.zeros(1, 4, 2, 15)
    apart = torch.tensor([[0, 0, 1, 1], [30, 0, 31, 1]], dtype=torch.float32)  # so that only the level counts
    for cells, kept in (([1, 17], 1), ([1, 3], 2)):  # 100 / 188 of the union, and exactly a half
        assert len(Propose(0.5, most=9)(faces, offsets, torch.tensor(cells), apart)) == kept


def test_refine_suppresses_before_it_moves() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 10, 6]], dtype=torch.float32)
    offsets = torch.zeros(4, 4)
    offsets[1] = torch.tensor([0.1, 0.0, 0.1, 0.0])
    refined = Refine(0.5)(answers(0.6, 0.9, 0.5, 0.7), offsets, boxes)
    assert refined.tolist() == [[1, -0.5, 11, 9.5], [0, -2, 10, 8]]


def test_decide_moves_before_it_suppresses_and_places_landmarks() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 40, 40], [22, 22, 32, 32], [50, 0, 60, 10]], dtype=torch.float32)
    offsets = torch.zeros(4, 4)
    offsets[3, 0] = -0.5
    landmarks = torch.tensor([0.5, 0.25]).expand(4, 5, 2)
    decided = Decide(0.5)(answers(0.4, 0.8, 0.7, 0.9), offsets, landmarks, boxes)
    assert decided[0].tolist() == [[45, 0, 60, 10], [20, 20, 40, 40]]  # the third lies inside the second
    assert decided[1].tolist() == pytest.approx([0.9, 0.8])
    assert decided[2].tolist() == [[[55, 2.5]] * 5, [[30, 25]] * 5]


CASES = [
    (96, 80, "noise"), (16, 16, "noise"), (128, 128, "noise"), (19, 90, "noise"), (20, 20, "noise"),
    (90, 110, "flat"), (90, 111, "stripes"), (101, 64, "smooth"), (37, 128, "noise"), (128, 37, "smooth"),
]  # fmt: skip


@pytest.mark.parametrize("example", [(96, 80), (10, 10)], ids=["faces in the example", "no face in the example"])
def test_a_detector_with_scripted_stages_is_the_eager_one(
    example: tuple[int, int], built: Callable[..., Any], saved: Saved
) -> None:
    detector = built(Detector, thresholds=THRESHOLDS)
    traced = saved(detector, (image(*example),), SCRIPTED)
    found = set()
    for height, width, look in CASES:
        pixels = image(height, width, look, seed=1)
        eager = detector(pixels)
        found.add(len(eager[0]))
        for _ in range(3):  # the executor of TorchScript changes the program after the first call
            assert same(traced(pixels), eager), (height, width, look)
    assert 0 in found
    assert len(found) > 3


def test_a_detector_that_hands_on_everything_is_still_the_eager_one(built: Callable[..., Any], saved: Saved) -> None:
    detector = built(Detector, thresholds=[0.0, 0.0, 0.0], smallest_face=12, shrink=0.8, most=150)
    traced = saved(detector, (image(30, 30),), SCRIPTED)
    for height, width, look in ((64, 50, "noise"), (50, 64, "flat"), (70, 70, "stripes"), (11, 11, "noise")):
        pixels = image(height, width, look)
        assert same(traced(pixels), detector(pixels)), (height, width, look)


@pytest.mark.parametrize("left_out", ["pyramid", "propose", "decide"])
def test_a_stage_that_is_traced_freezes_the_example(left_out: str, built: Callable[..., Any], saved: Saved) -> None:
    # Suppression takes as many rounds as its longest chain of overlaps. Noise has short chains, so a trace that has
    # frozen their number is right for it, and wrong for images as people take them.
    detector = built(Detector, thresholds=THRESHOLDS)
    traced = saved(detector, (image(96, 80),), [name for name in SCRIPTED if name != left_out])
    pixels = image(128, 128, "smooth", seed=1, patches=8)
    assert not same(traced(pixels), detector(pixels))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"smallest_face": 0}, "smallest_face 0.0 must be above 0 and shrink 0.709 between 0 and 1"),
        ({"shrink": 1}, "smallest_face 20.0 must be above 0 and shrink 1.0 between 0 and 1"),
        ({"most": 0}, "most 0 must be at least 1"),
    ],
)
def test_a_detector_refuses_what_would_never_end(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Detector(**kwargs)
