"""DETR, the detection transformer, in one file to read beside the paper: "End-to-End Object
Detection with Transformers" (arXiv 2005.12872). Each banner names the paper's section.

Five decisions that a reader needs to know:
- Post-norm: each residual branch is added first, and the sum is normalised.
- Positions are added to q and k in every layer, never to v.
- The projections of q, k and v are packed in one matrix, as in `torch.nn.MultiheadAttention`.
- Batch norm is frozen: constant statistics, folded into the convolution before it.
- Boxes are (cx, cy, w, h) in [0, 1] of the image, without its padding.

Shapes stand in comments: B images, N queries, L decoder layers, M objects, K classes,
S = H'W' memory tokens (cells of the feature map), d model width."""
import argparse
import math
import pathlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

__all__ = ("box_cxcywh_to_xyxy box_xyxy_to_cxcywh box_iou generalized_box_iou FrozenBatchNorm2d "
           "BasicBlock Bottleneck ResNet PositionEmbeddingSine MultiheadAttention Transformer "
           "MLP DETR pad_images HungarianMatcher SetCriterion ZOO COCO_CLASSES post_process fit "
           "normalize to_tensor detect read_checkpoint load_detr").split()

# ---- 1. Boxes ------------------------------------------------------------------------------------
def box_cxcywh_to_xyxy(boxes):
    """Centre and size to corners, (..., 4) to (..., 4), in any unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)

def box_xyxy_to_cxcywh(boxes):
    """Corners to centre and size, (..., 4) to (..., 4), in any unit."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), dim=-1)

def _areas(boxes1, boxes2):
    """Of every pair, (..., N, M): the areas of intersection, union and smallest box around both."""
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]         # (..., N, 1, 4), (..., 1, M, 4)
    inner = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection = inner.clamp(min=0).prod(-1)
    area1, area2 = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    return intersection, area1 + area2 - intersection, outer.prod(-1)

def box_iou(boxes1, boxes2):
    """IoU of every pair of x0 y0 x1 y1 boxes: (..., N, 4), (..., M, 4) to (..., N, M) in [0, 1]."""
    intersection, union, _ = _areas(boxes1, boxes2)
    return intersection / union

def generalized_box_iou(boxes1, boxes2):
    """GIoU of every pair, shapes as in `box_iou`, in [-1, 1] (paper: A.2): IoU minus the share of
    the smallest box around both that neither fills. Boxes apart still have a gradient."""
    intersection, union, around = _areas(boxes1, boxes2)
    return intersection / union - (around - union) / around

