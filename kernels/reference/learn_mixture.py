import torch

from vllm_treespec.kernels.mixing import MAX_CHANGE, MEMORY, PRIOR_CURVATURE


def learn_mixture(
    sums: torch.Tensor,
    slopes: torch.Tensor,
    offsets: torch.Tensor,
    memory: torch.Tensor,
) -> None:
    known, slope_error, offset_error, *bends = sums.sum(0).T
    memory += torch.stack([known, *bends], 1)
    memory *= MEMORY / memory[:, :1].clamp(min=MEMORY)
    _, slope_bend, both_bend, offset_bend = memory.T
    slope_bend = slope_bend + PRIOR_CURVATURE
    offset_bend = offset_bend + PRIOR_CURVATURE
    determinant = slope_bend * offset_bend - both_bend**2
    slope_step = (offset_bend * slope_error - both_bend * offset_error) / determinant
    # No voice is heard as the opposite of what it says.
    change = (-slope_step).clamp(-MAX_CHANGE, MAX_CHANGE).maximum(-slopes)
    slopes += change
    # The best offset for what the slope has become.
    offset_step = (offset_error + both_bend * change) / offset_bend
    offsets -= offset_step.clamp(-MAX_CHANGE, MAX_CHANGE)
