"""Odd flags and files for every subcommand: an exit code of docs/configuration.md, one `error:` line unless it is 0, never a signal or a hang."""
import json
import os
import subprocess

import pytest
from safetensors.numpy import load_file, save_file
import numpy as np

from program import DEMO, GOLDEN, PROGRAM, SLOW, run

TINY = GOLDEN / "tiny-csa"
WHOLE = ["", "x", "1.5", "-1", "-9223372036854775808", "0", "1", "9223372036854775807", "9223372036854775808"]
REAL = ["", "x", "nan", "-inf", "-1", "0", "1e308", "1e309"]
MODEL_FLAGS = {"--max-model-len": WHOLE, "--threads": ["x", "-1", "4097", "2147483648"], "--gpu-memory": ["x", "-1", "99999999999EiB"],
               "--experts-on-gpu": ["", "-1", "1x", "99999999999"], "--numerics": ["", "fp8"], "--kv-cache-dtype": ["", "fp4"], "--activations": ["", "int4"], "--max-isa": ["", "mmx"],
               "--device": ["", "simt:0", "simt:999999999999", "cuda:-1"], "--topology": ["x", "node:0", "node:-1 core:1"]}


def attempt(*args, stdin=b"", codes=(0, 1, 2, 3, 4, 5, 6)):
    """Runs the program on anything; checks that it ends as it should and returns its exit code and stderr."""
    done = subprocess.run([PROGRAM, *map(str, args)], input=stdin, capture_output=True, timeout=300)
    err = done.stderr.decode(errors="replace")
    assert done.returncode in codes, f"{args}: exit code {done.returncode}\n{err[-2000:]}"
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == (done.returncode != 0) and "broken promise" not in err, f"{args}: {err[-2000:]}"
    return done.returncode, err


def commands(tmp_path):
    """Of each subcommand that ends by itself: a call that is quick and right. A flag given again is refused or counts last."""
    (tmp_path / "ids").write_text("1 2 3 4 5")
    (tmp_path / "text").write_text("In the beginning God created the heaven and the earth.")
    return {
        "run": ["run", "--model", DEMO, "--quiet", "--prompt", "Hi"],
        "logits": ["logits", "--model", TINY, "--ids", tmp_path / "ids", "--out", tmp_path / "out"],
        "perplexity": ["perplexity", "--model", DEMO, "--json", "--text", tmp_path / "text"],
        "step": ["bench", "step", "--model", TINY],
        "synth": ["synth", "--quiet"],
    }


# What a call gets unless the flag under test says otherwise: short.
SHORT = {"run": {"--max-tokens": 2, "--max-model-len": 64}, "step": {"--prefill": 4, "--decode": 2, "--repetitions": 1, "--max-model-len": 64},
         "synth": {"--like": "demo", "--layers": 1}}
SWEEP = {
    "run": {**MODEL_FLAGS, "--max-tokens": WHOLE, "--temperature": REAL, "--top-p": REAL, "--top-k": WHOLE, "--min-p": REAL, "--seed": WHOLE, "--repetition-penalty": REAL,
            "--presence-penalty": REAL, "--frequency-penalty": REAL, "--stop": [""], "--reasoning-effort": ["", "heroic"], "--system": ["", "a" * 100_000]},
    "logits": {"--chunk": WHOLE, "--decode-from": [*WHOLE, "4", "5", "6"], "--max-model-len": [*WHOLE, "4", "5"]},
    "perplexity": {"--max-model-len": [*WHOLE, "2", "3"], "--reference-tensor": [""], "--reference": ["", "/dev/null", "/no/such"]},
    "step": {"--chunk": WHOLE, "--prefill": [*WHOLE, "1,,2", "63", "64"], "--decode": [*WHOLE, "63", "64"], "--repetitions": ["", "x", "-1", "0", "9223372036854775807"], "--max-model-len": WHOLE, "--full-layers": WHOLE},
    "synth": {"--layers": [v for v in WHOLE if v != "0"], "--seed": WHOLE, "--like": ["", "gpt"]},
}


@pytest.mark.parametrize("command,flag", [(c, f) for c, flags in SWEEP.items() for f in flags], ids=lambda value: str(value).strip("-"))
def test_odd_values_of_a_flag(command, flag, tmp_path):
    values = SWEEP[command][flag]
    codes = set()
    for i, value in enumerate(values[::6] if SLOW else values):
        short = [f"{name}={v}" for name, v in {**SHORT.get(command, {}), flag: value}.items()]
        out = [f"--out={tmp_path / f'model{i}'}"] if command == "synth" else []
        codes.add(attempt(*commands(tmp_path)[command], *short, *out)[0])
    assert SLOW or codes - {0}, "none of these values is good, some of them should be refused"


