"""Train the adapters of an ablation, each form at the best of several learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from checkpoints.adapters import load_adapter, save_adapter
from eval.ablation.forms import FORMS, Form
from eval.ablation.memo import Memo, Unit
from eval.ablation.study import RATE_SEED, Study, Workspace, made_on
from model.adapter import IPAdapter
from train import adapter as training
from train import checkpoint
from train.plan import Plan
from train.randomness import seeded
from train.setting import Setting

LOSSES = ("step", "held_out", "gain_zero", "gain_shuffled")


def untrained_adapter(setting: Setting, form: Form, seed: int) -> IPAdapter:
    """Build the initial adapter of a form. With the same seed, all forms get the same projection."""
    with seeded(seed):
        return setting.adapter(form.own_projections)


def train(workspace: Workspace, study: Study, form: str, plan: Plan, steps: Sequence[int]) -> None:
    """Train one adapter. Write it after each number of steps, unless that file exists with the same settings."""
    settings, state = settings_of(workspace, plan), workspace.work / f"{plan.name}.pt"
    missing = [step for step in steps if workspace.card(study, plan, step).get("settings") != settings]
    if not missing:
        return
    if (content := checkpoint.load(state)) and content["step"] > missing[0]:
        state.unlink()  # the state is past the missing step, so train from the start
    setting, fuse = workspace.setting(study), FORMS[form].fuse
    for step in steps:
        start = untrained_adapter(setting, FORMS[form], plan.seed)
        adapter, log = training.fit(setting, start, plan, workspace.work, fuse, until=step)
        if step in missing:
            losses = [{key: row[key] for key in LOSSES} for row in log if "held_out" in row]
            size = sum(p.numel() for p in adapter.parameters())
            card = {"command": "python -m eval ablation", "settings": settings, "parameters": size, "losses": losses}
            save_adapter(adapter, setting.pipeline.unet, workspace.adapter(study, plan, step), card | made_on(study.device))


def settings_of(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """Return the settings that the card of an adapter must record. The device is not one of them."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan).items() if key != "device"}
    return {"made_from": workspace.made_from, **plain}


def trained_adapter(workspace: Workspace, study: Study, form: str, plan: Plan, step: int) -> IPAdapter:
    """Load an adapter as it was after some steps of its training; train it first if it is not there."""
    checkpoints = study.checkpoints if plan.seed != RATE_SEED else [each for each in study.rate_checkpoints if each <= step]
    if workspace.card(study, plan, step).get("settings") != settings_of(workspace, plan):
        train(workspace, study, form, plan, checkpoints)
    unet = workspace.bench(study).pipeline.unet
    return load_adapter(workspace.adapter(study, plan, step), unet).to(study.device)


def try_rate(workspace: Workspace, study: Study, form: str, rate: float, through: bool = False) -> Unit:
    """Return the held-out loss after a short training at this rate, or a whole one (`through`); None if the loss was not finite."""
    steps = study.rate_checkpoints if through else (study.rate_steps,)

    def make() -> Unit:
        plan = study.plan(form, RATE_SEED, rate)
        try:
            train(workspace, study, form, plan, steps)
        except FloatingPointError:
            return Unit(None, made_on(study.device))
        return Unit(workspace.card(study, plan, steps[-1])["losses"][-1]["held_out"], made_on(study.device))

    return Memo(workspace.work)(f"{'through' if through else 'rate'}-{form}-{rate:g}", make)


def best_rate(losses: Mapping[float, float | None], form: str) -> float:
    """Return the rate with the lowest held-out loss. Raises ValueError if no loss was finite."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise ValueError(f"the loss of {form} is not finite at any learning rate: use lower --rates")
    return min(finite, key=finite.__getitem__)


def chosen_rate(workspace: Workspace, study: Study, form: str) -> float:
    """Return the learning rate of a form."""
    return best_rate({rate: try_rate(workspace, study, form, rate).value for rate in study.rates}, form)


def plan_of(workspace: Workspace, study: Study, form: str, seed: int) -> Plan:
    """Return the plan of a counted adapter, at the learning rate of its form."""
    return study.plan(form, seed, chosen_rate(workspace, study, form))
