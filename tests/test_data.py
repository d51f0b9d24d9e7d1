"""Tests of data.py: the tokeniser, scenes and their ground truth, each kind of file,
each fault that people's files have, each picture mode, batches.

    pytest tests/test_data.py             # half a minute on one core
    pytest tests/test_data.py -k local    # PyramidCLIP's local view alone
    pytest tests/test_data.py -k colour   # what becomes of a picture's colours alone
    pytest tests/test_data.py -k clean    # FILIP's cleaning alone

The tokeniser is compared with a slow one written here. What scenes say is compared with what they
draw.
"""
import collections
import csv
import gzip
import hashlib
import html
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import zlib

import ftfy
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import model
from data import (
    BACKGROUNDS, COLOURS, FILLS, HELD_OUT, MEAN, SHAPES, SIZES, STD, BadRow, Batches,
    Scenes, Tokenizer, center_crop, cut, expand, filip_prompts, join, mirrored,
    normalize, open_dataset, open_image, random_window, word_tokens)
from eval import clean_table, sparc_prompts
from model import BOS, BYTES, EOT, UserError, clean, word_pattern

HERE = pathlib.Path(__file__).parent.parent
WORDS = word_pattern(model.WORDS)
PLAIN = Tokenizer([])  # bytes only: every letter is a token
TEXT = ("the cat sat on the mat, the cats sat; aaaa aaa banana bananas -- that hat! "
        "ça coûte 12 €")
