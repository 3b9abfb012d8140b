"""The tests. Numbers are compared with code nobody here wrote: transformers, torchvision, torch.nn,
pycocotools. `pytest -m bench -s` runs the benchmark, which `pytest` alone leaves out."""
import functools
import hashlib
import http.server
import itertools
import json
import os
import pathlib
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
from torchvision import tv_tensors
from torchvision.transforms import v2

import detr_mini
import infer
import train_voc
from detr_mini import (DETR, ZOO, FrozenBatchNorm2d, HungarianMatcher, ResNet,
                       SetCriterion, box_cxcywh_to_xyxy, box_iou, detect, fit, generalized_box_iou,
                       load_detr, pad_images, post_process, read_checkpoint)

HERE = pathlib.Path(__file__).parent

# ---- Helpers: models and numbers -----------------------------------------------------------------
def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=atol, atol=atol, check_dtype=False)

def normalized(image, size):
    image = v2.functional.resize(image, size)
    return v2.functional.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

def small(num_classes=3, norm=FrozenBatchNorm2d, nheads=4, dropout=0.0):
    torch.manual_seed(0)
    backbone = ResNet(detr_mini.BasicBlock, (1, 1, 1), width=16, norm=norm)
    model = DETR(num_classes, backbone, hidden_dim=32, nheads=nheads, enc_layers=1, dec_layers=2,
                 dim_feedforward=48, num_queries=9, dropout=dropout)
    model.sizes = (48, 64), None
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

RENAMED = [                     # from here to transformers
    ("backbone.0.body.", "model.backbone.model."), ("transformer", "model"), ("linear", "mlp.fc"),
    (r"(coder\.l.*)norm1", r"\1self_attn_layer_norm"), ("decoder.norm", "decoder.layernorm"),
    (r"(encoder.*)norm2|(decoder.*)norm3", r"\1\2final_layer_norm"), ("out_proj", "o_proj"),
    (r"(decoder\.l.*)norm2", r"\1encoder_attn_layer_norm"), ("multihead_attn", "encoder_attn"),
    ("query_embed", "model.query_position_embeddings"), ("input_proj", "model.input_projection"),
    ("class_embed", "class_labels_classifier"), ("bbox_embed", "bbox_predictor")]

def renamed(tensors):
    found = {}
    for name, tensor in tensors:
        for ours, theirs in RENAMED:
            name = re.sub(ours, theirs, name)
        parts = tensor.chunk(3) if "in_proj_" in name else [tensor]
        for letter, part in zip("qkv", parts):
            found[name.replace("in_proj_", f"{letter}_proj.")] = part
    return found

def in_transformers(model):
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
    for name, parameter in peer.model.backbone.model.named_parameters():    # as of others: A.4
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))
    return peer.eval()

def layers_of(peer, images, mask):
    """Each decoder layer's predictions in transformers, from the states of its plain forward pass:
    its auxiliary_loss feeds the normed state to the next layer, as the reference does not."""
    pixel_mask = None if mask is None else (~mask).long()
    last = peer(images, pixel_mask=pixel_mask, output_hidden_states=True)
    states = [peer.model.decoder.layernorm(state) for state in last.decoder_hidden_states[1:-1]]
    layers = [{"logits": peer.class_labels_classifier(state),
               "pred_boxes": peer.bbox_predictor(state).sigmoid()} for state in states]
    return [*layers, {"logits": last.logits, "pred_boxes": last.pred_boxes}]

def peer_losses(layers, targets, classes):
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    matcher = module.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    criterion = module.ImageLoss(matcher, classes, 0.1, ["labels", "boxes", "cardinality"])
    losses = criterion(layers[-1] | {"auxiliary_outputs": layers[:-1]}, targets)
    total = 0
    for loss, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)):
        total += weight * sum(losses[name] for name in losses if name.startswith(loss))
    return losses, total

# ---- Helpers: files, runs, network ---------------------------------------------------------------
STEMS = [f"{i:04}" for i in range(10)]
CONFIG = {"nheads": 4, "size": (48, 64), "max_size": None}         # small's
ARGS = Namespace(nheads=4, lr=1e-4, output_dir=pathlib.PosixPath("out"))       # as the reference's
XML, JPEG = "Annotations/0003.xml", "JPEGImages/0003.jpg"
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
LYING = Image.Exif()
LYING[0x0112] = 6                       # to be turned by 90 degrees

def put(path, content, **options):
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
    image.paste({"cat": (230, 60, 50), "dog": (60, 230, 80)}[name], (x, y, x + side, y + side))
    return image, [(name, (x + 1, y + 1, x + side, y + side))]

def bright(image):
    y, x = (image.max(0).values > 110).nonzero().T
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()

def xml(objects, size=(96, 64), difficult=()):
    """An annotation of [(class, box)]; `difficult` has the indices of the difficult ones."""
    body = ""
    for i, (name, box) in enumerate(objects):
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box)
        corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        body += (f"<object><name>{name}</name><difficult>{int(i in difficult)}</difficult>"
                 f"<bndbox>{corners}</bndbox></object>")
    return (f"<annotation><filename>of_another.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{body}</annotation>")

def voc(data, stems, images="JPEGImages/{}.jpg", xmls="Annotations/{}.xml", **sets):
    for i, stem in enumerate(stems):
        image, objects = scene(i)
        put(data / images.format(stem), image)
        put(data / xmls.format(stem), xml(objects))
    for name, listed in sets.items():
        put(data / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in listed))

def images_of(stems, images="JPEGImages/{}.jpg"):
    return {images.format(stem) for stem in stems}

@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"

@pytest.fixture
def folder(data):
    """Ten images, eight to train on; one has a difficult dog too, one no object, one only that."""
    voc(data, STEMS, train=STEMS[:8], val=STEMS[8:])
    put(data / "Annotations/0001.xml", xml(scene(1)[1] + [("dog", (1, 1, 20, 20))], difficult=[1]))
    put(data / "Annotations/0002.xml", xml([]))
    put(data / "Annotations/0009.xml", xml(scene(9)[1], difficult=[0]))
    return data

