"""Calls with a real model: the user's memory is used, gives the same reply, and survives damage, races and kills."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import wait_until

from petool_lite import ToolCaller
from petool_lite.data.demo import generate
from petool_lite.errors import PetoolError
from petool_lite.inference.llama import LlamaModel
from petool_lite.inference.parse import CallFailure
from petool_lite.inference.request import published_entry
from petool_lite.inference.states import StateKey, StateStore
from petool_lite.inference.tool_caller import CallOptions
from petool_lite.models import embedded_gguf


def request(index: int) -> tuple[str, list, list]:
    row = generate("test", index + 1)[index]
    text = row["instruction_ratings"]
    history = json.JSONDecoder().raw_decode(text[text.index("[") :])[0]
    return row["query"], json.loads(row["apis_candidate"]), history


QUERY, TOOLS, HISTORY = request(0)


@pytest.fixture
def store(tmp_path) -> StateStore:
    return StateStore(tmp_path / "users")


@pytest.fixture
def fresh(store):
    """A caller in which nothing has been read yet."""
    callers = []

    def make(**changes) -> ToolCaller:
        callers.append(ToolCaller(embedded_gguf(), **{"n_ctx": 2048, "store": store, **changes}))
        return callers[-1]

    yield make
    for caller in callers:
        caller.close()


def test_a_restored_state_gives_the_reply_of_a_fresh_one_and_saves_the_reading(fresh, store) -> None:
    first = fresh().call(QUERY, TOOLS, HISTORY, user="ann")
    assert first.reply.reused_tokens == 0
    assert first.saved_bytes == store.path("ann").stat().st_size
    other = "What about Lima, or any other large city nearby?"
    plain = fresh().call(other, TOOLS, HISTORY)
    restored = fresh().call(other, TOOLS, HISTORY, user="ann")
    assert plain.reply.reused_tokens == 0
    assert restored.reply.reused_tokens > 0.8 * restored.reply.prompt_tokens
    assert restored.reply.ids == plain.reply.ids
    assert restored.saved_bytes == 0  # the file holds this prefix already


def test_a_changed_history_reuses_what_is_the_same_and_is_kept_instead(fresh) -> None:
    fresh().call(QUERY, TOOLS, HISTORY, user="ann")
    changed = [*HISTORY[:-1], HISTORY[-1] | {"instruction": "x", "rating": 1 - HISTORY[-1]["rating"]}]
    plain = fresh().call(QUERY, TOOLS, changed)
    again = fresh().call(QUERY, TOOLS, changed, user="ann")
    assert 0 < again.reply.reused_tokens < again.reply.prompt_tokens - 20
    assert again.reply.ids == plain.reply.ids
    assert again.saved_bytes > 0


def test_one_process_keeps_what_it_has_read_and_keeps_users_apart(fresh) -> None:
    caller = fresh()
    replies = [caller.call(QUERY, TOOLS, HISTORY, user=user) for user in ("ann", "ann", "bob")]
    assert [reply.reply.reused_tokens > 0 for reply in replies] == [False, True, True]  # same text, held in memory
    assert len({reply.reply.ids for reply in replies}) == 1


@pytest.mark.slow
def test_a_damaged_file_is_ignored_and_written_anew(fresh, store) -> None:
    first = fresh().call(QUERY, TOOLS, HISTORY, user="ann")
    path = store.path("ann")
    assert path.stat().st_mode & 0o777 == 0o600
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    again = fresh().call(QUERY, TOOLS, HISTORY, user="ann")
    assert (again.reply.reused_tokens, again.reply.ids) == (0, first.reply.ids)
    assert again.saved_bytes == first.saved_bytes


@pytest.mark.slow
def test_a_state_of_another_context_size_is_not_used(fresh) -> None:
    fresh().call(QUERY, TOOLS, HISTORY, user="ann")
    assert fresh(n_ctx=1536).call(QUERY, TOOLS, HISTORY, user="ann").reply.reused_tokens == 0


KEY = StateKey("0" * 64, 1024, "f16", False, "1")


@pytest.mark.parametrize("change", ["cut", "flip", "empty", "foreign", "open", "grown"])
def test_only_a_whole_file_of_ones_own_is_read(tmp_path, change) -> None:
    store = StateStore(tmp_path)
    store.save("ann", KEY, [1, 2, 3], memoryview(bytes(5000)))
    path = store.path("ann")
    raw = bytearray(path.read_bytes())
    raw[3000] ^= 1
    {
        "cut": lambda: os.truncate(path, 2000),
        "flip": lambda: path.write_bytes(raw),
        "empty": lambda: path.write_bytes(b""),
        "foreign": lambda: path.write_text("something else entirely" * 9),
        "open": lambda: path.chmod(0o666),  # anyone may have written to it
        "grown": lambda: path.write_bytes(path.read_bytes() + b"x"),
    }[change]()
    with store.open("ann", KEY) as state:
        assert state is None
    store.save("ann", KEY, [4], memoryview(bytes(10)))
    with store.open("ann", KEY) as state:
        assert state is not None
        assert state.ids == [4]


def test_the_least_recently_used_files_go_first(tmp_path) -> None:
    store = StateStore(tmp_path, limit=4000)
    data = memoryview(bytes(1000))
    for age, user in ((30, "a"), (20, "b"), (10, "c")):
        store.save(user, KEY, [1, 2], data)
        os.utime(store.path(user), (time.time() - age,) * 2)
    with store.open("a", KEY) as state:
        assert state is not None
        assert (state.ids, bytes(state.data)) == ([1, 2], bytes(1000))
    store.save("d", KEY, [3], data)
    assert [store.path(user).exists() for user in "abcd"] == [True, False, True, True]
    assert StateStore(tmp_path, limit=500).save("e", KEY, [1], data) == 0  # larger than all the room there is


_WRITER = """
import sys
from pathlib import Path
from petool_lite.inference.states import StateKey, StateStore
store = StateStore(Path(sys.argv[1]))
key = StateKey("0" * 64, 1024, "f16", False, "1")
print("ready", flush=True)
while True:
    store.save("ann", key, [int(sys.argv[2])] * 3, memoryview(bytes([int(sys.argv[2])]) * 20_000_000))
