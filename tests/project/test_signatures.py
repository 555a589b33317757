"""Every public function and method of the package and of the kernels has types for its arguments and its result.

Triton kernels are exempt: their arguments are pointers and constants that `tl` types. mypy cannot exempt functions by
decorator, so this test checks what `disallow_untyped_defs` would. mypy checks that the types are right.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for part in ("vtfast", "kernels") for file in (ROOT / part).rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def functions(scope: ast.Module | ast.ClassDef) -> Iterator[tuple[Function, bool]]:
    """Public functions, and methods of public classes (True)."""
    for entry in scope.body:
        if isinstance(entry, ast.ClassDef) and is_public(entry.name):
            yield from ((function, True) for function, _ in functions(entry))
        elif isinstance(entry, Function) and is_public(entry.name):
            yield entry, False


def untyped(source: str) -> list[str]:
    """One line `name: arguments without a type` per function that lacks any."""
    lines = []
    for function, is_method in functions(ast.parse(source)):
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        if any(decorator.startswith(("triton.jit", "gluon.jit")) for decorator in decorators):
            continue
        signature = function.args
        arguments = [*signature.posonlyargs, *signature.args]
        if is_method and "staticmethod" not in decorators:
            arguments = arguments[1:]
        arguments += [*signature.kwonlyargs, *filter(None, (signature.vararg, signature.kwarg))]
        missing = [argument.arg for argument in arguments if argument.annotation is None]
        missing += ["return"] if function.returns is None else []
        if missing:
            lines.append(f"{function.name}: {', '.join(missing)}")
    return lines


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_functions_are_typed(file: Path) -> None:
    assert untyped(file.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def f(x: int) -> int: ...", []),
        ("def f(x): ...", ["f: x, return"]),
        ("async def f(x: int): ...", ["f: return"]),
        ("def f(a, /, b: int, *c, d, **e) -> int: ...", ["f: a, d, c, e"]),
        ("class A:\n    def f(self) -> int: ...", []),
        ("class A:\n    def __init__(self): ...", ["__init__: return"]),
        ("class A:\n    class B:\n        def f(self, x) -> int: ...", ["f: x"]),
        ("class A:\n    @staticmethod\n    def f(x) -> int: ...", ["f: x"]),
        ("@triton.jit\ndef f(x): ...", []),
        ("@triton.jit(debug=True)\ndef f(x): ...", []),
        ("@cache\ndef f(x): ...", ["f: x, return"]),
        ("def _f(x): ...", []),
        ("class _A:\n    def f(self, x): ...", []),
    ],
)
def test_untyped(source: str, expected: list[str]) -> None:
    assert untyped(source) == expected
