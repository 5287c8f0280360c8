"""The Debian package of this build, as dpkg and systemd's tools see it, without installing it."""
import json
import re
import shlex
import shutil
import subprocess

import pytest

from debian import BUILD, make_package, sh
from program import DEMO, PROGRAM, ROOT, run


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def tree(package, tmp_path_factory):
    """The package's files."""
    folder = tmp_path_factory.mktemp("tree")
    sh("dpkg-deb", "-x", package, folder)
    return folder


def test_every_file_is_where_debian_wants_it(package, tree):
    lines = [line.split(maxsplit=5) for line in sh("dpkg-deb", "-c", package).splitlines()]
    files = {line[5]: (line[0], line[1]) for line in lines if not line[5].endswith("/")}
    assert all(owner == "root/root" for _, owner in files.values())
    assert files["./usr/bin/thermocline"][0] == "-rwxr-xr-x"
    doc = "./usr/share/doc/thermocline/"
    for name in ("./etc/thermocline/thermocline.toml", "./usr/lib/systemd/system/thermocline.service", doc + "copyright", doc + "changelog.gz", doc + "deploy.md", doc + "examples/nginx.conf", doc + "examples/thermocline.json"):
        assert files[name][0] == "-rw-r--r--", name
    others = [name for name in files if not re.match(r"\./(etc/thermocline/|usr/(bin/thermocline$|lib/systemd/system/|share/(doc/thermocline/|man/|bash-completion/|zsh/|fish/)))", name)]
    assert others == [], "nothing else: no tests, headers, libraries"
    assert "not stripped" not in sh("file", tree / "usr/bin/thermocline")


def test_what_it_says_of_itself(package):
    fields = sh("dpkg-deb", "-f", package)
    depends = re.search(r"^Depends: (.*)", fields, re.M)[1]
    for library in ("libc6 (>= 2.3", "libstdc++6", "libhwloc15", "libpcre2-8-0", "libsodium23", "liburing2"):
        assert library in depends
    assert "python" not in depends and "systemd" not in depends, "it runs without"
    version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True).stdout.strip()
    assert f"Version: {version}\n" in fields and "Package: thermocline\n" in fields
    cuda = "tc_kernels_cuda" in (BUILD / "build.ninja").read_text()
    assert ("has CUDA kernels" in fields, "has no CUDA kernels" in fields) == (cuda, not cuda)


def test_the_control_scripts(package, tmp_path):
    sh("dpkg-deb", "-e", package, tmp_path)
    assert (tmp_path / "conffiles").read_text() == "/etc/thermocline/thermocline.toml\n"
    for script, argument in (("postinst", "abort-upgrade"), ("prerm", "upgrade"), ("postrm", "upgrade")):
        assert (tmp_path / script).stat().st_mode & 0o777 == 0o755
        sh("sh", "-n", tmp_path / script)
        sh("sh", tmp_path / script, argument)  # nothing to do, and no failure without systemd


def test_lintian_has_no_word_but_these(package):
    if not shutil.which("lintian"):
        pytest.skip("no lintian here")
    known = ("bogus-mail-host", "no-manual-page")
    said = subprocess.run(["lintian", "--allow-root", "--tag-display-limit", "0", package], capture_output=True, text=True).stdout
    assert [line for line in said.splitlines() if line[:2] in ("E:", "W:") and not any(tag in line for tag in known)] == []


