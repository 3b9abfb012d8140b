"""The tests. Numbers are compared with code nobody here wrote: transformers, torchvision, torch.nn,
pycocotools. `pytest -m bench -s` runs the benchmark, which `pytest` alone leaves out."""
import functools
import hashlib
import http.server
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

import detr_mini
import infer
import train_voc
from detr_mini import (DETR, ZOO, FrozenBatchNorm2d, HungarianMatcher, MultiheadAttention, ResNet,
                       SetCriterion, box_cxcywh_to_xyxy, box_iou, detect, fit, load_detr,
                       generalized_box_iou, pad_images, post_process, read_checkpoint)

HERE = pathlib.Path(__file__).parent

# ---- Helpers: models and numbers -----------------------------------------------------------------
def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=atol, atol=atol, check_dtype=False)

def small(num_classes=3, norm=FrozenBatchNorm2d, nheads=4, dropout=0.0):
    """A detector that a test can afford, always with the same weights."""
    torch.manual_seed(0)
    model = DETR(num_classes, ResNet(detr_mini.BasicBlock, (1, 1, 1), width=8, norm=norm),
                 hidden_dim=32, nheads=nheads, enc_layers=1, dec_layers=2, dim_feedforward=48,
                 num_queries=9, dropout=dropout)
    model.sizes, model.canvas = (48, 72, 16), (64, 96)
    return model

def randomize(model):
    """Random norms and biases: with the initial ones and zeros, much could be wrong unseen."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            noise = torch.rand if name.endswith("var") else torch.randn
            tensor += noise(len(tensor)) / 9
    return model.eval()

def random_boxes(n):
    return torch.cat((torch.rand(n, 2) * 0.5 + 0.2, torch.rand(n, 2) * 0.3 + 0.01), 1)

def random_targets(objects, classes):
    """Targets of images with so many objects each, for the criterion here and transformers'."""
    torch.manual_seed(1)
    labels = [torch.randint(0, classes, (m,)) for m in objects]
    return [{"labels": k, "class_labels": k, "boxes": random_boxes(len(k))} for k in labels]

def random_outputs(images, queries, classes, seed=0):
    torch.manual_seed(seed)
    logits, boxes = 2 * torch.randn(images, queries, classes + 1), random_boxes(images * queries)
    return {"pred_logits": logits, "logits": logits, "pred_boxes": boxes.view(images, queries, 4)}

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

RENAMED = [                     # from here to transformers
    ("backbone.0.body.", "model.backbone.model."), ("transformer", "model"), ("linear", "mlp.fc"),
    (r"(coder\.l.*)norm1", r"\1self_attn_layer_norm"), ("decoder.norm", "decoder.layernorm"),
    (r"(encoder.*)norm2|(decoder.*)norm3", r"\1\2final_layer_norm"), ("out_proj", "o_proj"),
    (r"(decoder\.l.*)norm2", r"\1encoder_attn_layer_norm"), ("multihead_attn", "encoder_attn"),
    ("query_embed", "model.query_position_embeddings"), ("input_proj", "model.input_projection"),
    ("class_embed", "class_labels_classifier"), ("bbox_embed", "bbox_predictor")]

def in_transformers(model):
    """The same detector, with the same weights, in transformers."""
    transformers = pytest.importorskip("transformers")
    dc5 = {"output_stride": 16} if model.backbone[0].body.dilation else {}
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet50", use_pretrained_backbone=False, out_indices=[4], **dc5)
    (encoder, decoder), weights = model.transformer.children(), {}
    peer = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone, num_labels=len(model.classes), encoder_layers=len(encoder.layers),
        decoder_layers=len(decoder.layers), num_queries=model.query_embed.num_embeddings,
        attention_dropout=0.1, activation_dropout=0.1))
    for name, tensor in model.state_dict().items():
        for ours, theirs in RENAMED:
            name = re.sub(ours, theirs, name)
        for letter, part in zip("qkv", tensor.chunk(3) if "in_proj_" in name else [tensor]):
            weights[name.replace("in_proj_", f"{letter}_proj.")] = part
    peer.load_state_dict(weights)
    return peer.eval()

# ---- Helpers: files, runs, network ---------------------------------------------------------------
STEMS = [f"{i:04}" for i in range(10)]

def put(path, content, **options):
    """Write an image, text, bytes or a checkpoint, and the folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (str, bytes)):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        torch.save(content, path)
    return path

def scene(i, size=(96, 64)):
    """A dark image with a bright square, a cat or a dog, and its objects in VOC's pixels."""
    side, x, y = 16 + 5 * i % 14, 1 + 17 * i % 33, 1 + 23 * i % 31
    image, name = Image.new("RGB", size, (20, 20, 30)), ("cat", "dog")[i % 2]
    image.paste({"cat": (230, 60, 50), "dog": (60, 230, 80)}[name], (x, y, x + side, y + side))
    return image, [(name, (x + 1, y + 1, x + side, y + side))]

def bright(image):
    """The edges x0, y0, x1, y1 of the bright square in an image (3, h, w)."""
    y, x = (image.max(0).values > 110).nonzero().T
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()

def xml(objects, filename="", size=(96, 64)):
    """An annotation of (class, box) or (class, box, 1), which is difficult."""
    body = "".join(f"<object><name>{name}</name><difficult>{len(difficult)}</difficult><bndbox>"
        + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box))
        + "</bndbox></object>" for name, box, *difficult in objects)
    return (f"<annotation><filename>{filename}</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{body}</annotation>")

def voc(data, stems, images="JPEGImages/{}.jpg", xmls="Annotations/{}.xml", **sets):
    """A scene for each stem, in VOC's layout or another, and the lists of some sets."""
    for i, stem in enumerate(stems):
        (image, objects), path = scene(i), data / images.format(stem)
        put(path, image)
        put(data / xmls.format(stem), xml(objects, path.name))
    for name, listed in sets.items():
        put(data / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in listed))

@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"

@pytest.fixture
def folder(data):
    """Ten images, eight to train on; one has a difficult object too, and one has none."""
    voc(data, STEMS, train=STEMS[:8], val=STEMS[8:])
    put(data / "Annotations/0001.xml", xml(scene(1)[1] + [("dog", (1, 1, 20, 20), 1)]))
    put(data / "Annotations/0009.xml", xml([]))
    return data

def quick_list(epoch, epochs):
    return [v2.RandomHorizontalFlip(), v2.RandomShortestSize((40, 48), max_size=72)]

