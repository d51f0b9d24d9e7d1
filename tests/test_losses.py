"""Every loss against papers.py, the papers in loops, and against the mistakes that copies make

    pytest tests/test_losses.py             # some twenty seconds on one core
    pytest tests/test_losses.py -k trap     # the mistakes; those of many processes are at the end

A trap test computes the mistake itself and shows that it gives another value or gradient, so a
copy that made it would fail here. Two traps lie elsewhere: the mask made from ids in test_data.py,
the text's mean over padding in test_model.py.
"""
import contextlib
import datetime
import fractions
import functools
import inspect
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call

import losses
import papers

FOLDER = pathlib.Path(losses.__file__).parent
FILES = ("data", "model", "losses", "train", "eval", "visualize")
HALVES = [([0, 1], 5), ([2, 3], 8)]     # each process: its pairs, and how long its captions are
QUARTERS = [([0], 3), ([1], 5), ([2], 8), ([3], 6)]


# ------------------------------------------------------------------------------------ small pieces
def pairs(P=4, D=5, dtype=torch.float64, scale=10.):
    """Four pairs, captions of 3, 5, 8 and 4 real tokens. Padding is random, as a tower leaves it.

    v and t are also PyramidCLIP's global crop and caption, v_l v_r l_s l_a its other views;
    "mgca.x" is the parameter x of an MGCA. A model keeps its parameters in full precision.
    """
    draw = torch.Generator().manual_seed(2)
    shapes = {"v": (D,), "t": (D,), "V": (P, D), "T": (8, D)}
    shapes |= {name: (D,) for name in ("v_l", "v_r", "l_s", "l_a")}
    f = {}
    for name, shape in shapes.items():
        f[name] = torch.randn(4, *shape, generator=draw, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for name, x in losses.MGCA(D, 7, 3).named_parameters():
        drawn = torch.randn(x.shape, generator=draw, dtype=torch.float64)
        f[f"mgca.{name}"] = drawn.to(wide) / 2
    f["M"] = torch.arange(8) < torch.tensor([3, 5, 8, 4])[:, None]
    f["log_scale"] = torch.tensor(scale, dtype=wide).log()
    return f


def is_parameter(name):
    return name == "log_scale" or name.startswith("mgca.")


def subset(f, rows, length=8):
    """Some of the pairs, in the order of rows, their captions padded to length."""
    f = {name: x if is_parameter(name) else x[list(rows)] for name, x in f.items()}
    for name in ("T", "M"):
        if name in f:
            f[name] = f[name][:, :length]
    return f


def single(f):
    """f with fp32 in place of every other floating dtype."""
    return {name: x.float() if x.is_floating_point() else x for name, x in f.items()}


def run(loss_of, f, *more, context=contextlib.nullcontext()):
    """-> loss_of(f, *more), {name: gradient}; only the forward pass runs in the context."""
    leaves = {k: x.detach().clone().requires_grad_() for k, x in f.items() if x.is_floating_point()}
    with context:
        loss = loss_of(f | leaves, *more)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {}
    for (name, leaf), grad in zip(leaves.items(), found):
        grads[name] = torch.zeros_like(leaf) if grad is None else grad
    return loss.detach(), grads


def same(a, b, value=1e-9, gradient=1e-7):
    """Two results of run agree. NaN agrees with nothing."""
    if not (a[0] - b[0]).abs() <= value:
        return False
    return all(bool(((a[1][name] - b[1][name]).abs() <= gradient).all()) for name in a[1])


def finite(result):
    return all(bool(x.isfinite().all()) for x in (result[0], *result[1].values()))


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


# ---------------------------------------------------------------------------------- the objectives
SPARC_WEIGHTS = {"global_weight": 0.7, "local_weight": 1.3}
PYRAMID_WEIGHTS = {"alpha": 0.3, "lam": 0.2, "mu": 0.5}
CASES = {                                               # an objective and its options
    "clip": ("clip", {}),
    "filip": ("filip", {}),
    "filip keep=0.5": ("filip", {"keep": 0.5}),
    "filip keep=0.1": ("filip", {"keep": 0.1}),
    "filip keep=0.5 one-sided": ("filip", {"keep": 0.5, "one_sided": True}),
    "filip keep=0.1 one-sided": ("filip", {"keep": 0.1, "one_sided": True}),
    "clip+filip": ("clip+filip", {}),
    "pyramid": ("pyramid", PYRAMID_WEIGHTS),
    "pacl": ("pacl", {}),
    "gloria": ("gloria", {}),
    "mgca": ("mgca", {}),
    "sparc": ("sparc", SPARC_WEIGHTS),
    "sparc sigma=0": ("sparc", SPARC_WEIGHTS | {"sigma": 0}),
    "sparc sigma=0.5": ("sparc", SPARC_WEIGHTS | {"sigma": 0.5}),
    "sparc softmax": ("sparc", SPARC_WEIGHTS | {"softmax": True}),
    "sparc per-text": ("sparc", SPARC_WEIGHTS | {"per_text": True}),
    "sparc spare=1": ("sparc", SPARC_WEIGHTS | {"spare": 1}),
}
FILIP_CASES = [name for name in CASES if "filip" in name]
every_case = pytest.mark.parametrize("name", CASES)


def mgca_parameters(f):
    """Those of losses.MGCA by name. Its scales follow that of pairs()."""
    parameters = {name[5:]: x for name, x in f.items() if name.startswith("mgca.")}
    return parameters | {"log_scales": parameters["log_scales"] + f["log_scale"]}


def mgca_head(f, *inputs):
    return functional_call(losses.MGCA(5, 7, 3), mgca_parameters(f), inputs)


def make_head(f, objective):
    """In place of the objective's head, one whose parameters are in f."""
    if objective == "mgca":
        return functools.partial(mgca_head, f)
    if objective == "gloria":
        return types.SimpleNamespace(log_scale=f["log_scale"] - math.log(2))
    return None


def parts(f, name, **more):
    """What train.py gets from an objective: {"loss", part ...}."""
    objective, options = CASES[name]
    f = f | {"scale": f["log_scale"].exp()}
    return losses.OBJECTIVES[objective].loss(f, make_head(f, objective), **options, **more)


def ours(f, name):
    return parts(f, name)["loss"]


def ours_in_fp16(f, name):
    return parts(f, name, gather_dtype=torch.float16)["loss"]


def paper_clip(f, g):
    return papers.clip(f["v"], f["t"], g)


def paper_filip(f, g, **options):
    return papers.filip(f["V"], f["T"], f["M"], g, **options)


def paper_clip_filip(f, g):
    return paper_clip(f, g) + paper_filip(f, g)


def paper_pyramid(f, g, **options):
    views = (f[name] for name in ("v", "v_l", "v_r", "l_s", "t", "l_a"))
    return papers.pyramid(*views, g, **options)


def paper_pacl(f, g):
    return papers.pacl(f["V"], f["t"], g)


def paper_gloria(f, g):
    return papers.gloria(f["v"], f["t"], f["V"], f["T"], f["M"], g, g / 2)


def paper_mgca(f, g):
    return papers.mgca(f["v"], f["t"], f["V"], f["T"], f["M"], mgca_parameters(f))


def paper_sparc(f, g, **options):
    return papers.sparc(f["v"], f["t"], f["V"], f["T"], f["M"], g, **options)


PAPERS = {"clip": paper_clip, "filip": paper_filip, "clip+filip": paper_clip_filip,
          "pyramid": paper_pyramid, "pacl": paper_pacl, "gloria": paper_gloria,
          "mgca": paper_mgca, "sparc": paper_sparc}


def paper(f, name, **more):
    """The same in loops."""
    objective, options = CASES[name]
    return PAPERS[objective](f, f["log_scale"].exp(), **options, **more)


# --------------------------------------------------------------------------------- every objective
@every_case
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1]])
def test_equals_the_paper(name, rows):
    """Value and every gradient, the scale's too; also for one pair alone."""
    f = subset(pairs(), rows)
    fast = run(ours, f, name)
    assert fast[0].dtype == torch.float64 and finite(fast) and same(fast, run(paper, f, name))


@every_case
@pytest.mark.parametrize("more", [1, 40])
def test_padding_and_order_change_nothing(name, more):
    f, order = pairs(), [2, 0, 3, 1]
    loss, grads = run(ours, f, name)
    longer = torch.cat([f["T"], 9 * torch.randn(4, more, 5, dtype=torch.float64)], 1)
    padded = run(ours, f | {"T": longer, "M": F.pad(f["M"], (0, more))}, name)
    assert same((loss, grads | {"T": F.pad(grads["T"], (0, 0, 0, more))}), padded)
    assert same((loss, subset(grads, order)), run(ours, subset(f, order), name))


