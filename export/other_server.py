"""llama.cpp's own HTTP server in this process, where the package xllamacpp is installed: how it reads a file."""

import json
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from petool_lite.inference.llama_open import default_threads


class OtherServer:
    """The server over one GGUF file, told nothing but where it lies; it ends when the object goes."""

    def __init__(self, file: Path, n_ctx: int = 512, template: str = "") -> None:
        """Load `file`; `template` replaces the file's own chat template."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.offline = str(file), n_ctx, 1, True
        params.cpuparams.n_threads, params.warmup, params.use_jinja = default_threads(), False, True
        params.chat_template, params.verbosity = template, 0
        self._server = xllamacpp.Server(params)
        self.url: str = self._server.listening_address

    @staticmethod
    def installed() -> bool:
        """Whether xllamacpp is there."""
        return find_spec("xllamacpp") is not None

    def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers to a request at `path`, as a JSON value."""
        raw = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", raw, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)

    def text(self, body: Mapping[str, Any]) -> str:
        """The prompt that it makes of messages and tools."""
        return str(self.ask("/apply-template", body)["prompt"])

    def ids(self, body: Mapping[str, Any]) -> list[int]:
        """The token ids of that prompt."""
        asked = {"content": self.text(body), "add_special": True, "parse_special": True}
        return [int(token) for token in self.ask("/tokenize", asked)["tokens"]]
