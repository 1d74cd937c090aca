"""How a request wants its conversation to be laid out by the chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from thalweg.server.errors import ApiError


def says(description: str, *, required: bool = False) -> Any:
    return Field(description=description) if required else Field(None, description=description)


class ThinkingSwitch(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["enabled", "disabled"]


class TemplateOptions(BaseModel):
    """How the chat template lays out `messages`."""

    add_generation_prompt: bool | None = says("begin the assistant's turn; true by default")
    continue_final_message: bool | None = says("continue the last message instead of a new turn")
    chat_template_kwargs: dict[str, Any] | None = says("variables for the chat template")
    reasoning_effort: str | None = says("a variable of the chat template; none sets enable_thinking to false too")
    enable_thinking: bool | None = says("a variable of the chat template, which some call thinking")
    thinking: ThinkingSwitch | None = says('enable_thinking, as Kimi and DeepSeek have it: {"type": "disabled"}')
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = says("a variable of the chat template")

    def template_options(self) -> dict[str, Any]:
        """Keyword arguments for the template. Its own names in chat_template_kwargs are refused with ApiError."""
        options = dict(self.chat_template_kwargs or {})
        for name in ("messages", "tools", "add_generation_prompt", "continue_final_message"):
            if name in options:
                reason = f"chat_template_kwargs has {name!r}; expected variables of the template's own"
                raise ApiError(400, reason, param="chat_template_kwargs")
        for name in ("reasoning_effort", "enable_thinking", "documents"):
            if (value := getattr(self, name)) is not None:
                options.setdefault(name, value)
        self._switch_thinking(options)
        if self.continue_final_message or (self.continue_final_message is None and self._is_begun()):
            if self.add_generation_prompt:
                reason = "continue_final_message and add_generation_prompt are both true; expected one of them"
                raise ApiError(400, reason, param="continue_final_message")
            return options | {"add_generation_prompt": False, "continue_final_message": True}
        return options | {"add_generation_prompt": self.add_generation_prompt is not False}

    def _switch_thinking(self, options: dict[str, Any]) -> None:
        """Whether to reason, under both names that templates have for it: Qwen's, and Kimi's and DeepSeek's."""
        if isinstance(options.get("thinking"), bool):
            options.setdefault("enable_thinking", options["thinking"])
        if self.thinking is not None:
            options.setdefault("enable_thinking", self.thinking.type == "enabled")
        if self.reasoning_effort == "none":
            options.setdefault("enable_thinking", False)
        if "enable_thinking" in options:
            options.setdefault("thinking", options["enable_thinking"])

    def _is_begun(self) -> bool:
        """Whether the last message says itself that it is to be continued, as Kimi's and DeepSeek's APIs have it."""
        last = (getattr(self, "messages", None) or [{}])[-1]
        return last.get("role") == "assistant" and (last.get("partial") is True or last.get("prefix") is True)