@every_case
def test_zero_vectors_and_ties_are_finite(name):
    """Ties: vectors that are alike within a sample and across samples."""
    f, tied = pairs(), pairs()
    zeros = (f["v"][0], f["t"][1], f["V"][0, 1], f["V"][2], f["T"][1, 0], f["T"][3], f["v_l"][2],
             f["l_a"][0], f["mgca.prototypes"][3])
    for x in zeros:
        x.zero_()
    alike = (tied["V"][0], tied["V"][1:3], tied["T"][2], tied["T"][1:3], tied["v"], tied["t"][:2])
    for x in alike:
        x[...] = x.flatten(0, -2)[0].clone()
    assert finite(run(ours, f, name)) and finite(run(ours, tied, name))


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(name, dtype):
    """fp32 throughout, whatever the inputs and autocast say; only FILIP's products may be lower."""
    f = pairs(dtype=dtype)
    exact = run(ours, single(f), name)
    with bf16_autocast():
        assert ours(pairs(), name).dtype == torch.float64       # float64 is never lowered
    for result in (run(ours, f, name), run(ours, f, name, context=bf16_autocast())):
        assert result[0].dtype == torch.float32 and finite(result)
        assert all(grad.dtype == f[k].dtype for k, grad in result[1].items())
        if "filip" not in name:
            assert result[0] == exact[0]
            assert dtype != torch.float32 or same(result, exact, 0, 0)


def test_unit_is_normalize():
    """Its gradient too, 1e6 times the incoming one at a zero vector."""
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    x[1, 2] = 0
    weights = torch.randn_like(x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = losses.unit(a), F.normalize(b, dim=-1, eps=1e-6)
    y.backward(weights)
    z.backward(weights)
    assert (y[1, 2] == 0).all() and (y - z).abs().max() < 1e-15
    assert (a.grad - b.grad).abs().max() < 1e-9
    for dtype in (torch.float16, torch.bfloat16):               # computed in fp32, then rounded
        half = x.to(dtype)
        assert torch.equal(losses.unit(half), F.normalize(half.float(), dim=-1).to(dtype))


def test_unit_is_differentiable_twice():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.unit, x)
    assert torch.autograd.gradgradcheck(losses.unit, x)


def test_unit_under_torch_func():
    x = torch.randn(3, 4, 5, dtype=torch.float64)

    def weighted(x):
        return (losses.unit(x) * torch.arange(5)).sum()

    a = x.clone().requires_grad_()
    weighted(a).backward()
    torch.testing.assert_close(torch.func.grad(weighted)(x), a.grad)
    torch.testing.assert_close(torch.func.vmap(losses.unit)(x), losses.unit(x))
    each = torch.stack([torch.func.grad(weighted)(part) for part in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(weighted))(x), each)


@pytest.mark.parametrize("name", ["clip", "sparc", "filip"])
def test_losses_are_differentiable_twice(name):
    """FILIP in its dense form."""
    f = subset(pairs(scale=2.), [0, 1])

    def loss(T, v, t):
        return ours(f | {"T": T, "v": v, "t": t}, name)

    inputs = [f[k].clone().requires_grad_() for k in ("T", "v", "t")]
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


# ------------------------------------------------------------------- calls by position, by keyword
INPUTS = {"x": "v", "y": "t", "v_g": "v", "l_t": "t", "z": "V"}         # name: feature of pairs()


def inputs_of(function, f):
    """{name: value} of what a function of losses.py cannot be called without."""
    f = f | {"scale": f["log_scale"].exp(), "scale_local": f["log_scale"].exp() / 2}
    called = losses.MGCA.forward if function is losses.MGCA else function
    named = {}
    for name, parameter in inspect.signature(called).parameters.items():
        required = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
        if required and name != "self":
            named[name] = f[INPUTS.get(name, name)]
    if function is losses.sinkhorn:
        named["z"] = named["z"][0]
    return named


def value_and_gradients(function, named):
    """-> a weighted sum of all that function(**named) returns, and its gradients. Also for MGCA."""
    import inspect
    import torch

    if inspect.isclass(function):
        torch.manual_seed(0)
        function = function(5, 7, 3).double()
    called = {}
    for name, x in named.items():
        called[name] = x.detach().clone().requires_grad_(x.is_floating_point())
    out = function(**called)
    if isinstance(out, dict):
        out = list(out.values())
    elif torch.is_tensor(out):
        out = [out]
    total = sum((x * (torch.arange(x.numel()).view(x.shape) + 1).cos()).sum() for x in out)
    if not total.requires_grad:
        return [total]
    leaves = [x for x in called.values() if x.requires_grad]
    return [total.detach(), *torch.autograd.grad(total, leaves, materialize_grads=True)]


CONTRACT = {
    "unit": "(x)",
    "gather": "(x, dtype=None)",
    "clip_loss": "(v, t, scale)",
    "sparc_alignment": "(V, T, sigma=None, softmax=False)",
    "sparc_loss": "(v, t, V, T, M, scale, global_weight=0.5, local_weight=1.0, sigma=None, "
                  "softmax=False, per_text=False, spare=0, strangers=0)",
    "filip_similarity": "(V, T, M)",
    "filip_loss": "(V, T, M, scale, keep=1.0, gather_dtype=None, one_sided=False)",
    "clip_filip_loss": "(v, t, V, T, M, scale, **options)",
    "soft_clip_loss": "(x, y, scale, alpha=0.2)",
    "pyramid_loss": "(v_g, v_l, v_r, l_s, l_t, l_a, scale, alpha=0.2, lam=0.3333333333333333, "
                    "mu=0.3333333333333333, terms=('GS', 'LT', 'GA', 'RS', 'LA', 'RT'))",
    "pacl_similarity": "(V, t)",
    "pacl_loss": "(V, t, scale, gather_dtype=None)",
    "gloria_similarity": "(V, T, M)",
    "gloria_loss": "(v, t, V, T, M, scale, scale_local, gather_dtype=None)",
    "sinkhorn": "(z, eps=0.05, iters=3)",
    "MGCA": "(dim, prototypes=500, width=128)",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_public_functions(name):
    """Their signatures are the contract, and each can be called by position and by keyword."""
    function = getattr(losses, name)
    assert str(inspect.signature(function)) == CONTRACT[name]
    named = inputs_of(function, pairs())
    if name == "MGCA":
        torch.manual_seed(0)
        function = losses.MGCA(5, 7, 3).double()
    by_position = function(*named.values())
    torch.testing.assert_close(function(**named), by_position)
    in_half = {k: x.half() if x.is_floating_point() else x for k, x in named.items()}
    if name not in ("unit", "gather", "filip_similarity"):
        if name == "MGCA":
            function.float()
        out = function(**in_half)
        out = out["loss"] if isinstance(out, dict) else out
        assert out.dtype == torch.float32                       # raised by keyword too


def test_clip_and_sparc_by_keywords_under_autocast():
    f = pairs(dtype=torch.float32)
    v, t, V, T, M, scale = (f[k] for k in ("v", "t", "V", "T", "M", "log_scale"))
    with bf16_autocast():
        assert losses.clip_loss(v=v, t=t, scale=scale) == losses.clip_loss(v, t, scale)
        assert losses.clip_loss(v=v, t=t, scale=10.).dtype == torch.float32
        by_keyword = losses.sparc_loss(v=v, t=t, V=V, T=T, M=M, scale=scale)
        assert by_keyword == losses.sparc_loss(v, t, V, T, M, scale)


# ------------------------------------------------------------------------------------------- SPARC
def test_sparc_alignment():
    """Rows sum to 1; None is 1/P; 0 drops the smallest only, 1 keeps the largest only."""
    f = pairs()
    a = {sigma: losses.sparc_alignment(f["V"], f["T"], sigma) for sigma in (None, 0, 0.25, 1)}
    for x in a.values():
        torch.testing.assert_close(x.sum(-1), torch.ones(4, 8, dtype=torch.float64))
    assert torch.equal(a[None], a[0.25]) and not torch.equal(a[0], a[0.25])
    assert ((a[0] > 0).sum(-1) == 3).all() and ((a[1] > 0).sum(-1) == 1).all()
    V, word = torch.tensor([[[0.], [1.], [2.], [4.]]]), torch.ones(1, 1, 1)
    by_hand = torch.tensor([0, 0, 1 / 3, 2 / 3])                # eq. 2 gives 0, 1/4, 1/2, 1
    torch.testing.assert_close(losses.sparc_alignment(V, word, 0.5)[0, 0], by_hand)


def test_sparc_with_equal_patches():
    f = pairs()
    for V in (f["V"][:, :1].expand(-1, 4, -1), torch.zeros_like(f["V"])):
        assert (losses.sparc_alignment(V, f["T"]) == 1 / 4).all()
        assert finite(run(ours, f | {"V": V}, "sparc"))
    f["V"] = f["V"][:, :1].repeat(1, 4, 1)
    assert same(run(ours, f, "sparc"), run(paper, f, "sparc"))


def test_sparc_parts_add_up():
    f = pairs()
    out = parts(f, "sparc")
    assert out["global"] == ours(f, "clip")
    assert out["loss"] == 0.7 * out["global"] + 1.3 * out["local"]


@pytest.mark.parametrize("n, per_text, spare", [(1, False, 0), (4, True, 1), (13, False, 2)])
def test_sparc_strangers(n, per_text, spare, monkeypatch):
    """Value and gradients are the loops', also where no picture is 4 or 8 away; padding changes
    nothing; each stranger is a negative more, so the loss is higher."""
    f = subset(pairs(), [i % 4 for i in range(n)])
    for name in ("V", "T", "v", "t"):
        f[name] = f[name] + 0.3 * torch.randn(f[name].shape, dtype=torch.float64)
    options = SPARC_WEIGHTS | {"per_text": per_text, "spare": spare}
    monkeypatch.setitem(CASES, "without", ("sparc", options))
    monkeypatch.setitem(CASES, "strangers", ("sparc", options | {"strangers": 2}))
    fast = run(ours, f, "strangers")
    assert finite(fast) and same(fast, run(paper, f, "strangers"))
    longer = torch.cat([f["T"], torch.randn(n, 3, 5, dtype=torch.float64)], 1)
    padded = run(ours, f | {"T": longer, "M": F.pad(f["M"], (0, 3))}, "strangers")
    torch.testing.assert_close(fast[0], padded[0])
    assert fast[0] > run(ours, f, "without")[0]


def test_sparc_per_text_weighs_texts_alike():
    """Eq. 6 as printed. Only where captions are equally long is it the mean over all tokens."""
    f = pairs()
    printed, of_tokens = ours(f, "sparc per-text"), ours(f, "sparc")
    assert (printed - of_tokens).abs() > 1e-3
    alone = [parts(subset(f, [i]), "sparc")["local"] for i in range(4)]
    torch.testing.assert_close(parts(f, "sparc per-text")["local"], sum(alone) / 4)
    f["M"] = torch.arange(8) < torch.full((4, 1), 5)
    torch.testing.assert_close(ours(f, "sparc per-text"), ours(f, "sparc"))


# ------------------------------------------------------------------------------------------- FILIP
def test_filip_similarity_under_autocast():
    """The products are meant to be bf16, the means are not."""
    V, T, M = (pairs(dtype=torch.float32)[k] for k in "VTM")
    exact = losses.filip_similarity(V, T, M)
    with bf16_autocast():
        lower = losses.filip_similarity(V, T, M)
    for x, y in zip(exact, lower):
        assert x.dtype == y.dtype == torch.float32 and 0 < (x - y).abs().max() < 0.02


@pytest.mark.parametrize("dense", [math.inf, 0])
def test_filip_tie_goes_to_one_token(monkeypatch, dense):
    """One patch with tied words, one word with tied patches: amax would share the gradient."""
    monkeypatch.setattr(losses, "DENSE", dense)
    many, one = pairs()["T"][:1, :1].repeat(1, 8, 1).requires_grad_(), pairs()["V"][:1, :1]
    for side, (V, T) in enumerate([(one, many), (many, one)]):
        s = losses.filip_similarity(V, T, torch.ones(T.shape[:2], dtype=torch.bool))[side]
        grad = torch.autograd.grad(s.sum(), many)[0]
        assert (grad != 0).any(-1).sum() == 1


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.1, 0.29, 0.07, 1 / 3])
def test_filip_keeps_a_share_of_each_text(keep):
    """floor(keep n) of a text's own n real tokens, at least one, however long the others are."""
    torch.manual_seed(0)
    real = torch.arange(100) < torch.arange(1, 101)[:, None]
    x, others = torch.randn(100, 100, 2), torch.randn(3, 2)
    share = fractions.Fraction(keep).limit_denominator(100)
    expected = [max(1, math.floor(share * n)) for n in range(1, 101)]
    tokens, mask = losses.best_tokens(x, real, others, keep)
    assert mask.sum(1).tolist() == expected and tokens.shape == (100, max(expected), 2)
    assert (mask[:, 1:] <= mask[:, :-1]).all()


