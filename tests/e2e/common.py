"""What the end-to-end tests share: the program, the models, one way to run it."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

PROGRAM = sys.argv[1]
ROOT = pathlib.Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
GOLDEN = ROOT / "tests" / "golden"
TEXT = ROOT / "tests" / "data" / "text"
# Sanitizer builds are some ten times slower; CTest passes which build this is in the path of the program.
SLOW = any(name in PROGRAM for name in ("asan", "tsan"))


def run(*args, stdin="", code=0, timeout=600):
    """Runs the program and checks its exit code; returns stdout and stderr as text."""
    done = subprocess.run([PROGRAM, *map(str, args)], input=stdin, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == code, f"{args}: exit code {done.returncode}, expected {code}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return done.stdout, done.stderr


def jsonl(command, model, lines, code=0, *flags):
    out, _ = run(command, "--model", model, "--jsonl", *flags, stdin="".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), code=code)
    return [json.loads(line) for line in out.split("\n") if line]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def temporary_model(source=DEMO):
    """A copy of a model that a test may break."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="thermocline-e2e-")) / "model"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return folder


def main(tests):
    """Runs functions whose names begin with test_, in the order they were written."""
    failed = []
    for name, test in [(n, t) for n, t in tests.items() if n.startswith("test_")]:
        try:
            test()
            print(f"ok    {name}", flush=True)
        except Exception as error:  # noqa: BLE001: every failure is reported, none hides the next
            failed.append(name)
            print(f"FAILED {name}: {error.__class__.__name__}: {error}", flush=True)
    print(f"{len([n for n in tests if n.startswith('test_')]) - len(failed)} passed, {len(failed)} failed", flush=True)
    os._exit(1 if failed else 0)
