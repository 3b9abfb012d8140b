"""Find the objects in images with DETR: a table on the screen, and each image with its boxes.

    python infer.py                                  # bundled photographs of blood and detector
    python infer.py cats.jpg holidays/               # COCO's 80 everyday objects (fetches 160 MB)
    python infer.py https://example.org/street.jpg --weights detr_resnet101 --attention
    python infer.py photo.jpg --weights outputs/best.pth --threshold 0.5 --json found.json
"""
import argparse
import io
import json
import logging
import os
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detr_mini import ZOO, detect, fit, load_detr

Image.init()
SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
COLORS = ["#ff8c00", "#1f77ff", "#00a651", "#e6194b", "#911eb4", "#00b8d4", "#f032e6", "#808000"]

# What Pillow raises if an image is broken, and what it and torch say of odd files is not shown.
UNREADABLE = (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError)
warnings.filterwarnings("ignore", module="PIL|torch")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

def open_image(source, upright=True):
    """A file or URL as an RGB image, turned `upright` as its EXIF says. Transparency lies on white,
    16 bits are scaled to 8, and of an animation the first frame is taken. Raises UNREADABLE."""
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

def rectangle(pen, box, scale, size, **style):
    """Draw a box of the image on a canvas `scale` times as large, (w, h) `size`."""
    x0, y0, x1, y1 = (min(max(v * scale, 0), side - 1) for v, side in zip(box, (*size, *size)))
    pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), **style)
    return x0, y0

