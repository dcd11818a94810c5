"""Verify by traversal: whole paths are accepted, from the leaves to the root.

Walking down, a child that the target likes more than the draft counts as certain, and
what it had to spare is forgotten. Here a path keeps the product of its ratios,
r(child) = min(1, r(node) p / q), and its leaf is accepted with all of it. A leaf that is
turned down is removed: its parent goes on with p <- [r p - q]+ and q without the token,
both normalised, and with r <- S / (S + 1 - r), where S is the mass of [r p - q]+; its
next child is tried, and with none left it is a leaf itself. The root has r = 1. The
token behind the accepted node comes from that node's current p.
(arXiv:2505.12398, for siblings drawn without replacement.)

A fixed child that carries this token starts over with r = 1, as the root of the draws
below it: they are independent of everything that happened so far.
"""

from __future__ import annotations

from vllm_treespec.core.verify.draws import DrawnRule

walk_traversal = DrawnRule("walk_traversal")