def test_filip_keeps_the_best_tokens():
    """Those of the largest eq. 3 over the others, in order; their gradient reaches the tokens."""
    f = pairs()
    x = f["T"].clone().requires_grad_()
    others = f["V"].flatten(0, 1)
    tokens, mask = losses.best_tokens(x, f["M"], others, 0.5)
    score = (F.normalize(x, dim=-1) @ F.normalize(others, dim=-1).T).amax(-1)
    for b, n in enumerate([1, 2, 4, 2]):
        best = score[b, f["M"][b]].topk(n).indices
        assert torch.equal(tokens[b, mask[b]], x[b, best])
    tokens[mask].sum().backward()
    assert (x.grad != 0).any(-1).sum(1).tolist() == [1, 2, 4, 2]


@pytest.mark.parametrize("one_sided", [False, True])
def test_filip_never_keeps_padding(one_sided):
    """Tied tokens, and padding that is as good as the best of them, or better."""
    name = "filip keep=0.5 one-sided" if one_sided else "filip keep=0.5"
    f = pairs()
    f["T"] = f["T"][:, :1].repeat(1, 8, 1)
    f["V"] = f["V"][:, :1].repeat(1, 4, 1)
    tied = ours(f, name)
    torch.testing.assert_close(tied, paper(f, name))
    for better in (f["T"], f["V"][:, :1].expand(-1, 8, -1)):
        padded = f | {"T": torch.where(f["M"][..., None], f["T"], better)}
        loss, grads = run(ours, padded, name)
        assert loss == tied and (grads["T"][~f["M"]] == 0).all()


def test_filip_one_sided_and_two_sided_differ():
    """With all tokens they are one."""
    f = pairs()
    assert (ours(f, "filip keep=0.5") - ours(f, "filip keep=0.5 one-sided")).abs() > 1e-2
    whole = losses.filip_loss(f["V"], f["T"], f["M"], 10., one_sided=True)
    torch.testing.assert_close(whole, losses.filip_loss(f["V"], f["T"], f["M"], 10.))


# ------------------------------------------------------------------------------- the same, faster
def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def small_integers(*shape):
    return torch.randint(-1, 2, shape)


def interaction(B, C, P, L, draw=unit_vectors):
    """-> V, T of dimension 8 and a mask of random lengths."""
    torch.manual_seed(0)
    return draw(B, P, 8), draw(C, L, 8), torch.arange(L) < torch.randint(1, L + 1, (C, 1))


def weighted_similarities(f, weights, M):
    s_image, s_text = losses.filip_similarity(f["V"], f["T"], M)
    return (weights[0] * s_image + weights[1] * s_text).sum()


def stacked_similarities(V, T, M):
    return torch.stack(losses.filip_similarity(V, T, M))


def as_it_is(x):
    return x


@pytest.fixture
def small_blocks(monkeypatch):
    """FILIP by blocks, always, and of so many products; -> the list of the calls' blocks."""
    used, late_blocks = [], losses.late_blocks

    def recorded(V, T, M):
        used.append(list(late_blocks(V, T, M)))
        return used[-1]

    def set_size(elements):
        monkeypatch.setattr(late_blocks, "__defaults__", (elements,))
        monkeypatch.setattr(losses, "late_blocks", recorded)
        monkeypatch.setattr(losses, "DENSE", 0)
        return used

    return set_size


@pytest.mark.parametrize("name", FILIP_CASES)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1]])
def test_filip_by_blocks_equals_the_paper(small_blocks, name, rows):
    """Blocks of one picture, then of three."""
    f = subset(pairs(), rows)
    exact = run(paper, f, name)
    for elements in (1, 3 * 4 * 4 * 8):
        used = small_blocks(elements)
        assert same(run(ours, f, name), exact) and used


@pytest.mark.parametrize("dtype, draw, value, gradient", [
    (torch.float64, unit_vectors, 1e-9, 1e-9),
    (torch.float64, small_integers, 1e-9, 1e-9),
    (torch.float32, unit_vectors, 1e-6, 1e-6),
    (torch.bfloat16, small_integers, 1e-5, 2e-2),
    (torch.bfloat16, unit_vectors, 2 ** -8, math.inf)])
def test_filip_by_blocks_equals_the_dense_form(monkeypatch, small_blocks, dtype, draw, value,
                                               gradient):
    """Products of small integers are exact in any dtype, and mostly tied. Of other vectors bf16's
    rounding decides which product is the largest, so gradients may go elsewhere."""
    V, T, M = interaction(26, 40, 33, 32, draw)
    f = {"V": V.to(dtype), "T": T.to(dtype)}
    weights = torch.randn(2, 26, 40, dtype=torch.promote_types(dtype, torch.float32))
    monkeypatch.setattr(losses, "unit", as_it_is)
    monkeypatch.setattr(losses, "DENSE", math.inf)
    plain = losses.filip_similarity(f["V"], f["T"], M)
    exact = run(weighted_similarities, f, weights, M)
    used = small_blocks(7 * 33 * 32 * 32)               # some seven pictures with 32 texts
    for a, b in zip(losses.filip_similarity(f["V"], f["T"], M), plain):
        assert a.dtype == b.dtype == weights.dtype and (a - b).abs().max() <= value
    result = run(weighted_similarities, f, weights, M)
    assert len(used) == 3 and [len(texts) for texts, *_ in used[0]] == [32, 8]
    assert 26 % used[0][0][-1][0].stop                  # the last block is smaller
    assert finite(result) and (result[1]["T"][~M] == 0).all()
    for name, grad in exact[1].items():
        assert result[1][name].dtype == dtype
        assert (result[1][name] - grad).abs().max() <= gradient * grad.abs().max()


