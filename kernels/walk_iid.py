"""Multi-step rejection sampling over children drawn independently."""

import functools

from vllm_treespec.kernels.residuals import launch
from vllm_treespec.kernels.walk_without_replacement import _walk_down_kernel

walk_iid = functools.partial(launch, _walk_down_kernel, REPLACED=True)
"""As ``walk_without_replacement``, for siblings that were each drawn from all of
``softmax(draft_logits / temperature)`` and may carry the same token."""
