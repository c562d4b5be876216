"""The page of a run in a real Chromium: it loads from file://, plays, and shows all text as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy import flags, train_flags, write_text

from text_diffusion import figures, report, train
from text_diffusion.visible import visible
from text_diffusion.visual.findings import Findings, Words
from text_diffusion.visual.folder import RunFolder
from text_diffusion.visual.page import page as page_of
from text_diffusion.visual.recording import Frame, Word

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync force-prefers-reduced-motion"  # with that it does not begin by itself
)
PHONE = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its chromedriver")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose words are HTML and escape codes, beside common ones."""
    folder = tmp_path_factory.mktemp("browser")
    words = ("<script>hacked=1</script>", "<img/src=x/onerror=hacked=1>", "\x1b[31mred", "</script><b>", "plain")
    lines = [f"{a} {b} {c}" for a in words for b in words for c in ("one", "two", "three")]
    corpus = write_text(folder / "evil.txt", lines)
    options = {"steps": 30, "lr": 1e-2, "warmup_steps": 0, "log_interval": 5, "eval_interval": 15}
    assert train.main(train_flags(corpus, folder / "run", **options)) == 0
    write_text(folder / "run" / "evil-test.txt", lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "HALVES", 4)
        assert report.main([str(folder / "run"), *flags(samples=60, steps=4, frames=12, show=4)]) == 0
    return folder / "run" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in SWITCHES.split():
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def opened(browser: Any, page: Path, phone: bool = False) -> Any:
    """Load the page afresh; asserts that nothing complained."""
    if phone:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    else:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.set_window_size(1200, 900)
    browser.get_log("browser")
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    return browser


def look(browser: Any) -> tuple[str, str, str]:
    """What the stage, the line below and the button say."""
    return tuple(browser.find_element("css selector", name).text for name in (".stage", ".where", ".play"))


def test_it_loads_with_the_last_step(browser: Any, page: Path) -> None:
    opened(browser, page)
    stage, where, play = look(browser)
    assert where.startswith("step 12 of 12 · t = 0")
    assert "Play" in play
    assert len(stage.splitlines()) == 4
    heights = browser.execute_script("return [...document.querySelectorAll('figure > svg')].map(s => s.clientHeight)")
    assert len(heights) >= 6
    assert min(heights) > 80


def test_it_plays_to_the_end_and_stops(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    opened(browser, page)
    end = look(browser)[0]
    browser.execute_script("const s = document.querySelector('.speed'); s.options[2].value = '25'; s.value = '25'")
    browser.execute_script(
        "window.seen = []; const where = document.querySelector('.where');"
        "new MutationObserver(() => window.seen.push(where.textContent)).observe(where, {childList: true})"
    )
    browser.find_element("css selector", ".play").click()
    WebDriverWait(browser, 60).until(lambda _: "Play" in look(browser)[2])
    seen = browser.execute_script("return window.seen")
    assert [text.split(" · ")[0] for text in seen] == [f"step {i} of 12" for i in range(1, 13)]
    assert look(browser)[0] == end
    assert browser.get_log("browser") == []


def test_keys_slider_and_view_move_the_text(browser: Any, page: Path) -> None:
    opened(browser, page)
    end = look(browser)[0]
    player = browser.find_element("css selector", ".player")
    player.send_keys("\ue011")  # Home
    begin = look(browser)
    assert begin[1].startswith("step 1 of 12")
    assert begin[0] != end
    player.send_keys("\ue014\ue014")  # right, right
    assert look(browser)[1].startswith("step 3 of 12")
    player.send_keys("\ue012")  # left
    assert look(browser)[1].startswith("step 2 of 12")
    slider = browser.find_element("css selector", ".player input")
    slider.send_keys("\ue010")  # End
    assert look(browser)[0] == end
    browser.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert look(browser)[0] == begin[0]
    browser.execute_script(
        "const v = document.querySelector('.view'); v.value = 'guess'; v.dispatchEvent(new Event('change'))"
    )
    assert look(browser)[0] != begin[0]
    browser.execute_script("const s = document.querySelector('.speed'); s.options[0].value = s.value = '600000'")
    browser.execute_script("document.querySelector('.speed').selectedIndex = 0")
    player.send_keys(" ")
    assert "Pause" in look(browser)[2]
    player.send_keys(" ")
    assert "Play" in look(browser)[2]
    assert slider.get_attribute("aria-valuetext").startswith("step ")


def test_confidence_is_shade_and_bar(browser: Any, page: Path) -> None:
    """A wider bar for a surer word, so that it reads without colour."""
    opened(browser, page)
    script = "return [...document.querySelectorAll('.w')].map(w => [w.title, getComputedStyle(w).backgroundSize])"
    shown = browser.execute_script(script)
    assert len(shown) > 3
    for title, size in shown:
        assert float(size.split("%")[0].split("calc(")[-1]) == pytest.approx(float(title.split()[0]), abs=0.6)


def test_text_is_never_run(browser: Any, tmp_path: Path) -> None:
    """Wherever the page shows text of a corpus or a run, it is HTML and escape codes here."""
    evil = "<script>hacked=1</script><img src=x onerror=hacked=1></script><b>\x1b[31m&amp;"
    words = [Word(visible(evil), True, 0.5)]
    run = RunFolder(tmp_path, evil, [], {"data": {"dataset": evil, evil: evil}}, tmp_path / "x.pt", {evil: evil})
    frames = [Frame(t, 0.5, [words], [words]) for t in (1, 0)]
    embeddings = Words([1.0, 2.0], [(evil, [(evil, 1.0)])], [(evil, 0.0, 0.0), (evil, 1.0, 1.0)], 0.5)
    whole = page_of([Findings(run, objective=evil, samples=[evil], frames=frames, words=embeddings)])
    path = tmp_path / "page.html"
    path.write_text(whole, encoding="utf-8")
    opened(browser, path)
    assert browser.execute_script("return typeof hacked") == "undefined"
    assert browser.execute_script("return document.querySelectorAll('img, main script:not([type])').length") == 0
    shown = evil.replace("\x1b", "\u241b")
    for place in ("h1", ".samples li", ".missing li", "td b", ".stage"):
        assert shown in browser.find_element("css selector", place).text
    assert browser.title.startswith(shown)


def test_it_fits_a_phone(browser: Any, page: Path) -> None:
    opened(browser, page, phone=True)
    width, least = browser.execute_script(
        "return [document.documentElement.scrollWidth,"
        " Math.min(...[...document.querySelectorAll('button, select')].map(e => e.getBoundingClientRect().height))]"
    )
    assert width <= PHONE["width"]
    assert least >= 38  # a finger's
    assert look(browser)[1].startswith("step 12 of 12")


def test_it_loads_nothing(browser: Any, page: Path) -> None:
    opened(browser, page)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
