"""What a soak asks, and how an answer shows that it is right."""

from __future__ import annotations

import heapq
import inspect
import json
import random
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import regex

SCHEMA = {
    "type": "object",
    "properties": {
        "verb": {"enum": ["push", "pop"]},
        "sizes": {
            "type": "array",
            "items": {"enum": [0, 1, 2, 31]},
            "minItems": 2,
            "maxItems": 5,
        },
        "flag": {"type": "boolean"},
    },
    "required": ["verb", "sizes", "flag"],
    "additionalProperties": False,
}
# What the schema allows, as an expression, so that a cut answer can be judged too.
JSON = (
    r'\s*\{\s*"verb"\s*:\s*"(push|pop)"\s*,\s*"sizes"\s*:\s*'
    r"\[\s*(0|1|2|31)(\s*,\s*(0|1|2|31)){1,4}\s*\]\s*,"
    r'\s*"flag"\s*:\s*(true|false)\s*\}\s*'
)
CHOICES = ["def push(self, item):", "def pop(self):", "return None"]
CHOICE = "|".join(regex.escape(choice) for choice in CHOICES)
REGEX = r"(ab|cd){2,7};"
FLOOD = "unique text"

GREEDY, SEEDED = {"temperature": 0.0}, {"temperature": 0.9, "seed": 0}
PENALTIES = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
}
STOPS = {"stop": ["\n\n", "):", "self"]}
BY_JSON = {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
BY_CHOICE = {"structured_outputs": {"choice": CHOICES}}
BY_REGEX = {"structured_outputs": {"regex": REGEX}}
BIAS = {"bad_words": ["self", "return"], "logit_bias": {"7": 3.0}, "min_tokens": 4}


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests that differ in their prompts only. A ``seed`` is replaced by each's."""

    options: Mapping[str, Any]
    language: str | None = None  # expression that every whole answer matches

    @property
    def is_exact(self) -> bool:
        """Whether the answer must be the one that there is without speculation."""
        return self.options["temperature"] == 0 or "seed" in self.options


KINDS = {
    "greedy": Kind(GREEDY),
    "greedy, logprobs": Kind({**GREEDY, "logprobs": 2}),
    "greedy, penalties": Kind({**GREEDY, **PENALTIES}),
    "greedy, stop strings": Kind({**GREEDY, **STOPS}),
    "greedy, bad words, bias": Kind({**GREEDY, **BIAS}),
    "greedy, JSON": Kind({**GREEDY, **BY_JSON}, JSON),
    "greedy, regex": Kind({**GREEDY, **BY_REGEX}, REGEX),
    "seeded": Kind(SEEDED),
    "seeded, n=2, top-p": Kind({**SEEDED, "n": 2, "top_p": 0.9}),
    "seeded, logprobs, min-p": Kind({**SEEDED, "logprobs": 1, "min_p": 0.05}),
    "seeded, penalties, stops": Kind({**SEEDED, **PENALTIES, **STOPS}),
    "seeded, JSON": Kind({**SEEDED, **BY_JSON}, JSON),
    "seeded, choice": Kind({**SEEDED, **BY_CHOICE}, CHOICE),
    "sampled": Kind({"temperature": 1.0}),
    "sampled, n=2, stops": Kind({"temperature": 0.6, "n": 2, **STOPS}),
    "sampled, JSON": Kind({"temperature": 1.0, **BY_JSON}, JSON),
    "sampled, choice, n=2": Kind({"temperature": 1.2, "n": 2, **BY_CHOICE}, CHOICE),
    "sampled, regex": Kind({"temperature": 0.5, **BY_REGEX}, REGEX),
    FLOOD: Kind({"temperature": 1.0}),
}


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request, of the completions API or of the chat API. Equal to itself only."""

    kind: str
    is_chat: bool
    prompt: str
    options: Mapping[str, Any]

    @property
    def num_choices(self) -> int:
        return int(self.options.get("n", 1))

    @property
    def body(self) -> dict[str, Any]:
        if not self.is_chat:
            return {"prompt": self.prompt, **self.options}
        body = {"messages": [{"role": "user", "content": self.prompt}], **self.options}
        if "logprobs" in body:
            body |= {"logprobs": True, "top_logprobs": self.options["logprobs"]}
        return body


@dataclass(slots=True)
class Choice:
    """What came back for one of ``n``."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[tuple[str, float]] = field(default_factory=list)  # token, nats


@dataclass(slots=True)
class Answer:
    """What came back, put together from the parts of a stream or from one whole."""

    choices: dict[int, Choice] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_tokens: int = 0  # of all choices

    def add(self, part: Mapping[str, Any]) -> None:
        for each in part["choices"]:
            choice = self.choices.setdefault(each["index"], Choice())
            choice.text += _text(each)
            choice.finish_reason = each["finish_reason"] or choice.finish_reason
            choice.stop_reason = each.get("stop_reason") or choice.stop_reason
            choice.logprobs += _logprobs(each.get("logprobs"))
        if usage := part.get("usage"):
            self.num_prompt_tokens = usage["prompt_tokens"]
            self.num_tokens = usage["completion_tokens"]


def _text(choice: Mapping[str, Any]) -> str:
    for holder in ("message", "delta"):
        if holder in choice:
            return choice[holder].get("content") or ""
    return str(choice["text"])


def _logprobs(found: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    if not found:
        return []
    if "content" in found:  # chat
        return [(each["token"], each["logprob"]) for each in found["content"] or ()]
    return list(zip(found["tokens"], found["token_logprobs"], strict=True))


def make_requests(count: int, seed: int) -> list[Request]:
    """Requests of all kinds but ``FLOOD`` in turn, always the same for a ``seed``."""
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if kind != FLOOD]
    sources = [inspect.getsource(module) for module in (heapq, json, textwrap)]
    requests = []
    for number in range(count):
        source = rng.choice(sources)
        # Some share their beginning, for the prefix cache.
        start = rng.choice((0, 0, rng.randrange(len(source) - 300)))
        prompt = source[start : start + rng.randint(8, 240)]
        requests.append(_request(kinds[number % len(kinds)], prompt, rng))
    return requests


def flood(rng: random.Random) -> Request:
    """Text that nobody wrote before, so that nothing that is remembered helps."""
    prompt = " ".join(f"{rng.randrange(16**6):x}" for _ in range(32))
    return _request(FLOOD, prompt, rng)


def _request(kind: str, prompt: str, rng: random.Random) -> Request:
    options = dict(KINDS[kind].options)
    if "seed" in options:
        options["seed"] = rng.randrange(2**31)
    longest = 40 if KINDS[kind].language else 20
    return Request(
        kind=kind,
        is_chat=rng.random() < 0.4,
        prompt=prompt,
        options={**options, "max_tokens": rng.randint(longest // 4, longest)},
    )


def loss(request: Request, answer: Answer) -> str | None:
    """How an answer that nobody aborted is incomplete; None: it is not."""
    if answer.choices.keys() != set(range(request.num_choices)):
        return f"has choices {sorted(answer.choices)} of {request.num_choices}"
    for choice in answer.choices.values():
        if choice.finish_reason not in ("stop", "length"):
            return f"finished by {choice.finish_reason}"
    return None


def fault(request: Request, answer: Answer, expected: Answer | None) -> str | None:
    """What is wrong with a whole answer; ``expected``: the one it must be, if any."""
    kind = KINDS[request.kind]
    if kind.language:
        for choice in answer.choices.values():
            is_cut = choice.finish_reason == "length"
            if not regex.fullmatch(kind.language, choice.text, partial=is_cut):
                return f"disobeys its grammar: {choice.text!r}"
    if answer.num_tokens > request.num_choices * request.options["max_tokens"]:
        return f"has {answer.num_tokens} tokens"
    return _difference(answer, expected) if expected else None


def _difference(answer: Answer, expected: Answer) -> str | None:
    for index, wanted in expected.choices.items():
        got = answer.choices[index]
        ends = got.text, got.finish_reason, got.stop_reason
        wanted_ends = wanted.text, wanted.finish_reason, wanted.stop_reason
        if ends != wanted_ends:
            return f"is {ends}, not {wanted_ends}"
        if not _same_logprobs(got.logprobs, wanted.logprobs):
            return f"logprobs {got.logprobs}, not {wanted.logprobs}"
    if answer.num_tokens != expected.num_tokens:
        return f"{answer.num_tokens} tokens, not {expected.num_tokens}"
    return None


def _same_logprobs(
    got: Sequence[tuple[str, float]], wanted: Sequence[tuple[str, float]]
) -> bool:
    return len(got) == len(wanted) and all(
        mine[0] == theirs[0] and abs(mine[1] - theirs[1]) < 1e-3
        for mine, theirs in zip(got, wanted, strict=True)
    )


def fault_of_part(answer: Answer, expected: Answer | None) -> str | None:
    """What is wrong with an answer that was aborted."""
    for index, choice in answer.choices.items():
        if expected and not expected.choices[index].text.startswith(choice.text):
            return f"begins {choice.text!r}, not as {expected.choices[index].text!r}"
    return None
