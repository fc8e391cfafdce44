"""Typed configuration: YAML in, frozen structs out, errors that name the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import yaml

from simplevla.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """Do nothing: PEP 681 speaks to type checkers alone, and Python 3.10 has it not yet."""
        return lambda cls: cls


T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every configuration struct: immutable, and an unknown key is an error."""


def load_yaml(path: Path, kind: type[T]) -> T:
    """Return the YAML file at ``path`` as a ``kind``.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, missing or of a wrong
            type or value; the message names the file and the key.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}", "correct the file") from error
    return build(data, kind, source=str(path))


def build(data: Any, kind: type[T], *, source: str) -> T:
    """Return ``data`` (dicts, lists, numbers, strings) checked and converted to ``kind``.

    Raises:
        ConfigError: ``data`` breaks the schema; the message starts with ``source``.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}", "correct the key that is named") from error
