"""vLLM's worker, with our speculator in its model runner."""

from __future__ import annotations

from typing import Any

from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.outputs import DraftTokenIds

from vllm_treespec.integration.attention import tree_backend
from vllm_treespec.integration.decode_graphs import choose_decode_graphs
from vllm_treespec.integration.grammar import DraftTrees
from vllm_treespec.integration.layer_skip import LayerSkip
from vllm_treespec.integration.node_rows import follow_paths_in_outputs
from vllm_treespec.integration.reports import ReportedOutput
from vllm_treespec.integration.seams import check_hooks
from vllm_treespec.integration.speculator import TreeSpeculator

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class TreeWorker(PlatformWorker):
    _discarded_weights = False  # by sleep, until they are loaded again

    def init_device(self) -> None:
        check_hooks()
        super().init_device()
        runner = self.model_runner
        runner.speculator = TreeSpeculator(
            self.vllm_config,
            runner.device,
            runner.req_states,
            lambda: choose_decode_graphs(runner.cudagraph_manager, self.vllm_config),
        )
        runner.lora_state = runner.speculator.adapters

    def load_model(self, **options: Any) -> None:
        with tree_backend(self.vllm_config):
            super().load_model(**options)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        runner = self.model_runner
        if runner.aux_output_connector is not None:
            follow_paths_in_outputs(
                runner.aux_output_connector, runner.speculator.paths
            )

    def sleep(self, level: int = 1) -> None:
        super().sleep(level)
        self._discarded_weights = level == 2

    def wake_up(self, tags: list[str] | None = None) -> None:
        # Those that the user had vLLM keep may be newer than the checkpoint's.
        is_kept = any(
            name.startswith("draft.") for name in self._sleep_saved_parameters
        )
        super().wake_up(tags)
        if self._discarded_weights and (tags is None or "weights" in tags):
            self._discarded_weights = False
            if not is_kept:
                self._reload_drafts()

    def reload_weights(
        self, weights_iterator: Any = None, weights_path: Any = None, **options: Any
    ) -> None:
        super().reload_weights(weights_iterator, weights_path, **options)
        if weights_iterator is None and weights_path is None:
            self._reload_drafts()  # others are the target's alone

    def _reload_drafts(self) -> None:
        with set_current_vllm_config(self.vllm_config):
            for draft in self.model_runner.speculator.drafts.with_own_weights:
                draft.reload()

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        pending = self.model_runner.speculator.take_report()
        return output if pending is None else ReportedOutput(output, pending)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts for the scheduler, without the padding behind them, and for grammars
        the trees that they form."""
        drafts = super().take_draft_token_ids()
        if drafts is None:
            return None
        speculator = self.model_runner.speculator
        token_ids = [
            token_ids[: speculator.num_drafts(req_id)]
            for req_id, token_ids in zip(
                drafts.req_ids, drafts.draft_token_ids, strict=True
            )
        ]
        if self.model_runner.draft_tokens_handler.draft_tokens_np is None:
            return DraftTokenIds(drafts.req_ids, token_ids)  # no grammar asks for them
        parents = speculator.parents(drafts.req_ids)
        return DraftTrees(drafts.req_ids, token_ids, parents)

    def treespec_trees(self) -> dict[str, dict[str, Any]]:
        """For ``collective_rpc``: the tree awaiting verification of every request."""
        return self.model_runner.speculator.describe_trees()  # type: ignore[no-any-return]

    def treespec_layer_skip(self, method: str, *arguments: Any) -> Any:
        """For ``collective_rpc``: ask the ``layer_skip`` proposer to do something."""
        drafts = self.model_runner.speculator.drafts.models.values()
        (draft,) = [each for each in drafts if isinstance(each, LayerSkip)]
        return getattr(draft, method)(*arguments)

    def treespec_clear(self) -> None:
        """For ``collective_rpc``: forget all text that proposers have learned from."""
        self.model_runner.speculator.clear()
