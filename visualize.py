"""Pictures of what a model has learned, and a page to click through: which word looks where.

    python visualize.py runs/sparc                          # -> runs/sparc/align.png, align.html
    python visualize.py runs/sparc runs/filip runs/clip     # the same words, run below run
    python visualize.py runs/sparc --image dog.jpg --text "a dog eats ice cream" --words "ice cream"
    python visualize.py curves runs/sparc runs/clip         # log.csv -> runs/sparc/curves.png

Covers: FILIP 4.5, Figure 2 (each patch carries the index of its best token, m_k of eq. 4), if a run
is FILIP's; for runs with SPARC's loss, the weights of its eqs. 2 to 4. Differs: the papers show no
single words. Here a word, the mean of its tokens, is bright where it looks, on one scale for all.
"""
import argparse, base64, collections, csv, io, itertools, json, math, os, pathlib, re, sys, types
import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
import eval as evaluation
from data import Scenes, center_crop, open_dataset, open_image
from losses import OBJECTIVES
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
Sample = collections.namedtuple("Sample", "image text wanted things masks",
                                defaults=(None, {}, torch.zeros(0, 1, 1)))


def open_runs(folders, device="cpu"):
    names = evaluation.run_names(folders)
    return [Run(name, *evaluation.load_run(folder, device)) for name, folder in zip(names, folders)]


def draw_scenes(n, seed, size):
    """n test scenes of two objects -> [Sample]."""
    samples = []
    for scene in Scenes(n, seed, size, "test", objects=(2, 2)):
        things = {w.text: w.thing for w in scene["words"] if w.kind in ("colour", "shape")}
        masks = torch.from_numpy(scene["masks"])
        samples.append(Sample(scene["image"], scene["caption"], list(things), things, masks))
    return samples


def read_photos(data, images, n):
    """The first n pictures of data that can be read -> [Sample]. Raises UserError if none can."""
    pairs = open_dataset(data, images=images)
    samples = [Sample(image, pairs.captions[i][0])
               for i, image in itertools.islice(pairs.good(2 * SIDE), n)]
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
        name = "softmax weights" if run.args.softmax else "weights, eqs. 3 and 4"
        means = f"dark: an equal share of the word's weight or less, bright: {FULL} times or more"
    ids = run.tok([text], run.model.context_length)[0][0, 1:T.shape[1] - 1].tolist()
    tokens = ["[BOS]", *(run.tok.symbols[i].replace("</w>", "") for i in ids), "[EOS]"]
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


# -------------------------------------------------------------------------------------- words
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
    lost = dict.fromkeys(word for word, at in words if at[-1] >= length - 1)
    if lost:
        print(f"note: the text is cut to {length} tokens, wholly or in part cut off: "
              f"{', '.join(lost)}", file=sys.stderr)
    return [(word, [p for p in at if p < length - 1]) for word, at in words if at[0] < length - 1]


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


def letters(text, colour="black", most=4 * (SIDE + MARGIN)):
    """A line of text as a picture, in smaller letters if it would be wider than `most`."""
    length = max(1, ImageFont.load_default(TEXT).getlength(text))
    font = ImageFont.load_default(TEXT * min(1, most / length))
    out = Image.new("RGB", (math.ceil(min(length, most)), int(1.3 * TEXT)), "white")
    ImageDraw.Draw(out).text((0, TEXT), text, colour, font=font, anchor="ls")
    return out


def lines(text):
    """Words as pictures, so that flow can break lines."""
    return [letters(word) for word in text.split()]


def titled(title, picture):
    return flow([letters(title, most=picture.width), picture], picture.width, 0)


def sheet(blocks, path, columns=COLUMNS):
    """Write blocks, each the pictures that flow lays out, one below the other: a PNG -> its path"""
    width = columns * (SIDE + MARGIN) - MARGIN
    out = flow([flow(block, width) for block in blocks if block], width, 2 * MARGIN)
    out = ImageOps.expand(out, 2 * MARGIN, "white")
    write(path, lambda temporary: out.save(temporary, format="PNG"))
    return path


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


