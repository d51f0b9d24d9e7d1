"""The training loop: bad input, resuming, signals, divergence, full disks, devices, launchers, and
1 process = 2.

    pytest tests/test_train.py
    KILLS=10 pytest -s tests/test_train.py -k killed      # ten SIGKILLs at random moments, not two
"""
import argparse
import csv
import gzip
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import pytest
import torch
from PIL import Image
import train
from conftest import AS_STARTED
from data import Batches, Scenes, Tokenizer
from model import BYTES, MERGES, UserError, build
from test_model import hierarchy

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ("--steps 6 --batch-size 8 --layers 1 --width 64 --workers 0 --eval-every 0 --log-every 1 "
         "--save-every 2 --warmup 2 --amp off").split()
TWO_PROCESSES = [sys.executable, *"-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d "
                                  "--rdzv-endpoint localhost:0".split()]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse("--loss", "clip", ...) -> the options, with --out tmp_path/run unless given."""
    def run(*more):
        words = ["train.py", *SMALL, "--out", str(tmp_path / "run"), *map(str, more)]
        monkeypatch.setattr(sys, "argv", words)
        return train.options()
    return run


@pytest.fixture
def go(parse):
    """go("--loss", "clip", ...) trains in this process -> what train() returns."""
    def run(*more):
        return train.train(parse(*more))
    return run


def read_rows(run):
    """Rows of log.csv without the times."""
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    times = ("images_per_s", "seconds")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def read_checkpoint(run):
    return torch.load(run / "last.pt", weights_only=True)


def same_weights(one, other, part="model"):
    return all(torch.equal(x, other[part][name]) for name, x in one[part].items())


def at_call(n, function, act):
    """function, with act() before its n-th call."""
    calls = []

    def wrapped(*inputs, **named):
        calls.append(1)
        if len(calls) == n:
            act()
        return function(*inputs, **named)
    return wrapped


def interrupt():
    raise InterruptedError


def before_clamp(patch, n, act):
    """act() before the n-th step clamps the scales, the last thing that it does."""
    patch.setattr(train.models, "clamp_scales", at_call(n, train.models.clamp_scales, act))


# -------------------------------------------------------------------------------------- bad input
def photos(folder, rows, header="image,caption"):
    for k in range(4):
        Image.new("RGB", (40, 30), (60 * k, 90, 120)).save(folder / f"{k}.png")
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(folder / "t.csv")


GOOD = [f"{k}.png,a picture of thing {k}" for k in range(4)]


@pytest.mark.parametrize("words, sentence", [
    ("--model ViT-Z", "unknown model 'ViT-Z': choose one of tiny"),
    ("--patch-size 9", "patches of 9 pixels do not divide an image of 56: try an image size of 54 "
                       "or 63"),
    ("--batch-size 2000000", "larger than the data"),
    ("--steps 0", "--steps must be at least 1"),
    ("--sigma 3", "--sigma"),
    ("--keep 0", "--keep"),
    ("--accum-steps 3", "--accum-steps 3 does not divide the 8 pairs"),
    ("--data nowhere.csv", "no such file"),
    ("--vocab learn:", "learn:8000"),
    ("--vocab none.txt.gz", "merges file"),
    ("--out /proc/none", "can't write in --out /proc/none"),
    ("--pool cls --patches-through-h", "h_v"),
    ("--loss clip --keep 0.25",
     "--keep means nothing to --loss clip: leave it out, or take --loss filip"),
    ("--loss clip --no-leff", "--no-leff means nothing to --loss clip"),
    ("--near -1", "--near must be at least 0, not -1"),
    ("--loss filip --per-text", "--per-text means nothing to --loss filip: .* take --loss sparc"),
    ("--loss pyramid --terms GS GS", "twice"),
    ("--loss pyramid --lam 0.7 --mu 0.7", "--lam 0.7"),
    ("--loss pyramid --local-crop 2", "--local-crop must lie in 0..1"),
    ("--lr -1", "--lr must be at least 0, not -1.0"),
    ("--weight-decay -1", "--weight-decay must be at least 0"),
    ("--beta2 1", "--beta2 must lie in 0..1, below 1"),
    ("--paraphrase 3", "--paraphrase is a share, in 0..1, not 3.0"),
    ("--data t.csv --paraphrase 0.5",
     "--paraphrase means nothing to --data t.csv: leave it out, or take --data scenes"),
    ("--data t.csv --mismatch 0.5", "--mismatch means nothing to --data t.csv"),
    ("--vocab learn", "learn is not CLIP's merges file .*or use --vocab learn:8000"),
    ("--loss pyramid --model RN50", "ResNet, which has no vision_layers"),
])
def test_bad_options_are_one_sentence(go, words, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as e:
        go(*words.split())
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("rows, header, sentence", [
    (GOOD, "photo,text", "line 1 .*no column of the picture .*found: photo, text"),
    (GOOD, "image,caption", r"--batch-size 8 is larger than the data \(4 pictures\)"),
])
def test_bad_csv_names_file_and_line(go, tmp_path, rows, header, sentence):
    with pytest.raises(UserError, match=sentence):
        go("--data", photos(tmp_path, rows, header))


BAD_ROWS = ["9.png,a picture that is not there", "2.png,  "]
FILES = ("--loss", "clip", "--batch-size", 4, "--image-size", 32, "--vocab", "learn:600")


def listed(run):
    with open(run / "bad_rows.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_bad_rows_do_not_end_a_run(go, tmp_path, capsys):
    """Each is listed once with its line, and a run in two parts is the run in one."""
    path = photos(tmp_path, GOOD + BAD_ROWS)
    damaged = tmp_path / "2.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    more = [*FILES, "--data", path]
    assert go(*more, "--out", tmp_path / "whole")
    rows = listed(tmp_path / "whole")
    assert [row["where"].split("t.csv ")[1] for row in rows] == ["line 6", "line 7", "line 4"]
    assert [row["what"] for row in rows] == ["9.png", "2.png", "2.png"]
    assert all(row["reason"] for row in rows) and "bad=3" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        before_clamp(patch, 4, interrupt)
        go(*more)
    assert go(*more, "--resume")
    assert listed(tmp_path / "run") == rows
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")
    assert go(*FILES, "--data", photos(tmp_path, GOOD), "--overwrite")
    assert listed(tmp_path / "run") == []                    # nothing stays of the run before


def test_too_many_bad_rows_stop_the_run_with_a_summary(go, tmp_path):
    """What was trained is saved, and --max-bad lets it go on."""
    for k in range(20):
        (tmp_path / f"bad{k}.png").write_bytes(b"no picture")
    rows = GOOD + [f"bad{k}.png,thing {k}" for k in range(20)]
    more = [*FILES, "--data", photos(tmp_path, rows), "--steps", 12]
    with pytest.raises(UserError, match="1. of .. samples can't be.*--max-bad 0.01") as e:
        go(*more)
    assert "\n" not in str(e.value) and "python data.py check" in str(e.value)
    assert " x can't read PICTURE as a picture)" in str(e.value)
    done = read_checkpoint(tmp_path / "run")["step"]
    assert 0 < done < 12 and 11 <= len(listed(tmp_path / "run")) < 20
    with pytest.raises(UserError, match="--max-bad 0.01"):
        go(*more, "--resume")
    assert go(*more, "--resume", "--max-bad", 1)
    assert len(listed(tmp_path / "run")) == 20


def test_bad_rows_of_a_table_are_weighed_when_it_is_opened(go, tmp_path):
    rows = GOOD + ["1.png,"] * 11
    summary = "11 of 15 samples can't be used .11 x the caption of PICTURE"
    with pytest.raises(UserError, match=summary):
        go(*FILES, "--data", photos(tmp_path, rows))
    assert len(listed(tmp_path / "run")) == 11 and not (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(UserError, match="1 of 5 samples.*--max-bad 0.0"):
        go(*FILES, "--data", photos(tmp_path, GOOD + ["1.png,"]), "--max-bad", 0)
    with pytest.raises(UserError, match="--max-bad is a share"):
        go(*FILES, "--data", photos(tmp_path, GOOD), "--max-bad", 5)


def test_resuming_compares_the_data_and_not_its_path(go, tmp_path):
    path = photos(tmp_path, GOOD)
    more = [*FILES, "--steps", 2]
    assert go(*more, "--data", path)
    (tmp_path / "val.csv").write_text((tmp_path / "t.csv").read_text())
    other = str(tmp_path / "x" / ".." / "t.csv")
    (tmp_path / "x").mkdir()
    assert go(*more, "--data", other, "--resume")
    for rows in (GOOD[::-1], [row + "s" for row in GOOD]):
        photos(tmp_path, rows)
        with pytest.raises(UserError, match="has other pictures or captions"):
            go(*more, "--data", path, "--resume")
    with pytest.raises(UserError, match="now scenes"):
        go(*more, "--resume")


def test_captions_that_repeat_are_told_and_are_no_strangers(go, tmp_path, capsys):
    """With one caption for all pictures every picture finds its text."""
    path = photos(tmp_path, [f"{k}.png,a photo of a dog" for k in range(4)])
    assert go(*FILES, "--data", path)
    assert "75.0% of the captions repeat others" in capsys.readouterr().out
    assert {row["accuracy"] for row in read_rows(tmp_path / "run")} == {"100"}


def test_equal_texts_are_no_negatives():
    """Against a loop; without equal texts it is the plain loss. A target that equal texts share is
    no option: if their logits are equal, as they are, it is the plain loss too."""
    ids = torch.tensor([[5, 6, 9], [5, 7, 9], [5, 6, 9], [5, 9, 0]])
    t = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))[[0, 1, 0, 3]]
    s = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)) @ t.T
    want = shared = 0
    for logits in (s, s.T):
        p = logits.log_softmax(1)
        for i, partners in enumerate(([0, 2], [1], [0, 2], [3])):
            rest = [j for j in range(4) if j == i or j not in partners]
            want -= logits[i, rest].log_softmax(0)[rest.index(i)] / 8
            shared -= sum(p[i, j] for j in partners) / len(partners) / 8
    got = train.mask_equal_texts(ids, ids > 0, 1)(s, s.T)
    plain = train.objectives.info_nce(s, s.T)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert plain.item() == pytest.approx(shared.item(), rel=1e-5) and plain > got + 0.01
    ids = ids[[0, 1, 3]]
    some = s[:3, :3], s.T[:3, :3]
    masked = train.mask_equal_texts(ids, ids > 0, 1)(*some)
    torch.testing.assert_close(masked, train.objectives.info_nce(*some))


def test_texts_of_a_picture_share_its_target():
    """FILIP A.2 against a loop, with values and gradients in float64: of two pictures with three
    texts each, every text of the own picture is a partner with probability 1/3, an equal one too.
    """
    g = torch.Generator().manual_seed(0)
    v, t = (torch.randn(n, 8, generator=g, dtype=torch.float64, requires_grad=True) for n in (2, 6))
    ids = torch.tensor([[5], [5], [6], [7], [8], [8]])
    s = v.repeat_interleave(3, 0) @ t.T                      # (6, 6), as in ModelAndLoss.loss
    want = 0
    for logits in (s, s.T):
        for i in range(6):
            partners = range(3 * (i // 3), 3 * (i // 3) + 3)
            want -= sum(logits[i].log_softmax(0)[j] for j in partners) / 3 / 6 / 2
    for info_nce in (train.objectives.info_nce, train.mask_equal_texts(ids, ids > 0, 3)):
        got = info_nce(s, s.T)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(x, (v, t), retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("loss", [name for name in train.OBJECTIVES if name != "pyramid"])
def test_every_loss_but_pyramids_takes_several_texts_of_a_picture(parse, tmp_path, loss):
    """Twice the same text of a picture: the loss of once, plus ln 2 where it compares all pairs."""
    args = parse("--data", photos(tmp_path, GOOD), *FILES[2:], "--loss", loss)
    torch.manual_seed(0)
    args.vocab_size = 600
    module = train.ModelAndLoss(build("tiny", vocab_size=600), args).eval()
    ids = torch.tensor([[1, 5, 599], [1, 6, 599]])
    batch = {"images": torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8), "ids": ids,
             "mask": ids > 0}
    twice = batch | {name: batch[name].repeat_interleave(2, 0) for name in ("ids", "mask")}
    once, again = (module(b)[0] for b in (batch, twice))
    pairs = {"clip": 1, "filip": 1, "clip+filip": 2, "pacl": 1, "gloria": 2, "sparc": 0.5}
    if loss in pairs:                                                         # MGCA's codes differ
        want = once["loss"] + pairs[loss] * math.log(2)
        if loss == "sparc":
            want = want + args.local_weight * (again["local"] - once["local"])
        torch.testing.assert_close(again["loss"], want, atol=2e-4, rtol=1e-4)
    assert all(torch.isfinite(x) for x in again.values())
    with pytest.raises(UserError, match="--captions means nothing to --loss pyramid"):
        parse("--loss", "pyramid", "--captions", 2)


@pytest.mark.parametrize("loss", [name for name in train.OBJECTIVES if name != "pyramid"])
def test_every_loss_but_pyramids_masks_equal_texts(go, tmp_path, loss):
    """It lowers the loss of a batch with equal texts, and plain info_nce is put back afterwards."""
    path = photos(tmp_path, GOOD[:2] + ["2.png,a dog", "3.png,a dog"])
    more = ["--data", path, *FILES[2:], "--steps", 1, "--loss", loss, "--overwrite"]
    losses = []
    for words in ([], ["--mask-equal-texts"]):
        assert go(*more, *words)
        losses.append(float(read_rows(tmp_path / "run")[0]["loss"]))
    assert losses[1] < losses[0] - 0.02
    assert train.objectives.info_nce.__qualname__ == "info_nce"
    with pytest.raises(UserError, match="--mask-equal-texts means nothing to --loss pyramid"):
        go("--loss", "pyramid", "--mask-equal-texts")


@pytest.mark.parametrize("loss", ["sparc", "mgca", "pyramid"])
def test_validation_goes_to_the_log_and_leaves_the_run_alone(go, tmp_path, loss):
    more = ["--loss", loss, "--out"]
    assert go(*more, tmp_path / "run") and go(*more, tmp_path / "seen", "--eval-every", 2)
    plain, rows = read_rows(tmp_path / "run"), read_rows(tmp_path / "seen")
    for one, other in zip(plain, rows):
        validated = int(one["step"]) % 2 == 0
        for name in train.VALIDATION:
            assert one.pop(name) == "" and bool(other.pop(name)) == validated
    assert plain == rows
    assert same_weights(*(read_checkpoint(tmp_path / run) for run in ("run", "seen")))


def test_validation_pictures_are_cropped_when_read(parse, tmp_path):
    """One batch of small squares, without those that can't be read."""
    Image.new("RGB", (900, 600)).save(tmp_path / "large.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "v.csv").write_text("image,caption\nlarge.png,a wall\nbad.png,a hole\n")
    args = parse(*FILES, "--data", photos(tmp_path, GOOD), "--val", tmp_path / "v.csv")
    batch = train.make_validation(args, Tokenizer([]), 32, 16)
    assert batch["images"].shape == (1, 3, 32, 32)


def test_pyramid_says_what_the_data_cannot_feed(go, tmp_path, capsys):
    """Files without regions and objects keep the peers alone; scenes lose nothing."""
    path = photos(tmp_path, GOOD)
    pyramid = ("--loss", "pyramid", "--batch-size", 4, "--image-size", 32, "--data", path)
    assert go(*pyramid, "--steps", 2)
    said = capsys.readouterr().out
    assert ("without regions (--regions FILE.npz) and the column objects the terms GA RS LA RT "
            "fall away") in said
    row = read_rows(tmp_path / "run")[0]
    assert "cross_global" not in row and "peer" in row
    with pytest.raises(UserError, match="nothing to feed them.*add the column objects"):
        go(*pyramid, "--terms", "GA", "RS", "--overwrite")
    with pytest.raises(UserError, match="weight is 0"):
        go(*pyramid, "--lam", 0.5, "--mu", 0.5, "--overwrite")


def test_on_scenes_no_term_of_pyramid_falls_away(go, tmp_path, capsys):
    assert go("--loss", "pyramid", "--steps", 1)
    assert "fall away" not in capsys.readouterr().out
    assert {"peer", "cross_global", "cross_local"} <= set(read_rows(tmp_path / "run")[0])


def test_a_batch_must_share_out_among_the_processes():
    with pytest.raises(UserError, match="evenly among 3 processes: try 6"):
        Batches(Scenes(20), Tokenizer([]), 8, 56, 32, rank=0, world=3)


def command(folder, *words):
    return subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *words],
                          capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("words", [("--model", "ViT-Z"), ("--loss", "none")])
