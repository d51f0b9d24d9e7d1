"""Train: one process, or many under torchrun; CPU or GPU; built-in scenes or real pictures.

    torchrun train.py --loss sparc                    # scenes: no download, minutes on a CPU
    torchrun --nproc-per-node 8 train.py --loss filip --model ViT-B/32 --data photos/train.csv
    torchrun train.py --loss sparc --init ViT-B-32.pt --data photos/train.csv  # fine-tune CLIP

`training_step` is the algorithm, from the batch to the new weights; all else stands around it.
A batch depends on the seed and the step alone: a killed run, resumed, ends with the same numbers.
Covers: SPARC 4.1, D.4; FILIP 3.1.1 (the tokens that are sent), 4.1, A.2; PyramidCLIP 3.2, A.2, F.

Differs from the papers:
- The defaults suit scenes. SPARC: 16,384 pairs a batch, `--sigma 1/P --local-weight 1 --spare 0
  --strangers 0 --drop-words 0 --no-patches-through-h --near 0`.
- Ours are AdamW's beta2 of 0.98, the clipping of gradients, a warm-up of 100 steps (FILIP 3,000,
  SPARC 2,500, PyramidCLIP a tenth). Weight decay is 0.1 (SPARC 0.1 to 0.3, PyramidCLIP 0.2).
- Files are cropped at random and flipped: SPARC only resizes. Scenes are not: captions tell places.
- --init takes a thirtieth of the rate, as FILIP: 6e-3 (Table 9), then 2e-4 (Table 10).
- BatchNorm (RN50, LeFF, small) sees one part of --accum-steps; on CPUs, one process's pictures.
"""
import argparse, contextlib, copy, ctypes, itertools, json, math, os, pathlib, signal, sys, time
import timeit
from unittest.mock import patch
import torch, torch.distributed as dist, torch.nn as nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
import eval as evaluation, losses as objectives, model as models, visualize
from data import Batches, Scenes, Tokenizer, center_crop, collate, normalize, open_dataset
from losses import DTYPES, OBJECTIVES, SIX
from model import DEVICES, UserError, pick_device, write

# ----------------------------------------------------------------------------------------- options
BROUGHT = ("model", "pool", "causal", "near", "patch_size", "layers", "width", "context_length",
           "vocab", "patches_through_h", "leff", "no_leff")  # what the weights of --init decide
FREE = ("out", "resume", "overwrite", "workers", "device", "log_every", "save_every", "eval_every",
        "amp", "checkpointing", "val", "images", "max_bad")  # may change when a run is resumed
VALIDATION = ("val_loss", *(f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)))


