"""Fine-tune DETR on PASCAL VOC, or train on a folder of images with VOC's XML files.

    python train_voc.py                                    # VOC2012 and COCO's weights, 40 epochs
    python train_voc.py --data my_folder --model tiny      # a small detector from scratch
    python train_voc.py --data my_folder --model outputs/best.pth --eval
    python train_voc.py --resume                           # continue the run in outputs/
    torchrun --nproc_per_node=4 train_voc.py               # four GPUs share each batch
"""
import argparse
import json
import os
import re
import sys
import time
import unicodedata
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter, defaultdict
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from detr_mini import (DETR, BasicBlock, HungarianMatcher, ResNet, SetCriterion, box_areas,
                       box_xyxy_to_cxcywh, fit, load_detr, normalize, post_process,
                       read_checkpoint, to_tensor)
from infer import SUFFIXES, choose_device, choose_dtype, open_image, save

# ---- Settings ------------------------------------------------------------------------------------
FINE_TUNE = dict(           # a trained DETR on other images, with the paper's values (A.4)
    epochs=40,
    batch_size=16,          # images a step, over all processes
    lr=1e-4,
    lr_backbone=0.1,        # times lr
    rate=lambda done: 0.1 if done >= 0.75 else 1,       # times lr, after this share of the run
    early=0,                # share of the run with images of half the size: see `augmentation`
    eos_coef=0.1,           # weight of "no object" in the loss; 0.1 in the early part
    evaluate_every=1,       # epochs
)
TINY = FINE_TUNE | dict(    # 2.2 M parameters from scratch, on a CPU
    epochs=1200,
    lr=6e-4,
    lr_backbone=1,
    rate=lambda done: min(60 * done, 1, 1.5 - 1.5 * done),      # warm-up; from a third on to 0
    early=1 / 3,
    eos_coef=0.5,           # two queries that cannot decide on an object score 1 / 1.5 each
    evaluate_every=20,
)
OPTIONS = dict(data=None, train=None, val=None, model="detr_resnet50", accumulate=1, seed=0,
               count_difficult=False)
RANK = int(os.environ.get("RANK", 0))           # this process among those of torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
SYNONYMS = {"training": "train", "valid": "val", "validation": "val"}   # as folders' names
COCO_NAMES = {              # of VOC's classes, if they differ
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}

# ---- Data: which files are a set, and which image belongs to an annotation -----------------------
def progress(title, items, count):
    """Yield the items, and say how many are done and how long the rest takes: on one line of a
    terminal, elsewhere once a minute."""
    terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if RANK == 0 and (terminal or now - shown > 60):
            left = timedelta(seconds=round((now - start) / done * (count - done)))
            end = "\r" if terminal else "\n"
            print(f"{title}  {done}/{count}  ETA {left}  ", end=end, file=sys.stderr, flush=True)
            shown = now

def fetch_voc(name):
    """Download a set of VOC, such as VOC2012/train, to data/VOCdevkit, unless it is there."""
    year, _, part = name.removeprefix("VOC").partition("/")
    if not Path(f"data/VOCdevkit/VOC{year}/ImageSets/Main/{part}.txt").exists():
        try:
            VOCDetection("data", year, part, download=True)
        except (OSError, RuntimeError) as error:
            raise OSError(f"could not fetch {name} ({error}): put VOC's tar file into data/ by "
                          "hand, or name a VOCdevkit with --data") from error

def key(path):
    """What an image and its annotation share: the name without endings, 1 of 1.jpg.xml."""
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", str(path))[-1])
    stem, ending = os.path.splitext(re.sub(r"\.xml$", "", name, flags=re.IGNORECASE))
    return stem if ending.lower() in SUFFIXES else stem + ending

def is_annotation(xml):
    """Whether a file's root is `annotation`, or cannot be read, which `read_record` reports."""
    try:
        _, root = next(ElementTree.iterparse(xml, events=["start"]))
        return root.tag.lower() == "annotation"
    except Exception:
        return True

