"""What systemd hears of `thermocline serve`, with a socket of the test in its place."""
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time

import pytest

from program import DEMO, PROGRAM, SLOW


class Manager:
    """The other end of NOTIFY_SOCKET: every message with when it came."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.messages = []
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        with contextlib.suppress(OSError):
            while message := self.socket.recv(4096):
                self.messages.append((time.monotonic(), message.decode()))

    def times(self, start):
        return [when for when, message in list(self.messages) if message.startswith(start)]

    def wait_for(self, start, count=1):
        end = time.monotonic() + 120
        while len(self.times(start)) < count:
            assert time.monotonic() < end, (start, self.messages)
            time.sleep(0.005)


@pytest.fixture
def manager(tmp_path, monkeypatch):
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    return Manager(address)


def test_a_life_from_loading_to_the_end(manager, start_server, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    server = start_server("--drain-seconds", "7")
    manager.wait_for("WATCHDOG=1", 3)
    server.stop()
    kinds = [message for _, message in manager.messages if message != "WATCHDOG=1"]
    assert kinds[0] == "STATUS=loading the model: 0 %\nEXTEND_TIMEOUT_USEC=300000000", kinds
    assert kinds[-2] == f"READY=1\nSTATUS=serving demo on http://127.0.0.1:{server.port}", kinds
    assert kinds[-1].startswith("STOPPING=1\n") and kinds[-1].endswith("EXTEND_TIMEOUT_USEC=67000000"), kinds
    assert all(k.startswith("STATUS=loading") for k in kinds[:-2]), kinds


def test_a_reload_is_told_around_it(manager, start_server, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("alice:0123456789abcdef0123456789abcdef\n")
    keys.chmod(0o600)
    server = start_server("--api-key-file", keys)
    first = len(manager.messages)
    server.process.send_signal(signal.SIGHUP)
    manager.wait_for("READY=1", 2)
    kinds = [message.split("\n")[0] for _, message in manager.messages[first:]]
    assert kinds == ["RELOADING=1", "READY=1"], manager.messages
    server.stop()


def test_an_abstract_socket(tmp_path, start_server, monkeypatch):
    address = "@thermocline-" + str(os.getpid())
    manager = Manager(address)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    start_server().stop()
    assert manager.times("READY=1") and manager.times("STOPPING=1")
    assert not manager.times("WATCHDOG=1"), "nobody asked for it"


def test_a_load_that_is_ended_is_not_ready_afterwards(manager):
    process = subprocess.Popen([PROGRAM, "serve", "--model", str(DEMO), "--port", "0", "--quiet"], stdout=subprocess.DEVNULL)
    manager.wait_for("STATUS=loading")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 0
    stopping = manager.times("STOPPING=1")
    assert len(stopping) == 1 and all(ready < stopping[0] for ready in manager.times("READY=1")), manager.messages


def test_the_watchdog_hears_nothing_while_the_engine_has_failed(manager, start_server, temporary_model, monkeypatch):
    """A step that takes longer than --watchdog-seconds is one that hangs, as far as anybody can tell."""
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    model, tokens = temporary_model(), 4096 if SLOW else 32768
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": tokens}))
    server = start_server("--watchdog-seconds", 1, "--threads", 1, "--no-prefix-cache", "--max-num-batched-tokens", tokens, "--max-num-seqs", 1, model=model)
    manager.wait_for("WATCHDOG=1", 5)
    prompt = threading.Thread(target=lambda: server.request("POST", "/v1/completions", {"prompt": [5] * (tokens - 1), "max_tokens": 1}))
    prompt.start()
    while server.request("GET", "/health")[0] == 200:
        assert prompt.is_alive(), "no step took a second"
        time.sleep(0.01)
    failed = time.monotonic()
    while (status := server.request("GET", "/health"))[0] == 503:
        over = time.monotonic()
        time.sleep(0.01)
    assert status[0] == 200 and over - failed > 0.3, "too short to tell"
    assert not [t for t in manager.times("WATCHDOG=1") if failed + 0.1 < t < over], "it was told that all is well"
    beats = len(manager.times("WATCHDOG=1"))
    manager.wait_for("WATCHDOG=1", beats + 2)
    prompt.join()
    server.stop()


def test_a_stopped_process_is_silent(manager, start_server, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    server = start_server()
    manager.wait_for("WATCHDOG=1", 3)
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    beats = len(manager.times("WATCHDOG=1"))
    time.sleep(0.5)
    assert len(manager.times("WATCHDOG=1")) == beats
    server.process.send_signal(signal.SIGCONT)
    manager.wait_for("WATCHDOG=1", beats + 2)
    server.stop()
