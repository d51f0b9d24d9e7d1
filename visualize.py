"""Pictures of what a model has aligned: FILIP's Figure 2, and where each word looks.

    python visualize.py runs/sparc                                                       # six scenes -> runs/sparc/align.png
    python visualize.py runs/sparc --image dog.jpg --text "a dog on the beach" --words dog beach

Covers: FILIP 4.5 (word-patch alignment: each patch carries the index of its best token, eq. 4's m_k) and SPARC 2 (a word's patches).

From left to right: the picture; its patches with their best token's index, in red on bright patches where that token belongs to the
words asked for, in white on dimmed ones elsewhere; then for each of these words its similarity to all patches, the best patch framed.

Differs from the papers: FILIP shows patches only; a word cut into several tokens shows its last one's map.
"""
import argparse, os
import torch
from PIL import Image, ImageDraw, ImageFont
import eval as evaluation
from data import WORDS, Scenes, UserError, center_crop, clean, open_dataset, open_image, word_tokens, write, Word
from losses import unit

SIDE, MARGIN, LINE = 280, 10, 22                                     # of one panel, between panels, of one line of text, in pixels
SMALL_WORDS = set("a an the of in on at by to with and or is are there it its his her their this that while for from left right above below . , "
                  "picture photo".split())


@torch.no_grad()
def align(model, tok, loss, image, text):
    """One RGB picture, one text -> similarity of tokens and patches (L, P), best token of each patch (P,), the tokens as strings."""
    v, V = evaluation.encode_images(model, [image])
    t, T, M = evaluation.encode_texts(model, tok, [text])
    n = int(M.sum())
    cosine = unit(T[0, :n]) @ unit(V[0]).T
    ids = tok([text], model.context_length)[0][0, :n].tolist()
    tokens = ["[BOS]" if i == tok.bos else "[EOS]" if i == tok.eot else tok.symbols[i].replace("</w>", "") for i in ids]
    return (cosine if "filip" in loss else T[0, :n] @ V[0].T).cpu(), cosine.argmax(0).cpu(), tokens


def heat(x):
    """Number in 0..1 -> colour from dark blue over red to yellow."""
    return tuple(int(255 * min(1, max(0, c))) for c in (2.2 * x - 0.3, 2 * x - 1, 0.45 - abs(x - 0.35)))


def grid_panel(picture, best, marked, grid):
    """FILIP's Figure 2 for one picture (SIDE, SIDE)."""
    step = SIDE / grid
    shade = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    draw, font = ImageDraw.Draw(shade), ImageFont.load_default(int(step * 0.45))
    for p, token in enumerate(best.tolist()):
        x, y = p % grid * step, p // grid * step
        own = token in marked
        draw.rectangle((x, y, x + step, y + step), fill=(255, 255, 255, 40) if own else (0, 0, 0, 120), outline=(255, 255, 255, 110))
        draw.text((x + step / 2, y + step / 2), str(token), (230, 0, 0, 255) if own else (255, 255, 255, 235), font=font, anchor="mm",
                  stroke_width=2 if own else 0, stroke_fill=(255, 255, 255, 255))
    return Image.alpha_composite(picture.convert("RGBA"), shade).convert("RGB")


