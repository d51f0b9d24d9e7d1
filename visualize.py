"""Pictures of what a model has aligned: FILIP's Figure 2, and where each word looks.

    python visualize.py runs/sparc                # six scenes -> runs/sparc/align.png
    python visualize.py runs/sparc --image dog.jpg --text "a dog eats ice cream" --words "ice cream"

Covers: FILIP 4.5 (each patch carries the index of its best token, m_k of its eq. 4) and, for runs
with SPARC's loss, the weights of its eqs. 2 to 4.

From left to right: the picture, as the model sees it (its central square, or with --fit pad all of
it); its patches with the index of their best token, in red on a bright patch where the token
belongs to a word asked for, in white on a dimmed one elsewhere; then a panel for each of these
words, six in a row, its best patch framed. Its title says what it shows: the weights after eqs. 3
and 4 with the run's own sigma, or the similarity of the word and each patch (for FILIP the cosine,
for other objectives the product). A word of several tokens, or several words asked for as one,
show the mean over their tokens.

Differs from the papers: FILIP's figure shows patches only. A panel's colours run from its lowest
value to its highest.
"""
import argparse
import math
import os
import re
import sys
import torch
from PIL import Image, ImageDraw, ImageFont
import eval as evaluation
from data import BadRow, Scenes, Word, clean, fit, open_dataset, open_image, word_tokens
from losses import OBJECTIVES, sparc_alignment
from model import DEVICES, UserError, pick_device, write

SIDE, MARGIN, LINE = 280, 10, 22  # pixels: of one panel, between panels, of one line of text
COLUMNS = 6  # panels side by side
SMALL_WORDS = set("a an the of in on at by to with and or is are there it its his her their this "
                  "that while for from left right above below . , picture photo".split())


@torch.no_grad()
def align(model, tok, args, image, text):
    """One RGB picture, one text -> weights or similarities of words and patches (L,P), the name of
    what they are, the best token of each patch (P,), the tokens as strings. args: of load_run."""
    objective, options = OBJECTIVES[args.loss], evaluation.loss_options(args)
    _, V = evaluation.encode_images(model, [image])
    _, T, M = evaluation.encode_texts(model, tok, [text])
    best = evaluation.best_words(V, T, M)[0]
    if "sigma" in objective.options:
        own = {name: options[name] for name in ("sigma", "softmax") if name in options}
        s = sparc_alignment(V, T, **own)[0]
        name = "softmax weights" if own.get("softmax") else "weights, eqs. 3 and 4"
    else:
        s, name = evaluation.word_patch_products(objective, V, T)[0], "similarity"
    marks = {tok.bos: "[BOS]", tok.eot: "[EOS]"}
    ids = tok([text], model.context_length)[0][0, :len(s)].tolist()
    tokens = [marks.get(i, tok.symbols[i].replace("</w>", "")) for i in ids]
    return s.cpu(), name, best.cpu(), tokens


# ------------------------------------------------------------------------------------- panels
def heat(x):
    """Number in 0..1 -> colour from dark blue over red to yellow."""
    red, green, blue = 2.2 * x - 0.3, 2 * x - 1, 0.45 - abs(x - 0.35)
    return tuple(int(255 * min(1, max(0, c))) for c in (red, green, blue))


def cell(p, grid):
    """Corners of patch p in a panel, in pixels: left, top, right, bottom."""
    step, x, y = SIDE / grid, p % grid, p // grid
    return x * step, y * step, (x + 1) * step, (y + 1) * step


def grid_panel(picture, best, marked, grid):
    """FILIP's Figure 2 of one picture (SIDE, SIDE). best (P,); marked: the tokens in red."""
    shade = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(shade), ImageFont.load_default(int(SIDE / grid * 0.45))
    for p, token in enumerate(best.tolist()):
        fill, ink, stroke = (0, 0, 0, 120), (255, 255, 255, 235), 0
        if token in marked:
            fill, ink, stroke = (255, 255, 255, 40), (230, 0, 0, 255), 2
        left, top, right, bottom = cell(p, grid)
        draw.rectangle((left, top, right, bottom), fill=fill, outline=(255, 255, 255, 110))
        draw.text(((left + right) / 2, (top + bottom) / 2), str(token), ink, font=font, anchor="mm",
                  stroke_width=stroke, stroke_fill=(255, 255, 255, 255))
    return Image.alpha_composite(picture.convert("RGBA"), shade).convert("RGB")


