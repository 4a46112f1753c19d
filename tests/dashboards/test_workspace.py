"""The workspace as JSON, compared with what W&B's library sends."""

import json
from typing import Any

from wandb_workspaces.workspaces import interface

from gptlab.dashboards.workspace import build_workspace, workspace_json


def test_workspace_json_equals_what_the_library_sends(monkeypatch):
    sent: list[Any] = []

    def upsert(view: Any) -> Any:
        sent.append(view)
        return {"upsertView": {"view": {"name": "nw-abc-v", "id": "1"}}}

    monkeypatch.setattr(interface.internal, "upsert_view2", upsert)
    monkeypatch.setattr(interface, "get_app_url", lambda _: "https://wandb.ai")
    monkeypatch.setattr(interface.wandb, "Api", lambda: None)
    workspace = build_workspace("me", "models", "gptlab")
    values = json.loads(workspace_json(workspace))
    workspace.save()
    (view,) = sent
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    assert without_ids(values.pop("spec")) == without_ids(spec)
    assert values == {"entity": view.entity, "project": view.project, "name": view.display_name}


def without_ids(spec: Any) -> Any:
    """Returns a specification without the IDs that the library generates randomly."""
    if isinstance(spec, dict):
        return {key: without_ids(value) for key, value in spec.items() if key not in ("id", "__id__", "ref")}
    return [without_ids(value) for value in spec] if isinstance(spec, list) else spec
