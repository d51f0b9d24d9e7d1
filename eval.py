"""Evaluation: retrieval, zero-shot classification, zero-shot segmentation, word-patch alignment, on scenes or on real pictures.

    python eval.py runs/sparc                          # on 1,000 test scenes: prints a table, writes runs/sparc/metrics.json
    python eval.py runs/sparc runs/clip --data photos/test.csv        # on real pictures, several runs side by side
    python eval.py cost                                # what a step costs at full size, beside SPARC's Table 12 and FILIP's Table 5

Covers: FILIP 3.1.2 and 4.5 (late interaction at inference, mean similarity over prompts), SPARC 4.2, 4.3, 4.5, D.5, D.6 and D.7.

All numbers are percentages, except the local losses, in nats, and the cost. What they mean:
    retrieval       R@k: the true partner is among the k best of all. Ties count against the model. Several captions a picture: a
                    picture finds any of its captions, each caption must find its picture (the five-captions protocol)
    classification  top-1 over 8 shapes, over 8 colours, on scenes of one object; prompts are averaged
    segmentation    each patch goes to the class text it is closest to; classes: the objects present and the background. miou: mean over
                    the objects' classes only; patch_acc: the share of patches lying on an object that get that object's class
    alignment       colour_word_acc, shape_word_acc: a word's best patch lies on the object it names (covers a quarter of the patch or
                    more; chance = what a random patch gets). patch_word_acc: the best word of a patch on an object names that object.
                    local_gap: SPARC's local loss (MGCA's CTA) on shuffled pictures minus on the right ones; near 0 it never looks
    composition     swap_acc: the caption is preferred to the same caption with two colours exchanged (chance 50)
    cost            of training: optimiser steps, milliseconds a step (validation and checkpoints included), most memory held in MB

Differs from the papers: SPARC does not say which text stands for "background" in segmentation; here the captions' own words, "on sand".
FILIP is scored by late interaction, PACL by pooling the patches for each text, all others, CLIP+FILIP too, by their global embeddings. For
FILIP a patch's similarity to a class text is its best word's, the late interaction of one patch.
"""
import argparse, json, operator, os, pathlib
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
import model as models
from data import (COLOURS, SHAPES, Scenes, Tokenizer, UserError, center_crop, normalize, open_dataset, prompts, to_tensor,
                  word_tokens, write)
from losses import OBJECTIVES, WITHIN_PAIR, filip_similarity, make_head, pacl_similarity, sparc_loss, unit


# ----------------------------------------------------------------------------------------------------------------- runs and features
def read_checkpoint(path):
    """A checkpoint of train.py as a dict; tensors, numbers and strings only, no code is unpickled."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: train one with `torchrun train.py --out {os.path.dirname(path) or '.'}`")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"config", "model", "head", "merges", "args", "step"} - set(ckpt)
    except Exception as e:                                          # torch raises many kinds on a damaged file
        raise UserError(f"{path} can't be read as a checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:100]}); train again or take a copy") from None
    if missing:
        raise UserError(f"{path} is no checkpoint of train.py: it lacks {', '.join(sorted(missing))}")
    return ckpt


def load_run(folder, device="cpu"):
    """-> model in eval mode, tokeniser, the run's options with its step, its objective's head and what it cost."""
    ckpt = read_checkpoint(os.path.join(folder, "last.pt"))
    try:
        model = models.CLIP(**ckpt["config"])
        model.load_state_dict(ckpt["model"])
        head = make_head(ckpt["args"]["loss"], ckpt["config"]["embed_dim"])
        head.load_state_dict(ckpt["head"])
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"{folder}/last.pt is of another version of model.py ({str(e).splitlines()[0][:100]}): train again") from None
    cost = {"steps": ckpt["step"], "ms_per_step": 1000 * ckpt.get("seconds", 0) / max(1, ckpt["step"]), "peak_mb": ckpt.get("peak_mb") or 0}
    return model.to(device).eval(), Tokenizer(ckpt["merges"]), argparse.Namespace(**ckpt["args"], step=ckpt["step"], cost=cost, head=head.to(device).eval())


@torch.no_grad()
def encode_images(model, images, batch=250, **kw):
    """List of RGB pictures -> v (N,D), V (N,P,D), fp32 on the model's device."""
    device, size = model.logit_scale.device, model.config["image_size"]
    out = [model.encode_image(normalize(to_tensor([center_crop(im, size) for im in images[i:i + batch]]).to(device)), **kw)
           for i in range(0, len(images), batch)]
    return tuple(torch.cat(x) for x in zip(*out))


