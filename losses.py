"""Losses: every objective as a pure function with explicit shapes, and the gather that lets them see all processes.

    grep -n "SPARC eq" *.py               # from every numbered equation to its line
    pytest tests/test_losses.py           # each against a loop-by-loop transcription of the paper in float64

Covers: CLIP, FILIP 3.1, SPARC 2 and appendix C.

Letters, here and in every einsum:  b images (B), c texts (C), p patches (P), l m text positions (L), d dimensions (D).
    V (B,P,D) patches    T (C,L,D) tokens    M (C,L) bool, True up to and including the first EOT    v (B,D)    t (C,D)
Nothing has to be normalised by the caller. scale = exp(log_scale) = 1 / temperature.

With several processes each holds its own rows and meets everybody's columns; the mean of their losses is the loss of the whole batch,
and averaging their gradients, as DistributedDataParallel does, gives exactly the gradient that one process would have.

Differs from the papers: FILIP's max skips padding by -inf (some copies let zero vectors compete); a word whose patches all tie gets
weights 1/P in SPARC's eq. 4, as its text says, where the formula is 0/0; eq. 6 averages over all tokens of the batch, as its
pseudo-code does, where the formula sums per text; all objectives have one learned scale, and the caller keeps it below 100.
"""
import functools
import torch
import torch.distributed as dist
import torch.nn.functional as F


# ------------------------------------------------------------------------------------------------------------------ small pieces
def full_precision(loss):
    """Decorator: run outside autocast, half-precision tensors raised to float32. float64 stays float64.
    Near 100, where logits live, bf16 can only tell apart steps of 0.5."""
    @functools.wraps(loss)
    def run(*args, **kw):
        raise_ = lambda x: x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x
        with torch.autocast(args[0].device.type, enabled=False):
            return loss(*map(raise_, args), **{k: raise_(x) for k, x in kw.items()})
    return run


def unit(x):
    """x / |x| along the last dimension; a zero vector stays zero."""
    return F.normalize(x, dim=-1, eps=1e-6)


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)          # newer name first
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class _Gather(torch.autograd.Function):
    """All ranks' x along dim 0. Backward: each rank gets the sum of all ranks' gradients for its own rows, summed in fp32."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = x.dtype
        x = x.to(dtype or x.dtype).contiguous()
        out = x.new_empty(world() * len(x), *x.shape[1:])
        _all_gather(out, x)
        return out.to(ctx.dtype)                                   # so that the gradients that come back are not in half precision

    @staticmethod
    def backward(ctx, grad):
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        mine = grad.new_empty(len(grad) // world(), *grad.shape[1:])
        _reduce_scatter(mine, grad)
        return mine.to(ctx.dtype), None


def gather(x, dtype=None):
    """x (b, ...) of every rank -> (W b, ...), differentiable; sent over the network in `dtype` (None: as it is). One process: x itself."""
    return x if world() == 1 else _Gather.apply(x, dtype)


def gather_texts(T, M, dtype=None):
    """gather for tokens and their mask: captions are first padded to the longest of all ranks."""
    if world() == 1:
        return T, M
    longest = torch.tensor(T.shape[1], device=T.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    pad = int(longest) - T.shape[1]
    T, M = F.pad(T, (0, 0, 0, pad)), F.pad(M, (0, pad))
    return gather(T, dtype), gather(M.to(torch.uint8)).bool()


def labels(rows):
    """Column of each local row's own pair among all ranks' columns."""
    rank = dist.get_rank() if world() > 1 else 0
    return torch.arange(len(rows), device=rows.device) + rank * len(rows)


# -------------------------------------------------------------------------------------------------------------------------- CLIP
@full_precision
def clip_loss(v, t, scale):
    """v (b,D) pictures, t (b,D) their texts -> scalar. CLIP's InfoNCE, the mean of both directions; SPARC 2, "global alignment"."""
    v, t = unit(v), unit(t)
    v_to_t = scale * torch.einsum("bd,cd->bc", v, gather(t))                                   # FILIP eq. 2: my pictures, all texts (b, B)
    t_to_v = scale * torch.einsum("bd,cd->bc", t, gather(v)) if world() > 1 else v_to_t.T      # my texts, all pictures (b, B)
    y = labels(v)
    return (F.cross_entropy(v_to_t, y) + F.cross_entropy(t_to_v, y)) / 2                       # SPARC eq. 1


# ------------------------------------------------------------------------------------------------------------------------- FILIP
def _token_units(x):
    """Unit vectors computed in fp32, then in the dtype of the token products: autocast's where it is on, else the input's."""
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        return unit(x.to(torch.promote_types(x.dtype, torch.float32))).to(dtype)


def filip_similarity(V, T, M):
    """V (B,P,D) patches, T (C,L,D) tokens, M (C,L) mask -> s_image (B,C), s_text (B,C): similarity of picture b to text c, and of
    text c to picture b. Two different matrices; rows are pictures in both. FILIP 3.1.1, cross-modal late interaction."""
    return _late_interaction(_token_units(V), _token_units(T), M)


def _late_interaction(V, T, M):
    """filip_similarity of unit vectors."""
    with torch.autocast(V.device.type, enabled=False):
        s = torch.einsum("bpd,cld->bcpl", V, T)                                                # (B, C, P, L)
        to_word = s.masked_fill(~M[None, :, None], float("-inf")).max(3).values                # FILIP eq. 3: padding takes no part
        to_patch = s.max(2).values                                                             # (B, C, L)
        acc = torch.promote_types(s.dtype, torch.float32)                                      # means never in half precision
        s_image = to_word.to(acc).mean(2)                                                      # FILIP eq. 4
        s_text = (to_patch.to(acc) * M).sum(2) / M.sum(1)                                      # FILIP eq. 5
    return s_image, s_text