@pytest.mark.parametrize("B, C, elements", [(5, 7, 600), (5, 300, 16000), (3, 2, 1)])
def test_blocks_cover_each_pair_once(B, C, elements):
    seen, places, count = torch.zeros(B, C), [], 0
    M = torch.arange(5) < torch.randint(1, 6, (C, 1))
    blocks = losses.late_blocks(torch.zeros(B, 6, 1), torch.zeros(C, 5, 1), M, elements)
    for texts, at, _, _, pictures in blocks:
        places += range(C)[at]
        for b in pictures:
            seen[b, texts] += 1
            count += 1
    assert (seen == 1).all() and count > 1 and places == list(range(C))


def test_nan_comes_out_of_the_blocks(monkeypatch, small_blocks):
    """An overflow upstream has to show, so that training stops, and not to crash here."""
    V, T, M = interaction(26, 40, 33, 32)
    V[3, 5, 2] = math.nan
    monkeypatch.setattr(losses, "DENSE", math.inf)
    plain = losses.filip_similarity(V, T, M)
    assert small_blocks(7 * 33 * 32 * 32) == []
    by_blocks = losses.filip_similarity(V.requires_grad_(), T, M)
    torch.testing.assert_close(by_blocks, plain, equal_nan=True)
    assert by_blocks[0][3].isnan().all()
    assert torch.autograd.grad(sum(by_blocks).sum(), V)[0].shape == V.shape


