"""Fine-tune DETR on PASCAL VOC, or train it on a folder of images with VOC's XML files.

    python train_voc.py                                    # VOC2012, from COCO's weights, 40 epochs
    python train_voc.py --data my_folder --model tiny      # a small detector, from scratch
    python train_voc.py --data my_folder --model outputs/best.pth --eval
    python train_voc.py --resume                           # continue the run in outputs/
    torchrun --nproc_per_node=4 train_voc.py               # four GPUs share each batch
"""
import argparse
import json
import math
import os
import re
import sys
import time
import unicodedata
import warnings
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
                       box_xyxy_to_cxcywh, load_detr, normalize, post_process, read_checkpoint,
                       resized_size, to_tensor)
from infer import SUFFIXES, choose_device, choose_dtype, open_image, save

# ---- Settings ------------------------------------------------------------------------------------
FINE_TUNE = dict(           # for a trained DETR: the paper's learning rates, one GPU's batch
    epochs=40,
    batch_size=16,          # images per step, over all processes
    lr=1e-4,
    lr_backbone=0.1,        # factor on lr
    rate=lambda done: 0.1 if done >= 0.75 else 1,   # factor on lr after this fraction of the run
    eos_coef=0.1,           # weight of "no object" in the loss
    encoder_loss=False,     # for training from scratch, see `encoder_losses`
    evaluate_every=1,       # epochs
)
RANK = int(os.environ.get("RANK", 0))           # which of torchrun's processes this is
WORLD = int(os.environ.get("WORLD_SIZE", 1))    # and how many there are

# ---- The run -------------------------------------------------------------------------------------
def run(args):
    """The whole story: data, model, then evaluate or train."""
    set_up(args)
    records, notes = load_data(args)
    names = {name for part in records.values() for record in part for name in record["names"]}
    model, new = load_model(args, args.resumed.get("classes", sorted(names)))
    criterion = SetCriterion(len(model.classes), HungarianMatcher(), args.eos_coef).to(args.device)
    loaders = {part: make_loader(part, records[part], model, args) for part in records}

    for part, loader in loaders.items():
        log(f"{part}: {loader.dataset.summary}")
    log("classes:", ", ".join(name for name in model.classes if name != "N/A"))
    if new:
        log("class head: new and untrained:", ", ".join(new))
    for note in notes:
        log(note)

    if args.eval:
        losses, ap = evaluate(model, criterion, loaders["val"], args)
        per_class = zip(model.classes, ap.pop("AP50_per_class"))
        log(f"loss {losses['loss']:.3f} ", *(f"{name} {value:.3f} " for name, value in ap.items()))
        log("AP50: ", *(f"{name} {value:.3f} " for name, value in per_class if value >= 0))
    else:
        train(model, criterion, loaders["train"], loaders["val"], args)

def log(*words):
    """Print, in one process only."""
    if RANK == 0:
        print(*words, flush=True)