def flags():
    """The command line's flags. Parentheses in a help text hold the default."""
    ap = argparse.ArgumentParser(
        usage="train.py [options]   (--help lists them)",
        description="Train an image-text model. Defaults stand in parentheses.",
        epilog="objectives:\n" + "\n".join(f"  {k:12}{o.about}" for k, o in OBJECTIVES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    switch, whole, number = {"action": "store_true"}, {"type": int}, {"type": float}
    either = {"action": argparse.BooleanOptionalAction}

    def add(name, help, default=None, **more):
        if default is not None:
            more |= {"default": default, "type": type(default)}
            help += f" ({default})"
        group.add_argument(name, help=help, **more)

    def sigma(text):
        return text if text == "1/P" else float(text)

    group = ap.add_argument_group("what people change")
    add("--loss", "choose the objective, listed below", "sparc", choices=list(OBJECTIVES))
    add("--model", f"choose the towers: {', '.join(models.CONFIGS)} (scenes tiny, files small)")
    add("--data", "train on scenes, or on files: a table, JSON, a folder, tar shards", "scenes")
    add("--out", "write the run into this folder (runs/LOSS)")
    add("--steps", "take so many optimiser steps (scenes 2800, files 1000)", **whole)
    add("--batch-size", "pictures a step; halve it if memory runs out (128, small 256)", **whole)
    add("--lr", "set the peak rate (tiny 1.5e-3, small 1e-3, else 5e-4; lamb: FILIP's)", **number)
    add("--image-size", "set a picture's side in pixels", **whole)
    add("--resume", "go on from the folder's last.pt, or start if there is none", **switch)
    add("--init", "fine-tune OpenAI CLIP's weights, a run folder or its last.pt, at lr / 30")
    add("--seed", "change the initial weights, the data and its order", 0)
    add("--amp", "autocast; auto: bf16 if faster", "auto", choices=("auto", "off", "bf16", "fp16"))
    add("--device", "compute there; mps is Apple's", "auto", choices=DEVICES)
    group = ap.add_argument_group("model (by default the model's own)")
    add("--pool", "pool by [CLS] and EOT, or by means and h_v", choices=("cls", "mean"))
    add("--patch-size", "set a patch's side in pixels", **whole)
    add("--layers", "set the number of blocks in each tower", **whole)
    add("--width", "set both towers' width, a multiple of 64", **whole)
    add("--context-length", "cut texts to so many tokens", **whole)
    add("--causal", "words see only what stands before them (tiny, --pool cls)", **either)
    add("--near", "patches see those so many rows or columns away, by block; 0: all (0; tiny 2 1)",
        nargs="+", **whole)
    add("--patches-through-h", "patches pass h_v in training too (tiny, small)", **either)
    group = ap.add_argument_group("data")
    add("--images", "look here for the pictures that a JSON file names (beside it)")
    add("--val", "validate on these pairs (val.csv beside --data, if there is one)")
    add("--max-bad", "stop if over 10 samples, and this share, are bad; 0: at the first", 0.01)
    add("--mask-equal-texts", "pairs of equal texts, as of a class, are no negatives", **switch)
    add("--vocab", "learn:N, or clip, or a path of CLIP's merges (scenes 1000, small 4000, 8000)")
    add("--crop", "crop to this share or more (scenes: no crop; files 0.4, pyramid 0.9)", **number)
    add("--flip", "mirror half of the pictures, with their left and right (files)", **either)
    add("--drop-words", "drop half of the words of this share of captions (scenes 0.05)", **number)
    add("--captions", "so many texts of a picture at once, which share its target (FILIP A.2)", 1)
    add("--paraphrase", "tell this share of scenes in other words, as for FILIP Table 4", 0.0)
    add("--mismatch", "let words and scenes disagree this often, as in PyramidCLIP Figure 1", 0.0)
    add("--workers", "read pictures in so many extra processes (cpu 0, cuda 4)", **whole)
    group = ap.add_argument_group("SPARC (Table 6: --sigma 0, --softmax)")
    add("--per-text", "average eq. 6 per text first, as printed, not as in Appendix C", **switch)
    add("--spare", "words so near to a word are no negatives of it, eq. 6 (scenes 2)", **whole)
    add("--strangers", "tell a word's view from that of so many other pictures (scenes 2)", **whole)
    add("--global-weight", "weight the global loss in eq. 7", 0.5)
    add("--local-weight", "weight the local loss; paper 0.5-10 (scenes 0.6, small 0.15)", **number)
    group = group.add_mutually_exclusive_group()
    add("--sigma", "set eq. 3's threshold; 1/P is the paper's (scenes 0.7, small 0.5)", type=sigma)
    add("--softmax", "weight patches by a softmax in place of eqs. 2 to 4", **switch)
    group = ap.add_argument_group("FILIP (3.1.1, Table 5)")
    add("--keep", "compare this share of the tokens; the paper's is 0.25", 1.0)
    add("--one-sided", "keep all local tokens, as SPARC's FILIP does (SPARC Table 12)", **switch)
    add("--gather-dtype", "send tokens so; the paper: fp16 (as is)", choices=list(DTYPES)[1:])
    group = ap.add_argument_group("PyramidCLIP (Tables 5, 13, 14, 15, Figure 6)")
    add("--terms", "choose pairs of a picture (G, L, R) and a text (S, T, A); Tables 14 and 15 add "
        "RA, GT, LS (GS LT GA RS LA RT)", nargs="+", choices=[*SIX, "RA", "GT", "LS"], metavar="T")
    add("--hard-targets", "do not soften the targets (Tables 5, 13, 14)", **switch)
    add("--alpha", "soften the targets by this much", 0.2)
    add("--lam", "weight GA and RS (1/3)", **number)
    add("--mu", "weight LA and RT (1/3); GS and LT get the rest", **number)
    add("--local-crop", "crop the local view to this share or more; 0 for no such view", 0.5)
    add("--regions", "read a detector's regions from this .npz (files: none, nor RS and RT)")
    group = group.add_mutually_exclusive_group()
    add("--leff", "put LeFF in the first L_s blocks, regions behind them: Figure 6 (3/4)", **whole)
    add("--no-leff", "use LeFF in no block; regions enter as before (Tables 5, 13, 14)", **switch)
    group = ap.add_argument_group("optimisation")
    add("--optimizer", "choose lamb for FILIP's", "adamw", choices=("adamw", "lamb"))
    add("--warmup", "warm up over so many steps; raise it if the loss sticks at ln(batch)", 100)
    add("--weight-decay", "shrink weight matrices (adamw 0.1; lamb: FILIP's 0.03)", **number)
    add("--beta2", "set AdamW's beta2", 0.98)
    add("--freeze", "keep this tower as it is", nargs="+", choices=("image", "text", "none"))
    add("--clip-grad", "shorten gradients to this norm; 0 for no clipping", 1.0)
    add("--accum-steps", "compute a batch in so many parts, with the whole's gradient", 1)
    add("--checkpointing", "compute blocks twice to save memory (FILIP 4.1)", **switch)
    group = ap.add_argument_group("run")
    add("--overwrite", "start afresh in a folder that holds a run", **switch)
    add("--log-every", "log every so many steps", 20)
    add("--save-every", "save last.pt every so many steps", 200)
    add("--eval-every", "validate every so many steps; 0 for never", 500)
    return ap


def users(name):
    """The option without which the one of this name means nothing, and its values that use it."""
    if name in ("paraphrase", "mismatch"):
        return "data", ["scenes"]
    if name in ("hard_targets", "leff", "no_leff", "local_crop", "regions"):
        return "loss", ["pyramid"]                           # its loss sees none of these
    if name in ("mask_equal_texts", "captions"):             # pyramid's targets are soft already
        return "loss", [k for k in OBJECTIVES if k != "pyramid"]
    return "loss", [k for k, o in OBJECTIVES.items() if name in o.options] or list(OBJECTIVES)


def flag(name):
    return "--" + name.replace("_", "-")


def options():
    """The command line -> args, complete and checked. Raises UserError."""
    ap = flags()
    args = ap.parse_args()
    if args.init and args.resume:
        raise UserError("--init begins a run and --resume goes on with one: leave one of them out")
    if args.resume:
        with contextlib.suppress(OSError, ValueError):
            path = pathlib.Path(args.out or f"runs/{args.loss}", "args.json")
            saved = json.loads(path.read_text())
            if saved.get("init"):                            # then no option has to be repeated
                ap.set_defaults(**{k: x for k, x in saved.items() if k not in FREE})
        args = ap.parse_args()
    elif args.init:
        given = [flag(name) for name in BROUGHT if getattr(args, name) != ap.get_default(name)]
        if given:
            raise UserError(f"{' '.join(given)}: the weights of --init decide that; leave it out")
        ckpt = evaluation.read_checkpoint(args.init)
        args.model = ckpt["args"]["model"]
        args.image_size = args.image_size or ckpt["config"]["image_size"]
    for name, value in vars(args).items():
        other, wanted = users(name)
        got = getattr(args, other)
        if value != ap.get_default(name) and got not in wanted:
            raise UserError(f"{flag(name)} means nothing to --{other} {got}: leave it out, or take "
                            f"--{other} {' or '.join(wanted)}")
    args.device = pick_device(args.device)
    fill_in(args)
    if args.model not in models.CONFIGS and not args.init:
        models.build(args.model)                             # raises, and says which there are
    check(args)
    return args


def fill_in(args):
    """Put the defaults that depend on other options where the command says nothing."""
    scenes, lamb = args.data == "scenes", args.optimizer == "lamb"
    args.model = args.model or ("tiny" if scenes else "small")
    tiny, small = args.model == "tiny", args.model == "small"
    defaults = dict(out=f"runs/{args.loss}", terms=list(SIX), lam=1 / 3, mu=1 / 3,
                    crop=0.9 if args.loss == "pyramid" else 0.4, flip=True,      # 0.9: its 3.2
                    steps=1000, batch_size=256 if small else 128, lr=5e-4, weight_decay=0.1,
                    vocab="learn:4000" if small else "learn:8000", sigma="1/P", local_weight=1.0,
                    drop_words=0.0, spare=0, strangers=0,
                    patches_through_h=(tiny or small) and args.pool != "cls",
                    workers=4 if args.device == "cuda" else 0)   # they would take a CPU's cores
    if tiny or small:
        defaults |= dict(lr=1.5e-3 if tiny else 1e-3, sigma=0.5, local_weight=0.15)
    if tiny and scenes and args.loss == "sparc":
        defaults |= dict(sigma=0.7, local_weight=0.6, spare=2, strangers=2)
    if scenes:
        defaults |= dict(steps=2800, vocab="learn:1000", crop=None, flip=False, drop_words=0.05)
    if lamb:                                                 # FILIP A.2 and Table 9
        batch = args.batch_size or defaults["batch_size"]
        defaults |= dict(lr=6e-3 * (batch / 512) ** 0.5, weight_decay=0.03)
    beside = os.path.join(os.path.dirname(args.data), "val.csv")
    if os.path.isfile(args.data) and os.path.isfile(beside):
        defaults["val"] = beside
    if args.init:                                            # FILIP Tables 9 and 10
        defaults["lr"] /= 30
        defaults["weight_decay"] /= 100 if lamb else 1
    for name, value in defaults.items():
        if getattr(args, name) is None and not (args.init and name in BROUGHT):
            setattr(args, name, value)
    args.local_crop = args.local_crop or None


def check(args):
    """Refuse numbers that make no sense, each with one sentence."""
    least = dict(warmup=0, leff=0, eval_every=0, workers=0, lr=0, weight_decay=0, clip_grad=0,
                 global_weight=0, local_weight=0, layers=1, steps=1, batch_size=1, accum_steps=1,
                 log_every=1, save_every=1, captions=1, near=0, patch_size=1, width=1, image_size=1,
                 context_length=1, spare=0, strangers=0)
    shares = ("max_bad", "paraphrase", "mismatch", "drop_words", "sigma", "lam", "mu")
    for name, value in vars(args).items():
        low = min(value) if isinstance(value, list) else value
        if name in least and low is not None and low < least[name]:
            raise UserError(f"{flag(name)} must be at least {least[name]}, not {low}")
        if name in ("keep", "crop", "local_crop") and value is not None and not 0 < value <= 1:
            raise UserError(f"{flag(name)} must lie in 0..1, above 0, not {value}")
        if name in ("beta2", "alpha") and not 0 <= value < 1:
            raise UserError(f"{flag(name)} must lie in 0..1, below 1, not {value}")
        if name in shares and value != "1/P" and not 0 <= value <= 1:
            raise UserError(f"{flag(name)} is a share, in 0..1, not {value}")
    frozen = set(args.freeze or ()) - {"none"}
    if len(frozen) > 1 or (frozen and not args.init):
        raise UserError("--freeze keeps a tower that --init brings, and leaves the other to learn: "
                        "give --init, and one tower")
    if len(set(args.terms)) < len(args.terms):
        raise UserError("--terms: a term stands there twice")
    if args.lam + args.mu > 1:
        raise UserError(f"--lam {args.lam} and --mu {args.mu}: their sum is above 1")


# ------------------------------------------------------------------- processes, precision, memory
class BadData(UserError):
    """Found by one process alone, which has to say so itself; what all find, the first one says."""


def start_processes(args):
    """Join the processes of torchrun, if there are several -> rank, number of processes, device."""
    env, gpu = os.environ, args.device == "cuda"
    try:
        rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        local = int(env.get("LOCAL_RANK", 0))                # number on this machine
        if not 0 <= rank < world or local < 0:
            raise ValueError("there is no such process")
        if gpu:
            torch.cuda.set_device(local)
        if world > 1:
            dist.init_process_group("nccl" if gpu else "gloo")
    except (RuntimeError, ValueError) as e:                  # also without a GPU, or the port
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        said = ", ".join(f"{name}={env.get(name)!r}" for name in names)
        raise BadData(f"the environment has {said} ({str(e).splitlines()[0]}): start with "
                      f"`torchrun --nproc-per-node N train.py ...`, N GPUs or a CPU, or unset them")
    if args.device == "mps" and world > 1:
        raise UserError("--device mps serves one process: start train.py without torchrun")
    if not gpu:
        keep_memory()
        if world > 1:                                        # torchrun leaves each one thread
            cores = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count()))(0)
            here = int(env.get("LOCAL_WORLD_SIZE", world))
            torch.set_num_threads(max(1, len(cores) // here))
    return rank, world, torch.device(args.device, local if gpu else None)


def leave_processes():
    """Leave the process group. Gloo's threads then need Python's lock for a moment, or abort."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def outlive_sigterm(worker):
    """In a data worker: schedulers signal all processes, but the run ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def keep_memory():
    """Let Linux's C library keep freed memory: a small model's steps are up to a third faster."""
    with contextlib.suppress(OSError, AttributeError, TypeError):        # no such library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 30)                                 # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)                                 # M_MMAP_THRESHOLD
        mallopt(-3, 1 << 30)                                 # which older versions refuse


def pick_precision(amp, device):
    """auto -> bf16 where a matmul in it really is faster, fp16 on GPUs without bf16, else off."""
    if amp != "auto":
        return amp
    if device.type == "mps":
        return "off"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    x = torch.randn(1024, 1024)
    full, half = (min(timeit.repeat(lambda: y @ y, number=1, repeat=4)) for y in (x, x.bfloat16()))
    return "bf16" if half < 0.7 * full else "off"


def peak_memory():
    """The most memory this process has held, on the GPU if any, in MB, or None if unknown."""
    if torch.cuda.max_memory_allocated():                    # 0 without a GPU
        return torch.cuda.max_memory_allocated() / 2 ** 20
    with contextlib.suppress(ImportError):
        import resource
        unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------- one step
def number_texts(ids):
    """ids (b,L) -> (b,), equal texts have the same number. On the CPU, for not all devices can."""
    return ids.cpu().unique(dim=0, return_inverse=True)[1].to(ids.device)


def mask_equal_texts(ids, M, k):
    """losses.info_nce without negatives whose text equals one's own. ids, M (b,L) of my texts, k of
    each picture in a row."""
    info_nce, own = objectives.info_nce, objectives.labels(ids)          # (b,)
    everyone, _ = objectives.gather_texts(ids[..., None], M)             # (B, L, 1)
    number = number_texts(everyone[..., 0])                  # (B,)
    picture = torch.arange(len(number), device=ids.device) // k          # (B,)
    twins = (number[own, None] == number) & (picture[own, None] != picture)        # (b, B)
    def masked(*logits):
        return info_nce(*(s.masked_fill(twins, -1e9) for s in logits))   # as good as -inf
    return masked


def in_parts(features, batch, parts):
    """features(batch), where only a part of the batch fits in memory. Exact, but for BatchNorm: the
    loss sees all features. Backward computes each part again, one at a time."""
    if parts == 1:
        return features(batch)
    chunks = [{name: x.chunk(parts)[i] for name, x in batch.items()} for i in range(parts)]
    found = [checkpoint(features, chunk, use_reentrant=False) for chunk in chunks]
    scale = {"scale": found[0].pop("scale")}                 # the same of every part
    return {name: torch.cat([f[name] for f in found]) for name in found[0]} | scale


class ModelAndLoss(nn.Module):
    """Both in one forward, so that DistributedDataParallel sees which parameters the loss uses."""
    def __init__(self, model, args):
        super().__init__()
        self.model, self.objective, self.parts = model, OBJECTIVES[args.loss], args.accum_steps
        self.head = self.objective.head(model.config["embed_dim"])
        self.options, self.mask = evaluation.loss_options(args), args.mask_equal_texts

    def features(self, batch):
        pictures = {k: normalize(x) for k, x in batch.items() if k.startswith("images")}
        return self.model(**(batch | pictures)) | {"ids": batch["ids"]}      # v, V, t, T, M, ...

    def loss(self, f):
        """-> {"loss", its parts}, scalars. A picture with k texts takes part k times, so that each
        text is its partner with probability 1/k (FILIP A.2)."""
        info_nce, k = objectives.info_nce, len(f["t"]) // len(f["v"])
        if k > 1:
            f = f | {name: f[name].repeat_interleave(k, 0) for name in ("v", "V")}
        if self.mask:
            info_nce = mask_equal_texts(f["ids"], f["M"], k)
        with patch.object(objectives, "info_nce", info_nce):
            return self.objective.loss(f, self.head, **self.options)

    def forward(self, batch):
        f = in_parts(self.features, batch, self.parts)
        return self.loss(f), {name: x.detach() for name, x in f.items()}


def training_step(run, step):
    """One step, from the batch to the new weights -> losses (their means over all processes),
    features, gradient's norm. Raises UserError, with the weights as they were, if not finite."""
    module, optimizer, scaler = run.module, run.optimizer, run.scaler
    batch = run.draw()                                       # pictures (b, 3, H, W), texts (b, L)
    with run.autocast:
        losses, f = run.parallel(batch)                      # the features, then their losses
    scaler.scale(losses["loss"]).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), run.args.clip_grad or math.inf).item()
    losses = run.agree(losses)
    skips = scaler.is_enabled()                              # fp16's: a gradient that is not finite
    if not math.isfinite(losses["loss"]) or not (skips or math.isfinite(norm)):
        raise UserError(f"step {step + 1}: the loss is {losses['loss']}, its gradient's norm {norm}"
                        f"; nothing was updated. Lower --lr, raise --warmup, or use --amp off")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, run.args)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    models.clamp_scales(module)
    return losses, f, norm


