"""Find the objects in pictures with DETR: a table on the screen, and every picture with its boxes in a folder.

    python infer.py                                  # the bundled photographs of blood, with the bundled detector
    python infer.py cats.jpg holidays/               # COCO's 80 kinds of everyday objects (fetches 160 MB once)
    python infer.py https://example.org/street.jpg --weights detr_resnet101 --attention
    python infer.py photo.jpg --weights outputs/best.pth --threshold 0.5 --json found.json
"""
import argparse
import io
import json
import logging
import math
import os
import statistics
import sys
import time
import urllib.request
import warnings
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detr_mini import DETR, ZOO, HungarianMatcher, SetCriterion, detect, fit, load_detr

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"}
PALETTE = ["#ff8c00", "#1f77ff", "#00a651", "#e6194b", "#911eb4", "#00b8d4", "#f032e6", "#808000", "#9a6324", "#3b3b98"]
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)      # what Pillow raises where a picture is broken
BENCHMARK_SECONDS = 60      # for one comparison


def open_image(source):
    """A file or URL as an upright RGB picture. Transparency lies on white; 16 bits become 8; of a GIF, the first frame."""
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "detr-mini"})
        with urllib.request.urlopen(request, timeout=30) as response:
            source = io.BytesIO(response.read())
    with Image.open(source) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            white = 65535 if picture.mode.startswith("I") else 1 if picture.getextrema()[1] <= 1 else 255
            picture = picture.convert("F").point(lambda value: value * (255 / white)).convert("L")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def color(label):
    return PALETTE[label % len(PALETTE)]


def draw(picture, found):
    """The picture, enlarged where it is small, with a box and a name for each object found."""
    scale = max(1, round(1600 / max(picture.size)))
    canvas = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    pen, unit = ImageDraw.Draw(canvas), max(canvas.size) / 1000
    font = ImageFont.load_default(max(10, 15 * unit))
    objects = list(zip(found["boxes"].tolist(), found["labels"].tolist(), found["names"], found["scores"].tolist()))
    for box, label, _, _ in reversed(objects):
        pen.rounded_rectangle(corners(box, scale, canvas.size), radius=4 * unit, outline=color(label), width=max(2, round(2.2 * unit)))
    for box, label, name, score in reversed(objects):
        x0, y0, _, _ = corners(box, scale, canvas.size)
        text = f"{name} {score:.0%}"
        width, height = pen.textlength(text, font) + 8 * unit, 19 * unit
        x0, y0 = min(x0, max(0, canvas.width - width)), y0 - height if y0 >= height else y0
        pen.rounded_rectangle((x0, y0, x0 + width, y0 + height), radius=4 * unit, fill=color(label))
        pen.text((x0 + 4 * unit, y0 + height / 2), text, "white", font, anchor="lm")
    return canvas


def corners(box, scale, size):
    """A box in pixels of the canvas, at least a pixel wide and high, within it."""
    x0, y0, x1, y1 = (min(max(value * scale, 0), side - 1) for value, side in zip(box, (*size, *size)))
    return x0, y0, max(x0, x1), max(y0, y1)


