"""Reads model_index.json and the component configs of a repository in diffusers format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgl_diffusion.base.errors import ModelNotFoundError, SetupError

if TYPE_CHECKING:
    from sgl_diffusion.loader.absent import Absences

INDEX_NAME = "model_index.json"


@dataclass(frozen=True)
class Component:
    """One folder of a repository and the class its files were written by.

    `variant` is the set of weights to prefer, `replaced` a file or folder that has them instead.
    With `absences` it is loaded without its weights, and put down there.
    """

    folder: Path
    library: str
    class_name: str
    variant: str | None = None
    replaced: Path | None = None
    absences: Absences | None = None

    @property
    def weights(self) -> Path:
        """The folder with the weights, or the one file that holds them."""
        return self.replaced or self.folder


@dataclass(frozen=True)
class ModelIndex:
    """`pipeline` names the pipeline class; `options` are its plain values, such as boundary_ratio.

    A component that the repository declares absent is not in `components` but in `absent`.
    """

    path: Path
    pipeline: str
    components: Mapping[str, Component]
    options: Mapping[str, Any]
    absent: tuple[str, ...] = ()

    def component(self, name: str) -> Component:
        if name in self.components:
            return self.components[name]
        raise SetupError(
            f"The model at {self.path} has no {name}.",
            hint=f"Its {INDEX_NAME} names {', '.join(self.components) or 'no components'}.",
        )

    def with_weights(self, name: str, weights: Path) -> ModelIndex:
        """The same model with other weights for one component, whose config stays."""
        component = dataclasses.replace(self.component(name), replaced=weights)
        return dataclasses.replace(self, components={**self.components, name: component})

    def without_weights(self, absences: Absences) -> ModelIndex:
        """The same model, of which every component is to be loaded without its weights."""
        components = {
            name: dataclasses.replace(part, absences=absences)
            for name, part in self.components.items()
        }
        return dataclasses.replace(self, components=components)


def read_index(path: Path, variant: str | None = None) -> ModelIndex:
    """The index of a local repository folder, whose weights are preferred in that variant."""
    if not (path / INDEX_NAME).is_file():
        raise ModelNotFoundError(
            f"{path} is not a model in diffusers format: it has no {INDEX_NAME}.",
            hint="Use a folder written by save_pretrained, or a hub id of such a repository.",
        )
    values = read_json(path / INDEX_NAME)
    pipeline = values.get("_class_name")
    if not isinstance(pipeline, str):
        raise SetupError(
            f"{path / INDEX_NAME} names no pipeline class.",
            hint="Its _class_name says which, as in a folder written by save_pretrained.",
        )
    components, options, absent = {}, {}, []
    for name, value in values.items():
        if name.startswith("_"):
            continue
        pair = isinstance(value, list) and len(value) == 2
        if pair and all(part is None for part in value):
            absent.append(name)
        elif pair and all(isinstance(part, str) for part in value):
            components[name] = Component(path / name, value[0], value[1], variant)
        else:
            options[name] = value
    return ModelIndex(path, pipeline, components, options, tuple(absent))


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The config of one component."""
    if not (folder / name).is_file():
        raise SetupError(
            f"{folder / name} is not there.", hint="Check that the download is complete."
        )
    return read_json(folder / name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise SetupError(f"{file} is not a JSON object.", hint="Delete it and download it again.")
    return values
