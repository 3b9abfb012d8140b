"""Find the objects in images with DETR; print a table, and save each image with its boxes.

    python infer.py                                  # bundled images of blood, bundled detector
    python infer.py cats.jpg holidays/               # COCO's 80 everyday objects (fetches 160 MB)
    python infer.py https://example.org/street.jpg --weights detr_resnet101 --attention
    python infer.py photo.jpg --weights outputs/best.pth --threshold 0.5 --json found.json
"""
import argparse
import io
import json
import math
import os
import sys
import urllib.request
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from detr_mini import ZOO, detect, fit, load_detr

SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
COLORS = ["#ff8c00", "#1f77ff", "#00a651", "#e6194b", "#911eb4", "#00b8d4", "#f032e6", "#808000"]
warnings.filterwarnings("ignore", module="PIL|torch")

def open_image(source, upright=True):
    """A file or URL as an RGB image: rotated by its EXIF if `upright`, transparent pixels white,
    the first frame of an animation. A damaged file makes Pillow raise nearly any exception."""
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

def draw(image, found):
    """The image, enlarged if it is small, with a box, a name and a score for each object."""
    scale = max(1, round(1600 / max(image.size)))
    drawing = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(drawing)
    unit = max(drawing.size) / 1000
    font = ImageFont.load_default(max(10, 15 * unit))
    edges = torch.tensor(drawing.size * 2) - 1
    boxes = (found["boxes"].cpu() * scale).clamp(min=0).minimum(edges).tolist()
    for box, label in zip(boxes, found["labels"]):
        pen.rectangle(box, outline=COLORS[label % len(COLORS)], width=max(2, round(2.2 * unit)))
    for box, label, name, score in zip(boxes, found["labels"], found["names"], found["scores"]):
        text = f"{name} {score:.0%}"
        width = pen.textlength(text, font) + 8 * unit
        x = max(0, min(box[0], drawing.width - width))
        y = max(0, box[1] - 19 * unit)
        pen.rectangle((x, y, x + width, y + 19 * unit), fill=COLORS[label % len(COLORS)])
        pen.text((x + 4 * unit, y + 9.5 * unit), text, "white", font, anchor="lm")
    return drawing

