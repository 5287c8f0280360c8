"""The command line from outside: answers, tools, and what every broken input gets."""
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from program import DEMO, GOLDEN, PROGRAM, SLOW, TEXT, jsonl, read_jsonl, run


@pytest.fixture
def logits(tmp_path):
    """logits(model, ids, *flags): the tensors that `thermocline logits` writes; they stay in tmp_path/out.safetensors."""
    def run_logits(model, ids, *flags):
        (tmp_path / "ids").write_text(" ".join(map(str, ids)))
        run("logits", "--model", model, "--ids", tmp_path / "ids", "--out", tmp_path / "out.safetensors", *flags)
        return load_file(tmp_path / "out.safetensors")
    return run_logits


def golden(model):
    return load_file(GOLDEN / model / "golden.safetensors")


def test_run_answers_and_quiet_prints_only_the_answer():
    out, err = run("run", "--model", DEMO, "--prompt", "What is the capital of Norway?", "--temperature", 0)
    assert out == "The capital of Norway is Oslo.\n", out
    assert "t/s" in err and "STREAM-read peak" in err and "MiB" in err, err
    out, err = run("run", "--model", DEMO, "--temperature", 0, "--quiet", stdin="What is the capital of Norway?\n")
    assert (out, err) == ("The capital of Norway is Oslo.\n", ""), (out, err)


def test_run_on_the_interpreted_device(logits):
    question = ("--prompt", "What is the capital of Norway?", "--temperature", 0)
    if SLOW:
        here, there = (logits(GOLDEN / "tiny-csa", [5, 6, 7], "--device", d)["logits"] for d in ("none", "simt"))
        assert (here.argmax(-1) == there.argmax(-1)).all()
        return
    for flags in (("--experts-on-gpu", 40), ("--experts-on-gpu", "all"), ("--experts-on-gpu", 12, "--expert-policy", "lru")):
        out, err = run("run", "--model", DEMO, *question, "--device", "simt", "--gpu-memory", "256MiB", *flags)
        assert out == "The capital of Norway is Oslo.\n", out
        assert "SIMT interpreter 0: layers 0-5" in err, err
    assert run("run", "--model", DEMO, *question, "--device", "simt:2", "--quiet", "--max-tokens", 2)[1] == ""
    _, err = run("run", "--model", DEMO, "--device", "auto", *question)  # no card: the CPU does all of it
    assert "SIMT" not in err and "without a device" not in err, err
    out, _ = run("bench", "gpu", "--device", "simt", "--shapes", "tiny", "--repetitions", 1)
    assert "4 experts, MXFP4, 8 tokens each" in out and "index scan" in out, out


def test_settings_of_a_device_that_is_not_there_get_a_warning():
    for flags, named in [(("--gpu-memory", "20GiB"), "--gpu-memory"), (("--experts-on-gpu", 4), "--experts-on-gpu"), (("--gpu-memory", "20GiB", "--experts-on-gpu", 0), "--gpu-memory and --experts-on-gpu")]:
        _, err = run("run", "--model", DEMO, "--device", "none", "--prompt", "Hi", "--max-tokens", 1, *flags)
        assert f"without a device {named} changes nothing" in err, err


def test_device_flags_say_what_is_wrong():
    for flags, words, *code in [
        (("--device", "tpu"), "use auto, cuda, simt or none"),
        (("--device", "simt:0"), "should be 1 to 16"),
        (("--device", "simt", "--gpu-memory", "1MiB"), "give --gpu-memory more", 4),
        (("--device", "cuda:16"), "use --device none", 5),
        (("--device", "simt", "--experts-on-gpu", "many"), "should be auto, all or a number"),
        (("--device", "simt", "--expert-policy", "best"), "use one of static, lru"),
        (("--device", "simt", "--prefill-experts", "fast"), "use cpu, stream or hybrid"),
        (("--device", "simt", "--numerics", "fp32"), "fp32 numerics do not run", 5),
        (("--device", "simt", "--activations", "int8"), "INT8 activations do not run", 5),
        (("--device", "simt", "--kv-cache-dtype", "bf16"), "devices keep the KV cache in FP8"),
        (("--device", "none", "--kv-cache-dtype", "fp8", "--numerics", "fp32"), "keep the KV cache in f32"),
    ]:
        _, err = run("run", "--model", DEMO, "--prompt", "x", *flags, code=code[0] if code else 2)
        assert words in err, (flags, err)


