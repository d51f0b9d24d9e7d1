"""Tests of model.py: sizes, names, and the weights of OpenAI's files. All towers, LeFF and regions
are compared with short transcriptions, written with torch.nn.functional.

    pytest tests/test_model.py                   # half a minute on one core
    pytest tests/test_model.py -k regions
"""
import copy
import functools
import math
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from model import (CLIP, CONFIGS, Attention, LayerNorm, LeFF, QuickGELU, Transformer, UserError,
                   _TensorsOnly, adapt, build, clamp_scales, count, export, load_openai,
                   openai_model, resize_positions)

ROOT = pathlib.Path(__file__).parent.parent
SMALL = dict(image_size=32, patch_size=8, vision_width=32, vision_layers=2, vision_heads=4,
             embed_dim=24, vocab_size=50, context_length=12, text_width=48, text_layers=2,
             text_heads=6)
SMALL_RESNET = dict(image_size=64, patch_size=32, vision_width=8, vision_layers=(1, 2, 1, 1),
                    vision_heads=4, embed_dim=24, vocab_size=50, context_length=12, text_width=128,
                    text_layers=2, text_heads=2, pool="cls", causal=True, patches_through_h=False,
                    act="quickgelu")
EOT = 49


def small(kind, **more):
    """A small model: a ViT with pool "cls" or "mean", or "resnet"."""
    if kind == "resnet":
        return copy.deepcopy(small_resnet(**more))
    torch.manual_seed(0)
    name = {"cls": "ViT-B/32", "mean": "SPARC-ViT-B/32"}[kind]
    return shaken(build(name, **SMALL | more))


@functools.cache
def small_resnet(**more):
    """With statistics of its own, or no signal would reach the end."""
    torch.manual_seed(0)
    model = shaken(CLIP(**SMALL_RESNET | more)).train()
    for _ in range(20):
        model.encode_image(torch.randn(3, 3, 64, 64))
    return model.eval()


def shaken(model):
    """Gains, biases and running statistics become random too.

    A gain of 1 or a bias of 0 would hide a mistake."""
    for p in model.requires_grad_(False).parameters():
        if p.ndim == 1:
            p.add_(torch.randn_like(p) / 4)
    for b in model.buffers():
        if b.is_floating_point():
            b.copy_(b / 8 + torch.rand_like(b) / 4)
    return model.eval()


def captions():
    """Two texts in 12 positions: 6 and 10 real tokens, id 0 among them, random padding, and a
    second EOT in the padding of the first."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (2, 12), generator=g)
    ids[:, 0] = 48
    ids[0, 3] = 0
    ids[0, 5] = ids[0, 8] = ids[1, 9] = EOT
    return ids, torch.arange(12) < torch.tensor([[6], [10]])


def pictures(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def picture_size(kind):
    return {"resnet": 64}.get(kind, 32)


def regions():
    """Regions of three pictures: 5, 3 and 1."""
    R = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(3))
    return R, torch.arange(5) < torch.tensor([[5], [3], [1]])


def under(p, prefix):
    """The part of a state dict whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol)


# --------------------------------------------------------------------------------------- importing
def test_import_needs_torch_only():
    """`import model` works where no other package and no other file of the project is found."""
    allowed = ("model", "torch")
    others = [path.stem for path in ROOT.glob("*.py") if path.stem not in allowed]
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {others + ["ftfy", "regex", "PIL", "tqdm", "numpy", "pytest"]}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
import model
assert model.count(model.build("tiny")) > 0
try:
    import data
except ModuleNotFoundError:
    print("torch only")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch only"


# --------------------------------------------------------------------------------- sizes and names
def sparc(vit, width, dim):
    """SPARC's tower from CLIP's: no [CLS] and no position for it, h_v on top, an adapter to 512
    numbers. Text: 12 blocks of 768."""
    visual = vit - 2 * width + (width + 1) * width + width * (512 - dim)
    text = (32000 + 55 + 2 + 512) * 768 + 12 * (12 * 768 ** 2 + 13 * 768)
    return visual, text, visual + text + 1


COUNTS = {
    "RN50": (38_316_896, 63_690_240, 102_007_137),                         # as published
    "ViT-B/32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B/16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L/14": (303_966_208, 123_650_304, 427_616_513),
    "FILIP-base": (87_652_608, 63_297_024, 150_949_633),
    "FILIP-large": (303_441_920, 123_257_088, 426_699_009),
    "PyramidCLIP-RN50": (42_523_488, 63_690_240, 106_213_729),
    "PyramidCLIP-ViT-B/32": (89_798_400, 63_428_096, 153_226_497),
    "PyramidCLIP-ViT-B/16": (88_141_824, 63_428_096, 151_569_921),
    "SPARC-ViT-B/32": sparc(87_849_216, 768, 512),
    "SPARC-ViT-B/16": sparc(86_192_640, 768, 512),
    "SPARC-ViT-L/14": sparc(303_966_208, 1024, 768),
}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("tiny", "small")])
def test_parameter_counts(name):
    with torch.device("meta"):                                             # shapes without memory
        m = build(name)
    image, total = count(m.visual), count(m)
    assert (image, total - image - 1, total) == COUNTS[name]


