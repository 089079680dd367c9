"""One update of the networks: the base class of all trainings, and the pre-training of a purifier.

    L = gan * L_G(D(g(t(x)))) + |g(t(x)) - x|_1

with D the hinge-loss discriminator. If the purifier has a method `stages` (DeepFillV2), every stage has an L1 term.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from .._core.capture import CudaRecorder, Logs, Replayed, chosen_graphs
from .._core.checks import check_fits, message
from .._core.distributed import Group
from .._core.flags import holding
from .._core.precision import PRECISIONS, warn_if_slow
from ..attacks import frozen
from ..attacks.base import Attack
from ..attacks.passes import ROWS
from ..attacks.queue import Batch
from ..defense import restored
from ..ops import _registry
from ..purifiers import discriminator_loss, generator_loss
from ..randomness import derive_seed
from ..transforms import RandomTransform
from .config import PretrainConfig, TrainingConfig
from .single import watched


class Step:
    """An update of networks, by Adam unless `optimizer` is overridden.

    A subclass implements `losses`, which calls `update` for each network. The step owns optimizers and loss scalers. If
    native kernels are available, it converts weights to channels_last, the fastest layout for convolutions and gates;
    values do not change. Under torch.distributed each process has a shard of the batch, and gradients are summed. The
    parts of a step are named in torch.profiler's traces.

    After a warm-up, a GPU replays updates as CUDA graphs (capture.py). Therefore `losses` must not depend on changing
    Python numbers, read a tensor's values or copy from the host. Its arguments are static buffers, which the next
    update overwrites.

    Args:
        modules: the networks to train, by name; the first is the one that is averaged and checked.
        config: TrainingConfig.
        betas: betas of Adam.

    Attributes:
        optimizers, scalers: the optimizer and loss scaler of each network, by name.
        rate: the learning rate, float32 (), see set_rate.
        replayed: runs the updates; its `path` tells how.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: TrainingConfig, betas: tuple[float, float]) -> None:
        self.modules, self.config = dict(modules), config
        for name, module in self.modules.items():
            if next(module.parameters(), None) is None:
                raise ValueError(message(type(self).__name__, name, "a module with parameters", type(module).__name__))
            if not any(p.requires_grad for p in module.parameters()):
                expected = "a module that can learn: requires_grad_(True) on its parameters"
                raise ValueError(message(type(self).__name__, name, expected, f"a frozen {type(module).__name__}"))
        self.device = next(next(iter(self.modules.values())).parameters()).device
        warn_if_slow(type(self).__name__, self.device, config.precision)
        self.dtype = PRECISIONS.get(config.precision)
        if _registry.owner("gated", self.device.type) != "eager":
            for module in self.modules.values():
                if not _breaks_channels_last(module, self.device):
                    module.to(memory_format=torch.channels_last)
        self.rate, self.share = (torch.full((), v, dtype=torch.float32, device=self.device) for v in (config.lr, 1.0))
        self.epoch = torch.zeros((), dtype=torch.int64, device=self.device)
        # Share of the updates that are done, for loss weights that change over a training.
        self.progress = torch.zeros((), dtype=torch.float32, device=self.device)
        self.optimizers = {name: self.optimizer(module, betas) for name, module in self.modules.items()}
        scaled = self.dtype is torch.float16
        self.scalers = {name: torch.amp.GradScaler(self.device.type, enabled=scaled) for name in self.modules}
        # The current chunk of the batch: its share of the batch, the place of its first image, and whether it is the
        # first and the last chunk.
        self.part, self.place, self.first, self.last = 1.0, 0, True, True
        # Batch-norm layers that need more than one image per pass, see check_passes.
        self.single: list[str] = []
        self.replayed = Replayed(self._update, CudaRecorder() if self.device.type == "cuda" else None)

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int, share: float = 1.0) -> Logs:
        """One update of each network.

        Args:
            x: images (B, C, H, W) in [0, 1].
            y: labels (B,).
            ids: sample ids (B,); with the epoch, they are the key of all randomness.
            epoch: counted from 0.
            share: B divided by the number of images in all processes.

        Returns:
            Scalars to log, means over the images.
        """
        stage = self.prepare(epoch)
        self.epoch.fill_(epoch)
        self.share.fill_(share)
        modes = tuple(module.training for module in self.modules.values())
        with _tf32(self.device, self.config.precision == "tf32"):
            return self.replayed((x, y, ids), stage, modes, self._obstacle())

    def optimizer(self, module: nn.Module, betas: tuple[float, float]) -> torch.optim.Optimizer:
        """The optimizer of a network, with the tensor `rate` as learning rate."""
        return torch.optim.Adam(module.parameters(), lr=self.rate, betas=betas, fused=True)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all optimizers."""
        self.rate.fill_(rate)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                # load_state_dict replaces the tensor.
                group["lr"] = self.rate

    def prepare(self, epoch: int) -> Hashable:
        """Fill the tensors that updates of the epoch read; returns all else that they depend on, as a key of graphs."""
        return None

    def _obstacle(self) -> str | None:
        """Why updates may not be captured, or None."""
        if not self.config.graphs:
            return "graphs=False"
        if chosen_graphs() == "0":
            return "ATOP_FAST_GRAPHS=0"
        if Group().size > 1:
            # NCCL's sums can be captured, but no test has run it: it needs two GPUs, and a process whose capture fails
            # would leave the others waiting.
            return "several processes, whose sums of gradients are not tested in CUDA graphs"
        return None

    def _update(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        count = min(self.config.accumulate, len(x))
        logs: Logs = {}
        self.place = 0
        parts = zip(x.tensor_split(count), y.tensor_split(count), ids.tensor_split(count), strict=True)
        for i, (images, labels, keys) in enumerate(parts):
            self.part, self.first, self.last = len(images) / len(x), i == 0, i == count - 1
            for key, value in self.losses(images, labels, keys, self.epoch).items():
                logs[key] = logs.get(key, torch.zeros_like(value)) + self.part * value.detach()
            self.place += len(images)
        return logs

    def losses(self, x: Tensor, y: Tensor, ids: Tensor, epoch: Tensor) -> Logs:
        """Compute the losses in `epoch`, int64 (), and pass each network's to `update`; returns scalars to log."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        """Quality of the networks on held-out images: scalars, means over the images."""
        return {}

    def pictures(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] of some images and their restorations; empty for a classifier."""
        return x[:0]

    def update(self, loss: Tensor, name: str) -> None:
        """Accumulate the gradient of the named network; after the last chunk of the batch, step its optimizer."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        if self.first:
            optimizer.zero_grad(set_to_none=True)
        with record_function(f"backward of the {name}"):
            scaler.scale(loss * (self.share * self.part)).backward()
        if not self.last:
            return
        with record_function(f"optimizer of the {name}"):
            parameters = list(self.modules[name].parameters())
            Group().add_up([p.grad for p in parameters if p.grad is not None])
            if self.config.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, self.config.clip)
            if self.device.type == "cuda":
                # Fused Adam computes the same either way, but requires the flag in a capture and warns outside of one.
                for group in optimizer.param_groups:
                    group["capturable"] = torch.cuda.is_current_stream_capturing()
            scaler.step(optimizer)
            scaler.update()

    def _attack_precision(self) -> str:
        """The precision of attacks; TF32 is a setting of the device, not an attack's option."""
        return "float32" if self.config.precision == "tf32" else self.config.precision

    def autocast(self) -> torch.autocast:
        """The precision of the networks' passes."""
        # No weight cache, because it would outlive a capture.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)


