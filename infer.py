"""Detect the objects in images with DETR: print a table, and save each image with its boxes.

    python infer.py                                  # the bundled detector, on bundled photographs
    python infer.py cats.jpg holidays/               # COCO's 80 everyday objects (downloads 160 MB)
    python infer.py https://example.org/street.jpg --weights detr_resnet101 --attention
    python infer.py photo.jpg --weights outputs/best.pth --threshold 0.5 --json found.json
"""
import argparse
import io
import json
import math
import os
import sys
import tempfile
import urllib.request
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detr_mini import ZOO, detect, load_detr, resized_size

COLORS = ["#ff8c00", "#1f77ff", "#00a651", "#e6194b", "#911eb4", "#00b8d4", "#f032e6", "#808000"]

def run(args):
    """Detect objects in each image; print, draw and save them. Returns the number skipped."""
    sources = find_images(args.images)
    check(args, sources)                # before a model is downloaded
    device = choose_device(args.device)
    dtype = choose_dtype(device)
    model = load_detr(args.weights, device=device)
    for layer in model.transformer.decoder.layers:
        layer.multihead_attn.keep_weights = args.attention
    results, skipped = [], 0
    for source, name in zip(sources, drawing_names(sources)):
        try:
            image = open_image(source)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                [found] = detect(model, image, args.threshold)
        except Exception as error:
            print("infer.py: error:", *f"{source}: skipped: {error}".split(), file=sys.stderr)
            skipped += 1
            continue
        print_table(source, image, found)
        results += coco_results(source, found)
        save_drawing(args.out / f"{name}.jpg", draw(image, found))
        if args.attention and found["names"]:
            maps = attention_maps(model, image, found)
            save_drawing(args.out / f"{name}_attention.jpg", draw_attention(image, found, maps))
    if args.json:
        save(args.json, lambda file: file.write(json.dumps(results).encode()))
        print(f"{len(results)} detections -> {args.json}")
    return skipped

def find_images(names):
    """The images named, and those in named folders. Raises ValueError if a folder has none."""
    sources = []
    for name in names:
        inside = [name]
        if os.path.isdir(name):
            paths = sorted(Path(name).glob("[!.]*"))
            inside = [str(path) for path in paths if path.suffix.lower() in SUFFIXES]
        if not inside:
            raise ValueError(f"{name}: there are no images in this folder, and its subfolders are "
                             "not searched: name the folder that holds the images")
        sources += inside
    return list(dict.fromkeys(sources))         # each once, even if it is named twice

def check(args, sources):
    """Raise ValueError or OSError if an output would overwrite a named image or cannot be written,
    or if two images would have the same id in the JSON file."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: scores lie between 0 and 1")
    paths = [Path(source) for source in sources if os.path.exists(source)]
    folders = {path.parent for path in paths} | {path.resolve().parent for path in paths}
    if args.out.exists() and any(args.out.samefile(folder) for folder in folders):
        raise ValueError(f"--out {args.out}: images are read from this folder; choose another one")
    if args.json:
        if args.json.suffix.lower() != ".json" or args.json.is_dir():
            raise ValueError(f"--json {args.json}: choose a file whose name ends with .json")
        ids = {}
        for source in sources:
            other = ids.setdefault(image_id(source), source)
            if other != source:
                raise ValueError(f"--json: {other} and {source} would have the same image_id, "
                                 f"{image_id(source)}: detect in them separately")
        args.json.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.json.parent).close()        # OSError if it is read-only
    args.out.mkdir(parents=True, exist_ok=True)

def stem(source):
    return Path(source.split("?")[0] if "://" in source else source).stem

def image_id(source):
    """A number if the name is one, as COCO's are: 139 for 000000000139.jpg. Otherwise the name."""
    return int(stem(source)) if stem(source).isdecimal() else stem(source)

