"""Every loss against a loop-by-loop transcription of its paper, and against the mistakes that public copies of it make.

    pytest tests/test_losses.py             # fifteen seconds on one core
    pytest tests/test_losses.py -k trap     # the mistakes, but for those that need two processes: they are at the end

The slow_ functions follow the equations as printed (PACL, GLoRIA and MGCA: as their public code computes them, with SPARC's changes), in
float64, and use nothing of losses.py: read them beside the paper and losses.py.
A trap test computes the mistake itself and shows that it gives another value or gradient, so a copy that made it would fail here.
Two traps lie elsewhere: the mask made from ids in test_data.py, the text's mean over padding in test_model.py.
"""
import contextlib
import datetime
import functools
import math
import os
import re
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call

import losses

HALVES = [(range(0, 2), 5), (range(2, 4), 8)]        # which pairs each of two processes holds, and how long its captions are padded
QUARTERS = [(range(0, 1), 3), (range(1, 2), 5), (range(2, 3), 8), (range(3, 4), 6)]            # the same of four


# -------------------------------------------------------------------------------------------------------------- the papers, slowly
nce = lambda scores, i: -torch.log(torch.exp(scores[i]) / sum(torch.exp(s) for s in scores))
cos = lambda x, y: (x / x.norm()) @ (y / y.norm())
softmax = lambda scores: [torch.exp(x) / sum(torch.exp(y) for y in scores) for x in scores]


def both_ways(score, n):
    """InfoNCE of score(i, j), the mean of both directions."""
    x = [[score(i, j) for j in range(n)] for i in range(n)]
    return sum(nce(x[k], k) + nce([row[k] for row in x], k) for k in range(n)) / (2 * n)


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


def slow_soft_clip(x, y, g, alpha=0.2, normalised=False):
    """PyramidCLIP's equations (1) to (3)."""
    N, total = len(x), 0
    for a, b in ((x, y), (y, x)):
        for i in range(N):
            p = softmax([g * cos(a[i], b[j]) for j in range(N)])                               # (1); for N = 1 it is 1, its log 0
            target = [(1 - alpha) * (i == j) + (0 if normalised and i == j else alpha / max(1, N - 1)) for j in range(N)]      # (2)
            total -= sum(target[j] * torch.log(p[j]) for j in range(N)) / (2 * N)              # (3)
    return total


def slow_pyramid(v_g, v_l, v_r, l_s, l_t, l_a, g, alpha, lam, mu, normalised=False):
    soft = lambda x, y: slow_soft_clip(x, y, g, alpha, normalised)
    peer, cross_global, cross_local = soft(v_g, l_s) + soft(v_l, l_t), soft(v_g, l_a) + soft(v_r, l_s), soft(v_l, l_a) + soft(v_r, l_t)
    return (1 - lam - mu) * peer / 2 + lam * cross_global / 2 + mu * cross_local / 2           # (4)


def slow_pacl(V, t, g, pool_temperature=1):
    def phi(i, j):                                      # patches pooled by their cosine with this text
        a = softmax([cos(p, t[j]) / pool_temperature for p in V[i]])
        return cos(sum(x * p / p.norm() for x, p in zip(a, V[i])), t[j])
    return both_ways(lambda i, j: g * phi(i, j), len(V))


def slow_gloria(v, t, V, T, M, g, g_local, single_softmax=False, mean_words=False):
    def Z(i, j):
        words = [w for w, real in zip(T[j], M[j]) if real]
        s = [[w @ p / len(p) ** 0.5 for p in V[i]] for w in words]
        s = s if single_softmax else list(zip(*(softmax(of_patch) for of_patch in zip(*s))))   # over words, then below over patches
        c = [sum(x * p for x, p in zip(softmax([4 * x for x in of_word]), V[i])) for of_word in s]
        z = sum(torch.exp(5 * cos(w, x)) for w, x in zip(words, c))
        return torch.log(z / len(words) if mean_words else z)
    return slow_clip(v, t, g) + both_ways(lambda i, j: g_local * Z(i, j), len(V))


def slow_sinkhorn(z, eps=0.05, iters=3):
    """In the linear form of the public code: first each prototype gets an equal share, then each sample gives one."""
    Q = torch.exp(z / eps)
    for _ in range(iters):
        for k in range(Q.shape[1]):
            Q[:, k] /= Q[:, k].sum() * Q.shape[1]
        for b in range(Q.shape[0]):
            Q[b] /= Q[b].sum() * Q.shape[0]
    return Q * Q.shape[0]