def test_messages_and_exit_codes_of_the_command(tmp_path, words):
    """One sentence on the terminal, no traceback, exit code 2."""
    r = command(tmp_path, *words)
    assert r.returncode == 2 and "Traceback" not in r.stderr and "choose" in r.stderr
    assert len(r.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "runs" / "none").exists()


def test_help_begins_with_what_people_change(tmp_path):
    """The dozen comes first, every ablation below, and no default reads None."""
    said = command(tmp_path, "--help").stdout
    dozen = ("--loss", "--model", "--data", "--out", "--steps", "--batch-size", "--lr",
             "--image-size", "--resume", "--seed", "--amp", "--device")
    at = [said.index(f"\n  {name} ") for name in dozen]
    assert at == sorted(at) and at[-1] < said.index("\nmodel")
    assert "optimisation:" in said and "None" not in said
    assert "--compile" not in said and "--drop-special" not in said


# ------------------------------------------------------------------------------------- the options
@pytest.mark.parametrize("loss", ["filip", "clip+filip", "pacl", "gloria"])
def test_tokens_are_sent_as_they_are_by_default(parse, loss):
    """No dtype is asked for, so that bf16 tokens stay bf16 on the wire; fp16 is FILIP's."""
    args = parse("--loss", loss)
    assert train.evaluation.loss_options(args)["gather_dtype"] is None
    args = parse("--loss", loss, "--gather-dtype", "fp16")
    assert train.evaluation.loss_options(args)["gather_dtype"] is torch.float16