def shrink(patch=setattr, norm=nn.BatchNorm2d, dropout=0.2):
    """Make train_voc's `tiny` a recipe that a test can afford."""
    patch(train_voc, "tiny", lambda num_classes: small(num_classes, norm, dropout=dropout))
    patch(train_voc, "TINY", train_voc.TINY | dict(
        epochs=4, batch_size=4, evaluate_every=1, eos_coef=lambda *_: 0.1,
        rate=lambda step, steps: 1 - step / steps / 2))
    patch(train_voc, "from_scratch", quick_list)
    patch(train_voc, "draw_curves", lambda history: train_voc.Figure((1, 1)))

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs train_voc.py, by default for one epoch of a short `tiny`. It returns the
    two data sets, the paths of the images of each, and what was printed."""
    shrink(monkeypatch.setattr)
    made, original = [], train_voc.VOC
    monkeypatch.setattr(train_voc, "VOC", lambda *args: made.append(original(*args)) or made[-1])
    def start(data, *arguments, code=0, output="out"):
        made.clear()
        capsys.readouterr()
        defaults = ("--data", data, "--output", tmp_path / output, "--model", "tiny",
                    "--epochs", 1, "--workers", 0, "--device", "cpu")
        result = train_voc.main(list(map(str, defaults + arguments)))
        out, err = capsys.readouterr()
        assert result == code and err.count("\n") == (code == 2), err
        images = {"train" if part.augment else "val":
                  {r["path"].relative_to(data).as_posix() for r in part.records} for part in made}
        return Namespace(out=out, err=err, sets=list(made), **images)
    return start

def log_of(output):
    """The log's entries, without speed and memory."""
    entries = map(json.loads, (output / "log.txt").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k not in ("images_per_s", "peak_memory_gib")}
            for entry in entries]

CONFIG = {"nheads": 4, "size": 48, "max_size": 72, "multiple": 16, "canvas": (64, 96)}   # small's

@pytest.fixture
def weights(tmp_path):
    """The file of a small detector of cats, dogs and cows."""
    return put(tmp_path / "weights.pth", {"model": randomize(small()).state_dict(),
                                          "classes": ["cat", "dog", "cow"], "config": CONFIG})

@pytest.fixture
def server(tmp_path):
    """The network, as far as these tests go: a folder that this machine serves, and its URL."""
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()

# ---- Boxes, backbone, attention ------------------------------------------------------------------
def test_boxes_equal_torchvision(double):
    ops, a, b = torchvision.ops, random_boxes(50), random_boxes(70)
    close(box_cxcywh_to_xyxy(a), ops.box_convert(a, "cxcywh", "xyxy"), 1e-12)
    close(detr_mini.box_xyxy_to_cxcywh(a), ops.box_convert(a, "xyxy", "cxcywh"), 1e-12)
    a, b = box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b)
    close(box_iou(a, b), ops.box_iou(a, b), 1e-10)
    close(generalized_box_iou(a, b), ops.generalized_box_iou(a, b), 1e-10)
    leaves = a[:6].requires_grad_(), b[:5].requires_grad_()
    assert torch.autograd.gradcheck(generalized_box_iou, leaves)        # by finite differences

def test_backbone_equals_torchvision(double):
    """ResNet-18, its norm trained and frozen; ResNet-50 is in the whole detector below."""
    peer = randomize(torchvision.models.resnet18())
    state = {name: value for name, value in peer.state_dict().items() if "fc." not in name}
    stages, x = nn.Sequential(*list(peer.children())[:-2]), torch.randn(4, 3, 65, 97)
    frozen, trained = (ResNet(*detr_mini.RESNETS["resnet18"], norm=norm)
                       for norm in (FrozenBatchNorm2d, nn.BatchNorm2d))
    for ours in (trained, frozen):
        ours.load_state_dict(state)
        close(ours.eval()(x), stages.eval()(x), 1e-8)
    close(trained.train()(x), stages.train()(x), 1e-8)
    still = {name.split(".")[0] for name, p in frozen.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "layer1"}
    with torch.device("meta"):
        models = DETR(), DETR(dilation=True), DETR(backbone="resnet101")
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts == [41_524_768, 41_524_768, 60_464_672]           # of the published detectors

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep_weights", [False, True])
def test_attention_equals_torch_and_its_gradients_finite_differences(double, masked, keep_weights):
    peer, ours = nn.MultiheadAttention(8, 2, batch_first=True), MultiheadAttention(8, 2, 0.5).eval()
    ours.load_state_dict(randomize(peer).state_dict())
    ours.keep_weights = keep_weights
    q, k, v = (torch.randn(2, n, 8, requires_grad=True) for n in (3, 7, 7))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = masked
    attend = ~padding[:, None, None] if masked else None
    expected, weights = peer(q, k, v, key_padding_mask=padding, average_attn_weights=False)
    close(ours(q, k, v, attend), expected, 1e-10)
    assert torch.autograd.gradcheck(lambda *qkv: ours(*qkv, attend), (q, k, v))
    if keep_weights:
        close(ours.weights, weights, 1e-10)
    else:
        assert not torch.equal(ours.train()(q, k, v), ours(q, k, v))        # dropout

# ---- The whole detector, positions included ------------------------------------------------------
@pytest.fixture(scope="module", params=[False, True], ids=["R50", "R50-DC5"])
def pair(request):
    torch.manual_seed(0)
    model = DETR(7, dilation=request.param, enc_layers=2, dec_layers=3, aux_loss=True)
    return randomize(model), in_transformers(model)

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("sizes", [[(97, 130)], [(96, 144), (112, 96), (90, 90)]])
def test_detector_equals_transformers(pair, sizes, dtype, atol):
    model, peer = (network.to(dtype) for network in pair)
    torch.manual_seed(1)
    given = [torch.randn(3, *size, dtype=dtype) for size in sizes]
    images, mask = pad_images(given)
    with torch.no_grad():
        ours = model(given)
        theirs = peer(images, pixel_mask=None if mask is None else (~mask).long(),
                      output_hidden_states=True)
        # Its own auxiliary_loss feeds the normed state to the next layer, as the reference does
        # not: the earlier predictions are read off the states of its plain forward pass.
        states = map(peer.model.decoder.layernorm, theirs.decoder_hidden_states[1:-1])
        layers = [{"logits": peer.class_labels_classifier(state),
                   "pred_boxes": peer.bbox_predictor(state).sigmoid()} for state in states]
    layers.append({"logits": theirs.logits, "pred_boxes": theirs.pred_boxes})
    for layer, expected in zip([*ours["aux_outputs"], ours], layers, strict=True):
        close(layer["pred_logits"], expected["logits"], atol)
        close(layer["pred_boxes"], expected["pred_boxes"], atol)
    assert ours["pred_boxes"].dtype == dtype

@pytest.mark.xfail(torch.__version__.startswith("2.6."), reason="its export guards on odd sizes")
def test_compile_without_a_break_and_export_for_any_size_give_the_same():
    model, dim, x = randomize(small()), torch.export.Dim, torch.randn(1, 3, 96, 128)
    sides = {2: dim("height", min=32, max=1333), 3: dim("width", min=32, max=1333)}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    padded, other = pad_images([x[0], x[0, :, 30:]]), torch.randn(1, 3, 70, 201)
    with torch.no_grad():
        close(compiled(*padded)["pred_boxes"], model(*padded)["pred_boxes"], 1e-5)
        exported = torch.export.export(model, (x,), dynamic_shapes={"images": sides}).module()
        close(exported(other)["pred_logits"], model(other)["pred_logits"], 1e-5)
        last, model.aux_loss = model(other), True       # without it, the last layer alone
        close(last["pred_boxes"], model(other)["pred_boxes"], 1e-6)

