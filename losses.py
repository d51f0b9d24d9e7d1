"""Losses: every objective as a pure function with explicit shapes, and the gather that lets them see all processes.

    grep -n "SPARC eq" *.py               # from every numbered equation to its line
    pytest tests/test_losses.py           # each against a loop-by-loop transcription of the paper in float64

Covers: CLIP, FILIP 3.1, PyramidCLIP 3.4, SPARC 2 and appendix C, and SPARC's rivals in its like-for-like comparison
(4, D.3 and D.4): PACL, GLoRIA, MGCA.

Letters, here and in every einsum:  b images (B), c texts (C), p patches (P), l m text positions (L), d dimensions (D).
    V (B,P,D) patches    T (C,L,D) tokens    M (C,L) bool, True up to and including the first EOT    v (B,D)    t (C,D)
Nothing has to be normalised by the caller. scale = exp(log_scale) = 1 / temperature.

With several processes each holds its own rows and meets everybody's columns; the mean of their losses is the loss of the whole batch,
and averaging their gradients, as DistributedDataParallel does, gives exactly the gradient that one process would have.

Differs from the papers: FILIP's max skips padding by -inf (some copies let zero vectors compete); a word whose patches all tie gets
weights 1/P in SPARC's eq. 4, as its text says, where the formula is 0/0; eq. 6 averages over all tokens of the batch, as its
pseudo-code does, where the formula sums per text; the scales are learned, and the caller keeps them below 100. PACL, GLoRIA and MGCA
are SPARC's versions of them: trained from scratch, learned temperatures, tokens used as they are; each docstring says what it changes.
"""
import functools
import math
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


# ------------------------------------------------------------------------------------------------------------------ small pieces
def full_precision(loss):
    """Decorator: run outside autocast, half-precision tensors raised to float32. float64 stays float64.
    Near 100, where logits live, bf16 can only tell apart steps of 0.5."""
    @functools.wraps(loss)
    def run(*args, **kw):
        raise_ = lambda x: x.float() if torch.is_tensor(x) and x.dtype in (torch.float16, torch.bfloat16) else x
        device = next(x.device.type for x in args if torch.is_tensor(x))
        with torch.autocast(device, enabled=False):
            return loss(*map(raise_, args), **{k: raise_(x) for k, x in kw.items()})
    return run


class _Unit(torch.autograd.Function):
    """F.normalize(x, dim=-1, eps=1e-6) in less than half its time: PyTorch differentiates the quotient, this the result."""

    @staticmethod
    def forward(ctx, x):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-6).reciprocal_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, g):                                          # dx = (g - y <y, g>) / |x|
        y, inverse = ctx.saved_tensors
        return torch.addcmul(g, y, torch.linalg.vecdot(y, g)[..., None], value=-1).mul_(inverse)


def unit(x):
    """x / |x| along the last dimension; a zero vector stays zero."""
    return _Unit.apply(x)


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


def info_nce(i2t, t2i):
    """Logits of my pictures with all texts (b,B) and of my texts with all pictures (b,B) -> scalar, the mean of both directions."""
    y = labels(i2t)
    return (F.cross_entropy(i2t, y) + F.cross_entropy(t2i, y)) / 2


def within_pair_loss(x, y, M, scale):
    """x, y (b,L,D), M (b,L): each x_l must find y_l among the real positions of its own pair, and the other way round -> scalar, the
    mean over all real positions of all ranks."""
    x_to_y = scale * torch.einsum("bld,bmd->blm", unit(x), unit(y))                            # (b, L, L)
    own = torch.arange(M.shape[1], device=M.device).where(M, -100).flatten()                   # (b L,), -100: a padded row, left out
    total = 0.
    for s in (x_to_y, x_to_y.transpose(1, 2)):
        s = s.masked_fill(~M[:, None], float("-inf")).flatten(0, 1)                            # (b L, L), padding is no negative
        total = total + F.cross_entropy(s, own, reduction="sum", ignore_index=-100) / 2
    n = M.sum()
    if world() > 1:                                                # ranks hold unequal numbers: the mean of their means would be another
        dist.all_reduce(n)
        total = total * world()
    return total / n.clamp(min=1)


