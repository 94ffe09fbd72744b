"""MoA (Fu et al. 2024): a window for each head by what it would lose, `python -m train moa`."""
