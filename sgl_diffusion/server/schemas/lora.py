"""What a client may say about adapters: per request, and in the calls that change the set."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sgl_diffusion.base.errors import RequestError
from sgl_diffusion.base.lora import MAX_ALPHA, MAX_STRENGTH, LoraSetting, LoraUse, line_up_settings
from sgl_diffusion.server.validate import RequestBody

# For /openapi.json; base/lora.py checks them, with texts of its own.
NICKNAME = r"^[A-Za-z0-9][A-Za-z0-9_.+@ -]{0,127}$"
PATH = r"^[!-~]{1,200}$"
REVISION = {"maxLength": 200, "pattern": r"^[A-Za-z0-9_+@-]+([./][A-Za-z0-9_+@-]+)*$"}
ALPHA: dict[str, Any] = {"exclusiveMinimum": 0, "maximum": MAX_ALPHA}
STRENGTH: dict[str, Any] = {"minimum": -MAX_STRENGTH, "maximum": MAX_STRENGTH}
# Our own texts say what is wrong with NaN.
Strength = Annotated[float, Field(allow_inf_nan=True, json_schema_extra=STRENGTH)]
Alpha = Annotated[float, Field(allow_inf_nan=True, json_schema_extra=ALPHA)]
Path = Annotated[str, Field(json_schema_extra={"pattern": PATH})]
Revision = Annotated[str, Field(json_schema_extra=REVISION)]


class Lora(BaseModel):
    """One entry of `lora` in an image or video request."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    nickname: Annotated[str, Field(json_schema_extra={"pattern": NICKNAME})]
    strength: Strength = 1.0
    path: Path | None = None
    alpha: Alpha | None = None
    weight_name: Path | None = None
    revision: Revision | None = None

    def use(self) -> LoraUse:
        return LoraUse(**dict(self))


def parse_lora(text: str) -> Any:
    """One entry of `lora` from a form."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(
            'lora is not a list of objects like {"nickname": "a", "strength": 0.8}.',
            code="invalid_type",
            param="lora",
        ) from None


class SetLora(RequestBody):
    """POST /v1/set_lora"""

    route = "POST /v1/set_lora"
    lora_nickname: str | list[str]
    """A name or a list; the other lists have as many items."""
    lora_path: Path | list[Path | None] | None = None
    """A .safetensors file, a folder or a hub id; not needed for a nickname that is known."""
    target: str | list[str] = "all"
    """`all`, `transformer`, `transformer_2` or `critic`; one for all, or a list."""
    strength: Strength | list[Strength] = 1.0
    """-100 to 100; one for all, or a list."""
    lora_alpha: Alpha | list[Alpha | None] | None = None
    """Replaces the alpha of the file; may be a fraction."""
    lora_weight_name: Path | list[Path | None] | None = None
    """The file to take where the path holds several."""
    lora_revision: Revision | list[Revision | None] | None = None
    """The branch, tag or commit of a hub id; `main` unless given."""
    merge_mode: Literal["auto", "merge", "dynamic"] | None = None
    """`merge` changes the weights in place, `dynamic` computes the adapters in every step; `auto`
    merges where the weights allow it."""

    def settings(self) -> tuple[LoraSetting, ...]:
        return line_up_settings(
            lora_nickname=self.lora_nickname,
            lora_path=self.lora_path,
            target=self.target,
            strength=self.strength,
            lora_alpha=self.lora_alpha,
            lora_weight_name=self.lora_weight_name,
            lora_revision=self.lora_revision,
        )


class UnmergeLora(RequestBody):
    """POST /v1/unmerge_lora_weights"""

    target: str = "all"
    """`all`, `transformer`, `transformer_2` or `critic`."""

    @field_validator("target", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1:
            return value[0]
        if isinstance(value, list):
            raise RequestError("target is one target here.", code="invalid_type", param="target")
        return value


class MergeLora(UnmergeLora):
    """POST /v1/merge_lora_weights"""

    strength: Strength = 1.0
    """Every adapter of the set that was unmerged is put back at this strength."""