CONTENT = {*SHAPES, *COLOURS, *FILLS, *SIZES, *BACKGROUNDS}  # the words that name something
RELATION = {"left", "right", "above", "below"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def decode(tok, ids):
    """Ids -> text. BOS, EOT and what follows EOT are dropped."""
    ids = [*map(int, ids), tok.eot]
    symbols = [tok.symbols[i] for i in ids[:ids.index(tok.eot)] if i != tok.bos]
    text = "".join(symbols).replace("</w>", BYTES[ord(" ")])
    byte = {character: b for b, character in BYTES.items()}
    return bytes(byte[c] for c in text).decode("utf-8", errors="replace").strip()


# ---------------------------------------------------------------------------------- the tokeniser
def test_vocabulary_and_cleaning():
    tok = Tokenizer(["a b", "ab c</w>"])
    assert tok.symbols[0] == "!" and tok.symbols[255] == BYTES[0xAD]
    assert len(set(BYTES.values())) == 256
    assert tok.symbols[256:512] == [s + "</w>" for s in tok.symbols[:256]]
    assert tok.symbols[512:] == ["ab", "abc</w>", BOS, EOT]
    assert (tok.bos, tok.eot, tok.vocab_size, PLAIN.vocab_size) == (514, 515, 516, 514)
    assert tok.encode("ABC\n ab") == [513, tok.ids["a"], tok.ids["b</w>"]]  # "b" is not "b</w>"
    assert clean("  A  Red\n\tSTAR cafÃ© ") == "a red star café"
    assert clean("< &amp;lt;") == "< <"  # twice, also where ftfy leaves them because of the "<"


@pytest.mark.parametrize("text", [
    "a red star", "façade naïve zażółć", "fox 🦊 日本 👩‍🚀",
    "it's 12 o'clock!? <b>", "x &amp;lt; y &amp; z"])
def test_round_trip(text):
    for tok in (PLAIN, Tokenizer.train([TEXT], 540)):
        ids, mask = tok(text)
        told = decode(tok, ids[0])
        assert told == decode(tok, tok.encode(text)) == " ".join(WORDS.findall(clean(text)))
        assert ids[0, 0] == tok.bos and ids[0, mask.sum() - 1] == tok.eot


def test_mask_and_truncation():
    ids, mask = PLAIN(["!!!!", "", "a <|endoftext|> b", "abcdef", "abcdefghij"], 8)
    a, b, f, g = (PLAIN.ids[s] for s in ("a</w>", "b</w>", "f</w>", "f"))
    assert ids[0].tolist() == [512, 0, 0, 0, 256, 513, 0, 0]  # id 0 is "!" as well as padding
    assert ids[2, :5].tolist() == [512, a, 513, b, 513]  # the mask ends at the first of two EOTs
    assert decode(PLAIN, ids[2]) == "a"
    assert ids[3, 6:].tolist() == [f, 513]  # fits exactly
    assert ids[4, 6:].tolist() == [g, 513]  # too long: EOT overwrites the last
    assert mask.tolist() == [[k < n for k in range(8)] for n in (6, 2, 3, 8, 8)]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def slow_bpe(text, n):
    """Counts every pair of every word afresh for each merge; ties go to the alphabet's first."""
    words, merges = [Tokenizer.split(w) for w in WORDS.findall(clean(text))], []
    while len(merges) < n:
        counts = collections.Counter(p for w in words for p in zip(w, w[1:]))
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(f"{a} {b}")
        for w in words:
            for i in range(len(w)):  # w shrinks meanwhile: a slice beyond its end is just empty
                if w[i:i + 2] == [a, b]:
                    w[i:i + 2] = [a + b]
    return merges


def test_train_equals_slow_bpe():
    r = random.Random(0)  # words of two letters: many ties and overlapping pairs
    ab = ["".join(r.choice("ab") for _ in range(r.randrange(1, 9))) for _ in range(60)]
    for text in (TEXT, " ".join(Scenes(40).texts()), " ".join(ab)):
        assert Tokenizer.train(text.split(" "), 514 + 60).merges == slow_bpe(text, 60)
    tok = Tokenizer.train(["cat cat hat"], 5000)  # stops early: each word is one symbol
    assert tok.merges == slow_bpe("cat cat hat", 5000) == ["a t</w>", "c at</w>", "h at</w>"]
    with pytest.raises(UserError, match="514"):
        Tokenizer.train(["a"], 513)


def test_clip_merges_file(tmp_path):
    lines = ["#version: 0.2", *(f"q{i} z" for i in range(48894))]
    (tmp_path / "full.txt").write_text("\n".join(lines))
    with gzip.open(tmp_path / "full.txt.gz", "wt") as f:  # the published file goes on at its end
        f.write("\n".join([*lines, "beyond the end", ""]))
    for name in ("full.txt", "full.txt.gz"):
        tok = Tokenizer.clip(tmp_path / name)
        assert (tok.vocab_size, tok.bos, tok.eot) == (49408, 49406, 49407)
        assert tok.merges[-1] == "q48893 z"
    (tmp_path / "small.txt").write_text("#version\na b\nab c\n")
    with pytest.raises(UserError, match="small.txt is not CLIP's merges file"):
        Tokenizer.clip(tmp_path / "small.txt")
    help_ = "nowhere.gz.*bpe_simple_vocab_16e6.txt.gz.*openai/CLIP.*--vocab learn"
    with pytest.raises(UserError, match=help_):
        Tokenizer.clip(tmp_path / "nowhere.gz")


def test_plain_ascii_needs_no_repair():
    """clean's short way equals its long one."""
    r = random.Random(0)
    for _ in range(5000):
        s = "".join(chr(32 + int(95 * r.random())) for _ in range(int(14 * r.random())))
        repaired = html.unescape(html.unescape(ftfy.fix_text(s)))
        assert clean(s) == " ".join(repaired.split()).lower()


# -------------------------------------------------------------------------------------- the scenes
def listed(scenes):
    return [scenes[i] for i in range(len(scenes))]


def retold(scenes, i):
    """Scene i's caption in other words."""
    return [join(scenes.words(scenes.spec(i), style)) for style in (1, 2)]


def views(scenes, i):
    return scenes.views(i, *scenes.pair(i))


def fingerprint(*sets):
    h = hashlib.sha256()
    for scenes in sets or (Scenes(9, 5), Scenes(4, 5, split="test", mismatch=0.5)):
        for s in listed(scenes):
            h.update(s["image"].tobytes() + s["caption"].encode())
            h.update(repr(s["things"]).encode() + s["masks"].tobytes())
    return h.hexdigest()


def test_same_in_another_process():
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    env = os.environ | {
        "PYTHONHASHSEED": "77", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "import test_data; print(test_data.fingerprint())"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == fingerprint(), run.stderr


def test_random_stream_has_not_changed():
    """Words and boxes: measured results are of these scenes. Change the value only on purpose."""
    told = []
    for scenes in (Scenes(4), Scenes(3, 1, split="val", mismatch=0.5),
                   Scenes(3, size=112, split="composition")):
        for i, s in enumerate(listed(scenes)):
            things = [tuple(t) for t in s["things"]]
            told.append((s["caption"], retold(scenes, i), s["swapped"], things))
    assert hashlib.sha256(repr(told).encode()).hexdigest()[:16] == "8c830748920c9cf0"


def test_splits():
    assert fingerprint(Scenes(1)) != fingerprint(Scenes(1, seed=1))
    assert fingerprint(Scenes(1, seed=1)) != fingerprint(Scenes(1, split="val"))
    for split in ("train", "val", "test", "composition"):
        scenes, ten = (Scenes(n, split=split, mismatch=0.5) for n in (200, 10))
        specs = [scenes.spec(i) for i in range(200)]
        assert specs[:10] == [ten.spec(i) for i in range(10)]  # whatever the number of scenes
        contents = {tuple(sorted(t[:4] for t in s["things"])) for s in specs}
        assert split == "train" or len(contents) == 200
        for s in specs:
            held = HELD_OUT & {(t.colour, t.shape) for t in s["things"]}
            assert bool(held) == (split == "composition") and s["extra"] not in HELD_OUT
    with pytest.raises(UserError, match="only 36 scenes.*ask for fewer"):
        Scenes(60, split="composition", objects=(1, 1))  # 6 pairs x 3 fills x 2 sizes


def check_thing(t, mask, px):
    """The mask lies in the box, the box has the told size, and the pixels the told colour."""
    x1, y1, x2, y2 = t.box
    size = len(mask)
    assert 0 <= x1 < x2 <= size and 0 <= y1 < y2 <= size
    assert x2 - x1 == y2 - y1 == SIZES[t.size] * (size // 7)
    assert mask.sum() == mask[y1:y2, x1:x2].sum() > 0.2 * (x2 - x1) * (y2 - y1)
    if not t.fill:  # jittered by 12; edges are smoothed, and a small star is mostly edge
        assert (abs(px[mask] - COLOURS[t.colour]).max(1) <= 13).mean() > 0.45


@pytest.mark.parametrize("size", [56, 112])
def test_pictures_masks_and_boxes(size):
    for s in listed(Scenes(60, 2, size)):
        px, things, N = np.asarray(s["image"]).astype(int), s["things"], len(s["things"])
        assert px.shape == (size, size, 3) and s["masks"].shape == (N, size, size)
        assert len({t.colour for t in things}) == len({t.shape for t in things}) == N
        assert s["masks"].sum(0).max() == 1
        covered = np.zeros((size, size), int)
        for t, mask in zip(things, s["masks"]):
            check_thing(t, mask, px)
            x1, y1, x2, y2 = t.box
            covered[y1:y2, x1:x2] += 1
        base, amount = BACKGROUNDS[s["background"]]
        assert covered.max() == 1 and abs(px[covered == 0] - base).max() <= amount + 1
        sides = [t.box[2] - t.box[0] for t in things]
        assert sides == sorted(sides, reverse=True), f"not the largest first: {things}"


def check_links(s):
    grammar = {"a", "an", "and", "on", "of"}
    assert join(s["words"]) == s["caption"]
    assert {w.text for w in s["words"]} <= CONTENT | RELATION | grammar
    for w in s["words"]:
        assert w.thing < 0 or w.text == getattr(s["things"][w.thing], w.kind)
        assert w.kind != "background" or w.text == s["background"]


def test_every_word_names_its_thing():
    scenes = Scenes(60)
    learned = Tokenizer.train(scenes.texts(), 560)
    for i, s in enumerate(listed(scenes)):
        check_links(s)
        names = [[x for x in t[:4] if x] for t in s["things"]]
        linked = [[w.text for w in s["words"] if w.thing == k] for k in range(len(names))]
        assert names == linked
        v = views(scenes, i)
        assert v["objects"] == ", ".join(map(" ".join, names))
        assert all(f"{t.colour} {t.shape}" in v["summary"] for t in s["things"])
        for tok in (PLAIN, learned):
            ids, at = tok(s["caption"], 300)[0][0], word_tokens(tok, s["words"])
            assert [decode(tok, ids[p]) for p in at] == [w.text for w in s["words"]]
            assert sum(at, []) == list(range(1, 1 + len(tok.encode(s["caption"]))))


def relations(words):
    """(first thing, relation, second thing) for each relation of a text, things by their index."""
    out = []
    for k, w in enumerate(words):
        if w.text in RELATION:
            told = w.text + " of" * (w.text in ("left", "right"))
            second = next(x.thing for x in words[k:] if x.thing >= 0)
            out.append((words[k - 1].thing, told, second))
    return out


def check_relation(a, told, b):
    """It is true of the boxes, and tells the larger of the two distances."""
    dx, dy = (sum(b.box[k::2]) - sum(a.box[k::2]) for k in (0, 1))  # twice centre b - centre a
    assert {"left of": dx > 0, "right of": dx < 0, "above": dy > 0, "below": dy < 0}[told]
    assert ("of" in told) == (abs(dx) > abs(dy))


def content(text):
    return [w for w in text.split() if w in CONTENT]


def test_relations_and_paraphrases():
    scenes, found = Scenes(80), set()
    for i, s in enumerate(listed(scenes)):
        told, (first, second) = relations(s["words"]), retold(scenes, i)
        for a, relation, b in told:
            check_relation(s["things"][a], relation, s["things"][b])
            found.add(relation)
        words = scenes.words(scenes.spec(i), 1)  # each relation from the other side
        assert relations(words) == [(b, INVERSE[relation], a) for a, relation, b in told]
        assert first.startswith("there is a") and second.startswith("a picture of a")
        assert not RELATION & set(second.split())
        same, one, two = (content(text) for text in (s["caption"], first, second))
        assert same == two and sorted(same) == sorted(one)
    assert found == set(INVERSE)


def test_swapped_captions_exchange_two_colours():
    for s in listed(Scenes(80, objects=(2, 4))):
        same, swap = content(s["caption"]), content(s["swapped"])
        assert len(same) == len(swap)
        x, y = (k for k in range(len(same)) if same[k] != swap[k])
        assert (same[x], same[y]) == (swap[y], swap[x]) and {same[x], same[y]} <= set(COLOURS)
    assert Scenes(1, objects=(1, 1))[0]["swapped"] is None


def test_mismatches():
    scenes = Scenes(60, objects=(2, 4), mismatch=1.0)
    for i, s in enumerate(listed(scenes)):
        there, (colour, shape) = scenes.spec(i)["things"], scenes.spec(i)["extra"]
        check_links(s)
        assert set(s["things"]) < set(there)
        seen = {len(s["things"]), len(s["masks"]), len(views(scenes, i)["regions"])}
        assert seen == {len(there) - 1}
        assert f" {colour} {shape}" in s["caption"]
        assert all(t.colour != colour and t.shape != shape for t in there)
        unmentioned = [t for t in there if t.shape not in s["caption"].split()]
        assert len(unmentioned) == 1


def test_a_family_differs_in_shapes_alone_and_stays_in_one_batch():
    scenes = Scenes(40, 3, family=4)
    for first in range(0, 40, 4):
        specs = [scenes.spec(i) for i in range(first, first + 4)]
        same = [([t._replace(shape="") for t in s["things"]], s["order"], s["background"],
                 s["pixels"]) for s in specs]
        assert same == same[:1] * 4
        assert len({tuple(t.shape for t in s["things"]) for s in specs}) > 1
    batch = Batches(Scenes(64, 3), PLAIN, 16, 56, 32)
    batch[0]
    pairs = batch.order.view(-1, 2)
    assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all()
    assert sorted(pairs.flatten().tolist()) == list(range(64))


# ----------------------------------------------------------------------------------------- prompts
def test_filip_prompts():
    """FILIP eq. 6: [prefix] {label}, [category description]. [suffix]."""
    one = ["a photo of a"]
    assert filip_prompts("pug", one) == ["a photo of a pug."]
    assert filip_prompts("pug", one, ["a type of pet"]) == ["a photo of a pug, a type of pet."]
    for suffix in ("I like it", "I like it."):
        assert filip_prompts("pug", one, suffixes=[suffix]) == ["a photo of a pug. I like it."]
        told = filip_prompts("pug", one, ["a type of pet"], [suffix])
        assert told == ["a photo of a pug, a type of pet. I like it."]
    assert filip_prompts("pug", ["", "itap of my"], ["", "a pet"], ["", "It's cute"]) == [
        "pug.", "pug. It's cute.", "pug, a pet.", "pug, a pet. It's cute.",
        "itap of my pug.", "itap of my pug. It's cute.",
        "itap of my pug, a pet.", "itap of my pug, a pet. It's cute."]


def test_sparc_prompts():
    """SPARC eq. 9: [prefix]{label}, [suffix]"""
    assert sparc_prompts("pug", ["a photo of a"], ["I like it"]) == ["a photo of a pug, I like it"]
    assert sparc_prompts("circle", ["a", "a small"]) == ["a circle", "a small circle"]
    assert sparc_prompts("a pug", ["", "art of"], ["", "I like it"]) == [
        "a pug", "a pug, I like it", "art of a pug", "art of a pug, I like it"]


# ---------------------------------------------------------------------------------- real pictures
TWO_IMAGES = "image,caption\na.png,one\nb.jpg,two\na.png,three\n"


def noise():
    pixels = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_csv(folder, text=TWO_IMAGES, encoding="utf-8"):
    for name in ("a.png", "b.jpg"):
        noise().save(folder / name)
    (folder / "d.csv").write_text(text, encoding=encoding)
    return str(folder / "d.csv")


def refuse(parts, f, *args, **kwargs):
    """The call must raise a UserError of one sentence that holds all parts."""
    with pytest.raises(UserError) as e:
        f(*args, **kwargs)
    said = str(e.value)
    assert "\n" not in said and ". " not in said and all(p in said for p in parts), said


def test_pairs(tmp_path):
    pairs = open_dataset(write_csv(tmp_path))
    assert len(pairs) == 2 and pairs.captions == [["one", "three"], ["two"]]
    assert pairs.texts() == ["one", "three", "two"]
    r = random.Random(0)
    assert pairs.pair(0)[1] == "one"
    assert {pairs.pair(0, r)[1] for _ in range(20)} == {"one", "three"}
    as_saved_by_spreadsheets = 'caption,image\n"red, blue",a.png\n', "utf-8-sig"
    assert open_dataset(write_csv(tmp_path, *as_saved_by_spreadsheets)).captions == [["red, blue"]]


@pytest.mark.parametrize("text, parts", [
    ("image,words\na.png,one\n", ["line 1", "no column of the caption", "title", "image, words"]),
    ("", ["no column of the picture", "no column of the caption"]),
    ("image,caption\n", ["no pair"]),
    ("image,caption\nno.png,two\n", ["no pair", "line 2: there is no no.png"])])
def test_bad_tables(tmp_path, text, parts):
    """What is wrong with the table itself stops at once."""
    refuse(["d.csv", *parts], open_dataset, write_csv(tmp_path, text, "latin-1"))


@pytest.mark.parametrize("row, reason", [
    ("no.png,two", "there is no no.png (paths start at"),
    (",two", "the name of the picture is empty"),
    ("b.jpg,  ", "the caption of b.jpg is empty"),
    ("b.jpg", "the caption of b.jpg is empty"),
    ("b.jpg,red, blue", "a broken row (3 cells in 2 columns: put quotes around"),
    ('b.jpg,"red" blue', "a broken row ("),
    ('b.jpg,"red', "a broken row (a quote is opened and not closed)"),
    ("b.jpg,café", "the caption of b.jpg has bytes that are no UTF-8 text"),
    ("b.jpg,a\0b", "the caption of b.jpg has bytes"),
    ("b.jpg," + "word " * 2000, "the caption of b.jpg is too long (10,000 characters)"),
    ('b.jpg,"' + "word " * 99999 + '"', "a broken row (field larger than field limit (131072))")])
def test_bad_rows(tmp_path, row, reason):
    """A bad row is named by its line and left out; the rows around it stay."""
    path = write_csv(tmp_path, f"image,caption\na.png,one\n{row}\na.png,three\n", "latin-1")
    pairs = open_dataset(path)
    assert pairs.captions == [["one", "three"]]
    assert [bad.where for bad in pairs.bad] == [f"{path} line 3"]
    assert pairs.bad[0].reason.startswith(reason) and str(pairs.bad[0]).startswith(f"{path} line 3")


def test_bad_files(tmp_path, monkeypatch):
    pairs = open_dataset(write_csv(tmp_path))
    half = (tmp_path / "b.jpg").read_bytes()[:2000]
    for content, why in ((half, "truncated"), (b"just some text", "identify"), (b"", "identify")):
        (tmp_path / "b.jpg").write_bytes(content)
        refuse(["d.csv line 3", "b.jpg", why], pairs.pair, 1)
    for limit in (2000, 1000):  # of 2,400: Pillow warns, and raises beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refuse(["d.csv line 2", "a.png", f"more than {limit:,}"], pairs.pair, 0)
    refuse(["b.jpg", "no column of the picture"], open_dataset, str(tmp_path / "b.jpg"))
    refuse(["none.csv", "no such file", "image,caption"], open_dataset, str(tmp_path / "none.csv"))


# ------------------------------------------------------------------------------ PyramidCLIP's views
def test_views_of_scenes():
    scenes = Scenes(40, size=28, mismatch=0.5)
    for i, s in enumerate(listed(scenes)):
        v, N = views(scenes, i), len(s["things"])
        assert v["regions"].shape == (N, 2052) and v["objects"].count(",") == N - 1
        assert np.allclose(v["regions"][:, -4:] * 28, [t.box for t in s["things"]])
        there = scenes.spec(i)["things"]
        told = [there[k].colour + " " + there[k].shape for k in scenes.spec(i)["order"]]
        assert [" ".join(x.split()[1:]) for x in v["summary"].split(" and ")] == told


def test_views_in_a_batch():
    scenes = Scenes(23, size=28, family=1)
    batch, again = (Batches(scenes, PLAIN, 6, 28, 300, views=True)[1] for _ in range(2))
    assert all(batch[k].equal(again[k]) for k in batch) and "images_l" not in batch
    numbers = torch.randperm(23, generator=torch.Generator().manual_seed(0))[6:12].tolist()
    for row, i in enumerate(numbers):
        v, mask = views(scenes, i), batch["regions_mask"][row]
        regions = batch["regions"][row]
        assert np.allclose(regions[mask].numpy(), v["regions"]) and not regions[~mask].any()
        assert mask.sum() == len(v["regions"])
        for k in ("summary", "objects"):
            assert decode(PLAIN, batch[k][row]) == v[k].replace(",", " ,")
            assert batch[f"{k}_mask"][row].sum() == len(PLAIN.encode(v[k])) + 2


def local_views(n, **options):
    """(scenes, i, picture, drawn caption, window, crop, caption of what is left) for n scenes."""
    scenes = Scenes(n, 1, **options)
    for i in range(n):
        r = random.Random(i)
        image, caption = scenes.pair(i, r)
        state = r.getstate()
        shown, left = scenes.local_view(i, image, caption, r, 0.5)
        again = random.Random()
        again.setstate(state)
        window, area = random_window(image, 0.5, again), 0.5
        while again.getstate() != r.getstate():  # nothing was left: it was drawn again
            area = (1 + area) / 2
            window = random_window(image, area, again)
        assert shown == window
        yield scenes, i, image, caption, window, cut(image, 56, shown), left


def visible(scenes, i, window):
    """{word: share of its object's pixels in the window} of a scene's colours and shapes."""
    x1, y1, x2, y2 = (round(x) for x in window)
    spec, out = scenes.spec(i), {}
    for t, mask in zip(spec["things"], scenes.masks(spec)):
        out[t.colour] = out[t.shape] = mask[y1:y2, x1:x2].sum() / mask.sum()
    return out


def test_the_local_caption_is_true_of_the_crop():
    """Every colour and shape of the caption belongs to an object that the crop shows."""
    shorter = 0
    for scenes, i, image, caption, window, crop, left in local_views(300, paraphrase=0.5):
        assert crop.size == (56, 56) and crop.tobytes() != image.tobytes()
        side = window[2] - window[0]
        assert 0.5 <= (side / 56) ** 2 <= 1
        expected = image.resize((56, 56), Image.Resampling.BICUBIC, box=window)
        assert crop.tobytes() == expected.tobytes()
        seen = visible(scenes, i, window)
        told = [w for w in left.split() if w in SHAPES or w in COLOURS]
        assert all(seen[w] > 0.15 for w in told)
        shorter += len(left) < len(caption)
    assert 20 < shorter < 150


def test_the_local_caption_keeps_order_style_and_omissions():
    """What is left is a part of what was told, and its relations are true of the whole picture."""
    styles = set()
    for scenes, i, _, caption, window, _, left in local_views(300, paraphrase=0.5):
        if content(left) == content(caption):
            assert left == caption
        opening = next(o for o in ("there is a", "a picture of", "a") if caption.startswith(o))
        styles.add(opening)
        assert left.startswith(opening)
        told, rest = content(caption), content(left)
        assert set(rest) <= set(told) and ("on" in left.split()) == ("on" in caption.split())
        if opening == "a picture of":
            assert not RELATION & set(left.split())
        spec = scenes.spec(i)
        kept = [k for k in spec["order"] if {spec["things"][k].colour, spec["things"][k].shape}
                & set(rest)]
        pairs = {frozenset(kept[k:k + 2]) for k in range(0, len(kept), 2)}
        by_name = {w: k for k in kept for w in spec["things"][k][2:4]}
        words = left.replace("left of", "left").replace("right of", "right").split()
        for at, w in enumerate(words):
            if w in RELATION:
                a = next(by_name[x] for x in reversed(words[:at]) if x in by_name)
                b = next(by_name[x] for x in words[at:] if x in by_name)
                assert frozenset((a, b)) in pairs
                full = w + " of" * (w in ("left", "right"))
                check_relation(spec["things"][a], full, spec["things"][b])
    assert len(styles) == 3


def test_local_captions_are_the_captions_of_their_batch():
    """With a local view the pair's caption is what is left in it; without, nothing changes."""
    scenes = Scenes(64, 2)
    plain, with_views, local = (
        Batches(scenes, PLAIN, 64, 56, 300, **options)[0]
        for options in ({}, {"views": True}, {"views": True, "local_area": 0.5}))
    for k in ("images", "ids", "mask"):
        assert plain[k].equal(with_views[k])
    assert plain["images"].equal(local["images"])
    assert local["images_l"].shape == local["images"].shape
    assert not local["images_l"].equal(local["images"])
    before, after = ([decode(PLAIN, x) for x in batch["ids"]] for batch in (plain, local))
    shorter = sum(len(b) < len(a) for a, b in zip(before, after))
    assert 0 < shorter < 40 and sum(a == b for a, b in zip(before, after)) > 20
    for k in ("summary", "objects", "regions"):
        assert local[k].equal(with_views[k])


@pytest.mark.parametrize("caption, summary", [
    ("A black dog is running, and a cat sleeps.", "A black dog is running"),
    ("Two men and a dog walk while it rains", "Two men and a dog walk"),
    ("a child who sings", "a child who sings"),
    ("a young child who sings", "a young child"),
    ("Dog", "Dog"),
    ("a red car near a tree", "a red car")])
def test_rule_for_a_summary(tmp_path, caption, summary):
    pairs = open_dataset(write_csv(tmp_path, f'image,caption\na.png,"{caption}"\n'))
    assert pairs.views(0, *pairs.pair(0)) == {"summary": summary}


def test_the_summary_is_of_the_drawn_caption(tmp_path):
    rows = "a.png,one,first\na.png,two black dogs and a cat,\na.png,three,third\n"
    pairs = open_dataset(write_csv(tmp_path, "image,caption,summary\n" + rows))
    summary = {c: pairs.views(0, None, c)["summary"] for c in pairs.captions[0]}
    clause = {"two black dogs and a cat": "two black dogs"}  # no summary in this row
    assert summary == {"one": "first", **clause, "three": "third"}
    pairs = open_dataset(write_csv(tmp_path))
    assert [pairs.views(0, None, c)["summary"] for c in ("one", "three")] == ["one", "three"]
    batches = Batches(pairs, PLAIN, 2, 24, 77, min_area=0.9, views=True, local_area=0.5)
    drawn = [batches[k] for k in range(8)]
    assert all(b["ids"].equal(b["summary"]) for b in drawn)  # one clause each
    texts = {decode(PLAIN, x) for b in drawn for x in b["ids"]}
    assert texts == {"one", "two", "three"}


def test_views_of_a_csv(tmp_path):
    text = ('image,caption,summary,objects\na.png,one,short,"red car, tree"\n'
            'b.jpg,two,other,blue sky\na.png,three,unused,unused\n')
    path, npz = write_csv(tmp_path, text), str(tmp_path / "r.npz")
    rois = {n: np.full((k, 2052), k, dtype=np.float16) for n, k in (("a.png", 2), ("b.jpg", 5))}
    np.savez(npz, **rois)
    v = open_dataset(path, npz).views(0, None, "one")
    assert (v["summary"], v["objects"]) == ("short", "red car, tree")
    assert v["regions"].dtype == np.float32 and (v["regions"] == 2).all()
    assert open_dataset(path).views(1, None, "two").keys() == {"summary", "objects"}
    empty = write_csv(tmp_path, "image,caption,objects\na.png,one,\n")
    refuse(["d.csv line 2", "objects of a.png is empty"], open_dataset, empty)  # the only row
    write_csv(tmp_path, text)
    np.savez(npz, **{"a.png": rois["a.png"]})
    refuse(["r.npz has no regions of b.jpg", "1 of 2 pictures"], open_dataset, path, npz)
    np.savez(npz, **rois | {"a.png": rois["a.png"][:, :2048]})
    refuse(["r.npz", "a.png", "(2, 2048)", "(M, 2052)"], open_dataset, path, npz)
    for content in (b"no archive", b""):
        (tmp_path / "r.npz").write_bytes(content)
        refuse(["r.npz", ".npz file of regions"], open_dataset, path, npz)


# ------------------------------------------------------------------------------- crops and batches
def batches(size=6, **more):
    return Batches(Scenes(23, size=14, paraphrase=0.5, family=1), PLAIN, size, 14, 300, **more)


def equal(a, b):
    return all(a[k].shape == b[k].shape and a[k].equal(b[k]) for k in ("images", "ids", "mask"))


def test_batches_depend_on_seed_and_step_alone():
    one, two = batches(seed=3), batches(seed=3)
    first = [one[k] for k in range(6)]
    assert all(equal(two[k], first[k]) for k in (5, 0, 4, 2))  # any order, as after a resume
    assert not equal(first[0], batches(seed=4)[0])
    assert first[0]["images"].shape == (6, 3, 14, 14)
    assert first[0]["mask"].shape[1] == first[0]["mask"].sum(1).max()
    epochs = [[x.numpy().tobytes() for b in first[k:k + 3] for x in b["images"]] for k in (0, 3)]
    assert len(set(epochs[0])) == 18 and epochs[0] != epochs[1]


def test_an_epoch_loses_nothing():
    """Each epoch has all 23 samples: a batch of 6 may go on in the next one."""
    one = batches(seed=3)
    numbers = [one.number(n) for n in range(69)]
    assert [epoch for epoch, _ in numbers] == [n // 23 for n in range(69)]
    for epoch in range(3):
        assert sorted(i for e, i in numbers if e == epoch) == list(range(23))
    rows = [x for k in range(12) for x in one[k]["images"]]
    alone = [batches(1, seed=3)[n]["images"][0] for n in range(69)]
    assert all(a.equal(b) for a, b in zip(rows, alone))


def test_the_shares_of_the_ranks_make_up_the_global_batch():
    whole, ranks = batches(seed=3), [batches(seed=3, rank=r, world=3) for r in range(3)]
    for step in (0, 4):
        shares = [b[step] for b in ranks]
        assert torch.cat([s["images"] for s in shares]).equal(whole[step]["images"])
        texts = [decode(PLAIN, x) for s in shares for x in s["ids"]]
        assert texts == [decode(PLAIN, x) for x in whole[step]["ids"]]


def test_batches_that_cannot_be(tmp_path):
    refuse(["24 is larger than the data (23 pictures)", "lower it"], batches, size=24)
    refuse(["6 can't be shared out evenly among 4 processes", "try 4"], batches, world=4)
    b = Batches(open_dataset(write_csv(tmp_path)), PLAIN, 2, 24, 77, min_area=0.5)
    assert b[0]["images"].shape == (2, 3, 24, 24) and not b[0]["images"].equal(b[1]["images"])


def test_bad_samples_are_replaced(tmp_path):
    """Another sample, drawn from (seed, epoch, number) alone, and the bad one is told."""
    pairs = open_dataset(write_csv(tmp_path))
    (tmp_path / "b.jpg").write_text("broken")
    whole = Batches(pairs, PLAIN, 2, 24, 77, min_area=0.5)
    halves = [Batches(pairs, PLAIN, 2, 24, 77, min_area=0.5, rank=r, world=2) for r in (0, 1)]
    for step in (2, 0, 1):
        batch, shares = whole[step], [b[step] for b in halves]
        assert batch["images"].equal(torch.cat([s["images"] for s in shares]))
        where, what, reason = batch["bad"][0]
        assert where.endswith("d.csv line 3") and what == "b.jpg" and "identify" in reason
        assert {decode(PLAIN, x) for x in batch["ids"]} <= {"one", "three"}
    (tmp_path / "a.png").write_text("broken")  # a sentence comes back: workers can't raise cleanly
    assert list(whole[3]) == ["error"] and "no picture of a hundred" in whole[3]["error"]


def test_crops_and_normalisation():
    im, r = noise(), random.Random(0)
    assert np.array_equal(center_crop(im, 40), np.asarray(im)[:, 10:50])
    assert center_crop(im, 24).size == (24, 24)
    crops = [cut(im, 32, random_window(im, area, r)) for area in (0.5, 0.5, 1.0)]
    assert {c.size for c in crops} == {(32, 32)} and crops[0].tobytes() != crops[1].tobytes()
    x = normalize(torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 3, 1, 1))[0, :, 0].T
    back = x * torch.tensor(STD) + torch.tensor(MEAN)  # (2, 3): black, white
    assert x.dtype == torch.float32
    assert torch.allclose(back, torch.tensor([[0.0], [1.0]]), atol=1e-6)
    assert MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert STD == (0.26862954, 0.26130258, 0.27577711)


def test_a_mirrored_sample():
    boxes = np.array([[0.1, 0.2, 0.4, 0.5], [0.5, 0.0, 1.0, 1.0]], np.float32)
    regions = np.concatenate([np.ones((2, 2048), np.float32), boxes], axis=1)
    sample = {"images": "x", "regions": regions.copy(), "summary": "left", "objects": "right shoe",
              "caption": ["Left of a bright lamp, upright, right-handed", "leftover"]}
    told = mirrored(sample)
    assert told["caption"] == ["right of a bright lamp, upright, left-handed", "leftover"]
    assert (told["summary"], told["objects"], told["images"]) == ("right", "left shoe", "x")
    expected = [[0.6, 0.2, 0.9, 0.5], [0.0, 0.0, 0.5, 1.0]]
    assert np.allclose(told["regions"][:, -4:], expected) and (told["regions"][:, :-4] == 1).all()


SIDED = ("image,caption,summary,objects\n" + "a.png,a dog left of a cat,dog left,left ear\n"
         + "b.jpg,a bright right hand,right hand,hand\n")


def test_flips_in_batches(tmp_path):
    """Half of the pictures are mirrored, both views alike, and exactly their texts change sides."""
    pairs = open_dataset(write_csv(tmp_path, SIDED))
    flips = 0
    for step in range(30):
        plain, flip = (Batches(pairs, PLAIN, 2, 24, 77, views=True, flip=f) for f in (False, True))
        a, b = plain[step], flip[step]
        for row in (0, 1):
            same, turned = (b["images"][row].equal(x) for x in (a["images"][row],
                                                                a["images"][row].flip(-1)))
            assert same != turned
            flips += turned
            for name in ("ids", "summary", "objects"):
                before, after = (decode(PLAIN, x[name][row]) for x in (a, b))
                other = before.replace("left", "#").replace("right", "left").replace("#", "right")
                wanted = (before if same else other).replace("bleft", "bright")
                assert after == wanted
    assert 15 < flips < 45
    whole = Batches(pairs, PLAIN, 2, 24, 77, min_area=1.0, views=True, local_area=1.0, flip=True)
    r = random.Random("0/0/0")
    pairs.pair(0, r)
    flipped = r.random() < 0.5
    picture = ImageOps.mirror(pairs.open(0)) if flipped else pairs.open(0)
    views = [cut(picture, 24, random_window(picture, 1.0, r)) for _ in (1, 2)]  # of the same flip
    sample = whole.sample(0, 0)
    assert [v.tobytes() for v in views] == [sample[k].tobytes() for k in ("images", "images_l")]


def test_dropped_words():
    """About half of the words, never all, of a share of the captions; else nothing changes."""
    plain, some = (Batches(Scenes(400), PLAIN, 400, 56, 300, drop_words=p)[0] for p in (0, 0.5))
    assert plain["images"].equal(some["images"])
    before, after = ([decode(PLAIN, ids).split() for ids in x["ids"]] for x in (plain, some))
    cut = [(a, b) for a, b in zip(before, after) if a != b]
    assert 160 < len(cut) < 240
    for a, b in cut:
        words = iter(a)
        assert b and all(word in words for word in b)  # those that stay keep their order
    assert 0.4 < sum(len(b) for _, b in cut) / sum(len(a) for a, _ in cut) < 0.6


def test_what_is_off_changes_nothing_and_scenes_refuse(tmp_path):
    pairs = open_dataset(write_csv(tmp_path, SIDED))
    options = {"min_area": 0.5, "views": True, "local_area": 0.5}
    plain = Batches(pairs, PLAIN, 2, 24, 77, **options)[3]
    off = {"captions": 1, "flip": False, "drop_words": 0.0}
    again = Batches(pairs, PLAIN, 2, 24, 77, **options, **off)[3]
    assert plain.keys() == again.keys() and all(plain[k].equal(again[k]) for k in plain)
    for one in ({"captions": 2}, {"flip": True}):
        changed = [Batches(pairs, PLAIN, 2, 24, 77, **options, **one)[k] for k in range(6)]
        assert not all(equal(b, Batches(pairs, PLAIN, 2, 24, 77, **options)[k])
                       for k, b in enumerate(changed))
        refuse(["are for files"], batches, **one)


WORDED = ('image,caption,summary,paraphrases\na.png,one,short,eins | uno |  \nb.jpg,two,,\n'
          'a.png,three,,\n')


def test_paraphrases(tmp_path):
    """Training draws each text as often, evaluation knows the captions alone."""
    pairs = open_dataset(write_csv(tmp_path, WORDED))
    assert pairs.captions == [["one", "three"], ["two"]] and not pairs.bad
    assert pairs.told == [["one", "eins", "uno", "three"], ["two"]]
    assert pairs.texts() == ["one", "eins", "uno", "three", "two"] and pairs.pair(0)[1] == "one"
    r = random.Random(0)
    drawn = collections.Counter(pairs.pair(0, r)[1] for _ in range(400))
    assert set(drawn) == {"one", "three", "eins", "uno"} and min(drawn.values()) > 70
    for text, summary in (("one", "short"), ("uno", "short"), ("three", "three")):
        assert pairs.views(0, None, text)["summary"] == summary
    lines = [{"image": "a.png", "caption": ["one", "three"], "paraphrases": ["eins", "uno"]},
             {"image": "b.jpg", "caption": "two", "paraphrases": ["deux", "", 5, "zwei"]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    other = open_dataset(tmp_path / "d.jsonl")
    assert other.captions == pairs.captions
    assert other.told == [["one", "three", "eins", "uno"], ["two", "deux", "zwei"]]
    assert [bad.reason for bad in other.bad] == ["the paraphrase of b.jpg is empty or no text"] * 2
    plain = open_dataset(write_csv(tmp_path, WORDED.replace("eins | uno", "")))
    assert plain.fingerprint() != pairs.fingerprint()


def test_several_captions_of_a_picture_in_a_step(tmp_path):
    """The k of a picture lie in a row; different ones where there are enough."""
    pairs = open_dataset(write_csv(tmp_path, WORDED))
    own = {0: {"one", "three", "eins", "uno"}, 1: {"two"}}
    seen = set()
    for k in (2, 4, 5):
        batch = Batches(pairs, PLAIN, 2, 24, 77, captions=k, views=True)
        for step in range(8):
            told, numbers = batch[step], [batch.number(2 * step + n)[1] for n in (0, 1)]
            assert told["ids"].shape[0] == told["mask"].shape[0] == 2 * k
            assert told["summary"].shape[0] == 2
            for row, i in enumerate(numbers):
                texts = [decode(PLAIN, x) for x in told["ids"][row * k:row * k + k]]
                assert set(texts) <= own[i] and len(texts) == k
                assert k == 5 or i == 1 or len(set(texts)) == k
                summary = {"one": "short", "eins": "short", "uno": "short"}.get(texts[0], texts[0])
                assert decode(PLAIN, told["summary"][row]) == summary
                seen |= set(texts)
    assert seen == own[0] | own[1]


# ------------------------------------------------------------------------------- the kinds of files
def photos(folder, n=8):
    """n pictures in folder/images, with two captions each -> {name: captions}."""
    (folder / "images").mkdir(exist_ok=True)
    captions = {}
    for k in range(n):
        pixels = np.random.RandomState(k).randint(0, 255, (24 + k, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/p{k}.jpg")
        captions[f"p{k}.jpg"] = [f"picture {k}, with a comma", f"number {k}"]
    return captions


def write_table(path, delimiter, columns, captions, quoting=csv.QUOTE_MINIMAL):
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, delimiter=delimiter, quoting=quoting)
        table.writerow(columns)
        table.writerows([f"images/{name}", c] for name in captions for c in captions[name])


def write_lines(path, captions):
    with open(path, "w") as f:
        for name, texts in captions.items():
            f.write(json.dumps({"file_name": f"./images/{name}", "caption": texts}) + "\n")


def write_coco(path, captions):
    images = [{"id": 7 * k, "file_name": name} for k, name in enumerate(captions)]
    notes = [{"image_id": 7 * k, "caption": captions[name][n]}
             for n in (0, 1) for k, name in enumerate(captions)]
    path.write_text(json.dumps({"images": images, "annotations": notes}))


def write_karpathy(path, captions):
    images = [{"filename": name, "split": "train", "sentences": [{"raw": c} for c in texts]}
              for name, texts in captions.items()]
    other = {"filename": "none.jpg", "split": "test", "sentences": [{"raw": "none"}]}
    path.write_text(json.dumps({"dataset": "own", "images": [other, *images]}))


def write_beside(folder, captions):
    folder.mkdir()
    for name, texts in captions.items():
        content = (folder.parent / "images" / name).read_bytes()
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n")


def add_member(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shards(folder, captions, shards=2):
    (folder / "shards").mkdir()
    names = list(captions)
    for k in range(shards):
        with tarfile.open(folder / f"shards/{k:03}.tar", "w") as tar:
            for name in names[k * len(names) // shards:(k + 1) * len(names) // shards]:
                add_member(tar, name, (folder / "images" / name).read_bytes())
                note = json.dumps({"caption": captions[name][0], "key": name[:-4]})
                add_member(tar, name.replace("jpg", "json"), note.encode())
                add_member(tar, name.replace("jpg", "txt"), "\n".join(captions[name]).encode())


def content_of(pairs):
    """Every picture and caption, and two batches, as one hash."""
    h = hashlib.sha256()
    for i in range(len(pairs)):
        image, caption = pairs.pair(i, random.Random(i))
        h.update(image.tobytes() + caption.encode())
    batches = Batches(pairs, PLAIN, 5, 16, 40, seed=1, min_area=0.5, views=True)
    for step in (0, 3):
        batch = batches[step]
        assert "bad" not in batch
        for name in sorted(batch):
            h.update(batch[name].numpy().tobytes())
    return h.hexdigest()


def test_every_kind_of_file_is_the_same_data(tmp_path):
    """Pairs and batches are equal to the bit."""
    captions, images = photos(tmp_path), str(tmp_path / "images")
    write_table(tmp_path / "comma.csv", ",", ("image", "caption"), captions)
    write_table(tmp_path / "semi.csv", ";", ("Image_Path", " text "), captions, csv.QUOTE_ALL)
    write_table(tmp_path / "clip.tsv", "\t", ("filepath", "title"), captions)
    write_lines(tmp_path / "lines.jsonl", captions)
    write_coco(tmp_path / "captions_val.json", captions)
    write_karpathy(tmp_path / "dataset_own.json", captions)
    write_beside(tmp_path / "beside", captions)
    write_shards(tmp_path, captions)
    kinds = ["comma.csv", "semi.csv", "clip.tsv", "lines.jsonl", "captions_val.json",
             "dataset_own.json:train", "beside", "shards/{000..001}.tar", "shards/*.tar", "shards"]
    found = {}
    for kind in kinds:
        folder = images if ".json" in kind and "jsonl" not in kind else None
        pairs = open_dataset(tmp_path / kind, images=folder)
        assert (len(pairs), pairs.bad, pairs.classes) == (8, [], None), kind
        assert pairs.captions == list(captions.values()) and pairs.label(0) is None
        found[kind] = content_of(pairs)
    assert len(set(found.values())) == 1, found


def test_class_folders(tmp_path):
    """The captions are FILIP's prompts (eq. 6) of the folders' names."""
    photos(tmp_path)
    for k, name in enumerate(("sea_lion", "pug", "pug", ".hidden")):
        folder = tmp_path / "classes" / name / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/p{k}.jpg").rename(folder / f"{k}.jpg")
    pairs = open_dataset(tmp_path / "classes")
    assert pairs.classes == ["pug", "sea lion"] and [pairs.label(i) for i in range(3)] == [0, 0, 1]
    assert pairs.captions == [["a photo of a pug."]] * 2 + [["a photo of a sea lion."]]
    (tmp_path / "classes" / "stray.png").write_bytes(b"")
    assert [bad.what for bad in open_dataset(tmp_path / "classes").bad] == ["stray.png"]
    refuse(["images", "no pair that can be used", "the caption of p4.jpg is empty"],
           open_dataset, tmp_path / "images")


def test_rows_of_one_picture(tmp_path):
    """Equal image_ids, or equal paths however they are spelled, tie captions to one picture."""
    rows = ["image,caption,image_id", "a.png,one,", "./a.png,two,", " a.png ,three,",
            f"{tmp_path}/a.png,four,", "b.jpg,five,7", "sub/../b.jpg,six,7", "a.png,seven,7"]
    pairs = open_dataset(write_csv(tmp_path, "\n".join(rows)))
    assert pairs.images == ["a.png", "b.jpg"]
    assert pairs.captions == [["one", "two", "three", "four", "seven"], ["five", "six"]]
    pairs = open_dataset(write_csv(tmp_path, "image,caption,image_id\na.png,one,1\nb.jpg,two,1\n"))
    assert pairs.captions == [["one", "two"]]


def test_braces_and_globs(tmp_path):
    assert expand("{08..10}.tar") == ["08.tar", "09.tar", "10.tar"]
    assert expand("{1..2}/{1..2}.tar") == ["1/1.tar", "1/2.tar", "2/1.tar", "2/2.tar"]
    assert expand("none*.tar") == ["none*.tar"]
    refuse(["none*.tar", "no pair"], open_dataset, str(tmp_path / "none*.tar"))


@pytest.mark.parametrize("name, content, parts", [
    ("d.json", "{", ["neither COCO's captions nor Karpathy's JSON"]),
    ("d.json", "[]", ["neither COCO's captions nor Karpathy's JSON"]),
    ("d.json", '{"images": [{"split": "val"}, {"split": "test"}]}', ["neither COCO", ":train"]),
    ("d.jsonl", '{"picture": "a.png"}\n', ["no pair", "line 1: the name of the picture"]),
    ("d.jsonl", "[1]\n", ["no pair", "line 1: no JSON object of a pair"]),
    ("d.tar", "no tar", ["no pair", "damaged or packed"])])
def test_files_of_another_kind(tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    refuse([name, *parts], open_dataset, tmp_path / name)


def test_a_split_of_no_file(tmp_path):
    refuse(["none.json:train", "no such file"], open_dataset, tmp_path / "none.json:train")


def test_where_samples_can_not_be_drawn(tmp_path):
    command = [sys.executable, HERE / "data.py", "--n", "1", "--out", tmp_path / "none" / "x.png"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.startswith("data.py: can't write"), run.stderr


def test_bad_records_of_json(tmp_path):
    """Each is named, and the others stay."""
    captions = photos(tmp_path, 2)
    good, more = ({"image": f"images/{name}", "caption": "fine"} for name in captions)
    lines = [good, {"image": "images/p1.jpg", "caption": None}, {"image": 5, "caption": "x"}, [],
             {"image": "images/p1.jpg", "caption": []},
             more | {"caption": ["", "one", 7, "\ud83d"]}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"image": "im\n'
    (tmp_path / "d.jsonl").write_text(text)
    pairs = open_dataset(tmp_path / "d.jsonl")
    assert pairs.captions == [["fine"], ["one"]]
    lines = [int(bad.where.rsplit(" ", 1)[1]) for bad in pairs.bad]
    assert lines == [2, 3, 4, 5, 6, 6, 6, 7]
    images = [{"id": 1, "file_name": "p0.jpg"}, {"id": 2, "file_name": "p1.jpg"}, 5, {"id": 3}]
    notes = [{"image_id": 1, "caption": "one"}, {"image_id": 9, "caption": "of nothing"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    pairs = open_dataset(tmp_path / "c.json", images=tmp_path / "images")
    assert pairs.captions == [["one"]] and len(pairs.bad) == 4


# ------------------------------------------------------------------------------------------- shards
def test_a_cut_shard_loses_only_what_was_cut(tmp_path):
    captions = photos(tmp_path)
    write_shards(tmp_path, captions, 1)
    path = tmp_path / "shards/000.tar"
    content, whole = path.read_bytes(), open_dataset(path)
    shard, offset, size = whole.rows[5].place
    path.write_bytes(content[:offset + size // 2])
    pairs = open_dataset(path)
    assert pairs.images == whole.images[:5] and pairs.captions == whole.captions[:5]
    assert all(pairs.open(i).tobytes() == whole.open(i).tobytes() for i in range(5))
    assert "cut off, damaged or packed" in pairs.bad[0].reason
    path.write_bytes(content[:offset - 512])  # between two members: only the end mark lacks
    pairs = open_dataset(path)
    assert len(pairs) == 5 and len(pairs.bad) == 1


def test_a_shard_with_a_bad_picture_and_one_without_text(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        good = io.BytesIO()
        noise().save(good, "PNG")
        for name, content in (("a/1.png", good.getvalue()), ("a/1.txt", b"one"),
                              ("a/2.png", b"broken"), ("a/2.txt", b"two"),
                              ("a/3.png", good.getvalue()), ("a/4.txt", b"four"),
                              ("a/5.webp", good.getvalue()), ("a/5.json", b'{"text": "five"}')):
            add_member(tar, name, content)
    pairs = open_dataset(tmp_path / "s.tar")
    assert pairs.captions == [["one"], ["two"], ["five"]]
    assert [bad.what for bad in pairs.bad] == ["s.tar/a/3.png", "s.tar/a/4"]
    with pytest.raises(BadRow, match="s.tar: can't read s.tar/a/2.png as a picture .*identify"):
        pairs.open(1)


def texts_of(batch):
    return [decode(PLAIN, x).replace(" ", "") for x in batch["ids"]]


def test_three_ranks_of_two_workers_see_each_sample_once(tmp_path):
    """Also where the batches do not divide the epoch, and from any step, as after a resume."""
    captions = {name: texts[:1] for name, texts in photos(tmp_path, 16).items()}
    write_shards(tmp_path, captions, 3)
    pairs, steps = open_dataset(tmp_path / "shards"), range(8)  # 8 x 6 = 3 epochs of 16
    told = []
    for rank in range(3):
        batches = Batches(pairs, PLAIN, 6, 8, 60, seed=2, rank=rank, world=3)
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=steps, num_workers=2, multiprocessing_context="fork")
        told.append([texts_of(batch) for batch in loader])
        again = Batches(pairs, PLAIN, 6, 8, 60, seed=2, rank=rank, world=3)
        assert all(texts_of(again[k]) == told[-1][k] for k in (5, 6, 7))
    run = [text for step in steps for share in told for text in share[step]]
    for epoch in range(3):
        seen = run[16 * epoch:16 * epoch + 16]
        assert sorted(seen) == sorted(texts[0].replace(" ", "") for texts in captions.values())


# ------------------------------------------------------------------------------ faults of real data
def test_a_stray_quote_swallows_no_rows(tmp_path):
    rows = ["image,caption", "a.png,one", 'b.jpg,"a dog with a bone', "a.png,two",
            'b.jpg,"said ""hello"", and\nwent on, again"', "a.png,three", 'a.png,"and',
            "b.jpg,it", 'b.jpg,ends"']
    path = write_csv(tmp_path, "\n".join(rows))
    pairs = open_dataset(path)
    assert pairs.captions == [["one", "two", "three"],
                              ['said "hello", and\nwent on, again', "it", 'ends"']]
    assert [bad.where for bad in pairs.bad] == [f"{path} line 3", f"{path} line 8"]
    assert {bad.reason for bad in pairs.bad} == {
        "a broken row (a quote is opened and not closed)"}


def test_the_fingerprint_is_of_names_and_captions(tmp_path):
    first = open_dataset(write_csv(tmp_path)).fingerprint()
    rows = "image,caption\n./a.png,one\nb.jpg, two\na.png,three\n"
    assert open_dataset(write_csv(tmp_path, rows)).fingerprint() == first
    for edit in (("three", "four"), ("one", "three"), ("b.jpg", "a.png")):
        changed = open_dataset(write_csv(tmp_path, rows.replace(*edit)))
        assert changed.fingerprint() != first
    (tmp_path / "d.csv").rename(tmp_path / "e.csv")
    os.chdir(tmp_path)
    assert open_dataset("e.csv").fingerprint() == changed.fingerprint()


def test_one_worker_under_spawn(tmp_path):
    """Open files of regions stay behind."""
    regions = {name: np.full((2, 2052), 3, np.float16) for name in ("a.png", "./b.jpg")}
    np.savez(tmp_path / "r.npz", **regions)
    pairs = open_dataset(write_csv(tmp_path), tmp_path / "r.npz")
    batches = Batches(pairs, PLAIN, 2, 24, 77, min_area=0.5, views=True)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(2),
                                         num_workers=1, multiprocessing_context="spawn")
    for step, batch in enumerate(loader):
        assert all(batch[name].equal(batches[step][name]) for name in batch)
    bad = pickle.loads(pickle.dumps(BadRow("here", "x", "broken")))
    assert str(bad) == "here: broken" and bad.what == "x"


def test_marks_belong_to_words_in_learned_vocabularies():
    nine = ("कुत्ता हिंदी में पानी "
            "की किताब के नीचे है")
    learned = Tokenizer.train([nine] * 3, 5000)
    assert len(learned.encode(nine)) == 9 and decode(learned, learned.encode(nine)) == nine
    assert len(WORDS.findall(nine)) > 20  # the published pattern cuts at each mark
    published = Tokenizer([f"q{i} z" for i in range(48894)])
    assert published.words == WORDS and decode(published, published.encode(nine)) != nine
    for text in ("กินน้ำ", "مُحَمَّد", "❤️ it's 👩‍🚀"):
        assert "".join(learned.words.findall(text)) == text.replace(" ", "")


def test_the_merges_file_is_found_or_loaded_once(tmp_path, monkeypatch):
    content, published = b"published", tmp_path / "published.gz"
    published.write_bytes(content)
    monkeypatch.setattr(model, "MERGES_URL", published.as_uri())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refuse(["file://", "invalid hash", ".cache/clip", "learn:8000"], Tokenizer.clip)
    assert not any((tmp_path / ".cache/clip").iterdir())  # no half of it is left
    monkeypatch.setattr(model, "MERGES_SHA256", hashlib.sha256(content).hexdigest())
    path = model.find_merges()
    assert path == str(tmp_path / ".cache/clip/bpe_simple_vocab_16e6.txt.gz")
    published.unlink()
    assert model.find_merges() == path and pathlib.Path(path).read_bytes() == content
    (tmp_path / "weights").mkdir()
    beside = tmp_path / "weights/bpe_simple_vocab_16e6.txt.gz"
    beside.write_bytes(content)
    assert model.find_merges(str(tmp_path / "weights/ViT-B-32.pt")) == str(beside)
    os.remove(path)
    refuse(["can't load", "beside the weights"], model.find_merges)


# ----------------------------------------------------------------------------------------- pictures
def saved(im, kind, **options):
    file = io.BytesIO()
    im.save(file, kind, **options)
    return file.getvalue()


def opened(im, kind="PNG", **options):
    """The pixels that open_image makes of a picture, (H, W, 3)."""
    out = open_image(saved(im, kind, **options))
    assert out.mode == "RGB"
    return np.asarray(out).astype(int)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_colour_white_stays_white(tmp_path, mode):
    Image.new("RGB", (8, 6), "white").convert(mode).save(tmp_path / "x.png")
    im = open_image(tmp_path / "x.png")
    assert im.mode == "RGB" and im.size == (8, 6) and np.asarray(im).min() == 255


def logo():
    """A black square in the middle, clear around it."""
    im = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    im.paste((0, 0, 0, 255), (3, 3, 6, 6))
    return im


def test_colour_transparency_lies_on_white():
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (3, 3, 6, 6))
    grey, colour = logo().getchannel("A").point(lambda a: 255 - a), Image.new("RGB", (9, 9))
    colour.paste((0, 0, 1), (3, 3, 6, 6))
    cases = [opened(logo()), opened(logo().convert("LA")), opened(logo(), "WEBP", lossless=True),
             opened(palette, transparency=1), opened(palette, "GIF", transparency=1), opened(grey),
             opened(colour, transparency=(0, 0, 0)), opened(logo(), "TIFF")]
    for px in cases:
        assert (px[0] == 255).all() and (px[:, 0] == 255).all() and px[3:6, 3:6].max() <= 1
    half = opened(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert (abs(half - 127) <= 1).all()


@pytest.mark.parametrize("kind, dtype, top, expected", [
    ("PNG", np.uint16, 65535, 255), ("TIFF", np.uint16, 65535, 255), ("TIFF", np.uint16, 4095, 255),
    ("TIFF", np.int32, 65535, 255), ("TIFF", np.int32, 10 ** 9, 255),
    ("TIFF", np.float32, 1.0, 255), ("TIFF", np.float32, 255.0, 255),
    ("TIFF", np.float32, 12345.6, 255), ("PNG", np.uint16, 32767, 127)])
def test_colour_numbers_of_more_than_8_bits(kind, dtype, top, expected):
    """A ramp from 0 to the top becomes one from 0 to 255, or as far as the top is in its range."""
    ramp = np.linspace(0, top, 300).astype(dtype)[None].repeat(3, 0)
    px = opened(Image.fromarray(ramp), kind)[1]
    assert px[0].tolist() == [0] * 3 and px[-1].tolist() == [expected] * 3
    assert (np.diff(px[:, 0]) >= 0).all() and len(set(px[:, 0])) >= min(expected, 250)


def test_colour_floats_below_zero_and_without_value():
    x = np.array([[-1, 0, 1], [np.nan, np.inf, -np.inf]], np.float32)
    assert opened(Image.fromarray(x), "TIFF")[..., 0].tolist() == [[0, 127, 255], [127, 127, 127]]
    assert opened(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF").max() == 0


def test_colour_cmyk():
    """Also as Adobe writes it into a JPEG, inverted."""
    red = Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    assert b"Adobe" in saved(red, "JPEG")
    for kind in ("JPEG", "TIFF"):
        assert abs(opened(red, kind)[8, 8] - (255, 0, 0)).max() < 6


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        px = opened(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(px[4, 4] - (255, 0, 0)).max() < 9, kind


def test_exif_turns_a_picture():
    im = Image.new("RGB", (32, 16), "white")
    im.paste("black", (0, 0, 16, 8))  # the upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: now the upper right
    for kind in ("JPEG", "PNG", "TIFF"):
        px = opened(im, kind, exif=exif)
        assert px.shape == (32, 16, 3) and px[4, 12].max() < 40 and px[4, 3].min() > 215, kind
    damaged = saved(im, "JPEG", exif=exif.tobytes()[:20] + b"\xff" * 9)
    assert open_image(damaged).size == (32, 16)


def test_jpegs_are_decoded_no_larger_than_needed(monkeypatch):
    """So that the limit of pixels counts what is decoded."""
    big = saved(Image.new("RGB", (1200, 800), "red"), "JPEG")
    sizes = {size: open_image(big, size).size for size in (100, 101, 300, 900)}
    assert sizes == {100: (150, 100), 101: (300, 200), 300: (600, 400), 900: (1200, 800)}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert open_image(big, 100).size == (150, 100)
    refuse(["more than 100,000"], open_image, big, 300)
    refuse(["more than 100,000"], open_image, saved(Image.new("L", (400, 300)), "PNG"))


def test_a_picture_bomb_is_refused():
    """Of 30,000 x 30,000 pixels only the size is read."""
    head = saved(Image.new("1", (8, 8)), "PNG")
    size = (30000).to_bytes(4, "big")
    chunk = b"IHDR" + size * 2 + head[24:29]
    bomb = head[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + head[33:]
    refuse(["more than 89,478,485"], open_image, bomb)


def test_no_file_is_run_or_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    refuse(["pipe.jpg", "no such file"], open_image, tmp_path / "pipe.jpg")
    refuse(["PostScript"], open_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refuse(["identify"], open_image, b"")


# ---------------------------------------------------------------------------------------- the check
def test_check_reads_and_counts_everything(tmp_path):
    noise().resize((24, 24)).save(tmp_path / "c.png")
    rows = ["c.png,one", "c.png,", "none.png,two", "same.png,red", "café.png,x"]
    write_csv(tmp_path, "image,caption\na.png,one\nb.jpg,two\n" + "\n".join(rows), "latin-1")
    (tmp_path / "same.png").write_bytes((tmp_path / "c.png").read_bytes())
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:2000])
    command = [sys.executable, HERE / "data.py", "check", "d.csv"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for part in ("3 pictures with 3 captions can be used; 4 faults", "width         24 to 60",
                 "pictures      1 of 3", "captions      1 of 3 repeat", "there is no PICTURE",
                 "the caption of PICTURE is empty", "can't read PICTURE as a picture"):
        assert part in run.stdout, (part, run.stdout)
    with open(tmp_path / "bad_rows.csv", newline="") as f:
        told = list(csv.reader(f))
    assert [row[0] for row in told] == ["where", *(f"d.csv line {n}" for n in (5, 6, 8, 3))]
    with pytest.raises(UserError):
        open_dataset(tmp_path / "none")


# --------------------------------------------------------------------------------- FILIP's cleaning
def table_of_faults(folder):
    """A table in which each rule is broken; one caption may break several -> its path."""
    sizes = {"good.png": (300, 200), "small.jpg": (500, 199), "wide.png": (601, 200),
             "edge.png": (600, 200), "thin.png": (199, 900)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    rows = [("good.png", text) for text in (
        "a dog", "A dog, running.", "img_0.jpg", "DSC0012.JPG", "12/05", "...",  # 4 without words
        "Ein Hund im Park", "une femme dans la rue", "собака на пляже",
        "一只狗",  # 4 not English
        "café au lait in Paris with friends", "Rio de Janeiro")]
    rows += [("edge.png", "Repeated often")] * 6 + [("good.png", "repeated OFTEN")] * 5
    rows += [("edge.png", "ten times")] * 10
    rows += [("small.jpg", "a cat"), ("small.jpg", "img_0.jpg"), ("thin.png", "small comes first"),
             ("wide.png", "a wide one"), ("broken.jpg", "repeated often"), ("none.png", "x y")]
    with open(folder / "in.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("image", "caption"), *rows])
    return folder / "in.csv"


def counts_of(said):
    return [int(line.split()[0].replace(",", "")) for line in said.splitlines()]


def test_clean_counts_each_rule(tmp_path, capsys):
    """Equal to a count by hand, each caption under the first rule that it breaks."""
    path = table_of_faults(tmp_path)
    before, out = path.read_bytes(), tmp_path / "deeper/out.csv"
    out.parent.mkdir()
    command = [sys.executable, HERE / "data.py", "clean", "in.csv", "deeper/out.csv"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    # faults of rows, unread, small, long, without words, foreign, repeated, kept, pictures kept
    assert counts_of(run.stdout) == [1, 1, 3, 1, 4, 4, 11, 14, 2], run.stdout
    assert "200 pixels" in run.stdout and path.read_bytes() == before
    kept = open_dataset(out)  # from where it lies
    assert kept.images == ["../good.png", "../edge.png"] and not kept.bad
    assert kept.captions == [["a dog", "A dog, running.", "café au lait in Paris with friends",
                              "Rio de Janeiro"], ["ten times"] * 10]
    assert kept.open(1).size == (600, 200)
    clean_table(path, str(tmp_path / "all.csv"), None, 100)
    said = capsys.readouterr().out
    assert counts_of(said) == [1, 1, 0, 2, 5, 4, 11, 15, 3] and "100 pixels" in said


def test_clean_spoils_nothing(tmp_path, monkeypatch):
    """What is there stays, and what can't be done is one sentence."""
    before = table_of_faults(tmp_path).read_bytes()
    monkeypatch.chdir(tmp_path)
    os.symlink("in.csv", "link.csv")
    os.symlink("in.csv", "x.csv.tmp")
    write_shards(tmp_path, photos(tmp_path, 2), 1)
    os.mkdir("pets")
    os.mkdir("pets/pug")
    noise().save("pets/pug/1.png")
    for path, out, said in (("in.csv", "in.csv", "name a new .csv file"),
                            ("in.csv", "link.csv", "name a new .csv file"),
                            ("in.csv", "x.csv", "name a new .csv file"),
                            ("none.csv", "out.csv", "no such file"),
                            ("in.csv", "none/out.csv", "in a folder that is there"),
                            ("shards", "out.csv", "can be cleaned"),
                            ("pets", "out.csv", "can be cleaned"),
                            ("in.csv", "o.json", "name a new .csv file")):
        refuse([said], clean_table, path, out, None, 200)
    assert (tmp_path / "in.csv").read_bytes() == before
    assert not (tmp_path / "out.csv").exists()
