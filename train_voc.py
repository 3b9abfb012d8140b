"""Fine-tune DETR on PASCAL VOC, or train on any folder in VOC's format: data, augmentation (A.4), training, COCO's AP.

    python train_voc.py --data VOCdevkit                        # 40 epochs from COCO's weights, AP after each
    python train_voc.py --data my_folder --model tiny           # a small detector from scratch, no download
    python train_voc.py --data my_folder --resume               # go on where outputs/checkpoint.pth stopped
    python train_voc.py --data my_folder --model outputs/best.pth --eval
"""
import argparse
import json
import os
import random
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as T

from detr_mini import (DETR, BasicBlock, FrozenBatchNorm2d, HungarianMatcher, ResNet, SetCriterion, box_xyxy_to_cxcywh, build_detr,
                       fit, load_detr, normalize, post_process, read_checkpoint, to_tensor)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# Fine-tuning follows the paper (A.4) but for the batch norm's and the backbone's start; `tiny` starts from nothing.
FINE_TUNE = dict(size=800, max_size=1333, lr=1e-4, lr_backbone=0.1, batch_size=16, epochs=40, warmup=0, evaluate_every=1)
TINY = dict(size=240, max_size=320, lr=3e-4, lr_backbone=1.0, batch_size=4, epochs=300, warmup=200, evaluate_every=20)


# ---- Data: Annotations/*.xml, ImageSets/Main/*.txt, JPEGImages ----------------------------------------------------------

