"""Data: CLIP's byte-level BPE tokeniser, the built-in scenes, the CSV reader, crops and batches.

    python data.py                        # print five scenes and draw them into samples.png
    python data.py --data photos/train.csv --n 8

Covers: FILIP 3.1.2 (prompts, eq. 6) and 3.2 (several texts a picture), PyramidCLIP 3.1 to 3.3
(summary, global and local view, object phrases, regions), SPARC 4.1 and D.5 (prompts, eq. 9).

Differs from the papers: they train on 15 million pairs (PyramidCLIP's ablations) to 6.1 billion
(SPARC's three sets). `Scenes` draws its own pictures and knows all about them. Rules stand in for
FILIP's translator and for PyramidCLIP's T5 and detector, whose features become a random projection;
your own data may bring its own (see Pairs). FILIP's AutoAugment is left out. The tokeniser is
byte-level BPE, SPARC's is sentencepiece. Files get a random crop by default, SPARC uses none.

The way of the data: .pair(i, r) of Scenes or Pairs gives (picture, caption), .views and .local_view
what PyramidCLIP sees beside it, and Batches puts all of it into the dict that model.py takes.
"""
import argparse
import collections
import csv
import functools
import gzip
import heapq
import html
import itertools
import os
import random
import warnings
import ftfy
import numpy as np
import regex
import torch
from PIL import Image, ImageDraw, ImageOps
from model import UserError


def write(path, save):
    """Write a file as a whole or not at all: save(temporary path), then rename. Else UserError."""
    temporary = path + ".tmp"
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"can't write {path} ({str(e).splitlines()[0]}): free some space or choose "
                        "another place; what was there before is kept") from None


# ---------------------------------------------------------------------------------- the tokeniser
BOS, EOT = "<|startoftext|>", "<|endoftext|>"
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)
PRINTABLE = [b for first, last in ("!~", "¡¬", "®ÿ") for b in range(ord(first), ord(last) + 1)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]  # these 68 move to code points from 256 on
BYTES = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(OTHERS)}


