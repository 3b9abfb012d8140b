"""The tests. Numbers are compared with independent implementations: transformers, torchvision,
torch.nn, pycocotools. `pytest -m bench -s` runs the benchmark, which `pytest` alone leaves out."""
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
from argparse import Namespace
from pathlib import Path, PosixPath
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils import benchmark
from torchvision import tv_tensors
from torchvision.transforms import v2

import detr_mini
import infer
import train_voc
from detr_mini import (DETR, ZOO, FrozenBatchNorm2d, HungarianMatcher, ResNet, SetCriterion,
                       box_cxcywh_to_xyxy, box_iou, detect, generalized_box_iou, load_detr,
                       pad_images, read_checkpoint, resized_size)

HERE = Path(__file__).parent

# ---- Helpers: models and numbers -----------------------------------------------------------------
def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=atol, atol=atol, check_dtype=False)

def normalized(image):
    return v2.functional.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

def small(num_classes=3, norm=FrozenBatchNorm2d, nheads=4, dropout=0.0):
    torch.manual_seed(0)
    backbone = ResNet(detr_mini.BasicBlock, (1, 1, 1), width=16, norm=norm)
    model = DETR(num_classes, backbone, hidden_dim=32, nheads=nheads, enc_layers=1, dec_layers=2,
                 dim_feedforward=48, num_queries=9, dropout=dropout)
    model.sizes = (48, 64), None
    return model

def randomize(model):
    """Give norms and biases random values: their initial ones and zeros would hide errors."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            noise = torch.rand if name.endswith("var") else torch.randn
            tensor += noise(len(tensor)) / 9
    return model.eval()

def random_boxes(n):
    return torch.cat((torch.rand(n, 2) * 0.5 + 0.2, torch.rand(n, 2) * 0.3 + 0.01), 1)

def random_targets(objects, classes):
    torch.manual_seed(1)
    labels = [torch.randint(0, classes, (m,)) for m in objects]
    return [{"labels": k, "class_labels": k, "boxes": random_boxes(len(k))} for k in labels]

def random_outputs(images, queries, classes, seed=0):
    torch.manual_seed(seed)
    logits = 2 * torch.randn(images, queries, classes + 1)
    boxes = random_boxes(images * queries).view(images, queries, 4)
    return {"pred_logits": logits, "logits": logits, "pred_boxes": boxes}

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.fixture
def criterion():
    return SetCriterion(6, HungarianMatcher())

@pytest.fixture
def model():
    return randomize(small())

@pytest.fixture
def photo():
    torch.manual_seed(0)
    return torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)

TRANSFORMERS_NAMES = [
    ("backbone.0.body.", "model.backbone.model."), ("transformer", "model"), ("linear", "mlp.fc"),
    (r"(coder\.l.*)norm1", r"\1self_attn_layer_norm"), ("decoder.norm", "decoder.layernorm"),
    (r"(encoder.*)norm2|(decoder.*)norm3", r"\1\2final_layer_norm"), ("out_proj", "o_proj"),
    (r"(decoder\.l.*)norm2", r"\1encoder_attn_layer_norm"), ("multihead_attn", "encoder_attn"),
    ("query_embed", "model.query_position_embeddings"), ("input_proj", "model.input_projection"),
    ("class_embed", "class_labels_classifier"), ("bbox_embed", "bbox_predictor")]

def renamed(tensors):
    """Tensors by the names that transformers gives them, with separate q, k and v."""
    found = {}
    for name, tensor in tensors:
        for ours, theirs in TRANSFORMERS_NAMES:
            name = re.sub(ours, theirs, name)
        parts = tensor.chunk(3) if "in_proj_" in name else [tensor]
        for letter, part in zip("qkv", parts):
            found[name.replace("in_proj_", f"{letter}_proj.")] = part
    return found

def in_transformers(model):
    """The detector of transformers with the weights of `model`."""
    transformers = pytest.importorskip("transformers")
    dc5 = {"output_stride": 16} if model.backbone[0].body.dilation else {}
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet50", use_pretrained_backbone=False, out_indices=[4], **dc5)
    encoder, decoder = model.transformer.children()
    dropout = encoder.layers[0].dropout.p
    peer = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone, num_labels=len(model.classes), encoder_layers=len(encoder.layers),
        decoder_layers=len(decoder.layers), num_queries=model.query_embed.num_embeddings,
        dropout=dropout, attention_dropout=dropout, activation_dropout=dropout))
    peer.load_state_dict(renamed(model.state_dict().items()))
    for name, parameter in peer.model.backbone.model.named_parameters():    # the paper's A.4
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    return peer.eval()

def peer_outputs(peer, images, mask):
    """The predictions of each decoder layer in transformers, and the memory. They come from the
    states of a plain pass: its auxiliary_loss would feed normed states to the next layer."""
    pixel_mask = None if mask is None else (~mask).long()
    last = peer(images, pixel_mask=pixel_mask, output_hidden_states=True)
    states = [peer.model.decoder.layernorm(state) for state in last.decoder_hidden_states[1:-1]]
    layers = [{"logits": peer.class_labels_classifier(state),
               "pred_boxes": peer.bbox_predictor(state).sigmoid()} for state in states]
    layers.append({"logits": last.logits, "pred_boxes": last.pred_boxes})
    return layers, last.encoder_last_hidden_state

def peer_losses(layers, targets, classes):
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    matcher = module.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = module.ImageLoss(matcher, classes, 0.1, ["labels", "boxes", "cardinality"])
    losses = criterion(layers[-1] | {"auxiliary_outputs": layers[:-1]}, targets)
    total = 0
    for loss, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)):
        total += weight * sum(losses[name] for name in losses if name.startswith(loss))
    return losses, total

# ---- Helpers: files and runs ---------------------------------------------------------------------
STEMS = [f"{i:04}" for i in range(10)]
CONFIG = {"nheads": 4, "size": (48, 64), "max_size": None}         # of `small`
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6                    # stored sideways, to be rotated by 90 degrees

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def put(path, content, **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        torch.save(content, path)
    return path

def scene(i, size=(96, 64)):
    """A dark image with a bright square, a cat or a dog, and its objects in VOC's pixels."""
    side, x, y = 16 + 5 * i % 14, 1 + 17 * i % 33, 1 + 23 * i % 31
    name = ("cat", "dog")[i % 2]
    image = Image.new("RGB", size, (20, 20, 30))
    image.paste({"cat": (230, 90, 50), "dog": (60, 230, 80)}[name], (x, y, x + side, y + side))
    return image, [(name, (x + 1, y + 1, x + side, y + side))]

def bright(image):
    """The box around the bright pixels of an image (3, h, w)."""
    y, x = (image.max(0).values > 110).nonzero().T
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()