def set_up(args):
    """Check the options, choose the device and AMP's type, and join torchrun's processes."""
    for name in ("epochs", "batch_size", "accumulate", "size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    for path in (args.output / "checkpoint.pth", args.output / "best.pth"):
        if path.exists() and not (args.resume or args.eval):
            raise ValueError(f"{path} is from an earlier run: continue it with --resume, or choose "
                             "another --output")
    args.device = choose_device(args.device)
    args.dtype = choose_dtype(args.device)
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", args.device.index or 0)))
        args.device = torch.device("cuda", torch.cuda.current_device())
    if WORLD > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if args.workers is None:
        args.workers = min(16, os.cpu_count() // WORLD) if cuda else 0
    torch.manual_seed(args.seed)

# ---- The model and the data ----------------------------------------------------------------------
def load_model(args, classes):
    """The model to start from, and which of `classes` its head does not know. A resumed run reads
    its own checkpoint, and no other file; with --eval, a model keeps its own classes."""
    if args.model == "tiny" and args.eval:
        raise ValueError(f"--model tiny is untrained: evaluate {args.output / 'best.pth'}")
    if args.model == "tiny":
        model = tiny(len(classes))
        model.classes = classes
    else:
        source = args.output / "checkpoint.pth" if args.resume else args.model
        headless = "class_embed.bias" not in (args.resumed or read_checkpoint(source))["model"]
        model = load_detr(source, num_classes=len(classes) if headless else None)
    if args.size is not None:
        if model.sizes[1] is None:
            raise ValueError(f"--size: {args.model} resizes every image to {model.sizes[0]}")
        model.sizes = args.size, round(args.size * 1333 / 800)
    new = [] if args.eval else keep_known_classes(model, classes)
    model.aux_loss = True
    return model.to(args.device, memory_format=torch.channels_last), new

def keep_known_classes(model, classes):
    """Give `model` a head for `classes`. Known classes and "no object" keep their rows, so they
    are predicted from the first step. Returns the names that start untrained."""
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

def make_loader(part, records, model, args):
    """The images of a part, "train" or "val", in batches, shared among the processes."""
    training = part == "train"
    transform = augmentation(*model.sizes) if training else None
    dataset = VOC(records, model.classes, model.sizes, transform)
    queries = len(model.query_embed.weight)
    most = max(len(record["labels"]) for record in dataset.records)
    if most > queries:
        dataset.summary += f"; one image has {most} objects, but the model has {queries} queries"
    batch_size = min(args.batch_size, len(dataset))
    sampler = DistributedSampler(dataset, WORLD, RANK, shuffle=training, seed=args.seed,
                                 drop_last=training)
    return DataLoader(dataset, max(1, batch_size // WORLD), sampler=sampler, drop_last=training,
                      num_workers=args.workers, collate_fn=list,
                      pin_memory=args.device.type == "cuda")

# ---- Training ------------------------------------------------------------------------------------
def train(model, criterion, loader, val_loader, args):
    """Run all epochs, or the rest of a resumed run: set rate and size, train, evaluate, save."""
    others = [p for name, p in model.named_parameters() if not name.startswith("backbone")]
    groups = [{"params": others}, {"params": model.backbone.parameters()}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    if args.resume:
        for name, item in state.items():
            item.load_state_dict(args.resumed[name])
    history = args.resumed.get("history", [])
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "log.txt").touch()       # fail now, not after an epoch, if it cannot be written
    first, began = len(history), time.monotonic()

    for epoch in range(first, args.epochs):
        title = f"epoch {epoch + 1}/{args.epochs}"
        start = time.monotonic()
        lr = args.lr * args.rate(epoch / args.epochs)
        for group, factor in zip(optimizer.param_groups, (1, args.lr_backbone)):
            group["lr"] = lr * factor
        if args.model == "tiny":
            model.sizes = tiny_sizes(epoch, args.epochs)
            loader.dataset.transform = augmentation(*model.sizes)
            val_loader.dataset.sizes = model.sizes
        loader.sampler.set_epoch(epoch)
        torch.manual_seed(hash((args.seed, epoch, RANK)))       # the same in a resumed run
        losses = train_one_epoch(network, criterion, optimizer, scaler, loader, title, args)

        speed = len(loader) * loader.batch_size * WORLD / (time.monotonic() - start)
        entry = {"epoch": epoch, "lr": lr, "size": model.sizes[0], "images_per_s": speed,
                 "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
        entry |= {f"train_{name}": value for name, value in losses.items()}
        line = f"{title}  loss {losses['loss']:.3f}  {speed:.1f} images/s"
        if (epoch + 1) % args.evaluate_every == 0 or epoch + 1 == args.epochs:
            losses, ap = evaluate(model, criterion, val_loader, args)
            entry |= {f"test_{name}": value for name, value in losses.items()}
            entry["test_ap50_per_class"] = ap.pop("AP50_per_class")
            entry["test_coco_eval_bbox"] = list(ap.values())
            line += f"  val loss {losses['loss']:.3f}  AP {ap['AP']:.3f}  AP50 {ap['AP50']:.3f}"
        history.append(entry)
        if RANK == 0:
            save_run(model, state, history, args)
        left = (time.monotonic() - began) / (epoch + 1 - first) * (args.epochs - epoch - 1)
        log(f"{line}  ETA {timedelta(seconds=round(left))}")
    log(f"try it: python infer.py IMAGE --weights {args.output / 'best.pth'}")

def train_one_epoch(network, criterion, optimizer, scaler, loader, title, args):
    """Train on every image once. Returns the averages of the losses."""
    network.train()
    steps = []
    for batch in progress(title, loader, len(loader)):
        images = math.ceil(len(batch) / args.accumulate)    # at a time
        for i in range(0, len(batch), images):
            chunk = batch[i:i + images]
            _, losses = forward(network, criterion, chunk, args)
            scaler.scale(losses["loss"] * len(chunk) / len(batch)).backward()
            steps.append({name: value.detach() for name, value in losses.items()})
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if not all(p.isfinite().all() for p in network.parameters()):
        raise ValueError(f"weights are not finite after {title}: --resume with a lower --lr")
    return averages(steps)

def forward(network, criterion, batch, args):
    """Outputs for a batch [(image, target)], and its losses, with their weighted sum as `loss`."""
    images = [normalize(image.to(args.device, non_blocking=True)) for image, _ in batch]
    targets = [{name: target[name].to(args.device, non_blocking=True)
                for name in ("labels", "boxes")} for _, target in batch]
    with torch.autocast(args.device.type, args.dtype, enabled=args.dtype != torch.float32):
        outputs = network(images)
    losses = criterion(outputs, targets)
    if network.training and args.encoder_loss:
        model = getattr(network, "module", network)     # inside DistributedDataParallel
        losses |= encoder_losses(model, outputs["memory"], images[0].shape[1:], targets)
    return outputs, losses | {"loss": criterion.total(losses)}

# ---- Evaluation and files ------------------------------------------------------------------------
@torch.inference_mode()
def evaluate(model, criterion, loader, args):
    """The averages of the losses, and COCO's AP, over the images of all processes."""
    model.eval()
    steps, results = [], []
    for batch in progress("evaluate", loader, len(loader)):
        outputs, losses = forward(model, criterion, batch, args)
        steps.append(losses)
        for result in post_process(outputs, [target["size"] for _, target in batch]):
            results.append({name: value.cpu() for name, value in result.items()})
    gathered = [results] * WORLD
    if WORLD > 1:
        dist.all_gather_object(gathered, results)
    # Each of n processes has every n-th image; the sampler pads the last round with repeats.
    predictions = [result for of_each in zip(*gathered) for result in of_each]
    records = loader.dataset.records
    ignore = not args.count_difficult
    targets = [record | {"ignore": record["difficult"] & ignore} for record in records]
    return averages(steps), coco_ap(predictions[:len(records)], targets, len(model.classes))

def save_run(model, state, history, args):
    """Write best.pth if this epoch is the best so far, then checkpoint.pth, log and curves."""
    layer = model.transformer.decoder.layers[0]
    config = {"nheads": layer.self_attn.heads, "dropout": layer.dropout.p,
              "dilation": model.backbone[0].body.dilation,
              "size": model.sizes[0], "max_size": model.sizes[1]}
    about = {"epoch": len(history) - 1, "classes": model.classes, "config": config}
    # The best of the epochs at this size: AP at half size does not compare with AP at full size.
    aps = [entry["test_coco_eval_bbox"][0] for entry in history
           if "test_loss" in entry and entry["size"] == model.sizes[0]]
    if "test_loss" in history[-1] and aps[-1] == max(aps):
        half = {name: value.half() for name, value in model.state_dict().items()}
        save(args.output / "best.pth", partial(torch.save, {"model": half, **about}))
    settings = {name: getattr(args, name) for name in SAVED}
    checkpoint = {**about, "history": history, "settings": settings}
    checkpoint |= {name: item.state_dict() for name, item in state.items()}
    save(args.output / "checkpoint.pth", partial(torch.save, checkpoint))
    save_log(history, args)

# ---- Augmentation (paper: 4): change it by changing a list ---------------------------------------
def augmentation(size, max_size):
    """The training transforms for a model's own size of images; see `resized_size`."""
    if max_size is None:
        return tiny_augmentation(*resized_size(1, 1, size, None))       # 1, 1: of any image

    def scaled(*sides):         # the paper's are written for a shorter side of 800
        return [round(side * size / 800) for side in sides]
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.RandomShortestSize(scaled(400, 500, 600)),
                        RandomSizeCrop(*scaled(384, 600))]),
        v2.RandomShortestSize(scaled(*range(480, 801, 32)), max_size),
        v2.SanitizeBoundingBoxes(),
    ])

