"""Transfer: what trained towers are worth once something is trained on top of them.

    python tests/transfer.py boxes runs/sparc runs/clip        # SPARC 4.5, Table 3: find objects
    python tests/transfer.py finetune runs/sparc runs/clip     # PyramidCLIP Table 12: name objects
    python tests/transfer.py finetune runs/photos --data pets/train --test pets/test

eval.py measures a model as it is; what has to be trained first stands here. The built-in scenes
serve as data: boxes takes scenes of one to four objects, finetune scenes of one object, whose 58
pairs of a colour and a shape are its classes, or folders of class folders (--data, --test).

Differs from the papers:
- boxes. SPARC puts OWL-ViT's heads on ViT-B/16, tunes all of it on Objects365 and Visual Genome and
  measures on LVIS, whose rare classes are left out of that training. Here eight pairs of a colour
  and a shape are. The towers stay as they are, so that the heads read what pre-training put there.
  An object belongs to the patch of its centre, where OWL-ViT searches the best assignment; there is
  no GIoU loss, no focal loss and no augmentation.
- finetune. The schedule is the paper's: a sixteenth of the epochs for the classifier alone, AdamW
  at 1e-3, a cosine without warm-up. But it is 16 epochs instead of 128. "from scratch" is the same
  tower with new weights, in the place of its "supervised".
"""
import argparse
import math
import pathlib
import sys
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import eval as evaluation
from data import COLOURS, HELD_OUT, SHAPES, Scenes, Thing, center_crop, join, normalize
from data import open_dataset, to_tensor
from losses import OBJECTIVES, unit
from model import CLIP, UserError

PAIRS = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT]     # 58 classes
UNSEEN = [pair for k, pair in enumerate(PAIRS) if k % 7 == 3]  # 8 that boxes never trains on


def split(n, name, objects):
    """n scenes -> [spec, with its picture]. Trained runs have seen none of these pictures."""
    scenes = Scenes(n, 10_000, 56, name, objects, unique=False, family=1)
    return [scenes.spec(i) | {"image": scenes.draw(scenes.spec(i))} for i in range(n)]


# -------------------------------------------------------------------- boxes: SPARC 4.5, Table 3
class Heads(nn.Module):
    """OWL-ViT's two heads: each patch says what it is, in the space of the texts, and where."""
    def __init__(self, D, grid):
        super().__init__()
        self.what = nn.Linear(D, D)
        self.where = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, 4))
        self.scale, self.shift = (nn.Parameter(torch.tensor(x)) for x in (10.0, -5.0))
        y, x = torch.meshgrid(*2 * [(torch.arange(grid) + 0.5) / grid], indexing="ij")
        self.register_buffer("centres", torch.stack([x, y], -1).flatten(0, 1))  # (P, 2)

    def forward(self, V, t):
        """V (B,P,D), t (K,D) -> logits (B,P,K), boxes (B,P,4): x1, y1, x2, y2 in 0..1."""
        logits = self.scale * unit(self.what(V)) @ unit(t).T + self.shift
        x = self.where(V)
        centre, half = self.centres + x[..., :2].tanh() / 4, x[..., 2:].sigmoid() / 2
        return logits, torch.cat([centre - half, centre + half], -1)


def targets(specs, size, grid):
    """-> of each object: number of its scene, patch of its centre, class, box (4,) in 0..1."""
    rows = [(b, PAIRS.index((t.colour, t.shape)), t.box)
            for b, spec in enumerate(specs) for t in spec["things"]]
    scene, kind, box = (torch.tensor(column) for column in zip(*rows))
    box = box / size
    column, row = ((box[:, k] + box[:, k + 2]) / 2 * grid for k in (0, 1))
    return scene, row.long() * grid + column.long(), kind, box