def test_lamb_takes_its_learning_rate_and_weight_decay_from_filip(parse):
    """FILIP Tables 8 and 9, for one batch of 2,048; what is given by hand stands."""
    args = parse("--loss", "filip", "--optimizer", "lamb", "--batch-size", 2048)
    assert args.lr == pytest.approx(2 * 6e-3) and args.weight_decay == 0.03
    decayed, spared = train.make_optimizer(train.models.build("tiny"), args).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.03, 0.0)
    assert decayed["betas"] == (0.9, 0.999) and decayed["eps"] == 1e-4
    assert parse("--optimizer", "lamb", "--weight-decay", 0.003).weight_decay == 0.003
    assert parse().weight_decay == 0.1


def count_leff(model):
    blocks = model.visual.transformer.resblocks
    return sum(any(type(m).__name__ == "LeFF" for m in block.modules()) for block in blocks)


@pytest.mark.parametrize("words, blocks, front", [
    ("", 3, 3), ("--no-leff", 0, 3), ("--leff 0", 0, 0), ("--leff 2", 2, 2), ("--leff 4", 4, 4)])
def test_leff_blocks_and_where_regions_enter(parse, words, blocks, front):
    """--leff N is PyramidCLIP's L_s (Figure 6); --no-leff leaves the regions' place."""
    args = parse("--loss", "pyramid", "--layers", 4, *words.split())
    model = train.make_model(args, Tokenizer([]))
    assert count_leff(model) == blocks
    assert model.visual.front == front