"""


def test_two_writers_and_kill_9_leave_a_whole_file(tmp_path) -> None:
    """Readers see one writer's whole state at any time, also after both were killed amid a write."""
    store = StateStore(tmp_path)
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path, str(number)], stdout=subprocess.PIPE)
        for number in (1, 2)
    ]
    try:
        for writer in writers:
            writer.stdout.readline()
        seen = set()
        wait_until(store.path("ann").exists, "the first state is written")
        for _ in range(60):
            with store.open("ann", KEY) as state:
                assert state is not None
                assert set(bytes(state.data)) == {state.ids[0]}
                seen.add(state.ids[0])
            if seen == {1, 2}:
                break
            time.sleep(0.02)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
    with store.open("ann", KEY) as state:
        assert state is not None
        assert set(bytes(state.data)) == {state.ids[0]}


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers_or_trimmed(fresh) -> None:
    caller = fresh(n_ctx=1024)
    row = HISTORY[0]
    long = [row | {"instruction": f"{row['instruction']} {number}"} for number in range(60)]
    with pytest.raises(PetoolError, match=r"[\d,]+ prompt tokens and 512 for the reply exceed the context of 1,024"):
        caller.call(QUERY, TOOLS, long)
    reply = caller.call(QUERY, TOOLS, long, options=CallOptions(trim_history=True))
    assert 0 < reply.history_dropped < 60
    assert reply.reply.prompt_tokens <= 1024 - 512


def test_likelihood_picks_the_likeliest_whole_name(fresh) -> None:
    caller = fresh()
    reply = caller.call(QUERY, TOOLS, HISTORY, options=CallOptions(decoding="likelihood"))
    assert reply.call.tool_name == reply.candidates[0].tool_name
    assert sum(item.probability for item in reply.candidates) == pytest.approx(1)
    assert {item.tool_name for item in reply.candidates} == {tool["tool_name"] for tool in TOOLS}


def test_scores_are_those_of_reading_each_name_alone(fresh) -> None:
    """The shared reading of names against reading each one's tokens singly: with other batches some processors round
    otherwise, by 0.03 of 27 nats."""
    import numpy as np

    model = fresh()._model
    ids = model.encode("Call: ")
    choices = [model.encode(text) for text in ("tool one", "tool two", "tool", "other")]
    found = model.log_likelihoods(ids, choices)
    for choice, score in zip(choices, found, strict=True):
        total = 0.0
        model.read(ids, reuse=False)
        for place, token in enumerate(choice):
            model.read([*ids, *choice[:place]])
            logits = model._logits(-1).astype(np.float64)
            total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert score == pytest.approx(total, abs=0.02)