# ---------------------------------------------------------------------------- align.png
def align_row(run, sample, numbered, title):
    """One run, one sample -> text, panels, (hit, chance) of words with objects, what is shown."""
    image, grid = sample.image, run.model.visual.grid
    a = align(run, image, sample.text)
    words = seen_words(run, sample, len(a.tokens))
    marked = {p for _, at in words for p in at}
    text = [letters(f"{k} {token}" if numbered else token, RED if k in marked else GREY)
            for k, token in enumerate(a.tokens) if numbered or 0 < k < len(a.tokens) - 1]
    if image.width != image.height:
        share = min(image.size) / max(image.size)
        text.append(letters(f"(the middle {share:.0%} of the picture)", GREY))
    few = max(image.size) < 100  # pixels have hard edges then
    picture = ImageOps.fit(image, (SIDE, SIDE), 0 if few else Image.Resampling.BICUBIC)
    panels, hits = [titled(title, picture)], []
    if numbered:
        panels.append(titled("best token of each patch", grid_panel(picture, a.best, marked, grid)))
    for word, at in words:
        x, hit, mask = a.shown[at].mean(0), None, None
        if word in sample.things:
            thing, cover = sample.things[word], evaluation.patch_coverage(sample.masks, grid)
            found = evaluation.word_hits(x.argmax()[None], torch.tensor([thing]), cover)
            hits.append([number.item() for number in found])
            hit, mask = hits[-1][0], sample.masks[thing]
        title = f"{word} (mean of {len(at)} tokens)" if len(at) > 1 else word
        panel = word_panel(picture, brightness(x, a), int(x.argmax()), grid, hit, mask)
        panels.append(titled(title, panel))
    return text, panels, hits, f"{a.name} ({a.means})."


def align_sheet(runs, samples, path):
    """samples: for each run, the same pictures, of which the first are shown -> the PNG's path."""
    numbered = any("filip" in run.args.loss for run in runs)
    blocks, hits, legend, said = [], {run.name: [] for run in runs}, [], None
    for shown in [*zip(*samples)][:SHEET]:
        for run, sample in zip(runs, shown):
            title = run.name if len(runs) > 1 else ""
            text, panels, found, name = align_row(run, sample, numbered, title)
            tokens = (sample.text, run.tok.vocab_size)  # another vocabulary may split it otherwise
            blocks += [[] if tokens == said else text, panels]
            hits[run.name] += found
            legend.append(name)
            said = tokens
    columns = max(4, *map(len, blocks[1::2]))
    marks = "Dot: the word's best patch."
    if any(hits.values()):
        marks = "White line: the object that the word names. Tick: its best patch is on it."
    blocks.append(lines(" ".join([*dict.fromkeys(legend), marks])))
    for name, found in hits.items():
        if found:
            good, chance = map(sum, zip(*found))
            blocks.append(lines(f"{name}: {good} of {len(found)} words have their best patch on "
                                f"their object; random patches: {chance:.1f}"))
    return sheet(blocks, path, min(COLUMNS, columns))


