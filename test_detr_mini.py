"""Every number is held against code that nobody here wrote: transformers' DETR, torchvision, torch.nn, pycocotools, scipy."""
import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

import detr_mini
import infer
import train_voc
from detr_mini import (DETR, ZOO, BasicBlock, FrozenBatchNorm2d, HungarianMatcher, MultiheadAttention, PositionEmbeddingSine, ResNet,
                       SetCriterion, box_cxcywh_to_xyxy, box_iou, box_xyxy_to_cxcywh, build_detr, detect, fit, generalized_box_iou,
                       load_detr, normalize, pad_images, post_process, read_checkpoint)

HERE = Path(__file__).parent
PHOTOS = sorted((HERE / "assets").glob("BloodImage_*.jpg"))


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def randomize(model, seed=0):
    """Random norms and biases too: with the initial ones and zeros, much could be wrong and not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1 and tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.2 - 0.1)
    return model.eval()


def random_targets(images, objects, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(0, classes, (m,), generator=generator),
             "boxes": torch.rand(m, 4, generator=generator) * torch.tensor([0.5, 0.5, 0.3, 0.3]) + torch.tensor([0.2, 0.2, 0.01, 0.01])}
            for m in objects[:images]]


def small(num_classes=3, norm=FrozenBatchNorm2d, **options):
    torch.manual_seed(0)
    return DETR(num_classes, ResNet(BasicBlock, (1, 1, 1), width=8, norm=norm), hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2,
                dim_feedforward=48, num_queries=9, dropout=0.0, **options)


# ---- Boxes -------------------------------------------------------------------------------------------------------------

def test_boxes_equal_torchvision():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 4, generator=generator) for n in (50, 70))
    close(box_cxcywh_to_xyxy(a), torchvision.ops.box_convert(a, "cxcywh", "xyxy"))
    close(box_xyxy_to_cxcywh(a), torchvision.ops.box_convert(a, "xyxy", "cxcywh"))
    a, b = box_cxcywh_to_xyxy(a), box_cxcywh_to_xyxy(b)
    close(box_iou(a, b), torchvision.ops.box_iou(a, b), atol=1e-6)
    close(generalized_box_iou(a, b), torchvision.ops.generalized_box_iou(a, b), atol=1e-6)
    batched = generalized_box_iou(torch.stack((a[:30], a[20:])), torch.stack((b[:40], b[30:])))
    close(batched[1], torchvision.ops.generalized_box_iou(a[20:], b[30:]), atol=1e-6)


# ---- Backbone ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, dilation", [("resnet18", False), ("resnet50", False), ("resnet50", True)])
def test_backbone_equals_torchvision(name, dilation):
    peer = getattr(torchvision.models, name)(norm_layer=TorchvisionFrozenBatchNorm2d,
                                             **({"replace_stride_with_dilation": (False, False, True)} if dilation else {}))
    randomize(peer).fc = nn.Identity()
    ours = ResNet(*detr_mini.RESNETS[name], dilation=dilation)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        features = ours(x)
        stages = nn.Sequential(*list(peer.children())[:-2])
        expected = stages(x)
    assert features.shape[1] == ours.num_channels
    assert features.shape[2:] == (-(-97 // ours.stride), -(-130 // ours.stride))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_resnet50_keys_are_torchvisions_and_101_too():
    for name in ("resnet50", "resnet101"):
        peer = getattr(torchvision.models, name)().state_dict()
        with torch.device("meta"):
            ours = ResNet(*detr_mini.RESNETS[name]).state_dict()
        expected = {k: v.shape for k, v in peer.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
        assert {k: v.shape for k, v in ours.items()} == expected


def test_frozen_norm_equals_batch_norm_in_eval_and_loads_it():
    peer = randomize(nn.BatchNorm2d(7))
    ours = FrozenBatchNorm2d(7)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 7, 5, 5)
    close(ours(x), peer(x), atol=1e-6)
    assert not list(ours.parameters())


def test_trainable_backbone_equals_torchvision_in_training_and_evaluation():
    peer = torchvision.models.resnet18()
    ours = ResNet(*detr_mini.RESNETS["resnet18"], norm=nn.BatchNorm2d)
    ours.load_state_dict({k: v for k, v in peer.state_dict().items() if not k.startswith("fc.")})
    x, stages = torch.randn(4, 3, 64, 64), nn.Sequential(*list(peer.children())[:-2])
    close(ours.train()(x), stages.train()(x))
    close(ours.eval()(x), stages.eval()(x))
    assert all(p.requires_grad for p in ours.parameters())
    frozen = [name for name, p in ResNet(*detr_mini.RESNETS["resnet50"]).named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith(("conv1", "layer1")) for name in frozen)


# ---- Attention ---------------------------------------------------------------------------------------------------------

def test_attention_equals_torch():
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(peer.in_proj_bias)
    nn.init.normal_(peer.out_proj.bias)
    ours = MultiheadAttention(32, 4)
    ours.load_state_dict(peer.state_dict())
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 11, 32), torch.randn(2, 11, 32)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[1, 6:] = True
    for padding in (None, mask):
        attend = None if padding is None else ~padding[:, None, None]
        expected, weights = peer(q, k, v, key_padding_mask=padding, average_attn_weights=False)
        ours.keep_weights = False
        close(ours(q, k, v, attend), expected, atol=1e-6)
        ours.keep_weights = True
        close(ours(q, k, v, attend), expected, atol=1e-6)
        close(ours.weights, weights, atol=1e-6)


def test_attention_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention, x = MultiheadAttention(32, 4, dropout=0.5), torch.randn(1, 6, 32)
    assert not torch.equal(attention.train()(x, x, x), attention(x, x, x))
    assert torch.equal(attention.eval()(x, x, x), attention(x, x, x))


# ---- The whole detector against transformers ----------------------------------------------------------------------------

def in_transformers(model, stride=32):
    """The same detector, with the same weights, in transformers."""
    transformers = pytest.importorskip("transformers")
    attention = model.transformer.decoder.layers[0].self_attn
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(backbone="resnet50", use_pretrained_backbone=False, out_indices=[4],
                                                        **({"output_stride": 16} if stride == 16 else {})),
        num_labels=len(model.classes), num_queries=model.query_embed.num_embeddings, d_model=model.query_embed.embedding_dim,
        encoder_layers=len(model.transformer.encoder.layers), decoder_layers=len(model.transformer.decoder.layers),
        encoder_attention_heads=attention.heads, decoder_attention_heads=attention.heads,
        encoder_ffn_dim=model.transformer.decoder.layers[0].linear1.out_features,
        decoder_ffn_dim=model.transformer.decoder.layers[0].linear1.out_features)
    peer = transformers.DetrForObjectDetection(config).eval()
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("backbone.0.body.", "model.backbone.model.").replace("query_embed", "model.query_position_embeddings")
        name = name.replace("input_proj", "model.input_projection").replace("class_embed", "class_labels_classifier")
        name = name.replace("bbox_embed", "bbox_predictor").replace("transformer.", "model.").replace("decoder.norm.", "decoder.layernorm.")
        last_norm = "norm3" if "decoder" in name else "norm2"
        name = name.replace("norm1", "self_attn_layer_norm").replace(last_norm, "final_layer_norm") if ".layers." in name else name
        name = name.replace("norm2", "encoder_attn_layer_norm") if "decoder" in name else name
        name = name.replace("multihead_attn", "encoder_attn").replace("out_proj", "o_proj")
        name = name.replace("linear1", "mlp.fc1").replace("linear2", "mlp.fc2")
        if "in_proj" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    missing, unexpected = peer.load_state_dict(renamed, strict=False)
    assert not unexpected and not missing
    return peer


@pytest.fixture(scope="module", params=[32, 16], ids=["R50", "R50-DC5"])
def pair(request):
    torch.manual_seed(0)
    model = randomize(DETR(num_classes=7, dilation=request.param == 16, enc_layers=2, dec_layers=3, num_queries=20, aux_loss=True))
    return model, in_transformers(model, request.param)


@pytest.mark.parametrize("sizes", [[(128, 160)], [(200, 131)], [(96, 224), (160, 96), (130, 130)]], ids=["one", "odd", "padded"])
def test_detector_equals_transformers(pair, sizes):
    model, peer = pair
    images, mask = pad_images([torch.randn(3, *size) for size in sizes])
    targets = random_targets(len(sizes), [4, 0, 7], 7)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    with torch.no_grad():
        ours = model(images, mask)
        theirs = peer(images, pixel_mask=None if mask is None else (~mask).long(), labels=labels, output_hidden_states=True)
        # With its own auxiliary_loss, transformers feeds the normed state to the next layer, which the reference does
        # not: so its earlier answers are read off the states of its plain forward pass.
        states = torch.stack([peer.model.decoder.layernorm(state) for state in theirs.decoder_hidden_states[1:-1]])
        earlier = [{"logits": c, "pred_boxes": b} for c, b in zip(peer.class_labels_classifier(states), peer.bbox_predictor(states).sigmoid())]
    close(ours["pred_logits"], theirs.logits)
    close(ours["pred_boxes"], theirs.pred_boxes)
    assert len(ours["aux_outputs"]) == len(earlier) == 2
    for a, b in zip(ours["aux_outputs"], earlier):
        close(a["pred_logits"], b["logits"])
        close(a["pred_boxes"], b["pred_boxes"])
    losses, criterion = SetCriterion(7, HungarianMatcher())(ours, targets), peer_loss(7)[1]
    expected = criterion({"logits": theirs.logits, "pred_boxes": theirs.pred_boxes, "auxiliary_outputs": earlier}, labels)
    for name, value in expected.items():
        close(losses[name], torch.as_tensor(value))
    assert set(losses) - set(expected) == {"class_error"}       # the one number that transformers does not report
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    close(SetCriterion(7, HungarianMatcher()).total(losses), sum(w * v for k, v in expected.items() for n, w in weights.items() if n in k))
    predicted = theirs.logits.argmax(-1)
    right = [predicted[b, q] == targets[b]["labels"][t] for b, (q, t) in enumerate(HungarianMatcher()(ours, targets))]
    close(losses["class_error"], 100 - 100 * torch.cat(right).float().mean())


def test_without_aux_loss_the_answer_is_the_last_layers():
    model = randomize(small())
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        last = model(x)
        model.aux_loss = True
        every = model(x)
    assert set(last) == {"pred_logits", "pred_boxes"} and len(every["aux_outputs"]) == 1
    close(last["pred_boxes"], every["pred_boxes"], atol=1e-6)


def test_a_list_is_padded_and_padding_changes_nothing():
    model = randomize(small())
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]
    with torch.no_grad():
        outputs = model(images)
        batch, mask = pad_images(images)
        close(outputs["pred_boxes"], model(batch, mask)["pred_boxes"], atol=1e-6)
        same = model([images[0], images[0]])
        close(same["pred_logits"], model(images[0][None].expand(2, -1, -1, -1))["pred_logits"], atol=1e-6)
        nothing = model(batch[:1], torch.zeros(1, 96, 96, dtype=torch.bool))    # a mask that hides nothing
        close(nothing["pred_boxes"], model(batch[:1])["pred_boxes"], atol=1e-6)
    assert pad_images([images[0], images[0]])[1] is None
    assert mask.shape == (2, 96, 96) and int(mask.sum()) == 2 * 32 * 96


def test_positions_equal_transformers_with_padding():
    from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding
    real = torch.zeros(2, 9, 13, dtype=torch.bool)
    real[0, :9, :13], real[1, :4, :7] = True, True
    peer = DetrSinePositionEmbedding(16, normalize=True)
    expected = peer(torch.Size((2, 3, 9, 13)), torch.device("cpu"), torch.float32, mask=real)
    expected = expected if expected.dim() == 3 else expected.flatten(2).transpose(1, 2)
    close(PositionEmbeddingSine(16)(real), expected, atol=1e-5)


@pytest.mark.parametrize("dilation", [False, True])
def test_dc5_has_twice_the_resolution(dilation):
    body = DETR(dilation=dilation, enc_layers=1, dec_layers=1).backbone[0].body
    assert body.stride == (16 if dilation else 32)


def test_published_names_and_shapes():
    """Names and shapes put together from torchvision's ResNet and torch.nn's own transformer layers, DETR-R50's parts."""
    encoder = nn.TransformerEncoderLayer(256, 8, 2048).state_dict()
    decoder = nn.TransformerDecoderLayer(256, 8, 2048).state_dict()
    expected = {f"transformer.encoder.layers.{i}.{k}": v.shape for i in range(6) for k, v in encoder.items()}
    expected |= {f"transformer.decoder.layers.{i}.{k}": v.shape for i in range(6) for k, v in decoder.items()}
    expected |= {"transformer.decoder.norm.weight": (256,), "transformer.decoder.norm.bias": (256,),
                 "query_embed.weight": (100, 256), "input_proj.weight": (256, 2048, 1, 1), "input_proj.bias": (256,),
                 "class_embed.weight": (92, 256), "class_embed.bias": (92,),
                 "bbox_embed.layers.0.weight": (256, 256), "bbox_embed.layers.0.bias": (256,),
                 "bbox_embed.layers.1.weight": (256, 256), "bbox_embed.layers.1.bias": (256,),
                 "bbox_embed.layers.2.weight": (4, 256), "bbox_embed.layers.2.bias": (4,)}
    for backbone, dilation in (("resnet50", False), ("resnet50", True), ("resnet101", False), ("resnet101", True)):
        body = getattr(torchvision.models, backbone)(norm_layer=TorchvisionFrozenBatchNorm2d).state_dict()
        names = expected | {f"backbone.0.body.{k}": v.shape for k, v in body.items() if not k.startswith("fc.")}
        with torch.device("meta"):
            model = DETR(backbone=backbone, dilation=dilation)
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {k: tuple(v) for k, v in names.items()}
        assert backbone == "resnet101" or sum(p.numel() for p in model.parameters()) == 41_524_768


