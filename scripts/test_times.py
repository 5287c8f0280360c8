"""Where the minutes of scripts/test.sh went: the slowest tests of every preset from the JUnit files that ctest wrote, a
table of the stages, and with --minutes a failure when all of it took longer. Only the standard library."""
import argparse
import pathlib
import sys
import xml.etree.ElementTree

SLOWEST = 15


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
    parser.add_argument("--stages", type=pathlib.Path, required=True, help="name and seconds of each stage, by tabs")
    parser.add_argument("--build", type=pathlib.Path, default=pathlib.Path("build"), help="folder of the presets' builds")
    parser.add_argument("--minutes", type=float, help="the budget of all stages together")
    args = parser.parse_args()
    stages = read_stages(args.stages)
    notes = {}
    for name, _ in stages:
        kind, _, preset = name.partition(" ")
        if kind == "test":
            notes[name] = report_tests(preset, args.build / preset / "test_times.xml")
    total = sum(seconds for _, seconds in stages)
    print("\n| stage | minutes | |\n| --- | ---: | --- |")
    for name, seconds in stages:
        print(f"| {name} | {clock(seconds)} | {notes.get(name, '')} |")
    budget = f"budget {args.minutes:g} minutes" if args.minutes else ""
    print(f"| all | {clock(total)} | {budget} |", flush=True)
    if args.minutes and total > 60 * args.minutes:
        sys.exit(f"over the budget: {total / 60:.1f} minutes of {args.minutes:g}. Make room among the slowest tests above, or on a "
                 "slower machine set TC_TEST_MINUTES.")


if __name__ == "__main__":
    main()
