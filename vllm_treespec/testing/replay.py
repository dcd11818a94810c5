"""Replays draft trees over text that the target has already written.

What the target says does not depend on the trees that it verifies. So a step emits what
the tree and the text agree on, and one more token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache

from vllm_treespec.config import max_candidates
from vllm_treespec.core.build import TreeBuilder
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import KernelSet
from vllm_treespec.core.propose import DecodeStep, Proposer
from vllm_treespec.core.propose.draft_tree import MIN_TEMPERATURE, Frontier, TreeGrower
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.recycle import Contexts, Recycler
from vllm_treespec.core.propose.shapes import Shape
from vllm_treespec.core.tree import MASK_BITS, TreeBuffers
from vllm_treespec.kernels.recycling import NONE

CPU = torch.device("cpu")
NUM_RANKS = 64  # of a draft's choices that are told apart
MAX_DEPTH = 16  # of a draft model's trees


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Prompts and the target's continuations, all of one length."""

    # [num_texts, prompt_len + num_tokens + max_depth] int64; the last tokens are there
    # so that the last step has something to agree with.
    token_ids: torch.Tensor
    prompt_len: int
    num_tokens: int  # a step begins while fewer than these are emitted
    temperature: float  # at which the target wrote, 0: greedy

    @property
    def max_depth(self) -> int:
        """Of any tree, as far as it is looked at."""
        return self.token_ids.shape[1] - self.prompt_len - self.num_tokens


class Trees(NamedTuple):
    """The rows' drafts, roots excluded."""

    token_ids: torch.Tensor  # [num_rows, max_nodes] int32
    parents: torch.Tensor  # [num_rows, max_nodes] int32, -1: the root's child
    num_nodes: torch.Tensor  # [num_rows] int32, columns past it are stale


class Source(Protocol):
    """Writes candidates for texts that are known up to a root."""

    def start(self, texts: Texts) -> None: ...

    def propose(
        self,
        rows: torch.Tensor,  # [num_rows] int64, row -> text
        roots: torch.Tensor,  # [num_rows] int64, position of the newest token
        out: DeviceCandidates,
    ) -> None: ...

    def learn(
        self,
        rows: torch.Tensor,  # as of the last ``propose``
        roots: torch.Tensor,
        num_emitted: torch.Tensor,  # [num_rows] int64, tokens said after each root
    ) -> None: ...


class Reading:
    """What a draft model thinks at every position of some texts."""

    def __init__(self, model: Any, texts: Texts) -> None:
        output = model(input_ids=texts.token_ids, use_cache=True)
        self.logits: torch.Tensor = output.logits  # [num_texts, length, vocab_size]
        self.layers = [
            (each.keys, each.values) for each in output.past_key_values.layers
        ]
        self.length = texts.token_ids.shape[1]


class DraftModel:
    """A transformers model that reads every text once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._readings: dict[Texts, Reading] = {}

    @torch.inference_mode()
    def read(self, texts: Texts) -> Reading:
        if texts not in self._readings:
            self._readings[texts] = Reading(self.model, texts)
        return self._readings[texts]


def measure_acceptance(draft: DraftModel, texts: Texts) -> tuple[float, ...]:
    """How often the draft's k-th choice is what the target said."""
    first, last = texts.prompt_len, texts.prompt_len + texts.num_tokens
    said = texts.token_ids[:, first:last, None]
    logits = draft.read(texts).logits[:, first - 1 : last - 1]
    ranks = (logits > logits.gather(2, said)).sum(2).flatten()
    counts = ranks.bincount(minlength=NUM_RANKS)[:NUM_RANKS]
    return tuple((counts / len(ranks)).tolist())