def test_compile_without_a_break_gives_the_same():
    model = randomize(small())
    x, (padded, mask) = torch.randn(1, 3, 64, 96), pad_images([torch.randn(3, 64, 96), torch.randn(3, 80, 64)])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in ((x,), (padded, mask)):
            close(compiled(*arguments)["pred_boxes"], model(*arguments)["pred_boxes"], atol=1e-5)


def test_export_with_dynamic_height_and_width():
    model = randomize(small())
    sides = {2: torch.export.Dim("height", min=32, max=1333), 3: torch.export.Dim("width", min=32, max=1333)}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(1, 3, 96, 128),), dynamic_shapes={"images": sides}).module()
        for size in ((96, 128), (70, 201)):
            x = torch.randn(1, 3, *size)
            close(exported(x)["pred_logits"], model(x)["pred_logits"], atol=1e-5)


def test_wrong_construction_says_what_to_do():
    with pytest.raises(ValueError, match="choose one of resnet18"):
        DETR(backbone="resnet51")
    with pytest.raises(ValueError, match="hidden_dim 30"):
        DETR(hidden_dim=30)


# ---- Matching and loss --------------------------------------------------------------------------------------------------

def peer_loss(classes=6):
    module = pytest.importorskip("transformers.loss.loss_for_object_detection")
    matcher = module.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    return matcher, module.ImageLoss(matcher=matcher, num_classes=classes, eos_coef=0.1, losses=["labels", "boxes", "cardinality"])


