"""Both sides, and plain numpy, on the same inputs."""
