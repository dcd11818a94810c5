"""Request options that vLLM refuses with speculation, and treespec need not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_treespec.config import METHOD

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def wrap_validate_spec_decode(original: Callable[..., None]) -> Callable[..., None]:
    """Let ``min_p`` and ``logit_bias`` pass, whatever else the original refuses.

    They change one row of logits at a time, and the target samples from such rows.
    """

    @functools.wraps(original)
    def validate(self: SamplingParams, speculative_config: Any) -> None:
        if speculative_config is not None and speculative_config.model == METHOD:
            self = copy.copy(self)
            self.min_p, self.logit_bias = 0.0, None
        original(self, speculative_config)

    return validate
