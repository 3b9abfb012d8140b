"""DETR, the detection transformer, in one file to read beside the paper: "End-to-End Object
Detection with Transformers" (arXiv 2005.12872). The file follows the data from pixels to loss;
each banner names the section of the paper.

Six decisions that a reader needs to know:
- Post-norm: each residual branch is added first, and the sum is normalised.
- Positions are added to q and k in every layer, never to v.
- The projections of q, k and v are packed in one matrix, as in `torch.nn.MultiheadAttention`.
- Batch norm is frozen: constant statistics, folded into the convolution before it.
- Boxes are (cx, cy, w, h) in [0, 1] of the image, without its padding.
- Modules nest so that parameters have the names of the published checkpoints.

Shapes are in comments: B images, N queries, L decoder layers, M objects, K classes, S = H'W'
tokens (one for each location of the feature map), d model width."""
import argparse
import math
import pathlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn.utils.rnn import pad_sequence

# ---- 1. Boxes ------------------------------------------------------------------------------------
def box_cxcywh_to_xyxy(boxes):
    """Centre and size to corners, (..., 4) to (..., 4), in any unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)

def box_xyxy_to_cxcywh(boxes):
    """Corners to centre and size, (..., 4) to (..., 4), in any unit."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)

def box_areas(boxes1, boxes2):
    """For every pair of x0 y0 x1 y1 boxes, the areas of their intersection, their union and the
    smallest box that encloses both: (..., N, 4), (..., M, 4) to three tensors (..., N, M)."""
    a = boxes1[..., :, None, :]                                     # (..., N, 1, 4)
    b = boxes2[..., None, :, :]                                     # (..., 1, M, 4)
    inner_size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    outer_size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    intersection = inner_size.clamp(min=0).prod(-1)
    return intersection, area_a + area_b - intersection, outer_size.prod(-1)

def box_iou(boxes1, boxes2):
    """IoU of every pair of x0 y0 x1 y1 boxes, (..., N, 4), (..., M, 4) to (..., N, M) in [0, 1]."""
    intersection, union, _ = box_areas(boxes1, boxes2)
    return intersection / union                                     # of two empty boxes: nan

def generalized_box_iou(boxes1, boxes2):
    """GIoU of every pair, shapes as in `box_iou`, in [-1, 1] (paper: A.2)."""
    intersection, union, enclosing = box_areas(boxes1, boxes2)
    # GIoU = IoU - |enclosing box without the union| / |enclosing box|
    # The second term gives a gradient even to boxes that do not overlap.
    return intersection / union - (enclosing - union) / enclosing

