"""Levels of the trellis code, positive half, on the unit-variance scale: generated.

Made by `python -m experiments.quantizers.trellis_levels --seed 0`: stochastic Lloyd training
on uniform vectors of the sphere, d = 128; 600 passes of 2048 vectors, then the average of
400 passes of 16384. On other vectors, tests/quantizers/test_trellis.py verifies the error and that
every level is the mean of what is assigned to it.
"""

# fmt: off
POSITIVE_LEVELS = {
    1: (
        0.362214, 1.192162,
    ),
    2: (
        0.193444, 0.602655, 1.070621, 1.851180,
    ),
    3: (
        0.106949, 0.303225, 0.527392, 0.752484, 1.017609, 1.328053, 1.764226, 2.440970,
    ),
    4: (
        0.055636, 0.154128, 0.266488, 0.368787, 0.485062, 0.595244, 0.719417, 0.843080,
        0.981655, 1.127850, 1.294940, 1.487414, 1.721945, 2.013149, 2.394961, 2.970005,
    ),
}
# fmt: on

# Mean squared error, standard error: 1000000 other vectors, d = 128.
SPHERE_128_MSE = {
    1: (0.30572933, 0.00001962),
    2: (0.08598190, 0.00000927),
    3: (0.02343413, 0.00000369),
    4: (0.00615637, 0.00000131),
}
