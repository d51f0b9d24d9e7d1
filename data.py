"""Data: CLIP's byte-level BPE tokeniser, the built-in scenes, the CSV reader, crops and batches.

    python data.py                        # print five scenes and draw them into samples.png
    python data.py --data photos/train.csv --n 8

Covers: FILIP 3.1.2 (prompts, eq. 6) and 3.1.3 (several texts a picture), PyramidCLIP 3.1 (summary, object phrases, boxes, region
features, three kinds of mismatch), SPARC 4.1 and D.5 (prompts, eq. 9).

Differs from the papers: they train on 15 million to 4 billion web pairs and cannot be repeated without them. `Scenes` draws its own
pictures, with exact ground truth for everything the papers measure, so that the methods can be trained and checked on a laptop.
A T5 summary, a back-translated caption and a detector's regions become rules here; region features are a fixed random projection.
Real data brings its own summaries, objects and regions (Pairs says how), or does without: a caption's first clause is then its summary.

The way of the data:  Scenes | Pairs  --.pair(i, r)-->  (picture, caption)  --Batches-->  {"images", "ids", "mask"}  -> model.py
PyramidCLIP's views:                  --.views(i, picture)-->  summary, objects, regions  --Batches-->  more keys of the same dict
"""
import argparse, collections, csv, functools, gzip, heapq, html, os, random, warnings
import ftfy
import numpy as np
import regex
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageOps


class UserError(Exception):
    """Something the user can put right: its text is one sentence that says what and how. The scripts print it and exit with 2."""


def write(path, save):
    """Write a file as a whole or not at all: save(temporary path), then rename. What stood there before survives any failure."""
    try:
        save(path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:                           # torch.save reports a full disk as RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise UserError(f"can't write {path} ({str(e).splitlines()[0]}): free some space or choose another place; "
                        f"what was there before is kept") from None


# ---------------------------------------------------------------------------------------------------------------- the tokeniser
BOS, EOT = "<|startoftext|>", "<|endoftext|>"
WORDS = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def byte_symbols():
    """Byte -> printable character. Printable bytes stand for themselves, the other 68 move to code points from 256 on."""
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + n) for n, b in enumerate(rest)}   # keep's order is the vocabulary's order


BYTES = byte_symbols()