# ---- 2. Backbone (3.2) ---------------------------------------------------------------------------
class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics, (B, C, H, W) to (B, C, H, W): batches of a few images
    are too small to estimate them (paper: A.4). Loads the weights of `nn.BatchNorm2d`."""
    eps = 1e-5
    def __init__(self, channels):
        super().__init__()
        for name, value in dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0).items():
            self.register_buffer(name, torch.full((channels,), value))
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

def conv_norm(x, conv, norm):
    """`norm(conv(x))`, a constant norm folded into the weight: one pass over x instead of two."""
    if isinstance(norm, nn.BatchNorm2d) and norm.training:
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()     # (C,)
    shift = norm.bias - norm.running_mean * scale                   # (C,)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, conv.stride, conv.padding, conv.dilation)

class BasicBlock(nn.Module):
    """The residual block of ResNet-18 and 34: two 3x3 convolutions."""
    expansion = 1
    def __init__(self, inplanes, planes, stride, dilation, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = norm(planes)
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
    def forward(self, x):
        shortcut = conv_norm(x, *self.downsample) if hasattr(self, "downsample") else x
        x = conv_norm(x, self.conv1, self.bn1).relu_()
        x = conv_norm(x, self.conv2, self.bn2).relu_()
        return conv_norm(x, self.conv3, self.bn3).add_(shortcut).relu_()

class ResNet(nn.Module):
    """Images (B, 3, H, W) to features (B, num_channels, H/stride, W/stride), sizes rounded up.
    `layers` counts the blocks of each stage: four stages for stride 32, three for 16. `dilation`
    (DC5) replaces the stride of the last stage. With the frozen norm, stem and first stage are not
    trained (A.4); to train from scratch take `norm=nn.BatchNorm2d`."""
    def __init__(self, block, layers, width=64, dilation=False, norm=FrozenBatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.stride, self.num_channels, self.dilation = 4, width, dilation
        self.stages = [f"layer{i + 1}" for i in range(len(layers))]
        for i, (stage, depth) in enumerate(zip(self.stages, layers)):
            dilate = dilation and stage == self.stages[-1]
            stride, planes = 1 if i == 0 or dilate else 2, width * 2**i
            inplanes, outplanes = self.num_channels, planes * block.expansion
            blocks = [block(inplanes, planes, stride, 1, norm)]
            if stride != 1 or inplanes != outplanes:
                conv = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
                blocks[0].downsample = nn.Sequential(conv, norm(outplanes))
            for _ in range(depth - 1):
                blocks.append(block(outplanes, planes, 1, 2 if dilate else 1, norm))
            self.add_module(stage, nn.Sequential(*blocks))
            self.stride, self.num_channels = self.stride * stride, outplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm is FrozenBatchNorm2d:
            nn.Sequential(self.conv1, self.layer1).requires_grad_(False)
    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.max_pool2d(conv_norm(x, self.conv1, self.bn1).relu_(), 3, stride=2, padding=1)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return x

RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}

# ---- 3. Positions (A.4) --------------------------------------------------------------------------
class PositionEmbeddingSine(nn.Module):
    """A cell's row (first half of the channels) and column as sines and cosines. Both are counted
    over the image without its padding and scaled to (0, 2 pi], whatever its size."""
    def __init__(self, channels_per_axis=128, temperature=10000):
        super().__init__()
        self.channels_per_axis, self.temperature = channels_per_axis, temperature
    def forward(self, valid, dtype=torch.float32):
        """valid (B, H', W') bool, False on padding, to (B, S, 2 * channels_per_axis)."""
        rows, columns = valid.cumsum(1, dtype=dtype), valid.cumsum(2, dtype=dtype)    # (B, H', W')
        rows = rows / (rows[:, -1:] + 1e-6) * 2 * math.pi
        columns = columns / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
        i = torch.arange(self.channels_per_axis, device=valid.device).to(dtype) // 2
        wavelengths = self.temperature ** (2 * i / self.channels_per_axis)
        angles = torch.stack((rows, columns), 3)[..., None] / wavelengths   # (B, H', W', 2, d/2)
        waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=5)
        return waves.flatten(3).flatten(1, 2)                       # (B, S, d)

# ---- 4. Attention and transformer (A.1, A.3) -----------------------------------------------------
class MultiheadAttention(nn.Module):
    """softmax(q k^T / sqrt(d/heads)) v in every head, between an input and an output projection
    (paper: A.1). If `keep_weights`, `weights` (B, heads, N, S) is the last call's attention."""
    def __init__(self, d, heads, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.keep_weights = False
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * d, d)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.zeros_(self.out_proj.bias)
    def forward(self, q, k, v, attend=None):
        """q (B, N, d), k and v (B, S, d), attend (B, 1, 1, S) bool or None, to (B, N, d)."""
        projections = zip((q, k, v), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        projected = (F.linear(x, weight, bias) for x, weight, bias in projections)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        if self.keep_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])       # (B, heads, N, S)
            if attend is not None:
                scores = scores.masked_fill(~attend, -math.inf)
            self.weights = scores.softmax(-1)
            x = self.weights @ v                                    # (B, heads, N, d/heads)
        else:                                                       # the same, in one kernel
            dropout = self.dropout if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attend, dropout)
        return self.out_proj(x.transpose(1, 2).flatten(2))