def test_the_unit_is_one_that_systemd_takes(tree, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    unit = (tree / "usr/lib/systemd/system/thermocline.service").read_text()
    assert "/usr/bin/thermocline serve" in unit
    there = tmp_path / "thermocline.service"
    there.write_text(unit.replace("/usr/bin/thermocline", PROGRAM))
    said = sh("systemd-analyze", "verify", there)
    assert "thermocline" not in said, said
    exposure = re.search(r"Overall exposure level for thermocline.service: ([\d.]+)", sh("systemd-analyze", "security", "--offline=true", "--no-pager", there))
    assert float(exposure[1]) < 2


def test_the_example_configuration_serves(start_server, tree, tmp_path):
    """Every option of it is one of this program: with the demo model, another port and folder. A flag wins over it."""
    text = (tree / "etc/thermocline/thermocline.toml").read_text()
    text = re.sub(r"(?m)^model = .*", f'model = "{DEMO}"', text).replace("/var/lib/thermocline/kv", str(tmp_path / "kv")).replace("port = 8000", "port = 0")
    text = re.sub(r"(?m)^# ([a-z-]+ = )", r"\1", text).replace("131072", "4096").replace('"16GiB"', '"256MiB"')  # those that are only shown too
    (tmp_path / "all.toml").write_text(text)
    process = subprocess.Popen([PROGRAM, "serve", "--config", tmp_path / "all.toml", "--max-model-len", "2048"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("serving deepseek-v4-flash on http://127.0.0.1:")
        assert "context 2048 tokens, 16 sequences" in process.stdout.readline()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
        process.stdout.close()


def test_a_wrong_option_in_the_configuration_is_named(tmp_path):
    (tmp_path / "wrong.toml").write_text(f'[serve]\nmodel = "{DEMO}"\nprot = 8000\n')
    done = subprocess.run([PROGRAM, "serve", "--config", tmp_path / "wrong.toml"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "prot" in done.stderr


def test_install_under_a_prefix(tmp_path):
    """/usr has its settings in /etc, which are never overwritten; other prefixes have their own."""
    def install(prefix, dest):
        sh("cmake", "--install", BUILD, "--prefix", prefix, env={"DESTDIR": str(dest), "PATH": "/usr/bin:/bin:/usr/local/bin"})
    install("/usr", tmp_path)
    settings = tmp_path / "etc/thermocline/thermocline.toml"
    assert settings.exists() and (tmp_path / "usr/bin/thermocline").exists()
    settings.write_text("mine")
    install("/usr", tmp_path)
    assert settings.read_text() == "mine"
    install("/opt/thermocline", tmp_path)
    assert (tmp_path / "opt/thermocline/etc/thermocline/thermocline.toml").exists()


def test_only_kernels_are_built_for_more_than_the_baseline():
    """The package runs on any x86-64: -m flags are those of the units that are chosen at the start."""
    flagged = set()
    for unit in json.loads((BUILD / "compile_commands.json").read_text()):
        if "/tests/" in unit.get("output", unit["command"].split(" -o ")[1].split()[0]) or unit["command"].split(" -o ")[1].startswith("tests/"):
            continue
        flags = re.findall(r" (-m[a-z0-9=-]+)", unit["command"])
        assert not any(flag.startswith(("-march", "-mtune", "-mcpu")) for flag in flags), unit["file"]
        if flags:
            flagged.add(unit["file"].removeprefix(f"{ROOT}/"))
    assert flagged and all(re.match(r"kernels_cpu/(avx2|avx512|amx)/", file) for file in flagged), flagged


def test_another_build_lets_kv_of_this_one_lie(start_server, tmp_path, monkeypatch, tree):
    """An upgrade begins with cold caches and the same answers; whoever goes back finds what was there."""
    import program

    prompt = {"prompt": "And it came to pass in those days that " * 20, "temperature": 0, "max_tokens": 8}

    def ask(which):
        monkeypatch.setattr(program, "PROGRAM", str(which))
        server = start_server("--kv-disk-dir", tmp_path / "kv")
        reply = server.request("POST", "/v1/completions", prompt)[2]
        server.stop()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"], reply["choices"][0]["text"]

    packaged = tree / "usr/bin/thermocline"  # stripped: another file
    cold, text = ask(PROGRAM)
    assert cold == 0
    assert ask(PROGRAM)[0] > 100 and ask(PROGRAM)[1] == text
    assert ask(packaged) == (0, text)
    assert ask(packaged)[0] > 100 and ask(PROGRAM)[0] > 100
    modes = {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "kv").iterdir()}
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700 and set(modes.values()) == {0o600}, modes


def test_the_boxes_of_the_document_are_the_planners():
    """docs/deploy.md: every line under a command is one that it prints, in that order."""
    text = (ROOT / "docs/deploy.md").read_text()
    blocks = re.findall(r"^\$ thermocline (plan .*)\n((?:  .*\n)+)", text, re.M)
    assert len(blocks) == 3
    for command, lines in blocks:
        printed = iter(run(*shlex.split(command))[0].splitlines())
        for line in lines.splitlines():
            assert line in printed, (command, line)
