"""The demo page in a real browser: clicked and typed through as a visitor would, against the real API."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
import uvicorn

from rec.bundles import files
from rec.bundles.recommender import Recommender
from rec.ops.serving.front import guarded_app
from rec.ops.serving.gate import Tokens
from rec.ops.start import listen
from rec.serving.service import Service
from tests.conftest import Trained, rewrite

selenium = pytest.importorskip("selenium", reason="the page's test needs selenium (the extra dev)")
from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service as Driver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="the page's test needs a browser: apt install chromium chromium-driver",
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)
DESKTOP, PHONE = (1280, 800), (390, 844)
HOSTILE = "<img src=x onerror=\"document.title='owned'\">'\"&amp;"


@contextmanager
def running(service: Service, tokens: Tokens) -> Iterator[str]:
    """The address of a server with this service."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(guarded_app(service, tokens), lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """The trained pair, whose most popular item has a title that would be dangerous as HTML."""
    bundles = Path(
        shutil.copytree(trained.savedmodels, tmp_path_factory.mktemp("page") / "savedmodels")
    )
    path = bundles / "retrieval" / "1" / "items.parquet"
    items = pd.read_parquet(path)
    items.loc[0, "title"] = HOSTILE
    items.to_parquet(path, index=False)
    rewrite(path.parent)
    service = Service(lambda: Recommender.load(*files.find_pair(bundles)))
    service.load()
    return service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service, Tokens()) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Driver(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a visitor sees and does."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser, self.url = browser, url

    def open(
        self, fragment: str = "", size: tuple[int, int] = DESKTOP, scheme: str = "light"
    ) -> "Page":
        width, height = size
        metrics = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": size == PHONE,
        }
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.get("about:blank")
        self.browser.get_log("browser")
        self.browser.get(self.url + fragment)
        return self

    def all(self, selector: str) -> list[str]:
        """The texts of the elements, as they are in the document."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return self.browser.execute_script(script, selector)

    def text(self, selector: str) -> str:
        return self.browser.find_element(By.CSS_SELECTOR, selector).text

    def click(self, selector: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).click()

    def press(self, *keys: str) -> None:
        """To whatever has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def ids(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(row => row.dataset.item)"
        return self.browser.execute_script(script, selector)

    def until(self, holds: Callable[[], Any], seconds: float = 30) -> None:
        """Waits for what the page does by itself."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, (
                f"not within {seconds} s; the page: {self.text('body')[:500]}"
            )
            time.sleep(0.02)

    def settled(self) -> "Page":
        """Waits until an answer is shown and no request is under way."""
        self.until(
            lambda: self.all("#ranked .row, #ranked .empty") and not self.all("#lists.waiting")
        )
        return self

    def after(self, action: Callable[[], None]) -> None:
        """Does something that changes the answer, and waits for it."""
        asked = self.browser.execute_script("return times.length")
        action()
        self.until(lambda: self.browser.execute_script("return times.length") > asked)
        self.settled()

    def errors(self) -> list[str]:
        return [
            entry["message"]
            for entry in self.browser.get_log("browser")
            if entry["level"] != "INFO"
        ]


@pytest.fixture
def page(browser: Chrome, url: str) -> Page:
    return Page(browser, url)


