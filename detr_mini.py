"""DETR, the detection transformer, in one file: "End-to-End Object Detection with Transformers" (arXiv 2005.12872).

Read it beside the paper, top to bottom; each banner names the paper's section. Shapes stand in comments:
B images, N queries, L decoder layers, M objects, K classes, S = H'W' cells of the feature map (the memory), d model width.

    model = load_detr("detr_resnet50")                      # or "demo", or any DETR checkpoint file
    for found in detect(model, [Image.open("cats.jpg")]):   # scores, labels, boxes in pixels, names
        print(found["names"], found["boxes"])
"""
import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence

# ---- 1. Boxes ---------------------------------------------------------------------------------------------------------
# The network speaks (cx, cy, w, h) as fractions of the image; areas and overlaps want corners (x0, y0, x1, y1).

def box_cxcywh_to_xyxy(boxes):
    """Centre and size to corners, (..., 4) to (..., 4), in whatever unit the boxes are."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)

def box_xyxy_to_cxcywh(boxes):
    """Corners to centre and size, (..., 4) to (..., 4), in whatever unit the boxes are."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)

def _areas(boxes1, boxes2):
    """Areas of intersection and union of every pair, (..., N, M) each."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]                         # (..., N, 1, 4), (..., 1, M, 4)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = overlap.prod(-1)                                                 # (..., N, M)
    return intersection, (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection

def box_iou(boxes1, boxes2):
    """Intersection over union of every pair of x0 y0 x1 y1 boxes: (..., N, 4), (..., M, 4) to (..., N, M) in [0, 1]."""
    intersection, union = _areas(boxes1, boxes2)
    return intersection / union

def generalized_box_iou(boxes1, boxes2):
    """GIoU of every pair of x0 y0 x1 y1 boxes, (..., N, 4), (..., M, 4) to (..., N, M) in [-1, 1] (paper: A.2).

    IoU is 0, and so is its gradient, for any two boxes apart. GIoU subtracts the share of the smallest box around
    both that neither fills, so that boxes apart still know which way to move.
    """
    intersection, union = _areas(boxes1, boxes2)
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return intersection / union - (hull - union) / hull


# ---- 2. Backbone (3.2) ------------------------------------------------------------------------------------------------
# A ResNet turns (B, 3, H, W) into (B, C, H/32, W/32); with dilation (DC5) into (B, C, H/16, W/16).

class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics, (B, C, H, W) to (B, C, H, W): batches of a few images are too small to
    estimate them (paper: A.4). It has no parameters, four buffers, and loads what `nn.BatchNorm2d` saved."""
    eps = 1e-5

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        scale, shift = scale_and_shift(self)
        return x * scale[:, None, None] + shift[:, None, None]

def scale_and_shift(norm):
    """With constant statistics, batch norm is x * scale + shift: (C,), (C,)."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale

def conv_norm(x, conv, norm):
    """`norm(conv(x))`. A constant norm is folded into the convolution's weight, so that no activation is touched twice."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], shift, conv.stride, conv.padding, conv.dilation)

class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""
    expansion = 1

    def __init__(self, inplanes, planes, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm(planes))

    def forward(self, x):
        shortcut = conv_norm(x, *self.downsample) if hasattr(self, "downsample") else x
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        return conv_norm(x, self.conv2, self.bn2).add_(shortcut).relu_()

class Bottleneck(nn.Module):
    """The residual block of ResNet-50 and 101: 1x1 down, 3x3, 1x1 up to four times the width."""
    expansion = 4

    def __init__(self, inplanes, planes, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = norm(4 * planes)
        if stride != 1 or inplanes != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), norm(4 * planes))

    def forward(self, x):
        shortcut = conv_norm(x, *self.downsample) if hasattr(self, "downsample") else x
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        x = conv_norm(x, self.conv2, self.bn2).relu_()
        return conv_norm(x, self.conv3, self.bn3).add_(shortcut).relu_()

