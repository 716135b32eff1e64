"""Imports between rooms: arrows point one way, function-local imports included."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "deeplimit"

# Files outside the rooms, open to every one of them.
OPEN = {
    "errors",
    "extras",
    "files",
    "interruption",
    "memory",
    "reading",
    "records",
    "tables",
    "terminal",
}

# room: what it may import besides itself and what is outside.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "extras": set(),
    "files": set(),
    "interruption": set(),
    "memory": set(),
    "reading": {"memory"},
    "records": {"reading", "tables"},
    "tables": set(),
    "terminal": set(),
    "_anatomy": set(),
    "network": {"_anatomy"},
    "data": set(),
    "gradient": {"_anatomy"},
    "control": {"_anatomy"},
    "integrations": {"_anatomy", "control"},
    "ode": {"_anatomy", "network"},
    "meanfield": {"_anatomy", "network"},
    "training": {"data", "gradient", "control", "ode", "meanfield", "network", "_anatomy"},
}
ARROWS["studies"] = {"training", *ARROWS["training"]}
ARROWS["report"] = set(ARROWS) - OPEN
ARROWS["verbs"] = set(ARROWS) - OPEN
ARROWS["cli"] = set(ARROWS) | {""}  # "" is the package itself: its version
ARROWS["__main__"] = {"cli"}


class Import(NamedTuple):
    """An import of something of ours."""

    file: Path
    line: int
    room: str
    target: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.room or 'deeplimit'} imports {self.target}"


def room_of(module: str) -> str:
    """`deeplimit._anatomy.chain` → network; the package itself → ''."""
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path, package: Path) -> list[str]:
    parts = [package.name, *file.relative_to(package).with_suffix("").parts]
    return parts


@cache
def nodes_of(file: Path) -> list[ast.AST]:
    """All nodes of a file, which is read once."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imported(node: ast.AST, module: list[str]) -> Iterator[tuple[str, str]]:
    """(module, name) of what a node imports, by absolute names."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = module[: -node.level] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        yield from ((source, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if called in ("import_module", "__import__") and node.args:
            match node.args[0]:
                case ast.Constant(value=str(name)):
                    yield name, ""
                case _:
                    yield module[0] + ".?", ""  # computed: nobody can say where it points


def imports(package: Path) -> Iterator[Import]:
    """Every import of ours in a package, at any depth of nesting."""
    for file in sorted(package.rglob("*.py")):
        module = module_of(file, package)
        room = "" if module[1:] == ["__init__"] else module[1]
        for node in nodes_of(file):
            for source, name in imported(node, module):
                if source.split(".")[0] != package.name:
                    continue
                # `from deeplimit import network` names a room, `import StageCost` a re-export.
                target = f"{source}.{name}" if source == package.name and name else source
                if source == package.name and not is_module(package, name):
                    target = source
                yield Import(file, node.lineno, room, target, name)  # type: ignore[attr-defined]


def is_module(package: Path, name: str) -> bool:
    return bool(name) and ((package / name).is_dir() or (package / f"{name}.py").is_file())


def back_arrows(package: Path) -> list[str]:
    """Imports against the arrows."""
    wrong = []
    for found in imports(package):
        target = room_of(found.target)
        is_open = target == "errors" or (target in OPEN and found.room not in OPEN)
        if found.room == "" or target == found.room or is_open:
            continue
        if found.room not in ARROWS:
            wrong.append(f"{found.file}: no room that has its arrows here: {found.room}")
        elif target not in ARROWS[found.room]:
            wrong.append(str(found))
    return wrong


@pytest.mark.slow
def test_no_back_arrow():
    assert not back_arrows(PACKAGE), "\n".join(back_arrows(PACKAGE))


def test_every_room_is_in_the_design():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert rooms <= set(ARROWS)
    assert {"network", "control", "data", "training", "studies", "report", "cli"} <= rooms


def test_the_arrows_have_no_cycle():
    left = {room: set(targets) - {""} for room, targets in ARROWS.items()}
    while left:
        free = {room for room, targets in left.items() if not targets & set(left)}
        assert free, f"a cycle among {sorted(left)}"
        left = {room: targets for room, targets in left.items() if room not in free}


@pytest.mark.slow
def test_report_imports_results_and_nothing_that_computes():
    """Classes and constants only: a renderer calls no function of another room."""
    called = [
        str(found) + f" {found.name}"
        for found in imports(PACKAGE)
        if found.room == "report"
        and room_of(found.target) not in {"report"} | OPEN
        and not found.name[:1].isupper()
    ]
    assert not called, "\n".join(called)


def test_the_package_only_re_exports():
    """Docstring, imports (on first use is fine), `__version__`, `__all__`; every name is there."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    for node in tree.body[1:]:
        match node:
            case ast.ImportFrom() | ast.Import():
                pass
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body):
                assert all(isinstance(inner, ast.ImportFrom) for inner in body)
            case ast.FunctionDef(name=name):
                assert name in ("__getattr__", "__dir__")
            case ast.Assign(targets=[ast.Name(id=name)]):
                assert name in ("__version__", "__all__") or name.startswith("_")
            case ast.Assign(value=ast.Call(func=ast.Name(id="lazy"))):
                pass
            case _:
                pytest.fail(f"more than a re-export: {ast.unparse(node)}")
    import deeplimit

    assert deeplimit.__version__
    assert all(hasattr(deeplimit, name) for name in deeplimit.__all__)
    assert set(dir(deeplimit)) >= set(deeplimit.__all__)


