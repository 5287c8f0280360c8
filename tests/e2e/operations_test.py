"""What scripts and people around the program rely on: exit codes, the manual, completions, launched clients."""
import gzip
import http.server
import json
import os
import pathlib
import shutil
import socket
import subprocess
import threading

import pytest

from program import DEMO, PROGRAM, run


@pytest.fixture
def docs(tmp_path):
    run("docs", "--out", tmp_path / "docs")
    return tmp_path / "docs"


# ---- Errors.


def test_exit_codes_say_what_kind_of_error_it_was(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "trace").write_text("no trace")
    for code, *args in [(0, "version"), (0, "serve", "--help"), (1, "trace", "info", tmp_path / "trace"), (2, "run", DEMO, "--prompt", "x", "--numerics", "fp8"), (2, "serve", DEMO, "--port", "x"), (2,),
                        (3, "run", tmp_path / "none", "--prompt", "x"), (3, "serve", tmp_path / "absent", "--port", 0), (3, "tokenize", tmp_path / "absent"), (4, "run", DEMO, "--prompt", "x", "--device", "simt", "--gpu-memory", "1MiB"),
                        (5, "run", DEMO, "--prompt", "x", "--device", "cuda:16"), (6, "serve", DEMO, "--host", "192.0.2.1")]:
        run(*args, code=code)
    help_text = run("--help")[0]
    assert "Exit codes:" in help_text and all(f"{code} " in help_text for code in (0, 1, 2, 3, 4, 5, 6, 130)), help_text


def test_a_setting_from_elsewhere_is_named_when_it_is_wrong(monkeypatch):
    monkeypatch.setenv("THERMOCLINE_NUMERICS", "fp8")
    _, err = run("run", DEMO, "--prompt", "x", code=2)
    assert "unknown numerics 'fp8'" in err and "--numerics (env THERMOCLINE_NUMERICS)" in err, err


def test_a_port_in_use_says_by_whom():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _, err = run("serve", DEMO, "--port", taken.getsockname()[1], code=6)
    name = pathlib.Path("/proc/self/comm").read_text().strip()
    assert f"stop {name} (pid {os.getpid()})" in err, err


def test_a_folder_that_is_no_model_says_what_is_meant(temporary_model, tmp_path):
    folder = temporary_model()
    near = str(folder)[:-1] + "s" + str(folder)[-1]
    assert f"did you mean {folder}?" in run("run", near, "--prompt", "x", code=3)[1]
    _, err = run("run", tmp_path, "--prompt", "x", code=3)
    assert "config.json, model.safetensors.index.json, tokenizer.json are missing" in err and "it holds model0" in err and f"did you mean {folder}?" in err, err
    assert "give the folder" in run("run", folder / "config.json", "--prompt", "x", code=3)[1]
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    _, err = run("serve", folder, "--port", 0, code=3)
    assert "config.json, tokenizer.json are missing" in err and "model-00001-of-00002.safetensors" in err, err