def draw_attention(image, found, attention, side=1600):
    """The image once for each of n > 0 detections, coloured by the query's attention (n, H', W')"""
    n = len(attention)
    columns = min(n, math.ceil((n * image.height / image.width) ** 0.5))    # about a square sheet
    rows = math.ceil(n / columns)
    scale = side / max(columns * image.width, rows * image.height)
    w, h = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    dark = ImageOps.grayscale(image).resize((w, h)).point(lambda value: value * 0.45)
    sheet = Image.new("RGB", (columns * w, rows * h), "white")
    for i, (label, box) in enumerate(zip(found["labels"].tolist(), found["boxes"].cpu() * scale)):
        light = (attention[i] / attention[i].max()).sqrt() * 255    # (H', W')
        light = Image.fromarray(light.byte().numpy()).resize((w, h), Image.Resampling.BICUBIC)
        tile = dark.convert("RGB")
        tile.paste(COLORS[label % len(COLORS)], mask=light)
        ImageDraw.Draw(tile).rectangle(box.tolist(), outline="white", width=1 + max(w, h) // 200)
        sheet.paste(tile, (i % columns * w, i // columns * h))
    return sheet

def save(path, write):
    """`write` a binary file under a temporary name, then rename it: `path` is never incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def choose_device(name):
    """The best device for "auto", else the one named; ValueError if it is not available."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    best = "cuda" if torch.cuda.is_available() else best
    if name.split(":")[0] not in ("auto", "cpu", best):
        raise ValueError(f"--device {name}: not available here; use {best} or auto")
    return torch.device(best if name == "auto" else name)

def choose_dtype(device):
    """The type of AMP: bfloat16 if the hardware has it, float16 on older GPUs, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    cpu = getattr(torch.cpu, "get_capabilities", dict)()            # torch 2.6 cannot tell
    return torch.bfloat16 if device.type == "cpu" and cpu.get("avx512_bf16") else torch.float32

def run(args):
    """Detect in each image, print, draw and save; returns how many images were skipped."""
    if not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: a score is from 0 to 1")
    sources = []
    for name in args.images or sorted(map(str, Path(__file__).parent.glob("*assets/*.jpg"))):
        inside = sorted(Path(name).glob("[!.]*")) if os.path.isdir(name) else []
        sources += [str(path) for path in inside if path.suffix.lower() in SUFFIXES] or [name]
    given = {os.path.realpath(source).lower() for source in sources}    # a.PNG may also be a.png
    if args.json and os.path.realpath(args.json).lower() in given:
        raise ValueError(f"--json {args.json}: is one of the images; name another file")
    device = choose_device(args.device)
    dtype = choose_dtype(device)
    model = load_detr(args.weights or ("detr_resnet50" if args.images else "demo"), device=device)
    attentions = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    for layer in attentions:
        layer.keep_weights = args.attention
    results, stems, skipped = [], set(), 0
    for source in sources:
        stem = Path(source.split("?")[0] if "://" in source else source).stem[:200]
        while stem.lower() in stems:
            stem += "_"
        stems |= {stem.lower(), f"{stem}_attention".lower()}
        drawing, sheet = args.out / f"{stem}.png", args.out / f"{stem}_attention.png"
        try:
            if given & {os.path.realpath(path).lower() for path in (drawing, sheet)}:
                raise ValueError("its drawing would replace one of the images; name another --out")
            image = open_image(source)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                [found] = detect(model, image, args.threshold)
        except Exception as error:
            print("infer.py: error:", *f"{source}: skipped: {error}".split(), file=sys.stderr)
            skipped += 1
            continue
        print(f"{source}  {image.width}x{image.height}  {len(found['names'])} found")
        print("  score  label             x0     y0     x1     y1")
        numbers = [found[key].tolist() for key in ("scores", "labels", "boxes")]
        for name, score, label, (x0, y0, x1, y1) in zip(found["names"], *numbers):
            print(f"   {score:.2f}  {name:14}{x0:7.0f}{y0:7.0f}{x1:7.0f}{y1:7.0f}")
            results.append({
                "image_id": int(stem) if stem.isdecimal() else stem, "file_name": source,
                "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
        save(drawing, lambda file: draw(image, found).save(file, "PNG", compress_level=4))
        print(f"  -> {drawing}")
        if args.attention and found["names"]:
            height, _ = fit(image.height, image.width, *model.sizes)
            rows = math.ceil(height / model.backbone[0].body.stride)
            mean = torch.cat([layer.weights[0] for layer in attentions]).float().mean(0)    # (N, S)
            mean = mean[found["queries"]].unflatten(1, (rows, -1)).cpu()        # (n, H', W')
            save(sheet, lambda file: draw_attention(image, found, mean).save(file, "PNG"))
            print(f"  -> {sheet}")
    if args.json:
        save(args.json, lambda file: file.write(json.dumps(results).encode()))
        print(f"{len(results)} detections -> {args.json}")
    return skipped

def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="infer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER|URL", help="default: the bundled images")
    add("--weights", metavar="NAME|FILE", help=f"demo, {', '.join(ZOO)}, or a file "
        "(default: detr_resnet50; demo if no image is named)")
    add("--threshold", type=float, default=0.7, metavar="P", help="lowest score (default: 0.7)")
    add("--out", type=Path, default="detections", metavar="DIR", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write all detections in COCO's results format "
        "(COCO's evaluation wants them with --threshold 0)")
    add("--attention", action="store_true", help="also draw where each detection's query attends")
    add("--device", default="auto", help="cuda, mps, cpu or auto (default)")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")     # for any file's name
    try:
        return 2 if run(args) else 0
    except (OSError, ValueError, RuntimeError, AssertionError) as error:    # the last is CUDA's
        print("infer.py: error:", *str(error).split(), file=sys.stderr)
    except KeyboardInterrupt:
        print("infer.py: stopped; the images written so far are complete", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
