"""Pointing games against attributions whose share in the right place is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcosification.evaluation import energy_pointing_game, grid_pointing_game
from bcosification.explanation import bcos_contributions
from tests.bcosification.tiny_networks import build

CLASSES, SIZE = 6, 8


class Brightest(nn.Module):
    """Logit of class c: the brightness of the first row's pixel c, wherever in a grid; any image size."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(CLASSES))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        cells = F.unfold(self.dropout(x[:, :1]), SIZE, stride=SIZE).amax(2)[:, :CLASSES]
        return 10 * cells - 5 + self.bias


def data(count=40, seed=0):
    """Images that show their label with the confidence of their brightness, one in five another class than labelled."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    brightness = torch.rand(count, generator=generator) * 0.9 + 0.05
    shown = torch.where(torch.arange(count) % 5 == 4, (labels + 1) % CLASSES, labels)
    images = torch.zeros(count, 3, SIZE, SIZE)
    images[torch.arange(count), :, 0, shown] = brightness[:, None]
    images[:, 1, 3, 3] = torch.arange(count) / count  # which image it is
    return images, labels, brightness


def perfect(model, images, targets):
    """Where the class is seen, and something negative everywhere else."""
    maps = -torch.ones(images.shape[0], *images.shape[2:])
    bright = images[:, 0] > 0
    for n, target in enumerate(targets.tolist()):
        for row, column in bright[n].nonzero().tolist():
            if column % SIZE == target:
                maps[n, row, column] = 2.0
    return maps


def uniform(model, images, targets):
    return torch.ones(images.shape[0], *images.shape[2:])


class Recorder:
    """An attribution that remembers its images."""

    def __init__(self):
        self.grids = []

    def __call__(self, model, images, targets):
        assert bool((images == images[:1]).all())  # one grid, asked about each of its classes
        self.grids.append((images[0], targets.tolist()))
        return uniform(model, images, targets)


@pytest.mark.parametrize("grid", [2])
def test_grids_of_confident_images_of_distinct_classes(grid):
    model, (images, labels, brightness) = Brightest().train(), data()
    recorder = Recorder()
    result = grid_pointing_game(model, images, labels, recorder, grid=grid, confidence=0.5)
    assert model.training and all(m.training for m in model.modules())
    used, order = set(), {label: [] for label in range(CLASSES)}
    for number, (picture, targets) in enumerate(recorder.grids):
        assert picture.shape == (3, grid * SIZE, grid * SIZE) and len(set(targets)) == grid * grid
        for cell, target in enumerate(targets):
            row, column = divmod(cell, grid)
            piece = picture[:, row * SIZE : (row + 1) * SIZE, column * SIZE : (column + 1) * SIZE]
            index = int(result.indices[number * grid * grid + cell])
            torch.testing.assert_close(piece, images[index])
            assert int(labels[index]) == target == int(result.targets[number * grid * grid + cell])
            assert index % 5 != 4 and brightness[index] > 0.5  # correct, and sigmoid(10 b - 5) > 0.5
            assert index not in used
            used.add(index)
            order[target].append(float(brightness[index]))
    assert all(values == sorted(values, reverse=True) for values in order.values())
    # All that can be made were made: at most grid² - 1 classes have images left.
    left = {int(labels[i]) for i in range(40) if i % 5 != 4 and brightness[i] > 0.5 and i not in used}
    assert len(recorder.grids) >= 2 and len(left) < grid * grid


def test_scores_of_known_attributions():
    model, (images, labels, _) = Brightest(), data(80)
    everywhere = grid_pointing_game(model, images, labels, uniform)
    assert everywhere.chance == 0.25 and everywhere.mean == pytest.approx(0.25)
    torch.testing.assert_close(everywhere.scores, torch.full((len(everywhere),), 0.25))
    assert grid_pointing_game(model, images, labels, perfect).scores.tolist() == [1.0] * len(everywhere)

    def nowhere(model, images, targets):
        return -uniform(model, images, targets)

    assert grid_pointing_game(model, images, labels, nowhere).mean == 0

    def top_left(model, images, targets):
        maps = torch.zeros(images.shape[0], *images.shape[2:])
        maps[:, :SIZE, :SIZE], maps[:, -1, -1] = 3.0, 3.0 * SIZE**2
        return maps

    scores = grid_pointing_game(model, images, labels, top_left).scores.view(-1, 4)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0, 0, 0.5]]).expand_as(scores))


def test_larger_grids_and_shares():
    """Class c in a 3 x 3 grid gets c + 1 in its own column and 1 elsewhere."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(27, 3, 4, 4, generator=generator), torch.arange(27) % 9

    class Oracle(nn.Module):
        def forward(self, x):
            index = (x[:, None] - images[None]).abs().amax((2, 3, 4)).argmin(1)
            return F.one_hot(labels[index], 9) * 10.0 - 5

    recorder = Recorder()

    def attribute(model, pictures, targets):
        recorder(model, pictures, targets)
        maps = torch.ones(9, 12, 12)
        for cell in range(9):
            row, column = divmod(cell, 3)
            maps[cell, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = cell + 1
        return maps

    result = grid_pointing_game(Oracle(), images, labels, attribute, grid=3)
    assert result.chance == pytest.approx(1 / 9) and len(recorder.grids) == 3
    expected = torch.tensor([(cell + 1) / (cell + 1 + 8) for cell in range(9)])
    torch.testing.assert_close(result.scores.view(3, 9), expected.expand(3, 9))


def test_the_grids_depend_on_the_seed_alone():
    model, (images, labels, _) = Brightest(), data()
    first, again, other = (
        grid_pointing_game(model, images, labels, uniform, seed=seed, batch_size=batch)
        for seed, batch in ((0, 64), (0, 7), (1, 64))
    )
    assert first.indices.tolist() == again.indices.tolist() != other.indices.tolist()


def test_a_number_of_grids():
    model, (images, labels, _) = Brightest(), data()
    assert len(grid_pointing_game(model, images, labels, uniform, count=2)) == 8
    with pytest.raises(ValueError, match=r"each of 50 grids of 2 x 2, got \d+ such images of 5 classes among 40"):
        grid_pointing_game(model, images, labels, uniform, count=50)


def test_too_few_confident_images():
    model, (images, labels, _) = Brightest(), data()
    with pytest.raises(ValueError, match=r"p > 0.999, .* of 4 classes .* got 0 such images of 0 classes"):
        grid_pointing_game(model, images, labels, uniform, confidence=0.999)
    keep = labels < 3
    with pytest.raises(ValueError, match="of 3 classes among 21, enough for 0 grids"):
        grid_pointing_game(model, images[keep], labels[keep], uniform, confidence=0)


def test_softmax_confidence():
    # With all logits 5 above zero every sigmoid is sure; softmax still tells the confident images.
    model, (images, labels, brightness) = Brightest(), data(80)
    nn.init.constant_(model.bias, 5.0)
    by_sigmoid = grid_pointing_game(model, images, labels, uniform, confidence=0.9)
    assert bool((brightness[by_sigmoid.indices] < 0.5).any())
    by_softmax = grid_pointing_game(model, images, labels, uniform, confidence=0.9, probability="softmax")
    chosen = model.eval()(images[by_softmax.indices]).softmax(1).amax(1)
    assert len(by_softmax) < len(by_sigmoid) and float(chosen.detach().min()) > 0.9


def test_rescaled_grids_have_the_size_of_one_image():
    model, (images, labels, _) = Brightest(), data()
    sizes = []

    def attribute(model, pictures, targets):
        sizes.append(tuple(pictures.shape[1:]))
        return uniform(model, pictures, targets)

    result = grid_pointing_game(model, images, labels, attribute, rescale=True)
    assert set(sizes) == {(3, SIZE, SIZE)} and result.mean == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"divisible by grid=2 with rescale=True, got \(9, 8\)"):
        taller = F.pad(images, (0, 0, 0, 1))

        class Taller(Brightest):
            def forward(self, x):
                return super().forward(x[:, :, :SIZE])

        grid_pointing_game(Taller(), taller, labels, uniform, rescale=True)