def drawing_names(sources):
    """A name for the drawing of each image: its own, with "_" if an earlier image has it, so that
    a/1.jpg becomes 1.jpg and b/1.jpg 1_.jpg. Upper and lower case are the same, as on Windows."""
    taken = set()
    for source in sources:
        name = os.fsencode(stem(source))[:200].decode(errors="replace")     # 255 bytes at most
        while {name.lower(), f"{name}_attention".lower()} & taken:
            name += "_"
        taken |= {name.lower(), f"{name}_attention".lower()}
        yield name

def print_table(source, image, found):
    print(f"{source}  {image.width}x{image.height}  {len(found['names'])} found")
    print("  score  label             x0     y0     x1     y1")
    for name, score, box in zip(found["names"], found["scores"].tolist(), found["boxes"].tolist()):
        print(f"   {score:.2f}  {name:14}" + "".join(f"{side:7.0f}" for side in box))

def coco_results(source, found):
    """The detections in COCO's results format; file_name and category_name are additions."""
    columns = (found[key].tolist() for key in ("labels", "boxes", "scores"))
    return [{"image_id": image_id(source), "file_name": source, "category_id": label,
             "category_name": name, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            for name, label, (x0, y0, x1, y1), score in zip(found["names"], *columns)]

def draw(image, found):
    """The image, enlarged if it is small, with a box, a name and a score for each detection."""
    scale = max(1, round(1600 / max(image.size)))
    scale = min(scale, 65000 / max(image.size))                     # the limit of JPEG
    size = [max(1, round(scale * side)) for side in image.size]
    drawing = image.resize(size, Image.Resampling.BILINEAR)         # LANCZOS takes twice the time
    drawing.info.clear()                # a GIF's comment can be longer than a JPEG's
    draw_boxes(drawing, found, scale)
    return drawing

def draw_boxes(drawing, found, scale):
    """Draw the detections on an image that is `scale` times as large as the original."""
    pen = ImageDraw.Draw(drawing)
    unit = max(1.4, max(drawing.size) / 1000)       # of lines and text, legible on small tiles
    font = ImageFont.load_default(15 * unit)
    edges = torch.tensor(drawing.size * 2) - 1
    boxes = (found["boxes"].cpu() * scale).clamp(min=0).minimum(edges).tolist()
    colors = [COLORS[label % len(COLORS)] for label in found["labels"].tolist()]
    for box, color in zip(boxes, colors):
        pen.rectangle(box, outline=color, width=round(2.2 * unit))
    for (x, y, *_), color, name, score in zip(boxes, colors, found["names"], found["scores"]):
        text = f"{name} {score:.0%}"
        width = pen.textlength(text, font) + 8 * unit
        x = max(0, min(x, drawing.width - width))
        y = max(0, y - 19 * unit)
        pen.rectangle((x, y, x + width, y + 19 * unit), fill=color)
        pen.text((x + 4 * unit, y + 9.5 * unit), text, "white", font, anchor="lm")

def attention_maps(model, image, found):
    """Where each detection's query attended, (n, H', W'): the mean over all layers and heads."""
    layers = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    mean = torch.cat([layer.attention[0] for layer in layers]).float().mean(0)      # (N, S)
    height, _ = resized_size(image.height, image.width, *model.sizes)
    rows = math.ceil(height / model.backbone[0].body.stride)
    return mean[found["queries"]].unflatten(1, (rows, -1)).cpu()

def draw_attention(image, found, maps, side=1600, gap=6):
    """A sheet with one tile for each of n > 0 detections: the image in pale grey, and coloured
    where the detection's query attended, as `maps` (n, H', W') says."""
    n = len(maps)
    ideal = min(n, max(1, (1.6 * n * image.height / image.width) ** 0.5))   # for a sheet of 16:10
    choices = [c for c in range(1, n + 1) if 1 / 1.5 <= c / ideal <= 1.5]
    columns = min(choices, key=lambda c: (-n % c, abs(math.log(c / ideal))))    # -n % c are empty
    rows = math.ceil(n / columns)
    scale = side / max(columns * image.width, rows * image.height)
    w, h = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    pale = ImageOps.grayscale(image).resize((w, h)).point(lambda value: 90 + value * 0.6)
    sheet = Image.new("RGB", (columns * (w + gap) - gap, rows * (h + gap) - gap), "white")
    for i, label in enumerate(found["labels"].tolist()):
        light = maps[i] / maps[i].max() * 255                   # (H', W')
        light = Image.fromarray(light.byte().numpy()).resize((w, h), Image.Resampling.BICUBIC)
        tile = pale.convert("RGB")
        tile.paste(COLORS[label % len(COLORS)], mask=light)
        draw_boxes(tile, {key: values[i:i + 1] for key, values in found.items()}, scale)
        sheet.paste(tile, (i % columns * (w + gap), i // columns * (h + gap)))
    return sheet

def save_drawing(path, image):
    save(path, lambda file: image.save(file, "JPEG", quality=92))
    print(f"  -> {path}")

# ---- Shared with train_voc.py --------------------------------------------------------------------
SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}

def open_image(source, upright=True):
    """Open a file or URL as an RGB image, rotated by its EXIF tag if `upright`, transparent areas
    white, an animation as its first frame. Damaged files can raise almost any exception."""
    if str(source).startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "detr-mini"})
        source = io.BytesIO(urllib.request.urlopen(request, timeout=30).read())
    with Image.open(source) as image:
        image = ImageOps.exif_transpose(image) if upright else image
        if image.mode[0] in "IF":       # white is as many bits as the brightest pixel needs, or 1.0
            grey = image.convert("F")
            top = grey.getextrema()[1]
            white = 1 if image.mode == "F" and top <= 1 else max(255, 2**int(top).bit_length() - 1)
            image = grey.point(lambda value: value * (255 / white) + 0.5).convert("L")
        if image.has_transparency_data:
            page = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(page, image.convert("RGBA"))
        return image.convert("RGB")

