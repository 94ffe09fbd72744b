"""Models by name: where the options that a command line leaves out come from."""

from __future__ import annotations

from models.config import ModelConfig

PRESETS = {
    config.preset: config
    for config in (
        ModelConfig(preset="cpu"),
        ModelConfig(preset="bytes", layers=6, width=512, heads=8, attention="hash(16)"),
        ModelConfig(preset="mnist", layers=6, width=256, heads=4, attention="hash(8)"),
        # As GPT-2 small, but for its positions. Rotary ones need no table, so that a model has the same parameters
        # whatever the length, and runs at lengths that it was not trained at.
        ModelConfig(preset="gpt2-small", layers=12, width=768, heads=12, vocab_multiple=128, attention="hash(16)"),
    )
}


def preset(name: str) -> ModelConfig:
    """The model of a name.

    Args:
        name: A key of `PRESETS`.

    Returns:
        Its shape.

    Raises:
        ValueError: There is no such model.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset takes {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]