class PretrainStep(Step):
    """Restore clean images, with a GAN loss if there is a discriminator (AToP, equation 4).

    Args:
        transform, purifier, discriminator, config, seed: see pretrain.
    """

    config: PretrainConfig

    def __init__(
        self,
        transform: RandomTransform,
        purifier: nn.Module,
        discriminator: nn.Module | None,
        config: PretrainConfig,
        seed: int,
    ) -> None:
        modules = {"purifier": purifier}
        if discriminator is not None and config.gan_weight:
            modules["discriminator"] = discriminator
        super().__init__(modules, config, betas=config.betas)
        self.transform, self.purifier, self.discriminator = transform, purifier, modules.get("discriminator")
        self.seed = derive_seed(seed, "transform")

    def losses(self, x: Tensor, y: Tensor, ids: Tensor, epoch: Tensor) -> Logs:
        _, loss, logs = self.restore(x, x, ids, epoch)
        self.update(loss, "purifier")
        return logs

    def restore(self, x: Tensor, target: Tensor, ids: Tensor, epoch: int | Tensor) -> tuple[Tensor, Tensor, Logs]:
        """One purifier pass and a discriminator step; returns images in [0, 1], the loss so far, and its terms."""
        with record_function("transform"):
            corrupted = self.transform(x, self.seed, ids, epoch)
            wanted = self.transform.target(target, self.seed, ids, epoch)
        with record_function("purifier"), self.autocast():
            stages = getattr(self.purifier, "stages", None)
            outputs = (self.purifier(corrupted),) if stages is None else stages(corrupted)
        outputs = tuple(output.float() for output in outputs)
        loss = torch.stack([F.l1_loss(output, wanted) for output in outputs]).sum()
        purified, logs = outputs[-1], {"l1": loss}
        loss = self.l1_weight() * loss
        if self.discriminator is not None:
            mask = corrupted[:, -1:].detach()
            with record_function("discriminator"):
                scores = self._scores(torch.cat((wanted, purified.detach())), torch.cat((mask, mask)))
                logs["discriminator"] = discriminator_loss(*scores.chunk(2))
                self.update(logs["discriminator"], "discriminator")
            with record_function("losses"), frozen(self.discriminator):
                logs["gan"] = generator_loss(self._scores(purified, mask))
            loss = loss + self.config.gan_weight * logs["gan"]
        return (self.transform.assemble(purified, corrupted) + 1) / 2, loss, logs

    def l1_weight(self) -> float | Tensor:
        """The weight of the L1 loss in this update."""
        return 1.0

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        """The mean absolute difference between images and restorations, in units of [0, 1] pixels."""
        wanted, restored = self._restored(x, ids).chunk(2)
        return {"l1": (restored - wanted).abs().mean()}

    @torch.no_grad()
    def pictures(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """The images, followed by their restorations."""
        return self._restored(x, ids)

    def _restored(self, x: Tensor, ids: Tensor) -> Tensor:
        """The target images of the transform, followed by the restorations, in [0, 1]."""
        corrupted = self.transform(x, self.seed, ids, 0)
        with self.autocast():
            purified = self.purifier(corrupted)
        assembled = self.transform.assemble(purified.float(), corrupted)
        # Equal for all copies of a sample, which lie next to one another.
        wanted = self.transform.target(x, self.seed, ids, 0)[:: self.transform.copies]
        return (torch.cat((wanted, assembled)) + 1) / 2

    def check(self, images: Tensor) -> int | None:
        """Raise before the first step if the networks do not accept the images (N, C, H, W) in [0, 1]."""
        with torch.no_grad(), frozen(self.purifier), check_fits("pretrain", "images", images):
            corrupted = self.transform(images[:1])
            with watched(self.purifier) as self.single:
                shape = restored("purifier", self.purifier, corrupted).shape
        expected = (len(corrupted), images.shape[1], *corrupted.shape[2:])
        if shape != expected:
            name = type(self.purifier).__name__
            raise ValueError(message(name, "output", f"of shape {expected}", tuple(shape)))
        return None

    def _scores(self, images: Tensor, mask: Tensor) -> Tensor:
        assert self.discriminator is not None
        with self.autocast():
            scores: Tensor = self.discriminator(images, mask)
        return scores.float()


def run_attack(attack: Attack, seed: Tensor, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """Run an attack under a seed in a tensor, int64 (), which a captured graph reads in every replay.

    Bypasses the attack's __call__, whose checks of values synchronize the GPU.
    """
    with attack.prepared() as estimator:
        estimator.seed = seed
        adversarial = attack.run(estimator, Batch(x, y, ids))
    # Keep the measured chunk size, but allow at least the rows of the network's own pass.
    attack.max_batch = max(estimator.rows, -(-len(x) // ROWS) * ROWS)
    return adversarial


def _breaks_channels_last(module: nn.Module, device: torch.device) -> bool:
    """Whether oneDNN would write out of bounds: in weight gradients of strided 1x1 convolutions with few channels.

    Seen with torch 2.11 on CPUs without AVX-512, for up to six channels, only in channels_last.
    """
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
    narrow = (m for m in convolutions if m.in_channels < 8 and tuple(m.kernel_size) == (1, 1))
    return device.type == "cpu" and any(max(m.stride) > 1 for m in narrow)


@contextlib.contextmanager
def _tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in a GPU's float32 convolutions and matrix products in the block."""
    if device.type != "cuda":
        yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    with holding((backend, "fp32_precision", "tf32" if allowed else "ieee") for backend in backends):
        yield