def test_blocks_cannot_be_differentiated_twice(small_blocks):
    """They say so. The dense form can."""
    small_blocks(1)
    f = pairs()
    V = f["V"].requires_grad_()
    s_image, _ = losses.filip_similarity(V, f["T"], f["M"])
    grad, = torch.autograd.grad(s_image.pow(2).sum(), V, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("similarity", [losses.gloria_similarity, stacked_similarities])
def test_parts_by_length_equal_the_whole(monkeypatch, small_blocks, similarity):
    """70 texts: parts of 32, 32 and 6, each cut to its longest; a mask need not be a prefix."""
    V, T, M = interaction(20, 70, 33, 32)
    M[:, 1] = M[:, 2]
    every = losses.by_length(M)
    assert [len(texts) for texts, _ in every] == [32, 32, 6]
    assert torch.cat([texts for texts, _ in every]).sort().values.equal(torch.arange(70))
    assert all(M[texts, L - 1].any() and not M[texts, L:].any() for texts, L in every)
    assert every[0][1] < every[1][1] < every[2][1] == 32
    small_blocks(7 * 33 * 32 * 32)

    def weighted(f):
        s = similarity(f["V"], f["T"], M)
        return (s * torch.arange(20 * 70).view(20, 70).sin()).sum()

    def one_part(M):
        return [(torch.arange(70), 32)]

    parted = run(weighted, {"V": V, "T": T})
    monkeypatch.setattr(losses, "by_length", one_part)
    assert same(parted, run(weighted, {"V": V, "T": T}))


@pytest.mark.parametrize("n", [1, 3, 255, 256, 300])
def test_first_max_is_torch_max(n):
    drawn = (torch.randint(3, (4, n, 5)), torch.randn(4, n, 5).bfloat16(), torch.zeros(4, n, 5))
    for s in drawn:
        for x, dim in ((s, 1), (s.mT, 2)):
            for fast, plain in zip(losses.first_max(x, dim), x.max(dim)):
                assert torch.equal(fast.to(plain.dtype), plain)


@pytest.mark.parametrize("name, pictures, sizes", [
    ("pacl", 3, [3, 1]), ("gloria", 3, [3, 1]), ("pacl", 1, [1, 1, 1, 1])])
def test_by_blocks_equals_the_whole(monkeypatch, name, pictures, sizes):
    """Backward computes a block again outside autocast, as forward does."""
    used, checkpoint = [], losses.checkpoint

    def recorded(similarity, V, *text, **options):
        used.append(len(V))
        return checkpoint(similarity, V, *text, **options)

    f, f32 = pairs(), pairs(dtype=torch.float32)
    whole, whole32 = run(ours, f, name), run(ours, f32, name)
    tokens = 4 if name == "pacl" else 4 * 8
    monkeypatch.setattr(losses, "checkpoint", recorded)
    elements = pictures * tokens * 4 + 1
    monkeypatch.setitem(losses.by_blocks.__kwdefaults__, "elements", elements)
    assert same(run(ours, f, name), whole) and used == sizes
    assert same(run(ours, f32, name, context=bf16_autocast()), whole32, 1e-6, 1e-5)


# ------------------------------------------------------------------------------------- PyramidCLIP
def slow_terms(f, *names):
    """The mean of some of PyramidCLIP's terms in loops, at scale 10."""
    pictures = {"G": f["v"], "L": f["v_l"], "R": f["v_r"]}
    texts = {"S": f["l_s"], "T": f["t"], "A": f["l_a"]}
    return papers.mean([papers.soft_clip(pictures[x], texts[y], 10.) for x, y in names])


SIX_GROUPS = {"peer": ("GS", "LT"), "cross_global": ("GA", "RS"), "cross_local": ("LA", "RT")}


@pytest.mark.parametrize("terms, without, groups", [
    (losses.SIX, "", SIX_GROUPS),
    (losses.SIX + ("GT", "LS"), "", SIX_GROUPS | {"mismatched": ("GT", "LS")}),
    (losses.SIX + ("RA",), "", SIX_GROUPS | {"peer": ("GS", "LT", "RA")}),
    (("GA",), "", {"cross_global": ("GA",)}),
    (("LT", "LA", "RT"), "", {"peer": ("LT",), "cross_local": ("LA", "RT")}),
    (losses.SIX, "R", SIX_GROUPS | {"cross_global": ("GA",), "cross_local": ("LA",)}),
    (losses.SIX + ("RA", "GT"), "RA", {"peer": ("GS", "LT"), "mismatched": ("GT",)})])
def test_pyramid_terms(terms, without, groups):
    """without: views that a data set has not. Weights of the groups that are left add up to 1."""
    f = pairs()
    views = {"G": f["v"], "L": f["v_l"], "R": f["v_r"], "S": f["l_s"], "T": f["t"], "A": f["l_a"]}
    views |= {letter: None for letter in without}
    out = losses.pyramid_loss(*views.values(), 10., lam=0.2, mu=0.5, terms=terms)
    weights = {"peer": 0.3, "cross_global": 0.2, "cross_local": 0.5, "mismatched": 1 / 3}
    expected = {group: slow_terms(f, *names) for group, names in groups.items()}
    total = sum(weights[group] * x for group, x in expected.items())
    total = total / sum(weights[group] for group in expected)
    torch.testing.assert_close(out, {"loss": total, **expected})


@pytest.mark.parametrize("terms, mu", [((), 1 / 3), (("RS", "RT"), 1 / 3), (("LA",), 0)])
def test_pyramid_without_terms(terms, mu):
    """No term, no view of a term, no weight: a sentence, not a loss of 0 or NaN."""
    v, t = pairs()["v"], pairs()["t"]
    with pytest.raises(ValueError, match="no term with a weight is left"):
        losses.pyramid_loss(v, v, None, t, t, t, 10., mu=mu, terms=terms)


def test_soft_targets():
    """alpha = 0 is CLIP. At scale 0 all is alike: log 6 times 1.04, a row's sum of targets."""
    f = pairs(P=6)
    soft = losses.soft_clip_loss(f["v"], f["t"], 10., alpha=0.)
    torch.testing.assert_close(soft, losses.clip_loss(f["v"], f["t"], 10.))
    row = losses.soft_clip_loss(f["V"][0], f["V"][1], 0.) / math.log(6)
    assert abs(row - 1.04) < 1e-9


# ---------------------------------------------------------------------------- PACL, GLoRIA and MGCA
def pacl_with_first_token(V, T, M):
    return losses.pacl_similarity(V, T[:, 0])


def similarity_of_texts(V, T, M):
    return losses.filip_similarity(V, T, M)[1]


@pytest.mark.parametrize("similarity", [pacl_with_first_token, losses.gloria_similarity,
                                        similarity_of_texts])
@pytest.mark.parametrize("n", [8, 1])
def test_similarities_of_all_pairs_are_those_of_each_alone(similarity, n):
    """Each text pools the patches for itself; one patch or word (n = 1) is not squeezed away."""
    f = pairs()
    V, T, M = f["V"][:, :n], f["T"][:3, :n], f["M"][:3, :n]
    alone = [[similarity(v[None], t[None], m[None]) for t, m in zip(T, M)] for v in V]
    table = torch.cat([torch.cat(row, 1) for row in alone])
    torch.testing.assert_close(similarity(V, T, M), table)


def test_sinkhorn():
    """The papers' linear form; in the limit samples give 1 and prototypes share equally."""
    z = 2 * pairs(P=6)["V"][0].requires_grad_()
    for options in ((), (0.5, 1)):
        slow = papers.sinkhorn(z.detach(), *options)
        torch.testing.assert_close(losses.sinkhorn(z, *options), slow)
    q, ones = losses.sinkhorn(z, 4., 200), torch.ones(6, dtype=torch.float64)
    torch.testing.assert_close((q.sum(1), q.sum(0)), (ones, ones[:5] * 6 / 5))
    assert not q.requires_grad
    half = 20 * z.detach().half()
    assert torch.equal(losses.sinkhorn(half), losses.sinkhorn(half.float()))
    assert not papers.sinkhorn(half.float()).isfinite().all()   # trap: the linear form overflows


def test_mgca_prototypes_stay_unit_vectors():
    head = losses.MGCA(5, 7, 3).double()
    head.prototypes.data *= 3
    f = pairs()
    head(*(f[k] for k in ("v", "t", "V", "T", "M")))["cpa"].backward()
    torch.testing.assert_close(head.prototypes.norm(dim=1), torch.ones(7).double())
    assert head.prototypes.grad.abs().sum() > 0


# ---------------------------------------------------------------------- the record of an objective
def test_every_objective_is_a_case():
    assert {objective for objective, _ in CASES.values()} == set(losses.OBJECTIVES) == set(PAPERS)


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_objective(name):
    """Each field of a record says what is the case."""
    record, f = losses.OBJECTIVES[name], pairs()
    _, grads = run(ours, f, name)
    uses_v = bool((grads["v"] != 0).any())
    assert record.trains_v == uses_v
    out = parts(f, name)
    assert out["loss"].shape == () and (not record.local or record.local in out)
    assert callable(getattr(losses, record.function)) and "\n" not in record.about
    f |= {"scale": f["log_scale"].exp()}
    defaults = {"keep": 1.0, "one_sided": False, "gather_dtype": None, "alpha": 0.2, "lam": 1 / 3,
                "mu": 1 / 3, "terms": losses.SIX, "global_weight": 0.5, "local_weight": 1.0,
                "sigma": None, "softmax": False, "per_text": False, "spare": 0,
                "strangers": 0}
    options = {option: defaults[option] for option in record.options}
    head = make_head(f, name)
    torch.testing.assert_close(record.loss(f, head, **options), record.loss(f, head))


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_score(name):
    """What ranks texts for a picture, and pictures for a text: (B, C) both."""
    record, f = losses.OBJECTIVES[name], pairs()
    v, V = f["v"][:3], f["V"][:3]
    i2t, t2i = record.score(v, V, f["t"], f["T"], f["M"])
    cosines = F.normalize(v, dim=-1) @ F.normalize(f["t"], dim=-1).T
    expected = {"filip": losses.filip_similarity(V, f["T"], f["M"]),
                "pacl": 2 * (losses.pacl_similarity(V, f["t"]),)}.get(name, (cosines, cosines))
    torch.testing.assert_close((i2t, t2i), expected)
    assert record.late == (name == "filip") and i2t.shape == t2i.shape == (3, 4)


def test_parts_of_objectives():
    """The parts that are logged add up to the loss."""
    f = pairs()
    for name in ("clip+filip", "gloria"):
        out = parts(f, name)
        assert out["global"] == ours(f, "clip")
        assert out["loss"] == out["global"] + out["local"]
    assert parts(f, "clip+filip")["local"] == ours(f, "filip")
    out = parts(f, "mgca")
    assert out["ita"] == losses.clip_loss(f["v"], f["t"], out["scale"])
    assert abs(out["loss"] - out["ita"] - out["cta"] - out["cpa"]) < 1e-9


def test_options_of_objectives_reach_the_losses():
    f = pairs() | {"scale": torch.tensor(10., dtype=torch.float64)}
    hard = losses.OBJECTIVES["pyramid"].loss(f, None, alpha=0, terms=("GS",))["loss"]
    torch.testing.assert_close(hard, losses.clip_loss(f["v"], f["l_s"], f["scale"]))
    both = losses.OBJECTIVES["clip+filip"].loss(f, None, keep=0.5, one_sided=True)["loss"]
    torch.testing.assert_close(both, ours(f, "clip") + ours(f, "filip keep=0.5 one-sided"))


def test_pyramid_without_a_local_crop():
    """The global crop stands in for it; regions and object names may be missing."""
    f = pairs()
    whole = {k: x for k, x in f.items() if k not in ("v_l", "v_r", "l_a")}
    torch.testing.assert_close(parts(whole, "pyramid")["loss"],
                               losses.pyramid_loss(f["v"], f["v"], None, f["l_s"], f["t"], None,
                                                   10., **PYRAMID_WEIGHTS)["loss"])


def test_heads():
    """SPARC D.4: 1 head, 128 wide, 500 prototypes. GLoRIA learns a second scale."""
    attention = 2 * [*3 * [(128, 8), (128,)], (8, 128), (8,)]
    expected = {name: [] for name in losses.OBJECTIVES}
    expected |= {"gloria": [()], "mgca": [(500, 8), (3,), *attention]}
    for name, record in losses.OBJECTIVES.items():
        shapes = [tuple(p.shape) for p in record.head(8).parameters()]
        assert shapes == expected[name]


# --------------------------------------------------------------------------------------- the traps
def no_mask(x, M):
    return x


def mask_out(x, M):
    return x.masked_fill(~M, -math.inf)


def largest(score, n):
    """(B,N), (B,) -> (B,N) mask of the n[b] largest of each row."""
    rank = score.argsort(1, descending=True).argsort(1)
    return rank < n.int().clamp(min=1)[:, None]


def kept_with(s, M, keep, mistake):
    """FILIP's selection from products s (B,C,P,L): masks of patches (B,P) and of words (C,L)."""
    real, own = s.masked_fill(~M[None, :, None], -9), torch.eye(len(M)).bool()
    of_patch, of_word = real.amax((1, 3)), real.amax((0, 2))
    if mistake == "selection by sum":
        of_patch, of_word = (s * M[None, :, None]).sum((1, 3)), s.sum((0, 2))
    elif mistake == "selection by the own pair":
        of_patch, of_word = real[own].amax(2), real[own].amax(1)
    words = M.sum(1)
    if mistake == "share of the padded length":
        words = torch.full_like(words, M.shape[1])
    patches = torch.full_like(words, s.shape[2])
    return (largest(of_patch, keep * patches),
            largest(of_word.masked_fill(~M, -99), keep * words) & M)


def filip_similarity_with(s, M, patches, words, seen_patches, seen_words, mistake):
    """Means over `patches` and `words`, of maxima over those of the other side that are seen."""
    to_word = s.masked_fill(~(seen_words & M)[None, :, None], -9)
    if mistake == "padding takes part in the max":
        to_word = s
    elif mistake == "padding as zero vectors":
        to_word = s * M[None, :, None]
    to_word = to_word.max(3).values                                             # (B, C, P)
    to_patch = s.masked_fill(~seen_patches[:, None, :, None], -9).max(2).values       # (B, C, L)
    s_image = (to_word * patches[:, None]).sum(2) / patches.sum(1, keepdim=True)
    s_text = (to_patch * words).sum(2)
    if mistake != "sum over words":
        s_text = s_text / words.sum(1)
    return s_image, s_text


def filip_with(f, mistake, keep=1, one_sided=False):
    """FILIP in a short tensor form, with one mistake on demand."""
    V, T, M = F.normalize(f["V"], dim=-1), F.normalize(f["T"], dim=-1), f["M"]
    s = torch.einsum("bpd,cld->bcpl", V, T)
    own, every = torch.eye(len(V)).bool(), torch.ones(V.shape[:2]).bool()
    sent = kept_with(s, M, keep, mistake)
    mine = (every, M) if one_sided else sent
    if mistake == "the other form":
        mine = sent if one_sided else (every, M)
    s_image, s_text = filip_similarity_with(s, M, *mine, *sent, mistake)
    if mistake == "positive not reduced":
        whole = filip_similarity_with(s, M, every, M, every, M, mistake)
        s_image = torch.where(own, whole[0], s_image)
        s_text = torch.where(own, whole[1], s_text)
    columns = s_text.T
    if mistake == "both over the same axis":
        columns = s_text
    elif mistake == "one matrix for both directions":
        columns = s_image.T
    y, g = torch.arange(len(V)), f["log_scale"].exp()
    return (F.cross_entropy(g * s_image, y) + F.cross_entropy(g * columns, y)) / 2


def sparc_weights_with(V, T, mistake):
    if mistake == "patches normalised before the similarity":
        V = F.normalize(V, dim=-1)
    s = torch.einsum("bld,bpd->blp", T, V)
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)
    tied = high - low < (0 if mistake == "0/0 when all patches tie" else 1e-6)
    s = ((s - low) / (high - low).masked_fill(tied, 1)).masked_fill(tied, 1)
    if mistake != "no threshold":
        s = s.masked_fill(s < 1 / V.shape[1], 0)
    a = s / s.sum(-1, keepdim=True)
    return a.detach() if mistake == "weights detached" else a


