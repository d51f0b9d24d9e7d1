"""Model: the image towers (ViT, ResNet), the text tower, CLIP's tokeniser, OpenAI's weights.

    python model.py                      # every model: its name, sizes and number of parameters
    python model.py export runs/clip clip.pt    # a run's weights, for programs that read CLIP's

Papers: FILIP 3.1, A.2, Table 7; PyramidCLIP 3.1, 3.3, A.2, Figure 6; SPARC 2, D.1, D.3, D.7.
Parameter names are OpenAI CLIP's: load_openai(path) reads its weights, and its code reads ours.

v, V: a picture and its patches; t, T: a text and its tokens; v_r: a picture as a detector sees it.
B images, C texts, P patches, L positions of a text, D dimension of the shared space, w width of a
tower. Parts of both towers: B sequences of N positions.
pool="cls" (CLIP, FILIP, PyramidCLIP): v is of a [CLS] token before the patches, t of EOT; causal.
pool="mean" (SPARC): v = g_v(h_v(mean of f_v)), t = g_t(mean of f_t over real tokens).

What differs from the papers:
SPARC. h_v, "a single non-linear layer", is linear and GELU. It does not say whether the text tower
    is causal: here not. Appendix C leaves h_v out and averages padding too: we do neither. ln_pre
    and a patch embedding without bias are CLIP's.
PyramidCLIP. As its released model: BatchNorm and activation after each of LeFF's layers; a norm on
    regions; before them [CLS] (ViT) or their mean (ResNet), not a random vector. Ours: padding
    among regions is masked, and both crops pass BatchNorm at once.
FILIP. A.2 does not say how positions follow a larger image: here bicubic.
PACL. e_v is written from others' descriptions, not from PACL's paper.
Ours, for CPUs: `tiny`, two layers of SPARC's towers, whose patches see their neighbours alone and
    words what stands before them, for scenes; `small`, a small ResNet, for some thousand photos.
"""
import argparse, gzip, heapq, html, math, os, pickle, zipfile
from collections import Counter, OrderedDict, defaultdict
from typing import NamedTuple
import torch, torch.nn as nn, torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

DEVICES = ("auto", "cpu", "cuda", "mps")


class UserError(Exception):
    """Something the user can put right: one sentence that says what and how."""