def test_what_fails_has_a_name(fresh, monkeypatch) -> None:
    caller = fresh()
    with pytest.raises(CallFailure) as free:
        caller.call(QUERY, TOOLS, HISTORY, options=CallOptions(decoding="free", reply_tokens=40))
    assert free.value.kind in ("no_call", "bad_json", "cut_off", "unknown_tool", "missing_parameter")
    monkeypatch.setattr(caller._model._lib, "llama_decode", lambda *_: -3)
    with pytest.raises(CallFailure) as engine:
        caller.call(QUERY, TOOLS, HISTORY)
    assert engine.value.kind == "engine_error"
    monkeypatch.undo()
    assert caller.call(QUERY, TOOLS, HISTORY).call.tool_name


@pytest.mark.parametrize(
    ("tools", "history", "said"),
    [
        ([], [], "tools: expected a list of at least one tool"),
        ([{"name": "x"}], [], r"tools\[0\]: expected an object with required_parameters"),
        (TOOLS, [{"rating": 1}], r"history\[0\]: expected an object with tool_call"),
        ([{"tool_name": "x", "required_parameters": [{"name": "p"}], "optional_parameters": []}], [], "type"),
    ],
)
def test_a_request_that_is_not_as_published_names_the_field(fresh, tools, history, said) -> None:
    with pytest.raises(PetoolError, match=said):
        fresh().call(QUERY, tools, history)


@pytest.mark.parametrize("named", ["all", None])
def test_where_no_one_setting_was_learned_the_history_of_the_request_decides(fresh, monkeypatch, named) -> None:
    facts = {"petool_lite.setting": named} if named else {}
    read = LlamaModel._read_metadata
    monkeypatch.setattr(LlamaModel, "_read_metadata", lambda model: read(model) | facts)
    caller, asked = fresh(), []
    monkeypatch.setattr(caller, "call_entry", lambda entry, *_: asked.append(next(iter(entry.prompts))))
    unrated = [{key: item[key] for key in item if key != "rating"} for item in HISTORY]
    for history, options in ((HISTORY, None), (unrated, None), (unrated, CallOptions(setting="chronological"))):
        caller.call(QUERY, TOOLS, history, options=options)
    assert asked == ["rating", "preferred", "chronological"]
    row = generate("test", 1)[0]
    for field, setting in (("instruction_ratings", "rating"), ("instruction_preferred", "preferred")):
        entry = published_entry({"query": row["query"], "instruction": row[field]}, caller.trained_setting)
        assert list(entry.prompts) == [setting]
    del row["instruction_ratings"]
    assert list(published_entry(row, caller.trained_setting).prompts) == ["preferred", "chronological"]


def test_the_package_itself_stays_cheap() -> None:
    code = "import sys, petool_lite; print([m for m in ('torch', 'numpy', 'llama_cpp', 'jinja2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_call_on_the_command_line(command, tmp_path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "history.json").write_text(json.dumps(HISTORY))
    line = ["call", "--model", embedded_gguf(), "--tools", "tools.json", "--history", "history.json", QUERY]
    plain = command(*line, "--explain", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout)["tool_name"] in plain.stderr
    assert "liked" in plain.stderr
    whole = command("call", "--model", embedded_gguf(), "--request", "-", "--json", cwd=tmp_path,
                    input=json.dumps({"query": QUERY, "tools": TOOLS, "history": HISTORY}))  # fmt: skip
    document = json.loads(whole.stdout.splitlines()[-1])
    assert document["call"] == json.loads(plain.stdout)
    assert document["timings"]["prompt_tokens"] > 200
    free = command(*line, "--decoding", "free", "--reply-tokens", "20", "--json", cwd=tmp_path)
    assert (free.returncode, "failure" in json.loads(free.stdout)) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["call"], 2, "give a QUERY and --tools FILE"),
        (["call", "q", "--tools", "gone.json"], 1, "cannot read gone.json"),
        (["call", "q", "--tools", "-", "--history", "-"], 2, "only one of the files can be stdin"),
        (["call", "q", "--tools", __file__], 1, "is not JSON"),
        (["serve", "--model", "gone.gguf"], 1, "no such file"),
    ],
)
def test_bad_use_is_one_clear_line(command, tmp_path, arguments, code, said) -> None:
    result = command(*arguments, cwd=tmp_path)
    assert (result.returncode, said in result.stderr, "Traceback" in result.stderr) == (code, True, False), (
        result.stderr
    )