# ---- 2. Backbone (3.2) ---------------------------------------------------------------------------
class FrozenBatchNorm2d(nn.Module):
    """Batch norm that never changes, as small batches estimate it badly (A.4); see `conv_norm`."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

def conv_norm(x, conv, norm):
    """`norm(conv(x))`, (B, C, H, W) to (B, C', H', W'). A frozen norm is folded into the weight of
    the convolution, at each call, so that the convolution can still be trained."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()     # (C',)
    shift = norm.bias - norm.running_mean * scale                   # (C',)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)

class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""
    expansion = 1

    def __init__(self, in_channels, channels, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(channels)
        self.downsample = None

    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        return conv_norm(x, self.conv2, self.bn2).add_(shortcut).relu_()

class Bottleneck(nn.Module):
    """The residual block of ResNet-50 and 101: 1x1 down, 3x3, 1x1 up to four times the channels."""
    expansion = 4

    def __init__(self, in_channels, channels, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, dilation, dilation, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = norm(4 * channels)
        self.downsample = None

    def forward(self, x):
        shortcut = x if self.downsample is None else conv_norm(x, *self.downsample)
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        x = conv_norm(x, self.conv2, self.bn2).relu_()
        return conv_norm(x, self.conv3, self.bn3).add_(shortcut).relu_()

class ResNet(nn.Module):
    """Images (B, 3, H, W) to features (B, num_channels, H/stride, W/stride), rounded up. `layers`
    is the number of blocks in each stage: four stages have stride 32, three have stride 16.
    `dilation` (DC5; paper: 4) replaces the stride of the last stage."""

    def __init__(self, block, layers, width=64, dilation=False, norm=FrozenBatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.dilation = dilation
        self.stride = 4
        self.num_channels = width
        self.stage_names = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (name, depth) in enumerate(zip(self.stage_names, layers)):
            dilated = dilation and name == self.stage_names[-1]
            stride = 1 if i == 0 or dilated else 2
            channels = width * 2**i
            out_channels = channels * block.expansion
            # As in torchvision, only the later blocks of a dilated stage dilate.
            blocks = [block(self.num_channels, channels, stride, 1, norm)]
            if stride != 1 or self.num_channels != out_channels:
                conv = nn.Conv2d(self.num_channels, out_channels, 1, stride, bias=False)
                blocks[0].downsample = nn.Sequential(conv, norm(out_channels))
            for _ in range(depth - 1):
                blocks.append(block(out_channels, channels, 1, 2 if dilated else 1, norm))
            self.add_module(name, nn.Sequential(*blocks))
            self.stride *= stride
            self.num_channels = out_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm is FrozenBatchNorm2d:   # the first stage stays as loaded, as in the reference
            self.conv1.requires_grad_(False)
            self.layer1.requires_grad_(False)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x

RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}

# ---- 3. Positions (A.4) --------------------------------------------------------------------------
class PositionEmbeddingSine(nn.Module):
    """The row (first half of the channels) and the column of each location as sines and cosines.
    Both are counted over the image without its padding and scaled to (0, 2 pi]."""

    def __init__(self, channels_per_axis=128):
        super().__init__()
        self.channels_per_axis = channels_per_axis

    def encode(self, p):
        """Positions p (B, H', W') on one axis to (B, H', W', d), d = `channels_per_axis`."""
        # PE(p, 2i) = sin(p / 10000^(2i/d)),  PE(p, 2i + 1) = cos(p / 10000^(2i/d))
        d = self.channels_per_axis
        two_i = torch.arange(0, d, 2, device=p.device).to(p.dtype)
        angles = p[..., None] / 10000 ** (two_i / d)                # (B, H', W', d/2)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

    def forward(self, valid, dtype=torch.float32):
        """valid (B, H', W') bool, False on padding, to (B, S, 2 * channels_per_axis)."""
        rows = valid.cumsum(1, dtype=dtype)                         # (B, H', W')
        columns = valid.cumsum(2, dtype=dtype)
        # The last count scales to 2 pi. Rows or columns of pure padding count to 0, hence 1e-6.
        rows = rows / (rows[:, -1:] + 1e-6) * 2 * math.pi
        columns = columns / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
        return torch.cat((self.encode(rows), self.encode(columns)), dim=3).flatten(1, 2)

# ---- 4. Attention and transformer (A.1, A.3) -----------------------------------------------------
class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(d/heads)) v in every head, between an input and an output projection
    (paper: A.1). With `keep_weights`, `attention` (B, heads, N, S) is the last call's softmax."""

    def __init__(self, d, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.keep_weights = False
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * d, d)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, q, k, v, key_mask=None):
        """q (B, N, d), k and v (B, S, d) to (B, N, d). key_mask (B, 1, 1, S): False on padding."""
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)             # (d, d) each
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        q = F.linear(q, weight_q, bias_q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = F.linear(k, weight_k, bias_k).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = F.linear(v, weight_v, bias_v).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        if self.keep_weights:           # the formula; q, k, v are (B, heads, N or S, d/heads)
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])           # (B, heads, N, S)
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask, -math.inf)
            self.attention = scores.softmax(-1)
            x = F.dropout(self.attention, dropout) @ v              # (B, heads, N, d/heads)
        else:                           # the same in one kernel, which keeps no weights
            x = F.scaled_dot_product_attention(q, k, v, key_mask, dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))

class TransformerEncoderLayer(nn.Module):
    """Self-attention among the tokens, then a feed-forward network on each of them (paper: A.3)."""

    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = MultiheadAttention(d, heads, dropout)
        self.linear1 = nn.Linear(d, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x):
        # (..., d). Dropout before ReLU: they commute, and backward keeps one tensor fewer.
        return self.dropout(self.linear2(self.dropout(self.linear1(x)).relu_()))

    def forward(self, x, pos, key_mask):
        q = k = x + pos                                             # (B, S, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x, key_mask)))
        return self.norm2(x + self.feed_forward(x))

