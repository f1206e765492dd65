"""The way of a request to the engine: it waits for a slot, runs, and ends early when its client leaves."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from petool_lite.errors import PetoolError
from petool_lite.inference.worker import Engine, Event, Helped, Request
from petool_lite.serve.requests import Refusal


@dataclass(eq=False)
class _Place:
    """A request's place in the queue; `turn` is done when it has a slot."""

    user: str | None
    number: int
    turn: asyncio.Future[None]


class Turns:
    """Slots, and who gets the next one: a user of whom less runs, then one who was served longer ago, then who came
    first. So a user with many requests keeps no other one waiting; requests without a user are one user's."""

    def __init__(self, slots: int) -> None:
        self._free, self._running, self._waiting = slots, Counter[str | None](), list[_Place]()
        self._served: dict[str | None, int] = {}  # of those who run or wait: which request of all was their last
        self._numbers = itertools.count(1)

    async def take(self, user: str | None) -> None:
        """Wait for a slot; cancelled, the place in the queue is given up."""
        place = _Place(user, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting.append(place)
        self._next()
        try:
            await place.turn
        except asyncio.CancelledError:
            if place in self._waiting:
                self._waiting.remove(place)
            else:
                self.give_back(user)
            raise

    def give_back(self, user: str | None) -> None:
        """The slot is free again."""
        self._running[user] -= 1
        self._free += 1
        self._next()

    def _next(self) -> None:
        while self._free and (wanted := [item for item in self._waiting if not item.turn.cancelled()]):
            place = min(
                wanted, key=lambda item: (self._running[item.user], self._served.get(item.user, 0), item.number)
            )
            self._waiting.remove(place)
            self._free -= 1
            self._running[place.user] += 1
            self._served[place.user] = next(self._numbers)
            place.turn.set_result(None)
        present = {item.user for item in self._waiting} | {user for user, count in self._running.items() if count}
        self._served = {user: number for user, number in self._served.items() if user in present}
        self._running = +self._running


class RequestQueue:
    """Takes requests to the engine, and turns those away that find the queue full."""

    def __init__(self, settings: Any) -> None:
        """`settings` are ServeSettings."""
        self.settings = settings
        self.engine = Engine(settings.model, settings.n_ctx, settings.slots)
        self._turns = Turns(settings.slots)
        self._threads = ThreadPoolExecutor(settings.slots, "slot")
        self.present = 0  # requests that run or wait

    async def events(self, request: Request | Helped, left: Callable[[], Awaitable[None]]) -> AsyncIterator[Event]:
        """Events of one request, see `Engine.ask`; `left` returns when its client has gone, which ends it. A client
        that reads slowly keeps nobody waiting: the events are kept for it. Raises Refusal where the queue is full or
        the wait too long."""
        if self.present >= self.settings.queue + self.settings.slots:
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

    async def _served(self, request: Request | Helped, found: "asyncio.Queue[Event | Refusal | None]") -> None:
        deadline = time.monotonic() + self.settings.timeout_s
        try:
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    await self._turns.take(request.user)
            except TimeoutError:
                found.put_nowait(Refusal(504, "the request waited longer than the server allows", kind="timeout"))
                return
            try:
                await self._run(request, deadline, found)
            finally:
                self._turns.give_back(request.user)
        finally:
            self.present -= 1
            found.put_nowait(None)

    async def _run(self, request: Request | Helped, deadline: float, found: "asyncio.Queue[Any]") -> None:
        """Run the engine's blocking calls on a thread; cancelled, wait until the engine has heard of it."""
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()
        if isinstance(request, Request):
            own, options = self.settings, request.options
            trims = own.trim_history or options.trim_history
            request = replace(request, options=replace(options, decoding=own.decoding, trim_history=trims))

        def work() -> None:
            try:
                for event in self.engine.ask(request, deadline, cancelled):
                    loop.call_soon_threadsafe(found.put_nowait, event)
            except PetoolError as error:  # it died and cannot be started again
                failed: Event = ("failed", {"kind": "engine_error", "message": error.message})
                loop.call_soon_threadsafe(found.put_nowait, failed)

        running = loop.run_in_executor(self._threads, work)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([running])
            raise
