"""Bench: what the README says about speed and memory, measured side by side in one run.

    python tests/bench.py filip                     # late interaction by blocks against the plain einsum: seconds and memory
    python tests/bench.py filip --batch 2048 --only "blocks bf16"
    pip install open_clip_torch && python tests/bench.py step       # a training step beside SPARC's, and beside open_clip's
    python tests/bench.py step --model ViT-B/32

Nothing else should compute while it runs. Rivals take turns, round by round, so that a slow moment of the machine hits all of
them: of filip the best round counts, of step the ratios within a round. Each has a process of its own: its peak memory is its own, and
so is what its C library does with freed memory, which train.py changes (keep_memory) and open_clip does not; it is measured with that, too.
"""
import argparse
import importlib.util
import os
import resource
import sys
import time
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import losses
import model as models
from data import Batches, Scenes, Tokenizer, UserError, normalize
from eval import counted
from train import keep_memory, make_optimizer, pick_precision

FILIP = {"einsum fp32": (losses._late_interaction, torch.float32), "einsum bf16": (losses._late_interaction, torch.bfloat16),
         "blocks fp32": (losses.late_interaction, torch.float32), "blocks bf16": (losses.late_interaction, torch.bfloat16)}


def filip(queue, name, batch, P=49, L=32, D=256):
    """Seconds of one forward and backward pass, and the megabytes it needs beyond its inputs, their gradients and a small warm-up."""
    similarity, dtype = FILIP[name]

    def run(n):
        V, T = (losses.unit(torch.randn(n, k, D)).to(dtype).requires_grad_() for k in (P, L))
        M = torch.arange(L) < torch.randint(4, L + 1, (n, 1))
        V.grad, T.grad = torch.zeros_like(V), torch.zeros_like(T)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        s_image, s_text = similarity(V, T, M)
        (s_image.diagonal().sum() + s_text.logsumexp(0).sum()).backward()
        return time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    run(8)
    queue.put(run(batch))


def compare_filip(args):
    names, best = args.only or list(FILIP), {}
    for _ in range(args.rounds or 2):
        for name in names:
            context = torch.multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            context.Process(target=filip, args=(queue, name, args.batch or 512)).start()
            seconds, mb = queue.get()
            best[name] = min(best.get(name, (seconds, mb)), (seconds, mb))
    print(f"late interaction, forward + backward, B = C = {args.batch or 512}, P 49, L 32, D 256, {torch.get_num_threads()} threads")
    s0, mb0 = best.get("blocks bf16", best[names[0]])
    for name, (s, mb) in best.items():
        print(f"{name:12} {s:8.2f} s {s / s0:7.2f} x {mb:9,.0f} MB {mb / mb0:7.1f} x")


def open_clip_rival(c):
    """open_clip's model with the sizes c, and its loss of a batch."""
    import open_clip
    model = open_clip.model.CLIP(c["embed_dim"], open_clip.model.CLIPVisionCfg(layers=c["vision_layers"], width=c["vision_width"], head_width=64,
                                 patch_size=c["patch_size"], image_size=c["image_size"]),
                                 open_clip.model.CLIPTextCfg(context_length=c["context_length"], vocab_size=c["vocab_size"], width=c["text_width"],
                                                             heads=c["text_heads"], layers=c["text_layers"]), quick_gelu=c["act"] == "quickgelu")
    clip_loss = open_clip.loss.ClipLoss()

    def loss(batch):                                               # it reads all positions; its end of text is the largest id, as ours
        return clip_loss(*model(batch["images"], F.pad(batch["ids"], (0, c["context_length"] - batch["ids"].shape[1]))))
    return model, loss


RIVALS = ("ours", "sparc", "local loss", "open_clip", "open_clip, memory kept")