class DraftSource:
    """The project's own growth, on transformers in place of vLLM."""

    def __init__(self, draft: DraftModel, shape: Shape, max_num_reqs: int) -> None:
        self._draft = draft
        self.grower = TreeGrower(shape, max_num_reqs, CPU)
        self.drawing: Drawing | None = None  # for trees whose children are drawn

    def start(self, texts: Texts) -> None:
        self._reading = self._draft.read(texts)
        self._temperature = max(texts.temperature, MIN_TEMPERATURE)

    def propose(
        self, rows: torch.Tensor, roots: torch.Tensor, out: DeviceCandidates
    ) -> None:
        reading, grower = self._reading, self.grower
        max_len = reading.length + grower.max_num_nodes
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(reading.layers):
            cache.update(keys[rows], values[rows], layer)
        # The root is part of the text, nodes follow behind the text's end.
        in_text = torch.arange(reading.length) <= roots[:, None]

        def forward(frontier: Frontier) -> torch.Tensor:
            num_rows, width = frontier.token_ids.shape
            last = frontier.first_node + width
            nodes = torch.arange(1, last)
            words = grower.batch.masks[:num_rows, frontier.first_node : last]
            in_tree = (words[:, :, nodes // MASK_BITS] >> (nodes % MASK_BITS)) & 1
            seen = in_text[:, None].expand(-1, width, -1)
            output = self._draft.model(
                input_ids=frontier.token_ids.long(),
                position_ids=(roots[:, None] + frontier.depth).expand(-1, width),
                attention_mask=torch.cat([seen, in_tree.bool()], 2)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits: torch.Tensor = output.logits.flatten(0, 1)
            return logits

        active = torch.ones(len(rows), dtype=torch.bool)
        logits = reading.logits[rows, roots]
        temperatures = torch.full((len(rows),), self._temperature)
        grower.grow(
            logits,
            roots.int(),
            max_len,
            active,
            temperatures,
            forward,
            out,
            self.drawing,
        )

    def learn(
        self, rows: torch.Tensor, roots: torch.Tensor, num_emitted: torch.Tensor
    ) -> None:
        """It has read all there is."""


class HostSource:
    """A proposer without a model, which learns what it has seen after each step."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer

    def start(self, texts: Texts) -> None:
        self._token_ids = texts.token_ids.int().numpy()
        for slot in range(len(self._token_ids)):
            self._proposer.add_request(slot)

    def propose(
        self, rows: torch.Tensor, roots: torch.Tensor, out: DeviceCandidates
    ) -> None:
        num_tokens = np.zeros(len(self._token_ids), np.int64)
        num_tokens[rows] = roots + 1
        step = DecodeStep(rows.int().numpy(), self._token_ids, num_tokens)
        candidates = self._proposer.propose(step)
        num_rows, width = candidates.token_ids.shape
        out.token_ids[:num_rows, :width] = torch.from_numpy(candidates.token_ids)
        out.parents[:num_rows, :width] = torch.from_numpy(candidates.parents)
        out.scores[:num_rows, :width] = torch.from_numpy(candidates.scores)
        out.num_candidates[:num_rows] = torch.from_numpy(candidates.num_candidates)
        self._proposer.learn(step)

    def learn(
        self, rows: torch.Tensor, roots: torch.Tensor, num_emitted: torch.Tensor
    ) -> None:
        """It learns once it has drafted, as in the engine."""


class RecycleSource:
    """The table of successors, fed with a target's reading of the texts.

    Only nodes on the accepted path teach it: what the target would have said at the
    others is not in its reading. The engine's table sees them all.
    """

    def __init__(self, target: DraftModel, recycler: Recycler) -> None:
        self._target = target
        self._recycler = recycler

    def start(self, texts: Texts) -> None:
        self._token_ids = texts.token_ids
        self._logits = self._target.read(texts).logits
        for prompt in texts.token_ids[:, : texts.prompt_len + 1]:
            self._recycler.learn_prompt(
                torch.nn.functional.pad(prompt, (1, 0), value=NONE)
            )

    def propose(
        self, rows: torch.Tensor, roots: torch.Tensor, out: DeviceCandidates
    ) -> None:
        active = torch.ones(len(rows), dtype=torch.bool)
        self._recycler.grow(self._contexts(rows, roots), active, out)

    def _contexts(self, rows: torch.Tensor, places: torch.Tensor) -> Contexts:
        return Contexts(
            self._token_ids[rows, places - 1], self._token_ids[rows, places]
        )

    def learn(
        self, rows: torch.Tensor, roots: torch.Tensor, num_emitted: torch.Tensor
    ) -> None:
        steps = torch.arange(int(num_emitted.max()))
        positions = roots[:, None] + steps
        said = self._token_ids[rows[:, None], positions + 1]
        self._recycler.learn_rates(self._contexts(rows, roots), said, num_emitted)
        is_path = steps < num_emitted[:, None]
        texts, places = rows[:, None].expand_as(said)[is_path], positions[is_path]
        self._recycler.learn_nodes(
            self._contexts(texts, places), self._logits[texts, places], said[is_path]
        )


class Drafter(Protocol):
    """Makes one tree a step for every text that goes on."""

    def start(self, texts: Texts) -> None: ...

    def draft(self, rows: torch.Tensor, roots: torch.Tensor) -> Trees: ...

    def learn(self, num_emitted: torch.Tensor) -> None:
        """So many tokens ``[num_rows]`` int64 were said after the last roots."""


class Alone:
    """All candidates of one source. There are no more than the tree has room for, so
    building it would only change their order."""

    def __init__(self, source: Source, num_nodes: int, max_num_reqs: int) -> None:
        self._source = source
        self._candidates = DeviceCandidates.allocate(1, max_num_reqs, num_nodes, CPU)

    def start(self, texts: Texts) -> None:
        self._source.start(texts)

    def draft(self, rows: torch.Tensor, roots: torch.Tensor) -> Trees:
        mine, num_rows = self._candidates.of(0), len(rows)
        self._source.propose(rows, roots, mine)
        self._drafted = rows, roots
        return Trees(
            mine.token_ids[:num_rows],
            mine.parents[:num_rows],
            mine.num_candidates[:num_rows],
        )

    def learn(self, num_emitted: torch.Tensor) -> None:
        self._source.learn(*self._drafted, num_emitted)


class Merged:
    """Several sources' candidates, calibrated and merged by the builder."""

    def __init__(
        self,
        kernels: KernelSet,
        sources: Sequence[Source],
        num_nodes: int,
        max_num_reqs: int,
    ) -> None:
        self._sources = sources
        self._trees = TreeBuffers.allocate(max_num_reqs, num_nodes + 1, CPU)
        self._builder = TreeBuilder(
            kernels,
            self._trees,
            num_proposers=len(sources),
            max_candidates=max_candidates(len(sources), num_nodes),
        )
        self._max_nodes = torch.full((max_num_reqs,), num_nodes, dtype=torch.int32)
        self._chain_only = torch.zeros_like(self._max_nodes)

    def start(self, texts: Texts) -> None:
        self._token_ids = texts.token_ids
        self._num_tokens = torch.zeros(len(texts.token_ids), dtype=torch.int64)
        for source in self._sources:
            source.start(texts)

    def draft(self, rows: torch.Tensor, roots: torch.Tensor) -> Trees:
        for proposer, source in enumerate(self._sources):
            source.propose(rows, roots, self._builder.candidates.of(proposer))
        self._drafted = rows, roots
        trees = self._trees
        self._builder.build(
            rows,
            torch.ones_like(rows),
            self._max_nodes,
            self._chain_only,
            num_nodes=trees.parents.shape[1] - 1,
        )
        return Trees(
            trees.token_ids[rows, 1:],
            trees.parents[rows, 1:] - 1,
            trees.num_nodes[rows] - 1,
        )

    def learn(self, num_emitted: torch.Tensor) -> None:
        rows, roots = self._drafted
        self._num_tokens[rows] = roots + 1 + num_emitted
        self._builder.learn(rows, num_emitted, self._token_ids, self._num_tokens)
        for source in self._sources:
            source.learn(rows, roots, num_emitted)


class Outcome(NamedTuple):
    """What every text took."""

    num_tokens: npt.NDArray[np.float64]  # [num_texts], emitted by the steps
    num_steps: npt.NDArray[np.float64]  # [num_texts]

    @property
    def tokens_per_step(self) -> float:
        return float(self.num_tokens.sum() / self.num_steps.sum())

    @property
    def error(self) -> float:
        """Standard error; the texts are the sample."""
        return _jackknife(_left_out(self))

    def gain_over(self, other: Outcome) -> tuple[float, float]:
        """Ratio of tokens per step on the same texts, and its standard error."""
        ratio = self.tokens_per_step / other.tokens_per_step
        return ratio, _jackknife(_left_out(self) / _left_out(other))


def _left_out(outcome: Outcome) -> npt.NDArray[np.float64]:
    """Tokens per step without each of the texts."""
    tokens, steps = outcome
    left_out: npt.NDArray[np.float64]
    left_out = (tokens.sum() - tokens) / (steps.sum() - steps)
    return left_out


def _jackknife(estimates: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt((len(estimates) - 1) * estimates.var()))


@torch.inference_mode()
def replay(texts: Texts, drafter: Drafter) -> Outcome:
    """Decode all texts as one batch, as an engine does."""
    drafter.start(texts)
    # Prefill sampled one token.
    num_known = torch.full((len(texts.token_ids),), texts.prompt_len + 1)
    num_steps = torch.zeros_like(num_known)
    ahead = torch.arange(texts.max_depth + 1)
    end = texts.prompt_len + texts.num_tokens
    while len(rows := (num_known < end).nonzero()[:, 0]):
        known = num_known[rows]
        trees = drafter.draft(rows, known - 1)
        said = texts.token_ids[rows[:, None], known[:, None] + ahead]
        num_emitted = accepted(trees, said[:, :-1]) + 1
        drafter.learn(num_emitted)
        num_known[rows] += num_emitted
        num_steps[rows] += 1
    num_tokens = num_known - texts.prompt_len - 1
    return Outcome(num_tokens.double().numpy(), num_steps.double().numpy())


def accepted(
    trees: Trees,
    said: torch.Tensor,  # [num_rows, depth] int64, what the target says next
) -> torch.Tensor:  # [num_rows] int64
    """How many tokens a path from the root agrees with."""
    used = torch.arange(trees.parents.shape[1]) < trees.num_nodes[:, None]
    node = torch.full((said.shape[0],), -1)
    length = torch.zeros_like(node)
    for tokens in said.T:
        is_child = used & (trees.parents == node[:, None])
        hits = is_child & (trees.token_ids == tokens[:, None])
        # Nothing is a child of what no node carries.
        node = torch.where(hits.any(1), hits.int().argmax(1), len(used[0]))
        length += hits.any(1)
    return length