def test_the_stem_by_hand():
    """`small`: a convolution, then three stages of two residual blocks, each half as fine and twice
    as wide. A patch depends on its surroundings alone."""
    torch.manual_seed(0)
    m = build("small", vocab_size=600).eval()
    assert count(m.visual.stem) == 696_416
    x = torch.randn(2, 3, 112, 112)
    first, stages = m.visual.stem[:3], m.visual.stem[3:].children()
    y = F.relu(F.batch_norm(F.conv2d(x, first[0].weight, stride=2, padding=1),
                            torch.zeros(32), torch.ones(32)))
    torch.testing.assert_close(first(x), y)
    for n, block in enumerate(stages):
        nn.init.normal_(block.bn2.weight)                                  # it starts at 0
        w, stride = 32 << n // 2, 2 - n % 2
        inner = F.conv2d(y, block.conv1.weight, stride=stride, padding=1) / (1 + 1e-5) ** 0.5
        inner = F.conv2d(inner.relu(), block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
        if stride == 2:
            y = F.conv2d(F.avg_pool2d(y, 2), block.downsample[1].weight) / (1 + 1e-5) ** 0.5
        y = (inner * block.bn2.weight[:, None, None] + y).relu()
        assert y.shape[1:] == (w, 56 >> n // 2 + 1, 56 >> n // 2 + 1)
    torch.testing.assert_close(m.visual.patches(x), y.flatten(2).transpose(1, 2),
                               rtol=1e-3, atol=1e-4)
    v, V = m.encode_image(x)
    assert v.shape == (2, 128) and V.shape == (2, 49, 128)
    x[:, :, 96:, 96:] = 0                                                  # the last patch
    torch.testing.assert_close(m.encode_image(x)[1][:, 0], V[:, 0])
    assert not torch.allclose(m.encode_image(x)[1][:, -1], V[:, -1], atol=0.01)


@pytest.mark.parametrize("more, sentence", [
    ({"patch_size": 8}, "a stem of 3 stages has patches of 16 pixels"),
    ({"pool": "cls"}, "without blocks a .CLS. token sees no patch"),
    ({"image_size": 100}, "patches of 16 pixels do not divide an image of 100")])
def test_what_does_not_fit_a_stem(more, sentence):
    with pytest.raises(UserError, match=sentence):
        build("small", **more)
    assert build("small", pool="cls", vision_layers=1).visual.class_embedding.shape == (128,)


def shapes_of(name):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build(name).state_dict().items()}


def test_names_are_openai_clips():
    """Nothing is missing in a ViT, and nothing else is stored."""
    expected = {
        "logit_scale": (), "positional_embedding": (77, 512), "text_projection": (512, 512),
        "token_embedding.weight": (49408, 512), "ln_final.weight": (512,), "ln_final.bias": (512,),
        "visual.ln_pre.weight": (768,), "visual.ln_pre.bias": (768,),
        "visual.ln_post.weight": (768,), "visual.ln_post.bias": (768,),
        "visual.class_embedding": (768,), "visual.positional_embedding": (50, 768),
        "visual.proj": (768, 512), "visual.conv1.weight": (768, 3, 32, 32)}
    block = {                                                              # in widths of the tower
        "attn.in_proj_weight": (3, 1), "attn.in_proj_bias": (3,),
        "attn.out_proj.weight": (1, 1), "attn.out_proj.bias": (1,),
        "ln_1.weight": (1,), "ln_1.bias": (1,), "ln_2.weight": (1,), "ln_2.bias": (1,),
        "mlp.c_fc.weight": (4, 1), "mlp.c_fc.bias": (4,),
        "mlp.c_proj.weight": (1, 4), "mlp.c_proj.bias": (1,)}
    for tower, w in (("visual.", 768), ("", 512)):
        for k in range(12):
            for name, shape in block.items():
                full = f"{tower}transformer.resblocks.{k}.{name}"
                expected[full] = tuple(w * x for x in shape)
    assert shapes_of("ViT-B/32") == expected


def resnet_names():
    """OpenAI's names in RN50's image tower."""
    norms = ["bn1", "bn2", "bn3"]
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        norms.append(f"layer{stage}.0.downsample.1")
        for block in range(blocks):
            norms += [f"layer{stage}.{block}.bn{k}" for k in (1, 2, 3)]
    stored = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {f"{norm}.{x}" for norm in norms for x in stored}
    for norm in norms:
        conv = norm.replace("bn", "conv").replace("downsample.1", "downsample.0")
        names.add(f"{conv}.weight")
    names |= {f"attnpool.{k}_proj.{x}" for k in "qkvc" for x in ("weight", "bias")}
    return names | {"attnpool.positional_embedding"}


def test_resnets_names_are_openai_clips():
    vit, resnet = shapes_of("ViT-B/32"), shapes_of("RN50")
    vit_text = {k: s for k, s in vit.items() if not k.startswith("visual.")}
    resnet_text = {k: s for k, s in resnet.items() if not k.startswith("visual.")}
    assert resnet_text == vit_text | {"text_projection": (512, 1024)}
    assert under(resnet, "visual.").keys() == resnet_names()
    assert len(resnet) == 489


def test_leff_and_embedder_sizes():
    with torch.device("meta"):
        plain = build("ViT-B/32").visual
        leff = build("ViT-B/32", leff=3).visual
        embedder = build("ViT-B/32", embedder=True).visual
    assert count(leff) - count(plain) == 3 * 41_472
    has_leff = [isinstance(block.mlp, LeFF) for block in leff.transformer.resblocks]
    assert has_leff == [True] * 3 + [False] * 9
    assert count(embedder.e_v) == 1_050_112
    assert count(embedder) - count(plain) + 768 * 512 == 1_050_112
    assert "proj" not in embedder.state_dict()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_shapes_and_rebuilding(pool):
    m, images, (ids, mask) = small(pool), pictures(), captions()
    out = m(images[:2], ids, mask)
    assert {k: tuple(x.shape) for k, x in out.items()} == {
        "v": (2, 24), "V": (2, 16, 24), "t": (2, 24), "T": (2, 12, 24), "M": (2, 12), "scale": ()}
    assert torch.allclose(out["scale"], m.logit_scale.exp())
    again = CLIP(**m.config)                                               # what a checkpoint does
    again.load_state_dict(m.state_dict())
    assert again.config == m.config
    assert again.encode_image(images)[0].equal(m.encode_image(images)[0])
    assert again.encode_text(ids, mask)[0].equal(out["t"])


RESNET_HAS_NO = {"patch_size": 16, "vision_layers": 12, "pool": "mean", "leff": 1, "embedder": True}


@pytest.mark.parametrize("name, override, remedy", [
    ("ViT-B/31", {}, "choose one of .*ViT-B/32"),
    ("tiny", {"depth": 3}, "no setting depth: choose from .*vision_layers"),
    ("tiny", {"image_size": 60}, "8 pixels do not divide an image of 60: try .*56 or 64"),
    ("tiny", {"vision_heads": 3}, "heads do not divide"),
    ("tiny", {"text_heads": 5}, "heads do not divide"),
    ("tiny", {"pool": "max"}, "cls or mean, not 'max'"),
    ("ViT-B/32", {"patches_through_h": True}, "needs pool='mean'"),
    ("RN50", {"image_size": 100}, "try an image size of 96 or 128"),
    ("PyramidCLIP-ViT-B/32", {"vision_layers": 8}, "leff=9, .* at most vision_layers=8"),
    ("tiny", {"leff": 1, "front": 3}, "leff=1, front=3: choose at most vision_layers=2"),
    ("PyramidCLIP-RN50", {"patch_size": 16, "leff": 9},
     "ResNet, which has no patch_size, leff to set"),
    *(("RN50", {k: v}, f"ResNet, which has no {k} to set: take a ViT")
      for k, v in RESNET_HAS_NO.items())])
def test_build_errors(name, override, remedy):
    with pytest.raises(UserError, match=remedy), torch.device("meta"):
        build(name, **override)


@pytest.mark.parametrize("kind", ["cls", "mean", "resnet"])
def test_inputs_that_do_not_fit_are_refused(kind):
    """Pictures of another size, too long texts, and regions without a model for them."""
    m, (ids, mask), (R, seen) = small(kind), captions(), regions()
    size = picture_size(kind)
    with pytest.raises(UserError, match=rf"images \(B, 3, {size}, {size}\), not \(3, 3, 40, 40\)"):
        m.encode_image(pictures(40))
    with pytest.raises(UserError, match="24 tokens, .* at most 12: .*context_length=12"):
        m.encode_text(ids.repeat(1, 2), mask.repeat(1, 2))
    with pytest.raises(UserError, match="takes no regions: build it with regions="):
        m.encode_regions(R, seen)


# ------------------------------------------------------------------------ against transcriptions
@pytest.mark.parametrize("n", [20, 300])
def test_attention_equals_torch(n):
    """Written out up to 256 positions, and torch's fused function from there on."""
    torch.manual_seed(0)
    ours, torchs = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(3, n, 32)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    torchs.load_state_dict(ours.state_dict())                              # the names are the same
    causal = torch.full((n, n), -math.inf).triu(1)
    padding = torch.arange(n) >= torch.tensor([[n], [n - 7], [1]])
    for seen, torchs_mask in ((None, {}), (causal == 0, {"attn_mask": causal}),
                              (~padding[:, None, None], {"key_padding_mask": padding})):
        expected, _ = torchs(x, x, x, need_weights=False, **torchs_mask)
        assert close(ours(x, seen), expected)


def test_attention_starts_as_torchs():
    """The same random numbers give the same weights, so a seed keeps its meaning."""
    torch.manual_seed(5)
    ours = Attention(32, 4).state_dict()
    torch.manual_seed(5)
    torchs = nn.MultiheadAttention(32, 4).state_dict()
    assert all(ours[k].equal(x) for k, x in torchs.items())


def batch_norm(x, p, name, training=False):
    return F.batch_norm(x, p[f"{name}.running_mean"], p[f"{name}.running_var"],
                        p[f"{name}.weight"], p[f"{name}.bias"], training)


def layer_norm(x, p, name):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])