# ------------------------------------------------------------------------- schedule and optimiser
def learning_rate(step, args):
    """Linear from 0 to the peak over the warm-up, then half a cosine to 0."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    angle = math.pi * (step - args.warmup) / (args.steps - args.warmup)
    return args.lr * 0.5 * (1 + math.cos(angle))


class LAMB(torch.optim.Optimizer):
    """FILIP 4.1, settings of its Table 8: Adam's direction u, a step as long as the tensor.

        m <- b1 m + (1 - b1) g,     v <- b2 v + (1 - b2) g^2
        u = m / (sqrt(v) + eps) + decay w,     w <- w - lr min(|w|, 10) / |u| u

    No bias correction, as in the code that FILIP names (A.2): u starts at up to 3.2 an entry, so
    warm up. A scale moves by lr times its own size, whatever its gradient."""
    def __init__(self, params, **options):
        super().__init__(params, {"betas": (0.9, 0.999), "eps": 1e-4} | options)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for w in (w for w in group["params"] if w.grad is not None):
                s = self.state[w]
                if not s:
                    s["m"], s["v"] = torch.zeros_like(w), torch.zeros_like(w)
                s["m"].lerp_(w.grad, 1 - b1)
                s["v"].mul_(b2).addcmul_(w.grad, w.grad, value=1 - b2)
                u = s["m"] / (s["v"].sqrt() + group["eps"]) + group["weight_decay"] * w
                norm_w, norm_u = w.norm().clamp(max=10), u.norm()
                adapt = (norm_w > 0) & (norm_u > 0)          # else a zero tensor stays zero
                w -= group["lr"] * torch.where(adapt, norm_w / norm_u, 1.0) * u


def make_optimizer(module, args):
    """AdamW or LAMB. No decay on gains, biases, token and position embeddings and the scale
    (FILIP 4.1), nor on MGCA's prototypes, which are unit vectors."""
    decayed, spared = [], []
    for name, p in module.named_parameters():
        is_spared = p.ndim < 2 or "embedding" in name or "prototypes" in name
        (spared if is_spared else decayed).append(p)
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    own = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "lamb":
        return LAMB(groups, **own)
    return torch.optim.AdamW(groups, betas=(0.9, args.beta2), fused=True, **own)


