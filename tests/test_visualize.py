"""Tests of visualize.py: what it marks, draws and refuses; the page, in a real browser.

    pytest tests/test_visualize.py
    apt-get install chromium      # or set BROWSER=/path/of/one: without, its tests are skipped
"""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import types
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
import data
import eval as evaluation
import visualize
from data import COLOURS, Scenes, join, normalize, to_tensor
from losses import sparc_alignment
from model import Attention, UserError
from test_data import decode
from test_eval import TOK, make_run

SIDE, STEP, LETTER = visualize.SIDE, visualize.SIDE + visualize.MARGIN, 28  # of panels, of a line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def draw(run, tmp_path, monkeypatch):
    """draw("--text", "...") is the command line with an RGBA picture of 200 x 120 -> the PNG."""
    noise = np.random.RandomState(0).randint(0, 255, (120, 200, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")

    def call(*more, image="own.png", out="out.png"):
        picture = ["--image", str(tmp_path / image)] if image else []
        target = ["--device", "cpu", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["visualize.py", run, *picture, *target, *more])
        visualize.main()
        return Image.open(tmp_path / out)
    return call


def aligned(run, **options):
    """What align returns for one scene, then the scene's patches (1,P,D) and tokens (1,L,D)."""
    opened, = visualize.open_runs([run])
    for name, value in options.items():
        setattr(opened.args, name, value)
    scene = Scenes(1, 0, 56, "test")[0]
    _, V = evaluation.encode_images(opened.model, [scene["image"]])
    _, T, _ = evaluation.encode_texts(opened.model, opened.tok, [scene["caption"]])
    return visualize.align(opened, scene["image"], scene["caption"]), scene, V, T


@pytest.mark.parametrize("loss", ["clip", "sparc", "filip"])
def test_best_tokens_are_the_loops(run, loss):
    """The grid goes by cosine for every objective; similarities are cosines for FILIP alone."""
    a, scene, V, T = aligned(run, loss=loss)
    s, name, best, tokens = a.shown, a.name, a.best, a.tokens
    assert tokens == ["[BOS]", *(word + " " for word in scene["caption"].split()), "[EOS]"]
    assert s.shape == (len(tokens), 49) and len(tokens) == T.shape[1]
    for p in range(49):
        cos = [torch.cosine_similarity(T[0, l], V[0, p], dim=0).item() for l in range(len(tokens))]
        assert best[p] == int(np.argmax(cos))
        if loss == "filip":
            assert np.allclose(s[:, p], cos, atol=1e-4)
        if loss == "clip":
            assert np.allclose(s[:, p], [word @ V[0, p] for word in T[0]], atol=1e-4)
    assert (name == "similarity") == (loss != "sparc")
    products = torch.nn.functional.normalize(T[0], dim=1) @ (V[0] / V[0].norm(dim=1)[:, None]).T
    assert torch.allclose(a.products, products if loss == "filip" else T[0] @ V[0].T, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.5, "1/P", 0.0])
def test_sparc_shows_its_weights(run, sigma):
    """After eqs. 3 and 4 with the run's sigma, not the similarities of eq. 2."""
    a, _, V, T = aligned(run, sigma=sigma)
    s, name = a.shown, a.name
    number = 1 / 49 if sigma == "1/P" else sigma
    assert name == "SPARC's weights, eqs. 3 and 4"
    for row, word in zip(s, T[0]):
        similar = V[0] @ word
        scaled = (similar - similar.min()) / (similar.max() - similar.min())
        kept = scaled * (scaled >= number)
        assert torch.allclose(row, kept / kept.sum(), atol=1e-5)
    if sigma == 0.5:
        assert (s == 0).sum() > 49  # the threshold shows


def test_the_softmax_ablation_shows_its_weights(run):
    a, _, V, T = aligned(run, softmax=True)
    assert a.name == "softmax weights"
    assert torch.allclose(a.shown, sparc_alignment(V, T, softmax=True)[0])


def spy_on_text(monkeypatch):
    """-> a list that fills with every text that is drawn."""
    said, original = [], visualize.letters

    def spy(text, *more, **options):
        said.append(text)
        return original(text, *more, **options)
    monkeypatch.setattr(visualize, "letters", spy)
    return said


def test_the_sheet_says_what_it_shows(run, tmp_path, monkeypatch):
    """The legend names weights or similarity, and the marks where the truth is known."""
    said = spy_on_text(monkeypatch)
    for loss, name in (("sparc", "SPARC's weights, eqs. 3 and 4 (dark: an equal share"),
                       ("clip", "similarity (dark: the word's mean")):
        made = make_run(tmp_path / loss, loss=loss)
        visualize.draw_run(made, n=1)
        assert name in " ".join(said) and "Tick: the best patch is on it." in " ".join(said)
        said.clear()
    sample = visualize.Sample(Image.new("RGB", (56, 56)), "a red star")
    visualize.draw_run(run, own=sample, out=str(tmp_path / "own.png"))
    assert "Dot: the best patch." in " ".join(said) and "White" not in said


def test_a_word_without_an_opinion_stays_dark(run):
    """Weights: 1 / P is dark, 4 / P half bright, 16 / P and more fully. Similarities: the distance
    above the word's mean, as a share of the largest among all words, not of the word's own."""
    a = aligned(run)[0]
    word = torch.tensor([0, 1, 2, 4, 8, 16, 20]) / 49
    word = torch.cat([word, torch.zeros(42)])
    shown = visualize.brightness(word, a)
    assert torch.allclose(shown[:7], torch.tensor([0, 0, .25, .5, .75, 1, 1]), atol=1e-5)
    assert shown[7:].max() == 0
    b = aligned(run, loss="filip")[0]
    b.shown[1:-1] = torch.linspace(0, 0.01, 49)  # hardly an opinion
    b.shown[3] = torch.linspace(0, 1, 49) ** 2
    most = b.shown[3].max() - b.shown[3].mean()
    for l in (2, 3):
        slow = [max(0, x - b.shown[l].mean().item()) / most for x in b.shown[l].tolist()]
        assert torch.allclose(visualize.brightness(b.shown[l], b), torch.tensor(slow), atol=1e-5)
    assert visualize.brightness(b.shown[2], b).max() < 0.01
    b.shown[:] = 0.5
    assert visualize.brightness(b.shown[2], b).max() == 0  # and no NaN


def test_marked_patches_are_bright():
    best, grey = torch.arange(49) % 5, Image.new("RGB", (280, 280), (128,) * 3)
    panel = np.asarray(visualize.grid_panel(grey, best, {2, 3}, 7).convert("L")).astype(float)
    light = panel.reshape(7, 40, 7, 40).mean((1, 3)).flatten()
    marked = np.isin(best.numpy(), [2, 3])
    assert panel.shape == (280, 280) and light[marked].min() > 128 > 118 > light[~marked].max()


def test_light_is_where_the_word_looks():
    """A patch keeps its share of the picture's light: DIM at 0, all of it at 1."""
    x, grey = torch.linspace(0, 1, 49), Image.new("RGB", (SIDE, SIDE), (200,) * 3)
    panel = np.asarray(visualize.spotlight(grey, x, 7)).astype(float)
    for p, number in enumerate(x.tolist()):
        patch = panel[p // 7 * 40:p // 7 * 40 + 40, p % 7 * 40:p % 7 * 40 + 40]
        assert patch.std() == 0
        assert abs(patch.mean() - 200 * (visualize.DIM + (1 - visualize.DIM) * number)) < 1.5


def test_outline_and_mark_of_a_word():
    """White around the object, black around that, the object as it was; the mark's colour and place
    tell the best patch, hit or not."""
    mask = torch.zeros(56, 56, dtype=torch.bool)
    mask[16:32, 8:24] = True  # pixels 80:160, 40:120 of the panel
    red = Image.new("RGB", (SIDE, SIDE), (255, 0, 0))
    for hit, ink in ((True, visualize.BLUE), (False, visualize.ORANGE), (None, "black")):
        ink = ImageColor.getrgb(ink)
        panel = np.asarray(visualize.word_panel(red, torch.ones(49), 48, 7, hit, mask))
        assert (panel[80:160, 40:120] == (255, 0, 0)).all()
        white = (panel == 255).all(2)
        assert white[78:80, 38:122].all() and white[160:162, 38:122].all()
        assert white[80:160, 37:40].all() and not panel[75:77, 50:110].any()
        assert (panel[248:252, 260] == ink).all() or (panel[260, 267:271] == ink).any()
        assert (panel[:70, :] == (255, 0, 0)).all()


def test_outline_of_the_page_is_the_border():
    """Each unit of the path separates a pixel of the object from one that is none, and all do."""
    mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    steps = re.findall(r"M(\d+) (\d+)([hv])1", visualize.outline_path(mask))
    found = {(int(x), int(y), way) for x, y, way in steps}
    inside = {(x, y) for y, x in mask.nonzero().tolist()}
    slow = {(x, y, "h") for x in range(7) for y in range(10)
            if ((x, y) in inside) != ((x, y - 1) in inside)}
    slow |= {(x, y, "v") for x in range(8) for y in range(9)
             if ((x, y) in inside) != ((x - 1, y) in inside)}
    assert found == slow and len(steps) == len(slow)


def test_hits_are_the_loop(run):
    """A word's best patch lies on its object if that covers a quarter of it; so for the chance."""
    opened, = visualize.open_runs([run])
    sample, = visualize.draw_scenes(1, 3, opened.model.config["image_size"])
    a = visualize.align(opened, sample.image, sample.text)
    _, panels, hits, _ = visualize.align_row(opened, sample)
    assert len(sample.wanted) == 4 == len(hits) and len(panels) == 5
    words = visualize.find_words(opened.tok, sample.text, sample.wanted)
    for (word, (l,)), (hit, chance) in zip(words, hits):
        mask = sample.masks[sample.things[word]].float()
        on = [mask[p // 7 * 8:p // 7 * 8 + 8, p % 7 * 8:p % 7 * 8 + 8].mean() >= 0.25
              for p in range(49)]
        assert hit == on[int(a.shown[l].argmax())] and chance == pytest.approx(sum(on) / 49)


def spy_on_panels(monkeypatch):
    """-> a list that fills with what each word's panel shows (P,)."""
    shown, original = [], visualize.brightness

    def spy(word, aligned):
        shown.append(word)
        return original(word, aligned)
    monkeypatch.setattr(visualize, "brightness", spy)
    return shown


def test_a_word_of_several_tokens_shows_their_mean(run, monkeypatch):
    shown, text = spy_on_panels(monkeypatch), "a giraffe and a red star"
    opened, = visualize.open_runs([run])
    picture = Image.new("RGB", (56, 56), "teal")
    visualize.align_row(opened, visualize.Sample(picture, text, ["giraffe"]))
    s = visualize.align(opened, picture, text).shown
    (_, at), = visualize.find_words(TOK, text, ["giraffe"])
    assert len(at) > 1 and torch.allclose(shown[0], sum(s[p] for p in at) / len(at))


def test_every_token_of_a_patch_figure_where_filip_is(tmp_path, run):
    """FILIP's Figure 2 has its panel, with numbered tokens, if one of the runs was trained so."""
    filip = make_run(tmp_path / "filip", loss="clip+filip")
    plain = Image.open(visualize.draw_run(run, n=1)[0])
    both = Image.open(visualize.draw_run([run, filip], n=1)[0])
    assert plain.width == 5 * STEP + 30 and both.width == 6 * STEP + 30


def test_every_word_has_a_panel_and_lost_ones_a_message(draw, monkeypatch, capsys):
    """Ten words make two rows of panels; what the context of 32 tokens cuts off is named."""
    words = "red star blue ring green moon pink heart cyan cross".split()
    shown = spy_on_panels(monkeypatch)
    picture = draw("--text", " ".join(words), "--words", *words)
    assert len(shown) == 10 and picture.width == 6 * STEP + 30
    panels = np.asarray(picture)[:, ::STEP]
    assert 2 * SIDE < picture.height < 3 * SIDE and panels.std() > 0
    assert "tokens" not in capsys.readouterr().err
    draw("--text", " ".join(words * 4), "--words", "cross", "star")
    assert len(shown) == 10 + 3 + 3
    assert "cut to 32 tokens, without star, cross" in capsys.readouterr().err


def test_wide_pictures_are_cut_or_padded(draw, monkeypatch, capsys):
    """The text above and a message say so; --fit pad shows all of it, on white."""
    said = spy_on_text(monkeypatch)
    cut = np.asarray(draw("--text", "a dog"))
    assert "(the middle 60% of the picture)" in said
    assert "own.png is cut to a square: --fit pad shows all" in capsys.readouterr().err
    said.clear()
    whole = np.asarray(draw("--text", "a dog", "--fit", "pad"))
    assert not any("middle" in text for text in said) and not capsys.readouterr().err
    top = 20 + LETTER + 20 + LETTER  # of the first panel
    assert (whole[top:top + 50, 20:20 + SIDE] == 255).all()
    assert not (cut[top:top + 50, 20:20 + SIDE] == 255).all()


def test_scenes_and_csv(run, tmp_path):
    """The sheet has the first three pictures, the page all; a bad row is skipped."""
    first = visualize.draw_run(run, n=2)
    assert first == [os.path.join(run, "align.png"), os.path.join(run, "align.html")]
    page = pathlib.Path(first[1]).read_text()
    assert page.count("data:image/png;base64") == 2 and "http" not in page
    again, _ = visualize.draw_run(run, n=2, out=str(tmp_path / "again.png"))
    assert open(first[0], "rb").read() == open(again, "rb").read()
    more = visualize.draw_run(run, n=4)
    row = 2 * LETTER + SIDE + 40  # caption, titles, panels, and two gaps
    assert 3 * row < Image.open(more[0]).height < 4 * row
    assert pathlib.Path(more[1]).read_text().count("data:image/png;base64") == 4
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("image,caption\na.png,a dog on the beach\n")
    target = str(tmp_path / "csv.png")
    path, _ = visualize.draw_run(run, str(tmp_path / "d.csv"), n=6, out=target)
    assert SIDE < Image.open(path).height < 2 * SIDE  # one picture, though six were asked for
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "d.csv").write_text("image,caption\nbad.png,a hole\na.png,a dog on the beach\n")
    again, _ = visualize.draw_run(run, str(tmp_path / "d.csv"), n=1, out=str(tmp_path / "b.png"))
    assert open(again, "rb").read() == open(path, "rb").read()
    (tmp_path / "d.csv").write_text("image,caption\nbad.png,a hole\n")
    with pytest.raises(UserError, match="no picture that can be read .*bad.png"):
        visualize.draw_run(run, str(tmp_path / "d.csv"))
    with pytest.raises(UserError, match="photos/t.csv.*--data"):
        visualize.draw_run(make_run(tmp_path / "other", data="photos/t.csv"))


def test_own_picture(draw, capsys, tmp_path):
    """With --words DOG one word's panel, else those of dog and beach; the picture is the same."""
    one = draw("--text", "A Dog on the beach", "--words", "DOG", out="one.png")
    every = draw("--text", "a dog on the beach")
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / name) for name in ("one.png", "one.html", "out.png",
                                                         "out.html")]
    assert one.size == every.size == (4 * STEP + 30, one.height)
    one, every, top = np.asarray(one), np.asarray(every), 20 + LETTER + 20 + LETTER
    for row, filled in ((one, 2), (every, 3)):
        panels = [row[top:top + SIDE, 20 + STEP * k:20 + STEP * k + SIDE].std() > 0
                  for k in range(4)]
        assert panels == [True] * filled + [False] * (4 - filled)
    assert np.array_equal(one[top:top + SIDE, 20:300], every[top:top + SIDE, 20:300])


