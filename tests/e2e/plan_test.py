"""`thermocline plan` from outside: no weights are needed, text and data agree, every flag it prints is one of serve."""
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from program import DEMO, PROGRAM, run, run_with_free_memory

DATA = pathlib.Path(__file__).parents[1] / "data" / "plan"

BOX = ["--ram", "12x6000", "--ram-size", "384GiB", "--cpu", "64 cores, avx512"]


def plan(*flags, model="v4-flash"):
    return json.loads(run("plan", "--model", model, "--json", *flags)[0])


def refused(*flags, code=2):
    done = subprocess.run([PROGRAM, "plan", *map(str, flags)], capture_output=True, text=True, timeout=60)
    assert done.returncode == code and done.stdout == "", (flags, done.stdout, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, (flags, done.stderr)
    return errors[0]


def test_a_box_that_is_described():
    found = plan("--gpu", "5090", *BOX, "--context", "128k", "--batch", 8)
    assert found["fits"] and found["refusal"] == "" and found["context"] == 131072 and found["batch"] == 8
    assert [row["batch"] for row in found["decode"]] == [1, 8, 32]
    for row in found["decode"]:
        assert 0 < row["uniform_tokens_per_second"] < row["tokens_per_second"] and 0.05 < row["resident"] < 0.2 and row["bottleneck"], row
    sources = {row["name"]: row["source"] for row in found["hardware"]}
    assert sources["RAM"] == "--ram-size" and sources["cores"] == "--cpu" and "data sheet, 12 x 6000" in sources["RAM read"], sources
    assert sum(row["bytes"] for row in found["memory"] if row["tier"] == "device 0") < 32607 << 20
    rows = found["csa_rows"]
    assert found["csa_rows_in_host_memory"] and rows["experts_save_ms"] > rows["copies_take_ms"] > 0 and 2.5e9 < rows["freed_bytes"] < 3.5e9, rows
    one = plan("--gpu", "5090", *BOX, "--context", 350_000, "--batch", 1)
    assert not one["csa_rows_in_host_memory"] and 0 < one["csa_rows"]["experts_save_ms"] < one["csa_rows"]["copies_take_ms"], one["csa_rows"]
    experts = next(row["bytes"] for row in found["memory"] if row["owner"] == "routed experts")
    assert abs(experts - 147.2e9) < 0.2e9
    assert found["prefill"]["first_token_seconds"] == pytest.approx(131072 / found["prefill"]["tokens_per_second"])


def test_text_has_the_numbers_of_the_data():
    flags = ["--gpu", "5090", *BOX, "--context", "32k", "--batch", 8]
    found, text = plan(*flags), run("plan", "--model", "v4-flash", *flags)[0]
    for row in found["hardware"]:
        assert row["name"] in text and row["source"] in text, row
    for row in found["decode"]:
        rate = row["tokens_per_second"]
        assert row["bottleneck"] in text and (f"{rate:.1f}" if rate < 100 else f"{rate:.0f}") in text
    for change in found["what_if"]:
        assert change["change"] in text
    assert f"{found['csa_rows']['experts_save_ms']:.2f} ms of a step" in text
    assert found["serve"] in text and "DOES NOT FIT" not in text
    assert max(map(len, text.splitlines()[:-2])) < 140, "tables fit a terminal"


@pytest.mark.parametrize("flags", [["--gpu", "5090"], ["--gpu", "none"], ["--gpu", "h100", "--gpu", "h100"], ["--gpu", "4090,48GiB", "--context", "1M"]], ids=" ".join)
def test_the_serve_line_has_flags_that_exist(flags):
    line = plan(*flags, *BOX, "--batch", 4)["serve"].split()
    assert line[:2] == ["thermocline", "serve"]
    known = run("serve", "--help=all")[0]
    for word in line:
        assert not word.startswith("--") or re.search(rf"{word}\b", known), word
    # With a model and a device that are here it starts to load, so every value is understood.
    swaps = {"--model": str(DEMO), "--max-model-len": "4096", "--device": "none", "--max-num-batched-tokens": "512"}
    call = [swaps.get(line[i - 1], word) for i, word in enumerate(line)][1:]
    done = subprocess.run([PROGRAM, *call, "--quiet", "--host", "no host"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no host" in done.stderr, done.stderr


def test_this_box_is_measured():
    found = plan("--batch", 2, model="demo")
    sources = {row["name"]: row["source"] for row in found["hardware"]}
    assert "measured" in sources["RAM read"] or sources["RAM read"] == "calibrated", sources
    assert found["fits"] and found["context"] == 4096 and "--device" in found["serve"]


def test_a_box_with_little_memory_is_measured_with_less(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no profile of this box
    out, _ = run_with_free_memory(200_000, tmp_path, "plan", "--model", DEMO, "--json")
    source = next(row["source"] for row in json.loads(out)["hardware"] if row["name"] == "RAM read")
    assert "measured, STREAM read of" in source and "read from 97 MiB, as little more is free" in source, source
    _, err = run_with_free_memory(400_000, tmp_path, "run", "--model", DEMO, "--device", "none", "--prompt", "Hi", "--max-tokens", 2)
    assert "STREAM-read peak" in err and "(read from 195 MiB, as little more is free" in err, err
    out, err = run_with_free_memory(400_000, tmp_path, "bench", "step", "--model", DEMO, "--device", "none", "-p", 8, "-n", 2, "-r", 1)
    assert "warn" in err and "STREAM read from 195 MiB" in err and "share of bound" in out, (out, err)


def test_a_folder_needs_its_config_alone(tmp_path):
    shutil.copyfile(DEMO / "config.json", tmp_path / "config.json")
    found, demo = plan(*BOX, model=tmp_path), plan(*BOX, model=DEMO)
    assert found["decode"] == demo["decode"] and f"--model {tmp_path}" in found["serve"]
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refused("--model", tmp_path, *BOX, code=3)
    assert "config.json" in refused("--model", tmp_path / "absent", *BOX, code=3)


def test_what_does_not_fit_says_what_would():
    found = plan("--gpu", "5090", "--ram", "12x6000", "--ram-size", "384GiB", "--nvme", "7GB/s", model="v4-pro")
    assert not found["fits"] and found["serve"] == "" and "NVMe expert storage is not built yet" in found["refusal"]
    assert [(change["change"], change["fits"]) for change in found["what_if"]] == [("+448 GiB RAM", True)]
    text = run("plan", "--model", "v4-pro", "--gpu", "4090", "--ram", "2x5600", "--nvme", "7GB/s")[0]
    assert "DOES NOT FIT: RTX 4090" in text and "2 such cards" in text and "as if it fitted" not in text


@pytest.mark.parametrize("name,config,words", [("v3", "deepseek_v3", "MLA"), ("v4.1-flash", "deepseek_v41", "n-gram")])
def test_models_that_are_planned_and_not_computed(name, config, words, tmp_path):
    box = ["--gpu", "h100", "--ram", "24x6000", "--ram-size", "1TiB", "--nvme", "7GB/s", "--context", "64k", "--batch", 4]
    found, text = plan(*box, model=name), run("plan", "--model", name, *box)[0]
    assert found["fits"] and found["serve"] == "" and words in found["not_computed"], found
    assert all(row["bottleneck"] and row["tokens_per_second"] > 0 for row in found["decode"]) and found["prefill"]["bottleneck"]
    assert found["what_if"] and found["experts_on_devices"] > 0
    lines = [line for line in text.splitlines() if line.startswith("NOT COMPUTED: ")]
    assert len(lines) == 1 and words in lines[0] and "thermocline serve" not in text, text
    assert max(map(len, text.splitlines())) < 140, "tables fit a terminal"
    # A folder with the config.json alone is planned alike, and refused where it would have to be computed.
    shutil.copyfile(DATA / f"{config}.json", tmp_path / "config.json")
    assert {**plan(*box, model=tmp_path), "model": name} == found
    for command in (["run", "--prompt", "Hi"], ["serve", "--port", "0"]):
        done = subprocess.run([PROGRAM, *command, "--model", tmp_path, "--device", "none", "--quiet"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 3 and config in done.stderr and "thermocline plan" in done.stderr and done.stdout == "", done
    rows = json.loads(run("sim", "--model", name, "--gpu", "h100", "--ram", "24x6000", "--tokens", 20, "--policy", "static", "--resident", "0.1", "--json", "-")[0])
    assert rows[0]["tokens_per_second"] > 0, rows


def test_what_is_no_model_is_refused():
    refused("--model", "v5", *BOX, code=3)


def test_the_table_of_ngrams_has_its_place():
    box = ["--gpu", "5090", "--ram", "12x6000", "--ram-size", "384GiB"]
    without, with_disk = plan(*box, model="v4.1-flash"), plan(*box, "--nvme", "7GB/s", model="v4.1-flash")
    assert not without["fits"] and "--nvme" in without["refusal"] and with_disk["fits"] and with_disk["table_on_disk"]
    assert any(row["tier"] == "disk" and row["owner"] == "n-gram table" and abs(row["bytes"] - 202.76e9) < 1e7 for row in with_disk["memory"])


@pytest.mark.parametrize("flag,values,words", [
    ("--gpu", ["gtx", "5090,0GiB", "5090,-1GiB", "5090,x", "nan"], "5090"),
    ("--ram", ["x", "0x6000", "-1x6000", "12x0", "nanx6000", "12x99999999999999999999", "12"], "12x6000"),
    ("--ram-size", ["x", "0GiB", "-1GiB", "nanGiB", "infGiB", "1e400GiB", "384", "9999999PiB"], "384GiB"),
    ("--cpu", ["x", "0", "-64", "64 cores, mmx", "nan cores", "99999999999999999999"], "64 cores, avx512"),
    ("--nvme", ["x", "7", "0GB/s", "-7GB/s", "infGB/s", "nan", "7GB/parsec"], "7GB/s"),
    ("--context", ["x", "0", "-1", "nan", "1.5", "1e6", "99999999999999999999", "128q"], "128k"),
    ("--batch", ["0", "-1", "4097"], "1..4096"),
], ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "")
def test_odd_hardware_is_refused_with_what_would_be_right(flag, values, words):
    for value in values:
        others = [] if flag == "--ram" else ["--ram", "12x6000"]
        error = refused("--model", "v4-flash", *others, f"{flag}={value}")
        assert flag in error and words in error, (value, error)


def test_flags_that_contradict_each_other():
    assert "none" in refused("--model", "v4-flash", *BOX, "--gpu", "none", "--gpu", "5090")
    assert "--ram" in refused("--model", "v4-flash", "--cpu", "64")
    assert "limit" in refused("--model", "demo", *BOX, "--context", "128k")
    for flag in ("--batch=x", "--batch=", "--batch=99999999999", "--batch=1.5", "--gpu=", "--ram=", "--context="):
        refused("--model", "v4-flash", flag, code=2)
    for flag in ("--context", "--gpu", "--ram", "--ram-size", "--cpu", "--nvme"):
        for empty in ([flag, ""], [f"{flag}="]):
            assert f"{flag}: a value is missing" in refused("--model", "demo", *empty)
    refused(code=2)


def test_run_says_what_was_foreseen_and_quiet_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no profile of this box
    _, err = run("run", "--model", DEMO, "--device", "none", "--prompt", "Hi", "--max-tokens", 4)
    line = next(line for line in err.splitlines() if line.startswith("predicted:"))
    assert re.search(r"prefill [\d.]+ t/s, decode [\d.]+ t/s", line) and re.search(r"measured: prefill \d+ %, decode \d+ % of it", line), line
    _, err = run("run", "--model", DEMO, "--device", "none", "--prompt", "Hi", "--max-tokens", 4, "--quiet")
    assert "predicted" not in err


def test_the_engine_plans_the_same_memory():
    _, err = run("--log-level", "debug", "run", "--model", DEMO, "--device", "simt", "--max-model-len", 4096, "--prompt", "Hi", "--max-tokens", 1, "--quiet")
    engine = dict(re.findall(r"^  (weights|dense weights) +([\d.]+) MiB", err, re.M))
    rows = plan("--gpu", "4090", *BOX, "--batch", 1, model=DEMO)["memory"]
    weights = sum(row["bytes"] for row in rows if row["tier"] == "host" and ("weights" in row["owner"] or row["owner"] in ("routed experts", "embedding")))
    dense = next(row["bytes"] for row in rows if row["tier"] == "device 0" and row["owner"] == "dense weights")
    assert weights / 2**20 == pytest.approx(float(engine["weights"]), rel=0.05) and dense / 2**20 == pytest.approx(float(engine["dense weights"]), rel=0.05)