def write(path, save):
    """Write a file as a whole or not at all: save(a binary file), then rename. Else UserError."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"can't write {path} ({str(e).splitlines()[0]}): free some space or choose "
                        "another place; what was there before is kept") from None


def pick_device(name="auto"):
    """One of DEVICES -> cpu, cuda (ROCm too) or mps (Apple). UserError: no such device is there."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if cuda else "cpu"
    if not {"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}[name]:
        raise UserError(f"--device {name}: this PyTorch finds no such GPU; use --device cpu")
    return name


class Config(NamedTuple):
    """All settings of a model: model.config is the dict of them, and CLIP(**config) builds it."""
    image_size: int                  # height and width, in pixels
    patch_size: int                  # in pixels; of a ResNet, its stride from input to output
    vision_width: int
    vision_layers: int               # of a ResNet, a tuple: the blocks in each stage
    vision_heads: int
    embed_dim: int                   # D
    vocab_size: int
    context_length: int              # the largest L
    text_width: int
    text_layers: int
    text_heads: int
    pool: str                        # "cls" or "mean", see above
    act: str                         # "gelu" or "quickgelu"
    causal: bool = None              # tokens see only what is before them; None: if pool is "cls"
    patches_through_h: bool = False  # patches pass h_v in training too; SPARC: to segment only
    near: tuple = (0,)               # so many rows or columns away patches see, by block; 0: all
    stem: tuple = ()                 # convolutions for patches: the blocks in each stage
    leff: int = 0                    # PyramidCLIP's L_s: so many blocks, from the first, have LeFF
    front: int = None                # regions enter behind so many blocks; None: behind leff
    regions: int = 0                 # numbers of a region, box included; 0: the model takes none
    embedder: bool = False           # PACL's e_v in place of the linear adapter g_v


B32 = dict(image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12)
B16 = B32 | dict(patch_size=16)
L14 = B32 | dict(patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16)
RN50 = B32 | dict(vision_width=64, vision_layers=(3, 4, 6, 3), vision_heads=32)
TEXT = dict(embed_dim=512, vocab_size=49408, context_length=77, text_width=512, text_layers=12,
            text_heads=8, pool="cls", act="quickgelu")
TEXT_L = TEXT | dict(embed_dim=768, text_width=768, text_heads=12)
SPARC = dict(embed_dim=512, vocab_size=32000, context_length=55, text_width=768, text_layers=12,
             text_heads=12, pool="mean", act="gelu")
OURS = SPARC | dict(vision_width=128, vision_heads=2, embed_dim=128, text_layers=2)
CONFIGS = {
    "tiny": OURS | dict(image_size=56, patch_size=8, vision_layers=2, vocab_size=618,
                        context_length=32, text_width=128, text_heads=2, causal=True, near=(2, 1)),
    "small": OURS | dict(image_size=112, patch_size=16, stem=(2, 2, 2), vision_layers=0,
                         vocab_size=4000, context_length=48, text_width=192, text_heads=3),
    "RN50": RN50 | TEXT | dict(embed_dim=1024),
    "ViT-B/32": B32 | TEXT,
    "ViT-B/16": B16 | TEXT,
    "ViT-L/14": L14 | TEXT_L,
    "FILIP-base": B32 | TEXT | dict(embed_dim=256),
    "FILIP-large": L14 | TEXT_L | dict(embed_dim=256),
    "SPARC-ViT-B/32": B32 | SPARC,
    "SPARC-ViT-B/16": B16 | SPARC,
    "SPARC-ViT-L/14": L14 | SPARC,
    "PyramidCLIP-RN50": RN50 | TEXT | dict(embed_dim=1024, regions=2052),
    "PyramidCLIP-ViT-B/32": B32 | TEXT | dict(regions=2052, leff=9),
    "PyramidCLIP-ViT-B/16": B16 | TEXT | dict(regions=2052, leff=9),
}


# --------------------------------------------------------------------------- parts of transformers
class LayerNorm(nn.LayerNorm):
    """Layer normalisation, computed in fp32 (or wider) whatever autocast says."""
    def forward(self, x):
        return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


class QuickGELU(nn.Module):
    """OpenAI CLIP's activation, x sigmoid(1.702 x), by PyTorch's fused silu."""
    def forward(self, x):
        return F.silu(1.702 * x) / 1.702


def masked_mean(x, mask):
    """x (B, N, w), mask (B, N) -> (B, w), the mean over the True positions."""
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def unpack(x, rows, shape):
    """x (n, w), rows (n,) their positions among C L, shape (C, L) -> (C, L, w), elsewhere 0."""
    return x.new_zeros(shape.numel(), x.shape[-1]).index_copy(0, rows, x).view(*shape, -1)


def attend(q, k, v, heads, seen=None):
    """q, k, v (B, N, w), seen as in Attention -> (B, N, w)."""
    q, k, v = [x.unflatten(2, (heads, -1)).transpose(1, 2).contiguous() for x in (q, k, v)]
    if q.device.type != "cpu" or q.shape[2] > 256:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:                                                       # a faster backward on CPUs
        s = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)                         # (B, heads, N, N)
        if seen is not None:
            s = s.masked_fill(~seen, float("-inf"))
        y = s.softmax(-1).to(v.dtype) @ v
    return y.transpose(1, 2).flatten(2)


class Attention(nn.MultiheadAttention):
    """Multi-head self-attention: PyTorch's parameters and initialisation, and a forward of ours."""
    def forward(self, x, seen=None, packed=None):
        """x (B, N, w) -> the same shape. seen: (N, N) or (B, 1, 1, N) bool; None: all see all.
        packed: (rows, (B, N)). x is then (n, w), those rows alone: linear layers skip padding."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        if packed is not None:
            qkv = unpack(qkv, *packed)                                     # (B, N, 3 w)
        y = attend(*qkv.chunk(3, 2), self.num_heads, seen)                 # (B, N, w)
        if packed is not None:
            y = y.flatten(0, 1).index_select(0, packed[0])
        return self.out_proj(y)


class LeFF(nn.Module):
    """PyramidCLIP 3.3: a feed-forward that mixes neighbours on the grid; [CLS] passes unchanged."""
    def __init__(self, width, grid, act):
        super().__init__()
        self.grid, self.act, wide = grid, act(), 4 * width
        self.c_fc, self.bn1 = nn.Linear(width, wide), nn.BatchNorm1d(wide)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.c_proj, self.bn3 = nn.Linear(wide, width), nn.BatchNorm1d(width)

    def forward(self, x):
        """x (B, P or 1 + P, w) -> the same shape."""
        B, g, P = len(x), self.grid, self.grid ** 2
        cls, y = x[:, :-P], x[:, -P:]
        y = self.act(self.bn1(self.c_fc(y).flatten(0, 1)))                 # (B P, 4w)
        y = y.view(B, g, g, -1).permute(0, 3, 1, 2)                        # (B, 4w, g, g)
        y = self.act(self.bn2(self.conv(y)))
        y = self.c_proj(y.flatten(2).transpose(1, 2)).flatten(0, 1)        # (B P, w)
        return torch.cat([cls, self.act(self.bn3(y)).view(B, P, -1)], 1)


class Block(nn.Module):
    """Pre-norm transformer block. With a grid, its feed-forward part is LeFF."""
    def __init__(self, width, heads, act, grid=None):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        if grid:
            self.mlp = LeFF(width, grid, act)
        else:
            self.mlp = nn.Sequential(OrderedDict(
                c_fc=nn.Linear(width, 4 * width), gelu=act(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = LayerNorm(width)

    def forward(self, x, seen=None, packed=None):
        x = x + self.attn(self.ln_1(x), seen, packed)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, the first `leff` of them with LeFF on a grid x grid of patches.
    checkpointing saves memory: backward runs each block again (LeFF's statistics move twice)."""
    def __init__(self, width, layers, heads, act, leff=0, grid=None):
        super().__init__()
        self.checkpointing = False
        act = {"gelu": nn.GELU, "quickgelu": QuickGELU}[act]
        grids = [grid] * leff + [None] * (layers - leff)
        self.resblocks = nn.ModuleList(Block(width, heads, act, g) for g in grids)

    def forward(self, x, seen=(None,), packed=None, first=0):
        """x as in Attention -> the same shape, by the blocks from `first` on. seen: of each block,
        as in Attention; the last one is that of further blocks too."""
        seen = [*seen, *len(self.resblocks) * [seen[-1]]]
        for block, own in [*zip(self.resblocks, seen)][first:]:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, own, packed, use_reentrant=False)
            else:
                x = block(x, own, packed)
        return x