def read_annotation(path):
    """One VOC XML file as [(class name, (x0, y0, x1, y1), difficult)], in pixels.

    VOC counts pixels from 1 and includes the last, so a box over the whole image, 1 to w, becomes 0 to w. Raises
    ValueError with the file's name for anything unreadable. A document type, where entities would be, is refused.
    """
    data = path.read_bytes()
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data or b"\0" in data:
        raise ValueError(f"{path}: declares a document type or is not UTF-8, which no annotation needs: refused")
    try:
        objects = []
        for node in ElementTree.fromstring(data).iter("object"):
            box = node.find("bndbox")
            x0, y0, x1, y1 = (float(box.find(tag).text) for tag in ("xmin", "ymin", "xmax", "ymax"))
            if not np.isfinite((x0, y0, x1, y1)).all():
                raise ValueError("a coordinate is not a finite number")
            objects.append((node.find("name").text.strip(), (x0 - 1, y0 - 1, x1, y1), (node.findtext("difficult") or "0").strip() == "1"))
    except (ElementTree.ParseError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: not a VOC annotation ({error}): each object needs a name and a bndbox of xmin, ymin, xmax, ymax") from error
    return objects


def find_sets(data, names, seed):
    """The annotation files of the sets `names`, [path]; a set is 2012_train in a VOCdevkit, train in a single folder.

    A folder without ImageSets is split in two, by the seed: `val` is every fifth annotation, `train` the rest.
    """
    paths = []
    for name in names:
        folder, kind = data, name
        if not (data / "ImageSets").is_dir() and name[:4].isdigit():
            folder, kind = data / f"VOC{name[:4]}", name[5:]
        listing = folder / "ImageSets/Main" / f"{kind}.txt"
        if listing.is_file():
            stems = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
            paths += [folder / "Annotations" / f"{stem}.xml" for stem in stems]
        elif not (folder / "ImageSets").is_dir() and folder.is_dir() and kind in ("train", "val"):
            every = sorted(folder.rglob("*.xml"))
            random.Random(seed).shuffle(every)
            paths += sorted(every[::5] if kind == "val" else [path for i, path in enumerate(every) if i % 5])
        else:
            known = sorted(path.stem for path in (folder / "ImageSets/Main").glob("*.txt"))
            raise ValueError(f"no set {name!r} in {data}: " + (f"it has {', '.join(known)}: name them with --train and --val" if known
                             else "--data takes a VOCdevkit, a folder like VOC2012, or any folder with images and XML files"))
    if not paths:
        raise ValueError(f"the set {' '.join(names)} of {data} is empty: no annotation files (*.xml)")
    return paths


class VOC(Dataset):
    """The images and objects of some annotation files, all read and checked before the first step.

    `records`: one (image path, boxes (M, 4) float32 x0 y0 x1 y1 pixels, labels (M,), difficult (M,) bool) an image.
    """

    def __init__(self, paths, folder, classes=None, recipe=FINE_TUNE, train=False, seed=0):
        self.recipe, self.train, self.seed = recipe, train, seed
        images = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(path.stem, path)
        read = []
        for path in paths:
            if not path.is_file():
                raise ValueError(f"no annotation {path}, though its set lists it: add it, or take the line out of ImageSets")
            if path.stem not in images:
                raise ValueError(f"no image for {path}: expected {path.stem}.jpg (or .png ...) somewhere under {folder}")
            read.append((images[path.stem], read_annotation(path), path))
        self.classes = classes or sorted({name for _, objects, _ in read for name, _, _ in objects})
        label_of, self.records, changed, dropped = {name: i for i, name in enumerate(self.classes)}, [], 0, 0
        for image, objects, path in read:
            try:
                with Image.open(image) as picture:
                    width, height = picture.size
            except OSError as error:
                raise ValueError(f"{image}: not a readable image ({error}): replace it, or take it out of the set") from error
            unknown = [name for name, _, _ in objects if name not in label_of]
            if unknown:
                raise ValueError(f"{path}: class {unknown[0]!r} is none of {', '.join(self.classes)}: correct it, or pass --classes")
            boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4)
            clipped = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            keep = (clipped[:, 2:] > clipped[:, :2]).all(1)
            changed, dropped = changed + int((clipped != boxes).any(1)[keep].sum()), dropped + int((~keep).sum())
            labels = torch.tensor([label_of[name] for name, _, _ in objects], dtype=torch.int64)
            difficult = torch.tensor([hard for _, _, hard in objects], dtype=torch.bool)
            self.records.append((image, clipped[keep], labels[keep], difficult[keep]))
        self.summary = f"{len(self.records)} images, {sum(len(record[1]) for record in self.records)} objects"
        if changed or dropped:
            self.summary += f" ({changed} boxes clipped to their image, {dropped} without area dropped)"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        """key (epoch, index) to image (3, h, w) uint8 and target. The augmentation depends on seed, epoch and index alone,
        so that a resumed run, and any number of workers, see the very same pictures."""
        epoch, index = key
        path, boxes, labels, difficult = self.records[index]
        try:
            with Image.open(path) as picture:
                image = to_tensor(picture)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: the image cannot be decoded ({error}): replace it, or take it out of the set") from error
        if self.train:
            image, boxes, labels = augment(image, boxes[~difficult], labels[~difficult], self.recipe,
                                           random.Random(f"{self.seed} {epoch} {index}"))
        else:
            h, w = image.shape[1:]
            image = T.resize(image, fit(h, w, self.recipe["size"], self.recipe["max_size"]), antialias=True)
            boxes = boxes * torch.tensor([image.shape[2] / w, image.shape[1] / h]).repeat(2)
        h, w = image.shape[1:]
        return image, {"labels": labels, "boxes": box_xyxy_to_cxcywh(boxes) / torch.tensor([w, h, w, h]), "index": index}


def augment(image, boxes, labels, recipe, rng):
    """Cut a window out of the image, resize it, flip it (paper: A.4). image (3, H, W) uint8, boxes (M, 4) in pixels.

    The paper's way, when fine-tuning: the whole image, or half of the time a random crop, to a random scale. From
    scratch: a zoom of 0.9 to 1.5 to one size, as small batches want no padding, with both flips and a change of light.
    """
    height, width = image.shape[1:]
    size, max_size = recipe["size"], recipe["max_size"]
    if recipe is TINY:
        zoom = rng.uniform(0.9, 1.5)
        h, w = round(height / zoom), round(width / zoom)
        out = fit(height, width, size, max_size)
    else:
        h, w = height, width
        if rng.random() < 0.5:
            ratio = rng.choice((400, 500, 600)) * size / 800 / min(height, width)
            h, w = (max(1, round(rng.uniform(min(side * ratio, 0.48 * size), min(side * ratio, 0.75 * size)) / ratio))
                    for side in (height, width))
        out = fit(h, w, round(rng.choice(range(480, 801, 32)) * size / 800), max_size)
    top, left = (rng.randint(min(0, rest), max(0, rest)) for rest in (height - h, width - w))
    image = T.resized_crop(image, top, left, h, w, out, antialias=True)
    scale, bound = torch.tensor([out[1] / w, out[0] / h]).repeat(2), torch.tensor([out[1], out[0]]).repeat(2)
    boxes = ((boxes - torch.tensor([left, top]).repeat(2)) * scale).clamp(min=0).minimum(bound)
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    boxes, labels = boxes[keep], labels[keep]
    if rng.random() < 0.5:
        image, boxes = image.flip(2), torch.stack((out[1] - boxes[:, 2], boxes[:, 1], out[1] - boxes[:, 0], boxes[:, 3]), 1)
    if recipe is TINY:
        if rng.random() < 0.5:
            image, boxes = image.flip(1), torch.stack((boxes[:, 0], out[0] - boxes[:, 3], boxes[:, 2], out[0] - boxes[:, 1]), 1)
        image = T.adjust_contrast(T.adjust_brightness(image, rng.uniform(0.8, 1.2)), rng.uniform(0.8, 1.2))
    return image, boxes, labels


