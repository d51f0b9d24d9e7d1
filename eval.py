"""Evaluation: retrieval, classification, segmentation, word-patch alignment; what a step costs.

    python eval.py runs/sparc                     # 1,000 test scenes: a table and metrics.json
    python eval.py runs/sparc runs/clip --data photos/test.csv    # real pictures, side by side
    python eval.py ViT-B-32.pt --data pets/ --prompts OxfordPets  # OpenAI's weights, class folders
    python eval.py runs/sparc --data VOCdevkit/VOC2012            # masks in Pascal VOC's layout
    python eval.py cost                           # a step at full size, beside SPARC's Table 12

Covers: FILIP 3.1.2 (similarities averaged over prompts), 4.2, 4.3, Tables 11, 12; PyramidCLIP's
linear probe, Tables 4, 11; SPARC 4.2 to 4.4, 4.5's segmentation (D.7), Tables 7, 12, D.5's eq. 9.

Percentages, except local losses (nats) and the cost: steps, milliseconds a step (with validation),
the most memory in MB. "n": the number of values of each mean; "interval": the middle 95% of its
bootstrap over test pictures. A tie counts against the model.
- retrieval. R@k: a true partner is among the k best. Equal texts are one, of all their pictures.
- classification. Top-1 of 8 shapes and 8 colours on scenes of one object, by two prompts; _one: by
  one; _it: by four that say "it". Of class folders: class_accuracy; _one_prompt: by the first.
- probe. Top-1 of linear_probe, fitted on 2 n training scenes; on 4/5 of the pictures of folders.
- segmentation. Each patch takes the closest text. miou: mean over objects. miou_objects: without a
  text for the background. patch_acc: patches on objects. Of masks: an object is a class in one
  picture; _summed: a class in all pictures, VOC's usual way.
- alignment. colour_word_acc, shape_word_acc: a word's best patch lies on the object that it names,
  which covers a quarter of it or more (chance: a random patch). patch_word_acc: the best word of a
  patch on an object names it. drop_k2 to drop_k4: weight_drops. local_gap: the local loss (SPARC's,
  MGCA's CTA) of shuffled pictures minus the right ones'; near 0 it ignores the picture.
- faithfulness. k_precision of all words (k_p), of nouns and adjectives (k_pna; on files by a rule).
- composition. swap_acc: the caption scores above that with two colours exchanged. unseen_: scenes
  with a colour and shape never trained together. count_acc: the text of the right number, 1 to 4.

Differs from the papers: scenes' prompts and classes are phrases of their captions. SPARC names no
background: its text ("on sand", of masks "background") is ours; miou_objects is the paper's (4.5,
D.7). CLIP+FILIP goes by its global embeddings, as in SPARC's Table 9.
"""
import argparse, collections, contextlib, csv, functools, hashlib, io, itertools, json, math
import os, pathlib, re, statistics, sys
import numpy as np
import regex
import torch
import torch.nn.functional as F
from tqdm import tqdm
from data import COLOURS, SHAPES, BadRow, Scenes, Tokenizer, center_crop, filip_prompts, join
from data import normalize, open_dataset, open_image, read_bytes, split_lines, start_image
from data import to_tensor, word_tokens
from losses import DTYPES, OBJECTIVES, gloria_attention, late_blocks, sparc_alignment, unit
from model import CLIP, DEVICES, UserError, clean, openai_model, pick_device, read_weights, write


def sparc_prompts(label, prefixes, suffixes=("",)):
    """Every combination, such as "a photo of a pug, I like it", or "a photo of a pug"."""
    return [f"{prefix} {label}, {suffix}".removesuffix(", ").strip()  # SPARC eq. 9
            for prefix in prefixes for suffix in suffixes]


# ------------------------------------------------------------------------------------ bad rows
def count_faults(rows):
    """Rows (where, what, reason) -> [(kind of fault, how many)], the most frequent first."""
    kinds = [reason.replace(what, "PICTURE") if what else reason for _, what, reason in rows]
    return collections.Counter(kind.split(" (")[0] for kind in kinds).most_common()