def find_files(data):
    """Annotations and images {key: [Path]} and lists {name: [Path]} below a folder. Hidden files,
    __MACOSX and other XML are passed over; links are followed, but not upwards."""
    xmls, images, lists = defaultdict(list), defaultdict(list), defaultdict(list)
    for root, folders, files in os.walk(data, followlinks=True):
        here = os.path.realpath(root) + os.sep
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))
                      and not here.startswith(os.path.realpath(f"{root}/{name}") + os.sep)]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                images[key(path)].append(path)
            elif path.suffix.lower() == ".xml" and is_annotation(path):
                xmls[key(path)].append(path)
            elif path.suffix == ".txt" and path.parts[-3:-1] == ("ImageSets", "Main"):
                lists[path.stem].append(path)
    return xmls, images, lists

def folders_of(path, data):
    """The names of the folders from `data` to a file, in lower case, and val for valid."""
    parts = [part.lower() for part in path.relative_to(data).parts[:-1]]
    return [SYNONYMS.get(part, part) for part in parts]

def find_set(data, name, xmls, lists):
    """The annotations of a set: those that ImageSets/Main/NAME.txt lists, else those below folders
    NAME. A/NAME is looked for below the folder A. ValueError if there are none, or two lists, or
    not one annotation for a line."""
    folder, name = data / Path(name).parent, Path(name).name
    listed = [path for path in lists.get(name, []) if folder in path.parents]
    if len(listed) > 1:
        raise ValueError(f"two lists of {name}: {listed[0]}, {listed[1]}: name one, such as "
                         f"{listed[0].parents[2].relative_to(data)}/{name}")
    if listed:
        found = []
        lines = listed[0].read_text("utf-8-sig").splitlines()
        for line in filter(None, map(str.strip, lines)):
            named = [xml for xml in xmls[key(line)] if listed[0].parents[2] in xml.parents]
            if len(named) != 1:
                raise ValueError(f"{listed[0]}: there must be one XML file for {line!r}, not "
                                 f"{', '.join(map(str, named)) or 'none'}")
            found += named
    else:
        plain = SYNONYMS.get(name.lower(), name.lower())
        found = sorted(xml for same in xmls.values() for xml in same
                       if folder in xml.parents and plain in folders_of(xml, folder))
    if not found:
        raise ValueError(f"no list or folder {name} below {folder} has annotations: name --train "
                         f"and --val; there are these lists: {', '.join(sorted(lists)) or 'none'}")
    return found