def clean(text):
    """CLIP's cleaning: repair broken unicode, undo HTML escapes (twice), fold white space, lower case."""
    if text.isascii() and text.isprintable() and "&" not in text:  # nothing to repair; ftfy takes as long as drawing half a scene
        return " ".join(text.split()).lower()
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class Tokenizer:
    """CLIP's byte-pair encoding. Vocabulary: 256 bytes, 256 bytes that end a word, one symbol a merge, BOS, EOT (always the last id).

    merges: list of "a b" strings in order of priority. Any text can be encoded, whatever the vocabulary was learned from.
    """

    def __init__(self, merges):
        self.merges = list(merges)
        symbols = [*BYTES.values()] + [c + "</w>" for c in BYTES.values()] + ["".join(m.split()) for m in self.merges] + [BOS, EOT]
        self.symbols = symbols
        self.ids = {s: i for i, s in enumerate(symbols)}
        self.rank = {tuple(m.split()): i for i, m in enumerate(self.merges)}
        self.bos, self.eot = len(symbols) - 2, len(symbols) - 1
        self.cache = {BOS: [self.bos], EOT: [self.eot]}

    @property
    def vocab_size(self):
        return len(self.symbols)

    @classmethod
    def clip(cls, path=None):
        """The published vocabulary of 49,408 entries, from the file bpe_simple_vocab_16e6.txt.gz of the repository openai/CLIP."""
        path = path or "bpe_simple_vocab_16e6.txt.gz"
        try:
            with gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8") as f:
                lines = f.read().split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as e:
            raise UserError(f"can't read CLIP's merges file {path} ({getattr(e, 'strerror', None) or e}): take bpe_simple_vocab_16e6.txt.gz from the "
                            f"repository openai/CLIP and give its path, or use --vocab learn:8000") from None
        merges = lines[1:49152 - 256 - 2 + 1]                       # line 0 is a version note; 48,894 merges follow
        if len(merges) != 48894 or any(len(m.split()) != 2 for m in merges):
            raise UserError(f"{path} is not CLIP's merges file: expected a note and 48,894 lines of two symbols each")
        return cls(merges)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a vocabulary of at most vocab_size entries (at least 514: the bytes, BOS and EOT) from an iterable of texts.

        The most frequent pair is merged first, ties by the alphabet; it stops early when every word is one symbol.
        """
        if vocab_size < 514:
            raise UserError(f"a vocabulary needs at least 514 entries (bytes and two marks), not {vocab_size}")
        counts = collections.Counter(w for t in texts for w in WORDS.findall(clean(t)))
        words = [(cls.split(w), n) for w, n in sorted(counts.items()) if w not in (BOS, EOT)]
        pairs, where = collections.Counter(), collections.defaultdict(set)         # pair -> count, pair -> numbers of the words with it
        for k, (word, n) in enumerate(words):
            for p in zip(word, word[1:]):
                pairs[p] += n
                where[p].add(k)
        merges, heap = [], [(-n, p) for p, n in pairs.items()]
        heapq.heapify(heap)
        while len(merges) < vocab_size - 514 and heap:
            n, best = heapq.heappop(heap)
            if not n or -n != pairs[best]:                          # out of date: the pair's count has changed since it was pushed
                continue
            merges.append(" ".join(best))
            changed = set()
            for k in where.pop(best):
                word, n = words[k]
                merged = cls.merge(word, best)
                words[k] = merged, n
                for w, sign in ((word, -n), (merged, n)):
                    for p in zip(w, w[1:]):
                        pairs[p] += sign
                        changed.add(p)
                        where[p].add(k)
            for p in changed:
                heapq.heappush(heap, (-pairs[p], p))
        return cls(merges)

    @staticmethod
    def split(word):
        s = [BYTES[b] for b in word.encode("utf-8")]
        return s[:-1] + [s[-1] + "</w>"]

    @staticmethod
    def merge(word, pair):
        out, i = [], 0
        while i < len(word):
            hit = i + 1 < len(word) and (word[i], word[i + 1]) == pair
            out.append(word[i] + word[i + 1] if hit else word[i])
            i += 2 if hit else 1
        return out

    def bpe(self, word):
        """Ids of one word (a match of WORDS)."""
        if word not in self.cache:
            s = self.split(word)
            while len(s) > 1:
                pair = min(zip(s, s[1:]), key=lambda p: self.rank.get(p, 1 << 30))
                if pair not in self.rank:
                    break
                s = self.merge(s, pair)
            self.cache[word] = [self.ids[x] for x in s]
        return self.cache[word]

    def encode(self, text):
        """Ids of a text, without BOS and EOT."""
        return [i for w in WORDS.findall(clean(text)) for i in self.bpe(w)]

    def __call__(self, texts, context_length=77):
        """texts: a string or a list -> ids (N, L) int64 padded with 0, mask (N, L) bool, L = context_length.

        The mask is True up to and including the first EOT. It comes from lengths: id 0 is padding, but also the real token "!".
        A longer text keeps its first L ids, the last of them overwritten by EOT.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = np.zeros((len(texts), context_length), dtype=np.int64)
        mask = np.zeros((len(texts), context_length), dtype=bool)
        for n, text in enumerate(texts):
            row = [self.bos, *self.encode(text)][:context_length - 1] + [self.eot]
            ids[n, :len(row)] = row
            mask[n, :row.index(self.eot) + 1] = True
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def decode(self, ids):
        """Ids -> text; BOS, EOT and what follows EOT are dropped."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.eot)] if self.eot in ids else ids
        text = "".join(self.symbols[i] for i in ids if i != self.bos).replace("</w>", " ")
        back = {c: b for b, c in BYTES.items()} | {" ": 32}
        return bytes(back[c] for c in text).decode("utf-8", errors="replace").strip()


# ------------------------------------------------------------------------------------------------------------------- the scenes
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {"red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (250, 225, 50), "green": (50, 165, 70),
           "cyan": (60, 205, 220), "blue": (40, 75, 215), "purple": (130, 50, 170), "pink": (250, 130, 185)}
FILLS = ("", "striped", "dotted")                                   # "" is plain, and no word says so
SIZES = {"small": 2, "": 3}                                         # diameter in sevenths of the picture: 16 and 24 of 56 pixels
BACKGROUNDS = {"sand": ((196, 178, 140), 14), "snow": ((236, 240, 244), 8), "wood": ((120, 88, 60), 16), "slate": (( 66, 70, 76), 12)}
HELD_OUT = {(c, SHAPES[(3 * i + 1) % 8]) for i, c in enumerate(list(COLOURS)[:6])}   # 6 of 64 pairs: only in split "composition"
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Thing = collections.namedtuple("Thing", "size fill colour shape box")            # box = x1, y1, x2, y2 in pixels
Word = collections.namedtuple("Word", "text thing kind", defaults=(-1, ""))      # thing: index of the object the word names, or -1


def outline(shape, d):
    """Mask of a shape of diameter d: an "L" picture (d, d), drawn four times as large and reduced."""
    s = 4 * d
    im = Image.new("L", (s, s))
    draw, p = ImageDraw.Draw(im), lambda *xy: [(int(x * (s - 1)), int(y * (s - 1))) for x, y in xy]
    if shape == "circle":
        draw.ellipse((0, 0, s - 1, s - 1), 255)
    elif shape == "square":
        draw.rectangle((s // 14, s // 14, s - s // 14, s - s // 14), 255)
    elif shape == "triangle":
        draw.polygon(p((.5, .02), (1, .95), (0, .95)), 255)
    elif shape == "star":
        draw.polygon(p((.5, 0), (.62, .36), (1, .37), (.69, .6), (.8, .97), (.5, .75), (.2, .97), (.31, .6), (0, .37), (.38, .36)), 255)
    elif shape == "ring":
        draw.ellipse((0, 0, s - 1, s - 1), 255)
        draw.ellipse((s // 4, s // 4, s - s // 4, s - s // 4), 0)
    elif shape == "cross":
        draw.rectangle((s // 3, 0, s - s // 3, s), 255)
        draw.rectangle((0, s // 3, s, s - s // 3), 255)
    elif shape == "heart":
        draw.ellipse((0, s // 20, s * 53 // 100, s * 58 // 100), 255)
        draw.ellipse((s * 47 // 100, s // 20, s - 1, s * 58 // 100), 255)
        draw.polygon(p((.04, .42), (.96, .42), (.5, 1)), 255)
    elif shape == "moon":
        draw.ellipse((0, 0, s - 1, s - 1), 255)
        draw.ellipse((s * 3 // 10, -s // 12, s * 12 // 10, s * 82 // 100), 0)
    return im.resize((d, d), Image.Resampling.BOX)


@functools.lru_cache(None)
def sprite(shape, fill, d, period):
    """(mask of the whole shape, mask of its pattern or None)."""
    mask = outline(shape, d)
    if not fill:
        return mask, None
    y, x = np.mgrid[:d, :d]
    on = ((x + y) % period < period // 2) if fill == "striped" else ((x % period < period // 2) & (y % period < period // 2))
    return mask, Image.fromarray((np.asarray(mask) * on).astype(np.uint8))


@functools.lru_cache(None)
def texture(name, size):
    """A background three times the picture's side; scenes crop theirs at random. Smooth noise, fixed for all time."""
    (r, g, b), amount = BACKGROUNDS[name]
    rng, side = random.Random(name), 3 * size
    grid = (4, 48) if name == "wood" else (24, 24)                  # wood has a grain
    noise = Image.frombytes("L", grid, rng.randbytes(grid[0] * grid[1])).resize((side, side), Image.Resampling.BICUBIC)
    n = (np.asarray(noise, dtype=np.int16)[..., None] - 128) * amount // 128
    return Image.fromarray(np.clip(np.array([r, g, b], dtype=np.int16) + n, 0, 255).astype(np.uint8))