def test_more_leff_than_blocks_is_one_sentence(go):
    with pytest.raises(UserError, match="leff"):
        go("--loss", "pyramid", "--layers", 2, "--leff", 3)


def test_all_blocks_with_leff_train(go, tmp_path):
    """L_s = 12 of 12: regions enter behind the last block."""
    assert go("--loss", "pyramid", "--layers", 2, "--leff", 2, "--steps", 2)
    assert math.isfinite(float(read_rows(tmp_path / "run")[-1]["loss"]))


def test_per_text_reaches_sparc_loss(go, tmp_path):
    """Eq. 6 as printed weights texts alike, so that the local loss of one batch differs."""
    local = []
    for words in ([], ["--per-text"]):
        go("--steps", 1, "--overwrite", *words)
        row = read_rows(tmp_path / "run")[0]
        assert set(row) >= {"global", "local", "local_shuffled"}
        local.append((float(row["global"]), float(row["local"])))
    assert local[0][0] == local[1][0] and local[0][1] != local[1][1]


# --------------------------------------------------------------------- a run's life and its numbers
def test_a_run_is_not_overwritten_nor_mixed_with_another(go, tmp_path):
    last = tmp_path / "run" / "last.pt"
    clip = ["--loss", "clip", "--steps", 2]
    assert go(*clip)
    before = last.read_bytes()
    for more, sentence in (([], "already holds a run"),
                           (["--resume", "--width", 128], r"--width 64 \(now 128\)"),
                           (["--resume", "--near", 0], r"--near None \(now \[0\]\)"),
                           (["--resume", "--loss", "filip"], r"--loss clip \(now filip\)")):
        with pytest.raises(UserError, match=sentence):
            go(*clip, *more)
    assert last.read_bytes() == before
    older = read_checkpoint(tmp_path / "run")               # from before there was --spare
    del older["args"]["spare"]
    torch.save(older, last)
    assert go(*clip, "--resume")
    last.write_bytes(before[:1000])
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        go(*clip, "--resume")


