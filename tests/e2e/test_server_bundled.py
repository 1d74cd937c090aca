"""A server without a model argument serves the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.tiny_model import server_process
from thalweg.config.model_source import model_folder


def test_openai_client_streams_a_chat_from_the_bundled_model(tmp_path: Path) -> None:
    if not (model_folder(None) / "model.safetensors").exists():
        pytest.skip("the bundled model has no weights in this checkout")
    with (
        server_process(tmp_path / "log", {}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        [model] = client.models.list().data
        question = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have now?"
        messages: Any = [{"role": "user", "content": question}]
        stream = client.chat.completions.create(model=model.id, messages=messages, temperature=0, stream=True)
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert "#### " in text
        whole = client.chat.completions.create(model=model.id, messages=messages, temperature=0)
        assert whole.choices[0].message.content == text
        # Greedy without being told so: its generation_config.json says it, and the server says where that comes from.
        by_default = client.chat.completions.create(model=model.id, messages=messages)
        assert by_default.choices[0].message.content == text
        assert model.model_extra is not None
        assert model.model_extra["default_sampling_params"] == {"temperature": 0}
    file = model_folder(None) / "generation_config.json"
    assert f"sampling        temperature 0 ({file})" in (tmp_path / "log").read_text()