def random_outputs(images, queries, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {"pred_logits": torch.randn(images, queries, classes + 1, generator=generator) * 2,
            "pred_boxes": torch.rand(images, queries, 4, generator=generator) * 0.5 + 0.2}


@pytest.mark.parametrize("objects", [[3, 5, 1], [0, 4, 0], [0, 0, 0], [12, 30, 2]], ids=["some", "an empty image", "empty", "more than queries"])
@pytest.mark.parametrize("layers", [1, 4])
def test_matching_and_losses_equal_transformers(objects, layers):
    matcher, criterion = peer_loss()
    outputs = [random_outputs(3, 12, 6, seed) for seed in range(layers)]
    ours = {**outputs[-1], "aux_outputs": outputs[:-1]} if layers > 1 else outputs[0]
    rename = [{"logits": o["pred_logits"], "pred_boxes": o["pred_boxes"]} for o in outputs]
    theirs = {**rename[-1], "auxiliary_outputs": rename[:-1]} if layers > 1 else rename[0]
    targets = random_targets(3, objects, 6)
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    for (q, t), (peer_q, peer_t) in zip(HungarianMatcher()(ours, targets), matcher(rename[-1], labels)):
        assert torch.equal(q, peer_q) and torch.equal(t, peer_t)
    losses, expected = SetCriterion(6, HungarianMatcher())(ours, targets), criterion(theirs, labels)
    for name, value in expected.items():
        close(losses[name], torch.as_tensor(value), atol=1e-5)
    if not sum(objects):
        assert losses["class_error"] == 100 and losses["loss_bbox"] == 0


def test_loss_gradients_equal_transformers():
    _, criterion = peer_loss()
    outputs = random_outputs(2, 12, 6, 0)
    targets = random_targets(2, [3, 5], 6)
    gradients = []
    for ours in (True, False):
        logits, boxes = outputs["pred_logits"].clone().requires_grad_(), outputs["pred_boxes"].clone().requires_grad_()
        if ours:
            mine = SetCriterion(6, HungarianMatcher())
            total = mine.total(mine({"pred_logits": logits, "pred_boxes": boxes}, targets))
        else:
            losses = criterion({"logits": logits, "pred_boxes": boxes}, [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets])
            total = losses["loss_ce"] + 5 * losses["loss_bbox"] + 2 * losses["loss_giou"]
        total.backward()
        gradients.append((logits.grad, boxes.grad))
    close(gradients[0][0], gradients[1][0], atol=1e-6)
    close(gradients[0][1], gradients[1][1], atol=1e-6)


def test_one_transfer_to_the_cpu_and_no_item(monkeypatch):
    calls = []
    for name in ("cpu", "item", "tolist", "nonzero", "__float__", "__bool__"):
        def counted(self, *args, _name=name, _original=getattr(torch.Tensor, name), **kwargs):
            if not (_name == "__bool__" and self.dim() == 0 and self.dtype == torch.bool):   # a check of what is on the CPU already
                calls.append(_name)
            return _original(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)
    outputs = [random_outputs(3, 12, 6, seed) for seed in range(6)]
    SetCriterion(6, HungarianMatcher())({**outputs[-1], "aux_outputs": outputs[:-1]}, random_targets(3, [3, 0, 5], 6))
    assert calls == ["cpu"]


def test_a_wrong_label_and_a_wrong_number_are_named():
    criterion, outputs, targets = SetCriterion(6, HungarianMatcher()), random_outputs(2, 12, 6, 0), random_targets(2, [3, 4], 6)
    for label in (6, -1):
        wrong = [targets[0], {**targets[1], "labels": torch.tensor([0, 1, label, 2])}]
        with pytest.raises(ValueError, match=f"image 1 of the batch: label {label} is outside the model's 0 to 5"):
            criterion(outputs, wrong)
    with pytest.raises(ValueError, match="image 0 .*not finite"):
        criterion({**outputs, "pred_boxes": outputs["pred_boxes"] * math.nan}, targets)
    with pytest.raises(ValueError, match="image 1 .*not finite"):
        criterion(outputs, [targets[0], {**targets[1], "boxes": targets[1]["boxes"] / 0}])


# ---- Use ---------------------------------------------------------------------------------------------------------------

def test_post_process_equals_transformers():
    processing = pytest.importorskip("transformers.models.detr.image_processing_detr")
    outputs = random_outputs(2, 12, 6, 0)
    sizes = torch.tensor([[480, 640], [333, 500]])
    peer_outputs = argparse.Namespace(logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"])
    peer = processing.DetrImageProcessor().post_process_object_detection(peer_outputs, threshold=0.0, target_sizes=sizes)
    for ours, theirs in zip(post_process(outputs, sizes), peer):
        for name in ("scores", "labels", "boxes"):
            close(ours[name], theirs[name])


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (500, 500), (1, 1000), (30, 5000), (333, 500), (4000, 5000), (1, 1)])
def test_fit_equals_transformers(height, width):
    from transformers.image_transforms import get_size_with_aspect_ratio
    if min(height, width) > 1:
        assert fit(height, width, 800, 1333) == tuple(get_size_with_aspect_ratio((height, width), 800, 1333))
    assert min(fit(height, width, 800, 1333)) >= 1 and max(fit(height, width, 800, 1333)) <= 1333