def test_run_raw_continues_the_prompt():
    for line in read_jsonl(GOLDEN / "demo" / "greedy.jsonl")[:: 30 if SLOW else 6]:
        out, _ = run("run", "--model", DEMO, "--raw", "--quiet", "--temperature", 0, "--numerics", line["numerics"], "--max-tokens", len(line["ids"]), "--prompt", line["prompt"])
        assert out == line["text"] + "\n", (out, line["text"])
    bos = "<｜begin▁of▁sentence｜>"
    same = [run("run", "--model", DEMO, "--raw", "-q", "--temperature", 0, "-n", 5, "--prompt", p)[0] for p in ("In the beginning", bos + "In the beginning")]
    assert same[0] == same[1] and same[0].strip(), same


def test_run_thinks_chats_samples_and_stops():
    out, _ = run("run", "--model", DEMO, "--think", "--temperature", 0, "--prompt", "What is 3 + 4?")
    assert out.startswith("<think>") and "</think>\n" in out, out
    out, _ = run("run", "--model", DEMO, "--chat", "--quiet", "--temperature", 0, stdin="My name is Ida.\n\nWhat is the capital of Norway?\n")
    assert out.count("\n") == 2 and "Ida" in out and "Oslo" in out, out
    seeded = {run("run", "--model", DEMO, "-q", "--seed", 5, "--temperature", 1.5, "--top-p", 0.95, "--min-p", 0.01, "--top-k", 50, "--prompt", "Tell me a story about a fox.")[0] for _ in range(2)}
    assert len(seeded) == 1, seeded
    out, _ = run("run", "--model", DEMO, "-q", "--temperature", 0, "--stop", "Norway", "--prompt", "What is the capital of Norway?")
    assert out == "The capital of \n", out
    out, _ = run("run", "--model", DEMO, "-q", "--temperature", 0, "--max-tokens", 2, "--system", "You are kind.", "--repetition-penalty", 1.1, "--presence-penalty", 0.1, "--frequency-penalty", 0.1, "--prompt", "Who are you?")
    assert out.strip(), out