def list_faults(path, rows, columns=("where", "what", "reason")):
    """Write rows into a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write(path, lambda file: file.write(text.getvalue().encode("utf-8", "surrogateescape")))


def inspect(pairs, i):
    """What `check` reads of picture i: (width, height, hash of the file), or a BadRow."""
    try:
        pairs.open(i, 64)
        content = pairs.read(i)
        return *start_image(content).size, hashlib.sha256(content).hexdigest()
    except BadRow as e:
        return e


def check(path, images, out):
    """`python data.py check`: read all of a path, print what is there, list bad rows in `out`."""
    pairs = open_dataset(path, images=images)
    reading = torch.utils.data.DataLoader(range(len(pairs)), None, num_workers=os.cpu_count(),
                                          collate_fn=functools.partial(inspect, pairs))
    found = list(tqdm(reading, unit=" pictures", disable=None))
    good = [x for x in found if not isinstance(x, BadRow)]
    texts = flat(own for x, own in zip(found, pairs.captions) if not isinstance(x, BadRow))
    bad = [x.args for x in pairs.bad + found if isinstance(x, BadRow)]
    list_faults(out, bad)
    print(f"{len(good):,} pictures with {len(texts):,} captions can be used; {len(bad):,} faults, "
          f"listed in {out}")
    for kind, n in count_faults(bad):
        print(f"  {n:8,}  {kind}")
    if good:
        widths, heights, hashes = zip(*good)
        for name, n in ("width", widths), ("height", heights), ("characters", [*map(len, texts)]):
            print(f"{name:13} {min(n)} to {max(n)}, middle {statistics.median_high(n)}")
        for name, items in ("pictures", hashes), ("captions", texts):
            repeated = len(items) - len(set(items))
            print(f"{name:13} {repeated:,} of {len(items):,} repeat an earlier one")


WORD = regex.compile(r"(?<!\S)\p{P}*[\p{L}\p{M}][\p{L}\p{M}'’-]+\p{P}*(?!\S)")  # no img_0.jpg
# frequent in German, French, Spanish, Italian, Portuguese or Dutch, and rare in English
FOREIGN = set(
    "das der dem ein eine einem einen einer mit auf im ins ist sind und für vor zum le la les "
    "un une des et du de dans sur avec est au el los las una con por para del al dos il gli della "
    "sulla che nel di uma um com em na da dois het een en op twee".split())


def break_rules(text, times, sides, min_side):
    """FILIP's rules of cleaning (3.3) -> {rule: does a caption, there so often, break it?}. Not in
    English: most letters are not a to z, or two words and a third of all are FOREIGN."""
    letters, words = regex.findall(r"\p{L}", text), regex.findall(r"\w+", text.lower())
    foreign = sum(word in FOREIGN for word in words)
    return {"of pictures that can't be read (see data.py check)": not max(sides),
            f"of pictures with a side under {min_side} pixels": min(sides) < min_side,
            "of pictures longer than 3 to 1": max(sides) > 3 * min(sides),
            "without words": not WORD.search(text),
            "not in English": 2 * sum(map(str.isascii, letters)) < len(letters)
            or foreign >= max(2, len(words) / 3),
            "that are there more than ten times": times > 10,
            "that are kept": True}


def clean_table(path, out, images, min_side):
    """`python data.py clean`: captions that break no rule go into a new table, all are counted."""
    taken = os.path.lexists(out) or os.path.lexists(out + ".tmp")
    if taken or not out.endswith(".csv") or not os.path.isdir(os.path.dirname(out) or "."):
        raise UserError(f"{out}: name a new .csv file, in a folder that is there")
    pairs, found = open_dataset(path, images=images), collections.defaultdict(list)
    if pairs.rows[0].place or pairs.classes:
        raise UserError(f"{path}: only pictures that lie in files, with captions, can be cleaned")
    times = collections.Counter(text.lower() for text in flat(pairs.captions))
    for i in tqdm(range(len(pairs)), unit=" pictures", disable=None):
        sides, picture = (0, 0), os.path.join(pairs.folder, pairs.images[i])
        with contextlib.suppress(Exception):  # Pillow's readers raise nearly anything
            sides = start_image(pairs.read(i)).size  # by its header
        name = os.path.relpath(picture, os.path.dirname(out) or ".")
        for text in pairs.captions[i]:
            rules = break_rules(text, times[text.lower()], sides, min_side)
            found[next(filter(rules.get, rules))].append((name, " ".join(text.split())))
    kept = found["that are kept"]
    list_faults(out, kept, ("image", "caption"))
    print(f"{len(pairs.bad):10,}  faults of rows (see data.py check)")
    for rule in rules:
        print(f"{len(found[rule]):10,}  captions {rule}")
    print(f"{len(dict(kept)):10,}  pictures that are kept, in {out} (columns: image, caption)")


# ------------------------------------------------------------------- class folders and prompts
# FILIP's Table 11, by Table 1's names: prefixes / descriptions / suffixes; "a (many)" is both
TABLE_11 = """
CIFAR10: a photo of a|a jpeg photo of a|a painting of a|itap of a|graffiti of a|a cartoon|a doodle//
|It's common in daily life|It's cute|It's ugly|It's weird|Hope you like it
CIFAR100: a jpeg photo of a|a painting of a|a good photo of a|a bad photo of a|a photo of a|
itap of a|a rendering of a//|It's common in daily life|It's beautiful|It's ugly|I like it|
I take it today
Caltech101: a photo of a|a cropped photo of a|a good photo of a|a bad photo of a//|I like it|
I hate it|It's ugly|It's cute
StanfordCars: a photo of a|a close-up photo of a|a good photo of a|a bad photo of a/a type of car|
a type of automobile/I like it|It belongs to my friend|It's brand new|It's popular recently|
It's important to me|I take it today
Flowers102: a photo of a|a photo of many|a rendering of a|a rendering of many|itap of a|
itap of many/a type of flower|a type of bloom/It's beautiful|It's from my best friend|
It gives out a sweet perfume|It gives out a sweet fragrance
ImageNet: a photo of a|a good photo of a|a bad photo of a|a close-up photo of a|itap of a//
I like it|It's common in daily life|It's not common in daily life|It's ugly|It's cute|It's beautiful
Food101: a photo of my|a close-up photo of my|itap of my/a type of food|a type of nourishment/
I made it today|I like it|I hate it|It's delicious|It's with nice flavour|
It's with terrible flavour|It's popular recently
SUN397: a photo of a|a good photo of a|a bad photo of a|a bright photo of a|a dark photo of a|
a black and white photo of a|a nice scene of a|a terrible scene of a//|I like it|I hate it|
It's beautiful|It's common in daily life|It's important to me
DTD: itap of a|a close-up photo of a/texture|surface|material/|It's out of style|
It's popular in old days|It's ugly|It's beautiful
Aircrafts: a photo of the|a close-up photo of the|a good photo of the|a pixelated photo of the/
a type of plane|a type of aircraft|a type of airliner/|I like it|It's important to me|
I take it today|Hope you like it
OxfordPets: a photo of my|a low resolution photo of my|a good photo of my/a type of pet|
a type of dog or cat/|It's cute|It's important to me|I like it|It's beautiful
EuroSAT: a photo of a|a painting of a|a cropped photo of a|a good photo of a|a blurry photo of a/|
an example of aerial or satellite images/|I like it|
It's taken from an aircraft or some flying object|It's collected by imaging satellites
""".replace("|\n", "|").replace("/\n", "/").split("\n")[1:-1]
TABLE_11 = dict(line.split(": ") for line in TABLE_11)


def read_prompts(given, classes):
    """--prompts: a template with {}, a file of them or a name of TABLE_11 -> [templates]. classes:
    {} is a class's name; or else a caption, of one template. UserError."""
    given = given or ("a photo of a {}." if classes else "{}")
    if given in TABLE_11:
        templates = filip_prompts("{}", *(part.split("|") for part in TABLE_11[given].split("/")))
    else:
        templates = split_lines(read_bytes(given)) if os.path.isfile(given) else [given]
    several = len(templates) > 1 and not classes
    if several or not templates or any("{}" not in template for template in templates):
        raise UserError(f"--prompts {given}: give a template with {{}} for a caption or a class's "
                        f"name; for class folders also a file with such a template in each line, "
                        f"or one of {', '.join(TABLE_11)}")
    return templates


def encode_prompts(model, tok, names, prompts):
    """For each class's name t (n,D), T (n,L,D), M (n,L) of n prompts, templates with {}."""
    texts = ([prompt.replace("{}", name) for prompt in prompts] for name in names)
    return (encode_texts(model, tok, of_class) for of_class in texts)


def class_names(data):
    """The classes' names: their folders, or by lines `folder,name` of classes.txt. Or UserError."""
    names, path = {name: name for name in data.classes}, os.path.join(data.folder, "classes.txt")
    if os.path.isfile(path):
        lines = [line.partition(",") for line in split_lines(read_bytes(path))]
        names = {folder.strip().replace("_", " "): name.strip() for folder, _, name in lines}
    lacks = [folder for folder in data.classes if not names.get(folder)]
    if lacks:
        raise UserError(f"{path} gives no name to {len(lacks)} folders, the first is {lacks[0]}: "
                        f"each needs a line `folder,name`")
    return [names[folder] for folder in data.classes]


def folder_classes(objective, model, tok, data, pictures, v, V, prompts):
    """Pictures of class folders, by number -> classification {name: (per cent, how many)} by all
    prompts and by the first; probe {"class": [[hit], ...]}, fitted on four fifths of them."""
    names, zero_shot, probe = class_names(data), {}, {}
    kinds = list(dict.fromkeys(names))  # folders of one name are one class
    label = torch.tensor([kinds.index(names[data.label(i)]) for i in pictures])
    ways = ("", prompts), ("_one_prompt", prompts[:1])
    for way, some in ways[:len(prompts)]:  # one prompt, one way
        scores = classify(objective, v, V, encode_prompts(model, tok, kinds, some)).cpu()
        for name, x in class_accuracy(scores, label).items():
            zero_shot[name + way] = x, len(v)
    if len(label) > 2 and label.unique(return_counts=True)[1].min() > 1:
        test = label.argsort(stable=True).argsort() % 5 == 0  # every fifth, in the classes' order
        probe["class"] = linear_probe(objective, v, V, label, test)
    else:
        print("note: there is no linear probe, because a class has too few pictures")
    return {"classification": dict(sorted(zero_shot.items())), "probe": probe}


