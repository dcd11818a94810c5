import pytest

from vllm_treespec.integration.cuda_graphs import GraphedRows, capture_sizes


@pytest.mark.parametrize(
    ("max_num_rows", "sizes"),
    [(0, []), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_powers_of_two_and_the_largest_batch_are_captured(max_num_rows, sizes):
    assert capture_sizes(max_num_rows) == sizes


def test_without_graphs_the_work_is_done_as_it_is():
    seen = []
    graphed = GraphedRows(seen.append)
    graphed(3)
    assert seen == [3]


def test_a_batch_runs_in_the_next_larger_graph():
    class Graph:
        def __init__(self, size):
            self.size = size

        def replay(self):
            seen.append(("graph", self.size))

    seen = []
    graphed = GraphedRows(lambda num_rows: seen.append(("as it is", num_rows)))
    graphed._sizes = [1, 2, 4]
    graphed._graphs = {size: Graph(size) for size in graphed._sizes}
    for num_rows in (1, 3, 4, 5):
        graphed(num_rows)
    assert seen == [("graph", 1), ("graph", 4), ("graph", 4), ("as it is", 5)]
