"""A soak: requests of every kind, for a while, each answer checked, memory watched."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from vllm_treespec.testing.servers import MODEL_NAME, Server
from vllm_treespec.testing.soak_requests import (
    KINDS,
    Answer,
    Request,
    fault,
    fault_of_part,
    flood,
    loss,
)

FLOOD_RATE = 0.2
ABORT_RATE = 0.1
PATIENCE_S = 300.0  # an answer that takes longer is lost
SECONDS_BETWEEN_SAMPLES = 1.0


@dataclass(slots=True)
class Tally:
    """What became of the requests of one kind."""

    num_asked: int = 0
    num_aborted: int = 0
    num_right: int = 0
    latencies_s: list[float] = field(default_factory=list)  # of whole answers
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Record:
    """What a soak saw."""

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    memory_mb: list[tuple[float, float]] = field(default_factory=list)  # [s, MB]

    @property
    def num_tokens_in_all(self) -> int:
        """Those of prompts, too: what a suffix cache learns."""
        return self.num_prompt_tokens + self.num_tokens


def connect(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    )


async def ask(client: openai.AsyncOpenAI, request: Request) -> Answer:
    """The whole answer, in one piece."""
    create: Any = (
        client.chat.completions.create if request.is_chat else client.completions.create
    )
    response = await create(**_body(request))
    answer = Answer()
    answer.add(response.model_dump())
    return answer


async def stream(
    client: openai.AsyncOpenAI, request: Request
) -> AsyncGenerator[Answer, None]:
    """The answer as it grows. Whoever stops listening disconnects."""
    create: Any = (
        client.chat.completions.create if request.is_chat else client.completions.create
    )
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = Answer()
    async with await create(**_body(request), **options) as parts:
        async for part in parts:
            answer.add(part.model_dump())
            yield answer


def _body(request: Request) -> dict[str, Any]:
    """vLLM's own options are unknown to the client, so all of them go around it."""
    content = "messages" if request.is_chat else "prompt"
    options = request.body
    return {
        "model": MODEL_NAME,
        content: options.pop(content),
        "extra_body": options,
    }


async def references(
    server: Server, requests: Sequence[Request]
) -> dict[Request, Answer]:
    """What a server without speculation answers where just that is promised."""
    gate = asyncio.Semaphore(4)
    answers = {}

    async def ask_one(client: openai.AsyncOpenAI, request: Request) -> None:
        async with gate:
            answers[request] = await ask(client, request)
        assert not (why := loss(request, answers[request])), f"the reference {why}"

    async with connect(server) as client:
        exact = [each for each in requests if KINDS[each.kind].is_exact]
        await asyncio.gather(*(ask_one(client, each) for each in exact))
    return answers


async def warm_up(server: Server, max_num_rows: int) -> None:
    """Run a batch of every size once.

    On a CPU, vLLM's matrix products keep a plan for every number of rows, some 13 KiB
    in each layer. That is bounded, but it takes long to come by chance.
    """
    rng = random.Random(0)
    async with connect(server) as client:
        for num_rows in range(1, max_num_rows + 1):
            # Tokens that no prefix cache knows. The second one may have drafts.
            prompt = [rng.randrange(100, 2000) for _ in range(num_rows)]
            await client.completions.create(
                model=MODEL_NAME, prompt=prompt, max_tokens=2
            )


class Soak:
    """Keeps a server busy and judges what it answers."""

    def __init__(
        self,
        server: Server,
        requests: Sequence[Request],
        answers: Mapping[Request, Answer],  # of those whose answer is fixed
        seed: int,
    ) -> None:
        self._server = server
        self._requests = requests
        self._answers = answers
        self._seed = seed
        self._deadline = 0.0
        self._num_tokens = 0
        self.record = Record()

    async def run(self, seconds: float, num_tokens: int, concurrency: int) -> Record:
        """Ask for that long, on a slow machine until ``num_tokens`` went through."""
        self._num_tokens = num_tokens
        start = time.monotonic()
        self._deadline = start + seconds
        watch = asyncio.create_task(self._watch_memory(start))
        async with connect(self._server) as client:
            await asyncio.gather(
                *(self._keep_asking(client, number) for number in range(concurrency))
            )
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        self.record.seconds = time.monotonic() - start
        return self.record

    async def _watch_memory(self, start: float) -> None:
        while True:
            sample = time.monotonic() - start, self._server.resident_mb()
            self.record.memory_mb.append(sample)
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)

    async def _keep_asking(self, client: openai.AsyncOpenAI, number: int) -> None:
        rng = random.Random(f"{self._seed} {number}")
        while not self._is_over():
            floods = rng.random() < FLOOD_RATE
            request = flood(rng) if floods else rng.choice(self._requests)
            tally = self.record.tallies[request.kind]
            tally.num_asked += 1
            try:
                if rng.random() < ABORT_RATE:
                    await self._leave_early(client, request, rng)
                else:
                    await self._wait_for_all(client, request, rng)
            except (openai.APIError, httpx.HTTPError) as error:
                tally.lost.append(f"{request}: {error!r}")

    def _is_over(self) -> bool:
        if self._server.process.poll() is not None:
            return True
        is_filled = self.record.num_tokens_in_all >= self._num_tokens
        return is_filled and time.monotonic() >= self._deadline

    async def _wait_for_all(
        self, client: openai.AsyncOpenAI, request: Request, rng: random.Random
    ) -> None:
        tally, start = self.record.tallies[request.kind], time.monotonic()
        if rng.random() < 0.5:
            answer = await ask(client, request)
        else:
            answer = Answer()
            async with aclosing(stream(client, request)) as parts:
                async for part in parts:
                    answer = part
        tally.latencies_s.append(time.monotonic() - start)
        self.record.num_prompt_tokens += answer.num_prompt_tokens
        self.record.num_tokens += answer.num_tokens
        if why := loss(request, answer):
            tally.lost.append(f"{request}: {why}")
        elif why := fault(request, answer, self._answers.get(request)):
            tally.wrong.append(f"{request}: {why}")
        else:
            tally.num_right += 1

    async def _leave_early(
        self, client: openai.AsyncOpenAI, request: Request, rng: random.Random
    ) -> None:
        tally = self.record.tallies[request.kind]
        tally.num_aborted += 1
        num_parts, answer = rng.randrange(6), Answer()
        if num_parts == 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0.0, 1.0)):
                    await ask(client, request)
            return
        async with aclosing(stream(client, request)) as parts:
            async for part in parts:
                num_parts, answer = num_parts - 1, part
                if num_parts == 0:
                    break
        if why := fault_of_part(answer, self._answers.get(request)):
            tally.wrong.append(f"{request}: {why}")
