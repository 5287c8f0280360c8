"""Where settings come from, what help says, and what a wrong command line is told."""
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time

import pytest

from program import DEMO, PROGRAM, ROOT, run

# A setting of each kind with two good values: a number, a flag, a list, a size, a text.
SETTINGS = {"port": ("9001", "9002"), "think": ("true", "false"), "allowed-host": ("[a.example,b.example:80]", "[c.example]"), "kv-host-memory": ("1GiB", "2GiB"), "kv-disk-dir": ("/ours", "/theirs"),
            "log-level": ("warn", "error")}
SOURCES = ["flag", "env", "file", "default"]  # the first one there wins
DEFAULTS = {"port": "8000", "think": "false", "allowed-host": "[]", "kv-host-memory": "0", "kv-disk-dir": "", "log-level": "info"}


@pytest.fixture
def environment(monkeypatch):
    for name in [n for n in os.environ if n.startswith("THERMOCLINE_")]:
        monkeypatch.delenv(name)
    return monkeypatch


def printed(*args):
    """{setting: (value, source)} that `serve --print-config` says."""
    out, _ = run("serve", "--print-config=json", *args)
    return {name: (row["value"], row["source"]) for name, row in json.loads(out).items()}


def set_in(source, name, value, environment, path):
    """Sets it there; returns the flags that this takes."""
    if source == "flag":
        return [f"--{name}={one}" for one in value.strip("[]").split(",")]
    if source == "env":
        environment.setenv("THERMOCLINE_" + name.upper().replace("-", "_"), value.strip("[]"))
    if source == "file":
        toml = value if value in ("true", "false") or value.isdigit() else json.dumps(value.strip("[]").split(",") if value.startswith("[") else value)
        path.write_text(f"# of this test\n{name} = {toml}  # behind it\n")
        return ["--config", path]
    return []


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("first,second", list(itertools.combinations(SOURCES, 2)))
def test_the_stronger_source_wins(name, first, second, environment, tmp_path):
    file = tmp_path / "box.toml"
    says = {"flag": "flag", "env": "env THERMOCLINE_" + name.upper().replace("-", "_"), "file": f"file {file}", "default": "default"}
    for value, other in (SETTINGS[name], SETTINGS[name][::-1]):
        args = set_in(first, name, value, environment, file) + set_in(second, name, other, environment, file)
        assert printed(*args)[name] == (value, says[first]), args
    assert run("serve", "--print-config=json")[0]  # and nothing needs a model


def test_a_variable_set_to_nothing_is_not_set(environment, tmp_path):
    environment.setenv("THERMOCLINE_PORT", "")
    assert printed()["port"] == ("8000", "default")
    assert printed(*set_in("file", "port", "9001", environment, tmp_path / "f"))["port"][0] == "9001"


def test_sections_are_of_one_command_and_win(environment, tmp_path):
    file = tmp_path / "box.toml"
    file.write_text('threads = 3\nprompt = "for run alone"\nmax_num_seqs = 4\n[serve]\nmax-num-seqs = 5\n[run]\nthreads = 9\n[bench.step]\nchunk = 7\n')
    settings = printed("--config", file)
    assert settings["threads"][0] == "3" and settings["max-num-seqs"][0] == "5" and "prompt" not in settings, settings
    out, _ = run("run", "--config", file, "--print-config=json")
    assert json.loads(out)["threads"]["value"] == "9" and json.loads(out)["prompt"]["value"] == "for run alone", out
    out, _ = run("bench", "step", "--config", file, "--print-config=json")
    assert json.loads(out)["chunk"]["value"] == "7", out


def test_the_documented_file_is_taken_as_it_stands(environment, tmp_path):
    block = (ROOT / "docs/configuration.md").read_text().split("```toml\n")[1].split("```")[0]
    file = tmp_path / "box.toml"
    file.write_text(block)
    settings = printed("--config", file)
    assert {name: settings[name][0] for name in ("threads", "port", "max-num-seqs", "allowed-host", "think", "kv-host-memory")} == {
        "threads": "32", "port": "8080", "max-num-seqs": "4", "allowed-host": "[box.lan,box.lan:8080]", "think": "true", "kv-host-memory": "8GiB"}, settings
    out, _ = run("bench", "step", "--config", file, "--print-config=json")
    assert json.loads(out)["repetitions"]["value"] == "5", out