@torch.no_grad()
def encode_texts(model, tok, texts, batch=500):
    """List of texts -> t (N,D), T (N,L,D), M (N,L); L is the longest of them."""
    device = model.logit_scale.device
    ids, mask = tok(texts, model.context_length)
    L = int(mask.sum(1).max())
    ids, mask = ids[:, :L].to(device), mask[:, :L].to(device)
    out = [model.encode_text(ids[i:i + batch], mask[i:i + batch]) for i in range(0, len(texts), batch)]
    return *(torch.cat(x) for x in zip(*out)), mask


@torch.no_grad()
def similarities(loss, v, V, t, T, M, rows=16):
    """Scores of all pictures with all texts -> (ranking texts for a picture, ranking pictures for a text), both (B,C), rows pictures.

    Late interaction for FILIP (by blocks of rows), text-wise pooling for PACL, cosine of the global embeddings for the others.
    """
    if loss == "pacl":
        s = pacl_similarity(V, t)
        return s, s
    if loss != "filip":
        s = unit(v) @ unit(t).T
        return s, s
    blocks = [filip_similarity(V[i:i + rows], T, M) for i in range(0, len(V), rows)]
    return tuple(torch.cat(x) for x in zip(*blocks))


# -------------------------------------------------------------------------------------------------------------------------- metrics
def retrieval(s_i2t, s_t2i, owner):
    """s (B,C) similarities; owner (C,): the picture each text belongs to -> R@1, 5, 10 both ways."""
    own = owner[None] == torch.arange(len(s_i2t), device=owner.device)[:, None]                # (B, C)
    best = s_i2t.masked_fill(~own, float("-inf")).max(1, keepdim=True).values
    rank_i = (~(s_i2t < best) & ~own).sum(1)                                                   # strangers not below the best own text, NaN too
    true = s_t2i.gather(0, owner[None])                                                        # (1, C)
    rank_t = (~(s_t2i < true) & ~own).sum(0)
    r = lambda rank, k: 100 * (rank < k).sum().item() / len(rank)
    return {f"{way}_r{k}": r(rank, k) for way, rank in (("i2t", rank_i), ("t2i", rank_t)) for k in (1, 5, 10)}


def classify(loss, model, tok, v, V, classes):
    """v (B,D), V (B,P,D); classes: a list of prompts for each class -> predictions (B,).
    CLIP averages the prompts' unit text vectors; FILIP, whose tokens can't be averaged, their similarities (FILIP 3.1.2); PACL too."""
    scores = []
    for texts in classes:
        t, T, M = encode_texts(model, tok, texts)
        if loss in ("filip", "pacl"):
            scores.append(similarities(loss, v, V, t, T, M)[0].mean(1))
        else:
            scores.append(unit(v) @ unit(unit(t).mean(0)))
    return torch.stack(scores, 1).argmax(1)


def an(word):
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def patch_coverage(masks, grid):
    """masks (N,H,W) bool -> (N, P): the share of each patch that each object covers."""
    m = torch.from_numpy(masks).float()
    p = m.shape[-1] // grid
    return m.view(len(m), grid, p, grid, p).mean((2, 4)).flatten(1)


def segment(loss, V, encoded):
    """V (P,D) of one picture, the class texts as encode_texts gives them -> class of each patch (P,): SPARC 4.5."""
    t, T, M = encoded
    if "filip" in loss:
        s = torch.einsum("pd,cld->pcl", unit(V), unit(T)).masked_fill(~M[None], float("-inf")).amax(2)
    else:
        s = unit(V) @ unit(t).T
    return s.argmax(1)


