"""Readers: a small function for each kind of file in which people keep pictures and captions.

    python data.py check photos.csv       # read all of it once, count what can't be used, list it
    python data.py --data "shards/{000..012}.tar" --n 8

A reader gives Rows, and a BadRow for what can't be read; open_dataset in data.py chooses the reader
and makes Pairs of its rows. open_image makes any picture RGB. Kinds: delimited text, JSONL, COCO's
and Karpathy's JSON, folders, and tar files as webdataset and img2dataset write them.

Differs from other readers of tar files: they are indexed first (the offsets of their members), then
read at random, so that order, sharing out and resuming are those of any other data. They have to be
files on a disk, not packed; a pipe or an address is no place to read at random.
"""
import collections
import contextlib
import csv
import functools
import glob
import io
import json
import os
import tarfile
import warnings
import numpy as np
import regex
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from model import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
COLUMNS = (("image", "filepath", "file_name", "image_path", "path"), ("caption", "title", "text"))
LONGEST = 5000  # characters; a longer caption is a mistake in the file
BROKEN = regex.compile(r"[\0\ud800-\udfff]")  # half surrogates stand for bytes that aren't UTF-8
# where: a line number or a text; place: in a tar file. The readers below give Rows and BadRows.
Row = collections.namedtuple("Row", "where image captions id summary objects place",
                             defaults=(None,) * 4)


def shown(text):
    """A text as it can be printed in one line, whatever it holds."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text[:301])
    return text[:297] + "..." if len(text) > 300 else text


class BadRow(UserError):
    """A sample that can't be used: .where ("photos.csv line 4"), .what (its picture), .reason."""
    def __init__(self, where, what, reason):
        super().__init__(shown(where), shown(what), shown(reason))
        self.where, self.what, self.reason = self.args

    def __str__(self):
        return f"{self.where}: {self.reason}"


@functools.lru_cache(1000)
def find_columns(names):
    """The columns of the picture and of the caption, among a tuple of names. Or UserError."""
    found = [next((c for c in wanted if c in names), None) for wanted in COLUMNS]
    if None in found:
        kinds = ("picture", *COLUMNS[0]), ("caption", *COLUMNS[1])
        lacks = [f"no column of the {kind} ({', '.join(taken)})"
                 for (kind, *taken), name in zip(kinds, found) if name is None]
        there = shown(", ".join(map(str, names))) or "nothing"
        raise UserError(f"{' and '.join(lacks)}; found: {there}")
    return found


def as_row(where, cells, columns):
    """The Row of a dict of cells."""
    image, caption = columns
    return Row(where, cells.get(image), cells.get(caption), cells.get("image_id"),
               cells.get("summary"), cells.get("objects"))


def caption_fault(caption):
    """What is wrong with a caption, or None."""
    if caption is None or isinstance(caption, str) and not caption.strip():
        return "is empty"
    if not isinstance(caption, str):
        return f"is no text ({type(caption).__name__})"
    if len(caption) > LONGEST:
        return f"is too long ({len(caption):,} characters)"
    if not caption.isprintable() and BROKEN.search(caption):
        return "has bytes that are no UTF-8 text, or NULs (save the file as UTF-8)"


def is_row(line, delimiter, image_at):
    """True if a line looks like a row by itself: it has a picture's name in its place."""
    cells = line.split(delimiter)
    return 1 < len(cells) > image_at and cells[image_at].strip(' "').lower().endswith(PICTURES)


def read_quoted(line, f, ahead, delimiter, image_at):
    """(cells, number of lines) of a row with quotes, of at most 20 lines. What was read too far is
    in ahead. Raises csv.Error."""
    lines = [line]
    while True:
        try:
            cells = next(csv.reader(lines, delimiter=delimiter, strict=True))
            for _ in lines[1:]:
                ahead.popleft()
            return cells, len(lines)
        except csv.Error as e:
            if "end of data" not in str(e):
                raise
        if len(lines) > len(ahead):
            ahead.append(f.readline())
        lines.append(ahead[len(lines) - 1])
        if not lines[-1] or len(lines) > 20 or is_row(lines[-1], delimiter, image_at):
            raise csv.Error("a quote is opened and not closed")


