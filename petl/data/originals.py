"""The data sets behind VTAB-1k as they were published, with the classes that VTAB-1k derives from them.

Nothing is downloaded: the files have to be there, and the error of missing ones says what to fetch and where to put it.
Images are numbered from 0 in the order of the published files: training before validation before test, and within a
part as its list, or else the sorted names, have them. This is the order that index lists refer to; TensorFlow Datasets,
from which VTAB-1k cut its splits, has another one, so that its numbers have to be translated before they are used here.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.config.files import check_records, read_json, read_lines, reading
from core.data import DataFileError, MissingDataError, load_image, to_pil
from core.data.sources.files import image_files, is_folder, listed
from core.errors import ConfigError, VitrineError


@dataclass
class Original:
    """A published data set: images by number, and their classes `(N,)`.

    Either `files` has a file for every image, or `array` the images themselves, uint8 `(N, H, W)` or `(N, H, W, 3)`.
    """

    what: str
    labels: np.ndarray
    files: Sequence[str] | None = None
    array: np.ndarray | None = None
    read_from: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """An image, RGB, without any loss."""
        return load_image(self.files[index]) if self.files is not None else to_pil(np.array(self.array[index]))

    def source_files(self) -> list[str]:
        """The files that images are read from."""
        return self.read_from if self.files is None else list(self.files)

    def check_labels(self, indices: np.ndarray, labels: np.ndarray, where: str) -> None:
        """Holds the classes of a list of indices against the data set's own.

        Raises:
            DataFileError: one differs; names the first.
        """
        wrong = np.flatnonzero(self.labels[indices] != labels)
        if len(wrong):
            first = wrong[0]
            raise DataFileError(
                f"{where!r} gives image {indices[first]} of {self.what} the class {labels[first]}, the data set "
                f"{self.labels[indices[first]]} ({len(wrong)} of {len(labels)} differ): the list counts images in "
                "another order (petl.data.originals says which is meant), or belongs to another task"
            )


@dataclass(frozen=True)
class Format:
    """How a published data set lies on disk.

    read      from its folder
    layout    the files, below the folder
    download  where they come from
    """

    read: Callable[[Path], Original]
    layout: str
    download: str


def open_original(task: str, root: str | os.PathLike[str] | None) -> Original:
    """The published data set behind a task of VTAB-1k.

    Args:
        task: name in `petl.data.TASKS`.
        root: folder of the data set, laid out as the error of a missing file says.

    Raises:
        ConfigError: its published files are not read here.
        MissingDataError: they are not there; says what to download and where to put it.
        DataFileError: they are broken.
    """
    if task not in FORMATS:
        raise ConfigError(
            f"the published files of {task} are not read here: use NOAH's archive (source: noah_jpeg), or write "
            f"the images yourself as PNG (source: png) or array (source: tensors). Read are {', '.join(FORMATS)}"
        )
    known = FORMATS[task]
    help_text = f"\n  download {known.download}\n  put it   below originals=FOLDER, so that there is\n" + "\n".join(
        f"             FOLDER/{line}" for line in known.layout.splitlines()
    )
    place = None if root is None else Path(root).expanduser()
    if place is None or not place.is_dir():
        missing = "originals is not set" if place is None else f"there is no folder {str(place)!r}"
        raise MissingDataError(f"{task}: {missing}{help_text}")
    try:
        return known.read(place)
    except MissingDataError as error:
        raise MissingDataError(f"{task}: {error}{help_text}") from None


# ---------------------------------------------------------------------- through torchvision
@contextmanager
def _torchvision(what: str) -> Iterator[None]:
    """torchvision's errors as ours; it never downloads here."""
    try:
        yield
    except VitrineError:
        raise
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        text = lines[0].replace("You can use download=True to download it", "").strip()
        raise MissingDataError(f"torchvision's {what} says: {text}") from error
    except Exception as error:
        raise DataFileError(f"{what}: its files are broken ({error}): download them again") from error


def _cifar(root: Path) -> Original:
    from torchvision.datasets import CIFAR100

    with _torchvision("CIFAR100"):
        parts = [CIFAR100(str(root), train=train) for train in (True, False)]
    array = np.concatenate([part.data for part in parts])
    labels = np.concatenate([part.targets for part in parts])
    return Original("CIFAR-100", labels, array=array, read_from=_below(root / "cifar-100-python"))


