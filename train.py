"""Train: one process, or many under torchrun; CPU or GPU; built-in scenes or real pictures.

    torchrun train.py --loss sparc                                    # scenes, no download, minutes on two CPU cores
    torchrun --nproc-per-node 8 train.py --loss filip --model ViT-B/32 --data photos/train.csv --batch-size 4096
    python train.py --loss filip --benchmark                          # where a step's time goes, for any model and objective

Covers: SPARC 4.1 and D.4 (AdamW, warm-up, cosine, weights of the losses), FILIP 3.1.1 and A.3 (half-precision gather, token selection, LAMB),
PyramidCLIP 3.2 and A.2 (crops, blocks with LeFF), and the switches for the papers' ablations.

A run folder holds last.pt (weights, optimiser, vocabulary, options), log.csv, args.json and, at the end, metrics.json and align.png.
What a step sees depends on the seed and the step alone, so a run that is killed and resumed ends with the numbers of one that was not.

Differs from the papers: the defaults suit scenes. SPARC trains with 16,384 pairs a batch, threshold 1/P, local weight 0.5 to 10 and
patches that do not pass through h_v: `--sigma 1/P --local-weight 1 --no-patches-through-h` gives that (README, "What we found"). Weight decay spares
gains, biases, embeddings and the scale (FILIP's list; SPARC gives none). The scale is clamped to 1..100 after each step. FILIP is known to
be unstable: what steadies it is that list, a larger --weight-decay, the clamp, --clip-grad, and the company of CLIP's loss (clip+filip).
BatchNorm (RN50, LeFF) sees the pictures of one process, or of all GPUs. PyramidCLIP's crops are off on scenes, whose captions tell places.
"""
import argparse, csv, ctypes, json, math, os, pathlib, random, shutil, signal, sys, tempfile, time
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
import eval as evaluation
import model as models
import visualize
from data import Batches, Scenes, Tokenizer, UserError, normalize, open_dataset, write
from losses import DTYPES, OBJECTIVES, SIX, WITHIN_PAIR, make_head

# For --model tiny: what suits 56-pixel scenes, and what suits photographs.
DEFAULTS = {"scenes": dict(image_size=56, patch_size=8, layers=2, width=128, steps=2800, lr=1.5e-3, crop=None, local_crop=None, vocab="learn:1000", context_length=32, sigma=0.5, local_weight=0.15),
            "files": dict(image_size=112, patch_size=16, layers=4, width=192, steps=3000, lr=1e-3, crop=0.5, local_crop=0.5, vocab="learn:8000", context_length=48, sigma=0.5, local_weight=0.15)}

# Options that only some objectives look at.
ONLY = {"keep": ("filip", "clip+filip"), "gather_dtype": ("filip", "clip+filip", "pacl", "gloria"),
        **dict.fromkeys(("global_weight", "local_weight", "sigma", "softmax", "drop_special"), ("sparc",)),
        **dict.fromkeys(("alpha", "hard_targets", "lam", "mu", "terms", "leff", "local_crop", "regions"), ("pyramid",))}


