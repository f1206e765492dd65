"""The one way of a request to the one engine: it waits for its turn, runs, and ends early when its client leaves."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.inference.worker import Engine, Event, Request
from petool_lite.serve.requests import Refusal


class RequestQueue:
    """Takes requests in their order to the engine, and turns those away that find the queue full."""

    def __init__(self, settings: Any) -> None:
        """`settings` are ServeSettings."""
        self.settings = settings
        self.engine = Engine(settings.model, settings.n_ctx)
        self._turn = asyncio.Lock()
        self.present = 0  # requests that run or wait

    async def events(self, request: Request, left: Callable[[], Awaitable[None]]) -> AsyncIterator[Event]:
        """Events of one request, see `Engine.ask`; `left` returns when its client has gone, which ends it.

        A client that reads slowly keeps nobody waiting: the events are kept for it. Raises Refusal where the queue is
        full or the wait too long.
        """
        if self.present > self.settings.queue:
            raise Refusal(429, "the queue is full; try again later", kind="rate_limit_error")
        self.present += 1
        found = asyncio.Queue[Event | Refusal | None]()
        served = asyncio.create_task(self._served(request, found))
        watcher = asyncio.ensure_future(left())
        watcher.add_done_callback(lambda _: served.cancel())
        try:
            while (event := await found.get()) is not None:
                if isinstance(event, Refusal):
                    raise event
                yield event
        finally:
            watcher.cancel()  # and with it what still runs

    async def _served(self, request: Request, found: "asyncio.Queue[Event | Refusal | None]") -> None:
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            try:
                await asyncio.wait_for(self._turn.acquire(), self.settings.timeout_s)
            except TimeoutError:
                found.put_nowait(Refusal(504, "the request waited longer than the server allows", kind="timeout"))
                return
            try:
                await self._run(request, deadline, found)
            finally:
                self._turn.release()
        finally:
            self.present -= 1
            found.put_nowait(None)

    async def _run(self, request: Request, deadline: float, found: "asyncio.Queue[Any]") -> None:
        """Run the engine's blocking calls on a thread; cancelled, wait until the engine has heard of it."""
        loop = asyncio.get_running_loop()
        own = self.settings
        options = replace(
            request.options, decoding=own.decoding, trim_history=own.trim_history or request.options.trim_history
        )

        def work() -> None:
            try:
                for event in self.engine.ask(replace(request, options=options), deadline):
                    loop.call_soon_threadsafe(found.put_nowait, event)
            except PetoolError as error:  # it died and cannot be started again
                failed: Event = ("failed", {"kind": "engine_error", "message": error.message})
                loop.call_soon_threadsafe(found.put_nowait, failed)

        running = loop.run_in_executor(None, work)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            self.engine.cancel()
            await asyncio.wait([running])
            raise