def word_panel(picture, s, grid):
    """Similarity of one word to every patch (P,), min-max normalised as SPARC does, over the greyed picture."""
    low, high = s.min(), s.max()
    x = ((s - low) / (high - low).clamp(min=1e-6)).view(grid, grid)
    cells = Image.new("RGB", (grid, grid))
    cells.putdata([heat(v) for v in x.flatten().tolist()])
    out = Image.blend(picture.convert("L").convert("RGB"), cells.resize(picture.size, Image.Resampling.NEAREST), 0.6)
    step, p = SIDE / grid, int(s.argmax())
    ImageDraw.Draw(out).rectangle((p % grid * step, p // grid * step, (p % grid + 1) * step, (p // grid + 1) * step), outline="white", width=4)
    return out


def draw_row(model, tok, loss, image, text, words):
    """words: [(text, token positions)] to mark -> one row of panels with its text below."""
    grid, size = model.visual.grid, model.config["image_size"]
    s, best, tokens = align(model, tok, loss, center_crop(image, size), text)
    picture = center_crop(image, size).resize((SIDE, SIDE), Image.Resampling.NEAREST if size < 100 else Image.Resampling.BICUBIC)
    words = [(w, [p for p in pos if p < len(tokens) - 1]) for w, pos in words]
    words = [(w, pos) for w, pos in words if pos][:4]
    marked = {p for _, pos in words for p in pos}
    panels = [("", picture), ("best token of each patch", grid_panel(picture, best, marked, grid))]
    panels += [(w, word_panel(picture, s[pos[-1]], grid)) for w, pos in words]
    row = Image.new("RGB", (6 * (SIDE + MARGIN) + MARGIN, SIDE + 3 * LINE + MARGIN), "white")
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(15)
    for k, (title, panel) in enumerate(panels):
        row.paste(panel, (MARGIN + k * (SIDE + MARGIN), LINE))
        draw.text((MARGIN + k * (SIDE + MARGIN), 2), title, "black", font=font)
    x, y = MARGIN, SIDE + LINE + 4
    for k, token in enumerate(tokens):
        label = f"{k} {token}"
        if x + draw.textlength(label, font=font) > row.width - MARGIN:
            x, y = MARGIN, y + LINE
        draw.text((x, y), label, (200, 0, 0) if k in marked else (90, 90, 90), font=font)
        x += draw.textlength(label, font=font) + 14
    return row


def find_words(tok, text, wanted=None):
    """-> [(word, token positions)] of the wanted words; None: every word but articles and the like."""
    words = [Word(w) for w in WORDS.findall(clean(text))]
    hit = lambda w: w in wanted if wanted else w not in SMALL_WORDS
    found = [(w.text, pos) for w, pos in zip(words, word_tokens(tok, words)) if hit(w.text)]
    missing = [w for w in wanted or [] if w not in {x.text for x in words}]
    if missing:
        raise UserError(f"--words {' '.join(missing)}: not in the text {text!r}")
    return found


def stack(rows, path):
    out = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    y = 0
    for r in rows:
        out.paste(r, (0, y))
        y += r.height
    write(path, lambda tmp: out.save(tmp, format="PNG"))
    return path


def draw_run(folder, data=None, n=6, device="cpu", out=None):
    """align.png of a run: n test scenes, or the first n pictures of a CSV -> [paths]."""
    model, tok, args = evaluation.load_run(folder, device)
    data = data or (args.data if args.data == "scenes" else args.val)
    if not data:
        raise UserError(f"{folder} was trained on {args.data}: name a picture with --image and --text, or --data FILE.csv")
    rows = []
    if data == "scenes":
        scenes = Scenes(n, args.seed, model.config["image_size"], "test", objects=(2, 4))
        for s in (scenes[i] for i in range(n)):
            first = next(w.thing for w in s["words"] if w.thing >= 0)
            words = [(w.text, pos) for w, pos in zip(s["words"], word_tokens(tok, s["words"])) if w.thing == first]
            rows.append(draw_row(model, tok, args.loss, s["image"], s["caption"], words))
    else:
        pairs = open_dataset(data)
        for i in range(min(n, len(pairs))):
            image, text = pairs.pair(i)
            rows.append(draw_row(model, tok, args.loss, image, text, find_words(tok, text)))
    return [stack(rows, out or os.path.join(folder, "align.png"))]


def main():
    ap = argparse.ArgumentParser(description="Draw the word-patch alignment of a run into RUN/align.png.")
    ap.add_argument("run", help="run folder of train.py, such as runs/sparc")
    ap.add_argument("--image", help="a picture of your own")
    ap.add_argument("--text", help="what it shows, as in \"a photo of a balloon\"")
    ap.add_argument("--words", nargs="+", help="words of the text to mark (default: all but articles and the like)")
    ap.add_argument("--data", help="scenes, or a CSV (default: what the run was trained for)")
    ap.add_argument("--n", type=int, default=6, help="how many scenes, or pictures of the CSV")
    ap.add_argument("--out", help="the PNG to write (default: RUN/align.png)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = ap.parse_args()
    if bool(args.image) != bool(args.text):
        raise UserError("--image and --text go together: a picture, and the text to align with it")
    if args.n < 1:
        raise UserError(f"--n {args.n}: at least one picture")
    if args.words and not args.image:
        raise UserError("--words marks words of --text, for the picture --image")
    if args.image:
        model, tok, saved = evaluation.load_run(args.run, args.device)
        words = find_words(tok, args.text, args.words and [w.lower() for w in args.words])
        row = draw_row(model, tok, saved.loss, open_image(args.image), args.text, words)
        print(stack([row], args.out or os.path.join(args.run, "align.png")))
    else:
        print(*draw_run(args.run, args.data, args.n, args.device, args.out))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"visualize.py: {e}")