def slow_mgca(v, t, V, T, M, parameters):
    (g_ita, g_cta, g_cpa), C = parameters["log_scales"].exp(), parameters["prototypes"]
    C = C + (torch.stack([c / c.norm() for c in C]) - C).detach()                              # made unit vectors before use, no gradient

    def look(name, x, others):
        layer = lambda part, x: parameters[f"{name}.{part}.weight"] @ x + parameters[f"{name}.{part}.bias"]
        q = layer("q", x)
        a = softmax([q @ layer("k", y) / len(q) ** 0.5 for y in others])
        return layer("out", sum(x * layer("v", y) for x, y in zip(a, others)))

    cta = [[], []]                                      # of all words, of all patches
    for b in range(len(V)):
        words, patches = [w for w, real in zip(T[b], M[b]) if real], list(V[b])
        for n, name, mine, others in ((0, "words_see", words, patches), (1, "patches_see", patches, words)):
            seen = [look(name, x, others) for x in mine]
            cta[n] += len(mine) * [both_ways(lambda l, m: g_cta * cos(mine[l], seen[m]), len(mine))]             # their mean, once for each
    z_v, z_t = ([[c @ (x / x.norm()) for c in C] for x in y] for y in (v, t))
    q_v, q_t = (slow_sinkhorn(torch.stack([torch.stack(x) for x in z]).detach()) for z in (z_v, z_t))
    swapped = lambda q, z: sum(x * torch.log(p) for x, p in zip(q, softmax([g_cpa * y for y in z])))     # one side's code predicted by the other
    cpa = -sum(swapped(q_v[b], z_t[b]) + swapped(q_t[b], z_v[b]) for b in range(len(v))) / (2 * len(v))
    return slow_clip(v, t, g_ita) + sum(sum(x) / len(x) for x in cta) + cpa


# -------------------------------------------------------------------------------------------------------------------- small pieces
def pairs(P=4, D=5, dtype=torch.float64, scale=10.):
    """Four pairs, captions of 3, 5, 8 and 4 real tokens. Padded positions hold random vectors, as a text tower leaves them.
    v and t are also PyramidCLIP's global crop and caption, v_l v_r l_s l_a its other views; "mgca.x" is the parameter x of an MGCA."""
    draw, shapes = torch.Generator().manual_seed(0), {"v": (D,), "t": (D,), "V": (P, D), "T": (8, D)}
    shapes |= {k: (D,) for k in ("v_l", "v_r", "l_s", "l_a")}
    f = {k: torch.randn(4, *shape, generator=draw, dtype=torch.float64).to(dtype) for k, shape in shapes.items()}
    wide = torch.promote_types(dtype, torch.float32)                                           # a model keeps its parameters in full precision
    f |= {f"mgca.{k}": torch.randn(x.shape, generator=draw, dtype=torch.float64).to(wide) / 2 for k, x in losses.MGCA(D, 7, 3).named_parameters()}
    return f | {"M": torch.arange(8) < torch.tensor([3, 5, 8, 4])[:, None], "log_scale": torch.tensor(scale, dtype=wide).log()}


def shared(name):
    return name == "log_scale" or name.startswith("mgca.")                                     # a parameter, the others are features


def subset(f, rows, length=8):
    f = {k: x if shared(k) else x[list(rows)] for k, x in f.items()}
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
PACL = lambda f: (f["V"], f["t"], f["log_scale"].exp())
GLORIA = lambda f: (*SPARC(f), f["log_scale"].exp() / 2)
PYRAMID = lambda f: (f["v"], f["v_l"], f["v_r"], f["l_s"], f["t"], f["l_a"], f["log_scale"].exp())
MGCA = lambda f: SPARC(f)[:5]
ARGS = types.SimpleNamespace(keep=1., gather_dtype="fp32", hard_targets=False, alpha=0.3, lam=0.2, mu=0.5, terms=losses.SIX, global_weight=0.7,
                             local_weight=1.3, sigma="1/P", softmax=False, drop_special=False)            # the options of train.py


def mgca_parameters(f):
    parameters = {k[5:]: x for k, x in f.items() if k.startswith("mgca.")}
    return parameters | {"log_scales": parameters["log_scales"] + f["log_scale"]}              # so that its scales follow that of pairs()


def mgca(f, *inputs, head=losses.MGCA(5, 7, 3)):
    return functional_call(head, mgca_parameters(f), inputs or MGCA(f))


