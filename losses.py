"""Losses: every objective as a pure function with explicit shapes, and the gather between processes

    python losses.py                      # the objectives, a line each
    python losses.py sparc > sparc.py     # one of them as a module that runs alone, with torch only
    grep -n "SPARC eq" *.py               # from the numbered equations to their lines

Covers CLIP, SPARC 2 and appendix C, FILIP 3.1, PyramidCLIP 3.4, and SPARC's rivals (its sections 4,
D.3, D.4): PACL, GLoRIA, MGCA, CLIP + FILIP.

Letters, here and in every einsum:
    b, B  pictures    c, C  texts    p, P  patches    l, m, L  text positions    d, D  dimensions
    v (B,D) pictures   t (C,D) texts   V (B,P,D) patches   T (C,L,D) tokens
    M (C,L) bool mask of the texts, True up to and including the first end-of-text token
Nothing has to be normalised by the caller. scale = exp(logit_scale) = 1 / temperature.

Many processes: each compares its own rows with the columns of all. DistributedDataParallel takes
the means of their losses and gradients: the same as in one process with the whole batch.

Differs from the papers:
- SPARC's eq. 4 is 0/0 for a word to which all patches are alike: 1/P, as the paper's text says.
- SPARC's eq. 6 is printed as a mean over each text's tokens, then over texts: per_text=True. The
  default is appendix C's: one mean over all tokens of the batch. spare and strangers are ours.
- FILIP 3.1.1 does not say of what it sends 25%: here of a sample's real tokens, one at least.
- PACL, GLoRIA and MGCA are SPARC's versions, from its text and GLoRIA's and MGCA's public code:
  trained from scratch, learned temperatures.
"""
import argparse, ast, typing
import functools
import math
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------- CLIP
def full_precision(loss):
    """Decorator: in fp32 or fp64, outside autocast; near 100, a logit in bf16 has steps of 0.5."""
    def raised(x):
        return x.float() if getattr(x, "dtype", None) in (torch.float16, torch.bfloat16) else x
    @functools.wraps(loss)
    def run(*inputs, **named):
        first = next(x for x in (*inputs, *named.values()) if torch.is_tensor(x))
        with torch.autocast(first.device.type, enabled=False):
            return loss(*map(raised, inputs), **{name: raised(x) for name, x in named.items()})
    return run