def options():
    ap = argparse.ArgumentParser(description="Train an image-text model with one of the papers' objectives.", usage="train.py [options]   (--help lists them)",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = ap.add_argument_group("what to train")
    g.add_argument("--loss", default="sparc", choices=list(OBJECTIVES), help="objective")
    g.add_argument("--model", default="tiny", help=f"one of {', '.join(models.CONFIGS)}")
    g.add_argument("--pool", choices=("cls", "mean"), help="[CLS] and EOT, or averages and h_v (None: the model's own; tiny: mean)")
    g.add_argument("--data", default="scenes", help="scenes (built in), or a CSV with the columns image,caption")
    g.add_argument("--val", help="CSV to validate on (None: the file val.csv beside --data, if there is one)")
    g.add_argument("--vocab", help="learn:N (from the captions) or the path of CLIP's merges file (None: scenes learn:1000, files learn:8000)")
    g.add_argument("--context-length", type=int, help="longest text in tokens; longer ones are cut (None: the model's; tiny: scenes 32, files 48)")
    g.add_argument("--image-size", type=int, help="picture side in pixels (None: the model's; tiny: scenes 56, files 112)")
    g.add_argument("--patch-size", type=int, help="patch side in pixels (None: the model's; tiny: scenes 8, files 16)")
    g.add_argument("--layers", type=int, help="blocks in each tower (None: the model's; tiny: scenes 2, files 4)")
    g.add_argument("--width", type=int, help="width of both towers, a multiple of 64 (None: the model's; tiny: scenes 128, files 192)")
    g.add_argument("--crop", type=float, help="least area of the random crop, 1 for none but a random place (None: scenes no crop, files 0.5; "
                   "pyramid, whose global crop it is: files 0.9)")
    g.add_argument("--regions", help="pyramid: .npz of a detector's regions, (M, 2052) for each image of --data; without it L_RS and L_RT fall away")
    g.add_argument("--paraphrase", type=float, default=0.0, help="scenes: share of captions told in other words (FILIP's back-translation)")
    g.add_argument("--mismatch", type=float, default=0.0, help="scenes: probability of each kind of mismatch between picture and words")
    g = ap.add_argument_group("objective")
    g.add_argument("--global-weight", type=float, default=0.5, help="sparc: weight of the global loss")
    g.add_argument("--local-weight", type=float, help="sparc: weight of the local loss; the paper tries 0.5 to 10 (None: 1; tiny: 0.15)")
    g.add_argument("--sigma", type=lambda s: s if s == "1/P" else float(s), help="sparc: sparsity threshold in 0..1; 0 keeps all patches, "
                   "1/P (patches) is the paper's (None: 1/P; tiny: 0.5)")
    g.add_argument("--softmax", action="store_true", help="sparc: softmax weights in place of eqs. 2-4 (ablation)")
    g.add_argument("--drop-special", action="store_true", help="sparc: leave BOS and EOT out of the local loss")
    g.add_argument("--patches-through-h", action=argparse.BooleanOptionalAction, help="mean-pooling towers: patches pass through h_v in training "
                   "too, as they do in SPARC's segmentation (None: yes for tiny, no for the others)")
    g.add_argument("--keep", type=float, default=1.0, help="filip: share of the tokens sent to the other side; the paper's is 0.25")
    g.add_argument("--gather-dtype", default="fp32", choices=list(DTYPES), help="filip, pacl, gloria: precision of the tokens sent between processes; "
                   "FILIP's is fp16")
    g = ap.add_argument_group("PyramidCLIP")
    g.add_argument("--terms", nargs="+", default=list(SIX), choices=[*SIX, "RA", "GT", "LS"], help="picture side (Global crop, Local crop, Regions), "
                   "text side (Summary, Text, objects with Attributes)")
    g.add_argument("--alpha", type=float, default=0.2, help="softness of the targets")
    g.add_argument("--hard-targets", action="store_true", help="no softening (ablation)")
    g.add_argument("--lam", type=float, default=1 / 3, help="weight of GA and RS")
    g.add_argument("--mu", type=float, default=1 / 3, help="weight of LA and RT; GS and LT have what is left")
    g.add_argument("--leff", action=argparse.BooleanOptionalAction, help="locally-enhanced feed-forward in all but the last quarter of a ViT's blocks "
                   "(None: yes for pyramid)")
    g.add_argument("--local-crop", type=float, help="least area of the local crop (None: scenes the picture itself, files 0.5)")
    g = ap.add_argument_group("optimisation")
    g.add_argument("--steps", type=int, help="optimiser steps; the schedule ends there (None: scenes 2800, files 3000)")
    g.add_argument("--batch-size", type=int, default=128, help="pairs in a step, over all processes together; halve it if memory runs out")
    g.add_argument("--optimizer", default="adamw", choices=("adamw", "lamb"), help="lamb is FILIP's")
    g.add_argument("--lr", type=float, help="peak learning rate (None: scenes 1.5e-3, files 1e-3, full-size models 5e-4; lamb: FILIP's 6e-3 for a batch "
                   "of 512, times the square root of batch / 512)")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up from 0; raise it if the loss sticks at ln(batch)")
    g.add_argument("--weight-decay", type=float, default=0.1, help="AdamW's, on weight matrices only")
    g.add_argument("--beta2", type=float, default=0.98, help="AdamW's")
    g.add_argument("--accum-steps", type=int, default=1, help="compute each batch in so many parts, with the exact gradient of the whole; for batches that do not fit")
    g.add_argument("--checkpointing", action="store_true", help="transformers keep each block's input alone and compute the rest again: a third slower, far leaner")
    g.add_argument("--compile", action="store_true", help="torch.compile the image tower: half a minute to start, then a faster step; rounding differs")
    g.add_argument("--clip-grad", type=float, default=1.0, help="largest gradient norm; 0 for no clipping")
    g.add_argument("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help="autocast; auto: bf16 where it is faster, fp16 on older GPUs")
    g.add_argument("--seed", type=int, default=0, help="of the initial weights, the data and its order")
    g = ap.add_argument_group("run")
    g.add_argument("--out", help="run folder (None: runs/LOSS)")
    g.add_argument("--resume", action="store_true", help="go on from the folder's last.pt, or start if there is none yet")
    g.add_argument("--overwrite", action="store_true", help="start afresh in a folder that already holds a run")
    g.add_argument("--workers", type=int, help="processes that draw or read pictures, for each training process (None: 4 with a GPU; 0, the "
                   "training process itself, on a CPU, whose cores they would take)")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="where to compute")
    g.add_argument("--log-every", type=int, default=20, help="steps between rows of log.csv")
    g.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    g.add_argument("--eval-every", type=int, default=500, help="steps between validations; 0 for none")
    g.add_argument("--benchmark", action="store_true", help="take 25 steps, print where the time of the last 20 went, and leave nothing behind")
    args = ap.parse_args()
    if args.benchmark:
        args.steps, args.eval_every, args.log_every, args.out = 25, 0, 1000, tempfile.mkdtemp()
    for name, losses in ONLY.items():
        if getattr(args, name) != ap.get_default(name) and args.loss not in losses:
            raise UserError(f"--{name.replace('_', '-')} means nothing to --loss {args.loss}: leave it out, or take --loss {' or '.join(losses)}")
    kind = "scenes" if args.data == "scenes" else "files"
    tiny = args.model == "tiny"
    if args.loss == "pyramid" and kind == "files" and args.crop is None:
        args.crop = 0.9
    if args.optimizer == "lamb" and args.lr is None:
        args.lr = 6e-3 * (args.batch_size / 512) ** 0.5
    full = dict(lr=5e-4, sigma="1/P", local_weight=1.0, **{k: DEFAULTS[kind][k] for k in ("steps", "crop", "local_crop", "vocab")})
    for k, v in (DEFAULTS[kind] if tiny else full).items():
        if getattr(args, k) is None:
            setattr(args, k, v)
    if args.leff is None:
        args.leff = args.loss == "pyramid" and "RN50" not in args.model
    if args.patches_through_h is None:
        args.patches_through_h = tiny and args.pool != "cls"
    if args.workers is None:
        args.workers = 4 if args.device == "cuda" else 0
    args.out = args.out or os.path.join("runs", args.loss)
    beside = os.path.join(os.path.dirname(args.data), "val.csv")
    if kind == "files" and args.val is None and os.path.isfile(beside):
        args.val = beside
    for name, low in (("steps", 1), ("batch_size", 1), ("accum_steps", 1), ("warmup", 0), ("log_every", 1), ("save_every", 1), ("eval_every", 0), ("workers", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(args, name)}")
    if args.sigma != "1/P" and not 0 <= args.sigma <= 1:
        raise UserError(f"--sigma is a share of the largest similarity, in 0..1, not {args.sigma}")
    if args.terms and len(set(args.terms)) < len(args.terms):
        raise UserError(f"--terms {' '.join(args.terms)}: a term stands there twice")
    if not (args.lam >= 0 and args.mu >= 0 and args.lam + args.mu <= 1 and 0 <= args.alpha < 1):
        raise UserError(f"--lam {args.lam} and --mu {args.mu} are shares of the loss with a sum of at most 1, --alpha {args.alpha} lies in 0..1")
    for name in ("keep", "crop", "local_crop"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} must lie in 0..1, above 0, not {getattr(args, name)}")
    return args


# Options that may change when a run is resumed: they do not change its numbers.
FREE = {"out", "resume", "overwrite", "workers", "device", "log_every", "save_every", "eval_every", "amp", "checkpointing"}


class BadData(UserError):
    """Found by one process alone, which has to say so itself; what all processes find, the first one says."""


class Objective(nn.Module):
    """Model and loss in one forward, so that DistributedDataParallel sees which parameters the loss uses."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args, self.head, self.clock = model, args, make_head(args.loss, model.config["embed_dim"]), Clock(args.benchmark)

    def features(self, batch):
        return self.model(**{k: normalize(x) if k.startswith("images") else x for k, x in batch.items()})

    def loss(self, f):
        return OBJECTIVES[self.args.loss](f, self.args, self.head)

    def forward(self, batch):
        f = self.features(batch)
        self.clock.lap("forward")
        parts = self.loss(f)
        self.clock.lap("loss")
        return parts, {k: x.detach() for k, x in f.items()}


def in_parts(objective, batch, parts, autocast, scaler):
    """Loss and gradient of a batch of which only 1 / parts fits in memory, as exact as in one go -> what objective(batch) returns.

    A contrastive loss compares all with all, so the mean of the parts' losses would be that of a smaller batch. Instead: the features of
    all parts without a gradient; the loss of all features, and its gradient with respect to them; each part again, with that gradient.
    BatchNorm (RN50, LeFF) differs from one go: it sees one part at a time, and its running statistics move twice.
    """
    chunks = [dict(zip(batch, xs)) for xs in zip(*(x.chunk(parts) for x in batch.values()))]
    with torch.no_grad(), autocast():
        features = [objective.features(chunk) for chunk in chunks]
    names = [k for k in features[0] if k not in ("M", "scale")]
    f = {k: torch.cat([x[k] for x in features]).requires_grad_() for k in names}
    f |= {"M": batch["mask"], "scale": objective.model.logit_scale.exp()}
    objective.clock.lap("forward")
    with autocast():
        losses = objective.loss(f)
    scaler.scale(losses["loss"]).backward()
    objective.clock.lap("loss")
    names = [k for k in names if f[k].grad is not None]
    for chunk, *grads in zip(chunks, *(f[k].grad.chunk(parts) for k in names)):
        with autocast():
            again = objective.features(chunk)
        torch.autograd.backward([again[k] for k in names], grads)
    if dist.is_initialized():                                      # what DistributedDataParallel does otherwise
        for p in objective.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
    return losses, {k: x.detach() for k, x in f.items()}


class Clock:
    """For --benchmark: lap(name) puts the time since the lap before down to name. Otherwise it does nothing."""

    def __init__(self, on):
        self.on, self.spent, self.last = on, {}, time.perf_counter()

    def lap(self, name):
        if self.on:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.spent[name], self.last = self.spent.get(name, 0.0) + now - self.last, now

    def report(self, steps, batch_size):
        total = sum(self.spent.values())
        for name, s in self.spent.items():
            print(f"{name:10} {1000 * s / steps:8.1f} ms {100 * s / total:4.0f}%")
        peak = peak_memory()
        print(f"{'step':10} {1000 * total / steps:8.1f} ms      {steps * batch_size / total:,.0f} images/s" + (f", at most {peak:,.0f} MB" if peak else ""))


# -------------------------------------------------------------------------------------------------------------------- the machine
def start_processes(args):
    """Join the processes of torchrun, if there are several -> rank, number of processes, device."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device(args.device, local if args.device == "cuda" else None)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"{local + 1} processes but {torch.cuda.device_count()} GPUs: lower --nproc-per-node, or use --device cpu")
        torch.cuda.set_device(device)
    else:
        keep_memory()
        if world > 1:                                              # torchrun leaves each process one thread
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def leave_processes():
    """Leave the process group. Gloo's threads may then still be letting go of the last gather's tensors, for which they need Python's
    lock: an interpreter that ended meanwhile would abort."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def keep_memory():
    """Let Linux's C library keep what a step frees for the next one. Else it returns it to the system, which hands it out again page by
    page, each wiped first: a tenth to a third of a small model's step. Other systems' libraries have no such switch."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt(M_TRIM_THRESHOLD, 1 << 30)
    mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25)                   # older versions take no more than 32 MB


def pick_precision(amp, device):
    """auto -> bf16 where a matmul in it really is faster, fp16 on GPUs without bf16, else off."""
    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1024, 1024).to(dtype)
        x @ x
        start = time.perf_counter()
        for _ in range(3):
            x @ x
        seconds[dtype] = time.perf_counter() - start
    return "bf16" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "off"


