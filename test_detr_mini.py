"""Tests. Numbers are compared with code that nobody here wrote: transformers' DETR, torchvision,
torch.nn, pycocotools. `pytest -m bench -s` runs the benchmark, which `pytest` alone leaves out.

Fixtures and helpers come first, then tests in the order of the code, then the benchmark.
"""
import argparse
import functools
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2

import detr_mini
import infer
import train_voc
from detr_mini import (DETR, ZOO, BasicBlock, FrozenBatchNorm2d, HungarianMatcher,
                       MultiheadAttention, PositionEmbeddingSine, ResNet, SetCriterion,
                       box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, detect, fit,
                       generalized_box_iou, load_detr, normalize, pad_images, post_process,
                       read_checkpoint)

HERE = Path(__file__).parent

# ---- Helpers: models and numbers -----------------------------------------------------------------

def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=atol, atol=atol)

def small(num_classes=3, norm=FrozenBatchNorm2d, **options):
    """A detector that a test can afford, always with the same weights."""
    torch.manual_seed(0)
    options = dict(hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=48,
                   num_queries=9, dropout=0.0) | options
    model = DETR(num_classes, ResNet(BasicBlock, (1, 1, 1), width=8, norm=norm), **options)
    model.size, model.max_size = 48, 72
    return model

def randomize(model):
    """Random norms and biases: with the initial ones and zeros, much could be wrong unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2 - 0.1)
    return model.eval()

def random_boxes(n, generator=None):
    """(n, 4) cx cy w h inside of an image."""
    low, high = torch.tensor([0.2, 0.2, 0.01, 0.01]), torch.tensor([0.7, 0.7, 0.3, 0.3])
    return low + torch.rand(n, 4, generator=generator) * (high - low)

def random_targets(objects, classes, seed=0):
    """Targets of len(objects) images with so many objects each."""
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(0, classes, (m,), generator=generator),
             "boxes": random_boxes(m, generator)} for m in objects]

def random_outputs(images, queries, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(images * queries, generator).view(images, queries, 4)
    logits = 2 * torch.randn(images, queries, classes + 1, generator=generator)
    return {"pred_logits": logits, "pred_boxes": boxes}

@pytest.fixture
def double():
    """New tensors are float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def in_transformers(model):
    """The same detector, with the same weights, in transformers."""
    transformers = pytest.importorskip("transformers")
    encoder, decoder = model.transformer.encoder.layers, model.transformer.decoder.layers
    dilation = {"output_stride": 16} if model.backbone[0].body.dilation else {}
    backbone = transformers.TimmBackboneConfig(
        backbone="resnet50", use_pretrained_backbone=False, out_indices=[4], **dilation)
    heads, width = decoder[0].self_attn.heads, decoder[0].linear1.out_features
    peer = transformers.DetrForObjectDetection(transformers.DetrConfig(
        backbone_config=backbone, num_labels=len(model.classes),
        num_queries=model.query_embed.num_embeddings, d_model=model.query_embed.embedding_dim,
        encoder_layers=len(encoder), encoder_attention_heads=heads, encoder_ffn_dim=width,
        decoder_layers=len(decoder), decoder_attention_heads=heads, decoder_ffn_dim=width,
        dropout=0.1, attention_dropout=0.1, activation_dropout=0.1))
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in (
                ("backbone.0.body.", "model.backbone.model."),
                ("query_embed", "model.query_position_embeddings"),
                ("input_proj", "model.input_projection"), ("bbox_embed", "bbox_predictor"),
                ("class_embed", "class_labels_classifier"), ("transformer.", "model."),
                ("decoder.norm.", "decoder.layernorm."), ("out_proj", "o_proj"),
                ("multihead_attn", "encoder_attn"), ("linear", "mlp.fc")):
            name = name.replace(ours, theirs)
        if ".layers." in name and "coder" in name:      # of a decoder layer, norm2 is in the middle
            last = "norm3" if "decoder" in name else "norm2"
            name = name.replace("norm1", "self_attn_layer_norm").replace(last, "final_layer_norm")
            name = name.replace("norm2", "encoder_attn_layer_norm")
        if "in_proj" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert not missing and not unexpected
    return peer.eval()

def peer_loss(classes):
    """The matcher and the criterion of transformers."""
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    matcher = module.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    return matcher, module.ImageLoss(matcher=matcher, num_classes=classes, eos_coef=0.1,
                                     losses=["labels", "boxes", "cardinality"])

def peer_targets(targets):
    return [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]

# ---- Helpers: files, runs, network ---------------------------------------------------------------

STEMS = [f"{i:04}" for i in range(10)]

def put(path, content, **options):
    """Write an image, text or bytes; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path, **options)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

def scene(i, size=(96, 64)):
    """A dark image with a bright square, a cat or a dog, and its objects in VOC's pixels."""
    rng = random.Random(i)
    side = rng.randint(16, 30)
    x, y = (rng.randint(1, length - side - 1) for length in size)
    name = ("cat", "dog")[i % 2]
    image = Image.new("RGB", size, (20, 20, 30))
    image.paste({"cat": (230, 60, 50), "dog": (60, 230, 80)}[name], (x, y, x + side, y + side))
    return image, [(name, (x + 1, y + 1, x + side, y + side))]

def xml(objects, filename="", size=(96, 64), difficult=0):
    tags = ("xmin", "ymin", "xmax", "ymax")
    body = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, box))
        + "</bndbox></object>" for name, box in objects)
    return (f"<annotation><filename>{filename}</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{body}</annotation>")

def voc(data, stems, images="JPEGImages/{}.jpg", xmls="Annotations/{}.xml", **said):
    """A scene for each stem, in VOC's layout or another; `said` goes to `xml`."""
    for i, stem in enumerate(stems):
        image, objects = scene(i)
        path = data / images.format(stem)
        put(path, image)
        put(data / xmls.format(stem), xml(**{"objects": objects, "filename": path.name} | said))

def lists(data, **sets):
    for name, stems in sets.items():
        put(data / f"ImageSets/Main/{name}.txt", "".join(f"{stem}\n" for stem in stems))

def bright(image):
    """The edges x0, y0, x1, y1 of the bright square in an image (3, h, w)."""
    y, x = (image.max(0).values > 110).nonzero().T
    return torch.stack((x.min(), y.min(), x.max() + 1, y.max() + 1)).float()

@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"

@pytest.fixture
def folder(data):
    """A VOC folder of twelve images, eight to train on; one has a difficult object, one nothing."""
    stems = [f"{i:02}" for i in range(12)]
    voc(data, stems, "JPEGImages/{}.png")
    lists(data, train=stems[:8], val=stems[8:])
    hard = xml([("dog", (1, 1, 20, 20))], difficult=1).split("</size>")[1]
    file = data / "Annotations/01.xml"
    file.write_text(file.read_text().replace("</annotation>", hard))
    put(data / "Annotations/11.xml", xml([]))
    return data

def quick_list(epoch, epochs):
    return [v2.RandomHorizontalFlip(), v2.RandomShortestSize((40, 48), max_size=72),
            v2.ColorJitter(brightness=0.2)]

def shrink(patch=setattr, **options):
    """Make train_voc's `tiny` a recipe that a test can afford."""
    options = {"norm": nn.BatchNorm2d, "dropout": 0.2} | options
    patch(train_voc, "tiny", lambda num_classes: small(num_classes, **options))
    patch(train_voc, "TINY", train_voc.TINY | dict(epochs=4, batch_size=4, evaluate_every=1))
    patch(train_voc, "from_scratch", quick_list)
    patch(train_voc, "draw_curves", lambda history: Figure((1, 1)))

@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs train_voc.py on a folder, by default for one short epoch of `tiny`. It
    returns what was printed, the two data sets, and {XML: image} of each, as paths in the folder.
    """
    shrink(monkeypatch.setattr)
    sets = {}

    class Noted(train_voc.VOC):
        def __init__(self, records, classes, size, max_size, augment=None, seed=0):
            super().__init__(records, classes, size, max_size, augment, seed)
            sets["train" if augment else "val"] = self

    monkeypatch.setattr(train_voc, "VOC", Noted)

    def start(data, *arguments, code=0, output="out"):
        sets.clear()
        capsys.readouterr()
        defaults = ("--data", data, "--output", tmp_path / output, "--model", "tiny",
                    "--epochs", 1, "--workers", 0, "--device", "cpu")
        result = train_voc.main(list(map(str, defaults + arguments)))
        out, err = capsys.readouterr()
        assert result == code, err
        assert err.count("\n") == (code == 2), err
        files = {name: {record["xml"].relative_to(data).as_posix():
                        record["path"].relative_to(data).as_posix() for record in part.records}
                 for name, part in sets.items()}
        return SimpleNamespace(out=out, err=err, sets=sets, **files)
    return start

def launch(program, world, *arguments):
    """Run Python code in `world` processes that torchrun could have started; their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    processes = [subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    results = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *result) for process, result in zip(processes, results)]

def log_of(output, ignore=("images_per_s", "peak_memory_gib")):
    entries = map(json.loads, (output / "log.txt").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k not in ignore} for entry in entries]

def saved(path, content):
    torch.save(content, path)
    return path

@pytest.fixture
def weights(tmp_path):
    """The file of a small detector of cats, dogs and cows."""
    return saved(tmp_path / "weights.pth", {
        "model": randomize(small()).state_dict(), "classes": ["cat", "dog", "cow"],
        "config": {"nheads": 4, "size": 48, "max_size": 72}})