# -------------------------------------------------------------------------------- the image towers
def conv(inside, w, size, stride=1):
    """A size x size convolution and its BatchNorm, for maps with `inside` channels -> with w."""
    return nn.Conv2d(inside, w, size, stride, size // 2, bias=False), nn.BatchNorm2d(w)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, in which a stride is an average pooling."""
    def __init__(self, inside, w, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inside, w, 3, stride)
        self.conv2, self.bn2 = conv(w, w, 3)
        self.downsample = nn.Sequential()
        if stride > 1:
            self.downsample.extend([nn.AvgPool2d(stride), *conv(inside, w, 1)])
        nn.init.zeros_(self.bn2.weight)                                    # starts as its shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


def conv_stem(stages, width):
    """A small ResNet: (B, 3, H, W) -> (B, width, H / s, W / s), s = 2 ** (1 + len(stages))."""
    inside = width >> len(stages) - 1
    layers = [*conv(3, inside, 3, 2), nn.ReLU()]
    for n, blocks in enumerate(stages):
        w = width >> len(stages) - 1 - n                                   # twice the stage before
        layers += [Residual(inside, w, 2), *(Residual(w, w, 1) for _ in range(blocks - 1))]
        inside = w
    return nn.Sequential(*layers)


class VisionTransformer(nn.Module):
    """The encoder f_v with its pooling and its adapter g_v. c: a Config."""
    def __init__(self, c):
        super().__init__()
        w, D, std = c.vision_width, c.embed_dim, c.vision_width ** -0.5
        self.pool, self.patch_size = c.pool, c.patch_size
        self.grid = c.image_size // c.patch_size                           # P = grid x grid
        self.front = c.leff if c.front is None else c.front                # blocks in f1
        if c.stem:
            self.stem = conv_stem(c.stem, w)
        else:
            self.conv1 = nn.Conv2d(3, w, c.patch_size, c.patch_size, bias=False)
        if c.pool == "cls":
            self.class_embedding = nn.Parameter(std * torch.randn(w))
        else:
            self.h_v = nn.Sequential(nn.Linear(w, w), nn.GELU())           # SPARC 2
        N = self.grid ** 2 + (c.pool == "cls")
        self.positional_embedding = nn.Parameter(std * torch.randn(N, w))
        lines = [torch.ones(2 * [self.grid]).tril(n or N).triu(-(n or N)) for n in c.near]
        seen = torch.stack([torch.kron(x, x) for x in lines])              # in a row, a column
        seen = F.pad(seen, [N - self.grid ** 2, 0] * 2, value=1).bool()    # [CLS] sees all, is seen
        self.register_buffer("seen", seen if any(c.near) else None, persistent=False)  # (n, N, N)
        self.ln_pre = LayerNorm(w)
        self.transformer = Transformer(w, c.vision_layers, c.vision_heads, c.act, c.leff, self.grid)
        self.ln_post = LayerNorm(w)
        if c.embedder:
            self.e_v = nn.ModuleDict({"skip": nn.Linear(w, D), "main": nn.Sequential(
                nn.Linear(w, D), nn.ReLU(), nn.Linear(D, D))})
        else:
            self.proj = nn.Parameter(std * torch.randn(w, D))              # g_v
        if c.regions:
            self.phi = nn.Parameter(std * torch.randn(c.regions, w))       # PyramidCLIP 3.3

    def adapter(self, f):
        """f (..., w) -> (..., D): g_v, or PACL's e_v, which is linear + (linear, ReLU, linear)."""
        if hasattr(self, "e_v"):
            return self.e_v["skip"](f) + self.e_v["main"](f)
        return f @ self.proj

    def patches(self, images):
        """images (B, 3, H, W) -> (B, P, w), by the stem, or each patch by a linear map: conv1."""
        if hasattr(self, "stem"):
            return self.stem(images.contiguous(memory_format=torch.channels_last)).flatten(2).mT
        x = F.pixel_unshuffle(images, self.patch_size).flatten(2).mT       # (B, P, 3 s s)
        return F.linear(x, self.conv1.weight.flatten(1))

    def forward(self, images, patches_through_h=False):
        """images (B, 3, H, W) -> v (B, D), V (B, P, D)."""
        x = self.patches(images)                                           # (B, P, w)
        if self.pool == "cls":
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
        seen = (None,) if self.seen is None else self.seen                 # all see all: faster
        x = self.transformer(self.ln_pre(x + self.positional_embedding), seen)
        f = self.ln_post(x)
        if self.pool == "cls":
            y = self.adapter(f)                                            # (B, 1 + P, D)
            return y[:, 0], y[:, 1:]
        v = self.adapter(self.h_v(f.mean(1)))
        return v, self.adapter(self.h_v(f) if patches_through_h else f)

    def encode_regions(self, x, mask):
        """x (B, N, w), mask (B, N) -> v_r (B, D) = f2(x), the blocks from number `front` on."""
        if self.pool == "cls":
            x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
            mask = F.pad(mask, (1, 0), value=True)
        f = self.ln_post(self.transformer(self.ln_pre(x), [mask[:, None, None]], first=self.front))
        if self.pool == "cls":
            return self.adapter(f[:, 0])
        return self.adapter(self.h_v(masked_mean(f, mask)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions. A stride is an average pooling, in branch and shortcut."""
    def __init__(self, inside, w, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inside, w, 1)
        self.conv2, self.bn2 = conv(w, w, 3)
        self.conv3, self.bn3 = conv(w, 4 * w, 1)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = nn.Sequential()
        if inside != 4 * w:
            self.downsample.extend(conv(inside, 4 * w, 1))
        nn.init.zeros_(self.bn3.weight)                                    # starts as its shortcut

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(self.pool(x)))


class AttentionPool(nn.Module):
    """Attention over [mean, cells] -> [picture, patches]. CLIP does not compute the patches."""
    def __init__(self, cells, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(width ** -0.5 * torch.randn(cells + 1, width))
        for name in ("k_proj", "q_proj", "v_proj", "c_proj"):
            layer = nn.Linear(width, embed_dim if name == "c_proj" else width)
            nn.init.normal_(layer.weight, std=width ** -0.5)
            self.add_module(name, layer)

    def forward(self, x, seen=None):
        """x (B, 1 + cells, w), seen as in Attention -> (B, 1 + cells, D)"""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.c_proj(attend(q, k, v, self.heads, seen))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average poolings, attention pooling."""
    def __init__(self, c):
        super().__init__()
        self.grid = c.image_size // 32                                     # P = grid x grid
        width, half, w = c.vision_width, c.vision_width // 2, 32 * c.vision_width
        self.conv1, self.bn1 = conv(3, half, 3, 2)
        self.conv2, self.bn2 = conv(half, half, 3)
        self.conv3, self.bn3 = conv(half, width, 3)
        inside = width
        for n, blocks in enumerate(c.vision_layers):
            stage = [Bottleneck(inside, width << n, 2 if n else 1)]
            inside = 4 * width << n
            stage += [Bottleneck(inside, width << n, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{n + 1}", nn.Sequential(*stage))
        self.attnpool = AttentionPool(self.grid ** 2, w, c.vision_heads, c.embed_dim)
        if c.regions:
            self.phi = nn.Parameter(w ** -0.5 * torch.randn(c.regions, w))
            self.roi_norm = LayerNorm(w)

    def forward(self, images, patches_through_h=False):
        """images (B, 3, H, W) -> v (B, D), V (B, P, D). There is no h_v for patches to pass."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x)))).flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.attnpool.positional_embedding
        y = self.attnpool(x)                                               # (B, 1 + P, D)
        return y[:, 0], y[:, 1:]

    def encode_regions(self, x, mask):
        """x (B, N, w), mask (B, N) -> v_r (B, D) = f2(x): here f2 is the attention pooling."""
        x = self.roi_norm(torch.cat([masked_mean(x, mask)[:, None], x], 1))
        return self.attnpool(x, F.pad(mask, (1, 0), value=True)[:, None, None])[:, 0]


# -------------------------------------------------------------------------------------- both towers
class CLIP(nn.Module):
    """The two towers and logit_scale = ln(1 / temperature). Its arguments are Config's fields."""
    def __init__(self, **config):
        super().__init__()
        c = Config(**config)
        near = (c.near,) if isinstance(c.near, int) else tuple(c.near)     # a number: of all blocks
        c = c._replace(near=near, causal=c.pool == "cls" if c.causal is None else c.causal)
        self.config, self.context_length = c._asdict(), c.context_length
        self.patches_through_h = c.patches_through_h
        resnet = isinstance(c.vision_layers, tuple)
        self.visual = ModifiedResNet(c) if resnet else VisionTransformer(c)
        w, layers = c.text_width, c.text_layers
        self.token_embedding = nn.Embedding(c.vocab_size, w)
        self.transformer = Transformer(w, layers, c.text_heads, c.act)
        self.ln_final = LayerNorm(w)
        # The text tower starts as OpenAI's; the image blocks keep PyTorch's defaults
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(c.context_length, w))
        deep = w ** -0.5 * (2 * layers) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=w ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=deep)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * w) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=deep)
        self.text_projection = nn.Parameter(w ** -0.5 * torch.randn(w, c.embed_dim))       # g_t
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images, patches_through_h=None):
        """images (B, 3, H, W) float, normalised -> v (B, D), V (B, P, D). UserError: another size.
        patches_through_h: V passes h_v too, as to segment (SPARC D.7); None: the model's own."""
        s = self.config["image_size"]
        if images.shape[1:] != (3, s, s):
            raise UserError(f"give images (B, 3, {s}, {s}), not {tuple(images.shape)}")
        if patches_through_h is None:
            patches_through_h = self.patches_through_h
        return self.visual(images, patches_through_h)

    def encode_text(self, ids, mask):
        """ids (C, L) int64, mask (C, L) bool -> t (C, D), T (C, L, D), which is 0 at padding.
        The mask is True up to and including the first EOT. Raises UserError for too long texts."""
        (C, L), most = ids.shape, self.context_length
        if L > most:
            raise UserError(f"{L} tokens, a text has at most {most}: set context_length={most}")
        seen = mask[:, None, None]
        if self.config["causal"]:               # a real token never sees the padding behind it
            seen = torch.ones(L, L, dtype=torch.bool, device=ids.device).tril()
        x = self.token_embedding(ids) + self.positional_embedding[:L]      # (C, L, w)
        n = int(mask.sum())                                                # real tokens in all
        order = mask.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        rows = order[:math.ceil(n / 64) * 64]   # and some padding: few sizes, so memory is at hand
        x = self.transformer(x.flatten(0, 1).index_select(0, rows), [seen], (rows, mask.shape))
        f = unpack(self.ln_final(x[:n]), rows[:n], mask.shape)             # (C, L, w)
        T = f @ self.text_projection
        if self.config["pool"] == "cls":
            return T[torch.arange(C, device=ids.device), mask.sum(1) - 1], T             # at EOT
        return masked_mean(f, mask) @ self.text_projection, T

    def encode_regions(self, R, mask):
        """R (B, N, 2052), mask (B, N) bool -> v_r (B, D). UserError: a model without regions."""
        if not self.config["regions"]:
            raise UserError("this model takes no regions: build it with regions=2052")
        return self.visual.encode_regions(R @ self.visual.phi, mask)

    def forward(self, images, ids, mask, images_l=None, regions=None, regions_mask=None,
                summary=None, summary_mask=None, objects=None, objects_mask=None):
        """-> features: v (B, D), V (B, P, D), t (C, D), T (C, L, D), M (C, L) the mask, scale.
        PyramidCLIP's views add v_l of a local crop, v_r of regions, l_s, l_a of further texts."""
        B = len(images)
        if images_l is not None:
            images = torch.cat([images, images_l])
        v, V = self.encode_image(images)
        t, T = self.encode_text(ids, mask)
        f = {"v": v[:B], "V": V[:B], "t": t, "T": T, "M": mask, "scale": self.logit_scale.exp()}
        if images_l is not None:
            f["v_l"] = v[B:]
        if regions is not None:
            f["v_r"] = self.encode_regions(regions, regions_mask)
        if summary is not None:
            f["l_s"], _ = self.encode_text(summary, summary_mask)
        if objects is not None:
            f["l_a"], _ = self.encode_text(objects, objects_mask)
        return f


