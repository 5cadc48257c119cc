"""The page as a person sees it: headless Chromium, the real server, a house in memory that can be restarted."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

from bots import web as module
from bots.web import CLOSED, WebBot, WebSettings
from core.delivery import NotAccepted
from core.messages import Turn
from core.settings import QueueLimits
from tests.bots.house import House, until
from tests.bots.process import running

PATIENCE = 30_000.0  # ms; the machine may be busy
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
PHONE = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.fail("no Chromium on this machine; install it, for example: apt-get install chromium", pytrace=False)
    expect.set_options(timeout=PATIENCE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=60_000)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def browser(chromium: Browser) -> AsyncIterator[Browser]:
    """The one Chromium; what a test opened in it is closed."""
    yield chromium
    for context in chromium.contexts:
        await context.close()


@pytest.fixture
def bot() -> WebBot:
    """On a port that stays its own over a restart."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return WebBot(WebSettings(web_port=free.getsockname()[1]))


async def visit(where: Browser | BrowserContext, bot: WebBot, **context: Any) -> Page:
    """The page, connected."""
    await until(lambda: bot.address)
    return await open_page(where, bot.address, **context)


async def open_page(where: Browser | BrowserContext, address: str, **context: Any) -> Page:
    page = await (await where.new_context(**context) if isinstance(where, Browser) else where).new_page()
    page.set_default_timeout(PATIENCE)
    await page.goto(address)
    await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
    return page


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Your message").fill(text)
    await page.keyboard.press("Enter")


def said(page: Page) -> Any:
    return page.locator(".bubble .words")


async def say_much(page: Page) -> None:
    """More than the page shows at once."""
    await say(page, "first")
    await say(page, "\n".join(f"line {n}" for n in range(60)))
    await expect(said(page)).to_have_count(4)