def collate(samples):
    """[(image, target)] to a batch (B, 3, H, W) uint8, its padding mask (B, H, W) bool or None, and the targets."""
    images, targets = zip(*samples)
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for b, image in enumerate(images):
        batch[b, :, :image.shape[1], :image.shape[2]] = image
        mask[b, :image.shape[1], :image.shape[2]] = False
    return batch, mask if mask.any() else None, targets


class Batches:
    """Lists of (epoch, index): every image once an epoch, shuffled by the seed when training; set `epoch` before each."""

    def __init__(self, count, batch_size, shuffle, seed=0):
        self.count, self.batch_size, self.shuffle, self.seed, self.epoch = count, batch_size, shuffle, seed, 0

    def __len__(self):
        return max(1, self.count // self.batch_size) if self.shuffle else -(-self.count // self.batch_size)

    def __iter__(self):
        order = list(range(self.count))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for i in range(len(self)):
            yield [(self.epoch, index) for index in order[i * self.batch_size:(i + 1) * self.batch_size]]


# ---- COCO's average precision --------------------------------------------------------------------------------------------

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}      # square pixels, ends included
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def coco_ap(predictions, targets, num_classes):
    """COCO's box metrics, as `pycocotools` computes them.

    predictions: one dict an image, `scores` (n,), `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels. targets: one dict an
    image, `labels` (m,), `boxes` (m, 4), and `ignore` (m,) bool where objects are neither to be found nor wrong to find.
    Returns AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl as fractions, -1 where nothing is counted, and
    AP50_per_class, a list.
    """
    ends = np.array(list(AREAS.values()))
    entries = [[] for _ in range(num_classes)]      # by class: (scores, ranks, hits (A, T, D), ignored (A, T, D)) an image
    positives = np.zeros((num_classes, len(AREAS)), int)
    for prediction, target in zip(predictions, targets, strict=True):
        scores, labels, boxes = (np.asarray(prediction[name]) for name in ("scores", "labels", "boxes"))
        scores, boxes = scores.astype(float), boxes.reshape(-1, 4).astype(float)
        gt_labels, gt_boxes = np.asarray(target["labels"]), np.asarray(target["boxes"]).reshape(-1, 4).astype(float)
        crowd = np.asarray(target["ignore"], bool) if "ignore" in target else np.zeros(len(gt_labels), bool)
        for label in np.union1d(labels, gt_labels).astype(int):
            rows = np.flatnonzero(labels == label)
            rows = rows[np.argsort(-scores[rows], kind="stable")][:100]
            columns = gt_labels == label
            hits, ignored, counted = match_detections(boxes[rows], gt_boxes[columns], crowd[columns], ends)
            positives[label] += counted
            entries[label].append((scores[rows], np.arange(len(rows)), hits, ignored))

    precision = -np.ones((len(IOUS), len(RECALLS), num_classes, len(AREAS)))
    recall = -np.ones((3, len(IOUS), num_classes, len(AREAS)))                         # at 1, 10, 100 detections an image
    for label, area in zip(*np.nonzero(positives)):
        scores, ranks, hits, ignored = (np.concatenate(part, -1) for part in zip(*entries[label]))
        order = np.argsort(-scores, kind="stable")
        for k, most in enumerate((1, 10, 100)):
            few = order[ranks[order] < most]
            hit, counts = hits[area][:, few], ~ignored[area][:, few]
            true, false = np.cumsum(hit & counts, 1), np.cumsum(~hit & counts, 1)      # (T, D)
            found = true / positives[label, area]
            recall[k, :, label, area] = found[:, -1] if len(few) else 0
        exact = true / (true + false + np.spacing(1))
        exact = np.maximum.accumulate(exact[:, ::-1], 1)[:, ::-1]                      # the best precision at this recall or more
        for t in range(len(IOUS)):
            at = np.searchsorted(found[t], RECALLS, side="left")
            precision[t, :, label, area] = np.append(exact[t], 0)[at]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    result = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    result |= {f"AP{name}": mean(precision[..., i]) for i, name in enumerate(AREAS) if name}
    result |= {f"AR{most}": mean(recall[k, ..., 0]) for k, most in enumerate((1, 10, 100))}
    result |= {f"AR{name}": mean(recall[2, ..., i]) for i, name in enumerate(AREAS) if name}
    return result | {"AP50_per_class": [mean(precision[0, :, label, 0]) for label in range(num_classes)]}


