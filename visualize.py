"""Pictures of what a model has learned, and a page to click through: which word looks where.

    python visualize.py runs/sparc                          # -> runs/sparc/align.png, align.html
    python visualize.py runs/sparc runs/filip runs/clip     # the same words, run below run
    python visualize.py runs/sparc --image dog.jpg --text "a dog eats ice cream" --words "ice cream"
    python visualize.py cam runs/sparc runs/clip            # Grad-CAM; also with --image, --text
    python visualize.py segmentation runs/sparc runs/clip   # the truth, what each run finds
    python visualize.py retrieval runs/sparc --n 100        # the best of 100 pictures, 100 texts
    python visualize.py map runs/sparc runs/clip            # pictures and colours by t-SNE
    python visualize.py curves runs/sparc runs/clip         # log.csv -> runs/sparc/curves.png

Covers: FILIP 4.5 (Figure 2: a patch carries the index of its best token, m_k of eq. 4), A.3;
PyramidCLIP 4.7 (Figures 4, 5); SPARC's Figures 3, 8 and its weights of eqs. 2 to 4. Differs: the
papers show no single words. Here a word, the mean of its tokens, is bright where it looks, on one
scale for all. Figure 4 is of scenes.
"""
import argparse, base64, collections, csv, functools, io, json, math, os, pathlib, re, sys, types
import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
import eval as evaluation
from data import COLOURS as INKS, Scenes, Thing, Word, center_crop, join, normalize, open_dataset
from data import open_image, outline, to_tensor
from losses import OBJECTIVES, unit
from model import DEVICES, UserError, clean, pick_device, write

SIDE, MARGIN, TEXT = 280, 10, 22  # pixels: of a panel, between panels; size of letters
COLUMNS, SHEET = 6, 3  # at most: panels side by side, pictures on a sheet
FULL, DIM = 16, 0.22  # times an equal share that is brightest; how bright the darkest patch is
SMALL_WORDS = set("a an the of in on at by to with and or is are there it its his her their this "
                  "that while for from left right above below . , picture photo".split())