@torch.no_grad()
def clamp_scales(module):
    """Keep each learned scale in 1..100, after a step: a clamp in forward would stop at a bound."""
    for name, p in module.named_parameters():
        if "logit_scale" in name or "log_scale" in name:
            p.clamp_(0, math.log(100))


def count(module):
    return sum(p.numel() for p in module.parameters())


def variant(config, overrides):
    """A model like config, with the overrides that are not None. UserError: they do not fit."""
    old = Config(**config)._asdict()
    new = {field: x for field, x in overrides.items() if x not in (None, old[field])}
    c = Config(**old | new)
    of_vits = ("patch_size", "vision_width", "vision_layers", "vision_heads", "pool",
               "patches_through_h", "near", "leff", "front", "embedder")
    wrong = [field for field in new if field in of_vits]
    if wrong and isinstance(old["vision_layers"], tuple):
        raise UserError(f"this is a ResNet, which has no {', '.join(wrong)} to set: take a ViT")
    if c.stem and c.patch_size != 2 << len(c.stem):
        raise UserError(f"a stem of {len(c.stem)} stages has patches of {2 << len(c.stem)} pixels")
    patch, size = c.patch_size, c.image_size
    if size % patch:
        fits = max(patch, size - size % patch)
        raise UserError(f"patches of {patch} pixels do not divide an image of {size}: "
                        f"try an image size of {fits} or {fits + patch}")
    if c.vision_width % c.vision_heads or c.text_width % c.text_heads:
        raise UserError("vision_heads or text_heads do not divide their width: choose width / 64")
    layers = c.vision_layers
    if isinstance(layers, int) and max(c.leff, c.front or 0) > layers:
        raise UserError(f"leff={c.leff}, front={c.front}: choose at most vision_layers={layers}")
    if c.pool not in ("cls", "mean"):
        raise UserError(f"pool is cls or mean, not {c.pool!r}")
    if c.pool == "cls" and (c.patches_through_h or not c.vision_layers):
        raise UserError("patches_through_h, or vision_layers=0, needs pool='mean': no other tower "
                        "has the layer h_v, and without blocks a [CLS] token sees no patch")
    return CLIP(**c._asdict())