def save(path, write):
    """Call `write` with a temporary file, then rename it, so that `path` is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def choose_device(name):
    """The device called `name`, or the best for "auto". Raises ValueError if not available."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    if name.split(":")[0] not in ("auto", "cpu", best):
        raise ValueError(f"--device {name} is not available on this machine: use {best} or auto")
    return torch.device(best if name == "auto" else name)

def choose_dtype(device):
    """The type for autocast: bfloat16 if the device has it, float16 on older GPUs, or float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    cpu = getattr(torch.cpu, "get_capabilities", dict)()            # torch 2.6 cannot tell
    return torch.bfloat16 if device.type == "cpu" and cpu.get("avx512_bf16") else torch.float32

# ---- The command line ----------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER|URL", help="default: the bundled photographs")
    add("--weights", metavar="NAME|FILE", help=f"demo, {', '.join(ZOO)}, or a checkpoint file "
        "(default: detr_resnet50; demo if no image is named)")
    add("--threshold", type=float, default=0.7, metavar="P",
        help="keep detections with a higher score (default: 0.7)")
    add("--out", type=Path, default="detections", metavar="DIR",
        help="folder for the drawings (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the detections in COCO's results "
        "format (to compute AP from them, use --threshold 0)")
    add("--attention", action="store_true", help="also draw where each detection's query attends")
    add("--device", default="auto", help="cuda, mps, cpu, or auto for the best (default)")
    args = parser.parse_args(argv)
    args.weights = args.weights or ("detr_resnet50" if args.images else "demo")
    args.images = args.images or sorted(map(str, Path(__file__).parent.glob("*assets/Blood*.jpg")))
    warnings.filterwarnings("ignore", module="PIL|torch")
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")     # for any file's name
    try:
        return 2 if run(args) else 0
    except (OSError, ValueError, RuntimeError, AssertionError) as error:    # the last is CUDA's
        print("infer.py: error:", *str(error).split(), file=sys.stderr)
    except KeyboardInterrupt:
        print("infer.py: stopped; the drawings saved so far are complete", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