def read_table(path):
    """Rows of a text file whose first line names the columns, between commas, semicolons or tabs.
    A quote that is not closed spoils its own line alone: the lines below are rows again."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        first, ahead, line_number = f.readline(), collections.deque(), 1
        delimiter = max(",;\t", key=first.count)
        try:
            names = tuple(c.strip().lower() for c in next(csv.reader([first], delimiter=delimiter)))
            columns = find_columns(names)
        except (UserError, csv.Error) as e:
            raise UserError(f"{path} line 1 must name the columns, as in image,caption, in UTF-8 "
                            f"({shown(e)})") from None
        image_at, width = names.index(columns[0]), len(names)
        while line := ahead.popleft() if ahead else f.readline():
            line_number, lines, where = line_number + 1, 1, line_number + 1
            cells = line.rstrip("\r\n").split(delimiter)
            try:
                if '"' in line:
                    cells, lines = read_quoted(line, f, ahead, delimiter, image_at)
                if len(cells) > width and any(map(str.strip, cells[width:])):
                    raise csv.Error(f"{len(cells)} cells in {width} columns: put quotes around a "
                                    "caption that has commas")
                if len(cells) > 1 or line.strip():
                    yield as_row(where, dict(zip(names, cells)), columns)
            except csv.Error as e:
                what = cells[image_at].strip(' "') if image_at < len(cells) else ""
                yield BadRow(f"{path} line {where}", what, f"a broken row ({e})")
            line_number += lines - 1


def read_jsonl(path):
    """Rows of a text file with a JSON object in each line; "caption" may be a list."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                if line.strip():
                    cells = json.loads(line)
                    yield as_row(number, cells, find_columns(tuple(cells)))
            except (UserError, ValueError, TypeError, AttributeError, RecursionError) as e:
                yield BadRow(f"{path} line {number}", "", f"no JSON object of a pair ({e})")