def find_sets(data, names, xmls, lists):
    """{set: annotations} for {set: names or None}, and whether the split is ours: if nothing is
    named and there are no lists and folders train, val and test, a fifth of all is val, by a hash
    of the names, so that images which are added later move hardly any."""
    found = [xml for same in xmls.values() for xml in same]
    present = set(lists).union(*(folders_of(xml, data) for xml in found))
    if any(names.values()) or present & {"train", "val", "test"} or not found:
        return {part: [xml for name in named or [part] for xml in find_set(data, name, xmls, lists)]
                for part, named in names.items()}, False
    found.sort(key=lambda xml: zlib.crc32(key(xml).encode()))
    fifth = -(-len(found) // 5) if "train" in names else len(found)
    return {"val": found[:fifth], "train": found[fifth:]}, True

def find_image(xml, images, data):
    """The image of an annotation: the one with its name; of several, those below a folder `images`
    or `JPEGImages`; of several, the one in the folders most alike. ValueError unless it is one."""
    found = images[key(xml)]
    below = [path for path in found if {"images", "jpegimages"} & set(folders_of(path, data))]
    found = below or found
    if len(found) > 1:
        alike = defaultdict(list)       # by how many folders differ
        for path in found:
            if len(path.parts) == len(xml.parts):
                pairs = zip(folders_of(path, data), folders_of(xml, data))
                alike[sum(a != b for a, b in pairs)].append(path)
        found = alike[0] or alike[1] or found
    if len(found) != 1:
        named = ", ".join(map(str, found)) or "none"
        raise ValueError(f"there must be one image {key(xml)}, not {named}")
    return found[0]

# ---- Data: what is checked before the first step, and how an image is read ----------------------
OBJECT = "name", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax"

def read_record(xml, images, data):
    """An annotation and its image, checked: `path`, `upright` (turned by its EXIF), `size` (h, w),
    `names` (M,), `boxes` (M, 4) x0 y0 x1 y1 in pixels from 0, `difficult` (M,), and whether <size>
    is `wrong`. If they cannot be used, a string that says why."""
    names, boxes, difficult = [], [], []
    file = xml
    try:
        path = find_image(xml, images, data)
        root = ElementTree.parse(xml).getroot()
        for node in root.iter("object"):
            fields = [node.findtext(tag) for tag in OBJECT]
            if None in fields:
                raise ValueError(f"an object lacks one of {', '.join(OBJECT)}")
            names.append(fields[0].strip())
            boxes.append([float(side) for side in fields[1:]])
            difficult.append(node.findtext("difficult", "").strip() == "1")
        given = [float(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
        if boxes and max(map(max, boxes)) <= 1:
            raise ValueError("boxes are fractions, from 0 to 1: VOC's are in pixels")
        file = path
        with Image.open(path) as image:
            w, h = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
            image.draft("L", (1, 1))    # an eighth of a JPEG's pixels, quick to decode, is enough
            image.load()                # to find one that is cut off
    except Exception as error:          # Pillow's are of many types
        return f"{file}: {error}"
    upright = not turned or w == h or given != [w, h]
    if turned and upright:
        w, h = h, w
    return {"path": path, "upright": upright, "size": (h, w), "names": names,
            "boxes": np.reshape(boxes, (-1, 4)) - [1, 1, 0, 0],     # VOC counts from 1
            "difficult": np.array(difficult, dtype=bool), "wrong": all(given) and given != [w, h]}

def read_sets(sets, images, data):
    """{set: annotations} to {set: records}. Raises ValueError for all files that cannot be used."""
    xmls = sorted({xml for part in sets.values() for xml in part})
    with ThreadPool() as pool:
        results = pool.imap(partial(read_record, images=images, data=data), xmls)
        records = dict(zip(xmls, progress("read", results, len(xmls))))
    wrong = [result for result in records.values() if isinstance(result, str)]
    if wrong:
        raise ValueError(f"{len(wrong)} files to mend or move away: {'; '.join(wrong[:5])}")
    xml_of = {record["path"]: xml for xml, record in records.items()}
    for xml, record in records.items():
        other = xml_of[record["path"]]
        if other != xml:
            raise ValueError(f"{xml} and {other} have one image, {record['path']}: move one away")
    return {part: [records[xml] for xml in dict.fromkeys(sets[part])] for part in sets}

class VOC(Dataset):
    """Images (3, h, w) uint8, and targets: `boxes` (M, 4) cx, cy, w, h in [0, 1], `labels` (M,) and
    `size`, (h, w) of the file. `transform` is for training: difficult objects are left out
    then. Without it, images are resized to `sizes`, as by `detect`."""

    def __init__(self, records, classes, sizes, transform=None):
        self.records = []
        self.sizes = sizes
        self.transform = transform
        label_of = {name: label for label, name in enumerate(classes)}
        counts = Counter()
        for record in records:
            names = [name if name in label_of else COCO_NAMES.get(name) for name in record["names"]]
            labels = np.array([label_of.get(name, -1) for name in names], dtype=int)
            h, w = record["size"]
            boxes = record["boxes"].clip(0, [w, h, w, h])
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
            keep = has_area & (labels >= 0)
            self.records.append(record | {"boxes": boxes[keep], "labels": labels[keep],
                                          "difficult": record["difficult"][keep]})
            counts["of other classes left out"] += int((labels < 0).sum())
            counts["clipped to the image"] += int((boxes != record["boxes"])[keep].any(1).sum())
            counts["without area dropped"] += int((~has_area).sum())
            counts["marked difficult"] += int(record["difficult"][keep].sum())
        objects = sum(len(record["labels"]) for record in self.records)
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        wrong = [record["path"] for record in records if record["wrong"]]
        if wrong:
            notes.append(f"{len(wrong)} not of their <size>, such as {wrong[0]}")
        self.summary = "; ".join([f"{len(records)} images, {objects} objects", *notes])
        if transform and objects == counts["marked difficult"]:
            raise ValueError(f"nothing to train on: {self.summary}")

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        image = tv_tensors.Image(to_tensor(open_image(record["path"], record["upright"])))
        keep = ~record["difficult"] if self.transform else slice(None)
        boxes = torch.tensor(record["boxes"][keep], dtype=torch.float32)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=record["size"])
        labels = torch.tensor(record["labels"][keep])
        transform = self.transform or v2.Resize(fit(*record["size"], *self.sizes))
        image, target = transform(image, {"boxes": boxes, "labels": labels})
        h, w = image.shape[1:]
        target["boxes"] = box_xyxy_to_cxcywh(target["boxes"] / torch.tensor([w, h, w, h]))
        target["size"] = record["size"]
        return image.as_subclass(torch.Tensor), target

# ---- Augmentation (paper: 4): change it by changing a list ---------------------------------------
class RandomSizeCrop(v2.RandomCrop):
    """A random window of `low` to `high` pixels a side, or of the whole side if it is shorter."""

    def __init__(self, low, high):
        super().__init__(high)
        self.low = low
        self.high = high

    def make_params(self, flat_inputs):
        h, w = v2.functional.get_size(flat_inputs[0])
        height = int(torch.randint(min(h, self.low), min(h, self.high) + 1, ()))
        width = int(torch.randint(min(w, self.low), min(w, self.high) + 1, ()))
        self.size = height, width
        return super().make_params(flat_inputs)

def augmentation(size, max_size, early):
    """The transforms to train with: the paper's, which are for size 800, in proportion; or those
    for a model of one fixed size, such as `tiny`, whose images have half of it early in a run."""
    if max_size is None:
        height, width = fit(1, 1, size, None)
        ratio = width / height
        flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
        if early:
            half = v2.Resize((height // 2, width // 2))
            return v2.Compose([*flips, half, v2.SanitizeBoundingBoxes()])
        return v2.Compose([
            *flips,
            v2.Resize((2 * height, 2 * width)),     # so that windows have the shape of any image
            v2.RandomResizedCrop((height, width), (0.5, 1), (0.8 * ratio, 1.25 * ratio)),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=4),
        ])
    sizes = [round(size * pixels / 800) for pixels in range(480, 801, 32)]
    smaller = [round(size * pixels / 800) for pixels in (400, 500, 600)]
    crop = RandomSizeCrop(round(size * 384 / 800), round(size * 600 / 800))
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomShortestSize(smaller), crop]),
        v2.RandomShortestSize(sizes, max_size),
        v2.SanitizeBoundingBoxes(),
    ])

