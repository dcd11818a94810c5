"""What a draft model is fed before it drafts, and what it makes of a rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vllm_treespec.integration.device_draft import DeviceDraft

MODEL = {"type": "draft_model", "depth": 3, "width": 3}


class Feeding:
    """Rows per forward that fed, and the drafts of each text."""

    def __init__(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.speculator = engine.runner.speculator
        self.widths: list[int] = []
        self.num_reqs: list[int] = []
        self.drafts: dict[tuple[int, ...], list[int]] = {}
        (draft,) = self.speculator.drafts.models.values()
        feed, propose = draft._feed_rows, draft.propose

        def fed(num_reqs: int, rows: Any, starts: Any, width: int) -> None:
            self.widths.append(width)
            self.num_reqs.append(num_reqs)
            feed(num_reqs, rows, starts, width)

        def proposed(num_reqs: int, **options: Any) -> int:
            found = propose(num_reqs, **options)
            for row in range(num_reqs):
                self._note(draft, row)
            return found

        monkeypatch.setattr(draft, "_feed_rows", fed)
        monkeypatch.setattr(draft, "propose", proposed)

    def _note(self, draft: DeviceDraft, row: int) -> None:
        states, slot = self.speculator.req_states, int(draft._slots[row])
        length = int(states.total_len.gpu[slot])
        text = tuple(states.all_token_ids.gpu[slot, :length].tolist())
        count = int(draft._out.num_candidates[row])
        if count:
            self.drafts[text] = draft._out.token_ids[row, :count].tolist()

    def rest(self, rests: bool = True) -> None:
        self.speculator._worth._roster.drafting[0] = not rests


@pytest.fixture
def feeding(
    start: Callable[..., Any],
    model_path: Callable[[str], str],
    draft_path: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Any, Feeding]]:
    def begin(*others: dict[str, Any], **options: Any) -> tuple[Any, Feeding]:
        tree = {
            "adaptive": False,
            "proposers": [{**MODEL, "model": draft_path("llama")}, *others],
            **options.pop("tree", {}),
        }
        engine = start(model_path("llama"), tree=tree, **options)
        return engine, Feeding(engine, monkeypatch)

    return begin


def test_decoding_requests_are_fed_what_their_tier_can_have_emitted(feeding, prompts):
    """However long the paths that another proposer could offer."""
    engine, fed = feeding({"type": "suffix"}, tree={"max_rows": 32})
    engine.greedy(prompts(8, longest=4), 16, ignore_eos=True)
    # Eight requests share 32 rows: trees of three nodes, of which four tokens come.
    widths = [
        width
        for width, count in zip(fed.widths, fed.num_reqs, strict=True)
        if count == 8
    ]
    assert len(widths) > 2 and max(widths[1:]) <= 4
    engine.greedy(prompts(1, longest=4), 16, ignore_eos=True)
    assert max(fed.widths) <= 9 and fed.widths


def test_nothing_is_fed_to_a_resting_draft_and_it_catches_up(feeding, prompts):
    batch = prompts(4)
    engine, always = feeding()
    expected = engine.greedy(batch, 24, ignore_eos=True)
    engine, fed = feeding()
    fed.rest()
    steps, step = [], fed.speculator.propose

    def stepped(*args: Any, **options: Any) -> Any:
        steps.append(len(fed.widths))
        if len(steps) == 12:
            fed.rest(False)
        return step(*args, **options)

    fed.speculator.propose = stepped
    assert engine.greedy(batch, 24, ignore_eos=True) == expected
    assert steps[11] == 0 and max(fed.widths) > 11  # all at once, then little
    common = fed.drafts.keys() & always.drafts.keys()
    assert len(common) > 4
    assert all(fed.drafts[text] == always.drafts[text] for text in common)


def test_a_catch_up_is_no_larger_than_a_batch(feeding, prompts):
    engine, fed = feeding(max_num_batched_tokens=64)
    batch = prompts(6, shortest=30, longest=40)
    rows: list[int] = []
    (draft,) = fed.speculator.drafts.models.values()
    feed = draft._feed_rows
    draft._feed_rows = lambda n, each, *rest: (
        rows.append(len(each)),
        feed(n, each, *rest),
    )
    fed.rest()
    step, count = fed.speculator.propose, [0]

    def stepped(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 20:
            fed.rest(False)
        return step(*args, **options)

    fed.speculator.propose = stepped
    engine.greedy(batch, 32, ignore_eos=True)
    assert max(rows) == 64 and fed.drafts


@pytest.mark.parametrize("rested", [False, True])
def test_cached_text_is_known_to_a_draft_that_rested_when_it_was_said(
    rested, feeding, prompts
):
    (prompt,) = prompts(1, shortest=40)
    options = {"enable_prefix_caching": True, "block_size": 32}
    engine, always = feeding()
    (said,) = engine.greedy([prompt], 24, ignore_eos=True)
    engine.greedy([prompt + said], 8, ignore_eos=True)
    engine, fed = feeding(**options)
    fed.rest(rested)
    engine.greedy([prompt], 24, ignore_eos=True)
    fed.rest(False)
    fed.drafts.clear()
    engine.greedy([prompt + said], 8, ignore_eos=True)
    common = fed.drafts.keys() & always.drafts.keys()
    assert common
    assert all(fed.drafts[text] == always.drafts[text] for text in common)
