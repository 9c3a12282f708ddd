"""Collating, nested tensors, and prefetching to a device."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from torchvision import tv_tensors
from torchvision.transforms import v2

from core.data import Collate, DevicePrefetcher, LoadedBatch, collate, to_device
from core.data.loading.tree import map_tensors, tensors


def test_every_kind_of_value_finds_its_form():
    def sample(i):
        return {
            "image": torch.full((3, 2, 2), float(i)),
            "array": np.full((2,), i, dtype=np.float64),
            "label": i,
            "scalar": np.int32(i),
            "score": i / 2,
            "mixed": i if i else 0.5,
            "flag": i > 0,
            "sample_id": f"s{i}",
            "maybe": None if i else 3,
            "nested": {"depth": torch.ones(1) * i, "name": "n"},
            "names": [f"a{i}", "b"],
        }

    batch = collate([sample(0), sample(1)])
    assert batch["image"].shape == (2, 3, 2, 2) and batch["image"][1].eq(1).all()
    assert batch["array"].dtype == torch.float64 and batch["array"].tolist() == [[0, 0], [1, 1]]
    assert batch["label"].dtype == torch.int64 and batch["scalar"].dtype == torch.int64
    assert batch["score"].dtype == torch.float32 and batch["score"].tolist() == [0, 0.5]
    assert batch["mixed"].tolist() == [0.5, 1]
    assert batch["flag"].dtype == torch.bool and batch["flag"].tolist() == [False, True]
    assert batch["sample_id"] == ["s0", "s1"] and batch["maybe"] == [3, None]
    assert batch["nested"]["depth"].shape == (2, 1) and batch["nested"]["name"] == ["n", "n"]
    assert batch["names"] == [["a0", "b"], ["a1", "b"]]


def test_samples_need_not_be_dicts():
    assert collate([torch.ones(2), torch.zeros(2)]).shape == (2, 2)
    assert collate([1, 2]).tolist() == [1, 2]


def test_images_stack_to_plain_tensors_and_boxes_stay_a_list():
    flip = v2.RandomHorizontalFlip(p=1.0)

    def sample(boxes):
        image = tv_tensors.Image(torch.arange(12, dtype=torch.uint8).view(1, 3, 4))
        box = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, 1, 1]] * boxes), format="XYXY", canvas_size=(3, 4))
        return flip(
            {"image": image, "boxes": box, "masks": tv_tensors.Mask(torch.zeros(boxes, 3, 4)), "sample_id": "x"}
        )

    batch = Collate(lists=["masks"])([sample(1), sample(2)])
    assert type(batch["image"]) is torch.Tensor and batch["image"].shape == (2, 1, 3, 4)
    assert batch["image"][0, 0, 0].tolist() == [3, 2, 1, 0]
    assert [len(boxes) for boxes in batch["boxes"]] == [1, 2] and [len(masks) for masks in batch["masks"]] == [1, 2]
    # Also where they would stack by chance: the type of a key must not depend on the batch.
    assert isinstance(Collate()([sample(2), sample(2)])["boxes"], list)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"x": torch.ones(3)},
            r"'x' cannot be stacked.*\(2,\) float32 of 'first'.*\(3,\).*'second'.*lists: \[x\]",
        ),
        ({"x": torch.ones(2).half()}, r"float32 of 'first', \(2,\) float16 of 'second'"),
        ({"y": torch.ones(2)}, r"different keys: \['x', 'y'\] in only one of first, second"),
        ({"x": torch.ones(2), "deep": {"z": torch.ones(1)}}, "different keys"),
    ],
)
def test_samples_that_do_not_fit_together_are_named(second, message):
    with pytest.raises(ValueError, match=message):
        collate([{"x": torch.ones(2), "sample_id": "first"}, {**second, "sample_id": "second"}])


def test_nested_keys_are_named_with_their_place():
    with pytest.raises(ValueError, match=r"'a\.b' cannot be stacked"):
        collate([{"a": {"b": torch.ones(1)}}, {"a": {"b": torch.ones(2)}}])
    assert Collate(lists=["a.b"])([{"a": {"b": torch.ones(1)}}, {"a": {"b": torch.ones(2)}}])["a"]["b"][1].shape == (2,)


class Boxes:
    """Holds a tensor without being one, as mmdet's boxes do."""

    def __init__(self, tensor):
        self.tensor = tensor


def tree():
    pair = namedtuple("pair", "left right")
    element = PixelData(metainfo={"name": "m"}, sem=torch.zeros(1, 2, 2))
    instances = InstanceData(metainfo={"id": 3}, boxes=torch.zeros(2, 4), labels=torch.zeros(2), names=["a", "b"])
    return {
        "tensor": torch.zeros(1),
        "list": [torch.zeros(1), "text", None, 3],
        "tuple": (torch.zeros(1), {"deep": torch.zeros(1)}),
        "named": pair(torch.zeros(1), 2),
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(1, 4), format="XYWH", canvas_size=(5, 6)),
        "element": element,
        "instances": [instances],
        "wrapped": Boxes(torch.zeros(1)),
    }


