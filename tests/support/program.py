"""The program under test from Python: run it once, feed it lines, or serve with it. See tests/conftest.py for fixtures."""
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Taken out of the environment, as the program warns of a THERMOCLINE_ variable that is none of its options'.
PROGRAM = os.environ.pop("THERMOCLINE_PROGRAM", str(ROOT / "build" / "release" / "thermocline"))
DEMO = ROOT / "models" / "demo"
GOLDEN = ROOT / "tests" / "golden"
TEXT = ROOT / "tests" / "data" / "text"
# Sanitizer builds are some ten times slower; the path of the program says which build this is.
SLOW = any(name in PROGRAM for name in ("asan", "tsan"))


def run(*args, stdin="", code=0, timeout=600):
    """Runs the program and checks its exit code; returns stdout and stderr as text."""
    done = subprocess.run([PROGRAM, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, f"{args}: exit code {done.returncode}, expected {code}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return done.stdout, done.stderr


def run_with_free_memory(kilobytes, folder, *args):
    """run(), on a machine that says it has so little free: its /proc/meminfo is another file, in a mount namespace of its own."""
    told = folder / "meminfo"
    told.write_text(f"MemTotal: {kilobytes} kB\nMemFree: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    inside = ["unshare", "-rm", "sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', str(told)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    done = subprocess.run([*inside, PROGRAM, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (args, done.stdout[-500:], done.stderr[-2000:])
    return done.stdout, done.stderr


def jsonl(command, model, lines, code=0, *flags):
    """A text tool over JSON lines: one object in, one object out."""
    out, _ = run(command, "--model", model, "--jsonl", *flags, stdin="".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), code=code)
    return [json.loads(line) for line in out.split("\n") if line]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


class Server:
    """`thermocline serve` on a free port of 127.0.0.1, loaded once the constructor is back. Whoever starts one stops it."""

    def __init__(self, *flags, model=DEMO):
        self.process = subprocess.Popen([PROGRAM, "serve", "--model", str(model), "--port", "0", "--quiet", *map(str, flags)], stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if "serving" not in line:
            self.kill()
            raise AssertionError(f"the server did not start: {line!r}")
        self.port = int(line.strip().rsplit(":", 1)[1])
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=300)

    def request(self, method, path, body=None, headers=None):
        """One request; returns (status, headers, body), the body parsed where it is a JSON object."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        connection.request(method, path, body, headers or ({"content-type": "application/json"} if body is not None else {}))
        reply = connection.getresponse()
        text = reply.read().decode()
        return reply.status, dict(reply.getheaders()), json.loads(text) if text.startswith("{") else text

    def raw(self, data):
        """Sends these bytes and returns all that comes until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as s:
            s.sendall(data)
            s.settimeout(60)
            got = b""
            try:
                while chunk := s.recv(65536):
                    got += chunk
            except OSError:
                pass
            return got

    def stop(self):
        """SIGTERM, and the exit code is 0."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=120) == 0

    def kill(self):
        """For the end of a test, whatever happened in it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
