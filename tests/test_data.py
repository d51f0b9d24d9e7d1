"""Tests of data.py: the tokeniser, the scenes and their ground truth, the CSV reader, crops and batches.

    pytest tests/test_data.py             # a few seconds on one core

The tokeniser is compared with a slow one written here; what the scenes say is compared with what they draw.
"""
import collections, gzip, hashlib, html, os, pathlib, random, subprocess, sys
import ftfy
import numpy as np
import pytest
import torch
from PIL import Image
from data import (BACKGROUNDS, BOS, BYTES, COLOURS, EOT, FILLS, HELD_OUT, INVERSE, MEAN, SHAPES, SIZES, STD, WORDS, Batches, Pairs, Scenes,
                  Tokenizer, UserError, center_crop, clean, join, normalize, open_dataset, open_image, prompts, random_crop, word_tokens)

PLAIN = Tokenizer([])                                               # bytes only: every letter is a token
TEXT = "the cat sat on the mat, the cats sat; aaaa aaa banana bananas -- that hat! ça coûte 12 €"
CONTENT = {*SHAPES, *COLOURS, *FILLS, *SIZES, *BACKGROUNDS}         # the words that name something
RELATION = {"left", "right", "above", "below"}


# ---------------------------------------------------------------------------------------------------------------- the tokeniser
def test_vocabulary_and_cleaning():
    tok = Tokenizer(["a b", "ab c</w>"])
    assert tok.symbols[0] == "!" and tok.symbols[255] == BYTES[0xAD] and len(set(BYTES.values())) == 256
    assert tok.symbols[256:512] == [s + "</w>" for s in tok.symbols[:256]] and tok.symbols[512:] == ["ab", "abc</w>", BOS, EOT]
    assert (tok.bos, tok.eot, tok.vocab_size, PLAIN.vocab_size) == (514, 515, 516, 514)
    assert tok.encode("ABC\n ab") == [513, tok.ids["a"], tok.ids["b</w>"]]          # "b" and "b</w>" are different symbols
    assert clean("  A  Red\n\tSTAR cafÃ© ") == "a red star café"
    assert clean("< &amp;lt;") == "< <"                              # escapes are undone twice, also where ftfy leaves them for the sake of "<"


@pytest.mark.parametrize("text", ["a red star", "façade naïve zażółć", "fox 🦊 日本 👩‍🚀", "it's 12 o'clock!? <b>", "x &amp;lt; y &amp; z"])
def test_round_trip(text):
    for tok in (PLAIN, Tokenizer.train([TEXT], 540)):
        ids, mask = tok(text)
        assert tok.decode(ids[0]) == tok.decode(tok.encode(text)) == " ".join(WORDS.findall(clean(text)))
        assert ids[0, 0] == tok.bos and ids[0, mask.sum() - 1] == tok.eot


