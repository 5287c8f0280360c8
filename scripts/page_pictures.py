"""The pictures of docs/page.md: chats with the demo model, the box view of the tests' scripted box.
.venv/bin/python scripts/page_pictures.py [--program build/release/thermocline]"""
import argparse
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
QUESTIONS = ["What is a thermocline?", "What is the capital of Norway?", "What is the opposite of cold?", "Tell me a story."]
SEA = """The sea has three layers, **warm to cold**:

1. the *mixed* layer, stirred by the wind
2. the [thermocline](https://en.wikipedia.org/wiki/Thermocline), where it turns cold
3. the deep

| depth | temperature |
| ---: | ---: |
| 10 m | 19 °C |
| 200 m | 9 °C |
| 1,000 m | 4 °C |

```python
def layer(depth):
    return "mixed" if depth < 50 else "thermocline" if depth < 1000 else "deep"
```
"""
ENDED = "document.querySelector('.message.assistant:last-of-type[aria-busy=false] .stats')?.textContent"


def ready(browser):
    browser.wait("document.querySelector('#state').textContent === 'ready' && document.querySelector('#model').textContent")


def chat(browser, questions, thinking=True):
    browser.run("""for (const [name, value] of Object.entries({ temperature: "0", max_tokens: "160", thinking: arguments[0] })) {
                     const field = document.querySelector(`#set-${name}`);
                     field.value = value;
                     field.dispatchEvent(new Event("input"));
                   }""", "enabled" if thinking else "disabled")
    for i, question in enumerate(questions):
        browser.find("#prompt").send_keys(question, "\n")
        browser.wait(f"document.querySelectorAll('.message.assistant').length === {i + 1} && {ENDED}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default=str(ROOT / "build" / "release" / "thermocline"))
    os.environ["THERMOCLINE_PROGRAM"] = parser.parse_args().program
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from browser import Browser
    from program import Server
    from scripted_box import ScriptedBox

    OUT.mkdir(exist_ok=True)
    server, browser = Server(), Browser(tempfile.mkdtemp())
    box = ScriptedBox(server)
    try:
        origin = f"http://127.0.0.1:{server.port}"
        browser.open(origin, 1100, 760)
        ready(browser)
        chat(browser, QUESTIONS)
        browser.picture(OUT / "page-chat.png")
        browser.open(origin, 390, 760)
        ready(browser)
        chat(browser, QUESTIONS[:2])
        browser.picture(OUT / "page-phone.png")
        browser.open(box.origin, 1150, 1290)
        ready(browser)
        browser.find("#tab-box").click()
        for second in range(40):  # of a line over time
            box.stats["tokens"]["answer_per_second"] = 21.4 + 4 * ((second * 7) % 5) / 5
            time.sleep(0.5)
        browser.picture(OUT / "page-box.png")
        browser.emulate(prefers_color_scheme="dark")
        browser.size(1600, 900)
        words = [piece for word in SEA.split(" ") for piece in (0.03, {"content": word + " "})]
        box.answer = [0.4, {"reasoning_content": "Three layers, then an example."}, *words]
        box.usage = {"prompt_tokens": 620, "completion_tokens": len(words) // 2 + 8, "completion_tokens_details": {"reasoning_tokens": 8}, "prompt_tokens_details": {"cached_tokens": 512}}
        chat(browser, ["What are the layers of the sea?"])
        time.sleep(2.5)  # until the map is drawn for the new width
        browser.picture(OUT / "page-dark.png")
    finally:
        browser.quit()
        box.stop()
        server.kill()
    for picture in sorted(OUT.glob("page-*.png")):
        print(picture.relative_to(ROOT), picture.stat().st_size // 1000, "kB")


if __name__ == "__main__":
    main()
