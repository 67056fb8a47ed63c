"""The report in a real browser: it filters, follows a problem, and executes nothing foreign."""

from __future__ import annotations

from pathlib import Path

import pytest

from abacist.task.reply import render_reply
from abacist.view.report.writing import write_report
from made_runs import HOSTILE, made_run

ITEMS = "#list .item"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose replies are tame and hostile texts in turn."""
    path = made_run(tmp_path_factory.mktemp("browser") / "run", steps=20)
    write_report([path], path / "report.html")
    return path / "report.html"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = made_run(tmp_path_factory.mktemp("hostile") / "run", steps=16, texts=HOSTILE)
    write_report([path], path / "report.html")
    return path / "report.html"


def count_of(page) -> int:
    return int(page.locator("#count").inner_text().split(" of ")[0].replace(",", ""))


def test_it_begins_with_the_verdict_and_a_group_whose_replies_differ(show, report: Path) -> None:
    page = show(report)
    assert "correct on 20 problems" in page.locator(".verdict").inner_text()
    badges = page.locator("#detail .badge").all_inner_texts()
    assert len(badges) == 4 and len(set(badges)) > 1
    assert not page.locator("#plain").is_visible()


@pytest.mark.parametrize("outcome", ["right", "unformatted", "wrong"])
def test_the_filter_of_outcomes_shows_these_and_no_others(show, report: Path, outcome) -> None:
    page = show(report)
    everything = count_of(page)
    page.select_option("select[name=outcome]", label=outcome)
    assert 0 < count_of(page) < everything
    assert set(page.locator(f"{ITEMS} .badge").all_inner_texts()) == {outcome}


def test_steps_rewards_and_text_are_filtered_together(show, report: Path) -> None:
    page = show(report)
    page.fill("input[name=step]", "3-5")
    assert count_of(page) == 3 * 8
    page.fill("input[name=reward]", "2-9")
    few = count_of(page)
    assert 0 < few < 24
    page.fill("input[name=text]", "NO SUCH TEXT")
    assert count_of(page) == 0
    page.click("button[type=reset]")
    page.wait_for_function("document.querySelectorAll('#list .item').length > 50")
    page.fill("input[name=text]", "3 + 4 = 8")
    assert count_of(page) > 0


def test_gained_and_lost_problems_are_found_and_stand_side_by_side(show, report: Path) -> None:
    page = show(report)
    page.select_option("select[name=change]", label="lost")
    assert count_of(page) == 2
    page.locator(ITEMS).first.click()
    assert page.locator("#detail .reply .badge").all_inner_texts() == ["right", "wrong"]
    assert "lost" in page.locator("#detail h3").inner_text()


def test_a_problem_is_followed_through_the_steps_in_their_order(show, report: Path) -> None:
    page = show(report)
    page.select_option("select[name=source]", label="training")
    page.locator(ITEMS).first.click()
    page.keyboard.press("p")
    places = page.locator("#detail .reply .facts:nth-child(2)").all_inner_texts()
    numbers = [int(text.split()[1].strip(",")) for text in places if text.startswith("step")]
    assert numbers == sorted(numbers) and len(set(numbers)) == 20
    page.keyboard.press("g")
    assert page.locator("#detail .reply").count() == 4


def test_steps_are_marked_by_a_sign_and_a_title_and_the_text_stays_as_it_is(
    show, tmp_path: Path
) -> None:
    texts = [
        render_reply("So:\n😀 3 + 4 = 7 <b>eggs</b>\n\n3 * 3 = 9\n9 - 1 = 8\nHm.", "9"),
        "3 + 4 = 8</reasoning><answer>8</answer>",
        "<reasoning>3 + 4 = 7 <reasoning> <answer>7</answer>",
        "Nothing.",
    ]
    run = made_run(tmp_path / "run", steps=1, groups=1, texts=texts, pays_steps=True,
                   finished=False)  # fmt: skip
    write_report([run], run / "report.html")
    page = show(run / "report.html")
    replies = page.locator("#detail .reply")
    assert replies.locator(".text").evaluate_all("all => all.map(e => e.textContent)") == texts
    steps = replies.nth(0).locator(".step")
    assert steps.evaluate_all("all => all.map(e => e.textContent)") == [
        "So:\n😀 3 + 4 = 7 <b>eggs</b>\n", "3 * 3 = 9\n", "9 - 1 = 8\n",
        "Hm.\n</reasoning>\n<answer>\n9\n</answer>",
    ]  # fmt: skip
    assert steps.evaluate_all("all => all.map(e => e.title)") == [
        "this step: right", "this step: wrong", *["this step: not judged"] * 2,
    ]  # fmt: skip
    signs = "all => all.map(e => getComputedStyle(e, '::before').content)"
    assert steps.evaluate_all(signs) == ['"✓"', '"✗"', '"?"', '"?"']
    borders = "all => all.map(e => getComputedStyle(e).borderLeftStyle)"
    assert steps.evaluate_all(borders) == ["solid", "double", "dotted", "dotted"]
    last = [reply.locator(".paid tr").last.inner_text().split("\t") for reply in replies.all()]
    assert last == [
        ["steps", "1 of 2 right, 2 not judged"],
        ["steps", "0 of 1 right, 1 not judged"],
        ["steps", "2 of 2 right"],
        ["steps", "0 of 1 right"],
    ]


def test_the_keyboard_moves_through_the_list(show, report: Path) -> None:
    page = show(report)
    page.locator(ITEMS).nth(2).click()
    page.keyboard.press("j")
    assert page.locator(ITEMS).nth(3).get_attribute("aria-selected") == "true"
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert page.locator(ITEMS).nth(1).get_attribute("aria-selected") == "true"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "text"


@pytest.mark.parametrize(
    ("typed", "invalid", "steps"),
    [("3-5", "false", {3, 4, 5}), ("4", "false", {4}), ("19-", "false", {19, 20}),
     ("5-3", "true", None), ("abc", "true", None), ("-", "false", None), ("", "false", None)],
)  # fmt: skip
def test_a_range_that_cannot_be_read_is_marked_and_asks_for_nothing(
    show, report: Path, typed: str, invalid: str, steps: set[int] | None
) -> None:
    page = show(report)
    page.select_option("select[name=source]", label="training")
    total = count_of(page)
    page.fill("input[name=step]", typed)
    assert page.get_attribute("input[name=step]", "aria-invalid") == invalid
    if steps is None:
        assert count_of(page) == total
    else:
        assert count_of(page) == total * len(steps) // 20


def test_a_problem_that_was_met_once_has_one_view(show, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", steps=1, finished=False)
    write_report([run], run / "report.html")
    page = show(run / "report.html")
    page.locator(ITEMS).first.click()
    page.keyboard.press("p")
    assert page.locator("#detail .tools button").count() == 0
    assert page.locator("#detail .reply").count() == 4


def test_escape_leaves_the_search_as_it_is_typed(show, report: Path) -> None:
    page = show(report)
    page.fill("input[name=text]", "3 + 4 = 7")
    page.keyboard.press("Escape")
    assert page.input_value("input[name=text]") == "3 + 4 = 7"
    assert page.evaluate("document.activeElement === document.body")


def test_the_reply_that_is_shown_is_one_of_those_in_the_list(show, report: Path) -> None:
    page = show(report)
    at_first = page.locator("#list [aria-selected=true]")
    assert at_first.count() == 1
    box, item = page.locator("#list").bounding_box(), at_first.bounding_box()
    assert box["y"] <= item["y"] and item["y"] + item["height"] <= box["y"] + box["height"] + 1
    page.select_option("select[name=outcome]", label="wrong")
    assert page.locator("#detail .chosen .badge").inner_text() == "wrong"
    page.select_option("select[name=outcome]", label="right")
    assert page.locator("#detail .chosen .badge").inner_text() == "right"
    assert page.locator("#list [aria-selected=true]").count() == 1


def test_an_address_leads_to_its_reply_and_not_to_the_charts_above(show, report: Path) -> None:
    page = show(report)
    page.locator(ITEMS).nth(5).click()
    again = show(report, at=page.evaluate("location.hash"))
    assert again.locator("#detail .chosen").is_visible()
    assert abs(again.evaluate("document.getElementById('replies').getBoundingClientRect().y")) < 60


def test_the_address_brings_back_filters_and_reply(show, report: Path) -> None:
    page = show(report)
    page.select_option("select[name=outcome]", label="wrong")
    page.locator(ITEMS).nth(5).click()
    address = page.evaluate("location.hash")
    chosen = page.locator("#detail .chosen").inner_text()
    again = show(report, at=address)
    assert again.locator("#detail .chosen").inner_text() == chosen
    assert count_of(again) == count_of(page)


@pytest.mark.parametrize("at", ["#replies?reply=9.x.1", "#replies?outcome=99&source=2", "#nowhere",
                                "#replies?text=%3Cscript%3E"])  # fmt: skip
def test_a_strange_address_does_no_harm(show, report: Path, at: str) -> None:
    page = show(report, at=at)
    assert count_of(page) > 0 or "text=" in at or "step=" in at


def test_the_answer_is_marked_where_it_was_read(show, report: Path) -> None:
    page = show(report)
    page.select_option("select[name=outcome]", label="right")
    page.locator(ITEMS).first.click()
    assert page.locator("#detail .chosen .answer").inner_text() == "7"
    assert page.locator("#detail .chosen .tag").count() == 4


def test_hostile_replies_do_nothing_and_are_shown_as_they_were(show, hostile: Path) -> None:
    page = show(hostile)
    page.select_option("select[name=source]", label="training")
    total = count_of(page)
    seen = set()
    for number in range(0, total, 4):  # each group shows four
        page.evaluate("""number => { const list = document.getElementById('list');
            while (list.children.length <= number) { list.scrollTop = list.scrollHeight;
              list.dispatchEvent(new Event('scroll')); }
            list.children[number].click(); }""", number)  # fmt: skip
        seen |= set(page.locator("#detail .text").evaluate_all(
            "all => all.map(one => one.textContent)"))  # fmt: skip
    assert page.evaluate("window.harmed") is None
    for text in HOSTILE:
        if text.isprintable() and len(text) < 10_000:
            assert text in seen, text
    assert "aU+0000b" in seen and "U+202Eright to leftU+202C" in seen
    assert page.locator("#detail img, #detail iframe, #detail a, #detail form").count() == 0


def test_without_a_script_replies_are_there_to_read(show, report: Path) -> None:
    page = show(report, java_script_enabled=False)
    assert page.locator("#plain .reply").count() >= 8
    assert page.locator("#plain").is_visible() and not page.locator("#explorer").is_visible()


def test_on_paper_the_tables_and_the_readable_replies_stand(show, report: Path) -> None:
    page = show(report)
    page.emulate_media(media="print")
    assert page.locator("#plain").is_visible() and not page.locator("#explorer").is_visible()
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize("width", [320, 380, 768])
def test_nothing_is_wider_than_a_narrow_screen(show, report: Path, width: int) -> None:
    page = show(report, viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(show, report: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = show(report, color_scheme=scheme, bypass_csp=True)
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (one["id"], [node["target"] for node in one["nodes"]][:5])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious


def test_dark_and_light_can_be_changed_by_hand(show, report: Path) -> None:
    page = show(report, color_scheme="light")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert dark != light
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_a_chosen_theme_and_open_tables_outlive_a_refresh(show, report: Path) -> None:
    page = show(report, color_scheme="light")
    page.click("#theme")
    page.locator("details summary").nth(2).click()
    opened = "[...document.querySelectorAll('details')].flatMap((one, at) => one.open ? [at] : [])"
    before = page.evaluate(opened)
    page.wait_for_function("Object.values(sessionStorage).includes('2')")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert 2 in before and page.evaluate(opened) == before
    page.locator("details summary").nth(2).click()
    page.wait_for_function("!Object.values(sessionStorage).includes('2')")
    page.reload()
    assert 2 not in page.evaluate(opened)


def test_a_sheet_of_paper_is_not_too_narrow_for_a_table(show, report: Path) -> None:
    page = show(report, viewport={"width": 794, "height": 1000})
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 794