GREY, RED, BLUE, ORANGE = "#696969", "#c80000", "#0072b2", "#d55e00"
COLOURS = [BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00"] * 9
Run = collections.namedtuple("Run", "name model tok args")
# wanted: words to show (None: all but small ones); things: a word's object; masks (N,H,W) of these
Sample = collections.namedtuple("Sample", "image text wanted things masks scene",
                                defaults=(None, {}, torch.zeros(0, 1, 1), None))


def open_runs(folders, device="cpu"):
    names = evaluation.run_names(folders)
    return [Run(name, *evaluation.load_run(folder, device)) for name, folder in zip(names, folders)]


def draw_scenes(n, seed, size, kind="align"):
    """n test scenes of two objects, for a map of one -> [Sample]. cam shows phrases, not words."""
    samples, objects = [], 1 if kind == "map" else 2
    for scene in Scenes(n, seed, size, "test", (objects, objects)):
        things = {w.text: w.thing for w in scene["words"] if w.kind in ("colour", "shape")}
        if kind == "cam":
            things = {join(Scenes.phrase(t, 0)): k for k, t in enumerate(scene["things"])}
        masks = torch.from_numpy(scene["masks"])
        samples.append(Sample(scene["image"], scene["caption"], things, things, masks, scene))
    return samples


def read_photos(data, images, n):
    """The first n pictures of data that can be read -> [Sample]. Raises UserError if none can."""
    pairs = open_dataset(data, images=images)
    samples = [Sample(image, pairs.captions[i][0])
               for _, (i, image) in zip(range(n), pairs.good(2 * SIDE))]
    if not samples:
        raise UserError(f"{data} has no picture that can be read ({pairs.bad[-1]})")
    return samples


@torch.no_grad()
def align(run, image, text):
    """A run (of open_runs), an RGB picture, a text -> products of tokens and patches (L,P); what is
    shown of them (L,P), its name, what bright means; each patch's best token (P,); the L tokens."""
    _, V = evaluation.encode_images(run.model, [image])
    _, T, M = evaluation.encode_texts(run.model, run.tok, [text])
    products = evaluation.word_patch_products(OBJECTIVES[run.args.loss], V, T)
    shown, name = products, "similarity"
    means = "dark: the word's mean over the patches or less, bright: the most above it"
    if run.args.loss == "sparc":
        shown = evaluation.attention(run.args, V, T, M)
        name = "softmax weights" if run.args.softmax else "SPARC's weights, eqs. 3 and 4"
        means = f"dark: an equal share of the word's weight or less, bright: {FULL} times or more"
    ids = run.tok([text], run.model.context_length)[0][0, 1:T.shape[1] - 1].tolist()
    tokens = ["[BOS]", *(run.tok.symbols[i].replace("</w>", " ") for i in ids), "[EOS]"]
    best = evaluation.best_words(V, T, M)[0].cpu()
    return types.SimpleNamespace(products=products[0].cpu(), shown=shown[0].cpu(), name=name,
                                 means=means, best=best, tokens=tokens)


def brightness(word, aligned):
    """What one word shows (P,), aligned of align -> (P,) in 0..1, how bright its patches are.
    Weights by their logarithm; similarities above the word's mean, as a share of the text's most"""
    if aligned.name != "similarity":
        return (word * len(word)).clamp(min=1).log2().div(math.log2(FULL)).clamp(max=1)
    tokens = aligned.shown[1:-1]  # all but [BOS] and [EOS]
    most = (tokens - tokens.mean(1, keepdim=True)).max()
    return (word - word.mean()).clamp(min=0) / most.clamp(min=1e-6)


def find_words(tok, text, wanted=None, small=SMALL_WORDS):
    """-> [(word, positions of its tokens)]: the wanted words or phrases wherever they stand, or all
    words that are not small. Raises UserError if one that is wanted is not there."""
    text, found, places, position = clean(text), [], {}, 1  # places: tokens before a character
    for piece in tok.words.finditer(text):  # "t-shirt" has three, a number as many as digits
        places[piece.start()] = position
        position += len(tok.bpe(piece[0]))
        places[piece.end()] = position
    words = {word.strip(".,;:!?()\"'") for word in text.split()} - {"", *small}
    for word in set(map(clean, wanted or words)):  # but not inside a longer number
        matches = re.finditer(rf"(?<!\d(?=\d)){re.escape(word)}(?!(?<=\d)\d)", text)
        spans = [m.span() for m in matches if word and {*m.span()} <= set(places)]
        if wanted and not spans:
            raise UserError(f"--words {word}: not in the text {text!r}")
        found += [(word, list(range(places[start], places[end]))) for start, end in spans]
    return sorted(found, key=lambda word: word[1])


def seen_words(run, sample, length):
    """The words to show among `length` tokens -> [(word, positions)]; prints those it loses."""
    words = find_words(run.tok, sample.text, sample.wanted)
    if len(run.tok.encode(sample.text)) + 2 > length:
        lost = ", ".join(dict.fromkeys(word for word, at in words if at[-1] >= length - 1))
        print(f"note: cut to {length} tokens, without {lost or 'its end'}", file=sys.stderr)
    return [(word, at) for word, at in words if at[-1] < length - 1]


# ------------------------------------------------------------------------------------- panels
def flow(items, width, gap=MARGIN):
    """Pictures side by side, as many as fit in width, the others below -> one picture."""
    out = Image.new("RGB", (width, sum(item.height + gap for item in items)), "white")
    x, y, tall = 0, 0, 0
    for item in items:
        if x and x + item.width > width:
            x, y, tall = 0, y + tall + gap, 0
        out.paste(item, (x, y))
        x, tall = x + item.width + gap, max(tall, item.height)
    return out.crop((0, 0, width, y + tall))


def letters(text, colour="black", most=4 * SIDE, paper="white"):
    """A line of text as a picture, in smaller letters if it would be wider than `most`."""
    size = TEXT
    while (length := ImageFont.load_default(size).getlength(text)) > most and size > 2:
        size *= 0.95  # hinted letters do not shrink in proportion
    font = ImageFont.load_default(size)
    out = Image.new("RGB", (max(1, math.ceil(min(length, most))), int(1.3 * TEXT)), paper)
    ImageDraw.Draw(out).text((0, TEXT), text, colour, font=font, anchor="ls")
    return out


def lines(text, colour="black"):
    """Words as pictures, so that flow can break lines."""
    return [letters(word, colour) for word in text.split()]


def titled(title, picture):
    return flow([letters(title, most=picture.width), picture], picture.width, 0)


def sheet(blocks, path, columns=COLUMNS):
    """Write blocks, each the pictures that flow lays out, one below the other: a PNG -> its path"""
    width = min(COLUMNS, max(4, columns)) * (SIDE + MARGIN) - MARGIN
    out = flow([flow(block, width) for block in blocks if block], width, 2 * MARGIN)
    out = ImageOps.expand(out, 2 * MARGIN, "white")
    write(path, lambda file: out.save(file, format="PNG"))
    return path


def enlarge(image):
    """The central square as a panel; where pixels are few, they have hard edges."""
    few = max(image.size) < 100
    return ImageOps.fit(image, (SIDE, SIDE), 0 if few else Image.Resampling.BICUBIC)


def spotlight(picture, x, grid):
    """A panel that is bright where x (P,) is 1 and dark where it is 0."""
    veil = np.round(255 * (DIM + (1 - DIM) * x.double().numpy())).astype(np.uint8)
    veil = Image.fromarray(veil.reshape(grid, grid)).resize(picture.size, Image.Resampling.NEAREST)
    return ImageChops.multiply(picture, veil.convert("RGB"))


def word_panel(picture, x, best, grid, hit=None, mask=None):
    """One word: x (P,) in 0..1 as light, mask (H,W) as outline; hit: a tick, a cross, a dot."""
    out, step = spotlight(picture, x, grid), SIDE / grid
    if mask is not None:
        inside = Image.fromarray(mask.numpy()).convert("L").resize(out.size, 0)
        for ink, size in (("black", 11), ("white", 7)):  # white, and black around that
            wide = inside.filter(ImageFilter.MaxFilter(size))
            out.paste(ink, (0, 0), ImageChops.subtract(wide, inside))
    tick, cross = [(-8, 0), (-2, 6), (7, -6)], [(-6, -6), (6, 6), (0, 0), (6, -6), (-6, 6)]
    marks = {True: (BLUE, 15, tick), False: (ORANGE, 15, cross), None: ("black", 8, [])}
    draw, (ink, r, line) = ImageDraw.Draw(out), marks[hit]
    x, y = (best % grid + 0.5) * step, (best // grid + 0.5) * step
    draw.ellipse((x - r, y - r, x + r, y + r), ink, "white", 2)
    draw.line([(x + a, y + b) for a, b in line], "white", 4)
    return out


def grid_panel(picture, best, marked, grid):
    """FILIP's Figure 2 of one picture (SIDE, SIDE). best (P,); marked: the tokens in red."""
    step, red = SIDE / grid, [token in marked for token in best.tolist()]
    out = spotlight(picture, torch.tensor(red).float().clamp(min=0.2), grid)
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(step * 0.5)
    for p, token in enumerate(best.tolist()):
        place = (p % grid + 0.5) * step, (p // grid + 0.5) * step
        draw.text(place, str(token), RED if red[p] else "white", font, "mm",
                  stroke_width=3 * red[p], stroke_fill="white")
    return out


# ------------------------------------------------------------------------ align.png, cam.png
def grad_cam(run, image, text):
    """The patches that raise the similarity of a picture and a text -> (P,), the largest is 1. ViT:
    the last attention times its gradient, mean over heads, sum over queries (FILIP A.3). Towers of
    convolutions: their last map, its channels weighted by mean gradients (PyramidCLIP Figure 5)."""
    visual, kept = run.model.visual, []
    convolutions = getattr(visual, "layer4", getattr(visual, "stem", None))
    def keep(layer, inputs, output):
        if convolutions:
            return kept.append(output)  # (1, w, grid, grid)
        qkv = inputs[0] @ layer.in_proj_weight.T + layer.in_proj_bias  # as model.Attention
        q, k, v = qkv.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        s, seen = q @ k.mT / q.shape[-1] ** 0.5, inputs[1]  # (1, heads, N, N), (N, N) or None
        kept.append((s if seen is None else s.masked_fill(~seen, -torch.inf)).softmax(-1))
        return layer.out_proj((kept[0] @ v).transpose(1, 2).flatten(2))
    hook = (convolutions or visual.transformer.resblocks[-1].attn).register_forward_hook(keep)
    x = normalize(to_tensor([center_crop(image, run.model.config["image_size"])]))
    features = run.model.encode_image(x.to(run.model.logit_scale.device))
    hook.remove()
    texts = evaluation.encode_texts(run.model, run.tok, [text])
    similarity = OBJECTIVES[run.args.loss].score(*features, *texts)[0].sum()
    grad, = torch.autograd.grad(similarity, kept)
    heat = (grad * kept[0]).clamp(min=0).mean(1).sum(1)[:, -visual.grid ** 2:]
    if convolutions:
        heat = (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1).clamp(min=0)
    return (heat / heat.max().clamp(min=1e-12)).flatten().detach().cpu()


def align_row(run, sample, numbered=False, cam=False):
    """One run, one sample -> text, panels, (hit, chance) of words with objects, sentences."""
    image, grid = sample.image, run.model.visual.grid
    a = align(run, image, sample.text)
    words = seen_words(run, sample, len(a.tokens))
    marked = {p for _, at in words for p in at}
    text = lines("".join(a.tokens[1:-1]))
    if numbered:
        text = [letters(f"{k} {x}", RED if k in marked else GREY) for k, x in enumerate(a.tokens)]
    if image.width != image.height:
        share = min(image.size) / max(image.size)
        text.append(letters(f"(the middle {share:.0%} of the picture)", GREY))
    picture, legend = enlarge(image), [f"{a.name} ({a.means})."]
    panels, hits = [titled(run.name, picture)], []
    if numbered:
        panels.append(titled("best token of each patch", grid_panel(picture, a.best, marked, grid)))
        legend.append("Numbers: each patch's best token, in red if it is of a word shown.")
    if cam:
        others = dict.fromkeys(word for word, _ in words if word != clean(sample.text))
        words = [(sample.text, []), *((word, []) for word in others)]
        legend = ["Grad-CAM (bright: the patches that raise the similarity to the text the most)."]
    for word, at in words:
        hit, mask, title = None, None, word
        if cam:
            x = light = grad_cam(run, image, word)
            title = "the whole text" if word == sample.text else word
        else:
            x = a.shown[at].mean(0)
            light = brightness(x, a)
            title = f"{word} (mean of {len(at)} tokens)" if len(at) > 1 else word
        if word in sample.things:
            thing, cover = sample.things[word], evaluation.patch_coverage(sample.masks, grid)
            found = evaluation.word_hits(x.argmax()[None], torch.tensor([thing]), cover)
            hits.append([number.item() for number in found])
            hit, mask = hits[-1][0], sample.masks[thing]
        panels.append(titled(title, word_panel(picture, light, int(x.argmax()), grid, hit, mask)))
    return text, panels, hits, legend


def align_sheet(runs, samples, path, cam=False):
    """samples: for each run, the same pictures, of which the first are shown; cam: by grad_cam."""
    numbered = not cam and any("filip" in run.args.loss for run in runs)
    blocks, hits, legends, said = [], {run.name: [] for run in runs}, [], None
    for shown in [*zip(*samples)][:SHEET]:
        for run, sample in zip(runs, shown):
            text, panels, found, legend = align_row(run, sample, numbered, cam)
            blocks += [[] if text == said else text, panels]
            hits[run.name] += found
            legends += legend
            said = text
    columns = max(map(len, blocks[1::2]))
    marks = "Dot: the best patch."
    if any(hits.values()):
        marks = "White line: the object that is named. Tick: the best patch is on it."
    blocks.append(lines(" ".join([*dict.fromkeys(legends), marks])))
    for name, found in hits.items():
        if found:
            good, chance = map(sum, zip(*found))
            blocks.append(lines(f"{name}: {good} of {len(found)} best patches are on their object; "
                                f"of random patches {chance:.1f} would be"))
    return sheet(blocks, path, columns)


# ------------------------------------------------------------------------------- align.html
def page_view(run, sample):
    """What the page needs of one picture as one run sees it."""
    grid, masks = run.model.visual.grid, sample.masks
    a = align(run, sample.image, sample.text)
    words = [{"word": word, "at": at, "thing": sample.things.get(word, -1)}
             for word, at in find_words(run.tok, sample.text, small=())
             if at[-1] < len(a.tokens) - 1]
    cover = evaluation.patch_coverage(masks, grid) >= 0.25 if len(masks) else masks  # (N, P)
    return {"grid": grid, "words": words, "side": masks.shape[-1], "on": cover.tolist(),
            "rows": (a.products if "eqs" in a.name else a.shown).double().numpy().round(6).tolist(),
            "outlines": [outline_path(mask) for mask in masks], "shown": a.name, "means": a.means}


def outline_path(mask):
    """mask (H,W) bool -> its border as a path of SVG, in pixels."""
    m = np.pad(mask.numpy(), 1)
    flat = [f"M{x - 1} {y}h1" for y, x in zip(*np.nonzero(m[1:] != m[:-1]))]
    steep = [f"M{x} {y - 1}v1" for y, x in zip(*np.nonzero(m[:, 1:] != m[:, :-1]))]
    return "".join(flat + steep)


def data_url(picture):
    """A picture as text that a page can hold: JPEG for a photo, PNG for a scene or a chart."""
    kind, file = "JPEG" if 100 < picture.width < 1000 else "PNG", io.BytesIO()
    picture.save(file, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def align_page(runs, samples, path, curves=()):
    """Write the page, one file that needs no other. samples: as for align_sheet -> its path"""
    pictures = [center_crop(sample.image, min(448, *sample.image.size)) for sample in samples[0]]
    data = {"full": FULL, "dim": DIM, "runs": [], "pictures": [*map(data_url, pictures)]}
    for run, mine in zip(runs, samples):
        data["runs"].append({"name": run.name, "views": [page_view(run, sample) for sample in mine],
                             "sigma": evaluation.loss_options(run.args).get("sigma")})
    text = json.dumps(data).replace("<", "\\u003c")  # so no text can end the script
    charts = [f'<img alt="log.csv, over steps" src="{data_url(Image.open(x))}">' for x in curves]
    html = pathlib.Path(__file__).with_name("page.html").read_text("utf-8")
    html = html.replace("@CURVES@", "".join(charts)).replace("@DATA@", text)
    write(path, lambda file: file.write(html.encode()))
    return path


# ------------------------------------------------------------------------------------- curves
def chart(curves):
    """Lists of points (x, y), the n-th a line in the n-th colour -> a panel, two as wide."""
    panel = Image.new("RGB", (2 * SIDE + MARGIN, SIDE), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(17)
    points = np.array([point for curve in curves for point in curve])
    low, size = points.min(0), np.ptp(points, 0).clip(1e-9)

    def place(point):
        return tuple((point - low) / size * (2 * SIDE - 120, 50 - SIDE) + (80, SIDE - 35))
    for point in np.linspace(low, low + size, 5):
        x, y = place(point)
        draw.line((80, y, 2 * SIDE - 40, y), (215, 215, 215))
        draw.text((74, y), f"{point[1]:.3g}", GREY, font=font, anchor="rm")
        draw.text((x, SIDE - 28), f"{point[0]:,.0f}", GREY, font=font, anchor="ma")
    for colour, curve in zip(COLOURS, curves):
        draw.line([place(point) for point in curve], colour, 3)
    return panel


def draw_curves(folders, out=None):
    """What runs logged, over steps -> the path of a sheet, with a chart for each column."""
    logs, out = [], out or evaluation.place(folders[0], "curves.png")
    for folder in folders:
        path = os.path.join(folder, "log.csv")
        if not os.path.isfile(path):
            raise UserError(f"there is no {path}: name run folders of train.py")
        logs.append(list(csv.DictReader(pathlib.Path(path).read_text("utf-8").splitlines())))
    names, charts = dict.fromkeys(name for log in logs for row in log for name in row), []
    for name in list(names)[1:]:  # not step
        curves = [[(float(row["step"]), float(row[name])) for row in log
                   if math.isfinite(float(row.get(name) or "nan"))] for log in logs]
        if any(len(curve) > 1 for curve in curves):
            charts.append(titled(name, chart(curves)))
    names = map(letters, evaluation.run_names(folders), COLOURS)
    return sheet([[letters("over steps:"), *names], charts], out)


# -------------------------------------------------------------- segmentation, retrieval, map
def coloured(image, scene, label):
    """label (h,w): the number of an object, or -1 -> the picture with the objects in colour."""
    inks = [*(INKS[thing.colour] for thing in scene["things"]), (40, 40, 40)]
    over = Image.fromarray(np.array(inks, np.uint8)[label])
    return Image.blend(enlarge(image), over.resize((SIDE, SIDE), 0), 0.75)


def draw_truth(image, scene):
    """A scene as a panel with the masks and boxes of its objects."""
    masks = scene["masks"]  # (N, H, W)
    out = coloured(image, scene, np.where(masks.any(0), masks.argmax(0), -1))
    for thing in scene["things"]:
        x1, y1, x2, y2 = (x * SIDE / len(masks[0]) for x in thing.box)
        ImageDraw.Draw(out).rectangle((x1, y1, x2 - 1, y2 - 1), outline=INKS[thing.colour], width=2)
    return out


def draw_samples(data, n, path):
    """What the first n samples hold: all texts, on scenes each word on its object's colour, paler,
    and the truth. For `python data.py` -> the PNG's path."""
    blocks, scenes = [], isinstance(data, Scenes)
    for _, (i, found) in zip(range(n), enumerate(data) if scenes else data.good(2 * SIDE)):
        image = found["image"] if scenes else found
        panels, papers, caption = [enlarge(image)], ["white"], ""
        if scenes:
            texts = [[Word(head), *data.words(data.spec(i), style)] for style, head in
                     enumerate(("caption:", "paraphrase:", "paraphrase:"))]
            panels.append(draw_truth(image, found))
            inks = [INKS[thing.colour] for thing in found["things"]]
            papers = [*(tuple((x + 255) // 2 for x in ink) for ink in inks), "white"]
        else:
            texts = [map(Word, f"text: {text}".split()) for text in data.told[i]]
            caption = data.captions[i][0]
        views = data.views(i, image, caption)  # of scenes the same for every caption
        texts += [map(Word, f"{k}: {views[k]}".split()) for k in ("summary", "objects")
                  if k in views]
        told = [flow([letters(text, most=2 * SIDE, paper=papers[k]) for text, k, _ in words],
                     2 * SIDE) for words in texts]
        blocks.append([*panels, flow(told, 2 * SIDE, 2 * MARGIN)])
    return sheet(blocks, path, 4)


def draw_segmentation(runs, samples, path):
    """Scenes: what is where, what each run finds, by eval.scene_patches (SPARC Figures 3, 8)."""
    blocks = []
    for sample in samples[0]:
        picture = titled("picture", enlarge(sample.image))
        blocks.append([picture, titled("truth", draw_truth(sample.image, sample.scene))])
    for run, mine in zip(runs, samples):
        scenes, grid = [sample.scene for sample in mine], run.model.visual.grid
        found = evaluation.scene_patches(OBJECTIVES[run.args.loss], run.model, run.tok, scenes)
        for row, sample, (scores, masks) in zip(blocks, mine, found):
            label = scores.argmax(1).view(grid, grid)
            pixels = evaluation.object_pixels(label.flatten(), masks)
            title = f"{run.name}: mIoU {evaluation.object_ious(pixels).mean():.0%}"
            row.append(titled(title, coloured(sample.image, sample.scene, label.numpy())))
    blocks.append(lines("Truth: masks and boxes. Runs: a patch has the colour of the object whose "
                        "phrase fits it best; it is dark if the background's does."))
    return sheet(blocks, path, 2 + len(runs))


def draw_retrieval(runs, samples, path):
    """Of the first samples, the five best pictures and the five best texts among all samples."""
    scores, blocks = [], []
    for run, mine in zip(runs, samples):
        images = evaluation.encode_images(run.model, [sample.image for sample in mine])
        texts = evaluation.encode_texts(run.model, run.tok, [sample.text for sample in mine])
        scores.append(evaluation.similarities(OBJECTIVES[run.args.loss], *images, *texts))
    for i, query in enumerate(samples[0][:SHEET]):
        blocks.append(lines(query.text))
        said = []
        for run, mine, (s_i2t, s_t2i) in zip(runs, samples, scores):
            order = s_t2i[:, i].argsort(descending=True).tolist()
            pictures = [ImageOps.crop(enlarge(mine[b].image), 10) for b in order[:5]]
            frames = [ImageOps.expand(picture, 10, RED if b == i else "white")
                      for b, picture in zip(order, pictures)]
            place = f"{run.name}: its own picture is number {order.index(i) + 1} of {len(mine)}"
            blocks += [[letters(place, GREY)], frames]
            order = s_i2t[i].argsort(descending=True).tolist()
            place = f"{run.name}: its own text is number {order.index(i) + 1} of {len(mine)}"
            said.append(letters(place, GREY))
            said += [flow(lines(f"{k}. {mine[c].text}", RED if c == i else "black"), 4 * SIDE)
                     for k, c in enumerate(order[:5], 1)]
        blocks.append([enlarge(query.image), flow(said, 4 * SIDE, 0)])
    return sheet([*blocks, lines("Red: the text's own picture, the picture's own text.")], path, 5)


def tsne(x, perplexity=30, steps=500):
    """x (N,D) -> (N,2): exact t-SNE (van der Maaten and Hinton, 2008), from the two main axes. The
    Gaussian around a point is as wide as its entropy is that of `perplexity` equal neighbours."""
    d2 = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    precision = torch.zeros(len(x), 1)  # their logarithms
    for step in 10 * 0.5 ** torch.arange(40):
        p = (-precision.exp() * d2).softmax(1)  # (N, N)
        entropy = torch.special.entr(p).sum(1, keepdim=True)
        precision += step * (entropy - math.log(perplexity)).sign()
    p, others = (p + p.T) / (2 * len(x)), 1 - torch.eye(len(x))
    y = x @ torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    y = (y / y.std() / 100).requires_grad_()
    optimizer = torch.optim.Adam([y], lr=1)
    for _ in range(steps):
        near = others / (1 + (y[:, None] - y).square().sum(2))  # (N, N)
        divergence = -(p * (near / near.sum()).clamp(min=1e-12).log()).sum()  # and a constant
        y.grad, = torch.autograd.grad(divergence, y)
        optimizer.step()
    return y.detach()


def draw_map(runs, samples, path):
    """Pictures of one object, texts of one colour by t-SNE (PyramidCLIP Figure 4), each centred."""
    panels, side = [], 2 * SIDE + MARGIN
    texts = [join(Scenes.phrase(Thing("", "", ink, "thing", None), 0)) for ink in INKS]
    for run, mine in zip(runs, samples):
        v, V = evaluation.encode_images(run.model, [sample.image for sample in mine])
        v = OBJECTIVES[run.args.loss].picture(v, V)
        t, _, _ = evaluation.encode_texts(run.model, run.tok, texts)
        y = tsne(torch.cat([unit(unit(x) - unit(x).mean(0)) for x in (v, t)]).cpu())
        y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)) * (side - 120) + 60
        panel = Image.new("RGB", (side, side), (235, 235, 235))
        draw, font = ImageDraw.Draw(panel), ImageFont.load_default(TEXT)
        for (a, b), thing in zip(y.int().tolist(), [sample.scene["things"][0] for sample in mine]):
            panel.paste(INKS[thing.colour], (a - 8, b - 8), outline(thing.shape, 16))
        for (a, b), ink in zip(y[len(mine):].tolist(), INKS):
            draw.ellipse((a - 12, b - 12, a + 12, b + 12), INKS[ink], "black", 2)
            draw.text((a, b - 16), ink, "black", font, "ms", stroke_width=3, stroke_fill="white")
        panels.append(titled(run.name, panel))
    about = "Small: a picture of one object. Large: the texts \"a red thing\" and so on."
    return sheet([panels, lines(about)], path, 2 * len(runs))


# -------------------------------------------------------------------------------- the command
KINDS = {"align": align_sheet, "cam": functools.partial(align_sheet, cam=True), "map": draw_map,
         "retrieval": draw_retrieval, "segmentation": draw_segmentation}


def draw_run(folders, data=None, n=None, device="cpu", out=None, images=None, how="crop", own=None,
             kind="align"):
    """A run folder, or several -> the paths of the sheet, and of align's page and curves.png.
    n pictures of data, images: as for eval.evaluate; own: a Sample to draw in their place."""
    folders = [folders] if isinstance(folders, str) else folders
    runs, n = open_runs(folders, device), n or {"retrieval": 100, "map": 300}.get(kind, 6)
    if not (own or data):
        data, images = evaluation.own_data(folders[0], runs[0].args)
    if kind in ("map", "segmentation") and (own or data != "scenes"):
        raise UserError(f"{kind} needs to know what is where: take --data scenes, no --image")
    if data == "scenes" and not own:
        samples = [draw_scenes(n, runs[0].args.seed, run.model.config["image_size"], kind)
                   for run in runs]
    else:  # the same for all runs, and read once
        photos = [own] if own else read_photos(data, images, n)
        if how == "pad":
            photos = [x._replace(image=ImageOps.pad(x.image, 2 * [max(x.image.size)],
                                                    color="white")) for x in photos]
        samples = [photos] * len(runs)
    out = KINDS[kind](runs, samples, out or evaluation.place(folders[0], f"{kind}.png"))
    if kind != "align":
        return [out]
    curves = []
    if not own and all(os.path.isfile(os.path.join(folder, "log.csv")) for folder in folders):
        curves = [draw_curves(folders, os.path.join(os.path.dirname(out), "curves.png"))]
    return [out, align_page(runs, samples, os.path.splitext(out)[0] + ".html", curves), *curves]


def main():
    ap = argparse.ArgumentParser(description=f"Draw {', '.join(KINDS)} or curves of runs.")
    add = ap.add_argument
    add("runs", nargs="+", metavar="RUN", help="what to draw (align), then folders, weights' files")
    add("--image", help="a picture of your own")
    add("--text", help="what it shows, as in \"a photo of a balloon\"")
    add("--words", nargs="+", help="words or phrases to mark (default: all but a, on, left ...)")
    add("--fit", default="crop", choices=("crop", "pad"), help="a central square, or all, padded")
    add("--data", help="scenes, or as train.py --data (default: what the run is for)")
    add("--images", help="the folder of the pictures that a JSON file names")
    add("--n", type=int, help="pictures (6; retrieval 100, map 300)")
    add("--out", help="the PNG to write (default: RUN/align.png, align-IMAGE.png, curves.png ...)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (auto)")
    args, own, kind = ap.parse_args(), None, "align"
    device, runs = pick_device(args.device), args.runs
    if runs[0] in ("curves", *KINDS):
        kind, *runs = runs
    if not runs:
        raise UserError(f"{kind} of what? Name a run: python visualize.py {kind} runs/sparc")
    if kind == "curves":
        return print(draw_curves(runs, args.out))
    if bool(args.image) != bool(args.text) or (args.words and not args.image):
        raise UserError("--image and --text go together, and --words marks words of that text")
    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: at least one picture")
    if args.image:
        own = Sample(open_image(args.image, 2 * SIDE), args.text, args.words)
        name = f"{kind}-{pathlib.Path(args.image).stem}.png"
        args.out = args.out or evaluation.place(runs[0], name)
        if args.fit == "crop" and own.image.width != own.image.height:
            print(f"note: {args.image} is cut to a square: --fit pad shows all", file=sys.stderr)
    print(*draw_run(runs, args.data, args.n, device, args.out, args.images, args.fit, own, kind))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"visualize.py: {e}")