filip = lambda **kw: (lambda f: losses.filip_loss(*FILIP(f), **kw), lambda f: slow_filip(*FILIP(f), **kw))
pacl_pooled = lambda f: (lambda x: losses.info_nce(x, x.T))(f["log_scale"].exp() * losses.pacl_similarity(f["V"], f["t"], 0.3))
pacl = lambda **kw: (lambda f: losses.pacl_loss(*PACL(f), **kw), lambda f: slow_pacl(*PACL(f), **kw))
gloria = lambda **kw: (lambda f: losses.gloria_loss(*GLORIA(f), **kw)["loss"], lambda f: slow_gloria(*GLORIA(f), **kw))
pyramid = lambda *a: (lambda f: losses.pyramid_loss(*PYRAMID(f), *a[:3], normalised=len(a) > 3)["loss"], lambda f: slow_pyramid(*PYRAMID(f), *a))
sparc = lambda **kw: (lambda f: losses.sparc_loss(*SPARC(f), 0.7, 1.3, **kw)["loss"], lambda f: slow_sparc(*SPARC(f), 0.7, 1.3, **kw))
FAST_SLOW = {"clip": (lambda f: losses.clip_loss(*CLIP(f)), lambda f: slow_clip(*CLIP(f))),
             "filip": filip(), "filip keep=0.5": filip(keep=0.5), "filip keep=0.1": filip(keep=0.1),
             "sparc": sparc(), "sparc sigma=0": sparc(sigma=0), "sparc sigma=0.5": sparc(sigma=0.5),
             "sparc softmax": sparc(softmax=True), "sparc drop_special": sparc(drop_special=True),
             "pyramid": pyramid(0.3, 0.2, 0.5), "pyramid normalised": pyramid(0.3, 0.2, 0.5, True), "pacl": pacl(), "gloria": gloria(),
             "pacl pool_temperature=0.3": (pacl_pooled, lambda f: slow_pacl(*PACL(f), 0.3)),
             "gloria single_softmax": gloria(single_softmax=True), "gloria mean_words": gloria(mean_words=True),
             "mgca": (lambda f: mgca(f)["loss"], lambda f: slow_mgca(*MGCA(f), mgca_parameters(f))),
             "clip+filip": (lambda f: losses.OBJECTIVES["clip+filip"](f | {"scale": f["log_scale"].exp()}, ARGS, None)["loss"],
                            lambda f: slow_clip(*CLIP(f)) + slow_filip(*FILIP(f)))}
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
def test_zero_vectors_and_ties_are_finite(name):
    f, tied = pairs(), pairs()
    for x in (f["v"][0], f["t"][1], f["V"][0, 1], f["V"][2], f["T"][1, 0], f["T"][3], f["v_l"][2], f["l_a"][0], f["mgca.prototypes"][3]):
        x.zero_()
    for x in (tied["V"][0], tied["V"][1:3], tied["T"][2], tied["T"][1:3], tied["v"], tied["t"][:2]):     # alike within a sample and across
        x[...] = x.flatten(0, -2)[0].clone()
    assert finite(run(FAST[name], f)) and finite(run(FAST[name], tied))


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


def interaction(B, C, P, L, draw=lambda *shape: F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)):
    torch.manual_seed(0)
    return draw(B, P, 8), draw(C, L, 8), torch.arange(L) < torch.randint(1, L + 1, (C, 1))


@pytest.mark.parametrize("dtype, ties, value, gradient", [
    (torch.float64, False, 1e-9, 1e-9), (torch.float64, True, 1e-9, 1e-9), (torch.float32, False, 1e-6, 1e-6), (torch.bfloat16, True, 1e-5, 2e-2),
    (torch.bfloat16, False, 2 ** -8, math.inf)])
def test_filip_by_blocks_equals_its_plain_twin(monkeypatch, dtype, ties, value, gradient):
    """ties: products of small integers are exact in any dtype, and mostly alike. Otherwise bf16's rounding decides which is the largest."""
    V, T, M = interaction(26, 40, 33, 32, *[lambda *shape: torch.randint(-1, 2, shape)] * ties)              # large enough for blocks
    f = {"V": V.to(dtype), "T": T.to(dtype)}
    weights, used = torch.randn(2, 26, 40, dtype=torch.promote_types(dtype, torch.float32)), []
    monkeypatch.setattr(losses._BlockedLateInteraction, "elements", 7 * 33 * 32 * 32)          # blocks of some seven pictures with 32 texts
    blocks = losses._BlockedLateInteraction.blocks
    monkeypatch.setattr(losses._BlockedLateInteraction, "blocks", staticmethod(lambda *x: used.extend([list(blocks(*x))]) or used[-1]))
    for a, b in zip(losses.late_interaction(*f.values(), M), losses._late_interaction(*f.values(), M)):
        assert a.dtype == b.dtype == weights.dtype and (a - b).abs().max() <= value
    ours, plain = (run(lambda f: sum((w * s).sum() for w, s in zip(weights, fn(f["V"], f["T"], M))), f)
                   for fn in (losses.late_interaction, losses._late_interaction))
    assert len(used) == 3 and [len(c) for c, *_ in used[0]] == [32, 8] and 26 % used[0][0][4][0].stop
    assert finite(ours) and (ours[1]["T"][~M] == 0).all() and all(ours[1][k].dtype == dtype for k in f)
    for k, d in plain[1].items():
        assert (ours[1][k] - d).abs().max() <= gradient * d.abs().max()