def clean(text):
    """CLIP's cleaning: repair unicode, undo HTML escapes twice, fold white space, lower case."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy is slow, so not for all
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """CLIP's byte-pair encoding, for any text. The vocabulary is 256 bytes, 256 bytes that end a
    word, one symbol for each merge, BOS, and EOT, which is always the last id.
    merges: list of "a b" strings, the most important first."""
    def __init__(self, merges):
        self.merges = list(merges)
        pairs = [tuple(m.split()) for m in self.merges]
        self.symbols = [*BYTES.values(), *(c + "</w>" for c in BYTES.values()),
                        *("".join(pair) for pair in pairs), BOS, EOT]
        self.vocab_size = len(self.symbols)
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.rank = {pair: i for i, pair in enumerate(pairs)}
        self.bos, self.eot = self.vocab_size - 2, self.vocab_size - 1
        self.cache = {BOS: [self.bos], EOT: [self.eot]}

    @classmethod
    def clip(cls, path="bpe_simple_vocab_16e6.txt.gz"):
        """The published vocabulary of 49,408 entries. UserError if it is not in the file."""
        opener = gzip.open if str(path).endswith(".gz") else open
        try:
            with opener(path, "rt", encoding="utf-8") as f:
                merges = f.read().split("\n")[1:1 + 48894]  # after a note; CLIP ignores the rest
        except (OSError, EOFError, UnicodeDecodeError) as e:
            raise UserError(
                f"can't read CLIP's merges file {path} ({e}): take bpe_simple_vocab_16e6.txt.gz "
                "from the repository openai/CLIP, or use --vocab learn:8000") from None
        if len(merges) != 48894 or any(len(m.split()) != 2 for m in merges):
            raise UserError(f"{path} is not CLIP's merges file of 48,894 pairs of symbols")
        return cls(merges)

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn at most vocab_size entries from an iterable of texts. The most frequent pair is
        merged first, of equal ones the first in the alphabet. UserError if there are too few."""
        if vocab_size < 514:
            raise UserError(f"a vocabulary has bytes and marks, at least 514, not {vocab_size}")
        counts = collections.Counter(w for text in texts for w in WORDS.findall(clean(text)))
        words = [(cls.split(w), n) for w, n in sorted(counts.items()) if w not in (BOS, EOT)]
        frequency = collections.Counter()  # of each pair of symbols
        where = collections.defaultdict(set)  # pair -> numbers of the words that may have it

        def count(k, symbols, n):
            for pair in zip(symbols, symbols[1:]):
                frequency[pair] += n
                where[pair].add(k)
        for k, (symbols, n) in enumerate(words):
            count(k, symbols, n)
        merges, heap = [], [(-n, pair) for pair, n in frequency.items()]
        heapq.heapify(heap)
        while len(merges) < vocab_size - 514 and heap:  # no heap: every word is one symbol
            minus_n, best = heapq.heappop(heap)
            if minus_n == 0 or -minus_n != frequency[best]:  # its count has changed since
                continue
            merges.append(" ".join(best))
            changed = set()
            for k in where.pop(best):
                symbols, n = words[k]
                merged = cls.merge(symbols, best)
                words[k] = merged, n
                count(k, symbols, -n)
                count(k, merged, n)
                changed.update(zip(symbols, symbols[1:]), zip(merged, merged[1:]))
            for pair in changed:
                heapq.heappush(heap, (-frequency[pair], pair))
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
        """Ids of one word (a match of WORDS)."""
        if word not in self.cache:
            symbols = self.split(word)
            while len(symbols) > 1:
                pair = min(zip(symbols, symbols[1:]), key=lambda p: self.rank.get(p, 1e9))
                if pair not in self.rank:
                    break
                symbols = self.merge(symbols, pair)
            self.cache[word] = [self.ids[s] for s in symbols]
        return self.cache[word]

    def encode(self, text):
        """Ids of a text, without BOS and EOT."""
        return [i for word in WORDS.findall(clean(text)) for i in self.bpe(word)]

    def __call__(self, texts, context_length=77):
        """A string or a list -> ids (N, L) int64, padded with 0, and mask (N, L) bool, L =
        context_length: of a longer text the first L - 1 ids remain, and EOT. The mask is True up to
        the first EOT. It is made from lengths, because id 0 is also the token "!"."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = np.zeros((len(texts), context_length), dtype=np.int64)
        mask = np.zeros((len(texts), context_length), dtype=bool)
        for n, text in enumerate(texts):
            row = [self.bos, *self.encode(text)][:context_length - 1] + [self.eot]
            ids[n, :len(row)] = row
            mask[n, :row.index(self.eot) + 1] = True
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def decode(self, ids):
        """Ids -> text. BOS, EOT and what follows EOT are dropped."""
        ids = [*map(int, ids), self.eot]
        symbols = [self.symbols[i] for i in ids[:ids.index(self.eot)] if i != self.bos]
        text = "".join(symbols).replace("</w>", " ")
        byte = {character: b for b, character in BYTES.items()} | {" ": ord(" ")}
        return bytes(byte[c] for c in text).decode("utf-8", errors="replace").strip()


# -------------------------------------------------------------------------------------- the scenes
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
COLOURS = {"red": (214, 39, 40), "orange": (255, 140, 20), "yellow": (250, 225, 50),
           "green": (50, 165, 70), "cyan": (60, 205, 220), "blue": (40, 75, 215),
           "purple": (130, 50, 170), "pink": (250, 130, 185)}
FILLS = ("", "striped", "dotted")  # "" is plain, and no word says so
SIZES = {"small": 2, "": 3}  # diameter in sevenths of the picture: 16 and 24 of 56 pixels
BACKGROUNDS = {"sand": ((196, 178, 140), 14), "snow": ((236, 240, 244), 8),
               "wood": ((120, 88, 60), 16), "slate": ((66, 70, 76), 12)}  # colour, noise
HELD_OUT = {(c, SHAPES[(3 * i + 1) % 8]) for i, c in enumerate(list(COLOURS)[:6])}  # 6 of 64 pairs
OMIT = 0.1  # in training, how often a mention has no colour; as often it has no shape
OPENINGS = ("", "there is", "a picture of")  # of captions in style 0, 1, 2
POLYGONS = {"triangle": ((.5, .02), (1, .95), (0, .95)), "heart": ((.04, .42), (.96, .42), (.5, 1)),
            "star": ((.5, 0), (.62, .36), (1, .37), (.69, .6), (.8, .97),
                     (.5, .75), (.2, .97), (.31, .6), (0, .37), (.38, .36))}
Thing = collections.namedtuple("Thing", "size fill colour shape box")  # box: x1, y1, x2, y2
# in place of a detector's weights; RandomState's stream never changes
ROI_PROJECTION = (np.random.RandomState(0).standard_normal((192, 2048)) / 192 ** 0.5).astype("f4")
Word = collections.namedtuple("Word", "text thing kind", defaults=(-1, ""))  # thing: index or -1


def outline(shape, d):
    """Mask of a shape of diameter d: "L" picture (d, d), drawn four times as large and reduced."""
    s = 4 * d
    im = Image.new("L", (s, s))
    draw = ImageDraw.Draw(im)
    if shape in ("circle", "ring", "moon"):
        draw.ellipse((0, 0, s - 1, s - 1), 255)
    if shape == "ring":
        draw.ellipse((s // 4, s // 4, s - s // 4, s - s // 4), 0)
    if shape == "moon":
        draw.ellipse((s * 3 // 10, -s // 12, s * 12 // 10, s * 82 // 100), 0)
    if shape == "square":
        draw.rectangle((s // 14, s // 14, s - s // 14, s - s // 14), 255)
    if shape == "cross":
        draw.rectangle((s // 3, 0, s - s // 3, s), 255)
        draw.rectangle((0, s // 3, s, s - s // 3), 255)
    if shape == "heart":  # its polygon lies below
        draw.ellipse((0, s // 20, s * 53 // 100, s * 58 // 100), 255)
        draw.ellipse((s * 47 // 100, s // 20, s - 1, s * 58 // 100), 255)
    if shape in POLYGONS:
        draw.polygon([(int(x * (s - 1)), int(y * (s - 1))) for x, y in POLYGONS[shape]], 255)
    return im.resize((d, d), Image.Resampling.BOX)


@functools.lru_cache(None)
def sprite(shape, fill, d, period):
    """(mask of the whole shape, mask of its stripes or dots): "L" pictures (d, d)."""
    mask = outline(shape, d)
    y, x = np.mgrid[:d, :d]
    on = (x % period < period // 2) & (y % period < period // 2)
    if fill == "striped":
        on = (x + y) % period < period // 2
    return mask, Image.fromarray((np.asarray(mask) * on).astype(np.uint8))


@functools.lru_cache(None)
def texture(name, size):
    """A background: smooth noise of three times the picture's side, of which scenes show a part."""
    colour, amount = BACKGROUNDS[name]
    grid = (4, 48) if name == "wood" else (24, 24)  # wood has a grain
    noise = Image.frombytes("L", grid, random.Random(name).randbytes(grid[0] * grid[1]))
    noise = np.asarray(noise.resize((3 * size, 3 * size), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = (noise[..., None] - 128) * amount // 128  # (H, W, 1)
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def pick(items, r):
    """One of the items. Only r.random() is used: its stream is the same in every Python."""
    return items[int(r.random() * len(items))]


def shuffled(items, r):
    return sorted(items, key=lambda item: r.random())


def share_inside(box, window):
    """The share of a box's area that lies in a window, from 0 to 1."""
    width = min(box[2], window[2]) - max(box[0], window[0])
    height = min(box[3], window[3]) - max(box[1], window[1])
    return max(0, width) * max(0, height) / ((box[2] - box[0]) * (box[3] - box[1]))


def join(words):
    return " ".join(w.text for w in words)


def word_tokens(tok, words):
    """For each Word the positions of its tokens in the sequence (BOS is position 0)."""
    lengths = [len(tok.encode(w.text)) for w in words]
    starts = itertools.accumulate(lengths, initial=1)
    return [list(range(start, start + n)) for start, n in zip(starts, lengths)]


class Scenes:
    """Small pictures of coloured shapes, drawn on demand, the same on every machine.

    In a scene all colours and all shapes differ, so each word names one object. Outside "train" no
    two scenes hold the same set of objects, unless unique=False.
    n: how many. seed: another seed is another set. size: side in pixels, a multiple of 7.
    split: "train", "val", "test" never share a scene. Each scene of "composition" has a pair of
        colour and shape that no other split shows (HELD_OUT).
    objects: least and most; few are more frequent.
    mismatch: probability of each of three mismatches, after PyramidCLIP's section 1: words about
        nothing in the picture (caption redundancy), an object without words (image redundancy,
        cast deficiency), and, our own, an object that the detector leaves out.
    paraphrase: share of pair(i, r)'s captions in other words, for FILIP's back-translation.
    family: so many scenes in a row differ in shapes alone, and stay in one batch; 4 in "train".
    scenes[i] is a dict: image (size, size) RGB, background str, things [Thing] that the detector
    found, the largest first, their masks (N, size, size) bool, caption str, its words [Word], and
    swapped, the caption with two colours exchanged (a hard negative), or None.
    """
    def __init__(self, n, seed=0, size=56, split="train", objects=(1, 4), mismatch=0.0,
                 unique=True, paraphrase=0.0, family=None):
        if size < 14 or size % 7:
            raise UserError(f"the side of a scene is a multiple of 7, from 14 on, not {size}")
        self.n, self.seed, self.size, self.split = n, seed, size, split
        self.objects, self.mismatch, self.paraphrase = objects, mismatch, paraphrase
        self.family = family or (4 if split == "train" else 1)
        self.specs = self.draw_unique() if split != "train" and unique else None

    def __len__(self):
        return self.n

    def draw_unique(self):
        specs = {}
        for i in range(self.n):
            for attempt in range(1000):
                spec = self.draw_lots(i, attempt)
                content = tuple(sorted(t[:4] for t in spec["things"]))
                if content not in specs:
                    break
            else:
                raise UserError(f"only {i} scenes of distinct content: ask for fewer")
            specs[content] = spec
        return list(specs.values())

    def spec(self, i):
        return self.specs[i] if self.specs else self.draw_lots(i)

    def draw_lots(self, i, attempt=0):
        r = random.Random(f"{self.split}/{self.seed}/{i // self.family}/{attempt}")  # the family's
        own = random.Random(f"{self.split}/{self.seed}/{i}/{attempt}/own")
        least, most = self.objects
        n = least + int(r.random() ** 2 * (most - least + 1))
        colours, shapes = self.draw_names(n, r, own)
        sizes, boxes = self.draw_places(n, r)
        fills = [pick(FILLS, r) for _ in range(n)]
        spec = {"things": [Thing(*t) for t in zip(sizes, fills, colours, shapes, boxes)],
                "order": shuffled(range(n), r),  # of mention
                "background": pick(list(BACKGROUNDS), r), "tell": r.random() < 0.25,
                "pixels": r.random(), "extra": None, "found": n}
        if r.random() < self.mismatch:  # words about nothing
            free = [(c, s) for c in COLOURS for s in SHAPES if c not in colours and s not in shapes]
            spec["extra"] = pick([pair for pair in free if pair not in HELD_OUT], r)
        if r.random() < self.mismatch and n > 1:  # an object no word mentions
            spec["order"] = spec["order"][:-1]
        if r.random() < self.mismatch and n > 1:  # an object the detector does not see
            spec["found"] = n - 1
        return spec

    def draw_names(self, n, r, own):
        """n colours and n shapes. Only "composition" has a pair of HELD_OUT, and always one."""
        colours = shuffled(COLOURS, r)[:n]
        while True:
            shapes = shuffled(SHAPES, own)[:n]
            held = HELD_OUT.intersection(zip(colours, shapes))
            if bool(held) == (self.split == "composition"):
                return colours, shapes
            if self.split == "composition":
                colours = shuffled(COLOURS, own)[:n]

    def draw_places(self, n, r):
        """n sizes, the largest first, and boxes without overlap; new sizes after 8 failures."""
        unit = self.size // 7
        for attempt in itertools.count():
            if attempt % 8 == 0:
                drawn = [pick(list(SIZES), r) for _ in range(n)]
                sizes = sorted(drawn, key=SIZES.get, reverse=True)
            boxes = []
            for side in (SIZES[s] for s in sizes):
                for _ in range(12):  # on a grid of sevenths, the patches of the default model
                    x, y = (int(r.random() * (8 - side)) * unit for _ in range(2))
                    box = (x, y, x + side * unit, y + side * unit)
                    if not any(share_inside(box, b) for b in boxes):
                        boxes.append(box)
                        break
            if len(boxes) == n:
                return sizes, boxes

    def draw(self, spec):
        """The picture: RGB (size, size)."""
        size, r = self.size, random.Random(str(spec["pixels"]))
        x, y = int(r.random() * 2 * size), int(r.random() * 2 * size)
        im = texture(spec["background"], size).crop((x, y, x + size, y + size))
        for t in spec["things"]:
            jitter = [int(25 * r.random()) - 12 for _ in range(3)]
            colour = tuple(min(255, max(0, c + j)) for c, j in zip(COLOURS[t.colour], jitter))
            mask, pattern = sprite(t.shape, t.fill, t.box[2] - t.box[0], max(4, size // 11))
            im.paste(colour, t.box, mask)
            if t.fill:  # stripes and dots are darker, so the outline stays visible
                im.paste(tuple(c // 2 for c in colour), t.box, pattern)
        return im

    def masks(self, spec):
        """The pixels of each thing: (N, size, size) bool."""
        out = np.zeros((len(spec["things"]), self.size, self.size), dtype=bool)
        for m, t in zip(out, spec["things"]):
            x1, y1, x2, y2 = t.box
            m[y1:y2, x1:x2] = np.asarray(sprite(t.shape, "", x2 - x1, 4)[0]) > 127
        return out

    @staticmethod
    def phrase(t, k):
        """Words of thing number k, "a small red star", or without a shape "a small red thing"."""
        words = [Word(text, k, kind) for text, kind in zip(t[:4], Thing._fields) if text]
        if not t.shape:
            words.append(Word("thing", k, "shape"))
        return [Word("an" if words[0].text[0] in "aeiou" else "a"), *words]

    @staticmethod
    def relation(a, b):
        """Where a lies, seen from b, by the larger of the two distances of their centres."""
        dx, dy = (a.box[k] + a.box[k + 2] - b.box[k] - b.box[k + 2] for k in (0, 1))
        if abs(dx) > abs(dy):
            return "left of" if dx < 0 else "right of"
        return "above" if dy < 0 else "below"

    def words(self, spec, style=0):
        """The caption as [Word]. Style 0: "a red star left of a small blue ring and ..."; 1: each
        pair told from the other side; 2: a list without relations."""
        out = [Word(w) for w in OPENINGS[style].split()]
        for n in range(0, len(spec["order"]), 2):
            if n:
                out.append(Word("and"))
            told = spec["order"][n:n + 2]
            a, *rest = reversed(told) if style == 1 else told
            out += self.phrase(spec["things"][a], a)
            for b in rest:
                link = "and" if style == 2 else self.relation(spec["things"][a], spec["things"][b])
                out += [Word(w) for w in link.split()] + self.phrase(spec["things"][b], b)
        if spec["extra"]:
            out += [Word("and"), *self.phrase(Thing("", "", *spec["extra"], None), -1)]
        if spec["tell"]:
            out += [Word("on"), Word(spec["background"], -1, "background")]
        return out

    def swapped(self, spec):
        if len(spec["order"]) < 2:
            return None
        things = list(spec["things"])
        for k, other in itertools.permutations(spec["order"][:2]):
            things[k] = things[k]._replace(colour=spec["things"][other].colour)
        return join(self.words(spec | {"things": things}))

    def texts(self):
        """Captions to learn a vocabulary from: 2,000 scenes hold every word there is."""
        specs = [self.spec(i) for i in range(min(self.n, 2000))]
        return [join(self.words(s, style)) for s in specs for style in (0, 1, 2)] + ["a thing"]

    def pair(self, i, r=None):
        """(picture, caption) of scene i. r, a random.Random, draws a style and omissions."""
        spec = self.spec(i)
        image, style = self.draw(spec), 0
        if r:
            if r.random() < self.paraphrase:
                style = 1 + int(2 * r.random())
            things = list(spec["things"])
            for k, t in enumerate(things):
                lot = r.random()
                if lot < OMIT:
                    things[k] = t._replace(colour="")
                elif lot < 2 * OMIT:
                    things[k] = t._replace(shape="")
            spec = spec | {"things": things}
        return image, join(self.words(spec, style))

    def views(self, i, image, caption):
        """PyramidCLIP's T_S, T_OA, R -> {"summary" str, "objects" str, "regions" (N, 2052)}. The
        summary is of all objects that captions of scene i mention, whichever caption was drawn."""
        spec = self.spec(i)
        found = spec["things"][:spec["found"]]
        short = [spec["things"][k]._replace(size="", fill="") for k in spec["order"]]
        boxes = np.array([t.box for t in found], dtype=np.float32) / self.size  # (N, 4) in 0..1
        return {"summary": " and ".join(join(self.phrase(t, 0)) for t in short),
                "objects": ", ".join(" ".join(w for w in t[:4] if w) for t in found),
                "regions": roi_features(image, boxes)}

    def local_view(self, i, image, caption, r, size, area):
        """PyramidCLIP's local view: a square of at least this area, drawn by r, and the caption of
        what is left: of objects at least half inside, told as in the caption that was drawn."""
        spec, left = self.spec(i), []
        while not left:
            window = random_window(image, area, r)
            left = [k for k in spec["order"] if share_inside(spec["things"][k].box, window) >= 0.5]
            area = (1 + area) / 2  # nothing is left: draw again, and larger
        said = caption.split()  # no two things of a scene share a colour or a shape
        things = [t._replace(colour=t.colour if t.colour in said else "",
                             shape=t.shape if t.shape in said else "") for t in spec["things"]]
        style = max(s for s in (0, 1, 2) if caption.startswith(OPENINGS[s]))
        crop = image.resize((size, size), Image.Resampling.BICUBIC, box=window)
        return crop, join(self.words(spec | {"things": things, "order": left}, style))

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        spec = self.spec(i)
        n, words = spec["found"], self.words(spec)
        links = [w if w.thing < n else w._replace(thing=-1) for w in words]
        return {"image": self.draw(spec), "background": spec["background"],
                "things": spec["things"][:n], "masks": self.masks(spec)[:n],
                "caption": join(words), "words": links, "swapped": self.swapped(spec)}


def roi_features(image, boxes):
    """In place of a detector: the crop at 8 x 8, projected, then its box -> (N, 2048 + 4)."""
    crops = [image.resize((8, 8), Image.Resampling.BOX, tuple(b * image.width)) for b in boxes]
    x = np.stack([np.asarray(c, dtype=np.float32).reshape(-1) / 127.5 - 1 for c in crops])
    return np.concatenate([x @ ROI_PROJECTION, boxes], axis=1)


def filip_prompts(label, prefixes, descriptions=("",), suffixes=("",)):
    """Every combination, such as "a photo of a pug, a type of pet. I like it." or "a pug." """
    texts = [f"{prefix} {label}, {description}. {suffix.rstrip('.')}."  # FILIP eq. 6
             for prefix in prefixes for description in descriptions for suffix in suffixes]
    return [t.replace(", .", ".").removesuffix(" .").strip() for t in texts]  # no empty parts


def sparc_prompts(label, prefixes, suffixes=("",)):
    """Every combination, such as "a photo of a pug, I like it", or "a photo of a pug"."""
    texts = [f"{prefix} {label}, {suffix}"  # SPARC eq. 9
             for prefix in prefixes for suffix in suffixes]
    return [t.removesuffix(", ").strip() for t in texts]


# ---------------------------------------------------------------------------------- real pictures
CLAUSE = regex.compile(
    r"(?:\S+\s+){0,2}\S*?(?:(?!\s*[,.;:]|\s+(?:and|with|while|who|which|that|as|near|next)\b).)*",
    regex.IGNORECASE | regex.DOTALL)


class Pairs:
    """A CSV file with the columns image,caption. Rows of the same image are its several captions.
    Paths are relative to the file. For PyramidCLIP it may have the columns summary (of the row's
    caption) and objects ("brown dog, green grass", of which an image's first row counts), and
    regions: an .npz file with an array (M, 2052) for each image, by its path in the CSV, the
    detector's 2,048 features of a region and its box x1, y1, x2, y2 in 0..1, the surest first.
    UserError says what is wrong, and in which line.
    """
    def __init__(self, path, regions=None):
        self.path, self.regions, self.archives = path, regions, {}
        self.images, self.captions, self.objects = [], [], []  # images: (name, path, CSV's line)
        self.summaries = {}  # (number of the image, caption) -> summary
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                self.read(csv.DictReader(f, strict=True))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"can't read {path} as a CSV in UTF-8 ({e})") from None
        if not self.images:
            raise UserError(f"{path} has no rows below its first line")
        if regions:
            there = set(self.open_regions().files)
            missing = [name for name, *_ in self.images if name not in there]
            if missing:
                raise UserError(f"{regions} has no regions of {missing[0]} ({len(missing)} of "
                                f"{len(self)} pictures are missing): the column image names them")
            self.views(0, None, self.captions[0][0])

    def __len__(self):
        return len(self.images)

    def read(self, reader):
        columns = [column.strip() for column in reader.fieldnames or []]
        missing = [c for c in ("image", "caption") if c not in columns]
        if missing:
            raise UserError(f"{self.path} has no column {' and no column '.join(missing)}: its "
                            f"first line must name image,caption (found: {','.join(columns)})")
        reader.fieldnames, index = columns, {}  # index: name of an image -> its number
        for row in reader:
            where = f"{self.path} line {reader.line_num}"
            if None in row:
                raise UserError(f"{where} has more cells than the first line: put a caption with "
                                f"commas in double quotes")
            row = {column: (cell or "").strip() for column, cell in row.items()}
            name, caption = row["image"], row["caption"]
            if not name or not caption:
                what = f"the caption of {name}" if name else "the image"
                raise UserError(f"{where}: {what} is empty; fill it in or delete the line")
            if name not in index:
                path = os.path.join(os.path.dirname(os.path.abspath(self.path)), name)
                if not os.path.isfile(path):
                    raise UserError(f"{where}: there is no picture {path}; paths start at the CSV")
                empty = [column for column in ("summary", "objects") if row.get(column) == ""]
                if empty:
                    raise UserError(f"{where}: {empty[0]} of {name} is empty; fill it in")
                index[name] = len(index)
                self.images.append((name, path, f"{where}: "))
                self.captions.append([])
                self.objects.append(row.get("objects"))
            self.captions[index[name]].append(caption)
            if row.get("summary"):
                self.summaries.setdefault((index[name], caption), row["summary"])

    def open_regions(self):
        process = os.getpid()  # each process opens the file for itself
        if process not in self.archives:
            try:
                self.archives[process] = np.load(self.regions)
                self.archives[process].files  # an .npy file has none
            except Exception as e:  # numpy raises many kinds on a damaged file
                raise UserError(f"can't read {self.regions} as an .npz file of regions: "
                                f"write it with numpy.savez ({type(e).__name__})") from None
        return self.archives[process]

    def views(self, i, image, caption):
        """PyramidCLIP's T_S, T_OA, R -> {"summary" str, "objects" str, "regions" (M, 2052)}, the
        latter two if the data has them. The summary is the caption's own, or else its first clause:
        all before a comma, full stop, "and", "with" or the like, from the third word on."""
        out = {"summary": self.summaries.get((i, caption)) or CLAUSE.match(caption)[0].strip()}
        if self.objects[i]:
            out["objects"] = self.objects[i]
        if self.regions:
            name = self.images[i][0]
            x = self.open_regions()[name]
            if x.ndim != 2 or x.shape[1] != 2052 or not len(x):
                raise UserError(f"{self.regions}: {name} has {x.shape}; (M, 2052) is needed")
            out["regions"] = x.astype(np.float32)
        return out

    def local_view(self, i, image, caption, r, size, area):
        """PyramidCLIP's local view -> (a random crop of at least this area, the same caption)"""
        return random_crop(image, size, area, r), caption

    def texts(self):
        return [caption for captions in self.captions for caption in captions]

    def pair(self, i, r=None):
        """(picture, one of its captions): drawn by r, a random.Random, or the first."""
        captions = self.captions[i]
        return self.open(i), pick(captions, r) if r else captions[0]

    def open(self, i):
        return open_image(*self.images[i][1:])


def open_image(path, where=""):
    """Read a picture as RGB. Whatever is wrong with the file becomes a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            im = Image.open(path)
            im.draft("RGB", (512, 512))  # JPEGs are decoded no larger than needed
            return ImageOps.exif_transpose(im).convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        why = f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    except FileNotFoundError:
        why = "no such file"
    except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
        why = f"{type(e).__name__}: {e}".replace(str(path), "the file")
    raise UserError(f"{where}can't read {path} as a picture ({why}); replace it or take it out")


def open_dataset(path, regions=None):
    """Pairs from a CSV file, and for PyramidCLIP regions from an .npz file. Or UserError."""
    if not os.path.isfile(path) or not path.lower().endswith(".csv"):
        raise UserError(f"--data {path}: no such file or no .csv; give one with the columns "
                        "image,caption, or `scenes`")
    return Pairs(path, regions)


# ------------------------------------------------------------------------------- crops and batches
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def random_window(im, area, r):
    """A random square, at least this share of the largest square's area: x1, y1, x2, y2."""
    side = min(im.size) * (area + (1 - area) * r.random()) ** 0.5
    x, y = (r.random() * (length - side) for length in im.size)
    return x, y, x + side, y + side


def random_crop(im, size, area, r):
    """A random window of a picture, resized to (size, size)."""
    return im.resize((size, size), Image.Resampling.BICUBIC, box=random_window(im, area, r))


def center_crop(im, size):
    """The largest central square, resized to (size, size): what every evaluation sees."""
    side = min(im.size)
    x, y = ((length - side) / 2 for length in im.size)
    return im.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


def to_tensor(images):
    """List of RGB pictures of one size -> (b, 3, H, W) uint8."""
    pixels = torch.from_numpy(np.stack([np.asarray(im) for im in images]))  # (b, H, W, 3)
    return pixels.permute(0, 3, 1, 2).contiguous()


def normalize(images):
    """(b, 3, H, W) uint8 on any device -> float32 with CLIP's mean at 0 and deviation of 1."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) * 255 for c in (MEAN, STD))
    return (images.float() - mean) / std


class Batches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of that step's global batch, as collate makes it.
    It depends on (seed, step) alone, so a resumed run sees the same. Each epoch is a random order
    of the data, without its last incomplete batch. An error becomes the item {"error": sentence}.
    batch_size is global. min_area: of the random crop; None takes the central square. views: add
    PyramidCLIP's. local_area: of its local view, whose caption then is the pair's; None for none.
    """
    def __init__(self, data, tok, batch_size, size, context_length, seed=0, min_area=None,
                 rank=0, world=1, views=False, local_area=None):
        if batch_size > len(data):
            raise UserError(f"--batch-size {batch_size} is larger than the data ({len(data)} "
                            "pictures): lower it")
        if batch_size % world:
            raise UserError(f"--batch-size {batch_size} can't be shared out evenly among {world} "
                            f"processes: try {max(1, batch_size // world) * world}")
        self.data, self.tok, self.batch_size, self.seed = data, tok, batch_size, seed
        self.size, self.context_length, self.rank, self.world = size, context_length, rank, world
        self.min_area, self.with_views, self.local_area = min_area, views, local_area
        self.epoch, self.order = None, None

    def __getitem__(self, step):
        family = getattr(self.data, "family", 1)  # scenes of a family stay together
        families = len(self.data) // family
        epoch, k = divmod(step, families * family // self.batch_size)
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(families, generator=g)[:, None] * family + torch.arange(family)
            self.epoch, self.order = epoch, order.flatten()
        share = self.batch_size // self.world
        first = k * self.batch_size + self.rank * share
        try:
            samples = [self.sample(i) for i in self.order[first:first + share].tolist()]
        except UserError as e:  # an exception would reach the main process as a traceback
            return {"error": str(e)}
        return collate(samples, self.tok, self.context_length)

    def sample(self, i):
        """What collate takes of sample i in the present epoch."""
        r = random.Random(f"{self.seed}/{self.epoch}/{i}")
        whole, caption = self.data.pair(i, r)
        if self.min_area is None:
            image = center_crop(whole, self.size)
        else:
            image = random_crop(whole, self.size, self.min_area, r)
        out = {"images": image, "caption": caption}
        if self.with_views:
            out |= self.data.views(i, whole, caption)
        if self.with_views and self.local_area is not None:
            out["images_l"], out["caption"] = self.data.local_view(
                i, whole, caption, r, self.size, self.local_area)
        return out


def collate(samples, tok, context_length):
    """[{name: picture, text or regions}] -> a batch, a dict of tensors: images, images_l
    (b, 3, H, W) uint8; ids (b, L) int64 and mask (b, L) bool of the captions, L the longest;
    summary and objects as ids, each with its L; regions (b, M, 2052); and masks of these three."""
    batch = {}
    for name in samples[0]:
        column = [s[name] for s in samples]
        if name in ("images", "images_l"):
            batch[name] = to_tensor(column)
        elif name == "regions":
            counts = torch.tensor([len(x) for x in column])
            column = [torch.from_numpy(x) for x in column]
            batch[name] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True)
            batch["regions_mask"] = torch.arange(batch[name].shape[1]) < counts[:, None]
        else:
            ids, mask = tok(column, context_length)
            longest = int(mask.sum(1).max())
            batch[name], batch[f"{name}_mask"] = ids[:, :longest], mask[:, :longest]
    batch["ids"], batch["mask"] = batch.pop("caption"), batch.pop("caption_mask")
    return batch


def main():
    ap = argparse.ArgumentParser(description="Print samples of a dataset and draw their pictures.")
    ap.add_argument("--data", default="scenes", help="scenes, or a CSV with columns image,caption")
    ap.add_argument("--n", type=int, default=5, help="how many samples")
    ap.add_argument("--out", default="samples.png", help="where the pictures go")
    args = ap.parse_args()
    data = Scenes(args.n) if args.data == "scenes" else open_dataset(args.data)
    n = min(args.n, len(data))
    sheet = Image.new("RGB", (228 * n + 4, 460), "white")
    for i in range(n):
        image, caption = data.pair(i)
        local, left = data.local_view(i, image, caption, random.Random(i), 224, 0.5)
        print(f"caption     {caption}\nlocal view  {left}")
        for name, view in data.views(i, image, caption).items():
            print(f"{name:11} {getattr(view, 'shape', view)}")
        sheet.paste(center_crop(image, 224), (228 * i + 4, 4))
        sheet.paste(local, (228 * i + 4, 232))
    sheet.save(args.out)
    print(f"drawn into {args.out}, local views below")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"data.py: {e}")