# ---- Matching and loss ---------------------------------------------------------------------------
@pytest.mark.parametrize("objects", [[3, 5, 1], [0, 4, 0], [0, 0, 0], [12, 30, 2]])
@pytest.mark.parametrize("earlier_layers", [0, 3])
def test_matching_losses_and_gradients_equal_transformers(double, objects, earlier_layers):
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    matcher = module.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    peer_criterion = module.ImageLoss(matcher, 6, 0.1, ["labels", "boxes", "cardinality"])
    criterion, targets = SetCriterion(6, HungarianMatcher()), random_targets(objects, 6)
    *earlier, last = [random_outputs(3, 12, 6, seed) for seed in range(earlier_layers + 1)]
    leaves = [one[k].requires_grad_() for one in (*earlier, last) for k in ("logits", "pred_boxes")]
    matches = HungarianMatcher()(last, targets)
    for ours, theirs in zip(matches, matcher(last, targets), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    losses = criterion(last | ({"aux_outputs": earlier} if earlier else {}), targets)
    expected = peer_criterion(last | {"auxiliary_outputs": earlier}, targets)
    for name, value in expected.items():
        close(losses[name], torch.as_tensor(value), 1e-8)
    right = torch.cat([last["logits"][b, q].argmax(-1) == targets[b]["labels"][t]
                       for b, (q, t) in enumerate(matches)]).double()
    close(losses["class_error"], 100 - 100 * right.mean().nan_to_num(0), 1e-5)
    total = sum(weight * value for name, value in expected.items() for loss, weight in
                (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)) if name.startswith(loss))
    gradients = torch.autograd.grad(criterion.total(losses), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        close(ours, theirs, 1e-8)
    def loss(logits, boxes):
        return criterion.total(criterion({"pred_logits": logits, "pred_boxes": boxes}, targets))
    assert earlier or torch.autograd.gradcheck(loss, tuple(leaves))     # by finite differences

def test_a_label_out_of_range_is_refused():
    first, second = random_targets([3, 4], 6)
    for label in (6, -1):
        wrong = [first, second | {"labels": torch.tensor([0, 1, label, 2])}]
        with pytest.raises(ValueError, match=f"image 1 .*label {label} .*0 to 5"):
            HungarianMatcher()(random_outputs(2, 12, 6), wrong)

def test_the_mean_over_processes_of_box_losses_is_the_whole_batchs(monkeypatch):
    criterion = SetCriterion(6, HungarianMatcher())
    outputs, targets = random_outputs(4, 12, 6), random_targets([1, 2, 9, 0], 6)
    whole, dist = criterion(outputs, targets), torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda number: number.fill_(1 + 2 + 9))
    one, two = (criterion({name: value[half] for name, value in outputs.items()}, targets[half])
                for half in (slice(0, 2), slice(2, 4)))
    for name in ("loss_bbox", "loss_giou"):
        close(one[name] + two[name], 2 * whole[name], 1e-5)

# ---- Use -----------------------------------------------------------------------------------------
def test_post_process_equals_transformers():
    module = pytest.importorskip("transformers.models.detr.image_processing_detr")
    outputs, sizes = random_outputs(2, 12, 6), torch.tensor([[480, 640], [333, 500]])
    close(post_process(outputs, sizes), module.DetrImageProcessor().post_process_object_detection(
        Namespace(**outputs), threshold=0.0, target_sizes=sizes))

def test_fit_is_the_references_arithmetic():
    """That of get_size_with_aspect_ratio in facebookresearch/detr, datasets/transforms.py."""
    sides = [*range(30, 700, 37), 480, 640, 800, 1333, 1500, 4000]
    for h, w, (size, limit) in itertools.product(sides, sides, ((800, 1333), (192, 341))):
        short, long = min(h, w), max(h, w)
        best = int(round(limit * short / long)) if long / short * size > limit else size
        other = int(best * long / short)
        assert fit(h, w, size, limit) == ((other, best) if w < h else (best, other)), (h, w)
    assert fit(100, 500, 800, 1333) == (267, 1335) and fit(1, 5000, 800, 1333)[0] == 1

def test_detect_takes_images_and_tensors_and_sorts():
    model = randomize(small())
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    image, tensor = Image.fromarray(noise), torch.from_numpy(noise).permute(2, 0, 1)
    [one], [two] = detect(model, image, 0.0), detect(model, [tensor / 255], threshold=0.0)
    assert sorted(one["queries"].tolist()) == list(range(9)) and len(one["names"]) == 9
    assert (one["scores"].diff() <= 0).all() and detect(model, image, 1.0)[0]["names"] == []
    close(one["scores"], two["scores"], 1e-2)
    resized = v2.functional.resize(tensor / 255, (32, 64))          # multiples of 16
    normal = v2.functional.normalize(resized, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        [expected] = post_process(model([normal]), [(50, 90)])
    close(two["boxes"], expected["boxes"][two["queries"]], 1e-3)
    for wrong in ("cats.jpg", noise, *(Image.new(k, (9, 9)) for k in ("I;16", "F", "RGBA", "LA"))):
        with pytest.raises(TypeError, match="open_image"):
            detect(model, wrong)

ARGS = Namespace(nheads=4, lr=1e-4, output_dir=pathlib.PosixPath("out"))

@pytest.mark.parametrize("prefix, wrap", [
    ("", lambda state: {"model": state, "config": {"nheads": 4}, "epoch": 3}),
    ("", lambda state: {"model": state, "args": ARGS, "epoch": 3}),
    ("module.", lambda state: {"model": state, "args": ARGS}),
    ("model.", lambda state: {"state_dict": state, "hyper_parameters": {"nheads": 4}}),
    ("", lambda state: {"model_state_dict": state, "args": {"nheads": 4}}),
    ("", lambda state: state)], ids=["ours", "reference", "DDP", "Lightning", "tutorials", "bare"])
def test_checkpoints_of_other_programs_load(tmp_path, prefix, wrap):
    nheads = 4 if wrap({}) else 8           # if nobody says
    model, x = randomize(small(22, nheads=nheads)), torch.randn(1, 3, 64, 64)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    loaded = load_detr(put(tmp_path / "a.pth", wrap(state)))
    with torch.no_grad():
        close(loaded(x)["pred_boxes"], model(x)["pred_boxes"], 1e-6)
    assert not loaded.training and len(loaded.classes) == 22 and loaded.sizes == (800, 1333, 1)

def test_a_checkpoint_brings_names_and_sizes_or_gets_a_new_head(weights):
    model, new = load_detr(weights), load_detr(weights, num_classes=20)
    assert model.sizes == (48, 72, 16) and model.canvas == (64, 96)
    assert model.classes == load_detr(weights, num_classes=3).classes == ["cat", "dog", "cow"]
    assert new.class_embed.weight.shape == (21, 32) and len(new.classes) == 20
    assert torch.equal(new.input_proj.weight, model.input_proj.weight)

@pytest.mark.parametrize("name, shape", [
    ("class_embed.bias", None), ("transformer.encoder.layers.0.norm1.bias", None),
    ("neck.weight", (1,)), ("query_embed.weight", (9, 33))])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, name, shape):
    state = small().state_dict()
    state.update({name: torch.zeros(shape)}) if shape else state.pop(name)
    path = put(tmp_path / "a.pth", {"model": state, "config": CONFIG})
    with pytest.raises(ValueError, match=f"a.pth.*{re.escape(name)}"):
        load_detr(path)

