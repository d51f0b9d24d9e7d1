"""Tests of visualize.py: what it marks, what it draws, what it refuses.

    pytest tests/test_visualize.py
"""
import os
import sys
import numpy as np
import pytest
import torch
from PIL import Image
import eval as evaluation
import visualize
from data import Scenes
from losses import sparc_alignment
from model import UserError
from test_eval import TOK, make_run

# six panels of 280 with margins; a title and two lines of tokens
ROW = (6 * 290 + 10, 280 + 3 * 22 + 10)


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
    model, tok, args = evaluation.load_run(run)
    for name, value in options.items():
        setattr(args, name, value)
    scene = Scenes(1, 0, 56, "test")[0]
    _, V = evaluation.encode_images(model, [scene["image"]])
    _, T, _ = evaluation.encode_texts(model, tok, [scene["caption"]])
    return visualize.align(model, tok, args, scene["image"], scene["caption"]), scene, V, T


@pytest.mark.parametrize("loss", ["clip", "sparc", "filip"])
def test_best_tokens_are_the_loops(run, loss):
    """The grid goes by cosine for every objective; similarities are cosines for FILIP alone."""
    (s, name, best, tokens), scene, V, T = aligned(run, loss=loss)
    assert tokens == ["[BOS]", *scene["caption"].split(), "[EOS]"]
    assert s.shape == (len(tokens), 49) and len(tokens) == T.shape[1]
    for p in range(49):
        cos = [torch.cosine_similarity(T[0, l], V[0, p], dim=0).item() for l in range(len(tokens))]
        assert best[p] == int(np.argmax(cos))
        if loss == "filip":
            assert np.allclose(s[:, p], cos, atol=1e-4)
        if loss == "clip":
            assert np.allclose(s[:, p], [word @ V[0, p] for word in T[0]], atol=1e-4)
    assert (name == "similarity") == (loss != "sparc")


@pytest.mark.parametrize("sigma", [0.5, "1/P", 0.0])
def test_sparc_shows_its_weights(run, sigma):
    """After eqs. 3 and 4 with the run's sigma, not the similarities of eq. 2."""
    (s, name, _, _), _, V, T = aligned(run, sigma=sigma)
    number = 1 / 49 if sigma == "1/P" else sigma
    assert name == "weights, eqs. 3 and 4"
    for row, word in zip(s, T[0]):
        similar = V[0] @ word
        scaled = (similar - similar.min()) / (similar.max() - similar.min())
        kept = scaled * (scaled >= number)
        assert torch.allclose(row, kept / kept.sum(), atol=1e-5)
    if sigma == 0.5:
        assert (s == 0).sum() > 49  # the threshold shows


def test_the_softmax_ablation_shows_its_weights(run):
    (s, name, _, _), _, V, T = aligned(run, softmax=True)
    assert name == "softmax weights"
    assert torch.allclose(s, sparc_alignment(V, T, softmax=True)[0])


def test_a_panel_says_what_it_shows(run, monkeypatch):
    """Each word's title names the weights or the similarity."""
    titles, original = [], visualize.ImageDraw.ImageDraw.text

    def spy(self, at, text, *more, **options):
        titles.append(text)
        return original(self, at, text, *more, **options)
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "text", spy)
    model, tok, args = evaluation.load_run(run)
    for loss, name in (("sparc", "weights, eqs. 3 and 4"), ("clip", "similarity")):
        args.loss = loss
        picture, words = Image.new("RGB", (56, 56)), [("red", [2])]
        visualize.draw_row(model, tok, args, picture, "a red star", words)
        assert f"red: {name}" in titles


def test_marked_patches_are_bright():
    best, grey = torch.arange(49) % 5, Image.new("RGB", (280, 280), (128,) * 3)
    panel = np.asarray(visualize.grid_panel(grey, best, {2, 3}, 7).convert("L")).astype(float)
    light = panel.reshape(7, 40, 7, 40).mean((1, 3)).flatten()
    marked = np.isin(best.numpy(), [2, 3])
    assert panel.shape == (280, 280) and light[marked].min() > 128 > 118 > light[~marked].max()


def test_word_panel_frames_the_best_patch():
    s, black = torch.linspace(-1, 0, 49), Image.new("RGB", (280, 280))
    s[17] = 3  # row 2, column 3
    panel = np.asarray(visualize.word_panel(black, s, 7))
    white = (panel == 255).all(2)
    assert white[81, 121:159].all() and white[81:119, 121].all()
    assert not white[84:116, 124:156].any()
    assert white.sum() == white[80:121, 120:161].sum()
    alike = np.asarray(visualize.word_panel(black, torch.zeros(49), 7))
    assert np.isfinite(alike).all()


def spy_on_panels(monkeypatch):
    """-> a list that fills with the weights (P,) of each word's panel."""
    shown, original = [], visualize.word_panel

    def spy(picture, s, grid):
        shown.append(s)
        return original(picture, s, grid)
    monkeypatch.setattr(visualize, "word_panel", spy)
    return shown


