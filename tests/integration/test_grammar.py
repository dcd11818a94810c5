"""Walking a grammar along a tree, with a grammar that is a set of sentences."""

import random

import pytest
import torch
import xgrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from vllm_treespec.integration.grammar import traverse, walk


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
