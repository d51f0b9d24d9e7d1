"""Data: the built-in scenes, files of pictures with captions, crops and batches.

    python data.py                        # five scenes, their masks, boxes and texts: samples.png
    python data.py --data photos/train.csv --n 8 --out photos.png
    python data.py check photos/train.csv # read everything once and list what can't be used
    python data.py clean photos/train.csv photos/clean.csv # take out what FILIP's rules forbid

Covers: FILIP 3.1.2 (prompts, eq. 6), 3.2 (several texts a picture), 3.3 (cleaning),
PyramidCLIP 3.1 to 3.3 (summary, global and local view, object phrases, regions), SPARC 4.1.

Differs from the papers: they train on 15 million pairs (PyramidCLIP's ablations) to 6.1 billion
(SPARC's three sets), `Scenes` draws its own. Rules stand in for FILIP's translator, PyramidCLIP's
T5 and its detector; files may bring their own (see Pairs). Files get crops and flips alone.
"""
import argparse, contextlib, csv, functools, gc, glob, hashlib, io, itertools, json, math, os
import random, tarfile
from collections import defaultdict, namedtuple
import numpy as np
import regex
import torch
from PIL import Image, ImageDraw, ImageOps, JpegImagePlugin, UnidentifiedImageError
from model import Tokenizer, UserError  # Tokenizer is for those who look here

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
Thing = namedtuple("Thing", "size fill colour shape box")  # box: x1, y1, x2, y2
# in place of a detector's weights; RandomState's stream never changes
ROI_PROJECTION = (np.random.RandomState(0).standard_normal((192, 2048)) / 192 ** 0.5).astype("f4")
Word = namedtuple("Word", "text thing kind", defaults=(-1, ""))  # thing: index or -1


