#!/usr/bin/env bash
# First call on a bare GPU machine, in the checkout: does it run, is it right, how long does every kernel take.
# About 5 minutes, at most 9. Results: $OUT/first.tar.gz, written anew after each step.
set -u
source .gpu/unpack.sh
exec python3 -m bench.gpu_kit.plan first --minutes 8.5 --out /tmp/gpu-kit/first --archive "${OUT:-.}/first.tar.gz"
