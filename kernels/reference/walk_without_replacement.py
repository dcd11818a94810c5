import functools

from vllm_treespec.kernels.reference.drawn_trees import recursive_rejection, walk_rows

walk_without_replacement = functools.partial(walk_rows, recursive_rejection)
