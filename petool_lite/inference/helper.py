"""`petool-lite call`, by a model loaded here or by a `serve` of the same file that runs already: the same reply. Such a
server listens on a socket in a folder that only its user can enter. Its name tells the model file, the context, this
installation and where the users' memory lies: a socket of that name answers as this process would."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from petool_lite.places import data_root, own_folder

if TYPE_CHECKING:
    import socket

    from petool_lite.inference.call import Request

ROUTE = "/helper"
_SAME = ("setting", "decoding", "trim_history", "reply_tokens", "explain", "at_least")  # as CallOptions calls them
OPTIONS = ("user", "store", "required", *_SAME)  # of the command line, beside the request itself


def answer(model: Path, n_ctx: int, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `call --json` prints of a call. `asked` holds `request` and the OPTIONS. Raises like `ToolCaller.call`."""
    if (found := _helped(_place(model, n_ctx), asked)) is not None:
        return found
    from petool_lite.inference.llama_open import preload

    preload(model)  # and meanwhile:
    from petool_lite.inference.call import ToolCaller

    reply, kept = ToolCaller(model, n_ctx).answer(asked_request(asked))  # not closed: the end of the process is quicker
    return reply.document(kept)


def asked_request(asked: Mapping[str, Any]) -> "Request":
    """The request that `asked` is."""
    from petool_lite.inference.call import AUTO, REQUIRED, CallOptions, Request

    options = CallOptions(choice=REQUIRED if asked["required"] else AUTO, **{name: asked[name] for name in _SAME})
    return Request(asked["request"], options, asked["user"], os.urandom(6).hex() if asked["store"] else None)


def _place(model: Path, n_ctx: int) -> Path | None:
    """Where a helper for this file listens; None where there is no such file or no safe folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folder = own_folder("petool-lite", Path(runtime)) if os.path.isabs(runtime) else own_folder("run")
    try:
        facts, own = model.stat(), Path(__file__).stat()
    except OSError:
        return None
    key = repr((facts.st_size, facts.st_dev, n_ctx, __file__, own.st_mtime_ns, str(data_root())))
    return folder and folder / f"{facts.st_ino:x}-{facts.st_mtime_ns:x}-{crc32(key.encode()):x}.sock"


def _helped(place: Path | None, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the helper answers; None where there is none, it is too busy, or the call fails: then it fails here, too."""
    if place is None or not place.exists():
        return None
    import socket

    body = json.dumps(asked).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as line:
        line.connect(str(place))
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        found = b"".join(iter(lambda: line.recv(1 << 16), b""))
        status, _, text = found.partition(b"\r\n\r\n")
        if status.startswith(b"HTTP/1.1 200 "):
            return dict(json.loads(text))
    return None


@contextmanager
def listening(model: Path, n_ctx: int) -> "Iterator[list[socket.socket]]":
    """The socket on which a server helps, in a list; none where another server does so already, or none can be made."""
    import socket

    if (place := _place(model, n_ctx)) is None:
        yield []
        return
    with socket.socket(socket.AF_UNIX) as line:
        made: list[socket.socket] = []
        with suppress(OSError), socket.socket(socket.AF_UNIX) as other:
            if place.exists() and other.connect_ex(str(place)):
                place.unlink()  # of a server that was killed
            line.bind(str(place))
            place.chmod(0o600)
            line.listen()
            made.append(line)
        try:
            yield made
        finally:
            if made:
                place.unlink(missing_ok=True)