def xml(objects, size=(96, 64), difficult=0):
    """An annotation of [(class, box)], of which the last `difficult` ones are difficult."""
    body = ""
    for i, (name, box) in enumerate(objects, difficult - len(objects)):
        corners = map("<{0}>{1}</{0}>".format, ("xmin", "ymin", "xmax", "ymax"), box)
        body += (f"<object><name>{name}</name><difficult>{int(i >= 0)}</difficult>"
                 f"<bndbox>{''.join(corners)}</bndbox></object>")
    return (f"<annotation><filename>of_another.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{body}</annotation>")

def annotate(stem, objects, **options):
    put(f"data/Annotations/{stem}.xml", xml(objects, **options))

def voc(stems, images="JPEGImages/{}.jpg", xmls="Annotations/{}.xml", where="data", **sets):
    """Write scenes with these names, and lists of sets."""
    for i, stem in enumerate(stems):
        image, objects = scene(i)
        put(f"{where}/{images.format(stem)}", image)
        put(f"{where}/{xmls.format(stem)}", xml(objects))
    for name, listed in sets.items():
        put(f"{where}/ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in listed))

@pytest.fixture
def folder():
    """Ten images, eight to train on; one has a difficult dog too, one no object, one only that."""
    voc(STEMS, train=STEMS[:8], val=STEMS[8:])
    annotate("0001", scene(1)[1] + [("dog", (1, 1, 20, 20))], difficult=1)
    annotate("0002", [])
    annotate("0009", scene(9)[1], difficult=1)

@pytest.fixture
def weights():
    names, state = ["cat", "dog", "cow"], randomize(small()).state_dict()
    return put("weights.pth", {"model": state, "classes": names, "config": CONFIG})

def shrink(patch=setattr, norm=nn.BatchNorm2d, dropout=0.2):
    """Make train_voc's `tiny` and its recipe smaller."""
    patch(train_voc, "tiny", lambda num_classes: small(num_classes, norm, dropout=dropout))
    patch(train_voc, "tiny_sizes", lambda epoch, epochs: (
        (24, 32) if epoch < epochs / 3 else (48, 64), None))
    patch(train_voc, "TINY", train_voc.TINY | dict(
        batch_size=4, lr=2e-3, eos_coef=0.1, evaluate_every=1, rate=lambda done: 1 - done / 2))

@pytest.fixture
def run(monkeypatch, capsys):
    """Runs train_voc.py, by default for one epoch with a small network; returns the output."""
    shrink(monkeypatch.setattr)

    def start(options="", code=0):
        defaults = "--data data --output out --model tiny --epochs 1 --device cpu "
        assert train_voc.main((defaults + options).split()) == code
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if "ETA" not in line]   # of a slow run
        if code == 2:
            assert len(errors) == 1, f"an error must be one line: {errors}"
        else:
            assert errors == []
        return printed.out + printed.err
    return start

def read(*arguments):
    """The data sets of the folder `data`, each with the `paths` of its images, and notes on it."""
    records, notes = train_voc.load_data(train_voc.parse(["--data", "data", *arguments]))
    found = Namespace(notes="\n".join(notes))
    for part, of_part in records.items():
        dataset = train_voc.VOC(of_part, ["cat", "dog"], ((48, 64), None))
        dataset.paths = [os.path.relpath(record["path"], "data") for record in of_part]
        setattr(found, part, dataset)
    return found

# ---- detr_mini -----------------------------------------------------------------------------------
def test_boxes_equal_torchvision(double):
    a, b = box_cxcywh_to_xyxy(random_boxes(50)), box_cxcywh_to_xyxy(random_boxes(70))
    close(box_iou(a, b), torchvision.ops.box_iou(a, b), 1e-10)
    close(generalized_box_iou(a, b), torchvision.ops.generalized_box_iou(a, b), 1e-10)
    close(box_cxcywh_to_xyxy(detr_mini.box_xyxy_to_cxcywh(a)), a, 1e-12)

@pytest.mark.parametrize("norm, peer_norm, block, modes", [
    (FrozenBatchNorm2d, nn.BatchNorm2d, "Bottleneck", [False]),
    (nn.BatchNorm2d, nn.BatchNorm2d, "BasicBlock", [False, True]),
    (nn.SyncBatchNorm, nn.SyncBatchNorm, "BasicBlock", [False, True]),
    (nn.InstanceNorm2d, nn.InstanceNorm2d, "BasicBlock", [False, True])])
def test_backbone_equals_torchvisions_with_any_norm(double, norm, peer_norm, block, modes):
    peer = randomize(torchvision.models.ResNet(
        getattr(torchvision.models.resnet, block), [1, 1, 1, 1], norm_layer=peer_norm))
    ours = ResNet(getattr(detr_mini, block), (1, 1, 1, 1), norm=norm)
    assert ours.load_state_dict(peer.state_dict(), strict=False).missing_keys == []
    stages, x = nn.Sequential(*list(peer.children())[:-2]), torch.randn(4, 3, 65, 97)
    for training in modes:
        close(ours.train(training)(x), stages.train(training)(x), 1e-8)

@pytest.mark.parametrize("keep_weights", [False, True])
def test_attention_has_dropout_in_training_whether_or_not_it_keeps_its_weights(keep_weights):
    attention = detr_mini.MultiheadAttention(32, 4, dropout=0.5)
    attention.keep_weights = keep_weights
    x = torch.randn(1, 6, 32)
    assert not attention(x, x, x).equal(attention(x, x, x))
    assert attention.eval()(x, x, x).equal(attention(x, x, x))

@pytest.fixture(scope="module", params=[False, True], ids=["R50", "R50-DC5"])
def pair(request):
    torch.manual_seed(0)
    model = DETR(7, dilation=request.param, enc_layers=2, dec_layers=3, aux_loss=True)
    return randomize(model), in_transformers(model)

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("sizes", [[(97, 130)], [(96, 144), (112, 96), (90, 90)]])
@torch.no_grad()
def test_detector_equals_transformers(pair, sizes, dtype, atol):
    model, peer = (network.to(dtype) for network in pair)
    torch.manual_seed(1)
    images = [torch.randn(3, *size, dtype=dtype) for size in sizes]
    layers, memory = peer_outputs(peer, *pad_images(images))
    for keep_weights in (False, True):                      # both forms of attention
        for module in model.modules():
            module.keep_weights = keep_weights
        ours = model(images)
        for layer, expected in zip([*ours["aux_outputs"], ours], layers, strict=True):
            close(layer["pred_logits"], expected["logits"], atol)
            close(layer["pred_boxes"], expected["pred_boxes"], atol)
        close(ours["memory"], memory, atol)
        assert ours["pred_boxes"].dtype == dtype

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_model_runs_in_any_precision(model, photo, dtype):
    images = [torch.randn(3, 48, 64), torch.randn(3, 60, 40)]
    boxes, [found] = model(images)["pred_boxes"], detect(model, photo, 0.0)
    model.to(dtype)
    close(model([image.to(dtype) for image in images])["pred_boxes"], boxes, 0.02)
    close(detect(model, photo, 0.0)[0]["scores"], found["scores"], 0.02)

