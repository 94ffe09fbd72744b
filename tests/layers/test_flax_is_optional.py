"""Flax is imported when `scfa_jax.nnx` or `scfa_jax.linen` is first asked for, and only these need it."""

import subprocess
import sys
import textwrap

import pytest

import scfa_jax


def said(program: str) -> list[str]:
    """The lines that a program prints in an interpreter of its own."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_modules_are_imported_when_they_are_asked_for(name):
    lines = said(f"""
        import sys, scfa_jax
        print([m for m in ("flax", "scfa_jax.nnx", "scfa_jax.linen", "scfa_jax.layers") if m in sys.modules])
        print(scfa_jax.{name}.CausalSelfAttention.__name__)
        print(sys.modules["scfa_jax.{name}"] is scfa_jax.{name})
    """)
    assert lines == ["[]", "CausalSelfAttention", "True"]


@pytest.mark.parametrize("way", ["scfa_jax.{name}", "import scfa_jax.{name}", "from scfa_jax import {name}"])
@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_without_flax_they_name_the_extra(name, way):
    lines = said(f"""
        import sys
        sys.modules["flax"] = None
        import scfa_jax
        try:
            {way.format(name=name)}
        except ImportError as error:
            print(error)
    """)
    assert lines == [f"scfa_jax.{name} needs Flax: pip install 'scfa-jax[flax]'."]


def test_kinds_and_attention_functions_need_no_flax():
    lines = said("""
        import sys
        sys.modules["flax"] = None
        import jax, jax.numpy as jnp
        from scfa_jax.layers import Layout, Window
        from scfa_jax.layers.attention_fn import causal_attention_fn
        layout = Layout.of(16, 2, None, None, Window(2), None, None)
        heads = layout.heads(*jnp.ones((3, 1, 4, 2, 8)))
        print(jax.eval_shape(lambda: layout.kind.attend(heads, {})).shape)
        print(jax.eval_shape(causal_attention_fn(), *[heads.query] * 3).shape)
    """)
    assert lines == ["(1, 4, 2, 8)"] * 2


def test_there_are_no_other_names():
    with pytest.raises(AttributeError, match="module 'scfa_jax' has no attribute 'flax'"):
        scfa_jax.flax  # noqa: B018
