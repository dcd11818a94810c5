"""python benchmarks/bench_build.py"""

import sys
from typing import NamedTuple

import torch

from vllm_treespec.kernels.ancestor_mask import ancestor_mask
from vllm_treespec.kernels.bins import NUM_COMPANIES, NUM_RANKS
from vllm_treespec.kernels.count_step import count_step
from vllm_treespec.kernels.learn_mixture import learn_mixture
from vllm_treespec.kernels.merge_candidates import merge_candidates
from vllm_treespec.kernels.mixing import NUM_REMEMBERED, NUM_SUMS
from vllm_treespec.kernels.rate_candidates import rate_candidates
from vllm_treespec.kernels.reference.ancestor_mask import (
    ancestor_mask as ancestor_mask_reference,
)
from vllm_treespec.kernels.reference.count_step import (
    count_step as count_step_reference,
)
from vllm_treespec.kernels.reference.learn_mixture import (
    learn_mixture as learn_mixture_reference,
)
from vllm_treespec.kernels.reference.merge_candidates import (
    merge_candidates as merge_candidates_reference,
)
from vllm_treespec.kernels.reference.rate_candidates import (
    rate_candidates as rate_candidates_reference,
)
from vllm_treespec.kernels.reference.select_nodes import (
    select_nodes as select_nodes_reference,
)
from vllm_treespec.kernels.reference.tally_candidates import (
    tally_candidates as tally_candidates_reference,
)
from vllm_treespec.kernels.reference.walk_tree import walk_tree as walk_tree_reference
from vllm_treespec.kernels.select_nodes import select_nodes
from vllm_treespec.kernels.tally_candidates import tally_candidates
from vllm_treespec.kernels.walk_tree import walk_tree
from vllm_treespec.testing.bench import median_us, print_table
from vllm_treespec.testing.trees import chain_parents, random_parents

NUM_PROPOSERS = 2
VOCAB_SIZE = 4  # few tokens, so that proposers agree and walks go deep

Arguments = tuple[torch.Tensor | int | None, ...]


class Row(NamedTuple):
    reqs: int
    drafts: int
    shape: str
    merge_us: float
    rate_us: float
    select_us: float
    mask_us: float
    walk_us: float
    count_us: float
    tally_us: float
    learn_us: float


class Step(NamedTuple):
    """What every stage reads and writes; a stage's outputs are the next one's inputs."""

    merge: Arguments
    rate: Arguments
    select: Arguments
    mask: Arguments
    walk: Arguments
    count: Arguments
    tally: Arguments
    learn: Arguments