def test_filip_blocks(monkeypatch):
    for B, C, elements in ((5, 7, 600), (5, 300, 16000), (3, 2, 1)):
        monkeypatch.setattr(losses._BlockedLateInteraction, "elements", elements)
        seen, places = torch.zeros(B, C), []
        M = torch.arange(5) < torch.randint(1, 6, (C, 1))
        blocks = [(c, at, b) for c, at, *_, pictures in losses._BlockedLateInteraction.blocks(torch.zeros(B, 6, 1), torch.zeros(C, 5, 1), M) for b in pictures]
        for c, at, b in blocks:
            seen[b, c] += 1
            places += range(C)[at] if b.start == 0 else []
        assert (seen == 1).all() and len(blocks) > 1 and places == list(range(C))
    monkeypatch.undo()
    V, T, M = interaction(26, 40, 33, 32)
    V[3, 5, 2] = math.nan                               # an overflow upstream: it has to come out, so that training stops, and not to crash here
    ours, plain = losses.late_interaction(V.requires_grad_(), T, M), losses._late_interaction(V, T, M)
    torch.testing.assert_close(ours, plain, equal_nan=True)
    assert ours[0][3].isnan().all() and torch.autograd.grad(sum(ours).sum(), V)[0].shape == V.shape


def test_unit_is_normalize():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[1, 2] = 0
    g, (a, b) = torch.randn_like(x), (x.clone().requires_grad_() for _ in range(2))
    y, z = losses.unit(a), F.normalize(b, dim=-1, eps=1e-6)
    y.backward(g)
    z.backward(g)
    assert (y[1, 2] == 0).all() and (y - z).abs().max() < 1e-15
    assert (a.grad - b.grad).abs().max() < 1e-9                    # 1e6 g at the zero vector, in both


@pytest.mark.parametrize("similarity", [losses.gloria_similarity, lambda V, T, M: torch.stack(losses.late_interaction(V, T, M))])
def test_parts_by_length_equal_the_whole(monkeypatch, similarity):
    """70 texts: parts of 32, 32 and 6, each cut to its longest; a mask need not be a prefix."""
    V, T, M = interaction(20, 70, 33, 32)
    M[:, 1] = M[:, 2]
    parts = losses.by_length(M)
    assert [len(c) for c, _ in parts] == [32, 32, 6] and torch.cat([c for c, _ in parts]).sort().values.equal(torch.arange(70))
    assert all(M[c, L - 1].any() and not M[c, L:].any() for c, L in parts) and parts[0][1] < parts[1][1] < parts[2][1] == 32
    f = {"V": V, "T": T}
    run_ = lambda: run(lambda f: (similarity(f["V"], f["T"], M) * torch.arange(20 * 70).view(20, 70).sin()).sum(), f)
    parted = run_()
    monkeypatch.setattr(losses, "by_length", lambda M: [(torch.arange(70), 32)])
    assert same(parted, run_())


@pytest.mark.parametrize("n", [1, 3, 255, 256, 300])
def test_first_max_is_torch_max(n):
    for s in (torch.randint(3, (4, n, 5)), torch.randn(4, n, 5).bfloat16(), torch.zeros(4, n, 5)):
        for ours, theirs in zip(losses._first_max(s, 1) + losses._first_max(s.mT, 2), (*s.max(1), *s.mT.max(2))):
            assert torch.equal(ours.to(theirs.dtype), theirs)


