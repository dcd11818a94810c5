"""What a request may ask of speculation, and what vLLM refuses beside it in vain."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_treespec.config import METHOD, ConfigError
from vllm_treespec.integration.engine_args import from_vllm_config, has_trees

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


def wrap_validate_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse wrong options of ours while the client can still be told."""

    @functools.wraps(original)
    def validate(self: Any, params: Any, supported_tasks: Any) -> Any:
        extra_args = getattr(params, "extra_args", None)
        if extra_args and has_trees(self.vllm_config):
            try:
                from_vllm_config(self.vllm_config).for_request(extra_args)
            except ConfigError as error:
                raise VLLMValidationError(str(error), parameter="extra_args") from error
        return original(self, params, supported_tasks)

    return validate


def wrap_update_after_schedule(original: Callable[..., None]) -> Callable[..., None]:
    """Schedule no more placeholders for drafts than the request takes, and none while
    nobody drafts.

    The synchronous scheduler is handed drafts, which are few enough already.
    """

    @functools.wraps(original)
    def update(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if not has_trees(self.vllm_config):
            return
        rests = vars(self).get("treespec_rests", False)  # as the last report says
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests[req_id]
            limit = 0 if rests else _max_nodes(self, request)
            if len(request.spec_token_ids) > limit:
                # One list serves all requests: make a shorter one.
                request.spec_token_ids = request.spec_token_ids[:limit]

    return update


def _max_nodes(scheduler: Any, request: Any) -> int:
    """The request's own limit, looked up once."""
    if "treespec_max_nodes" not in vars(request):
        params = request.sampling_params
        config = from_vllm_config(scheduler.vllm_config)
        options = config.for_request(params and params.extra_args)
        request.treespec_max_nodes = 0 if not options.proposers else options.max_nodes
    return request.treespec_max_nodes  # type: ignore[no-any-return]
