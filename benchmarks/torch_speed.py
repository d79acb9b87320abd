"""The authors' PyTorch package, absgd 0.0.1, at the work of benchmarks.speed, which starts this.

For every line on standard input it trains for an epoch, and answers with the seconds. It needs no
JAX: the file that it is given holds examples, their order, and the parameters to start from.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from absgd.losses import ABLoss
from absgd.optimizers import ABSGD
from torch import nn


class Dense(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        if x.ndim == 4:  # as JAX's images are flattened; no copy, where they lie so
            x = x.permute(0, 2, 3, 1).flatten(1)
        return F.relu(self.linear(x))


class Convolution(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv(x)), 2)


class NormalizedConvolution(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        # With a stride of 2 JAX's "SAME" pads on one side alone; that would be one more copy here.
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = NormalizedConvolution(inputs, outputs, stride)
        self.second = NormalizedConvolution(outputs, outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x):
        y = self.second(F.relu(self.first(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, [0] * 4 + [self.padding] * 2))


class Classifier(nn.Module):
    """benchmarks.models.Classifier; its parameters have the same names."""

    def __init__(self, model, image_shape, classes):
        super().__init__()
        height, width, channels = image_shape
        if model == "mlp":
            blocks = [Dense(height * width * channels, 256), Dense(256, 128)]
            features = 128
        elif model == "cnn":
            pooled = (height // 4) * (width // 4) * 64
            blocks = [Convolution(channels, 32), Convolution(32, 64), Dense(pooled, 128)]
            features = 128
        else:
            blocks = [nn.Sequential(NormalizedConvolution(channels, 16), nn.ReLU())]
            for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
                first = Residual(inputs, outputs, outputs // inputs)
                rest = [Residual(outputs, outputs, 1) for _ in range(4)]
                blocks.append(nn.Sequential(first, *rest))
            blocks.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
            features = 64
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(features, classes)

    def forward(self, x):
        return self.head(self.blocks(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("file", help="of the examples, their order and the parameters")
    add("--model", choices=["mlp", "cnn", "resnet32"], required=True)
    add("--temperature", type=float, required=True, help="λ")
    add("--learning-rate", type=float, required=True)
    add("--threads", type=int, required=True, help="of the processor")
    add("--compile", action="store_true", help="the network, by torch.compile")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where there is any, as JAX has it by default

    arrays = dict(np.load(args.file))
    inputs = torch.tensor(arrays.pop("inputs")).permute(0, 3, 1, 2).to(device)
    labels = torch.tensor(arrays.pop("labels")).long().to(device)
    order = torch.tensor(arrays.pop("order")).long().to(device)
    _, channels, height, width = inputs.shape
    network = Classifier(args.model, (height, width, channels), len(arrays["head.bias"]))
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(torch.tensor(arrays.pop(name)))
    if arrays:
        parser.error(f"file must hold the parameters of --model, got {list(arrays)} beside them")
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = ABSGD(network.parameters(), lr=args.learning_rate)
    criterion = ABLoss(args.temperature)
    criterion.updateLambda()  # on from the first step
    forward = torch.compile(network) if args.compile else network

    def epoch():
        for index in order:
            loss = criterion(forward(inputs[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss)  # the device has then done its work

    epoch()
    with torch.no_grad():
        loss = F.cross_entropy(network(inputs[order[0]]), labels[order[0]])
    print(json.dumps({"torch": torch.__version__, "device": device, "loss": float(loss)}))
    sys.stdout.flush()
    for _ in sys.stdin:
        start = time.perf_counter()
        epoch()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