class ResNet(nn.Module):
    """The backbone: images (B, 3, H, W) to features (B, num_channels, H/stride, W/stride), sizes rounded up.

    `layers` counts the blocks of each stage: four for the published models (stride 32), three for stride 16; `width`
    is the first stage's, doubled by each later one. `dilation=True` (DC5) dilates the last stage instead of striding it.
    With the frozen norm, made for pre-trained weights, stem and first stage are not trained (paper: A.4); to train
    from scratch take `norm=nn.BatchNorm2d`: the names of the weights are the same.
    """
    def __init__(self, block, layers, width=64, dilation=False, norm=FrozenBatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.stride, self.num_channels, self.dilation = 4, width, dilation
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (stage, depth) in enumerate(zip(self.stages, layers)):
            dilate = dilation and stage == self.stages[-1]
            stride, planes = 1 if i == 0 or dilate else 2, width * 2**i
            first = block(self.num_channels, planes, stride, 1, norm)
            self.stride, self.num_channels = self.stride * stride, planes * block.expansion
            rest = (block(self.num_channels, planes, 1, 2 if dilate else 1, norm) for _ in range(depth - 1))
            self.add_module(stage, nn.Sequential(first, *rest))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm is FrozenBatchNorm2d:
            self.conv1.requires_grad_(False)
            self.layer1.requires_grad_(False)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(conv_norm(x, self.conv1, self.bn1).relu_(), 3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x

RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
           "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3))}


# ---- 3. Positions (A.4) -----------------------------------------------------------------------------------------------

class PositionEmbeddingSine(nn.Module):
    """Where a cell is, as sines and cosines of its row (first half of the channels) and its column (second half).

    Rows and columns are counted from 1 over real pixels only, so padding moves nothing, and scaled to (0, 2 pi], so
    that the same code means the same relative place in an image of any size.
    """
    def __init__(self, channels_per_axis=128, temperature=10000):
        super().__init__()
        self.channels_per_axis, self.temperature = channels_per_axis, temperature

    def forward(self, real):
        """real (B, H', W') bool, False on padding, to (B, S, 2 * channels_per_axis)."""
        rows, columns = real.cumsum(1, dtype=torch.float32), real.cumsum(2, dtype=torch.float32)
        rows = rows / (rows[:, -1:] + 1e-6) * 2 * math.pi                           # (B, H', W')
        columns = columns / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
        i = torch.arange(self.channels_per_axis, device=real.device) // 2           # each frequency twice: sine, cosine
        wavelengths = self.temperature ** (2 * i / self.channels_per_axis)
        angles = torch.stack((rows, columns), dim=3)[..., None] / wavelengths       # (B, H', W', 2, d/2)
        waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=5)   # (B, H', W', 2, d/4, 2)
        return waves.flatten(3).flatten(1, 2)


# ---- 4. Attention and transformer (A.1, A.3) --------------------------------------------------------------------------

class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(d/heads)) v in every head, between one projection in and one out (paper: A.1).

    Set `keep_weights` to find the attention of the last call, (B, heads, N, S), in `weights`: for a picture.
    """
    def __init__(self, d, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout, self.keep_weights = heads, dropout, False
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))                   # q, k, v, one above the other
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q, k, v, attend=None):
        """q (B, N, d), k and v (B, S, d), attend (B, 1, 1, S) bool or None, to (B, N, d)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, weight, bias in zip((q, k, v), weights, biases))          # (B, heads, N or S, d/heads)
        if self.keep_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])               # (B, heads, N, S)
            if attend is not None:
                scores = scores.masked_fill(~attend, -math.inf)
            self.weights = scores.softmax(-1)
            x = self.weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attend, self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))

