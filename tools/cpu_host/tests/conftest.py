import os
import sys
from pathlib import Path

import pytest

# The tests share host_kernels.py; importlib mode keeps their folder off the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def compiled() -> None:
    import torch

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are not compiled for the host here")
