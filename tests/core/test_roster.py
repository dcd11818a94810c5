from vllm_treespec.core.roster import MAX_REST, Roster


def judge(roster, gains, seconds=(0.1, 0.1), num_emitted=100, total_seconds=1.0):
    roster.judge(
        num_emitted=num_emitted,
        gains=gains,
        seconds=seconds,
        total_seconds=total_seconds,
    )


def test_a_proposer_that_pays_keeps_drafting():
    roster = Roster(2)
    for _ in range(10):
        judge(roster, gains=(11, 30))
    assert roster.drafting == [True, True]


def test_a_proposer_that_costs_more_than_it_brings_rests_and_is_retried():
    roster = Roster(2)
    judge(roster, gains=(5, 30))
    assert roster.drafting == [False, True]
    judge(roster, gains=(0, 30), seconds=(0.0, 0.1))
    assert roster.drafting == [True, True]


def test_rests_grow_while_retries_fail_and_not_for_ever():
    roster = Roster(1)
    rests, resting = [], 0
    for _ in range(1000):
        judge(roster, gains=(0,), seconds=(0.1,))
        if roster.drafting[0]:
            rests.append(resting)
            resting = 0
        else:
            resting += 1
    assert rests[:5] == [1, 2, 4, 8, 16]
    assert max(rests) == MAX_REST


def test_a_proposer_that_pays_again_is_forgiven():
    roster = Roster(1)
    for gain in (0, 0, 0, 0, 50):
        judge(roster, gains=(gain,), seconds=(0.1,))
    while not roster.drafting[0]:
        judge(roster, gains=(50,), seconds=(0.1,))
    judge(roster, gains=(50,), seconds=(0.1,))
    judge(roster, gains=(0,), seconds=(0.1,))
    judge(roster, gains=(0,), seconds=(0.1,))
    assert roster.drafting[0]  # one window of rest, as the first time


def test_of_two_that_propose_the_same_one_stays():
    roster = Roster(2)
    judge(roster, gains=(0, 0), seconds=(0.1, 0.2))
    assert roster.drafting == [True, False]


def test_an_idle_window_judges_nobody():
    roster = Roster(2)
    judge(roster, gains=(0, 0), num_emitted=0)
    judge(roster, gains=(0, 0), total_seconds=0.0)
    assert roster.drafting == [True, True]