def sparc_local_with(f, mistake):
    """SPARC's local loss in a short tensor form, with one mistake on demand."""
    V, T, M = f["V"], f["T"], f["M"]
    L, total = T.shape[1], 0
    grouped = mistake == "grouped over all images of the batch"
    c = torch.einsum("blp,npd->bld" if grouped else "blp,bpd->bld",
                     sparc_weights_with(V, T, mistake), V)
    x = f["log_scale"].exp() * F.normalize(c, dim=-1) @ F.normalize(T, dim=-1).mT
    padding = -math.inf if mistake == "padded rows of -inf times 0" else -1e9
    for x in (x, x.mT):
        if mistake != "padding as negatives":
            x = x.masked_fill(~M[:, None], padding)
        if mistake != "cross_entropy over dim 1":
            x = x.mT                                            # PyTorch's classes are dim 1
        own = torch.arange(L).expand(len(V), L)
        ce = F.cross_entropy(x, own, reduction="none") * M      # (B, L)
        if mistake == "mean of the captions' means":
            total = total + (ce.sum(1) / M.sum(1)).mean() / 2
        else:
            total = total + ce.sum() / M.sum() / 2
    return total


def pacl_with(f, mistake):
    """PACL with the pooled vectors made, (B,C,D), and one mistake on demand."""
    V, t, y = F.normalize(f["V"], dim=-1), F.normalize(f["t"], dim=-1), torch.arange(4)
    a = torch.einsum("bpd,cd->bcp", V, t).softmax(2)
    pooled = torch.einsum("bcp,bpd->bcd", a, V)
    if mistake == "pooled with the own caption only":
        pooled = pooled[y, y][:, None]
    x = f["log_scale"].exp() * F.cosine_similarity(pooled, t[None], dim=2)
    columns = x if mistake == "both over the same axis" else x.T
    return (F.cross_entropy(x, y) + F.cross_entropy(columns, y)) / 2


def gloria_local_with(f, mistake):
    """GLoRIA's local loss with what each word sees made, (B,C,L,D), and one mistake on demand."""
    V, T, M, y = f["V"], f["T"], f["M"], torch.arange(len(f["V"]))
    D = V.shape[2]
    s = torch.einsum("bpd,cld->bclp", V, T) / (D if mistake == "divided by D" else D ** 0.5)
    among_words = no_mask if mistake == "padding in the softmax over words" else mask_out
    w = among_words(s, M[:, :, None]).softmax(2)
    c = torch.einsum("bclp,bpd->bcld", (4 * w).softmax(3), V)
    in_the_sum = no_mask if mistake == "padding in the sum over words" else mask_out
    x = in_the_sum(5 * F.cosine_similarity(c, T, dim=3), M).logsumexp(2)
    x = f["log_scale"].exp() / 2 * x
    if mistake == "squeeze":
        x = x.squeeze()
    columns = x if mistake == "both over the same axis" else x.t()
    return (F.cross_entropy(x, y) + F.cross_entropy(columns, y)) / 2


def attend_with(parameters, name, x, others, mask=None):
    def layer(part, y):
        return F.linear(y, parameters[f"{name}.{part}.weight"], parameters[f"{name}.{part}.bias"])

    q, k, v = layer("q", x), layer("k", others), layer("v", others)
    return layer("out", F.scaled_dot_product_attention(q, k, v, mask))


def mgca_cta_with(f, mistake):
    """MGCA's token alignment in a short tensor form, with one mistake on demand."""
    V, T, M, parameters = f["V"], f["T"], f["M"], mgca_parameters(f)
    words = F.normalize(attend_with(parameters, "words_see", T, V), dim=-1)
    keys = None if mistake == "patches look at padding" else M[:, None]
    patches = attend_with(parameters, "patches_see", V, T, keys)
    if mistake != "attended patches not normalised":
        patches = F.normalize(patches, dim=-1)
    total, g = 0, parameters["log_scales"][1].exp()
    for x, y, real in ((T, words, M), (V, patches, torch.ones(V.shape[:2]).bool())):
        z = g * F.normalize(x, dim=-1) @ y.mT
        own = torch.arange(z.shape[1]).expand(z.shape[:2])
        for s in (z, z.mT):
            if mistake != "padding in the denominators":
                s = s.masked_fill(~real[:, None], -1e9)
            ce = F.cross_entropy(s.mT, own, reduction="none") * real
            total = total + ce.sum() / real.sum() / 2
    return total


TRAPS = {
    "filip": ("both over the same axis", "one matrix for both directions",
              "padding takes part in the max", "padding as zero vectors", "sum over words"),
    "filip keep=0.5": ("selection by sum", "selection by the own pair", "positive not reduced",
                       "share of the padded length", "the other form"),
    "filip keep=0.5 one-sided": ("selection by sum", "selection by the own pair",
                                 "positive not reduced", "share of the padded length",
                                 "the other form"),
    "sparc": ("0/0 when all patches tie", "padded rows of -inf times 0", "padding as negatives",
              "cross_entropy over dim 1", "grouped over all images of the batch",
              "weights detached", "patches normalised before the similarity", "no threshold",
              "mean of the captions' means"),
    "pacl": ("pooled with the own caption only", "both over the same axis"),
    "gloria": ("divided by D", "padding in the softmax over words",
               "padding in the sum over words", "both over the same axis"),
    "mgca": ("attended patches not normalised", "padding in the denominators",
             "patches look at padding"),
}
SHORT = {"filip": filip_with, "sparc": sparc_local_with, "pacl": pacl_with,
         "gloria": gloria_local_with, "mgca": mgca_cta_with}


def compared_part(f, name):
    """The part of our loss that the short tensor form computes."""
    part = {"sparc": "local", "gloria": "local", "mgca": "cta"}.get(name, "loss")
    return parts(f, name)[part]


def short_form(f, name, mistake):
    objective, options = CASES[name]
    options = options if objective == "filip" else {}
    return SHORT[objective](f, mistake, **options)


@pytest.mark.parametrize("name, mistake", [(name, m) for name, some in TRAPS.items() for m in some])
def test_trap(name, mistake):
    f = pairs()
    if name == "sparc":
        f["V"][1] = f["V"][1, 0].clone()                # a picture of one colour: its patches tie
    result, right = run(compared_part, f, name), run(short_form, f, name, None)
    assert same(result, right)
    assert not same(result, run(short_form, f, name, mistake), 1e-3, 1e-3)


@pytest.mark.parametrize("one_sided", [False, True])
def test_filip_trap_positive_gets_more_tokens(one_sided):
    """Four times the same pair: nothing tells the own one apart, so the loss is log 4, unless the
    own one alone was allowed all its tokens."""
    f = subset(pairs(), [2, 2, 2, 2])
    loss = losses.filip_loss(f["V"], f["T"], f["M"], 10., keep=0.1, one_sided=one_sided)
    assert abs(loss - math.log(4)) < 1e-9
    wrong = filip_with(f, "positive not reduced", 0.1, one_sided)
    assert abs(wrong - math.log(4)) > 0.05


def test_filip_trap_mean_in_half_precision():
    """A mean of 49 fp16 numbers is off by 5e-5: times a scale of 100, 0.005 in a logit."""
    f = pairs(P=49, dtype=torch.float16)
    V, T = (F.normalize(f[k].float(), dim=-1).half() for k in "VT")
    s = torch.einsum("bpd,cld->bcpl", V, T).masked_fill(~f["M"][None, :, None], -9).max(3).values
    exact = s.double().mean(2)
    s_image, _ = losses.filip_similarity(f["V"], f["T"], f["M"])
    assert (s_image - exact).abs().max() < 1e-6
    assert (s.mean(2) - exact).abs().max() > 5e-5


def test_gloria_trap_squeeze():
    """B = 1: the 1 x 1 similarities become a number without rows."""
    one = subset(pairs(), [1])
    assert compared_part(one, "gloria") == gloria_local_with(one, None) == 0
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        gloria_local_with(one, "squeeze")


@pytest.mark.parametrize("name", ["clip", "filip", "sparc", "gloria", "mgca", "pyramid"])
def test_trap_exp_then_log(name):
    """At scale 100 exp overflows fp32. The loops do just that, and need float64 to be right."""
    f = pairs(P=8, scale=100.)
    f |= {"t": f["v"], "T": f["V"], "M": torch.ones_like(f["M"])}
    f |= {view: f["v"] for view in ("v_l", "v_r", "l_s", "l_a")}
    assert not paper(single(f), name).isfinite()
    assert abs(ours(single(f), name) - paper(f, name)) < 1e-4