def unit(x):
    """x / |x| along the last dimension, computed in fp32 or wider; a zero vector stays zero."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (y * y.norm(dim=-1, keepdim=True).clamp(min=1e-6).reciprocal()).to(x.dtype)


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        rows = x.new_empty(world() * len(x), *x.shape[1:], dtype=dtype or x.dtype)
        dist.all_gather(list(rows.chunk(world())), x.to(rows.dtype).contiguous())  # sent in dtype
        return rows.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):                        # sums all ranks' gradients of my rows, in fp32
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        mine = grad.new_empty(len(grad) // world(), *grad.shape[1:])
        dist.reduce_scatter(mine, list(grad.chunk(world())))
        return mine, None


def gather(x, dtype=None):
    """x (b, ...) of every rank -> (W b, ...), differentiable; sent in dtype (None: as it is)."""
    return Gather.apply(x, dtype) if world() > 1 else x


def labels(rows):
    first = dist.get_rank() * len(rows) if world() > 1 else 0   # my rows' place among all ranks'
    return torch.arange(first, first + len(rows), device=rows.device)


def info_nce(v_to_t, t_to_v):
    """Logits (b,B): my pictures with all texts, my texts with all pictures -> scalar."""
    own = labels(v_to_t)
    return (F.cross_entropy(v_to_t, own) + F.cross_entropy(t_to_v, own)) / 2


@full_precision
def clip_loss(v, t, scale):
    """v (b,D), t (b,D) of the same pairs -> scalar. CLIP; SPARC 2, "global alignment"."""
    v, t = unit(v), unit(t)
    v_to_t = scale * torch.einsum("bd,cd->bc", v, gather(t))    # FILIP eq. 2                (b, B)
    t_to_v = scale * torch.einsum("cd,bd->cb", t, gather(v)) if world() > 1 else v_to_t.T  # (b, B)
    return info_nce(v_to_t, t_to_v)                             # SPARC eq. 1


# ------------------------------------------------------------------------------------------ SPARC
@full_precision
def sparc_alignment(V, T, sigma=None, softmax=False):
    """V (B,P,D), T (B,L,D) of the same pairs -> a (B,L,P), each word's weights on the patches.

    Rows sum to 1. sigma: the threshold; None is the paper's 1/P. Table 6's ablations: sigma=0 keeps
    all patches; softmax takes one over patches in place of eqs. 2-4."""
    s = torch.einsum("bld,bpd->blp", T, V)                      # not normalised          (B, L, P)
    if softmax:
        return s.softmax(-1)
    if sigma is None:
        sigma = 1 / V.shape[1]
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)                      # (B, L, 1)
    tied = high - low <= 1e-6 * high.abs().clamp(min=1)         # all patches are alike to this word
    s_hat = (s - low) / (high - low).masked_fill(tied, 1)       # SPARC eq. 2: in 0..1
    s_til = s_hat * (s_hat >= sigma)                            # SPARC eq. 3
    s_til = s_til.masked_fill(tied, 1)
    return s_til / s_til.sum(-1, keepdim=True)                  # SPARC eq. 4: the sum is 1 or more


def within_pair_loss(x, y, M, scale, per_text=False, spare=0, others=()):
    """x, y (b,L,D), M (b,L): x_l must find y_l among its own pair's positions, y_l must find x_l ->
    the mean over all real positions of all ranks; per_text: over each pair's, then over pairs.
    spare: the positions up to so many places before and behind l are no negatives of l. others:
    [z (b,L,D)], of which y_l must tell z_l from x_l too."""
    x_to_y = scale * torch.einsum("bld,bmd->blm", unit(x), unit(y))                     # (b, L, L)
    y_to_z = [scale * torch.einsum("bld,bld->bl", unit(y), unit(z))[..., None] for z in others]
    l = torch.arange(M.shape[1], device=M.device)
    own, away = l.where(M, -100), (l[:, None] - l).abs()        # -100: padding has none
    out = ~M[:, None] | ((away > 0) & (away <= spare))          # no negatives          (b, L, L)
    loss = 0
    for s, more in ((x_to_y, []), (x_to_y.transpose(1, 2), y_to_z)):       # SPARC eq. 6, both logs
        s = torch.cat([s.masked_fill(out, -torch.inf), *more], 2).flatten(0, 1)
        loss = loss + F.cross_entropy(s, own.flatten(), reduction="none").view_as(M) / 2
    if per_text:
        return (loss.sum(1) / M.sum(1)).mean()                  # and its mean, as printed
    n = M.sum()
    if world() > 1:                                             # ranks hold unequal numbers
        dist.all_reduce(n)
    return loss.sum() * world() / n                             # or as in the pseudo-code


@full_precision
def sparc_loss(v, t, V, T, M, scale, global_weight=0.5, local_weight=1.0, sigma=None, softmax=False,
               per_text=False, spare=0, strangers=0):
    """v t (b,D), V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> {"loss", "global", "local"}.

    SPARC 2. sigma, softmax: as of sparc_alignment; per_text, spare: of within_pair_loss. strangers:
    tell what a word sees from what it would see in so many other pictures, of the same process."""
    def seen(V):
        a = sparc_alignment(V, T, sigma, softmax)               # (b, L, P)
        return torch.einsum("blp,bpd->bld", a, V)               # SPARC eq. 5: what each word sees
    b = torch.arange(len(V), device=V.device)
    away = [(b ^ 4 * n).clamp(max=len(V) - 1) for n in range(1, strangers + 1)]         # 4, 8, ...
    others = [seen(V.index_select(0, at)) for at in away]       # its backward adds in a fixed order
    local_part = within_pair_loss(seen(V), T, M, scale, per_text, spare, others)
    global_part = clip_loss(v, t, scale)
    loss = global_weight * global_part + local_weight * local_part         # SPARC eq. 7
    return {"loss": loss, "global": global_part, "local": local_part}


# ------------------------------------------------------------------------------------------ FILIP
def filip_similarity(V, T, M):
    """V (B,P,D), T (C,L,D), M (C,L) -> s_image, s_text (B,C), rows are pictures in both. FILIP 3.1.
    s_image: the paper's s^I, of picture b to text c; s_text: s^T, of text c to picture b."""
    V, T = unit(V), unit(T)
    if len(V) * len(T) * V.shape[1] * T.shape[1] > DENSE:       # faster
        return LateInteraction.apply(V, T, M).unbind()          # faster
    s = torch.einsum("bpd,cld->bcpl", V, T)                     # in half precision under autocast
    to_word = s.masked_fill(~M[:, None], -torch.inf).max(3).values         # FILIP eq. 3  (B, C, P)
    to_patch = s.max(2).values                                                          # (B, C, L)
    wide = torch.promote_types(s.dtype, torch.float32)          # means are not
    s_image = to_word.to(wide).mean(2)                          # FILIP eq. 4
    s_text = (to_patch.to(wide) * M).sum(2) / M.sum(1)          # FILIP eq. 5
    return s_image, s_text