class RandomSizeCrop(v2.RandomCrop):
    """Crop a random window, `low` to `high` pixels per side, or the whole side if shorter."""

    def __init__(self, low, high):
        super().__init__(high)
        self.low = low
        self.high = high

    def make_params(self, flat_inputs):
        self.size = [int(torch.randint(min(side, self.low), min(side, self.high) + 1, ()))
                     for side in v2.functional.get_size(flat_inputs[0])]
        return super().make_params(flat_inputs)

# ---- Options -------------------------------------------------------------------------------------
SAVED = ("data", "train", "val", "model", "size", "epochs", "batch_size", "accumulate", "lr",
         "seed", "count_difficult", "workers")          # the options that --resume remembers

def parse(argv):
    """Parse the options. Defaults are those of the resumed run, if any, and of the recipe."""
    parser = argparse.ArgumentParser(prog="train_voc.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=os.path.abspath, metavar="DIR", help="images and VOC XML files, or a "
        "VOCdevkit (default: data/VOCdevkit, downloaded if missing: 2 GB)")
    add("--train", nargs="+", metavar="[A/]NAME", help="sets to train on: names of lists or "
        "folders, optionally inside folder A (default: train)")
    add("--val", nargs="+", metavar="[A/]NAME", help="sets to evaluate on (default: val)")
    add("--model", default="detr_resnet50", metavar="NAME|FILE", help="start from a model of the "
        "zoo, a checkpoint file, or tiny, a small detector from scratch (default: %(default)s)")
    add("--size", type=int, metavar="N", help="shorter side of the images, such as 480 for a small "
        "GPU; not for models of one fixed size, such as tiny (default: the model's, 800)")
    add("--epochs", type=int, help=f"default: {FINE_TUNE['epochs']}; tiny: {TINY['epochs']}")
    add("--batch-size", type=int, metavar="N", help="images per step (default: 16; tiny: 8)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts per step, to save memory")
    add("--lr", type=float, help=f"learning rate (default: {FINE_TUNE['lr']}; tiny: {TINY['lr']})")
    add("--count-difficult", action="store_true", help="count difficult objects when evaluating")
    add("--output", type=Path, default="outputs", metavar="DIR", help="default: %(default)s")
    add("--resume", action="store_true", help="continue the run in --output, with its options")
    add("--eval", action="store_true", help="evaluate the model on --val, and stop")
    add("--seed", type=int, default=0, help="for order, augmentation and new weights (default: 0)")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    add("--workers", type=int, metavar="N", help="processes that load images (default with a GPU: "
        "one per core, at most 16; otherwise 0)")
    args = parser.parse_args(argv)
    resumed = {}
    if args.resume:
        file = args.output / "checkpoint.pth"
        if not file.exists():
            raise ValueError(f"--resume: no epoch was completed, so there is no {file}: start anew")
        resumed = read_checkpoint(file)
        settings = resumed.get("settings", {})
        if "size" not in settings:
            raise ValueError(f"{file} is from another version: start a run with --model {file}")
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
        for name in ("epochs", "model", "size"):
            if getattr(args, name) != settings[name]:
                raise ValueError(f"--resume keeps --{name}: to change it, start a new run, with "
                                 f"another --output and --model {args.output / 'best.pth'}")
    recipe = TINY if args.model == "tiny" else FINE_TUNE
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(resumed=resumed, **{**vars(args), **recipe, **given})

