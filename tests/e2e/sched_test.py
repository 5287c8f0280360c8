"""Traces, the simulator and `bench sched` from outside: what is recorded is what is read, and no policy decides otherwise unseen."""
import json
import os
import subprocess
from pathlib import Path

import pytest

from program import DEMO, PROGRAM, SLOW, run

DATA = Path(__file__).parent.parent / "data" / "sched"


def test_an_engine_records_what_its_routers_choose(tmp_path):
    trace, profile = tmp_path / "t", tmp_path / "p.json"
    run("run", "--model", DEMO, "--prompt", "Tell me a story", "--max-tokens", 12, "--record-trace", trace, "--expert-profile", profile)
    info = json.loads(run("trace", "info", trace, "--json")[0])
    assert info["layers"] == 6 and info["experts"] == 32 and info["top_k"] == 4 and info["near_misses"] == 4, info
    assert info["requests"] == 1 and not info["token_ids"] and info["cut_bytes"] == 0
    assert info["prefill_tokens"] > 4 and info["tokens"] == info["prefill_tokens"] + 11 and info["steps"] == 12, info
    kept = json.loads(profile.read_text())
    assert sum(map(sum, kept["uses"])) == info["tokens"] * 6 * 4, "every pair is counted"
    # A second run adds to it; a file of another model is refused before a weight is read.
    run("run", "--model", DEMO, "--prompt", "And another one", "--max-tokens", 3, "--expert-profile", profile)
    assert sum(map(sum, json.loads(profile.read_text())["uses"])) > sum(map(sum, kept["uses"])) / 2
    profile.write_text(json.dumps(kept | {"experts": 31, "uses": [row[:31] for row in kept["uses"]]}))
    _, err = run("run", "--model", DEMO, "--prompt", "x", "--expert-profile", profile, code=2)
    assert "another model" in err, err
    _, err = run("run", "--model", DEMO, "--prompt", "x", "--record-trace", "/proc/none", code=1)
    assert "--record-trace" in err, err


def test_routers_are_asked_ahead(tmp_path):
    """The trace has what the routers said a layer before; `trace predict` judges it, the simulator acts on it."""
    trace = tmp_path / "t"
    run("run", "--model", DEMO, "--prompt", "Tell me a story about the sea", "--max-tokens", 60, "--record-trace", trace)
    assert json.loads(run("trace", "info", trace, "--json")[0])["guesses"] == 6
    rows = [line.split("|") for line in run("trace", "predict", trace)[0].splitlines() if "|" in line]
    named = {row[1].strip(): float(row[3].split()[0]) for row in rows if row[2].strip() == "4"}
    assert named["router"] > named["router-2"] > named["popularity"], named
    sim = ["sim", "--model", DEMO, "--trace", trace, "--gpu", "5090", "--ram", "2x4800", "--resident", "0.12", "--json", "-"]
    staged = json.loads(run(*sim, "--staging", "router")[0])[0]
    assert staged["staged_experts"] > 0 and staged["staged_right_share"] > 0.4, staged
    ahead = json.loads(run(*sim, "--staging", "router", "--read-ahead", "2", "--ram-experts", "0.5", "--nvme", "7GB/s")[0])[0]
    assert ahead["read_ahead_right_share"] > 0.3, ahead
    _, err = run(*sim[:-2], "--read-ahead", "2", code=2)
    assert "--staging" in err, err
    _, err = run("sim", "--model", DEMO, "--trace", DATA / "demo.trace", "--gpu", "5090", "--ram", "2x4800", "--staging", "router", code=2)
    assert "nobody asked the routers" in err, err
    assert "router" not in run("trace", "predict", DATA / "demo.trace")[0]
    _, err = run("sim", "--model", DEMO, "--gpu", "5090", "--ram", "2x4800", "--serve", "--staging", "router", code=2)
    assert "simulated server" in err, err
    _, err = run(*sim[:-2], "--staging", "router", "--read-ahead", "2", code=2)
    assert "all experts are in memory" in err, err


