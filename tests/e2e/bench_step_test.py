"""Parts of a step that `bench step` tells apart, and what it projects of a slice."""
import json
import re

import pytest

from program import DEMO, GOLDEN, SLOW, run


def bench_step(model, *flags):
    out, _ = run("bench", "step", "--model", model, "--device", "none", "-r", 2, *flags, "--json", "-")
    document = json.loads(out)
    return document, document["results"]


def check_parts(row):
    """Layers and head are all of a token's time, kinds of weights all of its bytes."""
    assert row["layers_seconds"] + row["head_seconds"] == pytest.approx(1 / row["tokens_per_second"])
    kinds = {kind["kind"]: kind for kind in row["kinds"]}
    assert list(kinds) == ["FP4 experts", "FP8 linears", "BF16 linears", "other", "head"]
    assert sum(kind["bytes_per_token"] for kind in kinds.values()) == pytest.approx(row["bytes_per_token"])
    assert row["head_share_of_bytes"] == pytest.approx(kinds["head"]["bytes_per_token"] / row["bytes_per_token"])
    assert sum(kind["seconds"] for kind in kinds.values()) < 1 / row["tokens_per_second"] and kinds["head"]["seconds"] < row["head_seconds"], row
    for kind in kinds.values():
        assert kind["bytes_per_second"] == pytest.approx(kind["bytes_per_token"] / kind["seconds"]) and 0 < kind["share_of_stream"] < 20, kind  # caches hold the model
    assert 0 < row["head_share_of_bytes"] < 1 and 0 < row["share_of_bound"] < 20 and 0 < row["share_of_bound_without_head"] < 20, row


def check_projection(row):
    p = row["projection"]
    assert p["seconds"] == pytest.approx(sum(t["layers"] * t["seconds"] for t in p["terms"]) + p["head_seconds"])
    assert p["tokens_per_second"] == pytest.approx(1 / p["seconds"]) and sum(t["layers"] for t in p["terms"]) == p["layers"]
    left, right = p["formula"].split(" = ")
    terms = re.findall(r"(\d+) \w+ x ([\d.]+) ms", left)
    head = re.findall(r"head ([\d.]+) ms", left)
    assert [int(n) for n, _ in terms] == [t["layers"] for t in p["terms"]]
    # Every number of the formula is rounded to half a microsecond.
    assert sum(int(n) * float(ms) for n, ms in terms) + sum(map(float, head)) == pytest.approx(float(right.removesuffix(" ms")), abs=0.0005 * (p["layers"] + 2)), p
    assert p["seconds"] == pytest.approx(float(right.removesuffix(" ms")) / 1e3, abs=1e-6)
    return p


def test_bench_step_tells_layers_head_and_kinds_of_weights_apart():
    document, rows = bench_step(DEMO, "-p", 32, "-n", 8, "-b", "1,4")
    assert len(rows) == 3 and document["layers_only"] is False
    for row in rows:
        check_parts(row)
        assert "projection" not in row, "it is whole"
    document, without = bench_step(DEMO, "-p", 32, "-n", 8, "-b", "1,4", "--layers-only")
    assert document["layers_only"] is True
    for row, whole in zip(without, rows, strict=True):
        assert row["tokens_per_second"] == pytest.approx(1 / row["layers_seconds"]) and row["head_seconds"] > 0
        assert [kind["kind"] for kind in row["kinds"]] == ["FP4 experts", "FP8 linears", "BF16 linears", "other"]
        assert row["bytes_per_token"] == pytest.approx(sum(kind["bytes_per_token"] for kind in row["kinds"]))
        assert row["bytes_per_token"] == pytest.approx(whole["bytes_per_token"] * (1 - whole["head_share_of_bytes"])), "the same tokens read the same weights"
        assert row["share_of_bound"] == row["share_of_bound_without_head"]


def test_bench_step_projects_a_slice_to_its_whole_model(tmp_path):
    run("synth", "--like", "demo", "--layers", 3, "--out", tmp_path / "three", "--quiet")
    _, rows = bench_step(tmp_path / "three", "-p", 16, "-n", 8)
    for row in rows:
        check_parts(row)
        p = check_projection(row)
        assert [(t["kind"], t["layers"], t["measured"]) for t in p["terms"]] == [("SWA", 2, True), ("CSA", 2, True), ("HCA", 2, False)], p
        swa, csa, hca = (t["seconds"] for t in p["terms"])
        assert 2 * swa + csa == pytest.approx(row["layers_seconds"]) and hca == pytest.approx(row["layers_seconds"] / 3)
        assert p["layers"] == 6 and p["head_seconds"] == row["head_seconds"]
    (row,) = bench_step(tmp_path / "three", "-p", 0, "-n", 8, "--layers-only")[1]
    assert check_projection(row)["head_seconds"] == 0 and "head" not in row["projection"]["formula"]
    out, _ = run("bench", "step", "--model", tmp_path / "three", "-p", 0, "-n", 4, "-r", 1)
    (line,) = (line for line in out.splitlines() if "projection" in line)
    assert line.startswith("tg4: projection to 6 layers: 2 SWA x ") and "(projected, not measured; HCA: none here" in line, line


def test_bench_step_projects_only_what_it_knows(tmp_path):
    run("synth", "--like", "demo", "--layers", 4, "--experts", 8, "--out", tmp_path / "few", "--quiet")
    _, rows = bench_step(tmp_path / "few", "-p", 8, "-n", 4, "-b", "1,2")
    assert ["projection" in row for row in rows] == [False, True, False], "of fewer experts several tokens choose fewer"
    assert [t["measured"] for t in check_projection(rows[1])["terms"]] == [True] * 3
    out, _ = run("bench", "step", "--model", tmp_path / "few", "-p", 8, "-n", 0, "-r", 1)
    assert "pp8: no projection to 6 layers: 8 tokens a step choose among 8 experts a layer, not 32" in out, out
    (row,) = bench_step(DEMO, "-p", 0, "-n", 4, "--full-layers", 43)[1]
    (term,) = check_projection(row)["terms"]
    assert (term["kind"], term["layers"]) == ("layers", 43) and term["seconds"] == pytest.approx(row["layers_seconds"] / 6)
    assert "projection" not in bench_step(DEMO, "-p", 0, "-n", 4, "--full-layers", 6)[1][0]
    for layers in (5, -1, 5000):
        _, err = run("bench", "step", "--model", DEMO, "--full-layers", layers, code=2)
        assert f"--full-layers {layers} is outside 6..4096" in err, err


@pytest.mark.skipif(SLOW, reason="minutes on the interpreter")
def test_bench_step_on_a_device_has_no_parts():
    flags = ("bench", "step", "--model", GOLDEN / "tiny-csa", "--device", "simt", "-p", 0, "-n", 2, "-r", 1)
    (row,) = json.loads(run(*flags, "--json", "-")[0])["results"]
    assert not {"layers_seconds", "head_seconds", "projection"} & set(row) and row["tokens_per_second"] > 0, row
    for flag in (("--layers-only",), ("--full-layers", 50)):
        _, err = run(*flags, *flag, code=2)
        assert flag[0] in err and "--device none" in err, err
