"""Every loss against a loop-by-loop transcription of its paper, and against the mistakes that public copies of it make.

    pytest tests/test_losses.py             # ten seconds on one core
    pytest tests/test_losses.py -k trap     # the mistakes, but for those that need two processes: they are at the end

slow_clip, slow_filip and slow_sparc follow the equations as printed, in float64: read them beside the paper and losses.py.
A trap test computes the mistake itself and shows that it gives another value or gradient, so a copy that made it would fail here.
Two traps lie elsewhere: the mask made from ids in test_data.py, the text's mean over padding in test_model.py.
"""
import contextlib
import datetime
import math
import os
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import losses

HALVES = [(range(0, 2), 5), (range(2, 4), 8)]        # which pairs each of two processes holds, and how long its captions are padded


# -------------------------------------------------------------------------------------------------------------- the papers, slowly
nce = lambda scores, i: -torch.log(torch.exp(scores[i]) / sum(torch.exp(s) for s in scores))
cos = lambda x, y: (x / x.norm()) @ (y / y.norm())


def slow_clip(v, t, g):
    """SPARC's equation (1)."""
    B = range(len(v))
    return sum(nce([g * cos(v[i], t[j]) for j in B], i) + nce([g * cos(t[i], v[j]) for j in B], i) for i in B) / (2 * len(B))


def slow_filip(V, T, M, g, keep=1, workers=None):
    """FILIP's equations (3) to (5), then (1). Each worker is (its pairs, its padded caption length); tokens are selected within it."""
    (B, P, _), L = V.shape, T.shape[1]
    patches = [[V[i, k] / V[i, k].norm() for k in range(P)] for i in range(B)]
    words = [[T[j, l] / T[j, l].norm() for l in range(L) if M[j, l]] for j in range(B)]

    def best(mine, others, n):                          # the tokens with the largest (3) among all samples of the other side
        score = [max((x @ y).item() for other in others for y in other) for x in mine]
        return [mine[k] for k in sorted(range(len(mine)), key=lambda k: -score[k])[:max(1, int(keep * n))]]

    sent_patches, sent_words = [], []
    for members, length in workers or [(range(B), L)]:
        sent_patches += [best(patches[i], [words[j] for j in members], P) for i in members]
        sent_words += [best(words[j], [patches[i] for i in members], length) for j in members]
    s_image = lambda i, j: sum(max(p @ w for w in sent_words[j]) for p in patches[i]) / len(patches[i])        # (3), (4)
    s_text = lambda i, j: sum(max(p @ w for p in sent_patches[i]) for w in words[j]) / len(words[j])           # (5)
    return sum(nce([g * s_image(k, j) for j in range(B)], k) / B + nce([g * s_text(j, k) for j in range(B)], k) / B for k in range(B)) / 2  # (1)


def slow_sparc(v, t, V, T, M, g, global_weight=0.5, local_weight=1.0, sigma=None, softmax=False, drop_special=False):
    (B, P, _), L, local = V.shape, T.shape[1], []
    sigma = 1 / P if sigma is None else sigma
    for b in range(B):
        words, c = [T[b, l] for l in range(L) if M[b, l]], []
        for w in words:
            s = [w @ V[b, p] for p in range(P)]
            s_hat = [(x - min(s)) / (max(s) - min(s)) for x in s]                              # (2)
            s_til = [x if x >= sigma else 0 * x for x in s_hat]                                # (3)
            s_til = [torch.exp(x) for x in s] if softmax else s_til
            a = [x / sum(s_til) for x in s_til]                                                # (4)
            c.append(sum(a[p] * V[b, p] for p in range(P)))                                    # (5)
        words, c = (words[1:-1], c[1:-1]) if drop_special else (words, c)
        local += [(nce([g * cos(c[l], w) for w in words], l) + nce([g * cos(words[l], x) for x in c], l)) / 2 for l in range(len(words))]
    return global_weight * slow_clip(v, t, g) + local_weight * sum(local) / len(local)         # (6), mean over all tokens; (7)


