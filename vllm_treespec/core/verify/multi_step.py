"""Verify by multi-step speculative sampling: siblings drawn independently.

A drawn child with token t is accepted with probability min(1, p(t) / q(t)). Turning it
down leaves the target with what the draft did not cover, p <- [p - q]+ normalised; the
next sibling came from the same q as this one, and may carry the same token.
(SpecInfer, arXiv:2305.09781.)
"""

from __future__ import annotations

from vllm_treespec.core.verify.draws import DrawnRule

walk_iid = DrawnRule("walk_iid")