@pytest.mark.parametrize("words", ["clip", "filip", "sparc", "pyramid --local-crop 0"])
def test_a_broken_run_resumes_to_the_same_numbers(go, tmp_path, words):
    """Broken after 3 steps, with a checkpoint of step 2."""
    more = ["--loss", *words.split()]
    go(*more, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        before_clamp(patch, 4, interrupt)
        go(*more)
    assert len(read_rows(tmp_path / "run")) == 3
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    if words == "sparc":
        with pytest.raises(UserError, match=r"--per-text False \(now True\)"):
            go(*more, "--per-text", "--resume")
    go(*more, "--resume")
    rows = read_rows(tmp_path / "whole")
    assert rows == read_rows(tmp_path / "run")
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert same_weights(read_checkpoint(tmp_path / "whole"), read_checkpoint(tmp_path / "run"))


def test_a_signal_to_all_processes_saves_and_ends(go, monkeypatch, tmp_path, capsys):
    """As Slurm and `timeout` send it: the data workers get it too."""
    def terminate():
        workers = multiprocessing.active_children()
        assert workers
        for process in (*workers, multiprocessing.current_process()):
            os.kill(process.pid, signal.SIGTERM)
    before_clamp(monkeypatch, 3, terminate)
    assert go("--loss", "clip", "--save-every", 100, "--workers", 1) is False
    assert read_checkpoint(tmp_path / "run")["step"] == 4
    assert "--resume goes on from there" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(go, monkeypatch, tmp_path):
    clip, calls = train.OBJECTIVES["clip"], []

    def diverging(*inputs, **options):
        calls.append(1)
        losses = clip.loss(*inputs, **options)
        return {"loss": losses["loss"] * (math.nan if len(calls) == 4 else 1)}
    monkeypatch.setitem(train.OBJECTIVES, "clip", clip._replace(loss=diverging))
    with pytest.raises(UserError, match="step 4: the loss is nan.*Lower --lr"):
        go("--loss", "clip")
    ckpt = read_checkpoint(tmp_path / "run")
    assert ckpt["step"] == 2 and all(torch.isfinite(x).all() for x in ckpt["model"].values())


def test_a_full_disk_loses_nothing(go, monkeypatch, tmp_path):
    real = torch.save

    def full(ckpt, file):
        if ckpt["step"] > 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        real(ckpt, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="last.pt .*No space left on device.*kept"):
        go("--loss", "clip")
    assert read_checkpoint(tmp_path / "run")["step"] == 2
    assert not list((tmp_path / "run").glob("*.tmp"))


def script(folder):
    """train.py without the evaluation at its end."""
    path = folder / "only_train.py"
    path.write_text(f"""
import sys
sys.path.insert(0, {ROOT!r})
import train
if __name__ == "__main__":
    train.train(train.options())
    train.leave_processes()
""")
    return str(path)


def logged_steps(log):
    return max(0, log.read_text().count("\n") - 1) if log.exists() else 0


def kill_after(words, log, steps):
    """Start a training and end it by SIGKILL soon after so many rows of its log."""
    p = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and logged_steps(log) < steps:
        time.sleep(0.005)
    assert p.poll() is None, "the run ended before it could be killed"
    time.sleep(random.random() * 0.05)
    p.kill()
    p.wait()


def test_killed_runs_end_with_the_same_numbers(tmp_path, monkeypatch):
    """SIGKILL at random moments, checkpoints every 3 steps, data workers on."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # or the workers wait for cores
    kills = int(os.environ.get("KILLS", 2))
    more = ["--workers", "1", "--steps", "280", "--save-every", "3", "--resume", "--out"]
    words = [sys.executable, script(tmp_path), *SMALL, *more]
    whole, killed, steps = tmp_path / "whole", tmp_path / "killed", [0]
    subprocess.run([*words, str(whole)], check=True, capture_output=True)
    for _ in range(kills):
        target = steps[-1] + 1 + int(random.Random(time.time()).random() * 260 / kills)
        kill_after([*words, str(killed)], killed / "log.csv", target)
        steps.append(max(steps[-1], logged_steps(killed / "log.csv")))
    subprocess.run([*words, str(killed)], check=True, capture_output=True)
    rows, again = read_rows(whole), read_rows(killed)
    print(f"\nkilled {kills} times, after steps {steps[1:]}; final loss {again[-1]['loss']}, never "
          f"killed {rows[-1]['loss']}")
    assert rows == again
    assert same_weights(read_checkpoint(whole), read_checkpoint(killed))


def test_rows_of_a_killed_run_are_replaced(tmp_path):
    """Also if the rows come at other steps now, and whatever else stands in the file."""
    path, folder = tmp_path / "log.csv", tmp_path / "d"
    path.write_text("step,loss\n20,1\n40,2\n\n\0\0\n60,3\n")
    train.add_row(str(path), {"step": 50, "loss": 2.5}, 20)
    assert path.read_text() == "step,loss\n20,1\n50,2.5\n"
    train.add_row(str(path), {"step": 10, "loss": 9.0}, 0)       # a run that begins
    assert path.read_text() == "step,loss\n10,9\n"
    folder.mkdir()
    with pytest.raises(UserError, match="can't write"):
        train.add_row(str(folder), {"step": 1}, 0)


# the gathers of the other objectives: test_losses.py
@pytest.mark.parametrize("words", [
    "filip", "mgca", "sparc --strangers 0 --accum-steps 2", "sparc --batch-size 32",
    "sparc --strangers 0 --captions 2", "filip --captions 2 --accum-steps 2"])
def test_two_processes_equal_one(go, tmp_path, words):
    """Loss and every gradient after one step; AdamW's first moment is a tenth of the gradient.
    Two strangers are pictures of the same process if each has 16 pictures, or 32, ..."""
    more = ["--loss", *words.split(), "--steps", "1", "--clip-grad", "0"]
    if "captions" in words:
        rows = [f"{k}.png,{text} {k}" for text in ("thing", "a number") for k in range(4)]
        more += [*"--model tiny --batch-size 4 --vocab learn:600 --data".split(),
                 photos(tmp_path, rows)]
    go(*more)
    two = [*TWO_PROCESSES, script(tmp_path), *SMALL, *more, "--out", str(tmp_path / "two")]
    subprocess.run(two, check=True, capture_output=True)
    one_loss, two_loss = (float(read_rows(tmp_path / run)[0]["loss"]) for run in ("run", "two"))
    assert abs(one_loss - two_loss) < 1e-4
    one, two = (read_checkpoint(tmp_path / run)["optimizer"]["state"] for run in ("run", "two"))
    assert one.keys() == two.keys()
    for i in one:
        x, y = one[i]["exp_avg"], two[i]["exp_avg"]
        assert (x - y).norm() <= 1e-4 * x.norm() + 1e-7


def test_two_processes_list_what_either_finds(tmp_path):
    """The bad rows, the loss and what the first process validates are those of one process, also
    if equal texts lie in different processes."""
    rows = GOOD[:2] + ["2.png,a dog", "3.png,a dog"] + [f"bad{k}.png,thing {k}" for k in range(4)]
    for k in range(4):
        (tmp_path / f"bad{k}.png").write_bytes(b"no picture")
    more = [*map(str, FILES), "--data", photos(tmp_path, rows), "--val", str(tmp_path / "t.csv"),
            "--model", "tiny", "--eval-every", "3", "--mask-equal-texts", "--out"]
    for python, out in (([sys.executable], "one"), (TWO_PROCESSES, "two")):
        words = [*python, script(tmp_path), *SMALL, *more, str(tmp_path / out)]
        subprocess.run(words, check=True, capture_output=True)
    one, two = (listed(tmp_path / out) for out in ("one", "two"))
    assert sorted(map(str, one)) == sorted(map(str, two)) and len(one) == 4
    one, two = (read_rows(tmp_path / out) for out in ("one", "two"))
    for x, y in zip(one, two):
        assert float(x["loss"]) == pytest.approx(float(y["loss"]), abs=1e-3)
        assert bool(x["val_loss"]) == (x["step"] in "36")
        if x["val_loss"]:
            assert float(x["val_loss"]) == pytest.approx(float(y["val_loss"]), abs=1e-3)


def mean_loss(rows):
    return sum(float(row["loss"]) for row in rows) / len(rows)


@pytest.mark.parametrize("loss", [name for name in train.OBJECTIVES if name != "sparc"])
def test_every_objective_trains_resumes_and_is_evaluated(go, tmp_path, loss):
    """The loss goes down, and a run in two halves is the run in one."""
    run = tmp_path / "run"
    more = ("--loss", loss, "--steps", 30, "--lr", 3e-3, "--save-every", 15)
    assert go(*more)
    rows, whole = read_rows(run), read_checkpoint(run)
    assert mean_loss(rows[-5:]) < mean_loss(rows[:5])
    assert all(math.isfinite(float(x)) for row in rows for x in row.values() if x)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        before_clamp(patch, 20, interrupt)
        go(*more, "--overwrite")
    assert go(*more, "--resume")
    resumed = read_checkpoint(run)
    assert read_rows(run) == rows
    assert same_weights(whole, resumed) and same_weights(whole, resumed, "head")
    metrics = train.evaluation.evaluate(str(run), n=20, progress=False)
    assert 0 <= metrics["retrieval"]["t2i_r10"] <= 100
    assert ("local_gap" in metrics["alignment"]) == (loss == "mgca")


@pytest.mark.parametrize("loss", list(train.OBJECTIVES))
def test_parts_equal_the_whole(go, tmp_path, loss):
    """Every gradient of one batch of 16, in one go and in 4 parts."""
    moments, losses = [], []
    more = ["--loss", loss, "--steps", 1, "--batch-size", 16, "--clip-grad", 0, "--overwrite"]
    if loss == "pyramid":
        more.append("--no-leff")                             # its BatchNorm sees one part at a time
    for parts in (1, 4):
        go(*more, "--accum-steps", parts)
        state = read_checkpoint(tmp_path / "run")["optimizer"]["state"]
        moments.append({k: x["exp_avg"] for k, x in state.items()})      # a tenth of the gradient
        losses.append(float(read_rows(tmp_path / "run")[0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert moments[0].keys() == moments[1].keys()
    for k, x in moments[0].items():
        assert (x - moments[1][k]).norm() <= 1e-5 * x.norm() + 1e-9


# -------------------------------------------------------------------------------- --init, --freeze
TUNE = "--steps 6 --batch-size 8 --workers 0 --eval-every 0 --log-every 1 --save-every 2 --amp off"


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """tune("--init", ...) trains, with no option that --init decides -> what train() returns."""
    def run(*more):
        words = ["train.py", *TUNE.split(), "--out", tmp_path / "run", *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        return train.train(train.options())
    return run


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A scenes run to start from."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    words = "--steps 100 --batch-size 32 --lr 3e-3 --save-every 100 --loss clip --out".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *SMALL, *words, str(folder)])
        train.train(train.options())
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """An archive in OpenAI's layout with random weights, and beside it a file of 48,894 merges."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    model = build("ViT-B/32", image_size=32, patch_size=8, vision_width=64, vision_heads=1,
                  vision_layers=2, text_width=64, text_heads=1, text_layers=1, embed_dim=32,
                  context_length=16)
    module = hierarchy(model.requires_grad_(False).state_dict())
    torch.jit.save(torch.jit.trace(module, torch.zeros(1)), folder / "tiny.pt")
    pairs = [f"{a} {b}" for a in BYTES.values() for b in BYTES.values()][:48894]
    with gzip.open(folder / MERGES, "wt", encoding="utf-8") as file:
        file.write("\n".join(["a note", *pairs]))
    return folder / "tiny.pt"