# -------------------------------------------------------------------------- runs and features
def place(run, name):
    """Where a result goes: into a run folder, or beside a file of weights, named after it."""
    if os.path.isfile(run):
        return f"{os.path.splitext(run)[0]}-{name}"
    return os.path.join(run, name)


def read_checkpoint(path):
    """A run folder, last.pt or OpenAI CLIP's weights -> a checkpoint of train.py. Or UserError."""
    file = path if os.path.isfile(path) else os.path.join(path, "last.pt")
    if not os.path.isfile(file):
        raise UserError(f"no checkpoint {file}, no file of weights {path}: see train.py --out")
    try:
        ckpt = read_weights(file)
        if "visual.conv1.weight" in ckpt:
            model, name = openai_model(ckpt), os.path.basename(file)
            ckpt = {"config": model.config, "model": model.state_dict(), "head": {}, "step": 0,
                    "merges": None,  # the published vocabulary
                    "args": dict(loss="clip", model=name, data="others", val=None, seed=0)}
        missing = {"config", "model", "head", "merges", "args", "step"} - set(ckpt)
        if missing:
            raise ValueError(f"no visual.conv1.weight, and it lacks {', '.join(sorted(missing))}")
        return ckpt
    except Exception as e:  # torch raises many kinds on a damaged file
        raise UserError(f"{file} can't be read as a checkpoint or as OpenAI CLIP's weights "
                        f"({e!r:.100}); train again or take a copy") from None


def load_run(folder, device="cpu"):
    """A run -> model in eval mode, tokeniser, args: its options, step, cost, head. Or UserError."""
    ckpt = read_checkpoint(folder)
    config, step, merges = ckpt["config"], ckpt["step"], ckpt["merges"]
    try:
        model, head = CLIP(**config), OBJECTIVES[ckpt["args"]["loss"]].head(config["embed_dim"])
        model.load_state_dict(ckpt["model"])
        head.load_state_dict(ckpt["head"])
    except (TypeError, KeyError, RuntimeError) as e:
        raise UserError(f"{folder} is of another model.py ({e!r:.100}): train again") from None
    tok = Tokenizer.clip(weights=folder) if merges is None else Tokenizer(merges)
    if tok.vocab_size != config["vocab_size"]:
        raise UserError(f"{folder} has {config['vocab_size']:,} tokens, CLIP's published vocabulary"
                        f" has {tok.vocab_size:,}: of an exported run, take the run folder")
    cost = {"steps": step, "ms_per_step": 1000 * ckpt.get("seconds", 0) / max(1, step),
            "peak_mb": ckpt.get("peak_mb") or 0}
    args = argparse.Namespace(**ckpt["args"], step=step, cost=cost, head=head.to(device).eval())
    return model.to(device).eval(), tok, args


def run_names(runs):
    """Paths of runs -> their last parts, or the paths themselves where two of these are equal."""
    names = [os.path.basename(os.path.normpath(run)) for run in runs]
    return names if len(set(names)) == len(names) else runs


def own_data(folder, args):
    """The data that a run can be judged by, and its --images. Raises UserError if there is none."""
    data = args.data if args.data == "scenes" else args.val
    if not data:
        raise UserError(f"{folder} was trained on {args.data}: name the pictures, --data PATH")
    return data, getattr(args, "images", None)


def loss_options(args):
    """The keyword options of a run's loss, from an object with options of train.py's."""
    names = OBJECTIVES[args.loss].options
    options = {name: value for name, value in vars(args).items() if name in names}
    if "gather_dtype" in options:
        options["gather_dtype"] = DTYPES[args.gather_dtype]
    if options.get("sigma") == "1/P":
        options["sigma"] = None
    if "alpha" in options and getattr(args, "hard_targets", False):
        options["alpha"] = 0.0
    return options


@torch.no_grad()
def encode_images(model, images, **options):
    """List of RGB pictures -> v (B,D), V (B,P,D). options: encode_image's."""
    out, size = [], model.config["image_size"]
    for i in range(0, len(images), 250):
        x = to_tensor([center_crop(im, size) for im in images[i:i + 250]])
        out.append(model.encode_image(normalize(x.to(model.logit_scale.device)), **options))
    return tuple(map(torch.cat, zip(*out)))


@torch.no_grad()
def encode_texts(model, tok, texts):
    """List of texts -> t (C,D), T (C,L,D), M (C,L); L is the length of the longest."""
    ids, mask = tok(texts, model.context_length)
    L = int(mask.sum(1).max())
    ids, mask = (x[:, :L].to(model.logit_scale.device) for x in (ids, mask))
    out = [model.encode_text(i, m) for i, m in zip(ids.split(500), mask.split(500))]
    return *map(torch.cat, zip(*out)), mask


# -------------------------------------- metrics: functions of tensors, each usable by itself
@torch.no_grad()
def similarities(objective, v, V, t, T, M, elements=1 << 20):
    """All pictures with all texts -> (ranking texts, ranking pictures), both (B,C). v (B,D),
    V (B,P,D), t (C,D), T (C,L,D), M (C,L). elements: FILIP's products at a time, for a cache."""
    if not objective.late:
        return objective.score(v, V, t, T, M)
    V, T, share = unit(V), unit(T), M.T / M.sum(1)  # (L, C): of a word in its text's mean
    out = share.new_empty(2, len(V), len(T))
    for texts, _, L, words, pictures in late_blocks(V, T, M, elements):
        for b in pictures:
            s = (V[b].flatten(0, 1) @ words.T).view(-1, V.shape[1], L, len(texts))  # (b, P, L, c)
            out[0, b, texts] = s.amax(2).to(out.dtype).mean(1)
            out[1, b, texts] = (s.amax(1) * share[:L, texts]).sum(1)
    return tuple(out)


def retrieval_hits(s_i2t, s_t2i, owner, number=None):
    """Is a true partner among the k best? -> {"i2t_r1": [[hit] of each picture], "t2i_r1": [its
    texts' hits], ...}. Ties and NaN fail. Inputs: see retrieval; texts in their pictures' order."""
    number = torch.arange(len(owner)) if number is None else number.cpu()
    first = np.unique(number, return_index=True)[1]  # of each text the first place
    has = torch.zeros_like(s_i2t, dtype=torch.bool)  # (B, C): picture, number of a text
    has[owner, number] = True
    own = has[:, number]  # (B, C)
    best_text = s_i2t.masked_fill(~own, -torch.inf).amax(1, keepdim=True)  # (B, 1)
    best_picture = s_t2i.masked_fill(~own, -torch.inf).amax(0)  # (C,)
    i2t = (~(s_i2t < best_text) & ~own)[:, first].sum(1)  # (B,) strangers that score no lower
    t2i = (~(s_t2i < best_picture) & ~own).sum(0)  # (C,)
    ways = ("i2t", i2t, 1), ("t2i", t2i, owner.bincount().tolist())
    return {f"{way}_r{k}": [hits.tolist() for hits in (rank < k).split(sizes)]
            for way, rank, sizes in ways for k in (1, 5, 10)}