@pytest.mark.parametrize("objects", [[3, 5, 1], [0, 4, 0], [0, 0, 0], [12, 30, 2]])
@pytest.mark.parametrize("earlier_layers", [0, 3])
def test_matching_losses_and_gradients_equal_transformers(
        double, criterion, objects, earlier_layers):
    targets = random_targets(objects, 6)
    layers = [random_outputs(3, 12, 6, seed) for seed in range(earlier_layers + 1)]
    leaves = [layer[name].requires_grad_() for layer in layers for name in ("logits", "pred_boxes")]
    narrow = [target | {"labels": target["labels"].byte()} for target in targets]
    losses = criterion(layers[-1] | {"aux_outputs": layers[:-1]}, narrow)
    expected, total = peer_losses(layers, targets, 6)
    for name, value in expected.items():                    # its cardinality_error is a float32
        close(losses[name], torch.as_tensor(value), 1e-6 if "error" in name else 1e-8)
    matches = zip(layers[-1]["logits"], targets, criterion.matcher(layers[-1], targets))
    right = [c[queries].argmax(1) == target["labels"][objects]
             for c, target, (queries, objects) in matches]
    close(losses["class_error"], 100 - 100 * torch.cat(right).double().mean().nan_to_num(0), 1e-5)
    gradients = torch.autograd.grad(criterion.total(losses), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        close(ours, theirs, 1e-8)

BOX = [0.5, 0.5, 0.2, 0.3]

@pytest.mark.parametrize("images, labels, boxes, message", [
    (2, [0, 1], [BOX, BOX], "2 images, but 3 targets"),
    (3, [0], [BOX, BOX, BOX], "image 2 .*labels and boxes"),
    (3, [0, 1, 2], [BOX, BOX], "image 2 .*labels and boxes"),
    (3, [0, 6], [BOX, BOX], "image 2 .*label 6 .*0 to 5"),
    (3, [0, -1], [BOX, BOX], "image 2 .*label -1 .*0 to 5"),
    (3, [0, 1], [BOX, [0.5, 0.5, 0.2, -0.3]], "image 2 .*cx, cy, w, h"),
    (3, [0, 1], [BOX, [np.nan, 0.5, 0.2, 0.3]], "image 2 .*cx, cy, w, h"),
    (3, [0, 1], [BOX, [50.0, 50.0, 20.0, 30.0]], "image 2 .*cx, cy, w, h")])
def test_targets_that_do_not_fit_are_refused(criterion, images, labels, boxes, message):
    targets = random_targets([3, 5], 6)
    targets.append({"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)})
    with pytest.raises(ValueError, match=message):
        criterion(random_outputs(images, 12, 6), targets)

@pytest.mark.parametrize("size, expected", [                # as by datasets/transforms.py of
    ((480, 640), (800, 1066)), ((640, 480), (1066, 800)),   # facebookresearch/detr
    ((700, 1500), (622, 1332)), ((1500, 701), (1333, 623)), ((1, 5000), (1, 5000))])
def test_resized_size_is_the_references(size, expected):
    assert resized_size(*size, 800, 1333) == expected

# ---- detr_mini: detect and checkpoint files ------------------------------------------------------
def test_detect_sorts_by_score_and_keeps_what_is_above_the_threshold(model, photo):
    [everything] = detect(model, photo, threshold=0.0)
    assert sorted(everything["queries"].tolist()) == list(range(9))         # each query once
    assert (everything["scores"].diff() <= 0).all()
    [best] = detect(model, photo, threshold=float(everything["scores"][4]))
    assert best["scores"].tolist() == everything["scores"][:4].tolist()
    assert best["names"] == [f"class {label}" for label in best["labels"].tolist()]
    assert detect(model, []) == []

@pytest.mark.parametrize("sizes, expected", [
    ((32, None), (32, 32)), (((48, 64), None), (48, 64)), ((40, 60), (33, 59))])
def test_detect_equals_torchvision_and_transformers(model, photo, sizes, expected):
    module = pytest.importorskip("transformers.models.detr.image_processing_detr")
    model.sizes = sizes
    with torch.no_grad():
        outputs = model([normalized(v2.functional.resize(photo.float(), expected))])
    outputs = Namespace(logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])
    [peer] = module.DetrImageProcessor().post_process_object_detection(outputs, 0.0, [(50, 90)])
    [found] = detect(model, photo / 255, threshold=0.0)
    for name, values in peer.items():                       # scores, labels and boxes
        close(found[name], values[found["queries"]], 1e-4)
    found["boxes"] += 1                     # an inference tensor would refuse to be changed
    for rounded in detect(model, [photo, Image.fromarray(photo.permute(1, 2, 0).numpy())], 0.0):
        close(rounded["boxes"], peer["boxes"][rounded["queries"]], 2e-3)

@pytest.mark.parametrize("wrong", [
    "cats.jpg", None, np.zeros((9, 9, 3)), Image.new("L", (9, 9)), Image.new("RGBA", (9, 9)),
    torch.zeros(9, 9, 3), torch.zeros(1, 3, 9, 9), torch.zeros(9, 9), torch.zeros(4, 9, 9)])
def test_detect_refuses_what_is_not_an_rgb_image(model, photo, wrong):
    for images in (wrong, [photo, wrong]):
        with pytest.raises(TypeError, match="open_image"):
            detect(model, images)

def test_detect_works_in_eval_mode_and_restores_the_mode_of_every_module(photo):
    model = small(norm=nn.BatchNorm2d, dropout=0.5).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    [first], [second] = detect(model, photo, 0.0), detect(model, photo, 0.0)
    assert first["scores"].equal(second["scores"])          # no dropout
    model.input_proj.weight = None
    with pytest.raises(TypeError, match="conv2d"):
        detect(model, photo)
    assert [module.training for module in model.modules()] == modes

ARGS = Namespace(nheads=4, lr=1e-4, output_dir=PosixPath("out"))       # the reference's

@pytest.mark.parametrize("key, prefix, options", [
    ("model", "", {"config": {"nheads": 4}, "epoch": 3}),                       # this project
    ("model", "", {"args": ARGS, "epoch": 3}),                                  # the reference
    ("state_dict", "model.", {"hyper_parameters": {"nheads": 4}}),              # Lightning
    ("model_state_dict", "", {"args": {"nheads": 4}}),                          # torch's tutorials
    (None, "", {})])                                                            # a bare state dict
def test_checkpoints_of_other_programs_load(key, prefix, options):
    model = randomize(small(22, norm=nn.BatchNorm2d, nheads=4 if options else 8))
    state = {prefix + name: value for name, value in model.state_dict().items()}
    loaded = load_detr(put("a.pth", {key: state} | options if key else state))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(loaded(x)["pred_boxes"], model(x)["pred_boxes"], 1e-6)
    assert not loaded.training
    assert loaded.sizes == (800, 1333)

def test_a_file_that_is_not_a_checkpoint_is_refused_and_its_code_never_run(weights):
    code = "cos\nsystem\n(S'touch it_ran'\ntR."            # a pickle: os.system
    for content in (weights.read_bytes()[:3000], "", "\xff\xd8\xff", code, small()):
        with pytest.raises(ValueError, match="cannot read the checkpoint .*a.pth.*never run"):
            load_detr(put("a.pth", content))
    assert not Path("it_ran").exists()

@pytest.mark.parametrize("name, value", [
    ("transformer.encoder.layers.0.norm1.bias", None), ("neck.weight", torch.zeros(1))])
def test_weights_that_are_missing_or_left_over_are_refused_by_name(name, value):
    state = small().state_dict() | {name: value}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=f"(?s)a.pth.*{name}"):
        load_detr(put("a.pth", state))

def test_weights_of_the_zoo_are_downloaded_once(monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(detr_mini, "ZOO_URL", f"{Path.cwd().as_uri()}/")
    file = put("a.pth", {"model": small(91).state_dict(), "config": {"nheads": 4}})
    name = f"detr-r50-dc5-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(ZOO, "detr_resnet50", name)
    with pytest.raises(OSError, match=f"{name} .* yourself .*hub/checkpoints/{name}"):
        load_detr("detr_resnet50")
    file.rename(name)
    assert load_detr("detr_resnet50").backbone[0].body.dilation     # as the file's name says
    Path(name).unlink()                                     # no network is needed a second time
    assert load_detr("detr_resnet50").classes[90] == "toothbrush"

# ---- train_voc: a folder of images with XML ------------------------------------------------------
def check_boxes(found):
    """Check that each image of a set comes with its own object."""
    for image, target in found:
        box = box_cxcywh_to_xyxy(target["boxes"][0]) * torch.tensor([64, 48, 64, 48])
        close(bright(image), box, 1.5)

@pytest.mark.parametrize("where, line", [
    ("VOC2007", "  {}.xml  \r"), ("hardhat/VOC2028", "C:\\JPEGImages\\{}.JPG\n")])
def test_lists_are_sets_wherever_they_lie_and_of_two_with_one_name_one_must_be_named(where, line):
    stems = [f"a {i}" for i in range(12)]
    lines = [line.format(stem) for stem in stems]
    voc(stems, where=f"data/{where}", val=lines[5:7], trainval=lines[:7], test=lines[7:])
    put(f"data/{where}/ImageSets/Main/train.txt", "\ufeff" + "\n".join(lines[:5]))
    images = [f"{where}/JPEGImages/{stem}.jpg" for stem in stems]
    assert read().train.paths == images[:5]
    assert read().val.paths == images[5:7]
    assert read("--val", "test").val.paths == images[7:]
    voc(STEMS, where="data/VOC2012", train=STEMS)
    with pytest.raises(ValueError, match="name one, such as (VOC2012|hardhat/VOC2028)/train"):
        read()
    found = read("--train", f"{where}/train", "VOC2012/train", "--val", f"{where}/val")
    assert found.train.paths == images[:5] + [f"VOC2012/JPEGImages/{stem}.jpg" for stem in STEMS]

@pytest.mark.parametrize("images, xmls, train, val", [
    ("{0}/images/{{}}.jpg", "{0}/labels/{{}}.xml", "train", "val"),
    ("{0}/{{}}_jpg.rf.0a1b.jpg", "{0}/{{}}_jpg.rf.0a1b.xml", "train", "valid"),
    ("images/{0}/{{}}.jpg", "labels/{0}/{{}}.xml", "training", "Validation")])
def test_folders_are_sets_and_may_hold_equal_names(images, xmls, train, val):
    voc(STEMS[4:], images.format(train), xmls.format(train))
    voc(STEMS[:2], images.format("test"), xmls.format("test"))
    with pytest.raises(ValueError, match="for val .*--val test.* test"):
        read()                                              # it names the folders that there are
    voc(STEMS[:5], images.format(val), xmls.format(val))
    found = read()
    assert found.train.paths == [images.format(train).format(stem) for stem in STEMS[4:]]
    assert found.val.paths == [images.format(val).format(stem) for stem in STEMS[:5]]
    assert len(read("--val", "test").val) == 2
    check_boxes(found.train)
    check_boxes(found.val)

def test_our_split_is_announced_and_hardly_changed_by_added_images():
    """The added images lie in a linked folder; another link leads back, so to no new image."""
    voc([f"Screenshot ({i})" for i in range(50)], default=["Screenshot (0)"])
    old = read()
    assert (len(old.train), len(old.val)) == (40, 10)
    assert re.search("split: .* 10 of ", old.notes)
    voc([f"A ({i})" for i in range(5)], where="disk")
    Path("data/linked").symlink_to(Path("disk").absolute(), target_is_directory=True)
    Path("data/circle").symlink_to(Path("data").absolute(), target_is_directory=True)
    new = read()
    assert len(new.train) + len(new.val) == 55
    assert len({*new.train.paths} & {*old.val.paths}) <= 1
    assert read("--eval").val.paths == new.val.paths        # no image that was trained on

@pytest.mark.parametrize("images, xmls, decoy", [
    ("images/{}.jpg", "annotations/xmls/{}.xml", "annotations/trimaps/{}.png"),
    ("images/a/{}.jpg", "labels/a/{}.xml", "images/b/{}.jpg"),
    ("JPEGImages/e\u0301{}.jpg", "Annotations/\u00e9{}.xml", "results/e\u0301{}.jpg"),
    ("JPEGImages/{}.jfif", "Annotations/{}.XML", "JPEGImages/._{}.jfif"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "__MACOSX/JPEGImages/{}.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", ".idea/{}.xml"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "{}/annotations.xml"),
    ("JPEGImages/{}.png.jpg", "Annotations/{}.png.xml", "thumbnails/{}.png.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml.xml", "thumbnails/{}.jpg")])
def test_masks_copies_and_hidden_files_are_ignored(images, xmls, decoy):
    voc(STEMS, images, xmls)
    for stem in STEMS:
        put(f"data/{decoy.format(stem)}", "<annotations><image/></annotations>")
    found = read()
    assert sorted(found.train.paths + found.val.paths) == [images.format(stem) for stem in STEMS]
    check_boxes(found.train)

@pytest.mark.parametrize("pattern, replacement", [
    ("object>", "Object>"), ("annotation>", "ANNOTATION>"), ("bndbox>", "BndBox>"),
    ("<annotation>", "<annotation xmlns='http://example.org'>")])
def test_tags_count_in_any_case_and_namespace(pattern, replacement):
    voc(STEMS)
    for path in Path("data/Annotations").glob("*[02468].xml"):
        put(path, re.sub(pattern, replacement, path.read_text()))
    assert read().train.summary == "8 images, 8 objects"
    assert read().val.summary == "2 images, 2 objects"

XML, JPEG, VAL = "Annotations/0003.xml", "JPEGImages/0003.jpg", "ImageSets/Main/val.txt"

@pytest.mark.parametrize("files, options, message", [
    ({XML: "<annotation><object>"}, "", XML),
    ({XML: "<project></project>"}, "", f"{XML}.*<annotation>, not <project>"),
    ({XML: xml([("cat", (1, 2, 3))])}, "", f"{XML}.*ymax"),
    ({XML: xml([("cat", (0.1, 0.2, 0.5, 1))])}, "", f"{XML}.*fractions.*pixels"),
    ({JPEG: None}, "", f"{XML}.*one image 0003"),           # though there is a mask
    ({"images/0003.jpg": ""}, "", f"{XML}.*images/0003.jpg"),
    ({"0002.xml": xml([]), JPEG: b"\xff\xd8\xff", "JPEGImages/0004.jpg": b""},
     "", "3 of 10 .*0002.xml.*0003.jpg.*0004.jpg"),         # all in one error
    ({VAL: "0001\n0077\n"}, "", "val.txt.*'0077'"),
    ({VAL: None}, "", "no annotations for val .* train"),
    ({}, "--data nowhere", "nowhere"), ({}, "--model nowhere.pth", "nowhere.pth"),
    ({}, "--model demo --size 64", "--size"), ({}, "--resume", "out/checkpoint.pth"),
    ({}, "--epochs 0", "--epochs"), ({}, "--device abacus", "--device abacus"),
    ({}, "--eval", "tiny"), ({}, f"--output {__file__}/out", "test_detr_mini.py")])
def test_bad_data_and_options_are_explained_before_the_first_step(run, files, options, message):
    voc(STEMS, train=STEMS[:8], val=STEMS[8:])
    put("data/SegmentationClass/0003.png", scene(3)[0])
    for name, content in files.items():
        path = put(f"data/{name}", content or "")
        if content is None:
            path.unlink()
    printed = run(options, code=2)
    assert re.search(message, printed), printed
    assert "epoch 1/" not in printed
    assert not Path("out").exists()

def test_clipped_dropped_and_mismatched_boxes_and_unused_files_are_counted():
    voc(STEMS, "JPEGImages/{}.png", train=STEMS[:9], val=STEMS[8:])
    annotate("0001", [("dog", (-5, 3.5, 200, 40.25)), ("cat", (9, 9, 5, 5))])
    annotate("0002", scene(2)[1], size=(640, 480))
    put("data/Annotations/0003.xml", xml([("dog", (5, 5, 9, 9))] * 12).encode("utf-16"))
    annotate("0004", scene(4)[1], difficult=1)
    put("data/JPEGImages/alone.png", scene(0)[0])
    put("data/pom.xml", "<project><name>x</name></project>")
    found = read()
    for words in ("^9 images, 20 objects", "1 boxes clipped", "1 boxes without", "1 objects marked",
                  "1 images whose <size>.*0002.png"):
        assert re.search(words, found.train.summary), found.train.summary
    assert re.search("1 images without .*1 XML .*without", found.notes)
    assert re.search("1 images? .*both train and val", found.notes)
    assert found.train.records[1]["boxes"].tolist() == [[0, 2.5, 96, 40.25]]

@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_boxes_are_of_the_upright_image_or_by_size_of_the_stored_one(size):
    for i, stem in enumerate(STEMS):
        image, objects = scene(i, size)
        if size == (64, 96):                                # otherwise annotated as it is stored
            image = image.transpose(Image.Transpose.ROTATE_90)
        grey = np.asarray(image.convert("L")).astype(np.uint16) << 4        # 12 bits
        put(f"data/{stem}.png", Image.fromarray(grey), exif=SIDEWAYS)
        put(f"data/{stem}.xml", xml(objects, size))
    assert read().train.summary == "8 images, 8 objects"    # nothing clipped or dropped
    check_boxes(read().train)

@pytest.mark.parametrize("sizes, shorter_sides", [
    ((800, 1333), set(range(480, 801, 32))), ((200, 333), set(range(120, 201, 8))),
    (((192, 256), None), {192})])
def test_boxes_follow_their_pixels(sizes, shorter_sides):
    torch.manual_seed(0)
    transform = train_voc.augmentation(*sizes)
    pixels = torch.zeros(3, 375, 500, dtype=torch.uint8)
    pixels[0, 100:220, 150:300] = 255
    found, on_the_right = set(), []
    for _ in range(60):
        target = {"labels": torch.tensor([5]), "boxes": tv_tensors.BoundingBoxes(
            [[150.0, 100, 300, 220]], format="XYXY", canvas_size=(375, 500))}
        image, target = transform(tv_tensors.Image(pixels), target)
        found.add(min(image.shape[1:]))
        for box in target["boxes"].as_subclass(torch.Tensor):
            close(bright(image), box, 4)
            on_the_right.append(bool(box[::2].mean() > image.shape[2] / 2))
    assert len(on_the_right) > 40
    assert 0.2 < np.mean(on_the_right) < 0.8                # flips
    assert len(found) > len(shorter_sides) / 2
    assert {side + side % 2 for side in found} <= shorter_sides     # torchvision may cut one off

def peer_ap(predictions, targets, num_classes):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
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
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    precision = evaluator.eval["precision"][0, :, :, 0, 2]          # all -1 if there is no object
    return [*evaluator.stats[:6], *precision.mean(0)]

def random_case(rng, images, classes, most):
    """Objects of all sizes, and detections of which most are near one; some scores are equal."""
    predictions, targets = [], []
    for m, n in rng.integers((1, 0), (most, 2 * most), (images, 2)):
        corner = rng.uniform(0, 300, (m, 2)).round()
        boxes = np.concatenate((corner, corner + np.exp(rng.uniform(2, 5.5, (m, 2)))), 1)
        labels, ignore = rng.integers(0, classes, m), rng.integers(0, 5, m) // 4
        targets.append(dict(labels=labels, boxes=boxes, scores=labels, ignore=ignore))
        picks = rng.integers(0, m, n)
        shift = rng.normal(0, 12, (n, 2)) * (rng.random((n, 1)) < 0.8)
        guess = np.where(rng.random(n) < 0.8, labels[picks], rng.integers(0, classes, n))
        predictions.append(dict(labels=guess, boxes=boxes[picks] + np.tile(shift, 2),
                                scores=rng.random(n).round(rng.choice((1, 9))), ignore=0 * picks))
    return predictions, targets

# ---- train_voc: training -------------------------------------------------------------------------
def log_of(output):
    entries = [json.loads(line) for line in Path(output, "log.txt").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in entries]

def results_of(output):
    return read_checkpoint(f"{output}/checkpoint.pth")["model"], log_of(output)

def test_four_training_steps_end_in_the_weights_of_transformers(double):
    model = DETR(7, enc_layers=2, dec_layers=2, num_queries=20, dropout=0.0, aux_loss=True)
    peer = in_transformers(randomize(model)).train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert renamed(trained).keys() == {n for n, p in peer.named_parameters() if p.requires_grad}
    images = [torch.randint(0, 256, (3, 64, w), dtype=torch.uint8) for w in (96, 70)]
    targets = random_targets([3, 5], 7)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    args = Namespace(device=torch.device("cpu"), dtype=torch.float32, accumulate=1, encoder_loss=0)
    train_voc.train_one_epoch(
        model, SetCriterion(7, HungarianMatcher()), optimizer,
        torch.amp.GradScaler("cpu", enabled=False), [list(zip(images, targets))] * 4, "", args)
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4)
    padded = pad_images([normalized(image) for image in images])
    for _ in range(4):
        layers, _ = peer_outputs(peer, *padded)
        peer_losses(layers, targets, 7)[1].backward()
        assert nn.utils.clip_grad_norm_(peer.parameters(), 0.1) > 0.1       # so much is clipped
        optimizer.step()
        optimizer.zero_grad()
    close(renamed(model.state_dict().items()), dict(peer.state_dict()), 1e-8)

def make_parts_equal(patch=setattr):
    """A trained norm has the statistics of its part of a batch, each part its own augmentation,
    and sums in bfloat16 depend on their parts."""
    shrink(patch, FrozenBatchNorm2d, dropout=0.0)
    patch(train_voc, "augmentation", lambda size, _: v2.Resize(size))
    patch(train_voc, "choose_dtype", lambda device: torch.float32)

def test_two_processes_and_accumulated_parts_train_as_one(run, monkeypatch):
    """With one object per training image, in the same place, a mean over parts is that of all."""
    voc([*STEMS, "a", "b"], train=STEMS[:8], val=[*STEMS[8:], "a", "b"])
    for path in Path("data/Annotations").iterdir():
        annotate(path.stem, [("cat", (20, 10, 60, 50))])
    annotate("a", [("cat", (20, 10, 60, 50)), ("cat", (5, 5, 9, 9))])
    make_parts_equal(monkeypatch.setattr)
    options = "--data data --model tiny --epochs 2 --batch-size 8 --device cpu --output "
    run(options + "one")
    run(options + "parts --accumulate 3")
    program = "import test_detr_mini as t\nt.make_parts_equal()\nt.train_voc.main()"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    printed = subprocess.check_output(
        [*torchrun, put("program.py", program), *f"{options}two".split()],
        env=os.environ | {"PYTHONPATH": str(HERE)}, text=True)
    assert printed.count("epoch 2/2") == 1                  # only the first process prints
    one, parts, two = ({name: value for name, value in log_of(output)[-1].items()
                        if "bbox" in name or "giou" in name} for output in ("one", "parts", "two"))
    close(parts, one, 1e-3)
    close(two, one, 1e-3)

def test_a_run_learns_and_leaves_log_checkpoints_and_curves(folder, run):
    printed = run("--epochs 6 --batch-size 2")
    assert "infer.py" in printed.splitlines()[-1]
    log = log_of("out")
    assert log[5]["train_loss"] < 0.9 * log[0]["train_loss"]
    assert log[0].keys() >= {"epoch", "lr", "train_loss_ce_0", "train_loss_giou_enc", "test_loss"}
    assert "test_loss_giou_enc" not in log[0]               # the encoder's is for training only
    assert Image.open("out/curves.png").width > 800
    loss = re.search(r"loss ([\d.]+)", run("--model out/best.pth --eval"))[1]
    assert min(abs(entry["test_loss"] - float(loss)) for entry in log) < 0.2

def test_a_run_needs_no_object_in_val_no_figure_and_no_torch_distributed(folder, run, monkeypatch):
    annotate("0008", [])
    annotate("0009", [])
    put("out/curves.png/a", "a folder in its place")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert re.search("warning: .*curves.png", run())
    assert load_detr("out/best.pth").classes == ["cat", "dog"]

@pytest.fixture
def stop(folder, run, monkeypatch):
    """Runs two epochs, which Ctrl-C stops after the first one."""
    def start(options):
        with monkeypatch.context() as patch:
            patch.setattr(train_voc, "draw_curves", mock.Mock(side_effect=KeyboardInterrupt))
            assert "--resume continues" in run(options, code=2)
    return start

@pytest.mark.parametrize("model", ["tiny", "weights.pth"])
def test_a_stopped_run_resumes_bit_for_bit_from_its_own_files(run, stop, weights, model):
    """Workers are not forked. A tensor in each of 120 records would be 120 files to send to one."""
    voc(range(120), train=range(120), val=STEMS)
    options = f"--model {model} --epochs 2 --batch-size 30 --workers 1 --seed 5 --count-difficult "
    torch.multiprocessing.set_start_method("forkserver", force=True)
    torch.multiprocessing.set_forkserver_preload(["torchvision"])       # to start faster
    stop(options)
    run(options + "--output whole")
    weights.unlink()
    assert train_voc.main("--resume --output out --device cpu".split()) == 0
    torch.multiprocessing.set_start_method(None, force=True)
    close(results_of("out"), results_of("whole"), 0)

@pytest.mark.parametrize("options, replace, message", [
    ("", os.replace, "checkpoint.pth .*--resume"),
    ("--resume --epochs 3", os.replace, "--epochs.*best.pth"),
    ("--resume --lr 1e38", os.replace, "finite"),
    ("--resume", mock.Mock(side_effect=OSError(28, "No space left")), "No space left")])
def test_a_run_that_fails_leaves_the_old_files(run, stop, monkeypatch, options, replace, message):
    stop("--epochs 2")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.setattr(os, "replace", replace)
    assert re.search(message, run(f"--epochs 2 {options}", code=2))
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before

@pytest.fixture
def seen(monkeypatch):
    """A list of calls, one for each image that a model is given in training or evaluation."""
    normalize = mock.Mock(wraps=train_voc.normalize)
    monkeypatch.setattr(train_voc, "normalize", normalize)
    return normalize.call_args_list

@pytest.mark.parametrize("size, max_size, options, sides, expected", [
    ((48, 64), None, "", {48, 64}, ((48, 64), None)), (32, None, "", {32}, (32, None)),
    (40, 60, "", range(22, 61), (40, 60)), (800, 1333, "--size 48", range(26, 81), (48, 80))])
def test_a_model_is_trained_at_the_size_that_it_infers_at(
        folder, run, weights, seen, size, max_size, options, sides, expected):
    config = {"nheads": 4, "size": size, "max_size": max_size}
    put(weights, torch.load(weights) | {"config": config})
    run(f"--model {weights} {options}")
    for call in seen:
        assert set(call.args[0].shape[1:]) <= set(sides)
    assert load_detr("out/best.pth").sizes == expected

def test_tiny_is_trained_and_evaluated_at_half_its_size_at_first(folder, run, seen):
    annotate("0009", [("wolf", (5, 5, 40, 40))])            # a class of val alone
    assert "classes: cat, dog, wolf" in run("--epochs 3")
    assert [call.args[0].shape[1:] for call in seen] == [(24, 32)] * 10 + [(48, 64)] * 20
    assert load_detr("out/best.pth").sizes == ((48, 64), None)

@pytest.mark.parametrize("epochs, half", [(3, 1), (100, 34), (400, 40)])
def test_tinys_size_is_half_for_a_third_of_the_run_but_40_epochs_at_most(epochs, half):
    sizes = [train_voc.tiny_sizes(epoch, epochs) for epoch in range(epochs)]
    assert sizes[:half] == [((96, 128), None)] * half
    assert sizes[half:] == [((192, 256), None)] * (epochs - half)

def test_difficult_objects_are_not_trained_on(folder, run, weights):
    found = read("--train", "train", "--val", "val")
    found.train.transform = v2.Identity()
    assert [len(target["labels"]) for _, target in found.train] == [1, 1, 0, 1, 1, 1, 1, 1]
    assert [len(target["labels"]) for _, target in found.val] == [1, 1]
    for stem in STEMS:
        annotate(stem, [("dog", (5, 5, 9, 9))] * 12, difficult=12)
    assert re.search("nothing to train on.*96 objects marked difficult", run(code=2))
    assert re.search("12 objects.* 9 queries", run(f"--eval --model {weights}"))

def test_cocos_weights_evaluate_and_fine_tune(folder, run):
    for stem in STEMS[::2]:
        annotate(stem, [("sofa", (5, 5, 40, 40)), ("cat", (5, 5, 40, 40))])
    state = small(91).state_dict()
    put("coco.pth", {"model": state, "config": CONFIG})
    last = run("--model coco.pth --eval --val train").splitlines()[-1]
    assert re.search("cat .*couch ", last)
    run("--model coco.pth --lr 0")
    head = read_checkpoint("out/checkpoint.pth")["model"]["class_embed.weight"]
    rows = [*map(detr_mini.COCO_CLASSES.index, ("cat", "dog", "couch")), 91]   # 91: "no object"
    assert torch.equal(head, state["class_embed.weight"][rows])
    del state["class_embed.weight"], state["class_embed.bias"]
    put("coco.pth", {"model": state, "config": CONFIG})
    assert "classes: cat, dog, sofa" in run("--model coco.pth --output headless")

def test_voc_is_unpacked_once_and_then_needs_no_network(folder, monkeypatch):
    archive = torchvision.datasets.voc.DATASET_YEAR_DICT["2012"]
    monkeypatch.setitem(archive, "url", "file:///nowhere/voc.tar")
    with pytest.raises(OSError, match="VOC2012.* by hand"):
        train_voc.load_data(train_voc.parse([]))
    file = Path("data", archive["filename"])
    with tarfile.open(file, "w") as tar:
        tar.add("data", "VOCdevkit/VOC2012")
    monkeypatch.setitem(archive, "md5", hashlib.md5(file.read_bytes()).hexdigest())
    for _ in range(2):
        records, _ = train_voc.load_data(train_voc.parse([]))
        assert len(records["train"]) == 8
        file.unlink(missing_ok=True)

@pytest.mark.parametrize("boxes, locations", [
    ([[0.5, 0.5, 0.3, 0.6]], {5: 0, 6: 0, 9: 0, 10: 0}),    # of 4x4: the four in its middle
    ([[0.1, 0.1, 0.01, 0.01]], {0: 0}),                     # none inside: the nearest
    ([[0.5, 0.5, 1.0, 1.0], [0.125, 0.125, 0.3, 0.3]],      # one in the other: the nearer centre
     {0: 1} | dict.fromkeys(range(1, 16), 0)),
    ([], {})])
def test_the_encoders_loss_equals_one_written_out(boxes, locations):
    torch.manual_seed(0)
    model, memory = small(), torch.randn(1, 16, 32)
    target = {"labels": torch.arange(len(boxes)), "boxes": torch.tensor(boxes).view(-1, 4)}
    losses = train_voc.encoder_losses(model, memory, (64, 64), [target])
    logits, predicted = model.class_embed(memory[0]), model.bbox_embed(memory[0]).sigmoid()
    classes = torch.tensor([locations.get(s, 3) for s in range(16)])        # 3 is "no object"
    close(losses["loss_ce_enc"], nn.functional.cross_entropy(logits, classes))
    true = target["boxes"][list(locations.values())]
    found, count = predicted[list(locations)], max(1, len(locations))
    close(losses["loss_bbox_enc"], nn.functional.l1_loss(found, true, reduction="sum") / count)
    close(losses["loss_giou_enc"], torchvision.ops.generalized_box_iou_loss(
        box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(true), reduction="sum") / count)

# ---- infer and README ----------------------------------------------------------------------------
@pytest.fixture
def see(weights, capsys, monkeypatch):
    """Runs infer.py with a small model in float32; returns its JSON entries and errors."""
    monkeypatch.setattr(infer, "choose_dtype", lambda device: torch.float32)

    def start(arguments, code=0):
        defaults = "--weights weights.pth --out seen --threshold 0 "
        assert infer.main((defaults + arguments).split(" ")) == code
        file, errors = Path("found.json"), capsys.readouterr().err.splitlines()
        return json.loads(file.read_text()) if file.exists() else None, errors
    return start

def test_every_kind_of_image_is_opened():
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (50, 1))
    grey, rgb = Image.fromarray(ramp), Image.fromarray(ramp).convert("RGB")
    kinds = {"a.webp": rgb, "a.tiff": rgb, "grey.png": grey, "cmyk.jpg": rgb.convert("CMYK"),
             "palette.png": grey.convert("P"), "rgba.png": grey.convert("RGBA"),
             "16.png": Image.fromarray(ramp.astype(np.uint16) * 257), "f.tiff": grey.convert("F"),
             "12.png": Image.fromarray(ramp.astype(np.uint16) * 16 + 15),
             "clear.png": Image.fromarray(np.dstack([0 * ramp, 255 - ramp]))}
    for name, image in kinds.items():
        put(name, image)
    put("exif.jpg", rgb.transpose(Image.Transpose.ROTATE_90), exif=SIDEWAYS)
    put("moving.gif", grey, save_all=True, append_images=[Image.new("L", (80, 50))])
    for path in Path().iterdir():
        seen = infer.open_image(path)
        assert seen.mode == "RGB" and seen.size == (80, 50), path
        assert np.abs(np.asarray(seen, dtype=int) - ramp[..., None]).mean() < 6, path

