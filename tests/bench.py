"""Bench: the README's tables, a command each.

    python tests/bench.py objectives              # train every objective with three seeds: a table
    python tests/bench.py pyramid                 # likewise PyramidCLIP's components, step by step
    python tests/bench.py filip                   # late interaction by blocks and by one einsum
    python tests/bench.py retrieval               # eval.py's similarities at MSCOCO's size
    python tests/bench.py table5                  # FILIP's Table 5 beside a model of its cost
    pip install open_clip_torch && python tests/bench.py step        # a step beside open_clip's

Covers: SPARC's comparison of objectives (4, D.3, Table 6), PyramidCLIP Tables 5, 13 and 14, the
cost of FILIP 3.1, and its Table 5.

objectives and pyramid train one run for each row and seed, in OUT/ROW-SEED, and write OUT/table.md.
Finished runs are skipped, stopped ones go on: repeat the command until the table is there. What
follows a -- goes to train.py, such as `objectives --out runs/wide -- --width 256`; choose another
OUT then. Each run's output is in its bench.log.

filip, retrieval and step measure speed, so nothing else should compute meanwhile. Rivals take
turns, round by round, so that a slow moment hits all of them: filip takes the best round, step the
ratios within a round. Each rival has a process of its own, and so a peak memory of its own. What
its C library does with freed memory is its own too: train.py changes that (keep_memory), open_clip
does not, and "memory kept" is open_clip with that change.

Differs from the papers: scenes, tiny towers and a thousand steps stand for their data and models.
"""
import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import losses
import model as models
from data import Batches, Scenes, Tokenizer, normalize
from eval import late_flops, retrieval_hits, similarities
from model import UserError
from train import keep_memory, make_optimizer, peak_memory, pick_precision

# ------------------------------------- rows of the tables: their names, and options of train.py
PRINTED = "--loss sparc --spare 0 --strangers 0 --local-weight 0.15"    # the paper's negatives
ALL_OBJECTIVES = {
    "clip": "--loss clip",
    "pacl": "--loss pacl",
    "gloria": "--loss gloria",
    "mgca": "--loss mgca",
    "filip": "--loss filip",
    "clip+filip": "--loss clip+filip",
    "pyramid": "--loss pyramid",
    "sparc": f"{PRINTED} --sigma 0.5",
    "sigma0": f"{PRINTED} --sigma 0",                       # SPARC Table 6
    "softmax": f"{PRINTED} --softmax",                      # SPARC Table 6
}
TABLE_5 = {                                                 # and 13: each adds one component
    "peers": "--loss pyramid --terms GS LT --hard-targets --no-leff",
    "+global": "--loss pyramid --terms GS LT GA RS --hard-targets --no-leff",
    "+local": "--loss pyramid --terms GS LT GA RS LA RT --hard-targets --no-leff",
    "+soften": "--loss pyramid --terms GS LT GA RS LA RT --no-leff",
    "+leff": "--loss pyramid --terms GS LT GA RS LA RT",
}
TABLE_14 = {
    "GT": "--loss pyramid --terms GT --hard-targets --no-leff",
    "LT": "--loss pyramid --terms LT --hard-targets --no-leff",
    "GS+LT": "--loss pyramid --terms GS LT --hard-targets --no-leff",
    "GS+LT+RA": "--loss pyramid --terms GS LT RA --hard-targets --no-leff",
}
TABLES = {"objectives": ALL_OBJECTIVES, "pyramid": TABLE_5, "table14": TABLE_14}

