"""Templates that would never end, or take all memory, are refused in words; sound ones render as before."""

import time
from unittest.mock import Mock

import numpy
import pytest
from support_families import TEMPLATE

from petool_lite.errors import PetoolError
from petool_lite.families import chat_template
from petool_lite.prompt.render import Chat, exported_template, petool_template, render_messages
from petool_lite.prompt.template import render_template

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' ~ m.content }}{% endif %}{% endfor %}"
THINKING = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think></think>' if enable_thinking is false }}"


def test_what_costs_too_much_or_does_not_work_is_refused() -> None:
    for template in (
        LOOP,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% set n = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ 'a' | center(9999999999) }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "x" * 300_000,
        "{% for a in messages * 100000 %}{% for b in messages * 100000 %}{% endfor %}{% endfor %}",
        "{% for a in messages recursive %}{{ loop([a, a]) }}{% endfor %}",
    ):
        started = time.thread_time()
        with pytest.raises(PetoolError, match="chat template"):
            render_template(template, str, messages=[{"role": "user", "content": "a"}])
        assert time.thread_time() - started < 8


def test_loops_calls_arithmetic_and_the_tag_that_marks_what_is_learned_work() -> None:
    template = (
        "{%- for m in messages if m.role != 'x' -%}{{ loop.index * 2 }}{{ '-' * 3 }}{{ m.content | trim }}"
        "{{ '!' if loop.last }}{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{{ strftime_now('%d') }}"
    )
    found = render_template(template, lambda form: f"<{form}>", messages=[{"role": "u", "content": " a "}] * 2)
    assert found == "2---a4---a!012<%d>"
    # what was refused above limited the memory while it was rendered; this is only taken, not written
    assert len(numpy.zeros(3 << 30, numpy.uint8)) == 3 << 30

    template = "{% for m in messages %}a{% generation %}{{ m }}{% if m %}!{% endif %}{% endgeneration %}b{% endfor %}"
    assert render_template(template, str, messages=["1", ""]) == "a1!bab"
    assert render_template("{%- generation -%} x {%- endgeneration -%} ", str) == "x"
    with pytest.raises(PetoolError, match="does not work"):
        render_template("{% generation %}", str)


@pytest.mark.parametrize("base", [TEMPLATE, NO_SYSTEM])
def test_a_template_without_a_system_gets_its_message_before_the_users(base) -> None:
    chat = Chat(lambda texts: [[0] for _ in texts], base, "<s>", "</s>", 2)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert "Be brief.\n\nHi" in render_messages(chat, said)
    assert ("[user]\nHi" if base == TEMPLATE else "USER: Hi") in render_messages(chat, said[1:])
    petool = exported_template(base, "petool")
    assert petool_template(petool) == petool, "around its own result it changes nothing"
    fixed = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert render_template(petool, str, messages=said, **fixed).endswith(render_messages(chat, said)[3:])


def test_thoughts_are_off_and_vicunas_template_is_known(tmp_path) -> None:
    chat = Chat(lambda texts: [[0] for _ in texts], THINKING, "", "", 2)
    assert render_messages(chat, [{"role": "user", "content": "Hi"}]) == "Hi<think></think>"
    for style in ("petool", "published"):
        made = render_template(exported_template(THINKING, style), str, messages=[{"role": "user", "content": "Hi"}])
        assert made == "Hi<think></think>"
    (vicuna := tmp_path / "vicuna-7b-v1.5").mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        (vicuna / name).write_text("{}")
    fixed = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    said = [{"role": role, "content": role[:2]} for role in ("system", "user", "assistant", "user")]
    text = render_template(chat_template(vicuna), str, messages=said, **fixed)
    assert text == "<s>sy USER: us ASSISTANT: as</s>USER: us ASSISTANT:"


def test_a_full_disk_costs_no_rendering(monkeypatch) -> None:
    monkeypatch.setattr("jinja2.FileSystemBytecodeCache.dump_bytecode", Mock(side_effect=OSError(28, "No space left")))
    assert render_template("{{ 6 * 7 }} of a full disk", str) == "42 of a full disk"