def match_detections(boxes, gt_boxes, crowd, ends):
    """Greedy matching of one class in one image, best score first: boxes (D, 4), gt_boxes (G, 4), crowd (G,), ends (A, 2).

    Returns hits and ignored, (A, T, D) bool, and the number of objects that count in each area range, (A,).
    """
    size, gt_size = (b[:, 2:] - b[:, :2] for b in (boxes, gt_boxes))
    area, gt_area = size.prod(1), gt_size.prod(1)
    outside = (area < ends[:, :1]) | (area > ends[:, 1:])                              # (A, D)
    skip = crowd | (gt_area < ends[:, :1]) | (gt_area > ends[:, 1:])                   # (A, G)
    shape = len(ends), len(IOUS), len(boxes)
    hits, ignored = np.zeros(shape, bool), np.broadcast_to(outside[:, None], shape).copy()
    if len(gt_boxes) and len(boxes):
        corner, gt_corner = boxes[:, :2] + size, gt_boxes[:, :2] + gt_size
        overlap = np.minimum(corner[:, None], gt_corner) - np.maximum(boxes[:, None, :2], gt_boxes[:, :2])
        overlap = overlap.clip(0).prod(2)
        iou = overlap / np.where(crowd, area[:, None], area[:, None] + gt_area - overlap)   # (D, G)
        free = np.ones((len(ends), len(IOUS), len(gt_boxes)), bool)
        for d, row in enumerate(iou):
            if row.max() < IOUS[0]:
                continue
            can = (free | crowd) & (row >= IOUS[:, None])                              # (A, T, G)
            prefer = can & ~skip[:, None]                                              # an object that counts goes first
            can = np.where(prefer.any(2, keepdims=True), prefer, can)
            best = len(row) - 1 - np.where(can, row, -1)[..., ::-1].argmax(2)          # (A, T), the last of equals
            hits[..., d] = can.any(2)
            a, t = np.nonzero(hits[..., d])
            free[a, t, best[a, t]] = False
            ignored[a, t, d] = skip[a, best[a, t]]
    return hits, ignored, (~skip).sum(1)


# ---- Training ------------------------------------------------------------------------------------------------------------

def tiny(num_classes):
    """A DETR of 2.2 million parameters with stride 16 and a trainable batch norm, to be trained from scratch."""
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=nn.BatchNorm2d)
    return DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4, dim_feedforward=512, num_queries=60,
                dropout=0.0)


def save(checkpoint, path):
    """Write to a temporary name, then rename: whatever happens, `path` is a whole file, the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_device(batch, mask, targets, device):
    """Bytes cross to the device, floats are made there: images (B, 3, H, W) normalised, zeros on padding."""
    images = normalize(batch.to(device, non_blocking=True))
    if mask is not None:
        mask = mask.to(device, non_blocking=True)
        images = images.masked_fill(mask[:, None], 0)
    targets = [{name: target[name].to(device, non_blocking=True) for name in ("labels", "boxes")} for target in targets]
    return images, mask, targets


class Averages:
    """Means of the losses over an epoch, weighted and not, under the reference's names; nothing is read from the device until asked."""

    def __init__(self, weights):
        self.weights, self.sums, self.steps = weights, {}, 0

    def add(self, losses, total):
        self.steps += 1
        for name, value in {**losses, "loss": total}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def read(self):
        means = dict(zip(self.sums, (torch.stack(list(self.sums.values())) / self.steps).tolist()))
        result = {"loss": means.pop("loss"), "class_error": means.pop("class_error")}
        for name, value in means.items():
            weight = self.weights.get(name.rstrip("_0123456789"))
            result |= {f"{name}_unscaled": value} if weight is None else {name: weight * value, f"{name}_unscaled": value}
        return result


