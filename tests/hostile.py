"""A hundred hostile inputs: no traceback, no hang, nothing lost.

    python tests/hostile.py              # all hundred, about a minute
    python tests/hostile.py --seed 5     # another hundred

Each input is a good small data set of one kind that is then damaged by lot: bytes changed, cut out
or put in, lines doubled, shuffled or in another encoding, pictures cut or replaced. Allowed is: one
sentence (UserError) for the whole if nothing of it is whole, or pairs. Then each sample that was
not damaged has to be there with its own pixels and caption, and each one that was damaged has to be
there, or named among the bad rows. (Of a file cut as a whole nobody can tell which rows it had.)
"""
import argparse
import io
import json
import os
import pathlib
import random
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings

import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from data import BadRow, Batches, Tokenizer, UserError, open_dataset  # noqa: E402

N, LIMIT = 12, 30  # pictures in a data set, seconds for an input
WORDS = "a dog runs over the green field and jumps into cold water".split()
KINDS = ("comma", "semicolon", "tab", "jsonl", "coco", "karpathy", "beside", "classes", "shards")


def make_samples(r):
    """{name: (bytes of the picture, caption)}"""
    samples = {}
    for k in range(N):
        pixels = np.random.RandomState(r.randrange(10 ** 6)).randint(0, 255, (20, 28, 3), np.uint8)
        file, kind = io.BytesIO(), r.choice(("JPEG", "PNG", "WEBP"))
        Image.fromarray(pixels).save(file, kind)
        caption = f"number {k} " + " ".join(r.choices(WORDS, k=r.randrange(3, 9)))
        if r.random() < 0.3:
            caption += ", with a comma; and é"
        samples[f"{k:02}.{kind.lower().replace('jpeg', 'jpg')}"] = file.getvalue(), caption
    return samples


# -------------------------------------------------------- damage to a text, of which lines are rows
def table_lines(samples, delimiter, r):
    """Captions in quotes where a delimiter is in them, and elsewhere now and then."""
    for name, (_, caption) in samples.items():
        if delimiter in caption or r.random() < 0.3:
            caption = f'"{caption}"'
        yield f"{name}{delimiter}{caption}"


def damage_line(line, r):
    """One line, as bytes, made worse."""
    raw, way, at = line.encode(), r.randrange(11), r.randrange(len(line))
    noise = bytes(r.randrange(256) for _ in range(r.randrange(1, 40))).replace(b"\n", b"")
    quote = raw.find(b" ") - 6  # about where the caption begins
    return (raw[:at], raw[:at] + noise + raw[at:], raw[:quote] + b'"' + raw[quote:], b'"' + raw,
            line.encode("latin-1"), line.encode("utf-16"), raw[:at] + b"\0" + raw[at:],
            raw + b",x" * r.randrange(1, 9), raw + b" word" * 10 ** r.randrange(3, 6), raw + b'"',
            raw[:quote] + b'"' + raw[quote:])[way]


def damage_lines(lines, names, r):
    """-> (bytes, names whose lines are damaged). Some lines are doubled, all may be shuffled."""
    rows, hurt = [], set()
    for name, line in zip(names, lines):
        if r.random() < 0.3:
            hurt.add(name)
            rows.append(damage_line(line, r))
        else:
            rows += [line.encode()] * r.choice((1, 1, 2))
    if r.random() < 0.5:
        r.shuffle(rows)
    return r.choice((b"\n", b"\r\n")).join(rows) + b"\n" * r.randrange(3), hurt


def damage_bytes(content, r):
    """A file made worse: cut, or some bytes changed, or something else in its place."""
    at, way = r.randrange(len(content)), r.randrange(5)
    noise = bytes(r.randrange(256) for _ in range(r.randrange(1, 60)))
    return (content[:at], content[:at] + noise + content[at + len(noise):], b"", b"a text",
            content[:at] + content[at + 9:])[way]