def retrieval(s_i2t, s_t2i, owner, number=None):
    """R@1, R@5 and R@10 both ways, in per cent. FILIP 4.3, Table 2; SPARC 4.3, Tables 1 and 11.
    s_i2t, s_t2i (B,C) similarities; owner (C,) the picture of each text; number (C,) below C: equal
    texts have the same. They count as one, of all their pictures."""
    hits = retrieval_hits(s_i2t, s_t2i, owner, number)
    return {key: 100 * sum(map(sum, rows)) / sum(map(len, rows)) for key, rows in hits.items()}


def k_precision(s_i2t, words, own):
    """Of a picture's best text, the share of words that its own texts have -> [[share] of each
    picture]; ties: the mean. SPARC 4.4, Table 2. s_i2t (B,C); words: C lists; own: B lists."""
    rows = []
    for s, known in zip(s_i2t, own):
        best = (~(s < s.max())).nonzero()[:, 0].tolist()  # with a NaN all texts tie
        shares = [sum(w in known for w in words[c]) / len(words[c]) for c in best if words[c]]
        rows.append([statistics.fmean(shares)] if shares else [])
    return rows


def classify(objective, v, V, classes):
    """Similarity of pictures and classes -> (B,K). FILIP 3.1.2, Table 1; SPARC 4.2, Table 1.
    v (B,D), V (B,P,D); classes: for each class its n prompts, t (n,D), T (n,L,D), M (n,L).
    CLIP averages the prompts' unit vectors; FILIP and PACL, which train no v, similarities.
    To segment a picture V (P,D), each patch alone is one: v = V, V[:, None]. SPARC 4.5, Table 4."""
    scores = []
    for t, T, M in classes:
        if objective.trains_v:
            scores.append(unit(v) @ unit(unit(t).mean(0)))
        else:
            scores.append(similarities(objective, v, V, t, T, M)[0].mean(1))
    return torch.stack(scores, 1)


def class_accuracy(scores, label):
    """scores (B,K) of pictures and classes, label (B,) -> per cent: class (top-1), top5, per_class
    (the mean of the classes that have pictures). Ties count against the model."""
    own = scores.gather(1, label[:, None])
    rank = (~(scores < own)).sum(1) - 1  # (B,) strangers not below it, NaN too
    hit = (rank == 0).double()
    each = torch.stack([hit[label == kind].mean() for kind in label.unique()])
    found = {"class": hit, "per_class": each, "top5": (rank < 5).double()}
    return {name: 100 * x.sum().item() / len(x) for name, x in found.items()}


def object_pixels(label, masks, valid=True):
    """Pixels (3,N) of each object: found and its own, found or its own, its own. label (P,): class
    of patches, a square grid; masks (N,H,W) bool: object n is class n; valid (H,W) bool: count."""
    grid, (H, W) = math.isqrt(len(label)), masks.shape[1:]
    y, x = torch.arange(H) * grid // H, torch.arange(W) * grid // W  # the patch of each pixel
    found = label.view(grid, grid)[y][:, x] == torch.arange(len(masks))[:, None, None]  # (N, H, W)
    found &= valid
    return torch.stack([x.count_nonzero((1, 2)) for x in (found & masks, found | masks, masks)])


def object_ious(pixels):
    """Intersection over union of objects that are there, from pixels (3,N). The mean is miou."""
    both, either, _ = pixels[:, pixels[2] > 0]
    return both / either


def patch_coverage(masks, grid):
    """masks (N,H,W) bool -> (N,P): the share of each patch that each object covers."""
    side = masks.shape[-1] // grid
    return masks.float().view(-1, grid, side, grid, side).mean((2, 4)).flatten(1)


def patch_hits(label, cover):
    """Of patches that an object covers by a quarter, cover (N,P): is label (P,) right? -> bool."""
    share, thing = cover.max(0)
    return (label == thing)[share >= 0.25]


def word_hits(best_patch, thing, cover):
    """Does a word's best patch lie on the object it names? -> (W,) bool, and the chance (W,).
    best_patch (W,) of each of W words; thing (W,) the object that it names; cover (N,P)."""
    on = cover[thing] >= 0.25  # (W, P)
    return on[torch.arange(len(thing)), best_patch], on.float().mean(1)


def word_patch_products(objective, V, T):
    """Words and patches of the same pairs -> (B,L,P): cosines for late interaction, else SPARC's
    products. The largest of a row is the word's best patch. V (B,P,D), T (B,L,D)."""
    if objective.late:
        V, T = unit(V), unit(T)
    return torch.einsum("bld,bpd->blp", T, V)


def best_words(V, T, M):
    """Position of each patch's best word by cosine -> (B,P). FILIP 4.5, m_k of its eq. 4.
    V (B,P,D), T (B,L,D) and M (B,L) of the same pairs."""
    cosine = torch.einsum("bld,bpd->blp", unit(T), unit(V))
    return cosine.masked_fill(~M[..., None], -torch.inf).argmax(1)


def attention(args, V, T, M):
    """Weights of each word on its own picture's patches (B,L,P), as the loss of a sparc or gloria
    run computes them. V (B,P,D), T (B,L,D), M (B,L)."""
    if args.loss == "sparc":
        own = {k: x for k, x in loss_options(args).items() if k in ("sigma", "softmax")}
        return sparc_alignment(V, T, **own)
    return gloria_attention(torch.einsum("bld,bpd->blp", T, V) / V.shape[-1] ** 0.5, M)


def weight_drops(a, M):
    """(h_1 - h_k) / h_1, k = 2, 3, 4 -> (N,3), of the N real tokens; h_k is a token's k-th highest
    weight. SPARC 4.7, Table 7. a (B,L,P) weights on 4 patches or more, M (B,L)."""
    h = a[M].topk(4).values  # (N, 4)
    return 1 - h[:, 1:] / h[:, :1]


@torch.no_grad()
def local_gap(objective, head, options, scale, v, V, t, T, M):
    """Mean local loss of the right pairs, of pairs with shuffled pictures, the difference, in nats.
    v (B,D), V (B,P,D), t (B,D), T (B,L,D), M (B,L)."""
    f = {"v": v, "t": t, "T": T, "M": M, "scale": scale}
    options = {k: x for k, x in options.items() if k != "strangers"}  # the pair's own words alone
    matched, shuffled = (objective.loss(f | {"V": patches}, head, **options)[objective.local].item()
                         for patches in (V, V.roll(1, 0)))  # roll: of another picture
    return {"local": matched, "local_shuffled": shuffled, "local_gap": shuffled - matched}