class TransformerDecoderLayer(TransformerEncoderLayer):
    """Self-attention among queries, cross-attention to the memory, then a feed-forward network. The
    learned queries are added like positions: to q and k, and to q of the cross-attention (A.3)."""

    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__(d, heads, dim_feedforward, dropout)
        self.multihead_attn = MultiheadAttention(d, heads, dropout)
        self.norm3 = nn.LayerNorm(d)

    def forward(self, x, queries, memory, memory_pos, key_mask):
        q = k = x + queries                                         # (B, N, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x)))
        attended = self.multihead_attn(x + queries, memory_pos, memory, key_mask)   # (B, N, d)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.feed_forward(x))

class Transformer(nn.Module):
    """Encoder and decoder (paper: A.3, Fig. 10)."""

    def __init__(self, d, heads, enc_layers, dec_layers, dim_feedforward, dropout):
        super().__init__()
        sizes = d, heads, dim_feedforward, dropout
        encoder = nn.ModuleList(TransformerEncoderLayer(*sizes) for _ in range(enc_layers))
        decoder = nn.ModuleList(TransformerDecoderLayer(*sizes) for _ in range(dec_layers))
        self.encoder = nn.ModuleDict({"layers": encoder})
        self.decoder = nn.ModuleDict({"layers": decoder, "norm": nn.LayerNorm(d)})
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, tokens, pos, key_mask, queries, all_layers=True):
        """tokens (B, S, d), pos (B or 1, S, d), key_mask (B, 1, 1, S) or None, queries (N, d) to
        the outputs of the decoder's layers, all or the last, (L or 1, B, N, d), and the memory."""
        for layer in self.encoder.layers:
            tokens = layer(tokens, pos, key_mask)
        memory = tokens                                             # (B, S, d)
        memory_pos = memory + pos
        queries = queries.expand(len(memory), -1, -1)               # (B, N, d)
        # The decoder starts from zeros: at first, only the learned queries tell its rows apart.
        x = torch.zeros_like(queries)
        outputs = []
        for layer in self.decoder.layers:
            x = layer(x, queries, memory, memory_pos, key_mask)
            outputs.append(x)
        outputs = torch.stack(outputs if all_layers else outputs[-1:])
        return self.decoder.norm(outputs), memory                   # one norm for all layers (3.2)

# ---- 5. DETR (3.2) -------------------------------------------------------------------------------
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
    """Pad images (3, h, w) of any sizes with zeros, right and below, to a batch (B, 3, H, W).
    Also returns its mask (B, H, W) bool, True on padding, or None if all sizes are equal."""
    heights, widths = zip(*(image.shape[1:] for image in images))
    batch = images[0].new_zeros(len(images), 3, max(heights), max(widths))
    mask = torch.ones_like(batch[:, 0], dtype=torch.bool)
    for i, (h, w) in enumerate(zip(heights, widths)):
        batch[i, :, :h, :w] = images[i]
        mask[i, :h, :w] = False
    if len({image.shape for image in images}) == 1:
        return batch, None
    return batch, mask