def shrink(patch=setattr, norm=nn.BatchNorm2d, dropout=0.2):
    patch(train_voc, "tiny", lambda num_classes: small(num_classes, norm, dropout=dropout))
    patch(train_voc, "TINY", train_voc.TINY | dict(
        epochs=4, batch_size=4, lr=2e-3, evaluate_every=1, early=0.5, eos_coef=0.1,
        rate=lambda done: 1 - done / 2))

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs train_voc.py; returns what was printed, the data sets, and the images' paths of each."""
    shrink(monkeypatch.setattr)
    numbers, made = itertools.count(), {}

    class Noted(train_voc.VOC):
        def __init__(self, records, classes, sizes, transform=None):
            super().__init__(records, classes, sizes, transform)
            made["train" if transform else "val"] = self
    monkeypatch.setattr(train_voc, "VOC", Noted)

    def start(data, *arguments, code=0, output=None):
        made.clear()
        capsys.readouterr()
        output = tmp_path / (output or f"out{next(numbers)}")
        defaults = ["--output", output, "--model", "tiny", "--epochs", 1, "--workers", 0,
                    "--device", "cpu", "--data", data]
        result = train_voc.main([str(argument) for argument in (*defaults, *arguments)])
        out, err = capsys.readouterr()
        assert result == code and err.count("\n") == (code == 2), err
        images = {part: {record["path"].relative_to(data).as_posix() for record in dataset.records}
                  for part, dataset in made.items()}
        return Namespace(out=out, err=err, output=output, sets=dict(made), **images)
    return start

def log_of(output):
    entries = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in entries]

@pytest.fixture
def weights(tmp_path):
    names, state = ["cat", "dog", "cow"], randomize(small()).state_dict()
    return put(tmp_path / "weights.pth", {"model": state, "classes": names, "config": CONFIG})

@pytest.fixture
def server(tmp_path):
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()

# ---- detr_mini -----------------------------------------------------------------------------------
def test_boxes_equal_torchvision(double):
    a, b = box_cxcywh_to_xyxy(random_boxes(50)), box_cxcywh_to_xyxy(random_boxes(70))
    close(box_iou(a, b), torchvision.ops.box_iou(a, b), 1e-10)
    close(generalized_box_iou(a, b), torchvision.ops.generalized_box_iou(a, b), 1e-10)
    close(box_cxcywh_to_xyxy(detr_mini.box_xyxy_to_cxcywh(a)), a, 1e-12)

def test_backbone_equals_torchvision(double):
    peer = randomize(torchvision.models.resnet18())
    state = {name: value for name, value in peer.state_dict().items() if "fc." not in name}
    stages, x = nn.Sequential(*list(peer.children())[:-2]), torch.randn(4, 3, 65, 97)
    trained = ResNet(*detr_mini.RESNETS["resnet18"], norm=nn.BatchNorm2d)
    frozen = ResNet(*detr_mini.RESNETS["resnet18"])
    trained.load_state_dict(state)
    frozen.load_state_dict({name: state[name] for name in frozen.state_dict()})
    close(frozen.train()(x), stages.eval()(x), 1e-8)
    close(trained.eval()(x), stages(x), 1e-8)
    close(trained.train()(x), stages.train()(x), 1e-8)

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
    images = [torch.randn(3, *size, dtype=dtype) for size in sizes]
    for module in model.modules():
        module.keep_weights = len(sizes) == 1               # both forms of attention
    with torch.no_grad():
        ours = model(images)
        expected = layers_of(peer, *pad_images(images))
    for layer, peers in zip([*ours["aux_outputs"], ours], expected, strict=True):
        close(layer["pred_logits"], peers["logits"], atol)
        close(layer["pred_boxes"], peers["pred_boxes"], atol)
    assert ours["pred_boxes"].dtype == dtype

@pytest.mark.parametrize("objects", [[3, 5, 1], [0, 4, 0], [0, 0, 0], [12, 30, 2]])
@pytest.mark.parametrize("earlier_layers", [0, 3])
def test_matching_losses_and_gradients_equal_transformers(double, objects, earlier_layers):
    criterion, targets = SetCriterion(6, HungarianMatcher()), random_targets(objects, 6)
    layers = [random_outputs(3, 12, 6, seed) for seed in range(earlier_layers + 1)]
    last = layers[-1]
    leaves = [layer[name].requires_grad_() for layer in layers for name in ("logits", "pred_boxes")]
    losses = criterion(last | {"aux_outputs": layers[:-1]}, targets)
    expected, total = peer_losses(layers, targets, 6)
    for name, value in expected.items():                    # its cardinality_error is a float32
        close(losses[name], torch.as_tensor(value), 1e-6 if "error" in name else 1e-8)
    right = torch.cat([last["logits"][b, queries].argmax(-1) == targets[b]["labels"][indices]
                       for b, (queries, indices) in enumerate(criterion.matcher(last, targets))])
    close(losses["class_error"], 100 - 100 * right.double().mean().nan_to_num(0), 1e-5)
    gradients = torch.autograd.grad(criterion.total(losses), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        close(ours, theirs, 1e-8)

@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_of_any_width_but_not_out_of_range_and_boxes_an_empty_list(dtype):
    criterion, outputs = SetCriterion(6, HungarianMatcher()), random_outputs(3, 12, 6)
    targets = random_targets([3, 0, 2], 6)
    narrow = [target | {"labels": target["labels"].to(dtype)} for target in targets]
    narrow[1]["boxes"] = torch.tensor([])
    close(criterion(outputs, narrow), criterion(outputs, targets), 1e-6)
    for label in (6, -1):
        targets[2]["labels"] = torch.tensor([0, label])
        with pytest.raises(ValueError, match=f"image 2 .*label {label} .*0 to 5"):
            criterion(outputs, targets)

def test_the_mean_over_processes_of_box_losses_is_the_whole_batchs(monkeypatch):
    criterion, outputs = SetCriterion(6, HungarianMatcher()), random_outputs(4, 12, 6)
    targets = random_targets([1, 2, 9, 0], 6)
    whole = criterion(outputs, targets)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number: number.fill_(1 + 2 + 9))
    one, two = (criterion({name: value[half] for name, value in outputs.items()}, targets[half])
                for half in (slice(0, 2), slice(2, 4)))
    close(one["loss_giou"] + two["loss_giou"], 2 * whole["loss_giou"], 1e-5)