@torch.no_grad()
def _select(V, T, M, keep):
    """Positions of the tokens worth sending: those with the largest eq. 3 over all texts (pictures) of this process.
    -> of patches (b, kI), of text positions (b, kT); at least one each."""
    s = torch.einsum("bpd,cld->bcpl", V, T).masked_fill(~M[None, :, None], float("-inf"))
    k_image, k_text = (max(1, int(keep * n + 1e-9)) for n in (V.shape[1], T.shape[1]))
    return s.amax((1, 3)).topk(k_image).indices, s.amax((0, 2)).topk(k_text).indices


def filip_loss(V, T, M, scale, keep=1.0, gather_dtype=None):
    """V (b,P,D) patches, T (b,L,D) tokens, M (b,L) mask of the same pairs -> scalar. FILIP 3.1.

    keep < 1: only that share of each picture's patches and each text's positions meets the others ("training efficiency", 3.1.1).
    The gathered side is reduced, for the own pair as for all; the local side stays whole. gather_dtype: sent in this dtype.
    """
    V, T = _token_units(V), _token_units(T)
    V_sent, T_sent, M_sent = V, T, M
    if keep < 1:
        p, l = _select(V, T, M, keep)
        pick = lambda x, i: x.gather(1, i[..., None].expand(-1, -1, x.shape[-1]))
        V_sent, T_sent, M_sent = pick(V, p), pick(T, l), M.gather(1, l)
    if world() == 1 and keep == 1:
        s_image, s_text = _late_interaction(V, T, M)
    else:
        s_image, _ = _late_interaction(V, *gather_texts(T_sent, M_sent, gather_dtype))
        _, s_text = _late_interaction(gather(V_sent, gather_dtype), T, M)
    y = labels(V)
    with torch.autocast(V.device.type, enabled=False):
        i2t = F.cross_entropy(scale * s_image, y)                                              # over texts: rows of s_image
        t2i = F.cross_entropy(scale * s_text.T, y)                                             # over pictures: columns of s_text
        return (i2t + t2i) / 2                                                                 # FILIP eq. 1


# ------------------------------------------------------------------------------------------------------------------------- SPARC
@full_precision
def sparc_alignment(V, T, sigma=None, softmax=False):
    """V (B,P,D) patches and T (B,L,D) tokens of the same pairs -> a (B,L,P), each word's weights on the patches; rows sum to 1.

    sigma: threshold in 0..1; None is the paper's 1/P, 0 keeps every patch (its ablation). softmax=True: softmax over patches instead
    of eqs. 2-4 (the other ablation). Gradients flow through the minimum, the maximum and the kept entries.
    """
    s = torch.einsum("bld,bpd->blp", T, V)                                                     # not normalised
    if softmax:
        return s.softmax(-1)
    P = s.shape[-1]
    sigma = 1 / P if sigma is None else sigma
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)                             # (B, L, 1)
    tied = high - low <= 1e-6 * high.abs().clamp(min=1)                                        # a word for which all patches are alike
    s_hat = (s - low) / (high - low).masked_fill(tied, 1)                                      # SPARC eq. 2, in 0..1
    s_til = s_hat.masked_fill(s_hat < sigma, 0)                                                # SPARC eq. 3
    s_til = s_til.masked_fill(tied, 1)
    return s_til / s_til.sum(-1, keepdim=True)                                                 # SPARC eq. 4; the sum is at least 1


@full_precision
def sparc_loss(v, t, V, T, M, scale, global_weight=0.5, local_weight=1.0, sigma=None, softmax=False, drop_special=False):
    """v (b,D), t (b,D), V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> {"loss", "global", "local"}, scalars. SPARC 2.

    drop_special: leave BOS and EOT out of the local loss (both count in the paper, as far as it says).
    """
    a = sparc_alignment(V, T, sigma, softmax)                                                  # (b, L, P)
    c = torch.einsum("blp,bpd->bld", a, V)                                                     # SPARC eq. 5: one picture vector a word
    c_to_t = scale * torch.einsum("bld,bmd->blm", unit(c), unit(T))                            # words of the same text only (b, L, L)
    if drop_special:
        M = M & M.roll(-1, 1)                                                                  # all but EOT ...
        M[:, -1] = M[:, 0] = False                                                             # ... and BOS
    y = torch.arange(M.shape[1], device=M.device).expand_as(M)[M]                              # (N,), N real tokens in all
    local = 0.
    for x in (c_to_t, c_to_t.transpose(1, 2)):
        x = x.masked_fill(~M[:, None], float("-inf"))                                          # padding is no negative
        local = local + F.cross_entropy(x[M], y, reduction="sum") / 2                          # SPARC eq. 6, padded rows left out
    n = M.sum()
    if world() > 1:                                                # the mean over all ranks' tokens, though ranks hold unequal numbers
        dist.all_reduce(n)
        local = local * world()
    local = local / n.clamp(min=1)
    glob = clip_loss(v, t, scale)
    return {"loss": global_weight * glob + local_weight * local, "global": glob, "local": local}   # SPARC eq. 7


# ----------------------------------------------------------------------------------------------------------- by name, for train.py
# f: what model(batch) returns; a: the options of train.py. Each returns a dict of scalars; "loss" is minimised, all are logged.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OBJECTIVES = {
    "clip": lambda f, a: {"loss": clip_loss(f["v"], f["t"], f["scale"])},
    "filip": lambda f, a: {"loss": filip_loss(f["V"], f["T"], f["M"], f["scale"], a.keep, DTYPES[a.gather_dtype])},
    "sparc": lambda f, a: sparc_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"], a.global_weight, a.local_weight,
                                     a.sigma, a.softmax, a.drop_special),
}