def test_pyramid_terms():
    f, g, weights = pairs(), 10., {"peer": 0.3, "cross_global": 0.2, "cross_local": 0.5, "mismatched": 1 / 3}
    sides = {"G": f["v"], "L": f["v_l"], "R": f["v_r"], "S": f["l_s"], "T": f["t"], "A": f["l_a"]}
    mean = lambda *names: sum(slow_soft_clip(sides[x], sides[y], g) for x, y in names) / len(names)
    run_ = lambda terms, without=(): losses.pyramid_loss(*(None if k in without else sides[k] for k in "GLRSTA"), g, lam=0.2, mu=0.5, terms=terms)
    six = {"peer": mean("GS", "LT"), "cross_global": mean("GA", "RS"), "cross_local": mean("LA", "RT")}
    for out, groups in ((run_(losses.SIX), six), (run_(losses.SIX + ("GT", "LS")), six | {"mismatched": mean("GT", "LS")}),
                        (run_(losses.SIX + ("RA",)), six | {"peer": mean("GS", "LT", "RA")}), (run_(("GA",)), {"cross_global": mean("GA")}),
                        (run_(("LT", "LA", "RT")), {"peer": mean("LT"), "cross_local": six["cross_local"]}),
                        (run_(losses.SIX, "R"), six | {"cross_global": mean("GA"), "cross_local": mean("LA")}),
                        (run_(losses.SIX + ("RA", "GT"), "RA"), {"peer": six["peer"], "mismatched": mean("GT")})):
        expected = sum(weights[k] * x for k, x in groups.items()) / sum(weights[k] for k in groups)
        torch.testing.assert_close(out, {"loss": expected, **groups})
    torch.testing.assert_close(losses.soft_clip_loss(*CLIP(f), alpha=0.), losses.clip_loss(*CLIP(f)))
    x = pairs(P=6)["V"]                                 # at scale 0 all is alike: log 6 times the sum of a row of targets
    assert [round(losses.soft_clip_loss(x[0], x[1], 0., normalised=n).item() / math.log(6), 9) for n in (False, True)] == [1.04, 1]


def test_similarities_of_all_pairs_are_those_of_each_alone():
    """So every text has its own pooling of a picture's patches, and one picture, text, patch or word is not squeezed away."""
    V, T, M, _ = FILIP(pairs())
    for similarity in (lambda V, T, M: losses.pacl_similarity(V, T[:, 0]), losses.gloria_similarity, lambda *x: losses.filip_similarity(*x)[1]):
        for V_, T_, M_ in ((V, T[:3], M[:3]), (V[:, :1], T[:3, :1], M[:3, :1])):
            alone = [torch.cat([similarity(v[None], t[None], m[None]) for t, m in zip(T_, M_)], 1) for v in V_]
            torch.testing.assert_close(similarity(V_, T_, M_), torch.cat(alone))


@pytest.mark.parametrize("name, pictures", [("pacl", 3), ("gloria", 3), ("pacl", 1)])
def test_by_blocks_equals_the_whole(monkeypatch, name, pictures):
    f, sizes, checkpoint = pairs(), [], losses.checkpoint
    whole, whole32, autocast = run(FAST[name], f), run(FAST[name], pairs(dtype=torch.float32)), torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(losses, "checkpoint", lambda fn, V, *text, **kw: [sizes.append(len(V)), checkpoint(fn, V, *text, **kw)][1])
    monkeypatch.setitem(losses.by_blocks.__kwdefaults__, "elements", pictures * (4 if name == "pacl" else 4 * 8) * 4 + 1)     # texts, patches
    assert same(run(FAST[name], f), whole) and sizes == {3: [3, 1], 1: [1, 1, 1, 1]}[pictures]
    assert same(run(FAST[name], pairs(dtype=torch.float32), autocast), whole32, 1e-6, 1e-5)     # computed again outside autocast, as before


def test_sinkhorn():
    z, ones = 2 * pairs(P=6)["V"][0].requires_grad_(), torch.ones(6, dtype=torch.float64)
    for options in ((), (0.5, 1)):
        torch.testing.assert_close(losses.sinkhorn(z, *options), slow_sinkhorn(z.detach(), *options))
    q, half = losses.sinkhorn(z, 4., 200), 20 * z.detach().half()
    torch.testing.assert_close((q.sum(1), q.sum(0)), (ones, ones[:5] * 6 / 5))                 # samples give 1, prototypes share equally
    assert not q.requires_grad and torch.equal(losses.sinkhorn(half), losses.sinkhorn(half.float()))
    assert not slow_sinkhorn(half.float()).isfinite().all()                                    # trap: the linear form overflows


def test_mgca_prototypes_freeze():
    head, inputs = losses.MGCA(5, 7, 3, freeze_steps=2).double().eval(), MGCA(pairs())
    for learns in (True, False, False, True, True):     # the first is in eval mode and does not count
        head.prototypes.data *= 3
        head.zero_grad()
        head(*inputs)["cpa"].backward()
        assert (head.prototypes.grad is not None) == learns and torch.allclose(head.prototypes.norm(dim=1), torch.ones(7).double())
        head.train()


