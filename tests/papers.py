"""The papers' losses in loops: the equations as printed, one vector at a time, in float64

Read a function beside its paper and losses.py: test_losses.py holds the two against each other.
Nothing of losses.py is used here. PACL, GLoRIA and MGCA are as their public code computes them,
with SPARC's changes. exp is taken before log, as printed: float64 reaches e^709.

Letters as in losses.py: v t one vector a picture and a text, V patches, T tokens, M the mask of
the texts, g the scale 1 / temperature. Picture i and text i belong together.
"""
import math

import torch


# ------------------------------------------------------------------------------------ shared words
def cosine(x, y):
    return (x / x.norm()) @ (y / y.norm())


def mean(numbers):
    return sum(numbers) / len(numbers)


def softmax(scores):
    total = sum(torch.exp(score) for score in scores)
    return [torch.exp(score) / total for score in scores]


def info_nce(scores, own):
    """-log of the share that the own one of the scores has in their softmax."""
    return -torch.log(torch.exp(scores[own]) / sum(torch.exp(score) for score in scores))


def both_ways(score, n):
    """InfoNCE of score(i, j), i, j < n: each i must find j = i, and each j i = j."""
    table = [[score(i, j) for j in range(n)] for i in range(n)]
    rows = [info_nce(table[i], i) for i in range(n)]
    columns = [info_nce([row[j] for row in table], j) for j in range(n)]
    return (mean(rows) + mean(columns)) / 2


def words_of(text, real):
    """The tokens of one text, without padding."""
    return [word for word, is_real in zip(text, real) if is_real]


# -------------------------------------------------------------------------------------------- CLIP
def clip(v, t, g):
    """SPARC eq. (1): a sum over pairs of both directions, divided by 2 B."""
    B = len(v)
    total = 0
    for i in range(B):
        total = total + info_nce([g * cosine(v[i], t[j]) for j in range(B)], i)
        total = total + info_nce([g * cosine(t[i], v[j]) for j in range(B)], i)
    return total / (2 * B)


# ------------------------------------------------------------------------------------------- SPARC
def sparc_weights(word, patches, sigma, use_softmax):
    """SPARC eqs. (2) to (4): one word's weights on the patches of its picture."""
    s = [word @ patch for patch in patches]
    if use_softmax:
        return softmax(s)
    low, high = min(s), max(s)
    if low == high:                                     # "all patches are equally similar"
        return [1 / len(s) for _ in s]
    s_hat = [(x - low) / (high - low) for x in s]                                      # SPARC eq. 2
    s_til = [x if x >= sigma else 0 * x for x in s_hat]                                # SPARC eq. 3
    return [x / sum(s_til) for x in s_til]                                             # SPARC eq. 4


def sparc(v, t, V, T, M, g, global_weight=0.5, local_weight=1.0, sigma=None, softmax=False,
          per_text=False, spare=0, strangers=0):
    """SPARC eqs. (5) to (7). per_text: eq. (6) as printed, else the mean of appendix C's code.
    spare: words up to so many places away are no negatives.
    strangers: a word must also tell what it sees from what it would see in pictures 4, 8, ... away.
    """
    P = V.shape[1]

    def look(word, patches):
        a = sparc_weights(word, patches, 1 / P if sigma is None else sigma, softmax)
        return sum(a[p] * patches[p] for p in range(P))                                # SPARC eq. 5
    of_texts = []
    for b, (patches, text, real) in enumerate(zip(V, T, M)):
        words = words_of(text, real)
        seen = [look(word, patches) for word in words]
        away = [min(b ^ (4 * n), len(V) - 1) for n in range(1, strangers + 1)]
        of_words = []
        for l in range(len(words)):
            elsewhere = [look(words[l], V[k]) for k in away]
            others = [m for m in range(len(words)) if m == l or abs(m - l) > spare]
            own, inside = others.index(l), [seen[m] for m in others]
            forth = info_nce([g * cosine(seen[l], words[m]) for m in others], own)
            back = info_nce([g * cosine(words[l], c) for c in inside + elsewhere], own)
            of_words.append((forth + back) / 2)
        of_texts.append(of_words)
    if per_text:
        local = mean([mean(of_words) for of_words in of_texts])                        # SPARC eq. 6
    else:
        local = mean(sum(of_texts, []))
    return global_weight * clip(v, t, g) + local_weight * local                        # SPARC eq. 7