class Progress:
    """A line that is rewritten in a terminal, with images/s and the time left; silent elsewhere."""

    def __init__(self, title, steps, batch_size):
        self.title, self.steps, self.batch_size, self.start, self.shown = title, steps, batch_size, time.time(), 0

    def show(self, step, text=""):
        now = time.time()
        if sys.stderr.isatty() and (now - self.shown > 0.5 or step == self.steps):
            self.shown, rate = now, step / (now - self.start)
            end = "\n" if step == self.steps else ""
            print(f"\r{self.title}  {step}/{self.steps}  {text}  {rate * self.batch_size:.1f} images/s  "
                  f"ETA {clock((self.steps - step) / rate)}  ", end=end, file=sys.stderr, flush=True)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def train_one_epoch(model, criterion, optimizer, loader, epoch, args, device):
    """One pass over the training images; returns the averages of the losses."""
    model.train()
    averages, steps = Averages(criterion.weights), len(loader)
    progress = Progress(f"epoch {epoch + 1}/{args.epochs}", steps, args.batch_size)
    for step, batch in enumerate(loader):
        images, mask, targets = to_device(*batch, device)
        done = epoch * steps + step
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, (done + 1) / max(1, args.warmup)) * (0.1 if epoch >= args.drop else 1)
        losses = criterion(model(images, mask), targets)
        total = criterion.total(losses)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        averages.add(losses, total)
        progress.show(step + 1, f"loss {total.item():.3f}" if sys.stderr.isatty() else "")
    return averages.read()


@torch.inference_mode()
def evaluate(model, criterion, loader, data, args, device):
    """Losses and COCO's AP over a set of images, each at one scale; returns (averages, AP dict)."""
    model.eval()
    averages, predictions, targets = Averages(criterion.weights), [], []
    progress = Progress("evaluate", len(loader), args.batch_size)
    for step, batch in enumerate(loader):
        images, mask, moved = to_device(*batch, device)
        outputs = model(images, mask)
        losses = criterion(outputs, moved)
        averages.add(losses, criterion.total(losses))
        sizes = []
        for target in batch[2]:
            path, boxes, labels, difficult = data.records[target["index"]]
            with Image.open(path) as picture:
                sizes.append((picture.height, picture.width))
            targets.append({"labels": labels, "boxes": boxes, "ignore": difficult & (not args.count_difficult)})
        predictions += [{name: value.cpu() for name, value in found.items()} for found in post_process(outputs, torch.tensor(sizes))]
        progress.show(step + 1)
    return averages.read(), coco_ap(predictions, targets, len(data.classes))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a VOCdevkit, a folder like VOC2012, or any folder with images and XML files")
    parser.add_argument("--train", nargs="+", metavar="NAME", help="sets to train on (default: 2012_train of a VOCdevkit, else train)")
    parser.add_argument("--val", nargs="+", metavar="NAME", help="sets to evaluate on (default: 2012_val of a VOCdevkit, else val)")
    parser.add_argument("--classes", metavar="A,B,...", help="the classes, in the order of their labels (default: those of the data, sorted)")
    parser.add_argument("--model", default="detr_resnet50", metavar="NAME|FILE", help="a name of the zoo, a checkpoint file, or tiny (default: %(default)s)")
    parser.add_argument("--epochs", type=int, metavar="N", help="default 40; the learning rate drops to a tenth after three quarters")
    parser.add_argument("--count-difficult", action="store_true", help="evaluate VOC's difficult objects like any other")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a step (default 16; tiny 4)")
    parser.add_argument("--lr", type=float, metavar="F", help="learning rate (default 1e-4, a tenth of it for the backbone; tiny 3e-4 for all)")
    parser.add_argument("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where checkpoints and the log go (default: %(default)s)")
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE (default: checkpoint.pth of --output)")
    parser.add_argument("--eval", action="store_true", help="evaluate only")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images (default: as many as cores, 12 at most; 1 without a GPU)")
    return parser.parse_args()


