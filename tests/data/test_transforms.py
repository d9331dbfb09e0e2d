import pytest
import torch
from PIL import Image

from lightning_ire import ConfigurationError
from lightning_ire.data.transforms import Cutout, batch_mixing, evaluation_chain, training_chain


def zeroed(image: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows and columns of the rectangle of zeros; checks that it is one, in all channels."""
    empty = (image == 0).all(dim=0)
    rows, columns = torch.nonzero(empty.any(dim=1)).flatten(), torch.nonzero(empty.any(dim=0)).flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    assert empty[top:bottom, left:right].all()
    assert (image == 0).sum() == 3 * (bottom - top) * (right - left)
    return top, bottom, left, right


@pytest.mark.parametrize("size", [1, 4, 5, 16])
def test_cutout_square_with_its_centre_in_the_image(size):
    cutout = Cutout(size)
    found = [zeroed(cutout(torch.ones(3, 12, 10))) for _ in range(600)]
    for length, begin, end in ((12, 0, 1), (10, 2, 3)):  # every centre was drawn, and the square clipped at the border
        spans = {(max(centre - size // 2, 0), min(centre - size // 2 + size, length)) for centre in range(length)}
        assert {(place[begin], place[end]) for place in found} == spans


def test_cutout_leaves_its_argument_alone_and_keeps_the_rest():
    image = torch.rand(3, 8, 8) + 1
    before = image.clone()
    result = Cutout(4)(image)
    assert torch.equal(image, before)
    assert torch.equal(result[result != 0], image[result != 0])


def test_cutout_probability():
    hit = sum(bool((Cutout(2, probability=0.3)(torch.ones(1, 4, 4)) == 0).any()) for _ in range(3000))
    assert hit / 3000 == pytest.approx(0.3, abs=0.03)  # 3.6 standard errors
    assert (Cutout(2, probability=0.0)(torch.ones(1, 4, 4)) == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "Expected `cutout_size` to be a whole number >= 1, got 0"),
        ({"size": 2, "probability": 1.5}, r"Expected `cutout_probability` to be a number in \[0, 1\], got 1.5"),
    ],
)
def test_cutout_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        Cutout(**settings)


def test_chains_scale_and_normalise():
    white = Image.new("RGB", (4, 4), (255, 51, 0))
    for chain in (
        evaluation_chain([], (0.5, 0.0, 0.0), (0.25, 1.0, 1.0)),
        training_chain([], None, (0.5, 0.0, 0.0), (0.25, 1.0, 1.0), 0, 1.0),
    ):
        result = chain(white)
        assert (result.dtype, result.shape) == (torch.float32, (3, 4, 4))
        torch.testing.assert_close(result[:, 0, 0].as_subclass(torch.Tensor), torch.tensor([2.0, 0.2, 0.0]))


def test_cutout_comes_after_the_normalisation():
    result = training_chain([], None, (0.5,) * 3, (0.5,) * 3, 2, 1.0)(Image.new("RGB", (8, 8), (255, 255, 255)))
    assert set(result.unique().tolist()) == {0.0, 1.0}


def test_no_mixing():
    assert batch_mixing(0.0, 0.0, 10) is None


def test_mixup_is_the_formula():
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    mixed, targets = batch_mixing(0.5, 0.0, 3)(images, labels)
    share = targets[0, 0]  # lambda: the first label is 0, the last one, its partner, 1
    assert 0 < share < 1
    one_hot = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


def test_cutmix_share_is_the_area():
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    mixed, targets = batch_mixing(0.0, 1.0, 2)(images, torch.tensor([0, 1]))
    torch.testing.assert_close(targets[0, 1], mixed[0].mean())
    assert set(mixed.unique().tolist()) <= {0.0, 1.0}


def test_mixup_lambda_has_the_distribution_asked_for():
    mixing, images, labels = batch_mixing(0.5, 0.0, 2), torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    shares = torch.stack([mixing(images, labels)[1][0, 0] for _ in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.5 + 1)), abs=0.01)  # Beta(a, a): 1 / (4 (2 a + 1))


def test_either_mixup_or_cutmix():
    images = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    mixing, kinds = batch_mixing(1.0, 1.0, 2), set()
    for _ in range(50):
        mixed, _ = mixing(images, torch.tensor([0, 1]))
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == {"cutmix", "mixup"}