def main(argv=None):
    """Run, or print in one line what is wrong. Returns the exit code, 0 or 2."""
    warnings.filterwarnings("ignore", module="PIL|torch")
    try:
        run(parse(argv))
        return 0
    except (OSError, ValueError, RuntimeError, ArithmeticError, AssertionError) as error:
        # From a worker's traceback, keep only the last line.
        message = " ".join(re.split(r"\n[\w.]+Error: ", str(error))[-1].split())
        if "out of memory" in message:
            message += ": raise --accumulate (and --resume, after the first epoch)"
        if "numeric entries" in message:
            message += ": the loss is not finite, use a lower --lr"
        print(f"train_voc.py: error: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        print("train_voc.py: stopped; --resume continues from the last checkpoint", file=sys.stderr)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 2

# ==== Appendix: a small detector from scratch =====================================================
TINY = FINE_TUNE | dict(    # 2.2 M parameters from scratch, on a CPU
    epochs=400,
    batch_size=8,           # small, for more steps per epoch; an epoch takes as long
    lr=6e-4,
    lr_backbone=1,
    rate=lambda done: min(0.05 + 60 * done, 1, 1.5 - 1.5 * done),       # warm-up, ..., down to 0
    eos_coef=0.5,           # against duplicates: two queries that share an object score 2/3 at most
    encoder_loss=True,
    evaluate_every=10,
)

def tiny(num_classes):
    """A DETR of 2.2 M parameters, with stride 16 and trained batch norm, to train from scratch."""
    backbone = ResNet(BasicBlock, (2, 2, 2), width=32, norm=nn.BatchNorm2d)
    model = DETR(num_classes, backbone, hidden_dim=128, nheads=4, enc_layers=2, dec_layers=4,
                 dim_feedforward=512, num_queries=40, dropout=0.0)
    model.sizes = (192, 256), None
    return model

def tiny_sizes(epoch, epochs):
    """For the first 40 epochs, or the first third of a short run, images have half the size. A
    best.pth from that part infers at half the size as well."""
    return (96, 128) if epoch < min(40, epochs / 3) else (192, 256), None

def tiny_augmentation(height, width):
    """The transforms for a model that resizes every image to one size, as `tiny` does."""
    aspect = width / height
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.Resize((2 * height, 2 * width)),     # so that a crop can have any image's aspect ratio
        v2.RandomResizedCrop((height, width), (0.5, 1), (0.8 * aspect, 1.25 * aspect)),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=4),
    ])