def best_tokens(x, real, others, keep):
    """x (b,N,D), real (b,N), others (n,D), this process's tokens of the other kind -> (b,k,D), mask
    (b,k): a sample's share `keep` of real tokens, 1 at least, those with the largest eq. 3."""
    with torch.no_grad():
        others = unit(others).T
        score = torch.cat([(some @ others).amax(-1) for some in unit(x).split(16)])     # (b, N)
    kept = (keep * real.sum(1, keepdim=True) + 1e-4).int().clamp(min=1)                 # (b, 1)
    best = score.masked_fill(~real, -torch.inf).topk(int(kept.max())).indices           # (b, k)
    mask = torch.arange(best.shape[1], device=x.device) < kept                          # (b, k)
    return x.take_along_dim(best[..., None], 1), mask


def gather_texts(T, M, dtype=None):
    """gather for tokens and their mask; texts are first padded to the longest of all ranks."""
    if world() > 1:
        longest = torch.tensor(T.shape[1], device=T.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        T = gather(F.pad(T, (0, 0, 0, int(longest) - T.shape[1])), dtype)
        M = gather(F.pad(M.byte(), (0, int(longest) - M.shape[1]))).bool()
    return T, M


def filip_loss(V, T, M, scale, keep=1.0, gather_dtype=None, one_sided=False):
    """V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> scalar. FILIP 3.1. keep: the share of its
    tokens that stands for each sample (0.25 in 3.1.1); one_sided: only where it meets the others,
    as in SPARC's copy. gather_dtype: tokens are sent in it (fp16 in 3.1.1); None: as they are."""
    V_sent, T_sent, M_sent = V, T, M
    if keep < 1:                                                # FILIP 3.1.1: the top 25%
        V_sent, _ = best_tokens(V, torch.ones_like(V[..., 0], dtype=torch.bool), T[M], keep)
        T_sent, M_sent = best_tokens(T, M, V.flatten(0, 1), keep)
    if not one_sided:
        V, T, M = V_sent, T_sent, M_sent
    s_image, s_text = filip_similarity(V, *gather_texts(T_sent, M_sent, gather_dtype))      # (b, B)
    if world() > 1 or one_sided:
        _, s_text = filip_similarity(gather(V_sent, gather_dtype), T, M)                    # (B, b)
    return info_nce(scale * s_image, scale * s_text.T)          # FILIP eq. 1


def clip_filip_loss(v, t, V, T, M, scale, **options):
    """SPARC's attempt at a steadier FILIP (D.3, Tables 9, 10): the sum; it names no weights.
    options: those of filip_loss. -> {"loss", "global", "local"}"""
    global_part, local_part = clip_loss(v, t, scale), filip_loss(V, T, M, scale, **options)
    return {"loss": global_part + local_part, "global": global_part, "local": local_part}


# ------------------------------------------------------------------------------------ PyramidCLIP
@full_precision
def soft_clip_loss(x, y, scale, alpha=0.2):
    """x (b,D), y (b,D) of the same pairs -> scalar. PyramidCLIP 3.4, softened targets.

    alpha: how soft; 0 gives clip_loss. As printed, a row of targets sums to 1 + alpha / (N - 1)."""
    x, y = unit(x), unit(y)
    N = world() * len(x)
    hard = F.one_hot(labels(x), N).to(x.dtype)                  # (b, N)
    target = (1 - alpha) * hard + alpha / max(1, N - 1)         # PyramidCLIP eq. 2
    loss = 0
    for rows, columns in ((x, gather(y)), (y, gather(x))):
        logits = scale * torch.einsum("id,jd->ij", rows, columns)
        log_p = logits.log_softmax(1)                           # PyramidCLIP eq. 1  (b, N)
        loss = loss - (target * log_p).sum(1).mean() / 2        # PyramidCLIP eq. 3
    return loss


SIX = ("GS", "LT", "GA", "RS", "LA", "RT")      # PyramidCLIP's terms: picture side, text side
GROUPS = {"peer": ("GS", "LT", "RA"), "cross_global": ("GA", "RS"), "cross_local": ("LA", "RT"),
          "mismatched": ("GT", "LS")}           # RA, GT and LS are off in the paper (Tables 14, 15)


def pyramid_loss(v_g, v_l, v_r, l_s, l_t, l_a, scale, alpha=0.2, lam=1/3, mu=1/3, terms=SIX):
    """PyramidCLIP 3.2-3.4: vectors (b,D) of the same pairs -> {"loss", "peer", "cross_global", ...}

    v_g global crop, v_l local crop, v_r regions; l_s summary, l_t caption, l_a objects' names.
    terms: some of GROUPS; those of a vector that is None fall away. A group is its terms' mean. The
    weights are divided by their sum; 1/3 for "mismatched" is ours. ValueError: nothing is left."""
    pictures, texts = {"G": v_g, "L": v_l, "R": v_r}, {"S": l_s, "T": l_t, "A": l_a}
    shares = {"peer": 1 - lam - mu, "cross_global": lam, "cross_local": mu, "mismatched": 1/3}
    out = {}
    for group, members in GROUPS.items():
        pairs = [(pictures[m[0]], texts[m[1]]) for m in members if m in terms]
        losses = [soft_clip_loss(x, y, scale, alpha)
                  for x, y in pairs if x is not None and y is not None]
        if losses:
            out[group] = sum(losses) / len(losses)
    weight = sum(shares[group] for group in out)
    if not weight:
        raise ValueError("pyramid_loss: no term with a weight is left")
    total = sum(shares[group] * out[group] for group in out)    # PyramidCLIP eq. 4
    return {"loss": total / weight, **out}


# ------------------------------------------------------------------------------------------- PACL
def attended_cosine(a, s, V):
    """a (b,...,P) weights, V (b,P,D) patches, s (b,...,P) = <unit text vector, V> -> (b,...).

    The cosine of a text vector with sum_p a_p V_p, whose squared length is a' V V' a."""
    gram = torch.einsum("bpd,bqd->bpq", V, V)
    length2 = (torch.einsum("b...p,bpq->b...q", a, gram) * a).sum(-1)
    return (a * s).sum(-1) / length2.clamp(min=1e-12).sqrt()


@full_precision
def pacl_similarity(V, t):
    """V (B,P,D), t (C,D) -> (B,C). PACL: patches pooled by their cosine with each of the texts."""
    def similarity(V, t):
        s = torch.einsum("bpd,cd->bcp", V, t)                   # (B, C, P)
        return attended_cosine(s.softmax(2), s, V)

    return by_blocks(similarity, unit(V), unit(t))


def pacl_loss(V, t, scale, gather_dtype=None):
    """V (b,P,D), t (b,D) of the same pairs -> scalar. SPARC D.3; PACL starts from a frozen CLIP."""
    v_to_t = pacl_similarity(V, gather(t))                      # my pictures, all texts (b, B)
    t_to_v = v_to_t.T
    if world() > 1:
        t_to_v = pacl_similarity(gather(V, gather_dtype), t).T  # my texts, all pictures (b, B)
    return info_nce(scale * v_to_t, scale * t_to_v)


# ----------------------------------------------------------------------------------------- GLoRIA
def gloria_attention(s, M):
    """s (..., L, P) products of words and patches, M (..., L) -> weights of the words (..., L, P):
    a softmax over words, then one over patches; 4 is the temperature of GLoRIA's public code."""
    return (4 * s.masked_fill(~M[..., None], -torch.inf).softmax(-2)).softmax(-1)


@full_precision
def gloria_similarity(V, T, M):
    """V (B,P,D), T (C,L,D), M (C,L) -> (B,C). GLoRIA's local similarity of pictures and texts.

    Each word attends to the patches; its cosine with what it sees enters a log-sum-exp over words,
    which favours long texts; 5 is the temperature of GLoRIA's code."""
    def similarity(V, T, M):
        s = torch.einsum("bpd,cld->bclp", V, unit(T))           # (B, C, L, P)
        w = s * (T.norm(dim=-1, keepdim=True) / T.shape[-1] ** 0.5)        # SPARC D.3: / sqrt(D)
        r = attended_cosine(gloria_attention(w, M), s, V)       # (B, C, L)
        return (5 * r).masked_fill(~M, -torch.inf).logsumexp(2)

    parts = by_length(M)
    s = [by_blocks(similarity, V, T[texts, :L], M[texts, :L]) for texts, L in parts]
    order = torch.cat([texts for texts, _ in parts]).argsort()
    return torch.cat(s, 1)[:, order]


def gloria_loss(v, t, V, T, M, scale, scale_local, gather_dtype=None):
    """v t (b,D), V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> {"loss", "global", "local"}.

    SPARC D.3. GLoRIA's code fixes both scales at 10, and adds the directions: here their mean."""
    v_to_t = gloria_similarity(V, *gather_texts(T, M, gather_dtype))       # (b, B)
    t_to_v = v_to_t.T
    if world() > 1:
        t_to_v = gloria_similarity(gather(V, gather_dtype), T, M).T        # (b, B)
    global_part = clip_loss(v, t, scale)
    local_part = info_nce(scale_local * v_to_t, scale_local * t_to_v)
    return {"loss": global_part + local_part, "global": global_part, "local": local_part}


class LocalScale(nn.Module):
    """GLoRIA's second learned scale."""
    def __init__(self, dim):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())


