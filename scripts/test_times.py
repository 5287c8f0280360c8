"""Where the minutes of scripts/test.sh went: the slowest tests of every preset from the JUnit files that ctest wrote, a
table of the stages, and with --minutes a failure when all of it took longer. Only the standard library.

The budget is for a quiet machine of two Zen 4 cores. A slower or busier one gets as much more as it takes for a fixed piece
of work (--fixed-work, measured between the stages), at most half: ratios of one run mean more than minutes."""
import argparse
import multiprocessing
import os
import pathlib
import statistics
import sys
import time
import xml.etree.ElementTree

SLOWEST = 15
FIXED_WORK_SECONDS = 0.11  # of fixed_work() on the machine the budget is for


def read_stages(path):
    """[(name, seconds)] of a file with one `name<tab>seconds` a line."""
    stages = []
    for line in path.read_text().splitlines():
        name, seconds = line.split("\t")
        stages.append((name, float(seconds)))
    return stages


def read_tests(path):
    """[(seconds, name)] of a JUnit file, the slowest first; what was not run is left out."""
    cases = xml.etree.ElementTree.parse(path).getroot().iter("testcase")
    return sorted(((float(case.get("time")), case.get("name")) for case in cases if case.get("status") == "run"), reverse=True)


def look_ups(_):
    begin = time.perf_counter()
    table = {}
    for i in range(1_000_000):
        table[i * 2654435761 % 262144] = i
    return time.perf_counter() - begin


def fixed_work():
    """Mean seconds of integer arithmetic and look-ups in a table beyond L2, on all cores at once as tests and builds are."""
    with multiprocessing.Pool() as pool:
        return statistics.mean(pool.map(look_ups, range(4 * os.cpu_count()), chunksize=1))


def clock(seconds):
    return f"{int(seconds) // 60:3d}:{int(seconds) % 60:02d}"


def report_tests(preset, junit):
    """Prints the slowest tests and returns a line for the table: how many, and their sum."""
    tests = read_tests(junit)
    total = sum(seconds for seconds, _ in tests)
    print(f"\n{preset}: the slowest of {len(tests)} tests")
    for seconds, name in tests[:SLOWEST]:
        print(f"  {seconds:7.1f} s  {seconds / max(total, 1e-9):4.0%}  {name}")
    return f"{len(tests)} tests, one after the other {clock(total).strip()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fixed-work", action="store_true", help="do the fixed piece of work, print its seconds, and no more")
    what.add_argument("--stages", type=pathlib.Path, help="name and seconds of each stage, by tabs; 'fixed work' is no stage")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build"), help="folder of the presets' builds")
    parser.add_argument("--minutes", type=float, help="the budget of all stages together")
    args = parser.parse_args()
    if args.fixed_work:
        print(f"{fixed_work():.4f}")
        return
    lines = read_stages(args.stages)
    stages = [(name, seconds) for name, seconds in lines if name != "fixed work"]
    notes = {}
    for name, _ in stages:
        kind, _, preset = name.partition(" ")
        if kind == "test":
            notes[name] = report_tests(preset, args.build / preset / "test_times.xml")
    total = sum(seconds for _, seconds in stages)
    print("\n| stage | minutes | |\n| --- | ---: | --- |")
    for name, seconds in stages:
        print(f"| {name} | {clock(seconds)} | {notes.get(name, '')} |")
    if not args.minutes:
        print(f"| all | {clock(total)} | |", flush=True)
        return
    slower = statistics.mean(seconds for name, seconds in lines if name == "fixed work") / FIXED_WORK_SECONDS
    budget = args.minutes * min(1.5, max(1.0, slower))
    print(f"| all | {clock(total)} | budget {budget:.0f} minutes: {args.minutes:g}, on a machine that takes {slower:.2f} times as long |", flush=True)
    if total > 60 * budget:
        sys.exit(f"over the budget: {total / 60:.1f} minutes of {budget:.0f}. Make room among the slowest tests above, or set TC_TEST_MINUTES.")


if __name__ == "__main__":
    main()