def draw(image, found):
    """The image, enlarged if it is small, with a box, a name and a score for each object."""
    scale = max(1, round(1600 / max(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen, unit = ImageDraw.Draw(canvas), max(canvas.size) / 1000
    font = ImageFont.load_default(max(10, 15 * unit))
    for box, label, name, score in reversed(list(zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["names"], found["scores"]))):
        color = COLORS[label % len(COLORS)]
        line = max(2, round(2.2 * unit))
        x, y = rectangle(pen, box, scale, canvas.size, outline=color, width=line)
        text = f"{name} {score:.0%}"
        width, height = pen.textlength(text, font) + 8 * unit, 19 * unit
        x, y = min(x, max(0, canvas.width - width)), y - height if y >= height else y
        pen.rectangle((x, y, x + width, y + height), fill=color)
        pen.text((x + 4 * unit, y + height / 2), text, "white", font, anchor="lm")
    return canvas

def draw_attention(image, found, attention, width=1600):
    """A sheet of tiles, one for each detection, bright where its query looked; each row fills the
    width. attention (n, H', W'), the weights of each query."""
    rows = max(1, round((len(attention) * image.height / image.width) ** 0.5))
    grey, strips = ImageOps.grayscale(image).convert("RGB"), []
    for row in torch.arange(len(attention)).tensor_split(rows):
        scale = width / len(row) / image.width
        tile = width // len(row), max(1, round(scale * image.height))
        strip = Image.new("RGB", (width, tile[1]))
        for column, i in enumerate(row.tolist()):
            light = (255 * (attention[i] / attention[i].max()).sqrt()).byte().numpy()
            light = Image.fromarray(light).resize(tile, Image.Resampling.BICUBIC)
            color = Image.new("RGB", tile, COLORS[found["labels"][i] % len(COLORS)])
            dark = grey.resize(tile).point(lambda value: value * 0.45)
            seen = Image.composite(color, dark, light)
            rectangle(ImageDraw.Draw(seen), found["boxes"][i].tolist(), scale, tile,
                      outline="white", width=max(1, tile[1] // 120))
            strip.paste(seen, (column * tile[0], 0))
        strips.append(np.asarray(strip))
    return Image.fromarray(np.concatenate(strips))

def save(path, write):
    """`write` a file, opened in binary, under a temporary name, then rename it: whatever happens,
    `path` is a whole file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

def choose_device(name):
    """The best device there is for "auto", else the one named; ValueError if it is not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    best = "mps" if torch.backends.mps.is_available() else best
    if name.split(":")[0] not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: there is none here; take {best}, or leave it to auto")
    return torch.device(best if name == "auto" else name)

def find_images(sources):
    """Files, URLs and the images in folders, [source]; ValueError for a folder without any."""
    images = []
    for source in sources:
        inside = [source]
        if Path(source).is_dir():
            inside = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in SUFFIXES)
        if not inside:
            raise ValueError(f"{source}: a folder without images")
        images += map(str, inside)
    return images

def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER|URL", help="default: the bundled photographs")
    add("--weights", metavar="NAME|FILE", help=f"demo, {', '.join(ZOO)}, or a DETR checkpoint file "
        "(default: detr_resnet50; demo if no image is named)")
    add("--threshold", type=float, default=0.7, metavar="P",
        help="lowest score to report, 0 to 1 (default: %(default)s)")
    add("--out", type=Path, default=Path("detections"), metavar="DIR",
        help="where the pictures go (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="all detections in COCO's results format, too")
    add("--attention", action="store_true", help="a second picture: where the query of each "
        "detection looked, the mean of the decoder's layers and heads")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    return parser.parse_args(argv)

def run(args):
    """Open, detect, draw and save each image; returns how many could not be read."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: a score is from 0 to 1")
    device = choose_device(args.device)
    sources = find_images(args.images or sorted((Path(__file__).parent / "assets").glob("*.jpg")))
    model = load_detr(args.weights or ("detr_resnet50" if args.images else "demo"), device=device)
    cross_attentions = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    for layer in cross_attentions:
        layer.keep_weights = args.attention

    results, failures, names = [], 0, set()
    for source in sources:
        try:
            image = open_image(source)
            start = time.perf_counter()
            [found] = detect(model, image, args.threshold)
        except UNREADABLE as error:
            print(f"infer.py: error: {source}: {why_unreadable(source, error)}", file=sys.stderr)
            failures += 1
            continue
        seconds = time.perf_counter() - start
        print(f"{source}  {image.width}x{image.height}  {len(found['names'])} found "
              f"in {seconds:.2f} s\n  score  label             x0     y0     x1     y1")
        stem = Path(source.split("?")[0]).stem
        while stem in names:
            stem += "_"
        names.add(stem)
        boxes, scores, labels = (found[key].tolist() for key in ("boxes", "scores", "labels"))
        for score, name, label, box in zip(scores, found["names"], labels, boxes):
            print(f"   {score:.2f}  {name:14}" + "".join(f"{value:7.0f}" for value in box))
            x0, y0, x1, y1 = box
            results.append({"image_id": int(stem) if stem.isdigit() else stem, "score": score,
                            "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]})
        pictures = {f"{stem}.png": draw(image, found)}
        if args.attention and found["names"]:
            height, _ = fit(image.height, image.width, model.size, model.max_size)
            rows = -(-height // model.backbone[0].body.stride)
            weights = torch.cat([layer.weights for layer in cross_attentions], 1)[0].mean(0)
            looks = weights[found["queries"]].unflatten(1, (rows, -1)).cpu()    # (n, H', W')
            pictures[f"{stem}_attention.png"] = draw_attention(image, found, looks)
        for name, picture in pictures.items():
            save(args.out / name, lambda file: picture.save(file, "PNG", compress_level=4))
            print(f"  -> {args.out / name}")
    if args.json:
        save(args.json, lambda file: file.write(json.dumps(results).encode()))
        print(f"{len(results)} detections -> {args.json}")
    return failures

def why_unreadable(source, error):
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels: make it smaller"
    if "*" in source and isinstance(error, FileNotFoundError):
        return "no image matches this pattern"
    return f"cannot be read as an image ({error})"

def main(argv=None):
    args = arguments(argv)
    try:
        return 2 if run(args) else 0
    except (OSError, ValueError, RuntimeError) as error:
        print(f"infer.py: error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("infer.py: stopped; the pictures written so far are whole", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