@pytest.fixture
def server(tmp_path):
    """The network, as far as these tests go: a folder that this machine serves, and its URL."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(Quiet, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()

# ---- Boxes ---------------------------------------------------------------------------------------

def test_boxes_equal_torchvision(double):
    ops, a, b = torchvision.ops, random_boxes(50), random_boxes(70)
    close(box_cxcywh_to_xyxy(a), ops.box_convert(a, "cxcywh", "xyxy"), 1e-12)
    close(box_xyxy_to_cxcywh(a), ops.box_convert(a, "xyxy", "cxcywh"), 1e-12)
    a, b = box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b)
    close(box_iou(a, b), ops.box_iou(a, b), 1e-8)
    batched = generalized_box_iou(torch.stack((a[:30], a[20:])), torch.stack((b[:40], b[30:])))
    for i, part in enumerate((ops.generalized_box_iou(a[:30], b[:40]),
                              ops.generalized_box_iou(a[20:], b[30:]))):
        close(batched[i], part, 1e-6)       # torchvision adds an epsilon of 1e-7
    assert (batched < 0).any() and (batched > 0).any()

def test_giou_gradient_equals_finite_differences(double):
    def giou(a, b):
        return generalized_box_iou(box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b))
    boxes = random_boxes(6).requires_grad_(), random_boxes(5).requires_grad_()
    assert torch.autograd.gradcheck(giou, boxes)

# ---- Backbone ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, dilation",
                         [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_backbone_equals_torchvision(double, name, dilation):
    norm = torchvision.ops.FrozenBatchNorm2d
    options = {"replace_stride_with_dilation": (False, False, True)} if dilation else {}
    peer = randomize(getattr(torchvision.models, name)(norm_layer=norm, **options))
    peer.fc = nn.Identity()
    ours = ResNet(*detr_mini.RESNETS[name], dilation=dilation)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        features, expected = ours(x), nn.Sequential(*list(peer.children())[:-2])(x)
    side = 16 if dilation else 32
    assert features.shape == (2, ours.num_channels, -(-97 // side), -(-130 // side))
    assert ours.stride == side
    close(features / expected.std(), expected / expected.std(), 1e-8)

def test_trained_norm_equals_torchvision_and_the_frozen_one_keeps_still():
    peer = torchvision.models.resnet18(num_classes=1)
    ours = ResNet(*detr_mini.RESNETS["resnet18"], norm=nn.BatchNorm2d)
    ours.load_state_dict({k: v for k, v in peer.state_dict().items() if "fc." not in k})
    x, stages = torch.randn(4, 3, 64, 64), nn.Sequential(*list(peer.children())[:-2])
    close(ours.train()(x), stages.train()(x))
    close(ours.eval()(x), stages.eval()(x))
    assert all(p.requires_grad for p in ours.parameters())
    frozen = ResNet(*detr_mini.RESNETS["resnet50"])
    still = {name.split(".")[0] for name, p in frozen.named_parameters() if not p.requires_grad}
    assert still == {"conv1", "layer1"}
    assert not any("bn" in name for name, _ in frozen.named_parameters())

def test_frozen_norm_loads_and_equals_batch_norm():
    peer, ours, x = randomize(nn.BatchNorm2d(7)), FrozenBatchNorm2d(7), torch.randn(2, 7, 5, 5)
    ours.load_state_dict(peer.state_dict())
    close(ours(x), peer(x), 1e-5)

# ---- Positions -----------------------------------------------------------------------------------

def test_positions_equal_transformers_with_padding():
    module = pytest.importorskip("transformers.models.detr.modeling_detr")
    real = torch.zeros(2, 9, 13, dtype=torch.bool)
    real[0], real[1, :4, :7] = True, True
    peer = module.DetrSinePositionEmbedding(16, normalize=True)
    expected = peer(torch.Size((2, 3, 9, 13)), torch.device("cpu"), torch.float32, mask=real)
    close(PositionEmbeddingSine(16)(real), expected.flatten(2).transpose(1, 2), 1e-5)

# ---- Attention -----------------------------------------------------------------------------------

def test_attention_equals_torch(double):
    peer, ours = nn.MultiheadAttention(32, 4, batch_first=True), MultiheadAttention(32, 4)
    nn.init.normal_(peer.in_proj_bias)
    nn.init.normal_(peer.out_proj.bias)
    ours.load_state_dict(peer.state_dict())
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 11, 32), torch.randn(2, 11, 32)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[1, 6:] = True
    for padding in (None, mask):
        attend = None if padding is None else ~padding[:, None, None]
        expected, weights = peer(q, k, v, key_padding_mask=padding, average_attn_weights=False)
        for ours.keep_weights in (False, True):
            close(ours(q, k, v, attend), expected, 1e-8)
        close(ours.weights, weights, 1e-8)

def test_attention_gradients_equal_finite_differences(double):
    def leaf(*shape):
        return torch.randn(shape, requires_grad=True)

    attend = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    attend[1, ..., 4:] = False
    attention = MultiheadAttention(8, 2)
    qkv = leaf(2, 3, 8), leaf(2, 7, 8), leaf(2, 7, 8)
    for mask in (None, attend):
        for attention.keep_weights in (False, True):
            assert torch.autograd.gradcheck(lambda *x: attention(*x, mask), qkv)
    decoder = detr_mini.TransformerDecoderLayer(8, 2, 12, 0.0)
    x = leaf(2, 3, 8), leaf(2, 3, 8), leaf(2, 7, 8), leaf(2, 7, 8)
    assert torch.autograd.gradcheck(lambda *x: decoder(*x, attend), x)

def test_attention_dropout_acts_in_training_only():
    attention, x = MultiheadAttention(32, 4, dropout=0.5), torch.randn(1, 6, 32)
    assert not torch.equal(attention.train()(x, x, x), attention(x, x, x))
    assert torch.equal(attention.eval()(x, x, x), attention(x, x, x))

# ---- The whole detector --------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[False, True], ids=["R50", "R50-DC5"])
def pair(request):
    torch.manual_seed(0)
    model = randomize(DETR(num_classes=7, dilation=request.param, enc_layers=2, dec_layers=3,
                           num_queries=20, aux_loss=True))
    return model, in_transformers(model)

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
@pytest.mark.parametrize("sizes", [[(128, 160)], [(200, 131)], [(96, 224), (160, 96), (130, 130)]],
                         ids=["one", "odd", "padded"])
def test_detector_and_losses_equal_transformers(pair, sizes, dtype, atol):
    model, peer = (network.to(dtype) for network in pair)
    torch.manual_seed(1)
    images, mask = pad_images([torch.randn(3, *size, dtype=dtype) for size in sizes])
    targets = [{"labels": target["labels"], "boxes": target["boxes"].to(dtype)}
               for target in random_targets([4, 0, 7][:len(sizes)], 7)]
    with torch.no_grad():
        ours = model(images, mask)
        theirs = peer(images, pixel_mask=None if mask is None else (~mask).long(),
                      output_hidden_states=True)
        # Its own auxiliary_loss feeds the normed state to the next layer, as the reference does
        # not: the earlier predictions are read off the states of its plain forward pass.
        states = map(peer.model.decoder.layernorm, theirs.decoder_hidden_states[1:-1])
        earlier = [{"logits": peer.class_labels_classifier(state),
                    "pred_boxes": peer.bbox_predictor(state).sigmoid()} for state in states]
    last = {"logits": theirs.logits, "pred_boxes": theirs.pred_boxes}
    layers = [*ours["aux_outputs"], ours]
    assert len(layers) == 3 and ours["pred_boxes"].dtype == dtype
    for layer, expected in zip(layers, [*earlier, last], strict=True):
        close(layer["pred_logits"], expected["logits"], atol)
        close(layer["pred_boxes"], expected["pred_boxes"], atol)

    criterion, (_, peer_criterion) = SetCriterion(7, HungarianMatcher()), peer_loss(7)
    expected = peer_criterion.to(dtype)(last | {"auxiliary_outputs": earlier},
                                        peer_targets(targets))
    losses = criterion(ours, targets)
    for name, value in expected.items():
        close(losses[name], torch.as_tensor(value, dtype=losses[name].dtype), atol)
    assert set(losses) - set(expected) == {"class_error"}       # transformers does not have it
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    close(criterion.total(losses), sum(weights[loss] * value for name, value in expected.items()
                                       for loss in weights if loss in name), 10 * atol)

def test_padding_costs_what_it_costs_the_reference(pair):
    """Zeros end where the image does, so the second convolution sees another border than alone."""
    model, peer = (network.double() for network in pair)
    image, larger = torch.randn(3, 120, 150).double(), torch.randn(3, 170, 200).double()
    batch, mask = pad_images([image, larger])
    with torch.no_grad():
        alone = model(image[None])["pred_boxes"][0]
        three = torch.stack((image, image.flip(1), image.flip(2)))
        close(model(three)["pred_boxes"][0], alone, 1e-8)
        gap = model(batch, mask)["pred_boxes"][0] - alone
        theirs = peer(batch, pixel_mask=(~mask).long()).pred_boxes[0]
        peer_gap = theirs - peer(image[None]).pred_boxes[0]
    assert gap.abs().max() > 1e-3           # otherwise nothing would be compared
    close(gap, peer_gap, 1e-8)

def test_a_list_is_padded_and_a_mask_without_padding_hides_nothing():
    model = randomize(small())
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]
    batch, mask = pad_images(images)
    assert mask.shape == (2, 96, 96) and int(mask.sum()) == 2 * 32 * 96
    assert pad_images([images[0]] * 2)[1] is None
    with torch.no_grad():
        close(model(images)["pred_boxes"], model(batch, mask)["pred_boxes"], 1e-6)
        nothing = torch.zeros(1, 96, 96, dtype=torch.bool)
        close(model(batch[:1], nothing)["pred_boxes"], model(batch[:1])["pred_boxes"], 1e-5)
        # What is under the padding of the features does not count.
        changed = batch.clone()
        changed[0, :, 90:] = 1
        close(model(changed, mask)["pred_boxes"][0], model(batch, mask)["pred_boxes"][0], 1e-6)

def test_without_aux_loss_the_prediction_is_the_last_layers():
    model, x = randomize(small()), torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        last = model(x)
        model.aux_loss = True
        every = model(x)
    assert set(last) == {"pred_logits", "pred_boxes"} and len(every["aux_outputs"]) == 1
    close(last["pred_boxes"], every["pred_boxes"], 1e-6)

@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_published_names_and_shapes(backbone):
    """Put together from torchvision's ResNet and torch.nn's transformer layers."""
    body = getattr(torchvision.models, backbone)(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    parts = {"backbone.0.body": body,
             "transformer.decoder.norm": nn.LayerNorm(256), "query_embed": nn.Embedding(100, 256),
             "input_proj": nn.Conv2d(2048, 256, 1), "class_embed": nn.Linear(256, 92),
             "bbox_embed.layers.0": nn.Linear(256, 256), "bbox_embed.layers.1": nn.Linear(256, 256),
             "bbox_embed.layers.2": nn.Linear(256, 4)}
    del body.fc
    for i in range(6):
        parts[f"transformer.encoder.layers.{i}"] = nn.TransformerEncoderLayer(256, 8, 2048)
        parts[f"transformer.decoder.layers.{i}"] = nn.TransformerDecoderLayer(256, 8, 2048)
    expected = {f"{part}.{name}": value.shape for part, module in parts.items()
                for name, value in module.state_dict().items()}
    for dilation in (False, True):
        with torch.device("meta"):
            model = DETR(backbone=backbone, dilation=dilation)
        assert {name: value.shape for name, value in model.state_dict().items()} == expected
    if backbone == "resnet50":
        assert sum(p.numel() for p in model.parameters()) == 41_524_768     # 41 M (paper: Table 1)

def test_compile_without_a_break_gives_the_same():
    model = randomize(small())
    padded = pad_images([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in ((torch.randn(1, 3, 64, 96),), padded):
            close(compiled(*arguments)["pred_boxes"], model(*arguments)["pred_boxes"], 1e-5)

@pytest.mark.xfail(torch.__version__.startswith("2.6."), reason="2.6 guards on odd heights")
def test_export_with_dynamic_height_and_width():
    model, dim = randomize(small()), torch.export.Dim
    sides = {2: dim("height", min=32, max=1333), 3: dim("width", min=32, max=1333)}
    with torch.no_grad():
        x = torch.randn(1, 3, 96, 128)
        exported = torch.export.export(model, (x,), dynamic_shapes={"images": sides}).module()
        for x in (x, torch.randn(1, 3, 70, 201)):
            close(exported(x)["pred_logits"], model(x)["pred_logits"], 1e-5)

def test_under_autocast_predictions_are_float32():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = randomize(small())(torch.randn(1, 3, 64, 96))
    assert {value.dtype for value in outputs.values()} == {torch.float32}

def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_dim 30"):
        DETR(hidden_dim=30)

# ---- Matching and loss ---------------------------------------------------------------------------

@pytest.mark.parametrize("objects", [[3, 5, 1], [0, 4, 0], [0, 0, 0], [12, 30, 2]],
                         ids=["some", "one image has some", "none", "more than queries"])
@pytest.mark.parametrize("layers", [1, 4])
def test_matching_losses_and_gradients_equal_transformers(double, objects, layers):
    matcher, criterion = peer_loss(6)
    outputs = [random_outputs(3, 12, 6, seed) for seed in range(layers)]
    targets = random_targets(objects, 6)
    leaves = [value.requires_grad_() for layer in outputs for value in layer.values()]
    ours = {**outputs[-1], "aux_outputs": outputs[:-1]} if layers > 1 else outputs[0]
    renamed = [{"logits": layer["pred_logits"], "pred_boxes": layer["pred_boxes"]}
               for layer in outputs]
    theirs = renamed[-1] | ({"auxiliary_outputs": renamed[:-1]} if layers > 1 else {})
    matches = HungarianMatcher()(outputs[-1], targets)
    for pair, expected in zip(matches, matcher(renamed[-1], peer_targets(targets)), strict=True):
        assert torch.equal(pair[0], expected[0]) and torch.equal(pair[1], expected[1])

    mine = SetCriterion(6, HungarianMatcher())
    losses, expected = mine(ours, targets), criterion(theirs, peer_targets(targets))
    for name, value in expected.items():
        close(losses[name].double(), torch.as_tensor(value).double(), 1e-8)
    if sum(objects):
        right = [outputs[-1]["pred_logits"][b, q].argmax(-1) == targets[b]["labels"][t]
                 for b, (q, t) in enumerate(matches)]
        close(losses["class_error"].double(), 100 - 100 * torch.cat(right).double().mean(), 1e-5)
    else:
        assert losses["class_error"] == 100 and losses["loss_bbox"] == 0
    total = sum({"ce": 1, "bb": 5, "gi": 2}[name[5:7]] * value
                for name, value in expected.items() if name.startswith("loss"))
    gradients = torch.autograd.grad(mine.total(losses), leaves, retain_graph=True)
    for ours, theirs in zip(gradients, torch.autograd.grad(total, leaves)):
        close(ours, theirs, 1e-8)

def test_loss_gradients_equal_finite_differences(double):
    criterion, targets = SetCriterion(3, HungarianMatcher()), random_targets([3, 0], 3)

    def total(logits, early, late):         # steps of 1e-6 change no matching
        layers = [{"pred_logits": c, "pred_boxes": b.view(2, 4, 4)}
                  for c, b in zip(logits, (early, late))]
        return criterion.total(criterion({**layers[1], "aux_outputs": layers[:1]}, targets))

    boxes = random_boxes(8).requires_grad_(), random_boxes(8).requires_grad_()
    assert torch.autograd.gradcheck(total, (torch.randn(2, 2, 4, 4, requires_grad=True), *boxes))

def test_equal_costs_still_match_one_to_one():
    outputs = {"pred_logits": torch.zeros(1, 9, 4), "pred_boxes": torch.full((1, 9, 4), 0.5)}
    target = {"labels": torch.zeros(5, dtype=torch.int64), "boxes": torch.full((5, 4), 0.5)}
    [(queries, objects)] = HungarianMatcher()(outputs, [target])
    assert len(set(queries.tolist())) == 5 and sorted(objects.tolist()) == [0, 1, 2, 3, 4]

def test_sigmoids_at_their_ends_give_finite_losses_and_gradients():
    torch.manual_seed(0)
    logits = (torch.randint(0, 2, (2, 12, 7)) * 2e4 - 1e4).requires_grad_()
    boxes = torch.randint(0, 2, (2, 12, 4)).float().requires_grad_()
    criterion = SetCriterion(6, HungarianMatcher())
    losses = criterion({"pred_logits": logits, "pred_boxes": boxes}, random_targets([5, 30], 6))
    criterion.total(losses).backward()
    assert all(value.isfinite().all() for value in (*losses.values(), logits.grad, boxes.grad))

def test_a_wrong_label_and_a_wrong_number_name_their_image():
    criterion = SetCriterion(6, HungarianMatcher())
    outputs, targets = random_outputs(2, 12, 6), random_targets([3, 4], 6)
    for label in (6, -1):
        wrong = [targets[0], targets[1] | {"labels": torch.tensor([0, 1, label, 2])}]
        with pytest.raises(ValueError, match=f"image 1 .*label {label} is outside .* 0 to 5"):
            criterion(outputs, wrong)
    with pytest.raises(ValueError, match="image 0 .*not finite"):
        criterion(outputs | {"pred_boxes": outputs["pred_boxes"] * np.nan}, targets)
    with pytest.raises(ValueError, match="image 1 .*not finite"):
        criterion(outputs, [targets[0], targets[1] | {"boxes": targets[1]["boxes"] / 0}])

TWO_CRITERIA = """
import json, torch.distributed as dist, test_detr_mini as t
dist.init_process_group("gloo")
half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
outputs = {name: value[half] for name, value in t.random_outputs(4, 12, 6).items()}
criterion = t.SetCriterion(6, t.HungarianMatcher())
losses = criterion(outputs, t.random_targets([1, 2, 9, 0], 6)[half])
print(json.dumps({name: float(value) for name, value in losses.items()}))
dist.destroy_process_group()
"""

def test_two_processes_divide_by_their_mean_number_of_boxes():
    """DDP takes the mean of the processes' gradients. Of box losses it is the whole batch's; the
    class loss is, as in the reference, a mean within each process."""
    results = launch(TWO_CRITERIA, 2)
    assert not any(code for code, _, _ in results), results
    halves = [json.loads(out) for _, out, _ in results]
    criterion = SetCriterion(6, HungarianMatcher())
    outputs, targets = random_outputs(4, 12, 6), random_targets([1, 2, 9, 0], 6)
    whole = criterion(outputs, targets)
    for name in ("loss_bbox", "loss_giou", "cardinality_error"):
        mean = (halves[0][name] + halves[1][name]) / 2
        assert mean == pytest.approx(float(whole[name]), abs=1e-5), name
    for i, half in enumerate((slice(0, 2), slice(2, 4))):
        own = criterion({name: value[half] for name, value in outputs.items()}, targets[half])
        assert halves[i]["loss_ce"] == pytest.approx(float(own["loss_ce"]), abs=1e-5)
        assert halves[i]["loss_bbox"] != pytest.approx(float(own["loss_bbox"]), abs=1e-2)

# ---- Use -----------------------------------------------------------------------------------------

def test_post_process_equals_transformers():
    module = pytest.importorskip("transformers.models.detr.image_processing_detr")
    outputs, sizes = random_outputs(2, 12, 6), torch.tensor([[480, 640], [333, 500]])
    theirs = argparse.Namespace(
        logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])
    peer = module.DetrImageProcessor().post_process_object_detection(
        theirs, threshold=0.0, target_sizes=sizes)
    for ours, expected in zip(post_process(outputs, sizes), peer, strict=True):
        for name in ("scores", "labels", "boxes"):
            close(ours[name], expected[name])

def reference_size(height, width, size, max_size):
    """get_size_with_aspect_ratio of facebookresearch/detr, datasets/transforms.py."""
    short, long = float(min(height, width)), float(max(height, width))
    if long / short * size > max_size:
        size = int(round(max_size * short / long))
    if size in (height, width) and size == short:
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)

def test_fit_is_the_references_arithmetic():
    sides = [*range(30, 700, 37), 480, 640, 800, 1333, 1500, 4000]
    for height in sides:
        for width in sides:
            for size, limit in ((800, 1333), (192, 341)):
                expected = reference_size(height, width, size, limit)
                assert fit(height, width, size, limit) == expected, (height, width)
    assert fit(100, 500, 800, 1333) == (267, 1335)
    assert fit(500, 100, 800, 1333) == (1335, 267)
    assert min(fit(1, 5000, 800, 1333)) == 1

def test_normalize_equals_torchvision():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = v2.functional.normalize(image / 255, mean, std)
    close(normalize(image), expected, 1e-6)
    close(normalize(image / 255), expected, 1e-6)

def test_detect_takes_images_and_tensors_and_sorts():
    model = randomize(small())
    noise = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    image, tensor = Image.fromarray(noise), torch.from_numpy(noise).permute(2, 0, 1)
    one, two, three = detect(model, [image, tensor, tensor[:, :30]], threshold=0.0)
    assert one["boxes"].shape == (9, 4) and len(one["names"]) == 9
    assert sorted(one["queries"].tolist()) == list(range(9))
    assert (one["scores"].diff() <= 0).all()
    close(one["boxes"], two["boxes"], 1e-3)
    assert not torch.allclose(one["boxes"], three["boxes"], atol=1)
    close(detect(model, image, 0.0)[0]["scores"], one["scores"])
    close(detect(model, [tensor / 255], 0.0)[0]["scores"], one["scores"], 1e-2)
    assert detect(model, image, 1.0)[0]["names"] == []
    # By the book: resized by torchvision, normalised, and the boxes of the original's pixels.
    resized = v2.functional.resize(tensor, fit(50, 90, 48, 72))
    with torch.no_grad():
        outputs = model(normalize(resized)[None])
    [expected] = post_process(outputs, [(50, 90)])
    close(one["boxes"], expected["boxes"][one["queries"]], 0.1)

@pytest.mark.parametrize("image", [
    "cats.jpg", np.zeros((9, 9, 3)), Image.new("I;16", (9, 9)), Image.new("F", (9, 9)),
    Image.new("RGBA", (9, 9)), Image.new("LA", (9, 9))], ids=repr)
def test_detect_says_what_it_takes(image):
    with pytest.raises(TypeError, match=r"PIL image.*tensor.*open_image"):
        detect(small(), image)

def test_attention_of_a_detection_is_a_distribution_over_the_feature_map():
    model = randomize(small())
    attention = model.transformer.decoder.layers[-1].multihead_attn
    attention.keep_weights = True
    detect(model, torch.zeros(3, 48, 64, dtype=torch.uint8), threshold=0.0)
    assert attention.weights.shape == (1, 4, 9, 3 * 4)
    close(attention.weights.sum(-1), torch.ones(1, 4, 9))

def file_of(kind, model):
    """A checkpoint as different programs write it."""
    state = model.state_dict()
    args = argparse.Namespace(nheads=4, lr=1e-4, output_dir=pathlib.PosixPath("out"))
    return {
        "ours": {"model": state, "config": {"nheads": 4}, "epoch": 3},
        "reference": {"model": state, "args": args, "epoch": 3},
        "ddp": {"model": {f"module.{k}": v for k, v in state.items()}, "args": args},
        "lightning": {"state_dict": {f"model.{k}": v for k, v in state.items()},
                      "hyper_parameters": {"nheads": 4}},
        "tutorial": {"model_state_dict": state, "args": {"nheads": 4}},
        "bare": state}[kind]

@pytest.mark.parametrize("kind", ["ours", "reference", "ddp", "lightning", "tutorial", "bare"])
def test_checkpoints_of_other_programs_load(tmp_path, kind):
    model = randomize(small(22, nheads=8 if kind == "bare" else 4))     # 8 if no one says
    loaded = load_detr(saved(tmp_path / "model.pth", file_of(kind, model)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(loaded(x)["pred_boxes"], model(x)["pred_boxes"], 1e-6)
    assert not loaded.training and len(loaded.classes) == 22
    assert (loaded.size, loaded.max_size) == (800, 1333)

def test_a_checkpoint_brings_names_and_sizes_or_gets_a_new_head(weights):
    model = load_detr(weights)
    assert model.classes == ["cat", "dog", "cow"] and (model.size, model.max_size) == (48, 72)
    assert load_detr(weights, num_classes=3).classes == ["cat", "dog", "cow"]
    new = load_detr(weights, num_classes=20)
    assert new.class_embed.weight.shape == (21, 32) and len(new.classes) == 20
    assert torch.equal(new.input_proj.weight, model.input_proj.weight)

def test_a_trained_norm_is_a_frozen_one_in_use(tmp_path):
    model, x = small(norm=nn.BatchNorm2d), torch.randn(1, 3, 64, 64)
    model.train()(torch.randn(4, 3, 64, 64))
    loaded = load_detr(saved(tmp_path / "model.pth", file_of("ours", model)))
    with torch.no_grad():
        close(loaded(x)["pred_boxes"], model.eval()(x)["pred_boxes"], 1e-5)

def test_no_class_head_is_named_and_a_new_one_fits(tmp_path):
    state = {k: v for k, v in small().state_dict().items() if "class_embed" not in k}
    path = saved(tmp_path / "model.pth", {"model": state, "config": {"nheads": 4}})
    with pytest.raises(ValueError, match=r"model.pth.*class_embed\.bias"):
        load_detr(path)
    assert load_detr(path, num_classes=5).class_embed.bias.shape == (6,)

@pytest.mark.parametrize("change, name", [
    ({"input_proj.weight": None}, "input_proj.weight"),
    ({"transformer.encoder.layers.0.norm1.bias": None}, "encoder.layers.0.norm1.bias"),
    ({"neck.weight": torch.zeros(1)}, "neck.weight"),
    ({"query_embed.weight": torch.zeros(9, 33)}, "query_embed.weight")])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, name):
    state = {k: v for k, v in {**small().state_dict(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=f"model.pth.*{re.escape(name)}"):
        load_detr(saved(tmp_path / "model.pth", {"model": state, "config": {"nheads": 4}}))

class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)

def test_files_that_are_no_checkpoint_are_refused_and_code_is_not_run(tmp_path, weights):
    bad, marker = tmp_path / "bad.pth", tmp_path / "it_ran"
    for content in (weights.read_bytes()[:3000], b"", b"\xff\xd8\xff", pickle.dumps(Evil(marker))):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pth is not a readable checkpoint"):
            load_detr(bad)
    for content in (small(), {"model": small().state_dict(), "extra": Evil(marker)}):
        with pytest.raises(ValueError, match="bad.pth .*never run"):
            load_detr(saved(bad, content))
    assert not marker.exists()
    with pytest.raises(ValueError, match="bad.pth .*lacks"):
        load_detr(saved(bad, torchvision.models.resnet18().state_dict()))
    with pytest.raises(FileNotFoundError, match="nowhere.pth.*detr_resnet50"):
        load_detr(tmp_path / "nowhere.pth")

def test_the_zoos_files_load_by_name_and_know_their_dilation(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = {"model": DETR(enc_layers=1, dec_layers=1).state_dict()}
    for name, stride in (("detr_resnet50", 32), ("detr_resnet50_dc5", 16)):
        saved(tmp_path / "checkpoints" / ZOO[name], file)
        model = load_detr(name)
        assert model.backbone[0].body.stride == stride and len(model.classes) == 91
        assert model.classes[1] == "person" and model.classes[90] == "toothbrush"

# ---- train_voc: which files are a set, and which image belongs to an XML file --------------------

@pytest.mark.parametrize("images, xmls, decoy", [
    ("images/{}.jpg", "annotations/xmls/{}.xml", "annotations/trimaps/{}.png"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "SegmentationClass/{}.png"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "thumbs/{}.jpg"),
    ("images/{}.jpg", "labels/{}.xml", "labels/drawn/{}.jpg"),
    ("{}.jpg", "{}.xml", "results/{}.jpg"),
    ("{}.png", "{}.xml", "{}.tif"),
    ("JPEGImages/{}.jfif", "Annotations/{}.XML", "JPEGImages/._{}.jfif"),
    ("JPEGImages/{}.jpg", "Annotations/{}.jpg.xml", "__MACOSX/JPEGImages/{}.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", ".cache/JPEGImages/{}.jpg"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "__MACOSX/Annotations/._{}.xml"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", ".idea/{}.xml"),
    ("JPEGImages/{}.jpg", "Annotations/{}.xml", "config/{}/pom.xml")])
def test_files_that_are_not_meant_are_not_taken(data, run, images, xmls, decoy):
    """Masks, thumbnails, results, hidden files, other programs' XML: all of them unreadable."""
    voc(data, STEMS, images, xmls)
    for stem in STEMS:
        put(data / decoy.format(stem), "<project/>")
    done = run(data)
    assert "train: 8 images, 8 objects\nval: 2 images, 2 objects\nclasses: cat, dog\n" in done.out
    assert done.train | done.val == {xmls.format(s): images.format(s) for s in STEMS}

