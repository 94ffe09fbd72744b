"""What looks for faults: random cases, long runs of them, sanitizers, and the rule for rounding errors."""
