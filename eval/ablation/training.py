"""Train the adapters of an ablation, each form at the best of several learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from checkpoints.adapters import save_adapter
from eval.ablation.forms import FORMS, SHARES
from eval.ablation.memo import Memo, as_json
from eval.ablation.study import Study, Workspace, untrained_adapter
from train import adapter as training
from train import checkpoint


def try_rate(workspace: Workspace, study: Study, form: str, rate: float) -> float | None:
    """Return `gain_shuffled` (train/adapter.py) after a short training at this rate, with seed 1000.

    None if the loss was not finite.
    """
    plan = study.rate_plan(form, rate)

    def make() -> float | None:
        setting = workspace.setting(study)
        start = untrained_adapter(setting, FORMS[form], 1000)
        try:
            _, log = training.fit(setting, start, plan, workspace.work, FORMS[form].fuse)
        except FloatingPointError:
            return None
        return float(log[-1]["gain_shuffled"])

    return Memo(workspace.work)(plan.name, {"plan": asdict(plan)}, make)


def best_rate(gains: Mapping[float, float | None], form: str) -> float:
    """Return the rate with the highest gain. Raises ValueError if no loss was finite."""
    finite = {rate: gain for rate, gain in gains.items() if gain is not None}
    if not finite:
        raise ValueError(f"the loss of {form} is not finite at any learning rate: use lower --rates")
    return max(finite, key=finite.__getitem__)


def train(workspace: Workspace, study: Study, form: str, seed: int, rate: float) -> None:
    """Train one adapter. Write it after each share of its steps, unless that file exists with the same settings."""
    plan, fuse = study.plan(form, seed, rate), FORMS[form].fuse
    settings, state = settings_of(workspace, study, form, seed, rate), workspace.work / f"{plan.name}.pt"
    missing = [share for share in SHARES if workspace.card(form, seed, share).get("settings") != settings]
    if not missing:
        return
    if (saved := checkpoint.load(state)) and saved["step"] > round(missing[0] * plan.steps):
        state.unlink()  # the state is past the missing share, so train from the start
    setting = workspace.setting(study)
    for share in SHARES:
        start = untrained_adapter(setting, FORMS[form], seed)
        adapter, log = training.fit(setting, start, plan, workspace.work, fuse, until=round(share * plan.steps))
        if share in missing:
            keys = ("step", "held_out", "gain_zero", "gain_shuffled")
            gains = [{key: row[key] for key in keys} for row in log if "held_out" in row]
            size = sum(p.numel() for p in adapter.parameters())
            card = {"command": "python -m eval ablation", "settings": settings, "parameters": size, "gains": gains}
            save_adapter(adapter, setting.pipeline.unet, workspace.adapter(form, seed, share), card)


def settings_of(workspace: Workspace, study: Study, form: str, seed: int, rate: float) -> dict[str, Any]:
    """Return the settings that the card of an adapter must record."""
    return as_json({"made_from": workspace.made_from, **asdict(study.plan(form, seed, rate))})