def rival(pipe, name, args, amp):
    """One of RIVALS in a process of its own: first says what a step costs in FLOP, then takes steps whenever asked, and says how long one took."""
    tiny = args.model == "tiny"
    data = Scenes(100_000, 0, models.CONFIGS[args.model]["image_size"])
    tok = Tokenizer.train(data.texts(), 1000)
    model = models.build(args.model, vocab_size=tok.vocab_size if tiny else None, patches_through_h=tiny)
    c = model.config
    batches = Batches(data, tok, args.batch, c["image_size"], c["context_length"])
    batches = [b | {"images": normalize(b["images"])} for b in (batches[k] for k in range(8))]
    if not name.startswith("open_clip") or "kept" in name:
        keep_memory()

    def ours(batch):
        f = model(**batch)
        return losses.clip_loss(f["v"], f["t"], f["scale"])

    def sparc(batch, part="loss"):
        f = model(**batch) if part == "loss" else features[id(batch)]
        return losses.sparc_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"])[part]

    loss = {"ours": ours, "sparc": sparc, "local loss": lambda batch: sparc(batch, "local")}.get(name)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
    if loss is None:
        model, loss = open_clip_rival(c)
    elif name == "local loss":                                     # from the features on: neither towers nor optimiser
        with autocast():
            features = {id(b): {k: x.detach().requires_grad_(x.is_floating_point()) for k, x in model(**b).items()} for b in batches}
    decay = argparse.Namespace(optimizer="adamw", lr=1e-4, beta2=0.98, weight_decay=0.1)
    optimizer = make_optimizer(model, decay)

    def step(batch):
        with autocast():
            x = loss(batch)
        x.backward()
        if name != "local loss":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    with autocast():
        pipe.send(counted(lambda: [loss(batches[0])]))
    for turn in iter(pipe.recv, None):
        step(batches[(turn - 1) % 8])                              # brings caches and threads back
        start = time.perf_counter()
        for k in range(3):
            step(batches[(turn + k) % 8])
        pipe.send((time.perf_counter() - start) / 3)


def compare_step(args):
    """A training step of CLIP's objective, ours and open_clip's, with the same pictures, captions, sizes, optimiser and precision; SPARC's
    step; and its local loss alone."""
    args.batch, names = args.batch or (128 if args.model == "tiny" else 32), RIVALS
    if importlib.util.find_spec("open_clip") is None:
        print("open_clip is not installed (pip install open_clip_torch): our steps alone")
        names = RIVALS[:3]
    amp, context, pipes = pick_precision(args.amp, torch.device("cpu")), torch.multiprocessing.get_context("spawn"), {}
    x = torch.randn(2048, 2048, dtype=losses.DTYPES.get(amp, torch.float32))
    x @ x
    start = time.perf_counter()
    for _ in range(5):
        x @ x
    rate = 5 * 2 * 2048 ** 3 / (time.perf_counter() - start)
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=rival, args=(theirs, name, args, amp), daemon=True).start()
    flop, times = {name: pipe.recv() for name, pipe in pipes.items()}, {name: [] for name in names}
    for turn in tqdm(range((args.rounds or (30 if args.model == "tiny" else 5)) + 1), unit="round"):
        for name, pipe in pipes.items():
            pipe.send(3 * turn)
            seconds = pipe.recv()
            if turn:                                               # the first round is slower
                times[name].append(seconds)
    for pipe in pipes.values():
        pipe.send(None)                                            # enough
    print(f"{args.model}, batch {args.batch}, --amp {amp}, {torch.get_num_threads()} threads; a 2048-cube matmul in {x.dtype} runs at {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'':24} {'ms a step':>9} {'images/s':>9} {'/ ours':>7} {'middle half':>13} {'GFLOP':>7} {'at least ms':>11}")
    for name, t in times.items():
        half = lambda x, share: sorted(x)[int(share * len(x))]
        ratios, median = [b / a for a, b in zip(times["ours"], t)], half(t, 0.5)
        print(f"{name:24} {1000 * median:9.1f} {args.batch / median:9,.0f} {half(ratios, 0.5):7.2f} {half(ratios, 0.25):6.2f} {half(ratios, 0.75):6.2f} "
              f"{flop[name] / 1e9:7.1f} {1000 * flop[name] / rate:11.1f}")


def main():
    ap = argparse.ArgumentParser(description="Time and memory, side by side.")
    ap.add_argument("what", choices=("filip", "step"), help="filip: late interaction by blocks and plain; step: a training step, SPARC's and open_clip's")
    ap.add_argument("--batch", type=int, help="pairs (default: filip 512; step 128 for tiny, 32 for other models)")
    ap.add_argument("--model", default="tiny", choices=[n for n, c in models.CONFIGS.items() if isinstance(c["vision_layers"], int)], help="for step")
    ap.add_argument("--amp", default="auto", choices=("auto", "off", "bf16"), help="for step; auto: bf16 where it is faster")
    ap.add_argument("--only", nargs="+", choices=list(FILIP), help="for filip: these variants alone")
    ap.add_argument("--rounds", type=int, help="how often each takes its turn (default: filip 2; step 30 for tiny, 5 for other models)")
    args = ap.parse_args()
    {"filip": compare_filip, "step": compare_step}[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"bench.py: {e}")