# ------------------------------------------------------------------------------------------- MGCA
@torch.no_grad()
@full_precision
def sinkhorn(z, eps=0.05, iters=3):
    """z (B,K) similarities of samples to prototypes -> soft codes (B,K), no gradient; rows sum to 1

    The codes use all prototypes about equally. In the log domain: exp(z / eps) can overflow."""
    z = z / eps
    for _ in range(iters):
        z = z - z.logsumexp(0, keepdim=True) - math.log(z.shape[1])        # a prototype has 1/K
        z = z - z.logsumexp(1, keepdim=True) - math.log(z.shape[0])        # a sample gives 1/B
    return z.softmax(1)


class CrossAttention(nn.Module):
    """One attention head between words and patches, and back to D."""
    def __init__(self, dim, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, width) for _ in range(3))
        self.out = nn.Linear(width, dim)

    def forward(self, query, key, mask):
        """query (b,N,D), key (b,n,D), mask (b,n), True where key is real -> (b,N,D)"""
        q, k, v = self.q(query), self.k(key), self.v(key)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None]))


class MGCA(nn.Module):
    """MGCA as SPARC runs it (D.3): instances (ITA), tokens (CTA), prototypes (CPA); own scales.

    Its public code weights words and patches by the towers' attention to [CLS]: here all count
    alike. It leaves attended patches unnormalised, and counts padding in its means; not so here."""
    def __init__(self, dim, prototypes=500, width=128):
        super().__init__()
        self.words_see = CrossAttention(dim, width)
        self.patches_see = CrossAttention(dim, width)
        self.prototypes = nn.Parameter(unit(torch.randn(prototypes, dim)))
        self.log_scales = nn.Parameter(torch.tensor([1 / 0.07, 1 / 0.1, 1 / 0.2]).log())

    @full_precision
    def forward(self, v, t, V, T, M):
        """v t (b,D), V (b,P,D), T (b,L,D), M (b,L) -> {"loss", "ita", "cta", "cpa", "scale"}"""
        ita_scale, cta_scale, cpa_scale = self.log_scales.exp()
        ita = clip_loss(v, t, ita_scale)
        every_patch = torch.ones_like(V[..., 0], dtype=torch.bool)
        words = within_pair_loss(T, self.words_see(T, V, every_patch), M, cta_scale)
        patches = within_pair_loss(V, self.patches_see(V, T, M), every_patch, cta_scale)
        cta = words + patches
        cpa = self.prototype_loss(unit(v), unit(t), cpa_scale)
        return {"loss": ita + cta + cpa, "ita": ita, "cta": cta, "cpa": cpa,
                "scale": ita_scale.detach()}

    def prototype_loss(self, v, t, scale):
        """v, t (b,D) unit vectors -> scalar: each predicts the other's code (K = prototypes)."""
        with torch.no_grad():
            self.prototypes.copy_(unit(self.prototypes))
        z_v = torch.einsum("bd,kd->bk", v, self.prototypes)     # (b, K)
        z_t = torch.einsum("bd,kd->bk", t, self.prototypes)     # (b, K)
        own = labels(v)
        code_v = sinkhorn(gather(z_v.detach()))[own]            # over all ranks' samples; my rows
        code_t = sinkhorn(gather(z_t.detach()))[own]
        swapped = code_v * (scale * z_t).log_softmax(1) + code_t * (scale * z_v).log_softmax(1)
        return -swapped.sum(1).mean() / 2


