"""The training loop: bad input, resuming, signals, divergence, full disks, and 1 process = 2 processes.

    pytest tests/test_train.py
    KILLS=10 pytest -s tests/test_train.py -k killed          # ten SIGKILLs at random moments instead of two
"""
import csv, json, math, os, random, signal, subprocess, sys, time
import pytest
import torch
from PIL import Image
import train
from data import UserError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = "--steps 6 --batch-size 8 --layers 1 --width 64 --workers 0 --eval-every 0 --log-every 1 --save-every 2 --warmup 2 --amp off".split()
TWO_PROCESSES = [sys.executable, *"-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0".split()]


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def go(monkeypatch, tmp_path):
    """go("--loss", "clip", ...) trains in this process, in tmp_path/run unless told otherwise -> what train() returns."""
    def run(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, "--out", str(tmp_path / "run"), *map(str, more)])
        return train.train(train.options())
    return run


def read(run):
    """-> rows of log.csv without the times, the checkpoint."""
    rows = list(csv.DictReader(open(run / "log.csv", newline="")))
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "seconds")} for r in rows], torch.load(run / "last.pt", weights_only=True)


def at_call(n, function, act):
    """function, with act() before its n-th call."""
    calls = []

    def wrapped(*a, **k):
        calls.append(1)
        if len(calls) == n:
            act()
        return function(*a, **k)
    return wrapped


# ------------------------------------------------------------------------------------------------------------------------ bad input
def photos(folder, rows, header="image,caption"):
    for k in range(4):
        Image.new("RGB", (40, 30), (60 * k, 90, 120)).save(folder / f"{k}.png")
    (folder / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(folder / "t.csv")


GOOD = [f"{k}.png,a picture of thing {k}" for k in range(4)]


@pytest.mark.parametrize("options, sentence", [
    (["--model", "ViT-Z"], "unknown model 'ViT-Z': choose one of tiny"),
    (["--patch-size", "9"], "patches of 9 pixels do not divide an image of 56: try an image size of 54 or 63"),
    (["--batch-size", "2000000"], "larger than the data"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--sigma", "3"], "--sigma"),
    (["--keep", "0"], "--keep"), (["--accum-steps", "3"], "--accum-steps 3 does not divide the 8 pairs"),
    (["--data", "nowhere.csv"], "no such file"),
    (["--vocab", "learn:"], "learn:8000"),
    (["--vocab", "none.txt.gz"], "merges file"),
    (["--out", "/proc/none"], "can't write in --out /proc/none"),
    (["--pool", "cls", "--patches-through-h"], "h_v"),
    (["--loss", "clip", "--keep", "0.25"], "--keep means nothing to --loss clip: leave it out, or take --loss filip"),
    (["--loss", "pyramid", "--terms", "GS", "GS"], "twice"),
    (["--loss", "pyramid", "--lam", "0.7", "--mu", "0.7"], "--lam 0.7"),
    (["--loss", "pyramid", "--model", "RN50"], "ResNet, which has no vision_layers"),
])
def test_bad_options_are_one_sentence(go, options, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as e:
        go(*options)
    assert "\n" not in str(e.value) and not (tmp_path / "run" / "last.pt").exists()


def test_compiling_without_a_compiler_is_one_sentence(go, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn: at_call(1, fn, lambda: 1 / 0))
    with pytest.raises(UserError, match="--compile: PyTorch can't compile here .*leave it out"):
        go("--compile")


@pytest.mark.parametrize("rows, header, sentence", [
    (GOOD, "picture,text", "no column image and no column caption"),
    (GOOD[:2] + ["9.png,a picture that is not there"], "image,caption", r"t.csv line 4: there is no picture .*9.png"),
    (GOOD[:2] + ["2.png,  "], "image,caption", "line 4: the caption of 2.png is empty"),
    (GOOD[:2] + ["2.png,a cat, on a mat"], "image,caption", "line 4 has more cells"),
    (GOOD, "image,caption", r"--batch-size 8 is larger than the data \(4 pictures\)"),
])
def test_bad_csv_names_file_and_line(go, tmp_path, rows, header, sentence):
    with pytest.raises(UserError, match=sentence):
        go("--data", photos(tmp_path, rows, header))


def test_a_damaged_picture_stops_the_run_with_its_name(go, tmp_path):
    path = photos(tmp_path, GOOD)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:50])
    with pytest.raises(UserError, match=r"t.csv line 4: can't read .*2.png as a picture"):
        go("--data", path, "--batch-size", 4)


def test_pyramid_says_what_the_data_cannot_feed(go, tmp_path, capsys):
    path, pyramid = photos(tmp_path, GOOD), ("--loss", "pyramid", "--batch-size", 4, "--image-size", 32)
    assert go("--data", path, *pyramid, "--steps", 2)
    said = capsys.readouterr().out
    assert "without regions (--regions FILE.npz) and the column objects the terms GA RS LA RT fall away" in said and "first clause" in said
    assert "cross_global" not in read(tmp_path / "run")[0][0] and "peer" in read(tmp_path / "run")[0][0]
    with pytest.raises(UserError, match="nothing to feed them.*add the column objects"):
        go("--data", path, *pyramid, "--terms", "GA", "RS", "--overwrite")
    with pytest.raises(UserError, match="weight is 0"):
        go("--data", path, *pyramid, "--lam", 0.5, "--mu", 0.5, "--overwrite")


def test_a_batch_must_share_out_among_the_processes():
    from data import Batches, Scenes, Tokenizer
    with pytest.raises(UserError, match="evenly among 3 processes: try 6"):
        Batches(Scenes(20), Tokenizer([]), 8, 56, 32, rank=0, world=3)


def test_messages_and_exit_codes_of_the_command(tmp_path):
    """One sentence on the terminal, no traceback, exit code 2; --help is grouped."""
    run = lambda *a: subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *a], capture_output=True, text=True, cwd=tmp_path)
    for options in (["--model", "ViT-Z"], ["--loss", "none"]):
        r = run(*options)
        assert r.returncode == 2 and "Traceback" not in r.stderr and "choose" in r.stderr and len(r.stderr.strip().splitlines()) <= 2
    assert "optimisation:" in run("--help").stdout and not (tmp_path / "runs" / "none").exists()