@functools.lru_cache(None)
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
def pattern(shape, fill, d, period):
    """Mask of the stripes or dots on a shape: "L" picture (d, d)."""
    y, x = np.mgrid[:d, :d]
    on = (x % period < period // 2) & (y % period < period // 2)
    if fill == "striped":
        on = (x + y) % period < period // 2
    return Image.fromarray(np.asarray(outline(shape, d)) * on)


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


class Scenes:
    """n small pictures of coloured shapes, the same on every machine. In a scene all colours and
    all shapes differ, so each word names one object. size: side in pixels, a multiple of 7.
    split: "train", "val", "test" never share a scene; each of "composition" shows one of HELD_OUT.
    unique: outside "train" no two scenes hold the same objects. objects: least and most.
    mismatch: how often words are about nothing (PyramidCLIP 1: caption redundancy), an object has
        no words (image redundancy, cast deficiency), the detector leaves one out (our own).
    paraphrase: share of pair(i, r)'s captions in other words, for FILIP's back-translation.
    family: so many scenes in a row differ in shapes alone, and stay in one batch; 4 in "train".
    scenes[i] is a dict: image (size, size) RGB, background str, things [Thing] that the detector
    found, the largest first, their masks (N, size, size) bool, caption str, its words [Word], and
    swapped, the caption with two colours exchanged (a hard negative), or None."""
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
                if specs.setdefault(content, spec) is spec:
                    break
            else:
                raise UserError(f"only {i} scenes of distinct content: ask for fewer")
        return list(specs.values())

    def spec(self, i):
        return self.specs[i] if self.specs else self.draw_lots(i)

    def draw_lots(self, i, attempt=0):
        r = random.Random(f"{self.split}/{self.seed}/{i // self.family}/{attempt}")  # the family's
        own = random.Random(f"{self.split}/{self.seed}/{i}/{attempt}/own")
        least, most = self.objects
        n = least + int(r.random() ** 2 * (most - least + 1))
        colours, shapes = shuffled(COLOURS, r)[:n], shuffled(SHAPES, own)[:n]
        held_out = self.split == "composition"  # only there is a pair of HELD_OUT, and always one
        while HELD_OUT.isdisjoint(zip(colours, shapes)) == held_out:
            if held_out:
                colours = shuffled(COLOURS, own)[:n]
            shapes = shuffled(SHAPES, own)[:n]
        sizes, boxes = self.draw_places(n, r)
        fills = [pick(FILLS, r) for _ in range(n)]
        spec = {"things": list(map(Thing, sizes, fills, colours, shapes, boxes)),
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

    def draw_places(self, n, r):
        """n sizes, the largest first, and boxes without overlap; new sizes after 8 failures."""
        unit = self.size // 7
        for attempt in itertools.count():
            if attempt % 8 == 0:
                sizes = sorted([pick([*SIZES], r) for _ in range(n)], key=SIZES.get, reverse=True)
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
            colour = [min(255, max(0, c + int(25 * r.random()) - 12)) for c in COLOURS[t.colour]]
            side = t.box[2] - t.box[0]
            im.paste(tuple(colour), t.box, outline(t.shape, side))
            if t.fill:  # stripes and dots are darker, so the outline stays visible
                dark = tuple(c // 2 for c in colour)
                im.paste(dark, t.box, pattern(t.shape, t.fill, side, max(4, size // 11)))
        return im

    def masks(self, spec):
        """The pixels of each thing: (N, size, size) bool."""
        out = np.zeros((len(spec["things"]), self.size, self.size), dtype=bool)
        for m, t in zip(out, spec["things"]):
            x1, y1, x2, y2 = t.box
            m[y1:y2, x1:x2] = np.asarray(outline(t.shape, x2 - x1)) > 127
        return out

    @staticmethod
    def phrase(t, k):
        """Words of thing number k, such as "a small red star"."""
        words = [Word(text, k, kind) for text, kind in zip(t[:4], Thing._fields) if text]
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
        out, things, order = [], spec["things"], spec["order"]
        if style == 1:  # pairs the other way round
            order = [k for n in range(0, len(order), 2) for k in reversed(order[n:n + 2])]
        for n, k in enumerate(order):
            link = "and" if n else OPENINGS[style]
            if n % 2 and style != 2:
                link = self.relation(things[order[n - 1]], things[k])
            out += [Word(w) for w in link.split()] + self.phrase(things[k], k)
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

    def pair(self, i, r=None, size=None):
        """(picture, caption) of scene i, with a style and omissions drawn by r (random.Random)."""
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
                    things[k] = t._replace(shape="thing")
            spec = spec | {"things": things}
        return image, join(self.words(spec, style))

    def views(self, i, image, caption):
        """PyramidCLIP's T_S, T_OA, R -> {"summary" str, "objects" str, "regions" (N, 2052)}. The
        summary is of all objects that captions of scene i mention, whichever caption was drawn."""
        spec = self.spec(i)
        found = spec["things"][:spec["found"]]
        short = [spec["things"][k]._replace(size="", fill="") for k in spec["order"]]
        crops = [image.resize((8, 8), Image.Resampling.BOX, t.box) for t in found]
        x = np.stack(crops).reshape(len(found), -1).astype(np.float32) / 127.5 - 1  # (N, 8 * 8 * 3)
        boxes = np.array([t.box for t in found], dtype=np.float32) / self.size  # (N, 4) in 0..1
        return {"summary": " and ".join(join(self.phrase(t, 0)) for t in short),
                "objects": ", ".join(" ".join(w for w in t[:4] if w) for t in found),
                "regions": np.concatenate([x @ ROI_PROJECTION, boxes], axis=1)}

    def local_view(self, i, image, caption, r, area):
        """The window of PyramidCLIP's local view, of at least this area, drawn by r; the caption of
        what is left: of objects at least half inside, told as in the caption that was drawn."""
        spec, left = self.spec(i), []
        while not left:
            window = random_window(image, area, r)
            left = [k for k in spec["order"] if share_inside(spec["things"][k].box, window) >= 0.5]
            area = (1 + area) / 2  # nothing is left: draw again, and larger
        said = caption.split()  # no two things of a scene share a colour or a shape
        things = [t._replace(colour=t.colour if t.colour in said else "",
                             shape=t.shape if t.shape in said else "thing")
                  for t in spec["things"]]
        style = max(s for s in (0, 1, 2) if caption.startswith(OPENINGS[s]))
        return window, join(self.words(spec | {"things": things, "order": left}, style))

    def __getitem__(self, i):
        if not 0 <= i < self.n:
            raise IndexError(i)
        spec = self.spec(i)
        n, words = spec["found"], self.words(spec)
        links = [w if w.thing < n else w._replace(thing=-1) for w in words]
        return {"image": self.draw(spec), "background": spec["background"],
                "things": spec["things"][:n], "masks": self.masks(spec)[:n],
                "caption": join(words), "words": links, "swapped": self.swapped(spec)}


def filip_prompts(label, prefixes, descriptions=("",), suffixes=("",)):
    """Every combination, such as "a photo of a pug, a type of pet. I like it." or "a pug." """
    texts = [f"{prefix} {label}, {description}. {suffix.rstrip('.')}."  # FILIP eq. 6
             for prefix in prefixes for description in descriptions for suffix in suffixes]
    return [t.replace(", .", ".").removesuffix(" .").strip() for t in texts]  # no empty parts


# ---------------------------------------------------------------------------------- real pictures
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PICTURE = regex.compile("|".join(map(regex.escape, PICTURES)), regex.IGNORECASE)
PICTURE_NAMES = ("image", "filepath", "file_name", "image_path", "path")  # of columns
CAPTION_NAMES = ("caption", "title", "text")
BROKEN = regex.compile(r"[\0\ud800-\udfff]")  # half surrogates stand for bytes that aren't UTF-8
DAMAGE = (AttributeError, KeyError, RecursionError, TypeError, ValueError)  # of JSON's contents
SIDES = regex.compile(r"\b(left|right)\b", regex.IGNORECASE)
CLAUSE = regex.compile(
    r"(?:\S+\s+){0,2}\S*?(?:(?!\s*[,.;:]|\s+(?:and|with|while|who|which|that|as|near|next)\b).)*",
    regex.IGNORECASE | regex.DOTALL)
# what a reader gives; place: (path, offset, size) of a picture in a tar file; label: its class
Row = namedtuple("Row", "where image captions id summary objects paraphrases place label",
                 defaults=[None] * 6)


def shown(text):
    """A text as it can be printed in one line, whatever it holds."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:300])


class BadRow(UserError):
    """A sample that can't be used: .where ("photos.csv line 4"), .what (its picture), .reason."""
    def __init__(self, *parts):
        super().__init__(*map(shown, parts))
        self.where, self.what, self.reason = self.args

    def __str__(self):
        return f"{self.where}: {self.reason}"


def find_columns(names):
    """What a Row's cells are called, from image on; None if no name of these is among the names."""
    image = next((name for name in PICTURE_NAMES if name in names), None)
    caption = next((name for name in CAPTION_NAMES if name in names), None)
    return image, caption, "image_id", "summary", "objects", "paraphrases"


def as_row(where, cells):
    return Row(where, *map(cells.get, find_columns(cells)))


def read_table(path):
    """Rows of a text file whose first line names the columns, between commas, semicolons or tabs"""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        lines = f.readlines() or [""]
    delimiter, n = max(",;\t", key=lines[0].count), 1
    names = [name.strip(' "\r\n').lower() for name in lines[0].split(delimiter)]
    columns = find_columns(names)
    if None in columns:
        raise UserError(f"{path} line 1 has no column of the picture ({', '.join(PICTURE_NAMES)}) "
                        f"or no column of the caption ({', '.join(CAPTION_NAMES)}), or is not in "
                        f"UTF-8; found: {shown(', '.join(names))}")
    while n < len(lines):
        where, size = f"{path} line {n + 1}", 1
        try:
            cells = lines[n].rstrip("\r\n").split(delimiter)
            if '"' in lines[n]:
                # 20 lines at most, and of one picture: an open quote spoils its own line alone
                more = itertools.takewhile(lambda x: not PICTURE.search(x), lines[n + 1:n + 20])
                reader = csv.reader([lines[n], *more], delimiter=delimiter, strict=True)
                cells, size = next(reader), reader.line_num
            if any(map(str.strip, cells[len(names):])):
                raise csv.Error(f"{len(cells)} cells in {len(names)} columns: put quotes around a "
                                "caption that has commas")
            if lines[n].strip():
                yield Row(where, *map(dict(zip(names, cells)).get, columns))
        except csv.Error as e:
            why = str(e).replace("unexpected end of data", "a quote is opened and not closed")
            yield BadRow(where, lines[n][:80].strip(), f"a broken row ({why})")
        n += size


def read_records(where, records, make):
    """Rows of JSON records by make(where, record) -> Row or, for nothing, None."""
    for n, record in enumerate(records, 1):
        try:
            row = make(f"{where} {n}", record)
        except DAMAGE as e:
            row = BadRow(f"{where} {n}", "", f"no JSON object of a pair ({e})")
        if row:
            yield row


def read_jsonl(path):
    """Rows of a text file with a JSON object in each line; "caption" may be a list."""
    def make(where, line):
        return line.strip() and as_row(where, json.loads(line))
    with open(path, "rb") as f:
        yield from read_records(f"{path} line", f, make)


def read_json(path, split):
    """Rows of COCO's captions, such as captions_val2017.json, or of a split of Karpathy's JSON."""
    captions = defaultdict(list)

    def note(where, annotation):
        captions[str(annotation["image_id"])].append(annotation["caption"])

    def make(where, image):
        if not split:
            return Row(where, image["file_name"], captions.pop(str(image["id"]), []))
        if image["split"] == split:
            name = os.path.join(image.get("filepath", ""), image["filename"])
            return Row(where, name, [sentence["raw"] for sentence in image["sentences"]])
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
            whole = json.load(f)
        images, annotations = list(whole["images"]), [] if split else list(whole["annotations"])
    except DAMAGE as e:
        raise UserError(f"{path} is neither COCO's captions nor Karpathy's JSON with a split, as "
                        f"in flickr8k.json:train ({type(e).__name__}: {shown(e)})") from None
    yield from read_records(f"{path} annotation", annotations, note)
    yield from read_records(f"{path} image", images, make)
    for key in captions:
        yield BadRow(path, key, f"captions of an image_id that no image has ({key})")


def read_bytes(path, offset=0, size=-1):
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise FileNotFoundError("there is no such file")
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


def split_lines(content):
    """The captions of a .txt, bytes: one in each line."""
    text = content.decode("utf-8-sig", "surrogateescape")
    return [line for line in text.splitlines() if line.strip()]


def read_folder(folder):
    """Rows of a folder of tar files, of pictures with a .txt each, or of class folders: FILIP's
    prompts of their names are the captions."""
    files = sorted(glob.glob("**", root_dir=folder, recursive=True))
    texts = {f: os.path.splitext(f)[0] + ".txt" for f in files if f.lower().endswith(PICTURES)}
    if not texts:
        yield from read_shards([os.path.join(folder, f) for f in files if f.endswith(".tar")])
    beside = not set(files).isdisjoint(texts.values())
    for picture, text in texts.items():
        captions, label = [], os.path.dirname(picture).split(os.sep)[0].replace("_", " ")
        if label and not beside:
            captions = filip_prompts(label, ["a photo of a"])
        elif os.path.isfile(os.path.join(folder, text)):
            captions = split_lines(read_bytes(os.path.join(folder, text)))
        yield Row(os.path.join(folder, picture), picture, captions, label=None if beside else label)


def expand(pattern):
    """Paths of a pattern with brace ranges ("{000..012}.tar") and globs, in order."""
    before, *braces = regex.split(r"\{(\d+)\.\.(\d+)\}", pattern, maxsplit=1)
    if not braces:
        return sorted(glob.glob(pattern)) or [pattern]
    first, last, after = braces
    names = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [path for name in names for path in expand(before + name + after)]


def read_shard(path, name):
    """Rows of a tar file, not packed, as webdataset and img2dataset write it: .jpg, .png ... with a
    .txt, or a .json that has a caption; name: what a picture's name begins with."""
    samples = defaultdict(dict)  # stem -> {extension: (path, offset, size)}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                if member.isfile() and member.offset_data + member.size <= os.path.getsize(path):
                    samples[stem][extension.lower()] = path, member.offset_data, member.size
            if read_bytes(path, tar.offset, 512) != bytes(512):
                raise tarfile.ReadError("its end is missing or damaged")
    except (OSError, tarfile.TarError, ValueError, OverflowError) as e:
        yield BadRow(path, name, f"a tar file that is cut off, damaged or packed ({e})")
    for stem, files in samples.items():
        extension, captions = next((e for e in PICTURES if e in files), ""), []
        if ".txt" in files:
            captions = split_lines(read_bytes(*files[".txt"]))
        elif ".json" in files:
            with contextlib.suppress(*DAMAGE):
                captions = as_row(path, json.loads(read_bytes(*files[".json"]))).captions
        yield Row(path, f"{name}/{stem}{extension}", captions, place=files.get(extension))


def read_shards(paths):
    top = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths] or ["."])
    return itertools.chain.from_iterable(read_shard(p, os.path.relpath(p, top)) for p in paths)


@functools.lru_cache(8)
def open_regions(path, process):
    """An .npz file; each process opens it for itself."""
    return np.load(path)


class Pairs:
    """Pictures with their captions, from the rows of a reader. Rows of the same picture, or of the
    same image_id, are its several captions. Paths are relative to a folder, that of the file.
    A row may have paraphrases, a list or texts between " | ", a summary (of the row's caption) and
    objects ("brown dog, green grass"; a picture's first row counts).
    regions: an .npz file of arrays (M, 2052), named as the pictures: a detector's 2,048 features of
    a region and its box x1, y1, x2, y2 in 0..1, the surest first.
    rows: the first Row of each picture. captions: [str] for each picture, what evaluation knows.
    told: captions and paraphrases, of which training draws each as often (FILIP 3.2).
    bad: [BadRow], what had to be left out. classes: names of class folders, or None."""
    def __init__(self, path, rows, folder, regions=None):
        self.folder = os.path.join(os.path.abspath(folder), "")  # with a stroke at its end
        self.rows, self.captions, self.told, self.bad, self.regions = [], [], [], [], regions
        self.summaries, index = {}, {}  # (number, text) -> summary; name or (id,) -> number
        for row in rows:
            try:
                self.add(row, index)
            except BadRow as e:
                self.bad.append(e)
        if not self.rows:
            first = f": the first of {len(self.bad)} bad rows is {self.bad[0]}" if self.bad else ""
            raise UserError(f"{path} has no pair that can be used{first}")
        self.images = [row.image for row in self.rows]
        self.classes = sorted({row.label for row in self.rows} - {None}) or None
        if regions:
            self.check_regions()

    def __len__(self):
        return len(self.rows)

    def add(self, row, index):
        """Take a row in. Raises BadRow if nothing of it can be used."""
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row.image, str) or not row.image.strip():
            raise BadRow(row.where, "", "the name of the picture is empty or no text")
        name = os.path.normpath(row.image.strip()).removeprefix(self.folder)  # one spelling
        captions = self.good_texts(row, name, "caption", row.captions or "")
        if not captions:
            return
        key = name if row.id in (None, "") else (str(row.id),)
        i = index.get(name, index.get(key))
        if i is None:
            i = self.add_picture(row, name)
        index[name] = index[key] = i
        others = row.paraphrases or []
        if isinstance(others, str):
            others = [text for text in others.split(" | ") if text.strip()]
        others = self.good_texts(row, name, "paraphrase", others)
        self.captions[i] += captions
        self.told[i] += captions + others
        if row.summary and isinstance(row.summary, str):
            for text in (captions[0], *others):
                self.summaries.setdefault((i, text), row.summary.strip())

    def good_texts(self, row, name, kind, texts):
        """The texts of a row that can be used; the others go into bad."""
        good = []
        for text in texts if isinstance(texts, list) else [texts]:
            if not isinstance(text, str) or not text.strip():
                fault = "is empty or no text"
            elif len(text) > 5000:  # a mistake in the file
                fault = f"is too long ({len(text):,} characters)"
            elif not text.isprintable() and BROKEN.search(text):
                fault = "has bytes that are no UTF-8 text, or NULs (save the file as UTF-8)"
            else:
                good.append(text.strip())
                continue
            self.bad.append(BadRow(row.where, name, f"the {kind} of {name} {fault}"))
        return good

    def add_picture(self, row, name):
        """The number of a new picture. Raises BadRow if it can't be used."""
        without = (self.rows or [row])[0].objects is None  # as the first picture, so are all
        if without != (row.objects is None) or str(row.objects).strip() == "":
            raise BadRow(row.where, name, f"objects of {name} is empty, or not in every row")
        if not row.place and not os.path.isfile(os.path.join(self.folder, name)):
            raise BadRow(row.where, name, f"there is no {name} (paths start at {self.folder}: see "
                                          "--images)")
        self.rows.append(row._replace(image=name, captions=None))
        self.captions.append([])
        self.told.append([])
        return len(self) - 1

    def fingerprint(self):
        """A hash of the names and texts, in their order: the same data has the same."""
        h = hashlib.sha256()
        for name, told in zip(self.images, self.told):
            h.update("\0".join([name, *told, ""]).encode("utf-8", "backslashreplace"))
        return h.hexdigest()

    def label(self, i):
        """The number of picture i's class in .classes, or None."""
        return self.classes and self.classes.index(self.rows[i].label)

    def check_regions(self):
        """Raises UserError unless the file of regions has each picture."""
        open_regions.cache_clear()  # the file may be another one by now
        try:
            keys = open_regions(self.regions, os.getpid()).files
        except Exception as e:  # numpy raises many kinds on a damaged file
            raise UserError(f"can't read {self.regions} as an .npz file of regions: write it with "
                            f"numpy.savez ({type(e).__name__})") from None
        self.keys = {os.path.normpath(key).removeprefix(self.folder): key for key in keys}
        missing = [name for name in self.images if name not in self.keys]
        if missing:
            raise UserError(f"{self.regions} has no regions of {missing[0]} ({len(missing)} of "
                            f"{len(self)} pictures are missing): the column image names them")
        self.views(0, None, self.captions[0][0])

    def views(self, i, image, caption):
        """PyramidCLIP's T_S, T_OA, R -> {"summary" str, "objects" str, "regions" (M, 2052)}, the
        latter two if the data has them. The summary is the caption's own, or else its first clause:
        all before a comma, full stop, "and", "with" or the like, from the third word on."""
        out = {"summary": self.summaries.get((i, caption)) or CLAUSE.match(caption)[0].strip()}
        row = self.rows[i]
        if row.objects is not None:
            out["objects"] = str(row.objects)
        if self.regions:
            try:
                x = open_regions(self.regions, os.getpid())[self.keys[row.image]]
                if x.shape[1:] != (2052,) or not len(x):
                    raise ValueError(f"they are {x.shape}; (M, 2052) is needed")
                out["regions"] = x.astype(np.float32)
            except Exception as e:  # numpy raises many kinds
                reason = f"can't read the regions of {row.image} ({self.regions}: {e})"
                raise BadRow(row.where, row.image, reason) from None
        return out

    def texts(self):
        return [text for told in self.told for text in told]

    def pair(self, i, r=None, size=None):
        """(picture, one of its texts drawn by r, a random.Random; without r its first caption)"""
        return self.open(i, size), pick(self.told[i], r) if r else self.captions[i][0]

    def local_view(self, i, image, caption, r, area):
        """The window of PyramidCLIP's local view, and its caption: that of the whole picture."""
        return random_window(image, area, r), caption

    def draw_texts(self, i, k, r):
        """k texts of picture i, all different ones if it has so many."""
        return shuffled(self.told[i] * math.ceil(k / len(self.told[i])), r)[:k]

    def good(self, size=None):
        """(number, picture) of all pictures that can be read; the others go into bad."""
        for i in range(len(self)):
            try:
                yield i, self.open(i, size)
            except BadRow as e:
                self.bad.append(e)

    def read(self, i):
        """The bytes of picture i's file."""
        row = self.rows[i]
        return read_bytes(*(row.place or [os.path.join(self.folder, row.image)]))

    def open(self, i, size=None):
        """Picture i, see open_image. BadRow if it can't be read."""
        row = self.rows[i]
        try:
            return open_image(self.read(i), size, row.image)
        except (UserError, OSError) as e:
            raise BadRow(row.where, row.image, str(e)) from None


def open_dataset(path, regions=None, images=None):
    """Pairs of what is at a path: a folder (see read_folder), .tar files, COCO's .json, Karpathy's
    .json:split, .jsonl, or else a table. images: the folder of the pictures, if not the file's.
    UserError says what is wrong with the whole, .bad what is wrong with rows. regions: see Pairs"""
    path = str(path)
    file, split = path.rsplit(":", 1) if ".json:" in path else (path, "")
    kind, folder = os.path.splitext(file)[1].lower(), os.path.dirname(file)
    if os.path.isdir(path):
        rows, folder = read_folder(path), path
    elif kind == ".tar":
        rows = read_shards(expand(path))
    elif not os.path.isfile(file):
        raise UserError(f"{path}: there is no such file; give a table with a first line "
                        "image,caption, .jsonl, .json, a folder, .tar files, or `scenes`")
    elif kind == ".json":
        rows = read_json(file, split)
    else:
        rows = read_jsonl(path) if kind == ".jsonl" else read_table(path)
    gc.disable()  # a million rows make no garbage, but it would be looked for all the time
    try:
        return Pairs(path, rows, images or folder, regions)
    except OSError as e:
        raise UserError(f"can't read {path} ({e})") from None
    finally:
        gc.enable()


def start_image(content):
    """A picture of which only the size is read so far, from the bytes of its file."""
    file = io.BytesIO(content)
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)  # no limit of pixels yet: see open_image
    if content.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        raise ValueError("a PostScript file is no picture")  # Pillow would run Ghostscript
    return Image.open(file)


def open_image(source, size=None, name="the bytes"):
    """A picture, from a path or bytes, in RGB: turned as its EXIF says, on white where transparent,
    of an animation the first frame; JPEGs shrink, not below size (512). UserError if damaged."""
    side, limit = size or 512, Image.MAX_IMAGE_PIXELS
    try:
        if not isinstance(source, bytes):
            name = source
            source = read_bytes(name)
        im = start_image(source)
        im.draft("RGB", (side, side))  # JPEGs are decoded no larger than needed
        if limit and not 0 < im.width * im.height <= limit:
            raise Image.DecompressionBombError
        im.load()
        with contextlib.suppress(Exception):  # damaged EXIF: as the picture lies
            im = ImageOps.exif_transpose(im)
        return as_rgb(im)
    except Image.DecompressionBombError:
        why = f"it has no pixels or more than {limit:,}"
    except UnidentifiedImageError:
        why = "cannot identify the file as a picture"
    except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
        why = f"{type(e).__name__}: {shown(e)}"
    raise UserError(f"can't read {name} as a picture ({why}); replace it or take it out")


def as_rgb(im):
    """Any mode of Pillow's -> RGB. Beyond 8 bits 0..255 stand for 0 (the least, if negative) to the
    first of 1, 255 (of integers 4095, 65535 too) that none exceeds, or else to the largest."""
    if im.mode == "F" or im.mode.startswith("I"):
        x = np.nan_to_num(np.asarray(im, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(0.0, x.min()), x.max()
        tops = (1, 255) if im.mode == "F" else (1, 255, 4095, 65535)
        high = next((top for top in tops if high <= top), high)
        return Image.fromarray(((x - low) / (high - low) * 255).astype(np.uint8)).convert("RGB")
    if im.has_transparency_data:
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
    return im.convert("RGB")


def word_tokens(tok, words):
    """For each Word the positions of its tokens in the sequence (BOS is position 0)."""
    lengths = [len(tok.encode(w.text)) for w in words]
    starts = itertools.accumulate(lengths, initial=1)
    return [list(range(start, start + n)) for start, n in zip(starts, lengths)]


# ------------------------------------------------------------------------------- crops and batches
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def random_window(im, area, r):
    """A random square, at least this share of the largest square's area: x1, y1, x2, y2."""
    side = min(im.size) * (area + (1 - area) * r.random()) ** 0.5
    x, y = (r.random() * (length - side) for length in im.size)
    return x, y, x + side, y + side


def cut(im, size, window):
    """A window of a picture, resized to (size, size)."""
    return im.resize((size, size), Image.Resampling.BICUBIC, box=window)


def center_crop(im, size):
    """The largest central square, resized to (size, size): what every evaluation sees."""
    return ImageOps.fit(im, (size, size), Image.Resampling.BICUBIC)


def to_tensor(images):
    """List of RGB pictures of one size -> (b, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def normalize(images):
    """(b, 3, H, W) uint8 on any device -> float32 with CLIP's mean at 0 and deviation of 1."""
    mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) * 255 for c in (MEAN, STD))
    return (images.float() - mean) / std


def mirrored(sample):
    """A sample's texts and regions, made true of the mirror image: "left" and "right" change places
    where they are whole words, and x1, x2 of boxes are 1 - x2, 1 - x1."""
    def swap(text):
        return SIDES.sub(lambda side: "right" if side[0].lower() == "left" else "left", text)
    out = sample | {"caption": [swap(text) for text in sample["caption"]]}
    for name in {"summary", "objects"}.intersection(out):
        out[name] = swap(out[name])
    if "regions" in out:
        out["regions"][:, [-4, -2]] = 1 - out["regions"][:, [-2, -4]]
    return out


class Batches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of that step's global batch, as collate makes it. It depends
    on (seed, step) alone, so a resumed run sees the same. An epoch is a random order of all N
    samples: sample n of the run is number n % N of epoch n // N. A sample that can't be read is
    replaced by one drawn from (seed, epoch, its number, the try), and "bad" lists it: [(where,
    what, reason)]. Other errors become {"error": sentence}.
    batch_size is global. min_area: of the random crop; None takes the central square. views: add
    PyramidCLIP's. local_area: of its local view, whose caption is the pair's then, or None.
    drop_words: this share of captions loses about half of its words, so short texts are met too.
    For files, not for scenes: captions, how many texts of each picture; flip, mirror half of the
    pictures and what is told of them."""
    def __init__(self, data, tok, batch_size, size, context_length, seed=0, min_area=None, rank=0,
                 world=1, views=False, local_area=None, captions=1, flip=False, drop_words=0.0):
        if isinstance(data, Scenes) and (captions > 1 or flip):
            raise UserError("--captions and --flip are for files: leave them out")
        if batch_size > len(data):
            raise UserError(f"--batch-size {batch_size} is larger than the data ({len(data)} "
                            "pictures): lower it")
        if batch_size % world:
            raise UserError(f"--batch-size {batch_size} can't be shared out evenly among {world} "
                            f"processes: try {max(1, batch_size // world) * world}")
        self.data, self.tok, self.batch_size, self.seed = data, tok, batch_size, seed
        self.size, self.context_length, self.rank, self.world = size, context_length, rank, world
        self.min_area, self.with_views = min_area, views
        self.local_area = local_area if views else None
        self.captions, self.flip, self.drop_words = captions, flip, drop_words
        least = min(min_area or 1, self.local_area or 1)
        self.side = math.ceil(size / least ** 0.5)  # of a picture that crops are cut of
        self.epoch, self.order = None, None

    def number(self, n):
        """(epoch, number in the data) of sample n of the run."""
        family = getattr(self.data, "family", 1)  # scenes of a family stay together
        families = len(self.data) // family
        epoch, k = divmod(n, families * family)
        if epoch != self.epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(families, generator=g)[:, None] * family + torch.arange(family)
            self.epoch, self.order = epoch, order.flatten()
        return epoch, int(self.order[k])

    def __getitem__(self, step):
        share, bad = self.batch_size // self.world, []
        first = step * self.batch_size + self.rank * share
        try:
            samples = [self.good_sample(*self.number(n), bad) for n in range(first, first + share)]
            batch = collate(samples, self.tok, self.context_length)
        except UserError as e:  # an exception would reach the main process as a traceback
            return {"error": str(e)}
        if bad:
            batch["bad"] = bad
        return batch

    def good_sample(self, epoch, i, bad):
        """Sample i, or, if it can't be read, another one. What can't be read goes into bad."""
        lots = random.Random(f"{self.seed}/{epoch}/{i}/instead")
        for attempt in range(100):
            try:
                return self.sample(epoch, i)
            except BadRow as e:
                bad.append(e.args)
                i = int(lots.random() * len(self.data))
        raise UserError(f"no picture of a hundred can be read ({bad[-1][1]}): try data.py check")

    def sample(self, epoch, i):
        """What collate takes of sample i in an epoch."""
        r = random.Random(f"{self.seed}/{epoch}/{i}")
        whole, caption = self.data.pair(i, r, self.side)
        texts = [caption] if self.captions == 1 else self.data.draw_texts(i, self.captions, r)
        flipped = self.flip and r.random() < 0.5
        if flipped:  # before the crops: PyramidCLIP's views share one caption and its sides
            whole = ImageOps.mirror(whole)
        if self.min_area is None:
            image = center_crop(whole, self.size)
        else:
            image = cut(whole, self.size, random_window(whole, self.min_area, r))
        out = {"images": image, "caption": texts}
        if self.with_views:
            out |= self.data.views(i, whole, texts[0])
        if self.local_area:
            window, texts[0] = self.data.local_view(i, whole, texts[0], r, self.local_area)
            out["images_l"] = cut(whole, self.size, window)
        if r.random() < self.drop_words:
            texts[:] = [" ".join(w for w in x.split() if r.random() < 0.5) or x for x in texts]
        return mirrored(out) if flipped else out


def collate(samples, tok, context_length):
    """[{name: picture, text, list of k texts or regions}] -> a batch, a dict of tensors: images,
    images_l (b, 3, H, W) uint8; ids (k * b, L) int64 and mask (k * b, L) bool of the captions, L
    the longest, the k of a picture one after another; summary (of the first caption) and objects as
    ids, each with its L; regions (b, M, 2052); and masks of these three."""
    batch = {}
    for name in samples[0]:
        column = [s[name] for s in samples]
        if name in ("images", "images_l"):
            batch[name] = to_tensor(column)
        elif name == "regions":
            pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
            batch[name] = pad([torch.from_numpy(x) for x in column])
            batch["regions_mask"] = pad([torch.ones(len(x), dtype=torch.bool) for x in column])
        else:
            if isinstance(column[0], list):
                column = [text for texts in column for text in texts]
            ids, mask = tok(column, context_length)
            longest = int(mask.sum(1).max())
            batch[name], batch[f"{name}_mask"] = ids[:, :longest], mask[:, :longest]
    batch["ids"], batch["mask"] = batch.pop("caption"), batch.pop("caption_mask")
    return batch


# ------------------------------------------------------------------------------------- the commands
def main():
    ap = argparse.ArgumentParser(description="Draw samples of a dataset with all that they hold.")
    ap.add_argument("command", nargs="*", metavar="check PATH | clean IN OUT",
                    help="read all of it and count; or take out what FILIP's rules forbid")
    ap.add_argument("--data", default="scenes", help="scenes, a table, .jsonl, .json, folder, .tar")
    ap.add_argument("--images", help="the folder of the pictures, if not that of the file")
    ap.add_argument("--n", type=int, default=5, help="how many samples")
    ap.add_argument("--out", help="where the pictures go (samples.png) or the list (bad_rows.csv)")
    ap.add_argument("--min-side", type=int, default=200, help="clean: of the shorter side, pixels")
    args = ap.parse_args()
    if args.n < 1:
        ap.error("--n: draw one sample or more")
    if args.command:
        import eval as evaluation  # built on this file, as visualize is, so both come late
        name, *paths = args.command
        if (name, len(paths)) == ("check", 1):
            return evaluation.check(*paths, args.images, args.out or "bad_rows.csv")
        if (name, len(paths)) == ("clean", 2):
            return evaluation.clean_table(*paths, args.images, args.min_side)
        ap.error("the commands are: check PATH, clean IN OUT")
    import visualize
    if args.data == "scenes":
        data = Scenes(args.n, size=visualize.SIDE, split="val")
    else:
        data = open_dataset(args.data, images=args.images)
    print("drawn into", visualize.draw_samples(data, args.n, args.out or "samples.png"))
    if getattr(data, "bad", []):
        print(f"note: {len(data.bad):,} rows are left out; the first: {data.bad[0]}")


if __name__ == "__main__":
    import data  # as visualize.py knows it, so that Scenes is one
    try:
        data.main()
    except UserError as e:
        raise SystemExit(f"data.py: {e}")