def word_panel(picture, s, grid):
    """One word's number for every patch (P,), lowest to highest, over the greyed picture."""
    x = (s - s.min()) / (s.max() - s.min()).clamp(min=1e-6)
    cells = Image.new("RGB", (grid, grid))
    cells.putdata([heat(number) for number in x.tolist()])
    cells = cells.resize(picture.size, Image.Resampling.NEAREST)
    out = Image.blend(picture.convert("L").convert("RGB"), cells, 0.6)
    ImageDraw.Draw(out).rectangle(cell(int(s.argmax()), grid), outline="white", width=4)
    return out


def draw_tokens(row, top, tokens, marked):
    """The text below the panels, each token with its index, the marked ones in red -> its end."""
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(15)
    x, y = MARGIN, top
    for k, token in enumerate(tokens):
        label, ink = f"{k} {token}", (90, 90, 90)
        if k in marked:
            ink = (200, 0, 0)
        if x + draw.textlength(label, font=font) > row.width - MARGIN:
            x, y = MARGIN, y + LINE
        draw.text((x, y), label, ink, font=font)
        x += draw.textlength(label, font=font) + 14
    return y + LINE


def draw_row(model, tok, args, image, text, words, how="crop"):
    """words: [(word, positions of its tokens)] to mark -> its panels, the text below. how: fit's"""
    grid, size = model.visual.grid, model.config["image_size"]
    picture, head = fit(image, size, how), ""
    if how == "crop" and image.width != image.height:
        head = f"the middle {min(image.size) / max(image.size):.0%} of the picture"
    s, name, best, tokens = align(model, tok, args, picture, text)
    way = Image.Resampling.NEAREST if size < 100 else Image.Resampling.BICUBIC
    picture = picture.resize((SIDE, SIDE), way)
    seen = [(word, [p for p in at if p < len(tokens) - 1]) for word, at in words]
    lost = [word for (word, at), (_, left) in zip(words, seen) if left != at]
    if lost:
        print(f"note: the text is cut to {len(tokens)} tokens, wholly or in part cut off: "
              f"{', '.join(dict.fromkeys(lost))}", file=sys.stderr)
    seen = [(word, at) for word, at in seen if at]
    marked = {p for _, at in seen for p in at}
    numbered = grid_panel(picture, best, marked, grid)
    panels = [(head, picture), ("best token of each patch", numbered)]
    for word, at in seen:
        word = f"{word} (mean of {len(at)} tokens)" if len(at) > 1 else word
        panels.append((f"{word}: {name}", word_panel(picture, s[at].mean(0), grid)))
    bottom = math.ceil(len(panels) / COLUMNS) * (SIDE + LINE)
    width = COLUMNS * (SIDE + MARGIN) + MARGIN
    row = Image.new("RGB", (width, bottom + (2 + len(tokens)) * LINE), "white")
    draw = ImageDraw.Draw(row)
    for k, (title, panel) in enumerate(panels):
        left, top = MARGIN + k % COLUMNS * (SIDE + MARGIN), k // COLUMNS * (SIDE + LINE)
        row.paste(panel, (left, top + LINE))
        length = draw.textlength(title, font=ImageFont.load_default(15))
        font = ImageFont.load_default(15 * min(1, 0.92 * SIDE / max(1, length)))
        draw.text((left, top + 2), title, "black", font=font)
    end = draw_tokens(row, bottom + 4, tokens, marked)
    return row.crop((0, 0, width, max(bottom + 2 * LINE, end) + MARGIN))


# ------------------------------------------------------------------------------ what to draw
def find_words(tok, text, wanted=None):
    """-> [(word, positions of its tokens)]: the wanted words or phrases wherever they stand, or all
    words but articles and the like. Raises UserError if one that is wanted is not there."""
    text, found = clean(text), []
    pieces = list(tok.words.finditer(text))  # "t-shirt" has three, a number as many as digits
    tokens = word_tokens(tok, [Word(piece[0]) for piece in pieces])
    if not wanted:
        words = [word.strip(".,;:!?()\"'") for word in text.split()]
        wanted = [word for word in words if word and word not in SMALL_WORDS]
    wanted = dict.fromkeys(map(clean, wanted))
    for word in wanted:  # but not inside a longer number
        for match in re.finditer(rf"(?<!\d(?=\d)){re.escape(word)}(?!(?<=\d)\d)", text):
            inside = [k for k, piece in enumerate(pieces)
                      if match.start() <= piece.start() and piece.end() <= match.end()]
            if inside and "".join(pieces[k][0] for k in inside) == word.replace(" ", ""):
                found.append((word, [p for k in inside for p in tokens[k]]))
    missing = [word for word in wanted if word not in dict(found)]
    if missing:
        raise UserError(f"--words {' '.join(missing)}: not in the text {text!r}")
    return sorted(found, key=lambda word: word[1])