def test_toml_means_what_it_says(environment, tmp_path):
    file = tmp_path / "box.toml"
    for text, name, value in [("[ serve ]  # ours\nport = 9001 # behind", "port", "9001"), ('served-model-name = "a#b"  # c', "served-model-name", "[a#b]"), (r'kv-disk-dir = "a\"b\\c"', "kv-disk-dir", 'a"b\\c'),
                              (r"kv-disk-dir = 'a\b'", "kv-disk-dir", r"a\b"), ("allowed-host = [  # two\n 'a', # one\n\n 'b',\n]  # end\nport = 1", "allowed-host", "[a,b]"), ("serve.port = 9002", "port", "9002"),
                              ('"port" = 9003', "port", "9003"), ("port=9004\r\nthink=true\r\n", "port", "9004"), ("host = localhost", "host", "localhost"), ("kv-disk-dir = ''", "kv-disk-dir", "")]:
        file.write_bytes(text.encode())
        assert printed("--config", file)[name] == (value, f"file {file}"), text


def test_a_flag_is_true_or_false_and_nothing_else(environment, tmp_path):
    file = tmp_path / "box.toml"
    for value in ("2", "1", "0", "1.5", "-1", "[true]", "'true'", "on", "True", "t"):
        file.write_text(f"think = {value}\n")
        _, err = run("serve", "--config", file, "--print-config", code=2)
        assert f"{file}:1: think: " in err and "true" in err, (value, err)
    for value in ("2", "1.5", "on", "yes"):
        assert "--think" in run("serve", f"--think={value}", "--print-config", code=2)[1], value
        environment.setenv("THERMOCLINE_THINK", value)
        assert "THERMOCLINE_THINK" in run("serve", "--print-config", code=2)[1], value
        environment.delenv("THERMOCLINE_THINK")
    assert printed("--think=false")["think"] == ("false", "flag")


def test_a_value_is_never_the_next_option(environment):
    assert printed("--kv-disk-dir=", "--think")["kv-disk-dir"] == ("", "flag")
    assert printed("--kv-disk-dir=", "--think")["think"] == ("true", "flag")
    assert printed("--kv-disk-dir=--think")["kv-disk-dir"] == ("--think", "flag")
    for args, words in [(["--kv-disk-dir", "--think"], "--kv-disk-dir=--think"), (["--alias", "--think"], "--alias lacks its value"), (["--host", "--port=1"], "--host=--port=1"), (["--host", "--log-level", "info"], "--host lacks its value"),
                        (["--port=", "--think"], "a number is missing"), (["--think="], "--think lacks its value")]:
        _, err = run("serve", *args, "--print-config", code=2)
        assert words in err and "`thermocline serve --help`" in err, (args, err)
    assert printed("--kv-disk-dir", "--no-such-option")["kv-disk-dir"] == ("--no-such-option", "flag")
    assert "--log-level lacks its value" in run("--log-level", "--log-format=text", "version", code=2)[1]


def test_flags_that_may_stand_bare_take_no_other_word(environment):
    for flag in ("--flash-attn", "-fa", "--enable-chunked-prefill", "--enable-prefix-caching"):
        for value in ([], *([word] for word in ("on", "off", "auto", "0", "1", "true", "false"))):
            settings = printed(flag, *value, "--max-num-seqs", 3)
            assert settings["max-num-seqs"] == ("3", "flag") and settings["model"] == ("", "default"), (flag, value)
        assert printed(flag, DEMO)["model"] == (str(DEMO), "flag"), flag
    assert printed("--flash-attn=on", DEMO)["model"] == (str(DEMO), "flag")


def test_a_bad_file_is_named(environment, tmp_path):
    file = tmp_path / "box.toml"
    for text, *words in [("prot = 1", "prot", "did you mean port?"), ("port = x", "port: ", "= x"), ("[sevre]\nport = 1", "no command [sevre]"), ("[run]\nport = 1", "run.port"), ("port = 1\nport = 2", "port"),
                         ("port = 1\nhost = '::1'\nport = 2", "port is set twice"), ("think = maybe", "think", "maybe"), ("think = [true, false]", "think"), ("port = [1, 2]", "port"), ("port 9000", "port 9000"),
                         ('served-model-name = "a\\b"', "box.toml:1", "single quotes"), ("port = 1 2", "box.toml:1", "1 2"), ("port = '1' 2", "box.toml:1", "'2' is too much"), ("port =", "box.toml:1", "a value is missing"), ("[serve\nport = 1", "box.toml:1", "section"), ("[serve] port", "'port' is too much"),
                         ("\nallowed-host = [\n'a',\n", "box.toml:2", "list"), ("host = '::1", "box.toml:1", "string"), ("max-num-seqs = -", "max-num-seqs"),
                         ("kv-host-memory = -1", "kv-host-memory", "not negative"), ("", "empty")]:
        file.write_text(text + ("\n" if text else ""))
        for command in ("--print-config", "--quiet"):
            _, err = run("serve", DEMO, "--config", file, command, code=2)
            assert str(file) in err and all(word in err for word in words), (text, err)
    for missing in (tmp_path / "absent.toml", tmp_path):
        assert str(missing) in run("serve", DEMO, "--config", missing, code=2)[1]
    file.write_bytes(random.Random(1).randbytes(4096))
    run("serve", DEMO, "--config", file, code=2)