def on_scenes(model, tok, args, n=1000, seed=0, progress=True):
    """Every metric on n test scenes -> the dict of metrics.json."""
    loss, size, grid = args.loss, model.config["image_size"], model.visual.grid
    test = Scenes(n, seed, size, "test")
    S = [test[i] for i in tqdm(range(n), "drawing test scenes", disable=not progress, leave=False)]
    images, captions = [s["image"] for s in S], [s["caption"] for s in S]
    v, V = encode_images(model, images)
    t, T, M = encode_texts(model, tok, captions)
    out = {"retrieval": retrieval(*similarities(loss, v, V, t, T, M), torch.arange(n, device=v.device))}

    one = Scenes(n, seed, size, "test", objects=(1, 1), unique=False)
    specs = [one.spec(i) for i in range(n)]
    v1, V1 = encode_images(model, [one.draw(s) for s in specs])
    things = [s["things"][0] for s in specs]
    by_shape = [prompts(s, ("a", "a small")) for s in SHAPES]
    by_colour = [[an(f"{c} thing"), *prompts(f"{c} thing", ("a small",))] for c in COLOURS]
    shape, colour = (classify(loss, model, tok, v1, V1, classes).tolist() for classes in (by_shape, by_colour))
    out["classification"] = {"shape": 100 * sum(SHAPES[k] == x.shape for k, x in zip(shape, things)) / n,
                             "colour": 100 * sum([*COLOURS][k] == x.colour for k, x in zip(colour, things)) / n}

    # segmentation: patches through h_v and the adapter where the tower has h_v (SPARC D.7)
    Vs = encode_images(model, images, patches_through_h=True)[1] if model.pool == "mean" else V
    names = [[an(" ".join(w for w in x[:4] if w)) for x in s["things"]] + [f"on {s['background']}"] for s in S]
    at, enc = 0, encode_texts(model, tok, [x for group in names for x in group])
    ious, patch_hits, hits, chance, patch_words = [], [], {"colour": [], "shape": []}, [], []
    similarity = torch.einsum("bld,bpd->blp", T, V)                                            # a word's best patch: SPARC's s
    cosine = torch.einsum("bld,bpd->blp", unit(T), unit(V)).masked_fill(~M[..., None], float("-inf"))
    best_patch = (cosine if "filip" in loss else similarity).argmax(2).cpu()
    best_word = cosine.argmax(1).cpu()                                                         # (B, P): FILIP's m_k
    for i, s in enumerate(tqdm(S, "alignment", disable=not progress, leave=False)):
        cover = patch_coverage(s["masks"], grid)                                               # (N, P)
        k = len(s["things"])
        label = segment(loss, Vs[i], [x[at:at + k + 1] for x in enc]).cpu()
        at += k + 1
        pixels = label.view(grid, grid).repeat_interleave(size // grid, 0).repeat_interleave(size // grid, 1)
        for c, mask in enumerate(torch.from_numpy(s["masks"])):
            ious.append((((pixels == c) & mask).sum() / ((pixels == c) | mask).sum()).item())
        positions = word_tokens(tok, s["words"])
        for w, pos in zip(s["words"], positions):
            if w.kind in hits and pos[-1] < T.shape[1]:
                hits[w.kind].append((cover[w.thing, best_patch[i, pos[-1]]] >= 0.25).item())   # a word of several tokens: its last
                chance.append((cover[w.thing] >= 0.25).float().mean().item())
        names_thing = {l: w.thing for w, pos in zip(s["words"], positions) for l in pos if w.thing >= 0}
        share, thing = cover.max(0)
        for p in (share >= 0.25).nonzero()[:, 0].tolist():
            patch_words.append(names_thing.get(best_word[i, p].item(), -1) == thing[p].item())
            patch_hits.append(label[p].item() == thing[p].item())
    mean = lambda x: 100 * sum(x) / max(1, len(x))
    out["segmentation"] = {"miou": mean(ious), "patch_acc": mean(patch_hits)}
    out["alignment"] = {"colour_word_acc": mean(hits["colour"]), "shape_word_acc": mean(hits["shape"]), "chance": mean(chance),
                        "patch_word_acc": mean(patch_words)}
    matched, shuffled = local_losses(args, model, v, V, t, T, M)
    if matched is not None:
        out["alignment"] |= {"local": matched, "local_shuffled": shuffled, "local_gap": shuffled - matched}

    pairs = [(i, s["swapped"]) for i, s in enumerate(S) if s["swapped"]]
    index = torch.tensor([i for i, _ in pairs], device=v.device)
    own = similarity_of_pairs(loss, v[index], V[index], t[index], T[index], M[index])
    swapped = similarity_of_pairs(loss, v[index], V[index], *encode_texts(model, tok, [x for _, x in pairs]))
    out["composition"] = {"swap_acc": 100 * (own > swapped).sum().item() / len(pairs)}
    return out


@torch.no_grad()
def local_losses(args, model, v, V, t, T, M, batch=250):
    """Mean local loss (SPARC, MGCA) of matched pairs and of pairs whose pictures are shuffled, or (None, None) for an objective without one."""
    if args.loss not in WITHIN_PAIR:
        return None, None
    sums = torch.zeros(2)
    for i in range(0, len(v), batch):
        for k, shift in enumerate((0, 1)):
            j = slice(i, i + batch)
            f = {"v": v[j], "V": V[j].roll(shift, 0), "t": t[j], "T": T[j], "M": M[j], "scale": model.logit_scale.exp()}
            sums[k] += OBJECTIVES[args.loss](f, args, args.head)[WITHIN_PAIR[args.loss]].item() * len(v[j])
    return (sums / len(v)).tolist()


def similarity_of_pairs(loss, v, V, t, T, M):
    """Score of each picture with the text of the same row -> (B,)."""
    if loss not in ("filip", "pacl"):
        return (unit(v) * unit(t)).sum(-1)
    return torch.cat([similarities(loss, v[i:i + 1], V[i:i + 1], t[i:i + 1], T[i:i + 1], M[i:i + 1])[0][0] for i in range(len(V))])


def on_pairs(model, tok, args, path, progress=True):
    """Retrieval on a CSV: every picture, every caption."""
    data = open_dataset(path)
    vs, Vs, size = [], [], model.config["image_size"]
    for i in tqdm(range(0, len(data), 100), "pictures", disable=not progress, leave=False):
        v, V = encode_images(model, [center_crop(data.open(k), size) for k in range(i, min(i + 100, len(data)))])
        vs.append(v); Vs.append(V)
    t, T, M = encode_texts(model, tok, data.texts())
    owner = torch.tensor([i for i, c in enumerate(data.captions) for _ in c], device=t.device)
    return {"retrieval": retrieval(*similarities(args.loss, torch.cat(vs), torch.cat(Vs), t, T, M), owner)}


def evaluate(folder, data=None, n=1000, device="cpu", progress=True):
    """Evaluate a run folder and write its metrics.json -> the metrics."""
    model, tok, args = load_run(folder, device)
    data = data or (args.data if args.data == "scenes" else args.val)
    if not data:
        raise UserError(f"{folder} was trained on {args.data}: name the pictures to evaluate on with --data FILE.csv")
    if data == "scenes" and args.data != "scenes":
        raise UserError(f"{folder} was trained on {args.data}, not on scenes: give --data FILE.csv")
    metrics = on_scenes(model, tok, args, n, progress=progress) if data == "scenes" else on_pairs(model, tok, args, data, progress)
    metrics["cost"] = args.cost
    metrics["about"] = {"loss": args.loss, "model": args.model, "data": data, "step": args.step}
    write(os.path.join(folder, "metrics.json"), lambda tmp: pathlib.Path(tmp).write_text(json.dumps(metrics, indent=1)))
    return metrics


# ---------------------------------------------------------------------------------------------------------------------- what it costs
TABLE_12 = {"clip": (1.15, 2.29, 4.57, 9.14), "pacl": (1.2, 2.46, 5.24, 12.8), "gloria": (3.34, 13.21), "mgca": (1.16, 2.31, 4.62, 9.23),
            "filip": (1.37, 3.17, 8.09, 27.25), "sparc": (1.15, 2.3, 4.6, 9.19)}               # SPARC's, TFLOP of an update on one of 256 devices


TABLE_12_MB = {"clip": (4394, 4452, 5889, 8578), "pacl": (4682, 6267, 9786, 14785), "gloria": (8013, 13840), "filip": (4394, 5230, 8657, 15463)}   # its peaks
TABLE_5 = {(512, 4, 1.0): (2.85, 26000), (512, 2, 1.0): (2.67, 23468), (256, 2, 1.0): (2.31, 22382), (256, 2, 0.5): (1.61, 16336),
           (256, 2, 0.25): (1.39, 16100), "clip": (1.31, 14300)}   # FILIP's: D, bytes a number, share of tokens -> seconds a step, MB


def late_flops(pairs, P, L, D, keep):
    """Of FILIP's products, forward and backward, both directions: all tokens of one side, the selected of the other."""
    return 6 * pairs * D * (P * int(keep * L) + int(keep * P) * L)


def tower_flops(n, width, layers=12):
    """Multiplications and additions of a transformer's matmuls on n tokens, forward."""
    return layers * (24 * n * width ** 2 + 4 * n ** 2 * width)


def flops(loss, batch, devices=256, P=196, L=55, D=512, width=768, keep=0.2):
    """Of the matmuls of one training step on one device that holds batch / devices pairs and meets the whole batch; forward + backward is three
    times the forward, and both directions are computed. SPARC D.6: ViT-B/16 and its text tower of 12 x 768."""
    b = batch / devices
    q = b * batch                                                  # pairs of a picture and a text that one device compares
    towers = 3 * b * (tower_flops(P, width) + 2 * P * 3 * 16 ** 2 * width + tower_flops(L, width))
    if loss == "clip":
        return towers + 12 * q * D
    adapters = 6 * b * (P + L) * width * D                         # on every token, not on one vector a side
    embedder = b * (6 * P * (2 * width * D + D ** 2) + 6 * L * width * D)
    local = {"pacl": 24 * q * P * D + 12 * q * D + embedder - adapters,
             "gloria": 24 * q * P * L * D,
             "mgca": b * 3 * (2 * (2 * P + 2 * L + P + L) * 128 * D + 8 * 128 * L * P + 4 * (L ** 2 + P ** 2) * D + 4 * 500 * D),
             "filip": late_flops(q, P, L, D, keep) + 4 * b ** 2 * P * L * D,                   # the second: choosing the tokens to send
             "sparc": b * 3 * (4 * P * L * D + 4 * L ** 2 * D)}
    return towers + 12 * q * D + adapters + local[loss]


def extra_memory(loss, batch, devices=256, P=196, L=55, D=512, keep=0.2):
    """Bytes that the step of flops() holds beyond CLIP's, all similarities at once in two bytes a number: what all processes' tokens take,
    with a gradient buffer of that size for PACL and GLoRIA, and the tensors in which pairs are compared."""
    q, kT, kI = batch ** 2 / devices, int(keep * L), int(keep * P)
    return {"pacl": 4 * batch * P * D + 4 * q * (P + D), "gloria": 4 * batch * P * D + 4 * q * (2 * P * L + L * D),
            "filip": 2 * batch * (kT + kI) * D + 2 * q * (P * kT + kI * L)}[loss]


def cost_table():
    """SPARC's Table 12 beside the model, as text. CLIP's published row counts more than matmuls, so the other rows are it + what they add.

    "20% token dropping" fits only if 20% are kept, and on one side of each product. Three cells cost a quarter to two fifths more than the
    model: those that would not fit in 16 GB, where the compiler computes values of the forward pass twice. The memory of B = 2,048 is hidden
    below that of the optimiser's step; the model has nothing to say there."""
    batches = (2048, 4096, 8192, 16384)
    lines = [f"{'TFLOP a step and device':24}" + "".join(f"{f'B = {B:,}':>24}" for B in batches),
             f"{'':24}" + f"{'paper   model  ratio':>24}" * 4]
    for loss, published in TABLE_12.items():
        cells = []
        for B, paper, clip in zip(batches, published, TABLE_12["clip"]):
            model = flops("clip", B) / 1e12 if loss == "clip" else clip + (flops(loss, B) - flops("clip", B)) / 1e12
            cells.append(f"{paper:11.2f} {model:7.2f} {model / paper:5.3f}")
        lines.append(f"{loss:24}" + "".join(f"{c:>24}" for c in cells))
    lines += ["", "MB more than CLIP"]
    for loss in ("pacl", "gloria", "filip"):
        cells = []
        for B, paper, clip in zip(batches, TABLE_12_MB[loss], TABLE_12_MB["clip"]):
            model = extra_memory(loss, B) / 1e6
            cells.append(f"{paper - clip:11,} {model:7,.0f} " + (f"{model / (paper - clip):5.2f}" if paper > clip else "    -"))
        lines.append(f"{loss:24}" + "".join(f"{c:>24}" for c in cells))
    return "\n".join(lines)


def filip_table(b=512, devices=8, P=49, L=77):
    """FILIP's Table 5, ViT-B/32 with b pairs on each of its devices, beside what should drive it, as text: what the loss adds to the
    time of CLIP's step, and its arithmetic, both as a share of the first row's; what a GPU receives from the others' tokens and the memory
    of all similarities at once. The paper's 12 GB over CLIP can't hold the first row's 31 GB a direction: it too must have worked in parts."""
    (seconds0, mb0), rows = TABLE_5["clip"], {k: x for k, x in TABLE_5.items() if k != "clip"}
    first = next(iter(rows))
    added = lambda D, keep: late_flops(b * b * devices, P, L, D, keep)
    lines = [f"{'D  bytes  tokens':24}{'time':>12}{'arithmetic':>12}{'TFLOP':>10}{'MB received':>13}{'MB of all at once':>19}{'MB over CLIP':>14}",
             f"{'':24}{'paper':>12}{'model':>12}{'model':>10}{'model':>13}{'model':>19}{'paper':>14}"]
    for (D, size, keep), (seconds, mb) in rows.items():
        kI, kT = int(keep * P), int(keep * L)
        lines.append(f"{f'{D:3} {size:4} {keep:9.0%}':24}{(seconds - seconds0) / (rows[first][0] - seconds0):12.2f}{added(D, keep) / added(first[0], first[2]):12.2f}"
                     f"{added(D, keep) / 1e12:10.1f}{b * (devices - 1) * (kI + kT) * D * size / 2 ** 20:13,.0f}"
                     f"{b * b * devices * (P * kT + kI * L) * size / 2 ** 20:19,.0f}{mb - mb0:14,}")
    return "\n".join(lines)


def counted(forward):
    """FLOPs of the matmuls that forward() and its backward really run, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        sum(x.float().sum() for x in forward()).backward()
    return counter.get_total_flops()


def cost_check(P=196, L=55, D=512, B=16, keep=0.2):
    """The model of flops() against counted operations: one pair through the towers; the losses of one pair that meets B others -> text.
    SPARC's counts 11% less, as one matrix serves both directions. PACL and GLoRIA are left out: their closed forms here are other matmuls."""
    model, mask = models.build("SPARC-ViT-B/16"), torch.ones(1, L, dtype=torch.bool)
    pair = torch.zeros(1, 3, 224, 224), torch.zeros(1, L, dtype=torch.long), mask
    towers = counted(lambda: operator.itemgetter("v", "t")(model(*pair)))
    random = lambda n, k: torch.randn(n, k, D, requires_grad=True)
    V, T, kI, kT = random(1, P), random(1, L), int(keep * P), int(keep * L)
    filip = counted(lambda: (filip_similarity(V, random(B, kT), mask[:, :kT].expand(B, -1))[0], filip_similarity(random(B, kI), T, mask)[1]))
    sparc = counted(lambda: [sparc_loss(V[:, 0], T[:, 0], V, T, mask, 1.0)["local"]])
    modelled = {"towers": (towers, 3 * (tower_flops(P, 768) + 2 * P * 768 ** 2 + tower_flops(L, 768))),
                "filip": (filip, late_flops(B, P, L, D, keep)), "sparc": (sparc, 3 * (4 * P * L * D + 4 * L ** 2 * D))}
    return "\n".join(f"{k:24}{n / 1e9:11.2f} {m / 1e9:7.2f} {n / m:5.3f}" for k, (n, m) in modelled.items())


def table(runs):
    """{name: metrics} -> a Markdown table, one row a metric, one column a run."""
    rows = list(dict.fromkeys((g, k) for m in runs.values() for g in m if g != "about" for k in m[g]))
    width = max(len(f"{g} {k}") for g, k in rows)
    lines = [f"| {'':{width}} | " + " | ".join(f"{n:>8}" for n in runs) + " |", f"|{'-' * (width + 2)}|" + "|".join("-" * (max(8, len(n)) + 1) + ":" for n in runs) + "|"]
    for g, k in rows:
        cells = [f"{m[g][k]:.{2 if 'local' in k else 0 if g == 'cost' else 1}f}" if k in m.get(g, {}) else "" for m in runs.values()]
        lines.append(f"| {g + ' ' + k:{width}} | " + " | ".join(f"{c:>{max(8, len(n))}}" for c, n in zip(cells, runs)) + " |")
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description="Evaluate runs: prints a table (one column a run) and writes metrics.json in each run folder.")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py, such as runs/sparc; or the word cost: SPARC's Table 12, FILIP's Table 5")
    ap.add_argument("--data", help="scenes, or a CSV with the columns image,caption (default: what the run was trained for)")
    ap.add_argument("--n", type=int, default=1000, help="number of test scenes")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = ap.parse_args()
    if args.runs == ["cost"]:
        print(cost_table())
        print(f"\n{filip_table()}")
        print(f"\n{'GFLOP':24}{'counted   model  ratio':>24}\n{cost_check()}")
        return
    if args.n < 10:
        raise UserError(f"--n {args.n}: at least 10 scenes are needed")
    names = [os.path.basename(os.path.normpath(r)) for r in args.runs]
    names = names if len(set(names)) == len(names) else args.runs
    print(table({name: evaluate(r, args.data, args.n, args.device) for name, r in zip(names, args.runs)}))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"eval.py: {e}")
