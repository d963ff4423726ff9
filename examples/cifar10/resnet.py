"""The ResNets of He et al. 2016 (section 4.2) for CIFAR-10, with parameter-free shortcuts.

3×3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels, 6n+2 layers in all. Where a stage
halves the picture, the shortcut takes every second pixel and pads the missing channels with zeros (option A).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C, H/stride, W/stride)."""
        shortcut = x
        if self.missing:
            shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.missing // 2, self.missing // 2))
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """A ResNet of 6n+2 layers for 32×32 pictures."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) to logits (B, classes)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


INPUT_SPEC: dict[str, Any] = {
    "channels": 3,
    "height": 32,
    "width": 32,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


def resnet20(num_classes: int = 10) -> CifarResNet:
    """20 layers, 0.27 million parameters."""
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """56 layers, 0.85 million parameters."""
    return CifarResNet(9, num_classes)


resnet20.input_spec = INPUT_SPEC  # type: ignore[attr-defined]  # cbpq reads it here: a function may carry attributes
resnet56.input_spec = INPUT_SPEC  # type: ignore[attr-defined]  # the same
