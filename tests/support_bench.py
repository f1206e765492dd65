"""Results files made in tests: real entries, replies as a test wants them; and HTTP servers that answer so."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from petool_lite.bench.engines import UNREAD
from petool_lite.bench.run import entry_row
from petool_lite.data.entries import Call, Entry
from petool_lite.data.files import load_dataset
from petool_lite.prompt.render import answer_text


def called(count: int) -> list[Entry]:
    """Entries of the demo whose right answer is a call."""
    return [entry for entry in load_dataset("demo:test:100").entries if isinstance(entry.answer, Call)][:count]


def answer(entry: Entry) -> str:
    """The right reply in the published form."""
    return answer_text(entry.answer, "published")


def row(entry: Entry, index: int, reply: str, **more) -> dict[str, Any]:
    """A results row of schema 3."""
    made = entry_row(index, entry) | UNREAD | {
        "setting": "rating", "variant": "tuned", "engine": "llama.cpp", "decoding": "constrained", "style": "petool",
        "status": "ok", "prompt_sha256": hashlib.sha256(entry.id.encode()).hexdigest(), "prompt_tokens": 700 + index,
        "reply": reply, "reply_tokens": 30, "cached_tokens": 100 * (index > 0), "cold": index == 0,
        "prefill_s": 0.5, "decode_s": 0.25, "seconds": 0.75 + index / 100, "confidence": 0.875,
    }  # fmt: skip
    return made | more


def meta(rows: list[dict[str, Any]], **more) -> dict[str, Any]:
    """The meta file that goes with rows."""
    same = {key: rows[0][key] for key in ("variant", "engine", "decoding", "style", "setting")}
    data = {"source": "demo:test:40", "sha256": "ab" * 32, "total": len(rows)}
    made = {
        "schema": 3, **same, "about": "what was trained", "model": "model.q4_k_m.gguf",
        "model_sha256": "cd" * 32, "model_bytes": 105_000_000,
        "data": data, "limit": None, "shard": None, "entries": len(rows), "complete": True, "max_reply_tokens": 256,
        "machine": {"device": "cpu", "cpu": "Some CPU", "cores": 2, "host_ram_gb": 24.0}, "commit": "0123abc",
        "versions": {"petool-lite": "0.1"}, "started": "2026-11-22T22:00:00", "seconds": 33.0,
        "peak_memory_gb": 0.4, "gpu": None,
    }  # fmt: skip
    return made | more


def write_results(folder: Path, rows: list[dict[str, Any]], **more) -> Path:
    """Write rows and meta of one variant; return the results file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results-{rows[0]['variant']}.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows))
    path.with_name(path.stem + ".meta.json").write_text(json.dumps(meta(rows, **more)))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file as they stand there."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of the data, without what no two runs share."""
    times = ("prefill_s", "decode_s", "seconds", "cold", "cached_tokens")
    return sorted(({key: row[key] for key in row if key not in times} for row in rows), key=lambda row: row["index"])


@contextmanager
def answering(answer: Callable[[str, Mapping[str, str], bytes], tuple[int, dict[str, str], bytes]]) -> Iterator[str]:
    """A server whose `answer` to "METHOD PATH", headers, body is a status (0: it hangs up), headers, body; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, raw = answer(f"{self.command} {self.path}", self.headers, body)
            if not status:
                self.connection.close()
                return
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(raw))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw if self.command != "HEAD" else b"")

        do_GET = do_HEAD = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