# ------------------------------------------------------------------------------------------------------- a run's life and its numbers
def test_a_run_is_not_overwritten_nor_mixed_with_another(go, tmp_path):
    assert go("--loss", "clip", "--steps", 2)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for more, sentence in (([], "already holds a run"), (["--resume", "--width", 128], r"--width 64 \(now 128\)"),
                           (["--resume", "--loss", "filip"], r"--loss clip \(now filip\)")):
        with pytest.raises(UserError, match=sentence):
            go(*(["--loss", "clip", "--steps", 2] + more))
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    (tmp_path / "run" / "last.pt").write_bytes(before[:1000])
    with pytest.raises(UserError, match="can't be read as a checkpoint"):
        go("--loss", "clip", "--steps", 2, "--resume")


@pytest.mark.parametrize("loss", ["clip", "filip", "sparc"])
def test_a_broken_run_resumes_to_the_same_numbers(go, monkeypatch, tmp_path, loss):
    go("--loss", loss, "--out", tmp_path / "whole")

    def stop():
        raise MemoryError
    with monkeypatch.context() as m:
        m.setattr(train.models, "clamp_scales", at_call(4, train.models.clamp_scales, stop))      # after 3 steps; saved after 2
        with pytest.raises(MemoryError):
            go("--loss", loss)
    assert len(read(tmp_path / "run")[0]) == 3 and read(tmp_path / "run")[1]["step"] == 2
    go("--loss", loss, "--resume")
    (rows, whole), (again, resumed) = read(tmp_path / "whole"), read(tmp_path / "run")
    assert rows == again and [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(whole["model"][k], resumed["model"][k]) for k in whole["model"])