def build(name, **overrides):
    """A model by name. overrides: fields of Config to replace. UserError: unknown, or no fit."""
    if name not in CONFIGS:
        raise UserError(f"unknown model {name!r}: choose one of {', '.join(CONFIGS)}")
    unknown = [field for field in overrides if field not in Config._fields]
    if unknown:
        raise UserError(f"no setting {', '.join(unknown)}: choose from {', '.join(Config._fields)}")
    return variant(CONFIGS[name], overrides)


# ------------------------------------------------------------ trained weights, changed or passed on
def resize_positions(x, grid):
    """Positions (N, w) of a square of patches, or (1 + N, w) with [CLS] -> of grid x grid."""
    side = math.isqrt(len(x))                                              # N = side x side
    first, x = x.split([len(x) - side ** 2, side ** 2])
    x = x.T.reshape(1, -1, side, side)                                     # (1, w, side, side)
    x = F.interpolate(x, (grid, grid), mode="bicubic", antialias=True)
    return torch.cat([first, x.flatten(2)[0].T])


def adapt(model, **overrides):
    """A trained model -> one with its weights and other settings; for another image_size positions
    are interpolated. overrides, UserError: as of build."""
    new = variant(model.config, overrides)
    state = model.state_dict()
    [name] = {"visual.positional_embedding", "visual.attnpool.positional_embedding"} & set(state)
    state[name] = resize_positions(state[name], new.visual.grid)
    new.load_state_dict(state, strict=False)
    return new


