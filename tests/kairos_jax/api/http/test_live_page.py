"""The live page in a real browser, over a server with fake engines."""

import contextlib
import random
import re
import threading
from collections.abc import Iterator

import chromium
import fakes
import http_fakes
import pytest

from kairos_jax.api.http.server import HttpOptions
from kairos_jax.api.keys import digest
from schedulers.ledger.request import Request, Slo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium.PATH is None, reason="there is no chromium here"),
]

CONFIG = fakes.altered(max_requests=1200, decode__max_batch=32, decode__kv_tokens=4096)
# Texts that are wider than their boxes.
WIDE = """
[...document.querySelectorAll("p, h1, h2, h3, label, button, span")]
  .filter(node => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0
    && getComputedStyle(node).display !== "inline")
  .map(node => node.id || node.textContent)
"""
# Of the queue: rows of those that can be in time, how many more, how many are lost, how many more.
QUEUE = """
["rows", "rest", "lost-rest"].map(name => document.getElementById(`queue-${name}`))
  .flatMap(node => node.id === "queue-rows" ? node.children.length : node.textContent)
  .toSpliced(2, 0, parseInt(document.getElementById("queued-note").textContent))
"""
PROMPT = "document.getElementById('prompt').getBoundingClientRect()"
# What it took to draw each of a few snapshots, in milliseconds.
DRAWN = """
new Promise(done => {
  const took = [];
  document.addEventListener("snapshot", () => {
    took.push(Number(document.documentElement.dataset.drawnMs));
    if (took.length === 4) done(took);
  });
})
"""


@pytest.fixture
def tab(tmp_path):
    with chromium.browsing(tmp_path / "profile") as tab:
        yield tab
        assert not tab.wrong


def paced(engine, step_s: float) -> None:
    """Lets its steps last so long."""
    step, never = engine.step, threading.Event()

    def slow(work):
        never.wait(step_s)
        return step(work)

    engine.step = slow


@contextlib.contextmanager
def served(step_s: float = 0.02, app: HttpOptions | None = None) -> Iterator[tuple]:
    """A server whose decode steps last so long: its address, and what runs a test on it."""
    urls = []

    async def begin(api):
        urls.append(str(api.client.base_url))
        paced(api.harness.engines[1], step_s)

    with http_fakes.serving_in_thread(CONFIG, app) as run:
        run(begin)
        yield urls[0], run


async def crowd(api) -> None:
    """Some that run, and a thousand whose prefill does not begin."""
    rng, router = random.Random(1), api.harness.router

    def submit(name, ttft, max_tokens):
        prompt = [rng.randrange(2, fakes.VOCAB) for _ in range(rng.choice([5, 30, 60]))]
        slo = Slo(ttft, rng.choice([0.1, 0.5]))
        return router.submit(Request(name, router.clock(), prompt, max_tokens, slo))

    running = [submit(f"runs-{index}", 30.0, 64) for index in range(24)]
    for stream in running:
        await anext(aiter(stream))
    api.harness.engines[0].gate.clear()
    for index in range(1000):
        # A tenth is late from the beginning.
        ttft = 1e-4 if index % 10 == 0 else rng.uniform(60.0, 90.0)
        submit(f"<b>waits</b>-{index}", ttft, 8)


async def dismiss(api) -> None:
    """All go away."""
    router = api.harness.router
    for stream in router.streams:
        router.cancel(stream)
    api.harness.engines[0].gate.set()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_thousand_queued_requests_are_shown_without_lag(tab, tmp_path, width, dark):
    with served(step_s=0.25) as (url, run):
        run(crowd)
        tab.open(url, width, 900, dark)
        tab.until("document.getElementById('queued').textContent === '1,000'")
        tab.until("document.querySelectorAll('.instance').length === 2")
        tab.until("document.querySelector('path.measured[d^=M]')")
        tab.until("document.getElementById('queue-lost-rows').children.length === 6")
        rows, rest, lost, lost_rest = tab.value(QUEUE)
        assert (rows, int(re.sub("[^0-9]", "", rest))) == (12, 1000 - lost - 12)
        assert int(re.sub("[^0-9]", "", lost_rest)) == lost - 6
        if width < 600:  # on the first screen
            assert tab.value(f"{PROMPT}.bottom + scrollY") < 800
            assert tab.value("document.querySelector('#tiles + #try') !== null")
        # What clients call themselves is text.
        assert tab.value("document.querySelectorAll('td b').length") == 0
        assert tab.value("document.querySelector('#queue-rows td').textContent").startswith("<b>")
        room = "document.documentElement.clientWidth"  # without the bar that scrolls down
        assert tab.value("document.documentElement.scrollWidth") == tab.value(room) <= width
        assert tab.value(WIDE) == []
        assert min(tab.value(DRAWN)) < 50
        shade = tab.value("getComputedStyle(document.body).backgroundColor")
        assert shade == ("rgb(13, 19, 28)" if dark else "rgb(246, 248, 250)")
        tab.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        tab.open("about:blank")
        run(dismiss)


def answer_ids(prompt: str, count: int) -> list[int]:
    """What follows in a chat, if it is not ended before."""
    return fakes.expected_tokens(http_fakes.ids_of(f"u:{prompt}|a:"), count)


