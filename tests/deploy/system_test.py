"""The package on Debian 12: in a bare tree, by the Dockerfile's steps, under systemd, on an old CPU. Downloads some 100 MB."""
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from debian import DEPLOY, Booted, Tree, make_package, sh
from program import DEMO, ROOT

PORT = 18613
KEY = "0123456789abcdef" * 4
ASK = {"messages": [{"role": "user", "content": "What is the capital of Norway?"}], "temperature": 0}


def answer(port=PORT, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(ASK).encode(), {"content-type": "application/json", **headers})
    return json.loads(urllib.request.urlopen(request, timeout=60).read())["choices"][0]["message"]["content"]


def health(port=PORT):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.1)


@pytest.fixture(scope="module", autouse=True)
def may_it_run():
    assert os.geteuid() == 0, "chroot and debootstrap need root"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    yield Tree(folder / "bare")
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def serving(tree, argv, up, user="root"):
    """The server in a tree; it ends well."""
    with tree.mounted():
        server = subprocess.Popen(["chroot", f"--userspec={user}", tree.root, *argv])
        try:
            wait_until(up)
            yield
        finally:
            server.terminate()
            assert server.wait(timeout=60) == 0


def test_it_serves_on_a_bare_debian(bare, package, tmp_path):
    tree = bare.copy(tmp_path / "tree")
    tree.install(package)
    tree.add_demo()
    assert subprocess.run(["chroot", tree.root, "which", "python3", "systemctl"], capture_output=True).stdout == b""
    assert "Oslo" in tree.run("thermocline", "run", "--model", "/srv/models/demo", "--temperature", "0", "--prompt", ASK["messages"][0]["content"])
    with serving(tree, ["thermocline", "serve", "--model", "/srv/models/demo", "--port", str(PORT)], lambda: health() == 200):
        assert answer() == "The capital of Norway is Oslo."
    tree.run("apt-get", "purge", "-y", "thermocline")
    assert not (tree.root / "etc/thermocline").exists() and not (tree.root / "usr/bin/thermocline").exists()


def test_the_dockerfiles_steps(bare, package, tmp_path):
    """Its second stage by hand: the RUN lines, then the program as its user, and the health check."""
    tree = bare.copy(tmp_path / "tree")
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    stage = text[text.rindex("\nFROM"):]
    shutil.copy(package, tree.root / "tmp/thermocline.deb")  # COPY --from=build
    for step in re.findall(r"^RUN (.*)", stage, re.M):
        tree.run("sh", "-c", step)
    user = re.search(r"^USER (.*)", stage, re.M)[1]
    argv = json.loads(re.search(r"^ENTRYPOINT (.*)", stage, re.M)[1]) + json.loads(re.search(r"^CMD (\[\"--model.*)", stage, re.M)[1])
    secret = tree.root / argv[argv.index("--api-key-file") + 1].lstrip("/")
    secret.parent.mkdir(parents=True)
    secret.write_text(f"alice:{KEY}\n")
    secret.chmod(0o600)
    os.chown(secret, 8000, 8000)
    check = json.loads(re.search(r"^HEALTHCHECK.*? CMD (\[.*\])", stage, re.M)[1])
    tree.add_demo("model")
    def healthy():
        return subprocess.run(["chroot", f"--userspec={user}", tree.root, *check], capture_output=True).returncode == 0
    assert not healthy() and health(8000) == 0, "nobody serves yet"
    with serving(tree, argv, healthy, user):
        assert answer(8000, authorization=f"Bearer {KEY}") == "The capital of Norway is Oslo."
    assert (tree.root / "var/lib/thermocline/kv/index").stat().st_uid == 8000


@pytest.fixture(scope="module")
def booted(bare, package, tmp_path_factory):
    tree = bare.copy(tmp_path_factory.mktemp("systemd") / "tree")
    tree.run("apt-get", "install", "-y", "--no-install-recommends", "systemd-sysv", "dbus", "procps")
    tree.install(package)
    tree.add_demo()
    settings = tree.root / "etc/thermocline/thermocline.toml"
    settings.write_text(settings.read_text().replace("DeepSeek-V4-Flash", "demo").replace("port = 8000", f"port = {PORT}"))
    system = Booted(tree)
    system.root = tree.root
    yield system
    system.close()
    shutil.rmtree(tree.root, ignore_errors=True)


def drop_in(booted, text):
    folder = booted.root / "etc/systemd/system/thermocline.service.d"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.conf").write_text(text)
    booted.run("systemctl", "daemon-reload")


def test_the_unit_serves_in_its_sandbox(booted):
    assert booted.show("thermocline", "ActiveState") == "inactive", "installed, not started: it needs a model"
    booted.run("systemctl", "enable", "--now", "thermocline")  # comes back when READY=1 came
    assert health() == 200 and answer() == "The capital of Norway is Oslo."
    assert booted.show("thermocline", "StatusText") == f"serving demo on http://127.0.0.1:{PORT}"
    pid = booted.show("thermocline", "MainPID")
    status = booted.run("cat", f"/proc/{pid}/status")
    assert re.search(r"^NoNewPrivs:\s1$", status, re.M) and re.search(r"^Seccomp:\s2$", status, re.M) and re.search(r"^CapBnd:\s0+$", status, re.M)
    uid = int(re.search(r"^Uid:\s(\d+)", status, re.M)[1])
    assert 61184 <= uid <= 65519, "a dynamic user"
    kv = booted.root / "var/lib/private/thermocline/kv"
    assert kv.stat().st_uid == uid and kv.stat().st_mode & 0o777 == 0o700
    assert "io_uring" in booted.run("ls", "-l", f"/proc/{pid}/fd"), "the disk is read without threads"
    log = booted.run("journalctl", "-u", "thermocline", "-o", "cat")
    assert "warn" not in log and '"path":"/v1/chat/completions"' in log, log