PLANTED = {
    "_anatomy/chain.py": "def f():\n    from ..control import crop\n",
    "network/blocks.py": "def f():\n    from deeplimit.training.loop import train\n",
    "network/deeper/x.py": "def f():\n    from ...control.turnpike import TurnpikeProfile\n",
    "control/turnpike.py": "from deeplimit import training\n",
    "data/idx.py": "class A:\n    def f(self):\n        import deeplimit._anatomy.chain\n",
    "training/loop.py": "from deeplimit import StageCost\n",
    "studies/horizon.py": "import importlib\nimportlib.import_module('deeplimit.report')\n",
    "gradient/adjoint.py": "from .. import control\n",
    "cellar/x.py": "import deeplimit.errors\nimport deeplimit.network\n",
    "errors.py": "if True:\n    from . import network\n",
    "memory.py": "from deeplimit.training.loop import train\n",
    "__main__.py": "from deeplimit.network import chain\n",
    "report/page.py": "import importlib\nimportlib.import_module(name)\n",
}


@pytest.mark.parametrize("path", PLANTED)
def test_a_planted_back_arrow_is_found(path: str, tmp_path: Path):
    package = tmp_path / "deeplimit"
    for room in ("network", "control", "training", "data"):
        (package / room).mkdir(parents=True)
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(PLANTED[path])
    found = back_arrows(package)
    assert len(found) == 1
    assert str(package / path) in found[0]


ALLOWED = {
    "network/deeper/x.py": "from . import y\nfrom .. import chain\nfrom ..._anatomy import z\n",
    "control/turnpike.py": "from ..errors import InputError\nfrom deeplimit import _anatomy\n",
    "cli/train.py": "def f():\n    from .. import __version__\n    import deeplimit.report\n",
    "__main__.py": "from .cli import main\n",
    "__init__.py": "from .control import crop\n",
    "data/idx.py": "import torch\nfrom deeplimit_other import x\nimport deeplimit.memory\n",
    "reading.py": "from deeplimit.memory import require\n",
}


@pytest.mark.parametrize("path", ALLOWED)
def test_a_right_arrow_is_left_alone(path: str, tmp_path: Path):
    package = tmp_path / "deeplimit"
    (package / "_anatomy").mkdir(parents=True)
    (package / path).parent.mkdir(parents=True, exist_ok=True)
    (package / path).write_text(ALLOWED[path])
    assert back_arrows(package) == []


# Where a model's class may decide, and why. Everything else looks at a model through its anatomy.
READING = {
    "_anatomy/",  # the reading itself
    "network/cifar_resnet.py",  # which of its own parts is a block, which a shortcut alone
    "network/classifiers.py",  # which part of its own stem standardises
    "network/storage.py",  # which networks have an architecture that is stored beside the weights
}


def model_classes(package: Path) -> set[str]:
    """The names of our own modules: classes of networks with a base in nn or among them."""
    found: set[str] = set()
    files = [p for room in ("network", "_anatomy") for p in (package / room).rglob("*.py")]
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in files]
    classes = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    while True:
        new = {
            c.name
            for c in classes
            for base in map(ast.unparse, c.bases)
            if base.startswith(("nn.", "torch.nn.")) or base in found
        }
        if new <= found:
            return found
        found |= new


def _named(node: ast.AST) -> set[str]:
    """Every name and text in an expression; of dotted names the last part."""
    return {
        n.id
        if isinstance(n, ast.Name)
        else n.attr
        if isinstance(n, ast.Attribute)
        else str(getattr(n, "value", ""))
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute | ast.Constant)
    }


def _asks_for_class(node: ast.AST) -> bool:
    """type(x), type(x).__name__, x.__class__ …, anywhere in an expression."""
    return any(
        (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "type")
        or (isinstance(n, ast.Attribute) and n.attr == "__class__")
        for n in ast.walk(node)
    )


