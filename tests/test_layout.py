"""What the parts of the package may not do, read from their source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import tinystories_jax

PACKAGE = Path(tinystories_jax.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers_of(name: str) -> list[str]:
    """Returns the modules that import `name` or a part of it, as paths in the package."""
    return [
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(found == name or found.startswith(f"{name}.") for found in imports_of(path))
    ]


def test_flax_and_pytorch_are_each_the_matter_of_one_module():
    assert importers_of("flax") == ["model/transformer.py"]
    assert importers_of("torch") == ["analysis/peer.py"]


def test_lower_parts_import_no_higher_ones():
    parts = {"data", "model", "training", "evaluation", "analysis"}
    allowed = {
        "data": {"data"},
        "model": {"model"},
        "evaluation": {"data", "model", "evaluation"},
        "training": parts - {"analysis"},
        "analysis": parts,
    }
    for other in parts:
        importers = {path.split("/")[0] for path in importers_of(f"tinystories_jax.{other}")} & parts
        assert {part for part in importers if other not in allowed[part]} == set(), other
    assert not any(path.startswith("data/") for path in importers_of("jax"))


def test_the_model_prints_nothing_opens_no_file_and_reads_no_clock():
    for path in (PACKAGE / "model").glob("*.py"):
        assert not {"time", "datetime", "pathlib", "io", "os"} & {name.split(".")[0] for name in imports_of(path)}, path
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert not {"print", "open"} & names, path