def fit_logistic(x, y, C):
    """x (N,D), y (N,) -> W (D,K) of the least C * sum of cross-entropies + |W|^2 / 2, by L-BFGS."""
    W = x.new_zeros(x.shape[1], int(y.max()) + 1).requires_grad_()
    fit = torch.optim.LBFGS([W], max_iter=1000, tolerance_grad=1e-5, line_search_fn="strong_wolfe")
    def loss():
        fit.zero_grad()
        out = F.cross_entropy(x @ W, y) + W.square().sum() / (2 * C * len(x))
        out.backward()
        return out
    fit.step(loss)
    return W.detach()


def linear_probe(objective, v, V, y, test):
    """Logistic regression of classes y (N,) on frozen features v (N,D), V (N,P,D) -> [[hit], ...]
    where test (N,) bool. A fifth of the rest chooses the strength C. PyramidCLIP Tables 4, 11."""
    x = objective.picture(v, V).cpu().double()
    x = F.pad(unit(x), (0, 1), value=1.0)  # with a 1 for the biases
    known = (~test).nonzero()[:, 0]
    val, fit = known[::5], known[torch.arange(len(known)) % 5 > 0]
    right = {C: ((x[val] @ fit_logistic(x[fit], y[fit], C)).argmax(1) == y[val]).sum()
             for C in (0.1, 1, 10, 100, 1000, 10000)}
    W = fit_logistic(x[known], y[known], max(right, key=right.get))
    return ((x[test] @ W).argmax(1) == y[test])[:, None].tolist()


def interval(rows):
    """The middle 95% of the mean's bootstrap over test items, in per cent -> [low, high].
    rows: the values of each item, [[value, ...], ...], which are drawn together."""
    sums = torch.tensor([[sum(row), len(row)] for row in rows], dtype=torch.float64)  # (N, 2)
    g, n = torch.Generator().manual_seed(0), len(rows)
    drawn = [sums[torch.randint(n, (n,), generator=g)].sum(0) for _ in range(1000)]
    total, count = torch.stack(drawn).T
    return (100 * total / count).nanquantile(total.new_tensor([0.025, 0.975])).tolist()


# ----------------------------------------------------------------------- the metrics on scenes
def flat(rows):
    return [x for row in rows for x in row]


def report(measured):
    """{group: {key: rows, see interval, or (number, n)}} -> {group: {key: number}}, n, interval."""
    out, n, intervals = collections.defaultdict(dict), {}, {}
    for group, found in measured.items():
        for key, rows in found.items():
            name = f"{group} {key}"
            if isinstance(rows, list) and (values := flat(rows)):
                intervals[name] = interval(rows)
                rows = 100 * sum(values) / len(values), len(values)
            if isinstance(rows, tuple):
                out[group][key], n[name] = rows
    return out | {"n": n, "interval": intervals}


def scene_classes(objective, model, tok, n):
    """Shape and colour of n scenes of one object -> rows of zero-shot classification by one, two,
    four prompts; rows of a linear probe that is fitted on 2 n training scenes."""
    images, things, zero_shot, probe = [], [], {}, {}
    for count, split in ((n, "test"), (2 * n, "train")):
        scenes = Scenes(count, 0, model.config["image_size"], split, (1, 1), unique=False, family=1)
        specs = [scenes.spec(i) for i in range(count)]
        images += [scenes.draw(spec) for spec in specs]
        things += [spec["things"][0] for spec in specs]
    v, V = encode_images(model, images)
    small, likes = ["a small"], ["I like it", "I hate it"]  # beside "a"
    ways = {"_one": ([], [""]), "": (small, [""]), "_it": (small, likes)}  # prefixes, suffixes
    for kind, names, noun in (("shape", SHAPES, ""), ("colour", list(COLOURS), " thing")):
        label = torch.tensor([names.index(getattr(thing, kind)) for thing in things])
        an = {x: "an" if x[0] in "aeiou" else "a" for x in names}
        for way, (prefixes, suffixes) in ways.items():
            texts = [sparc_prompts(x + noun, [an[x], *prefixes], suffixes) for x in names]
            classes = [encode_texts(model, tok, some) for some in texts]
            best = classify(objective, v[:n], V[:n], classes).argmax(1).cpu()
            zero_shot[kind + way] = (best == label[:n])[:, None].tolist()
        probe[kind] = linear_probe(objective, v, V, label, torch.arange(3 * n) < n)
    return zero_shot, probe


def segmentation_patches(objective, model, images):
    """Pictures -> V (B,P,D), through h_v (SPARC D.7) where v or the patches have trained it."""
    through_h = objective.trains_v or model.patches_through_h
    return encode_images(model, images, patches_through_h=through_h)[1]


def scene_patches(objective, model, tok, scenes):
    """-> for each scene scores (P,N+1) of N objects' and the background's texts, masks (N,H,W)."""
    V = segmentation_patches(objective, model, [s["image"] for s in scenes])
    texts = [[*(join(Scenes.phrase(thing, 0)) for thing in s["things"]), f"on {s['background']}"]
             for s in scenes]
    classes = zip(*(x.split(1) for x in encode_texts(model, tok, flat(texts))))  # of one prompt
    for s, patches, own in zip(scenes, V, texts):
        scores = classify(objective, patches, patches[:, None], itertools.islice(classes, len(own)))
        yield scores.cpu(), torch.from_numpy(s["masks"])


def scene_segmentation(objective, model, tok, scenes):
    """Rows of miou, miou_objects and patch_acc."""
    rows = {"miou": [], "miou_objects": [], "patch_acc": []}
    for scores, masks in scene_patches(objective, model, tok, scenes):
        label = scores.argmax(1)
        for key, found in (("miou", label), ("miou_objects", scores[:, :-1].argmax(1))):
            rows[key].append(object_ious(object_pixels(found, masks)).tolist())
        cover = patch_coverage(masks, model.visual.grid)
        rows["patch_acc"].append(patch_hits(label, cover).tolist())
    return rows


def scene_alignment(objective, tok, scenes, grid, V, T, M):
    """colour_word_acc, shape_word_acc, chance, patch_word_acc; V (B,P,D), T (B,L,D), M (B,L)."""
    best_patch = word_patch_products(objective, V, T).argmax(2).cpu()  # (B, L)
    best_word = best_words(V, T, M).cpu()  # (B, P)
    keys = "colour_word_acc", "shape_word_acc", "chance", "patch_word_acc"
    rows = {key: [[] for _ in scenes] for key in keys}
    for i, s in enumerate(scenes):
        cover = patch_coverage(torch.from_numpy(s["masks"]), grid)  # (N, P)
        names = torch.full((T.shape[1],), -1)  # the object that each position names
        for word, at in zip(s["words"], word_tokens(tok, s["words"])):
            if at[-1] >= T.shape[1]:  # the text was cut before it
                continue
            names[at] = word.thing
            if word.kind in ("colour", "shape"):  # a word of several tokens: its last one
                hit, luck = word_hits(best_patch[i, at[-1:]], torch.tensor([word.thing]), cover)
                rows[f"{word.kind}_word_acc"][i] += hit.tolist()
                rows["chance"][i] += luck.tolist()
        rows["patch_word_acc"][i] = patch_hits(names[best_word[i]], cover).tolist()
    return rows