def type_forks(package: Path, classes: set[str]) -> list[str]:
    """Places outside the reading where the class of a model decides."""
    forks = []
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).as_posix().startswith(tuple(READING)):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = set(classes)
        for node in ast.walk(tree):
            match node:  # other names for them
                case ast.Assign(targets=[ast.Name(id=name)], value=value) if not isinstance(
                    value, ast.Call
                ):
                    names |= {name} if _named(value) & classes else set()
                case ast.ImportFrom(names=aliases):
                    names |= {a.asname for a in aliases if a.asname and a.name in classes}
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]):
                    decides = bool(_named(kind) & names)
                case ast.Compare(left=left, comparators=others):
                    every = [left, *others]
                    decides = any(map(_asks_for_class, every)) and any(
                        _named(one) & names for one in every
                    )
                case (
                    ast.Subscript(value=_, slice=key)
                    | ast.Call(func=ast.Attribute(attr="get"), args=[key, *_])
                ):  # a table by class
                    decides = _asks_for_class(key) and bool(names & _named(tree))
                case ast.MatchClass(cls=kind):
                    decides = bool(_named(kind) & names)
                case ast.Match(subject=subject, cases=cases):
                    patterns = set().union(*(_named(case.pattern) for case in cases))
                    decides = _asks_for_class(subject) and bool(patterns & names)
                case _:
                    decides = False
            if decides:
                forks.append(f"{file}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return forks


@pytest.mark.slow
def test_a_models_class_decides_in_the_reading_only():
    classes = model_classes(PACKAGE)
    assert {"ResidualChain", "ResidualClassifier", "CifarResNet", "BasicBlock"} <= classes
    assert not type_forks(PACKAGE, classes), "\n".join(type_forks(PACKAGE, classes))


@pytest.mark.parametrize(
    "fork",
    [
        "isinstance(model, CifarResNet)",
        "isinstance(model, nn.Linear | network.CifarResNet)",
        "issubclass(type(model), (CifarResNet, nn.Linear))",
        "isinstance(model, OURS)",
        "isinstance(model, Net)",
        "type(model) is CifarResNet",
        "type(model) in (nn.Linear, CifarResNet)",
        "type(model).__name__ == 'CifarResNet'",
        "model.__class__ == CifarResNet",
        "{CifarResNet: 1}[type(model)]",
        "{CifarResNet: 1}.get(type(model))",
        "match model:\n    case CifarResNet():\n        pass",
        "match type(model).__name__:\n    case 'CifarResNet':\n        pass",
    ],
)
def test_a_planted_type_fork_is_found(fork: str, tmp_path: Path):
    package = tmp_path / "deeplimit"
    (package / "network").mkdir(parents=True)
    (package / "network" / "cifar_resnet.py").write_text("class CifarResNet(nn.Module):\n    ...\n")
    header = "from deeplimit.network import CifarResNet as Net\nOURS = (nn.Linear, CifarResNet)\n"
    plain = "isinstance(model, nn.Linear)\nmade = CifarResNet()\ntype(model) is type(made)\n"
    (package / "x.py").write_text(header + plain + fork)
    (found,) = type_forks(package, model_classes(package))
    assert found.startswith(tuple(f"{package / 'x.py'}:{line}:" for line in (6, 7)))


def file_imports(package: Path) -> dict[str, set[str]]:
    """The files that each file imports, by their modules' names; those for annotations aside."""
    files = {
        ".".join(module_of(f, package)).removesuffix(".__init__"): f for f in package.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        parts, nodes = module_of(file, package), nodes_of(file)
        blocks = [n for n in nodes if isinstance(n, ast.If)]
        aside = {
            id(inner)
            for block in blocks
            if ast.unparse(block.test) == "TYPE_CHECKING"
            for inner in ast.walk(block)
        }
        found[module] = set()
        for node in nodes:
            if id(node) not in aside:
                for source, name in imported(node, parts):
                    target = f"{source}.{name}"
                    found[module].add(target if target in files else source)
        found[module] = (found[module] & files.keys()) - {module}
    return found


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """What is left after all that import nothing that is left, and all that nobody left imports."""
    left = dict(arrows)
    while True:
        wanted = {target for module in left for target in left[module] & left.keys()}
        kept = {m: to for m, to in left.items() if to & left.keys() and m in wanted}
        if len(kept) == len(left):
            return set(kept)
        left = kept


def test_files_import_one_another_in_no_circle(tmp_path: Path):
    assert circles(file_imports(PACKAGE)) == set()
    planted = tmp_path / "deeplimit" / "control"
    planted.mkdir(parents=True)
    (planted / "a.py").write_text("def f():\n    from deeplimit.control.b import g\n")
    (planted / "b.py").write_text("from deeplimit.control import a\n")
    (planted / "c.py").write_text("from deeplimit.control.a import f\n")
    found = circles(file_imports(tmp_path / "deeplimit"))
    assert found == {"deeplimit.control.a", "deeplimit.control.b"}
