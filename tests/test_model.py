"""Tests of model.py: sizes, names, and both towers against short transcriptions written with torch.nn.functional.

    pytest tests/test_model.py            # a few seconds on one core
"""
import math
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from data import UserError
from model import CLIP, CONFIGS, Attention, LayerNorm, build, clamp_scales, count

SMALL = dict(image_size=32, patch_size=8, vision_width=32, vision_layers=2, vision_heads=4, embed_dim=24,
             vocab_size=50, context_length=12, text_width=48, text_layers=2, text_heads=6)
EOT = 49


def small(pool, **more):
    """A small model. Its gains and biases are random too: a gain of 1 or a bias of 0 would hide a mistake."""
    torch.manual_seed(0)
    model = build("ViT-B/32" if pool == "cls" else "SPARC-ViT-B/32", **SMALL, **more).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 1:
            p.add_(torch.randn_like(p) / 4)
    return model


def captions():
    """Two texts in 12 positions: 6 and 10 real tokens, id 0 among them, random padding, and a second EOT in the first one's padding."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 48, (2, 12), generator=g)
    ids[:, 0], ids[0, 3], ids[0, 5], ids[0, 8], ids[1, 9] = 48, 0, EOT, EOT, EOT
    return ids, torch.arange(12) < torch.tensor([[6], [10]])


def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


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
    ("ViT-B/32", {"patches_through_h": True}, "needs pool='mean'")])
def test_build_errors(name, override, remedy):
    with pytest.raises(UserError, match=remedy):
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


def transformer(p, prefix, x, heads, act, **mask):
    """Pre-norm blocks, straight from the definition. p: the state dict."""
    w = x.shape[-1]
    for k in range(2):
        q = {n.removeprefix(f"{prefix}resblocks.{k}."): v for n, v in p.items() if n.startswith(f"{prefix}resblocks.{k}.")}
        y = F.layer_norm(x, (w,), q["ln_1.weight"], q["ln_1.bias"]).transpose(0, 1)                       # torch's function wants (N, B, w)
        y = F.multi_head_attention_forward(y, y, y, w, heads, q["attn.in_proj_weight"], q["attn.in_proj_bias"], None, None, False, 0.0,
                                           q["attn.out_proj.weight"], q["attn.out_proj.bias"], need_weights=False, **mask)[0]
        x = x + y.transpose(0, 1)
        y = F.layer_norm(x, (w,), q["ln_2.weight"], q["ln_2.bias"])
        x = x + F.linear(act(F.linear(y, q["mlp.c_fc.weight"], q["mlp.c_fc.bias"])), q["mlp.c_proj.weight"], q["mlp.c_proj.bias"])
    return x


def quickgelu(x):
    return x / (1 + torch.exp(-1.702 * x))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_image_tower(pool):
    m, images = small(pool), pictures()
    p = {k.removeprefix("visual."): v for k, v in m.state_dict().items() if k.startswith("visual.")}
    x = F.conv2d(images, p["conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    if pool == "cls":
        x = torch.cat([p["class_embedding"].expand(3, 1, 32), x], 1)
    x = F.layer_norm(x + p["positional_embedding"], (32,), p["ln_pre.weight"], p["ln_pre.bias"])
    x = transformer(p, "transformer.", x, 4, quickgelu if pool == "cls" else F.gelu)
    f = F.layer_norm(x, (32,), p["ln_post.weight"], p["ln_post.bias"])
    if pool == "cls":
        expected = f[:, 0] @ p["proj"], f[:, 1:] @ p["proj"]        # ln_post and proj on all tokens, then [CLS] is taken out
    else:
        h_v = lambda y: F.gelu(F.linear(y, p["h_v.0.weight"], p["h_v.0.bias"]))
        expected = h_v(f.mean(1)) @ p["proj"], f @ p["proj"]        # h_v after the pooling; patches pass it only for segmentation
        v, V = m.encode_image(images, patches_through_h=True)
        assert torch.allclose(V, h_v(f) @ p["proj"], atol=1e-5) and torch.allclose(v, expected[0], atol=1e-5)
        assert V.equal(small(pool, patches_through_h=True).encode_image(images)[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(m.encode_image(images), expected))


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
