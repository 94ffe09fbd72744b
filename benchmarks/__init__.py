"""Speed, memory and correctness of scfa_jax beside its peers: `python -m benchmarks --help`."""