# -------------------------------------------------------------------------------------------------------------------- small pieces
def pairs(P=4, D=5, dtype=torch.float64, scale=10.):
    """Four pairs, captions of 3, 5, 8 and 4 real tokens. Padded positions hold random vectors, as a text tower leaves them."""
    draw, shapes = torch.Generator().manual_seed(0), {"v": (D,), "t": (D,), "V": (P, D), "T": (8, D)}
    f = {k: torch.randn(4, *shape, generator=draw, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}
    wide = torch.promote_types(dtype, torch.float32)                                           # a model keeps its scale in full precision
    return f | {"M": torch.arange(8) < torch.tensor([3, 5, 8, 4])[:, None], "log_scale": torch.tensor(scale, dtype=wide).log()}


def subset(f, rows, length=8):
    f = {k: x if x.dim() == 0 else x[list(rows)] for k, x in f.items()}
    return f | {k: f[k][:, :length] for k in ("T", "M") if k in f}


def run(loss_fn, f, context=contextlib.nullcontext()):
    """-> loss, {name: gradient}; only the forward pass runs in the context."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in f.items() if x.is_floating_point()}
    with context:
        loss = loss_fn(f | leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {k: torch.zeros_like(x) if d is None else d for (k, x), d in zip(leaves.items(), grads)}


def same(a, b, value=1e-9, gradient=1e-7):             # NaN is the same as nothing
    return bool((a[0] - b[0]).abs() <= value) and all(bool(((a[1][k] - b[1][k]).abs() <= gradient).all()) for k in a[1])


def finite(result):
    return all(bool(x.isfinite().all()) for x in (result[0], *result[1].values()))


CLIP = lambda f: (f["v"], f["t"], f["log_scale"].exp())
FILIP = lambda f: (f["V"], f["T"], f["M"], f["log_scale"].exp())
SPARC = lambda f: (f["v"], f["t"], *FILIP(f))
filip = lambda **kw: (lambda f: losses.filip_loss(*FILIP(f), **kw), lambda f: slow_filip(*FILIP(f), **kw))
sparc = lambda **kw: (lambda f: losses.sparc_loss(*SPARC(f), 0.7, 1.3, **kw)["loss"], lambda f: slow_sparc(*SPARC(f), 0.7, 1.3, **kw))
FAST_SLOW = {"clip": (lambda f: losses.clip_loss(*CLIP(f)), lambda f: slow_clip(*CLIP(f))),
             "filip": filip(), "filip keep=0.5": filip(keep=0.5), "filip keep=0.1": filip(keep=0.1),
             "sparc": sparc(), "sparc sigma=0": sparc(sigma=0), "sparc sigma=0.5": sparc(sigma=0.5),
             "sparc softmax": sparc(softmax=True), "sparc drop_special": sparc(drop_special=True)}
FAST = {name: fast for name, (fast, slow) in FAST_SLOW.items()}
every_loss = pytest.mark.parametrize("name", FAST)


# ------------------------------------------------------------------------------------------------------------------ every objective
@every_loss
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1]])   # the second: B = 1
def test_equals_the_paper(name, rows):
    fast, slow = (run(fn, subset(pairs(), rows)) for fn in FAST_SLOW[name])
    assert fast[0].dtype == torch.float64 and finite(fast) and same(fast, slow)


@every_loss
def test_padding_and_order_change_nothing(name):
    f, n, order = pairs(), 1 if "keep" in name else 5, [2, 0, 3, 1]    # keep: floor(keep * padded length) positions, so not one more
    loss, grads = run(FAST[name], f)
    longer = f | {"T": torch.cat([f["T"], 9 * torch.randn(4, n, 5, dtype=torch.float64)], 1), "M": F.pad(f["M"], (0, n))}
    assert same((loss, grads | {"T": F.pad(grads["T"], (0, 0, 0, n))}), run(FAST[name], longer))
    assert same((loss, subset(grads, order)), run(FAST[name], subset(f, order)))


@every_loss
def test_zero_vectors_are_finite(name):
    f = pairs()
    for x in (f["v"][0], f["t"][1], f["V"][0, 1], f["V"][2], f["T"][1, 0], f["T"][3]):
        x.zero_()
    assert finite(run(FAST[name], f))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(name, dtype):
    f, raised = pairs(dtype=dtype), {k: x.float() if x.is_floating_point() else x for k, x in pairs(dtype=dtype).items()}
    autocast, exact = torch.autocast("cpu", torch.bfloat16), run(FAST[name], raised)
    with autocast:
        assert FAST[name](pairs()).dtype == torch.float64                                      # float64 is never lowered
    for result in (run(FAST[name], f), run(FAST[name], f, autocast)):
        assert result[0].dtype == torch.float32 and finite(result) and all(d.dtype == f[k].dtype for k, d in result[1].items())
        if "filip" not in name:
            assert result[0] == exact[0]                # float32 throughout, whatever the inputs and autocast say
    if dtype == torch.float32 and "filip" not in name:
        assert same(result, exact, 0, 0)


def test_filip_similarity_under_autocast():
    V, T, M, _ = FILIP(pairs(dtype=torch.float32))
    exact = losses.filip_similarity(V, T, M)
    with torch.autocast("cpu", torch.bfloat16):
        lower = losses.filip_similarity(V, T, M)
    for x, y in zip(exact, lower):                      # the products are meant to be bf16, the means are not
        assert x.dtype == y.dtype == torch.float32 and 0 < (x - y).abs().max() < 0.02


def test_filip_tie_goes_to_one_token():
    many, one = pairs()["T"][:1, :1].repeat(1, 8, 1).requires_grad_(), pairs()["V"][:1, :1]
    for side, (V, T) in enumerate([(one, many), (many, one)]):                                 # one patch, tied words; one word, tied patches
        s = losses.filip_similarity(V, T, torch.ones(T.shape[:2], dtype=torch.bool))[side]
        assert (torch.autograd.grad(s.sum(), many)[0] != 0).any(-1).sum() == 1                 # amax would share it among all eight


def test_sparc_alignment():
    f = pairs()
    a = {sigma: losses.sparc_alignment(f["V"], f["T"], sigma) for sigma in (None, 0, 0.25, 1)}
    assert all(torch.allclose(x.sum(-1), torch.ones((), dtype=x.dtype)) for x in a.values())
    assert torch.equal(a[None], a[0.25]) and not torch.equal(a[0], a[0.25])                    # None is 1/P, and it does something
    assert ((a[0] > 0).sum(-1) == 3).all() and ((a[1] > 0).sum(-1) == 1).all()                 # all but the minimum, which is 0; only the maximum
    V, word = torch.tensor([[[0.], [1.], [2.], [4.]]]), torch.ones(1, 1, 1)                    # (2) gives 0, 1/4, 1/2, 1
    torch.testing.assert_close(losses.sparc_alignment(V, word, 0.5)[0, 0], torch.tensor([0, 0, 1 / 3, 2 / 3]))      # sigma itself is kept
    for V in (f["V"][:, :1].expand(-1, 4, -1), torch.zeros_like(f["V"])):                      # all patches equal
        assert (losses.sparc_alignment(V, f["T"]) == 1 / 4).all() and finite(run(FAST["sparc"], f | {"V": V}))
    parts = losses.sparc_loss(*SPARC(f), 0.7, 1.3)
    assert parts["global"] == FAST["clip"](f) and parts["loss"] == 0.7 * parts["global"] + 1.3 * parts["local"]
    bos_eot = run(FAST["sparc drop_special"], f | {"M": torch.arange(8) < torch.full((4, 1), 2)})
    assert bos_eot[0] == 0.7 * parts["global"] and finite(bos_eot)                             # no word left: the local loss is 0, not NaN


# ------------------------------------------------------------------------------------------------------------------------ the traps
def filip_with(f, mistake, keep):
    """FILIP in a short tensor form, with one mistake on demand."""
    V, T, M, g = FILIP(f)
    s, y, own = torch.einsum("bpd,cld->bcpl", F.normalize(V, dim=-1), F.normalize(T, dim=-1)), torch.arange(len(V)), torch.eye(len(V)).bool()
    real, every = s.masked_fill(~M[None, :, None], -9), torch.ones(V.shape[:2]).bool()
    score_p, score_l = {"selection by sum": ((s * M[None, :, None]).sum((1, 3)), s.sum((0, 2)).masked_fill(~M, -99)),
                        "selection by the own pair": (real[own].amax(2), real[own].amax(1))}.get(mistake, (real.amax((1, 3)), real.amax((0, 2))))
    sent_p, sent_l = (torch.zeros_like(x).scatter(1, x.topk(int(keep * x.shape[1])).indices, 1).bool() for x in (score_p, score_l))

    def similarity(seen_p, seen_l, p, l):               # over the seen patches and words of the other side, mean over p and l of this side
        to_word = {"padding takes part in the max": s, "padding as zero vectors": s * M[None, :, None]}.get(
            mistake, s.masked_fill(~(seen_l & M)[None, :, None], -9)).max(3).values
        to_patch = s.masked_fill(~seen_p[:, None, :, None], -9).max(2).values
        return (to_word * p[:, None]).sum(2) / p.sum(1, keepdim=True), (to_patch * l).sum(2) / (1 if mistake == "sum over words" else l.sum(1))

    s_image, s_text = similarity(sent_p, sent_l, *((sent_p, sent_l & M) if mistake == "both sides reduced" else (every, M)))
    if mistake == "positive not reduced":
        s_image, s_text = (torch.where(own, whole, x) for whole, x in zip(similarity(every, M, every, M), (s_image, s_text)))
    columns = {"both over the same axis": s_text, "one matrix for both directions": s_image.T}.get(mistake, s_text.T)
    return (F.cross_entropy(g * s_image, y) + F.cross_entropy(g * columns, y)) / 2


def sparc_local_with(f, mistake):
    """SPARC's local loss in a short tensor form, with one mistake on demand."""
    V, T, M, g = FILIP(f)
    (B, P, _), L, total = V.shape, T.shape[1], 0
    s = torch.einsum("bld,bpd->blp", T, F.normalize(V, dim=-1) if mistake == "patches normalised before the similarity" else V)
    low, width = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True) - s.amin(-1, keepdim=True)
    tied = width < (0 if mistake == "0/0 when all patches tie" else 1e-6)
    s = ((s - low) / width.masked_fill(tied, 1)).masked_fill(tied, 1)
    s = s if mistake == "no threshold" else s.masked_fill(s < 1 / P, 0)
    a = s / s.sum(-1, keepdim=True)
    a = a.detach() if mistake == "weights detached" else a
    c = torch.einsum("blp,npd->bld" if mistake == "grouped over all images of the batch" else "blp,bpd->bld", a, V)
    x = g * F.normalize(c, dim=-1) @ F.normalize(T, dim=-1).mT
    for x in (x, x.mT):
        if mistake != "padding as negatives":
            x = x.masked_fill(~M[:, None], -math.inf if mistake == "padded rows of -inf times 0" else -1e9)
        x = x if mistake == "cross_entropy over dim 1" else x.mT                               # PyTorch's classes are dim 1
        ce = F.cross_entropy(x, torch.arange(L).expand(B, L), reduction="none") * M            # (B, L)
        total = total + ((ce.sum(1) / M.sum(1)).mean() if mistake == "mean of the captions' means" else ce.sum() / M.sum()) / 2
    return total