def test_what_is_no_checkpoint_is_refused_and_code_is_not_run(tmp_path, weights, monkeypatch):
    bad, marker = tmp_path / "bad.pth", tmp_path / "it_ran"
    code = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()        # a pickle that calls os.system
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    files = {bad: bad, "detr_resnet50": tmp_path / "checkpoints" / ZOO["detr_resnet50"]}
    contents = weights.read_bytes()[:3000], b"", b"\xff\xd8\xff", code
    for content, (source, file) in itertools.product(contents, files.items()):
        put(file, content)
        with pytest.raises(ValueError, match=f"{file.name} is no"):
            load_detr(source)
    assert not marker.exists()
    with pytest.raises(ValueError, match="bad.pth .*never run"):
        load_detr(put(bad, small()))
    with pytest.raises(ValueError, match="bad.pth .*input_proj"):
        load_detr(put(bad, torchvision.models.resnet18().state_dict()))
    with pytest.raises(FileNotFoundError, match="nowhere.pth.*detr_resnet50"):
        load_detr(tmp_path / "nowhere.pth")

# ---- train_voc: which files are a set, and which image belongs to an annotation ------------------
@pytest.mark.parametrize("images, xmls, decoy", [
    ("images/{}.jpg", "annotations/xmls/{}.xml", "annotations/trimaps/{}.png"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "thumbs/{}.jpg"),
    ("images/{}.jpg", "labels/{}.xml", "labels/drawn/{}.jpg"), ("{}.png", "{}.xml", "{}.tif"),
    ("JPEGImages/{}.jfif", "Annotations/{}.XML", "JPEGImages/._{}.jfif"),
    ("JPEGImages/{}.jpg", "Annotations/{}.jpg.xml", "__MACOSX/JPEGImages/{}.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", ".idea/{}.xml"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "{}/annotations.xml")])
def test_files_that_are_not_meant_are_not_taken(data, run, images, xmls, decoy):
    """Masks, thumbnails, results, hidden files, other programs' XML: none of them can be read."""
    voc(data, STEMS, images, xmls)
    for stem in STEMS:
        put(data / decoy.format(stem), "<annotations><image/></annotations>")
    done = run(data)
    assert done.out.startswith("train: 8 images, 8 objects\nval: 2 images, 2 objects\n")
    assert done.train | done.val == {images.format(stem) for stem in STEMS}

@pytest.mark.parametrize("images, xmls, val", [
    ("{0}/images/{{}}.jpg", "{0}/labels/{{}}.xml", "val"),
    ("{0}/{{}}_jpg.rf.0a1b.jpg", "{0}/{{}}_jpg.rf.0a1b.xml", "valid"),
    ("images/{0}/{0}{{}}.jpg", "annotations/{0}/xml/{0}{{}}.xml", "Valid")])
def test_folders_are_sets_and_may_hold_equal_names(data, run, images, xmls, val):
    expected = []
    for part, count in (("train", 6), (val, 3), ("test", 2)):
        voc(data, STEMS[:count], images.format(part), xmls.format(part))
        expected.append({images.format(part).format(stem) for stem in STEMS[:count]})
    done = run(data)
    assert [done.train, done.val, run(data, "--val", "test").val] == expected

def test_a_devkit_of_one_year_and_of_two(data, run):
    sets = dict(train=STEMS[:4], val=STEMS[4:6], trainval=STEMS[:6], test=STEMS[6:])
    voc(data / "VOC2007", STEMS, **sets)
    done = run(data, "--val", "test")
    assert (len(done.train), len(done.val), len(run(data).val)) == (4, 4, 2)
    voc(data / "VOC2012", STEMS[:8], train=STEMS[:5], val=STEMS[5:8])       # the same names
    done = run(data)
    assert done.train | done.val == {f"VOC2012/JPEGImages/{stem}.jpg" for stem in STEMS[:8]}
    done = run(data, "--train", "2007_trainval", "2012_train", "--val", "2007_test")
    assert (len(done.train), len(done.val)) == (6 + 5, 4)

@pytest.mark.parametrize("sets", [{"default": STEMS}, {"trainval": STEMS, "test": ["a", "b"]}])
def test_without_train_and_val_what_is_listed_is_split(data, run, sets):
    voc(data, [*STEMS, "a", "b"], **sets)
    done = run(data)
    assert (len(done.train), len(done.val)) == (8, 2)
    assert done.train | done.val == {f"JPEGImages/{stem}.jpg" for stem in STEMS}
    assert run(data).val == done.val != run(data, "--seed", 1).val

@pytest.mark.parametrize("written", [
    "\ufeffa b\r\nc\r\n", "a b.jpg\nc.JPG\n", "a b.xml\n\n  c  \n\n", "a b  1\nc -1",
    "JPEGImages/a b.jpg\nC:\\VOC\\JPEGImages\\c.jpg\n", "a b 0\nc  1\nc 1\n"])
def test_a_list_as_programs_write_it(data, run, written):
    voc(data, ["a b", "a b 2", "c", "d 1"], val=["d 1"])
    put(data / "ImageSets/Main/train.txt", written)
    done = run(data)
    assert done.train == {"JPEGImages/a b.jpg", "JPEGImages/c.jpg"}
    assert done.val == {"JPEGImages/d 1.jpg"}

def test_links_default_batches_and_evaluation_of_all(data, tmp_path, run, weights, monkeypatch):
    """Eight images, behind links of which one leads in a circle, are enough for a batch of 16."""
    monkeypatch.setitem(train_voc.TINY, "batch_size", 16)
    voc(tmp_path / "disk", STEMS[:8])
    data.mkdir()
    for name, target in zip("abc", ("disk/JPEGImages", "disk/Annotations", "data")):
        (data / name).symlink_to(tmp_path / target)
    out = run(data).out
    assert "train: 6 images" in out and "val: 2 images" in out and "epoch 1/1" in out
    out = run(data, "--model", weights, "--eval").out
    assert "val: 8 images, 8 objects" in out and "train:" not in out

# ---- train_voc: what is checked before the first step, and how an image is read ------------------
XML, JPEG = "Annotations/0003.xml", "JPEGImages/0003.jpg"

@pytest.mark.parametrize("spoil, message", [
    (lambda d: put(d / XML, "<annotation><object>"), XML), (lambda d: put(d / XML, "<a/>"), "0003"),
    (lambda d: put(d / XML, xml([("cat", (1, 2, 3))])), f"{XML}.*bndbox"),
    (lambda d: put(d / XML, xml([("cat", (0.1, 0.2, 0.5, 1))])), f"{XML}.* 0 to 1.*pixels"),
    (lambda d: (d / XML).unlink(), "train.txt.*'0003'"),
    (lambda d: (d / JPEG).unlink(), f"{XML}: no image"),
    (lambda d: put(d / JPEG, (d / JPEG).read_bytes()[:800]), f"{JPEG}: not a readable image"),
    (lambda d: (d / "JPEGImages").rename(d / "a") and put(d / "b/0003.jpg", "a copy"),
     f"{XML}: .*a/0003.jpg.* .*b/0003.jpg"),
    (lambda d: put(d / "ImageSets/Main/val.txt", ""), "val is empty"),
    (lambda d: (d / "ImageSets/Main/val.txt").unlink(), "no set 'val' .*train"),
    (lambda d: [put(d / f"Annotations/{stem}.xml", xml([("cat", (5, 5, 20, 20), 1)]))
                for stem in STEMS], "nothing to train on.*8 marked difficult")])