def test_a_prompt_is_sent_and_its_tokens_are_shown_against_their_deadlines(tab):
    with served() as (url, _):
        tab.open(url)
        tab.until("document.getElementById('state').textContent === 'live'")
        prompt = next(text for text in map(str, range(99)) if 0 not in answer_ids(text, 12))
        tab.type("#prompt", prompt)
        tab.type("#max-tokens", "12")
        tab.type("#tpot", "1")
        tab.value("document.getElementById('send').click()")
        tab.until("document.getElementById('outcome').textContent")
        outcome = tab.value("document.getElementById('outcome').textContent")
        outcome = outcome.replace("\N{NO-BREAK SPACE}", " ")
        assert outcome.startswith("queue ")
        assert ", transfer " in outcome
        # A step takes 20 ms, and tokens after the first were due a millisecond each; though some
        # may be told of together.
        assert re.search(
            r"TPOT [0-9.]+ ms of 1 ms; 12 tokens, ([1-9]|1[01]) late; ended by length.", outcome
        )
        answer = tab.value("document.getElementById('answer').textContent")
        assert answer == http_fakes.text_of(answer_ids(prompt, 12))
        assert tab.value("document.querySelector('#timeline .dots.missed').getAttribute('d')")
        assert not tab.value("document.getElementById('send').disabled")
        tab.type("#max-tokens", "60")
        tab.type("#tpot", "0")
        tab.value("document.getElementById('send').click()")
        tab.until("!document.getElementById('refusal').hidden")
        refusal = tab.value("document.getElementById('refusal').textContent")
        assert refusal == "slo.tpot_ms must be a positive number of milliseconds, got 0"
        tab.wrong.remove(
            "Failed to load resource: the server responded with a status of 400 (Bad Request)"
        )


def test_a_key_is_asked_for_where_one_is_needed(tab):
    with served(app=HttpOptions(0, (digest(b"secret"),))) as (url, _):
        tab.open(url)
        for key, shown in (("wrong", "a key is needed"), ("secret", "live")):
            tab.until("!document.getElementById('key-form').hidden")
            tab.type("#key", key)
            tab.value("document.querySelector('#key-form button').click()")
            tab.until(f"document.getElementById('state').textContent === '{shown}'")
        tab.until("document.getElementById('key-form').hidden")
        tab.open(url)  # as long as the tab is open, it is known
        tab.until("document.getElementById('state').textContent === 'live'")
        refused = [each for each in tab.wrong if "401" in each]
        assert len(refused) == 2
        tab.wrong = [each for each in tab.wrong if each not in refused]


def shown(tab, id: str) -> str:
    text = tab.value(f"document.getElementById('{id}').textContent")
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_what_can_no_longer_be_kept_counts_at_once(tab):
    with served() as (url, run):
        run(crowd)
        tab.open(url)
        tab.until("document.getElementById('kept').textContent.includes('%')")
        # None has ended, and those that run are in time.
        assert shown(tab, "kept") == "0 %"
        assert "0 ended in 5 min, 100 in progress are lost" in shown(tab, "kept-note")
        assert shown(tab, "queued-note") == "100 can't be in time"
        assert shown(tab, "queue-lost-rest") == "and 94 more"
        tab.open("about:blank")
        run(dismiss)


def test_terms_are_explained_on_focus_and_on_hover(tab):
    with served() as (url, _):
        tab.open(url)
        tab.until("document.querySelectorAll('.instance .term').length === 8")
        tips = "[...document.querySelectorAll('[role=tooltip]:not([hidden])')].map(tip => tip.id)"
        described = tab.value(
            "[...document.querySelectorAll('.term')].map(node => "
            "document.getElementById(node.getAttribute('aria-describedby'))?.role)"
        )
        assert set(described) == {"tooltip"}
        stops = "[...document.querySelectorAll('.instance .term')].map(node => node.tabIndex)"
        assert tab.value(stops) == [0] * 4 + [-1] * 4
        assert tab.value(tips) == []
        tab.value("document.querySelector('#queue-title .term').focus()")
        assert tab.value(tips) == ["tip-laxity"]
        tab.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape")
        assert tab.value(tips) == []
        parked = "[...document.querySelectorAll('.term')].at(-2)"
        tab.value(f"{parked}.scrollIntoView()")
        at = [tab.value(f"{parked}.getBoundingClientRect().{side} + 4") for side in ("x", "y")]
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])
        tab.until(f"{tips}[0] === 'tip-parked'")
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        tab.until(f"!{tips}.length")


def test_the_step_tile_and_the_card_say_the_same(tab):
    with served(step_s=0.05) as (url, _):
        tab.open(url)
        tab.until("document.getElementById('state').textContent === 'live'")
        tab.type("#max-tokens", "60")
        tab.value("document.getElementById('send').click()")
        tab.until("document.getElementById('step').textContent.includes('ms')")
        card = "document.querySelectorAll('.instance')[1].lastChild.textContent"
        told = tab.value(
            "new Promise(done => document.addEventListener('snapshot', () => "
            f"done([document.getElementById('step').textContent, {card}]), {{ once: true }}))"
        )
        assert told[1].startswith(f"step {told[0]}, predicted"), told
        tab.until("document.getElementById('outcome').textContent")
        # Its tokens are in the chart once their five seconds are over.
        tab.until("!document.getElementById('tokens-now').textContent.startsWith('0/s')")
        assert tab.value("document.querySelector('#tokens-chart .rate').getAttribute('d')")


def test_a_server_that_is_gone_dims_the_page(tab):
    with served() as (url, _):
        tab.open(url)
        tab.until("document.getElementById('state').textContent === 'live'")
        assert not tab.value("'gone' in document.body.dataset")
        assert tab.value("document.getElementById('gone').hidden")
    tab.until("'gone' in document.body.dataset")
    assert re.match(r"No news from the server since \d+:\d\d:\d\d", shown(tab, "gone-since"))
    assert tab.value("getComputedStyle(document.querySelector('main')).opacity") == "0.55"
    tab.until("parseInt(document.getElementById('gone-for').textContent) >= 1")
    refused = "Failed to load resource: net::ERR_"
    tab.wrong = [each for each in tab.wrong if not each.startswith(refused)]
