"""The abstract methods of a Triton driver, each refusing: nothing is compiled here."""

from typing import Any, NoReturn

from triton.backends.driver import DriverBase


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError("Triton cannot compile for this CPU: set TRITON_INTERPRET=1")


class CPUDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by Triton itself, so a real GPU driver wins

    map_python_to_cpp_type = get_current_target = _refuse
    get_active_torch_device = get_benchmarker = _refuse