def test_energy_in_boxes():
    model, (images, labels, _) = Brightest(), data(4)
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 4, 2], [7, 7, 8, 8], [2, 0, 4, 8]])
    result = energy_pointing_game(model, images, labels, boxes, uniform)
    area = torch.tensor([64, 8, 1, 16]) / 64
    torch.testing.assert_close(result.scores, area)
    assert result.chance == pytest.approx(float(area.mean())) and result.mean == pytest.approx(result.chance)
    assert result.indices.tolist() == [0, 1, 2, 3] and result.targets.tolist() == labels.tolist()

    def row(model, images, targets):  # x runs along columns: the first row lies in x 0…8, y 0…1
        maps = -torch.ones(images.shape[0], 8, 8)
        maps[:, 0] = torch.arange(8.0)
        return maps

    scores = energy_pointing_game(model, images, labels, boxes, row, batch_size=3).scores
    torch.testing.assert_close(scores, torch.tensor([1.0, 6 / 28, 0.0, 5 / 28]))


def test_several_boxes_are_joined():
    model, (images, labels, _) = Brightest(), data(2)
    boxes = [torch.tensor([[0, 0, 4, 8], [2, 0, 6, 8]]), torch.tensor([0, 0, 2, 8])]
    torch.testing.assert_close(
        energy_pointing_game(model, images, labels, boxes, uniform).scores, torch.tensor([0.75, 0.25])
    )