def test_a_bad_variable_is_named_and_only_where_it_matters(environment):
    environment.setenv("THERMOCLINE_PORT", "x")
    _, err = run("serve", DEMO, code=2)
    assert "THERMOCLINE_PORT" in err and "x" in err, err
    assert run("run", DEMO, "--prompt", "Hi", "--max-tokens", 2, "--quiet")[1] == ""  # has no port
    assert printed("--port", 1)["port"] == ("1", "flag")
    environment.delenv("THERMOCLINE_PORT")
    environment.setenv("THERMOCLINE_THINK", "perhaps")
    assert "THERMOCLINE_THINK" in run("serve", DEMO, code=2)[1]
    environment.delenv("THERMOCLINE_THINK")
    environment.setenv("THERMOCLINE_MAX_NUM_SEQ", "3")
    environment.setenv("THERMOCLINE_QQQQQQ", "3")
    _, err = run("run", DEMO, "--prompt", "Hi", "--max-tokens", 2, "--quiet")
    assert "warning: THERMOCLINE_MAX_NUM_SEQ is set" in err and "did you mean THERMOCLINE_MAX_NUM_SEQS?" in err and err.count("warning:") == 2, err


def test_a_server_takes_its_settings_from_everywhere(environment, tmp_path, start_server):
    file = tmp_path / "box.toml"
    file.write_text('served-model-name = "from the file"\nmax-num-seqs = 3\n')
    environment.setenv("THERMOCLINE_SERVED_MODEL_NAME", "from the environment")
    server = start_server("--config", file, "--max-model-len", 512)
    told = [server.process.stdout.readline() for _ in range(3)]
    assert "context 512 tokens, 3 sequences at once" in told[0] and "no API keys" in told[1] and told[2].startswith(f"  curl http://127.0.0.1:{server.port}/v1/chat/completions -H"), told
    (model,) = server.client.models.list().data
    assert model.id == "from the environment" and model.max_model_len == 512, model
    server.stop()


def test_print_config_says_what_the_model_brings(environment, temporary_model):
    folder = temporary_model()
    (folder / "generation_config.json").write_text('{"temperature": 0.25}')
    settings = printed("--model", folder)
    assert settings["temperature"] == ("0.25", "the model's generation_config.json") and settings["top-p"] == ("1", "default"), settings
    settings = printed("--model", folder, "--no-generation-config")
    assert settings["temperature"] == ("1", "default"), settings
    out, _ = run("serve", folder, "--print-config")
    assert [line.split() for line in out.splitlines() if line.startswith("port ")] == [["port", "8000", "default"]], out


def test_other_spellings_are_taken_with_a_hint(environment):
    for given, name, value in [(["-c", 512], "max-model-len", "512"), (["--ctx-size", 512], "max-model-len", "512"), (["-np", 3], "max-num-seqs", "3"), (["--parallel", 3], "max-num-seqs", "3"), (["-m", DEMO], "model", str(DEMO)),
                               (["-t", 2], "threads", "2"), (["--alias", "x"], "served-model-name", "[x]"), (["--no-enable-prefix-caching"], "no-prefix-cache", "true")]:
        out, err = run("serve", "--print-config=json", *given)
        assert json.loads(out)[name] == {"value": value, "source": "flag"} and err.count("\n") == 1 and f"is called --{name} here" in err, (given, err)
    for given in (["--cont-batching"], ["--enable-prefix-caching"], ["-fa", "on"]):
        assert run("serve", "--print-config", *given)[1].startswith("hint: --"), given
    for given, word in [(["-ngl", 99], "--experts-on-gpu"), (["--n-gpu-layers=99"], "--experts-on-gpu"), (["--gpu-memory-utilization", 0.9], "--gpu-memory"), (["--tensor-parallel-size", 2], "--device cuda:N")]:
        for command in ("serve", "run"):
            assert word in run(command, DEMO, *given, code=2)[1], given
    assert "--max-model-len" in run("serve", DEMO, "-c", 5, "--max-model-len", 6, code=2)[1]
    everything = run("serve", "--help=all")[0] + run("run", "--help")[0]
    assert "--ctx-size" not in everything and "--n-gpu-layers" not in everything


