"""Who drafts this step: a proposer that does not pay for its time rests.

Without proposer ``p``, a step would take ``T - t_p`` and emit ``A - g_p`` tokens, so it
pays while ``g_p / A >= t_p / T``: its share of the emitted tokens, counting only those
that nobody else proposed, is at least its share of the time.
"""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 64  # steps between two decisions
MAX_REST = 64  # windows until a proposer is tried again, at most


class Roster:
    """Decides once per window, from that window's sums."""

    def __init__(self, num_proposers: int) -> None:
        self.drafting = [True] * num_proposers
        self._rest_left = [0] * num_proposers
        self._next_rest = [1] * num_proposers

    def judge(
        self,
        *,
        num_emitted: float,  # tokens, by all requests and steps of the window
        gains: Sequence[float],  # of them, those that only this proposer made possible
        seconds: Sequence[float],  # time spent on this proposer's drafts
        total_seconds: float,  # time of the window's steps
    ) -> None:
        """One proposer at most is sent to rest: two that propose the same tokens both
        look useless, until one of them is gone."""
        worst, worst_surplus = None, 0.0
        for proposer, drafts in enumerate(self.drafting):
            if not drafts:
                self._rest_left[proposer] -= 1
                self.drafting[proposer] = self._rest_left[proposer] <= 0
                continue
            if num_emitted == 0 or total_seconds == 0 or seconds[proposer] == 0:
                continue  # nothing was decoded, or it took no time
            surplus = gains[proposer] / num_emitted - seconds[proposer] / total_seconds
            if surplus >= 0:
                self._next_rest[proposer] = 1
            elif surplus < worst_surplus:
                worst, worst_surplus = proposer, surplus
        if worst is not None:
            self.drafting[worst] = False
            self._rest_left[worst] = self._next_rest[worst]
            self._next_rest[worst] = min(2 * self._next_rest[worst], MAX_REST)
