"""What the server shows of itself: /metrics as Prometheus reads it, /v1/stats, /v1/experts and /v1/plan, logs, the dashboard."""
import http.client
import json
import math
import os
import re
import socket
import struct
import subprocess
import threading
import time

from prometheus_client.parser import text_string_to_metric_families

from program import DEMO, PROGRAM, ROOT, SLOW, run

ASK = [{"role": "user", "content": "What is the capital of Norway?"}]
LONG = {"prompt": "And it came to pass", "temperature": 0, "max_tokens": 200 if SLOW else 1500, "ignore_eos": True, "stream": True}
HISTOGRAMS = ["time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
              "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "step_seconds", "step_tokens"]


def scrape(ask):
    """Parses a scrape as Prometheus does and checks what every scrape promises; families by name."""
    status, headers, text = ask("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4"), (status, headers)
    families = {}
    for family in text_string_to_metric_families(text):
        assert family.name not in families and family.documentation and family.type != "unknown", family.name
        families[family.name] = family
        seen = set()
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in seen and math.isfinite(sample.value), sample
            seen.add(key)
            assert len(seen) < 500, "a label has too many values"
        if family.type == "counter":
            assert all(sample.name.endswith("_total") and sample.value >= 0 for sample in family.samples), family.name
    return families


def value(families, name, **labels):
    """The sum over the series with these labels."""
    found = [s.value for f in families.values() for s in f.samples if s.name == "thermocline_" + name and labels.items() <= s.labels.items()]
    assert found, name
    return sum(found)


def test_families_at_zero_and_counts_after_an_answer(start_server):
    server = start_server("--metrics-compat", "vllm")
    before = scrape(server.request)
    for name in HISTOGRAMS:
        assert before["thermocline_" + name].type == "histogram" and value(before, name + "_count") == 0, name
    for name in ("prompt_tokens_total", "generation_tokens_total", "requests_total", "expert_tokens_total", "read_bytes_total", "nvme_read_bytes_total"):
        assert value(before, name) == 0, name
    assert value(before, "ready") == 1 and value(before, "loaded_ratio") == 1
    answer = server.client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    after = scrape(server.request)
    usage = answer.usage
    assert value(after, "requests_total", outcome="stop") == 1
    assert value(after, "prompt_tokens_total") == usage.prompt_tokens and value(after, "generation_tokens_total") == usage.completion_tokens
    assert value(after, "request_prompt_tokens_sum") == usage.prompt_tokens and value(after, "request_generation_tokens_sum") == usage.completion_tokens
    assert value(after, "inter_token_latency_seconds_count") == usage.completion_tokens - 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds"):
        assert value(after, name + "_count") == 1 and value(after, name + "_sum") > 0, name
    layers, top_k = config()["num_hidden_layers"], config()["num_experts_per_tok"]
    fed = usage.prompt_tokens + usage.completion_tokens - 1
    assert value(after, "expert_tokens_total") == fed * layers * top_k
    assert value(after, "step_tokens_sum") == fed
    assert value(after, "expert_tokens_total", tier="gpu") == 0 and value(after, "expert_tokens_total", phase="prefill") > 0
    assert value(after, "read_bytes_total", kind="weights") > 1e6 and value(after, "tier_bytes", tier="ram", kind="experts") > 1e6
    assert value(after, "http_requests_total", handler="/v1/chat/completions", status="200") == 1
    for name, family in after.items():
        if not name.startswith("vllm:"):
            continue
        assert all(s.labels["model_name"] == "demo" for s in family.samples), name
    for theirs, ours in (("prompt_tokens", "prompt_tokens_total"), ("generation_tokens", "generation_tokens_total")):
        assert after["vllm:" + theirs].samples[0].value == value(after, ours)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "request_success", "iteration_tokens_total", "inter_token_latency_seconds", "time_to_first_token_seconds",
                 "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"):
        assert "vllm:" + name in after, name


def config():
    return json.loads((DEMO / "config.json").read_text())


