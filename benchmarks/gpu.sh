#!/usr/bin/env bash
# What a step costs, and ResNet-32 on long-tailed Fashion-MNIST by the published protocol, on a
# machine with a GPU:
#
#     bash benchmarks/gpu.sh [folder of the four IDX files]
#
# From a clone, with jax[cuda] and the extra `bench` installed. The Python of TORCH_PYTHON, python3 if
# not set, has the extra `reference`. Killed, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e benchmarks/results/speed-gpu/growth.png ]; then
  python3 -m benchmarks.speed --torch-python "${TORCH_PYTHON:-python3}" \
    --losses 1024 32768 1048576 33554432 134217728 \
    --parameters 100000 1000000 10000000 100000000 1000000000 \
    --out benchmarks/results/speed-gpu
fi
for imbalance in 0.01 0.1; do
  python3 -m benchmarks.longtail --resume --dataset fashion-mnist ${1:+--data-dir "$1"} \
    --model resnet32 --dtype bfloat16 --imbalance $imbalance --seeds 3 --search-seeds 1 \
    --methods cross_entropy cb_drw focal ldam_drw balanced_softmax arb arb_global \
    --learning-rates 0.1 --temperatures 0.8:1 0.8:2 0.8:5 0.5:ess0.9 \
    --out benchmarks/results/fashion-mnist-lt-$imbalance-resnet32
done
python3 -m benchmarks.sweep --resume --dataset fashion-mnist ${1:+--data-dir "$1"} --model mlp \
  --imbalance 0.01 --epochs 20 --schedule cosine --no-augment --seeds 5 \
  --out benchmarks/results/fashion-mnist-lt-sweep-gpu