def test_the_calls_of_the_sweep_are_right(tmp_path):
    for command, call in commands(tmp_path).items():
        short = [f"{name}={value}" for name, value in SHORT.get(command, {}).items()]
        attempt(*call, *short, *(["--out", tmp_path / "model"] if command == "synth" else []), codes=(0,))


def test_what_does_not_end_by_itself_is_refused_before_it_begins():
    serve = ["serve", "--model", DEMO, "--quiet", "--host", "no host"]
    for flags in ([], ["--port=-1"], ["--port=65536"], ["--port=x"], ["--max-body=-1"], ["--max-body=x"], ["--threads=-1"], ["--max-model-len=-1"], ["--max-model-len=1"]):
        attempt(*serve, *flags, codes=(1, 2))
    for flags in (["--repetitions=0"], ["--repetitions=-1"], ["--threads=-1"], ["--threads=100000"], ["--topology=x"], ["--max-isa=mmx"], ["--repetitions=x"]):
        attempt("bench", "kernels", "--only=index", *flags, codes=(1, 2))
    for flags in (["--device=none"], ["--device=x"], ["--device=simt:0"], ["--shapes=x"], ["--repetitions=0"], ["--repetitions=-1"]):
        attempt("bench", "gpu", "--device=simt", "--shapes=tiny", *flags, codes=(1, 2))
    for flags in (["--device=x"], ["--device="], ["--device=simt:0"], ["--device=cuda:17"], ["--device=none:2"], ["--threads=-1"], ["--max-isa=mmx"], ["--topology=x"], ["--dir=/no/such"], ["--out=/"]):
        attempt("calibrate", "--quick", *flags, codes=(1, 2))
    for call in ([], ["bench"], ["nonsense"], ["--log-level=x"], ["run"], ["logits", "--model", TINY], ["synth", "--like=demo"], ["--no-such-flag"]):
        attempt(*call, codes=(1, 2))


def test_kv_memory_that_holds_no_sequence_says_what_would():
    serve = ["serve", "--model", DEMO, "--quiet", "--port", 0, "--max-num-seqs", 64]
    for flag in ("--kv-host-memory=x", "--kv-host-memory=-1", "--kv-host-memory=99999999999EiB", "--kv-gpu-memory=x", "--kv-gpu-memory=-1", "--prefix-cache-memory=-1", "--gpu-memory=-1", "--kv-tokens=1024"):
        attempt(*serve, flag, codes=(2,))
    code, err = attempt(*serve, "--device", "none", "--kv-host-memory", "200KiB", "--prefix-cache-memory", "3MiB")
    assert code == 2 and "--kv-host-memory is 0.2 MiB" in err and "1 sequence takes" in err and "give at least 5MiB" in err, err
    code, err = attempt(*serve, "--device", "simt", "--experts-on-gpu", 0, "--kv-gpu-memory", "200KiB")
    assert code == 2 and "--kv-gpu-memory is 0.2 MiB" in err and "give at least 2MiB" in err, err
    code, err = attempt(*serve, "--device", "none", "--kv-host-memory", "1PiB", "--max-model-len", 4096, "--prefix-cache-memory", "512TiB")
    assert code == 4 and "not enough memory on the host" in err and "--prefix-cache-memory" in err, err


def test_logits_with_more_tokens_than_context_say_both(tmp_path):
    (tmp_path / "ids").write_text("1 2 3 4 5")
    call = ["logits", "--model", TINY, "--ids", tmp_path / "ids", "--out", tmp_path / "out"]
    for chunk in (1, 4, 5, 10**9):
        code, err = attempt(*call, "--max-model-len", 4, "--chunk", chunk)
        assert code == 2 and "5 tokens" in err and "context of 4" in err and "--max-model-len" in err, err
    assert not (tmp_path / "out").exists()
    expected = None
    for flags in ([], ["--chunk", 10**9], ["--max-model-len", 5], ["--decode-from", 0], ["--decode-from", 5], ["--chunk", 2, "--decode-from", 3]):
        run(*call, *flags)
        logits = load_file(tmp_path / "out")["logits"]
        expected = logits if expected is None else expected
        assert (logits == expected).all(), flags
    run(*call, "--mtp")
    (tmp_path / "ids").write_text("7")
    run(*call, "--mtp")
    alone = load_file(tmp_path / "out")
    assert alone["logits"].shape[0] == 1 and alone["mtp_logits"].shape[0] == 0
    for text in ("", " \n", "99999999999", "-1", "1,2", "0x5", "1 2 \0"):
        (tmp_path / "ids").write_text(text)
        assert attempt(*call)[0] == (2 if text == "-1" else 1), text  # a number, and no token's


