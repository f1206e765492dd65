"""Templates that would never end, or take all memory, are refused in words; sound ones render as before."""

import time

import numpy
import pytest

from petool_lite.errors import PetoolError
from petool_lite.prompt.template import render_template

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
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
    ],
)
def test_what_costs_too_much_or_does_not_work_is_refused(template) -> None:
    started = time.thread_time()
    with pytest.raises(PetoolError, match="chat template"):
        render_template(template, str, messages=[{"role": "user", "content": "a"}])
    assert time.thread_time() - started < 8


def test_loops_calls_and_arithmetic_of_real_templates_work() -> None:
    template = (
        "{%- for m in messages if m.role != 'x' -%}{{ loop.index * 2 }}{{ '-' * 3 }}{{ m.content | trim }}"
        "{{ '!' if loop.last }}{% endfor %}{% for i in range(3) %}{{ i }}{% endfor %}{{ strftime_now('%d') }}"
    )
    found = render_template(template, lambda form: f"<{form}>", messages=[{"role": "u", "content": " a "}] * 2)
    assert found == "2---a4---a!012<%d>"
    # what was refused above limited the memory while it was rendered; this is only taken, not written
    assert len(numpy.zeros(3 << 30, numpy.uint8)) == 3 << 30


def test_the_tag_that_marks_what_is_learned_is_read_as_what_stands_in_it() -> None:
    template = "{% for m in messages %}a{% generation %}{{ m }}{% if m %}!{% endif %}{% endgeneration %}b{% endfor %}"
    spaced = "{%- generation -%} x {%- endgeneration -%} "
    assert render_template(template, str, messages=["1", ""]) == "a1!bab"
    assert render_template(spaced, str) == "x"
    with pytest.raises(PetoolError, match="does not work"):
        render_template("{% generation %}", str)
