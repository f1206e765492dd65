"""Tools of running MCP servers, through the official package `mcp`: listed, named by their server, and run. A server, a
command or an address, is opened for one question within a time limit: one that dies, hangs or floods costs one line."""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from petool_lite.data.entries import Tool
from petool_lite.data.openai import tool_json
from petool_lite.errors import USAGE, PetoolError, first_line, in_words

T = TypeVar("T")

LIST_S, RUN_S = 30.0, 300.0  # seconds that a server may take to tell its tools, and to run one
_MOST = 1000  # tools of one server
_LONGEST, _ANSWER = 1 << 16, 1 << 26  # characters of a result, and bytes of an answer over HTTP
_OURS = ("PETOOL_LITE_API_KEY", "PETOOL_LITE_ENDPOINT_KEY")  # keys that are no server's business
_NAMED = re.compile(r"(?:([a-z][a-z0-9-]*)=)?(.+)", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """What a tool answered, as text; `failed` where the tool itself says so."""

    text: str
    failed: bool


class Servers:
    """MCP servers, each given as `COMMAND`, `URL` or `NAME=` before either."""

    def __init__(self, given: Sequence[str], list_s: float = LIST_S, run_s: float = RUN_S) -> None:
        """Nothing is started yet. `list_s` and `run_s` in seconds. Raises PetoolError for what is no command."""
        import mcp  # noqa: F401 - said now where it is not installed

        for name in ("mcp", "asyncio"):  # what goes wrong is raised and told in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._servers = [_Server(text, list_s, run_s) for text in given]
        self._owners: dict[str, tuple[_Server, str]] = {}  # by the full name: the server, and what it calls the tool

    def tools(self) -> list[dict[str, Any]]:
        """All servers' tools, OpenAI's form, named `server__tool`. Raises PetoolError for no answer, or equal names."""

        async def every() -> list[Any]:
            return list(await asyncio.gather(*(server.listed() for server in self._servers), return_exceptions=True))

        found = asyncio.run(every())
        if failed := [item for item in found if isinstance(item, BaseException)]:
            raise failed[0]
        names = [name for name, _ in found]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise PetoolError(f"two MCP servers call themselves {double}", "name one of them: --mcp NAME=COMMAND")
        offered = {f"{name}__{tool.name}": (server, tool)
                   for server, (name, tools) in zip(self._servers, found, strict=True) for tool in tools}  # fmt: skip
        if not offered:
            raise PetoolError("the MCP server offers no tools" if len(names) == 1 else "no MCP server offers any tool")
        self._owners = {full: (server, tool.name) for full, (server, tool) in offered.items()}
        return [tool_json(Tool(full, tool.description or "", tool.input_schema)) for full, (_, tool) in offered.items()]

    def run(self, name: str, arguments: Mapping[str, Any]) -> Result:
        """Run a tool that `tools` has told, by its full name. Raises PetoolError where the server does not answer."""
        server, own = self._owners[name]
        return asyncio.run(server.called(own, dict(arguments)))


class _Server:
    """One server; opened for each question."""

    def __init__(self, text: str, list_s: float, run_s: float) -> None:
        if (named := _NAMED.fullmatch(text.strip())) is None:
            raise PetoolError("--mcp is empty", "expected a command, or an address with http://", USAGE)
        self._name, self._where = named.groups()
        self.label = self._name or (self._where if len(self._where) < 60 else f"{self._where[:57]}...")
        self._list_s, self._run_s = list_s, run_s
        self._is_url = self._where.startswith(("http://", "https://"))
        with in_words(f"--mcp {self.label}", "quote it as a shell would", ValueError, exit_code=USAGE):
            self._words = [self._where] if self._is_url else shlex.split(self._where)

    async def listed(self) -> tuple[str, list[Any]]:
        """The server's name, which has no `_`, and its tools as the package gives them."""

        async def work(client: Any) -> tuple[str, list[Any]]:
            page = await client.list_tools()
            tools = list(page.tools)
            while page.next_cursor and len(tools) <= _MOST:
                page = await client.list_tools(cursor=page.next_cursor)
                tools += page.tools
            if len(tools) > _MOST:
                raise PetoolError(f"the MCP server {self.label} offers more than {_MOST:,} tools")
            told = client.server_info.name if client.server_info else ""
            return self._name or re.sub(r"[^A-Za-z0-9-]+", "-", told).strip("-") or "server", tools

        return await self._asked(work, self._list_s)

    async def called(self, tool: str, arguments: dict[str, Any]) -> Result:
        """What a tool answers."""

        async def work(client: Any) -> Result:
            found = await client.call_tool(tool, arguments)
            parts = [getattr(block, "text", None) or f"[{block.type}]" for block in found.content]
            text = "\n".join(parts) or ("" if found.structured_content is None else str(found.structured_content))
            text = text.encode("utf-8", "replace").decode()
            cut = f"{text[:_LONGEST]}... [{len(text):,} characters]" if len(text) > _LONGEST else text
            return Result(cut, bool(found.is_error))

        return await self._asked(work, self._run_s)

    async def _asked(self, work: Callable[[Any], Awaitable[T]], seconds: float) -> T:
        import anyio
        from mcp import Client, StdioServerParameters, stdio_client

        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            if self._is_url:
                transport: Any = _over_http(self._where)
            else:
                own = {name: value for name, value in os.environ.items() if name not in _OURS}
                command, *words = self._words
                line = StdioServerParameters(command=command, args=words, env=own, encoding_error_handler="replace")
                transport = stdio_client(line, errlog=said)
            try:
                with anyio.fail_after(seconds):
                    async with Client(transport) as client:
                        return await work(client)
            except Exception as error:  # whatever it does and the package raises, alone or in a group
                raise self._told(error, seconds, said.fileno()) from error

    def _told(self, error: BaseException, seconds: float, said: int) -> PetoolError:
        """What went wrong, and the last line that the server wrote to its stderr, the file `said`."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, PetoolError):
            return error
        what = f"did not answer within {seconds:g} s" if isinstance(error, TimeoutError) else first_line(error)[:200]
        raw = os.pread(said, 2000, max(0, os.fstat(said).st_size - 2000)).decode("utf-8", "replace")
        shown = "".join(letter if letter.isprintable() else "\n" for letter in raw).strip()
        last = shown.rpartition("\n")[2].strip()[:200]
        hint = f"it said last: {last}" if last else "" if self._is_url else "run the command by itself to see why"
        return PetoolError(f"the MCP server {self.label}: {what}", hint)


@contextlib.asynccontextmanager
async def _over_http(url: str) -> AsyncIterator[Any]:
    """The package's transport, which alone would take an answer without an end into memory."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    class Bounded(httpx2.AsyncByteStream):
        whole: Any

        async def __aiter__(self) -> AsyncIterator[bytes]:
            left = _ANSWER
            async for part in self.whole:
                if (left := left - len(part)) < 0:
                    raise httpx2.ReadError(f"an answer of more than {_ANSWER:,} bytes")
                yield part

    async def bound(response: Any) -> None:
        stream = Bounded()
        stream.whole, response.stream = response.stream, stream

    client = httpx2.AsyncClient(timeout=None, event_hooks={"response": [bound]})  # _asked has the limit of time
    async with client, streamable_http_client(url, http_client=client) as streams:
        yield streams