def test_bad_data_is_named_before_the_first_step(data, run, tmp_path, spoil, message):
    voc(data, STEMS, train=STEMS[:8], val=STEMS[8:])
    spoil(data)
    done = run(data, code=2)
    assert re.search(message, done.err), done.err
    assert "epoch" not in done.out and not (tmp_path / "out").exists()

def test_what_is_odd_is_counted_and_classes_are_those_of_all_sets_or_those_named(data, run):
    voc(data, STEMS, train=STEMS[:8], val=STEMS[8:])
    put(data / "Annotations/0001.xml", xml([("dog", (-5, 3.5, 200, 40.25)), ("cat", (9, 9, 5, 5))]))
    put(data / "Annotations/0002.xml", xml(scene(2)[1], size=(640, 480)))
    put(data / "Annotations/0003.xml", xml([("dog", (5, 5, 9, 9))] * 12))
    put(data / "Annotations/0008.xml", xml([("wolf", (5, 5, 40, 40))]))
    put(data / "JPEGImages/alone.jpg", scene(0)[0])
    done = run(data)
    for words in ("train: 8 images, 19 objects", "1 clipped", "1 without area", "1 images without",
                  "1 not of .*<size>.*0002.jpg", "12 objects .* 9", "classes: cat, dog, wolf\n"):
        assert re.search(words, done.out), (words, done.out)
    assert done.sets[0].records[1]["boxes"].tolist() == [[0, 2.5, 96, 40.25]]
    out = run(data, "--classes", "dog, cow ,cat").out
    assert "classes: dog, cow, cat\n" in out and "1 objects; 1 of other classes left out" in out

@pytest.mark.parametrize("upright", [True, False])
def test_boxes_are_of_the_upright_image_or_by_size_of_the_stored_one(data, run, upright):
    exif, size = Image.Exif(), (64, 96) if upright else (96, 64)
    exif[0x0112] = 6
    for i, stem in enumerate(STEMS):
        image, objects = scene(i, size)
        image = image.transpose(Image.Transpose.ROTATE_90) if upright else image
        put(data / f"{stem}.jpg", image, exif=exif)
        put(data / f"{stem}.xml", xml(objects, size=size))
    done = run(data)
    assert done.out.startswith("train: 8 images, 8 objects\nval: 2 images, 2 objects\n")
    for image, target in done.sets[1]:
        h, w = image.shape[1:]
        box = box_cxcywh_to_xyxy(target["boxes"][0]) * torch.tensor([w, h, w, h])
        close(bright(image), box, 1.5)
        assert (h > w) == upright

def test_training_and_inference_read_the_same_pixels(data, run, monkeypatch):
    voc(data, STEMS, "{}.png", "{}.xml")
    for i, stem in enumerate(STEMS):        # 16 bits, or transparent where it is bright
        grey = np.asarray(scene(i)[0].convert("L"))
        pixels = grey.astype(np.uint16) * 200 + 2000 if i % 2 else np.dstack([grey, 255 - grey])
        put(data / f"{stem}.png", Image.fromarray(pixels))
    seen, pad = [], lambda *args: seen.append(args[1]) or pad_images(*args)
    monkeypatch.setattr(train_voc, "pad_images", pad)
    done = run(data)
    for record, (image, _) in zip(done.sets[1].records, done.sets[1], strict=True):
        pixels = v2.functional.pil_to_tensor(infer.open_image(record["path"]))
        assert torch.equal(image, v2.functional.resize(pixels, (48, 64))) and seen[-1] == (64, 96)

# ---- train_voc: augmentation ---------------------------------------------------------------------
@pytest.mark.parametrize("augmentation, sizes", [
    (train_voc.paper, range(480, 801, 32)), (train_voc.from_scratch, range(64, 257, 16))])
def test_boxes_follow_their_pixels(augmentation, sizes):
    torch.manual_seed(0)
    pixels = torch.zeros(3, 375, 500, dtype=torch.uint8)
    pixels[0, 100:220, 150:300] = 255
    shorter, places = set(), []
    for epoch in range(60):
        target = {"labels": torch.tensor([5]), "boxes": tv_tensors.BoundingBoxes(
            [[150.0, 100, 300, 220]], format="XYXY", canvas_size=(375, 500))}
        image, target = v2.Compose(augmentation(epoch, 60))(tv_tensors.Image(pixels), target)
        shorter.add(min(image.shape[1:]))
        assert image.dtype == torch.uint8 and max(image.shape[1:]) <= 1333
        if target["labels"].tolist() == [5]:
            close(bright(image), target["boxes"][0].as_subclass(torch.Tensor), 4)
            places.append(float(target["boxes"][0, ::2].mean()) > image.shape[2] / 2)
    assert len(places) > 40 and 0.2 < np.mean(places) < 0.8 and len(shorter) > 6
    assert {side + side % 2 for side in shorter} <= set(sizes)      # torchvision may cut one off

def test_items_depend_on_seed_epoch_and_index_alone(folder, run):
    data = run(folder).sets[0]
    def means(workers, epoch, state):
        data.epoch.fill_(epoch)
        torch.manual_seed(state)
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        return [image.float().mean() for image, _ in loader]
    assert means(0, 3, 0) == means(0, 3, 1) == means(2, 3, 2) != means(0, 4, 0)
    assert len(data[1][1]["labels"]) == 1   # the second object is difficult: not trained on
    assert pickle.dumps(data.augment)       # so macOS and Windows can send it to workers

# ---- train_voc: average precision ----------------------------------------------------------------
def peer_ap(predictions, targets, num_classes):
    """The twelve numbers of pycocotools, and AP50 for each class."""
    coco, cocoeval = map(pytest.importorskip, ("pycocotools.coco", "pycocotools.cocoeval"))
    peers = coco.COCO(), coco.COCO()
    for peer, images in zip(peers, (targets, predictions)):
        rows = [{"image_id": i, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0],
                 "area": (x1 - x0) * (y1 - y0), "iscrowd": ignore, "score": score}
                for i, one in enumerate(images) for label, (x0, y0, x1, y1), ignore, score
                in zip(*(one[name].tolist() for name in ("labels", "boxes", "ignore", "scores")))]
        peer.dataset = {"images": [{"id": i} for i in range(len(targets))],
                        "categories": [{"id": k} for k in range(num_classes)],
                        "annotations": [row | {"id": n} for n, row in enumerate(rows, 1)]}
        peer.createIndex()
    evaluator = cocoeval.COCOeval(*peers, "bbox")
    for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
        step()
    precision = evaluator.eval["precision"][0, :, :, 0, 2].T
    return [*evaluator.stats, *(p[p > -1].mean() if (p > -1).any() else -1 for p in precision)]