# ------------------------------------------------------------------------------------------- FILIP
def most_similar(mine, others, keep):
    """FILIP 3.1.1: the share `keep` of my tokens, at least one, with the largest eq. (3) over all
    tokens of all the others."""
    score = [max((x @ y).item() for tokens in others for y in tokens) for x in mine]
    best_first = sorted(range(len(mine)), key=score.__getitem__, reverse=True)
    n = max(1, math.floor(keep * len(mine) + 1e-9))
    return [mine[k] for k in best_first[:n]]


def filip(V, T, M, g, keep=1, one_sided=False, groups=None):
    """FILIP eqs. (1), (3) to (5).

    keep < 1: few tokens stand for each picture and text (3.1.1). one_sided: only where another
    sample's tokens look for their best, as in SPARC's copy. groups: the pairs that each worker
    holds, since a worker selects before the tokens are sent.
    """
    B = range(len(V))
    patches = [[x / x.norm() for x in picture] for picture in V]
    words = [[x / x.norm() for x in words_of(text, real)] for text, real in zip(T, M)]
    sent_patches, sent_words = list(patches), list(words)
    if keep < 1:
        for group in groups or [B]:
            for i in group:
                sent_patches[i] = most_similar(patches[i], [words[j] for j in group], keep)
                sent_words[i] = most_similar(words[i], [patches[j] for j in group], keep)
    if not one_sided:
        patches, words = sent_patches, sent_words

    def s_image(i, j):
        """Eqs. (3), (4): each patch of picture i finds its best word of text j."""
        return mean([max(patch @ word for word in sent_words[j]) for patch in patches[i]])

    def s_text(i, j):
        """Eq. (5): each word of text j finds its best patch of picture i."""
        return mean([max(patch @ word for patch in sent_patches[i]) for word in words[j]])

    of_pictures = [info_nce([g * s_image(k, j) for j in B], k) for k in B]             # FILIP eq. 1
    of_texts = [info_nce([g * s_text(i, k) for i in B], k) for k in B]
    return (mean(of_pictures) + mean(of_texts)) / 2


# ------------------------------------------------------------------------------------- PyramidCLIP
def soft_clip(x, y, g, alpha=0.2):
    """PyramidCLIP eqs. (1) to (3), the target of (2) as printed: the positive has a share too."""
    N = len(x)
    total = 0
    for mine, others in ((x, y), (y, x)):
        for i in range(N):
            p = softmax([g * cosine(mine[i], others[j]) for j in range(N)])      # PyramidCLIP eq. 1
            for j in range(N):                          # N = 1: p is 1 and its log 0
                target = (1 - alpha) * (i == j) + alpha / max(1, N - 1)          # PyramidCLIP eq. 2
                total = total - target * torch.log(p[j]) / (2 * N)               # PyramidCLIP eq. 3
    return total


def pyramid(v_g, v_l, v_r, l_s, l_t, l_a, g, alpha, lam, mu):
    """PyramidCLIP eq. (4)."""
    peer = soft_clip(v_g, l_s, g, alpha) + soft_clip(v_l, l_t, g, alpha)
    cross_global = soft_clip(v_g, l_a, g, alpha) + soft_clip(v_r, l_s, g, alpha)
    cross_local = soft_clip(v_l, l_a, g, alpha) + soft_clip(v_r, l_t, g, alpha)
    weighted = (1 - lam - mu) * peer + lam * cross_global + mu * cross_local     # PyramidCLIP eq. 4
    return weighted / 2


# -------------------------------------------------------------------------------------------- PACL
def pacl(V, t, g):
    """PACL: a picture's patches are pooled by their cosine with the text they are compared to."""
    def similarity(i, j):
        a = softmax([cosine(patch, t[j]) for patch in V[i]])
        pooled = sum(weight * patch / patch.norm() for weight, patch in zip(a, V[i]))
        return g * cosine(pooled, t[j])

    return both_ways(similarity, len(V))


