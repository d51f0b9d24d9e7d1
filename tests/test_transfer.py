"""Tests of tests/transfer.py: its numbers against loops by hand, on cases where they are known."""
import pathlib
import sys
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import transfer
from data import HELD_OUT
from model import UserError, build


def test_overlap_is_counted_in_pixels():
    """Boxes of whole pixels: shared pixels over all, nothing shared, one inside the other."""
    pairs = [((0, 0, 4, 4), (2, 1, 6, 5)), ((0, 0, 2, 2), (2, 0, 4, 2)),
             ((1, 1, 3, 2), (0, 0, 5, 4))]
    for a, b in pairs:
        x, y = ({(i, j) for i in range(box[0], box[2]) for j in range(box[1], box[3])}
                for box in (a, b))
        found = transfer.overlap(torch.tensor(a).float(), torch.tensor(b).float()).item()
        assert found == pytest.approx(len(x & y) / len(x | y))


def test_average_precision_by_hand():
    """Right, wrong (again the first object), wrong (another scene), right; the third object is not
    found: precision 1 at a recall of 1/3, 2/4 at 2/3."""
    box = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0.9], [0, 0, 1, 1], [0, 0, 1, 0.6]])
    score, scene = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([0, 0, 5, 1])
    true_box = torch.tensor([[0, 0, 1, 1]] * 3).float()
    found = transfer.average_precision(score, scene, box, torch.tensor([0, 1, 2]), true_box)
    assert found == pytest.approx((1 + 2 / 4) / 3)


def test_precision_is_the_best_at_a_higher_recall():
    """Wrong, right, right: 1/2 at the first recall counts as the 2/3 that comes later."""
    box = torch.tensor([[0, 0, 0.1, 0.1], [0, 0, 1, 1], [0, 0, 1, 1]])
    score, scene = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 0, 1])
    true_box = torch.tensor([[0, 0, 1, 1]] * 2).float()
    found = transfer.average_precision(score, scene, box, torch.tensor([0, 1]), true_box)
    assert found == pytest.approx(2 / 3)


def test_right_heads_find_everything_and_wrong_ones_nothing():
    """Heads that return the truth have AP50 of 100; with the boxes of others, about 0."""
    specs = transfer.split(40, "test", (1, 4))
    scene, patch, kind, box = transfer.targets(specs, 56, 7)
    logits, boxes = torch.full((40, 49, len(transfer.PAIRS)), -9.0), torch.zeros(40, 49, 4)
    logits[scene, patch, kind], boxes[scene, patch] = 9, box
    found = [transfer.measure_boxes(lambda V, t: (logits, where), None, None, specs, 56, 7)
             for where in (boxes, boxes.roll(7, 1))]
    assert found[0] == (100, 100) and max(found[1]) < 1


def test_an_object_belongs_to_the_patch_of_its_centre():
    specs = transfer.split(20, "test", (1, 4))
    scene, patch, kind, box = transfer.targets(specs, 56, 7)
    things = [(b, thing) for b, spec in enumerate(specs) for thing in spec["things"]]
    for (b, thing), *found in zip(things, scene, patch, kind, box):
        x, y = (thing.box[0] + thing.box[2]) // 2 // 8, (thing.box[1] + thing.box[3]) // 2 // 8
        assert [b, y * 7 + x] == [int(found[0]), int(found[1])]
        assert transfer.PAIRS[found[2]] == (thing.colour, thing.shape)
        assert (found[3] * 56).tolist() == pytest.approx(thing.box)


def test_unseen_pairs_are_never_trained_on():
    """Their logits get no gradient: the shift learns from 50 classes, and none is of HELD_OUT."""
    assert len(transfer.UNSEEN) == 8 and not HELD_OUT.intersection(transfer.PAIRS)
    specs, g = transfer.split(100, "train", (1, 1)), torch.Generator().manual_seed(0)
    V, t = torch.randn(100, 49, 8, generator=g), torch.randn(len(transfer.PAIRS), 8, generator=g)
    unseen = [transfer.PAIRS.index(pair) for pair in transfer.UNSEEN]
    t[unseen] = torch.nan  # would spread to every weight
    heads = transfer.fit_heads(V, t, specs, 56, 7, 3)
    assert all(torch.isfinite(p).all() for p in heads.parameters())


def test_the_classifier_learns_alone_at_first():
    """In the first sixteenth of the epochs the tower keeps its weights; then they change."""
    model = build("tiny")
    pictures, labels, _ = transfer.pictures_of(None, 56, 100, "train")
    net = transfer.Classifier(model, transfer.OBJECTIVES["sparc"], 58)
    before = [p.clone() for p in model.visual.parameters()]
    moved, original = [], torch.optim.AdamW.step

    def step(self, *more):
        original(self, *more)
        moved.append(any((p != q).any() for p, q in zip(model.visual.parameters(), before)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        transfer.tune(net, pictures, labels, 18, 1e-3)
    assert moved == [False] + [True] * 17


def test_accuracy_and_folders(tmp_path):
    """Class folders have the folders' names; other folders to test on are refused, and no class."""
    model = build("tiny")
    net = transfer.Classifier(model, transfer.OBJECTIVES["clip"], 58)
    pictures, labels, names = transfer.pictures_of(None, 56, 30, "test")
    best = net.eval()(pictures).argmax(1)
    assert transfer.accuracy(net, pictures, labels) == pytest.approx(
        100 * sum(int(a == b) for a, b in zip(best, labels)) / 30)
    for name in ("a/cat", "a/dog"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (60, 60)).save(tmp_path / name / "1.png")
    pictures, labels, names = transfer.pictures_of(str(tmp_path / "a"), 56, None, "")
    assert names == ["cat", "dog"] and labels.tolist() == [0, 1]
    assert pictures.shape == (2, 3, 56, 56)
    (tmp_path / "t.csv").write_text("image,caption\na/cat/1.png,a cat\n")
    with pytest.raises(UserError, match="a folder of pictures for each class"):
        transfer.pictures_of(str(tmp_path / "t.csv"), 56, None, "")
