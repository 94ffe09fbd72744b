"""Every example runs: those of docstrings, and the Python blocks of the guides; links lead somewhere."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
from test_package import PUBLIC

import scfa_jax
import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import attention_fn, kmeans, sparsity

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")

PACKAGE = {name: getattr(scfa_jax, name) for name in sorted(PUBLIC)}
OPERATORS = {name: thing for name, thing in PACKAGE.items() if not inspect.ismodule(thing)}
# Modules of functions, with their own ones; `reference` repeats operators.
MODULES = {name: thing for name, thing in PACKAGE.items() if inspect.ismodule(thing) and name != "reference"}
HELPERS = {"patterns.check_fixed", "patterns.positions", "patterns.random_blocks", "remat.named_index"}
OPERATORS |= {
    f"{module}.{name}": function
    for module, thing in {**MODULES, "kmeans": kmeans}.items()
    for name, function in inspect.getmembers(thing, inspect.isfunction)
    if function.__module__ == thing.__name__ and not name.startswith("_")
    if name not in OPERATORS and f"{module}.{name}" not in HELPERS
}
FLAX = {
    "nnx.CausalSelfAttention": scfa_jax.nnx.CausalSelfAttention,
    "linen.CausalSelfAttention": scfa_jax.linen.CausalSelfAttention,
    "Hash": sparsity.Hash,
    "Drop": sparsity.Drop,
    **{kind.__name__: kind for kind in (sparsity.Window, sparsity.Longformer, sparsity.BigBird)},
    **{kind.__name__: kind for kind in (sparsity.Strided, sparsity.Fixed)},
    "SparseK": sparsity.SparseK,
    "HeavyHitters": sparsity.HeavyHitters,
    **{kind.__name__: kind for kind in (sparsity.LearnedHash, sparsity.KMeansHash, sparsity.PermutationHash)},
    "KeepTop": sparsity.KeepTop,
    "causal_attention_fn": attention_fn.causal_attention_fn,
    "hash_attention_fn": attention_fn.hash_attention_fn,
    "qk_attention_fn": attention_fn.qk_attention_fn,
}
DOCUMENTED = OPERATORS | FLAX
# Of no paper: what patterns are made of, and what is this library's own.
WITHOUT_SOURCE = {
    *("BlockSizes", "SparseIndex", "Tile", "causal_index", "hash_index", "keep_index", "range_index"),
    *("range_attention", "sparse_attention", "union_attention"),
    *("causal_attention_fn", "hash_attention_fn", "qk_attention_fn"),
    *("learned_hash", "LearnedHash", "permutation_hash", "PermutationHash"),
}
WITH_EXAMPLE = OPERATORS | {name: FLAX[name] for name in ("nnx.CausalSelfAttention", "linen.CausalSelfAttention")}


def examples(thing, name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(recurse=False).find(thing, name, globs={})


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_examples_of_docstrings_run(name):
    (test,) = examples(WITH_EXAMPLE[name], name)
    assert test.examples, f"{name} has no example"
    report = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_name_every_argument(name):
    thing = DOCUMENTED[name]
    section = re.search(r"(?:Args|Attributes):\n(.*?)(?:\n\n|\Z)", inspect.getdoc(thing), re.DOTALL)
    documented = re.findall(r"^    \*{0,2}(\w+):", section[1], re.MULTILINE)
    signature = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing)
    # A linen module has two more fields, which Flax itself explains.
    assert documented == [p for p in signature.parameters if p not in ("self", "parent", "name")]


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in WITHOUT_SOURCE])
def test_docstrings_name_their_source(name):
    assert re.search(r"\bSources?: .*?\b(19|20)\d\d\b", inspect.getdoc(DOCUMENTED[name]), re.DOTALL)


@pytest.mark.parametrize("name", [n for n, thing in DOCUMENTED.items() if inspect.isfunction(thing)])
def test_functions_say_what_they_return_and_raise(name):
    for section in ("Returns:", "Raises:"):
        assert section in DOCUMENTED[name].__doc__


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_python_blocks_run(path):
    """In order, in one namespace."""
    text, names = path.read_text(), {"__name__": "guide"}
    for block in BLOCK.finditer(text):
        indent, code = block.groups()
        line = text[: block.start(2)].count("\n")
        code = "\n" * line + "".join(row.removeprefix(indent) for row in code.splitlines(keepends=True))
        exec(compile(code, str(path), "exec"), names)


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text()):
        if "://" in target:
            continue
        file = (path.parent / target) if target else path
        assert file.exists(), f"{target} in {path.name}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor[1:] in {_anchor(heading) for heading in headings}, f"{target}{anchor} in {path.name}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