class TransformerEncoderLayer(nn.Module):
    """Every cell looks at every cell, then thinks by itself. Positions are added to q and k in each layer, never to v.

    Dropout and ReLU commute; this order keeps one activation less for the backward pass."""
    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = MultiheadAttention(d, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(d, dim_feedforward), nn.Linear(dim_feedforward, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos, attend):
        q = k = x + pos                                                             # (B, S, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x, attend)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(self.linear1(x)).relu_())))

class TransformerDecoderLayer(nn.Module):
    """Queries agree among themselves who takes what, then look at the image, then think. The learned queries are
    added like positions: to q and k of the self-attention, to q of the cross-attention."""
    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = MultiheadAttention(d, heads, dropout)
        self.multihead_attn = MultiheadAttention(d, heads, dropout)
        self.linear1, self.linear2 = nn.Linear(d, dim_feedforward), nn.Linear(dim_feedforward, d)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, queries, memory, memory_pos, attend):
        q = k = x + queries                                                         # (B, N, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + queries, memory_pos, memory, attend)))
        return self.norm3(x + self.dropout(self.linear2(self.dropout(self.linear1(x)).relu_())))

class Transformer(nn.Module):
    """Encoder and decoder, post-norm (paper: A.3, Fig. 10)."""
    def __init__(self, d, heads, enc_layers, dec_layers, dim_feedforward, dropout):
        super().__init__()
        layer = d, heads, dim_feedforward, dropout
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TransformerEncoderLayer(*layer) for _ in range(enc_layers))})
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(TransformerDecoderLayer(*layer) for _ in range(dec_layers)),
                                      "norm": nn.LayerNorm(d)})
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, memory, pos, attend, queries, every_layer=True):
        """memory (B, S, d), pos (B or 1, S, d), attend (B, 1, 1, S) bool or None, queries (N, d) to (L, B, N, d),
        or to (1, B, N, d), the last layer's alone, unless `every_layer`."""
        for layer in self.encoder.layers:
            memory = layer(memory, pos, attend)
        queries = queries.expand(len(memory), -1, -1)                               # (B, N, d)
        x, memory_pos, outputs = torch.zeros_like(queries), memory + pos, []
        for layer in self.decoder.layers:
            x = layer(x, queries, memory, memory_pos, attend)
            outputs.append(x)
        return self.decoder.norm(torch.stack(outputs if every_layer else outputs[-1:]))   # one norm for all layers


# ---- 5. DETR (3.2) ----------------------------------------------------------------------------------------------------