def test_long_texts_lose_nothing():
    """Lines break at the width, a title shrinks: all ink lies inside, with white around."""
    words = visualize.lines("supercalifragilistic " * 40)
    strip = visualize.flow(words, 900)
    assert strip.width == 900 and strip.height > 40 / 4 * LETTER
    ink = np.asarray(strip.convert("L")) < 128
    assert not ink[:, -2:].any()
    assert ink.sum() == 40 * (np.asarray(words[0].convert("L")) < 128).sum()
    title = np.asarray(visualize.letters("a giraffe and " * 4 + "end", most=SIDE).convert("L"))
    assert 0.85 * SIDE < title.shape[1] <= SIDE and (title[:, :20] < 200).any()
    assert (title[:, -20:] < 200).any() and (title[:, -1] > 200).all()
    for text, most in (("x" * 300, SIDE), ("y" * 3000, 2 * SIDE), ("", SIDE)):
        assert 1 <= visualize.letters(text, most=most).width <= most


def test_curves(run, tmp_path, monkeypatch):
    """A chart for each column that has lines, the same scale for all runs, colours by run."""
    said, drawn = spy_on_text(monkeypatch), []
    other = make_run(tmp_path / "other")
    rows = "step,loss,scale,val_loss,once\n20,4,1,,\n40,3,2,9,7\n60,2,3,8,\n"
    for folder, text in ((run, rows), (other, rows.replace(",4,", ",8,"))):
        (pathlib.Path(folder) / "log.csv").write_text(text)
    original = visualize.chart
    monkeypatch.setattr(visualize, "chart", lambda x: drawn.append(x) or original(x))
    monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", run, other, "--out",
                                      str(tmp_path / "c.png")])
    visualize.main()
    assert sorted(said) == sorted(["over steps:", "run", "other", "loss", "scale", "val_loss"])
    assert drawn[0] == [[(20, 4), (40, 3), (60, 2)], [(20, 8), (40, 3), (60, 2)]]
    assert len(drawn) == 3 and drawn[2] == [[(40, 9), (60, 8)]] * 2, "one point is no line"
    pixels = set(map(tuple, np.asarray(Image.open(tmp_path / "c.png")).reshape(-1, 3)))
    assert {*map(ImageColor.getrgb, visualize.COLOURS[:2])} <= pixels
    paths = visualize.draw_run([run], n=1)
    assert paths[2] == os.path.join(run, "curves.png") and os.path.isfile(paths[2])
    page = pathlib.Path(paths[1]).read_text()
    assert page.count("data:image/png;base64") == 2  # the scene, the charts
    os.remove(os.path.join(run, "log.csv"))
    with pytest.raises(UserError, match="no .*log.csv: name run folders"):
        visualize.main()
    monkeypatch.setattr(sys, "argv", ["visualize.py", "curves"])
    with pytest.raises(UserError, match="Name a run: python visualize.py curves runs/sparc"):
        visualize.main()


