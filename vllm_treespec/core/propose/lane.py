"""A proposer on a thread of its own, so that one that stalls can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from vllm_treespec.core.propose import Proposer


class Answer:
    """What a call came to. As ``concurrent.futures.Future``, but waiting takes a
    fraction of the time, and every step waits."""

    __slots__ = ("_arrived",)

    def __init__(self) -> None:
        self._arrived: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def put(self, value: Any, error: BaseException | None) -> None:
        self._arrived.put((value, error))

    def result(self, timeout: float) -> Any:
        """Take it, once; raises what the call raised.

        Raises:
            TimeoutError: if it is not there within so many seconds.
        """
        try:
            value, error = self._arrived.get(timeout=timeout)
        except Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return value


Work = tuple[Callable[..., Any], tuple[Any, ...], Answer]


class Lane:
    """Does what it is asked to in order.

    ``concurrent.futures``' own pools would wait for a stalled thread when the
    interpreter exits; this one is a daemon.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        name = f"treespec-{proposer.name}"
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Answer:
        answer = Answer()
        self._work.put((call, arguments, answer))
        return answer

    def close(self) -> None:
        """End the thread once it has done what it was asked to."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            call, arguments, answer = work
            try:
                answer.put(call(*arguments), None)
            except BaseException as error:  # whoever waits for the result raises it
                answer.put(None, error)