# The columns: title -> decimals, and the places in metrics.json of which the cell shows the mean.
COLUMNS = {
    "R@1": (1, ["retrieval i2t_r1", "retrieval t2i_r1"]),
    "shapes": (1, ["classification shape"]),
    "shape probe": (1, ["probe shape"]),                    # PyramidCLIP Table 4
    "colours": (1, ["classification colour"]),
    "mIoU": (1, ["segmentation miou"]),
    "colour words": (1, ["alignment colour_word_acc"]),
    "shape words": (1, ["alignment shape_word_acc"]),
    "local gap": (2, ["alignment local_gap"]),
    "drop, k = 2": (1, ["alignment drop_k2"]),              # SPARC Table 7
    "K-Pna": (1, ["faithfulness k_pna"]),                   # SPARC Table 2
    "swap_acc": (1, ["composition swap_acc"]),
    "unseen R@1": (1, ["composition unseen_i2t_r1", "composition unseen_t2i_r1"]),
    "ms a step": (0, ["cost ms_per_step"]),
}


# ------------------------------------------------------------------------------------ many runs
def cores():
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def read_json(path):
    """What a JSON file holds; {} if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


class Job:
    """One run: its folder, the commands that it still needs, and the process that is at work."""

    def __init__(self, folder, steps, options):
        self.name, self.folder, self.steps = folder.name, folder, steps
        self.process, self.ended = None, self.done()
        train = ["train.py", "--out", folder, "--steps", steps, "--resume", *options]
        self.commands = [train]
        if (folder / "last.pt").exists() and self.logged() == steps:
            # where last.pt is older than the log, train.py follows
            self.commands = [["eval.py", folder], train]

    def metrics(self):
        return read_json(self.folder / "metrics.json")

    def done(self):
        return self.metrics().get("about", {}).get("step") == self.steps

    def logged(self):
        """The last step in log.csv; 0 if there is none."""
        path = self.folder / "log.csv"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0

    def progress(self):
        return self.steps if self.ended else min(self.logged(), self.steps)

    def start(self, command, threads):
        self.folder.mkdir(parents=True, exist_ok=True)
        script, *options = map(str, command)
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(self.folder / "bench.log", "wb") as log:
            self.process = subprocess.Popen([sys.executable, str(ROOT / script), *options],
                                            stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, env=env)

    def works(self, threads):
        """Start the next command if none is at work -> False if there is none left to start."""
        if self.process and self.process.poll() is None:
            return True
        self.ended = self.done() or not self.commands
        if not self.ended:
            self.start(self.commands.pop(0), threads)
        return not self.ended

    def reason(self):
        """Why it failed: the last line that it wrote, or the signal that ended it."""
        if self.process.returncode < 0:
            return f"it was killed by {signal.Signals(-self.process.returncode).name}"
        text = (self.folder / "bench.log").read_text(errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return lines[-1] if lines else f"it ended with exit code {self.process.returncode}"

    def stop(self):
        """Ask it to stop, and wait until it has saved its state."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def run_all(jobs, at_a_time, seconds=0.5):
    """Bring all jobs to their end, so many at a time -> the names of those that failed."""
    waiting, running, failed = [job for job in jobs if not job.ended], [], []
    threads = max(1, cores() // at_a_time)
    bar = tqdm(total=sum(job.steps for job in jobs), initial=sum(job.progress() for job in jobs),
               bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left {desc}",
               smoothing=0, miniters=0, mininterval=1 if sys.stderr.isatty() else 60,
               disable=not waiting)
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                running.append(waiting.pop(0))
            for job in list(running):
                if not job.works(threads):
                    running.remove(job)
                    if not job.done():
                        failed.append(job.name)
                        bar.write(f"{job.name} failed: {job.reason()}", file=sys.stderr)
            bar.set_description_str(", ".join(job.name for job in running), refresh=False)
            bar.update(sum(job.progress() for job in jobs) - bar.n)
            if running:
                time.sleep(seconds)
    finally:                                                # Ctrl-C, SIGTERM: none is left behind
        bar.close()
        for job in running:
            job.stop()
    return failed


# ------------------------------------------------------------------------------------- the table
def value(metrics, places):
    """The mean of what stands at these places; None where there is nothing."""
    found = []
    for place in places:
        group, key = place.split()
        found.append(metrics.get(group, {}).get(key))
    return None if None in found else statistics.mean(found)


def cell(values, digits):
    """Mean ± standard deviation; a number without decimals is a mean alone."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    if digits and len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def table(rows):
    """{row: metrics of each seed that is finished} -> Markdown. A dash: no seed is finished. An
    empty cell: the objective has no such number."""
    lines = [["", "seeds", *COLUMNS]]
    for name, seeds in rows.items():
        cells = [str(len(seeds))]
        for digits, places in COLUMNS.values():
            values = [value(metrics, places) for metrics in seeds]
            values = [x for x in values if x is not None]
            cells.append(cell(values, digits) if seeds else "-")
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = "|".join("-" * (width + 1) + ":" for width in widths[1:])
    text = []
    for first, *cells in lines:
        cells = [f"{x:>{width}}" for x, width in zip(cells, widths[1:])]
        text.append(f"| {first:{widths[0]}} | {' | '.join(cells)} |")
    text.insert(1, f"|{'-' * (widths[0] + 2)}|{rule}|")
    return "\n".join(text)


def machine():
    """The name of the GPU, or else of the CPU, and the number of cores."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{name}, {cores()} cores"


def note(jobs, args):
    """The line below the table: what was run, where, in which precision, for how long."""
    finished = [job for job in jobs if job.done()]
    costs = [job.metrics()["cost"] for job in finished]
    minutes = round(sum(cost["steps"] * cost["ms_per_step"] for cost in costs) / 60_000)
    amps = {read_json(job.folder / "args.json").get("amp", "?") for job in finished}
    precision = " and ".join(sorted(amps)).replace("off", "fp32") or "no precision"
    seeds = "One seed"
    if args.seeds > 1:
        seeds = f"Mean ± standard deviation of {args.seeds} seeds"
    text = (f"{seeds}, {args.steps:,} steps each; {machine()}, {precision}; {args.jobs} at a time, "
            f"{minutes // 60} h {minutes % 60} min of training in all")
    missing = [job.name for job in jobs if job not in finished]
    if missing:
        text += f"; missing: {', '.join(missing)}"
    return text + "."


def make_jobs(args, out):
    """-> {(row, seed): Job}, seed by seed: stopped early, it has each row about as often."""
    rows, jobs = TABLES[args.table], {}
    unknown = set(args.only or ()) - set(rows)
    if unknown:
        raise UserError(f"--only {' '.join(sorted(unknown))}: the rows are {' '.join(rows)}")
    for seed in range(args.seeds):
        for row in rows:
            if row in (args.only or rows):
                options = [*rows[row].split(), "--seed", seed, *args.extra]
                jobs[row, seed] = Job(out / f"{row}-{seed}", args.steps, options)
    return jobs


def compare_runs(args):
    """Train every row with every seed, and write the table of those that are finished."""
    out = pathlib.Path(args.out)
    jobs = make_jobs(args, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't write in --out {out} ({e.strerror}): choose another") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    failed = run_all(list(jobs.values()), args.jobs)
    finished = {row: [] for row, _ in jobs}
    for (row, _), job in jobs.items():
        if job.done():
            finished[row].append(job.metrics())
    text = f"{table(finished)}\n\n{note(list(jobs.values()), args)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")
    if failed:
        raise SystemExit(1)


# --------------------------------------------------------------------- rivals, a process for each
def spawn(function, *inputs):
    """function(pipe, *inputs) in a new process -> our end of the pipe. A dead one's: EOFError."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=function, args=(theirs, *inputs), daemon=True).start()
    theirs.close()
    return ours


# ------------------------------------------------------------------------- FILIP's similarity
P, L, D = 49, 32, 256                                       # patches, text positions, dimension
FILIP = {                                                   # losses.DENSE, dtype of the inputs
    "einsum fp32": (math.inf, torch.float32),
    "einsum bf16": (math.inf, torch.bfloat16),
    "blocks fp32": (0, torch.float32),
    "blocks bf16": (0, torch.bfloat16),
}


def late_interaction(n, dtype):
    """Forward and backward pass of n pictures and n texts -> seconds, and the megabytes needed
    beyond the inputs, their gradients and what the process held before."""
    V = torch.randn(n, P, D, dtype=dtype, requires_grad=True)
    T = torch.randn(n, L, D, dtype=dtype, requires_grad=True)
    M = torch.arange(L) < torch.randint(4, L + 1, (n, 1))   # (C, L)
    V.grad, T.grad = torch.zeros_like(V), torch.zeros_like(T)
    before, start = peak_memory(), time.perf_counter()
    s_image, s_text = losses.filip_similarity(V, T, M)
    (s_image.diagonal().sum() + s_text.logsumexp(0).sum()).backward()
    return time.perf_counter() - start, peak_memory() - before


def filip_rival(pipe, name, batch):
    losses.DENSE, dtype = FILIP[name]
    late_interaction(8, dtype)                              # a small warm-up
    pipe.send(late_interaction(batch, dtype))


def compare_filip(args):
    names = args.only or list(FILIP)
    rounds = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            rounds[name].append(spawn(filip_rival, name, args.batch).recv())
    best = {name: min(results) for name, results in rounds.items()}
    print(f"late interaction, forward + backward, B = C = {args.batch}, P {P}, L {L}, D {D}, "
          f"{torch.get_num_threads()} threads")
    seconds0, mb0 = best.get("blocks bf16", best[names[0]])
    for name, (seconds, mb) in best.items():
        print(f"{name:12} {seconds:8.2f} s {seconds / seconds0:7.2f} x "
              f"{mb:9,.0f} MB {mb / mb0:7.1f} x")


# ------------------------------------------------------------------------------ retrieval at size
def retrieval_rival(pipe, loss, pictures):
    """Send the seconds of ranking random features of pictures, five captions each, and the MB."""
    owner = torch.arange(pictures).repeat_interleave(5)     # (C,)
    V, T = torch.randn(pictures, P, D), torch.randn(len(owner), L, D)
    M = torch.arange(L) < torch.randint(8, L + 1, (len(owner), 1))      # (C, L)
    start = time.perf_counter()
    s = similarities(losses.OBJECTIVES[loss], V[:, 0], V, T[:, 0], T, M)
    retrieval_hits(*s, owner)
    pipe.send((time.perf_counter() - start, peak_memory()))


def measure_retrieval(args):
    print(f"R@k both ways: {args.pictures:,} pictures, {5 * args.pictures:,} captions, P {P}, "
          f"L 8 to {L}, D {D}, {torch.get_num_threads()} threads")
    for loss in args.only or ("clip", "pacl", "filip"):     # the others are ranked as clip
        seconds, mb = spawn(retrieval_rival, loss, args.pictures).recv()
        print(f"{loss:12} {seconds:8.1f} s {mb:9,.0f} MB in all")


# ----------------------------------------------------------------------- FILIP's Table 5, modelled
# dimensions, bytes a number, share of the tokens; seconds a step, MB
FILIP_TABLE_5 = ((512, 4, 1.0, 2.85, 26000), (512, 2, 1.0, 2.67, 23468), (256, 2, 1.0, 2.31, 22382),
                 (256, 2, 0.5, 1.61, 16336), (256, 2, 0.25, 1.39, 16100))
CLIP_SECONDS, CLIP_MB = 1.31, 14300                         # of the same step with CLIP's loss
FULL = FILIP_TABLE_5[2]                                     # its added time is 1 here


def filip_flops(D, keep, b=512, devices=8, P=49, L=77):
    """What FILIP adds to CLIP's step on one device of Table 5, which holds b pairs. Both sides of
    eqs. 4 and 5 are reduced (3.1.1), so the cost is quadratic in keep, but for choosing tokens."""
    choice = late_flops(b * b, P, L, D) * 2 / 3 if keep < 1 else 0
    return 2 * late_flops(b * b * devices, int(keep * P), int(keep * L), D) + choice


def filip_table(b=512, devices=8, P=49, L=77):
    """FILIP's Table 5 (ViT-B/32) beside the model, as text: time over CLIP's and operations, as
    shares of the full cost *; MB. The first row's 60 GB of similarities were computed in parts."""
    lines = [f"{'share of the full cost *':24}{'paper':>7}{'model':>7}{'ratio':>7}{'TFLOP':>8}"
             f"{'MB received':>13}{'MB all at once':>16}{'MB over CLIP (paper)':>22}"]
    for row in FILIP_TABLE_5:
        D, size, keep, seconds, mb = row
        kI, kT, cost = int(keep * P), int(keep * L), filip_flops(D, keep)
        paper = (seconds - CLIP_SECONDS) / (FULL[3] - CLIP_SECONDS)
        model = cost / filip_flops(256, 1.0)
        received = b * (devices - 1) * (kI + kT) * D * size / 2 ** 20
        at_once = 2 * b * b * devices * kI * kT * size / 2 ** 20
        head = f"{D} x {size} bytes {keep:5.0%}" + " *" * (row == FULL)
        lines.append(f"{head:24}{paper:7.2f}{model:7.2f}{model / paper:7.2f}{cost / 1e12:8.1f}"
                     f"{received:13,.0f}{at_once:16,.0f}{mb - CLIP_MB:22,}")
    return "\n".join(lines)


def print_table_5(args):
    print(filip_table())


# --------------------------------------------------------------------------------- a training step
RIVALS = ("ours", "sparc", "sparc, strangers", "local loss", "open_clip", "open_clip, memory kept")


def model_and_batches(args):
    """-> our model, and eight batches of scenes as it takes them."""
    data = Scenes(100_000, 0, models.CONFIGS[args.model]["image_size"])
    tok = Tokenizer.train(data.texts(), 1000)
    sizes = {}
    if args.model == "tiny":
        sizes = {"vocab_size": tok.vocab_size, "patches_through_h": True}
    model = models.build(args.model, **sizes)
    c = model.config
    drawn = Batches(data, tok, args.batch, c["image_size"], c["context_length"])
    batches = [drawn[k] for k in range(8)]
    return model, [batch | {"images": normalize(batch["images"])} for batch in batches]


def open_clip_rival(c):
    """open_clip's model with the sizes c, and its loss(batch)."""
    import open_clip
    vision = open_clip.model.CLIPVisionCfg(
        layers=c["vision_layers"], width=c["vision_width"], head_width=64,
        patch_size=c["patch_size"], image_size=c["image_size"])
    text = open_clip.model.CLIPTextCfg(
        context_length=c["context_length"], vocab_size=c["vocab_size"], width=c["text_width"],
        heads=c["text_heads"], layers=c["text_layers"])
    model = open_clip.model.CLIP(c["embed_dim"], vision, text, quick_gelu=c["act"] == "quickgelu")
    clip_loss = open_clip.loss.ClipLoss()

    def loss(batch):                    # reads all positions; its end of text is the largest id too
        ids = F.pad(batch["ids"], (0, c["context_length"] - batch["ids"].shape[1]))
        return clip_loss(*model(batch["images"], ids))
    return model, loss


def make_rival(name, args, autocast):
    """-> model, eight batches, loss(batch) -> scalar."""
    model, batches = model_and_batches(args)
    if name.startswith("open_clip"):
        model, loss = open_clip_rival(model.config)
        return model, batches, loss
    if name == "local loss":            # from the features on: neither towers nor optimiser
        with autocast:
            features = [model(**batch) for batch in batches]
        batches = [{k: x.detach().requires_grad_(x.is_floating_point()) for k, x in f.items()}
                   for f in features]

        def local(f):
            return losses.OBJECTIVES["sparc"].loss(f, None)["local"]
        return model, batches, local
    objective = losses.OBJECTIVES["sparc" if name.startswith("sparc") else "clip"]
    options = {"spare": 2, "strangers": 2} if "strangers" in name else {}       # tiny's defaults

    def loss(batch):
        return objective.loss(model(**batch), None, **options)["loss"]
    return model, batches, loss


def step_rival(pipe, name, args, amp):
    """Send what a step costs in FLOP. Then, whenever a number comes, take three steps, and send how
    many seconds one took."""
    if not name.startswith("open_clip") or "kept" in name:
        keep_memory()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
    model, batches, loss = make_rival(name, args, autocast)
    optimizer = make_optimizer(model, argparse.Namespace(optimizer="adamw", lr=1e-4, beta2=0.98,
                                                         weight_decay=0.1))

    def step(batch):
        with autocast:
            x = loss(batch)
        x.backward()
        if name != "local loss":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter, autocast:
        loss(batches[0]).backward()
    optimizer.zero_grad(set_to_none=True)
    pipe.send(counter.get_total_flops())
    for turn in iter(pipe.recv, None):
        step(batches[(turn - 1) % 8])                       # brings caches and threads back
        start = time.perf_counter()
        for k in range(3):
            step(batches[(turn + k) % 8])
        pipe.send((time.perf_counter() - start) / 3)


def matmul_rate(dtype, n=2048, times=5):
    """Operations a second of an n x n x n matmul."""
    x = torch.randn(n, n, dtype=dtype)
    x @ x
    start = time.perf_counter()
    for _ in range(times):
        x @ x
    return times * 2 * n ** 3 / (time.perf_counter() - start)


def take_turns(pipes, rounds):
    """-> {name: seconds of a step, one number a round}."""
    times = {name: [] for name in pipes}
    for turn in tqdm(range(rounds + 1), unit="round"):
        for name, pipe in pipes.items():
            pipe.send(3 * turn)
            seconds = pipe.recv()
            if turn:                                        # the first round is slower
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)                                     # enough
    return times


