"""The arrows between modules, read from the source: who may import whom, and what nobody may import.

`imports(path)` sees every import of a file, also those inside functions. CONTRIBUTING.md says the rules in words.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vbert", "runtime", "training", "commands")
PRODUCT = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")] + [ROOT / "serve.py", ROOT / "cli.py"]
)
OURS = {*FOLDERS, "serve", "cli", "benchmarks", "tests", "examples"}

COMPUTE = {"torch", "numpy", "numba", "llvmlite", "safetensors", "tokenizers", "transformers"}
HTTP = {"aiohttp", "pydantic", "pydantic_core", "prometheus_client"}
# Folder or file -> packages from outside the standard library that it may import. The longest match counts.
THIRD_PARTY = {
    "vbert": COMPUTE,
    "vbert/kernels": COMPUTE | {"cupy"},
    "vbert/formats/original.py": COMPUTE | {"peft", "adapters"},
    "runtime": COMPUTE,
    "runtime/streams.py": COMPUTE | {"cupy"},
    "runtime/http": HTTP | {"numpy"},
    "training": COMPUTE | {"rich"},
    "serve.py": HTTP | {"uvloop"},
    "commands": set(),
    "commands/simulate.py": {"matplotlib"},
    "cli.py": set(),
}
# Folder or file -> parts of this project that it may import.
PROJECT = {
    "vbert": {"vbert"},
    "runtime": {"vbert", "runtime"},
    "training": {"vbert", "training"},
    "serve.py": {"vbert", "runtime"},
    "commands": {"vbert", "runtime", "training", "serve", "benchmarks", "commands"},
    "cli.py": {"vbert", "runtime", "commands"},
}
LAZY = {"cupy", "matplotlib", "numba.cuda", "peft", "adapters", "transformers"}
# Inside vbert a module imports only from its own rank or a lower one, and never in a circle.
VBERT_RANKS = (
    {
        "errors",
        "config",
        "tenant",
        "activations",
        "batch",
        "layout",
        "memory",
        "workspace",
        "feed",
        "skip",
        "side_streams",
        "stream_counts",
    },
    {"kernels", "header"},
    {"checkpoint", "slot_file"},
    {"arena", "attention", "rows", "heads", "tokenizer", "formats", "reference", "selftest", "ngram"},
    {"entry"},
    {"peft"},
    {"deltas"},
    {"encoder", "packing"},
    {"graphs", "local_layers", "exits"},
    {"model", "tables"},
)
OUTSIDE_VBERT = {"asyncio", "threading", "multiprocessing", "concurrent", "socket", "http", "urllib", "time", "sqlite3"}
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "np.load", "numpy.load", "eval", "exec"}
ENGINE_PARTS = {"runtime.dispatcher", "runtime.manager", "runtime.pipeline"}


class Import(NamedTuple):
    module: str
    at_top: bool  # runs when the file is imported

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def imports(path: Path) -> frozenset[Import]:
    """Every import of a file; `from a import b` is a.b where b is a module of this project."""
    found = set()

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{relative(path)}:{node.lineno}: write imports in full"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            found.update(Import(name if module_file(name) else module, at_top) for name in names)
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        later |= isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not later)

    visit(tree(path), True)
    return frozenset(found)


def module_file(name: str) -> Path | None:
    base = ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_lazy_package(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in LAZY)


def rule_of(rules: dict[str, set[str]], path: Path) -> set[str]:
    name = relative(path)
    return rules[max((key for key in rules if name == key or name.startswith(key + "/")), key=len)]


def closure(path: Path) -> set[Path]:
    """All files of this project that importing `path` runs, itself included, package __init__ files left out."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += [file for name, at_top in imports(current) if at_top and (file := module_file(name))]
    return seen


def test_a_file_imports_only_what_its_place_allows():
    wrong = []
    for path in PRODUCT:
        allowed = rule_of(PROJECT, path) | rule_of(THIRD_PARTY, path) | (set(sys.stdlib_module_names) - UNPICKLERS)
        wrong += [f"{relative(path)} imports {item.module}" for item in imports(path) if item.package not in allowed]
    assert not wrong


def test_heavy_and_optional_packages_are_imported_inside_functions():
    wrong = [
        f"{relative(path)} imports {name}"
        for path in PRODUCT
        for name, top in imports(path)
        if top and is_lazy_package(name)
    ]
    assert not wrong


def test_gpu_packages_stay_in_kernels_and_streams():
    gpu = {path for path in PRODUCT for item in imports(path) if item.package == "cupy" or "numba.cuda" in item.module}
    assert not [path for path in gpu if "kernels" not in path.parts and relative(path) != "runtime/streams.py"]