def test_objectives_by_name():
    """What train.py calls is what is tested here, and the parts add up."""
    f, heads = pairs(), {"mgca": functools.partial(mgca, pairs()), "gloria": types.SimpleNamespace(log_scale=pairs()["log_scale"] - math.log(2))}
    f |= {"scale": f["log_scale"].exp()}
    out = {name: objective(f, ARGS, heads.get(name)) for name, objective in losses.OBJECTIVES.items()}
    torch.testing.assert_close({name: x["loss"] for name, x in out.items()}, {name: FAST[name](f) for name in out})
    for name in ("clip+filip", "gloria"):
        assert out[name]["global"] == FAST["clip"](f) and out[name]["loss"] == out[name]["global"] + out[name]["local"]
    x = out["mgca"]
    assert x["ita"] == losses.clip_loss(f["v"], f["t"], x["scale"]) and abs(x["loss"] - x["ita"] - x["cta"] - x["cpa"]) < 1e-9
    ablations = types.SimpleNamespace(**vars(ARGS) | {"hard_targets": True, "terms": ("GS",), "keep": 0.5, "sigma": 0.5})
    x = {name: losses.OBJECTIVES[name](f, ablations, None)["loss"] for name in ("pyramid", "filip", "clip+filip", "sparc")}
    torch.testing.assert_close(x["pyramid"], losses.clip_loss(f["v"], f["l_s"], f["scale"]))
    assert (x["filip"], x["sparc"]) == (FAST["filip keep=0.5"](f), FAST["sparc sigma=0.5"](f)) and x["clip+filip"] == FAST["clip"](f) + x["filip"]
    sizes = {name: [tuple(p.shape) for p in losses.make_head(name, 8).parameters()] for name in losses.OBJECTIVES}
    attention = 2 * [*3 * [(128, 8), (128,)], (8, 128), (8,)]                                  # SPARC D.4: 1 head, 128 wide, 500 prototypes
    assert sizes == {name: [] for name in sizes} | {"gloria": [()], "mgca": [(500, 8), (3,), *attention]}


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


def pacl_with(f, mistake):
    """PACL with the pooled vectors made, (B,C,D), and one mistake on demand."""
    V, t, g = PACL(f)
    V, t, y = F.normalize(V, dim=-1), F.normalize(t, dim=-1), torch.arange(len(t))
    pooled = torch.einsum("bcp,bpd->bcd", torch.einsum("bpd,cd->bcp", V, t).softmax(2), V)
    pooled = pooled[y, y][:, None] if mistake == "pooled with the own caption only" else pooled
    x = g * F.cosine_similarity(pooled, t[None], dim=2)
    return (F.cross_entropy(x, y) + F.cross_entropy(x if mistake == "both over the same axis" else x.T, y)) / 2


def gloria_local_with(f, mistake):
    """GLoRIA's local loss with what each word sees made, (B,C,L,D), and one mistake on demand."""
    V, T, M, g = FILIP(f)
    y, mask = torch.arange(len(V)), lambda x, M, m: x if mistake == m else x.masked_fill(~M, -math.inf)
    s = torch.einsum("bpd,cld->bclp", V, T) / V.shape[2] ** (1 if mistake == "divided by D" else 0.5)
    w = mask(s, M[:, :, None], "padding in the softmax over words").softmax(2)
    r = F.cosine_similarity(torch.einsum("bclp,bpd->bcld", (4 * w).softmax(3), V), T, dim=3)
    x = g * mask(5 * r, M, "padding in the sum over words").logsumexp(2)
    x = x.squeeze() if mistake == "squeeze" else x
    return (F.cross_entropy(x, y) + F.cross_entropy(x if mistake == "both over the same axis" else x.T, y)) / 2


def mgca_cta_with(f, mistake):
    """MGCA's token alignment in a short tensor form, with one mistake on demand."""
    V, T, M, p, total = f["V"], f["T"], f["M"], mgca_parameters(f), 0

    def look(name, x, others, mask=None):
        layer = lambda part, x: F.linear(x, p[f"{name}.{part}.weight"], p[f"{name}.{part}.bias"])
        return layer("out", F.scaled_dot_product_attention(layer("q", x), layer("k", others), layer("v", others), mask))

    words = look("words_see", T, V)
    patches = look("patches_see", V, T, None if mistake == "patches look at padding" else M[:, None])
    patches = patches if mistake == "attended patches not normalised" else F.normalize(patches, dim=-1)
    for x, y, M_ in ((T, F.normalize(words, dim=-1), M), (V, patches, torch.ones(V.shape[:2]).bool())):
        for s in (z := p["log_scales"][1].exp() * F.normalize(x, dim=-1) @ y.mT, z.mT):
            s = s if mistake == "padding in the denominators" else s.masked_fill(~M_[:, None], -1e9)
            total = total + (F.cross_entropy(s.mT, torch.arange(s.shape[1]).expand(s.shape[:2]), reduction="none") * M_).sum() / M_.sum() / 2
    return total


