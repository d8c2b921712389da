"""One file a kernel: Metal source, reference in plain mlx, dispatcher."""