def main():
    args = arguments()
    recipe = TINY if args.model == "tiny" else FINE_TUNE
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.drop = int(0.75 * args.epochs)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device)
    workers = args.workers if args.workers is not None else min(12, os.cpu_count()) if device.type == "cuda" else 1
    torch.manual_seed(args.seed)

    year = "" if (args.data / "ImageSets").is_dir() or not (args.data / "VOC2012").is_dir() else "2012_"
    classes = args.classes.split(",") if args.classes else None
    if args.model != "tiny" and not args.resume and Path(args.model).is_file() and classes is None:
        classes = read_checkpoint(args.model).get("classes")
    train_paths = find_sets(args.data, args.train or [year + "train"], args.seed)
    train_data = VOC(train_paths, args.data, classes, recipe, True, args.seed)
    val_data = VOC(find_sets(args.data, args.val or [year + "val"], args.seed), args.data, train_data.classes, recipe)
    train_batches, val_batches = Batches(len(train_data), args.batch_size, True, args.seed), Batches(len(val_data), args.batch_size, False)
    loading = dict(collate_fn=collate, num_workers=workers, pin_memory=device.type == "cuda", persistent_workers=workers > 0)
    train_loader, val_loader = DataLoader(train_data, batch_sampler=train_batches, **loading), DataLoader(val_data, batch_sampler=val_batches, **loading)
    print(f"train: {train_data.summary}\nval: {val_data.summary}\nclasses: {', '.join(train_data.classes)}")

    resume = None
    if args.resume is not None:
        resume = read_checkpoint(args.resume or args.output / "checkpoint.pth")
        frozen = resume["config"]["norm"] == "frozen"
        model = build_detr(resume["model"], resume["config"]["nheads"], resume["config"]["dilation"],
                           FrozenBatchNorm2d if frozen else nn.BatchNorm2d)
    elif args.model == "tiny":
        model = tiny(len(train_data.classes))
    else:
        model = load_detr(args.model, num_classes=len(train_data.classes))
    model.aux_loss = True
    model.to(device)
    criterion = SetCriterion(len(train_data.classes), HungarianMatcher()).to(device)
    backbone = [p for name, p in model.named_parameters() if name.startswith("backbone") and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
    optimizer = torch.optim.AdamW([{"params": rest, "base_lr": args.lr}, {"params": backbone, "base_lr": args.lr * args.lr_backbone}],
                                  lr=args.lr, weight_decay=1e-4)
    config = {"nheads": model.transformer.decoder.layers[0].self_attn.heads, "dilation": False, "size": args.size, "max_size": args.max_size,
              "norm": "batch" if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else "frozen"}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start, best, history = 0, -1.0, []
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
        start, best, history = resume["epoch"] + 1, resume["best"], resume["history"]
        torch.set_rng_state(resume["random"])
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for epoch in range(start, args.epochs):
        train_batches.epoch = epoch
        entry = {f"train_{k}": v for k, v in train_one_epoch(model, criterion, optimizer, train_loader, epoch, args, device).items()}
        entry = {"train_lr": optimizer.param_groups[0]["lr"], **entry, "epoch": epoch, "n_parameters": parameters}
        line = f"epoch {epoch + 1}/{args.epochs}  loss {entry['train_loss']:.3f}"
        plain = {"model": model.state_dict(), "config": config, "classes": train_data.classes, "epoch": epoch}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs:
            losses, ap = evaluate(model, criterion, val_loader, val_data, args, device)
            entry |= {f"test_{k}": v for k, v in losses.items()}
            entry |= {"test_coco_eval_bbox": list(ap.values())[:12], "test_ap50_per_class": ap["AP50_per_class"]}
            line += f"  val loss {losses['loss']:.3f}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}  AP75 {ap['AP75']:.3f}"
            if ap["AP"] > best:
                best = ap["AP"]
                save(plain, args.output / "best.pth")
        history.append(entry)
        save({**plain, "optimizer": optimizer.state_dict(), "best": best, "history": history, "random": torch.get_rng_state()},
             args.output / "checkpoint.pth")
        temporary = args.output / "log.txt.tmp"
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))
        os.replace(temporary, args.output / "log.txt")
        left = (time.time() - began) / (epoch + 1 - start) * (args.epochs - epoch - 1)
        print(f"{line}  ETA {clock(left)}", flush=True)


if __name__ == "__main__":
    main()