def damage_pictures(samples, r):
    """Some pictures' bytes -> ({name: (bytes, caption)}, names)"""
    hurt = {name for name in samples if r.random() < 0.25}
    worse = {name: (damage_bytes(content, r) if name in hurt else content, caption)
             for name, (content, caption) in samples.items()}
    return worse, hurt


# ---------------------------------------------------------------------------- a data set of a kind
def write_pictures(folder, samples, r, hurt):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, _) in samples.items():
        if name in hurt and r.random() < 0.2:
            continue  # a missing file
        (folder / name).write_bytes(content)


def make_text(folder, kind, samples, r):
    """A table or JSONL with damaged lines -> (path, damaged names)."""
    if kind == "jsonl":
        head, lines = b"", [json.dumps({"image": name, "caption": caption}, ensure_ascii=False)
                            for name, (_, caption) in samples.items()]
    else:
        delimiter = {"comma": ",", "semicolon": ";", "tab": "\t"}[kind]
        head = f"image{delimiter}caption\n".encode()
        lines = list(table_lines(samples, delimiter, r))
    content, hurt = damage_lines(lines, samples, r)
    path = folder / ("d.jsonl" if kind == "jsonl" else "d.tsv")
    path.write_bytes(head + content)
    return path, hurt


def make_json(folder, kind, samples, r):
    """COCO's or Karpathy's JSON, some records of it spoiled -> (path, damaged names)."""
    hurt, images, notes = {name for name in samples if r.random() < 0.2}, [], []
    spoiled = (None, 5, [], {}, {"id": 3}, {"file_name": 7, "filename": 7, "split": "train"})
    for k, (name, (_, caption)) in enumerate(samples.items()):
        whole = {"id": k, "file_name": name, "filename": name, "split": "train",
                 "sentences": [{"raw": caption}]}
        images.append(r.choice(spoiled) if name in hurt else whole)
        note = {"image_id": k, "caption": caption}
        if r.random() < 0.1:
            hurt.add(name)
            note = r.choice((None, 5, [], {}, {"image_id": k}, note | {"caption": 7}))
        notes.append(note)
    if kind == "coco":
        (folder / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
        return folder / "c.json", hurt
    (folder / "k.json").write_text(json.dumps({"images": images}))
    return f"{folder / 'k.json'}:train", hurt


def make_folder(folder, kind, samples, r):
    hurt = set()
    for name, (content, caption) in samples.items():
        if kind == "classes":
            below = folder / "data" / caption.split()[2]
            below.mkdir(parents=True, exist_ok=True)
            (below / name).write_bytes(content)
            continue
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / name).write_bytes(content)
        text = caption.encode()
        if r.random() < 0.2:
            hurt.add(name)
            text = damage_line(caption, r)
        (folder / "data" / name).with_suffix(".txt").write_bytes(text)
    return folder / "data", hurt