def test_sigterm_saves_and_ends(go, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train.models, "clamp_scales",
                        at_call(3, train.models.clamp_scales, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert go("--loss", "clip", "--save-every", 100) is False
    assert read(tmp_path / "run")[1]["step"] == 4 and "--resume goes on from there" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(go, monkeypatch, tmp_path):
    calls = []

    def diverging(*given):
        calls.append(1)
        return {"loss": train_clip(*given)["loss"] * (math.nan if len(calls) == 4 else 1)}
    train_clip = train.OBJECTIVES["clip"]
    monkeypatch.setitem(train.OBJECTIVES, "clip", diverging)
    with pytest.raises(UserError, match="step 4: the loss is nan.*Lower --lr"):
        go("--loss", "clip")
    ckpt = read(tmp_path / "run")[1]
    assert ckpt["step"] == 2 and all(torch.isfinite(x).all() for x in ckpt["model"].values())


def test_a_full_disk_loses_nothing(go, monkeypatch, tmp_path):
    real = torch.save

    def full(ckpt, f):
        if ckpt["step"] > 2:
            f.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        real(ckpt, f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="last.pt .*No space left on device.*kept"):
        go("--loss", "clip")
    assert read(tmp_path / "run")[1]["step"] == 2 and not list((tmp_path / "run").glob("*.tmp"))


def script(folder):
    """train.py without the evaluation at its end."""
    path = folder / "only_train.py"
    path.write_text(f"import sys; sys.path.insert(0, {ROOT!r})\nimport train\n"
                    "if __name__ == '__main__':\n    train.train(train.options())\n    train.leave_processes()\n")
    return str(path)


def test_killed_runs_end_with_the_same_numbers(tmp_path):
    """SIGKILL at random moments, checkpoints every 3 steps, data workers on."""
    kills, r = int(os.environ.get("KILLS", 2)), random.Random(time.time())
    options = [*SMALL, "--workers", "1", "--steps", "400", "--save-every", "3"]
    command = lambda name: [sys.executable, script(tmp_path), *options, "--resume", "--out", str(tmp_path / name)]
    subprocess.run(command("whole"), check=True, capture_output=True)
    done, steps = 0, []
    while done < kills:
        p = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = steps[-1] if steps else 0
        log, target = tmp_path / "killed" / "log.csv", before + 1 + int(r.random() * 380 / kills)
        while p.poll() is None and not (log.exists() and log.read_text().count("\n") - 1 >= target):
            time.sleep(0.005)
        assert p.poll() is None, "the run ended before it could be killed"
        time.sleep(r.random() * 0.05)
        p.kill(); p.wait()
        done += 1
        steps.append(max(before, log.read_text().count("\n") - 1))
    subprocess.run(command("killed"), check=True, capture_output=True)
    (rows, whole), (again, killed) = read(tmp_path / "whole"), read(tmp_path / "killed")
    print(f"\nkilled {done} times, after steps {steps}; final loss {again[-1]['loss']}, never killed {rows[-1]['loss']}")
    assert rows == again and all(torch.equal(whole["model"][k], killed["model"][k]) for k in whole["model"])


@pytest.mark.parametrize("loss", ["filip", "mgca", "sparc", "sparc --accum-steps 2"])        # the others' gathers: test_losses.py
def test_two_processes_equal_one(go, tmp_path, loss):
    """Loss and the gradient of every parameter after one step; AdamW's first moment is a tenth of the gradient."""
    options = [*SMALL, "--loss", *loss.split(), "--steps", "1", "--clip-grad", "0"]
    go(*options[len(SMALL):])
    subprocess.run([*TWO_PROCESSES, script(tmp_path), *options, "--out", str(tmp_path / "two")], check=True, capture_output=True)
    (one, a), (two, b) = read(tmp_path / "run"), read(tmp_path / "two")
    assert abs(float(one[0]["loss"]) - float(two[0]["loss"])) < 1e-4 and a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
    for i, x in a["optimizer"]["state"].items():
        y = b["optimizer"]["state"][i]["exp_avg"]
        assert (x["exp_avg"] - y).norm() <= 1e-4 * x["exp_avg"].norm() + 1e-7


@pytest.mark.parametrize("loss", [k for k in train.OBJECTIVES if k != "sparc"])
def test_every_objective_trains_resumes_and_is_evaluated(go, tmp_path, loss):
    """The loss goes down, and a run in two halves is the run in one."""
    more = ("--loss", loss, "--steps", 30, "--lr", 3e-3, "--save-every", 15)
    assert go(*more)
    rows, whole = read(tmp_path / "run")
    mean = lambda part: sum(float(r["loss"]) for r in part) / len(part)
    assert mean(rows[-5:]) < mean(rows[:5]) and all(math.isfinite(float(x)) for r in rows for x in r.values())
    with pytest.MonkeyPatch.context() as m, pytest.raises(InterruptedError):
        def stop():
            raise InterruptedError
        m.setattr(train.models, "clamp_scales", at_call(20, train.models.clamp_scales, stop))
        go(*more, "--overwrite")
    assert go(*more, "--resume")
    again, resumed = read(tmp_path / "run")
    assert again == rows and all(whole[part][k].equal(resumed[part][k]) for part in ("model", "head") for k in whole[part])
    metrics = train.evaluation.evaluate(str(tmp_path / "run"), n=20, progress=False)
    assert 0 <= metrics["retrieval"]["t2i_r10"] <= 100 and ("local_gap" in metrics["alignment"]) == (loss == "mgca")


@pytest.mark.parametrize("loss", list(train.OBJECTIVES))
def test_parts_equal_the_whole(go, tmp_path, loss):
    """Every gradient of one batch of 16 in one go and in 4 parts; AdamW's first moment is a tenth of the gradient."""
    moments, losses = [], []
    for parts in (1, 4):
        go("--loss", loss, "--steps", 1, "--batch-size", 16, "--accum-steps", parts, "--clip-grad", 0, "--overwrite", *["--no-leff"] * (loss == "pyramid"))
        rows, ckpt = read(tmp_path / "run")
        moments.append({k: x["exp_avg"] for k, x in ckpt["optimizer"]["state"].items()})
        losses.append(float(rows[0]["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and moments[0].keys() == moments[1].keys()
    assert all((x - moments[1][k]).norm() <= 1e-5 * x.norm() + 1e-9 for k, x in moments[0].items())


def test_schedule_and_decay():
    args = type("A", (), dict(lr=2.0, warmup=4, steps=12, weight_decay=0.1, beta2=0.98, optimizer="adamw"))
    assert [round(train.learning_rate(s, args), 6) for s in (0, 1, 3, 4, 8)] == [0.5, 1.0, 2.0, 2.0, 1.0] and train.learning_rate(11, args) < 0.1
    model = train.models.build("tiny")
    head = train.make_head("mgca", 8)
    assert any(p is head.prototypes for p in train.make_optimizer(head, args).param_groups[1]["params"])
    decayed, spared = (g["params"] for g in train.make_optimizer(model, args).param_groups)
    ids = {id(p) for p in spared}
    names = {n for n, p in model.named_parameters() if id(p) in ids}
    assert {"logit_scale", "token_embedding.weight", "positional_embedding", "visual.positional_embedding", "ln_final.weight"} <= names
    assert {id(model.visual.proj), id(model.text_projection), id(model.visual.conv1.weight)} <= {id(p) for p in decayed}
    assert len(decayed) + len(spared) == len(list(model.parameters()))


def slow_lamb(w, grads, lr, b1, b2, eps, decay, adapt):
    """The formula in LAMB's docstring, number by number."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for g in grads:
        m = [b1 * a + (1 - b1) * x for a, x in zip(m, g)]
        v = [b2 * a + (1 - b2) * x * x for a, x in zip(v, g)]
        u = [a / (math.sqrt(b) + eps) + decay * x for a, b, x in zip(m, v, w)]
        size = min(10, math.sqrt(sum(x * x for x in w)))
        ratio = size / math.sqrt(sum(x * x for x in u)) if adapt and size and any(u) else 1
        w = [x - lr * ratio * y for x, y in zip(w, u)]
    return w


@pytest.mark.parametrize("start", [[0.5, -1.0, 2.0, 0.1], [0.0] * 4, [30.0, -40.0, 5.0, 1.0]], ids=["usual", "zero tensor", "norm above 10"])
@pytest.mark.parametrize("shape, adapt_1d", [((2, 2), False), ((4,), True), ((4,), False)])
def test_lamb(start, shape, adapt_1d):
    w = torch.tensor(start, dtype=torch.float64).view(shape).requires_grad_()
    grads = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    optimizer = train.LAMB([w], lr=0.1, weight_decay=0.03, adapt_1d=adapt_1d)
    for g in grads:
        w.grad = torch.tensor(g, dtype=torch.float64).view(shape)
        optimizer.step()
    expected = slow_lamb(start, grads, 0.1, 0.9, 0.999, 1e-4, 0.03, adapt_1d or len(shape) > 1)
    torch.testing.assert_close(w.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_lamb_trains_and_resumes(go, tmp_path):
    assert go("--loss", "filip", "--optimizer", "lamb", "--steps", 4) and go("--loss", "filip", "--optimizer", "lamb", "--steps", 4, "--overwrite")
    assert read(tmp_path / "run")[1]["args"]["lr"] == pytest.approx(6e-3 / 8)                  # FILIP's, scaled from a batch of 512 to 8


def test_benchmark_reports_and_leaves_nothing(go, tmp_path, capsys):
    assert go("--loss", "mgca", "--benchmark") is False and not (tmp_path / "run").exists()
    said = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split()[0] for line in said] == ["data", "forward", "loss", "backward", "optimiser", "step"] and "images/s" in said[-1]
    times = [float(line.split()[1]) for line in said]
    assert min(times) > 0 and abs(sum(times[:-1]) - times[-1]) < 0.5


@pytest.mark.parametrize("python", [[sys.executable], TWO_PROCESSES], ids=["one process", "two"])
def test_the_command_trains_evaluates_and_draws(tmp_path, python):
    r = subprocess.run([*python, os.path.join(ROOT, "train.py"), *SMALL, "--out", "here"], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    assert {"last.pt", "log.csv", "args.json", "metrics.json", "align.png"} == set(os.listdir(tmp_path / "here"))
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert 0 <= metrics["retrieval"]["i2t_r1"] < 20 and "retrieval i2t_r1" in r.stdout