def _svhn(root: Path) -> Original:
    from torchvision.datasets import SVHN

    with _torchvision("SVHN"):
        parts = [SVHN(str(root), split=split) for split in ("train", "test")]
    array = np.concatenate([part.data.transpose(0, 2, 3, 1) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Original("SVHN", labels, array=array, read_from=[str(root / f"{s}_32x32.mat") for s in ("train", "test")])


def _dtd(root: Path) -> Original:
    from torchvision.datasets import DTD

    with _torchvision("DTD"):
        parts = [DTD(str(root), split=split) for split in ("train", "val", "test")]
    return _of_files("DTD", parts, "_image_files")


def _flowers(root: Path) -> Original:
    from torchvision.datasets import Flowers102

    with _torchvision("Flowers102"):
        parts = [Flowers102(str(root), split=split) for split in ("train", "val", "test")]
    return _of_files("Oxford Flowers 102", parts, "_image_files")


def _pets(root: Path) -> Original:
    from torchvision.datasets import OxfordIIITPet

    with _torchvision("OxfordIIITPet"):
        parts = [OxfordIIITPet(str(root), split=split) for split in ("trainval", "test")]
    return _of_files("Oxford-IIIT Pet", parts, "_images")


def _of_files(what: str, parts: Sequence[Any], files: str) -> Original:
    labels = np.concatenate([np.asarray(part._labels, dtype=np.int64) for part in parts])
    return Original(what, labels, files=[str(file) for part in parts for file in getattr(part, files)])


def _camelyon(root: Path) -> Original:
    from torchvision.datasets import PCAM

    with _torchvision("PCAM"):
        parts = [PCAM(str(root), split=split) for split in ("train", "val", "test")]
        import h5py  # named by torchvision's error where it is absent

        files = {
            kind: [str(part._base_folder / part._FILES[part._split][kind][0]) for part in parts]
            for kind in ("images", "targets")
        }
        labels = []
        for file in files["targets"]:
            with h5py.File(file) as stored:
                labels.append(np.array(stored["y"]).reshape(-1).astype(np.int64))
    rows = _Rows(files["images"], "x", [len(part) for part in labels])
    return Original("PatchCamelyon", np.concatenate(labels), array=rows, read_from=files["images"])


class _Rows:
    """The rows of a data set in several HDF5 files, one after the other, read one at a time.

    Every process opens the files for itself: handles that worker processes inherit share their position.
    """

    def __init__(self, files: Sequence[str], key: str, counts: Sequence[int]) -> None:
        self.files, self.key, self.first = list(files), key, np.cumsum([0, *counts])
        self._opened: dict[tuple[int, int], Any] = {}

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        import h5py

        part = int(np.searchsorted(self.first, index, side="right")) - 1
        place = (os.getpid(), part)
        if place not in self._opened:
            self._opened[place] = h5py.File(self.files[part])
        return self._opened[place][self.key][index - int(self.first[part])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


# ---------------------------------------------------------------------- one folder a class
def _class_folders(what: str, folder: str, key: Callable[[str], str] = str) -> Callable[[Path], Original]:
    """A reader of folders of images, whose sorted names are the classes."""

    def read(root: Path) -> Original:
        names = sorted((entry.name for entry in listed(root / folder) if is_folder(entry)), key=key)
        files, labels = [], []
        for label, name in enumerate(names):
            own = image_files(root / folder / name)
            files += [str(root / folder / name / file) for file in own]
            labels += [label] * len(own)
        if not files:
            raise MissingDataError(f"there is no image below {str(root / folder)!r}")
        return Original(what, np.array(labels), files=files)

    return read


def _sun(root: Path) -> Original:
    folder = root / "SUN397"
    # "/a/abbey": the first letter is a folder of its own.
    classes = [line.strip("/") for _, line in read_lines(folder / "ClassName.txt")]
    files, labels = [], []
    for label, name in enumerate(classes):
        own = image_files(folder / name) if (folder / name).is_dir() else []
        files += [str(folder / name / file) for file in own]
        labels += [label] * len(own)
    if not files:
        raise MissingDataError(f"there is no image below {str(folder)!r}, in the folders that ClassName.txt names")
    return Original("SUN397", np.array(labels), files=files)


# ---------------------------------------------------------------------- scenes and roads
#: Distance of the nearest object to the image's plane, in CLEVR's units: lower bounds of the classes.
_CLEVR_NEAR = np.array([0.0, 8.0, 8.5, 9.0, 9.5, 10.0])
#: Distance of the nearest car, van or truck in metres: lower bounds; the last class is "none".
_KITTI_NEAR = np.array([-100.0, 8.0, 20.0, 999.0])
_KITTI_VEHICLES = ("Car", "Van", "Truck")
_KITTI_DEPTH = 13  # column of the depth in a line of label_2


def _clevr(kind: str) -> Callable[[Path], Original]:
    def read(root: Path) -> Original:
        files, labels = [], []
        for split in ("train", "val"):
            path = root / f"CLEVR_v1.0/scenes/CLEVR_{split}_scenes.json"
            scenes = read_json(path, keys=("scenes",), what="a file of CLEVR's scenes")["scenes"]
            check_records(path, "scenes", scenes, {"image_filename": str, "objects": list})
            for place, scene in enumerate(scenes):
                files.append(str(root / "CLEVR_v1.0/images" / split / scene["image_filename"]))
                try:
                    labels.append(_clevr_class(kind, scene["objects"]))
                except (KeyError, TypeError, ValueError, IndexError) as error:
                    raise DataFileError(
                        f"{str(path)!r}: objects of scenes[{place}] are not CLEVR's ({error!r}): download it again"
                    ) from None
        return Original("CLEVR", np.array(labels), files=files)

    return read


def _clevr_class(kind: str, objects: list[dict[str, Any]]) -> int:
    if kind == "count":
        if not 3 <= len(objects) <= 10:
            raise ValueError(f"{len(objects)} objects, expected 3 to 10")
        return len(objects) - 3
    return _interval(min(thing["pixel_coords"][2] for thing in objects), _CLEVR_NEAR)


def _interval(value: float, bounds: np.ndarray) -> int:
    """The last interval whose lower bound lies below the value, as VTAB-1k counts."""
    return int(np.flatnonzero(bounds < value)[-1])


def _kitti(root: Path) -> Original:
    folder, files, labels = root / "training", [], []
    for name in image_files(folder / "image_2"):
        path = folder / "label_2" / f"{Path(name).stem}.txt"
        depths = [1000.0]  # stands for no vehicle
        for number, line in read_lines(path):
            words = line.split()
            if len(words) < 15:
                raise DataFileError(f"{str(path)!r}, line {number}: {len(words)} words, KITTI's labels have 15")
            if words[0] in _KITTI_VEHICLES:
                with reading(path, "Download the labels again."):
                    depths.append(float(words[_KITTI_DEPTH]))
        files.append(str(folder / "image_2" / name))
        labels.append(_interval(min(depths), _KITTI_NEAR))
    if not files:
        raise MissingDataError(f"there is no image in {str(folder / 'image_2')!r}")
    return Original("KITTI", np.array(labels), files=files)


# ---------------------------------------------------------------------- arrays
_DSPRITES = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


def _dsprites(column: int, values: int) -> Callable[[Path], Original]:
    """A reader of dSprites whose classes group the values of a latent into 16. All images are held in memory (3 GB)."""

    def read(root: Path) -> Original:
        path = root / _DSPRITES
        with reading(path, "Download it again."), np.load(path, allow_pickle=False) as stored:
            images, latents = stored["imgs"], stored["latents_classes"]
        if images.ndim != 3 or latents.shape != (len(images), 6):
            raise DataFileError(f"{str(path)!r} holds images {images.shape} and latents {latents.shape}, not dSprites'")
        labels = latents[:, column].astype(np.int64) * 16 // values
        return Original("dSprites", labels, array=images * np.uint8(255), read_from=[str(path)])

    return read


_NORB = {split: f"smallnorb-5x{files}" for split, files in (
    ("training", "46789x9x18x6x2x96x96-training"), ("testing", "01235x9x18x6x2x96x96-testing"),
)}  # fmt: skip
_NORB_TYPES = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}


def _smallnorb(column: int, step: int) -> Callable[[Path], Original]:
    """A reader of smallNORB, left camera; the class is a column of `info` (elevation 1, azimuth 2) over its step."""

    def read(root: Path) -> Original:
        arrays, labels, files = [], [], []
        for stem in _NORB.values():
            images, path = read_norb(root / f"{stem}-dat.mat"), root / f"{stem}-dat.mat"
            info = read_norb(root / f"{stem}-info.mat")
            if images.ndim != 4 or info.shape != (len(images), 4):
                raise DataFileError(f"{str(path)!r} holds {images.shape}, its info file {info.shape}: not smallNORB's")
            arrays.append(images[:, 0])
            labels.append(info[:, column].astype(np.int64) // step)
            files.append(str(path))
        return Original("smallNORB", np.concatenate(labels), array=np.concatenate(arrays), read_from=files)

    return read


def read_norb(path: Path) -> np.ndarray:
    """A file of smallNORB's own matrix format, plain or as `.mat.gz`.

    Raises:
        MissingDataError: no such file.
        DataFileError: cut off, or of another kind.
    """
    packed = path.with_name(f"{path.name}.gz")
    source = packed if not path.is_file() and packed.is_file() else path
    with reading(source, "Download it again."):
        data = gzip.decompress(source.read_bytes()) if source is packed else source.read_bytes()
        magic, axes = (int(value) for value in np.frombuffer(data[:8], "<i4"))
        if magic not in _NORB_TYPES or not 1 <= axes <= 4:
            raise ValueError("it does not begin as smallNORB's matrices do")
        # At least three sizes are written, whatever the number of axes.
        shape = np.frombuffer(data, "<i4", count=axes, offset=8).tolist()
        begin = 8 + 4 * max(axes, 3)
        values = np.frombuffer(data, _NORB_TYPES[magic], offset=begin)
        if values.size != np.prod(shape):
            raise ValueError(f"{values.size} values for a matrix of {shape}")
        return values.reshape(shape)


def _below(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


_CLEVR = ("CLEVR_v1.0/images/{train,val}/*.png   CLEVR_v1.0/scenes/CLEVR_{train,val}_scenes.json",
          "CLEVR_v1.0.zip of cs.stanford.edu/people/jcjohns/clevr")  # fmt: skip
_SPRITES = (_DSPRITES, "the npz file of github.com/google-deepmind/dsprites-dataset")
_NORB_HELP = ("\n".join(f"{stem}-{kind}.mat   (or .mat.gz)" for stem in _NORB.values() for kind in ("dat", "info")),
              "the dat and info files of cs.nyu.edu/~ylclab/data/norb-v1.0-small")  # fmt: skip

#: Task -> its published files. Not read: diabetic_retinopathy (images are preprocessed first) and dmlab (TFRecords).
FORMATS: dict[str, Format] = {
    "cifar": Format(
        _cifar, "cifar-100-python/train, test, meta", "cifar-100-python.tar.gz of cs.toronto.edu/~kriz/cifar.html"
    ),
    "caltech101": Format(
        # VTAB-1k counts the background as a class, and sorts names without regard to capitals.
        _class_folders("Caltech-101", "caltech101/101_ObjectCategories", str.lower),
        "caltech101/101_ObjectCategories/<class>/*.jpg   (102 folders, BACKGROUND_Google included)",
        "caltech-101.zip of data.caltech.edu/records/mzrjq-6wc02, and 101_ObjectCategories.tar.gz in it",
    ),
    "dtd": Format(_dtd, "dtd/dtd/images, labels", "dtd-r1.0.1.tar.gz of robots.ox.ac.uk/~vgg/data/dtd"),
    "oxford_flowers102": Format(
        _flowers,
        "flowers-102/jpg/*.jpg, imagelabels.mat, setid.mat",
        "102flowers.tgz, imagelabels.mat and setid.mat of robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "oxford_iiit_pet": Format(
        _pets,
        "oxford-iiit-pet/images/*.jpg\noxford-iiit-pet/annotations/trainval.txt, test.txt",
        "images.tar.gz and annotations.tar.gz of robots.ox.ac.uk/~vgg/data/pets",
    ),
    "svhn": Format(
        _svhn, "train_32x32.mat, test_32x32.mat", "both files (cropped digits) of ufldl.stanford.edu/housenumbers"
    ),
    "sun397": Format(
        _sun,
        "SUN397/ClassName.txt\nSUN397/a/abbey/sun_*.jpg ...",
        "SUN397.tar.gz of vision.princeton.edu/projects/2010/SUN",
    ),
    "patch_camelyon": Format(
        _camelyon,
        "pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5   (pip install h5py)",
        "the six h5.gz files of github.com/basveeling/pcam, unpacked",
    ),
    "eurosat": Format(
        _class_folders("EuroSAT", "eurosat/2750"), "eurosat/2750/<class>/*.jpg   (10 folders)", "EuroSAT.zip (RGB)"
    ),
    "resisc45": Format(
        _class_folders("RESISC45", "NWPU-RESISC45"), "NWPU-RESISC45/<class>/*.jpg   (45 folders)", "NWPU-RESISC45.rar"
    ),
    "clevr_count": Format(_clevr("count"), *_CLEVR),
    "clevr_dist": Format(_clevr("dist"), *_CLEVR),
    "kitti": Format(
        _kitti,
        "training/image_2/*.png\ntraining/label_2/*.txt",
        "data_object_image_2.zip and data_object_label_2.zip of cvlibs.net/datasets/kitti",
    ),
    "dsprites_loc": Format(_dsprites(4, 32), *_SPRITES),
    "dsprites_ori": Format(_dsprites(3, 40), *_SPRITES),
    "smallnorb_azi": Format(_smallnorb(2, 2), *_NORB_HELP),
    "smallnorb_ele": Format(_smallnorb(1, 1), *_NORB_HELP),
}
