"""Tests of eval.py: each metric against a loop or a case done by hand, and on models that know everything, or nothing.

    pytest tests/test_eval.py
"""
import argparse, itertools, json, os, pathlib, pickle, types
import pytest
import torch
from PIL import Image
import eval as evaluation
from data import BACKGROUNDS, COLOURS, FILLS, SHAPES, SIZES, Scenes, Tokenizer, UserError
from losses import filip_similarity
from model import build

ARGS = dict(loss="sparc", data="scenes", val=None, model="tiny", global_weight=0.5, local_weight=1.0, sigma=None, softmax=False,
            drop_special=False, keep=1.0, gather_dtype="fp32", seed=0)
TOK = Tokenizer.train(Scenes(300).texts(), 1000)
SMALL = dict(vision_width=64, vision_heads=1, vision_layers=1, text_width=64, text_heads=1, text_layers=1, embed_dim=32)


def make_run(folder, **args):
    """A run folder as train.py leaves it, without the training -> its path."""
    torch.manual_seed(0)
    model = build("tiny", vocab_size=TOK.vocab_size, **SMALL)
    folder.mkdir(exist_ok=True)
    torch.save({"config": model.config, "model": model.state_dict(), "head": {}, "merges": TOK.merges, "args": ARGS | args, "step": 1},
               folder / "last.pt")
    return str(folder)


# ------------------------------------------------------------------------------------------------------------------------ retrieval
def recalls(s_i2t, s_t2i, owner):
    return evaluation.retrieval(torch.tensor(s_i2t).float(), torch.tensor(s_t2i).float(), torch.tensor(owner))


def slow_retrieval(s_i2t, s_t2i, owner):
    B, C = s_i2t.shape
    rank_i = [sum(s_i2t[b, c] >= max(s_i2t[b, k] for k in range(C) if owner[k] == b) for c in range(C) if owner[c] != b) for b in range(B)]
    rank_t = [sum(s_t2i[b, c] >= s_t2i[owner[c], c] for b in range(B) if b != owner[c]) for c in range(C)]
    share = lambda rank, k: 100 * sum(int(r) < k for r in rank) / len(rank)
    return {f"{way}_r{k}": share(rank, k) for way, rank in (("i2t", rank_i), ("t2i", rank_t)) for k in (1, 5, 10)}


@pytest.mark.parametrize("captions", [1, 3])
def test_retrieval_is_the_loop(captions):
    g = torch.Generator().manual_seed(captions)
    owner = torch.arange(24).repeat_interleave(captions)[torch.randperm(24 * captions, generator=g)]               # in no order
    a, b = (torch.randint(0, 12, (24, len(owner)), generator=g).float() for _ in range(2))                         # 12 values: many ties
    for s in (a, b):
        s[owner, torch.arange(len(owner))] += torch.randint(0, 8, (len(owner),), generator=g)                      # better than chance
    assert evaluation.retrieval(a, b, owner) == pytest.approx(slow_retrieval(a, b, owner), abs=0.06)


def test_retrieval_by_hand():
    eye = torch.eye(12).tolist()
    assert set(recalls(eye, eye, range(12)).values()) == {100}
    flat = recalls([[0.5] * 12] * 12, [[0.5] * 12] * 12, range(12))
    assert set(flat.values()) == {0}, "a model that tells nothing apart must not score"
    wrong = recalls(torch.eye(12).roll(1, 1).tolist(), eye, range(12))            # each picture likes the next one's text; the rest ties
    assert (wrong["i2t_r1"], wrong["i2t_r10"], wrong["t2i_r1"]) == (0, 0, 100)
    both = recalls([[1, 2], [0, 3]], [[1, 2], [0, 3]], [0, 1])                    # rows and columns of one matrix: picture 0 prefers text 1
    assert (both["i2t_r1"], both["t2i_r1"]) == (50, 100)
    two = recalls([[0, 5, 1], [0, 0, 2]], [[3, 4, 0], [1, 5, 2]], [0, 0, 1])      # one good caption is enough for a picture, not for a text
    assert (two["i2t_r1"], two["t2i_r1"], two["t2i_r5"]) == (100, pytest.approx(200 / 3, abs=0.06), 100)


def test_filip_similarities_by_blocks():
    g = torch.Generator().manual_seed(0)
    V, T = torch.randn(7, 5, 8, generator=g), torch.randn(9, 6, 8, generator=g)
    M = torch.arange(6) < torch.randint(2, 7, (9, 1), generator=g)
    for x, y in zip(evaluation.similarities("filip", None, V, None, T, M, rows=3), filip_similarity(V, T, M)):
        assert torch.allclose(x, y, atol=1e-6)
    s, same = evaluation.similarities("clip", V[:, 0], V, T[:, 0], T, M)
    assert s is same and torch.allclose(s, torch.cosine_similarity(V[:, None, 0], T[None, :, 0], -1), atol=1e-6)