def test_help_is_short_and_whole_and_of_a_group(environment):
    short, whole, network = (run("serve", flag)[0] for flag in ("--help", "--help=all", "--help=network"))
    names = {text: [line.split()[0].split(",")[-1] for line in text.splitlines() if line.startswith("  -")] for text in (short, whole, network)}
    assert 15 <= len(names[short]) <= 25 < len(names[whole]) and set(names[short]) < set(names[whole]), names
    assert "--port" in names[network] and "--max-num-seqs" not in names[network] and "--help=all" in short, network
    for name in printed():
        if name not in ("temperature", "top-p", "top-k"):
            assert f"--{name}" in names[whole] and f"(Env:THERMOCLINE_{name.upper().replace('-', '_')})" in whole, name
    assert "network" in run("serve", "--help=netwrok", code=2)[1]


def test_a_wrong_word_is_told_the_right_one():
    for args, word in [(["serve", DEMO, "--prot", 1], "did you mean --port?"), (["srve"], "did you mean serve?"), (["bench", "stpe"], "did you mean step?"), (["serve", "--modle", DEMO], "did you mean --model?"), (["run", "--log-levle", "info"], "did you mean --log-level?"),
                       (["serve", DEMO, "--xyzzyxyzzy"], "there is no --xyzzyxyzzy"), (["serve", DEMO, "another"], "'another'"), (["run", DEMO, "--max-tokns=3"], "--max-tokens?")]:
        _, err = run(*args, code=2)
        assert word in err and err.count("error:") == 1, err


@pytest.mark.parametrize("args", [("serve", DEMO, "--port", ""), ("serve", DEMO, "--port="), ("serve", DEMO, "--max-queue", ""), ("run", "--model", DEMO, "--prompt", "a", "--temperature", ""), ("run", DEMO, "--threads", ""), ("bench", "step", "--model", DEMO, "-p", "")])
def test_an_empty_number_is_none(args):
    _, err = run(*args, code=2)
    name = next(a for a in args if str(a).startswith("-") and a != "--model" and a != "--prompt").strip("=")
    assert name in err and ("a number is missing" in err or "could not convert" in err.lower() or "required" in err), err


def test_secrets_are_never_printed(environment, tmp_path):
    file = tmp_path / "box.toml"
    file.write_text('admin-key = "from-the-file-1234"\n')
    environment.setenv("THERMOCLINE_API_KEY", "from-the-environment-1234")
    for format in ("text", "json"):
        out, err = run("serve", f"--print-config={format}", "--config", file)
        assert "1234" not in out + err and out.count("(set)") == 2 and "env THERMOCLINE_API_KEY" in out and f"file {file}" in out, out
    assert "1234" not in run("serve", DEMO, "--config", file, "--api-key", "given-1234", "--max-num-seqs", "0", code=2)[1]


def test_a_key_of_the_environment_is_asked_for(environment, start_server):
    environment.setenv("THERMOCLINE_API_KEY", "a-key-of-this-test")
    server = start_server()
    asked = lambda headers: server.request("GET", "/v1/models", headers=headers)[0]
    assert asked({}) == 401 and asked({"authorization": "Bearer a-key-of-this-test"}) == 200
    server.stop()


def test_a_hangup_reads_the_log_level_again(environment, tmp_path, start_server, capfd):
    def says(text):
        end = time.monotonic() + 30
        got = ""
        while text not in got and time.monotonic() < end:
            time.sleep(0.02)
            got += capfd.readouterr().err
        assert text in got
        return got

    file = tmp_path / "box.toml"
    file.write_text("log-level = 'warn'\n")
    server = start_server("--config", file)
    assert "info" not in capfd.readouterr().err
    for text, answer in (("log-level = 'info'\n", "info log level info"), ("[serve]\nlog-level = 'debug'\n", "info log level debug"),
                         ("log-level = 'loud'\n", "error the log level stays as it was: " + str(file)), ("prot = 1\n", "error the log level stays"), ("", "error the log level stays"),
                         ("threads = 2\n", "info log level info")):
        file.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        says(answer)
    server.stop()
    server = start_server("--config", file, "--log-level", "info")
    file.write_text("log-level = 'error'\n")
    server.process.send_signal(signal.SIGHUP)
    says("info log level info")  # a flag is stronger


def test_a_pipe_as_the_configuration_is_not_waited_for(environment, tmp_path, start_server, capfd):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("threads = 2\n",))
    writer.start()
    server = start_server("--config", pipe)
    writer.join()
    server.process.send_signal(signal.SIGHUP)
    end = time.monotonic() + 30
    said = ""
    while "no file to be read again" not in said and time.monotonic() < end:
        time.sleep(0.02)
        said += capfd.readouterr().err
    assert "no file to be read again" in said and server.request("GET", "/health")[0] == 200
    server.stop()


@pytest.mark.parametrize("flag", ["--drain-seconds", "--watchdog-seconds", "--request-timeout", "--queue-timeout"])
def test_times_have_an_end(flag):
    _, err = run("serve", DEMO, flag, 10**10, code=2)
    assert flag in err and "1000000" in err, err