def drop_rows(args, V, T, M, owner, texts=500):
    """weight_drops of texts (C,) with their pictures, owner (C,). {} for losses without weights."""
    if args.loss not in ("sparc", "gloria"):
        return {}
    drops = [weight_drops(attention(args, V[b], T, M), M)
             for b, T, M in zip(owner.split(texts), T.split(texts), M.split(texts))]
    by_text = torch.cat(drops).split(M.sum(1).tolist())  # (a text's tokens, 3) each
    return {f"drop_k{k + 2}": [x[:, k].tolist() for x in by_text] for k in range(3)}


def scene_pairs(objective, model, tok, scenes):
    """Scenes -> features v, V, t, T, M; similarities (B,C); {R@k: rows}; [[hit] of each swap]."""
    n, some = len(scenes), [i for i, s in enumerate(scenes) if s["swapped"]]
    texts = [s["caption"] for s in scenes] + [scenes[i]["swapped"] for i in some]
    v, V = encode_images(model, [s["image"] for s in scenes])
    encoded = encode_texts(model, tok, texts)
    s_i2t, s_t2i = similarities(objective, v, V, *encoded)  # (n, n + swapped)
    recalls = retrieval_hits(s_i2t[:, :n], s_t2i[:, :n], torch.arange(n, device=v.device))
    swaps = s_i2t.diagonal()[some] > s_i2t[some, n:].diagonal()
    return (v, V, *(x[:n] for x in encoded)), s_i2t[:, :n], recalls, swaps[:, None].tolist()