def linear(x, p, name):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def leff(p, x, act, training=False):
    """A class token, if there is one, stays as it is; the patches become channels of a square."""
    g = math.isqrt(x.shape[1])
    cls, y = x[:, :x.shape[1] - g * g], x[:, x.shape[1] - g * g:]
    y = linear(y, p, "c_fc").transpose(1, 2)                               # (B, 4w, P)
    y = act(batch_norm(y, p, "bn1", training)).unflatten(2, (g, g))
    y = F.conv2d(y, p["conv.weight"], padding=1, groups=y.shape[1])
    y = act(batch_norm(y, p, "bn2", training)).flatten(2).transpose(1, 2)
    y = linear(y, p, "c_proj").transpose(1, 2)                             # (B, w, P)
    y = act(batch_norm(y, p, "bn3", training)).transpose(1, 2)
    return torch.cat([cls, y], 1)


def attention_pool(p, query, x, **mask):
    """OpenAI's: torch's function with separate projections. (N, B, w)"""
    q = under(p, "attnpool.")
    biases = torch.cat([q["q_proj.bias"], q["k_proj.bias"], q["v_proj.bias"]])
    weights = {f"{k}_proj_weight": q[f"{k}_proj.weight"] for k in "qkv"}
    return F.multi_head_attention_forward(
        query, x, x, x.shape[-1], 4, None, biases, None, None, False, 0.0, q["c_proj.weight"],
        q["c_proj.bias"], need_weights=False, use_separate_proj_weight=True, **weights, **mask)[0]


def self_attention(p, x, heads, **mask):
    """Torch's function, which wants (N, B, w)."""
    x = x.transpose(0, 1)
    y, _ = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], heads, p["attn.in_proj_weight"], p["attn.in_proj_bias"], None, None,
        False, 0.0, p["attn.out_proj.weight"], p["attn.out_proj.bias"], need_weights=False, **mask)
    return y.transpose(0, 1)


def transformer(p, prefix, x, heads, act, blocks=(0, 1), **mask):
    """Pre-norm blocks, straight from the definition. p: the state dict."""
    for k in blocks:
        q = under(p, f"{prefix}resblocks.{k}.")
        x = x + self_attention(q, layer_norm(x, q, "ln_1"), heads, **mask)
        y = layer_norm(x, q, "ln_2")
        if "mlp.conv.weight" in q:
            x = x + leff(under(q, "mlp."), y, act)
        else:
            x = x + linear(act(linear(y, q, "mlp.c_fc")), q, "mlp.c_proj")
    return x


def quickgelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def activation(pool):
    return {"cls": quickgelu, "mean": F.gelu}[pool]


