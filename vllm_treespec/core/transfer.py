"""Between the host and the device, without making one wait for the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def pinned(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The values in host memory from which a copy to the device is not waited for.

    It is allocated anew: an earlier step's copy may still be under way.
    """
    host = torch.from_numpy(values)
    return host if device.type == "cpu" else host.pin_memory()


class HostCopy:
    """A tensor of the device on its way to the host."""

    def __init__(self, source: torch.Tensor) -> None:
        self._copy = source
        if source.device.type != "cpu":
            self._copy = torch.empty_like(source, device="cpu", pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
        self._event = self._record(source.device)

    @property
    def has_arrived(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> npt.NDArray[Any]:
        """The values; waits for the device if they have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        values: npt.NDArray[np.generic] = self._copy.numpy()
        return values

    @staticmethod
    def _record(device: torch.device) -> Any:
        """What tells when the copy is done; None where nothing was copied."""
        if device.type == "cpu":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event
