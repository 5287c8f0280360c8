"""lm-eval's local-completions on a task of ours: its log-likelihoods are those of `thermocline logits`."""
import json
import os
import subprocess
import sys

import numpy
import pytest
from safetensors.numpy import load_file

from program import DEMO, jsonl, run

ITEMS = [
    ("The capital of Norway is", ["Oslo", "Lima", "Rome"], 0),
    ("The capital of Peru is", ["Oslo", "Lima", "Rome"], 1),
    ("The opposite of hot is", ["cold", "tall"], 0),
    ("In the beginning God created", ["the heaven and the earth", "a small village", "seven"], 0),
    ("And it came to pass", ["in those days", "hot tools"], 0),
    ("1, 2, 3, 4,", ["5", "9", "2"], 0),
    ("There was once a kind", ["cat who lived in a small village", "of the"], 0),
    ("The LORD is my", ["shepherd", "weather", "opposite"], 0),
]
TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """[item][choice] of (log-likelihood, greedy), computed without a server."""
    folder = tmp_path_factory.mktemp("logits")

    def score(context, choice):
        begin, whole = (line["ids"] for line in jsonl("tokenize", DEMO, [{"text": context}, {"text": f"{context} {choice}"}]))
        (folder / "ids").write_text(" ".join(map(str, whole)))
        run("logits", "--model", DEMO, "--ids", folder / "ids", "--out", folder / "out")
        logits = load_file(folder / "out")["logits"].astype(numpy.float64)[len(begin) - 1:-1]
        top = logits.max(axis=1)
        logprobs = logits - (top + numpy.log(numpy.exp(logits - top[:, None]).sum(axis=1)))[:, None]
        picked = logprobs[numpy.arange(len(logits)), whole[len(begin):]]
        return picked.sum(), bool((picked == logprobs.max(axis=1)).all())

    return [[score(context, choice) for choice in choices] for context, choices, _ in ITEMS]


@pytest.mark.parametrize("tokenizer, flags", [
    ("tokenizer_backend=remote", ["--batch_size", 2]),
    (f"tokenizer_backend=huggingface,tokenizer={DEMO},num_concurrent=4", []),
], ids=["remote_in_batches", "folder_at_once"])
def test_log_likelihoods(server, tmp_path, expected, tokenizer, flags):
    lines = [json.dumps({"question": question, "choices": choices, "answer": answer}) for question, choices, answer in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(TASK % (tmp_path / "items.jsonl"))
    arguments = f"model=demo,base_url=http://127.0.0.1:{server.port}/v1/completions,{tokenizer}"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "tiny", "--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", *flags]
    done = subprocess.run(list(map(str, command)), env={**os.environ, **offline}, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = sorted((json.loads(line) for path in (tmp_path / "out").rglob("samples_tiny_*.jsonl") for line in path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    scored = [[(float(logprob), greedy == "True") for ((logprob, greedy),) in sample["resps"]] for sample in samples]
    assert [[greedy for _, greedy in item] for item in scored] == [[greedy for _, greedy in item] for item in expected]
    assert any(greedy for item in scored for _, greedy in item) and not all(greedy for item in scored for _, greedy in item)
    for item, wanted in zip(scored, expected, strict=True):
        assert [logprob for logprob, _ in item] == pytest.approx([logprob for logprob, _ in wanted], abs=1e-4)
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    best = [max(range(len(item)), key=lambda i: item[i][0]) for item in expected]
    right = sum(choice == answer for choice, (_, _, answer) in zip(best, ITEMS))
    assert results["results"]["tiny"]["acc,none"] == pytest.approx(right / len(ITEMS))
