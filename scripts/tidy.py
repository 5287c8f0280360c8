"""clang-tidy over every source in the given folders: a few sources of a target at a time, joined into one file as a unity
build joins them, since most of its time goes into headers (four together take a third of what each alone takes). Joined, not
included: its analyzer looks at the main file only. Findings name the sources' own lines. Only the standard library."""
import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys


class Unit:
    """One file for clang-tidy: sources behind each other, and where each begins."""

    def __init__(self, path, sources):
        self.path = path
        self.begins = []  # (line before the source's first, source)
        text = ""
        for source in sources:
            self.begins.append((text.count("\n"), source))
            text += source.read_text()
        path.write_text(text)

    def in_its_source(self, match):
        """SOURCE:LINE for a match of this unit's PATH:LINE."""
        line = int(match[1])
        before, source = max(begin for begin in self.begins if begin[0] < line)
        return f"{source}:{line - before}"


def sources_of(entry):
    """The sources of a compile command: those that its unity file includes, or its own."""
    file = pathlib.Path(entry["file"])
    if "Unity" in file.parts:
        return [pathlib.Path(source) for source in re.findall(r'#include "(.*)"', file.read_text())]
    return [file]


def tidy(program, folder, unit):
    """(succeeded, what it printed) of clang-tidy over one unit."""
    # GCC's own warning flags mean nothing to it.
    command = [program, "--quiet", "--extra-arg=-Wno-unknown-warning-option", "-p", str(folder), str(unit.path)]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    noise = re.compile(r"^(\d+ warnings?( and \d+ errors?)? (generated|treated)|Suppressed|Use -header-filter)")
    lines = [line for line in run.stdout.splitlines(keepends=True) if not noise.match(line)]
    return run.returncode == 0, re.sub(re.escape(str(unit.path)) + r":(\d+)", unit.in_its_source, "".join(lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", default="clang-tidy")
    parser.add_argument("--build", type=pathlib.Path, required=True, help="folder with compile_commands.json of a unity build")
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    folders = [folder.resolve() for folder in args.folders]
    joined = (args.build / "tidy").resolve()
    joined.mkdir(exist_ok=True)
    units, commands = [], []
    for entry in json.loads((args.build / "compile_commands.json").read_text()):
        sources = [source for source in sources_of(entry) if any(folder in source.parents for folder in folders)]
        if not sources:
            continue
        path = joined / f"{len(units)}_{sources[0].name}"
        units.append(Unit(path, sources))
        commands.append({**entry, "file": str(path), "command": entry["command"].replace(entry["file"], str(path))})
    if not units:
        parser.error(f"no source of {args.build} lies in {', '.join(map(str, args.folders))}")
    (joined / "compile_commands.json").write_text(json.dumps(commands))
    units.sort(key=lambda unit: -unit.path.stat().st_size)  # the longest first, lest one core wait at the end
    failed = False
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for succeeded, printed in pool.map(lambda unit: tidy(args.program, joined, unit), units):
            print(printed, end="", flush=True)
            failed |= not succeeded
    print(f"{sum(len(unit.begins) for unit in units)} sources, {'findings above' if failed else 'no findings'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