def fit_heads(V, t, specs, size, grid, epochs):
    """Heads trained on patches V (B,P,D), texts t (K,D) and the objects of the scenes."""
    heads = Heads(V.shape[-1], grid)
    optimizer = torch.optim.AdamW(heads.parameters(), 2e-3, weight_decay=0.01)
    steps = epochs * (len(V) // 100)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scene, patch, kind, box = targets(specs, size, grid)
    known = torch.tensor([pair not in UNSEEN for pair in PAIRS])  # (K,)
    truth = torch.zeros(*V.shape[:2], len(PAIRS))
    truth[scene, patch, kind] = 1
    for _ in tqdm(range(steps), "heads", leave=False, disable=None):
        some = torch.randperm(len(V))[:100]
        logits, boxes = heads(V[some], t[known])
        place = torch.full((len(V),), -1).index_put((some,), torch.arange(100))[scene]
        mine = place >= 0  # objects of these scenes
        found = boxes[place[mine], patch[mine]]
        wrong = F.binary_cross_entropy_with_logits(logits, truth[some][..., known])
        loss = 50 * wrong + (found - box[mine]).abs().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return heads.eval()


def overlap(a, b):
    """Intersection over union of boxes (...,4) and (...,4), x1, y1, x2, y2 -> (...)."""
    low, high = torch.maximum(a, b)[..., :2], torch.minimum(a, b)[..., 2:]
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-9)


def average_precision(score, scene, box, true_scene, true_box, least=0.5):
    """Area under the precision and recall of one class's boxes, the surest first -> 0..1.
    score (N,), scene (N,), box (N,4) of all that was found; true_scene (n,), true_box (n,4).
    An object is found once, by a box that overlaps it by `least` or more; others are wrong."""
    free, hits = torch.ones(len(true_scene), dtype=torch.bool), []
    for k in score.argsort(descending=True).tolist():
        fits = overlap(box[k], true_box) * (free & (true_scene == scene[k]))
        best = int(fits.argmax())
        hits.append(bool(fits[best] >= least))
        free[best] &= not hits[-1]
    hits = torch.tensor(hits, dtype=torch.float64)
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_later = precision.flip(0).cummax(0).values.flip(0)  # recall may be had at this precision
    return ((best_later * hits).sum() / len(true_scene)).item()


@torch.no_grad()
def measure_boxes(heads, V, t, specs, size, grid, each=300):
    """-> AP50 in per cent, the mean over the pairs that training has seen, and over UNSEEN."""
    logits, boxes = heads(V, t)
    scene, _, kind, box = targets(specs, size, grid)
    seen, unseen = [], []
    for k, pair in enumerate(PAIRS):
        true = kind == k
        if true.any():
            score, place = logits[..., k].flatten().topk(each)
            found = average_precision(score, place // grid ** 2, boxes.flatten(0, 1)[place],
                                      scene[true], box[true])
            (unseen if pair in UNSEEN else seen).append(100 * found)
    return sum(seen) / len(seen), sum(unseen) / len(unseen)