def test_parts_with_the_same_names_keep_their_own_images(data, run):
    for part, count in (("train", 8), ("test", 4)):
        voc(data / part, range(count), "images/{}.jpg", "labels/{}.xml")
    done = run(data, "--val", "test")
    assert done.train == {f"train/labels/{i}.xml": f"train/images/{i}.jpg" for i in range(8)}
    assert done.val == {f"test/labels/{i}.xml": f"test/images/{i}.jpg" for i in range(4)}
    voc(data, [], "")
    for kind, folder in (("images/{}/x.jpg", "val"), ("annotations/{}/x.xml", "val")):
        assert kind and folder

@pytest.mark.parametrize("images, xmls", [
    ("{}/{{}}_jpg.rf.0a1b.jpg", "{}/{{}}_jpg.rf.0a1b.xml"),
    ("images/{}/{{}}.jpg", "annotations/{}/xml/{{}}.xml")])
def test_folders_train_valid_and_test(data, run, images, xmls):
    for part, stems in (("train", STEMS[:6]), ("valid", STEMS[6:8]), ("test", STEMS[8:])):
        voc(data, stems, images.format(part), xmls.format(part))
    done = run(data)
    assert (len(done.train), len(done.val)) == (6, 2)
    assert all("valid/" in xml and "valid/" in image for xml, image in done.val.items())
    assert all("test/" in xml for xml in run(data, "--val", "test").val)