async def test_talks_and_shows_typing(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        await expect(page.get_by_role("heading", name="Say something")).to_be_visible()
        await expect(page.get_by_text("A bot. It makes things up.")).to_be_visible()
        house.engine.gate.clear()
        await say(page, "Hello there!")
        await expect(page.locator(".typing")).to_be_visible()
        await expect(page.get_by_role("heading", name="Say something")).to_be_hidden()
        house.engine.gate.set()
        await expect(said(page)).to_have_text(["Hello there!", "You said Hello there!"])
        await expect(page.locator(".typing")).to_have_count(0)
        await expect(page.get_by_label("Your message")).to_be_focused()
        await page.reload()
        await expect(said(page)).to_have_text(["Hello there!", "You said Hello there!"])
        assert complaints == []


async def test_shift_enter_makes_a_new_line_and_a_suggestion_speaks(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await page.get_by_role("button", name="Tell me a joke").click()
        await expect(said(page)).to_have_text(["Tell me a joke", "You said Tell me a joke"])
        field = page.get_by_label("Your message")
        low = (await field.bounding_box() or {"height": 0})["height"]
        await field.focus()
        for number in range(3):
            await page.keyboard.type(f"line {number}")
            await page.keyboard.press("Shift+Enter")
        assert (await field.bounding_box() or {"height": 0})["height"] > low + 40
        await page.get_by_role("button", name="Send").click()
        await expect(said(page)).to_have_count(4)
        assert await said(page).nth(2).inner_text() == "line 0\nline 1\nline 2"
        assert (await field.bounding_box() or {"height": 0})["height"] == low


async def test_two_browsers_are_apart_and_two_tabs_are_not(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        first = await visit(browser, bot)
        tab = await visit(first.context, bot)
        other = await visit(browser, bot)
        await say(first, "my secret is a heron")
        await expect(said(tab)).to_have_text(["my secret is a heron", "You said my secret is a heron"])
        await say(other, "any secrets?")
        await expect(said(other)).to_have_text(["any secrets?", "You said any secrets?"])
        assert house.engine.prompts[-1] == ["any secrets ?"]
        late = await visit(first.context, bot)
        await expect(said(late)).to_have_text(["my secret is a heron", "You said my secret is a heron"])


async def test_survives_a_restart_of_the_server(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "first")
        await expect(said(page)).to_have_text(["first", "You said first"])
        house.engine.gate.clear()
        await say(page, "second")
        await expect(page.locator(".typing")).to_be_visible()
        await expect(page.locator(".exchange.sending")).to_have_count(0)
    await expect(page.locator("#connection")).to_have_attribute("data-state", "lost")
    await say(page, "third, said to nobody")
    await expect(page.locator(".exchange.sending")).to_have_count(1)
    house.engine.gate.set()
    async with house.serve(bot):
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        talk = [
            *("first", "You said first", "second", "You said second"),
            *("third, said to nobody", "You said third, said to nobody"),
        ]
        await expect(said(page)).to_have_text(talk)
        await expect(page.locator(".exchange.sending")).to_have_count(0)
        await page.reload()
        await expect(said(page)).to_have_text(talk)
        assert len(house.disk.rows) == 3


async def test_a_reload_while_a_question_waits(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        tab = await visit(page.context, bot)
        house.engine.gate.clear()
        await say(page, "wait for me")
        await until(lambda: house.engine.prompts)
        await page.reload()
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        await expect(page.locator(".exchange.sending")).to_have_count(0)
        await expect(said(page)).to_have_text(["wait for me"])
        await tab.reload()
        late = await visit(page.context, bot)  # this one does not know of the question
        await expect(tab.locator("#connection")).to_have_attribute("data-state", "connected")
        house.engine.gate.set()
        for each in (page, tab, late):
            await expect(said(each)).to_have_text(["wait for me", "You said wait for me"])


async def test_two_tabs_that_open_at_once_are_one_person(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        context = await browser.new_context()
        await asyncio.gather(*(visit(context, bot) for _ in range(4)))
        assert len(bot._tabs) == 1


async def test_what_ends_without_an_answer_says_so_and_stays_in_its_place(browser: Browser, bot: WebBot) -> None:
    house = House(QueueLimits(deadline=1.0))
    async with house.serve(bot):
        page = await visit(browser, bot)
        tab = await visit(page.context, bot)
        await say(page, "one")
        await expect(said(page)).to_have_count(2)
        house.engine.gate.clear()
        await say(page, "two")
        await until(lambda: len(house.engine.prompts) == 2)
        await say(page, "three")
        for each in (page, tab):
            await expect(each.locator(".exchange > .note")).to_have_text([CLOSED["expired"]])
            await expect(each.locator(".exchange:nth-child(2) .typing")).to_have_count(1)
        await page.reload()
        await expect(page.locator(".exchange > .note")).to_have_text([CLOSED["expired"]])
        house.engine.gate.set()
        await expect(said(page)).to_have_text(["one", "You said one", "two", "You said two", "three"])
        house.engine.gate.clear()
        await say(page, "four")
        await expect(page.locator(".exchange:nth-child(4) .typing")).to_have_count(1)  # the third's is not taken
        house.engine.gate.set()
        talk = ["one", "You said one", "two", "You said two", "three", "four", "You said four"]
        await expect(said(page)).to_have_text(talk)
        await page.reload()
        await expect(said(page)).to_have_text(talk)
        await expect(page.locator(".exchange > .note")).to_have_text([CLOSED["expired"]])


async def test_what_ended_while_the_page_was_away_is_known_when_it_is_back(browser: Browser, bot: WebBot) -> None:
    house = House(QueueLimits(deadline=1.0))
    async with house.serve(bot):
        page = await visit(browser, bot)
        house.engine.gate.clear()
        await say(page, "one")
        await until(lambda: house.engine.prompts)
        await say(page, "two")
        await expect(page.locator(".exchange.sending")).to_have_count(0)
        address, _ = page.url, await page.goto("about:blank")
        await until(lambda: house.disk.rows[1].state == "expired")
        await page.goto(address)
        await expect(page.locator(".exchange > .note")).to_have_text([CLOSED["expired"]])
        house.engine.gate.set()
        await expect(said(page)).to_have_text(["one", "You said one", "two"])


async def test_what_another_process_on_the_journal_answered_is_shown(browser: Browser, bot: WebBot) -> None:
    house, other = House(), House()
    other.disk = house.disk
    async with house.serve(bot):
        page = await visit(browser, bot)
        house.engine.gate.clear()
        await say(page, "one")
        await until(lambda: house.engine.prompts)
        async with other.serve(WebBot(WebSettings(web_port=0))):
            await until(lambda: house.disk.rows[0].state == "answered")
            house.engine.gate.set()
            await expect(said(page)).to_have_text(["one", "You said one"])


async def test_answers_stand_below_their_questions(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        house.engine.gate.clear()
        for text in ("one", "two", "three"):
            await say(page, text)
        await expect(page.locator(".exchange")).to_have_count(3)
        house.engine.gate.set()
        talk = ["one", "You said one", "two", "You said two", "three", "You said three"]
        await expect(said(page)).to_have_text(talk)
        await page.reload()
        await expect(said(page)).to_have_text(talk)


async def test_what_the_journal_did_not_take_at_once_keeps_its_place(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        house.journal._refuse = 1.0
        await say(page, "first")
        await say(page, "second")
        await asyncio.sleep(0.3)
        house.journal._refuse = 0.0
        await say(page, "third")
        order = [line for n in ("first", "second", "third") for line in (n, f"You said {n}")]
        await expect(said(page)).to_have_text(order)
        await page.reload()
        await expect(said(page)).to_have_text(order)
    assert [row.message.text for row in house.disk.rows] == ["first", "second", "third"]


async def test_a_page_too_many_says_why_it_waits(
    browser: Browser, bot: WebBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_TABS_EACH", 1)
    house, context = House(), await browser.new_context()
    async with house.serve(bot):
        first = await visit(context, bot)
        second = await context.new_page()
        await second.goto(bot.address)
        await expect(second.locator("#connection")).to_have_text("Too many pages of this browser are open; close some.")
        await say(second, "hello")
        await first.close()
        await expect(second.locator("#connection")).to_have_text("Connected")
        await expect(said(second)).to_have_text(["hello", "You said hello"])


async def test_starting_anew_asks_first(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        again = page.get_by_role("button", name="Start anew")
        await expect(again).to_be_disabled()
        await say(page, "remember this")
        await expect(said(page)).to_have_count(2)
        await again.click()
        await page.get_by_role("button", name="Keep talking").click()
        await expect(said(page)).to_have_count(2)
        await again.click()
        await page.get_by_role("dialog").get_by_role("button", name="Start anew").click()
        await expect(said(page)).to_have_count(0)
        await expect(page.get_by_role("heading", name="Say something")).to_be_visible()
        await say(page, "hello")
        await expect(said(page)).to_have_text(["hello", "You said hello"])
        assert house.engine.prompts[-1] == ["hello"]


async def test_starting_anew_that_does_not_work_says_so_and_may_be_tried_again(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "remember this")
        await expect(said(page)).to_have_count(2)
        reset = house.journal.reset

        async def refuse(*_: Any, **__: Any) -> bool:
            house.journal.reset = reset  # type: ignore[method-assign]
            raise NotAccepted("the database does not work now")

        house.journal.reset = refuse  # type: ignore[method-assign]
        await page.get_by_role("button", name="Start anew").click()
        sure = page.get_by_role("dialog")
        await expect(sure.get_by_role("alert")).to_be_hidden()
        await sure.get_by_role("button", name="Start anew").click()
        await expect(sure.get_by_role("alert")).to_have_text("That did not work. Please try again in a moment.")
        await expect(said(page)).to_have_count(2)
        await sure.get_by_role("button", name="Start anew").click()
        await expect(sure).to_be_hidden()
        await expect(said(page)).to_have_count(0)


async def test_what_is_forgotten_while_it_is_answered_stays_away(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "first")
        await expect(said(page)).to_have_count(2)
        house.engine.gate.clear()
        await say(page, "second")
        await until(lambda: len(house.engine.prompts) == 2)
        await page.get_by_role("button", name="Start anew").click()
        await page.get_by_role("dialog").get_by_role("button", name="Start anew").click()
        await expect(said(page)).to_have_count(0)


async def test_markup_stays_text(browser: Browser, bot: WebBot) -> None:
    house = House()
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script><b>bold</b>"
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, evil)
        await expect(said(page)).to_have_count(2)
        assert await said(page).nth(0).inner_text() == evil
        assert await page.locator("#talk img, #talk script, #talk b").count() == 0
        house.engine.words.decode = lambda ids: evil  # type: ignore[method-assign]  # the model says it too
        await say(page, "and you?")
        await expect(said(page)).to_have_count(4)
        assert "onerror" in await said(page).nth(3).inner_text()
        assert await page.locator("#talk img, #talk script, #talk b").count() == 0
        await page.reload()
        await expect(said(page)).to_have_count(4)
        assert await page.locator("#talk img, #talk script, #talk b").count() == 0
        assert await page.title() == "Palaver"


async def test_what_it_cannot_read_gets_a_hint(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "🦄🦄🦄")
        await expect(page.get_by_text("I can only read words.")).to_be_visible()
        await expect(page.locator(".typing")).to_have_count(0)


async def test_a_phone_needs_no_sideways_scrolling(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot, **PHONE)
        await say(page, "w" * 300 + " " + "https://example.com/" + "a" * 200)
        await say(page, "\n".join(f"line {n}" for n in range(40)))
        await expect(said(page)).to_have_count(4)
        widths = "[document.documentElement, document.body, document.querySelector('main')].map(e => e.scrollWidth)"
        assert all(width <= 360 for width in await page.evaluate(widths))
        for target in ("#reset", "#say button", "#text"):
            box = await page.locator(target).bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
            assert box["width"] >= 38 and box["height"] >= 38
        assert await page.evaluate("scroller.scrollTop + scroller.clientHeight > scroller.scrollHeight - 5")


async def test_what_is_not_sent_yet_can_be_read_and_the_header_keeps_its_height(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot, **PHONE)
        height = await page.evaluate("document.querySelector('header').offsetHeight")
    await expect(page.locator("#connection")).to_have_attribute("data-state", "lost")
    assert await page.evaluate("document.querySelector('header').offsetHeight") == height
    await say(page, "said to nobody")
    bubble = page.locator(".exchange.sending .bubble")
    await expect(bubble).to_have_css("opacity", "1")
    await expect(bubble).to_have_css("outline-style", "dashed")


async def test_right_to_left_and_what_a_composition_ends_with(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "\u05e9\u05dc\u05d5\u05dd (hello)")
        await expect(said(page)).to_have_count(2)
        left = (
            "at => { const r = new Range(), text = document.querySelector('.words').firstChild;"
            "r.setStart(text, at); r.setEnd(text, at + 1); return r.getBoundingClientRect().left; }"
        )
        assert await page.evaluate(left, 0) > await page.evaluate(left, 6)  # the first word stands right of the second
        field = page.get_by_label("Your message")
        await field.fill("\u05e9\u05dc\u05d5\u05dd hello")
        assert await field.evaluate("field => field.matches(':dir(rtl)')")
        await field.evaluate(  # Safari's: composing is false, only the code tells
            "field => field.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))"
        )
        await expect(field).not_to_have_value("")
        await expect(said(page)).to_have_count(2)


async def test_the_talk_is_scrolled_by_keyboard_and_shows_that_it_is_chosen(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say_much(page)
        await expect(said(page).first).not_to_be_in_viewport()
        await page.keyboard.press("Shift+Tab")
        main = page.get_by_role("main")
        await expect(main).to_be_focused()
        await expect(main).to_have_css("outline-style", "solid")
        await page.keyboard.press("Home")
        await expect(said(page).first).to_be_in_viewport()


async def test_two_thousand_characters_are_the_most(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await page.get_by_label("Your message").focus()
        await page.keyboard.insert_text("word " * 500)
        await page.keyboard.press("Enter")
        await expect(said(page)).to_have_count(2)
        assert len(house.disk.rows[0].message.text) <= 2000


async def test_a_full_field_says_so_and_a_draft_is_kept(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        field, full = page.get_by_label("Your message"), page.get_by_text("This message is full: 2,000 characters.")
        await field.focus()
        await page.keyboard.insert_text("word " * 399 + "word")
        await expect(full).to_be_hidden()
        await page.keyboard.insert_text(" word " * 500)
        await expect(full).to_be_visible()
        await page.reload()
        await expect(full).to_be_visible()
        assert len(await field.input_value()) == 2000
        await say(page, "hello")
        await expect(said(page)).to_have_count(2)
        await expect(full).to_be_hidden()
        await page.reload()
        await expect(said(page)).to_have_count(2)
        assert await field.input_value() == ""


async def test_without_javascript_there_is_nothing_to_write_in(browser: Browser, bot: WebBot) -> None:
    async with House().serve(bot):
        await until(lambda: bot.address)
        page = await (await browser.new_context(java_script_enabled=False)).new_page()
        await page.goto(bot.address)
        await expect(page.locator("noscript p")).to_have_text("This page needs JavaScript to talk.")
        await expect(page.locator("noscript p")).to_be_visible()
        for part in ("#text", "#connection", "#reset"):
            await expect(page.locator(part)).to_be_hidden()


async def test_it_can_be_used_without_sight(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "hello")
        await expect(said(page)).to_have_count(2)
        tree = await page.locator("body").aria_snapshot()
        for part in ('log "Conversation"', 'textbox "Your message"', 'button "Send"', 'button "Start anew"', "status"):
            assert part in tree, tree
        assert re.search(r"You said:\s*hello", tree) and re.search(r"Palaver said:\s*You said hello", tree), tree
        assert await page.evaluate("[...document.querySelectorAll('img')].every(image => image.hasAttribute('alt'))")
        for number in range(14):
            await say(page, f"hello number {number}")
            await expect(said(page)).to_have_count(2 * number + 4)
        await page.evaluate("[...document.querySelectorAll('main .unseen')].at(-1).scrollIntoView()")
        heights = "[document.documentElement.scrollHeight - innerHeight, scrollY, document.body.scrollTop]"
        assert await page.evaluate(heights) == [0, 0, 0], "what is read aloud stands with what is seen"


async def test_a_connection_that_breaks_without_a_word(browser: Browser, bot: WebBot) -> None:
    """Frames into the void: the page notices what is not acknowledged, connects again and says it again."""
    house = House()
    async with house.serve(bot):
        context = await browser.new_context()
        await context.clock.install()
        page = await visit(context, bot)
        await page.evaluate("socket.send = () => {}")
        await say(page, "is anybody there?")
        await expect(page.locator(".exchange.sending")).to_have_count(1)
        assert house.disk.rows == []
        await page.clock.fast_forward(12_000)
        await expect(said(page)).to_have_text(["is anybody there?", "You said is anybody there?"])


DEAF = "socket.send = () => {}; socket.onmessage = null"  # no frame comes through any more, and nothing says so


async def test_an_answer_that_a_broken_connection_swallows_is_fetched(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        context = await browser.new_context()
        await context.clock.install()
        page = await visit(context, bot)
        house.engine.gate.clear()
        await say(page, "hello")
        await expect(page.locator(".typing")).to_be_visible()
        await page.evaluate(DEAF)
        house.engine.gate.set()
        await until(lambda: house.disk.replies and house.disk.replies[0].reply.state == "sent")
        await page.clock.fast_forward(12_000)  # it asks
        await page.clock.fast_forward(12_000)  # and takes another connection
        await expect(said(page)).to_have_text(["hello", "You said hello"])


async def test_two_tabs_show_one_order_though_one_could_not_speak_for_a_while(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        context = await browser.new_context()
        await context.clock.install()
        page, tab = await visit(context, bot), await visit(context, bot)
        await page.evaluate("socket.send = () => {}")
        await say(page, "late")
        await say(tab, "one")
        await expect(said(page)).to_have_text(["one", "You said one", "late"])
        await page.clock.fast_forward(12_000)
        for each in (page, tab):
            await expect(said(each)).to_have_text(["one", "You said one", "late", "You said late"])


async def test_starting_anew_into_the_void_says_that_it_did_not_work(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        context = await browser.new_context()
        await context.clock.install()
        page = await visit(context, bot)
        await say(page, "hello")
        await expect(said(page)).to_have_count(2)
        await page.evaluate(DEAF)
        await page.get_by_role("button", name="Start anew").click()
        sure = page.get_by_role("dialog")
        await sure.get_by_role("button", name="Start anew").click()
        await page.clock.fast_forward(12_000)
        await expect(sure.get_by_role("alert")).to_be_visible()
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        await sure.get_by_role("button", name="Start anew").click()
        await expect(sure).to_be_hidden()
        await expect(said(page)).to_have_count(0)


async def test_a_connection_that_does_not_open_is_tried_again(browser: Browser, bot: WebBot) -> None:
    async with House().serve(bot):
        await until(lambda: bot.address)
        context = await browser.new_context()
        await context.clock.install()
        page = await context.new_page()
        await page.add_init_script("const Real = WebSocket; WebSocket = class { close() { WebSocket = Real; } };")
        await page.goto(bot.address)
        await page.wait_for_function("socket")
        await page.clock.fast_forward(12_000)
        await page.clock.fast_forward(1_000)
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")


async def test_who_reads_what_was_said_long_ago_goes_on_reading(browser: Browser, bot: WebBot) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say_much(page)
        await page.evaluate("scroller.scrollTop = 100")
    await expect(page.locator("#connection")).to_have_attribute("data-state", "lost")
    async with house.serve(bot):
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        assert await page.evaluate("scroller.scrollTop") == 100


@pytest.mark.parametrize("how", ["refused", "lost"])
async def test_a_history_that_does_not_come_is_asked_for_again(browser: Browser, bot: WebBot, how: str) -> None:
    house = House()
    async with house.serve(bot):
        page = await visit(browser, bot)
        await say(page, "hello")
        await expect(said(page)).to_have_count(2)
        context, asked, read = page.context, asyncio.Event(), house.journal.history
        await context.clock.install()
        late = await context.new_page()
        if how == "lost":
            await late.add_init_script(
                "const send = WebSocket.prototype.send;"
                "WebSocket.prototype.send = function () { WebSocket.prototype.send = send; }"
            )
        else:

            async def refuse(*_: Any, **__: Any) -> list[Turn]:
                asked.set()
                house.journal.history = read  # type: ignore[method-assign]
                raise NotAccepted("the database does not work now")

            house.journal.history = refuse  # type: ignore[method-assign]
        async with late.expect_websocket():
            await late.goto(bot.address)
        if how == "refused":
            await asyncio.wait_for(asked.wait(), 20)
        await asyncio.sleep(0.2)  # until the page has heard so, or has asked into the void
        await late.clock.fast_forward(12_000)
        await expect(late.locator("#connection")).to_have_attribute("data-state", "connected")
        await expect(said(late)).to_have_text(["hello", "You said hello"])


async def test_many_lines_that_wait_do_not_break_the_connection(
    browser: Browser, bot: WebBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are taken one after the other; as long as that goes on, the connection is well. Here, ten times as fast."""
    monkeypatch.setattr(module, "BURST", 1)
    monkeypatch.setattr(module, "PER_SECOND", 20.0)
    house = House(QueueLimits(per_channel=100))
    async with house.serve(bot):
        await until(lambda: bot.address)
        page = await (await browser.new_context()).new_page()
        script = (module.PAGE / "script.js").read_text("utf-8").replace("= 12000;", "= 1200;")
        await page.route("**/script.js", lambda route: route.fulfill(body=script, content_type="text/javascript"))
        opened: list[str] = []
        page.on("websocket", lambda socket: opened.append(socket.url))
        lines = json.dumps([[f"question-{number}", f"line {number}"] for number in range(44)])
        await page.add_init_script(f"sessionStorage.setItem('palaver-waiting', {json.dumps(lines)})")
        await page.goto(bot.address)
        await expect(page.locator("#connection")).to_have_attribute("data-state", "connected")
        await expect(said(page)).to_have_count(88)
        assert len(opened) == 1


async def test_survives_a_kill_of_the_whole_program(browser: Browser, tmp_path: Path, bot: WebBot) -> None:
    port = str(bot._settings.web_port)
    async with running(tmp_path, WEB_PORT=port) as (process, address):
        page = await open_page(browser, address)
        await say(page, "before")
        await expect(said(page)).to_have_text(["before", "Before"])
        process.kill()
        await expect(page.locator("#connection")).to_have_attribute("data-state", "lost")
        await say(page, "meanwhile")
    async with running(tmp_path, WEB_PORT=port):
        await expect(said(page)).to_have_text(["before", "Before", "meanwhile", "Meanwhile"])
        await page.reload()
        await expect(said(page)).to_have_text(["before", "Before", "meanwhile", "Meanwhile"])


async def test_talks_with_the_embedded_model(browser: Browser, tmp_path: Path) -> None:
    async with running(tmp_path, ENGINE="inprocess", WEB_PORT="0") as (_, address):
        page = await open_page(browser, address)
        await page.get_by_role("button", name="Hi, how are you?").click()
        await expect(said(page)).to_have_count(2)
        assert len(await said(page).nth(1).inner_text()) > 3