def quantile(values, share):
    return sorted(values)[int(share * len(values))]


def compare_step(args):
    """A training step of CLIP's objective, ours and open_clip's, with the same pictures, captions,
    sizes, optimiser and precision; SPARC's step; and its local loss alone."""
    tiny, names = args.model == "tiny", RIVALS
    args.batch = args.batch or (128 if tiny else 32)
    rounds = args.rounds or (30 if tiny else 5)
    if importlib.util.find_spec("open_clip") is None:
        print("open_clip is not installed (pip install open_clip_torch): our steps alone")
        names = RIVALS[:4]
    amp = pick_precision(args.amp, torch.device("cpu"))
    dtype = losses.DTYPES.get(amp, torch.float32)
    rate = matmul_rate(dtype)
    pipes = {name: spawn(step_rival, name, args, amp) for name in names}
    flop = {name: pipe.recv() for name, pipe in pipes.items()}
    times = take_turns(pipes, rounds)
    print(f"{args.model}, batch {args.batch}, --amp {amp}, {torch.get_num_threads()} threads; "
          f"a 2048-cube matmul in {dtype} runs at {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'':24} {'ms a step':>9} {'images/s':>9} {'/ ours':>7} {'middle half':>13} "
          f"{'GFLOP':>7} {'at least ms':>11}")
    for name, seconds in times.items():
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], seconds)]
        low, ratio, high = (quantile(ratios, share) for share in (0.25, 0.5, 0.75))
        median = quantile(seconds, 0.5)
        print(f"{name:24} {1000 * median:9.1f} {args.batch / median:9,.0f} {ratio:7.2f} "
              f"{low:6.2f} {high:6.2f} {flop[name] / 1e9:7.1f} {1000 * flop[name] / rate:11.1f}")