@pytest.mark.filterwarnings("ignore")                        # torch.jit is on its way out
def test_a_released_archive_is_evaluated_and_drawn(released, tmp_path, monkeypatch, capsys):
    """The results lie beside it, by its name."""
    table, beside = photos(tmp_path, GOOD), str(released.with_suffix(""))
    for module, words in ((train.evaluation, ["--data", table]),
                          (train.visualize, ["--data", table, "--n", "2"]),
                          (train.visualize, ["--image", tmp_path / "1.png", "--text", "a thing"])):
        monkeypatch.setattr(sys, "argv", ["", str(released), "--device", "cpu", *map(str, words)])
        module.main()
    metrics = json.loads(open(beside + "-metrics.json").read())
    assert metrics["about"]["model"] == "tiny.pt" and metrics["about"]["pictures"] == 4
    assert all(Image.open(f"{beside}-{name}.png").width > 600 for name in ("align", "align-1"))
    assert " retrieval i2t_r1 " in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["clip", "filip", "sparc", "pyramid"])
def test_a_released_archive_is_fine_tuned_at_another_size(tune, released, tmp_path, loss):
    """20 steps on four pictures of 48 pixels lower the loss; the towers stay CLIP's."""
    words = ["--batch-size", 4, "--steps", 20, "--save-every", 100, "--lr", 1e-3, "--warmup", 1]
    data = ["--data", photos(tmp_path, GOOD)]
    assert tune("--init", released, "--loss", loss, "--image-size", 48, *words, *data)
    losses = [float(row["loss"]) for row in read_rows(tmp_path / "run")]
    assert sum(losses[-3:]) < sum(losses[:3])
    ckpt = read_checkpoint(tmp_path / "run")
    assert ckpt["config"]["act"] == "quickgelu" and ckpt["config"]["image_size"] == 48
    assert ckpt["model"]["visual.positional_embedding"].shape == (37, 64)
    assert len(ckpt["merges"]) == 48894 and ckpt["args"]["model"] == "tiny.pt"
    assert ckpt["config"]["leff"] == 0


def test_a_run_as_init_needs_fewer_steps(tune, begun, go, tmp_path):
    """After 10 steps the loss is lower than from scratch at any time in 30."""
    words = ["--loss", "clip", "--batch-size", 32, "--seed", 1, "--save-every", 100]
    assert go(*words, "--lr", 3e-3, "--steps", 30, "--out", tmp_path / "scratch")
    assert tune(*words, "--lr", 3e-4, "--steps", 10, "--init", begun)
    tuned, scratch = ([float(row["loss"]) for row in read_rows(tmp_path / run)]
                      for run in ("run", "scratch"))
    assert sum(tuned[-5:]) / 5 < min(sum(scratch[k:k + 5]) / 5 for k in range(26))


def test_a_run_from_init_resumes_without_the_file(tune, begun, tmp_path):
    """To the numbers of an unbroken one, and no option has to be given again."""
    first = tmp_path / "first"
    shutil.copytree(begun, first)
    words = ["--init", first, "--loss", "filip", "--keep", 0.5, "--freeze", "text"]
    assert tune(*words, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        before_clamp(patch, 4, interrupt)
        tune(*words)
    shutil.rmtree(first)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["init"] == str(first)
    with pytest.raises(UserError, match=r"--keep 0.5 \(now 0.25\)"):
        tune("--resume", "--keep", 0.25)
    assert tune("--resume")
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "run")
    assert same_weights(*map(read_checkpoint, (tmp_path / "whole", tmp_path / "run")))


@pytest.mark.parametrize("loss, added", [
    ("clip", set()), ("pacl", {"e_v"}), ("pyramid", {"phi"}), ("mgca", set())])
def test_what_init_brings_and_what_starts_fresh(parse, begun, monkeypatch, loss, added):
    monkeypatch.setattr(sys, "argv", ["train.py", "--init", str(begun), "--loss", loss])
    args = train.options()
    start, tok, _ = train.evaluation.load_run(args.init)
    model = train.make_model(args, tok, start)
    old, new = read_checkpoint(begun), model.state_dict()
    assert tok.merges == old["merges"]
    assert {name.split(".")[1] for name in set(new) - set(old["model"])} == added
    assert all(x.equal(old["model"][name]) for name, x in new.items() if name in old["model"])


