"""Where options come from: flags, then variables PREGATE_..., then a YAML file, then their defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import create_model
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from pregate.base.errors import UserError, in_one_line
from pregate.base.options import Option

PREFIX = "PREGATE_"
#: The variable that names the file where no flag does.
FILE_VARIABLE = PREFIX + "CONFIG"
#: What `pregate serve` says to the processes it starts.
OWN_VARIABLES = frozenset({"PREGATE_RUN_DIR"})


class _Tree(BaseSettings):
    """Values are kept as they come: options read and check them."""

    model_config = SettingsConfigDict(protected_namespaces=(), env_prefix=PREFIX, extra="allow")


def gather(
    known: Mapping[str, Option], flags: Mapping[str, Any], file: Path | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what is said of options, by key, and where: what comes first in the module's line is believed.

    UserError names unknown keys of the file, unknown PREGATE_ variables, and a file that is no mapping.
    """
    tree = create_model("Settings", __base__=_Tree, **dict.fromkeys(known, (Any, None)))  # pyright: ignore[reportCallIssue, reportArgumentType]
    names = {PREFIX + key.upper(): key for key in known}
    known_names = {*names, FILE_VARIABLE, *OWN_VARIABLES}
    if wrong := [name for name in os.environ if name.startswith(PREFIX) and name not in known_names]:
        raise UserError.of_unknown(dict.fromkeys(wrong, "(set)"), names)  # not what they say: it may be a secret
    file = file or (Path(os.environ[FILE_VARIABLE]) if os.environ.get(FILE_VARIABLE) else None)
    of_file = {} if file is None else _read(file, known)
    of_environment = EnvSettingsSource(tree, case_sensitive=False, env_prefix=PREFIX)
    values, sources = dict(of_file), dict.fromkeys(of_file, str(file))
    for name, key in names.items():
        found, _, _ = of_environment.get_field_value(tree.model_fields[key], key)
        if found is not None:
            values[key], sources[key] = found, name
    return {**values, **flags}, sources | {key: known[key].flag for key in flags}


def _read(file: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8-sig"))
        top = loader.get_single_node()
        found = loader.construct_document(top) if top is not None else {}
    except OSError as error:
        raise UserError.of("--config", file, f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError.of("--config", file, f"is no YAML mapping of options: {in_one_line(error)}") from error
    except RecursionError:
        raise UserError.of("--config", file, "is no YAML mapping of options: it is nested too deeply") from None
    if not isinstance(found, dict):
        raise UserError.of("--config", file, f"is no YAML mapping of options, but {type(found).__name__}")
    keys = [key.value for key, _ in top.value] if top is not None else []
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError.of("--config", file, f"says {twice} twice; allowed: each option once")
    if wrong := {f"{file}: {key}": value for key, value in found.items() if key not in known}:
        raise UserError.of_unknown(wrong, known)
    return found