def draw_attention(picture, boxes_picture, found, attention):
    """Beside the boxes, a tile for each detection: bright where its query looked. attention (n, H', W'), a sum of 1 each."""
    columns = math.ceil(math.sqrt(len(attention)))
    tile = max(1, boxes_picture.width // columns), max(1, boxes_picture.height // columns)
    canvas = Image.new("RGB", (2 * boxes_picture.width, boxes_picture.height), "#202428")
    canvas.paste(boxes_picture)
    dim = ImageOps.grayscale(picture.resize(tile)).point(lambda value: value * 0.45).convert("RGB")
    scale = tile[0] / picture.width
    for i, (look, box, label) in enumerate(zip(attention, found["boxes"].tolist(), found["labels"].tolist())):
        light = Image.fromarray((255 * (look / look.max()).sqrt()).byte().numpy()).resize(tile, Image.Resampling.BICUBIC)
        seen = Image.composite(Image.new("RGB", tile, color(label)), dim, light)
        ImageDraw.Draw(seen).rectangle(corners(box, scale, tile), outline="white", width=max(1, tile[1] // 120))
        canvas.paste(seen, (boxes_picture.width + i % columns * tile[0], i // columns * tile[1]))
    return canvas


def in_transformers(model):
    """A detector of the same architecture from the `transformers` library, random weights, or None where it is not installed."""
    try:
        from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    except ImportError:
        return None
    body, layers = model.backbone[0].body, model.transformer
    stages = [getattr(body, name) for name in body.stages]
    resnet = ResNetConfig(embedding_size=len(body.conv1.weight), depths=[len(stage) for stage in stages],
                          hidden_sizes=[body.num_channels // 2**i for i in reversed(range(len(stages)))],
                          layer_type="bottleneck" if hasattr(stages[0][0], "conv3") else "basic", out_features=[f"stage{len(stages)}"])
    heads, width = layers.encoder.layers[0].self_attn.heads, layers.encoder.layers[0].linear1.out_features
    config = DetrConfig(backbone_config=resnet, num_labels=len(model.classes), num_queries=model.query_embed.num_embeddings,
                        d_model=model.query_embed.embedding_dim, encoder_layers=len(layers.encoder.layers),
                        decoder_layers=len(layers.decoder.layers), encoder_attention_heads=heads, decoder_attention_heads=heads,
                        encoder_ffn_dim=width, decoder_ffn_dim=width, attention_dropout=0.1, activation_dropout=0.1)   # the reference's
    return DetrForObjectDetection(config).eval()


def benchmark(model, device):
    """Latency at the model's own size, float32 and bfloat16, eager and compiled, and the time of a training step; each turn by turn
    with transformers' DETR where that is installed."""
    height, width = model.size, min(model.max_size, model.size * 4 // 3)
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__} on {where}, {height}x{width}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
          f"{weights / 2**20:.0f} MiB of weights")
    peer = None if model.backbone[0].body.dilation else in_transformers(model)
    kinds = {"float32": (model, False), "bfloat16": (model, True), "compiled": (torch.compile(model), False)}
    if peer:
        kinds |= {"transformers": (peer.to(device), False), "transformers bfloat16": (peer, True)}
    if device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        print("bfloat16 left out: this CPU has no instructions for it")
        kinds = {name: kind for name, kind in kinds.items() if "bfloat16" not in name}

    def look(network, half, images):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            network(images)

    for batch in (1, 16) if device.type == "cuda" else (1,):
        images = torch.randn(batch, 3, height, width, device=device)
        compare(f"batch {batch}", batch, {name: partial(look, *kind, images) for name, kind in kinds.items()}, device)
    compare("training step", 2, training_steps(model, peer, device), device)
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def training_steps(model, peer, device):
    """One step each, by name: two images of 640x640 with ten objects, losses of all decoder layers, AdamW, float32."""
    images = torch.randn(2, 3, 640, 640, device=device)
    targets = [{"labels": torch.randint(len(model.classes), (10,), device=device), "boxes": torch.rand(10, 4, device=device) / 4 + 0.25}
               for _ in range(2)]
    criterion = SetCriterion(len(model.classes), HungarianMatcher()).to(device)
    model.to(memory_format=torch.channels_last).aux_loss = True     # as train_voc.py has it
    losses = {"float32": (model, lambda: criterion.total(criterion(model(images), targets)))}
    if peer:
        peer.config.auxiliary_loss = True
        for name, parameter in peer.model.backbone.named_parameters():      # it trains none of the backbone: as the paper has it, ...
            parameter.requires_grad_("embedder" not in name and "stages.0" not in name)     # ... all but stem and first stage
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
        losses["transformers"] = peer, lambda: peer(images, labels=labels).loss

    def step(loss, optimizer):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: partial(step, loss, torch.optim.AdamW([p for p in network.train().parameters() if p.requires_grad], 1e-6, fused=True))
            for name, (network, loss) in losses.items()}


def compare(title, batch, runs, device):
    """Time functions turn by turn, 30 rounds or as many as there is time for, and print the medians."""
    def seconds(run):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times = {}
    for name, run in runs.items():
        try:
            for _ in range(3):
                seconds(run)
            times[name] = []
        except Exception as error:      # torch.compile needs a C++ compiler, or Triton, which not every machine has
            print(f"{title:13}  {name:21} not possible here ({type(error).__name__})")
    start = time.perf_counter()
    while time.perf_counter() - start < BENCHMARK_SECONDS and len(next(iter(times.values()))) < 30:
        for name, taken in times.items():
            taken.append(seconds(runs[name]))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        ratio = f"  {medians['transformers'] / median:5.2f} x transformers" if "transformers" in medians else ""
        print(f"{title:13}  {name:21} {1000 * median:8.1f} ms  {batch / median:7.1f} images/s{ratio}", flush=True)


def choose_device(name):
    """A device's name: the best there is for "auto", else the one given, if it is there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: there is none here; take {best}, or leave it to auto")
    return best if name == "auto" else name


def find_images(sources):
    """Files, URLs and the images in folders, [source]."""
    images = []
    for source in sources:
        inside = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in SUFFIXES) if Path(source).is_dir() else [source]
        if not inside:
            raise ValueError(f"{source}: a folder without images ({', '.join(sorted(SUFFIXES))})")
        images += map(str, inside)
    return images


def hush():
    """What Pillow and torch remark on files that they can read, or refuse anyway, is not for the user."""
    warnings.filterwarnings("ignore", module="PIL|torch")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def save(path, write):
    """`write` a file, opened in binary, under a temporary name, then rename it: whatever happens, `path` is a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def arguments(argv):
    parser = argparse.ArgumentParser(prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE|FOLDER|URL", help="pictures (default: the bundled photographs)")
    parser.add_argument("--weights", metavar="NAME|FILE", help=f"demo, {', '.join(ZOO)}, or any DETR checkpoint file "
                        "(default: detr_resnet50; demo where no picture is named)")
    parser.add_argument("--threshold", type=float, default=0.7, metavar="P", help="lowest score to report, 0 to 1 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("detections"), metavar="DIR", help="where the pictures go (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all detections in COCO's results format, too")
    parser.add_argument("--attention", action="store_true", help="show where each detection's query looked, beside the boxes: "
                        "the mean of the decoder's layers and heads")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    parser.add_argument("--benchmark", action="store_true", help="time the model (default: detr_resnet50) on this device "
                        "instead, and a training step, side by side with transformers' where that is installed; nothing is fetched")
    return parser.parse_args(argv)


def run(args):
    device = choose_device(args.device)
    if args.benchmark:      # the time does not depend on the weights: those of the zoo are not fetched
        name = args.weights or "detr_resnet50"
        model = DETR(backbone=name.split("_")[1], dilation="dc5" in name) if name in ZOO else load_detr(name)
        benchmark(model.to(device).eval(), torch.device(device))
        return 0
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    sources = find_images(args.images or sorted((Path(__file__).parent / "assets").glob("*.jpg")))
    model = load_detr(args.weights or ("detr_resnet50" if args.images else "demo"), device=device)
    cross_attentions = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    for layer in cross_attentions:
        layer.keep_weights = args.attention

    results, failures, names = [], 0, set()
    for source in sources:
        try:
            picture = open_image(source)
            start = time.perf_counter()
            [found] = detect(model, picture, args.threshold)
            seconds = time.perf_counter() - start
        except UNREADABLE as error:
            print(f"infer.py: error: {source}: cannot be read as an image ({error}): give a JPEG, PNG, WebP, GIF or TIFF", file=sys.stderr)
            failures += 1
            continue
        print(f"{source}  {picture.width}x{picture.height}  {len(found['names'])} found in {seconds:.2f} s")
        print("  score  label             x0     y0     x1     y1")
        for score, name, box in zip(found["scores"].tolist(), found["names"], found["boxes"].tolist()):
            print(f"   {score:.2f}  {name:14}" + "".join(f"{value:7.0f}" for value in box))
        image = draw(picture, found)
        if args.attention and found["names"]:
            cells = (-(-side // model.backbone[0].body.stride) for side in fit(picture.height, picture.width, model.size, model.max_size))
            weights = torch.cat([layer.weights for layer in cross_attentions], 1)       # (1, layers and their heads, N, S)
            look = weights.mean(1)[0, found["queries"]].unflatten(1, tuple(cells)).cpu()                   # (n, H', W')
            image = draw_attention(picture, image, found, look)
        stem = Path(source.split("?")[0]).stem
        while stem in names:
            stem += "_"
        names.add(stem)
        target = args.out / f"{stem}.png"
        save(target, lambda file: image.save(file, "PNG", compress_level=4))     # a third of the default level's time
        print(f"  -> {target}")
        image_id = int(stem) if stem.isdigit() else stem
        for score, label, (x0, y0, x1, y1) in zip(*(found[name].tolist() for name in ("scores", "labels", "boxes"))):
            results.append({"image_id": image_id, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    if args.json:
        save(args.json, lambda file: file.write(json.dumps(results).encode()))
        print(f"{len(results)} detections -> {args.json}")
    return 2 if failures else 0


def main(argv=None):
    hush()
    try:
        return run(arguments(argv))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infer.py: stopped; the pictures written so far are whole", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