# ---- Model ---------------------------------------------------------------------------------------
def tiny(num_classes):
    """A DETR of 2.2 M parameters, with stride 16 and trained batch norm, to train from scratch."""
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=nn.BatchNorm2d)
    model = DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4,
                 dim_feedforward=512, num_queries=40, dropout=0.0)
    model.sizes = (192, 256), None
    return model

def keep_known_classes(model, classes):
    """Give `model` a head for `classes`. The rows of those that it knows and of "no object" are
    kept, so it predicts them from the first step. Returns the names that start untrained."""
    head = model.class_embed
    known = {name: label for label, name in enumerate(model.classes)}
    rows = [known.get(name, known.get(COCO_NAMES.get(name))) for name in classes]
    model.class_embed = nn.Linear(head.in_features, len(classes) + 1).to(head.weight.device)
    for new, old in enumerate([*rows, len(model.classes)]):
        if old is not None:
            model.class_embed.weight.data[new] = head.weight.data[old]
            model.class_embed.bias.data[new] = head.bias.data[old]
    model.classes = list(classes)
    return [name for name, old in zip(classes, rows) if old is None]

# ---- Training and evaluation ---------------------------------------------------------------------
def forward(model, criterion, batch, args):
    """Outputs for a batch [(image, target)], normalised on the device and padded by the model, and
    their losses, with the weighted sum of them as `loss`."""
    images = [normalize(image.to(args.device, non_blocking=True)) for image, _ in batch]
    targets = [{name: target[name].to(args.device, non_blocking=True)
                for name in ("labels", "boxes")} for _, target in batch]
    with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
        outputs = model(images)
    losses = criterion(outputs, targets)
    return outputs, losses | {"loss": criterion.total(losses)}

def averages(steps):
    """The means of the losses of all steps, [{name: tensor}], over all processes."""
    values = torch.stack([torch.stack([*losses.values()]) for losses in steps]).mean(0)
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(steps[0], values.tolist()))

