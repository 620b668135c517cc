"""Training as everyone writes it: torch modules, a DataLoader, eager SGD, `loss.item()` after every batch.

Nothing of the project is in it but a seed's own module, which is the same mathematics wherever it runs. The benchmarks
measure against this loop, and tests hold the engine to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Segmented(nn.Module):
    """A host as a list of segments and a classifier; seeds come after segments."""

    segments: nn.ModuleList

    def classify(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, seeds: Sequence[PlainSeed] = ()) -> Tensor:
        """Run the whole network: y = h + alpha * delta(h) in every slot with a seed."""
        for slot, segment in enumerate(self.segments):
            x = segment(x)
            for seed in seeds:
                if seed.slot == slot:
                    x = x + seed.alpha * seed.module(x.detach() if seed.isolated else x)
        return self.classify(x)

    def until(self, slot: int, x: Tensor) -> Tensor:
        """Run the network up to a slot."""
        for segment in self.segments[: slot + 1]:
            x = segment(x)
        return x

    def after(self, slot: int, h: Tensor) -> Tensor:
        """Run the network from what leaves a slot."""
        for segment in self.segments[slot + 1 :]:
            h = segment(h)
        return self.classify(h)


@dataclass
class PlainSeed:
    slot: int
    module: nn.Module
    alpha: float
    isolated: bool = True


class PlainCnn(Segmented):
    """Convolution, batch norm, ReLU, max-pool; global average pooling and a linear layer."""

    def __init__(
        self, inputs: int, channels: Sequence[int], kernels: Sequence[int], pools: Sequence[int], classes: int
    ):
        super().__init__()
        blocks = []
        for outputs, kernel, pool in zip(channels, kernels, pools, strict=True):
            conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(pool)))
            inputs = outputs
        self.segments = nn.ModuleList(blocks)
        self.head = nn.Linear(inputs, classes)

    def classify(self, h: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class PlainBlock(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PlainResNet(Segmented):
    """ResNet with the CIFAR stem."""

    def __init__(self, inputs: int, channels: Sequence[int], blocks: Sequence[int], classes: int):
        super().__init__()
        width, stages = channels[0], []
        stem = nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for index, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
            stride = 1 if index == 0 else 2
            stage = [PlainBlock(width, outputs, stride), *(PlainBlock(outputs, outputs, 1) for _ in range(count - 1))]
            stages.append(nn.Sequential(*([stem] if index == 0 else []), *stage))
            width = outputs
        self.segments = nn.ModuleList(stages)
        self.head = nn.Linear(width, classes)

    def classify(self, h: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class PlainEmbedding(nn.Module):
    def __init__(self, vocabulary: int, context: int, width: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))


class PlainDecoder(Segmented):
    """GPT-2's decoder without dropout, the output tied to the embedding."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int, slots: int):
        super().__init__()
        groups = [[PlainAttention(width, heads) for _ in range(layers // slots)] for _ in range(slots)]
        first: list[nn.Module] = [PlainEmbedding(vocabulary, context, width)]
        self.segments = nn.ModuleList(
            nn.Sequential(*(first if index == 0 else []), *group) for index, group in enumerate(groups)
        )
        self.norm = nn.LayerNorm(width)

    def classify(self, h: Tensor) -> Tensor:
        return F.linear(self.norm(h), self.segments[0][0].token.weight)


def with_state_of(plain: Segmented, host: nn.Module) -> Segmented:
    """Give a plain network the weights of a host: both list the same tensors, in the same order."""
    theirs, ours = (
        plain.state_dict(),
        [value for name, value in host.state_dict().items() if not name.endswith(".keep")],
    )
    if [tuple(value.shape) for value in theirs.values()] != [tuple(value.shape) for value in ours]:
        raise ValueError(f"{list(theirs)} is another network than {list(host.state_dict())}")
    plain.load_state_dict({name: value.clone().contiguous() for name, value in zip(theirs, ours)})
    return plain


class CroppedAndFlipped(Dataset):
    """Every image shifted by up to an eighth and mirrored half of the time, one image at a time."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels, self.margin = images, labels, images.shape[-1] // 8

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        size = self.images.shape[-1]
        padded = F.pad(self.images[index], (self.margin,) * 4)
        top, left = torch.randint(0, 2 * self.margin + 1, (2,)).tolist()
        image = padded[:, top : top + size, left : left + size]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, self.labels[index]


def loader(inputs: Tensor, labels: Tensor, batch_size: int, augmented: bool = False) -> DataLoader:
    """A shuffling DataLoader in this process over contiguous tensors."""
    inputs, labels = inputs.contiguous(), labels.contiguous()
    rows = CroppedAndFlipped(inputs, labels) if augmented else TensorDataset(inputs, labels)
    return DataLoader(rows, batch_size=batch_size, shuffle=True, num_workers=0, drop_last=len(labels) >= batch_size)


def held_out(inputs: Tensor, labels: Tensor, batch_size: int) -> DataLoader:
    """A DataLoader in order, all rows."""
    return DataLoader(TensorDataset(inputs.contiguous(), labels.contiguous()), batch_size=batch_size, num_workers=0)


def endless(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def plain_optimiser(parameters: Sequence[Tensor], rate: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay)


def train(
    net: Segmented,
    optimiser: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    num_batches: int,
    seeds: Sequence[PlainSeed] = (),
) -> tuple[float, float]:
    """Train for a number of batches; return mean loss and accuracy."""
    net.train()
    total, correct, answers = 0.0, 0, 0
    for _, (x, y) in zip(range(num_batches), batches):
        optimiser.zero_grad()
        logits = net(x, seeds)
        loss = loss_of(logits, y)
        loss.backward()
        optimiser.step()
        total += loss.item()
        correct += (logits.argmax(-1) == y).sum().item()
        answers += y.numel()
    return total / num_batches, correct / answers


@torch.no_grad()
def validate(net: Segmented, batches: DataLoader, seeds: Sequence[PlainSeed] = ()) -> tuple[float, float]:
    """Return mean loss and accuracy on a split."""
    net.eval()
    return score(net, batches, seeds)


@torch.no_grad()
def probe(net: Segmented, batches: DataLoader, seeds: Sequence[PlainSeed] = ()) -> tuple[float, float]:
    """The same on batch statistics, the running ones left alone."""
    net.train()
    kept = {name: value.clone() for name, value in net.named_buffers()}
    found = score(net, batches, seeds)
    for name, value in net.named_buffers():
        value.copy_(kept[name])
    return found


def score(net: Segmented, batches: DataLoader, seeds: Sequence[PlainSeed]) -> tuple[float, float]:
    total, correct, answers = 0.0, 0, 0
    for x, y in batches:
        logits = net(x, seeds)
        total += loss_of(logits, y).item() * y.numel()
        correct += (logits.argmax(-1) == y).sum().item()
        answers += y.numel()
    return total / answers, correct / answers


def train_beside(
    net: Segmented, seed: PlainSeed, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, clip: float
) -> float:
    """A seed's own pass on a batch, from the pixels on, the host's weights and running statistics left alone."""
    kept = {name: value.clone() for name, value in net.named_buffers()}
    with torch.no_grad():
        h = net.until(seed.slot, x)
    optimiser.zero_grad()
    loss = loss_of(net.after(seed.slot, h + seed.module(h)), y)
    loss.backward(inputs=list(seed.module.parameters()))
    nn.utils.clip_grad_norm_(seed.module.parameters(), clip)
    optimiser.step()
    for name, value in net.named_buffers():
        value.copy_(kept[name])
    return loss.item()