def test_fine_tuning_takes_a_thirtieth_of_the_rate(parse, begun, released, monkeypatch):
    """FILIP: 6e-3 for pre-training (Table 9), 2e-4 for fine-tuning (Table 10), at batch 512."""
    def rate(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
        args = train.options()
        return args.lr, args.weight_decay, args.sigma, args.image_size
    assert rate("--init", begun) == (pytest.approx(1.5e-3 / 30), 0.1, 0.7, 56)
    assert rate("--init", released, "--image-size", 64) == (
        pytest.approx(5e-4 / 30), 0.1, "1/P", 64)
    lamb = rate("--init", released, "--optimizer", "lamb", "--batch-size", 2048)
    assert lamb[:2] == (pytest.approx(2 * 2e-4), 3e-4)
    assert rate("--init", begun, "--lr", 1e-3)[0] == 1e-3


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tower, loss", [("image", "sparc"), ("text", "sparc"), ("image", "pacl")])
def test_a_frozen_tower_keeps_its_weights(tune, begun, tmp_path, tower, loss, parts):
    """Not so the other one, the scale, and what the objective adds."""
    assert tune("--init", begun, "--loss", loss, "--freeze", tower, "--accum-steps", parts)
    old, new = (read_checkpoint(run)["model"] for run in (begun, tmp_path / "run"))
    moved = {name for name in new if not new[name].equal(old.get(name, torch.ones(())))}
    still = {name for name in old if name.startswith("visual.") == (tower == "image")}
    still -= {"logit_scale", *(set(old) - set(new))}
    assert not moved & still and "logit_scale" in moved
    assert moved >= {"text_projection" if tower == "image" else "visual.conv1.weight"}
    assert loss != "pacl" or "visual.e_v.skip.weight" in moved


def test_a_frozen_resnet_keeps_its_batchnorms_statistics(tune, go, tmp_path):
    words = ["--model", "RN50", "--image-size", 32, "--vocab", "learn:600"]
    data = ["--data", photos(tmp_path, GOOD), "--val", photos(tmp_path, GOOD), "--batch-size", 4]
    small = dict(vision_width=8, vision_layers=(1, 1, 1, 1), vision_heads=4, text_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.models.CONFIGS, "RN50", train.models.CONFIGS["RN50"] | small)
        assert tune(*words, *data, "--out", tmp_path / "first", "--steps", 1)
    first = tmp_path / "first"
    more = ["--eval-every", 1, "--steps", 3, *data]
    assert tune("--init", first, "--freeze", "image", *more)
    old, new = (read_checkpoint(run)["model"] for run in (first, tmp_path / "run"))
    assert all(new[k].equal(x) for k, x in old.items() if k.startswith("visual."))
    assert tune("--init", first, "--freeze", "none", *more, "--overwrite")
    assert not read_checkpoint(tmp_path / "run")["model"]["visual.bn1.running_mean"].equal(
        old["visual.bn1.running_mean"])


@pytest.mark.parametrize("words, sentence", [
    ("--init BEGUN --resume", "--init begins a run and --resume goes on with one"),
    ("--init BEGUN --freeze image text", "leaves the other to learn: .*one tower"),
    ("--freeze image", "--freeze keeps a tower that --init brings.*: give --init"),
    ("--init BEGUN --layers 3 --pool cls", "--pool --layers: the weights of --init decide"),
    ("--init BEGUN --vocab learn:600", "--vocab: the weights of --init decide"),
    ("--init BEGUN --image-size 70", "patches of 8 pixels do not divide an image of 70"),
    ("--init none", "no checkpoint none/last.pt, no file of weights none"),
    ("--init OTHER", "no visual.conv1.weight.*lacks args, config"),
    ("--init SMALL", "has 618 tokens, CLIP's published vocabulary has 49,408"),
])
def test_bad_init_is_one_sentence(tune, begun, released, tmp_path, words, sentence):
    """OTHER: a file of another layout. SMALL: CLIP's layout, but not its vocabulary."""
    files = {"BEGUN": begun, "OTHER": tmp_path / "other.pt", "SMALL": released.with_name("small")}
    torch.save({"weight": torch.zeros(3)}, files["OTHER"])
    model = build("ViT-B/32", vocab_size=618, vision_layers=1, text_layers=1)
    torch.save(model.state_dict(), files["SMALL"])
    with pytest.raises(UserError, match=sentence) as e:
        tune(*(files.get(word, word) for word in words.split()))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run" / "last.pt").exists()


# -------------------------------------------------------------------------- schedule and optimiser
ADAMW = argparse.Namespace(lr=2.0, warmup=4, steps=12, weight_decay=0.1, beta2=0.98,
                           optimizer="adamw")


def test_schedule():
    rates = [round(train.learning_rate(step, ADAMW), 6) for step in (0, 1, 3, 4, 8)]
    assert rates == [0.5, 1.0, 2.0, 2.0, 1.0]
    assert train.learning_rate(11, ADAMW) < 0.1


def test_decay_spares_filips_list_and_prototypes():
    model = train.models.build("tiny")
    decayed, spared = (g["params"] for g in train.make_optimizer(model, ADAMW).param_groups)
    ids = {id(p) for p in spared}
    names = {name for name, p in model.named_parameters() if id(p) in ids}
    assert {"logit_scale", "token_embedding.weight", "positional_embedding",
            "visual.positional_embedding", "ln_final.weight"} <= names
    matrices = (model.visual.proj, model.text_projection, model.visual.conv1.weight)
    assert {id(p) for p in matrices} <= {id(p) for p in decayed}
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    head = train.OBJECTIVES["mgca"].head(8)
    spared = train.make_optimizer(head, ADAMW).param_groups[1]["params"]
    assert any(p is head.prototypes for p in spared)


def slow_lamb(w, grads, lr, b1, b2, eps, decay):
    """The formula in LAMB's docstring, number by number."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for g in grads:
        m = [b1 * a + (1 - b1) * x for a, x in zip(m, g)]
        v = [b2 * a + (1 - b2) * x * x for a, x in zip(v, g)]
        u = [a / (math.sqrt(b) + eps) + decay * x for a, b, x in zip(m, v, w)]
        size = min(10, math.sqrt(sum(x * x for x in w)))
        ratio = 1
        if size and any(u):
            ratio = size / math.sqrt(sum(x * x for x in u))
        w = [x - lr * ratio * y for x, y in zip(w, u)]
    return w


@pytest.mark.parametrize("start", [[0.5, -1.0, 2.0, 0.1], [0.0] * 4, [30.0, -40.0, 5.0, 1.0]],
                         ids=["usual", "zero tensor", "norm above 10"])
@pytest.mark.parametrize("shape", [(2, 2), (4,)])
def test_lamb(start, shape):
    """Three steps against the slow formula in float64."""
    w = torch.tensor(start, dtype=torch.float64).view(shape).requires_grad_()
    g = torch.Generator().manual_seed(0)
    grads = torch.randn(3, 4, dtype=torch.float64, generator=g).tolist()
    optimizer = train.LAMB([w], lr=0.1, weight_decay=0.03)
    for grad in grads:
        w.grad = torch.tensor(grad, dtype=torch.float64).view(shape)
        optimizer.step()
    slow = torch.tensor(slow_lamb(start, grads, 0.1, 0.9, 0.999, 1e-4, 0.03), dtype=torch.float64)
    torch.testing.assert_close(w.detach().flatten(), slow, rtol=1e-12, atol=1e-12)


def test_lamb_trains_and_resumes(go, tmp_path):
    more = ("--loss", "filip", "--optimizer", "lamb")
    assert go(*more)
    rows = read_rows(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        before_clamp(patch, 4, interrupt)
        go(*more, "--overwrite")
    assert go(*more, "--resume")
    assert read_rows(tmp_path / "run") == rows
    args = read_checkpoint(tmp_path / "run")["args"]
    assert args["lr"] == pytest.approx(6e-3 / 8)             # FILIP's, from a batch of 512 to 8


# ------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize("python", [[sys.executable], TWO_PROCESSES], ids=["one process", "two"])
def test_the_command_trains_evaluates_and_draws(tmp_path, python):
    r = subprocess.run([*python, os.path.join(ROOT, "train.py"), *SMALL, "--out", "here"],
                       capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    files = {"last.pt", "log.csv", "args.json", "metrics.json",
             "align.png", "align.html", "curves.png"}
    assert files == set(os.listdir(tmp_path / "here"))
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert 0 <= metrics["retrieval"]["i2t_r1"] < 20 and "retrieval i2t_r1" in r.stdout


# ------------------------------------------------------------------------- devices and launchers
@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", bool)
    monkeypatch.setattr(torch.backends.mps, "is_available", bool)


def test_devices(no_gpu, monkeypatch):
    """auto takes CUDA, never mps by itself; a GPU that is missing is one sentence."""
    assert train.pick_device("auto") == train.pick_device("cpu") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: .* finds no such GPU; use --device"):
            train.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.pick_device() == train.pick_device("cuda") == "cuda"


@pytest.mark.parametrize("words", ["train.py", "eval.py nowhere",
                                   "visualize.py nowhere --image a.png --text x"])
def test_a_missing_gpu_is_one_sentence(words):
    """In all three commands, with exit code 1 or 2 and no traceback."""
    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    r = subprocess.run([sys.executable, *words.split(), "--device", "mps"], cwd=ROOT,
                       capture_output=True, text=True)
    assert r.returncode in (1, 2) and len(r.stderr.strip().splitlines()) == 1
    assert f"{words.split()[0]}: --device mps: this PyTorch" in r.stderr


TORCHRUN = dict(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="here", MASTER_PORT="1")


@pytest.mark.parametrize("variables, found", [
    ({}, (0, 1, "cuda:0")), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, "cuda:0")),
    (TORCHRUN, (3, 8, "cuda:1")),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK=None, MASTER_ADDR=None.*MASTER_ADDR expected"),
    ({"RANK": "1"}, "RANK='1'"), ({"RANK": ""}, "RANK=''"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
    (TORCHRUN | {"RANK": "8"}, "RANK='8'"), (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT=''"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'")])
def test_what_torchrun_says(monkeypatch, variables, found):
    """Rank, number of processes and GPU; or one sentence, on a CPU too, before anything waits."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, str):
        with pytest.raises(train.BadData, match=f"{found}.*start with `torchrun") as e:
            train.start_processes(argparse.Namespace(device="cpu"))
        assert "\n" not in str(e.value)
        return
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend: None)
    rank, world, device = train.start_processes(argparse.Namespace(device="cuda"))
    assert (rank, world, str(device)) == found


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch):
    def refuse(number):
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be")
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train.BadData, match="LOCAL_RANK='1'.*invalid device ordinal.*torchrun"):
        train.start_processes(argparse.Namespace(device="cuda"))


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": ""},
                                       {"RANK": "1", "WORLD_SIZE": "2"}])
