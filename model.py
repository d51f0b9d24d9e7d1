"""Model: the image towers (ViT, ResNet), the text tower, and the two ways of pooling them that the papers use; OpenAI's weights.

    python model.py                       # every model's name, sizes and number of parameters
    python model.py --model ViT-B/32      # the parameters of one, with their names and shapes

Covers: FILIP 3.1 and Table 7, PyramidCLIP 3.3 and A.2, SPARC 2, D.1 and D.3, and the CLIP towers all start from. Parameter names are
OpenAI CLIP's: load_openai(path) reads its weights, and torch.save(model.state_dict(), path) writes weights that its code can read.

    encode_image(images (B,3,H,W))        -> v (B,D) the picture, V (B,P,D) its patches
    encode_text(ids (B,L), mask (B,L))    -> t (B,D) the text,    T (B,L,D) its tokens, 0 where there is padding
    encode_regions(R (B,M,2052), mask)    -> v_r (B,D) the picture as a detector sees it, PyramidCLIP's f2(phi(R))
Nothing is normalised: the losses do that, in fp32.

pool="cls" (CLIP, FILIP): a [CLS] token in front of the patches is the picture, the text's EOT its feature; causal text tower.
pool="mean" (SPARC): no [CLS]; v = g_v(h_v(mean of f_v)), t = g_t(mean of f_t over real tokens); text attention sees both ways.

Differs from the papers: SPARC does not say whether its text tower is causal or what h_v's nonlinearity is: here both ways (a mean
over tokens wants it; causal=True gives the other) and GELU. PyramidCLIP's region path starts with the picture's own class token (ViT) or
the regions' mean (ResNet), as its released model does, where the text says a random one; regions that are padding are masked; BatchNorm
sees both crops of a batch at once. `tiny` is ours: two layers of SPARC's towers, for CPUs and the built-in scenes.
"""
import argparse
import collections
import pickle
import warnings
import zipfile
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from data import UserError

# image_size, patch, vision width / layers / heads, embed_dim, vocabulary, context, text width / layers / heads, pooling
# layers of a ResNet: blocks in each stage; its patch is its total stride
_FIELDS = ("image_size", "patch_size", "vision_width", "vision_layers", "vision_heads", "embed_dim",
           "vocab_size", "context_length", "text_width", "text_layers", "text_heads", "pool")
CONFIGS = {name: dict(zip(_FIELDS, row)) for name, row in {
    "tiny":           (56, 8, 128, 2, 2, 128, 618, 32, 128, 2, 2, "mean"),
    "RN50":           (224, 32, 64, (3, 4, 6, 3), 32, 1024, 49408, 77, 512, 12, 8, "cls"),
    "ViT-B/32":       (224, 32, 768, 12, 12, 512, 49408, 77, 512, 12, 8, "cls"),
    "ViT-B/16":       (224, 16, 768, 12, 12, 512, 49408, 77, 512, 12, 8, "cls"),
    "ViT-L/14":       (224, 14, 1024, 24, 16, 768, 49408, 77, 768, 12, 12, "cls"),
    "FILIP-base":     (224, 32, 768, 12, 12, 256, 49408, 77, 512, 12, 8, "cls"),
    "FILIP-large":    (224, 14, 1024, 24, 16, 256, 49408, 77, 768, 12, 12, "cls"),
    "SPARC-ViT-B/32": (224, 32, 768, 12, 12, 512, 32000, 55, 768, 12, 12, "mean"),
    "SPARC-ViT-B/16": (224, 16, 768, 12, 12, 512, 32000, 55, 768, 12, 12, "mean"),
    "SPARC-ViT-L/14": (224, 14, 1024, 24, 16, 512, 32000, 55, 768, 12, 12, "mean"),
}.items()}
PYRAMID = {"regions": 2052}                                         # PyramidCLIP adds phi, and LeFF in the first 9 of a ViT's 12 blocks
CONFIGS |= {f"PyramidCLIP-{name}": CONFIGS[name] | PYRAMID | ({} if name == "RN50" else {"leff": 9}) for name in ("RN50", "ViT-B/32", "ViT-B/16")}
LOG_SCALE_INIT, LOG_SCALE_MAX = 2.6592600369327783, 4.605170185988092               # ln(1 / 0.07), ln(100)


