"""Cutting samples out of a batch of any structure."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ire.curvature.batches import map_tensors, part_of, samples_in, stacked_tensors

Pair = namedtuple("Pair", ["x", "y"])


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def same(first: Any, second: Any) -> bool:
    """Equal structures, types and tensors."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if hasattr(first, "items"):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


X, Y, SCALE = numbered(6, 2), numbered(6), torch.tensor(3.0)
BOXES = [{"boxes": numbered(count, 4), "labels": numbered(count)} for count in (1, 6, 3)]
IMAGES = [numbered(1, size, 6) for size in (4, 6, 5)]
STACKED: dict[str, tuple[Any, Any]] = {
    "tensor": (X, X[1:3]),
    "tuple": ((X, Y), (X[1:3], Y[1:3])),
    "list": ([X, Y], [X[1:3], Y[1:3]]),
    "dict": ({"x": X, "y": Y}, {"x": X[1:3], "y": Y[1:3]}),
    "nested": ({"in": {"x": X}, "out": [(Y,)]}, {"in": {"x": X[1:3]}, "out": [(Y[1:3],)]}),
    "namedtuple": (Pair(X, Y), Pair(X[1:3], Y[1:3])),
    "OrderedDict": (OrderedDict(x=X), OrderedDict(x=X[1:3])),
    "UserDict": (UserDict(x=X), UserDict(x=X[1:3])),
    "scalars": ((SCALE, 7, "text", X), (SCALE, 7, "text", X[1:3])),
    "other-sizes": ((X, numbered(2, 6), numbered(5)), (X[1:3], numbered(2, 6), numbered(5))),
    "the-same-twice": ((X, X), (X[1:3], X[1:3])),
    "strings": ({"x": X, "name": ["a", "b"]}, {"x": X[1:3], "name": ["a", "b"]}),
}
LISTED: dict[str, tuple[Any, Any]] = {
    "detection": ((IMAGES, BOXES), (IMAGES[1:3], BOXES[1:3])),
    "detection-tuples": ((tuple(IMAGES), tuple(BOXES)), (tuple(IMAGES[1:3]), tuple(BOXES[1:3]))),
    "detection-stacked": ((numbered(3, 2, 2), BOXES), (numbered(3, 2, 2)[1:3], BOXES[1:3])),
    "detection-dict": ({"images": IMAGES, "targets": BOXES}, {"images": IMAGES[1:3], "targets": BOXES[1:3]}),
    "detection-beside": ((IMAGES, BOXES, SCALE, 4), (IMAGES[1:3], BOXES[1:3], SCALE, 4)),
}


@pytest.mark.parametrize(("batch", "expected"), [*STACKED.values(), *LISTED.values()], ids=[*STACKED, *LISTED])
def test_a_part_has_the_structure_of_the_whole(batch: Any, expected: Any) -> None:
    count = samples_in(batch)
    assert count is not None
    assert same(part_of(batch, 1, 3), expected)
    assert same(part_of(batch, 0, count), batch)
    assert same(part_of(batch, 0, count + 5), batch)  # the last piece may be short


@pytest.mark.parametrize(("batch", "count"), [(STACKED, 6), (LISTED, 3)], ids=["stacked", "listed"])
def test_number_of_samples(batch: dict[str, tuple[Any, Any]], count: int) -> None:
    assert {name: samples_in(whole) for name, (whole, _) in batch.items()} == dict.fromkeys(batch, count)


@pytest.mark.parametrize("batch", [3, "text", (), [], {}, SCALE, (SCALE, 3), {"a": "text"}], ids=str)
def test_nothing_to_cut(batch: Any) -> None:
    assert samples_in(batch) is None
    assert same(part_of(batch, 0, 1), batch)
    assert stacked_tensors(batch) == []


@pytest.mark.parametrize(
    ("batch", "expected"), [(None, None), ({"a": None}, {"a": None}), ((X, None), (X[1:3], None))], ids=str
)
def test_what_is_not_there_stays_so(batch: Any, expected: Any) -> None:
    assert same(part_of(batch, 1, 3), expected)


def test_a_batch_of_two_pairs_is_not_taken_for_a_list_of_samples() -> None:
    """Images and targets are two things for two samples as well."""
    batch = (IMAGES[:2], BOXES[:2])
    assert samples_in(batch) == 2
    assert same(part_of(batch, 1, 2), (IMAGES[1:2], BOXES[1:2]))


def test_an_empty_batch_has_no_samples() -> None:
    assert samples_in((torch.zeros(0, 3), torch.zeros(0))) == 0


def test_parts_share_memory_and_the_whole_is_not_changed() -> None:
    x = X.clone()
    batch = {"x": x}
    part = part_of(batch, 1, 3)
    assert part["x"].data_ptr() == x[1:].data_ptr()
    assert batch["x"] is x
    part_of((IMAGES, BOXES), 0, 1)
    assert len(IMAGES) == len(BOXES) == 3


def test_pieces_put_together_are_the_whole() -> None:
    pieces = [part_of({"x": X, "y": (Y,)}, start, start + 4) for start in range(0, 6, 4)]
    assert [len(piece["x"]) for piece in pieces] == [4, 2]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), X)
    assert torch.equal(torch.cat([piece["y"][0] for piece in pieces]), Y)


def test_stacked_tensors_in_order() -> None:
    found = stacked_tensors({"scale": SCALE, "in": (X, numbered(5)), "y": Y})
    assert [tensor is expected for tensor, expected in zip(found, (X, Y), strict=True)] == [True, True]
    assert stacked_tensors((IMAGES, BOXES)) == []
    assert stacked_tensors((numbered(3, 2), BOXES)) == []


def test_every_tensor_is_replaced_and_the_rest_stays() -> None:
    marker = object()
    batch = {"x": [X, (SCALE, "text")], "pair": Pair(Y, marker), "u": UserDict(a=Y)}
    doubled = map_tensors(batch, lambda tensor: 2 * tensor)
    assert same(doubled, {"x": [2 * X, (2 * SCALE, "text")], "pair": Pair(2 * Y, marker), "u": UserDict(a=2 * Y)})
    assert map_tensors(X, lambda tensor: tensor.shape) == (6, 2)


def test_a_defaultdict() -> None:
    batch = defaultdict(list, x=X)
    assert same(part_of(batch, 1, 3), defaultdict(list, x=X[1:3]))


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param([{"image": image, **boxes} for image, boxes in zip(IMAGES, BOXES, strict=True)][:2], id="dicts"),
        pytest.param([{"image": image} for image in IMAGES[:2]], id="images only"),
    ],
)
def test_a_batch_that_is_a_list_of_samples(batch: Any) -> None:
    assert samples_in(batch) == 2
    assert same(part_of(batch, 0, 1), batch[:1])


def test_a_single_number_with_a_dimension_is_not_the_batch() -> None:
    batch = {"temperature": torch.tensor([0.5]), "x": X, "y": Y}
    assert samples_in(batch) == 6


def test_the_first_tensor_with_more_than_one_entry_is_the_batch() -> None:
    assert samples_in({"x": X, "anchors": numbered(100, 4), "priors": numbered(100)}) == 6
    assert samples_in((numbered(1, 3), numbered(1))) == 1
    assert samples_in({"mean": numbered(1), "std": numbered(1), "x": X, "y": Y}) == 6


def test_three_images_of_three_channels_are_three_samples() -> None:
    images = [numbered(3, size, 6) for size in (4, 6, 5)]
    assert same(part_of((images, BOXES), 1, 3), (images[1:3], BOXES[1:3]))
