"""Readers on small files in the formats of the releases, their protocols, errors and transforms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from core.data import DataFileError, MissingDataError, build_loader
from slot_walks.data import (
    COCO,
    VOC,
    Birds,
    Cars,
    COCOStuff,
    CropTrain,
    Dogs,
    Flowers,
    MOVi,
    OfficialEval,
    Square,
    StandardEval,
)
from slot_walks.data.cocostuff import COCOSTUFF27, coarse_labels
from slot_walks.data.files import load_foreground, load_labels
from slot_walks.data.movi import chosen_frames
from slot_walks.data.transforms import Window, bird_window


def picture(height=40, width=60, seed=0):
    """A picture whose pixels differ."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def labels(values, height=40, width=60):
    """A label map of vertical stripes."""
    columns = np.array(values)[np.arange(width) * len(values) // width]
    return np.broadcast_to(columns, (height, width)).astype(np.uint8)


def save(content, path, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = content if isinstance(content, Image.Image) else Image.fromarray(np.asarray(content))
    if palette:
        image = image.convert("P")
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    image.save(path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


# ---------------------------------------------------------------------- transforms
def test_square_stretches_and_scales_values():
    image, masks = Square(32)(picture(), {"mask": labels([0, 1])})
    assert image.shape == (3, 32, 32) and masks["mask"].shape == (32, 32) and masks["mask"].dtype == torch.int64
    want = np.asarray(picture().resize((32, 32), Image.BILINEAR)).transpose(2, 0, 1) / 255
    assert torch.allclose(image, torch.from_numpy(want).float() * 2 - 1, atol=1e-6)
    assert (masks["mask"][:, :16] == 0).all() and (masks["mask"][:, 16:] == 1).all()
    assert torch.allclose(Square(32, "none")(picture()), torch.from_numpy(want).float(), atol=1e-6)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (torch.from_numpy(want).float() - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(Square(32, "imagenet")(picture()), normalised, atol=1e-5)


def test_training_crops_keep_picture_and_labels_together():
    grey = np.arange(60, dtype=np.uint8)[None].repeat(40, 0)
    image = Image.fromarray(np.stack([grey] * 3, axis=-1))
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        pixels, masks = CropTrain(short=None, size=24, normalize="none")(image, {"mask": grey})
        assert torch.equal((255 * pixels[0]).round().long(), masks["mask"])
        seen.add((int(masks["mask"].min()), int(masks["mask"][0, 1] - masks["mask"][0, 0])))
    assert {step for _, step in seen} == {1, -1} and len({start for start, _ in seen}) > 3
    middle = CropTrain(short=40, size=24, crop="center", flip=0, normalize="none")(image)
    assert (255 * middle[0, 0]).round().tolist() == list(range(18, 42))
    with pytest.raises(ValueError, match="no crop of 64"):
        CropTrain(short=None, size=64)(image)
    with pytest.raises(ValueError, match="does not fit"):
        CropTrain(short=32, size=64)


def test_shorter_sides_are_scaled_and_longer_ones_cut_to_whole_pixels():
    image, masks = CropTrain(short=32, size=32, crop="center", flip=0)(
        picture(40, 61), {"mask": labels([0, 1], 40, 61)}
    )
    assert image.shape == (3, 32, 32) and int(masks["mask"].sum()) in range(15 * 32, 17 * 32 + 1)
    image, masks = StandardEval(32, mask_size=64)(picture(61, 40), {"mask": labels([0, 1], 61, 40)})
    assert image.shape == (3, 32, 32) and masks["mask"].shape == (64, 64)


def test_the_official_chain_pads_small_pictures_with_background():
    white = Image.fromarray(np.full((20, 40, 3), 255, np.uint8))
    image, masks = OfficialEval(crop=40, size=80, normalize="none")(white, {"mask": np.full((20, 40), 300)})
    assert masks["mask"][:20].eq(0).all() and masks["mask"][20:60].eq(300).all() and masks["mask"][60:].eq(0).all()
    assert image[:, :18].eq(0).all() and image[:, 24:56].eq(1).all()


def test_bird_windows_are_square_as_far_as_the_picture_goes():
    assert bird_window([60.7, 50.2, 30, 20], (200, 200)) == Window(53, 38, 97, 82)
    assert bird_window([0, 50, 30, 20], (30, 60)) == Window(0, 38, 30, 60)
    with pytest.raises(ValueError, match="empty"):
        bird_window([500, 50, 30, 20], (30, 60)).cut(picture(60, 30), {})
    for wrong in (lambda: Square(normalize="half"), lambda: CropTrain(crop="middle")):
        with pytest.raises(ValueError, match="use"):
            wrong()


# ---------------------------------------------------------------------- Birds
def birds(root):
    names = ["001.Albatross/a_0001", "002.Crow/b_0002", "002.Crow/b_0003"]
    for number, name in enumerate(names):
        save(picture(seed=number), root / "images" / f"{name}.jpg")
        grey = np.zeros((40, 60), np.uint8)
        grey[10:30, 20:40] = 255
        grey[5:10, 20:40] = 127
        save(grey, root / "segmentations" / f"{name}.png")
    (root / "images.txt").write_text("".join(f"{i} {name}.jpg\n" for i, name in enumerate(names, 1)))
    (root / "bounding_boxes.txt").write_text("".join(f"{i} 20.0 10.0 20.0 20.0\n" for i in (1, 2, 3)))
    (root / "train_val_test_split.txt").write_text("1 0\n2 1\n3 2\n")
    return root


def test_birds_are_cut_out_by_their_boxes(tmp_path):
    root = birds(tmp_path)
    data = Birds(root, "val", transform=Square(30, "none"))
    assert len(data) == 1 and data.describe(0) == root / "images/002.Crow/b_0002.jpg"
    sample = data[0]
    assert sample["sample_id"] == "002.Crow/b_0002"
    # The box's centre is (30, 20) and the half-size 15: a window of 30 x 30 from (15, 5).
    with Image.open(data.describe(0)) as image:
        want = np.asarray(image)[5:35, 15:45].transpose(2, 0, 1)
    assert np.array_equal((255 * sample["image"]).round().numpy(), want)
    assert sample["mask"].shape == (30, 30) and sample["mask"][5:25, 5:25].all()
    assert int(sample["mask"].sum()) == 400  # grey of 127 is background
    assert len(Birds(root, "test")) == 1 and set(Birds(root, "train")[0]) == {"image", "sample_id"}
    assert set(Birds(root, "train", masks=True)[0]) == {"image", "mask", "sample_id"}


def test_grey_masks_may_be_dithered_as_released(tmp_path):
    data = Birds(birds(tmp_path), "val", transform=Square(30, "none"), mask_convert="dither")
    dots = int(data[0]["mask"][:5, 5:25].sum())
    assert 20 < dots < 80  # about half of the 100 grey pixels


def test_lists_of_birds_that_do_not_fit_are_noticed(tmp_path):
    root = birds(tmp_path)
    (root / "bounding_boxes.txt").write_text("1 20 10 20 20\n")
    with pytest.raises(ValueError, match=r"picture 2 of images\.txt"):
        Birds(root, "val")
    (root / "bounding_boxes.txt").write_text("1 20 10 20\n")
    with pytest.raises(ValueError, match=r"bounding_boxes\.txt, line 1"):
        Birds(root, "val")
    (root / "bounding_boxes.txt").unlink()
    with pytest.raises(MissingDataError, match=r"bounding_boxes\.txt"):
        Birds(root, "val")


# ---------------------------------------------------------------------- Dogs, Cars
def selected(root, lists, trained=20):
    for part, count in (("train", trained), ("test", 2)):
        for i in range(count):
            folder = root / "data_mrcnn" / part / "resized"
            save(picture(8, 8, seed=i), folder / f"{i}_resized.png")
            save(255 * labels([0, 1], 8, 8), folder / f"{i}_maskresized.png")
    np.save(root / lists[0], np.arange(trained))
    np.save(root / lists[1], np.array([1]))
    return root


@pytest.mark.parametrize(
    ("kind", "lists"),
    [
        (Dogs, ("data_tr_sel.npy", "data_te_sel.npy")),
        (Cars, ("data_mrcnn_train_select.npy", "data_mrcnn_test_select.npy")),
    ],
)
def test_dogs_and_cars_take_the_selected_pictures_with_blue_first(tmp_path, kind, lists):
    root = selected(tmp_path, lists)
    test = kind(root, "test", transform=Square(8, "none"))
    assert len(test) == 1 and test[0]["sample_id"] == "1"
    pixels = np.asarray(picture(8, 8, seed=1)).transpose(2, 0, 1)
    assert np.array_equal((255 * test[0]["image"]).round().numpy(), pixels[::-1])
    assert test[0]["mask"].sum() == 32
    upright = kind(root, "test", transform=Square(8, "none"), channel_order="rgb")
    assert np.array_equal((255 * upright[0]["image"]).round().numpy(), pixels)


def test_validation_is_the_training_list_or_held_out(tmp_path):
    root = selected(tmp_path, ("data_tr_sel.npy", "data_te_sel.npy"))
    official = [Dogs(root, split).ids for split in ("train", "val")]
    assert official[0] == official[1] and len(official[0]) == 20
    train, val = (Dogs(root, split, protocol="standard").ids for split in ("train", "val"))
    assert val == ["9", "19"] and sorted(train + val) == sorted(official[0]) and not set(train) & set(val)
    np.save(root / "data_tr_sel.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"data_tr_sel\.npy' cannot be read: it holds float64"):
        Dogs(root)
    (root / "data_tr_sel.npy").write_bytes(b"no array")
    with pytest.raises(OSError, match=r"data_tr_sel\.npy"):
        Dogs(root)
    (root / "data_tr_sel.npy").unlink()
    with pytest.raises(MissingDataError, match=r"data_tr_sel\.npy"):
        Dogs(root)


# ---------------------------------------------------------------------- Flowers
def flowers(root):
    blue = np.zeros((16, 16, 3), np.uint8)
    blue[..., 2] = 254
    blue[4:12, 4:12] = (200, 120, 40)
    blue[0, 0] = (10, 10, 240)  # blue with noise
    for i in range(1, 4):
        save(picture(16, 16, seed=i), root / "jpg" / f"image_{i:05d}.jpg")
        (root / "segmim").mkdir(exist_ok=True)
        # Lossless under the name of the release: the rule is what is tested, not JPEG's noise.
        Image.fromarray(blue).save(root / "segmim" / f"segmim_{i:05d}.jpg", format="png")
    savemat(root / "setid.mat", {"trnid": [[3]], "valid": [[2]], "tstid": [[1]]})
    return root


def test_flowers_are_trained_on_the_test_list_and_cut_from_blue(tmp_path):
    root = flowers(tmp_path)
    names = [Flowers(root, split)[0]["sample_id"] for split in ("train", "val", "test")]
    assert names == ["image_00001", "image_00002", "image_00003"]
    exact = Flowers(root, "val", transform=Square(16))[0]["mask"]
    assert exact[4:12, 4:12].all() and int(exact.sum()) == 65  # the noisy pixel counts as flower
    tolerant = Flowers(root, "val", transform=Square(16), flowers_mask="tolerant")[0]["mask"]
    assert tolerant[4:12, 4:12].all() and int(tolerant.sum()) == 64
    (root / "setid.mat").write_bytes(b"not a list")
    with pytest.raises(OSError, match=r"setid\.mat"):
        Flowers(root)


# ---------------------------------------------------------------------- VOC
def voc(root, layout="VOCdevkit"):
    base = root / "VOCdevkit" / "VOC2012" if layout == "VOCdevkit" else root / "VOCSegmentation"
    images, lists = ("JPEGImages", "ImageSets/Segmentation") if layout == "VOCdevkit" else ("images", "sets")
    classes, objects = labels([0, 15, 15, 255, 7, 0]), labels([0, 1, 2, 255, 3, 0])
    for name in ("2007_000001", "2007_000002"):
        save(picture(), base / images / f"{name}.jpg")
        save(classes, base / "SegmentationClass" / f"{name}.png", palette=True)
        save(classes, base / "SegmentationClassAug" / f"{name}.png")
        if layout == "VOCdevkit":
            save(objects, base / "SegmentationObject" / f"{name}.png", palette=True)
    (base / lists).mkdir(parents=True)
    (base / lists / "trainaug.txt").write_text("2007_000001\n")
    (base / lists / "val.txt").write_text("2007_000002\n")
    return root


@pytest.mark.parametrize("layout", ["VOCdevkit", "released"])
def test_voc_in_both_layouts_under_the_official_protocol(tmp_path, layout):
    root = voc(tmp_path, layout)
    sample = VOC(root, "val", protocol="official")[0]
    assert set(sample) == {"image", "mask", "sample_id"} and sample["sample_id"] == "2007_000002"
    assert sample["image"].shape == (3, 320, 320)
    assert sample["mask"].unique().tolist() == [0, 7, 15, 255]  # void stays an object, as in the released chain
    trained = VOC(root, "trainaug", transform=CropTrain(40, 32))
    assert len(trained) == 1 and set(trained[0]) == {"image", "sample_id"}
    (folder,) = {path.parent for path in root.rglob("2007_000002.jpg")}
    assert VOC(folder.parent, "val", protocol="official").describe(0) == folder / "2007_000002.jpg"


def test_voc_under_the_standard_protocol_has_instances_classes_and_void(tmp_path):
    root = voc(tmp_path)
    assert VOC(root, "val")[0]["mask"].shape == (320, 320)
    sample = VOC(root, "val", transform=Square(60))[0]
    assert sample["void"].dtype == torch.bool
    assert torch.equal(sample["void"], sample["classes"] == 255)
    kept = ~sample["void"]
    assert sample["mask"][kept].unique().tolist() == [0, 1, 2, 3]
    assert {(int(m), int(c)) for m, c in zip(sample["mask"][kept], sample["classes"][kept], strict=True)} == {
        (0, 0),
        (1, 15),
        (2, 15),
        (3, 7),
    }


def test_voc_without_instances_or_lists_says_so(tmp_path):
    root = voc(tmp_path, "released")
    with pytest.raises(MissingDataError, match=r"SegmentationObject.*protocol=standard"):
        VOC(root, "val")
    with pytest.raises(MissingDataError, match=r"train\.txt"):
        VOC(root, "train")
    with pytest.raises(MissingDataError, match="not laid out"):
        VOC(tmp_path / "VOCSegmentation" / "images", "val")
    save(labels([0], 8, 8), root / "VOCSegmentation/SegmentationClass/2007_000002.png")
    with pytest.raises(ValueError, match=r"2007_000002\.png is 8 x 8, its picture 60 x 40"):
        VOC(root, "val", protocol="official")[0]


# ---------------------------------------------------------------------- COCO
def coco(root):
    from pycocotools import mask as coding

    square = [[10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]]
    over = [[25.0, 10.0, 45.0, 10.0, 45.0, 30.0, 25.0, 30.0]]
    crowd = np.zeros((40, 60), np.uint8, order="F")
    crowd[:, 50:] = 1
    runs = coding.encode(crowd)
    counts = coding.frPyObjects({"size": [40, 60], "counts": [0, 2400]}, 40, 60)
    assert counts["size"] == [40, 60]
    uncompressed = {"size": [40, 60], "counts": [2000, 400]}  # the last ten columns
    annotations = [
        {"id": 7, "image_id": 9, "category_id": 18, "iscrowd": 0, "segmentation": square},
        {"id": 3, "image_id": 9, "category_id": 1, "iscrowd": 0, "segmentation": over},
        {"id": 5, "image_id": 9, "category_id": 1, "iscrowd": 1, "segmentation": uncompressed},
        {
            "id": 6,
            "image_id": 4,
            "category_id": 1,
            "iscrowd": 0,
            "segmentation": {"size": [40, 60], "counts": runs["counts"].decode()},
        },
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 60, "height": 40} for i in (9, 4, 2)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        for i in (9, 4, 2):
            save(picture(seed=i), root / f"{split}2017" / f"{i:012d}.jpg")
    return root


def test_coco_instances_with_crowds_and_overlaps_as_void(tmp_path):
    data = COCO(coco(tmp_path), "val", transform=StandardEval(40))
    assert len(data) == 3 and [data[i]["sample_id"] for i in range(3)] == [f"{i:012d}" for i in (9, 4, 2)]
    sample = data[0]  # the middle 40 of 60 columns: from column 10 on
    mask, void = sample["mask"], sample["void"]
    assert mask[20, 5] == 1 and sample["classes"][20, 5] == 2  # the dog is the second category of the file
    assert mask[20, 30] == 2 and sample["classes"][20, 30] == 1
    assert void[20, 17] and not void[20, 5] and not void[20, 30] and void[5, 10:].sum() == 0
    assert not mask[5].any()
    assert data[2]["mask"].eq(0).all() and not data[2]["void"].any()
    wide = COCO(tmp_path, "val", transform=Square(60, "none"))[0]
    assert wide["void"][:, 50:].all() and wide["void"][20 * 60 // 40, 25:30].all()


def test_coco_labels_as_released_lose_the_first_object_and_add_up(tmp_path):
    sample = COCO(coco(tmp_path), "val", transform=Square(60, "none"), protocol="official")[0]
    assert set(sample) == {"image", "mask", "sample_id"}
    row = sample["mask"][30]
    assert row[15] == 0  # annotation 0 is background
    assert row[27] == 1 and row[40] == 1  # 0 + 1 where it overlaps the second
    assert row[55] == 2  # the crowd is one more object
    only = COCO(tmp_path, "val", transform=Square(60, "none"), protocol="official")[1]
    assert not only["mask"].any()
    assert COCO(tmp_path, "val", protocol="official")[0]["image"].shape == (3, 320, 320)


def test_coco_skips_what_is_no_mask_and_names_what_is_broken(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("slot_walks.data.coco.print_log", lambda text, logger, level: lines.append(text))
    place = coco(tmp_path) / "annotations/instances_val2017.json"
    sound = json.loads(place.read_text())
    first = sound["annotations"][0]

    def read(annotations, **changes):
        place.write_text(json.dumps({**sound, "annotations": annotations, **changes}))
        return COCO(tmp_path, "val", transform=Square(60, "none"))

    want = read(sound["annotations"])[0]
    assert not lines
    bad = [[], [[10.0, 10.0, 30.0, 30.0]], None, {"size": [40, 60]}]
    skipped = [{**first, "id": 20 + i, "segmentation": form} for i, form in enumerate(bad)]
    skipped += [{"id": 30, "image_id": 9, "category_id": 1}, {**first, "id": 31, "bbox": [10, 10, 0, 20]}]
    found = read([*skipped, *sound["annotations"]])[0]
    assert all(torch.equal(found[key], want[key]) for key in ("mask", "classes", "void"))
    assert len(lines) == 1 and f"{place}: of 10 annotations are skipped: 6 without a mask" in lines[0]
    for changes, what in (
        ({"category_id": 5}, r"annotations\[0\] is of category 5, .*\(annotation 7 of image 9\)"),
        ({"image_id": 5}, r"annotations\[0\] belongs to image 5"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"run lengths of \[9, 9\], its image .*\(annotation 7 of"),
    ):
        with pytest.raises(DataFileError, match=what):
            read([{**first, **changes}])
    with pytest.raises(MissingDataError, match=r"instances_val2017\.json' has no annotation with a mask"):
        read(skipped)
    with pytest.raises(MissingDataError, match="lists no image"):
        read([], images=[])
    place.write_text(json.dumps({key: sound[key] for key in ("images", "categories")}))
    assert COCO(tmp_path, "val", masks=False)[0].keys() == {"image", "sample_id"}
    with pytest.raises(MissingDataError, match="has no annotation with a mask"):
        COCO(tmp_path, "val")


def test_coco_masks_and_turned_pictures_agree(tmp_path):
    data = COCO(
        coco(tmp_path), "val", transform=lambda image, maps: (image, {k: torch.tensor(v) for k, v in maps.items()})
    )
    exif = Image.Exif()
    exif[274] = 6
    picture(seed=9).save(data.describe(0), exif=exif)
    assert data[0]["image"].size == (60, 40) and data[0]["mask"].shape == (40, 60)
    data.sizes[0], data.annotations[0] = (40, 60), data.annotations[0][:2]  # polygons, which fit any size
    assert data[0]["image"].size == (40, 60) and data[0]["mask"].shape == (60, 40)
    data.sizes[0] = (41, 60)
    with pytest.raises(DataFileError, match=r"000000000009\.jpg' is 40 x 60, in the annotation file 41 x 60"):
        data[0]


def test_coco_trains_on_the_middle_of_pictures_without_reading_masks(tmp_path):
    data = COCO(coco(tmp_path), "train")
    assert set(data[0]) == {"image", "sample_id"} and data[0]["image"].shape == (3, 224, 224)
    assert data.transform == CropTrain(crop="center") and data.annotations == []
    (tmp_path / "annotations/instances_train2017.json").write_text('{"images": []}')
    with pytest.raises(OSError, match=r"instances_train2017\.json' lacks annotations, categories"):
        COCO(tmp_path)
    (tmp_path / "annotations/instances_train2017.json").unlink()
    with pytest.raises(MissingDataError, match=r"instances_train2017\.json"):
        COCO(tmp_path)


# ---------------------------------------------------------------------- COCO-Stuff
def test_coarse_classes_cover_all_labels_of_the_files():
    table = coarse_labels()
    assert sorted(set(table[:182].tolist())) == list(range(27)) and (table[182:] == 255).all()
    names = {fine: COCOSTUFF27[table[fine]] for fine in (0, 2, 16, 105, 123, 153, 156, 177, 181)}
    assert names == {
        0: "person",
        2: "vehicle",
        16: "animal",
        105: "sky",
        123: "plant",
        153: "ground",
        156: "sky",
        177: "water",
        181: "solid",
    }
    few = coarse_labels(3)
    assert [int(few[fine]) for fine in (105, 123, 153, 0)] == [0, 1, 2, 255]
    with pytest.raises(ValueError, match="not 12"):
        coarse_labels(12)


def test_cocostuff_reads_the_curated_list(tmp_path):
    for name in ("000000000009", "000000000025"):
        save(picture(), tmp_path / "images/val2017" / f"{name}.jpg")
        save(labels([0, 105, 255, 153]), tmp_path / "annotations/val2017" / f"{name}.png")
    curated = tmp_path / "curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"
    curated.parent.mkdir(parents=True)
    curated.write_text("000000000025\n")
    data = COCOStuff(tmp_path, "val", transform=Square(60, "none"))
    assert len(data) == 1 and data[0]["sample_id"] == "000000000025"
    assert data[0]["mask"][0, ::15].tolist() == [9, 23, 255, 21]
    assert len(COCOStuff(tmp_path, "val", list_file=None)) == 2
    assert COCOStuff(tmp_path, "val", num_classes=3, transform=Square(60))[0]["mask"].unique().tolist() == [0, 2, 255]
    with pytest.raises(MissingDataError, match="Few_Stuff"):
        COCOStuff(tmp_path, "val", list_file="Coco164kFew_Stuff_6.txt")


# ---------------------------------------------------------------------- MOVi
def movi(root, clips=3, frames=12):
    for split in ("train", "validation"):
        for clip in range(clips):
            for frame in range(frames):
                place = f"{clip:05d}/{frame:05d}"
                save(picture(32, 32, seed=frame), root / "C" / split / "rgb" / f"{place}.jpg")
                save(labels([0, 1, 3], 32, 32), root / "C" / split / "seg" / f"{place}.png", palette=frame % 2 == 0)
    return root


def test_movi_trains_on_nine_frames_and_evaluates_all(tmp_path):
    root = movi(tmp_path)
    train = MOVi(root, "C", "train", transform=CropTrain(None, 24))
    assert len(train) == 27 and set(train[0]) == {"image", "sample_id"}
    assert train.frames == MOVi(root, "C", "train").frames != MOVi(root, "C", "train", seed=1).frames
    chosen = {clip: [f for f in train.frames if f.startswith(clip)] for clip in ("00000", "00001")}
    assert all(len(set(frames)) == 9 for frames in chosen.values())
    assert [f[5:] for f in chosen["00000"]] != [f[5:] for f in chosen["00001"]]
    val = MOVi(root, "C", "validation")
    assert len(val) == 36 and val[0]["image"].shape == (3, 128, 128)
    for index in (0, 1):  # a palette or grey values: the same numbers
        assert val[index]["mask"][0, ::50].tolist() == [0, 1, 3]
    assert val[13]["sample_id"] == "00001/00001"
    assert len(MOVi(root, "C", "validation", frames=2)) == 6
    with pytest.raises(MissingDataError, match="MOVi-E"):
        MOVi(root, "E", "validation")
    assert chosen_frames(["a", "b"], 9, "clip", 0) == ["a", "b"]


# ---------------------------------------------------------------------- errors of all
MAKERS = {
    "birds": (birds, lambda root, **kw: Birds(root, "val", **kw), "segmentations/002.Crow/b_0002.png"),
    "dogs": (
        lambda root: selected(root, ("data_tr_sel.npy", "data_te_sel.npy")),
        lambda root, **kw: Dogs(root, "val", **kw),
        "data_mrcnn/train/resized/3_maskresized.png",
    ),
    "flowers": (flowers, lambda root, **kw: Flowers(root, "val", **kw), "segmim/segmim_00002.jpg"),
    "voc": (voc, lambda root, **kw: VOC(root, "val", **kw), "VOCdevkit/VOC2012/SegmentationObject/2007_000002.png"),
    "coco": (coco, lambda root, **kw: COCO(root, "val", **kw), "val2017/000000000004.jpg"),
    "movi": (movi, lambda root, **kw: MOVi(root, "C", "validation", **kw), "C/validation/seg/00001/00002.png"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_broken_files_are_named_or_passed_over(tmp_path, name):
    make, read, path = MAKERS[name]
    data = read(make(tmp_path), transform=Square(16))
    (tmp_path / path).write_bytes((tmp_path / path).read_bytes()[:40])

    def samples(on_error):
        config = {"dataset": data, "batch_size": 2, "num_workers": 0, "on_error": on_error}
        found, faults = [], []
        for batch in build_loader(config, seed=0, training=False):
            faults += batch.errors
            found += batch.data["sample_id"] if batch.data else []
        return found, faults

    with pytest.raises(RuntimeError, match=path.rsplit("/", 1)[1].replace(".", r"\.")):
        samples("raise")
    found, faults = samples("skip")
    assert len(faults) == 1 and len(found) == len(data) - 1 == len(set(found))
    assert path.rsplit("/", 1)[1] in str(faults[0])


@pytest.mark.parametrize("kind", [Birds, Dogs, Cars, Flowers, VOC, COCO, COCOStuff, MOVi])
def test_missing_roots_name_key_layout_and_remedy(tmp_path, kind):
    with pytest.raises(MissingDataError) as caught:
        kind(tmp_path / "nowhere")
    text = str(caught.value)
    assert "dataset.root" in text and "laid out as" in text and "prepare  " in text and "nowhere" in text
    with pytest.raises(MissingDataError, match="no folder is configured"):
        kind()
    with pytest.raises(ValueError, match=r"no split|use C or E"):
        kind(tmp_path, split="everything")


def test_labels_keep_their_numbers_whatever_the_file(tmp_path):
    values = labels([0, 7, 255])
    save(values, tmp_path / "grey.png")
    save(values, tmp_path / "palette.png", palette=True)
    Image.fromarray(values.astype(np.uint16) * 100).save(tmp_path / "deep.png")
    assert np.array_equal(load_labels(tmp_path / "grey.png"), values)
    assert np.array_equal(load_labels(tmp_path / "palette.png"), values)
    assert np.array_equal(load_labels(tmp_path / "deep.png"), values.astype(int) * 100)
    save(picture(), tmp_path / "colour.png")
    with pytest.raises(OSError, match=r"colour\.png.*RGB"):
        load_labels(tmp_path / "colour.png")
    with pytest.raises(FileNotFoundError):
        load_labels(tmp_path / "none.png")
    assert load_foreground(tmp_path / "grey.png").max() == 1


def test_foregrounds_are_read_from_every_kind_of_grey(tmp_path):
    values = labels([0, 255])
    save(values, tmp_path / "grey.png")
    save(values // 255, tmp_path / "numbers.png")
    Image.fromarray(values.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(values > 0).save(tmp_path / "bits.png")
    for name in ("grey", "numbers", "deep", "bits"):
        assert np.array_equal(load_foreground(tmp_path / f"{name}.png"), values // 255), name
    save(labels([0, 1]), tmp_path / "colours.png", palette=True)
    with pytest.raises(DataFileError, match=r"colours\.png' is a picture of colours"):
        load_foreground(tmp_path / "colours.png")


def test_a_turned_picture_stands_as_its_masks_do(tmp_path):
    data = VOC(
        voc(tmp_path), "val", transform=lambda image, maps: (image, {k: torch.tensor(v) for k, v in maps.items()})
    )
    file, exif = data.describe(0), Image.Exif()
    exif[274] = 6
    with Image.open(file) as image:
        size = image.size
        image.save(file, exif=exif)
    assert size[0] != size[1] and data[0]["image"].size == size  # masks of the stored pixels
    for folder in (data.class_folder, data.object_folder):
        with Image.open(folder / f"{data.names[0]}.png") as mask:
            mask.save(folder / f"{data.names[0]}.png", exif=exif)
    assert data[0]["image"].size == size[::-1] and data[0]["mask"].shape == size
