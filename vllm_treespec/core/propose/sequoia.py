"""The best tree for how often a draft's choices are right (Sequoia, arXiv:2402.12374).

*Acceptance* is positional: ``acceptance[k]`` is the probability that the target, having
accepted a node, goes on with the draft's k-th choice there, whatever the tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose.template import TreeTemplate

# One of the vectors in the public scripts of Sequoia's tree search, for shapes that must
# be fixed before anything was measured.
TYPICAL_ACCEPTANCE = (
    *(0.6206, 0.0993, 0.0447, 0.0277, 0.0192, 0.0142, 0.0104, 0.0083),
    *(0.0068, 0.0061, 0.0051, 0.0055, 0.0036, 0.0030, 0.0031, 0.0028),
)


def expected_tokens(template: TreeTemplate, acceptance: Sequence[float]) -> float:
    """Tokens that one step of the target yields, the bonus token included.

    Raises:
        ValueError: if the template has ranks that were not measured.
    """
    _check(acceptance)
    if max(template.ranks) >= len(acceptance):
        raise ValueError(
            f"the template uses rank {max(template.ranks)}, acceptance has "
            f"{len(acceptance)} ranks: measure more of them"
        )
    reached: list[float] = []
    for parent, rank in zip(template.parents, template.ranks, strict=True):
        reached.append((reached[parent] if parent >= 0 else 1.0) * acceptance[rank])
    return 1.0 + sum(reached)


def optimal_template(
    acceptance: Sequence[float], num_nodes: int, max_depth: int
) -> TreeTemplate:
    """The tree with the most expected tokens, of at most ``num_nodes`` draft nodes and
    ``max_depth`` levels below the root; fewer where more would add nothing.

    Takes ``O(max_depth * ranks * num_nodes ** 2)``.

    Raises:
        ValueError: naming the value out of range.
    """
    _check(acceptance)
    for name, value in (("num_nodes", num_nodes), ("max_depth", max_depth)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    choices = _solve(np.array(acceptance, np.float64), num_nodes, max_depth)
    if choices[-1, 0, -1] == 0:
        # No tree is worth anything, and a template has at least one node.
        return TreeTemplate((-1,), (0,))
    return _read_off(choices)


def _check(acceptance: Sequence[float]) -> None:
    if not acceptance:
        raise ValueError("acceptance=[]: must have one rate per rank")
    for rank, rate in enumerate(acceptance):
        if (
            isinstance(rate, bool)
            or not isinstance(rate, int | float)
            or not 0 <= rate <= 1
        ):
            raise ValueError(f"acceptance[{rank}]={rate!r}: must be in [0, 1]")


def _solve(
    acceptance: npt.NDArray[np.float64],  # [num_ranks]
    num_nodes: int,
    max_depth: int,
) -> npt.NDArray[np.int32]:
    """``[max_depth, num_ranks, num_nodes + 1]``: of ``n`` nodes for the children of this
    rank and later ones, how many go to this rank's child and below it; 0 ends the
    children. The first index is the levels allowed below that child.

    A child's probability scales all that is below it, so the best forest below a node
    does not depend on where the node hangs. What is left is a knapsack over ranks, from
    the last to the first because a node's children are a prefix of the ranks.
    """
    choices = np.zeros((max_depth, len(acceptance), num_nodes + 1), np.int32)
    rows = np.arange(num_nodes + 1)
    forest = np.zeros(num_nodes + 1)  # best sum of probabilities with at most n nodes
    # What later ranks make of n nodes is rest[num_nodes + n]; no fewer than none.
    rest = np.full(2 * num_nodes + 1, -np.inf)
    # [n, m]: what they make of the n - m nodes left to them.
    rest_of = np.lib.stride_tricks.sliding_window_view(rest, num_nodes + 1)[:, ::-1]
    for depth in range(max_depth):
        subtree = 1.0 + forest[:-1]  # [m - 1] of a child with m nodes, itself included
        rest[num_nodes:] = 0.0
        for rank in range(len(acceptance) - 1, -1, -1):
            totals = rest_of.copy()
            totals[:, 1:] += acceptance[rank] * subtree
            totals[:, 0] = 0.0
            choices[depth, rank] = totals.argmax(axis=1)
            rest[num_nodes:] = totals[rows, choices[depth, rank]]
        forest = rest[num_nodes:].copy()
    return choices


def _read_off(choices: npt.NDArray[np.int32]) -> TreeTemplate:
    """The tree that ``_solve`` chose, breadth first."""
    max_depth, num_ranks, _ = choices.shape
    parents: list[int] = []
    ranks: list[int] = []
    pending = [(-1, max_depth, choices.shape[2] - 1)]
    for parent, levels, num_left in pending:  # grows while it is read
        for rank in range(num_ranks if levels else 0):
            num_taken = int(choices[levels - 1, rank, num_left])
            if num_taken == 0:
                break
            pending.append((len(parents), levels - 1, num_taken - 1))
            parents.append(parent)
            ranks.append(rank)
            num_left -= num_taken
    return TreeTemplate(tuple(parents), tuple(ranks))
