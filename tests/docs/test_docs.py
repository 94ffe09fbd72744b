"""Every example runs: those of docstrings, and the Python blocks of the guides; what these name exists."""

import doctest
import importlib
import inspect
import itertools
import re
import shlex
from pathlib import Path

import pytest

import models.kinds
import scfa_jax
import scfa_jax.index
import scfa_jax.linen
import scfa_jax.nnx
from scfa_jax import kmeans, layers, patterns, rotary, sharding, sparsek

ROOT = Path(__file__).parents[2]
NOTES = ROOT / "benchmarks" / "NOTES.md"
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
each_guide = pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
each_page = pytest.mark.parametrize("path", [*GUIDES, NOTES], ids=lambda path: path.name)
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
NAME = re.compile(r"\bscfa_jax(?:\.\w+)+")
COMMAND = re.compile(r"^python -m (.+)$", re.MULTILINE)
FILE = re.compile(r"`((?:benchmarks|docs|models|scfa_jax|tests|tools|train)/[\w./-]*)`")


def exported(module) -> dict[str, object]:
    """What a module imports for its users, as in `from ... import name as name`."""
    return {name: getattr(module, name) for name in re.findall(r"import (\w+) as \1$", inspect.getsource(module), re.M)}


def functions_of(module, prefix: str) -> dict[str, object]:
    """The functions that a module has beside those of `scfa_jax` itself, and that it defines or exports."""
    found = {name: thing for name, thing in vars(module).items() if inspect.isfunction(thing) and name[0] != "_"}
    mine = {name: thing for name, thing in found.items() if thing.__module__.startswith(module.__name__)}
    return {f"{prefix}.{name}": thing for name, thing in mine.items() if name not in PACKAGE}


PACKAGE = exported(scfa_jax)
OPERATORS = {name: thing for name, thing in sorted(PACKAGE.items()) if not inspect.ismodule(thing)}
# Modules of functions, with their own ones; `reference` repeats operators.
for module in (scfa_jax.index, patterns, kmeans, rotary, sharding, sparsek):
    OPERATORS |= functions_of(module, module.__name__.removeprefix("scfa_jax."))
HELPERS = {"index.as_list", "patterns.check_fixed", "kmeans.check_hashed"}
OPERATORS = {name: thing for name, thing in OPERATORS.items() if name not in HELPERS}

FLAX = {f"{flax.__name__}.CausalSelfAttention": flax.CausalSelfAttention for flax in (scfa_jax.nnx, scfa_jax.linen)}
KINDS = {
    name: thing
    for name, thing in exported(layers).items()
    if inspect.isclass(thing) and issubclass(thing, (layers.Kind, layers.HashBy)) and not inspect.isabstract(thing)
}
FACTORIES = {name: thing for name, thing in exported(scfa_jax.nnx).items() if name.endswith("_attention_fn")}
METHODS = {
    f"{of.__name__}.{name}": getattr(of, name)
    for of, names in (
        (scfa_jax.SparseIndex, ("mask", "pairs", "stats")),
        (scfa_jax.nnx.CausalSelfAttention, ("__call__", "draw", "init_cache", "set_view")),
        (scfa_jax.linen.CausalSelfAttention, ("__call__", "draw")),
    )
    for name in names
}
DOCUMENTED = OPERATORS | FLAX | KINDS | FACTORIES
# Of no paper: what patterns are made of, and what is this library's own.
WITHOUT_SOURCE = {
    *("BlockSizes", "SparseIndex", "TileShape", "causal_index", "range_index"),
    *("index.is_disjoint", "index.mask", "index.pairs", "range_attention", "sparse_attention"),
    *("causal_attention_fn", "hash_attention_fn", "qk_attention_fn"),
    *("learned_hash", "LearnedRotations"),
}
MUST_HAVE_AN_EXAMPLE = OPERATORS | FLAX


