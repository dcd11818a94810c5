import functools

from vllm_treespec.kernels.reference.drawn_trees import multi_step, walk_rows

walk_iid = functools.partial(walk_rows, multi_step)
