"""`help()` of each public name says what a user needs: fields, arguments and errors."""

from __future__ import annotations

import ast
import enum
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec
import pytest

import backbeat_trio
from backbeat_trio._runtime.operations import DEFAULT_ESTIMATE, ESTIMATES

PUBLIC: Final = {
    name: value
    for name, value in vars(backbeat_trio).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
CLASSES: Final = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


def entries(doc: str, section: str) -> list[str]:
    """Return the names that a section of a docstring explains, in their order."""
    found = re.search(rf"^{section}:\n((?:  .*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    lines = found[1].splitlines() if found else []
    heads = [re.match(r"  (\*{0,2}[\w, ]+): (\S.*)", line) for line in lines]
    # It is a condition, so it begins with 'if' or 'on entering', for example.
    assert section != "Raises" or not [head for head in heads if head and head[2][:6] == "where "]
    return [name for head in heads if head for name in head[1].split(", ")]


def doc_of(value: object) -> str:
    return inspect.getdoc(value) or ""


def callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Give all public functions, and all public methods of public classes."""
    for name, value in PUBLIC.items():
        if inspect.isfunction(value):
            yield name, value
        for attribute, member in vars(value).items() if inspect.isclass(value) else ():
            method = getattr(member, "__func__", member)
            if inspect.isfunction(method) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", method


CALLABLES: Final = dict(callables())


def fields_of(kind: type) -> list[str]:
    """Return the names of what an object of a public class holds, as far as it is plain data."""
    if issubclass(kind, msgspec.Struct):
        return list(kind.__struct_fields__)
    if issubclass(kind, enum.Enum):
        return [member.name for member in kind]
    if issubclass(kind, tuple):
        return list(getattr(kind, "_fields", ()))
    return [name for name in inspect.get_annotations(kind) if not name.startswith("_")]


def raised(function: Callable[..., Any]) -> set[str]:
    """Return the errors that the lines of a function raise themselves."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        # Not a function that makes one.
        and not node.exc.func.id.startswith("_")
    }


@pytest.mark.parametrize("name", [*PUBLIC, *CALLABLES])
def test_each_has_a_docstring(name: str) -> None:
    value = CALLABLES.get(name) or PUBLIC[name]
    # Structs and named tuples without a docstring have one that lists their fields.
    assert doc_of(value)
    assert not doc_of(value).startswith(f"{name}(")


@pytest.mark.parametrize("name", CLASSES)
def test_each_field_is_in_the_docstring_of_its_class(name: str) -> None:
    kind = CLASSES[name]
    assert entries(doc_of(kind), "Attributes") == fields_of(kind)


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_is_said_twice(name: str) -> None:
    # A string below a field is not shown by `help()`, so the docstring of the class has the text.
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(CLASSES[name]))).body
    assert isinstance(tree, ast.ClassDef)
    for line in tree.body[1:]:
        assert not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)), (
            f"line {line.lineno} of {name} is a string"
        )


@pytest.mark.parametrize("name", CALLABLES)
def test_each_argument_and_error_is_in_the_docstring(name: str) -> None:
    function = CALLABLES[name]
    doc = doc_of(function)
    if same := re.match(r"(?:See|As) `([\w.]+)`\.$", doc):
        assert same[1] in CALLABLES or same[1].startswith("logging.")
        return
    stars: dict[object, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    taken = [
        stars.get(parameter.kind, "") + parameter.name
        for parameter in inspect.signature(function).parameters.values()
        # What `trio.Nursery.start` passes is not for users.
        if parameter.name not in ("self", "cls", "task_status")
    ]
    if "It takes the arguments" not in doc:
        assert entries(doc, "Args") == taken
    assert raised(function) <= set(entries(doc, "Raises"))


def test_the_estimates_of_the_known_types() -> None:
    doc = doc_of(backbeat_trio.Session.operation)
    named = {type: int(beats) for type, beats in re.findall(r'``"(\w+)"`` (\d+)', doc)}
    assert named == {type: most for type, (_, most) in ESTIMATES.items()}
    assert f"Any other name has {DEFAULT_ESTIMATE}." in doc


def test_the_help_of_the_package_begins_with_its_use() -> None:
    doc = doc_of(backbeat_trio)
    assert doc.index("async with backbeat.session()") < doc.index("folders are layers")