def test_scrapes_while_a_stream_runs(server):
    with server.client.completions.create(model="demo", **{k: v for k, v in LONG.items() if k != "ignore_eos"}, extra_body={"ignore_eos": True}) as stream:
        chunks = iter(stream)
        next(chunks)
        first = scrape(server.request)
        assert value(first, "requests_running") == 1
        for _ in range(20):
            next(chunks)
        second = scrape(server.request)
        assert value(second, "generation_tokens_total") > value(first, "generation_tokens_total")
        assert value(second, "step_seconds_count") > value(first, "step_seconds_count")
        status, _, stats = server.request("GET", "/v1/stats")
        (active,) = stats["requests"]["active"]
        assert active["phase"] == "decode" and active["completion_tokens"] >= 20 and active["path"] == "/v1/completions"
        assert stats["requests"]["running"] == 1 and stats["tokens"]["answer_per_second"] > 0
    deadline = time.monotonic() + 60
    while value(scrape(server.request), "requests_running") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert value(scrape(server.request), "requests_total", outcome="abort_client") == 1


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_scrapes_while_the_model_loads(temporary_model):
    """The server waits for its generation_config.json, which is a pipe."""
    model, port = temporary_model(), free_port()
    (model / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(model / "generation_config.json")
    process = subprocess.Popen([PROGRAM, "serve", "--model", str(model), "--port", str(port), "--quiet"], stdout=subprocess.PIPE, text=True)

    def ask(method, path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()

    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
        families = scrape(ask)
        assert value(families, "ready") == 0 and value(families, "prompt_tokens_total") == 0
        status, _, text = ask("GET", "/v1/stats")
        assert status == 200 and json.loads(text)["state"] == "loading" and json.loads(text)["progress"] == 0
        assert ask("GET", "/v1/experts")[0] == 503
        os.close(os.open(model / "generation_config.json", os.O_WRONLY))  # which lets the reader go on
        assert "serving" in process.stdout.readline()
        assert value(scrape(ask), "ready") == 1
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def check_stats(stats):
    """The shape that the page is written against."""
    number = (int, float)
    shape = {"model": str, "version": str, "uptime_seconds": number, "state": str, "reason": str, "requests": dict, "tokens": dict, "latency": dict, "kv": dict, "tiers": list, "experts": dict, "speed": dict, "forecast": dict}
    for name, kind in shape.items():
        assert isinstance(stats[name], kind), name
    assert set(stats["tokens"]) >= {"prompt_total", "cached_total", "answer_total", "prompt_per_second", "answer_per_second"}
    assert set(stats["kv"]) >= {"tokens_used", "tokens_total", "prefix_cached_tokens", "hit_rate"}
    assert set(stats["experts"]) >= {"hit_rate", "gpu", "cpu", "slots", "slots_total", "installs_total"}
    assert set(stats["speed"]) >= {"read_bytes_per_second", "stream_bytes_per_second", "share"}
    assert set(stats["forecast"]) >= {"steps", "measured_seconds", "predicted_seconds", "phases"}
    for tier in stats["tiers"]:
        assert re.fullmatch(r"gpu\d+|ram|nvme", tier["tier"]) and tier["capacity_bytes"] > 0
        for part in tier["parts"]:
            assert part["kind"] in ("weights", "experts", "kv", "prefix", "workspace") and 0 <= part.get("used_bytes", 0) <= part["bytes"], part


def test_stats_after_answers(server):
    for _ in range(2):
        answer = server.client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    status, _, stats = server.request("GET", "/v1/stats")
    check_stats(stats)
    assert status == 200 and stats["state"] == "ready" and stats["model"] == "demo"
    recent = stats["requests"]["recent"]
    assert recent[0]["finish"] == "stop" and recent[0]["prompt_tokens"] == answer.usage.prompt_tokens and recent[0]["completion_tokens"] == answer.usage.completion_tokens
    assert recent[0]["cached_tokens"] == answer.usage.prompt_tokens - 1 and recent[0]["status"] == 200
    assert 0 < recent[0]["ttft_ms"] <= recent[0]["total_ms"] and recent[0]["tpot_ms"] > 0 and recent[0]["age_seconds"] < 60
    assert recent[0]["age_seconds"] <= recent[1]["age_seconds"]
    assert stats["latency"]["ttft_ms"]["p50"] <= stats["latency"]["ttft_ms"]["p95"]
    assert 0 < stats["kv"]["hit_rate"] < 1 and stats["experts"]["hit_rate"] is None
    assert stats["speed"]["read_bytes_per_second"] > 0
    ram = next(t for t in stats["tiers"] if t["tier"] == "ram")
    assert {p["kind"] for p in ram["parts"]} >= {"weights", "experts", "kv", "prefix", "workspace"}


def events(reply, count):
    """The next `count` events of a stream of JSON; fewer where it ends."""
    found = []
    while len(found) < count and (line := reply.readline()):
        if line.startswith(b"data: "):
            found.append(json.loads(line[6:]))
    return found


def test_a_stream_of_stats_ends_when_the_server_drains(start_server):
    server = start_server()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/v1/stats?stream=1")
    reply = connection.getresponse()
    assert reply.status == 200 and reply.getheader("Content-Type").startswith("text/event-stream")
    begin = time.monotonic()
    pictures = events(reply, 3)
    assert 0.5 < time.monotonic() - begin < (30 if SLOW else 10), "two pictures a second"
    for stats in pictures:
        check_stats(stats)
    assert pictures[0]["uptime_seconds"] < pictures[1]["uptime_seconds"]
    threading.Timer(0.2, lambda: server.process.terminate()).start()
    rest = events(reply, 1000)
    assert rest[-1]["state"] == "draining"
    assert server.process.wait(timeout=20) == 0, "a page that looks on holds no drain up"


def test_experts_add_up(server):
    answer = server.client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    assert answer.usage.completion_tokens > 1
    status, _, experts = server.request("GET", "/v1/experts")
    layers, count = config()["num_hidden_layers"], config()["n_routed_experts"]
    assert status == 200 and (experts["layers"], experts["experts"], experts["first_layer"]) == (layers, count, 0)
    assert experts["tiers"] == ["c" * count] * layers
    totals = {sum(layer) for layer in experts["tokens"]}
    assert len(totals) == 1 and totals.pop() % config()["num_experts_per_tok"] == 0, "every token has its experts in every layer"
    assert max(max(layer) for layer in experts["use"]) == 255
    for use, tokens in zip(experts["use"], experts["tokens"]):
        assert all(t > 0 or u == 0 for u, t in zip(use, tokens))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", "/v1/experts?fmt=u16")
    reply = connection.getresponse()
    raw = reply.read()
    assert reply.getheader("Content-Type") == "application/octet-stream"
    assert list(struct.unpack(f"<{layers * count}H", raw)) == [t for layer in experts["tokens"] for t in layer]


def test_the_plan_is_the_planners(server):
    status, _, plan = server.request("GET", "/v1/plan")
    out, _ = run("plan", "--model", DEMO, "--batch", "16", "--json")
    assert status == 200
    planned = json.loads(out)
    assert plan.keys() == planned.keys()
    assert plan["model"] == planned["model"]


def dashboard():
    return json.loads((ROOT / "deploy" / "grafana" / "thermocline.json").read_text())


def test_the_dashboard_asks_for_what_there_is(start_server, tmp_path):
    """Every metric in its queries is in a scrape. What a machine may lack (RAPL, a calibration) is named in the docs instead."""
    server = start_server("--kv-disk-dir", tmp_path / "kv")
    server.client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    names = {s.name for f in scrape(server.request).values() for s in f.samples}
    board = dashboard()
    queries = [t["expr"] for p in board["panels"] for t in p.get("targets", [])] + [v["definition"] for v in board["templating"]["list"] if v["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"thermocline_\w+", query)}
    assert len(asked) > 25
    may_lack = {"thermocline_energy_joules_total", "thermocline_bandwidth_share", "thermocline_numa_bandwidth_share"}
    assert asked - names <= may_lack, asked - names
    docs = (ROOT / "docs" / "observability.md").read_text()
    for name in may_lack:
        assert name.removeprefix("thermocline_") in docs, name


def test_the_dashboard_is_one_that_grafana_reads():
    board = dashboard()
    assert board["schemaVersion"] >= 38 and board["uid"] and board["title"] and board["time"]["from"] and isinstance(board["annotations"]["list"], list)
    assert board["templating"]["list"][0]["type"] == "datasource"
    ids = [p["id"] for p in board["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in board["panels"]:
        grid = panel["gridPos"]
        assert panel["type"] in ("row", "timeseries", "stat") and panel["title"] and grid["x"] + grid["w"] <= 24, panel["title"]
        cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} and panel["targets"] and panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["refId"] and target["expr"].count("(") == target["expr"].count(")") and target["expr"].count("{") == target["expr"].count("}")


def test_the_docs_name_every_metric(start_server):
    server = start_server("--metrics-compat", "vllm")
    docs = (ROOT / "docs" / "observability.md").read_text()
    for name, family in scrape(server.request).items():
        if name.startswith("thermocline_"):
            full = name.removeprefix("thermocline_") + ("_total" if family.type == "counter" else "")
            assert f"`{full}`" in docs, f"{full} is not in docs/observability.md"


def test_the_log_as_json(start_server, tmp_path):
    log = tmp_path / "log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen([PROGRAM, "--log-format", "json", "--log-level", "debug", "serve", "--model", str(DEMO), "--port", "0", "--quiet"], stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            port = int(process.stdout.readline().strip().rsplit(":", 1)[1])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models/x%0aerror%20forged", headers={"x-request-id": "a%0ab"})
            assert connection.getresponse().status == 404
            process.terminate()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines and all(set(line) == {"time", "level", "message"} and line["level"] in ("debug", "info", "warning", "error") for line in lines)
    assert any("\n" in line["message"] for line in lines), "a table is one message"


def test_wrong_names_are_refused():
    for flags in (["--log-format", "xml", "doctor"], ["serve", "--model", DEMO, "--metrics-compat", "sglang"]):
        done = subprocess.run([PROGRAM, *map(str, flags)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stderr.startswith("error:"), done.stderr
