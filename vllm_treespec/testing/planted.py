"""An adversary for the whole engine: random trees that hide the truth in odd places."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from vllm_treespec.core.propose import Candidates, DecodeStep


class PlantedProposer:
    """Trees of random shape and size. The true continuation, where known, runs along a
    random path; every other node holds a token of it in the wrong place, or any token.

    Scores are random too, so the builder's order differs from the drafting order.
    """

    name = "planted"

    def __init__(
        self,
        truths: Sequence[Sequence[int]],  # prompt + output of each reference run
        *,
        vocab_size: int,
        max_nodes: int,
        seed: int = 0,
    ) -> None:
        self._truths = [list(truth) for truth in truths]
        self._vocab_size = vocab_size
        self._max_nodes = max_nodes
        self._random = random.Random(seed)
        self.num_planted = 0  # trees that carried at least one true token

    def add_request(self, slot: int) -> None: ...

    def remove_request(self, slot: int) -> None: ...

    def learn(self, step: DecodeStep) -> None: ...

    def clear(self) -> None: ...

    def propose(self, step: DecodeStep) -> Candidates:
        num_reqs = len(step.slots)
        shape = (num_reqs, self._max_nodes)
        token_ids = np.zeros(shape, dtype=np.int32)
        parents = np.zeros(shape, dtype=np.int32)
        scores = np.zeros(shape, dtype=np.float32)
        counts = np.zeros(num_reqs, dtype=np.int32)
        for row, slot in enumerate(step.slots):
            history = step.token_ids[slot, : step.num_tokens[slot]].tolist()
            tree = self._plant(self._continuation(history))
            counts[row] = len(tree)
            for node, (parent, token, score) in enumerate(tree):
                parents[row, node], token_ids[row, node] = parent, token
                scores[row, node] = score
        return Candidates(token_ids, parents, scores, counts)

    def _continuation(self, history: list[int]) -> list[int]:
        for truth in self._truths:
            if truth[: len(history)] == history:
                return truth[len(history) :]
        return []

    def _plant(self, truth: list[int]) -> list[tuple[int, int, float]]:
        """(parent, token, score) of every node, parents first, -1 for the root."""
        rng = self._random
        size = rng.randint(1, self._max_nodes)
        parents = [rng.randint(max(-1, node - 4), node - 1) for node in range(size)]
        on_truth = {-1: 0}  # node -> tokens of the truth up to and including it
        path_end = -1
        tree: list[tuple[int, int, float]] = []
        used: set[tuple[int, int]] = set()
        for node, parent in enumerate(parents):
            done = on_truth.get(parent, 0)
            if parent == path_end and done < len(truth) and rng.random() < 0.7:
                token, on_truth[node], path_end = truth[done], done + 1, node
            elif truth and rng.random() < 0.5:
                token = rng.choice(truth[:8])
            else:
                token = rng.randrange(self._vocab_size)
            while (parent, token) in used:  # siblings differ
                token = rng.randrange(self._vocab_size)
                if path_end == node:
                    del on_truth[node]
                    path_end = parent
            used.add((parent, token))
            score = tree[parent][2] if parent >= 0 else 0.0
            tree.append((parent, token, score - rng.random()))
        self.num_planted += path_end != -1
        return tree
