"""Schedule: how many nodes may each request spend?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_treespec.core.propose import Candidates


def num_offered(
    candidates: Sequence[Candidates],  # one per proposer on the host
) -> npt.NDArray[np.int32]:  # [num_reqs]
    """Nodes that each row's tree can have at most, known without asking the device.

    Scheduling more would verify padding, so a request that nobody drafted for costs
    what it costs without speculation.
    """
    offered = np.zeros_like(candidates[0].num_candidates)
    for each in candidates:
        offered += each.num_candidates
    return offered