class DETR(nn.Module):
    """The detector (paper: 3.2, Fig. 2). `num_classes` counts object classes; "no object" follows
    as the last class. `backbone` is a name in `RESNETS`, or a module such as `ResNet`. With
    `aux_loss`, every decoder layer predicts (3.2). `nheads` and 4 must divide `hidden_dim`."""

    def __init__(self, num_classes=91, backbone="resnet50", dilation=False, hidden_dim=256,
                 nheads=8, enc_layers=6, dec_layers=6, dim_feedforward=2048, num_queries=100,
                 dropout=0.1, aux_loss=False):
        super().__init__()
        if isinstance(backbone, str):
            backbone = ResNet(*RESNETS[backbone], dilation=dilation)
        # backbone.0.body and backbone.1, as in the published checkpoints
        self.backbone = nn.ModuleList(
            [nn.ModuleDict({"body": backbone}), PositionEmbeddingSine(hidden_dim // 2)])
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, 1)
        self.transformer = Transformer(
            hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)   # all layers share the heads
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.aux_loss = aux_loss
        self.classes = [f"class {label}" for label in range(num_classes)]
        self.sizes = 800, 1333                                      # of images: see `resized_size`

    def forward(self, images, mask=None):
        """images (B, 3, H, W), normalised, and mask (B, H, W) bool, True on padding, or None; or a
        list of (3, h, w), padded here. Returns `pred_logits` (B, N, K + 1), `pred_boxes` (B, N, 4);
        with `aux_loss` also `aux_outputs`, a list of such dicts, one for each earlier layer, and
        `memory` (B, S, d), the output of the encoder."""
        if isinstance(images, (list, tuple)):
            images, mask = pad_images(images)
        features = self.backbone[0].body(images)                    # (B, C, H', W')
        valid = torch.ones_like(features[:1, 0], dtype=torch.bool)  # (1, H', W'): no padding
        key_mask = None
        if mask is not None:                                        # from pixels to locations
            padding = F.interpolate(mask[None].float(), features.shape[2:])[0].bool()
            valid = ~padding                                        # (B, H', W')
            key_mask = valid.flatten(1)[:, None, None]              # (B, 1, 1, S)
        # Features may have 16 bits; positions, sigmoid, softmax and losses use at least 32.
        dtype = torch.promote_types(features.dtype, torch.float32)
        pos = self.backbone[1](valid, dtype).to(self.query_embed.weight.dtype)      # (B or 1, S, d)
        tokens = self.input_proj(features).flatten(2).transpose(1, 2)               # (B, S, d)
        queries = self.query_embed.weight                           # (N, d)
        x, memory = self.transformer(tokens, pos, key_mask, queries, self.aux_loss)
        logits = self.class_embed(x).to(dtype)                      # (L, B, N, K + 1)
        boxes = self.bbox_embed(x).to(dtype).sigmoid()              # (L, B, N, 4); L is 1 or all
        *earlier, outputs = [{"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes)]
        if not self.aux_loss:
            return outputs
        return outputs | {"aux_outputs": earlier, "memory": memory}

# ---- 6. Matching (3.1, Eq. 1) --------------------------------------------------------------------
def pad_targets(targets):
    """Labels (B, M) int64 and boxes (B, M, 4), padded to M objects, the most in an image."""
    labels = pad_sequence([target["labels"].long() for target in targets], batch_first=True)
    boxes = pad_sequence([target["boxes"].view(-1, 4) for target in targets], batch_first=True)
    return labels, boxes

class HungarianMatcher:
    """The cheapest one-to-one assignment of queries to objects (paper: 3.1, Eq. 1)."""

    def __init__(self, cost_class=1, cost_bbox=5, cost_giou=2):
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    @torch.no_grad()
    def __call__(self, outputs, targets):
        """outputs as from `DETR`; targets: one dict per image, `labels` (M,) integers and `boxes`
        (M, 4) cx, cy, w, h in [0, 1]. Returns (query_indices, target_indices) for each image, on
        the CPU."""
        p = outputs["pred_logits"].softmax(-1)                      # (B, N, K + 1)
        boxes = outputs["pred_boxes"]                               # (B, N, 4)
        labels, true_boxes = pad_targets(targets)                   # (B, M), (B, M, 4)
        true_boxes = true_boxes.to(boxes)
        # Eq. 1: the cost of a pair is  - p(class) + 5 |box - box|_1 - 2 GIoU(box, box)
        # p, not log p as in the loss: it is commensurable with the terms of the boxes (3.1).
        p_class = p.gather(2, labels[:, None].expand(-1, p.shape[1], -1))       # (B, N, M)
        l1 = torch.cdist(boxes, true_boxes, p=1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(true_boxes))
        costs = -self.cost_class * p_class + self.cost_bbox * l1 - self.cost_giou * giou
        matches = []
        for cost, target in zip(costs.cpu(), targets):              # (N, M), padding cut off below
            pairs = linear_sum_assignment(cost[:, :len(target["labels"])])
            matches.append(tuple(map(torch.as_tensor, pairs)))
        return matches

# ---- 7. Loss (3.1, Eq. 2; A.2) -------------------------------------------------------------------
class SetCriterion(nn.Module):
    """The Hungarian loss (paper: 3.1, Eq. 2; A.2). `eos_coef` is the weight of "no object"."""
    loss_weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}

    def __init__(self, num_classes, matcher, eos_coef=0.1):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.register_buffer("class_weight", torch.tensor([1.0] * num_classes + [eos_coef]))

    def forward(self, outputs, targets):
        """The losses of all decoder layers, unweighted: those of `layer_losses` for the last one,
        `loss_ce_0` and so on for the earlier ones. Raises ValueError if a target does not fit."""
        self.check(outputs, targets)
        num_boxes = outputs["pred_boxes"].new_tensor(sum(len(t["labels"]) for t in targets))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(num_boxes)                              # the mean over processes (A.2)
            num_boxes /= dist.get_world_size()
        num_boxes = num_boxes.clamp(min=1)
        losses = self.layer_losses(outputs, targets, num_boxes)
        for i, layer in enumerate(outputs.get("aux_outputs", [])):
            for name, value in self.layer_losses(layer, targets, num_boxes).items():
                losses[f"{name}_{i}"] = value
        return losses

    def check(self, outputs, targets):
        """Raise ValueError unless each image has a target with one box per label, all valid."""
        if len(targets) != len(outputs["pred_boxes"]):
            raise ValueError(f"{len(outputs['pred_boxes'])} images, but {len(targets)} targets")
        for b, target in enumerate(targets):
            if target["boxes"].numel() != 4 * len(target["labels"]):
                raise ValueError(f"image {b} of the batch: the numbers of labels and boxes differ")
        labels, boxes = pad_targets(targets)
        valid = (labels >= 0) & (labels < self.num_classes)         # (B, M)
        valid &= (boxes.abs() <= 2).all(-1) & (boxes[..., 2:] >= 0).all(-1)     # pixels are not
        for b, m in (~valid).nonzero().tolist():                    # one transfer to the CPU
            raise ValueError(f"image {b} of the batch, object {m}: label {labels[b, m]} (must be 0 "
                             f"to {self.num_classes - 1}) or box {boxes[b, m].tolist()} (must be "
                             "cx, cy, w, h in [0, 1]) is invalid")

    def layer_losses(self, outputs, targets, num_boxes):
        """One layer's `loss_ce`, `loss_bbox` and `loss_giou` (both divided by `num_boxes`),
        `class_error` (percentage of matched queries with the wrong class) and `cardinality_error`
        (how many objects too many or too few)."""
        logits = outputs["pred_logits"]                             # (B, N, K + 1)

        # The P matched pairs: an image, a query of it, and one of its objects, (P,) each.
        pairs = [(torch.full_like(query_index, b), query_index, object_index) for
                 b, (query_index, object_index) in enumerate(self.matcher(outputs, targets))]
        image_index, query_index, object_index = (
            torch.cat(indices).to(logits.device) for indices in zip(*pairs))
        labels, boxes = pad_targets(targets)
        labels = labels[image_index, object_index]                  # (P,)
        boxes = boxes[image_index, object_index].to(logits)         # (P, 4)

        # Eq. 2, first term: - log p(class) of every query. Most should predict "no object", so that
        # class has the weight 0.1 (3.1); cross_entropy divides by the sum of weights, not by B N.
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[image_index, query_index] = labels                  # (B, N)
        weight = self.class_weight.to(logits)
        losses = {"loss_ce": F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight)}

        # Eq. 2, second term: L_box of every matched query, which is L1 and GIoU (A.2).
        predicted = outputs["pred_boxes"][image_index, query_index]             # (P, 4)
        losses["loss_bbox"] = (predicted - boxes).abs().sum() / num_boxes
        corners = box_cxcywh_to_xyxy(predicted)[:, None]            # (P, 1, 4)
        giou = generalized_box_iou(corners, box_cxcywh_to_xyxy(boxes)[:, None])     # (P, 1, 1)
        losses["loss_giou"] = (1 - giou).sum() / num_boxes

        # Two metrics for the log; neither has a gradient.
        best = logits.argmax(-1)                                    # (B, N)
        right = (best[image_index, query_index] == labels).to(logits)           # (P,)
        losses["class_error"] = 100 - 100 * right.sum() / max(1, len(right))
        counts = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        too_many = (best != self.num_classes).sum(1) - counts       # (B,)
        losses["cardinality_error"] = too_many.abs().to(logits).mean()
        return losses

    def total(self, losses):
        """The training loss: the sum of the losses of all layers, weighted 1, 5 and 2."""
        total = 0
        for name, value in losses.items():
            for loss, weight in self.loss_weights.items():
                if name.startswith(loss):                           # loss_ce_0 weighs as loss_ce
                    total = total + weight * value
        return total

# ---- 8. Use --------------------------------------------------------------------------------------
def post_process(outputs, sizes):
    """Predictions in pixels, for images of `sizes` (B, 2), h and w. One dict per image: `scores`
    (N,), `labels` (N,), the best class other than "no object", `boxes` (N, 4) x0 y0 x1 y1."""
    p = outputs["pred_logits"].softmax(-1)                          # (B, N, K + 1)
    scores, labels = p[..., :-1].max(-1)                            # (B, N), "no object" left out
    h, w = torch.as_tensor(sizes, device=scores.device).unbind(1)
    boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"]) * torch.stack((w, h, w, h), dim=1)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]

def resized_size(height, width, size, max_size):
    """The (height, width) to resize an image to (paper: 4). The shorter side becomes `size`, unless
    the longer one would exceed `max_size`; then the longer side becomes `max_size`. If `max_size`
    is None, the result is `size`: one side of a square, or (height, width)."""
    if max_size is None:
        return (size, size) if isinstance(size, int) else tuple(size)
    short, long = sorted((height, width))
    short_side = max(1, min(size, round(max_size * short / long)))
    long_side = int(short_side * long / short)
    return (short_side, long_side) if height < width else (long_side, short_side)

def normalize(image):
    """Normalise (..., 3, h, w), uint8 or floats in [0, 1], with the mean and std of ImageNet."""
    image = image / 255 if image.dtype == torch.uint8 else image
    channels = zip(image.unbind(-3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=-3)

def to_tensor(image):
    """An RGB PIL image as a uint8 tensor (3, h, w). A tensor (3, h, w) is returned unchanged.
    Raises TypeError for anything else."""
    if torch.is_tensor(image) and image.dim() == 3 and len(image) == 3:
        return image
    if getattr(image, "mode", None) != "RGB":
        raise TypeError(f"{getattr(image, 'shape', image)!r} is neither an RGB image nor a tensor "
                        "(3, h, w): open files with infer.open_image(path)")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)

@torch.no_grad()
def detect(model, images, threshold=0.7):
    """Find the objects (paper: Listing 1) in one or a list of RGB images, PIL or tensors (3, h, w),
    uint8 or float in [0, 1]. Returns one dict per image, the best detection first: `scores` (n,)
    above `threshold`, `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 in pixels, `names`, and `queries`
    (n,), their indices. The model runs in eval mode. Raises TypeError for anything else."""
    images = images if isinstance(images, (list, tuple)) else [images]
    images = [to_tensor(image) for image in images]
    if not images:
        return []
    weight = model.query_embed.weight
    inputs = []
    for image in images:
        size = resized_size(*image.shape[1:], *model.sizes)
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        inputs.append(normalize(resized.to(weight.device)).to(weight.dtype))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        outputs = model(inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    results = post_process(outputs, [image.shape[1:] for image in images])
    for result in results:
        scores, queries = result["scores"].sort(descending=True)
        queries = queries[scores > threshold]
        for name in ("scores", "labels", "boxes"):
            result[name] = result[name][queries]
        result["queries"] = queries
        result["names"] = [model.classes[label] for label in result["labels"].tolist()]
    return results

# ---- 9. Checkpoint files (not in the paper) ------------------------------------------------------
def read_checkpoint(source):
    """Load a checkpoint file, or a model of the zoo (downloaded on first use), as {"model": ...,
    "config": ..., ...}, without running any code in it. Raises OSError or ValueError."""
    path = pathlib.Path(source)
    if source == "demo":        # in the folder assets of a clone, detr_mini_assets if installed
        path = next(pathlib.Path(__file__).parent.glob("*assets/demo.pth"), path)
    elif source in ZOO:
        path = pathlib.Path(torch.hub.get_dir(), "checkpoints", ZOO[source])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(ZOO_URL + path.name, path, path.stem.split("-")[-1])
        except (OSError, RuntimeError) as error:
            raise OSError(f"could not download {ZOO_URL + path.name} ({error}): download it "
                          f"yourself and save it as {path}") from error
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: name a file, demo, or {', '.join(ZOO)}")

    # Other programs save their options and paths (pathlib._local since Python 3.13), use other
    # names (hyper_parameters: Lightning), and put a prefix before those of the weights.
    paths = [(pathlib.PurePosixPath, f"pathlib{part}.PosixPath") for part in ("", "._local")]
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *paths]):
            file = torch.load(path, map_location="cpu", weights_only=True)
        state = file.get("model", file.get("state_dict", file.get("model_state_dict", file)))
        config = file.get("config", file.get("args", file.get("hyper_parameters", {})))
        config = config if isinstance(config, dict) else vars(config)
        prefix = next((key for key in state if key.endswith("query_embed.weight")), "")
        prefix = prefix.removesuffix("query_embed.weight")
        state = {key.removeprefix(prefix): value for key, value in state.items()
                 if not key.endswith("num_batches_tracked")}        # frozen norms have no counter
    except Exception as error:
        raise ValueError(f"cannot read the checkpoint {path} ({type(error).__name__}): it is "
                         "truncated or contains code, which is never run; download or save it "
                         "again") from error
    return {**file, "model": state, "config": {"dilation": "-dc5" in path.name, **config}}

def load_detr(source, num_classes=None, device="cpu"):
    """A DETR in eval mode, with `.classes`, the names by label. The architecture is read from the
    weights; the rest from the file, by default 8 heads, no dilation, size 800, COCO's classes. If
    `num_classes` differs, the class head is new. Raises ValueError if the weights do not fit."""
    checkpoint = read_checkpoint(source)
    state, config = checkpoint["model"], checkpoint["config"]
    body = "backbone.0.body."
    def count(prefix):
        return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})
    try:
        if num_classes is None:
            num_classes = len(state["class_embed.bias"]) - 1
        block = Bottleneck if body + "layer1.0.conv3.weight" in state else BasicBlock
        layers = [count(f"{body}layer{i + 1}.") for i in range(count(body + "layer"))]
        model = DETR(
            num_classes,
            backbone=ResNet(block, layers, len(state[body + "bn1.bias"]), config["dilation"]),
            hidden_dim=len(state["input_proj.bias"]),
            nheads=config.get("nheads", 8),
            enc_layers=count("transformer.encoder.layers."),
            dec_layers=count("transformer.decoder.layers."),
            dim_feedforward=len(state["transformer.decoder.layers.0.linear1.bias"]),
            num_queries=len(state["query_embed.weight"]),
            dropout=config.get("dropout", 0.1))
        if len(state.get("class_embed.bias", ())) != num_classes + 1:
            state["class_embed.weight"] = model.class_embed.weight
            state["class_embed.bias"] = model.class_embed.bias
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"cannot build a DETR from {source}, missing or wrong: {error}") from error
    names = checkpoint.get("classes", COCO_CLASSES)
    if len(names) == len(model.classes):
        model.classes = list(names)
    model.sizes = config.get("size", 800), config.get("max_size", 1333)
    return model.to(device).eval()

ZOO_URL = "https://dl.fbaipublicfiles.com/detr/"
ZOO = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
}

# Names by COCO's category id, which is the label of the published models; "N/A" was never used.
COCO_CLASSES = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "N/A,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "N/A,backpack,umbrella,N/A,N/A,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,N/A,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
    "couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")