def test_mask_and_truncation():
    ids, mask = PLAIN(["!!!!", "", "a <|endoftext|> b", "abcdef", "abcdefghij"], 8)
    a, b, f, g = (PLAIN.ids[s] for s in ("a</w>", "b</w>", "f</w>", "f"))
    assert ids[0].tolist() == [512, 0, 0, 0, 256, 513, 0, 0]                        # id 0 is "!" as well as padding
    assert ids[2, :5].tolist() == [512, a, 513, b, 513] and PLAIN.decode(ids[2]) == "a"     # the mask ends at the first of two EOTs
    assert ids[3, 6:].tolist() == [f, 513] and ids[4, 6:].tolist() == [g, 513]      # fits exactly; too long: EOT overwrites the last
    assert mask.tolist() == [[k < n for k in range(8)] for n in (6, 2, 3, 8, 8)] and (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def slow_bpe(text, n):
    """Counts every pair of every word afresh for each merge. The most frequent wins, ties go to the first in the alphabet."""
    words, merges = [Tokenizer.split(w) for w in WORDS.findall(clean(text))], []
    while len(merges) < n and (counts := collections.Counter(p for w in words for p in zip(w, w[1:]))):
        a, b = min(counts, key=lambda p: (-counts[p], p))
        merges.append(f"{a} {b}")
        for w in words:
            for i in range(len(w)):                                 # w shrinks meanwhile: a slice beyond its end is just empty
                if w[i:i + 2] == [a, b]:
                    w[i:i + 2] = [a + b]
    return merges


def test_train_equals_slow_bpe():
    r = random.Random(0)                                            # words of two letters: ties and overlapping pairs abound
    ab = " ".join("".join(r.choice("ab") for _ in range(r.randrange(1, 9))) for _ in range(60))
    for text in (TEXT, " ".join(Scenes(40).texts()), ab):
        assert Tokenizer.train(text.split(" "), 514 + 60).merges == slow_bpe(text, 60)
    tok = Tokenizer.train(["cat cat hat"], 5000)                    # stops early: each word is one symbol
    assert tok.merges == slow_bpe("cat cat hat", 5000) == ["a t</w>", "c at</w>", "h at</w>"]
    with pytest.raises(UserError, match="514"):
        Tokenizer.train(["a"], 513)


def test_clip_merges_file(tmp_path):
    lines = ["#version: 0.2", *(f"q{i} z" for i in range(48894))]
    (tmp_path / "full.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "full.txt.gz", "wt") as f:
        f.write("\n".join([*lines, "beyond the end", ""]))          # the published file goes on; CLIP stops reading
    for name in ("full.txt", "full.txt.gz"):
        tok = Tokenizer.clip(tmp_path / name)
        assert (tok.vocab_size, tok.bos, tok.eot, tok.merges[-1]) == (49408, 49406, 49407, "q48893 z")
    (tmp_path / "small.txt").write_text("#version\na b\nab c\n")
    with pytest.raises(UserError, match="small.txt is not CLIP's merges file"):
        Tokenizer.clip(tmp_path / "small.txt")
    with pytest.raises(UserError, match="nowhere.gz.*bpe_simple_vocab_16e6.txt.gz.*openai/CLIP.*--vocab learn"):
        Tokenizer.clip(tmp_path / "nowhere.gz")


# ------------------------------------------------------------------------------------------------------------------- the scenes
def listed(scenes):
    return [scenes[i] for i in range(len(scenes))]


def fingerprint(*sets):
    h = hashlib.sha256()
    for s in sum(map(listed, sets or (Scenes(9, 5), Scenes(4, 5, split="test", mismatch=0.5))), []):
        h.update(s["image"].tobytes() + s["caption"].encode() + repr(s["things"]).encode() + s["masks"].tobytes())
    return h.hexdigest()


def test_same_in_another_process():
    here = pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", "import test_data; print(test_data.fingerprint())"], env=env, capture_output=True, text=True)
    assert run.stdout.strip() == fingerprint(), run.stderr


def test_random_stream_has_not_changed():
    """Words and boxes, no pixels: measured results refer to these very scenes. Change the value only on purpose."""
    S = sum(map(listed, (Scenes(4), Scenes(3, 1, split="val", mismatch=0.5), Scenes(3, size=112, split="composition"))), [])
    told = [(s["caption"], s["paraphrases"], s["swapped"], [tuple(t) for t in s["things"]]) for s in S]
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == "8c830748920c9cf0"


def test_splits():
    assert fingerprint(Scenes(1)) != fingerprint(Scenes(1, seed=1)) != fingerprint(Scenes(1, split="val"))
    for split in ("train", "val", "test", "composition"):
        scenes, ten = Scenes(200, split=split, mismatch=0.5), Scenes(10, split=split, mismatch=0.5)
        specs = [scenes.spec(i) for i in range(200)]
        assert specs[:10] == [ten.spec(i) for i in range(10)]       # the number of scenes does not matter
        assert split == "train" or len({tuple(sorted(t[:4] for t in s["things"])) for s in specs}) == 200         # distinct contents
        for s in specs:
            held = HELD_OUT & {(t.colour, t.shape) for t in s["things"]}
            assert bool(held) == (split == "composition") and s["extra"] not in HELD_OUT
    with pytest.raises(UserError, match="only 36 scenes.*ask for fewer"):           # 6 pairs x 3 fills x 2 sizes
        Scenes(60, split="composition", objects=(1, 1))


@pytest.mark.parametrize("size", [56, 112])
def test_pictures_masks_and_boxes(size):
    for s in listed(Scenes(60, 2, size)):
        px, things, N, covered = np.asarray(s["image"]).astype(int), s["things"], len(s["things"]), np.zeros((size, size), int)
        assert px.shape == (size, size, 3) and s["masks"].shape == (N, size, size) and s["rois"].shape == (N, 2052)
        assert np.allclose(s["boxes"] * size, [t.box for t in things]) and np.array_equal(s["rois"][:, -4:], s["boxes"])
        assert len({t.colour for t in things}) == len({t.shape for t in things}) == N and s["masks"].sum(0).max() == 1
        for t, m in zip(things, s["masks"]):
            x1, y1, x2, y2 = t.box
            assert 0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size and x2 - x1 == y2 - y1 == SIZES[t.size] * (size // 7)
            covered[y1:y2, x1:x2] += 1
            assert m.sum() == m[y1:y2, x1:x2].sum() > 0.2 * (x2 - x1) * (y2 - y1)
            if not t.fill:                                          # jittered by 12; edges are smoothed, and a small star is mostly edge
                assert (abs(px[m] - COLOURS[t.colour]).max(1) <= 13).mean() > 0.45
        base, amount = BACKGROUNDS[s["background"]]
        assert covered.max() == 1 and abs(px[covered == 0] - base).max() <= amount + 1
    for things in (s["things"] for s in listed(Scenes(60, 2, size))):
        sides = [t.box[2] - t.box[0] for t in things]
        assert sides == sorted(sides, reverse=True), f"not the largest first: {things}"


def check_links(s):
    assert join(s["words"]) == s["caption"] and {w.text for w in s["words"]} <= CONTENT | RELATION | {"a", "an", "and", "on", "of"}
    for w in s["words"]:
        assert w.thing < 0 or w.text == getattr(s["things"][w.thing], w.kind)
        assert w.kind != "background" or w.text == s["background"]


def test_every_word_names_its_thing():
    scenes = Scenes(60)
    learned = Tokenizer.train(scenes.texts(), 560)
    for s in listed(scenes):
        check_links(s)
        names = [[x for x in t[:4] if x] for t in s["things"]]
        assert names == [[w.text for w in s["words"] if w.thing == k] for k in range(len(names))]
        assert s["objects"] == ", ".join(map(" ".join, names)) and all(f"{t.colour} {t.shape}" in s["summary"] for t in s["things"])
        for tok in (PLAIN, learned):
            ids, at = tok(s["caption"], 300)[0][0], word_tokens(tok, s["words"])
            assert [tok.decode(ids[p]) for p in at] == [w.text for w in s["words"]]
            assert sum(at, []) == list(range(1, 1 + len(tok.encode(s["caption"]))))


def relations(words):
    """(first thing, relation, second thing) for each relation of a text, things by their index."""
    after = lambda k: next(w.thing for w in words[k:] if w.thing >= 0)
    return [(words[k - 1].thing, w.text + " of" * (w.text in ("left", "right")), after(k)) for k, w in enumerate(words)
            if w.text in RELATION]


def test_relations_paraphrases_and_swaps():
    scenes, found = Scenes(80), set()
    for i, s in enumerate(listed(scenes)):
        told, (first, second) = relations(s["words"]), s["paraphrases"]
        for a, relation, b in told:
            dx, dy = (sum(s["things"][b].box[k::2]) - sum(s["things"][a].box[k::2]) for k in (0, 1))        # twice centre b - centre a
            assert {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[relation]
            assert ("of" in relation) == (abs(dx) > abs(dy)), "it must tell the larger of the two distances"
            found.add(relation)
        words = scenes.words(scenes.spec(i), 1)                     # the first paraphrase tells each relation from the other side
        assert first == join(words) and relations(words) == [(b, INVERSE[relation], a) for a, relation, b in told]
        assert first.startswith("there is a") and second.startswith("a picture of a") and not RELATION & set(second.split())
        same, one, two = ([w for w in text.split() if w in CONTENT] for text in (s["caption"], first, second))
        assert same == two and sorted(same) == sorted(one)
        if len(s["things"]) > 1:
            swap = [w for w in s["swapped"].split() if w in CONTENT]
            x, y = (k for k in range(len(same)) if same[k] != swap[k])
            assert len(same) == len(swap) and (same[x], same[y]) == (swap[y], swap[x]) and {same[x], same[y]} <= set(COLOURS)
    assert found == set(INVERSE) and Scenes(1, objects=(1, 1))[0]["swapped"] is None


def test_mismatches():
    scenes = Scenes(60, objects=(2, 4), mismatch=1.0)
    for i, s in enumerate(listed(scenes)):
        there, (colour, shape) = scenes.spec(i)["things"], scenes.spec(i)["extra"]
        check_links(s)
        assert len(s["things"]) == len(s["boxes"]) == len(s["masks"]) == len(s["rois"]) == len(there) - 1 and set(s["things"]) < set(there)
        assert f" {colour} {shape}" in s["caption"] and all(t.colour != colour and t.shape != shape for t in there)
        assert sum(t.shape not in s["caption"].split() for t in there) == 1         # one object goes unmentioned


def test_prompts():
    assert prompts("pug", ["a photo of a", "art of a"], "a type of pet", "I like it.") == [
        "a photo of a pug, a type of pet. I like it.", "art of a pug, a type of pet. I like it."]                    # FILIP eq. 6
    assert prompts("pug", ["a photo of a"], "I like it") == ["a photo of a pug, I like it"]                          # SPARC eq. 9
    assert prompts("a red star") == ["a red star", "a picture of a red star", "there is a red star"]


# ------------------------------------------------------------------------------------------------------------------ real pictures
def write_csv(folder, text="image,caption\na.png,one\nb.jpg,two\na.png,three\n", encoding="utf-8"):
    for name in ("a.png", "b.jpg"):
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    (folder / "d.csv").write_text(text, encoding=encoding)
    return str(folder / "d.csv")


def refuse(parts, f, *args):
    """f(*args) must raise a UserError of one sentence that holds all parts."""
    with pytest.raises(UserError) as e:
        f(*args)
    assert "\n" not in str(e.value) and ". " not in str(e.value) and all(p in str(e.value) for p in parts), str(e.value)


def test_pairs(tmp_path):
    pairs = open_dataset(write_csv(tmp_path))
    assert len(pairs) == 2 and pairs.captions == [["one", "three"], ["two"]] and pairs.texts() == ["one", "three", "two"]
    r = random.Random(0)
    assert pairs.pair(0)[1] == "one" and {pairs.pair(0, r)[1] for _ in range(20)} == {"one", "three"}
    assert Pairs(write_csv(tmp_path, 'caption,image\n"red, blue",a.png\n', "utf-8-sig")).captions == [["red, blue"]]   # as spreadsheets save it
    for mode in ("L", "RGBA", "P", "1", "LA"):
        Image.new("RGB", (8, 6), "white").convert(mode).save(tmp_path / "x.png")
        im = open_image(tmp_path / "x.png")
        assert im.mode == "RGB" and im.size == (8, 6) and np.asarray(im).min() == 255


@pytest.mark.parametrize("text, parts", [
    ("image,text\na.png,one\n", ["column caption", "image,text"]), ("", ["column image", "column caption"]), ("image,caption\n", ["no rows"]),
    ("image,caption\na.png,one\nno.png,two\n", ["line 3", "no.png"]), ("image,caption\na.png,one\n,two\n", ["line 3"]),
    ("image,caption\na.png,one\nb.jpg,  \n", ["line 3", "caption", "b.jpg"]), ("image,caption\na.png\n", ["line 2", "caption", "a.png"]),
    ("image,caption\na.png,café\n", ["UTF-8"])])
def test_bad_csv(tmp_path, text, parts):
    refuse(["d.csv", *parts], Pairs, write_csv(tmp_path, text, "latin-1"))


def test_bad_files(tmp_path, monkeypatch):
    pairs = Pairs(write_csv(tmp_path))
    half = (tmp_path / "b.jpg").read_bytes()[:2000]
    for content, why in ((half, "truncated"), (b"just some text", "identify"), (b"", "identify")):
        (tmp_path / "b.jpg").write_bytes(content)
        refuse(["d.csv line 3", "b.jpg", why], pairs.pair, 1)
    for limit in (2000, 1000):                                      # the picture has 2,400: Pillow warns, and raises beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuse(["d.csv line 2", "a.png", f"{limit:,} pixels"], pairs.pair, 0)
    for path in (tmp_path, tmp_path / "b.jpg", tmp_path / "none.csv"):
        refuse([str(path), "image,caption"], open_dataset, str(path))


# ------------------------------------------------------------------------------------------------------------- PyramidCLIP's views
def test_views_of_scenes():
    scenes = Scenes(40, size=28, mismatch=0.5)
    for i in range(40):
        s, v = scenes[i], scenes.views(i, scenes.pair(i)[0])
        assert v["summary"] == s["summary"] and v["objects"] == s["objects"] and np.array_equal(v["regions"], s["rois"])
        assert v["regions"].shape == (len(s["things"]), 2052) and v["objects"].count(",") == len(s["things"]) - 1
        assert np.allclose(v["regions"][:, -4:] * 28, [t.box for t in s["things"]])


def test_views_in_a_batch():
    scenes = Scenes(23, size=28, family=1)
    make = lambda **kw: Batches(scenes, PLAIN, 6, 28, 300, views=True, **kw)[1]
    batch, again, cropped = make(), make(), make(min_area=0.9, local_area=0.5)
    assert all(batch[k].equal(again[k]) for k in batch) and "images_l" not in batch
    assert cropped["images_l"].shape == cropped["images"].shape and not cropped["images_l"].equal(cropped["images"])
    numbers = torch.randperm(23, generator=torch.Generator().manual_seed(0))[6:12].tolist()
    for row, i in enumerate(numbers):
        s, m = scenes[i], batch["regions_mask"][row]
        assert np.allclose(batch["regions"][row][m].numpy(), s["rois"]) and not batch["regions"][row][~m].any() and m.sum() == len(s["things"])
        for k in ("summary", "objects"):
            assert PLAIN.decode(batch[k][row]) == s[k].replace(",", " ,") and batch[f"{k}_mask"][row].sum() == len(PLAIN.encode(s[k])) + 2


@pytest.mark.parametrize("caption, summary", [
    ("A black dog is running, and a cat sleeps.", "A black dog is running"), ("Two men and a dog walk while it rains", "Two men and a dog walk"),
    ("a child who sings", "a child who sings"), ("a young child who sings", "a young child"), ("Dog", "Dog"), ("a red car near a tree", "a red car")])
def test_rule_for_a_summary(tmp_path, caption, summary):
    assert Pairs(write_csv(tmp_path, f'image,caption\na.png,"{caption}"\n')).views(0) == {"summary": summary}


def test_views_of_a_csv(tmp_path):
    text = 'image,caption,summary,objects\na.png,one,short,"red car, tree"\nb.jpg,two,other,blue sky\na.png,three,unused,unused\n'
    path, npz = write_csv(tmp_path, text), str(tmp_path / "r.npz")
    rois = {n: np.full((k, 2052), k, dtype=np.float16) for n, k in (("a.png", 2), ("b.jpg", 5))}
    np.savez(npz, **rois)
    v = Pairs(path, npz).views(0)
    assert (v["summary"], v["objects"], v["regions"].dtype) == ("short", "red car, tree", np.float32) and (v["regions"] == 2).all()
    assert Pairs(path).views(1).keys() == {"summary", "objects"}
    refuse(["d.csv line 2", "objects of a.png is empty"], Pairs, write_csv(tmp_path, "image,caption,objects\na.png,one,\n"))
    write_csv(tmp_path, text)
    np.savez(npz, **{"a.png": rois["a.png"]})
    refuse(["r.npz has no regions of b.jpg", "1 of 2 pictures"], Pairs, path, npz)
    np.savez(npz, **rois | {"a.png": rois["a.png"][:, :2048]})
    refuse(["r.npz", "a.png", "(2, 2048)", "(M, 2052)"], Pairs, path, npz)
    for content in (b"no archive", b""):
        (tmp_path / "r.npz").write_bytes(content)
        refuse(["r.npz", ".npz file of regions"], Pairs, path, npz)


# ------------------------------------------------------------------------------------------------------------- crops and batches
def batches(size=6, **more):
    return Batches(Scenes(23, size=14, paraphrase=0.5, family=1), PLAIN, size, 14, 300, **more)


def test_batches_depend_on_seed_and_step_alone():
    one, two, ranks = batches(seed=3), batches(seed=3), [batches(seed=3, rank=r, world=3) for r in range(3)]
    first = [one[k] for k in range(6)]
    equal = lambda a, b: all(a[k].shape == b[k].shape and a[k].equal(b[k]) for k in ("images", "ids", "mask"))
    assert all(equal(two[k], first[k]) for k in (5, 0, 4, 2)) and not equal(first[0], batches(seed=4)[0])       # any order, as after a resume
    assert first[0]["images"].shape == (6, 3, 14, 14) and first[0]["mask"].shape[1] == first[0]["mask"].sum(1).max()
    epochs = [[x.numpy().tobytes() for b in first[k:k + 3] for x in b["images"]] for k in (0, 3)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 18 and epochs[0] != epochs[1]      # 23 = 3 * 6 + 5: the last five are left out
    for step in (0, 4):                                             # the ranks' shares make up the global batch
        shares = [b[step] for b in ranks]
        assert torch.cat([s["images"] for s in shares]).equal(first[step]["images"])
        assert [PLAIN.decode(x) for s in shares for x in s["ids"]] == [PLAIN.decode(x) for x in first[step]["ids"]]


def test_batches_that_cannot_be(tmp_path):
    refuse(["24 is larger than the data (23 pictures)", "lower it"], lambda: batches(size=24))
    refuse(["6 can't be shared out evenly among 4 processes", "try 4"], lambda: batches(world=4))
    b = Batches(Pairs(write_csv(tmp_path)), PLAIN, 2, 24, 77, min_area=0.5)
    assert b[0]["images"].shape == (2, 3, 24, 24) and not b[0]["images"].equal(b[1]["images"])
    (tmp_path / "b.jpg").write_text("broken")                       # a sentence must come back: worker processes can't raise cleanly
    assert list(b[2]) == ["error"] and "d.csv line 3" in b[2]["error"]


def test_crops_and_normalisation():
    im, r = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)), random.Random(0)
    assert np.array_equal(center_crop(im, 40), np.asarray(im)[:, 10:50]) and center_crop(im, 24).size == (24, 24)
    crops = [random_crop(im, 32, area, r) for area in (0.5, 0.5, 1.0)]
    assert {c.size for c in crops} == {(32, 32)} and crops[0].tobytes() != crops[1].tobytes()
    x = normalize(torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 3, 1, 1))[0, :, 0].T         # (2, 3): black, white
    assert x.dtype == torch.float32 and torch.allclose(x * torch.tensor(STD) + torch.tensor(MEAN), torch.tensor([[0.0], [1.0]]), atol=1e-6)
    assert MEAN == (0.48145466, 0.4578275, 0.40821073) and STD == (0.26862954, 0.26130258, 0.27577711)


def test_a_family_differs_in_shapes_alone_and_stays_in_one_batch():
    scenes = Scenes(40, 3, family=4)
    for first in range(0, 40, 4):
        specs = [scenes.spec(i) for i in range(first, first + 4)]
        same = [([t._replace(shape="") for t in s["things"]], s["order"], s["background"], s["pixels"]) for s in specs]
        assert same == same[:1] * 4 and len({tuple(t.shape for t in s["things"]) for s in specs}) > 1
    batch = Batches(Scenes(64, 3), Tokenizer([]), 16, 56, 32)
    batch[0]
    pairs = batch.order.view(-1, 2)
    assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all() and sorted(pairs.flatten().tolist()) == list(range(64))


def test_plain_ascii_needs_no_repair():
    """clean's short way equals its long one."""
    r = random.Random(0)
    for _ in range(5000):
        s = "".join(chr(32 + int(95 * r.random())) for _ in range(int(14 * r.random())))
        assert clean(s) == " ".join(html.unescape(html.unescape(ftfy.fix_text(s))).split()).lower()