def read_json(path, split):
    """Rows of COCO's captions, or of one split of Karpathy's JSON (or several: train+restval)."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as f:
            whole = json.load(f)
        images, notes = list(whole["images"]), list(whole.get("annotations", []))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is neither COCO's captions nor Karpathy's JSON "
                        f"({type(e).__name__}: {shown(e)})") from None
    if "annotations" in whole:
        return read_coco(path, images, notes)
    there = {str(im["split"]) for im in images if isinstance(im, dict) and "split" in im}
    if not split or not there.issuperset(split.split("+")):
        raise UserError(f"{path} has the splits {shown(', '.join(sorted(there))) or 'of no name'}: "
                        "name one behind a colon, as in dataset_flickr8k.json:train")
    return read_karpathy(path, images, set(split.split("+")))


def read_coco(path, images, notes):
    captions = collections.defaultdict(list)
    for n, note in enumerate(notes):
        try:
            captions[str(note["image_id"])].append(note["caption"])
        except (KeyError, TypeError) as e:
            yield BadRow(f"{path} annotations[{n}]", "", f"no JSON object of a caption ({e})")
    for n, im in enumerate(images):
        where = f"{path} images[{n}]"
        try:
            yield Row(where, im["file_name"], captions.pop(str(im["id"]), []))
        except (KeyError, TypeError) as e:
            yield BadRow(where, "", f"no JSON object of a picture ({e})")
    for key in captions:
        yield BadRow(path, key, f"captions of an image_id that no image has ({key})")


def read_karpathy(path, images, splits):
    for n, im in enumerate(images):
        where = f"{path} images[{n}]"
        try:
            if im["split"] in splits:
                name = os.path.join(im.get("filepath", ""), im["filename"])
                yield Row(where, name, [sentence["raw"] for sentence in im["sentences"]])
        except (KeyError, TypeError, AttributeError) as e:
            yield BadRow(where, "", f"no JSON object of a picture ({e})")


def split_lines(content):
    """The captions of a .txt, bytes: one in each line."""
    text = content.decode("utf-8-sig", "surrogateescape")
    return [line for line in text.splitlines() if line.strip()]


def read_folder(folder, files, classes, prompts):
    """Rows of a folder: with a .txt beside each picture, or of class folders, whose names go into
    the list classes and whose captions are prompts(name)."""
    pictures = [f for f in files if f.lower().endswith(PICTURES)]
    texts = {os.path.splitext(f)[0]: f for f in files if f.lower().endswith(".txt")}
    if any(os.path.splitext(p)[0] in texts for p in pictures):
        for p in pictures:
            try:
                captions, text = [], texts.pop(os.path.splitext(p)[0], None)
                if text:
                    with open(os.path.join(folder, text), "rb") as f:
                        captions = split_lines(f.read())
                yield Row(os.path.join(folder, p), p, captions)
            except OSError as e:
                yield BadRow(os.path.join(folder, text), p, f"can't read the text ({e})")
        for text in texts.values():
            yield BadRow(os.path.join(folder, text), text, "there is no picture beside this text")
        return
    if not pictures:
        raise UserError(f"{folder} has no pictures: a folder has class folders of pictures, or "
                        "pictures with a .txt each, or .tar files")
    labels = [os.path.dirname(p).split(os.sep)[0].replace("_", " ") for p in pictures]
    classes += sorted(set(labels) - {""})
    captions = {label: prompts(label) for label in classes} | {"": []}
    for p, label in zip(pictures, labels):
        yield Row(os.path.join(folder, p), p, captions[label])


def list_files(folder):
    """All files below a folder, hidden ones left out, in the order of the alphabet."""
    found, top = [], os.path.join(folder, "")
    for where, folders, names in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith(".")]
        found += [os.path.join(where, n).removeprefix(top) for n in names if n[0] != "."]
    return sorted(found)


def expand(pattern):
    """Paths of a pattern with braces ("{000..012}.tar", "{a,b}") and globs, in order."""
    braces = regex.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        return sorted(glob.glob(pattern)) or [pattern]
    first, dots, last = braces[1].partition("..")
    parts = braces[1].split(",")
    if dots and first.isdecimal() and last.isdecimal() and int(last) - int(first) < 10 ** 6:
        parts = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return [path for part in parts
            for path in expand(pattern[:braces.start()] + part + pattern[braces.end():])]


def index_shard(path):
    """-> {stem: {extension: (offset, size)}} of a tar file, and what is wrong with it, or ""."""
    samples, fault = {}, ""
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as f:
            whole = os.path.getsize(path)
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                if member.isfile() and not os.path.basename(stem).startswith("."):
                    files = samples.setdefault(stem, {})
                    if member.offset_data + member.size > whole or extension.lower() in files:
                        extension += " (cut off or twice)"
                    files[extension.lower()] = member.offset_data, member.size
                tar.members = []  # it keeps them all otherwise
            f.seek(tar.offset)
            if f.read(512) != bytes(512):
                fault = "its end is missing or damaged"
    except (OSError, tarfile.TarError, ValueError, OverflowError) as e:
        fault = str(e)
    return samples, fault


def read_captions(f, files):
    """The captions of a sample in an open tar file: its .txt, or what its .json calls a caption."""
    def content(extension):
        f.seek(files[extension][0])
        return f.read(min(files[extension][1], 10 ** 6))
    if ".txt" in files:
        return split_lines(content(".txt"))
    try:
        cells = json.loads(content(".json"))
        return next(cells[c] for c in COLUMNS[1] if c in cells)
    except (KeyError, ValueError, TypeError, StopIteration, RecursionError):
        return []


def read_shard(path, shard):
    """Rows of one tar file of webdataset or img2dataset: .jpg, .png ... with a .txt or .json."""
    samples, fault = index_shard(path)
    for stem, files in samples.items():
        name, extension = f"{shard}/{stem}", next((e for e in PICTURES if e in files), None)
        if extension:
            with open(path, "rb") as f:
                captions = read_captions(f, files)
            yield Row(path, name + extension, captions, place=(path, *files[extension]))
        else:
            yield BadRow(path, name, f"{stem} has no whole picture ({', '.join(files)})")
        for extra in files:
            if extension and " " in extra:
                yield BadRow(path, name, f"{stem}{extra}")
    if fault:
        yield BadRow(path, shard, f"a tar file that is cut off, damaged or packed, of which "
                                  f"{len(samples)} samples can be read ({fault})")


def read_shards(paths):
    """Rows of several tar files. They are indexed here, and read at random: no pipes."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in paths])
    for path in paths:
        yield from read_shard(path, os.path.relpath(path, top))