def train_one_epoch(model, criterion, optimizer, schedule, scaler, loader, title, args):
    """One pass over the training images; returns the averages of the losses."""
    model.train()
    steps = []
    for batch in progress(title, loader, len(loader)):
        size = -(-len(batch) // args.accumulate)        # images at a time
        for i in range(0, len(batch), size):
            part = batch[i:i + size]
            _, losses = forward(model, criterion, part, args)
            scaler.scale(losses["loss"] * len(part) / len(batch)).backward()
            steps.append({name: value.detach() for name, value in losses.items()})
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    return averages(steps)

@torch.inference_mode()
def evaluate(model, criterion, loader, args):
    """Averages of the losses, and COCO's AP. `loader` has every n-th of n processes' records."""
    model.eval()
    steps, results = [], []
    for batch in progress("evaluate", loader, len(loader)):
        outputs, losses = forward(model, criterion, batch, args)
        steps.append(losses)
        for result in post_process(outputs, [target["size"] for _, target in batch]):
            results.append({name: value.cpu() for name, value in result.items()})
    parts = [results] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, results)
    records = loader.dataset.records
    predictions = [result for same in zip(*parts) for result in same]   # the last may be repeated
    ignore = not args.count_difficult
    targets = [record | {"ignore": record["difficult"] & ignore} for record in records]
    return averages(steps), coco_ap(predictions[:len(records)], targets, len(model.classes))

# ---- COCO's average precision --------------------------------------------------------------------
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}   # in pixels
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)

def coco_ap(predictions, targets, num_classes):
    """COCO's average precision, as `pycocotools` computes it: AP, AP50, AP75, APs, APm, APl as
    fractions, -1 if no object counts, and AP50_per_class, a list. One dict an image: predictions'
    `scores` (n,), `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels; targets' `labels` (m,), `boxes`
    (m, 4), and `ignore` (m,) bool for what is neither to be found nor wrong to find."""
    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0
    precision = {area: -np.ones((num_classes, len(IOUS), len(RECALLS))) for area in AREAS}
    for area, (low, high) in AREAS.items():
        images = [match_boxes(prediction, target, low, high)
                  for prediction, target in zip(predictions, targets, strict=True)]
        scores, labels, hits, ignored, positives = (np.concatenate(p, -1) for p in zip(*images))
        positives = np.bincount(positives, minlength=num_classes)
        for label in positives.nonzero()[0]:
            order = np.flatnonzero(labels == label)
            order = order[np.argsort(-scores[order], kind="stable")]
            counts = ~ignored[:, order]                             # (T, D)
            true = np.cumsum(hits[:, order] & counts, axis=1)
            exact = true / (np.cumsum(counts, axis=1) + np.spacing(1))
            exact = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]  # at this recall or up
            for t in range(len(IOUS)):
                at = np.searchsorted(true[t] / positives[label], RECALLS)
                precision[area][label, t] = np.append(exact[t], 0)[at]
    all_areas = precision.pop("")                                   # (K, T, R)
    metrics = {"AP": mean(all_areas), "AP50": mean(all_areas[:, 0]), "AP75": mean(all_areas[:, 5])}
    metrics |= {f"AP{area}": mean(values) for area, values in precision.items()}
    return metrics | {"AP50_per_class": [mean(values[0]) for values in all_areas]}