def encoder_losses(model, memory, image_size, targets):
    """`loss_ce_enc`, `loss_bbox_enc` and `loss_giou_enc`: each location of the encoder's output
    predicts an object with the decoder's heads, as in two-stage Deformable DETR, so that features
    learn what an object is before attention can select any. For training only."""
    memory = memory.float()                                     # (B, S, d)
    outputs = {"pred_logits": model.class_embed(memory),
               "pred_boxes": model.bbox_embed(memory).sigmoid()}
    stride = model.backbone[0].body.stride
    matches = match_locations(*(math.ceil(side / stride) for side in image_size), targets)
    criterion = SetCriterion(len(model.classes), lambda *_: matches, eos_coef=1)
    pairs = sum(len(locations) for locations, _ in matches)
    losses = criterion.layer_losses(outputs, targets, max(1, pairs))
    return {f"{name}_enc": losses[name] for name in ("loss_ce", "loss_bbox", "loss_giou")}

def match_locations(height, width, targets):
    """Match each location of the feature map to the object whose box contains its centre; if there
    are several, to the nearest in units of box size. An object also takes the location nearest to
    its centre, unless another object claims it. Returns what `HungarianMatcher` returns."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    centres = torch.stack((x.flatten() / width, y.flatten() / height), dim=1)   # (S, 2)
    matches = []
    for target in targets:
        boxes = target["boxes"].cpu().view(-1, 4)
        offset = (centres[:, None] - boxes[:, :2]).abs() / boxes[:, 2:]         # (S, M, 2)
        distance = offset.amax(-1)                              # (S, M), below 1/2 inside the box
        distance[distance.argmin(0), torch.arange(len(boxes))] = 0
        distance = nn.functional.pad(distance, (0, 1), value=0.5)       # the last: no object
        nearest = distance.argmin(1)                            # (S,)
        locations = (nearest < len(boxes)).nonzero()[:, 0]
        matches.append((locations, nearest[locations]))
    return matches

# ==== Appendix: a folder of images with XML (what a data set library would do) ====================
COCO_NAMES = {              # VOC's classes that have another name in COCO
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle",
    "pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
SYNONYMS = {"training": "train", "valid": "val", "validation": "val"}   # names of folders
KINDS = {                   # folders that only say what they hold
    "annotations", "annots", "data", "images", "imgs", "img", "jpegimages", "labels", "photos",
    "pictures", "xml", "xmls"}
ENDINGS = re.compile(rf"({'|'.join(map(re.escape, [*SUFFIXES, '.xml']))})+$", re.IGNORECASE)
OBJECT = "name", "bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax"

def load_data(args):
    """The records of "train" and "val", or with --eval of "val" only, and notes on the folder.
    Raises one ValueError for all files that cannot be used."""
    names = {"val": args.val} if args.eval else {"train": args.train, "val": args.val}
    if args.data is None:
        names = {part: named or [f"VOC2012/{part}"] for part, named in names.items()}
        for name in sum(names.values(), []):
            fetch_voc(name)
    data = Path(args.data or "data/VOCdevkit")
    if not data.is_dir():
        raise ValueError(f"--data {data}: there is no such folder")
    xmls, images, lists = find_files(data)
    alone = xmls.keys() - images.keys()
    other = {k for k in alone if not any(map(is_annotation, xmls[k]))}
    sets, notes = find_sets(data, names, xmls.keys() - other, lists)

    keys = sorted(set().union(*sets.values()))
    with ThreadPool() as pool:
        results = pool.imap(partial(read_record, xmls=xmls, images=images), keys)
        records = dict(zip(keys, progress("read", results, len(keys))))
    bad = [str(error) for error in records.values() if isinstance(error, ValueError)]
    if bad:
        raise ValueError(f"{len(bad)} of {len(keys)} annotations cannot be used: repair or remove "
                         f"their files: {'; '.join(bad[:5])}")

    unused = len(images.keys() - xmls.keys())
    if alone or unused:
        notes.append(f"skipped: {unused} images without an XML file, {len(alone)} XML files "
                     "without an image")
    both = set(sets.get("train", [])) & set(sets["val"])
    if both:
        notes.append(f"note: {len(both)} images are in both train and val, such as {min(both)[-1]}")
    return {part: [records[k] for k in dict.fromkeys(sets[part])] for part in sets}, notes

def fetch_voc(name):
    """Download a set of VOC, such as VOC2012/train, to data/VOCdevkit, unless it is there."""
    year, _, part = name.removeprefix("VOC").partition("/")
    if not part:
        raise ValueError(f"{name}: name the year as well, such as VOC2012/{name}, or pass --data")
    file = Path(f"data/VOCdevkit/VOC{year}/ImageSets/Main/{part}.txt")
    try:
        if RANK == 0 and not file.exists():
            VOCDetection("data", year, part, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not download {name} ({error}): put VOC's tar file into data/ by "
                      "hand, or pass a VOCdevkit with --data") from error
    if WORLD > 1:
        dist.barrier()                  # the other processes wait for the download

def find_files(data):
    """XML files and images below `data`, each as {key: [Path]}, and the lists of sets, {name:
    [Path]}. Skips hidden files and folders; follows links, but reads each folder only once."""
    xmls, images, lists = defaultdict(list), defaultdict(list), defaultdict(list)
    seen = set()
    for root, folders, files in os.walk(data, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() == ".xml":
                xmls[key(path.relative_to(data))].append(path)
            elif path.suffix.lower() in SUFFIXES:
                images[key(path.relative_to(data))].append(path)
            elif path.suffix == ".txt" and path.parts[-3:-1] == ("ImageSets", "Main"):
                lists[path.stem].append(path)
    return xmls, images, lists

def key(path):
    """What an XML file shares with its image: its folders, except those that only say what they
    hold, and its name without endings: ("train", "1") for train/images/1.jpg."""
    *folders, name = re.split(r"[/\\]", unicodedata.normalize("NFC", str(path)))
    folders = [SYNONYMS.get(folder.lower(), folder.lower()) for folder in folders]
    return *(folder for folder in folders if folder not in KINDS), ENDINGS.sub("", name)

def find_sets(data, names, keys, lists):
    """Choose the keys of "train" and "val", given the names of their sets, or None; also returns
    notes. If no set is named and no list or folder is called train, val or test, a fifth of the
    keys becomes val, chosen by a hash of their names: images added later hardly change it."""
    present = set(lists).union(*(k[:-1] for k in keys))
    if any(names.values()) or present & {"train", "val", "test"}:
        return {part: [k for name in named or [part] for k in find_set(data, name, keys, lists)]
                for part, named in names.items()}, []
    if len(keys) < len(names):
        raise ValueError(f"{data} holds {len(keys)} XML files in VOC's format, too few to use")
    by_hash = sorted(keys, key=lambda k: (zlib.crc32(k[-1].encode(errors="surrogateescape")), k))
    count = math.ceil(len(keys) / 5)
    sets = {"val": by_hash[:count], "train": by_hash[count:]}
    note = (f"split: {data} has no list or folder train, val or test; val is {count} of its "
            f"{len(keys)} images, chosen by a hash of their names")
    return {part: sets[part] for part in names}, [note]

def find_set(data, name, keys, lists):
    """The keys of a set: those in the list ImageSets/Main/NAME.txt, wherever below `data` it lies,
    or all with a folder NAME. A/NAME is searched for only below the folder A."""
    folder, part = data / Path(name).parent, Path(name).name
    listed = [path for path in lists.get(part, []) if folder in path.parents]
    if len(listed) > 1:
        raise ValueError(f"there are two lists called {part}, {listed[0]} and {listed[1]}: name "
                         f"one, such as {listed[1].parents[2].relative_to(data).as_posix()}/{part}")
    if listed:
        found = read_list(listed[0], data, keys)
    else:
        above = key(folder.relative_to(data) / "x")[:-1]
        part = SYNONYMS.get(part.lower(), part.lower())
        found = sorted(k for k in keys if k[:len(above)] == above and part in k[len(above):-1])
    if not found:
        present = sorted(set(lists).union(*(k[:-1] for k in keys)), key=len)
        raise ValueError(f"no annotations for {name} in {data}: name sets with --train and --val, "
                         f"such as --val test; lists and folders: {', '.join(present[:20])}")
    return found

def read_list(path, data, keys):
    """The keys in a list. A line is the name of a file beside ImageSets, with or without its ending
    and a path before it. Raises ValueError for a line that is not one XML file's."""
    above = key(path.parents[2].relative_to(data) / "x")[:-1]
    found = []
    for line in filter(None, map(str.strip, path.read_text("utf-8-sig").splitlines())):
        *folders, name = key(line)
        same = {(*above, *folders, name), (*above, name)} & keys
        if len(same) != 1:
            raise ValueError(f"{path}: there must be one XML file for {line!r}, not {len(same)}")
        found += same
    return found