def test_one_bad_file_stops_no_other(see):
    good = put("good/0042.jpg", Image.effect_noise((80, 50), 90))
    put("cut.jpg", good.read_bytes()[:400])
    put("text.png", "no image")
    names = ["cut.jpg", "text.png", "nothing.jpg", "*.jpg"]
    results, errors = see(" ".join([*names, "good", "--json found.json"]), code=2)
    for name, line in zip(names, errors, strict=True):
        assert line.startswith(f"infer.py: error: {name}: ")
    [found] = detect(load_detr("weights.pth"), infer.open_image(good), 0.0)
    x0, y0, x1, y1 = found["boxes"][0].tolist()
    assert results[0] == {
        "image_id": 42, "file_name": "good/0042.jpg", "score": pytest.approx(found["scores"][0]),
        "category_id": found["labels"][0], "category_name": found["names"][0],
        "bbox": pytest.approx([x0, y0, x1 - x0, y1 - y0])}

def test_images_of_odd_sizes_and_names_are_drawn_as_jpeg(see, monkeypatch):
    sizes = {"x/a.png": (1, 300), "x/b.JPG": (700, 1), "y/A.png": (1, 1), "y/c.png": (2000, 1500),
             "y/①.jpg": (9, 9), "y/\udcff.jpg": (9, 9), "y/b_attention.jpg": (9, 9),
             "served.png": (60, 40)}
    for name, size in sizes.items():
        put(name, Image.new("RGB", size, "gray"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, timeout: open("served.png", "rb"))
    results, _ = see("x y https://x.org/far.png?size=big --json found.json --attention")
    assert len({result["image_id"] for result in results}) == len(sizes)
    drawings = [Image.open(path) for path in Path("seen").glob("*.jpg")]
    assert [drawing.format for drawing in drawings] == ["JPEG"] * 2 * len(sizes)

@pytest.mark.parametrize("arguments, message", [
    ("x --out x", "--out x"), ("x/1.jpg --out y/../x", "--out y/../x"),
    ("x --out link", "--out link"), ("link --out x", "--out x"),
    ("x --json x/1.jpg", "--json x/1.jpg"), ("x --json y", "--json y"),
    ("x y --json found.json", "x/1.jpg and y/01.png .* image_id"),
    ("x empty", "empty: .*no images"), ("x y/..", "y/..: .* folder"),
    ("x --threshold 70", "--threshold 70"), ("x --weights nowhere.pth", "nowhere.pth")])
def test_nothing_is_detected_if_an_option_cannot_be_kept(see, arguments, message):
    image = put("x/1.jpg", Image.effect_noise((80, 50), 90))
    before = image.read_bytes()
    put("y/01.png", Image.open(image))
    Path("link").symlink_to("x", target_is_directory=True)
    for name in ("model.h5", "drawing.psd", ".hidden.jpg"):
        put(f"empty/{name}", "")
    results, [error] = see(arguments, code=2)
    assert re.search(message, error), error
    assert results is None and not list(Path().glob("seen/*"))
    assert image.read_bytes() == before

def test_the_first_command_finds_the_cells_that_are_marked():
    """`python infer.py`: the white cell of each photograph, as BCCD marks it, and red ones."""
    marked = {"014": (236, 211, 379, 353), "017": (128, 215, 336, 391), "285": (181, 254, 400, 468)}
    subprocess.run([sys.executable, HERE / "infer.py", "--json", "found.json"])
    results = json.loads(Path("found.json").read_text())
    for number, box in marked.items():
        found = [result for result in results if result["image_id"] == f"BloodImage_00{number}"]
        names = [result["category_name"] for result in found]
        x, y, w, h = found[names.index("WBC")]["bbox"]
        assert box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor([box]).float()) > 0.5
        assert names.count("WBC") == 1 and 8 <= names.count("RBC") <= 40
    assert len(list(Path("detections").glob("*.jpg"))) == 3