def test_a_devkit_of_one_year_and_of_two(data, run):
    """The same names in both years are other images."""
    voc(data / "VOC2007", STEMS)
    lists(data / "VOC2007", train=STEMS[:4], val=STEMS[4:6], trainval=STEMS[:6], test=STEMS[6:])
    done = run(data)
    assert (len(done.train), len(done.val), len(run(data, "--val", "test").val)) == (4, 2, 4)
    voc(data / "VOC2012", STEMS[:8])
    lists(data / "VOC2012", train=STEMS[:5], val=STEMS[5:8])
    done = run(data)
    assert (len(done.train), len(done.val)) == (5, 3)
    assert all(image.startswith("VOC2012/") for image in done.train.values())
    done = run(data, "--train", "2007_trainval", "2012_train", "--val", "2007_test")
    assert (len(done.train), len(done.val)) == (11, 4)
    assert all(xml[:8] == image[:8] for xml, image in (done.train | done.val).items())

@pytest.mark.parametrize("sets", [{"default": STEMS}, {"trainval": STEMS, "test": ["a", "b"]}])
def test_without_train_and_val_what_is_listed_is_split(data, run, sets):
    voc(data, [*STEMS, "a", "b"])
    lists(data, **sets)
    done = run(data)
    assert (len(done.train), len(done.val)) == (8, 2)
    assert {Path(file).stem for file in done.train | done.val} == set(STEMS)
    assert run(data).val == done.val != run(data, "--seed", 1).val