def match_boxes(prediction, target, low, high):
    """Greedy matching within the classes of one image, by D detections, the best first, at T
    thresholds, of G objects with areas from `low` to `high`. Returns scores (D,), labels (D,), hits
    (T, D), which of them are ignored (T, D), and the labels of the objects that count."""
    scores, labels = np.asarray(prediction["scores"]), np.asarray(prediction["labels"])
    true_labels = np.asarray(target["labels"])
    crowd = np.asarray(target.get("ignore", 0 * true_labels)) > 0
    order = np.argsort(-scores, kind="stable")
    ranks = np.tril(labels[order, None] == labels[order], -1).sum(1)
    order = order[ranks < 100]                                      # of a class, as COCO's
    boxes = torch.as_tensor(prediction["boxes"])[order].double()
    true_boxes = torch.as_tensor(target["boxes"]).double().view(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).numpy()
    true_area = (true_boxes[:, 2:] - true_boxes[:, :2]).prod(1).numpy()
    skip = crowd | (true_area < low) | (true_area > high)           # (G,)
    ignored = np.tile((area < low) | (area > high), (len(IOUS), 1))         # (T, D)
    hits = np.zeros_like(ignored)
    free = np.ones((len(IOUS), len(true_boxes)), bool)

    inner, union, _ = (value.numpy() for value in box_areas(boxes, true_boxes))     # (D, G) each
    iou = inner / np.where(crowd, area[:, None], union)
    iou[labels[order, None] != true_labels] = 0
    for d in np.flatnonzero((iou >= IOUS[0]).any(1)):
        can = (iou[d] >= IOUS[:, None]) & (free | crowd)            # (T, G)
        prefer = can & ~skip                                        # one that counts goes first
        can = np.where(prefer.any(1, keepdims=True), prefer, can)
        last = np.where(can, iou[d], -1)[:, ::-1].argmax(1)         # of equals, the last
        best = len(true_boxes) - 1 - last                           # (T,)
        hit = can.any(1)
        hits[hit, d] = True
        free[hit, best[hit]] = False
        ignored[hit, d] = skip[best[hit]]
    return scores[order], labels[order], hits, ignored, true_labels[~skip]

# ---- Curves --------------------------------------------------------------------------------------
def draw_curves(history):
    """The log as a figure of eight panels."""
    names = ("loss", "coco_eval_bbox", "loss_ce", "loss_bbox", "loss_giou", "class_error",
             "cardinality_error", "lr")
    figure = Figure((16, 7), layout="constrained")
    figure.suptitle("training solid, validation dashed; coco_eval_bbox: AP, AP50, AP75")
    for axes, name in zip(figure.subplots(2, 4).flat, names):
        for column, line in ((f"train_{name}", "-"), (f"test_{name}", "--"), (name, "-")):
            entries = [entry for entry in history if column in entry]
            values = [np.ravel(entry[column])[:3] for entry in entries]
            axes.plot([entry["epoch"] + 1 for entry in entries], values, line)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
    return figure

