"""Tests of model.py: sizes, names, and all towers, LeFF and regions against short transcriptions written with torch.nn.functional;
reading OpenAI's weights from every kind of file, and refusing the rest.

    pytest tests/test_model.py            # ten seconds on one core
"""
import copy
import math
import os
import pickle
import zipfile
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import UserError
from model import CLIP, CONFIGS, Attention, LayerNorm, LeFF, QuickGELU, Transformer, _TensorsOnly, build, clamp_scales, count, load_openai

SMALL = dict(image_size=32, patch_size=8, vision_width=32, vision_layers=2, vision_heads=4, embed_dim=24,
             vocab_size=50, context_length=12, text_width=48, text_layers=2, text_heads=6)
EOT = 49


def small(kind, **more):
    """A small model: a ViT with pool "cls" or "mean", or "resnet"."""
    torch.manual_seed(0)
    if kind == "resnet":
        model = shaken(CLIP(64, 32, 8, (1, 2, 1, 1), 4, 24, 50, 12, 128, 2, 2, "cls", True, False, "quickgelu", **more)).train()
        for _ in range(20):                                         # with statistics of its own, or no signal would reach the end
            model.encode_image(torch.randn(3, 3, 64, 64))
        return model.eval()
    return shaken(build("ViT-B/32" if kind == "cls" else "SPARC-ViT-B/32", **SMALL | more))


def shaken(model):
    """Gains, biases and running statistics become random too: a gain of 1 or a bias of 0 would hide a mistake."""
    for p in model.requires_grad_(False).parameters():
        if p.ndim == 1:
            p.add_(torch.randn_like(p) / 4)
    for b in model.buffers():
        if b.is_floating_point():
            b.copy_(b / 8 + torch.rand_like(b) / 4)
    return model.eval()


