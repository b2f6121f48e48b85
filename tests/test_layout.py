"""Parses every source file and holds the layout: who imports whom, sizes, where `shard_map` may be.

`check_tree` returns one line per violation; the tests run it on the repository and, so that the
checker itself is known to work, on small trees that break one rule each.
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Lowest first, each with its budget in lines, raised only on purpose. A package imports only
# packages above it in this list.
BUDGETS = {
    "lm.config": 1_070,
    "lm.files": 1_850,
    "lm.sharding": 600,
    "lm.distributed": 1_300,
    "lm.hardware": 1_000,
    "lm.kernels": 5_000,
    "lm.weights": 2_050,
    "lm.parallel": 1_600,
    "lm.model": 2_400,
    "lm.tokenizers": 2_370,
    "lm.checkpoints": 1_610,
    "lm.formats": 4_300,
    "lm.adapters": 800,
    "lm.data": 2_550,
    "lm.train": 2_150,
    "lm.run": 3_100,
    "lm.quantize": 1_500,
    "lm.infer": 3_000,
    "lm.align": 2_500,
    "lm.agents": 2_500,
    "lm.evals": 2_500,
    "lm.serve": 1_500,
    "lm.aot": 1_400,
    "data_pipelines": 4_500,
    "experiments": 5_000,
}
LEVEL = {package: level for level, package in enumerate(BUDGETS)}

# Whole frameworks: never in the library, and elsewhere only inside the function that needs them.
FRAMEWORKS = {"torch", "tensorflow", "transformers", "trl", "peft", "bitsandbytes", "wandb"}
# Packages that work, and load, without JAX.
WITHOUT_JAX = ("lm.config", "lm.files")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

SHARD_MAP_ALLOWED = "lm/sharding/layout.py"
SOURCE_FOLDERS = ("lm", "data_pipelines", "experiments")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80


def package_of(module: str) -> str | None:
    """The layout's package of a dotted module: `lm.model.rope` -> `lm.model`; None if foreign."""
    parts = module.split(".")
    if parts[0] == "lm":
        return ".".join(parts[:2])
    return parts[0] if parts[0] in SOURCE_FOLDERS else None


def module_name(path: Path) -> str:
    """The dotted module of a relative path; a package's is that of its `__init__.py`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names an import statement may load, relative imports resolved against `path`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.parent.parts
            package = package[: len(package) - (node.level - 1)]
            base = ".".join((*package, base) if base else package)
        # `from lm import model` names a package, `from lm.model import forward` need not.
        yield from (f"{base}.{alias.name}" for alias in node.names)


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement, and whether importing the module executes it."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.stmt, bool]]:
        for child in ast.iter_child_nodes(node):
            runs = at_import and not (
                isinstance(node, ast.If) and is_type_checking(node.test) and child in node.body
            )
            if isinstance(child, ast.stmt):
                yield child, runs
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, runs and not inside)

    yield from walk(tree, True)


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def check_import(target: str, path: Path, at_import: bool) -> Iterator[str]:
    """Violations of one imported dotted name in the file at `path` (relative to the root)."""
    own = package_of(module_name(path))
    package, top, name = package_of(target), target.split(".")[0], target.rsplit(".")[-1]
    if package is not None and name.startswith("_"):
        yield f"imports {target}: make it public, or use it in its own file only"
    if top in FRAMEWORKS and (path.parts[0] == "lm" or at_import):
        remedy = "lm/ is JAX alone" if path.parts[0] == "lm" else "import it where it is used"
        yield f"imports {top}: {remedy}"
    if own in WITHOUT_JAX and top in JAX:
        yield f"imports {top}: {own} works without JAX"
    if package is None or package == own:
        return
    if own == "lm":
        yield f"imports {target}: lm/__init__.py imports none of its packages"
    elif own in LEVEL and package not in LEVEL:
        yield f"imports {target}, which has no place in the import order"
    elif own in LEVEL and LEVEL[package] >= LEVEL[own]:
        yield f"imports {target}: {own} may import only lower packages, and {package} is not"


def names_shard_map(statement: ast.stmt) -> bool:
    """Whether the statement's own expressions, not its nested statements', use `shard_map`."""
    if isinstance(statement, ast.ImportFrom):
        return any(alias.name == "shard_map" for alias in statement.names)
    pending: list[ast.AST] = [statement]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Attribute) and node.attr == "shard_map":
            return True
        if isinstance(node, ast.Name) and node.id == "shard_map":
            return True
        pending += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]
    return False


def check_file(path: Path, source: str) -> Iterator[str]:
    """Violations of one file; `path` is relative to the repository's root."""
    tree = ast.parse(source)
    own = package_of(module_name(path))
    if own not in LEVEL and own != "lm":
        yield f"{path}: {own} has no place in the import order"
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{path}: {lines} lines; {MAX_FILE_LINES} at most"
    shard_map_allowed = path.as_posix() == SHARD_MAP_ALLOWED
    for node, at_import in statements(tree):
        for target in imported(node, path):
            for problem in check_import(target, path, at_import):
                yield f"{path}:{node.lineno}: {problem}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield (
                    f"{path}:{node.lineno}: {node.name} has {length} lines;"
                    f" {MAX_FUNCTION_LINES} at most"
                )
        if not shard_map_allowed and names_shard_map(node):
            yield (
                f"{path}:{node.lineno}: shard_map outside {SHARD_MAP_ALLOWED};"
                " use constraints, or map_devices"
            )