def read_record(k, xmls, images):
    """Read the files of a key: `path` of the image, `upright` (apply its EXIF rotation), `size`
    (h, w), `names` (M,), `boxes` (M, 4) x0 y0 x1 y1 in pixels from 0, `difficult` (M,), and
    `wrong_size` (<size> is not the image's). Returns errors, so that all can be reported."""
    files = [*xmls.get(k, []), *images.get(k, [])]
    try:
        if len(xmls.get(k, [])) != 1 or len(images.get(k, [])) != 1:
            raise ValueError(f"there must be one XML file and one image {k[-1]}, in one folder or "
                             "in folders that differ only in names such as images and labels")
        xml, path = files
        root = read_xml(xml)
        if root.tag != "annotation":
            raise ValueError(f"the root of the XML file must be <annotation>, not <{root.tag}>")
        nodes = list(root.iter("object"))
        fields = [[node.findtext(tag, "").strip() for tag in OBJECT] for node in nodes]
        if not all(map(all, fields)):
            raise ValueError(f"an object lacks one of {', '.join(OBJECT)}")
        boxes = [[float(side) for side in sides] for _, *sides in fields]
        if boxes and np.max(boxes) <= 1:
            raise ValueError("boxes are fractions, from 0 to 1, but VOC's are in pixels")
        given = tuple(float(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
        with Image.open(path) as image:
            w, h = image.size
            turned = image.getexif().get(0x0112, 1) >= 5
            image.draft("L", (1, 1))    # an eighth of a JPEG is quick to decode, and enough
            image.load()                # to find a file that was cut off
        # Boxes are of the upright image, unless <size> says that it was annotated as stored.
        upright = not turned or w == h or given != (w, h)
        if turned and upright:
            w, h = h, w
        difficult = [node.findtext("difficult", "").strip() == "1" for node in nodes]
        return {"path": path, "upright": upright, "size": (h, w),
                "names": [name for name, *_ in fields],
                "boxes": np.reshape(boxes, (-1, 4)) - [1, 1, 0, 0],     # VOC counts from 1
                "difficult": np.array(difficult, dtype=bool),
                "wrong_size": all(given) and given != (w, h)}
    except Exception as error:          # Pillow can raise almost any exception
        return ValueError(f"{', '.join(map(str, files))}: {error}")

def read_xml(path):
    """The root of an XML file, with all tags in lower case and without their namespace."""
    root = ElementTree.parse(path).getroot()
    for node in root.iter():
        node.tag = node.tag.rsplit("}")[-1].lower()
    return root

def is_annotation(path):
    """Whether a file's root is <annotation>, or cannot be read, which `read_record` reports."""
    try:
        return read_xml(path).tag == "annotation"
    except (OSError, ElementTree.ParseError):
        return True

class VOC(Dataset):
    """Images (3, h, w) uint8, and targets: `boxes` (M, 4) cx, cy, w, h in [0, 1], `labels` (M,) and
    `size`, the file's (h, w). With a `transform`, for training, difficult objects are left out.
    Without one, images are resized to `sizes`, as in `detect`."""

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
            counts["objects of other classes left out"] += int((labels < 0).sum())
            clipped = (boxes != record["boxes"]).any(1)
            counts["boxes clipped to the image"] += int(clipped[keep].sum())
            counts["boxes without area dropped"] += int((~has_area).sum())
            counts["objects marked difficult"] += int(record["difficult"][keep].sum())
        objects = sum(len(record["labels"]) for record in self.records)
        notes = [f"{count} {what}" for what, count in counts.items() if count]
        wrong = [record["path"] for record in records if record["wrong_size"]]
        if wrong:
            notes.append(f"{len(wrong)} images whose <size> is wrong, such as {wrong[0]}")
        self.summary = "; ".join([f"{len(records)} images, {objects} objects", *notes])
        if transform and objects == counts["objects marked difficult"]:
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
        transform = self.transform or v2.Resize(resized_size(*record["size"], *self.sizes))
        image, target = transform(image, {"boxes": boxes, "labels": labels})
        h, w = image.shape[1:]
        target["boxes"] = box_xyxy_to_cxcywh(target["boxes"] / torch.tensor([w, h, w, h]))
        target["size"] = record["size"]
        return image.as_subclass(torch.Tensor), target

# ==== Appendix: COCO's average precision (what pycocotools does) ==================================
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}   # in pixels
IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)

