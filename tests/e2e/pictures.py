"""The pictures of the page in docs/, of the real program with the embedded model: `python -m tests.e2e.pictures`."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, async_playwright

from tests.bots.process import ROOT, running

TALK = ["Hi! My name is Mira", "I like music", "What is my name?", "What do I like?", "Tell me a joke"]
SEED = "7"
SIZES: dict[str, dict[str, Any]] = {
    "desk": {"viewport": {"width": 1000, "height": 760}},
    "phone": {"viewport": {"width": 390, "height": 780}, "device_scale_factor": 2, "is_mobile": True},
}


async def take(browser: Browser, address: str, size: str, scheme: Any) -> None:
    context = await browser.new_context(color_scheme=scheme, **SIZES[size])
    page = await context.new_page()
    await page.goto(address)
    await page.locator("#connection[data-state=connected]").wait_for(state="attached")
    for number, text in enumerate(TALK):
        await page.get_by_label("Your message").fill(text)
        await page.keyboard.press("Enter")
        await page.locator(".bubble .words").nth(2 * number + 1).wait_for()
    await asyncio.sleep(0.5)  # the last bubble has arrived
    await page.screenshot(path=ROOT / "docs" / f"page-{size}-{scheme}.png")
    await context.close()


async def main() -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with tempfile.TemporaryDirectory() as folder:
            async with running(Path(folder), ENGINE="inprocess", SAMPLING__SEED=SEED) as (_, address):
                for size in SIZES:
                    for scheme in ("light", "dark"):
                        await take(browser, address, size, scheme)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
