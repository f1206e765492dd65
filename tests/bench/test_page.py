"""report.html in a real browser: what it shows, what it lets a reader do, and that no reply can do anything."""

import re

import pytest
from petool_lite.bench.report import write_report
from support_bench import answer, called, row, write_results

ENTRIES = called(40)
HOSTILE = (
    "</script><img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>",
    "<!--<script>", "]]>", "\u2028</style><svg onload=window.pwned=1>", "${window.pwned=1}", "\\u003c/script>",
)  # fmt: skip


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two variants, 40 entries each; the replies of one are hostile where they are wrong."""
    folder = tmp_path_factory.mktemp("html")
    replies = [answer(entry) if index % 2 else HOSTILE[index % 6] for index, entry in enumerate(ENTRIES)]
    made = [row(entry, index, reply) for index, (entry, reply) in enumerate(zip(ENTRIES, replies, strict=True))]
    data = {"source": "<img src=x onerror=window.pwned=1>", "sha256": "ab" * 32, "total": 40}
    write_results(folder, made, started="1", data=data)
    base = [row(entry, index, answer(entry), variant="base<i onclick=x>") for index, entry in enumerate(ENTRIES)]
    write_results(folder, base, started="2", model_bytes=270_000_000, data=data)
    write_report(folder)
    return folder / "report.html"


@pytest.fixture
def page(browser, page_file):
    """The report, opened; errors and requests beyond the file itself fail the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    trouble = []
    opened.on("pageerror", lambda error: trouble.append(str(error)))
    opened.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: trouble.append(request.url) if not request.url.startswith("file:") else None)
    opened.goto(page_file.as_uri())
    yield opened
    assert trouble == []
    context.close()


def test_the_file_names_nothing_outside_itself(page_file) -> None:
    text = page_file.read_text()
    assert not re.search(r"<[^>]*\s(?:src|href)\s*=\s*[\"']?+(?!data:|#)", text)
    assert (text.count("<script"), "@import" in text, "<img" in text, "<svg onload" in text) == (1, False, False, False)


def test_hostile_replies_are_text_and_entries_are_filtered(page) -> None:
    count, shown = page.locator("#count"), page.locator(".entry:visible")
    assert count.inner_text() == "40 of 40 entries"
    page.check("#wrong")
    assert shown.count() == 20
    shown.first.locator("summary").click()
    assert HOSTILE[0] in shown.first.inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    page.check("#differ")
    assert count.inner_text() == "20 of 40 entries"
    page.fill("#words", "nothing has this text")
    assert count.inner_text() == "0 of 40 entries"


def test_it_fits_a_phone_and_a_desk(page) -> None:
    for width in (420, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".chart:visible").count() == 2
        ends = page.evaluate(
            "[...document.querySelectorAll('#scores th')].map((th) => th.getBoundingClientRect().right)"
        )
        assert max(ends) <= width, "both right is seen on a phone, too"