@pytest.mark.parametrize("written", [
    "\ufeffa b\r\nc\r\n".encode(), "a b\nc\n".encode("utf-16"), b"a b.jpg\nc.JPG\n",
    b"JPEGImages/a b.jpg\nC:\\VOC\\JPEGImages\\c.jpg\n", b"a b.xml\n\n  c  \n\n",
    b"a b  1\nc -1", b"a b 0\nc  1\nc 1\n"])
def test_a_list_as_programs_write_it(data, run, written):
    voc(data, ["a b", "a b 2", "c", "d 1"])
    put(data / "ImageSets/Main/train.txt", written)
    lists(data, val=["d 1"])
    done = run(data)
    assert set(done.train) == {"Annotations/a b.xml", "Annotations/c.xml"}
    assert set(done.val) == {"Annotations/d 1.xml"}

def test_linked_folders_are_followed_but_not_in_a_circle(data, tmp_path, run):
    voc(tmp_path / "disk", STEMS)
    data.mkdir()
    for name in ("JPEGImages", "Annotations"):
        (data / name).symlink_to(tmp_path / "disk" / name)
    (data / "again").symlink_to(data)
    done = run(data)
    assert (len(done.train), len(done.val)) == (8, 2)

def test_eight_images_are_enough_for_the_default_batch_size(data, run, monkeypatch):
    monkeypatch.setitem(train_voc.TINY, "batch_size", 16)
    voc(data, STEMS[:8])
    done = run(data)
    assert "train: 6 images" in done.out and "val: 2 images" in done.out and "epoch 1" in done.out

def test_evaluation_without_sets_takes_everything(data, run, weights):
    voc(data, STEMS)
    done = run(data, "--model", weights, "--eval")
    assert "val: 10 images, 10 objects" in done.out and "train:" not in done.out

# ---- train_voc: what is checked before the first step --------------------------------------------

