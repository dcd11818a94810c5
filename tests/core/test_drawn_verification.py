"""core/verify's rules for drawn children, on the trees of a step."""

import pytest
import torch

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.tree import TreeBuffers
from vllm_treespec.core.verify.draws import DrawnRule, Draws
from vllm_treespec.core.verify.multi_step import walk_iid
from vllm_treespec.core.verify.recursive_rejection import walk_without_replacement
from vllm_treespec.core.verify.target_walk import AcceptedPaths
from vllm_treespec.core.verify.traversal import walk_traversal

RULES = (walk_without_replacement, walk_iid, walk_traversal)
CPU = torch.device("cpu")


def step(rule: DrawnRule, kernels: str, drawn: bool) -> tuple[torch.Tensor, ...]:
    """Slot 2's tree, root -- 1: token 3 -- 2: token 4, which the target insists on."""
    trees = TreeBuffers.allocate(4, 3, CPU)
    trees.token_ids[2] = torch.tensor([0, 3, 4])
    trees.parents[2] = torch.tensor([-1, 0, 1])
    trees.num_nodes[2] = 3
    draws = Draws.allocate(4, 3, 6, 5, torch.bfloat16, CPU)
    if drawn:
        draws.drawn[2] = torch.tensor([0, 1, 1])
        draws.sources[2] = torch.tensor([4, 1, -1])
    target_logits = torch.full((3, 5), -torch.inf)
    target_logits[range(3), [3, 4, 1]] = 0.0
    paths = AcceptedPaths.allocate(4, 3, CPU)
    sampled, num_sampled = rule(
        choose_kernels(TreeSpecConfig(kernels=kernels), CPU),
        trees,
        draws,
        paths,
        torch.tensor([2]),
        torch.tensor([0, 3], dtype=torch.int32),
        target_logits,
        torch.tensor([17]),
    )
    return sampled, num_sampled, paths.nodes[:1], paths.lengths[:1]


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "fixed"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kernel)
def test_a_rule_fills_the_paths_as_the_target_walk_does(
    rule: DrawnRule, kernels: str, drawn: bool
):
    sampled, num_sampled, nodes, lengths = step(rule, kernels, drawn)
    assert (sampled.tolist(), num_sampled.tolist()) == ([[3, 4, 1]], [3])
    assert (nodes.tolist(), lengths.tolist()) == ([[0, 1, 2]], [2])


def test_no_node_is_drawn_at_first():
    draws = Draws.allocate(4, 3, 6, 5, torch.float16, CPU)
    assert (draws.drawn == 0).all() and (draws.sources == -1).all()
    assert (draws.temperatures > 0).all(), "they divide"