# ------------------------------------------------------------------------------------------- classes and patches
@pytest.mark.parametrize("loss", ["clip", "filip"])
def test_prompts_are_averaged(monkeypatch, loss):
    g, cos = torch.Generator().manual_seed(0), lambda x, y: torch.cosine_similarity(x, y, dim=0).item()
    v, V = torch.randn(50, 6, generator=g), torch.randn(50, 4, 6, generator=g)
    texts = {k: (5 * torch.rand(3, 1, generator=g) * torch.randn(3, 6, generator=g), torch.randn(3, 5, 6, generator=g)) for k in range(4)}
    lengths = torch.tensor([5, 2, 3])
    monkeypatch.setattr(evaluation, "encode_texts", lambda model, tok, k: (*texts[k], torch.arange(5) < lengths[:, None]))

    def score(b, k):                                                 # of picture b and class k
        t, T = texts[k]
        if loss == "clip":
            return cos(v[b], (t / t.norm(dim=1, keepdim=True)).mean(0))
        return sum(max(cos(V[b, p], T[n, l]) for l in range(lengths[n])) for n in range(3) for p in range(4)) / 12
    got = evaluation.classify(loss, None, None, v, V, list(texts)).tolist()
    assert got == [max(texts, key=lambda k: score(b, k)) for b in range(50)] and len(set(got)) == 4


def test_patch_coverage_by_hand():
    masks = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]], [[0] * 4] * 4]).bool().numpy()
    assert evaluation.patch_coverage(masks, 2).tolist() == [[1, 0.25, 0, 0.5], [0] * 4]
    assert evaluation.patch_coverage(masks, 4)[0].tolist() == masks[0].flatten().tolist()


PHRASES = itertools.product(SIZES, FILLS, COLOURS, SHAPES)
AT = {x: k for k, x in enumerate(dict.fromkeys([*SHAPES, *COLOURS, *BACKGROUNDS, *PHRASES]))}


def code(*names):
    out = torch.zeros(len(AT))
    out[[AT[x] for x in names]] = 1
    return out


class Oracle:
    """Stands for a perfect model: patches and tokens carry the colour and shape of their object, v and t also whole phrases.
    spoil(V) is what becomes of a picture's patches."""

    def __init__(self, n, spoil=lambda V: V):
        self.spoil, self.through_h, self.pool, self.context_length = spoil, [], "mean", 32
        self.config, self.visual, self.logit_scale = {"image_size": 56}, types.SimpleNamespace(grid=7), torch.tensor(2.66)
        both = Scenes(n, 0, 56, "test"), Scenes(n, 0, 56, "test", objects=(1, 1), unique=False)
        self.known = {s["image"].tobytes(): s for scenes in both for s in (scenes[i] for i in range(n))}

    def encode_image(self, images, patches_through_h=None):
        self.through_h.append(patches_through_h)
        vs, Vs = [], []
        for x in images:
            s = self.known[x.permute(1, 2, 0).numpy().tobytes()]
            share, thing = evaluation.patch_coverage(s["masks"], 7).max(0)
            things = [code(t.colour, t.shape) for t in s["things"]]
            Vs.append(self.spoil(torch.stack([things[k] if c >= 0.25 else code(s["background"]) for c, k in zip(share, thing)])))
            vs.append(sum(things) + code(*(tuple(t[:4]) for t in s["things"])))
        return torch.stack(vs), torch.stack(Vs)

    def encode_text(self, ids, mask):
        t, T = torch.zeros(len(ids), len(AT)), torch.zeros(*ids.shape, len(AT))
        for n, row in enumerate(ids.tolist()):
            thing = [""] * 4
            for l, word in enumerate(TOK.symbols[i].removesuffix("</w>") for i in row):
                thing = [word if word in kind else old for kind, old in zip((SIZES, FILLS, COLOURS, SHAPES), thing)]
                if word in AT:
                    T[n, l, AT[word]] = 1
                    t[n, AT[word]] += 0.1 if word in BACKGROUNDS else 1                        # v does not know the background
                if word in SHAPES:
                    t[n, AT.get(tuple(thing), 0)] += tuple(thing) in AT                        # a prompt may name the shape alone
                    thing = [""] * 4
        return t, T


def measure(model, loss="sparc", n=80):
    m = evaluation.on_scenes(model, TOK, argparse.Namespace(**ARGS | {"loss": loss}, head=torch.nn.Module()), n, progress=False)
    assert 5 < m["alignment"]["chance"] < 15
    return m


