"""Verify by recursive rejection: siblings drawn without replacement.

A drawn child with token t is accepted with probability min(1, p(t) / q(t)). Turning it
down leaves the target with what the draft did not cover, p <- [p - q]+, and the draft
with what it has not drawn yet, q without t, both normalised; the next sibling was
drawn from just that q, so the step repeats. No sibling is wasted on a token that was
turned down before: with enough of them, everything the draft can say is covered.
(RSD, arXiv:2402.14160; Sequoia, arXiv:2402.12374.)
"""

from __future__ import annotations

from vllm_treespec.core.verify.draws import DrawnRule

walk_without_replacement = DrawnRule("walk_without_replacement")
