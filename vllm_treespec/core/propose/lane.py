"""A proposer on a thread of its own, so that one that stalls can be left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from vllm_treespec.core.propose import Proposer

Work = tuple[Callable[..., Any], tuple[Any, ...], "Future[Any]"]


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

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        self._work.put((call, arguments, done))
        return done

    def close(self) -> None:
        """End the thread once it has done what it was asked to."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            call, arguments, done = work
            try:
                done.set_result(call(*arguments))
            except BaseException as error:  # whoever waits for the result raises it
                done.set_exception(error)