# ------------------------------------------------------------------------------- align.html
def page_view(run, sample):
    """What the page needs of one picture as one run sees it."""
    grid, masks = run.model.visual.grid, sample.masks
    a = align(run, sample.image, sample.text)
    words = [{"word": word, "at": at, "thing": sample.things.get(word, -1)}
             for word, at in find_words(run.tok, sample.text, small=())
             if at[-1] < len(a.tokens) - 1]
    cover = evaluation.patch_coverage(masks, grid) >= 0.25 if len(masks) else masks  # (N, P)
    products = base64.b64encode(a.products.float().numpy().tobytes()).decode()
    return {"grid": grid, "words": words, "products": products, "side": masks.shape[-1],
            "outlines": [outline_path(mask) for mask in masks], "shown": a.name, "means": a.means,
            "on": [row.nonzero().flatten().tolist() for row in cover]}


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
        sigma = evaluation.loss_options(run.args).get("sigma")
        sigma = 1 / run.model.visual.grid ** 2 if sigma is None else sigma
        views = [page_view(run, sample) for sample in mine]
        data["runs"].append({"name": run.name, "sigma": sigma, "views": views})
    text = json.dumps(data).replace("<", "\\u003c")  # so no text can end the script
    charts = [f'<img alt="what log.csv holds, over steps" src="{data_url(Image.open(chart))}">'
              for chart in curves]
    html = PAGE.replace("@CURVES@", "".join(charts)).replace("@DATA@", text)
    write(path, lambda temporary: pathlib.Path(temporary).write_text(html, encoding="utf-8"))
    return path


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Words and patches</title>
<style>
:root { color-scheme: light dark; --blue: #0072b2; font: 16px/1.5 system-ui, sans-serif }
@media (prefers-color-scheme: dark) { :root { --blue: #56b4e9 } }
body { margin: auto; padding: 0 12px; max-width: 1400px }
form, label, figure div { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center }
main { display: grid; gap: 0 2em; grid: auto / repeat(auto-fill, minmax(min(20em, 100%), 1fr)) }
figure { margin: 0; min-width: 0 } figure p { min-height: 3em; margin: 0 0 1em }
figure div { gap: 6px; margin: 8px 0 } svg { width: 100%; touch-action: manipulation }
image[href^="data:image/png"] { image-rendering: pixelated }
path, .frame { fill: none; stroke: #fff; stroke-width: 3; vector-effect: non-scaling-stroke;
  pointer-events: none; filter: drop-shadow(0 0 .02px #000) }
.frame { stroke-dasharray: 7 4 } button, select { font: inherit; min-height: 36px }
button { padding: 2px 8px; border: 1px solid #8888; border-radius: 6px; overflow-wrap: anywhere;
  background: color-mix(in srgb, var(--blue) calc(var(--light) * 60%), transparent) }
button[aria-pressed=true] { box-shadow: 0 0 0 3px var(--blue) }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px } img { max-width: 100% }
</style>
<h1>Where does each word look?</h1>
<p>Point at a word (tap it, or press Tab): its patches stay bright. Point at a patch (tap it, or
use arrow keys): its words are coloured. A tick: the best patch is on the object, a cross: it is
not.</p>
<form><label>Run <select id="run"></select></label><span id="means"></span>
<label>sigma <input type="range" id="sigma" min="0" max="1" step="any">
<output id="number" for="sigma"></output></label></form>
<p id="score" role="status"></p><main></main>@CURVES@
<script type="application/json" id="data">@DATA@</script>
<script>
const find = name => document.querySelector(name), picked = [];
const data = JSON.parse(find("#data").textContent), sum = s => s.reduce((a, b) => a + b, 0);
for (const run of data.runs) find("#run").add(new Option(run.name));

function weights(s, sigma, softmax) {  // losses.sparc_alignment of one word: s (P) products
  const low = Math.min(...s), high = Math.max(...s);
  let kept = s.map(x => (x - low) / (high - low)).map(x => x >= sigma ? x : 0);
  if (softmax) kept = s.map(x => Math.exp(x - high));
  else if (high - low <= 1e-6 * Math.max(1, Math.abs(high))) kept = s.map(() => 1);
  const total = sum(kept);
  return kept.map(x => x / total);
}
function measure(view, sigma) {  // gives each word what it shows (P), its brightness (P)
  const bytes = Uint8Array.from(atob(view.products), c => c.charCodeAt(0)), P = view.grid ** 2;
  const all = new Float32Array(bytes.buffer), tokens = Array.from({length: all.length / P},
    (_, l) => all.slice(l * P, l * P + P));
  const similar = view.shown == "similarity", softmax = view.shown == "softmax weights";
  const rows = similar ? tokens : tokens.map(s => weights(s, sigma, softmax));
  const above = (s, mean = sum(s) / P) => s.map(x => Math.max(0, x - mean));
  const most = Math.max(1e-6, ...rows.slice(1, -1).flatMap(s => [...above(s)]));
  for (const word of view.words) {
    word.shown = rows[0].map((_, p) => sum(word.at.map(l => rows[l][p])) / word.at.length);
    word.best = word.shown.indexOf(Math.max(...word.shown));
    word.hit = view.on[word.thing]?.includes(word.best);
    word.light = similar ? above(word.shown).map(x => x / most) : word.shown.map(
      x => Math.min(1, Math.log2(Math.max(1, x * P)) / Math.log2(data.full)));
  }
}
function describe(view, {word, patch}) {
  const place = p => `row ${Math.floor(p / view.grid) + 1}, column ${p % view.grid + 1}`;
  const {shown, best, hit} = view.words[word] ?? {};
  const on = {true: ", on its object", false: ", not on its object"}[hit] ?? "";
  if (shown) return `${view.words[word].word}: best patch in ${place(best)}${on}; ` +
    `${shown.filter(x => x > 0).length} of ${shown.length} patches are above 0`;
  const words = view.words.filter(word => word.light[patch] > 0).map(word => word.word);
  return patch >= 0 ? place(patch) + ": " + (words.join(", ") || "no word") : "";
}
function draw(view, i) {
  const n = view.grid, figure = find("main").appendChild(document.createElement("figure"));
  const cell = p => `<rect x="${p % n}" y="${Math.floor(p / n)}" width="1" height="1"/>`;
  figure.innerHTML = `<svg viewBox="0 0 ${n} ${n}" tabindex="0" role="img" aria-label="picture
    ${i + 1}"><image href="${data.pictures[i]}" width="${n}" height="${n}"/>` +
    Array.from({length: n * n}, (_, p) => cell(p)).join("") + `<path transform="scale(
    ${n / view.side})"/><rect class="frame" width="1" height="1"/></svg><div></div>
    <p aria-live="polite"></p>`;
  const [svg, words, say] = figure.children, [frame, outline] = [...svg.children].reverse();
  const veil = [...svg.children].slice(1, 1 + n * n), buttons = view.words.map((word, k) => {
    const button = words.appendChild(document.createElement("button"));
    button.onmouseenter = button.onfocus = button.onclick = () => show({word: k});
    button.textContent = word.word + ({true: " \u2713", false: " \u2717"}[word.hit] ?? "");
    return button;
  });
  function show(pick) {
    const word = view.words[pick.word], p = word ? word.best : pick.patch;
    picked[i] = pick;
    veil.forEach((rect, q) => rect.style.opacity = word ? (1 - data.dim) * (1 - word.light[q]) : 0);
    buttons.forEach((button, k) => {
      button.setAttribute("aria-pressed", k == pick.word);
      button.style.setProperty("--light", view.words[k].light[pick.patch] ?? 0);
    });
    outline.setAttribute("d", view.outlines[word?.thing] ?? "");
    frame.setAttribute("visibility", p >= 0 ? "visible" : "hidden");
    if (p >= 0) frame.setAttribute("transform", `translate(${p % n} ${Math.floor(p / n)})`);
    say.textContent = describe(view, pick);
  }
  svg.onpointermove = svg.onclick = event => show({patch: veil.indexOf(event.target)});
  svg.onkeydown = event => {
    const to = (picked[i].patch ?? -1) + {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -n,
      ArrowDown: n}[event.key];
    if (to >= 0 && to < n * n) show({patch: to});
    if (!isNaN(to)) event.preventDefault();
  };
  show(picked[i] ?? {});
}
function build() {
  const run = data.runs[find("#run").selectedIndex], sigma = find("#sigma");
  find("#number").value = sigma.valueAsNumber.toFixed(3);
  find("main").replaceChildren();
  run.views.forEach(view => measure(view, sigma.valueAsNumber));
  run.views.forEach(draw);
  const words = run.views.flatMap(view => view.words).filter(word => word.hit !== undefined);
  find("#score").textContent = words.length ? `${words.filter(word => word.hit).length} of ` +
    `${words.length} words have their best patch on their object` : "";
}
find("#sigma").oninput = build;
find("#run").onchange = () => {
  const run = data.runs[find("#run").selectedIndex], {shown, means} = run.views[0];
  find("#sigma").value = run.sigma;
  find("#sigma").disabled = !shown.includes("eqs");
  find("#means").textContent = `${shown} (${means})`;
  build();
};
find("#run").onchange();
</script></html>
"""


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
        if any(curves):
            charts.append(titled(name, chart(curves)))
    legend = [letters(folder, colour) for folder, colour in zip(folders, COLOURS)]
    return sheet([legend, charts], out)


# -------------------------------------------------------------------------------- the command
def draw_run(folders, data=None, n=6, device="cpu", out=None, images=None, how="crop", own=None):
    """A run folder, or several -> the paths of the sheet, the page beside it, and of curves.png.
    n pictures of data, images: as for eval.evaluate; own: a Sample to draw in their place."""
    folders = [folders] if isinstance(folders, str) else folders
    runs, curves = open_runs(folders, device), []
    if not (own or data):
        data, images = evaluation.own_data(folders[0], runs[0].args)
    if data == "scenes" and not own:
        seed = runs[0].args.seed
        samples = [draw_scenes(n, seed, run.model.config["image_size"]) for run in runs]
    else:  # the same for all runs, and read once
        photos = [own] if own else read_photos(data, images, n)
        if how == "pad":
            photos = [x._replace(image=ImageOps.pad(x.image, 2 * [max(x.image.size)],
                                                    color="white")) for x in photos]
        samples = [photos] * len(runs)
    out = out or evaluation.place(folders[0], "align.png")
    align_sheet(runs, samples, out)
    if not own and all(os.path.isfile(os.path.join(folder, "log.csv")) for folder in folders):
        curves = [draw_curves(folders, os.path.join(os.path.dirname(out), "curves.png"))]
    page = align_page(runs, samples, os.path.splitext(out)[0] + ".html", curves)
    return [out, page, *curves]


def main():
    ap = argparse.ArgumentParser(description="Draw what runs have learned, into the first folder.")
    add = ap.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders, files of weights; or `curves RUN ...`")
    add("--image", help="a picture of your own")
    add("--text", help="what it shows, as in \"a photo of a balloon\"")
    add("--words", nargs="+", help="words or phrases to mark (default: all but a, on, left ...)")
    add("--fit", default="crop", choices=("crop", "pad"), help="a central square, or all, padded")
    add("--data", help="scenes, or as train.py --data (default: what the run is for)")
    add("--images", help="the folder of the pictures that a JSON file names")
    add("--n", type=int, default=6, help=f"pictures on the page; the first {SHEET} make the sheet")
    add("--out", help="the PNG to write (default: RUN/align.png, align-IMAGE.png, curves.png)")
    add("--device", default="auto", choices=DEVICES, help="where to compute (auto)")
    args, own = ap.parse_args(), None
    device = pick_device(args.device)
    if args.runs[0] == "curves" and len(args.runs) > 1:
        return print(draw_curves(args.runs[1:], args.out))
    if bool(args.image) != bool(args.text) or (args.words and not args.image):
        raise UserError("--image and --text go together: a picture, and the text to align with it; "
                        "--words marks words of that text")
    if args.n < 1:
        raise UserError(f"--n {args.n}: at least one picture")
    if args.image:
        own = Sample(open_image(args.image, 2 * SIDE), args.text, args.words)
        name = f"align-{pathlib.Path(args.image).stem}.png"
        args.out = args.out or evaluation.place(args.runs[0], name)
        if args.fit == "crop" and own.image.width != own.image.height:
            print(f"note: {args.image} is cut to a square: --fit pad shows all", file=sys.stderr)
    print(*draw_run(args.runs, args.data, args.n, device, args.out, args.images, args.fit, own))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"visualize.py: {e}")
