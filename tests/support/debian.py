"""The Debian package, and Debian trees to install it in: a bare one for chroot, and one whose systemd boots in a container."""
import contextlib
import pathlib
import shutil
import subprocess
import time

from program import DEMO, PROGRAM, ROOT

BUILD = pathlib.Path(PROGRAM).parent
DEPLOY = ROOT / "deploy"


def sh(*command, **options):
    """Runs a command that has to succeed; returns what it printed."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


def make_package(folder):
    """The package of the build under test."""
    sh("cpack", "-G", "DEB", "--config", BUILD / "CPackConfig.cmake", "-B", folder, cwd=BUILD)
    (package,) = folder.glob("thermocline_*.deb")
    return package


class Tree:
    """A minimal Debian 12 in a folder, from the mirror that this machine's apt uses. Needs root and debootstrap."""

    def __init__(self, folder, packages=()):
        mirror = sh("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm").split("\n")[0]
        sh("debootstrap", "--variant=minbase", *(["--include=" + ",".join(packages)] if packages else []), "bookworm", folder, mirror)
        self.root = folder

    def run(self, *command, **options):
        return sh("chroot", self.root, "env", "DEBIAN_FRONTEND=noninteractive", *command, **options)

    def install(self, package):
        shutil.copy(package, self.root / "tmp")
        return self.run("apt-get", "install", "-y", "--no-install-recommends", f"/tmp/{package.name}")

    def copy(self, folder):
        copy = object.__new__(Tree)
        copy.root = folder
        sh("cp", "-a", self.root, folder)
        return copy

    @contextlib.contextmanager
    def mounted(self):
        """With /proc and /sys, as a container has them."""
        sh("mount", "-t", "proc", "proc", self.root / "proc")
        sh("mount", "-t", "sysfs", "-o", "ro", "sysfs", self.root / "sys")
        try:
            yield
        finally:
            sh("umount", self.root / "sys")
            sh("umount", self.root / "proc")

    def add_demo(self, folder="srv/models/demo"):
        shutil.copytree(DEMO, self.root / folder, copy_function=shutil.copyfile, dirs_exist_ok=True)


class Booted:
    """A Tree with systemd as its first process. `run` is inside; the network is this machine's."""

    def __init__(self, tree):
        self.container = subprocess.Popen(
            ["systemd-nspawn", "--register=no", "--keep-unit", "-D", tree.root, "-b", "--console=pipe"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.leader = None
        self.wait_for(self.is_up)

    def is_up(self):
        children = pathlib.Path(f"/proc/{self.container.pid}/task/{self.container.pid}/children").read_text().split()
        self.leader = children[0] if children else None
        return self.leader and "active" == subprocess.run(["nsenter", "-t", self.leader, "-a", "systemctl", "is-active", "multi-user.target"], capture_output=True, text=True).stdout.strip()

    def wait_for(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.container.poll() is None, "in vain"
            time.sleep(0.1)

    def run(self, *command, **options):
        return sh("nsenter", "-t", self.leader, "-a", *command, **options)

    def show(self, unit, name):
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def close(self):
        if self.container.poll() is None:
            subprocess.run(["nsenter", "-t", self.leader or "0", "-a", "systemctl", "poweroff"], capture_output=True)
            try:
                self.container.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.container.kill()
                self.container.wait()