def test_ctrl_c_stops_the_answer_and_a_second_one_leaves():
    args = [PROGRAM, "run", "--model", str(DEMO), "--temperature", "0", "--raw", "--ignore-eos", "--max-tokens", "100000", "--prompt", "And"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(40)  # it is generating
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and b"t/s" in err, (process.returncode, err)
    process = subprocess.Popen([PROGRAM, "run", "--model", str(DEMO), "--chat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"What is the capital of Norway?\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.5)  # back at the prompt: one Ctrl-C leaves
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_loading_shows_a_bar_on_a_terminal_and_lines_elsewhere():
    lead, follow = pty.openpty()
    process = subprocess.Popen([PROGRAM, "run", "--model", str(DEMO), "-n", "1", "--prompt", "Hi"], stderr=follow, stdout=subprocess.DEVNULL)
    os.close(follow)
    shown = b""
    try:
        while data := os.read(lead, 4096):
            shown += data
    except OSError:
        pass
    assert process.wait() == 0 and b"\r" in shown and b"[####" in shown and b"GB/s" in shown, shown
    _, err = run("run", "--model", DEMO, "-n", 1, "--prompt", "Hi")
    assert "loading" in err and "\r" not in err, err


def test_logits_match_the_published_code(logits):
    for model in ("tiny-csa",) if SLOW else ("tiny-csa", "tiny-flash", "tiny-pro", "tiny-odd"):
        g = golden(model)
        for flags in ((), ("--chunk", 127), ("--decode-from", len(g["ids"]) - 9)):
            out = logits(GOLDEN / model, g["ids"], "--numerics", "fp32", *flags)
            assert out["logits"].shape == g["logits"].shape and np.abs(out["logits"] - g["logits"]).max() < 2e-3, (model, flags)
        out = logits(GOLDEN / model, g["ids"], "--numerics", "fp32", "--mtp")
        assert out["mtp_logits"].shape == (len(g["ids"]) - 1, g["logits"].shape[1])
        assert np.abs(out["mtp_logits"][: len(g["mtp_logits"])] - g["mtp_logits"]).max() < 2e-3, model


def test_selfcheck_finds_no_difference(tmp_path):
    out, _ = run("selfcheck", "--model", DEMO, "--device", "none", "--threads", 2, "--kv-disk-dir", tmp_path, *(("--quick",) if SLOW else ()))
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert [row[0] for row in rows] == ["repeat", "chunks", "batch", "cancel", "rollback", "fork", "checkpoint", "tiers", "threads", "cache"]
    assert all(row[-1] == "none" for row in rows), out
    assert "by way of the disk" in out and not list(tmp_path.iterdir()), "it leaves nothing"
    assert "41 tokens from the prefix cache" in out or "301 tokens from the prefix cache" in out
    run("selfcheck", "--model", DEMO, "--device", "none", "--max-model-len", 64, code=2)


@pytest.mark.skipif(SLOW, reason="minutes on the interpreter")
def test_selfcheck_finds_no_difference_on_a_device():
    out, _ = run("selfcheck", "--model", GOLDEN / "tiny-csa", "--device", "simt", "--quick", "--threads", 1)
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert "cancel" in [row[0] for row in rows] and all(row[-1] == "none" for row in rows if row[0] != "cache"), out  # it has no tokenizer


def test_bench_decodes_from_a_synthetic_context():
    flags = ("bench", "step", "--model", DEMO, "--device", "none", "-p", 0, "-n", 4, "-b", "1,2", "-r", 1)
    out, _ = run(*flags, "--fill-kv", "600,2000", "--json", "-")
    rows = {(r["batch"], r["context"]): r for r in json.loads(out)["results"]}
    assert set(rows) == {(b, c) for b in (1, 2) for c in (0, 600, 2000)}
    assert rows[1, 0]["kv_bytes_per_token"] == 0 < rows[1, 600]["kv_bytes_per_token"] < rows[1, 2000]["kv_bytes_per_token"]
    assert all(r["tokens_per_second"] > 0 for r in rows.values())
    out, _ = run(*flags[:6], "-p", 64, "-n", 0, "-r", 1, "--fill-kv", "32,2000", "--json", "-")
    assert [(r["kind"], r["context"]) for r in json.loads(out)["results"]] == [("prefill", 0), ("prefill", 2000)]
    _, err = run(*flags, "--fill-kv", 5, code=2)
    assert "--fill-kv 5" in err
    _, err = run(*flags, "--fill-kv", 5000, code=2)
    assert "5000" in err and "4096" in err


def test_bench_and_perplexity_report(logits, tmp_path):
    out, _ = run("bench", "step", "--model", DEMO, "-p", "32", "-n", "8", "-r", 1, "--json", "-")
    document = json.loads(out)
    assert {row["kind"] for row in document["results"]} == {"prefill", "decode"}
    for row in document["results"]:
        assert row["tokens"] > 0 and row["tokens_per_second"] > 0 and row["bytes_per_token"] > 0 and row["share_of_bound"] > 0, row
    assert document["stream_read_bytes_per_second"] > 1e8 and document["machine"]["cpu"] and document["build"]["version"]
    out, _ = run("bench", "step", "--model", DEMO, "-p", "16", "-n", "4", "-r", 1, "--json", tmp_path / "bench.json")
    tables = [[len(line) for line in part.splitlines() if line.startswith("|")] for part in out.split("\n\n") if "\n|" in "\n" + part]
    assert [len(set(widths)) for widths in tables] == [1, 1] and [len(widths) for widths in tables] == [2 + 2, 2 + 2 * 5], out
    assert json.loads((tmp_path / "bench.json").read_text())["results"], out
    text = "In the beginning God created the heaven and the earth. " * 4
    (tmp_path / "text").write_text(text)
    ids = [0] + jsonl("tokenize", DEMO, [{"text": text}])[0]["ids"]
    logits(DEMO, ids)
    out, _ = run("perplexity", "--model", DEMO, "--text", tmp_path / "text", "--reference", tmp_path / "out.safetensors", "--json")
    same = json.loads(out)
    assert same["tokens"] == len(ids) - 1 and 1 < same["perplexity"] < 4096 and abs(same["mean_kl"]) < 1e-9 and same["top1_agreement"] == 1, same
    out, _ = run("perplexity", "--model", DEMO, "--numerics", "fp32", "--text", tmp_path / "text", "--reference", tmp_path / "out.safetensors")
    assert "mean KL" in out and "perplexity" in out, out


@pytest.mark.skipif(SLOW, reason="minutes of benchmarks, which measure nothing there")
def test_bench_kernels_judges_every_row():
    out, _ = run("bench", "kernels", "--only", "index,step", "--model", DEMO, "-r", 1, "--json", "-")
    document = json.loads(out)
    rows = {row["name"]: row for row in document["results"]}
    assert len(rows) == 4 and document["peak_int8_ops"] > 0, document
    for row in rows.values():
        assert row["value"] > 0 and row["share"] > 0 and row["bound"] and row["unit"], row
        assert row["pass"] == (row["share"] <= row["target"] if row["at_most"] else row["share"] >= row["target"]), row
    out, _ = run("bench", "kernels", "--only", "index,step", "-r", 1)
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and sum("skip" in line for line in lines) == 3, out
    process = subprocess.run([PROGRAM, "bench", "kernels", "--only", "index,step", "--model", DEMO, "-r", "1", "--check"], capture_output=True, text=True)
    assert process.returncode == (1 if "FAIL" in process.stdout else 0), process.stdout
    _, err = run("bench", "kernels", "--max-isa", "mmx", code=2)
    assert "amx-emulated" in err, err


def test_bench_server_measures_streams_that_talk_and_streams_that_wait(tmp_path):
    out, _ = run("bench", "server", "--model", DEMO, "--device", "none", "--streams", 3, "-n", 4, "-r", 1, "--idle", 20, "--json", tmp_path / "server.json")
    got = json.loads((tmp_path / "server.json").read_text())
    assert all(got[name] > 0 for name in ("step_seconds", "between_seconds", "network_cpu_seconds")), got
    assert got["overhead"] == pytest.approx((got["between_seconds"] + got["network_cpu_seconds"]) / got["step_seconds"])
    assert "memory of 20 streams that wait" in out and 0 <= got["idle_bytes"] < 100e6, out
    _, err = run("bench", "server", "--model", DEMO, "--streams", 0, code=2)
    assert "--streams should be from 1" in err


def test_int8_activations_change_the_logits_a_little(logits, tmp_path):
    ids = list(range(5, 60))
    exact = logits(DEMO, ids)["logits"]
    rounded = logits(DEMO, ids, "--activations", "int8")["logits"]
    correlation = np.corrcoef(exact.ravel(), rounded.ravel())[0, 1]
    assert 0.99 < correlation and (exact != rounded).any(), correlation
    _, err = run("logits", "--model", DEMO, "--ids", tmp_path / "ids", "--out", tmp_path / "o", "--activations", "int4", code=2)
    assert "exact or int8" in err, err


def test_synth_writes_a_model_that_runs(logits, tmp_path):
    run("synth", "--like", "demo", "--layers", 4, "--seed", 3, "--out", tmp_path / "synth", "--quiet")
    config = json.loads((tmp_path / "synth" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["compress_ratios"] == [0, 0, 4, 128]
    out = logits(tmp_path / "synth", list(range(1, 200)))
    assert np.isfinite(out["logits"]).all() and 0.5 < out["logits"].std() < 10
    _, err = run("synth", "--like", "demo", "--out", tmp_path / "synth", "--quiet", code=2)
    assert "already holds" in err, err


def test_a_model_of_synth_has_no_tokenizer(tmp_path):
    run("synth", "--like", "demo", "--layers", 1, "--out", tmp_path / "model", "--quiet")
    for command in (["run", "--prompt", "Hi"], ["tokenize"], ["bench", "server", "--streams", 1]):
        _, err = run(*command, "--model", tmp_path / "model", code=3)
        assert f"{tmp_path / 'model'} has no tokenizer.json" in err and "synth" in err and "--tokenizer DIR" in err, err


def test_text_tools_answer_line_by_line():
    lines = read_jsonl(TEXT / "chat_encoding.jsonl")[:40]
    assert [o["text"] for o in jsonl("render", DEMO, [{k: v for k, v in line.items() if k != "text"} for line in lines])] == [line["text"] for line in lines]
    lines = read_jsonl(TEXT / "completion_parsing.jsonl")
    for line, out in zip(lines, jsonl("parse", DEMO, [{k: line[k] for k in ("text", "thinking_mode")} for line in lines])):
        assert out.get("parsed") == line.get("parsed") and ("error" in out) == ("error" in line), (line, out)
    out = jsonl("parse", DEMO, [{"text": "cut off", "thinking_mode": "chat"}], 0, "--lenient")
    assert out[0]["parsed"]["content"] == "cut off", out
    out = jsonl("tokenize", DEMO, [{"text": "a"}, {"nope": 1}, {"text": "b"}], 1)  # a bad line costs only itself
    assert "ids" in out[0] and "text" in out[1]["error"] and "ids" in out[2], out
    out = jsonl("detokenize", DEMO, [{"ids": [4096]}, {"ids": [-1]}, {"ids": "x"}], 1)
    assert all("error" in o for o in out), out
    for command, line, error in [("tokenize", '{"text": "a"', "JSON ends too early, at byte 12"), ("tokenize", '{"text": a}', "not JSON at byte 9"), ("tokenize", '[{"text": "a"}]', "it should be a JSON object"),
                                 ("tokenize", '{"text": "a", "text": "b"}', "the key 'text' appears twice in one object"), ("tokenize", '{"text": ["\\ud800"]}', "text[0] holds half of a surrogate pair"), ("tokenize", '{"text": 5}', "text should be a string"),
                                 ("detokenize", "{}", "ids is missing"), ("detokenize", '{"ids": [1, 5000]}', "ids[1] should be a token id below 4093"), ("detokenize", '{"ids": [1e999]}', "ids[0] is out of range"),
                                 ("render", '{"messages": [{"role": "user", "content": 5}]}', "messages[0].content"), ("render", "7", "it should be a JSON object"), ("render", '{"messages": [], "drop_thinking": 1}', "drop_thinking should be true or false"),
                                 ("parse", '{"text": "a", "thinking_mode": "deep"}', "thinking_mode should be chat or thinking, not 'deep'")]:
        out, err = run(command, "--model", DEMO, stdin=line + "\n", code=1)
        assert error in json.loads(out)["error"] and "line 1: " in err and "parse error" not in out + err, (line, out)


@pytest.fixture
def broken(temporary_model, tmp_path):
    """broken(change, *command): a model with one thing wrong gives exit code 3 and an error that says what, where; never a crash."""
    def check(change, *command, source=DEMO, expect=()):
        folder = temporary_model(source)
        change(folder)
        (tmp_path / "ids").write_text("1 2 3")
        command = command or ("logits", "--ids", tmp_path / "ids", "--out", tmp_path / "never.safetensors")
        _, err = run(command[0], "--model", folder, *command[1:], code=3)
        assert err.count("error:") == 1 and "broken promise" not in err, err
        for part in expect:
            assert part in err, (part, err)
        assert not (tmp_path / "never.safetensors").exists()
        shutil.rmtree(folder)
    return check


def edit_json(name, change):
    def apply(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))
    return apply


def edit_bytes(name, offset, new):
    def apply(folder):
        data = bytearray((folder / name).read_bytes())
        data[offset : offset + len(new)] = new
        (folder / name).write_bytes(data)
    return apply


def test_broken_checkpoints_are_refused(broken):
    shard = "model-00001-of-00002.safetensors"
    broken(lambda f: (f / "config.json").unlink(), expect=["config.json"])
    broken(lambda f: (f / shard).unlink(), expect=[shard])
    broken(lambda f: (f / "model.safetensors.index.json").unlink(), expect=["model.safetensors.index.json"])
    for cut in (0, 7, 8, 100, 100_000, -1):
        broken(lambda f: (f / shard).write_bytes((f / shard).read_bytes()[:cut]), expect=[shard])
    broken(edit_bytes(shard, 0, b"\xff" * 8), expect=[shard, "offset 0"])
    broken(edit_bytes(shard, 8, b"["), expect=[shard])
    broken(edit_json("config.json", lambda c: c.update(hidden_size=512)), expect=["config.json", "tensor", "offset"])
    broken(edit_json("config.json", lambda c: c.update(model_type="llama")), expect=["llama"])
    broken(edit_json("config.json", lambda c: c.pop("sliding_window")), expect=["sliding_window"])
    broken(edit_json("config.json", lambda c: c.update(vocab_size=2**62)), expect=["vocab_size"])
    broken(edit_json("model.safetensors.index.json", lambda c: c["weight_map"].update({"norm.weight": "../../etc/passwd"})), expect=["plain file name"])


def test_a_config_of_another_model_is_refused(broken):
    """Tensors that would be left over: the answer would be another model's, without a word."""
    def ratios(config):
        config["compress_ratios"][2] = 0
    broken(edit_json("config.json", ratios), expect=("layers.2.attn.", "compress_ratios[2] is 0"))

    def fewer(config):
        config["num_hidden_layers"] -= 1
        del config["compress_ratios"][5]
    broken(edit_json("config.json", fewer), expect=("layers.5.", "num_hidden_layers"))


def test_every_field_of_a_header_is_checked(broken):
    shard = "model-00001-of-00002.safetensors"
    data = (GOLDEN / "tiny-csa" / shard).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n.endswith("w1.weight"))
    for change in ({"dtype": "F64"}, {"dtype": "BF16"}, {"dtype": 5}, {"shape": [1]}, {"shape": [2**40, 2**40]}, {"shape": "x"}, {"shape": [-1, 2]}, {"data_offsets": [0, 1]}, {"data_offsets": [2**63, 2**63 + 8]}, {"data_offsets": [8, 0]}, {"data_offsets": []}):
        altered = json.dumps({**header, name: {**header[name], **change}}).encode()
        def write(folder):
            (folder / shard).write_bytes(struct.pack("<Q", len(altered)) + altered + data[8 + length :])
        broken(write, source=GOLDEN / "tiny-csa", expect=[shard, name])


def test_nan_scales_and_wild_expert_ids_are_refused(broken):
    def damage(suffix, value):
        def apply(folder):
            for shard in sorted(folder.glob("model-*.safetensors")):
                data = bytearray(shard.read_bytes())
                length = struct.unpack("<Q", data[:8])[0]
                for name, entry in json.loads(data[8 : 8 + length]).items():
                    if name.endswith(suffix):
                        at = 8 + length + entry["data_offsets"][0]
                        data[at : at + len(value)] = value
                        shard.write_bytes(data)
                        return
            raise AssertionError(suffix)
        return apply
    broken(damage("w1.scale", b"\xff"), expect=["w1.scale", "byte"])
    broken(damage("wq_a.weight", b"\x7f"), expect=["wq_a.weight", "byte"])
    broken(damage("tid2eid", struct.pack("<q", 32)), expect=["tid2eid", "32"])
    broken(damage("hc_attn_fn", struct.pack("<f", float("nan"))), expect=["hc_attn_fn"])


def test_broken_text_files_are_refused(broken, temporary_model):
    prompt = ("run", "--prompt", "hi")
    broken(lambda f: (f / "tokenizer.json").unlink(), *prompt, expect=["tokenizer.json"])
    broken(lambda f: (f / "tokenizer.json").write_text("{"), *prompt, expect=["tokenizer.json", "byte"])
    broken(edit_json("tokenizer.json", lambda t: t["model"].pop("merges")), *prompt, expect=["tokenizer.json", "merges"])
    broken(lambda f: (f / "encoding" / "encoding_dsv4.py").unlink(), *prompt, expect=["encoding_dsv4.py"])
    broken(lambda f: (f / "encoding" / "encoding_dsv4.py").write_text("TOOLS_TEMPLATE = 'x\n"), *prompt, expect=["encoding_dsv4.py"])
    folder = temporary_model()
    (folder / "encoding" / "encoding_dsv4.py").unlink()
    run("run", "--model", folder, "--raw", "-q", "-n", 2, "--prompt", "hi")  # raw text needs no prose


def test_bad_requests_name_what_is_wrong(tmp_path):
    (tmp_path / "ids").write_text("1 2 x")
    _, err = run("logits", "--model", DEMO, "--ids", tmp_path / "ids", "--out", tmp_path / "o", code=1)
    assert "byte 4" in err, err
    (tmp_path / "ids").write_text("1 99999")
    _, err = run("logits", "--model", DEMO, "--ids", tmp_path / "ids", "--out", tmp_path / "o", code=2)
    assert "99999" in err and not (tmp_path / "o").exists(), err
    for flags, part in ((("--numerics", "fp8"), "fp8"), (("--max-isa", "mmx"), "mmx"), (("--topology", "nonsense"), "nonsense"), (("--max-model-len", 10**9), "limit"), (("--temperature", -1), "temperature"), (("--top-p", 0), "top_p")):
        _, err = run("run", "--model", DEMO, "--prompt", "hi", *flags, code=2)
        assert part in err, (flags, err)
    run("run", "--model", DEMO, "--no-such-flag", code=2)
    run("run", code=2)
    _, err = run("run", "--model", "/no/such/model", "--prompt", "hi", code=3)
    assert "/no/such/model" in err, err
    _, err = run("run", "--model", DEMO, "--max-model-len", 16, "--prompt", "word " * 50, code=1)
    assert "tokens" in err, err


def test_synthetic_topologies_and_thread_counts_change_no_bit(logits):
    ids = golden("demo")["ids"][:60]
    expected = logits(DEMO, ids, "--threads", 1)["logits"]
    for flags in (("--threads", 3), ("--topology", "node:2 core:2 pu:1"), ("--topology", "node:4 core:1 pu:1", "--threads", 4)):
        assert (logits(DEMO, ids, *flags)["logits"] == expected).all(), flags


def test_too_many_threads_get_a_warning(monkeypatch, tmp_path):
    _, err = run("run", "--model", DEMO, "--prompt", "hi", "--max-tokens", 1, "--threads", 4 * os.cpu_count())
    assert f"{4 * os.cpu_count()} threads where" in err and "leave out --threads" in err, err
    short = ("run", "--model", DEMO, "--prompt", "hi", "--max-tokens", 1)
    (tmp_path / "box.toml").write_text(f"threads = {4 * os.cpu_count()}\n")
    assert f"leave out threads in {tmp_path / 'box.toml'}" in run(*short, "--config", tmp_path / "box.toml")[1]
    monkeypatch.setenv("THERMOCLINE_THREADS", str(4 * os.cpu_count()))
    assert "leave out THERMOCLINE_THREADS" in run(*short)[1]


def test_calibrate_keeps_a_profile_that_bench_step_predicts_from(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    step = ("bench", "step", "--model", GOLDEN / "tiny-csa", "-p", 4, "-n", 2, "-r", 1)
    out, _ = run(*step)
    assert "predicted" not in out, out
    out, err = run("calibrate", "--quick")
    assert "calibrating" in err and "experts, MXFP4" in out and "STREAM read" in out and "calibration" not in out, (out, err)
    (stored,) = (tmp_path / "cache" / "thermocline").iterdir()
    profile = json.loads(stored.read_text())
    assert stored.name == f"machine-{profile['fingerprint']}.json" and stored.stat().st_mode & 0o777 == 0o600, stored
    assert profile["cpu"]["read_bytes_per_second"] > 0 and len(profile["cpu"]["ns_per_byte"]["fp8"]) == len(profile["tokens"]), profile
    assert "predicted t/s" in run(*step)[0]
    rows = json.loads(run(*step, "--json", "-")[0])["results"]
    for row in rows:
        assert row["predicted_tokens_per_second"] > 0 and row["predicted_off_by_percent"] > -100, row
    # With a card in the profile the CPU alone is predicted as before, and plan takes the card's measure for its own.
    profile["gpus"] = [{"name": "a card", "memory_bytes": 24e9, "ns_per_byte": {name: [0.001 * n for n in profile["tokens"]] for name in ("bf16", "fp8", "mxfp4")}, "attention_flops": 1e13, "index_ops": 1e13,
                        "bytes_per_second": 9e11, "kernel_ns": 2000, "h2d_bytes_per_second": 2.5e10, "h2d_ns": 9000, "cpu_read_share_beside_h2d": 0.7, "sync_ns": 20000}]
    stored.write_text(json.dumps(profile))
    there = json.loads(run(*step, "--device", "none", "--json", "-")[0])["results"]
    assert [row["predicted_tokens_per_second"] for row in there] == [row["predicted_tokens_per_second"] for row in rows]
    cards = [row["source"] for row in json.loads(run("plan", "--model", "demo", "--json")[0])["hardware"] if row["name"] == "a card memory"]
    assert cards == ["calibrated"], cards
    assert "a card" not in run("plan", "--model", "demo", "--gpu", "5090")[0]
    stored.write_text("{}")
    out, err = run(*step)
    assert "predicted" not in out and "version is missing" in err, (out, err)
    _, err = run(*step, "--profile", stored, code=1)
    assert str(stored) in err and "version is missing" in err, err


def test_calibrate_shows_the_interpreter_and_never_keeps_it_for_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, err = run("calibrate", "--quick", "--device", "simt")
    assert "SIMT interpreter 0, experts" in err and "to the CPU and back" in out and "copies to it" in out, (out, err)
    assert "not stored: the SIMT interpreter" in out and os.listdir(tmp_path) == [], out
    named = tmp_path / "named.json"
    out, _ = run("calibrate", "--quick", "--device", "simt", "--out", named)
    assert f"stored in {named}, of no machine" in out, out
    profile = json.loads(named.read_text())
    assert profile["fingerprint"] == "" and [gpu["name"] for gpu in profile["gpus"]] == ["SIMT interpreter 0"], profile


def test_doctor_reads_the_machine_it_is_given(tmp_path):
    meminfo = tmp_path / "proc" / "meminfo"
    meminfo.parent.mkdir()
    meminfo.write_text("MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n")
    out, _ = run("doctor", "--root", tmp_path)
    assert "32.0 GiB free of 64.0" in out and "instruction sets" in out and "problem" not in out, out
    meminfo.write_text("MemTotal: 67108864 kB\nMemAvailable: 1024 kB\n")
    document = json.loads(run("doctor", "--root", tmp_path, "--json", code=1)[0])
    levels = {check["check"]: check["level"] for check in document["checks"]}
    assert levels["memory"] == "problem" and levels["swap"] == "ok" and document["machine"]["cores"] > 0, document
    assert all(bool(check["advice"]) == (check["level"] != "ok") for check in document["checks"]), document
