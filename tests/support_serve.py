"""Our own server over a GGUF file, in a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[str]:
    """Serve `model`; yields the address that ends in /v1."""
    line = [sys.executable, "-m", "petool_lite", "serve", "--model", str(model), "--port", "0", *arguments]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.stderr.readline()
            found = re.search(r"http://\S+/v1", said)
            assert found, said + process.stderr.read()
            yield found.group()
        finally:
            process.kill()
