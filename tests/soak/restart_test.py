"""Conversations on a server with little memory for its KV cache and a folder for the rest, which is killed again and
again, and whose files are damaged in between: every reply is the one of a server that keeps nothing."""
import http.client
import os
import random
import threading
import time

SECONDS = float(os.environ.get("TC_SOAK_SECONDS", "20")) / 2
SYSTEM = "You tell short stories about foxes and bears and answer questions of arithmetic. " * 12
QUESTIONS = ["What is the capital of Norway?", "Tell me a story about a fox.", "What is 3 + 4?", "What is the opposite of hot?",
             "Tell me a story about a bear and a bird.", "Who are you?"]
CONVERSATIONS, PLAYERS = 32, 8  # of 400 tokens: four times what the cache holds
LITTLE = ["--device", "none", "--max-num-seqs", "4", "--max-model-len", "1024", "--max-num-batched-tokens", "128", "--kv-host-memory", "6MiB", "--prefix-cache-memory", "4MiB"]


def ask(server, history):
    """The reply and how many tokens of the prompt came from a cache."""
    status, _, body = server.request("POST", "/v1/chat/completions", {"messages": history, "temperature": 0, "max_tokens": 12})
    assert status == 200, body
    return body["choices"][0]["message"]["content"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def conversation(number, turns, reply):
    """Plays one: `reply(history)` answers each turn. All replies."""
    history = [{"role": "system", "content": SYSTEM}]
    replies = []
    for turn in range(turns):
        history.append({"role": "user", "content": f"{number}: {QUESTIONS[(number + turn) % len(QUESTIONS)]}"})
        replies.append(reply(history))
        history.append({"role": "assistant", "content": replies[-1]})
    return replies


def damage(folder, rng):
    """What may happen to a file while nobody looks."""
    logs = sorted(folder.glob("log-*"))
    if not logs:
        return
    log = rng.choice(logs)
    what = rng.randrange(4)
    if what == 0:
        os.truncate(log, rng.randrange(log.stat().st_size + 1))
    elif what == 1:
        (folder / "index").unlink(missing_ok=True)
    elif what == 2:
        log.unlink()
    else:
        with open(log, "r+b") as file:
            for _ in range(50):
                file.seek(rng.randrange(max(1, log.stat().st_size)))
                file.write(b"?")


def test_conversations_outlive_kills(start_server, tmp_path):
    turns = 3
    quiet = start_server(*LITTLE, "--no-prefix-cache")
    alone = [conversation(n, turns, lambda history: ask(quiet, history)[0]) for n in range(CONVERSATIONS)]
    quiet.stop()
    folder = tmp_path / "kv"
    flags = [*LITTLE, "--kv-disk-dir", folder, "--kv-disk-space", "256MiB"]
    servers = [start_server(*flags)]
    warm, errors, over = [], [], threading.Event()

    def reply(history):
        while True:
            server = servers[-1]
            try:
                text, cached = ask(server, history)
                warm.append(cached)
                return text
            except (OSError, EOFError, ValueError, http.client.HTTPException):
                if over.is_set():
                    raise
                time.sleep(0.05)  # it was killed: the next one answers

    def play(number):
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for n in range(number, CONVERSATIONS, PLAYERS):
                    assert conversation(n, turns, reply) == alone[n], f"conversation {n}"
        except BaseException as error:
            errors.append(error)

    players = [threading.Thread(target=play, args=(n,)) for n in range(PLAYERS)]
    for player in players:
        player.start()
    rng = random.Random(5)
    kills = 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and not errors:
        time.sleep(0.5 + 2 * rng.random())
        servers[-1].kill()
        kills += 1
        if rng.random() < 0.5:
            damage(folder, rng)
        servers.append(start_server(*flags))
    for player in players:
        player.join(timeout=300)
    over.set()
    assert not errors, errors[0]
    assert kills >= 2
    # What this asks for may have been damaged before the last start: it is computed then, and there from now on.
    first = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"0: {QUESTIONS[0]}"}]
    for _ in range(5):
        assert ask(servers[-1], first)[0] == alone[0][0]
        time.sleep(0.5)  # written behind the answer; what is not yet is lost
        servers[-1].kill()
        servers.append(start_server(*flags))
        text, cached = ask(servers[-1], first)
        assert text == alone[0][0]
        if cached > 0:
            break
    assert cached > 0, "a kill loses what has been written"
    servers[-1].stop()
    again = start_server(*flags)
    text, cached = ask(again, first)
    assert text == alone[0][0] and cached > 0, "a restart loses nothing"
    for _ in range(100):
        status, _, body = again.request("GET", "/health")
        if body["running"] == 0:
            break
        time.sleep(0.1)
    assert body["kv_tokens_used"] == 0
    print({"kills": kills, "replies": len(warm), "warm": sum(c > 0 for c in warm), "tokens saved": sum(warm)})
    again.stop()