def make_shards(folder, kind, samples, r):
    """Two tar files; one may be cut, or have bytes changed."""
    hurt, names = set(), list(samples)
    for k, part in enumerate((names[:N // 2], names[N // 2:])):
        path, starts = folder / f"{k}.tar", []
        with tarfile.open(path, "w") as tar:
            for name in part:
                starts.append(tar.offset)
                content, caption = samples[name]
                for member, data in ((name, content), (name.split(".")[0] + ".txt",
                                                       caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        if r.random() < 0.6:
            content = bytearray(path.read_bytes())
            at = r.randrange(starts[-1])
            hurt |= {name for name, end in zip(part, [*starts[1:], 10 ** 9]) if end > at}
            content[at:] = damage_bytes(bytes(content[at:]), r)
            path.write_bytes(content)
    return str(folder / "{0..1}.tar"), hurt


def build(folder, kind, r):
    """-> (path, --images, good samples, names that are damaged in some way)"""
    good = make_samples(r)
    samples, hurt = damage_pictures(good, r)
    make = {"coco": make_json, "karpathy": make_json, "beside": make_folder,
            "classes": make_folder, "shards": make_shards}.get(kind, make_text)
    path, more = make(folder, kind, samples, r)
    if make in (make_text, make_json):
        write_pictures(folder, samples, r, hurt)
        if r.random() < 0.2:  # the file as a whole, its first line too
            file = pathlib.Path(str(path).removesuffix(":train"))
            file.write_bytes(damage_bytes(file.read_bytes(), r))
            return path, good, set(good)
    return path, good, hurt | more


# ---------------------------------------------------------------------------------------- the check
def pixels(content):
    with Image.open(io.BytesIO(content)) as im:
        return im.convert("RGB").tobytes()


def lost(pairs, good, hurt, kind, read):
    """Names of samples that are neither there as they should be nor named as bad."""
    there = {os.path.basename(name): i for i, name in enumerate(pairs.images)}
    named = [*pairs.bad, *(x for x in read if isinstance(x, BadRow))]
    said = " ".join(f"{bad.what} {bad}" for bad in named)
    absent = [name for name in hurt if name not in there]
    if len(absent) > len(named) and kind != "shards" and len(hurt) < N:
        yield f"{len(absent)} damaged samples of which only {len(named)} are named"
    for name, (content, caption) in good.items():
        i, stem = there.get(name), name.split(".")[0]
        if name in hurt:
            if i is None and not named and len(hurt) < N:
                yield f"{name} (damaged, and not named)"
            elif i is not None and isinstance(read[i], BadRow) and stem not in said:
                yield f"{name} (can't be read, and not named)"
        elif i is None or isinstance(read[i], BadRow):
            yield name
        elif read[i].tobytes() != pixels(content):
            yield f"{name} (other pixels)"
        elif kind != "classes" and " ".join(caption.split()) not in map(
                " ".join, map(str.split, pairs.captions[i])):
            yield f"{name} (another caption: {pairs.captions[i]})"


def open_all(pairs):
    out = []
    for i in range(len(pairs)):
        try:
            out.append(pairs.open(i))
        except BadRow as e:
            out.append(e)
    return out


def attack(kind, seed, folder):
    """-> what became of one input: "pairs" or "one sentence". Raises what should not be."""
    r = random.Random(f"{kind}/{seed}")
    path, good, hurt = build(folder, kind, r)
    try:
        pairs = open_dataset(path)
    except UserError as e:
        assert "\n" not in str(e) and str(e).isprintable(), f"no sentence: {e!r}"
        assert len(hurt) == N, f"refused, though {N - len(hurt)} samples are whole: {e}"
        return "one sentence"
    missing = list(lost(pairs, good, hurt, kind, open_all(pairs)))
    assert not missing, f"lost: {missing}"
    assert all(str(bad).isprintable() for bad in pairs.bad)
    batches = Batches(pairs, Tokenizer([]), min(4, len(pairs)), 16, 32, seed=seed, min_area=0.5)
    for step in range(4):
        batch = batches[step]
        assert "error" not in batch or len(good) == len(hurt), batch.get("error")
    pairs.fingerprint()
    return "pairs"


def too_long(signum, frame):
    raise TimeoutError(f"more than {LIMIT} seconds")


def main():
    ap = argparse.ArgumentParser(description="Open a hundred damaged data sets.")
    ap.add_argument("--seed", type=int, default=0, help="another seed is another hundred")
    ap.add_argument("--n", type=int, default=100, help="how many inputs")
    args = ap.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, too_long)
    outcomes, failed, start = {"pairs": 0, "one sentence": 0}, 0, time.time()
    for k in range(args.n):
        kind = KINDS[k % len(KINDS)]
        with tempfile.TemporaryDirectory() as folder:
            signal.alarm(LIMIT)
            try:
                outcomes[attack(kind, args.seed * 1000 + k, pathlib.Path(folder))] += 1
            except Exception:
                failed += 1
                print(f"input {k} ({kind}):\n{traceback.format_exc()}")
            signal.alarm(0)
    told = ", ".join(f"{n} {what}" for what, n in outcomes.items())
    print(f"{args.n} inputs in {time.time() - start:.0f} s: {told}; {failed} failed")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
