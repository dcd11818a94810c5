"""Accepted draft tokens per step of the verification rules, for sampled requests.

    python benchmarks/bench_verification_rules.py [--quick]

The bundled pair, at many places of text that the target sampled: a tree is drafted as
the rule wants it, the target says what it thinks at every node, and the rule's torch
twin walks. Places are the sample; all rules see the same ones.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_treespec.config import TreeSpecConfig
from vllm_treespec.core.candidates import DeviceCandidates
from vllm_treespec.core.kernel_set import choose_kernels
from vllm_treespec.core.propose import draft_tree
from vllm_treespec.core.propose.drawing import Drawing
from vllm_treespec.core.propose.sequoia import TYPICAL_ACCEPTANCE, optimal_template
from vllm_treespec.core.propose.shapes import BestFirst, FixedShape, Shape
from vllm_treespec.core.propose.template import TreeTemplate
from vllm_treespec.testing.bench import print_table
from vllm_treespec.testing.replay import DraftModel, DraftSource, Reading, Texts

sys.path.insert(0, str(Path(__file__).parent))

from bench_draft_trees import (
    MODELS,
    held_out_prompts,
    target_texts,
)

CPU = torch.device("cpu")
KERNELS = choose_kernels(TreeSpecConfig(kernels="torch"), CPU)
BATCH = 96
BRANCHING = (3, 2, 2, 1)


class Row(NamedTuple):
    T: float
    shape: str
    nodes: int
    children: str
    rule: str
    accepted: str
    vs_target_only: float


class Trees(NamedTuple):
    token_ids: torch.Tensor  # [num_rows, num_nodes] int32, node 0 is the root
    parents: torch.Tensor  # [num_rows, num_nodes] int32
    num_nodes: torch.Tensor  # [num_rows] int32
    sources: torch.Tensor  # [num_rows, num_nodes] int32
    drawn: torch.Tensor  # [num_rows, num_nodes] int32


def drawn_one_by_one(logits, noisy, temperatures, num_children):  # type: ignore[no-untyped-def]
    """In place of ``_best_children``: children that may repeat."""
    divisors = temperatures.repeat_interleave(len(logits) // len(temperatures))
    log_probs = (logits / divisors[:, None]).log_softmax(-1)
    token_ids = torch.multinomial(log_probs.exp(), num_children, replacement=True)
    return token_ids.int(), log_probs.gather(1, token_ids)


def draft(
    source: DraftSource,
    rows: torch.Tensor,
    roots: torch.Tensor,
    temperature: float,
    max_nodes: int,
    mixes: bool,
) -> Trees:
    """Trees of these rows, of which the first nodes are kept."""
    grower, count = source.grower, len(rows)
    out = DeviceCandidates.allocate(1, count, grower.num_candidates, CPU).of(0)
    drawing = source.drawing
    if drawing is not None:
        drawing.is_drawn[:count] = True
        drawing.is_mixed[:count] = mixes
        drawing.temperatures[:count] = temperature
        drawing.seeds[:count] = torch.randint(2**62, (count,))
        drawing.blocks[:count] = torch.arange(count) * grower.max_num_nodes
    source.propose(rows, roots, out)
    width = min(max_nodes, int(out.num_candidates.max()))
    root = torch.zeros(count, 1, dtype=torch.int32)
    nodes = torch.cat([root, grower.nodes[:count, :width]], 1)
    blocks = torch.arange(count, dtype=torch.int32)[:, None] * grower.max_num_nodes
    is_drawn = torch.zeros_like(nodes)
    if drawing is not None:
        is_drawn[:, 1:] = grower.drawn[:count, :width]
    return Trees(
        torch.cat([root, out.token_ids[:, :width]], 1),
        torch.cat([root - 1, out.parents[:, :width] + 1], 1),
        out.num_candidates.clamp(max=width) + 1,
        torch.where(nodes >= 0, blocks + nodes, -1).int(),
        is_drawn,
    )


def target_logits(
    model: DraftModel,
    reading: Reading,
    trees: Trees,
    rows: torch.Tensor,
    roots: torch.Tensor,
) -> torch.Tensor:
    """What the target thinks at every node: ``[num_rows, num_nodes, vocab_size]``."""
    count, num_nodes = trees.parents.shape
    seen = torch.eye(num_nodes, dtype=torch.bool).repeat(count, 1, 1)
    depths = torch.zeros(count, num_nodes, dtype=torch.int64)
    for node in range(1, num_nodes):
        parents = trees.parents[:, node].long()
        seen[:, node] |= seen[torch.arange(count), parents]
        depths[:, node] = depths[torch.arange(count), parents] + 1
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(reading.layers):
        cache.update(keys[rows], values[rows], layer)
    in_text = torch.arange(reading.length) <= roots[:, None]
    mask = torch.cat(
        [in_text[:, None].expand(-1, num_nodes - 1, -1), seen[:, 1:, 1:]], 2
    )
    logits = model.model(
        input_ids=trees.token_ids[:, 1:].long(),
        position_ids=roots[:, None] + depths[:, 1:],
        attention_mask=mask[:, None],
        past_key_values=cache,
    ).logits
    return torch.cat([reading.logits[rows, roots][:, None], logits], 1)


def accepted_by(
    rule: str,
    trees: Trees,
    logits: torch.Tensor,
    drawing: Drawing | None,
    temperature: float,
) -> torch.Tensor:
    """Accepted nodes of every row, ``[num_rows]`` float."""
    if rule == "target_only":
        # Exactly: a node is reached with the product of its path's probabilities.
        probabilities = logits.softmax(-1)
        reached = torch.ones(trees.parents.shape, dtype=torch.float64)
        rows = torch.arange(len(logits))
        # A token that siblings share is reached once.
        for node in range(1, trees.parents.shape[1]):
            parents = trees.parents[:, node].long()
            tokens = trees.token_ids[:, node].long()
            same = (trees.parents[:, 1:node] == parents[:, None]) & (
                trees.token_ids[:, 1:node] == tokens[:, None]
            )
            chance = reached[rows, parents] * probabilities[rows, parents, tokens]
            reached[:, node] = torch.where(same.any(1), 0.0, chance)
        used = torch.arange(trees.parents.shape[1]) < trees.num_nodes[:, None]
        return (reached * used)[:, 1:].sum(1)
    assert drawing is not None, "rules for drawn children need their distributions"
    count, num_nodes = trees.parents.shape
    lengths = torch.zeros(count, dtype=torch.int32)
    getattr(KERNELS, f"walk_{rule}")(
        torch.arange(count),
        torch.arange(count + 1, dtype=torch.int32) * num_nodes,
        logits.flatten(0, 1).contiguous(),
        drawing.logits,
        trees.sources,
        trees.drawn,
        torch.full((count,), temperature),
        trees.token_ids,
        trees.parents,
        trees.num_nodes,
        torch.randint(2**62, (count,)),
        torch.arange(count),
        torch.zeros(count, num_nodes, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int32),
        torch.zeros(count, num_nodes, dtype=torch.int32),
        lengths,
    )
    return lengths.double()


def measure(
    shape: Shape,
    max_nodes: int,
    rules: Sequence[str],
    children: str,
    texts: Texts,
    places: torch.Tensor,
    models: tuple[DraftModel, DraftModel],
) -> dict[str, torch.Tensor]:
    """Accepted nodes per rule, ``[num_places]``."""
    torch.manual_seed(0)
    source = DraftSource(models[1], shape, BATCH)
    source.start(texts)
    reading = models[0].read(texts)
    if children != "likeliest":
        source.drawing = Drawing.allocate(
            KERNELS,
            max_num_reqs=BATCH,
            num_blocks=BATCH,
            max_num_nodes=source.grower.max_num_nodes,
            vocab_size=reading.logits.shape[2],
            dtype=torch.float32,
            device=CPU,
        )
    best_children = draft_tree._best_children
    if children == "drawn, replaced":
        draft_tree._best_children = drawn_one_by_one
    found: dict[str, list[torch.Tensor]] = {rule: [] for rule in rules}
    try:
        for batch in places.split(BATCH):
            rows, roots = batch.unbind(1)
            trees = draft(
                source, rows, roots, texts.temperature, max_nodes, children == "mixed"
            )
            logits = target_logits(models[0], reading, trees, rows, roots)
            for rule in rules:
                found[rule].append(
                    accepted_by(
                        rule,
                        trees,
                        logits / texts.temperature,
                        source.drawing,
                        texts.temperature,
                    )
                )
    finally:
        draft_tree._best_children = best_children
    return {rule: torch.cat(parts) for rule, parts in found.items()}


def shapes() -> dict[str, tuple[int, Shape]]:
    """Name -> nodes, shape."""
    shapes: dict[str, tuple[int, Shape]] = {
        "chain": (4, FixedShape(TreeTemplate.from_branching((1, 1, 1, 1)), CPU)),
        "<3,2,2,1>": (33, FixedShape(TreeTemplate.from_branching(BRANCHING), CPU)),
    }
    for nodes in (16, 32):
        plan = optimal_template(TYPICAL_ACCEPTANCE, nodes, 6)
        best = BestFirst(depth=6, width=8, num_children=8, device=CPU, drawn=plan)
        shapes[f"best_first {nodes}"] = (nodes, best)
    return shapes


@torch.inference_mode()
def table(temperature: float, quick: bool) -> list[Row]:
    prompts, _ = held_out_prompts(8 if quick else 48)
    texts = target_texts(prompts, 32 if quick else 96, temperature)
    positions = torch.arange(texts.prompt_len, texts.prompt_len + texts.num_tokens, 8)
    places = torch.cartesian_prod(torch.arange(len(prompts)), positions)
    models = tuple(
        DraftModel(
            AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
        )
        for name in ("target", "draft")
    )
    rows = []
    for name, (nodes, shape) in shapes().items():
        kinds: dict[str, list[str]] = {
            "likeliest": ["target_only"],
            "drawn": ["target_only", "without_replacement", "traversal"],
            "mixed": ["without_replacement", "traversal"],
        }
        if not name.startswith("best_first"):
            kinds["drawn, replaced"] = ["iid"]
        found = {
            (children, rule): accepted
            for children, rules in kinds.items()
            for rule, accepted in measure(
                shape,
                nodes,
                rules,
                children,
                texts,
                places,
                models,  # type: ignore[arg-type]
            ).items()
        }
        base = found["likeliest", "target_only"].mean()
        for (children, rule), accepted in found.items():
            error = accepted.std() / len(accepted) ** 0.5
            shown = f"{accepted.mean():.3f} ± {error:.3f}"
            gain = (accepted.mean() + 1) / (base + 1)
            rows.append(
                Row(temperature, name, nodes, children, rule, shown, float(gain))
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="in miniature")
    quick = parser.parse_args().quick
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    print(f"python benchmarks/bench_verification_rules.py at {commit}\n")
    print("Accepted draft tokens per step; vs_target_only compares tokens per step.")
    for temperature in (1.0,) if quick else (1.0, 0.6, 0.3):
        print_table(f"Rules at T={temperature}", table(temperature, quick))


if __name__ == "__main__":
    main()
