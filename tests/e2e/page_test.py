"""The built-in page in a browser: against the program with the demo model, and against a scripted box where the test has to
say what the server does."""
import gzip
import http.client
import json
import re
import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from browser import Browser
from program import run
from scripted_box import ScriptedBox, experts, stats

TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]
READY = "document.querySelector('#state').textContent === 'ready'"
ENDED = "document.querySelector('.message.assistant:last-of-type[aria-busy=false]')"
# What the demo server may not offer: the page asks once and goes without.
OPTIONAL = ("/v1/stats", "/v1/experts", "/v1/plan")
CARDS = {"Now", "Memory", "KV cache and bandwidth", "Experts", "Requests", "Predicted and measured", "Plan", "Connect"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.quit()


@pytest.fixture
def box(server):
    scripted = ScriptedBox(server)
    yield scripted
    scripted.stop()


def open_page(browser, origin, *size):
    browser.open(origin, *size)
    browser.wait(f"{READY} && document.querySelector('#model').textContent", "ready")


def ask(browser, text):
    """Types and sends; the text of the answer when it has ended."""
    before = len(browser.all(".message.assistant"))
    browser.find("#prompt").send_keys(text, Keys.ENTER)
    browser.wait(f"document.querySelectorAll('.message.assistant').length > {before} && {ENDED}", "an answer")
    return browser.all(".message.assistant")[-1].find_element("css selector", ".text").text


def set_field(browser, name, value):
    browser.run("document.querySelector('#settings').open = true")
    field = browser.find(f"#set-{name}")
    if field.tag_name == "select":
        Select(field).select_by_value(value)
    else:
        field.clear()
        field.send_keys(value)


def overflow(browser):
    """What reaches over the right edge, but for what lies in a part that scrolls by itself."""
    return browser.run("""
        const wide = document.scrollingElement.scrollWidth > innerWidth ? ["the page"] : [];
        const scrolls = (e) => e && (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX) && e !== document.body || scrolls(e.parentElement));
        const columns = [...document.querySelectorAll("#messages, #box, #sidebar")].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.id);
        return [...wide, ...columns, ...[...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(".hidden, .skip") &&
            e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement)).map((e) => e.outerHTML.slice(0, 80))];""")


def assert_only(browser, origin, expected=()):
    """No error, no refusal of the policy, and nothing asked of anybody else."""
    assert browser.problems(expected) == []
    assert {url for url in browser.requests() if not url.startswith((origin, "blob:", "about:"))} == set()


def eventually(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.03)


# --- the files over HTTP ---

def test_files_are_packed_and_not_sent_twice(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def get(path, method="GET", **headers):
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()

    status, plain, body = get("/page/marked.js")
    packed_status, packed, packed_body = get("/page/marked.js", accept_encoding="gzip, br")
    assert (status, packed_status, packed["content-encoding"]) == (200, 200, "gzip")
    assert gzip.decompress(packed_body) == body and "content-encoding" not in plain
    status, again, nothing = get("/page/marked.js", accept_encoding="gzip", if_none_match=packed["etag"])
    assert (status, nothing, again["etag"]) == (304, b"", packed["etag"])
    status, head, nothing = get("/", "HEAD")
    assert (status, nothing) == (200, b"") and "default-src 'none'" in head["content-security-policy"]
    assert get("/page/../etc/passwd")[0] == 404


# --- chat with the real server ---

def test_an_answer_comes_and_is_kept(browser, server):
    origin = f"http://127.0.0.1:{server.port}"
    open_page(browser, origin)
    assert browser.find("#model").text == "demo"
    set_field(browser, "temperature", "0")
    assert ask(browser, "What is the capital of Norway?") == "The capital of Norway is Oslo."
    line = browser.find(".message.assistant .stats").text
    assert re.fullmatch(r"\d+ tokens · [\d.,]+ t/s · first token after [\d.]+ m?s · \d+ of \d+ prompt tokens cached", line), line
    browser.find(".message.assistant .tools button:last-child").click()  # retry: the prompt is known now
    browser.wait(f"{ENDED} && document.querySelector('.message.assistant .stats').textContent")
    cached, prompt = re.search(r"(\d+) of (\d+) prompt", browser.find(".message.assistant .stats").text).groups()
    assert int(cached) == int(prompt) - 1
    assert ask(browser, "What is the capital of France?") == "The capital of France is Paris."
    browser.driver.refresh()
    browser.wait("document.querySelector('#conversations .title')").click()
    assert [m.text for m in browser.all(".message .text")][::2] == ["What is the capital of Norway?", "What is the capital of France?"]
    assert browser.find("#set-temperature").get_attribute("value") == "0"
    assert_only(browser, origin, OPTIONAL)


def test_an_edited_question_is_asked_again(browser, server):
    open_page(browser, f"http://127.0.0.1:{server.port}")
    set_field(browser, "temperature", "0")
    ask(browser, "What is the capital of Norway?")
    ask(browser, "Who are you?")
    browser.find(".message.user .tools button").click()
    area = browser.find(".message.user textarea")
    area.clear()
    area.send_keys("What is the capital of France?", Keys.ENTER)
    browser.wait(f"document.querySelectorAll('.message').length === 2 && {ENDED}")
    assert [m.text for m in browser.all(".message .text")] == ["What is the capital of France?", "The capital of France is Paris."]


def test_thinking_is_folded_and_tools_are_shown(browser, server):
    open_page(browser, f"http://127.0.0.1:{server.port}")
    set_field(browser, "temperature", "0")
    set_field(browser, "thinking", "enabled")
    assert ask(browser, "What is 3 + 4?")
    thinking = browser.find(".message.assistant details.thinking")
    assert thinking.is_displayed() and thinking.get_attribute("open") is None
    thinking.find_element("css selector", "summary").click()
    browser.wait("document.querySelector('.thinking .markdown').textContent.trim()", "unfolded")
    assert re.search(r"\(\d+ of thinking\)", browser.find(".stats").text)
    browser.find("#new-chat").click()
    set_field(browser, "thinking", "disabled")
    set_field(browser, "tools", "[{")
    browser.find("#prompt").send_keys("What is the weather in Oslo?", Keys.ENTER)
    assert browser.find("#tools-error").is_displayed() and not browser.all(".message"), "no request goes out with tools that are no JSON"
    set_field(browser, "tools", json.dumps(TOOLS))
    browser.find("#prompt").send_keys(Keys.ENTER)
    browser.wait(ENDED)
    call = browser.find(".message.assistant .call")
    assert "get_weather" in call.text and re.search(r'"city": "\w+"', call.text)
    assert browser.find("label[for=prompt]").get_attribute("textContent") == "Result of get_weather"
    assert ask(browser, '{"temperature": 7}')
    assert browser.find(".message.tool").text.startswith("Tool result") and browser.find("label[for=prompt]").get_attribute("textContent") == "Message"


# --- chat with a scripted one ---

def test_an_answer_streams_and_stops(browser, box):
    box.answer = [{"content": "one "}, *[piece for _ in range(200) for piece in (0.05, {"content": "more "})]]
    open_page(browser, box.origin)
    browser.find("#prompt").send_keys("count", Keys.ENTER)
    browser.wait("document.querySelector('.message.assistant .text')?.textContent.includes('more more')", "it grows")
    assert browser.find("#stop").is_displayed() and not browser.find("#send").is_displayed()
    browser.find("#prompt").send_keys(Keys.ESCAPE)
    browser.wait(ENDED)
    text = browser.find(".message.assistant .text").text
    time.sleep(0.4)
    assert browser.find(".message.assistant .text").text == text and len(text) < 500
    assert browser.find(".stats").text.startswith("stopped") and browser.find("#send").is_displayed()
    browser.find("#prompt").send_keys("again", Keys.ENTER)
    browser.wait("document.querySelectorAll('.message.assistant').length === 2 && !document.querySelector('#stop').hidden")
    browser.find("#stop").click()
    browser.wait(ENDED)
    assert box.bodies[1]["messages"][1]["content"].strip() == text, "what was said until then belongs to the conversation"
    assert_only(browser, box.origin)


def test_a_long_prompt_has_a_bar(browser, box):
    def read(tokens):
        return {"prompt_progress": {"total": 48000, "cache": 16384, "processed": tokens, "time_ms": 900}}

    box.answer = [read(16384), 1.0, read(36000), 1.5, {"content": "done"}]
    open_page(browser, box.origin)
    browser.find("#prompt").send_keys("a long one", Keys.ENTER)
    browser.wait("document.querySelector('.waiting')?.textContent.includes('16,384 of 48,000 tokens')", "it begins where the cache ends")
    bar = browser.find(".waiting progress")
    assert bar.is_displayed() and bar.get_attribute("aria-label")
    browser.wait("document.querySelector('.waiting progress').position === 0.75", "it goes on")
    browser.wait(ENDED)
    assert not bar.is_displayed() and browser.find(".message.assistant .text").text == "done"
    assert box.bodies[0]["return_progress"] is True
    assert_only(browser, box.origin)


def test_an_answer_goes_on_while_another_conversation_is_read(browser, box):
    box.answer = [{"content": "begin "}, 1.0, {"content": "end"}]
    open_page(browser, box.origin)
    browser.find("#prompt").send_keys("slow", Keys.ENTER)
    browser.wait("document.querySelector('.message.assistant .text')?.textContent.includes('begin')")
    browser.find("#new-chat").click()
    assert not browser.all(".message") and browser.find("#send").is_displayed()
    time.sleep(1.3)
    browser.find("#conversations .title").click()
    assert browser.find(".message.assistant .text").text == "begin end"


def test_settings_go_with_the_request(browser, box):
    open_page(browser, box.origin)
    for name, value in {"system": "Be brief.", "temperature": "0.3", "top_p": "0.9", "max_tokens": "77", "seed": "5", "thinking": "enabled", "reasoning_effort": "high"}.items():
        set_field(browser, name, value)
    ask(browser, "Hi")
    body = box.bodies[-1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed", "thinking", "reasoning_effort", "stream", "model")} == {
        "temperature": 0.3, "top_p": 0.9, "max_tokens": 77, "seed": 5, "thinking": {"type": "enabled"}, "reasoning_effort": "high", "stream": True, "model": "scripted"}
    set_field(browser, "top_p", "7")
    browser.find("#prompt").send_keys("Hi", Keys.ENTER)
    assert browser.run("return document.activeElement.id") == "set-top_p" and len(box.bodies) == 1, "a value out of range is not sent"


def test_errors_are_shown_and_can_be_tried_again(browser, box):
    box.answer = [{"content": "half an "}, "the <b>engine</b> failed"]
    open_page(browser, box.origin)
    assert ask(browser, "Hi") == "half an"
    assert browser.find(".message.assistant .error").text == "the <b>engine</b> failed"
    box.answer = [{"content": "whole"}]
    browser.find(".message.assistant .tools button:last-child").click()
    browser.wait("document.querySelector('.message.assistant .text').textContent === 'whole'")
    assert not browser.find(".message.assistant .error").is_displayed()


HOSTILE = [
    "<script>window.pwned = 1</script>", "<img src=x onerror=\"window.pwned = 1\">", "<svg onload=\"window.pwned = 1\"><script>window.pwned = 1</script></svg>",
    "<iframe src=\"javascript:parent.pwned = 1\"></iframe>", "<a href=\"javascript:window.pwned = 1\">html link</a>", "[js link](javascript:window.pwned=1)", "[js case](JaVaScRiPt:window.pwned=1)",
    "[js entity](&#106;avascript:window.pwned=1)", "[js tab](java\tscript:window.pwned=1)", "[data](data:text/html,<script>window.pwned=1</script>)", "[vb](vbscript:x)", "[file](file:///etc/passwd)",
    "[path](/v1/stats)", "<javascript:window.pwned=1>", "![picture](https://elsewhere.example/a.png)", "![picture](javascript:window.pwned=1)", "![data](data:image/svg+xml,<svg onload=window.pwned=1>)",
    "[ref][r]\n\n[r]: javascript:window.pwned=1", "```html\n<script>window.pwned = 1</script>\n```", "```\"><img src=x onerror=window.pwned=1>\ncode\n```", "`<img src=x onerror=window.pwned=1>`",
    "| a | b |\n| - | - |\n| <img src=x onerror=window.pwned=1> | [x](javascript:window.pwned=1) |", "# <img src=x onerror=window.pwned=1>", "- <svg/onload=window.pwned=1>", "> <details open ontoggle=window.pwned=1>",
    "[t](https://ok.example \"\\\" onmouseover=\\\"window.pwned=1\")", "<style>body { display: none }</style>", "<base href=\"https://elsewhere.example/\">", "<meta http-equiv=refresh content=\"0;url=https://elsewhere.example\">",
    "<form action=https://elsewhere.example><button>x</button></form>", "<link rel=stylesheet href=https://elsewhere.example/a.css>", "</textarea></div></article><script>window.pwned=1</script>",
    "<math><mi xlink:href=\"javascript:window.pwned=1\">x</mi></math>", "&lt;script&gt;window.pwned=1&lt;/script&gt;", "> " * 3000 + "deep", "**" * 2000 + "x", "[" * 2000 + "x",
]


def test_hostile_text_stays_text(browser, box):
    open_page(browser, box.origin)
    for text in HOSTILE:
        box.answer = [{"reasoning_content": text}, {"content": text}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": text[:60], "arguments": text}}]}]
        browser.run("document.querySelector('#new-chat').click(); const p = document.querySelector('#prompt'); p.value = arguments[0]; document.querySelector('#send').click()", text)
        browser.wait(f"document.querySelectorAll('.message.assistant').length === 1 && {ENDED}", f"an answer of {text[:40]!r}")
        browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
        browser.wait("document.querySelector('.thinking .markdown').textContent")
        found = browser.run("""
            const log = document.querySelector("#messages");
            const elements = [...document.querySelectorAll("body *")];
            return {
              made: [...log.querySelectorAll("script, img, svg, iframe, object, embed, style, base, meta, link, form, math, input")].map((e) => e.outerHTML),
              handlers: elements.flatMap((e) => [...e.attributes].filter((a) => a.name.startsWith("on")).map((a) => a.name)),
              links: [...log.querySelectorAll("a")].map((a) => [a.protocol, a.rel, a.target]),
              text: [".text.markdown", ".thinking .markdown", ".call", ".message.user .text"].map((part) => log.querySelector(part).textContent),
              pwned: window.pwned ?? null,
            }""")
        assert (found["made"], found["handlers"], found["pwned"]) == ([], [], None), text[:80]
        assert all(link == ["https:", "noopener noreferrer", "_blank"] for link in found["links"]), (text[:80], found["links"])
        assert found["text"][3] == text.strip(), "what the user typed is shown as it is"
        if text.startswith("<") and not text.startswith(("<javascript", "</")):
            assert all(text in part for part in found["text"]), (text, found["text"])
    assert_only(browser, box.origin)


def test_markdown_is_rendered(browser, box):
    box.answer = [{"content": "## Title\n\nA **bold** word, `a &lt; b`, AT&amp;T, [a link](https://ok.example/?a=1&b=2) and <me@ok.example>.\n\n3. three\n4. four\n\n- [x] done\n\n| a | b |\n| -: | - |\n| 1 | 2 |\n\n```py\nx = '&lt;' < \"<b>\"\n```\n"}]
    open_page(browser, box.origin)
    ask(browser, "Hi")
    found = browser.run("""
        const t = document.querySelector(".message.assistant .text");
        return [t.querySelector("h4").textContent, t.querySelector("strong").textContent, t.querySelector("p > code").textContent, t.querySelector("p").textContent.includes("AT&T"),
                [...t.querySelectorAll("a")].map((a) => a.getAttribute("href")), t.querySelector("ol").start, t.querySelector("li.task").textContent.trim(), t.querySelector("td").className,
                t.querySelector("pre").textContent]""")
    assert found == ["Title", "bold", "a &lt; b", True, ["https://ok.example/?a=1&b=2", "mailto:me@ok.example"], 3, "☑ done", "align-right", "x = '&lt;' < \"<b>\""]


# --- conversations ---

def test_conversations_are_renamed_exported_and_deleted(browser, box, tmp_path):
    open_page(browser, box.origin)
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    ask(browser, "First question")
    browser.find("#new-chat").click()
    ask(browser, "Second question")
    titles = lambda: [t.text for t in browser.all("#conversations .title")]  # noqa: E731
    assert titles() == ["Second question", "First question"]

    def menu(row, name):
        browser.all("#conversations .menu")[row].find_element("css selector", "summary").click() if not browser.all("#conversations .menu")[row].get_attribute("open") else None
        next(b for b in browser.all("#conversations .menu")[row].find_elements("css selector", "button") if b.text == name).click()

    menu(1, "Rename")
    browser.find("#conversations input").send_keys("Fish", Keys.ENTER)
    assert titles() == ["Second question", "Fish"]
    menu(1, "Export")
    eventually((tmp_path / "Fish.json").exists)
    exported = json.loads((tmp_path / "Fish.json").read_text())
    assert exported["title"] == "Fish" and [m["content"] for m in exported["messages"]] == ["First question", "Hello"]
    menu(0, "Delete")
    assert titles() == ["Second question", "Fish"], "asked once more"
    menu(0, "Really delete")
    browser.wait("document.querySelectorAll('#conversations .title').length === 1")
    browser.driver.refresh()
    browser.wait("document.querySelector('#conversations .title')")
    assert titles() == ["Fish"]


# --- the key ---

def test_the_key_is_asked_for_once(browser, box):
    box.key = "right"
    browser.open(box.origin)
    browser.wait("document.querySelector('#key').open", "the key is asked for")
    browser.find("#key-input").send_keys("wrong", Keys.ENTER)
    browser.wait("document.querySelector('#key').open && document.querySelector('#key-text').textContent.includes('does not take')")
    browser.find("#key-input").send_keys("right", Keys.ENTER)
    browser.wait("document.querySelector('#model').textContent === 'scripted'")
    assert ask(browser, "Hi") == "Hello" and box.keys == ["Bearer right"]
    browser.wait("!document.querySelector('.card[aria-label=Experts]').hidden", "the box view has the key too")
    assert browser.run("return [Object.values(localStorage).join().includes('right'), Object.values(sessionStorage)]") == [False, ["right"]]
    browser.driver.refresh()
    browser.wait("document.querySelector('#model').textContent === 'scripted'", "kept for the tab")
    assert not browser.find("#key").is_displayed()
    assert_only(browser, box.origin, ["401"])


def test_the_key_of_the_real_server(browser, start_server):
    origin = f"http://127.0.0.1:{start_server('--api-key', 'a-key-of-sixteen-letters').port}"
    browser.open(origin)
    browser.wait("document.querySelector('#key').open", "the page itself needs none")
    browser.find("#key-input").send_keys("a-key-of-sixteen-letters", Keys.ENTER)
    browser.wait("document.querySelector('#model').textContent === 'demo'")
    assert ask(browser, "Who are you?")
    assert "authorization: Bearer $OPENAI_API_KEY" in browser.run("return document.querySelector('.card[aria-label=Connect]').textContent")


def test_a_declined_key_is_asked_for_when_it_is_needed(browser, box):
    box.key = "right"
    browser.open(box.origin)
    browser.wait("document.querySelector('#key').open")
    browser.find("#key-cancel").click()
    browser.find("#prompt").send_keys("Hi", Keys.ENTER)
    browser.wait("document.querySelector('#key').open", "a chat needs it")
    browser.find("#key-input").send_keys("right", Keys.ENTER)
    browser.wait(f"{ENDED}")
    assert browser.find(".message.assistant .text").text == "Hello"


# --- states of the server ---

def test_loading_draining_and_faults_are_told(browser, box):
    box.health = (503, {"error": {"message": "the model is loading (42 %); see /health", "progress": 0.42}})
    browser.open(box.origin)
    browser.wait("document.querySelector('#state').textContent === 'loading'")
    assert browser.find("#banner").text == "Loading the model: 42 %" == browser.run("return document.querySelector('#spoken').textContent")
    assert browser.find("#banner-progress").get_attribute("value") == "0.42"
    browser.find("#prompt").send_keys("Hi", Keys.ENTER)
    assert not box.bodies and browser.find("#prompt").get_attribute("value") == "Hi", "kept until it can be sent"
    box.health = (200, {"status": "ok"})
    browser.wait(READY)  # within a second
    assert not browser.find("#banner").is_displayed()
    browser.find("#prompt").send_keys(Keys.ENTER)
    browser.wait(ENDED)
    box.health = (503, {"error": {"message": "the server is stopping"}})
    browser.run("document.dispatchEvent(new Event('visibilitychange'))")  # as when somebody comes back to the page
    browser.wait("document.querySelector('#state').textContent === 'draining'")
    box.health = (503, {"error": {"message": "a step has not ended for 300 s"}})
    browser.wait("document.querySelector('#state').textContent === 'failed' && document.querySelector('#banner').textContent.includes('300 s')")


def test_a_lost_server_is_found_again(browser, box):
    open_page(browser, box.origin)
    browser.wait("document.querySelector('#model').textContent === 'scripted'")
    box.stop()
    browser.find("#prompt").send_keys("Hi", Keys.ENTER)
    browser.wait("document.querySelector('.message.assistant .error')?.textContent", "the chat says so")
    browser.wait("document.querySelector('#state').textContent === 'lost' && /Next try in \\d+ s/.test(document.querySelector('#banner').textContent)")
    box.start()
    browser.find("#banner-retry").click()
    browser.wait(READY)
    browser.find(".message.assistant .tools button:last-child").click()
    browser.wait("document.querySelector('.message.assistant .text').textContent === 'Hello'")


# --- the box ---

def tile(browser, name):
    return browser.run("return [...document.querySelectorAll('.tiles dt')].find((e) => e.textContent === arguments[0]).nextSibling.textContent", name)


def test_the_box_shows_what_the_server_says(browser, box):
    open_page(browser, box.origin, 1600, 1000)
    browser.wait("document.querySelector('.map')?.dataset.experts")
    assert (tile(browser, "Answer t/s"), tile(browser, "Running"), tile(browser, "Waiting"), tile(browser, "First token p50 / p95")) == ("21.4", "2", "1", "412 ms / 3.87 s")
    shown = {c.get_attribute("aria-label") for c in browser.all(".card") if c.is_displayed()}
    assert shown == CARDS
    text = {c.get_attribute("aria-label"): c.text for c in browser.all(".card")}
    assert "GPU 0" in text["Memory"] and "30 GiB of 32 GiB" in text["Memory"] and "experts 132 GiB" in text["Memory"]
    assert "61.5 GB/s of the 74 GB/s roof, 83 %" in text["KV cache and bandwidth"] and "71,800 of 262,144 tokens" in text["KV cache and bandwidth"]
    assert "9,321 steps" in text["Predicted and measured"] and "× 1.05" in text["Predicted and measured"]
    assert len(browser.all(".recent tbody tr")) == 9 and len(browser.all(".recent .bad")) == 1 and len(browser.all("#box .active")) == 3
    assert f"curl {box.origin}/v1/chat/completions" in text["Connect"] and '"model":"scripted"' in text["Connect"]
    widths = browser.run("return [...document.querySelectorAll('.tier:first-child .piece')].map((p) => parseFloat(p.style.width))")
    assert widths == [28.125, 46.875, 12.5, 6.25], "shares of the card's 32 GiB"
    box.stats = stats(tokens={"answer_per_second": 33.0, "prompt_per_second": 0.0})
    browser.wait("[...document.querySelectorAll('.tiles dd')].some((e) => e.textContent === '33')", "it follows")
    assert_only(browser, box.origin)


def map_tiers(browser):
    """The tier of every cell, told by the hue at its middle."""
    return browser.run("""
        const map = document.querySelector(".map"), layers = Number(map.dataset.layers), experts = Number(map.dataset.experts);
        const pixels = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
        const probe = document.body.appendChild(document.createElement("span"));
        const rgb = (name) => (probe.style.color = `var(${name})`, getComputedStyle(probe).color.match(/\\d+/g).map(Number));
        const base = rgb("--map"), hues = { g: rgb("--tier-gpu"), c: rgb("--tier-ram"), n: rgb("--tier-nvme") };
        probe.remove();
        const angle = (a, b) => a.reduce((s, x, i) => s + x * b[i], 0) / (Math.hypot(...a) * Math.hypot(...b));
        return Array.from({ length: layers }, (_, layer) => Array.from({ length: experts }, (_, expert) => {
          const x = Math.floor((expert + 0.5) * map.width / experts), y = Math.floor((layer + 0.45) * map.height / layers), at = 4 * (y * map.width + x);
          const away = [0, 1, 2].map((i) => pixels[at + i] - base[i]);
          return Object.keys(hues).sort((a, b) => angle(away, hues[b].map((c, i) => c - base[i])) - angle(away, hues[a].map((c, i) => c - base[i])))[0];
        }).join(""))""")


@pytest.mark.parametrize("layers, count", [(6, 32), (43, 256)])
def test_every_expert_is_a_cell_of_the_map(browser, box, layers, count):
    box.experts = experts(layers, count)
    open_page(browser, box.origin, 1600, 1000)
    browser.wait("document.querySelector('.map')?.dataset.experts")
    assert map_tiers(browser) == box.experts["tiers"]
    moved = experts(layers, count)
    moved["tiers"] = ["g" * count, *moved["tiers"][1:]]
    box.experts = moved
    eventually(lambda: map_tiers(browser) == moved["tiers"])
    map_ = browser.find(".map")
    browser.run("arguments[0].focus()", map_)
    map_.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert browser.find(".tip").text == f"Layer 1, expert 2: {dict(g='GPU', c='RAM', n='NVMe')[moved['tiers'][1][2]]}, {100 + 2} tokens, use {round(moved['use'][1][2] / 2.55)} %"
    x, y = browser.run("const r = arguments[0].getBoundingClientRect(); return [r.width / arguments[1] * 4.5 - r.width / 2, r.height / arguments[2] * 0.5 - r.height / 2]", map_, count, layers)
    ActionChains(browser.driver).move_to_element_with_offset(map_, round(x), round(y)).perform()
    assert browser.find(".tip").text.startswith("Layer 0, expert 4: GPU, 4 tokens")


def test_the_plan_is_said_in_a_sentence(browser, box):
    open_page(browser, box.origin, 1600, 1000)
    text = browser.wait("document.querySelector('.sentence')?.textContent")
    assert text == "One conversation gets 21.4 tokens a second, limited by experts from RAM; 8 together get 61, limited by experts from RAM; a prompt of 32,768 tokens takes 41 s, limited by experts over PCIe."
    assert "128 GiB" in browser.run("return document.querySelector('.card[aria-label=Plan]').textContent")
    box.plan = json.loads(run("plan", "--model", "v4-flash", "--gpu", "5090", "--ram", "12x6000", "--json")[0])  # as the program has it
    open_page(browser, box.origin, 1600, 1000)
    text = browser.wait("document.querySelector('.sentence')?.textContent")
    assert box.plan["decode"][0]["bottleneck"] in text and box.plan["prefill"]["bottleneck"] in text and not re.search("undefined|NaN|null", text)
    assert len(browser.all(".card[aria-label=Plan] details:first-of-type tr")) == len(box.plan["memory"])


def test_statistics_are_asked_for_while_somebody_looks(browser, box):
    open_page(browser, box.origin, 900, 800)
    assert box.watchers == 0 and not any("/v1/stats" in url for url in browser.requests()), "the chat is shown, not the box"
    browser.find("#tab-box").click()
    browser.wait("document.querySelector('.tiles dd').textContent === '21.4'")
    assert box.watchers == 1
    browser.find("#tab-chat").click()
    eventually(lambda: box.watchers == 0)
    box.streams = False  # a proxy that holds streams back, or a server without them: once a second then
    browser.find("#tab-box").click()
    box.stats = stats(tokens={"answer_per_second": 12.0})
    browser.wait("document.querySelector('.tiles dd').textContent === '12'")
    box.stats = stats(tokens={"answer_per_second": 13.0})
    browser.wait("document.querySelector('.tiles dd').textContent === '13'")


def test_the_box_of_the_demo_server(browser, server):
    told = server.request("GET", "/v1/stats")[2]
    open_page(browser, f"http://127.0.0.1:{server.port}", 1600, 1000)
    ask(browser, "Who are you?")
    browser.wait("document.querySelector('.map')?.dataset.experts")
    experts_told = server.request("GET", "/v1/experts")[2]
    assert browser.run("const { layers, experts } = document.querySelector('.map').dataset; return [Number(layers), Number(experts)]") == [experts_told["layers"], experts_told["experts"]]
    text = {c.get_attribute("aria-label"): c.text for c in browser.all(".card")}
    assert f"of {told['kv']['tokens_total']:,} tokens" in text["KV cache and bandwidth"]
    browser.wait("document.querySelector('.recent tbody tr')", "the chat is among the recent requests")
    assert_only(browser, f"http://127.0.0.1:{server.port}")


def test_a_server_without_statistics_is_left_alone(browser, box):
    box.stats = box.experts = box.plan = None
    box.health = (200, {"status": "ok", "running": 3, "waiting": 2, "kv_tokens_used": 64, "kv_tokens_total": 128})
    open_page(browser, box.origin, 1600, 1000)
    browser.wait("!document.querySelector('.card[aria-label=Connect]').hidden")
    time.sleep(3.5)
    asked = [url for url in browser.requests() if "/v1/stats" in url or "/v1/experts" in url]
    assert len(asked) == 2, "once each"
    assert {c.get_attribute("aria-label") for c in browser.all(".card") if c.is_displayed()} == {"Now", "KV cache and bandwidth", "Connect"}, "what /health counts is there"
    assert (tile(browser, "Running"), tile(browser, "Waiting"), tile(browser, "Answer t/s")) == ("3", "2", "–")
    assert "64 of 128 tokens" in browser.find(".card[aria-label='KV cache and bandwidth']").text and "Thermocline 7.8.9" in browser.find(".card[aria-label=Connect]").text


# --- every size, every hand, every eye ---

def test_nothing_is_wider_than_the_window(browser, box):
    long = "x" * 400
    box.answer = [{"content": f"{long}\n\n# {long}\n\n`{long}`\n\n```\n{long}\n```\n\n| {long} | b |\n| - | - |\n| 1 | 2 |\n\n- {long}\n\n<{long}>"}, {"tool_calls": [{"index": 0, "id": "c", "function": {"name": long, "arguments": long}}]}]
    open_page(browser, box.origin)
    ask(browser, long)
    browser.run("document.querySelector('#settings').open = true")
    for width in (320, 390, 768, 1179, 1180, 1920):
        browser.size(width, 900)
        for view in ("chat", "box"):
            browser.run(f"document.querySelector('#tab-{view}').click()")
            browser.wait("document.querySelector('#box').hidden || !document.querySelector('.card[aria-label=Experts]').hidden")
            assert overflow(browser) == [], (width, view)
            assert browser.run("return [...document.querySelectorAll('#chat, #box')].filter((e) => e.checkVisibility()).length") == (2 if width >= 1180 else 1)
    assert browser.find("#chat").is_displayed() and browser.find("#box").is_displayed(), "side by side where there is room"


@pytest.mark.parametrize("width", [320, 1600])
def test_everything_is_reached_by_tab(browser, box, width):
    open_page(browser, box.origin, width, 900)
    ask(browser, "Hi")
    browser.wait("document.querySelector('#model').textContent")
    wanted = set(browser.run("""
        return [...document.querySelectorAll("button, input, select, textarea, summary, a[href]")]
          .filter((e) => e.checkVisibility({ visibilityProperty: true }) && e.tabIndex >= 0 && !e.disabled).map((e) => (e.id ||= `n${Math.random()}`))"""))
    assert len(wanted) > 10
    reached = set()
    for _ in range(len(wanted) + 30):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        reached.add(browser.run("return document.activeElement.id"))
        if wanted <= reached:
            break
    assert wanted <= reached, wanted - reached


def test_a_conversation_with_the_keyboard_alone(browser, box):
    box.answer = [{"content": "one"}]
    open_page(browser, box.origin, 900, 800)
    keys = lambda *k: ActionChains(browser.driver).send_keys(*k).perform()  # noqa: E731
    browser.run("document.querySelector('#prompt').focus()")
    keys("a")
    ActionChains(browser.driver).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).send_keys("b").perform()
    assert not box.bodies
    keys(Keys.ENTER)
    browser.wait(ENDED)
    assert box.bodies[0]["messages"][-1]["content"] == "a\nb"
    assert browser.wait("document.querySelector('#spoken').textContent") == "Answer: one"
    assert browser.run("return document.activeElement.id") == "prompt"
    browser.run("document.querySelector('#tab-chat').focus()")
    keys(Keys.ARROW_RIGHT)
    assert browser.find("#box").is_displayed() and not browser.find("#chat").is_displayed()
    assert browser.run("return document.activeElement.id") == "tab-box"
    keys(Keys.ARROW_LEFT)
    assert browser.find("#chat").is_displayed()


NAMELESS = """
    const name = (e) => (e.getAttribute("aria-label") || document.getElementById(e.getAttribute("aria-labelledby"))?.textContent || [...(e.labels ?? [])].map((l) => l.textContent).join("") ||
                         (["INPUT", "TEXTAREA", "SELECT"].includes(e.tagName) ? "" : e.textContent) || "").trim();
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    return [...document.querySelectorAll("button, input, select, textarea, summary, a[href], dialog, progress, canvas, [role=img], [role=tab], [role=region], [role=log], [role=tabpanel], nav")].filter((e) => !name(e)).map((e) => e.outerHTML.slice(0, 100))
      .concat([...document.querySelectorAll("img:not([alt])")].map((e) => e.outerHTML), ids.filter((id, i) => ids.indexOf(id) !== i),
              [...document.querySelectorAll("[aria-controls], [for]")].flatMap((e) => [e.getAttribute("aria-controls") ?? e.getAttribute("for")]).filter((id) => !document.getElementById(id)))"""

# Text on what lies behind it, by the formula of WCAG 2: (lighter + 0.05) / (darker + 0.05).
FAINT = """
    const rgba = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255, c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((s, c, i) => s + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (e) => { const c = rgba(getComputedStyle(e).backgroundColor); return (c[3] ?? 1) > 0.99 || !e.parentElement ? c : behind(e.parentElement); };
    const poor = [];
    for (const e of document.querySelectorAll("body *")) {
      if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility() || e.closest(".hidden, .skip, .waiting")) continue;
      const a = light(rgba(getComputedStyle(e).color)), b = light(behind(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${e.outerHTML.slice(0, 90)}`);
    }
    return poor;"""


def test_controls_have_names_and_text_is_legible(browser, box):
    box.answer = [{"reasoning_content": "so"}, {"content": "**a** [b](https://ok.example) `c`\n\n> d\n\n```py\ne\n```"}]
    for theme in ("light", "dark"):
        open_page(browser, box.origin, 1600, 1000)
        browser.emulate(prefers_color_scheme=theme)
        ask(browser, "Hi")
        browser.wait("!document.querySelector('.card[aria-label=Experts]').hidden")
        browser.run("document.querySelectorAll('details').forEach((d) => (d.open = true)); document.querySelector('.message.user .tools button').click()")
        assert browser.run(NAMELESS) == []
        assert browser.run(FAINT) == [], theme
    assert browser.run("return document.documentElement.lang") == "en"
    assert browser.run("return [document.querySelector('#messages').getAttribute('role'), document.querySelector('#spoken').getAttribute('aria-live')]") == ["log", "polite"]


def test_themes_and_motion(browser, box):
    background = lambda: browser.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")  # noqa: E731
    open_page(browser, box.origin)
    browser.emulate(prefers_color_scheme="light")
    assert background() > 200
    browser.emulate(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert background() < 60, "as the system has it"
    browser.find("#theme").click()
    assert background() > 200 and browser.find("#theme").get_attribute("aria-label") == "Theme: light"
    browser.driver.refresh()
    browser.wait(READY)
    assert background() > 200, "the choice is kept"
    box.answer = [3.0, {"content": "late"}]
    browser.find("#prompt").send_keys("Hi", Keys.ENTER)
    moving = "return getComputedStyle(document.querySelector('.waiting')).animationName"
    browser.wait("document.querySelector('.waiting')?.checkVisibility()")
    assert browser.run(moving) == "none"
    browser.emulate(prefers_color_scheme="dark")
    assert browser.run(moving) == "breathe", "the same without the wish"
    browser.find("#stop").click()
