from vllm_treespec.testing.divisions import Division, regions


def measured(rows, ratios, head_size=128):
    """Ratios of growing contexts, 1000, 2000, ..."""
    return [
        Division(head_size, rows, 1000 * place, ratio)
        for place, ratio in enumerate(ratios, start=1)
    ]


def test_it_is_divided_from_the_shortest_context_on_from_which_it_stays_faster():
    (region,) = regions(measured(32, [1.2, 0.9, 1.0, 0.8, 0.7]))
    assert region == {"head_size": 128, "min_rows": 1, "max_rows": 32, "min_keys": 4000}


def test_a_gain_within_noise_is_none():
    assert regions(measured(32, [1.2, 1.0, 0.96])) == []


def test_what_is_faster_everywhere_has_no_bound():
    # Graphs serve contexts of any length, so only this lets them divide.
    assert regions(measured(32, [0.9, 0.8]))[0]["min_keys"] == 0


def test_rows_between_two_sizes_go_by_the_larger():
    divisions = [*measured(64, [0.9]), *measured(16, [1.1]), *measured(32, [0.9])]
    bounds = [(each["min_rows"], each["max_rows"]) for each in regions(divisions)]
    assert bounds == [(17, 32), (33, 64)]


def test_head_sizes_are_kept_apart():
    divisions = [*measured(32, [1.1, 0.5], 64), *measured(32, [0.5, 0.5], 128)]
    bounds = {each["head_size"]: each["min_keys"] for each in regions(divisions)}
    assert bounds == {64: 2000, 128: 0}
