"""Kernels for the products and reductions that decide the speed of decoding.

One file a kernel: Metal source, a reference in plain mlx, and a dispatcher that takes the kernel where it can and the
reference where it cannot, with a reason. None of them has run on Metal: they are tested in the CPU emulator of
tests/metal_emu, which proves what they compute and read, and nothing about speed.

    rows_qmv   a weight matrix times a few rows
    gate_up    two of them and the activation that joins them
    head       clustered vocabulary: hidden state to token
    verdict    choice in every column, comparison with the draft
    experts    routed experts of 1 to 64 tokens
    attend     a few columns over a position-addressed cache
    delta      a few columns over the states of a gated delta net
    matrix     the layouts of weights          choice    the rule of who wins
    noise      the noise that draws tokens     backend   whether and how a kernel runs
    self_test   which kernels a loaded model uses: each is built, compared and timed on the model's own shapes
    self_test_cases   what is tried of each kernel
"""
