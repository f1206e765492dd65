"""Each lie of a GGUF header has its own words, and the real file passes."""

import struct

import pytest

from petool_lite.errors import PetoolError
from petool_lite.gguf_base import open_gguf
from petool_lite.gguf_header import check_gguf
from petool_lite.inference.llama import LlamaModel
from petool_lite.models import embedded_gguf


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def u32(key: str, number: int) -> bytes:
    return text(key.encode()) + struct.pack("<II", 4, number)


def strings(key: str, items: list[bytes]) -> bytes:
    return text(key.encode()) + struct.pack("<IIQ", 9, 8, len(items)) + b"".join(text(item) for item in items)


def file(keys: list[bytes], tensors: list[bytes], data: int = 32, version: int = 3, **counts: int) -> bytes:
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", counts.get("said", len(tensors)), counts.get("said_keys", len(keys)))
    body = head + b"".join(keys) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32 + data)


LLAMA = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
GPT2 = text(b"tokenizer.ggml.model") + struct.pack("<I", 8) + text(b"gpt2")
HUGE = 2**63 + 5


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"GGML1234", "not a GGUF file"),
        (file([], [], version=3 << 24), "little-endian"),
        (file([], [], said=HUGE), "tensors do not fit"),
        (file([], [], said_keys=HUGE), "keys do not fit"),
        (file([struct.pack("<Q", HUGE) + b"a" * 30], []), "ends inside its header"),
        (file([LLAMA, LLAMA], []), "occurs twice"),
        (file([text(b"k") + struct.pack("<II", 99, 0)], []), "unknown type 99"),
        (file([text(b"k") + struct.pack("<IIQ", 9, 8, HUGE)], []), "texts do not fit"),
        (file([LLAMA, u32("llama.block_count", 10**9)], []), "block_count is 1000000000"),
        (file([strings("tokenizer.ggml.tokens", [b"a", b"a"])], []), "token occurs twice"),
        (file([strings("tokenizer.ggml.tokens", [b"a"]), GPT2], []), "lacks the key tokenizer.ggml.token_type"),
        (file([u32("split.no", 0), u32("split.count", 10**6), u32("split.tensors.count", 1)], []), "of its parts"),
    ],
)
def test_what_cannot_be_is_refused_in_words(tmp_path, raw, said) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(raw)
    with pytest.raises(PetoolError) as error:
        check_gguf(path)
    assert said in error.value.message


def test_a_whole_file_passes_and_a_cut_one_is_refused_by_what_reads_it(tmp_path) -> None:
    path = tmp_path / "any.gguf"
    check_gguf(embedded_gguf())
    path.write_bytes(embedded_gguf().read_bytes()[:-1])
    with pytest.raises(PetoolError, match="damaged GGUF file"):
        open_gguf(path)
    with pytest.raises(PetoolError, match="not within the file bounds"):
        LlamaModel(path, vocab_only=True)