def test_fit_is_the_references_arithmetic_or_a_fixed_size():
    """That of get_size_with_aspect_ratio in facebookresearch/detr, datasets/transforms.py."""
    sides = [*range(30, 700, 37), 480, 640, 800, 1333, 1500, 4000]
    for h, w, (size, limit) in itertools.product(sides, sides, ((800, 1333), (192, 341))):
        short, long = min(h, w), max(h, w)
        best = int(round(limit * short / long)) if long / short * size > limit else size
        other = int(best * long / short)
        assert fit(h, w, size, limit) == ((other, best) if w < h else (best, other)), (h, w)
    assert fit(100, 500, 800, 1333) == (267, 1335) and fit(1, 5000, 800, 1333)[0] == 1

@pytest.mark.parametrize("sizes, expected", [
    ((32, None), (32, 32)), (((48, 64), None), (48, 64)), ((40, 60), (33, 59))])
def test_detect_takes_images_and_tensors_and_sorts(sizes, expected):
    model = randomize(small())
    model.sizes = sizes
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    tensor = torch.from_numpy(noise).permute(2, 0, 1)
    [found] = detect(model, Image.fromarray(noise), 0.0)
    assert sorted(found["queries"].tolist()) == list(range(9)) and len(found["names"]) == 9
    assert (found["scores"].diff() <= 0).all() and detect(model, tensor, 1.0)[0]["names"] == []
    resized = nn.functional.interpolate(tensor[None], expected, mode="bilinear", antialias=True)
    with torch.no_grad():                                   # by hand: exactly the same pixels
        [by_hand] = post_process(model(detr_mini.normalize(resized)), [(50, 90)])
        outputs = model([normalized(tensor / 255, expected)])
    assert torch.equal(found["scores"], by_hand["scores"][found["queries"]])
    module = pytest.importorskip("transformers.models.detr.image_processing_detr")
    outputs = Namespace(logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])
    [peer] = module.DetrImageProcessor().post_process_object_detection(outputs, 0.0, [(50, 90)])
    [found] = detect(model, [tensor / 255], threshold=0.0)
    close({k: found[k] for k in peer}, {k: v[found["queries"]] for k, v in peer.items()}, 1e-3)
    found["boxes"] += 1                                     # an inference tensor would refuse
    for wrong in ("cats.jpg", noise, *(Image.new(mode, (9, 9)) for mode in ("F", "RGBA", "L"))):
        with pytest.raises(TypeError, match="open_image"):
            detect(model, wrong)

@pytest.mark.parametrize("prefix, wrap", [
    ("", lambda state: {"model": state, "config": {"nheads": 4}, "epoch": 3}),
    ("", lambda state: {"model": state, "args": ARGS, "epoch": 3}),
    ("module.", lambda state: {"model": state, "args": ARGS}),
    ("model.", lambda state: {"state_dict": state, "hyper_parameters": {"nheads": 4}}),
    ("", lambda state: {"model_state_dict": state, "args": {"nheads": 4}}),
    ("", lambda state: state)], ids=["ours", "reference", "DDP", "Lightning", "tutorials", "bare"])