def coco_ap(predictions, targets, num_classes):
    """COCO's average precision, as `pycocotools` computes it: AP, AP50, AP75, APs, APm, APl as
    fractions, -1 if no object counts, and AP50_per_class, a list. One dict per image: predictions'
    `scores` (n,), `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels; targets' `labels` (m,), `boxes`
    (m, 4), and `ignore` (m,) bool: objects that count neither as missed nor as false positives."""
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
            found = np.cumsum(hits[:, order] & counts, axis=1)
            curve = found / (np.cumsum(counts, axis=1) + np.spacing(1))     # precision
            curve = np.maximum.accumulate(curve[:, ::-1], axis=1)[:, ::-1]  # at this recall or more
            for t in range(len(IOUS)):
                at = np.searchsorted(found[t] / positives[label], RECALLS)      # (R,)
                precision[area][label, t] = np.append(curve[t], 0)[at]
    all_areas = precision.pop("")                                   # (K, T, R)
    metrics = {"AP": mean(all_areas), "AP50": mean(all_areas[:, 0]), "AP75": mean(all_areas[:, 5])}
    metrics |= {f"AP{area}": mean(values) for area, values in precision.items()}
    return metrics | {"AP50_per_class": [mean(values[0]) for values in all_areas]}

def match_boxes(prediction, target, low, high):
    """Match the D detections of an image, best first, to its G objects of the same class, at T IoU
    thresholds; only objects with areas between `low` and `high` count. Returns scores (D,), labels
    (D,), hits (T, D), which of them to ignore (T, D), and the labels of the objects that count."""
    scores, labels = np.asarray(prediction["scores"]), np.asarray(prediction["labels"])
    true_labels = np.asarray(target["labels"])
    crowd = np.asarray(target.get("ignore", 0 * true_labels)) > 0
    order = np.argsort(-scores, kind="stable")
    ranks = np.tril(labels[order, None] == labels[order], -1).sum(1)
    order = order[ranks < 100]                                      # COCO's best 100 per class
    boxes = torch.as_tensor(prediction["boxes"])[order].double()
    true_boxes = torch.as_tensor(target["boxes"]).double().view(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1).numpy()
    true_area = (true_boxes[:, 2:] - true_boxes[:, :2]).prod(1).numpy()
    skip = crowd | (true_area < low) | (true_area > high)           # (G,)
    ignored = np.tile((area < low) | (area > high), (len(IOUS), 1))         # (T, D)
    hits = np.zeros_like(ignored)
    free = np.ones((len(IOUS), len(true_boxes)), bool)

    inner, union, _ = (value.numpy() for value in box_areas(boxes, true_boxes))     # (D, G) each
    iou = inner / np.where(crowd, area[:, None], union)             # a crowd: the share inside it
    iou[labels[order, None] != true_labels] = 0
    for d in np.flatnonzero((iou >= IOUS[0]).any(1)):
        can = (iou[d] >= IOUS[:, None]) & (free | crowd)            # (T, G)
        prefer = can & ~skip                                        # one that counts goes first
        can = np.where(prefer.any(1, keepdims=True), prefer, can)
        last = np.where(can, iou[d], -1)[:, ::-1].argmax(1)         # on a tie, the last one
        best = len(true_boxes) - 1 - last                           # (T,)
        hit = can.any(1)
        hits[hit, d] = True
        free[hit, best[hit]] = False
        ignored[hit, d] = skip[best[hit]]
    return scores[order], labels[order], hits, ignored, true_labels[~skip]

