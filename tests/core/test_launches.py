"""What a step makes a GPU do outside of the models' forwards, and that this stays so."""

import pytest
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.observe import StepCounts
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.target_walk import AcceptedPaths, walk_target
from vllm_treespec.testing.launches import Launches
from vllm_treespec.testing.no_sync import NoSync

CPU = torch.device("cpu")
KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)
NUM_NODES, MAX_LEN = 7, 400


class Decoding:
    """Two requests whose candidates are on the device already, as those of recycle."""

    def __init__(self, launches, num_proposers):
        self.launches, self.kernels = launches, launches.wrap(KERNELS)
        self.num_proposers = num_proposers
        self.trees = TreeBuffers.allocate(3, NUM_NODES + 1, CPU)
        self.paths = AcceptedPaths.allocate(3, NUM_NODES + 1, CPU)
        self.builder = TreeBuilder(
            self.kernels,
            self.trees,
            num_proposers=num_proposers,
            max_candidates=NUM_NODES,
        )
        candidates = self.builder.candidates
        candidates.token_ids[:] = torch.arange(NUM_NODES)
        candidates.parents[:] = torch.arange(NUM_NODES) - 1
        candidates.scores[:] = -torch.arange(NUM_NODES).float()
        candidates.num_candidates[:] = NUM_NODES
        self.slots = torch.tensor([2, 0])
        self.cu_num_logits = torch.tensor([0, 8, 16]).int()
        self.target_ids = torch.zeros(16, dtype=torch.int64)
        self.texts = torch.zeros(3, MAX_LEN).int()
        self.num_tokens = torch.full((3,), 9).int()
        self.max_nodes = torch.full((3,), NUM_NODES).int()
        self.chain_only = torch.zeros(3).int()

    def step(self):
        launches, slots = self.launches, self.slots
        counts = StepCounts.allocate(len(slots), self.num_proposers, CPU)
        with launches.during("verify"):
            _, num_sampled = walk_target(
                self.kernels,
                self.trees,
                self.paths,
                slots,
                self.cu_num_logits,
                self.target_ids,
                counts.counts,
            )
        with launches.during("observe"):
            counts.to_host()
        self.num_tokens[slots] += num_sampled
        with launches.during("learn"):
            self.builder.learn(slots, num_sampled, self.texts, self.num_tokens)
        with launches.during("build"):
            self.builder.build(
                slots,
                num_sampled,
                self.max_nodes,
                self.chain_only,
                num_nodes=NUM_NODES,
            )


@pytest.mark.parametrize("num_proposers", [1, 3])
def test_a_step_is_eight_launches(num_proposers):
    launches = Launches()
    decoding = Decoding(launches, num_proposers)
    with torch.inference_mode(), launches:
        decoding.step()
    assert {phase: dict(names) for phase, names in launches.names.items()} == {
        "verify": {"walk_tree": 1},
        "observe": {"copy_": 1},
        "learn": {"tally_candidates": 1, "learn_mixture": 1},
        "build": {
            "merge_candidates": 1,
            "rate_candidates": 1,
            "select_nodes": 1,
            "ancestor_mask": 1,
        },
    }


@pytest.mark.parametrize("inference", [False, True])
def test_only_what_runs_on_the_device_is_counted(inference):
    launches, tensor = Launches(), torch.arange(12)
    with torch.inference_mode(inference), launches:
        tensor += 1  # in no phase
        with launches.during("idle"):
            _ = (
                torch.empty_like(tensor)
                .view(3, 4)[1:]
                .T.reshape(4, 2, 1)
                .expand(4, 2, 5)
            )
        with launches.during("busy"):
            _ = tensor.diff()
            with launches.during("inner"):
                tensor.zero_()
            _ = tensor.long().float()
    assert launches["idle"] == 0
    assert dict(launches.names["busy"]) == {"sub": 1, "_to_copy": 1}
    assert dict(launches.names["inner"]) == {"zero_": 1}


def test_torchs_own_watch_for_waits_is_on_inside_and_as_before_outside(monkeypatch):
    modes, tensor = ["warn"], torch.arange(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with torch.inference_mode(), NoSync():
        _ = tensor + 1
        assert modes[-1] == "error"
        with pytest.raises(AssertionError, match="waits for the device"):
            tensor[0].item()
        assert modes[-1] == "error"
    assert modes[-1] == "warn"