def test_a_word_of_several_tokens_shows_their_mean(run, monkeypatch):
    shown, text = spy_on_panels(monkeypatch), "a giraffe and a red star"
    model, tok, args = evaluation.load_run(run)
    picture = Image.new("RGB", (56, 56), "teal")
    words = visualize.find_words(TOK, text, ["giraffe"])
    visualize.draw_row(model, tok, args, picture, text, words)
    s = visualize.align(model, tok, args, picture, text)[0]
    (_, at), = words
    assert len(at) > 1 and torch.allclose(shown[0], sum(s[p] for p in at) / len(at))


def test_every_word_has_a_panel_and_lost_ones_a_message(draw, monkeypatch, capsys):
    """Ten words make two rows of panels; what the context of 32 tokens cuts off is named."""
    words = "red star blue ring green moon pink heart cyan cross".split()
    shown = spy_on_panels(monkeypatch)
    picture = draw("--text", " ".join(words), "--words", *words)
    assert len(shown) == 10 and picture.size == (ROW[0], ROW[1] + 302)
    assert "tokens" not in capsys.readouterr().err
    draw("--text", " ".join(words * 4), "--words", "cross", "star")
    assert len(shown) == 10 + 3 + 3
    assert "cut to 32 tokens, wholly or in part cut off: star, cross" in capsys.readouterr().err


def test_wide_pictures_are_cut_or_padded(draw, monkeypatch, capsys):
    """The panel's title and a message say so; --fit pad shows all of it, on white."""
    titles, original = [], visualize.ImageDraw.ImageDraw.text

    def spy(self, at, text, *more, **options):
        titles.append(text)
        return original(self, at, text, *more, **options)
    monkeypatch.setattr(visualize.ImageDraw.ImageDraw, "text", spy)
    cut = np.asarray(draw("--text", "a dog"))
    assert "the middle 60% of the picture" in titles
    assert "own.png is cut to a square: --fit pad shows all" in capsys.readouterr().err
    titles.clear()
    whole = np.asarray(draw("--text", "a dog", "--fit", "pad"))
    assert not any("middle" in title for title in titles) and not capsys.readouterr().err
    assert (whole[24:70, 10:290] == 255).all() and not (cut[24:70, 10:290] == 255).all()


def test_scenes_and_csv(run, tmp_path):
    first = visualize.draw_run(run, n=2)
    assert first == [os.path.join(run, "align.png")]
    assert Image.open(first[0]).size == (ROW[0], 2 * ROW[1])
    again, = visualize.draw_run(run, n=2, out=str(tmp_path / "again.png"))
    assert open(first[0], "rb").read() == open(again, "rb").read()
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("image,caption\na.png,a dog on the beach\n")
    target = str(tmp_path / "csv.png")
    path, = visualize.draw_run(run, str(tmp_path / "d.csv"), n=6, out=target)
    assert Image.open(path).size == ROW  # one picture, though six were asked for
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "d.csv").write_text("image,caption\nbad.png,a hole\na.png,a dog on the beach\n")
    again, = visualize.draw_run(run, str(tmp_path / "d.csv"), n=1, out=str(tmp_path / "b.png"))
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
    assert printed == [str(tmp_path / "one.png"), str(tmp_path / "out.png")]
    assert one.size == every.size == ROW
    one, every = np.asarray(one), np.asarray(every)
    for row, filled in ((one, 3), (every, 4)):
        panels = [row[30:300, 10 + 290 * k:290 + 290 * k].std() > 0 for k in range(6)]
        assert panels == [True] * filled + [False] * (6 - filled)
    assert np.array_equal(one[22:302, :290], every[22:302, :290])


def test_words():
    found = visualize.find_words(TOK, "There is a Red star, on the left of an orange moon.")
    assert [w for w, _ in found] == ["red", "star", "orange", "moon"]
    twice = visualize.find_words(TOK, "a red star on a red moon", ["red"])
    assert twice == [("red", [2]), ("red", [6])]
    # an article that is asked for is kept
    assert visualize.find_words(TOK, "a red star", ["a"]) == [("a", [1])]
    (word, at), = visualize.find_words(TOK, "a giraffe")  # a word of several tokens
    assert word == "giraffe" and len(at) > 1
    assert TOK.decode(TOK("a giraffe")[0][0, at]) == "giraffe"


@pytest.mark.parametrize("wanted, decoded", [
    ("t-shirt", "t - shirt"), ("man's", "man 's"), ("Ice Cream", "ice cream"), ("10", "1 0"),
    ("shirt", "shirt"), ("man", "man"), ("2100", "2 1 0 0"), ("ice  cream,", "ice cream ,")])
def test_words_are_what_people_call_words(wanted, decoded):
    """Hyphens, apostrophes, phrases and numbers, each as one."""
    text = "10 dogs in a man’s T-shirt eat ice cream, 2100 m high"
    (word, at), = visualize.find_words(TOK, text, [wanted])
    assert word == " ".join(wanted.lower().split())
    assert TOK.decode(TOK(text, 77)[0][0, at]) == decoded


def test_words_that_are_not_there():
    for wanted in ("21", "00", "hirt", "ream", "cream dogs", "", "cat"):
        with pytest.raises(UserError, match="not in the text"):
            visualize.find_words(TOK, "2100 ice cream on a shirt, dogs", [wanted])
    found = visualize.find_words(TOK, "Two dogs, in a man's t-shirt (blue).")
    assert [word for word, _ in found] == ["two", "dogs", "man's", "t-shirt", "blue"]


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
