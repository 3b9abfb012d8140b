"""Find the objects in images with DETR; print a table, and save each image with its boxes.

    python infer.py                                  # bundled images of blood, bundled detector
    python infer.py cats.jpg holidays/               # COCO's 80 everyday objects (fetches 160 MB)
    python infer.py https://example.org/street.jpg --weights detr_resnet101 --attention
    python infer.py photo.jpg --weights outputs/best.pth --threshold 0.5 --json found.json
"""
import argparse
import io
import json
import os
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detr_mini import ZOO, detect, fit, load_detr

SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
COLORS = ["#ff8c00", "#1f77ff", "#00a651", "#e6194b", "#911eb4", "#00b8d4", "#f032e6", "#808000"]
UNREADABLE = OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError   # Pillow's
warnings.filterwarnings("ignore", module="PIL|torch")

def open_image(source, upright=True):
    """A file or URL as an RGB image, rotated by its EXIF if `upright`. Transparent pixels become
    white, 16 bits are scaled to 8, and an animation is its first frame. Raises UNREADABLE."""
    if str(source).startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "detr-mini"})
        with urllib.request.urlopen(request, timeout=30) as response:
            source = io.BytesIO(response.read())
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode[0] in "IF":
            white = 65535 if image.mode[0] == "I" else 1 if image.getextrema()[1] <= 1 else 255
            image = image.convert("F").point(lambda value: value * (255 / white)).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

def draw(image, found):
    """The image, enlarged if it is small, with a box, a name and a score for each object."""
    scale = max(1, round(1600 / max(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen, unit = ImageDraw.Draw(canvas), max(canvas.size) / 1000
    font = ImageFont.load_default(max(10, 15 * unit))
    limit = torch.tensor(canvas.size * 2) - 1
    boxes = (found["boxes"].cpu() * scale).clamp(min=0).minimum(limit).tolist()
    colors = [COLORS[label % len(COLORS)] for label in found["labels"].tolist()]
    for box, color in zip(boxes, colors):
        pen.rectangle(box, outline=color, width=max(2, round(2.2 * unit)))
    for (x, y, *_), color, name, score in zip(boxes, colors, found["names"], found["scores"]):
        text = f"{name} {score:.0%}"
        width, height = pen.textlength(text, font) + 8 * unit, 19 * unit
        x, y = min(x, max(0, canvas.width - width)), y - height if y >= height else y
        pen.rectangle((x, y, x + width, y + height), fill=color)
        pen.text((x + 4 * unit, y + height / 2), text, "white", font, anchor="lm")
    return canvas

def draw_attention(image, found, attention, width=1600):
    """A sheet of tiles, one for each detection, bright at its query's attention, of (n, H', W')."""
    dark = ImageOps.grayscale(image).point(lambda value: value * 0.45)
    rows = round((len(attention) * image.height / image.width) ** 0.5)
    rows = torch.arange(len(attention)).tensor_split(max(1, rows))
    heights = [max(1, round(width / len(row) * image.height / image.width)) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights)))
    for k, (row, height) in enumerate(zip(rows, heights)):
        size = width // len(row), height
        boxes = found["boxes"].cpu() * size[0] / image.width
        for column, i in enumerate(row.tolist()):
            weights = (255 * (attention[i] / attention[i].max()).sqrt()).byte().numpy()
            weights = Image.fromarray(weights).resize(size, Image.Resampling.BICUBIC)
            tile = dark.resize(size).convert("RGB")
            tile.paste(COLORS[found["labels"][i] % len(COLORS)], mask=weights)
            box = boxes[i].clamp(min=0).minimum(torch.tensor(size * 2) - 1).tolist()
            ImageDraw.Draw(tile).rectangle(box, outline="white", width=1 + height // 200)
            sheet.paste(tile, (column * size[0], sum(heights[:k])))
    return sheet

def save(path, write):
    """`write` a binary file under a temporary name, then rename it: `path` is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def save_png(path, image):
    save(path, lambda file: image.save(file, "PNG", compress_level=4))
    print(f"  -> {path}")

def choose_device(name):
    """The best device for "auto", else the one named; ValueError if it is not available."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    if name.split(":")[0] not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: not available here; use {best} or auto")
    return torch.device(best if name == "auto" else name)

def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER|URL", help="default: the bundled images")
    add("--weights", metavar="NAME|FILE", help=f"demo, {', '.join(ZOO)}, or a file "
        "(default: detr_resnet50; demo if no image is named)")
    add("--threshold", type=float, default=0.7, metavar="P", help="lowest score (default: 0.7)")
    add("--out", type=Path, default="detections", metavar="DIR", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all detections in COCO's results format")
    add("--attention", action="store_true", help="also draw where each detection's query attends")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    return parser.parse_args(argv)

def run(args):
    """Open, detect, draw and save each image; returns how many could not be read."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: a score is from 0 to 1")
    sources = []
    for source in args.images or sorted(map(str, Path(__file__).parent.glob("assets/*.jpg"))):
        folder = "://" not in source and Path(source).is_dir()
        inside = sorted(Path(source).iterdir()) if folder else []
        sources += [str(p) for p in inside if p.suffix.lower() in SUFFIXES] or [source]
    weights = args.weights or ("detr_resnet50" if args.images else "demo")
    model = load_detr(weights, device=choose_device(args.device))
    attentions = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    for layer in attentions:
        layer.keep_weights = args.attention
    results, failures, stems = [], 0, set()
    for source in sources:
        try:
            image, start = open_image(source), time.perf_counter()
            [found] = detect(model, image, args.threshold)
        except UNREADABLE as error:
            why = {FileNotFoundError: "no image of this name",
                   IsADirectoryError: "no images in this folder",
                   Image.DecompressionBombError: "over 178 megapixels: make it smaller"}
            why = why.get(type(error), f"not a readable image ({error})")
            print(f"infer.py: error: {source}: {why}", file=sys.stderr)
            failures += 1
            continue
        seconds, (w, h) = time.perf_counter() - start, image.size
        print(f"{source}  {w}x{h}  {len(found['names'])} found in {seconds:.2f} s")
        print("  score  label             x0     y0     x1     y1")
        stem = Path(source.split("?")[0]).stem
        while stem in stems:
            stem += "_"
        stems.add(stem)
        boxes, scores, labels = (found[key].tolist() for key in ("boxes", "scores", "labels"))
        for score, name, label, (x0, y0, x1, y1) in zip(scores, found["names"], labels, boxes):
            print(f"   {score:.2f}  {name:14}{x0:7.0f}{y0:7.0f}{x1:7.0f}{y1:7.0f}")
            results.append({"image_id": int(stem) if stem.isdigit() else stem, "score": score,
                            "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        save_png(args.out / f"{stem}.png", draw(image, found))
        if args.attention and found["names"]:
            rows = -(-fit(h, w, *model.sizes)[0] // model.backbone[0].body.stride)
            mean = torch.cat([one.weights[0] for one in attentions]).mean(0)  # (N, S), 0 on padding
            mean = mean[:, mean.any(0)][found["queries"]].unflatten(1, (rows, -1)).cpu()
            save_png(args.out / f"{stem}_attention.png", draw_attention(image, found, mean))
    if args.json:
        save(args.json, lambda file: file.write(json.dumps(results).encode()))
        print(f"{len(results)} detections -> {args.json}")
    return failures

def main(argv=None):
    try:
        return 2 if run(arguments(argv)) else 0
    except (OSError, ValueError, RuntimeError) as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("infer.py: stopped; the images written so far are complete", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
