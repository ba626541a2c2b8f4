"""What the document this project comes from reports for its four iterations; its GPU is not named.

"Iteration 4: Aggressive Multi-Front Optimization" gives wall-clock times of a call for two
iterations, only their mean for the other two, and kernel times for all four.
"""

# Milliseconds a call: mean, median, min, max, standard deviation.
CALL_MS = {
    "iteration1": (0.955, None, None, None, None),
    "iteration2": (0.918, None, None, None, None),
    "iteration3": (0.796, 0.781, 0.757, 1.266, 0.073),
    "iteration4": (0.574, 0.530, 0.516, 1.274, 0.132),
}

# Microseconds of kernels a call, by what they are for.
KERNELS_US = {
    "iteration1": {"score": 568.3, "top-k": 66.7, "sort": 29.2, "index generation": None},
    "iteration2": {"score": 568.4, "top-k": 66.3, "sort": 29.1, "index generation": None},
    "iteration3": {"score": 70.8, "top-k": 65.9, "sort": 28.9, "index generation": 30.0},
    "iteration4": {"score": 69.5, "top-k": 65.8, "sort": 28.9, "index generation": 16.5},
}
