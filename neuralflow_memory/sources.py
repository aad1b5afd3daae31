"""Where options come from: arguments first, then `NEURALFLOW_*`, then a TOML or YAML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from .config import Settings, explained
from .errors import ConfigError

IN_MEMORY = ":memory:"


def read_settings(source: str | os.PathLike[str] | Settings | None = None, **options: Any) -> Settings:
    """Settings from *source* (a folder, a `.toml` or `.yaml` file, or ready ones), the environment and *options*.

    Raises:
        ConfigError: An option is unknown or wrong; all problems are named.
    """
    if isinstance(source, Settings):
        if not options:
            return source
        base = source.model_dump()
        for name, value in options.items():
            new = value.model_dump() if isinstance(value, BaseModel) else value
            base[name] = (
                laid_over(new, base[name]) if isinstance(new, Mapping) and isinstance(base.get(name), dict) else new
            )
        return _validated(lambda: Settings.model_validate(base))
    file: Path | None = None
    if source is not None:
        path = Path(source).expanduser() if str(source) != IN_MEMORY else Path(IN_MEMORY)
        if path.suffix in (".toml", ".yaml", ".yml") and not path.is_dir():
            if not path.is_file():
                raise ConfigError(f"there is no file {path}; give a folder, or a file of options that exists")
            file = path
        else:
            options["path"] = path
    return _validated(lambda: _sources(file)(**options))


def _validated(build: Callable[[], Settings]) -> Settings:
    try:
        return build()
    except ValidationError as error:
        raise ConfigError(f"wrong settings: {explained(error)}") from None
    except ConfigError:
        raise
    except Exception as error:  # what the TOML and YAML readers and the environment's JSON raise
        raise ConfigError(f"the settings can't be read: {error}") from error


def _sources(file: Path | None) -> type[Settings]:
    """`Settings` that read arguments first, then `NEURALFLOW_*`, then *file*."""

    class Sources(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix="NEURALFLOW_", env_nested_delimiter="__", extra="forbid", frozen=True
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if file is None:
                return init_settings, env_settings
            kind = TomlConfigSettingsSource if file.suffix == ".toml" else YamlConfigSettingsSource
            return init_settings, env_settings, kind(settings_cls, file)

    return Sources


def laid_over(new: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """*base* with what *new* says instead."""
    return {**base, **new}


__all__ = ["IN_MEMORY", "laid_over", "read_settings"]