def make_step(num_reqs: int, num_drafts: int, shape: str) -> Step:
    num_nodes, num_merged = num_drafts + 1, NUM_PROPOSERS * num_drafts
    slots = torch.randperm(num_reqs).int()
    counts = torch.full((num_reqs,), num_drafts, dtype=torch.int32)
    trees = [
        chain_parents(num_reqs, num_nodes)
        if shape == "chain"
        else random_parents(num_reqs, num_nodes, seed)
        for seed in range(NUM_PROPOSERS)
    ]
    candidates = (
        torch.randint(VOCAB_SIZE, (NUM_PROPOSERS, num_reqs, num_drafts)).int(),
        (torch.stack(trees)[:, :, 1:] - 1).contiguous(),
        -torch.rand(NUM_PROPOSERS, num_reqs, num_drafts),
        counts.repeat(NUM_PROPOSERS, 1),
    )
    token_ids, parents, proposers, sibling_bits = torch.zeros(
        4, num_reqs, num_merged
    ).int()
    own_scores = torch.zeros(NUM_PROPOSERS, num_reqs, num_merged)
    scores = torch.zeros(num_reqs, num_merged)
    sizes, path_lens, num_sampled, num_in_tree = torch.zeros(4, num_reqs).int()
    merged = (token_ids, parents, proposers, own_scores, sizes, sibling_bits)
    num_voices = NUM_PROPOSERS * NUM_COMPANIES
    slopes, offsets = torch.rand(num_voices), torch.randn(num_voices)
    memory = torch.zeros(num_voices, NUM_REMEMBERED)
    sums = torch.zeros(num_reqs, num_voices, NUM_SUMS)
    chain_only = torch.zeros(num_reqs, dtype=torch.bool)
    tree_tokens, tree_parents, tree_proposers, depths, paths = torch.zeros(
        5, num_reqs, num_nodes
    ).int()
    draft_tokens = torch.zeros(num_reqs, num_drafts).long()
    masks = torch.zeros(num_reqs, num_nodes, -(-num_nodes // 32)).int()
    cu_num_logits = torch.arange(0, num_reqs * num_nodes + 1, num_nodes).int()
    target_ids = torch.randint(VOCAB_SIZE, (num_reqs * num_nodes,))
    sampled = torch.zeros(num_reqs, num_nodes).long()
    step_counts = torch.zeros(num_reqs, 2 + NUM_RANKS + 3 * NUM_PROPOSERS).long()
    texts = torch.randint(VOCAB_SIZE, (num_reqs, 2 * num_nodes)).int()

    tree = (tree_tokens, tree_parents, tree_proposers, num_in_tree)
    return on_cuda(
        Step(
            merge=(slots, *candidates, *merged),
            rate=(
                *(slots, parents, proposers, own_scores, sizes, sibling_bits),
                *(slopes, offsets, None, scores),
            ),
            select=(
                *(slots, token_ids, parents, scores, proposers, sizes),
                *(counts, chain_only, torch.ones_like(counts), num_drafts),
                *(*tree, draft_tokens),
            ),
            mask=(slots, tree_parents, num_in_tree, depths, masks),
            walk=(
                *(slots, cu_num_logits, target_ids),
                *(tree_tokens, tree_parents, num_in_tree),
                *(sampled, num_sampled, paths, path_lens),
                *(tree_proposers, step_counts),
            ),
            count=(
                *(slots, cu_num_logits, num_in_tree, tree_parents, tree_proposers),
                *(paths, path_lens, step_counts),
            ),
            tally=(
                *(slots, *merged, slopes, offsets, texts),
                *(torch.full_like(sizes, 2 * num_nodes), num_sampled, sums),
            ),
            learn=(sums, slopes, offsets, memory),
        )
    )


def on_cuda(step: Step) -> Step:
    """Stages share tensors, and must still share them over there."""
    copies = {
        id(each): each.cuda() if isinstance(each, torch.Tensor) else each
        for stage in step
        for each in stage
    }
    return Step(*(tuple(copies[id(each)] for each in stage) for stage in step))


def copy_of(arguments: Arguments) -> Arguments:
    return tuple(
        each.clone() if isinstance(each, torch.Tensor) else each for each in arguments
    )


def same(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one == other
    # sums differ by rounding
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def measure(num_reqs: int, num_drafts: int, shape: str) -> Row:
    step = make_step(num_reqs, num_drafts, shape)
    stages = (
        (merge_candidates, merge_candidates_reference, step.merge),
        (rate_candidates, rate_candidates_reference, step.rate),
        (select_nodes, select_nodes_reference, step.select),
        (ancestor_mask, ancestor_mask_reference, step.mask),
        (walk_tree, walk_tree_reference, step.walk),
        (count_step, count_step_reference, step.count),
        (tally_candidates, tally_candidates_reference, step.tally),
        (learn_mixture, learn_mixture_reference, step.learn),
    )
    for kernel, reference, arguments in stages:
        expected = copy_of(arguments)
        kernel(*arguments)
        reference(*expected)
        assert all(map(same, arguments, expected)), "wrong, not fast"
    times = [median_us(lambda k=k, a=a: k(*a)) for k, _, a in stages]
    return Row(num_reqs, num_drafts, shape, *times)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("build and walk are timed on a CUDA device, and there is none here")
    sizes = [
        (num_reqs, num_drafts, shape)
        for num_reqs in (1, 64, 256)
        for num_drafts, shape in ((16, "random"), (64, "random"), (64, "chain"))
    ]
    sizes += [(8, 512, "random"), (8, 512, "chain")]
    title = f"from candidates to what was learned, {NUM_PROPOSERS} proposers"
    print_table(title, [measure(*size) for size in sizes])