@pytest.mark.parametrize("loss", ["sparc", "filip"])
def test_alignment_of_the_oracle_and_of_shuffled_patches(monkeypatch, loss):
    monkeypatch.setattr(evaluation, "normalize", lambda images: images)             # the oracle knows pictures by their bytes
    assert all(len(TOK.encode(w)) == 1 for w in [*SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *FILLS] if w)
    g = torch.Generator().manual_seed(0)
    oracle = Oracle(80)
    good, bad = measure(oracle, loss), measure(Oracle(80, lambda V: V[torch.randperm(49, generator=g)]), loss)
    assert True in oracle.through_h, "segmentation must ask for patches that went through h_v"
    for k in ("colour_word_acc", "shape_word_acc"):
        assert good["alignment"][k] > 98 and abs(bad["alignment"][k] - bad["alignment"]["chance"]) < 8
    assert good["alignment"]["patch_word_acc"] == good["segmentation"]["patch_acc"] == 100
    assert bad["alignment"]["patch_word_acc"] < 25 and bad["segmentation"]["patch_acc"] < 25
    assert good["segmentation"]["miou"] > 40 > 20 > bad["segmentation"]["miou"]     # patches of 8 pixels are too coarse for more
    assert min(good["classification"].values()) > 98
    if loss == "sparc":
        assert good["composition"]["swap_acc"] == 100
        assert set(good["retrieval"].values()) == {100}
    else:                                                            # its words are a bag: a swapped caption ties, and a tie is no success
        assert good["composition"]["swap_acc"] == 0 and "local_gap" not in good["alignment"]


def test_local_gap():
    g = torch.Generator().manual_seed(0)
    T, M = torch.randn(30, 6, 16, generator=g), torch.arange(6) < torch.randint(3, 7, (30, 1), generator=g)
    t, model = T[:, 0], types.SimpleNamespace(logit_scale=torch.tensor(2.66))
    f = lambda V, loss="sparc": evaluation.local_losses(argparse.Namespace(**ARGS | {"loss": loss}, head=torch.nn.Module()), model, t, V, t, T, M, batch=15)
    matched, shuffled = f(T[:, torch.randperm(6, generator=g)])      # each word has a patch that is its own
    assert matched < 0.3 < shuffled - 0.3
    matched, shuffled = f(T[:1].expand(30, 6, 16))                   # all pictures alike: there is nothing to look at
    assert matched > 0 and shuffled == pytest.approx(matched, abs=1e-5)
    assert f(T, "clip") == f(T, "filip") == (None, None)


# ------------------------------------------------------------------------------------------------------------------- runs and files
def test_evaluate_an_untrained_run(tmp_path):
    folder = make_run(tmp_path / "run")
    m = evaluation.evaluate(folder, n=100, progress=False)
    assert m == json.loads((tmp_path / "run" / "metrics.json").read_text()) and sorted(os.listdir(folder)) == ["last.pt", "metrics.json"]
    contract = {"retrieval": {"i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"}, "classification": {"shape", "colour"},
                "segmentation": {"miou", "patch_acc"}, "composition": {"swap_acc"},
                "alignment": {"colour_word_acc", "shape_word_acc", "patch_word_acc", "local_gap"}}
    assert all(keys <= set(m[g]) for g, keys in contract.items())
    assert all(0 <= x <= 100 for g in contract for k, x in m[g].items() if not k.startswith("local"))
    # it knows nothing; its best patches often lie on some object, which stands out, but seldom on the right one
    assert max(m["retrieval"][k] for k in ("i2t_r1", "t2i_r1")) <= 8 and max(m["classification"].values()) < 40
    assert max(m["alignment"][k] for k in ("colour_word_acc", "shape_word_acc", "patch_word_acc")) < 50 and m["segmentation"]["miou"] < 20
    assert abs(m["alignment"]["local_gap"]) < 0.2 and 20 < m["composition"]["swap_acc"] < 80


def test_five_captions_a_picture(tmp_path, monkeypatch):
    for k in range(3):
        Image.new("RGB", (70, 50), (80 * k, 90, 120)).save(tmp_path / f"{k}.png")
    rows = [f"{k}.png,caption {n} of thing {k}" for n in range(5) for k in range(3)]                               # interleaved
    (tmp_path / "five.csv").write_text("\n".join(["image,caption", *rows]))
    seen, original = [], evaluation.retrieval
    monkeypatch.setattr(evaluation, "retrieval", lambda *a: seen.append(a) or original(*a))
    m = evaluation.evaluate(make_run(tmp_path / "run", loss="filip", data="t.csv", val=str(tmp_path / "five.csv")), progress=False)
    (s_i2t, s_t2i, owner), = seen
    assert s_i2t.shape == s_t2i.shape == (3, 15) and owner.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and not s_i2t.equal(s_t2i)
    assert set(m) == {"retrieval", "cost", "about"} and m["retrieval"]["t2i_r5"] == 100 and m["about"]["data"].endswith("five.csv")