def test_perplexity_needs_something_to_predict(tmp_path):
    text = tmp_path / "text"
    call = ["perplexity", "--model", DEMO, "--json", "--text", text]
    text.write_text("In the beginning God created the heaven and the earth.")
    whole = json.loads(run(*call)[0])
    for context in (2, 3, 7):  # read in pieces: every token is predicted, if from less
        pieces = json.loads(run(*call, "--max-model-len", context)[0])
        assert pieces["tokens"] == whole["tokens"] and pieces["perplexity"] > 1, (context, pieces)
    code, err = attempt(*call, "--max-model-len", 1)
    assert code == 2 and "at least 2" in err, err
    for content in (b"", "<｜begin▁of▁sentence｜>".encode()):
        text.write_bytes(content)
        code, err = attempt(*call)
        assert code == 1 and "no text to predict" in err, err
    text.write_bytes(b"\xff\xfe\x00 ill-formed \xe2\x82")
    assert attempt(*call)[0] == 0


def test_perplexity_refuses_references_that_do_not_fit(tmp_path):
    (tmp_path / "text").write_text("In the beginning")
    call = ["perplexity", "--model", DEMO, "--text", tmp_path / "text", "--reference", tmp_path / "reference"]
    for tensors in ({"logits": np.zeros((2, 7), np.float32)}, {"logits": np.zeros((10_000, 4096), np.float32)}, {"logits": np.zeros(4096, np.float32)}, {"other": np.zeros((1, 4096), np.float32)},
                    {"logits": np.zeros((1, 4096), np.float16)}):
        save_file(tensors, tmp_path / "reference")
        assert attempt(*call)[0] == 1
    save_file({"logits": np.zeros((0, 4096), np.float32)}, tmp_path / "reference")
    assert attempt(*call)[0] == 0


def test_text_tools_answer_odd_lines(tmp_path):
    lines = [b"", b"{", b"null", b"5", b"[]", b"{}", b'{"text": null}', b'{"text": 5}', b'{"ids": [1.5]}', b'{"ids": [9223372036854775808]}', b'{"ids": null}', b'{"messages": 5}', b'{"messages": [5]}',
             b'{"messages": [{"role": 5}]}', b'{"messages": [], "thinking_mode": 5}', b'{"text": "a", "thinking_mode": "loud"}', b"\xff\xfe", b'{"text": "\xff"}', b"[" * 100_000, b'{"text": "\\ud800"}']
    for tool in ("tokenize", "detokenize", "render", "parse"):
        code, _ = attempt(tool, "--model", DEMO, stdin=b"\n".join(lines) + b"\n")
        assert code == 1
        attempt(tool, "--model", DEMO, "--no-such-flag", codes=(2,))
        attempt(tool, "--model", tmp_path / "absent", codes=(3,))
        attempt(tool, "--model", "x" * 5000, codes=(3,))


def test_a_failing_command_leaves_the_file_that_was_there(tmp_path):
    (tmp_path / "ids").write_text("1 99999")  # found once the output is open
    out = tmp_path / "out"
    out.write_text("before")
    call = ["logits", "--model", TINY, "--ids", tmp_path / "ids"]
    attempt(*call, "--out", out, codes=(2,))
    assert out.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["ids", "out"]
    (tmp_path / "ids").write_text("1 2")
    for path, words in ((tmp_path, "directory"), (tmp_path / "no" / "out", "No such file"), ("/dev/full", "No space left"), ("", "directory")):
        _, err = attempt(*call, "--out", path, codes=(1,))
        assert words in err and str(path) in err, err
    step = ["bench", "step", "--model", TINY, "-p", 4, "-n", 2, "-r", 1]
    attempt(*step, "--json", "/dev/full", codes=(1,))
    attempt(*step, "--json", "/dev/null", codes=(0,))
    whole = subprocess.run([PROGRAM, *map(str, [*call, "--out", "/dev/stdout"])], capture_output=True, timeout=300)
    run(*call, "--out", out)
    assert whole.returncode == 0 and out.read_bytes() == whole.stdout
    assert sorted(os.listdir(tmp_path)) == ["ids", "out"]
