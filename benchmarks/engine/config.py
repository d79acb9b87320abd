"""What a benchmark is asked to do: a frozen dataclass, read from the command line and checked.

What a field must be stands beside its type, and the comment behind it is its help:

    epochs: Annotated[int, FROM_1] = 60  # passes over the data

One that is named ``out`` is the folder that the benchmark writes to.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, TypeVar

import tyro


class Must(NamedTuple):
    """What a value must do, or each of several."""

    text: str
    holds: Callable[[Any], bool]


def readable(check: Callable[[str], bool]) -> Callable[[str], bool]:
    """The check of a text, which one that can't be read doesn't pass."""

    @functools.wraps(check)
    def holds(text: str) -> bool:
        try:
            return check(text)
        except (KeyError, TypeError, ValueError):  # no such name, a part too many, not a number
            return False

    return holds


def whole_from(least: int) -> Must:
    return Must(f"be a whole number from {least} on", lambda x: x >= least)


FROM_0, FROM_1, FROM_2 = map(whole_from, range(3))
POSITIVE = Must("be positive and finite", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Must("be 0 or more and finite", lambda x: 0 <= x < math.inf)
FINITE_TEMPERATURE = Must("be a finite λ other than 0", lambda x: 0 < abs(x) < math.inf)
SHARE = Must("lie in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_1 = Must("lie in [0, 1)", lambda x: 0 <= x < 1)
ABOVE_0 = Must("lie in (0, 1]", lambda x: 0 < x <= 1)
INSIDE = Must("lie in (0, 1)", lambda x: 0 < x < 1)
OR_NONE = Must("be given, or none at all", lambda x: True)  # of a flag that may have no values


@dataclasses.dataclass(frozen=True)
class Config:
    """What every benchmark is told."""

    out: pathlib.Path

    def __post_init__(self) -> None:
        for name, musts in constraints(type(self)).items():
            value = getattr(self, name)
            if value == () and OR_NONE not in musts:
                raise ValueError(f"{flag(name)} must have a value, got none; name one or more")
            for x in value if isinstance(value, tuple) else (value,):
                for must in musts:
                    if x is not None and not must.holds(x):
                        raise ValueError(f"{flag(name)} must {must.text}, got {x}")


def constraints(cls: type[Config]) -> dict[str, list[Must]]:
    """By the name of a field."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        name: [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Must)]
        for name, hint in hints.items()
    }


AnyConfig = TypeVar("AnyConfig", bound=Config)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read(cls: type[AnyConfig], doc: str | None, default: AnyConfig | None = None) -> AnyConfig:
    """The command line; ``doc`` is the docstring of the module that is started."""
    sys.stdout.reconfigure(errors="replace")  # of a terminal that has no λ
    program = f"python -m benchmarks.{pathlib.Path(sys.argv[0]).stem}".removesuffix(".__main__")
    return tyro.cli(cls, prog=program, description=(doc or "").split("\n")[0], default=default)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Ends the program where its input is not as it should be."""
    try:
        yield
    except (OSError, ValueError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Ends the program as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
