"""Imports go one way through the rooms of ARCHITECTURE.md, and none is heavy without need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The top of the package, which puts the rooms together.
TOP = {
    "airrep.cli",
    "airrep.config",
    "airrep.label_stages",
    "airrep.queries",
    "airrep.run_methods",
    "airrep.stages",
}
# These know nothing but each other.
FOUNDATIONS = {
    "airrep",
    "airrep.examples",
    "airrep.reading",
    "airrep.pooling",
    "airrep.objectives",
    "airrep.metrics",
    "airrep.label_store",
    "airrep.label_files",
    "airrep.label_manifest",
    "airrep.provenance",
}
# These reach a method only through the contract, `airrep.attributor`, and the registry by name.
JUDGES = {"airrep.evaluation", "airrep.evaluation_rows", "airrep.report", "airrep.metrics"}
# Optional or slow to import: wanted only where they are used.
HEAVY = ("wandb", "datasets", "sklearn", "bm25s", "faiss", "ray", "peft", "pandas", "torch")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("airrep", "data_builders")
    for path in sorted((ROOT / package).rglob("*.py"))
}

# A package is the room that its name is.
FOUNDATIONS |= {name for name in FILES if name.startswith("airrep.metrics.")}
JUDGES |= {name for name in FILES if name.startswith("airrep.metrics.")}


def imports_of(module: str) -> set[str]:
    """Modules of this project that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; name the package"
            found.add(node.module or "")
            # `from airrep import metrics` imports a module, `from airrep import X` a name.
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & set(FILES)
    return {name for name in found if name.split(".")[0] in ("airrep", "data_builders")}


@pytest.mark.parametrize("module", FILES)
def test_airrep_does_not_know_the_data_builders(module: str) -> None:
    if module.startswith("airrep") and module not in TOP:
        assert not [name for name in imports_of(module) if name.startswith("data_builders")]


@pytest.mark.parametrize("module", FILES)
def test_nothing_below_knows_the_top(module: str) -> None:
    if module in TOP:
        return
    # A builder makes what a run's configuration describes; nothing else reads it.
    known = TOP - {"airrep.config"} if module.startswith("data_builders") else TOP
    assert not imports_of(module) & known


@pytest.mark.parametrize("module", sorted(FOUNDATIONS & set(FILES)))
def test_foundations_know_only_each_other(module: str) -> None:
    assert imports_of(module) <= FOUNDATIONS


@pytest.mark.parametrize("module", sorted(JUDGES & set(FILES)))
def test_judges_know_only_the_contract(module: str) -> None:
    methods = {
        name
        for name in imports_of(module)
        if name.startswith(("airrep.attributors.", "airrep.encoder"))
    }
    assert not methods


@pytest.mark.parametrize("module", [name for name in FILES if "attributor" in name])
def test_methods_do_not_know_who_judges_them(module: str) -> None:
    assert not imports_of(module) & {"airrep.evaluation", "airrep.report"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_by("import airrep") == []


def test_using_the_foundations_imports_nothing_heavy() -> None:
    modules = ("examples", "reading", "label_store", "attributor", "attributors")
    assert loaded_by("; ".join(f"import airrep.{name}" for name in modules)) == []


def test_public_names_are_there() -> None:
    import airrep

    for name in airrep.__all__:
        assert getattr(airrep, name) is not None
    assert set(airrep.__all__) == set(dir(airrep))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        airrep.nothing  # noqa: B018


def loaded_by(statement: str) -> list[str]:
    """Which of `HEAVY` a new interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()