def test_normalize_equals_torchvision():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(image / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    close(normalize(image), expected, atol=1e-6)


def test_detect_takes_pictures_and_tensors_and_sorts():
    model = randomize(small())
    model.size, model.max_size = 64, 96
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    one, two, three = detect(model, [picture, tensor, tensor[:, :30]], threshold=0.0)
    assert len(one["scores"]) == 9 and one["boxes"].shape == (9, 4) and len(one["names"]) == 9
    close(one["boxes"], two["boxes"], atol=1e-3)
    assert (one["scores"].diff() <= 0).all()
    assert sorted(one["queries"].tolist()) == list(range(9))
    close(detect(model, picture, threshold=0.0)[0]["scores"], one["scores"])
    close(detect(model, [tensor / 255], threshold=0.0)[0]["scores"], one["scores"], atol=1e-2)
    assert detect(model, picture, threshold=1.0)[0]["names"] == []


def test_attention_of_a_detection_is_a_distribution_over_the_feature_map():
    model = randomize(small())
    attention = model.transformer.decoder.layers[-1].multihead_attn
    attention.keep_weights = True
    detect(model, torch.zeros(3, 64, 64, dtype=torch.uint8), threshold=0.0)
    close(attention.weights.sum(-1), torch.ones(1, 4, 9))


def saved(tmp_path, **entries):
    path = tmp_path / "model.pth"
    torch.save(entries, path)
    return path


def test_a_checkpoint_says_what_it_is(tmp_path):
    model = small(num_classes=22)
    for entries in ({"model": model.state_dict(), "args": argparse.Namespace(nheads=4, dilation=False, lr=1e-4), "epoch": 3},
                    {"model": model.state_dict(), "config": {"nheads": 4, "size": 64, "max_size": 96}, "classes": [f"c{i}" for i in range(22)]}):
        loaded = load_detr(saved(tmp_path, **entries))
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            close(loaded(x)["pred_boxes"], model.eval()(x)["pred_boxes"], atol=1e-6)
        assert not loaded.training and len(loaded.classes) == 22
    assert loaded.classes[3] == "c3" and loaded.size == 64
    path = tmp_path / "bare.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="nheads|hidden_dim"):
        load_detr(saved(tmp_path, model=model.state_dict(), config={"nheads": 5}))
    assert len(load_detr(path).classes) == 22


def test_a_new_head_for_other_classes(tmp_path):
    path = saved(tmp_path, model=small().state_dict(), config={"nheads": 4}, classes=["a", "b", "c"])
    model = load_detr(path, num_classes=20)
    assert model.class_embed.weight.shape == (21, 32) and len(model.classes) == 20
    assert load_detr(path, num_classes=3).classes == ["a", "b", "c"]


def test_trained_norm_and_frozen_norm_share_a_file(tmp_path):
    model = small(norm=nn.BatchNorm2d)
    model.train()(torch.randn(4, 3, 64, 64))
    path = saved(tmp_path, model=model.state_dict(), config={"nheads": 4})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(load_detr(path)(x)["pred_boxes"], model.eval()(x)["pred_boxes"], atol=1e-5)
    again = build_detr(read_checkpoint(path)["model"], nheads=4, norm=nn.BatchNorm2d)
    assert isinstance(again.backbone[0].body.bn1, nn.BatchNorm2d)


def test_the_zoos_files_load_by_name_and_know_their_dilation(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    weights = {"model": DETR().state_dict()}
    for name in ("detr_resnet50", "detr_resnet50_dc5"):
        torch.save(weights, tmp_path / "checkpoints" / ZOO[name])
        model = load_detr(name)
        assert model.backbone[0].body.stride == (16 if "dc5" in name else 32)
        assert model.classes[1] == "person" and model.classes[90] == "toothbrush" and len(model.classes) == 91


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/detr_mini_was_here",)


def test_bad_checkpoints_are_refused_by_name(tmp_path):
    good = saved(tmp_path, model=small().state_dict(), config={"nheads": 4})
    bad = tmp_path / "bad.pth"
    for data, message in ((good.read_bytes()[:3000], "not a readable checkpoint"), (b"", "not a readable checkpoint"),
                          (b"\xff\xd8\xff not a checkpoint", "not a readable checkpoint")):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=f"bad.pth.*{message}"):
            load_detr(bad)
    for entries in ({"model": Evil()}, {"model": small().state_dict(), "extra": Evil()}):
        torch.save(entries, bad)
        with pytest.raises(ValueError, match="never run"):
            load_detr(bad)
    assert not Path("/tmp/detr_mini_was_here").exists()
    weights = small().state_dict()
    torch.save({**weights, "query_embed.weight": torch.zeros(9, 33)}, bad)
    with pytest.raises(ValueError, match="bad.pth.*query_embed.weight"):
        load_detr(bad)
    for nothing in ({"a": torch.zeros(1)}, [1, 2], {"model": 3}, {}, {"model": {"class_embed.bias": torch.tensor(0)}}):
        torch.save(nothing, bad)
        with pytest.raises(ValueError, match="bad.pth"):
            load_detr(bad)
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_detr(tmp_path / "nowhere.pth")