def test_trap_logits_in_bf16():
    """With hard negatives, so that the rounding of logits matters."""
    f = pairs(dtype=torch.float32, D=64, scale=100.)
    f["t"] = f["v"] + f["v"].roll(1, 0) + f["t"] / 4
    exact = papers.clip(f["v"].double(), f["t"].double(), 100.)
    with bf16_autocast():
        x = 100 * F.normalize(f["v"], dim=-1) @ F.normalize(f["t"], dim=-1).T
        wrong = (F.cross_entropy(x, torch.arange(4)) + F.cross_entropy(x.T, torch.arange(4))) / 2
        right = losses.clip_loss(f["v"], f["t"], f["log_scale"].exp())
    assert abs(right - exact) < 1e-4 and abs(wrong - exact) > 1e-2


def with_clamped_scale(f, name):
    return ours(f | {"log_scale": f["log_scale"].clamp(max=math.log(100))}, name)


@every_case
def test_trap_scale_clamped_in_the_forward(name):
    """Beyond the bound its gradient is 0, so the scale could never come back. train.py clamps it
    after the step."""
    clamped = run(with_clamped_scale, pairs(scale=150.), name)
    free = run(ours, pairs(scale=150.), name)
    assert clamped[1]["log_scale"] == 0 and free[1]["log_scale"].abs() > 1e-3


# --------------------------------------------------------------------------------- many processes
SPREAD = ("clip", "filip", "filip keep=0.5", "filip keep=0.5 one-sided", "sparc", "sparc per-text",
          "pyramid", "pacl", "gloria", "mgca")
IN_FP16 = ("filip", "pacl", "gloria")                           # objectives that send tokens
GATHERS = [(None, 1.), (torch.float16, 1.), (torch.float16, 1e-9)]      # dtype, size of gradients
WIRE = {            # case: dtype of the tokens, gather_dtype, bytes of a number that is sent
    "fp32 as they are": (torch.float32, None, 4),
    "fp32 in fp16": (torch.float32, torch.float16, 2),
    "bf16 as they are": (torch.bfloat16, None, 2),
    "bf16 in fp32": (torch.bfloat16, torch.float32, 4)}
PRINTED_SPREAD = ("clip", "filip", "pyramid", "pacl", "gloria", "mgca", "sparc", "gather")


def start(rank, folder, split):
    """Join the others -> this rank's pairs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                            world_size=len(split), timeout=datetime.timedelta(seconds=60))
    return subset(pairs(), *split[rank])


def finish(rank, folder, out):
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def counted(function, name, which):
    """function, with the bytes of its argument number `which` added to its list `sent`."""
    def counting(*tensors, **named):
        counting.sent[name] += tensors[which].numel() * tensors[which].element_size()
        return function(*tensors, **named)
    return counting


def bytes_sent(f, one_sided, keep, gather_dtype):
    """What this process hands to all_gather and all_reduce, and gets from reduce_scatter."""
    sent = {"gathered": 0, "returned": 0, "agreed": 0}
    watched = {"all_gather": ("gathered", 1), "reduce_scatter": ("returned", 0),
               "all_reduce": ("agreed", 0)}
    plain = {function: getattr(dist, function) for function in watched}
    for function, (name, which) in watched.items():
        counting = counted(plain[function], name, which)
        counting.sent = sent
        setattr(dist, function, counting)

    def loss(f):
        return losses.filip_loss(f["V"], f["T"], f["M"], 10., keep, gather_dtype, one_sided)

    run(loss, f)
    for function, original in plain.items():
        setattr(dist, function, original)
    return sent


def all_bytes_sent(f):
    out = {}
    for case, (dtype, gather_dtype, _) in WIRE.items():
        tokens = {"V": f["V"].to(dtype), "T": f["T"].to(dtype), "M": f["M"]}
        for one_sided in (False, True):
            for keep in (0.5, 1):
                sent = bytes_sent(tokens, one_sided, keep, gather_dtype)
                out[case, one_sided, keep] = sent
    return out


def message_of_second_gradient(x):
    """What a second backward through the gather says."""
    x = x.clone().requires_grad_()
    grad, = torch.autograd.grad(losses.gather(x).pow(2).sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def load(source):
    """A printed module, from its text."""
    module = types.ModuleType("printed")
    exec(source, module.__dict__)
    return module


def printed_and_project(f):
    """{name: [value and gradients by the printed module, by the project]}."""
    out = {}
    for name in PRINTED_SPREAD:
        function = function_of(name)
        named = inputs_of(function, f)
        printed = getattr(load(losses.cut_out(name)), function.__name__)
        out[name] = [value_and_gradients(printed, named), value_and_gradients(function, named)]
    return out


def two_processes(rank, folder):
    """All that needs two processes in one start, which costs seconds. Captions are padded to 5
    here and to 8 there. The tests below compare the results."""
    f, gather, labels = start(rank, folder, HALVES), losses.gather, losses.labels

    def gather_without_gradient(x, dtype=None):
        return gather(x.detach(), dtype)

    def labels_without_rank(rows):
        return torch.arange(len(rows))

    out = {name: run(ours, f, name) for name in SPREAD}
    out |= {("fp16", name): run(ours_in_fp16, f, name) for name in IN_FP16}
    out["bytes"], out["printed"] = all_bytes_sent(f), printed_and_project(f)
    out["twice"] = message_of_second_gradient(f["v"])
    for dtype, size in GATHERS:
        x = f["v"].clone().requires_grad_()
        y = gather(x, dtype)
        (y.double() * size * (rank + 1) * torch.arange(1, 5)[:, None]).sum().backward()
        out[dtype, size] = y.detach().double(), x.grad
    losses.gather = gather_without_gradient
    out |= {("no gradient", name): run(ours, f, name) for name in SPREAD}
    losses.gather, losses.labels = gather, labels_without_rank
    out |= {("labels", name): run(ours, f, name) for name in SPREAD}
    losses.labels, losses.DENSE = labels, 0
    out |= {("blocks", name): run(ours, f, name) for name in SPREAD if "filip" in name}
    finish(rank, folder, out)


def four_processes(rank, folder):
    f = start(rank, folder, QUARTERS)
    finish(rank, folder, {name: run(ours, f, name) for name in SPREAD})


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
    """The whole batch's result from those of the ranks: the mean of their losses, and of their
    parameters' gradients. A feature's gradient is on the rank that owns it, where the gather's
    backward has added what the other ranks' losses ask for; the mean divides it too."""
    W, grads = len(ranks), {}
    for name in ranks[0][key][1]:
        each = [rank[key][1][name] for rank in ranks]
        if is_parameter(name):
            grads[name] = sum(each) / W
        else:
            if name == "T":
                each = [F.pad(x, (0, 0, 0, 8 - x.shape[1])) for x in each]
            grads[name] = torch.cat(each) / W
    return sum(rank[key][0] for rank in ranks) / W, grads


def in_one_process(name, split):
    """The whole batch at once. With keep < 1, ranks select among their own pairs."""
    if "keep" not in name:
        return run(ours, pairs(), name)

    def in_groups(f):
        return paper(f, name, groups=[rows for rows, _ in split])

    return run(in_groups, pairs())


@pytest.mark.parametrize("name", SPREAD)
def test_two_processes_equal_one(ranks, name):
    one = in_one_process(name, HALVES)
    assert same(as_ddp(ranks, name), one, 1e-9, 1e-9)
    if "keep" in name:
        assert not same(one, run(ours, pairs(), name), 1e-3, 1e-3)
    if "filip" in name:
        assert same(as_ddp(ranks, ("blocks", name)), one, 1e-9, 1e-9)


@pytest.mark.parametrize("name", IN_FP16)
def test_two_processes_that_send_fp16(ranks, name):
    """As close as tokens sent in fp16 can be, and no closer."""
    one, sent = run(ours, pairs(), name), as_ddp(ranks, ("fp16", name))
    assert same(sent, one, 1e-2, 1e-2) and not same(sent, one, 1e-9, 1e-9)


@pytest.mark.parametrize("name", SPREAD)
def test_trap_gather_without_gradient(ranks, name):
    """The value is right and the gradients are wrong."""
    one, detached = in_one_process(name, HALVES), as_ddp(ranks, ("no gradient", name))
    assert abs(detached[0] - one[0]) < 1e-9 and not same(detached, one, 1, 1e-3)


@pytest.mark.parametrize("name", SPREAD)
def test_trap_labels_that_forget_the_rank(ranks, name):
    one, mislabelled = in_one_process(name, HALVES), as_ddp(ranks, ("labels", name))
    assert abs(mislabelled[0] - one[0]) > 1e-3