def compile_(module):
    """torch.compile, in place and for one shape of input: names of parameters and checkpoints stay as they are."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except Exception as e:                                          # no compiler, or no version of it that PyTorch knows
        raise UserError(f"--compile: PyTorch can't compile here ({type(e).__name__}: {str(e).strip().splitlines()[0][:100]}): install g++, or leave it out") from None
    module.compile(dynamic=False)


# ---------------------------------------------------------------------------------------------------------- schedule and optimiser
def learning_rate(step, args):
    """Linear from 0 to the peak over the warm-up, then half a cosine to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - args.warmup) / max(1, args.steps - args.warmup)))


class LAMB(torch.optim.Optimizer):
    """Layer-wise adaptive moments, FILIP's optimiser (A.3): Adam's direction u of each tensor, as long as the tensor itself.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u = m / (sqrt(v) + eps) + decay w,   w <- w - lr min(|w|, 10) / |u| u

    Without bias correction, as in the implementation that FILIP cites: the first u is up to 3.2 in each entry, so warm up. adapt_1d=False
    leaves gains, biases and scales their own length of step; else a scale moves by lr times its own size whatever its gradient.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0, adapt_1d=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adapt_1d=adapt_1d))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                s = self.state[w]
                if not s:
                    s["m"], s["v"] = torch.zeros_like(w), torch.zeros_like(w)
                s["m"].lerp_(w.grad, 1 - b1)
                s["v"].mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
                u = s["m"] / (s["v"].sqrt() + group["eps"]) + group["weight_decay"] * w
                norm_w, norm_u = w.norm().clamp(max=10), u.norm()
                adapt = (norm_w > 0) & (norm_u > 0) & (group["adapt_1d"] or w.ndim > 1)        # a zero tensor must be able to leave zero
                w -= group["lr"] * torch.where(adapt, norm_w / norm_u, 1.0) * u


def make_optimizer(objective, args):
    """AdamW or LAMB; no decay on gains, biases, token and position embeddings and scales (FILIP A.2's list), nor on MGCA's unit prototypes."""
    spared = lambda name, p: p.ndim < 2 or "embedding" in name or "prototypes" in name
    groups = [{"params": [p for n, p in objective.named_parameters() if spared(n, p) == s], "weight_decay": 0.0 if s else args.weight_decay}
              for s in (False, True)]
    if args.optimizer == "lamb":
        return LAMB(groups, lr=args.lr)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)


# -------------------------------------------------------------------------------------------------------------- files of a run
def peak_memory():
    """The most memory this process has held so far, on the GPU if there is one, in MB; None where the system does not tell."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    except ImportError:
        return None


def write_checkpoint(path, objective, optimizer, scaler, step, seconds, args, tok):
    model = objective.model
    ckpt = {"model": model.state_dict(), "head": objective.head.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "step": step,
            "seconds": seconds, "peak_mb": peak_memory(), "config": model.config, "args": vars(args), "merges": tok.merges}

    def save(tmp):
        with open(tmp, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
    write(path, save)


def open_run(args):
    """Make or check the run folder -> the checkpoint to go on from, or None."""
    last = os.path.join(args.out, "last.pt")
    try:
        os.makedirs(args.out, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
        if args.overwrite and not args.resume and os.path.exists(last):
            os.remove(last)                                        # or a later --resume would go on from the old run
    except OSError as e:
        raise UserError(f"can't write in --out {args.out} ({e.strerror}): choose another folder") from None
    if not os.path.exists(last):
        return None
    if not args.resume:
        raise UserError(f"{args.out} already holds a run: add --resume to go on with it, --overwrite to start afresh, or another --out")
    ckpt = evaluation.read_checkpoint(last)
    wrong = [k for k, v in vars(args).items() if k not in FREE and ckpt["args"].get(k) != v]
    if wrong:
        was = ", ".join(f"--{k.replace('_', '-')} {ckpt['args'].get(k)} (now {getattr(args, k)})" for k in wrong)
        raise UserError(f"{last} is a checkpoint of another run, with {was}: give the same options, or another --out")
    args.amp = ckpt["args"]["amp"]
    return ckpt


class Log:
    """log.csv: one row a logged step. Rows after the step resumed from are dropped, so that the file is that of an unbroken run."""

    def __init__(self, path, step):
        self.path, rows = path, []
        if step and os.path.exists(path):
            with open(path, newline="") as f:
                rows = [r for r in csv.DictReader(f) if r["step"] and int(r["step"]) <= step]
        self.fields = list(rows[0]) if rows else None

        def save(tmp):
            with open(tmp, "w", newline="") as f:
                if rows:
                    w = csv.DictWriter(f, self.fields)
                    w.writeheader()
                    w.writerows(rows)
        write(path, save)

    def add(self, row):
        try:
            with open(self.path, "a", newline="") as f:
                if self.fields is None:
                    self.fields = list(row)
                    csv.DictWriter(f, self.fields).writeheader()
                csv.DictWriter(f, self.fields).writerow(row)
        except OSError as e:
            raise UserError(f"can't write {self.path} ({e.strerror}): free some space, then --resume") from None


# --------------------------------------------------------------------------------------------------------------------------- data
def make_data(args, merges=None):
    """-> training data, tokeniser (the checkpoint's merges, else what --vocab says), validation pairs [(picture, caption)]."""
    if args.data == "scenes":
        data = Scenes(1_000_000, args.seed, args.image_size or models.CONFIGS[args.model]["image_size"], mismatch=args.mismatch, paraphrase=args.paraphrase)
        val = Scenes(250, args.seed, data.size, "val")
    else:
        data = open_dataset(args.data, args.regions)
        val = open_dataset(args.val) if args.val else None
    if merges is not None:
        tok = Tokenizer(merges)
    elif args.vocab.startswith("learn:"):
        if not args.vocab[6:].isdigit():
            raise UserError(f"--vocab {args.vocab}: the number of entries is missing, as in learn:8000")
        tok = Tokenizer.train(data.texts(), int(args.vocab[6:]))
    else:
        tok = Tokenizer.clip(args.vocab)
    return data, tok, [val.pair(i) for i in range(min(250, len(val)))] if val else []


def ignore_ctrl_c(worker):
    """Ctrl-C reaches the data workers too; the main process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def report_terms(data, args):
    """Which of PyramidCLIP's terms the data can't feed; at least one has to be left."""
    has = data.views(0, data.pair(0)[0])
    lost = [m for m in args.terms if (m[0] == "R" and "regions" not in has) or (m[1] == "A" and "objects" not in has)]
    weight = {"GA": args.lam, "RS": args.lam, "LA": args.mu, "RT": args.mu, "GT": 1, "LS": 1}
    if not any(weight.get(m, 1 - args.lam - args.mu) > 0 for m in args.terms if m not in lost):
        raise UserError(f"--terms {' '.join(args.terms)}: {args.data} has nothing to feed them, or their weight is 0; add the column objects, "
                        f"--regions FILE.npz, or the term LT")
    if lost:
        missing = [what for key, what in (("regions", "regions (--regions FILE.npz)"), ("objects", "the column objects")) if key not in has]
        print(f"note: without {' and '.join(missing)} the terms {' '.join(lost)} fall away")
    if not getattr(data, "summaries", True):
        print("note: without the column summary, a caption's first clause is its summary")


def report_cuts(data, tok, length):
    texts = random.Random(0).sample(data.texts(), min(5000, len(data.texts())))
    cut = sum(len(tok.encode(t)) + 2 > length for t in texts)
    if cut:
        print(f"note: {100 * cut / len(texts):.1f}% of the captions are longer than {length} tokens and lose their ends (--context-length)")


def make_model(args, tok):
    """The model with what the objective wants of its towers: PyramidCLIP LeFF and regions, PACL its own patch embedder."""
    heads = args.width and max(1, args.width // 64)
    layers = args.layers or models.CONFIGS[args.model]["vision_layers"]
    special = {"embedder": True} if args.loss == "pacl" else {}
    if args.loss == "pyramid":                                     # LeFF in a ResNet is refused by build
        front = layers - max(1, layers // 4) if isinstance(layers, int) else None
        special = {"regions": 2052, "leff": (1 if front is None else front) if args.leff else 0, "front": front}
    return models.build(args.model, vocab_size=tok.vocab_size, context_length=args.context_length, image_size=args.image_size,
                        patch_size=args.patch_size, vision_layers=args.layers, text_layers=args.layers, vision_width=args.width,
                        text_width=args.width, vision_heads=heads, text_heads=heads, pool=args.pool, patches_through_h=args.patches_through_h, **special)


@torch.no_grad()
def validate(model, tok, pairs, args, autocast):
    """R@1 both ways on the validation pairs."""
    model.eval()
    with autocast():
        v, V = evaluation.encode_images(model, [im for im, _ in pairs])
        t, T, M = evaluation.encode_texts(model, tok, [c for _, c in pairs])
    model.train()
    s = evaluation.similarities(args.loss, v, V, t, T, M)
    return evaluation.retrieval(*s, torch.arange(len(pairs), device=v.device))


# --------------------------------------------------------------------------------------------------------------------- the training
def train(args):
    rank, world, device = start_processes(args)
    main = rank == 0
    if args.model not in models.CONFIGS:
        models.build(args.model)                                   # raises, and says which there are
    ckpt = open_run(args) if main or args.resume else None
    amp = [pick_precision(args.amp, device)]
    if world > 1:
        dist.broadcast_object_list(amp, 0)                         # one answer for all
    args.amp = amp[0]
    data, tok, val = make_data(args, ckpt and ckpt["merges"])
    torch.manual_seed(args.seed)
    model = make_model(args, tok).to(device)
    for module in model.modules():
        if isinstance(module, models.Transformer):
            module.checkpointing = args.checkpointing
    if args.compile:
        compile_(model.visual)
    batches = Batches(data, tok, args.batch_size, model.config["image_size"], model.context_length, args.seed, args.crop, rank, world,
                      args.loss == "pyramid", args.local_crop)
    objective = Objective(model, args).to(device)
    optimizer, scaler = make_optimizer(objective, args), torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    start, seconds = 0, 0.0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        objective.head.load_state_dict(ckpt["head"])
        optimizer.load_state_dict(ckpt["optimizer"])
        scaler.load_state_dict(ckpt["scaler"])
        start, seconds = ckpt["step"], ckpt["seconds"]
    if world > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    step_module = objective
    if args.batch_size // world % args.accum_steps:
        raise UserError(f"--accum-steps {args.accum_steps} does not divide the {args.batch_size // world} pairs of each process: choose a divisor")
    if world > 1 and args.accum_steps == 1:                        # static_graph: an objective may leave some parameters unused
        step_module = DistributedDataParallel(step_module, device_ids=[device.index] if device.type == "cuda" else None, static_graph=True)
    autocast = lambda: torch.autocast(device.type, DTYPES.get(args.amp, torch.bfloat16), enabled=args.amp != "off")
    loader = iter(torch.utils.data.DataLoader(batches, sampler=range(start, args.steps), batch_size=None, num_workers=args.workers, worker_init_fn=ignore_ctrl_c,
                                              pin_memory=device.type == "cuda", prefetch_factor=8 if args.workers else None))
    last, log = os.path.join(args.out, "last.pt"), None
    if main:
        write(os.path.join(args.out, "args.json"), lambda tmp: pathlib.Path(tmp).write_text(json.dumps(vars(args), indent=1)))
        log = Log(os.path.join(args.out, "log.csv"), start)
        print(f"{args.loss} on {args.data}: {models.count(model):,} parameters, {len(data):,} pictures, vocabulary {tok.vocab_size:,}, "
              f"{args.steps - start} steps of {args.batch_size}, {world} x {device.type}, {args.amp}; results go to {args.out}")
        report_cuts(data, tok, model.context_length)
        if args.loss == "pyramid":
            report_terms(data, args)
    stop = []                                                      # the signal that asks us to stop, if any
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, frame: stop.append(number))

    def save(step):
        if main:
            write_checkpoint(last, objective, optimizer, scaler, step, seconds + time.perf_counter() - began, args, tok)

    began = since = time.perf_counter()
    logged = start
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=not main, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30)
    for step in range(start, args.steps):
        batch = next(loader)
        if "error" in batch:
            raise BadData(batch["error"])
        batch = {k: x.to(device, non_blocking=True) for k, x in batch.items()}
        if step == 5:
            objective.clock.spent.clear()                          # the first steps are slower
        objective.clock.lap("data")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        if args.accum_steps > 1:
            parts, f = in_parts(objective, batch, args.accum_steps, autocast, scaler)
        else:
            with autocast():
                parts, f = step_module(batch)
            scaler.scale(parts["loss"]).backward()
        objective.clock.lap("backward")
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip_grad or float("inf"))

        # One small message: the mean of every part over the ranks, and whether anyone was asked to stop.
        names = list(parts)
        numbers = torch.stack([*(parts[k].detach().float() for k in names), torch.tensor(float(bool(stop)), device=device)])
        if world > 1:
            dist.all_reduce(numbers)
            numbers /= world
        *values, asked = numbers.tolist()
        loss = values[names.index("loss")]
        if not math.isfinite(loss) or not (scaler.is_enabled() or math.isfinite(norm)):
            bar.close()
            kept = f"{last} is kept as it was" if os.path.exists(last) else "no checkpoint had been written"
            raise UserError(f"step {step + 1}: the loss is {loss}, its gradient's norm {float(norm)}; nothing was updated and {kept}. "
                            f"Lower --lr, raise --warmup, or use --amp off")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        models.clamp_scales(objective)
        objective.clock.lap("optimiser")

        done = step + 1
        bar.update()
        if done % args.log_every == 0 or done == args.steps:
            now = time.perf_counter()
            rate, since, logged = args.batch_size * (done - logged) / (now - since), now, done
            with torch.no_grad(), autocast():
                s = evaluation.similarities(args.loss, *(f[k] for k in ("v", "V", "t", "T", "M")))
                hit = (s[0].argmax(1) == torch.arange(len(f["v"]), device=device)).float().mean()
                if args.loss in WITHIN_PAIR:                       # near the matched one: the local loss does not look at the picture
                    shuffled = f | {"V": f["V"].roll(len(f["V"]) // 2, 0)}
                    parts["local_shuffled"] = OBJECTIVES[args.loss](shuffled, args, objective.head)[WITHIN_PAIR[args.loss]]
            if main:
                row = {"step": done, **dict(zip(names, values)), **{k: parts[k].item() for k in parts if k not in names}}
                row.setdefault("scale", f["scale"].item())
                row |= {"accuracy": 100 * hit.item(), "grad_norm": float(norm), "lr": learning_rate(step, args)}
                bar.set_postfix(loss=f"{loss:.3f}", scale=f"{row['scale']:.1f}", acc=f"{row['accuracy']:.0f}%", **{"img/s": f"{rate:.0f}"})
                row = {k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()}
                log.add(row | {"images_per_s": f"{rate:.0f}", "seconds": f"{seconds + now - began:.1f}"})
        if main and val and args.eval_every and done % args.eval_every == 0 and done < args.steps:
            r = validate(model, tok, val, args, autocast)
            bar.write(f"step {done}: validation R@1 {r['i2t_r1']:.1f} / {r['t2i_r1']:.1f} of {len(val)}")
            since = time.perf_counter()                            # validation does not count in the rate
        if done % args.save_every == 0 or done == args.steps or asked:
            save(done)
        if asked:
            bar.close()
            if main:
                print(f"stopped after step {done}; --resume goes on from there")
            return False
    bar.close()
    if args.benchmark:
        if main:
            objective.clock.report(20, args.batch_size)
        shutil.rmtree(args.out, ignore_errors=True)
        return False
    return main


def finish(args):
    """Evaluate and draw: what a run leaves behind."""
    print(f"trained; evaluating {args.out}")
    if args.data == "scenes" or args.val:
        metrics = evaluation.evaluate(args.out, device=args.device)
        print(evaluation.table({os.path.basename(args.out): metrics}))
        print("pictures: " + ", ".join(visualize.draw_run(args.out, device=args.device)))
    else:
        print(f"no --val: evaluate with `python eval.py {args.out} --data FILE.csv`")


if __name__ == "__main__":
    try:
        args = options()
        main = train(args)
        leave_processes()                                          # the first one evaluates alone
        if main:
            finish(args)
    except UserError as e:
        if isinstance(e, BadData) or os.environ.get("RANK", "0") == "0":
            print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_processes()