class LayerNorm(nn.LayerNorm):
    """Computed in fp32 (or wider) whatever autocast says."""

    def forward(self, x):
        return F.layer_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.normalized_shape, self.weight, self.bias, self.eps)


class QuickGELU(nn.Module):
    """OpenAI CLIP's activation, x sigmoid(1.702 x), as a fused operation of PyTorch's."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


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

    def forward(self, x, bias=None, packed=None):
        """x (B, N, w), or packed (n, w); bias, added to the scores: None, (N, N) or (B, 1, 1, N) with -inf where attention is barred.
        packed: (rows, (B, N)), the positions that x's rows stand for, so that only attention itself spends time on padding."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv if packed is None else unpack(qkv, *packed)                                  # (B, N, 3w)
        B, N, w = *qkv.shape[:2], x.shape[-1]
        q, k, v = qkv.view(B, N, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).contiguous()     # (B, heads, N, w / heads) each
        if x.device.type == "cpu" and N <= 256:                    # for short sequences the plain form has the faster CPU backward
            scores = (q * (w // self.heads) ** -0.5) @ k.transpose(-2, -1)                     # (B, heads, N, N)
            scores = scores if bias is None else scores + bias.to(scores.dtype)
            y = scores.softmax(-1).to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        y = y.transpose(1, 2).reshape(B, N, w)
        return self.out_proj(y if packed is None else y.flatten(0, 1).index_select(0, packed[0]))


def pack(mask):
    """mask (B, L) -> positions in the flattened mask, the n True ones first, then False ones up to a multiple of 64; n. The same few
    numbers of rows come again and again, for which matmul kernels are ready and memory is at hand."""
    n = int(mask.sum())
    return mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:-(-n // 64) * 64], n


def unpack(x, rows, shape):
    """x (n, w), rows (n,) their positions among B L -> (B, L, w), 0 elsewhere; shape: (B, L)."""
    return x.new_zeros(shape.numel(), x.shape[-1]).index_copy(0, rows, x).view(*shape, -1)


class LeFF(nn.Module):
    """Locally-enhanced feed-forward, PyramidCLIP 3.3: between its two linear layers a 3 x 3 depthwise convolution mixes each patch with its
    neighbours. A class token in front passes through unchanged. x (B, P or 1 + P, w) -> the same shape."""

    def __init__(self, width, grid, act):
        super().__init__()
        self.grid, self.act = grid, act()
        self.c_fc, self.bn1 = nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width)
        self.conv, self.bn2 = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width, bias=False), nn.BatchNorm2d(4 * width)
        self.c_proj, self.bn3 = nn.Linear(4 * width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        B, g, P = len(x), self.grid, self.grid ** 2
        cls, y = x[:, :-P], x[:, -P:]
        y = self.act(self.bn1(self.c_fc(y).flatten(0, 1)))                                     # (B P, 4w): statistics over pictures and patches
        y = y.view(B, g, g, -1).permute(0, 3, 1, 2)                                            # (B, 4w, g, g)
        y = self.act(self.bn2(self.conv(y)))
        y = self.c_proj(y.flatten(2).transpose(1, 2)).flatten(0, 1)
        return torch.cat([cls, self.act(self.bn3(y)).view(B, P, -1)], 1)


class Block(nn.Module):
    """Pre-norm transformer block; with a grid, its feed-forward part is LeFF."""

    def __init__(self, width, heads, act, grid=None):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = LeFF(width, grid, act) if grid else nn.Sequential(collections.OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=act(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = LayerNorm(width)

    def forward(self, x, bias=None, packed=None):
        x = x + self.attn(self.ln_1(x), bias, packed)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """leff: so many blocks, from the first, have LeFF over a grid of grid x grid patches. checkpointing: keep each block's input alone and
    compute the rest again in backward, for a third more time (LeFF's running statistics then move twice a step)."""

    checkpointing = False

    def __init__(self, width, layers, heads, act, leff=0, grid=None):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, act, grid if n < leff else None) for n in range(layers))

    def forward(self, x, bias=None, packed=None, first=0):
        for block in self.resblocks[first:]:
            x = checkpoint(block, x, bias, packed, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else block(x, bias, packed)
        return x


class ResidualEmbedder(nn.Module):
    """PACL's e_v in place of the linear adapter g_v: linear + (linear, ReLU, linear)."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.skip = nn.Linear(width, embed_dim)
        self.main = nn.Sequential(nn.Linear(width, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))

    def forward(self, x):
        return self.skip(x) + self.main(x)


class VisionTransformer(nn.Module):
    """f_v with its pooling and adapter. forward(images (B,3,H,W)) -> v (B,D), V (B,P,D).

    leff: so many blocks, from the first, have LeFF. front: blocks in PyramidCLIP's f1, None for as many as leff; the rest are f2, where
    regions enter. regions: size of a region's features, 0 for no phi. embedder: PACL's e_v."""

    def __init__(self, image_size, patch_size, width, layers, heads, embed_dim, pool, act, leff=0, front=None, regions=0, embedder=False):
        super().__init__()
        self.patch_size, self.pool, self.grid, self.front = patch_size, pool, image_size // patch_size, leff if front is None else front
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        if pool == "cls":
            self.class_embedding = nn.Parameter(width ** -0.5 * torch.randn(width))
        else:
            self.h_v = nn.Sequential(nn.Linear(width, width), nn.GELU())                       # SPARC's one non-linear layer
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(self.grid ** 2 + (pool == "cls"), width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act, leff, self.grid)
        self.ln_post = LayerNorm(width)
        if embedder:
            self.e_v = ResidualEmbedder(width, embed_dim)
        else:
            self.proj = nn.Parameter(width ** -0.5 * torch.randn(width, embed_dim))            # the adapter g_v
        if regions:
            self.phi = nn.Parameter(width ** -0.5 * torch.randn(regions, width))

    def adapter(self, f):
        return self.e_v(f) if hasattr(self, "e_v") else f @ self.proj

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
            y = self.adapter(f)
            return y[:, 0], y[:, 1:]
        return self.adapter(self.h_v(f.mean(1))), self.adapter(self.h_v(f) if patches_through_h else f)

    def encode_regions(self, R, mask):
        """R (B,M,regions), mask (B,M) -> v_r (B,D): f2, the blocks behind f1, without positions, which R contains."""
        x = R @ self.phi                                                                       # (B, M, w)
        if self.pool == "cls":
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
            mask = F.pad(mask, (1, 0), value=True)
        f = self.ln_post(self.transformer(self.ln_pre(x), key_bias(mask), first=self.front))
        return self.adapter(f[:, 0] if self.pool == "cls" else self.h_v(masked_mean(f, mask)))


def key_bias(mask):
    """mask (B, N) -> (B, 1, 1, N) to add to attention scores: no query sees a False position."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))[:, None, None]


def masked_mean(x, mask):
    """x (B, N, w), mask (B, N) -> (B, w), the mean of the True positions."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


# ----------------------------------------------------------------------------------------------------------- ResNet with attention pooling
class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pooling, in the branch and in the shortcut."""

    def __init__(self, inside, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or inside != 4 * width:
            self.downsample = nn.Sequential(collections.OrderedDict([  # OpenAI's names: the pooling was put in front of 0 and 1
                ("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inside, 4 * width, 1, bias=False)), ("1", nn.BatchNorm2d(4 * width))]))
        nn.init.zeros_(self.bn3.weight)                            # each block starts as its shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    """Attention over [mean, cells]. Output 0 is the picture; the outputs at the cells are its patches, which CLIP does not compute."""

    def __init__(self, cells, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(cells + 1, width))
        for name in ("k_proj", "q_proj", "v_proj", "c_proj"):
            self.add_module(name, nn.Linear(width, embed_dim if name == "c_proj" else width))
            nn.init.normal_(getattr(self, name).weight, std=width ** -0.5)

    def forward(self, x, bias=None):
        """x (B, 1 + cells, w) -> (B, 1 + cells, D)"""
        q, k, v = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average poolings for strides, attention pooling. forward as VisionTransformer's."""

    def __init__(self, image_size, width, layers, heads, embed_dim, regions=0):
        super().__init__()
        self.image_size, self.grid = image_size, image_size // 32
        w = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, w, 3, 2, 1, bias=False), nn.BatchNorm2d(w)
        self.conv2, self.bn2 = nn.Conv2d(w, w, 3, padding=1, bias=False), nn.BatchNorm2d(w)
        self.conv3, self.bn3 = nn.Conv2d(w, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inside = width
        for n, blocks in enumerate(layers):
            stage = []
            for k in range(blocks):
                stage.append(Bottleneck(inside, width << n, 2 if n and not k else 1))
                inside = 4 * width << n
            self.add_module(f"layer{n + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(self.grid ** 2, inside, heads, embed_dim)
        if regions:
            self.phi, self.roi_norm = nn.Parameter(inside ** -0.5 * torch.randn(regions, inside)), LayerNorm(inside)

    def forward(self, images, patches_through_h=False):            # there is no h_v
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise UserError(f"this model takes images (B, 3, {self.image_size}, {self.image_size}), not {tuple(images.shape)}: see data.center_crop")
        x = images
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2)))))             # (B, 32 w, h, w)
        x = x.flatten(2).transpose(1, 2)                                                       # (B, P, 32 w)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.attnpool.positional_embedding
        y = self.attnpool(x)
        return y[:, 0], y[:, 1:]

    def encode_regions(self, R, mask):
        """R (B,M,regions), mask (B,M) -> v_r (B,D): f2 is the attention pooling, behind [mean, regions], without positions."""
        x = R @ self.phi
        x = self.roi_norm(torch.cat([masked_mean(x, mask)[:, None], x], 1))
        return self.attnpool(x, key_bias(F.pad(mask, (1, 0), value=True)))[:, 0]


# ------------------------------------------------------------------------------------------------------------------------- both towers
class CLIP(nn.Module):
    """The two towers and log_scale = ln(1 / temperature). config: the dict build() makes, enough to build it again."""

    def __init__(self, image_size, patch_size, vision_width, vision_layers, vision_heads, embed_dim, vocab_size, context_length,
                 text_width, text_layers, text_heads, pool, causal, patches_through_h, act, leff=0, front=None, regions=0, embedder=False):
        super().__init__()
        self.config = {k: v for k, v in dict(locals()).items() if k not in ("self", "__class__")}
        self.pool, self.causal, self.patches_through_h, self.context_length = pool, causal, patches_through_h, context_length
        Act = {"gelu": nn.GELU, "quickgelu": QuickGELU}[act]
        if isinstance(vision_layers, int):
            self.visual = VisionTransformer(image_size, patch_size, vision_width, vision_layers, vision_heads, embed_dim, pool, Act,
                                            leff, front, regions, embedder)
        else:
            self.visual = ModifiedResNet(image_size, vision_width, vision_layers, vision_heads, embed_dim, regions)
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
        bias = key_bias(mask)
        if self.causal:                                            # a real token never sees padding behind it, so the keys need no mask
            bias = torch.full((L, L), float("-inf"), device=ids.device).triu(1)
        rows, n = pack(mask)                                                                   # n real tokens in all
        x = (self.token_embedding(ids) + self.positional_embedding[:L]).flatten(0, 1).index_select(0, rows)
        x = self.ln_final(self.transformer(x, bias, (rows, mask.shape))[:n])                   # (n, w)
        x = unpack(x, rows[:n], mask.shape)                                                    # (B, L, w)
        T = x @ self.text_projection
        if self.pool == "cls":
            return T[torch.arange(B, device=ids.device), mask.sum(1) - 1], T                   # the feature at EOT
        return masked_mean(x, mask) @ self.text_projection, T                                  # over real tokens only

    def encode_regions(self, R, mask):
        """R (B,M,2052) region features, mask (B,M) bool -> v_r (B,D). PyramidCLIP 3.3: f2(phi(R))."""
        if not self.config["regions"]:
            raise UserError("this model takes no regions: build it with regions=2052")
        return self.visual.encode_regions(R, mask)

    def forward(self, images, ids, mask, images_l=None, regions=None, regions_mask=None, summary=None, summary_mask=None,
                objects=None, objects_mask=None):
        """-> dict of features: image v (B,D), patches V (B,P,D), text t (B,D), tokens T (B,L,D), mask M (B,L), scale = exp(log_scale).
        PyramidCLIP's further views, where the batch has them: v_l of images_l, the local crop (v is then the global one); v_r of regions
        (B,M,2052); l_s of the summary and l_a of the objects' names, both token ids and masks as ids and mask."""
        f = {"M": mask, "scale": self.logit_scale.exp()}
        v, f["V"] = self.encode_image(images if images_l is None else torch.cat([images, images_l]))
        f["V"] = f["V"][:len(images)]
        f |= zip(("v", "v_l"), v.split(len(images)))
        if regions is not None:
            f["v_r"] = self.encode_regions(regions, regions_mask)
        texts = {"t": (ids, mask), "l_s": (summary, summary_mask), "l_a": (objects, objects_mask)}
        texts = {k: x for k, x in texts.items() if x[0] is not None}
        L = max(x.shape[1] for x, _ in texts.values())
        ids, masks = (torch.cat([F.pad(x[n], (0, L - x[n].shape[1])) for x in texts.values()]) for n in (0, 1))
        t, T = self.encode_text(ids, masks)                        # all in one pass; padding is packed away
        f["T"] = T[:len(mask), :mask.shape[1]]
        return f | dict(zip(texts, t.split(len(mask))))


@torch.no_grad()
def clamp_scales(module):
    """Keep every learned scale in [1, 100]: called after each optimiser step. A clamp inside forward would have gradient 0 at the bound."""
    for name, p in module.named_parameters():
        if "logit_scale" in name or "log_scale" in name:
            p.clamp_(0, LOG_SCALE_MAX)


def build(name, **overrides):
    """A model by name; overrides replace sizes (image_size, vocab_size, pool="cls"|"mean", causal, act, leff, regions, embedder, ...).

    leff: blocks with LeFF, from the first; front: blocks before regions enter (None: as many); regions: size of the region features that encode_regions takes; embedder: PACL's e_v for g_v.
    Raises UserError for an unknown name or size, for patches that do not divide the image, for heads that do not divide a width.
    """
    if name not in CONFIGS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(CONFIGS)}")
    c = {"causal": None, "patches_through_h": False, "act": None, "leff": 0, "front": None, "regions": 0, "embedder": False} | CONFIGS[name]
    unknown = [k for k in overrides if k not in c]
    if unknown:
        raise UserError(f"a model has no setting {', '.join(unknown)}: choose from {', '.join(c)}")
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if not isinstance(c["vision_layers"], int):
        transformers_only = ("patch_size", "vision_width", "vision_layers", "vision_heads", "pool", "patches_through_h", "leff", "front", "embedder")
        wrong = [k for k in transformers_only if overrides.get(k, c[k]) != c[k]]
        if wrong:
            raise UserError(f"{name}'s image tower is a ResNet, which has no {', '.join(wrong)} to choose: leave that out, or take a ViT")
    c |= overrides
    if c["image_size"] % c["patch_size"]:
        s, p = c["image_size"], c["patch_size"]
        raise UserError(f"patches of {p} pixels do not divide an image of {s}: try an image size of {max(1, s // p) * p} or {(s // p + 1) * p}")
    for tower in ("vision", "text"):
        w, h = c[f"{tower}_width"], c[f"{tower}_heads"]
        if h < 1 or w % h:
            raise UserError(f"{h} heads do not divide the {tower} tower's width {w}: the papers have width / 64 heads")
    front = c["leff"] if c["front"] is None else c["front"]
    if c["regions"] and front and front >= c["vision_layers"]:
        raise UserError(f"{front} blocks with LeFF leave none of {c['vision_layers']} for the regions: choose leff below vision_layers")
    if c["act"] not in (None, "gelu", "quickgelu"):
        raise UserError(f"act is gelu or quickgelu, not {c['act']!r}")
    if c["pool"] not in ("cls", "mean"):
        raise UserError(f"pool is cls or mean, not {c['pool']!r}")
    if c["patches_through_h"] and c["pool"] == "cls":
        raise UserError("patches_through_h needs pool='mean': only SPARC's towers have the layer h_v")
    c["causal"] = c["pool"] == "cls" if c["causal"] is None else c["causal"]
    c["act"] = c["act"] or ("gelu" if name.startswith(("SPARC", "tiny")) else "quickgelu")
    return CLIP(**c)


# ------------------------------------------------------------------------------------------------------------------- OpenAI's weights
class _TensorsOnly(pickle.Unpickler):
    """Reads a TorchScript archive's tensors and none of its code: whatever class it names becomes a bag of attributes."""

    class Bag:
        def __setstate__(self, state):
            self.__dict__ = state

    def __init__(self, archive):
        self.archive, self.root = archive, next(n for n in archive.namelist() if n.endswith("/data.pkl"))[:-len("data.pkl")]
        super().__init__(archive.open(self.root + "data.pkl"))

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset).clone()
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        return type(name, (self.Bag,), {})

    def persistent_load(self, pid):
        dtype = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "LongStorage": torch.int64}[pid[1]]
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{pid[2]}")), dtype=dtype)

    def state_dict(self):
        def walk(bag, prefix=""):
            for name, x in vars(bag).items():
                if torch.is_tensor(x):
                    out[prefix + name] = x
                elif isinstance(x, self.Bag):
                    walk(x, f"{prefix}{name}.")
        out = {}
        walk(self.load())
        return out


def load_openai(path):
    """OpenAI CLIP's weights -> model in eval mode, fp32. path: a state dict, or the released TorchScript archive, whose code is not run.
    The sizes are read off the tensors' shapes. Raises UserError for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive = zipfile.is_zipfile(path) and zipfile.ZipFile(path)
            if archive and any("/code/" in n for n in archive.namelist()):
                state = _TensorsOnly(archive).state_dict()
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                          # readers raise nearly anything on a file of another kind
        raise UserError(f"can't read {path} as OpenAI's weights ({type(e).__name__}: {str(e).splitlines()[0][:100] if str(e) else ''}): give the released "
                        f"archive, or convert it with torch.save(torch.jit.load(archive).state_dict(), path)") from None
    try:
        state = {k: x.float() for k, x in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
        blocks = lambda prefix: len({k[len(prefix):].split(".")[0] for k in state if k.startswith(prefix)})
        text_width, positions = len(state["ln_final.weight"]), state["positional_embedding"]
        c = dict(embed_dim=state["text_projection"].shape[1], vocab_size=len(state["token_embedding.weight"]), context_length=len(positions),
                 text_width=text_width, text_layers=blocks("transformer.resblocks."), text_heads=text_width // 64, pool="cls", causal=True,
                 patches_through_h=False, act="quickgelu")
        if "visual.proj" in state:
            width, _, _, patch = state["visual.conv1.weight"].shape
            grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
            c |= dict(vision_width=width, patch_size=patch, image_size=patch * grid, vision_layers=blocks("visual.transformer.resblocks."), vision_heads=width // 64)
        else:
            width = len(state["visual.layer1.0.conv1.weight"])
            grid = round((len(state["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
            c |= dict(vision_width=width, patch_size=32, image_size=32 * grid, vision_layers=tuple(blocks(f"visual.layer{n}.") for n in (1, 2, 3, 4)),
                      vision_heads=width * 32 // 64)
        model = CLIP(**c)
        model.load_state_dict(state)
        return model.eval()                                         # for RN50's BatchNorm
    except (LookupError, ValueError, AttributeError, RuntimeError, TypeError) as e:
        raise UserError(f"{path} does not have OpenAI CLIP's layout ({' '.join(str(e).split())[:150]}): its keys should be visual.conv1.weight, "
                        f"transformer.resblocks.0.attn.in_proj_weight, text_projection, ...") from None


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
        print(f"{'model':20} {'image tower':>13} {'text tower':>13} {'total':>13}  image/patch  dim  pooling")
        for name, c in CONFIGS.items():
            m = build(name)
            print(f"{name:20} {count(m.visual):13,} {count(m) - count(m.visual) - 1:13,} {count(m):13,}  {c['image_size']:5}/{c['patch_size']:<5} "
                  f"{c['embed_dim']:4}  {c['pool']}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"model.py: {e}")
