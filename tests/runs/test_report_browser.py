"""In a real browser, report.html and comparison.html draw, sort and filter, and execute no code from texts."""

import json

import pytest

from helpers.browser import Browser, needs_browser
from helpers.report_runs import content_of, HOSTILE, report, write_run
from jaxrl_reason.config import Config
from jaxrl_reason.runs.report import write_comparison
from jaxrl_reason.runs.statistics import Estimate

pytestmark = [pytest.mark.processes, needs_browser]


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    return report(folder, write_run(folder, 60))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run<script>document.title = 'owned'<"
    return report(folder, write_run(folder, 20, HOSTILE))


def articles(browser, name):
    return browser.run(f"[...document.querySelectorAll('article')].map(a => a.dataset.{name})")


@pytest.mark.parametrize("dark, width", [(False, 1200), (True, 1200), (False, 390)])
def test_it_draws_without_a_complaint_and_asks_for_nothing(dark, width, browser, page):
    browser.open(page, dark=dark, width=width)
    charts = content_of(page)["charts"]
    assert browser.run("document.title") == "run"
    assert browser.run("document.querySelectorAll('figure').length") == sum(chart["main"] for chart in charts)
    assert browser.run("document.querySelector('figcaption').textContent") == "Rewardlog"
    assert browser.run("document.querySelectorAll('figure:first-of-type polyline').length") >= 2
    assert "reward 0.3009" in browser.run("document.querySelector('.legend').textContent")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")  # no scrolling to the side
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(14, 17, 22)") == dark
    browser.run("document.querySelector('summary').click()")
    assert browser.said() == []
    assert browser.run("document.querySelectorAll('figure').length") == len(charts)
    drawn = browser.run("document.querySelector('main').innerHTML")
    assert "NaN" not in drawn and "undefined" not in drawn and "Infinity" not in drawn


