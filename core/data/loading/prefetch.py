"""Batches travel to the device while the step before them runs."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from core.data.loading import tree
from core.data.loading.batch import LoadedBatch


class CudaTransfer:
    """Copies on a stream of its own; the consumer's stream waits for the copy, the host does not.

    Copies overlap with kernels when the batch lies in page-locked memory (the loader's ``pin_memory``).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, data: Any) -> Any:
        """Queue the copies on the side stream."""
        with torch.cuda.stream(self.stream):
            return tree.to_device(data, self.device, non_blocking=True)

    def finish(self, data: Any) -> Any:
        """Let the current stream wait, and tell the allocator that it uses the memory."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for tensor in tree.tensors(data):
            if tensor.is_cuda:
                tensor.record_stream(current)
        return data


class DevicePrefetcher:
    """Iterate ``loader`` with every batch on ``device``: the same batches in the same order on any device.

    On CUDA the copy of batch i + 1 is queued before batch i is handed out, so it runs during step i. Elsewhere, and
    with ``enabled=False``, each batch is moved when it is asked for. An error while batch i + 1 is loaded is raised
    when it is its turn, after batch i.

    Args:
        loader: yields :class:`core.data.LoadedBatch`.
        device: where to.
        enabled: False moves each batch when it is asked for, on CUDA too.
        channels_last: convert images `(B, C, H, W)` to that memory format.
        transfer: in place of CUDA's (another accelerator's), with `start` and `finish`, see `CudaTransfer`.
    """

    def __init__(
        self,
        loader: Iterable[LoadedBatch],
        device: torch.device | str,
        enabled: bool = True,
        channels_last: bool = False,
        transfer: Any = None,
    ) -> None:
        self.loader = loader
        self.device = torch.device(device)
        self.enabled = enabled
        self._format = tree.channels_last if channels_last else lambda batch: batch
        self._transfer = transfer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LoadedBatch]:
        batches = iter(self.loader)
        if self.enabled and (self._transfer is not None or self.device.type == "cuda"):
            return self._ahead(batches)
        return self._plain(batches)

    def _plain(self, batches: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
        for batch in batches:
            yield LoadedBatch(self._format(tree.to_device(batch.data, self.device)), batch.errors)

    def _ahead(self, batches: Iterator[LoadedBatch]) -> Iterator[LoadedBatch]:
        if self._transfer is None:
            self._transfer = CudaTransfer(self.device)
        upcoming, failure = self._load(batches)
        while upcoming is not None:
            batch = LoadedBatch(self._format(self._transfer.finish(upcoming.data)), upcoming.errors)
            # The finished batch waits for its own copy only, since the next one is queued behind that.
            upcoming, failure = self._load(batches)
            yield batch
        if failure is not None:
            raise failure

    def _load(self, batches: Iterator[LoadedBatch]) -> tuple[LoadedBatch | None, Exception | None]:
        try:
            batch = next(batches)
            return LoadedBatch(self._transfer.start(batch.data), batch.errors), None
        except StopIteration:
            return None, None
        except Exception as error:
            return None, error