TRAPS = [("filip", m) for m in ("both over the same axis", "one matrix for both directions", "padding takes part in the max",
                                "padding as zero vectors", "sum over words")]
TRAPS += [("filip keep=0.5", m) for m in ("selection by sum", "selection by the own pair", "positive not reduced", "both sides reduced")]
TRAPS += [("sparc", m) for m in ("0/0 when all patches tie", "padded rows of -inf times 0", "padding as negatives", "cross_entropy over dim 1",
                                 "grouped over all images of the batch", "weights detached", "patches normalised before the similarity",
                                 "no threshold", "mean of the captions' means")]


@pytest.mark.parametrize("name, mistake", TRAPS)
def test_trap(name, mistake):
    f, fast, with_mistake = pairs(), FAST[name], lambda f, m: filip_with(f, m, 0.5 if "keep" in name else 1)
    if name == "sparc":
        f["V"][1] = f["V"][1, 0].clone()                # a picture of one colour: its patches all tie
        fast, with_mistake = lambda f: losses.sparc_loss(*SPARC(f))["local"], sparc_local_with
    ours, right, wrong = run(fast, f), run(lambda f: with_mistake(f, None), f), run(lambda f: with_mistake(f, mistake), f)
    assert same(ours, right) and not same(ours, wrong, 1e-3, 1e-3)