class TransformerEncoderLayer(nn.Module):
    """Self-attention among the cells, then a feed-forward network for each cell (paper: A.3). There
    dropout comes before ReLU: the two commute, and the backward pass needs one tensor less."""
    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__()
        self.self_attn = MultiheadAttention(d, heads, dropout)
        self.linear1 = nn.Linear(d, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.dropout = nn.Dropout(dropout)
    def feed_forward(self, x):
        return self.dropout(self.linear2(self.dropout(self.linear1(x)).relu_()))
    def forward(self, x, pos, attend):
        q = k = x + pos                                             # (B, S, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x, attend)))
        return self.norm2(x + self.feed_forward(x))

class TransformerDecoderLayer(TransformerEncoderLayer):
    """Self-attention among the queries, cross-attention to the memory, a feed-forward network. The
    learned queries are added like positions: to q and k, and to q of the cross-attention (A.3)."""
    def __init__(self, d, heads, dim_feedforward, dropout):
        super().__init__(d, heads, dim_feedforward, dropout)
        self.multihead_attn = MultiheadAttention(d, heads, dropout)
        self.norm3 = nn.LayerNorm(d)
    def forward(self, x, queries, memory, memory_pos, attend):
        q = k = x + queries                                         # (B, N, d)
        x = self.norm1(x + self.dropout(self.self_attn(q, k, x)))
        attended = self.multihead_attn(x + queries, memory_pos, memory, attend)
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
    def forward(self, memory, pos, attend, queries, every_layer=True):
        """memory (B, S, d), pos (B or 1, S, d), attend (B, 1, 1, S) bool or None, queries (N, d)
        to (L, B, N, d); or to (1, B, N, d), the last layer alone, without `every_layer`."""
        for layer in self.encoder.layers:
            memory = layer(memory, pos, attend)
        memory_pos = memory + pos
        queries = queries.expand(len(memory), -1, -1)               # (B, N, d)
        x, outputs = torch.zeros_like(queries), []
        for layer in self.decoder.layers:
            x = layer(x, queries, memory, memory_pos, attend)
            outputs.append(x)
        return self.decoder.norm(torch.stack(outputs if every_layer else outputs[-1:]))

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

def pad_images(images, canvas=(0, 0)):
    """Images (3, h, w) of any sizes to one batch (B, 3, H, W), zeros right and below, at least as
    large as `canvas`; and its mask (B, H, W) bool, True on padding, or None if there is none."""
    height, width = map(max, canvas, *(image.shape[1:] for image in images))
    pads = [(0, width - image.shape[2], 0, height - image.shape[1]) for image in images]
    batch = torch.stack([F.pad(image, pad) for image, pad in zip(images, pads)])
    mask = torch.stack([F.pad(torch.zeros_like(image[0], dtype=torch.bool), pad, value=True)
                        for image, pad in zip(images, pads)])
    return batch, mask if any(map(any, pads)) else None

class DETR(nn.Module):
    """The detector (paper: 3.2, Fig. 2). `num_classes` counts object classes; "no object" is one
    more, the last. `backbone` is a name of `RESNETS`, or a `ResNet`, which has its own dilation.
    With `aux_loss` every decoder layer predicts (A.2). `nheads` and 4 divide `hidden_dim`."""
    def __init__(self, num_classes=91, backbone="resnet50", dilation=False, hidden_dim=256,
                 nheads=8, enc_layers=6, dec_layers=6, dim_feedforward=2048, num_queries=100,
                 dropout=0.1, aux_loss=False):
        super().__init__()
        if isinstance(backbone, str):
            backbone = ResNet(*RESNETS[backbone], dilation=dilation)
        self.backbone = nn.ModuleList(
            [nn.ModuleDict({"body": backbone}), PositionEmbeddingSine(hidden_dim // 2)])
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, 1)
        self.transformer = Transformer(
            hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.aux_loss = aux_loss
        self.classes = [f"class {label}" for label in range(num_classes)]
        self.sizes, self.canvas = (800, 1333, 1), (0, 0)    # of images: see `fit`, `pad_images`
    def forward(self, images, mask=None):
        """images (B, 3, H, W), normalised floats, with mask (B, H, W) bool, True on padding, or
        None; or a list of (3, h, w), which is padded here. Returns `pred_logits` (B, N, K + 1),
        `pred_boxes` (B, N, 4), cx, cy, w, h in [0, 1] of each image without its padding, and with
        `aux_loss` `aux_outputs`, a list of such dicts of the earlier layers."""
        if isinstance(images, (list, tuple)):
            images, mask = pad_images(images, self.canvas)
        features = self.backbone[0].body(images)                    # (B, C, H', W')
        valid, attend = torch.ones_like(features[:1, 0], dtype=torch.bool), None    # (1, H', W')
        if mask is not None:
            valid = ~F.interpolate(mask[None].float(), valid.shape[1:])[0].bool()     # (B, H', W')
            attend = valid.flatten(1)[:, None, None]                 # (B, 1, 1, S)
        full = torch.promote_types(features.dtype, torch.float32)   # under autocast, too
        pos = self.backbone[1](valid, full)                          # (B or 1, S, d)
        memory = self.input_proj(features).flatten(2).transpose(1, 2)           # (B, S, d)
        x = self.transformer(memory, pos, attend, self.query_embed.weight, self.aux_loss)
        logits = self.class_embed(x).to(full)                       # x (L, B, N, d) to (..., K + 1)
        boxes = self.bbox_embed(x).to(full).sigmoid()               # (L, B, N, 4)
        *earlier, last = ({"pred_logits": c, "pred_boxes": b} for c, b in zip(logits, boxes))
        return {**last, "aux_outputs": earlier} if self.aux_loss else last

# ---- 6. Matching (3.1, Eq. 1) --------------------------------------------------------------------
class HungarianMatcher:
    """The cheapest one-to-one assignment of queries to objects (paper: 3.1, Eq. 1)."""
    def __init__(self, cost_class=1, cost_bbox=5, cost_giou=2):
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
    @torch.no_grad()
    def __call__(self, outputs, targets):
        """outputs: `pred_logits` (B, N, K + 1), `pred_boxes` (B, N, 4), or (L * B, ...), L layers;
        targets: one dict an image, `labels` (M,) int64, `boxes` (M, 4). Returns (query_indices,
        target_indices) for each of B or L * B, on the CPU. ValueError for a label out of range."""
        p, boxes = outputs["pred_logits"].softmax(-1), outputs["pred_boxes"]
        N, K = p.shape[1], p.shape[2] - 1                           # p (L * B, N, K + 1)
        labels, objects = (nn.utils.rnn.pad_sequence([t[name] for t in targets], batch_first=True)
                           for name in ("labels", "boxes"))         # (B, M), (B, M, 4)
        labels = labels.repeat(len(p) // len(labels), 1)[:, None]   # (L * B, 1, M)
        objects = objects.repeat(len(p) // len(objects), 1, 1).to(boxes)        # (L * B, M, 4)

        # Eq. 1: the cost of a pair is  - p(class) + 5 |box - box|_1 - 2 GIoU(box, box)
        p_class = p.gather(2, labels.clamp(0, K - 1).expand(-1, N, -1))         # (L * B, N, M)
        l1 = torch.cdist(boxes, objects, p=1)
        giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(objects))
        cost = -self.cost_class * p_class + self.cost_bbox * l1 - self.cost_giou * giou
        matches = []    # the one transfer to the CPU of a step; labels are the table's last row
        for i, table in enumerate(torch.cat((cost, labels.to(cost)), dim=1).cpu()):
            b = i % len(targets)
            table = table[:, :len(targets[b]["labels"])]            # (N + 1, M), without padding
            wrong = [label for label in table[-1].int().tolist() if not 0 <= label < K]
            if wrong:
                raise ValueError(f"image {b} of the batch: label {wrong[0]} is not in 0 to {K - 1}")
            matches.append(tuple(map(torch.from_numpy, linear_sum_assignment(table[:-1]))))
        return matches

# ---- 7. Loss (3.1, Eq. 2; A.2) -------------------------------------------------------------------
class SetCriterion(nn.Module):
    """The Hungarian loss (paper: 3.1, Eq. 2; A.2). `eos_coef` is the class weight of "no
    object", which most queries have to predict."""
    weights = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    def __init__(self, num_classes, matcher, eos_coef=0.1):
        super().__init__()
        self.num_classes, self.matcher = num_classes, matcher
        self.register_buffer("class_weight", torch.tensor([1.0] * num_classes + [eos_coef]))
    def forward(self, outputs, targets):
        """The losses of all decoder layers, unweighted: those of `layer_losses` for the last one,
        `loss_ce_0` and so on for the earlier ones. Arguments as for `HungarianMatcher`."""
        layers, B = [*outputs.get("aux_outputs", ()), outputs], len(targets)
        every = {name: torch.cat([layer[name] for layer in layers])
                 for name in ("pred_logits", "pred_boxes")}         # (L * B, N, ...)
        matches = self.matcher(every, targets)
        num_boxes = every["pred_boxes"].new_tensor(sum(len(t["labels"]) for t in targets))
        if self.training and dist.is_available() and dist.is_initialized():
            dist.all_reduce(num_boxes)
            num_boxes /= dist.get_world_size()
        num_boxes.clamp_(min=1)
        losses = self.layer_losses(outputs, targets, matches[-B:], num_boxes)
        for i, layer in enumerate(layers[:-1]):
            earlier = self.layer_losses(layer, targets, matches[i * B:(i + 1) * B], num_boxes)
            losses |= {f"{k}_{i}": value for k, value in earlier.items() if k != "class_error"}
        return losses
    def layer_losses(self, outputs, targets, matches, num_boxes):
        """`loss_ce`, `loss_bbox`, `loss_giou`, `cardinality_error` (objects), and `class_error`
        (percent of matches) of a layer with B `matches`; `num_boxes`: the mean over processes."""
        logits, counts = outputs["pred_logits"], [len(target["labels"]) for target in targets]
        labels = torch.cat([target["labels"] for target in targets])            # (M,) of the batch
        objects = torch.cat([target["boxes"] for target in targets])            # (M, 4)
        pairs = [torch.stack((torch.full_like(query, b), query, which + sum(counts[:b])))
                 for b, (query, which) in enumerate(matches)]       # of each image, (3, its pairs)
        image, query, which = torch.cat(pairs, dim=1).to(logits.device)         # (P,) each
        boxes = outputs["pred_boxes"][image, query]                 # (P, 4)
        labels, objects = labels[which], objects[which].to(boxes)   # (P,), (P, 4)
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        classes[image, query] = labels                              # (B, N), elsewhere "no object"

        # Eq. 2: over all queries  - log p(class),  and over the matched ones  + L_box (A.2)
        weight = self.class_weight.to(logits)
        loss_ce = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight)
        corners, true_corners = box_cxcywh_to_xyxy(torch.stack((boxes, objects)))[:, :, None]
        giou = generalized_box_iou(corners, true_corners)           # (P, 1, 1)
        predicted = logits.argmax(-1)                               # (B, N)
        found = (predicted != self.num_classes).sum(1)              # (B,)
        wrong = (predicted[image, query] != labels).float()         # (P,)
        return {
            "loss_ce": loss_ce,
            "loss_bbox": (boxes - objects).abs().sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
            "cardinality_error": (found - found.new_tensor(counts)).abs().float().mean(),
            "class_error": 100 * wrong.mean() if len(wrong) else torch.full_like(loss_ce, 100),
        }
    def total(self, losses):
        """The training loss: the sum of the losses of all layers, weighted 1, 5 and 2."""
        return sum(weight * value for name, value in losses.items()
                   for loss, weight in self.weights.items() if name.startswith(loss))

# ---- 8. Use --------------------------------------------------------------------------------------
ZOO_URL = "https://dl.fbaipublicfiles.com/detr/"
ZOO = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
}

# Names by COCO's category id, the published models' label; ids that COCO never used are "N/A".
COCO_CLASSES = (
    "N/A,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "N/A,stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "N/A,backpack,umbrella,N/A,N/A,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
    "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,N/A,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
    "couch,potted plant,bed,N/A,dining table,N/A,N/A,toilet,N/A,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,N/A,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")

def post_process(outputs, sizes):
    """Predictions in pixels of the images, sizes (B, 2) h, w: one dict an image with `scores` (N,),
    `labels` (N,), the best class but "no object", `boxes` (N, 4) x0 y0 x1 y1."""
    scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)       # (B, N) each
    h, w = torch.as_tensor(sizes, device=scores.device).unbind(1)
    boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"]) * torch.stack((w, h, w, h), dim=1)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes)]

def fit(height, width, size, max_size, multiple=1):
    """The (height, width) to resize to (paper: 4): the shorter side becomes `size`, or less, so
    that the longer one is about `max_size`; then both become multiples, as of the stride."""
    short, long = sorted((height, width))
    size = max(1, min(size, round(max_size * short / long)))
    sides = (size if side == short else int(size * side / short) for side in (height, width))
    return tuple(max(1, round(side / multiple)) * multiple for side in sides)

def normalize(image):
    """(..., 3, h, w) uint8, or floats in [0, 1], by the mean and std of ImageNet's pixels."""
    image = image / 255 if image.dtype == torch.uint8 else image
    mean, std = image.new_tensor([0.485, 0.456, 0.406]), image.new_tensor([0.229, 0.224, 0.225])
    return (image - mean[:, None, None]) / std[:, None, None]

def to_tensor(image):
    """An opaque PIL image of 8 bits to an RGB tensor (3, h, w) uint8; else raises TypeError."""
    if getattr(image, "mode", "F")[0] in "IF" or image.has_transparency_data:
        raise TypeError(f"{image!r}: give opaque 8-bit images; see infer.open_image(path)")
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)

@torch.inference_mode()
def detect(model, images, threshold=0.7):
    """Find the objects (paper: Listing 1) of a list of PIL images or tensors (3, h, w), RGB, uint8
    or float in [0, 1], of any sizes; or of one of them. Raises TypeError for anything else.
    Returns one dict an image, the best first, of all that score above `threshold`: `scores` (n,),
    `labels` (n,), `boxes` (n, 4) x0 y0 x1 y1 pixels, `names`, and `queries` (n,), their indices."""
    images = images if isinstance(images, (list, tuple)) else [images]
    images = [image if torch.is_tensor(image) else to_tensor(image) for image in images]
    inputs, results = [], []
    for image in images:
        size = fit(*image.shape[1:], *model.sizes)
        image = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        inputs.append(normalize(image.to(model.query_embed.weight.device)))
    for found in post_process(model(inputs), [image.shape[1:] for image in images]):
        best_first = found["scores"].argsort(descending=True)
        queries = best_first[found["scores"][best_first] > threshold]
        result = {name: value[queries] for name, value in found.items()} | {"queries": queries}
        results.append(result | {"names": [model.classes[i] for i in result["labels"].tolist()]})
    return results

def read_checkpoint(source):
    """A file, or one of the zoo, which is fetched once, as {"model": weights, "config": settings,
    ...}. Code in it is never run. OSError if it cannot be fetched, ValueError if not read."""
    path = pathlib.Path(source)
    if source == "demo":        # in a clone beside this file, else installed with it
        path = next(pathlib.Path(__file__).parent.glob("*assets/demo.pth"), path)
    elif source in ZOO:
        path = pathlib.Path(torch.hub.get_dir(), "checkpoints", ZOO[source])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(ZOO_URL + path.name, path, path.stem.split("-")[-1])
        except (OSError, RuntimeError) as error:
            raise OSError(f"could not fetch {ZOO_URL + path.name} ({error}): put that file at "
                          f"{path} by hand; `python infer.py` alone needs no network") from error
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give a file, demo, or {', '.join(ZOO)}")
    try:        # other programs save their arguments, with paths
        paths = [(pathlib.PurePosixPath, f"pathlib{m}.PosixPath") for m in ("", "._local")]
        with torch.serialization.safe_globals([argparse.Namespace, *paths]):
            file = torch.load(path, map_location="cpu", weights_only=True)
        weights = file.get("model", file.get("state_dict", file.get("model_state_dict", file)))
        name = "query_embed.weight"         # every DETR has it, perhaps behind a prefix
        prefix = next((key[:-len(name)] for key in weights if key.endswith(name)), "")
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        config = file.get("config", file.get("args", file.get("hyper_parameters", {})))
        config = config if isinstance(config, dict) else vars(config)
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint ({type(error).__name__}): truncated, "
                         "or with code, which is never run; download or save it again") from error
    return {**file, "model": weights, "config": {"dilation": "-dc5" in path.name, **config}}