# ------------------------------------------------------------------------- the objectives by name
# Each is loss(f, head, **options) -> dict of scalars: "loss" is minimised, all are logged. f: the
# dict of features that model(batch) returns; head: what the objective learns beside the towers.
def loss_of(function, names):
    """The loss that calls function with the features of these names, in this order."""
    def loss(f, head, **options):
        out = function(*(f[name] for name in names.split()), **options)
        return out if isinstance(out, dict) else {"loss": out}
    return loss


def pyramid(f, head, **options):
    return pyramid_loss(f["v"], f.get("v_l", f["v"]), f.get("v_r"), f["l_s"], f["t"], f.get("l_a"),
                        f["scale"], **options)


def gloria(f, head, **options):
    return gloria_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"], head.log_scale.exp(),
                       **options)


def mgca(f, head):
    return head(f["v"], f["t"], f["V"], f["T"], f["M"])


class Objective(typing.NamedTuple):
    loss: typing.Callable                       # loss(f, head, **options)
    function: str                               # what `python losses.py NAME` prints
    about: str                                  # what it compares, in a line
    options: tuple = ()                         # names of the options of loss that a run can set
    head: typing.Callable = nn.Identity         # head(D) -> module; this one learns nothing
    late: bool = False                          # the best word of each patch counts, as in FILIP
    trains_v: bool = True                       # the loss uses v, so the layer h_v before it learns
    local: str = ""                             # the part that compares words, patches of one pair

    def picture(self, v, V):
        """The vector of a picture (B,D), from v (B,D) and V (B,P,D)."""
        return v if self.trains_v else V.mean(1)

    def score(self, v, V, t, T, M):
        """What ranks texts for a picture (B,C), and pictures for a text (B,C), once trained."""
        if self.late:
            return filip_similarity(V, T, M)
        s = unit(v) @ unit(t).T if self.trains_v else pacl_similarity(V, t)
        return s, s


