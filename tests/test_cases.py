"""The small cases in ../shared/cases, each with what is right: those of a server and of files in the default run, those
that make models, train or wait with `make test-cases`."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support_serve import Server

HERE = Path(__file__).parents[1]
CASES = next((path for path in (HERE.parent / "shared/cases", HERE.parents[1] / "shared/cases") if path.is_dir()), None)
pytestmark = pytest.mark.skipif(CASES is None, reason="the cases are not on this machine")
OLD = ("04-", "13-", "35-", "37-", "39-")  # end in imports or rows of version 0.1
NUMBER, TEXT = r"-?[0-9.e+]+", r'"[^"]*"'
# What a client of each case prints where all is right, by its beginning; every line of the case is one of these.
ASKED = {
    "01-optional-anyof": {
        "anyOf int": rf'"limit": ({NUMBER}|null)\}}$', "plain int": rf'"limit": {NUMBER}\}}$',
        "anyOf bool": r'"open_only": (true|false|null)\}$',
        "anyOf list": r'"days": (\[.*\]|null)\}$|length {"days": \["[^]]*$',  # some processors' base never ends it
    },
    "02-type-array": {
        "[integer,null]": rf'"limit": ({NUMBER}|null)\}}$', "[null,boolean]": r'"open_only": (true|false|null)\}$',
        "[integer,string]": r'"page": \S+\}$',
    },
    "03-ref-enum-const": {
        "$ref int": r'"page": [1-9]\d*\}$', "$ref object": r'"where": \{.*\}\}$', "enum no type": r'"phases": [013]\}$',
        "const": r'"version": 2\}$', "text enum": r'"state": "(open|shut)"\}$',
    },
    "04-default-null": {"int,": rf'"limit": {NUMBER}', "str,": rf'"note": {TEXT}', "bool,": r"tool_calls \{"},
    "05-no-parameters-shapes": {
        **dict.fromkeys(("absent", "null", "{}", "type only", "properties []", "properties null", "required"), "'{}'"),
        "property true": "200 ",
    },
    "06-tool-choice-forms": {
        "named": "200 rent_car", "allowed_tools": "200 rent_car", "flat": "200 rent_car", "auto": "200 ",
        "required": "200 ", "Anthropic's": "400 tool_", "any": "400 tool_", "unknown": "400 tool_", "list": "400 tool_",
    },
    "07-stream-cut-by-max-tokens": {"max  1:": "finish=length .*finish=length error=None", "content-": "event-stream"},
    "08-null-and-minus-one": {
        **dict.fromkeys(("max_tokens -1", "max_tokens null", "n null", "stream null", "tool_choice null"), "200 tool"),
        **dict.fromkeys(("user null", "history null"), "200 tool"), "logprobs": "400 logprobs:",
        **dict.fromkeys(("max_tokens 0", "max_tokens '64'"), "400 max_tokens:"), "n 2": "400 n:", "resp": "400 resp",
    },
    "13-content-parts": {
        "parts ": '200 {"query"', "a part's text is null": '200 {"query"', "a part's text is 7": r"400 messages\[0\]",
        "an image only": "400 messages", "empty text": "400 messages", "null": "400 messages", "number": "400 messages",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def server():
    with Server("--context", 8192) as running:
        yield running
        assert running.end() == 0
        assert "Traceback" not in running.said


@pytest.mark.parametrize("case", ASKED)
def test_what_a_client_gets(server, case, monkeypatch, capsys) -> None:
    monkeypatch.setenv("BASE_URL", server.url)
    try:
        runpy.run_path(str(CASES / case / "client.py"))
    except ImportError:
        assert case.startswith(OLD)
    said = capsys.readouterr().out
    print(said)
    assert " 500 " not in said
    for start, right in ASKED[case].items():
        (line,) = [line for line in said.splitlines() if line.startswith(start)][:1]
        assert re.search(right, line), line


# The exit codes that the case prints, and, where it tells more, words. 30 makes the tiny base that the ones after use.
RUN = {"35-line-separator-in-jsonl": "0000000", "55-double-tool-names": "found a again"}
SLOW = {
    "14-client-goes-away": "after nine that left: 200", "15-gguf-generation-tag": "0", "18-gguf-split": "01011",
    "16-gguf-pad-id-out-of-range": "000", "19-gguf-without-template": "110000111111", "20-gguf-name": "0000",
    "22-template-list": "00", "23-inv-freq-tensors": "00", "45-read-only-places": "0011000",
    "30-second-stage-rslora": "0", "31-second-stage-patterns": "11",
    "33-target-modules-as-text": "000", "36-byte-order-mark": "000100", "26-spm-tokenizer": "00",
    "28-generation-config-eos": "000000", "37-half-a-surrogate-pair": "11110" * 5 + "111",
    "41-uid-without-a-name": "0" * 8, "51-stop-while-serving": "SIGTERM rc 143",
}  # fmt: skip


@pytest.mark.parametrize("case", [*RUN, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_what_a_case_ends_with(case, tmp_path_factory) -> None:
    state = tmp_path_factory.getbasetemp() / "state"
    own = {"BIN": str(Path(sys.executable).parent), "STATE": str(state), "SHOW": "300000"}
    line = ["bash", CASES / "run.sh", case]
    done = subprocess.run(line, capture_output=True, text=True, cwd=HERE, env=os.environ | own)
    print(done.stdout)
    right = (RUN | SLOW)[case]
    assert "".join(re.findall(r"rc=(\d+)", done.stdout)) == right if right.isdigit() else right in done.stdout
    assert case.startswith(OLD) or "Traceback" not in done.stdout
