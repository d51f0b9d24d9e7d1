"""Model: the image tower (ViT), the text tower, and the two ways of pooling them that the papers use.

    python model.py                       # every model's name, sizes and number of parameters
    python model.py --model ViT-B/32      # the parameters of one, with their names and shapes

Covers: FILIP 3.1 and Table 7, SPARC 2 and D.1, and the CLIP towers both start from. Parameter names are OpenAI CLIP's.

    encode_image(images (B,3,H,W))        -> v (B,D) the picture, V (B,P,D) its patches
    encode_text(ids (B,L), mask (B,L))    -> t (B,D) the text,    T (B,L,D) its tokens
Nothing is normalised: the losses do that, in fp32.

pool="cls" (CLIP, FILIP): a [CLS] token in front of the patches is the picture, the text's EOT its feature; causal text tower.
pool="mean" (SPARC): no [CLS]; v = g_v(h_v(mean of f_v)), t = g_t(mean of f_t over real tokens); text attention sees both ways.

Differs from the papers: SPARC does not say whether its text tower is causal or what h_v's nonlinearity is: here both ways (a mean
over tokens wants it; --causal on gives the other) and GELU. `tiny` is ours: two layers of SPARC's towers, for CPUs and the built-in scenes.
"""
import argparse
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import UserError

# image_size, patch, vision width / layers / heads, embed_dim, vocabulary, context, text width / layers / heads, pooling
_FIELDS = ("image_size", "patch_size", "vision_width", "vision_layers", "vision_heads", "embed_dim",
           "vocab_size", "context_length", "text_width", "text_layers", "text_heads", "pool")
CONFIGS = {name: dict(zip(_FIELDS, row)) for name, row in {
    "tiny":           (56, 8, 128, 2, 2, 128, 618, 32, 128, 2, 2, "mean"),
    "ViT-B/32":       (224, 32, 768, 12, 12, 512, 49408, 77, 512, 12, 8, "cls"),
    "ViT-B/16":       (224, 16, 768, 12, 12, 512, 49408, 77, 512, 12, 8, "cls"),
    "ViT-L/14":       (224, 14, 1024, 24, 16, 768, 49408, 77, 768, 12, 12, "cls"),
    "FILIP-base":     (224, 32, 768, 12, 12, 256, 49408, 77, 512, 12, 8, "cls"),
    "FILIP-large":    (224, 14, 1024, 24, 16, 256, 49408, 77, 768, 12, 12, "cls"),
    "SPARC-ViT-B/32": (224, 32, 768, 12, 12, 512, 32000, 55, 768, 12, 12, "mean"),
    "SPARC-ViT-B/16": (224, 16, 768, 12, 12, 512, 32000, 55, 768, 12, 12, "mean"),
    "SPARC-ViT-L/14": (224, 14, 1024, 24, 16, 512, 32000, 55, 768, 12, 12, "mean"),
}.items()}
LOG_SCALE_INIT, LOG_SCALE_MAX = 2.6592600369327783, 4.605170185988092               # ln(1 / 0.07), ln(100)


class LayerNorm(nn.LayerNorm):
    """Computed in fp32 (or wider) whatever autocast says."""

    def forward(self, x):
        return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.normalized_shape, self.weight, self.bias, self.eps)