def test_table():
    text = evaluation.table({"sparc": {"retrieval": {"i2t_r1": 12.34}, "alignment": {"local_gap": 0.567}, "about": {"step": 3}},
                             "a-long-name": {"retrieval": {"i2t_r1": 100.0}}})
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.split("\n")]
    assert rows[0] == ["", "sparc", "a-long-name"] and all(set(c) <= set("-:") and len(c) >= 3 for c in rows[1])
    assert rows[2:] == [["retrieval i2t_r1", "12.3", "100.0"], ["alignment local_gap", "0.57", ""]]
    assert len({len(line) for line in text.split("\n")}) == 1


class Code:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_checkpoints_that_cannot_be_read(tmp_path):
    path, marker = tmp_path / "last.pt", tmp_path / "was-executed"
    with pytest.raises(UserError, match="there is no checkpoint.*train.py"):
        evaluation.load_run(str(tmp_path))
    whole = torch.load(make_run(tmp_path / "run") + "/last.pt", weights_only=True)
    torch.save({"config": Code(marker)}, path)
    zipped, plain = path.read_bytes(), pickle.dumps({"config": Code(marker)}, protocol=2)
    for content in (b"garbage" * 99, zipped, plain, (tmp_path / "run" / "last.pt").read_bytes()[:5000], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="last.pt can't be read"):
            evaluation.load_run(str(tmp_path))
    assert not marker.exists(), "reading a checkpoint executed code in it"
    for key in whole:
        torch.save({k: v for k, v in whole.items() if k != key}, path)
        with pytest.raises(UserError, match=f"lacks {key}"):
            evaluation.load_run(str(tmp_path))


def test_what_to_evaluate_on(tmp_path):
    folder = make_run(tmp_path / "run", data="photos/train.csv")
    for data in (None, "scenes"):
        with pytest.raises(UserError, match="photos/train.csv.*--data"):
            evaluation.evaluate(folder, data, progress=False)


def test_cost_is_that_of_table_12():
    """Within 0.7% in every cell but three, whose values did not fit in memory and were computed twice."""
    twice = {("pacl", 16384), ("filip", 16384), ("gloria", 4096)}
    for loss, published in list(evaluation.TABLE_12.items())[1:]:
        for B, paper, clip in zip((2048, 4096, 8192, 16384), published, evaluation.TABLE_12["clip"]):
            model = clip + (evaluation.flops(loss, B) - evaluation.flops("clip", B)) / 1e12
            assert 1.05 < paper / model < 1.25 if (loss, B) in twice else abs(model - paper) < 0.007 * paper + 0.005, (loss, B)   # two decimals are printed
    for loss, B, at in (("filip", 4096, 1), ("filip", 8192, 2), ("pacl", 4096, 1), ("pacl", 8192, 2)):                        # those that fit, without recomputation
        assert evaluation.extra_memory(loss, B) / 1e6 == pytest.approx(evaluation.TABLE_12_MB[loss][at] - evaluation.TABLE_12_MB["clip"][at], rel=0.04)
    assert evaluation.cost_table().count("\n") == 12
    added = evaluation.flops("sparc", 16384) / evaluation.flops("clip", 16384) - 1
    assert 0.004 < added < 0.006                                    # the paper's 0.55%


def test_cost_of_filip_table_5():
    """Fewer dimensions and fewer tokens cost less, as the paper measured, and the model orders the rows as their times do."""
    rows = [line.split() for line in evaluation.filip_table().splitlines()[2:]]
    paper, model, received = [float(r[3]) for r in rows], [float(r[4]) for r in rows], [float(r[6].replace(",", "")) for r in rows]
    assert model[0] == 1 and model[2] == 0.5 and model == sorted(model, reverse=True) and paper == sorted(paper, reverse=True)
    assert received[0] == 7 * 512 * (49 + 77) * 512 * 4 / 2 ** 20 and received[1] == received[0] / 2


def test_cost_counts_the_operations_that_are_run():
    rows = {line.split()[0]: float(line.split()[-1]) for line in evaluation.cost_check(B=4).splitlines()}
    assert abs(rows["towers"] - 1) < 0.002 and abs(rows["filip"] - 1) < 0.002 and 0.88 < rows["sparc"] < 0.9
