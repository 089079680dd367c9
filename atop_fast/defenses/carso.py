"""CARSO: images recalled by a variational purifier from what a classifier sees in them, and a vote over several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message
from ..attacks import frozen
from ..ops import random_normal, upsample_conv3x3
from ..randomness import derive_seed
from .inside import CONVOLUTIONS, Compute, Key, Replaced

# Negative slope of all activations, and the side to which features are averaged before their compression.
SLOPE, SIDE = 0.2, 8


class CARSO(Replaced):
    """A classifier that votes on clean images, recalled from its own features of the given image.

        c = compressed outputs of the convolutions of f at x,    x_k = decoder(z_k, c),  z_k ~ N(0, 1),  k = 1..votes
        logits = log mean_k exp f(x_k)

    The class is that of the paper's vote, softmax(sum_k exp f(x_k)), as the logarithm keeps the order. The doubly
    exponential vote itself rounds to 0 and 1 in float32, which would leave attacks without a gradient.

    Args:
        model: the classifier f, meant to be adversarially trained; its weights are shared, and it is not changed.
        shape: (C, H, W) of the images, H and W divisible by 8.
        votes: number of recalled images.
        condition, latent: sizes of c and of z.
        width: channels of the decoder at full resolution.
        layers: (channels, height, width) of the output of each convolution of f; None runs f once to find them.

    Calls are documented in Replaced.forward. Nothing of the image reaches the decoder except through c, and gradients
    flow through both passes of f. The purifier must be trained: train_carso.

    Attributes:
        purifier: the ConditionalVAE.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; calls: the images have another shape, or f other
            convolutions than the purifier was built for.

    Source: Ballarin et al., Blending adversarial training and representation-conditional purification via aggregation
    improves adversarial robustness, TMLR 2025 (arXiv 2306.06081): 8 votes, condition 512, latent 128. Networks are
    smaller here, and features are averaged to 8x8 before their compression; docs/defenses.md has all differences.
    """

    functions = CONVOLUTIONS

    def __init__(
        self,
        model: nn.Module,
        shape: Sequence[int],
        votes: int = 8,
        condition: int = 256,
        latent: int = 128,
        width: int = 32,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(model)
        self.votes = check_integer("CARSO", "votes", votes, low=1, high=1024)
        self.shape = tuple(check_integer("CARSO", "shape", size, low=1) for size in shape)
        if len(self.shape) != 3 or self.shape[1] % 8 or self.shape[2] % 8:
            raise ValueError(message("CARSO", "shape", "(C, H, W), H and W divisible by 8", tuple(shape)))
        some = next(model.parameters(), torch.empty(0))
        if layers is None:
            # In training mode, an image of zeros would count in the statistics of the caller's batch norm.
            with torch.no_grad(), frozen(model):
                layers = [h.shape[1:] for h in self._outputs(some.new_zeros(1, *self.shape))]
        self.layers = [tuple(check_integer("CARSO", "layers", size, low=1) for size in layer) for layer in layers]
        if not self.layers or any(len(layer) != 3 for layer in self.layers):
            raise ValueError(message("CARSO", "layers", "some of (channels, height, width)", layers))
        self.purifier = ConditionalVAE(self.shape, self.layers, condition, latent, width).to(some.device)

    def forward(
        self, x: Tensor, seed: int | Tensor | None = None, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See Replaced.forward."""
        key = self.key(x, seed, sample_ids, draw)
        images = self.recall(self.features(x), key).flatten(0, 1)
        # Convolutions on CPUs are fastest in this layout.
        logits = self.model(images.contiguous(memory_format=torch.channels_last))
        return vote(logits.unflatten(0, (-1, self.votes)))

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of each convolution of the classifier at images (B, C, H, W): each (B, *layer)."""
        if x.shape[1:] != self.shape:
            raise ValueError(message("CARSO", "x", f"of shape (B, {str(self.shape)[1:]}", tuple(x.shape)))
        outputs = self._outputs(x.contiguous(memory_format=torch.channels_last))
        if (found := [tuple(h.shape[1:]) for h in outputs]) != self.layers:
            expected = f"the classifier whose convolutions give {self.layers}"
            raise ValueError(message("CARSO", "model", expected, found))
        return outputs

    def recall(self, features: Sequence[Tensor], key: Key) -> Tensor:
        """Images (B, votes, C, H, W) in [0, 1] for the features of B images."""
        c = self.purifier.compress(features).repeat_interleave(self.votes, dim=0)
        # A transform in front of this draws by the same key.
        own = derive_seed(key[0], "carso")
        z = random_normal((self.votes, self.purifier.latent), own, *key[1:]).to(c.dtype)
        return self.purifier.decode(z.flatten(0, 1), c).sigmoid().unflatten(0, (-1, self.votes))

    def _outputs(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []

        def record(compute: Compute, t: Tensor, index: int, key: Key) -> Tensor:
            outputs.append(compute(t))
            return outputs[-1]

        self.intercepted(x, self.key(x, 0), record)
        return outputs

    def options(self) -> dict[str, Any]:
        """The arguments that build this module around its classifier, JSON-ready."""
        purifier, lists = self.purifier, [list(layer) for layer in self.layers]
        sizes = {"condition": purifier.condition[0].out_features, "latent": purifier.latent}
        return {"shape": list(self.shape), "votes": self.votes, **sizes, "width": purifier.width, "layers": lists}

    def extra_repr(self) -> str:
        return f"votes={self.votes}"


def vote(logits: Tensor) -> Tensor:
    """log mean_k exp(l_k) of logits l (B, votes, classes): (B, classes), with the order of softmax(sum_k exp(l_k))."""
    return logits.logsumexp(dim=1) - math.log(logits.shape[1])


class ConditionalVAE(nn.Module):
    """A variational autoencoder of images, given features of a classifier.

        c = compress(features),   q(z | x, c) = N(mean, exp(log_variance)),   p(y | z, c) = Bernoulli(decode(z, c))

    Args:
        shape: (C, H, W) of the images, H and W divisible by 8.
        layers: (channels, height, width) of each of the features.
        condition, latent, width: see CARSO.
    """

    def __init__(
        self,
        shape: Sequence[int],
        layers: Sequence[Sequence[int]],
        condition: int = 256,
        latent: int = 128,
        width: int = 32,
    ) -> None:
        super().__init__()
        name = "ConditionalVAE"
        check_integer(name, "condition", condition, low=1)
        self.latent = check_integer(name, "latent", latent, low=1)
        self.width = check_integer(name, "width", width, low=1)
        channels, height, across = shape
        self.compressors, size = nn.ModuleList(), 0
        for c, h, w in layers:
            few, side = max(4, c // 8), (min(h, SIDE), min(w, SIDE))
            conv = nn.Conv2d(c, few, 3, padding=1, bias=False)
            self.compressors.append(nn.Sequential(nn.AdaptiveAvgPool2d(side), conv, _active(nn.BatchNorm2d(few))))
            size += few * side[0] * side[1]
        self.condition = _dense(size, condition)
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False),
            _active(nn.BatchNorm2d(2 * channels)),
            nn.Conv2d(2 * channels, 4 * channels, 3, 2, 1, bias=False),
            _active(nn.BatchNorm2d(4 * channels)),
            nn.Flatten(),
        )
        self.joint = _dense(channels * height * across // 4 + condition, latent)
        self.posterior = nn.Linear(latent, 2 * latent)
        self.start = (4 * width, height // 8, across // 8)
        self.adapter = nn.Linear(latent + condition, math.prod(self.start))
        self.decoder = nn.Sequential(
            *_up(4 * width, 2 * width), *_up(2 * width, width), *_up(width, width),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, features: Sequence[Tensor], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The training pass.

        Args:
            x: images (B, C, H, W) in [0, 1].
            features: the classifier's at `x`: (B, channels, height, width) each.
            noise: standard normal numbers (B, latent).

        Returns:
            The reconstruction before its sigmoid (B, C, H, W); mean and log_variance of q(z | x, c), (B, latent).
        """
        c = self.compress(features)
        joint = self.joint(torch.cat((self.encoder(2 * x - 1), c), dim=1))
        mean, log_variance = self.posterior(joint).chunk(2, dim=1)
        return self.decode(mean + (log_variance / 2).exp() * noise, c), mean, log_variance

    def compress(self, features: Sequence[Tensor]) -> Tensor:
        """c, (B, condition)."""
        parts = [compress(h).flatten(1) for compress, h in zip(self.compressors, features, strict=True)]
        condition: Tensor = self.condition(torch.cat(parts, dim=1))
        return condition

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Images before their sigmoid (B, C, H, W) of z (B, latent) and c (B, condition)."""
        h = F.leaky_relu(self.adapter(torch.cat((z, c), dim=1)), SLOPE)
        images: Tensor = self.decoder(h.unflatten(1, self.start))
        return images


class _UpConv(nn.Conv2d):
    """Pixels repeated 2x2, and a 3x3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv3x3(x, self.weight, self.bias)


def _up(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return _UpConv(inputs, outputs, 3, bias=False), _active(nn.BatchNorm2d(outputs))


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), _active(nn.BatchNorm1d(outputs)))


def _active(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(norm, nn.LeakyReLU(SLOPE))