# --------------------------------------------------------------------------------- data and model
def make_validation(args, tok, size, length):
    """The first 250 pairs to validate on, a batch on the CPU; nothing if none can be read."""
    pairs, bad = [], []
    if args.data == "scenes":
        data = Scenes(250, args.seed, size, "val")
        pairs = ((i, *data.pair(i)) for i in range(250))
    elif args.val:
        data = open_dataset(args.val, images=args.images)
        pairs = ((i, image, data.captions[i][0]) for i, image in data.good(size))
        bad = data.bad                                       # with those that good meets
    samples = []
    for i, image, caption in itertools.islice(pairs, 250):
        views = data.views(i, image, caption) if args.loss == "pyramid" else {}
        samples.append({"images": center_crop(image, size), "caption": caption} | views)
    if bad:
        print(f"note: {len(bad)} rows of {args.val} can't be used; the first: {bad[0]}")
    return samples and collate(samples, tok, length)


def make_model(args, tok, start=None):
    """The model, with what an objective wants of its towers. start: the trained one of --init."""
    special = {"embedder": True} if args.loss == "pacl" else {}
    if args.loss == "pyramid":
        own = start.config if start else models.CONFIGS[args.model] | {"front": args.leff}
        layers, front = args.layers or own["vision_layers"], own["front"]
        if front is None and isinstance(layers, int):        # not a ResNet
            front = max(0, layers - max(1, layers // 4))     # regions enter behind 9 of 12 blocks
        special = {"regions": 2052, "front": front, "leff": 0 if args.no_leff else front}
    if start:                                                # LeFF would need other weights
        return models.adapt(start, image_size=args.image_size, **special | {"leff": None})
    heads = args.width and max(1, args.width // 64)
    return models.build(
        args.model, vocab_size=tok.vocab_size, context_length=args.context_length, pool=args.pool,
        image_size=args.image_size, patch_size=args.patch_size, vision_layers=args.layers,
        text_layers=args.layers, vision_width=args.width, text_width=args.width, vision_heads=heads,
        text_heads=heads, patches_through_h=args.patches_through_h, causal=args.causal,
        near=args.near, **special)


def prepare(model, args):
    """-> the model in training mode, with --checkpointing, --freeze (BatchNorm's statistics too)"""
    frozen = args.freeze or ()
    model.train()
    model.visual.train("image" not in frozen)
    for module in model.modules():
        if isinstance(module, models.Transformer):
            module.checkpointing = args.checkpointing
    for name, p in model.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        new = ("visual.e_v", "visual.phi", "visual.roi_norm", "logit_scale")
        p.requires_grad_(tower not in frozen or name.startswith(new))
    return model


def report_terms(data, args):
    """Say which of PyramidCLIP's terms the data can't feed. Raises UserError if none is left."""
    missing, files = {}, args.data != "scenes"               # scenes have everything
    if files and not args.regions:
        missing["R"] = "regions (--regions FILE.npz)"
    if files and data.rows[0].objects is None:
        missing["A"] = "the column objects"
    lost = [term for term in args.terms if set(term) & set(missing)]
    weight = {"GA": args.lam, "RS": args.lam, "LA": args.mu, "RT": args.mu, "GT": 1, "LS": 1}
    if all(term in lost or weight.get(term, 1 - args.lam - args.mu) <= 0 for term in args.terms):
        raise UserError(f"--terms: {args.data} has nothing to feed them, or their weight is 0; add "
                        f"the column objects, --regions FILE.npz, or LT")
    if lost:
        why = " and ".join(missing.values())
        print(f"note: without {why} the terms {' '.join(lost)} fall away")


def report_texts(data, tok, length):
    """Say how many captions are cut, and how many are those of other pictures too."""
    texts = data.texts()
    some = texts[::len(texts) // 5000 + 1]
    cut = sum(len(tok.encode(text)) + 2 > length for text in some)
    if cut:
        print(f"note: --context-length {length} cuts {100 * cut / len(some):.1f}% of the captions")
    repeats = 100 - 100 * len(set(texts)) / len(texts)
    if not isinstance(data, Scenes) and repeats >= 0.1:
        print(f"note: {repeats:.1f}% of the captions repeat others: see --mask-equal-texts")


# ---------------------------------------------------------------------------------------- the run
class Run:
    """Data, model and optimiser of a run, and what its steps share. start: the step it begins with.
    first: this process writes files and talks. asked: a signal to stop came, and all know it."""
    def __init__(self, args):
        self.args, self.signals, self.asked = args, [], False
        self.bad, self.known, self.found = {}, 0, []  # bad rows: all, before step 1, in this step
        self.rank, self.world, self.device = start_processes(args)
        self.first, self.gpu = self.rank == 0, self.device.type == "cuda"
        ckpt = open_run(args) if self.first or args.resume else {}
        self.start = ckpt.get("step", 0)
        amp = [pick_precision(args.amp, self.device)]
        if self.world > 1:
            dist.broadcast_object_list(amp)                  # one answer for all
        args.amp = amp[0]
        self.autocast = torch.autocast(self.device.type, DTYPES.get(args.amp), args.amp != "off")
        self.open_data(ckpt)
        self.build(ckpt)
        self.loader, self.batches = self.load(), None
        self.parallel = self.module
        if self.world > 1 and self.gpu:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        if self.world > 1:                                   # an objective may leave weights unused
            self.parallel = nn.parallel.DistributedDataParallel(self.module, static_graph=True)
        if self.first:
            self.announce()
        self.since, self.logged = time.perf_counter(), self.start        # of the last row
        self.began = self.since - ckpt.get("seconds", 0.0)
        self.bar = tqdm(total=args.steps, initial=self.start, unit="step", disable=not self.first,
                        mininterval=0.5 if sys.stderr.isatty() else 30)

    def open_data(self, ckpt):
        """The data, and which of its rows can't be used. UserError: not the checkpoint's data."""
        args, self.content = self.args, "scenes"
        if args.data == "scenes":
            size = args.image_size or models.CONFIGS[args.model]["image_size"]
            self.data = Scenes(1_000_000, args.seed, size, mismatch=args.mismatch,
                               paraphrase=args.paraphrase)
            return
        self.data = open_dataset(args.data, args.regions, args.images)
        self.content = self.data.fingerprint()
        if ckpt and ckpt["content"] != self.content:
            raise UserError(f"{args.data} has other pictures or captions now: change --out")
        self.add_bad([e.args for e in self.data.bad], len(self.data.texts()))
        self.known = len(self.bad)
        self.add_bad(ckpt.get("bad", []), self.start * args.batch_size)

    def build(self, ckpt):
        """Tokeniser, model, loss and optimiser: new ones, of --init, or as the checkpoint says."""
        args, start = self.args, None
        if ckpt:
            self.tok = Tokenizer(ckpt["merges"])
        elif args.init:
            start, self.tok, _ = evaluation.load_run(args.init)
        elif args.vocab.removeprefix("learn:").isdecimal():
            self.tok = Tokenizer.train(self.data.texts(), int(args.vocab.removeprefix("learn:")))
        else:
            self.tok = Tokenizer.clip(args.vocab)
        torch.manual_seed(args.seed)
        model = models.CLIP(**ckpt["config"]) if ckpt else make_model(args, self.tok, start)
        self.model = prepare(model, args)
        self.size, self.length = model.config["image_size"], model.context_length
        self.module = ModelAndLoss(self.model, args).to(self.device)
        self.optimizer = make_optimizer(self.module, args)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.state = {"model": self.model, "head": self.module.head, "optimizer": self.optimizer,
                      "scaler": self.scaler}                 # what a checkpoint restores
        if ckpt:
            for name, part in self.state.items():
                part.load_state_dict(ckpt[name])
        if self.first:
            self.val = make_validation(args, self.tok, self.size, self.length)

    def load(self):
        """The loader of this process's share of every batch that is to come."""
        args, share = self.args, self.args.batch_size // self.world
        batches = Batches(self.data, self.tok, args.batch_size, self.size, self.length, args.seed,
                          args.crop, self.rank, self.world, args.loss == "pyramid", args.local_crop,
                          args.captions, args.flip, args.drop_words)
        if share % args.accum_steps:
            raise UserError(f"--accum-steps {args.accum_steps} does not divide the {share} pairs "
                            f"of each process: choose a divisor")
        return torch.utils.data.DataLoader(
            batches, sampler=range(self.start, args.steps), batch_size=None, pin_memory=self.gpu,
            num_workers=args.workers, worker_init_fn=outlive_sigterm)

    def begin(self):
        """Start the data workers, and let signals end the run after the step at hand."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)         # the workers inherit that
        self.batches = iter(self.loader)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *sent: self.signals.append(sent))

    def announce(self):
        """Write args.json, and say what is trained."""
        args, text = self.args, json.dumps(vars(self.args), indent=1)
        write(os.path.join(args.out, "args.json"), lambda file: file.write(text.encode()))
        print(f"{args.loss} on {args.data} from {args.init or 'scratch'}: "
              f"{models.count(self.model):,} parameters, {len(self.data):,} pictures, vocabulary "
              f"{self.tok.vocab_size:,}, {args.steps - self.start} steps of {args.batch_size}, "
              f"{self.world} x {self.device.type}, {args.amp}; results go to {args.out}")
        if self.bad:
            print(f"note: {len(self.bad):,} rows can't be used: {args.out}/bad_rows.csv lists them")
        if args.warmup >= args.steps:
            print(f"note: --warmup {args.warmup} is no shorter than --steps {args.steps}: lower it")
        report_texts(self.data, self.tok, self.length)
        if args.loss == "pyramid":
            report_terms(self.data, args)

    def draw(self):
        """The next batch, a dict of tensors, on the device."""
        batch = next(self.batches)
        if "error" in batch:
            raise BadData(batch["error"])
        self.found = list(map(tuple, batch.pop("bad", [])))
        return {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}

    def agree(self, losses):
        """All processes tell each other their losses, whether a signal asked them to stop, and
        this step's bad rows -> {name: mean over all processes}."""
        mine = [x.item() for x in losses.values()], bool(self.signals), self.found
        everyone = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine)
        numbers, asked, found = zip(*everyone)
        self.asked, self.found = any(asked), sum(found, [])
        return dict(zip(losses, torch.tensor(numbers).mean(0).tolist()))

    def add_bad(self, rows, good, done=0):
        """Rows (where, what, reason) that can't be used -> bad_rows.csv, each once. UserError if
        they are too many beside the good samples; those known before step 1 count on their own."""
        self.bad |= dict.fromkeys(rows)
        if self.first:
            evaluation.list_faults(os.path.join(self.args.out, "bad_rows.csv"), self.bad)
        share, new = self.args.max_bad, list(self.bad)[self.known:]
        seen = good + len(new)
        if len(new) > (max(10, share * seen) if share else 0):
            if done and self.first:
                self.save(done)
            kinds = "; ".join(f"{n:,} x {kind}" for kind, n in evaluation.count_faults(new)[:3])
            raise UserError(f"{len(new):,} of {seen:,} samples can't be used ({kinds}): mend them "
                            f"(`python data.py check {self.args.data}`) or raise --max-bad {share}")

    def save(self, done):
        """Replace last.pt by the state after so many steps."""
        ckpt = {name: part.state_dict() for name, part in self.state.items()}
        ckpt |= {"step": done, "seconds": time.perf_counter() - self.began,
                 "peak_mb": peak_memory(), "config": self.model.config, "args": vars(self.args),
                 "merges": self.tok.merges, "content": self.content, "bad": list(self.bad)}
        write(os.path.join(self.args.out, "last.pt"), lambda file: torch.save(ckpt, file))


def train(args):
    """-> True in the first process of a complete run, which then calls finish. Raises UserError."""
    run = Run(args)
    try:
        run.begin()
        for step in range(run.start, args.steps):
            losses, f, norm = training_step(run, step)
            run.bar.update()
            done, last = step + 1, step + 1 == args.steps
            if run.found:
                run.add_bad(run.found, done * args.batch_size, done)
            due = args.eval_every and (done % args.eval_every == 0 or last)
            if due or done % args.log_every == 0 or last:
                log_step(run, done, losses, f, norm, validate(run, done) if due else {})
            if run.first and (done % args.save_every == 0 or last or run.asked):
                run.save(done)
            if run.asked:
                break
    finally:
        run.bar.close()
        run.batches = None                                   # ends the workers
    if run.asked and run.first:
        print(f"stopped after step {done}; --resume goes on from there")
    return run.first and not run.asked


@torch.no_grad()
def log_step(run, done, losses, f, norm, validation):
    """A row of log.csv. All processes compute, as losses send messages; the first one writes."""
    now, objective = time.perf_counter(), run.module.objective
    rate = run.args.batch_size * (done - run.logged) / (now - run.since)
    last, run.since, run.logged = run.logged, now, done
    row = {"step": done, **losses}
    with run.autocast:
        scores, _ = evaluation.similarities(objective, *(f[name] for name in "vVtTM"))  # (b, b)
        if objective.local:                                  # as low: it can ignore the picture
            strangers = f | {"V": f["V"].roll(len(f["V"]) // 2, 0)}
            row["local_shuffled"] = run.module.loss(strangers)[objective.local].item()
    number = number_texts(f["ids"])                          # equal texts have the same
    best, own = number[scores.argmax(1)], number.view(len(scores), -1)   # (b,), (b, k)
    accuracy = 100 * (best[:, None] == own).any(1).float().mean().item()
    row.setdefault("scale", f["scale"].item())
    row |= {"accuracy": accuracy, "grad_norm": norm, "lr": learning_rate(done - 1, run.args),
            "images_per_s": f"{rate:.0f}", "seconds": f"{now - run.began:.1f}"}
    if run.first:
        run.bar.set_postfix_str(f"loss={row['loss']:.3f}, scale={row['scale']:.1f}, "
                                f"acc={accuracy:.0f}%, img/s={rate:.0f}, bad={len(run.bad)}")
        row |= dict.fromkeys(VALIDATION, "") | validation
        add_row(os.path.join(run.args.out, "log.csv"), row, last)


@torch.no_grad()
def validate(run, done):
    """Loss (mean over batches of --batch-size) and recall of the validation pairs -> {one of
    VALIDATION: number}, in the first process. log.csv's rate leaves this time out."""
    if not run.first or not run.val:
        return {}
    start, module, losses = time.perf_counter(), run.module, []
    head = copy.deepcopy(module.head)                        # MGCA's loss changes its prototypes
    run.model.eval()
    with run.autocast, patch.object(objectives, "world", return_value=1):      # the others wait
        f = module.features({name: x.to(run.device) for name, x in run.val.items()})
        n, b = len(f["v"]), min(len(f["v"]), run.args.batch_size)
        for i in range(0, n - b + 1, b):
            some = {name: x[i:i + b] if x.ndim else x for name, x in f.items()}
            with contextlib.suppress(ValueError):            # the pairs feed none of --terms
                losses.append(module.objective.loss(some, head, **module.options)["loss"].item())
    prepare(run.model, run.args)
    scores = evaluation.similarities(module.objective, *(f[name] for name in "vVtTM"))
    r = evaluation.retrieval(*scores, torch.arange(n, device=run.device), number_texts(f["ids"]))
    run.bar.write(f"step {done}: validation R@1 {r['i2t_r1']:.1f} / {r['t2i_r1']:.1f} of {n}")
    run.since += time.perf_counter() - start
    return dict(zip(VALIDATION, (sum(losses) / len(losses) if losses else "", *r.values())))


# ----------------------------------------------------------------------------------- a run's files
def open_run(args):
    """Make or check the run folder -> the checkpoint to go on from, or {}."""
    last = os.path.join(args.out, "last.pt")
    try:
        os.makedirs(args.out, exist_ok=True)
        if args.overwrite and not args.resume:
            pathlib.Path(last).unlink(missing_ok=True)       # or a later --resume would take it
    except OSError as e:
        raise UserError(f"can't write in --out {args.out} ({e.strerror}): choose another")
    if not os.path.exists(last):
        return {}
    if not args.resume:
        raise UserError(f"{args.out} already holds a run: add --resume to go on with it, "
                        f"--overwrite to start afresh, or another --out")
    ckpt = evaluation.read_checkpoint(last)
    saved = ckpt["args"]                                     # an option of later on was off
    if "scenes" not in (args.data, saved["data"]):
        saved["data"] = args.data                            # Run compares what is in it
    wrong = [f"{flag(name)} {saved.get(name)} (now {value})" for name, value in vars(args).items()
             if name not in FREE and value != saved.get(name, None if value else value)]
    if wrong:
        raise UserError(f"{last} is a checkpoint of another run, with {', '.join(wrong)}: give the "
                        f"same options, or another --out")
    args.amp = saved["amp"]
    return ckpt


def add_row(path, row, last):
    """Put {column: value} into log.csv, in place of rows behind step `last`, of a killed run."""
    def save(file):                                          # write makes an OSError a sentence
        lines = [",".join(row)]
        if last and os.path.exists(path):
            rows = [x for x in pathlib.Path(path).read_text().splitlines() if x[:1].isdecimal()]
            lines += [x for x in rows if int(x.split(",")[0]) <= last]
        lines.append(",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()))
        file.write("\n".join([*lines, ""]).encode())
    write(path, save)


# ------------------------------------------------------------------------------------ the command
def finish(args):
    """Evaluate and draw, in the first process alone: what a run leaves behind."""
    leave_processes()
    if args.data != "scenes" and not args.val:
        return print(f"trained; without --val evaluate by `python eval.py {args.out} --data PATH`")
    print(f"trained; evaluating {args.out}")
    metrics = evaluation.evaluate(args.out, device=args.device)
    print(evaluation.table({os.path.basename(args.out): metrics}))
    print("pictures: " + ", ".join(visualize.draw_run(args.out, device=args.device)))


if __name__ == "__main__":
    try:
        args = options()
        if train(args):
            finish(args)
    except UserError as e:
        if isinstance(e, BadData) or os.environ.get("RANK", "0") == "0":
            print(f"train.py: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_processes()