class QuickGELU(nn.Module):
    """OpenAI CLIP's activation."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention with nn.MultiheadAttention's parameters and initialisation."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, bias=None):
        """x (B, N, w); bias, added to the scores: None, (N, N) or (B, 1, 1, N) with -inf where attention is barred."""
        B, N, w = x.shape
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu" and N <= 256:                    # for short sequences the plain form has the faster CPU backward
            scores = (q * (w // self.heads) ** -0.5) @ k.transpose(-2, -1)                     # (B, heads, N, N)
            scores = scores if bias is None else scores + bias.to(scores.dtype)
            x = scores.softmax(-1).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.out_proj(x.transpose(1, 2).reshape(B, N, w))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width, heads, act):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", act())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = LayerNorm(width)

    def forward(self, x, bias=None):
        x = x + self.attn(self.ln_1(x), bias)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, act) for _ in range(layers))

    def forward(self, x, bias=None):
        for block in self.resblocks:
            x = block(x, bias)
        return x


class VisionTransformer(nn.Module):
    """f_v with its pooling and adapter. forward(images (B,3,H,W)) -> v (B,D), V (B,P,D)."""

    def __init__(self, image_size, patch_size, width, layers, heads, embed_dim, pool, act):
        super().__init__()
        self.patch_size, self.pool, self.grid = patch_size, pool, image_size // patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        if pool == "cls":
            self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        else:
            self.h_v = nn.Sequential(nn.Linear(width, width), nn.GELU())                       # SPARC's one non-linear layer
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.grid ** 2 + (pool == "cls"), width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))               # the adapter g_v

    def forward(self, images, patches_through_h=False):
        B, s = len(images), self.patch_size
        if images.shape[1:] != (3, self.grid * s, self.grid * s):
            raise UserError(f"this model takes images (B, 3, {self.grid * s}, {self.grid * s}), not {tuple(images.shape)}: see data.center_crop")
        x = images.unfold(2, s, s).unfold(3, s, s)                                             # (B, 3, h, w, s, s)
        x = x.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, 3 * s * s)                              # (B, P, 3ss): a convolution whose stride is
        x = F.linear(x, self.conv1.weight.flatten(1))                                          # its kernel is a matmul; CPUs like it better
        if self.pool == "cls":
            x = torch.cat([self.class_embedding.to(x.dtype).expand(B, 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding)
        f = self.ln_post(self.transformer(x))                                                  # (B, P or 1 + P, w)
        if self.pool == "cls":
            y = f @ self.proj
            return y[:, 0], y[:, 1:]
        return self.h_v(f.mean(1)) @ self.proj, (self.h_v(f) if patches_through_h else f) @ self.proj


class CLIP(nn.Module):
    """The two towers and log_scale = ln(1 / temperature). config: the dict build() makes, enough to build it again."""

    def __init__(self, image_size, patch_size, vision_width, vision_layers, vision_heads, embed_dim, vocab_size, context_length,
                 text_width, text_layers, text_heads, pool, causal, patches_through_h, act):
        super().__init__()
        self.config = {k: v for k, v in dict(locals()).items() if k not in ("self", "__class__")}
        self.pool, self.causal, self.patches_through_h, self.context_length = pool, causal, patches_through_h, context_length
        Act = {"gelu": nn.GELU, "quickgelu": QuickGELU}[act]
        self.visual = VisionTransformer(image_size, patch_size, vision_width, vision_layers, vision_heads, embed_dim, pool, Act)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers, text_heads, Act)
        self.ln_final = LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))               # the adapter g_t
        self.logit_scale = nn.Parameter(torch.tensor(LOG_SCALE_INIT))
        self.initialize()

    def initialize(self):
        """OpenAI's initialisation. It re-initialises the text blocks only; the image blocks keep PyTorch's defaults."""
        w, layers = self.config["text_width"], self.config["text_layers"]
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=w ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=w ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * w) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=w ** -0.5 * (2 * layers) ** -0.5)
        nn.init.normal_(self.text_projection, std=w ** -0.5)

    def encode_image(self, images, patches_through_h=None):
        """images (B,3,H,W) float, normalised -> v (B,D), V (B,P,D). patches_through_h: pass the patches through h_v too, as SPARC's
        segmentation does (D.7); None takes the model's own setting, which training uses."""
        return self.visual(images, self.patches_through_h if patches_through_h is None else patches_through_h)

    def encode_text(self, ids, mask):
        """ids (B,L) int64, mask (B,L) bool, True up to and including the first EOT -> t (B,D), T (B,L,D)."""
        B, L = ids.shape
        if L > self.context_length:
            raise UserError(f"texts of {L} tokens, but this model reads at most {self.context_length}: tokenise with context_length={self.context_length}")
        bias = torch.zeros(B, 1, 1, L, device=ids.device).masked_fill(~mask[:, None, None], float("-inf"))
        if self.causal:                                            # a real token never sees padding behind it, so the keys need no mask
            bias = torch.full((L, L), float("-inf"), device=ids.device).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:L]
        x = self.ln_final(self.transformer(x, bias))               # (B, L, w)
        T = x @ self.text_projection
        if self.pool == "cls":
            return T[torch.arange(B, device=ids.device), mask.sum(1) - 1], T                   # the feature at EOT
        n = mask.sum(1, keepdim=True)
        mean = (x * mask[..., None]).sum(1) / n                    # over real tokens only
        return mean @ self.text_projection, T

    def forward(self, images, ids, mask):
        """-> dict of features: image v (B,D), patches V (B,P,D), text t (B,D), tokens T (B,L,D), mask M (B,L), scale = exp(log_scale)."""
        v, V = self.encode_image(images)
        t, T = self.encode_text(ids, mask)
        return {"v": v, "V": V, "t": t, "T": T, "M": mask, "scale": self.logit_scale.exp()}

    @torch.no_grad()
    def clamp_scale(self):
        """Keep the scale in [1, 100]: called after each optimiser step. A clamp inside forward would have gradient 0 at the bound."""
        self.logit_scale.clamp_(0, LOG_SCALE_MAX)


