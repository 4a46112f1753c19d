"""A loader that knows how long it was waited for."""

import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from gptlab.data.batches import Batch


class TimedLoader(DataLoader[Batch]):
    """torch's loader of micro-batches.

    Attributes:
        waited: Seconds in which whoever asked for a micro-batch did not have it yet, since the beginning.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        begun = time.perf_counter()
        for batch in super().__iter__():
            self.waited += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()