class MLP(nn.Module):
    """Linear layers with ReLU between them."""
    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in zip(dims, dims[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

def pad_images(images):
    """Images (3, h, w) of any sizes to one batch (B, 3, H, W), zeros right and below, and its mask (B, H, W) bool,
    True on padding; None when nothing is padded."""
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    if all(image.shape[1:] == (height, width) for image in images):
        return torch.stack(tuple(images)), None
    pads = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    mask = [F.pad(torch.zeros_like(image[0], dtype=torch.bool), pad, value=True) for image, pad in zip(images, pads)]
    return torch.stack([F.pad(image, pad) for image, pad in zip(images, pads)]), torch.stack(mask)

class DETR(nn.Module):
    """The detector (paper: 3.2, Fig. 2): a set of N boxes in one pass, no anchors, no non-maximum suppression.

    `num_classes` counts object classes; "no object" is one more, the last. `backbone` is a name (resnet18, 34, 50 or
    101) or a `ResNet`, which brings its own dilation. With `aux_loss` every decoder layer answers (A.2). The defaults
    are the published COCO model's.
    """
    def __init__(self, num_classes=91, backbone="resnet50", dilation=False, hidden_dim=256, nheads=8, enc_layers=6, dec_layers=6,
                 dim_feedforward=2048, num_queries=100, dropout=0.1, aux_loss=False):
        super().__init__()
        if isinstance(backbone, str):
            if backbone not in RESNETS:
                raise ValueError(f"no backbone {backbone!r}: choose one of {', '.join(RESNETS)}, or pass a ResNet")
            backbone = ResNet(*RESNETS[backbone], dilation=dilation)
        if min(num_classes, nheads, num_queries) < 1:
            raise ValueError(f"num_classes {num_classes}, nheads {nheads} and num_queries {num_queries}: each must be 1 or more")
        if hidden_dim % 4 or hidden_dim % nheads:
            raise ValueError(f"hidden_dim {hidden_dim} must be a multiple of nheads ({nheads}) and of 4 (sine and cosine, row and column)")
        self.backbone = nn.ModuleList([nn.ModuleDict({"body": backbone}), PositionEmbeddingSine(hidden_dim // 2)])
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, 1)
        self.transformer = Transformer(hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.aux_loss = aux_loss
        self.classes = [f"class {label}" for label in range(num_classes)]
        self.size, self.max_size = 800, 1333    # pixels: the shorter side that `detect` resizes to, unless the longer exceeds

    def forward(self, images, mask=None):
        """Images to a set of predictions.

        images: (B, 3, H, W) normalised floats, with mask (B, H, W) bool, True on padding, or None where nothing is
        padded; or a list of (3, h, w), which is padded here.
        Returns `pred_logits` (B, N, K + 1) and `pred_boxes` (B, N, 4), cx, cy, w, h in [0, 1] of each image without its
        padding; with `aux_loss` also `aux_outputs`, a list of such dicts, one for each earlier decoder layer.
        """
        if isinstance(images, (list, tuple)):
            images, mask = pad_images(images)
        features = self.backbone[0].body(images)                                 # (B, C, H', W')
        if mask is None:
            attend, real = None, torch.ones(1, *features.shape[-2:], dtype=torch.bool, device=features.device)
        else:
            real = ~F.interpolate(mask[None].float(), size=features.shape[-2:])[0].bool()   # (B, H', W'), nearest
            attend = real.flatten(1)[:, None, None]                                 # (B, 1, 1, S)
        x = self.input_proj(features).flatten(2).transpose(1, 2)                    # (B, S, d)
        x = self.transformer(x, self.backbone[1](real), attend, self.query_embed.weight, self.aux_loss)   # (L, B, N, d)
        logits, boxes = self.class_embed(x), self.bbox_embed(x).sigmoid()           # (L, B, N, K + 1), (L, B, N, 4)
        *earlier, outputs = ({"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes))
        return {**outputs, "aux_outputs": earlier} if self.aux_loss else outputs


# ---- 6. Matching (3.1, Eq. 1) -----------------------------------------------------------------------------------------

class HungarianMatcher:
    """The cheapest one-to-one assignment of predictions to objects (paper: 3.1, Eq. 1).

    The cost of a pair is  cost_class * -p(class) + cost_bbox * |box - box|_1 + cost_giou * -GIoU.  Of more objects than
    queries, the N cheapest are matched.
    """
    def __init__(self, cost_class=1, cost_bbox=5, cost_giou=2):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    def __call__(self, outputs, targets):
        """Match the last layer. `outputs` as `DETR` returns them; `targets` one dict an image, `labels` (M,) int64 and
        `boxes` (M, 4) cx, cy, w, h in [0, 1]. Returns one (query_indices, target_indices) an image, int64 on the CPU."""
        return self.match(outputs["pred_logits"][None], outputs["pred_boxes"][None], targets)[0]

    @torch.no_grad()
    def match(self, logits, boxes, targets):
        """Match all layers at once: logits (L, B, N, K + 1), boxes (L, B, N, 4) to L lists of B index pairs.

        Raises ValueError for a label outside 0 .. K - 1 and for predictions or boxes that are not finite.
        """
        K = logits.shape[-1] - 1
        labels = pad_sequence([target["labels"] for target in targets], batch_first=True)                 # (B, M)
        target_boxes = pad_sequence([target["boxes"].float().reshape(-1, 4) for target in targets], batch_first=True)
        boxes, p = boxes.float(), logits.float().softmax(-1)                        # (L, B, N, 4), (L, B, N, K + 1)
        index = labels.clamp(0, K - 1)[:, None].expand(*p.shape[:3], -1)            # (L, B, N, M)
        cost = (-self.cost_class * p.gather(-1, index)
                + self.cost_bbox * torch.cdist(boxes, target_boxes, p=1)
                - self.cost_giou * generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes)))
        cost = cost.masked_fill(((labels < 0) | (labels >= K))[:, None], math.nan).cpu()   # the one device sync of a step
        cost = [[c[:, :len(target["labels"])] for c, target in zip(layer, targets)] for layer in cost]   # (N, M) each
        for b, c in (pair for layer in cost for pair in enumerate(layer)):
            if not c.isfinite().all():
                wrong = [label for label in targets[b]["labels"].tolist() if not 0 <= label < K]
                raise ValueError(f"image {b} of the batch: " + (
                    f"label {wrong[0]} is outside the model's 0 to {K - 1}: correct it, or set num_classes" if wrong else
                    "its boxes or the predictions for it are not finite: look at that image, or lower the learning rate"))
        return [[tuple(map(torch.from_numpy, linear_sum_assignment(c))) for c in layer] for layer in cost]


# ---- 7. Loss (3.1, Eq. 2; A.2) ----------------------------------------------------------------------------------------

class SetCriterion(nn.Module):
    """The Hungarian loss (paper: 3.1, Eq. 2; A.2): cross-entropy for every query, and for the matched ones L1 and GIoU.

    Most queries match nothing; `eos_coef` is the weight of "no object" against that imbalance.
    """
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}

    def __init__(self, num_classes, matcher, eos_coef=0.1):
        super().__init__()
        self.num_classes, self.matcher = num_classes, matcher
        self.register_buffer("class_weight", torch.tensor([1.0] * num_classes + [eos_coef]))

    def forward(self, outputs, targets):
        """All losses of all decoder layers, unweighted, as scalar tensors.

        `outputs` and `targets` as for `HungarianMatcher`. Returns `loss_ce`, `loss_bbox`, `loss_giou`,
        `cardinality_error` (by how many objects an image's count is off) and `class_error` (percent of matched queries
        with a wrong class) of the last layer, and `loss_ce_0` and so on of the earlier ones.
        """
        layers = [*outputs.get("aux_outputs", ()), outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()    # (L, B, N, K + 1)
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()      # (L, B, N, 4)
        labels = torch.cat([target["labels"] for target in targets])                # (M of all images,)
        target_boxes = torch.cat([target["boxes"].float().reshape(-1, 4) for target in targets])
        counts = [len(target["labels"]) for target in targets]

        matches = self.matcher.match(logits, boxes, targets)                        # each layer has as many pairs
        pairs = [(torch.full_like(q, l), torch.full_like(q, b), q, t + sum(counts[:b]))
                 for l, layer in enumerate(matches) for b, (q, t) in enumerate(layer)]
        l, b, q, t = torch.stack([torch.cat(part) for part in zip(*pairs)]).to(logits.device, non_blocking=True)   # (P,) each

        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)      # (L, B, N), "no object" ...
        classes[l, b, q] = labels[t]                                                # ... but where a query is matched
        weight = self.class_weight[classes]
        ce = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(weight)

        matched, objects = boxes[l, b, q], target_boxes[t]                          # (P, 4), pairs of all layers
        l1 = (matched - objects).abs().sum(-1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(matched)[:, None], box_cxcywh_to_xyxy(objects)[:, None])   # (P, 1, 1)
        predicted = logits.argmax(-1)                                               # (L, B, N)
        found = (predicted != self.num_classes).sum(-1)                             # (L, B)
        # What the sums are divided by: the weights of all queries, a layer each, and the number of boxes, over all processes.
        shares = F.pad(weight.sum((1, 2)), (0, 1), value=sum(counts))               # (L + 1,)
        if self.training and dist.is_available() and dist.is_initialized():
            dist.all_reduce(shares)
            shares /= dist.get_world_size()
        weight_sums, num_boxes = shares[:-1], shares[-1].clamp(min=1)
        counts = torch.tensor(counts).to(logits.device, non_blocking=True)
        by_layer = len(layers), len(l) // len(layers)
        each_layer = {
            "loss_ce": (weight * ce).sum((1, 2)) / weight_sums,                     # (L,), each of them
            "loss_bbox": l1.view(by_layer).sum(1) / num_boxes,
            "loss_giou": (1 - giou).view(by_layer).sum(1) / num_boxes,
            "cardinality_error": (found - counts).abs().float().mean(1)}

        wrong = (predicted[l, b, q] != labels[t]).view(by_layer)[-1].float()        # of the last layer's pairs
        losses = {"class_error": 100 * wrong.mean() if len(wrong) else torch.full_like(num_boxes, 100)}
        for name, values in each_layer.items():
            *earlier, losses[name] = values.unbind()
            losses |= {f"{name}_{i}": value for i, value in enumerate(earlier)}
        return losses

    def total(self, losses):
        """What is minimised: the weighted sum, 1, 5, 2, of the three losses over all decoder layers."""
        return sum(self.weights[name.rstrip("_0123456789")] * value for name, value in losses.items() if name.startswith("loss"))


# ---- 8. Use -----------------------------------------------------------------------------------------------------------

ZOO_URL = "https://dl.fbaipublicfiles.com/detr/"
ZOO = {"detr_resnet50": "detr-r50-e632da11.pth", "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
       "detr_resnet101": "detr-r101-2c7b67e5.pth", "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth"}

# Names by COCO's category id, which is the published models' label; ids that COCO never used are "N/A".
COCO_CLASSES = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,N/A,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,N/A,backpack,umbrella,N/A,N/A,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,N/A,wine glass,cup,"
    "fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,"
    "N/A,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")

def post_process(outputs, sizes):
    """Predictions to pixels: sizes (B, 2) are the images' h, w. Returns one dict an image: `scores` (N,), `labels` (N,)
    (the best class that is an object) and `boxes` (N, 4) x0 y0 x1 y1 pixels. Every query is there: threshold as you like."""
    scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)   # (B, N) each
    h, w = torch.as_tensor(sizes, device=scores.device).unbind(1)
    boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"].float()) * torch.stack((w, h, w, h), dim=1)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]

def fit(height, width, size, max_size):
    """The (height, width) with the shorter side `size`, or less where the longer would exceed `max_size` (paper: A.4)."""
    short, long = min(height, width), max(height, width)
    if long / short * size > max_size:
        size = max(1, round(max_size * short / long))
    return tuple(size if side == short else int(size * side / short) for side in (height, width))

def normalize(image):
    """(3, h, w) uint8, or float in [0, 1], to the float (3, h, w) with the mean 0 and the deviation 1 of ImageNet's pixels."""
    image = image / 255 if image.dtype == torch.uint8 else image
    mean, std = image.new_tensor([0.485, 0.456, 0.406]), image.new_tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]

@torch.inference_mode()
def detect(model, images, threshold=0.7):
    """Find the objects of each image.

    images: a list of PIL images or of RGB tensors (3, h, w), uint8 or float in [0, 1], of any sizes; or one of them.
    Returns one dict an image, best first, of what scores above `threshold`: `scores` (n,), `labels` (n,), `boxes` (n, 4)
    x0 y0 x1 y1 pixels of the given image, `names` (a list), and `queries` (n,): which query found it.
    """
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) == 3:
        images = [images]
    images = [image if torch.is_tensor(image) else to_tensor(image) for image in images]
    device = model.query_embed.weight.device
    sizes = [image.shape[1:] for image in images]
    inputs = [F.interpolate(image[None], fit(*image.shape[1:], model.size, model.max_size), mode="bilinear", antialias=True)[0]
              for image in images]
    results = []
    for found in post_process(model([normalize(image.to(device)) for image in inputs]), sizes):
        queries = (found["scores"] > threshold).nonzero()[:, 0]
        queries = queries[found["scores"][queries].argsort(descending=True)]
        found = {name: value[queries] for name, value in found.items()} | {"queries": queries}
        results.append(found | {"names": [model.classes[label] for label in found["labels"].tolist()]})
    return results