def export(run, out):
    """Write a run's weights as OpenAI's code reads them. UserError: it knows no such towers."""
    from eval import load_run                   # it is built on this file, so it comes late
    model = load_run(run)[0]
    state = {name: x for name, x in model.state_dict().items()  # without PyramidCLIP's regions
             if not name.startswith(("visual.phi", "visual.roi_norm"))}
    c = model.config
    read = {} if c["stem"] else openai_config(state)
    read |= dict(causal=True, near=(0,), leff=0, embedder=False, stem=())
    wrong = ", ".join(f"{name}={c[name]}" for name in read if c[name] != read[name])
    if wrong:
        raise UserError(f"{run} is not of CLIP's architecture ({wrong}): train ViT-B/32 or RN50")
    write(out, lambda file: torch.save(state, file))
    print(f"written: {out}")


# ---------------------------------------------------------------------------------- the tokeniser
BOS, EOT = "<|startoftext|>", "<|endoftext|>"
WORDS = (  # the published pattern, for the package regex
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
MARKED_WORDS = WORDS.replace(r"\p{L}+", r"\p{L}[\p{L}\p{M}\u200c\u200d]*")  # and vowel signs
MERGES = "bpe_simple_vocab_16e6.txt.gz"
MERGES_URL = "https://raw.githubusercontent.com/openai/CLIP/main/clip/" + MERGES
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BYTES = {b: chr(b) for b in range(ord("!"), 256) if chr(b).isprintable()}
OTHERS = [b for b in range(256) if b not in BYTES]  # these 68 move to code points from 256 on
BYTES |= {b: chr(256 + n) for n, b in enumerate(OTHERS)}


def clean(text):
    """CLIP's cleaning: repair unicode, undo HTML escapes twice, fold white space, lower case."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy is slow, so not for all
        import ftfy
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def word_pattern(text):
    """WORDS or MARKED_WORDS, compiled."""
    import regex
    return regex.compile(text, regex.IGNORECASE)


def find_merges(weights=None):
    """The path of CLIP's merges file, downloaded once if it is nowhere. Raises UserError."""
    cache = os.path.expanduser("~/.cache/clip")
    for folder in (".", os.path.dirname(weights or ""), cache):
        path = os.path.join(folder, MERGES)
        if os.path.isfile(path):
            return path
    try:
        os.makedirs(cache, exist_ok=True)
        torch.hub.download_url_to_file(MERGES_URL, path, MERGES_SHA256)
    except (OSError, RuntimeError) as e:  # no network; not the file with this hash
        raise UserError(f"can't load {MERGES_URL} ({e}): put it into {cache} or beside the "
                        "weights, or use --vocab learn:8000") from None
    return path


class Tokenizer:
    """CLIP's byte-pair encoding. merges: list of "a b" strings, the most important first. Symbols
    are 256 bytes, 256 bytes that end a word, one for each merge, BOS, and EOT, the last id."""
    def __init__(self, merges):
        self.merges = list(merges)
        self.words = word_pattern(WORDS if len(self.merges) == 48894 else MARKED_WORDS)
        pairs = [tuple(m.split()) for m in self.merges]
        self.symbols = [*BYTES.values(), *(c + "</w>" for c in BYTES.values()),
                        *("".join(pair) for pair in pairs), BOS, EOT]
        self.vocab_size = len(self.symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.bos, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.cache = {BOS: [self.bos], EOT: [self.eot]}

    @classmethod
    def clip(cls, path=None, weights=None):
        """The published vocabulary of 49,408 entries, from a file or find_merges'. UserError."""
        if path in (None, "clip", MERGES):
            path = find_merges(weights)
        opener = gzip.open if str(path).endswith(".gz") else open
        try:
            with opener(path, "rt", encoding="utf-8") as f:
                merges = f.read().split("\n")[1:1 + 48894]  # after a note; CLIP ignores the rest
            if [len(m.split()) for m in merges] != [2] * 48894:
                raise ValueError("it has no 48,894 pairs of symbols")
        except (OSError, EOFError, ValueError) as e:
            raise UserError(f"{path} is not CLIP's merges file ({e}): take {MERGES} from the "
                            "repository openai/CLIP, or use --vocab learn:8000") from None
        return cls(merges)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn at most vocab_size entries from an iterable of texts. The most frequent pair is
        merged first, of equal ones the first in the alphabet. UserError if there are too few."""
        if vocab_size < 514:
            raise UserError(f"a vocabulary has bytes and marks, at least 514, not {vocab_size}")
        pattern = word_pattern(MARKED_WORDS)
        counts = Counter(word for text in texts for word in pattern.findall(clean(text)))
        words = [(cls.split(w), n) for w, n in counts.items() if w not in (BOS, EOT)]
        frequency, where, changed = Counter(), defaultdict(set), set()  # where: numbers of words

        def tally(k, symbols, n):
            for pair in zip(symbols, symbols[1:]):
                frequency[pair] += n
                where[pair].add(k)
                changed.add(pair)
        for k, word in enumerate(words):
            tally(k, *word)
        merges, heap = [], []  # the heap keeps what is out of date
        while len(merges) < vocab_size - 514 and (heap or changed):  # else each word is one symbol
            while changed:
                pair = changed.pop()
                heapq.heappush(heap, (-frequency[pair], pair))
            minus_n, best = heapq.heappop(heap)
            if minus_n == 0 or -minus_n != frequency[best]:  # out of date
                continue
            merges.append(" ".join(best))
            for k in where.pop(best):
                symbols, n = words[k]
                words[k] = cls.merge(symbols, best), n
                tally(k, symbols, -n)
                tally(k, *words[k])
        return cls(merges)

    @staticmethod
    def split(word):
        symbols = [BYTES[b] for b in word.encode("utf-8")]
        return symbols[:-1] + [symbols[-1] + "</w>"]

    @staticmethod
    def merge(symbols, pair):
        """The list with each occurrence of the pair made one symbol, from left to right."""
        out = []
        for symbol in symbols:
            if out and (out[-1], symbol) == pair:
                out[-1] += symbol
            else:
                out.append(symbol)
        return out

    def bpe(self, word):
        """Ids of one word (a match of self.words)."""
        if word not in self.cache:
            symbols = self.split(word)
            while known := [p for p in zip(symbols, symbols[1:]) if p in self.rank]:
                symbols = self.merge(symbols, min(known, key=self.rank.get))
            self.cache[word] = [self.ids[s] for s in symbols]
        return self.cache[word]

    def encode(self, text):
        """Ids of a text, without BOS and EOT."""
        return [i for word in self.words.findall(clean(text)) for i in self.bpe(word)]

    def __call__(self, texts, context_length=77):
        """A string or a list -> ids (N, L) int64 and mask (N, L) bool, True up to the first EOT,
        L = context_length. Padding is id 0, as "!" is. Long texts keep L - 1 ids, and EOT."""
        texts = [texts] if isinstance(texts, str) else texts
        L = context_length
        rows = [[self.bos, *self.encode(text)][:L - 1] + [self.eot] for text in texts]
        ids = torch.tensor([row + [0] * (L - len(row)) for row in rows], dtype=torch.int64)
        ids = ids.view(-1, L)                                  # also where there is no text
        end = (ids == self.eot).int().argmax(1, keepdim=True)  # the first of several
        return ids, torch.arange(L) <= end


# ------------------------------------------------------------------------------- OpenAI's weights
class _TensorsOnly(pickle.Unpickler):
    """Reads a TorchScript archive and runs no code: classes become Bags of tensors by name."""
    class Bag(dict):
        def __setstate__(self, state):
            for name, x in state.items():
                if torch.is_tensor(x):
                    self[name] = x
                elif isinstance(x, _TensorsOnly.Bag):
                    self.update({f"{name}.{inner}": y for inner, y in x.items()})

    def __init__(self, archive):
        [self.root] = zipfile.Path(archive).iterdir()
        super().__init__((self.root / "data.pkl").open("rb"))

    def find_class(self, module, name):
        known = dict(HalfStorage=torch.half, FloatStorage=torch.float, LongStorage=torch.long,
                     _rebuild_tensor_v2=self.tensor)
        return known.get(name, self.Bag)

    def tensor(self, flat, offset, size, stride, *_):
        return flat.as_strided(size, stride, offset).clone()

    def persistent_load(self, pid):
        data = bytearray((self.root / "data" / pid[2]).read_bytes())
        return torch.frombuffer(data, dtype=pid[1])


def openai_config(state):
    """The settings of the OpenAI model with this state dict, read off the shapes."""
    def blocks(prefix):
        return len({k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)})
    vocab_size, text_width = state["token_embedding.weight"].shape
    if "visual.layer1.0.conv1.weight" in state:
        width, patch = len(state["visual.layer1.0.conv1.weight"]), 32
        layers, heads = tuple(blocks(f"visual.layer{n}.") for n in (1, 2, 3, 4)), width // 2
        positions = state["visual.attnpool.positional_embedding"]
    else:
        width, _, _, patch = state["visual.conv1.weight"].shape
        layers, heads = blocks("visual.transformer.resblocks."), max(1, width // 64)
        positions = state["visual.positional_embedding"]
    return TEXT | dict(
        image_size=patch * math.isqrt(len(positions)), patch_size=patch, vision_width=width,
        vision_layers=layers, vision_heads=heads, embed_dim=state["text_projection"].shape[1],
        vocab_size=vocab_size, context_length=len(state["positional_embedding"]),
        text_width=text_width, text_layers=blocks("transformer.resblocks."),
        text_heads=max(1, text_width // 64))


def read_weights(path):
    """A checkpoint, state dict or TorchScript archive -> its dict, by no code of the file. Raises
    nearly anything on other files."""
    if zipfile.is_zipfile(path) and any("/code/" in n for n in zipfile.ZipFile(path).namelist()):
        return _TensorsOnly(path).load()
    return torch.load(path, map_location="cpu", weights_only=True)


def openai_model(state):
    """OpenAI CLIP's state dict -> the model in eval mode (for BatchNorm), in fp32."""
    numbers = ("input_resolution", "context_length", "vocab_size")
    state = {name: x.float() for name, x in state.items() if name not in numbers}
    model = CLIP(**openai_config(state))
    model.load_state_dict(state)
    return model.eval()


def load_openai(path):
    """A file with OpenAI CLIP's weights -> the model, see openai_model. UserError: another file."""
    try:
        return openai_model(read_weights(path))
    except Exception as e:                      # readers raise nearly anything on other files
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:150]
        raise UserError(f"can't read {path} ({reason}): give OpenAI CLIP's weights") from None


def main():
    parser = argparse.ArgumentParser(description="List the models and their sizes.")
    parser.add_argument("command", nargs="*", metavar="export RUN OUT", help="write CLIP's layout")
    args = parser.parse_args()
    if args.command:
        if len(args.command) != 3 or args.command[0] != "export":
            parser.error("the command is: export RUN OUT")
        return export(*args.command[1:])
    with torch.device("meta"):                  # shapes without memory
        print(f"{'model':20} {'image tower':>13} {'text tower':>13} {'total':>13}  "
              "image/patch  dim  pooling")
        for name, c in CONFIGS.items():
            model = build(name)
            image, total = count(model.visual), count(model)
            print(f"{name:20} {image:13,} {total - image - 1:13,} {total:13,}  "
                  f"{c['image_size']:5}/{c['patch_size']:<5} {c['embed_dim']:4}  {c['pool']}")


if __name__ == "__main__":
    import model                                # as eval.py knows it, so that UserError is one
    try:
        model.main()
    except model.UserError as e:
        raise SystemExit(f"model.py: {e}")
