"""The page at ``/`` in a real Chromium over a real service: asking, streaming, citations,
stability, errors, keys.

Needs the package ``selenium`` and the programs ``chromium`` and ``chromedriver`` (Debian: apt-get
install chromium chromium-driver).  The accessibility test also needs axe-core (npm install
axe-core), its ``axe.min.js`` named in ``INVAR_AXE``.  Pictures go to the folder that
``INVAR_SHOTS`` names, if any.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from invar_ray.answering.certainty import SIGNS, Certainty
from invar_ray.models.generator import Generator
from serve.http.keys import ApiKey
from serve.replicas.generator import TransformersEngine, load_generator
from serve.replicas.remote import OpenAIEngine
from serve.replicas.reranker import RerankerReplica, load_reranker
from serve.replicas.targets import LocalTarget
from tests.reader import Reader
from tests.serving import LIMITS, Artifacts, Live, shared_artifacts
from tests.support import save_cross_encoder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the package selenium is not installed (extra dev)"
)
FERRY = "When does the ferry leave?"
EXAMPLES = ["What grows in the orchard?", FERRY]


def unsure(artifacts: Artifacts) -> TransformersEngine:
    """The real generator, calibrated so that nothing is sure enough."""

    def load(uri: str) -> Generator:
        generator = load_generator(uri)
        zero = Certainty(
            weights=(0.0,) * len(SIGNS),
            bias=0.0,
            threshold=0.9,
            risk=0.1,
            unanswerable=0.1,
            measured_risk=0.1,
            coverage=0.5,
            questions=100,
        )
        generator.certainty = zero.to_json()
        return generator

    return TransformersEngine(artifacts.generator_uri, load)


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    server = Reader()
    yield server
    server.close()


@pytest.fixture(scope="module")
def services(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Live]]:
    """The same service open, with a key, and with an index in two shards."""
    artifacts = shared_artifacts(tmp_path_factory)

    def engine() -> OpenAIEngine:  # one each: its connections belong to the service's event loop
        return OpenAIEngine(
            reader.url,
            "reader",
            artifacts.generator_uri,
            key_env="INVAR_NO_SUCH_KEY",
            max_context=165,
        )

    cross = save_cross_encoder(tmp_path_factory.mktemp("cross") / "encoder")
    reranker = RerankerReplica(lambda: load_reranker(str(cross), artifacts.index_uri))
    limits = LIMITS.model_copy(update={"max_top_k": 5, "max_new_tokens": 24})
    key = ApiKey(name="mine", sha256=hashlib.sha256(b"sesame").hexdigest())
    made = {
        "open": Live(artifacts, engine=engine(), limits=limits, examples=EXAMPLES),
        "unsure": Live(artifacts, engine=unsure(artifacts)),
        "reranked": Live(
            artifacts,
            engine=engine(),
            service={"reranker": LocalTarget("reranker", reranker), "rerank_depth": 5},
        ),
        "locked": Live(artifacts, engine=engine(), limits=limits, keys=(key,)),
        "sharded": Live(
            artifacts,
            engine=engine(),
            limits=limits,
            shards=[artifacts.left_index_uri, artifacts.right_index_uri],
        ),
    }
    yield made
    for live in made.values():
        live.close()


class Page:
    """A browser window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, scheme: str = "light", size: tuple[int, int] = (1280, 900)) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {
            "width": size[0],
            "height": size[1],
            "deviceScaleFactor": 1,
            "mobile": size[0] < 500,
        }
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(url)
        self.driver.execute_script("sessionStorage.clear(); localStorage.clear()")
        self.driver.get(url)
        self.wait("document.getElementById('served').textContent !== ''")

    def js(self, expression: str) -> Any:
        return self.driver.execute_script(f"return {expression}")

    def wait(self, condition: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < deadline, f"{condition}: {self.text('body')}"
            time.sleep(0.03)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements("css selector", selector)]

    def keys(self, *keys: str) -> None:
        """To whatever has the focus, as a keyboard does."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def ask(self, question: str, *, to_the_end: bool = True) -> None:
        field = self.find("#question")
        field.clear()
        field.send_keys(question, ENTER)
        if to_the_end:
            self.wait("!document.body.classList.contains('busy')")

    def compare(self) -> None:
        self.find("#reword").click()
        self.wait("document.querySelector('.wordings')")

    def picture(self, name: str) -> None:
        folder = os.environ.get("INVAR_SHOTS")
        if folder:
            clip = {"x": 0, "y": 0, "scale": 1, "width": self.js("innerWidth")}
            clip["height"] = self.js("Math.max(innerHeight, document.documentElement.scrollHeight)")
            shot = self.driver.execute_cdp_cmd(
                "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
            )
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console says, refused requests (401 and such) left out."""
        entries = [entry["message"] for entry in self.driver.get_log("browser")]
        return [entry for entry in entries if "the server responded with a status of" not in entry]


ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    browser, driver = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if browser is None or driver is None:
        pytest.skip(
            "no chromium and chromedriver on PATH (Debian: apt-get install chromium "
            "chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Page(chrome)
    chrome.quit()


@pytest.fixture(autouse=True)
def calm(reader: Reader) -> None:
    reader.pause_s, reader.broken_after = 0.0, -1


def test_an_answer_streams_and_its_citation_leads_to_the_passage(
    page: Page, services: dict[str, Live], reader: Reader
) -> None:
    page.open(services["open"].url)
    reader.pause_s = 0.4
    page.ask(FERRY, to_the_end=False)
    # in the middle of it
    page.wait("/^nine in( the)?$/.test(document.getElementById('answer').textContent)")
    assert page.find("#send").text == "Stop"
    assert page.texts("#passages h3")[0] == "Ferry"
    # no number is a link before it was checked
    assert page.js("document.querySelectorAll('.cite').length") == 0
    page.picture("writing")
    page.wait("!document.body.classList.contains('busy')")
    assert page.text("#answer").split("\n")[0].startswith("nine in the morning")
    (cite,) = page.driver.find_elements("css selector", ".cite")
    assert cite.accessible_name == "Passage 1, Ferry"
    cite.click()
    assert page.js("document.activeElement.id") == "passage-1"
    assert page.js("document.activeElement.classList.contains('lit')")
    assert page.texts("#passages mark") == ["nine in the morning"]
    page.keys(ESCAPE)
    assert page.js("document.activeElement.classList.contains('cite')")
    assert page.js("document.querySelector('.lit') === null")
    versions = services["open"]("GET", "/v1/index").json()["versions"]
    assert page.text("#versions") == "", "fingerprints are folded away"
    page.find("#made-by summary").click()
    shown = page.text("#versions")
    assert all(version in shown for version in versions.values())
    assert "search" in page.text("#timings")
    scores = services["open"]("POST", "/v1/retrieve", json={"question": FERRY}).json()["passages"]
    assert page.texts(".score b") == [f"{passage['score']:.3f}" for passage in scores]
    assert page.complaints() == []


def test_numbers_stand_where_the_model_put_them_and_what_it_did_not_read_has_none(
    page: Page, services: dict[str, Live]
) -> None:
    page.open(services["open"].url)
    page.find(".options summary").click()
    page.find("#top-k").send_keys("5")
    page.ask("When does the ferry leave, twice?")
    reply = services["open"](
        "POST", "/v1/answer", json={"question": "When does the ferry leave, twice?", "top_k": 5}
    ).json()
    # the model cites two; the answer stands in one of them
    assert [citation["title"] for citation in reply["citations"]] == ["Ferry"]
    assert page.texts(".cite") == [str(citation["number"]) for citation in reply["citations"]]
    assert 0 < len(reply["passages"]) < 5
    unread = page.driver.find_elements("css selector", ".unread")
    assert len(unread) == 5 - len(reply["passages"])
    assert all(item.find_element("css selector", ".number").text == "–" for item in unread)
    assert any("left out" in note for note in page.texts("#notes li"))
    page.ask("When does the ferry leave, uncited?")
    assert page.text("#passages > li .tag") == "holds the answer"
    assert page.texts("#passages mark") == ["nine in the morning"]


def test_stability_says_what_changed(page: Page, services: dict[str, Live]) -> None:
    page.open(services["open"].url)
    question = "Who kept the light on Gorse Island?"
    page.ask(question)
    page.find("#rewrites").clear()
    page.find("#rewrites").send_keys("5")
    page.compare()
    result = services["open"](
        "POST", "/v1/stability", json={"question": question, "rewrites": 5, "seed": 0}
    ).json()
    assert page.texts(".score-box b") == [
        f"{round(100 * result[name])} %" for name in ("overlap", "agreement")
    ]
    assert [" ".join(text.split()) for text in page.texts(".wording")] == [
        w["text"] for w in result["wordings"]
    ]
    strips = page.js(
        "[...document.querySelectorAll('.strip')]"
        ".map(strip => [...strip.children].map(square => "
        "square.textContent).filter(Boolean).sort())"
    )
    assert strips == [[str(p["rank"]) for p in w["passages"]] for w in result["wordings"]]
    anchor, *others = result["wordings"]
    gone = [
        len(
            {p["passage_id"] for p in anchor["passages"]} - {p["passage_id"] for p in w["passages"]}
        )
        for w in others
    ]
    kept = [line.split(" of ")[0] for line in page.texts(".change")]
    assert kept == [str(3 - count) for count in gone]
    different = [
        w for w in others if (w["refused"], w["answer"]) != (anchor["refused"], anchor["answer"])
    ]
    assert len(page.texts(".said.other")) == len(different)
    page.picture("stability")
    page.driver.execute_script("document.querySelector('.wordings').dataset.old = 1")
    page.find("#others").click()
    page.wait("document.querySelector('.wordings:not([data-old])')")
    again = services["open"](
        "POST", "/v1/stability", json={"question": question, "rewrites": 5, "seed": 1}
    ).json()
    assert [" ".join(text.split()) for text in page.texts(".wording")] == [
        w["text"] for w in again["wordings"]
    ]
    page.driver.find_elements("css selector", ".wordings .plain")[0].click()
    page.wait(
        "!document.body.classList.contains('busy') && !document.getElementById('stability').hidden"
    )
    assert page.js("document.getElementById('question').value") == again["wordings"][1]["text"]


def test_refusals_and_silence_look_like_themselves(page: Page, services: dict[str, Live]) -> None:
    page.open(services["open"].url)
    page.ask("What is the capital of France?")
    assert page.text("#answer.refused") == "The passages do not answer the question."
    assert "do not answer" in page.text("#status")
    page.picture("refused")
    page.ask("silence")
    assert "wrote no answer" in page.text("#answer.nothing")
    assert len(page.texts("#passages h3")) == 3
    page.compare()
    assert "%" in page.text(".score-box b")


def test_an_answer_that_is_not_sure_enough_looks_like_none(
    page: Page, services: dict[str, Live]
) -> None:
    page.open(services["unsure"].url)
    assert not page.find("#examples").is_displayed(), "this service has none"
    page.ask(FERRY)
    shown = page.text("#answer.refused")
    reply = services["unsure"]("POST", "/v1/answer", json={"question": FERRY}).json()
    assert reply["low_confidence"]
    assert shown.startswith("Not sure enough to answer from these passages.")
    assert "Its guess, 50 % likely to be right:" in shown
    assert "not sure enough" in page.text("#status")
    assert page.js("document.querySelectorAll('.cite').length") == 0
    page.picture("unsure")


def test_scores_are_called_what_they_are(page: Page, services: dict[str, Live]) -> None:
    for name, called in (("open", "score"), ("reranked", "relevance")):
        page.open(services[name].url)
        page.ask(FERRY)
        page.compare()
        shown = page.texts("#passages .score")
        assert shown
        assert all(each.split()[0] == called for each in shown)
        reply = services[name]("POST", "/v1/answer", json={"question": FERRY}).json()
        assert shown[0].split()[1] == f"{reply['passages'][0]['score']:.3f}"


def test_examples_are_asked_and_questions_of_the_tab_are_kept(
    page: Page, services: dict[str, Live]
) -> None:
    page.open(services["open"].url)
    assert page.texts("#examples button") == EXAMPLES
    assert not page.find("#history").is_displayed()
    page.picture("examples")
    page.find("#examples button").click()
    page.wait("!document.body.classList.contains('busy') && document.querySelector('.cite')")
    assert page.text("#answer").startswith("Pears and plums")
    assert not page.find("#examples").is_displayed()
    page.ask("<b>silence</b>")
    page.ask(EXAMPLES[0])
    page.driver.refresh()
    page.find("#history summary").click()
    assert page.texts("#history li") == [EXAMPLES[0], "<b>silence</b>"]
    page.picture("history")
    page.driver.find_elements("css selector", "#history li button")[1].click()
    page.wait("document.querySelector('#answer.nothing')")
    assert page.texts("#history li") == ["<b>silence</b>", EXAMPLES[0]]
    page.find("#forget").click()
    assert not page.find("#history").is_displayed()
    assert page.js("sessionStorage.getItem('invar-asked')") is None
    assert page.complaints() == []


def test_an_answer_is_copied_with_what_it_rests_on(page: Page, services: dict[str, Live]) -> None:
    url = services["open"].url
    allow = {"permission": {"name": "clipboard-write"}, "setting": "granted", "origin": url}
    page.driver.execute_cdp_cmd("Browser.setPermission", allow)
    page.open(url)
    page.js("window.copied = null")
    page.driver.execute_script(
        "const write = navigator.clipboard.writeText.bind(navigator.clipboard);"
        "navigator.clipboard.writeText = text => { window.copied = text; return write(text); }"
    )
    page.ask(FERRY)
    page.find("#copy").click()
    page.wait("document.getElementById('copied').textContent !== ''")
    assert page.text("#copied") == "Copied."
    assert page.js("window.copied") == f"{FERRY}\n\nnine in the morning [1]\n\n[1] Ferry"
    page.ask("What is the capital of France?")
    assert page.text("#copied") == ""
    page.find("#copy").click()
    page.wait("document.getElementById('copied').textContent !== ''")
    assert page.js("window.copied").endswith("\n\nThe passages do not answer the question.")


def test_errors_say_what_happened_and_leave_a_way_on(
    page: Page, services: dict[str, Live], reader: Reader
) -> None:
    live = services["open"]
    page.open(live.url)
    page.ask("why " * 200)
    assert page.text("#problem-title") == "This cannot be asked"
    assert "The question takes" in page.text("#problem-text")
    assert not page.find("#retry").is_displayed()
    assert not page.find("#result").is_displayed()
    page.picture("error")
    reader.broken_after = 2
    page.ask(FERRY)
    assert page.text("#problem-title") == "The answer broke off"
    reader.broken_after = -1
    page.wait("!document.getElementById('retry').disabled")
    page.find("#retry").click()
    page.wait("document.querySelector('.cite')")
    assert not page.find("#problem").is_displayed()


def test_a_broken_stream_keeps_what_came(
    page: Page, services: dict[str, Live], reader: Reader
) -> None:
    page.open(services["open"].url)
    reader.pause_s, reader.broken_after = 0.2, 3
    page.ask(FERRY)
    assert page.text("#problem-title") == "The answer broke off"
    assert page.text("#answer") == "nine in the"
    assert page.js("document.querySelectorAll('.cite').length") == 0


def test_a_busy_service_is_asked_again_after_the_time_it_names(
    page: Page, services: dict[str, Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve.errors import Overloaded

    live = services["open"]

    async def busy(*args: Any, **kwargs: Any) -> Any:
        raise Overloaded("9 requests are being answered already", 2.0)

    page.open(live.url)
    with monkeypatch.context() as patch:
        patch.setattr(live.service, "retrieve", busy)
        page.ask(FERRY)
    assert page.text("#problem-title") == "The service is busy"
    assert page.find("#retry").text in {"Try again in 2 s", "Try again in 1 s"}
    assert not page.find("#retry").is_enabled()
    page.wait("!document.getElementById('retry').disabled", 5)
    page.find("#retry").click()
    page.wait("document.querySelector('.cite')")


def test_stop_ends_the_model(page: Page, services: dict[str, Live], reader: Reader) -> None:
    page.open(services["open"].url)
    reader.pause_s = 0.5
    page.ask(FERRY, to_the_end=False)
    page.wait("document.getElementById('answer').textContent.startsWith('nine')")
    before = reader.gone
    page.find("#send").click()
    page.wait("!document.body.classList.contains('busy')", 2)
    assert page.text("#status") == "Stopped."
    deadline = time.monotonic() + 10
    while reader.gone == before:
        assert time.monotonic() < deadline, "the engine's stream goes on"
        time.sleep(0.05)


def test_a_key_is_asked_for_and_stays_in_the_tab(page: Page, services: dict[str, Live]) -> None:
    page.open(services["locked"].url)
    assert "key is needed" in page.text("#served")
    page.ask(FERRY)
    page.wait("document.getElementById('key-dialog').open")
    page.keys("wrong", ENTER)
    page.wait("document.getElementById('key-fault').textContent.includes('did not accept')")
    page.picture("key")
    page.keys("käse", ENTER)
    assert "no spaces or accents" in page.text("#key-fault")
    page.driver.execute_script("document.getElementById('key').value = ''")
    page.keys("sesame", ENTER)
    page.wait("document.querySelector('.cite')")
    assert "sesame" not in page.js("location.href")
    assert page.js("localStorage.length") == 0
    page.driver.refresh()
    page.wait("document.getElementById('served').textContent.startsWith('index')")
    assert page.text("#key-open") == "Key: set"
    page.find("#key-open").click()
    page.find("#key-forget").click()
    assert page.js("sessionStorage.getItem('invar-key')") is None


def test_a_missing_shard_is_told(
    page: Page, services: dict[str, Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*args: Any) -> Any:
        raise OSError("the shard's node is gone")

    page.open(services["sharded"].url)
    monkeypatch.setattr(services["sharded"].retrievers[0], "retrieve", gone)
    page.ask("What grows in the orchard?")
    assert "did not answer (shard 0)" in page.text("#notes .warning")


def test_keyboard_alone(page: Page, services: dict[str, Live]) -> None:
    page.open(services["open"].url)
    assert page.js("document.activeElement.id") == "question"
    page.keys(FERRY, ENTER)
    page.wait("document.querySelector('.cite')")
    for _ in range(4):  # button, options, citation
        page.keys(TAB)
        if page.js("document.activeElement.className") == "cite":
            break
    page.keys(ENTER)
    assert page.js("document.activeElement.id") == "passage-1"
    page.keys(ESCAPE)
    for _ in range(6):
        page.keys(TAB)
        if page.js("document.activeElement.id") == "reword":
            break
    page.keys(ENTER)
    page.wait("document.querySelector('.wordings')")


def test_narrow_screens_do_not_scroll_sideways(page: Page, services: dict[str, Live]) -> None:
    for scheme in ("light", "dark"):
        page.open(services["open"].url, scheme, (320, 640))
        page.ask("When does the ferry leave, twice? " + "x" * 80)
        page.compare()
        assert page.js("document.documentElement.scrollWidth") == 320
        page.picture(f"narrow-{scheme}")


def test_the_theme_follows_the_system_or_the_reader(page: Page, services: dict[str, Live]) -> None:
    def ground() -> str:
        return str(page.js("getComputedStyle(document.body).backgroundColor"))

    page.open(services["open"].url, "dark")
    dark = ground()
    page.open(services["open"].url, "light")
    light = ground()
    assert light != dark
    page.find("#theme").click()
    page.find("#theme").click()
    assert ground() == dark
    page.driver.refresh()
    assert ground() == dark
    assert page.text("#theme") == "Theme: dark"


def test_nothing_comes_from_elsewhere(page: Page, services: dict[str, Live]) -> None:
    url = services["open"].url
    page.driver.get_log("performance")
    page.open(url)
    page.ask(FERRY)
    page.driver.get(f"{url}/docs")
    page.wait("document.querySelectorAll('.opblock').length > 8")
    assert page.complaints() == []

    messages = [
        json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")
    ]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10
    assert [address for address in asked if not address.startswith((url, "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, services: dict[str, Live], scheme: str) -> None:
    place = os.environ.get("INVAR_AXE")
    if not place:
        pytest.skip("INVAR_AXE names no axe.min.js (npm install axe-core)")
    script = Path(place).read_text(encoding="utf-8")

    def faults(state: str) -> list[Any]:
        page.picture(f"{state}-{scheme}")
        page.driver.execute_script(script)
        result = page.driver.execute_async_script("axe.run(document).then(arguments[0])")
        assert len(result["passes"]) > 10
        return [
            (state, fault["id"], [node["target"] for node in fault["nodes"]])
            for fault in result["violations"]
        ]

    found = []
    for size in ((1280, 900), (375, 800)):
        page.open(services["open"].url, scheme, size)
        found += faults(f"fresh-{size[0]}")
        page.find(".options summary").click()
        page.ask("When does the ferry leave, twice?")
        page.compare()
        page.find(".cite").click()
        page.find("#made-by summary").click()
        page.find("#history summary").click()
        found += faults(f"answer-{size[0]}")
        page.ask("What is the capital of France?")
        found += faults(f"refused-{size[0]}")
        page.ask("why " * 200)
        found += faults(f"error-{size[0]}")
        page.find("#key-open").click()
        found += faults(f"key-{size[0]}")
    assert found == []