TRAPS = [("filip", m) for m in ("both over the same axis", "one matrix for both directions", "padding takes part in the max",
                                "padding as zero vectors", "sum over words")]
TRAPS += [("filip keep=0.5", m) for m in ("selection by sum", "selection by the own pair", "positive not reduced", "both sides reduced")]
TRAPS += [("sparc", m) for m in ("0/0 when all patches tie", "padded rows of -inf times 0", "padding as negatives", "cross_entropy over dim 1",
                                 "grouped over all images of the batch", "weights detached", "patches normalised before the similarity",
                                 "no threshold", "mean of the captions' means")]
TRAPS += [("pacl", m) for m in ("pooled with the own caption only", "both over the same axis")]
TRAPS += [("gloria", m) for m in ("divided by D", "padding in the softmax over words", "padding in the sum over words", "both over the same axis")]
TRAPS += [("mgca", m) for m in ("attended patches not normalised", "padding in the denominators", "patches look at padding")]
SHORT = {"sparc": (lambda f: losses.sparc_loss(*SPARC(f))["local"], sparc_local_with), "pacl": (FAST["pacl"], pacl_with),
         "gloria": (lambda f: losses.gloria_loss(*SPARC(f), f["log_scale"].exp())["local"], gloria_local_with),
         "mgca": (lambda f: mgca(f)["cta"], mgca_cta_with)}


@pytest.mark.parametrize("name, mistake", TRAPS)
def test_trap(name, mistake):
    f, (fast, with_mistake) = pairs(), SHORT.get(name, (FAST[name], lambda f, m: filip_with(f, m, 0.5 if "keep" in name else 1)))
    if name == "sparc":
        f["V"][1] = f["V"][1, 0].clone()                # a picture of one colour: its patches all tie
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


def test_gloria_trap_squeeze():
    one = subset(pairs(), [1])                          # B = 1: the 1 x 1 similarities become a number without rows
    assert SHORT["gloria"][0](one) == gloria_local_with(one, None) == 0
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        gloria_local_with(one, "squeeze")


@pytest.mark.parametrize("name", ["clip", "filip", "sparc", "gloria", "mgca", "pyramid"])
def test_trap_exp_then_log(name):
    """At scale 100 exp overflows float32. The slow versions do just that, and are right only because float64 reaches e^709."""
    f = pairs(P=8, scale=100.)
    f |= {"t": f["v"], "T": f["V"], "M": torch.ones_like(f["M"])} | {k: f["v"] for k in ("v_l", "v_r", "l_s", "l_a")}
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
SPREAD = ("clip", "filip", "filip keep=0.5", "sparc", "sparc drop_special", "pyramid", "pyramid normalised", "pacl", "gloria", "mgca")
HALF = {name: fn(gather_dtype=torch.float16)[0] for name, fn in (("filip", filip), ("pacl", pacl), ("gloria", gloria))}
GATHERS = [(None, 1.), (torch.float16, 1.), (torch.float16, 1e-9)]                             # dtype of the transport, size of the gradient


def start(rank, folder, split):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(split), timeout=datetime.timedelta(seconds=30))
    return subset(pairs(), *split[rank])


def finish(rank, folder, out):
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def bytes_sent(loss_fn, f):
    """What this process hands to all_gather on the way forward, and gets back from reduce_scatter."""
    size, sent, all_gather, reduce_scatter = lambda x: x.numel() * x.element_size(), [0, 0], losses._all_gather, losses._reduce_scatter
    def forward(out, x):
        sent[0] += size(x)
        all_gather(out, x)
    def backward(out, x):
        sent[1] += size(out)
        reduce_scatter(out, x)
    losses._all_gather, losses._reduce_scatter = forward, backward
    run(loss_fn, f)
    losses._all_gather, losses._reduce_scatter = all_gather, reduce_scatter
    return sent


