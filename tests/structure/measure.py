"""Measure a Python package from its sources, without importing it: imports, circles and sizes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

LIMITS = {
    "top": 16,
    "depth": 12,
    "circles": 0,
    "typing circles": 0,
    "folder circles": 0,
    "files": 9,
    "class": 170,
    "function": 50,
}

NOT_COUNTED = ("__init__.py", "py.typed")

Edges = Mapping[str, set[str]]


@dataclass(frozen=True)
class Import:
    """An import of one module of the package by another, anywhere in the file."""

    source: str
    target: str
    line: int
    typing_only: bool = False


@dataclass(frozen=True)
class Size:
    """A class, function or folder and its number of lines or files."""

    count: int
    name: str = ""
    where: str = ""


@dataclass(frozen=True)
class Figures:
    """The figures of one package."""

    top: tuple[str, ...]
    depth: int
    chain: tuple[str, ...]
    pairs: int
    circles: tuple[tuple[str, ...], ...]
    typing_circles: tuple[tuple[str, ...], ...]
    folder_circles: tuple[tuple[str, ...], ...]
    folders: tuple[Size, ...]
    classes: tuple[Size, ...]
    functions: tuple[Size, ...]


class Package:
    """The modules below one folder, named relative to it: ``agent.main``, ``agent.__init__``, ``__init__``."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.files = {self._name(file): file for file in sorted(path.rglob("*.py"))}
        self.trees = {name: ast.parse(file.read_bytes()) for name, file in self.files.items()}

    def _name(self, file: Path) -> str:
        return ".".join(file.relative_to(self.path).with_suffix("").parts)

    def where(self, module: str, line: int) -> str:
        """``package/folder/file.py:line``."""
        return f"{self.name}/{self.files[module].relative_to(self.path)}:{line}"

    def imports(self, package: str | None = None) -> list[Import]:
        """Imports of `package` (default: this one), in source order; its names are resolved to modules."""
        wanted = package or self.name
        return [found for name in self.files for found in self._imports_of(name, wanted)]

    def relative_imports(self) -> list[str]:
        """``file:line`` of each relative import."""
        return [
            self.where(name, node.lineno)
            for name, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        ]

    def _imports_of(self, module: str, package: str) -> Iterator[Import]:
        tree = self.trees[module]
        typing_only = {id(node) for block in type_checking_blocks(tree) for node in ast.walk(block)}
        for node in ast.walk(tree):
            for full in self._imported(module, node):
                top, _, rest = full.partition(".")
                if top == package:
                    target = self._resolve(rest) if package == self.name else rest
                    yield Import(module, target, getattr(node, "lineno", 0), id(node) in typing_only)

    def _imported(self, module: str, node: ast.AST) -> Iterator[str]:
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                parents = [self.name, *module.split(".")][: -level or None] if level else []
                prefix = ".".join([*parents, *([base] if base else [])])
                yield from (f"{prefix}.{alias.name}" for alias in names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if last_name(func) == "import_module":
                yield name

    def _resolve(self, name: str) -> str:
        """The module ``package.<name>``, or the module that defines this name."""
        parts = name.split(".") if name else []
        while parts:
            for candidate in (".".join(parts), ".".join([*parts, "__init__"])):
                if candidate in self.files:
                    return candidate
            parts.pop()
        return "__init__"


def type_checking_blocks(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements below ``if TYPE_CHECKING:``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
            yield from node.body


def last_name(node: ast.AST) -> str:
    """``c`` of ``a.b.c``; empty for other expressions."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def graph(imports: Iterable[Import], node_of: Callable[[str], str] = str) -> dict[str, set[str]]:
    """Edges between the nodes of importing and imported modules, without imports for type checkers."""
    edges: dict[str, set[str]] = {}
    for each in imports:
        source, target = node_of(each.source), node_of(each.target)
        edges.setdefault(source, set())
        edges.setdefault(target, set())
        if source != target and not each.typing_only:
            edges[source].add(target)
    return edges


def reachable(edges: Edges, start: str) -> set[str]:
    """The nodes at the end of a path of at least one edge."""
    found: set[str] = set()
    todo = [start]
    while todo:
        new = edges.get(todo.pop(), set()) - found
        found |= new
        todo.extend(new)
    return found


def components(edges: Edges) -> list[tuple[str, ...]]:
    """Strongly connected components, each sorted."""
    reach = {node: reachable(edges, node) for node in edges}
    return sorted({tuple(sorted({a, *(b for b in reach[a] if a in reach[b])})) for a in edges})


def circles(edges: Edges) -> tuple[tuple[str, ...], ...]:
    """The components of more than one node."""
    return tuple(component for component in components(edges) if len(component) > 1)


def longest_chain(edges: Edges) -> tuple[str, ...]:
    """The longest chain of the condensed graph; a circle counts as one link and is written ``a+b``."""
    home = {node: "+".join(component) for component in components(edges) for node in component}
    condensed: dict[str, set[str]] = {each: set() for each in home.values()}
    for source, targets in edges.items():
        condensed[home[source]] |= {home[target] for target in targets} - {home[source]}
    chains: dict[str, tuple[str, ...]] = {}

    def chain(node: str) -> tuple[str, ...]:
        if node not in chains:
            below = [chain(other) for other in sorted(condensed[node])]
            chains[node] = (node, *max(below, key=len, default=()))
        return chains[node]

    return max((chain(node) for node in condensed), key=len, default=())


def folder_circles(package: Package, imports: list[Import]) -> tuple[tuple[str, ...], ...]:
    """Circles of at least one folder, between the folders and modules of one parent folder."""
    found: list[tuple[str, ...]] = []
    paths = [name.split(".")[:-1] for name in package.files]
    for parent in sorted({".".join(path[:n]) for path in paths for n in range(len(path) + 1)}):
        prefix = f"{parent}." if parent else ""
        inside = [i for i in imports if i.source.startswith(prefix) and i.target.startswith(prefix)]

        def child(name: str, prefix: str = prefix) -> str:
            return prefix + name.removeprefix(prefix).partition(".")[0]

        level = circles(graph(inside, child))
        found += [circle for circle in level if any(node not in package.files for node in circle)]
    return tuple(found)


def files_by_folder(path: Path) -> list[Size]:
    """Number of files in each folder, largest first, without ``__init__.py`` and ``py.typed``."""
    counts: dict[str, int] = {}
    for file in path.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            folder = str(file.parent.relative_to(path.parent))
            counts[folder] = counts.get(folder, 0) + (file.name not in NOT_COUNTED)
    return sorted((Size(n, folder) for folder, n in counts.items()), key=lambda s: (-s.count, s.name))


def sizes(package: Package, *kinds: type[ast.AST]) -> list[Size]:
    """The classes or functions (AST nodes of `kinds`) with their number of lines, longest first."""
    found = [
        Size((node.end_lineno or 0) - node.lineno + 1, node.name, package.where(module, node.lineno))
        for module, tree in package.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and isinstance(node, kinds)
    ]
    return sorted(found, key=lambda size: (-size.count, size.where))


def top_of(module: str) -> str:
    """The top-level module or folder of a module."""
    return module.partition(".")[0]


def measure(path: Path) -> Figures:
    """All figures of the package in the folder `path`."""
    package = Package(path)
    imports = package.imports()
    modules = {name: set[str]() for name in package.files} | graph(imports)
    chain = longest_chain(modules)
    return Figures(
        top=tuple(sorted({top_of(name) for name in package.files})),
        depth=len(chain),
        chain=chain,
        pairs=sum(map(len, graph(imports, top_of).values())),
        circles=circles(modules),
        typing_circles=circles(graph(replace(each, typing_only=False) for each in imports)),
        folder_circles=folder_circles(package, imports),
        folders=tuple(files_by_folder(path)),
        classes=tuple(sizes(package, ast.ClassDef)),
        functions=tuple(sizes(package, ast.FunctionDef, ast.AsyncFunctionDef)),
    )
