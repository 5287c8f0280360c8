"""docs/api.md names tests that exist, one for each requirement; and what it says of the sources is so."""
import re

import pytest

from program import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
NAMED = re.compile(r"`([\w/]+\.(?:cc|py)|fuzz)?::(\w+)`")
HOSTILE = "e2e/hostile_test.py"


def rows():
    """[(line number, cells)] of the page's tables, without their heads."""
    found = []
    lines = PAGE.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and not line.startswith("| ---") and not lines[i + 1 : i + 2] == [re.sub(r"[^|]+", " --- ", line)]:
            found.append((i + 1, [cell.strip() for cell in line.strip("|").split(" | ")]))
    return found


def named_in(cell):
    """[(file, test)]; `::test` is of the file before it."""
    found, file = [], None
    for of, test in NAMED.findall(cell):
        file = of or file
        assert file, f"no file before ::{test}"
        found.append((file, test))
    return found


def defined_in(file):
    """Names of the tests that a file under tests/ defines."""
    if file == "fuzz":
        return re.findall(r"^tc_fuzz\((\w+) ", (ROOT / "tests" / "CMakeLists.txt").read_text(), re.M)
    path = ROOT / "tests" / file
    if not path.exists():
        return []
    pattern = r"^def (test_\w+)\(" if file.endswith(".py") else r"^TEST(?:_F|_P)?\(\w+,\s*(\w+)\)"
    return re.findall(pattern, path.read_text(), re.M)


def test_every_test_that_is_named_exists():
    named = {pair for _, cells in rows() for pair in named_in(cells[-1])}
    assert len(named) > 300
    known = {file: set(defined_in(file)) for file, _ in named}
    assert [f"{file}::{test}" for file, test in sorted(named) if test not in known[file]] == []


def test_every_test_that_is_named_is_run():
    cmake = (ROOT / "tests" / "CMakeLists.txt").read_text()
    files = {file for _, cells in rows() for file, _ in named_in(cells[-1])} - {"fuzz"}
    clients = re.search(r"foreach\(client (.*)\)", cmake)[1].split()
    assert [file for file in sorted(files) if file not in cmake and file not in {f"clients/{name}_test.py" for name in clients}] == []


def test_every_row_has_a_test_or_says_not_yet():
    kept = rows()
    assert len(kept) > 250
    for number, cells in kept:
        assert NAMED.search(cells[-1]) or cells[-1].startswith("not yet"), f"docs/api.md:{number} shows nothing"
    assert "`" not in NAMED.sub("", "".join(cells[-1] for _, cells in kept if NAMED.search(cells[-1]))), "a test is spelled otherwise"


def hostile_numbers():
    """{test: its numbers} of tests/e2e/hostile_test.py, by its name or by its parameters."""
    source = (ROOT / "tests" / HOSTILE).read_text()
    numbers, before = {}, 0
    for match in re.finditer(r"^def (test_\w+)\(", source, re.M):
        name = match[1]
        in_name = re.match(r"test_(\d+)(?:_(to|and)_(\d+))?", name)
        if in_name:
            first, last = int(in_name[1]), int(in_name[3] or in_name[1])
            numbers[name] = set(range(first, last + 1)) if in_name[2] == "to" else {first, last}
        else:
            numbers[name] = {int(n) for n in re.findall(r"\((\d+), (?:b?\"|b'|\"\")", source[before : match.start()])}
        before = match.end()
    return numbers


def test_every_hostile_input_has_its_row():
    numbers = hostile_numbers()
    table = [cells for _, cells in rows() if len(cells) == 4 and cells[0].isdigit()]
    assert [int(cells[0]) for cells in table] == list(range(1, 87))
    for number, *_, shown in table:
        tests = [test for file, test in named_in(shown) if file == HOSTILE]
        assert all(int(number) in numbers[test] for test in tests), (number, tests)
        assert tests or int(number) > 70, number


# --- what only the sources can show ---


def sources(*folders):
    return {path.relative_to(ROOT).as_posix(): path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".cc", ".h", ".cu", ".cuh")}


def test_no_timer_reads_the_wall_clock():
    """It may jump. What it says goes to clients and logs: the Date header, `created`, the time of a line."""
    wall = re.compile(r"system_clock|high_resolution_clock|gettimeofday|CLOCK_REALTIME|\btime\((?:nullptr|NULL|0)\)")
    told = {"runtime/server/http/admission.cc", "runtime/server/api/generation.cc", "runtime/server/access_log.cc", "runtime/cli/serve.cc"}
    found = {path: len(wall.findall(text)) for path, text in sources("runtime", "scheduler", "kernels_cpu", "kernels_gpu").items() if wall.search(text)}
    assert found == dict.fromkeys(sorted(told), 1), "another reading of the wall clock"


def test_weights_are_not_mapped():
    """A mapped file that is cut kills its reader. Mapped are the program itself, and the file that `perplexity` compares with."""
    users = {path for path, text in sources("runtime").items() if re.search(r"MappedFile::open", text)} - {"runtime/io/file.cc"}
    assert users == {"runtime/engine/cache_identity.cc", "runtime/cli/perplexity.cc"}


@pytest.mark.parametrize("says, file, is_so", [
    ("header 16 KiB and 100 lines", "http/limits.h", "max_header_bytes = 16 << 10, max_headers = 100"), ("target 8 KiB", "http/limits.h", "max_target_bytes = 8 << 10"),
    ("body 32 MiB", "http/limits.h", "max_body_bytes = 32 << 20"), ("4,096 connections", "http/limits.h", "max_connections = 4096"), ("64 requests a key", "keys.h", "max_requests = 64"),
    ("depth 64", "../io/json_document.cc", "kMaxDepth = 64"), ("10,000 keys", "../io/json_document.h", "keys = 10'000"),
])
def test_caps_are_those_of_the_page(says, file, is_so):
    assert says in PAGE and is_so in (ROOT / "runtime" / "server" / file).read_text()