def test_words():
    found = visualize.find_words(TOK, "There is a Red star, on the left of an orange moon.")
    assert [w for w, _ in found] == ["red", "star", "orange", "moon"]
    twice = visualize.find_words(TOK, "a red star on a red moon", ["red"])
    assert twice == [("red", [2]), ("red", [6])]
    # an article that is asked for is kept
    assert visualize.find_words(TOK, "a red star", ["a"]) == [("a", [1])]
    (word, at), = visualize.find_words(TOK, "a giraffe")  # a word of several tokens
    assert word == "giraffe" and len(at) > 1
    assert decode(TOK, TOK("a giraffe")[0][0, at]) == "giraffe"


@pytest.mark.parametrize("wanted, decoded", [
    ("t-shirt", "t - shirt"), ("man's", "man 's"), ("Ice Cream", "ice cream"), ("10", "1 0"),
    ("shirt", "shirt"), ("man", "man"), ("2100", "2 1 0 0"), ("ice  cream,", "ice cream ,")])
def test_words_are_what_people_call_words(wanted, decoded):
    """Hyphens, apostrophes, phrases and numbers, each as one."""
    text = "10 dogs in a man’s T-shirt eat ice cream, 2100 m high"
    (word, at), = visualize.find_words(TOK, text, [wanted])
    assert word == " ".join(wanted.lower().split())
    assert decode(TOK, TOK(text, 77)[0][0, at]) == decoded