def two_processes(rank, folder):
    """All that needs two processes, in one start-up: they cost seconds. The tests below compare the results."""
    f, gather = start(rank, folder, HALVES), losses.gather                                     # captions padded to 5 here, to 8 there
    out = {name: run(FAST[name], f) for name in SPREAD}
    out |= {("fp16", name): run(fn, f) for name, fn in HALF.items()}
    single = {k: x.float() if x.is_floating_point() else x for k, x in f.items()}
    out["bytes"] = bytes_sent(filip(keep=0.5, gather_dtype=torch.float16)[0], single)
    for dtype, size in GATHERS:
        x = f["v"].clone().requires_grad_()
        y = gather(x, dtype)
        (y.double() * size * (rank + 1) * torch.arange(1, 5)[:, None]).sum().backward()
        out[dtype, size] = y.detach().double(), x.grad
    losses.gather = lambda x, dtype=None: gather(x.detach(), dtype)                            # two mistakes: no gradient through gather ...
    out |= {("no gradient", name): run(FAST[name], f) for name in SPREAD}
    losses.gather, losses.labels = gather, lambda rows: torch.arange(len(rows))                # ... and labels that forget the rank
    out |= {("labels", name): run(FAST[name], f) for name in SPREAD}
    finish(rank, folder, out)


def four_processes(rank, folder):
    f = start(rank, folder, QUARTERS)
    finish(rank, folder, {name: run(FAST[name], f) for name in SPREAD})


def results(process, n, folder):
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=n)
    return [torch.load(folder / f"{rank}.pt") for rank in range(n)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results(two_processes, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return results(four_processes, 4, tmp_path_factory.mktemp("four"))


def as_ddp(ranks, key):
    """The whole batch's result from the ranks': the mean of their losses and of their parameters' gradients. A feature's gradient
    is on the rank that owns it, where gather's backward has added what the other ranks' losses ask for; the mean divides it too."""
    losses, grads = zip(*(r[key] for r in ranks))
    W, padded = len(ranks), lambda k, x: F.pad(x, (0, 0, 0, 8 - x.shape[1])) if k == "T" else x
    return sum(losses) / W, {k: (sum(g[k] for g in grads) if shared(k) else torch.cat([padded(k, g[k]) for g in grads])) / W for k in grads[0]}


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_equal_one(ranks, name):
    one = run(FAST[name], pairs())
    if "keep" in name:                                  # tokens are selected per process, so one process has to imitate two
        one, alone = run(lambda f: slow_filip(*FILIP(f), keep=0.5, workers=HALVES), pairs()), one
        assert not same(one, alone, 1e-3, 1e-3)
    if name in HALF:                                    # as close as tokens sent in fp16 can be
        assert same(as_ddp(ranks, ("fp16", name)), one, 1e-2, 1e-2) and not same(as_ddp(ranks, ("fp16", name)), one, 1e-9, 1e-9)
    assert same(as_ddp(ranks, name), one, 1e-9, 1e-9)
    # traps: gather without gradient (right value, wrong gradients); wrong labels on rank 1
    detached, mislabelled = as_ddp(ranks, ("no gradient", name)), as_ddp(ranks, ("labels", name))
    assert abs(detached[0] - one[0]) < 1e-9 and not same(detached, one, 1, 1e-3) and abs(mislabelled[0] - one[0]) > 1e-3
    # trap: plain accumulation of two half batches is not the whole batch, for each half meets only its own negatives
    assert abs(sum(FAST[name](subset(pairs(), *half)) for half in HALVES) / 2 - one[0]) > 1e-2


@pytest.mark.parametrize("name", SPREAD)
def test_four_processes_equal_one(four_ranks, name):
    one = run(lambda f: slow_filip(*FILIP(f), keep=0.5, workers=QUARTERS), pairs()) if "keep" in name else run(FAST[name], pairs())
    assert same(as_ddp(four_ranks, name), one, 1e-9, 1e-9)


def test_bytes_on_the_wire(ranks):
    """FILIP 3.1.1: of each pair half the patches (2 of 4) and half the positions (4 of 8, after padding) of 5 numbers, 2 bytes each, and the
    mask; their gradients come back as 4 bytes each."""
    assert [r["bytes"] for r in ranks] == [[2 * ((2 + 4) * 5 * 2 + 4), 2 * (2 + 4) * 5 * 4]] * 2


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
    for paper, numbers in (("FILIP", range(1, 7)), ("PyramidCLIP", range(1, 5)), ("SPARC", (*range(1, 8), 9))):
        assert {n: len(re.findall(rf"{paper} eq\. {n}\b", source)) for n in numbers} == {n: 1 for n in numbers}