def choose(path, classes, prompts):
    """(rows, folder of the pictures) by the kind of the path: a folder of tar files, of pictures
    with a .txt each or of class folders (see read_folder); .tar files; COCO's .json or Karpathy's
    .json:split; .jsonl; or else delimited text. UserError if there is nothing."""
    if os.path.isdir(path):
        files = list_files(path)
        shards = [os.path.join(path, f) for f in files if f.lower().endswith(".tar")]
        if shards and not any(f.lower().endswith(PICTURES) for f in files):
            return read_shards(shards), path
        return read_folder(path, files, classes, prompts), path
    folder = os.path.dirname(path)
    plain, colon, split = path.rpartition(".json:")
    if path.lower().endswith(".tar"):
        return read_shards(expand(path)), folder
    if colon:
        return read_json(plain + ".json", split), os.path.dirname(plain)
    if path.lower().endswith(".json"):
        return read_json(path, ""), folder
    if path.lower().endswith((".jsonl", ".ndjson")):
        return read_jsonl(path), folder
    if os.path.isfile(path):
        return read_table(path), folder
    raise UserError(f"--data {path}: there is no such file; give a table (.csv, .tsv) that names "
                    "image,caption, .jsonl, COCO's or Karpathy's .json, a folder, .tar files, or "
                    "`scenes`")


# ----------------------------------------------------------------------------------------- pictures
@contextlib.contextmanager
def start_image(source):
    """Open a picture, a path or bytes, of which only the size is read so far."""
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif os.path.isfile(source):  # a pipe would wait for ever
        file = open(source, "rb")
    else:
        raise FileNotFoundError("there is no such file")
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pictures are refused or shown, but not commented on
        head = file.read(4)
        file.seek(0)
        if head.startswith(b"\xff\xd8\xff"):
            yield JpegImagePlugin.JpegImageFile(file)  # no limit yet: see open_image
        elif head in (b"%!PS", b"\xc5\xd0\xd3\xc6"):
            raise ValueError("a PostScript file is no picture")  # Pillow would run Ghostscript
        else:
            yield Image.open(file)


def open_image(source, size=None, name=None):
    """A picture, from a path or bytes, in RGB as a person sees it: turned as its EXIF says, on
    white where it is transparent, of an animation the first frame. Sides may be scaled down, but no
    further than to size (512). Whatever is wrong with the file becomes a UserError."""
    side, limit = size or 512, Image.MAX_IMAGE_PIXELS
    try:
        with start_image(source) as im:
            im.draft("RGB", (side, side))  # JPEGs are decoded no larger than needed
            if limit and not 0 < im.width * im.height <= limit:
                raise Image.DecompressionBombError
            im.load()
            try:
                im = ImageOps.exif_transpose(im)
            except Exception:  # damaged EXIF: as the picture lies
                pass
            return as_rgb(im)
    except Image.DecompressionBombError:
        why = f"it has no pixels or more than {limit:,}"
    except UnidentifiedImageError:
        why = "cannot identify the file as a picture"
    except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
        why = f"{type(e).__name__}: {shown(e)}".replace(str(source)[:999], "the file")
    what = name or (source if isinstance(source, (str, os.PathLike)) else "the bytes")
    raise UserError(f"can't read {what} as a picture ({why}); replace it or take it out")


def as_rgb(im):
    """Any mode of Pillow's -> RGB. Numbers of more than 8 bits become 0..255 by their range: from 0
    (or the least, if negative) to the first of 1, 255, and for whole numbers 4095, 65535, that none
    exceeds, or else to the largest."""
    if im.mode == "F" or im.mode.startswith("I"):
        x = np.asarray(im).astype(np.float64)
        x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
        low, high = min(0.0, x.min()), x.max()
        tops = (1, 255) if im.mode == "F" else (1, 255, 4095, 65535)
        high = next((top for top in tops if high <= top), high)
        return Image.fromarray(((x - low) / (high - low) * 255).astype(np.uint8)).convert("RGB")
    if im.has_transparency_data:
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
    return im.convert("RGB")
