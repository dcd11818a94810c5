import functools

from vllm_treespec.kernels.reference.drawn_trees import traversal, walk_rows

walk_traversal = functools.partial(walk_rows, traversal)