def test_a_calibration_is_the_services_own(booted):
    """The command of docs/deploy.md."""
    text = (ROOT / "docs/deploy.md").read_text()
    command = shlex.split(re.search(r"`(systemd-run .* thermocline calibrate)`", text)[1])
    booted.run(*command, "--quick")
    booted.run("systemctl", "restart", "thermocline")
    (profile,) = (booted.root / "var/cache/private/thermocline").glob("machine-*.json")
    assert str(profile.stat().st_uid) == booted.run("ps", "-o", "uid=", "-p", booted.show("thermocline", "MainPID")).strip() != "0"
    assert "predicted:" in booted.run("journalctl", "-u", "thermocline", "-o", "cat")


def test_a_server_that_hangs_is_restarted(booted):
    drop_in(booted, "[Service]\nWatchdogSec=2\nRestartSec=0\n")
    booted.run("systemctl", "restart", "thermocline")
    pid = booted.show("thermocline", "MainPID")
    time.sleep(5)
    assert booted.show("thermocline", "MainPID") == pid, "it feeds the watchdog"
    booted.run("kill", "-STOP", pid)
    booted.wait_for(lambda: booted.show("thermocline", "NRestarts") == "1" and booted.show("thermocline", "ActiveState") == "active")
    assert booted.show("thermocline", "MainPID") != pid and answer() == "The capital of Norway is Oslo."
    assert "Watchdog timeout" in booted.run("journalctl", "-u", "thermocline", "-o", "cat")
    drop_in(booted, "")


def test_wrong_settings_fail_the_start_and_are_not_tried_again(booted):
    settings = booted.root / "etc/thermocline/thermocline.toml"
    good = settings.read_text()
    for wrong, status in ((good.replace("port =", "prot ="), "2"), (good.replace("models/demo", "models/none"), "3")):
        settings.write_text(wrong)
        assert subprocess.run(["nsenter", "-t", booted.leader, "-a", "systemctl", "restart", "thermocline"]).returncode != 0
        time.sleep(1)
        assert booted.show("thermocline", "ActiveState") == "failed" and booted.show("thermocline", "ExecMainStatus") == status
    settings.write_text(good)
    booted.run("systemctl", "restart", "thermocline")
    assert health() == 200


def test_keys_by_the_example(booted):
    """keys.conf: what root keeps at mode 0600 the service reads, and nobody else."""
    keys = booted.root / "etc/thermocline/keys"
    keys.write_text(f"alice:{KEY}\n")
    keys.chmod(0o600)
    drop_in(booted, (DEPLOY / "keys.conf").read_text())
    booted.run("systemctl", "restart", "thermocline")
    with pytest.raises(urllib.error.HTTPError) as refused:
        answer()
    assert refused.value.code == 401 and health() == 200
    assert answer(authorization=f"Bearer {KEY}") == "The capital of Norway is Oslo."
    assert KEY not in booted.run("ps", "-eo", "args")
    booted.run("systemctl", "reload", "thermocline")
    assert booted.show("thermocline", "ActiveState") == "active" and "keys are read again" in booted.run("journalctl", "-u", "thermocline", "-o", "cat")
    drop_in(booted, "")
    booted.run("systemctl", "restart", "thermocline")
    assert answer() == "The capital of Norway is Oslo."


def test_an_upgrade_drains_and_restarts(booted, package):
    booted.run("systemctl", "restart", "thermocline")
    settings = (booted.root / "etc/thermocline/thermocline.toml").read_text()
    pid = booted.show("thermocline", "MainPID")
    shutil.copy(package, booted.root / "root/upgrade.deb")
    booted.run("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--force-confold", "-i", "/root/upgrade.deb")
    assert booted.show("thermocline", "MainPID") != pid and health() == 200
    assert (booted.root / "etc/thermocline/thermocline.toml").read_text() == settings
    assert "draining" in booted.run("journalctl", "-u", "thermocline", "-o", "cat")


def test_remove_stops_and_purge_wipes(booted):
    booted.run("apt-get", "remove", "-y", "thermocline")
    assert health() == 0 and (booted.root / "var/lib/private/thermocline/kv").exists()
    booted.run("dpkg", "--purge", "thermocline")
    for gone in ("var/lib/private/thermocline", "var/cache/private/thermocline", "etc/systemd/system/multi-user.target.wants/thermocline.service"):
        assert not (booted.root / gone).exists() and not (booted.root / gone).is_symlink(), gone


def test_an_old_cpu_runs_it(package, tmp_path):
    """x86-64-v2 by emulation; the control shows that the emulated CPU has no AVX."""
    sh("dpkg-deb", "-x", package, tmp_path)
    (tmp_path / "avx.c").write_text('int main(){__asm__ volatile("vxorps %%ymm0,%%ymm0,%%ymm0":::"xmm0");return 0;}')
    sh("gcc", "-o", tmp_path / "avx", tmp_path / "avx.c")
    emulated = ["qemu-x86_64", "-cpu", "Nehalem"]
    assert subprocess.run([*emulated, tmp_path / "avx"], capture_output=True).returncode != 0
    said = sh(*emulated, tmp_path / "usr/bin/thermocline", "run", "--model", DEMO, "--temperature", "0", "--prompt", ASK["messages"][0]["content"])
    assert "The capital of Norway is Oslo." in said
