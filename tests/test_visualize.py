"""Tests of visualize.py: what it marks, what it draws, what it refuses.

    pytest tests/test_visualize.py
"""
import os, sys
import numpy as np
import pytest
import torch
from PIL import Image
import eval as evaluation
import visualize
from data import Scenes, UserError
from test_eval import TOK, make_run

ROW = (6 * 290 + 10, 280 + 3 * 22 + 10)                              # six panels of 280 with margins; a title and two lines of tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def draw(run, tmp_path, monkeypatch):
    """draw("--text", "...") is the command line with an RGBA picture of 200 x 120 -> the PNG drawn."""
    noise = np.random.RandomState(0).randint(0, 255, (120, 200, 4), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "own.png")

    def call(*more, image="own.png", out="out.png"):
        picture = ["--image", str(tmp_path / image)] if image else []
        monkeypatch.setattr(sys, "argv", ["visualize.py", run, *picture, "--device", "cpu", "--out", str(tmp_path / out), *more])
        visualize.main()
        return Image.open(tmp_path / out)
    return call


@pytest.mark.parametrize("loss", ["sparc", "filip"])
def test_best_tokens_are_the_loops(run, loss):
    model, tok, _ = evaluation.load_run(run)
    scene = Scenes(1, 0, 56, "test")[0]
    s, best, tokens = visualize.align(model, tok, loss, scene["image"], scene["caption"])
    V, (_, T, M) = evaluation.encode_images(model, [scene["image"]])[1][0], evaluation.encode_texts(model, tok, [scene["caption"]])
    assert tokens == ["[BOS]", *scene["caption"].split(), "[EOS]"] and s.shape == (len(tokens), 49) and len(tokens) == M.sum()
    for p in range(49):
        cos = [torch.cosine_similarity(T[0, l], V[p], dim=0).item() for l in range(len(tokens))]
        assert best[p] == int(np.argmax(cos))
        want = cos if loss == "filip" else [(T[0, l] @ V[p]).item() for l in range(len(tokens))]
        assert np.allclose(s[:, p], want, atol=1e-4)


def test_marked_patches_are_bright():
    best = torch.arange(49) % 5
    panel = np.asarray(visualize.grid_panel(Image.new("RGB", (280, 280), (128,) * 3), best, {2, 3}, 7).convert("L")).astype(float)
    light = panel.reshape(7, 40, 7, 40).mean((1, 3)).flatten()
    marked = np.isin(best.numpy(), [2, 3])
    assert panel.shape == (280, 280) and light[marked].min() > 128 > 118 > light[~marked].max()


def test_word_panel_frames_the_best_patch():
    s = torch.linspace(-1, 0, 49)
    s[17] = 3                                                        # row 2, column 3
    panel = np.asarray(visualize.word_panel(Image.new("RGB", (280, 280)), s, 7))
    white = (panel == 255).all(2)
    assert white[81, 121:159].all() and white[81:119, 121].all() and not white[84:116, 124:156].any()
    assert white.sum() == white[80:121, 120:161].sum()
    assert np.isfinite(np.asarray(visualize.word_panel(Image.new("RGB", (280, 280)), torch.zeros(49), 7))).all()   # all patches alike


def test_scenes_and_csv(run, tmp_path):
    first = visualize.draw_run(run, n=2)
    assert first == [os.path.join(run, "align.png")] and Image.open(first[0]).size == (ROW[0], 2 * ROW[1])
    again, = visualize.draw_run(run, n=2, out=str(tmp_path / "again.png"))
    assert open(first[0], "rb").read() == open(again, "rb").read()
    Image.new("RGB", (90, 60), "teal").save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("image,caption\na.png,a dog on the beach\n")
    path, = visualize.draw_run(run, str(tmp_path / "d.csv"), n=6, out=str(tmp_path / "csv.png"))
    assert Image.open(path).size == ROW                              # one picture, though six were asked for
    with pytest.raises(UserError, match="photos/t.csv.*--data"):
        visualize.draw_run(make_run(tmp_path / "other", data="photos/t.csv"))


def test_own_picture(draw, capsys, tmp_path):
    one, every = draw("--text", "A Dog on the beach", "--words", "DOG", out="one.png"), draw("--text", "a dog on the beach")
    assert capsys.readouterr().out.split() == [str(tmp_path / "one.png"), str(tmp_path / "out.png")]
    panels = [[np.asarray(x)[30:300, 10 + 290 * k:290 + 290 * k].std() > 0 for k in range(6)] for x in (one, every)]
    assert one.size == every.size == ROW and panels == [[True] * 3 + [False] * 3, [True] * 4 + [False] * 2]        # dog; dog and beach
    assert np.array_equal(np.asarray(one)[22:302, :290], np.asarray(every)[22:302, :290])      # the picture itself


def test_words():
    found = visualize.find_words(TOK, "There is a Red star, on the left of an orange moon.")
    assert [w for w, _ in found] == ["red", "star", "orange", "moon"]
    assert visualize.find_words(TOK, "a red star on a red moon", ["red"]) == [("red", [2]), ("red", [6])]
    assert visualize.find_words(TOK, "a red star", ["a"]) == [("a", [1])]                          # an article that is asked for is kept
    (word, at), = visualize.find_words(TOK, "a giraffe")             # a word of several tokens
    assert word == "giraffe" and len(at) > 1 and TOK.decode(TOK("a giraffe")[0][0, at]) == "giraffe"


def test_refusals(draw, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    for more, kw, match in ((["--text", "a dog", "--words", "cat"], {}, "--words cat: not in the text 'a dog'"),
                            ([], {}, "--image and --text go together"), (["--text", "a dog"], {"image": None}, "go together"),
                            (["--text", "a dog"], {"image": "text.png"}, "text.png as a picture"),
                            (["--text", "a dog"], {"image": "none.png"}, "no such file"),
                            (["--text", "a dog"], {"out": "no/folder/x.png"}, "can't write .*no/folder/x.png")):
        with pytest.raises(UserError, match=match) as e:
            draw(*more, **kw)
        assert "\n" not in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ["own.png", "text.png"], "a refusal must leave nothing behind"