# ==== Appendix: averages, log, curves and progress ================================================
PANELS = {
    "loss": "total loss", "coco_eval_bbox": "average precision", "loss_ce": "cross-entropy",
    "loss_bbox": "L1 loss of boxes", "loss_giou": "GIoU loss of boxes",
    "class_error": "class error (%)", "cardinality_error": "cardinality error (objects)",
    "lr": "learning rate"}

def averages(steps):
    """The means of the losses of all steps, [{name: tensor}], over all processes."""
    values = torch.stack([torch.stack([*losses.values()]) for losses in steps]).mean(0)
    if WORLD > 1:
        dist.all_reduce(values)
        values /= WORLD
    return dict(zip(steps[0], values.tolist()))

def save_log(history, args):
    """Write log.txt, and curves.png after an evaluation. A failure is only a warning."""
    lines = "".join(f"{json.dumps(entry)}\n" for entry in history)
    try:
        save(args.output / "log.txt", lambda file: file.write(lines.encode()))
        if "test_loss" in history[-1]:
            save(args.output / "curves.png", draw_curves(history).savefig)
    except OSError as error:                # the next epoch writes both again
        log(f"warning: could not write log.txt or curves.png: {error}")

def draw_curves(history):
    """The log as a figure of eight panels: training solid, validation dashed."""
    figure = Figure((16, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 4).flat, PANELS.items()):
        for column, line in ((name, "-"), (f"train_{name}", "-"), (f"test_{name}", "--")):
            entries = [entry for entry in history if column in entry]
            if entries:
                values = [np.ravel(entry[column])[:3] for entry in entries]
                axes.plot([entry["epoch"] + 1 for entry in entries], values, line)
        average_precision = name == "coco_eval_bbox"
        axes.legend(["AP", "AP50", "AP75"] if average_precision else ["training", "validation"])
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    return figure

def progress(title, items, count):
    """Yield the items, and print progress: in a terminal on one line, otherwise every minute."""
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

if __name__ == "__main__":
    sys.exit(main())