def asked(url: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(url + "v1/recommend", json={"k": 50, "explain": True, **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def titles(answer: dict[str, Any], part: str = "items") -> list[str]:
    return [item["title"] for item in answer[part]]


def test_both_orders_stand_side_by_side_with_scores_genres_and_reasons(
    page: Page, url: str
) -> None:
    page.open("#user=u7").settled()
    answer = asked(url, user_id="u7")
    items = answer["items"]
    assert page.ids("#ranked .row") == [item["item_id"] for item in items[:10]]
    retrieved = sorted(
        (i for i in items if i["explain"]["retrieval_rank"]),
        key=lambda i: i["explain"]["retrieval_rank"],
    )
    assert page.ids("#candidates .row") == [item["item_id"] for item in retrieved[:10]]
    assert page.all("#ranked .name") == titles(answer)[:10]
    assert page.all("#ranked .meta") == [", ".join(item["genres"]) for item in items[:10]]
    assert [float(score) for score in page.all("#ranked .score")] == [
        round(item["score"], 3) for item in items[:10]
    ]
    nearest = items[0]["explain"]["nearest"]
    assert page.all("#ranked .why b")[0] == nearest["title"]
    assert page.all("#ranked .why")[0].endswith(f"{nearest['similarity']:.2f}")
    assert page.all("#models span") == ["retrieval v1 sasrec", "ranking v1 mlp", "120 items"]
    assert page.text("#latency").endswith("ms round trip")
    assert page.errors() == []


def test_a_moved_item_tells_how_far(page: Page, url: str) -> None:
    page.open("#user=u7&k=50").settled()
    moves = [
        item["explain"]["retrieval_rank"] - rank
        for rank, item in enumerate(asked(url, user_id="u7")["items"], 1)
        if item["explain"]["retrieval_rank"]
    ]
    shown = [
        text.replace("▲ ", "").replace("▼ ", "-").replace("=", "0")
        for text in page.all("#ranked .move")
    ]
    assert [int(text) for text in shown] == moves
    assert len(page.all("#moves path")) == len(moves)


def test_a_history_is_composed_with_the_keyboard_alone(page: Page, url: str) -> None:
    page.open("#edited=").settled()
    assert page.text("#note").startswith("Cold start") and page.text("#ranked-title") == "Popular"
    wanted = asked(url)["items"][5]
    page.press("/")
    page.after(
        lambda: page.press(wanted["title"].upper(), Keys.ENTER)
    )  # without waiting for the suggestions
    assert page.all("#history li div div") == [wanted["title"]]
    assert page.all("#ranked .name") == titles(asked(url, history=[wanted["item_id"]]))[:10]
    assert page.text("#note") == ""

    page.press("")  # the field keeps the focus; an empty search offers the popular items
    page.press(Keys.ARROW_DOWN)
    page.until(lambda: len(page.all("#search-list li")) == 20)
    second = page.all("#search-list li div")[1]
    page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.all("#search-list li[aria-selected=true] div") == [second]
    page.after(lambda: page.press(Keys.ENTER))
    assert page.all("#history li div div") == [second, wanted["title"]]  # the newest first
    page.press(Keys.ESCAPE, Keys.TAB)
    page.after(lambda: page.press(Keys.TAB, Keys.ENTER))  # past "clear", the first item's ×
    assert page.all("#history li div div") == [wanted["title"]]
    page.after(lambda: page.press(Keys.ENTER))  # the focus is now on what took its place
    assert (
        page.all("#history li") == ["empty: search, or press + beside an item"]
        and page.text("#ranked-title") == "Popular"
    )


def test_a_users_history_is_edited_and_put_back(page: Page, url: str) -> None:
    users = httpx.get(url + "v1/users?limit=100").json()["users"]
    user = next(user for user in users if len(asked(url, user_id=user, k=1)["history"]) > 7)
    page.open(f"#user={user}").settled()
    stored, before = asked(url, user_id=user)["history"], page.all("#ranked .name")
    newest = [item["title"] for item in reversed(stored)]
    assert page.text("#history-label") == f"History · {len(stored)}"
    page.click("#all")
    assert page.all("#history li div div") == newest
    added = page.ids("#ranked .row")[2]
    page.after(lambda: page.click("#ranked .row:nth-child(3) button"))
    page.after(lambda: page.click("#history li:nth-child(2) button"))
    assert page.text("#history-label") == f"History · {len(stored)}, edited"
    told = [item["item_id"] for item in stored[:-1]] + [added]
    assert page.all("#ranked .name") == titles(asked(url, user_id=user, history=told))[:10]

    page.browser.refresh()  # the address holds the state
    page.settled()
    assert page.text("#history-label") == f"History · {len(stored)}, edited"
    page.after(lambda: page.click("#reset"))
    assert page.all("#ranked .name") == before


def test_users_are_chosen_typed_and_drawn(page: Page, url: str) -> None:
    page.open().settled()
    users = httpx.get(url + "v1/users?limit=100").json()["users"]
    assert page.browser.execute_script("return state.user") == users[0]
    page.click("#user")
    page.press(users[5])
    page.until(lambda: page.all("#user-list li")[:1] == [users[5]])
    page.after(lambda: page.press(Keys.ARROW_DOWN, Keys.ENTER))
    assert page.all("#ranked .name") == titles(asked(url, user_id=users[5]))[:10]
    page.after(lambda: page.click("#another"))
    drawn = page.browser.execute_script("return document.getElementById('user').value")
    assert drawn in users and drawn != users[5]
    page.click("#user")
    page.after(lambda: page.press("nobody/ü?&", Keys.ENTER))
    assert page.text("#note").startswith("Cold start") and page.browser.current_url.endswith(
        "#user=nobody%2F%C3%BC%3F%26"
    )


def test_filters_come_from_the_items_and_are_honoured(page: Page, url: str) -> None:
    page.open("#user=u7").settled()
    before = page.all("#ranked .name")
    genre = page.all("#facets .chip")[0]
    page.after(lambda: page.click("#facets .chip"))
    assert (
        page.all("#ranked .name")
        == titles(asked(url, user_id="u7", filter={"genres": [genre]}))[:10]
        != before
    )
    assert all(genre in meta.split(", ") for meta in page.all("#ranked .meta"))
    assert page.text("#filter-count") == "· 1 chosen"
    page.browser.execute_script("document.querySelector('#request').parentNode.open = true")
    body = page.text("#request").partition("-d '")[2].removesuffix("'")
    assert json.loads(body) == {
        "user_id": "u7",
        "k": 50,
        "filter": {"genres": [genre]},
        "explain": True,
    }
    page.after(lambda: page.press(Keys.SPACE))  # the chip keeps the focus
    assert page.all("#ranked .name") == before


def test_a_title_is_text_whatever_it_holds(page: Page, service: Service) -> None:
    page.open("#edited=").settled()
    assert HOSTILE in page.all("#ranked .name")
    page.click("#search")
    page.press("onerror")
    page.until(lambda: page.all("#search-list li div")[:1] == [HOSTILE])
    page.after(lambda: page.press(Keys.ENTER))
    assert page.all("#history li div div") == [HOSTILE]
    assert page.browser.title == "rec" and not page.all("img") and page.errors() == []


def test_items_of_any_data_have_a_name_and_something_to_tell(page: Page) -> None:
    page.open().settled()
    for item, shown in (
        (
            {"item_id": "i1", "score": 1.5, "tags": ["a", "b"], "colour": "red", "price": 3.2},
            ["i1", "a, b · red"],
        ),
        ({"item_id": "i1", "name": "Chair", "popularity": 7}, ["Chair", "i1"]),
        ({"item_id": "i1", "title": None, "colour": None, "tags": []}, ["i1", ""]),
    ):
        read = "const item = JSON.parse(arguments[0]); return [nameOf(item), metaOf(item)]"  # keeps the keys' order
        assert page.browser.execute_script(read, json.dumps(item)) == shown
    offered = "learn(arguments[0]); return choices().map(([column, values]) => [column, [...values.keys()]])"
    items = [
        {"item_id": f"x{n}", "colour": ["red", "blue"][n % 2], "sku": f"{n}", "weight": n / 3}
        for n in range(4)
    ]
    assert ["colour", ["red", "blue"]] in page.browser.execute_script(offered, items)
    assert [column for column, _ in page.browser.execute_script(offered, [])] == [
        "colour",
        "genres",
    ]  # few first


def test_nothing_is_asked_of_anyone_else(page: Page, url: str) -> None:
    page.open("#user=u7").settled()
    script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    requests = page.browser.execute_script(script)
    assert requests and all(name.startswith(url + "v1/") for name in requests)
    assert (
        page.browser.execute_async_script(
            "fetch('http://127.0.0.1:9/').catch(e => arguments[0](e.name))"
        )
        == "TypeError"
    )
    assert (
        "violates" in page.errors()[0]
        and "connect-src" in httpx.get(url).headers["content-security-policy"]
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_fits_a_phone_and_a_desktop_in_light_and_dark(
    page: Page, size: tuple[int, int], scheme: str
) -> None:
    page.open("#user=u7", size, scheme).settled()
    run = page.browser.execute_script
    assert run("return document.documentElement.scrollWidth") <= size[0]
    place = "const place = id => document.getElementById(id).getBoundingClientRect();"
    left = run(f"{place} return place('ranked').left - place('candidates').left")
    top = run(f"{place} return place('ranked').top - place('candidates').top")
    assert (left > 300 and top == 0) if size == DESKTOP else (left == 0 and top < 0)
    ink, ground = (
        sum(map(int, run(f"return getComputedStyle(document.body).{name}")[4:-1].split(",")))
        for name in ("color", "backgroundColor")
    )
    assert (ink < 200 and ground > 700) if scheme == "light" else (ink > 700 and ground < 100)


def test_a_token_is_asked_for_and_kept_for_this_tab_only(browser: Chrome, service: Service) -> None:
    with running(service, Tokens(api=("geheim ü",))) as address:
        page = Page(browser, address).open("#user=u7")
        page.until(lambda: page.text("#note") == "This server needs a token.")
        page.press("wrong", Keys.ENTER)
        page.until(lambda: "with a valid token" in page.text("#note"))
        assert not page.all("#ranked .row")
        page.press("geheim ü", Keys.ENTER)
        page.settled()
        assert (
            len(page.all("#ranked .row")) == 10
            and page.text("#note") == ""
            and page.text("#token") == ""
        )
        browser.refresh()
        page.settled()
        kept = "return [sessionStorage.getItem('rec-token'), localStorage.length, document.cookie, location.href]"
        assert browser.execute_script(kept) == ["geheim ü", 0, "", address + "#user=u7"]
        assert "geheim" not in page.all("#request")[0] and "$TOKEN" in page.all("#request")[0]


def test_it_waits_for_models_that_are_being_loaded(browser: Chrome, service: Service) -> None:
    loading = Service(lambda: service.ready.backend)
    with running(loading, Tokens()) as address:
        page = Page(browser, address).open("#user=u7")
        page.until(lambda: "being loaded" in page.text("#note"))
        loading.engine = service.engine
        page.settled()
        assert len(page.all("#ranked .row")) == 10 and page.text("#note") == ""