def cut(path):
    path.write_bytes(path.read_bytes()[:-path.stat().st_size // 2])

@pytest.mark.parametrize("spoil, message", [
    (lambda d: put(d / "Annotations/0003.xml", "<annotation><object>"), "0003.xml"),
    (lambda d: put(d / "Annotations/0003.xml", "<project/>"), "0003.xml.*<project>"),
    (lambda d: put(d / "Annotations/0003.xml", xml([("cat", ("nan", 1, 2, 3))])), "0003.xml.*fini"),
    (lambda d: put(d / "Annotations/0003.xml", xml([("cat", (1, 2, 3))])), "0003.xml.*bndbox"),
    (lambda d: put(d / "Annotations/0003.xml", xml([("cat", (0.1, 0.2, 0.5, 1))])),
     "0003.xml.*shares.*pixels"),
    (lambda d: (d / "Annotations/0003.xml").unlink(), "train.txt: 0 .*'0003'"),
    (lambda d: (d / "JPEGImages/0003.jpg").unlink(), "0003.xml: no image"),
    (lambda d: cut(d / "JPEGImages/0003.jpg"), "0003.jpg: not a readable image"),
    (lambda d: (d / "JPEGImages").rename(d / "a") and put(d / "b/0003.jpg", "a copy"),
     "0003.xml: .*a/0003.jpg and .*b/0003.jpg"),
    (lambda d: put(d / "ImageSets/Main/val.txt", ""), "val is empty"),
    (lambda d: (d / "ImageSets/Main/val.txt").unlink(), "no set 'val' .*train")])
def test_bad_data_is_named_before_the_first_step(data, run, tmp_path, spoil, message):
    voc(data, STEMS)
    lists(data, train=STEMS[:8], val=STEMS[8:])
    spoil(data)
    done = run(data, code=2)
    assert re.search(message, done.err), done.err
    assert "epoch" not in done.out and not (tmp_path / "out").exists()

def test_only_difficult_objects_are_nothing_to_train_on(data, run):
    voc(data, STEMS, difficult=1)
    assert "8 marked difficult" in run(data, code=2).err

def test_what_is_odd_is_counted(data, run):
    voc(data, STEMS)
    put(data / "Annotations/0001.xml", xml([("dog", (-5, 3.5, 200, 40.25)), ("cat", (9, 9, 5, 5))]))
    put(data / "Annotations/0002.xml", xml(scene(2)[1], size=(640, 480)))
    put(data / "JPEGImages/alone.jpg", scene(0)[0])
    put(data / "Annotations/0003.xml", xml([("dog", (5, 5, 9, 9))] * 12))
    lists(data, train=STEMS[:8], val=STEMS[8:])
    done = run(data)
    line = done.out.splitlines()[0]
    assert line.startswith("train: 8 images, 19 objects")
    for words in ("1 clipped", "1 without area dropped", "1 images without XML",
                  "1 not of the <size> .*0002.jpg"):
        assert re.search(words, line), words
    assert "up to 12 objects in an image; 9 queries" in done.out
    assert done.sets["train"].records[1]["boxes"].tolist() == [[0, 2.5, 96, 40.25]]

def test_classes_are_those_of_all_sets_or_those_named(data, run):
    voc(data, STEMS)
    put(data / "Annotations/0008.xml", xml([("wolf", (5, 5, 40, 40))]))
    lists(data, train=STEMS[:8], val=STEMS[8:])
    assert "classes: cat, dog, wolf\n" in run(data).out
    done = run(data, "--classes", "dog, cow ,cat")
    assert "classes: dog, cow, cat\n" in done.out
    assert "val: 2 images, 1 objects; 1 of other classes left out" in done.out
    assert "train: 8 images, 4 objects; 4 of other" in run(data, "--classes", "cat").out

# ---- train_voc: how an image is read -------------------------------------------------------------

@pytest.mark.parametrize("upright", [True, False])
def test_boxes_are_of_the_upright_image_or_by_size_of_the_stored_one(data, run, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, stem in enumerate(STEMS):
        size = (64, 96) if upright else (96, 64)
        image, objects = scene(i, size)
        image = image.transpose(Image.Transpose.ROTATE_90) if upright else image
        put(data / f"{stem}.jpg", image, exif=exif)
        put(data / f"{stem}.xml", xml(objects, size=size))
    done = run(data)
    assert done.out.startswith("train: 8 images, 8 objects\nval: 2 images, 2 objects\n")
    for image, target in done.sets["val"]:
        assert (image.shape[1] > image.shape[2]) == upright and image.dtype == torch.uint8
        h, w = image.shape[1:]
        box = box_cxcywh_to_xyxy(target["boxes"][0]) * torch.tensor([w, h, w, h])
        close(bright(image), box, 1.5)

def test_training_and_inference_read_the_same_pixels(data, run):
    voc(data, STEMS, "{}.png", "{}.xml")
    for i, stem in enumerate(STEMS):
        grey = np.asarray(scene(i)[0].convert("L"))
        if i % 2:
            put(data / f"{stem}.png", Image.fromarray(grey.astype(np.uint16) * 200 + 2000))
        else:
            clear = Image.fromarray(np.dstack([grey, 255 - grey]), "LA")
            put(data / f"{stem}.png", clear)
    lists(data, train=STEMS[:6], val=STEMS[6:])
    data = run(data).sets["val"]
    for record, (image, _) in zip(data.records, data, strict=True):
        pixels = v2.functional.pil_to_tensor(infer.open_image(record["path"]))
        assert torch.equal(image, v2.functional.resize(pixels, fit(64, 96, 48, 72)))
        assert image.float().std() > 10

# ---- train_voc: augmentation ---------------------------------------------------------------------

@pytest.mark.parametrize("augmentation", [train_voc.paper, train_voc.from_scratch])
def test_boxes_follow_their_pixels(augmentation):
    torch.manual_seed(0)
    pixels = torch.zeros(3, 375, 500, dtype=torch.uint8)
    pixels[0, 100:220, 150:300] = 255
    box = torch.tensor([[150.0, 100, 300, 220]])
    shorter, mirrored, seen = set(), 0, 0
    for i in range(60):
        target = {"labels": torch.tensor([5]), "boxes": tv_tensors.BoundingBoxes(
            box, format="XYXY", canvas_size=(375, 500))}
        image, target = v2.Compose(augmentation(i, 60))(tv_tensors.Image(pixels), target)
        shorter.add(min(image.shape[1:]))
        assert image.dtype == torch.uint8 and max(image.shape[1:]) <= 1333
        if target["labels"].tolist() == [5]:
            scale = max(image.shape[1:]) / 500
            close(bright(image), target["boxes"][0].as_subclass(torch.Tensor), max(2, 2 * scale))
            mirrored += float(target["boxes"][0, ::2].mean()) > image.shape[2] / 2
            seen += 1
    assert seen > 40 and 10 < mirrored < 50
    assert augmentation is train_voc.from_scratch or shorter <= set(range(480, 801, 32))
    assert len(shorter) > 6

def test_crops_are_the_papers():
    """384 to 600 pixels a side of an image whose shorter side is 400, 500 or 600."""
    torch.manual_seed(0)
    crop = train_voc.RandomSizeCrop((400, 500, 600), 384, 600)
    sizes = torch.tensor([crop(tv_tensors.Image(torch.zeros(1, 375, 500))).shape[1:]
                          for _ in range(400)]) / 375       # of the shorter side
    assert sizes[:, 0].min() >= 384 / 600 - 0.01 and sizes[:, 0].max() <= 1
    assert 384 / 600 - 0.01 <= sizes[:, 1].min() < 0.7 and 1.25 < sizes[:, 1].max() <= 4 / 3

def test_items_depend_on_seed_epoch_and_index_alone(folder, run):
    data = run(folder).sets["train"]
    loaders = [DataLoader(data, batch_size=None, num_workers=workers) for workers in (0, 2)]

    def items(loader, epoch, state):
        data.epoch.fill_(epoch)
        torch.manual_seed(state)
        return [image.float().mean().item() for image, _ in loader]

    first = items(loaders[0], 3, 0)
    assert first == items(loaders[0], 3, 1) == items(loaders[1], 3, 2) != items(loaders[0], 4, 0)
    assert data.counts[1] == 2 and len(data[1][1]["labels"]) == 1       # one is difficult

# ---- train_voc: average precision ----------------------------------------------------------------

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]

def peer_ap(predictions, targets, num_classes):
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    peers = []
    for images in (targets, predictions):
        rows = []
        for i, one in enumerate(images):
            for k, (x0, y0, x1, y1) in enumerate(one["boxes"].tolist()):
                rows.append({
                    "id": len(rows) + 1, "image_id": i + 1, "category_id": int(one["labels"][k]),
                    "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(one["ignore"][k]) if "ignore" in one else 0,
                    "score": float(one["scores"][k]) if "scores" in one else 0})
        peers.append(coco.COCO())
        peers[-1].dataset = {"images": [{"id": i + 1} for i in range(len(targets))],
                             "categories": [{"id": k} for k in range(num_classes)],
                             "annotations": rows}
        peers[-1].createIndex()
    evaluator = evaluation.COCOeval(*peers, "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    precision = evaluator.eval["precision"][0, :, :, 0, 2].T
    per_class = [p[p > -1].mean() if (p > -1).any() else -1 for p in precision]
    return [*evaluator.stats, *per_class]

def random_case(rng, images, classes, most):
    """Objects of all sizes, and detections of which most are near one; some scores are equal."""
    predictions, targets = [], []
    for _ in range(images):
        m, n = rng.integers(0, most), rng.integers(0, most * 2)
        corner, side = rng.uniform(0, 300, (m, 2)), np.exp(rng.uniform(2, 5.5, (m, 2)))
        boxes = np.concatenate((corner, corner + side), 1).round(int(rng.integers(0, 3)))
        labels = rng.integers(0, classes, m)
        picks = rng.integers(0, m, n if m else 0)
        near = boxes[picks] + rng.normal(0, 12, (len(picks), 4)) * (rng.random((len(picks), 1)) < 0.8)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        other = rng.integers(0, classes, len(picks))
        guess = np.where(rng.random(len(picks)) < 0.8, labels[picks], other)
        scores = rng.random(len(picks)).round(1 if rng.random() < 0.5 else 9)
        predictions.append(dict(scores=scores, labels=guess, boxes=near))
        targets.append(dict(labels=labels, boxes=boxes, ignore=rng.random(m) < 0.2))
    return [[{name: torch.tensor(value) for name, value in one.items()} for one in many]
            for many in (predictions, targets)]

@pytest.mark.parametrize("images, classes, most, cases", [(8, 3, 12, 30), (3, 5, 4, 30), (2, 1, 90, 3)],
                         ids=["usual", "sparse", "more than 100 an image"])
def test_ap_equals_pycocotools(images, classes, most, cases):
    rng = np.random.default_rng(images)
    for _ in range(cases):
        case = *random_case(rng, images, classes, most), classes + 1    # one class is never there
        ours = train_voc.coco_ap(*case)
        ours = [*(ours[name] for name in METRICS), *ours["AP50_per_class"]]
        assert ours == pytest.approx(peer_ap(*case), abs=1e-9)

def test_ap_of_a_tie_of_nothing_and_of_the_truth():
    """The first detection overlaps both objects alike: COCO gives it the later one, which leaves
    the earlier one to the second."""
    targets = [{"labels": torch.tensor([0, 0]),
                "boxes": torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10]])}]
    tie = [{"scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([0, 0]),
            "boxes": torch.tensor([[2.0, 0, 12, 10], [0, 0, 10, 10]])}]
    ours = train_voc.coco_ap(tie, targets, 1)
    assert [ours[name] for name in METRICS] == pytest.approx(peer_ap(tie, targets, 1)[:12])
    assert ours["AP50"] == pytest.approx(1)
    nothing = [{name: value[:0] for name, value in tie[0].items()}]
    assert train_voc.coco_ap(nothing, targets, 1)["AP"] == 0
    assert train_voc.coco_ap(tie, nothing, 1)["AP"] == -1
    perfect = train_voc.coco_ap([targets[0] | {"scores": torch.ones(2)}], targets, 1)
    assert perfect["AP"] == pytest.approx(1) and perfect["APl"] == -1

# ---- train_voc: training -------------------------------------------------------------------------

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

def test_killed_while_it_saves_it_resumes_bit_for_bit(folder, tmp_path, run):
    """With the third checkpoint written, but not yet renamed."""
    run(folder, "--epochs", 4, output="whole")
    [(code, _, _)] = launch(KILLED, 1, "--data", folder, "--output", tmp_path / "0",
                            "--model", "tiny", "--workers", 2, "--device", "cpu")
    assert code == -9 and (tmp_path / "0/checkpoint.pth.tmp").exists()
    assert read_checkpoint(tmp_path / "0/checkpoint.pth")["epoch"] == 1
    shutil.copytree(tmp_path / "0", tmp_path / "2")
    whole = read_checkpoint(tmp_path / "whole/checkpoint.pth")
    for workers in (0, 2):
        run(folder, "--epochs", 4, "--workers", workers, "--resume", output=str(workers))
        resumed = read_checkpoint(tmp_path / f"{workers}/checkpoint.pth")
        for name, value in whole["model"].items():
            assert torch.equal(value, resumed["model"][name]), name
        assert log_of(tmp_path / str(workers)) == log_of(tmp_path / "whole")

def test_a_run_leaves_log_checkpoints_and_pictures(folder, tmp_path, run):
    run(folder, "--epochs", 4)
    log = log_of(tmp_path / "out", ())
    assert [entry["epoch"] for entry in log] == [0, 1, 2, 3]
    assert {"train_loss", "test_loss_ce", "test_loss_giou_0", "test_class_error", "train_lr",
            "test_cardinality_error_unscaled", "n_parameters", "images_per_s"} <= set(log[0])
    assert len(log[0]["test_coco_eval_bbox"]) == 12 and len(log[0]["test_ap50_per_class"]) == 2
    assert log[-1]["train_loss"] < 0.9 * log[0]["train_loss"]
    assert Image.open(tmp_path / "out/detections.png").size == (2400, 1200)
    assert Image.open(tmp_path / "out/curves.png").size
    best = load_detr(tmp_path / "out/best.pth")
    assert best.classes == ["cat", "dog"] and best.size == 48
    done = run(folder, "--model", tmp_path / "out/best.pth", "--eval")
    losses = [entry["test_loss"] for entry in log]
    evaluated = float(re.search(r"loss ([\d.]+)", done.out)[1])
    assert min(abs(evaluated - loss) for loss in losses) < 2e-2
    assert done.sets["val"].records[3]["boxes"].shape == (0, 4)

ONE_OF_TWO = """
import sys, test_detr_mini as t
t.shrink(norm=t.FrozenBatchNorm2d, dropout=0.0)     # which keep no process's own statistics
sys.exit(t.train_voc.main(sys.argv[1:]))
"""

def test_two_processes_and_accumulated_parts_train_as_one(data, tmp_path):
    """With one object in each image, every mean over a part is also the mean over the whole."""
    voc(data, [*STEMS, "a", "b"])
    lists(data, train=STEMS[:8], val=[*STEMS[8:], "a", "b"])
    logs = []
    for output, world, parts in (("one", 1, 1), ("parts", 1, 2), ("two", 2, 1)):
        results = launch(ONE_OF_TWO, world, "--data", data, "--output", tmp_path / output,
                         "--model", "tiny", "--epochs", 2, "--accumulate", parts,
                         "--workers", 0, "--device", "cpu")
        assert not any(code for code, _, _ in results), results
        assert world == 1 or results[1][1] == ""        # only the first process prints
        logs.append(log_of(tmp_path / output))
    for other in logs[1:]:
        for one, two in zip(logs[0], other, strict=True):
            assert one.keys() == two.keys()
            for name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), name