def captions():
    """Two texts in 12 positions: 6 and 10 real tokens, id 0 among them, random padding, and a second EOT in the first one's padding."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (2, 12), generator=g)
    ids[:, 0], ids[0, 3], ids[0, 5], ids[0, 8], ids[1, 9] = 48, 0, EOT, EOT, EOT
    return ids, torch.arange(12) < torch.tensor([[6], [10]])


def pictures(size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))


def regions():                                                      # of three pictures: 5, 3 and 1
    return torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(3)), torch.arange(5) < torch.tensor([[5], [3], [1]])


def under(p, prefix):
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


# ------------------------------------------------------------------------------------------------------------- sizes and names
def sparc(vit, width, dim):
    """SPARC's tower from CLIP's: no [CLS] and no position for it, h_v on top, an adapter to 512 numbers. Text: 12 blocks of 768."""
    visual = vit - 2 * width + (width + 1) * width + width * (512 - dim)
    text = (32000 + 55 + 2 + 512) * 768 + 12 * (12 * 768 ** 2 + 13 * 768)
    return visual, text, visual + text + 1


COUNTS = {"RN50": (38_316_896, 63_690_240, 102_007_137),
          "PyramidCLIP-RN50": (42_523_488, 63_690_240, 106_213_729), "PyramidCLIP-ViT-B/32": (89_798_400, 63_428_096, 153_226_497),
          "PyramidCLIP-ViT-B/16": (88_141_824, 63_428_096, 151_569_921),
          "ViT-B/32": (87849216, 63428096, 151277313), "ViT-B/16": (86192640, 63428096, 149620737),         # as published
          "ViT-L/14": (303966208, 123650304, 427616513), "FILIP-base": (87652608, 63297024, 150949633),
          "FILIP-large": (303441920, 123257088, 426699009), "SPARC-ViT-B/32": sparc(87849216, 768, 512),
          "SPARC-ViT-B/16": sparc(86192640, 768, 512), "SPARC-ViT-L/14": sparc(303966208, 1024, 768)}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "tiny"])
def test_parameter_counts(name):
    with torch.device("meta"):                                      # shapes without memory
        m = build(name)
    assert (count(m.visual), count(m) - count(m.visual) - 1, count(m)) == COUNTS[name]


def test_names_are_openai_clips():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in build("ViT-B/32").state_dict().items()}
    expected = {
        "logit_scale": (), "positional_embedding": (77, 512), "text_projection": (512, 512), "token_embedding.weight": (49408, 512),
        "ln_final.weight": (512,), "ln_final.bias": (512,), "visual.ln_pre.weight": (768,), "visual.ln_pre.bias": (768,),
        "visual.ln_post.weight": (768,), "visual.ln_post.bias": (768,), "visual.class_embedding": (768,), "visual.proj": (768, 512),
        "visual.positional_embedding": (50, 768), "visual.conv1.weight": (768, 3, 32, 32)}
    block = {"attn.in_proj_weight": (3, 1), "attn.in_proj_bias": (3,), "attn.out_proj.weight": (1, 1), "attn.out_proj.bias": (1,),
             "ln_1.weight": (1,), "ln_1.bias": (1,), "ln_2.weight": (1,), "ln_2.bias": (1,),
             "mlp.c_fc.weight": (4, 1), "mlp.c_fc.bias": (4,), "mlp.c_proj.weight": (1, 4), "mlp.c_proj.bias": (1,)}
    for tower, w in (("visual.", 768), ("", 512)):
        for k in range(12):
            expected |= {f"{tower}transformer.resblocks.{k}.{name}": tuple(w * x for x in shape) for name, shape in block.items()}
    assert shapes == expected                                       # nothing is missing and nothing else is stored


def test_resnets_names_are_openai_clips():
    with torch.device("meta"):
        vit, shapes = ({k: tuple(v.shape) for k, v in build(name).state_dict().items()} for name in ("ViT-B/32", "RN50"))
    text = lambda shapes: {k: s for k, s in shapes.items() if not k.startswith("visual.")}
    assert text(shapes) == text(vit) | {"text_projection": (512, 1024)}
    norms = [f"bn{k}" for k in (1, 2, 3)]
    for n, blocks in enumerate((3, 4, 6, 3), 1):
        norms += [f"layer{n}.{block}.bn{k}" for block in range(blocks) for k in (1, 2, 3)] + [f"layer{n}.0.downsample.1"]
    names = {f"{norm}.{x}" for norm in norms for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    names |= {norm.replace("bn", "conv").replace("downsample.1", "downsample.0") + ".weight" for norm in norms}
    names |= {f"attnpool.{k}_proj.{x}" for k in "qkvc" for x in ("weight", "bias")} | {"attnpool.positional_embedding"}
    assert under(shapes, "visual.").keys() == names and len(shapes) == 489


def test_leff_and_embedder_sizes():
    with torch.device("meta"):
        plain, leff, embedder = (build("ViT-B/32", **more).visual for more in ({}, {"leff": 3}, {"embedder": True}))
    assert count(leff) - count(plain) == 3 * 41_472 and [isinstance(b.mlp, LeFF) for b in leff.transformer.resblocks] == [True] * 3 + [False] * 9
    assert count(embedder.e_v) == 1_050_112 == count(embedder) - count(plain) + 768 * 512 and "proj" not in embedder.state_dict()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_shapes_and_rebuilding(pool):
    m, images, (ids, mask) = small(pool), pictures(), captions()
    out = m(images[:2], ids, mask)
    assert {k: tuple(out[k].shape) for k in ("v", "V", "t", "T", "M", "scale")} == {
        "v": (2, 24), "V": (2, 16, 24), "t": (2, 24), "T": (2, 12, 24), "M": (2, 12), "scale": ()}
    assert torch.allclose(out["scale"], m.logit_scale.exp())
    again = CLIP(**m.config)                                        # what a checkpoint does
    again.load_state_dict(m.state_dict())
    assert again.encode_image(images)[0].equal(m.encode_image(images)[0]) and again.encode_text(ids, mask)[0].equal(out["t"])


@pytest.mark.parametrize("name, override, remedy", [
    ("ViT-B/31", {}, "choose one of .*ViT-B/32"), ("tiny", {"depth": 3}, "no setting depth: choose from .*vision_layers"),
    ("tiny", {"image_size": 60}, "8 pixels do not divide an image of 60: try .*56 or 64"), ("tiny", {"vision_heads": 3}, "heads do not divide"),
    ("tiny", {"text_heads": 5}, "heads do not divide"), ("tiny", {"pool": "max"}, "cls or mean, not 'max'"),
    ("ViT-B/32", {"patches_through_h": True}, "needs pool='mean'"), ("RN50", {"image_size": 100}, "try an image size of 96 or 128"),
    ("PyramidCLIP-ViT-B/32", {"vision_layers": 9}, "9 blocks with LeFF leave none of 9"),
    *(("RN50", {k: v}, f"RN50's image tower is a ResNet, which has no {k} to choose: .*take a ViT") for k, v in
      {"patch_size": 16, "vision_layers": 12, "pool": "mean", "leff": 1, "embedder": True}.items()),
    ("PyramidCLIP-RN50", {"patch_size": 16, "leff": 9}, "PyramidCLIP-RN50's image tower .* no patch_size, leff to choose")])
def test_build_errors(name, override, remedy):
    with pytest.raises(UserError, match=remedy), torch.device("meta"):
        build(name, **override)


# ------------------------------------------------------------------------------------------------- against plain transcriptions
@pytest.mark.parametrize("n", [20, 300])                            # the plain form, and scaled_dot_product_attention beyond 256
def test_attention_equals_torch(n):
    torch.manual_seed(0)
    ours, torchs, x = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(3, n, 32)
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    torchs.load_state_dict(ours.state_dict())                       # the names are the same
    causal = torch.full((n, n), -math.inf).triu(1)
    padding = torch.arange(n) >= torch.tensor([[n], [n - 7], [1]])
    for bias, torch_mask in ((None, {}), (causal, {"attn_mask": causal}),
                             (torch.zeros(3, 1, 1, n).masked_fill(padding[:, None, None], -math.inf), {"key_padding_mask": padding})):
        assert torch.allclose(ours(x, bias), torchs(x, x, x, need_weights=False, **torch_mask)[0], atol=1e-5)


def batch_norm(x, p, name, training=False):
    return F.batch_norm(x, p[f"{name}.running_mean"], p[f"{name}.running_var"], p[f"{name}.weight"], p[f"{name}.bias"], training)


def leff(p, x, act, training=False):
    """A class token, if there is one, stays as it is; the patches become channels of a square."""
    g = math.isqrt(x.shape[1])
    cls, y = x[:, :x.shape[1] - g * g], x[:, x.shape[1] - g * g:]
    y = F.linear(y, p["c_fc.weight"], p["c_fc.bias"]).transpose(1, 2)                                     # (B, 4w, P)
    y = act(batch_norm(y, p, "bn1", training)).unflatten(2, (g, g))
    y = act(batch_norm(F.conv2d(y, p["conv.weight"], padding=1, groups=y.shape[1]), p, "bn2", training)).flatten(2).transpose(1, 2)
    y = act(batch_norm(F.linear(y, p["c_proj.weight"], p["c_proj.bias"]).transpose(1, 2), p, "bn3", training)).transpose(1, 2)
    return torch.cat([cls, y], 1)


def attention_pool(p, query, x, **mask):
    """OpenAI's: torch's function with separate projections. (N, B, w)"""
    q = under(p, "attnpool.")
    return F.multi_head_attention_forward(
        query, x, x, x.shape[-1], 4, None, torch.cat([q["q_proj.bias"], q["k_proj.bias"], q["v_proj.bias"]]), None, None, False, 0.0,
        q["c_proj.weight"], q["c_proj.bias"], need_weights=False, use_separate_proj_weight=True,
        **{f"{k}_proj_weight": q[f"{k}_proj.weight"] for k in "qkv"}, **mask)[0]


def transformer(p, prefix, x, heads, act, blocks=(0, 1), **mask):
    """Pre-norm blocks, straight from the definition. p: the state dict."""
    w = x.shape[-1]
    for k in blocks:
        q = under(p, f"{prefix}resblocks.{k}.")
        y = F.layer_norm(x, (w,), q["ln_1.weight"], q["ln_1.bias"]).transpose(0, 1)                       # torch's function wants (N, B, w)
        y = F.multi_head_attention_forward(y, y, y, w, heads, q["attn.in_proj_weight"], q["attn.in_proj_bias"], None, None, False, 0.0,
                                           q["attn.out_proj.weight"], q["attn.out_proj.bias"], need_weights=False, **mask)[0]
        x = x + y.transpose(0, 1)
        y = F.layer_norm(x, (w,), q["ln_2.weight"], q["ln_2.bias"])
        if "mlp.conv.weight" in q:
            x = x + leff(under(q, "mlp."), y, act)
        else:
            x = x + F.linear(act(F.linear(y, q["mlp.c_fc.weight"], q["mlp.c_fc.bias"])), q["mlp.c_proj.weight"], q["mlp.c_proj.bias"])
    return x


def quickgelu(x):
    return x / (1 + torch.exp(-1.702 * x))


@pytest.mark.parametrize("more", [{}, {"leff": 1}, {"embedder": True}])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_tower(pool, more):
    m, images = small(pool, **more), pictures()
    p = under(m.state_dict(), "visual.")
    g_v = lambda y: y @ p["proj"]
    if "embedder" in more:
        e = under(p, "e_v.")
        g_v = lambda y: (F.linear(y, e["skip.weight"], e["skip.bias"])
                         + F.linear(F.linear(y, e["main.0.weight"], e["main.0.bias"]).relu(), e["main.2.weight"], e["main.2.bias"]))
    x = F.conv2d(images, p["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    if pool == "cls":
        x = torch.cat([p["class_embedding"].expand(3, 1, 32), x], 1)
    x = F.layer_norm(x + p["positional_embedding"], (32,), p["ln_pre.weight"], p["ln_pre.bias"])
    x = transformer(p, "transformer.", x, 4, quickgelu if pool == "cls" else F.gelu)
    f = F.layer_norm(x, (32,), p["ln_post.weight"], p["ln_post.bias"])
    if pool == "cls":
        expected = g_v(f[:, 0]), g_v(f[:, 1:])                      # ln_post and proj on all tokens, then [CLS] is taken out
    else:
        h_v = lambda y: F.gelu(F.linear(y, p["h_v.0.weight"], p["h_v.0.bias"]))
        expected = g_v(h_v(f.mean(1))), g_v(f)                      # h_v after the pooling; patches pass it only for segmentation
        v, V = m.encode_image(images, patches_through_h=True)
        assert torch.allclose(V, g_v(h_v(f)), atol=1e-5) and torch.allclose(v, expected[0], atol=1e-5)
        assert V.equal(small(pool, patches_through_h=True, **more).encode_image(images)[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(m.encode_image(images), expected))


def test_resnet():
    m, x = small("resnet"), pictures(64)
    p, features = under(m.state_dict(), "visual."), m.encode_image(x)
    for k in (1, 2, 3):
        x = batch_norm(F.conv2d(x, p[f"conv{k}.weight"], stride=2 if k == 1 else 1, padding=1), p, f"bn{k}").relu()
    x = F.avg_pool2d(x, 2)
    for block, stride in (("layer1.0.", 1), ("layer2.0.", 2), ("layer2.1.", 1), ("layer3.0.", 2), ("layer4.0.", 2)):
        q = under(p, block)
        y = batch_norm(F.conv2d(x, q["conv1.weight"]), q, "bn1").relu()
        y = F.avg_pool2d(batch_norm(F.conv2d(y, q["conv2.weight"], padding=1), q, "bn2").relu(), stride)
        y = batch_norm(F.conv2d(y, q["conv3.weight"]), q, "bn3")
        if block != "layer2.1.":
            x = batch_norm(F.conv2d(F.avg_pool2d(x, stride), q["downsample.0.weight"]), q, "downsample.1")
        x = (x + y).relu()
    x = x.flatten(2).permute(2, 0, 1)                               # (P, B, w)
    x = torch.cat([x.mean(0, keepdim=True), x]) + p["attnpool.positional_embedding"][:, None]
    v, V = attention_pool(p, x[:1], x)[0], attention_pool(p, x[1:], x).transpose(0, 1)         # OpenAI's query is token 0
    assert V.shape == (3, 4, 24) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(features, (v, V))) and v.std(0).mean() > 0.02


@pytest.mark.parametrize("training", [False, True])
def test_leff(training):
    torch.manual_seed(0)
    m, x = shaken(LeFF(8, 3, QuickGELU)).train(training), torch.randn(2, 10, 8)
    x[:, 0] *= 99                                                   # no BatchNorm's statistics see the class token
    p = copy.deepcopy(m.state_dict())
    y = m(x)
    assert torch.allclose(y, leff(p, x, quickgelu, training), atol=1e-5) and y[:, 0].equal(x[:, 0])
    assert all(torch.allclose(b, p[k], atol=1e-5) for k, b in m.named_buffers() if "running" in k)
    one = LeFF(8, 1, QuickGELU).train(training)(x[:, :2])           # one patch
    assert one[:, 0].equal(x[:, 0]) and one.isfinite().all()


@pytest.mark.parametrize("kind", ["cls", "mean", "resnet"])
def test_regions(kind):
    m, (R, mask) = small(kind, regions=9, **{} if kind == "resnet" else {"leff": 1}), regions()
    p, v_r = under(m.state_dict(), "visual."), m.encode_regions(R, mask)
    x = R @ p["phi"]
    mean = lambda y: torch.stack([y[0].mean(0), y[1, :3].mean(0), y[2, 0]])                    # over real regions only
    norm = lambda y, name: F.layer_norm(y, y.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])
    rear = lambda y, bar, act: norm(transformer(p, "transformer.", norm(y, "ln_pre"), 4, act, [1], key_padding_mask=bar), "ln_post")
    padding = F.pad(~mask, (1, 0))
    if kind == "resnet":
        x = norm(torch.cat([mean(x)[:, None], x], 1), "roi_norm").transpose(0, 1)
        expected = attention_pool(p, x[:1], x, key_padding_mask=padding)[0]
    elif kind == "cls":
        expected = rear(torch.cat([p["class_embedding"].expand(3, 1, 32), x], 1), padding, quickgelu)[:, 0] @ p["proj"]
    else:
        expected = F.gelu(F.linear(mean(rear(x, ~mask, F.gelu)), p["h_v.0.weight"], p["h_v.0.bias"])) @ p["proj"]
    assert torch.allclose(v_r, expected, atol=1e-5)
    order = [3, 0, 4, 1, 2]                                         # neither what is padding nor where a region stands counts
    for R2, mask2 in ((torch.where(mask[..., None], R, 7), mask), (R[:, order], mask[:, order])):
        assert torch.allclose(v_r, m.encode_regions(R2, mask2), atol=1e-5)
    m.requires_grad_(True).encode_regions(R, mask).square().sum().backward()
    names = ("phi", "roi_norm", "attnpool.", "class_embedding", "ln_p", "transformer.resblocks.1.", "h_v", "proj")
    for k, q in m.visual.named_parameters():                        # phi and f2 alone are in use
        assert (q.grad is not None) == (k.startswith(names) and k != "attnpool.positional_embedding"), k
    assert m.visual.phi.grad.any()


@pytest.mark.parametrize("kind", ["cls", "mean", "resnet"])
def test_further_views_are_as_if_encoded_alone(kind):
    m, images, (ids, mask), (R, seen) = small(kind, regions=9), pictures(64 if kind == "resnet" else 32), captions(), regions()
    texts = {k: (ids.roll(n)[:, :L], torch.arange(L) < torch.tensor(real)) for n, (k, L, real) in enumerate(    # beside the captions' 10 positions
        (("t", 10, [[6], [10]]), ("l_s", 7, [[7], [4]]), ("l_a", 12, [[3], [12]])))}
    out = m(images[:2], *texts["t"], images[1:], R[:2], seen[:2], *texts["l_s"], *texts["l_a"])
    expected = {k: m.encode_text(*x)[0] for k, x in texts.items()} | {"T": m.encode_text(*texts["t"])[1], "v_r": m.encode_regions(R[:2], seen[:2])}
    expected |= dict(zip("vV", m.encode_image(images[:2])), v_l=m.encode_image(images[1:])[0], M=texts["t"][1], scale=m.logit_scale.exp())
    assert out.keys() == expected.keys() and m(images[:2], *texts["t"]).keys() == expected.keys() - {"v_l", "v_r", "l_s", "l_a"}
    assert all(out[k].shape == x.shape and torch.allclose(out[k], x, atol=1e-5) for k, x in expected.items())


@pytest.mark.parametrize("pool, causal", [("cls", None), ("mean", None), ("mean", True)])
def test_text_tower(pool, causal):
    m, (ids, mask) = small(pool, causal=causal), captions()
    p = m.state_dict()
    x = p["token_embedding.weight"][ids] + p["positional_embedding"]
    how = {"attn_mask": torch.full((12, 12), -math.inf).triu(1)} if pool == "cls" or causal else {"key_padding_mask": ~mask}
    x = transformer(p, "transformer.", x, 6, quickgelu if pool == "cls" else F.gelu, **how)
    x = F.layer_norm(x, (48,), p["ln_final.weight"], p["ln_final.bias"])
    mean = torch.stack([x[0, :6].mean(0), x[1, :10].mean(0)])       # over real tokens only
    t, T = m.encode_text(ids, mask)
    assert torch.allclose(T, x @ p["text_projection"] * mask[..., None], atol=1e-5)            # padding is 0
    assert torch.allclose(t, (mean if pool == "mean" else x[[0, 1], [5, 9]]) @ p["text_projection"], atol=1e-5)      # the first EOT


# ---------------------------------------------------------------------------------------------------------- what may see what
def test_causal_text_never_looks_ahead():
    m, (ids, mask) = small("cls"), captions()
    t, T = m.encode_text(ids, mask)
    for k in (4, 7, 11):
        other = ids.clone()
        other[:, k] = (other[:, k] + 5) % 48
        T2 = m.encode_text(other, mask)[1]
        assert torch.allclose(T[:, :k], T2[:, :k], atol=1e-6) and torch.allclose(T[:, k:], T2[:, k:], atol=1e-3) == (not mask[:, k].any())
    assert t.equal(T[[0, 1], [5, 9]])


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_padding_changes_nothing(pool):
    m, (ids, mask) = small(pool), captions()
    t, T = m.encode_text(ids, mask)
    padded = torch.where(mask, ids, torch.randint(0, 50, ids.shape, generator=torch.Generator().manual_seed(9)))
    t2, T2 = m.encode_text(padded, mask)
    assert torch.allclose(t, t2, atol=1e-5) and torch.allclose(T[mask], T2[mask], atol=1e-5)
    t3, T3 = m.encode_text(ids[:1, :6], mask[:1, :6])               # and so does none at all
    assert torch.allclose(t[:1], t3, atol=1e-5) and torch.allclose(T[:1, :6], T3, atol=1e-5)
    sum(f.square().sum() for f in m.requires_grad_(True).encode_text(torch.where(mask, ids % 40, 45), mask)).backward()
    assert m.token_embedding.weight.grad.any(1).nonzero()[:, 0].equal((ids % 40)[mask].unique())                    # none flows into it
    assert m.positional_embedding.grad.any(1).sum() == 10


def test_mean_pooled_text_sees_both_ways():
    (ids, mask), other = captions(), captions()[0]
    other[0, 4] += 1
    first = lambda m, i: m.encode_text(i, mask)[1][0, 0]
    for causal in (False, True):
        m = small("mean", causal=causal)
        assert torch.allclose(first(m, ids), first(m, other), atol=1e-5) == causal


# --------------------------------------------------------------------------------------------- initialisation, scale, precision
def test_initialisation():
    torch.manual_seed(0)
    w, layers = 192, 3                                              # enough numbers to tell each deviation to 5 percent
    m = build("tiny", text_width=w, text_layers=layers, text_heads=3, vision_width=128, pool="cls", image_size=128)
    deep = w ** -0.5 * (2 * layers) ** -0.5
    stds = {"token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": w ** -0.5,
            "visual.class_embedding": 128 ** -0.5, "visual.positional_embedding": 128 ** -0.5, "visual.proj": 128 ** -0.5}
    for k in range(layers):
        block = {"attn.in_proj_weight": w ** -0.5, "attn.out_proj.weight": deep, "mlp.c_fc.weight": (2 * w) ** -0.5, "mlp.c_proj.weight": deep}
        stds |= {f"transformer.resblocks.{k}.{name}": std for name, std in block.items()}
    p = dict(m.named_parameters())
    for name, std in stds.items():
        assert p[name].std().item() == pytest.approx(std, rel=0.2 if p[name].numel() < 1000 else 0.05), name
    q = m.visual.transformer.resblocks[0]                           # the image blocks keep PyTorch's own: uniform, with biases
    assert q.attn.in_proj_weight.abs().max().item() == pytest.approx((6 / (4 * 128)) ** 0.5, rel=0.01) and not q.attn.in_proj_bias.any()
    assert q.mlp.c_fc.weight.abs().max().item() == pytest.approx(128 ** -0.5, rel=0.01) and q.mlp.c_fc.bias.any()
    assert m.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    m = CLIP(**small("resnet", regions=512).config).visual          # attention pooling has width 256
    for p in (m.attnpool.positional_embedding, *(m.attnpool.get_submodule(f"{k}_proj").weight for k in "qkvc"), m.phi):
        assert p.std().item() == pytest.approx(256 ** -0.5, rel=0.05)
    gains = {k: p for k, p in m.named_parameters() if k.endswith("bn3.weight")}
    assert len(gains) == 6 and all(p.any() == (k == "bn3.weight") for k, p in gains.items())   # each block starts as its shortcut


def test_scale_is_clamped_in_place():
    m = build("tiny", text_layers=1, vision_layers=1)
    for start, end in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        nn.init.constant_(m.logit_scale, start)
        clamp_scales(m)
        assert m.logit_scale.item() == pytest.approx(end, abs=1e-6)
    nn.init.constant_(m.logit_scale, math.log(100))                 # at the bound the gradient still passes, so the scale can come back
    m(torch.zeros(1, 3, 56, 56), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))["scale"].backward()
    assert m.logit_scale.grad.item() == pytest.approx(100, rel=1e-4)


def test_layer_norm_is_fp32_under_autocast():
    ln, x = LayerNorm(64), (100 + torch.randn(5, 64)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ln(x)
        m, (ids, mask) = small("mean"), captions()
        features = [*m.encode_image(pictures()), *m.encode_text(ids, mask)]
    assert y.dtype == torch.float32 and torch.allclose(y, F.layer_norm(x.float(), (64,)), atol=1e-6)
    assert all(f.isfinite().all() for f in features)


# ------------------------------------------------------------------------------------------------------------- OpenAI's weights
def hierarchy(tensors):
    """Modules within modules that hold tensors by their names."""
    root = nn.Identity()
    for name, x in tensors.items():
        m, (*path, last) = root, name.split(".")
        for part in path:
            m = m._modules.setdefault(part, nn.Identity())
        m.register_buffer(last, x)
    return root


@pytest.mark.filterwarnings("ignore")                               # torch.jit is on its way out
@pytest.mark.parametrize("kind", ["cls", "resnet"])
def test_openais_weights(kind, tmp_path):
    m = small(kind, **{} if kind == "resnet" else dict(vision_width=128, vision_heads=2, text_width=192, text_heads=3, text_layers=3))
    state = {k: v.half() if v.is_floating_point() else v for k, v in m.state_dict().items()}
    m.load_state_dict(state)                                        # rounded as the file is
    state |= {k: torch.tensor(7) for k in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state, tmp_path / "state.pt")
    torch.jit.save(torch.jit.trace(hierarchy(state), torch.zeros(1)), tmp_path / "traced.pt")
    with zipfile.ZipFile(tmp_path / "traced.pt") as traced, zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        for name in traced.namelist():                              # code that nothing could run
            archive.writestr(name, b"raise SystemExit" if "/code/" in name else traced.read(name))
    images, (ids, mask) = pictures(64 if kind == "resnet" else 32), captions()
    for file in ("state.pt", "traced.pt", "archive.pt"):
        again = load_openai(tmp_path / file).eval()
        assert again.config == m.config and all(p.dtype == torch.float32 for p in again.parameters())
        assert all(v.equal(m.state_dict()[k]) for k, v in again.state_dict().items())
        assert again.encode_image(images)[0].equal(m.encode_image(images)[0]) and again.encode_text(ids, mask)[0].equal(m.encode_text(ids, mask)[0])


def test_other_files_are_refused(tmp_path):
    state = small("cls").state_dict()
    (tmp_path / "text").write_text("no weights")
    for name, x in {"other": {"weight": torch.zeros(3)}, "list": [1], "flat": dict.fromkeys(state, torch.zeros(3)), "sparc": small("mean").state_dict(),
                    "less": {k: v for k, v in state.items() if k != "ln_final.bias"}, "leff": small("cls", leff=1).state_dict()}.items():
        torch.save(x, tmp_path / name)
    for name in [*os.listdir(tmp_path), "missing", "."]:
        with pytest.raises(UserError, match="OpenAI") as e:
            load_openai(tmp_path / name)
        assert str(tmp_path / name) in str(e.value) and "\n" not in str(e.value) and (name != "less" or "ln_final.bias" in str(e.value))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_files_code_is_never_run(protocol, tmp_path):
    ran = tmp_path / "ran"
    for call in ((os.system, (f"touch {ran}",)), (open, (str(ran), "w")), (exec, (f"open({str(ran)!r}, 'w')",))):
        evil = {"logit_scale": type("Evil", (), {"__reduce__": lambda self: call})()}
        (tmp_path / "plain").write_bytes(pickle.dumps(evil, protocol))
        torch.save(evil, tmp_path / "saved", pickle_protocol=max(2, protocol))
        with zipfile.ZipFile(tmp_path / "archive", "w") as z:
            z.writestr("a/code/__torch__.py", "")
            z.write(tmp_path / "plain", "a/data.pkl")
        for file in ("plain", "saved", "archive"):
            with pytest.raises(UserError, match="OpenAI"):
                load_openai(tmp_path / file)
        assert not ran.exists()
        pickle.loads((tmp_path / "plain").read_bytes())             # another reader does run it
        ran.unlink()
    for module, name in (("os", "system"), ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch._utils", "_rebuild_tensor")):
        assert _TensorsOnly.__new__(_TensorsOnly).find_class(module, name).__bases__ == (_TensorsOnly.Bag,)      # attributes, no function


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        m = small("mean").requires_grad_()
        for module in m.modules():
            if isinstance(module, Transformer):
                module.checkpointing = on
        f = m(pictures()[:2], *captions())
        (f["V"].sin().sum() + f["T"].sin().sum() + f["v"].sum() + f["t"].sum()).backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and all(grads[0][n].equal(grads[1][n]) for n in grads[0])
