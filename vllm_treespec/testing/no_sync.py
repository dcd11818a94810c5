"""Catches what would make the host wait for a device, on a CPU where nothing does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_treespec.testing.launches import Launches

# Sizes or values that only the device knows.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal")


class NoSync(Launches):  # type: ignore[no-untyped-call]  # torch's
    """Refuses operations that wait for the device: ``with NoSync(): ...``.

    Where there is CUDA, torch's own sync-debug mode refuses them too; elsewhere this is a
    stand-in, which does not see copies to the host, for on a CPU they are none. What
    happens inside the functions of a wrapped ``KernelSet`` is the device's own affair.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self._before: list[int] = []  # torch's mode outside of each entry

    def __enter__(self) -> Any:
        if torch.cuda.is_available():
            self._before.append(torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch's

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]  # torch's
        if self._before:
            torch.cuda.set_sync_debug_mode(self._before.pop())

    def _see(self, func: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        self.num_calls += 1
        name = str(func)
        waits = any(each in name for each in WAITING)
        if name.startswith(("aten.index.", "aten.index_put")):
            masks = (torch.bool, torch.uint8)
            waits |= any(each is not None and each.dtype in masks for each in args[1])
        if name.startswith("aten.copy_."):
            # A number written into one place; ``fill_`` passes it along instead.
            waits |= args[0].dim() == 0 and args[1].dim() == 0
        if name.startswith("aten.repeat_interleave.Tensor"):
            waits |= named.get("output_size") is None
        if waits:
            raise AssertionError(f"{name} waits for the device")