def test_the_readmes_links_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 9
    for name, file, number in links:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        assert name.split(".")[-1] in line, (name, file, line)

def test_the_readmes_python_runs(monkeypatch):
    """With a small network in place of ResNet-50 and of the files to download."""
    peer = torchvision.models.resnet50()
    monkeypatch.setattr(torch.hub, "get_dir", str)
    monkeypatch.setitem(detr_mini.RESNETS, "resnet50", (detr_mini.Bottleneck, (1, 1, 1, 1)))
    monkeypatch.setattr(torchvision.models, "resnet50", lambda weights: peer)
    put(f"checkpoints/{ZOO['detr_resnet50']}", small(91, nheads=8).state_dict())
    put("cats.jpg", Image.effect_noise((80, 50), 90))
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 1
    variables = {}
    for block in blocks:
        exec(block, variables)

# ---- The benchmark: pytest -m bench -s -----------------------------------------------------------
DEVICE = infer.choose_device("auto")
BATCH = 16 if DEVICE.type == "cuda" else 1

@pytest.mark.bench
@pytest.mark.parametrize("dtype", {torch.float32, infer.choose_dtype(DEVICE)})
@pytest.mark.parametrize("train", [False, True])
def test_bench_beside_transformers(train, dtype):
    torch.backends.cuda.matmul.allow_tf32 = True
    model = DETR(aux_loss=train).to(DEVICE, memory_format=torch.channels_last).train(train)
    peer = in_transformers(model).to(DEVICE).train(train)
    peer.config.auxiliary_loss = train
    criterion = SetCriterion(91, HungarianMatcher()).to(DEVICE)
    images = torch.randn(BATCH, 3, 800, 1066, device=DEVICE)
    targets = [{name: value.to(DEVICE) for name, value in target.items()}
               for target in random_targets([10] * BATCH, 91)]

    def ours():
        return criterion.total(criterion(model(images), targets)) if train else model(images)

    def theirs():
        return peer(images, labels=targets).loss if train else peer(images)

    def work(forward, optimizer):
        with torch.autocast(DEVICE.type, dtype, dtype != torch.float32):
            with torch.set_grad_enabled(train):
                loss = forward()
        if train:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    speeds = []
    for forward, network in ((ours, model), (theirs, peer)):
        optimizer = torch.optim.AdamW(network.parameters(), 1e-6)
        names = {"work": work, "forward": forward, "optimizer": optimizer}
        timer = benchmark.Timer("work(forward, optimizer)", globals=names,
                                num_threads=torch.get_num_threads())
        speeds.append(BATCH / timer.blocked_autorange(min_run_time=9).median)
    print(f"\n{'step' if train else 'inference'} of {BATCH}, {dtype}, on {DEVICE}: "
          f"{speeds[0]:.2f} images/s, {speeds[0] / speeds[1]:.2f} times transformers")