def test_filip_trap_positive_gets_more_tokens():
    """Four times the same pair: nothing tells the own one apart, so the loss is log 4 unless it alone was allowed all its tokens."""
    f = subset(pairs(), [2, 2, 2, 2])
    assert abs(losses.filip_loss(*FILIP(f), keep=0.5) - math.log(4)) < 1e-9 and filip_with(f, "positive not reduced", 0.5) < math.log(4) - 0.05


def test_filip_trap_mean_in_half_precision():
    V, T, M, _ = FILIP(pairs(P=49, dtype=torch.float16))
    s = torch.einsum("bpd,cld->bcpl", *(F.normalize(x.float(), dim=-1).half() for x in (V, T))).masked_fill(~M[None, :, None], -9).max(3).values
    ours, exact = losses.filip_similarity(V, T, M)[0], s.double().mean(2)
    assert (ours - exact).abs().max() < 1e-6 < 5e-5 < (s.mean(2) - exact).abs().max()          # times a scale of 100: 0.005 in a logit


@pytest.mark.parametrize("name", ["clip", "filip", "sparc"])
def test_trap_exp_then_log(name):
    """At scale 100 exp overflows float32. The slow versions do just that, and are right only because float64 reaches e^709."""
    f = pairs(P=8, scale=100.)
    f |= {"t": f["v"], "T": f["V"], "M": torch.ones_like(f["M"])}
    single = {k: x if k == "M" else x.float() for k, x in f.items()}
    fast, slow = FAST_SLOW[name]
    assert not slow(single).isfinite() and abs(fast(single) - slow(f)) < 1e-4