def test_train_py_says_so(variables, tmp_path):
    """Every process, not only the first, as each may be a terminal of its own."""
    clear = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    r = subprocess.run([sys.executable, os.path.join(ROOT, "train.py")], cwd=tmp_path,
                       env=clear | variables, capture_output=True, text=True)
    assert r.returncode == 2 and r.stderr.startswith("train.py: the environment has")
    assert len(r.stderr.splitlines()) == 1 and not os.listdir(tmp_path)


ON_A_GPU = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit(3)
import train
small = sys.argv[1:]
for loss in train.OBJECTIVES:
    for run in ("cpu off 1", "cuda off 1", "cuda bf16 2", "cuda fp16 2"):
        device, amp, parts = run.split()
        sys.argv[1:] = [*small, "--loss", loss, "--device", device, "--amp", amp,
                        "--accum-steps", parts, "--out", f"{loss} {run}"]
        train.train(train.options())
"""


def test_a_gpu_finds_what_a_cpu_finds(tmp_path):
    """Every objective's losses of six steps, in full and in half precision; skipped on a CPU."""
    if not (torch.version.cuda or torch.version.hip):
        pytest.skip("this PyTorch is for CPUs")
    done = subprocess.run([sys.executable, "-c", ON_A_GPU, *SMALL], cwd=tmp_path, text=True,
                          env=AS_STARTED | {"PYTHONPATH": ROOT}, capture_output=True)
    if done.returncode == 3:
        pytest.skip("there is no GPU")
    assert done.returncode == 0, done.stderr
    for loss in train.OBJECTIVES:
        runs = {p.name[len(loss) + 1:]: read_rows(p) for p in tmp_path.glob(f"{loss} *")}
        want = [float(row["loss"]) for row in runs.pop("cpu off 1")]
        for run, rows in runs.items():                      # errors grow from step to step
            few, bound = (6, 1e-2) if "off" in run else (2, 5e-2)
            got = [float(row["loss"]) for row in rows]
            assert len(got) == 6 and got[:few] == pytest.approx(want[:few], rel=bound), (loss, run)
