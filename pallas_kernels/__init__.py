"""GPU kernels over plain arrays; importing them touches no device."""