# ------------------------------------------------------------------------------------ the command
def at_least_1(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def flags():
    ap = argparse.ArgumentParser(description="The README's tables: quality, time, memory.")
    commands = ap.add_subparsers(dest="what", required=True)

    def command(name, help, function):
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=function)
        return sub

    for name, help in (("objectives", "train every objective: a table"),
                       ("pyramid", "train PyramidCLIP with more and more components: a table")):
        sub = command(name, f"{help}; what follows a -- goes to train.py", compare_runs)
        sub.add_argument("--seeds", type=at_least_1, help="train with seeds 0 to SEEDS - 1 "
                         "(3; --table14: 1)")
        sub.add_argument("--steps", type=at_least_1, default=1000, help="steps of a run (1000)")
        sub.add_argument("--out", help="write the runs and table.md there (objectives: runs/bench; "
                         "pyramid: runs/bench-pyramid; --table14: runs/bench-table14)")
        sub.add_argument("--jobs", type=at_least_1, default=1, help="train so many runs at a time, "
                         "each with its share of the cores (1)")
        sub.add_argument("--only", nargs="+", metavar="ROW", help="train these rows alone")
    sub.add_argument("--table14", action="store_true", help="train the rows of Table 14")

    sub = command("filip", "late interaction by blocks and by one einsum", compare_filip)
    sub.add_argument("--batch", type=at_least_1, default=512, help="pairs (512)")
    sub.add_argument("--only", nargs="+", choices=list(FILIP), help="compare these alone")
    sub.add_argument("--rounds", type=at_least_1, default=2, help="turns of each (2)")

    sub = command("retrieval", "rank pictures and captions as eval.py does", measure_retrieval)
    sub.add_argument("--pictures", type=at_least_1, default=5000,
                     help="rank so many, with five captions each (5000)")
    sub.add_argument("--only", nargs="+", choices=list(losses.OBJECTIVES), metavar="LOSS",
                     help="measure these alone (clip pacl filip)")

    command("table5", "FILIP's Table 5 beside a model of its cost", print_table_5)

    sub = command("step", "a training step, SPARC's and open_clip's", compare_step)
    sub.add_argument("--batch", type=at_least_1, help="pairs (tiny 128, else 32)")
    sub.add_argument("--model", default="tiny", help="choose the towers, ViTs alone (tiny)",
                     choices=[name for name, config in models.CONFIGS.items()
                              if isinstance(config["vision_layers"], int)])
    sub.add_argument("--amp", default="auto", choices=("auto", "off", "bf16"),
                     help="choose the precision; auto takes bf16 where it is faster")
    sub.add_argument("--rounds", type=at_least_1, help="turns of each (tiny 30, else 5)")
    return ap


def options(argv):
    """The command line -> args. What follows a -- is args.extra, for train.py."""
    end = argv.index("--") if "--" in argv else len(argv)
    args = flags().parse_args(argv[:end])
    args.extra = argv[end + 1:]
    if args.run is not compare_runs:
        if args.extra:
            raise UserError(f"{args.what} takes nothing behind a --")
        return args
    args.table, seeds, out = args.what, 3, "runs/bench"
    if getattr(args, "table14", False):
        args.table, seeds = "table14", 1
    if args.table != "objectives":
        out += f"-{args.table}"
    args.seeds, args.out = args.seeds or seeds, args.out or out
    return args


def main():
    try:
        args = options(sys.argv[1:])
        args.run(args)
    except UserError as e:
        raise SystemExit(f"bench.py: {e}")
    except EOFError:
        raise SystemExit("bench.py: one of the processes has died; what it said stands above")
    except KeyboardInterrupt:
        raise SystemExit("bench.py: stopped; objectives and pyramid go on when started again")


if __name__ == "__main__":
    main()
