"""A dataset whose samples are made under their own seed, and what becomes of broken samples."""

import traceback
from collections.abc import Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch.utils.data import Dataset, get_worker_info

from core.data.errors import SampleError, SampleFault
from core.data.loading.batch import Fetched
from core.data.loading.sampling import Draw
from core.data.loading.seeds import derive_seed, preserved_random_state, seed_sample

# Keeps evaluation seeds apart from those of training draws, which have three parts.
_EVALUATION = 0


class SeededDataset(Dataset):
    """``dataset`` with every sample made under the seed of its draw.

    Before ``dataset[index]`` the global generators of ``random``, numpy and torch (CPU) are seeded from
    :class:`Draw`'s seed, so augmentation depends neither on the worker nor on what the worker did before. In the
    main process their state is given back afterwards: a run with ``num_workers=0`` then draws the same dropout masks
    as one with workers. A plain index is not reseeded in training, and gets a seed made from the index in evaluation,
    which makes evaluation repeatable.

    Attributes of the inner dataset (``metainfo``, ``classes``, ``get_data_info``, ...) are read and
    set through this one.

    Args:
        dataset: map-style.
        on_error: ``"raise"`` a SampleError for a sample that cannot be made (one that is None or empty is none), or
            ``"skip"`` it: in training the next index takes its place under the same seed, in evaluation it is left
            out. Skipped samples travel with their batch as :class:`SampleFault`.
        training: see above.
        max_substitutes: broken samples in a row that training passes over before it raises after all.
    """

    def __init__(
        self,
        dataset: Dataset,
        on_error: Literal["raise", "skip"] = "raise",
        training: bool = True,
        max_substitutes: int = 16,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} is not map-style: samples are drawn by index, so a dataset needs "
                "__len__ and __getitem__ (for tar shards see core.data.TarShards)"
            )
        self.on_error = on_error
        self.training = training
        self.max_substitutes = max_substitutes
        self.dataset = dataset  # last: from here on, what is set of the data set's goes there

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Special methods are never forwarded: the loader would take the inner dataset's batched access for ours.
        if name == "dataset" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # mmdet's hooks give a loader's data set another pipeline while the run goes on
        inner = vars(self).get("dataset")
        mine = name in vars(self) or not hasattr(inner, name)
        super().__setattr__(name, value) if mine else setattr(inner, name, value)

    def __getitem__(self, index: int) -> Any:
        """The sample (training: or its substitute); SampleError for one that evaluation would leave out."""
        fetched = self.fetch(index)
        if fetched.sample is None:
            raise SampleError(str(fetched.errors[0]))
        return fetched.sample

    def __getitems__(self, indices: Sequence[int]) -> list[Fetched]:
        # torch's loader asks for a batch through this method.
        fetched: list[Fetched] = []
        with self._aside(indices):
            for index in indices:
                try:
                    fetched.append(self._fetch(index))
                except SampleError as error:
                    # What led to it does not survive the way to the main process, its text does.
                    error.add_note(traceback.format_exc())
                    return [Fetched(None, [], error)]
        return fetched

    def fetch(self, index: int) -> Fetched:
        """The sample of ``index`` with what was passed over to get it."""
        with self._aside([index]):
            return self._fetch(index)

    def _aside(self, indices: Sequence[int]) -> AbstractContextManager[None]:
        """Keeps the seeding of samples from the main process's own random states (once per batch: it takes a while)."""
        seeded = not self.training or any(isinstance(index, Draw) for index in indices)
        return preserved_random_state() if seeded and get_worker_info() is None else nullcontext()

    def _fetch(self, index: int) -> Fetched:
        errors: list[SampleFault] = []
        candidate = int(index)
        while True:
            try:
                return Fetched(self._make(candidate, index), errors)
            except (MemoryError, SampleError):
                raise
            except Exception as error:
                fault = self._fault(candidate, error)
                if self.on_error == "raise":
                    raise SampleError(str(fault)) from error
                if not self.training:
                    return Fetched(None, [fault])
                if len(errors) >= min(self.max_substitutes, len(self) - 1):
                    raise SampleError(
                        f"{len(errors) + 1} samples in a row cannot be read, which is more than on_error: skip "
                        f"passes over; the last: {fault}"
                    ) from error
                candidate = (candidate + 1) % len(self)
                errors.append(SampleFault(fault.dataset, fault.index, fault.path, fault.message, candidate))

    def _make(self, candidate: int, index: int) -> Any:
        seed = index.seed if isinstance(index, Draw) else None
        if seed is None and not self.training:
            seed = derive_seed(_EVALUATION, candidate)
        if seed is not None:
            seed_sample(seed)
        sample = self.dataset[candidate]
        if sample is None or (isinstance(sample, Mapping | list | tuple) and not len(sample)):
            raise ValueError(
                f"__getitem__ returned {sample!r}, which is not a sample (raise an error where one cannot be made; "
                "on_error: skip leaves out and counts those that are known to be broken)"
            )
        return sample

    def _fault(self, index: int, error: Exception) -> SampleFault:
        message = f"{type(error).__name__}: {error}".strip().removesuffix(":")
        return SampleFault(type(self.dataset).__name__, index, self._path(index, error), message)

    def _path(self, index: int, error: Exception) -> str | None:
        if hasattr(self.dataset, "describe"):
            return str(self.dataset.describe(index))
        if getattr(error, "filename", None):
            return str(error.filename)
        if hasattr(self.dataset, "get_data_info"):
            info = self.dataset.get_data_info(index)
            return info.get("img_path") or info.get("video_path")
        return None
