"""The rules the code keeps as a whole: imports go one way, the library is silent, help is quick, documents agree."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import cbpq
from cbpq.cli import app

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cbpq"

# Each row may import from itself and from the rows above it.
ROWS = (
    ("", "errors", "plain"),
    ("lazy", "inputs", "packing", "atomic", "container", "locking", "outputs", "distributed", "pictures", "transforms"),
    ("fused", "levels", "scales", "rounding", "content", "fileformat"),
    ("settings", "methods", "presets", "configuration"),
    (
        "tracing",
        "uses",
        "blocks",
        "layers",
        "architectures",
        "checkpoints",
        "sources",
        "published",
        "identification",
        "loading",
        "packed",
        "models",
    ),
    ("compensation", "weights", "constrained"),
    ("loaders", "streams", "folders", "arrays", "splits", "readers", "data"),
    (
        "recipe",
        "views",
        "features",
        "reconstruction",
        "synthesis",
        "noise",
        "training",
        "settling",
        "evaluation",
        "checkpoint",
        "devices",
        "model_file",
        "inspection",
    ),
    ("exports", "sections", "tables", "report", "standings", "plotting"),
    ("planning", "agreement", "events", "journal", "stages", "summary", "pipeline", "comparison"),
    ("api",),
    ("cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """``cbpq/exports/onnx.py`` → ``cbpq.exports.onnx``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top(module: str) -> str:
    """``cbpq.exports.onnx`` → ``exports``; the package itself is the empty string."""
    return [*module.split("."), ""][1]


def imports(tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Every module of this project that a file imports, also inside functions, but not for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "cbpq")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cbpq":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield node.lineno, whole if whole in modules else str(node.module)
        yield from imports(node, modules)


MODULES = {module_of(path) for path in FILES}
TREES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_every_module_has_its_row() -> None:
    missing = {top(module) for module in MODULES} - RANK.keys()
    assert not missing, f"say in ROWS what these may import: {missing}"


@pytest.mark.parametrize("module", sorted(MODULES - {"cbpq"}))
def test_imports_go_one_way(module: str) -> None:
    for line, target in imports(TREES[module], MODULES):
        assert RANK[top(target)] <= RANK[top(module)], f"{module}, line {line}, imports {target}"


def test_imports_have_no_cycle() -> None:
    graph = {
        module: {target for _, target in imports(tree, MODULES)} - {module, "cbpq"} for module, tree in TREES.items()
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_methods_do_not_import_each_other() -> None:
    for module, tree in TREES.items():
        if re.fullmatch(r"cbpq\.methods\.(?!base$)\w+", module):
            others = {target for _, target in imports(tree, MODULES) if target.startswith("cbpq.methods.")}
            assert others <= {"cbpq.methods.base"}, module


@pytest.mark.parametrize("module", sorted(module for module in MODULES if top(module) not in ("cli", "__main__")))
def test_the_library_is_silent(module: str) -> None:
    for node in ast.walk(TREES[module]):
        assert not isinstance(node, ast.Assert), f"{module}, line {node.lineno}: an assertion is no error message"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "exit", "quit", "breakpoint"), f"{module}, line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = f"{node.value.id}.{node.attr}"
            assert used not in ("sys.exit", "os.environ", "os.getenv", "os._exit"), (
                f"{module}, line {node.lineno}: {used}"
            )


def test_click_is_never_imported() -> None:
    for module, tree in TREES.items():  # typer ships it under another name since 0.29
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "click" for name in names), module


def run_python(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_light_modules_do_not_import_torch() -> None:
    run_python(
        "import sys, cbpq, cbpq.errors, cbpq.packing, cbpq.fileformat, cbpq.inspection, cbpq.report\n"
        "dir(cbpq), cbpq.__version__, cbpq.inspect\n"
        "raise SystemExit('torch' in sys.modules)"
    )


def test_a_network_of_ones_own_needs_no_library_of_networks() -> None:
    """They take as long to import as torch itself."""
    run_python(
        "import sys\n"
        "import cbpq.api, cbpq.pipeline, cbpq.errors, cbpq.models\n"
        "spec = cbpq.models.InputSpec(3, 8, 8)\n"
        "cbpq.models.build_model(cbpq.models.SourceInfo('callable', 'torch.nn:Identity', {}, spec, None))\n"
        "try:\n"
        "    cbpq.models.load_model('no/such/file.pth')\n"
        "except cbpq.errors.UsageError as error:\n"
        "    assert 'no such file' in str(error)\n"
        "raise SystemExit(not {'torchvision', 'timm'}.isdisjoint(sys.modules))"
    )


def commands() -> list[str]:
    return sorted(getattr(typer.main.get_command(app), "commands"))  # noqa: B009 - typer types it without this attribute


def test_help_and_inspect_do_not_import_torch() -> None:
    run_python(
        "import sys\n"
        "from cbpq.cli import main\n"
        f"for command in [[], *([name] for name in {commands()})]:\n"
        "    for flag in ('--help', '-h'):\n"
        "        assert main([*command, flag]) == 0, command\n"
        "assert main(['--version']) == main([]) == 0\n"
        "assert main(['inspect', 'no such file']) == 2\n"
        "raise SystemExit('torch' in sys.modules)"
    )


def test_public_names_are_complete_and_hide_no_module() -> None:
    submodules = {info.name for info in pkgutil.iter_modules(cbpq.__path__)}
    assert set(cbpq.__all__) & submodules == {"errors"}  # which is that very module
    for name in cbpq.__all__:
        found = getattr(cbpq, name)
        assert found is getattr(cbpq, name)
        assert name in ("errors", "__version__") or callable(found)
    for module in MODULES - {"cbpq.__main__"}:
        importlib.import_module(module)
    for name in set(cbpq.__all__) - {"errors", "__version__"}:
        assert callable(getattr(cbpq, name)), f"a submodule took the place of cbpq.{name}"
    assert set(cbpq.__all__) <= set(dir(cbpq))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cbpq.nothing  # noqa: B018 - the access is the test


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def test_version_is_the_head_of_the_changelog() -> None:
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("no CHANGELOG.md here")
    released = re.findall(r"^## \[?([^\]\s]+)\]?", changelog.read_text(encoding="utf-8"), re.M)
    numbered = [head for head in released if head.lower() != "unreleased"]
    assert numbered[0] == project_version()
    assert cbpq.__version__ == project_version()


def test_every_command_is_documented() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md here")
    text = readme.read_text(encoding="utf-8")
    missing = [name for name in commands() if f"cbpq {name}" not in text]
    assert not missing, f"README.md has no word about: {missing}"