DTYPES = {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FILIP_OPTIONS = ("keep", "one_sided", "gather_dtype")
# Your own objective: a loss above and a line here; a new option needs a line in train.py too
OBJECTIVES = {
    "clip": Objective(loss_of(clip_loss, "v t scale"), "clip_loss",
                      "one vector a picture with one a text, in all pairs"),
    "filip": Objective(loss_of(filip_loss, "V T M scale"), "filip_loss",
                       "each patch's best word, each word's best patch", FILIP_OPTIONS, late=True,
                       trains_v=False),
    "clip+filip": Objective(loss_of(clip_filip_loss, "v t V T M scale"), "clip_filip_loss",
                            "the sum of both", FILIP_OPTIONS),
    "pyramid": Objective(pyramid, "pyramid_loss", "crops, regions; summary, caption, object names",
                         ("alpha", "lam", "mu", "terms")),
    "pacl": Objective(loss_of(pacl_loss, "V t scale"), "pacl_loss",
                      "patches pooled by their cosine with each text", ("gather_dtype",),
                      trains_v=False),
    "gloria": Objective(gloria, "gloria_loss", "words with the patches they attend to; and clip",
                        ("gather_dtype",), LocalScale),
    "mgca": Objective(mgca, "MGCA", "words and patches within a pair, prototypes; and clip",
                      head=MGCA, local="cta"),
    "sparc": Objective(loss_of(sparc_loss, "v t V T M scale"), "sparc_loss",
                       "words with their sparse patches in a pair; and clip",
                       ("global_weight", "local_weight", "sigma", "softmax", "per_text", "spare",
                        "strangers"), local="local"),
}


# -------------------------------------------------------------------------------- the same, faster
DENSE = 1 << 20                         # filip_similarity goes by blocks above so many products


def by_length(M):
    """M (C,L) -> [(indices of texts, the longest's length)]: texts in order of length, an eighth of
    them at a time (32 to 256), so that little padding is left."""
    length = (M * torch.arange(1, M.shape[1] + 1, device=M.device)).amax(1)
    parts = length.argsort().split(min(256, max(32, len(M) // 8)))
    return [(texts, int(length[texts[-1]])) for texts in parts]


def by_blocks(similarity, V, *text, elements=1 << 24):
    """similarity(V, *text) (B,C) by blocks of pictures, about `elements` products of a token and a
    patch each. Backward computes them again, so one at a time is in memory."""
    tokens = math.prod(text[0].shape[:-1])
    n = max(1, elements // (tokens * V.shape[1]))
    if n >= len(V):
        return similarity(V, *text)
    blocks = [checkpoint(similarity, some, *text, use_reentrant=False) for some in V.split(n)]
    return torch.cat(blocks)


def first_max(s, dim):
    """torch.max(s, dim), the first position of each maximum; three times as fast on CPUs."""
    n, top, behind = s.shape[dim], s.amax(dim, keepdim=True), [1] * (s.dim() - dim - 1)
    small = torch.uint8 if n < 256 else torch.int16
    from_end = torch.arange(n, 0, -1, dtype=small, device=s.device).view(-1, *behind)
    first = n - ((s == top).to(small) * from_end).amax(dim)
    return top.squeeze(dim), first.clamp_(max=n - 1)            # NaN equals nothing


def late_blocks(V, T, M, elements=1 << 20):
    """-> (indices of texts, their places in order of length, L, words (L c, D), slices of V's rows)
    A block's products are (b, P, L, c). Padding becomes a copy of a first token: no new maximum."""
    end = 0
    for texts, L in by_length(M):
        words = torch.where(M[texts, :L, None], T[texts, :L], T[texts, :1]).transpose(0, 1)
        n = max(1, elements // (words[..., 0].numel() * V.shape[1]))
        end += len(texts)
        pictures = [slice(i, i + n) for i in range(0, len(V), n)]
        yield texts, slice(end - len(texts), end), L, words.flatten(0, 1), pictures


class LateInteraction(torch.autograd.Function):
    """Unit vectors -> s_image, s_text as (2, B, C). Forward keeps where each maximum was found; its
    gradient belongs to that entry alone, so backward multiplies by a block's sparse matrix."""
    @staticmethod
    def forward(ctx, V, T, M):
        if torch.is_autocast_enabled(V.device.type) and V.dtype != torch.float64:
            V, T = (x.to(torch.get_autocast_dtype(V.device.type)) for x in (V, T))
        wide = torch.promote_types(V.dtype, torch.float32)
        weight = M.T.to(wide) / M.sum(1)                        # (L, C), of a word in eq. 5's mean
        small = torch.uint8 if max(V.shape[1], len(weight)) < 256 else torch.int16
        own = (M.T * torch.arange(len(weight), device=M.device)[:, None]).to(small)  # a copy's is 0
        best_word = own.new_empty(len(V), V.shape[1], len(T))
        best_patch, out = own.new_empty(len(V), *weight.shape), weight.new_empty(2, len(V), len(T))
        for texts, at, L, words, pictures in late_blocks(V, T, M):
            for b in pictures:
                s = (V[b].flatten(0, 1) @ words.T).view(-1, V.shape[1], L, len(texts))
                to_word, l = first_max(s, 2)                    # eq. 3, all words    (b, P, c)
                to_patch, best_patch[b, :L, at] = first_max(s, 1)       # all patches (b, L, c)
                best_word[b, :, at] = own[:L, texts].expand(len(l), -1, -1).gather(1, l.long())
                out[0, b, texts] = to_word.to(wide).mean(1)             # eq. 4
                out[1, b, texts] = (to_patch * weight[:L, texts]).sum(1)        # eq. 5
        ctx.save_for_backward(V, T, M, weight, best_word, best_patch)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        V, T, M, weight, best_word, best_patch = ctx.saved_tensors
        dV, dT = torch.zeros_like(V, dtype=grad.dtype), torch.zeros_like(T)
        for texts, at, L, words, pictures in late_blocks(V, T, M):
            d_words = torch.zeros_like(words, dtype=grad.dtype)
            for b in pictures:
                l, p = best_word[b, :, None, at].long(), best_patch[b, None, :L, at].long()
                of_image = (grad[0, b, texts] / V.shape[1]).to(V.dtype)[:, None, None]
                of_text = (grad[1, b, None, texts] * weight[:L, texts]).to(V.dtype)[:, None]
                G = V.new_zeros(len(l), V.shape[1], L, len(texts))      # d loss / d s
                G = G.scatter_(2, l, of_image.expand_as(l)).scatter_add_(1, p, of_text)
                G = G.view(-1, len(words))                      # (b P, L c)
                dV[b] += (G @ words).view_as(V[b])
                d_words += G.T @ V[b].flatten(0, 1)
            dT[texts, :L] = d_words.view(L, len(texts), -1).transpose(0, 1).to(T.dtype)
        return dV.to(V.dtype), dT, None


# ----------------------------------------------------------------- one objective as a module alone
IMPORT = (ast.Import, ast.ImportFrom)


def defined(statement):
    """Names that a top-level statement of this file defines."""
    if isinstance(statement, IMPORT):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets]
    return [getattr(statement, "name", None)]


def cut_out(name, plain=False):
    """The source of `name`, a function, class or objective of this file, and of all that it needs.

    plain: without fast paths, which are the lines marked "# faster". Raises KeyError if unknown."""
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().splitlines()
    if plain:
        lines = [line for line in lines if not line.endswith("# faster")]
    statements = ast.parse("\n".join(lines)).body
    home = {each: statement for statement in statements for each in defined(statement)}
    if name in OBJECTIVES:
        name = OBJECTIVES[name].function
    needed, queue = set(), [home[name]]
    while queue:
        statement = queue.pop()
        if statement not in needed:
            needed.add(statement)
            used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
            queue += [home[each] for each in used if each in home]
    _, letters, rest = __doc__.partition("Letters, ")
    out = [f'"""{letters}{rest[:rest.index("Many processes")].rstrip()}"""']
    for statement in statements:
        if statement in needed:
            decorators = getattr(statement, "decorator_list", [])
            first = min(node.lineno for node in [statement, *decorators])
            if not isinstance(statement, IMPORT):
                out.append("")
            out += lines[first - 1:statement.end_lineno]
    return "\n".join(out) + "\n"


def main():
    ap = argparse.ArgumentParser(description="List the objectives, or print one as a module.")
    ap.add_argument("name", nargs="?", help="an objective, or any function or class of this file")
    ap.add_argument("--plain", action="store_true", help="leave fast paths out")
    args = ap.parse_args()
    if args.name:
        try:
            print(cut_out(args.name, args.plain), end="")
        except KeyError:
            ap.error(f"there is no {args.name!r} here: `python losses.py` lists what there is")
        return
    print(f"{'NAME':11}{'lines':>6}{'--plain':>8}   what it compares (losses.py NAME prints it)")
    for name, objective in OBJECTIVES.items():
        whole, plain = (len(cut_out(name, p).splitlines()) for p in (False, True))
        print(f"{name:11}{whole:6}{plain:8}   {objective.about}")


if __name__ == "__main__":
    main()