def test_a_bcos_network_in_both_games():
    """Fully convolutional: the grid goes in as it is. The scores are recomputed from the contributions."""
    model = build("own_convnet").float()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 3, 16, 16, generator=generator)
    images[:, 0] *= torch.rand(60, 1, 1, generator=generator) * 2
    images[:, 1] *= torch.rand(60, 1, 1, generator=generator) * 2
    images = images.clamp(0, 1)

    class Encoded(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x):
            return self.network(torch.cat([x, 1 - x], 1) if x.shape[1] == 3 else x)

    wrapped = Encoded().eval()
    with torch.no_grad():
        labels = wrapped(images).argmax(1)
    boxes = torch.tensor([[0, 0, 8, 8]]).expand(60, 4)
    scores = energy_pointing_game(wrapped, images, labels, boxes, bcos_contributions).scores
    positive = bcos_contributions(wrapped, images, labels).clamp(min=0)
    torch.testing.assert_close(scores, positive[:, :8, :8].sum((1, 2)) / positive.sum((1, 2)))
    if labels.unique().numel() < 4:
        pytest.fail(f"the fixture needs four predicted classes, has {labels.unique().tolist()}")
    result = grid_pointing_game(wrapped, images, labels, bcos_contributions, count=1, confidence=0)
    picture = torch.cat(
        [torch.cat([images[i] for i in result.indices[:2]], 2), torch.cat([images[i] for i in result.indices[2:]], 2)],
        1,
    )
    maps = bcos_contributions(wrapped, picture.expand(4, -1, -1, -1), result.targets).clamp(min=0)
    cells = torch.stack([maps[0, :16, :16], maps[1, :16, 16:], maps[2, 16:, :16], maps[3, 16:, 16:]])
    torch.testing.assert_close(result.scores, cells.sum((1, 2)) / maps.sum((1, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 1}, "grid=1"),
        ({"count": 0}, "count=0"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"probability": "relu"}, "'sigmoid' or 'softmax', got 'relu'"),
        ({"attribute": lambda m, x, t: x}, r"maps of shape \(4, 16, 16\), got \(4, 3, 16, 16\)"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels \(N,\), N >= 1, got \(40, 3, 8, 8\) and \(3,\)"),
    ],
)
def test_bad_input_of_the_grid_game(options, message):
    images, labels, _ = data()
    call = {"model": Brightest(), "images": images, "labels": labels, "attribute": uniform} | options
    with pytest.raises(ValueError, match=message):
        grid_pointing_game(**call)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.tensor([[0, 0, 4, 4]]), "boxes for 2 images, got 1"),
        (torch.tensor([[0, 0, 4, 4], [0, 0, 9, 4]]), r"within 8 x 8 pixels for image 1, got \(0, 0, 9, 4\)"),
        (torch.tensor([[3, 0, 3, 4], [0, 0, 4, 4]]), r"for image 0, got \(3, 0, 3, 4\)"),
        ([torch.zeros(0, 4), torch.tensor([0, 0, 1, 1])], r"K >= 1, for image 0, got \(0, 4\)"),
        (torch.zeros(2, 3), r"\(4,\) or \(K, 4\), .* got \(1, 3\)"),
    ],
)
def test_bad_boxes(boxes, message):
    images, labels, _ = data(2)
    with pytest.raises(ValueError, match=message):
        energy_pointing_game(Brightest(), images, labels, boxes, uniform)