def test_words_that_are_not_there():
    for wanted in ("21", "00", "hirt", "ream", "cream dogs", "", "cat"):
        with pytest.raises(UserError, match="not in the text"):
            visualize.find_words(TOK, "2100 ice cream on a shirt, dogs", [wanted])
    found = visualize.find_words(TOK, "Two dogs, in a man's t-shirt (blue).")
    assert [word for word, _ in found] == ["two", "dogs", "man's", "t-shirt", "blue"]
    # the published pattern takes 'd for an ending: a word that nobody asked for is left out
    found = visualize.find_words(TOK, "a big 'dog'")
    assert [word for word, _ in found] == ["big"]


@pytest.mark.parametrize("more, options, match", [
    (["--text", "a dog", "--words", "cat"], {}, "--words cat: not in the text 'a dog'"),
    ([], {}, "--image and --text go together"),
    (["--text", "a dog"], {"image": None}, "go together"),
    (["--text", "a dog"], {"image": "text.png"}, "text.png as a picture"),
    (["--text", "a dog"], {"image": "none.png"}, "no such file"),
    (["--text", "a dog"], {"out": "no/folder/x.png"}, "can't write .*no/folder/x.png")])
def test_refusals(draw, tmp_path, more, options, match):
    """One sentence, and nothing left behind."""
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=match) as e:
        draw(*more, **options)
    assert "\n" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["own.png", "text.png"]


# ------------------------------------------------------------ Grad-CAM
class Toy(torch.nn.Module):
    """A tower of one layer, convolution or attention; v is linear in what it returns. A window: the
    first patch and the last do not see each other."""
    def __init__(self, convolution, window=False):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))
        self.config, self.convolution = {"image_size": 14}, convolution
        self.visual = torch.nn.Module()
        self.visual.grid, self.visual.seen = 2, None
        if window:
            self.visual.seen = torch.ones(4, 4, dtype=torch.bool)
            self.visual.seen[0, 3] = self.visual.seen[3, 0] = False
        if convolution:
            self.visual.add_module(convolution, torch.nn.Conv2d(3, 4, 7, 7))
        else:
            block = torch.nn.Module()
            block.attn = Attention(4, 2)
            self.visual.transformer = torch.nn.Module()
            self.visual.transformer.resblocks = torch.nn.ModuleList([block])
        self.mix = torch.nn.Parameter(torch.randn(4, 4, 3))  # of 4 patches with 4 numbers

    def patches(self, x):
        x = x.double().unfold(2, 7, 7).unfold(3, 7, 7).flatten(2, 3).mean((3, 4)).mT  # (1, P, 3)
        return torch.cat([x, x[..., :1]], 2)

    def head(self, x):
        return torch.einsum("bpw,pwd->bd", x, self.mix)

    def encode_image(self, x):
        if self.convolution:
            layer = self.visual.get_submodule(self.convolution)
            return self.head(layer(x.double()).flatten(2).mT), None
        layer = self.visual.transformer.resblocks[0].attn
        return self.head(layer(self.patches(x), self.visual.seen)), None


def slow_gradient(score, kept):
    """By finite differences."""
    grad = torch.zeros_like(kept)
    for place in np.ndindex(*kept.shape):
        step = torch.zeros_like(kept)
        step[place] = 1e-5
        grad[place] = (score(kept + step) - score(kept - step)) / 2e-5
    return grad


