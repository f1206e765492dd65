"""report.html in a real browser: what it shows, what it lets a reader do, and that no reply can do anything."""

import json
import re
import shutil

import pytest
from petool_lite.bench.html import embedded
from petool_lite.bench.report import write_report
from support_bench import row, write_results

from petool_lite.data.files import load_dataset

ENTRIES = load_dataset("demo:test:40", "rating").entries
HOSTILE = (
    "</script><img src=x onerror=\"window.pwned=1\"><script>window.pwned=1</script>",
    "<!--<script>", "]]>", "\u2028</style><svg onload=window.pwned=1>", "${window.pwned=1}", "\\u003c/script>",
)  # fmt: skip


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Two variants, 40 entries each; the replies of one are hostile where they are wrong."""
    folder = tmp_path_factory.mktemp("html")
    replies = [entry.gold.to_json() if index % 2 else HOSTILE[index % 6] for index, entry in enumerate(ENTRIES)]
    made = [row(entry, index, reply) for index, (entry, reply) in enumerate(zip(ENTRIES, replies, strict=True))]
    data = {"source": "<img src=x onerror=window.pwned=1>", "sha256": "ab" * 32, "total": 40}
    write_results(folder, made, started="1", data=data)
    base = [row(entry, index, entry.gold.to_json(), variant="base<i onclick=x>") for index, entry in enumerate(ENTRIES)]
    write_results(folder, base, started="2", model_bytes=270_000_000, data=data)
    write_report(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


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


def test_embedded_json_cannot_leave_its_element() -> None:
    for text in HOSTILE:
        made = embedded({"reply": text})
        assert "<" not in made
        assert ">" not in made
        assert json.loads(made) == {"reply": text}


def test_the_file_names_nothing_outside_itself(page_file) -> None:
    text = page_file.read_text()
    assert not re.search(r"<[^>]*\s(?:src|href)\s*=\s*[\"']?+(?!data:)", text.split("<script type")[0])
    assert "@import" not in text
    assert text.count("<script") == 2


def test_hostile_replies_are_text(page) -> None:
    page.select_option("#f-class", "wrong")
    for index in range(len(HOSTILE)):
        page.locator("#browse tbody tr.row").nth(index).click()
        page.locator("#browse tbody tr.row").nth(index).click()
    page.locator("#browse tbody tr.row").first.click()
    assert HOSTILE[0] in page.locator("tr.detail").inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert page.evaluate("document.scripts.length") == 2


def test_rows_are_filtered_sorted_paged_and_opened(page) -> None:
    pager = page.locator("#pager")
    assert "1–50 of 80 replies" in pager.inner_text()
    page.get_by_role("button", name="Next").click()
    assert "51–80 of 80 replies" in pager.inner_text()
    page.select_option("#f-variant", "0")
    page.select_option("#f-class", "wrong")
    assert "1–20 of 20 replies" in pager.inner_text()
    page.get_by_role("button", name="entry").click()  # was sorted by it: now from the last
    assert page.locator("#browse tbody tr.row").first.locator("td").nth(1).inner_text() == ENTRIES[38].id
    page.fill("#f-text", ENTRIES[4].id)
    assert page.locator("#browse tbody tr.row td:nth-child(2)").all_inner_texts().count(ENTRIES[4].id) >= 1
    page.fill("#f-text", "nothing has this text")
    assert "no reply like that" in pager.inner_text()
    page.fill("#f-text", "")
    page.select_option("#f-variant", "")
    page.select_option("#f-class", "")
    page.check("#f-differ")
    assert "of 40 replies" in pager.inner_text()
    page.locator("#browse tbody tr.row").first.press("Enter")
    detail = page.locator("tr.detail").inner_text()
    for part in ("gold", "verdict", "offered", "SHA-256", "the right one"):
        assert part in detail


def test_charts_follow_the_chosen_metric_and_say_what_they_show(page) -> None:
    assert page.locator("svg:visible").count() == 4
    names = page.locator("svg:visible").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert all(name.startswith(("tool and parameters right", "error classes")) for name in names)
    page.get_by_text("parameters", exact=True).first.click()
    names = page.locator("svg:visible").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert sum(name.startswith("parameter accuracy") for name in names) == 3
    assert page.locator("svg:visible .name").first.text_content()


@pytest.mark.parametrize("width", [420, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_is_readable_in_light_and_dark(browser, page_file, width, scheme) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = page.evaluate(
        "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; })()"
    )
    assert contrast(ground, ink) > 7
    soft = page.evaluate("getComputedStyle(document.querySelector('.notes')).color")
    assert contrast(ground, soft) > 4.5
    for chip in page.locator(".chip").all()[:2]:
        back, front = chip.evaluate("one => { const s = getComputedStyle(one); return [s.backgroundColor, s.color]; }")
        assert contrast(back, front) > 4.5
    overlap = page.evaluate(
        """() => [...document.querySelectorAll('svg')].filter((svg) => svg.checkVisibility()).flatMap((svg) => {
          const boxes = [...svg.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
          return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>
            p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2)
            .map(([b]) => [a, b]));
        })"""
    )
    assert overlap == []
    context.close()


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two rgb() colours."""

    def light(colour: str) -> float:
        parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_reads_without_javascript(browser, page_file) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("#scores tbody tr").count() == 2
    assert page.locator("svg:visible").count() == 4
    assert "needs JavaScript" in page.locator("noscript").inner_text()
    context.close()


def test_the_page_forbids_any_other_script(browser, page_file) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 2'}))")
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b onclick=\"window.pwned = 3\" id=trap>x</b>')")
    page.locator("#trap").click()
    assert page.evaluate("window.pwned") is None
    assert "default-src 'none'" in page.locator("meta[http-equiv]").get_attribute("content")
    context.close()
