"""B-cosification's CLIP image tower, which no package installs: structure, names and numbers, small, random weights.

It says what that code computes. The network is OpenAI's ModifiedResNet (open_clip's is the same) with B-cos layers, all
children of a Sequential numbered, biases and positions gone, images of six channels normalised with CLIP's mean and
std. The attention pooling reads the weights of its projections alone, so that c_proj, a B-cos layer, is linear when it
pools; "unpooled", c_proj is called at every position. Nothing is shared with bcosification.
"""

import bcos.common
import torch
import torchvision
from bcos.common import BcosUtilMixin
from bcos.modules import DetachableModule
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from tests.bcosification.convert.b_cosification_standins import BcosifyLinear
from tests.bcosification.convert.peer_networks import _convert

MEAN = (0.48145466, 0.4578275, 0.40821073, 0.51854534, 0.5421725, 0.59178927)
STD = (0.26862954, 0.26130258, 0.27577711) * 2


class BcosAttentionPool2d(DetachableModule):
    """Maps (N, C, H, W) -> (N, D), or with ``attn_unpool`` (H W, N, D), every position of length 1."""

    def __init__(self, channels, heads, size, b, unpool_only, bias):
        super().__init__()
        if not unpool_only:
            self.q_proj, self.k_proj = (nn.Linear(channels, channels, bias=bias) for _ in range(2))
        self.v_proj = nn.Linear(channels, channels, bias=bias)
        self.c_proj = BcosifyLinear(channels, size, b=b, linear_bias=bias)
        self.heads, self.attn_unpool = heads, unpool_only

    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1)
        if self.attn_unpool:
            positions = self.c_proj(self.v_proj(tokens))
            norm = positions.norm(dim=-1, keepdim=True)
            return positions / (norm.detach() if self.detach else norm)
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens])
        asked = tokens.detach() if self.detach else tokens
        length, count, channels = tokens.shape
        q, k, v = (
            (values @ layer.weight.T).reshape(-1, count, self.heads, channels // self.heads)
            for values, layer in ((asked[:1], self.q_proj), (asked, self.k_proj), (tokens, self.v_proj))
        )
        matrix = torch.einsum("inhc,jnhc->nhij", q, k).div((channels // self.heads) ** 0.5).softmax(-1)
        pooled = torch.einsum("nhij,jnhc->inhc", matrix, v).reshape(1, count, channels)
        return (pooled @ self.c_proj.linear.weight.T).squeeze(0)


class BcosifyNetwork(BcosUtilMixin, nn.Module):
    """Encoded images in [0, 1] -> embeddings."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bcosifynormalize = torchvision.transforms.Normalize(MEAN, STD)

    def forward(self, x):
        return self.model(self.bcosifynormalize(x))


def clip_tower(layers=(1, 2, 1, 1), width=8, size=10, *, b=2, unpool_only=False, bias=False, seed=0):
    """What B-cosification's code makes of a CLIP ResNet: a BcosifyNetwork in float64, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ModifiedResNet(list(layers), size, width * 32 // 64, 64, width)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.002, 0.01)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        model.attnpool = nn.Identity()
        stem = model.conv1
        stem.weight.data, stem.in_channels = torch.cat([stem.weight.data, -stem.weight.data], 1) / 2, 6
        _convert(model, None, False, numbered=True, b=b)
        model.attnpool = BcosAttentionPool2d(width * 32, width * 32 // 64, size, b, unpool_only, bias)
        return BcosifyNetwork(model).double().eval()


def encoded(size=64, count=2, seed=1):
    x = torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.cat([x, 1 - x], 1)


def cosine_and_gradient(peer, x, text, power=1, *, through_norm=True):
    """Cosines (N,) of images and one text (D,) and their gradient, as B-cosification's text localisation has them."""
    x = x.clone().requires_grad_()
    with bcos.common.explanation_mode(peer):
        features = peer(x)
        norm = features.norm(dim=-1, keepdim=True)
        cosines = features / (norm if through_norm else norm.detach()) @ text
        if cosines.dim() == 2:  # a position each
            cosines = (cosines * cosines.pow(power - 1).abs().detach()).mean(0)
        (gradient,) = torch.autograd.grad(cosines.sum(), x)
    return cosines.detach(), gradient