def test_a_gguf_is_no_checkpoint(tmp_path):
    """No reader of GGUF files: whatever is in one, nothing of it is read."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 4096)
    assert "give the folder of the checkpoint" in run("run", tmp_path / "model.gguf", "--prompt", "x", code=3)[1]
    assert "it holds model.gguf" in run("run", tmp_path, "--prompt", "x", code=3)[1]


def test_a_public_address_wants_keys():
    for host in ("0.0.0.0", "::"):
        _, err = run("serve", DEMO, "--host", host, "--port", 0, code=2)
        assert "--api-key-file" in err and "--insecure-no-auth" in err, err
    _, err = run("serve", DEMO, "--host", "0.0.0.0", "--port", 0, "--insecure-no-auth", "--max-model-len", 1 << 40, code=2)
    assert "--insecure-no-auth" not in err, "whoever insists is served"


def test_version_is_data_too():
    found = json.loads(run("version", "--json")[0])
    assert found["version"] and found["compiler"].startswith("GCC") and found["cuda_built"] == bool(found["cuda"]), found
    assert found["cpu"]["isa"] in ("scalar", "avx2", "avx512", "amx"), found
    assert found["version"] in run("version")[0] and found["cpu"]["isa"] in run("version")[0]


# ---- Manual and completions.


def commands():
    """{"serve": its help, "bench step": ..}, found by asking for help as people do."""
    found = {}

    def visit(words):
        out = run(*words, "--help=all")[0]
        found[" ".join(words)] = out
        if "\nSubcommands:\n" in out:
            for line in out.split("\nSubcommands:\n")[1].splitlines():
                if line.startswith("  ") and line[2] != " ":
                    visit(words + [line.split()[0]])
    visit([])
    return found


def flags_in(help_text):
    return {name for line in help_text.splitlines() if line.startswith("  -") for name in line.split()[0].split(",") if name.startswith("--")}


def test_the_manual_has_every_option_and_no_warning(docs):
    page = (docs / "thermocline.1").read_text()
    assert page == run("docs", "man")[0]
    if shutil.which("groff"):
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", docs / "thermocline.1"], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "" and len(done.stdout) > 10_000, done.stderr
    sections = {part.split('"', 1)[0].replace("\\-", "-"): part for part in page.split('.SS "')[1:]}
    found = commands()
    assert "EXIT STATUS" in page and len(found) > 20 and "bench step" in found, found.keys()
    shared = sections["Options of every command"]
    assert "--log\\-level" in shared.replace("\\-\\-", "--"), shared
    for words, text in found.items():
        section = sections[words or "Options of every command"]
        for name in flags_in(text) - {"--help"}:
            assert "\\fB" + name.replace("-", "\\-") + "\\fR" in section + shared, (words, name)
    assert "THERMOCLINE_MAX_NUM_SEQS" in sections["serve"] and "ctx" not in page


def bash_completes(script, line):
    """What bash offers at the end of this line, after the space where there is one."""
    words = line.split(" ")
    program = f'source {script}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _thermocline; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "--norc", "-c", program, "bash", *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return set(done.stdout.split())


def test_bash_completes_commands_and_options(docs):
    script = docs / "thermocline.bash"
    found = commands()
    top = {words for words in found if words and " " not in words}
    assert bash_completes(script, "thermocline ") == top and bash_completes(script, "thermocline se") == {"serve", "selfcheck"}
    for words, text in found.items():
        offered = bash_completes(script, f"thermocline {words} --".replace("  ", " "))
        assert offered == flags_in(text), words
    assert bash_completes(script, "thermocline serve --max-num") == {"--max-num-seqs", "--max-num-batched-tokens"}
    assert bash_completes(script, "thermocline bench st") == {"step"}
    assert bash_completes(script, "thermocline serve --model --po") == set()  # a value: bash completes files
    assert "--port" in bash_completes(script, "thermocline --log-level debug serve models/demo --po")


@pytest.mark.parametrize("shell,file", [("zsh", "_thermocline"), ("fish", "thermocline.fish")])
def test_other_shells_read_their_completions(docs, shell, file):
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")
    done = subprocess.run([shell, "-n", docs / file], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    if shell == "fish":
        for line, word in (("thermocline se", "serve"), ("thermocline serve --max-num-s", "--max-num-seqs"), ("thermocline bench st", "step")):
            done = subprocess.run(["fish", "--no-config", "-c", f"source {docs / file}; complete -C '{line}'"], capture_output=True, text=True)
            assert word in done.stdout.split(), (line, done)


# ---- Clients.


class Health(http.server.BaseHTTPRequestHandler):
    """A server that notes what it is asked, and answers as the test says."""
    answer = (200, {"status": "ok"})
    asked = []

    def do_GET(self):
        type(self).asked.append(self.path)
        self.protocol_version = "HTTP/1.1"
        status, body = type(self).answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def health():
    Health.answer, Health.asked = (200, {"status": "ok"}), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def clients(tmp_path, monkeypatch):
    """Fake clients first in PATH: each prints its environment and arguments as JSON."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("claude", "codex", "opencode"):
        (folder / name).write_text("#!/usr/bin/env python3\nimport json, os, sys\nprint(json.dumps({'args': sys.argv[1:], 'env': dict(os.environ)}))\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("THERMOCLINE_API_KEY", raising=False)
    return folder


def test_claude_is_launched_with_its_variables(health, clients, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "of somebody else")
    monkeypatch.setenv("THERMOCLINE_API_KEY", "k'ey")
    started = json.loads(run("launch", "claude", "--url", health + "/v1/", "--model", "m", "--", "-p", "[hi] there", "--", "--url")[0])
    env = started["env"]
    assert started["args"] == ["-p", "[hi] there", "--", "--url"], started["args"]
    assert env["ANTHROPIC_BASE_URL"] == health and env["ANTHROPIC_AUTH_TOKEN"] == "k'ey" and "ANTHROPIC_API_KEY" not in env
    assert env["ANTHROPIC_MODEL"] == env["ANTHROPIC_SMALL_FAST_MODEL"] == "m" and env["CLAUDE_CODE_ATTRIBUTION_HEADER"] == "0" and int(env["API_TIMEOUT_MS"]) >= 600_000
    assert Health.asked == ["/health"], "the only request"


def test_codex_and_opencode_are_launched(health, clients, monkeypatch):
    monkeypatch.setenv("THERMOCLINE_API_KEY", 'a"b')
    started = json.loads(run("launch", "codex", "--url", health, "--", "exec", "hi")[0])
    settings = dict(pair.split("=", 1) for flag, pair in zip(started["args"], started["args"][1:]) if flag == "-c")
    assert json.loads(settings["model_providers.thermocline.base_url"]) == health + "/v1" and json.loads(settings["model_providers.thermocline.wire_api"]) == "responses"
    assert started["env"][json.loads(settings["model_providers.thermocline.env_key"])] == 'a"b' and started["args"][-2:] == ["exec", "hi"]
    assert json.loads(settings["model_provider"]) == "thermocline"
    started = json.loads(run("launch", "opencode", "--url", health, "--model", "m")[0])
    config = json.loads(started["env"]["OPENCODE_CONFIG_CONTENT"])
    provider = config["provider"]["thermocline"]
    assert provider["options"] == {"baseURL": health + "/v1", "apiKey": 'a"b'} and config["model"] == "thermocline/m" and "m" in provider["models"], config


def test_a_dry_run_is_a_shell_that_does_the_same(health, clients, monkeypatch):
    monkeypatch.setenv("THERMOCLINE_API_KEY", "se cret")
    for client in ("claude", "codex", "opencode"):
        lines = run("launch", client, "--url", health, "--model", "it's", "--dry-run", "--", "two words")[0]
        assert "se cret" not in lines and Health.asked == []
        done = subprocess.run(["sh", "-ec", lines], capture_output=True, text=True)
        by_hand, ours = json.loads(done.stdout), json.loads(run("launch", client, "--url", health, "--model", "it's", "--", "two words")[0])
        Health.asked.clear()
        for found in (by_hand, ours):
            found["env"] = {name: value for name, value in found["env"].items() if name not in ("_", "PWD", "OLDPWD", "SHLVL")}
        assert by_hand == ours, client


def test_launch_says_why_it_does_not(health, clients, monkeypatch):
    assert "no server answers at http://127.0.0.1:1 " in run("launch", "claude", "--url", "http://127.0.0.1:1", code=1)[1]
    Health.answer = (503, {"error": {"message": "the model is loading (40 %)"}})
    assert "is not ready: the model is loading (40 %)" in run("launch", "claude", "--url", health, code=1)[1]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "says nothing" in run("launch", "claude", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}", code=1, timeout=30)[1]
    for url in ("ftp://box", "http://", "http://a b", "http://box:x", "http://box/path", "http://user@box"):
        assert "--url" in run("launch", "claude", "--url", url, code=2)[1], url
    run("launch", "vim", code=2)
    monkeypatch.setenv("PATH", "/nonexistent")
    Health.answer = (200, {})
    assert "claude is not installed" in run("launch", "claude", "--url", health, code=1)[1]


def test_launch_finds_a_real_server(clients, start_server):
    server = start_server()
    started = json.loads(run("launch", "claude", "--url", f"localhost:{server.port}")[0])
    assert started["env"]["ANTHROPIC_BASE_URL"] == f"http://localhost:{server.port}"
    server.stop()


def test_an_installed_tree_has_the_documents(tmp_path):
    build = pathlib.Path(PROGRAM).parent
    if not (build / "cmake_install.cmake").exists() or not shutil.which("cmake"):
        pytest.skip("the program is not in its build folder")
    subprocess.run(["cmake", "--install", build, "--prefix", tmp_path], check=True, capture_output=True)
    for file in ("bin/thermocline", "share/man/man1/thermocline.1.gz", "share/bash-completion/completions/thermocline", "share/zsh/site-functions/_thermocline", "share/fish/vendor_completions.d/thermocline.fish"):
        assert (tmp_path / file).stat().st_size > 1000, file
    assert gzip.decompress((tmp_path / "share/man/man1/thermocline.1.gz").read_bytes()).decode() == run("docs", "man")[0]
