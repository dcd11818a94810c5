"""Where FlashAttention had better attend to the keys of earlier steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

GAIN = 0.95  # of the time in one launch; what is nearer may be noise


class Division(NamedTuple):
    """A measurement: FlashAttention over the context, our kernel over the rest, a merge."""

    head_size: int
    rows: int  # of a request, queries times group
    context: int
    apart: float  # times as long as in one launch, in the worst batch


def regions(divisions: Sequence[Division]) -> list[dict[str, int]]:
    """Entries of the table: for each number of rows, and those since the next smaller one
    that was measured, the shortest context from which on dividing is faster."""
    found = []
    for head_size in dict.fromkeys(each.head_size for each in divisions):
        smaller = 0
        measured = [each for each in divisions if each.head_size == head_size]
        for rows in sorted({each.rows for each in measured}):
            alike = [each for each in measured if each.rows == rows]
            slow = [each.context for each in alike if each.apart > GAIN]
            fast = [
                each.context for each in alike if each.context > max(slow, default=-1)
            ]
            if fast:
                # What holds for the shortest context measured holds below it, too.
                shortest = min(fast) if slow else 0
                found.append(
                    {
                        "head_size": head_size,
                        "min_rows": smaller + 1,
                        "max_rows": rows,
                        "min_keys": shortest,
                    }
                )
            smaller = rows
    return found