def test_a_chart_shows_the_values_at_the_pointer_and_by_keys(browser, page):
    browser.open(page)
    legend = "document.querySelector('.legend').textContent"
    browser.run("document.querySelector('figure svg').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
    assert "reward 0.3008 at 59" in browser.run(legend)  # 0.3 + 59 / 70000
    at_left = "const s = document.querySelector('figure svg'), b = s.getBoundingClientRect();"
    browser.run(
        f"{{ {at_left} s.dispatchEvent(new PointerEvent('pointermove', {{clientX: b.left + 1, clientY: b.top + 50}})); }}"
    )
    assert "reward 0.3 at 1" in browser.run(legend)
    browser.run("document.querySelector('figure svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert "at" not in browser.run(legend).replace("rate", "")
    label = browser.run("document.querySelector('figure svg').getAttribute('aria-label')")
    assert label.startswith("Reward by step. reward: 0.3 at step 1, 0.3009 at step 60.")
    ticks = "[...document.querySelectorAll('figure svg')][4].textContent"
    before = browser.run(ticks)
    browser.run("[...document.querySelectorAll('figcaption button')][4].click()")  # a logarithmic axis
    assert browser.run(ticks) != before and browser.said() == []


def test_completions_sort_and_filter_by_the_address(browser, page):
    browser.open(page, "sort=advantage&filter=correct")
    advantages = list(map(float, articles(browser, "advantage")))
    assert advantages == sorted(advantages, reverse=True) and len(advantages) == 12  # six steps, two of four correct
    assert set(articles(browser, "correct")) == {"true"}
    browser.open(page, "sort=advantage-low&filter=incorrect&step=20")
    assert articles(browser, "advantage") == ["-0.98", "1.02"] and set(articles(browser, "step")) == {"20"}
    browser.open(page, "set=held_out&sort=oldest&prompt=0")
    assert articles(browser, "step") == [str(step) for step in range(10, 61, 10) for _ in range(2)]
    assert browser.run("document.querySelectorAll('p.prompt').length") == 1  # one prompt in all steps
    browser.open(page, "q=8")
    assert set(browser.run("[...document.querySelectorAll('article .text')].map(p => p.textContent)")) == {"It is 8.∎"}
    browser.open(page, "filter=truncated&sort=surprising")
    assert len(articles(browser, "step")) == 12 and browser.said() == []


def test_completions_follow_the_controls_and_the_address_follows_them(browser, page):
    browser.open(page)
    assert len(articles(browser, "step")) == 20 and articles(browser, "step")[0] == "60"
    browser.run("[...document.querySelectorAll('button')].find(b => b.textContent === '20 more').click()")
    assert len(articles(browser, "step")) == 24
    choose = "{{ const s = document.querySelector('[name={}]'); s.value = '{}'; s.dispatchEvent(new Event('{}')); }}"
    browser.run(choose.format("filter", "incorrect", "change"))
    browser.run(choose.format("sort", "oldest", "change"))
    browser.run(choose.format("q", "Another", "input"))
    assert browser.run("location.hash") == "#sort=oldest&filter=incorrect&q=Another"
    steps, said = articles(browser, "step"), browser.run("document.querySelector('[aria-live]').textContent")
    assert steps == ["10", "20", "30", "40", "50", "60"] and said == "6 of 6 completions."
    browser.run("location.hash = '#filter=correct'")
    assert (
        set(articles(browser, "correct")) == {"true"}
        and browser.run("document.querySelector('[name=sort]').value") == "newest"
    )
    browser.run(choose.format("set", "held_out", "change"))
    assert browser.run("location.hash") == "#set=held_out&filter=correct" and len(articles(browser, "step")) == 6
    assert browser.said() == []


@pytest.mark.parametrize(
    "state", ["sort=__proto__&filter=constructor&set=toString&prompt=x&step=9e9&q=", "%", "=&&=%zz#sort", "<img src=x>"]
)
def test_a_broken_address_is_the_whole_table(state, browser, page):
    browser.open(page, state)
    assert len(articles(browser, "step")) == 20 and browser.said() == []


def test_tokens_are_shaded_by_their_log_probability(browser, page):
    browser.open(page)
    tokens = (
        "[...document.querySelector('article .text').children].map(s => [s.textContent, s.title, s.style.background])"
    )
    likely, unlikely, end = browser.run(tokens)
    assert likely == ["4", "log-probability -0.1, probability 0.9048", "rgb(var(--shade) / 0.01)"]
    assert unlikely[2] == "rgb(var(--shade) / 0.28)" and end == ["∎", "unknown", ""]


def test_nothing_of_strangers_is_executed(browser, hostile, page):
    elements = "[...new Set([...document.querySelectorAll('*')].map(x => x.tagName.toLowerCase()))].sort()"
    browser.open(page)
    expected = browser.run(elements)
    for state in ("", "set=held_out", "q=<script>"):
        browser.open(hostile, state)
        assert browser.said() == []
        assert browser.run("document.title").startswith("run<script>") and "owned" in browser.run(
            "document.body.textContent"
        )
        assert set(browser.run(elements)) <= set(expected)
        assert browser.run("document.querySelectorAll('script').length") == 2
        inside = "document.querySelectorAll('article *:not(header):not(header *):not(p):not(span)').length"
        assert browser.run(inside) == 0 and not browser.run(
            "[...document.querySelectorAll('[onload], [onerror], a, img, iframe')].length"
        )
    browser.open(hostile, "step=10")
    texts = browser.run(
        "[...document.querySelectorAll('article .text')].slice(0, 9).map(p => p.textContent.slice(0, -1))"
    )
    assert texts[:7] == list(HOSTILE[:7])  # the texts appear as they were written
    assert texts[7] == (
        "line\\u2028paragraph\\u2029half \\ud800 of a pair \\udfff, \\u0000\\u0007\\u001b[31m control, \\u202eright to left\\u2066"
    )
    assert texts[8] == "日本語 😀 \\ufeff\u200d ]]> --!> \\u000d\n\t"


def test_fields_are_marked(browser, page):
    browser.open(page)
    rows = "[...document.querySelectorAll('#fields tbody tr')].map(r => [r.className, ...[...r.children].map(c => c.textContent)])"
    assert browser.run(rows) == [["changed", "steps", "60", "100"]]
    browser.run("document.querySelector('#all').click()")
    assert len(browser.run(rows)) == len(content_of(page)["fields"]["rows"]) > 100


def test_a_comparison_sorts_its_tables(browser, tmp_path):
    rows = {
        f"row {i}": {
            "eval/accuracy": x,
            "half_width": {"eval/accuracy": 0.01},
            "difference": {},
            "runs": {"0": {"seconds": 60.0}},
        }
        for i, x in enumerate((0.5, 0.09, 0.7))
    }
    curves = {"eval/accuracy": {name: {0: Estimate(0.5, 0.1, 2), 5: Estimate(0.6, 0.1, 2)} for name in rows}}
    places = {"row 0": {0: "seed-0/method/report.html"}, "row 1": {0: "javascript:document.title=1//report.html"}}
    path = tmp_path / "comparison.html"
    write_comparison(path, rows, curves, ["eval/accuracy"], places, title="study")
    browser.open(path)
    assert browser.run("document.querySelectorAll('polygon').length") == 3  # bands
    cells = "[...document.querySelector('tbody').rows].map(r => r.cells[1].textContent)"
    assert browser.run(cells) == ["50.0 ± 1.0 %", "9.0 ± 1.0 %", "70.0 ± 1.0 %"]
    browser.run("document.querySelectorAll('th button')[1].click()")
    assert browser.run(cells) == ["9.0 ± 1.0 %", "50.0 ± 1.0 %", "70.0 ± 1.0 %"]
    browser.run("document.querySelectorAll('th button')[1].click()")
    assert browser.run(cells) == ["70.0 ± 1.0 %", "50.0 ± 1.0 %", "9.0 ± 1.0 %"]
    assert browser.run("document.querySelectorAll('th')[1].getAttribute('aria-sort')") == "descending"
    links = browser.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert links == ["seed-0/method/report.html"] and browser.said() == []


def test_a_wide_table_keeps_its_numbers_in_one_line(browser, tmp_path):
    metrics = [f"eval/{i}_rmse" for i in range(20)]
    rows = {"a long name of a row": dict.fromkeys(metrics, 0.123) | {"half_width": dict.fromkeys(metrics, 0.01)}}
    path = tmp_path / "comparison.html"
    write_comparison(path, {k: v | {"difference": {}} for k, v in rows.items()}, {}, metrics, {}, title="study")
    browser.open(path, width=600)
    cells = "[...document.querySelectorAll('td')]"
    assert browser.run(f"{cells}[1].textContent") == "0.123 ± 0.010"
    assert browser.run(f"new Set({cells}.map(c => c.offsetHeight)).size") == 1
    assert browser.run(f"{cells}[1].offsetHeight < 40")  # one line
    assert browser.run("document.documentElement.scrollWidth <= innerWidth") and browser.said() == []


def test_a_report_of_ten_thousand_steps_opens_quickly(browser, tmp_path):
    path = report(tmp_path, write_run(tmp_path, 10_000, ("word " * 400, "x"), Config(steps=10_000)))
    browser.open(path)
    timing = json.loads(browser.run("JSON.stringify(performance.getEntriesByType('navigation')[0])"))
    assert timing["loadEventEnd"] < 3000, timing  # about 0.3 s on a quiet core
    assert browser.said() == []