def random_case(rng, images, classes, most):
    """Objects of all sizes, and detections of which most are near one; some scores are equal."""
    predictions, targets = [], []
    for m in rng.integers(1, most, images):
        corner, side = rng.uniform(0, 300, (m, 2)), np.exp(rng.uniform(2, 5.5, (m, 2)))
        boxes = np.concatenate((corner, corner + side), 1).round(rng.integers(0, 3))
        labels, n = rng.integers(0, classes, m), rng.integers(0, 2 * most)
        picks = rng.integers(0, m, n)
        near = boxes[picks] + rng.normal(0, 12, (n, 4)) * (rng.random((n, 1)) < 0.8)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guess = np.where(rng.random(n) < 0.8, labels[picks], rng.integers(0, classes, n))
        scores, ignore = rng.random(n).round(rng.choice((1, 9))), rng.integers(0, 5, m) // 4
        predictions.append(dict(labels=guess, boxes=near, scores=scores, ignore=0 * picks))
        targets.append(dict(labels=labels, boxes=boxes, scores=labels, ignore=ignore))
    return [[{name: torch.tensor(value) for name, value in one.items()} for one in many]
            for many in (predictions, targets)]

@pytest.mark.parametrize("images, classes, most", [(8, 3, 12), (3, 5, 3), (2, 1, 90)])
def test_ap_equals_pycocotools(images, classes, most):
    """With up to 90 objects, some images have more than 100 detections."""
    rng = np.random.default_rng(images)
    for _ in range(30 if most < 90 else 3):
        case = *random_case(rng, images, classes, most), classes + 1    # one class is never there
        *twelve, per_class = train_voc.coco_ap(*case).values()
        assert [*twelve, *per_class] == pytest.approx(peer_ap(*case), abs=1e-9)

# ---- train_voc: training -------------------------------------------------------------------------
TRAIN = """
import sys, test_detr_mini as t
t.shrink(norm=t.FrozenBatchNorm2d, dropout=0.0)     # a trained norm has statistics of its part
t.torch.cpu.get_capabilities = dict                 # and sums in bfloat16 depend on their parts
sys.exit(t.train_voc.main(sys.argv[1:]))
"""
KILLED = """
import os, signal, sys, test_detr_mini as t
replace, saves = os.replace, []
def killed(source, target):
    saves.append(target.name)
    if saves.count("checkpoint.pth") == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
t.shrink()
t.train_voc.main(sys.argv[1:])
"""

def launch(program, data, output, *more, processes=1):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
                f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [*torchrun, sys.executable, "-c", program, "--data", data, "--output", output,
               "--model", "tiny", "--device", "cpu", *map(str, more)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True)