def load_detr(source, num_classes=None, device="cpu"):
    """A DETR in eval mode, with `.classes`, the names by label; source as for `read_checkpoint`.
    The architecture is read from the weights; heads, dilation, image size and class names from the
    file, else they are 8, none, 800 and COCO's. num_classes: unless the weights have as many, the
    class head is new. ValueError names a weight that is missing, left over or of a wrong shape."""
    checkpoint = read_checkpoint(source)
    weights, config, body = checkpoint["model"], checkpoint["config"], "backbone.0.body."
    def depth(prefix):
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})
    try:
        width = len(weights["input_proj.bias"])
        if num_classes is not None and len(weights.get("class_embed.bias", ())) != num_classes + 1:
            head = nn.Linear(width, num_classes + 1)
            weights |= {"class_embed.weight": head.weight, "class_embed.bias": head.bias}
        block = Bottleneck if body + "layer1.0.conv3.weight" in weights else BasicBlock
        layers = [depth(f"{body}layer{i + 1}.") for i in range(depth(body + "layer"))]
        model = DETR(
            num_classes=len(weights["class_embed.bias"]) - 1,
            backbone=ResNet(block, layers, len(weights[body + "bn1.bias"]), config["dilation"]),
            hidden_dim=width,
            nheads=config.get("nheads", 8),
            enc_layers=depth("transformer.encoder.layers."),
            dec_layers=depth("transformer.decoder.layers."),
            dim_feedforward=len(weights["transformer.decoder.layers.0.linear1.bias"]),
            num_queries=len(weights["query_embed.weight"]))
        model.load_state_dict(weights)
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        raise ValueError(f"{source} holds no DETR that can be loaded: {what}") from error
    names = checkpoint.get("classes", COCO_CLASSES)
    model.classes = list(names) if len(names) == len(model.classes) else model.classes
    model.sizes = config.get("size", 800), config.get("max_size", 1333), config.get("multiple", 1)
    model.canvas = tuple(config.get("canvas", (0, 0)))
    return model.to(device).eval()