def test_trap_logits_in_bf16():
    f = pairs(dtype=torch.float32, D=64, scale=100.)
    f["t"] = f["v"] + f["v"].roll(1, 0) + f["t"] / 4    # hard negatives, so that the rounding of logits matters
    exact = slow_clip(*CLIP({k: x.double() for k, x in f.items()}))
    with torch.autocast("cpu", torch.bfloat16):
        x = 100 * F.normalize(f["v"], dim=-1) @ F.normalize(f["t"], dim=-1).T
        wrong = (F.cross_entropy(x, torch.arange(4)) + F.cross_entropy(x.T, torch.arange(4))) / 2
        assert abs(losses.clip_loss(*CLIP(f)) - exact) < 1e-4 and abs(wrong - exact) > 1e-2


@every_loss
def test_trap_scale_clamped_in_the_forward(name):
    """Beyond the bound its gradient is 0, so the scale could never come back; the clamp is a method, called after the step."""
    clamped = run(lambda f: FAST[name](f | {"log_scale": f["log_scale"].clamp(max=math.log(100))}), pairs(scale=150.))
    assert clamped[1]["log_scale"] == 0 and run(FAST[name], pairs(scale=150.))[1]["log_scale"].abs() > 1e-3


# ------------------------------------------------------------------------------------------------------------------- two processes
SPREAD = ("clip", "filip", "filip keep=0.5", "sparc", "sparc drop_special")
GATHERS = [(None, 1.), (torch.float16, 1.), (torch.float16, 1e-9)]                             # dtype of the transport, size of the gradient