def test_tensors_are_found_in_every_structure_and_the_rest_is_kept():
    data = tree()
    mapped = map_tensors(lambda tensor: tensor + 1, data)
    found = list(tensors(mapped))
    assert len(found) == 10 and all(bool((tensor == 1).all()) for tensor in found)
    assert all(bool((tensor == 0).all()) for tensor in tensors(data)), "the original is left alone"
    assert mapped["list"][1:] == ["text", None, 3] and mapped["named"].right == 2
    assert mapped["boxes"].format.value == "XYWH" and mapped["boxes"].canvas_size == (5, 6)
    assert mapped["element"].metainfo == {"name": "m"} and type(mapped["element"]) is PixelData
    assert mapped["instances"][0].metainfo == {"id": 3} and mapped["instances"][0].names == ["a", "b"]
    assert type(mapped["wrapped"]) is Boxes


def test_to_device_moves_every_tensor():
    moved = to_device(tree(), "meta")
    assert {tensor.device.type for tensor in tensors(moved)} == {"meta"} and len(list(tensors(moved))) == 10
    assert type(moved["boxes"]) is tv_tensors.BoundingBoxes


# ---------------------------------------------------------------------------- prefetching


class Recorder:
    """A transfer that writes down what happens when, and moves data in two visible halves."""

    def __init__(self, events):
        self.events = events

    def start(self, data):
        self.events.append(("start", data["i"].item()))
        return {"started": data["i"]}

    def finish(self, data):
        self.events.append(("finish", data["started"].item()))
        return {"i": data["started"]}


def batches(count, events=None, fail_at=None):
    for i in range(count):
        if events is not None:
            events.append(("load", i))
        if i == fail_at:
            raise RuntimeError(f"batch {i}")
        yield LoadedBatch({"i": torch.tensor(i)}, [f"error {i}"])


def test_the_copy_of_the_next_batch_is_under_way_when_a_batch_is_handed_out():
    events = []
    for batch in DevicePrefetcher(batches(3, events), "cpu", transfer=Recorder(events)):
        events.append(("step", batch.data["i"].item()))
    assert events == [
        ("load", 0),
        ("start", 0),
        ("finish", 0),
        ("load", 1),
        ("start", 1),
        ("step", 0),
        ("finish", 1),
        ("load", 2),
        ("start", 2),
        ("step", 1),
        ("finish", 2),
        ("step", 2),
    ]


@pytest.mark.parametrize("options", [{}, {"enabled": False}, {"transfer": "recorder"}])
def test_batches_and_errors_are_the_same_with_and_without_prefetching(options):
    if options.get("transfer"):
        options = {"transfer": Recorder([])}
    for count in (0, 1, 2, 5):
        result = list(DevicePrefetcher(list(batches(count)), "cpu", **options))
        assert [batch.data["i"].item() for batch in result] == list(range(count))
        assert [batch.errors for batch in result] == [[f"error {i}"] for i in range(count)]


def test_disabled_prefetching_does_not_run_ahead():
    events = []
    stream = iter(DevicePrefetcher(batches(3, events), "cpu", enabled=False, transfer=Recorder(events)))
    next(stream)
    assert events == [("load", 0)]


@pytest.mark.parametrize("fail_at", [0, 2])
def test_an_error_waits_for_its_turn(fail_at):
    seen = []
    with pytest.raises(RuntimeError, match=f"batch {fail_at}"):
        for batch in DevicePrefetcher(batches(5, fail_at=fail_at), "cpu", transfer=Recorder([])):
            seen.append(batch.data["i"].item())
    assert seen == list(range(fail_at))


def test_a_batch_without_samples_passes_through():
    (batch,) = DevicePrefetcher([LoadedBatch(None, ["all left out"])], "cpu")
    assert batch == (None, ["all left out"])


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_batches_arrive_whole_while_the_device_is_busy(device):
    host = [LoadedBatch({"x": torch.randn(64, 64, 64)}, []) for _ in range(6)]
    host = [batch.pin_memory() for batch in host] if device == "cuda" else host
    for moved, batch in zip(DevicePrefetcher(host, device), host, strict=True):
        # Work that keeps the stream busy while the next batch arrives in memory that the allocator may hand out again.
        x = moved.data["x"]
        y = (x @ x.transpose(1, 2)).sum()
        assert x.device.type == device and torch.equal(x.cpu(), batch.data["x"]) and torch.isfinite(y)
        del x, moved
