"""Tests of readers.py: each kind of file, each fault that people's files have, each picture mode.

    pytest tests/test_readers.py             # half a minute on one core
    pytest tests/test_readers.py -k colour   # what becomes of a picture's colours alone
"""
import csv
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import urllib.request
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import BadRow, Batches, Tokenizer, UserError, center_crop, fit, open_dataset, open_image
from readers import expand
from test_data import PLAIN, noise, refuse, write_csv

HERE = pathlib.Path(__file__).parent.parent


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
    refuse(["images", "no pair that can be used", "p4.jpg has no caption"],
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
    assert expand("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]
    assert expand("none*.tar") == ["none*.tar"]
    refuse(["none*.tar", "no pair"], open_dataset, str(tmp_path / "none*.tar"))


@pytest.mark.parametrize("name, content, parts", [
    ("d.json", "{", ["neither COCO's captions nor Karpathy's JSON"]),
    ("d.json", "[]", ["neither COCO's captions nor Karpathy's JSON"]),
    ("d.json", '{"images": [{"split": "val"}, {"split": "test"}]}', ["test, val", ":train"]),
    ("d.jsonl", '{"picture": "a.png"}\n', ["no pair", "line 1", "no column of the caption"]),
    ("d.jsonl", "[1]\n", ["no pair", "line 1: no JSON object of a pair"]),
    ("d.tar", "no tar", ["no pair", "damaged or packed"])])
def test_files_of_another_kind(tmp_path, name, content, parts):
    (tmp_path / name).write_text(content)
    refuse([name, *parts], open_dataset, tmp_path / name)


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
    shard, offset, size = whole.places[5]
    path.write_bytes(content[:offset + size // 2])
    pairs = open_dataset(path)
    assert pairs.images == whole.images[:5] and pairs.captions == whole.captions[:5]
    assert all(pairs.open(i).tobytes() == whole.open(i).tobytes() for i in range(5))
    assert "p5 has no whole picture" in pairs.bad[0].reason
    assert "cut off, damaged or packed" in pairs.bad[1].reason
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
    return [PLAIN.decode(x).replace(" ", "") for x in batch["ids"]]


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
    for change in (("three", "four"), ("one", "three"), ("b.jpg", "a.png")):
        changed = open_dataset(write_csv(tmp_path, rows.replace(*change)))
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
    nine = "कुत्ता हिंदी में पानी की किताब के नीचे है"
    learned = Tokenizer.train([nine] * 3, 5000)
    assert len(learned.encode(nine)) == 9 and learned.decode(learned.encode(nine)) == nine
    assert len(data.WORDS.findall(nine)) > 20  # the published pattern cuts at each mark
    published = Tokenizer([f"q{i} z" for i in range(48894)])
    assert published.words is data.WORDS and published.decode(published.encode(nine)) != nine
    for text in ("กินน้ำ", "مُحَمَّد", "❤️ it's 👩‍🚀"):
        assert "".join(data.MARKED_WORDS.findall(text)) == text.replace(" ", "")


def test_the_merges_file_is_found_or_loaded_once(tmp_path, monkeypatch):
    content, calls = b"published", []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(content)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    refuse(["https://", "another file", ".cache/clip", "learn:8000"], Tokenizer.clip)
    monkeypatch.setattr(data, "MERGES_SHA256", hashlib.sha256(content).hexdigest())
    path = data.find_merges()
    assert path == str(tmp_path / ".cache/clip/bpe_simple_vocab_16e6.txt.gz")
    assert data.find_merges() == path and pathlib.Path(path).read_bytes() == content
    assert len(calls) == 2 and not list(tmp_path.glob("**/*.tmp"))
    (tmp_path / "weights").mkdir()
    beside = tmp_path / "weights/bpe_simple_vocab_16e6.txt.gz"
    beside.write_bytes(content)
    assert data.find_merges(str(tmp_path / "weights/ViT-B-32.pt")) == str(beside)

    def offline(url, timeout):
        raise OSError("no network")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    os.remove(path)
    refuse(["no network", "beside the weights"], data.find_merges)


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
    refuse(["no such file"], open_image, tmp_path / "pipe.jpg")
    refuse(["PostScript"], open_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refuse(["identify"], open_image, b"")


def test_fit():
    im = Image.new("RGB", (60, 30), "black")
    padded = np.asarray(fit(im, 20, "pad"))
    assert padded.shape == (20, 20, 3) and padded[:5].min() == 255 and padded[6:14].max() == 0
    assert fit(noise(), 20).tobytes() == center_crop(noise(), 20).tobytes()


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
    for part in ("3 pictures and 4 captions can be used, 4 rows not", "width         24 to 60",
                 "pictures      1 of 3", "captions      1 of 4", "there is no a picture",
                 "the caption of a picture is empty", "can't read a picture as a picture"):
        assert part in run.stdout, (part, run.stdout)
    with open(tmp_path / "bad_rows.csv", newline="") as f:
        told = list(csv.reader(f))
    assert [row[0] for row in told] == ["where", *(f"d.csv line {n}" for n in (5, 6, 8, 3))]
    with pytest.raises(UserError):
        open_dataset(tmp_path / "none")