def process(rank, folder):
    """All that needs two processes, in one start-up: they cost seconds. The tests below compare the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30))
    f, gather = subset(pairs(), *HALVES[rank]), losses.gather                                  # captions padded to 5 here, to 8 there
    out = {name: run(FAST[name], f) for name in SPREAD}
    out["filip fp16"] = run(filip(gather_dtype=torch.float16)[0], f)
    for dtype, size in GATHERS:
        x = f["v"].clone().requires_grad_()
        y = gather(x, dtype)
        (y.double() * size * (rank + 1) * torch.arange(1, 5)[:, None]).sum().backward()
        out[dtype, size] = y.detach().double(), x.grad
    losses.gather = lambda x, dtype=None: gather(x.detach(), dtype)                            # two mistakes: no gradient through gather ...
    out |= {("no gradient", name): run(FAST[name], f) for name in SPREAD}
    losses.gather, losses.labels = gather, lambda rows: torch.arange(len(rows))                # ... and labels that forget the rank
    out |= {("labels", name): run(FAST[name], f) for name in SPREAD}
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def as_ddp(ranks, key):
    """The whole batch's result from the two ranks': the mean of their losses and of their gradients of the scale. A feature's gradient
    is on the rank that owns it, where gather's backward has added what the other rank's loss asks for; the mean halves it too."""
    (loss0, g0), (loss1, g1) = (r[key] for r in ranks)
    g0 = g0 | {"T": F.pad(g0["T"], (0, 0, 0, 3))}
    return (loss0 + loss1) / 2, {k: (g0[k] + g1[k] if k == "log_scale" else torch.cat([g0[k], g1[k]])) / 2 for k in g0}


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_equal_one(ranks, name):
    one = run(FAST[name], pairs())
    if "keep" in name:                                  # tokens are selected per process, so one process has to imitate two
        one, alone = run(lambda f: slow_filip(*FILIP(f), keep=0.5, workers=HALVES), pairs()), one
        assert not same(one, alone, 1e-3, 1e-3)
    if name == "filip":
        assert same(as_ddp(ranks, "filip fp16"), one, 1e-2, 1e-2)                              # as close as tokens sent in fp16 can be
    assert same(as_ddp(ranks, name), one, 1e-9, 1e-9)
    # traps: gather without gradient (right value, wrong gradients); wrong labels on rank 1
    detached, mislabelled = as_ddp(ranks, ("no gradient", name)), as_ddp(ranks, ("labels", name))
    assert abs(detached[0] - one[0]) < 1e-9 and not same(detached, one, 1, 1e-3) and abs(mislabelled[0] - one[0]) > 1e-3
    # trap: plain accumulation of two half batches is not the whole batch, for each half meets only its own negatives
    assert abs(sum(FAST[name](subset(pairs(), *half)) for half in HALVES) / 2 - one[0]) > 1e-2


@pytest.mark.parametrize("dtype, size", GATHERS)
def test_gather(ranks, dtype, size):
    """Values travel in dtype, gradients must not: a negative's is about 3e-8 at FILIP's batch size, below the smallest fp16 number."""
    for r, rows in zip(ranks, ([1, 2], [3, 4])):
        y, grad = r[dtype, size]
        assert torch.equal(y, pairs()["v"].to(dtype or torch.float64).double()) and grad.dtype == torch.float64
        expected = 3 * size * torch.tensor(rows, dtype=torch.float64)[:, None].expand(-1, 5)   # weights (1 + 2) * row, from both ranks
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_each_numbered_equation_is_tagged_once():
    """So that grep -n "SPARC eq. 3" *.py leads to one line."""
    folder = os.path.dirname(losses.__file__)
    source = "".join(open(os.path.join(folder, f"{name}.py"), encoding="utf-8").read() for name in ("data", "model", "losses", "train", "eval", "visualize"))
    for paper, numbers in (("FILIP", range(1, 7)), ("SPARC", (*range(1, 8), 9))):
        assert {n: len(re.findall(rf"{paper} eq\. {n}\b", source)) for n in numbers} == {n: 1 for n in numbers}