def examples(thing, name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(recurse=False).find(thing, name, globs={})


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """The blocks of a guide in a language: the line before each, and what it holds."""
    text, found = path.read_text(), []
    for block in BLOCK.finditer(text):
        indent, marked, code = block.groups()
        if marked == language:
            code = "".join(row.removeprefix(indent) for row in code.splitlines(keepends=True))
            found.append((text[: block.start(3)].count("\n"), code))
    return found


def test_what_is_documented_holds_all_that_users_import():
    assert DOCUMENTED.keys() >= WITHOUT_SOURCE
    names = {name.rpartition(".")[2] for name in DOCUMENTED} | {"KeptDraw"}
    for flax in (scfa_jax.nnx, scfa_jax.linen):
        assert exported(flax).keys() <= names
    assert {"Hash", "Drop", "Window", "SparseK", "Rotations", "KMeans", "rotary", "bigbird_index", "mask"} <= names


@pytest.mark.parametrize("name", [*DOCUMENTED, *METHODS])
def test_examples_of_docstrings_run(name):
    (test,) = examples((DOCUMENTED | METHODS)[name], name) or [None]
    assert (test and test.examples) or name not in MUST_HAVE_AN_EXAMPLE, f"{name} has no example"
    report = []
    if test:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", [*DOCUMENTED, *METHODS])
def test_docstrings_name_every_argument(name):
    thing = (DOCUMENTED | METHODS)[name]
    section = re.search(r"(?:Args|Attributes):\n(.*?)(?:\n\n|\Z)", inspect.getdoc(thing), re.DOTALL)
    documented = re.findall(r"^    \*{0,2}(\w+):", section[1], re.MULTILINE) if section else []
    signature = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing)
    # A linen module has two more fields, which Flax itself explains.
    assert documented == [p for p in signature.parameters if p not in ("self", "parent", "name")]


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.endswith(("_attention", "_index"))])
def test_options_are_spelled_out(name):
    """`help()` and editors show each option with its default, none of them as `**options`."""
    parameters = inspect.signature(OPERATORS[name]).parameters.values()
    assert "implementation" in {p.name for p in parameters} or name == "merge_attention"
    assert not [p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name not in WITHOUT_SOURCE])
def test_docstrings_name_their_source(name):
    assert re.search(r"\bSources?:\s.*?\b(19|20)\d\d\b", inspect.getdoc(DOCUMENTED[name]), re.DOTALL)


@pytest.mark.parametrize("name", [n for n, thing in DOCUMENTED.items() if inspect.isfunction(thing)])
def test_functions_say_what_they_return_and_raise(name):
    for section in ("Returns:", "Raises:"):
        assert section in DOCUMENTED[name].__doc__


@each_guide
def test_python_blocks_run(path):
    """In order, in one namespace."""
    names = {"__name__": "guide"}
    for line, code in blocks(path, "python"):
        exec(compile("\n" * line + code, str(path), "exec"), names)


@each_page
def test_links_lead_somewhere(path):
    for target, anchor in LINK.findall(path.read_text()):
        if "://" in target:
            continue
        file = (path.parent / target) if target else path
        assert file.exists(), f"{target} in {path.name}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor[1:] in {_anchor(heading) for heading in headings}, f"{target}{anchor} in {path.name}"


@each_page
def test_names_and_files_of_the_text_exist(path):
    text = path.read_text()
    for name in NAME.findall(text):
        found, *rest = scfa_jax, *name.split(".")[1:]
        for part in rest:
            if inspect.ismodule(found) and not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)
    for file in FILE.findall(text):
        assert (ROOT / file).exists(), f"{file} in {path.name}"


@each_page
def test_commands_name_modules_and_kinds_that_there_are(path):
    """Those of blocks of commands; what a past commit was told has `--attention ...`."""
    text = "".join(code for _, code in blocks(path, "sh")).replace("\\\n", " ")
    for command in COMMAND.findall(text):
        module, *arguments = shlex.split(command, comments=True)
        assert importlib.util.find_spec(module), f"python -m {command} in {path.name}"
        options = dict(itertools.pairwise(arguments))
        for name in ("--attention", "--kind"):
            if options.get(name, "...") != "...":
                models.kinds.parse(options[name])


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