class Scenes:
    """Small pictures of coloured shapes with exact ground truth, drawn on demand and the same on every machine.

    n: how many. seed: another seed is another set. size: side in pixels, a multiple of 7. split: "train", "val", "test" never share a
    scene; "composition" has at least one colour-shape pair in each scene that no other split ever shows. objects: least and most
    objects, fewer more often. Objects lie on a 7 x 7 grid: at 8 pixels a patch, a small network sees shapes in minutes only so.
    mismatch: probability of each of PyramidCLIP's three mismatches, drawn independently: words about nothing in the picture, an
    object that the caption leaves out, an object that the detector leaves out.
    family: so many scenes in a row have the same colours, sizes, places and background and differ in shapes alone, and Batches keeps
    them together; default 4 for "train", else 1. Without these hard negatives a batch can be told apart without looking at shapes.
    omit: in pair(i, r), training's captions, a mention lacks its colour ("a small star") with this probability, and its shape ("a red
    thing") with the same. paraphrase: the share of them told in other words. Both leave scenes[i] as it is.
    Outside "train" no two scenes hold the same set of objects (unique=False lifts that). Within a scene all colours differ
    and all shapes differ, so each word has exactly one referent.

    scenes[i] is a dict:
      image (size, size) RGB      background str
      things [Thing]              what the detector found, largest first; masks (N, size, size) bool, the same order
      caption str, words [Word]   the words of the caption and the thing each one names (index into things, -1 for none)
      paraphrases [str]           the same content in other words (FILIP's back-translations)
      swapped str or None         the caption with two objects' colours exchanged: a hard negative
      summary str, objects str    PyramidCLIP's T_S and T_OA;   boxes (N, 4) in 0..1;   rois (N, 2052)
    """

    def __init__(self, n, seed=0, size=56, split="train", objects=(1, 4), mismatch=0.0, unique=None, paraphrase=0.0, omit=0.1, family=None):
        self.n, self.seed, self.size, self.split, self.objects, self.mismatch = n, seed, size, split, objects, mismatch
        self.paraphrase, self.omit, self.family = paraphrase, omit, family or (4 if split == "train" else 1)
        if size < 14 or size % 7:
            raise UserError(f"the side of a scene is a multiple of 7, from 14 on, not {size}")
        self.specs, seen = None, set()
        if split != "train" if unique is None else unique:
            self.specs = []
            for i in range(n):
                for attempt in range(1000):
                    spec = self.draw_lots(i, attempt)
                    content = tuple(sorted(t[:4] for t in spec["things"]))
                    if content not in seen:
                        break
                else:
                    raise UserError(f"only {i} scenes of distinct content with {objects[0]} to {objects[1]} objects: ask for fewer")
                seen.add(content)
                self.specs.append(spec)

    def __len__(self):
        return self.n

    def spec(self, i):
        return self.specs[i] if self.specs else self.draw_lots(i)

    def draw_lots(self, i, attempt=0):
        """What scene i holds, without its pixels. Only Random.random() is used: its stream is the same in every Python."""
        r = random.Random(f"{self.split}/{self.seed}/{i // self.family}/{attempt}")                # the family's
        own = random.Random(f"{self.split}/{self.seed}/{i}/{attempt}/own")
        pick = lambda seq: seq[int(r.random() * len(seq))]
        lo, hi = self.objects
        n, unit = lo + int(r.random() ** 2 * (hi - lo + 1)), self.size // 7
        few = lambda names, r: sorted(names, key=lambda _: r.random())[:n]
        colours = few(COLOURS, r)
        while True:
            shapes = few(SHAPES, own)
            held = HELD_OUT.intersection(zip(colours, shapes))
            if bool(held) == (self.split == "composition"):
                break
            if self.split == "composition":
                colours = few(COLOURS, own)
        for tries in range(10 ** 9):                                # places until nothing overlaps, new sizes now and then
            if tries % 8 == 0:
                sizes = [pick([*SIZES]) for _ in range(n)]
            boxes = []
            for s in sorted(sizes, key=lambda s: -SIZES[s]):
                d = SIZES[s] * unit
                for _ in range(12):                                 # on a grid of sevenths, the patches of the default model
                    x, y = (int(r.random() * (8 - SIZES[s])) * unit for _ in "xy")
                    if all(x >= b[2] or x + d <= b[0] or y >= b[3] or y + d <= b[1] for b in boxes):
                        boxes.append((x, y, x + d, y + d))
                        break
            if len(boxes) == n:
                break
        sizes.sort(key=lambda s: -SIZES[s])
        things = [Thing(s, pick(FILLS), c, sh, b) for s, c, sh, b in zip(sizes, colours, shapes, boxes)]
        order = sorted(range(n), key=lambda _: r.random())          # of mention
        spec = {"things": things, "order": order, "background": pick([*BACKGROUNDS]), "tell": r.random() < 0.25, "extra": None,
                "missed": None, "pixels": r.random()}
        if r.random() < self.mismatch:                              # words about nothing
            free = [(c, s) for c in COLOURS for s in SHAPES if c not in colours and s not in shapes and (c, s) not in HELD_OUT]
            spec["extra"] = pick(free)
        if r.random() < self.mismatch and n > 1:                    # an object no word mentions
            spec["order"] = order[:-1]
        if r.random() < self.mismatch and n > 1:                    # an object the detector does not see
            spec["missed"] = n - 1
        return spec

    # -- pictures
    def draw(self, spec):
        size, r = self.size, random.Random(str(spec["pixels"]))
        x, y = int(r.random() * 2 * size), int(r.random() * 2 * size)
        im = texture(spec["background"], size).crop((x, y, x + size, y + size))
        for t in spec["things"]:
            jitter = [int(25 * r.random()) - 12 for _ in range(3)]
            colour = tuple(min(255, max(0, c + j)) for c, j in zip(COLOURS[t.colour], jitter))
            mask, pattern = sprite(t.shape, t.fill, t.box[2] - t.box[0], max(4, size // 11))
            im.paste(colour, t.box, mask)
            if pattern:
                im.paste(tuple(c // 2 for c in colour), t.box, pattern)                        # darker stripes and dots: the outline stays
        return im

    def masks(self, spec):
        out = np.zeros((len(spec["things"]), self.size, self.size), dtype=bool)
        for m, t in zip(out, spec["things"]):
            x1, y1, x2, y2 = t.box
            m[y1:y2, x1:x2] = np.asarray(sprite(t.shape, "", x2 - x1, 0)[0]) > 127
        return out

    # -- words
    @staticmethod
    def phrase(t, k):
        """A thing without a shape is called a thing; what else it lacks is not said."""
        words = [w for w in (Word(t.size, k, "size"), Word(t.fill, k, "fill"), Word(t.colour, k, "colour"), Word(t.shape or "thing", k, "shape"))
                 if w.text]
        return [Word("an" if words[0].text[0] in "aeiou" else "a"), *words]

    @staticmethod
    def relation(a, b):
        dx, dy = (a.box[0] + a.box[2]) - (b.box[0] + b.box[2]), (a.box[1] + a.box[3]) - (b.box[1] + b.box[3])
        return ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")

    def words(self, spec, style=0):
        """style 0: the caption, "a red star left of a small blue ring and ..."; 1: each pair told from the other side; 2: a plain list."""
        things, order = spec["things"], list(spec["order"])
        say = lambda k: self.phrase(things[k], k)
        out = [Word("there"), Word("is")] if style == 1 else [Word("a"), Word("picture"), Word("of")] if style == 2 else []
        for n in range(0, len(order), 2):
            a, b = (order[n:n + 2] + [None])[:2]
            out += [Word("and")] if n else []
            if b is None:
                out += say(a)
            elif style == 2:
                out += say(a) + [Word("and")] + say(b)
            else:
                a, b = (b, a) if style == 1 else (a, b)
                out += say(a) + [Word(w) for w in self.relation(things[a], things[b]).split()] + say(b)
        if spec["extra"]:
            out += [Word("and"), *self.phrase(Thing("", "", *spec["extra"], None), -1)]
        if spec["tell"]:
            out += [Word("on"), Word(spec["background"], -1, "background")]
        return out

    def swapped(self, spec):
        if len(spec["order"]) < 2:
            return None
        things, (a, b) = list(spec["things"]), spec["order"][:2]
        things[a], things[b] = (things[x]._replace(colour=things[y].colour) for x, y in ((a, b), (b, a)))
        return join(self.words(spec | {"things": things}))

    def pair(self, i, r=None):
        """(picture, caption) of scene i. With r, a random.Random, the caption may be a paraphrase, and may leave out colours and shapes."""
        spec = self.spec(i)
        image, style = self.draw(spec), 0
        if r:
            style = 1 + int(2 * r.random()) if r.random() < self.paraphrase else 0
            lots = [r.random() for _ in spec["things"]]
            spec = spec | {"things": [t._replace(colour="") if x < self.omit else t._replace(shape="") if x < 2 * self.omit else t
                                      for t, x in zip(spec["things"], lots)]}
        return image, join(self.words(spec, style))

    def texts(self):
        """Captions to learn a vocabulary from: with 2,000 of them no word of the scenes is missing."""
        return [join(self.words(self.spec(i), style)) for i in range(min(self.n, 2000)) for style in (0, 1, 2)] + ["a thing"]

    def found(self, spec):
        """Numbers of the things that the detector sees."""
        return [k for k in range(len(spec["things"])) if k != spec["missed"]]

    def views(self, i, image):
        """What PyramidCLIP sees beside picture and caption: {"summary" str, "objects" str, "regions" (N, 2052)}, N things found."""
        spec = self.spec(i)
        things, mentioned = [spec["things"][k] for k in self.found(spec)], [spec["things"][k] for k in spec["order"]]
        boxes = np.array([t.box for t in things], dtype=np.float32) / self.size
        return {"summary": " and ".join(join(self.phrase(t._replace(size="", fill=""), 0)) for t in mentioned),
                "objects": ", ".join(" ".join(w for w in t[:4] if w) for t in things), "regions": roi_features(image, boxes)}

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        spec = self.spec(i)
        seen, image, words = self.found(spec), self.draw(spec), self.words(spec)
        things, views = [spec["things"][k] for k in seen], self.views(i, image)
        return {"image": image, "background": spec["background"], "things": things, "masks": self.masks(spec)[seen],
                "caption": join(words), "words": [w._replace(thing=seen.index(w.thing) if w.thing in seen else -1) for w in words],
                "paraphrases": [join(self.words(spec, style)) for style in (1, 2)], "swapped": self.swapped(spec),
                "summary": views["summary"], "objects": views["objects"], "boxes": views["regions"][:, -4:], "rois": views["regions"]}


def join(words):
    return " ".join(w.text for w in words)


def word_tokens(tok, words):
    """For each Word the positions of its tokens in the sequence (BOS is position 0)."""
    out, at = [], 1
    for w in words:
        n = len(tok.encode(w.text))
        out.append(list(range(at, at + n)))
        at += n
    return out


@functools.lru_cache(None)
def roi_projection():
    return (np.random.RandomState(0).standard_normal((192, 2048)) / 192 ** 0.5).astype(np.float32)   # RandomState's stream is frozen


def roi_features(image, boxes):
    """Stand-in for a detector: the object's crop at 8 x 8, projected by a fixed random matrix, then its box -> (N, 2048 + 4)."""
    w, h = image.size
    crops = [image.resize((8, 8), Image.Resampling.BOX, box=(b[0] * w, b[1] * h, b[2] * w, b[3] * h)) for b in boxes]
    x = np.stack([np.asarray(c, dtype=np.float32).reshape(-1) / 127.5 - 1 for c in crops])
    return np.concatenate([x @ roi_projection(), boxes], axis=1)


def prompts(label, prefixes=("", "a picture of", "there is"), description="", suffix=""):
    """Prompts of one class. FILIP eq. 6: [prefix] {label}, [category description]. [suffix]  SPARC eq. 9: [prefix] {label}, [suffix]

    The defaults keep to phrases that the scenes' captions use; the papers' own ("a photo of a", "I like it.") suit web captions.
    """
    tail = ". ".join(x for x in (description, suffix) if x)
    return [f"{p} {label}".strip() + (f", {tail}" if tail else "") for p in prefixes]


# ------------------------------------------------------------------------------------------------------------------ real pictures
CLAUSE = regex.compile(r"(?:\S+\s+){0,2}\S*?(?:(?!\s*[,.;:]|\s+(?:and|with|while|who|which|that|as|near|next)\b).)*", regex.IGNORECASE | regex.DOTALL)


class Pairs:
    """A CSV file with the columns image,caption. Paths are relative to the file; rows of the same image are its several captions.

    For PyramidCLIP it may have the columns summary and objects ("brown dog, green grass"), of which an image's first row counts, and
    regions may be an .npz file: for each image, by its path in the CSV, an array (M, 2052), the detector's 2,048 features of each region
    and its box x1, y1, x2, y2 in 0..1, the surest first.
    """

    def __init__(self, path, regions=None):
        self.path, folder = path, os.path.dirname(os.path.abspath(path))
        self.images, self.captions, self.rows = [], [], []          # parallel; captions: a list each, rows: the image's first line
        self.names, self.summaries, self.objects = [], [], []
        index = {}
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                reader = csv.DictReader(f, strict=True)
                reader.fieldnames = [c.strip() for c in reader.fieldnames or []]
                missing = [c for c in ("image", "caption") if c not in reader.fieldnames]
                if missing:
                    raise UserError(f"{path} has no column {' and no column '.join(missing)}: its first line must name image,caption "
                                    f"(found: {','.join(reader.fieldnames) or 'nothing'})")
                for row in reader:
                    line = reader.line_num
                    if None in row:
                        raise UserError(f"{path} line {line} has more cells than the first line: put a caption with commas in double quotes")
                    name, caption = row["image"] or "", (row["caption"] or "").strip()
                    if not name:
                        raise UserError(f"{path} line {line}: no image is named; fill it in or delete the line")
                    if not caption:
                        raise UserError(f"{path} line {line}: the caption of {name} is empty; write one or delete the line")
                    if name not in index:
                        full = os.path.join(folder, name)
                        if not os.path.isfile(full):
                            raise UserError(f"{path} line {line}: there is no picture {full}; paths are relative to the CSV's folder")
                        index[name] = len(self.images)
                        self.images.append(full); self.names.append(name); self.captions.append([]); self.rows.append(line)
                        for column, values in (("summary", self.summaries), ("objects", self.objects)):
                            if column in row:
                                values.append((row[column] or "").strip())
                                if not values[-1]:
                                    raise UserError(f"{path} line {line}: {column} of {name} is empty; fill it in, or leave the column out")
                    self.captions[index[name]].append(caption)
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"can't read {path} as a CSV in UTF-8 ({e})") from None
        if not self.images:
            raise UserError(f"{path} has no rows below its first line")
        self.regions, self.archive = regions, (None, None)          # opened once in each process that reads it
        if regions:
            missing = [n for n in self.names if n not in self.open_regions()]
            if missing:
                raise UserError(f"{regions} has no regions of {missing[0]} ({len(missing)} of {len(self)} pictures are missing): their names are "
                                f"those of the column image")
            self.views(0)

    def __len__(self):
        return len(self.images)

    def open_regions(self):
        if self.archive[0] != os.getpid():
            try:
                self.archive = os.getpid(), np.load(self.regions)
                assert hasattr(self.archive[1], "files")
            except Exception as e:                                  # numpy raises many kinds on a damaged file
                raise UserError(f"can't read {self.regions} as an .npz file of regions ({type(e).__name__}): write it with numpy.savez") from None
        return self.archive[1]

    def views(self, i, image=None):
        """{"summary" str, "objects" str if the file has them, "regions" (M, 2052) if there are any}. Without a column, the summary is
        the caption's first clause: what stands before the first comma, full stop, "and", "with", "while", "who" or the like, from the third word on."""
        out = {"summary": self.summaries[i] if self.summaries else CLAUSE.match(self.captions[i][0])[0].strip()}
        if self.objects:
            out["objects"] = self.objects[i]
        if self.regions:
            r = self.open_regions()[self.names[i]]
            if r.ndim != 2 or r.shape[1] != 2052 or not len(r):
                raise UserError(f"{self.regions}: the regions of {self.names[i]} are {r.shape}; (M, 2052) is needed, 2,048 features and a box in each row")
            out["regions"] = r.astype(np.float32)
        return out

    def texts(self):
        return [c for cs in self.captions for c in cs]

    def pair(self, i, r=None):
        """(picture, one of its captions): drawn by r, a random.Random, or the first."""
        cs = self.captions[i]
        return self.open(i), cs[int(r.random() * len(cs))] if r else cs[0]

    def open(self, i):
        return open_image(self.images[i], f"{self.path} line {self.rows[i]}: ")


def open_image(path, where=""):
    """Read a picture as RGB; whatever is wrong with the file becomes one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            im = Image.open(path)
            im.draft("RGB", (512, 512))                             # JPEGs are decoded no larger than needed
            return ImageOps.exif_transpose(im).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{where}{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller") from None
    except Exception as e:                                          # Pillow's readers raise nearly anything on a damaged file
        why = "no such file" if isinstance(e, FileNotFoundError) else f"{type(e).__name__}: {e}".replace(str(path), "the file")
        raise UserError(f"{where}can't read {path} as a picture ({why}); replace it or take it out") from None


def open_dataset(path, regions=None):
    """The dataset at a path: a CSV file with the columns image,caption. regions: an .npz file, for PyramidCLIP."""
    if not os.path.isfile(path):
        raise UserError(f"--data {path}: no such file; give a CSV with the columns image,caption, or `scenes`")
    if not path.lower().endswith(".csv"):
        raise UserError(f"--data {path}: its name must end in .csv (columns image,caption)")
    return Pairs(path, regions)


# ------------------------------------------------------------------------------------------------------------- crops and batches
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # OpenAI CLIP's


def random_crop(im, size, min_area, r):
    """A random square of at least min_area of the largest square, resized. (H, W) -> (size, size)"""
    w, h = im.size
    side = min(w, h) * (min_area + (1 - min_area) * r.random()) ** 0.5
    x, y = r.random() * (w - side), r.random() * (h - side)
    return im.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


def center_crop(im, size):
    """The largest central square, resized: what every evaluation sees."""
    w, h = im.size
    s = min(w, h)
    x, y = (w - s) / 2, (h - s) / 2
    return im if (w, h) == (size, size) else im.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + s, y + s))


def to_tensor(images):
    """List of RGB pictures of one size -> (b, 3, H, W) uint8."""
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])).permute(0, 3, 1, 2).contiguous()


def normalize(images):
    """(b, 3, H, W) uint8 on any device -> float32, CLIP's mean 0 and deviation 1."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) * 255 for c in (MEAN, STD))
    return (images.float() - mean) / std


class Batches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of the global batch of that step, a function of (seed, step) alone: a resumed run sees the same.

    batch_size is global; each epoch is one random order of the data, its last incomplete batch dropped.
    min_area None means the central square (scenes are drawn at that size, and their captions speak of places).
    views: with PyramidCLIP's, among them a second crop of at least local_area, unless that is None.
    """

    def __init__(self, data, tok, batch_size, size, context_length, seed=0, min_area=None, rank=0, world=1, views=False, local_area=None):
        if batch_size > len(data):
            raise UserError(f"--batch-size {batch_size} is larger than the data ({len(data)} pictures): lower it")
        if batch_size % world:
            raise UserError(f"--batch-size {batch_size} can't be shared out evenly among {world} processes: "
                            f"try {max(1, batch_size // world) * world}")
        self.data, self.tok, self.batch_size, self.size, self.context_length = data, tok, batch_size, size, context_length
        self.seed, self.min_area, self.rank, self.world, self.epoch, self.order = seed, min_area, rank, world, None, None
        self.with_views, self.local_area = views, local_area

    def __getitem__(self, step):
        family = getattr(self.data, "family", 1)                   # scenes of a family stay together
        epoch, k = divmod(step, len(self.data) // family * family // self.batch_size)
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.data) // family, generator=g)
            self.epoch, self.order = epoch, (order[:, None] * family + torch.arange(family)).flatten()
        b = self.batch_size // self.world
        first = k * self.batch_size + self.rank * b
        try:
            pairs, views = [], []
            for i in self.order[first:first + b].tolist():
                r = random.Random(f"{self.seed}/{epoch}/{i}")
                im, caption = self.data.pair(i, r)
                pairs.append((center_crop(im, self.size) if self.min_area is None else random_crop(im, self.size, self.min_area, r), caption))
                if self.with_views:
                    views.append(self.data.views(i, im))
                    if self.local_area is not None:
                        views[-1]["images_l"] = random_crop(im, self.size, self.local_area, r)
        except UserError as e:
            return {"error": str(e)}                                # an exception would reach the main process as a traceback
        return collate(pairs, self.tok, self.context_length, views)


def collate(pairs, tok, context_length, views=()):
    """[(picture, caption)] -> {"images" (b,3,H,W) uint8, "ids" (b,L) int64, "mask" (b,L) bool}, L the longest of the batch.
    views: [{name: view}] of the same length, for PyramidCLIP -> "images_l" as images; "summary", "objects" (b,L') ids and "regions"
    (b,M,2052), each with its mask, "summary_mask" (b,L') and so on."""
    def tokens(texts):
        ids, mask = tok(texts, context_length)
        L = int(mask.sum(1).max())
        return ids[:, :L], mask[:, :L]

    ids, mask = tokens([c for _, c in pairs])
    batch = {"images": to_tensor([im for im, _ in pairs]), "ids": ids, "mask": mask}
    for name in views[0] if views else ():
        column = [v[name] for v in views]
        if name == "images_l":
            batch[name] = to_tensor(column)
        elif name == "regions":
            batch[name] = nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in column], batch_first=True)
            batch["regions_mask"] = torch.arange(batch[name].shape[1]) < torch.tensor([len(r) for r in column])[:, None]
        else:
            batch[name], batch[f"{name}_mask"] = tokens(column)
    return batch


def main():
    ap = argparse.ArgumentParser(description="Show samples of a dataset: their texts on the terminal, their pictures in a PNG.")
    ap.add_argument("--data", default="scenes", help="scenes (built in), or a CSV with the columns image,caption")
    ap.add_argument("--n", type=int, default=5, help="how many samples")
    ap.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    ap.add_argument("--mismatch", type=float, default=0.0, help="scenes: probability of each kind of mismatch between picture and texts")
    ap.add_argument("--out", default="samples.png", help="where the picture goes")
    args = ap.parse_args()
    tiles = []
    if args.data == "scenes":
        scenes = Scenes(args.n, args.seed, mismatch=args.mismatch)
        for s in (scenes[i] for i in range(args.n)):
            print(f"caption     {s['caption']}\nlinks       " + ", ".join(f"{w.text}->{w.thing}" for w in s["words"] if w.thing >= 0))
            for key in ("paraphrases", "swapped", "summary", "objects"):
                print(f"{key:11} {' | '.join(s[key]) if isinstance(s[key], list) else s[key]}")
            print("boxes       " + "  ".join(str(t.box) for t in s["things"]) + f"    rois {s['rois'].shape}\n")
            tiles.append(s["image"].resize((224, 224), Image.Resampling.NEAREST))
    else:
        data = open_dataset(args.data)
        print(f"{args.data}: {len(data)} pictures, {len(data.texts())} captions\n")
        for i in range(min(args.n, len(data))):
            print(data.images[i], *data.captions[i], sep="\n  ")
            tiles.append(center_crop(data.open(i), 224))
    sheet = Image.new("RGB", (228 * len(tiles) + 4, 232), "white")
    for k, t in enumerate(tiles):
        sheet.paste(t, (228 * k + 4, 4))
    sheet.save(args.out)
    print(f"drawn into {args.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"data.py: {e}")