def build(name, **overrides):
    """A model by name; overrides replace sizes (image_size, vocab_size, pool="cls"|"mean", causal, act, ...).

    Raises UserError for an unknown name or size, for patches that do not divide the image, for heads that do not divide a width.
    """
    if name not in CONFIGS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(CONFIGS)}")
    c = CONFIGS[name] | {"causal": None, "patches_through_h": False, "act": None}
    unknown = [k for k in overrides if k not in c]
    if unknown:
        raise UserError(f"a model has no setting {', '.join(unknown)}: choose from {', '.join(c)}")
    c |= {k: v for k, v in overrides.items() if v is not None}
    if c["image_size"] % c["patch_size"]:
        s, p = c["image_size"], c["patch_size"]
        raise UserError(f"patches of {p} pixels do not divide an image of {s}: try an image size of {max(1, s // p) * p} or {(s // p + 1) * p}")
    for tower in ("vision", "text"):
        w, h = c[f"{tower}_width"], c[f"{tower}_heads"]
        if h < 1 or w % h:
            raise UserError(f"{h} heads do not divide the {tower} tower's width {w}: the papers have width / 64 heads")
    if c["act"] not in (None, "gelu", "quickgelu"):
        raise UserError(f"act is gelu or quickgelu, not {c['act']!r}")
    if c["pool"] not in ("cls", "mean"):
        raise UserError(f"pool is cls or mean, not {c['pool']!r}")
    if c["patches_through_h"] and c["pool"] == "cls":
        raise UserError("patches_through_h needs pool='mean': only SPARC's towers have the layer h_v")
    c["causal"] = c["pool"] == "cls" if c["causal"] is None else c["causal"]
    c["act"] = c["act"] or ("quickgelu" if name.startswith(("ViT", "FILIP")) else "gelu")
    return CLIP(**c)


def count(module):
    return sum(p.numel() for p in module.parameters())


def main():
    ap = argparse.ArgumentParser(description="List the models and their sizes.")
    ap.add_argument("--model", help="list this model's parameters")
    args = ap.parse_args()
    with torch.device("meta"):                                     # shapes without memory
        if args.model:
            for name, p in build(args.model).named_parameters():
                print(f"{name:55} {tuple(p.shape)}")
            return
        print(f"{'model':16} {'image tower':>13} {'text tower':>13} {'total':>13}  image/patch  dim  pooling")
        for name, c in CONFIGS.items():
            m = build(name)
            print(f"{name:16} {count(m.visual):13,} {count(m) - count(m.visual) - 1:13,} {count(m):13,}  {c['image_size']:5}/{c['patch_size']:<5} "
                  f"{c['embed_dim']:4}  {c['pool']}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"model.py: {e}")