def scene_counts(objective, model, tok, n):
    """Which text, of a scene's first 1, 2, 3 or 4 things, fits best? -> [[4 hits] of a scene]."""
    scenes = Scenes(n // 4, 0, model.config["image_size"], "test", (4, 4), unique=False)
    specs = [spec | {"things": spec["things"][:k]}
             for spec in map(scenes.spec, range(n // 4)) for k in (1, 2, 3, 4)]
    texts = [" and ".join(join(scenes.phrase(thing, 0)) for thing in spec["things"])
             for spec in specs]
    images = encode_images(model, [scenes.draw(spec) for spec in specs])
    rows = []
    for features in zip(*(x.split(4) for x in (*images, *encode_texts(model, tok, texts)))):
        s = objective.score(*features)[0]  # (4, 4)
        rows.append(((s < s.diag()[:, None]).sum(1) == 3).tolist())
    return rows


def on_scenes(model, tok, args, n=1000):
    """Every metric on n test scenes -> the dict of metrics.json. args: of load_run."""
    objective, size = OBJECTIVES[args.loss], model.config["image_size"]
    scenes, others = (list(Scenes(n, 0, size, split)) for split in ("test", "composition"))
    (v, V, t, T, M), s_i2t, recalls, swaps = scene_pairs(objective, model, tok, scenes)
    _, _, unseen, unseen_swaps = scene_pairs(objective, model, tok, others)
    words = [[word.text for word in s["words"]] for s in scenes]
    telling = [[word.text for word in s["words"] if word.kind] for s in scenes]
    zero_shot, probe = scene_classes(objective, model, tok, n)
    out = {"retrieval": recalls, "classification": zero_shot, "probe": probe,
           "segmentation": scene_segmentation(objective, model, tok, scenes),
           "alignment": scene_alignment(objective, tok, scenes, model.visual.grid, V, T, M),
           "faithfulness": {"k_p": k_precision(s_i2t, words, words),
                            "k_pna": k_precision(s_i2t, telling, words)},
           "composition": {"swap_acc": swaps, "unseen_swap_acc": unseen_swaps,
                           "unseen_i2t_r1": unseen["i2t_r1"], "unseen_t2i_r1": unseen["t2i_r1"],
                           "count_acc": scene_counts(objective, model, tok, n)}}
    out["alignment"] |= drop_rows(args, V, T, M, torch.arange(n))
    if objective.local:
        options, scale = loss_options(args), model.logit_scale.exp()
        gap = local_gap(objective, args.head, options, scale, v, V, t, T, M)
        out["alignment"] |= {key: (x, n) for key, x in gap.items()}
    return report(out)


FUNCTION_WORDS = set(
    "a an the this that these those some any other all both no one two three four five i you he "
    "she it we they them him his her its their my your who which what there where of in on at by "
    "to for from with into onto over under up down out off as through across along around behind "
    "near next while and or but so than not very is are was were be been has have do".split())


def content_words(words):
    """Nouns and adjectives by a rule in place of a tagger: all but FUNCTION_WORDS, numbers, and
    words in -ing and -ly. So other forms of verbs (runs, sat) count, and a "building" does not."""
    return [w for w in words if w.isalpha() and w not in FUNCTION_WORDS
            and not w.endswith(("ing", "ly"))]


def pair_features(model, tok, data, template, file, progress):
    """Pairs -> v, V, t, T, M of good pictures and of their captions, put into the template; their
    numbers. The bad go to data.bad. From a file if it is there, or else kept in it. UserError."""
    if file:
        sums = [x.float().view(torch.int32).sum().item() for x in model.state_dict().values()]
        mark = f"{data.fingerprint()} {sums} {template}"  # of this data, this model
    if file and os.path.exists(file):
        try:
            saved = dict(np.load(file))
            if saved["mark"] != mark:
                raise ValueError("it is of another model or other data")
        except Exception as e:  # numpy raises many kinds on a damaged file
            raise UserError(f"can't use --features {file} ({e!r:.100}): name another") from None
        data.bad = [BadRow(*row) for row in saved["bad"]]
        found = [torch.from_numpy(saved[name]).to(model.logit_scale.device) for name in "vVtTM"]
        return *found, saved["numbers"].tolist()
    images, numbers, good = [], [], data.good(model.config["image_size"])
    good = iter(tqdm(good, "pictures", len(data), disable=not progress, leave=False))
    while some := list(itertools.islice(good, 100)):
        numbers += [i for i, _ in some]
        images.append(encode_images(model, [image for _, image in some]))
    if not images:
        raise UserError(f"no picture can be read; the first: {data.bad[0]}")
    texts = [template.replace("{}", text) for i in numbers for text in data.captions[i]]
    found = *map(torch.cat, zip(*images)), *encode_texts(model, tok, texts), numbers
    if file:
        kept = {name: x.cpu() for name, x in zip("vVtTM", found)} | {"mark": mark}
        kept |= {"numbers": numbers, "bad": [e.args for e in data.bad]}
        write(file, lambda opened: np.savez(opened, **kept))
    return found


def on_pairs(model, tok, args, data, progress=True, features=None, prompts=None):
    """Retrieval on Pairs: every picture, every caption; classification of class folders."""
    objective, prompts = OBJECTIVES[args.loss], read_prompts(prompts, data.classes)
    template = "{}" if data.classes else prompts[0]
    v, V, t, T, M, kept = pair_features(model, tok, data, template, features, progress)
    captions = [[clean(text) for text in data.captions[i]] for i in kept]
    owner = torch.tensor([b for b, own in enumerate(captions) for _ in own], device=v.device)
    texts, own = flat(captions), [{*tok.words.findall(" ".join(some))} for some in captions]
    words = [[w for w in tok.words.findall(text) if w[0].isalnum()] for text in texts]
    numbers = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    number = torch.tensor([numbers[text] for text in texts])
    s_i2t, s_t2i = similarities(objective, v, V, t, T, M)
    out = {"retrieval": retrieval_hits(s_i2t, s_t2i, owner, number),
           "faithfulness": {"k_p": k_precision(s_i2t, words, own),
                            "k_pna": k_precision(s_i2t, [*map(content_words, words)], own)},
           "alignment": drop_rows(args, V, T, M, owner)}
    if data.classes:
        out |= folder_classes(objective, model, tok, data, kept, v, V, prompts)
    repeated = int((number.bincount()[number] > 1).sum())
    if repeated:
        print(f"note: {repeated:,} of {len(texts):,} texts repeat: equal ones count as one")
    if data.bad:
        print(f"note: {len(data.bad):,} rows are left out; the first: {data.bad[0]}")
    about = {"pictures": len(v), "texts": len(texts), "texts_that_repeat": repeated,
             "rows_left_out": len(data.bad), "k_pna": "nouns and adjectives by content_words' rule"}
    return report(out) | {"about": about}


VOC = ("aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,dining table,dog,horse,motorbike,"
       "person,potted plant,sheep,sofa,train,tv monitor").split(",")


def mask_classes(folder):
    """Names of a mask's labels 1, 2, ...: the lines of classes.txt, or Pascal VOC's. UserError."""
    path, names = pathlib.Path(folder, "classes.txt"), VOC
    if path.is_file():
        names = [x.strip() for x in path.read_text("utf-8-sig", "replace").strip().split("\n")]
    if {"", "background"} & {*names} or len({*names}) < len(names) or len(names) > 254:
        raise UserError(f"{path}: give labels 1 to 254 different names, the background (0) none")
    return names


def good_masks(folder, n, bad, progress):
    """Pictures of Pascal VOC's layout, of val.txt if it is there, and their masks' labels (H,W): 0
    background, 1 to n, 255 void. Those that can't be used go into bad."""
    listed = pathlib.Path(folder, "ImageSets/Segmentation/val.txt")
    masks = pathlib.Path(folder, "SegmentationClass")
    names = sorted(path.stem for path in masks.glob("*.png"))
    if listed.is_file():
        names = listed.read_text("utf-8", "replace").split()
    for name in tqdm(names, "pictures", disable=not progress, leave=False):
        mask = masks / f"{name}.png"
        try:
            image = open_image(f"{folder}/JPEGImages/{name}.jpg", 1 << 20)  # not reduced
            labels = np.array(start_image(read_bytes(mask)), int)
            if labels.shape != image.size[::-1] or not {*labels.flat} <= {*range(n + 1), 255}:
                raise ValueError(f"{labels.shape[::-1]} for {image.size}, up to {labels.max()}")
            yield image, torch.from_numpy(labels)
        except Exception as e:  # Pillow's readers raise nearly anything on a damaged file
            bad.append(BadRow(mask, name, f"it must be an index PNG of labels 0 to {n} and 255, of "
                                          f"its picture's size ({e!r:.200})"))


def on_masks(model, tok, args, folder, prompts=None, progress=True):
    """Zero-shot segmentation of Pascal VOC's layout. SPARC's Table 4 (4.5, D.7) is miou_objects."""
    objective, kinds = OBJECTIVES[args.loss], [*mask_classes(folder), "background"]
    classes = list(encode_prompts(model, tok, kinds, read_prompts(prompts, kinds)))
    pixels, bad, out = {"miou": [], "miou_objects": []}, [], {}
    for image, truth in good_masks(folder, len(kinds) - 1, bad, progress):
        whole = image.resize([model.config["image_size"]] * 2)  # so all pixels count
        V = segmentation_patches(objective, model, [whole])[0]
        scores = classify(objective, V, V[:, None], classes).cpu()  # (P, K + 1)
        masks = truth == torch.arange(1, len(kinds))[:, None, None]  # (K, H, W)
        for key, label in (("miou", scores.argmax(1)), ("miou_objects", scores[:, :-1].argmax(1))):
            pixels[key].append(object_pixels(label, masks, truth < 255))
    if not any(size.any() for _, _, size in pixels["miou"]):
        raise UserError("; ".join([f"{folder} has no mask of a class to use", *map(str, bad[:1])]))
    for key, found in pixels.items():
        summed = object_ious(sum(found))
        out[key] = [object_ious(of_picture).tolist() for of_picture in found]
        out[f"{key}_summed"] = 100 * summed.mean().item(), len(summed)
    if bad:
        print(f"note: {len(bad):,} masks are left out; the first: {bad[0]}")
    about = {"pictures": len(found), "rows_left_out": len(bad)}
    return report({"segmentation": out}) | {"about": about}


def evaluate(folder, data=None, n=1000, device="cpu", progress=True, images=None, features=None,
             prompts=None):
    """Evaluate a run, write metrics.json (see place) -> metrics. data, images: see open_dataset; or
    "scenes", n of them; or None: as trained. features, prompts: see pair_features, read_prompts."""
    model, tok, args = load_run(folder, device)
    if not data:
        data, images = own_data(folder, args)
    masks = os.path.isdir(os.path.join(data, "SegmentationClass"))
    if (prompts and data == "scenes") or (features and masks):
        raise UserError(f"--data {data}: --prompts is for files, --features for captions in files")
    if data == "scenes":
        metrics = on_scenes(model, tok, args, n)
    elif masks:
        metrics = on_masks(model, tok, args, data, prompts, progress)
    else:
        pairs = open_dataset(data, images=images)
        metrics = on_pairs(model, tok, args, pairs, progress, features, prompts)
    about = {"loss": args.loss, "model": args.model, "data": data, "step": args.step}
    metrics |= {"cost": args.cost, "about": about | metrics.pop("about", {})}
    text = json.dumps(metrics, indent=1)
    write(place(folder, "metrics.json"), lambda file: file.write(text.encode()))
    return metrics


def cell(found, group, key):
    """Mean ± standard deviation over seeds; of one run the number (its interval); or a dash."""
    digits = 2 if key.startswith("local") else int(group != "cost")
    values = [m[group][key] for m in found if key in m.get(group, {})]
    if not values:
        return "-"
    text, around = f"{statistics.mean(values):.{digits}f}", found[0].get("interval", {})
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f}"
    if f"{group} {key}" in around:
        text += " ({:.{d}f}-{:.{d}f})".format(*around[f"{group} {key}"], d=digits)
    return text


def table(runs):
    """{name: metrics} -> a Markdown table, a column a run. Seeds share one: of one loss, model,
    length and data, with names that differ in the number at the end alone: sparc-0, sparc-1."""
    groups, n, rows = collections.defaultdict(list), {}, {}
    for name, metrics in runs.items():
        about, start = metrics["about"], re.sub(r"-\d+$", "", name)
        groups[start, *(about.get(k) for k in ("loss", "model", "step", "data"))].append(name)
        n |= metrics.get("n", {})
        rows |= {f"{group} {key}": (group, key) for group in metrics
                 if group not in ("about", "n", "interval") for key in metrics[group]}
    heads = [names[0] if len(names) == 1 else f"{start} ({len(names)} seeds)"
             for (start, *_), names in groups.items()]
    lines = [["", *heads, "n"]]
    for head, places in rows.items():
        cells = [cell([runs[name] for name in names], *places) for names in groups.values()]
        lines.append([head, *cells, str(n.get(head, ""))])
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    text = [f"| {head:{first}} | {' | '.join(map(str.rjust, cells, widths))} |"
            for head, *cells in lines]
    text.insert(1, f"|{'-' * (first + 2)}|{'|'.join('-' * (w + 1) + ':' for w in widths)}|")
    return "\n".join(text)


# ------------------------------------------- what a step costs: SPARC's Table 12 (SPARC D.6)
def late_flops(pairs, P, L, D):
    """Of P patches with L words, forward and backward; choosing tokens: twice forward, so 2/3."""
    return 6 * pairs * P * L * D


BATCHES = np.array([2048, 4096, 8192, 16384])
# TFLOP of an update on one of 256 devices, for these batches; the most memory, in MB beyond CLIP's
TABLE_12 = {"clip": (1.15, 2.29, 4.57, 9.14), "pacl": (1.2, 2.46, 5.24, 12.8),
            "gloria": (3.34, 13.21), "mgca": (1.16, 2.31, 4.62, 9.23),
            "filip": (1.37, 3.17, 8.09, 27.25), "sparc": (1.15, 2.3, 4.6, 9.19)}
TABLE_12_MB = {"pacl": (288, 1815, 3897, 6207), "gloria": (3619, 9388),
               "filip": (0, 778, 2768, 6885)}


def step_cost(loss, batch, devices=256, P=196, L=55, D=512, width=768, keep=0.2):
    """A step on one device of Table 12, batch / devices pairs against the whole batch, both ways ->
    FLOP of its matmuls (backward: twice the forward; towers: ViT-B/16, 12 x 768 for texts); bytes
    beyond CLIP's or None, two a number: all tokens (PACL, GLoRIA: twice), what compares pairs."""
    b, kI, kT = batch / devices, int(keep * P), int(keep * L)
    q = b * batch  # pairs of a picture and a text that one device compares
    adapters = 6 * b * (P + L) * width * D  # on every token, not on one vector a side
    embedder = b * (6 * P * (2 * width * D + D ** 2) + 6 * L * width * D)  # PACL's in their place
    attention = 2 * (2 * P + 2 * L + P + L) * 128 * D + 8 * 128 * L * P  # MGCA's, 128 wide
    compared = 4 * (L ** 2 + P ** 2) * D + 4 * 500 * D  # its tokens, and 500 prototypes
    # FILIP as SPARC runs it: a product meets the chosen tokens of one side alone
    late = late_flops(q, P, kT, D) + late_flops(q, kI, L, D) + late_flops(b * b, P, L, D) * 2 / 3
    added = {"clip": 0, "pacl": 24 * q * P * D + 12 * q * D + embedder,
             "gloria": 24 * q * P * L * D + adapters, "filip": late + adapters,
             "mgca": 3 * b * (attention + compared) + adapters,
             "sparc": 3 * b * (4 * P * L * D + 4 * L ** 2 * D) + adapters}
    memory = {"pacl": 4 * batch * P * D + 4 * q * (P + D),
              "gloria": 4 * batch * P * D + 4 * q * (2 * P * L + L * D),
              "filip": 2 * batch * (kI + kT) * D + 2 * q * (P * kT + kI * L)}
    towers = 2 * P * 3 * 16 ** 2 * width  # into patches; then 12 blocks each
    towers += sum(12 * (24 * n * width ** 2 + 4 * n ** 2 * width) for n in (P, L))
    return 3 * b * towers + 12 * q * D + added[loss], memory.get(loss)


def cost_table():
    """SPARC's Table 12 beside the model, as text. CLIP's row counts more than matmuls; that much is
    added to the others. "20% token dropping" fits only if 20% are kept, on one side of a product.
    Three cells are above the model: a part of the forward pass must be computed twice there."""
    model = {loss: step_cost(loss, BATCHES) for loss in TABLE_12}
    rest = TABLE_12["clip"] - model["clip"][0] / 1e12  # what is no matmul
    rows = [(f"TFLOP {loss}", paper, model[loss][0] / 1e12 + rest * (loss != "clip"), 2)
            for loss, paper in TABLE_12.items()]
    rows += [(f"MB over clip {loss}", paper, model[loss][1] / 1e6, 0)
             for loss, paper in TABLE_12_MB.items()]
    lines = [f"{'of a step':20}" + "".join(f"{f'B = {B:,}':>25}" for B in BATCHES),
             " " * 20 + f"{'paper   model  ratio':>25}" * len(BATCHES)]
    for name, published, modelled, digits in rows:
        line = f"{name:20}"
        for paper, found in zip(published, modelled):
            ratio = f"{found / paper:.3f}" if paper else "-"
            line += f"{paper:10,.{digits}f}{found:8,.{digits}f}{ratio:>7}"
        lines.append(line)
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description="Evaluate runs: print a table, write metrics.json.")
    add = ap.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders, such as runs/sparc; files of OpenAI "
        "CLIP's weights; or the word cost, for SPARC's Table 12")
    add("--data", help="scenes, as train.py --data, or VOC2012 (default: what the run is for)")
    add("--images", help="the folder of the pictures that a JSON file names")
    add("--prompts", help="a template with {} for a class's name or a caption; for classes also a "
        f"file of them, or FILIP's for {', '.join(TABLE_11)}")
    add("--n", type=int, default=1000, help="number of test scenes")
    add("--features", metavar="FILE.npz", help="of one run, on files: keep or reuse them")
    add("--json", action="store_true", help="print all metrics as JSON")
    add("--markdown", action="store_true", help="print the table for a README")
    add("--device", default="auto", choices=DEVICES, help="where to compute (auto)")
    args = ap.parse_args()
    if args.runs[0] == "cost":
        return print(cost_table())
    if args.n < 10:
        raise UserError(f"--n {args.n}: at least 10 scenes are needed")
    if args.features and (len(args.runs) > 1 or args.data in (None, "scenes")):
        raise UserError("--features is for one run on files: name one RUN, and --data PATH")
    given = {"data": args.data, "n": args.n, "device": pick_device(args.device),
             "images": args.images, "features": args.features, "prompts": args.prompts}
    with contextlib.redirect_stdout(sys.stderr):  # notes
        runs = {name: evaluate(run, **given) for name, run in zip(run_names(args.runs), args.runs)}
    if args.json:
        return print(json.dumps(runs, indent=1))
    print(table(runs) if args.markdown else table(runs).replace("|", " "))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"eval.py: {e}")
