import torch

from vllm_treespec.core.feedback import Feedback

CPU = torch.device("cpu")


def test_what_was_said_since_the_trees_were_rooted():
    token_ids = torch.arange(60).int().reshape(3, 20)
    num_tokens = torch.tensor([4, 9, 18], dtype=torch.int32)
    feedback = Feedback(3, 4, CPU)
    feedback.remember(torch.tensor([2, 0]), num_tokens)
    num_tokens += torch.tensor([3, 1, 2], dtype=torch.int32)
    emitted, counts = feedback.emitted(token_ids, num_tokens)
    assert counts.tolist() == [2, 3]
    assert emitted[0, :2].tolist() == [58, 59]
    assert emitted[1, :3].tolist() == [4, 5, 6]


def test_nothing_is_known_of_a_slot_that_another_request_took():
    token_ids = torch.zeros(2, 20, dtype=torch.int32)
    num_tokens = torch.tensor([5, 5], dtype=torch.int32)
    feedback = Feedback(2, 4, CPU)
    feedback.remember(torch.tensor([0, 1]), num_tokens)
    feedback.forget(1)
    num_tokens += 2
    assert feedback.emitted(token_ids, num_tokens)[1].tolist() == [2, 0]


def test_no_more_is_told_than_there_is_room_for():
    feedback = Feedback(1, 4, CPU)
    feedback.remember(torch.tensor([0]), torch.tensor([5], dtype=torch.int32))
    emitted, counts = feedback.emitted(
        torch.zeros(1, 20, dtype=torch.int32), torch.tensor([19], dtype=torch.int32)
    )
    assert counts.tolist() == [4]
    assert emitted.shape == (1, 4)


def test_before_the_first_step_there_is_nothing_to_tell():
    emitted, counts = Feedback(2, 4, CPU).emitted(
        torch.zeros(2, 20, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    )
    assert emitted.shape == (0, 4)
    assert counts.shape == (0,)