def check_circles(sources: Mapping[Path, str]) -> Iterator[str]:
    """Files that import each other, directly or by way of others; imports in functions count."""
    modules = {module_name(path): path for path in sources}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        nodes = (node for node, _ in statements(ast.parse(sources[path])))
        targets = [target for node in nodes for target in imported(node, path)]
        found = {t if t in modules else t.rpartition(".")[0] for t in targets} & modules.keys()
        edges[module] = found - {module}
    # What imports nothing that is left cannot be on a circle, nor what nothing left imports.
    left, size = set(modules), -1
    while len(left) != size:
        size = len(left)
        left = {m for m in left if edges[m] & left}
        left = {m for m in left if any(m in edges[other] for other in left)}
    if left:
        yield f"files that import each other: {', '.join(str(modules[m]) for m in sorted(left))}"


def check_budgets(sources: Mapping[Path, str]) -> Iterator[str]:
    """Packages with more lines than their budget."""
    lines: Counter[str] = Counter()
    for path, source in sources.items():
        lines[package_of(module_name(path)) or ""] += len(source.splitlines())
    for package, budget in BUDGETS.items():
        if lines[package] > budget:
            yield f"{package} has {lines[package]:,} lines, its budget is {budget:,}"


def check_tree(root: Path) -> list[str]:
    """One line per violation in the source folders under `root`, duplicates removed."""
    files = [file for folder in SOURCE_FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    sources = {file.relative_to(root): file.read_text(encoding="utf-8") for file in files}
    found = {}
    for path, source in sources.items():
        found.update(dict.fromkeys(check_file(path, source)))
    return [*found, *check_circles(sources), *check_budgets(sources)]


def test_repository_holds_the_layout():
    files = list((ROOT / "lm").rglob("*.py"))
    assert len(files) > 10, f"only {len(files)} files under {ROOT / 'lm'}: nothing was checked"
    problems = check_tree(ROOT)
    assert not problems, "\n".join(problems)


def test_test_files_are_short():
    counts = {
        p: len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("tests/**/*.py")
    }
    assert counts
    long = {str(p.relative_to(ROOT)): n for p, n in counts.items() if n > MAX_FILE_LINES}
    assert not long


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    "module", ["lm", "lm.config", "lm.files", "lm.infer.requests", "lm.tokenizers"]
)
def test_loads_without_jax(module):
    code = (
        f"import sys, {module};"
        f"loaded = [m for m in {sorted(JAX | FRAMEWORKS)} if m in sys.modules];"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    result = in_fresh_python(code)
    assert result.returncode == 0, result.stderr


# Each row: a file's path, its source, and what the checker has to say about it.
BROKEN = {
    "upwards": ("lm/weights/a.py", "from lm.model import forward", "only lower packages"),
    "sideways": ("lm/data/a.py", "import lm.train.step", "only lower packages"),
    "from the root": ("lm/model/a.py", "from lm import train", "only lower packages"),
    "relative": ("lm/kernels/x/a.py", "from ...model import rope", "only lower packages"),
    "relative package": ("lm/sharding/a.py", "from .. import weights", "only lower packages"),
    "in a function": ("lm/sharding/a.py", "def f():\n  import lm.train", "only lower packages"),
    "for types": (
        "lm/kernels/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from lm.model import Config",
        "only lower packages",
    ),
    "library to experiment": ("lm/serve/a.py", "import experiments.sft", "only lower packages"),
    "library to pipeline": ("lm/data/a.py", "import data_pipelines", "only lower packages"),
    "pipeline to experiment": ("data_pipelines/a.py", "import experiments", "only lower packages"),
    "eager root": ("lm/__init__.py", "from lm import model", "none of its packages"),
    "unknown package": ("lm/misc/a.py", "x = 1", "no place in the import order"),
    "unknown target": ("lm/serve/a.py", "import lm.misc", "no place in the import order"),
    "framework in a function": ("lm/train/a.py", "def f():\n  import torch.nn", "imports torch"),
    "framework at import": ("experiments/a.py", "try:\n  import wandb\nfinally:\n  pass", "wandb"),
    "framework in a class": ("experiments/a.py", "class A:\n  import torch", "imports torch"),
    "framework unless typing": (
        "experiments/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  pass\nelse:\n  import torch",
        "imports torch",
    ),
    "jax in files": ("lm/files/a.py", "import jax.numpy as jnp", "works without JAX"),
    "shard_map attribute": ("lm/model/a.py", "import jax\nf = jax.shard_map", "shard_map outside"),
    "shard_map decorator": (
        "lm/model/a.py",
        "import jax\n@jax.shard_map\ndef f():\n  pass",
        "shard_map outside",
    ),
    "shard_map in a body": (
        "lm/train/step.py",
        "def f(g):\n  import jax\n  return jax.shard_map(g)",
        "shard_map outside",
    ),
    "shard_map import": ("lm/kernels/x/a.py", "from jax import shard_map", "shard_map outside"),
    "private name": ("lm/model/a.py", "from lm.weights.specs import _fold", "make it public"),
    "long file": ("lm/model/a.py", "x = 1\n" * 601, "601 lines"),
    "long function": ("lm/model/a.py", "def f():\n" + "  x = 1\n" * 80, "f has 81 lines"),
    "long method": (
        "lm/model/a.py",
        "class A:\n  async def g(self):\n" + "    x = 1\n" * 80,
        "g has 81 lines",
    ),
}  # fmt: skip

ALLOWED = {
    "downwards": ("lm/model/a.py", "from lm.weights import linear\nfrom lm import kernels"),
    "own package": ("lm/model/a.py", "from lm.model import rope\nfrom . import head"),
    "own package's root": ("lm/model/__init__.py", "from .forward import forward"),
    "experiment": ("experiments/a.py", "import lm.serve\nfrom data_pipelines import local_text"),
    "framework in a function": ("experiments/a.py", "def f():\n  import torch"),
    "framework for types": (
        "experiments/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import torch",
    ),
    "a name that only begins alike": ("lm/data/a.py", "import tensorflow_datasets"),
    "shard_map in its one file": ("lm/sharding/layout.py", "from jax import shard_map"),
    "shard_map in prose": ("lm/model/a.py", '"""No shard_map here."""'),
    "600 lines": ("lm/model/a.py", "x = 1\n" * 600),
    "80-line function": ("lm/model/a.py", "def f():\n" + "  x = 1\n" * 79),
}


def write(root: Path, path: str, source: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("name", BROKEN)
def test_checker_sees(name, tmp_path):
    path, source, message = BROKEN[name]
    write(tmp_path, path, source)
    problems = check_tree(tmp_path)
    assert len(problems) == 1 and message in problems[0] and path in problems[0], problems


@pytest.mark.parametrize("name", ALLOWED)
def test_checker_allows(name, tmp_path):
    write(tmp_path, *ALLOWED[name])
    assert check_tree(tmp_path) == []


def test_checker_sees_circles(tmp_path):
    (tmp_path / "lm" / "model").mkdir(parents=True)
    for name, source in {
        "a": "from lm.model.b import f",
        "b": "def f():\n  from lm.model import c",
        "c": "import lm.model.a",
        "d": "import lm.model.a",
    }.items():
        (tmp_path / "lm" / "model" / f"{name}.py").write_text(source)
    (problem,) = check_tree(tmp_path)
    assert problem.endswith("lm/model/a.py, lm/model/b.py, lm/model/c.py")


def test_checker_sees_budgets(tmp_path):
    (tmp_path / "lm" / "serve").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "lm" / "serve" / f"{i}.py").write_text("x = 1\n" * 501)
    (problem,) = check_tree(tmp_path)
    assert problem == "lm.serve has 1,503 lines, its budget is 1,500"