def adapter(p, f):
    """PACL's e_v where the model has one, else the linear g_v."""
    if "proj" in p:
        return f @ p["proj"]
    y = linear(linear(f, p, "e_v.main.0").relu(), p, "e_v.main.2")
    return linear(f, p, "e_v.skip") + y


def h_v(p, f):
    return F.gelu(linear(f, p, "h_v.0"))


@pytest.mark.parametrize("more", [{}, {"leff": 1}, {"leff": 2}, {"embedder": True}])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_tower(pool, more):
    m, images = small(pool, **more), pictures()
    p = under(m.state_dict(), "visual.")
    x = F.conv2d(images, p["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    if pool == "cls":
        x = torch.cat([p["class_embedding"].expand(3, 1, 32), x], 1)
    x = layer_norm(x + p["positional_embedding"], p, "ln_pre")
    f = layer_norm(transformer(p, "transformer.", x, 4, activation(pool)), p, "ln_post")
    v, V = m.encode_image(images)
    if pool == "cls":                # ln_post and proj on all tokens, then [CLS] is taken out
        assert close(v, adapter(p, f[:, 0])) and close(V, adapter(p, f[:, 1:]))
    else:                            # h_v after the pooling; patches do not pass it
        assert close(v, adapter(p, h_v(p, f.mean(1)))) and close(V, adapter(p, f))


@pytest.mark.parametrize("more", [{}, {"leff": 1}, {"embedder": True}])
def test_patches_through_h(more):
    """For segmentation, or by the model's own setting, patches pass h_v; v stays as it is."""
    m, images = small("mean", **more), pictures()
    p = under(m.state_dict(), "visual.")
    x = F.conv2d(images, p["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = layer_norm(x + p["positional_embedding"], p, "ln_pre")
    f = layer_norm(transformer(p, "transformer.", x, 4, F.gelu), p, "ln_post")
    v, V = m.encode_image(images, patches_through_h=True)
    assert close(V, adapter(p, h_v(p, f))) and close(v, m.encode_image(images)[0])
    always = small("mean", patches_through_h=True, **more)
    assert V.equal(always.encode_image(images)[1])
    assert close(always.encode_image(images, patches_through_h=False)[1], adapter(p, f))


def bottleneck(p, x, stride, downsample):
    y = batch_norm(F.conv2d(x, p["conv1.weight"]), p, "bn1").relu()
    y = batch_norm(F.conv2d(y, p["conv2.weight"], padding=1), p, "bn2").relu()
    y = batch_norm(F.conv2d(F.avg_pool2d(y, stride), p["conv3.weight"]), p, "bn3")
    if downsample:
        x = F.conv2d(F.avg_pool2d(x, stride), p["downsample.0.weight"])
        x = batch_norm(x, p, "downsample.1")
    return (x + y).relu()


def test_resnet():
    m, x = small("resnet"), pictures(64)
    v, V = m.encode_image(x)
    p = under(m.state_dict(), "visual.")
    for k, stride in ((1, 2), (2, 1), (3, 1)):
        x = F.conv2d(x, p[f"conv{k}.weight"], stride=stride, padding=1)
        x = batch_norm(x, p, f"bn{k}").relu()
    x = F.avg_pool2d(x, 2)
    for block, stride, downsample in (("layer1.0.", 1, True), ("layer2.0.", 2, True),
                                      ("layer2.1.", 1, False), ("layer3.0.", 2, True),
                                      ("layer4.0.", 2, True)):
        x = bottleneck(under(p, block), x, stride, downsample)
    x = x.flatten(2).permute(2, 0, 1)                                      # (P, B, w)
    x = torch.cat([x.mean(0, keepdim=True), x]) + p["attnpool.positional_embedding"][:, None]
    assert V.shape == (3, 4, 24)
    assert close(v, attention_pool(p, x[:1], x)[0])                        # OpenAI's query: token 0
    assert close(V, attention_pool(p, x[1:], x).transpose(0, 1))
    assert v.std(0).mean() > 0.02                                          # a signal came through


@pytest.mark.parametrize("training", [False, True])
def test_leff(training):
    torch.manual_seed(0)
    m, x = shaken(LeFF(8, 3, QuickGELU)).train(training), torch.randn(2, 10, 8)
    x[:, 0] *= 99                    # no BatchNorm's statistics see the class token
    p = copy.deepcopy(m.state_dict())
    y = m(x)
    assert close(y, leff(p, x, quickgelu, training)) and y[:, 0].equal(x[:, 0])
    running = {k: b for k, b in m.named_buffers() if "running" in k}
    assert len(running) == 6 and all(close(b, p[k]) for k, b in running.items())
    one_patch = LeFF(8, 1, QuickGELU).train(training)(x[:, :2])
    assert one_patch[:, 0].equal(x[:, 0]) and one_patch.isfinite().all()


def mean_of_real(y):
    """The mean over the real regions only, of which there are 5, 3 and 1."""
    return torch.stack([y[0].mean(0), y[1, :3].mean(0), y[2, 0]])


def expected_regions(kind, p, R, mask, rear):
    """v_r from the definition; rear: the numbers of the blocks in f2."""
    x = R @ p["phi"]
    padding = F.pad(~mask, (1, 0))
    if kind == "resnet":
        x = torch.cat([mean_of_real(x)[:, None], x], 1)
        x = layer_norm(x, p, "roi_norm").transpose(0, 1)
        return attention_pool(p, x[:1], x, key_padding_mask=padding)[0]
    if kind == "cls":
        x = torch.cat([p["class_embedding"].expand(3, 1, 32), x], 1)
    else:
        padding = ~mask
    x = layer_norm(x, p, "ln_pre")
    x = transformer(p, "transformer.", x, 4, activation(kind), rear, key_padding_mask=padding)
    f = layer_norm(x, p, "ln_post")
    if kind == "cls":
        return f[:, 0] @ p["proj"]
    return h_v(p, mean_of_real(f)) @ p["proj"]


REGIONS = [("cls", {"leff": 1}, [1]), ("mean", {"leff": 1}, [1]), ("resnet", {}, []),
           ("cls", {"leff": 0}, [0, 1]), ("mean", {"leff": 0, "front": 1}, [1]),
           ("cls", {"leff": 2}, []), ("mean", {"leff": 2}, [])]


@pytest.mark.parametrize("kind, more, rear", REGIONS)
def test_regions(kind, more, rear):
    """leff is PyramidCLIP's L_s, from none of the blocks to all of them (Figure 6)."""
    m, (R, mask) = small(kind, regions=9, **more), regions()
    v_r = m.encode_regions(R, mask)
    assert close(v_r, expected_regions(kind, under(m.state_dict(), "visual."), R, mask, rear))
    order = [3, 0, 4, 1, 2]          # neither what is padding nor where a region stands counts
    assert close(v_r, m.encode_regions(torch.where(mask[..., None], R, 7), mask))
    assert close(v_r, m.encode_regions(R[:, order], mask[:, order]))


@pytest.mark.parametrize("kind, more, rear", REGIONS)
def test_regions_train_phi_and_f2_alone(kind, more, rear):
    m, (R, mask) = small(kind, regions=9, **more), regions()
    m.requires_grad_(True).encode_regions(R, mask).square().sum().backward()
    used = ("phi", "roi_norm", "attnpool.", "class_embedding", "ln_p", "h_v", "proj")
    used += tuple(f"transformer.resblocks.{k}." for k in rear)
    for name, p in m.visual.named_parameters():
        in_use = name.startswith(used) and name != "attnpool.positional_embedding"
        assert (p.grad is not None) == in_use, name
    behind_all_blocks = kind == "cls" and not rear
    assert m.visual.phi.grad.any() == (not behind_all_blocks)


def test_leff_in_every_block():
    """L_s = 12 of PyramidCLIP's Figure 6: regions enter behind the last block.

    The class token then meets no region, so that all pictures have the same v_r."""
    with torch.device("meta"):
        m = build("PyramidCLIP-ViT-B/32", leff=12)
    assert all(isinstance(block.mlp, LeFF) for block in m.visual.transformer.resblocks)
    assert m.visual.front == 12 == m.config["vision_layers"]
    v_r = small("cls", leff=2, regions=9).encode_regions(*regions())
    assert v_r[0].equal(v_r[1]) and v_r[0].equal(v_r[2])
    v_r = small("mean", leff=2, regions=9).encode_regions(*regions())
    assert not close(v_r[0], v_r[1], 1e-3)


@pytest.mark.parametrize("kind", ["cls", "mean", "resnet"])
def test_further_views_are_as_if_encoded_alone(kind):
    m, images = small(kind, regions=9), pictures(picture_size(kind))
    (ids, mask), (R, seen) = captions(), regions()
    t = ids[:, :10], mask[:, :10]
    l_s = ids.roll(1)[:, :7], torch.arange(7) < torch.tensor([[7], [4]])
    l_a = ids.roll(2), torch.arange(12) < torch.tensor([[3], [12]])
    out = m(images[:2], *t, images[1:], R[:2], seen[:2], *l_s, *l_a)
    v, V = m.encode_image(images[:2])
    expected = {"v": v, "V": V, "v_l": m.encode_image(images[1:])[0], "M": t[1],
                "t": m.encode_text(*t)[0], "T": m.encode_text(*t)[1],
                "l_s": m.encode_text(*l_s)[0], "l_a": m.encode_text(*l_a)[0],
                "v_r": m.encode_regions(R[:2], seen[:2]), "scale": m.logit_scale.exp()}
    assert out.keys() == expected.keys()
    assert m(images[:2], *t).keys() == expected.keys() - {"v_l", "v_r", "l_s", "l_a"}
    assert all(out[k].shape == x.shape and close(out[k], x) for k, x in expected.items())


@pytest.mark.parametrize("pool, causal", [("cls", None), ("mean", None), ("mean", True)])
def test_text_tower(pool, causal):
    m, (ids, mask) = small(pool, causal=causal), captions()
    p = m.state_dict()
    x = p["token_embedding.weight"][ids] + p["positional_embedding"]
    bars = {"key_padding_mask": ~mask}
    if pool == "cls" or causal:
        bars = {"attn_mask": torch.full((12, 12), -math.inf).triu(1)}
    x = transformer(p, "transformer.", x, 6, activation(pool), **bars)
    x = layer_norm(x, p, "ln_final")
    if pool == "mean":
        pooled = torch.stack([x[0, :6].mean(0), x[1, :10].mean(0)])        # over real tokens only
    else:
        pooled = x[[0, 1], [5, 9]]                                         # at the first EOT
    t, T = m.encode_text(ids, mask)
    assert close(T, x @ p["text_projection"] * mask[..., None])            # padding is 0
    assert close(t, pooled @ p["text_projection"])


# ------------------------------------------------------------------------------ what may see what
def test_causal_text_never_looks_ahead():
    m, (ids, mask) = small("cls"), captions()
    t, T = m.encode_text(ids, mask)
    for k in (4, 7, 11):
        other = ids.clone()
        other[:, k] = (other[:, k] + 5) % 48
        T2 = m.encode_text(other, mask)[1]
        assert close(T[:, :k], T2[:, :k], 1e-6)
        assert close(T[:, k:], T2[:, k:], 1e-3) == (not mask[:, k].any())
    assert t.equal(T[[0, 1], [5, 9]])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_padding_changes_nothing(pool):
    m, (ids, mask) = small(pool), captions()
    t, T = m.encode_text(ids, mask)
    g = torch.Generator().manual_seed(9)
    padded = torch.where(mask, ids, torch.randint(0, 50, ids.shape, generator=g))
    t2, T2 = m.encode_text(padded, mask)
    assert close(t, t2) and close(T[mask], T2[mask])
    t3, T3 = m.encode_text(ids[:1, :6], mask[:1, :6])                      # no padding at all
    assert close(t[:1], t3) and close(T[:1, :6], T3)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_no_gradient_flows_into_padding(pool):
    m, (ids, mask) = small(pool).requires_grad_(True), captions()
    real = ids % 40
    t, T = m.encode_text(torch.where(mask, real, 45), mask)
    (t.square().sum() + T.square().sum()).backward()
    used = m.token_embedding.weight.grad.any(1).nonzero()[:, 0]
    assert used.equal(real[mask].unique())
    assert m.positional_embedding.grad.any(1).sum() == 10


@pytest.mark.parametrize("causal", [False, True])
def test_mean_pooled_text_sees_both_ways(causal):
    """The first token's feature depends on a later token, unless the tower is causal."""
    m, (ids, mask) = small("mean", causal=causal), captions()
    other = ids.clone()
    other[0, 4] += 1
    first, changed = m.encode_text(ids, mask)[1][0, 0], m.encode_text(other, mask)[1][0, 0]
    assert close(first, changed) == causal


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("near", [0, 1, 2, 3])
def test_patches_see_their_neighbours(pool, near):
    """By one block a patch depends on the pixels at most `near` rows and columns away; 0: on all.
    The picture's vector depends on all pixels."""
    check_reach(small(pool, near=near, vision_layers=1), near)


def test_each_block_has_its_reach():
    """Of two blocks it adds up, of further ones the last counts; a number is that of all."""
    for near, layers, reach in (((1, 0), 1, 1), ((0, 1), 1, 0), ((1, 1), 2, 2), ((1,), 2, 2),
                                (1, 3, 3), ((2, 1), 2, 3), ((1, 0), 2, 0)):
        check_reach(small("mean", near=near, vision_layers=layers), reach)


def check_reach(m, near):
    images = pictures()
    v, V = m.encode_image(images)
    for row, column in ((0, 0), (1, 2)):
        other = images.clone()
        other[:, :, 8 * row:8 * row + 8, 8 * column:8 * column + 8] += 1
        v2, V2 = m.encode_image(other)
        assert not close(v, v2, 1e-3)
        for p in range(16):
            apart = max(abs(p // 4 - row), abs(p % 4 - column))
            assert close(V[:, p], V2[:, p], 1e-6) == (0 < near < apart), (p, row, column)


def test_neighbours_are_no_weights():
    """They follow from the sizes: files of other values of near, and image sizes, can be read."""
    wide, narrow = small("mean"), small("mean", near=1)
    assert wide.state_dict().keys() == narrow.state_dict().keys()
    assert adapt(narrow, image_size=48).visual.seen.shape == (1, 36, 36)
    assert small("cls", near=1).visual.seen.shape == (1, 17, 17) and wide.visual.seen is None
    with pytest.raises(UserError, match="a ResNet, which has no near"):
        build("RN50", near=2)


# ---------------------------------------------------------------- initialisation, scale, precision
def test_initialisation_of_texts_and_positions():
    torch.manual_seed(0)
    w, layers = 192, 3               # enough numbers to tell each deviation to 5 percent
    m = build("tiny", text_width=w, text_layers=layers, text_heads=3, pool="cls", image_size=128)
    deep = w ** -0.5 * (2 * layers) ** -0.5
    stds = {"token_embedding.weight": 0.02, "positional_embedding": 0.01,
            "text_projection": w ** -0.5, "visual.class_embedding": 128 ** -0.5,
            "visual.positional_embedding": 128 ** -0.5, "visual.proj": 128 ** -0.5}
    for k in range(layers):
        block = f"transformer.resblocks.{k}."
        stds |= {block + "attn.in_proj_weight": w ** -0.5, block + "attn.out_proj.weight": deep,
                 block + "mlp.c_fc.weight": (2 * w) ** -0.5, block + "mlp.c_proj.weight": deep}
    p = dict(m.named_parameters())
    for name, std in stds.items():
        rel = 0.2 if p[name].numel() < 1000 else 0.05
        assert p[name].std().item() == pytest.approx(std, rel=rel), name
    assert m.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)


def test_image_blocks_keep_pytorchs_initialisation():
    """Uniform, with biases."""
    torch.manual_seed(0)
    block = build("tiny", pool="cls").visual.transformer.resblocks[0]
    weight = block.attn.in_proj_weight
    assert weight.abs().max().item() == pytest.approx((6 / (4 * 128)) ** 0.5, rel=0.01)
    assert not block.attn.in_proj_bias.any()
    assert block.mlp.c_fc.weight.abs().max().item() == pytest.approx(128 ** -0.5, rel=0.01)
    assert block.mlp.c_fc.bias.any()


def test_initialisation_of_a_resnet():
    torch.manual_seed(0)
    m = CLIP(**SMALL_RESNET, regions=512).visual                           # attention's width: 256
    projections = [m.attnpool.get_submodule(f"{k}_proj").weight for k in "qkvc"]
    for p in (m.attnpool.positional_embedding, *projections, m.phi):
        assert p.std().item() == pytest.approx(256 ** -0.5, rel=0.05)
    gains = {k: p for k, p in m.named_parameters() if k.endswith("bn3.weight")}
    assert len(gains) == 6                                                 # one of them the stem's
    for name, p in gains.items():    # each block starts as its shortcut
        assert p.any() == (name == "bn3.weight")


def test_scale_is_clamped_in_place():
    m = build("tiny", text_layers=1, vision_layers=1)
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        nn.init.constant_(m.logit_scale, start)
        clamp_scales(m)
        assert m.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_scale_at_the_bound_has_a_gradient():
    """So the scale can come back."""
    m = build("tiny", text_layers=1, vision_layers=1)
    nn.init.constant_(m.logit_scale, math.log(100))
    ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    m(torch.zeros(1, 3, 56, 56), ids, mask)["scale"].backward()
    assert m.logit_scale.grad.item() == pytest.approx(100, rel=1e-4)


def test_layer_norm_is_fp32_under_autocast():
    ln, x = LayerNorm(64), (100 + torch.randn(5, 64)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ln(x)
        m, (ids, mask) = small("mean"), captions()
        features = [*m.encode_image(pictures()), *m.encode_text(ids, mask)]
    assert y.dtype == torch.float32 and close(y, F.layer_norm(x.float(), (64,)), 1e-6)
    assert all(f.isfinite().all() for f in features)


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        m = small("mean").requires_grad_()
        for module in m.modules():
            if isinstance(module, Transformer):
                module.checkpointing = on
        f = m(pictures()[:2], *captions())
        loss = f["V"].sin().sum() + f["T"].sin().sum() + f["v"].sum() + f["t"].sum()
        loss.backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(grads[0][n].equal(grads[1][n]) for n in grads[0])


# --------------------------------------------------------------------------------- OpenAI's weights
def hierarchy(tensors):
    """Modules within modules that hold tensors by their names."""
    root = nn.Identity()
    for name, x in tensors.items():
        m, (*path, last) = root, name.split(".")
        for part in path:
            m = m._modules.setdefault(part, nn.Identity())
        m.register_buffer(last, x)
    return root


def write_archives(state, folder):
    """A state dict, a TorchScript archive, and such an archive with code that nothing could run."""
    torch.save(state, folder / "state.pt")
    torch.jit.save(torch.jit.trace(hierarchy(state), torch.zeros(1)), folder / "traced.pt")
    traced = zipfile.ZipFile(folder / "traced.pt")
    with traced, zipfile.ZipFile(folder / "archive.pt", "w") as archive:
        for name in traced.namelist():
            data = b"raise SystemExit" if "/code/" in name else traced.read(name)
            archive.writestr(name, data)
    return [folder / name for name in ("state.pt", "traced.pt", "archive.pt")]


WIDE = dict(vision_width=128, vision_heads=2, text_width=192, text_heads=3, text_layers=3)


@pytest.mark.filterwarnings("ignore")                               # torch.jit is on its way out
@pytest.mark.parametrize("kind, more", [("cls", WIDE), ("resnet", {})])
def test_openais_weights(kind, more, tmp_path):
    m = small(kind, **more)
    state = {k: v.half() if v.is_floating_point() else v for k, v in m.state_dict().items()}
    m.load_state_dict(state)                                               # rounded as the file is
    numbers = ("input_resolution", "context_length", "vocab_size")
    files = write_archives(state | {k: torch.tensor(7) for k in numbers}, tmp_path)
    images, (ids, mask) = pictures(picture_size(kind)), captions()
    for file in files:
        again = load_openai(file)
        assert again.config == m.config and not again.training
        assert all(p.dtype == torch.float32 for p in again.parameters())
        assert all(v.equal(m.state_dict()[k]) for k, v in again.state_dict().items())
        assert again.encode_image(images)[0].equal(m.encode_image(images)[0])
        assert again.encode_text(ids, mask)[0].equal(m.encode_text(ids, mask)[0])


def test_other_files_are_refused(tmp_path):
    state = small("cls").state_dict()
    less = {k: v for k, v in state.items() if k != "ln_final.bias"}
    files = {"other": {"weight": torch.zeros(3)}, "list": [1], "less": less,
             "flat": dict.fromkeys(state, torch.zeros(3)),
             "sparc": small("mean").state_dict(), "leff": small("cls", leff=1).state_dict()}
    for name, x in files.items():
        torch.save(x, tmp_path / name)
    (tmp_path / "text").write_text("no weights")
    for name in [*files, "text", "missing", "."]:
        with pytest.raises(UserError, match="OpenAI") as e:
            load_openai(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value)
        if name == "less":
            assert "ln_final.bias" in str(e.value)


class Evil:
    """Unpickling it calls a function."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.filterwarnings("ignore")                               # torch's, of protocol 4
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_files_code_is_never_run(protocol, tmp_path):
    ran = tmp_path / "ran"
    plain, saved, archive = (tmp_path / name for name in ("plain", "saved", "archive"))
    for call in ((os.system, (f"touch {ran}",)), (open, (str(ran), "w")),
                 (exec, (f"open({str(ran)!r}, 'w')",))):
        evil = {"logit_scale": Evil(call)}
        plain.write_bytes(pickle.dumps(evil, protocol))
        torch.save(evil, saved, pickle_protocol=max(2, protocol))
        with zipfile.ZipFile(archive, "w") as z:
            z.writestr("a/code/__torch__.py", "")
            z.write(plain, "a/data.pkl")
        for file in (plain, saved, archive):
            with pytest.raises(UserError, match="OpenAI"):
                load_openai(file)
        assert not ran.exists()
        pickle.loads(plain.read_bytes())                                   # another reader runs it
        ran.unlink()


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
    ("torch._utils", "_rebuild_tensor")])
def test_a_files_classes_only_hold_tensors(module, name):
    """Whatever a file names becomes a Bag: no function of that name."""
    found = _TensorsOnly.__new__(_TensorsOnly).find_class(module, name)
    assert found is _TensorsOnly.Bag


# ------------------------------------------------------------------ another program, another size
def seeded_state(kind):
    """Random weights of OpenAI's layout that are the same with every version of PyTorch."""
    state = small(kind, **({} if kind == "resnet" else WIDE)).state_dict()
    random = np.random.RandomState(0)
    for name, x in state.items():
        noise = torch.from_numpy(random.standard_normal(x.shape)).float()
        if name == "logit_scale":
            state[name] = torch.tensor(2.5)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
            state[name] = 1 + noise.abs() / 4
        elif x.ndim == 1:
            state[name] = noise / 8
        else:
            state[name] = noise * (x.numel() / len(x)) ** -0.5
    return {name: x.half().float() for name, x in state.items()}           # as released: in fp16


def seeded_inputs(size):
    images = np.random.RandomState(1).standard_normal((2, 3, size, size))
    return torch.from_numpy(images).float(), captions()


@torch.no_grad()
def open_clips(state, images, ids):
    """The logits by open_clip, whose interpolation of positions knows ViTs' name only."""
    from open_clip import model as other
    [name] = {"visual.positional_embedding", "visual.attnpool.positional_embedding"} & set(state)
    side = images.shape[-1] // (8 if name == "visual.positional_embedding" else 32)
    shell = types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=(side, side)))
    positions = {"visual.positional_embedding": state[name]}
    other.resize_pos_embed(positions, shell)
    state = state | {name: positions["visual.positional_embedding"]}
    m = other.build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float().eval()
    v, t, scale = m(images, ids)
    return scale * v @ t.T


# What open_clips gave with open_clip 3.3.0: two pictures with two texts. The positions belong to
# pictures of 32 (cls) and 64 (resnet) pixels; at the other sizes they are interpolated.
OPEN_CLIP = {
    ("cls", 40): [[1.27814, 1.38866], [1.49976, -0.98987]],
    ("cls", 32): [[0.97276, 0.24453], [0.95231, 0.10063]],
    ("resnet", 96): [[-3.03615, -0.26556], [-3.0301, -0.25095]],
    ("resnet", 64): [[-2.95789, -0.09715], [-2.95108, -0.12219]]}


@torch.no_grad()
def our_logits(state, images, ids, mask):
    m = adapt(openai_model(state), image_size=images.shape[-1]).eval()
    v, t = m.encode_image(images)[0], m.encode_text(ids, mask)[0]
    return m.logit_scale.exp() * F.normalize(v) @ F.normalize(t).T


@pytest.mark.parametrize("kind, size", OPEN_CLIP)
def test_logits_are_those_that_open_clip_gave(kind, size):
    images, text = seeded_inputs(size)
    logits = our_logits(seeded_state(kind), images, *text)
    assert close(logits, torch.tensor(OPEN_CLIP[kind, size]), 1e-4)


@pytest.mark.parametrize("kind, size", OPEN_CLIP)
def test_logits_are_open_clips_where_it_is_installed(kind, size):
    pytest.importorskip("open_clip")
    state, (images, (ids, mask)) = seeded_state(kind), seeded_inputs(size)
    assert close(our_logits(state, images, ids, mask), open_clips(state, images, ids), 1e-4)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("grid", [3, 5, 9])
def test_positions_are_resized_as_pillow_resizes(grid, first):
    x = torch.randn(first + 25, 4, generator=torch.Generator().manual_seed(grid))
    got = resize_positions(x, grid)
    assert got.shape == (first + grid ** 2, 4) and got[:first].equal(x[:first])
    for channel, expected in zip(x[first:].T.view(4, 5, 5), got[first:].T.view(4, grid, grid)):
        im = Image.fromarray(channel.numpy()).resize((grid, grid), Image.Resampling.BICUBIC)
        assert close(expected, torch.from_numpy(np.array(im)), atol=1e-5)


@pytest.mark.parametrize("kind", ["cls", "mean", "resnet"])
def test_a_model_for_images_of_another_size(kind):
    """At its own size nothing changes. At another one all but the positions is the same."""
    m, size = small(kind), picture_size(kind)
    images = pictures(size)
    assert close(adapt(m).eval().encode_image(images)[1], m.encode_image(images)[1])
    larger = adapt(m, image_size=2 * size).eval()
    v, V = larger.encode_image(pictures(2 * size))
    assert V.shape == (3, 4 * m.visual.grid ** 2, 24) and v.isfinite().all()
    differ = [k for k, x in larger.state_dict().items() if not x.equal(m.state_dict().get(k))]
    assert len(differ) == 1 and differ[0].endswith("positional_embedding")
    with pytest.raises(UserError, match="do not divide an image of 100"):
        adapt(m, image_size=100)


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_what_objectives_add_starts_fresh(kind):
    m = small(kind)
    new = adapt(m, regions=20, front=1, embedder=True)
    added = set(new.state_dict()) - set(m.state_dict())
    assert {k.split(".")[1] for k in added} == {"phi", "e_v"}
    assert all(x.equal(m.state_dict()[k]) for k, x in new.state_dict().items() if k not in added)
    assert adapt(new).visual.front == 1                                    # and no setting is lost
    with pytest.raises(UserError, match="ResNet, which has no embedder"):
        adapt(small("resnet"), embedder=True)


def save_run(folder, model):
    """A run folder as train.py leaves it, with an empty vocabulary."""
    folder.mkdir()
    symbols = model.config["vocab_size"] - 514
    torch.save({"config": model.config, "model": model.state_dict(), "head": {}, "step": 1,
                "args": {"loss": "clip"}, "merges": ["a b"] * symbols}, folder / "last.pt")
    return str(folder)


@pytest.mark.parametrize("more", [{}, {"regions": 20, "front": 1}])
def test_an_exported_run_is_an_openai_file(more, tmp_path, capsys):
    m = small("cls", vocab_size=520, **WIDE | more)
    export(save_run(tmp_path / "run", m), str(tmp_path / "out.pt"))
    assert "written: " in capsys.readouterr().out
    again, images = load_openai(tmp_path / "out.pt"), pictures()
    assert again.encode_image(images)[0].equal(m.encode_image(images)[0])
    assert set(torch.load(tmp_path / "out.pt")) == set(small("cls", **WIDE).state_dict())


@pytest.mark.parametrize("kind, more, sentence", [
    ("mean", {}, "pool=mean, act=gelu, causal=False"), ("cls", {"leff": 1}, "leff=1"),
    ("cls", {"act": "gelu"}, "act=gelu"), ("cls", {"vision_heads": 4}, "vision_heads=4"),
    ("cls", {"embedder": True}, "embedder=True"), ("mean", {"stem": (1, 1)}, r"stem=.1, 1."),
    ("cls", {"near": 1}, r"near=.1,.")])
def test_other_towers_are_not_exported(kind, more, sentence, tmp_path):
    """The layout of OpenAI's files says nothing about them, so they would be misread."""
    run = save_run(tmp_path / "run", small(kind, vocab_size=520, **WIDE | more))
    with pytest.raises(UserError, match=sentence):
        export(run, str(tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("words, sentence", [("export none out.pt", "no checkpoint none/last.pt"),
                                             ("export out.pt", "the command is: export RUN OUT")])
def test_the_commands_errors_are_sentences(words, sentence, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "model.py", *words.split()], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode and sentence in done.stderr and "Traceback" not in done.stderr