def to_tensor(picture):
    """A PIL image to an RGB tensor (3, h, w) uint8."""
    picture = picture.convert("RGB")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3).permute(2, 0, 1)

def read_checkpoint(path):
    """A checkpoint file as a dict with the weights in `model` and what they do not tell in `config`, a dict of numbers. Code in
    the file is never run. Raises FileNotFoundError, or ValueError for a file that is no checkpoint, saying which and what to do."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give a file, or one of {', '.join(['demo', *ZOO])}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):                # published training checkpoints carry one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}): it may be cut off, of another kind, "
                         "or hold code, which is never run; download or save it again") from error
    checkpoint = checkpoint if isinstance(checkpoint, dict) and "model" in checkpoint else {"model": checkpoint}
    config = checkpoint.get("config", checkpoint.get("args"))           # ours, or a published training checkpoint's
    config = vars(config) if isinstance(config, argparse.Namespace) else config if isinstance(config, dict) else {}
    config = {name: value for name, value in config.items() if isinstance(value, (int, float))}
    if not all(1 <= config.get(name, 1) <= 10000 for name in ("size", "max_size")):
        raise ValueError(f"{path}: its config has a size of {config.get('size')} to {config.get('max_size')} pixels, not 1 to 10,000")
    return checkpoint | {"config": config}

def build_detr(weights, nheads=8, dilation=False, norm=FrozenBatchNorm2d, **options):
    """The DETR that has these weights, loaded: widths, depths, queries and classes are read off their names and shapes.

    Heads, dilation and norm leave no trace in them. `options` go to `DETR`. Raises ValueError where a weight is missing,
    left over, or of the wrong shape."""
    def depth(prefix):
        return len({name[len(prefix):].split(".")[0] for name in weights if name.startswith(prefix)})

    body = "backbone.0.body."
    try:
        block = Bottleneck if body + "layer1.0.conv3.weight" in weights else BasicBlock
        layers = [depth(f"{body}layer{i + 1}.") for i in range(depth(body + "layer"))]
        model = DETR(num_classes=len(weights["class_embed.bias"]) - 1,
                     backbone=ResNet(block, layers, len(weights[body + "conv1.weight"]), dilation, norm),
                     hidden_dim=len(weights["input_proj.bias"]), nheads=nheads,
                     enc_layers=depth("transformer.encoder.layers."), dec_layers=depth("transformer.decoder.layers."),
                     dim_feedforward=len(weights["transformer.decoder.layers.0.linear1.bias"]),
                     num_queries=len(weights["query_embed.weight"]), **options)
        model.load_state_dict(weights)
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"these are not the weights of a DETR ({' '.join(str(error).split())[:400]})") from error
    return model

def load_detr(source, num_classes=None, device="cpu"):
    """A DETR in eval mode, with `.classes`, the names by label.

    source: a name of the zoo (detr_resnet50, detr_resnet50_dc5, detr_resnet101, detr_resnet101_dc5: COCO's weights, fetched
    once and kept; demo: the bundled blood-cell detector), or a checkpoint file, of which the architecture is read off.
    num_classes: another number of classes than the weights have gets a new, untrained class head.
    Raises ValueError for a file that is no DETR checkpoint, OSError for one that cannot be found or fetched.
    """
    path = Path(source)
    if source == "demo":
        here = Path(__file__).parent
        path = next((p for p in (here / "assets/demo.pth", here / "detr_mini_assets/demo.pth") if p.exists()), here / "assets/demo.pth")
    elif source in ZOO:
        path = Path(torch.hub.get_dir(), "checkpoints", ZOO[source])
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(ZOO_URL + path.name, path, hash_prefix=path.stem.split("-")[-1])
            except (OSError, RuntimeError) as error:
                raise OSError(f"could not fetch {ZOO_URL + path.name} ({error}): put that file at {path} by hand; "
                              "`python infer.py` alone runs the bundled model") from error
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    try:
        model = build_detr(checkpoint["model"], int(config.get("nheads", 8)), config.get("dilation", "-dc5" in path.name))
        names = checkpoint.get("classes") or COCO_CLASSES
        model.size, model.max_size = int(config.get("size", 800)), int(config.get("max_size", 1333))
        model.classes = list(map(str, names)) if len(names) == len(model.classes) else model.classes
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if num_classes is not None and num_classes != len(model.classes):
        model.class_embed = nn.Linear(model.class_embed.in_features, num_classes + 1)
        model.classes = [f"class {label}" for label in range(num_classes)]
    return model.to(device).eval()
