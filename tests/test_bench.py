"""The tables of bench.py: which runs it starts, and what it writes. Training itself is a stand-in.

    pytest tests/test_bench.py
"""
import csv
import json
import signal
import sys
import pytest
import bench
import train
from model import UserError

# Stands in for train.py and eval.py: notes how it was called, and writes a finished run's metrics.
STAND_IN = """
import json, pathlib, sys
script = pathlib.Path(sys.argv[0]).stem
options = dict(zip(sys.argv[1:], sys.argv[2:]))
folder = pathlib.Path(options.get("--out", sys.argv[1]))
with open(folder / "calls", "a") as file:
    file.write(f"{script} {' '.join(sys.argv[1:])}\\n")
if options.get("--loss") == "pacl":
    sys.exit("train.py: step 3: the loss is nan")
step = 800 if (folder / "old").exists() and script == "eval" else int(options.get("--steps", 5))
metrics = {"retrieval": {"i2t_r1": 50, "t2i_r1": 60 + 2 * int(options.get("--seed", 0))},
           "cost": {"steps": step, "ms_per_step": 80}, "about": {"step": step}}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run("objectives", ...) is the command, with the stand-ins -> its exit code."""
    for script in ("train.py", "eval.py"):
        (tmp_path / script).write_text(STAND_IN)
    monkeypatch.setattr(bench, "ROOT", tmp_path)

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        try:
            bench.main()
        except SystemExit as e:
            return e.code
        return 0
    before = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, before)


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def trained(folder, steps):
    """A run folder whose log ends at that step, without metrics."""
    folder.mkdir(parents=True)
    (folder / "last.pt").touch()
    with open(folder / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows([["step", "loss"], [steps, 1.5]])
    return folder


def test_each_row_and_seed_is_trained_and_the_table_written(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--seeds", "2", "--steps", "5", "--only", "sigma0", "clip", "--out", str(out)]
    assert run("objectives", *words, "--", "--width", "64") == 0
    assert calls(out / "sigma0-1") == [f"train --out {out}/sigma0-1 --steps 5 --resume "
                                       "--loss sparc --spare 0 --strangers 0 --local-weight 0.15 "
                                       "--sigma 0 --seed 1 --width 64"]
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| clip  ", "| sigma0"]
    assert "55.5 ± 0.7" in lines[2] and "2 seeds, 5 steps each" in lines[-1]
    assert capsys.readouterr().out.splitlines() == lines


def test_what_is_finished_is_skipped_and_what_was_stopped_goes_on(run, tmp_path):
    """Skipped: metrics of that many steps. Evaluated: the log ends there, but no metrics. Trained:
    all else, also where last.pt turns out to be older than the log."""
    finished, stopped = tmp_path / "clip-0", trained(tmp_path / "filip-0", 3)
    unevaluated, older = trained(tmp_path / "mgca-0", 5), trained(tmp_path / "sparc-0", 5)
    (older / "old").touch()
    finished.mkdir()
    metrics = {"about": {"step": 5}, "cost": {"steps": 5, "ms_per_step": 1}}
    (finished / "metrics.json").write_text(json.dumps(metrics))
    rows = ["clip", "filip", "mgca", "sparc"]
    assert run("objectives", "--seeds", "1", "--steps", "5", "--jobs", "3", "--out", str(tmp_path),
               "--only", *rows) == 0
    assert [[call.split()[0] for call in calls(folder)] for folder in
            (finished, stopped, unevaluated, older)] == [[], ["train"], ["eval"], ["eval", "train"]]
    assert "--resume" in calls(stopped)[0]


def test_a_run_that_fails_is_named_with_the_reason_and_the_others_go_on(run, tmp_path, capsys):
    assert run("objectives", "--seeds", "1", "--steps", "5", "--out", str(tmp_path), "--only",
               "pacl", "sparc") == 1
    said = capsys.readouterr()
    assert "pacl-0 failed: train.py: step 3: the loss is nan\n" in said.err
    assert "missing: pacl-0" in said.out
    rows = [line.split(" | ") for line in said.out.splitlines()[2:4]]
    assert rows[0][2].strip() == "-" and rows[1][2].strip() == "55.0"


def test_a_cell_is_mean_and_deviation_or_a_dash_or_empty():
    """A dash: no seed is finished. Empty: the objective has no such number."""
    seeds = [{"retrieval": {"i2t_r1": x, "t2i_r1": x + 2}, "cost": {"ms_per_step": 80.4}}
             for x in (60, 62, 64)]
    gap = {"alignment": {"local_gap": 1.234, "drop_k2": 8.06}, "faithfulness": {"k_pna": 90}}
    lines = bench.table({"clip": seeds, "sparc": [seeds[0] | gap], "mgca": []}).splitlines()
    assert len({len(line) for line in lines}) == 1
    heads, _, *rows = ([x.strip() for x in line.strip("|").split("|")] for line in lines)
    clip, sparc, mgca = (dict(zip(heads, row, strict=True)) for row in rows)
    empty = dict.fromkeys(bench.COLUMNS, "")
    assert clip == empty | {"": "clip", "seeds": "3", "R@1": "63.0 ± 2.0", "ms a step": "80"}
    assert sparc == empty | {"": "sparc", "seeds": "1", "R@1": "61.0", "local gap": "1.23",
                             "drop, k = 2": "8.1", "K-Pna": "90.0", "ms a step": "80"}
    assert mgca == dict.fromkeys(bench.COLUMNS, "-") | {"": "mgca", "seeds": "0"}


ROWS = bench.ALL_OBJECTIVES | bench.TABLE_5 | bench.TABLE_14


@pytest.mark.parametrize("row", ROWS)
def test_train_takes_the_options_of_each_row(monkeypatch, row):
    monkeypatch.setattr(sys, "argv", ["train.py", *ROWS[row].split()])
    args = train.options()
    if "--terms" in ROWS[row]:
        start = ROWS[row].index("--terms")
        assert all(term in ROWS[row][start:] for term in args.terms)


def test_the_last_component_is_the_full_pyramid(monkeypatch):
    """Table 5 ends with PyramidCLIP itself: the same options as the row of the objectives."""
    def parsed(row):
        monkeypatch.setattr(sys, "argv", ["train.py", *row.split()])
        return vars(train.options())
    assert parsed(bench.TABLE_5["+leff"]) == parsed(bench.ALL_OBJECTIVES["pyramid"])


def test_an_unknown_row_is_one_sentence():
    with pytest.raises(UserError, match="--only GT: the rows are peers"):
        bench.compare_runs(bench.options(["pyramid", "--only", "GT"]))
    args = bench.options(["pyramid", "--table14"])
    assert (args.seeds, args.out) == (1, "runs/bench-table14")


def test_cost_of_filip_table_5():
    """The shares of the full cost at 50% and 25% of the tokens are the paper's within 1.3."""
    clip, full = 1.31, 2.31
    whole = bench.filip_flops(256, 1.0)
    for keep, seconds in ((0.5, 1.61), (0.25, 1.39)):
        paper = (seconds - clip) / (full - clip)
        model = bench.filip_flops(256, keep) / whole
        assert 1 / 1.3 < model / paper < 1.3, keep
        one_sided = int(keep * 49) / 49
        assert one_sided / paper > 1.5, "reducing one side alone does not fit"
    # 49 patches and 77 words: 24 x 38 and 12 x 19 are kept; choosing them costs 1/24 of the whole
    assert bench.filip_flops(256, 0.5) / whole == pytest.approx(24 * 38 / 49 / 77 + 1 / 24)
    assert bench.filip_flops(256, 0.25) / whole == pytest.approx(12 * 19 / 49 / 77 + 1 / 24)
    assert bench.filip_flops(512, 1.0) == 2 * whole == 2 * 12 * 512 ** 2 * 8 * 49 * 77 * 256


def test_the_printed_table_5():
    rows = [line.replace("*", "").split() for line in bench.filip_table().splitlines()[1:]]
    paper, model, ratio = (list(map(float, x)) for x in list(zip(*rows))[5:8])
    assert paper == [1.54, 1.36, 1.0, 0.3, 0.08] and model == [2.0, 2.0, 1.0, 0.28, 0.1]
    assert all(1 / 1.3 < x < 1.3 for x in ratio[2:])
    received = [float(row[9].replace(",", "")) for row in rows]
    assert received[0] == 7 * 512 * (49 + 77) * 512 * 4 / 2 ** 20
    assert received[1] == received[0] / 2


def test_table_5_is_a_command(run, capsys):
    assert run("table5") == 0 and capsys.readouterr().out == bench.filip_table() + "\n"


def test_retrieval_is_measured(run, capsys):
    assert run("retrieval", "--pictures", "20", "--only", "filip") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert "20 pictures, 100 captions" in head
    loss, seconds, _, mb, *_ = row.split()
    assert loss == "filip" and float(seconds) >= 0 and int(mb.replace(",", "")) > 50