def test_routers_of_few_experts_are_asked_ahead(tmp_path):
    """Twice a token's experts are guessed, and no more than there are."""
    config = json.loads((DATA.parent / "plan" / "deepseek_v3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4, "n_routed_experts": 20, "num_experts_per_tok": 20}))
    rows = json.loads(run("sim", "--model", tmp_path, "--gpu", "5090", "--ram", "2x4800", "--tokens", 20, "--policy", "static", "--resident", "0.1", "--staging", "router", "--json", "-")[0])
    assert rows[0]["staged_experts"] > 0, rows


def test_token_ids_only_where_somebody_agreed(tmp_path):
    trace = tmp_path / "t"
    run("run", "--model", DEMO, "--prompt", "Hi", "--max-tokens", 2, "--record-trace", trace, "--trace-token-ids")
    assert json.loads(run("trace", "info", trace, "--json")[0])["token_ids"]
    assert "WITH token ids" in run("trace", "info", trace)[0]


def test_traces_go_through_files(tmp_path):
    csv, back, page = tmp_path / "t.csv", tmp_path / "t", tmp_path / "t.html"
    run("trace", "convert", DATA / "demo.trace", csv)
    run("trace", "convert", csv, back)
    of = lambda file: json.loads(run("trace", "info", file, "--json")[0])["curve"]
    assert of(back) == of(DATA / "demo.trace")
    run("trace", "info", back, "--html", page)
    assert "<svg" in page.read_text() and "http" not in page.read_text()
    run("trace", "synth", "--out", back, "--tokens", 60, "--layers", 3, "--experts", 32, "--top-k", 4)
    assert "--request-sd" in run("trace", "fit", back)[0]
    out, _ = run("trace", "replay", back, "--policy", "all", "--resident", "0.25")
    assert len([line for line in out.splitlines() if "in slots" in line]) == 10, out
    out, _ = run("trace", "predict", back)
    assert all(name in out for name in ("popularity", "last-token", "coactivation")), out
    csv.write_text("request,position,layer,rank,expert,weight\n0,0,0,0,1\n")
    _, err = run("trace", "info", csv, code=1)
    assert "line 2" in err, err
    _, err = run("trace", "synth", "--out", back, "--top-k", 0, code=2)
    assert "--top-k" in err, err


def test_a_box_that_is_not_there(tmp_path):
    box = ("sim", "--gpu", "5090", "--ram", "12x6000", "--tokens", 40)
    page = tmp_path / "sim.html"
    rows = json.loads(run(*box, "--resident", "0.05,0.25", "--policy", "static,value", "--json", "-", "--html", page)[0])
    assert [(row["policy"], row["resident_share"]) for row in rows] == [("static", 0.05), ("value", 0.05), ("static", 0.25), ("value", 0.25)]
    assert rows[2]["hit_rate"] > rows[0]["hit_rate"] and all(row["step_ms"]["p99"] >= row["step_ms"]["p50"] > 0 for row in rows), rows
    assert page.read_text().count("<svg") == 4
    slack = rows[0]["slack"]
    assert slack["mean_us"] > 0 and 0 < slack["cpu_critical_share"] <= 1 and abs(sum(slack["missing_experts"]) - 1) < 1e-6, slack
    slow = json.loads(run(*box, "--resident", "0.25", "--policy", "static", "--fault", "cpu:0.5@0s-100s", "--json", "-")[0])
    assert slow[0]["ms_per_step"] > 1.1 * rows[2]["ms_per_step"]
    served = json.loads(run(*box, "--serve", "--policy", "value", "--resident", "0.12", "--serve-requests", 3, "--prompt-tokens", 40, "--answer-tokens", 6, "--json", "-")[0])
    assert served[0]["ttft_ms"]["p50"] > 0 and served[0]["answer_tokens_per_second"] > 0
    for flags, word in ((("--policy", "clock"), "clock"), (("--resident", "2"), "0..1"), (("--fault", "cpu"), "--fault"), (("--noise", "-1"), "--noise"), (("--trace", DATA / "demo.trace"), "6 layers")):
        assert word in run(*box, *flags, code=2)[1], flags


@pytest.mark.skipif(SLOW, reason="the same numbers in every build")
def test_the_policies_decide_as_they_did():
    out, _ = run("bench", "sched", "--golden", DATA / "golden.json")
    assert "FAIL" not in out and out.count("pass") == 7, out