def test_a_loss_that_is_not_finite_names_the_batch(folder, tmp_path, run):
    run(folder)
    before = (tmp_path / "out/checkpoint.pth").read_bytes()
    done = run(folder, "--resume", "--epochs", 3, "--lr", "1e30", code=2)
    assert re.search(r"not finite.*JPEGImages/\d\d.png, .*/\d\d.png", done.err)
    assert (tmp_path / "out/checkpoint.pth").read_bytes() == before

@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_leaves_the_old_files(folder, tmp_path, run, monkeypatch, call):
    run(folder)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    assert "No space left" in run(folder, "--resume", "--epochs", 2, code=2).err
    assert all(path.read_bytes() == content for path, content in before.items())

def test_a_stop_by_hand_says_how_to_go_on(folder, run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_voc, "evaluate", stop)
    assert "--resume" in run(folder, code=2).err

@pytest.mark.parametrize("arguments, message", [
    (["--model", "nowhere.pth"], "nowhere.pth"), (["--resume"], "checkpoint.pth"),
    (["--epochs", "0"], "--epochs"), (["--device", "abacus"], "--device abacus"),
    (["--eval"], "tiny starts untrained"), (["--output", __file__], "test_detr_mini.py"),
    (["--train", "2012_train"], "no set '2012_train'")])
def test_wrong_arguments_are_explained(folder, run, arguments, message):
    assert message in run(folder, *arguments, code=2).err

def test_the_class_head_keeps_what_it_knows():
    model = small(91)
    model.classes = list(detr_mini.COCO_CLASSES)
    head = model.class_embed.weight.clone()
    new = train_voc.keep_known_classes(model, ["aeroplane", "cat", "unicorn", "tvmonitor"])
    assert new == ["unicorn"] and model.class_embed.weight.shape == (5, 32)
    for row, name in ((0, "airplane"), (1, "cat"), (3, "tv")):
        label = detr_mini.COCO_CLASSES.index(name)
        assert torch.equal(model.class_embed.weight[row], head[label])
    assert torch.equal(model.class_embed.weight[4], head[91])        # "no object"
    names = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
             "motorbike person pottedplant sheep sofa train tvmonitor").split()
    model.class_embed, model.classes = nn.Linear(32, 92), list(detr_mini.COCO_CLASSES)
    assert train_voc.keep_known_classes(model, names) == []

def test_cocos_weights_evaluate_and_fine_tune(folder, tmp_path, run):
    """The head of 91 classes as it is; the paper's augmentation; or a file without a head."""
    for path in (folder / "Annotations").iterdir():
        path.write_text(path.read_text().replace("dog", "sofa"))
    coco = saved(tmp_path / "coco.pth", {
        "model": small(91).state_dict(), "config": {"nheads": 4, "size": 48, "max_size": 72}})
    last = run(folder, "--model", coco, "--eval").out.splitlines()[-1]
    assert "couch" in last and "cat" in last and "sofa" not in last and "dog" not in last
    assert "2 of 2 classes known already" in run(folder, "--model", coco).out
    state = {k: v for k, v in small().state_dict().items() if "class_embed" not in k}
    headless = saved(tmp_path / "headless.pth", {"model": state, "config": {"nheads": 4}})
    assert "classes: cat, sofa" in run(folder, "--model", headless).out

# ---- train_voc: VOC from the network -------------------------------------------------------------

@pytest.fixture
def mirror(folder, server, monkeypatch):
    """The folder as VOC2012's archive on the second of two mirrors."""
    root, url = server
    archive = root / "good/VOCtrainval_11-May-2012.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, "VOCdevkit/VOC2012")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(train_voc.ARCHIVES, "2012", (archive.name, md5))
    monkeypatch.setattr(train_voc, "MIRRORS", (url + "dead/{file}", url + "good/{file}"))
    return archive

def test_voc_is_fetched_once_and_unpacked_again_if_that_was_interrupted(mirror, tmp_path, capsys):
    names, data = ["2012_train", "2012_val"], tmp_path / "fetched"
    train_voc.fetch_voc(data, names)
    out = capsys.readouterr().out
    assert out.index("dead/VOC") < out.index("good/VOC")
    image = data / "VOCdevkit/VOC2012/JPEGImages/03.png"
    assert image.is_file() and not list(data.glob("*.unfinished"))
    mirror.unlink()
    train_voc.fetch_voc(data, names)
    assert capsys.readouterr().out == ""
    image.unlink()
    (data / f"{mirror.name}.unfinished").touch()        # what an interrupted run leaves
    train_voc.fetch_voc(data, names)
    assert image.is_file() and not list(data.glob("*.unfinished"))

def test_another_file_than_vocs_is_refused(mirror, tmp_path):
    mirror.write_bytes(bytes(1000))
    with pytest.raises(OSError, match=f"(?s)dead.*good.*{mirror.name} by hand"):
        train_voc.fetch_voc(tmp_path / "fetched", ["2012_train"])
    assert not (tmp_path / "fetched/VOCdevkit").exists()

# ---- infer ---------------------------------------------------------------------------------------

@pytest.fixture
def see(tmp_path, weights, capsys):
    """A function that runs infer.py; returns its output, error lines and JSON."""
    def start(*sources, code=0):
        arguments = (*sources, "--weights", weights, "--out", tmp_path / "seen", "--threshold", 0,
                     "--device", "cpu", "--json", tmp_path / "found.json")
        assert infer.main(list(map(str, arguments))) == code
        out, err = capsys.readouterr()
        results = json.loads((tmp_path / "found.json").read_text()) if code == 0 else None
        return SimpleNamespace(out=out, err=err.splitlines(), results=results)
    return start

@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "jpg"), ("RGB", "png"), ("RGB", "webp"), ("RGB", "tiff"), ("L", "png"), ("P", "gif"),
    ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("F", "tiff")])
def test_every_kind_of_image_is_opened(tmp_path, mode, suffix):
    ramp = np.tile(np.linspace(0, 255, 80, dtype=np.uint8), (50, 1))
    image = {"I;16": lambda: Image.fromarray(ramp.astype(np.uint16) * 257),
             "F": lambda: Image.fromarray(ramp.astype(np.float32)),
             "P": lambda: Image.fromarray(ramp).convert("RGB").quantize(256)}.get(
        mode, lambda: Image.fromarray(ramp).convert("RGB").convert(mode))()
    put(tmp_path / f"image.{suffix}", image)
    seen = infer.open_image(tmp_path / f"image.{suffix}")
    assert seen.mode == "RGB" and seen.size == (80, 50)
    assert np.abs(np.asarray(seen, dtype=int) - ramp[..., None]).mean() < 6