# ------------------------------------------------------------------------------------------ GLoRIA
def gloria(v, t, V, T, M, g, g_local):
    """GLoRIA's code with SPARC's sqrt(D): a softmax over words, one over patches, a sum of exp."""
    def similarity(i, j):
        words = words_of(T[j], M[j])
        s = [[word @ patch / len(patch) ** 0.5 for word in words] for patch in V[i]]
        by_patch = [softmax(of_patch) for of_patch in s]                # over the words
        total = 0
        for l in range(len(words)):
            a = softmax([4 * of_patch[l] for of_patch in by_patch])     # over the patches
            seen = sum(weight * patch for weight, patch in zip(a, V[i]))
            total = total + torch.exp(5 * cosine(words[l], seen))
        return g_local * torch.log(total)

    return clip(v, t, g) + both_ways(similarity, len(V))


# -------------------------------------------------------------------------------------------- MGCA
def sinkhorn(z, eps=0.05, iters=3):
    """The public code's linear form: each prototype gets an equal share, each sample gives one."""
    Q = torch.exp(z / eps)
    B, K = Q.shape
    for _ in range(iters):
        for k in range(K):
            Q[:, k] /= Q[:, k].sum() * K
        for b in range(B):
            Q[b] /= Q[b].sum() * B
    return Q * B


def attend(x, others, parameters):
    """What x sees of the others: one attention head with layers q, k, v and out."""
    def layer(name, y):
        return parameters[f"{name}.weight"] @ y + parameters[f"{name}.bias"]

    q = layer("q", x)
    a = softmax([q @ layer("k", y) / len(q) ** 0.5 for y in others])
    return layer("out", sum(weight * layer("v", y) for weight, y in zip(a, others)))


def mgca_tokens(mine, others, parameters, g):
    """CTA in one pair: each of my tokens must find what it saw itself, and the other way round."""
    seen = [attend(x, others, parameters) for x in mine]

    def similarity(l, m):
        return g * cosine(mine[l], seen[m])

    return both_ways(similarity, len(mine))


def mgca_prototypes(v, t, prototypes, g):
    """CPA: each side predicts the other's code. Prototypes are made unit vectors, no gradient."""
    units = torch.stack([c / c.norm() for c in prototypes])
    prototypes = prototypes + (units - prototypes).detach()
    z_v = [[c @ (x / x.norm()) for c in prototypes] for x in v]
    z_t = [[c @ (x / x.norm()) for c in prototypes] for x in t]
    code_v = sinkhorn(torch.stack([torch.stack(row) for row in z_v]).detach())
    code_t = sinkhorn(torch.stack([torch.stack(row) for row in z_t]).detach())
    total = 0
    for b in range(len(v)):
        for code, z in ((code_v[b], z_t[b]), (code_t[b], z_v[b])):
            p = softmax([g * x for x in z])
            total = total - sum(q * torch.log(p_k) for q, p_k in zip(code, p))
    return total / (2 * len(v))


def mgca(v, t, V, T, M, parameters):
    """MGCA's ITA + CTA + CPA. The means of CTA are over all words, and over all patches, of the
    batch. parameters: those of losses.MGCA by name."""
    g_ita, g_cta, g_cpa = parameters["log_scales"].exp()
    layers = {"words_see": {}, "patches_see": {}}
    for name, value in parameters.items():
        if "." in name:
            attention, layer = name.split(".", 1)
            layers[attention][layer] = value
    of_words, of_patches = [], []
    for picture, text, real in zip(V, T, M):
        words, patches = words_of(text, real), list(picture)
        loss = mgca_tokens(words, patches, layers["words_see"], g_cta)
        of_words += len(words) * [loss]                                 # once for each word
        of_patches += [mgca_tokens(patches, words, layers["patches_see"], g_cta)]
    cta = mean(of_words) + mean(of_patches)
    return clip(v, t, g_ita) + cta + mgca_prototypes(v, t, parameters["prototypes"], g_cpa)
