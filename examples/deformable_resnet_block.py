"""A ResNet bottleneck block whose 3x3 convolution is deformable (DCNv2).

    python examples/deformable_resnet_block.py

It needs torch and triton_dcn only, and runs on a GPU if there is one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_dcn import ModulatedDeformConv2dPack, fuse_batch_norm


class DeformableBottleneck(nn.Module):
    """The bottleneck of ResNet-50 with a deformable layer in the place of its 3x3 convolution.

    Args:
        channels: of the input and of the output.
        width: channels of the 3x3 convolution.

    Shape:
        (B, channels, H, W) -> (B, channels, H, W).
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        # The layer predicts its own offsets and masks, with a convolution that starts at zero.
        self.conv2 = ModulatedDeformConv2dPack(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + x)


def main() -> None:
    """Take one training step, then fold the norm behind the deformable layer into it for inference."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    block = DeformableBottleneck(channels=64, width=16).to(device)
    images = torch.randn(2, 64, 28, 40, device=device)
    target = torch.randn(2, 64, 28, 40, device=device)

    # Offsets are learned more slowly than weights in many recipes: give them a parameter group of their own.
    offset_parameters = list(block.conv2.conv_offset.parameters())
    offset_ids = {id(parameter) for parameter in offset_parameters}
    other_parameters = [parameter for parameter in block.parameters() if id(parameter) not in offset_ids]
    optimizer = torch.optim.SGD(
        [{"params": other_parameters}, {"params": offset_parameters, "lr": 0.001}],
        lr=0.01,
        momentum=0.9,
    )

    loss = F.mse_loss(block(images), target)
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item():.4f}")

    offset_gradient = block.conv2.conv_offset.weight.grad
    assert offset_gradient is not None
    print(f"gradient that reached the offsets {offset_gradient.norm().item():.2e}")

    block.eval()
    with torch.no_grad():
        expected = F.relu(block.bn2(block.conv2(torch.ones(1, 16, 8, 8, device=device))))
        fused = fuse_batch_norm(block.conv2, block.bn2, relu=True)
        difference = (fused(torch.ones(1, 16, 8, 8, device=device)) - expected).abs().max()
    print(f"convolution, norm and ReLU as one layer: largest difference {difference.item():.1e}")


if __name__ == "__main__":
    main()
