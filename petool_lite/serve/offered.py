"""The tools that `serve --mcp` offers where a request brings none."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from petool_lite.console import say
from petool_lite.data.mcp import Servers
from petool_lite.errors import PetoolError

_FRESH_S = 30.0  # after which the servers are asked again, when a request wants their tools


class OfferedTools:
    """The tools of MCP servers as they were a moment ago: a server that changes or dies keeps no request waiting."""

    def __init__(self, given: Sequence[str], fresh_s: float = _FRESH_S) -> None:
        """Ask the servers. Raises PetoolError where one does not answer: better now than amid requests."""
        self._servers, self._fresh_s, self._said = Servers(given), fresh_s, ""
        self._listed, self._asked = self._servers.tools(), time.monotonic()
        self._asking = threading.Lock()  # by one thread at a time

    def current(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form; where they are not fresh, a thread asks for those of the next request."""
        if time.monotonic() - self._asked > self._fresh_s and self._asking.acquire(blocking=False):
            threading.Thread(target=self._ask, daemon=True).start()
        return self._listed

    def _ask(self) -> None:
        try:
            self._listed, self._said = self._servers.tools(), ""
        except PetoolError as error:
            if error.message != self._said:
                say(f"note: {error.message}; its tools of before are still offered")
            self._said = error.message
        finally:
            self._asked = time.monotonic()
            self._asking.release()