def test_killed_while_it_saves_it_resumes_bit_for_bit(folder, tmp_path, run):
    """With the third checkpoint written, but not yet renamed; with two workers, and with none."""
    run(folder, "--epochs", 4, output="whole")
    done = launch(KILLED, folder, tmp_path / "0", "--workers", 2)
    assert done.returncode == -9 and (tmp_path / "0/checkpoint.pth.tmp").exists(), done.stderr
    shutil.copytree(tmp_path / "0", tmp_path / "2")
    whole = read_checkpoint(tmp_path / "whole/checkpoint.pth")["model"]
    assert whole["backbone.0.body.bn1.num_batches_tracked"] == 6    # of 8 steps, the last 2 frozen
    for workers, output in ((0, tmp_path / "0"), (2, tmp_path / "2")):
        assert read_checkpoint(output / "checkpoint.pth")["epoch"] == 1
        run(folder, "--epochs", 4, "--workers", workers, "--resume", output=output.name)
        resumed = read_checkpoint(output / "checkpoint.pth")["model"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
        assert log_of(output) == log_of(tmp_path / "whole")

def test_two_processes_and_accumulated_parts_train_as_one(data, tmp_path):
    """With one object in each image, every mean over a part is also the mean over the whole."""
    voc(data, [*STEMS, "a", "b"], train=STEMS[:8], val=[*STEMS[8:], "a", "b"])
    for output, processes, parts in (("one", 1, 1), ("parts", 1, 2), ("two", 2, 1)):
        done = launch(TRAIN, data, tmp_path / output, "--epochs", 2, "--accumulate", parts,
                      "--workers", 0, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 2/2") == 1          # only the first process prints
        for name, value in log_of(tmp_path / output)[-1].items():
            expected = log_of(tmp_path / "one")[-1][name]
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-3), name

def test_a_run_learns_and_leaves_log_checkpoints_and_pictures(folder, tmp_path, run):
    run(folder, "--epochs", 10, "--batch-size", 2)
    log, output = log_of(tmp_path / "out"), tmp_path / "out"
    assert len(log) == 10 and log[-1]["train_loss"] < 0.9 * log[0]["train_loss"]
    assert {"epoch", "n_parameters", "train_lr", "test_class_error", "test_loss_giou_0",
            "test_cardinality_error_unscaled"} <= set(log[0])
    assert len(log[0]["test_coco_eval_bbox"]) == 12 and len(log[0]["test_ap50_per_class"]) == 2
    assert Image.open(output / "detections.png").width > 800 and Image.open(output / "curves.png")
    out = run(folder, "--model", output / "best.pth", "--eval").out
    loss = float(re.search(r"loss ([\d.]+)", out)[1])
    assert min(abs(entry["test_loss"] - loss) for entry in log) < 2e-2 and "cat, dog\n" in out

def full(*_):
    raise OSError(28, "No space left on device")

@pytest.mark.parametrize("fail, message", [
    (lambda patch: patch.setattr(os, "fsync", full), "No space left"),
    (lambda patch: patch.setattr(os, "replace", full), "No space left"),
    (lambda patch: patch.setitem(train_voc.TINY, "rate", lambda *_: float("nan")),
     r"JPEGImages/\d+.jpg, .*JPEGImages/\d+.jpg")])
def test_a_run_that_fails_leaves_the_old_files(folder, tmp_path, run, monkeypatch, fail, message):
    run(folder)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    fail(monkeypatch)
    err = run(folder, "--resume", "--epochs", 2, "--batch-size", 2, code=2).err
    assert re.search(message, err), err
    assert all(path.read_bytes() == content for path, content in before.items())

@pytest.mark.parametrize("script, arguments, message", [
    (train_voc, "--model nowhere.pth", "nowhere.pth"), (train_voc, "--resume", "checkpoint.pth"),
    (train_voc, "--epochs 0", "--epochs"), (train_voc, "--device abacus", "--device abacus"),
    (train_voc, "--eval", "tiny"), (train_voc, f"--output {__file__}", "test_detr_mini.py"),
    (train_voc, "--train 2012_train", "no set '2012_train'"), (infer, "nowhere.jpg", "nowhere.jpg"),
    (infer, "--weights nowhere.pth", "nowhere.pth"), (infer, "--device abacus", "--device abacus"),
    (infer, "--threshold 70", "--threshold 70"), (infer, "--threshold -0.1", "--threshold -0.1")])
def test_wrong_arguments_are_explained(folder, tmp_path, capsys, script, arguments, message):
    defaults = {train_voc: f"--data {folder} --model tiny --output {tmp_path}/out --epochs 1 ",
                infer: f"--weights demo --out {tmp_path} "}
    assert script.main((defaults[script] + arguments).split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert f"python {script.__name__}.py " in capsys.readouterr().out

def test_cocos_weights_evaluate_and_fine_tune(folder, tmp_path, run, monkeypatch):
    """With the head of 91 classes as it is, with its rows of known classes, or without a head."""
    monkeypatch.setattr(train_voc, "paper", quick_list)
    for path in (folder / "Annotations").iterdir():
        put(path, path.read_text().replace("dog", "sofa"))
    state = small(91).state_dict()
    coco = put(tmp_path / "coco.pth", {"model": state, "config": CONFIG})
    last = run(folder, "--model", coco, "--eval", "--val", "train").out.splitlines()[-1]
    assert "couch" in last and "cat" in last and "sofa" not in last and "dog" not in last
    run(folder, "--model", coco, "--lr", 0)
    head = read_checkpoint(tmp_path / "out/checkpoint.pth")["model"]["class_embed.weight"]
    rows = [*map(detr_mini.COCO_CLASSES.index, ("cat", "couch")), 91]       # 91 is "no object"
    assert torch.equal(head, state["class_embed.weight"][rows])
    state = {name: value for name, value in state.items() if "class_embed" not in name}
    put(coco, {"model": state, "config": CONFIG})
    assert "classes: cat, sofa" in run(folder, "--model", coco).out

# ---- train_voc: VOC from the network -------------------------------------------------------------
def test_voc_is_fetched_and_unpacked_once(folder, server, tmp_path, monkeypatch, capsys):
    (root, url), (archive, _) = server, train_voc.ARCHIVES["2012"]
    with tarfile.open(root / archive, "w") as tar:
        tar.add(folder, "VOCdevkit/VOC2012")
    fetched, names = tmp_path / "fetched", ["2012_train", "2012_val"]
    monkeypatch.setattr(train_voc, "MIRRORS", (url + "dead/{file}", url + "{file}"))
    with pytest.raises(OSError, match=f"(?s)dead.*{archive} by hand"):      # it is not VOC's
        train_voc.fetch_voc(fetched, names)
    md5 = hashlib.md5((root / archive).read_bytes()).hexdigest()
    monkeypatch.setitem(train_voc.ARCHIVES, "2012", (archive, md5))
    train_voc.fetch_voc(fetched, names)
    image = fetched / "VOCdevkit/VOC2012/JPEGImages/0003.jpg"
    assert image.is_file() and not (fetched / archive).exists()
    (root / archive).rename(tmp_path / archive)         # from now on there is no network
    capsys.readouterr()
    train_voc.fetch_voc(fetched, names)
    assert capsys.readouterr().out == ""
    image.unlink()
    (tmp_path / archive).rename(fetched / archive)      # what an interrupted run leaves
    train_voc.fetch_voc(fetched, names)
    assert image.is_file() and not (fetched / archive).exists()

# ---- infer ---------------------------------------------------------------------------------------
@pytest.fixture
def see(tmp_path, weights, capsys):
    """A function that runs infer.py; returns its results and its lines of errors."""
    file = tmp_path / "found.json"
    def start(*sources, code=0):
        arguments = *sources, "--weights", weights, "--out", tmp_path / "seen", "--json", file
        assert infer.main([*map(str, arguments), "--threshold", "0", "--device", "cpu"]) == code
        results = json.loads(file.read_text()) if file.exists() else None
        return results, capsys.readouterr().err.splitlines()
    return start

def test_every_kind_of_image_is_opened(tmp_path):
    """Upright, 16 bits scaled to 8, transparency on white, the first frame of an animation."""
    ramp, exif = np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (50, 1)), Image.Exif()
    grey, rgb, exif[0x0112] = Image.fromarray(ramp), Image.fromarray(ramp).convert("RGB"), 6
    kinds = {"a.webp": rgb, "a.tiff": rgb, "grey.png": grey, "cmyk.jpg": rgb.convert("CMYK"),
             "palette.png": grey.convert("P"), "rgba.png": grey.convert("RGBA"),
             "16.png": Image.fromarray(ramp.astype(np.uint16) * 257), "f.tiff": grey.convert("F"),
             "clear.png": Image.fromarray(np.dstack([0 * ramp, 255 - ramp]))}
    for name, image in kinds.items():
        put(tmp_path / name, image)
    put(tmp_path / "lying.jpg", rgb.transpose(Image.Transpose.ROTATE_90), exif=exif)
    put(tmp_path / "moving.gif", grey, save_all=True, append_images=[Image.new("L", (80, 50))])
    for path in tmp_path.iterdir():
        seen = infer.open_image(path)
        assert seen.mode == "RGB" and seen.size == (80, 50), path
        assert np.abs(np.asarray(seen, dtype=int) - ramp[..., None]).mean() < 6, path

def test_one_bad_file_stops_no_other(tmp_path, see, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    good = tmp_path / "0042.jpg"
    put(good, Image.effect_noise((80, 50), 90))
    put(tmp_path / "cut.jpg", good.read_bytes()[:400])
    put(tmp_path / "text.png", "no image")
    put(tmp_path / "panorama.png", Image.new("L", (400, 100)))
    bad = [tmp_path / f for f in ("cut.jpg", "text.png", "nothing.jpg", "*.jpg", "panorama.png")]
    results, errors = see(*bad, good, code=2)
    for path, line in zip(bad, errors, strict=True):
        assert line.startswith(f"infer.py: error: {path}: ")
    assert "no image" in errors[3] and "pixels" in errors[4]
    assert len(results) == 9 and (tmp_path / "seen/0042.png").exists()
    assert {*results[0]} == {"image_id", "category_id", "bbox", "score"}
    assert results[0]["image_id"] == 42

def test_thin_and_big_images_folders_and_equal_names(tmp_path, see):
    sizes = {"x/a.png": (1, 300), "x/b.JPG": (700, 1), "y/a.png": (1, 1), "y/c.png": (5200, 4000)}
    for name, size in sizes.items():
        put(tmp_path / name, Image.new("RGB", size, "gray"))
    results, _ = see(tmp_path / "x", tmp_path / "y")
    assert len(results) == 4 * 9 and len(list((tmp_path / "seen").iterdir())) == 4
    (tmp_path / "empty").mkdir()
    assert re.search("empty: .*image", see(tmp_path / "empty", code=2)[1][0])

def test_attention_is_a_second_image_of_the_decoders_mean(tmp_path, see):
    put(tmp_path / "a.png", Image.effect_noise((120, 80), 90))
    see(tmp_path / "a.png", "--attention")
    assert {file.name for file in (tmp_path / "seen").iterdir()} == {"a.png", "a_attention.png"}
    model, image = load_detr(tmp_path / "weights.pth"), infer.open_image(tmp_path / "a.png")
    one, two = (layer.multihead_attn for layer in model.transformer.decoder.layers)
    one.keep_weights = two.keep_weights = True
    [found] = detect(model, image, 0.0)
    looks = (one.weights + two.weights)[0, :, found["queries"]].mean(0).view(9, 4, 6) / 2
    expected = infer.draw_attention(image, found, looks[:, :3, :4])
    drawn = np.asarray(Image.open(tmp_path / "seen/a_attention.png"), dtype=int)
    assert np.abs(drawn - np.asarray(expected)).max() <= 2
    for n in (7, 5, 3, 2, 1):               # the tiles fill their image
        found = {name: found[name][:n] for name in ("labels", "boxes")}
        sheet = infer.draw_attention(Image.new("L", (120, 80), 255), found, torch.ones(n, 4, 6))
        assert (np.asarray(sheet).max(-1) > 0).mean() > 0.99

def test_images_and_weights_from_the_network(tmp_path, see, server, monkeypatch, capsys):
    root, url = server
    put(root / "far.png", Image.new("RGB", (60, 40)))
    assert len(see(f"{url}far.png?size=big")[0]) == 9
    assert "gone.png" in see(f"{url}gone.png", code=2)[1][-1]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(detr_mini, "ZOO_URL", url)
    file = put(tmp_path / "a.pth", {"model": small(91).state_dict(), "config": {"nheads": 4}})
    name = f"detr-r50-dc5-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(ZOO, "detr_resnet50", name)
    arguments = [f"{url}far.png", "--out", str(tmp_path / "seen"), "--device", "cpu"]
    assert infer.main(arguments) == 2
    assert re.search(f"404.*/hub/checkpoints/{name} by hand", capsys.readouterr().err)
    put(root / name, "something else")
    assert infer.main(arguments) == 2 and "invalid hash" in capsys.readouterr().err
    shutil.copy(file, root / name)
    assert infer.main(arguments) == 0
    (root / name).unlink()
    model = load_detr("detr_resnet50")      # kept: no network is needed the second time
    assert model.backbone[0].body.dilation          # as the name of the file says
    assert model.classes[1] == "person" and model.classes[90] == "toothbrush"

def test_the_first_command_finds_the_cells(tmp_path):
    """`python infer.py`: the white cell of each photograph, as BCCD marks it, and red ones."""
    marked = {"14": (236, 211, 379, 353), "17": (128, 215, 336, 391), "29": (75, 179, 224, 315)}
    subprocess.run([sys.executable, HERE / "infer.py", "--json", "found.json"], cwd=tmp_path)
    results, cells = json.loads((tmp_path / "found.json").read_text()), load_detr("demo").classes
    for number, box in marked.items():
        found = [result for result in results if result["image_id"] == f"BloodImage_000{number}"]
        [(x, y, w, h)] = [r["bbox"] for r in found if cells[r["category_id"]] == "WBC"]
        assert box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor([box]).float()) > 0.5
        assert 8 <= [cells[r["category_id"]] for r in found].count("RBC") <= 40
    assert len(list((tmp_path / "detections").glob("*.png"))) == 3

# ---- The benchmark: pytest -m bench -s -----------------------------------------------------------
BENCH = dict(size=(800, 1066), step_size=(640, 640), rounds=9, side=4096, images=64)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HAS_BFLOAT16 = ON_GPU or torch.backends.cpu.get_cpu_capability().startswith("AVX512")
DTYPES = [torch.float32] + [torch.bfloat16] * HAS_BFLOAT16

def seconds(work):
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start

def flops_of(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()

@functools.cache
def device_rate(dtype):
    """FLOP/s of the better of a large matrix product and a large 3x3 convolution."""
    side, there = BENCH["side"] if ON_GPU else BENCH["side"] // 4, dict(device=DEVICE, dtype=dtype)
    a, weight = torch.randn(side, side, **there), torch.randn(256, 256, 3, 3, **there)
    x = torch.randn(16 if ON_GPU else 1, 256, side // 32, side // 32, **there)
    x, weight = (part.to(memory_format=torch.channels_last) for part in (x, weight))
    product, convolution = (flops_of(work) / min(seconds(work) for _ in range(9)) / 1e12
                            for work in (lambda: a @ a, lambda: nn.functional.conv2d(x, weight)))
    print(f"{dtype}: product {product:.3f}, convolution {convolution:.3f} TFLOP/s")
    return 1e12 * max(product, convolution)

def compare(title, images, networks, call, hows, counted):
    """Time call(library, network, dtype) turn by turn; print medians. `counted` gives the FLOPs."""
    works, flops = {}, {}
    for library, network in networks.items():
        flops[library] = flops_of(lambda: counted(library, network, torch.float32))
        for how, dtype in itertools.product(hows, DTYPES):
            built = torch.compile(network) if how == "compiled" else network
            works[dtype, how, library] = functools.partial(call, library, built, dtype)
    rounds = [[seconds(work) for work in works.values()] for _ in range(BENCH["rounds"] + 2)]
    medians = dict(zip(works, np.median(rounds[2:], axis=0)))       # the first two warm up
    for (dtype, how, library), median in medians.items():
        ratio = medians[dtype, how, "transformers"] / median
        share = flops[library] / median / device_rate(dtype)
        print(f"{title:16} {str(dtype)[6:]:8} {how:8} {library:12} {images / median:8.2f} images/s "
              f"{ratio:6.2f} x transformers {share:6.1%} of the device's rate", flush=True)

@pytest.mark.bench
def test_bench_beside_transformers():
    """Inference, and a step with ten objects an image, all decoder layers' losses and AdamW."""
    model, size = DETR(), 16 if ON_GPU else 2
    networks = {"detr_mini": model.to(DEVICE), "transformers": in_transformers(model).to(DEVICE)}
    for name, parameter in networks["transformers"].model.backbone.named_parameters():
        parameter.requires_grad_(not name.startswith(("model.conv1", "model.layer1")))      # A.4
    def look(library, network, dtype):
        with torch.no_grad(), torch.autocast(DEVICE.type, dtype, dtype != torch.float32):
            network.eval()(images)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, on {DEVICE}")
    for batch in (1, 16) if ON_GPU else (1,):
        images = torch.randn(batch, 3, *BENCH["size"], device=DEVICE)
        compare(f"inference of {batch}", batch, networks, look, ("eager", "compiled"),
                lambda library, network, dtype: network(images))        # counts only with gradients
    model.to(memory_format=torch.channels_last).aux_loss = True     # as train_voc has it
    networks["transformers"].config.auxiliary_loss = True
    criterion = SetCriterion(91, HungarianMatcher()).to(DEVICE)
    images = torch.randn(size, 3, *BENCH["step_size"], device=DEVICE)
    targets = [{name: value.to(DEVICE) for name, value in target.items()}
               for target in random_targets([10] * size, 91)]
    optimizers = {library: torch.optim.AdamW(network.parameters(), 1e-6, fused=True)
                  for library, network in networks.items()}
    def step(library, network, dtype):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            if library == "transformers":
                loss = network.train()(images, labels=targets).loss
            else:
                loss = criterion.total(criterion(network.train()(images), targets))
        loss.backward()
        optimizers[library].step()
        optimizers[library].zero_grad()
    compare(f"step of {size}", size, networks, step, ("eager",), step)

@pytest.mark.bench
def test_bench_loader(data):
    """JPEGs of VOC's size, with the paper's augmentation, in one process."""
    photo = infer.open_image(HERE / "assets/BloodImage_00014.jpg").resize((500, 375))
    for i in range(BENCH["images"]):
        put(data / f"{i}.jpg", photo)
        put(data / f"{i}.xml", xml([("cat", (100, 100, 300, 250))], size=(500, 375)))
    xmls, images = train_voc.find_files(data)
    records = [train_voc.read_record(xml, images) for xml in xmls]
    dataset = train_voc.VOC(records, ["cat"], None, lambda epoch: train_voc.paper(epoch, 40))
    loader = DataLoader(dataset, batch_size=16, collate_fn=train_voc.collate)
    torch.set_num_threads(1)
    fastest = min(seconds(lambda: list(loader)) for _ in range(3))
    print(f"\nloader: {len(dataset) / fastest:.0f} images/s a core")
