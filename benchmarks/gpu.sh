#!/usr/bin/env bash
# On a machine with a GPU, in ten minutes: what a step costs beside SGD and the authors' PyTorch
# package, and ResNet-32 on long-tailed and on wrongly labelled Fashion-MNIST, at few epochs.
#
#     bash benchmarks/gpu.sh [folder of the four IDX files]
#
# From a clone, with jax[cuda] and the extra `bench` installed. The Python of TORCH_PYTHON, python3 if
# not set, has the extra `reference`. Each part is written as it ends; killed and started again, it
# goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results

# Runs a benchmark, unless it has ended before.
part() {
  local out=$results/$1 && shift
  if ! grep -qs '"finished": true' "$out/config.json"; then
    python3 -m "$@" --out "$out"
  fi
}

speed=(benchmarks.speed --models resnet32 mlp --forms absgd automatic --repeats 9 --compilations 1)
data=(--resume --dataset fashion-mnist ${1:+--data-dir "$1"} --dtype bfloat16 --schedule cosine)
data+=(--epochs 20 --seeds 3 --search-seeds 1 --learning-rates 0.1)
part speed-gpu-torch "${speed[@]}" --parts torch --torch-python "${TORCH_PYTHON:-python3}"
part speed-gpu "${speed[@]}" --parts sgd
part fashion-mnist-lt-resnet32 benchmarks.longtail "${data[@]}" \
  --imbalance 0.01 --methods balanced_softmax --temperatures 0.5:ess0.9
part fashion-mnist-noise-resnet32 benchmarks.noise "${data[@]}" --examples 20000 \
  --noise asymmetric:0.4 --methods cross_entropy --temperatures 0.2:ess-0.6