def attended_cosine(a, s, V):
    """Cosine between a text vector and the sum of patches a_p V_p, which is never made: |sum|^2 = a' (V V') a.
    a (b,...,P) weights, s (b,...,P) products of the text's unit vector and each patch, V (b,P,D) -> (b,...)."""
    gram = torch.einsum("bpd,bqd->bpq", V, V)
    length2 = (torch.einsum("b...p,bpq->b...q", a, gram) * a).sum(-1)
    return (a * s).sum(-1) / length2.clamp(min=1e-12).sqrt()


def by_blocks(similarity, V, *text, elements=1 << 24):
    """similarity(V, *text) (b,C), a block of pictures at a time; backward computes each block again, so that only one is held in memory.
    elements: the largest tensor, pictures x tokens x patches of one block."""
    tokens = math.prod(text[0].shape[:-1])
    n = max(1, elements // (tokens * V.shape[1]))
    if n >= len(V):
        return similarity(V, *text)
    return torch.cat([checkpoint(similarity, block, *text, use_reentrant=False) for block in V.split(n)])


def by_length(M):
    """Texts in order of their length, an eighth of them at a time (32 at least, 256 at most): [(indices, the longest's length)].
    Each part is cut to that, so padding, which is half of all positions where captions vary, costs next to nothing."""
    length = (M * torch.arange(1, M.shape[1] + 1, device=M.device)).amax(1)                    # up to the last real position
    return [(i, int(length[i[-1]])) for i in length.argsort().split(min(256, max(32, -(-len(M) // 8))))]


# -------------------------------------------------------------------------------------------------------------------------- CLIP
@full_precision
def clip_loss(v, t, scale):
    """v (b,D) pictures, t (b,D) their texts -> scalar. CLIP's InfoNCE, the mean of both directions; SPARC 2, "global alignment"."""
    v, t = unit(v), unit(t)
    v_to_t = scale * torch.einsum("bd,cd->bc", v, gather(t))                                   # FILIP eq. 2: my pictures, all texts (b, B)
    t_to_v = scale * torch.einsum("bd,cd->bc", t, gather(v)) if world() > 1 else v_to_t.T      # my texts, all pictures (b, B)
    return info_nce(v_to_t, t_to_v)                                                            # SPARC eq. 1


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
    text c to picture b. Two different matrices; rows are pictures in both. FILIP 3.1, cross-modal late interaction."""
    return late_interaction(_token_units(V), _token_units(T), M)


def late_interaction(V, T, M):
    """filip_similarity of unit vectors: in plain sight where it is small, else the same by blocks. Position 0 of a text is always real."""
    if V.shape[0] * T.shape[0] * V.shape[1] * T.shape[1] <= 1 << 20:
        return _late_interaction(V, T, M)
    return _BlockedLateInteraction.apply(V, T, M).unbind()


def _late_interaction(V, T, M):
    with torch.autocast(V.device.type, enabled=False):
        s = torch.einsum("bpd,cld->bcpl", V, T)                                                # (B, C, P, L)
        to_word = s.masked_fill(~M[None, :, None], float("-inf")).max(3).values                # FILIP eq. 3: padding takes no part
        to_patch = s.max(2).values                                                             # (B, C, L)
        acc = torch.promote_types(s.dtype, torch.float32)                                      # means never in half precision
        s_image = to_word.to(acc).mean(2)                                                      # FILIP eq. 4
        s_text = (to_patch.to(acc) * M).sum(2) / M.sum(1)                                      # FILIP eq. 5
    return s_image, s_text


def _first_max(s, dim):
    """Maximum along dim, and the first position that has it, as torch.max; on CPUs three times as fast."""
    n, top = s.shape[dim], s.amax(dim, keepdim=True)
    dtype = torch.uint8 if n < 256 else torch.int16
    from_end = torch.arange(n, 0, -1, dtype=dtype, device=s.device).view([n if k == dim else 1 for k in range(s.dim())])
    first = n - ((s == top).to(dtype) * from_end).amax(dim)
    return top.squeeze(dim), first.clamp_(max=n - 1)               # NaN equals nothing


class _BlockedLateInteraction(torch.autograd.Function):
    """_late_interaction without its (B,C,P,L) tensor. Forward keeps where each maximum was found; backward knows that its gradient
    belongs to that one entry, and multiplies by the sparse matrix of a block."""
    elements = 1 << 20                                             # of a block (b, P, L, c)

    @staticmethod
    def blocks(V, T, M):
        """-> [(indices c of texts, their places in order of length, the longest's length L, their words (L c, d), slices of pictures)].
        Texts stand innermost, so that both maxima run along strided dimensions. Padding becomes a copy of BOS, which changes no maximum."""
        end = 0
        for c, L in by_length(M):
            end += len(c)
            words = torch.where(M[c, :L, None], T[c, :L], T[c, :1]).transpose(0, 1).flatten(0, 1)
            b = max(1, _BlockedLateInteraction.elements // (len(words) * V.shape[1]))
            yield c, slice(end - len(c), end), L, words, [slice(i, i + b) for i in range(0, len(V), b)]

    @staticmethod
    def forward(ctx, V, T, M):
        B, P, C = len(V), V.shape[1], len(T)
        weight = M.T.to(torch.promote_types(V.dtype, torch.float32)) / M.sum(1)                # (L, C), of each word in eq. 5's mean
        dtype = torch.uint8 if max(P, M.shape[1]) < 256 else torch.int16
        own = (M.T * torch.arange(M.shape[1], device=M.device)[:, None]).to(dtype)             # (L, C), of a copy of BOS: BOS's position
        best_word, best_patch = (torch.empty(B, n, C, dtype=dtype, device=V.device) for n in (P, len(own)))
        s_image, s_text = out = weight.new_empty(2, B, C)
        with torch.autocast(V.device.type, enabled=False):
            for c, at, L, words, pictures in _BlockedLateInteraction.blocks(V, T, M):
                for b in pictures:
                    s = (V[b].flatten(0, 1) @ words.T).view(-1, P, L, len(c))                  # (b, P, L, c)
                    (to_word, l), (to_patch, p) = _first_max(s, 2), _first_max(s, 1)           # (b, P, c), (b, L, c)
                    s_image[b, c] = to_word.to(weight.dtype).mean(1)
                    s_text[b, c] = (to_patch * weight[:L, c]).sum(1)
                    best_word[b, :, at] = own[:L, c].expand(len(l), -1, -1).gather(1, l.long())           # rounding may prefer a copy
                    best_patch[b, :L, at] = p
        ctx.save_for_backward(V, T, M, weight, best_word, best_patch)
        return out                                                 # (2, B, C)

    @staticmethod
    def backward(ctx, g):
        (V, T, M, weight, best_word, best_patch), (g_image, g_text) = ctx.saved_tensors, g
        P, D = V.shape[1:]
        dV, dT = torch.zeros_like(V, dtype=g.dtype), torch.zeros_like(T)
        for c, at, L, words, pictures in _BlockedLateInteraction.blocks(V, T, M):
            d_words = torch.zeros_like(words, dtype=g.dtype)
            for b in pictures:
                l, p = best_word[b, :, None, at].long(), best_patch[b, None, :L, at].long()    # (b, P, 1, c), (b, 1, L, c)
                G = V.new_zeros(len(l), P, L, len(c))                                          # d loss / d s, two entries a maximum
                G.scatter_(2, l, (g_image[b, c] / P).to(G.dtype)[:, None, None].expand_as(l))
                G.scatter_add_(1, p, (g_text[b, None, c] * weight[:L, c]).to(G.dtype)[:, None])
                G = G.view(-1, len(words))                                                     # (b P, L c)
                dV[b] += (G @ words).view(-1, P, D)
                d_words += G.T @ V[b].flatten(0, 1)
            dT[c, :L] = d_words.view(L, -1, D).transpose(0, 1).to(T.dtype)
        return dV.to(V.dtype), dT, None


@torch.no_grad()
def _select(V, T, M, keep):
    """Positions of the tokens worth sending: those with the largest eq. 3 over all texts (pictures) of this process.
    -> of patches (b, kI), of text positions (b, kT); at least one each."""
    lowest = float("-inf")                                                                     # which padding keeps
    of_patches, of_words = V.new_full(V.shape[:2], lowest), V.new_full(M.shape, lowest)        # (b, P), (b, L): the best so far
    for c, _, L, words, pictures in _BlockedLateInteraction.blocks(V, T, M):
        for b in pictures:
            s = (V[b].flatten(0, 1) @ words.T).view(-1, V.shape[1], L, len(c))                 # (b, P, L, c)
            of_patches[b] = of_patches[b].maximum(s.amax((2, 3)))
            of_words[c, :L] = of_words[c, :L].maximum(s.amax((0, 1)).T)
    of_words.masked_fill_(~M, lowest)
    k_image, k_text = (max(1, int(keep * n + 1e-9)) for n in (V.shape[1], T.shape[1]))
    return of_patches.topk(k_image).indices, of_words.topk(k_text).indices


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
        s_image, s_text = late_interaction(V, T, M)
    else:
        s_image, _ = late_interaction(V, *gather_texts(T_sent, M_sent, gather_dtype))
        _, s_text = late_interaction(gather(V_sent, gather_dtype), T, M)
    with torch.autocast(V.device.type, enabled=False):             # over texts: rows of s_image; over pictures: columns of s_text
        return info_nce(scale * s_image, scale * s_text.T)                                     # FILIP eq. 1


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
    s_til = s_hat * (s_hat >= sigma)                                                           # SPARC eq. 3
    s_til = s_til.masked_fill(tied, 1)
    return s_til / s_til.sum(-1, keepdim=True)                                                 # SPARC eq. 4; the sum is at least 1


@full_precision
def sparc_loss(v, t, V, T, M, scale, global_weight=0.5, local_weight=1.0, sigma=None, softmax=False, drop_special=False):
    """v (b,D), t (b,D), V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> {"loss", "global", "local"}, scalars. SPARC 2.

    drop_special: leave BOS and EOT out of the local loss (both count in the paper, as far as it says).
    """
    a = sparc_alignment(V, T, sigma, softmax)                                                  # (b, L, P)
    c = torch.einsum("blp,bpd->bld", a, V)                                                     # SPARC eq. 5: one picture vector a word
    if drop_special:
        M = M & M.roll(-1, 1)                                                                  # all but EOT ...
        M[:, -1] = M[:, 0] = False                                                             # ... and BOS
    local = within_pair_loss(c, T, M, scale)                                                   # SPARC eq. 6: words of the same text only
    glob = clip_loss(v, t, scale)
    return {"loss": global_weight * glob + local_weight * local, "global": glob, "local": local}   # SPARC eq. 7


# ------------------------------------------------------------------------------------------------------------------- PyramidCLIP
@full_precision
def soft_clip_loss(x, y, scale, alpha=0.2, normalised=False):
    """x (b,D), y (b,D) of the same pairs -> scalar. PyramidCLIP 3.4, InfoNCE with softened targets.

    alpha: how soft; 0 gives clip_loss. The paper's target adds alpha / (N - 1) to the positive as well, so it sums to 1 + alpha / (N - 1);
    normalised=True leaves the positive at 1 - alpha. The (N,N) target is never built: its rows are a positive and a constant.
    """
    x, y, own, loss = unit(x), unit(y), labels(x)[:, None], 0.
    for a, b in ((x, gather(y)), (y, gather(x))):
        logp = (scale * torch.einsum("id,jd->ij", a, b)).log_softmax(1)                        # PyramidCLIP eq. 1 (b, N)
        N, positive = logp.shape[1], logp.gather(1, own)[:, 0]
        rest = logp.sum(1) - positive if normalised else logp.sum(1)
        soft = alpha if N > 1 else 0.                                                          # one pair has no negative to give a share to
        target_dot_logp = (1 - soft) * positive + soft / max(1, N - 1) * rest                  # PyramidCLIP eq. 2
        loss = loss - target_dot_logp.mean() / 2                                               # PyramidCLIP eq. 3
    return loss


SIX = ("GS", "LT", "GA", "RS", "LA", "RT")                         # PyramidCLIP's terms: picture side, text side


def pyramid_loss(v_g, v_l, v_r, l_s, l_t, l_a, scale, alpha=0.2, lam=1/3, mu=1/3, terms=SIX, normalised=False):
    """PyramidCLIP 3.2-3.4. Pictures (b,D): v_g global crop, v_l local crop, v_r regions. Texts (b,D): l_s summary, l_t caption, l_a
    objects with attributes -> {"loss", "peer", "cross_global", "cross_local", ...}, scalars.

    terms: some of GS LT GA RS LA RT and, off in the paper, RA (peer), GT and LS ("mismatched", weighted 1/3 as the others): Tables 5, 14, 15.
    A group is the mean of its terms; one without terms falls away. The weights of those that are left are divided by their sum.
    A vector may be None: its terms fall away. Raises ValueError if no term with a weight is left.
    """
    pictures, texts = {"G": v_g, "L": v_l, "R": v_r}, {"S": l_s, "T": l_t, "A": l_a}
    groups = {"peer": (1 - lam - mu, "GS LT RA"), "cross_global": (lam, "GA RS"), "cross_local": (mu, "LA RT"), "mismatched": (1/3, "GT LS")}
    out, weights = {}, {}
    for name, (weight, members) in groups.items():
        pairs = [(pictures[m[0]], texts[m[1]]) for m in members.split() if m in terms]
        losses = [soft_clip_loss(x, y, scale, alpha, normalised) for x, y in pairs if x is not None and y is not None]
        if losses:
            out[name], weights[name] = sum(losses) / len(losses), weight
    if not any(weights.values()):
        raise ValueError("pyramid_loss: no term with a weight is left")
    loss = sum(weights[k] * out[k] for k in out) / sum(weights.values())                       # PyramidCLIP eq. 4
    return {"loss": loss, **out}


# -------------------------------------------------------------------------------------------------------------------------- PACL
@full_precision
def pacl_similarity(V, t, pool_temperature=1.0):
    """V (B,P,D) patches, t (C,D) texts -> (B,C). PACL: patches pooled by their cosine with the text, so each text sees its own picture.

    Pooling each picture with its own caption only, as some copies do, would leave nothing for the other texts to be compared with.
    """
    def block(V, t):
        s = torch.einsum("bpd,cd->bcp", V, t)                                                  # (B, C, P)
        return attended_cosine((s / pool_temperature).softmax(-1), s, V)
    return by_blocks(block, unit(V), unit(t))


def pacl_loss(V, t, scale, gather_dtype=None, **options):
    """V (b,P,D) patches, t (b,D) texts of the same pairs -> scalar. SPARC D.3: PACL from scratch with a learned temperature.
    options: those of pacl_similarity."""
    i2t = pacl_similarity(V, gather(t), **options)                                             # my pictures, all texts (b, B)
    t2i = pacl_similarity(gather(V, gather_dtype), t, **options).T if world() > 1 else i2t.T   # my texts, all pictures (b, B)
    with torch.autocast(V.device.type, enabled=False):
        return info_nce(scale * i2t, scale * t2i)


# ------------------------------------------------------------------------------------------------------------------------ GLoRIA
@full_precision
def gloria_similarity(V, T, M, words_sharpness=4.0, text_sharpness=5.0, single_softmax=False, mean_words=False):
    """V (B,P,D) patches, T (C,L,D) tokens, M (C,L) mask -> (B,C). GLoRIA's local similarity: each word attends to the patches, and
    the words' cosines with what they see are put together by log-sum-exp, which favours long texts (mean_words=True takes that out).

    As its public code: the attention is a softmax over words, then over patches (single_softmax=True: over patches alone, as its paper).
    SPARC divides the products by sqrt(D).
    """
    def block(V, T, M):
        s = torch.einsum("bpd,cld->bclp", V, unit(T))                                          # (B, C, L, P)
        w = s * (T.norm(dim=-1, keepdim=True) / T.shape[-1] ** 0.5)                            # <T, V> / sqrt(D), not normalised
        w = w if single_softmax else w.masked_fill(~M[:, :, None], float("-inf")).softmax(2)
        r = attended_cosine((words_sharpness * w).softmax(3), s, V)                            # (B, C, L)
        z = (text_sharpness * r).masked_fill(~M, float("-inf")).logsumexp(2)
        return z - M.sum(1).to(z).log() if mean_words else z
    parts = by_length(M)
    s = torch.cat([by_blocks(block, V, T[c, :L], M[c, :L]) for c, L in parts], 1)
    return s[:, torch.cat([c for c, _ in parts]).argsort()]


def gloria_loss(v, t, V, T, M, scale, scale_local, gather_dtype=None, **options):
    """v (b,D), t (b,D), V (b,P,D), T (b,L,D), M (b,L) of the same pairs -> {"loss", "global", "local"}, scalars. SPARC D.3.

    scale, scale_local: learned; GLoRIA fixes both at 10. Each level is the mean of its directions, where GLoRIA takes their sum.
    options: those of gloria_similarity.
    """
    i2t = gloria_similarity(V, *gather_texts(T, M, gather_dtype), **options)                   # my pictures, all texts (b, B)
    t2i = gloria_similarity(gather(V, gather_dtype), T, M, **options).T if world() > 1 else i2t.T
    glob = clip_loss(v, t, scale)
    with torch.autocast(V.device.type, enabled=False):
        local = info_nce(scale_local * i2t, scale_local * t2i)
    return {"loss": glob + local, "global": glob, "local": local}


# -------------------------------------------------------------------------------------------------------------------------- MGCA
@torch.no_grad()
@full_precision
def sinkhorn(z, eps=0.05, iters=3):
    """z (B,K) similarities of samples to prototypes -> soft codes (B,K) that use all prototypes about equally; rows sum to 1.
    In the log domain, where exp(z / eps) can't overflow. No gradient."""
    z = z / eps
    for _ in range(iters):
        z = z - z.logsumexp(0, keepdim=True) - math.log(z.shape[1])                            # each prototype gets a share 1/K of all
        z = z - z.logsumexp(1, keepdim=True) - math.log(z.shape[0])                            # each sample gives a share 1/B
    return z.softmax(1)


class CrossAttention(nn.Module):
    """One attention head between words and patches, and back to D. query (b,N,D), key (b,K,D), mask (b,K) -> (b,N,D)."""

    def __init__(self, dim, width):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, query, key, mask=None):
        s = torch.einsum("bnd,bkd->bnk", self.q(query), self.k(key)) / self.q.out_features ** 0.5
        s = s if mask is None else s.masked_fill(~mask[:, None], float("-inf"))
        return self.out(torch.einsum("bnk,bkd->bnd", s.softmax(-1), self.v(key)))


class MGCA(nn.Module):
    """MGCA as SPARC runs it (D.3): instances (ITA), tokens (CTA) and prototypes (CPA), with parameters and scales of its own.

    dim: D. prototypes: K. width: of the attention. freeze_steps: calls in training before the prototypes learn.
    forward(v (b,D), t (b,D), V (b,P,D), T (b,L,D), M (b,L)) -> {"loss", "ita", "cta", "cpa", "scale"}, scalars.
    The original weights words and patches by the towers' attention to [CLS] and leaves its patch branch un-normalised and padding in
    its denominators; here, as in SPARC, all count alike, everything is normalised, and padding takes no part.
    """

    def __init__(self, dim, prototypes=500, width=128, freeze_steps=0):
        super().__init__()
        self.words_see, self.patches_see = CrossAttention(dim, width), CrossAttention(dim, width)
        self.prototypes = nn.Parameter(unit(torch.randn(prototypes, dim)))
        self.log_scales = nn.Parameter(torch.tensor([1 / 0.07, 1 / 0.1, 1 / 0.2]).log())       # of ITA, CTA, CPA
        self.freeze_steps = freeze_steps
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @full_precision
    def forward(self, v, t, V, T, M):
        learning = self.training and torch.is_grad_enabled()
        g_ita, g_cta, g_cpa = self.log_scales.exp()
        ita = clip_loss(v, t, g_ita)
        word = within_pair_loss(T, self.words_see(T, V), M, g_cta)
        patch = within_pair_loss(V, self.patches_see(V, T, M), torch.ones_like(V[..., 0], dtype=torch.bool), g_cta)
        with torch.no_grad():
            self.prototypes.copy_(unit(self.prototypes))
            self.calls += learning
        C = self.prototypes.detach() if learning and self.calls <= self.freeze_steps else self.prototypes
        z_v, z_t = torch.einsum("bd,kd->bk", unit(v), C), torch.einsum("bd,kd->bk", unit(t), C)
        own = labels(v)
        q_v, q_t = (sinkhorn(gather(z.detach()))[own] for z in (z_v, z_t))                     # over all ranks' samples; my rows
        cpa = -((q_v * (g_cpa * z_t).log_softmax(1)).sum(1) + (q_t * (g_cpa * z_v).log_softmax(1)).sum(1)).mean() / 2
        return {"loss": ita + word + patch + cpa, "ita": ita, "cta": word + patch, "cpa": cpa, "scale": g_ita.detach()}


# ----------------------------------------------------------------------------------------------------------- by name, for train.py
class LocalScale(nn.Module):
    """GLoRIA's second learned scale."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())


def make_head(loss, dim):
    """What an objective learns beside the towers, an nn.Module; empty for most."""
    return MGCA(dim) if loss == "mgca" else LocalScale() if loss == "gloria" else nn.Module()


def clip_filip(f, a):
    """CLIP + FILIP, with equal weights: SPARC's attempt at steadying FILIP (D.3, Tables 9 and 10)."""
    glob, local = clip_loss(f["v"], f["t"], f["scale"]), filip_loss(f["V"], f["T"], f["M"], f["scale"], a.keep, DTYPES[a.gather_dtype])
    return {"loss": glob + local, "global": glob, "local": local}


# f: what model(batch) returns; a: the options of train.py; h: make_head's. Each returns a dict of scalars; "loss" is minimised, all are logged.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OBJECTIVES = {
    "clip": lambda f, a, h: {"loss": clip_loss(f["v"], f["t"], f["scale"])},
    "filip": lambda f, a, h: {"loss": filip_loss(f["V"], f["T"], f["M"], f["scale"], a.keep, DTYPES[a.gather_dtype])},
    "clip+filip": lambda f, a, h: clip_filip(f, a),
    "pyramid": lambda f, a, h: pyramid_loss(f["v"], f.get("v_l", f["v"]), f.get("v_r"), f["l_s"], f["t"], f.get("l_a"), f["scale"],
                                            0. if a.hard_targets else a.alpha, a.lam, a.mu, a.terms),
    "pacl": lambda f, a, h: {"loss": pacl_loss(f["V"], f["t"], f["scale"], DTYPES[a.gather_dtype])},
    "gloria": lambda f, a, h: gloria_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"], h.log_scale.exp(), DTYPES[a.gather_dtype]),
    "mgca": lambda f, a, h: h(f["v"], f["t"], f["V"], f["T"], f["M"]),
    "sparc": lambda f, a, h: sparc_loss(f["v"], f["t"], f["V"], f["T"], f["M"], f["scale"], a.global_weight, a.local_weight,
                                        None if a.sigma == "1/P" else a.sigma, a.softmax, a.drop_special),
}
WITHIN_PAIR = {"sparc": "local", "mgca": "cta"}                    # losses that compare words and patches of one pair: they may not look (README)
