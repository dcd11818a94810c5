"""Schedule: how many nodes may each request spend?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import Candidates


def num_useful_drafts(
    candidates: Sequence[Candidates],  # one per proposer
    budgets: npt.NDArray[np.int32],  # [num_reqs], nodes allowed, root excluded
) -> npt.NDArray[np.int32]:  # [num_reqs]
    """Nodes that each row's tree can have at most, known without asking the device.

    Scheduling more would verify padding, so a request that nobody drafted for costs
    what it costs without speculation.
    """
    offered = sum(each.num_candidates for each in candidates)
    return np.minimum(offered, budgets).astype(np.int32)
