"""Walking a grammar along a tree, with a grammar that is a set of sentences."""

import random
from types import SimpleNamespace

import pytest
import torch
import xgrammar
from vllm.v1.structured_output import ConstraintBounds
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_treespec.integration.grammar import fill, traverse, walk


class Sentences:
    """What vLLM asks of a grammar, for all prefixes of these sentences."""

    def __init__(self, *sentences):
        self.sentences, self.said = sentences, []

    def _allows(self, tokens):
        return any(each[: len(tokens)] == tuple(tokens) for each in self.sentences)

    def is_terminated(self):
        return tuple(self.said) in self.sentences

    def validate_tokens(self, tokens):
        assert not self.is_terminated()
        return tokens if self._allows([*self.said, *tokens]) else []

    def accept_tokens(self, req_id, tokens):
        assert self.validate_tokens(tokens) == tokens
        self.said += tokens

    def fill_bitmask(self, bitmask, row):
        assert not self.is_terminated()
        bitmask[row] = [*self.said]

    def rollback(self, count):
        assert 0 < count <= len(self.said)
        del self.said[-count:]


def visited(grammar, nodes):
    rows = {}
    walk(grammar, "a", nodes, rows)
    assert grammar.said == []
    return rows


def test_a_node_is_filled_behind_its_own_path():
    grammar = Sentences((1, 2, 3), (1, 4, 5, 6), (7, 8))
    #        1 -> 2, 4 -> 5; 7; 9 is forbidden, and 3 below it
    nodes = [(1, -1), (7, -1), (2, 0), (4, 0), (5, 3), (9, -1), (3, 5)]
    assert visited(grammar, nodes) == {
        0: [1],
        1: [7],
        2: [1, 2],
        3: [1, 4],
        4: [1, 4, 5],
    }


def test_nothing_follows_the_end():
    grammar = Sentences((1, 2))
    assert visited(grammar, [(1, -1), (2, 0), (2, 1)]) == {0: [1]}


def test_padding_is_no_node():
    grammar = Sentences((1, 2))
    assert visited(grammar, [(1, -1), (-1, 0), (-1, -1)]) == {0: [1]}


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_visits_what_walking_each_path_alone_allows(seed):
    chance = random.Random(seed)
    sentences = [
        tuple(chance.randrange(3) for _ in range(chance.randrange(1, 6)))
        for _ in range(6)
    ]
    nodes = [(chance.randrange(3), chance.randrange(-1, n)) for n in range(25)]
    grammar = Sentences(*sentences)
    expected = {}
    for node in range(len(nodes)):
        path, place = [], node
        while place >= 0:
            path.insert(0, nodes[place][0])
            place = nodes[place][1]
        starts = [tuple(path[: length + 1]) for length in range(len(path))]
        if grammar._allows(path) and not {*starts} & {*sentences}:
            expected[node] = path
    assert visited(grammar, nodes) == expected


END, CALL = 8, 9  # of reasoning; a call is text already


def bounds_of(request, tokens):
    """As vLLM's, which it computes for a chain."""
    if request.is_open:
        for offset, token in enumerate(tokens):
            if token in (END, CALL):
                return ConstraintBounds(offset + (token == END), offset + 1)
        return ConstraintBounds(len(tokens) + 1, len(tokens) + 1)
    return ConstraintBounds(0, 0)


class Written(Sentences):
    """The rows are tensors: a word for each token said, -1 where there is none."""

    def fill_bitmask(self, bitmask, row):
        bitmask[row] = torch.tensor((self.said + [0] * 6)[:6])


def rows_of(grammar, nodes, *, is_open):
    structured = SimpleNamespace(grammar=grammar)
    request = SimpleNamespace(
        is_open=is_open, request_id="a", structured_output_request=structured
    )
    rows = torch.full((len(nodes) + 1, 6), -1)
    rows[0] = 77 if is_open else 0  # what is allowed while the model reasons
    fill(SimpleNamespace(_get_constraint_bounds=bounds_of), request, nodes, rows)
    assert grammar.said == []
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_a_grammar_starts_where_each_path_ends_the_reasoning(seed):
    chance = random.Random(seed)
    first = (1, 2, CALL)
    sentences = [
        (chance.choice(first), *(chance.randrange(1, 4) for _ in range(3)))
        for _ in range(6)
    ]
    tokens = (1, 2, 3, END, CALL)
    nodes = [(chance.choice(tokens), chance.randrange(-1, n)) for n in range(25)]
    rows = rows_of(Written(*sentences), nodes, is_open=True)
    for node in range(len(nodes)):
        path, place = [], node
        while place >= 0:
            path.insert(0, nodes[place][0])
            place = nodes[place][1]
        request = SimpleNamespace(is_open=True)
        start, constrained_from = bounds_of(request, path)
        said = path[start:]
        grammar = Written(*sentences)
        if constrained_from > len(path):
            assert set(rows[node + 1].tolist()) == {77}
        elif grammar._allows(said) and tuple(said) not in sentences:
            assert rows[node + 1].tolist() == (said + [0] * 6)[:6]
        else:  # nobody gets there
            assert set(rows[node + 1].tolist()) == {-1}


def test_padding_ends_no_reasoning():
    nodes = [(1, -1), (END, 0), (-1, 1), (-1, 0)]
    rows = rows_of(Written((1, 2)), nodes, is_open=True)
    assert rows[2].tolist() == [0] * 6, "behind the end the text begins"
    assert set(rows[1].tolist()) == {77}


def test_a_grammar_that_has_started_goes_on_at_the_root():
    rows = rows_of(Written((END, 2)), [(END, -1), (1, -1)], is_open=False)
    assert rows.tolist() == [[0] * 6, [END, 0, 0, 0, 0, 0], [-1] * 6]


JSON = [chr(code) if code < 128 else f"word{code}" for code in range(200)]
JSON[1] = "</s>"
JSON[130:135] = ['"a', '": ', "1,", "]}", "true"]


@pytest.mark.parametrize("said", ["", "{", '{"a": [', '{"a": 1', "{}"])
def test_xgrammars_own_traversal_fills_the_same_rows(said):
    info = xgrammar.TokenizerInfo(JSON, stop_token_ids=[1])
    rules = xgrammar.GrammarCompiler(info).compile_builtin_json_grammar()
    likely = [*map(ord, '{}[]",:1 a'), 1, *range(130, 135), -1]
    chance, num_reached = random.Random(0), 0
    for _ in range(20):
        grammar = XgrammarGrammar(len(JSON), xgrammar.GrammarMatcher(rules), rules)
        grammar.accept_tokens("a", [*map(ord, said)])
        nodes = [(chance.choice(likely), chance.randrange(-1, n)) for n in range(40)]
        walked = torch.full((41, 7), -1, dtype=torch.int32)
        grammar.fill_bitmask(walked, 0)
        traversed = walked.clone()
        walk(grammar, "a", nodes, walked[1:])
        traverse(grammar, nodes, traversed)
        assert torch.equal(walked, traversed)
        num_reached += int((walked[1:] != -1).any(dim=1).sum())
    assert num_reached > 20 or said == "{}", "only the end may follow"
