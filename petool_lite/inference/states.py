"""What the engine has read for a user, kept on disk, so that a returning user's prompt is not read again. There is one
file a user. It holds a key (facts of model, settings and library that must be equal for a state to be of use), the
token ids that were read, the engine's state after them and a checksum. A file that is damaged, foreign or of another
key is ignored and written anew. Only its owner may read it; the least recently used go first at a limit."""

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash  # 10 GB/s: a 3B model's state of 3,000 tokens has 340 MB

from petool_lite.places import cache_root
from petool_lite.runs import draft

_MAGIC = b"petool-lite state 2\n"  # then a line of JSON, the key and the ids; the engine's state; the checksum
_CHECK = 16  # bytes of the checksum
DEFAULT_LIMIT = 4 * 2**30  # bytes of all files together
_STALE = 3600  # seconds after which a half-written file of a killed process is removed


class StateStore:
    """The users' files under one folder."""

    def __init__(self, root: Path | None = None, limit: int = DEFAULT_LIMIT) -> None:
        """`root` is made if absent (the cache's `users` if None); `limit` in bytes for all files together."""
        self.root, self.limit = root or cache_root() / "users", limit

    def path(self, user: str) -> Path:
        """The file of a user; its name tells nothing of the user's."""
        return self.root / f"{hashlib.sha256(user.encode()).hexdigest()[:40]}.state"

    def read(self, user: str, key: Mapping[str, Any]) -> tuple[list[int], memoryview] | None:
        """The ids read for the user and the engine's state after them, in mapped memory; None without a sound file."""
        path = self.path(user)
        with contextlib.suppress(OSError, ValueError):
            with path.open("rb") as file:
                owned = os.fstat(file.fileno())
                if owned.st_uid != os.getuid() or owned.st_mode & 0o077:
                    return None  # another user's, or one that others may have written to
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view = memoryview(mapped)  # which lives as long as its parts
            body = mapped.find(b"\n", len(_MAGIC)) + 1
            if view[: len(_MAGIC)] != _MAGIC or not 0 < body <= len(view) - _CHECK:
                return None
            facts = json.loads(bytes(view[len(_MAGIC) : body]))
            ids = facts.pop("ids", [])
            if facts == key and xxhash.xxh3_128(view[:-_CHECK]).digest() == bytes(view[-_CHECK:]):
                with contextlib.suppress(OSError):
                    os.utime(path)  # least recently used goes first
                return ids, view[body:-_CHECK]
        return None

    def save(self, user: str, key: Mapping[str, Any], ids: Sequence[int], data: memoryview) -> int:
        """Write the user's file in one step and make room for it; returns its bytes, 0 if it alone exceeds the limit. A
        reader sees the old file or the new one; so does the next start after a crash. Raises OSError."""
        head = _MAGIC + json.dumps({**key, "ids": list(ids)}).encode() + b"\n"
        size = len(head) + data.nbytes + _CHECK
        if size > self.limit:
            return 0
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(size, self.path(user))
        with draft(self.path(user)) as path, open(path, "wb", opener=partial(os.open, mode=0o600)) as file:
            check = xxhash.xxh3_128(head)
            check.update(data)
            for part in (head, data, check.digest()):
                file.write(part)
        return size

    def forget(self, user: str) -> None:
        """Remove the user's file, if any."""
        self.path(user).unlink(missing_ok=True)

    def _make_room(self, size: int, keep: Path) -> None:
        files, total = [], size
        for path in {*self.root.glob("*.state"), *self.root.glob(".*.draft")} - {keep}:
            with contextlib.suppress(OSError):  # another process removed it
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
                total += facts.st_size
        for written, freed, path in sorted(files):
            stale = path.suffix == ".draft" and time.time() - written > _STALE
            if stale or (path.suffix == ".state" and total > self.limit):
                path.unlink(missing_ok=True)
                total -= freed