@pytest.mark.parametrize("convolution, window", [("layer4", 0), ("stem", 0), ("", 0), ("", 1)])
def test_grad_cam_of_a_toy(convolution, window, monkeypatch):
    """Of a ResNet, of small, of a ViT, against gradients by finite differences."""
    torch.manual_seed(3)
    toy, t = Toy(convolution, window).double(), torch.randn(1, 3).double()
    monkeypatch.setattr(evaluation, "encode_texts", lambda *more: (t, None, None))
    noise = np.random.RandomState(0).randint(0, 255, (14, 14, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    run = visualize.Run("toy", toy, TOK, types.SimpleNamespace(loss="clip"))
    found = visualize.grad_cam(run, image, "a dog")
    x = normalize(to_tensor([image])).double()

    def cosine(y):
        return torch.cosine_similarity(toy.head(y), t).item()
    if convolution:
        kept = toy.visual.get_submodule(convolution)(x).detach()  # (1, 4, 2, 2)
        grad = slow_gradient(lambda a: cosine(a.flatten(2).mT), kept)
        slow = [sum(grad[0, w].mean() * kept[0, w, y, x] for w in range(4)).clamp(min=0)
                for y in range(2) for x in range(2)]
    else:
        layer, patches = toy.visual.transformer.resblocks[0].attn, toy.patches(x)
        qkv = torch.nn.functional.linear(patches, layer.in_proj_weight, layer.in_proj_bias)
        q, k, v = qkv.detach().split(4, 2)
        heads = slice(0, 2), slice(2, 4)
        far = torch.zeros(4, 4, dtype=torch.bool) if toy.visual.seen is None else ~toy.visual.seen
        products = [(q[..., h] @ k[..., h].mT / 2 ** 0.5).masked_fill(far, -1e9) for h in heads]
        kept = torch.stack(products, 1).softmax(-1)

        def score(a):
            y = torch.cat([a[:, n] @ v[..., h] for n, h in enumerate(heads)], 2)
            return cosine(layer.out_proj(y))
        grad = slow_gradient(score, kept)
        slow = [sum(max(0, grad[0, h, n, p] * kept[0, h, n, p]) for h in range(2)
                    for n in range(4)) / 2 for p in range(4)]
    slow = torch.tensor([float(number) for number in slow]).double()
    assert slow.max() > 0 and torch.allclose(found, slow / slow.max(), atol=1e-5)


def test_grad_cam_leaves_the_model_as_it_was(run):
    """Its attention has the output that the model's own has, and no hook stays."""
    opened, = visualize.open_runs([run])
    layer = opened.model.visual.transformer.resblocks[-1].attn
    image, before = visualize.draw_scenes(1, 0, 56)[0].image, []
    hook = layer.register_forward_hook(lambda layer, inputs, output: before.append(output))
    heat = visualize.grad_cam(opened, image, "a red star")
    hook.remove()
    evaluation.encode_images(opened.model, [image])
    assert heat.shape == (49,) and heat.max() == 1 and heat.min() >= 0
    with torch.no_grad():
        x = normalize(to_tensor([image]))
        hook = layer.register_forward_hook(lambda layer, inputs, output: before.append(output))
        opened.model.encode_image(x)
        hook.remove()
    assert len(before) == 2 and torch.allclose(before[0], before[1], atol=1e-5)


def test_cam_shows_the_text_and_its_phrases(run, tmp_path, monkeypatch):
    """Scenes: the whole text, both objects' phrases, outlined; others: the words, or --words."""
    asked, original = [], visualize.grad_cam

    def spy(run, image, text):
        asked.append(text)
        return original(run, image, text)
    monkeypatch.setattr(visualize, "grad_cam", spy)
    said = spy_on_text(monkeypatch)
    path, = visualize.draw_run(run, n=1, out=str(tmp_path / "c.png"), kind="cam")
    scene, = Scenes(1, 0, 56, "test", (2, 2))
    phrases = [join(Scenes.phrase(thing, 0)) for thing in scene["things"]]
    assert asked[0] == scene["caption"] and sorted(asked[1:]) == sorted(phrases)
    assert "the whole text" in said and {*phrases} <= {*said}
    assert "Grad-CAM (bright: the patches that raise" in " ".join(said)
    assert re.search(r"run: \d of 2 best patches", " ".join(said))
    asked.clear()
    own = visualize.Sample(Image.new("RGB", (90, 60), "teal"), "a dog and a cat", ["a dog"])
    visualize.draw_run(run, own=own, out=str(tmp_path / "own.png"), kind="cam")
    assert asked == ["a dog and a cat", "a dog"]
    asked.clear()
    own = own._replace(text="A dog")
    visualize.draw_run(run, own=own, out=str(tmp_path / "own.png"), kind="cam")
    assert asked == ["A dog"]


# ------------------------------------------------------------ segmentation, retrieval, the map
PAINTS = [(200, 40, 40), (40, 160, 40), (40, 40, 200), (120, 120, 120), (200, 0, 200), (0, 160, 90)]


def test_the_framed_picture_is_the_true_one(run, tmp_path, monkeypatch):
    """Five pictures in the order of given similarities, a red frame around the text's own, if it is
    among them; five texts in the order of theirs, the picture's own in red; both ranks."""
    s_i2t, s_t2i = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(evaluation, "similarities", lambda *features: (s_i2t, s_t2i))
    samples = [visualize.Sample(Image.new("RGB", (56, 56), paint), f"text{k}")
               for k, paint in enumerate(PAINTS)]
    said, original = [], visualize.letters

    def spy(text, colour="black", *more):
        said.append((text, colour))
        return original(text, colour, *more)
    monkeypatch.setattr(visualize, "letters", spy)
    path = visualize.draw_retrieval(visualize.open_runs([run]), [samples], str(tmp_path / "r.png"))
    pixels, y, wanted = np.asarray(Image.open(path)), 20, []
    for i in range(3):
        order = sorted(range(6), key=lambda b: -s_t2i[b, i])
        y += 2 * (LETTER + 20)  # the text and the rank
        for k, b in enumerate(order[:5]):
            x = 20 + k * STEP
            assert tuple(pixels[y + 140, x + 140]) == PAINTS[b]
            frame = visualize.RED if b == i else "white"
            assert tuple(pixels[y + 5, x + 140]) == ImageColor.getrgb(frame)
        rank = f"run: its own picture is number {order.index(i) + 1} of 6"
        assert (rank, visualize.GREY) in said
        y += SIDE + 20
        assert tuple(pixels[y + 140, 20 + 140]) == PAINTS[i]
        y += SIDE + 20
        order = sorted(range(6), key=lambda c: -s_i2t[i, c])
        wanted.append((f"text{i}", "black"))
        wanted += [(f"text{c}", visualize.RED if c == i else "black") for c in order[:5]]
        rank = f"run: its own text is number {order.index(i) + 1} of 6"
        assert (rank, visualize.GREY) in said
    assert [text for text in said if re.match(r"text\d$", text[0])] == wanted


def test_long_captions_are_not_cut(run, tmp_path, monkeypatch):
    """Texts of 60 words, each once above and five times beside the pictures: all ink is there, in
    letters of full size, with white around."""
    monkeypatch.setattr(visualize, "RED", "black")
    samples = [visualize.Sample(Image.new("RGB", (56, 56), "white"), "mmmmm " * 60)] * 6
    expand = visualize.ImageOps.expand
    monkeypatch.setattr(visualize.ImageOps, "expand", lambda picture, width, ink:
                        expand(picture, width, "white"))
    path = visualize.draw_retrieval(visualize.open_runs([run]), [samples], str(tmp_path / "r.png"))
    pixels = np.asarray(Image.open(path).convert("L"))
    assert (pixels[:, -2:] == 255).all()

    def ink(text):
        return (np.asarray(visualize.letters(text).convert("L")) < 90).sum()  # black, not GREY
    words = 3 * (6 * 60 * ink("mmmmm") + sum(ink(f"{k}.") for k in range(1, 6)))
    about = sum(map(ink, "Red: the text's own picture, the picture's own text.".split()))
    assert (pixels < 90).sum() == words + about


def test_the_sheet_of_samples(tmp_path, monkeypatch):
    """Masks and boxes have their object's colour, and each word that names it a paler one."""
    said, original = [], visualize.letters

    def spy(text, **options):
        said.append((text, options["paper"]))
        return original(text, **options)
    monkeypatch.setattr(visualize, "letters", spy)
    scenes, white = Scenes(3, size=SIDE, split="val"), "white"
    path = visualize.draw_samples(scenes, 3, str(tmp_path / "s.png"))
    pixels, wanted, y = np.asarray(Image.open(path)).astype(int), [], 20
    for i, s in enumerate(scenes):
        picture, truth = (pixels[y:y + SIDE, x:x + SIDE] for x in (20, 20 + STEP))
        for thing, mask in zip(s["things"], s["masks"]):
            x1, y1, x2, y2 = thing.box
            inside = np.zeros_like(mask)
            inside[y1 + 4:y2 - 4, x1 + 4:x2 - 4] = mask[y1 + 4:y2 - 4, x1 + 4:x2 - 4]
            mixed = 0.25 * picture + 0.75 * np.array(COLOURS[thing.colour])
            assert inside.any() and abs(truth[inside] - mixed[inside]).max() < 2
            assert (truth[y1, x1:x2] == COLOURS[thing.colour]).all()
            assert (truth[y1:y2, x1] == COLOURS[thing.colour]).all()
        for style, head in enumerate(("caption:", "paraphrase:", "paraphrase:")):
            wanted.append((head, white))
            for word in scenes.words(scenes.spec(i), style):
                ink = COLOURS[s["things"][word.thing].colour] if word.thing >= 0 else (255,) * 3
                pale = tuple((255 + x) // 2 for x in ink)
                wanted.append((word.text, pale if word.thing >= 0 else white))
        views = scenes.views(i, s["image"], s["caption"])
        for name in ("summary", "objects"):
            wanted += [(text, white) for text in f"{name}: {views[name]}".split()]
        below = (pixels[y + SIDE:, 20:20 + 2 * STEP] == 255).all((1, 2))
        y += SIDE + int((~below).argmax())
    assert said == wanted


def test_the_sheet_of_a_file(tmp_path, monkeypatch, capsys):
    """By the command: all captions and paraphrases, the summary, objects; a long word is not cut;
    as many samples as there are."""
    said = spy_on_text(monkeypatch)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("image,caption,paraphrases,summary,objects\n"
                                    f"a.png,one {'W' * 90},eins | uno,short,dog\n")
    out = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(tmp_path / "d.csv"), "--n", "9",
                                      "--out", str(out)])
    data.main()
    wanted = f"text: one {'W' * 90} text: eins text: uno summary: short objects: dog"
    assert " ".join(said) == wanted and capsys.readouterr().out == f"drawn into {out}\n"
    pixels = np.asarray(Image.open(out).convert("L"))
    assert (pixels[:, -15:] == 255).all() and (pixels[:, STEP + 30:] < 128).any()
    monkeypatch.setattr(sys, "argv", ["data.py", "--n", "0"])
    with pytest.raises(SystemExit):
        data.main()


def test_segmentation_has_the_objects_colours(run, tmp_path, monkeypatch):
    """The truth has the pixels of each object's mask in its colour, a run the patches that it takes
    for it; the percentage is eval.py's."""
    said, (opened,) = spy_on_text(monkeypatch), visualize.open_runs([run])
    samples = visualize.draw_scenes(3, 0, 56)
    path = visualize.draw_segmentation([opened], [samples], str(tmp_path / "s.png"))
    pixels, objective = np.asarray(Image.open(path)).astype(float), evaluation.OBJECTIVES["sparc"]
    scenes = list(Scenes(3, 0, 56, "test", (2, 2)))
    found = evaluation.scene_patches(objective, opened.model, TOK, scenes)
    for i, (scene, (scores, masks)) in enumerate(zip(scenes, found)):
        top, label = 20 + i * (LETTER + SIDE + 20) + LETTER, scores.argmax(1)
        plain, truth, seen = (pixels[top:top + SIDE, 20 + k * STEP:][:, :SIDE] for k in range(3))
        inks = [visualize.INKS[thing.colour] for thing in scene["things"]] + [(40, 40, 40)]
        for y in range(2, SIDE, 5):
            for x in range(2, SIDE, 5):
                here = masks[:, y // 5, x // 5].tolist() + [True]
                ink = np.array(inks[here.index(True)])
                assert abs(truth[y, x] - (0.25 * plain[y, x] + 0.75 * ink)).max() < 2
                ink = np.array(inks[label[7 * (y // 40) + x // 40]])
                assert abs(seen[y, x] - (0.25 * plain[y, x] + 0.75 * ink)).max() < 2
        iou = evaluation.object_ious(evaluation.object_pixels(label, masks)).mean()
        assert f"run: mIoU {iou:.0%}" in said


def slow_neighbours(x, perplexity):
    """t-SNE's p of each pair, with each point's width found by trying many."""
    d2, p = torch.cdist(x, x).square().double(), torch.zeros(len(x), len(x)).double()
    precisions = torch.linspace(-6, 2, 2001).double().exp()[:, None]
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        rows = torch.exp(-precisions * d2[i, others])
        rows = rows / rows.sum(1, keepdim=True)
        entropy = torch.special.entr(rows).sum(1)
        p[i, others] = rows[(entropy - np.log(perplexity)).abs().argmin()]
    return (p + p.T) / (2 * len(x))


def divergence(p, y):
    q = (1 / (1 + torch.cdist(y, y).square().double())).fill_diagonal_(0)
    q = q / q.sum()
    return (p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum().item()


def test_tsne_lowers_the_divergence_and_keeps_clusters():
    """Of t-SNE's divergence far less is left than on the two main axes, and hardly anything is
    gained by moving points or stretching the result; clusters stay apart."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g)
    x[20:] += 8
    y, p = visualize.tsne(x, perplexity=6), slow_neighbours(x, 6)
    axes, least = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2], divergence(p, y)
    assert least < 0.5 * min(divergence(p, size * x @ axes.T) for size in (0.3, 1, 3, 10))
    assert min(divergence(p, size * y) for size in (0.8, 1.25)) > 0.95 * least
    assert divergence(p, y + torch.randn(40, 2, generator=g) * y.std() / 10) > least
    a, b = y[:20], y[20:]
    assert torch.cdist(a, b).min() > 0.3 * max(torch.cdist(a, a).max(), torch.cdist(b, b).max())


def test_the_map_has_a_point_of_each_colour(run, tmp_path, monkeypatch):
    """Small shapes lie where t-SNE puts the pictures, large discs where it puts the texts."""
    monkeypatch.setattr(visualize, "tsne", lambda x: torch.stack(
        [torch.arange(len(x)), torch.arange(len(x)) % 3], 1).float())
    samples = visualize.draw_scenes(4, 0, 56, "map")
    path = visualize.draw_map(visualize.open_runs([run]), [samples], str(tmp_path / "m.png"))
    pixels, side = np.asarray(Image.open(path)), 2 * SIDE + 10
    things = [sample.scene["things"] for sample in samples]
    assert all(len(some) == 1 for some in things)
    inks = [visualize.INKS[thing.colour] for thing, in things] + list(visualize.INKS.values())
    for k, ink in enumerate(inks):
        x = round(20 + 60 + k / (len(inks) - 1) * (side - 120))
        y = round(20 + LETTER + 60 + k % 3 / 2 * (side - 120))
        near = pixels[y - 8:y + 8, x - 8:x + 8].reshape(-1, 3).tolist()
        assert list(ink) in near
        assert k < 4 or tuple(pixels[y, x]) == ink


def test_kinds_of_pictures_by_command(run, draw, tmp_path, monkeypatch, capsys):
    """Each kind is written under its name; photos don't say what is where."""
    for kind, n in (("cam", 1), ("segmentation", 2), ("retrieval", 4), ("map", 9)):
        argv = ["visualize.py", kind, run, "--n", str(n), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        visualize.main()
        assert capsys.readouterr().out.strip() == os.path.join(run, f"{kind}.png")
        os.remove(os.path.join(run, f"{kind}.png"))
    picture = ["--image", str(tmp_path / "own.png"), "--text", "a dog", "--fit", "pad"]
    for kind in ("segmentation", "map"):
        monkeypatch.setattr(sys, "argv", ["visualize.py", kind, run, *picture])
        with pytest.raises(UserError, match=f"{kind} needs to know .*: take --data scenes"):
            visualize.main()


# ---------------------------------------------------------------------- the page, in a browser
class Browser:
    """A headless browser, driven by debugging messages: JSON with a 0 byte behind it, by pipes."""
    def __init__(self, program, folder):
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, program, "--headless", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.number, self.rest, self.session = 0, b"", {}
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.session = {"sessionId": session}

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        answer = {}
        while answer.get("id") != self.number:
            while b"\0" not in self.rest:
                received = os.read(self.back, 1 << 20)
                assert received, "the browser has stopped"
                self.rest += received
            first, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(first)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, code):
        """The value of JavaScript."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path, width=1000, dark=False, touch=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                  deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=pathlib.Path(path).as_uri())
        for _ in range(300):  # at most some seconds
            if self.run("document.readyState == 'complete' && typeof build != 'undefined'"):
                return
            time.sleep(0.02)
        raise AssertionError("the page's script did not run")

    def centre(self, element):
        """Scroll an element into view -> its middle."""
        self.run(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.run(f"(b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())")
        return {"x": box[0] + box[2] / 2, "y": box[1] + box[3] / 2}

    def hover(self, element):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.centre(element))

    def tap(self, element):
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.centre(element)])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                      windowsVirtualKeyCode={"Tab": 9}.get(key, 0))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip("no chromium here: the page was not tried in a browser")
    browser = Browser(program, tmp_path_factory.mktemp("browser"))
    yield browser
    browser.process.kill()
    browser.process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Three runs of one model with different losses, two scenes -> runs, samples, the page."""
    folder = tmp_path_factory.mktemp("page")
    folders = [make_run(folder / loss, loss=loss, sigma=0.3) for loss in ("sparc", "filip")]
    folders.append(make_run(folder / "soft", softmax=True))
    runs = visualize.open_runs(folders)
    samples = [visualize.draw_scenes(2, 0, run.model.config["image_size"]) for run in runs]
    return runs, samples, visualize.align_page(runs, samples, str(folder / "align.html"))


def figure(i, rest=""):
    return f"document.querySelectorAll('figure')[{i}]{rest}"


def veils(browser, i):
    """How dark each patch is on the page (P,)."""
    return browser.run(f"[...{figure(i)}.querySelectorAll('rect:not(.frame)')]"
                       ".map(r => Number(r.style.opacity))")


def framed(browser, i):
    """The number of the patch that has the frame."""
    place = browser.run(f"{figure(i)}.querySelector('.frame').getAttribute('transform')")
    x, y = map(int, re.findall(r"\d+", place))
    return 7 * y + x


def choose(browser, run, sigma=None):
    browser.run(f"find('#run').selectedIndex = {run}; find('#run').onchange()")
    if sigma is not None:
        browser.run(f"find('#sigma').value = {sigma}; find('#sigma').oninput()")


@pytest.mark.parametrize("k", range(3))
def test_pointing_at_a_word_lights_its_patches(browser, page, k):
    """The dark of each patch is what align and brightness say; the frame is on the best patch; the
    outline is that of the word's object."""
    runs, samples, path = page
    browser.open(path)
    choose(browser, k)
    for i, sample in enumerate(samples[k]):
        a = visualize.align(runs[k], sample.image, sample.text)
        for n, (word, at) in enumerate(visualize.find_words(TOK, sample.text, small=())):
            browser.hover(figure(i, f".querySelectorAll('button')[{n}]"))
            x = a.shown[at].mean(0)
            dark = (1 - visualize.DIM) * (1 - visualize.brightness(x, a))
            assert np.allclose(veils(browser, i), dark, atol=1e-3)
            assert framed(browser, i) == int(x.argmax())
            label = browser.run(figure(i, f".querySelectorAll('button')[{n}].textContent"))
            assert label.split()[0] == word and (len(label.split()) > 1) == (word in sample.things)
            line = browser.run(figure(i, ".querySelector('path').getAttribute('d')"))
            things = [visualize.outline_path(mask) for mask in sample.masks]
            assert line == (things[sample.things[word]] if word in sample.things else "")


def test_pointing_at_a_patch_colours_its_words(browser, page):
    runs, samples, path = page
    browser.open(path)
    sample, a = samples[0][1], visualize.align(runs[0], samples[0][1].image, samples[0][1].text)
    for p in (0, 24, 47):
        browser.hover(figure(1, f".querySelectorAll('rect')[{p}]"))
        light = browser.run(f"[...{figure(1)}.querySelectorAll('button')]"
                            ".map(b => Number(b.style.getPropertyValue('--light')))")
        words = visualize.find_words(TOK, sample.text, small=())
        slow = [visualize.brightness(a.shown[at].mean(0), a)[p] for _, at in words]
        assert np.allclose(light, slow, atol=1e-4) and framed(browser, 1) == p
        said = browser.run(figure(1, ".querySelector('p').textContent"))
        assert said.startswith(f"row {p // 7 + 1}, column {p % 7 + 1}: ")
        assert all(word in said for (word, _), x in zip(words, slow) if x > 1e-3)


@pytest.mark.parametrize("sigma", [0, 0.25, 0.6, 1])
def test_the_slider_is_sparc_alignment(browser, page, sigma):
    """Eqs. 2 to 4 in the page's script, for any sigma, by the slider and on the sheet's words."""
    runs, samples, path = page
    browser.open(path)
    choose(browser, 0, sigma)
    sample = samples[0][0]
    _, V = evaluation.encode_images(runs[0].model, [sample.image])
    _, T, _ = evaluation.encode_texts(runs[0].model, runs[0].tok, [sample.text])
    a = sparc_alignment(V, T, sigma)[0]
    words = visualize.find_words(TOK, sample.text, small=())
    for n, (word, at) in enumerate(words):
        shown = browser.run(f"Object.values(data.runs[0].views[0].words[{n}].shown)")
        assert np.allclose(shown, a[at].mean(0), atol=1e-5)
    tied = browser.run("Object.values(weights(new Float32Array([2, 2, 2, 2]), 0.5, false))")
    assert tied == [0.25] * 4
    assert browser.run("find('#number').value") == f"{sigma:.3f}"
    assert not browser.run("find('#sigma').disabled")


def test_hits_are_counted_and_runs_switch(browser, page):
    runs, samples, path = page
    browser.open(path)
    for k, run in enumerate(runs):
        choose(browser, k)
        hits = [hit for sample in samples[k]
                for hit in visualize.align_row(run, sample)[2]]
        said = browser.run("find('#score').textContent")
        assert said.startswith(f"{sum(hit for hit, _ in hits)} of {len(hits)} words")
        ticks = browser.run("[...document.querySelectorAll('button')].map(b => b.textContent)")
        assert sum("\u2713" in text for text in ticks) == sum(hit for hit, _ in hits)
        assert browser.run("find('#sigma').disabled") == (run.name != "sparc")
    assert browser.run("[...find('#run').options].map(o => o.text)") == ["sparc", "filip", "soft"]


def test_the_page_by_keyboard(browser, page):
    """Tab reaches run, slider, each picture, each word; arrow keys move between patches."""
    browser.open(page[2])
    reached = []
    for _ in range(5):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:3] == ["run", "sigma", "svg"] and reached[3:] == ["BUTTON", "BUTTON"]
    assert browser.run(figure(0, ".querySelectorAll('button')[1].ariaPressed")) == "true"
    assert max(veils(browser, 0)) > 0
    browser.run(figure(0, ".querySelector('svg').focus()"))
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowDown"):
        browser.press(key)
    assert framed(browser, 0) == 8  # 0, 7, 8, 1, no way up, 8
    assert "row 2, column 2" in browser.run(figure(0, ".querySelector('p').textContent"))


def test_the_page_by_touch_on_a_small_dark_screen(browser, page):
    browser.open(page[2], width=360, dark=True, touch=True)
    assert browser.run("document.documentElement.scrollWidth") == 360
    browser.tap(figure(1, ".querySelectorAll('button')[2]"))
    assert browser.run(figure(1, ".querySelectorAll('button')[2].ariaPressed")) == "true"
    browser.tap(figure(1, ".querySelectorAll('rect')[30]"))
    assert framed(browser, 1) == 30 and max(veils(browser, 1)) == 0
    sizes = browser.run("[...document.querySelectorAll('button')].map(b => b.offsetHeight)")
    assert min(sizes) >= 36
    ink, ground = (browser.run(f"getComputedStyle(document.body).{x}")
                   for x in ("color", "colorScheme"))
    assert ink == "rgb(255, 255, 255)" and ground == "light dark"


def test_the_page_speaks(browser, page):
    """Everything that can be focused has a name, and what is shown is said."""
    browser.open(page[2])
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = [node for node in nodes if not node["ignored"] and node["role"]["value"] in
             ("button", "slider", "combobox", "image", "img")]
    assert len(named) > 12 and all(node["name"]["value"].strip() for node in named)
    live = browser.run("document.querySelectorAll('[aria-live], [role=status]').length")
    assert live == 3


def test_no_text_breaks_the_page(browser, run, tmp_path):
    """Words of HTML in a caption are words; nothing is fetched; six pictures stay below 1 MB."""
    opened = visualize.open_runs([run])
    noise = np.random.RandomState(0).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((600, 400), Image.Resampling.BICUBIC)
    sample = visualize.Sample(photo, "</script> <b> &\u4e2d @DATA@")
    path = visualize.align_page(opened, [[sample] * 6], str(tmp_path / "p.html"))
    assert os.path.getsize(path) < 1e6
    browser.open(path)
    words = browser.run("[...document.querySelectorAll('figure')[0].querySelectorAll('button')]"
                        ".map(b => b.textContent)")
    assert words == ["</script>", "<b>", "&\u4e2d", "@data@"]
    assert browser.run("document.querySelectorAll('figure img, figure b').length") == 0
    assert browser.run("performance.getEntriesByType('resource').filter("
                       "e => !e.name.startsWith('data:')).length") == 0
