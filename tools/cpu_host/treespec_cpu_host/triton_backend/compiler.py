"""The abstract methods of a Triton compiler, each refusing: nothing is compiled."""

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError("Triton cannot compile for this CPU: set TRITON_INTERPRET=1")


class CPUBackend(BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return False

    hash = parse_options = add_stages = load_dialects = get_module_map = _refuse
