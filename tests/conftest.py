"""Fixtures of every Python test. The program under test: --program, or $THERMOCLINE_PROGRAM, or the release build's."""
import os
import shutil

import pytest


def pytest_addoption(parser):
    parser.addoption("--program", help="the thermocline to test; build/release/thermocline by default")


def pytest_configure(config):
    """Before the tests are imported: support/program.py reads the variable once."""
    if config.getoption("--program"):
        os.environ["THERMOCLINE_PROGRAM"] = os.path.abspath(config.getoption("--program"))


@pytest.fixture
def temporary_model(tmp_path):
    """temporary_model(source=DEMO): a copy of a model that a test may break; gone with the test's folder."""
    from program import DEMO

    copies = []

    def copy(source=DEMO):
        folder = tmp_path / f"model{len(copies)}"
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
        copies.append(folder)
        return folder

    yield copy
    for folder in copies:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start_server():
    """start_server(*flags, model=DEMO): a Server of this test alone; one that still runs at its end is killed."""
    from program import Server

    servers = []

    def start(*flags, **options):
        servers.append(Server(*flags, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="module")
def server():
    """The demo model's Server shared by the tests of a file. It has to end with exit code 0 after the last one."""
    from program import Server

    shared = Server()
    try:
        yield shared
        shared.stop()
    finally:
        shared.kill()