def test_checkpoints_of_other_programs_load(tmp_path, prefix, wrap):
    nheads = 4 if wrap({}) else 8                           # if nobody says
    model = randomize(small(22, norm=nn.BatchNorm2d, nheads=nheads))
    state = {prefix + name: value for name, value in model.state_dict().items()}
    loaded = load_detr(put(tmp_path / "a.pth", wrap(state)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(loaded(x)["pred_boxes"], model(x)["pred_boxes"], 1e-6)
    assert not loaded.training and len(loaded.classes) == 22 and loaded.sizes == (800, 1333)

@pytest.mark.parametrize("zoo", [False, True])
def test_what_cannot_be_loaded_is_refused_and_code_is_not_run(tmp_path, weights, monkeypatch, zoo):
    marker, state = tmp_path / "it_ran", small().state_dict()
    code = f"cos\nsystem\n(S'touch {marker}'\ntR."                  # a pickle that calls os.system
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / ZOO["detr_resnet50"]
    files = [(content, f"{path.name} is no.*never run")
             for content in (weights.read_bytes()[:3000], "", "\xff\xd8\xff", code, small())]
    files += [({key: state[key] for key in state if key != name}, name)
              for name in ("class_embed.bias", "transformer.encoder.layers.0.norm1.bias")]
    files += [(state | {name: torch.zeros(shape)}, name)
              for name, shape in (("neck.weight", 1), ("query_embed.weight", (9, 33)))]
    for content, message in (*files, (torchvision.models.resnet18().state_dict(), "input_proj")):
        with pytest.raises(ValueError, match=f"(?s).*{message}"):
            put(path, content)
            load_detr("detr_resnet50" if zoo else path)
    assert not marker.exists()

# ---- train_voc: the data's four rules ------------------------------------------------------------
@pytest.mark.parametrize("where, line", [
    ("VOC2007/", "  {}.xml  \r"), ("hardhat/VOC2028/", "C:\\JPEGImages\\{}.JPG\n")])
def test_lists_are_sets_wherever_they_lie_and_as_programs_write_them(data, run, where, line):
    stems = [f"a {i}" for i in range(12)]
    lines = [line.format(stem) for stem in stems]
    voc(data / where, stems, val=lines[5:7], trainval=lines[:7], test=lines[7:])
    put(data / where / "ImageSets/Main/train.txt", "\ufeff" + "\n".join(lines[:5]))
    put(data / "VOC2007.zip", "PK")
    images = where + "JPEGImages/{}.jpg"
    done = run(data)
    assert done.train == images_of(stems[:5], images) and done.val == images_of(stems[5:7], images)
    voc(data / "VOC2012", STEMS, train=STEMS[:5])           # from now on there are two lists
    names = ["--train", where + "trainval", "VOC2012/train", "--val", where + "test"]
    done, more = run(data, *names), images_of(STEMS[:5], "VOC2012/JPEGImages/{}.jpg")
    assert done.train == images_of(stems[:7], images) | more
    assert done.val == images_of(stems[7:], images)
    assert "name one, such as " in run(data, code=2).err

@pytest.mark.parametrize("images, xmls, train, val", [
    ("{0}/images/{{}}.jpg", "{0}/labels/{{}}.xml", "train", "val"),
    ("{0}/{{}}_jpg.rf.0a1b.jpg", "{0}/{{}}_jpg.rf.0a1b.xml", "train", "valid"),
    ("images/{0}/{{}}.jpg", "labels/{0}/{{}}.xml", "training", "Validation"),
    ("images/{0}/{0}{{}}.jpg", "annotations/{0}/xml/{0}{{}}.xml", "Train", "Valid")])
def test_folders_are_sets_and_may_hold_equal_names(data, run, images, xmls, train, val):
    expected = []
    for part, count in ((train, 6), (val, 3), ("test", 2)):
        voc(data, STEMS[:count], images.format(part), xmls.format(part))
        expected.append(images_of(STEMS[:count], images.format(part)))
    done = run(data)
    assert [done.train, done.val, run(data, "--val", "test").val] == expected

def test_a_split_by_chance_is_announced_and_hardly_changed_by_added_images(data, run, weights):
    stems = [f"Screenshot ({i})" for i in range(50)] + [f"A ({i})" for i in range(5)]
    voc(data, stems[:50], default=stems[:50])
    old = run(data)
    assert (len(old.train), len(old.val)) == (40, 10) and "split" in old.out
    voc(data, stems)
    new = run(data)
    assert new.train | new.val == images_of(stems) and not new.train & new.val
    assert len(new.train & old.val) <= 1
    every = run(data, "--eval", "--model", weights)
    assert every.val == images_of(stems) and "train" not in every.sets

@pytest.mark.parametrize("images, xmls, decoy", [
    ("images/{}.jpg", "annotations/xmls/{}.xml", "annotations/trimaps/{}.png"),
    ("images/{}.png", "annotations/xmls/{}.xml", "annotations/xmls/{}.jpg"),
    ("images/a/{}.jpg", "labels/a/{}.xml", "images/b/{}.jpg"), ("a/{}.jpg", "a/{}.xml", "b/{}.jpg"),
    ("JPEGImages/e\u0301{}.jpg", "Annotations/\u00e9{}.xml", "results/e\u0301{}.jpg"),
    ("JPEGImages/{}.jfif", "Annotations/{}.XML", "JPEGImages/._{}.jfif"),
    ("JPEGImages/{}.jpg", "Annotations/{}.jpg.xml", "__MACOSX/JPEGImages/{}.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", ".idea/{}.xml"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "{}/annotations.xml")])
def test_files_that_are_not_meant_are_not_taken(data, run, images, xmls, decoy):
    voc(data, STEMS, images, xmls)
    for stem in STEMS:
        put(data / decoy.format(stem), "<annotations><image/></annotations>")
    done = run(data)
    assert done.out.startswith("train: 8 images, 8 objects\nval: 2 images, 2 objects\n")
    assert done.train | done.val == images_of(STEMS, images)

@pytest.mark.parametrize("spoil, message", [
    (lambda d: put(d / XML, "<annotation><object>"), XML), (lambda d: put(d / XML, ""), XML),
    (lambda d: put(d / XML, xml([("cat", (1, 2, 3))])), f"{XML}.*bndbox"),
    (lambda d: put(d / XML, xml([("cat", (0.1, 0.2, 0.5, 1))])), f"{XML}.* 0 to 1.*pixels"),
    (lambda d: (d / JPEG).unlink(), f"{XML}.* image 0003"),
    (lambda d: [put(path, path.read_bytes()[:500]) for path in d.glob("*/000[234].jpg")],
     "3 files.*0002.jpg.*0003.jpg.*0004.jpg"),
    (lambda d: shutil.copytree(d / "JPEGImages", d / "images"), f"{XML}.*/images/0003.jpg"),
    (lambda d: shutil.copy(d / XML, d / "0003.xml"), f"data/0003.xml and .*{XML} "),
    (lambda d: voc(d, [], train=["0001", "0077"], val=["0002"]), "train.txt.*'0077'"),
    (lambda d: voc(d, [], train=["0001"], val=[]), "val .*has annotations"),
    (lambda d: voc(d, [], train=["0001"]), "no list or folder val"),
    (lambda d: [put(path, path.read_text().replace("<difficult>0", "<difficult>1"))
                for path in d.glob("*/*.xml")], "nothing to train on.*8 marked difficult")])
def test_bad_data_is_named_before_the_first_step(data, run, spoil, message):
    voc(data, STEMS)
    spoil(data)
    done = run(data, code=2)
    assert re.search(message, done.err), done.err
    assert "epoch" not in done.out and not list(done.output.glob("*"))

def test_what_is_odd_is_counted_and_classes_are_those_of_all_sets(data, run):
    voc(data, STEMS, "JPEGImages/{}.png", train=STEMS[:9], val=STEMS[8:])
    put(data / "Annotations/0001.xml", xml([("dog", (-5, 3.5, 200, 40.25)), ("cat", (9, 9, 5, 5))]))
    put(data / "Annotations/0002.xml", xml(scene(2)[1], size=(640, 480)))
    put(data / "Annotations/0003.xml", xml([("dog", (5, 5, 9, 9))] * 12).encode("utf-16"))
    put(data / "Annotations/0004.xml", xml(scene(4)[1]).replace("annotation>", "Annotation>"))
    put(data / "Annotations/0009.xml", xml([("wolf", (5, 5, 40, 40))]))
    twelve_bits = np.asarray(scene(9)[0].convert("L")).astype(np.uint16) * 16
    path = put(data / "JPEGImages/0009.png", Image.fromarray(twelve_bits))
    done = run(data)
    for words in ("train: 9 images, 20 objects", "1 clipped", "1 without area", "12 objects .* 9 ",
                  "1 not of .*<size>.*0002.png", "1 images .*train and in val", "cat, dog, wolf\n"):
        assert re.search(words, done.out), (words, done.out)
    assert done.sets["train"].records[1]["boxes"].tolist() == [[0, 2.5, 96, 40.25]]
    seen = v2.functional.pil_to_tensor(infer.open_image(path))      # training sees the same
    assert torch.equal(done.sets["val"][1][0], v2.functional.resize(seen, (48, 64)))

@pytest.mark.parametrize("size", [(64, 96), (96, 64)])
def test_boxes_are_of_the_upright_image_or_by_size_of_the_stored_one(data, run, size):
    for i, stem in enumerate(STEMS):
        image, objects = scene(i, size)
        if size == (64, 96):                                # else it was marked as it is stored
            image = image.transpose(Image.Transpose.ROTATE_90)
        put(data / f"{stem}.jpg", image, exif=LYING)
        put(data / f"{stem}.xml", xml(objects, size))
    done = run(data)
    assert done.out.startswith("train: 8 images, 8 objects\nval: 2 images, 2 objects\n")
    for image, target in done.sets["val"]:
        box = box_cxcywh_to_xyxy(target["boxes"][0]) * torch.tensor([64, 48, 64, 48])
        close(bright(image), box, 1.5)

@pytest.mark.parametrize("sizes, shorter_sides", [
    ((800, 1333, False), set(range(480, 801, 32))), ((200, 333, False), set(range(120, 201, 8))),
    (((192, 256), None, False), {192}), (((192, 256), None, True), {96})])
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
    assert len(on_the_right) > 40 and 0.2 < np.mean(on_the_right) < 0.8         # flips
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
    for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
        step()
    precision = evaluator.eval["precision"][0, :, :, 0, 2]          # all -1 if there is no object
    return [*evaluator.stats[:6], *precision.mean(0)]

def random_case(rng, images, classes, most):
    """Objects of all sizes, and detections of which most are near one; some scores are equal."""
    predictions, targets = [], []
    for m in rng.integers(1, most, images):
        corner = rng.uniform(0, 300, (m, 2)).round()
        boxes = np.concatenate((corner, corner + np.exp(rng.uniform(2, 5.5, (m, 2)))), 1)
        labels, ignore = rng.integers(0, classes, m), rng.integers(0, 5, m) // 4
        targets.append(dict(labels=labels, boxes=boxes, scores=labels, ignore=ignore))
        n = rng.integers(0, 2 * most)
        picks = rng.integers(0, m, n)
        near = boxes[picks] + rng.normal(0, 12, (n, 4)) * (rng.random((n, 1)) < 0.8)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guess = np.where(rng.random(n) < 0.8, labels[picks], rng.integers(0, classes, n))
        scores = rng.random(n).round(rng.choice((1, 9)))
        predictions.append(dict(labels=guess, boxes=near, scores=scores, ignore=0 * picks))
    return predictions, targets

@pytest.mark.parametrize("images, classes, most", [(8, 3, 12), (3, 5, 3), (2, 1, 90)])
def test_ap_equals_pycocotools(images, classes, most):
    """With up to 90 objects, some images have more than 100 detections."""
    rng = np.random.default_rng(images)
    for _ in range(30 if most < 90 else 3):
        predictions, targets = random_case(rng, images, classes, most)
        ap = train_voc.coco_ap(predictions, targets, classes + 1)   # one class is never there
        numbers = [ap[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        expected = peer_ap(predictions, targets, classes + 1)
        assert [*numbers, *ap["AP50_per_class"]] == pytest.approx(expected, abs=1e-9)

# ---- train_voc: training -------------------------------------------------------------------------
def test_training_steps_end_in_the_weights_of_transformers(double):
    model = DETR(7, enc_layers=2, dec_layers=2, num_queries=20, dropout=0.0, aux_loss=True)
    peer = in_transformers(randomize(model)).train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert renamed(trained).keys() == {n for n, p in peer.named_parameters() if p.requires_grad}
    images = [torch.randint(0, 256, (3, 64, w), dtype=torch.uint8) for w in (96, 70)]
    targets = random_targets([3, 5], 7)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    args = Namespace(device=torch.device("cpu"), dtype=torch.float32, accumulate=1)
    train_voc.train_one_epoch(model, SetCriterion(7, HungarianMatcher()), optimizer, constant,
                              scaler, [list(zip(images, targets))] * 4, "", args)
    optimizer = torch.optim.AdamW(peer.parameters(), 1e-4)
    padded = pad_images([normalized(image / 255, image.shape[1:]) for image in images])
    for _ in range(4):
        _, loss = peer_losses(layers_of(peer, *padded), targets, 7)
        loss.backward()
        assert nn.utils.clip_grad_norm_(peer.parameters(), 0.1) > 0.1       # so much is clipped
        optimizer.step()
        optimizer.zero_grad()
    close(renamed(model.state_dict().items()), dict(peer.state_dict()), 1e-8)

KILLED = """
t.shrink()
replace, saves = os.replace, t.itertools.count()
def killed(source, target):
    if target.name == "checkpoint.pth" and next(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
"""
PLAIN = """
t.shrink(norm=t.FrozenBatchNorm2d, dropout=0.0)     # a trained norm has statistics of its part,
t.train_voc.augmentation = lambda size, *_, **__: t.v2.Resize(size)     # each its own augmentation
t.torch.cpu.get_capabilities = dict                 # and sums in bfloat16 depend on their parts
"""

def launch(patches, data, output, *more, torchrun=()):
    program = put(output.with_suffix(".py"), "import os, signal, sys, test_detr_mini as t\n"
                  f"{patches}if __name__ == '__main__':\n    sys.exit(t.train_voc.main())\n")
    command = [sys.executable, *torchrun, program, "--data", data, "--output", output,
               "--model", "tiny", "--device", "cpu", *more]
    return subprocess.run(map(str, command), env=os.environ | {"PYTHONPATH": str(HERE)},
                          cwd=output.parent, capture_output=True, text=True)

def test_killed_while_it_saves_it_resumes_bit_for_bit_with_its_options(folder, tmp_path, run):
    options = "--workers", 2, "--batch-size", 3, "--seed", 5, "--count-difficult"
    whole, killed = run(folder, "--epochs", 4, *options).output, tmp_path / "killed"
    done = launch(KILLED, folder, killed, *options)
    assert done.returncode == -9 and (killed / "checkpoint.pth.tmp").exists(), done.stderr
    resume = ["--resume", "--output", str(killed), "--device", "cpu", "--workers", "2"]
    assert train_voc.main(resume) == 0
    states = [read_checkpoint(output / "checkpoint.pth")["model"] for output in (killed, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert log_of(killed) == log_of(whole)
    assert log_of(killed)[-1]["test_ap50_per_class"][1] > -1       # difficult ones are counted

def test_two_processes_and_accumulated_parts_train_as_one(data, tmp_path):
    """With one object in each image, every mean over a part is also the mean over the whole."""
    voc(data, [*STEMS, "a", "b"], train=STEMS[:8], val=[*STEMS[8:], "a", "b"])
    logs = []
    for output, parts, torchrun in (("one", 1, ()), ("parts", 3, ()), ("two", 1, TORCHRUN)):
        done = launch(PLAIN, data, tmp_path / output, "--batch-size", 8, "--accumulate", parts,
                      torchrun=torchrun)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch 4/4") == 1          # only the first process prints
        [*_, last] = log_of(tmp_path / output)
        logs.append({name: torch.tensor(last[name]) for name in last if name.startswith("test")})
    close(logs[1], logs[0], 1e-3)
    close(logs[2], logs[0], 1e-3)

def test_workers_that_are_not_forked_train_120_images(data, tmp_path):
    """A tensor in a record is a file to send. The images are behind links, one of them a circle."""
    voc(tmp_path / "disk", range(120))
    data.mkdir()
    for name, target in zip("abc", ("disk/JPEGImages", "disk/Annotations", "data")):
        (data / name).symlink_to(tmp_path / target)
    forkserver = ("if __name__ == '__main__':\n    t.shrink()\n"
                  "    t.torch.multiprocessing.set_start_method('forkserver')\n")
    done = launch(forkserver, data, tmp_path / "out", "--epochs", 1, "--workers", 1)
    assert done.returncode == 0 and "train: 96 images, 96 objects" in done.stdout, done.stderr

def test_a_run_learns_and_leaves_log_checkpoints_and_curves(folder, run):
    done = run(folder, "--epochs", 12, "--batch-size", 2)
    log = log_of(done.output)
    losses = [entry["train_loss"] for entry in log]
    assert len(log) == 12 and np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert {"epoch", "lr", "train_loss_ce_0", "test_cardinality_error"} <= set(log[0])
    assert len(log[0]["test_coco_eval_bbox"]) == 6
    assert log[0]["test_ap50_per_class"] == [pytest.approx(0.5, abs=0.5), -1]      # none to find
    assert Image.open(done.output / "curves.png").width > 800
    assert "infer.py" in done.out.splitlines()[-1]
    out = run(folder, "--model", done.output / "best.pth", "--eval").out
    loss = float(re.search(r"loss ([\d.]+)", out)[1])
    assert min(abs(entry["test_loss"] - loss) for entry in log) < 0.2

def test_neither_a_val_without_objects_nor_a_figure_stops_a_run(folder, run, tmp_path):
    put(folder / "Annotations/0008.xml", xml([]))
    put(tmp_path / "new/curves.png/a", "a folder in its place")
    done = run(folder, output="new")
    assert re.search("warning: .*curves.png", done.out)
    assert load_detr(done.output / "best.pth").classes == ["cat", "dog"]

def full(*_):
    raise OSError(28, "No space left on device")

@pytest.mark.parametrize("resume, fail, message", [
    ([], lambda patch: None, "checkpoint.pth .*--resume"),
    (["--resume"], lambda patch: patch.setattr(os, "replace", full), "No space left"),
    (["--resume"], lambda patch: patch.setitem(train_voc.TINY, "lr_backbone", np.nan), "finite")])
def test_a_run_that_fails_leaves_the_old_files(folder, run, monkeypatch, resume, fail, message):
    output = run(folder).output
    before = {path: path.read_bytes() for path in output.iterdir()}
    fail(monkeypatch)
    err = run(folder, "--epochs", 2, *resume, output=output.name, code=2).err
    assert re.search(message, err), err
    assert {path: path.read_bytes() for path in output.iterdir()} == before

@pytest.mark.parametrize("size, max_size, heights, widths", [
    ((48, 64), None, {48}, {64}), (32, None, {32}, {32}), (40, 60, range(22, 61), range(22, 61))])
def test_a_model_is_trained_at_the_size_that_it_infers_at(
        folder, run, weights, size, max_size, heights, widths):
    config = {"nheads": 4, "size": size, "max_size": max_size}
    done = run(folder, "--model", put(weights, torch.load(weights) | {"config": config}))
    for image, target in [*done.sets["train"], *done.sets["val"]]:
        assert image.shape[1] in heights and image.shape[2] in widths
        assert len(target["labels"]) <= 1                   # the difficult one is not trained on
    best = load_detr(done.output / "best.pth")
    assert best.sizes == (size, max_size) and best.classes == ["cat", "dog"]
    old, new = load_detr(weights), load_detr(weights, num_classes=20)
    assert old.classes == load_detr(weights, num_classes=3).classes == ["cat", "dog", "cow"]
    assert new.class_embed.weight.shape == (21, 32) and len(new.classes) == 20

def test_cocos_weights_evaluate_and_fine_tune(folder, tmp_path, run):
    for path in (folder / "Annotations").iterdir():
        put(path, path.read_text().replace("dog", "sofa"))
    state = small(91).state_dict()
    coco = put(tmp_path / "coco.pth", {"model": state, "config": CONFIG})
    last = run(folder, "--model", coco, "--eval", "--val", "train").out.splitlines()[-1]
    assert re.search("cat .*couch ", last) and "sofa" not in last and "dog" not in last
    done = run(folder, "--model", coco, "--lr", 0)
    head = read_checkpoint(done.output / "checkpoint.pth")["model"]["class_embed.weight"]
    rows = [*map(detr_mini.COCO_CLASSES.index, ("cat", "couch")), 91]       # 91 is "no object"
    assert torch.equal(head, state["class_embed.weight"][rows])
    del state["class_embed.weight"], state["class_embed.bias"]
    put(coco, {"model": state, "config": CONFIG})
    assert "classes: cat, sofa" in run(folder, "--model", coco).out

@pytest.mark.parametrize("script, arguments, message", [
    (train_voc, "--model nowhere.pth", "nowhere.pth"), (train_voc, "--resume", "checkpoint.pth"),
    (train_voc, "--epochs 0", "--epochs"), (train_voc, "--device abacus", "--device abacus"),
    (train_voc, "--eval", "tiny"), (train_voc, f"--output {__file__}/out", "test_detr_mini.py"),
    (train_voc, "--train night", "night"), (train_voc, "--data nowhere", "nowhere"),
    (infer, "--weights nowhere.pth", "nowhere.pth"), (infer, "--threshold 70", "--threshold 70")])
def test_wrong_arguments_are_explained(folder, tmp_path, capsys, script, arguments, message):
    defaults = {train_voc: f"--data {folder} --model tiny --output {tmp_path}/out --epochs 1 ",
                infer: f"--weights demo --out {tmp_path} "}
    assert script.main((defaults[script] + arguments).split()) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and "epoch" not in printed.out
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert f"python {script.__name__}.py " in capsys.readouterr().out

def test_voc_is_fetched_and_unpacked_once(folder, server, tmp_path, monkeypatch, capfd):
    root, url = server
    with tarfile.open(root / "voc.tar", "w") as tar:
        tar.add(folder, "VOCdevkit/VOC2012")
    archive = dict(torchvision.datasets.voc.DATASET_YEAR_DICT["2012"], url=url + "voc.tar")
    monkeypatch.setitem(torchvision.datasets.voc.DATASET_YEAR_DICT, "2012", archive)
    monkeypatch.chdir(put(tmp_path / "here/a", "").parent)
    shrink(monkeypatch.setattr)
    arguments = ["--model", "tiny", "--epochs", "1", "--device", "cpu", "--output"]
    assert train_voc.main([*arguments, "out"]) == 2         # its MD5 is another
    assert re.search("VOC2012.* by hand", capfd.readouterr().err.splitlines()[-1])
    archive["md5"] = hashlib.md5((root / "voc.tar").read_bytes()).hexdigest()
    assert train_voc.main([*arguments, "fetched"]) == 0
    (root / "voc.tar").unlink()                             # from now on there is no network
    assert train_voc.main([*arguments, "again"]) == 0
    shutil.rmtree("data/VOCdevkit")                         # its tar file is still there
    assert train_voc.main([*arguments, "unpacked"]) == 0
    assert capfd.readouterr().out.count("train: 8 images, 8 objects") == 3

# ---- infer ---------------------------------------------------------------------------------------
@pytest.fixture
def see(tmp_path, weights, capsys):
    def start(*sources, code=0, out="seen"):
        file = tmp_path / "found.json"
        arguments = ["--weights", weights, "--out", tmp_path / out, "--json", file,
                     "--threshold", 0, "--device", "cpu"]
        assert infer.main([str(argument) for argument in (*sources, *arguments)]) == code
        return json.loads(file.read_text()), capsys.readouterr().err.splitlines()
    return start

def test_every_kind_of_image_is_opened(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (50, 1))
    grey, rgb = Image.fromarray(ramp), Image.fromarray(ramp).convert("RGB")
    kinds = {"a.webp": rgb, "a.tiff": rgb, "grey.png": grey, "cmyk.jpg": rgb.convert("CMYK"),
             "palette.png": grey.convert("P"), "rgba.png": grey.convert("RGBA"),
             "16.png": Image.fromarray(ramp.astype(np.uint16) * 257), "f.tiff": grey.convert("F"),
             "12.png": Image.fromarray(ramp.astype(np.uint16) * 16 + 15),
             "clear.png": Image.fromarray(np.dstack([0 * ramp, 255 - ramp]))}
    for name, image in kinds.items():
        put(tmp_path / name, image)
    put(tmp_path / "lying.jpg", rgb.transpose(Image.Transpose.ROTATE_90), exif=LYING)
    put(tmp_path / "moving.gif", grey, save_all=True, append_images=[Image.new("L", (80, 50))])
    for path in tmp_path.iterdir():
        seen = infer.open_image(path)
        assert seen.mode == "RGB" and seen.size == (80, 50), path
        assert np.abs(np.asarray(seen, dtype=int) - ramp[..., None]).mean() < 6, path

def test_one_bad_file_stops_no_other(tmp_path, see):
    broken = Image.Exif()
    broken.update(LYING)
    broken[0x010F] = "text"             # as a number's tag: Pillow raises struct.error
    broken = broken.tobytes().replace(b"\x01\x0f", b"\x01\x07")
    good = put(tmp_path / "good/0042.jpg", Image.effect_noise((80, 50), 90))
    put(tmp_path / "exif.jpg", Image.open(good), exif=broken)
    put(tmp_path / "cut.jpg", good.read_bytes()[:400])
    put(tmp_path / "text.png", "no image")
    put(tmp_path / "empty/file", "")
    names = ["exif.jpg", "cut.jpg", "text.png", "nothing.jpg", "*.jpg", "empty"]
    [result, *_], errors = see(*(tmp_path / name for name in names), tmp_path / "good", code=2)
    for name, line in zip(names, errors, strict=True):
        assert line.startswith(f"infer.py: error: {tmp_path / name}: ")
    assert {*result} == {"image_id", "file_name", "category_id", "bbox", "score"}
    assert result["image_id"] == 42 and result["file_name"].endswith("0042.jpg")

def test_odd_sizes_and_names_and_images_that_were_given(tmp_path, see, server):
    sizes = {"x/a.png": (1, 300), "x/b.JPG": (700, 1), "y/a.png": (1, 1), "y/c.png": (5200, 4000),
             "y/①.jpg": (9, 9), "y/\udcff.jpg": (9, 9), "served/far.png": (60, 40)}
    for name, size in sizes.items():
        put(tmp_path / name, Image.new("RGB", size, "gray"))
    results, _ = see(tmp_path / "x", tmp_path / "y", server[1] + "far.png?size=big")
    assert len(results) == 7 * 9 and len(list((tmp_path / "seen").iterdir())) == 7
    assert len({result["image_id"] for result in results}) == 7
    before = (tmp_path / "x/a.png").read_bytes()
    _, errors = see(tmp_path / "x", out="x", code=2)
    assert re.search("a.png: .*--out", errors[0]) and (tmp_path / "x/b.png").exists()
    assert (tmp_path / "x/a.png").read_bytes() == before

@pytest.mark.parametrize("size", [(120, 80), (30, 300)])
def test_attention_is_a_second_image_of_the_decoders_mean(tmp_path, see, size):
    image = Image.effect_noise(size, 90).convert("RGB")
    see(put(tmp_path / "a.png", image), "--attention")
    model = load_detr(tmp_path / "weights.pth")
    one, two = (layer.multihead_attn for layer in model.transformer.decoder.layers)
    one.keep_weights = two.keep_weights = True
    [found] = detect(model, image, 0.0)
    mean = (one.weights + two.weights)[0, :, found["queries"]].mean(0).view(9, 3, 4) / 2
    drawn = np.asarray(Image.open(tmp_path / "seen/a_attention.png"), dtype=int)
    assert np.abs(drawn - np.asarray(infer.draw_attention(image, found, mean))).mean() < 4
    for n in (1, 2, 7):                                     # the tiles fill their image
        first = {"labels": found["labels"][:n], "boxes": found["boxes"][:n]}
        sheet = infer.draw_attention(Image.new("L", size, 255), first, mean[:n])
        assert (np.asarray(sheet).max(-1) > 0).mean() > 0.8

def test_weights_from_the_network(tmp_path, server, monkeypatch):
    root, url = server
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(detr_mini, "ZOO_URL", url)
    file = put(tmp_path / "a.pth", {"model": small(91).state_dict(), "config": {"nheads": 4}})
    name = f"detr-r50-dc5-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(ZOO, "detr_resnet50", name)
    with pytest.raises(OSError, match=f"404.*{name} by hand, to .*/hub/checkpoints/{name}"):
        load_detr("detr_resnet50")
    shutil.copy(file, root / name)
    assert load_detr("detr_resnet50").backbone[0].body.dilation     # as the file's name says
    (root / name).unlink()                                  # no network is needed a second time
    names = load_detr("detr_resnet50").classes
    assert names[1] == "person" and names[90] == "toothbrush"

def test_the_first_command_finds_the_cells_and_a_tensor_given_by_hand_the_same(tmp_path):
    """`python infer.py`: the white cell of each photograph, as BCCD marks it, and red ones."""
    marked = {"14": (236, 211, 379, 353), "17": (128, 215, 336, 391), "29": (75, 179, 224, 315)}
    subprocess.run([sys.executable, HERE / "infer.py", "--json", "found.json"], cwd=tmp_path)
    results, model = json.loads((tmp_path / "found.json").read_text()), load_detr("demo")
    for number, box in marked.items():
        image = infer.open_image(HERE / f"assets/BloodImage_000{number}.jpg")
        size = fit(image.height, image.width, *model.sizes)
        tensor = normalized(v2.functional.pil_to_tensor(image) / 255, size)
        with torch.no_grad():
            [by_hand] = post_process(model(tensor[None]), [(image.height, image.width)])
        [found] = detect(model, image)
        close(by_hand["boxes"][found["queries"]], found["boxes"], 0.5)
        close(by_hand["scores"][found["queries"]], found["scores"], 0.02)
        found = [result for result in results if result["image_id"] == f"BloodImage_000{number}"]
        names = [model.classes[result["category_id"]] for result in found]
        [(x, y, w, h)] = [r["bbox"] for r, name in zip(found, names) if name == "WBC"]
        assert box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor([box]).float()) > 0.5
        assert 8 <= names.count("RBC") <= 40
    assert len(list((tmp_path / "detections").glob("*.png"))) == 3

def test_the_readmes_links_lead_to_what_they_name():
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 9
    for name, file, number in links:
        line = (HERE / file).read_text().splitlines()[int(number) - 1]
        assert name.split(".")[-1] in line, (name, file, line)

# ---- The benchmark: pytest -m bench -s -----------------------------------------------------------
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16 if DEVICE.type == "cuda" else 1

def median_seconds(works, rounds=9):
    times = np.zeros((rounds + 2, len(works)))
    for i, (k, work) in itertools.product(range(rounds + 2), enumerate(works)):
        start = time.perf_counter()
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times[i, k] = time.perf_counter() - start
    return np.median(times[2:], axis=0)                     # the first two warm up

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
    works = [functools.partial(work, forward, torch.optim.AdamW(network.parameters(), 1e-6))
             for forward, network in ((ours, model), (theirs, peer))]
    seconds, peers = median_seconds(works)
    print(f"\n{'step' if train else 'inference'} of {BATCH}, {dtype}, on {DEVICE}: "
          f"{BATCH / seconds:.2f} images/s, {peers / seconds:.2f} times transformers")

@pytest.mark.bench
def test_bench_loader(data):
    photo = infer.open_image(HERE / "assets/BloodImage_00014.jpg").resize((500, 375))
    voc(data, range(64))
    for i in range(64):
        put(data / f"JPEGImages/{i}.jpg", photo)
    xmls, images, _ = train_voc.find_files(data)
    records = [train_voc.read_record(xml, images, data) for [xml] in xmls.values()]
    augmentation = train_voc.augmentation(800, 1333, False)
    dataset = train_voc.VOC(records, ["cat", "dog"], None, augmentation)
    torch.set_num_threads(1)
    [seconds] = median_seconds([lambda: list(dataset)], rounds=3)
    print(f"\nloader: {64 / seconds:.0f} images/s a core")