@torch.no_grad()
def boxes(folder, n=3000, epochs=100):
    """A run -> its row of the table: AP50 of seen pairs, of unseen ones."""
    model, tok, _ = evaluation.load_run(folder)
    grid = model.visual.grid
    kinds = [join(Scenes.phrase(Thing("", "", *pair, None), 0)) for pair in PAIRS]
    t, _, _ = evaluation.encode_texts(model, tok, kinds)
    train = [spec for spec in split(n, "train", (1, 4))
             if not any((x.colour, x.shape) in UNSEEN for x in spec["things"])]
    test = split(n // 3, "test", (1, 4))
    V, V_test = (evaluation.encode_images(model, [spec["image"] for spec in specs])[1]
                 for specs in (train, test))
    with torch.enable_grad():
        heads = fit_heads(V, t, train, 56, grid, epochs)
    seen, unseen = measure_boxes(heads, V_test, t, test, 56, grid)
    return {"AP50 seen": seen, "AP50 unseen": unseen}


# ---------------------------------------------------- finetune: PyramidCLIP appendix E, Table 12
def pictures_of(path, size, n, name):
    """A folder of class folders, or without one n scenes of one object, of the split `name` ->
    pictures (N,3,size,size) uint8, labels (N,), names of the classes. Raises UserError."""
    if not path:
        specs = split(n, name, (1, 1))
        labels = [PAIRS.index((s["things"][0].colour, s["things"][0].shape)) for s in specs]
        images, names = [spec["image"] for spec in specs], PAIRS
    else:
        data = open_dataset(path)
        if not data.classes:
            raise UserError(f"{path}: give a folder with a folder of pictures for each class")
        found, names = list(data.good(size)), data.classes
        if data.bad:
            print(f"note: {len(data.bad)} rows are left out; the first: {data.bad[0]}")
        if not found:
            raise UserError(f"{path} has no picture that can be read")
        images, labels = [image for _, image in found], [data.label(i) for i, _ in found]
    return to_tensor([center_crop(im, size) for im in images]), torch.tensor(labels), names


class Classifier(nn.Module):
    """A linear layer on an image tower's v, or on its patches' mean where the loss has no v."""
    def __init__(self, model, objective, classes):
        super().__init__()
        self.model, self.objective = model, objective
        self.top = nn.Linear(model.config["embed_dim"], classes)

    def forward(self, pictures):
        v, V = self.model.encode_image(normalize(pictures))
        return self.top(unit(self.objective.picture(v, V)) * 10)  # (B, K)


def tune(net, pictures, labels, epochs, lr, batch=100):
    """PyramidCLIP's schedule: the layer alone for a sixteenth of the epochs, then everything."""
    an_epoch = math.ceil(len(pictures) / batch)
    steps, alone = epochs * an_epoch, epochs * an_epoch // 16
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps), "fine-tuning", leave=False, disable=None):
        net.model.train(step >= alone)  # BatchNorm's statistics stay too
        net.model.requires_grad_(step >= alone)
        some = torch.randperm(len(pictures))[:batch]
        loss = F.cross_entropy(net(pictures[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(net, pictures, labels):
    """Top-1 in per cent."""
    net.eval()
    best = torch.cat([net(some).argmax(1) for some in pictures.split(250)])
    return 100 * (best == labels).double().mean().item()


def finetune(folder, data=None, test=None, n=2000, epochs=16, lr=1e-3):
    """A run -> its row of the table: top-1 fine-tuned, and of a tower with new weights."""
    if bool(data) != bool(test):
        raise UserError("--data and --test go together: class folders to train on and to test on")
    model, _, args = evaluation.load_run(folder)
    size, objective = model.config["image_size"], OBJECTIVES[args.loss]
    pictures, labels, names = pictures_of(data, size, n, "train")
    others, truth, test_names = pictures_of(test, size, n // 2, "test")
    if names != test_names:
        raise UserError(f"{data} and {test} have different class folders: give both the same")
    row = {}
    for name, tower in ("fine-tuned", model), ("from scratch", CLIP(**model.config)):
        net = Classifier(tower, objective, len(names))
        tune(net, pictures, labels, epochs, lr)
        row[name] = accuracy(net, others, truth)
    return row


def main(argv=None):
    ap = argparse.ArgumentParser(description="Train on top of runs: objects' boxes, or classes.")
    ap.add_argument("kind", choices=("boxes", "finetune"), help="SPARC Table 3, PyramidCLIP's 12")
    ap.add_argument("runs", nargs="+", metavar="RUN", help="run folders, files of CLIP's weights")
    ap.add_argument("--data", help="finetune: train on these class folders (scenes)")
    ap.add_argument("--test", help="finetune: and test on these")
    ap.add_argument("--epochs", type=int, help="go so often over the data (boxes 100, finetune 16)")
    ap.add_argument("--lr", type=float, default=1e-3, help="finetune: the peak rate")
    ap.add_argument("--seed", type=int, default=0, help="of the new weights and the order")
    args = ap.parse_args(argv)
    more = {} if args.epochs is None else {"epochs": max(1, args.epochs)}
    if args.kind == "finetune":
        more |= {"data": args.data, "test": args.test, "lr": args.lr}
    elif args.data or args.test:
        raise UserError("--data and --test are for finetune: boxes knows scenes alone")
    for number, (name, folder) in enumerate(zip(evaluation.run_names(args.runs), args.runs)):
        torch.manual_seed(args.seed)
        row = {"boxes": boxes, "finetune": finetune}[args.kind](folder, **more)
        if number == 0:
            print(f"| | {' | '.join(row)} |\n|---|{'---:|' * len(row)}")
        print(f"| {name} | {' | '.join(f'{x:.1f}' for x in row.values())} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        raise SystemExit(f"transfer.py: {e}")
