"""aiperf's load on streamed chats: no errors, and its counts are what the server says of each request."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

from program import DEMO

SECONDS = 50  # of load
# Begin, user, assistant and </think>: what the chat encoding puts around a prompt of one message.
MARKUP = 4


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the tool's summary, its records by request id, the server's access log by request id)."""
    from program import Server

    folder = tmp_path_factory.mktemp("aiperf")
    server = Server("--access-log", folder / "access.jsonl")
    # HF_HUB_OFFLINE stays unset: with it the tool refuses a folder as tokenizer; a folder needs no hub.
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    command = [
        pathlib.Path(sys.executable).parent / "aiperf", "profile", "--model-names", "demo", "--url", f"http://127.0.0.1:{server.port}", "--endpoint-type", "chat", "--streaming", "--tokenizer", DEMO,
        "--concurrency", 8, "--benchmark-duration", SECONDS, "--prompt-input-tokens-mean", 120, "--prompt-input-tokens-stddev", 40, "--prompt-output-tokens-mean", 40, "--random-seed", 1, "--workers-max", 1,
        "--extra-inputs", "temperature:0", "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics", "--output-artifact-dir", folder / "out",
    ]
    try:
        done = subprocess.run(list(map(str, command)), env=environment, cwd=folder, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        server.stop()
    finally:
        server.kill()
    summary = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
    records = {record["metadata"]["x_request_id"]: record for record in map(json.loads, (folder / "out" / "profile_export.jsonl").read_text().splitlines())}
    entries = {entry["id"]: entry for entry in map(json.loads, (folder / "access.jsonl").read_text().splitlines()) if entry["path"] == "/v1/chat/completions"}
    return summary, records, entries


def test_no_request_fails(measured):
    summary, records, entries = measured
    assert summary["error_summary"] == [] and summary["request_error_rate"]["avg"] == 0
    assert summary["request_count"]["avg"] == len(records) > 20
    assert all(record.get("error") is None and not record["metadata"]["was_cancelled"] for record in records.values())
    assert all(entries[request]["status"] == 200 and entries[request]["complete"] for request in records)


def test_counts_are_the_servers(measured):
    summary, records, entries = measured
    exact = 0
    for request, record in records.items():
        counts = {name: metric["value"] for name, metric in record["metrics"].items()}
        entry = entries[request]
        assert counts["usage_prompt_tokens"] == entry["prompt_tokens"] and counts["usage_completion_tokens"] == entry["completion_tokens"]
        assert counts.get("usage_prompt_cache_read_tokens", 0) == entry["cached_tokens"]
        assert counts["input_sequence_length"] + MARKUP == entry["prompt_tokens"]
        # The tool tokenises the text again: the end has none, and it is shorter where the model wrote a word in pieces.
        text_tokens = entry["completion_tokens"] - (entry["finish"] == "stop")
        assert counts.get("output_sequence_length", 0) == pytest.approx(text_tokens, rel=0.2, abs=2)
        exact += counts.get("output_sequence_length", 0) == text_tokens
        assert 0 < counts["time_to_first_token"] <= counts["request_latency"]
    assert exact > len(records) / 2
    assert summary["total_usage_completion_tokens"]["avg"] == sum(entries[request]["completion_tokens"] for request in records)
