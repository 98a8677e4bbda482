"""Everything that a bare GPU machine without network needs to test and time this checkout, prepared without a GPU.

    make gpu-kit                    here: fills .gpu with wheels, compiled kernels and the two scripts
    bash .gpu/run1.sh               there, in the checkout, with OUT set to a folder: does it run, is it right, how fast
    bash .gpu/run2.sh               there: what remains

- `pretended_gpu`: an sm_90 GPU that compiles and never launches.
- `inventory`: runs what the benchmarks and the tests of a GPU run, so that all of its kernels get compiled.
- `build`: the environment, the inventory, the wheels, the archive.
- `smoke`: every kernel once in every dtype, against float64.
- `plan`: the steps of the two scripts.
"""
