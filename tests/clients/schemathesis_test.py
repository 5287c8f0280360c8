"""schemathesis over /openapi.json: requests in and out of every schema, and the server answers each as the document says."""
import json
import os
import pathlib
import re
import subprocess
import sys

import openapi_spec_validator
import pytest

from program import Server

KEY = "key-of-an-admin"
HOOKS = pathlib.Path(__file__).parents[1] / "support" / "schemathesis_hooks.py"
CHECKS = [
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance", "response_schema_conformance", "negative_data_rejection", "positive_data_acceptance",
    "missing_required_header", "unsupported_method", "allow_header_conformance", "ignored_auth",
]
# 501 where nothing is offered, 504 where a request's own timeout is over. /v1/stats?stream would never end.
CONFIG = f"""\
hooks = "{HOOKS}"

[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 504]
negative_data_rejection.expected-statuses = ["4xx"]

[[operations]]
include-path = "/v1/stats"
parameters = {{ stream = "0" }}

[[operations]]
include-tag = "not offered"
checks.not_a_server_error.expected-statuses = ["4xx", 501]
"""
# The same requests each time. What shares a reader with chats or messages is fuzzed alone: coverage of its fields takes thousands of requests.
SHORT = "\n[phases.fuzzing]\nextra-data-sources.responses = false\nerror-feedback.enabled = false\n" + "".join(f'\n[[operations]]\ninclude-path = "{path}"\nphases.coverage.enabled = false\n' for path in ("/apply-template", "/v1/chat/completions/render", "/tokenize", "/v1/messages/count_tokens"))


@pytest.fixture
def guarded(tmp_path):
    """A server with a key, whose answers have three tokens at most. It has to answer a chat and end well in the end."""
    server = Server("--admin-key", KEY, "--max-answer-tokens", 3)
    try:
        yield server
        status, _, answer = server.request("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}, {"authorization": f"Bearer {KEY}", "content-type": "application/json"})
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        server.stop()
    finally:
        server.kill()


def operations(document):
    return sum(method != "parameters" for item in document["paths"].values() for method in item)


def document_of(server):
    status, headers, document = server.request("GET", "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
    assert status == 200 and headers["Content-Type"] == "application/json"
    return document


def ask_all(server, folder, config, *flags, timeout):
    """Runs it; returns how many operations it asked, and how many requests it sent. One worker: its threads disturb each other."""
    (folder / "schemathesis.toml").write_text(config)
    (folder / "openapi.json").write_text(json.dumps(document_of(server)))  # from its address it would not ask /openapi.json
    command = [
        pathlib.Path(sys.executable).parent / "schemathesis", "--config-file", folder / "schemathesis.toml", "run", folder / "openapi.json", "--url", f"http://127.0.0.1:{server.port}", "-H", f"Authorization: Bearer {KEY}",
        "--checks", ",".join(CHECKS), "--seed", os.environ.get("TC_SCHEMATHESIS_SEED", "1"), "--request-timeout", 60, "--suppress-health-check", "all", "--continue-on-failure", "--no-color", "--warnings", "off", "--workers", 1, *flags,
    ]
    done = subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)
    return int(re.search(r"Tested: (\d+)", done.stdout)[1]), int(re.search(r"(\d+) generated", done.stdout)[1])


def test_the_document_is_one(guarded):
    document = document_of(guarded)
    openapi_spec_validator.validate(document)
    assert document["openapi"].startswith("3.1") and operations(document) > 40


def test_every_answer_is_as_described(guarded, tmp_path):
    asked, sent = ask_all(guarded, tmp_path, CONFIG + SHORT, "--generation-deterministic", "--phases", "examples,coverage,fuzzing", "--max-examples", 3, timeout=300)
    assert asked == operations(document_of(guarded)) and sent > 2000


@pytest.mark.long
def test_so_is_every_answer_of_many_minutes(guarded, tmp_path):
    asked, sent = ask_all(guarded, tmp_path, CONFIG, "--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--max-examples", 3000, "--max-time", os.environ.get("TC_SCHEMATHESIS_SECONDS", "600"), timeout=1100)
    assert asked == operations(document_of(guarded)) and sent > 6000