# ---- The run -------------------------------------------------------------------------------------
def run(args):
    # The device, and the settings: those given, else those of the run to resume, else the recipe's.
    log = partial(print, flush=True) if RANK == 0 else lambda *_: None
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.device)
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", args.device.index or 0)))
        args.device = torch.device("cuda", torch.cuda.current_device())
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    file = args.output / "checkpoint.pth"
    earlier = [path for path in (file, args.output / "best.pth") if path.exists()]
    if earlier and not (args.resume or args.eval):
        raise ValueError(f"{earlier[0]} is of an earlier run: --resume it or name another --output")
    resumed = read_checkpoint(file) if args.resume else {}
    settings = OPTIONS | resumed.get("settings", {}) | vars(args)
    recipe = TINY if settings["model"] == "tiny" else FINE_TUNE
    workers = min(16, os.cpu_count() // WORLD) if cuda else 0
    vars(args).update(recipe | {"workers": workers} | settings)
    if min(args.epochs, args.batch_size, args.accumulate) < 1:
        raise ValueError("--epochs, --batch-size and --accumulate must be at least 1")
    torch.manual_seed(args.seed)

    # The data: found, read and checked.
    names = {"val": args.val} if args.eval else {"train": args.train, "val": args.val}
    if args.data is None:
        names = {part: named or [f"VOC2012/{part}"] for part, named in names.items()}
        if RANK == 0:
            for name in sum(names.values(), []):
                fetch_voc(name)
    if WORLD > 1:
        dist.barrier()      # the other processes wait for the download
    data = Path(args.data or "data/VOCdevkit")
    xmls, images, lists = find_files(data)
    sets, ours = find_sets(data, names, xmls, lists)
    records = read_sets(sets, images, data)
    classes = {name for part in records.values() for record in part for name in record["names"]}
    classes = resumed.get("classes", sorted(classes))

    # The model, with a head for these classes; to evaluate, with the head that it has.
    if args.model == "tiny" and not args.eval:
        model = tiny(len(classes))
        model.classes = classes
    else:
        source = file if resumed else args.model
        headless = "class_embed.bias" not in read_checkpoint(source)["model"]
        model = load_detr(source, num_classes=len(classes) if headless else None)
    if args.eval:
        classes = model.classes
    new = keep_known_classes(model, classes) if model.classes != classes else []
    model.aux_loss = True
    model.to(args.device, memory_format=torch.channels_last)
    criterion = SetCriterion(len(classes), HungarianMatcher()).to(args.device)

    # The images as the model sees them, and what is to be said of them.
    transforms = {"train": augmentation(*model.sizes, early=False), "val": None}
    parts = {part: VOC(records[part], classes, model.sizes, transforms[part]) for part in names}
    for part, dataset in parts.items():
        log(f"{part}: {dataset.summary}")
    log("classes:", ", ".join(name for name in classes if name != "N/A"))
    if ours:
        share = "all" if args.eval else "a fifth of all, by a hash of the names"
        log(f"split: {data} has no list or folder train, val or test, so val is {share}")
    both = set(sets.get("train", [])) & set(sets["val"])
    if both:
        log(f"note: {len(both)} images are in train and in val, such as {min(both)}")
    if new:
        log(f"class head: new and untrained are {', '.join(new)}")
    queries = model.query_embed.num_embeddings
    most = max(len(record["labels"]) for part in parts.values() for record in part.records)
    if most > queries:
        log(f"note: up to {most} objects in an image; {queries} queries find at most {queries}")
    val = parts["val"]
    train = parts.get("train", val)
    batch_size = min(args.batch_size, len(train))
    options = dict(batch_size=max(1, batch_size // WORLD), num_workers=args.workers,
                   collate_fn=list, pin_memory=cuda)
    val_sampler = DistributedSampler(val, WORLD, RANK, shuffle=False)
    val_loader = DataLoader(val, sampler=val_sampler, **options)
    if args.eval:
        losses, ap = evaluate(model, criterion, val_loader, args)
        per_class = zip(classes, ap.pop("AP50_per_class"))
        log(f"loss {losses['loss']:.3f} ", *(f"{name} {value:.3f} " for name, value in ap.items()))
        log("AP50: ", *(f"{name} {value:.3f} " for name, value in per_class if value >= 0))
        return

    # What is trained, and its state, which --resume reads.
    sampler = DistributedSampler(train, WORLD, RANK, seed=args.seed, drop_last=True)
    loader = DataLoader(train, sampler=sampler, drop_last=True, **options)
    others = {"params": [p for name, p in model.named_parameters() if "backbone" not in name]}
    backbone = {"params": model.backbone.parameters(), "lr": args.lr * args.lr_backbone}
    optimizer = torch.optim.AdamW([others, backbone], args.lr, weight_decay=1e-4, fused=True)
    steps = args.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: args.rate(step / steps))
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    if resumed:
        for name in state:
            state[name].load_state_dict(resumed[name])
    history = resumed.get("history", [])
    # The rate of this place in the run, if --lr or the number of steps is another now.
    schedule.base_lrs = [args.lr, args.lr * args.lr_backbone]
    schedule.last_epoch = len(history) * len(loader)
    for group, base in zip(optimizer.param_groups, schedule.base_lrs):
        group["lr"] = base * args.rate(schedule.last_epoch / steps)
    ddp = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    layer = model.transformer.decoder.layers[0]
    config = {"nheads": layer.self_attn.heads, "dropout": layer.dropout.p,
              "dilation": model.backbone[0].body.dilation,
              "size": model.sizes[0], "max_size": model.sizes[1]}
    kept = *OPTIONS, "epochs", "batch_size", "lr", "workers"
    saved = {name: getattr(args, name) for name in kept}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "log.txt").touch()       # what cannot be written is noticed now
    first = len(history)
    began = time.monotonic()

    for epoch in range(first, args.epochs):
        start = time.monotonic()
        title = f"epoch {epoch + 1}/{args.epochs}"
        sampler.set_epoch(epoch)
        torch.manual_seed(hash((args.seed, epoch, RANK)))       # the same if resumed
        early = epoch < args.early * args.epochs        # the one switch
        train.transform = augmentation(*model.sizes, early)
        criterion.class_weight[-1] = 0.1 if early else args.eos_coef
        losses = train_one_epoch(ddp, criterion, optimizer, schedule, scaler, loader, title, args)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError(f"weights are not finite after {title}: --resume with a lower --lr")
        entry = {"epoch": epoch, "lr": schedule.get_last_lr()[0],
                 "images_per_s": len(loader) * batch_size / max(time.monotonic() - start, 1e-3),
                 "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        entry |= {f"train_{name}": value for name, value in losses.items()}
        line = f"{title}  loss {losses['loss']:.3f}  {entry['images_per_s']:.1f} images/s"
        evaluated = (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs
        if evaluated:
            val_losses, ap = evaluate(model, criterion, val_loader, args)
            entry |= {f"test_{name}": value for name, value in val_losses.items()}
            entry["test_ap50_per_class"] = ap.pop("AP50_per_class")
            entry["test_coco_eval_bbox"] = list(ap.values())
            line += f"  val loss {val_losses['loss']:.3f}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}"
        history.append(entry)
        if RANK == 0:
            about = {"epoch": epoch, "classes": classes, "config": config}
            aps = [one["test_coco_eval_bbox"][0] for one in history if "test_loss" in one]
            if evaluated and ap["AP"] == max(aps):
                half = {name: value.half() for name, value in model.state_dict().items()}
                save(args.output / "best.pth", partial(torch.save, {"model": half, **about}))
            checkpoint = {**about, "history": history, "settings": saved}
            checkpoint |= {name: state[name].state_dict() for name in state}
            save(file, partial(torch.save, checkpoint))
            lines = "".join(f"{json.dumps(one)}\n" for one in history)
            try:
                save(args.output / "log.txt", lambda log_file: log_file.write(lines.encode()))
                save(args.output / "curves.png", draw_curves(history).savefig)
            except OSError as error:        # the next epoch writes both again
                log(f"warning: no log.txt or curves.png: {error}")
        left = (time.monotonic() - began) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        log(f"{line}  ETA {timedelta(seconds=round(left))}")
    log(f"draw what it finds: python infer.py IMAGE --weights {args.output / 'best.pth'}")

def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="train_voc.py", description=__doc__, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=os.path.abspath, metavar="DIR", help="a VOCdevkit, or any folder of images "
        "and XML files in VOC's format (default: data/VOCdevkit, fetched if missing: 2 GB)")
    add("--train", nargs="+", metavar="[A/]NAME", help="lists or folders, below A (default: train)")
    add("--val", nargs="+", metavar="[A/]NAME", help="those to evaluate on (default: val)")
    add("--model", metavar="NAME|FILE", help="what to start from: a name of the zoo, a checkpoint "
        "file, or tiny, a small detector from scratch (default: detr_resnet50)")
    add("--epochs", type=int, help=f"default: {FINE_TUNE['epochs']}, tiny {TINY['epochs']}")
    add("--count-difficult", action="store_true", help="evaluate difficult objects, too")
    add("--batch-size", type=int, metavar="N", help=f"default: {FINE_TUNE['batch_size']} images")
    add("--accumulate", type=int, metavar="N", help="compute each step in N parts (default: 1)")
    add("--lr", type=float, help=f"learning rate (default: {FINE_TUNE['lr']}, a tenth of it for "
        f"the backbone; tiny {TINY['lr']} for all)")
    add("--output", type=Path, default="outputs", metavar="DIR", help="default: %(default)s")
    add("--resume", action="store_true", default=False,
        help="continue the run in --output, with its options")
    add("--eval", action="store_true", default=False, help="evaluate the model on --val and stop")
    add("--seed", type=int, help="of order, augmentation, new weights (default: 0)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: one a core, "
        "16 at most; 0 without a GPU)")
    args = parser.parse_args(argv)
    try:
        run(args)
        return 0
    except (OSError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        # One line, and of a worker's traceback the end.
        message = " ".join(re.split(r"\n[\w.]+Error: ", str(error))[-1].split())
        if "out of memory" in message:
            message += ": raise --accumulate, and --resume"
        if "numeric entries" in message:
            message += ": the loss is not finite, --resume with a lower --lr"
        print(f"train_voc.py: error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        print("train_voc.py: stopped; --resume goes on from the last full epoch", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 2

if __name__ == "__main__":
    sys.exit(main())