@pytest.mark.parametrize("name", SPREAD)
def test_trap_accumulation_is_not_a_larger_batch(name):
    """Two half batches are not the whole one, for each half meets only its own negatives."""
    halves = [ours(subset(pairs(), *half), name) for half in HALVES]
    assert abs(sum(halves) / 2 - in_one_process(name, HALVES)[0]) > 1e-2


@pytest.mark.parametrize("name", SPREAD)
def test_four_processes_equal_one(four_ranks, name):
    assert same(as_ddp(four_ranks, name), in_one_process(name, QUARTERS), 1e-9, 1e-9)


@pytest.mark.parametrize("case", WIRE)
@pytest.mark.parametrize("one_sided", [False, True])
def test_bytes_on_the_wire(ranks, case, one_sided):
    """FILIP 3.1.1: of each of two pairs half the patches (2 of 4) and half the words of the longest
    caption (4 of 8), 5 numbers each, and the mask, a byte a word. Gradients come back in fp32.
    All agree on one length, in 8 bytes."""
    size = WIRE[case][2]
    for keep, patches, words in ((0.5, 2, 4), (1, 4, 8)):
        numbers = 2 * (patches + words) * 5
        expected = {"gathered": numbers * size + 2 * words, "returned": numbers * 4, "agreed": 8}
        assert [rank["bytes"][case, one_sided, keep] for rank in ranks] == [expected] * 2


@pytest.mark.parametrize("dtype, size", GATHERS)
def test_gather(ranks, dtype, size):
    """Values travel in dtype, gradients must not: that of a negative is about 3e-8 at FILIP's batch
    size, below the smallest fp16 number. The weights are (1 + 2) row, from both ranks."""
    for rank, rows in zip(ranks, ([1, 2], [3, 4])):
        y, grad = rank[dtype, size]
        assert torch.equal(y, pairs()["v"].to(dtype or torch.float64).double())
        assert grad.dtype == torch.float64
        expected = 3 * size * torch.tensor(rows, dtype=torch.float64)[:, None].expand(-1, 5)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_gather_cannot_be_differentiated_twice(ranks):
    assert all("differentiate twice" in rank["twice"] for rank in ranks)


@pytest.mark.parametrize("name", PRINTED_SPREAD)
def test_printed_modules_run_in_two_processes(ranks, name):
    for rank in ranks:
        printed, project = rank["printed"][name]
        torch.testing.assert_close(printed, project, rtol=0, atol=0)


# ---------------------------------------------------------------------------- python losses.py NAME
PRINTED = (*losses.OBJECTIVES, "sparc_alignment", "filip_similarity", "gather", "sinkhorn")
MODULES = [(name, plain) for name in PRINTED for plain in (False, True)]
MODULES = [(name, plain) for name, plain in MODULES if not plain or "filip" in name]


def function_of(name):
    record = losses.OBJECTIVES.get(name)
    return getattr(losses, record.function if record else name)


def file_of(name, plain):
    return name.replace("+", "_") + "_alone" + "_plain" * plain


def printed_by(monkeypatch, capsys, *arguments):
    """What `python losses.py ...` prints."""
    monkeypatch.setattr(sys, "argv", ["losses.py", *arguments])
    runpy.run_path(losses.__file__, run_name="__main__")
    return capsys.readouterr().out


def fresh_interpreter(script, folder):
    """Run it where the project is not on the path."""
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT_ALL = """
import importlib
import importlib.util
assert importlib.util.find_spec("losses") is None, "the project is on the path"
import torch
out = {}
for file, (function, named) in torch.load("inputs.pt").items():
    module = importlib.import_module(file)
    out[file] = value_and_gradients(getattr(module, function), named)
    if hasattr(module, "DENSE"):
        module.DENSE = 0
        out[file + " by blocks"] = value_and_gradients(getattr(module, function), named)
torch.save(out, "outputs.pt")
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each printed module in a file of an empty folder, imported by one fresh interpreter there
    -> {(name, plain): source}, {file: value and gradients}."""
    folder, sources, inputs = tmp_path_factory.mktemp("alone"), {}, {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, plain in MODULES:
            arguments = ["losses.py", name, *["--plain"] * plain]
            monkeypatch.setattr(sys, "argv", arguments)
            path = folder / f"{file_of(name, plain)}.py"
            with open(path, "w") as file, contextlib.redirect_stdout(file):
                runpy.run_path(losses.__file__, run_name="__main__")
            sources[name, plain] = path.read_text()
            function = function_of(name)
            inputs[path.stem] = function.__name__, inputs_of(function, pairs())
    torch.save(inputs, folder / "inputs.pt")
    fresh_interpreter(inspect.getsource(value_and_gradients) + IMPORT_ALL, folder)
    return sources, torch.load(folder / "outputs.pt")


@pytest.mark.parametrize("name, plain", MODULES)
def test_printed_module_runs_alone(alone, name, plain):
    sources, outputs = alone
    function, file = function_of(name), file_of(name, plain)
    expected = value_and_gradients(function, inputs_of(function, pairs()))
    torch.testing.assert_close(outputs[file], expected, rtol=0, atol=0)
    by_blocks = file + " by blocks"
    assert (by_blocks in outputs) == ("filip" in name and not plain)
    if by_blocks in outputs:
        torch.testing.assert_close(outputs[by_blocks], expected)


def behind_legend(source):
    """The lines of a printed module behind what the letters mean, with which it begins."""
    legend, end, module = source.partition('."""\n')
    assert end and legend.startswith('"""Letters') and "M (C,L) bool mask" in legend
    return module.splitlines()


@pytest.mark.parametrize("name, plain", MODULES)
def test_printed_module_holds_nothing_else(alone, name, plain):
    """What it defines it uses, in order, and it imports torch and what Python brings only."""
    lines = behind_legend(alone[0][name, plain])
    defined = re.findall(r"^(?:def|class) (\w+)|^(\w+) = ", "\n".join(lines), re.M)
    defined = [a or b for a, b in defined]
    for each in defined:
        uses = [line for line in lines if re.search(rf"\b{each}\b", line)]
        assert len(uses) > 1 or each == function_of(name).__name__
    imports = [line for line in lines if re.match("import|from", line)]
    allowed = {"torch", *sys.stdlib_module_names}
    assert all(re.split(r"[ .]", line)[1] in allowed for line in imports)
    assert lines[:len(imports)] == imports
    assert max(map(len, lines)) <= 100 and not (plain and "# faster" in "\n".join(lines))


@pytest.mark.parametrize("name, plain, most", [
    ("clip", False, 60), ("sparc", False, 120), ("filip", False, 160), ("filip", True, 90)])
def test_printed_module_is_short(alone, name, plain, most):
    assert len(behind_legend(alone[0][name, plain])) < most


def test_list_of_objectives(monkeypatch, capsys, alone):
    """A line each, with the number of lines that it takes."""
    listed = printed_by(monkeypatch, capsys).splitlines()
    for name, record in losses.OBJECTIVES.items():
        lines = len(alone[0][name, False].splitlines())
        row, = (line for line in listed if line.startswith(f"{name} "))
        assert row.split()[1] == str(lines) and row.endswith(record.about)


def test_unknown_name_gets_a_sentence(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        printed_by(monkeypatch, capsys, "clap")
    message = capsys.readouterr().err
    assert error.value.code == 2 and "there is no 'clap' here" in message
    assert "Traceback" not in message and len(message.splitlines()) == 2        # usage, sentence


# ------------------------------------------------------------------------------------- the sources
IMPORT_ALONE = """
import importlib
import sys
import warnings
warnings.simplefilter("ignore")
FILES = {files}
blocked = {{"numpy", "PIL", "regex", "ftfy", "tqdm", *FILES}}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {folder!r})
for file in ("model", "losses"):                    # these need torch only
    blocked.remove(file)
    importlib.import_module(file)
    blocked.add(file)
for name in FILES:
    sys.modules.pop(name, None)
blocked.clear()
for file in FILES:
    importlib.import_module(file)
    for name in FILES:
        sys.modules.pop(name, None)
print("all")
"""


def test_each_file_imports_alone(tmp_path):
    """model.py and losses.py where only torch is installed; the six in whatever order."""
    script = IMPORT_ALONE.format(files=FILES, folder=str(FOLDER))
    assert fresh_interpreter(script, tmp_path) == "all\n"


def test_each_numbered_equation_is_tagged_once():
    """So that grep -n "SPARC eq. 3" *.py leads to one line."""
    source = "".join((FOLDER / f"{name}.py").read_text(encoding="utf-8") for name in FILES)
    equations = {"FILIP": range(1, 7), "PyramidCLIP": range(1, 5), "SPARC": (*range(1, 8), 9)}
    for name, numbers in equations.items():
        tags = {n: len(re.findall(rf"{name} eq\. {n}\b", source)) for n in numbers}
        assert tags == {n: 1 for n in numbers}


@pytest.mark.parametrize("pattern", ["*.py", "tests/*.py"])
def test_lines_end_by_column_100(pattern):
    for path in FOLDER.glob(pattern):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == [], path.name