def test_nothing_is_ever_unpickled_or_evaluated():
    calls = [(path, node) for path in PRODUCT for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [f"{relative(p)}:{node.lineno}" for p, node in calls if ast.unparse(node.func) in UNPICKLING_CALLS]


def test_vbert_knows_no_time_threads_or_network():
    wrong = [path for path in (ROOT / "vbert").rglob("*.py") for item in imports(path) if item.package in OUTSIDE_VBERT]
    assert not wrong


def test_vbert_modules_import_downwards():
    def rank(module: str) -> int:
        part = [*module.split("."), "__init__"][1]
        ranks = [i for i, names in enumerate(VBERT_RANKS) if part in names]
        assert ranks or part == "__init__", f"vbert.{part} has no rank: add it to VBERT_RANKS"
        return ranks[0] if ranks else len(VBERT_RANKS)

    for path in (ROOT / "vbert").rglob("*.py"):
        mine = rank(".".join(path.relative_to(ROOT).with_suffix("").parts))
        above = [item.module for item in imports(path) if item.package == "vbert" and rank(item.module) > mine]
        assert not above, f"{relative(path)} imports {above}"


def test_no_import_circles():
    for path in PRODUCT:
        for name, at_top in imports(path):
            file = module_file(name)
            if at_top and file and "__init__.py" not in (file.name, path.name):
                assert path not in closure(file), f"{relative(path)} and {name} import each other"


def test_policies_know_neither_asyncio_nor_torch():
    pure = [
        ROOT / f"runtime/{name}.py"
        for name in ("scheduler", "residency", "cost", "shares", "waiting", "threads", "operator_streams")
    ]
    for policy in [*pure, *(ROOT / "runtime/policies").glob("*.py")]:
        for path in closure(policy):
            packages = {item.package for item in imports(path)}
            assert not packages & {"asyncio", "torch", "time"}, f"{relative(policy)} by way of {relative(path)}"


def test_only_the_clock_reads_time():
    timed = [path for path in (ROOT / "runtime").rglob("*.py") if any(item.package == "time" for item in imports(path))]
    assert [relative(path) for path in timed] == ["runtime/clock.py"]


def test_dispatcher_manager_and_pipeline_meet_only_in_the_engine():
    allowed = {"runtime/core.py", "runtime/engine.py", "runtime/loop.py"}
    for path in (ROOT / "runtime").rglob("*.py"):
        used = {item.module for item in imports(path)} & ENGINE_PARTS
        assert not used or relative(path) in allowed, f"{relative(path)} imports {sorted(used)}"


def test_only_serve_imports_the_http_parts():
    for path in PRODUCT:
        if not relative(path).startswith("runtime/http/") and path.name != "serve.py":
            assert not [item for item in imports(path) if item.module.startswith("runtime.http")], relative(path)


def test_the_command_line_imports_the_project_inside_functions():
    for path in [ROOT / "cli.py", *(ROOT / "commands").glob("*.py")]:
        at_top = {item.package for item in imports(path) if item.at_top}
        assert not at_top & OURS - {"commands"}, relative(path)


def test_the_dense_reference_shares_nothing_with_the_packed_encoder():
    packed = {"kernels", "peft", "encoder", "model", "batch", "heads", "arena", "checkpoint", "layout", "activations"}
    modules = {path.relative_to(ROOT).with_suffix("").parts for path in closure(ROOT / "vbert/reference.py")}
    assert not {parts for parts in modules if parts[0] == "vbert" and parts[1] in packed}


def test_there_is_no_drawer_for_odds_and_ends():
    assert not [path for path in PRODUCT if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_a_file_can_be_read_in_one_sitting():
    assert not [relative(path) for path in PRODUCT if len(path.read_text().splitlines()) > 400]


def test_no_error_is_swallowed():
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in node.body):
                caught = ast.unparse(node.type) if node.type else "everything"
                wide = caught in ("everything", "Exception", "BaseException", "VbertError")
                assert not wide, f"{relative(path)}:{node.lineno} swallows {caught}"


def test_no_file_names_a_machine_or_a_registry():
    # Written in pieces, so that this file does not name them either.
    places = ["/".join(("", folder, "")) for folder in ("work", "root", "home", "opt")]
    places += ["/".join(("", "tmp", "w")), ".".join(("pypi", "org")), ".".join(("download", "pytorch", "org"))]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".cu", "") and path.is_file():
            text = path.read_text(errors="replace")
            assert not [place for place in places if place in text], name
