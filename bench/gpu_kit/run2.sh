#!/usr/bin/env bash
# Second call on a bare GPU machine, in the checkout: the other tables, the hardware's counters, the memory checker.
# About 6 minutes, at most 7.5. Results: $OUT/second.tar.gz, written anew after each step.
set -u
source .gpu/unpack.sh
exec python3 -m bench.gpu_kit.plan second --minutes 7 --out /tmp/gpu-kit/second --archive "${OUT:-.}/second.tar.gz"
