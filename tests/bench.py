"""Bench: what the README says about speed and memory, measured side by side in one run.

    python tests/bench.py filip                     # late interaction by blocks against the plain einsum: seconds and memory
    python tests/bench.py filip --batch 2048 --only "blocks bf16"
    pip install open_clip_torch && python tests/bench.py step       # a training step beside SPARC's, and beside open_clip's
    python tests/bench.py step --model ViT-B/32 --batch 32 --rounds 5

Nothing else should compute while it runs. Rivals take turns, round by round, so that a slow moment of the machine hits all of
them: of filip the best round counts, of step the ratios within a round. Every FILIP variant has a process of its own, so that its peak memory is its own.
"""
import argparse
import os
import resource
import sys
import time
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import losses
import model as models
from data import Batches, Scenes, Tokenizer, UserError, normalize
from eval import counted
from train import make_optimizer, pick_precision

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
            queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
            torch.multiprocessing.spawn(alone, (queue, name, args.batch or 512))
            seconds, mb = queue.get()
            best[name] = min(best.get(name, (seconds, mb)), (seconds, mb))
    print(f"late interaction, forward + backward, B = C = {args.batch or 512}, P 49, L 32, D 256, {torch.get_num_threads()} threads")
    s0, mb0 = best.get("blocks bf16", best[names[0]])
    for name, (s, mb) in best.items():
        print(f"{name:12} {s:8.2f} s {s / s0:7.2f} x {mb:9,.0f} MB {mb / mb0:7.1f} x")


def alone(rank, queue, name, batch):
    filip(queue, name, batch)


def open_clip_rival(c, batch):
    """open_clip's model with the sizes c, and its loss of the batch."""
    import open_clip
    model = open_clip.model.CLIP(c["embed_dim"], open_clip.model.CLIPVisionCfg(layers=c["vision_layers"], width=c["vision_width"], head_width=64,
                                 patch_size=c["patch_size"], image_size=c["image_size"]),
                                 open_clip.model.CLIPTextCfg(context_length=c["context_length"], vocab_size=c["vocab_size"], width=c["text_width"],
                                                             heads=c["text_heads"], layers=c["text_layers"]), quick_gelu=c["act"] == "quickgelu")
    clip_loss, texts = open_clip.loss.ClipLoss(), torch.zeros(len(batch["ids"]), c["context_length"], dtype=torch.long)
    texts[:, :batch["ids"].shape[1]] = batch["ids"]                # it reads all positions; its end of text is the largest id, as ours
    return model, lambda: clip_loss(*model(batch["images"], texts))


def compare_step(args):
    """A training step of CLIP's objective, ours and open_clip's, with the same pictures, captions, sizes, optimiser and precision; and SPARC's,
    whose local loss is then the difference."""
    amp = pick_precision(args.amp, torch.device("cpu"))
    dtype, autocast = losses.DTYPES.get(amp, torch.float32), lambda: torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16")
    tiny, batch_size = args.model == "tiny", args.batch or (128 if args.model == "tiny" else 32)
    data = Scenes(100_000, 0, models.CONFIGS[args.model]["image_size"])
    tok = Tokenizer.train(data.texts(), 1000)
    ours = models.build(args.model, vocab_size=tok.vocab_size if tiny else None, patches_through_h=tiny)
    c = ours.config
    batch = Batches(data, tok, batch_size, c["image_size"], c["context_length"], 0, None, 0, 1, False, None)[0]
    batch["images"] = normalize(batch["images"])

    def our_loss():
        f = ours(**batch)
        return losses.clip_loss(f["v"], f["t"], f["scale"])

    def sparc():
        f = ours(**batch)
        return losses.sparc_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"])["loss"]

    rivals = {"ours": (ours, our_loss), "sparc": (ours, sparc)}
    try:
        rivals["open_clip"] = open_clip_rival(c, batch)
    except ImportError:
        print("open_clip is not installed (pip install open_clip_torch): our steps alone")
    decay = argparse.Namespace(optimizer="adamw", lr=1e-4, beta2=0.98, weight_decay=0.1)
    optimizers, times, flop = {n: make_optimizer(m, decay) for n, (m, _) in rivals.items()}, {n: [] for n in rivals}, {}
    for name, (m, loss) in rivals.items():
        with autocast():
            flop[name] = counted(lambda: [loss()])
    for k in range((args.rounds or 30) + 2):
        for name, (m, loss) in rivals.items():
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            with autocast():
                x = loss()
            x.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizers[name].step()
            if k > 1:                                              # the first rounds are slower
                times[name].append(time.perf_counter() - start)
    x = torch.randn(2048, 2048, dtype=dtype)
    x @ x
    start = time.perf_counter()
    for _ in range(5):
        x @ x
    rate = 5 * 2 * 2048 ** 3 / (time.perf_counter() - start)
    print(f"{args.model}, batch {batch_size}, --amp {amp}, {torch.get_num_threads()} threads; a 2048-cube matmul in {dtype} runs at {rate / 1e9:,.0f} GFLOP/s")
    for name, t in times.items():
        t = sorted(t)
        print(f"{name:10} {1000 * t[0]:8.1f} ms at best, {1000 * t[len(t) // 2]:8.1f} median, {batch_size / t[len(t) // 2]:7,.0f} images/s, "
              f"{flop[name] / 1e9:7.1f} GFLOP of matmuls: at least {1000 * flop[name] / rate:6.1f} ms")
    for name in list(rivals)[1:]:
        ratios = sorted(b / a for a, b in zip(times["ours"], times[name]))
        print(f"{name} / ours, round by round: median {ratios[len(ratios) // 2]:.2f}, middle half {ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f}")


def main():
    ap = argparse.ArgumentParser(description="Time and memory, side by side.")
    ap.add_argument("what", choices=("filip", "step"), help="filip: late interaction by blocks and plain; step: a training step, SPARC's and open_clip's")
    ap.add_argument("--batch", type=int, help="pairs (default: filip 512; step 128 for tiny, 32 for other models)")
    ap.add_argument("--model", default="tiny", choices=[n for n, c in models.CONFIGS.items() if isinstance(c["vision_layers"], int)], help="for step")
    ap.add_argument("--amp", default="auto", choices=("auto", "off", "bf16"), help="for step; auto: bf16 where it is faster")
    ap.add_argument("--only", nargs="+", choices=list(FILIP), help="for filip: these variants alone")
    ap.add_argument("--rounds", type=int, help="how often each takes its turn (default: filip 2, step 30)")
    args = ap.parse_args()
    {"filip": compare_filip, "step": compare_step}[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"bench.py: {e}")