def test_orientation_transparency_and_the_first_frame(tmp_path):
    image, exif = Image.new("RGB", (80, 50), "red"), Image.Exif()
    exif[0x0112] = 6
    put(tmp_path / "turned.jpg", image, exif=exif)
    assert infer.open_image(tmp_path / "turned.jpg").size == (50, 80)
    put(tmp_path / "clear.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert infer.open_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    frames = [Image.new("RGB", (80, 50), "blue")]
    put(tmp_path / "moving.gif", image, save_all=True, append_images=frames)
    assert infer.open_image(tmp_path / "moving.gif").getpixel((3, 3))[0] > 200

def test_one_bad_file_stops_no_other(tmp_path, see, monkeypatch):
    good = tmp_path / "good.jpg"
    put(good, Image.effect_noise((80, 50), 90))
    put(tmp_path / "cut.jpg", good.read_bytes()[:400])
    put(tmp_path / "text.png", "no image")
    put(tmp_path / "panorama.png", Image.new("L", (400, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    bad = [tmp_path / name for name in ("cut.jpg", "text.png", "nothing.jpg", "*.jpg")]
    err = see(*bad, tmp_path / "panorama.png", good, code=2).err
    assert len(err) == 5
    for name, line in zip((*bad, tmp_path / "panorama.png"), err):
        assert line.startswith(f"infer.py: error: {name}: ")
    assert "no image matches this pattern" in err[3] and "megapixels" in err[4]
    results = json.loads((tmp_path / "found.json").read_text())
    assert len(results) == 9 and (tmp_path / "seen/good.png").exists()

def test_json_is_cocos(tmp_path, see):
    put(tmp_path / "0042.png", Image.effect_noise((80, 50), 90))
    results = see(tmp_path / "0042.png").results
    [found] = detect(load_detr(tmp_path / "weights.pth"), infer.open_image(tmp_path / "0042.png"), 0)
    for result, (x0, y0, x1, y1), label in zip(
            results, found["boxes"].tolist(), found["labels"].tolist(), strict=True):
        assert set(result) == {"image_id", "category_id", "bbox", "score"}
        assert result["image_id"] == 42 and result["category_id"] == label
        assert result["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)

def test_thin_and_big_images(tmp_path, see):
    for name, size in {"thin": (1, 300), "flat": (700, 1), "dot": (1, 1), "big": (5200, 4000)}.items():
        put(tmp_path / f"in/{name}.png", Image.new("RGB", size, "gray"))
    assert len(see(tmp_path / "in").results) == 4 * 9
    assert len(list((tmp_path / "seen").iterdir())) == 4

def test_attention_is_a_second_image_and_the_mean_of_the_decoders_layers(
        tmp_path, see, monkeypatch):
    put(tmp_path / "a.png", Image.effect_noise((120, 80), 90))
    drawn, draw = [], infer.draw_attention
    monkeypatch.setattr(infer, "draw_attention", lambda *args: drawn.append(args) or draw(*args))
    see(tmp_path / "a.png", "--attention")
    assert {file.name for file in (tmp_path / "seen").iterdir()} == {"a.png", "a_attention.png"}

    model = load_detr(tmp_path / "weights.pth")
    layers = [layer.multihead_attn for layer in model.transformer.decoder.layers]
    for layer in layers:
        layer.keep_weights = True
    [found] = detect(model, infer.open_image(tmp_path / "a.png"), 0.0)
    means = [layer.weights[0, :, found["queries"]].mean(0) for layer in layers]
    assert not torch.allclose(*means, atol=1e-5)
    close(drawn[0][2].flatten(1), sum(means) / 2, 1e-5)
    close(drawn[0][2].sum((1, 2)), torch.ones(9))

@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_attention_tiles_fill_their_image(count):
    found = {"labels": torch.zeros(count, dtype=torch.int64), "boxes": torch.zeros(count, 4)}
    sheet = infer.draw_attention(Image.new("RGB", (120, 80), "white"), found, torch.ones(count, 4, 6))
    assert (np.asarray(sheet).max(-1) > 0).mean() > 0.99

def test_folders_and_equal_names(tmp_path, see):
    for name in ("x/a.png", "x/b.jpg", "y/a.png"):
        put(tmp_path / name, Image.new("RGB", (40, 40)))
    see(tmp_path / "x", tmp_path / "y")
    assert len(list((tmp_path / "seen").iterdir())) == 3
    (tmp_path / "empty").mkdir()
    assert "empty: a folder without images" in see(tmp_path / "empty", code=2).err[0]

def test_images_from_the_network(tmp_path, see, server):
    root, url = server
    put(root / "far.png", Image.new("RGB", (60, 40)))
    see(f"{url}far.png?size=big")
    assert (tmp_path / "seen/far.png").exists()
    assert "gone.png" in see(f"{url}gone.png", code=2).err[0]

def test_weights_from_the_network(tmp_path, server, monkeypatch, capsys):
    root, url = server
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(detr_mini, "ZOO_URL", url)
    model = saved(tmp_path / "model.pth", {"model": small(91).state_dict(), "config": {"nheads": 4}})
    name = f"detr-{hashlib.sha256(model.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setitem(ZOO, "detr_resnet50", name)
    put(tmp_path / "a.png", Image.new("RGB", (60, 40)))
    arguments = [str(tmp_path / "a.png"), "--out", str(tmp_path / "seen"), "--device", "cpu"]
    assert infer.main(arguments) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path}/hub/checkpoints/{name} by hand" in err and "404" in err
    put(root / name, "something else")
    assert infer.main(arguments) == 2 and "invalid hash" in capsys.readouterr().err
    shutil.copy(model, root / name)
    assert infer.main(arguments) == 0
    (root / name).unlink()
    assert infer.main(arguments) == 0           # kept: no network is needed the second time

@pytest.mark.parametrize("arguments, message", [
    (["--weights", "nowhere.pth"], "nowhere.pth"), (["--device", "abacus"], "--device abacus"),
    (["--threshold", "70"], "--threshold 70: a score is from 0 to 1"),
    (["--threshold", "-0.1"], "--threshold")])
def test_wrong_arguments_of_infer_are_explained(weights, capsys, arguments, message):
    assert infer.main(["--weights", str(weights), *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1

def test_the_first_command_finds_the_cells(tmp_path):
    """`python infer.py`: the white cell of each photograph, as BCCD marks it, and red ones."""
    marked = {"14": (236, 211, 379, 353), "17": (128, 215, 336, 391), "29": (75, 179, 224, 315)}
    subprocess.run([sys.executable, HERE / "infer.py", "--json", "found.json"], cwd=tmp_path,
                   check=True)
    results = json.loads((tmp_path / "found.json").read_text())
    classes = load_detr("demo").classes
    for number, box in marked.items():
        photo = f"BloodImage_000{number}"
        assert (tmp_path / f"detections/{photo}.png").exists()
        cells = [(classes[result["category_id"]], result["bbox"])
                 for result in results if result["image_id"] == photo]
        [(x, y, w, h)] = [bbox for name, bbox in cells if name == "WBC"]
        overlap = box_iou(torch.tensor([[x, y, x + w, y + h]]), torch.tensor([box]).float())
        assert overlap > 0.5 and 8 <= [name for name, _ in cells].count("RBC") <= 40

@pytest.mark.parametrize("script", ["infer.py", "train_voc.py"])
def test_help_shows_commands(script):
    run = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and f"python {script} " in run.stdout and "--device" in run.stdout

# ---- The benchmark: pytest -m bench -s -----------------------------------------------------------

BENCH = dict(size=(800, 1066), step_size=(640, 640), rounds=15, seconds=60, rate_side=4096,
             images=128, options={})
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32]
if ON_GPU or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
    DTYPES.append(torch.bfloat16)

def seconds(work):
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - start

@functools.cache
def device_rate(dtype):
    """FLOP/s of the better of a large matmul and a large 3x3 convolution."""
    side = BENCH["rate_side"] if ON_GPU else BENCH["rate_side"] // 4
    a = torch.randn(side, side, device=DEVICE, dtype=dtype)
    x = torch.randn(16 if ON_GPU else 1, 256, 100, 136, device=DEVICE, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    conv = nn.Conv2d(256, 256, 3, padding=1, device=DEVICE, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last)
    rates = []
    with torch.no_grad():
        for work in (lambda: a @ a, lambda: conv(x)):
            with FlopCounterMode(display=False) as flops:
                work()
            rates.append(flops.get_total_flops() / min(seconds(work) for _ in range(10)))
    print(f"\n{dtype}: matmul {rates[0] / 1e12:.2f}, convolution {rates[1] / 1e12:.2f} TFLOP/s")
    return max(rates)

def compare(title, images, works):
    """Time {(library, how, dtype): (work, FLOPs)} turn by turn, and print the medians."""
    times = {}
    for name, (work, _) in works.items():
        try:
            seconds(work)
            seconds(work)
            times[name] = []
        except Exception as error:          # torch.compile needs a compiler
            print(f"{title}: {' '.join(map(str, name))}: not here ({type(error).__name__})")
    start = time.perf_counter()
    for _ in range(BENCH["rounds"]):
        if time.perf_counter() - start > BENCH["seconds"] and all(times.values()):
            break
        for name, taken in times.items():
            taken.append(seconds(works[name][0]))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for (library, how, dtype), median in medians.items():
        peer = medians.get(("transformers", how, dtype), float("nan"))
        share = works[library, how, dtype][1] / median / device_rate(dtype)
        print(f"{title:20} {str(dtype)[6:]:9} {how:9} {library:13} {1000 * median:9.1f} ms "
              f"{images / median:8.1f} images/s {peer / median:6.2f} x transformers "
              f"{share:5.0%} of the device's rate", flush=True)

def works_of(libraries, hows, call):
    """{(library, how, dtype): (work, FLOPs)} for `compare`."""
    works = {}
    for dtype in DTYPES:
        for how in hows:
            for library, network in libraries.items():
                compiled = torch.compile(network) if how == "compiled" else network
                with FlopCounterMode(display=False) as flops:
                    call(library, network, dtype)
                work = functools.partial(call, library, compiled, dtype)
                works[library, how, dtype] = work, flops.get_total_flops()
    return works

@pytest.fixture(scope="module")
def libraries():
    model = DETR(**BENCH["options"])
    where = torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} CPU threads"
    print(f"\ntorch {torch.__version__}, {where}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    peer = in_transformers(model)
    peer.config.auxiliary_loss = True
    for name, parameter in peer.model.backbone.named_parameters():      # as ours, and the paper's
        parameter.requires_grad_(not name.startswith(("model.conv1", "model.layer1")))
    return {"detr_mini": model.to(DEVICE), "transformers": peer.to(DEVICE)}

@pytest.mark.bench
@pytest.mark.parametrize("batch", [1, 16] if ON_GPU else [1])
def test_bench_inference(libraries, batch):
    images = torch.randn(batch, 3, *BENCH["size"], device=DEVICE)
    libraries["detr_mini"].aux_loss = False

    def look(library, network, dtype):
        with torch.inference_mode(), torch.autocast(DEVICE.type, dtype, dtype != torch.float32):
            network(images)

    for network in libraries.values():
        network.eval()
    compare(f"inference, batch {batch}", batch, works_of(libraries, ("eager", "compiled"), look))

@pytest.mark.bench
def test_bench_training_step(libraries):
    """Ten objects an image, the losses of all decoder layers, gradient clipping, AdamW."""
    batch = 16 if ON_GPU else 2
    images = torch.randn(batch, 3, *BENCH["step_size"], device=DEVICE)
    targets = [{name: value.to(DEVICE) for name, value in target.items()}
               for target in random_targets([10] * batch, 91)]
    criterion = SetCriterion(91, HungarianMatcher()).to(DEVICE)
    libraries["detr_mini"].to(memory_format=torch.channels_last).aux_loss = True
    optimizers = {
        library: torch.optim.AdamW([p for p in network.train().parameters() if p.requires_grad],
                                   1e-6, fused=True) for library, network in libraries.items()}

    def step(library, network, dtype):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            if library == "transformers":
                loss = network(images, labels=peer_targets(targets)).loss
            else:
                outputs = network(images)
        if library == "detr_mini":
            loss = criterion.total(criterion(outputs, targets))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizers[library].step()
        optimizers[library].zero_grad()

    compare(f"step, {batch} images", batch, works_of(libraries, ("eager",), step))

@pytest.mark.bench
def test_bench_loader(data):
    """JPEGs of VOC's size with the paper's augmentation, in one process."""
    photo = infer.open_image(HERE / "assets/BloodImage_00014.jpg").resize((500, 375))
    stems = [f"{i:04}" for i in range(BENCH["images"])]
    for stem in stems:
        put(data / f"{stem}.jpg", photo)
        put(data / f"{stem}.xml", xml([("cat", (100, 100, 300, 250))], size=(500, 375)))
    xmls, images = train_voc.find_files(data)
    records = train_voc.read_set("train", xmls, images)
    dataset = train_voc.VOC(records, ["cat"], 800, 1333, lambda epoch: train_voc.paper(epoch, 40))
    loader = DataLoader(dataset, batch_size=16, collate_fn=train_voc.collate)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = [len(dataset) / seconds(lambda: list(loader)) for _ in range(3)]
    torch.set_num_threads(threads)
    print(f"\nloader: {statistics.median(rates):.0f} images/s a core")