def first_thing(tok, scene):
    """The words of a scene's caption that are about the first object it names."""
    words = scene["words"]
    first = next(w.thing for w in words if w.thing >= 0)
    return [(w.text, at) for w, at in zip(words, word_tokens(tok, words)) if w.thing == first]


def stack(rows, path):
    """Write rows of pictures, one below the other, as a PNG -> its path."""
    out = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        out.paste(row, (0, top))
        top += row.height

    def save(temporary):
        out.save(temporary, format="PNG")
    write(path, save)
    return path


def draw_run(folder, data=None, n=6, device="cpu", out=None, images=None, how="crop"):
    """n test scenes, or the first n pictures that can be read of data and images -> [align.png]"""
    model, tok, args = evaluation.load_run(folder, device)
    if not data:
        data = args.data if args.data == "scenes" else args.val
        images = getattr(args, "images", None)
    if not data:
        raise UserError(f"{folder} was trained on {args.data}: name a picture with --image and "
                        f"--text, or --data PATH")
    rows, bad = [], "it is empty"
    if data == "scenes":
        scenes = Scenes(n, args.seed, model.config["image_size"], "test", objects=(2, 4))
        for i in range(n):
            s = scenes[i]
            words = first_thing(tok, s)
            rows.append(draw_row(model, tok, args, s["image"], s["caption"], words))
    else:
        pairs = open_dataset(data, images=images)
        for i in range(len(pairs)):
            try:
                image, text = pairs.pair(i, size=model.config["image_size"])
                rows.append(draw_row(model, tok, args, image, text, find_words(tok, text), how))
            except BadRow as e:
                bad = e
            if len(rows) == n:
                break
    if not rows:
        raise UserError(f"{data} has no picture that can be read ({bad})")
    return [stack(rows, out or evaluation.place(folder, "align.png"))]


def main():
    ap = argparse.ArgumentParser(description="Draw a run's word-patch alignment: RUN/align.png.")
    ap.add_argument("run", help="run folder, such as runs/sparc, or file of OpenAI CLIP's weights")
    ap.add_argument("--image", help="a picture of your own")
    ap.add_argument("--text", help="what it shows, as in \"a photo of a balloon\"")
    ap.add_argument("--words", nargs="+",
                    help="words or phrases to mark (default: all but a, on, left ...)")
    ap.add_argument("--fit", default="crop", choices=("crop", "pad"), help="show a wide picture's "
                    "central square, as in training (default), or all of it")
    ap.add_argument("--data", help="scenes, or as train.py --data (default: what the run is for)")
    ap.add_argument("--images", help="the folder of the pictures that a JSON file names")
    ap.add_argument("--n", type=int, default=6, help="how many scenes or pictures")
    ap.add_argument("--out", help="the PNG to write (default: RUN/align.png, align-IMAGE.png)")
    ap.add_argument("--device", default="auto", choices=DEVICES, help="where to compute (auto)")
    args = ap.parse_args()
    if bool(args.image) != bool(args.text):
        raise UserError("--image and --text go together: a picture, and the text to align with it")
    if args.n < 1:
        raise UserError(f"--n {args.n}: at least one picture")
    if args.words and not args.image:
        raise UserError("--words marks words of --text, for the picture --image")
    device = pick_device(args.device)
    if not args.image:
        print(*draw_run(args.run, args.data, args.n, device, args.out, args.images, args.fit))
        return
    model, tok, saved = evaluation.load_run(args.run, device)
    image = open_image(args.image, model.config["image_size"])
    words = find_words(tok, args.text, args.words)
    if args.fit == "crop" and image.width != image.height:
        print(f"note: {args.image} is cut to a square: --fit pad shows all", file=sys.stderr)
    row = draw_row(model, tok, saved, image, args.text, words, args.fit)
    name = os.path.splitext(os.path.basename(args.image))[0]
    print(stack([row], args.out or evaluation.place(args.run, f"align-{name}.png")))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"visualize.py: {e}")
